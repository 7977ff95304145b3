//! The flash chip with UEFI variables, and the file that keeps them. What a vCPU changes is written to the file before
//! its access ends. In a snapshot the file is named and not held, as disks' images are.

use crate::disk::Stamp;
use crate::variables::Variables;
use crate::{Error, Result};
use anyvisor_devices::flash::{Flash, FlashState};
use serde::{Deserialize, Serialize};

/// Chip and file.
pub(super) struct VariablesChip {
    pub flash: Flash,
    file: Variables,
}

/// The same in a snapshot.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariablesState {
    chip: FlashState,
    file: Stamp,
}

impl VariablesChip {
    /// A chip with the contents of `file`.
    pub fn new(file: Variables, bytes: Vec<u8>) -> VariablesChip {
        VariablesChip { flash: Flash::new(bytes), file }
    }

    pub fn length(&self) -> u64 {
        self.flash.bytes().len() as u64
    }

    /// A vCPU's write of 1 to 8 bytes, within the chip.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(changed) = self.flash.write(offset, data) else { return };
        if let Err(error) = self.file.write(changed.start, &self.flash.bytes()[changed]) {
            tracing::warn!("cannot write UEFI variables to '{}': {error}", self.file.path().display());
            self.flash.fail();
        }
    }

    /// The chip's state, with all that the guest has changed on the host's disk.
    ///
    /// # Errors
    /// The host's.
    pub fn save(&self) -> Result<VariablesState> {
        let file = self.file.flush().map_err(|error| self.trouble("cannot write", error))?;
        Ok(VariablesState { chip: self.flash.state(), file })
    }

    /// What about the file is not as it was when `state` was saved.
    ///
    /// # Errors
    /// The host's.
    pub fn difference(&self, state: &VariablesState) -> Result<Option<String>> {
        let now = self.file.stamp().map_err(|error| self.trouble("cannot look at", error))?;
        Ok((now != state.file).then(|| {
            format!(
                "'{}', the file for UEFI variables, has changed since; put it back as it was then (a copy made with cp -p \
                 while the VM was paused or had ended)",
                self.file.path().display()
            )
        }))
    }

    pub fn restore(&mut self, state: &VariablesState) {
        self.flash.set_state(state.chip);
    }

    fn trouble(&self, what: &str, error: std::io::Error) -> Error {
        Error::host(format!("{what} '{}', the file for UEFI variables", self.file.path().display()), error)
    }
}
