//! The disk: made by mmdebstrap, once, without being root where the host lets users have user namespaces.
//!
//! A machine is a folder: the image, its kernel and initramfs (which are on the disk too, and are copies for starting them
//! without a boot loader), the key for ssh, the machine's own public key, and what it was made of. It is made under another
//! name and gets its own by a rename, so that whoever finds the name finds it whole.
//!
//! mmdebstrap unpacks and installs the packages in a folder and then runs hooks, in its user namespace if it has one:
//! `configure.sh` makes the system a machine of ours, `image.sh` a file system of the folder (`mke2fs -d`), so that all
//! files belong to whom they should. The hooks can open none of the user's files, so they inherit the image's descriptor.

use super::sources;
use crate::quickstart::progress;
use crate::signals;
use anyvisor_vmm::config::show_size;
use anyvisor_vmm::{Error, Result};
use rustix::io::FdFlags;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Files of a machine's folder.
pub const DISK: &str = "disk.img";
pub const KERNEL: &str = "vmlinuz";
pub const INITRD: &str = "initrd.img";
pub const KEY: &str = "id_ed25519";
pub const KNOWN_HOSTS: &str = "known_hosts";
const MADE: &str = "made";

/// Bytes of a disk, and the least: what is installed takes half a gigabyte.
const SIZE: u64 = 8 << 30;
const SIZE_MIN: u64 = 1 << 30;

/// What the disk has besides required packages.
const PACKAGES: [&str; 14] = [
    "ca-certificates",
    "dbus",
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "less",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "openssh-server",
    "procps",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
];

/// Programs that are needed, the packages they come in, and whether root needs them too.
const TOOLS: [(&str, &str, bool); 3] =
    [("mmdebstrap", "mmdebstrap", true), ("mke2fs", "e2fsprogs", true), ("newuidmap", "uidmap", false)];

/// Descriptors from here are free in mmdebstrap, whose own must be small: its shell knows but one digit.
const DESCRIPTOR: i32 = 100;
/// Folders of programs for administration, which are not in everybody's path.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin";
/// Lines that are kept of what mmdebstrap says.
const KEPT: usize = 200;

/// What a disk is to be made of, as far as it was said.
#[derive(Debug, Default)]
pub struct Wish {
    pub suite: Option<String>,
    pub size: Option<u64>,
    pub include: Option<String>,
}

/// What a disk was made of.
#[derive(Debug, PartialEq, Eq)]
struct Made {
    suite: String,
    size: u64,
    /// Packages, with commas.
    include: String,
}

/// Makes the machine in `folder`, if it is not there or `fresh` wants another.
///
/// # Errors
/// It cannot be made, is in use, or was made otherwise than `wish` says.
pub fn prepare(folder: &Path, wish: &Wish, fresh: bool, verbose: bool) -> Result<()> {
    let shown = folder.display();
    if folder.join(MADE).exists() {
        check_unused(folder)?;
        if !fresh {
            let made = found(folder)?;
            progress(&format!("disk: '{}' (Debian {})", folder.join(DISK).display(), made.suite));
            return made.check(wish, folder);
        }
    } else if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::user(format!(
            "folder '{shown}' has other things in it; give --folder one that is not there"
        )));
    }
    let made = Made {
        suite: wish.suite.clone().unwrap_or_else(|| sources::host_suite().unwrap_or("bookworm".into())),
        size: wish.size.unwrap_or(SIZE),
        include: wish.include.clone().unwrap_or_default(),
    };
    if made.size < SIZE_MIN {
        return Err(Error::user(format!("a disk of {} is too small; give --size 1G or more", show_size(made.size))));
    }
    let work = Work::new(folder)?;
    make(&work.0, &made, verbose)?;
    let old = work.0.with_extension("old");
    let replaces = fresh && fs::rename(folder, &old).is_ok();
    match fs::rename(&work.0, folder) {
        Ok(()) => {}
        // Another process has made one meanwhile.
        Err(_) if folder.join(MADE).exists() => {}
        Err(e) => {
            if replaces {
                let _ = fs::rename(&old, folder);
            }
            return Err(cannot_write(folder, &e));
        }
    }
    let _ = fs::remove_dir_all(&old);
    progress(&format!("disk: '{}', {} at most", folder.join(DISK).display(), show_size(made.size)));
    Ok(())
}

/// What the machine in `folder` was made of.
fn found(folder: &Path) -> Result<Made> {
    let path = folder.join(MADE);
    let made = fs::read_to_string(&path).ok().and_then(|text| Made::parse(&text));
    let broken =
        || Error::user(format!("'{}' is not as it was written; give --fresh or another --folder", path.display()));
    made.ok_or_else(broken)
}

fn check_unused(folder: &Path) -> Result<()> {
    let path = folder.join(DISK);
    let disk =
        File::open(&path).map_err(|e| Error::user(format!("cannot read '{}': {e}; give --fresh", path.display())))?;
    // Whoever runs it has it locked.
    disk.try_lock_shared().map_err(|_| {
        let shown = path.display();
        Error::user(format!("disk '{shown}' is in use by another VM; end that, or give --folder for one more"))
    })
}

impl Made {
    fn parse(text: &str) -> Option<Made> {
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        Some(Made {
            suite: value("suite")?.into(),
            size: value("size")?.parse().ok()?,
            include: value("include")?.into(),
        })
    }

    fn text(&self) -> String {
        format!("suite={}\nsize={}\ninclude={}\n", self.suite, self.size, self.include)
    }

    /// Complains of a wish that was not heeded.
    fn check(&self, wish: &Wish, folder: &Path) -> Result<()> {
        let size = wish.size.map(show_size);
        let said = |text: &str| if text.is_empty() { "none".to_owned() } else { text.to_owned() };
        for (option, wanted, is) in [
            ("suite", &wish.suite, &self.suite),
            ("size", &size, &show_size(self.size)),
            ("include", &wish.include, &self.include),
        ] {
            if let Some(wanted) = wanted.as_ref().filter(|wanted| *wanted != is) {
                return Err(Error::user(format!(
                    "the disk in '{}' was made with --{option} {}, not {wanted}; give --fresh to make it anew, which loses \
                     what was changed on it, or another --folder",
                    folder.display(),
                    said(is)
                )));
            }
        }
        Ok(())
    }
}

/// The folder in which a machine is made; removed with the value, unless it was renamed.
struct Work(PathBuf);

impl Work {
    /// Beside `folder`. What processes that have ended left behind is removed.
    fn new(folder: &Path) -> Result<Work> {
        let parent = folder.parent().unwrap_or(Path::new("/"));
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        fs::create_dir_all(parent).map_err(|e| cannot_write(parent, &e))?;
        let prefix = format!(".{name}-");
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let left = entry.file_name().to_string_lossy().strip_prefix(&prefix).map(str::to_owned);
            let process = left.map(|left| left.trim_end_matches(".old").to_owned());
            if process.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let path = parent.join(format!("{prefix}{}", std::process::id()));
        // The image is open to everybody while it is made, but nobody else can come to it.
        DirBuilder::new().mode(0o700).create(&path).map_err(|e| cannot_write(&path, &e))?;
        Ok(Work(path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes the machine in `work`.
fn make(work: &Path, made: &Made, verbose: bool) -> Result<()> {
    let keys = check_host()?;
    progress(&format!("making a disk with Debian {} (once; takes a minute or two)", made.suite));
    let disk = work.join(DISK);
    let image = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&disk)
        .and_then(|image| image.set_permissions(Permissions::from_mode(0o666)).map(|()| image))
        .map_err(|e| cannot_write(&disk, &e))?;
    let image = inheritable(&image)?;
    let mut command = mmdebstrap(work, made, keys, &image)?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0).spawn();
    watch(child.map_err(|e| Error::host("cannot start mmdebstrap", e))?, verbose)?;
    drop(image);
    for (name, mode) in [(DISK, 0o600), (KEY, 0o600), (KERNEL, 0o644), (INITRD, 0o644), (KNOWN_HOSTS, 0o644)] {
        let path = work.join(name);
        let trouble = |e| Error::host(format!("mmdebstrap left no usable '{}'", path.display()), e);
        fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(trouble)?;
    }
    let path = work.join(MADE);
    fs::write(&path, made.text()).map_err(|e| cannot_write(&path, &e))
}

/// Finds what is needed; the file with Debian's keys.
fn check_host() -> Result<&'static str> {
    let root = rustix::process::geteuid().is_root();
    let path = search_path();
    for (tool, package, _) in TOOLS.into_iter().filter(|(_, _, by_root)| *by_root || !root) {
        if !std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()) {
            return Err(Error::user(format!(
                "this host has no {tool} to make a disk with; install it: apt-get install {package}"
            )));
        }
    }
    sources::keys().ok_or_else(|| {
        let hint = "install them: apt-get install debian-archive-keyring";
        Error::user(format!("this host has no keys of Debian's to check its packages with; {hint}"))
    })
}

fn search_path() -> String {
    format!("{}:{SBIN}", std::env::var("PATH").unwrap_or_default())
}

/// A descriptor of the file that programs started from now on have too.
fn inheritable(file: &File) -> Result<OwnedFd> {
    let trouble = |e: rustix::io::Errno| Error::host("cannot hand the disk to mmdebstrap", e.into());
    let descriptor = rustix::io::fcntl_dupfd_cloexec(file, DESCRIPTOR).map_err(trouble)?;
    rustix::io::fcntl_setfd(&descriptor, FdFlags::empty()).map_err(trouble)?;
    Ok(descriptor)
}

fn mmdebstrap(work: &Path, made: &Made, keys: &str, image: &OwnedFd) -> Result<Command> {
    let root = rustix::process::geteuid().is_root();
    let mode = if root { "root" } else { "unshare" };
    let proxy = sources::proxy();
    let mut command = Command::new("mmdebstrap");
    if root && Command::new("unshare").args(["--mount", "true"]).output().is_ok_and(|output| output.status.success()) {
        // Else what root's mmdebstrap mounts stays mounted if it is killed.
        command = Command::new("unshare");
        command.args(["--mount", "mmdebstrap"]);
    }
    command.env("LC_ALL", "C").env("PATH", search_path());
    if std::env::var_os("TMPDIR").is_none() {
        // It unpacks there, and /tmp may be in memory.
        command.env("TMPDIR", "/var/tmp");
    }
    command.env("anyvisor_configure", include_str!("configure.sh"));
    command.env("anyvisor_check", include_str!("check.sh"));
    command.env("anyvisor_image", include_str!("image.sh"));
    command.env("anyvisor_apt", proxy.as_deref().map(sources::guest_settings).unwrap_or_default());
    command.env("anyvisor_disk", format!("/proc/self/fd/{}", image.as_raw_fd()));
    command.env("anyvisor_size", format!("{}k", made.size >> 10));
    if let Some(proxy) = proxy {
        command.env("http_proxy", proxy);
    }
    command.args([format!("--mode={mode}"), "--variant=minbase".into()]);
    // `image.sh` does that.
    command.arg("--skip=cleanup/mmdebstrap");
    command.arg(format!("--include={}", PACKAGES.join(",")));
    if !made.include.is_empty() {
        command.arg(format!("--include={}", made.include));
    }
    command.arg("--customize-hook=sh -c \"$anyvisor_configure\" configure \"$1\"");
    for (from, to) in
        [("/vmlinuz", KERNEL), ("/initrd.img", INITRD), ("/run/key", KEY), ("/run/known_hosts", KNOWN_HOSTS)]
    {
        let to = work.join(to);
        let to = to.to_str().ok_or_else(|| {
            Error::user(format!("folder '{}' has a name that mmdebstrap cannot take; give --folder", work.display()))
        })?;
        command.arg(format!("--customize-hook=download {from} {}", quoted(to)));
    }
    command.arg("--customize-hook=sh -c \"$anyvisor_image\" image \"$1\"");
    command.args(["--", &made.suite, "/dev/null"]).args(sources::lines(&made.suite, keys));
    Ok(command)
}

/// As one word of a shell's.
pub fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Tells how far mmdebstrap is, until it ends.
fn watch(mut child: Child, verbose: bool) -> Result<()> {
    let stream = child.stderr.take().expect("stderr is piped");
    let reader = std::thread::Builder::new().name("mmdebstrap".into()).spawn(move || relay(stream, verbose));
    let reader = reader.map_err(|e| Error::host("cannot start a thread for mmdebstrap's messages", e))?;
    let status = signals::wait_for(&mut child)?;
    let said = reader.join().expect("it does not panic");
    match status {
        Some(status) if status.success() => Ok(()),
        Some(_) => Err(Error::user(format!("mmdebstrap made no disk: {}", complaint(&said)))),
        None => Err(Error::host("no disk was made", std::io::ErrorKind::Interrupted.into())),
    }
}

/// Shows what mmdebstrap does; its last lines.
fn relay(stream: impl Read, verbose: bool) -> Vec<String> {
    let mut said: Vec<String> = vec![];
    for line in BufReader::new(stream).split(b'\n').map_while(std::result::Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if verbose {
            eprintln!("{line}");
        } else if let Some(stage) = line.strip_prefix("I: ").and_then(|line| line.strip_suffix("...")) {
            progress(&format!("making the disk: {stage}"));
        }
        if said.len() == KEPT {
            said.remove(0);
        }
        said.push(line);
    }
    said
}

/// What went wrong, and what can be done, from mmdebstrap's lines.
fn complaint(said: &[String]) -> String {
    let is_complaint = |line: &&String| line.starts_with("E: ") || line.starts_with("mke2fs: ");
    let at = said.iter().position(|line| is_complaint(&line)).unwrap_or(said.len());
    let of_hook = said.get(at).is_some_and(|line| line.contains("command failed"));
    let earlier = || said[..at].iter().rev().find(|line| !line.starts_with("I: ") && !line.trim().is_empty());
    let full = said.iter().find(|line| line.contains("No space left"));
    let found = full.or(if of_hook { earlier().or(said.get(at)) } else { said.get(at).or_else(earlier) });
    let found = found.map_or("no reason given", |line| line.trim_start_matches("E: ").trim());
    let hint = if found.contains("No space left") {
        "it needs some 2G in TMPDIR, or /var/tmp, and the disk's place must have room"
    } else if found.contains("/etc/subuid") || found.contains("unshare") {
        "users need ids for user namespaces here: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER, as root"
    } else if found.contains("while populating file system") || found.contains("Could not allocate") {
        "the disk is too small for it; give a larger --size"
    } else if found.contains("Unable to locate package") {
        "check --include"
    } else if found.contains("Release file") {
        "check --suite"
    } else if found.contains("Failed to fetch") || found.contains("resolve") {
        "check the network and apt's sources and proxies"
    } else {
        "-v shows all that it says"
    };
    format!("{found}; {hint}")
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Error {
    Error::user(format!("cannot write '{}': {error}; give --folder one that you can write to", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_disk_was_made_of_is_kept() {
        let made = Made { suite: "bookworm".into(), size: SIZE, include: "gcc,python3".into() };
        assert_eq!(Made::parse(&made.text()), Some(made));
        assert_eq!(Made::parse("suite=bookworm\n"), None);
    }

    #[test]
    fn a_wish_that_a_disk_does_not_fulfil_is_refused() {
        let made = Made { suite: "bookworm".into(), size: SIZE, include: String::new() };
        let check = |wish: Wish| made.check(&wish, Path::new("/f")).map_err(|error| error.to_string());
        assert_eq!(check(Wish::default()), Ok(()));
        assert_eq!(check(Wish { suite: Some("bookworm".into()), size: Some(SIZE), include: None }), Ok(()));
        let refused = check(Wish { include: Some("gcc".into()), ..Wish::default() }).unwrap_err();
        assert!(refused.contains("'/f' was made with --include none, not gcc; give --fresh"), "{refused}");
    }

    #[test]
    fn what_went_wrong_is_one_line() {
        let check = |said: &[&str], part: &str| {
            let said: Vec<String> = said.iter().map(|line| (*line).to_owned()).collect();
            let text = complaint(&said);
            assert!(text.contains(part) && !text.contains('\n'), "{text}");
        };
        check(
            &["I: a", "E: Unable to locate package nosuch", "E: mmdebstrap failed to run"],
            "package nosuch; check --include",
        );
        check(&["E: The repository 'x' does not have a Release file.", "E: setup failed"], "check --suite");
        check(&["mke2fs: Could not allocate block in ext2 filesystem while populating file system"], "larger --size");
        check(&["mkdir: cannot create", "I: x", "E: setup failed: E: command failed: sh"], "mkdir: cannot create; -v");
        check(&["W: no entry in /etc/subuid for me", "E: failed to parse /etc/subuid and /etc/subgid"], "usermod");
        check(&["dpkg: error: No space left on device", "E: Sub-process env returned an error code (1)"], "in TMPDIR");
        check(&[], "no reason given");
    }

    #[test]
    fn words_of_a_shell() {
        assert_eq!(quoted("a b'c"), r"'a b'\''c'");
        assert_eq!((quoted("/a/b-c.d"), quoted("")), ("/a/b-c.d".into(), "''".into()));
    }
}
