//! Sensitive instructions, exceptions and interrupts: all that a processor does beyond computing.

use crate::core::Core;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use iced_x86::Instruction;

mod apic;

/// What a step of a vCPU came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Step {
    Done,
    /// A triple fault: the processor is shut down (SDM vol. 3A 6.15, interrupt 8).
    Shutdown,
}

/// Executes a system instruction. RIP has already been advanced to the next instruction; the caller
/// restores it when this returns an error.
///
/// # Errors
/// The exception that the instruction raises.
pub fn execute(_core: &mut Core, _io: &dyn GuestIo, _instruction: &Instruction) -> Result<(), Exception> {
    Err(Exception::ud())
}

/// Delivers an exception raised by the instruction at RIP (for traps: before RIP).
pub fn deliver_exception(_core: &mut Core, _io: &dyn GuestIo, _exception: Exception) -> Step {
    Step::Shutdown
}

/// Delivers an external interrupt, or an NMI (vector 2).
pub fn deliver_interrupt(_core: &mut Core, _io: &dyn GuestIo, _vector: u8) -> Step {
    Step::Shutdown
}

/// Acts on what arrived since the last instruction boundary.
pub fn poll_events(_core: &mut Core, _io: &dyn GuestIo) -> Step {
    Step::Done
}
