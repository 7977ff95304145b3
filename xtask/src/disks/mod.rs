//! `cargo xtask disks`: fio on a disk of anyvisor's guest, of QEMU's (TCG) and on the host's file, in turn, so that a busy host
//! slows all alike.
//!
//! The image is in the host's page cache, unless it is read and written past that (`direct`); in the guests fio always goes past the
//! guest's own. All guests have one vCPU. What counts are ratios within a turn; the table shows their medians.

mod crash;
mod fio;

use crate::{cargo, install_qemu, run};
use anyhow::{Context, Result, ensure};
use anyvisor_tests::{assets, vm};
pub use crash::{CrashOptions, crash};
use fio::Fio;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(600);
const MEMORY_MIB: &str = "768";
/// Bytes of the image.
const SIZE: u64 = 1 << 30;

#[derive(clap::Args)]
pub struct Options {
    /// Turns; medians are taken
    #[arg(long, default_value_t = 3)]
    count: usize,
    /// Seconds of each job
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Where the image is made [default: the assets' folder]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Only those whose name contains TEXT
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
}

/// What fio does: a name, options, and whether operations (or else bytes) count.
struct Job {
    name: &'static str,
    options: &'static str,
    operations: bool,
}

const JOBS: [Job; 4] = [
    Job { name: "4K random read, 32 at once", options: "--rw=randread --bs=4k --iodepth=32", operations: true },
    Job { name: "4K random read, one by one", options: "--rw=randread --bs=4k --iodepth=1", operations: true },
    Job { name: "sequential read", options: "--rw=read --bs=256k --iodepth=8", operations: false },
    Job { name: "sequential write", options: "--rw=write --bs=256k --iodepth=8", operations: false },
];

/// Who runs fio.
#[derive(Clone, Copy, PartialEq)]
enum Runner {
    Host {
        direct: bool,
    },
    Qemu,
    /// With these options of `--disk`.
    Anyvisor(&'static str),
}

const RUNNERS: [(&str, Runner); 6] = [
    ("host file", Runner::Host { direct: false }),
    ("host file, direct", Runner::Host { direct: true }),
    ("QEMU TCG, raw", Runner::Qemu),
    ("anyvisor, raw", Runner::Anyvisor("format=raw")),
    ("anyvisor, raw, direct", Runner::Anyvisor("format=raw,direct")),
    ("anyvisor, qcow2", Runner::Anyvisor("format=qcow2")),
];

/// Numerator and denominator of the ratios that are shown, by name.
const RATIOS: [(&str, &str); 4] = [
    ("anyvisor, raw", "QEMU TCG, raw"),
    ("anyvisor, qcow2", "QEMU TCG, raw"),
    ("anyvisor, raw", "host file"),
    ("anyvisor, raw, direct", "host file, direct"),
];

/// Measures and prints the table.
///
/// # Errors
/// A guest or fio fails.
pub fn disks(options: &Options) -> Result<()> {
    install_qemu()?;
    run(cargo().args(["build", "--quiet", "--release", "--package", "anyvisor"]))?;
    let fio = Fio::prepare()?;
    let own = options.folder.is_none().then(assets::scratch_folder);
    let folder = own.as_ref().map_or_else(|| options.folder.clone().unwrap_or_default(), |own| own.path().to_owned());
    let images = images(&folder)?;
    let initramfs = fio.initramfs("fio.cpio", &script(options.seconds))?;
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|text| name.contains(text.as_str()));
    let runners: Vec<_> = RUNNERS.into_iter().filter(|(name, _)| wanted(name)).collect();
    // By turn, runner and job.
    let mut turns: Vec<Vec<Vec<f64>>> = Vec::new();
    for turn in 0..options.count {
        let mut results = Vec::new();
        for (name, runner) in &runners {
            let figures = match runner {
                Runner::Host { direct } => on_host(&fio, &images.raw, *direct, options.seconds),
                _ => in_guest(*runner, &images, &initramfs),
            };
            let figures = figures.with_context(|| (*name).to_owned())?;
            eprintln!("turn {}: {name}: {figures:.0?}", turn + 1);
            results.push(figures);
        }
        turns.push(results);
    }
    std::fs::remove_file(initramfs)?;
    print(&runners, &turns);
    Ok(())
}

struct Images {
    raw: PathBuf,
    qcow2: PathBuf,
}

/// A raw image full of something, and the same as qcow2.
fn images(folder: &Path) -> Result<Images> {
    let images = Images { raw: folder.join("disk.raw"), qcow2: folder.join("disk.qcow2") };
    let piece: Vec<u8> = (0..1u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut file = std::fs::File::create(&images.raw)?;
    for _ in 0..SIZE / piece.len() as u64 {
        std::io::Write::write_all(&mut file, &piece).context("making an image")?;
    }
    let mut command = Command::new("qemu-img");
    assets::run(command.args(["convert", "-f", "raw", "-O", "qcow2"]).args([&images.raw, &images.qcow2]))?;
    Ok(images)
}

fn job_options(job: &Job, seconds: u32) -> String {
    format!(
        "--name=x --ioengine=libaio --thread --time_based --ramp_time=1 --randrepeat=0 --size={SIZE} --runtime={seconds} \
         --output-format=terse --terse-version=3 {}",
        job.options
    )
}

/// Prints `fio` and a line of fio's for each job.
fn script(seconds: u32) -> String {
    let line = |job: &Job| format!("fio --filename=/dev/vda --direct=1 {} | grep '^3;'\n", job_options(job, seconds));
    JOBS.iter().map(line).collect()
}

fn on_host(fio: &Fio, image: &Path, direct: bool, seconds: u32) -> Result<Vec<f64>> {
    let mut figures = Vec::new();
    for job in &JOBS {
        let mut command = fio.command();
        // The host's own program would wait for the page cache one by one.
        command.arg(format!("--filename={}", image.display())).arg(format!("--direct={}", u32::from(direct)));
        command.args(job_options(job, seconds).split_whitespace());
        let output = command.stderr(Stdio::inherit()).output().context("starting fio")?;
        ensure!(output.status.success(), "fio: {}", output.status);
        figures.push(figure(job, &String::from_utf8_lossy(&output.stdout))?);
    }
    Ok(figures)
}

fn in_guest(runner: Runner, images: &Images, initramfs: &Path) -> Result<Vec<f64>> {
    let kernel = assets::kernel()?;
    let text = if let Runner::Anyvisor(options) = runner {
        let image = if options.contains("qcow2") { &images.qcow2 } else { &images.raw };
        let (disk, memory) = (format!("{},{options}", image.display()), format!("{MEMORY_MIB}M"));
        let initramfs = initramfs.display().to_string();
        let more = ["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet", "--memory", &memory, "--disk", &disk];
        let ended = vm::run(&vm::arguments(&kernel, &more), PATIENCE);
        ensure!(ended.status.code() == Some(0), "{ended:?}");
        ended.output
    } else {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-accel",
            "tcg",
            "-machine",
            "q35",
            "-cpu",
            "max",
            "-m",
            MEMORY_MIB,
            "-nodefaults",
            "-no-reboot",
        ]);
        command.args(["-display", "none", "-serial", "stdio", "-append", "console=ttyS0 quiet"]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        command.arg("-drive").arg(format!("file={},format=raw,if=none,id=d,aio=io_uring", images.raw.display()));
        let output = command.args(["-device", "virtio-blk-pci,drive=d"]).stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "QEMU: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("3;fio")).collect();
    ensure!(lines.len() == JOBS.len(), "{} results of {}:\n{text}", lines.len(), JOBS.len());
    JOBS.iter().zip(lines).map(|(job, line)| figure(job, line)).collect()
}

/// Operations or MiB in a second, of a line of fio's (its manual, terse output, version 3).
fn figure(job: &Job, line: &str) -> Result<f64> {
    let fields: Vec<_> = line.trim().split(';').collect();
    let field = |n: usize| fields.get(n).and_then(|field| field.parse::<f64>().ok()).context("a line of fio's");
    // KiB/s and operations/s, reading and writing.
    let [bandwidth, operations] = if job.options.contains("write") { [47, 48] } else { [6, 7] };
    Ok(if job.operations { field(operations)? } else { field(bandwidth)? / 1024.0 })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn print(runners: &[(&str, Runner)], turns: &[Vec<Vec<f64>>]) {
    for (n, job) in JOBS.iter().enumerate() {
        let unit = if job.operations { "operations/s" } else { "MiB/s" };
        println!("{} ({unit})", job.name);
        for (who, (name, _)) in runners.iter().enumerate() {
            println!("  {name:<24}{:>10.0}", median(turns.iter().map(|turn| turn[who][n]).collect()));
        }
        for (over, under) in RATIOS {
            let place = |wanted: &str| runners.iter().position(|(name, _)| *name == wanted);
            if let (Some(over_at), Some(under_at)) = (place(over), place(under)) {
                let ratio = median(turns.iter().map(|turn| turn[over_at][n] / turn[under_at][n]).collect());
                println!("  {over} / {under}: {ratio:.2}");
            }
        }
    }
}
