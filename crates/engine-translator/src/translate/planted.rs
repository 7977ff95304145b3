//! Bugs planted on purpose, so that a test can show that the instruction fuzzer finds such bugs.
//!
//! Each is one that somebody could write: a check forgotten, a flag or register thought dead, code that
//! outlives what it was made from. Without the feature `planted-bugs`, which only that test turns on,
//! [`is`] is a constant and nothing of this is in the engine. They act when code is translated.

#[cfg(feature = "planted-bugs")]
use std::sync::atomic::{AtomicU8, Ordering};

/// A bug of the translator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Bug {
    /// A probe checks its first byte only: accesses may run over the end of the page.
    PageEndUnchecked = 1,
    /// A write needs only the right to read.
    WriteProbesForRead,
    /// 32-bit addresses keep the upper half of their registers.
    AddressNotTruncated,
    /// ADC, SBB, conditional jumps and the like are not counted as readers of the carry flag.
    CarryThoughtDead,
    /// A register without a host register that is read and then written by one instruction keeps its value.
    SpillNotStored,
    /// Writes to translated code do not drop it.
    StaleCode,
    /// A loop's hoisted check allows one iteration too many.
    LimitOneTooFar,
    /// A loop's group that moves down is given the bytes above it.
    BudgetOfWrongSide,
    /// Flags are made again from registers that have changed since.
    FlagsFromNewOperand,
    /// A group's leader checks its own bytes only, not those of the others.
    LeaderChecksItself,
    /// A read that leads writes asks for the right to read only.
    ReadLeadsUnasked,
    /// A return goes where the return stack says, without a look at the guest's stack.
    ReturnUnchecked,
    /// The register that an indirect call reads its target into is thought to keep a group's delta.
    DeltaThoughtKept,
    /// What fills the micro-TLB for a write looks at the right to read.
    MicroForRead,
    /// An access is thought to be in the region that was likely.
    RegionUnchecked,
    /// The region of an address is looked up without its index.
    IndexUnchecked,
    /// A register that a loop moves is added to a delta before it.
    MovingPartAdded,
    /// The flags at the target of a jump that a block follows are thought dead before it.
    FollowedJumpKillsFlags,
}

/// All of them.
#[cfg(feature = "planted-bugs")]
pub const ALL: [Bug; 18] = [
    Bug::PageEndUnchecked,
    Bug::WriteProbesForRead,
    Bug::AddressNotTruncated,
    Bug::CarryThoughtDead,
    Bug::SpillNotStored,
    Bug::StaleCode,
    Bug::LimitOneTooFar,
    Bug::BudgetOfWrongSide,
    Bug::FlagsFromNewOperand,
    Bug::LeaderChecksItself,
    Bug::ReadLeadsUnasked,
    Bug::ReturnUnchecked,
    Bug::DeltaThoughtKept,
    Bug::MicroForRead,
    Bug::RegionUnchecked,
    Bug::IndexUnchecked,
    Bug::MovingPartAdded,
    Bug::FollowedJumpKillsFlags,
];

#[cfg(feature = "planted-bugs")]
static PLANTED: AtomicU8 = AtomicU8::new(0);

/// Code translated from now on has `bug`, in every translator of the process.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.store(bug.map_or(0, |b| b as u8), Ordering::SeqCst);
}

/// Whether `bug` is planted.
#[cfg(feature = "planted-bugs")]
pub(super) fn is(bug: Bug) -> bool {
    PLANTED.load(Ordering::Relaxed) == bug as u8
}

/// Whether `bug` is planted: never.
#[cfg(not(feature = "planted-bugs"))]
pub(super) const fn is(_: Bug) -> bool {
    false
}
