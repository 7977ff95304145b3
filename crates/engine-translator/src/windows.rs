//! Guest user memory mapped into the host's address space, for hot code: the host's MMU checks its accesses.
//!
//! The guest's user half is 256 *regions* of 512 GiB. A region in use has a *window* of the same size in this
//! process, where the guest's pages are mapped as they are touched: from the files that hold guest RAM, with the
//! rights that the guest's page tables give user code. An access takes its region's delta (window minus region) from
//! [`Cpu::regions`] and adds it; a host page fault in a window maps the page, or shows that the instruction needs the
//! interpreter.
//!
//! Isolation: an address in a region leads to its window. One with other bits than 46:0 leads to the window where nothing is ever
//! mapped, or faults beyond the table of deltas ([`crate::cpu::BEYOND`]); where only bits 46:39 are looked at, it leaves the lower
//! half of the address space whatever delta is added. Around each window there is nothing for [`GUARD`] bytes, so the delta found
//! for an address is good for all within that distance, and for those of a loop that come step by step: it meets the guard before
//! it is anywhere else. Regions without a window lead to the one where nothing is mapped.
//!
//! Only this module maps anything there. The guards are reserved; windows are too, or are *bare*: they have no mappings but those
//! of guest memory, so that the host has half as many to make, split and join. That takes a place where the host puts nothing by
//! itself: below position-independent programs, if it looks for room from the stack down.
//!
//! Invariants:
//! - What is mapped is true while user code runs: whatever drops entries of the user TLB drops it here too, or has it looked up
//!   again before user code runs. A page is writable only if a write to it needs no attention, as with the TLB's write tags.
//! - While translated code runs, the deltas of the current address space do not change but from none to one: a
//!   block may hold one.
//! - Only windows of the current address space are in [`Cpu::regions`].

use crate::core::Core;
use crate::cpu::Cpu;
use crate::hash::AddressMap;
use anyvisor_engine::tally::event;
use anyvisor_x86::paging::{self, Access, AccessKind, PageTables, Untouched};
use std::ops::Range;
use std::os::fd::RawFd;

/// log2 of the size of a region: what one entry of a level-4 page table maps.
pub const REGION_BITS: u32 = 39;
pub const REGIONS: usize = 256;
/// Bytes around a window where nothing is mapped: more than any displacement reaches.
pub const GUARD: u64 = 1 << 32;
const STRIDE: u64 = (1 << REGION_BITS) + GUARD;
/// Windows of a vCPU at most. The first stays empty.
const WINDOWS_MAX: u64 = 33;
/// With fewer, a few programs in turns would always map everything anew.
const WINDOWS_MIN: u64 = 5;
/// Bytes of addresses that the windows of a VM's vCPUs may take, of the 128 TiB of a process.
const ADDRESSES: u64 = 81 << 40;
/// Where bare windows are: above programs that are not position-independent, below those that are (Linux `ELF_ET_DYN_BASE`, two
/// thirds of the address space), and so below everything that the host finds a place for.
const LOW: Range<u64> = 1 << 40..85 << 40;
/// Between the places in [`LOW`] that are tried.
const LOW_STEP: usize = 1 << 38;
/// Bytes that there must be above.
const ROOM_FOR_OTHERS: usize = 1 << 40;
/// Mappings of the host that a VM's vCPUs may take, of the 65,530 that a process has by default (Linux `vm.max_map_count`). A
/// piece takes one, and where windows are not bare another one for what is left between it and the next.
const MAX_MAPPINGS: usize = 40_000;
/// TSC ticks in which a program must not take all pieces twice: mapping costs more than probes then.
const SOON: u64 = 2_000_000_000;
/// After so many page mappings somebody looks how fast they came ...
const FILLS: u32 = 256;
/// ... and where: faster than one in this many TSC ticks, and the code that makes them is better off with probes.
const FILL_TICKS: u64 = 60_000;
/// Pages that may be stale at once: each may take a mapping of the host's.
const MAX_STALE: usize = 1024;
/// Entries of [`Windows::writers`] until the stale ones are dropped.
const MAX_WRITERS: usize = 200_000;
const PAGE: u64 = 4096;
/// Pages of an address space are looked up again if this took at most one part in so many of the time since it was last done.
const REVIEW_PAUSE: u64 = 4;
/// Pages that one mapping serves at most, and where the guest has large pages: powers of two.
const AROUND: u64 = 16;
const LARGE_AROUND: u64 = 512;
const WRITABLE: u64 = 1;

/// Addresses for all windows of a vCPU.
struct Reservation {
    start: *mut u8,
    windows: u8,
    /// Where nothing is mapped there is no mapping: the host makes and drops one faster than it splits and joins another.
    bare: bool,
}

impl Reservation {
    /// For one of `vcpus`. `None` if the host gives no addresses, or too few for so many.
    fn new(vcpus: usize) -> Option<Reservation> {
        let windows = (ADDRESSES / vcpus as u64 / STRIDE).min(WINDOWS_MAX);
        if windows < WINDOWS_MIN {
            return None;
        }
        let high = others_go_high();
        if let Some(start) = high.then(|| reserve_low(length(windows))).flatten() {
            let reservation = Reservation { start, windows: windows as u8, bare: true };
            if reservation.empty_windows() {
                return Some(reservation);
            }
        }
        let reservation = Reservation { start: reserve(None, length(windows))?, windows: windows as u8, bare: false };
        // What there was for others is needed: others would be mapped in bare windows.
        (others_go_high() == high).then_some(reservation)
    }

    fn length(&self) -> usize {
        length(u64::from(self.windows))
    }

    /// The address of a window.
    fn window(&self, number: u8) -> u64 {
        self.start as u64 + GUARD + u64::from(number) * STRIDE
    }

    /// The window that `address` is in, and the distance from its start.
    fn find(&self, address: u64) -> Option<(u8, u64)> {
        let offset = address.checked_sub(self.start as u64 + GUARD)?;
        let (number, offset) = (offset / STRIDE, offset % STRIDE);
        (number < u64::from(self.windows) && offset < 1 << REGION_BITS).then_some((number as u8, offset))
    }

    /// Whether `address` is in a window or around one.
    fn contains(&self, address: u64) -> bool {
        address.wrapping_sub(self.start as u64) < self.length() as u64
    }

    /// Takes away what is mapped in `length` bytes at `address`, which are in one window.
    fn clear(&self, address: u64, length: u64) {
        let ends = [address, address + length - 1].map(|address| self.find(address).map(|(window, _)| window));
        assert!(ends[0].is_some_and(|window| window > 0) && ends[0] == ends[1]);
        if self.empty(address, length) {
            return;
        }
        // Splitting a mapping may take one more than the process can have. Nothing of these is split.
        let done = if self.bare { self.empty_windows() } else { self.empty(self.start as u64, self.length() as u64) };
        assert!(done, "unmapping guest memory: {}", std::io::Error::last_os_error());
    }

    /// Makes all windows but the first as they were at first. Whether the host could.
    fn empty_windows(&self) -> bool {
        (1..self.windows).all(|window| self.empty(self.window(window), 1 << REGION_BITS))
    }

    /// Makes `length` bytes as they were at first. Whether the host could.
    fn empty(&self, address: u64, length: u64) -> bool {
        let flags = FREE | libc::MAP_FIXED;
        // SAFETY: takes away or replaces mappings of this reservation, which nothing but translated code refers to.
        unsafe {
            match self.bare {
                true => libc::munmap(address as *mut _, length as usize) == 0,
                false => {
                    libc::mmap(address as *mut _, length as usize, libc::PROT_NONE, flags, -1, 0) != libc::MAP_FAILED
                }
            }
        }
    }

    /// Maps pages of a file, ready to use.
    fn map(&self, address: u64, length: u64, file: RawFd, offset: u64, writable: bool) -> bool {
        let rights = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        assert!(self.contains(address) && self.contains(address + length - 1));
        // SAFETY: as in `empty`.
        let done =
            unsafe { libc::mmap(address as *mut _, length as usize, rights, flags, file, offset as libc::off_t) };
        done != libc::MAP_FAILED
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: all that is mapped there is this value's own.
        unsafe { libc::munmap(self.start.cast(), self.length()) };
    }
}

/// Memory that nobody can access and that takes nothing but addresses.
const FREE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Takes `length` bytes of addresses: at `at`, if they are free, or wherever the host has so many.
fn reserve(at: Option<u64>, length: usize) -> Option<*mut u8> {
    let flags = FREE | at.map_or(0, |_| libc::MAP_FIXED_NOREPLACE);
    let wanted = at.unwrap_or(0) as *mut libc::c_void;
    // SAFETY: a new mapping of memory that nobody can access, where there is none.
    let address = unsafe { libc::mmap(wanted, length, libc::PROT_NONE, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return None;
    }
    if at.is_some() && address != wanted {
        // Linux before 4.17 takes the address as a wish.
        // SAFETY: the mapping was just made.
        unsafe { libc::munmap(address, length) };
        return None;
    }
    Some(address.cast())
}

/// Takes `length` bytes of addresses in [`LOW`].
fn reserve_low(length: usize) -> Option<*mut u8> {
    let last = LOW.end.checked_sub(length as u64)?;
    (LOW.start..=last).step_by(LOW_STEP).find_map(|at| reserve(Some(at), length))
}

/// Whether the host maps what may go anywhere above [`LOW`]: it looks for room from the stack down, not up from a third of the
/// address space (Linux `arch_pick_mmap_layout`: an unlimited stack, `setarch -L`), and has enough there.
fn others_go_high() -> bool {
    let Some(address) = reserve(None, ROOM_FOR_OTHERS) else { return false };
    // SAFETY: the mapping was just made.
    unsafe { libc::munmap(address.cast(), ROOM_FOR_OTHERS) };
    address as u64 >= LOW.end
}

/// Bytes of addresses for so many windows.
fn length(windows: u64) -> usize {
    (windows * STRIDE + GUARD) as usize
}

/// What is mapped of one address space.
#[derive(Default)]
struct Space {
    /// Of the translations that the guest may still go by; `None` when it has dropped them.
    pcid: Option<u16>,
    /// What CR3 held: the page tables are likely the same where this is.
    root: u64,
    /// Region and window.
    regions: Vec<(u8, u8)>,
    /// Guest-physical page by linear page, with [`WRITABLE`].
    pages: AddressMap<u64, u64>,
    /// Mappings that the host needs for them: a page that goes on where the one before ends takes none of its own.
    pieces: usize,
    /// The guest has had its translations dropped: each page is to be looked up again before user code runs.
    doubtful: bool,
}

impl Space {
    /// Whether `page` and the next one are one mapping.
    fn joined(&self, page: u64) -> bool {
        let next = || self.pages.get(&page.wrapping_add(1));
        self.pages.get(&page).is_some_and(|&value| next() == Some(&(value + PAGE)))
    }

    fn insert(&mut self, page: u64, value: u64) {
        self.remove(page);
        self.pages.insert(page, value);
        self.pieces += 1;
        self.pieces -= usize::from(self.joined(page)) + usize::from(self.joined(page.wrapping_sub(1)));
    }

    fn remove(&mut self, page: u64) -> bool {
        let joints = usize::from(self.joined(page)) + usize::from(self.joined(page.wrapping_sub(1)));
        let known = self.pages.remove(&page).is_some();
        if known {
            self.pieces = self.pieces + joints - 1;
        }
        known
    }
}

/// What is mapped.
pub struct Windows {
    reservation: Option<Reservation>,
    /// The host gives no addresses.
    refused: bool,
    /// They are not to be used.
    forbidden: bool,
    free: Vec<u8>,
    /// The current address space, once it has anything.
    current: Option<Space>,
    /// Others, the one that left last at the end.
    kept: Vec<Space>,
    /// Host addresses where guest-physical pages are writable, or were.
    writers: AddressMap<u64, Vec<u64>>,
    writer_count: usize,
    /// Page mappings since they were last looked into, and when that was.
    fills: u32,
    looked: u64,
    /// They come too fast: somewhere here.
    complaint: Option<u64>,
    /// Pieces that may be mapped.
    room: usize,
    /// When the current address space last had all of it.
    last_full: u64,
    /// It has that too often.
    thrashes: bool,
    /// Host addresses of pages that are still mapped and should not be.
    stale: Vec<u64>,
    /// The last access that found nothing in the guest's page tables: linear address, and whether it was a write.
    awaited: Option<(u64, bool)>,
    /// When pages were last looked up again, and the TSC ticks that it took.
    reviewed: u64,
    review_ticks: u64,
}

/// A page as user code may use it.
struct UserPage {
    gpa: u64,
    /// Writes need no attention.
    writable: bool,
    /// It is part of a large page.
    large: bool,
}

// SAFETY: the reservation belongs to this value, and any thread may map there.
unsafe impl Send for Windows {}

impl Default for Windows {
    fn default() -> Self {
        Windows {
            reservation: None,
            refused: false,
            forbidden: false,
            free: Vec::new(),
            current: None,
            kept: Vec::new(),
            writers: AddressMap::default(),
            writer_count: 0,
            fills: 0,
            looked: 0,
            complaint: None,
            room: MAX_MAPPINGS,
            last_full: 0,
            thrashes: false,
            stale: Vec::new(),
            awaited: None,
            reviewed: 0,
            review_ticks: 0,
        }
    }
}

impl Windows {
    /// Reserves the addresses, for one of `vcpus`. Whether there are any; for RAM that is in files.
    pub fn prepare(&mut self, cpu: &mut Cpu, vcpus: usize) -> bool {
        if self.reservation.is_none() && !self.refused {
            self.reservation = Reservation::new(vcpus);
            self.refused = self.reservation.is_none();
            if self.refused {
                tracing::info!(
                    "no addresses for windows of user memory (a limit on the address space, or very many vCPUs): slower"
                );
            }
            if let Some(reservation) = &self.reservation {
                self.free = (1..reservation.windows).rev().collect();
                self.room = self.room.min(MAX_MAPPINGS / if reservation.bare { 1 } else { 2 } / vcpus);
                for (region, delta) in cpu.regions.0.iter_mut().enumerate() {
                    *delta = reservation.window(0).wrapping_sub((region as u64) << REGION_BITS);
                }
            }
        }
        !self.refused
    }

    /// Whether code that is translated from now on may use windows.
    pub fn allow(&mut self, allowed: bool) {
        self.forbidden = !allowed;
    }

    /// Whether a host address is in a window or around one.
    pub fn contains(&self, address: u64) -> bool {
        self.reservation.as_ref().is_some_and(|reservation| reservation.contains(address))
    }

    fn clear_space(&mut self, space: &mut Space) {
        let Some(reservation) = &self.reservation else { return };
        if !space.pages.is_empty() {
            for &(_, window) in &space.regions {
                reservation.clear(reservation.window(window), 1 << REGION_BITS);
            }
        }
        space.pages.clear();
        space.pieces = 0;
        space.doubtful = false;
    }

    fn drop_space(&mut self, mut space: Space) {
        self.clear_space(&mut space);
        self.free.extend(space.regions.iter().map(|&(_, window)| window));
    }

    fn spaces(&self) -> impl Iterator<Item = &Space> {
        self.current.iter().chain(&self.kept)
    }

    /// Pages mapped, in all address spaces.
    pub fn mapped(&self) -> usize {
        self.spaces().map(|space| space.pages.len()).sum()
    }

    /// Host code whose accesses have pages mapped all the time; forgets it.
    pub fn take_complaint(&mut self) -> Option<u64> {
        self.complaint.take()
    }

    /// Whether a program takes more pages in turns than can be mapped; forgets it.
    pub fn take_thrashing(&mut self) -> bool {
        std::mem::take(&mut self.thrashes)
    }

    /// The guest's page tables may say something else of the current address space. Whether [`Core::settle_windows`] has
    /// something to do before user code runs again.
    #[must_use]
    pub fn doubt_current(&mut self) -> bool {
        let Some(space) = self.current.as_mut().filter(|space| !space.pages.is_empty()) else { return false };
        space.doubtful = true;
        true
    }

    /// Nothing of the current address space is mapped any more.
    fn clear_current(&mut self) {
        if let Some(mut space) = self.current.take() {
            self.clear_space(&mut space);
            self.current = Some(space);
        }
    }

    /// Nothing is mapped any more.
    pub fn clear(&mut self) {
        self.clear_current();
        while let Some(space) = self.kept.pop() {
            self.drop_space(space);
        }
        self.forget_writers();
    }

    fn forget_writers(&mut self) {
        self.writers.clear();
        self.writer_count = 0;
    }

    /// The guest has dropped the translations of `pcid`, which is not current.
    pub fn drop_pcid(&mut self, pcid: u16) {
        for space in self.kept.iter_mut().filter(|space| space.pcid == Some(pcid)) {
            space.pcid = None;
            space.doubtful = true;
        }
    }

    /// Puts the current address space, of PCID `from` and with its page tables at `root`, aside.
    pub fn leave(&mut self, cpu: &mut Cpu, from: u16, root: u64) {
        let Some(reservation) = &self.reservation else { return };
        let Some(mut space) = self.current.take() else { return };
        for &(region, _) in &space.regions {
            cpu.regions.0[usize::from(region)] = delta(reservation, region, 0);
        }
        (space.pcid, space.root) = (Some(from), root);
        self.kept.push(space);
    }

    /// Makes what was kept for `pcid` current, or what has been kept of other translations by the page tables at
    /// `root`: that is looked up again, so it does no harm if they are another program's now.
    pub fn enter(&mut self, cpu: &mut Cpu, pcid: u16, root: u64) {
        let Some(reservation) = &self.reservation else { return };
        let own = self.kept.iter().position(|space| space.pcid == Some(pcid));
        let likely = || self.kept.iter().rposition(|space| space.pcid.is_none() && space.root == root);
        if let Some(at) = own.or_else(likely) {
            let space = self.kept.remove(at);
            for &(region, window) in &space.regions {
                cpu.regions.0[usize::from(region)] = delta(reservation, region, window);
            }
            cpu.stale_windows |= u32::from(space.doubtful);
            self.current = Some(space);
        }
    }

    /// The page of `gva` goes, in the current address space. Whether [`Windows::settle`] has something to do before user code
    /// runs again: a kernel drops many pages in a row, and the host takes as long for one as for all of them.
    #[must_use]
    pub fn drop_page(&mut self, gva: u64) -> bool {
        let Some(space) = &mut self.current else { return false };
        if !space.remove(gva >> 12) {
            return false;
        }
        let reservation = self.reservation.as_ref().expect("pages are mapped");
        self.stale.push(place(reservation, space, gva & !(PAGE - 1)));
        if self.stale.len() >= MAX_STALE {
            self.settle();
        }
        true
    }

    /// Takes away what [`Windows::drop_page`] has left: before user code runs, which alone is in windows, and before anything is
    /// mapped there.
    pub fn settle(&mut self) {
        let mut stale = std::mem::take(&mut self.stale);
        stale.sort_unstable();
        let Some(reservation) = self.reservation.as_ref().filter(|_| !stale.is_empty()) else { return };
        for run in stale.chunk_by(|&page, &next| next - page <= PAGE) {
            reservation.clear(run[0], run[run.len() - 1] + PAGE - run[0]);
        }
        stale.clear();
        self.stale = stale;
    }

    /// The pages from linear page `first` go, in the current address space: `count` of them, a power of two that divides
    /// `first`.
    pub fn drop_range(&mut self, first: u64, count: u64) {
        let Some(space) = &mut self.current else { return };
        let dropped: Vec<u64> = space.pages.keys().copied().filter(|page| page & !(count - 1) == first).collect();
        for &page in &dropped {
            space.remove(page);
        }
        if !dropped.is_empty() {
            let reservation = self.reservation.as_ref().expect("pages are mapped");
            reservation.clear(place(reservation, space, first << 12), count << 12);
        }
    }

    /// The guest-physical page at `gpa` is not to be written unseen.
    pub fn protect(&mut self, gpa: u64) {
        let Some(reservation) = &self.reservation else { return };
        for address in self.writers.remove(&gpa).unwrap_or_default() {
            let (window, offset) = reservation.find(address).expect("it was mapped in a window");
            let spaces = self.current.iter_mut().chain(&mut self.kept);
            for space in spaces {
                let Some(&(region, _)) = space.regions.iter().find(|(_, w)| *w == window) else { continue };
                let page = (u64::from(region) << REGION_BITS | offset) >> 12;
                if space.pages.get(&page) == Some(&(gpa | WRITABLE)) {
                    space.remove(page);
                    reservation.clear(address, PAGE);
                }
            }
        }
    }

    /// Gives `region` of the current address space a window.
    fn open(&mut self, cpu: &mut Cpu, region: u8) -> bool {
        if self.free.is_empty() {
            if self.kept.is_empty() {
                return false;
            }
            let oldest = self.kept.remove(0);
            self.drop_space(oldest);
        }
        let (Some(window), Some(reservation)) = (self.free.pop(), &self.reservation) else { return false };
        let space = self.current.get_or_insert_default();
        space.regions.push((region, window));
        cpu.regions.0[usize::from(region)] = delta(reservation, region, window);
        true
    }
}

/// What is added to a linear address of `region` for its place in `window`.
fn delta(reservation: &Reservation, region: u8, window: u8) -> u64 {
    reservation.window(window).wrapping_sub(u64::from(region) << REGION_BITS)
}

/// The host address of linear address `gva` in a region that has a window.
fn place(reservation: &Reservation, space: &Space, gva: u64) -> u64 {
    let region = (gva >> REGION_BITS) as u8;
    let (_, window) = space.regions.iter().find(|(r, _)| *r == region).expect("a page's region has a window");
    delta(reservation, region, *window).wrapping_add(gva)
}

impl Core {
    /// A host page fault of translated code at `from`, which accesses `address`, by a write or not. Whether the access can
    /// be made again; else the instruction is the interpreter's.
    pub fn window_fault(&mut self, from: u64, address: u64, write: bool) -> bool {
        let Some((window, offset)) = self.windows.reservation.as_ref().and_then(|r| r.find(address)) else {
            return false;
        };
        if window == 0 {
            self.open_regions(offset);
            return false;
        }
        let regions = self.windows.current.iter().flat_map(|space| &space.regions);
        let Some(&(region, _)) = regions.clone().find(|(_, w)| *w == window) else { return false };
        let began = self.meter.start();
        let filled = self.fill_window(u64::from(region) << REGION_BITS | offset, write);
        self.meter.stop(began, event::PAGE_MAPPING);
        self.windows.fills += 1;
        if self.windows.fills >= FILLS {
            self.windows.fills = 0;
            let now = self.tsc();
            let elapsed = now.wrapping_sub(std::mem::replace(&mut self.windows.looked, now));
            self.windows.complaint = (elapsed < u64::from(FILLS) * FILL_TICKS).then_some(from);
        }
        filled
    }

    /// Gives windows to the regions without one where a page is mapped at `offset`: one of them is meant.
    fn open_regions(&mut self, offset: u64) {
        for region in 0..=u8::MAX {
            let open = self.windows.current.iter().flat_map(|space| &space.regions).any(|(r, _)| *r == region);
            let gva = u64::from(region) << REGION_BITS | offset;
            if !open && self.user_page(gva, false).is_some() && !self.windows.open(&mut self.cpu, region) {
                return;
            }
        }
    }

    /// What user code finds at linear address `gva`. May set the page's accessed flag, and for a write its dirty flag, as a
    /// processor does ahead of accesses (SDM vol. 3A 4.8 allows the former for any).
    fn user_page(&self, gva: u64, write: bool) -> Option<UserPage> {
        self.user_page_by(&*self.ram, gva, if write { AccessKind::Write } else { AccessKind::Read })
    }

    /// The same, by page tables that are to be read through `tables`.
    fn user_page_by(&self, tables: &impl PageTables, gva: u64, kind: AccessKind) -> Option<UserPage> {
        let access = Access { kind, user: true, implicit: false };
        let mapping = paging::walk(tables, &self.paging_mode(false), gva, access).ok()?;
        let gpa = mapping.gpa & !(PAGE - 1);
        let page = self.ram.page(gpa)?;
        if self.is_lapic_page(gpa) {
            return None;
        }
        let mut writable = mapping.writable && mapping.dirty && !page.is_code();
        if self.debugger.watches() {
            if self.debugger.guards(gva, false) {
                return None;
            }
            writable &= !self.debugger.guards(gva, true);
        }
        Some(UserPage { gpa, writable, large: mapping.page_bits > 12 })
    }

    /// Maps the page of `gva`, and those around it that the same mapping can serve. Whether an access, a write or not,
    /// can be made now.
    fn fill_window(&mut self, gva: u64, write: bool) -> bool {
        self.settle_windows();
        let Some(page) = self.user_page(gva, write) else {
            self.windows.awaited = Some((gva, write));
            return false;
        };
        if write && !page.writable {
            return false;
        }
        if self.windows.spaces().map(|space| space.pieces).sum::<usize>() >= self.windows.room {
            self.make_room();
        }
        if page.large {
            self.note_large(gva);
        }
        let bit = self.bit();
        // Somebody may be making code of it.
        let may_write = |gpa| self.ram.page(gpa).is_some_and(|page| page.add_writer(bit));
        if page.writable && !may_write(page.gpa) {
            return false;
        }
        let number = gva >> 12;
        let around = if page.large { LARGE_AROUND } else { AROUND };
        let block = number & !(around - 1);
        let known = &self.windows.current.as_ref().expect("the window is its own").pages;
        let fits = |n: u64| {
            let gpa = page.gpa.wrapping_add(n.wrapping_sub(number) << 12);
            let same = |other: UserPage| other.writable == page.writable && other.gpa == gpa;
            if known.contains_key(&n) {
                return false;
            }
            if page.large {
                // The same entry of the page tables: no other page can differ but by what is in it.
                return !page.writable || may_write(gpa);
            }
            self.user_page(n << 12, false).is_some_and(same) && (!page.writable || may_write(gpa))
        };
        let from = (block..number).rev().take_while(|&n| fits(n)).last().unwrap_or(number);
        let to = (number + 1..block + around).take_while(|&n| fits(n)).last().unwrap_or(number);
        let gpa = page.gpa.wrapping_sub((number - from) << 12);
        let done = self.map_pages(from, to - from + 1, gpa, page.writable)
            || self.map_pages(number, 1, page.gpa, page.writable);
        if !done {
            self.make_room();
        }
        done
    }

    /// Drops an address space that is not current, or what is mapped of the one that is.
    fn make_room(&mut self) {
        if self.windows.kept.is_empty() {
            let now = self.tsc();
            self.windows.thrashes |= now.wrapping_sub(std::mem::replace(&mut self.windows.last_full, now)) < SOON;
            self.windows.clear();
        } else {
            let oldest = self.windows.kept.remove(0);
            self.windows.drop_space(oldest);
        }
    }

    /// Maps `count` pages from linear page `number`, which are guest-physical memory from `gpa`; writable ones are entered as
    /// [`Page::add_writer`](crate::ram::Page::add_writer) has it.
    fn map_pages(&mut self, number: u64, count: u64, gpa: u64, writable: bool) -> bool {
        let length = count << 12;
        let (Some((file, offset)), Some((last_file, last))) = (self.ram.file(gpa), self.ram.file(gpa + length - PAGE))
        else {
            return false;
        };
        if (last_file, last) != (file, offset + length - PAGE) {
            return false;
        }
        let windows = &mut self.windows;
        let reservation = windows.reservation.as_ref().expect("the address is in a window");
        let space = windows.current.as_mut().expect("the window is its own");
        let at = place(reservation, space, number << 12);
        if !reservation.map(at, length, file, offset, writable) {
            return false;
        }
        for page in 0..count {
            let gpa = gpa + (page << 12);
            space.insert(number + page, gpa | u64::from(writable));
            if writable {
                self.ram.page(gpa).expect("it is RAM").mark_dirty();
                windows.writers.entry(gpa).or_default().push(at + (page << 12));
                windows.writer_count += 1;
            }
        }
        if windows.writer_count >= MAX_WRITERS {
            windows.list_writers();
        }
        true
    }

    /// Before user code runs.
    pub fn settle_windows(&mut self) {
        if std::mem::take(&mut self.cpu.stale_windows) != 0 {
            self.windows.settle();
            self.review_windows();
        }
    }

    /// Drops what is not true any more of an address space whose translations the guest has dropped. A kernel drops them all when it
    /// changes some dozens: looking each up again takes a tenth of what it takes to unmap them and to map them again.
    fn review_windows(&mut self) {
        let Some(mut space) = self.windows.current.take_if(|space| space.doubtful) else { return };
        space.doubtful = false;
        let (began, meter) = (self.tsc(), self.meter.start());
        let due = began.wrapping_sub(self.windows.reviewed) >= REVIEW_PAUSE * self.windows.review_ticks;
        let gone: Option<Vec<u64>> =
            due.then(|| space.pages.iter().filter(|&page| !self.is_still(page)).map(|(&page, _)| page).collect());
        match gone {
            Some(gone) if gone.len() <= space.pages.len() / 2 => {
                let reservation = self.windows.reservation.as_ref().expect("pages are mapped");
                for page in gone {
                    space.remove(page);
                    self.windows.stale.push(place(reservation, &space, page << 12));
                }
                self.windows.settle();
            }
            _ => self.windows.clear_space(&mut space),
        }
        if due {
            self.windows.reviewed = self.tsc();
            self.windows.review_ticks = self.windows.reviewed.wrapping_sub(began);
        }
        self.meter.stop(meter, event::INVALIDATION);
        self.windows.current = Some(space);
    }

    /// Whether a linear page is what [`Space::pages`] has of it, in the current address space. One whose accessed bit
    /// the guest has taken is not: it wants to know of the next access.
    fn is_still(&self, (&page, &value): (&u64, &u64)) -> bool {
        let tables = Untouched::new(|gpa, size| PageTables::read(&*self.ram, gpa, size));
        let found = self.user_page_by(&tables, page << 12, AccessKind::Read);
        found.is_some_and(|found| {
            !tables.missed() && found.gpa == value & !WRITABLE && (found.writable || value & WRITABLE == 0)
        })
    }

    /// Maps the page that the guest was last told it had not got, if it has now: its user code is about to try again.
    pub fn fill_awaited(&mut self) {
        if self.windows.awaited.is_none() || self.cpu.cpl != 3 {
            return;
        }
        let (gva, write) = self.windows.awaited.take().expect("it is there");
        let region = (gva >> REGION_BITS) as u8;
        let open = self.windows.current.iter().flat_map(|space| &space.regions).any(|(r, _)| *r == region);
        if open && !self.fill_window(gva, write) {
            self.windows.awaited = None;
        }
    }

    /// Whether memory of this VM's user code can be in windows.
    pub fn has_windows(&mut self) -> bool {
        if self.windows.forbidden || !self.ram.is_in_files() || !std::is_x86_feature_detected!("bmi2") {
            return false;
        }
        if self.windows.reservation.is_none() {
            let vcpus = self.vm.vcpus.read().unwrap().len();
            return self.windows.prepare(&mut self.cpu, vcpus.max(1));
        }
        true
    }
}

impl Windows {
    /// Lists anew where pages are writable.
    fn list_writers(&mut self) {
        self.forget_writers();
        let Some(reservation) = &self.reservation else { return };
        for space in self.current.iter().chain(&self.kept) {
            for (&page, &gpa) in space.pages.iter().filter(|(_, gpa)| *gpa & WRITABLE != 0) {
                let address = place(reservation, space, page << 12);
                self.writers.entry(gpa & !WRITABLE).or_default().push(address);
                self.writer_count += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests;
