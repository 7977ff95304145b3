//! A VM that moves between engines: saved on the translator here, it goes on under the KVM engine in L1, is saved
//! there, and goes on here again. In the end it has computed the right thing, in each place.
//!
//! The first snapshot goes into L1 in its initramfs; the second, which builds on the first and is small, comes back
//! through L1's fourth serial port as an archive.

use super::emulator::{Emulator, Outcome};
use super::{image, scratch};
use anyhow::{Context, Result, bail, ensure};
use anyvisor_tests::{assets, vm};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What both engines have, on the emulated CPU too: QEMU's TCG, under KVM, has none of those left out and 40
/// bits, and the translator has no VME.
const CPU: &str = "x86-64-v2,-vme,-pcid,-invpcid,-fsrm,-spec_ctrl,-arch_capabilities,-bhi_ctrl,-nonstop_tsc,\
    phys-bits=40";

/// Steps of the guest's computation, and after which it is saved here and there.
const STEPS: u32 = 40;
const SAVED_HERE: u32 = 6;
const SAVED_THERE: u32 = 12;

const PATIENCE: Duration = Duration::from_secs(120);

/// Each step hashes the one before, and says the time.
fn guest() -> Result<Vec<u8>> {
    assets::initramfs(&format!(
        r#"
i=0; h=start
while [ $i -lt {STEPS} ]; do
    h=$(echo $h | sha256sum | cut -c1-64); i=$((i + 1)); echo "step $i $h $(cut -d' ' -f1 /proc/uptime)"; usleep 50000
done
echo "result $h"; dmesg | grep -E 'BUG:|Oops|Call Trace|soft lockup'; poweroff -f
"#
    ))
}

/// The script in L1.
fn script(patience: Duration) -> String {
    let seconds = patience.as_secs();
    format!(
        r#"
export XDG_RUNTIME_DIR=/run
until_says() {{ n=0; until grep -q "$1" /tmp/out; do n=$((n + 1)); [ $n -lt {seconds} ] && kill -0 $vm || return 1; sleep 1; done; }}
fail() {{ echo "moving: $1"; cat /tmp/out /tmp/err; exit 1; }}
/anyvisor run --engine kvm --restore /moved/here --id moved >/tmp/out 2>/tmp/err </dev/null & vm=$!
until_says "step {SAVED_THERE} " || fail "the VM does not go on under kvm"
/anyvisor snapshot moved /moved/there --parent /moved/here || fail "it cannot be saved"
wait $vm && status=0 || status=$?
[ $status = 0 ] || fail "it ended with status $status"
cat /tmp/out
grep -q "^result " /tmp/out || fail "it has no result"
stty -F /dev/ttyS3 raw -echo; tar -C /moved -c there | gzip -1 >/dev/ttyS3
"#
    )
}

/// Moves a VM to L1 and back.
///
/// # Errors
/// It did not go on somewhere, or computed something else; or this emulator cannot.
pub fn there_and_back(emulator: &Emulator, programs: &[PathBuf]) -> Result<()> {
    ensure!(
        emulator.has_host_tsc,
        "moving: {}'s TSC counts its instructions, and a guest's cannot be scaled to this host's, so that a VM saved \
         here is refused there; use amd",
        emulator.program
    );
    let folder = scratch("moving")?;
    let here = folder.join("here");
    let khz = save_here(&folder, &here)?;
    let files = ["manifest", "pages", "memory"].map(|name| (format!("moved/here/{name}"), here.join(name)));
    let script = script(3 * emulator.boot);
    let parts =
        image::Parts { programs, guest_initramfs: &[], script: &script, module: emulator.module, files: &files };
    let image = image::build(&parts)?;
    // L1 measures its TSC against emulated timers, and the guest's must be the same within 250 ppm.
    let archive = folder.join("there.tar.gz");
    match emulator.run_with(&image, 12 * emulator.boot, &format!("tsc_early_khz={khz}"), Some(&archive))? {
        Outcome::Ended(0) => {}
        Outcome::Ended(status) => bail!("moving: the script in L1 ended with status {status}, see above"),
        Outcome::Died(why) => bail!("{} gave up: {why}", emulator.program),
    }
    assets::run(Command::new("tar").arg("-C").arg(&folder).arg("-xzf").arg(&archive))?;
    let there = folder.join("there").display().to_string();
    let ended = vm::Vm::start(&["run", "--engine", "translator", "--restore", &there])?.end(PATIENCE);
    ensure!(ended.code() == 0, "back here it ended badly: {ended:?}");
    check(&ended.output, SAVED_THERE)?;
    eprintln!("xtask: a VM moved from the translator to kvm on {} and back", emulator.name);
    let _ = fs::remove_dir_all(&folder);
    Ok(())
}

/// Runs the guest here until it is to be saved, in `here`; the frequency of its TSC.
fn save_here(folder: &Path, here: &Path) -> Result<u64> {
    let initrd = folder.join("guest-initrd");
    fs::write(&initrd, guest()?)?;
    let (initrd, id) = (initrd.display().to_string(), format!("moving-{}", std::process::id()));
    let options = ["--engine", "translator", "--cpu-model", CPU, "--memory", "96M", "--initrd", &initrd, "--id", &id];
    let options = [&options[..], &["--cmdline", "console=ttyS0 quiet"]].concat();
    let mut vm = vm::Vm::start(&vm::arguments(&assets::kernel()?, &options))?;
    vm.wait_for(&format!("step {SAVED_HERE} "), PATIENCE);
    let saved = vm::Vm::start(&["snapshot", &id, &here.display().to_string()])?.end(PATIENCE);
    ensure!(saved.code() == 0, "the VM cannot be saved: {saved:?}");
    check(&vm.end(PATIENCE).output, 0)?;
    let manifest = fs::read_to_string(here.join("manifest")).context("reading the manifest")?;
    let khz = manifest.split_once("\"tsc_khz\":").and_then(|(_, rest)| rest.split(',').next()?.parse().ok());
    khz.context("no tsc_khz in the manifest")
}

/// The guest did all steps from one after `from` on, in order, its clock did not go back, and its result is right.
fn check(output: &str, from: u32) -> Result<()> {
    let steps: Vec<u32> =
        output.lines().filter_map(|line| line.strip_prefix("step ")?.split(' ').next()?.parse().ok()).collect();
    let first = *steps.first().context("it took no step")?;
    ensure!(first > from && steps.iter().copied().eq(first..=STEPS), "odd steps: {output}");
    let clock = |line: &str| line.strip_prefix("step ")?.rsplit(' ').next()?.trim().parse::<f64>().ok();
    let clocks: Vec<f64> = output.lines().filter_map(clock).collect();
    ensure!(clocks.is_sorted() && clocks.len() == steps.len(), "an odd clock: {output}");
    let shell = format!("h=start; for i in $(seq {STEPS}); do h=$(echo $h | sha256sum | cut -c1-64); done; echo $h");
    let expected = Command::new("sh").args(["-c", &shell]).output().context("computing the right result")?;
    let expected = String::from_utf8_lossy(&expected.stdout).trim().to_owned();
    ensure!(output.contains(&format!("result {expected}")), "a wrong result: {output}");
    ensure!(!output.contains("Call Trace") && !output.contains("soft lockup"), "complaints: {output}");
    Ok(())
}
