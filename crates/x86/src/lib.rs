//! The x86-64 architecture as data and pure functions: no threads, clocks, file descriptors or `unsafe`.
//!
//! Everything here is shared by both engines. State is plain and serializable ([`state::VcpuState`]),
//! chips are state machines that return their work as values ([`lapic`]), and tables from the manuals
//! are constants named as the manuals name them.
#![forbid(unsafe_code)]

pub mod bits;
pub mod cpuid;
pub mod exception;
pub mod lapic;
pub mod msi;
pub mod msr;
pub mod paging;
pub mod segment;
pub mod state;

pub use cpuid::{Cpuid, CpuidLeaf, CpuidResult};
pub use exception::Exception;
pub use msi::Msi;
pub use segment::{DescriptorTable, Segment};
pub use state::VcpuState;
