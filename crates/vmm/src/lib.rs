//! The machine: everything of a VM that is neither the architecture, nor a chip, nor an engine.
//!
//! A [`Config`] says what to build; [`boot`] puts a kernel and what it wants to know into guest memory;
//! [`acpi`] describes the machine to it; [`machine`] wires memory, chips and vCPUs together, runs them and
//! reports how the guest ended. No module names a concrete engine: the binary hands one in.
#![deny(unsafe_code)]

pub mod acpi;
pub mod balloon;
pub mod boot;
pub mod config;
mod confine;
pub mod console;
pub mod control;
mod descriptors;
pub mod disk;
pub mod dump;
pub mod firmware;
pub mod gdb;
pub mod layout;
pub mod machine;
pub mod memory;
mod net;
pub mod ports;
mod rng;
pub mod share;
pub mod snapshot;
pub mod variables;
pub mod virtio;
pub mod vsock;

pub use anyvisor_devices::power::debug_exit_code;
pub use config::Config;
pub use machine::{End, Remote};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a VM could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user asked for something impossible. The message is one line: what, which, and what to do.
    #[error("{0}")]
    User(String),
    /// The host failed.
    #[error("{what}: {source}")]
    Host { what: String, source: std::io::Error },
    /// The engine failed, which is the host's failure too.
    #[error(transparent)]
    Engine(#[from] anyvisor_engine::Error),
}

impl Error {
    /// A user's mistake.
    pub fn user(message: impl Into<String>) -> Error {
        Error::User(message.into())
    }

    /// A host failure in doing `what`.
    pub fn host(what: impl Into<String>, source: std::io::Error) -> Error {
        Error::Host { what: what.into(), source }
    }
}
