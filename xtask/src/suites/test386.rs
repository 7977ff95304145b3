//! test386.asm: a ROM that tests a 80386 from reset on, in real and protected mode. It announces each group of tests
//! by a POST code, and stops in the first that fails. The group EE checks nothing itself: it prints what arithmetic
//! came to, for comparison with a file.
//!
//! Its ROMs are taken as built, in the folder of its sources: `post-64K.bin` and `post-128K.bin`, whose POST port is the serial
//! port's (0x3f8), with ROM128 off and on, and `print.bin`, which prints to COM1.

use super::process;
use super::table::{Row, Suite, Verdict};
use super::{Place, commit, qemu_version, read_kept, write_kept};
use anyhow::{Context, Result, bail};
use anyvisor_tests::vm;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const NAME: &str = "test386";
const TIMEOUT: Duration = Duration::from_secs(120);
/// The code behind the last group.
const DONE: u8 = 0xff;
/// The group whose results are compared, as the row is called.
const RESULTS: &str = "results of EE";

/// What to do where something is missing.
const GIVE: &str = "give the folder of its sources and ROMs (post-64K.bin, post-128K.bin, print.bin): --source FOLDER";

/// ROMs, as their rows are prefixed.
const ROMS: [&str; 2] = ["64K", "128K"];

/// Runs the ROMs in anyvisor.
///
/// # Errors
/// The suite cannot be had or started.
pub fn run(place: &Place) -> Result<Suite> {
    let folder = fetch(place)?;
    let qemu = read_kept(&place.kept(NAME));
    let rows = results(&folder, anyvisor)?.into_iter().map(|(name, ours)| {
        let remark = match (&ours, name.ends_with(RESULTS)) {
            (Verdict::Pass, true) => {
                "but for OF of rotations by more than 1, which is undefined and here as on the host's CPU"
            }
            _ => "",
        };
        Row { tcg: qemu.get(&name).cloned(), name, tests: 1, native: None, ours, remark: remark.into() }
    });
    let rows = rows.collect();
    let about = format!(
        "test386.asm ({}); `cargo xtask suites test386`. A row is a group of tests, by POST code. {}.",
        commit(&folder),
        qemu_version()
    );
    Ok(Suite { name: NAME, about, rows })
}

/// Runs the ROMs in QEMU, for later tables.
///
/// # Errors
/// The suite cannot be had or started.
pub fn run_in_tcg(place: &Place) -> Result<()> {
    crate::install_qemu()?;
    let verdicts = results(&fetch(place)?, qemu)?;
    verdicts.iter().for_each(|(name, verdict)| println!("{name}: {}", verdict.encode()));
    write_kept(&place.kept(NAME), &verdicts.into_iter().collect())
}

fn fetch(place: &Place) -> Result<PathBuf> {
    place.obtain(NAME, super::copy_whole, |_| bail!("test386.asm is taken as built; {GIVE}"))
}

/// The ROM `name`.
fn rom(folder: &Path, name: &str) -> Result<PathBuf> {
    let rom = folder.join(format!("{name}.bin"));
    rom.exists().then_some(rom).with_context(|| format!("{} has no {name}.bin; {GIVE}", folder.display()))
}

fn anyvisor(rom: &Path) -> Command {
    let mut command = vm::command();
    command.args(["run", "--engine", "translator", "--no-api", "--memory", "64M", "--firmware"]).arg(rom);
    command
}

fn qemu(rom: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-machine", "accel=tcg", "-nodefaults", "-display", "none", "-serial", "stdio", "-bios"]).arg(rom);
    command
}

/// What becomes of each group of each ROM.
fn results(folder: &Path, runner: impl Fn(&Path) -> Command) -> Result<Vec<(String, Verdict)>> {
    let source = folder.join("src/test386.asm");
    let source = std::fs::read_to_string(&source).with_context(|| format!("reading {}", source.display()))?;
    let mut all = Vec::new();
    for name in ROMS {
        let rom = rom(folder, &format!("post-{name}"))?;
        let seen = process::run(&mut runner(&rom), TIMEOUT, |output| output.last() == Some(&DONE))?.output;
        let groups = codes(&source).into_iter().filter(|code| *code != DONE);
        // A group has passed when the next one has begun.
        all.extend(groups.map(|code| {
            let verdict = match seen.iter().position(|seen| *seen == code) {
                Some(at) if at + 1 < seen.len() => Verdict::Pass,
                Some(_) => Verdict::Fail("stops here".into()),
                None => Verdict::Fail("not reached".into()),
            };
            (format!("{name}: POST {code:02X}"), verdict)
        }));
    }
    let reference = folder.join("test386-EE-reference.txt");
    let reference = std::fs::read_to_string(&reference).with_context(|| format!("reading {}", reference.display()))?;
    let rom = rom(folder, "print")?;
    let lines = reference.lines().count();
    let enough = |output: &[u8]| output.iter().filter(|byte| **byte == b'\n').count() >= lines;
    let printed = process::run(&mut runner(&rom), TIMEOUT, enough)?.text();
    all.push((RESULTS.into(), compare(&printed, &reference)));
    Ok(all)
}

/// The codes of the groups that this configuration has, in order.
fn codes(source: &str) -> Vec<u8> {
    let code = |line: &str| u8::from_str_radix(line.trim().strip_prefix("POST ")?.split(' ').next()?, 16).ok();
    source.lines().filter_map(code).collect()
}

/// Compares line by line. Of a rotation by more than 1, OF is undefined (SDM vol. 2B, RCL/RCR/ROL/ROR).
fn compare(printed: &str, reference: &str) -> Verdict {
    let (printed, reference): (Vec<&str>, Vec<&str>) = (printed.lines().collect(), reference.lines().collect());
    let same = |pair: &(&&str, &&str)| defined(pair.0) == defined(pair.1);
    let equal = printed.iter().zip(&reference).filter(same).count();
    if equal == reference.len() && printed.len() == reference.len() {
        return Verdict::Pass;
    }
    Verdict::Fail(format!("{equal} of {} lines agree", reference.len()))
}

/// A line without what is undefined: `C0 ROL B EAX=… EDX=… PS=0044 EAX=… EDX=… PS=0844`, flags before and after.
fn defined(line: &str) -> String {
    const OF: u32 = 0x800;
    let rotation = ["ROL", "ROR", "RCL", "RCR"].iter().any(|name| line.contains(name));
    let by_one = line.starts_with("D0") || line.starts_with("D1");
    let word = |word: &str| match word.strip_prefix("PS=").and_then(|flags| u32::from_str_radix(flags, 16).ok()) {
        Some(flags) if rotation && !by_one => format!("PS={:04X} ", flags & !OF),
        _ => format!("{word} "),
    };
    line.split_whitespace().map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_read_from_the_source() {
        assert_eq!(codes("\tPOST 0\n; POST 7\n POST EE\nPOSTAL 3\n\tPOST FF ; end\n"), [0, 0xee, 0xff]);
    }

    #[test]
    fn only_what_is_defined_is_compared() {
        let reference = "C0 ROL B EAX=1 PS=0044 EAX=2 PS=0844\r\nD0 ROL B EAX=1 PS=0 EAX=2 PS=0800\r\n";
        assert_eq!(compare(&reference.replace("0844", "0044"), reference), Verdict::Pass);
        assert_eq!(compare(&reference.replace("0844", "0045"), reference), Verdict::Fail("1 of 2 lines agree".into()));
        assert_eq!(compare(&reference.replace("0800", "0000"), reference), Verdict::Fail("1 of 2 lines agree".into()));
        assert_eq!(compare("", reference), Verdict::Fail("0 of 2 lines agree".into()));
    }
}
