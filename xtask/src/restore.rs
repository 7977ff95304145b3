//! `cargo xtask restore`: how long a restore takes, from the start of the process to the guest's first sign of
//! life: a byte on its console, which a guest that was saved while it printed sends within microseconds.
//!
//! That byte comes through the console's buffer, which waits 0.5 ms for more: the figure is an upper bound.

use anyhow::{Context, Result, ensure};
use anyvisor_tests::{assets, vm};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
pub struct Options {
    /// Restores of each kind
    #[arg(long, default_value_t = 20)]
    count: usize,
    /// The guest's RAM
    #[arg(long, default_value = "512M")]
    memory: String,
    /// What executes guest code
    #[arg(long, default_value = "translator")]
    engine: String,
}

/// Measures restores of a full snapshot and of a chain of incremental ones.
///
/// # Errors
/// A guest does not boot, cannot be saved, or shows no life.
pub fn restore(options: &Options) -> Result<()> {
    let folder = assets::folder().join(format!("restore-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let result = measure(options, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    result
}

fn measure(options: &Options, folder: &Path) -> Result<()> {
    let initrd = folder.join("initrd");
    let script = "dd if=/dev/urandom of=/tmp/x bs=1M count=64 2>/dev/null; echo ready; while true; do echo -n x; done";
    std::fs::write(&initrd, assets::initramfs(script)?)?;
    let id = format!("restore-{}", std::process::id());
    let initrd = initrd.display().to_string();
    let more = ["--engine", &options.engine, "--memory", &options.memory, "--initrd", &initrd, "--id", &id];
    let mut vm = vm::Vm::start(&vm::arguments(
        &assets::kernel()?,
        &[&more[..], &["--cmdline", "console=ttyS0 quiet"]].concat(),
    ))?;
    vm.wait_for("ready", PATIENCE);
    let names = ["full", "second", "third", "fourth"].map(|name| folder.join(name));
    for (n, to) in names.iter().enumerate() {
        let mut arguments = vec!["snapshot".to_owned(), id.clone(), to.display().to_string()];
        if let Some(parent) = n.checked_sub(1).map(|n| &names[n]) {
            arguments.extend(["--parent".to_owned(), parent.display().to_string()]);
        }
        let saved = vm::Vm::start(&arguments)?.end(PATIENCE);
        ensure!(saved.code() == 0, "cannot save: {saved:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(vm);
    for (what, from) in [("a full snapshot", &names[0]), ("a chain of four", &names[3])] {
        let mut times = (0..options.count).map(|_| once(&options.engine, from)).collect::<Result<Vec<_>>>()?;
        times.sort();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        println!(
            "restore of {what}, {} of RAM, {}: median {:.1} ms, from {:.1} to {:.1} ms ({} restores)",
            options.memory,
            options.engine,
            ms(times[times.len() / 2]),
            ms(times[0]),
            ms(times[times.len() - 1]),
            times.len()
        );
    }
    Ok(())
}

/// One restore: from the start of the process to the first byte.
fn once(engine: &str, from: &Path) -> Result<Duration> {
    let began = Instant::now();
    let mut child = Command::new(vm::binary())
        .args(["run", "--engine", engine, "--no-api", "--restore"])
        .arg(from)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("starting anyvisor")?;
    let mut byte = [0];
    let read = child.stdout.take().context("no output")?.read(&mut byte)?;
    let time = began.elapsed();
    child.kill()?;
    child.wait()?;
    ensure!(read == 1, "the guest said nothing");
    Ok(time)
}
