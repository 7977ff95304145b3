//! A shared folder as a guest could use it, and as one could try to get out of it.

use super::*;
use anyvisor_devices::virtio::fs::ROOT;
use anyvisor_devices::virtio::queue::Piece;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM: usize = 1 << 20;
const O_RDWR: u32 = 2;
const O_EXCL: u32 = libc::O_EXCL as u32;

struct Rig {
    folder: Folder,
    memory: GuestMemoryMmap,
}

fn name(text: &str) -> Name<'_> {
    Name::new(text.as_bytes()).unwrap()
}

fn share(path: &Path, read_only: bool) -> Share {
    Share { path: path.into(), tag: "tag".into(), read_only, unchanging: false, as_root: false }
}

impl Rig {
    fn new(path: &Path, read_only: bool) -> Rig {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        Rig { folder: Folder::open(&share(path, read_only), 1).unwrap(), memory }
    }

    /// The node at a path of plain names.
    fn find(&mut self, path: &str) -> Answer<u64> {
        path.split('/').try_fold(ROOT, |node, part| self.folder.lookup(node, name(part)).map(|entry| entry.node))
    }

    fn write(&mut self, handle: u64, offset: u64, text: &[u8]) -> Answer<Option<u32>> {
        self.memory.write_slice(text, GuestAddress(0x1000)).unwrap();
        let (first, rest) = (Piece { gpa: 0x1000, length: 1 }, Piece { gpa: 0x1001, length: text.len() as u32 - 1 });
        self.folder.write(handle, offset, &Data { memory: &self.memory, pieces: &[first, rest] })
    }

    fn read(&mut self, handle: u64, offset: u64) -> Answer<Vec<u8>> {
        let pieces = [Piece { gpa: 0x2000, length: 3 }, Piece { gpa: 0x3000, length: 100 }];
        let length =
            self.folder.read(handle, offset, &Data { memory: &self.memory, pieces: &pieces })?.unwrap() as usize;
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes[..length.min(3)], GuestAddress(0x2000)).unwrap();
        if length > 3 {
            self.memory.read_slice(&mut bytes[3..], GuestAddress(0x3000)).unwrap();
        }
        Ok(bytes)
    }

    fn names(&mut self, node: u64) -> Vec<String> {
        let handle = self.folder.open(node, 0, true).unwrap().handle;
        let (mut names, mut offset) = (vec![], 0);
        loop {
            let part = self.folder.list(handle, offset, 64).unwrap();
            let Some(last) = part.last() else { break };
            offset = last.next;
            names.extend(part.into_iter().map(|listed| String::from_utf8(listed.name).unwrap()));
        }
        self.folder.close(handle).unwrap();
        names.retain(|name| name != "." && name != "..");
        names.sort();
        names
    }
}

fn me() -> Owner {
    Owner { user: rustix::process::geteuid().as_raw(), group: rustix::process::getegid().as_raw() }
}

#[test]
fn files_are_made_written_moved_and_removed() {
    let place = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(place.path(), false);
    // Modes are as the guest says, whatever this process's umask is.
    let (entry, opened) = rig.folder.create((ROOT, name("a")), 0o666, O_RDWR, me()).unwrap();
    assert_eq!(entry.attributes.mode, 0o100_666);
    assert_eq!(rig.write(opened.handle, 0, b"some text"), Ok(Some(9)));
    assert_eq!(rig.read(opened.handle, 5), Ok(b"text".to_vec()));
    assert_eq!(rig.read(opened.handle, 9), Ok(vec![]));
    assert_eq!(std::fs::read(place.path().join("a")).unwrap(), b"some text");
    let folder = rig.folder.make(ROOT, name("d"), Make::Folder { mode: 0o777 }, me()).unwrap();
    assert_eq!(folder.attributes.mode & 0o777, 0o777);
    let link = rig.folder.make(folder.node, name("l"), Make::Link { target: b"/etc" }, me()).unwrap();
    assert_eq!(rig.folder.read_link(link.node), Ok(b"/etc".to_vec()));
    rig.folder.rename((ROOT, name("a")), (folder.node, name("b")), 0).unwrap();
    assert_eq!((rig.names(ROOT), rig.names(folder.node)), (vec!["d".into()], vec!["b".into(), "l".into()]));
    assert_eq!(rig.folder.attributes(entry.node, None).unwrap().size, 9);
    assert_eq!(rig.folder.link(entry.node, ROOT, name("c")).unwrap().attributes.links, 2);
    let change = Change {
        size: Some(4),
        mode: Some(0o600),
        modified: Some(NewTime::At(Time { seconds: 77, nanoseconds: 8 })),
        ..Change::default()
    };
    let changed = rig.folder.change(entry.node, &change).unwrap();
    assert_eq!((changed.size, changed.mode, changed.modified.seconds), (4, 0o100_600, 77));
    assert_eq!(rig.folder.remove(ROOT, name("d"), true), Err(Errno(libc::ENOTEMPTY)));
    assert_eq!(rig.folder.remove(ROOT, name("d"), false), Err(Errno(libc::EISDIR)));
    for gone in ["b", "l"] {
        rig.folder.remove(folder.node, name(gone), false).unwrap();
    }
    rig.folder.remove(ROOT, name("d"), true).unwrap();
    rig.folder.remove(ROOT, name("c"), false).unwrap();
    // Who has it open can go on.
    assert_eq!(rig.folder.attributes(entry.node, None).unwrap().links, 0);
    assert_eq!(rig.read(opened.handle, 0), Ok(b"some".to_vec()));
    assert_eq!((rig.find("a"), rig.names(ROOT)), (Err(Errno::NOENT), vec![]));
    rig.folder.close(opened.handle).unwrap();
    assert_eq!(rig.folder.close(opened.handle), Err(Errno::BADF));
    assert!(rig.folder.statistics(ROOT).unwrap().blocks > 0);
}

#[test]
fn a_link_is_a_name_and_a_special_file_too() {
    let place = tempfile::tempdir().unwrap();
    let inside = place.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(place.path().join("secret"), "outside").unwrap();
    for (target, link) in [("../secret", "up"), ("/", "root"), ("/proc/self/fd", "fds"), (".", "here")] {
        symlink(target, inside.join(link)).unwrap();
    }
    rustix::fs::mknodat(rustix::fs::CWD, inside.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    let mut rig = Rig::new(&inside, false);
    for link in ["up", "root", "fds", "here"] {
        let node = rig.find(link).unwrap();
        assert_eq!(rig.folder.attributes(node, None).unwrap().mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(rig.folder.open(node, 0, false), Err(Errno::ACCES));
        assert_eq!(rig.folder.open(node, 0, true), Err(Errno::ACCES));
        assert_eq!(rig.folder.lookup(node, name("etc")), Err(Errno(libc::ENOTDIR)));
        assert_eq!(rig.folder.create((node, name("x")), 0o600, 1, me()), Err(Errno(libc::ENOTDIR)));
        assert_eq!(rig.folder.create((ROOT, name(link)), 0o600, 1, me()), Err(Errno::ACCES), "{link} is followed");
        let size = Change { size: Some(0), ..Change::default() };
        assert_eq!(rig.folder.change(node, &size), Err(Errno::ACCES));
        assert_eq!(rig.folder.change(node, &Change { mode: Some(0), ..Change::default() }), Err(OPNOTSUPP));
        let now = Change { modified: Some(NewTime::At(Time { seconds: 5, nanoseconds: 0 })), ..Change::default() };
        assert_eq!(rig.folder.change(node, &now).unwrap().modified.seconds, 5, "the link's own");
    }
    assert_ne!(std::fs::metadata(place.path().join("secret")).unwrap().mtime(), 5);
    let fifo = rig.find("fifo").unwrap();
    assert_eq!(rig.folder.open(fifo, O_RDWR, false), Err(Errno::ACCES));
    assert_eq!(rig.folder.create((ROOT, name("fifo")), 0o600, 1, me()), Err(Errno::ACCES), "does not wait");
    assert_eq!(rig.folder.create((ROOT, name("fifo")), 0o600, O_EXCL, me()), Err(Errno(libc::EEXIST)));
    for kind in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFLNK, libc::S_IFDIR, 0xf000] {
        assert_eq!(rig.folder.make(ROOT, name("n"), Make::Node { mode: kind | 0o666 }, me()), Err(Errno::PERM));
    }
    rig.folder.make(ROOT, name("s"), Make::Node { mode: libc::S_IFSOCK | 0o600 }, me()).unwrap();
    assert!(inside.join("s").symlink_metadata().unwrap().file_type().is_socket());
}

#[test]
fn views_of_the_kernel_are_closed() {
    let mut rig = Rig::new(Path::new("/"), true);
    for closed in ["proc", "sys"] {
        let node = rig.find(closed).unwrap();
        assert_eq!(rig.folder.attributes(node, None).unwrap().mode & libc::S_IFMT, libc::S_IFDIR);
        assert_eq!(rig.folder.lookup(node, name("self")), Err(Errno::ACCES));
        assert_eq!(rig.folder.open(node, 0, true), Err(Errno::ACCES));
    }
    let error = Folder::open(&share(Path::new("/proc/self"), true), 1).err().unwrap().to_string();
    assert!(error.contains("'/proc/self'") && !error.contains('\n'), "{error}");
    let error = Folder::open(&share(Path::new("/nonexistent"), true), 1).err().unwrap().to_string();
    assert!(error.contains("'/nonexistent'") && error.contains("--share"), "{error}");
    let twice = open(&[share(Path::new("/"), true), share(Path::new("/usr"), true)]).err().unwrap().to_string();
    assert!(twice.contains("'tag'"), "{twice}");
}

#[test]
fn read_only_is_read_only() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("file"), "content").unwrap();
    std::fs::create_dir(place.path().join("folder")).unwrap();
    let mut rig = Rig::new(place.path(), true);
    let file = rig.find("file").unwrap();
    let handle = rig.folder.open(file, 0, false).unwrap().handle;
    assert_eq!(rig.read(handle, 0), Ok(b"content".to_vec()));
    let rofs = Err(Errno::ROFS);
    for flags in [1, 2, libc::O_TRUNC as u32, libc::O_APPEND as u32] {
        assert_eq!(rig.folder.open(file, flags, false).map(drop), rofs);
    }
    assert_eq!(rig.write(handle, 0, b"new").map(drop), rofs);
    let change = Change { mode: Some(0), size: Some(0), handle: Some(handle), ..Change::default() };
    assert_eq!(rig.folder.change(file, &change).map(drop), rofs);
    assert_eq!(rig.folder.change(file, &Change::default()).map(drop), rofs);
    let folder = &mut rig.folder;
    assert_eq!(folder.create((ROOT, name("file")), 0o600, 0, me()).map(drop), rofs);
    assert_eq!(folder.make(ROOT, name("n"), Make::Folder { mode: 0o700 }, me()).map(drop), rofs);
    assert_eq!(folder.link(file, ROOT, name("n")).map(drop), rofs);
    assert_eq!(folder.remove(ROOT, name("file"), false), rofs);
    assert_eq!(folder.remove(ROOT, name("folder"), true), rofs);
    assert_eq!(folder.rename((ROOT, name("file")), (ROOT, name("n")), 0), rofs);
    assert_eq!(folder.allocate(handle, 0, 0, 100), rofs);
    assert_eq!(folder.copy((handle, 0), (handle, 3), 3).map(drop), rofs);
    assert_eq!(std::fs::read(place.path().join("file")).unwrap(), b"content");
    assert_eq!(rig.names(ROOT), ["file", "folder"]);
}

/// With fewer descriptors than nodes all nodes work; one that the host has replaced does not become another file.
#[test]
fn nodes_are_found_again() {
    let place = tempfile::tempdir().unwrap();
    let deep = place.path().join("1/2/3");
    std::fs::create_dir_all(&deep).unwrap();
    for n in 0..100 {
        std::fs::write(deep.join(n.to_string()), n.to_string()).unwrap();
    }
    let mut rig = Rig::new(place.path(), false);
    rig.folder.nodes = Nodes::new(rig.folder.root.clone(), 8).unwrap();
    let nodes: Vec<u64> = (0..100).map(|n| rig.find(&format!("1/2/3/{n}")).unwrap()).collect();
    let open = |rig: &Rig| rig.folder.nodes.count().1;
    assert!(open(&rig) <= 9, "{}", open(&rig));
    for (n, node) in nodes.iter().enumerate() {
        let handle = rig.folder.open(*node, 0, false).unwrap().handle;
        assert_eq!(rig.read(handle, 0), Ok(n.to_string().into_bytes()));
        rig.folder.close(handle).unwrap();
    }
    // The guest moves their folder: they are found there.
    let (two, three) = (rig.find("1/2").unwrap(), rig.find("1/2/3").unwrap());
    rig.folder.rename((two, name("3")), (ROOT, name("moved")), 0).unwrap();
    assert!(nodes.iter().all(|node| rig.folder.attributes(*node, None).is_ok()));
    // The host puts others there.
    let now = place.path().join("moved");
    std::fs::rename(now.join("1"), now.join("new")).unwrap();
    std::fs::write(now.join("1"), "another").unwrap();
    std::fs::remove_file(now.join("2")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, now.join("2"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    assert_eq!(rig.folder.attributes(nodes[1], None), Err(Errno::STALE));
    assert_eq!(rig.folder.open(nodes[2], 0, false), Err(Errno::STALE));
    // Removed by the guest they stay as long as it has them, and then all is forgotten.
    rig.folder.remove(three, name("50"), false).unwrap();
    assert_eq!(rig.folder.attributes(nodes[50], None).unwrap().links, 0);
    nodes.iter().for_each(|node| rig.folder.forget(*node, 1));
    for folder in ["moved", "1/2", "1"] {
        let node = rig.find(folder).unwrap();
        rig.folder.forget(node, u64::MAX);
    }
    assert_eq!(rig.folder.nodes.count(), (1, 1));
    rig.find("moved").unwrap();
    rig.folder.reset();
    assert_eq!(rig.folder.nodes.count(), (1, 1));
}

/// Whatever a guest asks, nothing outside of the folder changes, and nothing of it is seen.
#[test]
fn no_guest_gets_out() {
    let place = tempfile::tempdir().unwrap();
    let inside = place.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    let secret = place.path().join("secret");
    std::fs::write(&secret, "outside").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o640)).unwrap();
    let mut random = 7u64;
    let mut below = |most: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % most
    };
    let names = ["a", "b", "c", "secret", "..."];
    let mut rig = Rig::new(&inside, false);
    rig.folder.nodes = Nodes::new(rig.folder.root.clone(), 8).unwrap();
    let mut done = 0;
    for step in 0..30_000 {
        let (node, other, handle) = (below(40), below(40), below(60));
        let (one, two) = (name(names[below(5) as usize]), name(names[below(5) as usize]));
        let rig = &mut rig;
        let result = match below(19) {
            0..4 => rig.folder.lookup(node, one).map(drop),
            4 => rig.folder.create((node, one), below(0o10000) as u32, below(1 << 22) as u32, me()).map(drop),
            5 => rig.folder.make(node, one, Make::Folder { mode: 0o755 }, me()).map(drop),
            6 => rig.folder.make(node, one, Make::Link { target: b"../../secret" }, me()).map(drop),
            7 => rig.folder.make(node, one, Make::Node { mode: below(1 << 16) as u32 }, me()).map(drop),
            8 => rig.folder.link(node, other, one).map(drop),
            9 => rig.folder.remove(node, one, below(2) == 0),
            10 => rig.folder.rename((node, one), (other, two), below(4) as u32),
            11 => rig.folder.open(node, below(1 << 22) as u32, below(2) == 0).map(drop),
            12 => rig.write(handle, below(5000), b"written").map(drop),
            13 => rig.read(handle, below(10)).map(|bytes| assert_ne!(bytes, b"outside")),
            14 => rig.folder.list(handle, below(3), 4096).map(drop),
            15 => {
                let mode = (below(2) == 0).then_some(0o777);
                rig.folder.change(node, &Change { mode, size: Some(below(100)), ..Change::default() }).map(drop)
            }
            16 => rig.folder.copy((handle, below(9)), (other, below(9)), below(1 << 40)).map(drop),
            17 => rig.folder.close(handle),
            _ => {
                rig.folder.forget(node, below(4));
                Ok(())
            }
        };
        done += u32::from(result.is_ok());
        if step % 5000 == 4999 {
            rig.folder.reset();
            rig.folder.next_handle = 1;
            rig.folder.nodes = Nodes::new(rig.folder.root.clone(), 8).unwrap();
        }
    }
    assert!(done > 2000, "{done}");
    assert_eq!(std::fs::read(&secret).unwrap(), b"outside");
    assert_eq!(std::fs::metadata(&secret).unwrap().permissions().mode() & 0o7777, 0o640);
    let around: Vec<_> = std::fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(around.len(), 2, "{around:?}");
}

/// Streams that have nothing, or no room, make a request wait, and say on what.
#[test]
fn a_command_reads_and_writes_pipes() {
    let pipe =
        || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK).unwrap();
    let ((input, typed), (shown, output), (complaints, error)) = (pipe(), pipe(), pipe());
    let (tell, told) = std::sync::mpsc::channel();
    let ended = Box::new(move |status: &str| tell.send(status.to_owned()).unwrap());
    let channel = Channel(Arc::new(Streams { input, output, error, ended }));
    let mut files = channel::ChannelFiles::new(&channel);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let mut handle = |text| files.lookup(ROOT, name(text)).and_then(|entry| files.open(entry.node, 1, false)).unwrap();
    let [input, output, error, status] = ["input", "output", "error", "status"].map(&mut handle);
    assert!(input.stream && !input.keep);
    let data = |length| Data { memory: &memory, pieces: Box::leak(Box::new([Piece { gpa: 0x1000, length }])) };
    assert_eq!(files.read(input.handle, 0, &data(10)), Ok(None));
    assert_eq!(files.sources().len(), 1);
    rustix::io::write(&typed, b"keys").unwrap();
    files.look_again();
    assert_eq!((files.read(input.handle, 0, &data(10)), files.sources().len()), (Ok(Some(4)), 0));
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x1000)).unwrap(), *b"keys");
    drop(typed);
    assert_eq!(files.read(input.handle, 0, &data(10)), Ok(Some(0)), "the end");
    assert_eq!(files.write(error.handle, 0, &data(4)), Ok(Some(4)));
    assert_eq!(rustix::io::read(&complaints, &mut [0; 9]), Ok(4));
    let mut taken = 0;
    while let Some(length) = files.write(output.handle, 0, &data(100_000)).unwrap() {
        taken += length as usize;
    }
    assert!(taken >= 4096 && files.sources().len() == 1);
    let mut seen = vec![0; taken];
    assert_eq!(rustix::io::read(&shown, &mut seen), Ok(taken));
    drop(shown);
    assert_eq!(files.write(output.handle, 0, &data(1)), Err(Errno(libc::EPIPE)));
    memory.write_slice(b"exit 7", GuestAddress(0x1000)).unwrap();
    assert_eq!(files.write(status.handle, 0, &data(6)), Ok(Some(6)));
    assert_eq!(told.try_recv().unwrap(), "exit 7");
    assert_eq!(files.write(status.handle, 0, &data(5000)), Err(Errno::INVAL));
    assert_eq!(files.write(input.handle, 0, &data(5)), Err(Errno::BADF));
    assert_eq!(files.read(output.handle, 0, &data(5)), Err(Errno::BADF));
    assert_eq!(files.lookup(ROOT, name("other")), Err(Errno::NOENT));
}

#[test]
fn what_a_user_writes() {
    let parse = |text: &str| text.parse::<Share>();
    assert_eq!(parse("/a/b").unwrap().tag, "b");
    assert_eq!(parse("/").unwrap().tag, "root");
    let all = parse("/a:b/c:tag,ro,cache=always").unwrap();
    assert_eq!((all.path.to_str(), &*all.tag, all.read_only, all.unchanging), (Some("/a:b/c"), "tag", true, true));
    assert_eq!(parse("/a:b/c").unwrap().path.to_str(), Some("/a:b/c"));
    for (bad, why) in [("", "no folder"), (":x", "no folder"), ("/a:", "bad name"), ("/a,rw", "'rw'")] {
        assert!(parse(bad).unwrap_err().contains(why), "{bad}");
    }
    assert!(parse(&format!("/a:{}", "x".repeat(37))).unwrap_err().contains("bad name"));
}

#[test]
fn nonsense_in_a_shares_queues_is_taken() {
    let place = tempfile::tempdir().unwrap();
    let inside = place.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(inside.join("a"), vec![7; 10_000]).unwrap();
    let message = |opcode: u32, node: u64, body: &[u8]| {
        let length = 40 + body.len() as u32;
        let head =
            [&length.to_le_bytes()[..], &opcode.to_le_bytes(), &9u64.to_le_bytes(), &node.to_le_bytes(), &[0; 16]];
        [&head.concat(), body].concat()
    };
    let numbers = |values: &[u64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let named = |before: &[u64], names: &[u8]| [numbers(before), names.into()].concat();
    let headers = [
        message(1, 1, b"a\0"),
        message(1, 1, b"b\0"),
        message(3, 1, &[0; 16]),
        message(8, 1, &named(&[0o100_644, 0], b"c\0")),
        message(9, 1, &named(&[0o755], b"d\0")),
        message(10, 1, b"c\0"),
        message(12, 1, &named(&[1], b"a\0b\0")),
        message(14, 2, &numbers(&[2])),
        message(15, 2, &numbers(&[1, 0, 4096, 0, 0])),
        message(16, 2, &numbers(&[1, 0, 4096, 0, 0])),
        message(27, 1, &numbers(&[0])),
        message(28, 1, &numbers(&[1, 0, 4096, 0, 0])),
        message(35, 1, &named(&[0o644 << 32 | 2, 0], b"e\0")),
        message(44, 1, &numbers(&[2, 0, 4096, 0, 0])),
        message(2, 2, &numbers(&[1])),
        message(26, 0, &numbers(&[7 | 31 << 32, 0])),
    ];
    let shared = Share { path: inside, tag: "tag".into(), read_only: false, unchanging: false, as_root: false };
    let mut model = open(&[shared]).unwrap().remove(0);
    let taken = crate::virtio::driver::fuzz(&mut *model, &headers, 2000, 1);
    // Most chains there are too short for a message.
    assert!(taken.broken > 1000 && taken.answered > 1000, "{taken:?}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
    assert!(model.save().unwrap_err().to_string().contains("--share"));
}
