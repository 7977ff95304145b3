//! The conformance suite: what every engine must do, in cases of a few guest instructions each.
//!
//! **Problem.** Two engines execute the same guests, and a VM may move between them. What "the same" means
//! is the architecture (Intel SDM, AMD APM) and the contract in this crate; it has to be written down where
//! both engines are held against it.
//!
//! **Idea.** A [`Case`] gets a fresh machine of one vCPU ([`Guest`]: memory, descriptor and page tables, a
//! vCPU in one of the [`Mode`]s), runs a few instructions and checks what can be seen through the contract:
//! why the run ended, the state after it, memory, and what devices saw. A case reads like this:
//!
//! ```ignore
//! suite.add("UD2 is a fault", EVERY_MODE, |g| g.run(|a| a.ud2())?.fault(vector::UD));
//! ```
//!
//! [`Guest::run`] assembles at [`place::CODE`] and puts the end of the test (a write to port [`END_PORT`], or
//! at CPL 3 to [`place::END`], which kicks the vCPU) behind it. Exception handlers are nothing but such an end: which
//! vector was delivered shows in RIP, and its frame lies on the stack ([`End::fault`], [`End::trap`]).
//! A case may put code of its own behind a vector ([`Guest::handler`]).
//!
//! **Rules.**
//! - The manuals are the oracle, not an engine. Where they allow two behaviours, the case says so.
//! - Nothing here knows which engine runs. What a host cannot do stands in one table with a reason
//!   ([`limits`]); what a CPU model lacks is a [`Need`].
//! - No case depends on how fast it runs; [`Bench::patience`] bounds how long a case may hang.
//!
//! The runner is the `conformance` binary; engines run the suite in their own `cargo test` too.

mod asm;
mod cases;
mod end;
mod guest;
pub mod limits;
mod recorder;
mod tables;

pub use asm::{Asm, Assembled};
pub use cases::cases;
pub use end::{End, Frame};
pub use guest::Guest;
pub use recorder::{Access, Recorder};
pub use tables::{Mode, flags, page, place, selector};

use crate::Engine;
use anyvisor_x86::Cpuid;
use anyvisor_x86::cpuid::{CpuChoice, CpuModel, Feature, Register};
use std::sync::Arc;
use std::time::Duration;

/// The port that ends a run when it is written to.
pub const END_PORT: u16 = 0xf4;

/// What a case says: nothing, or what it expected and what it got.
pub type Verdict = Result<(), Mismatch>;

/// Why a case failed, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mismatch(pub String);

impl From<crate::Error> for Mismatch {
    fn from(error: crate::Error) -> Mismatch {
        Mismatch(format!("the engine failed: {error}"))
    }
}

impl From<iced_x86::IcedError> for Mismatch {
    fn from(error: iced_x86::IcedError) -> Mismatch {
        Mismatch(format!("the case does not assemble: {error}"))
    }
}

/// `Err` that names both values unless they are equal; numbers in hexadecimal.
pub fn equal<T: PartialEq + std::fmt::Debug>(what: &str, got: T, expected: T) -> Verdict {
    if got == expected {
        return Ok(());
    }
    Err(Mismatch(format!("{what}: expected {expected:x?}, got {got:x?}")))
}

/// `Err` with `what` unless `holds`.
pub fn ensure(holds: bool, what: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(Mismatch(what())) }
}

/// What a case needs of the vCPU beyond x86-64's baseline: a CPUID feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need(pub Feature);

impl Need {
    const fn new(name: &'static str, leaf: u32, register: Register, bit: u32) -> Need {
        Need(Feature { name, leaf, subleaf: 0, register, bit })
    }
    pub const AVX: Need = Need::new("avx", 1, Register::Ecx, 28);
    pub const XSAVE: Need = Need::new("xsave", 1, Register::Ecx, 26);
    pub const PCID: Need = Need::new("pcid", 1, Register::Ecx, 17);
    pub const INVPCID: Need = Need::new("invpcid", 7, Register::Ebx, 10);
    pub const X2APIC: Need = Need::new("x2apic", 1, Register::Ecx, 21);
    pub const TSC_DEADLINE: Need = Need::new("tsc_deadline_timer", 1, Register::Ecx, 24);
    pub const TSC_ADJUST: Need = Need::new("tsc_adjust", 7, Register::Ebx, 1);
    pub const FSGSBASE: Need = Need::new("fsgsbase", 7, Register::Ebx, 0);
    pub const SMEP: Need = Need::new("smep", 7, Register::Ebx, 7);
    pub const SMAP: Need = Need::new("smap", 7, Register::Ebx, 20);
    pub const UMIP: Need = Need::new("umip", 7, Register::Ecx, 2);
    pub const GIB_PAGES: Need = Need::new("pdpe1gb", 0x8000_0001, Register::Edx, 26);
    pub const RDTSCP: Need = Need::new("rdtscp", 0x8000_0001, Register::Edx, 27);
    pub const RDPID: Need = Need::new("rdpid", 7, Register::Ecx, 22);
    pub const SYSENTER: Need = Need::new("sep", 1, Register::Edx, 11);
    pub const PKU: Need = Need(anyvisor_x86::cpuid::PKU);
    pub const PKS: Need = Need(anyvisor_x86::cpuid::PKS);
    pub const MOVBE: Need = Need::new("movbe", 1, Register::Ecx, 22);
    pub const CX16: Need = Need::new("cx16", 1, Register::Ecx, 13);
}

type Test = Arc<dyn Fn(&mut Guest<'_>) -> Verdict + Send + Sync>;

/// One thing that every engine must do, in one mode.
pub struct Case {
    /// `group: what must be seen [mode]`; unique.
    pub name: String,
    pub mode: Mode,
    pub needs: Vec<Need>,
    test: Test,
}

/// What became of a case.
#[derive(Debug)]
pub enum Outcome {
    Ok,
    Failed(Mismatch),
    /// Why it cannot be run.
    Skipped(String),
}

/// An engine to run cases on.
pub struct Bench<'a> {
    pub engine: &'a dyn Engine,
    cpuid: Cpuid,
    /// How long one run of a guest may take before it counts as hung.
    pub patience: Duration,
}

impl<'a> Bench<'a> {
    /// Cases run on vCPUs of the `host` model with all that `engine` supports, protection keys too.
    pub fn new(engine: &'a dyn Engine, patience: Duration) -> Bench<'a> {
        let supported = engine.supported_cpuid();
        let keys: CpuChoice = "host,+pku,+pks".parse().expect("a CPU model");
        let cpuid = keys.table(&supported, 1, 0).or_else(|_| CpuModel::Host.table(&supported, 1, 0));
        let cpuid = cpuid.expect("the host model needs only x86-64");
        Bench { engine, cpuid, patience }
    }

    /// Runs one case on a machine of its own.
    pub fn run(&self, case: &Case) -> Outcome {
        if let Some(need) = case.needs.iter().find(|need| !self.cpuid.has(&need.0)) {
            return Outcome::Skipped(format!("the CPU model has no {}", need.0.name));
        }
        let verdict = Guest::new(self.engine, &self.cpuid, case.mode, self.patience)
            .map_err(Mismatch::from)
            .and_then(|mut guest| (case.test)(&mut guest));
        match verdict {
            Ok(()) => Outcome::Ok,
            Err(why) => Outcome::Failed(why),
        }
    }
}

/// What runs before a case.
type Prepare = fn(&mut Guest<'_>) -> Verdict;

/// Collects cases; each file under `cases/` adds its own.
pub struct Suite {
    cases: Vec<Case>,
    group: &'static str,
    prepare: Option<Prepare>,
}

impl Suite {
    fn group(&mut self, name: &'static str) -> &mut Suite {
        (self.group, self.prepare) = (name, None);
        self
    }

    /// Runs `prepare` before each case of this group that is added from here on.
    fn each(&mut self, prepare: Prepare) -> &mut Suite {
        self.prepare = Some(prepare);
        self
    }

    /// Adds a case for each of `modes`. Returns what sets their needs.
    fn add<F>(&mut self, name: impl AsRef<str>, modes: &[Mode], test: F) -> Added<'_>
    where
        F: Fn(&mut Guest<'_>) -> Verdict + Send + Sync + 'static,
    {
        let first = self.cases.len();
        let test: Test = match self.prepare {
            Some(prepare) => Arc::new(move |g| {
                prepare(g)?;
                test(g)
            }),
            None => Arc::new(test),
        };
        for &mode in modes {
            let name = format!("{}: {} [{}]", self.group, name.as_ref(), mode.name());
            self.cases.push(Case { name, mode, needs: Vec::new(), test: test.clone() });
        }
        Added(&mut self.cases[first..])
    }
}

/// The cases that one call of [`Suite::add`] made.
struct Added<'a>(&'a mut [Case]);

impl Added<'_> {
    fn needs(self, needs: &[Need]) {
        for case in self.0 {
            case.needs = needs.to_vec();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique() {
        let mut seen = HashSet::new();
        for case in cases() {
            assert!(seen.insert(case.name.clone()), "twice: {}", case.name);
        }
    }

    #[test]
    fn limits_name_cases() {
        let cases = cases();
        for limit in limits::ALL.iter().flat_map(|host| host.limits) {
            for part in limit.cases {
                assert!(cases.iter().any(|case| case.name.contains(part)), "no case matches {part:?}");
            }
            assert!(limit.reason.len() > 10, "a reason for {:?}", limit.cases);
        }
    }
}
