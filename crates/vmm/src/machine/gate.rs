//! Where vCPU threads wait while the VM is paused, and learn that it ends.
//!
//! A thread passes the gate before each [`Vcpu::run`](anyvisor_engine::Vcpu::run), so at an instruction
//! boundary, and lets go of its vCPU while it waits. The owner closes the gate, kicks the vCPUs and waits
//! until all are here. A kick is kept until the next run, so none can slip by.
//!
//! The lock is the last one taken by anybody.

use super::lock;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// Bit n: thread n waits even if the gate is open.
    held: u64,
    /// Threads at the closed gate. One that has not woken since it was last opened is still counted, and
    /// still waits if it has been closed again.
    waiting: usize,
    ending: bool,
}

/// Why not everybody came to the gate.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotParked {
    /// The VM ends.
    Ending,
    /// This many threads were still out when time was up. The gate is open again.
    Late(usize),
}

impl Gate {
    /// Waits while the gate is closed, or thread `cpu` is held; false if the VM ends.
    pub fn pass(&self, cpu: usize) -> bool {
        let mut state = lock(&self.state);
        let waits = |state: &State| (state.closed || state.held >> cpu & 1 != 0) && !state.ending;
        if waits(&state) {
            state.waiting += 1;
            self.changed.notify_all();
            while waits(&state) {
                state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            state.waiting -= 1;
        }
        !state.ending
    }

    pub fn close(&self) {
        lock(&self.state).closed = true;
    }

    /// From when the gate opens, only those threads pass whose bits in `held` are clear.
    pub fn hold(&self, held: u64) {
        lock(&self.state).held = held;
    }

    pub fn open(&self) {
        lock(&self.state).closed = false;
        self.changed.notify_all();
    }

    /// Waits until `threads` wait at the closed gate. If they do not within `patience`, opens it.
    pub fn wait_for(&self, threads: usize, patience: Duration) -> Result<(), NotParked> {
        let deadline = Instant::now() + patience;
        let mut state = lock(&self.state);
        loop {
            if state.ending {
                return Err(NotParked::Ending);
            }
            if state.waiting >= threads {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.closed = false;
                self.changed.notify_all();
                return Err(NotParked::Late(threads - state.waiting));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// Lets everybody go: the VM ends.
    pub fn end(&self) {
        lock(&self.state).ending = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn nobody_passes_a_closed_gate() {
        let gate = Arc::new(Gate::default());
        let passes = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..3)
            .map(|cpu| {
                let (gate, passes) = (gate.clone(), passes.clone());
                std::thread::spawn(move || {
                    while gate.pass(cpu) {
                        passes.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        for _ in 0..50 {
            gate.close();
            assert_eq!(gate.wait_for(3, PATIENCE), Ok(()));
            let before = passes.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(passes.load(Ordering::SeqCst), before);
            gate.open();
        }
        gate.close();
        gate.end();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(gate.wait_for(3, PATIENCE), Err(NotParked::Ending));
    }

    #[test]
    fn a_held_thread_waits_alone() {
        let gate = Arc::new(Gate::default());
        gate.close();
        gate.hold(0b10);
        let passes: [Arc<AtomicU64>; 2] = Default::default();
        let threads: Vec<_> = (0..2)
            .map(|cpu| {
                let (gate, passes) = (gate.clone(), passes[cpu].clone());
                std::thread::spawn(move || {
                    while gate.pass(cpu) {
                        passes.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        gate.open();
        while passes[0].load(Ordering::SeqCst) < 1000 {
            std::thread::yield_now();
        }
        assert_eq!(passes[1].load(Ordering::SeqCst), 0);
        gate.close();
        assert_eq!(gate.wait_for(2, PATIENCE), Ok(()));
        gate.hold(0);
        gate.open();
        while passes[1].load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        gate.end();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn a_late_thread_opens_the_gate() {
        let gate = Gate::default();
        gate.close();
        assert_eq!(gate.wait_for(2, Duration::from_millis(5)), Err(NotParked::Late(2)));
        assert!(gate.pass(0));
    }
}
