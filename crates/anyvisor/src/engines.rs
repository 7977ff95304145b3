//! Which engine runs the guest, and why.
//!
//! `auto` takes KVM only where a probe VM has shown that 64-bit kernel code runs on the CPU, since a
//! `/dev/kvm` that merely opens may be one that cannot boot a kernel; otherwise the translator. It always says
//! which and why.

use anyvisor_engine::Engine;
use anyvisor_engine_kvm::{Kvm, ProbeFailure};
use anyvisor_engine_translator::Translator;
use anyvisor_vmm::{Error, Result};
use std::str::FromStr;

use crate::doctor;

/// `--engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    Auto,
    Translator,
    Kvm,
}

impl FromStr for EngineChoice {
    type Err = String;
    fn from_str(name: &str) -> std::result::Result<EngineChoice, String> {
        match name {
            "auto" => Ok(EngineChoice::Auto),
            "translator" => Ok(EngineChoice::Translator),
            "kvm" => Ok(EngineChoice::Kvm),
            _ => Err(format!("unknown engine '{name}'; use auto, translator or kvm")),
        }
    }
}

/// Makes the chosen engine, and what to tell the user about the choice, if it was not theirs.
///
/// # Errors
/// The user chose an engine that is not there, or the host cannot run the translator.
pub fn open(choice: EngineChoice) -> Result<Chosen> {
    match choice {
        EngineChoice::Kvm => match Kvm::new() {
            Ok(engine) => Ok(Chosen { engine: Box::new(engine), note: None }),
            Err(error) => {
                let why = doctor::kvm_refused(&error);
                Err(Error::user(format!("--engine kvm: {why}; or use --engine translator, which needs no /dev/kvm")))
            }
        },
        EngineChoice::Translator => Ok(Chosen { engine: Box::new(Translator::new()?), note: None }),
        EngineChoice::Auto => {
            let (engine, reason): (Box<dyn Engine>, _) = match usable_kvm() {
                Ok(engine) => {
                    (Box::new(engine), "64-bit kernel code runs on this CPU's hardware virtualization".into())
                }
                Err(unusable) => (Box::new(Translator::new()?), unusable.in_short()),
            };
            let note = format!("engine {}, because {reason}", engine.name());
            Ok(Chosen { engine, note: Some(note) })
        }
    }
}

/// Why `auto` does not take KVM.
pub struct Unusable {
    /// In a few words, which follow "engine translator, because".
    pub why: String,
    /// What the probe met, which only `doctor` tells.
    pub detail: Option<String>,
}

impl Unusable {
    /// For one line on stderr.
    fn in_short(self) -> String {
        let hint = if self.detail.is_some() { " (anyvisor doctor tells more)" } else { "" };
        self.why + hint
    }
}

/// KVM, if kernels run well in it; else why not.
pub fn usable_kvm() -> std::result::Result<Kvm, Unusable> {
    let engine = Kvm::new().map_err(|error| Unusable { why: doctor::kvm_refused(&error), detail: None })?;
    match anyvisor_engine_kvm::probe(&engine) {
        Ok(()) => Ok(engine),
        Err(failure) => Err(explain(&failure, doctor::has_hardware_virtualization())),
    }
}

/// A failed probe on a host with or without hardware virtualization.
fn explain(failure: &ProbeFailure, hardware: bool) -> Unusable {
    let why = match failure {
        ProbeFailure::Host(_) => "/dev/kvm does not work",
        _ if hardware => "64-bit kernel code does not run well in /dev/kvm",
        _ => "/dev/kvm is not backed by hardware virtualization",
    };
    Unusable { why: why.into(), detail: Some(failure.to_string()) }
}

/// An engine, and the line that `auto` says about it.
pub struct Chosen {
    pub engine: Box<dyn Engine>,
    pub note: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_short_and_leave_details_to_doctor() {
        let bytes = "KVM cannot emulate an instruction (48 0f c7 0e)";
        for (failure, hardware, word) in [
            (ProbeFailure::CannotRun(bytes.into()), false, "not backed by hardware"),
            (ProbeFailure::CannotRun(bytes.into()), true, "does not run well"),
            (ProbeFailure::Slow(250.0), true, "does not run well"),
            (ProbeFailure::NoEnd, false, "not backed by hardware"),
        ] {
            let unusable = explain(&failure, hardware);
            assert_eq!(unusable.detail, Some(failure.to_string()));
            let note = unusable.in_short();
            assert!(note.contains(word) && note.contains("doctor") && note.len() < 90, "{note}");
            assert!(!note.contains("48 0f"), "{note}");
        }
    }
}
