//! The owner at work: a VM that runs, between its start and the event that ends it.

use super::debugging::Plan;
use super::remote::{Paused, Refused, Request};
use super::vcpu::SharedVcpu;
use super::{Board, Control, End, Event, Notify, State, gate, lock};
use crate::Config;
use crate::console::Output;
use crate::snapshot::History;
use anyvisor_engine::{GuestDebug, Vm};
use anyvisor_x86::{Cpuid, msr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// How long a vCPU may take to an instruction boundary: on a very busy host, in a slow device access.
const PATIENCE: Duration = Duration::from_secs(10);

/// Byte of kvmclock's structure that holds its flags, and the one that says that the guest was stopped
/// (Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).
const CLOCK_FLAGS: u64 = 29;
const GUEST_STOPPED: u8 = 1 << 1;

/// A running VM as its owner sees it.
pub(super) struct Live<'a> {
    pub config: &'a Config,
    pub engine: &'a str,
    pub vm: &'a dyn Vm,
    pub memory: &'a GuestMemoryMmap,
    pub board: &'a Arc<Board>,
    pub vcpus: &'a [SharedVcpu],
    pub tables: &'a [Cpuid],
    pub history: Arc<Mutex<History>>,
    pub notify: &'a Notify,
}

/// Why a request was not carried out.
enum NotNow {
    /// The VM ends; if it restarts, the next one takes the request.
    Ending,
    Refused(Refused),
}

impl Live<'_> {
    /// Carries out requests until the first event that ends the VM.
    pub fn run(&self, control: &Control, output: &Output) -> End {
        if control.debugging.is_possible()
            && let Some(end) = self.start_debugged(control, output)
        {
            return end;
        }
        loop {
            let deferred = lock(&control.deferred).pop_front();
            let event = match deferred {
                Some(request) => Event::Request(request),
                None => control.events.recv().expect("the control holds a sender itself"),
            };
            match event {
                Event::Outside(end) => return end,
                Event::Vm { generation, end } if generation == self.notify.generation => return end,
                Event::Vm { .. } => {}
                // One that is late is old news: the debugger has seen it, and let the VM go on.
                Event::Stopped { generation } if generation == self.notify.generation && control.debugging.holds() => {
                    match self.pause(control, output) {
                        Ok(()) => control.debugging.notify(),
                        Err(NotNow::Ending) => return next_end(control, self.notify.generation),
                        Err(NotNow::Refused(refused)) => return End::Failed(refused.to_string()),
                    }
                }
                Event::Stopped { .. } => {}
                Event::Request(request) => {
                    if let Some(request) = self.carry_out(request, control, output) {
                        lock(&control.deferred).push_front(request);
                        return next_end(control, self.notify.generation);
                    }
                }
            }
        }
    }

    /// Gives the request back if the VM is ending.
    fn carry_out(&self, request: Request, control: &Control, output: &Output) -> Option<Request> {
        // Nobody may be listening for an answer any more.
        match request {
            Request::Pause(answer) => match self.pause(control, output) {
                Ok(()) => drop(answer.send(Ok(()))),
                Err(NotNow::Ending) => return Some(Request::Pause(answer)),
                Err(NotNow::Refused(refused)) => drop(answer.send(Err(refused))),
            },
            Request::Resume(answer) => {
                let result = if control.debugging.holds() {
                    Err(Refused::State("a debugger has stopped the VM; continue there, or detach".into()))
                } else {
                    self.resume(control);
                    Ok(())
                };
                let _ = answer.send(result);
            }
            Request::DebuggerStop(answer) => match self.pause(control, output) {
                Ok(()) => {
                    control.debugging.hold();
                    let _ = answer.send(Ok(()));
                }
                Err(NotNow::Ending) => return Some(Request::DebuggerStop(answer)),
                Err(NotNow::Refused(refused)) => drop(answer.send(Err(refused))),
            },
            Request::DebuggerGo(plan, answer) => {
                control.debugging.go(plan);
                self.resume(control);
                let _ = answer.send(Ok(()));
            }
            Request::PressPowerButton(answer) => {
                let _ = answer.send(match control.status.get() {
                    State::Paused => Err(Refused::State("the VM is paused; resume it first".into())),
                    _ => Ok(self.board.press_power_button()),
                });
            }
            Request::WithPaused(work) => {
                let was_paused = control.status.get() == State::Paused;
                let deliver = match self.pause(control, output) {
                    Ok(()) => work(Ok(&mut self.paused())),
                    Err(NotNow::Ending) => return Some(Request::WithPaused(work)),
                    Err(NotNow::Refused(refused)) => work(Err(refused)),
                };
                if !was_paused {
                    self.resume(control);
                }
                deliver();
            }
        }
        None
    }

    fn pause(&self, control: &Control, output: &Output) -> Result<(), NotNow> {
        if control.status.get() == State::Paused {
            return Ok(());
        }
        // A vCPU may wait for the console's reader, who may not be reading.
        output.set_patient(false);
        self.notify.gate.close();
        self.notify.kick_vcpus();
        let parked = self.notify.gate.wait_for(self.vcpus.len(), PATIENCE);
        output.set_patient(true);
        match parked {
            Ok(()) => {}
            Err(gate::NotParked::Ending) => return Err(NotNow::Ending),
            Err(gate::NotParked::Late(late)) => {
                let of = self.vcpus.len();
                let seconds = PATIENCE.as_secs();
                let why = format!("{late} of {of} vCPUs came to no instruction boundary in {seconds} s; it runs on");
                return Err(NotNow::Refused(Refused::Failed(why)));
            }
        }
        self.board.hold_still();
        self.set_breakpoints(control, false);
        if let Err(why) = self.mark_stopped() {
            self.resume(control);
            return Err(NotNow::Refused(Refused::Failed(why)));
        }
        control.status.set(State::Paused);
        tracing::info!(id = self.config.id, "VM pauses");
        Ok(())
    }

    /// Does nothing while a debugger holds the VM.
    fn resume(&self, control: &Control) {
        if control.debugging.holds() {
            return;
        }
        self.set_breakpoints(control, true);
        self.board.let_go();
        self.notify.gate.open();
        if control.status.get() == State::Paused {
            control.status.set(State::Running);
            tracing::info!(id = self.config.id, "VM goes on");
        }
    }

    /// The first moments of a VM that can be debugged, whose vCPUs wait at the gate. Returns how it ended already.
    fn start_debugged(&self, control: &Control, output: &Output) -> Option<End> {
        match self.pause(control, output) {
            Ok(()) => {}
            Err(NotNow::Ending) => return Some(next_end(control, self.notify.generation)),
            Err(NotNow::Refused(refused)) => return Some(End::Failed(refused.to_string())),
        }
        if control.debugging.take_wait_at_start() {
            control.debugging.hold();
            control.debugging.notify();
        } else {
            self.resume(control);
        }
        None
    }

    /// Puts the debugger's breakpoints in force, or takes them away.
    fn set_breakpoints(&self, control: &Control, on: bool) {
        if !control.debugging.is_possible() {
            return;
        }
        let Plan { debug, held } = control.debugging.plan();
        self.notify.gate.hold(if on { held } else { 0 });
        for (cpu, vcpu) in self.vcpus.iter().enumerate() {
            let wanted = if on { debug.get(cpu).cloned().unwrap_or_default() } else { GuestDebug::default() };
            if let Err(error) = lock(vcpu).set_debug(&wanted) {
                tracing::warn!("vCPU {cpu} runs without the debugger's breakpoints: {error}");
            }
        }
    }

    fn paused(&self) -> Paused<'_> {
        Paused {
            config: self.config,
            engine: self.engine,
            vm: self.vm,
            memory: self.memory,
            board: self.board,
            vcpus: self.vcpus.iter().map(|vcpu| lock(vcpu)).collect(),
            tables: self.tables,
            history: &self.history,
        }
    }

    /// Tells the guest, in each vCPU's kvmclock, that time will have passed without it: its watchdogs then do
    /// not take the pause for a lockup. It is written on pausing, so that it is in a snapshot too.
    fn mark_stopped(&self) -> Result<(), String> {
        for (cpu, vcpu) in self.vcpus.iter().enumerate() {
            let state = lock(vcpu).state().map_err(|error| format!("cannot read vCPU {cpu}: {error}"))?;
            let Some(clock) = state.msr(msr::KVM_SYSTEM_TIME_NEW).filter(|value| value & 1 != 0) else { continue };
            let flags = GuestAddress((clock & !1).wrapping_add(CLOCK_FLAGS));
            // A guest that put its clock where there is no memory gets no flag.
            if let Ok(value) = self.memory.read_obj::<u8>(flags) {
                let _ = self.memory.write_obj(value | GUEST_STOPPED, flags);
                self.vm.memory_written(flags.0, 1);
            }
        }
        Ok(())
    }
}

/// Waits for the event that ends VM number `generation`, which has been sent or will be at once. Requests
/// that come before it wait for the next VM.
fn next_end(control: &Control, generation: u32) -> End {
    loop {
        match control.events.recv().expect("the control holds a sender itself") {
            Event::Outside(end) => return end,
            Event::Vm { generation: from, end } if from == generation => return end,
            Event::Vm { .. } | Event::Stopped { .. } => {}
            Event::Request(request) => lock(&control.deferred).push_back(request),
        }
    }
}
