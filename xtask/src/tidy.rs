//! `cargo xtask tidy`: the invariants of ARCHITECTURE.md that the compiler does not check.
//!
//! - Crates depend on each other by the arrows of the map and no others; only the binary's engine list, the
//!   fuzzer and the engine itself name a concrete engine.
//! - `unsafe` is forbidden in whole crates, and appears elsewhere only in the files listed here.
//! - Every source file starts with a header, and none is long.
//! - Nothing in the repository names a path of a developer's machine or a package registry's host.

use crate::{cargo, root};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which of our crates each may depend on.
const ARROWS: &[(&str, &[&str])] = &[
    ("anyvisor-x86", &[]),
    ("anyvisor-initramfs", &[]),
    ("anyvisor-engine", &["anyvisor-x86"]),
    ("anyvisor-engine-translator", &["anyvisor-engine", "anyvisor-x86"]),
    ("anyvisor-engine-kvm", &["anyvisor-engine", "anyvisor-x86"]),
    ("anyvisor-devices", &["anyvisor-x86"]),
    ("anyvisor-user-net", &[]),
    ("anyvisor-vmm", &["anyvisor-engine", "anyvisor-devices", "anyvisor-user-net", "anyvisor-x86"]),
    (
        "anyvisor",
        &[
            "anyvisor-engine",
            "anyvisor-engine-kvm",
            "anyvisor-engine-translator",
            "anyvisor-devices",
            "anyvisor-initramfs",
            "anyvisor-vmm",
            "anyvisor-x86",
        ],
    ),
    ("anyvisor-conformance", &["anyvisor-engine", "anyvisor-engine-kvm", "anyvisor-engine-translator"]),
    ("anyvisor-insn-fuzz", &["anyvisor-engine", "anyvisor-engine-translator", "anyvisor-x86"]),
    ("anyvisor-tests", &["anyvisor-initramfs"]),
    ("xtask", &["anyvisor-tests", "anyvisor-initramfs"]),
];

/// Crates without any `unsafe`.
const SAFE: &[&str] = &[
    "crates/x86/src/lib.rs",
    "crates/engine/src/lib.rs",
    "crates/devices/src/lib.rs",
    "crates/initramfs/src/lib.rs",
    "crates/user-net/src/lib.rs",
    "xtask/src/main.rs",
];

/// Where a concrete engine's crate may be named outside that crate.
const ENGINE_NAMES: &[&str] = &[
    "crates/anyvisor/",
    "crates/conformance/",
    "crates/insn-fuzz/",
    "crates/engine-translator/",
    "crates/engine-kvm/",
    "xtask/",
];

/// A file with more lines than this is to be split.
const MAX_LINES: usize = 1200;

/// Checks everything and reports all that is wrong.
///
/// # Errors
/// When something is.
pub fn tidy() -> Result<()> {
    let mut wrong = arrows()?;
    for file in tracked()? {
        let text = match std::fs::read_to_string(root().join(&file)) {
            Ok(text) => text,
            // Binary, or removed from the work tree.
            Err(_) => continue,
        };
        wrong.extend(paths_and_hosts(&file, &text));
        if file.extension().is_some_and(|e| e == "rs") {
            wrong.extend(source(&file, &text));
        }
    }
    for file in SAFE {
        let text = std::fs::read_to_string(root().join(file)).with_context(|| format!("reading {file}"))?;
        if !text.contains("#![forbid(unsafe_code)]") {
            wrong.push(format!("{file}: #![forbid(unsafe_code)] is missing"));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    bail!("{} untidy things:\n  {}", wrong.len(), wrong.join("\n  "))
}

/// Files that git tracks, from the root.
fn tracked() -> Result<Vec<PathBuf>> {
    let output = Command::new("git").arg("ls-files").current_dir(root()).output().context("running git")?;
    if !output.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect())
}

fn arrows() -> Result<Vec<String>> {
    let output = cargo().args(["metadata", "--no-deps", "--format-version=1"]).output().context("running cargo")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata's output")?;
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().context("packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ARROWS.iter().find(|(n, _)| *n == name) else {
            wrong.push(format!("{name}: a crate that is not in tidy's map"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            let ours = on == "xtask" || on.starts_with("anyvisor");
            if ours && !allowed.contains(&on) {
                wrong.push(format!("{name} depends on {on}, which is not an arrow of the map"));
            }
        }
    }
    Ok(wrong)
}

fn source(file: &Path, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let name = file.display();
    if !text.starts_with("//!") && !text.starts_with("#!") {
        wrong.push(format!("{name}: no module header (//!) at the top"));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        wrong.push(format!("{name}: {lines} lines; split it"));
    }
    let path = file.to_string_lossy();
    let names_engine = ["anyvisor_engine_translator", "anyvisor_engine_kvm"].iter().any(|n| text.contains(n));
    if names_engine && !ENGINE_NAMES.iter().any(|p| path.starts_with(p)) {
        wrong.push(format!("{name}: names a concrete engine"));
    }
    wrong
}

/// Places that mean one machine only, and hosts that are not ours to name.
fn paths_and_hosts(file: &Path, text: &str) -> Vec<String> {
    // The lock file names the registry; cargo writes it so.
    if file.ends_with("Cargo.lock") {
        return Vec::new();
    }
    // Put together here, so that this file does not hold them.
    let patterns =
        [["/wo", "rk/"].concat(), ["/ro", "ot/"].concat(), ["/ho", "me/"].concat(), ["crates", ".io"].concat()];
    let mut wrong = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if let Some(pattern) = patterns.iter().find(|p| line.contains(p.as_str())) {
            wrong.push(format!("{}:{}: {pattern} does not belong here", file.display(), number + 1));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untidy_sources_are_seen() {
        let check = |text: &str| source(Path::new("crates/vmm/src/x.rs"), text).len();
        assert_eq!(check("//! Header.\n"), 0);
        assert_eq!(check("fn f() {}\n"), 1);
        assert_eq!(check("//! Header.\nuse anyvisor_engine_translator::x;\n"), 1);
        assert_eq!(check(&("//! Header.\n".to_owned() + &"\n".repeat(MAX_LINES))), 1);
    }

    #[test]
    fn machine_paths_are_seen() {
        let text = ["see /ho", "me/me/x\n"].concat();
        assert_eq!(paths_and_hosts(Path::new("README.md"), &text).len(), 1);
        assert_eq!(paths_and_hosts(Path::new("README.md"), "see docs/\n").len(), 0);
    }
}
