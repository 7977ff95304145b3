//! The machine that cases run on: what lies where, descriptor and page tables, and the state that a vCPU
//! starts with in each [`Mode`].
//!
//! RAM is 8 MiB with a hole from 640 KiB to 1 MiB, where devices answer. Linear addresses are physical ones,
//! with user access, by 4 KiB pages below 2 MiB and 2 MiB pages above, up to 1 GiB and at the local APIC.

use anyvisor_x86::bits::{cr0, cr4, efer, gpr, rflags};
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{DescriptorTable, Segment, VcpuState, msr};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest-physical, and linear, addresses.
pub mod place {
    /// The top of the page tables of long mode; the rest follows.
    pub const PML4: u64 = 0x1000;
    pub const PDPT: u64 = 0x2000;
    pub const PD: u64 = 0x3000;
    /// The page table of the first 2 MiB.
    pub const PT: u64 = 0x4000;
    /// The page directory of the fourth GiB, with nothing but the local APIC.
    pub const PD_APIC: u64 = 0x5000;
    pub const GDT: u64 = 0x6000;
    pub const IDT: u64 = 0x7000;
    pub const TSS: u64 = 0x8000;
    /// The ends that vectors lead to, 16 bytes each.
    pub const HANDLERS: u64 = 0x9000;
    pub const LDT: u64 = 0xa000;
    /// The stack of CPL 0 that the TSS names, growing down.
    pub const KERNEL_STACK: u64 = 0xc000;
    /// The stack of IST 1.
    pub const IST_STACK: u64 = 0xd000;
    pub const STACK: u64 = 0xf000;
    pub const CODE: u64 = 0x1_0000;
    pub const DATA: u64 = 0x2_0000;
    /// Handlers that cases bring, 256 bytes each.
    pub const CASE_HANDLERS: u64 = 0x3_0000;
    /// Free for a case's own page tables.
    pub const TABLES: u64 = 0x4_0000;
    /// Free for more code.
    pub const MORE_CODE: u64 = 0x6_0000;
    /// Devices, to the end of the first MiB.
    pub const MMIO: u64 = 0xa_0000;
    /// A store here ends a run, like a write to [`super::super::END_PORT`].
    pub const END: u64 = 0xb_f000;
    pub const HIGH_RAM: u64 = 0x10_0000;
    /// The second 2 MiB page.
    pub const BIG_PAGE: u64 = 0x20_0000;
    pub const RAM_END: u64 = 0x80_0000;
    pub const APIC: u64 = 0xfee0_0000;
}

/// Selectors. The first seven are in the order that SYSCALL, SYSRET, SYSENTER and SYSEXIT want.
pub mod selector {
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER_CODE32: u16 = 0x18 | 3;
    pub const USER_DATA: u16 = 0x20 | 3;
    pub const USER_CODE64: u16 = 0x28 | 3;
    pub const USER_DATA_2: u16 = 0x30 | 3;
    pub const TSS: u16 = 0x38;
    pub const CODE32: u16 = 0x48;
    pub const CODE16: u16 = 0x50;
    pub const DATA16: u16 = 0x58;
    pub const ABSENT_DATA: u16 = 0x60;
    pub const ABSENT_CODE: u16 = 0x68;
    /// Conforming code of the mode's own width (64 bits in long modes, else 32), DPL 0.
    pub const CONFORMING: u16 = 0x70;
    pub const READ_ONLY: u16 = 0x78;
    pub const EXPAND_DOWN: u16 = 0x80;
    pub const EXECUTE_ONLY: u16 = 0x88;
    pub const LDT: u16 = 0x90;
    /// Data with a limit of 0xfff.
    pub const SMALL: u16 = 0xa0;
    /// A TSS that is not busy, for LTR; 16 bytes.
    pub const FREE_TSS: u16 = 0xa8;
    /// For a case's own descriptors, up to the end of the table.
    pub const FREE: u16 = 0xb8;
    pub const FREE_2: u16 = 0xc8;
    pub const LIMIT: u16 = 0xff;
}

/// Bits of page-table entries (SDM vol. 3A 4.5).
pub mod page {
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    pub const ALL: u64 = P | W | U;
}

pub use anyvisor_x86::bits::rflags as flags;

/// How a case's vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Real,
    /// Virtual-8086 mode.
    Vm86,
    /// 32-bit protected mode without paging, CPL 0.
    Protected,
    /// The same at CPL 3.
    ProtectedUser,
    /// Compatibility mode (32-bit code under long mode), CPL 0.
    Compat,
    CompatUser,
    /// 64-bit mode, CPL 0.
    Long,
    /// 64-bit mode, CPL 3.
    User,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Real => "real",
            Mode::Vm86 => "vm86",
            Mode::Protected => "protected",
            Mode::ProtectedUser => "protected user",
            Mode::Compat => "compat",
            Mode::CompatUser => "compat user",
            Mode::Long => "long",
            Mode::User => "user",
        }
    }

    /// Width of its code.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Real | Mode::Vm86 => 16,
            Mode::Protected | Mode::ProtectedUser | Mode::Compat | Mode::CompatUser => 32,
            Mode::Long | Mode::User => 64,
        }
    }

    /// Width of what exceptions push, and of the code of handlers.
    pub fn handler_bits(self) -> u32 {
        match self {
            Mode::Real => 16,
            Mode::Vm86 | Mode::Protected | Mode::ProtectedUser => 32,
            Mode::Compat | Mode::CompatUser | Mode::Long | Mode::User => 64,
        }
    }

    pub fn is_user(self) -> bool {
        matches!(self, Mode::Vm86 | Mode::ProtectedUser | Mode::CompatUser | Mode::User)
    }

    /// Whether segment bases count as in real mode.
    pub fn is_real_like(self) -> bool {
        matches!(self, Mode::Real | Mode::Vm86)
    }
}

/// The end that `vector` leads to unless a case says otherwise.
pub fn handler(vector: u8) -> u64 {
    place::HANDLERS + 16 * u64::from(vector)
}

/// A descriptor: `attributes` as in [`attr`], `limit` in the descriptor's own granularity.
pub fn descriptor(base: u64, limit: u32, attributes: u32) -> u64 {
    let (base, limit) = (base & 0xffff_ffff, u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(attributes & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | u64::from(attributes >> 12 & 0xf) << 52
        | (base >> 24) << 56
}

/// The code that ends a run.
pub struct Ending {
    pub code: &'static [u8],
    /// How far into it RIP is then.
    pub length: u64,
}

impl Ending {
    /// `out 0xf4, al; jmp $`, in every mode; at CPL 3 by leave of the I/O bitmap.
    pub const PORT: Ending = Ending { code: &[0xe6, super::END_PORT as u8, 0xeb, 0xfe], length: 2 };
    /// `mov ss:[place::END], al; jmp $`, which needs no leave. In 32-bit code, and by SS, which is always loaded.
    pub const MEMORY_32: Ending = Ending { code: &[0x36, 0xa2, 0x00, 0xf0, 0x0b, 0x00, 0xeb, 0xfe], length: 6 };
    /// The same in 64-bit code.
    pub const MEMORY_64: Ending = Ending { code: &[0x88, 0x04, 0x25, 0x00, 0xf0, 0x0b, 0x00, 0xeb, 0xfe], length: 7 };

    /// The end of a case's own code. At CPL 3 a store: emulators of hardware virtualization differ over I/O
    /// bitmaps, and few cases are about those.
    pub fn of(mode: Mode) -> &'static Ending {
        match mode {
            Mode::ProtectedUser | Mode::CompatUser => &Ending::MEMORY_32,
            Mode::User => &Ending::MEMORY_64,
            _ => &Ending::PORT,
        }
    }
}

fn write(memory: &GuestMemoryMmap, gpa: u64, bytes: &[u8]) {
    memory.write_slice(bytes, GuestAddress(gpa)).expect("tables lie in RAM");
}

fn write_u64(memory: &GuestMemoryMmap, gpa: u64, value: u64) {
    write(memory, gpa, &value.to_le_bytes());
}

/// Writes everything that `mode` needs in memory.
pub fn write_tables(memory: &GuestMemoryMmap, mode: Mode) {
    for vector in 0..=255 {
        write(memory, handler(vector), Ending::PORT.code);
        write_gate(memory, mode, vector, handler(vector));
    }
    if mode == Mode::Real {
        return;
    }
    write_gdt(memory, mode);
    write_task(memory, mode);
    write_u64(memory, place::PML4, place::PDPT | page::ALL);
    write_u64(memory, place::PDPT, place::PD | page::ALL);
    write_u64(memory, place::PDPT + 8 * 3, place::PD_APIC | page::ALL);
    write_u64(memory, place::PD, place::PT | page::ALL);
    write_u64(memory, place::PD_APIC + 8 * (place::APIC >> 21 & 0x1ff), place::APIC | page::ALL | page::PS);
    for n in 0..512 {
        write_u64(memory, place::PT + 8 * n, n << 12 | page::ALL);
        if n > 0 {
            write_u64(memory, place::PD + 8 * n, n << 21 | page::ALL | page::PS);
        }
    }
}

/// Points `vector` at the code at `address`: a present interrupt gate of DPL 0, or an entry of real mode's
/// vector table.
pub fn write_gate(memory: &GuestMemoryMmap, mode: Mode, vector: u8, address: u64) {
    let kind = 0x8e00u64;
    let gate =
        |selector: u16| address & 0xffff | u64::from(selector) << 16 | kind << 32 | (address >> 16 & 0xffff) << 48;
    match mode.handler_bits() {
        16 => {
            let entry = (address & 0xf) as u32 | ((address >> 4) as u32) << 16;
            write(memory, 4 * u64::from(vector), &entry.to_le_bytes());
        }
        32 => write_u64(memory, place::IDT + 8 * u64::from(vector), gate(selector::CODE32)),
        _ => {
            let at = place::IDT + 16 * u64::from(vector);
            write_u64(memory, at, gate(selector::CODE64));
            write_u64(memory, at + 8, address >> 32);
        }
    }
}

fn write_gdt(memory: &GuestMemoryMmap, mode: Mode) {
    let code = attr::S | attr::P | attr::CODE | attr::WRITABLE | attr::G;
    let data = attr::S | attr::P | attr::WRITABLE | attr::G;
    let user = 3 << attr::DPL_SHIFT;
    let wide = if mode.handler_bits() == 64 { attr::L } else { attr::DB };
    let flat = |attributes| descriptor(0, 0xf_ffff, attributes);
    let table = [
        (selector::CODE64, flat(code | attr::L)),
        (selector::DATA, flat(data | attr::DB)),
        (selector::USER_CODE32, flat(code | user | attr::DB)),
        (selector::USER_DATA, flat(data | user | attr::DB)),
        (selector::USER_CODE64, flat(code | user | attr::L)),
        (selector::USER_DATA_2, flat(data | user | attr::DB)),
        (selector::TSS, descriptor(place::TSS, TSS_LIMIT, attr::P | 0xb)),
        (selector::CODE32, flat(code | attr::DB)),
        (selector::CODE16, descriptor(place::CODE, 0xffff, code & !attr::G)),
        (selector::DATA16, descriptor(0, 0xffff, data & !attr::G)),
        (selector::ABSENT_DATA, flat(data & !attr::P)),
        (selector::ABSENT_CODE, flat(code & !attr::P | wide)),
        (selector::CONFORMING, flat(code | wide | attr::EXPAND_DOWN)),
        (selector::READ_ONLY, flat(data & !attr::WRITABLE | attr::DB)),
        (selector::EXPAND_DOWN, descriptor(0, place::DATA as u32 - 1, data & !attr::G | attr::DB | attr::EXPAND_DOWN)),
        (selector::EXECUTE_ONLY, flat(code & !attr::WRITABLE | wide)),
        (selector::LDT, descriptor(place::LDT, 0xff, attr::P | 2)),
        (selector::SMALL, descriptor(0, 0xfff, data & !attr::G | user | attr::DB)),
        (selector::FREE_TSS, descriptor(place::TSS, TSS_LIMIT, attr::P | 9)),
    ];
    for (selector, value) in table {
        // System descriptors have a second half in long mode: the base's upper bits, zero here.
        write_u64(memory, place::GDT + u64::from(selector & !7), value);
    }
}

/// The task-state segment with an I/O bitmap for ports 0 to 0xff (SDM vol. 1 19.5.2).
const TSS_LIMIT: u32 = 0x68 + 32;

fn write_task(memory: &GuestMemoryMmap, mode: Mode) {
    if mode.handler_bits() == 64 {
        write_u64(memory, place::TSS + 4, place::KERNEL_STACK);
        write_u64(memory, place::TSS + 0x24, place::IST_STACK);
    } else {
        write(memory, place::TSS + 4, &(place::KERNEL_STACK as u32).to_le_bytes());
        write(memory, place::TSS + 8, &u32::from(selector::DATA).to_le_bytes());
    }
    write(memory, place::TSS + 0x66, &0x68u16.to_le_bytes());
    write(memory, place::TSS + 0x68, &[0xff; 33]);
    allow_port(memory, super::END_PORT);
}

/// Lets CPL 3 use `port`, below 0x100.
pub fn allow_port(memory: &GuestMemoryMmap, port: u16) {
    let at = GuestAddress(place::TSS + 0x68 + u64::from(port / 8));
    let bits: u8 = memory.read_obj(at).expect("the TSS lies in RAM");
    memory.write_obj(bits & !(1 << (port % 8)), at).expect("the TSS lies in RAM");
}

/// The hidden part of a segment register as loaded from the GDT in memory, without checks.
pub fn segment(memory: &GuestMemoryMmap, selector: u16) -> Segment {
    let at = GuestAddress(place::GDT + u64::from(selector & !7));
    let raw: u64 = memory.read_obj(at).expect("the GDT lies in RAM");
    let mut segment = Segment::from_descriptor(selector, raw);
    // In a system descriptor the bit is part of the type, and VT-x enters no guest with such an LDTR.
    if segment.attributes & attr::S != 0 {
        segment.attributes |= attr::ACCESSED;
    }
    segment
}

/// Makes `state`, that of a vCPU after reset, the one that cases of `mode` start with: about to execute
/// [`place::CODE`], RDI at [`place::DATA`], RSI at [`place::MMIO`], interrupts off.
pub fn enter(state: &mut VcpuState, memory: &GuestMemoryMmap, mode: Mode) {
    state.gpr = [0; 16];
    state.gpr[gpr::RSP] = place::STACK;
    state.rflags = rflags::FIXED;
    if mode == Mode::Real {
        state.idtr = DescriptorTable { base: 0, limit: 0x3ff };
        real_segments(state, 0);
        return;
    }
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE;
    state.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.gdtr = DescriptorTable { base: place::GDT, limit: selector::LIMIT };
    state.segments.tr = segment(memory, selector::TSS);
    state.segments.ldtr = Segment::unusable(0);
    if mode.handler_bits() == 64 {
        state.cr0 |= cr0::PG | cr0::WP;
        state.cr4 |= cr4::PAE;
        state.cr3 = place::PML4;
        state.set_msr(msr::EFER, efer::LME | efer::LMA | efer::SCE | efer::NXE);
        state.idtr = DescriptorTable { base: place::IDT, limit: 0xfff };
    } else {
        state.idtr = DescriptorTable { base: place::IDT, limit: 0x7ff };
    }
    if mode == Mode::Vm86 {
        state.rflags |= rflags::VM;
        real_segments(state, 3);
        return;
    }
    let (code, data) = match mode {
        Mode::Protected | Mode::Compat => (selector::CODE32, selector::DATA),
        Mode::ProtectedUser | Mode::CompatUser => (selector::USER_CODE32, selector::USER_DATA),
        Mode::Long => (selector::CODE64, selector::DATA),
        _ => (selector::USER_CODE64, selector::USER_DATA),
    };
    state.segments.seg = [segment(memory, data); 6];
    state.segments.seg[index::CS] = segment(memory, code);
    state.rip = place::CODE;
    state.gpr[gpr::RDI] = place::DATA;
    state.gpr[gpr::RSI] = place::MMIO;
}

/// CS at the code, DS at the data, ES at devices, the stack in the first 64 KiB; all offsets zero.
fn real_segments(state: &mut VcpuState, dpl: u32) {
    let at = |base: u64| {
        let mut segment = Segment::real_mode((base >> 4) as u16, false);
        segment.attributes |= dpl << attr::DPL_SHIFT;
        segment
    };
    state.segments.seg = [at(place::MMIO), at(place::CODE), at(0), at(place::DATA), at(0), at(0)];
    if dpl == 0 {
        state.segments.seg[index::CS].attributes |= attr::CODE;
    }
    state.rip = 0;
}
