//! The rootless network behind a card: frames of `anyvisor_user_net`.

use super::{Link, Net, Received};
use crate::{Error, Result};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::net::{Header, Segment, bits};
use anyvisor_user_net::{Abilities, Broken, Config, Forward, Network};
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::SocketAddrV4;
use std::os::fd::BorrowedFd;
use std::time::Instant;

pub(super) struct User {
    network: Network,
    /// The driver takes frames that are said to be valid.
    says_valid: bool,
}

/// A rootless network in a snapshot.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    connections: Vec<Connection>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Connection {
    guest: SocketAddrV4,
    remote: SocketAddrV4,
    sequence: u32,
    acknowledgement: u32,
}

impl User {
    /// The network for a card with address `mac`.
    ///
    /// # Errors
    /// [`Error::User`]: a port that cannot be had.
    pub fn open(net: &Net, mac: [u8; 6], forwards: &[Forward]) -> Result<User> {
        let config = Config { mtu: net.mtu, forwards: forwards.to_vec(), ..Config::new(mac) };
        let network = Network::new(&config).map_err(|error| match error {
            anyvisor_user_net::Error::Forward { forward, error } => {
                let hint = match error.kind() {
                    std::io::ErrorKind::AddrInUse => "another program has that port; choose another",
                    std::io::ErrorKind::PermissionDenied => "ports below 1024 take root; choose another",
                    std::io::ErrorKind::AddrNotAvailable => "this host has no such address; check it",
                    _ => "check it",
                };
                Error::user(format!("--net user,fwd={forward}: cannot listen on {}: {error}; {hint}", forward.host))
            }
            anyvisor_user_net::Error::Watch(error) => Error::host("cannot watch the sockets of --net user", error),
        })?;
        Ok(User { network, says_valid: false })
    }
}

impl Link for User {
    fn features(&self) -> u64 {
        bits::CHECKSUM | bits::GUEST_CHECKSUM | bits::GUEST_TSO4 | bits::HOST_TSO4
    }

    fn start(&mut self, features: u64) {
        let has = |bit| features & bit != 0;
        self.says_valid = has(bits::GUEST_CHECKSUM);
        self.network.start(Abilities { checksum: has(bits::GUEST_CHECKSUM), segments: has(bits::GUEST_TSO4) });
    }

    fn reset(&mut self) {
        self.network.reset();
    }

    /// The guest's connections.
    fn save(&mut self) -> Value {
        let connections = self.network.save().into_iter().map(|broken| {
            let Broken { guest, remote, sequence, acknowledgement } = broken;
            Connection { guest, remote, sequence, acknowledgement }
        });
        let connections = connections.collect();
        serde_json::to_value(Saved { connections }).expect("it is plain data")
    }

    /// The guest hears that they are broken: their other ends are not here.
    fn restore(&mut self, saved: &Value) -> Result<(), BadState> {
        let saved = serde_json::from_value::<Saved>(saved.clone());
        let saved = saved.map_err(|_| BadState { chip: "net", what: "its connections are not described" })?;
        let broken = saved.connections.into_iter().map(|connection| {
            let Connection { guest, remote, sequence, acknowledgement } = connection;
            Broken { guest, remote, sequence, acknowledgement }
        });
        self.network.restore(broken.collect());
        Ok(())
    }

    /// Events are taken whether there is room or not.
    fn source(&self, _has_room: bool) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.network.fd(), PollFlags::IN))
    }

    fn deadline(&self) -> Option<Instant> {
        self.network.deadline()
    }

    fn poll(&mut self, now: Instant) {
        self.network.poll(now);
    }

    fn transmit(&mut self, header: &Header, frame: &[u8], now: Instant) {
        self.network.transmit(frame, header.checksum.is_some(), now);
    }

    fn receive(&mut self, room: usize, _may_grow: bool, now: Instant) -> Option<Received<'_>> {
        let frame = self.network.receive(room, now)?;
        let headers = frame.parts[0].len() as u16;
        let header = Header {
            checksum: frame.offload.checksum,
            valid: self.says_valid && frame.offload.checksum.is_none(),
            segment: frame.offload.segment.map(|size| Segment { v6: false, size, headers }),
        };
        Some(Received { header, parts: frame.parts })
    }
}
