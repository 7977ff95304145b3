//! Sockets between guest and host: the guest's end is a vsock address, the host's a Unix socket.
//!
//! **Names** are Firecracker's. A program on the host connects to the socket at `PATH`, writes `CONNECT port\n` and reads `OK
//! port\n` (the number of its own end) once a program in the guest has taken the connection; if none does, it is closed. A
//! program in the guest that connects to port N of the host (CID 2) reaches the program that listens at `PATH_N`.
//!
//! **Idea.** The protocol is [`Vsock`]'s. All descriptors are watched by one epoll instance, edge by edge, each under a
//! number of its own that is never used again: an event of one that has gone finds nothing.

use crate::descriptors::{Kind, Listener, Stream};
use crate::virtio::{Model, Queues};
use crate::{Error, Result};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::Broken;
use anyvisor_devices::virtio::pci::Offer;
use anyvisor_devices::virtio::vsock::{self, Host, Key, Vsock};
use rustix::event::{PollFlags, epoll};
use rustix::net::{AddressFamily, RecvFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// What `--vsock` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// The guest's.
    pub cid: u64,
    /// The socket that the host's programs connect to, and what others begin with.
    pub path: PathBuf,
}

impl FromStr for Address {
    type Err = String;

    /// `CID:PATH`.
    fn from_str(text: &str) -> std::result::Result<Address, String> {
        let shape = || format!("'{text}' is no vsock; write CID:PATH, for example 3:/tmp/vm.vsock");
        let (cid, path) = text.split_once(':').filter(|(_, path)| !path.is_empty()).ok_or_else(shape)?;
        let number: u64 = cid.parse().map_err(|_| shape())?;
        if !vsock::GUEST_CIDS.contains(&number) {
            let (first, last) = (vsock::GUEST_CIDS.start(), vsock::GUEST_CIDS.end());
            return Err(format!("a guest cannot have vsock address {cid}; use one from {first} to {last}"));
        }
        Ok(Address { cid: number, path: path.into() })
    }
}

/// Most clients that have not said yet where they want to go: who says nothing makes room for the next.
const UNDECIDED_MAX: usize = 64;
/// Most bytes of what they say.
const LINE_MAX: usize = 32;
const LISTENER: u64 = 0;

/// The device.
pub struct VsockModel {
    device: Vsock,
    sockets: Sockets,
}

/// The host's ends.
struct Sockets {
    path: PathBuf,
    listener: Listener,
    epoll: OwnedFd,
    next_number: u64,
    /// By their number in `epoll`.
    undecided: BTreeMap<u64, OwnedFd>,
    keys: HashMap<u64, Key>,
    connections: HashMap<Key, Connection>,
}

struct Connection {
    number: u64,
    input: Stream,
    output: Stream,
    /// The other side has gone, though there may be something left to read.
    hung: bool,
}

impl VsockModel {
    /// A device for the guest at `address`.
    ///
    /// # Errors
    /// [`Error::User`]: the socket cannot be made.
    pub fn new(address: &Address) -> Result<VsockModel> {
        let host = |error: io::Error| Error::host("cannot make what watches vsock", error);
        let path = address.path.clone();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| host(error.into()))?;
        let listener = Listener::new(&path).map_err(|error| {
            Error::user(format!("cannot make '{}' for --vsock {}: {error}", path.display(), address.cid))
        })?;
        let sockets = Sockets {
            path,
            listener,
            epoll,
            next_number: LISTENER + 1,
            undecided: BTreeMap::new(),
            keys: HashMap::new(),
            connections: HashMap::new(),
        };
        sockets.watch(sockets.listener.as_fd(), LISTENER).map_err(host)?;
        Ok(VsockModel { device: Vsock::new(address.cid), sockets })
    }

    /// Learns what has happened on the host.
    fn look(&mut self) {
        loop {
            let mut events =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
            let Ok(count) = epoll::wait(&self.sockets.epoll, &mut events[..], Some(&Default::default())) else {
                return;
            };
            for event in &events[..count] {
                let (flags, data) = (event.flags, event.data.u64());
                self.happened(data, flags);
            }
            // What a new client has said already is a new event.
            let accepted = events[..count].iter().any(|event| event.data.u64() == LISTENER);
            if count < events.len() && !accepted {
                return;
            }
        }
    }

    fn happened(&mut self, number: u64, flags: epoll::EventFlags) {
        let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        if number == LISTENER {
            self.sockets.accept();
        } else if self.sockets.undecided.contains_key(&number) {
            self.decide(number);
        } else if let Some(&key) = self.sockets.keys.get(&number) {
            if let Some(connection) = self.sockets.connections.get_mut(&key) {
                connection.input.ready |= gone || flags.contains(epoll::EventFlags::IN);
                connection.output.ready |= gone || flags.contains(epoll::EventFlags::OUT);
                connection.hung |= flags.contains(epoll::EventFlags::HUP);
            }
            if gone {
                self.device.host_gone(key);
            }
        }
    }

    /// A client says where it wants to go. What it says behind that is for whom it reaches.
    fn decide(&mut self, number: u64) {
        let Some(client) = self.sockets.undecided.get(&number) else { return };
        let mut bytes = [0; LINE_MAX];
        let seen = match rustix::net::recv(client, &mut bytes, RecvFlags::DONTWAIT | RecvFlags::PEEK) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            result => result.map_or(0, |(_, length)| length.min(LINE_MAX)),
        };
        let end = bytes[..seen].iter().position(|byte| *byte == b'\n');
        if end.is_none() && (1..LINE_MAX).contains(&seen) {
            return;
        }
        let client = self.sockets.undecided.remove(&number).expect("it was there just now");
        let Some(port) = end.and_then(|end| port_in(&bytes[..end])) else { return };
        let length = end.map_or(0, |end| end + 1);
        // Exactly what was looked at.
        if !matches!(rustix::net::recv(&client, &mut bytes[..length], RecvFlags::DONTWAIT), Ok((_, n)) if n == length) {
            return;
        }
        if let Some(key) = self.device.connect(port, &mut self.sockets) {
            self.sockets.insert(key, number, client);
        }
    }
}

/// The port in `CONNECT port`.
fn port_in(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    text.strip_prefix("CONNECT ")?.trim_end_matches('\r').parse().ok()
}

impl Sockets {
    fn watch(&self, fd: BorrowedFd<'_>, number: u64) -> io::Result<()> {
        let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(number), edges)?)
    }

    fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number - 1
    }

    fn accept(&mut self) {
        while let Some(client) = self.listener.accept() {
            let number = self.new_number();
            if let Err(error) = self.watch(client.as_fd(), number) {
                tracing::warn!("vsock cannot have another connection: {error}");
                continue;
            }
            self.undecided.insert(number, client);
            if self.undecided.len() > UNDECIDED_MAX {
                self.undecided.pop_first();
            }
        }
    }

    fn insert(&mut self, key: Key, number: u64, fd: OwnedFd) {
        let fd = Arc::new(fd);
        let stream = || Stream::new(fd.clone(), Kind::Socket);
        self.keys.insert(number, key);
        self.connections.insert(key, Connection { number, input: stream(), output: stream(), hung: false });
    }

    /// Connects to whoever listens for the guest's connections to `port`.
    fn dial(&mut self, key: Key) -> io::Result<()> {
        let mut name = self.path.clone().into_os_string();
        name.push(format!("_{}", key.host));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(name)?)?;
        let number = self.new_number();
        self.watch(fd.as_fd(), number)?;
        self.insert(key, number, fd);
        Ok(())
    }
}

impl Host for Sockets {
    fn connect(&mut self, key: Key) -> bool {
        let result = self.dial(key);
        if let Err(error) = &result {
            tracing::debug!("the guest finds nobody at '{}_{}': {error}", self.path.display(), key.host);
        }
        result.is_ok()
    }

    fn accepted(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key) {
            // It is the first thing that is written there. Who has gone is found by the next write.
            let _ = connection.output.write(format!("OK {}\n", key.host).as_bytes());
        }
    }

    fn read(&mut self, key: Key, data: &mut [u8]) -> io::Result<usize> {
        let connection = self.connections.get_mut(&key).ok_or(ErrorKind::NotConnected)?;
        match connection.input.read(data) {
            Ok(0) if connection.hung => Err(ErrorKind::ConnectionReset.into()),
            result => result,
        }
    }

    fn write(&mut self, key: Key, data: &[u8]) -> io::Result<usize> {
        self.connections.get_mut(&key).ok_or(ErrorKind::NotConnected)?.output.write(data)
    }

    fn finish(&mut self, key: Key) {
        if let Some(connection) = self.connections.get(&key) {
            // One that has gone needs no end.
            let _ = rustix::net::shutdown(connection.output.as_fd(), Shutdown::Write);
        }
    }

    fn close(&mut self, key: Key) {
        if let Some(connection) = self.connections.remove(&key) {
            self.keys.remove(&connection.number);
        }
    }
}

impl Model for VsockModel {
    fn name(&self) -> String {
        format!("vsock '{}'", self.sockets.path.display())
    }

    fn offer(&self) -> Offer {
        self.device.offer()
    }

    fn reset(&mut self) {
        self.device.reset(&mut self.sockets);
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        vec![(self.sockets.epoll.as_fd(), PollFlags::IN)]
    }

    fn work(&mut self, queues: &mut Queues<'_>) -> std::result::Result<(), Broken> {
        self.look();
        // Answers leave first, so that there is room for what the guest says, and then what comes of that.
        for queue in [vsock::EVENTS, vsock::RECEIVE, vsock::TRANSMIT, vsock::RECEIVE] {
            self.device.work(queue, &mut queues.queue(queue.into()), &mut self.sockets)?;
        }
        Ok(())
    }

    fn restore(&mut self, saved: &Value) -> std::result::Result<(), BadState> {
        if !saved.is_null() {
            return Err(BadState { chip: "vsock", what: "a state where there is none" });
        }
        self.device.restored();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
