//! `cargo xtask bench`: one guest program, `bench/guestbench.c`, run natively, in QEMU's TCG and in
//! anyvisor, in turn, so that a busy host slows all three alike. The result goes to docs/performance.md.
//!
//! Numbers are medians over the runs. A class's figure is the geometric mean of its benchmarks' ratios.

use crate::{cargo, chart, install, install_qemu, measure, report, root, run};
use anyhow::{Context, Result, bail};
use anyvisor_initramfs::Archive;
use anyvisor_tests::{assets, vm};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than the slowest guest takes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(900);
const MEMORY: &str = "512M";

#[derive(clap::Args)]
pub struct Options {
    /// Runs of each of the three; medians are taken
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Only these benchmarks, by name, separated by commas
    #[arg(long)]
    pub only: Option<String>,
    /// How much work, as a factor
    #[arg(long, default_value_t = 1.0)]
    pub scale: f64,
    /// Without QEMU
    #[arg(long)]
    pub no_qemu: bool,
    /// Print the table; leave docs/performance.md as it is
    #[arg(long)]
    pub dry_run: bool,
}

/// Who runs the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Runner {
    Native,
    Qemu,
    Anyvisor,
}

/// One benchmark's times in seconds, by runner.
#[derive(Clone, Debug, Default)]
pub struct Row {
    pub name: String,
    pub class: String,
    pub seconds: BTreeMap<Runner, f64>,
}

impl Row {
    /// Time of `runner` over native.
    pub fn over_native(&self, runner: Runner) -> Option<f64> {
        Some(self.seconds.get(&runner)? / self.seconds.get(&Runner::Native)?)
    }
}

/// Everything a bench run measured.
pub struct Results {
    pub rows: Vec<Row>,
    pub scale: f64,
    pub runs: usize,
    /// Of the VMM alone; `None` if only some benchmarks ran.
    pub footprint: Option<measure::Footprint>,
    pub host: String,
}

/// Times of one run by benchmark name, with its class; and the guest time at init.
type Times = Vec<(String, String, f64)>;

/// Measures, prints, writes.
///
/// # Errors
/// When something needed is missing, or a guest fails.
pub fn bench(options: &Options) -> Result<()> {
    if !options.no_qemu {
        install_qemu()?;
    }
    install("gcc", &["gcc", "libc6-dev"])?;
    run(cargo().args(["build", "--release", "--package", "anyvisor"]))?;
    let program = assets::guestbench()?;
    let initramfs = initramfs(&program)?;
    let kernel = assets::kernel()?;
    let mut runners = vec![Runner::Native];
    if !options.no_qemu {
        runners.push(Runner::Qemu);
    }
    runners.push(Runner::Anyvisor);
    let mut samples: BTreeMap<(String, Runner), Vec<f64>> = BTreeMap::new();
    let mut order: Vec<(String, String)> = Vec::new();
    for round in 0..options.runs {
        for &runner in &runners {
            let began = Instant::now();
            let times = match runner {
                Runner::Native => native(&program, options)?,
                Runner::Qemu => qemu(&kernel, &initramfs, options)?,
                Runner::Anyvisor => anyvisor(&kernel, &initramfs, options)?,
            };
            eprintln!("bench: round {}, {runner:?}: {:.1} s", round + 1, began.elapsed().as_secs_f64());
            for (name, class, seconds) in times {
                if !order.iter().any(|(n, _)| *n == name) {
                    order.push((name.clone(), class));
                }
                samples.entry((name, runner)).or_default().push(seconds);
            }
        }
    }
    std::fs::remove_file(&initramfs)?;
    let rows = order.into_iter().map(|(name, class)| row(name, class, &mut samples)).collect();
    let footprint = if options.only.is_none() { Some(measure::footprint()?) } else { None };
    let results = Results { rows, scale: options.scale, runs: options.runs, footprint, host: host() };
    let table = report::markdown(&results);
    println!("{table}");
    if !options.dry_run && options.only.is_none() && !options.no_qemu {
        report::write(&table)?;
        std::fs::write(root().join("docs/performance.svg"), chart::svg(&results)).context("writing the chart")?;
    }
    Ok(())
}

fn row(name: String, class: String, samples: &mut BTreeMap<(String, Runner), Vec<f64>>) -> Row {
    let mut row = Row { name, class, ..Row::default() };
    for runner in [Runner::Native, Runner::Qemu, Runner::Anyvisor] {
        if let Some(times) = samples.get_mut(&(row.name.clone(), runner)) {
            times.sort_by(f64::total_cmp);
            row.seconds.insert(runner, times[times.len() / 2]);
        }
    }
    row
}

/// An archive whose init is the benchmark.
fn initramfs(program: &Path) -> Result<PathBuf> {
    let mut archive = Archive::new();
    archive.program("init", &std::fs::read(program)?);
    assets::scratch("guestbench.cpio", &archive.finish())
}

/// The kernel's command line. `mitigations` and the like stay at the kernel's defaults for both.
fn command_line(options: &Options) -> String {
    let only = options.only.as_ref().map(|names| format!(" gbonly={names}")).unwrap_or_default();
    format!("console=ttyS0 quiet gbscale={}{only}", options.scale)
}

fn native(program: &Path, options: &Options) -> Result<Times> {
    let mut command = Command::new(program);
    command.arg(format!("--scale={}", options.scale));
    command.args(options.only.as_ref().map(|names| format!("--only={names}")));
    let output = command.output().context("running guestbench")?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn qemu(kernel: &Path, initramfs: &Path, options: &Options) -> Result<Times> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-m", MEMORY, "-no-reboot", "-nodefaults", "-display", "none"]);
    command.args(["-serial", "stdio", "-append", &command_line(options)]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting qemu-system-x86_64")?;
    let mut text = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut text)?;
    child.wait()?;
    parse(&text)
}

fn anyvisor(kernel: &Path, initramfs: &Path, options: &Options) -> Result<Times> {
    let initramfs = initramfs.display().to_string();
    let line = command_line(options);
    let more = ["--initrd", &initramfs, "--memory", MEMORY, "--cmdline", &line];
    let ended = vm::run(&vm::arguments(kernel, &more), PATIENCE);
    if ended.code() != 0 {
        bail!("anyvisor ended with {}: {}", ended.code(), ended.errors);
    }
    parse(&ended.output)
}

/// Reads lines `BENCH name seconds iterations class`.
fn parse(text: &str) -> Result<Times> {
    let mut times = Times::new();
    for line in text.lines() {
        let Some((_, rest)) = line.split_once("BENCH ") else { continue };
        let words: Vec<_> = rest.split_whitespace().collect();
        if let [name, seconds, _, class] = words[..] {
            let seconds = seconds.parse().with_context(|| format!("a time in {line:?}"))?;
            times.push((name.to_owned(), class.to_owned(), seconds));
        }
    }
    if !text.contains("BENCH-DONE") {
        bail!(
            "guestbench did not finish; its output ends: {}",
            text.lines().rev().take(5).collect::<Vec<_>>().join(" / ")
        );
    }
    Ok(times)
}

/// What ran this: processor and kernel.
pub fn host() -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = cpus.lines().find(|l| l.starts_with(key));
        line.and_then(|l| l.split(": ").nth(1)).unwrap_or("unknown").to_owned()
    };
    let count = cpus.lines().filter(|l| l.starts_with("processor")).count();
    format!("{count} × {} (family {}, model {})", value("model name"), value("cpu family"), value("model\t"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_parsed_and_must_be_complete() {
        let text = "BENCH boot-to-init 0.7 1 boot\r\nnoise\r\nBENCH sha256 1.5 400 int\r\nBENCH-DONE\r\n";
        let times = parse(text).unwrap();
        assert_eq!(times[1], ("sha256".to_owned(), "int".to_owned(), 1.5));
        assert_eq!(times.len(), 2);
        assert!(parse("BENCH sha256 1.5 400 int\n").is_err());
    }

    #[test]
    fn medians_are_taken() {
        let mut samples = BTreeMap::from([
            (("fib".to_owned(), Runner::Native), vec![3.0, 1.0, 2.0]),
            (("fib".to_owned(), Runner::Anyvisor), vec![9.0, 4.0, 1.0]),
        ]);
        let row = row("fib".to_owned(), "int".to_owned(), &mut samples);
        assert_eq!(row.over_native(Runner::Anyvisor), Some(2.0));
        assert_eq!(row.over_native(Runner::Qemu), None);
    }
}
