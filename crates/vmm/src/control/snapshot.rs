//! `PUT /snapshot/create`: the VM stands still while its memory is written, and goes on while the disk catches
//! up; the answer comes when the snapshot is valid.

use super::http::Fault;
use crate::machine::Remote;
use crate::{Error, snapshot};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Saves the VM to `directory`; with `parent`, only what was written since that snapshot.
///
/// # Errors
/// As for [`snapshot::save`], and when the VM cannot be paused.
pub fn save(remote: &Remote, directory: PathBuf, parent: Option<PathBuf>) -> Result<Value, Fault> {
    let fault = |error: Error| {
        let status = if matches!(error, Error::User(_)) { 400 } else { 500 };
        Fault::new(status, error.to_string())
    };
    let saved = remote.with_paused(move |paused| snapshot::save(paused, &directory, parent.as_deref()))?;
    let summary = saved.and_then(snapshot::Unfinished::finish).map_err(fault)?;
    Ok(json!(summary))
}
