//! The guest's virtio console and named ports, and where they lead to on the host.
//!
//! **Idea.** All are ports of one virtio device ([`console::Console`]). Each has an end on the host ([`end::Line`]): sockets
//! that one client at a time connects to, a file, or descriptors that whoever makes the VM gives. What an end does not take
//! stays in the guest's queue, so a slow reader on the host slows the guest's writer, and nobody else.
//!
//! All descriptors are watched by one epoll instance, edge by edge: an end is tried when it may be ready and left alone
//! once it was not.

mod end;

use crate::console::{Input, Output};
use crate::snapshot::absolute;
use crate::virtio::{Model, Queues};
use crate::{Error, Result};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::Broken;
use anyvisor_devices::virtio::console::{Console, ConsoleState, End, NAME_MAX, PORTS_MAX, PortKind};
use anyvisor_devices::virtio::pci::Offer;
use end::{Line, Screen};
use rustix::event::{PollFlags, epoll};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A port that the guest finds as /dev/virtio-ports/NAME.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    pub name: String,
    pub target: Target,
}

impl Port {
    /// The same, with a path that means the same in every folder.
    pub fn absolute(&self) -> Port {
        let target = match &self.target {
            Target::Socket(path) => Target::Socket(absolute(path)),
            Target::File(path) => Target::File(absolute(path)),
            descriptors => descriptors.clone(),
        };
        Port { name: self.name.clone(), target }
    }
}

/// What is at a port's end on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// A Unix socket that is made here, and that one client at a time connects to.
    Socket(PathBuf),
    /// What the guest writes, in a file that is created or emptied.
    File(PathBuf),
    /// What the program that makes the VM has. A VM with such ports cannot be saved.
    #[serde(skip)]
    Descriptors {
        /// Read for the guest, which sees its end as the port's; never, without.
        input: Option<Descriptor>,
        /// Written by the guest; what it writes is dropped, without.
        output: Option<Descriptor>,
    },
}

/// A pipe, terminal, socket or file of this process. It may be one that blocks.
#[derive(Clone, Debug)]
pub struct Descriptor(pub Arc<OwnedFd>);

impl PartialEq for Descriptor {
    fn eq(&self, other: &Descriptor) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Descriptor {}

impl From<OwnedFd> for Descriptor {
    fn from(fd: OwnedFd) -> Descriptor {
        Descriptor(Arc::new(fd))
    }
}

impl FromStr for Port {
    type Err = String;

    /// `NAME=PATH` or `NAME=file:PATH`.
    fn from_str(text: &str) -> std::result::Result<Port, String> {
        let shape = || format!("'{text}' is no port; write NAME=PATH for a socket, or NAME=file:PATH");
        let (name, path) = text.split_once('=').ok_or_else(shape)?;
        check_name(name)?;
        let target = match path.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Target::File(path.into()),
            None if !path.is_empty() => Target::Socket(path.into()),
            _ => return Err(shape()),
        };
        Ok(Port { name: name.to_owned(), target })
    }
}

/// Refuses what the guest could not have as a file's name.
///
/// # Errors
/// One line about `name`.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if name.is_empty() || name.len() > NAME_MAX || !name.bytes().all(good) || name.starts_with('.') {
        return Err(format!(
            "bad name '{name}' of a port; use at most {NAME_MAX} letters, digits, dots, dashes and underscores"
        ));
    }
    Ok(())
}

/// Refuses what ports cannot be together.
///
/// # Errors
/// [`Error::User`]: two of a name, or too many.
pub fn check(ports: &[Port]) -> Result<()> {
    for (n, port) in ports.iter().enumerate() {
        if ports[..n].iter().any(|other| other.name == port.name) {
            return Err(Error::user(format!("--port {} is given twice; give each port a name of its own", port.name)));
        }
    }
    if ports.len() >= PORTS_MAX {
        let most = PORTS_MAX - 1;
        return Err(Error::user(format!("{} ports are too many; a machine takes {most}", ports.len())));
    }
    Ok(())
}

/// How long what the guest said last waits for a client or a file when the VM has ended. What it wrote to descriptors of
/// this process waits as long as it takes.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The device.
pub struct PortsModel {
    console: Console,
    /// The console's end, the first port's if there is one, and the others'.
    screen: Option<Screen>,
    lines: Vec<Line>,
    epoll: OwnedFd,
    /// The queue that is looked at first: another each time, so that a busy port does not keep others waiting.
    first: u16,
    /// Why it cannot be saved.
    unsaved: bool,
}

impl PortsModel {
    /// A device with `ports`, and a console on `screen`.
    ///
    /// # Errors
    /// [`Error::User`]: a socket or file cannot be made.
    pub fn new(ports: &[Port], screen: Option<(Arc<Output>, Arc<Input>)>) -> Result<PortsModel> {
        let host = |error: rustix::io::Errno| Error::host("cannot make what watches ports", error.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host)?;
        let console = screen.iter().map(|_| PortKind { name: "console".into(), console: true });
        let named = ports.iter().map(|port| PortKind { name: port.name.clone(), console: false });
        let kinds = console.chain(named).collect();
        let lines = (0..).zip(ports).map(|(n, port)| Line::open(port, n, epoll.as_fd()));
        let lines = lines.collect::<Result<Vec<_>>>()?;
        Ok(PortsModel {
            console: Console::new(kinds),
            screen: screen.map(|(output, input)| Screen { output, input }),
            lines,
            epoll,
            first: 0,
            unsaved: ports.iter().any(|port| matches!(port.target, Target::Descriptors { .. })),
        })
    }

    /// Learns which ends may be ready.
    fn watch(&mut self) {
        loop {
            let mut events =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 32];
            let Ok(count) = epoll::wait(&self.epoll, &mut events[..], Some(&Default::default())) else { return };
            for event in &events[..count] {
                let (flags, data) = (event.flags, event.data.u64());
                if let Some(line) = self.lines.get_mut(data as usize) {
                    line.wake(flags);
                }
            }
            if count < events.len() {
                return;
            }
        }
    }

    fn serve(&mut self, queues: &mut Queues<'_>, which: impl Iterator<Item = u16>) -> std::result::Result<(), Broken> {
        let features = queues.features();
        let mut ends: Vec<&mut dyn End> = vec![];
        ends.extend(self.screen.as_mut().map(|screen| screen as &mut dyn End));
        ends.extend(self.lines.iter_mut().map(|line| line as &mut dyn End));
        for number in which {
            self.console.work(number, &mut queues.queue(number.into()), &mut ends, features)?;
        }
        Ok(())
    }
}

/// The queues with messages about ports: for the driver, and from it (virtio 1.2, 5.3.2).
const TELL: u16 = 2;
const HEAR: u16 = 3;

impl Model for PortsModel {
    fn name(&self) -> String {
        let names: Vec<_> = self.lines.iter().map(|line| format!("'{}'", line.name())).collect();
        match &self.screen {
            Some(_) if names.is_empty() => "console".into(),
            Some(_) => format!("console and ports {}", names.join(", ")),
            None => format!("ports {}", names.join(", ")),
        }
    }

    fn offer(&self) -> Offer {
        self.console.offer()
    }

    fn reset(&mut self) {
        self.console.reset();
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        vec![(self.epoll.as_fd(), PollFlags::IN)]
    }

    fn work(&mut self, queues: &mut Queues<'_>) -> std::result::Result<(), Broken> {
        self.watch();
        let (count, first) = (queues.count() as u16, self.first);
        self.first = (first + 1) % count;
        let bytes = (0..count).map(|n| (first + n) % count).filter(|n| *n != TELL && *n != HEAR);
        self.serve(queues, std::iter::once(HEAR).chain(bytes))?;
        let consoles = usize::from(self.screen.is_some());
        for (n, line) in self.lines.iter_mut().enumerate() {
            line.tend(self.console.is_guest_open(consoles + n, queues.features()));
        }
        // What has happened to the ends by now.
        self.serve(queues, std::iter::once(TELL))
    }

    fn finish(&mut self, queues: &mut Queues<'_>) {
        let begun = Instant::now();
        loop {
            self.watch();
            let transmit = (0..queues.count() as u16).filter(|n| n % 2 == 1 && *n != HEAR);
            let result = self.serve(queues, transmit.collect::<Vec<_>>().into_iter());
            queues.new_turn();
            let waiting: Vec<_> = self.lines.iter().filter(|line| line.is_full()).collect();
            let late = waiting.iter().all(|line| !line.is_ours()) && begun.elapsed() > LAST_WORDS;
            if result.is_err() || waiting.is_empty() || late {
                return;
            }
            let mut sources = [rustix::event::PollFd::new(&self.epoll, PollFlags::IN)];
            let tenth = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            let _ = rustix::event::poll(&mut sources, Some(&tenth));
        }
    }

    fn save(&mut self) -> Result<Value> {
        if self.unsaved {
            return Err(Error::user("a VM whose ports lead to another program's descriptors cannot be saved"));
        }
        Ok(serde_json::to_value(self.console.save()).expect("it is plain data"))
    }

    fn restore(&mut self, saved: &Value) -> std::result::Result<(), BadState> {
        let saved = serde_json::from_value::<ConsoleState>(saved.clone());
        self.console.restore(saved.map_err(|_| BadState { chip: "console", what: "no state of one" })?)
    }
}

#[cfg(test)]
mod tests;
