//! `cargo xtask start`: how long it takes from the process's start to a guest's first output, and how much memory
//! the process has beyond the guest's RAM then.
//!
//! The guest is a few instructions that write one byte to the serial port, so the time is an upper bound of the
//! time to the first instruction.

use crate::{cargo, run};
use anyhow::{Context, Result};
use anyvisor_tests::{assets, elf, vm};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub struct Options {
    /// The engine to start
    #[arg(long, default_value = "kvm")]
    engine: String,
    /// How many starts
    #[arg(long, default_value_t = 50)]
    count: usize,
    /// The guest's RAM in MiB
    #[arg(long, default_value_t = 128)]
    memory: u64,
}

/// Prints the least and the median time, and the memory.
///
/// # Errors
/// A guest does not start.
pub fn start(options: &Options) -> Result<()> {
    run(cargo().args(["build", "--quiet", "--release", "--package", "anyvisor"]))?;
    let guest = assets::scratch("start.elf", &elf::pvh(&[&elf::print("x"), elf::HALT].concat()))?;
    let memory = format!("{}M", options.memory);
    let more = ["--engine", &options.engine, "--cpu-model", "host", "--memory", &memory];
    let arguments = vm::arguments(&guest, &more);
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    for _ in 0..options.count {
        let (time, size) = once(&arguments, options.memory << 10)?;
        times.push(time);
        sizes.push(size);
    }
    std::fs::remove_file(guest)?;
    times.sort_unstable();
    sizes.sort_unstable();
    let milliseconds = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e3);
    println!(
        "{} starts with engine {} and {memory}: first output after {:.1} ms at least, {:.1} ms in the median; {:.1} MiB \
         beyond the guest's RAM",
        times.len(),
        options.engine,
        milliseconds(times.first()),
        milliseconds(times.get(times.len() / 2)),
        sizes.get(sizes.len() / 2).copied().unwrap_or_default() as f64 / 1024.0
    );
    Ok(())
}

/// One start: the time to the first byte, and the resident KiB outside of the mapping of `ram` KiB.
fn once(arguments: &[String], ram: u64) -> Result<(Duration, u64)> {
    let began = Instant::now();
    let mut child = Command::new(vm::binary())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting anyvisor")?;
    let mut byte = [0];
    let read = child.stdout.as_mut().context("its output")?.read_exact(&mut byte);
    let time = began.elapsed();
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", child.id()));
    child.kill()?;
    child.wait()?;
    read.context("the guest's output")?;
    Ok((time, resident_without(&maps?, ram)))
}

/// Sums `Rss:` of a `/proc/PID/smaps` in KiB, but for mappings of exactly `ram` KiB.
fn resident_without(maps: &str, ram: u64) -> u64 {
    let (mut size, mut sum) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let value = |word: Option<&str>| word.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        match words.next() {
            Some("Size:") => size = value(words.next()),
            Some("Rss:") if size != ram => sum += value(words.next()),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::resident_without;

    #[test]
    fn ram_does_not_count() {
        let maps = "7f0 rw-p\nSize:   131072 kB\nRss:   2048 kB\n7f1 r-xp\nSize:  400 kB\nRss:  300 kB\nRss_x: 9\n";
        assert_eq!(resident_without(maps, 131_072), 300);
    }
}
