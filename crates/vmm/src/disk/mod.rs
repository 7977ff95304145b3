//! Disk images: files and block devices of the host that hold a guest's disk, as they are (`raw`).
//!
//! An image is locked as long as it is open (flock(2)), so that no two VMs write to one; readers share it. Reading and
//! writing copy between the file and guest RAM without a buffer in between. Nothing is cached here: what the guest
//! flushes is on the host's disk, what it does not flush is in the host's page cache, and survives this process.

mod model;

use crate::config::{DISKS_MAX, Disk, Format};
use crate::{Error, Result, memory};
use anyvisor_devices::virtio::block::{ID_SIZE, SECTOR, Storage};
use anyvisor_devices::virtio::queue::Piece;
pub use model::DiskModel;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vm_memory::GuestMemoryMmap;

/// What images of formats that are not supported begin with.
const FOREIGN: [(&[u8], &str); 3] = [(b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx")];

/// An open image.
pub struct Image {
    path: PathBuf,
    file: File,
    sectors: u64,
    read_only: bool,
    id: [u8; ID_SIZE],
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
    /// Of a file of `length` bytes with this metadata.
    pub fn new(length: u64, data: &Metadata) -> Stamp {
        Stamp { length, modified: data.mtime().saturating_mul(1_000_000_000).saturating_add(data.mtime_nsec()) }
    }
}

/// Opens a file, as a FIFO too without waiting for somebody at its other end.
pub(crate) fn open_file(path: &Path, read_only: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Locks a file, for readers together or for one writer alone; `false` if others have it locked.
pub(crate) fn lock(file: &File, read_only: bool) -> io::Result<bool> {
    match if read_only { file.try_lock_shared() } else { file.try_lock() } {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Opens and locks the images of `disks`.
///
/// # Errors
/// [`Error::User`]: which image cannot be used, why, and what to do.
pub fn open(disks: &[Disk]) -> Result<Vec<Image>> {
    if disks.len() > DISKS_MAX {
        return Err(Error::user(format!("--disk is given {} times; a machine takes {DISKS_MAX}", disks.len())));
    }
    disks.iter().enumerate().map(|(n, disk)| Image::open(disk, n)).collect()
}

impl Image {
    fn open(disk: &Disk, n: usize) -> Result<Image> {
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
        let mut file = open_file(&disk.path, disk.read_only).map_err(trouble)?;
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
        let length = file.seek(SeekFrom::End(0)).map_err(trouble)?;
        if disk.format.is_none()
            && let Some(format) = foreign(&file).map_err(trouble)?
        {
            return Err(Error::user(format!(
                "disk '{shown}' looks like a {format} image, which is not supported; convert it (qemu-img convert -O \
                 raw), or write --disk {shown},format=raw to take it as it is"
            )));
        }
        if length == 0 || !length.is_multiple_of(SECTOR) {
            return Err(Error::user(format!(
                "disk '{shown}' is {length} bytes long, and a disk is a multiple of {SECTOR}; make it one: truncate \
                 -s %{SECTOR} FILE"
            )));
        }
        let mut id = [0; ID_SIZE];
        let name = format!("anyvisor-disk{n}");
        id[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Image { path: disk.path.clone(), file, sectors: length / SECTOR, read_only: disk.read_only, id })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How long it is, and when it was written last.
    ///
    /// # Errors
    /// The host's.
    pub fn stamp(&self) -> io::Result<Stamp> {
        Ok(Stamp::new(self.sectors * SECTOR, &self.file.metadata()?))
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

/// The format that the file's first bytes say it has, if that is one that cannot be used.
fn foreign(file: &File) -> io::Result<Option<&'static str>> {
    let mut head = [0; 8];
    let read = file.read_at(&mut head, 0)?;
    Ok(FOREIGN.iter().find(|(magic, _)| head[..read].starts_with(magic)).map(|(_, format)| *format))
}

/// Whether the host cannot do this for such a file.
fn is_unsupported(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV)
}

impl Storage for Image {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn id(&self) -> [u8; ID_SIZE] {
        self.id
    }

    fn read(&self, memory: &GuestMemoryMmap, pieces: &[Piece], offset: u64) -> io::Result<()> {
        memory::read_file(memory, pieces, &self.file, offset)
    }

    fn write(&self, memory: &GuestMemoryMmap, pieces: &[Piece], offset: u64) -> io::Result<()> {
        memory::write_file(memory, pieces, &self.file, offset)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
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
}

impl std::str::FromStr for Disk {
    type Err = String;

    /// A path, and options behind commas: `ro`, `format=raw`.
    fn from_str(text: &str) -> std::result::Result<Disk, String> {
        let mut parts = text.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err("a disk has no file; write PATH, PATH,ro or PATH,format=raw".into());
        }
        let mut disk = Disk { path: path.into(), read_only: false, format: None };
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => disk.read_only = true,
                Some(("format", "raw")) => disk.format = Some(Format::Raw),
                Some(("format", other)) => {
                    return Err(format!("disk format '{other}' is not supported; convert the image to raw"));
                }
                _ => return Err(format!("unknown option '{part}' of a disk; use ro or format=raw")),
            }
        }
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn disk(path: &Path, read_only: bool) -> Disk {
        Disk { path: path.to_owned(), read_only, format: None }
    }

    fn refused(disk: &Disk) -> String {
        match open(std::slice::from_ref(disk)) {
            Err(Error::User(message)) => {
                assert!(!message.contains('\n'), "{message}");
                message
            }
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("{disk:?} was taken"),
        }
    }

    #[test]
    fn options_parse() {
        let disk = |read_only, format| Ok(Disk { path: "a b".into(), read_only, format });
        assert_eq!("a b".parse(), disk(false, None));
        assert_eq!("a b,ro".parse(), disk(true, None));
        assert_eq!("a b,format=raw,ro".parse(), disk(true, Some(Format::Raw)));
        for (bad, part) in [("", "no file"), (",ro", "no file"), ("a,rw", "'rw'"), ("a,format=qcow2", "'qcow2'")] {
            let message = bad.parse::<Disk>().unwrap_err();
            assert!(message.contains(part), "{message}");
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
        for (magic, format) in FOREIGN {
            let mut bytes = magic.to_vec();
            bytes.resize(512, 0);
            let image = file(&bytes);
            assert!(refused(&disk(image.path(), false)).contains(format));
            let taken = Disk { format: Some(Format::Raw), ..disk(image.path(), false) };
            assert_eq!(open(&[taken]).unwrap()[0].sectors(), 1);
        }
    }

    #[test]
    fn writers_are_alone_and_readers_share() {
        let image = file(&[0; 512]);
        let (write, read) = (disk(image.path(), false), disk(image.path(), true));
        let writer = open(std::slice::from_ref(&write)).unwrap();
        assert!(refused(&write).contains("in use"));
        assert!(refused(&read).contains("written"));
        drop(writer);
        let readers = open(&[read.clone(), read.clone()]).unwrap();
        assert!(refused(&write).contains("in use"));
        drop(readers);
        open(&[write]).unwrap();
    }

    #[test]
    fn bytes_go_between_file_and_memory() {
        let image = file(&(0..4096u32).map(|n| (n / 512) as u8).collect::<Vec<_>>());
        let images = open(&[disk(image.path(), false)]).unwrap();
        let image = &images[0];
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let pieces = [Piece { gpa: 0x1000, length: 100 }, Piece { gpa: 0x3000, length: 924 }];
        image.read(&memory, &pieces, 1024).unwrap();
        let byte = |gpa| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
        assert_eq!((byte(0x1000), byte(0x1063), byte(0x1064)), (2, 2, 0));
        assert_eq!((byte(0x3000), byte(0x3000 + 411), byte(0x3000 + 412), byte(0x3000 + 923)), (2, 2, 3, 3));
        image.write(&memory, &pieces, 0).unwrap();
        let mut start = [0; 1024];
        image.file.read_exact_at(&mut start, 0).unwrap();
        assert_eq!((start[0], start[511], start[512], start[1023]), (2, 2, 3, 3));
        image.write_zeroes(512, 512, true).unwrap();
        image.write_zeroes(1024, 512, false).unwrap();
        image.fill(1536, 512).unwrap();
        image.discard(2048, 512).unwrap();
        image.flush().unwrap();
        let mut rest = [9; 1536];
        image.file.read_exact_at(&mut rest, 512).unwrap();
        assert_eq!(rest, [0; 1536]);
        // Somebody has cut it.
        image.file.set_len(512).unwrap();
        assert_eq!(image.read(&memory, &pieces, 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(image.stamp().unwrap().length, 4096);
    }
}
