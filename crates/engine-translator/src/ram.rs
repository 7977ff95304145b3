//! Guest RAM by host address.
//!
//! Guest memory is shared with the guest, with other vCPUs and with devices, so no Rust reference to it
//! ever exists: all accesses are raw copies or atomics on addresses that [`Ram::host`] has bounds-checked.

use crate::ahead::Ahead;
use anyvisor_engine::memory::is_in_pool;
use anyvisor_engine::{DirtyPages, DirtyRegion};
use anyvisor_x86::paging::PageTables;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use vm_memory::{Address, FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub const PAGE_SIZE: u64 = 4096;

/// Marks of a page that are not one vCPU's.
mod mark {
    /// Written, or writable in some TLB, since [`super::Ram::take_dirty`] last looked.
    pub const DIRTY: u8 = 1 << 0;
    /// On the first page of a chunk: the host has been asked for all of the chunk.
    pub const ALLOCATED: u8 = 1 << 1;
    /// On the first page of a chunk: it is allocated ahead.
    pub const AHEAD: u8 = 1 << 2;
    /// On the first page of a chunk that is: with the guest here, more is to be.
    pub const FRONTIER: u8 = 1 << 3;
}

/// What is known of a page of RAM. All zeros at first.
///
/// The two sets of vCPUs, by bit, keep each other out: who makes code of a page enters itself and then looks who may write
/// to it unseen; who wants to do that enters itself and then looks whether there is code. One of them sees the other.
#[derive(Default)]
pub struct Page {
    /// Those that have made code of it: writes must be seen.
    code: AtomicU64,
    /// Those whose translated code may write to it unseen: it has a write tag in a TLB, or is writable in a window.
    writers: AtomicU64,
    marks: AtomicU8,
}

impl Page {
    /// Whether translated code was made from it, by any vCPU.
    pub fn is_code(&self) -> bool {
        self.code_owners() != 0
    }

    /// The vCPUs that have made code of it.
    pub fn code_owners(&self) -> u64 {
        self.code.load(Ordering::SeqCst)
    }

    /// Notes that vCPU `bit` makes code of it from now on. If it did not already, those that may write to it unseen: no more
    /// come, and these have to be told.
    pub fn add_code(&self, bit: u64) -> Option<u64> {
        let before = self.code.fetch_or(bit, Ordering::SeqCst);
        (before & bit == 0).then(|| self.writers.load(Ordering::SeqCst))
    }

    /// vCPU `bit` has no code of it any more.
    pub fn remove_code(&self, bit: u64) {
        self.code.fetch_and(!bit, Ordering::SeqCst);
    }

    /// Whether vCPU `bit` may write to it unseen from now on.
    pub fn add_writer(&self, bit: u64) -> bool {
        if self.is_code() {
            return false;
        }
        if self.writers.load(Ordering::SeqCst) & bit != 0 {
            // Whoever makes code of it tells this vCPU.
            return true;
        }
        self.writers.fetch_or(bit, Ordering::SeqCst);
        !self.is_code()
    }

    /// vCPU `bit` cannot write to it unseen any more.
    pub fn remove_writer(&self, bit: u64) {
        self.writers.fetch_and(!bit, Ordering::SeqCst);
    }

    /// Marks it as written; whether it was not.
    pub fn mark_dirty(&self) -> bool {
        // Mostly it is marked already, and a load is cheaper than a locked operation.
        self.marks.load(Ordering::SeqCst) & mark::DIRTY == 0
            && self.marks.fetch_or(mark::DIRTY, Ordering::SeqCst) & mark::DIRTY == 0
    }
}

/// Pages of a file that the host allocates at once when the guest is about to write to one of them: a fault for each takes
/// a quarter longer, and guests use what is next to what they used.
pub const CHUNK: u64 = 16 * PAGE_SIZE;
/// After so many chunks that were touched before it ...
const IN_ORDER: u64 = 4;
/// ... so many are allocated ahead of one.
const AHEAD: u64 = 16;

struct Region {
    gpa: u64,
    length: u64,
    host: *mut u8,
    pages: Box<[Page]>,
    /// The file that it is a shared mapping of, and where in it.
    file: Option<FileOffset>,
}

impl Region {
    /// The marks of a chunk, if there is one.
    fn marks(&self, chunk: u64) -> Option<&AtomicU8> {
        self.pages.get((chunk * (CHUNK / PAGE_SIZE)) as usize).map(|page| &page.marks)
    }

    fn has(&self, chunk: u64, mark: u8) -> bool {
        self.marks(chunk).is_some_and(|marks| marks.load(Ordering::Relaxed) & mark != 0)
    }

    fn set(&self, chunk: u64, mark: u8) {
        if let Some(marks) = self.marks(chunk) {
            marks.fetch_or(mark, Ordering::Relaxed);
        }
    }
}

/// The RAM of one VM.
pub struct Ram {
    regions: Vec<Region>,
    /// Somebody wants to know the pages marked [`mark::DIRTY`]. They are marked in any case.
    logging: AtomicBool,
    /// Has memory in files allocated that the guest is likely to come to.
    ahead: Option<Ahead>,
    /// Keeps the mappings that `regions` points into.
    _memory: GuestMemoryMmap,
}

// SAFETY: the raw pointers are to mappings that live as long as `_memory`; all access through them is by
// raw copies and atomics, which any thread may do.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    pub fn new(memory: GuestMemoryMmap) -> Ram {
        let regions = memory
            .iter()
            .map(|r| Region {
                gpa: r.start_addr().raw_value(),
                length: r.len(),
                host: r.as_ptr(),
                file: r
                    .file_offset()
                    .filter(|file| r.flags() & libc::MAP_SHARED != 0 && !is_in_pool(file.file()))
                    .cloned(),
                pages: pages(r.len().div_ceil(PAGE_SIZE) as usize),
            })
            .collect();
        Ram { regions, logging: AtomicBool::new(false), ahead: None, _memory: memory }
    }

    /// The same, allocated by the host ahead of its use if it is in files.
    ///
    /// # Errors
    /// When the host starts no thread.
    pub fn ahead(memory: GuestMemoryMmap) -> std::io::Result<Ram> {
        let mut ram = Ram::new(memory);
        if ram.is_in_files() {
            ram.ahead = Some(Ahead::start()?);
        }
        Ok(ram)
    }

    fn region(&self, gpa: u64) -> Option<&Region> {
        self.regions.iter().find(|r| gpa.wrapping_sub(r.gpa) < r.length)
    }

    /// Host address of `length` bytes of RAM at `gpa`; `None` if any of them is not RAM.
    pub fn host(&self, gpa: u64, length: u64) -> Option<*mut u8> {
        let region = self.region(gpa)?;
        let offset = gpa - region.gpa;
        if region.length - offset < length {
            return None;
        }
        // SAFETY: offset is within the region's mapping.
        Some(unsafe { region.host.add(offset as usize) })
    }

    /// Whether any of it is a shared mapping of a file, so that pages can be mapped again.
    pub fn is_in_files(&self) -> bool {
        self.regions.iter().any(|region| region.file.is_some())
    }

    /// The file that holds the page at `gpa`, and where, if it can be mapped again.
    pub fn file(&self, gpa: u64) -> Option<(RawFd, u64)> {
        let region = self.region(gpa)?;
        let file = region.file.as_ref()?;
        Some((file.file().as_raw_fd(), file.start() + (gpa - region.gpa)))
    }

    /// What is known of the page at `gpa`.
    pub fn page(&self, gpa: u64) -> Option<&Page> {
        let region = self.region(gpa)?;
        Some(&region.pages[((gpa - region.gpa) / PAGE_SIZE) as usize])
    }

    /// The guest is about to write to a page at `gpa`, for the first time for all that is known. Has the host allocate the chunk
    /// around it, and what is likely to follow, if it is in a file. Where the host cannot (before Linux 5.14), each page is allocated
    /// as it is touched.
    pub fn allocate_around(&self, gpa: u64) {
        let Some(region) = self.region(gpa) else { return };
        let Some(file) = &region.file else { return };
        let chunk = (gpa - region.gpa) / CHUNK;
        if region.has(chunk, mark::ALLOCATED) {
            return;
        }
        region.set(chunk, mark::ALLOCATED);
        let next = if !region.has(chunk, mark::AHEAD) {
            let in_order = (1..=IN_ORDER).all(|n| chunk >= n && region.has(chunk - n, mark::ALLOCATED));
            in_order.then_some(chunk + 1)
        } else {
            region.has(chunk, mark::FRONTIER).then_some(chunk + AHEAD)
        };
        if let (Some(next), Some(ahead)) = (next, &self.ahead) {
            (next..next + AHEAD).for_each(|chunk| region.set(chunk, mark::AHEAD));
            region.set(next, mark::FRONTIER);
            let [from, to] = [next, next + AHEAD].map(|chunk| region.length.min(chunk * CHUNK));
            if from < to {
                ahead.request(file, from..to);
            }
        }
        let length = CHUNK.min(region.length - chunk * CHUNK) as usize;
        // SAFETY: the range is within the region's mapping, and being allocated does not change its contents.
        unsafe { libc::madvise(region.host.add((chunk * CHUNK) as usize).cast(), length, libc::MADV_POPULATE_WRITE) };
    }

    /// Marks the pages of `length` bytes at `gpa`, which are RAM, as written.
    fn mark_dirty(&self, gpa: u64, length: u64) {
        let Some(region) = self.region(gpa) else { return };
        let first = (gpa - region.gpa) / PAGE_SIZE;
        let last = (gpa - region.gpa + length.max(1) - 1) / PAGE_SIZE;
        for page in &region.pages[first as usize..=last as usize] {
            page.mark_dirty();
        }
    }

    /// Marks the pages of `length` bytes at `gpa` as written; what is not RAM is left out. Returns the pieces, each
    /// within a page, from whose pages code was translated.
    pub fn written(&self, gpa: u64, length: u64) -> Vec<(u64, u32)> {
        let mut code = Vec::new();
        let end = gpa.saturating_add(length);
        for region in &self.regions {
            let (mut at, end) = (gpa.max(region.gpa), end.min(region.gpa + region.length));
            while at < end {
                let next = ((at | (PAGE_SIZE - 1)) + 1).min(end);
                let page = &region.pages[((at - region.gpa) / PAGE_SIZE) as usize];
                page.mark_dirty();
                if page.is_code() {
                    code.push((at, (next - at) as u32));
                }
                at = next;
            }
        }
        code
    }

    /// Starts or stops logging of writes, from a clean state. Starting asks, as [`Ram::take_dirty`] does, for
    /// every write tag to be dropped.
    pub fn log_dirty(&self, on: bool) {
        self.logging.store(on, Ordering::SeqCst);
        if on {
            let pages = self.regions.iter().flat_map(|region| &region.pages);
            pages.for_each(|page| {
                page.marks.fetch_and(!mark::DIRTY, Ordering::Relaxed);
            });
        }
    }

    /// The pages marked as written, whose marks it takes away; `None` if nothing is logged. Before a vCPU runs
    /// again it must drop its write tags: what they let through is not marked.
    pub fn take_dirty(&self) -> Option<DirtyPages> {
        if !self.logging.load(Ordering::SeqCst) {
            return None;
        }
        let regions = self.regions.iter().map(|region| {
            let mut bitmap = vec![0u64; region.pages.len().div_ceil(64)];
            for (n, page) in region.pages.iter().enumerate() {
                let dirty = page.marks.load(Ordering::Relaxed) & mark::DIRTY != 0;
                if dirty {
                    page.marks.fetch_and(!mark::DIRTY, Ordering::Relaxed);
                    bitmap[n / 64] |= 1 << (n % 64);
                }
            }
            DirtyRegion { start: region.gpa, bitmap }
        });
        Some(DirtyPages { regions: regions.collect() })
    }

    pub fn is_code(&self, gpa: u64) -> bool {
        self.page(gpa).is_some_and(Page::is_code)
    }

    /// Copies from RAM; `false` (and `data` untouched) if the range is not all RAM.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some(host) = self.host(gpa, data.len() as u64) else { return false };
        // SAFETY: `host` points at data.len() bytes of mapped RAM; concurrent guest writes may tear, which
        // is what a racing guest gets.
        unsafe { copy_from_guest(host, data) };
        true
    }

    /// Replaces a byte, as one operation; `None` if it is not RAM. Callers report it as they do [`Ram::write`].
    pub fn swap(&self, gpa: u64, value: u8) -> Option<u8> {
        let host = self.host(gpa, 1)?;
        self.mark_dirty(gpa, 1);
        // SAFETY: a byte of RAM; whoever else accesses it does so by raw or atomic operations.
        Some(unsafe { (*host.cast::<AtomicU8>()).swap(value, Ordering::SeqCst) })
    }

    /// Copies to RAM without regard to translated code; callers report code pages to `Core`.
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let Some(host) = self.host(gpa, data.len() as u64) else { return false };
        self.mark_dirty(gpa, data.len() as u64);
        // SAFETY: as for `read`.
        unsafe { copy_to_guest(host, data) };
        true
    }
}

/// As many pages of which nothing is known. Their memory is the host's zeros until it is touched.
fn pages(count: usize) -> Box<[Page]> {
    // SAFETY: zeros are what `Page::default` consists of, three atomic integers.
    unsafe { Box::new_zeroed_slice(count).assume_init() }
}

/// Reads guest bytes; sizes 1, 2, 4 and 8 by one load, as the guest's own access would be.
///
/// # Safety
/// `host` must point at `data.len()` bytes of mapped memory.
pub unsafe fn copy_from_guest(host: *const u8, data: &mut [u8]) {
    // SAFETY: by the contract; unaligned volatile loads of plain integers.
    unsafe {
        match data.len() {
            1 => data[0] = host.read_volatile(),
            2 => data.copy_from_slice(&host.cast::<[u8; 2]>().read_volatile()),
            4 => data.copy_from_slice(&host.cast::<u32>().read_unaligned().to_ne_bytes()),
            8 => data.copy_from_slice(&host.cast::<u64>().read_unaligned().to_ne_bytes()),
            n => std::ptr::copy_nonoverlapping(host, data.as_mut_ptr(), n),
        }
    }
}

/// Writes guest bytes; see [`copy_from_guest`].
///
/// # Safety
/// `host` must point at `data.len()` bytes of mapped writable memory.
pub unsafe fn copy_to_guest(host: *mut u8, data: &[u8]) {
    // SAFETY: by the contract.
    unsafe {
        match data.len() {
            1 => host.write_volatile(data[0]),
            2 => host.cast::<u16>().write_unaligned(u16::from_ne_bytes([data[0], data[1]])),
            4 => host.cast::<u32>().write_unaligned(u32::from_ne_bytes(data.try_into().unwrap())),
            8 => host.cast::<u64>().write_unaligned(u64::from_ne_bytes(data.try_into().unwrap())),
            n => std::ptr::copy_nonoverlapping(data.as_ptr(), host, n),
        }
    }
}

impl PageTables for Ram {
    fn read(&self, gpa: u64, size: u8) -> Option<u64> {
        let host = self.host(gpa, u64::from(size))?;
        // SAFETY: `host` is `size` bytes of RAM, aligned because page tables and their indices are.
        unsafe {
            Some(if size == 8 {
                (*host.cast::<AtomicU64>()).load(Ordering::Relaxed)
            } else {
                u64::from((*host.cast::<AtomicU32>()).load(Ordering::Relaxed))
            })
        }
    }

    fn compare_exchange(&self, gpa: u64, size: u8, old: u64, new: u64) -> bool {
        let Some(host) = self.host(gpa, u64::from(size)) else { return false };
        self.mark_dirty(gpa, u64::from(size));
        // SAFETY: as for `read`.
        unsafe {
            if size == 8 {
                let entry = &*host.cast::<AtomicU64>();
                entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok()
            } else {
                let entry = &*host.cast::<AtomicU32>();
                entry.compare_exchange(old as u32, new as u32, Ordering::SeqCst, Ordering::Relaxed).is_ok()
            }
        }
    }
}
