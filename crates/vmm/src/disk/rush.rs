//! When a disk looks for more requests before it tells of those that have ended.
//!
//! A host's file in the page cache answers in less time than the driver takes to ask for the next thing. Telling of each
//! request by itself then costs an interrupt and a notification for each. A driver that has more to ask asks soon; one that
//! waits for its answer would be kept waiting in vain. Which one it is shows only by trying, now and then.

use std::time::Duration;

/// How long the next request is waited for.
pub const PATIENCE: Duration = Duration::from_micros(20);
/// After so many rounds of single requests it is tried again.
const TRY: u32 = 64;
/// Rounds with single requests that end it.
const DISAPPOINTMENTS: u32 = 4;

/// What the disk has seen lately.
pub struct Rush {
    /// CPUs that this process may use.
    cpus: usize,
    /// More is expected; and how often that was wrong since it was last right.
    on: bool,
    wrong: u32,
    /// Rounds since it was tried.
    rounds: u32,
    /// Requests of this round.
    requests: u32,
}

impl Default for Rush {
    fn default() -> Rush {
        // Asking takes a while: it reads files.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Rush { cpus, on: false, wrong: 0, rounds: 0, requests: 0 }
    }
}

impl Rush {
    /// A round begins, of a disk with this many queues, which has one for each vCPU up to a limit. Whether to look for more:
    /// not if the vCPUs need all of the host's CPUs.
    pub fn begin(&mut self, queues: usize) -> bool {
        self.requests = 0;
        self.rounds += 1;
        queues < self.cpus && (self.on || self.rounds >= TRY)
    }

    /// A request was taken.
    pub fn begun(&mut self) {
        self.requests += 1;
    }

    /// Nothing more has come in this round, or it was long enough. Whether the next one is to look, too.
    pub fn goes_on(&mut self) -> bool {
        let right = self.requests > 1;
        self.wrong = if right { 0 } else { self.wrong + 1 };
        self.on = right || self.on && self.wrong < DISAPPOINTMENTS;
        (self.requests, self.rounds) = (0, 0);
        right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds of so many requests each; whether each looked for more.
    fn rounds(rush: &mut Rush, requests: &[u32]) -> Vec<bool> {
        let round = |count: &u32| {
            let looks = rush.begin(0);
            (0..*count).for_each(|_| rush.begun());
            if looks {
                rush.goes_on();
            }
            looks
        };
        requests.iter().map(round).collect()
    }

    #[test]
    fn it_is_tried_now_and_then_and_kept_while_it_pays() {
        let mut rush = Rush::default();
        let tried = rounds(&mut rush, &[1; 200]);
        assert_eq!(tried.iter().filter(|looks| **looks).count(), 3);
        assert!(tried[TRY as usize - 1]);
        let mut rush = Rush::default();
        assert!(!rounds(&mut rush, &[1; TRY as usize - 1]).contains(&true));
        assert_eq!(
            rounds(&mut rush, &[8, 1, 1, 8, 1, 1, 1, 1, 1, 1]),
            [true; 8].into_iter().chain([false; 2]).collect::<Vec<_>>()
        );
    }

    #[test]
    fn not_where_vcpus_need_all_cpus() {
        let mut rush = Rush { on: true, ..Rush::default() };
        assert!(rush.begin(0) && !rush.begin(usize::MAX));
    }
}
