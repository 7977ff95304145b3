//! Control, debug and extended control registers, and what invalidates translations.

use super::descriptor::{require_cpl0, require_umip};
use super::operand::{is_canonical, read_operand, segment_index, write_operand};
use crate::core::Core;
use crate::cpu::{Mode, pending};
use crate::mmu::Rights;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::{cr0, cr4, dr, efer, gpr, xcr0};
use anyvisor_x86::paging::PageTables;
use anyvisor_x86::segment::index;
use iced_x86::{Instruction, Mnemonic, Register};
use std::sync::atomic::Ordering;

const CR0_DEFINED: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

const CR3_NO_FLUSH: u64 = 1 << 63;

/// MOV to or from a control register.
pub(super) fn mov_control(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let (destination, source) = (instruction.op0_register(), instruction.op1_register());
    let load = destination.is_cr();
    let (control, general) = if load { (destination, source) } else { (source, destination) };
    let number = control as u32 - Register::CR0 as u32;
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(Exception::ud());
    }
    require_cpl0(core)?;
    if !load {
        let value = match number {
            0 => core.cpu.cr0,
            2 => core.cpu.cr2,
            3 => core.cpu.cr3,
            4 => core.cpu.cr4,
            _ => u64::from(core.lapic.cr8()),
        };
        core.set_register(general, value);
        return Ok(());
    }
    let value = core.register(general);
    match number {
        0 => write_cr0(core, value),
        2 => {
            core.cpu.cr2 = value;
            Ok(())
        }
        3 => write_cr3(core, io, value),
        4 => write_cr4(core, io, value),
        _ => write_cr8(core, value),
    }
}

/// Writes CR0 with every check and mode switch (SDM vol. 3A 2.5, 9.9, 9.8.5).
///
/// # Errors
/// #GP(0) for combinations that do not exist.
pub fn write_cr0(core: &mut Core, value: u64) -> Result<(), Exception> {
    let old = core.cpu.cr0;
    if value >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    let new = value & CR0_DEFINED | cr0::ET;
    if new & (cr0::PG | cr0::PE) == cr0::PG || new & (cr0::NW | cr0::CD) == cr0::NW {
        return Err(Exception::gp(0));
    }
    let cpu = &mut core.cpu;
    if new & cr0::PG != 0 && old & cr0::PG == 0 {
        if cpu.efer & efer::LME != 0 {
            if cpu.cr4 & cr4::PAE == 0 || cpu.seg[index::CS].is_long() {
                return Err(Exception::gp(0));
            }
            cpu.efer |= efer::LMA;
        } else if cpu.cr4 & cr4::PAE != 0 {
            check_pdptes(core, core.cpu.cr3)?;
        }
    } else if new & cr0::PG == 0 && old & cr0::PG != 0 {
        if cpu.mode() == Mode::Long64 || cpu.cr4 & cr4::PCIDE != 0 {
            return Err(Exception::gp(0));
        }
        cpu.efer &= !efer::LMA;
    }
    core.cpu.cr0 = new;
    if new & cr0::PE == 0 {
        core.cpu.cpl = 0;
    }
    if (old ^ new) & (cr0::PG | cr0::PE | cr0::WP) != 0 {
        core.flush_all();
    }
    Ok(())
}

/// The page-directory-pointer table of PAE paging must have no reserved bits set (SDM vol. 3A 4.4.1).
fn check_pdptes(core: &Core, cr3: u64) -> Result<(), Exception> {
    let reserved = 0x1e6 | (!0u64 << core.physical_bits);
    for n in 0..4 {
        let entry = core.ram.read_entry((cr3 & 0xffff_ffe0) + 8 * n);
        if entry & 1 != 0 && entry & reserved != 0 {
            return Err(Exception::gp(0));
        }
    }
    Ok(())
}

impl crate::ram::Ram {
    fn read_entry(&self, gpa: u64) -> u64 {
        PageTables::read(self, gpa, 8).unwrap_or(0)
    }
}

fn is_pae_paging(core: &Core) -> bool {
    core.cpu.cr0 & cr0::PG != 0 && core.cpu.cr4 & cr4::PAE != 0 && !core.cpu.is_long_mode()
}

fn write_cr3(core: &mut Core, _io: &dyn GuestIo, value: u64) -> Result<(), Exception> {
    if core.cpu.is_long_mode() {
        let pcid = core.cpu.cr4 & cr4::PCIDE != 0;
        let no_flush = pcid && value & CR3_NO_FLUSH != 0;
        let new = if pcid { value & !CR3_NO_FLUSH } else { value };
        if new >> core.physical_bits != 0 {
            return Err(Exception::gp(0));
        }
        let old = core.cpu.cr3;
        core.cpu.cr3 = new;
        if !pcid {
            core.flush_non_global();
        } else if (old ^ new) & 0xfff != 0 {
            core.switch_address_space(old, no_flush);
        } else if !no_flush || old != new {
            // With another root and the same PCID, keeping translations would be allowed.
            core.flush_current();
        }
        return Ok(());
    }
    if is_pae_paging(core) {
        check_pdptes(core, value)?;
    }
    core.cpu.cr3 = value;
    core.flush_non_global();
    Ok(())
}

fn has(core: &Core, leaf: u32, register: impl Fn(anyvisor_x86::CpuidResult) -> u32, bit: u32) -> bool {
    register(core.cpuid(leaf, 0)) >> bit & 1 != 0
}

/// The bits of CR4 that this vCPU has.
fn cr4_defined(core: &Core) -> u64 {
    let mut bits =
        cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    for (present, bit) in [
        (has(core, 1, |r| r.ecx, 17), cr4::PCIDE),
        (has(core, 1, |r| r.ecx, 26), cr4::OSXSAVE),
        (has(core, 7, |r| r.ebx, 0), cr4::FSGSBASE),
        (has(core, 7, |r| r.ebx, 7), cr4::SMEP),
        (has(core, 7, |r| r.ebx, 20), cr4::SMAP),
        (has(core, 7, |r| r.ecx, 2), cr4::UMIP),
        (has(core, 7, |r| r.ecx, 3), cr4::PKE),
        (has(core, 7, |r| r.ecx, 31), cr4::PKS),
    ] {
        if present {
            bits |= bit;
        }
    }
    bits
}

fn write_cr4(core: &mut Core, _io: &dyn GuestIo, value: u64) -> Result<(), Exception> {
    let old = core.cpu.cr4;
    let changed = old ^ value;
    if value & !cr4_defined(core) != 0 {
        return Err(Exception::gp(0));
    }
    if core.cpu.is_long_mode() {
        if value & cr4::PAE == 0 {
            return Err(Exception::gp(0));
        }
    } else if value & cr4::PCIDE != 0 {
        return Err(Exception::gp(0));
    }
    if changed & value & cr4::PCIDE != 0 && core.cpu.cr3 & 0xfff != 0 {
        return Err(Exception::gp(0));
    }
    let pae_bits = cr4::PGE | cr4::PSE | cr4::PAE | cr4::SMEP;
    if core.cpu.cr0 & cr0::PG != 0 && !core.cpu.is_long_mode() && value & cr4::PAE != 0 && changed & pae_bits != 0 {
        check_pdptes(core, core.cpu.cr3)?;
    }
    core.cpu.cr4 = value;
    let paging = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PKS;
    if changed & paging != 0 {
        core.flush_all();
    }
    Ok(())
}

fn write_cr8(core: &mut Core, value: u64) -> Result<(), Exception> {
    if value > 15 {
        return Err(Exception::gp(0));
    }
    core.lapic.set_cr8(value as u8);
    core.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
    Ok(())
}

/// CLTS.
pub(super) fn clts(core: &mut Core) -> Result<(), Exception> {
    require_cpl0(core)?;
    core.cpu.cr0 &= !cr0::TS;
    Ok(())
}

/// SMSW.
pub(super) fn smsw(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    require_umip(core)?;
    let value = core.cpu.cr0;
    write_operand(core, io, instruction, 2, value)
}

/// LMSW: the low four bits of CR0, of which PE can be set only.
pub(super) fn lmsw(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    require_cpl0(core)?;
    let value = read_operand(core, io, instruction, 0, 2)?;
    let new = core.cpu.cr0 & !0xe | value & 0xf;
    write_cr0(core, new)
}

/// MOV to or from a debug register (SDM vol. 3B 18.2).
pub(super) fn mov_debug(core: &mut Core, instruction: &Instruction) -> Result<(), Exception> {
    let (destination, source) = (instruction.op0_register(), instruction.op1_register());
    let load = destination.is_dr();
    let (debug, general) = if load { (destination, source) } else { (source, destination) };
    let mut number = debug as usize - Register::DR0 as usize;
    if number > 7 || matches!(number, 4 | 5) && core.cpu.cr4 & cr4::DE != 0 {
        return Err(Exception::ud());
    }
    if matches!(number, 4 | 5) {
        number += 2;
    }
    require_cpl0(core)?;
    if core.cpu.dr[7] & dr::DR7_GD != 0 {
        return Err(Exception::db(dr::DR6_BD));
    }
    if !load {
        let value = core.cpu.dr[number];
        core.set_register(general, value);
        return Ok(());
    }
    let value = core.register(general);
    if number >= 6 && value >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    core.cpu.dr[number] = match number {
        6 => value & 0xe00f | dr::DR6_FIXED,
        7 => value & 0xffff_23ff | dr::DR7_FIXED,
        _ => value,
    };
    Ok(())
}

/// XGETBV: XCR0 only.
pub(super) fn xgetbv(core: &mut Core) -> Result<(), Exception> {
    if core.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud());
    }
    if core.cpu.gpr[gpr::RCX] as u32 != 0 {
        return Err(Exception::gp(0));
    }
    let value = core.cpu.xcr0;
    core.cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    core.cpu.gpr[gpr::RDX] = value >> 32;
    Ok(())
}

/// XSETBV.
pub(super) fn xsetbv(core: &mut Core) -> Result<(), Exception> {
    if core.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud());
    }
    require_cpl0(core)?;
    let value = core.cpu.gpr[gpr::RAX] & 0xffff_ffff | core.cpu.gpr[gpr::RDX] << 32;
    let leaf = core.cpuid(0xd, 0);
    let supported = u64::from(leaf.eax) | u64::from(leaf.edx) << 32;
    let avx_without_sse = value & (xcr0::SSE | xcr0::AVX) == xcr0::AVX;
    if core.cpu.gpr[gpr::RCX] as u32 != 0 || value & !supported != 0 || value & xcr0::X87 == 0 || avx_without_sse {
        return Err(Exception::gp(0));
    }
    core.cpu.xcr0 = value;
    Ok(())
}

/// RDPKRU and WRPKRU (SDM vol. 2B, 2D).
pub(super) fn protection_keys(core: &mut Core, instruction: &Instruction) -> Result<(), Exception> {
    if core.cpu.cr4 & cr4::PKE == 0 {
        return Err(Exception::ud());
    }
    let [rax, rcx, rdx] = [gpr::RAX, gpr::RCX, gpr::RDX].map(|register| core.cpu.gpr[register] as u32);
    let write = instruction.mnemonic() == Mnemonic::Wrpkru;
    if rcx != 0 || write && rdx != 0 {
        return Err(Exception::gp(0));
    }
    if write {
        core.set_protection_keys(rax, core.cpu.pkrs);
    } else {
        core.cpu.gpr[gpr::RAX] = core.cpu.pkru.into();
        core.cpu.gpr[gpr::RDX] = 0;
    }
    Ok(())
}

/// INVLPG. A non-canonical address has no translation to drop.
pub(super) fn invlpg(core: &mut Core, instruction: &Instruction) -> Result<(), Exception> {
    require_cpl0(core)?;
    let offset = core.effective_address(instruction);
    let number = segment_index(instruction.memory_segment());
    let long = core.cpu.mode() == Mode::Long64;
    let mut address = offset;
    if !long || number >= index::FS {
        address = address.wrapping_add(core.cpu.seg[number].base);
    }
    if !long {
        address &= 0xffff_ffff;
    }
    if is_canonical(address) {
        core.invalidate_page(address);
    }
    Ok(())
}

/// INVPCID (SDM vol. 2A).
pub(super) fn invpcid(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    if !has(core, 7, |r| r.ebx, 10) {
        return Err(Exception::ud());
    }
    require_cpl0(core)?;
    let kind = core.register(instruction.op0_register());
    let at = core.memory_operand(instruction, 16, false)?;
    let mut data = [0; 16];
    core.read(io, at, &mut data, Rights::Current)?;
    let pcid = u64::from_le_bytes(data[..8].try_into().unwrap());
    let address = u64::from_le_bytes(data[8..].try_into().unwrap());
    let pcide = core.cpu.cr4 & cr4::PCIDE != 0;
    let bad = match kind {
        0 => pcid > 0xfff || !is_canonical(address) || !pcide && pcid != 0,
        1 => pcid > 0xfff || !pcide && pcid != 0,
        2 | 3 => false,
        _ => true,
    };
    if bad {
        return Err(Exception::gp(0));
    }
    let current = pcid == if pcide { core.cpu.cr3 & 0xfff } else { 0 };
    match kind {
        0 if current => core.invalidate_page(address),
        1 if current => core.flush_current(),
        0 | 1 => core.invalidate_pcid(pcid as u16),
        2 => core.flush_all(),
        _ => core.flush_non_global(),
    }
    Ok(())
}

/// INVD, WBINVD and WBNOINVD: caches are coherent here.
pub(super) fn cache_control(core: &mut Core) -> Result<(), Exception> {
    require_cpl0(core)
}

/// RDFSBASE, RDGSBASE, WRFSBASE and WRGSBASE.
pub(super) fn segment_base(core: &mut Core, instruction: &Instruction) -> Result<(), Exception> {
    if core.cpu.mode() != Mode::Long64 || core.cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(Exception::ud());
    }
    let register = instruction.op0_register();
    let (number, write) = match instruction.mnemonic() {
        Mnemonic::Rdfsbase => (index::FS, false),
        Mnemonic::Rdgsbase => (index::GS, false),
        Mnemonic::Wrfsbase => (index::FS, true),
        _ => (index::GS, true),
    };
    if !write {
        let base = core.cpu.seg[number].base;
        core.set_register(register, base);
        return Ok(());
    }
    let value = core.register(register);
    if !is_canonical(value) {
        return Err(Exception::gp(0));
    }
    core.cpu.seg[number].base = value;
    Ok(())
}
