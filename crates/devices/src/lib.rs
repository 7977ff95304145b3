//! The machine's chips and buses, as pure models.
//!
//! **Rules.** A chip has no thread, clock or file descriptor and no floating point. Time comes in as
//! `now_ns`, guest nanoseconds since the VM started, monotonic; inputs come in as method calls; what the
//! rest of the machine must do comes out as a value or can be asked for. The machine (crate `vmm`) puts each
//! chip behind a lock, implements [`bus::BusDevice`] for it, and wires it. Misuse by the guest never panics.
//!
//! | chip | accesses | outputs |
//! |---|---|---|
//! | [`serial::Serial`] | `read(offset)`, `write(offset, byte) -> Option<byte sent>` | `interrupt()` level; `enqueue`, `room`, `wants_input` |
//! | [`i8042::I8042`] | `read(port)`, `write(port, byte) -> Option<PowerEvent>` | `interrupts()` levels of IRQ 1 and 12 |
//! | [`rtc::Rtc`] | `read(port, now)`, `write(port, byte, now)` | `interrupt()` level of IRQ 8; `poll`, `next_event` |
//! | [`pic::Pic`] | `read(port)`, `write(port, byte)`, `set_irq` | `intr()`, `intr_change()`; `acknowledge()` |
//! | [`pit::Pit`] | `read(port, now)`, `write(port, byte, now)` | `poll` -> IRQ 0 edge and level; `next_event` |
//! | [`ioapic::IoApic`] | `read(offset)`, `write(offset, dword) -> Vec<Msi>`, `set_irq -> Option<Msi>`, `eoi -> Vec<Msi>` | the messages |
//! | [`acpi_pm::AcpiPm`] | `read(offset, data, now)`, `write(offset, data, now) -> Option<PowerEvent>` | `sci()` level; `poll`, `next_event` |
//! | [`pci::PciRoot`] | `port_read`/`port_write`, `ecam_*`, `window_*`; shared, locks itself | `PowerEvent` from port 0xcf9 |
//! | [`fw_cfg::FwCfg`] | `read(offset, data)`, `write(offset, data)` | none |
//! | [`virtio::pci::Transport`] | `config_*`, `bar_*`, writes `-> Work` | `pin()` level; `interrupt_queue -> Option<Msi>` |
//! | [`virtio::block::Request`] | `parse` of what a driver made available | `Action`; `finish` gives it its status |
//! | [`virtio::net::transmitted`], [`virtio::net::Receiver`] | one frame out of a chain, or into some | what it wrote, told as it goes |
//! | [`test_device::TestDevice`] | `read_latch`, `write_latch`, `read_memory`, `write_memory` | none: its lines are the machine's |
//! | [`flash::Flash`] | `read`, `write` | what of its contents changed |
//! | [`power`] | the debug-exit port and the reset control register | `PowerEvent` |
//!
//! Interrupt levels (`interrupt()`, `interrupts()`, `sci()`) are looked at by the machine after each access
//! and after `poll`; it fans ISA interrupt n out to PIC input n and I/O APIC pin n (0 to pin 2).
//! Every chip can be saved and restored: see [`state`].
//!
//! `next_event` says when to call `poll` next; ask again after every access.
#![forbid(unsafe_code)]

pub mod acpi_pm;
pub mod bus;
pub mod flash;
pub mod fw_cfg;
pub mod i8042;
pub mod ioapic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod state;
pub mod test_device;
pub mod virtio;

pub use bus::{Bus, BusDevice, Width};
pub use power::PowerEvent;
pub use state::BadState;
