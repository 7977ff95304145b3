//! `cargo xtask programs`: gcc, python3, sqlite3, openssl and 7z from Debian's packages, natively, in QEMU's TCG and
//! in anyvisor's translator, in turn, so that a busy host slows all alike. The table goes to docs/performance.md.
//!
//! All three run the same files with the same driver (`guest/drive.py`), the guests from an initramfs with as
//! much RAM. Everything a program made has a checksum: one that differs from the native one fails the command.
//! Times are medians: of the guest's clock, of the host's, and of the CPU time that the host spent, which other work
//! on the host does not count in.

pub mod root;
mod source;
mod table;

use crate::bench::Runner;
use crate::{cargo, install_qemu, measure, run};
use anyhow::{Context, Result, bail, ensure};
use anyvisor_tests::{assets, vm};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Longer than the slowest program takes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(1200);
const MEMORY: &str = "1G";
/// Of each `openssl speed`.
const SPEED_SECONDS: &str = "2";

#[derive(clap::Args)]
pub struct Options {
    /// Runs of each of the three; medians are taken
    #[arg(long, default_value_t = 3)]
    count: usize,
    /// Only programs whose name contains TEXT; the document is left alone. May be given several times
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Only natively
    #[arg(long)]
    native: bool,
    /// Without QEMU
    #[arg(long)]
    no_qemu: bool,
    /// Shows the table, and leaves the document alone
    #[arg(long)]
    dry_run: bool,
    /// Where packages are unpacked [default: the user's cache folder]
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
}

/// One run of a program.
#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    /// On the clock of whoever ran it.
    seconds: f64,
    /// Between the lines that say that it began and ended, on the host's clock.
    wall: f64,
    /// CPU time that the host spent in between.
    cpu: f64,
    /// Of what it made; `-` if that is a speed.
    checksum: String,
}

/// The runs of one program.
#[derive(Default)]
struct Program {
    name: String,
    seconds: BTreeMap<Runner, Vec<f64>>,
    wall: BTreeMap<Runner, Vec<f64>>,
    cpu: BTreeMap<Runner, Vec<f64>>,
}

/// Measures, compares what was made, prints, writes.
///
/// # Errors
/// Something needed is missing, a guest fails, or a program made something else than natively.
pub fn programs(options: &Options) -> Result<()> {
    let cache = match &options.cache {
        Some(folder) => folder.clone(),
        None => crate::suites::default_cache("programs")?,
    };
    std::fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let root = root::prepare(&cache.canonicalize()?)?;
    let mut runners = vec![Runner::Native];
    if !options.native {
        if !options.no_qemu {
            install_qemu()?;
            runners.push(Runner::Qemu);
        }
        run(cargo().args(["build", "--release", "--package", "anyvisor"]))?;
        runners.push(Runner::Anyvisor);
    }
    let initramfs = if options.native { PathBuf::new() } else { cache.join("initramfs.cpio") };
    if !options.native {
        std::fs::write(&initramfs, root::initramfs(&root, root::DRIVE)?).context("writing the initramfs")?;
    }
    let mut measured = Vec::new();
    let mut checksums = BTreeMap::new();
    for round in 0..options.count {
        for &runner in &runners {
            let began = Instant::now();
            let samples = match runner {
                Runner::Native => native(&root, options),
                Runner::Qemu => listen(&mut qemu(&initramfs, options)?),
                Runner::Anyvisor => listen(&mut anyvisor(&initramfs, options)?),
            };
            let samples = samples.with_context(|| format!("programs, {runner:?}"))?;
            eprintln!("programs: round {}, {runner:?}: {:.1} s", round + 1, began.elapsed().as_secs_f64());
            compare(&mut checksums, &samples, runner)?;
            add(&mut measured, samples, runner);
        }
    }
    let table = table::markdown(&measured, options.count);
    println!("{table}");
    if !options.dry_run && options.only.is_empty() && runners.len() == 3 {
        crate::report::write_section("programs", &table)?;
    }
    Ok(())
}

/// What a program made is what it made in its first run, which was native.
fn compare(checksums: &mut BTreeMap<String, String>, samples: &[Sample], runner: Runner) -> Result<()> {
    for sample in samples {
        let first = checksums.entry(sample.name.clone()).or_insert_with(|| sample.checksum.clone());
        ensure!(
            *first == sample.checksum,
            "{} made something else in {runner:?} than natively: {} instead of {first}",
            sample.name,
            sample.checksum
        );
    }
    Ok(())
}

fn add(programs: &mut Vec<Program>, samples: Vec<Sample>, runner: Runner) {
    for sample in samples {
        let at = programs.iter().position(|program| program.name == sample.name);
        let at = at.unwrap_or_else(|| {
            programs.push(Program { name: sample.name.clone(), ..Program::default() });
            programs.len() - 1
        });
        programs[at].seconds.entry(runner).or_default().push(sample.seconds);
        programs[at].wall.entry(runner).or_default().push(sample.wall);
        programs[at].cpu.entry(runner).or_default().push(sample.cpu);
    }
}

fn native(root: &Path, options: &Options) -> Result<Vec<Sample>> {
    let mut arguments = vec!["/usr/bin/python3", "/bench/drive.py", SPEED_SECONDS];
    arguments.extend(options.only.iter().map(String::as_str));
    listen(&mut root::in_root(root, &arguments))
}

/// The kernel's command line. `mitigations` and the like stay at the kernel's defaults for both.
fn command_line(options: &Options) -> String {
    let only: String = options.only.iter().map(|name| format!(" '{name}'")).collect();
    format!("console=ttyS0 quiet programs=\"{SPEED_SECONDS}{only}\"")
}

fn qemu(initramfs: &Path, options: &Options) -> Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-m", MEMORY, "-no-reboot", "-nodefaults", "-display", "none"]);
    command.args(["-serial", "stdio", "-append", &command_line(options)]);
    command.arg("-kernel").arg(assets::kernel()?).arg("-initrd").arg(initramfs);
    Ok(command)
}

fn anyvisor(initramfs: &Path, options: &Options) -> Result<Command> {
    let initramfs = initramfs.display().to_string();
    let line = command_line(options);
    // As QEMU's `max`: all that there is.
    let more = [
        "--engine",
        "translator",
        "--cpu-model",
        "host",
        "--initrd",
        &initramfs,
        "--memory",
        MEMORY,
        "--cmdline",
        &line,
    ];
    let mut command = vm::command();
    command.args(vm::arguments(&assets::kernel()?, &more));
    Ok(command)
}

/// Runs a command to its end and reads the driver's lines.
fn listen(command: &mut Command) -> Result<Vec<Sample>> {
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = spawned.with_context(|| format!("starting {}", command.get_program().to_string_lossy()))?;
    let output = BufReader::new(child.stdout.take().context("no output")?);
    let (to, from) = mpsc::channel();
    let process = child.id();
    let reader = std::thread::spawn(move || {
        for line in output.split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            let cpu = measure::cpu_seconds(process).unwrap_or_default();
            if to.send(Line { at: Instant::now(), cpu, text }).is_err() {
                break;
            }
        }
    });
    let mut lines = Vec::new();
    loop {
        match from.recv_timeout(PATIENCE) {
            Ok(line) => lines.push(line),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                bail!("nothing for {PATIENCE:?}; {}", last(&lines));
            }
        }
    }
    reader.join().expect("reading lines does not panic");
    let status = child.wait()?;
    let samples = parse(&lines)?;
    ensure!(status.success(), "ended with {status}; {}", last(&lines));
    Ok(samples)
}

/// A line of output, and when it came: on the host's clock, and by the CPU time spent until then.
struct Line {
    at: Instant,
    cpu: f64,
    text: String,
}

/// Reads the lines that `guest/drive.py` prints.
fn parse(lines: &[Line]) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let mut began = None;
    for Line { at, cpu, text } in lines {
        let words: Vec<_> = text.split_whitespace().collect();
        match words[..] {
            ["START", ..] => began = Some((*at, *cpu)),
            ["PROGRAM", name, seconds, checksum] => {
                let (start, before) = began.take().context("a program ended that did not start")?;
                samples.push(Sample {
                    name: name.replace('_', " "),
                    seconds: seconds.parse().with_context(|| format!("a time in {text:?}"))?,
                    wall: at.duration_since(start).as_secs_f64(),
                    cpu: cpu - before,
                    checksum: checksum.to_owned(),
                });
            }
            ["FAILED", ..] => bail!("{text}"),
            ["PROGRAMS-DONE"] => return Ok(samples),
            _ => (),
        }
    }
    bail!("the programs did not finish; {}", last(lines))
}

fn last(lines: &[Line]) -> String {
    let last: Vec<_> = lines.iter().rev().take(8).rev().map(|line| line.text.as_str()).collect();
    format!("the output ends: {}", last.join(" / "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<Line> {
        text.lines().map(|line| Line { at: Instant::now(), cpu: 1.0, text: line.to_owned() }).collect()
    }

    #[test]
    fn output_is_parsed_and_must_be_complete() {
        let text = "noise\nSTART gcc -O2\nPROGRAM gcc_-O2 1.5 abc\nSTART 7z b\nPROGRAM 7z_b 2 -\nPROGRAMS-DONE\n";
        let samples = parse(&lines(text)).unwrap();
        assert_eq!((samples[0].name.as_str(), samples[0].seconds), ("gcc -O2", 1.5));
        assert_eq!((samples.len(), samples[1].checksum.as_str()), (2, "-"));
        assert!(parse(&lines(text.strip_suffix("PROGRAMS-DONE\n").unwrap())).is_err());
        assert!(parse(&lines("START x\nFAILED x why\nPROGRAMS-DONE\n")).is_err());
    }

    #[test]
    fn a_wrong_result_is_an_error() {
        let sample = |checksum: &str| Sample {
            name: "gcc".into(),
            seconds: 1.0,
            wall: 1.0,
            cpu: 1.0,
            checksum: checksum.into(),
        };
        let mut checksums = BTreeMap::new();
        compare(&mut checksums, &[sample("abc")], Runner::Native).unwrap();
        compare(&mut checksums, &[sample("abc")], Runner::Anyvisor).unwrap();
        assert!(compare(&mut checksums, &[sample("abd")], Runner::Anyvisor).is_err());
    }
}
