//! Host and executors side by side: what a case does in each, and whether that is the same.
//!
//! [`Bench::check`] compares all memory after every run. That is a tenth of a case's time, and nearly all of it goes
//! to pages that nobody has touched. So [`Bench::check_soon`] compares the pages that the host has changed, and
//! leaves the others *doubtful*: what a wrong access may have written there stays there, because only what the host has
//! changed is put back between cases. Doubtful pages are compared with the image before a case that changes them runs in
//! that executor, so it cannot cover anything up, and all together by [`Bench::settle`]. If one is found to be
//! other than the image then, the cases since the last time are checked again, each by itself.

use crate::case::{Case, Outcome, Stop, image};
use crate::compare::{differences, excused, memory_differences, same};
use crate::generate::Options;
use crate::guest::{Executor, Guest};
use crate::host::{self, Host};
use crate::layout::{ALL_PAGES, Pages, pages_that_differ, same_pages};
use crate::undefined::Flow;
use anyhow::Result;
use anyvisor_engine_translator::translate::fault;
use std::fmt::Write;

/// Instructions that the host executes in a tick of its TSC, at most.
const INSTRUCTIONS_PER_TICK: u64 = 8;
/// How often the host runs a case whose time matters: it may be interrupted in any run.
const TIMED_RUNS: usize = 5;

/// Host and engine side by side.
pub struct Bench {
    host: Host,
    guests: Vec<Side>,
    /// The cases since doubtful pages were looked at.
    recent: Vec<Case>,
    /// An interpreter that looks where cases went which differ.
    tracer: Guest,
    image: (u64, Vec<u8>),
}

/// An executor.
struct Side {
    executor: Executor,
    guest: Guest,
    /// Data pages that were not compared when its last run had ended.
    doubtful: Pages,
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
    /// A run differs, but the case goes to an address where this process has something of its own.
    Elsewhere,
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
        let side = |&executor| Ok(Side { executor, guest: Guest::new(executor)?, doubtful: 0 });
        let guests = executors.iter().map(side).collect::<Result<_>>()?;
        let tracer = Guest::new(Executor::Interpreter)?;
        Ok(Bench { host, guests, recent: Vec::new(), tracer, image: (0, image(0)) })
    }

    /// Options that suit this host.
    pub fn options(&self) -> Options {
        Options { class: None, bits: 64, bases: self.host.can_set_bases() }
    }

    /// The memory image named `memory`. It may only change when nothing is doubtful.
    pub fn image(&mut self, memory: u64) -> &[u8] {
        if self.image.0 != memory {
            debug_assert!(self.recent.is_empty(), "settled");
            self.image = (memory, image(memory));
        }
        &self.image.1
    }

    /// Runs `case` everywhere, up to the first executor that differs from the host.
    pub fn check(&mut self, case: &Case) -> Verdict {
        self.start_afresh();
        let verdict = self.compare(case, true).expect("nothing is doubtful");
        self.start_afresh();
        verdict
    }

    /// As [`Bench::check`], but what runs wrote to pages that the host left alone may be told later: by a case that
    /// follows, or by [`Bench::settle`].
    pub fn check_soon(&mut self, case: Case) -> Verdict {
        let verdict = self.compare(&case, false);
        self.recent.push(case);
        match verdict {
            Some(verdict) => verdict,
            None => self.search(),
        }
    }

    /// Looks at all doubtful pages.
    pub fn settle(&mut self) -> Option<Finding> {
        let good = |side: &Side| same_pages(&self.image.1, side.guest.data(), side.doubtful);
        let found = if self.guests.iter().all(good) { None } else { self.search().finding() };
        self.guests.iter_mut().for_each(|side| side.doubtful = 0);
        self.recent.clear();
        found
    }

    /// Has all memory put back before the next case.
    fn start_afresh(&mut self) {
        self.recent.clear();
        self.host.set_dirty(ALL_PAGES);
        for side in &mut self.guests {
            side.guest.set_dirty(ALL_PAGES);
            side.doubtful = 0;
        }
    }

    /// Finds the case among the recent ones that wrote where it should not.
    fn search(&mut self) -> Verdict {
        let recent = std::mem::take(&mut self.recent);
        for case in &recent {
            let verdict = self.check(case);
            if let Verdict::Different(_) = verdict {
                return verdict;
            }
        }
        let case = recent.last().cloned().unwrap_or_default();
        let differences =
            format!("  memory   written by one of {} cases up to this one, but by none alone\n", recent.len());
        Verdict::Different(Box::new(Finding { case, executor: self.guests[0].executor, differences }))
    }

    /// Runs `case` everywhere, comparing all memory after every run or what the host has changed; `None` if other
    /// memory was found wrong before a run.
    fn compare(&mut self, case: &Case, all: bool) -> Option<Verdict> {
        self.image(case.memory);
        let host = self.host.run(case, &self.image.1);
        let mut reference = Reference { outcome: host, flow: None, exact: false };
        if reference.outcome.stop == Stop::Hang {
            return Some(Verdict::Endless);
        }
        let mut changed = self.pages_changed();
        for index in 0..self.guests.len() {
            // The translator runs twice: when it translates, and from what it has kept and linked. A kept case
            // runs so in each way, others in one or another, in turns.
            let (eager, windows) = (case.seed >> 6 & 1 == 0, case.seed >> 7 & 1 == 0);
            let ways = [(true, true), (true, false), (false, true), (false, false)];
            let ways = match self.guests[index].executor {
                Executor::Translator if case.seed == 0 => &ways[..],
                Executor::Translator => &[(eager, windows)],
                Executor::Interpreter => &[(false, false)],
            };
            let times = if self.guests[index].executor == Executor::Translator { 2 } else { 1 };
            for &(eager, windows) in ways.iter().flat_map(|way| std::iter::repeat_n(way, times)) {
                let side = &mut self.guests[index];
                if !same_pages(&self.image.1, side.guest.data(), changed & side.doubtful) {
                    return None;
                }
                side.guest.translate_in_way(eager, windows);
                let faults = fault::page_faults();
                let outcome = side.guest.run(case, &self.image.1);
                let faults = fault::page_faults() - faults;
                if let Some(range) = excused(case, side.executor, &reference.outcome) {
                    side.guest.take_from(self.host.data(), range);
                }
                let compared = if all { ALL_PAGES } else { changed };
                let mut agrees = faults == 0
                    && same_pages(self.host.data(), side.guest.data(), compared)
                    && reference.agrees(case, side.executor, &outcome);
                if !agrees && !reference.exact {
                    // Perhaps the host's run has seen that no INT3 was there.
                    let host = self.host.run_exactly(case, &self.image.1);
                    reference = Reference { outcome: host, flow: None, exact: true };
                    if reference.outcome.stop == Stop::Hang {
                        return Some(Verdict::Endless);
                    }
                    changed = self.pages_changed();
                    let side = &self.guests[index];
                    agrees = faults == 0
                        && self.host.data() == side.guest.data()
                        && reference.agrees(case, side.executor, &outcome);
                }
                if !agrees {
                    return Some(self.judge(case, reference, index, &outcome, faults));
                }
                let side = &mut self.guests[index];
                side.guest.set_dirty(changed);
                side.doubtful = if all { 0 } else { !changed };
            }
        }
        Some(Verdict::Same(reference.outcome.stop))
    }

    /// Whether `case`, which ends as `outcome` by [`Host::run_exactly`], may have more instructions than `executor` has
    /// patience for. If not, an executor that has lost it runs for longer than it should.
    fn may_outlast(&mut self, case: &Case, outcome: &Outcome, executor: Executor) -> bool {
        let mut ticks = || {
            self.host.run_exactly(case, &self.image.1);
            self.host.ticks()
        };
        let least = (0..TIMED_RUNS).map(|_| ticks()).min().expect("some runs");
        if !may_take_longer(least, executor) {
            return false;
        }
        // A signal alone may take the host as long as all that the translator has patience for (#UD 30,000 ticks, where the host
        // is itself a VM). If the interpreter comes to the same end it knows how far that is.
        let traced = self.tracer.run(case, &self.image.1);
        (traced.stop, traced.state.rip) != (outcome.stop, outcome.state.rip)
            || self.tracer.steps() >= executor.patience()
    }

    /// The data pages that the host's run has left other than the image.
    fn pages_changed(&mut self) -> Pages {
        let changed = pages_that_differ(self.host.data(), &self.image.1);
        self.host.set_dirty(changed);
        changed
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
        let executor = self.guests[index].executor;
        // All its memory is put back before the next case.
        self.guests[index].doubtful = 0;
        if outcome.stop == Stop::Hang && faults == 0 && self.may_outlast(case, &reference.outcome, executor) {
            return Verdict::TooLong;
        }
        let side = &mut self.guests[index];
        let mut text = reference.differences(case, executor, outcome);
        text += &memory_differences(self.host.data(), side.guest.data());
        if faults != 0 {
            writeln!(text, "  faults   of the host's pages by translated code: {faults}").expect("a string");
        }
        // Addresses that the host makes up for its mappings are now and then ones that a case has by chance. The
        // interpreter knows no such mapping, and no address of one.
        if let Stop::Exception { vector: 14, cr2, .. } = self.tracer.run(case, &self.image.1).stop
            && host::is_own(cr2)
        {
            return Verdict::Elsewhere;
        }
        let flow = Flow::new(&case.code, case.state.rip);
        if faults == 0 && self.tracer.strays(case, &self.image.1, &flow) {
            return Verdict::Stray;
        }
        Verdict::Different(Box::new(Finding { case: case.clone(), executor, differences: text }))
    }
}

/// Whether a case that took the host `ticks` may have more instructions than `executor` has patience for.
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

    #[test]
    fn an_executor_that_hangs_is_found_however_the_host_ended() {
        let _one = crate::host::tests::ONE.lock().unwrap_or_else(|e| e.into_inner());
        let mut bench = Bench::new(&[Executor::Translator]).unwrap();
        // nop; ud2; mov al, [0]; div ecx. Then loops of mov ecx, rounds; dec ecx; jnz: for the translator alone, and for both.
        let short: [&[u8]; 4] = [&[0x90], &[0x0f, 0x0b], &[0x8a, 0x04, 0x25, 0, 0, 0, 0], &[0xf7, 0xf1]];
        let long: [&[u8]; 2] =
            [&[0xb9, 0, 0, 3, 0, 0xff, 0xc9, 0x75, 0xfc], &[0xb9, 0, 0, 16, 0, 0xff, 0xc9, 0x75, 0xfc]];
        for (code, is_short) in short.map(|code| (code, true)).into_iter().chain(long.map(|code| (code, false))) {
            let case = Case { code: code.to_vec(), ..Case::default() };
            bench.image(case.memory);
            let outcome = bench.host.run_exactly(&case, &bench.image.1);
            let hang = Outcome { stop: Stop::Hang, ..outcome.clone() };
            assert_ne!(outcome.stop, Stop::Hang);
            let reference = Reference { outcome, flow: None, exact: true };
            let verdict = bench.judge(&case, reference, 0, &hang, 0);
            match verdict {
                Verdict::Different(_) => assert!(is_short, "{code:x?}"),
                Verdict::TooLong => assert!(!is_short, "{code:x?}"),
                other => panic!("{code:x?}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_written_elsewhere_is_found_later() {
        use crate::layout::{DATA_BYTES, LOW, PAGE};
        let _one = crate::host::tests::ONE.lock().unwrap_or_else(|e| e.into_inner());
        let mut bench = Bench::new(&[Executor::Interpreter]).unwrap();
        // mov [rax], ecx: changes the first data page.
        let mut store = Case { code: vec![0x89, 0x08], ..Case::default() };
        store.state.gpr[0] = LOW + PAGE;
        let nop = Case { code: vec![0x90], ..Case::default() };
        let same = |verdict: Verdict| matches!(verdict, Verdict::Same(_));
        bench.image(0);
        assert!(same(bench.check_soon(nop.clone())) && same(bench.check_soon(store.clone())));
        assert!(bench.settle().is_none());
        // At the end, wherever it is.
        for page in 0..DATA_BYTES / PAGE as usize {
            assert!(same(bench.check_soon(nop.clone())));
            bench.guests[0].guest.spoil(page * PAGE as usize + 77);
            assert!(same(bench.check_soon(nop.clone())), "page {page} is not compared yet");
            assert!(bench.settle().is_some_and(|finding| finding.differences.contains("one of 2 cases")));
            assert!(same(bench.check_soon(nop.clone())) && bench.settle().is_none(), "and it is good again");
        }
        // Before a case writes over it, with the right value even.
        assert!(same(bench.check_soon(nop.clone())));
        bench.guests[0].guest.spoil(1);
        let found = bench.check_soon(store.clone()).finding().expect("the page was doubtful");
        assert!(found.differences.contains("one of 2 cases"), "{found:?}");
        assert!(same(bench.check_soon(store)) && bench.settle().is_none());
    }
}
