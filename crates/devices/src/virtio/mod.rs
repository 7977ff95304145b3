//! virtio 1.2 devices over PCI, as models: registers ([`pci`]), split virtqueues ([`queue`]), disks ([`block`]), network
//! cards ([`net`]), shared folders ([`fs`]).
//!
//! **Idea.** A device is two models that meet in the machine. [`pci::Transport`] is what vCPUs touch: it never looks at
//! guest memory, and says what a write asks for as a value. The queues are what the device's own thread works on.
//! What a request asks for comes out as a value ([`block::Action`]), so that nothing here has a thread, a clock or a file.
//!
//! **A guest that misbehaves.** Whatever is in a queue, the device answers as the specification says: an error in the
//! request's status, or, where the queue itself makes no sense ([`Broken`]), DEVICE_NEEDS_RESET and no more work until
//! the driver resets it (2.1.1). Nothing that a guest writes is trusted: addresses are checked against RAM,
//! chains have at most as many buffers as there are descriptors, and no allocation is larger than that.
//!
//! **Memory.** What a device writes it reports ([`Written`]) before the guest can learn of it, for translated code and
//! the log of written pages.

pub mod balloon;
pub mod block;
pub mod console;
pub mod fs;
#[cfg(test)]
pub(crate) mod hostile;
pub mod limit;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod vsock;

/// Told the guest-physical address and bytes of each range of RAM that a device has written.
pub type Written<'a> = &'a dyn Fn(u64, u64);

/// A driver's mistake after which a device cannot go on: what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub &'static str);

/// Feature bits of every device (chapter 6).
pub mod feature {
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_INDEX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Device status (2.1).
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}
