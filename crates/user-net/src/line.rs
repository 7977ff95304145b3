//! What all protocols share: the wire to the guest, frames that wait for it, and the sockets that are watched.

use crate::frame::{Abilities, HEADERS, IP, Packet, Wire, checksum, pseudo_header};
use crate::table::Id;
use rustix::event::epoll::{self, EventData, EventFlags};
use smoltcp::wire::{EthernetProtocol, Icmpv4DstUnreachable, IpProtocol};
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

/// Most frames that wait: answers that do not fit are lost, as on any wire.
const QUEUE_MAX: usize = 256;

/// Who a watched socket belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    TcpListener(u32),
    Tcp(Id),
    UdpListener(u32),
    Datagram(Id),
}

impl Owner {
    fn number(self) -> u64 {
        let (kind, id) = match self {
            Owner::TcpListener(index) => (0, Id { index, generation: 0 }),
            Owner::Tcp(id) => (1, id),
            Owner::UdpListener(index) => (2, Id { index, generation: 0 }),
            Owner::Datagram(id) => (3, id),
        };
        u64::from(id.index) | u64::from(id.generation & 0xff_ffff) << 32 | kind << 56
    }

    /// Who [`Line::watch`] was told.
    pub fn of(number: u64) -> Owner {
        let id = Id { index: number as u32, generation: (number >> 32) as u32 & 0xff_ffff };
        match number >> 56 {
            0 => Owner::TcpListener(id.index),
            1 => Owner::Tcp(id),
            2 => Owner::UdpListener(id.index),
            _ => Owner::Datagram(id),
        }
    }
}

pub struct Line {
    pub wire: Wire,
    pub abilities: Abilities,
    /// Most bytes of an IP packet that is not left to the guest's segmentation.
    pub mtu: u16,
    pub epoll: OwnedFd,
    queue: VecDeque<Vec<u8>>,
    identity: u16,
}

impl Line {
    pub fn new(wire: Wire, mtu: u16, epoll: OwnedFd) -> Line {
        Line { wire, abilities: Abilities::default(), mtu, epoll, queue: VecDeque::new(), identity: 0 }
    }

    /// Watches a socket: says when it *becomes* readable or writable.
    ///
    /// # Errors
    /// The host's.
    pub fn watch(&self, socket: impl AsFd, owner: Owner) -> rustix::io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, socket, EventData::new_u64(owner.number()), flags)
    }

    /// A number for the next packet.
    pub fn identity(&mut self) -> u16 {
        self.identity = self.identity.wrapping_add(1);
        self.identity
    }

    /// The next frame that waits.
    pub fn pop(&mut self) -> Option<Vec<u8>> {
        self.queue.pop_front()
    }

    pub fn has_frames(&self) -> bool {
        !self.queue.is_empty()
    }

    pub fn clear(&mut self) {
        self.queue.clear();
    }

    /// Whether another frame has room.
    pub fn has_room(&self) -> bool {
        self.queue.len() < QUEUE_MAX
    }

    /// Sends something that is not IP, whose bytes are behind room for the Ethernet header.
    pub fn send_ethernet(&mut self, mut frame: Vec<u8>, protocol: EthernetProtocol) {
        if self.has_room() {
            self.wire.write_ethernet(&mut frame, protocol);
            self.queue.push_back(frame);
        }
    }

    /// Sends an IP packet whose payload is in `frame` behind room for the headers, in fragments if it is long.
    pub fn send(&mut self, mut frame: Vec<u8>, source: Ipv4Addr, destination: Ipv4Addr, protocol: IpProtocol) {
        let identity = self.identity();
        let packet = Packet { source, destination, protocol, identity };
        let payload = frame.len() - HEADERS;
        let most = usize::from(self.mtu) - (HEADERS - IP);
        if payload <= most {
            if self.has_room() {
                self.wire.write(&mut frame, &packet, payload);
                self.queue.push_back(frame);
            }
            return;
        }
        // Offsets are in units of eight bytes.
        let most = most & !7;
        for (n, part) in frame[HEADERS..].chunks(most).enumerate() {
            if !self.has_room() {
                break;
            }
            let mut fragment = vec![0; HEADERS + part.len()];
            fragment[HEADERS..].copy_from_slice(part);
            let offset = n * most;
            let more = offset + part.len() < payload;
            self.wire.write_fragment(&mut fragment, &packet, part.len(), offset as u16, more);
            self.queue.push_back(fragment);
        }
    }

    /// Sends a UDP datagram.
    pub fn send_udp(&mut self, source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16), data: &[u8]) {
        let length = 8 + data.len();
        let mut frame = vec![0; HEADERS + length];
        let udp = &mut frame[HEADERS..];
        udp[..2].copy_from_slice(&source.1.to_be_bytes());
        udp[2..4].copy_from_slice(&destination.1.to_be_bytes());
        udp[4..6].copy_from_slice(&(length as u16).to_be_bytes());
        udp[8..].copy_from_slice(data);
        let packet = Packet { source: source.0, destination: destination.0, protocol: IpProtocol::Udp, identity: 0 };
        let sum = match checksum(pseudo_header(&packet, length), &[udp]) {
            // Zero says that there is none (RFC 768).
            0 => 0xffff,
            sum => sum,
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        self.send(frame, source.0, destination.0, IpProtocol::Udp);
    }

    /// Sends an ICMP message, whose checksum is filled in.
    pub fn send_icmp(&mut self, source: Ipv4Addr, destination: Ipv4Addr, message: &[u8]) {
        let mut frame = vec![0; HEADERS + message.len()];
        let icmp = &mut frame[HEADERS..];
        icmp.copy_from_slice(message);
        icmp[2..4].fill(0);
        let sum = checksum(0, &[icmp]);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        self.send(frame, source, destination, IpProtocol::Icmp);
    }

    /// Says that a packet of the guest's did not reach `packet.destination`. `start` is the first 8 bytes of its payload (RFC 792).
    pub fn send_unreachable(&mut self, reason: Icmpv4DstUnreachable, packet: &Packet, start: [u8; 8]) {
        let mut message = vec![0; 8 + HEADERS - IP + 8];
        (message[0], message[1]) = (3, reason.into());
        let mut original = [0; HEADERS];
        self.wire.write(&mut original, packet, start.len());
        message[8..28].copy_from_slice(&original[IP..]);
        message[28..].copy_from_slice(&start);
        self.send_icmp(crate::GATEWAY, packet.source, &message);
    }
}
