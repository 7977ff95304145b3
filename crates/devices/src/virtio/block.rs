//! Disks (virtio 1.2, 5.2): the configuration, and what a request asks for.
//!
//! A request is a header, data, and a status byte that the device writes, in buffers cut anywhere. It comes out as an
//! [`Action`] that is possible on such a disk. Who carries it out, now or later, gives it its end with [`Request::finish`].
//! What is wrong with the request itself becomes its status; a chain without room for header or status breaks the device,
//! for there is nowhere to say so.

use super::pci::Offer;
use super::queue::{Chain, Piece, gather, scatter, split, total};
use super::{Broken, Written, feature};
use vm_memory::GuestMemoryMmap;

/// Bytes of a sector, the unit of all addresses.
pub const SECTOR: u64 = 512;
/// Bytes of a disk's name, padded with zeros.
pub const ID_SIZE: usize = 20;

const DEVICE: u16 = 2;
/// Mass storage, SCSI: what other makers of virtio disks say too.
const CLASS: u32 = 0x01_0000;
const QUEUE_SIZE: u16 = 256;
/// Data buffers of a request: a queue holds two more descriptors.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors of a discard or write-zeroes request, 1 GiB: bounds how long one takes.
const RANGE_MAX: u32 = 2 << 20;

/// Feature bits (5.2.3).
mod bits {
    pub const SEGMENTS: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const BLOCK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const QUEUES: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types (5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Flag of a range to write zeroes to: the device may forget it.
const UNMAP: u32 = 1;

/// What a driver sees of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub sectors: u64,
    pub read_only: bool,
    /// Bytes of a physical block, a power of two of at least [`SECTOR`]: whole ones are read and written best.
    pub block: u32,
    /// Request queues.
    pub queues: u16,
}

/// What the device with this geometry offers.
pub fn offer(geometry: &Geometry) -> Offer {
    let mut features =
        bits::SEGMENTS | bits::BLOCK_SIZE | bits::FLUSH | bits::TOPOLOGY | feature::INDIRECT | feature::EVENT_INDEX;
    features |= if geometry.read_only { bits::READ_ONLY } else { bits::DISCARD | bits::WRITE_ZEROES };
    if geometry.queues > 1 {
        features |= bits::QUEUES;
    }
    let queues = vec![QUEUE_SIZE; geometry.queues.into()];
    Offer { device: DEVICE, class: CLASS, features, queues, config: config(geometry), writable: 0..0 }
}

/// `struct virtio_blk_config` (5.2.4).
fn config(geometry: &Geometry) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let sectors_of_a_block = geometry.block / SECTOR as u32;
    put(0, &geometry.sectors.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    // Logical blocks are sectors: BIOSes know no others.
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[sectors_of_a_block.trailing_zeros() as u8]);
    put(34, &geometry.queues.to_le_bytes());
    for at in [36, 48] {
        put(at, &RANGE_MAX.to_le_bytes());
        put(at + 4, &1u32.to_le_bytes());
    }
    put(44, &sectors_of_a_block.to_le_bytes());
    put(56, &[1]);
    bytes
}

/// What a request asks for. Offsets and lengths are bytes within the disk, whole sectors, and lie in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fill [`Request::data`].
    Read { offset: u64 },
    /// Write [`Request::data`]; `through`: it lasts when the request ends.
    Write { offset: u64, through: bool },
    /// What was written before lasts when the request ends.
    Flush,
    /// Tell the disk's name.
    Id,
    /// Forget a range, if that can be done: what it reads as is then undefined.
    Discard { offset: u64, length: u64 },
    /// Make a range read as zeros, and give its room back with `unmap`.
    WriteZeroes { offset: u64, length: u64, unmap: bool },
    /// Nothing: the request cannot be carried out, for this reason.
    Refuse(Status),
}

/// How a request ended (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    Failed = 1,
    Unsupported = 2,
}

/// A request that has been taken from a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The chain that it came in.
    pub head: u16,
    pub action: Action,
    /// Buffers to read into, or to write from.
    pub data: Vec<Piece>,
    status: Vec<Piece>,
}

impl Request {
    /// The request in `chain` to a disk with this geometry, under the agreed `features`.
    ///
    /// # Errors
    /// It makes no sense.
    pub fn parse(
        chain: &Chain,
        features: u64,
        geometry: &Geometry,
        memory: &GuestMemoryMmap,
    ) -> Result<Request, Broken> {
        let mut header = [0; 16];
        gather(memory, &chain.readable, &mut header).ok_or(Broken("a disk request without a header"))?;
        let room = total(&chain.writable).checked_sub(1).ok_or(Broken("a disk request without a status"))?;
        let (_, payload) = split(&chain.readable, header.len() as u64);
        let (data, status) = split(&chain.writable, room);
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        let (action, data) = match kind {
            IN => (read(geometry, sector, &data), data),
            OUT => (write(geometry, features, sector, &payload), payload),
            FLUSH => (Action::Flush, vec![]),
            GET_ID => (Action::Id, data),
            DISCARD | WRITE_ZEROES if features & (bits::DISCARD | bits::WRITE_ZEROES) != 0 => {
                (forget(geometry, kind, &payload, memory), vec![])
            }
            _ => (Action::Refuse(Status::Unsupported), vec![]),
        };
        Ok(Request { head: chain.head, action, data, status })
    }

    /// Bytes that it reads or writes.
    pub fn length(&self) -> u64 {
        match self.action {
            Action::Read { .. } | Action::Write { .. } => total(&self.data),
            _ => 0,
        }
    }

    /// Answers an [`Action::Id`], and returns how many bytes that took.
    pub fn tell_id(&self, id: &[u8; ID_SIZE], memory: &GuestMemoryMmap, written: Written) -> u32 {
        scatter(memory, &self.data, id, written)
    }

    /// Ends the request: `told` bytes have been written by [`Request::tell_id`]. Returns how many bytes of its buffers were
    /// written in all, for the queue.
    pub fn finish(&self, status: Status, told: u32, memory: &GuestMemoryMmap, written: Written) -> u32 {
        let mut length = told;
        if matches!(self.action, Action::Read { .. }) {
            // What a read that failed left there was written too.
            self.data.iter().for_each(|piece| written(piece.gpa, piece.length.into()));
            length = total(&self.data) as u32;
        }
        length + scatter(memory, &self.status, &[status as u8], written)
    }
}

const FAILED: Action = Action::Refuse(Status::Failed);

fn read(geometry: &Geometry, sector: u64, data: &[Piece]) -> Action {
    range(geometry, sector, total(data)).map_or(FAILED, |offset| Action::Read { offset })
}

fn write(geometry: &Geometry, features: u64, sector: u64, payload: &[Piece]) -> Action {
    match range(geometry, sector, total(payload)) {
        // A driver that cannot flush relies on each write to last (5.2.6.2).
        Some(offset) if !geometry.read_only => Action::Write { offset, through: features & bits::FLUSH == 0 },
        _ => FAILED,
    }
}

/// Discards or zeroes the one range that such a request may have.
fn forget(geometry: &Geometry, kind: u32, payload: &[Piece], memory: &GuestMemoryMmap) -> Action {
    let mut bytes = [0; 16];
    if total(payload) != 16 || gather(memory, payload, &mut bytes).is_none() {
        return FAILED;
    }
    let sector = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let [sectors, flags] = [8, 12].map(|at| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")));
    let known = if kind == WRITE_ZEROES { UNMAP } else { 0 };
    if flags & !known != 0 {
        return Action::Refuse(Status::Unsupported);
    }
    let length = u64::from(sectors) * SECTOR;
    match range(geometry, sector, length) {
        Some(offset) if sectors <= RANGE_MAX && !geometry.read_only => match kind {
            DISCARD => Action::Discard { offset, length },
            _ => Action::WriteZeroes { offset, length, unmap: flags & UNMAP != 0 },
        },
        _ => FAILED,
    }
}

/// The offset of `length` bytes, whole sectors, from `sector`; `None` if they do not lie in the disk.
fn range(geometry: &Geometry, sector: u64, length: u64) -> Option<u64> {
    let end = sector.checked_add(length / SECTOR)?;
    (length.is_multiple_of(SECTOR) && end <= geometry.sectors).then(|| sector * SECTOR)
}

#[cfg(test)]
mod tests {
    use super::super::queue::tests::{DESCRIPTORS, DRIVER, describe, memory, offer as make_available, queue};
    use super::*;
    use std::cell::RefCell;
    use vm_memory::{Bytes, GuestAddress};

    const NEXT: u16 = 1;
    const WRITABLE: u16 = 2;
    const DISK: Geometry = Geometry { sectors: 64, read_only: false, block: 512, queues: 1 };

    const HEADER: u64 = 0x8000;
    const DATA: u64 = 0x9000;
    const STATUS: u64 = 0xa000;

    fn all(geometry: &Geometry) -> u64 {
        offer(geometry).features
    }

    /// The request with `length` bytes of data that a driver makes.
    fn request(
        geometry: &Geometry,
        features: u64,
        kind: u32,
        sector: u64,
        length: u32,
        memory: &GuestMemoryMmap,
    ) -> Request {
        let mut queue = queue();
        memory.write_obj(0u32, GuestAddress(DRIVER)).unwrap();
        memory.write_obj([u64::from(kind), sector], GuestAddress(HEADER)).unwrap();
        memory.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
        describe(memory, DESCRIPTORS, 0, HEADER, 16, NEXT, if length == 0 { 2 } else { 1 });
        let to_driver = if matches!(kind, IN | GET_ID) { WRITABLE } else { 0 };
        describe(memory, DESCRIPTORS, 1, DATA, length, NEXT | to_driver, 2);
        describe(memory, DESCRIPTORS, 2, STATUS, 1, WRITABLE, 0);
        make_available(memory, 0);
        let chain = queue.pop(memory).unwrap().unwrap();
        Request::parse(&chain, features, geometry, memory).unwrap()
    }

    fn action(geometry: &Geometry, kind: u32, sector: u64, length: u32) -> Action {
        request(geometry, all(geometry), kind, sector, length, &memory()).action
    }

    #[test]
    fn requests_say_what_they_want() {
        assert_eq!(action(&DISK, IN, 5, 1024), Action::Read { offset: 2560 });
        assert_eq!(action(&DISK, OUT, 63, 512), Action::Write { offset: 63 * 512, through: false });
        assert_eq!(action(&DISK, FLUSH, 0, 0), Action::Flush);
        assert_eq!(action(&DISK, GET_ID, 0, 20), Action::Id);
        let read = request(&DISK, all(&DISK), IN, 0, 512, &memory());
        assert_eq!((read.data.clone(), read.length()), (vec![Piece { gpa: DATA, length: 512 }], 512));
    }

    #[test]
    fn requests_end_with_a_status_and_what_was_written() {
        let memory = memory();
        let reported = RefCell::new(Vec::new());
        let told: Written = &|gpa, length| reported.borrow_mut().push((gpa, length));
        let status = || memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap();
        let read = request(&DISK, all(&DISK), IN, 5, 1024, &memory);
        assert_eq!((read.finish(Status::Ok, 0, &memory, told), status()), (1025, 0));
        assert_eq!(reported.take(), [(DATA, 1024), (STATUS, 1)]);
        let write = request(&DISK, all(&DISK), OUT, 5, 1024, &memory);
        assert_eq!((write.finish(Status::Failed, 0, &memory, told), status()), (1, 1));
        assert_eq!(reported.take(), [(STATUS, 1)]);
        let id = request(&DISK, all(&DISK), GET_ID, 0, 20, &memory);
        let length = id.tell_id(b"anyvisor-disk0\0\0\0\0\0\0", &memory, told);
        assert_eq!(id.finish(Status::Ok, length, &memory, told), 21);
        assert_eq!(&memory.read_obj::<[u8; 14]>(GuestAddress(DATA)).unwrap(), b"anyvisor-disk0");
    }

    #[test]
    fn a_write_lasts_if_the_driver_cannot_flush() {
        let write = request(&DISK, all(&DISK) & !bits::FLUSH, OUT, 0, 512, &memory());
        assert_eq!(write.action, Action::Write { offset: 0, through: true });
    }

    #[test]
    fn impossible_requests_are_refused() {
        let unsupported = Action::Refuse(Status::Unsupported);
        for (kind, sector, length, expected) in [
            (IN, 64, 512, FAILED),
            (IN, 63, 1024, FAILED),
            (IN, u64::MAX, 512, FAILED),
            (IN, 0, 511, FAILED),
            (OUT, 63, 1024, FAILED),
            (OUT, 0, 100, FAILED),
            (DISCARD, 0, 15, FAILED),
            (2, 0, 512, unsupported),
            (0xffff_ffff, 0, 0, unsupported),
        ] {
            assert_eq!(action(&DISK, kind, sector, length), expected, "{kind} {sector} {length}");
        }
        let read_only = Geometry { read_only: true, ..DISK };
        assert_eq!(action(&read_only, OUT, 0, 512), FAILED);
        assert_eq!(action(&read_only, DISCARD, 0, 16), unsupported);
    }

    #[test]
    fn ranges_are_forgotten() {
        let memory = memory();
        let unsupported = Action::Refuse(Status::Unsupported);
        let zeroes = |offset, length, unmap| Action::WriteZeroes { offset, length, unmap };
        for (kind, sector, sectors, flags, expected) in [
            (DISCARD, 8u64, 4u32, 0u32, Action::Discard { offset: 4096, length: 2048 }),
            (WRITE_ZEROES, 8, 4, 0, zeroes(4096, 2048, false)),
            (WRITE_ZEROES, 0, 64, UNMAP, zeroes(0, 32768, true)),
            (DISCARD, 0, 1, UNMAP, unsupported),
            (WRITE_ZEROES, 0, 1, 2, unsupported),
            (DISCARD, 60, 5, 0, FAILED),
            (WRITE_ZEROES, u64::MAX, 1, 0, FAILED),
        ] {
            memory.write_obj(sector, GuestAddress(DATA)).unwrap();
            memory.write_obj([sectors, flags], GuestAddress(DATA + 8)).unwrap();
            let request = request(&DISK, all(&DISK), kind, 0, 16, &memory);
            assert_eq!(request.action, expected, "{kind} {sector} {sectors} {flags}");
        }
    }

    #[test]
    fn requests_without_header_or_status_break_the_device() {
        let memory = memory();
        for (header, status) in [(15, WRITABLE), (16, 0)] {
            let mut queue = queue();
            memory.write_obj(0u32, GuestAddress(DRIVER)).unwrap();
            describe(&memory, DESCRIPTORS, 0, HEADER, header, NEXT, 1);
            describe(&memory, DESCRIPTORS, 1, STATUS, 1, status, 0);
            make_available(&memory, 0);
            let chain = queue.pop(&memory).unwrap().unwrap();
            assert!(Request::parse(&chain, all(&DISK), &DISK, &memory).is_err());
        }
    }

    #[test]
    fn the_configuration_is_the_specifications() {
        let geometry = Geometry { block: 4096, queues: 3, ..DISK };
        let Offer { config, queues, features, .. } = offer(&geometry);
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!((u32_at(0), u32_at(4), u32_at(12), u32_at(20), u32_at(24)), (64, 0, 254, 512, 3));
        assert_eq!((u32_at(36), u32_at(40), u32_at(44), u32_at(48), u32_at(52)), (RANGE_MAX, 1, 8, RANGE_MAX, 1));
        assert_eq!((config[34], config[56], config.len()), (3, 1, 60));
        assert_eq!((queues.len(), features & bits::QUEUES != 0, all(&DISK) & bits::QUEUES), (3, true, 0));
    }
}
