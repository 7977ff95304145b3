//! A Linux guest that runs a suite's programs: one boot for all of them, on anyvisor or in QEMU's TCG.
//!
//! The guest's init is a script. Lines of its output that begin with `@@` are the harness's; the last one is
//! [`DONE`]. The kernel is Debian's for PCs: its cloud kernel has no 16-bit segments, which some tests are about.

use super::process;
use anyhow::{Context, Result, bail};
use anyvisor_tests::{assets, vm};
use std::process::Command;
use std::time::Duration;

/// The line that a guest's script ends with, before it powers off.
pub const DONE: &str = "@@ done";

/// QEMU's TCG takes some minutes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(3600);

/// On what a guest runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum On {
    Anyvisor,
    Tcg,
}

/// Boots a guest with `files` (as [`assets::initramfs_with`]), whose init runs `script`; its console's lines.
///
/// # Errors
/// It cannot be started, or no test was begun.
pub fn run(on: On, name: &str, files: &[(String, Vec<u8>)], script: &str) -> Result<Vec<String>> {
    let kernel = assets::pc_kernel()?;
    let script = format!("{script}\necho '{DONE}'\npoweroff -f");
    let initramfs = assets::scratch(name, &assets::initramfs_with(&script, files)?)?;
    // Timer checks fail on a machine that is busy enough, and TCG is slow; Debian turns the vsyscall page off.
    let line = "console=ttyS0 quiet no_timer_check panic=-1 vsyscall=emulate";
    let mut command = match on {
        On::Anyvisor => {
            let mut command = vm::command();
            command.args(["run", "--engine", "translator", "--cpu-model", "host", "--no-api", "--memory", "1G"]);
            command.args(["--cmdline", line, "--kernel"]).arg(&kernel).arg("--initrd").arg(&initramfs);
            command
        }
        On::Tcg => {
            crate::install_qemu()?;
            let mut command = Command::new("qemu-system-x86_64");
            command.args(["-machine", "accel=tcg", "-cpu", "max", "-m", "1024", "-no-reboot", "-nodefaults"]);
            command.args(["-display", "none", "-serial", "stdio", "-append", line]);
            command.arg("-kernel").arg(&kernel).arg("-initrd").arg(&initramfs);
            command
        }
    };
    let ended = process::run(&mut command, PATIENCE, |_| false);
    std::fs::remove_file(&initramfs).with_context(|| format!("removing {}", initramfs.display()))?;
    let text = ended?.text();
    if !text.lines().any(|line| line.starts_with("@@")) {
        bail!("the guest began no test; it said:\n{text}");
    }
    Ok(text.lines().map(|line| line.trim_end_matches('\r').to_owned()).collect())
}
