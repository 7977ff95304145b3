//! `anyvisor console`: this terminal on a running VM's serial console.
//!
//! In a terminal, Ctrl-A X detaches, and the VM runs on; keys that the guest does not take in time are dropped,
//! as on a real line, so that the escape always works. Without a terminal stdin is typed as the guest takes
//! it, and after its end the output goes on until the VM ends.

use super::client::Target;
use crate::{signals, terminal};
use anyvisor_vmm::{Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;

/// How a session ended.
enum Left {
    Detached,
    VmEnded,
    /// Nobody reads stdout any more.
    Unread,
}

/// Attaches to the VM called `name`; returns the exit code.
pub fn attach(name: &str) -> Result<u8> {
    let target = Target::find(name)?;
    let (stream, first) = target.console().map_err(|trouble| target.error(trouble))?;
    let is_terminal = std::io::stdin().is_terminal();
    signals::leave_on_signals()?;
    if is_terminal {
        eprintln!("anyvisor: attached to {name}; Ctrl-A X detaches");
    }
    let raw = if is_terminal {
        Some(terminal::Raw::enter().map_err(|e| Error::host("cannot switch the terminal to raw mode", e))?)
    } else {
        None
    };
    let left = Session { stream, escape: is_terminal.then(terminal::Escape::default), unsent: vec![] }.run(&first);
    drop(raw);
    match left.map_err(|error| Error::host(format!("{name}: the console is lost"), error))? {
        Left::Detached => eprintln!("\nanyvisor: detached from {name}, which runs on"),
        Left::VmEnded if is_terminal => eprintln!("\nanyvisor: {name} has ended"),
        Left::VmEnded | Left::Unread => {}
    }
    Ok(0)
}

struct Session {
    stream: UnixStream,
    /// For a terminal.
    escape: Option<terminal::Escape>,
    /// From a pipe: what the guest has not taken yet.
    unsent: Vec<u8>,
}

impl Session {
    fn run(mut self, first: &[u8]) -> std::io::Result<Left> {
        if !show(first)? {
            return Ok(Left::Unread);
        }
        self.stream.set_nonblocking(true)?;
        let stdin = std::io::stdin();
        let mut reads_stdin = true;
        let mut buffer = [0; 16 << 10];
        loop {
            let wants = if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            let takes = reads_stdin && self.unsent.is_empty();
            let mut asked = vec![PollFd::new(&self.stream, wants)];
            if takes {
                asked.push(PollFd::new(&stdin, PollFlags::IN));
            }
            match poll(&mut asked, None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            let typed = asked.get(1).is_some_and(|fd| !fd.revents().is_empty());
            let (readable, writable) = (asked[0].revents() - PollFlags::OUT, asked[0].revents() & PollFlags::OUT);
            if !readable.is_empty() {
                match (&self.stream).read(&mut buffer) {
                    Ok(0) => return Ok(Left::VmEnded),
                    Ok(length) if !show(&buffer[..length])? => return Ok(Left::Unread),
                    Ok(_) => {}
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Left::VmEnded),
                    Err(error) => return Err(error),
                }
            }
            if !writable.is_empty() {
                self.send()?;
            }
            if typed {
                // Not through std's buffer, which would hide bytes from poll.
                match rustix::io::read(&stdin, &mut buffer) {
                    Ok(0) => reads_stdin = false,
                    Ok(length) if self.type_in(&buffer[..length])? => return Ok(Left::Detached),
                    Ok(_) | Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                    // A terminal that has gone away, or stdin that never was there.
                    Err(_) => reads_stdin = false,
                }
            }
        }
    }

    /// Sends what was typed; whether the user wants to leave.
    fn type_in(&mut self, typed: &[u8]) -> std::io::Result<bool> {
        let Some(escape) = &mut self.escape else {
            self.unsent.extend_from_slice(typed);
            self.send()?;
            return Ok(false);
        };
        let (bytes, leave) = escape.filter(typed);
        self.unsent.extend(bytes);
        self.send()?;
        self.unsent.clear();
        Ok(leave)
    }

    /// Sends what the connection takes.
    fn send(&mut self) -> std::io::Result<()> {
        while !self.unsent.is_empty() {
            match (&self.stream).write(&self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The VM has ended: reading will tell.
                Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    self.unsent.clear();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Shows `bytes` on stdout; false if nobody reads it any more.
fn show(bytes: &[u8]) -> std::io::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        other => other.map(|()| true),
    }
}
