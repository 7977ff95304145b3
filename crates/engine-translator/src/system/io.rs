//! Port I/O: IN, OUT and their string forms (SDM vol. 1 chapter 19).
//!
//! A repeated string instruction is executed in slices. After each slice RIP stays at the instruction while
//! elements remain, so that interrupts get in between and every boundary is a consistent state.

use super::descriptor::system_type;
use super::operand::{mask, read_uint, segment_index};
use crate::core::Core;
use crate::cpu::Mode;
use crate::interpret::debug;
use crate::mmu::Rights;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::{gpr, rflags};
use anyvisor_x86::segment::index;
use iced_x86::{Code, Instruction, OpKind, Register};
use std::sync::atomic::Ordering;

/// Elements of a repeated instruction that are executed before pending events are looked at.
const SLICE: u64 = 256;

/// Raises #GP(0) unless IOPL or the TSS's bitmap allows `size` ports from `port` (SDM vol. 1 19.5).
fn check_permission(core: &mut Core, io: &dyn GuestIo, port: u16, size: u32) -> Result<(), Exception> {
    let iopl = (core.cpu.rflags & rflags::IOPL) >> rflags::IOPL_SHIFT;
    if !core.cpu.is_protected() || !core.cpu.is_vm86() && u64::from(core.cpu.cpl) <= iopl {
        return Ok(());
    }
    let tr = core.cpu.tr;
    let kind = tr.attributes & 0xf;
    if !tr.is_usable() || kind < system_type::TSS || tr.limit < 0x67 {
        return Err(Exception::gp(0));
    }
    let map = read_uint(core, io, tr.base.wrapping_add(0x66), 2, Rights::Implicit)?;
    let byte = map + u64::from(port / 8);
    // The processor always reads two bytes; the map ends with a byte of ones for that.
    if byte + 1 > u64::from(tr.limit) {
        return Err(Exception::gp(0));
    }
    let bits = read_uint(core, io, tr.base.wrapping_add(byte), 2, Rights::Implicit)?;
    if bits >> (port % 8) & ((1 << size) - 1) != 0 {
        return Err(Exception::gp(0));
    }
    Ok(())
}

/// The port of operand `n`: an immediate, or DX.
fn port_operand(core: &Core, instruction: &Instruction, n: u32) -> u16 {
    match instruction.op_kind(n) {
        OpKind::Register => core.cpu.gpr[gpr::RDX] as u16,
        _ => u16::from(instruction.immediate8()),
    }
}

/// IN.
pub(super) fn input(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let register = instruction.op0_register();
    let size = register.size();
    let port = port_operand(core, instruction, 1);
    check_permission(core, io, port, size as u32)?;
    debug::note_port(core, port, size as u64);
    let mut data = [0; 8];
    io.pio_read(port, &mut data[..size]);
    core.set_register(register, u64::from_le_bytes(data));
    Ok(())
}

/// OUT.
pub(super) fn output(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let register = instruction.op1_register();
    let size = register.size();
    let port = port_operand(core, instruction, 0);
    check_permission(core, io, port, size as u32)?;
    debug::note_port(core, port, size as u64);
    let value = core.register(register);
    io.pio_write(port, &value.to_le_bytes()[..size]);
    Ok(())
}

/// INS and OUTS, repeated or not.
pub(super) fn string(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let (size, output) = match instruction.code() {
        Code::Insb_m8_DX => (1, false),
        Code::Insw_m16_DX => (2, false),
        Code::Insd_m32_DX => (4, false),
        Code::Outsb_DX_m8 => (1, true),
        Code::Outsw_DX_m16 => (2, true),
        _ => (4, true),
    };
    let port = core.cpu.gpr[gpr::RDX] as u16;
    check_permission(core, io, port, size as u32)?;
    let memory = instruction.op_kind(u32::from(output));
    let address_size = match memory {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
        _ => 8,
    };
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let counter = address_register(Register::RCX, address_size);
    let step = if core.cpu.rflags & rflags::DF != 0 { 0u64.wrapping_sub(size as u64) } else { size as u64 };
    let slice = if core.cpu.rflags & rflags::TF != 0 || debug::armed(core) { 1 } else { SLICE };
    let end = core.cpu.rip;
    for _ in 0..slice {
        if repeated && core.register(counter) == 0 {
            return Ok(());
        }
        debug::note_port(core, port, size as u64);
        if output {
            let pointer = address_register(Register::RSI, address_size);
            output_element(core, io, port, size, segment_index(instruction.memory_segment()), pointer)?;
            let next = core.register(pointer).wrapping_add(step);
            core.set_register(pointer, next);
        } else {
            let pointer = address_register(Register::RDI, address_size);
            input_element(core, io, port, size, pointer)?;
            let next = core.register(pointer).wrapping_add(step);
            core.set_register(pointer, next);
        }
        if !repeated {
            return Ok(());
        }
        let left = core.register(counter).wrapping_sub(1) & mask(address_size);
        core.set_register(counter, left);
        if left == 0 {
            return Ok(());
        }
        if core.cpu.pending.load(Ordering::Relaxed) != 0 {
            break;
        }
    }
    let width = if core.cpu.mode() == Mode::Long64 { !0 } else { 0xffff_ffff };
    core.cpu.rip = end.wrapping_sub(instruction.len() as u64) & width;
    Ok(())
}

fn address_register(register: Register, size: u32) -> Register {
    match (register, size) {
        (Register::RCX, 2) => Register::CX,
        (Register::RCX, 4) => Register::ECX,
        (Register::RSI, 2) => Register::SI,
        (Register::RSI, 4) => Register::ESI,
        (Register::RDI, 2) => Register::DI,
        (Register::RDI, 4) => Register::EDI,
        (register, _) => register,
    }
}

fn output_element(
    core: &mut Core,
    io: &dyn GuestIo,
    port: u16,
    size: usize,
    segment: usize,
    pointer: Register,
) -> Result<(), Exception> {
    let address = core.linear(segment, core.register(pointer), size as u64, false)?;
    debug::note_access(core, address, size as u64, false);
    let mut data = [0; 4];
    core.read(io, address, &mut data[..size], Rights::Current)?;
    io.pio_write(port, &data[..size]);
    Ok(())
}

/// The destination is checked first: a device's read may have effects and must not be lost.
fn input_element(
    core: &mut Core,
    io: &dyn GuestIo,
    port: u16,
    size: usize,
    pointer: Register,
) -> Result<(), Exception> {
    let address = core.linear(index::ES, core.register(pointer), size as u64, true)?;
    debug::note_access(core, address, size as u64, true);
    core.probe_write(address, size, Rights::Current)?;
    let mut data = [0; 4];
    io.pio_read(port, &mut data[..size]);
    core.write(io, address, &data[..size], Rights::Current)
}
