//! A few guest instructions each, and what must be seen: exceptions and their frames, interrupts, privileged
//! instructions, segments, mode switches. Most name the rule of the manual that they check.

mod control;
mod delivery;
mod interrupts;
mod modes;
mod ports;
mod random;
mod transfers;
