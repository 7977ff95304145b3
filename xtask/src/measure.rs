//! What a VM costs its host while it does nothing: memory beyond the guest's RAM, and CPU time.

use anyhow::{Context, Result};
use anyvisor_tests::{assets, vm};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);
/// The guest's RAM, of a size that no other mapping of the process has.
const MEMORY_MIB: u64 = 500;
/// How long the idle guest is watched, in seconds.
const WATCHED: f64 = 10.0;

/// An idle VM's cost.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    /// Memory of the process that is not guest RAM, in KiB; the translation cache is in it.
    pub overhead_kib: u64,
    /// Share of one host CPU that a guest at a shell prompt uses.
    pub idle_cpu: f64,
}

/// Boots Linux to a shell and watches it.
///
/// # Errors
/// When it does not boot, or /proc cannot be read.
pub fn footprint() -> Result<Footprint> {
    let script = "echo ready; exec setsid cttyhack sh -i";
    let initramfs = assets::scratch("idle.cpio", &assets::initramfs(script)?)?;
    let (initramfs, memory) = (initramfs.display().to_string(), format!("{MEMORY_MIB}M"));
    let more = ["--initrd", &initramfs, "--memory", &memory, "--cmdline", "console=ttyS0 quiet"];
    let mut guest = vm::Vm::start(&vm::arguments(&assets::kernel()?, &more))?;
    guest.wait_for("ready", PATIENCE);
    // The kernel's deferred work ends within some seconds of boot.
    std::thread::sleep(Duration::from_secs(8));
    let (before, began) = (cpu_seconds(guest.process())?, Instant::now());
    std::thread::sleep(Duration::from_secs_f64(WATCHED));
    let idle_cpu = (cpu_seconds(guest.process())? - before) / began.elapsed().as_secs_f64();
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", guest.process())).context("reading smaps")?;
    let overhead_kib = overhead(&maps);
    guest.type_in("poweroff -f\n")?;
    guest.end(PATIENCE);
    std::fs::remove_file(initramfs)?;
    Ok(Footprint { overhead_kib, idle_cpu })
}

/// KiB of all mappings but the guest's RAM, by proportional share: translated code is mapped twice, and so are pages of the
/// RAM. The kernel may merge the RAM's mapping with a neighbour; what is larger than the RAM counts then.
fn overhead(smaps: &str) -> u64 {
    let ram = MEMORY_MIB * 1024;
    let (mut total, mut size, mut is_ram) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().and_then(|w| w.parse::<u64>().ok())) {
            (Some("Size:"), Some(kib)) => size = kib,
            (Some("Pss:"), _) if is_ram => (),
            (Some("Pss:"), Some(kib)) if size >= ram => total += kib.min(size - ram),
            (Some("Pss:"), Some(kib)) => total += kib,
            (Some(field), _) if field.ends_with(':') => (),
            _ => is_ram = line.contains("guest-ram"),
        }
    }
    total
}

/// CPU time of a process, user and system, all threads, and of those of its children that it has waited for.
///
/// # Errors
/// There is no such process.
pub fn cpu_seconds(process: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).context("reading stat")?;
    // The name in parentheses may hold spaces; the fields counted here follow it.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let mut ticks = 0.0;
    for field in &fields[11..15] {
        ticks += field.parse::<f64>()?;
    }
    // USER_HZ is 100 on x86.
    Ok(ticks / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_overhead() {
        let smaps = format!(
            "1000-2000 r-xp\nSize: 4 kB\nPss: 3 kB\n3000-4000 rw-p\nSize: {} kB\nPss: 90000 kB\n5000 rw\nSize: 9 kB\nPss: 5 kB\n\
             6000-7000 rw-s 0 00:01 5 /guest-ram\nSize: 4 kB\nPss: 4 kB\n8000 rw\nSize: 4 kB\nPss: 0 kB\n",
            MEMORY_MIB * 1024 + 7
        );
        assert_eq!(overhead(&smaps), 15);
    }

    #[test]
    fn cpu_time_of_this_process_grows() {
        let before = cpu_seconds(std::process::id()).unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(200) {}
        assert!(cpu_seconds(std::process::id()).unwrap() > before);
    }
}
