//! kvm-unit-tests for x86: the suite's own list (`x86/unittests.cfg`), each test a Multiboot kernel that prints
//! `PASS:` and `FAIL:` lines and ends through port 0xf4.
//!
//! anyvisor runs each with `--test-device`, and with one module that says how many processors there are, because
//! the tests would ask QEMU's firmware interface for that. QEMU's own options of a test become a CPU model.

use super::process::{self, Ended};
use super::table::{Row, Suite, Verdict};
use super::{Place, commit, qemu_version, read_kept, write_kept};
use anyhow::{Context, Result, bail};
use anyvisor_tests::vm;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The suite's own default (`scripts/runtime.bash`).
const TIMEOUT: Duration = Duration::from_secs(90);

/// For which kernels the suite is built.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    Of32,
    Of64,
}

impl Bits {
    /// The suite's name here.
    fn name(self) -> &'static str {
        match self {
            Bits::Of32 => "kvm-unit-tests-i386",
            Bits::Of64 => "kvm-unit-tests",
        }
    }

    /// As the suite calls it.
    fn arch(self) -> &'static str {
        match self {
            Bits::Of32 => "i386",
            Bits::Of64 => "x86_64",
        }
    }
}

/// Tests that are not run: a part of their name or group, and why.
const ASIDE: &[(&str, &str)] = &[
    ("vmx", "nested virtualization is not offered"),
    ("svm", "nested virtualization is not offered"),
    ("pmu", "there are no performance counters"),
    ("hyperv", "Hyper-V's paravirtual interface is not offered"),
    ("vmware", "VMware's backdoor is not offered"),
    ("intel_iommu", "the machine has no IOMMU, nor QEMU's edu device"),
];

/// Why a test does not pass, or what to know about it.
const REMARKS: &[(&str, &str)] = &[
    ("pku", "protection keys are shown on request: `--cpu-model host,+pku,+pks`"),
    ("pks", "protection keys are shown on request: `--cpu-model host,+pku,+pks`"),
    ("asyncpf", "KVM's asynchronous page faults are not offered: guest memory is not paged out by the hypervisor"),
    ("s3", "sleeping to RAM is not offered: the ACPI tables have no \\_S3, and the test does not ask them"),
    ("syscall", "on Intel's CPUs without its part for SYSCALL in 32-bit code, which only AMD's have"),
    ("tsx-ctrl", "the CPU models have no TSX"),
    ("cet", "the CPU models have no control-flow enforcement"),
];

/// Why a test does not pass where the host's CPU is AMD's: how it ends there, and why.
const REMARKS_ON_AMD: &[(&str, &str, &str)] = &[(
    "emulator",
    "Unhandled exception 13",
    "on AMD's CPUs a far pointer has no 64-bit offset: #GP at `rex.w ljmp`, in which the test ends; it passes on Intel's",
)];

/// One entry of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    name: String,
    file: String,
    arguments: String,
    qemu: String,
    arch: String,
    groups: String,
    smp: u32,
    timeout: Option<Duration>,
}

impl Entry {
    /// Whether there is such a kernel.
    fn is_for(&self, bits: Bits) -> bool {
        self.arch.is_empty() || self.arch == bits.arch()
    }
}

/// Runs the suite's list in QEMU, for later tables.
///
/// # Errors
/// It cannot be had or started.
pub fn run_in_tcg(place: &Place, bits: Bits, only: Option<&str>) -> Result<()> {
    let (folder, entries) = prepare(place, bits, only)?;
    let kept = place.kept(bits.name());
    let mut verdicts = read_kept(&kept);
    // Hyper-V's interface, which QEMU has with KVM only, and kernels of the other kind cannot even be started.
    let startable = |entry: &Entry| entry.is_for(bits) && !entry.groups.contains("hyperv");
    for entry in entries.into_iter().filter(startable) {
        let verdict = run_in_qemu(&folder, &entry)?;
        println!("{}: {}", entry.name, verdict.encode());
        verdicts.insert(entry.name, verdict);
        write_kept(&kept, &verdicts)?;
    }
    Ok(())
}

/// The built suite's folder and the entries of its list.
fn prepare(place: &Place, bits: Bits, only: Option<&str>) -> Result<(PathBuf, Vec<Entry>)> {
    let folder = built(place, bits)?;
    let list = folder.join("x86/unittests.cfg");
    let text = std::fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    let entries = parse(&text).into_iter().filter(|entry| only.is_none_or(|only| entry.name.contains(only)));
    Ok((folder, entries.collect()))
}

/// Runs the suite's list.
///
/// # Errors
/// It cannot be had or started.
pub fn run(place: &Place, bits: Bits, only: Option<&str>) -> Result<Suite> {
    let (folder, mut entries) = prepare(place, bits, only)?;
    if bits == Bits::Of32 {
        // Most of the list has 64-bit images only.
        entries.retain(|entry| entry.is_for(bits) && folder.join("x86").join(&entry.file).exists());
    }
    let qemu = read_kept(&place.kept(bits.name()));
    let mut rows = Vec::new();
    for entry in entries {
        let aside = aside(&entry, bits);
        let (ours, found) = match &aside {
            Some(why) => (Verdict::Aside, why.clone()),
            None => {
                let (verdict, note) = run_here(place, &folder, &entry)?;
                eprintln!("xtask: {} here: {}", entry.name, verdict.encode());
                (verdict, note)
            }
        };
        let remark = match REMARKS.iter().find(|(name, _)| *name == entry.name) {
            Some((_, remark)) => (*remark).to_owned(),
            None => on_amd(&entry.name, &ours).map_or(found, str::to_owned),
        };
        rows.push(Row { tcg: qemu.get(&entry.name).cloned(), name: entry.name, tests: 1, native: None, ours, remark });
    }
    let about = format!(
        "kvm-unit-tests ({}), {}, its own list; `cargo xtask suites {}`. anyvisor: translator, as many vCPUs as the list says. {}.",
        commit(&folder),
        bits.arch(),
        bits.name(),
        qemu_version()
    );
    Ok(Suite { name: bits.name(), about, rows })
}

/// Why a test fails, if it does so on AMD's CPUs, one of which this is.
fn on_amd(name: &str, verdict: &Verdict) -> Option<&'static str> {
    let Verdict::Fail(how) = verdict else { return None };
    let known = REMARKS_ON_AMD.iter().find(|(of, end, _)| *of == name && how.starts_with(end));
    known.filter(|_| super::host_is_amd()).map(|(.., remark)| *remark)
}

/// The suite's images, which are taken as its own build leaves them.
fn built(place: &Place, bits: Bits) -> Result<PathBuf> {
    let folder = place.obtain(bits.name(), super::copy_whole, |_| {
        bail!(
            "kvm-unit-tests are taken as built; give the folder of one that is built for {}: --source FOLDER",
            bits.arch()
        )
    })?;
    let configuration = folder.join("config.mak");
    let text = std::fs::read_to_string(&configuration)
        .with_context(|| format!("reading {}: is kvm-unit-tests built there?", configuration.display()))?;
    if !text.lines().any(|line| line.strip_prefix("ARCH=") == Some(bits.arch())) {
        bail!("{}: not built for {}", folder.display(), bits.arch());
    }
    Ok(folder)
}

/// The entries of a list: `[name]`, then `key = value` lines.
fn parse(text: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            entries.push(Entry { name: name.into(), smp: 1, ..Entry::default() });
            continue;
        }
        let (Some(entry), Some((key, value))) = (entries.last_mut(), line.split_once('=')) else { continue };
        let value = value.trim().trim_matches(['\'', '"']).to_owned();
        match key.trim() {
            "file" => entry.file = value,
            "smp" => entry.smp = value.parse().unwrap_or(1),
            "test_args" => entry.arguments = value,
            "qemu_params" | "extra_params" => entry.qemu = value,
            "arch" => entry.arch = value,
            "groups" => entry.groups = value,
            "timeout" => entry.timeout = value.trim_end_matches('s').parse().ok().map(Duration::from_secs),
            // What the host's KVM must be set to, and which accelerator a test is for.
            _ => {}
        }
    }
    entries
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Why a test is not run.
fn aside(entry: &Entry, bits: Bits) -> Option<String> {
    if !entry.is_for(bits) {
        return Some("for 32-bit kernels only".into());
    }
    if entry.groups.split(' ').any(|group| group == "nodefault") {
        return Some("not run by default: it wants a debugging feature of KVM".into());
    }
    let named = |part: &str| entry.name.contains(part) || entry.groups.contains(part) || entry.file.starts_with(part);
    ASIDE.iter().find(|(part, _)| named(part)).map(|(_, why)| (*why).to_owned())
}

/// The CPU model nearest to what the entry asks of QEMU.
fn cpu_model(qemu: &str) -> String {
    let mut words = qemu.split_whitespace().skip_while(|word| *word != "-cpu").skip(1);
    let wanted = words.next().unwrap_or("qemu64");
    let mut parts = wanted.split(',');
    let base = if parts.next() == Some("qemu64") && !wanted.contains("pcid") { "x86-64-v3" } else { "host" };
    // QEMU's `max` is all that there is.
    let mut model = if wanted.starts_with("max") { format!("{base},+pku,+pks") } else { base.to_owned() };
    for part in parts {
        match part {
            "-x2apic" | "-pcid" | "-invpcid" => model += &format!(",{part}"),
            "phys-bits=36" => model += ",phys-bits=36",
            _ => {}
        }
    }
    model
}

/// Runs a test in anyvisor; the verdict, and what to know about it.
fn run_here(place: &Place, folder: &Path, entry: &Entry) -> Result<(Verdict, String)> {
    // Of the tests that go by AMD's rules, those that cannot on Intel's are left out where no test device is told of.
    let amd = entry.qemu.contains("vendor=AuthenticAMD");
    let environment = place.cache.join("environment");
    let cpus = entry.smp.to_string();
    let text = format!("NR_CPUS={cpus}\nMEMSIZE=1024\nTEST_DEVICE={}\nBOOTLOADER=0\n", u8::from(!amd));
    std::fs::write(&environment, text).with_context(|| format!("writing {}", environment.display()))?;
    let memory = if entry.qemu.contains("-m 2048") { "2048M" } else { "1024M" };
    // One test compares clocks, and asks the shell for the time.
    let arguments = entry.arguments.replace("`date +%s`", &now().to_string());
    let mut command = vm::command();
    command.args(["run", "--engine", "translator", "--no-api", "--test-device", "--memory", memory, "--cpus", &cpus]);
    command.args(["--cpu-model", &cpu_model(&entry.qemu), "--cmdline", &arguments]);
    command.arg("--module").arg(&environment).arg("--kernel").arg(folder.join("x86").join(&entry.file));
    let ended = process::run(&mut command, entry.timeout.unwrap_or(TIMEOUT), |_| false)?;
    let verdict = judge(&ended);
    let note = match &verdict {
        Verdict::Pass if entry.smp > 1 => format!("{cpus} vCPUs"),
        Verdict::Skip => skipped_for(&ended.text()),
        _ => String::new(),
    };
    Ok((verdict, note))
}

fn run_in_qemu(folder: &Path, entry: &Entry) -> Result<Verdict> {
    crate::install_qemu()?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["--no-reboot", "-nodefaults", "-device", "pc-testdev"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-display", "none", "-serial", "stdio"]);
    command.args(["-device", "pci-testdev", "-machine", "accel=tcg", "-smp", &entry.smp.to_string()]);
    command.arg("-kernel").arg(folder.join("x86").join(&entry.file));
    let arguments = entry.arguments.replace("`date +%s`", &now().to_string());
    // TCG cannot be the host's processor; `max` is all that it can.
    let own = entry.qemu.replace("-cpu host", "-cpu max");
    // Some ask for KVM besides, which would be taken.
    command.args(["-append", &arguments]).args(own.split_whitespace().filter(|word| *word != "-enable-kvm"));
    Ok(judge(&process::run(&mut command, entry.timeout.unwrap_or(TIMEOUT), |_| false)?))
}

/// What a run came to. The exit code is `code << 1 | 1`: 0 for success, 77 >> 1 when all was skipped.
fn judge(ended: &Ended) -> Verdict {
    let text = ended.text();
    let count = |word: &str| text.lines().filter(|line| line.starts_with(word)).count();
    let (passed, failed) = (count("PASS:"), count("FAIL:"));
    // QEMU's own code for options that it refuses is the tests' for success.
    let refused = text.lines().any(|line| line.starts_with("qemu-system") && !line.contains("warning:"));
    match ended.code {
        _ if ended.timed_out => Verdict::Fail(format!("hangs after {passed}")),
        Some(1) if refused => Verdict::Fail(last_words(&text).unwrap_or_default()),
        Some(1) if failed == 0 => Verdict::Pass,
        Some(77) => Verdict::Skip,
        _ if failed > 0 => Verdict::Fail(format!("{failed} of {} fail", passed + failed)),
        Some(code) => Verdict::Fail(match last_words(&text) {
            Some(words) => words,
            None => format!("exit code {code}"),
        }),
        None => Verdict::Fail("killed by a signal".into()),
    }
}

/// What a test that crashed said, or the program that ran it.
fn last_words(output: &str) -> Option<String> {
    let telling =
        |line: &&str| ["Unhandled", "Assert", "ABORT", "anyvisor:", "qemu-"].iter().any(|word| line.contains(word));
    let line = output.lines().rev().filter(|line| !line.contains("warning:")).find(telling)?;
    Some(line.trim().chars().filter(|c| *c != '|').take(60).collect())
}

fn skipped_for(output: &str) -> String {
    let reason = output.lines().find_map(|line| line.trim().strip_prefix("SKIP: "));
    reason.unwrap_or_else(|| output.lines().rfind(|line| !line.starts_with("SUMMARY")).unwrap_or("")).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# [no]\n[x2apic]\nfile = apic.flat\nsmp = 2\nqemu_params = -cpu qemu64,+x2apic\ntimeout = 30\n\
                        groups = apic\n\n[vmexit_cpuid]\nfile = vmexit.flat\ntest_args = 'cpuid'\narch = i386\n";

    #[test]
    fn lists_are_read() {
        let entries = parse(LIST);
        assert_eq!(entries.len(), 2);
        assert_eq!(
            (entries[0].name.as_str(), entries[0].smp, entries[0].timeout),
            ("x2apic", 2, Some(Duration::from_secs(30)))
        );
        assert_eq!(entries[1].arguments, "cpuid");
        assert!(aside(&entries[1], Bits::Of64).unwrap().contains("32-bit") && aside(&entries[0], Bits::Of64).is_none());
        assert!(aside(&entries[1], Bits::Of32).is_none());
    }

    #[test]
    fn models_are_near() {
        for (qemu, model) in [
            ("", "x86-64-v3"),
            ("-cpu max,host-phys-bits", "host,+pku,+pks"),
            ("-cpu qemu64,-x2apic,+tsc-deadline", "x86-64-v3,-x2apic"),
            ("-cpu qemu64,-pcid,-invpcid", "host,-pcid,-invpcid"),
            ("-m 2048 -cpu host", "host"),
            ("-cpu IvyBridge,phys-bits=36,host-phys-bits=off", "host,phys-bits=36"),
        ] {
            assert_eq!(cpu_model(qemu), model);
        }
    }

    #[test]
    fn ends_are_judged() {
        let ended = |code: Option<i32>, output: &str| Ended { code, timed_out: code.is_none(), output: output.into() };
        assert_eq!(judge(&ended(Some(1), "PASS: a\n")), Verdict::Pass);
        assert_eq!(judge(&ended(Some(77), "SKIP: b\n")), Verdict::Skip);
        assert_eq!(judge(&ended(Some(3), "PASS: a\nFAIL: b\n")), Verdict::Fail("1 of 2 fail".into()));
        assert_eq!(
            judge(&ended(Some(127), "PASS: a\nUnhandled exception 6\n")),
            Verdict::Fail("Unhandled exception 6".into())
        );
        assert_eq!(judge(&ended(None, "PASS: a\n")), Verdict::Fail("hangs after 1".into()));
        let refused = "qemu-system-x86_64: warning: w\nqemu-system-x86_64: no such CPU\n";
        assert_eq!(judge(&ended(Some(1), refused)), Verdict::Fail("qemu-system-x86_64: no such CPU".into()));
        assert_eq!(skipped_for("x\nSKIP: PKU not enabled\nSUMMARY: 0 tests\n"), "PKU not enabled");
        assert_eq!(skipped_for("y\nno PKU\nSUMMARY: 0 tests\n"), "no PKU");
    }
}
