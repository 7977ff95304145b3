//! A running VM's control from outside: what other threads may ask of the owner, and what it tells them.
//!
//! A [`Remote`] sends requests to the thread in [`super::run`], which carries them out one after another
//! between the VM's own events, and answers each. A request that comes while the VM restarts waits for the
//! new one; one that comes as it ends is answered [`Refused::Ended`]. What others merely want to know (the
//! state) does not go through the owner, which may be busy.

use super::debugging::{Debugging, Plan};
use super::measuring::Measuring;
use super::{Board, End, Event, Plugged};
use crate::Config;
use crate::balloon::{Lending, Lent};
use crate::config::{Disk, Net};
use crate::snapshot::History;
use anyvisor_engine::{Vcpu, Vm};
use anyvisor_x86::Cpuid;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Being built, for the first time or again after a reset.
    Starting,
    Running,
    Paused,
    Ended,
}

impl State {
    /// One word, as users see it.
    pub fn name(self) -> &'static str {
        match self {
            State::Starting => "Starting",
            State::Running => "Running",
            State::Paused => "Paused",
            State::Ended => "Ended",
        }
    }
}

/// The VM's state, readable at any time.
pub(super) struct Status(AtomicU8);

impl Status {
    pub fn new() -> Status {
        Status(AtomicU8::new(State::Starting as u8))
    }
    pub fn set(&self, state: State) {
        self.0.store(state as u8, Ordering::SeqCst);
    }
    pub fn get(&self) -> State {
        let value = self.0.load(Ordering::SeqCst);
        [State::Starting, State::Running, State::Paused, State::Ended][usize::from(value)]
    }
}

/// Why a request was not carried out. The message is one line for users, without the VM's name.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("the VM has ended")]
    Ended,
    /// The VM is in a state in which this cannot be done.
    #[error("{0}")]
    State(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
}

fn no_balloon() -> Refused {
    Refused::State("the VM has no balloon; start it with --balloon 0M to have one".into())
}

/// A VM that stands still: every vCPU at an instruction boundary, no chip doing anything.
pub struct Paused<'a> {
    pub config: &'a Config,
    /// The engine's name.
    pub engine: &'a str,
    pub vm: &'a dyn Vm,
    pub memory: &'a GuestMemoryMmap,
    pub board: &'a Board,
    /// By number. Nobody else runs or asks them.
    pub vcpus: Vec<MutexGuard<'a, Box<dyn Vcpu>>>,
    /// What each vCPU shows as its CPUID.
    pub tables: &'a [Cpuid],
    /// What was written since the VM's snapshots. Locked after everything else.
    pub history: &'a Arc<Mutex<History>>,
}

/// What is done to a VM that stands still, or why it cannot be. What it returns sends the answer, once the VM
/// is in its old state again.
type Work = Box<dyn FnOnce(Result<&mut Paused, Refused>) -> Box<dyn FnOnce()> + Send>;

/// What the owner is asked.
pub(super) enum Request {
    Pause(Answer<()>),
    Resume(Answer<()>),
    PressPowerButton(Answer<bool>),
    WithPaused(Work),
    DebuggerStop(Answer<()>),
    DebuggerGo(Plan, Answer<()>),
}

/// Where the answer goes. If it is dropped, the VM has ended.
pub(super) type Answer<T> = mpsc::Sender<Result<T, Refused>>;

/// Controls the VM from outside, from any thread.
#[derive(Clone)]
pub struct Remote {
    pub(super) sender: mpsc::Sender<Event>,
    pub(super) status: Arc<Status>,
    pub(super) debugging: Arc<Debugging>,
    pub(super) measuring: Arc<Measuring>,
    pub(super) lending: Arc<Lending>,
}

impl Remote {
    /// Ends the VM now, as a signal does.
    pub fn stop(&self) {
        // Nobody listens any more if the VM has ended.
        let _ = self.sender.send(Event::Outside(End::Stopped));
    }

    /// Ends the VM now, because the user at its console wants to leave.
    pub fn leave(&self) {
        let _ = self.sender.send(Event::Outside(End::Left));
    }

    /// The VM's state now.
    pub fn state(&self) -> State {
        self.status.get()
    }

    /// Stops every vCPU at an instruction boundary and holds the chips still. Does nothing to a paused VM.
    ///
    /// Guest time goes on, as it does for a process under SIGSTOP: after [`Remote::resume`] the guest's clocks
    /// are right, and timers that came due meanwhile fire at once, each once. A guest with kvmclock is told by
    /// its GUEST_STOPPED flag, so that it does not take the pause for a lockup.
    ///
    /// # Errors
    /// The VM has ended, or a vCPU does not come to a boundary.
    pub fn pause(&self) -> Result<(), Refused> {
        self.ask(Request::Pause)
    }

    /// Goes on after [`Remote::pause`]. Does nothing to a running VM.
    ///
    /// # Errors
    /// The VM has ended, or a debugger has stopped it.
    pub fn resume(&self) -> Result<(), Refused> {
        self.ask(Request::Resume)
    }

    /// Presses the ACPI power button. Says whether the guest has the button's event enabled; without, the
    /// press is forgotten by most guests.
    ///
    /// # Errors
    /// The VM has ended or is paused.
    pub fn press_power_button(&self) -> Result<bool, Refused> {
        self.ask(Request::PressPowerButton)
    }

    /// How the balloon is, and what the guest says of its memory, if it says so soon.
    ///
    /// # Errors
    /// The VM has none.
    pub fn balloon(&self) -> Result<Lent, Refused> {
        self.lending.look(Duration::from_millis(500)).ok_or_else(no_balloon)
    }

    /// Wants so many bytes of the guest's memory, which it gives by and by.
    ///
    /// # Errors
    /// The VM has no balloon.
    pub fn want_balloon(&self, bytes: u64) -> Result<(), Refused> {
        if self.lending.want(bytes) { Ok(()) } else { Err(no_balloon()) }
    }

    /// The devices on the bus.
    ///
    /// # Errors
    /// As for [`Remote::with_paused`].
    pub fn devices(&self) -> Result<Vec<Plugged>, Refused> {
        self.with_paused(|paused| paused.board.plugged())
    }

    /// Adds a disk. Returns its number on the bus.
    ///
    /// # Errors
    /// As for [`Remote::with_paused`]; or the disk cannot be used, or has no place.
    pub fn add_disk(&self, disk: Disk) -> Result<u8, Refused> {
        let plug = move |paused: &mut Paused| paused.board.plug_disk(&disk, paused.config.cpus, paused.memory);
        self.with_paused(plug)?.map_err(|error| Refused::State(error.to_string()))
    }

    /// Adds a network card. Returns its number on the bus.
    ///
    /// # Errors
    /// As for [`Remote::with_paused`]; or the card cannot be connected, or has no place.
    pub fn add_net(&self, net: Net) -> Result<u8, Refused> {
        let plug = move |paused: &mut Paused| paused.board.plug_net(&net, paused.memory);
        self.with_paused(plug)?.map_err(|error| Refused::State(error.to_string()))
    }

    /// Asks the guest to let go of the device in `slot`, which is then taken out. Says whether the guest listens to that.
    ///
    /// # Errors
    /// As for [`Remote::with_paused`]; or there is no such device.
    pub fn remove_device(&self, slot: u8) -> Result<bool, Refused> {
        let unplug = move |paused: &mut Paused| {
            let known = paused.board.plugged().iter().any(|plugged| plugged.slot == slot);
            known.then(|| paused.board.ask_to_unplug(slot))
        };
        self.with_paused(unplug)?.ok_or_else(|| Refused::State(format!("no device is in slot {slot}")))
    }

    /// Calls `work` on the VM while it stands still: pauses it for that, unless it is paused already. `work`
    /// runs on the owner's thread; nothing else happens to the VM meanwhile.
    ///
    /// # Errors
    /// As for [`Remote::pause`].
    pub fn with_paused<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Paused) -> T + Send + 'static,
    ) -> Result<T, Refused> {
        self.ask(|answer| {
            Request::WithPaused(Box::new(move |paused| {
                let result = paused.map(work);
                // Whoever asked may have gone.
                Box::new(move || drop(answer.send(result)))
            }))
        })
    }

    pub(super) fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, Refused> {
        let (answer, answered) = mpsc::channel();
        self.sender.send(Event::Request(request(answer))).map_err(|_| Refused::Ended)?;
        loop {
            match answered.recv_timeout(Duration::from_millis(100)) {
                Ok(answer) => return answer,
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(Refused::Ended),
                // A request that came after the last look into the queue is never answered.
                Err(mpsc::RecvTimeoutError::Timeout) if self.state() == State::Ended => {
                    return answered.try_recv().unwrap_or(Err(Refused::Ended));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    }
}
