//! `anyvisor quickstart`: from nothing to a Linux shell, or a checked machine.
//!
//! On a terminal the user gets the shell. Without one the guest's first process checks the machine
//! (`init.sh`) and powers off; it has passed if its last words on the console are a line with a number that
//! this run has chosen. That line, not the exit of the VM, is what makes the exit code 0.
//!
//! With `--distro` all this is about a whole Debian on a disk instead ([`distro`]).

mod distro;
pub mod fetch;
mod initramfs;

use crate::cli::QuickstartOptions;
use crate::control::runtime::Wanted;
use crate::engines::Chosen;
use crate::run::Surroundings;
use crate::{engines, run, terminal};
use anyvisor_vmm::config::{Console, OnReboot, Serial};
use anyvisor_vmm::{Config, End, Error, Result};
use std::io::{IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// RAM, if nothing is said.
const MEMORY: u64 = 512 << 20;

/// How long the check may take before the guest counts as hung.
const CHECK_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Fetches what is needed and boots it; returns the exit code.
pub fn command(options: QuickstartOptions) -> Result<u8> {
    let interactive = !options.check && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let memory = if options.distro.distro { distro::MEMORY } else { MEMORY };
    let mut config = Config {
        id: format!("quickstart-{}", std::process::id()),
        firmware: None,
        kernel: "vmlinuz".into(),
        initrd: None,
        modules: Vec::new(),
        command_line: String::new(),
        disks: Vec::new(),
        nets: Vec::new(),
        shares: vec![],
        channel: None,
        memory: options.memory.map_or(memory, |memory| memory.size),
        huge_pages: options.memory.map(|memory| memory.huge_pages).unwrap_or_default(),
        cpus: options.cpus,
        cpu: options.cpu_model,
        serial: if interactive { Serial::Stdio } else { Serial::Null },
        debug_exit: false,
        test_device: false,
        console: Console::default(),
        ports: Vec::new(),
        rng: false,
        vsock: None,
        balloon: None,
        on_reboot: if interactive && options.distro.distro { OnReboot::Restart } else { OnReboot::Exit },
    };
    config.validate()?;
    let chosen = engines::open(options.engine)?;
    let cache = fetch::Cache::open(false)?;
    let log = if options.verbose > 0 { "" } else { " quiet" };
    let mut base = format!("console=ttyS0 panic=-1{log}");
    if options.distro.distro {
        distro::prepare(&options.distro, cache.path(), &mut config, options.verbose > 0)?;
        base = format!("{base} {} {}", distro::COMMAND_LINE, if interactive { "" } else { distro::CHECK });
    } else {
        shell(&cache, &mut config)?;
    }
    if interactive {
        let (rows, columns) = terminal::size().unwrap_or((24, 80));
        config.command_line = format!("{base} anyvisor_rows={rows} anyvisor_columns={columns}");
        let leave = if options.distro.distro { "poweroff ends it, Ctrl-A X pulls the plug" } else { "Ctrl-A X leaves" };
        progress(&format!("booting; {leave}"));
        let end = run::run_vm(&config, None, &chosen, surroundings(Box::new(std::io::stdout()), None))?;
        return Ok(if end == End::Left { 0 } else { run::exit_code(&config, &end) });
    }
    check(&mut config, &chosen, &base)
}

/// Fetches what plain quickstart boots.
fn shell(cache: &fetch::Cache, config: &mut Config) -> Result<()> {
    config.kernel = fetch::kernel(cache)?;
    let busybox = fetch::busybox(cache)?;
    let busybox =
        std::fs::read(&busybox).map_err(|e| Error::user(format!("cannot read '{}': {e}", busybox.display())))?;
    config.initrd = Some(cache.write("initramfs.cpio", &initramfs::build(&busybox))?);
    Ok(())
}

fn surroundings(output: Box<dyn Write + Send>, limit: Option<Duration>) -> Surroundings {
    Surroundings { output, limit, api: Wanted::InFolder, gdb: None, measure: false, background: None, control: None }
}

/// Boots the guest to check itself.
fn check(config: &mut Config, chosen: &Chosen, base: &str) -> Result<u8> {
    let nonce = nonce()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    config.command_line = format!(
        "{base} anyvisor_check={nonce} anyvisor_cpus={} anyvisor_memory={} anyvisor_time={now}",
        config.cpus,
        config.memory >> 20
    );
    progress("booting, to check the guest (no terminal)");
    let passed = Arc::new(AtomicBool::new(false));
    let watch = Watch {
        sink: Box::new(std::io::stdout()),
        line: vec![],
        wanted: format!("anyvisor self-check passed: {nonce}").into_bytes(),
        seen: passed.clone(),
    };
    let end = run::run_vm(config, None, chosen, surroundings(Box::new(watch), Some(CHECK_LIMIT)))?;
    let code = run::exit_code(config, &end);
    if end == End::PowerOff && passed.load(Ordering::SeqCst) {
        progress("the guest passed its self-check");
        return Ok(0);
    }
    progress("the guest did not pass its self-check");
    Ok(code.max(1))
}

/// A line on stderr about what goes on.
fn progress(text: &str) {
    eprintln!("anyvisor: {text}");
}

/// A number that the guest cannot have printed by accident.
fn nonce() -> Result<String> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|e| Error::host("cannot read /dev/urandom", e))?;
    Ok(format!("{:016x}", u64::from_le_bytes(bytes)))
}

/// Passes the console on and looks for one line in it.
struct Watch {
    sink: Box<dyn Write + Send>,
    /// The current line, as far as it matters.
    line: Vec<u8>,
    wanted: Vec<u8>,
    seen: Arc<AtomicBool>,
}

impl Write for Watch {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for &byte in bytes {
            if byte == b'\n' || byte == b'\r' {
                if self.line == self.wanted {
                    self.seen.store(true, Ordering::SeqCst);
                }
                self.line.clear();
            } else if self.line.len() <= self.wanted.len() {
                self.line.push(byte);
            }
        }
        self.sink.write_all(bytes)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_has_passed_only_with_the_whole_line() {
        let sees = |parts: &[&str]| {
            let seen = Arc::new(AtomicBool::new(false));
            let sink = Box::new(std::io::sink());
            let mut watch = Watch { sink, line: vec![], wanted: b"passed: 12".to_vec(), seen: seen.clone() };
            parts.iter().for_each(|part| watch.write_all(part.as_bytes()).unwrap());
            seen.load(Ordering::SeqCst)
        };
        assert!(sees(&["log\r\npass", "ed: 12\r\n"]));
        assert!(!sees(&["passed: 12"]));
        assert!(!sees(&["[cmdline] passed: 12\n"]));
        assert!(!sees(&["passed: 123\n"]));
        assert!(!sees(&["passed: 13\n"]));
    }
}
