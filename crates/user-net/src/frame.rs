//! Frames for the guest: Ethernet and IPv4 headers, and checksums that are left to it where it takes that.

use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame, EthernetProtocol, IPV4_HEADER_LEN, IpProtocol, Ipv4Packet,
};
use std::net::Ipv4Addr;

/// Bytes of both headers.
pub const HEADERS: usize = ETHERNET_HEADER_LEN + IPV4_HEADER_LEN;
/// Where the IPv4 header begins.
pub const IP: usize = ETHERNET_HEADER_LEN;
/// Largest IPv4 packet, in bytes.
pub const PACKET_MAX: usize = 65535;

/// What is left to do with a frame, as virtio has it (virtio 1.2, 5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The checksum from byte `.0` of the frame to its end is to be put `.1` bytes behind that; the pseudo-header's sum is there.
    pub checksum: Option<(u16, u16)>,
    /// TCP over IPv4 with more than a segment's payload: bytes of one, for whoever passes it on.
    pub segment: Option<u16>,
}

/// A frame in parts.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    pub offload: Offload,
    pub parts: [&'a [u8]; 3],
}

impl Frame<'_> {
    /// In bytes.
    pub fn length(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }
}

/// What the guest's network interface takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// Frames with [`Offload::checksum`].
    pub checksum: bool,
    /// Frames with [`Offload::segment`].
    pub segments: bool,
}

/// The two ends of the wire.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    pub ours: EthernetAddress,
    /// The one that the guest has used last, or was given.
    pub guest: EthernetAddress,
}

/// What an IPv4 header says beside lengths.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: IpProtocol,
    pub identity: u16,
}

impl Wire {
    /// Writes the headers for `payload` bytes into `frame`, which has room for them.
    ///
    /// # Panics
    /// The packet is larger than can be.
    pub fn write(&self, frame: &mut [u8], packet: &Packet, payload: usize) {
        self.write_fragment(frame, packet, payload, 0, false);
    }

    /// As [`Wire::write`], for the part of a packet at byte `offset`, with `more` behind it.
    ///
    /// # Panics
    /// The packet is larger than can be.
    pub fn write_fragment(&self, frame: &mut [u8], packet: &Packet, payload: usize, offset: u16, more: bool) {
        let length = u16::try_from(IPV4_HEADER_LEN + payload).expect("a packet has at most 64 KiB");
        self.write_ethernet(frame, EthernetProtocol::Ipv4);
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[IP..HEADERS]);
        ip.set_version(4);
        ip.set_header_len(IPV4_HEADER_LEN as u8);
        ip.set_dscp(0);
        ip.set_ecn(0);
        ip.set_total_len(length);
        ip.set_ident(packet.identity);
        ip.clear_flags();
        ip.set_dont_frag(false);
        ip.set_more_frags(more);
        ip.set_frag_offset(offset);
        ip.set_hop_limit(64);
        ip.set_next_header(packet.protocol);
        ip.set_src_addr(packet.source);
        ip.set_dst_addr(packet.destination);
        ip.fill_checksum();
    }

    /// Writes the Ethernet header alone.
    pub fn write_ethernet(&self, frame: &mut [u8], protocol: EthernetProtocol) {
        let mut ethernet = EthernetFrame::new_unchecked(&mut frame[..IP]);
        ethernet.set_src_addr(self.ours);
        ethernet.set_dst_addr(self.guest);
        ethernet.set_ethertype(protocol);
    }
}

/// The sum over a pseudo-header (RFC 9293, 3.1), for `length` bytes of header and payload.
pub fn pseudo_header(packet: &Packet, length: usize) -> u16 {
    let words = |address: Ipv4Addr| {
        let [a, b, c, d] = address.octets();
        u32::from(u16::from_be_bytes([a, b])) + u32::from(u16::from_be_bytes([c, d]))
    };
    let sum = words(packet.source) + words(packet.destination) + u32::from(u8::from(packet.protocol)) + length as u32;
    fold(sum)
}

fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The checksum of `parts` after the pseudo-header's `sum`.
pub fn checksum(sum: u16, parts: &[&[u8]]) -> u16 {
    let mut total = u64::from(sum);
    // A byte before whose pair the last part ended.
    let mut odd: Option<u8> = None;
    for part in parts {
        let mut part = *part;
        if let (Some(first), Some((second, rest))) = (odd, part.split_first()) {
            total += u64::from(u16::from_be_bytes([first, *second]));
            (odd, part) = (None, rest);
        }
        let (words, rest) = part.as_chunks::<4>();
        // Sums of 32-bit words fold to those of 16-bit words.
        total += words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum::<u64>();
        let (words, rest) = rest.as_chunks::<2>();
        total += words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum::<u64>();
        odd = rest.first().copied().or(odd);
    }
    total += odd.map_or(0, |byte| u64::from(byte) << 8);
    total = (total & 0xffff_ffff) + (total >> 32);
    total = (total & 0xffff_ffff) + (total >> 32);
    !fold_long(total)
}

fn fold_long(sum: u64) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    fold(sum as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::wire::{IpAddress, TcpPacket};

    #[test]
    fn checksums_are_as_others_have_them() {
        let packet = Packet {
            source: Ipv4Addr::new(255, 254, 253, 252),
            destination: Ipv4Addr::new(250, 251, 9, 0),
            protocol: IpProtocol::Tcp,
            identity: 0,
        };
        for length in [20usize, 21, 22, 23, 24, 1001, 65_515] {
            let mut bytes: Vec<u8> = (0..length).map(|n| (n * 7 + n / 200) as u8 | 0x80).collect();
            bytes[12] = 0x50;
            bytes[16..18].fill(0);
            for cut in [0, 1, 4, 7, 20] {
                let sum = checksum(pseudo_header(&packet, length), &[&bytes[..cut], &[], &bytes[cut..]]);
                let mut theirs = TcpPacket::new_unchecked(bytes.clone());
                let address = |address| IpAddress::Ipv4(address);
                theirs.fill_checksum(&address(packet.source), &address(packet.destination));
                assert_eq!(theirs.checksum(), sum, "{length} {cut}");
            }
        }
    }
}
