//! `anyvisor`: runs virtual machines on this host.
//!
//! This file knows the commands, the exit codes and, alone in the workspace, the engines by name.
//!
//! Exit codes: 0 when the guest powers off or reboots, (v << 1) | 1 for a guest's debug exit with v,
//! 2 for a user's mistake, 3 for a triple fault, 1 otherwise. `exec` has its command's own.

mod cli;
mod control;
mod detach;
mod doctor;
mod engines;
mod exec;
mod quickstart;
mod run;
mod signals;
mod terminal;

use anyvisor_vmm::Error;
use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;

/// Exit code for a user's mistake.
const MISTAKE: u8 = 2;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return cli::report(&error),
    };
    share_one_heap();
    terminal::restore_on_fatal_signals();
    init_log(cli.command.verbosity());
    let result = match cli.command {
        cli::Command::Run(options) => run::command(*options),
        cli::Command::Ps(options) => control::commands::ps(&options),
        cli::Command::Pause(vm) => control::commands::pause(&vm.id),
        cli::Command::Resume(vm) => control::commands::resume(&vm.id),
        cli::Command::Stop(options) => control::commands::stop(&options),
        cli::Command::Snapshot(options) => control::commands::snapshot(&options),
        cli::Command::Stat(options) => control::stat::command(&options),
        cli::Command::Device(command) => control::devices::command(&command),
        cli::Command::Balloon(options) => control::balloon::command(&options),
        cli::Command::Console(vm) => control::console::attach(&vm.id),
        cli::Command::Doctor => doctor::command(),
        cli::Command::Quickstart(options) => quickstart::command(options),
        cli::Command::Exec(options) => Ok(exec::command(&options)),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("anyvisor: {error}");
            ExitCode::from(match error {
                Error::User(_) | Error::Engine(anyvisor_engine::Error::Unsupported(_)) => MISTAKE,
                _ => 1,
            })
        }
    }
}

/// Lets all threads allocate from the process's first heap, which grows in large steps. glibc gives each thread a heap
/// of its own otherwise, and has that grow by a system call for each few pages: some 1,800 in a boot of Linux under
/// the translator, whose vCPU thread is the one that allocates.
fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets numbers, before there are other threads.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TOP_PAD, 1 << 20);
    }
}

/// Logs go to stderr: warnings always, more with each `-v`, or what `ANYVISOR_LOG` says.
fn init_log(verbosity: u8) {
    let default = ["warn", "info", "debug", "trace"][usize::from(verbosity.min(3))];
    let filter = tracing_subscriber::EnvFilter::try_from_env("ANYVISOR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(terminal::log_writer)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
