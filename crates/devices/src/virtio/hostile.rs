//! Drivers that mean harm: queues full of nonsense for any device model, and what must hold whatever is in them.
//!
//! **Idea.** A [`Case`] is RAM with queues in it, all made from one number: some as the device would have them ([`Way`]), some
//! of plausible descriptors in no order, and some whose descriptors loop, point outside of RAM, overlap the rings or have
//! impossible sizes. A model that [`torment`] drives must
//!
//! - return, without a panic, and break ([`Broken`]) at most as the specification lets it;
//! - change no byte of RAM that it does not report ([`Written`]), or that is neither the device's ring nor a buffer that
//!   the driver gave it to write;
//! - give back only chains that were made available, each with no more bytes than there was room for.
//!
//! What a chain is, is read here by code of its own.

use super::Broken;
use super::queue::{Queue, tests::Plain, tests::describe};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM: u64 = 256 << 10;
/// Each queue has so much for its areas, from 0 up; behind them are buffers.
const AREA: u64 = 0x1000;
const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;

/// Numbers that look like chance (xorshift64*).
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What buffers a device expects in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToDevice,
    ToDriver,
    /// Something to read, and behind it something to write.
    Both,
}

/// How far a case is from what a driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Malice {
    /// Buffers of multiples of 64 bytes, of the device's way.
    None,
    /// Buffers of any size and direction.
    Some,
    /// Anything at all.
    Wild,
}

/// RAM with queues, and what the driver allows in it.
pub struct Case {
    pub memory: GuestMemoryMmap,
    pub queues: Vec<Queue>,
    /// By queue, the room of each chain that was made available and makes sense, by its head.
    rooms: Vec<BTreeMap<u16, u64>>,
    writable: Vec<Range<u64>>,
    /// A buffer lies over what says where buffers are, so that they change under the device's hands.
    pub overlaps: bool,
}

impl Case {
    /// A case for a device with such queues. `fill` writes what the driver has to say into a buffer.
    pub fn new(chance: &mut Chance, ways: &[Way], fill: &dyn Fn(&mut Chance, &mut [u8])) -> Case {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let end = AREA * ways.len() as u64;
        let malice = [Malice::None, Malice::None, Malice::Some, Malice::Wild][chance.below(4) as usize];
        let mut case = Case { memory, queues: vec![], rooms: vec![], writable: vec![], overlaps: false };
        let mut tables = vec![];
        for (n, way) in (0..).zip(ways) {
            let base = AREA * n;
            let maker = Maker { malice, way: *way, buffers: end, fill };
            let event_index = chance.one_in(2);
            let queue = Queue::new(SIZE, base, base + 0x400, base + 0x800, event_index);
            for descriptor in 0..SIZE {
                case.describe(chance, &maker, base, (descriptor, SIZE), &mut tables);
            }
            let available = if malice == Malice::Wild && chance.one_in(5) {
                chance.next() as u16
            } else {
                chance.below(SIZE.into()) as u16
            };
            let slots: Vec<u16> = (0..SIZE).map(|_| maker.head(chance)).collect();
            case.memory.write_obj([0, available], GuestAddress(base + 0x400)).unwrap();
            slots.iter().zip(0..).for_each(|(head, n)| {
                case.memory.write_obj(*head, GuestAddress(base + 0x404 + 2 * n)).unwrap();
            });
            case.queues.push(queue);
            case.writable.push(base + 0x800..base + 0x806 + 8 * u64::from(SIZE));
        }
        // Chains are read only now: tables and buffers may have been written over while they were made.
        for n in 0..ways.len() as u64 {
            let base = AREA * n;
            let mut rooms = BTreeMap::new();
            let available: u16 = case.memory.read_obj(GuestAddress(base + 0x402)).unwrap();
            for slot in 0..available.min(SIZE) {
                let head: u16 = case.memory.read_obj(GuestAddress(base + 0x404 + 2 * u64::from(slot))).unwrap();
                if let Some(room) = case.room(base, head) {
                    rooms.insert(head, room);
                }
            }
            case.rooms.push(rooms);
        }
        for at in tables.into_iter().map(|(table, n)| table + 16 * u64::from(n)) {
            let [gpa, rest]: [u64; 2] = case.memory.read_obj(GuestAddress(at)).unwrap();
            let length = rest & 0xffff_ffff;
            if (rest >> 32) as u16 & WRITABLE != 0 && gpa < RAM && length <= RAM - gpa {
                case.overlaps |= gpa < end || case.in_indirect_table(gpa, length);
                case.writable.push(gpa..gpa + length);
            }
        }
        case
    }

    /// Makes descriptor `n` of the `size` of the table at `table`, and an indirect table where it wants one.
    fn describe(
        &mut self,
        chance: &mut Chance,
        maker: &Maker,
        table: u64,
        (n, size): (u16, u16),
        tables: &mut Vec<(u64, u16)>,
    ) {
        tables.push((table, n));
        let Maker { malice, buffers, .. } = *maker;
        let mut gpa = buffers + chance.below(RAM - buffers - INDIRECT_ROOM - 0x2000);
        let mut length = match chance.below(3) {
            0 => 1 + chance.below(64),
            1 => 1 + chance.below(0x100),
            _ => 1 + chance.below(0x2000),
        };
        let mut flags = [0, NEXT, WRITABLE, NEXT | WRITABLE][chance.below(4) as usize];
        let mut next = (n + 1) % size;
        if malice == Malice::None {
            length = length.next_multiple_of(64);
            flags = maker.flags(chance, n, size);
        }
        if table < buffers && chance.one_in(6) {
            let entries = 2 + 2 * chance.below(2) as u16;
            gpa = RAM - INDIRECT_ROOM + 64 * (chance.below(INDIRECT_ROOM / 64 - 1));
            (length, flags) = (16 * u64::from(entries), INDIRECT);
            (0..entries).for_each(|n| self.describe(chance, maker, gpa, (n, entries), tables));
        }
        if malice == Malice::Wild && chance.one_in(6) {
            match chance.below(8) {
                0 => gpa = chance.next(),
                1 => gpa = RAM - chance.below(32),
                2 => gpa = chance.below(buffers),
                3 => length = chance.next() & 0xffff_ffff,
                4 => length = 0,
                5 => flags = chance.next() as u16,
                6 => next = chance.next() as u16,
                _ => next = chance.below(size.into()) as u16,
            }
        }
        describe(&self.memory, table, n, gpa, length as u32, flags, next);
        if flags & (WRITABLE | INDIRECT) == 0 && gpa >= buffers && gpa < RAM - INDIRECT_ROOM && length <= 0x2000 {
            let mut bytes = vec![0; length as usize];
            (maker.fill)(chance, &mut bytes);
            self.memory.write_slice(&bytes, GuestAddress(gpa)).unwrap();
        }
    }

    fn in_indirect_table(&self, gpa: u64, length: u64) -> bool {
        gpa + length > RAM - INDIRECT_ROOM
    }

    /// Bytes that the device may write to the chain at `head`; `None` if it is none.
    fn room(&self, table: u64, head: u16) -> Option<u64> {
        let (mut table, mut size, mut at, mut room) = (table, SIZE, head, 0);
        for _ in 0..3 * SIZE {
            if at >= size {
                return None;
            }
            let [gpa, rest]: [u64; 2] = self.memory.read_obj(GuestAddress(table + 16 * u64::from(at))).ok()?;
            let (length, flags, next) = (rest & 0xffff_ffff, (rest >> 32) as u16, (rest >> 48) as u16);
            if gpa > RAM || length > RAM - gpa {
                return None;
            }
            if flags & INDIRECT != 0 {
                (table, size, at) = (gpa, (length / 16) as u16, 0);
                continue;
            }
            room += if flags & WRITABLE != 0 { length } else { 0 };
            if flags & NEXT == 0 {
                return Some(room);
            }
            at = next;
        }
        None
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

/// How the descriptors of a queue are made.
struct Maker<'a> {
    malice: Malice,
    way: Way,
    /// Where buffers begin.
    buffers: u64,
    fill: &'a dyn Fn(&mut Chance, &mut [u8]),
}

impl Maker<'_> {
    fn head(&self, chance: &mut Chance) -> u16 {
        match self.malice {
            Malice::None if self.way == Way::Both => 2 * chance.below(u64::from(SIZE) / 2) as u16,
            Malice::Wild if chance.one_in(10) => chance.next() as u16,
            _ => chance.below(SIZE.into()) as u16,
        }
    }

    /// Flags of descriptor `n` of a well-meant table.
    fn flags(&self, chance: &mut Chance, n: u16, size: u16) -> u16 {
        let next = if n + 1 < size && chance.one_in(2) { NEXT } else { 0 };
        match self.way {
            Way::ToDevice => next,
            Way::ToDriver => next | WRITABLE,
            Way::Both if n.is_multiple_of(2) => NEXT,
            Way::Both => WRITABLE,
        }
    }
}

/// Where indirect tables are, at the end of RAM.
const INDIRECT_ROOM: u64 = 0x1000;

/// How often a model went on, and how often it broke: a test is one only if it did both.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub fine: u32,
    pub broken: u32,
    /// Chains that were given back.
    pub used: u32,
}

/// Has `serve` work on `cases` cases of such queues, one after another, as a device would on a driver's notifications.
/// What the driver says is made by `fill`.
///
/// # Panics
/// The model did what no device may.
pub fn torment(
    cases: u64,
    ways: &[Way],
    fill: &dyn Fn(&mut Chance, &mut [u8]),
    mut serve: impl FnMut(&mut Chance, &mut [Plain<'_>]) -> Result<(), Broken>,
) -> Outcome {
    let mut outcome = Outcome::default();
    for seed in 0..cases {
        let mut chance = Chance::new(seed);
        let mut case = Case::new(&mut chance, ways, fill);
        let before = case.bytes();
        let reports = RefCell::new(Vec::new());
        let report = |gpa: u64, length: u64| reports.borrow_mut().push(gpa..gpa + length);
        let Case { memory, queues, .. } = &mut case;
        let mut queues: Vec<_> = queues.iter_mut().map(|queue| Plain::new(queue, memory, &report)).collect();
        let result = serve(&mut chance, &mut queues);
        let after = case.bytes();
        let covered = |ranges: &[Range<u64>]| {
            let mut map = vec![false; RAM as usize];
            ranges.iter().for_each(|range| map[range.start as usize..range.end as usize].fill(true));
            map
        };
        let (reported, allowed) = (covered(&reports.borrow()), covered(&case.writable));
        for at in (0..RAM as usize).filter(|at| before[*at] != after[*at]) {
            assert!(reported[at], "case {seed}: {at:#x} was written and not reported");
            assert!(allowed[at] || case.overlaps, "case {seed}: {at:#x} was not the device's to write");
        }
        match result {
            Ok(()) => outcome.fine += 1,
            Err(_) => outcome.broken += 1,
        }
        if !case.overlaps {
            (0..ways.len()).for_each(|n| outcome.used += case.check_used(seed, n));
        }
    }
    outcome
}

impl Case {
    /// Looks at what was given back on queue `n`, and counts it.
    fn check_used(&self, seed: u64, n: usize) -> u32 {
        let base = AREA * n as u64 + 0x800;
        let count: u16 = self.memory.read_obj(GuestAddress(base + 2)).unwrap();
        for slot in 0..u64::from(count.min(SIZE)) {
            let [head, length]: [u32; 2] = self.memory.read_obj(GuestAddress(base + 4 + 8 * slot)).unwrap();
            let room = self.rooms[n].get(&(head as u16)).filter(|_| head <= 0xffff);
            let room = *room.unwrap_or_else(|| panic!("case {seed}: queue {n} gave back {head}, which was not there"));
            assert!(u64::from(length) <= room, "case {seed}: queue {n}: {length} bytes in chain {head} of {room}");
        }
        count.into()
    }
}

/// What [`torment`] finds, it finds.
mod tests {
    use super::super::queue::Chains;
    use super::*;

    fn serve_all(queue: &mut dyn Chains, length: u32) -> Result<(), Broken> {
        while let Some(chain) = queue.pop()? {
            queue.push(chain.head, length)?;
        }
        Ok(())
    }

    #[test]
    fn a_harmless_device_passes() {
        let outcome = torment(200, &[Way::Both], &|_, _| {}, |_, queues| serve_all(&mut queues[0], 0));
        assert!(outcome.fine > 100 && outcome.broken > 20, "{outcome:?}");
    }

    #[test]
    #[should_panic(expected = "not reported")]
    fn silent_writes_are_found() {
        torment(200, &[Way::Both], &|_, _| {}, |_, queues| {
            queues[0].written = &|_, _| {};
            serve_all(&mut queues[0], 0)
        });
    }

    #[test]
    #[should_panic(expected = "not the device's to write")]
    fn stray_writes_are_found() {
        torment(200, &[Way::ToDevice], &|_, _| {}, |_, queues| {
            queues[0].memory.write_slice(&[7; 100], GuestAddress(0x1_0000)).unwrap();
            (queues[0].written)(0x1_0000, 100);
            Ok(())
        });
    }

    #[test]
    #[should_panic(expected = "bytes in chain")]
    fn lengths_beyond_the_buffers_are_found() {
        torment(200, &[Way::ToDevice], &|_, _| {}, |_, queues| serve_all(&mut queues[0], 1));
    }

    #[test]
    #[should_panic(expected = "was not there")]
    fn made_up_chains_are_found() {
        torment(200, &[Way::ToDevice], &|_, _| {}, |chance, queues| queues[0].push(chance.next() as u16, 0));
    }
}
