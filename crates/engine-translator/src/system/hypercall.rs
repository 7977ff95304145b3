//! KVM's hypercalls (Linux Documentation/virt/kvm/x86/hypercalls.rst).

use super::descriptor::require_cpl0;
use crate::core::{Core, Message};
use crate::cpu::Mode;
use crate::host;
use anyvisor_x86::bits::gpr;
use anyvisor_x86::lapic::{self, Destination};
use anyvisor_x86::msi::DeliveryMode;

/// VMCALL and VMMCALL: the number in RAX, arguments in RBX, RCX, RDX and RSI; those that are not here are answered as
/// unknown.
pub(super) fn execute(core: &mut Core) {
    const KVM_ENOSYS: i64 = -1000;
    const KVM_EPERM: i64 = -1;
    const KICK_CPU: u64 = 5;
    const SEND_IPI: u64 = 10;
    const SCHED_YIELD: u64 = 11;
    let wide = core.cpu.mode() == Mode::Long64;
    let argument = |register: usize| {
        let value = core.cpu.gpr[register];
        if wide { value } else { value & 0xffff_ffff }
    };
    let arguments = [gpr::RBX, gpr::RCX, gpr::RDX, gpr::RSI].map(argument);
    let result = match argument(gpr::RAX) {
        _ if require_cpl0(core).is_err() => KVM_EPERM,
        KICK_CPU => kick(core, arguments[1]),
        // Which of them runs next is the host's to say.
        SCHED_YIELD => {
            host::give_way();
            0
        }
        SEND_IPI => send_ipi(core, arguments, if wide { 64 } else { 32 }),
        _ => KVM_ENOSYS,
    };
    core.cpu.gpr[gpr::RAX] = if wide { result as u64 } else { u64::from(result as u32) };
}

/// KVM_HC_KICK_CPU: ends the halt, this one or the next, of the processor with an APIC ID, whatever it waits for. Spinlocks
/// halt with interrupts off.
fn kick(core: &Core, id: u64) -> i64 {
    let vcpus = core.vm.vcpus.read().unwrap();
    if let Some(vcpu) = vcpus.iter().find(|vcpu| u64::from(vcpu.id) == id) {
        vcpu.send(Message::Wake);
    }
    0
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
        core.vm.route(&lapic::Message { mode, vector, level, destination, exclude_self: false }, Some(core.shared.id));
        count + 1
    })
}
