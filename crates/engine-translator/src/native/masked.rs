//! Instructions whose memory elements are chosen by a mask: gathers, masked moves.
//!
//! An element that is masked out is not accessed and cannot fault, so these go element by element through
//! the guest's memory instead of through one bounce buffer.

use super::stub::read_mmx;
use crate::core::Core;
use crate::interpret::memory::{
    address_mask, effective_address, implicit_segment, is_64bit, linear, load, operand_segment, read_register, store,
};
use crate::mmu::Rights;
use crate::vendor;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use anyvisor_x86::exception::vector;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// Executes a gather or masked move; `false` if `insn` is none.
pub(super) fn execute(core: &mut Core, io: &dyn GuestIo, insn: &Instruction) -> Result<bool, Exception> {
    match insn.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd => gather(core, io, insn, 4, 4)?,
        M::Vgatherdpd | M::Vpgatherdq => gather(core, io, insn, 4, 8)?,
        M::Vgatherqps | M::Vpgatherqd => gather(core, io, insn, 8, 4)?,
        M::Vgatherqpd | M::Vpgatherqq => gather(core, io, insn, 8, 8)?,
        M::Vmaskmovps | M::Vpmaskmovd => masked_move(core, io, insn, 4)?,
        M::Vmaskmovpd | M::Vpmaskmovq => masked_move(core, io, insn, 8)?,
        M::Maskmovdqu | M::Vmaskmovdqu => {
            let bytes = |r: Register| -> [u8; 16] { core.cpu.ymm[r.number()].0[..16].try_into().expect("16 bytes") };
            let (data, mask) = (bytes(insn.op1_register()), bytes(insn.op2_register()));
            masked_bytes(core, io, insn, &data, &mask)?;
        }
        M::Maskmovq => {
            let data = read_mmx(core, insn.op1_register())?.to_le_bytes();
            let mask = read_mmx(core, insn.op2_register())?.to_le_bytes();
            masked_bytes(core, io, insn, &data, &mask)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Element `n` of `size` bytes of a vector register.
fn element(core: &Core, register: Register, n: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&core.cpu.ymm[register.number()].0[n * size..][..size]);
    u64::from_le_bytes(bytes)
}

fn set_element(core: &mut Core, register: Register, n: usize, size: usize, value: u64) {
    core.cpu.ymm[register.number()].0[n * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
}

fn selected(core: &Core, mask: Register, n: usize, size: usize) -> bool {
    element(core, mask, n, size) >> (8 * size - 1) & 1 != 0
}

/// The AVX2 gathers (SDM vol. 2C, VPGATHERDD ...): elements in order; one that faults leaves those before
/// it done and their masks cleared, so that the instruction can be restarted. Before the first, Intel's processors make the mask
/// all ones and all zeros by the elements' signs; AMD's leave what they have not come to as it was.
fn gather(
    core: &mut Core,
    io: &dyn GuestIo,
    insn: &Instruction,
    index_size: usize,
    size: usize,
) -> Result<(), Exception> {
    let (destination, index, mask) = (insn.op0_register(), insn.memory_index(), insn.op2_register());
    let numbers = [destination.number(), index.number(), mask.number()];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(Exception::ud());
    }
    let count = (destination.size() / size).min(index.size() / index_size);
    let base = effective_address(&core.cpu, insn);
    let segment = operand_segment(&core.cpu, insn);
    let width = destination.size().max(index.size());
    if !vendor::is_amd() {
        for n in 0..width / size {
            let all = if selected(core, mask, n, size) { u64::MAX } else { 0 };
            set_element(core, mask, n, size, all);
        }
        core.cpu.ymm[mask.number()].0[width..].fill(0);
    }
    for n in 0..count {
        if selected(core, mask, n, size) {
            let raw = element(core, index, n, index_size);
            let offset = if index_size == 4 { i64::from(raw as i32) } else { raw as i64 };
            let scaled = offset.wrapping_mul(i64::from(insn.memory_index_scale()));
            let address = base.wrapping_add_signed(scaled) & address_mask(insn);
            let address = linear(core, segment, address, size as u64, false)?;
            let value = load(core, io, address, size as u32)?;
            set_element(core, destination, n, size, value);
            if !vendor::is_amd() {
                core.cpu.ymm[destination.number()].0[width..].fill(0);
            }
        }
        set_element(core, mask, n, size, 0);
    }
    core.cpu.ymm[mask.number()].0.fill(0);
    core.cpu.ymm[destination.number()].0[count * size..].fill(0);
    Ok(())
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ, loads and stores.
fn masked_move(core: &mut Core, io: &dyn GuestIo, insn: &Instruction, size: usize) -> Result<(), Exception> {
    let stores = insn.op0_kind() == OpKind::Memory;
    let mask = insn.op1_register();
    let register = if stores { insn.op2_register() } else { insn.op0_register() };
    let base = effective_address(&core.cpu, insn);
    let segment = operand_segment(&core.cpu, insn);
    let mut chosen = Vec::with_capacity(8);
    for n in 0..mask.size() / size {
        if selected(core, mask, n, size) {
            // The address size limits where the operand starts, not where it ends.
            let before = (n * size) as u64;
            let address = if is_64bit(&core.cpu) || vendor::wraps_at_4_gib() {
                linear(core, segment, base.wrapping_add(before), size as u64, stores)?
            } else {
                linear(core, segment, base, before + size as u64, stores)?.wrapping_add(before)
            };
            chosen.push((n, address));
        }
    }
    if stores {
        let start = chosen.first().map_or(0, |(_, address)| *address);
        let last = chosen.last().map_or(0, |(_, address)| address.wrapping_add(size as u64 - 1));
        for (_, address) in &chosen {
            core.probe_write(*address, size, Rights::Current).map_err(|fault| report_last(fault, start, last))?;
        }
        for (n, address) in chosen {
            store(core, io, address, size as u32, element(core, register, n, size))?;
        }
        return Ok(());
    }
    let mut loaded = [0u8; 32];
    for (n, address) in chosen {
        let value = load(core, io, address, size as u32)?;
        loaded[n * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    core.cpu.ymm[register.number()].0 = loaded;
    Ok(())
}

/// Where a masked store's page fault is: in the second page of a store to two, at the last byte stored. On AMD's
/// processors at the first that cannot be stored.
fn report_last(mut fault: Exception, start: u64, last: u64) -> Exception {
    if !vendor::is_amd() && fault.vector == vector::PF && fault.payload & !0xfff != start & !0xfff {
        fault.payload = last;
    }
    fault
}

/// MASKMOVQ and MASKMOVDQU: bytes to DS:rDI.
fn masked_bytes(
    core: &mut Core,
    io: &dyn GuestIo,
    insn: &Instruction,
    data: &[u8],
    mask: &[u8],
) -> Result<(), Exception> {
    let rdi = match insn.op0_kind() {
        OpKind::MemorySegDI => Register::DI,
        OpKind::MemorySegEDI => Register::EDI,
        _ => Register::RDI,
    };
    let base = read_register(&core.cpu, rdi);
    let width = crate::interpret::memory::register_mask(rdi);
    let segment = implicit_segment(&core.cpu, insn);
    let mut chosen = Vec::with_capacity(16);
    for n in (0..data.len()).filter(|n| mask[*n] & 0x80 != 0) {
        let address = linear(core, segment, base.wrapping_add(n as u64) & width, 1, true)?;
        core.probe_write(address, 1, Rights::Current)?;
        chosen.push((address, data[n]));
    }
    for (address, byte) in chosen {
        store(core, io, address, 1, u64::from(byte))?;
    }
    Ok(())
}
