//! The page walk (SDM vol. 3A chapter 4): 32-bit, PAE, 4-level and 5-level paging, as one pure function
//! over a reader of guest-physical memory. It sets accessed and dirty bits through the same interface.

use crate::bits::{cr0, cr4, efer};
use crate::exception::{Exception, pf};
use std::cell::Cell;

/// Page-table entry bits (SDM vol. 3A table 4-19).
pub mod pte {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    /// The lowest bit of a page's protection key, which has four.
    pub const KEY_SHIFT: u32 = 59;
}

/// Guest-physical memory as the walk sees it.
pub trait PageTables {
    /// Reads an aligned entry of `size` (4 or 8) bytes. Memory that is not RAM reads as `None`.
    fn read(&self, gpa: u64, size: u8) -> Option<u64>;
    /// Replaces `old` by `new` atomically; `false` if the entry no longer holds `old`.
    fn compare_exchange(&self, gpa: u64, size: u8, old: u64, new: u64) -> bool;
}

/// Page tables that a walk leaves as they are, read by a function like [`PageTables::read`].
pub struct Untouched<F> {
    read: F,
    missed: Cell<bool>,
}

impl<F: Fn(u64, u8) -> Option<u64>> Untouched<F> {
    pub fn new(read: F) -> Untouched<F> {
        Untouched { read, missed: Cell::new(false) }
    }

    /// Whether a walk would have set an accessed or a dirty bit.
    pub fn missed(&self) -> bool {
        self.missed.get()
    }
}

impl<F: Fn(u64, u8) -> Option<u64>> PageTables for Untouched<F> {
    fn read(&self, gpa: u64, size: u8) -> Option<u64> {
        (self.read)(gpa, size)
    }

    fn compare_exchange(&self, _gpa: u64, _size: u8, _old: u64, _new: u64) -> bool {
        self.missed.set(true);
        true
    }
}

/// What the walk depends on besides memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingMode {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// RFLAGS.AC is set, which lets supervisor code reach user pages under SMAP.
    pub ac: bool,
    /// Width of physical addresses in bits (CPUID 8000_0008h), at most 52.
    pub physical_bits: u8,
    /// Rights by protection key, two bits each, of user pages under CR4.PKE and of others under CR4.PKS.
    pub pkru: u32,
    pub pkrs: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    Read,
    Write,
    Fetch,
}

/// One access: its kind, and with whose rights it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub kind: AccessKind,
    pub user: bool,
    /// An implicit supervisor access (descriptor tables, TSS): SMAP applies whatever AC says.
    pub implicit: bool,
}

/// A successful walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Guest-physical address of the byte asked for.
    pub gpa: u64,
    /// log2 of the page size: 12, 21, 22 or 30.
    pub page_bits: u8,
    /// The access rights of every level combined, for whoever made the access, and whether the page's protection key
    /// lets it be written to.
    pub writable: bool,
    pub user: bool,
    pub executable: bool,
    pub global: bool,
    /// The dirty bit of the final entry is set, so that further writes need no walk.
    pub dirty: bool,
}

/// Translates `gva` for `access`, setting accessed (and for writes dirty) bits.
///
/// # Errors
/// The #PF (or, for a non-canonical address under 4- or 5-level paging, the #GP(0)) that the access raises.
pub fn walk<T: PageTables>(tables: &T, mode: &PagingMode, gva: u64, access: Access) -> Result<Mapping, Exception> {
    if mode.cr0 & cr0::PG == 0 {
        return Ok(Mapping {
            gpa: gva & 0xffff_ffff,
            page_bits: 12,
            writable: true,
            user: true,
            executable: true,
            global: false,
            dirty: true,
        });
    }
    if mode.efer & efer::LMA != 0 {
        let levels = if mode.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
        let shift = 64 - (12 + 9 * levels);
        if ((gva << shift) as i64 >> shift) as u64 != gva {
            return Err(Exception::gp(0));
        }
        let root = mode.cr3 & 0x000f_ffff_ffff_f000;
        walk_levels(tables, mode, gva, access, root, levels, 8, true)
    } else if mode.cr4 & cr4::PAE != 0 {
        // SDM vol. 3A 4.4.1: the four PDPTEs have no access rights of their own.
        let gva = gva & 0xffff_ffff;
        let entry_gpa = (mode.cr3 & 0xffff_ffe0) + ((gva >> 30) << 3);
        let Some(entry) = tables.read(entry_gpa, 8).filter(|e| e & pte::P != 0) else {
            return Err(fault(mode, gva, access, 0));
        };
        walk_levels(tables, mode, gva, access, entry & 0x000f_ffff_ffff_f000, 2, 8, true)
    } else {
        walk_levels(tables, mode, gva & 0xffff_ffff, access, mode.cr3 & 0xffff_f000, 2, 4, mode.cr4 & cr4::PSE != 0)
    }
}

fn fault(mode: &PagingMode, gva: u64, access: Access, mut code: u32) -> Exception {
    if access.kind == AccessKind::Write {
        code |= pf::WRITE;
    }
    if access.user {
        code |= pf::USER;
    }
    // SDM vol. 3A 4.7: the fetch bit only with NX or SMEP enabled.
    let nx = mode.efer & efer::NXE != 0 && mode.cr4 & cr4::PAE != 0;
    if access.kind == AccessKind::Fetch && (nx || mode.cr4 & cr4::SMEP != 0) {
        code |= pf::FETCH;
    }
    Exception::page_fault(gva, code)
}

#[allow(clippy::too_many_arguments)]
fn walk_levels<T: PageTables>(
    tables: &T,
    mode: &PagingMode,
    gva: u64,
    access: Access,
    root: u64,
    levels: u32,
    entry_size: u8,
    large_pages: bool,
) -> Result<Mapping, Exception> {
    let index_bits = if entry_size == 8 { 9 } else { 10 };
    'restart: loop {
        let mut table = root;
        let (mut writable, mut user, mut executable) = (true, true, true);
        // Entries on the way without an accessed bit. They get it when the walk has succeeded: a processor may set
        // them before, but programs of the 386's day know that a walk that faults leaves no trace.
        let (mut not_accessed, mut count) = ([(0, 0); 4], 0);
        let mut level = levels;
        loop {
            level -= 1;
            let shift = 12 + index_bits * level;
            let entry_gpa = table + (((gva >> shift) & ((1 << index_bits) - 1)) * u64::from(entry_size));
            let Some(entry) = tables.read(entry_gpa, entry_size) else {
                return Err(fault(mode, gva, access, 0));
            };
            if entry & pte::P == 0 {
                return Err(fault(mode, gva, access, 0));
            }
            let leaf = level == 0 || (large_pages && entry & pte::PS != 0 && level <= 2);
            if has_reserved_bits(mode, entry, entry_size, level, leaf, large_pages, levels) {
                return Err(fault(mode, gva, access, pf::PRESENT | pf::RSVD));
            }
            writable &= entry & pte::W != 0;
            user &= entry & pte::U != 0;
            if entry_size == 8 && mode.efer & efer::NXE != 0 {
                executable &= entry & pte::NX == 0;
            }
            if !leaf {
                if entry & pte::A == 0 {
                    not_accessed[count] = (entry_gpa, entry);
                    count += 1;
                }
                table = if entry_size == 8 { entry & 0x000f_ffff_ffff_f000 } else { entry & 0xffff_f000 };
                continue;
            }
            let key = if levels >= 4 { KeyRights::of(mode, entry, user) } else { KeyRights::ALL };
            let forbidden = key.forbids(mode, access);
            if forbidden || !allowed(mode, access, writable, user, executable) {
                return Err(fault(mode, gva, access, pf::PRESENT | if forbidden { pf::KEY } else { 0 }));
            }
            writable &= !key.no_write;
            for &(gpa, entry) in &not_accessed[..count] {
                if !tables.compare_exchange(gpa, entry_size, entry, entry | pte::A) {
                    continue 'restart;
                }
            }
            let mut updated = entry | pte::A;
            if access.kind == AccessKind::Write {
                updated |= pte::D;
            }
            if updated != entry && !tables.compare_exchange(entry_gpa, entry_size, entry, updated) {
                continue 'restart;
            }
            let page_mask = (1u64 << shift) - 1;
            let mut frame = if entry_size == 8 {
                entry & 0x000f_ffff_ffff_f000 & !page_mask
            } else {
                entry & 0xffff_f000 & !page_mask
            };
            if entry_size == 4 && level == 1 {
                frame |= ((entry >> 13) & 0xff) << 32; // PSE-36, SDM vol. 3A table 4-4
            }
            return Ok(Mapping {
                gpa: frame | (gva & page_mask),
                page_bits: shift as u8,
                writable,
                user,
                executable,
                global: entry & pte::G != 0 && mode.cr4 & cr4::PGE != 0,
                dirty: updated & pte::D != 0,
            });
        }
    }
}

/// What a page's protection key takes away (SDM vol. 3A 4.6.2).
#[derive(Clone, Copy)]
struct KeyRights {
    no_access: bool,
    /// By user code, and by other code under CR0.WP.
    no_write: bool,
}

impl KeyRights {
    const ALL: KeyRights = KeyRights { no_access: false, no_write: false };

    /// Of the page of the final `entry`, which is for user code or not.
    fn of(mode: &PagingMode, entry: u64, user: bool) -> KeyRights {
        let (enabled, rights) = if user { (cr4::PKE, mode.pkru) } else { (cr4::PKS, mode.pkrs) };
        if mode.cr4 & enabled == 0 {
            return KeyRights::ALL;
        }
        let own = rights >> (2 * (entry >> pte::KEY_SHIFT & 15));
        KeyRights { no_access: own & 1 != 0, no_write: own & 2 != 0 }
    }

    /// Keys are about data, not about code.
    fn forbids(self, mode: &PagingMode, access: Access) -> bool {
        match access.kind {
            AccessKind::Fetch => false,
            AccessKind::Read => self.no_access,
            AccessKind::Write => self.no_access || self.no_write && (access.user || mode.cr0 & cr0::WP != 0),
        }
    }
}

/// Access rights (SDM vol. 3A 4.6.1).
fn allowed(mode: &PagingMode, access: Access, writable: bool, user: bool, executable: bool) -> bool {
    if access.user {
        if !user {
            return false;
        }
        return match access.kind {
            AccessKind::Read => true,
            AccessKind::Write => writable,
            AccessKind::Fetch => executable,
        };
    }
    let smap = user && mode.cr4 & cr4::SMAP != 0 && (access.implicit || !mode.ac);
    match access.kind {
        AccessKind::Read => !smap,
        AccessKind::Write => !smap && (writable || mode.cr0 & cr0::WP == 0),
        AccessKind::Fetch => executable && !(user && mode.cr4 & cr4::SMEP != 0),
    }
}

fn has_reserved_bits(
    mode: &PagingMode,
    entry: u64,
    entry_size: u8,
    level: u32,
    leaf: bool,
    large_pages: bool,
    levels: u32,
) -> bool {
    if entry_size == 4 {
        // 4 MiB pages: bit 21 is reserved (PSE-36 with 40-bit addresses).
        return leaf && level == 1 && entry & (1 << 21) != 0;
    }
    let mut reserved = (0x000f_ffff_ffff_ffff >> mode.physical_bits) << mode.physical_bits;
    if mode.efer & efer::NXE == 0 {
        reserved |= pte::NX;
    }
    if levels == 2 {
        reserved |= 0x7ff0_0000_0000_0000; // PAE, SDM vol. 3A table 4-10
    }
    if leaf && level > 0 {
        reserved |= ((1 << (12 + 9 * level)) - 1) & !0x1fff; // bit 12 is PAT
    }
    if !leaf && level >= 3 && large_pages {
        reserved |= pte::PS;
    }
    entry & reserved != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    struct Memory(RefCell<BTreeMap<u64, u64>>);

    impl PageTables for Memory {
        fn read(&self, gpa: u64, _size: u8) -> Option<u64> {
            Some(self.0.borrow().get(&gpa).copied().unwrap_or(0))
        }
        fn compare_exchange(&self, gpa: u64, _size: u8, old: u64, new: u64) -> bool {
            let mut memory = self.0.borrow_mut();
            let entry = memory.entry(gpa).or_insert(0);
            let same = *entry == old;
            if same {
                *entry = new;
            }
            same
        }
    }

    const MODE: PagingMode = PagingMode {
        cr0: cr0::PG | cr0::WP,
        cr3: 0x1000,
        cr4: cr4::PAE,
        efer: efer::LMA,
        ac: false,
        physical_bits: 40,
        pkru: 0,
        pkrs: 0,
    };
    const LOAD: Access = Access { kind: AccessKind::Read, user: false, implicit: false };

    /// A table of each level that maps address 0 to 5000h, by `last` in the last one.
    fn tables(last: u64) -> Memory {
        let entries = [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, last)];
        Memory(RefCell::new(entries.into()))
    }

    #[test]
    fn a_walk_that_faults_sets_no_accessed_bit() {
        let store = Access { kind: AccessKind::Write, ..LOAD };
        for (last, access, fails) in
            [(0, LOAD, true), (0x5001, store, true), (0x5001, LOAD, false), (0x5003, store, false)]
        {
            let memory = tables(last);
            assert_eq!(walk(&memory, &MODE, 0, access).is_err(), fails);
            let accessed: Vec<bool> = memory.0.borrow().values().map(|entry| entry & pte::A != 0).collect();
            assert_eq!(accessed, [!fails; 4], "{last:x} {access:?}");
        }
    }

    /// A page of key 1 may not be accessed, one of key 2 not be written to; which register counts is up to the page.
    #[test]
    fn protection_keys_take_rights_away() {
        let keys = PagingMode { cr4: MODE.cr4 | cr4::PKE | cr4::PKS, ..MODE };
        let (user, other) = (PagingMode { pkru: 0x24, ..keys }, PagingMode { pkrs: 0x24, ..keys });
        let (yes, no) = (None, Some(pf::PRESENT | pf::KEY));
        for (mode, key, [read, write, fetch, write_without_wp]) in [
            (user, 0, [yes; 4]),
            (user, 1, [no, no, yes, no]),
            (user, 2, [yes, no, yes, yes]),
            (other, 1, [yes; 4]),
            (PagingMode { cr4: MODE.cr4 | cr4::PKS, ..user }, 1, [yes; 4]),
        ] {
            // All levels are for user code.
            let entries = [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x5007 | key << 59)];
            let memory = || Memory(RefCell::new(entries.into()));
            let code =
                |mode: &PagingMode, kind| walk(&memory(), mode, 0, Access { kind, ..LOAD }).err().map(|e| e.error_code);
            let expect = |expected: Option<u32>, bits| expected.map(|code| Some(code | bits));
            assert_eq!(code(&mode, AccessKind::Read), expect(read, 0), "key {key}");
            assert_eq!(code(&mode, AccessKind::Write), expect(write, pf::WRITE), "key {key}");
            assert_eq!(code(&mode, AccessKind::Fetch), expect(fetch, 0), "key {key}");
            let unprotected = PagingMode { cr0: cr0::PG, ..mode };
            assert_eq!(code(&unprotected, AccessKind::Write), expect(write_without_wp, pf::WRITE), "key {key}");
        }
        let memory = tables(0x5003 | 2 << 59);
        assert!(walk(&memory, &user, 0, LOAD).unwrap().writable, "a supervisor page");
        assert!(!walk(&memory, &other, 0, LOAD).unwrap().writable, "it has a key of its own kind");
    }

    /// An entry that points to its own table is met at several levels.
    #[test]
    fn a_table_that_is_its_own_parent_gets_its_accessed_bit_once() {
        let memory = Memory(RefCell::new([(0x1000, 0x1003)].into()));
        let mapping = walk(&memory, &MODE, 0x123, LOAD).unwrap();
        assert_eq!((mapping.gpa, memory.0.borrow()[&0x1000]), (0x1123, 0x1003 | pte::A));
    }
}
