//! The guest's files: Debian packages unpacked in the user's cache folder, the programs' inputs, and an initramfs
//! of both. The native runs use the same files, in a chroot.

use super::source;
use crate::install;
use anyhow::{Context, Result, ensure};
use anyvisor_initramfs::Archive;
use anyvisor_tests::assets;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGES: &str = "gcc,libc6-dev,binutils,python3,sqlite3,openssl,p7zip-full";
const SUITE: &str = "bookworm";

/// Folders that only people read; dpkg leaves them out.
const LEFT_OUT: [&str; 4] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];

/// What the guest has no use for; together more than half of the packages' size.
const UNUSED: [&str; 8] = ["lto1", "lto-dump", "san.", "gprofng", "-dwp", "libc.a", "libm-2", "var/lib/dpkg"];

/// Lines of the C file that gcc compiles, and of the one whose program is run too.
const LINES: usize = 20_000;
const SMALL_LINES: usize = 1_500;

const FILES: [(&str, &str); 7] = [
    ("drive.py", include_str!("guest/drive.py")),
    ("nbody.py", include_str!("guest/nbody.py")),
    ("documents.py", include_str!("guest/documents.py")),
    ("expressions.py", include_str!("guest/expressions.py")),
    ("words.py", include_str!("guest/words.py")),
    ("classes.py", include_str!("guest/classes.py")),
    ("queries.sql", include_str!("guest/queries.sql")),
];

/// The root file system's folder in `cache`, with the present inputs.
///
/// # Errors
/// The packages cannot be fetched or unpacked (this needs root, or user namespaces).
pub fn prepare(cache: &Path) -> Result<PathBuf> {
    let root = unpacked(cache, PACKAGES, finish)?;
    let bench = root.join("bench");
    std::fs::create_dir_all(&bench)?;
    for (name, content) in FILES {
        std::fs::write(bench.join(name), content).with_context(|| format!("writing {name}"))?;
    }
    std::fs::write(bench.join("big.c"), source::program(LINES))?;
    std::fs::write(bench.join("small.c"), source::program(SMALL_LINES))?;
    Ok(root)
}

/// The folder in `cache` with Debian's `packages` (names with commas) unpacked; `finish` has been at it once.
///
/// # Errors
/// As [`prepare`].
pub fn unpacked(cache: &Path, packages: &str, finish: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let root = cache.join(SUITE);
    if !root.exists() {
        install("mmdebstrap", &["mmdebstrap"])?;
        eprintln!("xtask: unpacking Debian packages in {}", root.display());
        let partial = cache.join(format!(".{SUITE}.{}", std::process::id()));
        unpack(&partial, packages)?;
        finish(&partial)?;
        std::fs::rename(&partial, &root).with_context(|| format!("putting {} in place", root.display()))?;
    }
    Ok(root)
}

fn unpack(to: &Path, packages: &str) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=extract", &format!("--include={packages}")]);
    command.arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr");
    for path in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    assets::run(command.arg(SUITE).arg(to)).context("unpacking Debian packages")
}

/// What installing these packages would do, and a key for openssl.
fn finish(to: &Path) -> Result<()> {
    let bench = to.join("bench");
    std::fs::create_dir_all(&bench)?;
    let key = bench.join("key.pem");
    let inside = |arguments: &[&str]| assets::run(in_root(to, arguments).env("LC_ALL", "C"));
    // Installing python3 would do this. Not by time stamps, which an initramfs does not keep.
    inside(&["python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/usr/lib/python3.11"])?;
    inside(&["openssl", "genrsa", "-out", "/bench/key.pem", "2048"])?;
    ensure!(key.exists(), "openssl made no key");
    Ok(())
}

/// A command in the root file system, on this host: with a /tmp in memory, as the guest has, and this host's /dev.
pub fn in_root(root: &Path, arguments: &[&str]) -> Command {
    const ENTER: &str = "root=$1; shift
        mount -t tmpfs tmpfs $root/tmp && mount --rbind /dev $root/dev && exec chroot $root \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", ENTER, "sh"]).arg(root).args(arguments);
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// An initramfs of `root`, whose init mounts what programs need, runs `script` and then powers off.
///
/// # Errors
/// A file cannot be read.
pub fn initramfs(root: &Path, script: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.program("bin/busybox", &std::fs::read(assets::busybox()?)?).link("bin/sh", "busybox");
    archive.program("init", format!("{INIT}{script}\n/bin/busybox poweroff -f\n").as_bytes());
    add(&mut archive, root, "")?;
    Ok(archive.finish())
}

/// The kernel's parameters that it does not know itself become init's environment.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
";

/// Runs the driver.
pub const DRIVE: &str = "eval \"set -- $programs\"\n/usr/bin/python3 /bench/drive.py \"$@\"";

/// Adds the files of a folder. Where the archive has a folder of that name, Linux keeps that.
fn add(archive: &mut Archive, folder: &Path, prefix: &str) -> Result<()> {
    let mut entries: Vec<_> = std::fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type()?;
        if UNUSED.iter().any(|unused| name.contains(unused)) || name == "dev" || name == "tmp" || name == "bin" {
            continue;
        }
        if kind.is_dir() {
            archive.directory(&name);
            add(archive, &entry.path(), &format!("{name}/"))?;
        } else if kind.is_symlink() {
            archive.link(&name, &std::fs::read_link(entry.path())?.to_string_lossy());
        } else if kind.is_file() {
            let content = std::fs::read(entry.path()).with_context(|| format!("reading {name}"))?;
            archive.program(&name, &content);
        }
    }
    Ok(())
}
