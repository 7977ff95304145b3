//! Disk images that GRUB boots: made from the distribution's packages, without being root.
//!
//! For a BIOS an image has one ext2 partition; GRUB's boot sector is in the first sector and its core behind it, as
//! grub-bios-setup puts them: the core in one piece behind the boot sector is what both have as their defaults. For UEFI
//! it has one EFI system partition with GRUB as \EFI\BOOT\BOOTX64.EFI.

use crate::assets::{package, run};
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const SECTOR: u64 = 512;
/// First sector of the partition: 1 MiB.
const PARTITION: u64 = 2048;

/// Modules in GRUB's core, so that it loads none.
const EFI_MODULES: [&str; 6] = ["part_msdos", "fat", "normal", "linux", "echo", "configfile"];
const BIOS_MODULES: [&str; 10] =
    ["biosdisk", "part_msdos", "ext2", "normal", "linux", "linux16", "serial", "terminal", "echo", "configfile"];

/// Types of partitions.
const LINUX: u8 = 0x83;
const EFI_SYSTEM: u8 = 0xef;

/// What begins each configuration for a BIOS: the console is the serial port.
const CONSOLE: &str = "serial --unit=0 --speed=115200\nterminal_input serial\nterminal_output serial\nset timeout=0\n";

/// SeaBIOS.
///
/// # Errors
/// When its package cannot be fetched.
pub fn seabios() -> Result<PathBuf> {
    Ok(package("seabios")?.join("usr/share/seabios/bios-256k.bin"))
}

/// OVMF: the file of that name in its package, for example `OVMF_CODE.fd`.
///
/// # Errors
/// When the package cannot be fetched.
pub fn ovmf(file: &str) -> Result<PathBuf> {
    Ok(package("ovmf")?.join("usr/share/OVMF").join(file))
}

/// As [`bios_image`], for UEFI.
///
/// # Errors
/// As for [`bios_image`].
pub fn efi_image(path: &Path, mib: u64, configuration: &str, files: &[(&str, &[u8])]) -> Result<()> {
    let loader = core(path, "grub-efi-amd64-bin", "x86_64-efi", "/EFI/BOOT", &EFI_MODULES)?;
    let config = format!("set timeout=0\n{configuration}\n");
    let own = [("EFI/BOOT/BOOTX64.EFI", loader.as_slice()), ("EFI/BOOT/grub.cfg", config.as_bytes())];
    let image = File::create_new(path).with_context(|| format!("making {}", path.display()))?;
    image.set_len(mib << 20)?;
    image.write_all_at(&partition_table(EFI_SYSTEM, (mib - 1) << 11), TABLE)?;
    let partition = format!("{}@@{}", path.display(), PARTITION * SECTOR);
    let mtools = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new(package("mtools")?.join("usr/bin/mtools"));
        // It is several programs in one; its own idea of the geometry does not matter.
        command.args(["-c", arguments[0], "-i", &partition]).env("MTOOLS_SKIP_CHECK", "1");
        run(command.args(&arguments[1..]))
    };
    mtools(&["mformat", "-F", "::"])?;
    let file = path.with_extension("file");
    let mut folders = BTreeSet::new();
    for (name, bytes) in files.iter().copied().chain(own) {
        let above: Vec<_> = Path::new(name).ancestors().skip(1).filter(|above| *above != "").collect();
        for folder in above.into_iter().rev().filter(|folder| folders.insert(folder.to_path_buf())) {
            mtools(&["mmd", &format!("::{}", folder.display())])?;
        }
        std::fs::write(&file, bytes)?;
        mtools(&["mcopy", &file.display().to_string(), &format!("::{name}")])?;
    }
    std::fs::remove_file(file)?;
    Ok(())
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
    let core = core(path, "grub-pc-bin", "i386-pc", "(hd0,msdos1)/boot/grub", &BIOS_MODULES)?;
    assert!((core.len() as u64) < (PARTITION - 1) * SECTOR, "GRUB's core reaches into the partition");
    image.write_all_at(&boot_sector((mib - 1) << 11)?, 0)?;
    image.write_all_at(&core, SECTOR)?;
    Ok(())
}

/// GRUB's core in `format`, which finds what it needs in the `prefix`.
fn core(beside: &Path, from: &str, format: &str, prefix: &str, modules: &[&str]) -> Result<Vec<u8>> {
    let to = beside.with_extension("core");
    let mut mkimage = Command::new(package("grub-common")?.join("usr/bin/grub-mkimage"));
    // A library that minimal systems lack.
    mkimage.env("LD_LIBRARY_PATH", package("libdevmapper1.02.1")?.join("lib/x86_64-linux-gnu"));
    let folder = package(from)?.join("usr/lib/grub").join(format);
    mkimage.args(["-O", format, "-p", prefix, "-d"]).arg(folder).arg("-o").arg(&to);
    run(mkimage.args(modules))?;
    let core = std::fs::read(&to)?;
    std::fs::remove_file(to)?;
    Ok(core)
}

/// GRUB's boot sector, with a partition table of one partition of `sectors`.
fn boot_sector(sectors: u64) -> Result<Vec<u8>> {
    // The code behind is for floppy disks.
    let mut boot = std::fs::read(package("grub-pc-bin")?.join("usr/lib/grub/i386-pc/boot.img"))?[..440].to_vec();
    boot.resize(TABLE as usize, 0);
    boot.extend(partition_table(LINUX, sectors));
    Ok(boot)
}

/// Where the first sector has its table of partitions.
const TABLE: u64 = 446;

/// The rest of the first sector: a table with one partition of `sectors`, and the signature.
fn partition_table(kind: u8, sectors: u64) -> Vec<u8> {
    let mut table = vec![0x80, 0xfe, 0xff, 0xff, kind, 0xfe, 0xff, 0xff];
    table.extend((PARTITION as u32).to_le_bytes());
    table.extend((sectors as u32).to_le_bytes());
    table.resize(64, 0);
    table.extend([0x55, 0xaa]);
    table
}
