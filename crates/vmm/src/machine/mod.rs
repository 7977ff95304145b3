//! One VM's life: built from a [`Config`], run, and ended for one reason.
//!
//! ```text
//!   build ──> run ──> ending ──> End            (power off, debug exit, triple fault, failure, stop)
//!     ^                  │
//!     └──────────────────┘                      (reset, with --on-reboot restart)
//! ```
//!
//! The thread that calls [`run`] owns the VM. vCPUs, chips and the outside only send it events; the first
//! event that ends the VM decides how it ends, later ones are dropped. So that a guest does not run on far
//! beyond the access that ended it, the sender also kicks every vCPU out of guest code.
//!
//! Threads: one per vCPU, one for the timers of all chips ([`timer`]), the serial writer, and outside this
//! crate the serial reader. A vCPU's thread ends when the VM ends, or with an event of its own, also if it
//! panics: the owner never waits for an event that cannot come.

mod board;
mod timer;
mod vcpu;

use crate::config::{OnReboot, show_size};
use crate::console::{Input, Output};
use crate::{Config, Error, Result, acpi, boot, memory};
use anyvisor_devices::PowerEvent;
use anyvisor_engine::{Engine, Kicker, Vcpu, VcpuId};
use board::Board;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    PowerOff,
    /// A reset, without `--on-reboot restart`.
    Reboot,
    /// A write to the debug-exit port.
    DebugExit(u32),
    /// The registers and code at the fault, for people.
    TripleFault(String),
    /// The engine or the host could not go on, and why.
    Failed(String),
    /// [`Remote::stop`].
    Stopped,
    /// [`Remote::leave`].
    Left,
}

/// What is sent to the owner.
enum Event {
    /// From VM number `generation`; those of an earlier one are stale.
    Vm {
        generation: u32,
        end: End,
    },
    Outside(End),
}

/// The owner's end of a VM's control.
pub struct Control {
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
}

/// Ends the VM from outside, from any thread.
#[derive(Clone)]
pub struct Remote(mpsc::Sender<Event>);

impl Remote {
    /// Ends the VM now, as a signal does.
    pub fn stop(&self) {
        // Nobody listens any more if the VM has ended.
        let _ = self.0.send(Event::Outside(End::Stopped));
    }
    /// Ends the VM now, because the user at its console wants to leave.
    pub fn leave(&self) {
        let _ = self.0.send(Event::Outside(End::Left));
    }
}

/// A VM's control, before there is a VM.
pub fn control() -> (Control, Remote) {
    let (sender, events) = mpsc::channel();
    (Control { events, sender: sender.clone() }, Remote(sender))
}

/// Builds the VM that `config` describes on `engine` and runs it until it ends. The console is at `output`
/// and `input`. `built` is called once, before the guest starts for the first time.
///
/// # Errors
/// The VM cannot be built: the user's mistake, or the host's failure.
pub fn run(
    config: &Config,
    engine: &dyn Engine,
    output: &Arc<Output>,
    input: &Arc<Input>,
    control: &Control,
    built: impl FnOnce() -> Result<()>,
) -> Result<End> {
    config.validate()?;
    let mut generation = 0;
    let mut built = Some(built);
    let end = loop {
        let notify = Arc::new(Notify::new(generation, control.sender.clone()));
        let machine = Machine::build(config, engine, output, input, notify)?;
        if let Some(built) = built.take() {
            built()?;
        }
        tracing::info!(id = config.id, engine = engine.name(), memory = show_size(config.memory), "VM runs");
        let end = machine.run(input, control, output);
        if end != End::Reboot || config.on_reboot == OnReboot::Exit {
            break end;
        }
        tracing::info!(id = config.id, "VM restarts");
        generation += 1;
    };
    output.finish();
    Ok(end)
}

/// How the parts of one VM tell its owner that it ends.
struct Notify {
    generation: u32,
    /// Guest code should not run any more.
    ending: AtomicBool,
    sender: mpsc::Sender<Event>,
    kickers: Mutex<Vec<Kicker>>,
}

impl Notify {
    fn new(generation: u32, sender: mpsc::Sender<Event>) -> Notify {
        Notify { generation, ending: AtomicBool::new(false), sender, kickers: Mutex::default() }
    }

    fn end(&self, end: End) {
        // The owner holds the receiver as long as the VM lives; without it nobody asks any more.
        let _ = self.sender.send(Event::Vm { generation: self.generation, end });
        self.stop_vcpus();
    }

    fn power(&self, event: PowerEvent) {
        self.end(match event {
            PowerEvent::Reset => End::Reboot,
            PowerEvent::PowerOff => End::PowerOff,
            PowerEvent::DebugExit(value) => End::DebugExit(value),
        });
    }

    fn stop_vcpus(&self) {
        self.ending.store(true, Ordering::SeqCst);
        lock(&self.kickers).iter().for_each(Kicker::kick);
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }
}

/// A VM that is built and not yet running.
struct Machine {
    memory: GuestMemoryMmap,
    board: Arc<Board>,
    vcpus: Vec<Box<dyn Vcpu>>,
    notify: Arc<Notify>,
}

impl Machine {
    fn build(
        config: &Config,
        engine: &dyn Engine,
        output: &Arc<Output>,
        input: &Arc<Input>,
        notify: Arc<Notify>,
    ) -> Result<Machine> {
        let supported = engine.supported_cpuid();
        let table = |cpu| config.cpu_model.table(&supported, config.cpus, cpu).map_err(|e| Error::user(e.to_string()));
        let memory = memory::allocate(config.memory)?;
        let rsdp = acpi::write(&memory, config.cpus);
        let entry = boot::load(
            &memory,
            &boot::Boot {
                kernel: &config.kernel,
                initrd: config.initrd.as_deref(),
                command_line: &config.command_line,
                ram: config.memory,
                rsdp,
            },
        )?;
        let vm = engine.create_vm(memory.clone())?;
        let board = Arc::new(Board::new(config, vm.clone(), output, input, &notify));
        let mut vcpus = Vec::new();
        for cpu in 0..config.cpus {
            let mut vcpu = vm.create_vcpu(VcpuId(cpu), &table(cpu)?)?;
            if cpu == 0 {
                let mut state = vcpu.state()?;
                entry.apply(&mut state);
                vcpu.set_state(&state)?;
            }
            lock(&notify.kickers).push(vcpu.kicker());
            vcpus.push(vcpu);
        }
        Ok(Machine { memory, board, vcpus, notify })
    }

    /// Runs until the VM ends, and tears it down.
    fn run(self, input: &Arc<Input>, control: &Control, output: &Output) -> End {
        let Machine { memory, board, vcpus, notify } = self;
        let mut threads = Vec::new();
        let timer_board = board.clone();
        let spawned = std::thread::Builder::new().name("timer".into()).spawn(move || timer_board.run_timers());
        match spawned {
            Ok(thread) => threads.push(thread),
            Err(error) => notify.end(End::Failed(format!("cannot start the timer thread: {error}"))),
        }
        for (cpu, vcpu) in vcpus.into_iter().enumerate() {
            match vcpu::spawn(cpu, vcpu, board.clone(), memory.clone(), notify.clone()) {
                Ok(thread) => threads.push(thread),
                Err(error) => notify.end(End::Failed(format!("cannot start the thread of vCPU {cpu}: {error}"))),
            }
        }
        board.connect_input();

        let end = next_end(control, notify.generation);
        tracing::info!(?end, "VM ends");
        notify.stop_vcpus();
        input.set_ready(None);
        board.stop_timers();
        if matches!(end, End::Stopped | End::Left) {
            output.abandon_after(Duration::from_millis(200));
        }
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the VM panicked");
            }
        }
        end
    }
}

/// Waits for the first event that ends VM number `generation`.
fn next_end(control: &Control, generation: u32) -> End {
    loop {
        match control.events.recv().expect("the control holds a sender itself") {
            Event::Outside(end) => return end,
            Event::Vm { generation: from, end } if from == generation => return end,
            Event::Vm { .. } => {}
        }
    }
}

/// Every lock here guards data that stays valid if its holder panics, and the panic itself ends the VM.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests;
