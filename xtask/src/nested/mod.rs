//! `cargo xtask test-nested amd|intel`: the KVM engine on emulated hardware virtualization.
//!
//! **Problem.** Development machines and CI have no VT-x and no AMD-V, and the KVM engine is to be tested on
//! both, with the real kvm_amd and kvm_intel.
//!
//! **Idea.** An outer Linux ("L1") runs in an emulator whose CPU has hardware virtualization: QEMU's TCG has
//! AMD-V with nested paging, Bochs has VT-x with EPT. Our programs are carried in statically linked. In L1,
//! the conformance suite runs on `/dev/kvm`, and then a Linux boots under `anyvisor run --engine kvm`, checks
//! itself and powers off, as often as asked, and another is controlled from outside ([`control`]).
//!
//! Everything is slow: an exit to user space takes 0.1 ms under QEMU and 0.3 ms under Bochs. Time limits are
//! fifty times the usual ones, and nothing is asserted about time. What an emulator gets wrong stands with
//! its reason in `anyvisor_engine::conformance::limits`.

mod control;
mod emulator;
mod image;
mod moving;

use crate::{cargo, root, run};
use anyhow::{Result, bail};
use anyvisor_tests::assets;
use emulator::{Emulator, Outcome};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// As the conformance suite's limits and the programs in L1 know time.
const SLOWER: u32 = 50;

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Vendor {
    /// AMD-V in QEMU's TCG
    Amd,
    /// VT-x in Bochs
    Intel,
}

#[derive(clap::Args)]
pub struct Options {
    /// Whose hardware virtualization
    vendor: Vendor,
    /// How often a Linux guest is booted
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// Runs only conformance cases whose name contains TEXT
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Leaves the conformance suite out
    #[arg(long)]
    boots_only: bool,
    /// vCPUs of the Linux guest
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Runs only the control commands: ps, pause, resume, console, snapshot, stop
    #[arg(long)]
    control_only: bool,
    /// Moves a VM between the translator here and KVM in L1 instead of the tests
    #[arg(long)]
    moving: bool,
    /// Runs this command of L1's shell instead of the tests; `/anyvisor`, `/conformance`, `/guest/vmlinuz` and
    /// `/guest/initrd` are there
    #[arg(long, value_name = "COMMAND")]
    command: Option<String>,
}

/// What `cargo xtask test` runs of this: the AMD bench, one boot.
///
/// # Errors
/// What failed.
pub fn in_short() -> Result<()> {
    let vendor = Vendor::Amd;
    nested(&Options {
        vendor,
        count: 1,
        filter: None,
        boots_only: false,
        cpus: 1,
        control_only: false,
        moving: false,
        command: None,
    })
}

/// Runs the bench.
///
/// # Errors
/// The conformance suite or a boot failed, or the emulator did.
pub fn nested(options: &Options) -> Result<()> {
    let emulator = Emulator::of(options.vendor);
    emulator.install()?;
    let programs = static_programs()?;
    if options.moving {
        return moving::there_and_back(&emulator, &programs);
    }
    let guest = guest_initramfs()?;
    let script = options.command.clone().unwrap_or_else(|| script(options, &emulator));
    let image = image::build(&image::Parts {
        programs: &programs,
        guest_initramfs: &guest,
        script: &script,
        module: emulator.module,
        files: &[(control::INITRD.to_owned(), control::guest()?)],
    })?;
    let patience = Duration::from_secs(120) + emulator.boot * (3 * options.count + 2);
    let patience = patience + emulator.boot * 6;
    let patience = if options.boots_only { patience } else { patience + emulator.suite };
    for attempt in 1..=2 {
        let began = Instant::now();
        match emulator.run(&image, patience)? {
            Outcome::Ended(0) => {
                eprintln!("xtask: nested {}: passed in {:.0} s", emulator.name, began.elapsed().as_secs_f64());
                return Ok(());
            }
            Outcome::Ended(status) => bail!("nested {}: failed with status {status}, see above", emulator.name),
            Outcome::Died(why) if attempt == 1 => {
                eprintln!("xtask: {} gave up, which says nothing about anyvisor; once more: {why}", emulator.program);
            }
            Outcome::Died(why) => bail!("{} gave up twice: {why}", emulator.program),
        }
    }
    unreachable!("the second attempt returns")
}

/// The programs for L1, which has no libraries.
fn static_programs() -> Result<Vec<PathBuf>> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let mut command = cargo();
    // Next to ours, since other flags would throw the usual build's results away.
    command.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols").args([
        "build",
        "--quiet",
        "--release",
        "--target",
        TARGET,
        "--package",
        "anyvisor",
        "--package",
        "anyvisor-conformance",
    ]);
    run(&mut command)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let folder = target.join(TARGET).join("release");
    Ok(["anyvisor", "conformance"].iter().map(|name| folder.join(name)).collect())
}

/// What the Linux guest does: checks of its own, and power off.
fn guest_initramfs() -> Result<Vec<u8>> {
    assets::initramfs(
        r#"
check() { if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }
check sum "$(i=0; s=0; while [ $i -lt 500 ]; do s=$((s + i * i)); i=$((i + 1)); done; echo $s)" 41541750
check gzip "$(seq 1 2000 | gzip | gunzip | md5sum | cut -c1-8)" "$(seq 1 2000 | md5sum | cut -c1-8)"
check bc "$(echo '2^200' | bc)" 1606938044258990275541962092341162602522202993782792835301376
check forks "$(i=0; while [ $i -lt 10 ]; do /bin/true && i=$((i + 1)); done; echo $i)" 10
check source "$(grep -c -E 'kvm-clock|tsc' /sys/devices/system/clocksource/clocksource0/current_clocksource)" 1
before=$(cut -d. -f1 /proc/uptime); sleep 2; after=$(cut -d. -f1 /proc/uptime)
check clock "$([ $((after - before)) -ge 1 ] && echo yes)" yes
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace|unchecked MSR')" 0
dmesg | grep -E 'BUG:|Oops|WARNING:|Call Trace|unchecked MSR'
echo self-check done
poweroff -f
"#,
    )
}

/// How many lines the guest's self-check prints.
const CHECKS: u32 = 7;

/// What runs in L1.
fn script(options: &Options, emulator: &Emulator) -> String {
    let mut script = "set -e\n/anyvisor doctor | sed -n '/^kvm/,/verdict/p'\n".to_owned();
    let control = control::script(emulator.boot.as_secs() * 3);
    if options.control_only {
        return script + &control;
    }
    if !options.boots_only {
        let filter = options.filter.as_ref().map_or_else(String::new, |text| format!("--filter '{text}'"));
        let patience = SLOWER * 2;
        script += &format!("/conformance --engine kvm --host {} --patience {patience} {filter}\n", emulator.limits);
    }
    let (count, cpus, seconds) = (options.count, options.cpus, emulator.boot.as_secs() * 3);
    script += &format!(
        r#"
n=0
while [ $n -lt {count} ]; do
  n=$((n + 1)); began=$(cut -d. -f1 /proc/uptime)
  timeout {seconds} /anyvisor run --engine kvm --cpu-model host --cpus {cpus} --memory 192M \
    --kernel /guest/vmlinuz --initrd /guest/initrd --cmdline 'console=ttyS0 quiet' >/tmp/boot </dev/null && status=0 || status=$?
  took=$(($(cut -d. -f1 /proc/uptime) - began))
  if [ $status = 0 ] && grep -q 'self-check done' /tmp/boot && [ $(grep -c '^check .* ok' /tmp/boot) = {CHECKS} ]; then
    echo "boot $n of {count}: ok, $took s"
  else
    echo "boot $n of {count}: FAILED with status $status"; cat /tmp/boot; dmesg | tail -20; exit 1
  fi
done
"#
    );
    if options.boots_only { script } else { script + &control }
}

/// A fresh folder for what an emulator needs and writes.
fn scratch(name: &str) -> Result<PathBuf> {
    let folder = assets::folder().join(format!("nested-{name}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    Ok(folder)
}
