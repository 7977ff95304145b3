//! The I/O APIC (Intel 82093AA data sheet; version 0x20 with its EOI register as in ICH chipsets).
//!
//! Pure state: input lines, the redirection table, and the messages they cause ([`Msi`]). EOIs come back
//! from local APICs by vector ([`IoApic::eoi`]).
//!
//! Input levels are logical (asserted or not); the polarity bit only describes the wire. An entry's upper
//! half may carry destination bits 14:8 in bits 55:49, the convention of KVM and Hyper-V.

use crate::state::{BadState, require};
use anyvisor_x86::Msi;
use serde::{Deserialize, Serialize};

/// Guest-physical address of the first I/O APIC.
pub const DEFAULT_BASE: u64 = 0xfec0_0000;
/// Bytes of address space it answers.
pub const LENGTH: u64 = 0x1000;
/// Number of inputs.
pub const PINS: u8 = 24;

/// Register select, window and EOI register, by offset.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const TABLE: u8 = 0x10;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Everything but delivery status and remote IRR.
const WRITABLE_LOW: u64 = 0x1_afff;
const WRITABLE_HIGH: u64 = 0xfffe_0000_0000_0000;

/// One I/O APIC.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApic {
    id: u32,
    select: u8,
    table: [u64; PINS as usize],
    /// Input levels, by bit.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> IoApic {
        IoApic::new()
    }
}

impl IoApic {
    /// After reset: every entry masked.
    pub fn new() -> IoApic {
        IoApic { id: 0, select: 0, table: [MASKED; PINS as usize], lines: 0 }
    }

    /// Refuses a restored state that no guest can reach.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), BadState> {
        let defined = WRITABLE_LOW | WRITABLE_HIGH | REMOTE_IRR;
        let stuck = |entry: u64| entry & (LEVEL | REMOTE_IRR) == REMOTE_IRR;
        require(
            "I/O APIC",
            &[
                (self.id & !0x0f00_0000 == 0, "undefined bits in its ID"),
                (self.table.iter().all(|entry| entry & !defined == 0), "undefined bits in its table"),
                (!self.table.iter().any(|&entry| stuck(entry)), "an edge that waits for an EOI"),
                (self.lines >> PINS == 0, "more lines than inputs"),
            ],
        )
    }

    /// Sets input `pin` (below [`PINS`]); returns the message this causes.
    pub fn set_irq(&mut self, pin: u8, level: bool) -> Option<Msi> {
        assert!(pin < PINS, "the I/O APIC has no pin {pin}");
        let bit = 1 << pin;
        let rising = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.table[usize::from(pin)] & LEVEL != 0 {
            return self.send_level(pin);
        }
        // Edges while masked are lost (82093AA 3.2.4, interrupt mask).
        (rising && self.table[usize::from(pin)] & MASKED == 0).then(|| self.message(pin))
    }

    /// A local APIC ended level-triggered `vector`: the messages of inputs that are still asserted.
    pub fn eoi(&mut self, vector: u8) -> Vec<Msi> {
        let mut messages = Vec::new();
        for pin in 0..PINS {
            let entry = &mut self.table[usize::from(pin)];
            if *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && *entry as u8 == vector {
                *entry &= !REMOTE_IRR;
                messages.extend(self.send_level(pin));
            }
        }
        messages
    }

    /// Reads the 32-bit register at byte `offset` of its range.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            IOREGSEL => self.select.into(),
            IOWIN => match self.select {
                ID | ARBITRATION => self.id,
                VERSION => u32::from(PINS - 1) << 16 | 0x20,
                select => match self.entry(select) {
                    Some(pin) if select & 1 == 0 => self.table[pin] as u32,
                    Some(pin) => (self.table[pin] >> 32) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes the 32-bit register at byte `offset`; returns the messages this causes.
    pub fn write(&mut self, offset: u64, value: u32) -> Vec<Msi> {
        match offset {
            IOREGSEL => self.select = value as u8,
            IOWIN if self.select == ID => self.id = value & 0x0f00_0000,
            IOWIN => {
                if let Some(pin) = self.entry(self.select) {
                    return self.write_entry(pin as u8, self.select & 1 != 0, value).into_iter().collect();
                }
            }
            EOI => return self.eoi(value as u8),
            _ => {}
        }
        Vec::new()
    }

    fn write_entry(&mut self, pin: u8, high: bool, value: u32) -> Option<Msi> {
        let entry = &mut self.table[usize::from(pin)];
        if high {
            *entry = *entry & 0xffff_ffff | u64::from(value) << 32 & WRITABLE_HIGH;
        } else {
            *entry = *entry & !WRITABLE_LOW | u64::from(value) & WRITABLE_LOW;
            // Edge-triggered entries have no remote IRR; Linux clears a stuck one by switching to edge.
            if *entry & LEVEL == 0 {
                *entry &= !REMOTE_IRR;
            }
        }
        self.send_level(pin)
    }

    /// Sends a level-triggered interrupt if its input is asserted and no EOI is outstanding.
    fn send_level(&mut self, pin: u8) -> Option<Msi> {
        let entry = &mut self.table[usize::from(pin)];
        if *entry & (LEVEL | REMOTE_IRR | MASKED) != LEVEL || self.lines & (1 << pin) == 0 {
            return None;
        }
        // Only fixed and lowest-priority interrupts are ever ended.
        if *entry >> 8 & 7 <= 1 {
            *entry |= REMOTE_IRR;
        }
        Some(self.message(pin))
    }

    fn message(&self, pin: u8) -> Msi {
        let entry = self.table[usize::from(pin)];
        let destination = (entry >> 56) << 12 | (entry >> 49 & 0x7f) << 5;
        let logical = (entry >> 11 & 1) << 2;
        // Vector and delivery mode are where MSI data has them; a level is always an assertion.
        let level = if entry & LEVEL != 0 { 0xc000 } else { 0 };
        Msi { address: 0xfee0_0000 | destination | logical, data: entry as u32 & 0x7ff | level }
    }

    fn entry(&self, select: u8) -> Option<usize> {
        let pin = usize::from(select.checked_sub(TABLE)? / 2);
        (pin < self.table.len()).then_some(pin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(chip: &mut IoApic, register: u8, value: u32) -> Vec<Msi> {
        assert_eq!(chip.write(IOREGSEL, register.into()), []);
        chip.write(IOWIN, value)
    }

    fn read(chip: &mut IoApic, register: u8) -> u32 {
        assert_eq!(chip.write(IOREGSEL, register.into()), []);
        chip.read(IOWIN)
    }

    /// A chip with `pin`'s entry written the way Linux does: high half first.
    fn with(pin: u8, low: u32, high: u32) -> IoApic {
        let mut chip = IoApic::new();
        assert_eq!(write(&mut chip, 0x11 + 2 * pin, high), []);
        assert_eq!(write(&mut chip, 0x10 + 2 * pin, low), []);
        chip
    }

    #[test]
    fn registers() {
        let mut chip = IoApic::new();
        assert_eq!(read(&mut chip, 1), 0x0017_0020);
        for pin in 0..PINS {
            assert_eq!(read(&mut chip, 0x10 + 2 * pin), 0x1_0000);
            assert_eq!(read(&mut chip, 0x11 + 2 * pin), 0);
        }
        // Register, all ones written, what reads back.
        for (register, value) in
            [(0, 0x0f00_0000), (1, 0x0017_0020), (2, 0), (3, 0), (0x10, 0x1_afff), (0x3f, 0xfffe_0000), (0x40, 0)]
        {
            let mut chip = IoApic::new();
            assert_eq!(write(&mut chip, register, !0), []);
            assert_eq!(read(&mut chip, register), value, "register {register:#x}");
        }
    }

    #[test]
    fn entries_become_messages() {
        // Low half, high half, address, data.
        for (low, high, address, data) in [
            (0x0000_0030, 0x0000_0000, 0xfee0_0000, 0x0030),
            (0x0000_0831, 0x0300_0000, 0xfee0_3004, 0x0031),
            (0x0000_0931, 0xff00_0000, 0xfeef_f004, 0x0131),
            (0x0000_2731, 0x0100_0000, 0xfee0_1000, 0x0731),
            (0x0000_0031, 0x0102_0000, 0xfee0_1020, 0x0031),
        ] {
            let mut chip = with(4, low, high);
            let message = Msi { address, data };
            assert_eq!(chip.set_irq(4, true), Some(message));
            assert_eq!(chip.set_irq(4, true), None, "one edge, one message");
            assert_eq!(chip.set_irq(4, false), None);
            assert_eq!(chip.set_irq(4, true), Some(message));
        }
        assert_eq!(with(4, 0x30, 0x0102_0000).set_irq(4, true).unwrap().destination(), 0x101);
    }

    #[test]
    fn masked_edges_are_lost() {
        let mut chip = with(2, 0x1_0030, 0);
        assert_eq!(chip.set_irq(2, true), None);
        assert_eq!(write(&mut chip, 0x14, 0x30), []);
        assert_eq!(chip.set_irq(2, false), None);
        assert!(chip.set_irq(2, true).is_some());
    }

    #[test]
    fn levels_wait_for_eoi_and_repeat() {
        let message = Msi { address: 0xfee0_0000, data: 0xc039 };
        let mut chip = with(9, 0x8039, 0);
        assert_eq!(chip.set_irq(9, true), Some(message));
        assert_eq!(read(&mut chip, 0x22), 0xc039, "remote IRR");
        assert_eq!(chip.set_irq(9, false), None);
        assert_eq!(chip.set_irq(9, true), None);
        assert_eq!(chip.eoi(0x38), []);
        assert_eq!(chip.eoi(0x39), [message]);
        assert_eq!(chip.set_irq(9, false), None);
        assert_eq!(chip.write(EOI, 0x39), []);
        assert_eq!(read(&mut chip, 0x22), 0x8039);
        assert_eq!(chip.eoi(0x39), [], "nothing outstanding");
    }

    #[test]
    fn unmasking_an_asserted_level_sends_it() {
        let message = Msi { address: 0xfee0_0000, data: 0xc039 };
        let mut chip = with(9, 0x1_8039, 0);
        assert_eq!(chip.set_irq(9, true), None);
        assert_eq!(write(&mut chip, 0x22, 0x8039), [message]);
        assert_eq!(write(&mut chip, 0x22, 0x1_8039), []);
        assert_eq!(chip.eoi(0x39), [], "masked");
        assert_eq!(write(&mut chip, 0x22, 0x8039), [message]);
        // Linux' __eoi_ioapic_pin for old chips: mask and edge, then back.
        assert_eq!(write(&mut chip, 0x22, 0x1_0039), []);
        assert_eq!(write(&mut chip, 0x22, 0x8039), [message]);
    }

    #[test]
    fn one_vector_may_serve_several_inputs() {
        let mut chip = with(10, 0x8041, 0);
        assert_eq!(write(&mut chip, 0x10 + 22, 0x8041), []);
        assert!(chip.set_irq(10, true).is_some());
        assert!(chip.set_irq(11, true).is_some());
        assert_eq!(chip.eoi(0x41).len(), 2);
        assert_eq!(chip.set_irq(10, false), None);
        assert_eq!(chip.eoi(0x41).len(), 1);
    }

    #[test]
    fn nmi_entries_have_no_remote_irr() {
        let mut chip = with(5, 0x8400, 0);
        assert_eq!(chip.set_irq(5, true), Some(Msi { address: 0xfee0_0000, data: 0xc400 }));
        assert_eq!(read(&mut chip, 0x1a), 0x8400);
    }
}
