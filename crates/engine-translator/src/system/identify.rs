//! Instructions that tell a guest about its processor and the time: CPUID, RDTSC, RDTSCP, RDPID, RDPMC.

use crate::core::Core;
use anyvisor_x86::bits::{cr0, cr4, gpr, xcr0};
use anyvisor_x86::lapic::base;
use anyvisor_x86::state::{PKRU_OFFSET, PKRU_SIZE};
use anyvisor_x86::{CpuidResult, Exception};
use iced_x86::Instruction;

const OSXSAVE: u32 = 1 << 27;
const APIC: u32 = 1 << 9;
const OSPKE: u32 = 1 << 4;

/// What CPUID returns now: the table, with the bits that follow the processor's state.
pub fn cpuid_now(core: &Core, leaf: u32, subleaf: u32) -> CpuidResult {
    let mut result = core.cpuid(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            if core.cpu.cr4 & cr4::OSXSAVE != 0 {
                result.ecx |= OSXSAVE;
            } else {
                result.ecx &= !OSXSAVE;
            }
            if core.lapic.base() & base::EN == 0 {
                result.edx &= !APIC;
            }
        }
        (7, 0) if core.cpu.cr4 & cr4::PKE != 0 => result.ecx |= OSPKE,
        // The standard format: legacy area and header, then AVX and PKRU at fixed places (SDM vol. 1 13.4).
        (0xd, 0) if result.ebx != 0 => {
            result.ebx = match core.cpu.xcr0 {
                xcr0 if xcr0 & xcr0::PKRU != 0 => (PKRU_OFFSET + PKRU_SIZE) as u32,
                xcr0 if xcr0 & xcr0::AVX != 0 => 832,
                _ => 576,
            };
        }
        _ => {}
    }
    result
}

/// CPUID.
pub(super) fn cpuid(core: &mut Core) {
    let result = cpuid_now(core, core.cpu.gpr[gpr::RAX] as u32, core.cpu.gpr[gpr::RCX] as u32);
    for (register, value) in
        [(gpr::RAX, result.eax), (gpr::RBX, result.ebx), (gpr::RCX, result.ecx), (gpr::RDX, result.edx)]
    {
        core.cpu.gpr[register] = u64::from(value);
    }
}

fn require_tsc(core: &Core) -> Result<(), Exception> {
    if core.cpu.cr4 & cr4::TSD != 0 && core.cpu.cr0 & cr0::PE != 0 && core.cpu.cpl > 0 {
        return Err(Exception::gp(0));
    }
    Ok(())
}

/// RDTSC.
pub(super) fn rdtsc(core: &mut Core) -> Result<(), Exception> {
    require_tsc(core)?;
    let tsc = core.tsc();
    core.cpu.gpr[gpr::RAX] = tsc & 0xffff_ffff;
    core.cpu.gpr[gpr::RDX] = tsc >> 32;
    Ok(())
}

/// RDTSCP.
pub(super) fn rdtscp(core: &mut Core) -> Result<(), Exception> {
    if core.cpuid(0x8000_0001, 0).edx >> 27 & 1 == 0 {
        return Err(Exception::ud());
    }
    rdtsc(core)?;
    core.cpu.gpr[gpr::RCX] = core.cpu.tsc_aux;
    Ok(())
}

/// RDPID.
pub(super) fn rdpid(core: &mut Core, instruction: &Instruction) -> Result<(), Exception> {
    if core.cpuid(7, 0).ecx >> 22 & 1 == 0 {
        return Err(Exception::ud());
    }
    let aux = core.cpu.tsc_aux;
    core.set_register(instruction.op0_register(), aux);
    Ok(())
}
