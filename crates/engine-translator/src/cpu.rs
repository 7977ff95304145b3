//! The vCPU block: everything translated code reaches through GS.
//!
//! One [`Cpu`] belongs to one vCPU thread. While translated code runs, most general registers, the status
//! flags and the vector registers live in the host's registers and the copies here are stale; every way
//! out of translated code (`enter`) writes them back before Rust sees the block. The x87 state and nothing
//! else stays in the host CPU for as long as the thread is inside `Vcpu::run`.

use crate::windows::REGIONS;
use anyvisor_x86::bits::{cr0, cr4, efer, rflags};
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{DescriptorTable, Segment};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

/// log2 of the entries in each TLB.
pub const TLB_BITS: u32 = 13;
pub const TLB_ENTRIES: usize = 1 << TLB_BITS;

/// Entries of each jump cache, which maps linear addresses to translated code. The index is the low 16
/// bits of the address: a zero extension computes it without touching flags.
pub const JUMP_CACHE_ENTRIES: usize = 1 << 16;

/// Jumps to other pages go through a link each, one for each target and context: the host address to go on at.
pub const LINKS: usize = 1 << 18;

/// Jump caches, by who runs: a block knows statically which one its indirect jumps use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum JumpContext {
    Kernel = 0,
    /// With RFLAGS.AC set under SMAP.
    KernelAc = 1,
    User = 2,
    /// 32-bit user code, in compatibility mode or in legacy protected mode.
    User32 = 3,
    /// 32-bit kernel code in either, with or without paging.
    Kernel32 = 4,
    /// With RFLAGS.AC set under SMAP.
    KernelAc32 = 5,
}

impl JumpContext {
    /// Which of [`Cpu::code_generation`] tells when code of this context may have moved.
    pub fn generation(self) -> usize {
        match self {
            JumpContext::Kernel | JumpContext::KernelAc | JumpContext::Kernel32 | JumpContext::KernelAc32 => 0,
            JumpContext::User | JumpContext::User32 => 1,
        }
    }

    /// Calls and returns of contexts with the same number may share a return stack: their addresses tell them apart.
    pub fn returns(self) -> u8 {
        match self {
            JumpContext::Kernel | JumpContext::KernelAc | JumpContext::User => 0,
            JumpContext::Kernel32 | JumpContext::KernelAc32 => 1,
            JumpContext::User32 => 2,
        }
    }

    /// The code segment's default size in bits.
    pub fn bits(self) -> u32 {
        match self {
            JumpContext::Kernel | JumpContext::KernelAc | JumpContext::User => 64,
            JumpContext::User32 | JumpContext::Kernel32 | JumpContext::KernelAc32 => 32,
        }
    }

    /// Whether this is code of CPL 0.
    pub fn is_kernel(self) -> bool {
        !matches!(self, JumpContext::User | JumpContext::User32)
    }
}

pub const JUMP_CONTEXTS: usize = 6;

/// Makes a 32-bit address one that no page has.
pub const CLOSED: u64 = 1 << 40;

/// Groups of accesses that a block can have.
pub const DELTAS: usize = 16;

/// Entries of the micro-TLB.
pub const MICRO_ENTRIES: usize = 512;

/// A copy of one TLB entry, for the accesses of one place in hot code: found without an index, so that what
/// is accessed does not wait for it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MicroEntry {
    /// As in [`TlbEntry`], for the right that the place needs, plus `low`.
    pub tag: u64,
    pub host: u64,
    pub delta: u64,
    /// Where the place's range begins, relative to the address that it asks for; not positive.
    pub low: u64,
}

impl MicroEntry {
    /// Holds the page `nowhere`, which no guest can have. An address in it hits, and the host faults at what it
    /// says: in its first pages, which are never there.
    pub fn empty(nowhere: u64, low: u64) -> MicroEntry {
        let tag = 0u64.wrapping_sub(nowhere);
        MicroEntry { tag: tag.wrapping_add(low), host: 0, delta: tag, low }
    }

    /// A page for [`Self::empty`] whose addresses are not canonical. Nobody knows which: an access there raises its #GP
    /// with status flags that may be wrong.
    fn nowhere() -> u64 {
        use std::hash::{BuildHasher, Hasher};
        let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
        1 << 62 | (random >> 2 & !0xfff)
    }
}

/// Whose rights a TLB holds: a block knows statically which one its accesses use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum TlbContext {
    /// CPL 0–2, or an implicit supervisor access; under SMAP no user page is in it.
    Kernel = 0,
    /// CPL 0–2 with RFLAGS.AC set, which suspends SMAP.
    KernelAc = 1,
    /// CPL 3.
    User = 2,
}

pub const TLB_CONTEXTS: usize = 3;

/// One translation. Tags are stored negated, so that `address + tag` is the offset in the page on a hit
/// and at least 4096 otherwise: one comparison checks the page, the right and the page's end.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TlbEntry {
    /// Minus the linear page address, if reads are allowed.
    pub read: u64,
    /// The same, if writes are allowed and need no attention (dirty bit set, no translated code there).
    pub write: u64,
    /// Host address of the page.
    pub host: u64,
    /// Host address minus linear address.
    pub delta: u64,
}

/// What a probe asks of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    Read,
    Write,
    /// Read it, and be able to write to it without setting its dirty bit.
    Upgrade,
}

impl Tag {
    pub const ALL: [Tag; 3] = [Tag::Read, Tag::Write, Tag::Upgrade];

    /// Offset in a TLB entry of the tag to compare with.
    pub fn offset(self) -> i32 {
        match self {
            Tag::Read => std::mem::offset_of!(TlbEntry, read) as i32,
            Tag::Write | Tag::Upgrade => std::mem::offset_of!(TlbEntry, write) as i32,
        }
    }
}

/// The tag that never matches in entry `index`: the negated address of a page that belongs elsewhere.
/// Not the next entry's: an access that crosses into the next page is looked up here.
pub const fn invalid_tag(index: usize) -> u64 {
    0u64.wrapping_sub((((index + 2) % TLB_ENTRIES) as u64) << 12)
}

/// One entry of a jump cache. An entry of zeros matches address 0 alone, which has index 0: entry 0 is
/// given another key when it is empty.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct JumpEntry {
    /// Minus the linear address, so that a sum of zero is a hit.
    pub key: u64,
    pub host: u64,
}

impl JumpEntry {
    /// What an empty entry `index` holds.
    pub fn empty(index: usize) -> JumpEntry {
        JumpEntry { key: u64::from(index == 0), host: 0 }
    }
}

/// PAUSE instructions of a vCPU after which it is thought to wait for one that does not run. KVM lets others run after 4096
/// cycles of them (`ple_window`), which is about as many.
pub const PAUSES: u32 = 64;

/// Reasons to leave translated code at the next boundary; bits of [`Cpu::pending`].
pub mod pending {
    /// `Vcpu::run` is to return.
    pub const KICK: u32 = 1 << 0;
    /// Interrupts, NMIs or messages may have arrived, or the timer has expired.
    pub const EVENT: u32 = 1 << 1;
    /// Translations or TLB entries are to be dropped.
    pub const FLUSH: u32 = 1 << 2;
    /// `Vcpu::run` is to return: the debugger has a reason ([`crate::debugger::Debugger`]).
    pub const DEBUG: u32 = 1 << 3;
    /// Somebody has told something that concerns translated code ([`crate::core::VcpuShared::tell`]).
    pub const CODE: u32 = 1 << 4;
    /// Somebody wants the bus for himself ([`crate::core::Core::with_bus`]).
    pub const BUS: u32 = 1 << 5;
}

/// The vCPU block. `repr(C)`: generated code uses its offsets.
#[repr(C, align(4096))]
pub struct Cpu {
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    pub rip: u64,
    /// The whole RFLAGS, status flags included.
    pub rflags: u64,
    /// Bits of [`pending`]; translated code leaves at the next boundary when it is not zero.
    pub pending: AtomicU32,
    /// Not zero while an interrupt or NMI waits for the guest to accept it: whatever opens the window
    /// (STI, POPF, IRET, a lower TPR) then sets [`pending::EVENT`].
    pub irq_waiting: u32,
    /// Windows have mappings that no user code may find: see [`Windows::settle`](crate::windows::Windows::settle).
    pub stale_windows: u32,
    pub cpl: u8,
    /// Bit 0: after STI; bit 1: after MOV SS or POP SS. Cleared by the next instruction.
    pub interrupt_shadow: u8,
    pub nmi_blocked: bool,
    pub halted: bool,
    /// An AP between INIT and its start-up IPI.
    pub wait_for_sipi: bool,
    /// Changes whenever the meaning of linear code addresses may have.
    /// The first counts what concerns kernel code, the second also what concerns user code only.
    pub code_generation: [u32; 2],
    /// What 32-bit code adds to addresses through FS and GS besides the base: 0, or [`CLOSED`] where the segment
    /// takes more than that.
    pub closed: [u64; 2],
    /// Scratch of generated code.
    pub scratch: [u64; 8],
    /// Deltas that the accesses of a block share.
    pub deltas: [u64; DELTAS],
    /// What hot code has found in the TLB.
    pub micro: [MicroEntry; MICRO_ENTRIES],
    /// The page that empty ones hold.
    pub micro_nowhere: u64,
    /// Entries of `micro` that are in use, and whether any has been filled since they were emptied.
    pub micro_used: u32,
    pub micro_filled: u32,
    /// Fills of `micro` until one is looked into.
    pub micro_budget: i32,
    /// Accesses to other regions than thought, until one is looked into.
    pub region_budget: i32,
    /// PAUSE instructions until the vCPU lets others run: 1 to [`PAUSES`].
    pub pauses: u32,
    /// The host's stack pointer while translated code runs.
    pub host_rsp: u64,
    /// The return stack's pointer while translated code does not run, and where it is empty.
    pub return_stack: u64,
    pub return_stack_base: u64,
    pub host_mxcsr: u32,
    pub mxcsr: u32,

    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub dr: [u64; 8],
    pub xcr0: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub spec_ctrl: u64,
    pub pkru: u32,
    pub pkrs: u32,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    /// Guest TSC minus host TSC.
    pub tsc_offset: u64,

    /// By encoding: ES, CS, SS, DS, FS, GS. In 64-bit mode the bases of FS and GS are the MSRs.
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,

    /// Some upper half of a YMM register is not zero.
    pub upper_halves: u8,
    /// XMM/YMM registers, 32 bytes each; stale while translated code runs.
    pub ymm: [Ymm; 16],

    /// Generated code's private words; see `enter`.
    pub translated: [u64; 32],

    pub jump_cache: [[JumpEntry; JUMP_CACHE_ENTRIES]; JUMP_CONTEXTS],
    /// What a link holds whose target is not known: host code that leaves.
    pub unlinked: u64,
    pub links: [u64; LINKS],
    pub tlb: [[TlbEntry; TLB_ENTRIES]; TLB_CONTEXTS],
    /// What user code adds to its addresses, by their bits 63:39; see `windows`. The last that there is: [`BEYOND`].
    pub regions: Regions,
}

/// Of the addresses that user code may have, and of as many that are not canonical: those lead where nothing is mapped, with any
/// displacement.
#[repr(C, align(4096))]
pub struct Regions(pub [u64; 2 * REGIONS]);

/// Bytes after the vCPU block that nobody can access: what bits 63:39 of an address may name there.
pub const BEYOND: usize = (1 << 25) * size_of::<u64>();

const _: () = assert!(std::mem::offset_of!(Cpu, regions) + size_of::<Regions>() == size_of::<Cpu>());

#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub struct Ymm(pub [u8; 32]);

/// The operating mode that decoding depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Real mode, or virtual-8086 mode.
    Real,
    Protected16,
    Protected32,
    Compat16,
    Compat32,
    Long64,
}

impl Mode {
    /// The code segment's default size in bits, as a decoder wants it.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Real | Mode::Protected16 | Mode::Compat16 => 16,
            Mode::Protected32 | Mode::Compat32 => 32,
            Mode::Long64 => 64,
        }
    }
}

impl Cpu {
    /// A new block, with [`BEYOND`] after it. [`Cpu::free`] takes it back.
    pub fn allocate() -> NonNull<Cpu> {
        let (length, flags) = (size_of::<Cpu>(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a fresh anonymous mapping, and a change of protection inside it. Every field of Cpu is plain data
        // (integers, bools, arrays of them, AtomicU32) for which all-zero bytes are a valid value, and pages are aligned as Cpu
        // is.
        let cpu = unsafe {
            let raw = libc::mmap(std::ptr::null_mut(), length + BEYOND, libc::PROT_NONE, flags, -1, 0);
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            if raw == libc::MAP_FAILED || libc::mprotect(raw, length, rights) != 0 {
                std::alloc::handle_alloc_error(std::alloc::Layout::new::<Cpu>());
            }
            &mut *raw.cast::<Cpu>()
        };
        for tlb in &mut cpu.tlb {
            for (i, entry) in tlb.iter_mut().enumerate() {
                entry.read = invalid_tag(i);
                entry.write = invalid_tag(i);
            }
        }
        for jumps in &mut cpu.jump_cache {
            jumps[0] = JumpEntry::empty(0);
        }
        cpu.micro_nowhere = MicroEntry::nowhere();
        cpu.micro = [MicroEntry::empty(cpu.micro_nowhere, 0); MICRO_ENTRIES];
        cpu.mxcsr = 0x1f80;
        cpu.pauses = PAUSES;
        NonNull::from(cpu)
    }

    /// # Safety
    /// `cpu` must be from [`Cpu::allocate`], and never be used again.
    pub unsafe fn free(cpu: NonNull<Cpu>) {
        // SAFETY: the whole mapping, by the contract. Nothing in the block needs dropping.
        unsafe { libc::munmap(cpu.as_ptr().cast(), size_of::<Cpu>() + BEYOND) };
    }

    /// Whether a host address is in [`BEYOND`] this block.
    pub fn is_beyond(&self, address: u64) -> bool {
        address.wrapping_sub(std::ptr::from_ref(self) as u64 + size_of::<Cpu>() as u64) < BEYOND as u64
    }

    /// Empties the micro-TLB: a right or a translation has been taken away.
    pub fn empty_micro(&mut self) {
        if std::mem::take(&mut self.micro_filled) != 0 {
            for entry in &mut self.micro[..self.micro_used as usize] {
                *entry = MicroEntry::empty(self.micro_nowhere, entry.low);
            }
        }
    }

    pub fn is_long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }
    pub fn is_protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }
    pub fn is_vm86(&self) -> bool {
        self.rflags & rflags::VM != 0
    }

    pub fn mode(&self) -> Mode {
        let cs = &self.seg[index::CS];
        if self.is_long_mode() {
            if cs.is_long() {
                Mode::Long64
            } else if cs.is_default_32() {
                Mode::Compat32
            } else {
                Mode::Compat16
            }
        } else if !self.is_protected() || self.is_vm86() {
            Mode::Real
        } else if cs.is_default_32() {
            Mode::Protected32
        } else {
            Mode::Protected16
        }
    }

    /// Whether the stack pointer is 64, 32 or 16 bits wide.
    pub fn stack_bits(&self) -> u32 {
        if self.is_long_mode() && self.seg[index::CS].is_long() {
            64
        } else if self.seg[index::SS].attributes & attr::DB != 0 {
            32
        } else {
            16
        }
    }

    /// The TLB that explicit data accesses use now.
    pub fn data_context(&self) -> TlbContext {
        if self.cpl == 3 {
            TlbContext::User
        } else if self.rflags & rflags::AC != 0 && self.cr4 & cr4::SMAP != 0 {
            TlbContext::KernelAc
        } else {
            TlbContext::Kernel
        }
    }
}
