//! `anyvisor run`: one VM from its options to its exit code.

use crate::cli::RunOptions;
use crate::control::runtime::{Claim, Wanted};
use crate::control::stat;
use crate::detach::Background;
use crate::engines::Chosen;
use crate::{detach, engines, signals, terminal};
use anyvisor_vmm::config::Serial;
use anyvisor_vmm::console::{Input, Output};
use anyvisor_vmm::control::{Identity, Server, statistics};
use anyvisor_vmm::machine::Debugger;
use anyvisor_vmm::snapshot::Snapshot;
use anyvisor_vmm::{Config, End, Error, Remote, Result, gdb, machine};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Runs the VM that `options` describe; returns the process's exit code.
pub fn command(options: RunOptions) -> Result<u8> {
    if options.detach && options.serial == Some(Serial::Stdio) {
        return Err(Error::user("a detached VM has no terminal; leave --serial stdio out, and use anyvisor console"));
    }
    let background = match options.detach.then(detach::begin).transpose()? {
        Some(detach::Side::Parent(code)) => return Ok(code),
        Some(detach::Side::Child(background)) => Some(background),
        None => None,
    };
    let snapshot = options.restore.as_deref().map(|folder| open_snapshot(folder, options.verify_first)).transpose()?;
    let config = match (&snapshot, &options.restore) {
        (Some(snapshot), Some(folder)) => options.restored(&snapshot.manifest().machine, folder)?,
        _ => options.config(),
    };
    config.validate()?;
    let chosen = engines::open(options.engine)?;
    let output = open_output(&config.serial)?;
    let gdb = options.gdb.as_ref().map(gdb::Listener::new).transpose()?;
    let surroundings =
        Surroundings { output, limit: None, api: options.api(), gdb, measure: options.stat, background, control: None };
    let end = run_vm(&config, snapshot.as_ref(), &chosen, surroundings)?;
    Ok(exit_code(&config, &end))
}

/// Told a VM's control.
pub type TakeControl = Box<dyn FnOnce(&Remote)>;

/// What a VM has to do with on the host.
pub struct Surroundings {
    /// Takes the serial console's output.
    pub output: Box<dyn Write + Send>,
    /// When the VM is ended at the latest.
    pub limit: Option<Duration>,
    /// Where the control socket goes.
    pub api: Wanted,
    /// Where to wait for a debugger.
    pub gdb: Option<gdb::Listener>,
    /// Count what intercepts guest code, and print it at the end.
    pub measure: bool,
    /// For a VM that is to run in the background.
    pub background: Option<Background>,
    /// Given the VM's control before it is built.
    pub control: Option<TakeControl>,
}

fn open_snapshot(folder: &Path, verify: bool) -> Result<Arc<Snapshot>> {
    let snapshot = Snapshot::open(folder)?;
    if verify {
        snapshot.verify(&AtomicBool::new(false))?;
    }
    Ok(Arc::new(snapshot))
}

/// Runs one VM, from the beginning or from `snapshot`; for [`Serial::Stdio`] its console reads stdin. Signals
/// end it. The terminal is as it was when this returns, and untouched until the VM is built.
pub fn run_vm(
    config: &Config,
    snapshot: Option<&Arc<Snapshot>>,
    chosen: &Chosen,
    surroundings: Surroundings,
) -> Result<End> {
    let Surroundings { output, limit, api, gdb, measure, background, control: take_control } = surroundings;
    let (control, remote) = machine::control();
    // Before any thread starts, so that all inherit the mask.
    signals::end_vm_on_signals(remote.clone())?;
    if let Some(take) = take_control {
        take(&remote);
    }
    if let Some(limit) = limit {
        let remote = remote.clone();
        std::thread::spawn(move || {
            std::thread::sleep(limit);
            remote.stop();
        });
    }
    let claimed = Claim::new(&config.id, &api)?;
    let output = Output::new(output).map_err(|e| Error::host("cannot start the serial output thread", e))?;
    let output = Arc::new(output);
    let input = Input::new();
    let (claim, server) = match claimed {
        None => (None, None),
        Some((claim, listener)) => {
            let identity = identity(config, chosen);
            let server = Server::start(listener, identity, remote.clone(), output.clone(), input.clone())
                .map_err(|e| Error::host("cannot start the control socket's thread", e))?;
            (Some(claim), Some(server))
        }
    };
    if measure {
        remote.measure_from_start();
    }
    let (debugger, how) = match gdb {
        None => (None, None),
        Some(listener) => {
            let how = format!("{} waits for gdb: gdb -ex 'target remote {listener}'", config.id);
            (Some(debug(listener, &remote, config.cpus)?), Some(how))
        }
    };
    let mut raw = None;
    let built = || {
        if let Some(note) = &chosen.note {
            eprintln!("anyvisor: {note}");
        }
        if let Some(how) = how {
            eprintln!("anyvisor: {how}");
        }
        if config.serial == Serial::Stdio {
            raw = open_input(&input, &remote)?;
        }
        match background {
            Some(background) => background.go(&config.id, claim.as_ref()),
            None => Ok(()),
        }
    };
    let end = match snapshot {
        Some(snapshot) => machine::go_on(config, snapshot, &*chosen.engine, &output, &input, &control, built),
        None => machine::run(config, &*chosen.engine, &output, &input, &control, built),
    };
    drop(raw);
    if measure && end.is_ok() {
        eprint!("{}", stat::table(&statistics(&remote)));
    }
    drop(debugger);
    // Clients get their last answers while the name is still ours.
    drop(server);
    drop(claim);
    end
}

/// Lets who connects to `listener` debug the VM behind `remote`, which has not started.
fn debug(listener: gdb::Listener, remote: &Remote, cpus: u32) -> Result<gdb::Server> {
    let debugger = Debugger::new(remote.clone()).map_err(|e| Error::host("cannot prepare for gdb", e))?;
    gdb::Server::start(listener, debugger, cpus).map_err(|e| Error::host("cannot start gdb's thread", e))
}

fn identity(config: &Config, chosen: &Chosen) -> Identity {
    Identity {
        id: config.id.clone(),
        engine: chosen.engine.name().into(),
        cpus: config.cpus,
        memory: config.memory,
        version: env!("CARGO_PKG_VERSION").into(),
    }
}

fn open_output(serial: &Serial) -> Result<Box<dyn Write + Send>> {
    Ok(match serial {
        Serial::Stdio => Box::new(std::io::stdout()),
        Serial::File(path) => Box::new(File::create(path).map_err(|e| {
            Error::user(format!("cannot write serial console '{}': {e}; check --serial", path.display()))
        })?),
        Serial::Null => Box::new(std::io::sink()),
    })
}

/// Feeds stdin to the guest: a terminal goes raw until the returned guard is dropped.
fn open_input(input: &Arc<Input>, remote: &Remote) -> Result<Option<terminal::Raw>> {
    let raw = if std::io::stdin().is_terminal() {
        Some(terminal::Raw::enter().map_err(|e| Error::host("cannot switch the terminal to raw mode", e))?)
    } else {
        None
    };
    terminal::spawn_reader(input.clone(), remote.clone(), raw.is_some())
        .map_err(|e| Error::host("cannot start the serial input thread", e))?;
    Ok(raw)
}

/// The exit code for `end`, after saying on stderr what needs saying.
pub fn exit_code(config: &Config, end: &End) -> u8 {
    let id = &config.id;
    match end {
        End::PowerOff | End::Reboot => 0,
        // The system keeps eight bits of an exit code.
        End::DebugExit(value) => anyvisor_vmm::debug_exit_code(*value) as u8,
        End::TripleFault(dump) => {
            eprintln!("anyvisor: {id}: triple fault\n{dump}");
            3
        }
        End::Failed(why) => {
            eprintln!("anyvisor: {id}: {why}");
            1
        }
        End::Stopped | End::Left => 1,
    }
}
