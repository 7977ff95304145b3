//! Puts the guest's fragmented IPv4 packets together (RFC 791, 3.2), within bounds.

use smoltcp::wire::Ipv4Packet;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Most packets at a time, each of at most 64 KiB.
const PACKETS_MAX: usize = 16;
/// How long a packet's parts may take.
const PATIENCE: Duration = Duration::from_secs(15);

type Name = (Ipv4Addr, Ipv4Addr, u8, u16);

struct Partial {
    began: Instant,
    /// The first fragment's header, then what is there of the payload.
    header: Option<Vec<u8>>,
    payload: Vec<u8>,
    /// Which eight bytes of the payload are there.
    present: Vec<bool>,
    /// Bytes of the whole payload, once the last fragment has come.
    length: Option<usize>,
}

#[derive(Default)]
pub struct Fragments {
    partial: HashMap<Name, Partial>,
}

impl Fragments {
    pub fn clear(&mut self) {
        self.partial.clear();
    }

    /// Takes a fragment. Returns the whole packet, as if it had never been cut, when it was the last that was missing.
    pub fn add(&mut self, ip: &Ipv4Packet<&[u8]>, now: Instant) -> Option<Vec<u8>> {
        let name = (ip.src_addr(), ip.dst_addr(), ip.next_header().into(), ip.ident());
        self.partial.retain(|_, partial| now < partial.began + PATIENCE);
        if self.partial.len() >= PACKETS_MAX && !self.partial.contains_key(&name) {
            let oldest = self.partial.iter().min_by_key(|(_, partial)| partial.began).map(|(name, _)| *name)?;
            self.partial.remove(&oldest);
        }
        let partial = self.partial.entry(name).or_insert_with(|| Partial {
            began: now,
            header: None,
            payload: Vec::new(),
            present: Vec::new(),
            length: None,
        });
        if !partial.add(ip) {
            self.partial.remove(&name);
            return None;
        }
        if !partial.is_whole() {
            return None;
        }
        self.partial.remove(&name)?.whole()
    }
}

impl Partial {
    /// False if the fragment contradicts others.
    fn add(&mut self, ip: &Ipv4Packet<&[u8]>) -> bool {
        let (offset, data) = (usize::from(ip.frag_offset()), ip.payload());
        let end = offset + data.len();
        if end > usize::from(u16::MAX) || data.is_empty() || (ip.more_frags() && !data.len().is_multiple_of(8)) {
            return false;
        }
        if !ip.more_frags() && self.length.replace(end).is_some_and(|known| known != end) {
            return false;
        }
        if self.length.is_some_and(|length| end > length || self.payload.len() > length) {
            return false;
        }
        if offset == 0 {
            self.header = Some(ip.clone().into_inner()[..usize::from(ip.header_len())].to_vec());
        }
        if self.payload.len() < end {
            self.payload.resize(end, 0);
            self.present.resize(end.div_ceil(8), false);
        }
        self.payload[offset..end].copy_from_slice(data);
        self.present[offset / 8..end.div_ceil(8)].fill(true);
        true
    }

    fn is_whole(&self) -> bool {
        self.length == Some(self.payload.len()) && self.header.is_some() && self.present.iter().all(|there| *there)
    }

    fn whole(self) -> Option<Vec<u8>> {
        let mut packet = self.header?;
        packet.extend(&self.payload);
        let length = u16::try_from(packet.len()).ok()?;
        let mut ip = Ipv4Packet::new_unchecked(&mut packet[..]);
        ip.set_total_len(length);
        ip.set_more_frags(false);
        ip.set_frag_offset(0);
        ip.fill_checksum();
        Some(packet)
    }
}
