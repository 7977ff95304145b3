//! The modules that a guest's kernel needs to see the host's files, in the order in which it can load them.

use anyvisor_vmm::{Error, Result};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What loads everything else, by what it depends on.
pub const FILES: [&str; 3] = ["virtio_pci", "virtiofs", "overlay"];
pub const NETWORK: &str = "virtio_net";
/// Folders below this depth are not looked at: a kernel's tree has fewer.
const DEPTH_MAX: usize = 16;

/// A module's name, and its contents.
pub type Module = (String, Vec<u8>);

/// The modules `wanted`, and what they depend on, in `folder`, or as many as are there: what is not is taken to be built in.
///
/// # Errors
/// One that is there cannot be read or unpacked.
pub fn load(folder: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    collect(folder, 0, &mut files);
    let mut order = vec![];
    for name in wanted {
        add(name, &files, &mut order)?;
    }
    Ok(order)
}

/// Puts a module behind those it depends on.
fn add(name: &str, files: &HashMap<String, PathBuf>, order: &mut Vec<Module>) -> Result<()> {
    let Some(path) = files.get(name).filter(|_| order.iter().all(|(other, _)| other != name)) else { return Ok(()) };
    let bytes = read(path)?;
    for needed in dependencies(&bytes) {
        // No module depends on itself, directly or not: depmod refuses it.
        if needed != name {
            add(&needed, files, order)?;
        }
    }
    order.push((name.to_owned(), bytes));
    Ok(())
}

/// What a module's `.modinfo` says that it depends on.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else { return vec![] };
    let text = &module[at + KEY.len()..];
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&text[..end]).split(',').filter(|name| !name.is_empty()).map(plain).collect()
}

/// A module's name as the kernel has it.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// Notes where modules are, by their names.
fn collect(folder: &Path, depth: usize, files: &mut HashMap<String, PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < DEPTH_MAX => collect(&entry.path(), depth + 1, files),
            Ok(kind) if !kind.is_dir() => {
                if let Some((module, "" | ".xz" | ".zst" | ".gz")) = name.split_once(".ko") {
                    files.insert(plain(module), entry.path());
                }
            }
            _ => {}
        }
    }
}

/// A module's bytes, unpacked by the program that distributions pack them with.
fn read(path: &Path) -> Result<Vec<u8>> {
    let shown = path.display();
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            return fs::read(path)
                .map_err(|e| Error::user(format!("cannot read module '{shown}': {e}; check --modules")));
        }
    };
    let failed = |why: String| Error::user(format!("cannot unpack module '{shown}' with {program}: {why}"));
    let output = Command::new(program).arg("-dc").arg(path).output().map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("no reason given").into()));
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_behind_what_they_depend_on() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("kernel/fs");
        fs::create_dir_all(&deep).unwrap();
        for (name, depends) in [
            ("virtiofs", "fuse,virtio,built-in"),
            ("fuse", ""),
            ("virtio", "virtio-ring"),
            ("virtio-ring", ""),
            ("other", ""),
        ] {
            fs::write(deep.join(format!("{name}.ko")), format!("\x7fELF\0depends={depends}\0license=GPL\0")).unwrap();
        }
        let found = load(folder.path(), &FILES).unwrap();
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["fuse", "virtio_ring", "virtio", "virtiofs"]);
        assert!(load(Path::new("/nonexistent"), &FILES).unwrap().is_empty());
        assert!(dependencies(b"\0depends=").is_empty());
        fs::write(deep.join("overlay.ko.gz"), "not packed").unwrap();
        let error = load(folder.path(), &FILES).unwrap_err().to_string();
        assert!(error.contains("overlay.ko.gz") && error.contains("gzip"), "{error}");
    }
}
