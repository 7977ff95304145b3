//! Linux' own tests of what its x86 code and the processor do together: `tools/testing/selftests/x86`, from Debian's
//! package of the kernel's source. Each is a program, in 32- or 64-bit code or both, that ends with 0 if it passes.
//!
//! All run natively first, then in one boot of a guest. They are linked dynamically, because some of them look for the
//! vDSO as a library, so the guest has the C libraries of both kinds too.

use super::guest::{self, On};
use super::process;
use super::table::{Row, Suite, Verdict};
use super::{Place, commit, qemu_version, read_kept, write_kept};
use anyhow::{Context, Result, bail};
use anyvisor_tests::assets;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const NAME: &str = "selftests-x86";
const PACKAGE: &str = "linux-source-6.1";
/// Where the tests are in the kernel's source.
const TESTS: &str = "tools/testing/selftests/x86";
/// What they are built from.
const PARTS: [&str; 4] = ["tools/testing/selftests", "tools/include", "arch/x86/include", "scripts/subarch.include"];
/// One test, natively or in a guest.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Why a test does not pass.
const REMARKS: &[(&str, &str)] = &[
    ("amx_64", "the host's CPU has no AMX, and the test does not ask"),
    ("mov_ss_trap_32", BELOW),
    ("mov_ss_trap_64", BELOW),
];
const BELOW: &str = "natively INT1's trap comes at it, for ever, not behind it: the host is itself a VM, on AMD-V";

/// What a test came to: its exit code, if no signal ended it, and what it printed.
struct Outcome {
    code: Option<i32>,
    log: String,
}

/// Builds the suite and runs it in QEMU, for later tables.
///
/// # Errors
/// It cannot be had, built or started.
pub fn run_in_tcg(place: &Place, only: Option<&str>) -> Result<()> {
    let (folder, names) = prepare(place, only)?;
    let outcomes = in_guest(On::Tcg, &folder, &names)?;
    let kept = place.kept(NAME);
    let mut verdicts = read_kept(&kept);
    for name in names {
        let verdict = judge(outcomes.get(&name));
        println!("{name}: {}", verdict.encode());
        verdicts.insert(name, verdict);
    }
    write_kept(&kept, &verdicts)
}

/// Builds the suite and runs it, on the host and in a guest.
///
/// # Errors
/// It cannot be had, built or started.
pub fn run(place: &Place, only: Option<&str>) -> Result<Suite> {
    let (folder, names) = prepare(place, only)?;
    let natively = names.iter().map(|name| Ok((name.clone(), native(&folder, name)?)));
    let natively: BTreeMap<String, Outcome> = natively.collect::<Result<_>>()?;
    let outcomes = in_guest(On::Anyvisor, &folder, &names)?;
    let qemu = read_kept(&place.kept(NAME));
    let row = |name: String| {
        let remark = match REMARKS.iter().find(|(of, _)| *of == name) {
            Some((_, remark)) if judge(natively.get(&name)) != Verdict::Pass => (*remark).to_owned(),
            _ => skipped(outcomes.get(&name)),
        };
        let (ours, native) = (judge(outcomes.get(&name)), Some(judge(natively.get(&name))));
        Row { tcg: qemu.get(&name).cloned(), name, tests: 1, native, ours, remark }
    };
    let about = format!(
        "tools/testing/selftests/x86 of Debian's {PACKAGE} ({}), in a guest with Debian's kernel for PCs and `vsyscall=emulate`; \
         `cargo xtask suites {NAME}`. anyvisor: translator, one vCPU. {}.",
        std::fs::read_to_string(folder.join("version")).context("reading the version")?.trim(),
        qemu_version()
    );
    Ok(Suite { name: NAME, about, rows: names.into_iter().map(row).collect() })
}

/// The folder with the built tests, and their names.
fn prepare(place: &Place, only: Option<&str>) -> Result<(PathBuf, Vec<String>)> {
    let folder = place.obtain(NAME, copy, download)?;
    let tests = folder.join(TESTS);
    for (program, packages) in [("gcc", &["gcc", "libc6-dev"][..]), ("make", &["make"])] {
        crate::install(program, packages)?;
    }
    if !Path::new("/usr/lib32/crt1.o").exists() {
        crate::install("a compiler of 32-bit code", &["gcc-multilib"])?;
    }
    // A second time, it finds that all is there.
    assets::run(Command::new("make").arg("-C").arg(&tests))?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&tests).with_context(|| format!("reading {}", tests.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names
        .retain(|name| (name.ends_with("_32") || name.ends_with("_64")) && only.is_none_or(|only| name.contains(only)));
    names.sort();
    if names.is_empty() {
        bail!("{} has no tests of this name", tests.display());
    }
    Ok((folder, names))
}

/// Takes what is needed of a kernel's source.
fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    std::fs::write(to.join("version"), commit(from)).context("writing the version")?;
    assets::run(Command::new("cp").args(["-r", "--parents"]).args(PARTS).arg(to).current_dir(from))
}

/// Takes it from Debian's package.
fn download(to: &Path) -> Result<()> {
    eprintln!("xtask: fetching {PACKAGE}");
    std::fs::create_dir_all(to)?;
    assets::run(Command::new("apt-get").args(["download", PACKAGE]).current_dir(to))
        .with_context(|| format!("downloading {PACKAGE}; or give --source FOLDER, a kernel's source"))?;
    let wanted = PARTS.map(|part| format!("{PACKAGE}/{part}")).join(" ");
    let unpack = format!(
        "set -e; dpkg-deb --field *.deb Version > version; dpkg-deb --fsys-tarfile *.deb |
         tar -xO ./usr/src/{PACKAGE}.tar.xz | tar -xJ --strip-components=1 {wanted}; rm *.deb"
    );
    assets::run(Command::new("sh").args(["-c", &unpack]).current_dir(to)).context("unpacking")
}

fn native(folder: &Path, name: &str) -> Result<Outcome> {
    let mut command = Command::new(folder.join(TESTS).join(name));
    let ended = process::run(command.current_dir(folder.join(TESTS)), TIMEOUT, |_| false)?;
    Ok(Outcome { code: ended.code, log: ended.text() })
}

fn in_guest(on: On, folder: &Path, names: &[String]) -> Result<BTreeMap<String, Outcome>> {
    let mut files = Vec::new();
    let mut libraries = BTreeSet::new();
    for name in names {
        let path = folder.join(TESTS).join(name);
        files.push((format!("tests/{name}"), read(&path)?));
        libraries.extend(libraries_of(&path)?);
    }
    let folders: BTreeSet<_> = libraries.iter().filter_map(|path| path.parent()).collect();
    let search: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    for library in &libraries {
        files.push((library.display().to_string().trim_start_matches('/').to_owned(), read(library)?));
    }
    let script = format!(
        "export LD_LIBRARY_PATH={}; cd /tests; for test in *; do\n\
         echo \"@@ begin $test\"; timeout {} ./$test </dev/null >/tmp/log 2>&1; code=$?\n\
         cat /tmp/log; echo; echo \"@@ end $code\"; done",
        search.join(":"),
        TIMEOUT.as_secs()
    );
    Ok(parse(&guest::run(on, NAME, &files, &script)?))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// The shared libraries of a program, the loader too: `name => path (address)` or `path (address)` in ldd's words.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("starting ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.lines().filter_map(|line| line.split(" (").next()?.split_whitespace().last());
    Ok(words.filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// What each test came to, by the guest's console. One that has no end was the guest's end.
fn parse(lines: &[String]) -> BTreeMap<String, Outcome> {
    let mut outcomes = BTreeMap::new();
    let mut current: Option<(String, String)> = None;
    for line in lines {
        if let Some(name) = line.strip_prefix("@@ begin ") {
            current = Some((name.to_owned(), String::new()));
        } else if let Some(code) = line.strip_prefix("@@ end ") {
            if let Some((name, log)) = current.take() {
                // The shell's way to say that a signal ended a program is a code above 128.
                outcomes.insert(name, Outcome { code: code.parse().ok().filter(|code| *code < 128), log });
            }
        } else if let Some((_, log)) = &mut current {
            log.push_str(line);
            log.push('\n');
        }
    }
    if let Some((name, log)) = current {
        outcomes.insert(name, Outcome { code: Some(-1), log: log + "the guest stopped\n" });
    }
    outcomes
}

/// A test's verdict; kselftest's code for a test that has nothing to test is 4.
fn judge(outcome: Option<&Outcome>) -> Verdict {
    let Some(Outcome { code, log }) = outcome else { return Verdict::Fail("not reached".into()) };
    let failed = log.lines().filter(|line| line.contains("[FAIL]")).count();
    match code {
        Some(0) => Verdict::Pass,
        Some(4) => Verdict::Skip,
        Some(-1) => Verdict::Fail("the guest stops".into()),
        None => Verdict::Fail("ended by a signal".into()),
        Some(_) if failed > 0 => Verdict::Fail(format!("{failed} of its parts fail")),
        Some(code) => Verdict::Fail(format!("exit code {code}")),
    }
}

/// Which parts a test that passes has left out, in its own words.
fn skipped(outcome: Option<&Outcome>) -> String {
    let Some(Outcome { code: Some(0), log }) = outcome else { return String::new() };
    let reasons: BTreeSet<_> =
        log.lines().filter_map(|line| Some(line.trim().strip_prefix("[SKIP]")?.trim())).collect();
    let reasons: Vec<_> = reasons.into_iter().collect();
    if reasons.is_empty() { String::new() } else { format!("skips: {}", reasons.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_taken_apart() {
        let text = "noise\n@@ begin a_32\n[OK]\tfine\n[SKIP]\tvm86\n[SKIP]\tvm86\n@@ end 0\n@@ begin b_64\n[FAIL]\tx\n@@ end 1\n\
                    @@ begin c_64\n@@ end 139\n@@ begin d_64\nhm\n";
        let outcomes = parse(&text.lines().map(str::to_owned).collect::<Vec<_>>());
        let verdict = |name: &str| judge(outcomes.get(name));
        assert_eq!(verdict("a_32"), Verdict::Pass);
        assert_eq!(skipped(outcomes.get("a_32")), "skips: vm86");
        assert_eq!(verdict("b_64"), Verdict::Fail("1 of its parts fail".into()));
        assert_eq!(skipped(outcomes.get("b_64")), "");
        assert_eq!(verdict("c_64"), Verdict::Fail("ended by a signal".into()));
        assert_eq!(verdict("d_64"), Verdict::Fail("the guest stops".into()));
        assert_eq!(verdict("e_64"), Verdict::Fail("not reached".into()));
    }
}
