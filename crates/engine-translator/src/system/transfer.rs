//! Far control transfers (SDM vol. 3A 5.8): JMP, CALL and RET far, call gates, and IRET.

use super::deliver::{Registers, tss_stack, tss_stack_long};
use super::descriptor::{
    Descriptor, accessed, code, fetch_or, fetch_upper, is_null, is_real_or_vm86, null_stack_segment, stack_segment,
    system_type, vm86_segment,
};
use super::operand::{Stack, is_canonical, mask};
use super::task;
use crate::core::Core;
use crate::cpu::{Mode, pending};
use crate::mmu::Rights;
use crate::vendor;
use anyvisor_engine::GuestIo;
use anyvisor_x86::bits::{gpr, rflags};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{Exception, Segment};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use std::sync::atomic::Ordering;

/// What a far JMP or CALL asks for.
#[derive(Clone, Copy)]
struct FarBranch {
    selector: u16,
    offset: u64,
    /// Operand size in bytes.
    size: u32,
    call: bool,
}

/// A far pointer operand: immediate, or in memory.
fn far_pointer(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(u16, u64, u32), Exception> {
    match instruction.op0_kind() {
        OpKind::FarBranch16 => Ok((instruction.far_branch_selector(), u64::from(instruction.far_branch16()), 2)),
        OpKind::FarBranch32 => Ok((instruction.far_branch_selector(), u64::from(instruction.far_branch32()), 4)),
        _ => {
            let size = match instruction.code() {
                Code::Jmp_m1616 | Code::Call_m1616 => 2,
                Code::Jmp_m1632 | Code::Call_m1632 => 4,
                _ => 8,
            };
            let width = vendor::far_offset_size(size);
            let address = core.memory_operand(instruction, u64::from(width) + 2, false)?;
            let mut data = [0; 10];
            core.read(io, address, &mut data[..width as usize + 2], Rights::Current)?;
            let selector = u16::from_le_bytes([data[width as usize], data[width as usize + 1]]);
            let offset = u64::from_le_bytes(data[..8].try_into().unwrap()) & mask(width);
            Ok((selector, offset, size))
        }
    }
}

/// Far JMP and CALL.
pub(super) fn far_branch(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let (selector, offset, size) = far_pointer(core, io, instruction)?;
    let branch = FarBranch { selector, offset, size, call: instruction.mnemonic() == Mnemonic::Call };
    let saved = Registers::save(&core.cpu);
    let result =
        if is_real_or_vm86(core) { far_branch_real(core, io, branch) } else { far_branch_protected(core, io, branch) };
    if result.is_err() {
        saved.restore(&mut core.cpu);
    }
    result
}

fn push_return(core: &mut Core, io: &dyn GuestIo, size: u32) -> Result<Stack, Exception> {
    let mut stack = Stack::current(core);
    let (cs, rip) = (u64::from(core.cpu.seg[index::CS].selector), core.cpu.rip);
    stack.push(core, io, cs, size)?;
    stack.push(core, io, rip, size)?;
    Ok(stack)
}

/// Loads CS in real-address or virtual-8086 mode.
fn set_real_cs(core: &mut Core, selector: u16) {
    if core.cpu.is_vm86() {
        core.cpu.seg[index::CS] = vm86_segment(selector);
    } else {
        core.cpu.seg[index::CS].selector = selector;
        core.cpu.seg[index::CS].base = u64::from(selector) << 4;
    }
}

fn far_branch_real(core: &mut Core, io: &dyn GuestIo, branch: FarBranch) -> Result<(), Exception> {
    let FarBranch { selector, offset, size, call } = branch;
    if offset > u64::from(core.cpu.seg[index::CS].limit) {
        return Err(Exception::gp(0));
    }
    if call {
        push_return(core, io, size)?.commit(core);
    }
    set_real_cs(core, selector);
    core.cpu.rip = offset;
    Ok(())
}

/// Checks an instruction pointer against the code segment it is for.
fn check_target(core: &Core, segment: &Segment, offset: u64) -> Result<(), Exception> {
    let ok = if core.cpu.is_long_mode() && segment.is_long() {
        is_canonical(offset)
    } else {
        offset <= u64::from(segment.limit)
    };
    if ok { Ok(()) } else { Err(Exception::gp(0)) }
}

fn far_branch_protected(core: &mut Core, io: &dyn GuestIo, branch: FarBranch) -> Result<(), Exception> {
    let FarBranch { selector, offset, size, call } = branch;
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let fault = Exception::gp(code(selector));
    let found = fetch_or(core, io, selector, fault)?;
    if found.is_system() {
        return far_branch_system(core, io, found, call);
    }
    let cpl = core.cpu.cpl;
    let wrong_privilege =
        if found.is_conforming() { found.dpl() > cpl } else { found.dpl() != cpl || (selector & 3) as u8 > cpl };
    let wrong_size = core.cpu.is_long_mode() && found.is_long() && found.is_default_32();
    if !found.is_code() || wrong_privilege || wrong_size {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(Exception::np(code(selector)));
    }
    let mut segment = accessed(core, io, found)?;
    check_target(core, &segment, offset)?;
    segment.selector = selector & 0xfffc | u16::from(cpl);
    if call {
        push_return(core, io, size)?.commit(core);
    }
    core.cpu.seg[index::CS] = segment;
    core.cpu.rip = offset;
    Ok(())
}

/// JMP or CALL to a call gate, a task gate or a TSS.
fn far_branch_system(core: &mut Core, io: &dyn GuestIo, gate: Descriptor, call: bool) -> Result<(), Exception> {
    let fault = Exception::gp(gate.code());
    let long = core.cpu.is_long_mode();
    let reason = if call { task::Reason::Call } else { task::Reason::Jump };
    let privileged = gate.dpl() < core.cpu.cpl || gate.dpl() < (gate.selector & 3) as u8;
    match gate.kind() {
        system_type::CALL_GATE => {}
        system_type::CALL_GATE_16 if !long => {}
        system_type::TASK_GATE | system_type::TSS | system_type::TSS_16 if !long => {
            if privileged {
                return Err(fault);
            }
            return if gate.kind() == system_type::TASK_GATE {
                if !gate.is_present() {
                    return Err(Exception::np(gate.code()));
                }
                task::through_gate(core, io, gate.raw, reason, None, 0)
            } else {
                task::switch(core, io, gate.selector, reason, None, 0)
            };
        }
        _ => return Err(fault),
    }
    if privileged {
        return Err(fault);
    }
    if !gate.is_present() {
        return Err(Exception::np(gate.code()));
    }
    call_gate(core, io, gate, call)
}

fn call_gate(core: &mut Core, io: &dyn GuestIo, gate: Descriptor, call: bool) -> Result<(), Exception> {
    let long = core.cpu.is_long_mode();
    let selector = (gate.raw >> 16) as u16;
    let mut offset = gate.raw & 0xffff;
    if gate.kind() == system_type::CALL_GATE {
        offset |= gate.raw >> 32 & 0xffff_0000;
    }
    if long {
        offset |= fetch_upper(core, io, &gate)? << 32;
    }
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let fault = Exception::gp(code(selector));
    let target = fetch_or(core, io, selector, fault)?;
    let cpl = core.cpu.cpl;
    // JMP may not change the privilege level.
    let jump_to_inner = !call && !target.is_conforming() && target.dpl() != cpl;
    let wrong_size = long && (!target.is_long() || target.is_default_32());
    if !target.is_code() || target.dpl() > cpl || jump_to_inner || wrong_size {
        return Err(fault);
    }
    if !target.is_present() {
        return Err(Exception::np(code(selector)));
    }
    let mut segment = accessed(core, io, target)?;
    check_target(core, &segment, offset)?;
    let size = if long {
        8
    } else if gate.kind() == system_type::CALL_GATE {
        4
    } else {
        2
    };
    let new_cpl = if target.is_conforming() { cpl } else { target.dpl() };
    if !call {
        segment.selector = selector & 0xfffc | u16::from(cpl);
    } else {
        segment.selector = selector & 0xfffc | u16::from(new_cpl);
        if new_cpl < cpl {
            call_inner(core, io, new_cpl, size, (gate.raw >> 32) as u32 & 0x1f)?;
        } else {
            push_return(core, io, size)?.commit(core);
        }
    }
    core.cpu.seg[index::CS] = segment;
    core.cpu.rip = offset;
    Ok(())
}

/// Switches to the stack of `new_cpl`, and pushes SS, RSP, the parameters, CS and RIP there.
fn call_inner(core: &mut Core, io: &dyn GuestIo, new_cpl: u8, size: u32, parameters: u32) -> Result<(), Exception> {
    let old = Stack::current(core);
    let (old_ss, old_rsp) = (core.cpu.seg[index::SS].selector, core.cpu.gpr[gpr::RSP]);
    let (cs, rip) = (core.cpu.seg[index::CS].selector, core.cpu.rip);
    let (ss, mut stack, parameters) = if core.cpu.is_long_mode() {
        let rsp = tss_stack_long(core, io, 4 + 8 * u64::from(new_cpl), 0)?;
        (null_stack_segment(u16::from(new_cpl), new_cpl), Stack::long(rsp, 0), 0)
    } else {
        let (segment, pointer) = tss_stack(core, io, new_cpl, 0)?;
        (segment, Stack::in_segment(segment, pointer, code(segment.selector)), parameters)
    };
    let mut copied = Vec::with_capacity(parameters as usize);
    for n in (0..parameters).rev() {
        copied.push(old.peek(core, io, u64::from(n * size), size)?);
    }
    core.cpu.cpl = new_cpl;
    stack.push(core, io, u64::from(old_ss), size)?;
    stack.push(core, io, old_rsp, size)?;
    for value in copied {
        stack.push(core, io, value, size)?;
    }
    stack.push(core, io, u64::from(cs), size)?;
    stack.push(core, io, rip, size)?;
    core.cpu.seg[index::SS] = ss;
    stack.commit(core);
    Ok(())
}

/// The operand size in bytes of RETF, IRET and their like.
fn return_size(instruction: &Instruction) -> u32 {
    match instruction.code() {
        Code::Retfw | Code::Retfw_imm16 | Code::Iretw => 2,
        Code::Retfq | Code::Retfq_imm16 | Code::Iretq => 8,
        _ => 4,
    }
}

/// Far RET, with the number of parameter bytes it drops.
pub(super) fn far_return(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let size = return_size(instruction);
    let drop = if instruction.op_count() > 0 { u64::from(instruction.immediate16()) } else { 0 };
    let saved = Registers::save(&core.cpu);
    let result = far_return_checked(core, io, size, drop);
    if result.is_err() {
        saved.restore(&mut core.cpu);
    }
    result
}

fn far_return_checked(core: &mut Core, io: &dyn GuestIo, size: u32, drop: u64) -> Result<(), Exception> {
    let mut stack = Stack::current(core);
    let rip = stack.pop(core, io, size)?;
    let selector = stack.pop(core, io, size)? as u16;
    if is_real_or_vm86(core) {
        if rip > u64::from(core.cpu.seg[index::CS].limit) {
            return Err(Exception::gp(0));
        }
        set_real_cs(core, selector);
        stack.skip(drop);
        stack.commit(core);
        core.cpu.rip = rip;
        return Ok(());
    }
    let (segment, rpl) = return_segment(core, io, selector)?;
    check_target(core, &segment, rip)?;
    stack.skip(drop);
    if rpl > core.cpu.cpl {
        let rsp = stack.pop(core, io, size)?;
        let ss = stack.pop(core, io, size)? as u16;
        let ss = return_stack_segment(core, io, ss, rpl, &segment)?;
        enter_outer(core, segment, ss, rpl);
        let mut outer = Stack::current(core);
        outer.pointer = rsp;
        outer.skip(drop);
        outer.commit(core);
    } else {
        stack.commit(core);
        core.cpu.seg[index::CS] = segment;
    }
    core.cpu.rip = rip;
    Ok(())
}

/// Checks the code segment that RET or IRET returns to; its RPL is the new privilege level.
fn return_segment(core: &mut Core, io: &dyn GuestIo, selector: u16) -> Result<(Segment, u8), Exception> {
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let fault = Exception::gp(code(selector));
    let found = fetch_or(core, io, selector, fault)?;
    let rpl = (selector & 3) as u8;
    let wrong_privilege = if found.is_conforming() { found.dpl() > rpl } else { found.dpl() != rpl };
    let wrong_size = core.cpu.is_long_mode() && found.is_long() && found.is_default_32();
    if !found.is_code() || rpl < core.cpu.cpl || wrong_privilege || wrong_size {
        return Err(fault);
    }
    if !found.is_present() {
        return Err(Exception::np(code(selector)));
    }
    Ok((accessed(core, io, found)?, rpl))
}

/// Checks the stack segment that a return to `cpl` and code segment `cs` pops.
fn return_stack_segment(
    core: &mut Core,
    io: &dyn GuestIo,
    selector: u16,
    cpl: u8,
    cs: &Segment,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        let allowed = core.cpu.is_long_mode() && cs.is_long() && cpl != 3 && (selector & 3) as u8 == cpl;
        return if allowed { Ok(null_stack_segment(selector, cpl)) } else { Err(Exception::gp(0)) };
    }
    stack_segment(core, io, selector, cpl, vector::GP, 0)
}

/// Loads CS and SS of an outer privilege level, and drops data segments it may not use (SDM 5.8.6).
fn enter_outer(core: &mut Core, cs: Segment, ss: Segment, cpl: u8) {
    core.cpu.seg[index::CS] = cs;
    core.cpu.seg[index::SS] = ss;
    core.cpu.cpl = cpl;
    for number in [index::ES, index::DS, index::FS, index::GS] {
        let segment = &mut core.cpu.seg[number];
        let conforming = attr::CODE | attr::EXPAND_DOWN;
        let exempt = segment.attributes & attr::S != 0 && segment.attributes & conforming == conforming;
        if segment.dpl() < cpl && !exempt && segment.is_usable() {
            // The bases of FS and GS stay: in 64-bit mode they do not come from the descriptor.
            let base = segment.base;
            *segment = Segment::unusable(0);
            segment.base = base;
        } else if !segment.is_usable() {
            segment.selector = 0;
        }
    }
}

/// IRET, IRETD and IRETQ (SDM vol. 2A). `size` is the operand size in bytes.
///
/// # Errors
/// The exception it raises; the registers are as before.
pub fn iret(core: &mut Core, io: &dyn GuestIo, size: u32) -> Result<(), Exception> {
    let saved = Registers::save(&core.cpu);
    let result = if is_real_or_vm86(core) {
        iret_real(core, io, size)
    } else if core.cpu.rflags & rflags::NT != 0 {
        if core.cpu.is_long_mode() { Err(Exception::gp(0)) } else { task::return_to_previous(core, io) }
    } else {
        iret_protected(core, io, size)
    };
    if result.is_err() {
        saved.restore(&mut core.cpu);
        return result;
    }
    core.cpu.nmi_blocked = false;
    if core.cpu.irq_waiting != 0 {
        core.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
    }
    Ok(())
}

pub(super) fn iret_instruction(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    iret(core, io, return_size(instruction))
}

fn iret_real(core: &mut Core, io: &dyn GuestIo, size: u32) -> Result<(), Exception> {
    let vm86 = core.cpu.is_vm86();
    if vm86 && core.cpu.rflags & rflags::IOPL != rflags::IOPL {
        return Err(Exception::gp(0));
    }
    let mut stack = Stack::current(core);
    let rip = stack.pop(core, io, size)?;
    let selector = stack.pop(core, io, size)? as u16;
    let flags = stack.pop(core, io, size)?;
    if rip > u64::from(core.cpu.seg[index::CS].limit) {
        return Err(Exception::gp(0));
    }
    stack.commit(core);
    set_real_cs(core, selector);
    core.cpu.rip = rip;
    let mut writable = rflags::WRITABLE & mask(size);
    if vm86 {
        writable &= !rflags::IOPL;
    }
    core.cpu.rflags = core.cpu.rflags & !writable | flags & writable | rflags::FIXED;
    Ok(())
}

fn iret_protected(core: &mut Core, io: &dyn GuestIo, size: u32) -> Result<(), Exception> {
    let long64 = core.cpu.mode() == Mode::Long64;
    let mut stack = Stack::current(core);
    let rip = stack.pop(core, io, size)?;
    let selector = stack.pop(core, io, size)? as u16;
    let flags = stack.pop(core, io, size)?;
    let old_cpl = core.cpu.cpl;
    if flags & rflags::VM != 0 && size == 4 && old_cpl == 0 && !core.cpu.is_long_mode() {
        return iret_to_vm86(core, io, stack, rip, selector, flags);
    }
    let (segment, rpl) = return_segment(core, io, selector)?;
    check_target(core, &segment, rip)?;
    if long64 || rpl > old_cpl {
        let rsp = stack.pop(core, io, size)?;
        let ss = stack.pop(core, io, size)? as u16;
        let ss = return_stack_segment(core, io, ss, rpl, &segment)?;
        if rpl > old_cpl {
            enter_outer(core, segment, ss, rpl);
        } else {
            core.cpu.seg[index::CS] = segment;
            core.cpu.seg[index::SS] = ss;
        }
        let mut outer = Stack::current(core);
        outer.pointer = rsp;
        outer.commit(core);
    } else {
        stack.commit(core);
        core.cpu.seg[index::CS] = segment;
    }
    core.cpu.rip = rip;
    let mut writable = (rflags::WRITABLE & !(rflags::IF | rflags::IOPL)) & mask(size);
    if u64::from(old_cpl) <= (core.cpu.rflags & rflags::IOPL) >> rflags::IOPL_SHIFT {
        writable |= rflags::IF;
    }
    if old_cpl == 0 {
        writable |= rflags::IOPL;
    }
    core.cpu.rflags = core.cpu.rflags & !writable | flags & writable | rflags::FIXED;
    Ok(())
}

/// SDM vol. 3A 20.2.5.
fn iret_to_vm86(
    core: &mut Core,
    io: &dyn GuestIo,
    mut stack: Stack,
    rip: u64,
    cs: u16,
    flags: u64,
) -> Result<(), Exception> {
    let rsp = stack.pop(core, io, 4)?;
    let mut selectors = [0; 5];
    for selector in &mut selectors {
        *selector = stack.pop(core, io, 4)? as u16;
    }
    if rip > 0xffff {
        return Err(Exception::gp(0));
    }
    let order = [index::SS, index::ES, index::DS, index::FS, index::GS];
    for (number, selector) in order.into_iter().zip(selectors) {
        core.cpu.seg[number] = vm86_segment(selector);
    }
    core.cpu.seg[index::CS] = vm86_segment(cs);
    core.cpu.rip = rip;
    core.cpu.gpr[gpr::RSP] = rsp;
    core.cpu.cpl = 3;
    let writable = rflags::WRITABLE | rflags::VM;
    core.cpu.rflags = core.cpu.rflags & !writable | flags & writable | rflags::FIXED;
    Ok(())
}
