//! A folder of the host's that a guest has as its own: what virtio-fs asks ([`Files`]), by system calls.
//!
//! **What confines the guest.** It gets what the user who runs this process may do below the folder, and nothing else. The
//! folder is opened once. From there everything is reached by a descriptor and one name, without following links
//! ([`nodes`]); links are the guest's own to follow. Only regular files and folders are ever opened: a FIFO, a device or
//! a socket is a name here, and the guest's kernel makes its own of it. What is behind /proc and its like is closed. A
//! folder that is shared read-only refuses every change here, before a system call is made.
//!
//! **Users.** The guest sees the host's owners and modes. What it makes belongs to the user who runs this process; if that
//! is root, to whom the guest says. Extended attributes are not passed on.
//!
//! Files are opened for reading and writing through `/proc/self/fd`, which needs no right beyond the file's own.

mod channel;
mod model;
mod nodes;

use crate::config::Share;
use crate::virtio::Model;
use crate::{Error, Result, memory};
use anyvisor_devices::virtio::fs::{
    Attributes, Change, Data, Entry, Errno, Files, Listed, Make, Name, NewTime, Opened, Owner, Statistics, Time,
    access_mode,
};
pub use channel::{Channel, Streams};
use model::{ShareModel, Waits};
use nodes::{Nodes, errno};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, Stat, Timespec, Timestamps};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use std::collections::HashMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

type Answer<T> = std::result::Result<T, Errno>;

/// For how long a guest may believe what it was told where others may change the folder, and where nobody does.
const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(24 * 3600);
/// Descriptors that are left to the rest of this process.
const RESERVED: u64 = 512;
/// Most bytes that one request copies between files: a guest asks again for more.
const COPY_MAX: u64 = 16 << 20;
/// Bytes of a folder's list that are asked of the host at a time.
const LIST_CHUNK: usize = 32 << 10;
const OPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);

/// Opens what is shared, as devices.
///
/// # Errors
/// [`Error::User`]: which folder cannot be shared, why, and what to do.
pub fn open(shares: &[Share]) -> Result<Vec<Box<dyn Model>>> {
    for (n, share) in shares.iter().enumerate() {
        if shares[..n].iter().any(|other| other.tag == share.tag) {
            let tag = &share.tag;
            return Err(Error::user(format!(
                "two shared folders are called '{tag}'; give one another name: --share FOLDER:NAME"
            )));
        }
    }
    let device = |share: &Share| -> Result<Box<dyn Model>> {
        let name = format!("share '{}'", share.path.display());
        Ok(Box::new(ShareModel::new(name, &share.tag, Folder::open(share, shares.len())?)))
    };
    shares.iter().map(device).collect()
}

/// The device of a command's streams, which a guest mounts as [`CHANNEL_TAG`].
pub fn channel(channel: &Channel) -> Box<dyn Model> {
    Box::new(ShareModel::new("channel of the command".into(), CHANNEL_TAG, channel::ChannelFiles::new(channel)))
}

/// What a command's streams are shared as.
pub const CHANNEL_TAG: &str = "anyvisor-channel";

impl Waits for Folder {}

/// A shared folder.
struct Folder {
    read_only: bool,
    lasting: Duration,
    /// The user and group that the guest sees as root's.
    as_root: Option<Owner>,
    /// This process may give files to others.
    may_give: bool,
    root: Arc<OwnedFd>,
    nodes: Nodes,
    handles: HashMap<u64, Handle>,
    handles_max: usize,
    next_handle: u64,
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
}

struct Handle {
    file: File,
    folder: bool,
}

impl Folder {
    /// Opens what `share` names, which is one of `shares` that have descriptors.
    ///
    /// # Errors
    /// [`Error::User`]: why it cannot be shared.
    pub fn open(share: &Share, shares: usize) -> Result<Folder> {
        let shown = share.path.display();
        let trouble = |error: rustix::io::Errno| {
            Error::user(format!("cannot share folder '{shown}': {}; check --share", std::io::Error::from(error)))
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = Arc::new(rustix::fs::open(&share.path, flags, Mode::empty()).map_err(trouble)?);
        let descriptors = rustix::fs::open("/proc/self/fd", flags, Mode::empty())
            .map_err(|error| Error::host("cannot open '/proc/self/fd', which --share needs", error.into()))?;
        let budget = (descriptor_limit().saturating_sub(RESERVED) / 2 / shares.max(1) as u64).clamp(64, 32 << 10);
        let nodes = Nodes::new(root.clone(), budget as usize).map_err(|error| {
            Error::host(format!("cannot share folder '{shown}'"), std::io::Error::from_raw_os_error(error.0))
        })?;
        if nodes.check_open(anyvisor_devices::virtio::fs::ROOT).is_err() {
            return Err(Error::user(format!(
                "folder '{shown}' is a view of this host's kernel, and cannot be shared; give another to --share"
            )));
        }
        let me = Owner { user: rustix::process::geteuid().as_raw(), group: rustix::process::getegid().as_raw() };
        Ok(Folder {
            read_only: share.read_only,
            lasting: if share.unchanging { LONG } else { SHORT },
            as_root: share.as_root.then_some(me),
            may_give: me.user == 0,
            root,
            nodes,
            handles: HashMap::new(),
            handles_max: budget as usize,
            next_handle: 1,
            descriptors,
        })
    }

    fn attributes_of(&self, stat: &Stat) -> Attributes {
        let time = |seconds, nanoseconds| Time { seconds, nanoseconds: nanoseconds as u32 };
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let mut owner = Owner { user: stat.st_uid, group: stat.st_gid };
        if let Some(me) = self.as_root {
            owner.user = if owner.user == me.user { 0 } else { owner.user };
            owner.group = if owner.group == me.group { 0 } else { owner.group };
        }
        Attributes {
            inode: self.nodes.shown_inode(stat),
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            accessed: time(stat.st_atime, stat.st_atime_nsec),
            modified: time(stat.st_mtime, stat.st_mtime_nsec),
            changed: time(stat.st_ctime, stat.st_ctime_nsec),
            mode: stat.st_mode,
            links: stat.st_nlink as u32,
            owner,
            // As Linux packs a device's numbers in 32 bits (new_encode_dev).
            device: minor & 0xff | major << 8 | (minor & !0xff) << 12,
            block_size: stat.st_blksize as u32,
        }
    }

    fn writable(&self) -> Answer<()> {
        if self.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    fn file(&self, handle: u64) -> Answer<&File> {
        self.handles.get(&handle).map(|handle| &handle.file).ok_or(Errno::BADF)
    }

    fn keep(&mut self, file: OwnedFd, folder: bool) -> Answer<Opened> {
        if self.handles.len() >= self.handles_max {
            return Err(Errno::NFILE);
        }
        let handle = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(handle, Handle { file: file.into(), folder });
        Ok(Opened { handle, keep: self.lasting == LONG, stream: false })
    }

    /// Opens the file of a node for more than naming it.
    fn reopen(&mut self, node: u64, flags: OFlags) -> Answer<OwnedFd> {
        self.nodes.check_open(node)?;
        let wanted = if flags.contains(OFlags::DIRECTORY) { libc::S_IFDIR } else { libc::S_IFREG };
        if self.nodes.kind(node)? != wanted {
            return Err(Errno::ACCES);
        }
        let fd = self.nodes.fd(node)?;
        let name = fd.as_raw_fd().to_string();
        rustix::fs::openat(&self.descriptors, name, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
            .map_err(errno)
    }

    /// The node of what was just made, with the mode and owner that the guest wants.
    fn made(&mut self, parent: u64, name: Name, mode: Option<u32>, owner: Owner) -> Answer<Entry> {
        let (node, mut stat) = self.nodes.look_up(parent, name)?;
        let adjusted = self.adjust(node, &stat, mode, owner);
        if adjusted == Ok(true) {
            stat = rustix::fs::fstat(self.nodes.fd(node)?).map_err(errno)?;
        }
        if let Err(error) = adjusted {
            self.nodes.forget(node, 1);
            return Err(error);
        }
        Ok(Entry { node, attributes: self.attributes_of(&stat) })
    }

    /// Says whether there was something to do: this process's umask counts for nothing.
    fn adjust(&mut self, node: u64, stat: &Stat, mode: Option<u32>, owner: Owner) -> Answer<bool> {
        let fd = self.nodes.fd(node)?;
        let gives = self.may_give && (owner.user, owner.group) != (stat.st_uid, stat.st_gid);
        if gives {
            let (user, group) = (Uid::from_raw(owner.user), Gid::from_raw(owner.group));
            rustix::fs::chownat(&fd, "", Some(user), Some(group), AtFlags::EMPTY_PATH).map_err(errno)?;
        }
        // A folder may have passed its group's bit on.
        let wanted = mode.map(|mode| mode & 0o7777 | stat.st_mode & libc::S_ISGID);
        let Some(wanted) = wanted.filter(|wanted| gives || stat.st_mode & 0o7777 != *wanted) else { return Ok(gives) };
        self.set_mode(&fd, wanted)?;
        Ok(true)
    }

    fn set_mode(&self, fd: &OwnedFd, mode: u32) -> Answer<()> {
        let name = fd.as_raw_fd().to_string();
        rustix::fs::chmodat(&self.descriptors, name, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(errno)
    }

    fn set_owner(&self, fd: &OwnedFd, stat: &Stat, change: &Change) -> Answer<()> {
        let (mut user, mut group) = (change.user, change.group);
        if let Some(me) = self.as_root {
            // What the guest takes for root's is ours.
            user = user.filter(|user| !(*user == 0 && stat.st_uid == me.user));
            group = group.filter(|group| !(*group == 0 && stat.st_gid == me.group));
        }
        if user.is_none() && group.is_none() {
            return Ok(());
        }
        // All ones mean to leave it.
        if [user, group].contains(&Some(u32::MAX)) {
            return Err(Errno::INVAL);
        }
        let (user, group) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
        rustix::fs::chownat(fd, "", user, group, AtFlags::EMPTY_PATH).map_err(errno)
    }

    fn set_times(&self, fd: &OwnedFd, link: bool, change: &Change) -> Answer<()> {
        let time = |new: Option<NewTime>| match new {
            None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
            Some(NewTime::Now) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
            Some(NewTime::At(time)) => Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() },
        };
        let times = Timestamps { last_access: time(change.accessed), last_modification: time(change.modified) };
        let result = if link {
            rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH)
        } else {
            rustix::fs::utimensat(&self.descriptors, fd.as_raw_fd().to_string(), &times, AtFlags::empty())
        };
        result.map_err(errno)
    }
}

/// Most descriptors that this process may have; it takes as many as it is given.
fn descriptor_limit() -> u64 {
    let Rlimit { current, maximum } = rustix::process::getrlimit(Resource::Nofile);
    // Without a limit the kernel has one of its own.
    let most = maximum.unwrap_or(1 << 20);
    let raised = Rlimit { current: Some(most), maximum };
    if rustix::process::setrlimit(Resource::Nofile, raised).is_ok() { most } else { current.unwrap_or(most) }
}

/// What of open(2)'s flags a guest decides on here.
fn open_flags(flags: u32) -> OFlags {
    let passed = (OFlags::APPEND | OFlags::TRUNC).bits();
    OFlags::from_bits_retain(access_mode(flags) | flags & passed)
}

impl Files for Folder {
    fn lasting(&self) -> Duration {
        self.lasting
    }

    fn reset(&mut self) {
        self.handles.clear();
        self.nodes.clear();
    }

    fn lookup(&mut self, parent: u64, name: Name) -> Answer<Entry> {
        let (node, stat) = self.nodes.look_up(parent, name)?;
        Ok(Entry { node, attributes: self.attributes_of(&stat) })
    }

    fn forget(&mut self, node: u64, count: u64) {
        self.nodes.forget(node, count);
    }

    fn attributes(&mut self, node: u64, handle: Option<u64>) -> Answer<Attributes> {
        let stat = match handle {
            Some(handle) => rustix::fs::fstat(self.file(handle)?),
            None => rustix::fs::fstat(self.nodes.fd(node)?),
        };
        Ok(self.attributes_of(&stat.map_err(errno)?))
    }

    fn change(&mut self, node: u64, change: &Change) -> Answer<Attributes> {
        self.writable()?;
        self.nodes.check_open(node)?;
        let fd = self.nodes.fd(node)?;
        let link = self.nodes.kind(node)? == libc::S_IFLNK;
        let stat = rustix::fs::fstat(&fd).map_err(errno)?;
        // Giving a file away takes bits of its mode, which is to be as asked for then.
        self.set_owner(&fd, &stat, change)?;
        if let Some(mode) = change.mode {
            if link {
                return Err(OPNOTSUPP);
            }
            self.set_mode(&fd, mode)?;
        }
        if let Some(size) = change.size {
            let truncate = |file: &OwnedFd| rustix::fs::ftruncate(file, size).map_err(errno);
            match change.handle {
                Some(handle) => rustix::fs::ftruncate(self.file(handle)?, size).map_err(errno)?,
                None => truncate(&self.reopen(node, OFlags::WRONLY)?)?,
            }
        }
        if change.accessed.is_some() || change.modified.is_some() {
            self.set_times(&fd, link, change)?;
        }
        self.attributes(node, None)
    }

    fn read_link(&mut self, node: u64) -> Answer<Vec<u8>> {
        self.nodes.check_open(node)?;
        let fd = self.nodes.fd(node)?;
        rustix::fs::readlinkat(fd, "", Vec::new()).map(|target| target.into_bytes()).map_err(errno)
    }

    fn make(&mut self, parent: u64, name: Name, what: Make, owner: Owner) -> Answer<Entry> {
        self.writable()?;
        let folder = self.nodes.folder(parent)?;
        let mode = match what {
            Make::Folder { mode } => {
                rustix::fs::mkdirat(&folder, name.bytes(), Mode::from_raw_mode(mode)).map_err(errno)?;
                Some(mode)
            }
            Make::Link { target } => {
                rustix::fs::symlinkat(target, &folder, name.bytes()).map_err(errno)?;
                None
            }
            Make::Node { mode } => {
                let kind = FileType::from_raw_mode(mode);
                // A device would be the host's.
                if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
                    return Err(Errno::PERM);
                }
                let bits = Mode::from_raw_mode(mode);
                rustix::fs::mknodat(&folder, name.bytes(), kind, bits, 0).map_err(errno)?;
                Some(mode)
            }
        };
        self.made(parent, name, mode, owner)
    }

    fn link(&mut self, node: u64, parent: u64, name: Name) -> Answer<Entry> {
        self.writable()?;
        self.nodes.check_open(node)?;
        let (file, folder) = (self.nodes.fd(node)?, self.nodes.folder(parent)?);
        let old = file.as_raw_fd().to_string();
        rustix::fs::linkat(&self.descriptors, old, folder, name.bytes(), AtFlags::SYMLINK_FOLLOW).map_err(errno)?;
        self.lookup(parent, name)
    }

    fn remove(&mut self, parent: u64, name: Name, folder: bool) -> Answer<()> {
        self.writable()?;
        let above = self.nodes.folder(parent)?;
        let known = self.nodes.known(&above, name);
        let last = self.hold(known)?;
        let flags = if folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(above, name.bytes(), flags).map_err(errno)?;
        if let Some(known) = known {
            self.nodes.remove(known, last);
        }
        Ok(())
    }

    fn rename(&mut self, from: (u64, Name), to: (u64, Name), flags: u32) -> Answer<()> {
        self.writable()?;
        let flags = RenameFlags::from_bits_retain(flags);
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (self.nodes.folder(from.0)?, self.nodes.folder(to.0)?);
        let (moved, met) = (self.nodes.known(&old, from.1), self.nodes.known(&new, to.1));
        let last = self.hold(met)?;
        rustix::fs::renameat_with(old, from.1.bytes(), new, to.1.bytes(), flags).map_err(errno)?;
        match met {
            Some(met) if flags.contains(RenameFlags::EXCHANGE) => self.nodes.put(met, from.0, from.1),
            Some(met) if Some(met) != moved => self.nodes.remove(met, last),
            _ => {}
        }
        if let Some(moved) = moved {
            self.nodes.put(moved, to.0, to.1);
        }
        Ok(())
    }

    fn open(&mut self, node: u64, flags: u32, folder: bool) -> Answer<Opened> {
        let wanted = if folder { OFlags::DIRECTORY } else { open_flags(flags) };
        if wanted.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC | OFlags::APPEND) {
            self.writable()?;
        }
        let file = self.reopen(node, wanted)?;
        self.keep(file, folder)
    }

    fn create(&mut self, place: (u64, Name), mode: u32, flags: u32, owner: Owner) -> Answer<(Entry, Opened)> {
        self.writable()?;
        let (parent, name) = place;
        let folder = self.nodes.folder(parent)?;
        let exclusive = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // What is there already is opened as any other file.
        match rustix::fs::openat(folder, name.bytes(), open_flags(flags) | exclusive, Mode::from_raw_mode(mode)) {
            Ok(file) => {
                let entry = self.made(parent, name, Some(mode), owner)?;
                let opened = self.keep(file, false);
                opened.map(|opened| (entry, opened)).inspect_err(|_| self.nodes.forget(entry.node, 1))
            }
            Err(rustix::io::Errno::EXIST) if flags & OFlags::EXCL.bits() == 0 => {
                let entry = self.lookup(parent, name)?;
                let opened = self.open(entry.node, flags, false);
                opened.map(|opened| (entry, opened)).inspect_err(|_| self.nodes.forget(entry.node, 1))
            }
            Err(error) => Err(errno(error)),
        }
    }

    fn close(&mut self, handle: u64) -> Answer<()> {
        self.handles.remove(&handle).map(drop).ok_or(Errno::BADF)
    }

    fn read(&mut self, handle: u64, offset: u64, data: &Data) -> Answer<Option<u32>> {
        let read = memory::read_file_up_to(data.memory, data.pieces, self.file(handle)?, offset).map_err(code)?;
        Ok(Some(read as u32))
    }

    fn write(&mut self, handle: u64, offset: u64, data: &Data) -> Answer<Option<u32>> {
        self.writable()?;
        memory::write_file(data.memory, data.pieces, self.file(handle)?, offset).map_err(code)?;
        Ok(Some(data.pieces.iter().map(|piece| piece.length).sum()))
    }

    fn list(&mut self, handle: u64, offset: u64, room: usize) -> Answer<Vec<Listed>> {
        let handle = self.handles.get(&handle).filter(|handle| handle.folder).ok_or(Errno::BADF)?;
        rustix::fs::seek(&handle.file, SeekFrom::Start(offset)).map_err(errno)?;
        let mut buffer = vec![MaybeUninit::uninit(); LIST_CHUNK];
        let mut entries = rustix::fs::RawDir::new(&handle.file, &mut buffer);
        let (mut list, mut taken) = (vec![], 0);
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(errno)?;
            let name = entry.file_name().to_bytes().to_vec();
            taken += 24 + name.len();
            let kind = if entry.file_type() == FileType::Unknown { 0 } else { entry.file_type().as_raw_mode() };
            list.push(Listed { inode: entry.ino(), next: entry.next_entry_cookie(), kind, name });
            if taken >= room || entries.is_buffer_empty() {
                break;
            }
        }
        Ok(list)
    }

    fn sync(&mut self, handle: u64, data: bool) -> Answer<()> {
        let file = self.file(handle)?;
        if data { file.sync_data() } else { file.sync_all() }.map_err(code)
    }

    fn allocate(&mut self, handle: u64, mode: u32, offset: u64, length: u64) -> Answer<()> {
        self.writable()?;
        let mode = FallocateFlags::from_bits(mode).ok_or(OPNOTSUPP)?;
        rustix::fs::fallocate(self.file(handle)?, mode, offset, length).map_err(errno)
    }

    fn seek(&mut self, handle: u64, offset: u64, whence: u32) -> Answer<u64> {
        let to = match whence as i32 {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(self.file(handle)?, to).map_err(errno)
    }

    fn copy(&mut self, from: (u64, u64), to: (u64, u64), length: u64) -> Answer<u64> {
        self.writable()?;
        let (mut read, mut write) = (from.1, to.1);
        let length = length.min(COPY_MAX) as usize;
        let (source, target) = (self.file(from.0)?, self.file(to.0)?);
        rustix::fs::copy_file_range(source, Some(&mut read), target, Some(&mut write), length)
            .map(|copied| copied as u64)
            .map_err(errno)
    }

    fn statistics(&mut self, node: u64) -> Answer<Statistics> {
        // The root where the node is not found any more: df asks of whole file systems.
        let fd = self.nodes.fd(node).unwrap_or_else(|_| self.root.clone());
        let of = rustix::fs::fstatvfs(fd).map_err(errno)?;
        Ok(Statistics {
            blocks: of.f_blocks,
            free: of.f_bfree,
            available: of.f_bavail,
            files: of.f_files,
            files_free: of.f_ffree,
            block_size: of.f_bsize as u32,
            name_max: of.f_namemax as u32,
            fragment_size: of.f_frsize as u32,
        })
    }
}

impl Folder {
    /// Makes sure of the descriptor of a node whose name is about to go. Says whether it is its last name.
    fn hold(&mut self, node: Option<u64>) -> Answer<bool> {
        let Some(node) = node else { return Ok(false) };
        let stat = rustix::fs::fstat(self.nodes.fd(node)?).map_err(errno)?;
        Ok(stat.st_nlink <= 1 || stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
    }
}

/// The host's error, for the guest.
fn code(error: std::io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests;
