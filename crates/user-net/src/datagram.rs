//! UDP, and echoes of ICMP: each pair of ends is a connected socket of the host's, as long as it is used.
//!
//! So only who was asked can answer, and the guest hears of ports where nobody is. Echoes go through the kernel's ping
//! sockets (icmp(7)), where the host's administrator lets this user have them (`net.ipv4.ping_group_range`).

use crate::forward::Listener;
use crate::line::{Line, Owner};
use crate::resolver::Resolver;
use crate::table::{Id, Key, Table};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, recvfrom, send, sendto,
    socket_with,
};
use smoltcp::wire::{Icmpv4DstUnreachable, IpProtocol, UdpPacket};
use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Most flows; the one that was used least recently makes room.
const FLOWS_MAX: usize = 512;
/// How long a flow lasts on which nothing happens (RFC 4787, REQ-5: two minutes at least), and one that asks and is
/// answered once.
const IDLE: Duration = Duration::from_secs(180);
const IDLE_ONCE: Duration = Duration::from_secs(15);
const SWEEP: Duration = Duration::from_secs(5);
const DNS_PORT: u16 = 53;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

struct Flow {
    end: End,
    readable: bool,
    used: Instant,
    /// A question to a name server that is not answered.
    asks: bool,
}

/// The host's end.
enum End {
    Socket(OwnedFd),
    /// A client of a forwarded port.
    Client(usize, SocketAddr),
}

#[derive(Default)]
pub struct Datagrams {
    flows: Table<Flow>,
    listeners: Vec<Listener>,
    clients: HashMap<(usize, SocketAddr), Key>,
    ready: VecDeque<Id>,
    sweep: Option<Instant>,
    buffer: Vec<u8>,
}

impl Datagrams {
    pub fn new(listeners: Vec<Listener>) -> Datagrams {
        Datagrams { listeners, buffer: vec![0; 1 << 16], ..Datagrams::default() }
    }

    pub fn listeners(&self) -> &[Listener] {
        &self.listeners
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.flows.len()
    }

    pub fn clear(&mut self) {
        self.flows.clear();
        self.clients.clear();
        self.ready.clear();
    }

    /// A datagram of the guest's, which is `host`'s for the host.
    pub fn udp(
        &mut self,
        line: &mut Line,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        udp: &UdpPacket<&[u8]>,
        host: Option<SocketAddr>,
        now: Instant,
    ) {
        let guest = SocketAddrV4::new(source, udp.src_port());
        let key = Key { guest, remote: SocketAddrV4::new(destination, udp.dst_port()), ping: false };
        let id = match (self.flows.find(&key), host) {
            (Some(id), _) => Some(id),
            (None, Some(host)) => {
                let family = if host.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                self.connect(line, key, family, None, &host, now)
            }
            (None, None) => None,
        };
        let Some(id) = id else { return unreachable_for(line, &key, Icmpv4DstUnreachable::HostUnreachable) };
        self.send(line, id, udp.payload(), now);
    }

    /// An echo request of the guest's, to a host beyond.
    pub fn ping(&mut self, line: &mut Line, source: Ipv4Addr, destination: Ipv4Addr, message: &[u8], now: Instant) {
        let identity = u16::from_be_bytes([message[4], message[5]]);
        let key =
            Key { guest: SocketAddrV4::new(source, identity), remote: SocketAddrV4::new(destination, 0), ping: true };
        let host = SocketAddr::new(destination.into(), 0);
        let id = self
            .flows
            .find(&key)
            .or_else(|| self.connect(line, key, AddressFamily::INET, Some(ipproto::ICMP), &host, now));
        // Where the host has no ping sockets for us, nothing answers.
        if let Some(id) = id {
            self.send(line, id, message, now);
        }
    }

    fn connect(
        &mut self,
        line: &Line,
        key: Key,
        family: AddressFamily,
        protocol: Option<rustix::net::Protocol>,
        host: &SocketAddr,
        now: Instant,
    ) -> Option<Id> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::DGRAM, flags, protocol).ok()?;
        connect(&socket, host).ok()?;
        self.make_room();
        line.watch(&socket, Owner::Datagram(self.flows.next_id())).ok()?;
        Some(self.insert(key, End::Socket(socket), now))
    }

    fn insert(&mut self, key: Key, end: End, now: Instant) -> Id {
        self.sweep.get_or_insert(now + SWEEP);
        self.flows.insert(key, Flow { end, readable: false, used: now, asks: false })
    }

    /// Drops the flow that was used least recently if there are too many.
    fn make_room(&mut self) {
        if self.flows.len() < FLOWS_MAX {
            return;
        }
        let ids = self.flows.ids();
        if let Some(id) = ids.into_iter().min_by_key(|id| self.flows.get(*id).map(|(_, flow)| flow.used)) {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: Id) {
        if let Some((_, Flow { end: End::Client(n, address), .. })) = self.flows.remove(id) {
            self.clients.remove(&(n, address));
        }
    }

    fn send(&mut self, line: &mut Line, id: Id, data: &[u8], now: Instant) {
        let Some((key, flow)) = self.flows.get(id) else { return };
        flow.used = now;
        flow.asks = !key.ping && key.remote.port() == DNS_PORT;
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = match &flow.end {
            End::Socket(socket) => match send(socket, data, flags) {
                // What an earlier one has come to; this one was not sent.
                Err(Errno::CONNREFUSED) => send(socket, data, flags),
                other => other,
            },
            End::Client(n, address) => sendto(&self.listeners[*n].socket, data, flags, address),
        };
        // Datagrams may get lost; but who waits for an answer is told that there will be none.
        let reason = match sent {
            Err(Errno::CONNREFUSED) => Icmpv4DstUnreachable::PortUnreachable,
            Err(Errno::HOSTUNREACH | Errno::NETUNREACH) => Icmpv4DstUnreachable::HostUnreachable,
            _ => return,
        };
        if !key.ping {
            unreachable_for(line, key, reason);
        }
    }

    /// A socket has become readable.
    pub fn event(&mut self, id: Id, flags: EventFlags) {
        if let Some((_, flow)) = self.flows.get(id)
            && flags.intersects(EventFlags::IN | EventFlags::ERR | EventFlags::HUP)
            && !std::mem::replace(&mut flow.readable, true)
        {
            self.ready.push_back(id);
        }
    }

    pub fn listener_event(&mut self, index: u32) {
        if let Some(listener) = self.listeners.get_mut(index as usize) {
            listener.ready = true;
        }
    }

    /// Whether [`Datagrams::receive`] may have something.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty() || self.listeners.iter().any(|listener| listener.ready)
    }

    /// Has the next datagrams wait in the line's queue.
    pub fn receive(&mut self, line: &mut Line, guest: Ipv4Addr, resolver: &mut Resolver, now: Instant) {
        let Some(id) = self.ready.pop_front() else {
            return self.take_clients(line, guest, now);
        };
        let Some((key, flow)) = self.flows.get(id) else { return };
        let End::Socket(socket) = &flow.end else { return };
        match recv(socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
            Ok((_, length)) => {
                flow.used = now;
                if std::mem::take(&mut flow.asks) {
                    resolver.answers();
                }
                self.ready.push_back(id);
                let data = &mut self.buffer[..length];
                let (from, to) = (key.remote, key.guest);
                if !key.ping {
                    line.send_udp((*from.ip(), from.port()), (*to.ip(), to.port()), data);
                } else if data.len() >= 8 && data[0] == ECHO_REPLY {
                    data[4..6].copy_from_slice(&to.port().to_be_bytes());
                    line.send_icmp(*from.ip(), *to.ip(), data);
                }
            }
            Err(Errno::CONNREFUSED) => {
                if std::mem::take(&mut flow.asks) {
                    resolver.is_silent();
                }
                let key = *key;
                self.ready.push_back(id);
                unreachable_for(line, &key, Icmpv4DstUnreachable::PortUnreachable);
            }
            Err(Errno::INTR) => self.ready.push_back(id),
            Err(_) => flow.readable = false,
        }
    }

    /// Takes a datagram that came for a forwarded port.
    fn take_clients(&mut self, line: &mut Line, guest: Ipv4Addr, now: Instant) {
        let Some(n) = self.listeners.iter().position(|listener| listener.ready) else { return };
        let listener = &mut self.listeners[n];
        let port = listener.port;
        let (length, address) = match recvfrom(&listener.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
            Ok((_, length, address)) => (length, address.and_then(|address| SocketAddr::try_from(address).ok())),
            Err(Errno::INTR | Errno::CONNREFUSED) => return,
            Err(_) => {
                listener.ready = false;
                return;
            }
        };
        let Some(address) = address else { return };
        let guest = SocketAddrV4::new(guest, port);
        let key = match self.clients.get(&(n, address)) {
            Some(key) => *key,
            None => {
                self.make_room();
                let shown = crate::shown_address(address.ip());
                let mut key = Key { guest, remote: SocketAddrV4::new(shown, address.port()), ping: false };
                while self.flows.find(&key).is_some() {
                    // There are more ports than flows.
                    key.remote.set_port(key.remote.port().wrapping_add(1).max(1024));
                }
                self.insert(key, End::Client(n, address), now);
                self.clients.insert((n, address), key);
                key
            }
        };
        if let Some(id) = self.flows.find(&key)
            && let Some((_, flow)) = self.flows.get(id)
        {
            flow.used = now;
        }
        let from = (*key.remote.ip(), key.remote.port());
        line.send_udp(from, (*guest.ip(), port), &self.buffer[..length]);
    }

    /// When [`Datagrams::expire`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.sweep
    }

    /// Drops flows that nobody has used for long.
    pub fn expire(&mut self, resolver: &mut Resolver, now: Instant) {
        if self.sweep.is_none_or(|sweep| now < sweep) {
            return;
        }
        for id in self.flows.ids() {
            let Some((key, flow)) = self.flows.get(id) else { continue };
            let once = key.ping || key.remote.port() == DNS_PORT;
            if now > flow.used + if once { IDLE_ONCE } else { IDLE } {
                if flow.asks && *key.remote.ip() == crate::DNS {
                    resolver.is_silent();
                }
                self.remove(id);
            }
        }
        self.sweep = (self.flows.len() > 0).then_some(now + SWEEP);
    }
}

/// Whether an ICMP message asks for an echo.
pub fn is_echo_request(message: &[u8]) -> bool {
    message.len() >= 8 && message[0] == ECHO_REQUEST && message[1] == 0
}

/// The answer to an echo request.
pub fn echo(message: &[u8]) -> Vec<u8> {
    let mut answer = message.to_vec();
    answer[0] = ECHO_REPLY;
    answer
}

/// Tells the guest that its datagrams do not arrive.
fn unreachable_for(line: &mut Line, key: &Key, reason: Icmpv4DstUnreachable) {
    let (source, destination) = (*key.guest.ip(), *key.remote.ip());
    let packet = crate::frame::Packet { source, destination, protocol: IpProtocol::Udp, identity: 0 };
    let mut start = [0; 8];
    start[..2].copy_from_slice(&key.guest.port().to_be_bytes());
    start[2..4].copy_from_slice(&key.remote.port().to_be_bytes());
    start[4..6].copy_from_slice(&8u16.to_be_bytes());
    line.send_unreachable(reason, &packet, start);
}
