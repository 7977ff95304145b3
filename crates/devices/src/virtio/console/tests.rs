//! What a driver sees of consoles and ports, and what no driver can do to them.

use super::super::hostile::{Chance, Way, torment};
use super::super::queue::tests::{
    self as queues, DESCRIPTORS, DEVICE as USED, DRIVER, Plain, describe, memory, offer, queue,
};
use super::*;
use crate::virtio::queue::Queue;
use std::collections::VecDeque;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const WRITABLE: u16 = 2;
const BUFFER: u64 = 0x8000;

/// The host's end, of memory.
#[derive(Default)]
struct Script {
    /// What is read: bytes, or nothing now.
    input: VecDeque<Vec<u8>>,
    output: Vec<u8>,
    /// How much it takes before it is full.
    room: usize,
    broken: bool,
    closed: bool,
}

impl End for Script {
    fn is_open(&self) -> bool {
        !self.closed
    }
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let Some(part) = self.input.front_mut() else { return Err(ErrorKind::WouldBlock.into()) };
        let length = part.len().min(data.len());
        data[..length].copy_from_slice(&part.drain(..length).collect::<Vec<_>>());
        if part.is_empty() {
            self.input.pop_front();
        }
        Ok(length)
    }
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.broken {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let length = data.len().min(self.room);
        if length == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.output.extend(&data[..length]);
        self.room -= length;
        Ok(length)
    }
}

fn kinds() -> Vec<PortKind> {
    [("tty", true), ("org.x.y", false)].map(|(name, console)| PortKind { name: name.into(), console }).into()
}

fn quiet(_: u64, _: u64) {}

/// A device with a queue, which every role takes in turn, its memory, and the ports' ends.
struct Bench {
    memory: GuestMemoryMmap,
    queue: Queue,
    console: Console,
    ends: [Script; 2],
    features: u64,
}

impl Bench {
    fn new() -> Bench {
        let ends = [(), ()].map(|()| Script { room: usize::MAX, ..Script::default() });
        Bench { memory: memory(), queue: queue(), console: Console::new(kinds()), ends, features: MULTIPORT }
    }

    /// Whether something was given back.
    fn work(&mut self, number: u16) -> Result<bool, Broken> {
        let [first, second] = &mut self.ends;
        let mut queue = Plain::new(&mut self.queue, &self.memory, &quiet);
        self.console.work(number, &mut queue, &mut [first, second], self.features)?;
        Ok(queue.pushed > 0)
    }

    /// Makes one buffer available.
    fn give(&mut self, length: u32, flags: u16) {
        describe(&self.memory, DESCRIPTORS, 0, BUFFER, length, flags, 0);
        offer(&self.memory, 0);
    }

    /// Sends a message.
    fn say(&mut self, port: u32, what: u16, value: u16) {
        self.memory.write_obj([port, u32::from(what) | u32::from(value) << 16], GuestAddress(BUFFER)).unwrap();
        self.give(8, 0);
        assert_eq!(self.work(3), Ok(true));
    }

    /// The messages that the device sends now: port, what, value, text.
    fn told(&mut self) -> Vec<(u32, u16, u16, String)> {
        let mut all = vec![];
        loop {
            self.give(64, WRITABLE);
            let before: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
            if !self.work(2).unwrap() {
                // The driver takes its buffer back, as none can.
                let index: u16 = self.memory.read_obj(GuestAddress(DRIVER + 2)).unwrap();
                self.memory.write_obj(index.wrapping_sub(1), GuestAddress(DRIVER + 2)).unwrap();
                return all;
            }
            let slot = u64::from(before % queues::SIZE);
            let [_, length]: [u32; 2] = self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot)).unwrap();
            let mut bytes = vec![0; length as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
            let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            let port = u32::from(half(0)) | u32::from(half(2)) << 16;
            all.push((port, half(4), half(6), String::from_utf8(bytes[8..].to_vec()).unwrap()));
        }
    }
}

fn message(port: u32, what: u16, value: u16) -> (u32, u16, u16, String) {
    (port, what, value, String::new())
}

#[test]
fn a_driver_is_told_of_ports() {
    let mut bench = Bench::new();
    assert_eq!(bench.told(), []);
    bench.say(0, event::DEVICE_READY, 1);
    assert_eq!(bench.told(), [message(0, event::DEVICE_ADD, 1), message(1, event::DEVICE_ADD, 1)]);
    bench.say(1, event::PORT_READY, 1);
    let name = (1, event::PORT_NAME, 1, "org.x.y".to_owned());
    assert_eq!(bench.told(), [message(1, event::PORT_OPEN, 1), name.clone()], "open before it can be found");
    bench.ends[0].closed = true;
    bench.say(0, event::PORT_READY, 1);
    assert_eq!(bench.told(), [message(0, event::CONSOLE_PORT, 1), (0, event::PORT_NAME, 1, "tty".to_owned())]);
    bench.ends[0].closed = false;
    bench.ends[1].closed = true;
    assert_eq!(bench.told(), [message(0, event::PORT_OPEN, 1), message(1, event::PORT_OPEN, 0)]);
    assert!(bench.console.is_guest_open(0, MULTIPORT) && !bench.console.is_guest_open(1, MULTIPORT));
    bench.say(1, event::PORT_OPEN, 1);
    assert!(bench.console.is_guest_open(1, MULTIPORT));
    // What means nothing.
    for (port, what) in [(9, event::PORT_READY), (u32::MAX, event::PORT_OPEN), (0, 99), (0, event::PORT_NAME)] {
        bench.say(port, what, 1);
    }
    assert_eq!(bench.told(), []);
    // It goes on from a snapshot; after a reset it begins again.
    let saved = serde_json::to_string(bench.console.save()).unwrap();
    bench.say(1, event::PORT_OPEN, 0);
    bench.console.restore(serde_json::from_str(&saved).unwrap()).unwrap();
    assert!(bench.console.is_guest_open(1, MULTIPORT));
    assert!(Console::new(kinds()[..1].into()).restore(serde_json::from_str(&saved).unwrap()).is_err());
    bench.console.reset();
    assert_eq!(bench.console.save(), Console::new(kinds()).save());
}

#[test]
fn bytes_for_the_guest_wait_for_it() {
    let mut bench = Bench::new();
    bench.ends[1].input = [b"hello, guest".to_vec(), vec![]].into();
    bench.give(5, WRITABLE);
    assert_eq!(bench.work(4), Ok(false), "nobody has it open");
    bench.console.state.ports[1].guest_open = true;
    assert_eq!(bench.work(4), Ok(true));
    assert_eq!(bench.memory.read_obj::<[u8; 5]>(GuestAddress(BUFFER)).unwrap(), *b"hello");
    bench.give(64, WRITABLE);
    bench.give(64, WRITABLE);
    // The end, and then nothing: the last buffer stays.
    assert_eq!(bench.work(4), Ok(true));
    assert_eq!(bench.memory.read_obj::<[u8; 7]>(GuestAddress(BUFFER)).unwrap(), *b", guest");
    assert_eq!(bench.work(4), Ok(false));
    assert_eq!(bench.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 2);
}

#[test]
fn bytes_from_the_guest_wait_for_the_host() {
    let mut bench = Bench::new();
    bench.memory.write_slice(b"0123456789", GuestAddress(BUFFER)).unwrap();
    bench.ends[1].room = 4;
    bench.give(10, 0);
    bench.give(3, 0);
    // Both have the same bytes, the second fewer.
    describe(&bench.memory, DESCRIPTORS, 1, BUFFER, 10, 0, 0);
    bench.memory.write_obj(1u16, GuestAddress(DRIVER + 4)).unwrap();
    assert_eq!(bench.work(5), Ok(false));
    assert_eq!((bench.ends[1].output.as_slice(), bench.console.state.ports[1].begun), (&b"0123"[..], 4));
    assert_eq!(bench.work(5), Ok(false));
    bench.ends[1].room = 100;
    assert_eq!(bench.work(5), Ok(true));
    assert_eq!((bench.ends[1].output.as_slice(), bench.console.state.ports[1].begun), (&b"0123456789012"[..], 0));
    // Nobody there: it waits. Nobody there any more: what was begun is lost, and what cannot be heard.
    bench.ends[1] = Script { room: 4, ..Script::default() };
    bench.give(10, 0);
    bench.work(5).unwrap();
    bench.ends[1].closed = true;
    bench.give(10, 0);
    assert_eq!(bench.work(5), Ok(true));
    assert_eq!(bench.work(5), Ok(false));
    bench.ends[1] = Script { broken: true, ..Script::default() };
    assert_eq!(bench.work(5), Ok(true));
    assert_eq!(bench.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 4);
}

#[test]
fn large_buffers_go_in_parts() {
    let mut bench = Bench::new();
    let bytes: Vec<u8> = (0..200_000u32).map(|n| (n / 7) as u8).collect();
    bench.memory.write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
    bench.ends[0].room = usize::MAX;
    bench.give(bytes.len() as u32, 0);
    assert_eq!(bench.work(1), Ok(true));
    assert!(bench.ends[0].output == bytes);
    bench.ends[0].input = [bytes.clone()].into();
    bench.console.state.ports[0].ready = true;
    for _ in 0..4 {
        bench.give(bytes.len() as u32, WRITABLE);
    }
    bench.work(0).unwrap();
    let lengths = (0..4).map(|n| bench.memory.read_obj::<u32>(GuestAddress(USED + 4 + 8 * (n + 1) + 4)).unwrap());
    assert_eq!(lengths.collect::<Vec<_>>(), [65536, 65536, 65536, 200_000 - 3 * 65536]);
}

#[test]
fn malformed_buffers_break_the_device() {
    for (number, length, flags) in
        [(0, 8, 0), (1, 8, WRITABLE), (2, 7, WRITABLE), (2, 64, 0), (3, 7, 0), (3, 8, WRITABLE)]
    {
        let mut bench = Bench::new();
        bench.console.state.ports[0] = Port { ready: true, tell_added: true, ..Port::default() };
        bench.give(length, flags);
        assert!(bench.work(number).is_err(), "queue {number}");
    }
}

#[test]
fn a_driver_may_know_one_port_only() {
    let mut bench = Bench::new();
    bench.features = 0;
    bench.ends[0].input = [b"x".to_vec()].into();
    bench.give(8, WRITABLE);
    for number in [2, 3, 4, 5] {
        assert_eq!(bench.work(number), Ok(false));
    }
    assert_eq!(bench.work(0), Ok(true));
    let offer = bench.console.offer();
    assert_eq!((offer.queues.len(), offer.config.len(), offer.config[4]), (6, 12, 2));
    let roles = [0, 1, 2, 3, 4, 5, 6].map(Role::of);
    let [receive, transmit] = [Role::Receive, Role::Transmit];
    assert_eq!(roles, [receive(0), transmit(0), Role::Tell, Role::Hear, receive(1), transmit(1), receive(2)]);
}

#[test]
fn hostile_queues_harm_nobody() {
    let fill = |chance: &mut Chance, bytes: &mut [u8]| {
        for part in bytes.chunks_mut(8) {
            let message = chance.below(3) | chance.below(9) << 32 | chance.below(2) << 48;
            part.copy_from_slice(&message.to_le_bytes()[..part.len()]);
        }
    };
    let ways = [0, 1, 2, 3, 4, 5].map(|n| if n % 2 == 0 { Way::ToDriver } else { Way::ToDevice });
    let outcome = torment(2000, &ways, &fill, |chance, queues| {
        let mut console = Console::new(kinds());
        let mut ends = [(), ()].map(|()| Script {
            input: (0..chance.below(4)).map(|_| vec![7; chance.below(300) as usize]).collect(),
            room: chance.below(10_000) as usize,
            broken: chance.one_in(8),
            closed: chance.one_in(8),
            ..Script::default()
        });
        let features = if chance.one_in(8) { 0 } else { MULTIPORT };
        for _ in 0..4 {
            for number in [3, 2, 0, 1, 4, 5] {
                let [first, second] = &mut ends;
                console.work(number, &mut queues[usize::from(number)], &mut [first, second], features)?;
            }
        }
        Ok(())
    });
    assert!(outcome.fine > 50 && outcome.broken > 200 && outcome.used > 500, "{outcome:?}");
}
