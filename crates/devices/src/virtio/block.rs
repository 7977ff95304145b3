//! Disks (virtio 1.2, 5.2): the configuration, and one request at a time.
//!
//! A request is a header, data, and a status byte that the device writes, in buffers cut anywhere. What is wrong with
//! the request itself becomes its status; a chain without room for header or status breaks the device, for there is
//! nowhere to say so.

use super::pci::Offer;
use super::queue::{Chain, Piece, gather, scatter, split, total};
use super::{Broken, Written, feature};
use std::io;
use vm_memory::GuestMemoryMmap;

/// Bytes of a sector, the unit of all addresses.
pub const SECTOR: u64 = 512;
/// Bytes of a disk's name for [`Storage::id`].
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

/// Status bytes.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// What a disk's contents are in. Offsets and lengths are bytes within the disk.
pub trait Storage: Send {
    /// Size of the disk.
    fn sectors(&self) -> u64;
    fn is_read_only(&self) -> bool;
    /// Its name, for people, padded with zeros.
    fn id(&self) -> [u8; ID_SIZE];
    /// Reads from `offset` into `pieces`, which are RAM.
    ///
    /// # Errors
    /// The host's; some of it may have been read.
    fn read(&self, memory: &GuestMemoryMmap, pieces: &[Piece], offset: u64) -> io::Result<()>;
    /// Writes `pieces` to `offset`.
    ///
    /// # Errors
    /// The host's; some of it may have been written.
    fn write(&self, memory: &GuestMemoryMmap, pieces: &[Piece], offset: u64) -> io::Result<()>;
    /// Returns when all that was written lasts.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;
    /// Forgets a range, if that can be done: what it reads as is then undefined.
    ///
    /// # Errors
    /// The host's.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Makes a range read as zeros, and may give its room back with `unmap`.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;
}

/// What the device on `storage` offers.
pub fn offer(storage: &dyn Storage) -> Offer {
    let mut features = bits::SEGMENTS | bits::BLOCK_SIZE | bits::FLUSH | feature::INDIRECT | feature::EVENT_INDEX;
    features |= if storage.is_read_only() { bits::READ_ONLY } else { bits::DISCARD | bits::WRITE_ZEROES };
    Offer {
        device: DEVICE,
        class: CLASS,
        features,
        queues: vec![QUEUE_SIZE],
        config: config(storage.sectors()),
        writable: 0..0,
    }
}

/// `struct virtio_blk_config` (5.2.4).
fn config(sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &sectors.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(34, &1u16.to_le_bytes());
    for at in [36, 48] {
        put(at, &RANGE_MAX.to_le_bytes());
        put(at + 4, &1u32.to_le_bytes());
    }
    put(44, &1u32.to_le_bytes());
    put(56, &[1]);
    bytes
}

/// Carries out the request in `chain`, under the agreed `features`. Returns how many bytes of its buffers were written.
///
/// # Errors
/// The request makes no sense.
pub fn serve(
    chain: &Chain,
    features: u64,
    storage: &dyn Storage,
    memory: &GuestMemoryMmap,
    written: Written,
) -> Result<u32, Broken> {
    let mut header = [0; 16];
    gather(memory, &chain.readable, &mut header).ok_or(Broken("a disk request without a header"))?;
    let room = total(&chain.writable).checked_sub(1).ok_or(Broken("a disk request without a status"))?;
    let (_, payload) = split(&chain.readable, header.len() as u64);
    let (data, status) = split(&chain.writable, room);
    let request = Request {
        kind: u32::from_le_bytes([header[0], header[1], header[2], header[3]]),
        sector: u64::from_le_bytes(header[8..].try_into().expect("eight bytes")),
        payload,
        data,
    };
    let (result, length) = request.carry_out(features, storage, memory, written);
    scatter(memory, &status, &[result], written);
    Ok(length + 1)
}

struct Request {
    kind: u32,
    sector: u64,
    /// From the driver, and for it.
    payload: Vec<Piece>,
    data: Vec<Piece>,
}

impl Request {
    /// Returns the status, and how many bytes of `data` were written.
    fn carry_out(&self, features: u64, storage: &dyn Storage, memory: &GuestMemoryMmap, written: Written) -> (u8, u32) {
        let status = |result: io::Result<()>| if result.is_ok() { OK } else { IO_ERROR };
        match self.kind {
            IN => {
                let length = total(&self.data);
                let Some(offset) = range(storage, self.sector, length) else { return (IO_ERROR, 0) };
                let result = storage.read(memory, &self.data, offset);
                // What a read that failed left there was written too.
                self.data.iter().for_each(|piece| written(piece.gpa, piece.length.into()));
                (status(result), length as u32)
            }
            OUT => (self.write(features, storage, memory), 0),
            FLUSH => (status(storage.flush()), 0),
            GET_ID => (OK, scatter(memory, &self.data, &storage.id(), written)),
            DISCARD | WRITE_ZEROES if features & (bits::DISCARD | bits::WRITE_ZEROES) != 0 => {
                (self.forget(storage, memory), 0)
            }
            _ => (UNSUPPORTED, 0),
        }
    }

    fn write(&self, features: u64, storage: &dyn Storage, memory: &GuestMemoryMmap) -> u8 {
        let Some(offset) = range(storage, self.sector, total(&self.payload)) else { return IO_ERROR };
        if storage.is_read_only() {
            return IO_ERROR;
        }
        let mut result = storage.write(memory, &self.payload, offset);
        // A driver that cannot flush relies on each write to last (5.2.6.2).
        if features & bits::FLUSH == 0 {
            result = result.and_then(|()| storage.flush());
        }
        if result.is_ok() { OK } else { IO_ERROR }
    }

    /// Discards or zeroes the one range that such a request may have.
    fn forget(&self, storage: &dyn Storage, memory: &GuestMemoryMmap) -> u8 {
        let mut bytes = [0; 16];
        if total(&self.payload) != 16 || gather(memory, &self.payload, &mut bytes).is_none() {
            return IO_ERROR;
        }
        let sector = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let [sectors, flags] = [8, 12].map(|at| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")));
        let known = if self.kind == WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !known != 0 {
            return UNSUPPORTED;
        }
        let length = u64::from(sectors) * SECTOR;
        let Some(offset) = range(storage, sector, length).filter(|_| sectors <= RANGE_MAX) else { return IO_ERROR };
        if storage.is_read_only() {
            return IO_ERROR;
        }
        let result = match self.kind {
            DISCARD => storage.discard(offset, length),
            _ => storage.write_zeroes(offset, length, flags & UNMAP != 0),
        };
        if result.is_ok() { OK } else { IO_ERROR }
    }
}

/// The offset of `length` bytes, whole sectors, from `sector`; `None` if they do not lie in the disk.
fn range(storage: &dyn Storage, sector: u64, length: u64) -> Option<u64> {
    let end = sector.checked_add(length / SECTOR)?;
    (length.is_multiple_of(SECTOR) && end <= storage.sectors()).then(|| sector * SECTOR)
}

#[cfg(test)]
mod tests {
    use super::super::queue::tests::{DESCRIPTORS, describe, memory, offer as make_available, queue};
    use super::*;
    use std::cell::RefCell;
    use std::sync::Mutex;
    use vm_memory::{Bytes, GuestAddress};

    const NEXT: u16 = 1;
    const WRITABLE: u16 = 2;
    const SECTORS: u64 = 64;

    /// A disk in memory that takes notes.
    #[derive(Default)]
    struct Disk {
        bytes: Mutex<Vec<u8>>,
        notes: Mutex<Vec<String>>,
        read_only: bool,
        fails: bool,
    }

    impl Disk {
        fn new() -> Disk {
            let bytes = (0..SECTORS).flat_map(|sector| [sector as u8; SECTOR as usize]).collect();
            Disk { bytes: Mutex::new(bytes), ..Disk::default() }
        }
        fn note(&self, what: String) -> io::Result<()> {
            self.notes.lock().unwrap().push(what);
            if self.fails { Err(io::Error::other("broken")) } else { Ok(()) }
        }
        fn notes(&self) -> Vec<String> {
            std::mem::take(&mut self.notes.lock().unwrap())
        }
    }

    impl Storage for Disk {
        fn sectors(&self) -> u64 {
            SECTORS
        }
        fn is_read_only(&self) -> bool {
            self.read_only
        }
        fn id(&self) -> [u8; ID_SIZE] {
            *b"anyvisor-disk0\0\0\0\0\0\0"
        }
        fn read(&self, memory: &GuestMemoryMmap, pieces: &[Piece], offset: u64) -> io::Result<()> {
            self.note(format!("read {offset}"))?;
            let length = total(pieces) as usize;
            scatter(memory, pieces, &self.bytes.lock().unwrap()[offset as usize..][..length], &|_, _| {});
            Ok(())
        }
        fn write(&self, memory: &GuestMemoryMmap, pieces: &[Piece], offset: u64) -> io::Result<()> {
            self.note(format!("write {offset}"))?;
            let length = total(pieces) as usize;
            gather(memory, pieces, &mut self.bytes.lock().unwrap()[offset as usize..][..length]).unwrap();
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            self.note("flush".into())
        }
        fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
            self.note(format!("discard {offset} {length}"))
        }
        fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
            self.note(format!("zeroes {offset} {length} {unmap}"))
        }
    }

    const HEADER: u64 = 0x8000;
    const DATA: u64 = 0x9000;
    const STATUS: u64 = 0xa000;

    /// Sends a request with `length` bytes of data; returns its status, and how many bytes were said to be written.
    fn send(disk: &Disk, features: u64, kind: u32, sector: u64, length: u32, memory: &GuestMemoryMmap) -> (u8, u32) {
        let mut queue = queue();
        memory.write_obj(0u32, GuestAddress(super::super::queue::tests::DRIVER)).unwrap();
        memory.write_obj([u64::from(kind), sector], GuestAddress(HEADER)).unwrap();
        memory.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
        describe(memory, DESCRIPTORS, 0, HEADER, 16, NEXT, if length == 0 { 2 } else { 1 });
        let to_driver = if matches!(kind, IN | GET_ID) { WRITABLE } else { 0 };
        describe(memory, DESCRIPTORS, 1, DATA, length, NEXT | to_driver, 2);
        describe(memory, DESCRIPTORS, 2, STATUS, 1, WRITABLE, 0);
        make_available(memory, 0);
        let reported = RefCell::new(Vec::new());
        let told: Written = &|gpa, length| reported.borrow_mut().push((gpa, length));
        let chain = queue.pop(memory).unwrap().unwrap();
        let length = serve(&chain, features, disk, memory, told).unwrap();
        assert!(reported.borrow().contains(&(STATUS, 1)), "{reported:x?}");
        (memory.read_obj(GuestAddress(STATUS)).unwrap(), length)
    }

    fn all(disk: &Disk) -> u64 {
        offer(disk).features
    }

    #[test]
    fn reads_and_writes_go_where_they_should() {
        let (memory, disk) = (memory(), Disk::new());
        let features = all(&disk);
        assert_eq!(send(&disk, features, IN, 5, 1024, &memory), (OK, 1025));
        let mut data = [0; 1024];
        memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert_eq!((data[0], data[511], data[512], data[1023]), (5, 5, 6, 6));
        memory.write_slice(&[0x77; 512], GuestAddress(DATA)).unwrap();
        assert_eq!(send(&disk, features, OUT, SECTORS - 1, 512, &memory), (OK, 1));
        assert_eq!(disk.bytes.lock().unwrap()[63 * 512..], [0x77; 512]);
        assert_eq!(send(&disk, features, FLUSH, 0, 0, &memory), (OK, 1));
        assert_eq!(disk.notes(), ["read 2560", "write 32256", "flush"]);
        assert_eq!(send(&disk, features, GET_ID, 0, 20, &memory), (OK, 21));
        assert_eq!(memory.read_obj::<[u8; 20]>(GuestAddress(DATA)).unwrap(), disk.id());
    }

    #[test]
    fn a_write_lasts_if_the_driver_cannot_flush() {
        let (memory, disk) = (memory(), Disk::new());
        assert_eq!(send(&disk, all(&disk) & !bits::FLUSH, OUT, 0, 512, &memory), (OK, 1));
        assert_eq!(disk.notes(), ["write 0", "flush"]);
    }

    #[test]
    fn impossible_requests_have_a_status() {
        let (memory, disk) = (memory(), Disk::new());
        let features = all(&disk);
        for (kind, sector, length, status) in [
            (IN, SECTORS, 512, IO_ERROR),
            (IN, SECTORS - 1, 1024, IO_ERROR),
            (IN, u64::MAX, 512, IO_ERROR),
            (IN, 0, 511, IO_ERROR),
            (OUT, SECTORS - 1, 1024, IO_ERROR),
            (OUT, 0, 100, IO_ERROR),
            (DISCARD, 0, 15, IO_ERROR),
            (2, 0, 512, UNSUPPORTED),
            (0xffff_ffff, 0, 0, UNSUPPORTED),
        ] {
            assert_eq!(send(&disk, features, kind, sector, length, &memory).0, status, "{kind} {sector} {length}");
        }
        assert_eq!(disk.notes(), [""; 0]);
        let read_only = Disk { read_only: true, ..Disk::new() };
        assert_eq!(send(&read_only, all(&read_only), OUT, 0, 512, &memory).0, IO_ERROR);
        assert_eq!(send(&read_only, all(&read_only), DISCARD, 0, 16, &memory).0, UNSUPPORTED);
        let failing = Disk { fails: true, ..Disk::new() };
        for kind in [IN, OUT, FLUSH] {
            assert_eq!(send(&failing, features, kind, 0, 512, &memory).0, IO_ERROR);
        }
    }

    #[test]
    fn ranges_are_forgotten() {
        let (memory, disk) = (memory(), Disk::new());
        for (kind, sector, sectors, flags, status) in [
            (DISCARD, 8u64, 4u32, 0u32, OK),
            (WRITE_ZEROES, 8, 4, 0, OK),
            (WRITE_ZEROES, 0, 64, UNMAP, OK),
            (DISCARD, 0, 1, UNMAP, UNSUPPORTED),
            (WRITE_ZEROES, 0, 1, 2, UNSUPPORTED),
            (DISCARD, 60, 5, 0, IO_ERROR),
            (WRITE_ZEROES, u64::MAX, 1, 0, IO_ERROR),
        ] {
            memory.write_obj(sector, GuestAddress(DATA)).unwrap();
            memory.write_obj([sectors, flags], GuestAddress(DATA + 8)).unwrap();
            assert_eq!(send(&disk, all(&disk), kind, 0, 16, &memory).0, status, "{kind} {sector} {sectors} {flags}");
        }
        assert_eq!(disk.notes(), ["discard 4096 2048", "zeroes 4096 2048 false", "zeroes 0 32768 true"]);
    }

    #[test]
    fn requests_without_header_or_status_break_the_device() {
        let (memory, disk) = (memory(), Disk::new());
        for (header, status) in [(15, WRITABLE), (16, 0)] {
            let mut queue = queue();
            memory.write_obj(0u32, GuestAddress(super::super::queue::tests::DRIVER)).unwrap();
            describe(&memory, DESCRIPTORS, 0, HEADER, header, NEXT, 1);
            describe(&memory, DESCRIPTORS, 1, STATUS, 1, status, 0);
            make_available(&memory, 0);
            let chain = queue.pop(&memory).unwrap().unwrap();
            assert!(serve(&chain, all(&disk), &disk, &memory, &|_, _| {}).is_err());
        }
    }

    #[test]
    fn the_configuration_is_the_specifications() {
        let config = offer(&Disk::new()).config;
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!((u32_at(0), u32_at(4), u32_at(12), u32_at(20)), (64, 0, 254, 512));
        assert_eq!((u32_at(36), u32_at(40), u32_at(44), u32_at(48), u32_at(52)), (RANGE_MAX, 1, 1, RANGE_MAX, 1));
        assert_eq!((config[34], config[56], config.len()), (1, 1, 60));
    }
}
