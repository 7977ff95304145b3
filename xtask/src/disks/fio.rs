//! fio with its libraries, from Debian's package: on the host, and in an initramfs with virtio disks.

use crate::install;
use anyhow::{Context, Result, ensure};
use anyvisor_tests::assets;
use std::path::{Path, PathBuf};
use std::process::Command;

const SUITE: &str = "bookworm";
const LINKER: &str = "lib64/ld-linux-x86-64.so.2";
const PROGRAM: &str = "usr/bin/fio";
const LIBRARIES: [&str; 3] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"];
/// What Linux needs to have virtio disks, in the order of loading.
const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];

/// The unpacked package with what it depends on.
pub struct Fio {
    root: PathBuf,
}

impl Fio {
    /// Unpacks it in the user's cache folder, once.
    ///
    /// # Errors
    /// It cannot be fetched or unpacked (this needs root, or user namespaces).
    pub fn prepare() -> Result<Fio> {
        let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        let cache = cache.context("neither XDG_CACHE_HOME nor HOME is set")?.join("anyvisor");
        let root = cache.join("fio");
        if !root.join(PROGRAM).exists() {
            install("mmdebstrap", &["mmdebstrap"])?;
            eprintln!("xtask: unpacking fio in {}", root.display());
            std::fs::create_dir_all(&cache)?;
            let partial = cache.join(format!(".fio.{}", std::process::id()));
            let mut command = Command::new("mmdebstrap");
            command.args(["--quiet", "--variant=extract", "--include=fio", "--dpkgopt=path-exclude=/usr/share/*"]);
            command.arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr").arg(SUITE).arg(&partial);
            assets::run(&mut command).context("unpacking fio")?;
            std::fs::rename(&partial, &root).with_context(|| format!("putting {} in place", root.display()))?;
        }
        Ok(Fio { root })
    }

    /// fio on this host.
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.root.join(LINKER));
        let folders = LIBRARIES.map(|folder| self.root.join(folder));
        let folders: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
        command.arg("--library-path").arg(folders.join(":")).arg(self.root.join(PROGRAM));
        command
    }

    /// An initramfs that has disks and fio when it runs `script`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn initramfs(&self, name: &str, script: &str) -> Result<PathBuf> {
        let mut files = assets::modules(&MODULES)?;
        for path in self.libraries()?.iter().map(String::as_str).chain([PROGRAM]) {
            // The guest has no links: everything is where the linker looks.
            let content = std::fs::read(self.root.join(path)).with_context(|| format!("reading {path}"))?;
            files.push((path.to_owned(), content));
        }
        let script = format!(
            "for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done\nfio() {{ /usr/bin/fio \"$@\"; }}\n{script}\npoweroff -f",
            MODULES.join(" ")
        );
        assets::scratch(name, &assets::initramfs_with(&script, &files)?)
    }

    /// The linker and the libraries that fio is linked to, by path without the first slash.
    fn libraries(&self) -> Result<Vec<String>> {
        let mut command = self.command();
        let program: Vec<_> = command.get_args().map(|argument| argument.to_owned()).collect();
        command = Command::new(self.root.join(LINKER));
        command.args(&program[..2]).arg("--list").arg(&program[2]);
        let output = command.output().context("listing fio's libraries")?;
        let text = String::from_utf8(output.stdout)?;
        let complete = output.status.success() && !text.contains("not found");
        ensure!(complete, "{text}{}", String::from_utf8_lossy(&output.stderr));
        let paths = text.lines().filter_map(|line| line.split("=> ").nth(1)?.split(' ').next());
        let inside = |path: &str| Some(Path::new(path).strip_prefix(&self.root).ok()?.display().to_string());
        let mut paths: Vec<_> = paths.filter_map(inside).collect();
        paths.push(LINKER.to_owned());
        paths.sort();
        paths.dedup();
        Ok(paths)
    }
}
