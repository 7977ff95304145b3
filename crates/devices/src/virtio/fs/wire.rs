//! The FUSE messages that a shared folder's driver sends and gets (Linux include/uapi/linux/fuse.h, protocol 7.31):
//! numbers, and plain data from and to bytes.
//!
//! Nothing here trusts a length: [`Body`] answers with EINVAL for what a message is too short for.

use std::time::Duration;

/// A Linux error number, as an answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    pub const PERM: Errno = Errno(1);
    pub const NOENT: Errno = Errno(2);
    pub const IO: Errno = Errno(5);
    pub const TOO_BIG: Errno = Errno(7);
    pub const BADF: Errno = Errno(9);
    pub const ACCES: Errno = Errno(13);
    pub const INVAL: Errno = Errno(22);
    pub const NFILE: Errno = Errno(23);
    pub const ROFS: Errno = Errno(30);
    pub const NAMETOOLONG: Errno = Errno(36);
    pub const NOSYS: Errno = Errno(38);
    pub const PROTO: Errno = Errno(71);
    pub const STALE: Errno = Errno(116);
}

/// What to do, by `fuse_in_header.opcode`.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
}

/// Bytes of `fuse_in_header` and `fuse_out_header`.
pub const IN_HEADER: usize = 40;
pub const OUT_HEADER: usize = 16;
/// Most bytes of a name (Linux: FUSE_NAME_MAX is 1024, file systems have 255).
const NAME_MAX: usize = 255;
/// Most bytes that one write carries, and pages that one message's data are.
pub const WRITE_MAX: u32 = 1 << 20;
const PAGES_MAX: u16 = 256;
const PAGE: u32 = 4096;
/// Readahead and the like that a driver may have under way.
const BACKGROUND_MAX: u16 = 64;

/// Flags of INIT.
const ASYNC_READ: u32 = 1 << 0;
const ATOMIC_O_TRUNC: u32 = 1 << 3;
const BIG_WRITES: u32 = 1 << 5;
const AUTO_INVAL_DATA: u32 = 1 << 12;
const DO_READDIRPLUS: u32 = 1 << 13;
const READDIRPLUS_AUTO: u32 = 1 << 14;
const ASYNC_DIO: u32 = 1 << 15;
const PARALLEL_DIROPS: u32 = 1 << 18;
const MAX_PAGES: u32 = 1 << 22;
const CACHE_SYMLINKS: u32 = 1 << 23;
const WANTED: u32 = ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | AUTO_INVAL_DATA
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES
    | CACHE_SYMLINKS;

/// The protocol's version that answers are of; a driver's may be newer.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
/// The oldest that messages are understood of: Linux 4.20, the first whose data can be more than 32 pages. Virtio-fs is of 5.4.
const MINOR_MIN: u32 = 28;

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole message.
    pub length: u32,
    pub opcode: u32,
    /// Names the message in its answer.
    pub unique: u64,
    /// What it is about.
    pub node: u64,
    /// Who asks.
    pub owner: Owner,
}

/// A user and a group, by the guest's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    pub user: u32,
    pub group: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; IN_HEADER]) -> Header {
        let body = Body(bytes);
        let u32_at = |at| body.u32(at).expect("within the header");
        let u64_at = |at| body.u64(at).expect("within the header");
        Header {
            length: u32_at(0),
            opcode: u32_at(4),
            unique: u64_at(8),
            node: u64_at(16),
            owner: Owner { user: u32_at(24), group: u32_at(28) },
        }
    }

    /// The header of the answer, which has `length` bytes behind it.
    pub fn answer(&self, error: Option<Errno>, length: u32) -> [u8; OUT_HEADER] {
        let mut bytes = Vec::with_capacity(OUT_HEADER);
        put(&mut bytes, &[OUT_HEADER as u32 + length, -error.map_or(0, |error| error.0) as u32]);
        bytes.extend(self.unique.to_le_bytes());
        bytes.try_into().expect("sixteen bytes")
    }
}

/// What is behind a message's header.
#[derive(Clone, Copy, Debug)]
pub struct Body<'a>(pub &'a [u8]);

impl<'a> Body<'a> {
    pub fn u32(self, at: usize) -> Result<u32, Errno> {
        self.0.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).ok_or(Errno::INVAL)
    }

    pub fn u64(self, at: usize) -> Result<u64, Errno> {
        self.0.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))).ok_or(Errno::INVAL)
    }

    /// The text from byte `at` to a zero, and where the next begins.
    pub fn text(self, at: usize) -> Result<(&'a [u8], usize), Errno> {
        let rest = self.0.get(at..).ok_or(Errno::INVAL)?;
        let end = rest.iter().position(|byte| *byte == 0).ok_or(Errno::INVAL)?;
        Ok((&rest[..end], at + end + 1))
    }

    /// The name of a file from byte `at`, and where the next begins.
    pub fn name(self, at: usize) -> Result<(Name<'a>, usize), Errno> {
        let (text, next) = self.text(at)?;
        Ok((Name::new(text)?, next))
    }
}

/// The name of a file in a folder: one component of a path, and neither `.` nor `..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a [u8]);

impl<'a> Name<'a> {
    /// # Errors
    /// It is none.
    pub fn new(text: &'a [u8]) -> Result<Name<'a>, Errno> {
        match text {
            b"" | b"." | b".." => Err(Errno::INVAL),
            long if long.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            text if text.contains(&b'/') || text.contains(&0) => Err(Errno::INVAL),
            text => Ok(Name(text)),
        }
    }

    pub fn bytes(self) -> &'a [u8] {
        self.0
    }
}

/// A point in time, since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// What is known of a file (`fuse_attr`), as in stat(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub inode: u64,
    pub size: u64,
    /// Of 512 bytes.
    pub blocks: u64,
    pub accessed: Time,
    pub modified: Time,
    pub changed: Time,
    /// Type and permissions.
    pub mode: u32,
    pub links: u32,
    pub owner: Owner,
    /// The device that a device file is.
    pub device: u32,
    pub block_size: u32,
}

impl Attributes {
    fn put(&self, to: &mut Vec<u8>) {
        let times = [self.accessed, self.modified, self.changed];
        for value in [self.inode, self.size, self.blocks] {
            to.extend(value.to_le_bytes());
        }
        times.iter().for_each(|time| to.extend(time.seconds.to_le_bytes()));
        times.iter().for_each(|time| to.extend(time.nanoseconds.to_le_bytes()));
        let Owner { user, group } = self.owner;
        put(to, &[self.mode, self.links, user, group, self.device, self.block_size, 0]);
    }
}

/// A file that was found, or is not there and may be taken for not there for a while (node 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub attributes: Attributes,
}

impl Entry {
    /// `fuse_entry_out`, good for `lasting`.
    pub fn put(&self, lasting: Duration, to: &mut Vec<u8>) {
        for value in [self.node, 0, lasting.as_secs(), lasting.as_secs()] {
            to.extend(value.to_le_bytes());
        }
        put(to, &[lasting.subsec_nanos(); 2]);
        self.attributes.put(to);
    }
}

/// Bytes of `fuse_entry_out`.
const ENTRY: usize = 128;

/// `fuse_attr_out`, good for `lasting`.
pub fn put_attributes(attributes: &Attributes, lasting: Duration, to: &mut Vec<u8>) {
    to.extend(lasting.as_secs().to_le_bytes());
    put(to, &[lasting.subsec_nanos(), 0]);
    attributes.put(to);
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewTime {
    Now,
    At(Time),
}

/// What of a file is to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub handle: Option<u64>,
    /// Permissions.
    pub mode: Option<u32>,
    pub user: Option<u32>,
    pub group: Option<u32>,
    pub size: Option<u64>,
    pub accessed: Option<NewTime>,
    pub modified: Option<NewTime>,
}

impl Change {
    /// Of `fuse_setattr_in`.
    pub fn parse(body: Body) -> Result<Change, Errno> {
        const MODE: u32 = 1;
        const USER: u32 = 1 << 1;
        const GROUP: u32 = 1 << 2;
        const SIZE: u32 = 1 << 3;
        const ACCESSED: u32 = 1 << 4;
        const MODIFIED: u32 = 1 << 5;
        const HANDLE: u32 = 1 << 6;
        const ACCESSED_NOW: u32 = 1 << 7;
        const MODIFIED_NOW: u32 = 1 << 8;
        let valid = body.u32(0)?;
        body.u32(84)?;
        let has = |bit| valid & bit != 0;
        let number = |bit, at| if has(bit) { body.u32(at).map(Some) } else { Ok(None) };
        let long = |bit, at| if has(bit) { body.u64(at).map(Some) } else { Ok(None) };
        let time = |bit, now, seconds, nanoseconds| {
            if has(now) {
                return Ok(Some(NewTime::Now));
            }
            let (seconds, nanoseconds) = (body.u64(seconds)? as i64, body.u32(nanoseconds)?);
            if has(bit) && nanoseconds >= 1_000_000_000 {
                return Err(Errno::INVAL);
            }
            Ok(has(bit).then_some(NewTime::At(Time { seconds, nanoseconds })))
        };
        Ok(Change {
            handle: long(HANDLE, 8)?,
            mode: number(MODE, 68)?.map(|mode| mode & 0o7777),
            user: number(USER, 76)?,
            group: number(GROUP, 80)?,
            size: long(SIZE, 16)?,
            accessed: time(ACCESSED, ACCESSED_NOW, 32, 56)?,
            modified: time(MODIFIED, MODIFIED_NOW, 40, 60)?,
        })
    }
}

/// A file that was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    pub handle: u64,
    /// What the driver has of its contents may stay.
    pub keep: bool,
    /// Reads and writes come as the guest's programs make them, in order: nothing is kept, and there are no positions.
    pub stream: bool,
}

impl Opened {
    /// `fuse_open_out`, of a `folder` or a file.
    pub fn put(&self, folder: bool, to: &mut Vec<u8>) {
        const DIRECT_IO: u32 = 1;
        const KEEP_CACHE: u32 = 1 << 1;
        const NONSEEKABLE: u32 = 1 << 2;
        const CACHE_DIR: u32 = 1 << 3;
        const STREAM: u32 = 1 << 4;
        let mut flags = if self.stream { DIRECT_IO | NONSEEKABLE | STREAM } else { 0 };
        if self.keep {
            flags |= if folder { KEEP_CACHE | CACHE_DIR } else { KEEP_CACHE };
        }
        to.extend(self.handle.to_le_bytes());
        put(to, &[flags, 0]);
    }
}

/// A file in a folder's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub inode: u64,
    /// Where the list goes on behind it.
    pub next: u64,
    /// The type's bits of a mode, or 0 where they are not known.
    pub kind: u32,
    pub name: Vec<u8>,
}

impl Listed {
    /// Whether it fits behind `before` into `room` bytes, with what is known of the file or without.
    pub fn fits(&self, plus: bool, room: usize, before: &[u8]) -> bool {
        before.len() + self.size(plus) <= room
    }

    fn size(&self, plus: bool) -> usize {
        (24 + self.name.len()).next_multiple_of(8) + if plus { ENTRY } else { 0 }
    }

    /// Appends `fuse_dirent`, or `fuse_direntplus` with what is known of the file, if that fits into `room` bytes.
    pub fn put(&self, entry: Option<(&Entry, Duration)>, room: usize, to: &mut Vec<u8>) -> bool {
        if !self.fits(entry.is_some(), room, to) {
            return false;
        }
        let end = to.len() + self.size(entry.is_some());
        if let Some((entry, lasting)) = entry {
            entry.put(lasting, to);
        }
        to.extend(self.inode.to_le_bytes());
        to.extend(self.next.to_le_bytes());
        put(to, &[self.name.len() as u32, self.kind >> 12]);
        to.extend(&self.name);
        to.resize(end, 0);
        true
    }
}

/// How full a file system is (`fuse_kstatfs`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub blocks: u64,
    pub free: u64,
    /// For others than root.
    pub available: u64,
    pub files: u64,
    pub files_free: u64,
    pub block_size: u32,
    pub name_max: u32,
    pub fragment_size: u32,
}

impl Statistics {
    pub fn put(&self, to: &mut Vec<u8>) {
        for value in [self.blocks, self.free, self.available, self.files, self.files_free] {
            to.extend(value.to_le_bytes());
        }
        put(to, &[self.block_size, self.name_max, self.fragment_size, 0, 0, 0, 0, 0, 0, 0]);
    }
}

/// The answer to INIT, whose message is `body`.
pub fn init(body: Body) -> Result<Vec<u8>, Errno> {
    let (major, minor, readahead, flags) = (body.u32(0)?, body.u32(4)?, body.u32(8)?, body.u32(12)?);
    let mut to = Vec::with_capacity(64);
    if major > MAJOR {
        // It asks again with ours.
        put(&mut to, &[MAJOR, MINOR]);
        to.resize(64, 0);
        return Ok(to);
    }
    if major < MAJOR || minor < MINOR_MIN {
        return Err(Errno::PROTO);
    }
    put(&mut to, &[MAJOR, MINOR.min(minor), readahead.min(WRITE_MAX), flags & WANTED]);
    to.extend(BACKGROUND_MAX.to_le_bytes());
    to.extend((BACKGROUND_MAX / 4 * 3).to_le_bytes());
    put(&mut to, &[WRITE_MAX, 1]);
    to.extend(PAGES_MAX.to_le_bytes());
    to.resize(64, 0);
    const { assert!(WRITE_MAX == PAGES_MAX as u32 * PAGE) };
    Ok(to)
}

fn put(to: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| to.extend(value.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message's body of `length` bytes with these numbers at these places.
    pub fn body(length: usize, numbers: &[(usize, u64, usize)]) -> Vec<u8> {
        let mut bytes = vec![0; length];
        for &(at, value, size) in numbers {
            bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
        bytes
    }

    #[test]
    fn names_are_one_component() {
        for good in [&b"a"[..], b"...", b" ", b"\xff\xfe", &[b'x'; 255]] {
            assert_eq!(Name::new(good).map(Name::bytes), Ok(good));
        }
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"../x", b"a\0b"] {
            assert_eq!(Name::new(bad), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(Name::new(&[b'x'; 256]), Err(Errno::NAMETOOLONG));
        assert_eq!(Body(b"abc").name(0), Err(Errno::INVAL), "no zero behind it");
        assert_eq!(Body(b"abc\0d\0").name(4), Ok((Name(b"d"), 6)));
        assert_eq!(Body(b"abc\0").name(4), Err(Errno::INVAL));
        assert_eq!(Body(b"abc\0").name(9), Err(Errno::INVAL));
    }

    #[test]
    fn structures_have_the_sizes_of_the_header_file() {
        let size = |put: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = vec![];
            put(&mut bytes);
            bytes.len()
        };
        let hour = Duration::from_secs(3600);
        assert_eq!(size(&|to| Entry::default().put(hour, to)), ENTRY);
        assert_eq!(size(&|to| put_attributes(&Attributes::default(), hour, to)), 104);
        assert_eq!(size(&|to| Opened::default().put(false, to)), 16);
        assert_eq!(size(&|to| Statistics::default().put(to)), 80);
        let listed = Listed { inode: 1, next: 2, kind: 0o040_000, name: b"name".to_vec() };
        assert_eq!(size(&|to| assert!(listed.put(None, 32, to))), 32);
        assert_eq!(size(&|to| assert!(!listed.put(None, 31, to))), 0);
        assert_eq!(size(&|to| assert!(listed.put(Some((&Entry::default(), hour)), 160, to))), 160);
    }

    #[test]
    fn versions_are_agreed_on() {
        let ask = |major: u64, minor: u64| init(Body(&body(64, &[(0, major, 4), (4, minor, 4), (12, !0, 4)])));
        let answer = ask(7, 37).unwrap();
        assert_eq!((Body(&answer).u32(0), Body(&answer).u32(4)), (Ok(7), Ok(31)));
        assert_eq!(Body(&answer).u32(12), Ok(WANTED));
        assert_eq!((Body(&answer).u32(20), answer[28]), (Ok(1 << 20), 0), "1 MiB, in 256 pages");
        assert_eq!(&answer[28..30], &256u16.to_le_bytes());
        assert_eq!(Body(&ask(8, 0).unwrap()).u32(0), Ok(7));
        assert_eq!(ask(7, 27), Err(Errno::PROTO));
        assert_eq!(ask(6, 99), Err(Errno::PROTO));
        assert_eq!(init(Body(&[7, 0, 0, 0])), Err(Errno::INVAL));
    }

    #[test]
    fn changes_say_what_is_to_change() {
        let bytes = body(
            88,
            &[(0, 1 | 8 | 64 | 16 | 256, 4), (8, 9, 8), (16, 77, 8), (32, 5, 8), (56, 6, 4), (68, 0o100_644, 4)],
        );
        let expected = Change {
            handle: Some(9),
            mode: Some(0o644),
            size: Some(77),
            accessed: Some(NewTime::At(Time { seconds: 5, nanoseconds: 6 })),
            modified: Some(NewTime::Now),
            ..Change::default()
        };
        assert_eq!(Change::parse(Body(&bytes)), Ok(expected));
        assert_eq!(Change::parse(Body(&bytes[..87])), Err(Errno::INVAL));
        let late = body(88, &[(0, 16, 4), (56, 1_000_000_000, 4)]);
        assert_eq!(Change::parse(Body(&late)), Err(Errno::INVAL));
    }

    #[test]
    fn answers_carry_negative_errors() {
        let header = Header { length: 40, opcode: 1, unique: 0x1122, node: 1, owner: Owner::default() };
        let answer = header.answer(Some(Errno::NOENT), 0);
        assert_eq!((Body(&answer).u32(0), Body(&answer).u32(4)), (Ok(16), Ok(-2i32 as u32)));
        assert_eq!((Body(&answer).u64(8), header.answer(None, 8)[0]), (Ok(0x1122), 24));
    }
}
