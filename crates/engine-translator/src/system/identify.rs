//! Instructions that tell a guest about its processor and the time: CPUID, RDTSC, RDTSCP, RDPID, RDPMC; and
//! KVM's hypercalls.

use super::descriptor::require_cpl0;
use crate::core::Core;
use crate::cpu::Mode;
use anyvisor_x86::bits::{cr0, cr4, gpr, xcr0};
use anyvisor_x86::lapic::{Destination, Message, base};
use anyvisor_x86::msi::DeliveryMode;
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

/// VMCALL and VMMCALL as KVM's hypercalls (Linux Documentation/virt/kvm/x86/hypercalls.rst): the number in RAX,
/// arguments in RBX, RCX, RDX and RSI; those that are not here are answered as unknown.
pub(super) fn hypercall(core: &mut Core) {
    const KVM_ENOSYS: i64 = -1000;
    const KVM_EPERM: i64 = -1;
    const SEND_IPI: u64 = 10;
    let wide = core.cpu.mode() == Mode::Long64;
    let argument = |register: usize| {
        let value = core.cpu.gpr[register];
        if wide { value } else { value & 0xffff_ffff }
    };
    let arguments = [gpr::RBX, gpr::RCX, gpr::RDX, gpr::RSI].map(argument);
    let result = match argument(gpr::RAX) {
        _ if require_cpl0(core).is_err() => KVM_EPERM,
        SEND_IPI => send_ipi(core, arguments, if wide { 64 } else { 32 }),
        _ => KVM_ENOSYS,
    };
    core.cpu.gpr[gpr::RAX] = if wide { result as u64 } else { u64::from(result as u32) };
}

/// KVM_HC_SEND_IPI: sends one interrupt to many processors, by two words of `bits` bits each, of which the first
/// bit stands for the APIC ID in the third argument; the fourth is as ICR's low half. Returns how many there were.
fn send_ipi(core: &Core, [low, high, first, icr]: [u64; 4], bits: u32) -> i64 {
    const KVM_EINVAL: i64 = -22;
    /// The shorthand and the logical destination mode, which a bitmap leaves no room for.
    const ADDRESSING: u64 = 3 << 18 | 1 << 11;
    const LEVEL_TRIGGERED: u64 = 1 << 15;
    let mode = match icr >> 8 & 7 {
        0 => DeliveryMode::Fixed,
        4 => DeliveryMode::Nmi,
        _ => return KVM_EINVAL,
    };
    if icr & ADDRESSING != 0 {
        return KVM_EINVAL;
    }
    let (vector, level) = (icr as u8, icr & LEVEL_TRIGGERED != 0);
    let known: Vec<u32> = core.vm.vcpus.read().unwrap().iter().map(|vcpu| vcpu.id).collect();
    let wanted = |id: u32| {
        let bit = u64::from(id).checked_sub(first)?;
        let (word, bit) = (bit / u64::from(bits), bit % u64::from(bits));
        [low, high].get(word as usize).map(|map| map >> bit & 1 != 0)
    };
    let receivers = known.into_iter().filter(|id| wanted(*id) == Some(true));
    receivers.fold(0, |count, id| {
        let destination = Destination::Physical(id);
        core.vm.route(&Message { mode, vector, level, destination, exclude_self: false }, Some(core.shared.id));
        count + 1
    })
}
