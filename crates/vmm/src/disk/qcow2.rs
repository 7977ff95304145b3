//! qcow2 images and the images behind them, by the crate `imago`.
//!
//! `imago` keeps an image's tables in memory. A flush writes them, first what says that clusters are taken and then what refers to
//! them, and then makes the file last; so what was written before a flush is in the file after it, also if this process is killed.
//! Killed in between, an image at worst says of some clusters that they are taken, and nothing refers to them.
//!
//! Requests are carried out one after the other. Every file of the chain is locked as long as it is open: the top for its writer
//! alone, those behind it for readers.

use super::storage::Storage;
use anyvisor_devices::virtio::block::Action;
use anyvisor_devices::virtio::queue::Piece;
use imago::file::File as ImageFile;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, StorageOpenOptions};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// What such an image begins with.
pub const MAGIC: &[u8] = b"QFI\xfb";
/// Most images in a chain: more are a loop, or a mistake.
const CHAIN_MAX: u32 = 64;
/// Bytes of zeros that are written at once.
const ZEROS: u64 = 1 << 20;

/// A qcow2 image.
pub struct Qcow2 {
    image: FormatAccess<ImageFile>,
    read_only: bool,
}

impl Qcow2 {
    /// The image in `file`, which is open and locked, and was found at `path`.
    ///
    /// # Errors
    /// It is none, or one behind it cannot be used: in words that follow the image's name.
    pub fn open(file: File, path: &Path, read_only: bool, direct: bool) -> io::Result<Qcow2> {
        let options = StorageOpenOptions::new().filename(path).write(!read_only).direct(direct);
        let file = ImageFile::from_open_file(file, options)?;
        let options = StorageOpenOptions::new().direct(direct);
        let builder = imago::qcow2::Qcow2::<ImageFile>::builder(file).write(!read_only).storage_open_options(options);
        let image = FormatAccess::new(builder.open(Gate { left: CHAIN_MAX })?);
        Ok(Qcow2 { image, read_only })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Bytes of the blocks that a guest had best read and write.
    pub fn block(&self) -> u32 {
        self.image.req_align() as u32
    }

    fn transfer(&mut self, action: Action, data: &[Piece], memory: &GuestMemoryMmap) -> io::Result<()> {
        let slices = slices(data, memory)?;
        match action {
            Action::Read { offset } => {
                let (vector, _guard) = IoVectorMut::from_volatile_slice(&slices);
                self.image.readv(vector, offset)
            }
            Action::Write { offset, through } => {
                let (vector, _guard) = IoVector::from_volatile_slice(&slices);
                self.image.writev(vector, offset)?;
                if through { self.flush() } else { Ok(()) }
            }
            Action::Flush => self.flush(),
            Action::Discard { offset, length } => supported(self.image.discard_to_any(offset, length)).map(drop),
            Action::WriteZeroes { offset, length, unmap } => self.write_zeroes(offset, length, unmap),
            Action::Id | Action::Refuse(_) => Ok(()),
        }
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let done = match unmap {
            true => supported(self.image.discard_to_zero(offset, length))?,
            false => supported(self.image.write_zeroes(offset, length))?,
        };
        // Images of version 2 have no zeros but written ones.
        let (mut at, end) = if done { (0, 0) } else { (offset, offset + length) };
        let zeros = vec![0; (end - at).min(ZEROS) as usize];
        while at < end {
            let part = (end - at).min(ZEROS);
            self.image.write(&zeros[..part as usize], at)?;
            at += part;
        }
        Ok(())
    }
}

/// Whether it was done, or cannot be in such an image.
fn supported(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
        Err(error) => Err(error),
    }
}

fn slices<'a>(data: &[Piece], memory: &'a GuestMemoryMmap) -> io::Result<Vec<VolatileSlice<'a>>> {
    let slice = |piece: &Piece| memory.get_slice(GuestAddress(piece.gpa), piece.length as usize);
    data.iter().map(slice).collect::<Result<_, _>>().map_err(io::Error::other)
}

impl Storage for Qcow2 {
    fn begin(&mut self, _tag: u16, action: Action, data: &[Piece], memory: &GuestMemoryMmap) -> Option<io::Result<()>> {
        Some(self.transfer(action, data, memory))
    }

    fn progress(&mut self, _ended: &mut Vec<(u16, io::Result<()>)>, _wait: bool) -> io::Result<()> {
        Ok(())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.image.flush()?;
        self.image.sync()
    }
}

/// Opens and locks what images refer to.
struct Gate {
    left: u32,
}

impl ImplicitOpenGate<ImageFile> for Gate {
    fn open_format<F: FormatDriverBuilder<ImageFile>>(&mut self, builder: F) -> io::Result<FormatAccess<ImageFile>> {
        let left = self.left.checked_sub(1).ok_or_else(|| io::Error::other("too many images behind each other"))?;
        Ok(FormatAccess::new(builder.open(Gate { left })?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<ImageFile> {
        let path = options.get_filename().ok_or_else(|| io::Error::other("a file without a name"))?;
        let file = super::open_referred(path, !options.get_writable(), options.get_direct())?;
        ImageFile::from_open_file(file, options)
    }
}
