//! Host and executors side by side: what a case does in each, and whether that is the same.
//!
//! Memory is compared in full after a case's run in the interpreter and after its last run in the translator. After
//! the translator's other runs only the pages are compared that the host left other than they were: what such
//! a run wrote elsewhere is not taken out again, so the comparison after the last one finds it.

use crate::case::{Case, Outcome, Stop, image};
use crate::compare::{differences, memory_differences, same};
use crate::generate::Options;
use crate::guest::{Executor, Guest};
use crate::host::Host;
use crate::layout::{Pages, compare_pages, same_pages};
use crate::undefined::Flow;
use anyhow::Result;
use anyvisor_engine_translator::translate::fault;
use std::fmt::Write;

/// Instructions that the host executes in a tick of its TSC, at most.
const INSTRUCTIONS_PER_TICK: u64 = 8;

/// Host and engine side by side.
pub struct Bench {
    host: Host,
    guests: Vec<(Executor, Guest)>,
    /// An interpreter that looks where cases went which differ.
    tracer: Guest,
    image: (u64, Vec<u8>),
}

/// A case on which an executor differs from the host.
#[derive(Clone, Debug)]
pub struct Finding {
    pub case: Case,
    pub executor: Executor,
    /// What differs, a line each.
    pub differences: String,
}

/// What comparing a case came to.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Every run ended as the host's, like this.
    Same(Stop),
    /// The host did not end it.
    Endless,
    /// A run differs, but the case strayed: what it read may be undefined, and nobody looked (see
    /// [`Guest::strays`]).
    Stray,
    /// The host ended it after more instructions than an executor is given.
    TooLong,
    Different(Box<Finding>),
}

impl Verdict {
    pub fn finding(self) -> Option<Finding> {
        match self {
            Verdict::Different(finding) => Some(*finding),
            _ => None,
        }
    }
}

/// The host's outcome, and what the case's code leaves undefined, if anybody has asked.
struct Reference {
    outcome: Outcome,
    flow: Option<Flow>,
    /// By [`Host::run_exactly`].
    exact: bool,
}

impl Reference {
    fn agrees(&mut self, case: &Case, executor: Executor, outcome: &Outcome) -> bool {
        same(case, &self.outcome, outcome) || self.differences(case, executor, outcome).is_empty()
    }

    fn differences(&mut self, case: &Case, executor: Executor, outcome: &Outcome) -> String {
        let flow = self.flow.get_or_insert_with(|| Flow::new(&case.code, case.state.rip));
        differences(case, flow, executor, &self.outcome, outcome)
    }
}

impl Bench {
    /// # Errors
    /// When the host refuses memory or signals.
    pub fn new(executors: &[Executor]) -> Result<Bench> {
        let host = Host::new()?;
        let guests = executors.iter().map(|e| Ok((*e, Guest::new(*e)?))).collect::<Result<_>>()?;
        let tracer = Guest::new(Executor::Interpreter)?;
        Ok(Bench { host, guests, tracer, image: (0, image(0)) })
    }

    /// Options that suit this host.
    pub fn options(&self) -> Options {
        Options { class: None, bits: 64, bases: self.host.can_set_bases() }
    }

    /// The memory image named `memory`.
    pub fn image(&mut self, memory: u64) -> &[u8] {
        if self.image.0 != memory {
            self.image = (memory, image(memory));
        }
        &self.image.1
    }

    /// Runs `case` everywhere, up to the first executor that differs from the host.
    pub fn check(&mut self, case: &Case) -> Verdict {
        self.image(case.memory);
        let host = self.host.run(case, &self.image.1);
        let mut reference = Reference { outcome: host, flow: None, exact: false };
        if reference.outcome.stop == Stop::Hang {
            return Verdict::Endless;
        }
        // The pages that the host left other than the image, once they are known.
        let mut changed = None;
        for index in 0..self.guests.len() {
            // The translator runs twice: when it translates, and from what it has kept and linked. A kept case
            // runs so with probes hoisted and without, others one way or the other, in turns.
            let eager = case.seed >> 6 & 1 == 0;
            let runs = match self.guests[index].0 {
                Executor::Translator if case.seed == 0 => &[true, true, false, false][..],
                Executor::Translator => &[eager, eager],
                Executor::Interpreter => &[false],
            };
            for (number, &eager) in runs.iter().enumerate() {
                let guest = &mut self.guests[index].1;
                guest.translate_eagerly(eager);
                let faults = fault::page_faults();
                let outcome = guest.run(case, &self.image.1);
                let faults = fault::page_faults() - faults;
                let last = number + 1 == runs.len();
                let mut agrees = faults == 0
                    && self.is_memory_same(index, &mut changed, last)
                    && reference.agrees(case, self.guests[index].0, &outcome);
                if !agrees && !reference.exact {
                    // Perhaps the host's run has seen that no INT3 was there.
                    let host = self.host.run_exactly(case, &self.image.1);
                    reference = Reference { outcome: host, flow: None, exact: true };
                    if reference.outcome.stop == Stop::Hang {
                        return Verdict::Endless;
                    }
                    changed = None;
                    agrees = faults == 0
                        && self.is_memory_same(index, &mut changed, true)
                        && reference.agrees(case, self.guests[index].0, &outcome);
                }
                if !agrees {
                    return self.judge(case, reference, index, &outcome, faults);
                }
                self.guests[index].1.set_dirty(changed.expect("memory was compared"));
            }
        }
        Verdict::Same(reference.outcome.stop)
    }

    /// Whether guest number `index` has the host's memory: all of it, or, if `all` is not asked for, the pages that
    /// the host has changed.
    fn is_memory_same(&mut self, index: usize, changed: &mut Option<Pages>, all: bool) -> bool {
        let guest = &self.guests[index].1;
        match *changed {
            Some(_) if all => self.host.data() == guest.data(),
            Some(pages) => same_pages(self.host.data(), guest.data(), pages),
            None => {
                let (pages, same) = compare_pages(&self.image.1, self.host.data(), guest.data());
                self.host.set_dirty(pages);
                *changed = Some(pages);
                same
            }
        }
    }

    /// What it means that guest number `index` has come to another outcome than the host, or to other memory.
    fn judge(
        &mut self,
        case: &Case,
        mut reference: Reference,
        index: usize,
        outcome: &Outcome,
        faults: u64,
    ) -> Verdict {
        let (executor, guest) = &self.guests[index];
        let executor = *executor;
        if outcome.stop == Stop::Hang && faults == 0 && may_take_longer(self.host.ticks(), executor) {
            return Verdict::TooLong;
        }
        let mut text = reference.differences(case, executor, outcome);
        text += &memory_differences(self.host.data(), guest.data());
        if faults != 0 {
            writeln!(text, "  faults   of the host's pages by translated code: {faults}").expect("a string");
        }
        let flow = Flow::new(&case.code, case.state.rip);
        if faults == 0 && self.tracer.strays(case, &self.image.1, &flow) {
            return Verdict::Stray;
        }
        Verdict::Different(Box::new(Finding { case: case.clone(), executor, differences: text }))
    }
}

/// Whether a case that took the host `ticks` may have more instructions than `executor` has patience for. If not, an
/// executor that has lost it runs for longer than it should.
fn may_take_longer(ticks: u64, executor: Executor) -> bool {
    ticks.saturating_mul(INSTRUCTIONS_PER_TICK) >= executor.patience()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_takes_the_host_long_may_outlast_an_executor() {
        for executor in [Executor::Interpreter, Executor::Translator] {
            assert!(!may_take_longer(5_000, executor));
            assert!(may_take_longer(1_000_000, executor));
        }
    }
}
