//! Whole-VM tests: real guests through the real `anyvisor` binary.
//!
//! This library is what they share, with `cargo xtask` too: a kernel and a shell from the distribution
//! ([`assets`]), guests of a few instructions ([`elf`]), disks that boot ([`grub`]), and the binary as a child
//! process that is never left behind ([`vm`]).

pub mod assets;
pub mod elf;
pub mod grub;
pub mod vm;
