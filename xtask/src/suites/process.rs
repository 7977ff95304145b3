//! A program with a time limit, and what it printed.

use anyhow::{Context, Result};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How a program ended.
pub struct Ended {
    /// Its exit code; `None` if the time ran out or a signal ended it.
    pub code: Option<i32>,
    pub timed_out: bool,
    /// Standard output, then the last of standard error.
    pub output: String,
}

/// Most bytes of output that are kept: a guest can print for ever.
const OUTPUT_MAX: u64 = 4 << 20;

/// Runs `command` for at most `limit`.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command, limit: Duration) -> Result<Ended> {
    let name = command.get_program().to_string_lossy().into_owned();
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    let collect = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.by_ref().take(OUTPUT_MAX).read_to_end(&mut bytes);
            // What comes after that is thrown away, so that the program is not held up.
            let _ = std::io::copy(&mut from, &mut std::io::sink());
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let output = collect(Box::new(child.stdout.take().context("its output")?));
    let errors = collect(Box::new(child.stderr.take().context("its errors")?));
    let mut status = None;
    while began.elapsed() < limit {
        status = child.try_wait().with_context(|| format!("waiting for {name}"))?;
        if status.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if status.is_none() {
        // It may have ended just now.
        let _ = child.kill();
        child.wait().with_context(|| format!("waiting for {name}"))?;
    }
    let text = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
    let output = text(output) + &text(errors);
    Ok(Ended { code: status.and_then(|status| status.code()), timed_out: status.is_none(), output })
}
