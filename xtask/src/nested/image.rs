//! L1: the distribution's kernel with its KVM modules, and an initramfs that runs one script.
//!
//! L1's first serial port is its console, the second the script's output, the third its exit status.

use anyhow::{Context, Result};
use anyvisor_initramfs::Archive;
use anyvisor_tests::assets;
use std::fs;
use std::path::{Path, PathBuf};

/// What goes into L1.
pub struct Parts<'a> {
    /// Statically linked programs, for `/`.
    pub programs: &'a [PathBuf],
    /// The guest's initramfs; its kernel is L1's own.
    pub guest_initramfs: &'a [u8],
    pub script: &'a str,
    /// The KVM module to load.
    pub module: &'a str,
    /// More files: where they are in L1, and here.
    pub files: &'a [(String, PathBuf)],
}

/// A kernel and an initramfs.
pub struct Image {
    pub kernel: PathBuf,
    pub initramfs: Vec<u8>,
}

/// Puts L1 together.
///
/// # Errors
/// The kernel package cannot be fetched, or has no such module.
pub fn build(parts: &Parts) -> Result<Image> {
    let package = assets::kernel_tree()?;
    let kernel = assets::kernel_of(&package)?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let mut archive = Archive::new();
    for directory in ["guest", "modules", "run", "dev/pts", "dev/shm", "moved", "moved/here"] {
        archive.directory(directory);
    }
    archive.program("bin/busybox", &read(&assets::busybox()?)?);
    let mut loads = String::new();
    for (name, path) in with_dependencies(&package.join("lib/modules"), parts.module)? {
        archive.program(&format!("modules/{name}.ko"), &read(&path)?);
        loads += &format!("insmod /modules/{name}.ko\n");
    }
    for program in parts.programs {
        let name = program.file_name().context("a program's name")?.to_string_lossy();
        archive.program(&name, &read(program)?);
    }
    archive.program("guest/vmlinuz", &read(&kernel)?);
    archive.program("guest/initrd", parts.guest_initramfs);
    for (name, path) in parts.files {
        archive.program(name, &read(path)?);
    }
    archive.program("script", parts.script.as_bytes());
    archive.program("init", init(&loads).as_bytes());
    Ok(Image { kernel, initramfs: archive.finish() })
}

/// The modules called `names` of L1's kernel, which is the guests' too, with all they depend on.
///
/// # Errors
/// As for [`build`].
pub fn modules(names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let folder = assets::kernel_tree()?.join("lib/modules");
    let mut all = Vec::new();
    for name in names {
        for (name, path) in with_dependencies(&folder, name)? {
            all.push((name, fs::read(&path).with_context(|| format!("reading {}", path.display()))?));
        }
    }
    Ok(all)
}

fn init(loads: &str) -> String {
    format!(
        "#!/bin/busybox sh
/bin/busybox --install -s /bin; export PATH=/bin HOME=/ TERM=dumb
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
mkdir -p /dev/shm; mount -t tmpfs shm /dev/shm; ip link set lo up
{loads}
stty -F /dev/ttyS1 raw -echo; stty -F /dev/ttyS2 raw -echo
cd /; sh /script </dev/null >/dev/ttyS1 2>&1; echo $? >/dev/ttyS2
poweroff -f
"
    )
}

/// A module and all it depends on, those first: names and files.
fn with_dependencies(folder: &Path, name: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    files(folder, &mut found)?;
    let mut order = Vec::new();
    depend(&found, name, &mut order)?;
    Ok(order)
}

fn depend(files: &[PathBuf], name: &str, order: &mut Vec<(String, PathBuf)>) -> Result<()> {
    if order.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    // A file's name may have dashes where the module's has underscores.
    let is = |path: &PathBuf| path.file_stem().is_some_and(|stem| stem.to_string_lossy().replace('-', "_") == name);
    let path = files.iter().find(|path| path.extension().is_some_and(|e| e == "ko") && is(path));
    let path = path.with_context(|| format!("the kernel package has no uncompressed module {name}"))?;
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    for dependency in dependencies(&bytes) {
        depend(files, &dependency, order)?;
    }
    order.push((name.to_owned(), path.clone()));
    Ok(())
}

/// The `depends=` entry of a module's `.modinfo`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let list: Vec<u8> = module[at + KEY.len()..].iter().copied().take_while(|byte| *byte != 0).collect();
    let list = String::from_utf8_lossy(&list).into_owned();
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files(&entry.path(), found)?;
        } else {
            found.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_a_module() {
        assert_eq!(dependencies(b"license=GPL\0depends=kvm,ccp-core\0name=x\0"), ["kvm", "ccp_core"]);
        assert_eq!(dependencies(b"license=GPL\0depends=\0"), Vec::<String>::new());
        assert_eq!(dependencies(b""), Vec::<String>::new());
    }
}
