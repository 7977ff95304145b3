//! `anyvisor exec`: one command of the host's in a fresh VM, which sees the host's files and changes none.
//!
//! **Idea.** The guest's root is the host's, shared read-only, under a layer in the guest's memory. An initramfs made on the
//! fly holds the first process (`agent/agent.rs`), the kernel's modules for virtio-fs and overlays, and a plan: command,
//! folder, environment. The command's streams are files of a second share (`anyvisor_vmm::share::channel`), so the guest needs no
//! other driver. When the first process has told how the command ended, the VM is ended from here.
//!
//! **Exit codes**: the command's; 128 and the signal's number if a signal ended it; 127 and 126 if it is not there or cannot be
//! run; 124 when its time is up; 125 if there was no VM, or the guest ended before the command.

mod modules;
mod streams;

use crate::cli::ExecOptions;
use crate::control::runtime::Wanted;
use crate::quickstart::fetch;
use crate::run::Surroundings;
use crate::{engines, run, signals, terminal};
use anyvisor_initramfs::Archive;
use anyvisor_vmm::config::{OnReboot, Serial, Share};
use anyvisor_vmm::{Config, End, Error, Remote, Result};
use modules::Module;
use rustix::fs::MemfdFlags;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// There was no VM, or none that ran the command.
const NO_VM: u8 = 125;
const TIMED_OUT: u8 = 124;
const INTERRUPTED: u8 = 130;

/// The guest's first process.
const AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent"));
/// What its complaints on the console begin with.
const COMPLAINT: &str = "anyvisor-agent: ";

/// The shared root's name, which the first process mounts.
const ROOT_TAG: &str = "anyvisor-root";
/// No messages but serious ones, the clock that the machine has, an end instead of a halt when the kernel panics, and no tests
/// of all ciphers, which take a quarter of the time.
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 tsc=reliable cryptomgr.notests=1";
/// Bytes of the console's output that are kept to say what went wrong.
const KEPT: usize = 16 << 10;
/// How long output may wait for who reads ours after the VM was ended by force.
const LAST_OUTPUT: Duration = Duration::from_millis(200);
/// Variables that name what is on the host only.
const LEFT_OUT: [&str; 10] = [
    "DBUS_SESSION_BUS_ADDRESS",
    "DBUS_SYSTEM_BUS_ADDRESS",
    "DISPLAY",
    "GPG_AGENT_INFO",
    "SSH_AUTH_SOCK",
    "SSH_CONNECTION",
    "SSH_TTY",
    "TMUX",
    "WAYLAND_DISPLAY",
    "XDG_RUNTIME_DIR",
];

/// Runs the command; returns the process's exit code, and has said on stderr what needs saying.
pub fn command(options: &ExecOptions) -> u8 {
    run_command(options).unwrap_or_else(|error| {
        eprintln!("anyvisor: {error}");
        NO_VM
    })
}

fn run_command(options: &ExecOptions) -> Result<u8> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let mut chosen = engines::open(options.engine)?;
    if options.verbose == 0 {
        chosen.note = None;
    }
    let (kernel, modules) = kernel(options)?;
    let shares = shares(options)?;
    let initramfs = memory_file(&initramfs(&modules, &plan(options, &shares, terminal)?))?;
    let status = Arc::new(OnceLock::new());
    let remote: Arc<OnceLock<Remote>> = Arc::default();
    let (channel, ends) = {
        let (status, remote) = (status.clone(), remote.clone());
        streams::pipes(Box::new(move |text| {
            let _ = status.set(text.to_owned());
            if let Some(remote) = remote.get() {
                remote.stop();
            }
        }))?
    };
    let config = Config {
        id: format!("exec-{}", std::process::id()),
        firmware: None,
        kernel,
        initrd: Some(format!("/proc/self/fd/{}", initramfs.as_raw_fd()).into()),
        modules: Vec::new(),
        command_line: [COMMAND_LINE, options.append.as_deref().unwrap_or_default()].join(" ").trim_end().into(),
        disks: vec![],
        nets: options.net.iter().cloned().collect(),
        shares,
        channel: Some(channel),
        memory: options.memory.size,
        huge_pages: options.memory.huge_pages,
        cpus: options.cpus,
        cpu: options.cpu_model,
        serial: Serial::Null,
        console: anyvisor_vmm::config::Console::Serial,
        ports: Vec::new(),
        rng: false,
        vsock: None,
        balloon: None,
        debug_exit: false,
        test_device: false,
        on_reboot: OnReboot::Exit,
    };
    config.validate()?;
    let console = Console { kept: Arc::default(), shown: options.verbose > 0 };
    let kept = console.kept.clone();
    let begun = Instant::now();
    let connected: Arc<OnceLock<Result<streams::Outputs>>> = Arc::default();
    let raw = terminal.then(terminal::Raw::enter).transpose();
    let raw = raw.map_err(|e| Error::host("cannot switch the terminal to raw mode", e))?;
    if terminal {
        let typed = ends.input.clone();
        signals::on_resize(move || typed.resize())?;
    }
    let take_control = {
        let (connected, remote) = (connected.clone(), remote.clone());
        Box::new(move |control: &Remote| {
            let _ = remote.set(control.clone());
            let _ = connected.set(streams::connect(ends, terminal, control.clone()));
        })
    };
    let surroundings = Surroundings {
        output: Box::new(console),
        limit: options.timeout,
        api: Wanted::InFolder,
        gdb: None,
        measure: false,
        background: None,
        control: Some(take_control),
    };
    let end = run::run_vm(&config, None, &chosen, surroundings);
    // With the guest's ends of the pipes gone, what is in them is all there is.
    drop(config);
    let outputs = Arc::into_inner(connected).and_then(OnceLock::into_inner).transpose();
    let forced = status.get().is_none();
    if let Ok(Some(outputs)) = &outputs {
        outputs.finish(forced.then_some(LAST_OUTPUT));
    }
    drop(raw);
    outputs?;
    let (end, status) = (end?, status.get().map(String::as_str));
    let timed_out = options.timeout.is_some_and(|limit| begun.elapsed() >= limit);
    Ok(exit_code(&end, status, timed_out, &kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())))
}

/// The kernel, and the modules that it needs.
fn kernel(options: &ExecOptions) -> Result<(PathBuf, Vec<Module>)> {
    let network = options.net.as_ref().map(|_| modules::NETWORK);
    let wanted: Vec<&str> = modules::FILES.into_iter().chain(network).collect();
    if let Some(kernel) = &options.kernel {
        let own =
            || fetch::version(kernel).map(|version| Path::new("/lib/modules").join(version)).filter(|f| f.is_dir());
        return match options.modules.clone().or_else(own) {
            Some(folder) if !folder.is_dir() => {
                Err(Error::user(format!("cannot read folder '{}'; check --modules", folder.display())))
            }
            Some(folder) => Ok((kernel.clone(), modules::load(&folder, &wanted)?)),
            None => Ok((kernel.clone(), vec![])),
        };
    }
    let cache = fetch::Cache::open(true)?;
    let kernel = fetch::kernel(&cache)?;
    let modules = match fetch::modules(&cache, &kernel)? {
        Some(folder) => modules::load(&folder, &wanted)?,
        None => vec![],
    };
    Ok((kernel, modules))
}

/// The host's root, and what may be written to.
fn shares(options: &ExecOptions) -> Result<Vec<Share>> {
    // The guest's root shall find what is the user's to be its own.
    let as_root = !options.user && !rustix::process::geteuid().is_root();
    let root = Share { path: "/".into(), tag: ROOT_TAG.into(), read_only: true, unchanging: true, as_root };
    let mut shares = vec![root];
    for (n, folder) in options.rw.iter().enumerate() {
        let path = std::fs::canonicalize(folder)
            .map_err(|e| Error::user(format!("cannot share folder '{}': {e}; check --rw", folder.display())))?;
        shares.push(Share { path, tag: format!("anyvisor-rw{n}"), read_only: false, unchanging: false, as_root });
    }
    Ok(shares)
}

/// What the first process is to do: texts, each behind a byte that says what it is.
fn plan(options: &ExecOptions, shares: &[Share], terminal: bool) -> Result<Vec<u8>> {
    let folder = std::env::current_dir()
        .map_err(|e| Error::user(format!("the current folder is not there: {e}; change to another")))?;
    let host = rustix::system::uname().nodename().to_bytes().to_vec();
    let mut plan = vec![];
    let mut add = |kind: u8, text: &[u8]| {
        plan.push(kind);
        plan.extend(text);
        plan.push(0);
    };
    add(b'd', folder.as_os_str().as_bytes());
    add(b'h', &host);
    for share in shares.iter().filter(|share| !share.read_only) {
        add(b'w', b"");
        add(b's', share.tag.as_bytes());
        add(b'p', share.path.as_os_str().as_bytes());
    }
    if options.net.is_some() {
        add(b'n', b"");
    }
    if let Some((rows, columns)) = terminal::size().filter(|_| terminal) {
        add(b't', format!("{rows} {columns}").as_bytes());
    } else if terminal {
        add(b't', b"24 80");
    }
    if options.user {
        let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        add(b'u', format!("{user} {group}").as_bytes());
    }
    for (name, value) in std::env::vars_os() {
        if !LEFT_OUT.iter().any(|left_out| name == *left_out) {
            add(b'e', &[name.as_bytes(), b"=", value.as_bytes()].concat());
        }
    }
    for argument in &options.command {
        add(b'a', argument.as_bytes());
    }
    Ok(plan)
}

fn initramfs(modules: &[Module], plan: &[u8]) -> Vec<u8> {
    let mut archive = Archive::new();
    for folder in ["channel", "lower", "modules", "new", "upper"] {
        archive.directory(folder);
    }
    archive.program("init", AGENT);
    let mut all = vec![];
    for (name, bytes) in modules {
        let path = format!("modules/{name}");
        archive.program(&path, bytes);
        all.extend([b"m/", path.as_bytes(), b"\0"].concat());
    }
    archive.program("plan", &[&all, plan].concat());
    archive.finish()
}

/// A file in memory.
fn memory_file(bytes: &[u8]) -> Result<File> {
    let trouble = |error| Error::host("cannot make a file in memory for the initramfs", error);
    let mut file: File =
        rustix::fs::memfd_create("initramfs", MemfdFlags::CLOEXEC).map_err(|e| trouble(e.into()))?.into();
    file.write_all(bytes).map_err(trouble)?;
    Ok(file)
}

/// The last of what the guest's kernel says.
struct Console {
    kept: Arc<Mutex<VecDeque<u8>>>,
    shown: bool,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.shown {
            std::io::stderr().write_all(bytes)?;
        }
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT);
        kept.drain(..excess);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The exit code for a VM that ended so, after saying on stderr what needs saying.
fn exit_code(end: &End, status: Option<&str>, timed_out: bool, console: &VecDeque<u8>) -> u8 {
    if let Some(code) = status.and_then(code_of) {
        return code;
    }
    if timed_out {
        return TIMED_OUT;
    }
    if matches!(end, End::Stopped | End::Left) {
        return INTERRUPTED;
    }
    let (front, back) = console.as_slices();
    let text = String::from_utf8_lossy(&[front, back].concat()).into_owned();
    eprintln!("anyvisor: {}", why(end, &text));
    NO_VM
}

/// The code that the first process's words mean.
fn code_of(status: &str) -> Option<u8> {
    match status.split_once(' ')? {
        ("exit", code) => code.parse().ok(),
        ("signal", number) => number.parse::<u8>().ok()?.checked_add(128),
        _ => None,
    }
}

/// Why the guest ended before the command did, in one line or with the end of the console's output.
fn why(end: &End, console: &str) -> String {
    const NO_SUCH_DEVICE: &str = "error 19";
    if let Some((_, complaint)) = console.rsplit_once(COMPLAINT) {
        let complaint = complaint.lines().next().unwrap_or_default();
        let hint = if complaint.ends_with(NO_SUCH_DEVICE) {
            "; the guest's kernel lacks it: build VIRTIO_PCI, VIRTIO_FS and OVERLAY_FS in, or give its modules with --modules"
        } else {
            ""
        };
        return format!("the command cannot be run: {complaint}{hint}");
    }
    if let Some((_, panic)) = console.rsplit_once("Kernel panic - not syncing: ") {
        let reason = panic.lines().next().unwrap_or_default();
        return format!("the guest's kernel panicked: {reason}; with -v its console is shown");
    }
    let how = match end {
        End::TripleFault(_) => "a triple fault".to_owned(),
        End::Failed(why) => why.clone(),
        _ => "it powered off or reset".to_owned(),
    };
    let last: Vec<&str> = console.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    format!("the guest ended before the command did ({how}); its console last said: {}", last.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes() {
        for (status, code) in
            [("exit 0", Some(0)), ("exit 255", Some(255)), ("signal 9", Some(137)), ("exit 256", None), ("", None)]
        {
            assert_eq!(code_of(status), code, "{status}");
        }
        let none = VecDeque::new();
        assert_eq!(exit_code(&End::Stopped, Some("exit 7"), true, &none), 7);
        assert_eq!(exit_code(&End::Stopped, None, true, &none), TIMED_OUT);
        assert_eq!(exit_code(&End::Stopped, None, false, &none), INTERRUPTED);
        assert_eq!(exit_code(&End::Reboot, None, false, &none), NO_VM);
    }

    #[test]
    fn what_went_wrong_is_one_line() {
        let panic = why(&End::Reboot, "[1.0] Kernel panic - not syncing: Attempted to kill init!\r\n[1.0] CPU: 0\r\n");
        assert!(panic.contains("panicked: Attempted to kill init!;") && !panic.contains("CPU"), "{panic}");
        let lacks = why(&End::PowerOff, "anyvisor-agent: cannot mount the host's root by virtiofs: error 19\r\n");
        assert!(lacks.contains("by virtiofs: error 19; the guest's kernel lacks it"), "{lacks}");
        let other = why(&End::TripleFault("dump".into()), "a\r\nb\r\n\r\nc\r\nd\r\n");
        assert!(other.contains("triple fault") && other.ends_with("b | c | d"), "{other}");
    }

    #[test]
    fn the_agent_is_a_static_program() {
        assert!(AGENT.starts_with(b"\x7fELF\x02") && AGENT.len() < 64 << 10, "{}", AGENT.len());
    }
}
