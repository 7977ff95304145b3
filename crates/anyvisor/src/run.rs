//! `anyvisor run`: one VM from its options to its exit code.

use crate::cli::RunOptions;
use crate::engines::Chosen;
use crate::{engines, signals, terminal};
use anyvisor_vmm::config::Serial;
use anyvisor_vmm::console::{Input, Output};
use anyvisor_vmm::snapshot::Snapshot;
use anyvisor_vmm::{Config, End, Error, Remote, Result, machine};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Runs the VM that `options` describe; returns the process's exit code.
pub fn command(options: RunOptions) -> Result<u8> {
    let snapshot = options.restore.as_deref().map(|folder| open_snapshot(folder, options.verify_first)).transpose()?;
    let config = match (&snapshot, &options.restore) {
        (Some(snapshot), Some(folder)) => options.restored(&snapshot.manifest().machine, folder)?,
        _ => options.config(),
    };
    config.validate()?;
    let chosen = engines::open(options.engine)?;
    let output = open_output(&config.serial)?;
    let end = run_vm(&config, snapshot.as_ref(), &chosen, output, None)?;
    Ok(exit_code(&config, &end))
}

fn open_snapshot(folder: &Path, verify: bool) -> Result<Arc<Snapshot>> {
    let snapshot = Snapshot::open(folder)?;
    if verify {
        snapshot.verify(&AtomicBool::new(false))?;
    }
    Ok(Arc::new(snapshot))
}

/// Runs one VM, from the beginning or from `snapshot`, with its console at `output` and, for [`Serial::Stdio`], stdin. Signals end it, and so does
/// the time `limit`. The terminal is as it was when this returns, and untouched until the VM is built.
pub fn run_vm(
    config: &Config,
    snapshot: Option<&Arc<Snapshot>>,
    chosen: &Chosen,
    output: Box<dyn Write + Send>,
    limit: Option<Duration>,
) -> Result<End> {
    let (control, remote) = machine::control();
    // Before any thread starts, so that all inherit the mask.
    signals::end_vm_on_signals(remote.clone())?;
    if let Some(limit) = limit {
        let remote = remote.clone();
        std::thread::spawn(move || {
            std::thread::sleep(limit);
            remote.stop();
        });
    }
    let output = Output::new(output).map_err(|e| Error::host("cannot start the serial output thread", e))?;
    let input = Input::new();
    let mut raw = None;
    let output = Arc::new(output);
    let built = || {
        if let Some(note) = &chosen.note {
            eprintln!("anyvisor: {note}");
        }
        if config.serial == Serial::Stdio {
            raw = open_input(&input, &remote)?;
        }
        Ok(())
    };
    let end = match snapshot {
        Some(snapshot) => machine::go_on(config, snapshot, &*chosen.engine, &output, &input, &control, built),
        None => machine::run(config, &*chosen.engine, &output, &input, &control, built),
    };
    drop(raw);
    end
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
