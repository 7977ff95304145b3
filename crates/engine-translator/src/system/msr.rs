//! RDMSR and WRMSR, and the same by number for saving and restoring a vCPU.
//!
//! An MSR exists when CPUID says so, or when every processor of this kind has it; all others raise #GP(0).
//! MTRRs: the type registers are described as absent (MTRRCAP 0) and the default type is write-back,
//! because memory types have no effect here; a kernel that finds MTRRs disabled would not use the PAT.

use super::clock;
use super::descriptor::require_cpl0;
use super::operand::is_canonical;
use super::steal_time;
use crate::core::Core;
use crate::cpu::pending;
use anyvisor_engine::GuestIo;
use anyvisor_x86::bits::{cr0, efer, gpr};
use anyvisor_x86::cpuid::{self, Feature};
use anyvisor_x86::segment::index;
use anyvisor_x86::{Exception, msr};
use std::sync::atomic::Ordering;

/// MTRRs enabled, default type write-back.
pub const MTRR_DEFAULT: u64 = 0x806;
/// Fast strings on; branch trace and precise event sampling unavailable.
pub const MISC_ENABLE_DEFAULT: u64 = 0x1801;
/// The PAT after reset (SDM vol. 3A 11.12.4).
pub const PAT_DEFAULT: u64 = 0x0007_0406_0007_0406;

const IA32_PLATFORM_ID: u32 = 0x17;
const EBL_CR_POWERON: u32 = 0x2a;
const PLATFORM_INFO: u32 = 0xce;
/// Bits of IA32_SPEC_CTRL: IBRS, STIBP, SSBD, BHI_DIS_S.
const SPEC_CTRL_DEFINED: u64 = 7 | 1 << 10;
/// AMD's model-specific range, in which kernels poke without looking.
const AMD_RANGE: std::ops::RangeInclusive<u32> = 0xc001_0000..=0xc001_1fff;

/// RDMSR.
pub(super) fn rdmsr(core: &mut Core) -> Result<(), Exception> {
    require_cpl0(core)?;
    let number = core.cpu.gpr[gpr::RCX] as u32;
    let value = read(core, number).inspect_err(|_| tracing::debug!("rdmsr {number:#x}: #GP"))?;
    core.cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    core.cpu.gpr[gpr::RDX] = value >> 32;
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(core: &mut Core, io: &dyn GuestIo) -> Result<(), Exception> {
    require_cpl0(core)?;
    let number = core.cpu.gpr[gpr::RCX] as u32;
    let value = core.cpu.gpr[gpr::RAX] & 0xffff_ffff | core.cpu.gpr[gpr::RDX] << 32;
    write(core, io, number, value).inspect_err(|_| tracing::debug!("wrmsr {number:#x} {value:#x}: #GP"))
}

/// #GP(0) unless the vCPU's CPUID shows `feature`.
fn require(core: &Core, feature: &Feature) -> Result<(), Exception> {
    if core.cpuid.has(feature) { Ok(()) } else { Err(Exception::gp(0)) }
}

/// The paravirtual MSRs exist if the KVM leaf lists bit `bit` (Linux Documentation/virt/kvm/x86/cpuid.rst).
fn require_kvm(core: &Core, bit: u32) -> Result<(), Exception> {
    if core.cpuid(0x4000_0001, 0).eax >> bit & 1 != 0 { Ok(()) } else { Err(Exception::gp(0)) }
}

/// The value of an MSR.
///
/// # Errors
/// #GP(0) if there is none of that number.
pub fn read(core: &mut Core, number: u32) -> Result<u64, Exception> {
    let cpu = &core.cpu;
    Ok(match number {
        msr::IA32_TSC => core.tsc(),
        msr::IA32_TSC_ADJUST => cpu.tsc_adjust,
        msr::IA32_APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            return core.lapic_read_msr(number);
        }
        IA32_PLATFORM_ID | EBL_CR_POWERON | PLATFORM_INFO => 0,
        msr::IA32_FEATURE_CONTROL => 1,
        msr::IA32_BIOS_SIGN_ID => 0x1_0000_0000,
        msr::IA32_SPEC_CTRL => {
            require(core, &cpuid::SPEC_CTRL)?;
            core.cpu.spec_ctrl
        }
        msr::IA32_PKRS => {
            require(core, &cpuid::PKS)?;
            core.cpu.pkrs.into()
        }
        msr::IA32_ARCH_CAPABILITIES => {
            require(core, &cpuid::ARCH_CAPABILITIES_PRESENT)?;
            cpuid::ARCH_CAPABILITIES
        }
        msr::MTRRCAP => 0,
        msr::MTRR_DEF_TYPE => cpu.mtrr_def_type,
        msr::MCG_CAP | msr::MCG_STATUS | msr::DEBUGCTL => 0,
        msr::IA32_MISC_ENABLE => cpu.misc_enable,
        msr::IA32_PAT => cpu.pat,
        msr::SYSENTER_CS => cpu.sysenter_cs,
        msr::SYSENTER_ESP => cpu.sysenter_esp,
        msr::SYSENTER_EIP => cpu.sysenter_eip,
        msr::EFER => cpu.efer,
        msr::STAR => cpu.star,
        msr::LSTAR => cpu.lstar,
        msr::CSTAR => cpu.cstar,
        msr::SFMASK => cpu.sfmask,
        msr::FS_BASE => cpu.seg[index::FS].base,
        msr::GS_BASE => cpu.seg[index::GS].base,
        msr::KERNEL_GS_BASE => cpu.kernel_gs_base,
        msr::TSC_AUX => cpu.tsc_aux,
        msr::KVM_WALL_CLOCK_NEW => {
            require_kvm(core, 3)?;
            core.clock.wall_clock_msr
        }
        msr::KVM_SYSTEM_TIME_NEW => {
            require_kvm(core, 3)?;
            core.clock.system_time_msr
        }
        msr::KVM_STEAL_TIME => {
            require_kvm(core, 5)?;
            core.steal_time.msr
        }
        number if AMD_RANGE.contains(&number) && core.is_amd() => 0,
        _ => return Err(Exception::gp(0)),
    })
}

fn canonical(value: u64) -> Result<u64, Exception> {
    if is_canonical(value) { Ok(value) } else { Err(Exception::gp(0)) }
}

/// `value` if it has no bits but `defined` ones.
fn within(value: u64, defined: u64) -> Result<u64, Exception> {
    if value & !defined == 0 { Ok(value) } else { Err(Exception::gp(0)) }
}

/// Writes an MSR.
///
/// # Errors
/// #GP(0) if there is none of that number, or for a value it cannot take.
pub fn write(core: &mut Core, io: &dyn GuestIo, number: u32, value: u64) -> Result<(), Exception> {
    match number {
        msr::IA32_TSC => {
            let delta = value.wrapping_sub(core.tsc());
            core.cpu.tsc_adjust = core.cpu.tsc_adjust.wrapping_add(delta);
            shift_tsc(core, io, delta);
        }
        msr::IA32_TSC_ADJUST => {
            let delta = value.wrapping_sub(core.cpu.tsc_adjust);
            core.cpu.tsc_adjust = value;
            shift_tsc(core, io, delta);
        }
        msr::IA32_APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            return core.lapic_write_msr(io, number, value);
        }
        msr::IA32_BIOS_SIGN_ID => {}
        msr::IA32_SPEC_CTRL => {
            require(core, &cpuid::SPEC_CTRL)?;
            core.cpu.spec_ctrl = within(value, SPEC_CTRL_DEFINED)?;
        }
        msr::IA32_PKRS => {
            require(core, &cpuid::PKS)?;
            let value = within(value, u32::MAX.into())?;
            core.set_protection_keys(core.cpu.pkru, value as u32);
        }
        msr::IA32_PRED_CMD => {
            require(core, &cpuid::SPEC_CTRL)?;
            within(value, 1)?;
        }
        msr::MTRR_DEF_TYPE => {
            within(value, 0xcff)?;
            memory_type(value as u8, false)?;
            core.cpu.mtrr_def_type = value;
        }
        msr::MCG_STATUS => within(value, 0).map(drop)?,
        // Branch records and branch stepping do not exist; asking for them has no effect.
        msr::DEBUGCTL => within(value, 3).map(drop)?,
        msr::IA32_MISC_ENABLE => core.cpu.misc_enable = value & !0x1800 | MISC_ENABLE_DEFAULT & 0x1800,
        msr::IA32_PAT => {
            value.to_le_bytes().into_iter().try_for_each(|byte| memory_type(byte, true))?;
            core.cpu.pat = value;
        }
        msr::SYSENTER_CS => core.cpu.sysenter_cs = value & 0xffff_ffff,
        msr::SYSENTER_ESP => core.cpu.sysenter_esp = canonical(value)?,
        msr::SYSENTER_EIP => core.cpu.sysenter_eip = canonical(value)?,
        msr::EFER => write_efer(core, value)?,
        msr::STAR => core.cpu.star = value,
        msr::LSTAR => core.cpu.lstar = canonical(value)?,
        msr::CSTAR => core.cpu.cstar = canonical(value)?,
        msr::SFMASK => core.cpu.sfmask = within(value, 0xffff_ffff)?,
        msr::FS_BASE => core.cpu.seg[index::FS].base = canonical(value)?,
        msr::GS_BASE => core.cpu.seg[index::GS].base = canonical(value)?,
        msr::KERNEL_GS_BASE => core.cpu.kernel_gs_base = canonical(value)?,
        msr::TSC_AUX => core.cpu.tsc_aux = within(value, 0xffff_ffff)?,
        msr::KVM_WALL_CLOCK_NEW => {
            require_kvm(core, 3)?;
            clock::set_wall_clock(core, io, value);
        }
        msr::KVM_SYSTEM_TIME_NEW => {
            require_kvm(core, 3)?;
            clock::set_system_time(core, io, value);
        }
        msr::KVM_STEAL_TIME => {
            require_kvm(core, 5)?;
            within(value, !steal_time::RESERVED)?;
            steal_time::set(core, io, value);
        }
        number if AMD_RANGE.contains(&number) && core.is_amd() => {}
        _ => return Err(Exception::gp(0)),
    }
    Ok(())
}

/// Moves the guest's TSC by `delta`; whatever counts by it is set anew.
fn shift_tsc(core: &mut Core, io: &dyn GuestIo, delta: u64) {
    core.cpu.tsc_offset = core.cpu.tsc_offset.wrapping_add(delta);
    if core.clock.system_time_msr & 1 != 0 {
        clock::set_system_time(core, io, core.clock.system_time_msr);
    }
    core.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
}

/// #GP(0) for an encoding that is no memory type (SDM vol. 3A table 11-8; UC- in the PAT only).
fn memory_type(value: u8, pat: bool) -> Result<(), Exception> {
    if matches!(value, 0 | 1 | 4 | 5 | 6) || pat && value == 7 { Ok(()) } else { Err(Exception::gp(0)) }
}

fn write_efer(core: &mut Core, value: u64) -> Result<(), Exception> {
    within(value, efer::SCE | efer::LME | efer::LMA | efer::NXE)?;
    let old = core.cpu.efer;
    if (old ^ value) & efer::LME != 0 && core.cpu.cr0 & cr0::PG != 0 {
        return Err(Exception::gp(0));
    }
    core.cpu.efer = value & !efer::LMA | old & efer::LMA;
    if (old ^ value) & efer::NXE != 0 {
        core.flush_all();
    }
    Ok(())
}
