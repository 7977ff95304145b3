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
                Err(reason) => (Box::new(Translator::new()?), reason),
            };
            let note = format!("engine {}, because {reason}", engine.name());
            Ok(Chosen { engine, note: Some(note) })
        }
    }
}

/// KVM, if kernels run well in it; else why not.
pub fn usable_kvm() -> std::result::Result<Kvm, String> {
    let engine = Kvm::new().map_err(|error| doctor::kvm_refused(&error))?;
    match anyvisor_engine_kvm::probe(&engine) {
        Ok(()) => Ok(engine),
        Err(failure) => Err(explain(&failure)),
    }
}

/// A failed probe in one line.
fn explain(failure: &ProbeFailure) -> String {
    match failure {
        ProbeFailure::Host(error) => format!("/dev/kvm does not work: {error}"),
        _ if doctor::has_hardware_virtualization() => format!("/dev/kvm is of no use: {failure}"),
        _ => format!("/dev/kvm is not backed by hardware ({}): {failure}", doctor::NO_HARDWARE),
    }
}

/// An engine, and the line that `auto` says about it.
pub struct Chosen {
    pub engine: Box<dyn Engine>,
    pub note: Option<String>,
}
