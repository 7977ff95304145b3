//! `cargo xtask test`: installs what the tests need, checks format, lints and the rules of `tidy`, runs the KVM
//! engine on emulated AMD-V, then runs every test of the workspace in one `cargo test`, whose lines come last.

use crate::{cargo, install, nested, run, tidy};
use anyhow::{Context, Result};
use anyvisor_tests::assets;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub struct Options {
    /// Only the tests, without format, lints and tidy
    #[arg(long)]
    only_tests: bool,
}

/// Runs everything; stops at the first stage that fails.
///
/// # Errors
/// The stage that failed.
pub fn test(options: &Options) -> Result<()> {
    let mut times = Vec::new();
    let mut stage = |name: &'static str, action: &dyn Fn() -> Result<()>| {
        eprintln!("xtask: {name}");
        let began = Instant::now();
        let result = action().context(name);
        times.push((name, began.elapsed()));
        result
    };
    stage("what the tests need", &prepare)?;
    if !options.only_tests {
        stage("format", &|| run(cargo().args(["fmt", "--all", "--check"])))?;
        stage("tidy", &tidy::tidy)?;
        stage("lints", &|| {
            run(cargo().args([
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--release",
                "--",
                "-D",
                "warnings",
            ]))
        })?;
    }
    stage("build", &|| run(cargo().args(["build", "--quiet", "--release", "--workspace", "--all-targets"])))?;
    if !options.only_tests {
        stage("the KVM engine on emulated AMD-V", &nested::in_short)?;
    }
    print_times(&times);
    // Last, so that its lines are the last ones.
    run(cargo().args(["test", "--release", "--workspace", "--no-fail-fast"]))
}

/// Programs, a kernel and a shell for the guests.
fn prepare() -> Result<()> {
    install("gcc", &["gcc", "libc6-dev"])?;
    install("dpkg-deb", &["dpkg"])?;
    install("gdb", &["gdb"])?;
    crate::install_qemu()?;
    install("mmdebstrap", &["mmdebstrap", "uidmap"])?;
    install("ssh", &["openssh-client"])?;
    let kernel = assets::kernel()?;
    let busybox = assets::busybox()?;
    eprintln!("xtask: guests are {} and {}", kernel.display(), busybox.display());
    Ok(())
}

fn print_times(times: &[(&str, Duration)]) {
    for (name, took) in times {
        eprintln!("xtask: {name}: {}", seconds(*took));
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
