//! Which engine runs the guest, and why.

use anyvisor_engine::Engine;
use anyvisor_engine_translator::Translator;
use anyvisor_vmm::{Error, Result};
use std::str::FromStr;

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

/// What `auto` takes, and why.
pub const AUTO_REASON: &str = "this build has no kvm engine yet";

/// Makes the chosen engine, and what to tell the user about the choice, if it was not theirs.
///
/// # Errors
/// The user chose an engine that is not there, or the host cannot run the translator.
pub fn open(choice: EngineChoice) -> Result<Chosen> {
    match choice {
        EngineChoice::Kvm => {
            Err(Error::user("this build has no kvm engine yet; use --engine translator, which needs no /dev/kvm"))
        }
        EngineChoice::Translator => Ok(Chosen { engine: Box::new(Translator::new()?), note: None }),
        EngineChoice::Auto => {
            let note = format!("engine translator, because {AUTO_REASON}");
            Ok(Chosen { engine: Box::new(Translator::new()?), note: Some(note) })
        }
    }
}

/// An engine, and the line that `auto` says about it.
pub struct Chosen {
    pub engine: Box<dyn Engine>,
    pub note: Option<String>,
}
