//! Which EOIs the kernel's local APICs must tell us about.
//!
//! **Problem.** The machine's I/O APIC needs to know when a level-triggered interrupt ends. With split
//! interrupt chips KVM reports an EOI if the interrupt routing table has, among the first [`PINS`] entries, a
//! level-triggered message with that vector for that vCPU, as if those were an I/O APIC's pins. Here the I/O
//! APIC only sends messages.
//!
//! **Idea.** Each level-triggered message becomes a route when it is first seen, before it is delivered. A
//! guest has few of them, so the table changes at boot and hardly ever after.
//!
//! **Invariants.** A message is in the table from its delivery to its EOI, unless more than [`PINS`] wait for
//! an EOI at a time, which an I/O APIC of 24 pins cannot cause. The table is bounded whatever the guest does:
//! the message that has been unused for longest makes room.
//!
//! Behind these come the routes of interrupts by file descriptor, which stay.

use anyvisor_x86::Msi;
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
};

/// How many routes KVM takes for pins of an I/O APIC.
pub(crate) const PINS: u32 = 64;

/// Most interrupts by file descriptor; KVM's limit is 4096 routes.
const DESCRIPTORS_MAX: usize = 2048;

#[derive(Clone, Copy, Debug)]
struct Pin {
    msi: Msi,
    /// Delivered, and its EOI has not come.
    outstanding: bool,
    /// When it was last delivered, in deliveries.
    used: u64,
}

/// The routing table of one VM.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    pins: Vec<Pin>,
    descriptors: Vec<Msi>,
    deliveries: u64,
}

impl Routes {
    /// A level-triggered message is about to be delivered. Whether the table has changed.
    pub fn deliver(&mut self, msi: Msi) -> bool {
        self.deliveries += 1;
        let pin = Pin { msi, outstanding: true, used: self.deliveries };
        if let Some(known) = self.pins.iter_mut().find(|known| known.msi == msi) {
            *known = pin;
            return false;
        }
        if self.pins.len() < PINS as usize {
            self.pins.push(pin);
        } else {
            let oldest = self.pins.iter_mut().min_by_key(|known| (known.outstanding, known.used));
            *oldest.expect("the table is full") = pin;
        }
        true
    }

    /// Vector `vector` has ended.
    pub fn end(&mut self, vector: u8) {
        for pin in self.pins.iter_mut().filter(|pin| pin.msi.vector() == vector) {
            pin.outstanding = false;
        }
    }

    /// Whether some vector has not ended.
    pub fn awaits_end(&self) -> bool {
        self.pins.iter().any(|pin| pin.outstanding)
    }

    /// Adds an interrupt by file descriptor; its number. `None` if there are too many.
    pub fn attach(&mut self, msi: Msi) -> Option<u32> {
        if self.descriptors.len() >= DESCRIPTORS_MAX {
            return None;
        }
        self.descriptors.push(msi);
        Some(PINS + self.descriptors.len() as u32 - 1)
    }

    /// Takes back the last [`Routes::attach`].
    pub fn detach_last(&mut self) {
        self.descriptors.pop();
    }

    /// The table for KVM.
    pub fn table(&self) -> KvmIrqRouting {
        let pins = self.pins.iter().map(|pin| pin.msi).zip(0..);
        let descriptors = self.descriptors.iter().copied().zip(PINS..);
        let entries: Vec<_> = pins.chain(descriptors).map(|(msi, gsi)| entry(gsi, msi)).collect();
        KvmIrqRouting::from_entries(&entries).expect("fewer routes than KVM takes")
    }
}

fn entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let (address_lo, address_hi) = address(msi);
    let msi = kvm_irq_routing_msi { address_lo, address_hi, data: msi.data, ..kvm_irq_routing_msi::default() };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..kvm_irq_routing_entry::default()
    }
}

/// A message's address as KVM wants it with 32-bit APIC IDs: bits 31:8 of the destination in the upper half
/// (Linux Documentation/virt/kvm/api.rst, KVM_SET_GSI_ROUTING), not in bits 11:5 of the lower.
pub(crate) fn address(msi: Msi) -> (u32, u32) {
    (msi.address as u32 & !0xfe0, msi.destination() & !0xff)
}

/// The level-triggered message that would have put `vector` into a local APIC's registers.
pub(crate) fn level(apic_id: u32, vector: u8) -> Msi {
    let id = u64::from(apic_id);
    Msi { address: 0xfee0_0000 | (id & 0xff) << 12 | (id >> 8 & 0x7f) << 5, data: 0xc000 | u32::from(vector) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_routed_once() {
        let mut routes = Routes::default();
        assert!(routes.deliver(level(0, 0x31)));
        assert!(!routes.deliver(level(0, 0x31)));
        assert!(routes.deliver(level(1, 0x31)), "another destination");
        assert_eq!(routes.table().as_slice().len(), 2);
    }

    #[test]
    fn the_table_is_bounded_and_keeps_what_is_outstanding() {
        let mut routes = Routes::default();
        let waiting = level(0, 0x20);
        routes.deliver(waiting);
        for n in 0..1000u32 {
            let vector = 0x21 + (n % 200) as u8;
            routes.deliver(level(n, vector));
            routes.end(vector);
        }
        assert_eq!(routes.pins.len(), PINS as usize);
        assert!(!routes.deliver(waiting), "still there");
        assert!(!routes.deliver(level(999, 0x21 + 199)), "the newest too");
    }

    #[test]
    fn descriptors_come_behind_the_pins() {
        let mut routes = Routes::default();
        routes.deliver(level(0, 0x31));
        assert_eq!(routes.attach(level(0, 0x40)), Some(PINS));
        assert_eq!(routes.attach(level(0, 0x41)), Some(PINS + 1));
        let gsis: Vec<_> = routes.table().as_slice().iter().map(|entry| entry.gsi).collect();
        assert_eq!(gsis, [0, PINS, PINS + 1]);
        routes.detach_last();
        assert_eq!(routes.table().as_slice().len(), 2);
    }

    #[test]
    fn wide_destinations_are_in_the_upper_half() {
        let msi = level(0x123, 0x55);
        assert_eq!(msi.destination(), 0x123);
        assert_eq!(address(msi), (0xfee2_3000, 0x100));
    }
}
