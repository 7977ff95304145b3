//! `anyvisor balloon`: how much of its memory a VM lends to the host.

use super::client::{SOON, Target};
use super::commands::print;
use crate::cli::BalloonOptions;
use anyvisor_vmm::config::show_mib;
use anyvisor_vmm::{Error, Result};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PATH: &str = "/balloon";
/// How long the guest may take to come to the size that is wanted before this says how far it is.
const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(100);

/// Shows a VM's balloon, after it has been made larger or smaller if that is asked for.
pub fn command(options: &BalloonOptions) -> Result<u8> {
    let target = Target::find(&options.id)?;
    let read = || {
        let answer = target.ask("GET", PATH, None, Some(SOON)).map_err(|trouble| target.error(trouble))?;
        Ok::<_, Error>(answer.unwrap_or_default())
    };
    if let Some(size) = options.size {
        if !size.is_multiple_of(1 << 20) {
            return Err(Error::user(format!("a balloon of {size} bytes is not in whole MiB; write for example 256M")));
        }
        let body = json!({ "amount_mib": size >> 20 });
        target.ask("PATCH", PATH, Some(&body), Some(SOON)).map_err(|trouble| target.error(trouble))?;
    }
    let begun = Instant::now();
    let mut seen = read()?;
    while options.size.is_some() && seen["actual_pages"] != seen["target_pages"] && begun.elapsed() < PATIENCE {
        std::thread::sleep(AGAIN);
        seen = read()?;
    }
    print(&if options.json { format!("{seen:#}\n") } else { line(&seen) });
    Ok(0)
}

/// What [`anyvisor_vmm::balloon::Lent::describe`] gives, in a line.
fn line(seen: &Value) -> String {
    let (actual, wanted) = (&seen["actual_mib"], &seen["target_mib"]);
    let lends = if seen["actual_pages"] == seen["target_pages"] {
        format!("lends {actual}M")
    } else {
        format!("lends {actual}M of the {wanted}M that are wanted")
    };
    let says = |key: &str| seen[key].as_u64().map(show_mib);
    match (says("available_memory"), says("total_memory")) {
        (Some(available), Some(total)) => format!("{lends}; of {total} it has {available} to spare\n"),
        _ => format!("{lends}; the guest has not told how its memory is\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_how_far_it_is() {
        let done = json!({ "actual_mib": 64, "target_mib": 64, "actual_pages": 1, "target_pages": 1,
            "available_memory": 100u64 << 20, "total_memory": (200u64 << 20) - 1 });
        assert_eq!(line(&done), "lends 64M; of 200M it has 100M to spare\n");
        let half = json!({ "actual_mib": 32, "target_mib": 64, "actual_pages": 1, "target_pages": 2 });
        assert!(line(&half).starts_with("lends 32M of the 64M that are wanted; "));
    }
}
