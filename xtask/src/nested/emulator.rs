//! The two emulators: what they need, how they are called, how L1's output gets out.

use super::image::Image;
use super::{Vendor, scratch};
use crate::{install, run};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How L1 ended.
pub enum Outcome {
    /// The script's exit status.
    Ended(i32),
    /// There is none: what the emulator and L1's console said last.
    Died(String),
}

/// An emulator of a processor with hardware virtualization.
pub struct Emulator {
    pub name: &'static str,
    pub program: &'static str,
    packages: &'static [&'static str],
    /// L1's KVM module.
    pub module: &'static str,
    /// Name of its limits in the conformance suite.
    pub limits: &'static str,
    /// A generous time for one boot of a Linux guest, and for the whole suite.
    pub boot: Duration,
    pub suite: Duration,
    /// Whether its processor's TSC is this host's. Bochs counts instructions instead (`ips=`, 25 MHz), and VT-x of
    /// its Haswell has no TSC scaling (cpu/cpudb/intel/corei7_haswell_4770.cc).
    pub has_host_tsc: bool,
    vendor: Vendor,
}

/// One processor. With two, QEMU 7.2 now and then stops handling L1's interrupts for good while a guest's
/// instruction fails on one of them.
///
/// XSAVE is hidden: QEMU 7.2 does not intercept XSETBV, so that a guest's XCR0 becomes L1's.
const QEMU: &[&str] = &[
    "-accel",
    "tcg",
    "-machine",
    "q35",
    "-cpu",
    "max,-la57,-xsave,-xsaveopt,-xgetbv1,-avx,-avx2,-f16c,-fma,-vaes,-mpx,-pku",
    "-smp",
    "1",
    "-m",
    "1024",
    "-nodefaults",
    "-display",
    "none",
    "-no-reboot",
];

const CONSOLE: &str = "console";
const OUTPUT: &str = "output";
const STATUS: &str = "status";

impl Emulator {
    pub fn of(vendor: Vendor) -> Emulator {
        match vendor {
            Vendor::Amd => Emulator {
                name: "AMD-V",
                program: "qemu-system-x86_64",
                packages: crate::QEMU,
                module: "kvm_amd",
                limits: "qemu-svm",
                boot: Duration::from_secs(60),
                suite: Duration::from_secs(600),
                has_host_tsc: true,
                vendor,
            },
            Vendor::Intel => Emulator {
                name: "VT-x",
                program: "bochs-bin",
                packages: &[
                    "bochs",
                    "bochsbios",
                    "bochs-term",
                    "vgabios",
                    "grub-pc-bin",
                    "grub-common",
                    "xorriso",
                    "mtools",
                    "bsdutils",
                ],
                module: "kvm_intel",
                limits: "bochs-vmx",
                boot: Duration::from_secs(300),
                suite: Duration::from_secs(1800),
                has_host_tsc: false,
                vendor,
            },
        }
    }

    /// Installs what is missing.
    pub fn install(&self) -> Result<()> {
        install(self.program, self.packages)?;
        if matches!(self.vendor, Vendor::Intel) {
            install("grub-mkrescue", self.packages)?;
            install("xorriso", self.packages)?;
            install("mformat", self.packages)?;
        }
        Ok(())
    }

    /// Runs L1 with its script's output shown.
    ///
    /// # Errors
    /// The emulator cannot be started.
    pub fn run(&self, image: &Image, patience: Duration) -> Result<Outcome> {
        self.run_with(image, patience, "", None)
    }

    /// As [`Emulator::run`], with more on L1's command line, and what L1 sends to its fourth serial port in `fourth`.
    ///
    /// # Errors
    /// As for `run`, and when this emulator has no fourth serial port.
    pub fn run_with(&self, image: &Image, patience: Duration, more: &str, fourth: Option<&Path>) -> Result<Outcome> {
        let folder = scratch(&if fourth.is_some() { format!("{}-moving", self.program) } else { self.program.into() })?;
        for name in [CONSOLE, OUTPUT, STATUS] {
            fs::write(folder.join(name), "")?;
        }
        let child = match self.vendor {
            Vendor::Amd => qemu(image, &folder, more, fourth)?,
            Vendor::Intel if fourth.is_none() => bochs(image, &folder, patience)?,
            Vendor::Intel => anyhow::bail!("Bochs has no fourth serial port here; use amd"),
        };
        let late = follow(child, &folder.join(OUTPUT), patience)?;
        let status = fs::read_to_string(folder.join(STATUS)).unwrap_or_default();
        if let Ok(status) = status.trim().parse() {
            if fourth.is_some() {
                // A guest's whole memory is in there.
                let _ = fs::remove_dir_all(&folder);
            }
            return Ok(Outcome::Ended(status));
        }
        let mut why = if late { format!("no end after {} s", patience.as_secs()) } else { "it ended early".to_owned() };
        for name in [CONSOLE, "said"] {
            let text = fs::read(folder.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            let text = text.unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            why += &format!("\n--- {name}\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
        Ok(Outcome::Died(why))
    }
}

fn qemu(image: &Image, folder: &Path, more: &str, fourth: Option<&Path>) -> Result<Child> {
    let initramfs = folder.join("initramfs");
    fs::write(&initramfs, &image.initramfs)?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args(QEMU).arg("-kernel").arg(&image.kernel).arg("-initrd").arg(initramfs);
    command.args(["-append", &format!("console=ttyS0 panic=-1 tsc=reliable {more}")]);
    for name in [CONSOLE, OUTPUT, STATUS] {
        command.arg("-serial").arg(format!("file:{}", folder.join(name).display()));
    }
    if let Some(path) = fourth {
        command.arg("-serial").arg(format!("file:{}", path.display()));
    }
    command.stdin(Stdio::null()).stdout(File::create(folder.join("said"))?).stderr(File::create(folder.join("said"))?);
    command.spawn().context("starting QEMU")
}

/// Bochs boots from a CD image. Debian's build starts in its debugger, which is told to continue, and wants a
/// terminal, which `script` gives it.
fn bochs(image: &Image, folder: &Path, patience: Duration) -> Result<Child> {
    let boot = folder.join("iso/boot");
    fs::create_dir_all(boot.join("grub"))?;
    fs::copy(&image.kernel, boot.join("vmlinuz"))?;
    fs::write(boot.join("initrd"), &image.initramfs)?;
    run(Command::new("gzip").arg("-1").arg(boot.join("initrd")))?;
    let grub = "linux /boot/vmlinuz console=ttyS0 quiet panic=-1 tsc=reliable nokaslr\ninitrd /boot/initrd.gz\nboot\n";
    fs::write(boot.join("grub/grub.cfg"), grub)?;
    let mut rescue = Command::new("grub-mkrescue");
    anyvisor_tests::assets::run(rescue.arg("-o").arg(folder.join("l1.iso")).arg(folder.join("iso")))?;
    fs::write(folder.join("bochsrc"), BOCHSRC)?;
    fs::write(folder.join("go"), "c\n")?;
    // It shows L1's screen on a second terminal, which somebody has to read, or it waits for ever once that is full.
    let inner = r#"stty rows 50 cols 132
        (until screen=$(sed -n 's/.*connected to screen "\(.*\)".*/\1/p' said); [ -n "$screen" ]; do sleep 1; done
         exec cat "$screen" >/dev/null) &
        exec bochs-bin -q -f bochsrc -rc go"#;
    let said = File::create(folder.join("said"))?;
    let mut command = Command::new("timeout");
    command.arg((patience.as_secs() + 10).to_string()).args(["script", "-qec", inner, "/dev/null"]);
    command.current_dir(folder).env("TERM", "xterm").stdin(Stdio::null());
    command.stdout(said.try_clone()?).stderr(said);
    command.spawn().context("starting Bochs")
}

const BOCHSRC: &str = "config_interface: textconfig
display_library: term
cpu: model=corei7_haswell_4770, count=1, ips=25000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot
vgaromimage: file=/usr/share/vgabios/vgabios.bin
pci: enabled=1, chipset=i440fx
ata0-master: type=cdrom, path=l1.iso, status=inserted
boot: cdrom
clock: sync=none
com1: enabled=1, mode=file, dev=console
com2: enabled=1, mode=file, dev=output
com3: enabled=1, mode=file, dev=status
sound: driver=dummy
speaker: enabled=0
log: bochs.log
panic: action=fatal
error: action=ignore
";

/// Shows what comes into `output` until the emulator ends; whether it had to be ended.
fn follow(mut child: Child, output: &Path, patience: Duration) -> Result<bool> {
    let began = Instant::now();
    let mut output = File::open(output)?;
    let mut bytes = Vec::new();
    loop {
        let ended = child.try_wait()?.is_some();
        bytes.clear();
        output.read_to_end(&mut bytes)?;
        let mut stdout = std::io::stdout();
        stdout.write_all(&bytes)?;
        stdout.flush()?;
        if ended {
            return Ok(false);
        }
        if began.elapsed() > patience {
            // `timeout` passes a plain kill on to what it started; QEMU is the child itself.
            let _ = Command::new("kill").arg(child.id().to_string()).status();
            child.wait()?;
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
