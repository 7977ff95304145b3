//! Network cards (virtio 1.2, 5.1): the configuration, and frames in and out of chains.
//!
//! Each frame is behind a header that says what is left to do with it: a checksum to fill in, a large segment to cut. Who offers
//! both ways of both has frames of up to 64 KiB each way, of which nobody ever makes what a wire would carry.
//!
//! What the driver sends and makes no sense is a frame that gets lost, as on a wire. A chain without room for a
//! header breaks the device; buffers of the wrong direction are passed over, as others' devices do.

use super::pci::Offer;
use super::queue::{Chain, Piece, gather, split, total};
use super::{Broken, Written, feature};
use std::collections::VecDeque;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Queue numbers (5.1.2).
pub const RECEIVE: usize = 0;
pub const TRANSMIT: usize = 1;

const DEVICE: u16 = 1;
/// An Ethernet controller.
const CLASS: u32 = 0x02_0000;
/// Buffers to receive into are many and small, those to send are few and large.
const QUEUE_SIZES: [u16; 2] = [512, 256];
/// Bytes of a header (5.1.6).
pub const HEADER: usize = 12;
/// Largest frame: an IP packet of 64 KiB behind an Ethernet header with a VLAN tag.
pub const FRAME_MAX: usize = 65_535 + 18;

/// Feature bits (5.1.3).
pub mod bits {
    /// The driver leaves checksums to the device, and the other way round.
    pub const CHECKSUM: u64 = 1 << 0;
    pub const GUEST_CHECKSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    /// Large TCP segments for the driver, over IPv4 and IPv6, and from it.
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    /// A frame may be in several buffers.
    pub const MERGEABLE: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// Kinds of large segments.
const TCP4: u8 = 1;
const TCP6: u8 = 4;

const LINK_UP: u16 = 1;

/// What a header says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The checksum from this byte of the frame to its end is to be put so many bytes behind that.
    pub checksum: Option<(u16, u16)>,
    /// The frame's checksums have been looked at.
    pub valid: bool,
    /// To be cut into segments.
    pub segment: Option<Segment>,
}

/// How a frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Over IPv6, not IPv4.
    pub v6: bool,
    /// Bytes of payload of each, at least 1.
    pub size: u16,
    /// Bytes of the frame's headers; a hint.
    pub headers: u16,
}

/// What the device with address `mac` offers: `features` are those of [`bits`] that what is behind it can do.
pub fn offer(mac: [u8; 6], mtu: u16, features: u64) -> Offer {
    let always = bits::MAC | bits::STATUS | bits::MTU | bits::MERGEABLE | feature::INDIRECT | feature::EVENT_INDEX;
    let mut config = vec![0; 12];
    config[..6].copy_from_slice(&mac);
    config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
    config[8..10].copy_from_slice(&1u16.to_le_bytes());
    config[10..].copy_from_slice(&mtu.to_le_bytes());
    Offer {
        device: DEVICE,
        class: CLASS,
        features: always | features,
        queues: QUEUE_SIZES.into(),
        config,
        writable: 0..0,
    }
}

impl Header {
    /// The header of a frame of `length` bytes from the driver, under the agreed `features`; `None` if it says what it may not.
    fn parse(bytes: [u8; HEADER], features: u64, length: usize) -> Option<Header> {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut header = Header::default();
        if bytes[0] & NEEDS_CHECKSUM != 0 {
            let (start, offset) = (word(6), word(8));
            let fits = usize::from(start) + usize::from(offset) + 2 <= length;
            if features & bits::CHECKSUM == 0 || !fits {
                return None;
            }
            header.checksum = Some((start, offset));
        }
        let (kind, size) = (bytes[1], word(4));
        let agreed = match kind {
            0 => return Some(header),
            TCP4 => features & bits::HOST_TSO4 != 0,
            TCP6 => features & bits::HOST_TSO6 != 0,
            _ => false,
        };
        // Segments get checksums of their own (5.1.6.2.1).
        if !agreed || size == 0 || header.checksum.is_none() {
            return None;
        }
        header.segment = Some(Segment { v6: kind == TCP6, size, headers: word(2) });
        Some(header)
    }

    /// The header of a frame of `length` bytes from a tap device of the host's, which has been told what the driver takes.
    pub fn of_host(bytes: [u8; HEADER], length: usize) -> Option<Header> {
        let all = bits::CHECKSUM | bits::HOST_TSO4 | bits::HOST_TSO6;
        let valid = bytes[0] & DATA_VALID != 0;
        Header::parse(bytes, all, length).map(|header| Header { valid, ..header })
    }

    /// As the driver sees it; [`bits::GUEST_CHECKSUM`] and what goes with it must have been agreed on where it is used.
    pub fn bytes(&self, buffers: u16) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, value: u16| bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        if let Some((start, offset)) = self.checksum {
            put(6, start);
            put(8, offset);
        }
        if let Some(segment) = self.segment {
            put(2, segment.headers);
            put(4, segment.size);
        }
        put(10, buffers);
        bytes[0] = if self.valid { DATA_VALID } else { 0 } | if self.checksum.is_some() { NEEDS_CHECKSUM } else { 0 };
        bytes[1] = self.segment.map_or(0, |segment| if segment.v6 { TCP6 } else { TCP4 });
        bytes
    }

    /// How many frames a wire would see of one of `length` bytes.
    pub fn frames(&self, length: usize) -> u64 {
        match self.segment {
            None => 1,
            Some(segment) => {
                let payload = length.saturating_sub(segment.headers.into()).max(1);
                payload.div_ceil(segment.size.max(1).into()) as u64
            }
        }
    }
}

/// Reads the frame in a chain of the transmit queue to `frame`, under the agreed `features`. None if it gets lost.
///
/// # Errors
/// The chain makes no sense.
pub fn transmitted(
    chain: &Chain,
    features: u64,
    memory: &GuestMemoryMmap,
    frame: &mut Vec<u8>,
) -> Result<Option<Header>, Broken> {
    let mut header = [0; HEADER];
    gather(memory, &chain.readable, &mut header).ok_or(Broken("a frame to send without a header"))?;
    let length = (total(&chain.readable) as usize) - HEADER;
    if length == 0 || length > FRAME_MAX {
        return Ok(None);
    }
    let Some(header) = Header::parse(header, features, length) else { return Ok(None) };
    let (_, pieces) = split(&chain.readable, HEADER as u64);
    // What is there already is overwritten: zeros are written only where it grows.
    frame.resize(length, 0);
    gather(memory, &pieces, frame).ok_or(Broken("a frame that is not in RAM"))?;
    Ok(Some(header))
}

/// Buffers that frames are received into: chains that were popped and not pushed.
#[derive(Default)]
pub struct Receiver {
    held: VecDeque<Chain>,
    /// Bytes of all of them.
    bytes: usize,
}

impl Receiver {
    /// How many chains it holds.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.held.clear();
        self.bytes = 0;
    }

    /// Whether a frame of any size that there can be has room.
    pub fn is_content(&self, features: u64) -> bool {
        if features & bits::MERGEABLE == 0 { !self.held.is_empty() } else { self.bytes >= HEADER + FRAME_MAX }
    }

    /// Takes a chain of the receive queue.
    ///
    /// # Errors
    /// It makes no sense.
    pub fn add(&mut self, chain: Chain) -> Result<(), Broken> {
        let bytes = total(&chain.writable) as usize;
        if bytes < HEADER {
            return Err(Broken("a buffer to receive into without room for a header"));
        }
        self.bytes += bytes;
        self.held.push_back(chain);
        Ok(())
    }

    /// Bytes of the largest frame that has room.
    pub fn room(&self, features: u64) -> usize {
        let bytes = match self.held.front() {
            Some(first) if features & bits::MERGEABLE == 0 => total(&first.writable) as usize,
            _ => self.bytes,
        };
        bytes.saturating_sub(HEADER).min(FRAME_MAX)
    }

    /// Writes a frame, which has room, and gives the chains that it is in to `push`: head and bytes written.
    ///
    /// # Errors
    /// What `push` says.
    ///
    /// # Panics
    /// The frame has no room.
    pub fn put(
        &mut self,
        header: &Header,
        parts: &[&[u8]],
        memory: &GuestMemoryMmap,
        written: Written,
        mut push: impl FnMut(u16, u32) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        let length = HEADER + parts.iter().map(|part| part.len()).sum::<usize>();
        let buffers = self.buffers_for(length);
        let header = header.bytes(buffers);
        let mut source = Source { parts: std::iter::once(&header[..]).chain(parts.iter().copied()), part: &[] };
        let mut left = length;
        for _ in 0..buffers {
            let chain = self.held.pop_front().expect("it is one of those that were counted");
            self.bytes -= total(&chain.writable) as usize;
            let before = left;
            for piece in &chain.writable {
                left -= source.fill(piece, memory, written);
                if left == 0 {
                    break;
                }
            }
            push(chain.head, (before - left) as u32)?;
        }
        assert_eq!(left, 0, "frames are received when there is room");
        Ok(())
    }

    /// How many chains `length` bytes take.
    fn buffers_for(&self, length: usize) -> u16 {
        let (mut bytes, mut buffers) = (0, 0);
        for chain in &self.held {
            if bytes >= length {
                break;
            }
            bytes += total(&chain.writable) as usize;
            buffers += 1;
        }
        assert!(bytes >= length, "frames are received when there is room");
        buffers
    }
}

/// What is left to write of a frame.
struct Source<'a, I> {
    parts: I,
    part: &'a [u8],
}

impl<'a, I: Iterator<Item = &'a [u8]>> Source<'a, I> {
    /// Writes as much to `piece` as goes, reports it, and returns how much that was.
    fn fill(&mut self, piece: &Piece, memory: &GuestMemoryMmap, written: Written) -> usize {
        let mut done = 0;
        while done < piece.length as usize {
            if self.part.is_empty() {
                match self.parts.next() {
                    Some(part) => self.part = part,
                    None => break,
                }
                continue;
            }
            let count = self.part.len().min(piece.length as usize - done);
            let (now, later) = self.part.split_at(count);
            memory.write_slice(now, GuestAddress(piece.gpa + done as u64)).expect("chains are in RAM");
            self.part = later;
            done += count;
        }
        if done > 0 {
            written(piece.gpa, done as u64);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::super::queue::tests::{
        DESCRIPTORS, DRIVER, RAM, SIZE, describe, memory, offer as make_available, queue,
    };
    use super::*;
    use crate::virtio::queue::Queue;
    use std::cell::RefCell;

    const ALL: u64 = bits::CHECKSUM
        | bits::GUEST_CHECKSUM
        | bits::GUEST_TSO4
        | bits::GUEST_TSO6
        | bits::HOST_TSO4
        | bits::HOST_TSO6
        | bits::MERGEABLE;
    const QUIET: Written = &|_, _| {};

    fn readable(memory: &GuestMemoryMmap, bytes: &[u8], cut: usize) -> Chain {
        memory.write_slice(bytes, GuestAddress(0x8000)).unwrap();
        let (front, back) = split(&[Piece { gpa: 0x8000, length: bytes.len() as u32 }], cut as u64);
        Chain { head: 3, readable: [front, back].concat(), writable: vec![] }
    }

    fn send(bytes: &[u8], features: u64) -> Result<Option<(Header, Vec<u8>)>, Broken> {
        let memory = memory();
        let mut results: Vec<_> = [0, 5, 12, 20]
            .into_iter()
            .map(|cut| {
                let mut frame = vec![9; 40];
                let header =
                    transmitted(&readable(&memory, bytes, cut.min(bytes.len())), features, &memory, &mut frame)?;
                Ok(header.map(|header| (header, frame)))
            })
            .collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "however it is cut");
        results.pop().unwrap()
    }

    #[test]
    fn frames_are_sent() {
        let frame = [7; 100];
        assert_eq!(send(&[&[0; 12][..], &frame].concat(), 0), Ok(Some((Header::default(), frame.to_vec()))));
        let header = Header {
            checksum: Some((34, 16)),
            valid: false,
            segment: Some(Segment { v6: false, size: 1460, headers: 54 }),
        };
        let bytes = [&header.bytes(0)[..], &frame].concat();
        assert_eq!(send(&bytes, ALL), Ok(Some((header, frame.to_vec()))));
        assert_eq!(header.frames(54 + 1461), 2);
    }

    #[test]
    fn frames_without_sense_are_lost() {
        let plain = Header { checksum: Some((34, 16)), ..Header::default() };
        let large = Header { segment: Some(Segment { v6: true, size: 9, headers: 0 }), ..plain };
        let cases: [(&str, [u8; 12], usize, u64); 9] = [
            ("nothing", [0; 12], 0, ALL),
            ("too long", [0; 12], FRAME_MAX + 1, ALL),
            ("a checksum that nobody agreed on", plain.bytes(0), 100, ALL & !bits::CHECKSUM),
            ("a checksum beyond the end", plain.bytes(0), 51, ALL),
            ("a checksum far beyond", Header { checksum: Some((u16::MAX, u16::MAX)), ..plain }.bytes(0), 100, ALL),
            ("segments that nobody agreed on", large.bytes(0), 100, ALL & !bits::HOST_TSO6),
            (
                "segments of nothing",
                Header { segment: Some(Segment { v6: true, size: 0, headers: 0 }), ..plain }.bytes(0),
                100,
                ALL,
            ),
            ("segments without checksums", Header { checksum: None, ..large }.bytes(0), 100, ALL),
            ("an unknown kind", [1, 3, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0], 100, ALL),
        ];
        for (what, header, length, features) in cases {
            assert_eq!(send(&[&header[..], &vec![7; length]].concat(), features), Ok(None), "{what}");
        }
        assert!(send(&[0; 11], ALL).is_err());
        let mut chain = readable(&memory(), &[0; 100], 5);
        chain.writable = std::mem::take(&mut chain.readable);
        assert!(transmitted(&chain, ALL, &memory(), &mut Vec::new()).is_err());
    }

    fn buffer(head: u16, pieces: &[(u64, u32)]) -> Chain {
        let writable = pieces.iter().map(|&(gpa, length)| Piece { gpa, length }).collect();
        Chain { head, readable: vec![], writable }
    }

    #[test]
    fn frames_are_received_in_several_buffers() {
        let memory = memory();
        let mut receiver = Receiver::default();
        assert_eq!((receiver.room(ALL), receiver.is_content(0)), (0, false));
        receiver.add(buffer(4, &[(0x8000, 5), (0x9000, 10)])).unwrap();
        receiver.add(buffer(2, &[(0xa000, 20)])).unwrap();
        receiver.add(buffer(7, &[(0xb000, 30)])).unwrap();
        assert_eq!((receiver.room(ALL), receiver.room(0)), (53, 3));
        assert!(!receiver.is_content(ALL) && receiver.is_content(0));
        let header = Header { valid: true, ..Header::default() };
        let (told, pushed) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let written: Written = &|gpa, length| told.borrow_mut().push((gpa, length));
        let mut put = |parts: &[&[u8]]| {
            receiver
                .put(&header, parts, &memory, written, |head, length| {
                    pushed.borrow_mut().push((head, length));
                    Ok(())
                })
                .unwrap();
            std::mem::take(&mut *pushed.borrow_mut())
        };
        assert_eq!(put(&[b"abcdef", b"", b"ghijklm"]), [(4, 15), (2, 10)]);
        assert_eq!(*told.borrow(), [(0x8000, 5), (0x9000, 10), (0xa000, 10)]);
        let mut bytes = [0; 15];
        let pieces = [Piece { gpa: 0x8000, length: 5 }, Piece { gpa: 0x9000, length: 10 }];
        gather(&memory, &pieces, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\x02\0\0\0\0\0\0\0\0\0\x02\0abc");
        assert_eq!(memory.read_obj::<[u8; 10]>(GuestAddress(0xa000)).unwrap(), *b"defghijklm");
        assert_eq!(put(&[b"xyz"]), [(7, 15)]);
        assert_eq!((receiver.held(), receiver.room(ALL)), (0, 0));
    }

    #[test]
    fn buffers_without_sense_break_the_device() {
        let mut receiver = Receiver::default();
        assert!(receiver.add(buffer(0, &[(0x8000, 11)])).is_err());
        let readable = vec![Piece { gpa: 0x8000, length: 99 }];
        assert!(receiver.add(Chain { readable, ..buffer(0, &[]) }).is_err());
        assert_eq!((receiver.held(), receiver.room(ALL)), (0, 0));
    }

    /// Queues of anything: frames come and go, or the device breaks; nothing else happens.
    #[test]
    fn random_queues_do_no_harm() {
        let mut dice = 3u64;
        let mut roll = |most: u64| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) % most
        };
        let (mut broken, mut sent, mut received) = (0, 0, 0);
        let memory = memory();
        for _ in 0..3000 {
            let mut queue: Queue = queue();
            memory.write_obj(0u32, GuestAddress(DRIVER)).unwrap();
            if roll(4) > 0 {
                memory.write_slice(&[0; 0x2000], GuestAddress(0x8000)).unwrap();
            }
            for n in 0..SIZE {
                let gpa = [0x8000 + roll(0x1000), RAM - roll(64), roll(u64::MAX), DESCRIPTORS]
                    [[0, 0, 0, 0, 0, 1, 2, 3][roll(8) as usize]];
                let length = [roll(64), roll(2000), 70_000, roll(1 << 32)][[0, 1, 1, 1, 2, 3][roll(6) as usize]] as u32;
                let flags = [0, 1, 1, 2, 2, 3, 4, 5][roll(8) as usize];
                describe(&memory, DESCRIPTORS, n, gpa, length, flags, roll(u64::from(SIZE) + 1) as u16);
            }
            (0..roll(u64::from(SIZE) + 1)).for_each(|_| make_available(&memory, roll(u64::from(SIZE) + 1) as u16));
            let (features, transmits) = (roll(u64::MAX) & ALL, roll(2) == 0);
            let (mut receiver, mut frame) = (Receiver::default(), Vec::new());
            let mut step = || -> Result<bool, Broken> {
                let Some(chain) = queue.pop(&memory)? else { return Ok(false) };
                if transmits {
                    let length = (total(&chain.readable) as usize).saturating_sub(HEADER);
                    if transmitted(&chain, features, &memory, &mut frame)?.is_some() {
                        assert!(frame.len() == length && length <= FRAME_MAX);
                        sent += 1;
                    }
                    queue.push(&memory, chain.head, 0, QUIET)?;
                    return Ok(true);
                }
                receiver.add(chain)?;
                let room = receiver.room(features);
                if room > 0 {
                    let frame = vec![1; roll(room as u64 + 1) as usize];
                    receiver.put(&Header::default(), &[&frame], &memory, QUIET, |head, length| {
                        queue.push(&memory, head, length, QUIET)
                    })?;
                    received += 1;
                }
                Ok(true)
            };
            loop {
                match step() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) => {
                        broken += 1;
                        break;
                    }
                }
            }
        }
        assert!(broken > 50 && sent > 50 && received > 50, "{broken} {sent} {received}");
    }
}
