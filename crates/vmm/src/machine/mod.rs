//! One VM's life: built from a [`Config`], run, and ended for one reason.
//!
//! ```text
//!             pause
//!   build ──> run <──> paused ──> ending ──> End   (power off, debug exit, triple fault, failure, stop)
//!     ^        └────────────────────^ │
//!     └───────────────────────────────┘            (reset, with --on-reboot restart)
//! ```
//!
//! The thread that calls [`run`] owns the VM. vCPUs, chips and the outside only send it events; the first
//! event that ends the VM decides how it ends, later ones are dropped. So that a guest does not run on far
//! beyond the access that ended it, the sender also kicks every vCPU out of guest code. Requests from the
//! outside ([`Remote`]) are events too: the owner alone pauses, resumes and looks inside.
//!
//! Threads: one per vCPU, one for the timers of all chips ([`timer`]), one per virtio device ([`devices`]), the
//! serial writer, and outside this module the serial reader and the control socket's. A vCPU's thread ends when the
//! VM ends, or with an event of its own, also if it panics: the owner never waits for an event that cannot come.
//!
//! A paused VM stands still: its vCPU threads wait at the [`gate`], their vCPUs unlocked, and the board lets
//! neither timers nor input in.

mod board;
mod debugging;
mod devices;
mod gate;
mod live;
mod measuring;
mod remote;
mod restore;
mod timer;
mod variables;
mod vcpu;

use crate::balloon::{BalloonModel, Lending};
use crate::config::{Console, OnReboot, show_size};
use crate::console::{Input, Output};
use crate::ports::PortsModel;
use crate::rng::RngModel;
use crate::snapshot::{History, Snapshot};
use crate::variables::Variables;
use crate::virtio::Model;
use crate::vsock::VsockModel;
use crate::{Config, Error, Result, acpi, boot, disk, layout, memory, net, share};
use anyvisor_devices::PowerEvent;
use anyvisor_engine::{Engine, Kicker, Stop, Vcpu, VcpuId, Vm};
use anyvisor_x86::Cpuid;
use board::Outside;
pub use board::{Board, BoardState, Chips, Plugged};
use debugging::Debugging;
pub use debugging::{Debugger, Plan};
use devices::Farewell;
use gate::Gate;
use live::Live;
use measuring::Measuring;
pub use remote::{Paused, Refused, Remote, State};
use remote::{Request, Status};
use restore::Verification;
use std::collections::VecDeque;
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
    /// A vCPU of VM number `generation` has stopped for the debugger.
    Stopped {
        generation: u32,
    },
    Outside(End),
    Request(Request),
}

/// The owner's end of a VM's control.
pub struct Control {
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    status: Arc<Status>,
    debugging: Arc<Debugging>,
    measuring: Arc<Measuring>,
    lending: Arc<Lending>,
    /// Requests that came as a VM was ending, for the next one.
    deferred: Mutex<VecDeque<Request>>,
}

/// A VM's control, before there is a VM.
pub fn control() -> (Control, Remote) {
    let (sender, events) = mpsc::channel();
    let status = Arc::new(Status::new());
    let debugging = Arc::new(Debugging::new());
    let measuring = Arc::new(Measuring::default());
    let lending = Arc::new(Lending::default());
    let remote = Remote {
        sender: sender.clone(),
        status: status.clone(),
        debugging: debugging.clone(),
        measuring: measuring.clone(),
        lending: lending.clone(),
    };
    (Control { events, sender, status, debugging, measuring, lending, deferred: Mutex::default() }, remote)
}

impl Control {
    /// Nobody is left to answer requests: drops those that wait, and lets later ones see why.
    fn close(&self) {
        self.status.set(State::Ended);
        lock(&self.deferred).clear();
        while self.events.try_recv().is_ok() {}
        self.debugging.notify();
    }
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
    let end = run_to_end(config, None, engine, output, input, control, built);
    control.close();
    if end.is_ok() {
        output.finish();
    }
    end
}

/// As [`run`], but the VM goes on from `snapshot`, whose machine `config` must describe.
///
/// # Errors
/// As for [`run`], and when the engine on this host cannot run what was saved: everything that differs.
pub fn go_on(
    config: &Config,
    snapshot: &Arc<Snapshot>,
    engine: &dyn Engine,
    output: &Arc<Output>,
    input: &Arc<Input>,
    control: &Control,
    built: impl FnOnce() -> Result<()>,
) -> Result<End> {
    let end = run_to_end(config, Some(snapshot.clone()), engine, output, input, control, built);
    control.close();
    if end.is_ok() {
        output.finish();
    }
    end
}

fn run_to_end(
    config: &Config,
    mut snapshot: Option<Arc<Snapshot>>,
    engine: &dyn Engine,
    output: &Arc<Output>,
    input: &Arc<Input>,
    control: &Control,
    built: impl FnOnce() -> Result<()>,
) -> Result<End> {
    config.validate()?;
    let mut generation = 0;
    let mut built = Some(built);
    loop {
        control.status.set(State::Starting);
        let notify = Arc::new(Notify::new(generation, control));
        let machine = match snapshot.take() {
            Some(snapshot) => Machine::restore(config, &snapshot, engine, output, input, notify)?,
            None => Machine::build(config, engine, output, input, notify)?,
        };
        if let Some(built) = built.take() {
            built()?;
        }
        tracing::info!(id = config.id, engine = engine.name(), memory = show_size(config.memory), "VM runs");
        let end = machine.run(config, engine.name(), input, control, output);
        if end != End::Reboot || config.on_reboot == OnReboot::Exit {
            return Ok(end);
        }
        tracing::info!(id = config.id, "VM restarts");
        generation += 1;
    }
}

/// How the parts of one VM tell its owner that it ends, and where its vCPU threads wait.
struct Notify {
    generation: u32,
    sender: mpsc::Sender<Event>,
    gate: Gate,
    kickers: Mutex<Vec<Kicker>>,
    debugging: Arc<Debugging>,
    lending: Arc<Lending>,
}

impl Notify {
    fn new(generation: u32, control: &Control) -> Notify {
        let (sender, debugging, lending) = (control.sender.clone(), control.debugging.clone(), control.lending.clone());
        Notify { generation, sender, gate: Gate::default(), kickers: Mutex::default(), debugging, lending }
    }

    /// vCPU `cpu` has stopped for the debugger. It must come to the gate next.
    fn stopped(&self, cpu: usize, stop: Stop) {
        self.debugging.stopped(cpu, stop);
        self.gate.close();
        // As in `end`.
        let _ = self.sender.send(Event::Stopped { generation: self.generation });
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
        self.gate.end();
        self.kick_vcpus();
    }

    fn kick_vcpus(&self) {
        lock(&self.kickers).iter().for_each(Kicker::kick);
    }
}

/// A VM that is built and not yet running.
struct Machine {
    memory: GuestMemoryMmap,
    vm: Arc<dyn Vm>,
    board: Arc<Board>,
    vcpus: Vec<Box<dyn Vcpu>>,
    /// What each vCPU shows as its CPUID.
    tables: Vec<Cpuid>,
    history: History,
    /// What it goes on from, if its memory's checksums are still to be compared.
    unverified: Option<Arc<Snapshot>>,
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
        let memory = memory::allocate(config.memory, config.huge_pages, engine.wants_files())?;
        let memory = match &config.firmware {
            Some(firmware) => boot::with_flash(memory, &firmware.image)?,
            None => memory,
        };
        room_for_test_device(config, &memory)?;
        let entry = load(config, &memory)?;
        let vm = engine.create_vm(memory.clone())?;
        let outside = Outside { output, input, notify: &notify };
        let parts = Parts::open(config, &memory, &outside)?;
        let board = Arc::new(Board::new(config, vm.clone(), &memory, parts, &outside, 0)?);
        let choice = match memory::flash_size(&memory) {
            0 => config.cpu,
            _ => config.cpu.with_physical_bits_at_most(layout::physical_bits_for_firmware(config.memory)),
        };
        let table = |cpu| choice.table(&supported, config.cpus, cpu).map_err(|e| Error::user(e.to_string()));
        let tables = (0..config.cpus).map(table).collect::<Result<Vec<_>>>()?;
        let mut vcpus = Vec::new();
        for (cpu, table) in (0..).zip(&tables) {
            let mut vcpu = vm.create_vcpu(VcpuId(cpu), table)?;
            if cpu == 0 {
                let mut state = vcpu.state()?;
                entry.apply(&mut state);
                vcpu.set_state(&state)?;
            }
            lock(&notify.kickers).push(vcpu.kicker());
            vcpus.push(vcpu);
        }
        let history = History::new(&memory);
        Ok(Machine { memory, vm, board, vcpus, tables, history, unverified: None, notify })
    }

    /// Runs until the VM ends, and tears it down.
    fn run(self, config: &Config, engine: &str, input: &Arc<Input>, control: &Control, output: &Output) -> End {
        let Machine { memory, vm, board, vcpus, tables, history, unverified, notify } = self;
        let verification = unverified.map(|snapshot| Verification::start(snapshot, notify.clone()));
        let mut vcpus = vcpus;
        control.measuring.begin(&mut vcpus);
        let vcpus: Vec<vcpu::SharedVcpu> = vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        let mut threads = Vec::new();
        if control.debugging.is_possible() {
            // Nobody runs before the owner has set breakpoints.
            notify.gate.close();
        }
        let timer_board = board.clone();
        let spawned = std::thread::Builder::new().name("timer".into()).spawn(move || timer_board.run_timers());
        match spawned {
            Ok(thread) => threads.push(thread),
            Err(error) => notify.end(End::Failed(format!("cannot start the timer thread: {error}"))),
        }
        for device in board.devices() {
            match devices::spawn(device.clone(), notify.clone()) {
                Ok(thread) => threads.push(thread),
                Err(error) => notify.end(End::Failed(format!("cannot start the thread of a device: {error}"))),
            }
        }
        for (cpu, vcpu) in vcpus.iter().enumerate() {
            match vcpu::spawn(cpu, vcpu.clone(), board.clone(), memory.clone(), notify.clone()) {
                Ok(thread) => threads.push(thread),
                Err(error) => notify.end(End::Failed(format!("cannot start the thread of vCPU {cpu}: {error}"))),
            }
        }
        board.connect_input();
        control.status.set(State::Running);

        let live = Live {
            config,
            engine,
            vm: &*vm,
            memory: &memory,
            board: &board,
            vcpus: &vcpus,
            tables: &tables,
            history: Arc::new(Mutex::new(history)),
            notify: &notify,
        };
        let end = live.run(control, output);
        let end = verification.map_or(end.clone(), |verification| verification.judge(end));
        tracing::info!(?end, "VM ends");
        notify.stop_vcpus();
        input.set_ready(None);
        board.stop_timers();
        let farewell = match end {
            End::PowerOff | End::Reboot | End::DebugExit(_) => Farewell::HearOut,
            _ => Farewell::None,
        };
        board.devices().iter().for_each(|device| device.stop(farewell));
        if matches!(end, End::Stopped | End::Left) {
            output.abandon_after(Duration::from_millis(200));
        }
        for thread in threads.into_iter().chain(board.take_threads()) {
            if thread.join().is_err() {
                tracing::error!("a thread of the VM panicked");
            }
        }
        end
    }
}

/// What of a machine reaches out of it: files that are open and locked, networks.
struct Parts {
    /// In the order of their slots.
    models: Vec<Box<dyn Model>>,
    /// With their contents.
    variables: Option<(Variables, Vec<u8>)>,
}

impl Parts {
    /// Opens and locks what `config` names.
    ///
    /// # Errors
    /// [`Error::User`]: which cannot be used, why, and what to do.
    fn open(config: &Config, memory: &GuestMemoryMmap, outside: &Outside<'_>) -> Result<Parts> {
        let models = models(config, outside)?;
        let Some(path) = config.firmware.as_ref().and_then(|firmware| firmware.variables.as_ref()) else {
            return Ok(Parts { models, variables: None });
        };
        if !(1..=layout::FLASH_MAX_BESIDE_VARIABLES).contains(&memory::flash_size(memory)) {
            let most = show_size(layout::FLASH_MAX_BESIDE_VARIABLES);
            return Err(Error::user(format!(
                "--firmware with vars={} takes UEFI firmware of more than 256K and at most {most}; leave vars= out",
                path.display()
            )));
        }
        Ok(Parts { models, variables: Some(Variables::open(path)?) })
    }
}

/// What the virtio devices do, disks first, then networks.
fn models(config: &Config, outside: &Outside<'_>) -> Result<Vec<Box<dyn Model>>> {
    let mut models: Vec<Box<dyn Model>> = Vec::new();
    for disk in disk::open(&config.disks, config.cpus)? {
        models.push(Box::new(disk));
    }
    for net in net::open(&config.nets)? {
        models.push(Box::new(net));
    }
    let screen = (config.console == Console::Virtio).then(|| (outside.output.clone(), outside.input.clone()));
    if screen.is_some() || !config.ports.is_empty() {
        models.push(Box::new(PortsModel::new(&config.ports, screen)?));
    }
    if config.rng {
        models.push(Box::new(RngModel));
    }
    if let Some(address) = &config.vsock {
        models.push(Box::new(VsockModel::new(address)?));
    }
    if let Some(bytes) = config.balloon {
        models.push(Box::new(BalloonModel::new(bytes, outside.notify.lending.clone())?));
    }
    models.extend(share::open(&config.shares)?);
    models.extend(config.channel.as_ref().map(share::channel));
    if models.len() > devices::DEVICES_MAX {
        let (given, most) = (models.len(), devices::DEVICES_MAX);
        return Err(Error::user(format!(
            "{given} disks and other devices are too many; a machine takes {most} in all"
        )));
    }
    Ok(models)
}

/// Refuses flash memory where a test device has its own memory.
fn room_for_test_device(config: &Config, memory: &GuestMemoryMmap) -> Result<()> {
    let (flash, most) = (memory::flash_size(memory), layout::FLASH_MAX_BESIDE_TEST_DEVICE);
    match &config.firmware {
        Some(firmware) if config.test_device && flash > most => Err(Error::user(format!(
            "firmware '{}' of {} lies where --test-device has its memory; give firmware of at most {}, or leave --test-device \
             out",
            firmware.image.display(),
            show_size(flash),
            show_size(most)
        ))),
        _ => Ok(()),
    }
}

/// Puts what `config` boots into memory. Firmware brings its own ACPI tables, and may lie where ours do.
fn load(config: &Config, memory: &GuestMemoryMmap) -> Result<boot::Entry> {
    if let Some(firmware) = &config.firmware {
        return boot::load_firmware(memory, &firmware.image);
    }
    let rsdp = acpi::write(memory, config.cpus, config.memory);
    let boot = boot::Boot {
        kernel: &config.kernel,
        initrd: config.initrd.as_deref(),
        modules: &config.modules,
        command_line: &config.command_line,
        ram: config.memory,
        rsdp,
    };
    boot::load(memory, &boot)
}

/// Every lock here guards data that stays valid if its holder panics, and the panic itself ends the VM.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests;
