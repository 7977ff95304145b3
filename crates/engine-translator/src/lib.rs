//! The `translator` engine: guest code runs on the host CPU in user mode, by same-ISA binary translation.
pub mod code_memory;
pub mod core;
pub mod cpu;
pub mod interpret;
pub mod mmu;
pub mod native;
pub mod ram;
pub mod system;
pub mod translate;
