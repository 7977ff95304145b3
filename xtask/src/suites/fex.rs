//! FEX's assembly tests (`unittests/ASM` and `32Bit_ASM` of FEX-Emu/FEX), as FEX's own build leaves them: flat code in
//! `NAME.asm.bin`, and in `NAME.asm.config.bin` what memory it wants and what registers must hold in the end.
//!
//! `fex_runner.c`, linked statically, runs all of them: natively, and in one boot of a guest. In the table the tests of a
//! folder of which the same is to be said share a row.

use super::guest::{self, On};
use super::process;
use super::table::{Row, Suite, Verdict};
use super::{Place, commit, qemu_version, read_kept, write_kept};
use anyhow::{Context, Result, bail};
use anyvisor_tests::assets;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const NAME: &str = "fex";
const RUNNER: &str = include_str!("fex_runner.c");
/// All tests, natively.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Where the commit that the tests are of is noted.
const VERSION: &str = "anyvisor-version";
const CODE: &str = ".asm.bin";
const CONFIGURATION: &str = ".asm.config.bin";

/// Why a test does not pass: its name or the end of it.
const REMARKS: &[(&str, &str)] = &[
    ("32Bit_ASM/Primary/Pop_Segments", "loads SS with 0, which processors refuse and FEX allows"),
    ("ASM/Primary/Primary_8C", "loads selectors that no descriptor is behind, which FEX allows"),
    ("ASM/Primary/Primary_8C_2", "loads selectors that no descriptor is behind, which FEX allows"),
    (
        "ASM/Primary/Primary_E8",
        "a near branch with a 16-bit operand: Intel's CPUs ignore the prefix, AMD's cut RIP, FEX does neither",
    ),
    (
        "ASM/Primary/Primary_E9",
        "a near branch with a 16-bit operand: Intel's CPUs ignore the prefix, AMD's cut RIP, FEX does neither",
    ),
    ("ASM/PrimaryGroup/5_FF_05", "a far pointer with REX.W: 64-bit offset on Intel's CPUs, 32-bit on AMD's"),
    ("ASM/PrimaryGroup/5_FF_05_03_o64", "a far pointer with REX.W: 64-bit offset on Intel's CPUs, 32-bit on AMD's"),
    ("ASM/PrimaryGroup/5_FF_05_03_o64_imm", "a far pointer with REX.W: 64-bit offset on Intel's CPUs, 32-bit on AMD's"),
    ("ASM/VEX/vldmxcsr", "expects the bits of MXCSR that FEX has"),
    ("X87/D9_F2", "FPTAN's last bit differs between processors"),
    ("X87/precision_test_ftan", "FPTAN's last bit differs between processors"),
    ("X87/precision_test_neg_ftan", "FPTAN's last bit differs between processors"),
    ("X87/D9_F9", "FYL2XP1 of an operand out of its range, which is undefined"),
    ("ASM/X87/FXAM_Simple", "expects that FXAM takes zero for a normal number, as FEX's does"),
    ("ASM/X87/X87MMXInteraction", "expects tags that are simpler than a processor's, as FEX's are"),
    ("ASM/modrm_oob/DDD", "3DNow!, without a mark that says so"),
];

/// A test's verdict and, if it was skipped, what is missing.
type Outcomes = BTreeMap<String, (Verdict, String)>;

/// Runs the tests in QEMU, for later tables.
///
/// # Errors
/// They cannot be had or started.
pub fn run_in_tcg(place: &Place, only: Option<&str>) -> Result<()> {
    let (names, runner, tests) = prepare(place, only)?;
    let outcomes = in_guest(On::Tcg, &runner, tests)?;
    let kept = place.kept(NAME);
    let mut verdicts = read_kept(&kept);
    for name in names {
        let (verdict, _) = outcome(&outcomes, &name);
        if verdict != Verdict::Pass {
            println!("{name}: {}", verdict.encode());
        }
        verdicts.insert(name, verdict);
    }
    write_kept(&kept, &verdicts)
}

/// Runs the tests, on the host and in a guest.
///
/// # Errors
/// They cannot be had or started.
pub fn run(place: &Place, only: Option<&str>) -> Result<Suite> {
    let (names, runner, tests) = prepare(place, only)?;
    let file = place.cache.join("fex.tests");
    std::fs::write(&file, &tests).with_context(|| format!("writing {}", file.display()))?;
    let natively = process::run(Command::new(&runner).arg(&file), TIMEOUT, |_| false)?.text();
    let natively = parse(natively.lines());
    let here = in_guest(On::Anyvisor, &runner, tests)?;
    let qemu = read_kept(&place.kept(NAME));
    let mut rows = Vec::new();
    for name in names {
        let ((native, lacks), (ours, note)) = (outcome(&natively, &name), outcome(&here, &name));
        let known = REMARKS.iter().find(|(of, _)| name.ends_with(of));
        let remark = match (&ours, known) {
            (Verdict::Fail(_), Some((_, remark))) if native != Verdict::Pass => (*remark).to_owned(),
            (Verdict::Skip, _) if lacks == note => format!("{note} on the host"),
            (Verdict::Skip, _) => format!("{note} in the CPU models"),
            _ => note,
        };
        rows.push(Row { tcg: qemu.get(&name).cloned(), name, tests: 1, native: Some(native), ours, remark });
    }
    let about = format!(
        "FEX's assembly tests ({}); `cargo xtask suites fex --source FOLDER` with FEX's build of them. anyvisor: translator, \
         `--cpu-model host`. {}.",
        std::fs::read_to_string(place.cache.join(NAME).join(VERSION)).context("reading the version")?,
        qemu_version()
    );
    Ok(Suite { name: NAME, about, rows: fold(rows) })
}

/// The tests' names, the runner, and the file of tests that it takes.
fn prepare(place: &Place, only: Option<&str>) -> Result<(Vec<String>, PathBuf, Vec<u8>)> {
    let copy = |from: &Path, to: &Path| {
        super::copy_whole(from, to)?;
        std::fs::write(to.join(VERSION), commit(from)).context("writing the version")
    };
    let folder = place.obtain(NAME, copy, |_| {
        bail!(
            "FEX's tests are taken as FEX's build leaves them (its targets asm_files and 32bit_asm_files); \
             give that folder: --source FOLDER"
        )
    })?;
    let mut names = Vec::new();
    let tests = folder.join("unittests");
    collect(&tests, &tests, &mut names)?;
    names.retain(|name| only.is_none_or(|only| name.contains(only)));
    names.sort();
    if names.is_empty() {
        bail!("{} has no tests ({CONFIGURATION}) of this name", tests.display());
    }
    let packed = pack(&tests, &names)?;
    Ok((names, build(place)?, packed))
}

/// The tests below `folder`, named by their path below `root`.
fn collect(root: &Path, folder: &Path, names: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(root, &path, names)?;
        } else if let Some(name) = path.strip_prefix(root)?.to_string_lossy().strip_suffix(CONFIGURATION) {
            names.push(name.to_owned());
        }
    }
    Ok(())
}

/// The runner's file of tests: of each three lengths, the name, the code, the configuration.
fn pack(folder: &Path, names: &[String]) -> Result<Vec<u8>> {
    let mut packed = Vec::new();
    for name in names {
        let part = |end: &str| {
            let path = folder.join(format!("{name}{end}"));
            std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        let parts = [name.clone().into_bytes(), part(CODE)?, part(CONFIGURATION)?];
        for part in &parts {
            packed.extend(u32::try_from(part.len())?.to_le_bytes());
        }
        parts.iter().for_each(|part| packed.extend(part));
    }
    Ok(packed)
}

/// Compiles the runner. Its place in memory is random, so that tests can have the addresses they want.
fn build(place: &Place) -> Result<PathBuf> {
    crate::install("gcc", &["gcc", "libc6-dev"])?;
    let (source, runner) = (place.cache.join("fex_runner.c"), place.cache.join("fex_runner"));
    std::fs::write(&source, RUNNER).with_context(|| format!("writing {}", source.display()))?;
    let mut gcc = Command::new("gcc");
    assets::run(gcc.args(["-O2", "-Wall", "-static-pie", "-o"]).arg(&runner).arg(&source))?;
    Ok(runner)
}

fn in_guest(on: On, runner: &Path, tests: Vec<u8>) -> Result<Outcomes> {
    let program = std::fs::read(runner).with_context(|| format!("reading {}", runner.display()))?;
    let files = [("bin/fex_runner".to_owned(), program), ("tests".to_owned(), tests)];
    let lines = guest::run(on, NAME, &files, "fex_runner /tests")?;
    Ok(parse(lines.iter().map(String::as_str)))
}

/// What each test came to: `@@ NAME pass`, `@@ NAME skip: WHAT` or `@@ NAME fail: HOW`.
fn parse<'a>(lines: impl Iterator<Item = &'a str>) -> Outcomes {
    let outcome = |line: &str| {
        let (name, how) = line.strip_prefix("@@ ")?.split_once(' ')?;
        let verdict = match how.split_once(": ") {
            None if how == "pass" => (Verdict::Pass, String::new()),
            Some(("skip", missing)) => (Verdict::Skip, missing.to_owned()),
            Some(("fail", how)) => (Verdict::Fail(how.to_owned()), String::new()),
            _ => (Verdict::Fail("the guest stops".into()), String::new()),
        };
        Some((name.to_owned(), verdict))
    };
    lines.filter_map(outcome).collect()
}

fn outcome(outcomes: &Outcomes, name: &str) -> (Verdict, String) {
    let unknown = || (Verdict::Fail("not reached".into()), String::new());
    outcomes.get(name).cloned().unwrap_or_else(unknown)
}

/// Puts the tests of a folder of which the same is to be said, and which do not fail, into one row.
fn fold(rows: Vec<Row>) -> Vec<Row> {
    let mut folders: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    for row in rows {
        let folder = row.name.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
        let rows = folders.entry(folder).or_default();
        let fails = |verdict: &Option<Verdict>| matches!(verdict, Some(Verdict::Fail(_)));
        let alike = |other: &&mut Row| {
            (&other.native, &other.ours, &other.tcg, &other.remark) == (&row.native, &row.ours, &row.tcg, &row.remark)
        };
        match rows.iter_mut().find(alike) {
            Some(other) if !matches!(row.ours, Verdict::Fail(_)) && !fails(&row.tcg) => other.tests += 1,
            _ => rows.push(row),
        }
    }
    for (folder, rows) in &mut folders {
        let whole = rows.len() == 1;
        for row in rows.iter_mut().filter(|row| row.tests > 1) {
            row.name = format!("{folder}: {} {}", if whole { "all" } else { "other" }, row.tests);
        }
        // Tests that are named come first.
        rows.sort_by_key(|row| row.tests > 1);
    }
    folders.into_values().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let text = "boot\n@@ a/b pass\n@@ a/c fail: RAX is 0x1, not 0x2\n@@ d skip: no SSE4a\n@@ e \n@@ done";
        let outcomes = parse(text.lines());
        assert_eq!(outcome(&outcomes, "a/b").0, Verdict::Pass);
        assert_eq!(outcome(&outcomes, "a/c").0, Verdict::Fail("RAX is 0x1, not 0x2".into()));
        assert_eq!(outcome(&outcomes, "d"), (Verdict::Skip, "no SSE4a".into()));
        assert_eq!(outcome(&outcomes, "e").0, Verdict::Fail("the guest stops".into()));
        assert_eq!(outcome(&outcomes, "f").0, Verdict::Fail("not reached".into()));
    }

    #[test]
    fn what_passes_everywhere_is_folded() {
        let row = |name: &str, ours: Verdict| Row {
            name: name.into(),
            tests: 1,
            native: Some(Verdict::Pass),
            ours,
            tcg: Some(Verdict::Pass),
            remark: String::new(),
        };
        let pass = Verdict::Pass;
        let rows =
            fold(vec![row("a/1", pass.clone()), row("a/2", Verdict::Skip), row("a/3", pass.clone()), row("b/1", pass)]);
        let seen: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.tests)).collect();
        assert_eq!(seen, [("a/2", 1), ("a: other 2", 2), ("b/1", 1)]);
    }
}
