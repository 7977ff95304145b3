//! Guest user memory mapped into the host's address space, for hot code: the host's MMU checks its accesses.
//!
//! The guest's user half is 256 *regions* of 512 GiB. A region in use has a *window* of the same size in this
//! process, where the guest's pages are mapped as they are touched: from the files that hold guest RAM, with the
//! rights that the guest's page tables give user code. An access takes its region's delta (window minus region) from
//! [`Cpu::regions`] and adds it; a host page fault in a window maps the page, or shows that the instruction needs the
//! interpreter.
//!
//! Isolation: an address with other bits than 46:0 leaves the lower half of the address space whatever delta is
//! added, and an address in a region leads to its window. Around each window there is nothing for [`GUARD`] bytes, so
//! the delta found for an address is good for all within that distance. Regions without a window lead to one where
//! nothing is ever mapped. All of it is reserved at once, and only this module maps anything there.
//!
//! Invariants:
//! - What is mapped is true: whatever drops entries of the user TLB drops it here too. A page is writable only if a
//!   write to it needs no attention, as with the TLB's write tags.
//! - While translated code runs, the deltas of the current address space do not change but from none to one: a
//!   block may hold one.
//! - Only windows of the current address space are in [`Cpu::regions`].

use crate::core::Core;
use crate::cpu::{Cpu, TlbContext};
use crate::ram::page;
use anyvisor_x86::paging::{Access, AccessKind};
use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

/// log2 of the size of a region: what one entry of a level-4 page table maps.
pub const REGION_BITS: u32 = 39;
pub const REGIONS: usize = 256;
/// Bytes around a window where nothing is mapped: more than any displacement reaches.
pub const GUARD: u64 = 1 << 32;
const STRIDE: u64 = (1 << REGION_BITS) + GUARD;
/// Windows per vCPU. The first stays empty.
const WINDOWS: usize = 33;
/// Pages mapped at most. Each may take two of the host's mappings, of which a process has 65,530 by default
/// (Linux `vm.max_map_count`).
const MAX_PAGES: usize = 20_000;
const PAGE: u64 = 4096;
const WRITABLE: u64 = 1;

/// Addresses for all windows.
struct Reservation(*mut u8);

impl Reservation {
    const LENGTH: usize = (WINDOWS as u64 * STRIDE + GUARD) as usize;

    fn new() -> Option<Reservation> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping of memory that nobody can access.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), Self::LENGTH, libc::PROT_NONE, flags, -1, 0) };
        (address != libc::MAP_FAILED).then(|| Reservation(address.cast()))
    }

    /// The address of a window.
    fn window(&self, number: u8) -> u64 {
        self.0 as u64 + GUARD + u64::from(number) * STRIDE
    }

    /// The window that `address` is in, and the distance from its start.
    fn find(&self, address: u64) -> Option<(u8, u64)> {
        let offset = address.checked_sub(self.0 as u64 + GUARD)?;
        let (number, offset) = (offset / STRIDE, offset % STRIDE);
        (number < WINDOWS as u64 && offset < 1 << REGION_BITS).then_some((number as u8, offset))
    }

    /// Whether `address` is in a window or around one.
    fn contains(&self, address: u64) -> bool {
        address.wrapping_sub(self.0 as u64) < Self::LENGTH as u64
    }

    /// Takes away what is mapped in `length` bytes at `address`, which are in windows.
    fn clear(&self, address: u64, length: u64) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        assert!(self.contains(address) && self.contains(address + length - 1));
        // SAFETY: replaces mappings of this reservation, which nothing but translated code refers to.
        let done = unsafe { libc::mmap(address as *mut _, length as usize, libc::PROT_NONE, flags, -1, 0) };
        // What stays mapped would be wrong: the host must have run out of memory for its own tables.
        assert_ne!(done, libc::MAP_FAILED, "unmapping guest memory: {}", std::io::Error::last_os_error());
    }

    /// Maps a page of a file.
    fn map(&self, address: u64, (file, offset): (RawFd, u64), writable: bool) -> bool {
        let rights = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        assert!(self.contains(address));
        // SAFETY: as above.
        let done = unsafe { libc::mmap(address as *mut _, PAGE as usize, rights, flags, file, offset as libc::off_t) };
        done != libc::MAP_FAILED
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.0.cast(), Self::LENGTH) };
    }
}

/// What is mapped of one address space.
#[derive(Default)]
struct Space {
    pcid: u16,
    /// Region and window.
    regions: Vec<(u8, u8)>,
    /// Guest-physical page by linear page, with [`WRITABLE`].
    pages: HashMap<u64, u64>,
}

/// What is mapped.
#[derive(Default)]
pub struct Windows {
    reservation: Option<Reservation>,
    /// The host gives no addresses.
    refused: bool,
    free: Vec<u8>,
    /// The current address space, once it has anything.
    current: Option<Space>,
    /// Others, the one that left last at the end.
    kept: Vec<Space>,
    /// Host addresses where guest-physical pages are writable, or were.
    writers: HashMap<u64, Vec<u64>>,
    /// Pages mapped, and how often one was.
    mapped: usize,
    pub fills: u64,
}

// SAFETY: the reservation belongs to this value, and any thread may map there.
unsafe impl Send for Windows {}

impl Windows {
    /// Reserves the addresses. Whether there are any; for RAM that is in files.
    pub fn prepare(&mut self, cpu: &mut Cpu) -> bool {
        if self.reservation.is_none() && !self.refused {
            self.reservation = Reservation::new();
            self.refused = self.reservation.is_none();
            self.free = (1..WINDOWS as u8).rev().collect();
            if let Some(reservation) = &self.reservation {
                for region in 0..REGIONS {
                    cpu.regions[region] = delta(reservation, region as u8, 0);
                }
            }
        }
        !self.refused
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
        self.mapped -= space.pages.len();
        space.pages.clear();
    }

    fn drop_space(&mut self, mut space: Space) {
        self.clear_space(&mut space);
        self.free.extend(space.regions.iter().map(|&(_, window)| window));
    }

    /// Nothing of the current address space is mapped any more.
    pub fn clear_current(&mut self) {
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
        self.writers.clear();
    }

    /// What is mapped for `pcid`, which is not current, goes.
    pub fn drop_pcid(&mut self, pcid: u16) {
        if let Some(at) = self.kept.iter().position(|space| space.pcid == pcid) {
            let space = self.kept.remove(at);
            self.drop_space(space);
        }
    }

    /// Puts the current address space, of PCID `from`, aside.
    pub fn leave(&mut self, cpu: &mut Cpu, from: u16) {
        let Some(reservation) = &self.reservation else { return };
        let Some(mut space) = self.current.take() else { return };
        for &(region, _) in &space.regions {
            cpu.regions[usize::from(region)] = delta(reservation, region, 0);
        }
        space.pcid = from;
        self.kept.push(space);
    }

    /// Makes what was kept for `pcid` current.
    pub fn enter(&mut self, cpu: &mut Cpu, pcid: u16) {
        let Some(reservation) = &self.reservation else { return };
        if let Some(at) = self.kept.iter().position(|space| space.pcid == pcid) {
            let space = self.kept.remove(at);
            for &(region, window) in &space.regions {
                cpu.regions[usize::from(region)] = delta(reservation, region, window);
            }
            self.current = Some(space);
        }
    }

    /// The page of `gva` goes, in the current address space.
    pub fn drop_page(&mut self, gva: u64) {
        let Some(space) = &mut self.current else { return };
        if space.pages.remove(&(gva >> 12)).is_some() {
            self.mapped -= 1;
            let reservation = self.reservation.as_ref().expect("pages are mapped");
            reservation.clear(place(reservation, space, gva & !(PAGE - 1)), PAGE);
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
                    space.pages.remove(&page);
                    self.mapped -= 1;
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
        cpu.regions[usize::from(region)] = delta(reservation, region, window);
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
    /// A host page fault of translated code at `address`, by a write or not. Whether the access can be made
    /// again; else the instruction is the interpreter's.
    pub fn window_fault(&mut self, address: u64, write: bool) -> bool {
        let Some((window, offset)) = self.windows.reservation.as_ref().and_then(|r| r.find(address)) else {
            return false;
        };
        if window == 0 {
            self.open_regions(offset);
            return false;
        }
        let regions = self.windows.current.iter().flat_map(|space| &space.regions);
        let Some(&(region, _)) = regions.clone().find(|(_, w)| *w == window) else { return false };
        self.fill_window(u64::from(region) << REGION_BITS | offset, address, write)
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

    /// Guest-physical page of linear address `gva` for user code, and whether writes may go unseen.
    fn user_page(&self, gva: u64, write: bool) -> Option<(u64, bool)> {
        let kind = if write { AccessKind::Write } else { AccessKind::Read };
        let access = Access { kind, user: true, implicit: false };
        let mapping = anyvisor_x86::paging::walk(&*self.ram, &self.user_paging_mode(), gva, access).ok()?;
        let gpa = mapping.gpa & !(PAGE - 1);
        (!self.is_lapic_page(gpa)).then_some((gpa, mapping.writable && mapping.dirty))
    }

    fn fill_window(&mut self, gva: u64, address: u64, write: bool) -> bool {
        let Some((gpa, unseen)) = self.user_page(gva, write) else { return false };
        let (Some(file), Some(attributes)) = (self.ram.file(gpa), self.ram.page_attributes(gpa)) else { return false };
        if self.debugger.watches() {
            return false;
        }
        let writable = unseen && attributes.load(Ordering::Relaxed) & page::CODE == 0;
        if write && !writable {
            return false;
        }
        if writable {
            attributes.fetch_or(page::WRITABLE_IN_TLB | page::DIRTY, Ordering::Relaxed);
        }
        if self.windows.mapped >= MAX_PAGES {
            self.windows.make_room();
        }
        let windows = &mut self.windows;
        let at = address & !(PAGE - 1);
        let reservation = windows.reservation.as_ref().expect("the address is in a window");
        if !reservation.map(at, file, writable) {
            windows.make_room();
            return false;
        }
        windows.fills += 1;
        let space = windows.current.as_mut().expect("the window is its own");
        if space.pages.insert(gva >> 12, gpa | u64::from(writable)).is_none() {
            windows.mapped += 1;
        }
        if writable {
            windows.writers.entry(gpa).or_default().push(at);
        }
        true
    }

    /// The rights that the user TLB's entries have.
    fn user_paging_mode(&self) -> anyvisor_x86::paging::PagingMode {
        self.paging_mode(false)
    }

    /// Whether accesses of this VM's user code can be direct.
    pub fn has_windows(&mut self) -> bool {
        const _: () = assert!(TlbContext::User as usize == 2);
        self.ram.is_in_files() && std::is_x86_feature_detected!("bmi2") && self.windows.prepare(&mut self.cpu)
    }
}

impl Windows {
    /// Drops address spaces that are not current, or all that is mapped.
    fn make_room(&mut self) {
        if self.kept.is_empty() {
            self.clear_current();
        } else {
            let oldest = self.kept.remove(0);
            self.drop_space(oldest);
        }
        if self.mapped == 0 {
            self.writers.clear();
        }
    }
}
