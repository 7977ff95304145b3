//! Raw images: files and block devices that hold a disk sector by sector.
//!
//! Transfers go between the file and guest RAM without a buffer in between, asynchronously by io_uring, or one after the other where
//! the host has none for us. With `direct` they go around the host's page cache, as far as they are aligned for it: those that are
//! not go through the cache, which Linux keeps in step.

use super::ring::{Kind, Ring};
use super::storage::Storage;
use crate::memory;
use anyvisor_devices::virtio::block::{Action, SECTOR};
use anyvisor_devices::virtio::queue::Piece;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use vm_memory::GuestMemoryMmap;

/// Bytes to which Linux aligns when it does not say more.
const USUAL_ALIGNMENT: u32 = 4096;

/// A raw image.
pub struct Raw {
    file: File,
    read_only: bool,
    direct: Option<Direct>,
    ring: Option<Ring>,
}

/// The same file once more, without the page cache.
pub struct Direct {
    file: File,
    /// What offsets and lengths, and addresses in memory, must be multiples of.
    offset: u32,
    memory: u32,
}

impl Direct {
    /// Opens `path`, which is open as `file`, without the page cache.
    ///
    /// # Errors
    /// The file system cannot do that.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Direct> {
        let flags = libc::O_DIRECT | libc::O_NONBLOCK;
        let file = File::options().read(true).write(!read_only).custom_flags(flags).open(path)?;
        let flags = rustix::fs::AtFlags::EMPTY_PATH;
        let told = rustix::fs::statx(&file, "", flags, rustix::fs::StatxFlags::DIOALIGN)
            .ok()
            .filter(|told| told.stx_mask & rustix::fs::StatxFlags::DIOALIGN.bits() != 0);
        let (offset, memory) = match told {
            // It says that there is no such thing for this file.
            Some(told) if told.stx_dio_offset_align == 0 => return Err(Errno::INVAL.into()),
            Some(told) => (told.stx_dio_offset_align, told.stx_dio_mem_align),
            // Linux before 6.1.
            None => (USUAL_ALIGNMENT, USUAL_ALIGNMENT),
        };
        Ok(Direct { file, offset, memory: memory.max(1) })
    }

    /// Bytes of the blocks that a guest had best read and write.
    pub fn block(&self) -> u32 {
        self.offset.max(SECTOR as u32)
    }

    fn takes(&self, offset: u64, pieces: &[Piece], memory: &GuestMemoryMmap) -> bool {
        let lengths = pieces.iter().all(|piece| piece.length.is_multiple_of(self.offset.max(self.memory)));
        offset.is_multiple_of(self.offset.into())
            && lengths
            && memory::are_aligned(memory, pieces, self.memory as usize)
    }
}

impl Raw {
    /// On `file`, whose length is a multiple of the sector's. `name` is for messages.
    pub fn new(file: File, read_only: bool, direct: Option<Direct>, name: &str) -> Raw {
        let ring = Ring::new().inspect_err(|error| {
            tracing::warn!("io_uring cannot be used here ({error}): {name} takes one request after the other");
        });
        Raw { file, read_only, direct, ring: ring.ok() }
    }

    /// Without io_uring, as on a host that refuses it.
    #[cfg(test)]
    pub fn without_ring(self) -> Raw {
        Raw { ring: None, ..self }
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, offset, length) {
            // To keep it is one way to forget it.
            Err(error) if !is_unsupported(error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let kind = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match rustix::fs::fallocate(&self.file, kind | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => Ok(()),
            Err(error) if is_unsupported(error) => self.fill(offset, length),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes zeros where the file cannot be told to have some.
    fn fill(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        let zeros = vec![0; length.min(1 << 20) as usize];
        while length > 0 {
            let part = length.min(zeros.len() as u64);
            self.file.write_all_at(&zeros[..part as usize], offset)?;
            (offset, length) = (offset + part, length - part);
        }
        Ok(())
    }
}

/// Whether the host cannot do this for such a file.
fn is_unsupported(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV)
}

impl Storage for Raw {
    fn begin(&mut self, tag: u16, action: Action, data: &[Piece], memory: &GuestMemoryMmap) -> Option<io::Result<()>> {
        let (kind, offset) = match action {
            Action::Read { .. } | Action::Write { .. } if data.is_empty() => return Some(Ok(())),
            Action::Read { offset } => (Kind::Read, offset),
            Action::Write { offset, through: false } => (Kind::Write, offset),
            Action::Write { offset, through: true } => (Kind::WriteThrough, offset),
            Action::Flush if self.read_only => return Some(Ok(())),
            Action::Flush => (Kind::Sync, 0),
            Action::Discard { offset, length } => return Some(self.discard(offset, length)),
            Action::WriteZeroes { offset, length, unmap } => return Some(self.write_zeroes(offset, length, unmap)),
            Action::Id | Action::Refuse(_) => return Some(Ok(())),
        };
        let direct = self.direct.as_ref().filter(|direct| direct.takes(offset, data, memory));
        let file = direct.map_or(&self.file, |direct| &direct.file);
        if let Some(ring) = &mut self.ring {
            return ring.start(tag, kind, file, offset, data, memory).err().map(Err);
        }
        Some(match kind {
            Kind::Read => memory::read_file(memory, data, file, offset),
            Kind::Write => memory::write_file(memory, data, file, offset),
            Kind::WriteThrough => memory::write_file(memory, data, file, offset).and_then(|()| file.sync_data()),
            Kind::Sync => file.sync_data(),
        })
    }

    fn progress(&mut self, ended: &mut Vec<(u16, io::Result<()>)>, wait: bool) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        if ring.is_idle() {
            return Ok(());
        }
        // What came to less than was asked for goes on.
        while {
            ring.enter(wait && ended.is_empty())?;
            ring.collect(ended);
            ring.has_more()
        } {}
        Ok(())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.ring.as_ref().map(Ring::as_fd)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }
}
