//! Per-instruction differential fuzzer: the host CPU is the reference, the engine's interpreter and
//! translator are what is tested.
//!
//! A [`case::Case`] is a few instructions with registers and memory, made from a seed by
//! [`generate::Generator`]. [`host::Host`] runs it on the CPU in this process, [`guest::Guest`] in a vCPU of
//! the engine that sees the same linear addresses; [`bench`] holds them against each other, by what [`compare`] says:
//! registers, flags, vector and x87 state, memory, and the exception that ended it. [`fuzz`] is the loop around them.
//!
//! `unsafe` is in [`host`] and [`guest`] only. Nothing else depends on this crate.

pub mod bench;
pub mod blocks;
pub mod case;
pub mod compare;
pub mod encode;
pub mod forms;
pub mod fuzz;
pub mod generate;
pub mod guest;
pub mod host;
pub mod layout;
pub mod minimise;
pub mod rng;
pub mod tally;
pub mod undefined;
