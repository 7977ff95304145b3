//! When the timer thread looks at the chips next.
//!
//! A chip says when its next event is due. The thread sleeps until the earliest; an access that makes some
//! chip's event earlier than that wakes it. While the thread is asking the chips, any access wakes it, so
//! that an answer that has just become stale is asked for again.

use super::lock;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// The deadline and its thread's bed.
#[derive(Default)]
pub(super) struct Alarm {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What the thread sleeps towards, in guest nanoseconds; `None` before and after sleeping.
    deadline: Option<u64>,
    again: bool,
    stopped: bool,
}

impl Alarm {
    /// A chip's next event is due at `due` now.
    pub fn set(&self, due: Option<u64>) {
        let Some(due) = due else { return };
        let mut state = lock(&self.state);
        if state.deadline.is_none_or(|deadline| due < deadline) {
            state.again = true;
            self.changed.notify_one();
        }
    }

    /// Has the chips asked again now.
    pub fn look_again(&self) {
        lock(&self.state).again = true;
        self.changed.notify_one();
    }

    /// Ends [`Alarm::run`].
    pub fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_one();
    }

    /// Calls `poll` with the guest time `now` whenever something is due; it returns when that is
    /// the case again, if ever.
    pub fn run(&self, now: impl Fn() -> u64, mut poll: impl FnMut(u64) -> Option<u64>) {
        loop {
            let due = poll(now()).unwrap_or(u64::MAX);
            let mut state = lock(&self.state);
            state.deadline = Some(due);
            loop {
                if state.stopped {
                    return;
                }
                let left = due.saturating_sub(now());
                if left == 0 || state.again {
                    break;
                }
                let sleep = self.changed.wait_timeout(state, Duration::from_nanos(left));
                state = sleep.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
            }
            state.deadline = None;
            state.again = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};
    use std::time::Instant;

    #[test]
    fn an_earlier_event_wakes_the_thread() {
        let alarm = Arc::new(Alarm::default());
        let (tell, told) = mpsc::channel();
        let due = Arc::new(Mutex::new(None));
        let (thread_alarm, thread_due) = (alarm.clone(), due.clone());
        let epoch = Instant::now();
        let thread = std::thread::spawn(move || {
            let now = || epoch.elapsed().as_nanos() as u64;
            thread_alarm.run(now, |now| {
                tell.send(now).unwrap();
                lock(&thread_due).take()
            });
        });
        told.recv().unwrap();
        assert!(told.recv_timeout(Duration::from_millis(20)).is_err(), "nothing is due");
        let soon = epoch.elapsed().as_nanos() as u64 + 100_000_000;
        *lock(&due) = Some(soon);
        alarm.set(Some(soon));
        assert!(told.recv().unwrap() < soon, "asked again at once");
        assert!(told.recv().unwrap() >= soon, "and when due");
        alarm.stop();
        thread.join().unwrap();
    }
}
