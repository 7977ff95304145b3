//! The pair of 8259A interrupt controllers of a PC (Intel 8259A data sheet; 82371AB PIIX4 for ELCR).
//!
//! Pure state: [`Pic::set_irq`] moves input lines, [`Pic::intr`] is the master's INTR output, and
//! [`Pic::acknowledge`] is an interrupt acknowledge cycle. The slave sits on the master's IR2.
//!
//! As chipsets and other hypervisors do, an edge stays latched in IRR when its line drops again; the data
//! sheet would turn it into a spurious IR7.

use crate::state::{BadState, require};
use serde::{Deserialize, Serialize};

/// First of the master's two ports.
pub const MASTER_PORT: u16 = 0x20;
/// First of the slave's two ports.
pub const SLAVE_PORT: u16 = 0xa0;
/// First of the two edge/level control registers.
pub const ELCR_PORT: u16 = 0x4d0;

const CASCADE: u8 = 1 << 2;

/// Inputs that can be level-triggered: IRQ 0, 1, 2, 8 and 13 are always edges.
const MASTER_LEVELS: u8 = 0xf8;
const SLAVE_LEVELS: u8 = 0xde;

/// What the next write of the odd port is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Expect {
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Chip {
    /// Input levels, for edge detection.
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    /// Level-triggered inputs.
    elcr: u8,
    elcr_writable: u8,
    /// Upper five bits of the vector.
    vector: u8,
    /// The input of lowest priority; the next one is the highest.
    lowest: u8,
    expect: Expect,
    /// From ICW1: ICW4 follows, and no ICW3 does.
    wants_icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_auto_eoi: bool,
    special_mask: bool,
    special_nested: bool,
    read_isr: bool,
    /// The next read is an acknowledgement.
    poll: bool,
}

impl Chip {
    fn new(elcr_writable: u8) -> Chip {
        Chip {
            lines: 0,
            irr: 0,
            isr: 0,
            imr: 0,
            elcr: 0,
            elcr_writable,
            vector: 0,
            lowest: 7,
            expect: Expect::Mask,
            wants_icw4: false,
            single: false,
            auto_eoi: false,
            rotate_auto_eoi: false,
            special_mask: false,
            special_nested: false,
            read_isr: false,
            poll: false,
        }
    }

    fn check(&self, elcr_writable: u8) -> Result<(), BadState> {
        require(
            "8259",
            &[
                (self.elcr_writable == elcr_writable, "other interrupts can be levels"),
                (self.elcr & !elcr_writable == 0, "an edge is a level"),
                (self.vector & 7 == 0, "undefined bits in the vector"),
                (self.lowest <= 7, "no such input"),
            ],
        )
    }

    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << line;
        let was = self.lines & bit != 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.elcr & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if level && !was {
            self.irr |= bit;
        }
    }

    /// The input in `set` of highest priority, and its rank (0 is highest).
    fn first(&self, set: u8) -> Option<(u8, u8)> {
        (0..8).map(|rank| ((self.lowest + 1 + rank) & 7, rank)).find(|(line, _)| set & (1 << line) != 0)
    }

    /// The input to be served now: requested, unmasked, above everything in service.
    fn pending(&self) -> Option<u8> {
        let (line, rank) = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_nested {
            // A higher input of the slave may interrupt a lower one.
            in_service &= !CASCADE;
        }
        match self.first(in_service) {
            Some((_, served)) if served <= rank => None,
            _ => Some(line),
        }
    }

    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_auto_eoi {
            self.lowest = line;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.write_icw1(value);
        } else if value & 0x08 != 0 {
            // OCW3
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
            if value & 0x02 != 0 {
                self.read_isr = value & 0x01 != 0;
            }
            self.poll = value & 0x04 != 0;
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_icw1(&mut self, value: u8) {
        // Edges must come anew; levels that are still high count again.
        self.irr = self.lines & self.elcr;
        self.isr = 0;
        self.imr = 0;
        self.lowest = 7;
        self.auto_eoi = false;
        self.rotate_auto_eoi = false;
        self.special_mask = false;
        self.special_nested = false;
        self.read_isr = false;
        self.poll = false;
        self.wants_icw4 = value & 1 != 0;
        self.single = value & 2 != 0;
        self.expect = Expect::Icw2;
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        let served = self.first(self.isr).map(|(line, _)| line);
        match value >> 5 {
            0 => self.rotate_auto_eoi = false,
            4 => self.rotate_auto_eoi = true,
            // Non-specific EOI, 5 with rotation.
            command @ (1 | 5) => {
                if let Some(line) = served {
                    self.isr &= !(1 << line);
                    if command == 5 {
                        self.lowest = line;
                    }
                }
            }
            3 => self.isr &= !(1 << named),
            7 => {
                self.isr &= !(1 << named);
                self.lowest = named;
            }
            6 => self.lowest = named,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.wants_icw4 { Expect::Icw4 } else { Expect::Mask };
        self.expect = match self.expect {
            Expect::Mask => {
                self.imr = value;
                Expect::Mask
            }
            Expect::Icw2 => {
                self.vector = value & 0xf8;
                if self.single { after_icw3 } else { Expect::Icw3 }
            }
            // The cascade is wired; ICW3 can only confirm it.
            Expect::Icw3 => after_icw3,
            Expect::Icw4 => {
                self.special_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                Expect::Mask
            }
        };
    }

    fn read(&mut self, odd: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending() {
                Some(line) => {
                    self.acknowledge(line);
                    0x80 | line
                }
                None => 0,
            };
        }
        match (odd, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn write_elcr(&mut self, value: u8) {
        self.elcr = value & self.elcr_writable;
        // A level that is high requests at once; one that is low no longer does.
        self.irr = self.irr & !self.elcr | self.lines & self.elcr;
    }
}

/// Master and slave.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pic {
    master: Chip,
    slave: Chip,
    /// INTR as last told by [`Pic::intr_change`].
    told: bool,
}

impl Default for Pic {
    fn default() -> Pic {
        Pic::new()
    }
}

impl Pic {
    pub fn new() -> Pic {
        Pic { master: Chip::new(MASTER_LEVELS), slave: Chip::new(SLAVE_LEVELS), told: false }
    }

    /// Refuses a restored state that no guest can reach. What INTR was last told is forgotten:
    /// [`Pic::intr_change`] then tells it if it is high.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&mut self) -> Result<(), BadState> {
        self.master.check(MASTER_LEVELS)?;
        self.slave.check(SLAVE_LEVELS)?;
        self.told = false;
        self.cascade();
        Ok(())
    }

    /// Sets the level of ISA interrupt `irq` (0–15 but not 2, which is the cascade and ignored).
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            2 => return,
            0..8 => self.master.set_line(irq, level),
            8..16 => self.slave.set_line(irq - 8, level),
            _ => panic!("ISA has no IRQ {irq}"),
        }
        self.cascade();
    }

    /// The INTR output.
    pub fn intr(&self) -> bool {
        self.master.pending().is_some()
    }

    /// The level of INTR if it changed since this was last asked. Ask after every call that takes `&mut`.
    pub fn intr_change(&mut self) -> Option<bool> {
        let intr = self.intr();
        (std::mem::replace(&mut self.told, intr) != intr).then_some(intr)
    }

    /// An interrupt acknowledge cycle: the vector, or `None` if no request is left (the CPU should then see
    /// no interrupt at all; hardware would send a spurious IR7).
    pub fn acknowledge(&mut self) -> Option<u8> {
        let line = self.master.pending()?;
        self.master.acknowledge(line);
        let vector = if line == 2 {
            // Raised by the slave, so it has one pending: `cascade` keeps the line in step.
            let line = self.slave.pending().unwrap_or(7);
            self.slave.acknowledge(line);
            self.slave.vector | line
        } else {
            self.master.vector | line
        };
        self.cascade();
        Some(vector)
    }

    /// Reads a port of [`MASTER_PORT`], [`SLAVE_PORT`] (two each) or [`ELCR_PORT`] (two).
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.master.read(port & 1 != 0),
            0xa0 | 0xa1 => self.slave.read(port & 1 != 0),
            0x4d0 => self.master.elcr,
            0x4d1 => self.slave.elcr,
            _ => 0xff,
        };
        self.cascade();
        value
    }

    /// Writes a port; see [`Pic::read`].
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            0x4d0 => self.master.write_elcr(value),
            0x4d1 => self.slave.write_elcr(value),
            _ => {}
        }
        self.cascade();
    }

    /// Brings the master's IR2 in step with the slave's output. It follows the level, so that the slave's
    /// second request is seen after its first was taken.
    fn cascade(&mut self) {
        let level = self.slave.pending().is_some();
        self.master.lines = if level { self.master.lines | CASCADE } else { self.master.lines & !CASCADE };
        self.master.irr = if level { self.master.irr | CASCADE } else { self.master.irr & !CASCADE };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux' `init_8259A` leaves it, all inputs unmasked: vectors 0x30 and 0x38.
    fn linux(auto_eoi: bool) -> Pic {
        let mut pic = Pic::new();
        for (port, value) in [
            (0x21, 0xff),
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, if auto_eoi { 3 } else { 1 }),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 0x02),
            (0xa1, 0x01),
            (0x21, 0x00),
            (0xa1, 0x00),
        ] {
            pic.write(port, value);
        }
        pic
    }

    fn pulse(pic: &mut Pic, irq: u8) {
        pic.set_irq(irq, true);
        pic.set_irq(irq, false);
    }

    #[test]
    fn linux_probes_the_mask_register() {
        // arch/x86/kernel/i8259.c probe_8259A: mask all but the cascade and read it back.
        let mut pic = Pic::new();
        pic.write(0xa1, 0xff);
        pic.write(0x21, 0xfb);
        assert_eq!(pic.read(0x21), 0xfb);
        assert_eq!(pic.read(0xa1), 0xff);
    }

    #[test]
    fn vectors_and_priorities() {
        let mut pic = linux(false);
        assert_eq!(pic.intr_change(), None);
        for irq in [7, 4, 0] {
            pulse(&mut pic, irq);
        }
        assert_eq!(pic.intr_change(), Some(true));
        assert_eq!(pic.acknowledge(), Some(0x30));
        assert_eq!(pic.intr_change(), Some(false), "4 and 7 are below 0");
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x34));
        assert_eq!(pic.acknowledge(), None);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), Some(0x31), "1 nests into 4");
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0x12);
        pic.write(0x20, 0x0a);
        assert_eq!(pic.read(0x20), 0x80);
        pic.write(0x20, 0x61);
        pic.write(0x20, 0x64);
        assert_eq!(pic.acknowledge(), Some(0x37));
    }

    #[test]
    fn the_slave_goes_through_ir2() {
        let mut pic = linux(false);
        pulse(&mut pic, 8);
        pulse(&mut pic, 12);
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), Some(0x38), "IRQ 8 is above 3");
        assert!(!pic.intr());
        pic.write(0xa0, 0x20);
        assert!(!pic.intr(), "the master still serves its IR2");
        pic.write(0x20, 0x62);
        assert_eq!(pic.acknowledge(), Some(0x3c));
        pic.write(0xa0, 0x64);
        pic.write(0x20, 0x62);
        assert_eq!(pic.acknowledge(), Some(0x33));
    }

    #[test]
    fn masks() {
        let mut pic = linux(false);
        pic.write(0x21, 0xfe);
        pulse(&mut pic, 1);
        pulse(&mut pic, 9);
        assert!(!pic.intr());
        pic.write(0x21, 0xf9);
        assert_eq!(pic.acknowledge(), Some(0x31), "a masked edge is kept");
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x39));
    }

    #[test]
    fn edges_need_a_low_and_levels_repeat() {
        let mut pic = linux(false);
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), Some(0x35));
        pic.write(0x20, 0x20);
        pic.set_irq(5, true);
        assert!(!pic.intr(), "no second edge");
        pic.set_irq(5, false);
        pic.write(0x4d0, 0xff);
        assert_eq!(pic.read(0x4d0), 0xf8);
        pic.write(0x4d1, 0xff);
        assert_eq!(pic.read(0x4d1), 0xde);
        pic.set_irq(5, true);
        for _ in 0..3 {
            assert_eq!(pic.acknowledge(), Some(0x35));
            assert!(!pic.intr());
            pic.write(0x20, 0x20);
            assert!(pic.intr(), "the level is still high");
        }
        pic.set_irq(5, false);
        assert!(!pic.intr());
        assert_eq!(pic.acknowledge(), None);
    }

    #[test]
    fn automatic_eoi_and_its_rotation() {
        let mut pic = linux(true);
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), Some(0x30));
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), Some(0x30), "no EOI needed");
        pic.write(0x20, 0x80);
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), Some(0x30));
        pulse(&mut pic, 0);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), Some(0x31), "0 went to the end of the queue");
        assert_eq!(pic.acknowledge(), Some(0x30));
    }

    #[test]
    fn rotation_commands() {
        // OCW2 written while IR3 is in service with 2 and 4 waiting, and who comes after it.
        for (ocw2, next) in [(0x20, 0x31), (0xa0, 0x34), (0xe3, 0x34), (0xc4, 0x35), (0x63, 0x31)] {
            let mut pic = linux(false);
            pulse(&mut pic, 3);
            assert_eq!(pic.acknowledge(), Some(0x33));
            for irq in [1, 4, 5] {
                pulse(&mut pic, irq);
            }
            pic.write(0x20, ocw2);
            if ocw2 == 0xc4 {
                // Set priority ends nothing.
                pic.write(0x20, 0x63);
            }
            assert_eq!(pic.acknowledge(), Some(next), "OCW2 {ocw2:#x}");
        }
    }

    #[test]
    fn special_mask_mode_lets_lower_ones_in() {
        let mut pic = linux(false);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), Some(0x31));
        pulse(&mut pic, 6);
        pic.write(0x21, 0x02);
        assert!(!pic.intr());
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), Some(0x36));
        pic.write(0x20, 0x48);
        assert!(!pic.special_mask_on());
    }

    #[test]
    fn poll_mode_acknowledges() {
        let mut pic = linux(false);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
        pulse(&mut pic, 4);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x84);
        assert!(!pic.intr());
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0x10);
    }

    #[test]
    fn special_fully_nested_mode() {
        let mut pic = linux(false);
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 0x11)] {
            pic.write(port, value);
        }
        pulse(&mut pic, 12);
        assert_eq!(pic.acknowledge(), Some(0x3c));
        pulse(&mut pic, 9);
        assert_eq!(pic.acknowledge(), Some(0x39), "a higher input of the slave interrupts");
    }

    #[test]
    fn initialization_forgets_edges_and_keeps_levels() {
        let mut pic = linux(false);
        pic.write(0x4d0, 0x20);
        pic.set_irq(4, true);
        pic.set_irq(5, true);
        for (port, value) in [(0x20, 0x13), (0x21, 0x40), (0x21, 0x01)] {
            pic.write(port, value);
        }
        assert_eq!(pic.read(0x21), 0, "ICW1 clears the mask, and single mode has no ICW3");
        assert_eq!(pic.acknowledge(), Some(0x45));
    }

    impl Pic {
        fn special_mask_on(&self) -> bool {
            self.master.special_mask
        }
    }
}
