//! Delivery of exceptions and interrupts (SDM vol. 3A chapter 6): through the interrupt vector table of real
//! mode, the gates of protected mode, and those of long mode.
//!
//! Delivery either completes or leaves the processor's registers as they were and returns the exception it
//! met; [`deliver_exception`] turns that into a double or triple fault by the rules of SDM 6.15.

use super::Step;
use super::descriptor::{self, Descriptor, accessed, code, fetch_or, is_null, null_stack_segment, system_type};
use super::operand::{Stack, is_canonical, read_uint};
use super::task;
use crate::core::Core;
use crate::cpu::Cpu;
use crate::mmu::Rights;
use anyvisor_engine::GuestIo;
use anyvisor_engine::tally::event;
use anyvisor_x86::bits::{dr, gpr, rflags};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::index;
use anyvisor_x86::{Exception, Segment};

/// Where an event comes from: it decides on privilege checks, the EXT bit and RF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// An exception that an instruction raised.
    Exception,
    /// An interrupt from outside, or an NMI.
    External,
    /// INT n, INT3 or INTO: the gate's DPL is checked.
    Software,
    /// INT1: an exception as the gate sees it, a software interrupt as RIP goes.
    PrivilegedSoftware,
}

/// One event on its way to its handler.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub vector: u8,
    pub error_code: Option<u32>,
    pub source: Source,
}

impl Event {
    /// The EXT bit of error codes met during delivery (SDM 6.13).
    fn ext(&self) -> u32 {
        u32::from(self.source != Source::Software)
    }

    /// An error code that names this event's gate.
    fn idt_code(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext()
    }

    /// RFLAGS as pushed: faults push RF set, so that their instruction restarts without debug faults (SDM
    /// vol. 3B 18.3.1.1).
    fn pushed_flags(&self, cpu: &Cpu) -> u64 {
        let trap = matches!(self.vector, vector::DB | vector::BP | vector::OF | vector::DF);
        if self.source == Source::Exception && !trap { cpu.rflags | rflags::RF } else { cpu.rflags }
    }
}

/// The registers that a delivery or a far transfer changes, to put back if it fails half-way.
pub(super) struct Registers {
    rip: u64,
    rsp: u64,
    rflags: u64,
    cpl: u8,
    seg: [Segment; 6],
}

impl Registers {
    pub fn save(cpu: &Cpu) -> Registers {
        Registers { rip: cpu.rip, rsp: cpu.gpr[gpr::RSP], rflags: cpu.rflags, cpl: cpu.cpl, seg: cpu.seg }
    }

    pub fn restore(self, cpu: &mut Cpu) {
        cpu.rip = self.rip;
        cpu.gpr[gpr::RSP] = self.rsp;
        cpu.rflags = self.rflags;
        cpu.cpl = self.cpl;
        cpu.seg = self.seg;
    }
}

/// Delivers an exception raised by the instruction at RIP (a fault) or before RIP (a trap).
///
/// A second exception met on the way is delivered instead, or becomes a double fault; the third is a triple
/// fault (SDM vol. 3A 6.15, table 6-5).
pub fn deliver_exception(core: &mut Core, io: &dyn GuestIo, exception: Exception) -> Step {
    let began = core.meter.start();
    let step = raise(core, io, exception);
    core.meter.stop(began, event::EXCEPTION);
    core.met = Some(event::EXCEPTION);
    step
}

fn raise(core: &mut Core, io: &dyn GuestIo, exception: Exception) -> Step {
    let mut current = exception;
    loop {
        set_payload(core, &current);
        let event = Event { vector: current.vector, error_code: current.error_code, source: Source::Exception };
        let Err(second) = deliver(core, io, event) else { return Step::Done };
        if second.vector == vector::PF {
            // Also where the second fault becomes a double fault.
            core.cpu.cr2 = second.payload;
        }
        let Some(next) = combine(&current, second) else { return Step::Shutdown };
        current = next;
    }
}

/// Delivers an external interrupt, or an NMI (vector 2). The caller has checked that it is accepted.
pub fn deliver_interrupt(core: &mut Core, io: &dyn GuestIo, vector: u8) -> Step {
    core.met = Some(event::INTERRUPT);
    match deliver(core, io, Event { vector, error_code: None, source: Source::External }) {
        Ok(()) => Step::Done,
        Err(exception) => deliver_exception(core, io, exception),
    }
}

/// What `first`, whose delivery raised `second`, comes to; `None` is a triple fault.
fn combine(first: &Exception, second: Exception) -> Option<Exception> {
    let contributory = Exception::is_contributory(second.vector);
    let double = match first.vector {
        vector::DF => return None,
        vector::PF => contributory || second.vector == vector::PF,
        v if Exception::is_contributory(v) => contributory,
        _ => false,
    };
    Some(if double { Exception::with_code(vector::DF, 0) } else { second })
}

/// CR2 of a page fault, DR6 and DR7.GD of a debug exception.
fn set_payload(core: &mut Core, exception: &Exception) {
    match exception.vector {
        vector::PF => core.cpu.cr2 = exception.payload,
        vector::DB => {
            core.cpu.dr[6] = core.cpu.dr[6] & !0xf | exception.payload;
            core.cpu.dr[7] &= !dr::DR7_GD;
        }
        _ => {}
    }
}

/// Delivers one event.
///
/// # Errors
/// The exception that delivery raises; the registers are as before.
pub(super) fn deliver(core: &mut Core, io: &dyn GuestIo, event: Event) -> Result<(), Exception> {
    let saved = Registers::save(&core.cpu);
    let result = if !core.cpu.is_protected() {
        deliver_real(core, io, event)
    } else if core.cpu.is_long_mode() {
        deliver_long(core, io, event)
    } else {
        deliver_protected(core, io, event)
    };
    match result {
        // Whatever is delivered ends a halt: HLT's own single step, too.
        Ok(()) => core.cpu.halted = false,
        Err(_) => saved.restore(&mut core.cpu),
    }
    result
}

/// SDM vol. 3A 20.1.4.
fn deliver_real(core: &mut Core, io: &dyn GuestIo, event: Event) -> Result<(), Exception> {
    let entry = u64::from(event.vector) * 4;
    if entry + 3 > u64::from(core.cpu.idtr.limit) {
        return Err(Exception::gp(event.idt_code()));
    }
    let address = core.cpu.idtr.base.wrapping_add(entry) & 0xffff_ffff;
    let target = read_uint(core, io, address, 4, Rights::Implicit)?;
    let mut stack = Stack::current(core);
    for value in [core.cpu.rflags, u64::from(core.cpu.seg[index::CS].selector), core.cpu.rip] {
        stack.push(core, io, value, 2)?;
    }
    stack.commit(core);
    core.cpu.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    let selector = (target >> 16) as u16;
    core.cpu.seg[index::CS].selector = selector;
    core.cpu.seg[index::CS].base = u64::from(selector) << 4;
    core.cpu.rip = target & 0xffff;
    Ok(())
}

/// A gate of the IDT.
struct Gate {
    selector: u16,
    offset: u64,
    /// 6 and 7: 16 bits; Eh and Fh: 32 or 64 bits; the odd ones leave IF alone.
    kind: u32,
    ist: u8,
}

/// Reads and checks the gate of `event`; `size` is 8 bytes, or 16 in long mode.
fn read_gate(core: &mut Core, io: &dyn GuestIo, event: Event, size: u64) -> Result<(Gate, u64), Exception> {
    let entry = u64::from(event.vector) * size;
    if entry + size - 1 > u64::from(core.cpu.idtr.limit) {
        return Err(Exception::gp(event.idt_code()));
    }
    let width = if size == 16 { !0 } else { 0xffff_ffff };
    let address = core.cpu.idtr.base.wrapping_add(entry) & width;
    let raw = read_uint(core, io, address, 8, Rights::Implicit)?;
    let upper = if size == 16 { read_uint(core, io, address.wrapping_add(8), 8, Rights::Implicit)? } else { 0 };
    // Bit 4 of the type byte is S, which gates have clear.
    let kind = (raw >> 40) as u32 & 0x1f;
    let valid = match kind {
        0xe | 0xf => true,
        5..=7 => size == 8,
        _ => false,
    };
    if !valid {
        return Err(Exception::gp(event.idt_code()));
    }
    let dpl = (raw >> 45) as u8 & 3;
    if event.source == Source::Software && dpl < core.cpu.cpl {
        return Err(Exception::gp(event.idt_code()));
    }
    if raw >> 47 & 1 == 0 {
        return Err(Exception::np(event.idt_code()));
    }
    let mut offset = raw & 0xffff;
    if kind >= 0xe {
        offset |= raw >> 32 & 0xffff_0000 | upper << 32;
    }
    Ok((Gate { selector: (raw >> 16) as u16, offset, kind, ist: (raw >> 32) as u8 & 7 }, raw))
}

/// Checks the code segment that a gate leads to: code, of at least the privilege of the interrupted program.
fn handler_segment(core: &mut Core, io: &dyn GuestIo, selector: u16, ext: u32) -> Result<Descriptor, Exception> {
    if is_null(selector) {
        return Err(Exception::gp(ext));
    }
    let fault = Exception::gp(code(selector) | ext);
    let found = fetch_or(core, io, selector, fault)?;
    if !found.is_code() || found.dpl() > core.cpu.cpl {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(Exception::np(code(selector) | ext));
    }
    Ok(found)
}

/// The flags that a gate clears; interrupt gates (even types) clear IF too.
fn enter_gate_flags(core: &mut Core, kind: u32) {
    core.cpu.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if kind & 1 == 0 {
        core.cpu.rflags &= !rflags::IF;
    }
}

/// SDM vol. 3A 6.14.
fn deliver_long(core: &mut Core, io: &dyn GuestIo, event: Event) -> Result<(), Exception> {
    let ext = event.ext();
    let (gate, _) = read_gate(core, io, event, 16)?;
    let found = handler_segment(core, io, gate.selector, ext)?;
    if !found.is_long() || found.is_default_32() {
        return Err(Exception::gp(found.code() | ext));
    }
    let old_cpl = core.cpu.cpl;
    let new_cpl = if found.is_conforming() { old_cpl } else { found.dpl() };
    let rsp = if gate.ist != 0 {
        tss_stack_long(core, io, 0x24 + 8 * u64::from(gate.ist - 1), ext)?
    } else if new_cpl < old_cpl {
        tss_stack_long(core, io, 4 + 8 * u64::from(new_cpl), ext)?
    } else {
        core.cpu.gpr[gpr::RSP]
    };
    if !is_canonical(gate.offset) {
        return Err(Exception::gp(ext));
    }
    let frame = [
        u64::from(core.cpu.seg[index::SS].selector),
        core.cpu.gpr[gpr::RSP],
        event.pushed_flags(&core.cpu),
        u64::from(core.cpu.seg[index::CS].selector),
        core.cpu.rip,
    ];
    let mut segment = accessed(core, io, found)?;
    core.cpu.cpl = new_cpl;
    let mut stack = Stack::long(rsp & !15, ext);
    for value in frame.into_iter().chain(event.error_code.map(u64::from)) {
        stack.push(core, io, value, 8)?;
    }
    segment.selector = gate.selector & 0xfffc | u16::from(new_cpl);
    core.cpu.seg[index::CS] = segment;
    if new_cpl != old_cpl {
        core.cpu.seg[index::SS] = null_stack_segment(u16::from(new_cpl), new_cpl);
    }
    stack.commit(core);
    enter_gate_flags(core, gate.kind);
    core.cpu.rip = gate.offset;
    Ok(())
}

/// A stack pointer of the 64-bit TSS at `offset` (SDM figure 7-11).
pub(super) fn tss_stack_long(core: &mut Core, io: &dyn GuestIo, offset: u64, ext: u32) -> Result<u64, Exception> {
    let tr = core.cpu.tr;
    if offset + 7 > u64::from(tr.limit) || !tr.is_usable() {
        return Err(Exception::ts(code(tr.selector) | ext));
    }
    let rsp = read_uint(core, io, tr.base.wrapping_add(offset), 8, Rights::Implicit)?;
    if is_canonical(rsp) { Ok(rsp) } else { Err(Exception::ss(ext)) }
}

/// The stack that the TSS of protected mode names for privilege level `cpl`: its segment and pointer.
pub(super) fn tss_stack(core: &mut Core, io: &dyn GuestIo, cpl: u8, ext: u32) -> Result<(Segment, u64), Exception> {
    let tr = core.cpu.tr;
    let wide = tr.attributes & 0xf >= system_type::TSS;
    let (offset, size) = if wide { (4 + 8 * u64::from(cpl), 4) } else { (2 + 4 * u64::from(cpl), 2) };
    if offset + size + 1 > u64::from(tr.limit) || !tr.is_usable() {
        return Err(Exception::ts(code(tr.selector) | ext));
    }
    let address = tr.base.wrapping_add(offset);
    let pointer = read_uint(core, io, address & 0xffff_ffff, size as usize, Rights::Implicit)?;
    let selector = read_uint(core, io, address.wrapping_add(size) & 0xffff_ffff, 2, Rights::Implicit)? as u16;
    let segment = descriptor::stack_segment(core, io, selector, cpl, vector::TS, ext)?;
    Ok((segment, pointer))
}

/// SDM vol. 3A 6.12, and 20.3 for virtual-8086 mode.
fn deliver_protected(core: &mut Core, io: &dyn GuestIo, event: Event) -> Result<(), Exception> {
    let ext = event.ext();
    let (gate, raw) = read_gate(core, io, event, 8)?;
    if gate.kind == system_type::TASK_GATE {
        return task::through_gate(core, io, raw, task::Reason::Interrupt, event.error_code, ext);
    }
    let found = handler_segment(core, io, gate.selector, ext)?;
    let vm86 = core.cpu.is_vm86();
    let new_cpl = if found.is_conforming() { core.cpu.cpl } else { found.dpl() };
    if vm86 && new_cpl != 0 {
        return Err(Exception::gp(found.code() | ext));
    }
    if gate.offset > u64::from(found.segment().limit) {
        return Err(Exception::gp(ext));
    }
    let size = if gate.kind >= 0xe { 4 } else { 2 };
    let (cs, ss) = (core.cpu.seg[index::CS].selector, core.cpu.seg[index::SS].selector);
    let (old_rsp, flags, rip) = (core.cpu.gpr[gpr::RSP], event.pushed_flags(&core.cpu), core.cpu.rip);
    let inner = new_cpl < core.cpu.cpl;
    let mut segment = accessed(core, io, found)?;
    let mut stack = if inner {
        let (ss_segment, pointer) = tss_stack(core, io, new_cpl, ext)?;
        core.cpu.cpl = new_cpl;
        core.cpu.rflags &= !rflags::VM;
        let mut stack = Stack::in_segment(ss_segment, pointer, code(ss_segment.selector) | ext);
        if vm86 {
            for number in [index::GS, index::FS, index::DS, index::ES] {
                let selector = core.cpu.seg[number].selector;
                stack.push(core, io, u64::from(selector), size)?;
                core.cpu.seg[number] = Segment::unusable(0);
            }
        }
        stack.push(core, io, u64::from(ss), size)?;
        stack.push(core, io, old_rsp, size)?;
        core.cpu.seg[index::SS] = ss_segment;
        stack
    } else {
        let mut stack = Stack::current(core);
        stack.fault_code = ext;
        stack
    };
    let frame = [flags, u64::from(cs), rip];
    for value in frame.into_iter().chain(event.error_code.map(u64::from)) {
        stack.push(core, io, value, size)?;
    }
    stack.commit(core);
    segment.selector = gate.selector & 0xfffc | u16::from(new_cpl);
    core.cpu.seg[index::CS] = segment;
    enter_gate_flags(core, gate.kind);
    core.cpu.rip = gate.offset;
    Ok(())
}

/// INT n, INT3, INTO and INT1, whose RIP is already the next instruction's.
///
/// # Errors
/// What delivery raises: these are benign in the double-fault rules, so it is raised as it is.
pub(super) fn software_interrupt(
    core: &mut Core,
    io: &dyn GuestIo,
    vector: u8,
    source: Source,
) -> Result<(), Exception> {
    if source == Source::PrivilegedSoftware {
        core.cpu.dr[7] &= !dr::DR7_GD;
    }
    deliver(core, io, Event { vector, error_code: None, source })
}
