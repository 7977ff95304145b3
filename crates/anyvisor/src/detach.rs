//! `run --detach`: a VM that outlives the terminal it was started from.
//!
//! The process starts itself again in a session of its own. The child keeps its parent's stderr until the VM is
//! built, so that every mistake is seen where it was made; then it writes its name to the parent, which prints
//! it and leaves, and sends its own messages to a log beside the control socket. If the child ends before that,
//! the parent ends with its exit code.

use crate::control::runtime::Claim;
use anyvisor_vmm::{Error, Result};
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Tells the child that it is one.
const MARK: &str = "ANYVISOR_DETACHED";

/// Which of the two processes this is.
pub enum Side {
    /// The child is under way, or has failed: what is left is to leave with this exit code.
    Parent(u8),
    Child(Background),
}

/// The child's way into the background.
pub struct Background(());

/// Starts the child, or is it.
///
/// # Errors
/// The child cannot be started.
pub fn begin() -> Result<Side> {
    if std::env::var_os(MARK).is_some() {
        // It fails only for the leader of a process group, who has a session of its own or wants no other.
        let _ = rustix::process::setsid();
        return Ok(Side::Child(Background(())));
    }
    start().map(Side::Parent).map_err(|error| Error::host("cannot start the VM in the background", error))
}

fn start() -> std::io::Result<u8> {
    let mut child = Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .env(MARK, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut name = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut name)?;
    }
    if name.is_empty() {
        // It has said why.
        return Ok(child.wait()?.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1));
    }
    // A closed stdout is nobody's mistake.
    let _ = std::io::stdout().write_all(name.as_bytes());
    Ok(0)
}

impl Background {
    /// The VM is built: tells the parent its name, and lets go of the terminal.
    ///
    /// # Errors
    /// There is no control socket, so that nobody could reach the VM, or the host failed.
    pub fn go(self, id: &str, claim: Option<&Claim>) -> Result<()> {
        let trouble = |error| Error::host("cannot go into the background", error);
        let Some(claim) = claim else {
            return Err(Error::host(id, std::io::Error::other("a VM without a control socket cannot be detached")));
        };
        let path = log_path(&claim.place().socket);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let log = options
            .open(&path)
            .map_err(|error| Error::host(format!("cannot write the log '{}'", path.display()), error))?;
        let mut out = std::io::stdout();
        writeln!(out, "{id}").and_then(|()| out.flush()).map_err(trouble)?;
        let null = File::options().write(true).open("/dev/null").map_err(trouble)?;
        // The parent has the name when its end of the pipe is closed.
        rustix::stdio::dup2_stderr(&log).and_then(|()| rustix::stdio::dup2_stdout(&null)).map_err(|e| trouble(e.into()))
    }
}

/// Where a detached VM's messages go: `ID.log` beside its socket.
fn log_path(socket: &Path) -> PathBuf {
    if socket.extension() == Some(OsStr::new("sock")) {
        return socket.with_extension("log");
    }
    let mut path = socket.as_os_str().to_owned();
    path.push(".log");
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_lie_beside_sockets() {
        assert_eq!(log_path(Path::new("/r/web.1.sock")), Path::new("/r/web.1.log"));
        assert_eq!(log_path(Path::new("/r/api")), Path::new("/r/api.log"));
    }
}
