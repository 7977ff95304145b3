//! The manifest: one line that says what it is and vouches for the rest, and the rest in JSON.

use super::{PAGE, pages};
use crate::Config;
use crate::config::{Console, Disk, Firmware, HugePages, Module, Net, OnReboot, Serial};
use crate::machine::BoardState;
use crate::memory::flash_size;
use crate::ports::Port;
use crate::{layout, vsock};
use anyvisor_devices::state::LATEST;
use anyvisor_x86::cpuid::CpuChoice;
use anyvisor_x86::{Cpuid, VcpuState};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::path::{Path, PathBuf};
use vm_memory::GuestMemoryMmap;

/// Version of the format that this build writes, and the only one it reads.
pub const FORMAT: u32 = 2;

/// What the first line begins with.
const MAGIC: &str = "anyvisor-snapshot";
/// Bytes that a manifest has at most: 64 vCPUs take less than 2 MiB.
pub(super) const SIZE_MAX: u64 = 16 << 20;
/// Most entries of a vCPU's tables.
const LEAVES_MAX: usize = 1024;
const MSRS_MAX: usize = 1024;
/// Largest XSAVE area that any processor has, rounded up (SDM vol. 1 13.5).
const XSAVE_MAX: usize = 64 << 10;
const LAPIC_SIZE: usize = 1024;

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Checksum(#[serde(with = "anyvisor_devices::state::hex")] [u8; 32]);

impl Checksum {
    pub fn of(bytes: &[u8]) -> Checksum {
        Checksum(Sha256::digest(bytes).into())
    }
}

/// A SHA-256 in the making.
#[derive(Default)]
pub(super) struct Hash(Sha256);

impl Hash {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Checksum {
        Checksum(self.0.finalize().into())
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// All of a saved VM but its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Program and version that saved it, and the engine it ran on: for people.
    pub writer: String,
    pub engine: String,
    /// When it was saved, in nanoseconds since 1970 (UTC).
    pub saved_at: u64,
    /// The snapshot that has the pages which this one lacks.
    pub parent: Option<Parent>,
    pub machine: Machine,
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u64,
    /// Nanoseconds of guest time, as kvmclock shows it.
    pub clock: u64,
    /// By number.
    pub vcpus: Vec<Vcpu>,
    pub board: BoardState,
    pub memory: Memory,
}

/// The snapshot that another builds on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its folder, from the folder of the snapshot that builds on it.
    pub path: PathBuf,
    pub checksum: Checksum,
}

/// What of [`Config`] makes the machine the one it is. The rest is the business of each run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// The file in which UEFI variables are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<PathBuf>,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<Module>,
    pub command_line: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<Net>,
    /// RAM in bytes.
    pub memory: u64,
    /// Flash memory in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub flash: u64,
    pub cpus: u32,
    pub cpu: CpuChoice,
    pub debug_exit: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub test_device: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub console: Console,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rng: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<vsock::Address>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<u64>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Machine {
    /// Of a machine that `config` made and that has this memory.
    pub fn of(config: &Config, memory: &GuestMemoryMmap) -> Machine {
        Machine {
            id: config.id.clone(),
            firmware: config.firmware.as_ref().map(|firmware| absolute(&firmware.image)),
            variables: config.firmware.as_ref().and_then(|firmware| firmware.variables.as_deref().map(absolute)),
            kernel: absolute(&config.kernel),
            initrd: config.initrd.as_deref().map(absolute),
            modules: config.modules.iter().map(|m| Module { path: absolute(&m.path), ..m.clone() }).collect(),
            command_line: config.command_line.clone(),
            disks: config.disks.iter().map(|disk| Disk { path: absolute(&disk.path), ..disk.clone() }).collect(),
            nets: config.nets.clone(),
            memory: config.memory,
            flash: flash_size(memory),
            cpus: config.cpus,
            cpu: config.cpu,
            debug_exit: config.debug_exit,
            test_device: config.test_device,
            console: config.console,
            ports: config.ports.iter().map(Port::absolute).collect(),
            rng: config.rng,
            balloon: config.balloon,
            vsock: config.vsock.as_ref().map(|v| vsock::Address { path: absolute(&v.path), ..v.clone() }),
        }
    }

    /// Virtio devices.
    fn devices(&self) -> usize {
        let console = self.console == Console::Virtio || !self.ports.is_empty();
        self.disks.len()
            + self.nets.len()
            + usize::from(console)
            + usize::from(self.rng)
            + usize::from(self.vsock.is_some())
            + usize::from(self.balloon.is_some())
    }

    /// Bytes of all its memory.
    pub fn memory_size(&self) -> u64 {
        self.memory + self.flash
    }

    /// Whether `other`'s memory is where this one's is.
    pub fn has_memory_of(&self, other: &Machine) -> bool {
        (self.memory, self.flash) == (other.memory, other.flash)
    }

    /// The VM to run, with what this run decides.
    pub fn config(&self, serial: Serial, on_reboot: OnReboot) -> Config {
        Config {
            id: self.id.clone(),
            firmware: self.firmware.clone().map(|image| Firmware { image, variables: self.variables.clone() }),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            modules: self.modules.clone(),
            command_line: self.command_line.clone(),
            disks: self.disks.clone(),
            nets: self.nets.clone(),
            // A VM that has some is not saved.
            shares: Vec::new(),
            channel: None,
            memory: self.memory,
            huge_pages: HugePages::default(),
            cpus: self.cpus,
            cpu: self.cpu,
            serial,
            console: self.console,
            ports: self.ports.clone(),
            rng: self.rng,
            balloon: self.balloon,
            vsock: self.vsock.clone(),
            debug_exit: self.debug_exit,
            test_device: self.test_device,
            on_reboot,
        }
    }
}

/// A path that means the same in every folder, as far as there is one.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// One vCPU: what it looks like to its guest, and its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vcpu {
    pub cpuid: Cpuid,
    pub state: VcpuState,
}

/// The files with the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Entries of `pages`, and the checksum of the whole file.
    pub extents: u64,
    pub checksum: Checksum,
}

impl Manifest {
    /// The file's contents, and the checksum that names the snapshot.
    ///
    /// # Errors
    /// Something that JSON cannot hold: a path that is not UTF-8.
    pub fn encode(&self) -> std::result::Result<(Vec<u8>, Checksum), serde_json::Error> {
        let mut body = serde_json::to_vec(self)?;
        body.push(b'\n');
        let checksum = Checksum::of(&body);
        Ok(([format!("{MAGIC} {FORMAT} {checksum}\n").as_bytes(), &body].concat(), checksum))
    }

    /// Reads and checks a file's contents. Whether an engine can run it is another question.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow "its manifest".
    pub fn decode(bytes: &[u8]) -> std::result::Result<(Manifest, Checksum), String> {
        let cut = || "is not whole".to_owned();
        let end = bytes.iter().take(200).position(|byte| *byte == b'\n');
        let head = std::str::from_utf8(&bytes[..end.unwrap_or(0)]).unwrap_or("");
        let mut words = head.split(' ');
        if words.next() != Some(MAGIC) {
            return Err("is none of anyvisor's".into());
        }
        let format = words.next().unwrap_or("");
        if format != FORMAT.to_string() {
            return Err(format!("has format '{}', and this build reads format {FORMAT} only", format.escape_debug()));
        }
        let body = &bytes[end.ok_or_else(cut)? + 1..];
        let checksum = Checksum::of(body);
        if words.next() != Some(&checksum.to_string()) || words.next().is_some() {
            return Err("does not have its checksum: it is damaged or not whole".into());
        }
        let manifest: Manifest = serde_json::from_slice(body).map_err(|error| format!("makes no sense: {error}"))?;
        manifest.check().map_err(|what| format!("makes no sense: {what}"))?;
        Ok((manifest, checksum))
    }

    /// Refuses what no machine can be, and what this build relies on not to see.
    fn check(&self) -> std::result::Result<(), String> {
        self.machine.config(Serial::Null, OnReboot::Exit).validate().map_err(|error| error.to_string())?;
        let require = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
        require(self.machine.memory.is_multiple_of(PAGE), "half a page of memory")?;
        require(self.vcpus.len() == self.machine.cpus as usize, "not as many vCPUs as it says")?;
        let flash = self.machine.flash;
        let variables = self.machine.variables.is_some();
        require(!variables || (flash > 0 && flash <= layout::FLASH_MAX_BESIDE_VARIABLES), "impossible UEFI variables")?;
        require(self.board.variables.is_some() == variables, "UEFI variables in only one of machine and state")?;
        require(self.board.devices.len() == self.machine.devices(), "not as many devices as it says")?;
        require((1_000..=1 << 32).contains(&self.tsc_khz), "an impossible TSC frequency")?;
        require(self.clock <= LATEST, "an impossible time")?;
        let possible = flash <= layout::FLASH_MAX && (flash == 0 || self.machine.firmware.is_some());
        require(possible && flash.is_multiple_of(PAGE), "impossible flash memory")?;
        let apart = !self.machine.test_device || flash <= layout::FLASH_MAX_BESIDE_TEST_DEVICE;
        require(apart, "flash memory where the test device's is")?;
        require(self.memory.extents <= self.machine.memory_size() / PAGE, "more pieces of memory than pages")?;
        for vcpu in &self.vcpus {
            let state = &vcpu.state;
            require(vcpu.cpuid.leaves.len() <= LEAVES_MAX, "too many CPUID leaves")?;
            require(state.msrs.len() <= MSRS_MAX, "too many MSRs")?;
            require(state.xsave.len() <= XSAVE_MAX, "too large an XSAVE area")?;
            require(state.lapic.len() == LAPIC_SIZE, "a local APIC of another size")?;
        }
        self.board.check().map_err(|error| error.to_string())
    }

    /// Pages of memory.
    pub(super) fn page_count(&self) -> u64 {
        self.machine.memory_size() / PAGE
    }

    /// Bytes that `pages` must have.
    pub(super) fn pages_size(&self) -> u64 {
        pages::file_size(self.memory.extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest as the first build with this format wrote it. If this fails, the format has changed without
    /// its number: snapshots of users would be refused as nonsense, or worse.
    const KEPT: &str = include_str!("kept-v2.manifest");

    #[test]
    fn kept_manifests_are_read_and_written_the_same() {
        let (manifest, checksum) = Manifest::decode(KEPT.as_bytes()).unwrap();
        assert_eq!(manifest.machine.id, "kept");
        assert_eq!(manifest.vcpus[0].state.lapic.len(), LAPIC_SIZE);
        let (bytes, same) = manifest.encode().unwrap();
        assert_eq!(checksum, same);
        assert!(bytes == KEPT.as_bytes());
    }

    #[test]
    fn cut_and_changed_manifests_are_refused() {
        for end in (0..KEPT.len()).step_by(97) {
            assert!(Manifest::decode(&KEPT.as_bytes()[..end]).is_err(), "cut at {end}");
        }
        for at in (0..KEPT.len()).step_by(89) {
            let mut bytes = KEPT.as_bytes().to_vec();
            bytes[at] ^= 0x20;
            assert!(Manifest::decode(&bytes).is_err(), "changed at {at}");
        }
    }
}
