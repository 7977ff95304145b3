//! From an operand to a linear address: effective addresses, segmentation, and the stack.
//!
//! These are functions on [`Core`] rather than on the interpreter's own context because the system
//! instructions use them too. Every check comes before any access, so that a fault leaves no trace.

use super::debug;
use crate::core::Core;
use crate::cpu::Cpu;
use crate::mmu::Rights;
use crate::vendor;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::{cr0, gpr, rflags};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::{attr, index};
use iced_x86::{Instruction, Register};

/// Whether the CPU executes 64-bit code.
pub fn is_64bit(cpu: &Cpu) -> bool {
    cpu.is_long_mode() && cpu.seg[index::CS].is_long()
}

/// Whether `address` is canonical with 48-bit linear addresses.
pub const fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// What a bad address in `segment` raises: #SS(0) for the stack segment, else #GP(0).
fn address_fault(segment: usize) -> Exception {
    if segment == index::SS { Exception::ss(0) } else { Exception::gp(0) }
}

/// Linear address of `size` bytes at `offset` in segment register number `segment`, after the segment's
/// checks (SDM vol. 3A 5.3, 5.5; in 64-bit mode vol. 1 3.3.7.1).
///
/// # Errors
/// #GP(0), or #SS(0) for the stack segment.
pub fn linear(core: &Core, segment: usize, offset: u64, size: u64, write: bool) -> Result<u64, Exception> {
    let cpu = &core.cpu;
    let seg = &cpu.seg[segment];
    if is_64bit(cpu) {
        let address = if segment >= index::FS { seg.base.wrapping_add(offset) } else { offset };
        let last = address.wrapping_add(size.max(1) - 1);
        if is_canonical(address) && is_canonical(last) && vendor::takes_offset(offset) {
            return Ok(address);
        }
        return Err(address_fault(segment));
    }
    let checked = cpu.is_protected() && !cpu.is_vm86();
    if checked && !type_allows(seg.attributes, write) {
        return Err(address_fault(segment));
    }
    let offset = offset & 0xffff_ffff;
    let last = offset + size.max(1) - 1;
    let limit = u64::from(seg.limit);
    let expands_down = seg.attributes & (attr::CODE | attr::EXPAND_DOWN) == attr::EXPAND_DOWN;
    let inside = if checked && expands_down {
        offset > limit && last <= if seg.is_default_32() { 0xffff_ffff } else { 0xffff }
    } else {
        last <= limit || limit == 0xffff_ffff && vendor::wraps_at_4_gib()
    };
    if inside { Ok(seg.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(address_fault(segment)) }
}

/// [`linear`] for an operand that must be a multiple of `alignment`, a power of two: that check comes first.
///
/// # Errors
/// #GP(0) for the alignment, and as [`linear`].
pub fn aligned_linear(
    core: &Core,
    segment: usize,
    offset: u64,
    size: u64,
    alignment: u32,
    write: bool,
) -> Result<u64, Exception> {
    let base = if is_64bit(&core.cpu) && segment < index::FS { 0 } else { core.cpu.seg[segment].base };
    if base.wrapping_add(offset) & (u64::from(alignment) - 1) != 0 {
        return Err(Exception::gp(0));
    }
    linear(core, segment, offset, size, write)
}

fn type_allows(attributes: u32, write: bool) -> bool {
    if attributes & attr::UNUSABLE != 0 {
        return false;
    }
    if write {
        attributes & (attr::CODE | attr::WRITABLE) == attr::WRITABLE
    } else {
        attributes & (attr::CODE | attr::WRITABLE) != attr::CODE
    }
}

/// Number and shift of the general register that `register` is (part of), and its size in bytes.
pub fn gpr_part(register: Register) -> Option<(usize, u32, u32)> {
    let number = register as usize;
    const AH: usize = Register::AH as usize;
    const SPL: usize = Register::SPL as usize;
    const AX: usize = Register::AX as usize;
    const EAX: usize = Register::EAX as usize;
    const RAX: usize = Register::RAX as usize;
    const LAST: usize = Register::R15 as usize;
    match number {
        RAX..=LAST => Some((number - RAX, 0, 8)),
        EAX..RAX => Some((number - EAX, 0, 4)),
        AX..EAX => Some((number - AX, 0, 2)),
        SPL..AX => Some((number - SPL + 4, 0, 1)),
        AH..SPL => Some((number - AH, 8, 1)),
        1..AH => Some((number - 1, 0, 1)),
        _ => None,
    }
}

/// Reads a general register, zero-extended; the instruction pointer's and other registers read as zero.
pub fn read_register(cpu: &Cpu, register: Register) -> u64 {
    match gpr_part(register) {
        Some((number, shift, size)) => cpu.gpr[number] >> shift & super::alu::mask(size),
        None => 0,
    }
}

/// Writes a general register: 32-bit writes clear the upper half, smaller ones keep the rest.
pub fn write_register(cpu: &mut Cpu, register: Register, value: u64) {
    if let Some((number, shift, size)) = gpr_part(register) {
        write_gpr(cpu, number, shift, size, value);
    }
}

pub fn write_gpr(cpu: &mut Cpu, number: usize, shift: u32, size: u32, value: u64) {
    let slot = &mut cpu.gpr[number];
    let mask = super::alu::mask(size);
    *slot = if size >= 4 { value & mask } else { *slot & !(mask << shift) | (value & mask) << shift };
}

/// The mask of the instruction's address size.
pub fn address_mask(insn: &Instruction) -> u64 {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let size = if base != Register::None {
        base.size() as u32
    } else if gpr_part(index).is_some() {
        index.size() as u32
    } else {
        insn.memory_displ_size()
    };
    super::alu::mask(size.clamp(2, 8))
}

/// Effective address of the instruction's memory operand, without its segment. A vector index counts
/// as zero.
pub fn effective_address(cpu: &Cpu, insn: &Instruction) -> u64 {
    // iced's displacement of an IP-relative operand is the absolute address already.
    let mut address = insn.memory_displacement64();
    address = address.wrapping_add(read_register(cpu, insn.memory_base()));
    let index = read_register(cpu, insn.memory_index());
    address = address.wrapping_add(index.wrapping_mul(u64::from(insn.memory_index_scale())));
    address & address_mask(insn)
}

/// Segment register number of the instruction's memory operand. In 64-bit mode only FS and GS override.
pub fn operand_segment(cpu: &Cpu, insn: &Instruction) -> usize {
    let prefix = insn.segment_prefix();
    let ignored = is_64bit(cpu) && !matches!(prefix, Register::FS | Register::GS);
    if prefix == Register::None || ignored {
        let base = insn.memory_base();
        let on_stack = matches!(base, Register::BP | Register::EBP | Register::ESP | Register::RBP | Register::RSP);
        return if on_stack { index::SS } else { index::DS };
    }
    prefix as usize - Register::ES as usize
}

/// Segment register number of the source of a string instruction, or of another implicit DS operand.
pub fn implicit_segment(cpu: &Cpu, insn: &Instruction) -> usize {
    let prefix = insn.segment_prefix();
    let ignored = is_64bit(cpu) && !matches!(prefix, Register::FS | Register::GS);
    if prefix == Register::None || ignored { index::DS } else { prefix as usize - Register::ES as usize }
}

/// Linear address of the instruction's memory operand of `size` bytes.
///
/// # Errors
/// As [`linear`], and #AC.
pub fn operand_address(core: &Core, insn: &Instruction, size: u64, write: bool) -> Result<u64, Exception> {
    let offset = effective_address(&core.cpu, insn);
    let address = linear(core, operand_segment(&core.cpu, insn), offset, size, write)?;
    check_alignment(core, address, size)?;
    Ok(address)
}

/// #AC where alignment checking is on and `address` is no multiple of `size` (SDM vol. 3A table 6-7).
///
/// # Errors
/// #AC(0).
pub fn check_alignment(core: &Core, address: u64, size: u64) -> Result<(), Exception> {
    let cpu = &core.cpu;
    if cpu.rflags & rflags::AC != 0
        && cpu.cpl == 3
        && cpu.cr0 & cr0::AM != 0
        && size.is_power_of_two()
        && size <= 8
        && address & (size - 1) != 0
    {
        return Err(Exception::with_code(vector::AC, 0));
    }
    Ok(())
}

/// Reads `size` (1, 2, 4 or 8) bytes at a linear address, zero-extended.
///
/// # Errors
/// The exception that the access raises.
pub fn load(core: &mut Core, io: &dyn GuestIo, gva: u64, size: u32) -> Result<u64, Exception> {
    debug::note_access(core, gva, u64::from(size), false);
    let mut data = [0; 8];
    core.read(io, gva, &mut data[..size as usize], Rights::Current)?;
    Ok(u64::from_le_bytes(data))
}

/// Writes the low `size` (1, 2, 4 or 8) bytes of `value` at a linear address.
///
/// # Errors
/// The exception that the access raises.
pub fn store(core: &mut Core, io: &dyn GuestIo, gva: u64, size: u32, value: u64) -> Result<(), Exception> {
    debug::note_access(core, gva, u64::from(size), true);
    core.write(io, gva, &value.to_le_bytes()[..size as usize], Rights::Current)
}

/// The stack pointer moved by `delta` bytes, in the stack's width.
pub fn moved_stack_pointer(cpu: &Cpu, delta: i64) -> u64 {
    let rsp = cpu.gpr[gpr::RSP];
    let moved = rsp.wrapping_add_signed(delta);
    match cpu.stack_bits() {
        64 => moved,
        32 => moved & 0xffff_ffff,
        _ => rsp & !0xffff | moved & 0xffff,
    }
}

/// The part of `rsp` that addresses the stack.
pub fn stack_offset(cpu: &Cpu, rsp: u64) -> u64 {
    rsp & super::alu::mask(cpu.stack_bits() / 8)
}

/// Linear address of `size` bytes on the stack at stack pointer value `rsp`.
///
/// # Errors
/// #SS(0), or #AC.
pub fn stack_address(core: &Core, rsp: u64, size: u32, write: bool) -> Result<u64, Exception> {
    let size = u64::from(size);
    let address = linear(core, index::SS, stack_offset(&core.cpu, rsp), size, write)?;
    check_alignment(core, address, size)?;
    Ok(address)
}

/// Pushes `size` (2, 4 or 8) bytes.
///
/// # Errors
/// The exception that the write raises; RSP is unchanged then.
pub fn push(core: &mut Core, io: &dyn GuestIo, size: u32, value: u64) -> Result<(), Exception> {
    let rsp = moved_stack_pointer(&core.cpu, -i64::from(size));
    let address = stack_address(core, rsp, size, true)?;
    store(core, io, address, size, value)?;
    core.cpu.gpr[gpr::RSP] = rsp;
    Ok(())
}

/// Reads the `size` (2, 4 or 8) bytes that lie `above` bytes above the top of the stack, without popping.
///
/// # Errors
/// The exception that the read raises.
pub fn peek(core: &mut Core, io: &dyn GuestIo, above: u32, size: u32) -> Result<u64, Exception> {
    let rsp = moved_stack_pointer(&core.cpu, i64::from(above));
    let address = stack_address(core, rsp, size, false)?;
    load(core, io, address, size)
}

/// Pops `size` (2, 4 or 8) bytes.
///
/// # Errors
/// The exception that the read raises; RSP is unchanged then.
pub fn pop(core: &mut Core, io: &dyn GuestIo, size: u32) -> Result<u64, Exception> {
    let value = peek(core, io, 0, size)?;
    core.cpu.gpr[gpr::RSP] = moved_stack_pointer(&core.cpu, i64::from(size));
    Ok(value)
}

/// All ones in the width of `register`.
pub fn register_mask(register: Register) -> u64 {
    super::alu::mask(register.size().clamp(1, 8) as u32)
}
