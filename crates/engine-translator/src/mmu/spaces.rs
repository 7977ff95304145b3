//! Address spaces that are not current: what PCIDs are for.
//!
//! The TLB in the vCPU block holds one address space. When a guest switches to another PCID, the non-global
//! entries in it are taken out and kept here, and those of the new PCID put in, if the guest asked to keep
//! them (CR3 bit 63, SDM vol. 3A 4.10.4.1). What is kept is a few hundred entries: copying them costs far
//! less than walking for each again, and finding each piece of translated code again.
//!
//! Invariants:
//! - No kept entry is global, and no kept address space has the current PCID.
//! - Everything that can make a kept entry untrue drops it: what flushes all PCIDs, INVPCID of one, code
//!   made from its page (the write tag goes), and the death of any translated code (the jumps go).

use super::tlb_index;
use crate::core::Core;
use crate::cpu::{JumpContext, JumpEntry, TLB_CONTEXTS, TlbContext, TlbEntry, invalid_tag};

/// Address spaces kept at most; Linux uses six PCIDs a processor.
const KEPT: usize = 8;

/// Jump caches that CR3 loads empty.
const JUMPS: [JumpContext; 2] = [JumpContext::User, JumpContext::User32];

struct KeptEntry {
    context: u8,
    entry: TlbEntry,
    page: u64,
}

struct KeptLink {
    context: JumpContext,
    link: u32,
    host: u64,
}

struct KeptJump {
    context: JumpContext,
    index: u16,
    entry: JumpEntry,
}

#[derive(Default)]
struct AddressSpace {
    pcid: u16,
    entries: Vec<KeptEntry>,
    jumps: Vec<KeptJump>,
    links: Vec<KeptLink>,
}

/// The address spaces kept, the one that left last at the end.
#[derive(Default)]
pub struct Spaces {
    kept: Vec<AddressSpace>,
    /// Emptied ones, for their memory.
    spare: Vec<AddressSpace>,
}

impl Spaces {
    /// Drops everything kept.
    pub fn clear(&mut self) {
        while let Some(space) = self.kept.pop() {
            self.recycle(space);
        }
    }

    /// Drops what is kept for `pcid`.
    pub fn drop_pcid(&mut self, pcid: u16) {
        if let Some(space) = self.take(pcid) {
            self.recycle(space);
        }
    }

    /// Drops the kept jumps: translated code has gone.
    pub fn forget_jumps(&mut self) {
        for space in &mut self.kept {
            space.jumps.clear();
            space.links.clear();
        }
    }

    /// Takes the right to write without attention from kept entries for the page at `gpa`.
    pub fn protect(&mut self, gpa: u64) {
        for kept in self.kept.iter_mut().flat_map(|space| &mut space.entries) {
            if kept.page & !0xfff == gpa {
                kept.entry.write = invalid_tag(tlb_index(0u64.wrapping_sub(kept.entry.read)));
            }
        }
    }

    fn take(&mut self, pcid: u16) -> Option<AddressSpace> {
        let at = self.kept.iter().position(|space| space.pcid == pcid)?;
        Some(self.kept.remove(at))
    }

    fn recycle(&mut self, mut space: AddressSpace) {
        space.entries.clear();
        space.jumps.clear();
        space.links.clear();
        self.spare.push(space);
    }
}

impl Core {
    /// Switches from the address space that CR3 named when it held `old` to the one that it names now, which has
    /// another PCID; with `keep`, the guest says that translations of the new one are still true.
    pub fn switch_address_space(&mut self, old: u64, keep: bool) {
        let [(from, root_before), (to, root)] = [old, self.cpu.cr3].map(|cr3| ((cr3 & 0xfff) as u16, cr3 & !0xfff));
        assert_ne!(from, to);
        let known = self.mmu.spaces.take(to);
        self.keep_address_space(from);
        self.windows.leave(&mut self.cpu, from, root_before);
        // Empties what is left: the entries that were kept are out already.
        self.flush_current();
        if !keep {
            self.windows.drop_pcid(to);
        }
        self.windows.enter(&mut self.cpu, to, root);
        match known {
            Some(space) if keep => self.restore_address_space(space),
            Some(space) => self.mmu.spaces.recycle(space),
            None => {}
        }
    }

    fn keep_address_space(&mut self, pcid: u16) {
        if self.mmu.spaces.kept.len() == KEPT {
            let oldest = self.mmu.spaces.kept.remove(0);
            self.mmu.spaces.recycle(oldest);
        }
        let mut space = self.mmu.spaces.spare.pop().unwrap_or_default();
        space.pcid = pcid;
        for context in 0..TLB_CONTEXTS {
            let kernel = context == TlbContext::Kernel as usize;
            let journal = if kernel { &self.mmu.kernel_local } else { &self.mmu.journal[context] };
            for index in journal.iter() {
                let entry = &mut self.cpu.tlb[context][index];
                let page = self.mmu.pages[context][index];
                if entry.read == invalid_tag(index) || page & 1 != 0 {
                    continue;
                }
                space.entries.push(KeptEntry { context: context as u8, entry: *entry, page });
                entry.read = invalid_tag(index);
                entry.write = invalid_tag(index);
            }
        }
        for context in JUMPS {
            for &index in &self.mmu.jump_journal[context as usize] {
                let slot = &mut self.cpu.jump_cache[context as usize][usize::from(index)];
                if slot.host != 0 {
                    space.jumps.push(KeptJump { context, index, entry: *slot });
                    *slot = JumpEntry::empty(usize::from(index));
                }
            }
        }
        for context in JUMPS {
            for link in self.mmu.link_journal[context as usize].drain(..) {
                let unlinked = self.cpu.unlinked;
                let host = std::mem::replace(&mut self.cpu.links[link as usize], unlinked);
                if host != unlinked {
                    space.links.push(KeptLink { context, link, host });
                }
            }
        }
        self.mmu.spaces.kept.push(space);
    }

    fn restore_address_space(&mut self, space: AddressSpace) {
        for kept in &space.entries {
            let context = usize::from(kept.context);
            let index = tlb_index(0u64.wrapping_sub(kept.entry.read));
            if context == TlbContext::Kernel as usize {
                // A global entry may be in the place now; it is worth more.
                if self.cpu.tlb[context][index].read != invalid_tag(index) {
                    continue;
                }
                self.mmu.kernel_local.note(index);
            }
            self.cpu.tlb[context][index] = kept.entry;
            self.mmu.pages[context][index] = kept.page;
            self.mmu.journal[context].note(index);
        }
        for kept in &space.jumps {
            self.cpu.jump_cache[kept.context as usize][usize::from(kept.index)] = kept.entry;
            self.mmu.jump_journal[kept.context as usize].push(kept.index);
        }
        for kept in &space.links {
            self.set_link(kept.context, kept.link, kept.host);
        }
        self.mmu.spaces.recycle(space);
    }

    /// INVPCID of a PCID that is not current.
    pub fn invalidate_pcid(&mut self, pcid: u16) {
        self.mmu.spaces.drop_pcid(pcid);
        self.windows.drop_pcid(pcid);
    }
}
