//! Disk images: files and block devices of the host that hold a guest's disk, as they are (`raw`) or as `qcow2`.
//!
//! An image is locked as long as it is open (flock(2)), so that no two VMs write to one; readers share it. What the guest
//! flushes is on the host's disk; what it does not flush is in the host's page cache, and survives this process, if the image
//! is raw.
//!
//! [`DiskModel`] is the device. What it does to an image is behind [`storage::Storage`]: [`raw`], by way of [`ring`], and [`qcow2`].

mod model;
mod options;
mod qcow2;
mod raw;
mod ring;
mod rush;
mod storage;

use crate::config::{DISKS_MAX, Disk, Format};
use crate::{Error, Result};
use anyvisor_devices::virtio::block::{Geometry, SECTOR};
pub use model::DiskModel;
use raw::{Direct, Raw};
use serde::{Deserialize, Serialize};
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use storage::Storage;

/// What images of formats that are not supported begin with.
const FOREIGN: [(&[u8], &str); 2] = [(b"KDMV", "vmdk"), (b"vhdxfile", "vhdx")];
/// Most queues of a disk: more than there are cores to fill them help nobody.
const QUEUES_MAX: u32 = 8;

/// Whether this process can use io_uring, or why not.
///
/// # Errors
/// The host's.
pub fn io_uring() -> io::Result<()> {
    ring::Ring::new().map(drop)
}

/// An open image: what tells whether it has changed.
struct Image {
    path: PathBuf,
    file: File,
    /// As it was found.
    found: Stamp,
}

/// What tells whether an image is still what it was when a VM was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    pub length: u64,
    /// Nanoseconds since 1970 at which it was last written.
    pub modified: i64,
}

impl Stamp {
    /// Of a file that is open.
    fn of(file: &File) -> io::Result<Stamp> {
        let length = (&*file).seek(SeekFrom::End(0))?;
        Ok(Stamp::new(length, &file.metadata()?))
    }

    /// Of a file of `length` bytes with this metadata.
    pub fn new(length: u64, data: &Metadata) -> Stamp {
        Stamp { length, modified: data.mtime().saturating_mul(1_000_000_000).saturating_add(data.mtime_nsec()) }
    }
}

/// Opens a file, as a FIFO too without waiting for somebody at its other end.
pub(crate) fn open_file(path: &Path, read_only: bool) -> io::Result<File> {
    open_with(path, read_only, 0)
}

fn open_with(path: &Path, read_only: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | flags).open(path)
}

/// Opens and locks a file that an image refers to.
fn open_referred(path: &Path, read_only: bool, direct: bool) -> io::Result<File> {
    let file = open_with(path, read_only, if direct { libc::O_DIRECT } else { 0 })?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a block device"));
    }
    if !lock(&file, read_only)? {
        return Err(io::Error::other("it is written by another program, or this one"));
    }
    Ok(file)
}

/// Locks a file, for readers together or for one writer alone; `false` if others have it locked.
pub(crate) fn lock(file: &File, read_only: bool) -> io::Result<bool> {
    match if read_only { file.try_lock_shared() } else { file.try_lock() } {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Opens and locks the images of `disks`, for a machine with so many vCPUs.
///
/// # Errors
/// [`Error::User`]: which image cannot be used, why, and what to do.
pub fn open(disks: &[Disk], cpus: u32) -> Result<Vec<DiskModel>> {
    if disks.len() > DISKS_MAX {
        return Err(Error::user(format!("--disk is given {} times; a machine takes {DISKS_MAX}", disks.len())));
    }
    disks.iter().enumerate().map(|(n, disk)| open_one(disk, n, cpus.clamp(1, QUEUES_MAX) as u16)).collect()
}

/// Opens and locks the image of a disk that comes to `slot` while the machine runs.
///
/// # Errors
/// As for [`open`].
pub fn open_another(disk: &Disk, slot: usize, cpus: u32) -> Result<DiskModel> {
    // Its name is none of the first ones'.
    open_one(disk, DISKS_MAX + slot, cpus.clamp(1, QUEUES_MAX) as u16)
}

fn open_one(disk: &Disk, n: usize, queues: u16) -> Result<DiskModel> {
    let shown = disk.path.display();
    let trouble = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !disk.read_only => {
                format!("; to read it only, write --disk {shown},ro")
            }
            _ => "; check --disk".into(),
        };
        Error::user(format!("cannot open disk '{shown}': {error}{hint}"))
    };
    let file = open_file(&disk.path, disk.read_only).map_err(trouble)?;
    let kind = file.metadata().map_err(trouble)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::user(format!("disk '{shown}' is neither a file nor a block device; check --disk")));
    }
    if !lock(&file, disk.read_only).map_err(trouble)? {
        let what = if disk.read_only { "written by another program" } else { "in use by another program" };
        return Err(Error::user(format!(
            "disk '{shown}' is {what}; end that, or have both use it with --disk {shown},ro"
        )));
    }
    if disk.format.is_none() {
        check_format(&file, disk).map_err(trouble)??;
    }
    let found = Stamp::of(&file).map_err(trouble)?;
    let image = Image { path: disk.path.clone(), file: file.try_clone().map_err(trouble)?, found };
    let (storage, size, block) = match disk.format {
        Some(Format::Qcow2) => open_qcow2(disk, file)?,
        Some(Format::Raw) | None => open_raw(disk, file, found.length)?,
    };
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(Error::user(format!(
            "disk '{shown}' is {size} bytes long, and a disk is a multiple of {SECTOR}; make it one: truncate -s \
             %{SECTOR} FILE, or qemu-img resize"
        )));
    }
    let geometry = Geometry { sectors: size / SECTOR, read_only: disk.read_only, block, queues };
    Ok(DiskModel::new(n, image, storage, geometry, [disk.iops, disk.bandwidth]))
}

/// An image's contents, and bytes of the disk and of a block.
type Opened = (Box<dyn Storage>, u64, u32);

fn open_raw(disk: &Disk, file: File, size: u64) -> Result<Opened> {
    let shown = disk.path.display();
    let direct = disk.direct.then(|| Direct::open(&disk.path, disk.read_only)).transpose().map_err(|error| {
        Error::user(format!("disk '{shown}' cannot be used past the page cache ({error}); leave direct out"))
    })?;
    let block = direct.as_ref().map_or(SECTOR as u32, Direct::block);
    let raw = Raw::new(file, disk.read_only, direct, &format!("disk '{shown}'"));
    Ok((Box::new(raw), size, block))
}

fn open_qcow2(disk: &Disk, file: File) -> Result<Opened> {
    let shown = disk.path.display();
    let trouble = |error: io::Error| {
        Error::user(format!("disk '{shown}' cannot be used as qcow2: {error}; check it: qemu-img check '{shown}'"))
    };
    let file = if disk.direct {
        // The lock stays with the image's other descriptor.
        open_with(&disk.path, disk.read_only, libc::O_DIRECT).map_err(|error| {
            Error::user(format!("disk '{shown}' cannot be used past the page cache ({error}); leave direct out"))
        })?
    } else {
        file
    };
    let qcow2 = qcow2::Qcow2::open(file, &disk.path, disk.read_only, disk.direct).map_err(trouble)?;
    let (size, block) = (qcow2.size(), qcow2.block().max(SECTOR as u32));
    Ok((Box::new(qcow2), size, block))
}

/// Refuses an image of which nobody has said what it is if it looks like something else than a raw one. It is not taken for that
/// either: a guest could make it look so, and have the host open what it names.
fn check_format(file: &File, disk: &Disk) -> io::Result<Result<()>> {
    let shown = disk.path.display();
    let mut head = [0; 8];
    let read = file.read_at(&mut head, 0)?;
    let head = &head[..read];
    if head.starts_with(qcow2::MAGIC) {
        return Ok(Err(Error::user(format!(
            "disk '{shown}' looks like a qcow2 image; write --disk {shown},format=qcow2 to use it so, or format=raw to take \
             it as it is"
        ))));
    }
    let foreign = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic));
    Ok(foreign.map_or(Ok(()), |(_, format)| {
        Err(Error::user(format!(
            "disk '{shown}' looks like a {format} image, which is not supported; convert it (qemu-img convert -O \
             qcow2), or write --disk {shown},format=raw to take it as it is"
        )))
    }))
}

impl Drop for Image {
    /// Others may use it at once: the kernel closes what io_uring has open only later.
    fn drop(&mut self) {
        let _ = self.file.unlock();
    }
}

impl Image {
    /// How it is now.
    fn stamp(&self) -> io::Result<Stamp> {
        Stamp::of(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn disk(path: &Path, read_only: bool) -> Disk {
        Disk { read_only, ..Disk::new(path) }
    }

    fn refused(disk: &Disk) -> String {
        match open(std::slice::from_ref(disk), 1) {
            Err(Error::User(message)) => {
                assert!(!message.contains('\n'), "{message}");
                message
            }
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("{disk:?} was taken"),
        }
    }

    #[test]
    fn what_cannot_be_a_disk_is_refused() {
        let short = file(&[0; 700]);
        assert!(refused(&disk(short.path(), false)).contains("700 bytes"));
        assert!(refused(&disk(file(b"").path(), false)).contains("0 bytes"));
        assert!(refused(&disk(Path::new("/tmp"), true)).contains("neither a file"));
        assert!(refused(&disk(Path::new("/dev/null"), false)).contains("neither a file"));
        assert!(refused(&disk(Path::new("/nonexistent/disk"), false)).contains("--disk"));
        for (magic, format) in FOREIGN.into_iter().chain([(qcow2::MAGIC, "qcow2")]) {
            let mut bytes = magic.to_vec();
            bytes.resize(512, 0);
            let image = file(&bytes);
            assert!(refused(&disk(image.path(), false)).contains(format));
            let taken = Disk { format: Some(Format::Raw), ..disk(image.path(), false) };
            assert_eq!(open(&[taken], 1).unwrap()[0].geometry().sectors, 1);
            let as_qcow2 = Disk { format: Some(Format::Qcow2), ..disk(image.path(), false) };
            assert!(refused(&as_qcow2).contains("cannot be used as qcow2"));
        }
    }

    #[test]
    fn writers_are_alone_and_readers_share() {
        let image = file(&[0; 512]);
        let (write, read) = (disk(image.path(), false), disk(image.path(), true));
        let writer = open(std::slice::from_ref(&write), 1).unwrap();
        assert!(refused(&write).contains("in use"));
        assert!(refused(&read).contains("written"));
        drop(writer);
        let readers = open(&[read.clone(), read.clone()], 1).unwrap();
        assert!(refused(&write).contains("in use"));
        drop(readers);
        open(&[write], 1).unwrap();
    }

    #[test]
    fn a_disk_has_a_queue_for_each_vcpu_up_to_a_limit() {
        let image = file(&[0; 512]);
        let queues = |cpus| open(&[disk(image.path(), true)], cpus).unwrap()[0].geometry().queues;
        assert_eq!([queues(1), queues(3), queues(64)], [1, 3, 8]);
    }
}
