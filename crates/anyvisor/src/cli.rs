//! The command line, parsed into types. Every mistake is one line on stderr and exit code 2.

use crate::control::runtime::{Wanted, check_id};
use crate::engines::EngineChoice;
use anyvisor_vmm::config::{
    Config, Console, Disk, Firmware, HugePages, Memory, Module, Net, OnReboot, Serial, Share, is_same_card, parse_size,
    show_size,
};
use anyvisor_vmm::ports::Port;
use anyvisor_vmm::{Error, Result, gdb, snapshot, vsock};
use anyvisor_x86::cpuid::{CpuChoice, CpuModel};
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// How long `stop` waits for the guest.
const STOP_TIMEOUT: &str = "30s";

/// Runs unmodified x86-64 operating systems, with or without hardware virtualization.
#[derive(Debug, Parser)]
#[command(name = "anyvisor", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boots a kernel; its serial console is on stdin and stdout (Ctrl-A X ends the VM)
    Run(Box<RunOptions>),
    /// Lists your running VMs
    Ps(PsOptions),
    /// Holds a VM still until resume
    Pause(NameOption),
    /// Lets a paused VM go on
    Resume(NameOption),
    /// Ends a VM: presses its power button, and ends it by force if it has not powered off in time
    Stop(StopOptions),
    /// Saves a running or paused VM to a folder, for run --restore
    Snapshot(SnapshotOptions),
    /// Shows how much memory a VM lends to the host by its balloon, or makes it lend more or less
    Balloon(BalloonOptions),
    /// Lists a VM's devices, or adds or removes one while it runs
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Attaches this terminal to a VM's serial console (Ctrl-A X detaches)
    Console(NameOption),
    /// Shows what intercepts a VM's guest code, how often and how long, by vCPU
    Stat(StatOptions),
    /// Shows what this host offers each engine, and what `--engine auto` takes and why
    Doctor,
    /// Fetches a Linux kernel and a shell, and boots them; with --distro a whole Debian
    Quickstart(QuickstartOptions),
    /// Runs a command of this host's in a fresh VM: it sees the host's files, and what it changes of them is gone with the VM
    Exec(ExecOptions),
}

impl Command {
    pub fn verbosity(&self) -> u8 {
        match self {
            Command::Run(options) => options.verbose,
            Command::Quickstart(options) => options.verbose,
            Command::Exec(options) => options.verbose.saturating_sub(1),
            _ => 0,
        }
    }
}

#[derive(Debug, Args)]
pub struct RunOptions {
    /// Linux bzImage (vmlinuz), ELF vmlinux with a PVH note, or a Multiboot kernel
    #[arg(long, value_name = "FILE", required_unless_present_any = ["restore", "firmware"])]
    pub kernel: Option<PathBuf>,
    /// BIOS image of at most 256K, or UEFI firmware of at most 16M, to start instead of a kernel; and the file that keeps
    /// its variables
    #[arg(long, value_name = "FILE[,vars=FILE]", conflicts_with_all = ["kernel", "initrd", "module", "cmdline"])]
    pub firmware: Option<Firmware>,
    /// Go on from a snapshot; of the machine's options, only those that agree with it can be given
    #[arg(long, value_name = "FOLDER")]
    pub restore: Option<PathBuf>,
    /// With --restore: compare all of the snapshot's memory with its checksums before the guest goes on, and
    /// not while it does
    #[arg(long, requires = "restore")]
    pub verify_first: bool,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Module of a Multiboot kernel, and what the kernel is told of it; repeat for more
    #[arg(long, value_name = "FILE[,TEXT]")]
    pub module: Vec<Module>,
    /// Kernel command line [default: console=ttyS0; with --console virtio console=hvc0]
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Disk, an image or block device of the host; ro: read it only; direct: past the host's page cache; iops, bw: most requests,
    /// bytes a second (bw=20M); repeat for more
    #[arg(long, value_name = "PATH[,ro][,format=raw|qcow2][,direct][,iops=N][,bw=N]")]
    pub disk: Vec<Disk>,
    /// Network card: user (the host's sockets, no rights needed; the guest gets 10.0.2.15 by DHCP, 10.0.2.2 is this host) with ports
    /// that lead to the guest (fwd=tcp:2222:22, fwd=udp:ADDRESS:PORT:PORT), or tap=NAME, an interface that exists; bw= limits
    /// bytes and pps= packets a second, each way; repeat for more
    #[arg(long, value_name = "user[,fwd=tcp:PORT:PORT]|tap=NAME[,mac=MAC][,mtu=N][,bw=N][,pps=N]")]
    pub net: Vec<Net>,
    /// Folder of the host that the guest may mount (mount -t virtiofs NAME /mnt); by default its name is the folder's own.
    /// With ro nothing in it can be changed, with cache=always nobody else changes it meanwhile; repeat for more
    #[arg(long, value_name = "FOLDER[:NAME][,ro][,cache=always]")]
    pub share: Vec<Share>,
    /// RAM, and on which pages of the host: 4G, 4G,hugepages=thp (transparent huge pages, or none at all) or
    /// 4G,hugepages=2M (from the host's pool, vm.nr_hugepages) [default: 512M]
    #[arg(long, value_name = "SIZE[,hugepages=thp|2M]")]
    pub memory: Option<Memory>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// What executes guest code: auto, translator or kvm
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    pub engine: EngineChoice,
    /// x86-64-v3, x86-64-v2 or host, and features to leave out (x86-64-v2,-pcid) or ask for (host,+pku,+pks) [default: x86-64-v3]
    #[arg(long, value_name = "MODEL")]
    pub cpu_model: Option<CpuChoice>,
    /// Serial console: stdio, file:PATH or null [default: stdio; with --detach null]
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<Serial>,
    /// What the guest has as its console: serial (Linux' ttyS0) or virtio (hvc0); where it goes says --serial [default: serial]
    #[arg(long, value_name = "DEVICE")]
    pub console: Option<Console>,
    /// A port for the guest, /dev/virtio-ports/NAME there: a Unix socket to connect to, or a file that takes what the guest
    /// writes; repeat for more
    #[arg(long, value_name = "NAME=PATH|file:PATH")]
    pub port: Vec<Port>,
    /// Give the guest a device with the host's random bytes
    #[arg(long)]
    pub rng: bool,
    /// Sockets between guest and host: the guest's address (3 or more), and the Unix socket that the host's programs connect to
    /// (docs/devices.md)
    #[arg(long, value_name = "CID:PATH")]
    pub vsock: Option<vsock::Address>,
    /// Balloon: memory that the guest lends to the host, so much of it at first (0M: none yet; see anyvisor balloon), and what
    /// it has free
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub balloon: Option<u64>,
    /// Run the VM in the background and print its name; see anyvisor console and stop
    #[arg(short, long, conflicts_with = "no_api")]
    pub detach: bool,
    /// Make the control socket here instead of in the runtime folder
    #[arg(long, value_name = "PATH", conflicts_with = "no_api")]
    pub api_sock: Option<PathBuf>,
    /// Make no control socket
    #[arg(long)]
    pub no_api: bool,
    /// Wait for gdb on this TCP port of 127.0.0.1, or Unix socket (a path with a slash), before the guest starts
    #[arg(long, value_name = "PORT|PATH")]
    pub gdb: Option<gdb::Address>,
    /// Count what intercepts guest code, and print it on stderr at the end; see anyvisor stat
    #[arg(long)]
    pub stat: bool,
    /// Let a guest's write of v to port 0xf4 end the VM with exit code (v<<1)|1
    #[arg(long)]
    pub debug_exit: bool,
    /// Give the guest the ports and memory that kvm-unit-tests need, --debug-exit included
    #[arg(long)]
    pub test_device: bool,
    /// What a guest's reboot does: exit or restart
    #[arg(long, value_name = "ACTION", default_value = "exit")]
    pub on_reboot: OnReboot,
    /// Name of the VM, one running VM's only [default: vm- and the process id, or what the snapshot's was given]
    #[arg(long, value_name = "NAME", value_parser = check_id)]
    pub id: Option<String>,
    /// More messages on stderr; repeat for more
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl RunOptions {
    /// The VM that the options describe.
    pub fn config(&self) -> Config {
        Config {
            id: self.id.clone().unwrap_or_else(default_id),
            firmware: self.firmware.clone(),
            kernel: self.kernel.clone().unwrap_or_default(),
            initrd: self.initrd.clone(),
            modules: self.module.clone(),
            command_line: self.cmdline.clone().unwrap_or_else(|| default_command_line(self.console).into()),
            disks: self.disk.clone(),
            nets: self.net.clone(),
            shares: self.share.clone(),
            channel: None,
            memory: self.memory.map_or(512 << 20, |memory| memory.size),
            huge_pages: self.huge_pages(),
            cpus: self.cpus.unwrap_or(1),
            cpu: self.cpu_model.unwrap_or(CpuModel::V3.into()),
            serial: self.serial(),
            console: self.console.unwrap_or_default(),
            ports: self.port.clone(),
            rng: self.rng,
            vsock: self.vsock.clone(),
            balloon: self.balloon,
            debug_exit: self.debug_exit || self.test_device,
            test_device: self.test_device,
            on_reboot: self.on_reboot,
        }
    }

    /// The VM that goes on from a snapshot of `machine`, in folder `from`.
    ///
    /// # Errors
    /// An option that contradicts what was saved.
    pub fn restored(&self, machine: &snapshot::Machine, from: &Path) -> Result<Config> {
        let contradicts = |option: &str, given: String, saved: String| {
            Err(Error::user(format!(
                "--{option} {given} contradicts snapshot '{}', which has {saved}; leave --{option} out",
                from.display()
            )))
        };
        if let Some(given) = self.memory.filter(|given| given.size != machine.memory) {
            return contradicts("memory", show_size(given.size), show_size(machine.memory));
        }
        if let Some(given) = self.cpus.filter(|given| *given != machine.cpus) {
            return contradicts("cpus", given.to_string(), machine.cpus.to_string());
        }
        if let Some(given) = self.cpu_model.filter(|given| *given != machine.cpu) {
            return contradicts("cpu-model", given.to_string(), machine.cpu.to_string());
        }
        if let Some(given) = self.cmdline.as_ref().filter(|given| **given != machine.command_line) {
            return contradicts("cmdline", format!("'{given}'"), format!("'{}'", machine.command_line.escape_debug()));
        }
        let shown = |path: Option<&PathBuf>| path.map_or("none".into(), |path| format!("'{}'", path.display()));
        let firmware = self.firmware.as_ref().map(|firmware| &firmware.image);
        let variables = self.firmware.as_ref().and_then(|firmware| firmware.variables.as_ref());
        for (option, given, saved) in [
            ("kernel", self.kernel.as_ref(), Some(&machine.kernel)),
            ("initrd", self.initrd.as_ref(), machine.initrd.as_ref()),
            ("firmware", firmware, machine.firmware.as_ref()),
            ("firmware FILE,vars", variables, machine.variables.as_ref()),
        ] {
            if given.is_some_and(|given| Some(&snapshot::absolute(given)) != saved) {
                return contradicts(option, shown(given), shown(saved));
            }
        }
        if self.debug_exit && !machine.debug_exit {
            return Err(Error::user(format!(
                "--debug-exit contradicts snapshot '{}', which has no debug-exit port; leave it out",
                from.display()
            )));
        }
        if self.test_device && !machine.test_device {
            return Err(Error::user(format!(
                "--test-device contradicts snapshot '{}', which has no test device; leave it out",
                from.display()
            )));
        }
        let given: Vec<Module> =
            self.module.iter().map(|m| Module { path: snapshot::absolute(&m.path), ..m.clone() }).collect();
        if !given.is_empty() && given != machine.modules {
            return contradicts("module", "as given".into(), format!("{} others", machine.modules.len()));
        }
        let given: Vec<Disk> =
            self.disk.iter().map(|d| Disk { path: snapshot::absolute(&d.path), ..d.clone() }).collect();
        if !given.is_empty() && given != machine.disks {
            return contradicts("disk", "as given".into(), format!("{} others", machine.disks.len()));
        }
        let same = |(n, (given, saved)): (usize, (&Net, &Net))| is_same_card(n, given, saved);
        let nets = self.net.len() == machine.nets.len() && self.net.iter().zip(&machine.nets).enumerate().all(same);
        if !self.net.is_empty() && !nets {
            let saved = machine.nets.iter().map(|net| format!(" --net {net}")).collect::<String>();
            let saved = if saved.is_empty() { "none".into() } else { format!("cards as of{saved}") };
            return contradicts("net", self.net.iter().map(Net::to_string).collect::<Vec<_>>().join(" --net "), saved);
        }
        if let Some(given) = self.console.filter(|given| *given != machine.console) {
            return contradicts(
                "console",
                format!("{given:?}").to_lowercase(),
                format!("{:?}", machine.console).to_lowercase(),
            );
        }
        if self.rng && !machine.rng {
            return contradicts("rng", String::new(), "no such device".into());
        }
        let names = |ports: &[Port]| ports.iter().map(|port| port.name.clone()).collect::<Vec<_>>().join(", ");
        if !self.port.is_empty() && names(&self.port) != names(&machine.ports) {
            return contradicts("port", names(&self.port), names(&machine.ports));
        }
        if !self.share.is_empty() {
            return contradicts("share", "as given".into(), "none".into());
        }
        if let Some(given) = self.balloon.filter(|given| Some(*given) != machine.balloon) {
            return contradicts("balloon", show_size(given), machine.balloon.map_or("none".into(), show_size));
        }
        let cid = |address: &Option<vsock::Address>| address.as_ref().map(|address| address.cid);
        if let Some(given) = cid(&self.vsock).filter(|given| Some(*given) != cid(&machine.vsock)) {
            let saved = cid(&machine.vsock).map_or("none".into(), |cid| format!("address {cid}"));
            return contradicts("vsock", given.to_string(), saved);
        }
        let mut config = machine.config(self.serial(), self.on_reboot);
        if self.vsock.is_some() {
            config.vsock.clone_from(&self.vsock);
        }
        if !self.port.is_empty() {
            config.ports.clone_from(&self.port);
        }
        if !self.net.is_empty() {
            // What the guest sees is the same; what is behind it may be another port.
            config.nets = self.net.clone();
        }
        let id = match &self.id {
            Some(id) => id.clone(),
            None if is_default_id(&config.id) => default_id(),
            None => check_id(&config.id).map_err(|error| {
                Error::user(format!("snapshot '{}' has a {error}; give it another --id", from.display()))
            })?,
        };
        Ok(Config { id, huge_pages: self.huge_pages(), ..config })
    }

    fn huge_pages(&self) -> HugePages {
        self.memory.map(|memory| memory.huge_pages).unwrap_or_default()
    }

    /// Where the serial console goes.
    fn serial(&self) -> Serial {
        let default = if self.detach { Serial::Null } else { Serial::Stdio };
        self.serial.clone().unwrap_or(default)
    }

    /// Where the control socket goes.
    pub fn api(&self) -> Wanted {
        match &self.api_sock {
            Some(path) => Wanted::At(path.clone()),
            None if self.no_api => Wanted::Nothing,
            None => Wanted::InFolder,
        }
    }
}

fn default_command_line(console: Option<Console>) -> &'static str {
    match console.unwrap_or_default() {
        Console::Serial => "console=ttyS0",
        Console::Virtio => "console=hvc0",
    }
}

/// The name of a VM that was given none.
fn default_id() -> String {
    format!("vm-{}", std::process::id())
}

fn is_default_id(id: &str) -> bool {
    id.strip_prefix("vm-").is_some_and(|pid| !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit()))
}

#[derive(Debug, Args)]
pub struct PsOptions {
    /// As a JSON array, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct NameOption {
    /// The VM's name, or its control socket's path (with a slash)
    pub id: String,
}

#[derive(Debug, Args)]
pub struct StopOptions {
    /// The VM's name, or its control socket's path (with a slash)
    pub id: String,
    /// How long the guest may take to power off
    #[arg(long, value_name = "TIME", default_value = STOP_TIMEOUT, value_parser = parse_time)]
    pub timeout: Duration,
    /// End it now, without asking the guest
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// Lists a VM's virtio devices, by slot: the number on the PCI bus
    List(NameOption),
    /// Adds a disk or a network card, and prints its slot
    Add {
        /// The VM's name, or its control socket's path (with a slash)
        id: String,
        #[command(flatten)]
        device: NewDevice,
    },
    /// Removes a device, once the guest has let go of it
    Remove {
        /// The VM's name, or its control socket's path (with a slash)
        id: String,
        /// Its slot, as device list shows it
        slot: u8,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct NewDevice {
    /// As for run
    #[arg(long, value_name = "PATH[,OPTIONS]")]
    pub disk: Option<Disk>,
    /// As for run; its address is one that the VM's other cards do not have
    #[arg(long, value_name = "user|tap=NAME[,OPTIONS]")]
    pub net: Option<Net>,
}

#[derive(Debug, Args)]
pub struct BalloonOptions {
    /// The VM's name, or its control socket's path (with a slash)
    pub id: String,
    /// How much the host is to have of the guest's memory, in whole MiB
    #[arg(value_parser = parse_size)]
    pub size: Option<u64>,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct StatOptions {
    /// The VM's name, or its control socket's path (with a slash)
    pub id: String,
    /// How long to count, unless the VM does so already: then what it has counted so far is shown
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time)]
    pub time: Duration,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SnapshotOptions {
    /// The VM's name, or its control socket's path (with a slash)
    pub id: String,
    /// A new or empty folder
    pub folder: PathBuf,
    /// An earlier snapshot of this VM: save only what was written since
    #[arg(long, value_name = "FOLDER")]
    pub parent: Option<PathBuf>,
}

/// Parses a time such as `500ms`, `30s` or `2m`.
///
/// # Errors
/// One line about what is wrong with `text`.
fn parse_time(text: &str) -> std::result::Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let milliseconds: u64 = match &text[digits.len()..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("bad time '{text}'; write for example 500ms, 30s or 2m")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("bad time '{text}'; write for example 500ms, 30s or 2m"))?;
    // A year is as good as for ever, and can be added to any clock.
    let most = 365 * 24 * 3_600_000;
    let total = number.checked_mul(milliseconds).filter(|total| *total <= most);
    total.map(Duration::from_millis).ok_or_else(|| format!("time '{text}' is too long"))
}

/// Parses a network that the guest's first process can set up by itself.
///
/// # Errors
/// One line about what is wrong with `text`.
fn parse_user_net(text: &str) -> std::result::Result<Net, String> {
    match text.split(',').next() {
        Some("user") => text.parse(),
        _ => Err(format!("network '{text}' is not for this command; use user, and options behind commas")),
    }
}

#[derive(Debug, Args)]
pub struct QuickstartOptions {
    /// What executes guest code: auto, translator or kvm
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    pub engine: EngineChoice,
    /// RAM, and on which pages of the host [default: 512M; with --distro 1G]
    #[arg(long, value_name = "SIZE[,hugepages=thp|2M]")]
    pub memory: Option<Memory>,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// x86-64-v3, x86-64-v2 or host
    #[arg(long, value_name = "MODEL", default_value = "x86-64-v3")]
    pub cpu_model: CpuChoice,
    /// Check the guest and power off, even on a terminal
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    pub distro: DistroOptions,
    /// More messages on stderr; repeat for more
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What `quickstart --distro` boots.
#[derive(Debug, Args)]
pub struct DistroOptions {
    /// Boot a whole Debian from a disk, which is made with mmdebstrap the first time and keeps what you change
    #[arg(long)]
    pub distro: bool,
    /// With --distro: where the disk, its kernel and the key for ssh are kept [default: in the cache, by suite]
    #[arg(long, value_name = "FOLDER", requires = "distro")]
    pub folder: Option<PathBuf>,
    /// With --distro: make the disk anew; what was changed on it is lost
    #[arg(long, requires = "distro")]
    pub fresh: bool,
    /// With --distro: Debian's release, when the disk is made [default: this host's if it is a Debian, else bookworm]
    #[arg(long, value_name = "NAME", requires = "distro")]
    pub suite: Option<String>,
    /// With --distro: packages to have from the beginning, such as gcc,libc6-dev,python3
    #[arg(long, value_name = "PACKAGE,...", value_delimiter = ',', requires = "distro")]
    pub include: Vec<String>,
    /// With --distro: size of the disk; the host gives it room as it fills [default: 8G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "distro")]
    pub size: Option<u64>,
    /// With --distro: more disks, as for run; the first of them is the guest's /dev/vdb
    #[arg(long, value_name = "PATH[,OPTIONS]", requires = "distro")]
    pub disk: Vec<Disk>,
    /// With --distro: the network; ports of this host can lead to the guest [default: user,fwd=tcp:2222:22, or another port
    /// if that one is taken]
    #[arg(long, value_name = "user[,fwd=tcp:PORT:PORT]", value_parser = parse_user_net, requires = "distro")]
    pub net: Option<Net>,
}

#[derive(Debug, Args)]
pub struct ExecOptions {
    /// The command and its arguments; exec's own options stand before it
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
    /// The guest's kernel, a bzImage [default: this host's or its distribution's, as quickstart finds it]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Where the kernel's modules are, if it has not built in what it takes to see the host's files [default: those of its
    /// version in /lib/modules]
    #[arg(long, value_name = "FOLDER", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// A folder below which changes are made on the host; repeat for more
    #[arg(long, value_name = "FOLDER")]
    pub rw: Vec<PathBuf>,
    /// A network: this host's sockets, no rights needed; this host is 10.0.2.2, and ports of it can lead to the guest
    #[arg(long, value_name = "user[,fwd=tcp:PORT:PORT]", value_parser = parse_user_net)]
    pub net: Option<Net>,
    /// Run the command as you, not as the guest's root
    #[arg(long)]
    pub user: bool,
    /// End the VM after this time, with exit code 124
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
    /// What executes guest code: auto, translator or kvm
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    pub engine: EngineChoice,
    /// RAM, and on which pages of the host; the command's changes to files are in three quarters of it
    #[arg(long, value_name = "SIZE[,hugepages=thp|2M]", default_value = "1G")]
    pub memory: Memory,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// x86-64-v3, x86-64-v2 or host
    #[arg(long, value_name = "MODEL", default_value = "x86-64-v3")]
    pub cpu_model: CpuChoice,
    /// More words for the kernel's command line
    #[arg(long, value_name = "WORDS")]
    pub append: Option<String>,
    /// Show the kernel's console on stderr; repeat for messages of anyvisor's
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// Prints what clap has to say: help in full, a mistake in one line.
pub fn report(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Help or version. A closed stdout is nobody's mistake.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    eprintln!("anyvisor: {}", one_line(error));
    ExitCode::from(crate::MISTAKE)
}

/// A mistake in one line: clap's message without its layout, and where to look.
fn one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "give a command, for example run, ps, doctor or quickstart; see anyvisor --help".into();
    }
    let text = error.to_string();
    let mut parts: Vec<&str> = vec![];
    for line in text.lines().map(str::trim) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        if !line.is_empty() {
            parts.push(line);
        }
    }
    let text = parts.join(" ");
    format!("{}; see anyvisor --help", text.strip_prefix("error: ").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistake(arguments: &[&str]) -> String {
        let text = one_line(&Cli::try_parse_from([&["anyvisor"], arguments].concat()).unwrap_err());
        assert!(!text.contains('\n') && text.contains("--help"), "{text}");
        text
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let cli = Cli::try_parse_from(["anyvisor", "run", "--kernel", "k"]).unwrap();
        let Command::Run(options) = cli.command else { panic!("not run") };
        let config = options.config();
        assert_eq!((config.memory, config.cpus, config.cpu), (512 << 20, 1, CpuModel::V3.into()));
        assert_eq!((config.serial, config.on_reboot), (Serial::Stdio, OnReboot::Exit));
        assert_eq!((options.engine, config.debug_exit), (EngineChoice::Auto, false));
    }

    #[test]
    fn times() {
        for (text, expected) in [("0s", 0), ("500ms", 500), ("30s", 30_000), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(expected)));
        }
        for bad in ["", "s", "30", "-1s", "1.5s", "1 s", "1d", "99999999999999999999s", "9999999h"] {
            assert!(parse_time(bad).unwrap_err().contains(&format!("'{bad}'")), "{bad}");
        }
    }

    #[test]
    fn default_names_are_told_from_given_ones() {
        assert!(is_default_id(&default_id()) && check_id(&default_id()).is_ok());
        assert!(!is_default_id("vm-") && !is_default_id("vm-1a") && !is_default_id("web"));
    }

    #[test]
    fn mistakes_are_one_line_that_names_the_value() {
        assert!(mistake(&[]).contains("run, ps, doctor or quickstart"));
        assert!(mistake(&["run"]).contains("--kernel"));
        assert!(mistake(&["run", "--kernel", "k", "--memory", "12Q"]).contains("bad size '12Q'"));
        assert!(mistake(&["run", "--kernel", "k", "--memory", "1G,hugepages=1G"]).contains("hugepages=1G"));
        assert!(mistake(&["run", "--kernel", "k", "--cpu-model", "i386"]).contains("unknown CPU model 'i386'"));
        assert!(mistake(&["run", "--kernel", "k", "--engine", "hvf"]).contains("unknown engine 'hvf'"));
        assert!(mistake(&["run", "--kernel", "k", "--serial", "x"]).contains("serial"));
        assert!(mistake(&["run", "--kernel", "k", "--cpus", "many"]).contains("many"));
        assert!(mistake(&["run", "--kernel", "k", "--bogus"]).contains("--bogus"));
        assert!(mistake(&["run", "--kernel", "k", "--verify-first"]).contains("--restore"));
        assert!(mistake(&["run", "--kernel", "k", "--gdb", "70000"]).contains("bad port '70000'"));
        assert!(mistake(&["run", "--kernel", "k", "--gdb", "here"]).contains("bad address 'here'"));
        assert!(mistake(&["run", "--kernel", "k", "--firmware", "f"]).contains("--firmware"));
        assert!(mistake(&["fly"]).contains("fly"));
        assert!(mistake(&["run", "--kernel", "k", "--id", "a/b"]).contains("bad name 'a/b'"));
        assert!(mistake(&["run", "--kernel", "k", "--id", ""]).contains("name"));
        assert!(mistake(&["run", "--kernel", "k", "-d", "--no-api"]).contains("--no-api"));
        assert!(mistake(&["device", "add", "x"]).contains("--disk"));
        assert!(mistake(&["device", "add", "x", "--net", "bridge"]).contains("unknown network 'bridge'"));
        assert!(mistake(&["device", "add", "x", "--net", "user", "--disk", "d"]).contains("cannot be used with"));
        assert!(mistake(&["pause"]).contains("ID"));
        assert!(mistake(&["stop", "x", "--timeout", "30"]).contains("bad time '30'"));
    }
}
