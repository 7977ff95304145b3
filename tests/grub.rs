//! Disk images that GRUB boots: made from the distribution's packages, without being root.
//!
//! An image has one ext2 partition. For a BIOS, GRUB's boot sector is in the first sector and its core behind it, as
//! grub-bios-setup puts them: the core in one piece behind the boot sector is what both have as their defaults.

use crate::assets::{package, run};
use anyhow::{Context, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const SECTOR: u64 = 512;
/// First sector of the partition: 1 MiB.
const PARTITION: u64 = 2048;

/// Modules in GRUB's core, so that it loads none.
const MODULES: [&str; 10] =
    ["biosdisk", "part_msdos", "ext2", "normal", "linux", "linux16", "serial", "terminal", "echo", "configfile"];

/// What begins each configuration: the console is the serial port.
const CONSOLE: &str = "serial --unit=0 --speed=115200\nterminal_input serial\nterminal_output serial\nset timeout=0\n";

/// SeaBIOS.
///
/// # Errors
/// When its package cannot be fetched.
pub fn seabios() -> Result<PathBuf> {
    Ok(package("seabios")?.join("usr/share/seabios/bios-256k.bin"))
}

/// An image of `mib` MiB at `path`, from which GRUB does what `configuration` says, with `files` by path.
///
/// # Errors
/// A package cannot be fetched, or a tool of the host is missing.
pub fn bios_image(path: &Path, mib: u64, configuration: &str, files: &[(&str, &[u8])]) -> Result<()> {
    let work = path.with_extension("tree");
    let config = format!("{CONSOLE}{configuration}\n");
    for (name, bytes) in files.iter().copied().chain([("boot/grub/grub.cfg", config.as_bytes())]) {
        let file = work.join(name);
        std::fs::create_dir_all(file.parent().expect("a path below the folder"))?;
        std::fs::write(file, bytes)?;
    }
    let image = File::create_new(path).with_context(|| format!("making {}", path.display()))?;
    image.set_len(mib << 20)?;
    let size = format!("{}M", mib - 1);
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-t", "ext2", "-E", &format!("offset={}", PARTITION * SECTOR), "-d"]);
    // Not every user's PATH has it.
    mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    run(mke2fs.arg(&work).arg(path).arg(size)).context("making a file system (is e2fsprogs installed?)")?;
    std::fs::remove_dir_all(&work)?;
    let core = core(path)?;
    assert!((core.len() as u64) < (PARTITION - 1) * SECTOR, "GRUB's core reaches into the partition");
    image.write_all_at(&boot_sector((mib - 1) << 11)?, 0)?;
    image.write_all_at(&core, SECTOR)?;
    Ok(())
}

/// GRUB's core for a BIOS.
fn core(beside: &Path) -> Result<Vec<u8>> {
    let to = beside.with_extension("core");
    let mut mkimage = Command::new(package("grub-common")?.join("usr/bin/grub-mkimage"));
    // A library that minimal systems lack.
    mkimage.env("LD_LIBRARY_PATH", package("libdevmapper1.02.1")?.join("lib/x86_64-linux-gnu"));
    mkimage.args(["-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-d"]).arg(folder()?).arg("-o").arg(&to);
    run(mkimage.args(MODULES))?;
    let core = std::fs::read(&to)?;
    std::fs::remove_file(to)?;
    Ok(core)
}

fn folder() -> Result<PathBuf> {
    Ok(package("grub-pc-bin")?.join("usr/lib/grub/i386-pc"))
}

/// GRUB's boot sector, with a partition table of one partition of `sectors`.
fn boot_sector(sectors: u64) -> Result<Vec<u8>> {
    const TABLE: usize = 446;
    const LINUX: u8 = 0x83;
    // The code behind is for floppy disks.
    let mut boot = std::fs::read(folder()?.join("boot.img"))?[..440].to_vec();
    boot.resize(TABLE, 0);
    boot.extend([0x80, 0xfe, 0xff, 0xff, LINUX, 0xfe, 0xff, 0xff]);
    boot.extend((PARTITION as u32).to_le_bytes());
    boot.extend((sectors as u32).to_le_bytes());
    boot.resize(510, 0);
    boot.extend([0x55, 0xaa]);
    Ok(boot)
}
