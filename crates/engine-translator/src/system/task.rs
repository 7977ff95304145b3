//! Hardware task switches (SDM vol. 3A chapter 7), of protected mode only. Hardly any system uses them but
//! for a double-fault handler of 32-bit kernels, so this is written for clarity.

use super::Step;
use super::deliver_exception;
use super::descriptor::{
    self, Descriptor, accessed, code, fetch_or, is_null, ldt_segment, set_busy, stack_segment, system_type,
    vm86_segment,
};
use super::operand::{Stack, read_uint};
use crate::core::Core;
use crate::mmu::Rights;
use anyvisor_engine::GuestIo;
use anyvisor_x86::bits::{cr0, dr, rflags};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::index;
use anyvisor_x86::{Exception, Segment};

/// What causes the switch: it decides on busy bits, NT and the link field (SDM table 7-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Jump,
    Call,
    Interrupt,
    Return,
}

/// Where the fields of a TSS are: for 32 bits (SDM figure 7-2) and for 16 bits (figure 7-10).
struct Layout {
    word: usize,
    /// EIP, EFLAGS, EAX … EDI, ES … lie one after the other from here.
    state: u64,
    segments: usize,
    ldt: u64,
    /// Bytes between two selectors.
    selector_stride: u64,
    minimum_limit: u32,
}

const WIDE: Layout = Layout { word: 4, state: 0x20, segments: 6, ldt: 0x60, selector_stride: 4, minimum_limit: 0x67 };
const NARROW: Layout = Layout { word: 2, state: 0x0e, segments: 4, ldt: 0x2a, selector_stride: 2, minimum_limit: 0x2b };

fn layout(tss: &Segment) -> &'static Layout {
    if tss.attributes & 0xf >= system_type::TSS { &WIDE } else { &NARROW }
}

/// Switches through a task gate, whose descriptor is `gate`.
pub(super) fn through_gate(
    core: &mut Core,
    io: &dyn GuestIo,
    gate: u64,
    reason: Reason,
    error_code: Option<u32>,
    ext: u32,
) -> Result<(), Exception> {
    switch(core, io, (gate >> 16) as u16, reason, error_code, ext)
}

/// IRET with NT set: back to the task in the link field of the current TSS.
pub(super) fn return_to_previous(core: &mut Core, io: &dyn GuestIo) -> Result<(), Exception> {
    let selector = read_uint(core, io, core.cpu.tr.base, 2, Rights::Implicit)? as u16;
    switch(core, io, selector, Reason::Return, None, 0)
}

/// Switches to the task of `selector`.
///
/// # Errors
/// What is found wrong before the switch is committed. Later faults belong to the new task and are delivered
/// there.
pub(super) fn switch(
    core: &mut Core,
    io: &dyn GuestIo,
    selector: u16,
    reason: Reason,
    error_code: Option<u32>,
    ext: u32,
) -> Result<(), Exception> {
    let found = check_tss(core, io, selector, reason, ext)?;
    let mut tss = found.segment();
    save_state(core, io, reason)?;
    if matches!(reason, Reason::Jump | Reason::Return) {
        let old = fetch_or(core, io, core.cpu.tr.selector, Exception::ts(code(core.cpu.tr.selector)))?;
        set_busy(core, io, &old, false)?;
    }
    let nested = matches!(reason, Reason::Call | Reason::Interrupt);
    if nested {
        let link = core.cpu.tr.selector;
        core.write(io, tss.base, &link.to_le_bytes(), Rights::Implicit)?;
    }
    if reason != Reason::Return {
        set_busy(core, io, &found, true)?;
        tss.attributes |= 2;
    }
    let state = read_state(core, io, &tss)?;
    core.cpu.tr = tss;
    core.cpu.cr0 |= cr0::TS;
    match load_state(core, io, &tss, &state, nested, error_code) {
        Ok(()) => Ok(()),
        Err(exception) => match deliver_exception(core, io, exception) {
            Step::Done => Ok(()),
            Step::Shutdown => Err(Exception::with_code(vector::DF, 0)),
        },
    }
}

fn check_tss(
    core: &mut Core,
    io: &dyn GuestIo,
    selector: u16,
    reason: Reason,
    ext: u32,
) -> Result<Descriptor, Exception> {
    let wrong = if reason == Reason::Return { vector::TS } else { vector::GP };
    let fault = Exception::with_code(wrong, code(selector) | ext);
    if is_null(selector) || selector & 4 != 0 {
        return Err(fault);
    }
    let found = fetch_or(core, io, selector, fault)?;
    let kinds = match reason {
        Reason::Return => [system_type::TSS_BUSY, system_type::TSS_16_BUSY],
        _ => [system_type::TSS, system_type::TSS_16],
    };
    if !found.is_system() || !kinds.contains(&found.kind()) {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(Exception::np(code(selector) | ext));
    }
    let segment = found.segment();
    if segment.limit < layout(&segment).minimum_limit {
        return Err(Exception::ts(code(selector) | ext));
    }
    Ok(found)
}

/// Writes the current task's registers into its TSS.
fn save_state(core: &mut Core, io: &dyn GuestIo, reason: Reason) -> Result<(), Exception> {
    let tr = core.cpu.tr;
    if !tr.is_usable() || tr.base >> 32 != 0 {
        return Err(Exception::ts(code(tr.selector)));
    }
    let layout = layout(&tr);
    let mut flags = core.cpu.rflags;
    if reason == Reason::Return {
        flags &= !rflags::NT;
    }
    let mut values = vec![core.cpu.rip, flags];
    values.extend(&core.cpu.gpr[..8]);
    let mut image: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()[..layout.word].to_vec()).collect();
    for number in 0..layout.segments {
        let selector = u64::from(core.cpu.seg[number].selector);
        image.extend(&selector.to_le_bytes()[..layout.selector_stride as usize]);
    }
    core.write(io, tr.base + layout.state, &image, Rights::Implicit)
}

/// A task's registers as its TSS has them.
struct State {
    cr3: u64,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

fn read_state(core: &mut Core, io: &dyn GuestIo, tss: &Segment) -> Result<State, Exception> {
    let layout = layout(tss);
    let wide = layout.word == 4;
    let mut at = tss.base + layout.state;
    let mut words = [0; 10];
    for word in &mut words {
        *word = read_uint(core, io, at, layout.word, Rights::Implicit)?;
        at += layout.word as u64;
    }
    let mut gpr: [u64; 8] = words[2..10].try_into().unwrap();
    if !wide {
        // Upper halves that a 16-bit TSS has no room for: the manuals say nothing of them, test386.asm (POST 22)
        // knows that the 80386 fills them with ones, and Bochs does so too.
        gpr.iter_mut().for_each(|register| *register |= 0xffff_0000);
    }
    let mut selectors = [0; 6];
    for selector in &mut selectors[..layout.segments] {
        *selector = read_uint(core, io, at, 2, Rights::Implicit)? as u16;
        at += layout.selector_stride;
    }
    Ok(State {
        cr3: if wide { read_uint(core, io, tss.base + 0x1c, 4, Rights::Implicit)? } else { core.cpu.cr3 },
        rip: words[0],
        flags: words[1],
        gpr,
        selectors,
        ldt: read_uint(core, io, tss.base + layout.ldt, 2, Rights::Implicit)? as u16,
        trap: wide && read_uint(core, io, tss.base + 0x64, 2, Rights::Implicit)? & 1 != 0,
    })
}

/// Loads the new task's registers. Its selectors are all in place before the first descriptor is checked.
fn load_state(
    core: &mut Core,
    io: &dyn GuestIo,
    tss: &Segment,
    state: &State,
    nested: bool,
    error_code: Option<u32>,
) -> Result<(), Exception> {
    if core.cpu.cr0 & cr0::PG != 0 && core.cpu.cr3 != state.cr3 {
        core.cpu.cr3 = state.cr3;
        core.flush_non_global();
    }
    core.cpu.rip = state.rip;
    core.cpu.gpr[..8].copy_from_slice(&state.gpr);
    let writable = rflags::WRITABLE | rflags::VM;
    let nt = if nested { rflags::NT } else { 0 };
    core.cpu.rflags = state.flags & writable | nt | rflags::FIXED;
    for (segment, selector) in core.cpu.seg.iter_mut().zip(state.selectors) {
        *segment = Segment::unusable(selector);
    }
    core.cpu.ldtr = Segment::unusable(state.ldt);
    core.cpu.cpl = (state.selectors[index::CS] & 3) as u8;
    core.cpu.ldtr = ldt_segment(core, io, state.ldt, vector::TS)?;
    if core.cpu.is_vm86() {
        core.cpu.cpl = 3;
        for (segment, selector) in core.cpu.seg.iter_mut().zip(state.selectors) {
            *segment = vm86_segment(selector);
        }
    } else {
        load_segments(core, io, state)?;
    }
    if state.rip > u64::from(core.cpu.seg[index::CS].limit) {
        return Err(Exception::gp(0));
    }
    if let Some(value) = error_code {
        let mut stack = Stack::current(core);
        stack.push(core, io, u64::from(value), layout(tss).word as u32)?;
        stack.commit(core);
    }
    if state.trap { Err(Exception::db(dr::DR6_BT)) } else { Ok(()) }
}

fn load_segments(core: &mut Core, io: &dyn GuestIo, state: &State) -> Result<(), Exception> {
    let cpl = core.cpu.cpl;
    let selector = state.selectors[index::CS];
    let fault = Exception::ts(code(selector));
    if is_null(selector) {
        return Err(fault);
    }
    let found = fetch_or(core, io, selector, fault)?;
    let wrong_privilege = if found.is_conforming() { found.dpl() > cpl } else { found.dpl() != cpl };
    if !found.is_code() || wrong_privilege {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(Exception::np(code(selector)));
    }
    core.cpu.seg[index::CS] = accessed(core, io, found)?;
    let ss = state.selectors[index::SS];
    core.cpu.seg[index::SS] = stack_segment(core, io, ss, cpl, vector::TS, 0)?;
    for number in [index::ES, index::DS, index::FS, index::GS] {
        let segment = descriptor::data_segment(core, io, number, state.selectors[number]).map_err(|e| {
            // Wrong descriptors are #TS here, where a MOV would raise #GP (SDM table 7-1).
            if e.vector == vector::GP { Exception { vector: vector::TS, ..e } } else { e }
        })?;
        core.cpu.seg[number] = segment;
    }
    Ok(())
}
