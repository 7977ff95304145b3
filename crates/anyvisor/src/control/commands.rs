//! `anyvisor ps`, `pause`, `resume`, `stop` and `snapshot`. Each returns the process's exit code.

use super::client::{SOON, Target, Trouble};
use super::runtime::{self, Life, Place};
use crate::cli::{PsOptions, SnapshotOptions, StopOptions};
use anyvisor_vmm::config::show_size;
use anyvisor_vmm::{Error, Result};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long `ps` waits for each VM.
const GLANCE: Duration = Duration::from_secs(1);
/// How often the power button is pressed for a guest that does not listen to it yet.
const PRESS_AGAIN: Duration = Duration::from_millis(500);

/// Lists the VMs of this user.
pub fn ps(options: &PsOptions) -> Result<u8> {
    let folder = runtime::find_folder().map_err(|e| Error::host("cannot use the runtime folder", e))?;
    let ids = runtime::list(&folder).map_err(|e| Error::host(format!("cannot read '{}'", folder.display()), e))?;
    let mut rows = vec![];
    for id in ids {
        match runtime::look(&Place::of_id(&folder, &id)) {
            Ok(Life::Alive(_)) => rows.extend(describe(&id)),
            Ok(Life::Dead { pid }) => {
                let by = pid.map_or(String::new(), |pid| format!(" (process {pid})"));
                eprintln!("anyvisor: VM '{id}'{by} is dead; what it left is removed now");
            }
            Ok(Life::None) => {}
            Err(error) => eprintln!("anyvisor: cannot look after VM '{id}': {error}"),
        }
    }
    print(&if options.json { format!("{:#}\n", Value::Array(rows)) } else { table(&rows) });
    Ok(0)
}

/// What a VM tells about itself, or what is known without; `None` if it has ended meanwhile.
fn describe(id: &str) -> Option<Value> {
    let target = Target::find(id).ok()?;
    match target.ask("GET", "/anyvisor", None, Some(GLANCE)) {
        Ok(details) => details,
        Err(_) if target.has_ended() => None,
        // Its name is taken before its socket is there.
        Err(Trouble::Gone(_)) => Some(json!({ "id": id, "pid": target.pid(), "state": "Starting" })),
        Err(_) => Some(json!({ "id": id, "pid": target.pid(), "state": "Unresponsive" })),
    }
}

/// The rows under their headings, as wide as need be.
fn table(rows: &[Value]) -> String {
    let mut lines = vec![["ID", "PID", "ENGINE", "VCPUS", "MEMORY", "STATE", "UPTIME"].map(String::from)];
    for row in rows {
        let text = |key: &str| row[key].as_str().unwrap_or("-").to_owned();
        let number = |key: &str, show: &dyn Fn(u64) -> String| row[key].as_u64().map_or("-".into(), show);
        lines.push([
            text("id"),
            number("pid", &|pid| pid.to_string()),
            text("engine"),
            number("vcpus", &|cpus| cpus.to_string()),
            number("memory_bytes", &show_size),
            text("state"),
            number("uptime_ms", &|ms| show_time(Duration::from_millis(ms))),
        ]);
    }
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut out = String::new();
    for line in &lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out += cells.join("  ").trim_end();
        out += "\n";
    }
    out
}

/// A time in its two largest units.
fn show_time(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

/// A closed stdout is nobody's mistake.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Pauses a VM.
pub fn pause(name: &str) -> Result<u8> {
    set_state(&Target::find(name)?, "Paused")
}

/// Lets a paused VM go on.
pub fn resume(name: &str) -> Result<u8> {
    set_state(&Target::find(name)?, "Resumed")
}

fn set_state(target: &Target, state: &str) -> Result<u8> {
    // A pause may have to wait for a snapshot that is being written.
    target.ask("PATCH", "/vm", Some(&json!({ "state": state })), None).map_err(|trouble| target.error(trouble))?;
    Ok(0)
}

/// Ends a VM: by its power button, and by force when its time is up.
pub fn stop(options: &StopOptions) -> Result<u8> {
    let target = Target::find(&options.id)?;
    if !options.force && press_power_button(&target, options.timeout)? {
        return Ok(0);
    }
    match target.ask("PUT", "/anyvisor/stop", None, Some(SOON)) {
        Ok(_) | Err(Trouble::Gone(_)) if target.wait_for_end(SOON) => Ok(0),
        Err(trouble @ Trouble::Fault(..)) => Err(target.error(trouble)),
        _ => {
            let pid = target.pid().map_or("its process".into(), |pid| format!("process {pid}"));
            let why = format!("the VM did not end within {} s; kill {pid}", SOON.as_secs());
            Err(Error::host(&target.name, std::io::Error::other(why)))
        }
    }
}

/// Whether the VM has ended within `timeout`. A guest that does not listen to its button may not have come so
/// far yet: it is pressed again until the guest does.
fn press_power_button(target: &Target, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    let mut heard = false;
    loop {
        if !heard {
            match press(target) {
                Ok(enabled) => heard = enabled,
                Err(Trouble::Gone(_)) if target.wait_for_end(SOON) => return Ok(true),
                Err(Trouble::Fault(410, _)) => heard = true,
                Err(trouble) => return Err(target.error(trouble)),
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = if heard { left } else { left.min(PRESS_AGAIN) };
        if target.wait_for_end(wait) {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    let why = if heard { "did not power off" } else { "does not listen to its power button and did not power off" };
    eprintln!("anyvisor: {}: the guest {why} within {timeout:?}; ended by force", target.name);
    Ok(false)
}

/// Presses the button once, of a paused VM after it goes on. Whether the guest listens.
fn press(target: &Target) -> std::result::Result<bool, Trouble> {
    let button = || target.ask("PUT", "/anyvisor/power-button", None, Some(SOON));
    let answer = match button() {
        Err(Trouble::Fault(409, _)) => {
            target.ask("PATCH", "/vm", Some(&json!({ "state": "Resumed" })), Some(SOON))?;
            button()?
        }
        other => other?,
    };
    Ok(answer.is_some_and(|answer| answer["enabled"] == true))
}

/// Saves a VM to a folder.
pub fn snapshot(options: &SnapshotOptions) -> Result<u8> {
    let target = Target::find(&options.id)?;
    let folder = absolute(&options.folder)?;
    let mut body = json!({ "snapshot_path": folder });
    if let Some(parent) = &options.parent {
        body["snapshot_type"] = json!("Diff");
        body["parent_path"] = json!(absolute(parent)?);
    }
    let answer = target.ask("PUT", "/snapshot/create", Some(&body), None).map_err(|t| target.error(t))?;
    let bytes = answer.and_then(|summary| summary["memory"].as_u64()).unwrap_or(0);
    eprintln!("anyvisor: {}: saved to '{}', {} MiB of memory", target.name, folder, bytes.div_ceil(1 << 20));
    Ok(0)
}

/// The path as the VM's process, which may be elsewhere, can use it.
fn absolute(path: &Path) -> Result<String> {
    let absolute: PathBuf =
        std::path::absolute(path).map_err(|e| Error::user(format!("bad path '{}': {e}", path.display())))?;
    let text = absolute.to_str().map(ToOwned::to_owned);
    text.ok_or_else(|| Error::user(format!("'{}' is not UTF-8; use another path", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let vm = json!({ "id": "web", "pid": 12, "engine": "kvm", "vcpus": 2, "memory_bytes": 1u64 << 30,
                         "state": "Running", "uptime_ms": 61_000 });
        let starting = json!({ "id": "a-long-name", "pid": 3, "state": "Starting" });
        let expected = "\
ID           PID  ENGINE  VCPUS  MEMORY  STATE     UPTIME
web          12   kvm     2      1G      Running   1m1s
a-long-name  3    -       -      -       Starting  -
";
        assert_eq!(table(&[vm, starting]), expected);
        assert_eq!(table(&[]).lines().count(), 1);
    }

    #[test]
    fn times_show_two_units() {
        for (seconds, text) in
            [(0, "0s"), (59, "59s"), (60, "1m0s"), (3599, "59m59s"), (3600, "1h0m"), (90_000, "1d1h")]
        {
            assert_eq!(show_time(Duration::from_secs(seconds)), text);
        }
    }
}
