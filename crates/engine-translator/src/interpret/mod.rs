//! The interpreter: one guest instruction in any mode.
//!
//! It runs what the translator does not translate (cold and odd code, 16- and 32-bit modes, instructions
//! that fault or touch devices) and is the translator's oracle, so it keeps to the manual in every detail:
//!
//! - Nothing is changed before the last point where an instruction can fault; where an instruction is
//!   restartable midway (string instructions), its registers are precise at the fault.
//! - Integer instructions are pure Rust on [`Cpu`](crate::cpu::Cpu); sensitive ones are
//!   [`system::execute`]'s; x87, MMX, SSE and AVX instructions run on the host CPU ([`native`]).
//! - Flags that the manual leaves undefined are as on Intel processors, mostly; where AMD's do something else that
//!   programs can see, it does as the host's ([`vendor`](crate::vendor)).
//!
//! [`step`] returns at an instruction boundary, or in the middle of a repeated string instruction with RIP
//! still at it, so that interrupts can be taken.

mod alu;
mod atomic;
mod bits;
mod control;
pub(crate) mod debug;
mod decimal;
mod decode;
mod general;
pub mod memory;
mod operand;
mod string;
#[cfg(test)]
mod tests;

pub use crate::system::Step;
pub use decode::{Fetched, decode_at};

use crate::core::Core;
use crate::measure;
use crate::native;
use crate::system;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::{dr, rflags};
use anyvisor_x86::segment::index;
use iced_x86::{Instruction, Mnemonic};

/// One instruction being executed.
struct Exec<'a> {
    core: &'a mut Core,
    io: &'a dyn GuestIo,
    insn: &'a Instruction,
    /// In 64-bit mode.
    long: bool,
    /// RIP of this instruction.
    start: u64,
}

/// What becomes of a decoded instruction.
enum Handled {
    Done,
    /// It is none of the interpreter's own.
    No,
}

/// Executes one instruction, or delivers the exception that it raised.
pub fn step(core: &mut Core, io: &dyn GuestIo) -> Step {
    let (rip, old_flags) = (core.cpu.rip, core.cpu.rflags);
    match execute(core, io, rip, old_flags) {
        Ok(0) => Step::Done,
        Ok(dr6) => system::deliver_exception(core, io, Exception::db(dr6)),
        Err(exception) => {
            core.cpu.rip = rip;
            core.cpu.rflags |= old_flags & rflags::RF;
            if debug::armed(core) {
                debug::forget_hits(core);
            }
            system::deliver_exception(core, io, exception)
        }
    }
}

/// As [`step`], for a vCPU that is debugged or measured as well as for any other: executes nothing at a breakpoint,
/// and notes what stops behind it.
pub fn step_watched(core: &mut Core, io: &dyn GuestIo) -> Step {
    if !core.debugger.is_on() {
        return if core.meter.is_on() { measure::step(core, io) } else { step(core, io) };
    }
    if core.debugger_holds() {
        return Step::Done;
    }
    let done = measure::step(core, io);
    core.debugger_looks_back();
    done
}

/// Executes one instruction; returns the DR6 bits of the debug trap that follows it, or 0.
fn execute(core: &mut Core, io: &dyn GuestIo, rip: u64, old_flags: u64) -> Result<u64, Exception> {
    // Intel's hold instruction breakpoints off behind MOV SS and POP SS (SDM vol. 3A 6.8.3); AMD's do not.
    let held_off = core.cpu.interrupt_shadow & 2 != 0 && !core.is_amd();
    if debug::armed(core) && old_flags & rflags::RF == 0 && !held_off {
        let base = if memory::is_64bit(&core.cpu) { 0 } else { core.cpu.seg[index::CS].base };
        debug::check_execution(core, base.wrapping_add(rip))?;
    }
    let fetched = decode_at(core, rip)?;
    let insn = &fetched.instruction;
    core.cpu.interrupt_shadow = 0;
    core.cpu.rflags &= !rflags::RF;
    let long = memory::is_64bit(&core.cpu);
    let next = rip.wrapping_add(insn.len() as u64);
    core.cpu.rip = if long { next } else { next & 0xffff_ffff };
    if let Handled::No = general::execute(&mut Exec { core, io, insn, long, start: rip })? {
        native::execute(core, io, &fetched)?;
    }
    if (old_flags | core.cpu.rflags) & rflags::TF != 0 || debug::armed(core) {
        return Ok(debug_trap(core, insn, old_flags));
    }
    Ok(0)
}

/// The #DB trap that follows a completed instruction: single step and data breakpoints (SDM vol. 3B
/// 18.3.1.2, 18.3.1.4). After MOV SS and POP SS it waits for the next instruction (vol. 3A 6.8.3).
fn debug_trap(core: &Core, insn: &Instruction, old_flags: u64) -> u64 {
    if core.cpu.interrupt_shadow & 2 != 0 {
        return 0;
    }
    use Mnemonic as M;
    let (before, after) = (old_flags & rflags::TF != 0, core.cpu.rflags & rflags::TF != 0);
    let single_step = match insn.mnemonic() {
        // These clear TF on their way in, and no trap follows.
        M::Int | M::Int1 | M::Int3 | M::Into | M::Syscall => before && after,
        // The program's TF, as if its SYSCALL had just been stepped.
        M::Sysret | M::Sysretq => after,
        _ => before,
    };
    debug::take_hits() | if single_step { dr::DR6_BS } else { 0 }
}
