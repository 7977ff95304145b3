//! `cargo xtask suites`: CPU tests written by others, on anyvisor and, for comparison, in QEMU's TCG.
//!
//! None of their code is kept here: each suite is taken, built, from a folder that the user names; Linux' selftests are built from
//! Debian's sources, outside of the repository. Results go test by test into docs/conformance.md, each
//! suite's between its markers; a test that does not pass needs a reason, which stands beside the suite's runner.

mod fex;
mod guest;
mod kvm_unit_tests;
mod process;
mod selftests;
mod table;
mod test386;

use anyhow::{Context, Result, bail};
use anyvisor_tests::assets;
use kvm_unit_tests::Bits;
use std::arch::x86_64::__cpuid;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use table::Verdict;

#[derive(clap::Args)]
pub struct Options {
    /// Which suite
    suite: Name,
    /// Where the suite is, built, or for selftests-x86 a kernel's source; it is copied and not changed
    #[arg(long, value_name = "FOLDER")]
    source: Option<PathBuf>,
    /// Where copies, builds and QEMU's results are kept [default: the user's cache folder]
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Runs the suite in QEMU's TCG and keeps the results, which later runs without this show beside anyvisor's
    #[arg(long)]
    tcg: bool,
    /// Only tests whose name contains TEXT; the document is left alone
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Shows the results, and leaves the document alone
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Name {
    /// kvm-unit-tests for 64-bit kernels, built (--source)
    KvmUnitTests,
    /// kvm-unit-tests for 32-bit kernels, built (--source)
    #[value(name = "kvm-unit-tests-i386")]
    KvmUnitTests32,
    /// test386.asm, built (--source)
    Test386,
    /// Linux' tools/testing/selftests/x86, of Debian's kernel source (or --source)
    SelftestsX86,
    /// FEX's assembly tests, as FEX's build leaves them (--source)
    Fex,
}

/// Runs a suite, prints its table and writes it to docs/conformance.md.
///
/// # Errors
/// The suite cannot be had or run; or a test does not pass and has no reason.
pub fn suites(options: &Options) -> Result<()> {
    let cache = match &options.cache {
        Some(folder) => folder.clone(),
        None => default_cache("suites")?,
    };
    std::fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let place = Place { cache: cache.canonicalize()?, source: options.source.clone() };
    let only = options.only.as_deref();
    let suite = match options.suite {
        Name::KvmUnitTests if options.tcg => return kvm_unit_tests::run_in_tcg(&place, Bits::Of64, only),
        Name::KvmUnitTests32 if options.tcg => return kvm_unit_tests::run_in_tcg(&place, Bits::Of32, only),
        Name::Test386 if options.tcg => return test386::run_in_tcg(&place),
        Name::SelftestsX86 if options.tcg => return selftests::run_in_tcg(&place, only),
        Name::Fex if options.tcg => return fex::run_in_tcg(&place, only),
        Name::Test386 => test386::run(&place)?,
        Name::KvmUnitTests => kvm_unit_tests::run(&place, Bits::Of64, only)?,
        Name::KvmUnitTests32 => kvm_unit_tests::run(&place, Bits::Of32, only)?,
        Name::SelftestsX86 => selftests::run(&place, only)?,
        Name::Fex => fex::run(&place, only)?,
    };
    print!("{}", suite.markdown());
    if options.only.is_none() && !options.dry_run {
        suite.write()?;
    }
    match suite.unexplained().as_slice() {
        [] => Ok(()),
        names => bail!("do not pass, and nobody knows why: {}", names.join(", ")),
    }
}

/// The folder `name` in the user's cache folder.
///
/// # Errors
/// There is none.
pub fn default_cache(name: &str) -> Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set; give --cache FOLDER")?.join("anyvisor").join(name))
}

/// Where a suite is kept.
struct Place {
    cache: PathBuf,
    source: Option<PathBuf>,
}

impl Place {
    /// The suite in the cache, made by `copy` of the user's folder, or by `get`, at the path that they are given.
    fn obtain(
        &self,
        name: &str,
        copy: impl FnOnce(&Path, &Path) -> Result<()>,
        get: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let build = self.cache.join(name);
        if build.exists() && self.source.is_none() {
            return Ok(build);
        }
        let partial = self.cache.join(format!(".{name}.{}", std::process::id()));
        match &self.source {
            Some(folder) => {
                let folder = folder.canonicalize().with_context(|| format!("--source {}", folder.display()))?;
                copy(&folder, &partial).with_context(|| format!("copying {name} from {}", folder.display()))?;
            }
            None => get(&partial)?,
        }
        let _ = std::fs::remove_dir_all(&build);
        std::fs::rename(&partial, &build).with_context(|| format!("putting {name} in place"))?;
        Ok(build)
    }

    /// The file in which what QEMU made of the suite is kept.
    fn kept(&self, name: &str) -> PathBuf {
        self.cache.join(format!("{name}.tcg.json"))
    }
}

fn copy_whole(from: &Path, to: &Path) -> Result<()> {
    assets::run(Command::new("cp").arg("-r").arg(from).arg(to))
}

/// The commit that a copy of a repository is of, for the record.
fn commit(folder: &Path) -> String {
    let output = Command::new("git").arg("-C").arg(folder).args(["log", "-1", "--format=%h of %cs"]).output();
    let text = output.ok().filter(|output| output.status.success());
    let text = text.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "an unknown commit".into())
}

/// Whether the CPU is AMD's, or Hygon's, which are made as those are.
fn host_is_amd() -> bool {
    [*b"Auth", *b"Hygo"].map(u32::from_le_bytes).contains(&__cpuid(0).ebx)
}

/// The CPU's name for itself.
fn host_cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let value = |line: &str| Some(line.strip_prefix(name)?.trim_start().strip_prefix(": ")?.to_owned());
        text.lines().find_map(value).unwrap_or_else(|| "unknown".into())
    };
    format!("{}, family {}, model {}", field("model name"), field("cpu family"), field("model"))
}

fn qemu_version() -> String {
    let output = Command::new("qemu-system-x86_64").arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("no QEMU here").trim().to_owned()
}

fn read_kept(path: &Path) -> BTreeMap<String, Verdict> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let kept: BTreeMap<String, String> = serde_json::from_str(&text).unwrap_or_default();
    kept.into_iter().filter_map(|(name, text)| Some((name, Verdict::decode(&text)?))).collect()
}

fn write_kept(path: &Path, verdicts: &BTreeMap<String, Verdict>) -> Result<()> {
    let kept: BTreeMap<&String, String> = verdicts.iter().map(|(name, verdict)| (name, verdict.encode())).collect();
    if kept.is_empty() {
        bail!("nothing to keep");
    }
    std::fs::write(path, serde_json::to_vec_pretty(&kept)?).with_context(|| format!("writing {}", path.display()))
}
