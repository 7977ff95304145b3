//! What a debugger and a VM's owner share: what is to stop the vCPUs, which have stopped, and who may go on.
//!
//! A vCPU that stops leaves its reason here, closes the gate and waits there; the owner then pauses the VM as for
//! anybody else, and signals [`Debugging::event`]. From a stop until the debugger says go, the VM is the debugger's:
//! nobody else resumes it. Breakpoints are in force only while the VM runs, so that whoever looks at a paused VM, a
//! snapshot for one, sees no trace of them.

use super::lock;
use super::remote::{Refused, Request};
use super::{Remote, State};
use anyvisor_engine::{GuestDebug, Stop};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// See the module.
pub(super) struct Debugging {
    /// Signalled after a stop, and when the VM has ended. `None` without a debugger.
    event: Mutex<Option<Arc<OwnedFd>>>,
    /// A VM that is built waits for the debugger before its first instruction.
    wait_at_start: AtomicBool,
    /// The VM is stopped, and the debugger's.
    holds: AtomicBool,
    stops: Mutex<Vec<(usize, Stop)>>,
    plan: Mutex<Plan>,
}

/// What the vCPUs do while the VM runs.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// By vCPU; those that are missing have no breakpoints.
    pub debug: Vec<GuestDebug>,
    /// Bit n: vCPU n does not run.
    pub held: u64,
}

impl Debugging {
    pub fn new() -> Debugging {
        Debugging {
            event: Mutex::default(),
            wait_at_start: AtomicBool::new(false),
            holds: AtomicBool::new(false),
            stops: Mutex::default(),
            plan: Mutex::default(),
        }
    }

    /// Whether there is a debugger, or can be one.
    pub fn is_possible(&self) -> bool {
        lock(&self.event).is_some()
    }

    /// Whether a VM that starts now must wait; asked once.
    pub fn take_wait_at_start(&self) -> bool {
        self.wait_at_start.swap(false, Ordering::SeqCst)
    }

    /// vCPU `cpu` has stopped.
    pub fn stopped(&self, cpu: usize, stop: Stop) {
        lock(&self.stops).push((cpu, stop));
        self.holds.store(true, Ordering::SeqCst);
    }

    pub fn hold(&self) {
        self.holds.store(true, Ordering::SeqCst);
    }

    /// Whether only the debugger may let the VM go on.
    pub fn holds(&self) -> bool {
        self.holds.load(Ordering::SeqCst)
    }

    /// The debugger lets the VM go on as in `plan`.
    pub fn go(&self, plan: Plan) {
        lock(&self.stops).clear();
        *lock(&self.plan) = plan;
        self.holds.store(false, Ordering::SeqCst);
    }

    pub fn plan(&self) -> Plan {
        lock(&self.plan).clone()
    }

    /// Tells the debugger to look.
    pub fn notify(&self) {
        if let Some(event) = &*lock(&self.event) {
            // It cannot fail before 2^64 - 1 events.
            let _ = rustix::io::write(&**event, &1u64.to_ne_bytes());
        }
    }
}

/// A debugger's control of a VM; there is one at most.
pub struct Debugger {
    remote: Remote,
    event: Arc<OwnedFd>,
}

impl Debugger {
    /// Lets the VM behind `remote` be debugged; if it has not started, it waits before its first instruction.
    ///
    /// # Errors
    /// The host has no event file descriptor left.
    pub fn new(remote: Remote) -> std::io::Result<Debugger> {
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let debugging = &remote.debugging;
        *lock(&debugging.event) = Some(event.clone());
        debugging.wait_at_start.store(remote.state() == State::Starting, Ordering::SeqCst);
        Ok(Debugger { remote, event })
    }

    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Readable after a stop, and when the VM has ended.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Makes [`Debugger::event`] unreadable again.
    pub fn drain(&self) {
        // Nothing there is fine.
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
    }

    /// The vCPUs that have stopped since the VM last went on, in order.
    pub fn stops(&self) -> Vec<(usize, Stop)> {
        lock(&self.remote.debugging.stops).clone()
    }

    /// Stops the VM, if it runs.
    ///
    /// # Errors
    /// As for [`Remote::pause`].
    pub fn stop(&self) -> Result<(), Refused> {
        self.remote.ask(Request::DebuggerStop)
    }

    /// Lets the VM go on as in `plan`, from now on.
    ///
    /// # Errors
    /// The VM has ended.
    pub fn go(&self, plan: Plan) -> Result<(), Refused> {
        self.remote.ask(|answer| Request::DebuggerGo(plan, answer))
    }

    /// Gives up what was planned and what stopped. A VM that is stopped stays so, for another debugger or for
    /// [`Remote::resume`]; one that runs goes on without breakpoints.
    ///
    /// # Errors
    /// The VM has ended.
    pub fn leave(&self) -> Result<(), Refused> {
        if self.remote.debugging.holds() {
            self.remote.debugging.go(Plan::default());
            return Ok(());
        }
        // Engines take breakpoints at a standstill.
        self.stop()?;
        self.go(Plan::default())
    }
}
