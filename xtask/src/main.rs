//! The project's own commands, called as `cargo xtask COMMAND`.
//!
//! - `test`: everything the tests need, and all tests; what CI runs.
//! - `tidy`: the rules of ARCHITECTURE.md that a compiler does not check.
//! - `bench`: guestbench natively, in QEMU's TCG and in anyvisor, into docs/performance.md.
//! - `programs`: gcc, python3, sqlite3, openssl and 7z in a guest, likewise.
//! - `cpus`: `make -j` of a C project with 1, 2 and 8 vCPUs, likewise; and stress-ng.
//! - `boots`: Linux to a shell and off, fifty times.
//! - `disks`: fio on disks of guests and on the host's file.
//! - `crash-disks`: what was flushed is there when anyvisor is killed.
//! - `restore`: how long a restore takes.
//! - `start`: how long a start takes, and its memory.
//! - `network`: how fast bytes go through the rootless network, and through QEMU's.
//! - `test-nested`: the KVM engine on emulated AMD-V or VT-x.
//! - `suites`: CPU tests written by others, into docs/conformance.md.
//! - `fuzz-insn`: the per-instruction differential fuzzer.
#![forbid(unsafe_code)]

mod bench;
mod boots;
mod chart;
mod cpus;
mod disks;
mod measure;
mod nested;
mod network;
mod programs;
mod report;
mod restore;
mod start;
mod suites;
mod test;
mod tidy;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own commands")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what the tests need, and runs all tests
    Test(test::Options),
    /// Checks dependencies, quarantines, headers and sizes
    Tidy,
    /// Compares native, QEMU and anyvisor; writes docs/performance.md and its chart
    Bench(bench::Options),
    /// Compares Debian's gcc, python3, sqlite3, openssl and 7z, native, in QEMU and in anyvisor; checks what they make
    Programs(programs::Options),
    /// Compares how fast a C project is made with 1, 2 and 8 vCPUs; or has stress-ng at work
    Cpus(cpus::Options),
    /// Boots Linux many times; all must end well
    Boots(boots::Options),
    /// Compares disks: fio in anyvisor's guest, in QEMU's, and on the host's file
    Disks(disks::Options),
    /// Kills anyvisor while its guest writes; what was flushed must be in its images
    CrashDisks(disks::CrashOptions),
    /// Measures restores, from the process's start to the guest's first output
    Restore(restore::Options),
    /// Measures starts, from the process's start to the guest's first output, and the process's memory
    Start(start::Options),
    /// Measures the rootless network, against QEMU's
    Network(network::Options),
    /// Tests the KVM engine in a Linux on an emulated CPU with AMD-V or VT-x
    TestNested(nested::Options),
    /// Runs CPU tests written by others, which are kept outside of the repository
    Suites(suites::Options),
    /// Compares random instructions on the host CPU, the interpreter and the translator
    FuzzInsn {
        /// Options of the fuzzer; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Test(options) => test::test(&options),
        Task::Tidy => tidy::tidy(),
        Task::Bench(options) => bench::bench(&options),
        Task::Programs(options) => programs::programs(&options),
        Task::Cpus(options) => cpus::cpus(&options),
        Task::Boots(options) => boots::boots(&options),
        Task::Disks(options) => disks::disks(&options),
        Task::CrashDisks(options) => disks::crash(&options),
        Task::Restore(options) => restore::restore(&options),
        Task::Start(options) => start::start(&options),
        Task::Network(options) => network::network(&options),
        Task::TestNested(options) => nested::nested(&options),
        Task::Suites(options) => suites::suites(&options),
        Task::FuzzInsn { options } => fuzz_insn(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fuzz_insn(options: &[String]) -> Result<()> {
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "anyvisor-insn-fuzz", "--"]).args(options);
    run(&mut command)
}

/// The repository's root folder.
fn root() -> PathBuf {
    anyvisor_tests::assets::root()
}

/// Cargo, in the repository.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command with its output shown.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("starting {name}"))?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        bail!("{name} {} failed ({status})", arguments.join(" "));
    }
    Ok(())
}

/// Installs QEMU and its tools together: of different versions, as hosts with backports have them, one would remove the other.
fn install_qemu() -> Result<()> {
    install("qemu-system-x86_64", QEMU)?;
    install("qemu-img", QEMU)
}

/// Debian's packages of QEMU.
const QEMU: &[&str] = &["qemu-system-x86", "qemu-utils"];

/// Installs Debian packages when a program they bring is missing: as root only, since nobody else can.
fn install(program: &str, packages: &[&str]) -> Result<()> {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().context("starting sh")?;
    if found.status.success() {
        return Ok(());
    }
    eprintln!("xtask: installing {}", packages.join(", "));
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments);
        anyvisor_tests::assets::run(&mut command)
    };
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend_from_slice(packages);
    apt(&arguments)
        .or_else(|_| apt(&["update"]).and_then(|()| apt(&arguments)))
        .with_context(|| format!("{program} is missing; install {} (as root)", packages.join(" ")))
}
