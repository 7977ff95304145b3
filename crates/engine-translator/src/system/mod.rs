//! Sensitive instructions, exceptions and interrupts: all that a processor does beyond computing.
//!
//! The interpreter and the translator's helpers call [`execute`] for every instruction that reads or changes
//! privileged state (Popek and Goldberg's sensitive ones), [`deliver_exception`] when an instruction faults,
//! and [`poll_events`] between instructions. All work on the vCPU block, with the guest's registers written
//! back to it.
//!
//! Invariant: an instruction or a delivery that fails leaves the registers as they were. Checks come in the
//! manual's order, and nothing is committed before the last of them.

use crate::core::Core;
use crate::interpret;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::rflags;
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::index;
use iced_x86::{Instruction, Mnemonic, OpKind};

mod apic;
pub mod clock;
mod control;
mod deliver;
mod descriptor;
mod events;
pub mod fast;
mod hypercall;
mod identify;
mod io;
pub mod msr;
mod operand;
pub mod steal_time;
mod task;
#[cfg(test)]
mod tests;
mod transfer;

pub use control::write_cr0;
pub use deliver::{deliver_exception, deliver_interrupt};
pub use descriptor::load_segment;
pub use events::{poll_events, take_messages};
pub use identify::cpuid_now;
pub use operand::is_canonical;
pub use transfer::iret;

use deliver::{Source, software_interrupt};
use operand::{Stack, segment_index};

/// What a step of a vCPU came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Step {
    Done,
    /// A triple fault: the processor is shut down (SDM vol. 3A 6.15, interrupt 8).
    Shutdown,
}

/// Executes a system instruction. RIP has already been advanced to the next instruction; the caller
/// restores it when this returns an error. What is not known here raises #UD.
///
/// # Errors
/// The exception that the instruction raises; registers other than RIP are as before.
pub fn execute(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    use Mnemonic::*;
    match instruction.mnemonic() {
        In => io::input(core, io, instruction),
        Out => io::output(core, io, instruction),
        Insb | Insw | Insd | Outsb | Outsw | Outsd => io::string(core, io, instruction),
        Int | Int1 | Int3 | Into => interrupt(core, io, instruction),
        Iret | Iretd | Iretq => transfer::iret_instruction(core, io, instruction),
        Call | Jmp => transfer::far_branch(core, io, instruction),
        Retf => transfer::far_return(core, io, instruction),
        Syscall => fast::syscall(core),
        Sysret => fast::sysret(core, false),
        Sysretq => fast::sysret(core, true),
        Sysenter => fast::sysenter(core),
        Sysexit => fast::sysexit(core, false),
        Sysexitq => fast::sysexit(core, true),
        Swapgs => fast::swapgs(core),
        Cli => fast::cli(core),
        Sti => fast::sti(core),
        Clac => fast::set_ac(core, false),
        Stac => fast::set_ac(core, true),
        Pushf => fast::pushf(core, io, 2),
        Pushfd => fast::pushf(core, io, 4),
        Pushfq => fast::pushf(core, io, 8),
        Popf => fast::popf(core, io, 2),
        Popfd => fast::popf(core, io, 4),
        Popfq => fast::popf(core, io, 8),
        _ => execute_table(core, io, instruction),
    }
}

/// Segments and descriptor tables.
fn execute_table(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    use Mnemonic::*;
    match instruction.mnemonic() {
        Mov => mov(core, io, instruction),
        Push => push_segment(core, io, instruction),
        Pop => pop_segment(core, io, instruction),
        Lds | Les | Lfs | Lgs | Lss => descriptor::load_far_pointer(core, io, instruction),
        Lldt => descriptor::lldt(core, io, instruction),
        Ltr => descriptor::ltr(core, io, instruction),
        Sldt => {
            let selector = core.cpu.ldtr.selector;
            descriptor::store_selector(core, io, instruction, selector)
        }
        Str => {
            let selector = core.cpu.tr.selector;
            descriptor::store_selector(core, io, instruction, selector)
        }
        Sgdt => descriptor::store_table(core, io, instruction, core.cpu.gdtr),
        Sidt => descriptor::store_table(core, io, instruction, core.cpu.idtr),
        Lgdt => {
            core.cpu.gdtr = descriptor::load_table(core, io, instruction)?;
            Ok(())
        }
        Lidt => {
            core.cpu.idtr = descriptor::load_table(core, io, instruction)?;
            Ok(())
        }
        Lar | Lsl => descriptor::lar_lsl(core, io, instruction),
        Verr | Verw => descriptor::verify(core, io, instruction),
        Arpl => descriptor::arpl(core, io, instruction),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => control::segment_base(core, instruction),
        _ => execute_control(core, io, instruction),
    }
}

/// Control registers, MSRs, identification.
fn execute_control(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    use Mnemonic::*;
    match instruction.mnemonic() {
        Hlt => {
            descriptor::require_cpl0(core)?;
            core.cpu.halted = !std::mem::take(&mut core.woken);
            Ok(())
        }
        Clts => control::clts(core),
        Smsw => control::smsw(core, io, instruction),
        Lmsw => control::lmsw(core, io, instruction),
        Invlpg => control::invlpg(core, instruction),
        Invpcid => control::invpcid(core, io, instruction),
        Invd | Wbinvd | Wbnoinvd => control::cache_control(core),
        Xgetbv => control::xgetbv(core),
        Xsetbv => control::xsetbv(core),
        Rdpkru | Wrpkru => control::protection_keys(core, instruction),
        Rdmsr => msr::rdmsr(core),
        Wrmsr => msr::wrmsr(core, io),
        Cpuid => {
            identify::cpuid(core);
            Ok(())
        }
        Rdtsc => identify::rdtsc(core),
        Rdtscp => identify::rdtscp(core),
        Rdpid => identify::rdpid(core, instruction),
        // There are no performance counters to name.
        Rdpmc => Err(Exception::gp(0)),
        Vmcall | Vmmcall => {
            hypercall::execute(core);
            Ok(())
        }
        // UD0, UD1 and UD2; RSM outside system-management mode; MONITOR, MWAIT and the instructions of VMX
        // and SVM, which are not advertised.
        _ => Err(Exception::ud()),
    }
}

fn mov(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    let (destination, source) = (instruction.op0_register(), instruction.op1_register());
    if destination.is_segment_register() {
        descriptor::mov_to_segment(core, io, instruction)
    } else if source.is_segment_register() {
        descriptor::mov_from_segment(core, io, instruction)
    } else if destination.is_cr() || source.is_cr() {
        control::mov_control(core, io, instruction)
    } else if destination.is_dr() || source.is_dr() {
        control::mov_debug(core, instruction)
    } else {
        Err(Exception::ud())
    }
}

fn push_segment(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    if instruction.op0_kind() != OpKind::Register || !instruction.op0_register().is_segment_register() {
        return Err(Exception::ud());
    }
    let selector = core.cpu.seg[segment_index(instruction.op0_register())].selector;
    let mut stack = Stack::current(core);
    stack.push(core, io, u64::from(selector), instruction.stack_pointer_increment().unsigned_abs())?;
    stack.commit(core);
    Ok(())
}

fn pop_segment(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    if instruction.op0_kind() != OpKind::Register || !instruction.op0_register().is_segment_register() {
        return Err(Exception::ud());
    }
    let number = segment_index(instruction.op0_register());
    let mut stack = Stack::current(core);
    let selector = stack.pop(core, io, instruction.stack_pointer_increment().unsigned_abs())? as u16;
    load_segment(core, io, number, selector)?;
    stack.commit(core);
    if number == index::SS {
        core.cpu.interrupt_shadow |= 2;
    }
    Ok(())
}

/// INT n, INT3, INTO and INT1.
fn interrupt(core: &mut Core, io: &dyn GuestIo, instruction: &Instruction) -> Result<(), Exception> {
    match instruction.mnemonic() {
        Mnemonic::Int3 => software_interrupt(core, io, vector::BP, Source::Software),
        Mnemonic::Int1 => {
            // A data breakpoint of MOV SS, held off until now, is part of the same #DB.
            core.cpu.dr[6] |= interpret::debug::take_hits();
            software_interrupt(core, io, vector::DB, Source::PrivilegedSoftware)
        }
        Mnemonic::Into if core.cpu.rflags & rflags::OF == 0 => Ok(()),
        Mnemonic::Into => software_interrupt(core, io, vector::OF, Source::Software),
        _ => {
            // Without VME, INT n in virtual-8086 mode needs IOPL 3 (SDM vol. 3A 20.3.3).
            if core.cpu.is_vm86() {
                fast::require_iopl(core)?;
            }
            software_interrupt(core, io, instruction.immediate8(), Source::Software)
        }
    }
}
