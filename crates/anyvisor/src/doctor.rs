//! `anyvisor doctor`: what this host offers each engine, and what `--engine auto` takes and why.

use crate::engines::{self, Unusable};
use anyvisor_engine::Engine;
use anyvisor_engine_kvm::Kvm;
use anyvisor_engine_translator::Translator;
use anyvisor_vmm::Result;
use anyvisor_vmm::config::HUGE;
use anyvisor_vmm::memory::{self, Pool};
use anyvisor_x86::cpuid::CpuModel;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Features (as /proc/cpuinfo names them) that the translator uses for itself, and what for.
const TRANSLATOR_USES: [(&str, &str); 4] = [
    ("fsgsbase", "switches to guest code cheaply"),
    ("bmi2", "guests of model x86-64-v3"),
    ("avx2", "guests of model x86-64-v3"),
    ("xsave", "keeps the guest's vector registers"),
];

/// Prints the report; returns the exit code: 0 if a guest of the default model can run, else 1.
pub fn command() -> Result<u8> {
    let cpuinfo = cpuinfo();
    let mut report = String::new();
    // Writing to a string cannot fail.
    let _ = host(&mut report, &cpuinfo);
    let kvm = engines::usable_kvm();
    let kvm_works = kvm_section(&mut report, &cpuinfo, &kvm);
    let translator_works = translator(&mut report, &cpuinfo);
    let auto = match &kvm {
        Ok(_) if kvm_works || !translator_works => "kvm, because 64-bit kernel code runs on the CPU in it".into(),
        Ok(_) => "kvm; only --engine translator runs the default CPU model".into(),
        Err(unusable) if translator_works => format!("translator, because {}", unusable.why),
        Err(_) => "nothing that runs the default CPU model: see above".to_owned(),
    };
    let _ = writeln!(report, "auto\n  takes {auto}");
    print!("{report}");
    Ok(u8::from(!(translator_works || kvm_works)))
}

fn cpuinfo() -> String {
    fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

/// Whether the host's CPU shows VT-x or AMD-V.
pub fn has_hardware_virtualization() -> bool {
    let cpuinfo = cpuinfo();
    has_flag(&cpuinfo, "vmx") || has_flag(&cpuinfo, "svm")
}

/// Why KVM could not be opened, and what to do, in one line.
pub fn kvm_refused(error: &anyvisor_engine::Error) -> String {
    match error {
        anyvisor_engine::Error::Host { .. } => format!("/dev/kvm is {}", device(Path::new(DEVICE))),
        other => other.to_string(),
    }
}

/// The value of the first line `key : value`.
fn field<'a>(cpuinfo: &'a str, key: &str) -> Option<&'a str> {
    cpuinfo.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key).map(|(_, v)| v.trim())
}

fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    field(cpuinfo, "flags").is_some_and(|flags| flags.split_whitespace().any(|f| f == flag))
}

fn host(out: &mut String, cpuinfo: &str) -> std::fmt::Result {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    writeln!(out, "host")?;
    writeln!(out, "  processor: {}", field(cpuinfo, "model name").unwrap_or("unknown"))?;
    writeln!(out, "  CPUs for this process: {cpus}")?;
    if has_flag(cpuinfo, "hypervisor") {
        writeln!(out, "  is itself a virtual machine")?;
    }
    let Pool { total, free } = Pool::of_host();
    match anyvisor_vmm::disk::io_uring() {
        Ok(()) => writeln!(out, "  io_uring: disks use it")?,
        Err(error) => writeln!(out, "  io_uring: {error}; disks take one request after the other")?,
    }
    writeln!(out, "  transparent huge pages: {}", memory::transparent_state(memory::TRANSPARENT))?;
    let in_files = memory::transparent_state(memory::TRANSPARENT_IN_FILES);
    let on_request = match memory::transparent_file(HUGE) {
        Ok(_) => "in a tmpfs of its own".into(),
        Err(why) => format!("private, no tmpfs of its own ({why})"),
    };
    writeln!(out, "  the same for the translator's RAM (shmem_enabled): {in_files}; with hugepages=thp: {on_request}")?;
    writeln!(out, "  pool of 2M pages (vm.nr_hugepages): {free} free of {total}")?;
    Ok(())
}

const DEVICE: &str = "/dev/kvm";

/// KVM's section; whether it runs a guest of the default model.
fn kvm_section(out: &mut String, cpuinfo: &str, kvm: &std::result::Result<Kvm, Unusable>) -> bool {
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(out, "kvm");
    let hardware = match (has_flag(cpuinfo, "vmx"), has_flag(cpuinfo, "svm")) {
        (true, _) => "VT-x (vmx)",
        (_, true) => "AMD-V (svm)",
        _ => "none (neither vmx nor svm in CPUID: none in this CPU, off in the firmware, or not given to this VM)",
    };
    let _ = writeln!(out, "  hardware virtualization: {hardware}");
    let _ = writeln!(out, "  {DEVICE}: {}", device(Path::new(DEVICE)));
    if Path::new("/sys/module/kvm_pvm").exists() {
        let _ = writeln!(out, "  kvm_pvm: loaded, a KVM on page tables alone, which emulates most kernel-mode code");
    }
    for module in ["kvm_intel", "kvm_amd"] {
        if let Ok(nested) = fs::read_to_string(format!("/sys/module/{module}/parameters/nested")) {
            let nested = matches!(nested.trim(), "Y" | "1");
            let _ = writeln!(out, "  {module}: nested virtualization {}", if nested { "on" } else { "off" });
        }
    }
    match kvm {
        Ok(engine) => {
            let works = models(out, engine);
            let scales = if engine.scales_tsc() { "yes" } else { "no: snapshots go on at this TSC's frequency only" };
            let _ = writeln!(out, "  TSC scaling: {scales}");
            let _ = writeln!(out, "  verdict: usable, a probe VM ran 64-bit kernel code at the CPU's speed");
            works
        }
        Err(Unusable { why, detail }) => {
            let _ = writeln!(out, "  verdict: not usable, {}", detail.as_ref().unwrap_or(why));
            false
        }
    }
}

/// Whether the device at `path` can be opened and, if not, what to do.
fn device(path: &Path) -> String {
    let Ok(metadata) = fs::metadata(path) else {
        return "absent (no KVM in this kernel, or not passed into this container)".into();
    };
    if !metadata.file_type().is_char_device() {
        return "not a device".into();
    }
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => "there, and this user may open it".into(),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let groups = fs::read_to_string("/etc/group").unwrap_or_default();
            match group_name(&groups, metadata.gid()) {
                Some(group) if metadata.mode() & 0o060 == 0o060 => {
                    format!("there, but only for group {group}; join it with: usermod -aG {group} USER")
                }
                _ => format!(
                    "there, but this user may not open it (owner {}, mode {:o})",
                    metadata.uid(),
                    metadata.mode() & 0o777
                ),
            }
        }
        Err(error) => format!("there, but cannot be opened: {error}"),
    }
}

/// The name of group `id` in the text of /etc/group.
fn group_name(groups: &str, id: u32) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then_some(name)
    })
}

/// The translator's section; whether it can run a guest of the default model.
fn translator(out: &mut String, cpuinfo: &str) -> bool {
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(out, "translator");
    for (flag, purpose) in TRANSLATOR_USES {
        let there = if has_flag(cpuinfo, flag) { "yes" } else { "no" };
        let _ = writeln!(out, "  {flag:<9} {there:<4} ({purpose})");
    }
    let engine = match Translator::new() {
        Ok(engine) => engine,
        Err(error) => {
            let _ = writeln!(out, "  verdict: not usable, {error}");
            return false;
        }
    };
    let default_works = models(out, &engine);
    let _ = writeln!(out, "  verdict: usable, needs no device and no privilege");
    default_works
}

/// Which CPU models an engine has here; whether the default one is among them.
fn models(out: &mut String, engine: &dyn Engine) -> bool {
    let supported = engine.supported_cpuid();
    let mut default_works = false;
    for model in [CpuModel::V3, CpuModel::V2, CpuModel::Host] {
        let _ = match model.table(&supported, 1, 0) {
            Ok(_) => {
                default_works |= model == CpuModel::V3;
                writeln!(out, "  model {model}: yes")
            }
            Err(error) => writeln!(out, "  model {model}: no, {error}"),
        };
    }
    default_works
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Example: 1\nflags\t\t: fpu avx2 bmi2\n";
        assert!(has_flag(cpuinfo, "avx2") && !has_flag(cpuinfo, "avx") && !has_flag("", "fpu"));
        assert_eq!(field(cpuinfo, "model name"), Some("Example: 1"));
    }

    #[test]
    fn groups_are_found_by_number() {
        let groups = "root:x:0:\nkvm:x:104:alice,bob\n";
        assert_eq!(group_name(groups, 104), Some("kvm"));
        assert_eq!(group_name(groups, 10), None);
    }

    #[test]
    fn a_missing_device_is_reported() {
        assert!(device(Path::new("/nonexistent")).starts_with("absent"));
        assert_eq!(device(Path::new("/")), "not a device");
    }
}
