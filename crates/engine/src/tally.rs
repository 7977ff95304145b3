//! How often, and how long, a vCPU's guest code was intercepted, by kind of interception.
//!
//! A [`Tally`] is one vCPU's; its engine adds to it while [`Vcpu::measure`](crate::Vcpu::measure) says so, and anybody
//! may read it meanwhile. A [`Meter`] is what an engine holds: without a tally it reads no clock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The kinds that are no instruction's name.
pub mod event {
    /// An access that the software TLB did not serve.
    pub const TLB_MISS: &str = "TLB miss";
    /// A host page fault of guest code that runs on mappings of its own.
    pub const PAGE_MAPPING: &str = "page mapping";
    pub const IO_PORT: &str = "I/O port";
    pub const MMIO: &str = "MMIO";
    /// Delivery of an interrupt or NMI.
    pub const INTERRUPT: &str = "interrupt";
    /// A guest waits to be told when it accepts an interrupt.
    pub const INTERRUPT_WINDOW: &str = "interrupt window";
    pub const END_OF_INTERRUPT: &str = "end of interrupt";
    /// Delivery of an exception, with the instruction that raised it.
    pub const EXCEPTION: &str = "exception";
    /// Waiting in HLT.
    pub const HALT: &str = "halt";
    pub const TRANSLATION: &str = "translation";
    /// Of translated code.
    pub const INVALIDATION: &str = "invalidation";
    /// An instruction that is not privileged and runs in the interpreter.
    pub const INTERPRETATION: &str = "interpretation";
    /// A look at what has arrived, without anything to deliver.
    pub const POLL: &str = "poll";
    pub const DEBUG: &str = "debug";
    pub const SIGNAL: &str = "signal";
}

/// One kind's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub samples: u64,
    pub time: Duration,
    pub min: Duration,
    pub max: Duration,
}

/// One vCPU's interceptions by kind.
#[derive(Debug)]
pub struct Tally {
    since: Instant,
    counts: Mutex<HashMap<&'static str, Counts>>,
}

impl Default for Tally {
    fn default() -> Tally {
        Tally { since: Instant::now(), counts: Mutex::default() }
    }
}

impl Tally {
    fn counts(&self) -> MutexGuard<'_, HashMap<&'static str, Counts>> {
        // Numbers stay valid whatever a panicking holder did.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an interception of kind `event` that took `time`.
    pub fn add(&self, event: &'static str, time: Duration) {
        let mut counts = self.counts();
        let new = Counts { samples: 0, time: Duration::ZERO, min: time, max: time };
        let counts = counts.entry(event).or_insert(new);
        counts.samples += 1;
        counts.time += time;
        counts.min = counts.min.min(time);
        counts.max = counts.max.max(time);
    }

    /// How long it has been counting.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// The kinds met so far, those that took the most time first.
    pub fn read(&self) -> Vec<(&'static str, Counts)> {
        let mut lines: Vec<_> = self.counts().iter().map(|(event, counts)| (*event, *counts)).collect();
        lines.sort_by_key(|(event, counts)| (std::cmp::Reverse(counts.time), *event));
        lines
    }
}

/// An engine's end of a tally.
#[derive(Debug, Default)]
pub struct Meter {
    tally: Option<Arc<Tally>>,
}

impl Meter {
    /// Counts into `tally` from now on.
    pub fn set(&mut self, tally: Option<Arc<Tally>>) {
        self.tally = tally;
    }

    #[inline]
    pub fn is_on(&self) -> bool {
        self.tally.is_some()
    }

    /// An interception begins. For [`Meter::stop`].
    #[inline]
    pub fn start(&self) -> Option<Instant> {
        if self.tally.is_some() { Some(Instant::now()) } else { None }
    }

    /// It is over.
    #[inline]
    pub fn stop(&self, began: Option<Instant>, event: &'static str) {
        if let (Some(began), Some(tally)) = (began, &self.tally) {
            tally.add(event, began.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_counts_by_kind() {
        let tally = Tally::default();
        for micros in [3, 1, 8] {
            tally.add(event::MMIO, Duration::from_micros(micros));
        }
        tally.add(event::HALT, Duration::from_secs(1));
        let lines = tally.read();
        assert_eq!((lines[0].0, lines[1].0), (event::HALT, event::MMIO));
        let us = Duration::from_micros;
        assert_eq!(lines[1].1, Counts { samples: 3, time: us(12), min: us(1), max: us(8) });
    }

    #[test]
    fn a_meter_without_a_tally_reads_no_clock() {
        let mut meter = Meter::default();
        assert_eq!(meter.start(), None);
        let tally = Arc::new(Tally::default());
        meter.set(Some(tally.clone()));
        meter.stop(meter.start(), event::POLL);
        meter.set(None);
        meter.stop(meter.start(), event::POLL);
        assert_eq!(
            tally.read().iter().map(|(event, counts)| (*event, counts.samples)).collect::<Vec<_>>(),
            [("poll", 1)]
        );
    }
}
