//! A shared folder's device with a file system of a few made-up files, driven through a queue.

use super::super::queue::Queue;
use super::super::queue::tests::{DESCRIPTORS, RAM, describe, memory, offer as make_available, queue};
use super::*;
use std::cell::RefCell;
use vm_memory::{Bytes, GuestAddress};

const IN: u64 = 0x8000;
const OUT: u64 = 0x1_0000;
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const CONTENT: &[u8] = b"what is in the file";

/// One file called `file` with node 2, which opens as 7, and a stream that opens as 8.
#[derive(Default)]
struct Few {
    calls: Vec<String>,
    /// What the stream has.
    stream: Option<&'static [u8]>,
    written: Vec<u8>,
    fast: bool,
}

impl Few {
    fn call(&mut self, text: String) {
        self.calls.push(text);
    }
}

fn text(name: Name) -> String {
    String::from_utf8_lossy(name.bytes()).into_owned()
}

impl Files for Few {
    fn lasting(&self) -> Duration {
        if self.fast { Duration::ZERO } else { Duration::from_millis(1500) }
    }
    fn reset(&mut self) {
        self.call("reset".into());
    }
    fn lookup(&mut self, parent: u64, name: Name) -> Result<Entry, Errno> {
        self.call(format!("lookup {parent} {}", text(name)));
        match name.bytes() {
            b"file" => Ok(Entry { node: 2, attributes: self.attributes(2, None)? }),
            _ => Err(Errno::NOENT),
        }
    }
    fn forget(&mut self, node: u64, count: u64) {
        self.call(format!("forget {node} {count}"));
    }
    fn attributes(&mut self, node: u64, handle: Option<u64>) -> Result<Attributes, Errno> {
        self.call(format!("attributes {node} {handle:?}"));
        Ok(Attributes { inode: 22, size: CONTENT.len() as u64, mode: 0o100_644, ..Attributes::default() })
    }
    fn change(&mut self, node: u64, change: &Change) -> Result<Attributes, Errno> {
        self.call(format!("change {node} {:?}", change.mode));
        self.attributes(node, None)
    }
    fn read_link(&mut self, _: u64) -> Result<Vec<u8>, Errno> {
        Ok(b"target".into())
    }
    fn make(&mut self, parent: u64, name: Name, what: Make, owner: Owner) -> Result<Entry, Errno> {
        self.call(format!("make {parent} {} {what:?} {owner:?}", text(name)));
        Err(Errno::ROFS)
    }
    fn link(&mut self, node: u64, parent: u64, name: Name) -> Result<Entry, Errno> {
        self.call(format!("link {node} {parent} {}", text(name)));
        Err(Errno::ROFS)
    }
    fn remove(&mut self, parent: u64, name: Name, folder: bool) -> Result<(), Errno> {
        self.call(format!("remove {parent} {} {folder}", text(name)));
        Ok(())
    }
    fn rename(&mut self, from: (u64, Name), to: (u64, Name), flags: u32) -> Result<(), Errno> {
        self.call(format!("rename {} {} {} {} {flags}", from.0, text(from.1), to.0, text(to.1)));
        Ok(())
    }
    fn open(&mut self, node: u64, flags: u32, folder: bool) -> Result<Opened, Errno> {
        self.call(format!("open {node} {flags:#x} {folder}"));
        Ok(Opened { handle: 7, keep: true, stream: false })
    }
    fn create(&mut self, place: (u64, Name), mode: u32, flags: u32, _: Owner) -> Result<(Entry, Opened), Errno> {
        self.call(format!("create {} {} {mode:o} {flags:#x}", place.0, text(place.1)));
        Ok((Entry { node: 3, ..Entry::default() }, Opened { handle: 9, ..Opened::default() }))
    }
    fn close(&mut self, handle: u64) -> Result<(), Errno> {
        self.call(format!("close {handle}"));
        Ok(())
    }
    fn read(&mut self, handle: u64, offset: u64, data: &Data) -> Result<Option<u32>, Errno> {
        let content = match handle {
            7 => CONTENT.get(offset as usize..).unwrap_or_default(),
            8 => match self.stream.take() {
                Some(content) => content,
                None => return Ok(None),
            },
            _ => return Err(Errno::BADF),
        };
        Ok(Some(scatter(data.memory, data.pieces, content, &|_, _| {})))
    }
    fn write(&mut self, handle: u64, offset: u64, data: &Data) -> Result<Option<u32>, Errno> {
        let mut bytes = vec![0; total(data.pieces) as usize];
        gather(data.memory, data.pieces, &mut bytes).unwrap();
        self.call(format!("write {handle} {offset}"));
        self.written = bytes;
        Ok(Some(self.written.len() as u32))
    }
    fn list(&mut self, handle: u64, offset: u64, _: usize) -> Result<Vec<Listed>, Errno> {
        self.call(format!("list {handle} {offset}"));
        let listed = |next, name: &[u8]| Listed { inode: next, next, kind: 0o100_000, name: name.into() };
        Ok([listed(1, b"."), listed(2, b"file"), listed(3, b"gone")].into_iter().skip(offset as usize).collect())
    }
    fn sync(&mut self, handle: u64, data: bool) -> Result<(), Errno> {
        self.call(format!("sync {handle} {data}"));
        Ok(())
    }
    fn allocate(&mut self, handle: u64, mode: u32, offset: u64, length: u64) -> Result<(), Errno> {
        self.call(format!("allocate {handle} {mode} {offset} {length}"));
        Ok(())
    }
    fn seek(&mut self, handle: u64, offset: u64, whence: u32) -> Result<u64, Errno> {
        self.call(format!("seek {handle} {offset} {whence}"));
        Ok(99)
    }
    fn copy(&mut self, from: (u64, u64), to: (u64, u64), length: u64) -> Result<u64, Errno> {
        self.call(format!("copy {from:?} {to:?} {length}"));
        Ok(5)
    }
    fn statistics(&mut self, _: u64) -> Result<Statistics, Errno> {
        Ok(Statistics { blocks: 10, ..Statistics::default() })
    }
}

/// A message: header and body.
fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    bytes.extend((IN_HEADER as u32 + body.len() as u32).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(0xabcd_u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    for number in [1000u32, 100, 1, 0] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(body);
    bytes
}

/// Values, each in as many bytes.
fn numbers(values: &[(u64, usize)]) -> Vec<u8> {
    let bytes =
        |&(value, size): &(u64, usize)| value.to_le_bytes().into_iter().chain([0; 60]).take(size).collect::<Vec<_>>();
    values.iter().flat_map(bytes).collect()
}

struct Rig {
    memory: GuestMemoryMmap,
    queue: Queue,
    server: Server<Few>,
}

impl Rig {
    fn new() -> Rig {
        Rig { memory: memory(), queue: queue(), server: Server::new(Few::default()) }
    }

    /// Sends a message with room for `room` bytes of answer; its bytes, if there is one, and of the calls.
    fn ask(&mut self, message: &[u8], room: u32) -> Result<Option<Vec<u8>>, Broken> {
        self.memory.write_slice(message, GuestAddress(IN)).unwrap();
        let (cut, length) = (message.len() as u32 / 3, message.len() as u32);
        describe(&self.memory, DESCRIPTORS, 0, IN, cut, NEXT, 1);
        let flags = if room > 0 { NEXT } else { 0 };
        describe(&self.memory, DESCRIPTORS, 1, IN + u64::from(cut), length - cut, flags, 2);
        describe(&self.memory, DESCRIPTORS, 2, OUT, room, WRITABLE, 0);
        make_available(&self.memory, 0);
        let chain = self.queue.pop(&self.memory)?.expect("it was made available");
        let done = self.server.serve(REQUESTS, chain, &self.memory, &|_, _| {})?;
        Ok(done.map(|done| self.answer(done)))
    }

    fn answer(&self, done: Done) -> Vec<u8> {
        let mut bytes = vec![0; done.length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(OUT)).unwrap();
        bytes
    }

    /// Sends a message whose answer is this.
    fn check(&mut self, opcode: u32, node: u64, body: &[u8], expected: Result<&[u8], Errno>, calls: &[&str]) {
        let answer = self.ask(&message(opcode, node, body), 8192).unwrap().expect("an answer");
        let error = i32::from_le_bytes(answer[4..8].try_into().unwrap());
        assert_eq!(answer.len() as u32, u32::from_le_bytes(answer[..4].try_into().unwrap()));
        assert_eq!(u64::from_le_bytes(answer[8..16].try_into().unwrap()), 0xabcd);
        match expected {
            Ok(bytes) => assert_eq!((error, &answer[16..][..bytes.len()]), (0, bytes), "opcode {opcode}"),
            Err(errno) => assert_eq!((error, answer.len()), (-errno.0, 16), "opcode {opcode}"),
        }
        assert_eq!(std::mem::take(&mut self.server.files.calls), calls, "opcode {opcode}");
    }
}

#[test]
fn requests_reach_the_files_and_answers_the_driver() {
    let mut rig = Rig::new();
    let found = "attributes 2 None";
    rig.check(opcode::INIT, 0, &numbers(&[(7, 4), (38, 4), (0, 8), (0, 48)]), Ok(&[7, 0, 0, 0, 31]), &["reset"]);
    rig.check(opcode::LOOKUP, 1, b"file\0", Ok(&[2]), &["lookup 1 file", found]);
    rig.check(opcode::LOOKUP, 1, b"else\0", Ok(&numbers(&[(0, 8), (0, 8), (1, 8)])), &["lookup 1 else"]);
    rig.server.files.fast = true;
    rig.check(opcode::LOOKUP, 1, b"else\0", Err(Errno::NOENT), &["lookup 1 else"]);
    rig.server.files.fast = false;
    let lasting = numbers(&[(1, 8), (500_000_000, 4), (0, 4), (22, 8), (19, 8)]);
    rig.check(opcode::GETATTR, 2, &[0; 16], Ok(&lasting), &[found]);
    let handle = numbers(&[(1, 8), (7, 8)]);
    rig.check(opcode::GETATTR, 2, &handle, Ok(&lasting), &["attributes 2 Some(7)"]);
    let mut mode = numbers(&[(1, 8), (0, 60), (0o755, 4)]);
    mode.resize(88, 0);
    rig.check(opcode::SETATTR, 2, &mode, Ok(&lasting), &["change 2 Some(493)", found]);
    rig.check(opcode::READLINK, 2, b"", Ok(b"target"), &[]);
    rig.check(opcode::STATFS, 1, b"", Ok(&[10]), &[]);
    rig.check(opcode::OPEN, 2, &numbers(&[(0x8000, 8)]), Ok(&numbers(&[(7, 8), (2, 8)])), &["open 2 0x8000 false"]);
    rig.check(opcode::OPENDIR, 1, &[0; 8], Ok(&numbers(&[(7, 8), (10, 8)])), &["open 1 0x0 true"]);
    rig.check(opcode::READ, 2, &numbers(&[(7, 8), (5, 8), (9, 24)]), Ok(b"is in the"), &[]);
    rig.check(opcode::READ, 2, &numbers(&[(5, 8), (5, 8), (9, 24)]), Err(Errno::BADF), &[]);
    let write = [numbers(&[(7, 8), (5, 8), (4, 24)]), b"data".into()].concat();
    rig.check(opcode::WRITE, 2, &write, Ok(&numbers(&[(4, 8)])), &["write 7 5"]);
    assert_eq!(rig.server.files.written, b"data");
    rig.check(opcode::RELEASE, 2, &numbers(&[(7, 24)]), Ok(&[]), &["close 7"]);
    rig.check(opcode::FSYNC, 2, &numbers(&[(7, 8), (1, 8)]), Ok(&[]), &["sync 7 true"]);
    let allocate = numbers(&[(7, 8), (1, 8), (2, 8), (3, 8)]);
    rig.check(opcode::FALLOCATE, 2, &allocate, Ok(&[]), &["allocate 7 3 1 2"]);
    rig.check(opcode::LSEEK, 2, &numbers(&[(7, 8), (1, 8), (3, 8)]), Ok(&[99]), &["seek 7 1 3"]);
    let copy = numbers(&[(7, 8), (1, 8), (2, 8), (9, 8), (3, 8), (!0, 8), (0, 8)]);
    rig.check(opcode::COPY_FILE_RANGE, 2, &copy, Ok(&[5]), &["copy (7, 1) (9, 3) 4294963200"]);
    rig.check(opcode::UNLINK, 1, b"file\0", Ok(&[]), &["remove 1 file false"]);
    rig.check(opcode::RMDIR, 1, b"d\0", Ok(&[]), &["remove 1 d true"]);
    rig.check(opcode::RENAME, 1, b"\x05\0\0\0\0\0\0\0a\0b\0", Ok(&[]), &["rename 1 a 5 b 0"]);
    let rename = [numbers(&[(5, 8), (2, 8)]), b"a\0b\0".into()].concat();
    rig.check(opcode::RENAME2, 1, &rename, Ok(&[]), &["rename 1 a 5 b 2"]);
    let create = [numbers(&[(0x41, 4), (0o100_644, 12)]), b"new\0".into()].concat();
    rig.check(opcode::CREATE, 1, &create, Ok(&[3]), &["create 1 new 644 0x41"]);
    let folder = [numbers(&[(0o755, 8)]), b"d\0".into()].concat();
    let by = "Owner { user: 1000, group: 100 }";
    let made = |what: &str| format!("make 1 d {what} {by}");
    rig.check(opcode::MKDIR, 1, &folder, Err(Errno::ROFS), &[&made("Folder { mode: 493 }")]);
    rig.check(opcode::SYMLINK, 1, b"d\0../x\0", Err(Errno::ROFS), &[&made("Link { target: [46, 46, 47, 120] }")]);
    let node = [numbers(&[(0o010_644, 16)]), b"d\0".into()].concat();
    rig.check(opcode::MKNOD, 1, &node, Err(Errno::ROFS), &[&made("Node { mode: 4516 }")]);
    rig.check(opcode::LINK, 1, b"\x02\0\0\0\0\0\0\0l\0", Err(Errno::ROFS), &["link 2 1 l"]);
    rig.check(opcode::DESTROY, 0, b"", Ok(&[]), &["reset"]);
    rig.check(22, 2, b"\0\0\0\0\0\0\0\0user.x\0", Err(Errno::NOSYS), &[]);
}

#[test]
fn forgetting_has_no_answer() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(&message(opcode::FORGET, 2, &[3, 0, 0, 0, 0, 0, 0, 0]), 0), Ok(Some(vec![])));
    let two = numbers(&[(2, 8), (4, 8), (1, 8), (5, 8), (2, 8)]);
    assert_eq!(rig.ask(&message(opcode::BATCH_FORGET, 0, &two), 0), Ok(Some(vec![])));
    assert_eq!(rig.server.files.calls, ["forget 2 3", "forget 4 1", "forget 5 2"]);
}

#[test]
fn folders_are_listed_as_far_as_there_is_room() {
    let mut rig = Rig::new();
    let body = |offset, size| numbers(&[(7, 8), (offset, 8), (size, 24)]);
    let names = |answer: &[u8], at: &[usize]| -> Vec<u8> { at.iter().map(|at| answer[16 + at + 24]).collect() };
    let answer = rig.ask(&message(opcode::READDIR, 1, &body(0, 4096)), 8192).unwrap().unwrap();
    assert_eq!((answer.len(), names(&answer, &[0, 32, 64])), (16 + 96, b".fg".to_vec()));
    let answer = rig.ask(&message(opcode::READDIR, 1, &body(1, 40)), 8192).unwrap().unwrap();
    assert_eq!((answer.len(), names(&answer, &[0])), (16 + 32, b"f".to_vec()));
    rig.server.files.calls.clear();
    let answer = rig.ask(&message(opcode::READDIRPLUS, 1, &body(0, 4096)), 16 + 2 * 160).unwrap().unwrap();
    // Names without a node are not known; no reference is taken to what does not fit.
    assert_eq!((answer.len(), names(&answer, &[128, 288])), (16 + 320, b".f".to_vec()));
    assert_eq!((answer[16], answer[16 + 160]), (0, 2));
    assert_eq!(rig.server.files.calls, ["list 7 0", "lookup 1 file", "attributes 2 None"]);
}

#[test]
fn what_cannot_be_answered_yet_waits() {
    let mut rig = Rig::new();
    let read = message(opcode::READ, 2, &numbers(&[(8, 8), (0, 8), (100, 24)]));
    assert_eq!(rig.ask(&read, 116), Ok(None));
    assert!(rig.server.has_waiting());
    let Rig { memory, server, .. } = &mut rig;
    assert_eq!(server.resume(memory, &|_, _| {}), Ok(vec![]));
    server.files.stream = Some(b"news");
    let reported = RefCell::new(0);
    let done = server.resume(memory, &|_, length| *reported.borrow_mut() += length).unwrap();
    assert_eq!(done, [Done { queue: REQUESTS, head: 0, length: 20 }]);
    assert_eq!(&rig.answer(done[0])[16..], b"news");
    assert!(!rig.server.has_waiting() && *reported.borrow() > 100);
    assert_eq!(rig.ask(&read, 116), Ok(None));
    rig.server.reset();
    assert!(!rig.server.has_waiting());
    // The same chain over and over, which nobody who follows the rules sends.
    let flood = (0..700).find_map(|_| rig.ask(&read, 116).err());
    assert!(flood.is_some());
}

#[test]
fn messages_without_sense_are_answered_and_chains_without_sense_break_the_device() {
    let mut rig = Rig::new();
    for (opcode, body) in [
        (opcode::LOOKUP, &b"../x\0"[..]),
        (opcode::LOOKUP, b"..\0"),
        (opcode::LOOKUP, b"file"),
        (opcode::LOOKUP, b"\0"),
        (opcode::OPEN, b"123"),
        (opcode::READ, b""),
        (opcode::RENAME, b"12345678a\0"),
        (opcode::RENAME, b"12345678a\0..\0"),
        (opcode::SYMLINK, b"a\0target"),
        (opcode::SETATTR, &[0; 80]),
        (opcode::WRITE, &[0xff; 44]),
    ] {
        rig.check(opcode, 1, body, Err(Errno::INVAL), &[]);
    }
    let mut longer = message(opcode::LOOKUP, 1, b"file\0");
    longer[0] += 1;
    assert_eq!(rig.ask(&longer, 200).unwrap().unwrap()[4..8], (-22i32).to_le_bytes());
    longer[0] = 39;
    assert_eq!(rig.ask(&longer, 200).unwrap().unwrap()[4..8], (-22i32).to_le_bytes());
    let large = message(opcode::LOOKUP, 1, &[b'x'; BODY_MAX as usize + 1]);
    assert_eq!(rig.ask(&large, 200).unwrap().unwrap()[4..8], (-22i32).to_le_bytes());
    let no_room = rig.ask(&message(opcode::LOOKUP, 1, b"file\0"), 16 + 127).unwrap().unwrap();
    assert_eq!((no_room.len(), &no_room[4..8]), (16, &(-7i32).to_le_bytes()[..]));
    assert!(rig.ask(&message(opcode::LOOKUP, 1, b"file\0"), 15).is_err());
    assert!(Rig::new().ask(&message(opcode::GETATTR, 1, &[])[..39], 200).is_err());
}

/// Whatever is in a queue, each chain that comes back has an answer in order, or the device is broken.
#[test]
fn no_driver_can_do_harm() {
    let mut random = 1u64;
    let mut below = |most: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % most
    };
    let (mut answers, mut breaks) = (0, 0);
    let mut rig = Rig::new();
    for _ in 0..60_000 {
        let body: Vec<u8> =
            (0..below(120)).map(|_| [0, 1, b'a', b'.', b'/', 7, 8, below(256) as u8][below(8) as usize]).collect();
        let opcode = if below(10) == 0 { below(1 << 32) as u32 } else { below(54) as u32 };
        let mut bytes = message(opcode, below(4), &body);
        if below(4) == 0 {
            let at = below(bytes.len() as u64) as usize;
            bytes[at] = below(256) as u8;
        }
        rig.memory.write_slice(&bytes, GuestAddress(IN)).unwrap();
        rig.memory.write_obj(0u32, GuestAddress(OUT)).unwrap();
        let (cut, length) = (1 + below(bytes.len() as u64 - 1) as u32, bytes.len() as u32);
        describe(&rig.memory, DESCRIPTORS, 0, IN, cut, NEXT, 1);
        describe(&rig.memory, DESCRIPTORS, 1, IN + u64::from(cut), length - cut, NEXT, 2);
        describe(&rig.memory, DESCRIPTORS, 2, OUT, 1 + below(300) as u32, WRITABLE, 0);
        let odd = below(20) == 0;
        if odd {
            let gpa = [IN, RAM - 5, u64::MAX - 3][below(3) as usize];
            describe(
                &rig.memory,
                DESCRIPTORS,
                below(3) as u16,
                gpa,
                below(64) as u32,
                below(8) as u16,
                below(10) as u16,
            );
        }
        make_available(&rig.memory, 0);
        let Rig { memory, queue, server } = &mut rig;
        server.files.stream = (below(2) == 0).then_some(b"stream");
        let written = |gpa, length| assert!(gpa + length <= RAM);
        let chain = queue.pop(memory).map(|chain| chain.expect("it was made available"));
        let served = chain.and_then(|chain| server.serve(REQUESTS, chain, memory, &written));
        server.files.calls.clear();
        match served {
            Ok(None) => {}
            Ok(Some(done)) => {
                if done.length > 0 && !odd {
                    let [length, error]: [u32; 2] = rig.memory.read_obj(GuestAddress(OUT)).unwrap();
                    assert!((-4095..=0).contains(&(error as i32)) && length == done.length, "opcode {opcode}");
                    answers += 1;
                }
            }
            Err(_) => {
                breaks += 1;
                rig = Rig::new();
            }
        }
    }
    assert!(answers > 10_000 && breaks > 1000, "{answers} {breaks}");
}
