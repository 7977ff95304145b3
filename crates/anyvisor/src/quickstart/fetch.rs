//! Gets a kernel and a static busybox: from this host if it has them, else from its Debian or Ubuntu
//! archive through apt, without root and without changing anything but the cache folder.
//!
//! What was fetched stays in the cache under a fixed name, put there by a rename, so that whoever finds the
//! name finds a whole file. With both names there, no network is needed.

use super::progress;
use anyvisor_vmm::{Error, Result, boot};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Kernel packages to try, in this order: Debian's for clouds, Ubuntu's for VMs, Debian's general one.
const KERNEL_PACKAGES: [&str; 3] = ["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"];

/// What a kernel needs built in, to boot here without modules.
const KERNEL_OPTIONS: [&str; 5] =
    ["CONFIG_SERIAL_8250_CONSOLE", "CONFIG_BLK_DEV_INITRD", "CONFIG_DEVTMPFS", "CONFIG_BINFMT_SCRIPT", "CONFIG_TMPFS"];

/// What is kept of a kernel's modules: what a guest needs to have this host's files, and a network.
const KEPT_MODULES: [&str; 11] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "fuse",
    "virtiofs",
    "overlay",
    "failover",
    "net_failover",
    "virtio_net",
];

const WITHOUT_APT: &str = "give your own with: anyvisor run --kernel FILE --initrd FILE";

/// A folder of this program's in the user's cache.
pub struct Cache {
    folder: PathBuf,
    /// Say what is fetched, and not what is found.
    quiet: bool,
}

impl Cache {
    /// `$XDG_CACHE_HOME/anyvisor`, or `~/.cache/anyvisor`.
    pub fn open(quiet: bool) -> Result<Cache> {
        let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
        let Some(base) = base else {
            return Err(Error::user("no folder to keep a kernel in; set HOME or XDG_CACHE_HOME"));
        };
        let path = base.join("anyvisor");
        fs::create_dir_all(&path).map_err(|e| cannot_write(&path, e))?;
        Ok(Cache { folder: path, quiet })
    }

    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Writes a file under `name`, all of it or nothing.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let work = WorkFolder::new(self)?;
        let temporary = work.0.join(name);
        fs::write(&temporary, bytes).map_err(|e| cannot_write(&temporary, e))?;
        self.keep(&temporary, name)
    }

    fn keep(&self, file: &Path, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::rename(file, &path).map_err(|e| cannot_write(&path, e))?;
        Ok(path)
    }

    fn found(&self, what: &str, path: &Path) {
        if !self.quiet {
            progress(&format!("{what}{}", path.display()));
        }
    }

    fn find(&self, name: &str) -> Option<PathBuf> {
        Some(self.folder.join(name)).filter(|path| path.is_file())
    }
}

/// A folder for half-done things, gone with the value.
struct WorkFolder(PathBuf);

impl WorkFolder {
    fn new(cache: &Cache) -> Result<WorkFolder> {
        let path = cache.folder.join(format!("work-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|e| cannot_write(&path, e))?;
        Ok(WorkFolder(path))
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A kernel's path: the newest of /boot that will do, or one from the cache or the archive.
pub fn kernel(cache: &Cache) -> Result<PathBuf> {
    if let Some(path) = host_kernel(Path::new("/boot")) {
        cache.found("kernel: this host's ", &path);
        return Ok(path);
    }
    if let Some(path) = cache.find("vmlinuz").filter(|path| boot::check_kernel(path).is_ok()) {
        cache.found("kernel: ", &path);
        return Ok(path);
    }
    fetch_kernel(cache)
}

/// Fetches a kernel and those of its modules that [`crate::exec`] may want.
fn fetch_kernel(cache: &Cache) -> Result<PathBuf> {
    let apt = Apt::new(cache)?;
    let package = KERNEL_PACKAGES.iter().find_map(|meta| apt.kernel_behind(meta)).ok_or_else(|| {
        Error::user(format!(
            "apt knows no kernel package (tried {}); check its sources, or {WITHOUT_APT}",
            KERNEL_PACKAGES.join(", ")
        ))
    })?;
    let work = WorkFolder::new(cache)?;
    let modules = KEPT_MODULES.iter().map(|name| format!("*lib/modules/*/{name}.ko*"));
    let wanted: Vec<String> = ["boot/vmlinuz-*".into()].into_iter().chain(modules).collect();
    let tree = apt.unpack(&package, &wanted, &work)?;
    let file =
        only_file(&tree, |path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
            .ok_or_else(|| Error::user(format!("{package} has no kernel; {WITHOUT_APT}")))?;
    boot::check_kernel(&file)?;
    if let Some(version) = version(&file) {
        let folder = cache.folder.join(format!("modules-{version}"));
        let whole = work.0.join("modules");
        fs::create_dir_all(&whole).map_err(|e| cannot_write(&whole, e))?;
        for name in KEPT_MODULES {
            let file_of = |path: &Path| {
                path.file_name().and_then(|file| file.to_string_lossy().split_once(".ko").map(|(of, _)| of == name))
                    == Some(true)
            };
            if let Some(module) = only_file(&tree, file_of) {
                let to = whole.join(module.file_name().expect("a file has a name"));
                fs::rename(&module, &to).map_err(|e| cannot_write(&to, e))?;
            }
        }
        // Whoever finds the name finds them all. Another process may have put the same there.
        if let Err(error) = fs::rename(&whole, &folder)
            && !folder.is_dir()
        {
            return Err(cannot_write(&folder, error));
        }
    }
    cache.keep(&file, "vmlinuz")
}

/// The folder with the modules of a kernel that [`kernel`] has found, if its version has any: the host's own, or those kept
/// with it.
pub fn modules(cache: &Cache, kernel: &Path) -> Result<Option<PathBuf>> {
    let find = || {
        let version = version(kernel)?;
        let places = [cache.folder.join(format!("modules-{version}")), Path::new("/lib/modules").join(&version)];
        places.into_iter().find(|place| place.is_dir())
    };
    // A cache that an earlier version has made holds the kernel alone. What is fetched may be a newer one.
    if find().is_none() && kernel.starts_with(&cache.folder) {
        fetch_kernel(cache)?;
    }
    Ok(find())
}

/// The version in a bzImage's header (Linux Documentation/arch/x86/boot.rst, `kernel_version`).
pub fn version(kernel: &Path) -> Option<String> {
    let image = fs::read(kernel).ok()?;
    let offset = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
    let text = image.get(usize::from(offset) + 0x200..)?;
    let end = text.iter().position(|byte| *byte == b' ' || *byte == 0)?;
    let version = String::from_utf8(text[..end].to_vec()).ok()?;
    // It becomes a folder's name.
    Some(version).filter(|version| !version.is_empty() && !version.contains('/'))
}

/// A static busybox's path.
pub fn busybox(cache: &Cache) -> Result<PathBuf> {
    let host = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    if let Some(path) = host.into_iter().chain(cache.find("busybox")).find(|path| is_static(path)) {
        cache.found("busybox: ", &path);
        return Ok(path);
    }
    let work = WorkFolder::new(cache)?;
    let file = Apt::new(cache)?.fetch("busybox-static", "*bin/busybox", &work)?;
    if !is_static(&file) {
        return Err(Error::user(format!("the archive's busybox-static is not static; {WITHOUT_APT}")));
    }
    cache.keep(&file, "busybox")
}

/// The newest readable kernel in `folder` that boots here, judged by its configuration beside it.
fn host_kernel(folder: &Path) -> Option<PathBuf> {
    let mut versions: Vec<String> = fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.strip_prefix("vmlinuz-").map(str::to_owned))
        .collect();
    versions.sort_by_key(|version| std::cmp::Reverse(version_key(version)));
    versions.into_iter().find_map(|version| {
        let kernel = folder.join(format!("vmlinuz-{version}"));
        let config = fs::read_to_string(folder.join(format!("config-{version}"))).ok()?;
        let has = |option: &&str| config.lines().any(|line| line.strip_prefix(*option) == Some("=y"));
        (KERNEL_OPTIONS.iter().all(has) && boot::check_kernel(&kernel).is_ok()).then_some(kernel)
    })
}

/// The numbers in a version, for comparing 6.9 with 6.10.
fn version_key(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Whether `path` is an x86-64 program that needs no interpreter, so that it runs without libraries.
fn is_static(path: &Path) -> bool {
    fs::read(path).is_ok_and(|bytes| is_static_elf(&bytes).unwrap_or(false))
}

fn is_static_elf(elf: &[u8]) -> Option<bool> {
    const EM_X86_64: u16 = 62;
    const PT_INTERP: u32 = 3;
    let number = |at: usize, size: usize| {
        let bytes = elf.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    if elf.get(..5)? != b"\x7fELF\x02" || number(18, 2)? != u64::from(EM_X86_64) {
        return Some(false);
    }
    let (start, size, count) = (number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize);
    for i in 0..count {
        if number(start.checked_add(i * size)?, 4)? == u64::from(PT_INTERP) {
            return Some(false);
        }
    }
    Some(true)
}

/// The host's apt, with package lists of its own where the host's are missing.
struct Apt {
    /// Options that put all state into the cache folder; empty if the host's lists will do.
    options: Vec<String>,
}

impl Apt {
    fn new(cache: &Cache) -> Result<Apt> {
        for tool in ["apt-get", "apt-cache", "dpkg-deb", "tar"] {
            let found = std::env::var_os("PATH")
                .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()));
            if !found {
                return Err(Error::user(format!(
                    "this host has no {tool} to get a kernel and busybox with; {WITHOUT_APT}"
                )));
            }
        }
        let host = Apt { options: vec![] };
        if host.knows("busybox-static") && KERNEL_PACKAGES.iter().any(|package| host.knows(package)) {
            return Ok(host);
        }
        let private = Apt::private(&cache.folder.join("apt"))?;
        if !private.knows("busybox-static") {
            progress("fetching package lists (apt-get update, into the cache folder)");
            let update = ["-o", "APT::Update::Error-Mode=any", "update"];
            run(private.command("apt-get").args(update), "fetch package lists")?;
        }
        Ok(private)
    }

    /// State below `folder`; only the sources and keys are the host's.
    fn private(folder: &Path) -> Result<Apt> {
        for part in ["lists/partial", "cache/archives/partial", "log"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(|e| cannot_write(&path, e))?;
        }
        let at = |part: &str| folder.join(part).display().to_string();
        let options = vec![
            format!("Dir::State={}", at("")),
            format!("Dir::State::lists={}", at("lists")),
            "Dir::State::status=/var/lib/dpkg/status".into(),
            format!("Dir::Cache={}", at("cache")),
            format!("Dir::Log={}", at("log")),
        ];
        Ok(Apt { options })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").stdin(Stdio::null());
        // As root apt would drop to a user who cannot write to the cache folder.
        for option in self.options.iter().map(String::as_str).chain(["APT::Sandbox::User=root"]) {
            command.args(["-o", option]);
        }
        command
    }

    /// Whether apt could download `package`. (`apt-cache show` also shows what is merely installed.)
    fn knows(&self, package: &str) -> bool {
        let output = self.command("apt-get").args(["download", "--print-uris", package]).output();
        output.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
    }

    /// The package with the kernel's files that meta package `meta` stands for, if apt knows it.
    fn kernel_behind(&self, meta: &str) -> Option<String> {
        let output = self.command("apt-cache").args(["depends", "--important", meta]).output().ok()?;
        first_image(&String::from_utf8_lossy(&output.stdout))
    }

    /// Downloads `package` and takes the one file that matches `pattern` out of it.
    fn fetch(&self, package: &str, pattern: &str, work: &WorkFolder) -> Result<PathBuf> {
        let tree = self.unpack(package, &[pattern.into()], work)?;
        only_file(&tree, |_| true).ok_or_else(|| Error::user(format!("{package} has no {pattern}; {WITHOUT_APT}")))
    }

    /// Downloads `package` and takes the files out of it that match one of `patterns`, into a folder.
    fn unpack(&self, package: &str, patterns: &[String], work: &WorkFolder) -> Result<PathBuf> {
        progress(&format!("fetching {package}"));
        run(self.command("apt-get").args(["download", package]).current_dir(&work.0), &format!("download {package}"))?;
        let deb = only_file(&work.0, |path| path.extension().is_some_and(|e| e == "deb"))
            .ok_or_else(|| Error::user(format!("apt-get download {package} left no package; try again")))?;
        let tree = work.0.join("tree");
        fs::create_dir_all(&tree).map_err(|e| cannot_write(&tree, e))?;
        let what = format!("unpack {package}");
        let failed = |e: std::io::Error| Error::host(format!("cannot {what}"), e);
        let mut unpack =
            Command::new("dpkg-deb").arg("--fsys-tarfile").arg(&deb).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let stream = unpack.stdout.take().expect("stdout is piped");
        let mut tar = Command::new("tar");
        tar.args(["-x", "--no-same-owner", "--wildcards", "-C"]).arg(&tree);
        tar.args(patterns.iter().map(|pattern| format!("./{pattern}"))).stdin(stream);
        let unpacked = run(&mut tar, &what);
        // tar reads to the end, so this ends too.
        unpack.wait().map_err(failed)?;
        match unpacked {
            // A pattern that nothing matches is no reason to have none of the others.
            Err(error) if patterns.len() == 1 || only_file(&tree, |_| true).is_none() => Err(error),
            _ => Ok(tree),
        }
    }
}

/// The first dependency on a kernel image in the output of `apt-cache depends`.
fn first_image(depends: &str) -> Option<String> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| {
            name.strip_prefix("linux-image-").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
        .map(str::to_owned)
}

/// The first regular file below `folder` that is `wanted`.
fn only_file(folder: &Path, wanted: impl Fn(&Path) -> bool + Copy) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()) {
        let kind = entry.file_type().ok()?;
        let path = entry.path();
        let found =
            if kind.is_dir() { only_file(&path, wanted) } else { Some(path).filter(|p| kind.is_file() && wanted(p)) };
        if found.is_some() {
            return found;
        }
    }
    None
}

/// Runs a command to its end; its last line of complaint is the error.
fn run(command: &mut Command, what: &str) -> Result<()> {
    let output = command.output().map_err(|e| Error::host(format!("cannot {what}"), e))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let last = complaint.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no reason given").trim();
    Err(Error::user(format!("cannot {what} ({last}); check the network and apt's sources, or {WITHOUT_APT}")))
}

fn cannot_write(path: &Path, error: std::io::Error) -> Error {
    Error::user(format!("cannot write '{}': {error}; set XDG_CACHE_HOME to a folder you can write to", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_behind_a_meta_package() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-base\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(first_image(depends).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(first_image("linux-image-x\n  Depends: <linux-image-any>\n"), None);
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(version_key("6.10.0-1-amd64") > version_key("6.9.12-3-amd64"));
        assert!(version_key("6.1.0-56-cloud-amd64") > version_key("6.1.0-9-cloud-amd64"));
    }

    #[test]
    fn static_programs_have_no_interpreter() {
        let mut elf = vec![0; 64 + 56];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        (elf[18], elf[32], elf[54], elf[56]) = (62, 64, 56, 1);
        assert_eq!(is_static_elf(&elf), Some(true));
        elf[64] = 3;
        assert_eq!(is_static_elf(&elf), Some(false));
        for length in 0..elf.len() - 56 {
            assert_ne!(is_static_elf(&elf[..length]), Some(true));
        }
        assert!(!is_static(Path::new("/nonexistent")));
        // This test itself is dynamically linked.
        assert!(!is_static(&std::env::current_exe().unwrap()));
    }
}
