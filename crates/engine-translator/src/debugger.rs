//! A debugger's breakpoints, watchpoints and steps, none of which the guest can see.
//!
//! **Idea.** Nothing is written to guest memory, and the guest's debug registers stay its own:
//!
//! - The translator leaves the instruction at a breakpoint to the interpreter, and whoever is about to interpret an
//!   instruction asks [`Debugger::holds`] first.
//! - A page with a watchpoint has no TLB entry for the accesses watched, so that they are interpreted, and the
//!   interpreter notes every access ([`Debugger::note`]) as it does for the guest's own breakpoints.
//! - A step is one instruction interpreted.
//!
//! A reason to stop waits in [`Debugger::stop`], and [`pending::DEBUG`] gets the vCPU out of its loops; so without a
//! debugger there is nothing to check where guest code runs. Whoever changes what is stopped at drops all
//! translations and TLB entries.

use crate::core::Core;
use crate::cpu::pending;
use anyvisor_engine::{GuestDebug, Stop, Watch};
use anyvisor_x86::segment::index;
use std::cell::Cell;
use std::sync::atomic::Ordering;

/// See the module.
#[derive(Debug, Default)]
pub struct Debugger {
    /// Anything at all is wanted.
    on: bool,
    wanted: GuestDebug,
    /// Linear addresses of breakpoints of both kinds, ascending.
    breakpoints: Vec<u64>,
    /// Something is watched: the interpreter is to note accesses.
    watches: bool,
    /// The first watchpoint that the current instruction hit.
    hit: Cell<Option<usize>>,
    stop: Option<Stop>,
}

impl Debugger {
    /// Stops for `wanted` from now on, and forgets an earlier reason.
    pub fn set(&mut self, wanted: &GuestDebug) {
        let watched = |watch| watch != Watch::Execute;
        let hardware = wanted.hardware.iter().filter(|b| !watched(b.watch)).map(|b| b.address);
        self.breakpoints = wanted.software.iter().copied().chain(hardware).collect();
        self.breakpoints.sort_unstable();
        // A step is to end after one iteration of a repeated instruction, as it does for one who notes accesses.
        self.watches = wanted.single_step || wanted.hardware.iter().any(|b| watched(b.watch));
        self.on = !wanted.is_off();
        self.wanted = wanted.clone();
        self.hit.set(None);
        self.stop = None;
    }

    /// Whether anything stops the vCPU.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Whether the vCPU executes one instruction only.
    pub fn steps(&self) -> bool {
        self.wanted.single_step
    }

    /// Linear addresses of instructions that must not be reached in translated code, ascending.
    pub fn breakpoints(&self) -> &[u64] {
        &self.breakpoints
    }

    /// Whether accesses are to be noted.
    #[inline]
    pub fn watches(&self) -> bool {
        self.watches
    }

    /// Notes an access to `size` bytes at linear address `gva`.
    pub fn note(&self, gva: u64, size: u64, write: bool) {
        let hit = self.wanted.hardware.iter().position(|b| {
            let watched = match b.watch {
                Watch::Execute => false,
                Watch::Write => write,
                Watch::Access => true,
            };
            watched && gva < b.address.saturating_add(b.length.into()) && b.address < gva.saturating_add(size)
        });
        if hit.is_some() && self.hit.get().is_none() {
            self.hit.set(hit);
        }
    }

    /// Forgets the accesses of an instruction that faulted.
    pub fn forget(&self) {
        self.hit.set(None);
    }

    /// Whether accesses of this kind to the page of `gva` must not be made by translated code.
    pub fn guards(&self, gva: u64, write: bool) -> bool {
        let here = |address: u64| address >> 12 == gva >> 12;
        self.wanted
            .hardware
            .iter()
            .any(|b| here(b.address) && (b.watch == Watch::Access || write && b.watch == Watch::Write))
    }

    /// The reason to stop at the instruction at linear address `rip`.
    fn at(&self, rip: u64) -> Option<Stop> {
        self.breakpoints.binary_search(&rip).ok()?;
        let hardware = self.wanted.hardware.iter().position(|b| b.watch == Watch::Execute && b.address == rip);
        Some(hardware.map_or(Stop::Software, Stop::Hardware))
    }

    /// Takes the reason to stop, if there is one.
    pub fn take(&mut self) -> Option<Stop> {
        self.stop.take()
    }
}

impl Core {
    /// Lets [`Vcpu::run`](anyvisor_engine::Vcpu::run) return because of `stop`.
    fn stop_for_debugger(&mut self, stop: Stop) {
        self.debugger.stop = Some(stop);
        self.cpu.pending.fetch_or(pending::DEBUG, Ordering::SeqCst);
    }

    /// Stops before the instruction at RIP if there is a breakpoint; then it must not be executed.
    pub fn debugger_holds(&mut self) -> bool {
        let base = if crate::interpret::memory::is_64bit(&self.cpu) { 0 } else { self.cpu.seg[index::CS].base };
        match self.debugger.at(base.wrapping_add(self.cpu.rip)) {
            Some(stop) => {
                self.stop_for_debugger(stop);
                true
            }
            None => false,
        }
    }

    /// Stops after an instruction that hit a watchpoint, or because it was stepped.
    pub fn debugger_looks_back(&mut self) {
        if let Some(hit) = self.debugger.hit.take() {
            self.stop_for_debugger(Stop::Hardware(hit));
        } else if self.debugger.steps() && self.debugger.stop.is_none() {
            self.stop_for_debugger(Stop::Step);
        }
    }
}
