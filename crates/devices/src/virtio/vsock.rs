//! Sockets between guest and host (virtio 1.2, 5.10): streams of bytes with credit.
//!
//! **Idea.** As in [`super::console`], what a driver is to be told of a connection follows from the connection's state, so that
//! no guest can make a queue of answers grow. The only answers that are kept are resets of what is no connection:
//! when [`RESETS_MAX`] of them wait, the driver's packets wait, too (5.10.6.1.2).
//!
//! **Credit** (5.10.6.3). What the guest sends and the host does not take yet is kept, at most [`BUFFER`] bytes a connection,
//! which the guest knows; more than that is its mistake and resets the connection. The host is read from only as far
//! as the guest has room.
//!
//! **Ends.** Half a connection can be shut. Who has shut both halves awaits a reset; a guest that does not send it keeps a
//! dead connection, which goes when its place is wanted.

use super::pci::Offer;
use super::queue::{Chain, Chains, gather, scatter, split, total};
use super::{Broken, feature};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::ops::Bound;
use vm_memory::GuestMemoryMmap;

/// The host's address.
pub const HOST_CID: u64 = 2;
/// Guests' addresses: below is reserved, and the last means any (5.10.4).
pub const GUEST_CIDS: std::ops::RangeInclusive<u64> = 3..=0xffff_fffe;
/// Queues: packets for the guest and from it, and events.
pub const RECEIVE: u16 = 0;
pub const TRANSMIT: u16 = 1;
pub const EVENTS: u16 = 2;

const DEVICE: u16 = 19;
/// Simple communication controller, other.
const CLASS: u32 = 0x07_8000;
const QUEUE_SIZE: u16 = 128;
/// Bytes of a connection that the host has not taken yet, and connections: 64 MiB in all.
const BUFFER: u32 = 256 << 10;
const CONNECTIONS_MAX: usize = 256;
const RESETS_MAX: usize = 256;
/// Most bytes of a packet's data.
const PART: usize = 64 << 10;
/// The first of the ports that the host's connections have: above those of any service.
const HOST_PORTS: u32 = 1 << 30;

const HEADER: usize = 44;
const STREAM: u16 = 1;
/// Event: connections are gone, because the VM goes on elsewhere (5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// What a packet is for (5.10.6).
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown: its sender receives, or sends, no more.
const NO_RECEIVE: u32 = 1;
const NO_SEND: u32 = 2;

/// A connection's name: the ports of its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub guest: u32,
    pub host: u32,
}

/// The host's ends of connections. It never waits.
pub trait Host {
    /// The guest asks for a connection to `key.host`: whether there is somebody who takes it.
    fn connect(&mut self, key: Key) -> bool;
    /// The guest has taken the connection that the host asked for.
    fn accepted(&mut self, key: Key);
    /// Reads what there is, at most as much as fits. 0 bytes are the end.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if there is nothing now; with any other the whole connection has gone.
    fn read(&mut self, key: Key, data: &mut [u8]) -> io::Result<usize>;
    /// Takes as much of `data` as it can, at least 1 byte.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if there is no room now; with any other the whole connection has gone.
    fn write(&mut self, key: Key, data: &[u8]) -> io::Result<usize>;
    /// There are no more bytes from the guest.
    fn finish(&mut self, key: Key);
    /// Forgets the connection.
    fn close(&mut self, key: Key);
}

/// `struct virtio_vsock_hdr`, without addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Packet {
    key: Option<Key>,
    length: u32,
    kind: u16,
    op: u16,
    flags: u32,
    allocated: u32,
    forwarded: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The host has asked for it; the guest is to be told, or to answer.
    Asked {
        told: bool,
    },
    Open,
    /// Both know, or are to know, that it is over; it waits for the guest's reset.
    Over {
        told: bool,
    },
}

/// One connection.
#[derive(Debug)]
struct Connection {
    stage: Stage,
    /// The guest is to be told that it has been taken, or how much room there is.
    respond: bool,
    update: bool,
    /// The guest's buffer, how much of it it has emptied, and how much was sent; the latter two wrap.
    allocated: u32,
    guest_forwarded: u32,
    sent: u32,
    /// What the host has taken, and what the guest has been told of that; they wrap.
    forwarded: u32,
    told: u32,
    /// What the host has not taken yet.
    waiting: VecDeque<u8>,
    /// What the guest has shut.
    guest_sends: bool,
    guest_receives: bool,
    /// The host will not send; the guest is to be told, or knows.
    host_ended: Option<bool>,
}

impl Connection {
    fn new(stage: Stage) -> Connection {
        Connection {
            stage,
            respond: false,
            update: false,
            allocated: 0,
            guest_forwarded: 0,
            sent: 0,
            forwarded: 0,
            told: 0,
            waiting: VecDeque::new(),
            guest_sends: true,
            guest_receives: true,
            host_ended: None,
        }
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> usize {
        self.allocated.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded)) as usize
    }

    fn wants_data(&self) -> bool {
        self.stage == Stage::Open && self.guest_receives && self.host_ended.is_none() && self.credit() > 0
    }
}

/// The device.
pub struct Vsock {
    guest: u64,
    connections: BTreeMap<Key, Connection>,
    resets: VecDeque<Key>,
    /// The connection that was served last.
    last: Option<Key>,
    next_port: u32,
    /// The driver is to be told that no connection is left.
    transport_reset: bool,
    /// There is a buffer for the next data, and none of it.
    buffer: Vec<u8>,
}

impl Vsock {
    /// A device for the guest with address `guest`, one of [`GUEST_CIDS`].
    pub fn new(guest: u64) -> Vsock {
        assert!(GUEST_CIDS.contains(&guest));
        Vsock {
            guest,
            connections: BTreeMap::new(),
            resets: VecDeque::new(),
            last: None,
            next_port: HOST_PORTS,
            transport_reset: false,
            buffer: Vec::new(),
        }
    }

    /// What the device offers: streams, which need no feature (5.10.3).
    pub fn offer(&self) -> Offer {
        let features = feature::INDIRECT | feature::EVENT_INDEX;
        let config = self.guest.to_le_bytes().to_vec();
        Offer { device: DEVICE, class: CLASS, features, queues: vec![QUEUE_SIZE; 3], config, writable: 0..0 }
    }

    /// The driver has reset the device.
    pub fn reset(&mut self, host: &mut dyn Host) {
        self.connections.keys().for_each(|key| host.close(*key));
        self.connections.clear();
        self.resets.clear();
        self.transport_reset = false;
    }

    /// The VM goes on from a snapshot, in which its connections are no longer.
    pub fn restored(&mut self) {
        self.transport_reset = true;
    }

    /// The host wants a connection to port `guest`: its name, unless there are too many. The guest's answer comes by
    /// [`Host::accepted`] or [`Host::close`].
    pub fn connect(&mut self, guest: u32, host: &mut dyn Host) -> Option<Key> {
        self.make_room(host).then_some(())?;
        let mut key = Key { guest, host: self.next_port };
        while self.connections.contains_key(&key) {
            key.host = key.host.wrapping_add(1).max(HOST_PORTS);
        }
        self.next_port = key.host.wrapping_add(1).max(HOST_PORTS);
        self.connections.insert(key, Connection::new(Stage::Asked { told: false }));
        Some(key)
    }

    /// The host's end has gone, both ways. What it said before is still to be read.
    pub fn host_gone(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && (connection.host_ended.is_some() || matches!(connection.stage, Stage::Asked { .. }))
            && !matches!(connection.stage, Stage::Over { .. })
        {
            connection.end();
        }
    }

    /// Whether there is room for one more, for which dead ones go.
    fn make_room(&mut self, host: &mut dyn Host) -> bool {
        if self.connections.len() < CONNECTIONS_MAX {
            return true;
        }
        let dead = self.connections.iter().find(|(_, c)| c.stage == Stage::Over { told: true }).map(|(key, _)| *key);
        if let Some(key) = dead.filter(|_| self.resets.len() < RESETS_MAX) {
            self.drop_connection(key, host);
            self.resets.push_back(key);
        }
        self.connections.len() < CONNECTIONS_MAX
    }

    fn drop_connection(&mut self, key: Key, host: &mut dyn Host) {
        if self.connections.remove(&key).is_some() {
            host.close(key);
        }
    }

    /// Does what can be done for queue number `number`.
    ///
    /// # Errors
    /// The queue or a packet makes no sense.
    pub fn work(&mut self, number: u16, queue: &mut dyn Chains, host: &mut dyn Host) -> Result<(), Broken> {
        match number {
            RECEIVE => self.tell(queue, host),
            TRANSMIT => self.hear(queue, host),
            _ => self.report(queue),
        }
    }

    /// Events: there is one.
    fn report(&mut self, queue: &mut dyn Chains) -> Result<(), Broken> {
        if !self.transport_reset {
            return Ok(());
        }
        let Some(chain) = queue.pop()? else { return Ok(()) };
        if total(&chain.writable) < 4 {
            return Err(Broken("a buffer without room for an event"));
        }
        let length = scatter(queue.memory(), &chain.writable, &TRANSPORT_RESET.to_le_bytes(), queue.written());
        queue.push(chain.head, length)?;
        self.transport_reset = false;
        Ok(())
    }

    /// Takes the driver's packets, as long as there is room for answers.
    fn hear(&mut self, queue: &mut dyn Chains, host: &mut dyn Host) -> Result<(), Broken> {
        while self.resets.len() < RESETS_MAX
            && let Some(chain) = queue.pop()?
        {
            self.heard(&chain, host, queue.memory())?;
            queue.push(chain.head, 0)?;
        }
        Ok(())
    }

    fn heard(&mut self, chain: &Chain, host: &mut dyn Host, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        let mut bytes = [0; HEADER];
        gather(memory, &chain.readable, &mut bytes).ok_or(Broken("a packet without a header"))?;
        let packet = Packet::from_guest(&bytes, self.guest);
        if u64::from(packet.length) > total(&chain.readable) - HEADER as u64 {
            return Err(Broken("a packet that is shorter than it says"));
        }
        // What is not for the host, or not from the guest, goes nowhere.
        let Some(key) = packet.key else { return Ok(()) };
        let fine = packet.kind == STREAM
            && match packet.op {
                op::REQUEST => self.requested(key, &packet, host),
                op::RW if packet.length > BUFFER => false,
                op::RW => {
                    self.buffer.resize(packet.length as usize, 0);
                    let (_, payload) = split(&chain.readable, HEADER as u64);
                    gather(memory, &payload, &mut self.buffer).ok_or(Broken("a packet that is not in RAM"))?;
                    let data = std::mem::take(&mut self.buffer);
                    let fine = self.with_connection(key, &packet, |connection| connection.received(key, &data, host));
                    self.buffer = data;
                    fine
                }
                _ => self.with_connection(key, &packet, |connection| connection.controlled(key, &packet, host)),
            };
        let over = packet.op == op::RST || !fine;
        if over {
            self.drop_connection(key, host);
        }
        if over && packet.op != op::RST {
            self.resets.push_back(key);
        }
        Ok(())
    }

    /// The guest wants a connection; false if it cannot have it.
    fn requested(&mut self, key: Key, packet: &Packet, host: &mut dyn Host) -> bool {
        if self.connections.contains_key(&key) || !self.make_room(host) || !host.connect(key) {
            return false;
        }
        let mut connection = Connection::new(Stage::Open);
        connection.respond = true;
        connection.learn(packet);
        self.connections.insert(key, connection);
        true
    }

    /// Has a connection take a packet; false if there is none, or the packet makes no sense in it.
    fn with_connection(&mut self, key: Key, packet: &Packet, act: impl FnOnce(&mut Connection) -> bool) -> bool {
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        connection.learn(packet);
        act(connection)
    }

    /// Sends what is due, as far as there are buffers for it: to each connection in turn.
    fn tell(&mut self, queue: &mut dyn Chains, host: &mut dyn Host) -> Result<(), Broken> {
        self.flush(host);
        while let Some(chain) = queue.pop()? {
            let room = total(&chain.writable);
            if room <= HEADER as u64 {
                return Err(Broken("a buffer without room for a packet"));
            }
            let mut data = std::mem::take(&mut self.buffer);
            data.resize((room as usize - HEADER).min(PART), 0);
            let packet = self.next_packet(&mut data, host);
            self.buffer = data;
            let Some(packet) = packet else {
                queue.put_back();
                return Ok(());
            };
            let (front, back) = split(&chain.writable, HEADER as u64);
            let header = scatter(queue.memory(), &front, &packet.to_guest(self.guest), queue.written());
            let payload = scatter(queue.memory(), &back, &self.buffer[..packet.length as usize], queue.written());
            queue.push(chain.head, header + payload)?;
        }
        Ok(())
    }

    /// Has the host take what waits for it.
    fn flush(&mut self, host: &mut dyn Host) {
        for (key, connection) in &mut self.connections {
            connection.flush(*key, host);
        }
    }

    fn next_packet(&mut self, data: &mut [u8], host: &mut dyn Host) -> Option<Packet> {
        if let Some(key) = self.resets.pop_front() {
            return Some(Packet { key: Some(key), kind: STREAM, op: op::RST, ..Packet::default() });
        }
        let last = self.last.unwrap_or(Key { guest: u32::MAX, host: u32::MAX });
        let behind = self.connections.range((Bound::Excluded(last), Bound::Unbounded));
        let keys: Vec<Key> = behind.chain(self.connections.range(..=last)).map(|(key, _)| *key).collect();
        for key in keys {
            let connection = self.connections.get_mut(&key).expect("it was there just now");
            let Some(packet) = connection.next_packet(key, data, host) else { continue };
            if packet.op == op::RST {
                self.drop_connection(key, host);
            }
            self.last = Some(key);
            return Some(packet);
        }
        None
    }
}

impl Connection {
    /// Every packet says how much room there is (5.10.6.3).
    fn learn(&mut self, packet: &Packet) {
        (self.allocated, self.guest_forwarded) = (packet.allocated, packet.forwarded);
    }

    /// The host's end has gone.
    fn end(&mut self) {
        (self.stage, self.waiting) = (Stage::Over { told: false }, VecDeque::new());
    }

    /// The guest sends bytes; false if it must not.
    fn received(&mut self, key: Key, data: &[u8], host: &mut dyn Host) -> bool {
        match self.stage {
            // They crossed with the end.
            Stage::Over { .. } => return true,
            Stage::Asked { .. } => return false,
            Stage::Open => {}
        }
        if !self.guest_sends || self.waiting.len() + data.len() > BUFFER as usize {
            return false;
        }
        self.waiting.extend(data);
        self.flush(key, host);
        true
    }

    /// Any packet but a request and bytes; false if it makes no sense now.
    fn controlled(&mut self, key: Key, packet: &Packet, host: &mut dyn Host) -> bool {
        match (packet.op, self.stage) {
            (op::RESPONSE, Stage::Asked { told: true }) => {
                self.stage = Stage::Open;
                host.accepted(key);
            }
            (op::SHUTDOWN, Stage::Open) => {
                self.guest_receives &= packet.flags & NO_RECEIVE == 0;
                if packet.flags & NO_SEND != 0
                    && std::mem::replace(&mut self.guest_sends, false)
                    && self.waiting.is_empty()
                {
                    host.finish(key);
                }
            }
            (op::CREDIT_REQUEST, Stage::Open) => self.update = true,
            (op::CREDIT_UPDATE, Stage::Open)
            | (op::SHUTDOWN | op::CREDIT_REQUEST | op::CREDIT_UPDATE, Stage::Over { .. }) => {}
            // The host has given up before the guest took it.
            (op::RESPONSE, Stage::Over { .. }) | (op::RST, _) => {}
            _ => return false,
        }
        true
    }

    /// Has the host take what waits for it.
    fn flush(&mut self, key: Key, host: &mut dyn Host) {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match host.write(key, front) {
                Ok(taken) => {
                    self.waiting.drain(..taken);
                    self.forwarded = self.forwarded.wrapping_add(taken as u32);
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => break,
                Err(_) => return self.end(),
            }
            if self.waiting.is_empty() && !self.guest_sends {
                host.finish(key);
            }
        }
        // A guest that has used up its credit waits for this.
        self.update |= self.forwarded.wrapping_sub(self.told) >= BUFFER / 2;
    }

    /// What the guest is to be told next. Bytes of it go into `data`.
    fn next_packet(&mut self, key: Key, data: &mut [u8], host: &mut dyn Host) -> Option<Packet> {
        let shut = |flags| (op::SHUTDOWN, flags, 0);
        let (op, flags, length) = match self.stage {
            Stage::Asked { told: true } | Stage::Over { told: true } => return None,
            Stage::Asked { .. } => {
                self.stage = Stage::Asked { told: true };
                (op::REQUEST, 0, 0)
            }
            Stage::Open if std::mem::take(&mut self.respond) => (op::RESPONSE, 0, 0),
            // The guest has shut both halves, and the host has all that it said.
            Stage::Open if !self.guest_sends && !self.guest_receives && self.waiting.is_empty() => (op::RST, 0, 0),
            Stage::Open => match self.read(key, data, host) {
                Some(length) => (op::RW, 0, length),
                None if self.stage != Stage::Open => {
                    self.stage = Stage::Over { told: true };
                    shut(NO_RECEIVE | NO_SEND)
                }
                None if self.host_ended == Some(false) => {
                    self.host_ended = Some(true);
                    shut(NO_SEND)
                }
                None if self.update => (op::CREDIT_UPDATE, 0, 0),
                None => return None,
            },
            Stage::Over { .. } => {
                self.stage = Stage::Over { told: true };
                shut(NO_RECEIVE | NO_SEND)
            }
        };
        self.update = false;
        self.told = self.forwarded;
        self.sent = self.sent.wrapping_add(length);
        let (allocated, forwarded) = (BUFFER, self.forwarded);
        Some(Packet { key: Some(key), length, kind: STREAM, op, flags, allocated, forwarded })
    }

    /// Reads what the guest has room for; `None` if there is nothing.
    fn read(&mut self, key: Key, data: &mut [u8], host: &mut dyn Host) -> Option<u32> {
        if !self.wants_data() {
            return None;
        }
        let room = data.len().min(self.credit());
        match host.read(key, &mut data[..room]) {
            Ok(0) => self.host_ended = Some(false),
            Ok(length) => return Some(length as u32),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.end(),
        }
        None
    }
}

impl Packet {
    /// What the guest with address `guest` says. The key is for what goes between it and the host.
    fn from_guest(bytes: &[u8; HEADER], guest: u64) -> Packet {
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let (from, to) = (u64_at(0), u64_at(8));
        let kinds = u32_at(28);
        Packet {
            key: (from == guest && to == HOST_CID).then(|| Key { guest: u32_at(16), host: u32_at(20) }),
            length: u32_at(24),
            kind: kinds as u16,
            op: (kinds >> 16) as u16,
            flags: u32_at(32),
            allocated: u32_at(36),
            forwarded: u32_at(40),
        }
    }

    /// The bytes for the guest with address `guest`.
    fn to_guest(self, guest: u64) -> Vec<u8> {
        let key = self.key.expect("what is sent belongs to a connection");
        let mut bytes = Vec::with_capacity(HEADER);
        [HOST_CID, guest].iter().for_each(|cid| bytes.extend(cid.to_le_bytes()));
        let kinds = u32::from(self.kind) | u32::from(self.op) << 16;
        for field in [key.host, key.guest, self.length, kinds, self.flags, self.allocated, self.forwarded] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests;
