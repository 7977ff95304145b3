//! Guest-linear memory: the software TLB, its misses, and the generic access path.
//!
//! The TLB arrays live in the vCPU block ([`Cpu::tlb`](crate::cpu::Cpu)) where generated code probes them;
//! this module fills and flushes them. Each fill is written in a journal, so that a flush costs what was
//! filled, not the size of the table. Only RAM is ever entered: memory-mapped I/O always comes here.
//!
//! A write tag is set only when a write needs no attention: the page's dirty bit is set and no translated code was made
//! from the page. A page with a write tag counts as written, so whoever takes that mark away has the tags dropped too.

mod journal;
mod spaces;

use crate::core::{Core, Notice};
use crate::cpu::{
    Cpu, JUMP_CACHE_ENTRIES, JUMP_CONTEXTS, JumpContext, JumpEntry, LINKS, Mode, TLB_CONTEXTS, TLB_ENTRIES, Tag,
    TlbContext, invalid_tag,
};
use crate::hash::AddressSet;
use crate::ram::{PAGE_SIZE, copy_from_guest, copy_to_guest};
use anyvisor_engine::GuestIo;
use anyvisor_engine::tally::event;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::cr0;
use anyvisor_x86::paging::{self, Access, AccessKind, Mapping, PagingMode};
use journal::Journal;
use spaces::Spaces;
use std::sync::atomic::{Ordering, fence};

/// The local APIC's page in xAPIC mode, when not moved.
pub const LAPIC_DEFAULT_BASE: u64 = 0xfee0_0000;

/// Code pages whose places are remembered.
const CODE_PAGES: usize = 256;

/// With whose rights an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// The current privilege level's, and RFLAGS.AC under SMAP.
    Current,
    /// Supervisor whatever the CPL is: descriptor tables, TSS, exception frames (SDM vol. 3A 4.6.1).
    Implicit,
}

/// A place in RAM.
#[derive(Clone, Copy, Debug)]
pub struct InRam {
    pub host: *mut u8,
    pub gpa: u64,
}

/// What a TLB miss of translated code comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// The entry is there: look again.
    Ready,
    /// Interpret the instruction: it faults, or touches a device.
    Interpret,
    /// Interpret it, because it (or the group it leads) crosses a page or writes to a page with translated
    /// code: this is likely to happen again.
    Misfit,
}

/// Pages of [`Mmu::jump_pages`] until it is emptied.
const MAX_JUMP_PAGES: usize = 16384;

/// Bookkeeping behind the TLB arrays.
pub struct Mmu {
    /// Guest-physical page addresses of TLB entries, bit 0: global.
    pages: Box<[[u64; TLB_ENTRIES]; TLB_CONTEXTS]>,
    /// Indices filled since the last flush, per context.
    journal: [Journal; TLB_CONTEXTS],
    /// Indices in the kernel TLB whose pages are not global.
    kernel_local: Journal,
    /// 2 MiB regions that had an entry from a large page.
    large: AddressSet<u64>,
    last_large: u64,
    /// Pages lately fetched from, by linear page number.
    code_pages: Box<[CodePage; CODE_PAGES]>,
    /// Linear pages whose mapping entries of the jump caches, links and the return stack rely on, and some that
    /// they did: the upper half of the address space, where kernels are, apart from the lower. With
    /// [`MAX_JUMP_PAGES`] it may be any page.
    jump_pages: [AddressSet<u64>; 2],
    jump_journal: [Vec<u16>; JUMP_CONTEXTS],
    /// Links whose targets are known, by the context of those.
    link_journal: [Vec<u32>; JUMP_CONTEXTS],
    /// Kernel code has been fetched from a page that is not global.
    kernel_code_local: bool,
    /// Kernel code has been noted in the lower half of the address space.
    kernel_code_low: bool,
    /// What other PCIDs have left.
    spaces: Spaces,
}

// SAFETY: the pointers of `code_pages` are into the VM's RAM, which any thread may address by raw copies.
unsafe impl Send for Mmu {}

impl Mmu {
    pub fn new() -> Mmu {
        Mmu {
            pages: vec![[0; TLB_ENTRIES]; TLB_CONTEXTS].into_boxed_slice().try_into().expect("as many as contexts"),
            journal: Default::default(),
            kernel_local: Journal::default(),
            large: AddressSet::default(),
            last_large: u64::MAX,
            code_pages: Box::new([CodePage::EMPTY; CODE_PAGES]),
            jump_pages: Default::default(),
            jump_journal: Default::default(),
            link_journal: Default::default(),
            kernel_code_local: false,
            kernel_code_low: false,
            spaces: Spaces::default(),
        }
    }
}

impl Default for Mmu {
    fn default() -> Self {
        Self::new()
    }
}

/// Where a page of code is; true while its generation is current.
#[derive(Clone, Copy)]
struct CodePage {
    page: u64,
    user: bool,
    generation: u32,
    gpa: u64,
    host: *mut u8,
}

impl CodePage {
    /// No page is at an odd address.
    const EMPTY: CodePage = CodePage { page: 1, user: false, generation: 0, gpa: 0, host: std::ptr::null_mut() };
}

fn code_page_index(gva: u64) -> usize {
    (gva >> 12) as usize % CODE_PAGES
}

fn drop_entry(cpu: &mut Cpu, context: usize, index: usize) {
    let entry = &mut cpu.tlb[context][index];
    entry.read = invalid_tag(index);
    entry.write = invalid_tag(index);
}

fn tlb_index(gva: u64) -> usize {
    ((gva >> 12) as usize) & (TLB_ENTRIES - 1)
}

impl Core {
    pub(crate) fn paging_mode(&self, ac: bool) -> PagingMode {
        PagingMode {
            cr0: self.cpu.cr0,
            cr3: self.cpu.cr3,
            cr4: self.cpu.cr4,
            efer: self.cpu.efer,
            ac,
            physical_bits: self.physical_bits,
            pkru: self.cpu.pkru,
            pkrs: self.cpu.pkrs,
        }
    }

    /// Walks the guest's page tables for an access at the current privilege level, or implicitly.
    ///
    /// # Errors
    /// The #PF, or #GP(0) for a non-canonical address (a stack access turns that into #SS(0)).
    pub fn translate(&self, gva: u64, kind: AccessKind, rights: Rights) -> Result<Mapping, Exception> {
        let implicit = rights == Rights::Implicit;
        let user = !implicit && self.cpu.cpl == 3;
        let ac = self.cpu.rflags & anyvisor_x86::bits::rflags::AC != 0;
        paging::walk(&*self.ram, &self.paging_mode(ac), gva, Access { kind, user, implicit })
    }

    fn context(&self, rights: Rights) -> TlbContext {
        match rights {
            Rights::Implicit => TlbContext::Kernel,
            Rights::Current => self.cpu.data_context(),
        }
    }

    /// Handles a miss of translated code in `context` at `gva`. If the tag is there already, what missed is
    /// the end of the page: the access crosses it.
    pub fn fill(&mut self, context: TlbContext, gva: u64, tag: Tag) -> Fill {
        let entry = &self.cpu.tlb[context as usize][tlb_index(gva)];
        if gva >> 32 != 0 && self.cpu.mode() != Mode::Long64 {
            return Fill::Interpret; // an address that wraps, or through a closed segment
        }
        let found = if tag == Tag::Read { entry.read } else { entry.write };
        if found == 0u64.wrapping_sub(gva & !0xfff) {
            return Fill::Misfit;
        }
        match self.fill_page(context, gva, tag == Tag::Write) {
            Ok(true) if tag == Tag::Upgrade => {
                let entry = &self.cpu.tlb[context as usize][tlb_index(gva)];
                if entry.write == 0u64.wrapping_sub(gva & !0xfff) { Fill::Ready } else { Fill::Misfit }
            }
            Ok(true) => Fill::Ready,
            // Present after all, but not for writing.
            Ok(false) if self.cpu.tlb[context as usize][tlb_index(gva)].read == 0u64.wrapping_sub(gva & !0xfff) => {
                Fill::Misfit
            }
            Ok(false) | Err(_) => Fill::Interpret,
        }
    }

    /// Enters the page of `gva`; `Ok(true)` if the access can now hit.
    fn fill_page(&mut self, context: TlbContext, gva: u64, write: bool) -> Result<bool, Exception> {
        let user = context == TlbContext::User;
        let mode = self.paging_mode(context == TlbContext::KernelAc);
        let kind = if write { AccessKind::Write } else { AccessKind::Read };
        let mapping = paging::walk(&*self.ram, &mode, gva, Access { kind, user, implicit: false })?;
        let gpa = mapping.gpa & !0xfff;
        if self.is_lapic_page(gpa) {
            return Ok(false);
        }
        let Some(host) = self.ram.host(gpa, PAGE_SIZE) else { return Ok(false) };
        let page = self.ram.page(gpa).expect("it is RAM");
        let mut may_write = mapping.writable || (!user && self.cpu.cr0 & cr0::WP == 0);
        if self.debugger.watches() {
            if self.debugger.guards(gva, false) {
                return Ok(false);
            }
            may_write &= !self.debugger.guards(gva, true);
        }
        let write_tag = may_write && mapping.dirty && page.add_writer(self.bit());
        if write_tag && page.mark_dirty() {
            self.ram.allocate_around(gpa);
        }
        let index = tlb_index(gva);
        let tag = 0u64.wrapping_sub(gva & !0xfff);
        let entry = &mut self.cpu.tlb[context as usize][index];
        entry.read = tag;
        entry.write = if write_tag { tag } else { invalid_tag(index) };
        entry.host = host as u64;
        entry.delta = (host as u64).wrapping_sub(gva & !0xfff);
        self.mmu.pages[context as usize][index] = gpa | u64::from(mapping.global);
        self.mmu.journal[context as usize].note(index);
        if context == TlbContext::Kernel && !mapping.global {
            self.mmu.kernel_local.note(index);
        }
        if mapping.page_bits > 12 {
            self.note_large(gva);
        }
        Ok(write_tag || !write)
    }

    /// Notes that an entry comes from a page of 2 MiB or more.
    pub(crate) fn note_large(&mut self, gva: u64) {
        if self.mmu.last_large != gva >> 21 {
            self.mmu.last_large = gva >> 21;
            self.mmu.large.insert(gva >> 21);
        }
    }

    pub(crate) fn is_lapic_page(&self, gpa: u64) -> bool {
        self.lapic.mmio_base() == Some(gpa & !0xfff)
    }

    /// Drops all entries of a TLB.
    fn empty(&mut self, context: usize) {
        let (cpu, journal) = (&mut *self.cpu, &mut self.mmu.journal[context]);
        journal.iter().for_each(|index| drop_entry(cpu, context, index));
        journal.clear();
    }

    /// Drops every translation, global ones included.
    pub fn flush_all(&mut self) {
        self.flush_data();
        self.mmu.large.clear();
        self.mmu.last_large = u64::MAX;
        self.flush_jumps();
    }

    /// Changes what protection keys let data accesses do. They are no part of what code was fetched from.
    pub fn set_protection_keys(&mut self, pkru: u32, pkrs: u32) {
        if (pkru, pkrs) != (self.cpu.pkru, self.cpu.pkrs) {
            (self.cpu.pkru, self.cpu.pkrs) = (pkru, pkrs);
            self.flush_data();
        }
    }

    /// Drops the entries of all TLBs, those of other PCIDs too.
    fn flush_data(&mut self) {
        self.cpu.empty_micro();
        self.windows.clear();
        for context in 0..TLB_CONTEXTS {
            self.empty(context);
        }
        self.mmu.kernel_local.clear();
        self.mmu.spaces.clear();
    }

    /// Drops all translations but global ones, those of all PCIDs.
    pub fn flush_non_global(&mut self) {
        self.windows.clear();
        self.mmu.spaces.clear();
        self.flush_current();
    }

    /// Drops the translations of the current address space but global ones, as a CR3 load does.
    pub fn flush_current(&mut self) {
        self.cpu.empty_micro();
        self.cpu.stale_windows |= u32::from(self.windows.doubt_current());
        for context in [TlbContext::KernelAc as usize, TlbContext::User as usize] {
            self.empty(context);
        }
        let (cpu, kernel) = (&mut *self.cpu, TlbContext::Kernel as usize);
        for index in self.mmu.kernel_local.iter() {
            if self.mmu.pages[kernel][index] & 1 == 0 {
                drop_entry(cpu, kernel, index);
            }
        }
        self.mmu.kernel_local.clear();
        self.flush_non_global_jumps();
    }

    /// INVLPG: drops the translation of the page that holds `gva`, of whatever size.
    pub fn invalidate_page(&mut self, gva: u64) {
        self.cpu.empty_micro();
        if self.mmu.large.contains(&(gva >> 21)) {
            self.invalidate_large(gva);
        } else {
            self.cpu.stale_windows |= u32::from(self.windows.drop_page(gva));
            let (index, page) = (tlb_index(gva), gva & !0xfff);
            for context in 0..TLB_CONTEXTS {
                if self.cpu.tlb[context][index].read == 0u64.wrapping_sub(page) {
                    drop_entry(&mut self.cpu, context, index);
                }
            }
        }
        self.mmu.code_pages[code_page_index(gva)] = CodePage::EMPTY;
        if self.jumps_may_be_in(gva) {
            if self.half(gva) == 0 && !self.mmu.kernel_code_low {
                self.flush_low_jumps();
            } else {
                self.flush_jumps();
            }
        }
    }

    /// A page of 2 MiB, 4 MiB or 1 GiB may have left entries anywhere in its range.
    fn invalidate_large(&mut self, gva: u64) {
        self.windows.drop_range(gva >> 30 << 18, 1 << 18);
        for context in 0..TLB_CONTEXTS {
            let cpu = &mut *self.cpu;
            for index in self.mmu.journal[context].iter() {
                let page = 0u64.wrapping_sub(cpu.tlb[context][index].read);
                if page >> 30 == gva >> 30 {
                    drop_entry(cpu, context, index);
                }
            }
        }
        // `large` is about all address spaces.
        self.mmu.spaces.clear();
        self.mmu.large.retain(|region| region >> 9 != gva >> 30);
        self.mmu.last_large = u64::MAX;
        self.flush_jumps();
    }

    /// Makes sure that writes to the page at `gpa` are seen, because this vCPU is about to make code of it. Other vCPUs that
    /// could write to it unseen are out of translated code once, until when this one waits.
    pub fn protect_code_page(&mut self, gpa: u64) {
        let (gpa, bit) = (gpa & !0xfff, self.bit());
        let Some(writers) = self.ram.page(gpa).and_then(|page| page.add_code(bit)) else { return };
        if writers & bit != 0 {
            self.take_write_tags(gpa);
        }
        if writers & !bit != 0 {
            self.tell_others(writers, Notice::CodeMade(gpa), true);
        }
    }

    /// Takes the write tags away from every entry for the page at `gpa`: somebody makes code from it.
    pub fn take_write_tags(&mut self, gpa: u64) {
        self.cpu.empty_micro();
        for context in 0..TLB_CONTEXTS {
            for index in self.mmu.journal[context].iter() {
                if self.mmu.pages[context][index] & !0xfff == gpa {
                    self.cpu.tlb[context][index].write = invalid_tag(index);
                }
            }
        }
        self.mmu.spaces.protect(gpa);
        self.windows.protect(gpa);
        if let Some(page) = self.ram.page(gpa) {
            page.remove_writer(self.bit());
        }
    }

    /// This vCPU has no translated code of the page at `gpa` any more.
    pub fn unprotect_code_page(&mut self, gpa: u64) {
        if let Some(page) = self.ram.page(gpa) {
            page.remove_code(self.bit());
        }
    }

    /// Notes what this vCPU's Rust code has just written to `length` bytes at `gpa`, in one page of RAM, if there is translated
    /// code: that may have been made since the right to write was looked at.
    pub fn wrote(&mut self, gpa: u64, length: u64) {
        // Either this sees that code is made of the page, or who makes it sees what has been written.
        fence(Ordering::SeqCst);
        if self.ram.is_code(gpa) {
            self.code_writes.push((gpa, length as u32));
        }
    }

    /// Enters `host` as the code for linear address `gva`.
    pub fn add_jump(&mut self, context: JumpContext, gva: u64, host: u64) {
        let index = gva as usize & (JUMP_CACHE_ENTRIES - 1);
        self.cpu.jump_cache[context as usize][index] = JumpEntry { key: 0u64.wrapping_sub(gva), host };
        self.note_code(gva);
        let journal = &mut self.mmu.jump_journal[context as usize];
        journal.push(index as u16);
        if journal.len() >= 2 * JUMP_CACHE_ENTRIES {
            journal.sort_unstable();
            journal.dedup();
        }
    }

    /// Makes `link` lead to `host`, the code for its target, which is code of `context`.
    pub fn set_link(&mut self, context: JumpContext, link: u32, host: u64) {
        let place = &mut self.cpu.links[link as usize];
        let known = std::mem::replace(place, host) != self.cpu.unlinked;
        if !known {
            let journal = &mut self.mmu.link_journal[context as usize];
            journal.push(link);
            // A signal takes links away that the journal then names twice.
            if journal.len() >= 2 * LINKS {
                journal.sort_unstable();
                journal.dedup();
            }
        }
    }

    /// Takes `link` away if it leads to `host`, which is no code any more.
    pub fn remove_link(&mut self, link: u32, host: u64) {
        let unlinked = self.cpu.unlinked;
        let place = &mut self.cpu.links[link as usize];
        if *place == host {
            *place = unlinked;
        }
    }

    /// Notes that translated code relies on the mapping of `gva`.
    pub fn note_code(&mut self, gva: u64) {
        let half = self.half(gva);
        let pages = &mut self.mmu.jump_pages[half];
        if pages.len() < MAX_JUMP_PAGES {
            pages.insert(gva >> 12);
        }
        self.mmu.kernel_code_low |= half == 0 && self.cpu.cpl != 3;
    }

    /// Removes `host` from the jump caches, if it is there as the code for `gva`.
    pub fn remove_jump(&mut self, context: JumpContext, gva: u64, host: u64) {
        self.mmu.spaces.forget_jumps();
        let index = gva as usize & (JUMP_CACHE_ENTRIES - 1);
        let entry = &mut self.cpu.jump_cache[context as usize][index];
        if entry.host == host {
            *entry = JumpEntry::empty(index);
        }
    }

    fn jumps_may_be_in(&self, gva: u64) -> bool {
        let pages = &self.mmu.jump_pages[self.half(gva)];
        pages.len() >= MAX_JUMP_PAGES || pages.contains(&(gva >> 12))
    }

    /// Which part of the address space `gva` is in: 1 is where kernels are. Outside long mode that is its top
    /// gigabyte, as Linux has it.
    fn half(&self, gva: u64) -> usize {
        let upper = if self.cpu.is_long_mode() { gva >> 63 != 0 } else { gva >= 0xc000_0000 };
        usize::from(upper)
    }

    /// Empties the jump caches, those of all PCIDs.
    pub fn flush_jumps(&mut self) {
        self.mmu.spaces.forget_jumps();
        for context in 0..JUMP_CONTEXTS {
            self.flush_jump_context(context);
        }
        self.mmu.jump_pages.iter_mut().for_each(AddressSet::clear);
        self.mmu.kernel_code_local = false;
        self.mmu.kernel_code_low = false;
        self.cpu.code_generation[0] = self.cpu.code_generation[0].wrapping_add(1);
        self.forget_code_pages();
    }

    /// Empties the jump caches of what is in the lower half of the address space: user code.
    fn flush_low_jumps(&mut self) {
        self.mmu.spaces.forget_jumps();
        self.flush_jump_context(JumpContext::User as usize);
        self.flush_jump_context(JumpContext::User32 as usize);
        self.mmu.jump_pages[0].clear();
        self.forget_code_pages();
    }

    fn flush_jump_context(&mut self, context: usize) {
        let mut journal = std::mem::take(&mut self.mmu.jump_journal[context]);
        for &index in &journal {
            self.cpu.jump_cache[context][index as usize] = JumpEntry::empty(index as usize);
        }
        journal.clear();
        self.mmu.jump_journal[context] = journal;
        let cpu = &mut *self.cpu;
        for link in self.mmu.link_journal[context].drain(..) {
            cpu.links[link as usize] = cpu.unlinked;
        }
    }

    fn forget_code_pages(&mut self) {
        self.cpu.return_stack = self.cpu.return_stack_base;
        self.cpu.code_generation[1] = self.cpu.code_generation[1].wrapping_add(1);
    }

    /// What a CR3 load leaves of the jump caches: kernel code, if all of it is in global pages.
    fn flush_non_global_jumps(&mut self) {
        if self.mmu.kernel_code_local {
            return self.flush_jumps();
        }
        self.flush_jump_context(JumpContext::User as usize);
        self.flush_jump_context(JumpContext::User32 as usize);
        self.forget_code_pages();
    }

    /// Guest-physical and host address of the code byte at `gva`; host is `None` outside RAM.
    ///
    /// # Errors
    /// The exception that fetching there raises.
    pub fn fetch_page(&mut self, gva: u64) -> Result<(u64, Option<*mut u8>), Exception> {
        let user = self.cpu.cpl == 3;
        let (page, offset) = (gva & !0xfff, gva & 0xfff);
        let generation = self.cpu.code_generation[usize::from(user)];
        let known = &self.mmu.code_pages[code_page_index(gva)];
        if known.page == page && known.user == user && known.generation == generation {
            return Ok((known.gpa | offset, Some(known.host.wrapping_add(offset as usize))));
        }
        let mapping = self.translate(gva, AccessKind::Fetch, Rights::Current)?;
        let gpa = mapping.gpa & !0xfff;
        self.mmu.kernel_code_local |= !user && !mapping.global;
        let host = self.ram.host(gpa, PAGE_SIZE);
        if let Some(host) = host {
            self.mmu.code_pages[code_page_index(gva)] = CodePage { page, user, generation, gpa, host };
        }
        Ok((gpa | offset, host.map(|h| h.wrapping_add(offset as usize))))
    }

    /// Fetches up to `data.len()` (at most 15) instruction bytes at linear address `gva`; returns how many.
    /// Fewer only where the second page cannot be fetched, which matters only if the instruction needs it.
    ///
    /// # Errors
    /// The exception that fetching the first byte raises.
    pub fn fetch(&mut self, gva: u64, data: &mut [u8]) -> Result<usize, Exception> {
        let first = data.len().min((PAGE_SIZE - (gva & 0xfff)) as usize);
        self.fetch_within_page(gva, &mut data[..first])?;
        if first == data.len() {
            return Ok(first);
        }
        match self.fetch_within_page(gva.wrapping_add(first as u64), &mut data[first..]) {
            Ok(()) => Ok(data.len()),
            Err(_) => Ok(first),
        }
    }

    fn fetch_within_page(&mut self, gva: u64, data: &mut [u8]) -> Result<(), Exception> {
        let (gpa, _) = self.fetch_page(gva)?;
        if !self.ram.read(gpa, data) {
            data.fill(0xff);
        }
        Ok(())
    }

    /// Where `size` bytes at `gva` are if one page of RAM holds them and, for a write, no translated code is there. For
    /// accesses in place; a write is followed by [`Core::wrote`].
    ///
    /// # Errors
    /// The exception that the access raises.
    pub fn host_address(
        &mut self,
        gva: u64,
        size: u64,
        write: bool,
        rights: Rights,
    ) -> Result<Option<InRam>, Exception> {
        if (gva & 0xfff) + size > PAGE_SIZE {
            return Ok(None);
        }
        let context = self.context(rights);
        let index = tlb_index(gva);
        let entry = &self.cpu.tlb[context as usize][index];
        let tag = if write { entry.write } else { entry.read };
        if gva.wrapping_add(tag) >= PAGE_SIZE && !self.fill_page(context, gva, write)? {
            return Ok(None);
        }
        let offset = gva & 0xfff;
        Ok(Some(InRam {
            host: (self.cpu.tlb[context as usize][index].host + offset) as *mut u8,
            gpa: self.mmu.pages[context as usize][index] & !0xfff | offset,
        }))
    }

    /// Reads guest-linear memory, devices included.
    ///
    /// # Errors
    /// The exception that the access raises; nothing has been read from a device then.
    pub fn read(&mut self, io: &dyn GuestIo, gva: u64, data: &mut [u8], rights: Rights) -> Result<(), Exception> {
        if let Some(place) = self.host_address(gva, data.len() as u64, false, rights)? {
            // SAFETY: host_address checked that data.len() bytes of one RAM page are there.
            unsafe { copy_from_guest(place.host, data) };
            return Ok(());
        }
        let pieces = self.pieces(gva, data.len(), AccessKind::Read, rights)?;
        let mut done = 0;
        for (gpa, length) in pieces.into_iter().flatten() {
            self.read_physical(io, gpa, &mut data[done..done + length]);
            done += length;
        }
        Ok(())
    }

    /// Writes guest-linear memory, devices included. Both pages of a crossing write are checked first.
    ///
    /// # Errors
    /// The exception that the access raises; nothing has been written then.
    pub fn write(&mut self, io: &dyn GuestIo, gva: u64, data: &[u8], rights: Rights) -> Result<(), Exception> {
        if let Some(place) = self.host_address(gva, data.len() as u64, true, rights)? {
            // SAFETY: as in `read`.
            unsafe { copy_to_guest(place.host, data) };
            self.wrote(place.gpa, data.len() as u64);
            return Ok(());
        }
        let pieces = self.pieces(gva, data.len(), AccessKind::Write, rights)?;
        let mut done = 0;
        for (gpa, length) in pieces.into_iter().flatten() {
            self.write_physical(io, gpa, &data[done..done + length]);
            done += length;
        }
        Ok(())
    }

    /// Raises what a write of `size` bytes at `gva` would raise, without writing.
    ///
    /// # Errors
    /// The exception that the access raises.
    pub fn probe_write(&mut self, gva: u64, size: usize, rights: Rights) -> Result<(), Exception> {
        if self.host_address(gva, size as u64, true, rights)?.is_none() {
            self.pieces(gva, size, AccessKind::Write, rights)?;
        }
        Ok(())
    }

    /// Guest-physical pieces of an access, one or two.
    fn pieces(
        &mut self,
        gva: u64,
        size: usize,
        kind: AccessKind,
        rights: Rights,
    ) -> Result<[Option<(u64, usize)>; 2], Exception> {
        let first = size.min((PAGE_SIZE - (gva & 0xfff)) as usize);
        let low = self.translate(gva, kind, rights)?;
        if first == size {
            return Ok([Some((low.gpa, size)), None]);
        }
        let mut next = gva.wrapping_add(first as u64);
        if !self.cpu.is_long_mode() {
            next &= 0xffff_ffff;
        }
        let high = self.translate(next, kind, rights)?;
        Ok([Some((low.gpa, first)), Some((high.gpa, size - first))])
    }

    /// Reads guest-physical memory: RAM, the local APIC's page, or a device.
    pub fn read_physical(&mut self, io: &dyn GuestIo, gpa: u64, data: &mut [u8]) {
        if self.is_lapic_page(gpa) {
            return self.lapic_mmio_read(gpa & 0xfff, data);
        }
        if self.ram.read(gpa, data) {
            return;
        }
        for (i, chunk) in data.chunks_mut(8).enumerate() {
            self.met = Some(event::MMIO);
            io.mmio_read(gpa + 8 * i as u64, chunk);
        }
    }

    /// Writes guest-physical memory; writes over translated code are noted in `code_writes`.
    pub fn write_physical(&mut self, io: &dyn GuestIo, gpa: u64, data: &[u8]) {
        if self.is_lapic_page(gpa) {
            return self.lapic_mmio_write(io, gpa & 0xfff, data);
        }
        if self.ram.write(gpa, data) {
            return self.wrote(gpa, data.len() as u64);
        }
        for (i, chunk) in data.chunks(8).enumerate() {
            self.met = Some(event::MMIO);
            io.mmio_write(gpa + 8 * i as u64, chunk);
        }
    }
}
