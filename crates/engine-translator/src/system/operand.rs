//! Operands of system instructions: registers, effective and linear addresses, and the stack.

use crate::core::Core;
use crate::cpu::Mode;
use crate::interpret::debug;
use crate::mmu::Rights;
use crate::vendor;
use anyvisor_engine::GuestIo;
use anyvisor_x86::bits::gpr;
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{Exception, Segment};
use iced_x86::{Instruction, OpKind, Register};

/// Whether bits 63:47 of a linear address are all equal.
pub fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// All ones in the low `bytes` bytes.
pub(super) fn mask(bytes: u32) -> u64 {
    if bytes >= 8 { !0 } else { (1 << (8 * bytes)) - 1 }
}

/// The encoding index of a segment register.
pub(super) fn segment_index(register: Register) -> usize {
    register as usize - Register::ES as usize
}

impl Core {
    /// The value of a general register of any width.
    pub(super) fn register(&self, register: Register) -> u64 {
        let number = register.full_register() as usize - Register::RAX as usize;
        let value = self.cpu.gpr[number];
        match register {
            Register::AH | Register::CH | Register::DH | Register::BH => (value >> 8) & 0xff,
            _ => value & mask(register.size() as u32),
        }
    }

    /// Writes a general register; 32-bit writes clear the upper half.
    pub(super) fn set_register(&mut self, register: Register, value: u64) {
        let number = register.full_register() as usize - Register::RAX as usize;
        let old = self.cpu.gpr[number];
        self.cpu.gpr[number] = match register.size() {
            8 => value,
            4 => value & 0xffff_ffff,
            2 => old & !0xffff | value & 0xffff,
            _ if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) => {
                old & !0xff00 | (value & 0xff) << 8
            }
            _ => old & !0xff | value & 0xff,
        };
    }

    /// The offset that a ModRM memory operand names in its segment.
    pub(super) fn effective_address(&self, instruction: &Instruction) -> u64 {
        let displacement = instruction.memory_displacement64();
        let (base, scaled) = (instruction.memory_base(), instruction.memory_index());
        if matches!(base, Register::RIP | Register::EIP) {
            return displacement; // iced has added the instruction pointer
        }
        let mut offset = displacement;
        let mut width = instruction.memory_displ_size();
        if base != Register::None {
            offset = offset.wrapping_add(self.register(base));
            width = base.size() as u32;
        }
        if scaled != Register::None {
            offset =
                offset.wrapping_add(self.register(scaled).wrapping_mul(u64::from(instruction.memory_index_scale())));
            width = scaled.size() as u32;
        }
        if width == 0 { offset } else { offset & mask(width.max(2)) }
    }

    /// The checked linear address of `size` bytes of an instruction's ModRM memory operand.
    pub(super) fn memory_operand(&self, instruction: &Instruction, size: u64, write: bool) -> Result<u64, Exception> {
        let offset = self.effective_address(instruction);
        let address = self.linear(segment_index(instruction.memory_segment()), offset, size, write)?;
        debug::note_access(self, address, size, write);
        Ok(address)
    }

    /// The linear address of `size` bytes at `offset` in segment register `segment`.
    ///
    /// # Errors
    /// #GP(0), or #SS(0) for SS, when the segment does not allow the access (SDM vol. 3A 5.3, 5.5) or the
    /// address is not canonical.
    pub fn linear(&self, segment: usize, offset: u64, size: u64, write: bool) -> Result<u64, Exception> {
        self.linear_in(&self.cpu.seg[segment], segment, offset, size, write).ok_or(if segment == index::SS {
            Exception::ss(0)
        } else {
            Exception::gp(0)
        })
    }

    /// As [`Core::linear`], in a segment that is not loaded into its register `number` yet.
    fn linear_in(&self, segment: &Segment, number: usize, offset: u64, size: u64, write: bool) -> Option<u64> {
        if self.cpu.mode() == Mode::Long64 {
            let base = if number >= index::FS { segment.base } else { 0 };
            return long_address(base, offset, size);
        }
        if self.cpu.is_protected() && !self.cpu.is_vm86() {
            let code = segment.attributes & attr::CODE != 0;
            let right = segment.attributes & attr::WRITABLE != 0;
            let forbidden = if write { code || !right } else { code && !right };
            if !segment.is_usable() || forbidden {
                return None;
            }
        }
        let last = offset.checked_add(size.max(1) - 1)?;
        let limit = u64::from(segment.limit);
        let expand_down =
            segment.attributes & (attr::S | attr::CODE | attr::EXPAND_DOWN) == attr::S | attr::EXPAND_DOWN;
        let inside = if expand_down {
            let top = if segment.is_default_32() { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit || limit == 0xffff_ffff && vendor::wraps_at_4_gib()
        };
        inside.then_some(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }
}

fn long_address(base: u64, offset: u64, size: u64) -> Option<u64> {
    let address = base.wrapping_add(offset);
    let last = address.wrapping_add(size.max(1) - 1);
    (is_canonical(address) && is_canonical(last) && vendor::takes_offset(offset)).then_some(address)
}

/// A stack in use: its pointer is the processor's only after [`Stack::commit`], so that an instruction or
/// a delivery that faults half-way leaves RSP alone.
pub(super) struct Stack {
    segment: Segment,
    /// Width of the stack pointer in bits.
    bits: u32,
    pub pointer: u64,
    /// Error code of the #SS that an access outside the segment raises.
    pub fault_code: u32,
}

impl Stack {
    /// The current stack.
    pub fn current(core: &Core) -> Stack {
        Stack {
            segment: core.cpu.seg[index::SS],
            bits: core.cpu.stack_bits(),
            pointer: core.cpu.gpr[gpr::RSP],
            fault_code: 0,
        }
    }

    /// A stack in `segment`, of a mode other than 64-bit.
    pub fn in_segment(segment: Segment, pointer: u64, fault_code: u32) -> Stack {
        Stack { segment, bits: if segment.is_default_32() { 32 } else { 16 }, pointer, fault_code }
    }

    /// A stack of 64-bit mode.
    pub fn long(pointer: u64, fault_code: u32) -> Stack {
        Stack { segment: Segment::default(), bits: 64, pointer, fault_code }
    }

    fn mask(&self) -> u64 {
        mask(self.bits / 8)
    }

    fn linear(&self, core: &Core, offset: u64, size: u64, write: bool) -> Result<u64, Exception> {
        let address = if self.bits == 64 {
            long_address(0, offset, size)
        } else if core.cpu.mode() == Mode::Long64 {
            // A compatibility-mode or call-gate stack seen from 64-bit mode is not checked against limits.
            Some((self.segment.base.wrapping_add(offset)) & 0xffff_ffff)
        } else {
            core.linear_in(&self.segment, index::SS, offset, size, write)
        };
        address.ok_or(Exception::ss(self.fault_code))
    }

    /// Pushes the low `size` bytes of `value`.
    pub fn push(&mut self, core: &mut Core, io: &dyn GuestIo, value: u64, size: u32) -> Result<(), Exception> {
        let pointer = self.pointer.wrapping_sub(u64::from(size)) & self.mask();
        let address = self.linear(core, pointer, u64::from(size), true)?;
        core.write(io, address, &value.to_le_bytes()[..size as usize], Rights::Current)?;
        self.pointer = pointer | self.pointer & !self.mask();
        Ok(())
    }

    /// Pops `size` bytes.
    pub fn pop(&mut self, core: &mut Core, io: &dyn GuestIo, size: u32) -> Result<u64, Exception> {
        let value = self.peek(core, io, 0, size)?;
        self.skip(u64::from(size));
        Ok(value)
    }

    /// Reads `size` bytes at `distance` above the top.
    pub fn peek(&self, core: &mut Core, io: &dyn GuestIo, distance: u64, size: u32) -> Result<u64, Exception> {
        let pointer = self.pointer.wrapping_add(distance) & self.mask();
        let address = self.linear(core, pointer, u64::from(size), false)?;
        let mut data = [0; 8];
        core.read(io, address, &mut data[..size as usize], Rights::Current)?;
        Ok(u64::from_le_bytes(data))
    }

    /// Drops `bytes` from the top.
    pub fn skip(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes) & self.mask() | self.pointer & !self.mask();
    }

    /// Makes this the processor's stack pointer: 16-bit stacks leave the upper bits of RSP alone.
    pub fn commit(&self, core: &mut Core) {
        let rsp = &mut core.cpu.gpr[gpr::RSP];
        *rsp = match self.bits {
            16 => *rsp & !0xffff | self.pointer & 0xffff,
            32 => self.pointer & 0xffff_ffff,
            _ => self.pointer,
        };
    }
}

/// Reads an integer of `size` bytes at a linear address.
pub(super) fn read_uint(
    core: &mut Core,
    io: &dyn GuestIo,
    address: u64,
    size: usize,
    rights: Rights,
) -> Result<u64, Exception> {
    let mut data = [0; 8];
    core.read(io, address, &mut data[..size], rights)?;
    Ok(u64::from_le_bytes(data))
}

/// The value of operand `n`, which is a register, memory of `size` bytes, or an immediate.
pub(super) fn read_operand(
    core: &mut Core,
    io: &dyn GuestIo,
    instruction: &Instruction,
    n: u32,
    size: u32,
) -> Result<u64, Exception> {
    match instruction.op_kind(n) {
        OpKind::Register => Ok(core.register(instruction.op_register(n)) & mask(size)),
        OpKind::Memory => {
            let address = core.memory_operand(instruction, u64::from(size), false)?;
            read_uint(core, io, address, size as usize, Rights::Current)
        }
        _ => Ok(instruction.immediate(n) & mask(size)),
    }
}

/// Writes `value` to operand 0: all of a register (zero-extended), or `size` bytes of memory.
pub(super) fn write_operand(
    core: &mut Core,
    io: &dyn GuestIo,
    instruction: &Instruction,
    size: u32,
    value: u64,
) -> Result<(), Exception> {
    if instruction.op_kind(0) == OpKind::Register {
        core.set_register(instruction.op_register(0), value);
        return Ok(());
    }
    let address = core.memory_operand(instruction, u64::from(size), true)?;
    core.write(io, address, &value.to_le_bytes()[..size as usize], Rights::Current)
}
