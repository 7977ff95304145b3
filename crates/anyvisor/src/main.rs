//! `anyvisor`: runs virtual machines on this host.
//!
//! This file knows the commands, the exit codes and, alone in the workspace, the engines by name.
//!
//! Exit codes: 0 when the guest powers off or reboots, (v << 1) | 1 for a guest's debug exit with v,
//! 2 for a user's mistake, 3 for a triple fault, 1 otherwise.

mod cli;
mod control;
mod detach;
mod doctor;
mod engines;
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
    terminal::restore_on_fatal_signals();
    init_log(cli.command.verbosity());
    let result = match cli.command {
        cli::Command::Run(options) => run::command(options),
        cli::Command::Ps(options) => control::commands::ps(&options),
        cli::Command::Pause(vm) => control::commands::pause(&vm.id),
        cli::Command::Resume(vm) => control::commands::resume(&vm.id),
        cli::Command::Stop(options) => control::commands::stop(&options),
        cli::Command::Snapshot(options) => control::commands::snapshot(&options),
        cli::Command::Console(vm) => control::console::attach(&vm.id),
        cli::Command::Doctor => doctor::command(),
        cli::Command::Quickstart(options) => quickstart::command(options),
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
