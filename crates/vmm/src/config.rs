//! What to build, checked: the command line in types.
//!
//! Every error here is the user's, and one line that says what is wrong, with which value, and what to do.

use crate::ports::{self, Port};
use crate::share::Channel;
use crate::{Error, Result, vsock};
use anyvisor_devices::virtio::fs::TAG_MAX;
use anyvisor_x86::cpuid::CpuChoice;
use std::path::PathBuf;
use std::str::FromStr;

pub use crate::net::{Net, is_same_card};

/// Fewest bytes of RAM a machine can have: the boot structures and a small kernel.
pub const MEMORY_MIN: u64 = 8 << 20;
/// Most bytes of RAM, 1 TiB: a limit on what a typing error can ask of the host.
pub const MEMORY_MAX: u64 = 1 << 40;
/// Most vCPUs: what 8-bit APIC IDs and one bus lock serve well.
pub const CPUS_MAX: u32 = 64;

/// Most disks of a machine: they, the host bridge and what may come share one bus.
pub const DISKS_MAX: usize = 16;

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name in messages.
    pub id: String,
    /// A BIOS image or UEFI firmware to boot instead of a kernel.
    pub firmware: Option<Firmware>,
    /// bzImage, ELF with a PVH note, or an image with a Multiboot header.
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// Modules of a Multiboot kernel; the initrd comes before them.
    pub modules: Vec<Module>,
    pub command_line: String,
    pub disks: Vec<Disk>,
    pub nets: Vec<Net>,
    /// Folders of the host's that the guest has.
    pub shares: Vec<Share>,
    /// A command's standard streams.
    pub channel: Option<Channel>,
    /// RAM in bytes, a multiple of 4 KiB.
    pub memory: u64,
    pub huge_pages: HugePages,
    pub cpus: u32,
    pub cpu: CpuChoice,
    pub serial: Serial,
    /// What the guest has as its console: its output goes where `serial` says.
    pub console: Console,
    /// Named virtio ports.
    pub ports: Vec<Port>,
    /// A virtio device with random bytes of the host.
    pub rng: bool,
    /// Sockets between guest and host.
    pub vsock: Option<vsock::Address>,
    /// A balloon, and how many bytes it is to have at first.
    pub balloon: Option<u64>,
    /// A write of v to port 0xf4 ends the VM with exit code (v << 1) | 1.
    pub debug_exit: bool,
    /// The ports and memory that kvm-unit-tests need, and the debug-exit port.
    pub test_device: bool,
    pub on_reboot: OnReboot,
}

/// What `--firmware` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firmware {
    pub image: PathBuf,
    /// The file in which UEFI variables are kept.
    pub variables: Option<PathBuf>,
}

impl FromStr for Firmware {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Firmware, String> {
        let (image, variables) = match text.split_once(",vars=") {
            Some((image, variables)) => (image, Some(variables)),
            None => (text, None),
        };
        if image.is_empty() || variables.is_some_and(str::is_empty) {
            return Err(format!("'{text}' lacks a file; write FILE or FILE,vars=FILE"));
        }
        Ok(Firmware { image: image.into(), variables: variables.map(PathBuf::from) })
    }
}

/// A file that a Multiboot kernel finds in memory.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Module {
    pub path: PathBuf,
    /// What the kernel is told of it; by default its path.
    pub text: Option<String>,
}

impl FromStr for Module {
    type Err = String;

    /// A path, and a text after the first comma.
    fn from_str(text: &str) -> std::result::Result<Module, String> {
        let (path, text) = match text.split_once(',') {
            Some((path, text)) => (path, Some(text.to_owned())),
            None => (text, None),
        };
        if path.is_empty() {
            return Err("a module has no file; write FILE or FILE,TEXT".into());
        }
        Ok(Module { path: path.into(), text })
    }
}

/// A disk and the image that holds it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    pub path: PathBuf,
    pub read_only: bool,
    /// By default raw, unless the image looks like something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Past the host's page cache (O_DIRECT).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
    /// Most requests and most bytes in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
}

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Sector by sector.
    Raw,
    /// QEMU's, with what is behind it.
    Qcow2,
}

/// A folder of the host's and how the guest has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub path: PathBuf,
    /// The name by which the guest mounts it.
    pub tag: String,
    pub read_only: bool,
    /// Nobody changes it while the guest runs, so that the guest may keep what it has seen.
    pub unchanging: bool,
    /// The guest sees what belongs to the user who runs this process as root's.
    pub as_root: bool,
}

impl FromStr for Share {
    type Err = String;

    /// A folder, a name behind a colon, and options behind commas: `ro`, `cache=always`.
    fn from_str(text: &str) -> std::result::Result<Share, String> {
        let mut parts = text.split(',');
        let place = parts.next().unwrap_or_default();
        let (path, tag) = match place.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (place, None),
        };
        if path.is_empty() {
            return Err("a share has no folder; write FOLDER, FOLDER:NAME or FOLDER,ro".into());
        }
        let path = PathBuf::from(path);
        let own = path.file_name().map_or("root".into(), |name| name.to_string_lossy().into_owned());
        let tag = tag.map_or(own, str::to_owned);
        if tag.is_empty() || tag.len() > TAG_MAX || tag.contains('\0') {
            return Err(format!(
                "bad name '{tag}' of a share; a guest mounts it by 1 to {TAG_MAX} bytes: write FOLDER:NAME"
            ));
        }
        let mut share = Share { path, tag, read_only: false, unchanging: false, as_root: false };
        for part in parts {
            match part {
                "ro" => share.read_only = true,
                "cache=always" => share.unchanging = true,
                "cache=auto" => share.unchanging = false,
                _ => return Err(format!("unknown option '{part}' of a share; use ro or cache=always")),
            }
        }
        Ok(share)
    }
}

impl Config {
    /// Checks what single options cannot know.
    ///
    /// # Errors
    /// [`Error::User`] for too little or too much memory, and for too many vCPUs.
    pub fn validate(&self) -> Result<()> {
        if self.memory < MEMORY_MIN {
            return Err(Error::user(format!(
                "--memory {} is too little; give at least {}",
                show_size(self.memory),
                show_size(MEMORY_MIN)
            )));
        }
        if self.memory > MEMORY_MAX {
            return Err(Error::user(format!(
                "--memory {} is too much; give at most {}",
                show_size(self.memory),
                show_size(MEMORY_MAX)
            )));
        }
        if self.huge_pages == HugePages::Pool && !self.memory.is_multiple_of(HUGE) {
            let size = show_size(self.memory);
            return Err(Error::user(format!(
                "--memory {size},hugepages=2M is not a multiple of 2M; give a size that is"
            )));
        }
        ports::check(&self.ports)?;
        if let Some(balloon) = self.balloon {
            check_balloon(balloon, self.memory)?;
            if self.huge_pages == HugePages::Pool {
                let why = "takes memory back in pages of 4K, and --memory with hugepages=2M has none of those";
                return Err(Error::user(format!("--balloon {why}; leave one of them out")));
            }
        }
        if self.cpus == 0 || self.cpus > CPUS_MAX {
            return Err(Error::user(format!("--cpus {} is out of range; give 1 to {CPUS_MAX}", self.cpus)));
        }
        Ok(())
    }
}

/// Refuses a balloon of `bytes` bytes in a machine with `memory`.
///
/// # Errors
/// [`Error::User`]: it is too large.
pub fn check_balloon(bytes: u64, memory: u64) -> Result<()> {
    if bytes > memory {
        let (bytes, memory) = (show_size(bytes), show_size(memory));
        return Err(Error::user(format!("a balloon of {bytes} is larger than the guest's memory of {memory}")));
    }
    Ok(())
}

/// Bytes of a huge page of the kinds below.
pub const HUGE: u64 = 2 << 20;

/// The pages of the host that RAM is on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Transparent huge pages as far as the host gives them; 4 KiB pages otherwise.
    #[default]
    IfThere,
    /// Transparent huge pages, in a file too: refused where the host has them switched off. A restored VM gets them, too.
    Transparent,
    /// 2 MiB pages of the host's pool, taken out of it before the guest starts.
    Pool,
}

/// What `--memory` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// In bytes, a multiple of 4 KiB.
    pub size: u64,
    pub huge_pages: HugePages,
}

impl FromStr for Memory {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Memory, String> {
        let (size, option) = match text.split_once(',') {
            Some((size, option)) => (size, Some(option)),
            None => (text, None),
        };
        let size = parse_size(size)?;
        let huge_pages = match option {
            None => HugePages::default(),
            Some("hugepages=thp") => HugePages::Transparent,
            Some("hugepages=2M") => HugePages::Pool,
            Some(other) => {
                return Err(format!("unknown kind of memory '{other}'; use hugepages=thp or hugepages=2M"));
            }
        };
        Ok(Memory { size, huge_pages })
    }
}

/// Where the serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// The process's stdin and stdout.
    Stdio,
    /// Output only, to a file that is created or emptied.
    File(PathBuf),
    /// Output is dropped, input never comes.
    Null,
}

impl FromStr for Serial {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Serial, String> {
        match text {
            "stdio" => Ok(Serial::Stdio),
            "null" => Ok(Serial::Null),
            _ => match text.strip_prefix("file:") {
                Some(path) if !path.is_empty() => Ok(Serial::File(path.into())),
                _ => Err(format!("unknown serial console '{text}'; use stdio, file:PATH or null")),
            },
        }
    }
}

/// The device that is the guest's console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// The 16550, Linux' ttyS0.
    #[default]
    Serial,
    /// A virtio console, Linux' hvc0. What the guest writes to the 16550 is dropped.
    Virtio,
}

impl FromStr for Console {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Console, String> {
        match text {
            "serial" => Ok(Console::Serial),
            "virtio" => Ok(Console::Virtio),
            _ => Err(format!("unknown console '{text}'; use serial or virtio")),
        }
    }
}

/// What a reset of the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReboot {
    Exit,
    /// Builds the VM anew and boots it again.
    Restart,
}

impl FromStr for OnReboot {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<OnReboot, String> {
        match text {
            "exit" => Ok(OnReboot::Exit),
            "restart" => Ok(OnReboot::Restart),
            _ => Err(format!("unknown action '{text}'; use exit or restart")),
        }
    }
}

/// Parses a size such as `512M` or `2G` (binary units K, M, G, T) into bytes, a multiple of 4 KiB.
///
/// # Errors
/// One line about what is wrong with `text`.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        "" => return Err(format!("size '{text}' has no unit; write for example 512M or 2G")),
        _ => return Err(format!("bad size '{text}'; write for example 512M or 2G")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("bad size '{text}'; write for example 512M or 2G"))?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(|| format!("size '{text}' is too large"))?;
    if !bytes.is_multiple_of(4096) {
        return Err(format!("size '{text}' is not a multiple of 4K"));
    }
    Ok(bytes)
}

/// Parses the value of option `name` that is a number in each second, such as `5000` or `10M` (binary units K, M, G).
///
/// # Errors
/// One line about what is wrong with `text`.
pub fn parse_rate(name: &str, text: &str) -> std::result::Result<u64, String> {
    let wrong = || format!("bad {name} '{text}'; write a number, for example 5000 or 10M");
    let digits = text.trim_end_matches(['K', 'M', 'G', 'k', 'm', 'g']);
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).filter(|rate| *rate > 0).ok_or_else(wrong)
}

/// A size for messages, in the largest unit that divides it.
pub fn show_size(bytes: u64) -> String {
    for (shift, unit) in [(30, "G"), (20, "M"), (10, "K")] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// The smallest size in whole MiB that holds `bytes`, for advice.
pub fn show_mib(bytes: u64) -> String {
    format!("{}M", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        for bad in ["", "M", "12", "-5M", "5X", "1.5G", "99999999999999999999M", "18446744073709551615T", "1K", "٣M"] {
            let message = parse_size(bad).unwrap_err();
            assert!(message.contains(&format!("'{bad}'")) && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn memory_parses() {
        let memory = |huge_pages| Ok(Memory { size: 64 << 20, huge_pages });
        assert_eq!("64M".parse(), memory(HugePages::IfThere));
        assert_eq!("64M,hugepages=thp".parse(), memory(HugePages::Transparent));
        assert_eq!("64M,hugepages=2M".parse(), memory(HugePages::Pool));
        for bad in ["64M,", "64M,hugepages", "64M,hugepages=", "64M,hugepages=1G", "64M,thp", "64M,hugepages=thp,x"] {
            let message = bad.parse::<Memory>().unwrap_err();
            assert!(message.contains("hugepages=thp or hugepages=2M") && !message.contains('\n'), "{message}");
        }
        assert!("5X,hugepages=thp".parse::<Memory>().unwrap_err().contains("'5X'"));
    }

    #[test]
    fn sizes_show() {
        assert_eq!(show_size(2 << 30), "2G");
        assert_eq!(show_size(1536 << 20), "1536M");
        assert_eq!(show_size(4097), "4097 bytes");
        assert_eq!(show_mib((1 << 20) + 1), "2M");
    }

    #[test]
    fn modules_parse() {
        let module = |path: &str, text: Option<&str>| Module { path: path.into(), text: text.map(str::to_owned) };
        assert_eq!("a/b".parse(), Ok(module("a/b", None)));
        assert_eq!("a,".parse(), Ok(module("a", Some(""))));
        assert_eq!("a,b c,d".parse(), Ok(module("a", Some("b c,d"))));
        assert!(",x".parse::<Module>().unwrap_err().contains("file"));
    }

    #[test]
    fn firmware_parses() {
        let firmware = |image: &str, variables: Option<&str>| Firmware {
            image: image.into(),
            variables: variables.map(PathBuf::from),
        };
        assert_eq!("a,b".parse(), Ok(firmware("a,b", None)));
        assert_eq!("a,vars=b/c".parse(), Ok(firmware("a", Some("b/c"))));
        for bad in ["", "a,vars=", ",vars=b"] {
            assert!(bad.parse::<Firmware>().unwrap_err().contains("FILE,vars=FILE"));
        }
    }

    #[test]
    fn serial_targets_parse() {
        assert_eq!("stdio".parse(), Ok(Serial::Stdio));
        assert_eq!("file:/tmp/x".parse(), Ok(Serial::File("/tmp/x".into())));
        assert!("file:".parse::<Serial>().is_err());
        assert!("tty".parse::<Serial>().unwrap_err().contains("tty"));
    }

    #[test]
    fn a_machine_has_limits() {
        let good = Config {
            id: "t".into(),
            firmware: None,
            kernel: "k".into(),
            initrd: None,
            modules: Vec::new(),
            command_line: String::new(),
            disks: Vec::new(),
            nets: Vec::new(),
            shares: vec![],
            channel: None,
            memory: 512 << 20,
            huge_pages: HugePages::IfThere,
            cpus: 1,
            cpu: anyvisor_x86::cpuid::CpuModel::V3.into(),
            serial: Serial::Null,
            console: Console::Serial,
            ports: Vec::new(),
            rng: false,
            vsock: None,
            balloon: None,
            debug_exit: false,
            test_device: false,
            on_reboot: OnReboot::Exit,
        };
        assert!(good.validate().is_ok());
        let message = Config { memory: 4096, ..good.clone() }.validate().unwrap_err().to_string();
        assert!(message.contains("4K") && message.contains("8M"), "{message}");
        assert!(Config { memory: MEMORY_MAX + 4096, ..good.clone() }.validate().is_err());
        assert!(Config { cpus: 0, ..good.clone() }.validate().is_err());
        assert!(Config { cpus: 65, ..good.clone() }.validate().is_err());
        let odd = Config { memory: 9 << 20, huge_pages: HugePages::Pool, ..good };
        assert!(odd.validate().unwrap_err().to_string().contains("--memory 9M,hugepages=2M is not a multiple of 2M"));
        assert!(Config { memory: 10 << 20, ..odd.clone() }.validate().is_ok());
        assert!(Config { huge_pages: HugePages::Transparent, ..odd }.validate().is_ok());
    }
}
