//! Consoles and ports (virtio 1.2, 5.3): named streams of bytes between guest and host.
//!
//! **Idea.** What a driver is to be told of a port follows from the port's state, so nothing is queued for it: a driver
//! that asks again and again is answered as often as it gives buffers. A port's bytes go straight between its
//! queue and its host [`End`]. An end that takes no more leaves the buffer in the queue, to be gone on with later, so
//! that a slow reader on the host slows the writer in the guest and nothing is lost.
//!
//! **Order.** A port is open before it has a name, so that whoever finds it by name does not take it for closed. It is
//! closed when the host has no more to say, behind its last byte: Linux then reports end of file.

use super::pci::Offer;
use super::queue::{Chains, SIZE_MAX, gather, scatter, split, total};
use super::{Broken, feature};
use crate::state::{BadState, require};
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind};

/// Most ports: each has two queues, and each queue a vector.
pub const PORTS_MAX: usize = 31;
/// Most bytes of a port's name: with the rest of its message they fit into any driver's buffer.
pub const NAME_MAX: usize = 64;

const DEVICE: u16 = 3;
/// Simple communication controller, other.
const CLASS: u32 = 0x07_8000;
const QUEUE_SIZE: u16 = 128;
/// [`feature`] bit: more than one port, and messages about them (5.3.3).
const MULTIPORT: u64 = 1 << 1;
const _: () = assert!(QUEUE_SIZE <= SIZE_MAX);

/// Most bytes that are copied at once.
const PART: usize = 64 << 10;

/// Messages about ports (5.3.6.2).
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const DEVICE_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// The host's end of a port. It never waits.
pub trait End {
    /// Whether somebody is there, who may still say something or listen.
    fn is_open(&self) -> bool;
    /// Reads what there is, at most as much as fits. 0 bytes are the end, after which [`End::is_open`] tells whether
    /// this end can still be written to.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if there is nothing now.
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize>;
    /// Takes as much of `data` as it can, at least 1 byte.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if there is no room now. With any other the bytes are lost.
    fn write(&mut self, data: &[u8]) -> io::Result<usize>;
}

/// What a port is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortKind {
    /// The guest finds it by this, at most [`NAME_MAX`] bytes.
    pub name: String,
    /// Linux makes it a terminal (hvc0).
    pub console: bool,
}

/// A queue's part in the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Bytes for the guest, and from it, of a port by number.
    Receive(usize),
    Transmit(usize),
    /// Messages for the guest, and from it.
    Tell,
    Hear,
}

impl Role {
    /// Of queue `queue` (5.3.2).
    pub fn of(queue: u16) -> Role {
        let port = match queue {
            0 | 1 => 0,
            2 => return Role::Tell,
            3 => return Role::Hear,
            _ => usize::from(queue / 2 - 1),
        };
        if queue.is_multiple_of(2) { Role::Receive(port) } else { Role::Transmit(port) }
    }
}

/// A port, as its driver knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Port {
    /// Messages that are due: that it exists, that it is a console, its name.
    tell_added: bool,
    tell_console: bool,
    tell_name: bool,
    /// The driver uses it.
    ready: bool,
    /// What the driver was told about the host's end.
    told_open: bool,
    /// Somebody in the guest has it open.
    guest_open: bool,
    /// Bytes of the next buffer of its transmit queue that the host's end has already.
    begun: u64,
}

/// The device between a driver and the ports' ends.
pub struct Console {
    kinds: Vec<PortKind>,
    state: ConsoleState,
}

/// What a snapshot needs of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    ports: Vec<Port>,
}

impl Console {
    /// A device with these ports, at most [`PORTS_MAX`], after reset.
    pub fn new(kinds: Vec<PortKind>) -> Console {
        assert!((1..=PORTS_MAX).contains(&kinds.len()) && kinds.iter().all(|kind| kind.name.len() <= NAME_MAX));
        let state = ConsoleState { ports: vec![Port::default(); kinds.len()] };
        Console { kinds, state }
    }

    /// What the device offers.
    pub fn offer(&self) -> Offer {
        let ports = self.kinds.len();
        // `struct virtio_console_config` (5.3.4): columns, rows, ports, emergency write.
        let mut config = vec![0; 12];
        config[4..8].copy_from_slice(&(ports as u32).to_le_bytes());
        let features = MULTIPORT | feature::INDIRECT | feature::EVENT_INDEX;
        Offer {
            device: DEVICE,
            class: CLASS,
            features,
            queues: vec![QUEUE_SIZE; 2 * ports + 2],
            config,
            writable: 0..0,
        }
    }

    /// The driver has reset the device.
    pub fn reset(&mut self) {
        self.state.ports.fill(Port::default());
    }

    /// What a snapshot needs.
    pub fn save(&self) -> &ConsoleState {
        &self.state
    }

    /// Takes a saved state, which is untrusted.
    ///
    /// # Errors
    /// It is not this device's.
    pub fn restore(&mut self, saved: ConsoleState) -> Result<(), BadState> {
        require("console", &[(saved.ports.len() == self.kinds.len(), "another number of ports")])?;
        self.state = saved;
        Ok(())
    }

    /// Whether bytes for the guest can be delivered: somebody has `port` open. A console is always open, as is a port
    /// whose driver knows only one.
    pub fn is_guest_open(&self, port: usize, features: u64) -> bool {
        let Port { ready, guest_open, .. } = self.state.ports[port];
        guest_open || features & MULTIPORT == 0 || ready && self.kinds[port].console
    }

    /// Does what can be done for queue number `number`, whose port's end is among `ends`.
    ///
    /// # Errors
    /// The queue or a message makes no sense.
    pub fn work(
        &mut self,
        number: u16,
        queue: &mut dyn Chains,
        ends: &mut [&mut dyn End],
        features: u64,
    ) -> Result<(), Broken> {
        match Role::of(number) {
            // Without the feature there is one port, and no messages (5.3.2).
            Role::Tell | Role::Hear if features & MULTIPORT == 0 => Ok(()),
            Role::Receive(port) | Role::Transmit(port) if port > 0 && features & MULTIPORT == 0 => Ok(()),
            Role::Tell => self.tell(queue, ends),
            Role::Hear => self.hear(queue),
            Role::Receive(port) if self.is_guest_open(port, features) => receive(queue, &mut *ends[port]),
            Role::Receive(_) => Ok(()),
            Role::Transmit(port) => transmit(queue, &mut self.state.ports[port].begun, &mut *ends[port]),
        }
    }

    /// Sends the messages that are due, as far as there are buffers for them.
    fn tell(&mut self, queue: &mut dyn Chains, ends: &[&mut dyn End]) -> Result<(), Broken> {
        for (port, end) in ends.iter().enumerate() {
            while let Some((what, value)) = self.due(port, end.is_open()) {
                let Some(chain) = queue.pop()? else { return Ok(()) };
                let mut message =
                    [(port as u32).to_le_bytes().as_slice(), &what.to_le_bytes(), &value.to_le_bytes()].concat();
                if what == event::PORT_NAME {
                    message.extend(self.kinds[port].name.as_bytes());
                }
                if total(&chain.writable) < message.len() as u64 {
                    return Err(Broken("a buffer without room for a message about a port"));
                }
                let length = scatter(queue.memory(), &chain.writable, &message, queue.written());
                queue.push(chain.head, length)?;
                self.told(port, what, value);
            }
        }
        Ok(())
    }

    /// The next message about a port, and its value.
    fn due(&self, port: usize, is_open: bool) -> Option<(u16, u16)> {
        let Port { tell_added, tell_console, tell_name, ready, told_open, .. } = self.state.ports[port];
        if tell_added {
            Some((event::DEVICE_ADD, 1))
        } else if tell_console {
            Some((event::CONSOLE_PORT, 1))
        } else if ready && told_open != is_open {
            Some((event::PORT_OPEN, is_open.into()))
        } else {
            tell_name.then_some((event::PORT_NAME, 1))
        }
    }

    fn told(&mut self, port: usize, what: u16, value: u16) {
        let port = &mut self.state.ports[port];
        match what {
            event::DEVICE_ADD => port.tell_added = false,
            event::CONSOLE_PORT => port.tell_console = false,
            event::PORT_NAME => port.tell_name = false,
            _ => port.told_open = value != 0,
        }
    }

    /// Takes the driver's messages.
    fn hear(&mut self, queue: &mut dyn Chains) -> Result<(), Broken> {
        while let Some(chain) = queue.pop()? {
            let mut bytes = [0; 8];
            gather(queue.memory(), &chain.readable, &mut bytes)
                .ok_or(Broken("a message about a port that is cut short"))?;
            let [id, rest] = [0, 4].map(|at| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")));
            self.heard(id as usize, rest as u16, (rest >> 16) != 0);
            queue.push(chain.head, 0)?;
        }
        Ok(())
    }

    /// Messages about ports that are not there, and unknown ones, mean nothing.
    fn heard(&mut self, port: usize, what: u16, value: bool) {
        let ports = &mut self.state.ports;
        match what {
            event::DEVICE_READY if value => ports.iter_mut().for_each(|port| port.tell_added = true),
            event::PORT_READY if port < ports.len() => {
                // Linux says it again of a port that it has, for example after a suspend. False: it could not take it.
                let Port { guest_open, begun, .. } = ports[port];
                let tell_console = value && self.kinds[port].console;
                ports[port] =
                    Port { ready: value, tell_console, tell_name: value, guest_open, begun, ..Port::default() };
            }
            event::PORT_OPEN if port < ports.len() => ports[port].guest_open = value,
            _ => {}
        }
    }
}

/// Gives the guest what `end` has to say.
fn receive(queue: &mut dyn Chains, end: &mut dyn End) -> Result<(), Broken> {
    let mut data = Vec::new();
    while let Some(chain) = queue.pop()? {
        let room = total(&chain.writable).min(PART as u64) as usize;
        if room == 0 {
            return Err(Broken("a buffer for a port's bytes without room"));
        }
        data.resize(room, 0);
        let Ok(length @ 1..) = end.read(&mut data) else {
            queue.put_back();
            return Ok(());
        };
        let length = scatter(queue.memory(), &chain.writable, &data[..length], queue.written());
        queue.push(chain.head, length)?;
    }
    Ok(())
}

/// Gives `end` what the guest has to say. `begun` bytes of the first buffer are there already.
fn transmit(queue: &mut dyn Chains, begun: &mut u64, end: &mut dyn End) -> Result<(), Broken> {
    let mut data = Vec::new();
    // What nobody hears waits for who comes next, who is not to get half a buffer.
    while (end.is_open() || *begun > 0)
        && let Some(chain) = queue.pop()?
    {
        if chain.readable.is_empty() || !chain.writable.is_empty() {
            return Err(Broken("a buffer of a port's bytes that is to be written"));
        }
        let (_, left) = split(&chain.readable, *begun);
        let (part, rest) = split(&left, PART as u64);
        data.resize(total(&part) as usize, 0);
        gather(queue.memory(), &part, &mut data).ok_or(Broken("a port's bytes that are not in RAM"))?;
        let result =
            if data.is_empty() || !end.is_open() { Err(ErrorKind::BrokenPipe.into()) } else { end.write(&data) };
        match result {
            Ok(taken) if taken == data.len() && rest.is_empty() => {}
            Ok(taken) => {
                *begun += taken as u64;
                queue.put_back();
                continue;
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                queue.put_back();
                return Ok(());
            }
            // Nobody will ever hear it.
            Err(_) => {}
        }
        *begun = 0;
        queue.push(chain.head, 0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
