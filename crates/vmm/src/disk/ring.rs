//! Reads, writes and syncs of files that end later, by Linux' io_uring (io_uring(7)).
//!
//! **Idea.** What is started waits in the ring until [`Ring::enter`] gives all of it to the kernel in one system call; what has
//! ended is collected with [`Ring::collect`]. The ring's descriptor is readable when something has. A transfer that comes to
//! less than was asked for goes on by itself.
//!
//! **Invariants.** While a transfer is under way the kernel reads or writes guest RAM: the ring keeps the RAM mapped and the list of
//! ranges in place, and is not dropped before all has ended.
#![allow(unsafe_code)]

use crate::memory;
use anyvisor_devices::virtio::queue::Piece;
use io_uring::{IoUring, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use vm_memory::GuestMemoryMmap;

/// Transfers that can be under way at once.
pub const DEPTH: usize = 256;

/// What a transfer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    /// Writes, and then makes what is in the file last.
    WriteThrough,
    /// Makes what is in the file last.
    Sync,
}

/// One transfer.
struct Slot {
    tag: u16,
    kind: Kind,
    file: RawFd,
    offset: u64,
    /// What is left of it, from `first`.
    ranges: Vec<libc::iovec>,
    first: usize,
}

/// See the module.
pub struct Ring {
    ring: IoUring,
    slots: Vec<Option<Slot>>,
    under_way: usize,
    /// Not yet given to the kernel.
    waiting: usize,
    memory: Option<GuestMemoryMmap>,
}

// SAFETY: the pointers in `slots` are to guest RAM, which belongs to no thread; only the kernel follows them.
unsafe impl Send for Ring {}

impl Ring {
    /// # Errors
    /// The host has no io_uring, or lets this process not use it.
    pub fn new() -> io::Result<Ring> {
        let ring = IoUring::builder().build(DEPTH as u32)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed =
            [opcode::Read::CODE, opcode::Write::CODE, opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Ring { ring, slots: (0..DEPTH).map(|_| None).collect(), under_way: 0, waiting: 0, memory: None })
    }

    /// Starts a transfer between `pieces` and `file` from `offset` on. `tag`, below [`DEPTH`], names it: no other under way may
    /// have it. `file` must stay open until it has ended.
    ///
    /// # Errors
    /// A piece is not RAM.
    pub fn start(
        &mut self,
        tag: u16,
        kind: Kind,
        file: &File,
        offset: u64,
        pieces: &[Piece],
        memory: &GuestMemoryMmap,
    ) -> io::Result<()> {
        let ranges = memory::ranges(memory, pieces)?;
        self.memory.get_or_insert_with(|| memory.clone());
        let slot = &mut self.slots[usize::from(tag)];
        assert!(slot.is_none(), "two transfers have one tag");
        *slot = Some(Slot { tag, kind, file: file.as_raw_fd(), offset, ranges, first: 0 });
        self.under_way += 1;
        self.put(tag);
        Ok(())
    }

    /// Puts what is left of a transfer into the ring.
    fn put(&mut self, tag: u16) {
        let slot = self.slots[usize::from(tag)].as_ref().expect("a transfer under way");
        let entry = slot.entry().user_data(tag.into());
        // SAFETY: the entry's ranges are guest RAM, which `self.memory` keeps mapped and to which there are no Rust
        // references; their list is in the slot and is not touched until the kernel says that the transfer ended.
        let full = unsafe { self.ring.submission().push(&entry) }.is_err();
        assert!(!full, "the ring has an entry for each tag");
        self.waiting += 1;
    }

    /// Gives what was started to the kernel; with `wait`, returns when something has ended.
    ///
    /// # Errors
    /// The host's.
    pub fn enter(&mut self, wait: bool) -> io::Result<()> {
        let wait = wait && self.under_way > 0;
        while self.waiting > 0 || wait {
            match self.ring.submit_and_wait(usize::from(wait)) {
                Ok(taken) => {
                    self.waiting -= taken.min(self.waiting);
                    if wait || taken == 0 {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What has ended must be collected first.
                Err(error)
                    if error.raw_os_error() == Some(libc::EBUSY) || error.raw_os_error() == Some(libc::EAGAIN) =>
                {
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Adds to `ended` what has ended, by tag.
    pub fn collect(&mut self, ended: &mut Vec<(u16, io::Result<()>)>) {
        loop {
            let Some(entry) = self.ring.completion().next() else { return };
            let tag = entry.user_data() as u16;
            let place = &mut self.slots[usize::from(tag)];
            let slot = place.as_mut().expect("the kernel ends what is under way");
            match slot.advance(entry.result()) {
                None => self.put(tag),
                Some(result) => {
                    let tag = slot.tag;
                    *place = None;
                    self.under_way -= 1;
                    ended.push((tag, result));
                }
            }
        }
    }

    /// Whether something is to be given to the kernel.
    pub fn has_more(&self) -> bool {
        self.waiting > 0
    }

    pub fn is_idle(&self) -> bool {
        self.under_way == 0
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the ring's, which is borrowed as long as this is.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        while !self.is_idle() {
            if self.enter(true).is_err() {
                // Guest RAM must stay mapped for whatever the kernel still does.
                std::mem::forget(self.memory.take());
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            self.collect(&mut ended);
        }
    }
}

impl Slot {
    fn entry(&self) -> squeue::Entry {
        let file = types::Fd(self.file);
        let ranges = &self.ranges[self.first..];
        match (self.kind, ranges) {
            (Kind::Sync, _) | (_, []) => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            (Kind::Read, [range]) => {
                opcode::Read::new(file, range.iov_base.cast(), range.iov_len as u32).offset(self.offset).build()
            }
            (Kind::Read, ranges) => {
                opcode::Readv::new(file, ranges.as_ptr(), count(ranges)).offset(self.offset).build()
            }
            (_, [range]) => {
                opcode::Write::new(file, range.iov_base.cast(), range.iov_len as u32).offset(self.offset).build()
            }
            (_, ranges) => opcode::Writev::new(file, ranges.as_ptr(), count(ranges)).offset(self.offset).build(),
        }
    }

    /// Takes what the kernel says of a step. Returns how the transfer ended, if it has.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        match result {
            0.. if self.kind == Kind::Sync || self.first == self.ranges.len() => return Some(Ok(())),
            0 if self.kind == Kind::Read => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
            0 => return Some(Err(io::ErrorKind::WriteZero.into())),
            done @ 1.. => {
                self.first += memory::skip(&mut self.ranges[self.first..], done as usize);
                self.offset += done as u64;
            }
            error if [libc::EINTR, libc::EAGAIN].contains(&-error) => return None,
            error => return Some(Err(io::Error::from_raw_os_error(-error))),
        }
        let ended = self.first == self.ranges.len() && self.kind != Kind::WriteThrough;
        ended.then_some(Ok(()))
    }
}

/// Ranges of one step: Linux' UIO_MAXIOV at most.
fn count(ranges: &[libc::iovec]) -> u32 {
    ranges.len().min(memory::PIECES_MAX) as u32
}
