//! Guest RAM: host memory that is allocated as the guest touches it.
//!
//! Huge pages halve what a TLB miss of the host costs a guest under either engine: the engines reach RAM by the
//! addresses mapped here. RAM begins at a multiple of [`HUGE`] on the host, as it does in the guest, so that one huge
//! page of the host can also be one entry of KVM's page tables. See [`HugePages`] for what a user can ask for.
//!
//! Mappings take `unsafe`.
#![allow(unsafe_code)]

mod huge_file;

use crate::config::{HUGE, HugePages, show_size};
use crate::{Error, Result, layout};
use anyvisor_devices::virtio::queue::{Piece, total};
use anyvisor_engine::memory::{FILE_NAME, is_in_pool, ram_file};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
/// Most ranges that one system call takes: Linux' UIO_MAXIOV.
pub const PIECES_MAX: usize = 1024;
/// Attempts to get an aligned address: another thread may map something in between.
const ATTEMPTS: usize = 8;

/// Linux' switch for transparent huge pages (Documentation/admin-guide/mm/transhuge.rst).
pub const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// The same for those of files in memory.
pub const TRANSPARENT_IN_FILES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
/// Linux' pool of 2 MiB pages (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// RAM of `size` bytes in the pieces of [`layout::ram_pieces`], on pages of the wanted kind. It is in a file if `in_file` (see
/// [`Engine::wants_files`](anyvisor_engine::Engine::wants_files)), unless transparent huge pages are wanted and the host has
/// none for files, which a message says.
///
/// # Errors
/// [`Error::User`] if the host cannot give that much, or not such pages.
pub fn allocate(size: u64, pages: HugePages, in_file: bool) -> Result<GuestMemoryMmap> {
    let trouble = |error: MmapRegionError| {
        Error::user(format!("the host cannot give {} of memory ({error}); use a smaller --memory", show_size(size)))
    };
    if pages == HugePages::Transparent {
        transparent_are_on().map_err(Error::User)?;
    }
    let file = match pages {
        HugePages::Pool => Some(pool_file(size)?),
        HugePages::Transparent if in_file => transparent_file(size)
            .inspect_err(|error| {
                tracing::warn!("programs in the guest will run slower: no file on transparent huge pages: {error}");
            })
            .ok(),
        HugePages::IfThere if in_file => {
            Some(ram_file(size).map_err(|error| Error::host("cannot make a file for guest memory", error))?)
        }
        _ => None,
    };
    let mut offset = 0;
    let mut regions = vec![];
    for (start, length) in layout::ram_pieces(size) {
        let region = match &file {
            // A shared mapping takes all its pages out of the pool here, so that none can be missing later.
            Some(file) => {
                let file = file.try_clone().map_err(|e| Error::host("cannot allocate guest memory", e))?;
                let file = FileOffset::new(file, offset);
                MmapRegion::build(Some(file), length as usize, READ_WRITE, libc::MAP_SHARED)
                    .map_err(|error| if pages == HugePages::Pool { pool_too_small(size) } else { trouble(error) })?
            }
            None => private(length as usize).map_err(trouble)?,
        };
        if pages != HugePages::Pool {
            // SAFETY: the range is exactly the region's own mapping, and the advice does not change its contents.
            let status = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
            // A kernel without huge pages refuses, and nothing is lost unless they were asked for.
            if status != 0 && pages == HugePages::Transparent {
                let error = std::io::Error::last_os_error();
                return Err(Error::host("cannot ask for transparent huge pages", error));
            }
        }
        offset += length;
        let region = GuestRegionMmap::new(region, GuestAddress(start));
        regions.push(region.expect("pieces of RAM end below the end of the address space"));
    }
    Ok(GuestMemoryMmap::from_regions(regions).expect("pieces of RAM do not overlap"))
}

/// Memory of this process's own, at a multiple of [`HUGE`].
///
/// Linux aligns large mappings by itself since 6.7. Before, it puts each at the top of the highest gap that has the room:
/// what is above an aligned one is filled for a moment.
fn private(length: usize) -> std::result::Result<MmapRegion, MmapRegionError> {
    let mut fillers = vec![];
    loop {
        let region: MmapRegion = MmapRegion::build(None, length, READ_WRITE, PRIVATE)?;
        let over = region.as_ptr() as usize % HUGE as usize;
        // One that is not aligned is as good as any, but for its speed.
        if over == 0 || fillers.len() == ATTEMPTS {
            return Ok(region);
        }
        let top = region.as_ptr() as usize + length;
        drop(region);
        fillers.push(Filler::new(top - over, over));
    }
}

/// Addresses that nothing else is put at.
struct Filler {
    /// Null if it could not be had.
    address: *mut libc::c_void,
    length: usize,
}

impl Filler {
    fn new(address: usize, length: usize) -> Filler {
        let flags = PRIVATE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping, that replaces none, of memory that nobody can access.
        let found = unsafe { libc::mmap(address as *mut _, length, libc::PROT_NONE, flags, -1, 0) };
        Filler { address: if found == libc::MAP_FAILED { std::ptr::null_mut() } else { found }, length }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        if !self.address.is_null() {
            // SAFETY: the mapping is this struct's own, and nobody knows its address.
            unsafe { libc::munmap(self.address, self.length) };
        }
    }
}

/// `memory` and flash memory of `size` bytes that ends at 4 GiB: all zeros, and RAM as far as an engine knows.
///
/// # Errors
/// [`Error::User`] if the host cannot give it.
pub fn with_flash(memory: &GuestMemoryMmap, size: u64) -> Result<GuestMemoryMmap> {
    let trouble = |error: String| Error::user(format!("the host cannot give {} of memory: {error}", show_size(size)));
    let mapping = MmapRegion::new(size as usize).map_err(|error| trouble(error.to_string()))?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(layout::HIGH_RAM - size));
    let region = region.ok_or_else(|| trouble("it does not fit below 4 GiB".into()))?;
    memory.insert_region(region.into()).map_err(|error| trouble(error.to_string()))
}

/// How many bytes of flash memory are in `memory`.
pub fn flash_size(memory: &GuestMemoryMmap) -> u64 {
    memory.find_region(GuestAddress(layout::HIGH_RAM - 1)).map_or(0, |region| region.len())
}

/// Reads from `offset` of `file` into `pieces`, which are RAM. Their bytes are the guest's to change meanwhile.
///
/// # Errors
/// The host's; or the file ends before.
pub fn read_file(memory: &GuestMemoryMmap, pieces: &[Piece], file: &File, offset: u64) -> std::io::Result<()> {
    all_of(pieces, read_file_up_to(memory, pieces, file, offset)?)
}

/// As [`read_file`], but the file may end before: returns how many bytes were read.
///
/// # Errors
/// The host's.
pub fn read_file_up_to(memory: &GuestMemoryMmap, pieces: &[Piece], file: &File, offset: u64) -> std::io::Result<u64> {
    transfer(memory, pieces, offset, |part, at| {
        // SAFETY: `transfer` gives ranges of guest RAM, which stays mapped while `memory` is borrowed and to which no
        // Rust reference exists; the kernel writes no more than their lengths.
        unsafe { libc::preadv(file.as_raw_fd(), part.as_ptr(), part.len() as i32, at) }
    })
}

/// Writes `pieces`, which are RAM, to `offset` of `file`.
///
/// # Errors
/// The host's.
pub fn write_file(memory: &GuestMemoryMmap, pieces: &[Piece], file: &File, offset: u64) -> std::io::Result<()> {
    let done = transfer(memory, pieces, offset, |part, at| {
        // SAFETY: as in `read_file_up_to`; the kernel only reads the ranges.
        unsafe { libc::pwritev(file.as_raw_fd(), part.as_ptr(), part.len() as i32, at) }
    })?;
    all_of(pieces, done)
}

fn all_of(pieces: &[Piece], done: u64) -> std::io::Result<()> {
    if done < total(pieces) { Err(std::io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Has `system_call` transfer all of `pieces`, from byte `offset` of a file, some at a time, until it transfers none.
/// Returns how many bytes that were.
fn transfer(
    memory: &GuestMemoryMmap,
    pieces: &[Piece],
    offset: u64,
    system_call: impl Fn(&[libc::iovec], libc::off_t) -> isize,
) -> std::io::Result<u64> {
    let mut ranges = ranges(memory, pieces)?;
    let (mut first, mut at) = (0, offset);
    while first < ranges.len() {
        let part = &ranges[first..ranges.len().min(first + PIECES_MAX)];
        let position = libc::off_t::try_from(at).map_err(|_| std::io::Error::other("an offset beyond any file"))?;
        let done = match system_call(part, position) {
            0 => break,
            done if done > 0 => done as usize,
            _ => match std::io::Error::last_os_error() {
                error if error.kind() == std::io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        at += done as u64;
        first += skip(&mut ranges[first..], done);
    }
    Ok(at - offset)
}

/// Where on the host `pieces` are, which are RAM.
///
/// # Errors
/// One is not.
pub fn ranges(memory: &GuestMemoryMmap, pieces: &[Piece]) -> std::io::Result<Vec<libc::iovec>> {
    let outside = || std::io::Error::other("a buffer outside of guest memory");
    let mut ranges = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let slice = memory.get_slice(GuestAddress(piece.gpa), piece.length as usize).map_err(|_| outside())?;
        ranges.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
    }
    Ok(ranges)
}

/// Cuts the first `done` bytes off `ranges`. Returns how many of them are gone as a whole.
pub fn skip(ranges: &mut [libc::iovec], mut done: usize) -> usize {
    let mut first = 0;
    while first < ranges.len() && done >= ranges[first].iov_len {
        done -= ranges[first].iov_len;
        first += 1;
    }
    if done > 0 {
        let range = &mut ranges[first];
        range.iov_base = range.iov_base.wrapping_byte_add(done);
        range.iov_len -= done;
    }
    first
}

/// Whether `pieces`, which are RAM, begin at multiples of `alignment` on the host.
pub fn are_aligned(memory: &GuestMemoryMmap, pieces: &[Piece], alignment: usize) -> bool {
    ranges(memory, pieces)
        .is_ok_and(|ranges| ranges.iter().all(|range| (range.iov_base as usize).is_multiple_of(alignment)))
}

/// Whether this process can have transparent huge pages, or why not and what to do.
fn transparent_are_on() -> std::result::Result<(), String> {
    const INSTEAD: &str = "or leave hugepages=thp out";
    match std::fs::read_to_string(TRANSPARENT) {
        Err(_) => return Err(format!("this host's kernel has no transparent huge pages; use hugepages=2M, {INSTEAD}")),
        Ok(state) if state.contains("[never]") => {
            let how = format!("switch them on, as root: echo madvise >{TRANSPARENT}");
            return Err(format!("this host has its transparent huge pages switched off; {how}; {INSTEAD}"));
        }
        Ok(_) => {}
    }
    // SAFETY: has no preconditions.
    if unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) } == 1 {
        return Err(format!("transparent huge pages are switched off for this process; {INSTEAD}"));
    }
    Ok(())
}

/// A file in memory of `size` bytes, on transparent huge pages.
///
/// # Errors
/// Why this host has none for files: one of its switches, or what it does not let this user do.
pub fn transparent_file(size: u64) -> std::io::Result<File> {
    transparent_are_on().map_err(std::io::Error::other)?;
    if transparent_state(TRANSPARENT_IN_FILES) == "deny" {
        return Err(std::io::Error::other(format!("{TRANSPARENT_IN_FILES} says 'deny'")));
    }
    huge_file::create(size)
}

/// What one of this host's switches for transparent huge pages says, [`TRANSPARENT`] or [`TRANSPARENT_IN_FILES`], in its own
/// word: `always`, `madvise` or `advise` (those who ask), `never`, and more for files.
pub fn transparent_state(switch: &str) -> String {
    let text = std::fs::read_to_string(switch).unwrap_or_default();
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    chosen.map_or("none in this kernel", |(word, _)| word).to_owned()
}

/// A file of `size` bytes in the pool.
fn pool_file(size: u64) -> Result<File> {
    let file = memfd_create(FILE_NAME, MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    let file = File::from(file.map_err(|error| {
        let what = "this host's kernel has no pool of huge pages of 2M";
        Error::user(format!("{what} ({error}); use hugepages=thp, or leave hugepages out"))
    })?);
    file.set_len(size).map_err(|_| pool_too_small(size))?;
    Ok(file)
}

/// The pool has not as many free pages as `size` bytes take.
fn pool_too_small(size: u64) -> Error {
    let needed = size / HUGE;
    let pool = Pool::read(Path::new(POOL));
    let wanted = pool.total + needed.saturating_sub(pool.free).max(1);
    Error::user(format!(
        "hugepages=2M takes {needed} huge pages for {}, and this host has {} free; make its pool larger, as root: \
         sysctl vm.nr_hugepages={wanted}",
        show_size(size),
        pool.free
    ))
}

/// The host's pool of 2 MiB pages, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    pub total: u64,
    /// Neither in use nor promised.
    pub free: u64,
}

impl Pool {
    /// This host's.
    pub fn of_host() -> Pool {
        Pool::read(Path::new(POOL))
    }

    fn read(folder: &Path) -> Pool {
        let number = |name: &str| {
            let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
            text.trim().parse().unwrap_or(0u64)
        };
        let promised = number("resv_hugepages");
        Pool { total: number("nr_hugepages"), free: number("free_hugepages").saturating_sub(promised) }
    }
}

/// Gives the host `length` bytes of RAM at `gpa`, multiples of 4 KiB, which read as zeros from then on, or as in the file that
/// they are a private mapping of. Whatever else is mapped there loses them too.
///
/// # Errors
/// The host's; or they are not RAM of one piece, or on pages of the pool, which come only whole.
pub fn give_back(memory: &GuestMemoryMmap, gpa: u64, length: u64) -> std::io::Result<()> {
    let refused = |what| Err(std::io::Error::other(what));
    let is_flash =
        |region: &GuestRegionMmap| flash_size(memory) > 0 && region.start_addr().0 + region.len() == layout::HIGH_RAM;
    let Some(region) = memory.find_region(GuestAddress(gpa)).filter(|region| !is_flash(region)) else {
        return refused("no RAM");
    };
    let start = gpa - region.start_addr().0;
    if length > region.len() - start || !(gpa | length).is_multiple_of(4096) {
        return refused("no pages of one piece of RAM");
    }
    if let Some(file) = region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0) {
        if is_in_pool(file.file()) {
            return refused("on pages of the pool");
        }
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        return Ok(rustix::fs::fallocate(file.file(), flags, file.start() + start, length)?);
    }
    // SAFETY: the range lies in the region's own mapping, to which no Rust reference exists, so that its contents may change
    // at any time, as they do here.
    let status =
        unsafe { libc::madvise(region.as_ptr().add(start as usize).cast(), length as usize, libc::MADV_DONTNEED) };
    if status == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Puts `length` bytes of `file` from `offset` on in the place of RAM at guest-physical address `gpa`, all
/// multiples of 4 KiB and within one piece of RAM. The guest's writes are its own and never reach the file.
///
/// # Errors
/// The host's.
///
/// # Panics
/// The range is not RAM.
pub fn map_file(memory: &GuestMemoryMmap, gpa: u64, length: u64, file: &File, offset: u64) -> std::io::Result<()> {
    let region = memory.find_region(GuestAddress(gpa)).expect("it is RAM");
    let start = gpa - region.start_addr().0;
    assert!(start + length <= region.len() && (gpa | length | offset).is_multiple_of(4096), "a range of one piece");
    // SAFETY: the range lies in the region's own mapping, of which only its address counts to those who hold
    // it; no Rust reference to guest memory exists. A private mapping of the same size and rights takes its
    // place, and goes with the region when that is unmapped.
    let address = unsafe {
        libc::mmap(
            region.as_ptr().add(start as usize).cast(),
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if address == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    /// The value in kB of `field` for the mapping that begins at `address` (proc(5), smaps).
    fn smaps(address: usize, field: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&format!("{address:x}-")));
        let line = lines.find(|line| line.starts_with(field)).expect("the mapping has the field");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn ram_is_aligned_to_huge_pages() {
        let sizes = [8 << 20, (8 << 20) + 4096, (9 << 20) + 8192, 512 << 20, (3 << 30) + (1 << 20)];
        let all: Vec<_> = sizes.map(|size| allocate(size, HugePages::IfThere, false).unwrap()).into();
        for memory in &all {
            for region in memory.iter() {
                assert_eq!(region.as_ptr() as u64 % HUGE, 0, "{:x}", region.start_addr().0);
            }
        }
    }

    #[test]
    fn transparent_huge_pages_are_used_or_refused() {
        if let Err(why) = transparent_are_on() {
            println!("left out: {why}");
            assert_eq!(allocate(32 << 20, HugePages::Transparent, false).unwrap_err().to_string(), why);
            return;
        }
        let memory = allocate(32 << 20, HugePages::Transparent, false).unwrap();
        memory.write_obj(1u8, GuestAddress(5 << 20)).unwrap();
        let address = memory.iter().next().unwrap().as_ptr() as usize;
        assert_eq!(smaps(address, "AnonHugePages:"), HUGE >> 10, "one byte was written");
    }

    #[test]
    fn files_are_on_transparent_huge_pages() {
        if let Err(why) = transparent_file(HUGE) {
            println!("left out: {why}");
            return;
        }
        let memory = allocate((9 << 20) + 4096, HugePages::Transparent, true).unwrap();
        let region = memory.iter().next().unwrap();
        assert!(region.file_offset().is_some());
        let address = region.as_ptr() as usize;
        assert_eq!(address as u64 % HUGE, 0);
        memory.write_obj(1u8, GuestAddress(5 << 20)).unwrap();
        assert_eq!(smaps(address, "ShmemPmdMapped:"), HUGE >> 10, "one byte was written");
        assert_eq!(smaps(address, "Rss:"), HUGE >> 10);
        memory.write_obj(1u8, GuestAddress(9 << 20)).unwrap();
        assert_eq!(smaps(address, "Rss:"), (HUGE >> 10) + 4, "no huge page has the room behind it");
    }

    #[test]
    fn pools_are_counted_without_what_is_promised() {
        let folder = std::env::temp_dir().join(format!("anyvisor-vmm-pool-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for (name, value) in [("nr_hugepages", "100\n"), ("free_hugepages", "80\n"), ("resv_hugepages", "30\n")] {
            std::fs::write(folder.join(name), value).unwrap();
        }
        assert_eq!(Pool::read(&folder), Pool { total: 100, free: 50 });
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(Pool::read(&folder), Pool::default());
    }

    #[test]
    fn a_pool_that_is_too_small_is_told() {
        // A tebibyte in huge pages is on no host that runs tests.
        let message = allocate(1 << 40, HugePages::Pool, false).unwrap_err().to_string();
        let told = message.contains("524288 huge pages for 1024G") && message.contains("sysctl vm.nr_hugepages=");
        assert!(told || message.contains("no pool"), "{message}");
    }
}
