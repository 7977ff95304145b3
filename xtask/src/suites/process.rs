//! A program with a time limit, and what it printed.

use anyhow::{Context, Result};
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How a program ended.
pub struct Ended {
    /// Its exit code; `None` if it was stopped or a signal ended it.
    pub code: Option<i32>,
    pub timed_out: bool,
    /// Standard output, then standard error.
    pub output: Vec<u8>,
}

impl Ended {
    /// The output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }
}

/// Most bytes of output that are kept: a guest can print for ever.
const OUTPUT_MAX: usize = 8 << 20;

/// Runs `command` for at most `limit`, or until `enough` holds of its output.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command, limit: Duration, enough: impl Fn(&[u8]) -> bool) -> Result<Ended> {
    let name = command.get_program().to_string_lossy().into_owned();
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    let output = Collector::new(child.stdout.take().context("its output")?);
    let errors = Collector::new(child.stderr.take().context("its errors")?);
    let mut status = None;
    let mut sufficed = false;
    while began.elapsed() < limit && !sufficed {
        status = child.try_wait().with_context(|| format!("waiting for {name}"))?;
        if status.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
        sufficed = output.with(&enough);
    }
    if status.is_none() {
        // It may have ended just now.
        let _ = child.kill();
        child.wait().with_context(|| format!("waiting for {name}"))?;
    }
    let output = [output.finish(), errors.finish()].concat();
    Ok(Ended { code: status.and_then(|status| status.code()), timed_out: status.is_none() && !sufficed, output })
}

/// Reads a pipe to its end.
struct Collector {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Collector {
    fn new(mut from: impl Read + Send + 'static) -> Collector {
        let bytes = Arc::<Mutex<Vec<u8>>>::default();
        let to = bytes.clone();
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
                // What is too much is thrown away, so that the program is not held up.
                let room = (OUTPUT_MAX - to.len()).min(length);
                to.extend_from_slice(&buffer[..room]);
            }
        });
        Collector { bytes, thread }
    }

    fn with(&self, look: impl Fn(&[u8]) -> bool) -> bool {
        look(&self.bytes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn finish(self) -> Vec<u8> {
        // It cannot panic but where it would not matter.
        let _ = self.thread.join();
        std::mem::take(&mut *self.bytes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
