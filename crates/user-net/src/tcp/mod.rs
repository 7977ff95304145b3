//! TCP: each connection of the guest's is one of a socket of the host's.
//!
//! A connection is made on the other side first: the guest's SYN is answered when the host's connect() has come to
//! something, and a forwarded port's client waits until the guest has answered. Bytes go from a socket into
//! [`Connection::out`] no faster than the guest takes them, and from the guest straight into the socket, or into
//! [`Connection::back`], whose room is the window that the guest sees.

mod connection;

use crate::forward::Listener;
use crate::frame::{Frame, HEADERS, IP, Offload, PACKET_MAX, Packet, checksum, pseudo_header};
use crate::line::{Line, Owner};
use crate::table::{Id, Key, Table};
use connection::{Connection, Segment, Verdict};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, accept_with, connect, getpeername, recv,
    send, shutdown, socket_with, sockopt,
};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4DstUnreachable, IpAddress, IpProtocol, Ipv4Packet, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Most connections.
const FLOWS_MAX: usize = 512;
/// As many get large buffers, of these sizes in bytes each way: 64 MiB and 60 MiB in all.
const LARGE_FLOWS: usize = 32;
const LARGE: usize = 1 << 20;
const SMALL: usize = 64 << 10;
/// A connection on which nothing happens for so long is dropped (RFC 5382, REQ-5).
const IDLE: Duration = Duration::from_secs(2 * 3600 + 240);
/// How often that is looked at, and empty buffers are given back.
const SWEEP: Duration = Duration::from_secs(20);
/// The TCP header without options.
const TCP_HEADER: usize = 20;

struct Flow {
    connection: Connection,
    socket: OwnedFd,
    readable: bool,
    writable: bool,
    /// The host will send no more than it has: the end is to be read.
    ends: bool,
    /// The host was told that the guest has ended.
    shut: bool,
    /// It is among those that may have something to send.
    queued: bool,
    used: Instant,
}

#[derive(Default)]
pub struct Tcp {
    flows: Table<Flow>,
    listeners: Vec<Listener>,
    /// Flows that may have something for the guest.
    ready: VecDeque<Id>,
    /// No timer runs out before.
    earliest: Option<Instant>,
    swept: Option<Instant>,
    /// The headers of the frame that is being sent.
    head: Vec<u8>,
    secret: RandomState,
    serial: u64,
    /// Connections of which the guest is to be told that they are no more.
    broken: Vec<Broken>,
}

/// A connection that was the guest's in another network: both ends, and both sides' next sequence numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    pub guest: SocketAddrV4,
    pub remote: SocketAddrV4,
    pub sequence: u32,
    pub acknowledgement: u32,
}

/// What to do with a flow.
enum Fate {
    Live,
    /// The guest knows or is not to know; the host's end is broken, not closed.
    Break,
    /// Both are told.
    Reset,
    /// It has come to its end.
    Over,
}

impl Tcp {
    pub fn new(listeners: Vec<Listener>) -> Tcp {
        Tcp { listeners, ..Tcp::default() }
    }

    pub fn listeners(&self) -> &[Listener] {
        &self.listeners
    }

    /// What a guest must be told, when this is no more, of connections that it knows: [`Tcp::break_later`].
    pub fn saved(&mut self) -> Vec<Broken> {
        let ids = self.flows.ids();
        let flows = ids.into_iter().filter_map(|id| {
            let (key, flow) = self.flows.get(id)?;
            let (sequence, acknowledgement) = flow.connection.numbers();
            let known = !flow.connection.is_connecting();
            known.then_some(Broken { guest: key.guest, remote: key.remote, sequence, acknowledgement })
        });
        flows.collect()
    }

    /// Has the guest told that connections are broken.
    pub fn break_later(&mut self, broken: Vec<Broken>) {
        self.broken = broken;
        self.broken.truncate(FLOWS_MAX);
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.flows.len()
    }

    /// What a guest might acknowledge.
    #[cfg(test)]
    pub fn any_number(&mut self) -> Option<u32> {
        let id = self.flows.ids().first().copied()?;
        self.flows.get(id).map(|(_, flow)| flow.connection.numbers().0)
    }

    pub fn clear(&mut self) {
        for id in self.flows.ids() {
            self.remove(id, true);
        }
        self.ready.clear();
        self.broken.clear();
    }

    /// Something that the guest sent to `remote`, which is `host` for the host. `trusted` if its checksum is not to be looked at.
    pub fn packet(
        &mut self,
        line: &mut Line,
        ip: &Ipv4Packet<&[u8]>,
        host: Option<SocketAddr>,
        trusted: bool,
        now: Instant,
    ) {
        let Ok(packet) = TcpPacket::new_checked(ip.payload()) else { return };
        let (source, destination) = (IpAddress::Ipv4(ip.src_addr()), IpAddress::Ipv4(ip.dst_addr()));
        let mut sums = ChecksumCapabilities::ignored();
        if !trusted {
            sums.tcp = smoltcp::phy::Checksum::Both;
        }
        let Ok(segment) = TcpRepr::parse(&packet, &source, &destination, &sums) else { return };
        let guest = SocketAddrV4::new(ip.src_addr(), segment.src_port);
        let key = Key { guest, remote: SocketAddrV4::new(ip.dst_addr(), segment.dst_port), ping: false };
        let Some(id) = self.flows.find(&key) else {
            match (segment.control, host) {
                (TcpControl::Rst, _) => {}
                (TcpControl::Syn, Some(host)) if segment.ack_number.is_none() => {
                    self.open(line, key, &segment, host, now);
                }
                _ => refuse(line, &key, &segment),
            }
            return;
        };
        let (_, flow) = self.flows.get(id).expect("it was found");
        flow.used = now;
        let fate = match flow.connection.segment(&segment, now) {
            Verdict::Nothing => flow.fate(),
            Verdict::Reset => Fate::Break,
            Verdict::Data { bytes, end } => flow.take(bytes, end),
        };
        self.follow(line, id, fate);
    }

    /// Does to a flow what has come of it, and has it looked at for the guest.
    fn follow(&mut self, line: &mut Line, id: Id, fate: Fate) {
        match fate {
            Fate::Live => {
                let Some((_, flow)) = self.flows.get(id) else { return };
                let deadline = flow.connection.deadline();
                if !std::mem::replace(&mut flow.queued, true) {
                    self.ready.push_back(id);
                }
                self.note(deadline);
            }
            Fate::Over => self.remove(id, false),
            Fate::Break => self.remove(id, true),
            Fate::Reset => {
                if let Some((key, flow)) = self.flows.get(id) {
                    let (sequence, acknowledgement) = flow.connection.numbers();
                    send_reset(line, key, sequence, Some(acknowledgement));
                }
                self.remove(id, true);
            }
        }
    }

    fn note(&mut self, deadline: Option<Instant>) {
        self.earliest = self.earliest.into_iter().chain(deadline).min();
    }

    /// Forgets a flow; the host's end is told by a reset if `broken`.
    fn remove(&mut self, id: Id, broken: bool) {
        if let Some((_, flow)) = self.flows.remove(id)
            && broken
        {
            // Closing sends a reset then (socket(7)); if it cannot be had, an end must do.
            let _ = sockopt::set_socket_linger(&flow.socket, Some(Duration::ZERO));
        }
        if self.flows.len() == 0 {
            (self.earliest, self.swept) = (None, None);
        }
    }

    /// Connects to `host` for the guest.
    fn open(&mut self, line: &mut Line, key: Key, syn: &TcpRepr<'_>, host: SocketAddr, now: Instant) {
        if self.flows.len() >= FLOWS_MAX {
            tracing::debug!(%host, "network: too many connections");
            return refuse(line, &key, syn);
        }
        let family = if host.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let connected =
            socket_with(family, SocketType::STREAM, flags, None).and_then(|socket| match connect(&socket, &host) {
                Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
                Err(error) => Err(error),
            });
        let connection = Connection::from_guest(syn, self.initial(&key), self.limit());
        let added = connected.and_then(|socket| self.add(line, key, connection, socket, now));
        if let Err(error) = added {
            not_connected(line, &key, syn.seq_number.0 as u32, error);
        }
    }

    fn add(
        &mut self,
        line: &Line,
        key: Key,
        connection: Connection,
        socket: OwnedFd,
        now: Instant,
    ) -> rustix::io::Result<Id> {
        // The guest's TCP has put together what it wants to.
        sockopt::set_tcp_nodelay(&socket, true)?;
        line.watch(&socket, Owner::Tcp(self.flows.next_id()))?;
        let flow = Flow {
            connection,
            socket,
            readable: false,
            writable: false,
            ends: false,
            shut: false,
            queued: false,
            used: now,
        };
        let id = self.flows.insert(key, flow);
        self.note(Some(now + SWEEP));
        Ok(id)
    }

    fn limit(&self) -> usize {
        if self.flows.len() < LARGE_FLOWS { LARGE } else { SMALL }
    }

    /// Our first sequence number: nobody is to guess it (RFC 9293, 3.4.1).
    fn initial(&mut self, key: &Key) -> u32 {
        self.serial += 1;
        self.secret.hash_one((key, self.serial)) as u32
    }

    /// A socket has become readable or writable.
    pub fn event(&mut self, line: &mut Line, id: Id, flags: EventFlags) {
        let Some((key, flow)) = self.flows.get(id) else { return };
        let all = EventFlags::HUP | EventFlags::ERR;
        flow.readable |= flags.intersects(EventFlags::IN | EventFlags::RDHUP | all);
        flow.ends |= flags.intersects(EventFlags::RDHUP | all);
        flow.writable |= flags.intersects(EventFlags::OUT | all);
        if flow.connection.is_connecting() {
            match sockopt::socket_error(&flow.socket) {
                Ok(Ok(())) if flow.writable => flow.connection.connected(),
                Ok(Ok(())) => return,
                Ok(Err(error)) | Err(error) => {
                    let sequence = flow.connection.numbers().1.wrapping_sub(1);
                    not_connected(line, key, sequence, error);
                    return self.remove(id, false);
                }
            }
        }
        let fate = flow.flush();
        self.follow(line, id, fate);
    }

    /// A listener has something to take.
    pub fn listener_event(&mut self, index: u32) {
        if let Some(listener) = self.listeners.get_mut(index as usize) {
            listener.ready = true;
        }
    }

    /// Takes what waits for forwarded ports, and says what is no more.
    pub fn accept(&mut self, line: &mut Line, guest: Ipv4Addr, now: Instant) {
        while line.has_room()
            && let Some(Broken { guest, remote, sequence, acknowledgement }) = self.broken.pop()
        {
            send_reset(line, &Key { guest, remote, ping: false }, sequence, Some(acknowledgement));
        }
        for n in 0..self.listeners.len() {
            // Others wait with the host's kernel.
            while self.listeners[n].ready && self.flows.len() < FLOWS_MAX {
                let listener = &mut self.listeners[n];
                let port = listener.port;
                match accept_with(&listener.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                    Ok(socket) => self.ask_guest(line, SocketAddrV4::new(guest, port), socket, now),
                    Err(Errno::CONNABORTED | Errno::INTR) => {}
                    // Also when there are no more descriptors: the next client makes it look again.
                    Err(_) => listener.ready = false,
                }
            }
        }
    }

    fn ask_guest(&mut self, line: &mut Line, guest: SocketAddrV4, socket: OwnedFd, now: Instant) {
        let peer = getpeername(&socket).ok().flatten().and_then(|peer| SocketAddr::try_from(peer).ok());
        let Some(peer) = peer else { return };
        let address = crate::shown_address(peer.ip());
        let mut key = Key { guest, remote: SocketAddrV4::new(address, peer.port()), ping: false };
        // Two clients may have one port, from different addresses that are shown as one.
        let mut tries = 0;
        while self.flows.find(&key).is_some() {
            key.remote.set_port(key.remote.port().wrapping_add(1).max(1024));
            tries += 1;
            if tries > FLOWS_MAX {
                return;
            }
        }
        let connection = Connection::to_guest(self.initial(&key), self.limit());
        if let Ok(id) = self.add(line, key, connection, socket, now) {
            self.follow(line, id, Fate::Live);
        }
    }

    /// When [`Tcp::expire`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.earliest
    }

    /// Looks at the timers.
    pub fn expire(&mut self, line: &mut Line, now: Instant) {
        if self.earliest.is_none_or(|earliest| now < earliest) {
            return;
        }
        let sweeps = self.swept.is_none_or(|swept| now >= swept + SWEEP);
        if sweeps {
            self.swept = Some(now);
        }
        self.earliest = Some(self.swept.unwrap_or(now) + SWEEP);
        for id in self.flows.ids() {
            let Some((_, flow)) = self.flows.get(id) else { continue };
            if sweeps {
                flow.connection.out.shrink();
                flow.connection.back.shrink();
            }
            let due = flow.connection.deadline().is_some_and(|deadline| deadline <= now);
            if now > flow.used + IDLE || (due && !flow.connection.expire(now)) {
                self.follow(line, id, Fate::Reset);
            } else if due {
                self.follow(line, id, Fate::Live);
            } else {
                let deadline = flow.connection.deadline();
                self.note(deadline);
            }
        }
        if self.flows.len() == 0 {
            self.earliest = None;
        }
    }

    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty() || !self.broken.is_empty()
    }

    /// The next frame for the guest, of at most `room` bytes.
    pub fn receive(&mut self, line: &mut Line, room: usize, now: Instant) -> Option<Frame<'_>> {
        let (id, segment) = loop {
            let id = self.ready.pop_front()?;
            let Some((_, flow)) = self.flows.get(id) else { continue };
            flow.queued = false;
            match flow.produce(line, room, now) {
                Ok(Some(segment)) => {
                    let deadline = flow.connection.deadline();
                    flow.queued = true;
                    self.ready.push_back(id);
                    self.note(deadline);
                    break (id, segment);
                }
                Ok(None) => {
                    let (fate, deadline) = (flow.fate(), flow.connection.deadline());
                    self.note(deadline);
                    if let Fate::Over | Fate::Reset | Fate::Break = fate {
                        self.follow(line, id, fate);
                    }
                }
                Err(()) => self.follow(line, id, Fate::Reset),
            }
        };
        let (key, flow) = self.flows.get(id)?;
        let body = flow.connection.out.slices(segment.offset, segment.length);
        let offload = write_segment(line, &mut self.head, key, &segment, &body);
        Some(Frame { offload, parts: [&self.head, body[0], body[1]] })
    }
}

impl Flow {
    /// Passes on what the guest sent.
    fn take(&mut self, bytes: &[u8], end: bool) -> Fate {
        let mut taken = 0;
        while self.writable && self.connection.back.is_empty() && taken < bytes.len() {
            match send(&self.socket, &bytes[taken..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => taken += sent,
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Fate::Reset,
            }
        }
        let limit = self.connection.limit();
        taken += self.connection.back.push(&bytes[taken..], limit);
        self.connection.accept(taken, end && taken == bytes.len());
        self.flush()
    }

    /// Passes on what waits, if the host takes it.
    fn flush(&mut self) -> Fate {
        let back = &mut self.connection.back;
        let mut drained = false;
        while self.writable && !back.is_empty() {
            let [front, _] = back.slices(0, back.len());
            match send(&self.socket, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => {
                    back.consume(sent);
                    drained = true;
                }
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Fate::Reset,
            }
        }
        if drained {
            self.connection.drained();
        }
        if self.connection.has_ended() && self.connection.back.is_empty() && !self.shut {
            self.shut = true;
            // A socket that is no more connected says so when it is read.
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
        self.fate()
    }

    fn fate(&self) -> Fate {
        if self.connection.is_over() && self.shut { Fate::Over } else { Fate::Live }
    }

    /// Reads from the host what the guest may have, and makes the next segment. An error has broken the connection.
    fn produce(&mut self, line: &Line, room: usize, now: Instant) -> Result<Option<Segment>, ()> {
        let most = self.most(line, room);
        if self.connection.is_open() {
            self.read(most)?;
        }
        Ok(self.connection.next(most, now))
    }

    /// Most bytes of payload of a frame of at most `room` bytes.
    fn most(&self, line: &Line, room: usize) -> usize {
        let packet = room.saturating_sub(IP).min(PACKET_MAX);
        let payload = packet.saturating_sub(HEADERS - IP + TCP_HEADER);
        if line.abilities.segments {
            return payload;
        }
        payload.min(usize::from(line.mtu) - (HEADERS - IP + TCP_HEADER)).min(self.connection.guest_mss())
    }

    /// Has at least `most` unsent bytes, if the host has them.
    fn read(&mut self, most: usize) -> Result<(), ()> {
        while self.readable && self.connection.unsent() < most {
            let limit = self.connection.limit();
            let room = self.connection.out.room(limit);
            if room.is_empty() {
                break;
            }
            let wanted = room.len();
            match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => {
                    self.connection.finish();
                    self.readable = false;
                }
                Ok((_, count)) => {
                    self.connection.out.commit(count);
                    // What was less than wanted was all, and the rest is told of (epoll(7)).
                    self.readable = count == wanted || self.ends;
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(()),
            }
        }
        Ok(())
    }
}

/// Says that the host could not connect, for a SYN with number `sequence`.
fn not_connected(line: &mut Line, key: &Key, sequence: u32, error: Errno) {
    let reason = match error {
        Errno::NETUNREACH => Icmpv4DstUnreachable::NetUnreachable,
        Errno::HOSTUNREACH | Errno::TIMEDOUT => Icmpv4DstUnreachable::HostUnreachable,
        _ => return send_reset(line, key, 0, Some(sequence.wrapping_add(1))),
    };
    let (source, destination) = (*key.guest.ip(), *key.remote.ip());
    let packet = Packet { source, destination, protocol: IpProtocol::Tcp, identity: 0 };
    let mut start = [0; 8];
    start[..2].copy_from_slice(&key.guest.port().to_be_bytes());
    start[2..4].copy_from_slice(&key.remote.port().to_be_bytes());
    start[4..].copy_from_slice(&sequence.to_be_bytes());
    line.send_unreachable(reason, &packet, start);
}

/// Answers a segment that belongs to no connection (RFC 9293, 3.10.7.1).
fn refuse(line: &mut Line, key: &Key, segment: &TcpRepr<'_>) {
    match segment.ack_number {
        Some(number) => send_reset(line, key, number.0 as u32, None),
        None => {
            let next = (segment.seq_number.0 as u32).wrapping_add(segment.segment_len() as u32);
            send_reset(line, key, 0, Some(next));
        }
    }
}

fn send_reset(line: &mut Line, key: &Key, sequence: u32, acknowledgement: Option<u32>) {
    let segment = Segment {
        control: TcpControl::Rst,
        sequence,
        acknowledgement,
        window: 0,
        scale: None,
        mss: None,
        offset: 0,
        length: 0,
        guest_mss: 0,
    };
    let mut frame = Vec::new();
    // It waits for the guest in a queue that knows no offloads.
    let abilities = std::mem::take(&mut line.abilities);
    write_segment(line, &mut frame, key, &segment, &[&[], &[]]);
    line.abilities = abilities;
    line.send(frame, *key.remote.ip(), *key.guest.ip(), IpProtocol::Tcp);
}

/// Writes the headers of a segment with payload `body`.
fn write_segment(line: &mut Line, head: &mut Vec<u8>, key: &Key, segment: &Segment, body: &[&[u8]; 2]) -> Offload {
    let (source, destination) = (*key.remote.ip(), *key.guest.ip());
    let repr = TcpRepr {
        src_port: key.remote.port(),
        dst_port: key.guest.port(),
        control: segment.control,
        seq_number: TcpSeqNumber(segment.sequence as i32),
        ack_number: segment.acknowledgement.map(|number| TcpSeqNumber(number as i32)),
        window_len: segment.window,
        window_scale: segment.scale,
        max_seg_size: segment.mss,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let length = repr.header_len() + segment.length;
    head.clear();
    head.resize(HEADERS + repr.header_len(), 0);
    let packet = Packet { source, destination, protocol: IpProtocol::Tcp, identity: line.identity() };
    line.wire.write(head, &packet, length);
    let tcp = &mut head[HEADERS..];
    let (from, to) = (IpAddress::Ipv4(source), IpAddress::Ipv4(destination));
    repr.emit(&mut TcpPacket::new_unchecked(&mut *tcp), &from, &to, &ChecksumCapabilities::ignored());
    // Not among what smoltcp's form of a segment can say.
    if matches!(segment.control, TcpControl::Fin) && segment.length > 0 {
        tcp[13] |= 8;
    }
    let pseudo = pseudo_header(&packet, length);
    let mut offload = Offload::default();
    if line.abilities.checksum && segment.length > 0 {
        tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
        offload.checksum = Some((HEADERS as u16, 16));
    } else {
        let sum = checksum(pseudo, &[tcp, body[0], body[1]]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    }
    if segment.length > usize::from(segment.guest_mss) {
        offload.segment = Some(segment.guest_mss);
    }
    offload
}
