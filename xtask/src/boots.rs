//! `cargo xtask boots`: boots Linux to a shell and off, again and again: every boot must end well.

use crate::{cargo, run};
use anyhow::{Result, bail};
use anyvisor_tests::{assets, vm};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
pub struct Options {
    /// How many boots
    #[arg(long, default_value_t = 50)]
    count: u32,
}

/// Boots as often as asked; prints how long the boots took.
///
/// # Errors
/// At the first boot that does not reach the shell and power off.
pub fn boots(options: &Options) -> Result<()> {
    run(cargo().args(["build", "--quiet", "--release", "--package", "anyvisor"]))?;
    let kernel = assets::kernel()?;
    let script = "echo the shell is here; poweroff -f";
    let initramfs = assets::scratch("boots.cpio", &assets::initramfs(script)?)?;
    let more = ["--initrd", &initramfs.display().to_string()];
    let mut times = Vec::new();
    for number in 1..=options.count {
        let ended = vm::run(&vm::arguments(&kernel, &more), PATIENCE);
        if ended.status.code() != Some(0) || !ended.output.contains("the shell is here") {
            bail!("boot {number} failed ({}):\n{}\n{}", ended.status, ended.output, ended.errors);
        }
        times.push(ended.took.as_secs_f64());
    }
    std::fs::remove_file(initramfs)?;
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or_default();
    println!("{} boots of {}: median {:.2} s, slowest {:.2} s", times.len(), options.count, at(0.5), at(0.999));
    Ok(())
}
