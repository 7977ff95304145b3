//! The privileged and flag instructions that kernels execute most, each a small function of its own: the
//! translator calls them directly. All expect RIP to be the next instruction's already.

use super::descriptor::require_cpl0;
use super::operand::{Stack, is_canonical, mask};
use crate::core::Core;
use crate::cpu::{Mode, pending};
use anyvisor_engine::GuestIo;
use anyvisor_x86::bits::{cr4, efer, gpr, rflags};
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{Exception, Segment};
use std::sync::atomic::Ordering;

/// A flat segment as SYSCALL and SYSENTER load them, without looking at the GDT.
fn flat_segment(selector: u16, dpl: u8, kind: u32, size: u32) -> Segment {
    let dpl_bits = u32::from(dpl) << attr::DPL_SHIFT;
    Segment { base: 0, limit: !0, attributes: kind | attr::S | dpl_bits | attr::P | attr::G | size, selector }
}

const CODE_TYPE: u32 = attr::CODE | attr::WRITABLE | attr::ACCESSED;
const DATA_TYPE: u32 = attr::WRITABLE | attr::ACCESSED;

fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    flat_segment(selector, dpl, CODE_TYPE, if long { attr::L } else { attr::DB })
}

fn flat_stack(selector: u16, dpl: u8) -> Segment {
    flat_segment(selector, dpl, DATA_TYPE, attr::DB)
}

/// Makes a pending interrupt be looked at again, because IF has just been set.
fn window_opened(core: &mut Core) {
    if core.cpu.irq_waiting != 0 {
        core.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
    }
}

/// SYSCALL.
///
/// # Errors
/// #UD where it is disabled or not available.
pub fn syscall(core: &mut Core) -> Result<(), Exception> {
    let cpu = &mut core.cpu;
    let long = cpu.mode() == Mode::Long64;
    if cpu.efer & efer::SCE == 0 || !cpu.is_protected() {
        return Err(Exception::ud());
    }
    // AMD's have it outside 64-bit mode too.
    if !long && !core.is_amd() {
        return Err(Exception::ud());
    }
    let cpu = &mut core.cpu;
    let selector = (cpu.star >> 32) as u16 & 0xfffc;
    cpu.gpr[gpr::RCX] = cpu.rip;
    if cpu.is_long_mode() {
        cpu.gpr[gpr::R11] = cpu.rflags & !rflags::RF;
        cpu.rip = if long { cpu.lstar } else { cpu.cstar };
        cpu.rflags = cpu.rflags & !(cpu.sfmask | rflags::RF) | rflags::FIXED;
        cpu.seg[index::CS] = flat_code(selector, 0, true);
    } else {
        cpu.rip = cpu.star & 0xffff_ffff;
        cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        cpu.seg[index::CS] = flat_code(selector, 0, false);
    }
    cpu.seg[index::SS] = flat_stack(selector.wrapping_add(8), 0);
    cpu.cpl = 0;
    Ok(())
}

/// SYSRET; `wide` with REX.W, to 64-bit mode.
///
/// # Errors
/// #UD where it is disabled or not available, #GP(0) above CPL 0 or for a non-canonical RCX.
pub fn sysret(core: &mut Core, wide: bool) -> Result<(), Exception> {
    let mode = core.cpu.mode();
    if core.cpu.efer & efer::SCE == 0 || !core.cpu.is_protected() || (mode != Mode::Long64 && !core.is_amd()) {
        return Err(Exception::ud());
    }
    require_cpl0(core)?;
    // AMD's find out when they are there.
    let checked = !core.is_amd();
    let cpu = &mut core.cpu;
    let selector = (cpu.star >> 48) as u16;
    let target = cpu.gpr[gpr::RCX];
    if wide {
        if checked && !is_canonical(target) {
            return Err(Exception::gp(0));
        }
        cpu.seg[index::CS] = flat_code(selector.wrapping_add(16) | 3, 3, true);
        cpu.rip = target;
    } else {
        cpu.seg[index::CS] = flat_code(selector | 3, 3, false);
        cpu.rip = target & 0xffff_ffff;
    }
    if mode == Mode::Long64 {
        let restored = rflags::WRITABLE & !rflags::RF;
        cpu.rflags = cpu.gpr[gpr::R11] & restored | rflags::FIXED;
    } else {
        cpu.rflags |= rflags::IF;
    }
    cpu.seg[index::SS] = flat_stack(selector.wrapping_add(8) | 3, 3);
    cpu.cpl = 3;
    if cpu.rflags & rflags::IF != 0 {
        window_opened(core);
    }
    Ok(())
}

/// SYSENTER.
///
/// # Errors
/// #GP(0) in real mode or without a code segment in IA32_SYSENTER_CS.
pub fn sysenter(core: &mut Core) -> Result<(), Exception> {
    let cpu = &mut core.cpu;
    let selector = cpu.sysenter_cs as u16 & 0xfffc;
    if !cpu.is_protected() || selector == 0 {
        return Err(Exception::gp(0));
    }
    let long = cpu.is_long_mode();
    let width = if long { !0 } else { 0xffff_ffff };
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.seg[index::CS] = flat_code(selector, 0, long);
    cpu.seg[index::SS] = flat_stack(selector.wrapping_add(8), 0);
    cpu.cpl = 0;
    cpu.rip = cpu.sysenter_eip & width;
    cpu.gpr[gpr::RSP] = cpu.sysenter_esp & width;
    Ok(())
}

/// SYSEXIT; `wide` with REX.W, to 64-bit mode.
///
/// # Errors
/// #GP(0) in real mode, above CPL 0, without a code segment, or for non-canonical targets.
pub fn sysexit(core: &mut Core, wide: bool) -> Result<(), Exception> {
    let cpu = &mut core.cpu;
    let selector = cpu.sysenter_cs as u16;
    if !cpu.is_protected() || cpu.cpl != 0 || selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let (rip, rsp) = (cpu.gpr[gpr::RDX], cpu.gpr[gpr::RCX]);
    if wide && !(is_canonical(rip) && is_canonical(rsp)) {
        return Err(Exception::gp(0));
    }
    let (offset, width) = if wide { (32, !0) } else { (16, 0xffff_ffff) };
    cpu.seg[index::CS] = flat_code(selector.wrapping_add(offset) | 3, 3, wide);
    cpu.seg[index::SS] = flat_stack(selector.wrapping_add(offset + 8) | 3, 3);
    cpu.cpl = 3;
    cpu.rip = rip & width;
    cpu.gpr[gpr::RSP] = rsp & width;
    Ok(())
}

/// SWAPGS.
///
/// # Errors
/// #UD outside 64-bit mode, #GP(0) above CPL 0.
pub fn swapgs(core: &mut Core) -> Result<(), Exception> {
    if core.cpu.mode() != Mode::Long64 {
        return Err(Exception::ud());
    }
    require_cpl0(core)?;
    let cpu = &mut *core.cpu;
    std::mem::swap(&mut cpu.kernel_gs_base, &mut cpu.seg[index::GS].base);
    Ok(())
}

fn iopl(core: &Core) -> u8 {
    ((core.cpu.rflags & rflags::IOPL) >> rflags::IOPL_SHIFT) as u8
}

/// Whether CLI, STI and (in virtual-8086 mode) PUSHF, POPF, INT n and IRET are allowed. VME and PVI do not exist here.
pub(super) fn require_iopl(core: &Core) -> Result<(), Exception> {
    if core.cpu.cpl > iopl(core) { Err(Exception::gp(0)) } else { Ok(()) }
}

/// CLI.
///
/// # Errors
/// #GP(0) above IOPL.
pub fn cli(core: &mut Core) -> Result<(), Exception> {
    require_iopl(core)?;
    core.cpu.rflags &= !rflags::IF;
    Ok(())
}

/// STI: the next instruction is still safe from interrupts if they were off.
///
/// # Errors
/// #GP(0) above IOPL.
pub fn sti(core: &mut Core) -> Result<(), Exception> {
    require_iopl(core)?;
    if core.cpu.rflags & rflags::IF == 0 {
        core.cpu.rflags |= rflags::IF;
        core.cpu.interrupt_shadow |= 1;
        window_opened(core);
    }
    Ok(())
}

/// RFLAGS as PUSHF shows them.
pub fn visible_flags(core: &Core) -> u64 {
    core.cpu.rflags & !(rflags::VM | rflags::RF)
}

/// Loads RFLAGS as POPF of `size` bytes does at the current privilege level.
pub fn load_flags(core: &mut Core, value: u64, size: u32) {
    let cpl = core.cpu.cpl;
    let mut writable = (rflags::WRITABLE & !(rflags::IF | rflags::IOPL | rflags::RF)) & mask(size);
    if cpl <= iopl(core) {
        writable |= rflags::IF;
    }
    if cpl == 0 {
        writable |= rflags::IOPL;
    }
    core.cpu.rflags = (core.cpu.rflags & !writable | value & writable) & !rflags::RF | rflags::FIXED;
    if core.cpu.rflags & rflags::IF != 0 {
        window_opened(core);
    }
}

/// PUSHF, PUSHFD, PUSHFQ.
///
/// # Errors
/// #GP(0) in virtual-8086 mode below IOPL 3, or what the push raises.
pub fn pushf(core: &mut Core, io: &dyn GuestIo, size: u32) -> Result<(), Exception> {
    if core.cpu.is_vm86() {
        require_iopl(core)?;
    }
    let mut stack = Stack::current(core);
    let flags = visible_flags(core);
    stack.push(core, io, flags, size)?;
    stack.commit(core);
    Ok(())
}

/// POPF, POPFD, POPFQ.
///
/// # Errors
/// #GP(0) in virtual-8086 mode below IOPL 3, or what the pop raises.
pub fn popf(core: &mut Core, io: &dyn GuestIo, size: u32) -> Result<(), Exception> {
    if core.cpu.is_vm86() {
        require_iopl(core)?;
    }
    let mut stack = Stack::current(core);
    let value = stack.pop(core, io, size)?;
    stack.commit(core);
    load_flags(core, value, size);
    Ok(())
}

/// STAC and CLAC.
///
/// # Errors
/// #UD without SMAP or above CPL 0.
pub fn set_ac(core: &mut Core, on: bool) -> Result<(), Exception> {
    let smap = core.cpu.cr4 & cr4::SMAP != 0 || core.cpuid(7, 0).ebx >> 20 & 1 != 0;
    if !smap || core.cpu.cpl != 0 {
        return Err(Exception::ud());
    }
    core.cpu.rflags = core.cpu.rflags & !rflags::AC | if on { rflags::AC } else { 0 };
    Ok(())
}
