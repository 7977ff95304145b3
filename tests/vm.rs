//! The `anyvisor` binary as a child process: with a deadline, its output collected, never left behind.

use anyhow::{Context, Result};
use std::fs::DirBuilder;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The binary, built with the profile of the caller if need be.
///
/// # Panics
/// When it does not build.
pub fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY
        .get_or_init(|| {
            let this = std::env::current_exe().expect("this program's path");
            let mut folder = this.parent().expect("a folder").to_owned();
            if folder.ends_with("deps") {
                folder.pop();
            }
            let release = folder.ends_with("release");
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let mut command = Command::new(cargo);
            command.args(["build", "--quiet", "--package", "anyvisor"]).current_dir(crate::assets::root());
            command.arg("--target-dir").arg(folder.parent().expect("the target folder"));
            if release {
                command.arg("--release");
            }
            let status = command.status().expect("cargo runs");
            assert!(status.success(), "anyvisor does not build");
            folder.join("anyvisor")
        })
        .clone()
}

/// A command of the binary, with a runtime folder of this process's own.
pub fn command() -> Command {
    let mut command = Command::new(binary());
    command.env("XDG_RUNTIME_DIR", runtime_folder());
    command
}

/// `$XDG_RUNTIME_DIR` of everything started here. Short, because a socket's path must be.
pub fn runtime_folder() -> &'static Path {
    const NAME: &str = "anyvisor-tests-";
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let base = std::env::temp_dir();
        // What processes that have ended left behind.
        for entry in std::fs::read_dir(&base).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_prefix(NAME).is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let folder = base.join(format!("{NAME}{}", std::process::id()));
        DirBuilder::new().mode(0o700).recursive(true).create(&folder).expect("a folder for temporary files");
        folder
    })
}

/// A running `anyvisor`. Killed when dropped.
pub struct Vm {
    child: Child,
    input: Option<ChildStdin>,
    output: Collector,
    errors: Collector,
}

/// How an `anyvisor` ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    /// The serial console.
    pub output: String,
    /// Everything else it said.
    pub errors: String,
    pub took: Duration,
}

impl Ended {
    /// The exit code.
    ///
    /// # Panics
    /// When a signal ended the process.
    pub fn code(&self) -> i32 {
        let signal = self.status.signal();
        self.status.code().unwrap_or_else(|| panic!("ended by signal {signal:?}\n{self:?}"))
    }
}

struct Collector {
    text: Arc<Mutex<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    fn new(mut from: impl Read + Send + 'static) -> Collector {
        let text = Arc::new(Mutex::new(Vec::new()));
        let to = text.clone();
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                to.lock().expect("no panics while collecting").extend_from_slice(&buffer[..n]);
            }
        });
        Collector { text, thread: Some(thread) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().expect("no panics while collecting")).into_owned()
    }
}

impl Vm {
    /// Starts `anyvisor` with `arguments`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Result<Vm> {
        Vm::start_by(command().args(arguments))
    }

    /// Starts `anyvisor` by a command of the caller's.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_by(command: &mut Command) -> Result<Vm> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting anyvisor")?;
        let output = Collector::new(child.stdout.take().expect("piped"));
        let errors = Collector::new(child.stderr.take().expect("piped"));
        let input = child.stdin.take();
        Ok(Vm { child, input, output, errors })
    }

    /// What it said on stderr so far.
    pub fn errors(&self) -> String {
        self.errors.text()
    }

    /// The serial console's output so far.
    pub fn output(&self) -> String {
        self.output.text()
    }

    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Types `text` on the serial console.
    ///
    /// # Errors
    /// When anyvisor has closed its input.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        let input = self.input.as_mut().context("the input is closed")?;
        input.write_all(text.as_bytes())?;
        input.flush()?;
        Ok(())
    }

    /// Waits until the console shows `text`.
    ///
    /// # Panics
    /// When it has not within `patience`, or anyvisor ends first.
    pub fn wait_for(&mut self, text: &str, patience: Duration) {
        let began = Instant::now();
        while !self.output().contains(text) {
            let ended = self.child.try_wait().expect("waiting for a child");
            assert!(
                ended.is_none() && began.elapsed() < patience,
                "no {text:?} on the console ({ended:?})\n{}\n{}",
                self.output(),
                self.errors.text()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal to anyvisor.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill has no memory effects here; the child has not been waited for, so the id is its own.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Waits for the end, at most for `patience`.
    ///
    /// # Panics
    /// When it is still running then.
    pub fn end(self, patience: Duration) -> Ended {
        match self.try_end(patience) {
            Ok(ended) => ended,
            Err(vm) => {
                panic!("still running after {patience:?}\n{}\n{}", vm.output(), vm.errors.text())
            }
        }
    }

    /// Waits for the end; gives the VM back if it is still running after `patience`.
    ///
    /// # Errors
    /// The VM itself.
    pub fn try_end(mut self, patience: Duration) -> std::result::Result<Ended, Vm> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("waiting for a child") {
                for collector in [&mut self.output, &mut self.errors] {
                    collector.thread.take().map(JoinHandle::join);
                }
                let (output, errors) = (self.output.text(), self.errors.text());
                return Ok(Ended { status, output, errors, took: began.elapsed() });
            }
            if began.elapsed() > patience {
                return Err(self);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `anyvisor` to its end.
///
/// # Panics
/// When it does not start, or does not end within `patience`.
pub fn run<S: AsRef<std::ffi::OsStr>>(arguments: &[S], patience: Duration) -> Ended {
    Vm::start(arguments).expect("anyvisor starts").end(patience)
}

/// `run --kernel KERNEL` and more arguments.
pub fn arguments(kernel: &Path, more: &[&str]) -> Vec<String> {
    let mut arguments = vec!["run".to_owned(), "--kernel".to_owned(), kernel.display().to_string()];
    arguments.extend(more.iter().map(ToString::to_string));
    arguments
}
