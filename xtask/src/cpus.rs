//! `cargo xtask cpus`: what several vCPUs are good for. The guest makes a C project, Lua, with `make -j`; the table goes to
//! docs/performance.md. With `--stress`, stress-ng works in a guest with more vCPUs than this host has CPUs.
//!
//! Lua's files come in a crate that this one depends on and never builds. The Makefile is not Lua's own, which makes more
//! than objects and an archive, but has its files in the same order.

use crate::programs::root;
use crate::{cargo, report, run};
use anyhow::{Context, Result, bail, ensure};
use anyvisor_tests::{assets, vm};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PACKAGES: &str = "gcc,libc6-dev,binutils,make,stress-ng";
const CRATE: &str = "lua-src";
const MEMORY: &str = "1G";
/// Longer than the slowest machine takes.
const PATIENCE: Duration = Duration::from_secs(1200);
/// vCPUs and jobs; the second and the third are what the first and the last are compared with.
const SHAPES: [(u32, u32); 4] = [(1, 1), (2, 2), (2, 8), (8, 8)];
const STRESSED_CPUS: &str = "4";

const MAKEFILE: &str = "\
OBJECTS = lapi.o lcode.o lctype.o ldebug.o ldo.o ldump.o lfunc.o lgc.o llex.o lmem.o lobject.o lopcodes.o lparser.o \\
 lstate.o lstring.o ltable.o ltm.o lundump.o lvm.o lzio.o lauxlib.o lbaselib.o lcorolib.o ldblib.o liolib.o lmathlib.o \\
 loadlib.o loslib.o lstrlib.o ltablib.o lutf8lib.o linit.o
liblua.a: $(OBJECTS)
\tar rcsD $@ $^
%.o: %.c
\tgcc -O2 -Wall -DLUA_USE_POSIX -c -o $@ $<
";

/// Prints how long it took and what came of it.
const MAKE: &str = r#"
cd /bench/lua
busybox=/bin/busybox
since=$($busybox cut -d' ' -f1 /proc/uptime)
make -j$jobs >/tmp/log 2>&1 || $busybox tail /tmp/log
until=$($busybox cut -d' ' -f1 /proc/uptime)
echo "MADE $($busybox awk "BEGIN { print $until - $since }") $($busybox cat liblua.a | $busybox md5sum)"
"#;

const STRESS: &str = r#"
/bin/busybox mount -t sysfs sys /sys
cd /tmp
stress-ng --cpu 4 --vm 2 --vm-bytes 64M --fork 4 --futex 4 --switch 4 --verify --metrics-brief --timeout ${seconds}s 2>&1
echo "STRESSED $?"
echo "COMPLAINTS $(/bin/busybox dmesg | /bin/busybox grep -c -E 'BUG:|Oops|WARNING:|Call Trace|stall|lockup|hung task')"
/bin/busybox dmesg | /bin/busybox grep -E 'BUG:|Oops|WARNING:|Call Trace|stall|lockup|hung task'
"#;

#[derive(clap::Args)]
pub struct Options {
    /// Runs of each shape; medians are taken
    #[arg(long, default_value_t = 3)]
    count: usize,
    /// Shows the table, and leaves the document alone
    #[arg(long)]
    dry_run: bool,
    /// Has stress-ng (cpu, vm, fork, futex, switch) work in 4 vCPUs instead, for so many seconds
    #[arg(long, value_name = "SECONDS")]
    stress: Option<u64>,
    /// Where packages are unpacked [default: the user's cache folder]
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
}

/// Measures, or has stress-ng work.
///
/// # Errors
/// Something needed is missing, a guest fails, or Lua is another one with other vCPUs.
pub fn cpus(options: &Options) -> Result<()> {
    let cache = match &options.cache {
        Some(folder) => folder.clone(),
        None => crate::suites::default_cache("cpus")?,
    };
    std::fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let root = root::unpacked(&cache.canonicalize()?, PACKAGES, |_| Ok(()))?;
    copy_lua(&root.join("bench/lua"))?;
    run(cargo().args(["build", "--release", "--package", "anyvisor"]))?;
    let script = if options.stress.is_some() { STRESS } else { MAKE };
    let initramfs = cache.join("initramfs.cpio");
    std::fs::write(&initramfs, root::initramfs(&root, script)?).context("writing the initramfs")?;
    match options.stress {
        Some(seconds) => stress(&initramfs, seconds),
        None => make(&initramfs, options),
    }
}

/// Puts Lua's files, as cargo has them, and the Makefile into `folder`.
fn copy_lua(folder: &Path) -> Result<()> {
    let output =
        cargo().args(["metadata", "--format-version", "1", "--all-features"]).output().context("starting cargo")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("reading what cargo says")?;
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    let package = packages.find(|package| package["name"] == CRATE).context("cargo has no Lua")?;
    let manifest = Path::new(package["manifest_path"].as_str().context("the crate has no path")?);
    let crate_folder = manifest.parent().context("the crate has no folder")?;
    let name = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let entries: Vec<_> = std::fs::read_dir(crate_folder)?.collect::<Result<_, _>>()?;
    let lua = entries.iter().find(|entry| name(entry).starts_with("lua-5.4")).context("the crate has no Lua 5.4")?;
    std::fs::create_dir_all(folder)?;
    for entry in std::fs::read_dir(lua.path())? {
        let entry = entry?;
        std::fs::copy(entry.path(), folder.join(name(&entry)))?;
    }
    std::fs::write(folder.join("Makefile"), MAKEFILE)?;
    Ok(())
}

/// Boots with `cpus` vCPUs and more kernel parameters; returns the output.
fn boot(initramfs: &Path, cpus: &str, parameters: &str, patience: Duration) -> Result<String> {
    let initramfs = initramfs.display().to_string();
    let line = format!("console=ttyS0 quiet {parameters}");
    let more =
        ["--engine", "translator", "--initrd", &initramfs, "--memory", MEMORY, "--cpus", cpus, "--cmdline", &line];
    let ended = vm::run(&vm::arguments(&assets::kernel()?, &more), patience);
    ensure!(ended.status.success(), "the guest ended badly ({}):\n{}\n{}", ended.status, ended.output, ended.errors);
    Ok(ended.output)
}

fn make(initramfs: &Path, options: &Options) -> Result<()> {
    let mut times = vec![Vec::new(); SHAPES.len()];
    let mut made: Option<String> = None;
    for round in 1..=options.count {
        for ((cpus, jobs), times) in SHAPES.iter().zip(&mut times) {
            let output = boot(initramfs, &cpus.to_string(), &format!("jobs={jobs}"), PATIENCE)?;
            let (seconds, checksum) = parse(&output).with_context(|| format!("nothing was made:\n{output}"))?;
            eprintln!("cpus: round {round}, {cpus} vCPUs, {jobs} jobs: {seconds:.2} s");
            let first = made.get_or_insert_with(|| checksum.clone());
            ensure!(*first == checksum, "{cpus} vCPUs made another archive");
            times.push(seconds);
        }
    }
    let medians: Vec<f64> = times.into_iter().map(median).collect();
    let table = table(&medians, options.count);
    println!("{table}");
    if !options.dry_run {
        report::write_section("cpus", &table)?;
    }
    Ok(())
}

/// Seconds, and the checksum of what was made.
fn parse(output: &str) -> Option<(f64, String)> {
    let line = output.lines().find_map(|line| line.trim().strip_prefix("MADE "))?;
    let (seconds, checksum) = line.split_once(' ')?;
    Some((seconds.parse().ok()?, checksum.to_owned()))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn table(medians: &[f64], count: usize) -> String {
    let mut text = format!("Lua 5.4 made by gcc -O2 on a host with {} CPUs, medians of {count} runs.\n\n", host_cpus());
    text += "| vCPUs | make -j | seconds |\n|---|---|---|\n";
    for ((cpus, jobs), seconds) in SHAPES.iter().zip(medians) {
        writeln!(text, "| {cpus} | {jobs} | {seconds:.2} |").expect("writing to a string");
    }
    let (faster, slower) = (medians[0] / medians[1], medians[3] / medians[2]);
    writeln!(
        text,
        "\n2 vCPUs are {faster:.2}× as fast as one. 8 vCPUs take {slower:.2}× the time of 2 for the same jobs."
    )
    .expect("writing to a string");
    text
}

fn host_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn stress(initramfs: &Path, seconds: u64) -> Result<()> {
    let patience = PATIENCE + 2 * Duration::from_secs(seconds);
    let output = boot(initramfs, STRESSED_CPUS, &format!("seconds={seconds}"), patience)?;
    println!("{}", output.lines().filter(|line| line.contains("stress-ng:")).collect::<Vec<_>>().join("\n"));
    if output.contains("STRESSED 0") && output.contains("COMPLAINTS 0") {
        println!(
            "{seconds} s with {STRESSED_CPUS} vCPUs on {} CPUs: no failure, no complaint of the kernel's",
            host_cpus()
        );
        return Ok(());
    }
    bail!("stress-ng failed, or the kernel complained:\n{output}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_parsed() {
        assert_eq!(parse("noise\r\nMADE 1.5 abc  -\r\n"), Some((1.5, "abc  -".into())));
        assert_eq!(parse("MADE  abc"), None);
        assert_eq!(parse("make: *** error"), None);
    }

    #[test]
    fn ratios_are_of_the_right_shapes() {
        let text = table(&[20.0, 10.0, 12.0, 15.0], 3);
        assert!(text.contains("2 vCPUs are 2.00× as fast as one. 8 vCPUs take 1.25× the time of 2"), "{text}");
    }
}
