//! `cargo xtask crash-disks`: kills anyvisor while its guest writes, again and again; what was flushed must be there.
//!
//! The guest has a raw disk and a qcow2 disk on top of another image. On both at once fio fills one region of 4 MiB after the other,
//! out of order, each in a round of its own whose number is in every block, and flushes it; then the guest says so on its
//! console. The process is killed (SIGKILL) at a random moment. Then `qemu-img check` must find no error, and the last regions
//! that were said to be flushed must hold their rounds. The next VM goes on with the same images.

use super::fio::Fio;
use crate::{cargo, install_qemu, run};
use anyhow::{Context, Result, bail, ensure};
use anyvisor_tests::{assets, vm};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

const PATIENCE: Duration = Duration::from_secs(180);
/// Bytes of a disk, a region and a block.
const DISK: u64 = 2 << 30;
const REGION: u64 = 4 << 20;
const BLOCK: usize = 4096;
const REGIONS: u64 = DISK / REGION;
/// Regions that are looked at after each kill: those of the last rounds. At the end all are.
const RECENT: u64 = 24;
/// The longest that a guest writes before it is killed.
const WRITING: u64 = 3000;

#[derive(clap::Args)]
pub struct CrashOptions {
    /// How often the process is killed
    #[arg(long, default_value_t = 100)]
    times: u32,
    /// For the moments of the kills [default: the time]
    #[arg(long)]
    seed: Option<u64>,
}

/// One disk, and how far its guest has come.
struct Disk {
    /// In Linux: a or b.
    letter: char,
    image: PathBuf,
    qcow2: bool,
    /// The last round that was flushed; rounds begin with 1.
    round: u64,
    /// Kills after which clusters were leaked.
    leaked: u32,
}

/// Kills as often as asked.
///
/// # Errors
/// What was lost.
pub fn crash(options: &CrashOptions) -> Result<()> {
    install_qemu()?;
    run(cargo().args(["build", "--quiet", "--release", "--package", "anyvisor"]))?;
    let seed = options.seed.unwrap_or_else(|| {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64)
    });
    println!("seed {seed}");
    let folder = assets::scratch_folder();
    let mut disks = make_disks(folder.path())?;
    let initramfs = Fio::prepare()?.initramfs("crash.cpio", SCRIPT)?;
    let mut random = Random(seed);
    let began = Instant::now();
    for number in 1..=options.times {
        let before: Vec<_> = disks.iter().map(|disk| disk.round).collect();
        kill_once(&initramfs, &mut disks, &mut random).with_context(|| format!("kill {number}"))?;
        for disk in &mut disks {
            let context = || format!("kill {number}, {}", disk.image.display());
            disk.leaked += u32::from(check(disk).with_context(context)?);
            verify(disk, RECENT).with_context(context)?;
        }
        let rounds: Vec<_> = disks.iter().zip(before).map(|(disk, before)| disk.round - before).collect();
        eprintln!("kill {number}: rounds flushed meanwhile: raw {}, qcow2 {}", rounds[0], rounds[1]);
    }
    for disk in &disks {
        verify(disk, REGIONS).with_context(|| format!("at the end, {}", disk.image.display()))?;
        let name = if disk.qcow2 { "qcow2" } else { "raw" };
        println!(
            "{name}: {} kills, {} rounds of {} blocks flushed, all there; no error in the image; leaked clusters after {} kills",
            options.times,
            disk.round,
            REGION / BLOCK as u64,
            disk.leaked
        );
    }
    println!("{:.0} s", began.elapsed().as_secs_f64());
    std::fs::remove_file(initramfs)?;
    Ok(())
}

/// The parameters `a` and `b` are the last rounds. One fio for each disk: a round is a job, and a job that ended says so.
const SCRIPT: &str = r#"
write() {
    d=$1; k=$2; end=$((k + 200))
    echo "[global]
ioengine=libaio
iodepth=16
direct=1
bs=4k
rw=randwrite
size=4m
filename=/dev/vd$d
verify=pattern
do_verify=0
end_fsync=1
thread
stonewall" >/tmp/$d.job
    while [ $k -lt $end ]; do
        k=$((k + 1))
        echo "[$d$k]
offset=$((k % 512 * 4))m
verify_pattern=$(printf '0x%08x' $k)%o
exec_postrun=echo flushed $d $k. >/dev/console && true" >>/tmp/$d.job
    done
    cd /tmp; fio /tmp/$d.job >/tmp/$d 2>&1; echo "fio ended"; cat /tmp/$d
}
write a $a & write b $b & wait
"#;

fn make_disks(folder: &Path) -> Result<Vec<Disk>> {
    let at = |name: &str| folder.join(name);
    for name in ["raw.img", "base.img"] {
        File::create(at(name))?.set_len(DISK)?;
    }
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw"]).arg(at("top.qcow2"));
    assets::run(&mut command)?;
    let disk = |letter, name: &str, qcow2| Disk { letter, image: at(name), qcow2, round: 0, leaked: 0 };
    Ok(vec![disk('a', "raw.img", false), disk('b', "top.qcow2", true)])
}

/// One VM's life.
fn kill_once(initramfs: &Path, disks: &mut [Disk], random: &mut Random) -> Result<()> {
    let kernel = assets::kernel()?;
    let initramfs = initramfs.display().to_string();
    let command_line = format!("console=ttyS0 quiet a={} b={}", disks[0].round, disks[1].round);
    let arguments: Vec<String> = disks
        .iter()
        .map(|disk| format!("{},format={}", disk.image.display(), if disk.qcow2 { "qcow2" } else { "raw" }))
        .collect();
    let more = [
        "--initrd",
        &initramfs,
        "--cmdline",
        &command_line,
        "--memory",
        "512M",
        "--disk",
        &arguments[0],
        "--disk",
        &arguments[1],
    ];
    let mut guest = vm::Vm::start(&vm::arguments(&kernel, &more))?;
    guest.wait_for("flushed", PATIENCE);
    std::thread::sleep(Duration::from_millis(random.below(WRITING)));
    guest.signal(libc::SIGKILL);
    let ended = guest.end(PATIENCE);
    ensure!(!ended.output.contains("fio ended"), "{}\n{}", ended.output, ended.errors);
    for disk in disks {
        let said = format!("flushed {} ", disk.letter);
        let rounds = ended.output.split(&said).skip(1).filter_map(|rest| rest.split_once('.')?.0.parse().ok());
        disk.round = rounds.max().unwrap_or(disk.round);
    }
    Ok(())
}

/// Says whether clusters are leaked, and frees them.
fn check(disk: &Disk) -> Result<bool> {
    if !disk.qcow2 {
        return Ok(false);
    }
    let output = Command::new("qemu-img").arg("check").arg(&disk.image).output().context("starting qemu-img")?;
    match output.status.code() {
        Some(0) => Ok(false),
        // Leaks and nothing else (qemu-img(1)).
        Some(3) => {
            assets::run(Command::new("qemu-img").args(["check", "-q", "-r", "leaks"]).arg(&disk.image))?;
            Ok(true)
        }
        _ => bail!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
    }
}

/// Compares the regions of the last `count` flushed rounds. That of the round after them may have been half written.
fn verify(disk: &Disk, count: u64) -> Result<()> {
    let first = (disk.round + 1).saturating_sub(count.min(REGIONS - 1)).max(1);
    for round in first..=disk.round {
        let offset = round % REGIONS * REGION;
        let bytes = if disk.qcow2 { region_of_qcow2(&disk.image, offset)? } else { region(&disk.image, offset)? };
        for (n, block) in bytes.chunks_exact(BLOCK).enumerate() {
            let at = offset + (n * BLOCK) as u64;
            let pattern = [&(round as u32).to_be_bytes()[..], &at.to_le_bytes()].concat();
            let good = block.chunks(pattern.len()).all(|part| *part == pattern[..part.len()]);
            ensure!(
                good,
                "the block at {at:#x} was flushed in round {round} and is lost: it begins with {:x?}",
                &block[..16]
            );
        }
    }
    Ok(())
}

fn region(image: &Path, offset: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; REGION as usize];
    File::open(image)?.read_exact_at(&mut bytes, offset).context("reading the image")?;
    Ok(bytes)
}

fn region_of_qcow2(image: &Path, offset: u64) -> Result<Vec<u8>> {
    let copy = image.with_extension("region");
    let mut command = Command::new("qemu-img");
    let skip = offset / REGION;
    command.args(["dd", "-f", "qcow2", "-O", "raw", &format!("bs={REGION}")]);
    // It counts what it skips too.
    command.arg(format!("skip={skip}")).arg(format!("count={}", skip + 1)).arg(format!("if={}", image.display()));
    let output = command.arg(format!("of={}", copy.display())).output().context("starting qemu-img")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    region(&copy, 0)
}

/// Knuth's linear congruential generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
