//! What real guests are made of: a Linux kernel and a static busybox, from the host or from its
//! distribution's archive, and the benchmark program compiled from `bench/`.
//!
//! They are kept in `target/guests`, so that everything but the first run works offline.

use anyhow::{Context, Result, bail};
use sha2::Digest;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, Once, PoisonError};

const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// For PCs of all kinds; the cloud kernel has some of the architecture configured away, such as 16-bit segments.
const PC_KERNEL_PACKAGE: &str = "linux-image-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";
const MEMTEST_PACKAGE: &str = "memtest86+";

/// Files of one test process are called this, its id, and a name.
const SCRATCH: &str = "scratch-";

static PREPARING: Mutex<()> = Mutex::new(());

/// The repository's root folder.
pub fn root() -> PathBuf {
    // Cargo says at run time whose package it runs: clones that share a target directory share what was compiled.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let root = Path::new(&package).ancestors().find(|folder| folder.join("xtask").is_dir());
    root.expect("it runs a package of the repository").to_owned()
}

/// Where assets are kept.
pub fn folder() -> PathBuf {
    root().join("target/guests")
}

/// A kernel image: a readable one of the host's, else Debian's cloud kernel.
///
/// # Errors
/// When there is none and none can be fetched.
pub fn kernel() -> Result<PathBuf> {
    cached("vmlinuz", |to| {
        if let Some(found) = host_kernel() {
            std::fs::copy(&found, to).with_context(|| format!("copying {}", found.display()))?;
            return Ok(());
        }
        let unpacked = Archive::of_host().fetch_kernel(KERNEL_PACKAGE).with_context(|| instead("vmlinuz"))?;
        std::fs::copy(kernel_of(&unpacked)?, to)?;
        Ok(())
    })
}

/// Debian's kernel for PCs, which has more of the architecture configured than its cloud kernel.
///
/// # Errors
/// When it cannot be fetched.
pub fn pc_kernel() -> Result<PathBuf> {
    cached("vmlinuz-pc", |to| {
        let unpacked = Archive::of_host().fetch_kernel(PC_KERNEL_PACKAGE).with_context(|| instead("vmlinuz-pc"))?;
        std::fs::copy(kernel_of(&unpacked)?, to)?;
        // 400 MiB of modules.
        std::fs::remove_dir_all(unpacked)?;
        Ok(())
    })
}

/// Debian's 32-bit kernel of a `flavour`: `686` or `686-pae`.
///
/// # Errors
/// When it cannot be fetched.
pub fn kernel_32(flavour: &str) -> Result<PathBuf> {
    let name = format!("vmlinuz-{flavour}");
    cached(&name, |to| {
        let package = format!("linux-image-{flavour}");
        let unpacked = Archive::of("i386")?.fetch_kernel(&package).with_context(|| instead(&name))?;
        std::fs::copy(kernel_of(&unpacked)?, to)?;
        // Its modules are large, and nobody needs them.
        std::fs::remove_dir_all(unpacked)?;
        Ok(())
    })
}

/// What to do where kernel `name` cannot be fetched.
fn instead(name: &str) -> String {
    format!("no kernel for {name}; put one there", name = folder().join(name).display())
}

/// A statically linked 32-bit busybox.
///
/// # Errors
/// When it cannot be fetched.
pub fn busybox_32() -> Result<PathBuf> {
    cached("busybox-i386", |to| {
        let unpacked = Archive::of("i386")?.fetch(BUSYBOX_PACKAGE)?;
        std::fs::copy(busybox_of(&unpacked)?, to)?;
        std::fs::remove_dir_all(unpacked)?;
        Ok(())
    })
}

/// memtest86+ as a bzImage: `memtest86+x64.bin` or `memtest86+ia32.bin`.
///
/// # Errors
/// When it cannot be fetched.
pub fn memtest(file: &str) -> Result<PathBuf> {
    Ok(package(MEMTEST_PACKAGE)?.join("boot").join(file))
}

/// The unpacked package of the distribution's cloud kernel, with its modules.
///
/// # Errors
/// When it cannot be fetched.
pub fn kernel_tree() -> Result<PathBuf> {
    let _one = PREPARING.lock().unwrap_or_else(PoisonError::into_inner);
    let archive = Archive::of_host();
    let package = archive.kernel_package(KERNEL_PACKAGE)?;
    let tree = folder().join(&package);
    if tree.join("lib/modules").exists() && kernel_of(&tree).is_ok() { Ok(tree) } else { archive.fetch(&package) }
}

/// The kernel image in an unpacked package.
///
/// # Errors
/// When there is none.
pub fn kernel_of(tree: &Path) -> Result<PathBuf> {
    first_kernel(&tree.join("boot")).context("no vmlinuz in the kernel package")
}

/// A statically linked busybox.
///
/// # Errors
/// As for [`kernel`].
pub fn busybox() -> Result<PathBuf> {
    cached("busybox", |to| {
        let of_host = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(PathBuf::from);
        let found = match of_host.into_iter().find(|p| is_static(p)) {
            Some(path) => path,
            None => busybox_of(&Archive::of_host().fetch(BUSYBOX_PACKAGE)?)?,
        };
        std::fs::copy(found, to)?;
        Ok(())
    })
}

fn busybox_of(unpacked: &Path) -> Result<PathBuf> {
    let places = ["bin/busybox", "usr/bin/busybox"].map(|p| unpacked.join(p));
    places.into_iter().find(|p| p.exists()).context("no busybox in its package")
}

/// `tests/guests/program32.c`, compiled.
///
/// # Errors
/// When there is no C compiler.
pub fn program_32() -> Result<PathBuf> {
    // Without a C library, because most hosts have none for 32 bits.
    let bare = ["-m32", "-O1", "-msse2", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie", "-nostdlib"];
    compiled("program32", &bare)
}

/// `tests/guests/kexec.c`, compiled.
///
/// # Errors
/// When there is no C compiler.
pub fn kexec() -> Result<PathBuf> {
    compiled("kexec", &["-O2"])
}

/// `tests/guests/vsock.c`, compiled.
///
/// # Errors
/// When there is no C compiler.
pub fn vsock() -> Result<PathBuf> {
    compiled("vsock", &["-O2"])
}

/// A program of `tests/guests`, linked statically. Its name says what it was made of, and how.
fn compiled(name: &str, options: &[&str]) -> Result<PathBuf> {
    let source = root().join("tests/guests").join(format!("{name}.c"));
    let how = [options, &["-static"]].concat();
    let digest = sha2::Sha256::digest([std::fs::read(&source)?, how.join("\0").into_bytes()].concat());
    let made = format!("{name}-{:08x}", u32::from_be_bytes(digest[..4].try_into()?));
    cached(&made, |to| {
        let mut command = Command::new("gcc");
        command.args(&how).arg("-o").arg(to).arg(&source);
        run(&mut command).with_context(|| format!("compiling {name}.c (is gcc installed?)"))
    })
}

/// `bench/guestbench.c`, compiled and linked statically.
///
/// # Errors
/// When there is no C compiler.
pub fn guestbench() -> Result<PathBuf> {
    let source = root().join("bench/guestbench.c");
    cached("guestbench", |to| {
        let mut command = Command::new("gcc");
        command.args(["-O2", "-static", "-pthread", "-o"]).arg(to).arg(&source).arg("-lm");
        run(&mut command).context("compiling guestbench.c (is gcc installed?)")
    })
}

/// `bench/transfer.c`, compiled and linked statically.
///
/// # Errors
/// When there is no C compiler.
pub fn transfer() -> Result<PathBuf> {
    let source = root().join("bench/transfer.c");
    cached("transfer", |to| {
        let mut command = Command::new("gcc");
        command.args(["-O2", "-static", "-o"]).arg(to).arg(&source);
        run(&mut command).context("compiling transfer.c (is gcc installed?)")
    })
}

/// The asset called `name`, made by `make` at the path it is given unless it is there already.
fn cached(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let _one = PREPARING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = folder().join(name);
    if !path.exists() {
        std::fs::create_dir_all(folder())?;
        // Other processes may be at it too: the rename decides, and both results are good.
        let partial = folder().join(format!(".{name}.{}", std::process::id()));
        make(&partial)?;
        std::fs::rename(&partial, &path)?;
    }
    Ok(path)
}

fn host_kernel() -> Option<PathBuf> {
    first_kernel(Path::new("/boot")).filter(|p| std::fs::File::open(p).is_ok())
}

/// The newest `vmlinuz-*` of a folder, a cloud kernel by preference.
fn first_kernel(folder: &Path) -> Option<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(folder).ok()?.flatten().map(|e| e.path()).collect();
    found.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-")));
    found.sort_by_key(|p| (p.to_string_lossy().contains("cloud"), p.clone()));
    found.pop()
}

/// A distribution's archive, of the host's architecture or of another, without changing anything of the host's.
struct Archive {
    /// By apt's name; none for the host's.
    architecture: Option<String>,
    options: Vec<String>,
    /// Where its packages go: those of other architectures apart.
    place: PathBuf,
}

impl Archive {
    fn of_host() -> Archive {
        Archive { architecture: None, options: vec![], place: folder() }
    }

    /// For packages of `architecture`, by apt's name.
    fn of(architecture: &str) -> Result<Archive> {
        let place = folder().join(architecture);
        let (lists, cache) = (place.join("lists"), place.join("cache"));
        std::fs::create_dir_all(lists.join("partial"))?;
        std::fs::create_dir_all(cache.join("archives/partial"))?;
        let settings = [
            format!("APT::Architecture={architecture}"),
            format!("APT::Architectures::={architecture}"),
            format!("Dir::State::lists={}", lists.display()),
            format!("Dir::Cache={}", cache.display()),
            "Dir::State::status=/dev/null".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ];
        let options = settings.into_iter().flat_map(|s| ["-o".to_owned(), s]).collect();
        Ok(Archive { architecture: Some(architecture.to_owned()), options, place })
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }

    /// The versioned package that the meta-package `meta` of a kernel stands for.
    fn kernel_package(&self, meta: &str) -> Result<String> {
        let mut update = None;
        for attempt in 0..2 {
            let output = self.apt("apt-cache").args(["depends", meta]).output().context("running apt-cache")?;
            let text = String::from_utf8_lossy(&output.stdout);
            let depends = text.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
            if let Some(name) = depends.into_iter().find(|n| n.starts_with("linux-image-")) {
                return Ok(name.to_owned());
            }
            if attempt == 0 {
                // Package lists may be missing; the host's own are root's to fetch.
                update = run(self.apt("apt-get").arg("update")).err();
            }
        }
        let lists = match &self.architecture {
            None => "this host's package lists".to_owned(),
            Some(architecture) => format!("the package lists for {architecture} of this host's distribution"),
        };
        let why = update.map(|error| format!(", which could not be updated: {error:#}")).unwrap_or_default();
        bail!("{meta} is not in {lists}{why}")
    }

    /// Downloads and unpacks the kernel that `meta` stands for; the folder with it.
    fn fetch_kernel(&self, meta: &str) -> Result<PathBuf> {
        self.fetch(&self.kernel_package(meta)?)
    }

    /// Downloads a package and unpacks it; the folder with its contents.
    fn fetch(&self, package: &str) -> Result<PathBuf> {
        let to = self.place.join(package);
        std::fs::create_dir_all(&to)?;
        let download = || run(self.apt("apt-get").args(["download", package]).current_dir(&to));
        if download().is_err() {
            let _ = run(self.apt("apt-get").arg("update"));
            download().with_context(|| format!("downloading {package}"))?;
        }
        let archive = std::fs::read_dir(&to)?
            .flatten()
            .map(|e| e.path())
            .find(|p| p.extension().is_some_and(|e| e == "deb"))
            .with_context(|| format!("apt-get downloaded no {package}"))?;
        run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&to)).context("unpacking")?;
        std::fs::remove_file(archive)?;
        Ok(to)
    }
}

fn is_static(path: &Path) -> bool {
    // A dynamic executable names its loader in a PT_INTERP segment, within the first page.
    let Ok(bytes) = std::fs::read(path) else { return false };
    bytes.starts_with(b"\x7fELF") && !bytes[..bytes.len().min(4096)].windows(8).any(|w| w == b"/ld-linu")
}

/// Runs a command, quietly unless it fails.
///
/// # Errors
/// When it cannot be started, or fails; with what it said.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("starting {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}: {}", command.get_program().to_string_lossy(), output.status, said.trim());
    }
    Ok(())
}

/// The modules called `names` of [`kernel`], as `NAME.ko`, without those that are built in.
///
/// # Errors
/// A module is there, but cannot be read or unpacked.
pub fn modules(names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let version = kernel_version(&std::fs::read(kernel()?)?).context("the kernel's version")?;
    let fetched = std::fs::read_dir(folder())?.flatten().map(|e| e.path().join("lib/modules").join(&version));
    let mut roots = fetched.chain([Path::new("/lib/modules").join(&version)]);
    let Some(root) = roots.find(|root| root.is_dir()) else { return Ok(vec![]) };
    let mut found = vec![];
    collect_modules(&root, names, &mut found)?;
    Ok(found)
}

/// The version in a bzImage's header (Linux Documentation/arch/x86/boot.rst, `kernel_version`).
fn kernel_version(image: &[u8]) -> Option<String> {
    let offset = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
    let text = image.get(usize::from(offset) + 0x200..)?;
    let end = text.iter().position(|byte| *byte == b' ' || *byte == 0)?;
    String::from_utf8(text[..end].to_vec()).ok()
}

fn collect_modules(folder: &Path, names: &[&str], found: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    for entry in std::fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect_modules(&path, names, found)?;
            continue;
        }
        let file = entry.file_name().to_string_lossy().into_owned();
        let Some((name, kind)) = file.split_once(".ko") else { continue };
        if !names.contains(&name) {
            continue;
        }
        let content = match kind {
            "" => std::fs::read(&path)?,
            ".xz" => unpacked("xz", &path)?,
            ".zst" => unpacked("zstd", &path)?,
            _ => bail!("{} is packed in an unknown way", path.display()),
        };
        found.push((format!("{name}.ko"), content));
    }
    Ok(())
}

fn unpacked(program: &str, path: &Path) -> Result<Vec<u8>> {
    let output = Command::new(program).arg("-dc").arg(path).output().with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        bail!("{program} cannot unpack {}", path.display());
    }
    Ok(output.stdout)
}

/// An initramfs in which busybox's shell runs `script` as init.
///
/// # Errors
/// As for [`busybox`].
pub fn initramfs(script: &str) -> Result<Vec<u8>> {
    initramfs_with(script, &[])
}

/// As [`initramfs`], with more files, executable, by path, and the folders that they are in.
///
/// # Errors
/// As for [`busybox`].
pub fn initramfs_with(script: &str, files: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    Ok(initramfs_of(&std::fs::read(busybox()?)?, script, files))
}

/// The same with this `busybox`.
pub fn initramfs_of(busybox: &[u8], script: &str, files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = anyvisor_initramfs::Archive::new();
    archive.program("bin/busybox", busybox);
    let mut folders = BTreeSet::new();
    for (name, content) in files {
        let above = Path::new(name).ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty());
        let mut above: Vec<_> = above.map(|folder| folder.display().to_string()).collect();
        above.reverse();
        for folder in above.into_iter().filter(|folder| folders.insert(folder.clone())) {
            archive.directory(&folder);
        }
        archive.program(name, content);
    }
    archive.program("init", format!("#!/bin/busybox sh\n{PRELUDE}\n{script}\n").as_bytes());
    archive.finish()
}

/// Mounts and applets that every script has.
const PRELUDE: &str = "export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp";

/// Removes what processes that have ended left behind.
fn sweep() {
    for entry in std::fs::read_dir(folder()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(SCRATCH).and_then(|n| n.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// A folder of the caller's own in the assets folder, removed with the value.
///
/// # Panics
/// It cannot be made.
pub fn scratch_folder() -> tempfile::TempDir {
    std::fs::create_dir_all(folder()).expect("a folder for assets");
    tempfile::tempdir_in(folder()).expect("a folder for temporary files")
}

/// Writes `bytes` to a file of this process in the assets folder.
///
/// # Errors
/// When the file cannot be written.
pub fn scratch(name: &str, bytes: &[u8]) -> Result<PathBuf> {
    std::fs::create_dir_all(folder())?;
    static SWEPT: Once = Once::new();
    SWEPT.call_once(sweep);
    let path = folder().join(format!("{SCRATCH}{}-{name}", std::process::id()));
    std::fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
    Ok(path)
}

/// The folder with the unpacked contents of a package of the distribution.
///
/// # Errors
/// When it cannot be fetched.
pub fn package(name: &str) -> Result<PathBuf> {
    let _one = PREPARING.lock().unwrap_or_else(PoisonError::into_inner);
    let tree = folder().join(name);
    if tree.join("usr").exists() { Ok(tree) } else { Archive::of_host().fetch(name) }
}
