//! The other side, for tests of models: a driver with queues in a memory of its own, and one that makes nonsense of them.

use super::{Driven, Model, Queues};
use anyvisor_devices::virtio::queue::Queue;
use anyvisor_devices::virtio::{Broken, feature};
use std::cell::RefCell;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of the driver's memory.
pub const RAM: u64 = 1 << 20;
/// Descriptors of each queue: so many buffers can be under way.
const SIZE: u16 = 64;
/// Where a queue's descriptors, driver area and device area are in its 8 KiB, and where buffers begin.
const DRIVER: u64 = 0x800;
const DEVICE: u64 = 0x1000;
const QUEUE_BYTES: u64 = 0x2000;
const BUFFERS: u64 = 0x4_0000;
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;
/// Calls of a model after which it ought to have come to an end.
const PATIENCE: usize = 10_000;

/// A driver.
pub struct Driver {
    pub memory: GuestMemoryMmap,
    driven: Vec<Option<Driven>>,
    features: u64,
    /// For each queue: descriptors taken, entries of the used ring seen, and the writable buffers of each chain.
    sides: Vec<Side>,
    next_buffer: u64,
    /// Ranges that the model has reported.
    pub written: RefCell<Vec<(u64, u64)>>,
    /// Queues that it interrupted for.
    pub interrupts: RefCell<Vec<u16>>,
    /// The model has asked for its configuration to be shown.
    pub reconfigured: bool,
}

#[derive(Default)]
struct Side {
    next: u16,
    seen: u16,
    writable: std::collections::BTreeMap<u16, Vec<(u64, u32)>>,
}

/// A chain that came back: its number, the bytes that are said to be written, and how many those are.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub bytes: Vec<u8>,
    pub length: u32,
}

impl Driver {
    /// A driver that has started `model`, with all its features but the index of events.
    pub fn new(model: &mut dyn Model) -> Driver {
        let offer = model.offer();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let features = (offer.features | feature::VERSION_1) & !feature::EVENT_INDEX;
        let count = offer.queues.len() as u64;
        assert!(count * QUEUE_BYTES <= BUFFERS, "too many queues for this driver");
        let queue = |n: u64| {
            let base = n * QUEUE_BYTES;
            Queue::new(SIZE.min(offer.queues[n as usize]), base, base + DRIVER, base + DEVICE, false)
        };
        let driven = (0..count).map(|n| Some(Driven::new(queue(n)))).collect();
        let sides = (0..count).map(|_| Side::default()).collect();
        model.start(features);
        Driver {
            memory,
            driven,
            features,
            sides,
            next_buffer: BUFFERS,
            written: RefCell::default(),
            interrupts: RefCell::default(),
            reconfigured: false,
        }
    }

    /// Makes a chain available in `queue`: buffers with these bytes to read, then buffers of these lengths to write.
    /// Returns its number. Chains' numbers begin anew after [`SIZE`] descriptors.
    pub fn send(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let base = queue as u64 * QUEUE_BYTES;
        let count = (readable.len() + writable.len()) as u16;
        let head = if self.sides[queue].next + count > SIZE { 0 } else { self.sides[queue].next };
        self.sides[queue].next = head + count;
        let mut places = Vec::new();
        for bytes in readable {
            let gpa = self.place(bytes.len() as u32);
            self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
            places.push((gpa, bytes.len() as u32, 0));
        }
        for &length in writable {
            places.push((self.place(length), length, WRITABLE));
        }
        for (n, &(gpa, length, flags)) in (0..).zip(&places) {
            let more = if n + 1 < count { NEXT } else { 0 };
            describe(&self.memory, base, head + n, (gpa, length, flags | more, head + n + 1));
        }
        let buffers = places.iter().filter(|place| place.2 != 0).map(|&(gpa, length, _)| (gpa, length)).collect();
        self.sides[queue].writable.insert(head, buffers);
        let size = self.size(queue);
        let index: u16 = self.memory.read_obj(GuestAddress(base + DRIVER + 2)).unwrap();
        let slot = base + DRIVER + 4 + 2 * u64::from(index % size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory.write_obj(index.wrapping_add(1), GuestAddress(base + DRIVER + 2)).unwrap();
        head
    }

    fn size(&self, queue: usize) -> u16 {
        self.driven[queue].as_ref().unwrap().queue.size
    }

    /// Room for a buffer. Buffers overwrite the oldest ones when memory ends.
    fn place(&mut self, length: u32) -> u64 {
        let length = u64::from(length).next_multiple_of(16);
        assert!(length <= RAM - BUFFERS, "a buffer that this driver has no room for");
        if self.next_buffer + length > RAM {
            self.next_buffer = BUFFERS;
        }
        self.next_buffer += length;
        self.next_buffer - length
    }

    /// Has the model work once. Says whether it is to be called again at once.
    ///
    /// # Errors
    /// The model's.
    pub fn work(&mut self, model: &mut dyn Model) -> Result<bool, Broken> {
        self.attend(model, |model, queues| model.work(queues))
    }

    /// Has the model end what is under way.
    ///
    /// # Errors
    /// The model's.
    pub fn settle(&mut self, model: &mut dyn Model) -> Result<bool, Broken> {
        self.attend(model, |model, queues| model.settle(queues))
    }

    fn attend(
        &mut self,
        model: &mut dyn Model,
        act: impl FnOnce(&mut dyn Model, &mut Queues<'_>) -> Result<(), Broken>,
    ) -> Result<bool, Broken> {
        let written = |gpa, length| self.written.borrow_mut().push((gpa, length));
        let interrupt = |queues: &[u16]| self.interrupts.borrow_mut().extend(queues);
        let mut queues = Queues::new(&mut self.driven, self.features, &self.memory, &written, &interrupt);
        act(model, &mut queues)?;
        queues.signal()?;
        self.reconfigured |= queues.is_reconfigured();
        Ok(queues.is_cut_short())
    }

    /// What has come back in `queue` since this was last asked.
    pub fn used(&mut self, queue: usize) -> Vec<Used> {
        let (base, size) = (queue as u64 * QUEUE_BYTES, self.size(queue));
        let mut used = Vec::new();
        let end = self.memory.load::<u16>(GuestAddress(base + DEVICE + 2), Ordering::Acquire).unwrap();
        let side = &mut self.sides[queue];
        while side.seen != end {
            let entry = base + DEVICE + 4 + 8 * u64::from(side.seen % size);
            let [head, length]: [u32; 2] = self.memory.read_obj(GuestAddress(entry)).unwrap();
            let head = head as u16;
            let mut bytes = Vec::new();
            for (gpa, room) in side.writable.remove(&head).expect("a chain that was sent") {
                let part = (length as usize - bytes.len()).min(room as usize);
                let mut piece = vec![0; part];
                self.memory.read_slice(&mut piece, GuestAddress(gpa)).unwrap();
                bytes.extend(piece);
            }
            assert_eq!(bytes.len(), length as usize, "no more is said to be written than there is room for");
            used.push(Used { head, bytes, length });
            side.seen = side.seen.wrapping_add(1);
        }
        used
    }

    /// Sends a chain, and works until it comes back.
    ///
    /// # Panics
    /// It does not.
    pub fn ask(&mut self, model: &mut dyn Model, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Used {
        let head = self.send(queue, readable, writable);
        for _ in 0..PATIENCE {
            self.work(model).unwrap();
            if let Some(used) = self.used(queue).into_iter().find(|used| used.head == head) {
                return used;
            }
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
        panic!("no answer")
    }
}

/// Writes descriptor `n` of the table at `table`: address, length, flags, next.
fn describe(memory: &GuestMemoryMmap, table: u64, n: u16, (gpa, length, flags, next): (u64, u32, u16, u16)) {
    let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
    memory.write_obj([gpa, rest], GuestAddress(table + 16 * u64::from(n))).unwrap();
}

/// Knuth's linear congruential generator: the same numbers for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 24
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// How a model took nonsense: rounds after which the device needed a reset, and chains that were answered.
#[derive(Debug, Default)]
pub struct Taken {
    pub broken: u32,
    pub answered: u64,
}

/// Gives the model of `make` queues full of nonsense, `rounds` times, reset in between: descriptors that loop, that lead
/// nowhere, that overlap the queue, tables in tables, rings that run ahead, with `headers` as what some buffers begin with.
/// The model must neither panic nor go on without end, and must report whatever it writes.
pub fn fuzz(model: &mut dyn Model, headers: &[Vec<u8>], rounds: u32, seed: u64) -> Taken {
    let mut random = Random(seed);
    let mut taken = Taken::default();
    for round in 0..rounds {
        model.reset();
        let mut driver = Driver::new(model);
        for queue in 0..driver.driven.len() {
            nonsense(&mut random, &driver.memory, queue as u64 * QUEUE_BYTES, headers);
        }
        let before = contents(&driver.memory);
        let mut calls = 0;
        let broken = loop {
            match driver.work(model) {
                Ok(true) => calls += 1,
                Ok(false) => break driver.settle(model).is_err(),
                Err(_) => break true,
            }
            assert!(calls < PATIENCE, "round {round} of seed {seed} does not end");
        };
        if broken {
            taken.broken += 1;
            // As for the reset that must follow.
            let _ = driver.settle(model);
        }
        for queue in 0..driver.driven.len() {
            let index = GuestAddress(queue as u64 * QUEUE_BYTES + DEVICE + 2);
            taken.answered += u64::from(driver.memory.read_obj::<u16>(index).unwrap().min(SIZE));
        }
        let mut after = contents(&driver.memory);
        for &(gpa, length) in driver.written.borrow().iter() {
            let range = gpa as usize..(gpa + length) as usize;
            after[range.clone()].copy_from_slice(&before[range]);
        }
        let silent = before.iter().zip(&after).position(|(before, after)| before != after);
        assert_eq!(silent, None, "round {round} of seed {seed}: written and not reported");
    }
    taken
}

fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// A queue at `base` with chains some of which make no sense.
fn nonsense(random: &mut Random, memory: &GuestMemoryMmap, base: u64, headers: &[Vec<u8>]) {
    // Drivers are wrong often, or seldom.
    let rarity = random.one_of(&[40, 400, 4000]);
    let tables = [base, BUFFERS, BUFFERS + 0x400];
    for table in tables {
        for n in 0..SIZE {
            let somewhere = BUFFERS + random.below(RAM - BUFFERS - 0x2000);
            let gpa = match random.below(rarity) {
                0 => random.next() << 30,
                1 => RAM - random.below(64),
                2 => base + random.below(QUEUE_BYTES),
                _ => somewhere,
            };
            let length = match random.below(rarity) {
                0 => 0,
                1 => random.next() as u32,
                2 => RAM as u32,
                3..10 => random.below(20) as u32,
                10..20 => 512 * random.below(9) as u32,
                _ => random.one_of(&[1, 4, 8, 12, 16, 20, 40, 64, 512, 4096]),
            };
            // Runs of three or so, to read and then to write, in the better cases.
            let usual = match n % 4 {
                0 => NEXT,
                1 => NEXT | random.one_of(&[0, WRITABLE]),
                2 => NEXT | WRITABLE,
                _ => WRITABLE,
            };
            let flags = match random.below(rarity) {
                0 => random.next() as u16,
                1..4 => INDIRECT,
                _ => usual,
            };
            let next = if random.below(rarity) == 0 { random.below(80) as u16 } else { n + 1 };
            if flags & INDIRECT != 0 && random.below(4) != 0 {
                describe(memory, table, n, (random.one_of(&tables), 16 * random.below(66) as u32, flags, next));
                continue;
            }
            describe(memory, table, n, (gpa, length, flags, next));
            if gpa == somewhere && !headers.is_empty() && random.below(8) != 0 {
                let mut header = headers[random.below(headers.len() as u64) as usize].clone();
                if random.below(4) == 0 && !header.is_empty() {
                    let at = random.below(header.len() as u64) as usize;
                    header[at] = random.next() as u8;
                }
                let length = header.len().min(0x1000);
                memory.write_slice(&header[..length], GuestAddress(gpa)).unwrap();
            }
        }
    }
    let count = match random.below(rarity) {
        0 => random.next() as u16,
        1 => SIZE + 1,
        _ => random.below(u64::from(SIZE) + 1) as u16,
    };
    for n in 0..SIZE {
        let head = match random.below(rarity) {
            0 => random.next() as u16,
            1 => random.below(SIZE.into()) as u16,
            _ => 4 * random.below(u64::from(SIZE) / 4) as u16,
        };
        memory.write_obj(head, GuestAddress(base + DRIVER + 4 + 2 * u64::from(n))).unwrap();
    }
    memory.write_obj(count, GuestAddress(base + DRIVER + 2)).unwrap();
}

/// A model of one queue that gives all chains back, a byte longer than it was asked to.
#[derive(Default)]
struct Echo {
    held: Vec<u16>,
    hold: bool,
    starts: u32,
}

impl Model for Echo {
    fn name(&self) -> String {
        "echo".into()
    }
    fn offer(&self) -> anyvisor_devices::virtio::pci::Offer {
        anyvisor_devices::virtio::pci::Offer {
            device: 42,
            class: 0xff_0000,
            features: feature::INDIRECT | feature::EVENT_INDEX,
            queues: vec![SIZE],
            config: vec![],
            writable: 0..0,
        }
    }
    fn start(&mut self, _features: u64) {
        self.starts += 1;
    }
    fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while let Some(chain) = queues.pop(0)? {
            if self.hold {
                self.held.push(chain.head);
                continue;
            }
            let mut bytes = vec![0; chain.readable.iter().map(|piece| piece.length as usize).sum::<usize>().min(4096)];
            let _ = anyvisor_devices::virtio::queue::gather(queues.memory(), &chain.readable, &mut bytes);
            let length =
                anyvisor_devices::virtio::queue::scatter(queues.memory(), &chain.writable, &bytes, queues.written());
            queues.push(0, chain.head, length)?;
        }
        Ok(())
    }
    fn settle(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        self.held.drain(..).try_for_each(|head| queues.push(0, head, 0))
    }
}

#[test]
fn chains_come_back_and_the_driver_is_interrupted_once() {
    let mut model = Echo::default();
    let mut driver = Driver::new(&mut model);
    let heads = [driver.send(0, &[b"one", b"two"], &[2, 10]), driver.send(0, &[b"three"], &[8])];
    assert_eq!(driver.work(&mut model), Ok(false));
    let used = driver.used(0);
    assert_eq!(used[0], Used { head: heads[0], bytes: b"onetwo".to_vec(), length: 6 });
    assert_eq!(used[1], Used { head: heads[1], bytes: b"three".to_vec(), length: 5 });
    assert_eq!(*driver.interrupts.borrow(), [0]);
    assert_eq!(driver.ask(&mut model, 0, &[b"four"], &[9]).bytes, b"four");
}

#[test]
fn an_empty_queue_has_its_driver_notify_and_a_busy_one_does_not() {
    let flags = |driver: &Driver| driver.memory.read_obj::<u16>(GuestAddress(DEVICE)).unwrap();
    let mut model = Echo::default();
    let mut driver = Driver::new(&mut model);
    driver.memory.write_obj(1u16, GuestAddress(DEVICE)).unwrap();
    driver.work(&mut model).unwrap();
    assert_eq!(flags(&driver), 0);
    // More than one turn.
    for turn in 0..40 {
        driver.send(0, &[b"x"], &[1]);
        assert_eq!(driver.work(&mut model), Ok(false), "{turn}");
        assert_eq!((flags(&driver), driver.used(0).len()), (0, 1));
    }
}

#[test]
fn what_is_held_comes_back_when_it_settles() {
    let mut model = Echo { hold: true, ..Echo::default() };
    let mut driver = Driver::new(&mut model);
    driver.send(0, &[b"x"], &[1]);
    driver.work(&mut model).unwrap();
    assert_eq!(driver.used(0), []);
    driver.settle(&mut model).unwrap();
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn nonsense_is_taken() {
    let mut model = Echo::default();
    let taken = fuzz(&mut model, &[b"header".to_vec()], 300, 1);
    assert!(taken.broken > 20 && taken.answered > 500, "{taken:?}");
    assert_eq!(model.starts, 300);
}
