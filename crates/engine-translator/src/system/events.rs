//! What happens between instructions: messages, the APIC timer, NMIs and interrupts, INIT and start-up.

use super::{Step, deliver_interrupt};
use crate::core::{Core, Message};
use crate::cpu::pending;
use anyvisor_engine::GuestIo;
use anyvisor_x86::bits::{cr0, dr, gpr, rflags, xcr0};
use anyvisor_x86::exception::vector;
use anyvisor_x86::lapic::{Delivery, base};
use anyvisor_x86::msi::DeliveryMode;
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{DescriptorTable, Segment};
use std::sync::atomic::Ordering;

/// Acts, at an instruction boundary, on everything that has arrived since the last time: takes messages,
/// ticks the APIC timer, delivers one NMI or interrupt if it is accepted, and ends a halt.
///
/// Afterwards [`Cpu::irq_waiting`](crate::cpu::Cpu::irq_waiting) says whether something still waits, and
/// [`pending::EVENT`] is set if the next boundary must look again.
pub fn poll_events(core: &mut Core, io: &dyn GuestIo) -> Step {
    core.cpu.pending.fetch_and(!pending::EVENT, Ordering::SeqCst);
    take_messages(core);
    let now = core.now();
    core.lapic.tick(now);
    if core.cpu.wait_for_sipi {
        core.cpu.irq_waiting = 0;
        return Step::Done;
    }
    let step = deliver_one(core, io);
    if core.cpu.halted && std::mem::take(&mut core.woken) {
        core.cpu.halted = false;
    }
    let waiting = core.nmis_pending > 0 || core.lapic.highest_pending().is_some() || extint_waits(core);
    core.cpu.irq_waiting = u32::from(waiting);
    if waiting && (core.cpu.interrupt_shadow != 0 || nmi_accepted(core) || interrupts_accepted(core)) {
        core.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
    }
    step
}

fn nmi_accepted(core: &Core) -> bool {
    core.nmis_pending > 0 && !core.cpu.nmi_blocked && core.cpu.interrupt_shadow == 0
}

fn interrupts_accepted(core: &Core) -> bool {
    core.cpu.rflags & rflags::IF != 0
        && core.cpu.interrupt_shadow == 0
        && (core.lapic.highest_pending().is_some() || extint_waits(core))
}

/// Whether the 8259 pair interrupts this vCPU: it is wired to LINT0 of the bootstrap processor.
fn extint_waits(core: &Core) -> bool {
    core.shared.id == 0 && core.vm.pic_intr.load(Ordering::SeqCst) && core.lapic.accepts_extint()
}

fn deliver_one(core: &mut Core, io: &dyn GuestIo) -> Step {
    if nmi_accepted(core) {
        core.nmis_pending -= 1;
        core.cpu.nmi_blocked = true;
        core.cpu.halted = false;
        return deliver_interrupt(core, io, vector::NMI);
    }
    if !interrupts_accepted(core) {
        return Step::Done;
    }
    let from_pic = if extint_waits(core) { io.acknowledge_pic() } else { None };
    match from_pic.or_else(|| core.lapic.acknowledge()) {
        Some(vector) => {
            core.cpu.halted = false;
            deliver_interrupt(core, io, vector)
        }
        None => Step::Done,
    }
}

/// Takes what other threads have sent to the vCPU's APIC.
pub fn take_messages(core: &mut Core) {
    let messages = std::mem::take(&mut *core.shared.inbox.lock().unwrap());
    for message in messages {
        match message {
            Message::Interrupt { vector, level } => {
                // What is not accepted is the guest's own loss.
                let _ = core.lapic.deliver(DeliveryMode::Fixed, vector, level);
            }
            Message::Nmi => {
                if core.lapic.deliver(DeliveryMode::Nmi, 0, false) == Delivery::Nmi {
                    let most = if core.cpu.nmi_blocked { 1 } else { 2 };
                    core.nmis_pending = (core.nmis_pending + 1).min(most);
                }
            }
            Message::Init => init(core),
            Message::Sipi(page) => start_up(core, page),
            Message::Wake => core.woken = true,
        }
    }
}

/// INIT (SDM vol. 3A table 9-1): as RESET, but the caches, the FPU, the TSC and the MSRs stay.
fn init(core: &mut Core) {
    core.lapic.init();
    core.shared.set_address(core.lapic.address());
    let cpu = &mut core.cpu;
    let data = Segment::real_mode(0, false);
    let mut code = Segment::real_mode(0xf000, true);
    code.base = 0xffff_0000;
    cpu.seg = [data, code, data, data, data, data];
    cpu.ldtr = Segment { limit: 0xffff, attributes: attr::P | 2, ..Segment::default() };
    cpu.tr = Segment { limit: 0xffff, attributes: attr::P | 0xb, ..Segment::default() };
    cpu.gdtr = DescriptorTable { base: 0, limit: 0xffff };
    cpu.idtr = cpu.gdtr;
    cpu.gpr = [0; 16];
    cpu.cr0 = cr0::ET | cpu.cr0 & (cr0::CD | cr0::NW);
    (cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer) = (0, 0, 0, 0);
    cpu.xcr0 = xcr0::X87;
    cpu.dr = [0; 8];
    cpu.dr[6] = dr::DR6_FIXED;
    cpu.dr[7] = dr::DR7_FIXED;
    cpu.rip = 0xfff0;
    cpu.rflags = rflags::FIXED;
    cpu.cpl = 0;
    cpu.interrupt_shadow = 0;
    cpu.nmi_blocked = false;
    cpu.halted = false;
    // The bootstrap processor starts at once, the others wait (SDM 8.4.2).
    cpu.wait_for_sipi = core.lapic.base() & base::BSP == 0;
    let signature = core.cpuid(1, 0).eax;
    core.cpu.gpr[gpr::RDX] = u64::from(signature);
    core.nmis_pending = 0;
    core.woken = false;
    core.flush_all();
}

/// A start-up IPI: real mode at `page << 12`. Only a processor that waits for one takes it.
fn start_up(core: &mut Core, page: u8) {
    if !core.cpu.wait_for_sipi {
        return;
    }
    core.cpu.wait_for_sipi = false;
    core.cpu.seg[index::CS] = Segment::real_mode(u16::from(page) << 8, true);
    core.cpu.rip = 0;
    core.flush_all();
}
