//! Descriptor tables and segment registers (SDM vol. 3A chapters 3 and 5): fetching descriptors, the checks
//! of segment loads, and the instructions that load or inspect segments and tables.

use super::operand::{is_canonical, read_operand, read_uint, segment_index, write_operand};
use crate::core::Core;
use crate::cpu::Mode;
use crate::mmu::Rights;
use anyvisor_engine::GuestIo;
use anyvisor_x86::bits::{cr4, rflags};
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{DescriptorTable, Exception, Segment};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// Types of system descriptors (SDM vol. 3A table 3-2).
pub(super) mod system_type {
    pub const TSS_16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS_16_BUSY: u32 = 3;
    pub const CALL_GATE_16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const TSS: u32 = 9;
    pub const TSS_BUSY: u32 = 11;
    pub const CALL_GATE: u32 = 12;
}

/// A descriptor as it was found in the GDT or an LDT.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub selector: u16,
    /// Its first (or only) eight bytes.
    pub raw: u64,
    /// Its linear address.
    address: u64,
}

impl Descriptor {
    fn attributes(&self) -> u32 {
        ((self.raw >> 40) & 0xf0ff) as u32
    }
    /// The four-bit type.
    pub fn kind(&self) -> u32 {
        self.attributes() & attr::TYPE
    }
    pub fn is_system(&self) -> bool {
        self.attributes() & attr::S == 0
    }
    pub fn is_code(&self) -> bool {
        self.attributes() & (attr::S | attr::CODE) == attr::S | attr::CODE
    }
    pub fn is_conforming(&self) -> bool {
        self.attributes() & attr::EXPAND_DOWN != 0
    }
    pub fn is_writable_data(&self) -> bool {
        self.attributes() & (attr::S | attr::CODE | attr::WRITABLE) == attr::S | attr::WRITABLE
    }
    fn is_readable(&self) -> bool {
        !self.is_system() && (self.attributes() & (attr::CODE | attr::WRITABLE)) != attr::CODE
    }
    pub fn dpl(&self) -> u8 {
        ((self.attributes() >> attr::DPL_SHIFT) & 3) as u8
    }
    pub fn is_present(&self) -> bool {
        self.attributes() & attr::P != 0
    }
    pub fn is_long(&self) -> bool {
        self.attributes() & attr::L != 0
    }
    pub fn is_default_32(&self) -> bool {
        self.attributes() & attr::DB != 0
    }
    pub fn segment(&self) -> Segment {
        Segment::from_descriptor(self.selector, self.raw)
    }
    /// The selector as an error code.
    pub fn code(&self) -> u32 {
        code(self.selector)
    }
}

/// A selector as an error code: without its RPL.
pub(super) fn code(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

pub(super) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Real-address or virtual-8086 mode, where a selector is a paragraph number.
pub(super) fn is_real_or_vm86(core: &Core) -> bool {
    !core.cpu.is_protected() || core.cpu.is_vm86()
}

/// Fetches a descriptor; `None` if the selector is outside its table.
pub(super) fn fetch(core: &mut Core, io: &dyn GuestIo, selector: u16) -> Result<Option<Descriptor>, Exception> {
    let offset = u64::from(selector & 0xfff8);
    let (base, limit) = if selector & 4 != 0 {
        if !core.cpu.ldtr.is_usable() {
            return Ok(None);
        }
        (core.cpu.ldtr.base, u64::from(core.cpu.ldtr.limit))
    } else {
        (core.cpu.gdtr.base, u64::from(core.cpu.gdtr.limit))
    };
    if offset + 7 > limit {
        return Ok(None);
    }
    let mut address = base.wrapping_add(offset);
    if !core.cpu.is_long_mode() {
        address &= 0xffff_ffff;
    }
    let raw = read_uint(core, io, address, 8, Rights::Implicit)?;
    Ok(Some(Descriptor { selector, raw, address }))
}

/// Fetches a descriptor that must exist.
///
/// # Errors
/// `missing` if it is outside its table, or the fault of reading it.
pub(super) fn fetch_or(
    core: &mut Core,
    io: &dyn GuestIo,
    selector: u16,
    missing: Exception,
) -> Result<Descriptor, Exception> {
    fetch(core, io, selector)?.ok_or(missing)
}

/// The second half of a 16-byte system descriptor of long mode.
pub(super) fn fetch_upper(core: &mut Core, io: &dyn GuestIo, lower: &Descriptor) -> Result<u64, Exception> {
    let table = if lower.selector & 4 != 0 { core.cpu.ldtr.limit } else { u32::from(core.cpu.gdtr.limit) };
    if u32::from(lower.selector & 0xfff8) + 15 > table {
        return Err(Exception::gp(lower.code()));
    }
    let upper = read_uint(core, io, lower.address.wrapping_add(8), 8, Rights::Implicit)?;
    if (upper >> 40) & 0x1f != 0 {
        return Err(Exception::gp(lower.code()));
    }
    Ok(upper)
}

/// Sets the accessed bit of a code or data descriptor, and returns the segment it describes.
pub(super) fn accessed(core: &mut Core, io: &dyn GuestIo, mut found: Descriptor) -> Result<Segment, Exception> {
    if found.attributes() & attr::ACCESSED == 0 {
        found.raw |= u64::from(attr::ACCESSED) << 40;
        let byte = [(found.raw >> 40) as u8];
        core.write(io, found.address.wrapping_add(5), &byte, Rights::Implicit)?;
    }
    Ok(found.segment())
}

/// Changes the busy bit of a TSS descriptor in memory.
pub(super) fn set_busy(core: &mut Core, io: &dyn GuestIo, tss: &Descriptor, busy: bool) -> Result<(), Exception> {
    let byte = (tss.raw >> 40) as u8 & !2 | u8::from(busy) << 1;
    core.write(io, tss.address.wrapping_add(5), &[byte], Rights::Implicit)
}

/// Checks a selector for SS at privilege level `cpl` (SDM vol. 3A 5.7) and returns its segment. `null` is
/// allowed in 64-bit mode below CPL 3 and is the caller's to recognise. A fault's code gets `ext` added, and
/// all but "not present" are of vector `vector` (#GP for loads, #TS in a stack switch).
pub(super) fn stack_segment(
    core: &mut Core,
    io: &dyn GuestIo,
    selector: u16,
    cpl: u8,
    vector: u8,
    ext: u32,
) -> Result<Segment, Exception> {
    let fault = Exception::with_code(vector, code(selector) | ext);
    if is_null(selector) {
        return Err(Exception::with_code(vector, ext));
    }
    let found = fetch_or(core, io, selector, fault)?;
    if (selector & 3) as u8 != cpl || found.dpl() != cpl || !found.is_writable_data() {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(Exception::ss(code(selector) | ext));
    }
    accessed(core, io, found)
}

/// The SS that a null selector leaves in 64-bit mode; its DPL is the privilege level.
pub(super) fn null_stack_segment(selector: u16, cpl: u8) -> Segment {
    let mut segment = Segment::unusable(selector);
    segment.attributes |= u32::from(cpl) << attr::DPL_SHIFT;
    segment
}

/// What loading `selector` into segment register `number` (not CS) puts there.
pub(super) fn data_segment(
    core: &mut Core,
    io: &dyn GuestIo,
    number: usize,
    selector: u16,
) -> Result<Segment, Exception> {
    if is_real_or_vm86(core) {
        let mut segment = core.cpu.seg[number];
        if core.cpu.is_vm86() {
            segment = vm86_segment(selector);
        }
        segment.base = u64::from(selector) << 4;
        segment.selector = selector;
        return Ok(segment);
    }
    let cpl = core.cpu.cpl;
    if number == index::SS {
        if is_null(selector) && core.cpu.mode() == Mode::Long64 && cpl < 3 && (selector & 3) as u8 == cpl {
            return Ok(null_stack_segment(selector, cpl));
        }
        return stack_segment(core, io, selector, cpl, anyvisor_x86::exception::vector::GP, 0);
    }
    if is_null(selector) {
        return Ok(Segment::unusable(selector));
    }
    let fault = Exception::gp(code(selector));
    let found = fetch_or(core, io, selector, fault)?;
    let conforming_code = found.is_code() && found.is_conforming();
    let privileged = !conforming_code && ((selector & 3) as u8 > found.dpl() || cpl > found.dpl());
    if !found.is_readable() || privileged {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(Exception::np(code(selector)));
    }
    accessed(core, io, found)
}

/// A segment register of virtual-8086 mode.
pub(super) fn vm86_segment(selector: u16) -> Segment {
    let attributes = attr::P | 3 << attr::DPL_SHIFT | attr::S | attr::WRITABLE | attr::ACCESSED;
    Segment { base: u64::from(selector) << 4, limit: 0xffff, attributes, selector }
}

/// Loads a segment register other than CS, with every check.
///
/// # Errors
/// What MOV to the segment register raises.
pub fn load_segment(core: &mut Core, io: &dyn GuestIo, number: usize, selector: u16) -> Result<(), Exception> {
    let segment = data_segment(core, io, number, selector)?;
    core.cpu.seg[number] = segment;
    Ok(())
}

/// MOV to a segment register.
pub(super) fn mov_to_segment(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let number = segment_index(instruction.op0_register());
    if number == index::CS {
        return Err(Exception::ud());
    }
    let selector = read_operand(core, io, instruction, 1, 2)? as u16;
    load_segment(core, io, number, selector)?;
    if number == index::SS {
        core.cpu.interrupt_shadow |= 2;
    }
    Ok(())
}

/// MOV from a segment register: 16 bits to memory, zero-extended to a register.
pub(super) fn mov_from_segment(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let selector = core.cpu.seg[segment_index(instruction.op1_register())].selector;
    write_operand(core, io, instruction, 2, u64::from(selector))
}

/// LDS, LES, LFS, LGS, LSS.
pub(super) fn load_far_pointer(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let number = match instruction.mnemonic() {
        Mnemonic::Lds => index::DS,
        Mnemonic::Les => index::ES,
        Mnemonic::Lfs => index::FS,
        Mnemonic::Lgs => index::GS,
        _ => index::SS,
    };
    let destination = instruction.op0_register();
    let size = destination.size() as u64;
    let address = core.memory_operand(instruction, size + 2, false)?;
    let mut data = [0; 10];
    core.read(io, address, &mut data[..size as usize + 2], Rights::Current)?;
    let selector = u16::from_le_bytes([data[size as usize], data[size as usize + 1]]);
    load_segment(core, io, number, selector)?;
    data[size as usize..].fill(0);
    core.set_register(destination, u64::from_le_bytes(data[..8].try_into().unwrap()));
    Ok(())
}

/// #GP(0) unless at CPL 0 (real mode is).
pub(super) fn require_cpl0(core: &Core) -> Result<(), Exception> {
    if core.cpu.cpl != 0 { Err(Exception::gp(0)) } else { Ok(()) }
}

/// What UMIP forbids above CPL 0.
pub(super) fn require_umip(core: &Core) -> Result<(), Exception> {
    if core.cpu.cr4 & cr4::UMIP != 0 && core.cpu.cpl > 0 { Err(Exception::gp(0)) } else { Ok(()) }
}

/// #UD in real-address and virtual-8086 mode, which do not recognise the instruction.
fn require_protected(core: &Core) -> Result<(), Exception> {
    if is_real_or_vm86(core) { Err(Exception::ud()) } else { Ok(()) }
}

/// LLDT.
pub(super) fn lldt(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    require_protected(core)?;
    require_cpl0(core)?;
    let selector = read_operand(core, io, instruction, 0, 2)? as u16;
    core.cpu.ldtr = ldt_segment(core, io, selector, anyvisor_x86::exception::vector::GP)?;
    Ok(())
}

/// Checks a selector for LDTR; wrong ones raise `vector` (#GP, or #TS in a task switch).
pub(super) fn ldt_segment(core: &mut Core, io: &dyn GuestIo, selector: u16, vector: u8) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Ok(Segment::unusable(selector));
    }
    let fault = Exception::with_code(vector, code(selector));
    if selector & 4 != 0 {
        return Err(fault);
    }
    let found = fetch_or(core, io, selector, fault)?;
    if !found.is_system() || found.kind() != system_type::LDT {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(if vector == anyvisor_x86::exception::vector::TS { fault } else { Exception::np(code(selector)) });
    }
    system_segment(core, io, &found)
}

/// The hidden part of LDTR or TR: in long mode the descriptor has 16 bytes and a 64-bit base.
fn system_segment(core: &mut Core, io: &dyn GuestIo, found: &Descriptor) -> Result<Segment, Exception> {
    let mut segment = found.segment();
    if core.cpu.is_long_mode() {
        let upper = fetch_upper(core, io, found)?;
        segment.base |= upper << 32;
        if !is_canonical(segment.base) {
            return Err(Exception::gp(found.code()));
        }
    }
    Ok(segment)
}

/// LTR.
pub(super) fn ltr(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    require_protected(core)?;
    require_cpl0(core)?;
    let selector = read_operand(core, io, instruction, 0, 2)? as u16;
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let fault = Exception::gp(code(selector));
    if selector & 4 != 0 {
        return Err(fault);
    }
    let found = fetch_or(core, io, selector, fault)?;
    let available = match found.kind() {
        system_type::TSS => true,
        system_type::TSS_16 => !core.cpu.is_long_mode(),
        _ => false,
    };
    if !found.is_system() || !available {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(Exception::np(code(selector)));
    }
    let mut segment = system_segment(core, io, &found)?;
    set_busy(core, io, &found, true)?;
    segment.attributes |= 2;
    core.cpu.tr = segment;
    Ok(())
}

/// SLDT and STR.
pub(super) fn store_selector(
    core: &mut Core,
    io: &dyn GuestIo,
    instruction: &Instruction,
    selector: u16,
) -> Result<(), Exception> {
    require_protected(core)?;
    require_umip(core)?;
    write_operand(core, io, instruction, 2, u64::from(selector))
}

/// SGDT and SIDT: a 16-bit limit and a base of 32 bits, or 64 in 64-bit mode.
pub(super) fn store_table(
    core: &mut Core,
    io: &dyn GuestIo,
    instruction: &Instruction,
    table: DescriptorTable,
) -> Result<(), Exception> {
    require_umip(core)?;
    let length = if core.cpu.mode() == Mode::Long64 { 10 } else { 6 };
    let address = core.memory_operand(instruction, length, true)?;
    let mut data = [0; 10];
    data[..2].copy_from_slice(&table.limit.to_le_bytes());
    data[2..].copy_from_slice(&table.base.to_le_bytes());
    core.write(io, address, &data[..length as usize], Rights::Current)
}

/// LGDT and LIDT; with a 16-bit operand size the base has 24 bits.
pub(super) fn load_table(
    core: &mut Core,
    io: &dyn GuestIo,
    instruction: &Instruction,
) -> Result<DescriptorTable, Exception> {
    require_cpl0(core)?;
    let long = core.cpu.mode() == Mode::Long64;
    let length = if long { 10 } else { 6 };
    let address = core.memory_operand(instruction, length, false)?;
    let mut data = [0; 10];
    core.read(io, address, &mut data[..length as usize], Rights::Current)?;
    let limit = u16::from_le_bytes([data[0], data[1]]);
    let mut base = u64::from_le_bytes(data[2..].try_into().unwrap());
    if matches!(instruction.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if long && !is_canonical(base) {
        return Err(Exception::gp(0));
    }
    Ok(DescriptorTable { base, limit })
}

fn set_zf(core: &mut Core, on: bool) {
    core.cpu.rflags = core.cpu.rflags & !rflags::ZF | if on { rflags::ZF } else { 0 };
}

/// A descriptor that LAR, LSL, VERR and VERW may look at: visible at this CPL and RPL.
fn inspect(core: &mut Core, io: &dyn GuestIo, selector: u16) -> Result<Option<Descriptor>, Exception> {
    if is_null(selector) {
        return Ok(None);
    }
    let cpl = core.cpu.cpl;
    Ok(fetch(core, io, selector)?.filter(|found| {
        let conforming = found.is_code() && found.is_conforming();
        conforming || (found.dpl() >= cpl && found.dpl() >= (selector & 3) as u8)
    }))
}

/// LAR and LSL (SDM vol. 2A): the access rights or the limit of a segment that the caller may see.
pub(super) fn lar_lsl(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    use system_type::*;
    require_protected(core)?;
    let selector = read_operand(core, io, instruction, 1, 2)? as u16;
    let lsl = instruction.mnemonic() == Mnemonic::Lsl;
    let long = core.cpu.is_long_mode();
    let found = inspect(core, io, selector)?.filter(|found| {
        !found.is_system()
            || match found.kind() {
                LDT | TSS | TSS_BUSY => true,
                TSS_16 | TSS_16_BUSY => !long,
                CALL_GATE => !lsl,
                CALL_GATE_16 | TASK_GATE => !lsl && !long,
                _ => false,
            }
    });
    if let Some(found) = found {
        let value = if lsl { u64::from(found.segment().limit) } else { (found.raw >> 32) & 0xff_ff00 };
        core.set_register(instruction.op0_register(), value);
    }
    set_zf(core, found.is_some());
    Ok(())
}

/// VERR and VERW.
pub(super) fn verify(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    require_protected(core)?;
    let selector = read_operand(core, io, instruction, 0, 2)? as u16;
    let write = instruction.mnemonic() == Mnemonic::Verw;
    let found = inspect(core, io, selector)?;
    set_zf(core, found.is_some_and(|d| if write { d.is_writable_data() } else { d.is_readable() }));
    Ok(())
}

/// ARPL: raises the RPL of operand 0 to that of operand 1.
pub(super) fn arpl(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    require_protected(core)?;
    let source = core.register(instruction.op1_register()) as u16;
    let register = instruction.op0_kind() == OpKind::Register;
    let old = if register {
        core.register(instruction.op0_register()) as u16
    } else {
        // Only a change needs the right to write.
        let address = core.memory_operand(instruction, 2, false)?;
        read_uint(core, io, address, 2, Rights::Current)? as u16
    };
    let raise = old & 3 < source & 3;
    if raise {
        let new = u64::from(old & !3 | source & 3);
        if register {
            // Only the low word changes, whatever the encoding calls the register.
            let full = core.register(instruction.op0_register().full_register());
            core.set_register(instruction.op0_register().full_register(), full & !0xffff | new);
        } else {
            write_operand(core, io, instruction, 2, new)?;
        }
    }
    set_zf(core, raise);
    Ok(())
}
