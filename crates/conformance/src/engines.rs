//! The engines that the runner can test.

use anyhow::{Result, bail};
use anyvisor_engine::Engine;
use anyvisor_engine_kvm::Kvm;
use anyvisor_engine_translator::Translator;

/// As on the command line. `interpreter` is the translator engine without its translator.
pub const NAMES: [&str; 3] = ["translator", "interpreter", "kvm"];

/// Opens an engine on this host.
///
/// # Errors
/// What the host lacks for it.
pub fn open(name: &str) -> Result<Box<dyn Engine>> {
    Ok(match name {
        "translator" => Box::new(Translator::new()?),
        "interpreter" => Box::new(Translator::interpreting()?),
        "kvm" => Box::new(Kvm::new()?),
        other => bail!("no engine is called {other:?}"),
    })
}
