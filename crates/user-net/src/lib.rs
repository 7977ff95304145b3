//! A network for a guest, on the host's sockets: no rights, no helper, nothing to set up.
//!
//! **Problem.** A guest's network card sends Ethernet frames, and a user without rights has sockets.
//!
//! **Idea.** The guest is alone on 10.0.2.0/24 behind a router that exists in this crate only. Frames go in and come out
//! ([`Network::transmit`], [`Network::receive`]); what the guest sends to the world becomes a socket's connect() and send(), and what
//! sockets receive becomes packets from whom they are connected to. Nothing is queued that can wait in a socket or in the guest:
//! frames are made when the guest has room for one.
//!
//! | address | is |
//! |---|---|
//! | 10.0.2.15 | the guest ([`GUEST`]), by DHCP |
//! | 10.0.2.2 | the router ([`GATEWAY`]); its ports are those of the host's 127.0.0.1 |
//! | 10.0.2.3 | a name server ([`DNS`]): the host's, whichever they are |
//!
//! **Bounds.** The guest decides what it sends, so everything that grows with it has a limit: connections, their buffers, datagram
//! flows, frames that wait, packets in parts. A frame that makes no sense is dropped, as by any router.
//!
//! **Time** goes in as an argument. Whoever drives a network waits for [`Network::fd`] and until [`Network::deadline`], and then calls
//! [`Network::poll`].
#![forbid(unsafe_code)]

mod datagram;
mod dhcp;
mod forward;
mod fragments;
mod frame;
mod line;
mod resolver;
mod ring;
mod table;
mod tcp;

pub use forward::{Forward, Protocol};
pub use frame::{Abilities, Frame, Offload};
pub use tcp::Broken;

use datagram::Datagrams;
use forward::Listener;
use fragments::Fragments;
use frame::Wire;
use line::{Line, Owner};
use resolver::Resolver;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4DstUnreachable,
    IpAddress, IpProtocol, Ipv4Packet, UdpPacket,
};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Instant;
use tcp::Tcp;

pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// Of the router; locally administered.
const MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
/// Smallest MTU (RFC 791, 3.2: every host takes so much).
pub const MTU_MIN: u16 = 576;
/// Events that are taken at a time.
const EVENTS: usize = 64;

/// What a network is to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// Of the guest's card, until it says otherwise.
    pub mac: [u8; 6],
    /// Bytes of an IP packet, at least [`MTU_MIN`].
    pub mtu: u16,
    pub forwards: Vec<Forward>,
    /// Where the host's name servers are listed.
    pub resolv_conf: PathBuf,
    /// On which port they are: 53 everywhere but in tests.
    pub name_server_port: u16,
}

impl Config {
    /// The usual network for a card with address `mac`.
    pub fn new(mac: [u8; 6]) -> Config {
        let resolv_conf = "/etc/resolv.conf".into();
        Config { mac, mtu: 1500, forwards: Vec::new(), resolv_conf, name_server_port: 53 }
    }
}

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot forward {forward}: {error}")]
    Forward { forward: Forward, error: std::io::Error },
    #[error("cannot watch sockets: {0}")]
    Watch(std::io::Error),
}

pub struct Network {
    line: Line,
    tcp: Tcp,
    datagrams: Datagrams,
    fragments: Fragments,
    resolver: Resolver,
    /// Where the guest is, for what comes to forwarded ports.
    guest: Ipv4Addr,
    /// The frame that is being sent, if it is in one piece.
    frame: Vec<u8>,
}

impl Network {
    /// Takes the ports that are forwarded.
    ///
    /// # Errors
    /// The host's; which forward cannot be had.
    pub fn new(config: &Config) -> Result<Network, Error> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|error| Error::Watch(error.into()))?;
        let (mut streams, mut datagrams) = (Vec::new(), Vec::new());
        for forward in &config.forwards {
            let listener =
                Listener::open(forward).map_err(|error| Error::Forward { forward: *forward, error: error.into() })?;
            match forward.protocol {
                Protocol::Tcp => streams.push(listener),
                Protocol::Udp => datagrams.push(listener),
            }
        }
        let wire = Wire { ours: MAC, guest: EthernetAddress(config.mac) };
        let network = Network {
            line: Line::new(wire, config.mtu.max(MTU_MIN), epoll),
            tcp: Tcp::new(streams),
            datagrams: Datagrams::new(datagrams),
            fragments: Fragments::default(),
            resolver: Resolver::new(config.resolv_conf.clone(), config.name_server_port),
            guest: GUEST,
            frame: Vec::new(),
        };
        let listeners = (0..).zip(network.tcp.listeners()).map(|(n, listener)| (listener, Owner::TcpListener(n)));
        let listeners = listeners
            .chain((0..).zip(network.datagrams.listeners()).map(|(n, listener)| (listener, Owner::UdpListener(n))));
        for (listener, owner) in listeners {
            network.line.watch(&listener.socket, owner).map_err(|error| Error::Watch(error.into()))?;
        }
        Ok(network)
    }

    /// Readable when [`Network::poll`] has something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.line.epoll.as_fd()
    }

    /// When [`Network::poll`] has something to do at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.tcp.deadline().into_iter().chain(self.datagrams.deadline()).min()
    }

    /// The guest has set its card up, which takes what `abilities` say.
    pub fn start(&mut self, abilities: Abilities) {
        // Segments are sent without checksums.
        self.line.abilities = Abilities { segments: abilities.segments && abilities.checksum, ..abilities };
    }

    /// The guest has forgotten everything: so do we. Whom it was connected to are told.
    pub fn reset(&mut self) {
        self.tcp.clear();
        self.datagrams.clear();
        self.fragments.clear();
        self.line.clear();
        self.guest = GUEST;
        self.line.abilities = Abilities::default();
    }

    /// The guest's connections, for a network that goes on with the guest and cannot have them: [`Network::restore`].
    pub fn save(&mut self) -> Vec<Broken> {
        self.tcp.saved()
    }

    /// Has a guest told that connections it had are broken. The guest's card is set up.
    pub fn restore(&mut self, broken: Vec<Broken>) {
        self.tcp.break_later(broken);
    }

    /// Looks at sockets and timers.
    pub fn poll(&mut self, now: Instant) {
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; EVENTS];
        loop {
            let wait = epoll::wait(&self.line.epoll, &mut events[..], Some(&rustix::event::Timespec::default()));
            let Ok(count) = wait else { break };
            for event in &events[..count] {
                let (flags, data) = (event.flags, event.data);
                match Owner::of(data.u64()) {
                    Owner::TcpListener(n) => self.tcp.listener_event(n),
                    Owner::Tcp(id) => self.tcp.event(&mut self.line, id, flags),
                    Owner::UdpListener(n) => self.datagrams.listener_event(n),
                    Owner::Datagram(id) => self.datagrams.event(id, flags),
                }
            }
            if count < EVENTS {
                break;
            }
        }
        self.tcp.accept(&mut self.line, self.guest, now);
        self.tcp.expire(&mut self.line, now);
        self.datagrams.expire(&mut self.resolver, now);
    }

    /// Whether [`Network::receive`] may have something.
    pub fn has_frames(&self) -> bool {
        self.line.has_frames() || self.datagrams.has_ready() || self.tcp.has_ready()
    }

    /// The next frame for the guest, which has room for `room` bytes. What does not fit is lost, except connections' data: that
    /// is cut to fit.
    pub fn receive(&mut self, room: usize, now: Instant) -> Option<Frame<'_>> {
        loop {
            while let Some(frame) = self.line.pop() {
                if frame.len() <= room {
                    self.frame = frame;
                    return Some(Frame { offload: Offload::default(), parts: [&self.frame, &[], &[]] });
                }
            }
            if !self.datagrams.has_ready() {
                break;
            }
            self.datagrams.receive(&mut self.line, self.guest, &mut self.resolver, now);
        }
        self.tcp.receive(&mut self.line, room, now)
    }

    /// A frame of the guest's. It need not be cut to the MTU, and `trusted` says that its checksum is not filled in.
    pub fn transmit(&mut self, frame: &[u8], trusted: bool, now: Instant) {
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else { return };
        let (source, destination) = (ethernet.src_addr(), ethernet.dst_addr());
        if !source.is_unicast() || (destination != MAC && !destination.is_broadcast()) {
            return;
        }
        self.line.wire.guest = source;
        match ethernet.ethertype() {
            EthernetProtocol::Arp => self.arp(ethernet.payload()),
            EthernetProtocol::Ipv4 => self.ipv4(ethernet.payload(), trusted, now),
            _ => {}
        }
    }

    /// Answers who asks for us, and no others: a client of DHCP looks whether its address is free.
    fn arp(&mut self, packet: &[u8]) {
        let Ok(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpPacket::new_checked(packet).and_then(|packet| ArpRepr::parse(&packet))
        else {
            return;
        };
        if operation != ArpOperation::Request || !matches!(target_protocol_addr, GATEWAY | DNS) {
            return;
        }
        let answer = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: MAC,
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let mut frame = vec![0; frame::IP + answer.buffer_len()];
        answer.emit(&mut ArpPacket::new_unchecked(&mut frame[frame::IP..]));
        self.line.send_ethernet(frame, EthernetProtocol::Arp);
    }

    fn ipv4(&mut self, packet: &[u8], trusted: bool, now: Instant) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else { return };
        if ip.version() != 4 || usize::from(ip.header_len()) < 20 || !ip.verify_checksum() {
            return;
        }
        if ip.more_frags() || ip.frag_offset() > 0 {
            if let Some(whole) = self.fragments.add(&ip, now)
                && let Ok(ip) = Ipv4Packet::new_checked(&whole[..])
            {
                self.packet(&ip, trusted, now);
            }
            return;
        }
        self.packet(&ip, trusted, now);
    }

    fn packet(&mut self, ip: &Ipv4Packet<&[u8]>, trusted: bool, now: Instant) {
        let (source, destination) = (ip.src_addr(), ip.dst_addr());
        if ip.next_header() == IpProtocol::Udp {
            return self.udp(ip, trusted, now);
        }
        // What has no address of this network yet can ask for one by UDP only.
        if !is_local(source) || matches!(source, GATEWAY | DNS) {
            return;
        }
        self.guest = source;
        match ip.next_header() {
            IpProtocol::Tcp => {
                let port = ip.payload().get(2..4).map_or(0, |port| u16::from_be_bytes([port[0], port[1]]));
                let host = self.host(destination, port, now);
                self.tcp.packet(&mut self.line, ip, host, trusted, now);
            }
            IpProtocol::Icmp => {
                let message = ip.payload();
                if !datagram::is_echo_request(message) || frame::checksum(0, &[message]) != 0 {
                    return;
                }
                match destination {
                    GATEWAY | DNS => self.line.send_icmp(destination, source, &datagram::echo(message)),
                    _ if is_beyond(destination) => {
                        self.datagrams.ping(&mut self.line, source, destination, message, now)
                    }
                    _ => {}
                }
            }
            protocol => {
                let packet = frame::Packet { source, destination, protocol, identity: ip.ident() };
                let mut start = [0; 8];
                let known = ip.payload().len().min(8);
                start[..known].copy_from_slice(&ip.payload()[..known]);
                self.line.send_unreachable(Icmpv4DstUnreachable::ProtoUnreachable, &packet, start);
            }
        }
    }

    fn udp(&mut self, ip: &Ipv4Packet<&[u8]>, trusted: bool, now: Instant) {
        let (source, destination) = (ip.src_addr(), ip.dst_addr());
        let Ok(udp) = UdpPacket::new_checked(ip.payload()) else { return };
        let (from, to) = (IpAddress::Ipv4(source), IpAddress::Ipv4(destination));
        if udp.dst_port() == 0 || !(trusted || udp.verify_checksum(&from, &to)) {
            return;
        }
        let to_server = matches!(destination, GATEWAY | Ipv4Addr::BROADCAST);
        if udp.dst_port() == dhcp::SERVER_PORT && to_server {
            if let Some((to, answer)) = dhcp::answer(udp.payload(), self.line.mtu) {
                self.line.send_udp((GATEWAY, dhcp::SERVER_PORT), (to, dhcp::CLIENT_PORT), &answer);
            }
            return;
        }
        if !is_local(source) || matches!(source, GATEWAY | DNS) || udp.src_port() == 0 {
            return;
        }
        self.guest = source;
        // Nobody is on this network to hear what is for all.
        if destination.is_broadcast() || destination.is_multicast() || destination.octets() == [10, 0, 2, 255] {
            return;
        }
        let host = self.host(destination, udp.dst_port(), now);
        self.datagrams.udp(&mut self.line, source, destination, &udp, host, now);
    }

    /// What the guest's `address` and `port` are for the host; none if nobody is there.
    fn host(&mut self, address: Ipv4Addr, port: u16, now: Instant) -> Option<SocketAddr> {
        match (address, port) {
            (GATEWAY, _) => Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)),
            (DNS, 53) => Some(self.resolver.server(now)),
            _ => is_beyond(address).then(|| SocketAddr::new(address.into(), port)),
        }
    }
}

/// Whether an address is one of the guest's network.
fn is_local(address: Ipv4Addr) -> bool {
    address.octets()[..3] == GATEWAY.octets()[..3]
}

/// Whether an address is one of the world's. The host's own 127.0.0.0/8 is reached by [`GATEWAY`] only.
fn is_beyond(address: Ipv4Addr) -> bool {
    let [first, ..] = address.octets();
    !is_local(address) && first != 0 && first != 127 && first < 224
}

/// What the guest sees of a client of a forwarded port.
fn shown_address(client: IpAddr) -> Ipv4Addr {
    match client.to_canonical() {
        IpAddr::V4(address) if is_beyond(address) => address,
        _ => GATEWAY,
    }
}

#[cfg(test)]
mod tests;
