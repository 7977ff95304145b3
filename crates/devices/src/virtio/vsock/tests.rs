//! Connections between a guest and scripted ends on the host, and what no driver can do to them.

use super::super::hostile::{Chance, Way, torment};
use super::super::queue::tests::{DESCRIPTORS, DEVICE as USED, DRIVER, Plain, SIZE, describe, memory, offer, queue};
use super::*;
use crate::virtio::queue::Queue;
use vm_memory::{Bytes, GuestAddress};

const GUEST: u64 = 3;
const BUFFER_AT: u64 = 0x1_0000;
const WRITABLE: u16 = 2;
const KEY: Key = Key { guest: 5000, host: 80 };

/// The host's ends, all alike.
#[derive(Default)]
struct Ends {
    /// What is done, in words.
    notes: Vec<String>,
    /// What is read: parts, of which an empty one is the end; then nothing now.
    input: VecDeque<Vec<u8>>,
    output: Vec<u8>,
    room: usize,
    refuses: bool,
    broken: bool,
}

impl Host for Ends {
    fn connect(&mut self, key: Key) -> bool {
        self.notes.push(format!("connect {} {}", key.guest, key.host));
        !self.refuses
    }
    fn accepted(&mut self, key: Key) {
        self.notes.push(format!("accepted {}", key.guest));
    }
    fn read(&mut self, _: Key, data: &mut [u8]) -> io::Result<usize> {
        if self.broken {
            return Err(ErrorKind::ConnectionReset.into());
        }
        let Some(part) = self.input.front_mut() else { return Err(ErrorKind::WouldBlock.into()) };
        let length = part.len().min(data.len());
        data[..length].copy_from_slice(&part.drain(..length).collect::<Vec<_>>());
        if part.is_empty() {
            self.input.pop_front();
        }
        Ok(length)
    }
    fn write(&mut self, _: Key, data: &[u8]) -> io::Result<usize> {
        let length = data.len().min(self.room);
        if self.broken || length == 0 {
            return Err(if self.broken { ErrorKind::BrokenPipe } else { ErrorKind::WouldBlock }.into());
        }
        self.output.extend(&data[..length]);
        self.room -= length;
        Ok(length)
    }
    fn finish(&mut self, key: Key) {
        self.notes.push(format!("finish {}", key.guest));
    }
    fn close(&mut self, key: Key) {
        self.notes.push(format!("close {}", key.guest));
    }
}

struct Bench {
    memory: GuestMemoryMmap,
    receive: Queue,
    transmit: Queue,
    vsock: Vsock,
    ends: Ends,
    /// The room that the guest says it has, and what it has forwarded.
    allocated: u32,
    forwarded: u32,
}

/// The transmit queue's areas are behind the receive queue's.
const AWAY: u64 = 0x4000;

impl Bench {
    fn new() -> Bench {
        let away = Queue::new(SIZE, DESCRIPTORS + AWAY, DRIVER + AWAY, USED + AWAY, false);
        let ends = Ends { room: usize::MAX, ..Ends::default() };
        let (memory, receive, vsock) = (memory(), queue(), Vsock::new(GUEST));
        Bench { memory, receive, transmit: away, vsock, ends, allocated: 1 << 20, forwarded: 0 }
    }

    /// Has the device work on its receive (or event) queue, or its transmit queue. Whether something was given back.
    fn work(&mut self, number: u16) -> Result<bool, Broken> {
        let queue = if number == TRANSMIT { &mut self.transmit } else { &mut self.receive };
        let mut queue = Plain::new(queue, &self.memory, &|_, _| {});
        self.vsock.work(number, &mut queue, &mut self.ends)?;
        Ok(queue.pushed > 0)
    }

    fn try_send(&mut self, bytes: &[u8], length: u32) -> Result<bool, Broken> {
        self.memory.write_slice(bytes, GuestAddress(BUFFER_AT)).unwrap();
        describe(&self.memory, DESCRIPTORS + AWAY, 0, BUFFER_AT, length, 0, 0);
        let index: u16 = self.memory.read_obj(GuestAddress(DRIVER + AWAY + 2)).unwrap();
        self.memory.write_obj(index.wrapping_add(1), GuestAddress(DRIVER + AWAY + 2)).unwrap();
        self.work(TRANSMIT)
    }

    fn header(&self, key: Key, op: u16, flags: u32, length: usize) -> Vec<u8> {
        let mut bytes = vec![];
        [GUEST, HOST_CID].iter().for_each(|cid| bytes.extend(cid.to_le_bytes()));
        let kinds = u32::from(STREAM) | u32::from(op) << 16;
        for field in [key.guest, key.host, length as u32, kinds, flags, self.allocated, self.forwarded] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    }

    fn send(&mut self, key: Key, op: u16, flags: u32, data: &[u8]) {
        let bytes = [self.header(key, op, flags, data.len()), data.to_vec()].concat();
        assert_eq!(self.try_send(&bytes, bytes.len() as u32), Ok(true));
    }

    /// The packet that the device sends now, if any: key, operation, flags, credit, data.
    fn next(&mut self) -> Option<(Key, u16, u32, u32, Vec<u8>)> {
        describe(&self.memory, DESCRIPTORS, 0, BUFFER_AT, 0x8000, WRITABLE, 0);
        offer(&self.memory, 0);
        let before: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        if !self.work(RECEIVE).unwrap() {
            let index: u16 = self.memory.read_obj(GuestAddress(DRIVER + 2)).unwrap();
            self.memory.write_obj(index.wrapping_sub(1), GuestAddress(DRIVER + 2)).unwrap();
            return None;
        }
        let used = USED + 4 + 8 * u64::from(before % SIZE);
        let [_, length]: [u32; 2] = self.memory.read_obj(GuestAddress(used)).unwrap();
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFER_AT)).unwrap();
        let field = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((field(0), field(8)), (HOST_CID as u32, GUEST as u32));
        assert!(field(36) == BUFFER || (field(28) >> 16) as u16 == op::RST);
        assert_eq!((field(28) as u16, field(24) as usize), (STREAM, bytes.len() - HEADER));
        let key = Key { guest: field(20), host: field(16) };
        Some((key, (field(28) >> 16) as u16, field(32), field(40), bytes[HEADER..].to_vec()))
    }

    /// Connects from the guest.
    fn open(&mut self) {
        self.send(KEY, op::REQUEST, 0, b"");
        assert_eq!(self.next(), Some((KEY, op::RESPONSE, 0, 0, vec![])));
        assert_eq!(std::mem::take(&mut self.ends.notes), ["connect 5000 80"]);
    }

    /// The next packet, of a connection's: operation and flags.
    fn next_op(&mut self) -> Option<(u16, u32)> {
        self.next().map(|(_, op, flags, ..)| (op, flags))
    }
}

#[test]
fn a_guest_connects_talks_and_closes() {
    let mut bench = Bench::new();
    bench.open();
    bench.send(KEY, op::RW, 0, b"to the host");
    assert_eq!(bench.ends.output, b"to the host");
    assert_eq!(bench.next(), None, "credit is told in time");
    bench.ends.input = [b"to the guest".to_vec(), vec![]].into();
    assert_eq!(bench.next(), Some((KEY, op::RW, 0, 11, b"to the guest".to_vec())));
    assert_eq!(bench.next_op(), Some((op::SHUTDOWN, NO_SEND)));
    assert_eq!(bench.next(), None);
    // It shuts one half after the other; the second ends the connection.
    bench.send(KEY, op::SHUTDOWN, NO_SEND, b"");
    assert_eq!(bench.next(), None);
    bench.send(KEY, op::SHUTDOWN, NO_RECEIVE | NO_SEND, b"");
    assert_eq!(bench.next_op(), Some((op::RST, 0)));
    assert_eq!(bench.ends.notes, ["finish 5000", "close 5000"]);
    assert_eq!(bench.next(), None);
    bench.send(KEY, op::RW, 0, b"x");
    assert_eq!(bench.next_op(), Some((op::RST, 0)), "there is no such connection");
}

#[test]
fn what_the_guest_said_last_is_delivered() {
    let mut bench = Bench::new();
    bench.open();
    bench.ends.room = 4;
    bench.send(KEY, op::RW, 0, b"last words");
    bench.send(KEY, op::SHUTDOWN, NO_RECEIVE | NO_SEND, b"");
    assert_eq!(bench.next(), None);
    bench.ends.room = 100;
    assert_eq!(bench.next_op(), Some((op::RST, 0)));
    assert_eq!(
        (bench.ends.output.as_slice(), bench.ends.notes),
        (&b"last words"[..], vec!["finish 5000".into(), "close 5000".into()])
    );
}

#[test]
fn the_host_connects() {
    let mut bench = Bench::new();
    let key = bench.vsock.connect(22, &mut bench.ends).unwrap();
    assert_eq!((key.guest, key.host), (22, HOST_PORTS));
    bench.ends.input = [b"early".to_vec()].into();
    assert_eq!(bench.next(), Some((key, op::REQUEST, 0, 0, vec![])));
    assert_eq!(bench.next(), None);
    bench.send(key, op::RESPONSE, 0, b"");
    assert_eq!(bench.ends.notes, ["accepted 22"]);
    assert_eq!(bench.next(), Some((key, op::RW, 0, 0, b"early".to_vec())));
    // Nobody listens there.
    let other = bench.vsock.connect(23, &mut bench.ends).unwrap();
    assert_eq!(other.host, HOST_PORTS + 1);
    assert_eq!(bench.next_op(), Some((op::REQUEST, 0)));
    bench.send(other, op::RST, 0, b"");
    assert_eq!(bench.ends.notes.pop().unwrap(), "close 23");
    assert_eq!(bench.next(), None, "a reset is not answered");
    // The host goes, with something left to read.
    bench.ends.input = [b"bye".to_vec()].into();
    bench.vsock.host_gone(key);
    assert_eq!(bench.next(), Some((key, op::RW, 0, 0, b"bye".to_vec())));
    bench.ends.broken = true;
    assert_eq!(bench.next_op(), Some((op::SHUTDOWN, NO_SEND | NO_RECEIVE)));
    bench.send(key, op::RW, 0, b"crossed");
    assert_eq!(bench.next(), None);
    bench.send(key, op::RST, 0, b"");
    assert!(bench.vsock.connections.is_empty());
}

#[test]
fn the_host_may_half_close_and_then_go() {
    let mut bench = Bench::new();
    bench.open();
    bench.ends.input = [vec![]].into();
    assert_eq!(bench.next_op(), Some((op::SHUTDOWN, NO_SEND)));
    bench.vsock.host_gone(KEY);
    assert_eq!(bench.next_op(), Some((op::SHUTDOWN, NO_SEND | NO_RECEIVE)));
    assert_eq!(bench.next(), None);
}

#[test]
fn credit_bounds_both_ways() {
    let mut bench = Bench::new();
    bench.allocated = 10;
    bench.open();
    bench.ends.input = [b"0123456789abcdef".to_vec()].into();
    assert_eq!(bench.next(), Some((KEY, op::RW, 0, 0, b"0123456789".to_vec())));
    assert_eq!(bench.next(), None);
    bench.forwarded = 4;
    bench.send(KEY, op::CREDIT_UPDATE, 0, b"");
    assert_eq!(bench.next(), Some((KEY, op::RW, 0, 0, b"abcd".to_vec())));
    // A guest that takes its buffer back, or forwarded what was not sent.
    for (allocated, forwarded) in [(0, 0), (1, 0), (10, 1000)] {
        (bench.allocated, bench.forwarded) = (allocated, forwarded);
        bench.send(KEY, op::CREDIT_REQUEST, 0, b"");
        assert_eq!(bench.next_op(), Some((op::CREDIT_UPDATE, 0)));
    }
    // The host takes nothing: as much as there is room for is kept, and not more.
    bench.ends.room = 0;
    let part = vec![7; PART];
    for _ in 0..BUFFER as usize / PART {
        bench.send(KEY, op::RW, 0, &part);
    }
    assert_eq!(bench.next(), None);
    bench.ends.room = BUFFER as usize / 2 + 5;
    assert_eq!(bench.next(), Some((KEY, op::CREDIT_UPDATE, 0, BUFFER / 2 + 5, vec![])));
    bench.send(KEY, op::RW, 0, &part);
    bench.send(KEY, op::RW, 0, &part);
    assert_eq!(bench.next(), None);
    bench.send(KEY, op::RW, 0, &part[..6]);
    assert_eq!(bench.next_op(), Some((op::RST, 0)), "more than there was room for");
    assert_eq!(bench.ends.notes, ["close 5000"]);
}

#[test]
fn what_makes_no_sense_is_reset() {
    let mut bench = Bench::new();
    for op in [0, op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 8] {
        bench.send(KEY, op, 0, b"");
        assert_eq!(bench.next_op(), Some((op::RST, 0)), "{op}");
    }
    for op in [0, op::REQUEST, op::RESPONSE, 8] {
        bench.open();
        bench.send(KEY, op, 0, b"");
        assert_eq!((bench.next_op(), bench.next_op()), (Some((op::RST, 0)), None), "{op}");
        assert_eq!(std::mem::take(&mut bench.ends.notes), ["close 5000"]);
    }
    bench.ends.refuses = true;
    bench.send(KEY, op::REQUEST, 0, b"");
    assert_eq!(bench.next_op(), Some((op::RST, 0)));
    // Another type of socket.
    let mut bytes = bench.header(KEY, op::REQUEST, 0, 0);
    bytes[28] = 2;
    bench.try_send(&bytes, HEADER as u32).unwrap();
    assert_eq!(bench.next_op(), Some((op::RST, 0)));
    // From or to others: nobody is there to answer.
    for at in [0, 8, 4, 12] {
        let mut bytes = bench.header(KEY, op::REQUEST, 0, 0);
        bytes[at] ^= 1;
        bench.try_send(&bytes, HEADER as u32).unwrap();
        assert_eq!(bench.next(), None);
    }
}

#[test]
fn malformed_packets_break_the_device() {
    let mut bench = Bench::new();
    let bytes = bench.header(KEY, op::RW, 0, 1);
    assert!(bench.try_send(&bytes, HEADER as u32).is_err(), "no data");
    assert!(Bench::new().try_send(&bytes, HEADER as u32 - 1).is_err(), "no header");
    let mut bench = Bench::new();
    describe(&bench.memory, DESCRIPTORS, 0, BUFFER_AT, HEADER as u32, WRITABLE, 0);
    offer(&bench.memory, 0);
    assert!(bench.work(RECEIVE).is_err(), "no room");
}

#[test]
fn connections_and_resets_have_a_limit() {
    let mut bench = Bench::new();
    for guest in 0..CONNECTIONS_MAX as u32 {
        bench.send(Key { guest, host: 80 }, op::REQUEST, 0, b"");
    }
    bench.send(KEY, op::REQUEST, 0, b"");
    assert_eq!(bench.vsock.connect(1, &mut bench.ends), None);
    assert_eq!(bench.vsock.connections.len(), CONNECTIONS_MAX);
    assert_eq!(bench.next().map(|packet| (packet.0, packet.1)), Some((KEY, op::RST)));
    // All are answered, one after another.
    let answered: Vec<_> = std::iter::from_fn(|| bench.next()).map(|packet| (packet.0.guest, packet.1)).collect();
    assert_eq!(answered, (0..CONNECTIONS_MAX as u32).map(|guest| (guest, op::RESPONSE)).collect::<Vec<_>>());
    // One that is dead makes room.
    bench.ends.broken = true;
    assert_eq!(bench.next_op(), Some((op::SHUTDOWN, NO_RECEIVE | NO_SEND)));
    assert!(bench.vsock.connect(1, &mut bench.ends).is_some());
    assert_eq!(bench.next_op(), Some((op::RST, 0)));
    // A driver that does not take its resets is not heard.
    let mut bench = Bench::new();
    (0..RESETS_MAX).for_each(|_| bench.send(KEY, op::RW, 0, b""));
    let bytes = bench.header(KEY, op::RW, 0, 0);
    assert_eq!(bench.try_send(&bytes, HEADER as u32), Ok(false));
    bench.next();
    assert_eq!(bench.work(TRANSMIT), Ok(true));
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut bench = Bench::new();
    describe(&bench.memory, DESCRIPTORS, 0, BUFFER_AT, 8, WRITABLE, 0);
    offer(&bench.memory, 0);
    bench.memory.write_obj(u64::MAX, GuestAddress(BUFFER_AT)).unwrap();
    assert_eq!(bench.work(EVENTS), Ok(false));
    bench.vsock.restored();
    assert_eq!((bench.work(EVENTS), bench.work(EVENTS)), (Ok(true), Ok(false)));
    assert_eq!(bench.memory.read_obj::<u64>(GuestAddress(BUFFER_AT)).unwrap(), 0xffff_ffff_0000_0000);
    bench.vsock.restored();
    bench.vsock.connect(22, &mut bench.ends);
    bench.vsock.reset(&mut bench.ends);
    assert_eq!(bench.ends.notes, ["close 22"]);
    assert!(!bench.vsock.transport_reset && bench.vsock.connections.is_empty());
}

#[test]
fn hostile_queues_harm_nobody() {
    // Packets of few connections, so that they meet.
    let fill = |chance: &mut Chance, bytes: &mut [u8]| {
        for packet in bytes.chunks_mut(512) {
            let (length, kinds) = (chance.below(600) as u32, 1 | (chance.below(9) as u32) << 16);
            let mut fields = vec![];
            [GUEST, HOST_CID].iter().for_each(|cid| fields.extend(cid.to_le_bytes()));
            let (guest, host) = (chance.below(2) as u32, HOST_PORTS * chance.below(2) as u32);
            let length = if chance.one_in(3) { length } else { 0 };
            for field in [guest, host, length, kinds, chance.below(4) as u32, chance.below(900) as u32, 0] {
                fields.extend(field.to_le_bytes());
            }
            let length = packet.len().min(fields.len());
            packet[..length].copy_from_slice(&fields[..length]);
        }
    };
    let outcome = torment(3000, &[Way::ToDriver, Way::ToDevice, Way::ToDriver], &fill, |chance, queues| {
        let mut vsock = Vsock::new(GUEST);
        let mut ends = Ends {
            input: (0..chance.below(9)).map(|_| vec![7; chance.below(3000) as usize]).collect(),
            room: chance.below(5000) as usize,
            refuses: chance.one_in(8),
            broken: chance.one_in(8),
            ..Ends::default()
        };
        vsock.restored();
        vsock.connect(chance.below(2) as u32, &mut ends);
        for _ in 0..4 {
            for number in [RECEIVE, TRANSMIT, EVENTS] {
                vsock.work(number, &mut queues[usize::from(number)], &mut ends)?;
            }
        }
        vsock.host_gone(Key { guest: 0, host: 0 });
        vsock.reset(&mut ends);
        Ok(())
    });
    assert!(outcome.fine > 500 && outcome.broken > 500 && outcome.used > 5000, "{outcome:?}");
}
