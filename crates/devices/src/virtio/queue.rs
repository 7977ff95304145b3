//! The device's side of a split virtqueue (virtio 1.2, 2.7).
//!
//! Own code and not the crate `virtio-queue`, because that takes a malformed chain for a short one, and keeps to itself
//! what it writes; here the one must stop the device and the other must be reported.
//!
//! Invariants: the three areas lie in RAM ([`Queue::check_areas`]), whose size never changes; what [`Queue::pop`]
//! returns lies in RAM too.

use super::{Broken, Written};
use crate::state::{BadState, require};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{Ordering, fence};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Most descriptors of a queue, and most buffers of an indirect table: what Linux and QEMU live within.
pub const SIZE_MAX: u16 = 1024;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR: u64 = 16;
/// Flags of the driver's area: it wants no interrupts; of the device's: it wants no notifications.
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// One buffer in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub gpa: u64,
    /// In bytes, at least 1.
    pub length: u32,
}

/// What the driver has made available: buffers to read, then buffers to write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Its first descriptor, which names it.
    pub head: u16,
    pub readable: Vec<Piece>,
    pub writable: Vec<Piece>,
}

/// A queue that the driver has enabled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// Descriptors, a power of two.
    pub size: u16,
    /// Guest-physical addresses of the descriptor, driver (available) and device (used) areas.
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    /// [`super::feature::EVENT_INDEX`] was negotiated.
    pub event_index: bool,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the driver was last interrupted, or needed not to be.
    signalled: u16,
}

impl Queue {
    /// A queue with nothing in it.
    pub fn new(size: u16, descriptors: u64, driver: u64, device: u64, event_index: bool) -> Queue {
        Queue { size, descriptors, driver, device, event_index, next_available: 0, next_used: 0, signalled: 0 }
    }

    /// Whether all its areas are aligned (2.7) and in RAM.
    ///
    /// # Errors
    /// One is not.
    pub fn check_areas(&self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        let size = u64::from(self.size);
        let areas =
            [(self.descriptors, DESCRIPTOR * size, 16), (self.driver, 6 + 2 * size, 2), (self.device, 6 + 8 * size, 4)];
        for (gpa, length, alignment) in areas {
            if !gpa.is_multiple_of(alignment) {
                return Err(Broken("an area of a queue is not aligned"));
            }
            if !is_ram(memory, gpa, length) {
                return Err(Broken("an area of a queue is not in RAM"));
            }
        }
        Ok(())
    }

    /// Refuses what cannot be, apart from addresses.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), BadState> {
        require("virtqueue", &[(self.size.is_power_of_two() && self.size <= SIZE_MAX, "an impossible size")])
    }

    /// Takes the next chain, if there is one.
    ///
    /// # Errors
    /// The queue or the chain makes no sense.
    pub fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Chain>, Broken> {
        let available: u16 = self.load(memory, self.driver + 2)?;
        let waiting = available.wrapping_sub(self.next_available);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.size {
            return Err(Broken("the driver made more available than a queue holds"));
        }
        // The entry was written before the index (2.7.13.3).
        fence(Ordering::Acquire);
        let slot = u64::from(self.next_available % self.size);
        let head = self.load(memory, self.driver + 4 + 2 * slot)?;
        let chain = self.chain(memory, head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    fn chain(&self, memory: &GuestMemoryMmap, head: u16) -> Result<Chain, Broken> {
        let mut chain = Chain { head, ..Chain::default() };
        let (mut table, mut count, mut index, mut indirect) = (self.descriptors, self.size, head, false);
        let mut left = count;
        let mut total = 0u64;
        loop {
            if index >= count {
                return Err(Broken("a descriptor names one beyond the table"));
            }
            let at = table + DESCRIPTOR * u64::from(index);
            let [gpa, rest] =
                memory.read_obj::<[u64; 2]>(GuestAddress(at)).map_err(|_| Broken("a table not in RAM"))?;
            let (length, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            if flags & INDIRECT != 0 {
                // It may end a chain of plain ones (2.7.5.3.2).
                if indirect || flags & NEXT != 0 {
                    return Err(Broken("an indirect descriptor where there can be none"));
                }
                let entries = u64::from(length) / DESCRIPTOR;
                if !u64::from(length).is_multiple_of(DESCRIPTOR) || !(1..=u64::from(SIZE_MAX)).contains(&entries) {
                    return Err(Broken("an indirect table of an impossible size"));
                }
                if !is_ram(memory, gpa, length.into()) {
                    return Err(Broken("an indirect table that is not in RAM"));
                }
                (table, count, index, indirect) = (gpa, entries as u16, 0, true);
                left = count;
                continue;
            }
            if left == 0 {
                return Err(Broken("a chain of descriptors without end"));
            }
            left -= 1;
            total += u64::from(length);
            if length == 0 || total > u64::from(u32::MAX) || !is_ram(memory, gpa, length.into()) {
                return Err(Broken("a buffer that is empty, too large or not in RAM"));
            }
            let piece = Piece { gpa, length };
            if flags & WRITABLE != 0 {
                chain.writable.push(piece);
            } else if chain.writable.is_empty() {
                chain.readable.push(piece);
            } else {
                return Err(Broken("a buffer to read behind one to write"));
            }
            if flags & NEXT == 0 {
                return Ok(chain);
            }
            index = next;
        }
    }

    /// Whether nothing is available.
    ///
    /// # Errors
    /// The queue is not in RAM.
    pub fn is_empty(&self, memory: &GuestMemoryMmap) -> Result<bool, Broken> {
        Ok(self.load(memory, self.driver + 2)? == self.next_available)
    }

    /// Makes the last `chains` that [`Queue::pop`] returned, none of which has been pushed, available again.
    pub fn put_back(&mut self, chains: u16) {
        self.next_available = self.next_available.wrapping_sub(chains);
    }

    /// Gives chain `head` back, into whose buffers `length` bytes have been written and reported.
    ///
    /// # Errors
    /// The queue is not in RAM.
    pub fn push(&mut self, memory: &GuestMemoryMmap, head: u16, length: u32, written: Written) -> Result<(), Broken> {
        let entry = self.device + 4 + 8 * u64::from(self.next_used % self.size);
        memory.write_obj([u32::from(head), length], GuestAddress(entry)).map_err(|_| GONE)?;
        written(entry, 8);
        self.next_used = self.next_used.wrapping_add(1);
        // The buffers and the entry are written before the index (2.7.8.2).
        memory.store(self.next_used, GuestAddress(self.device + 2), Ordering::Release).map_err(|_| GONE)?;
        written(self.device + 2, 2);
        Ok(())
    }

    /// Whether the driver is to be interrupted because of what was pushed since this was last asked (2.7.7).
    ///
    /// # Errors
    /// The queue is not in RAM.
    pub fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Broken> {
        // The index is written before what the driver wants is read.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.signalled, self.next_used);
        if self.event_index {
            let event: u16 = self.load(memory, self.driver + 4 + 2 * u64::from(self.size))?;
            let passed = self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(before);
            return Ok(passed);
        }
        let flags: u16 = self.load(memory, self.driver)?;
        Ok(before != self.next_used && flags & NO_INTERRUPT == 0)
    }

    /// Has the driver notify (or not) of what it makes available from now on (2.7.10). Returns whether something is
    /// available that it may not have notified of.
    ///
    /// # Errors
    /// The queue is not in RAM.
    pub fn want_notifications(
        &mut self,
        memory: &GuestMemoryMmap,
        wanted: bool,
        written: Written,
    ) -> Result<bool, Broken> {
        let (at, value) = match (self.event_index, wanted) {
            (true, true) => (self.device + 4 + 8 * u64::from(self.size), self.next_available),
            // An index that has been passed wants none by itself.
            (true, false) => return Ok(false),
            (false, true) => (self.device, 0),
            (false, false) => (self.device, NO_NOTIFY),
        };
        memory.store(value, GuestAddress(at), Ordering::Relaxed).map_err(|_| GONE)?;
        written(at, 2);
        fence(Ordering::SeqCst);
        let available: u16 = self.load(memory, self.driver + 2)?;
        Ok(available != self.next_available)
    }

    fn load(&self, memory: &GuestMemoryMmap, gpa: u64) -> Result<u16, Broken> {
        memory.load(GuestAddress(gpa), Ordering::Relaxed).map_err(|_| GONE)
    }
}

/// A queue that a device works on, with the memory that it is in.
pub trait Chains {
    /// Takes the next chain, if there is one.
    ///
    /// # Errors
    /// The queue or the chain makes no sense.
    fn pop(&mut self) -> Result<Option<Chain>, Broken>;
    /// Gives chain `head` back, into whose buffers `length` bytes have been written and reported.
    ///
    /// # Errors
    /// The queue is not in RAM.
    fn push(&mut self, head: u16, length: u32) -> Result<(), Broken>;
    /// Makes the chain that was popped last, and has not been pushed, available again.
    fn put_back(&mut self);
    fn memory(&self) -> &GuestMemoryMmap;
    /// To be told what was written to memory.
    fn written(&self) -> Written<'_>;
}

const GONE: Broken = Broken("a queue is not in RAM");

/// Whether `length` bytes at `gpa` are RAM of one piece.
fn is_ram(memory: &GuestMemoryMmap, gpa: u64, length: u64) -> bool {
    memory.get_slice(GuestAddress(gpa), length as usize).is_ok()
}

/// Copies as many bytes as `data` has from `pieces`; `None` if they have fewer.
pub fn gather(memory: &GuestMemoryMmap, pieces: &[Piece], data: &mut [u8]) -> Option<()> {
    let mut done = 0;
    for piece in pieces {
        let part = (data.len() - done).min(piece.length as usize);
        memory.read_slice(&mut data[done..done + part], GuestAddress(piece.gpa)).ok()?;
        done += part;
    }
    (done == data.len()).then_some(())
}

/// Copies `data` to `pieces`, as far as they go, and reports it. Returns how many bytes that were.
pub fn scatter(memory: &GuestMemoryMmap, pieces: &[Piece], data: &[u8], written: Written) -> u32 {
    let mut done = 0;
    for piece in pieces {
        let part = (data.len() - done).min(piece.length as usize);
        if part == 0 || memory.write_slice(&data[done..done + part], GuestAddress(piece.gpa)).is_err() {
            break;
        }
        written(piece.gpa, part as u64);
        done += part;
    }
    done as u32
}

/// Cuts `pieces` into the first `length` bytes and the rest.
pub fn split(pieces: &[Piece], length: u64) -> (Vec<Piece>, Vec<Piece>) {
    let (mut front, mut back) = (Vec::new(), Vec::new());
    let mut left = length;
    for &Piece { gpa, length } in pieces {
        let part = left.min(length.into()) as u32;
        if part > 0 {
            front.push(Piece { gpa, length: part });
        }
        if part < length {
            back.push(Piece { gpa: gpa + u64::from(part), length: length - part });
        }
        left -= u64::from(part);
    }
    (front, back)
}

/// Bytes in all of `pieces`.
pub fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.length)).sum()
}

#[cfg(test)]
pub(in crate::virtio) mod tests {
    use super::*;
    use std::cell::RefCell;

    pub const RAM: u64 = 1 << 20;
    pub const DESCRIPTORS: u64 = 0x1000;
    pub const DRIVER: u64 = 0x2000;
    pub const DEVICE: u64 = 0x3000;
    pub const SIZE: u16 = 8;

    pub fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
    }

    pub fn queue() -> Queue {
        Queue::new(SIZE, DESCRIPTORS, DRIVER, DEVICE, false)
    }

    /// A queue by itself, which counts what is given back.
    pub struct Plain<'a> {
        pub queue: &'a mut Queue,
        pub memory: &'a GuestMemoryMmap,
        pub written: Written<'a>,
        pub pushed: u32,
    }

    impl<'a> Plain<'a> {
        pub fn new(queue: &'a mut Queue, memory: &'a GuestMemoryMmap, written: Written<'a>) -> Plain<'a> {
            Plain { queue, memory, written, pushed: 0 }
        }
    }

    impl Chains for Plain<'_> {
        fn pop(&mut self) -> Result<Option<Chain>, Broken> {
            self.queue.pop(self.memory)
        }
        fn push(&mut self, head: u16, length: u32) -> Result<(), Broken> {
            self.pushed += 1;
            self.queue.push(self.memory, head, length, self.written)
        }
        fn put_back(&mut self) {
            self.queue.put_back(1);
        }
        fn memory(&self) -> &GuestMemoryMmap {
            self.memory
        }
        fn written(&self) -> Written<'_> {
            self.written
        }
    }

    /// Writes descriptor `n` of the table at `table`.
    pub fn describe(memory: &GuestMemoryMmap, table: u64, n: u16, gpa: u64, length: u32, flags: u16, next: u16) {
        let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
        memory.write_obj([gpa, rest], GuestAddress(table + 16 * u64::from(n))).unwrap();
    }

    /// Makes chain `head` available.
    pub fn offer(memory: &GuestMemoryMmap, head: u16) {
        let index: u16 = memory.read_obj(GuestAddress(DRIVER + 2)).unwrap();
        memory.write_obj(head, GuestAddress(DRIVER + 4 + 2 * u64::from(index % SIZE))).unwrap();
        memory.write_obj(index.wrapping_add(1), GuestAddress(DRIVER + 2)).unwrap();
    }

    #[test]
    fn chains_come_and_go() {
        let (memory, mut queue) = (memory(), queue());
        assert_eq!(queue.check_areas(&memory), Ok(()));
        assert_eq!(queue.pop(&memory), Ok(None));
        describe(&memory, DESCRIPTORS, 3, 0x8000, 16, NEXT, 5);
        describe(&memory, DESCRIPTORS, 5, 0x9000, 512, NEXT | WRITABLE, 0);
        describe(&memory, DESCRIPTORS, 0, 0xa000, 1, WRITABLE, 7);
        offer(&memory, 3);
        let chain = queue.pop(&memory).unwrap().unwrap();
        assert_eq!(chain.head, 3);
        assert_eq!(chain.readable, [Piece { gpa: 0x8000, length: 16 }]);
        assert_eq!(chain.writable, [Piece { gpa: 0x9000, length: 512 }, Piece { gpa: 0xa000, length: 1 }]);
        assert_eq!(queue.pop(&memory), Ok(None));
        queue.put_back(1);
        assert_eq!(queue.pop(&memory), Ok(Some(chain)));
        let reported = RefCell::new(Vec::new());
        queue.push(&memory, 3, 513, &|gpa, length| reported.borrow_mut().push((gpa, length))).unwrap();
        assert_eq!(*reported.borrow(), [(DEVICE + 4, 8), (DEVICE + 2, 2)]);
        assert_eq!(memory.read_obj::<[u32; 2]>(GuestAddress(DEVICE + 4)).unwrap(), [3, 513]);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(DEVICE + 2)).unwrap(), 1);
    }

    #[test]
    fn indirect_tables_are_followed() {
        let (memory, mut queue) = (memory(), queue());
        describe(&memory, DESCRIPTORS, 1, 0x6000, 32, INDIRECT, 0);
        describe(&memory, 0x6000, 0, 0x8000, 16, NEXT, 1);
        describe(&memory, 0x6000, 1, 0x9000, 1, WRITABLE, 0);
        offer(&memory, 1);
        let chain = queue.pop(&memory).unwrap().unwrap();
        assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (1, 1, 1));
    }

    /// What is wrong, and the descriptors of the table (gpa, length, flags, next), of which the first is offered.
    type Wrong = (&'static str, &'static [(u64, u32, u16, u16)]);

    #[test]
    fn malformed_chains_break_the_device() {
        let cases: [Wrong; 12] = [
            ("a loop", &[(0x8000, 1, NEXT, 1), (0x8000, 1, NEXT, 0)]),
            ("a loop of one", &[(0x8000, 1, NEXT, 0)]),
            ("beyond the table", &[(0x8000, 1, NEXT, SIZE)]),
            ("not RAM", &[(RAM, 1, 0, 0)]),
            ("over the end of RAM", &[(RAM - 1, 2, 0, 0)]),
            ("an address that wraps", &[(u64::MAX, 2, 0, 0)]),
            ("empty", &[(0x8000, 0, 0, 0)]),
            ("read behind write", &[(0x8000, 1, NEXT | WRITABLE, 1), (0x8000, 1, 0, 0)]),
            ("an indirect table of half a descriptor", &[(0x8000, 24, INDIRECT, 0)]),
            ("an empty indirect table", &[(0x8000, 0, INDIRECT, 0)]),
            ("indirect and more", &[(0x6000, 16, INDIRECT | NEXT, 1), (0x8000, 1, 0, 0)]),
            ("an indirect table that is not RAM", &[(RAM - 8, 16, INDIRECT, 0)]),
        ];
        for (what, descriptors) in cases {
            let (memory, mut queue) = (memory(), queue());
            for (n, &(gpa, length, flags, next)) in (0..).zip(descriptors) {
                describe(&memory, DESCRIPTORS, n, gpa, length, flags, next);
            }
            offer(&memory, 0);
            assert!(queue.pop(&memory).is_err(), "{what}");
        }
        let (memory, mut queue) = (memory(), queue());
        describe(&memory, DESCRIPTORS, 0, 0x6000, 16, INDIRECT, 0);
        describe(&memory, 0x6000, 0, 0x6000, 16, INDIRECT, 0);
        offer(&memory, 0);
        assert!(queue.pop(&memory).is_err(), "indirect in indirect");
        let (memory, mut queue) = (self::memory(), self::queue());
        offer(&memory, SIZE);
        assert!(queue.pop(&memory).is_err(), "a head beyond the table");
        let (memory, mut queue) = (self::memory(), self::queue());
        memory.write_obj(SIZE + 1, GuestAddress(DRIVER + 2)).unwrap();
        assert!(queue.pop(&memory).is_err(), "more than a queue holds");
    }

    #[test]
    fn areas_are_checked() {
        let memory = memory();
        for (descriptors, driver, device) in [
            (DESCRIPTORS + 8, DRIVER, DEVICE),
            (DESCRIPTORS, DRIVER + 1, DEVICE),
            (DESCRIPTORS, DRIVER, DEVICE + 2),
            (RAM - 16, DRIVER, DEVICE),
            (DESCRIPTORS, RAM, DEVICE),
            (DESCRIPTORS, DRIVER, u64::MAX - 3),
        ] {
            assert!(Queue::new(SIZE, descriptors, driver, device, false).check_areas(&memory).is_err());
        }
    }

    #[test]
    fn interrupts_and_notifications_as_the_driver_wants() {
        let (memory, mut queue) = (memory(), queue());
        let quiet: Written = &|_, _| {};
        assert_eq!(queue.wants_interrupt(&memory), Ok(false), "nothing was pushed");
        queue.push(&memory, 0, 0, quiet).unwrap();
        assert_eq!(queue.wants_interrupt(&memory), Ok(true));
        memory.write_obj(NO_INTERRUPT, GuestAddress(DRIVER)).unwrap();
        queue.push(&memory, 0, 0, quiet).unwrap();
        assert_eq!(queue.wants_interrupt(&memory), Ok(false));
        queue.want_notifications(&memory, false, quiet).unwrap();
        assert_eq!(memory.read_obj::<u16>(GuestAddress(DEVICE)).unwrap(), NO_NOTIFY);
        assert_eq!(queue.want_notifications(&memory, true, quiet), Ok(false));
        assert_eq!(memory.read_obj::<u16>(GuestAddress(DEVICE)).unwrap(), 0);
        offer(&memory, 0);
        assert_eq!(queue.want_notifications(&memory, true, quiet), Ok(true), "it came in between");

        let mut queue = Queue { event_index: true, ..self::queue() };
        let event = GuestAddress(DRIVER + 4 + 2 * u64::from(SIZE));
        // Wants one after the second.
        memory.write_obj(1u16, event).unwrap();
        queue.push(&memory, 0, 0, quiet).unwrap();
        assert_eq!(queue.wants_interrupt(&memory), Ok(false));
        queue.push(&memory, 0, 0, quiet).unwrap();
        assert_eq!(queue.wants_interrupt(&memory), Ok(true));
        queue.push(&memory, 0, 0, quiet).unwrap();
        assert_eq!(queue.wants_interrupt(&memory), Ok(false));
        queue.want_notifications(&memory, true, quiet).unwrap();
        assert_eq!(memory.read_obj::<u16>(GuestAddress(DEVICE + 4 + 8 * u64::from(SIZE))).unwrap(), 0);
    }

    #[test]
    fn pieces_are_cut_and_copied() {
        let memory = memory();
        let pieces = [Piece { gpa: 0x8000, length: 3 }, Piece { gpa: 0x9000, length: 5 }];
        let (front, back) = split(&pieces, 4);
        assert_eq!(front, [pieces[0], Piece { gpa: 0x9000, length: 1 }]);
        assert_eq!(back, [Piece { gpa: 0x9001, length: 4 }]);
        assert_eq!((total(&pieces), total(&front)), (8, 4));
        assert_eq!(scatter(&memory, &pieces, b"abcdefghij", &|_, _| {}), 8);
        let mut data = [0; 8];
        gather(&memory, &pieces, &mut data).unwrap();
        assert_eq!(&data, b"abcdefgh");
        assert_eq!(gather(&memory, &pieces, &mut [0; 9]), None);
    }
}
