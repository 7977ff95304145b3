//! What tells an operating system that PCI devices come and go: a general-purpose event and three registers, after QEMU's.
//!
//! The ACPI tables have code that reads, on the event, which slots have a new device ([`UP`]) and which devices are to go
//! ([`DOWN`]), and that writes which ones the operating system has let go of ([`EJECT`]). Slots are bits by device number. Pure
//! state; the event is level-triggered, [`Hotplug::sci`].

use crate::state::{BadState, require};
use serde::{Deserialize, Serialize};

/// Where its ports are, and how many there are.
pub const PORT: u16 = 0x640;
pub const LENGTH: u16 = 0x10;
/// Offsets of the registers, of 32 bits: reading one of the first two empties it.
pub const UP: u16 = 0;
pub const DOWN: u16 = 4;
pub const EJECT: u16 = 8;
/// Offset of the general-purpose event block (ACPI 6.5, 4.8.4.1): a byte of status and one of enable bits.
pub const EVENTS: u16 = 12;
pub const EVENTS_LENGTH: u8 = 2;
/// The event's number.
pub const EVENT: u8 = 1;

/// Slots that a device can be in.
const SLOTS: u32 = !0b11;

/// The registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hotplug {
    up: u32,
    down: u32,
    status: u8,
    enable: u8,
}

impl Hotplug {
    /// Refuses a restored state that no guest can have reached.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), BadState> {
        require("PCI hotplug", &[((self.up | self.down) & !SLOTS == 0, "a slot that has no device")])
    }

    /// A device has come to `slot`.
    pub fn plug(&mut self, slot: u8) {
        self.up |= 1 << slot & SLOTS;
        self.status |= 1 << EVENT;
    }

    /// The device in `slot` is to go. Says whether the operating system listens.
    pub fn ask_to_unplug(&mut self, slot: u8) -> bool {
        self.down |= 1 << slot & SLOTS;
        self.status |= 1 << EVENT;
        self.enable & 1 << EVENT != 0
    }

    /// Reads 1, 2 or 4 bytes at `offset`.
    pub fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let taken = match (offset, data.len()) {
            (UP, 4) => std::mem::take(&mut self.up),
            (DOWN, 4) => std::mem::take(&mut self.down),
            _ => {
                for (at, byte) in (offset..).zip(data) {
                    *byte = match at {
                        EVENTS => self.status,
                        at if at == EVENTS + 1 => self.enable,
                        _ => 0,
                    };
                }
                return;
            }
        };
        data.copy_from_slice(&taken.to_le_bytes());
    }

    /// Writes 1, 2 or 4 bytes at `offset`. Returns the slots whose devices the operating system has let go of.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> u32 {
        if let (EJECT, &[a, b, c, d]) = (offset, data) {
            return u32::from_le_bytes([a, b, c, d]) & SLOTS;
        }
        for (at, &byte) in (offset..).zip(data) {
            match at {
                EVENTS => self.status &= !byte,
                at if at == EVENTS + 1 => self.enable = byte,
                _ => {}
            }
        }
        0
    }

    /// The level of the SCI.
    pub fn sci(&self) -> bool {
        self.status & self.enable != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(hotplug: &mut Hotplug, offset: u16) -> u32 {
        let mut data = [0; 4];
        hotplug.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn devices_come_and_go() {
        let mut hotplug = Hotplug::default();
        hotplug.plug(5);
        hotplug.plug(31);
        assert!(!hotplug.sci(), "nobody listens");
        assert_eq!(hotplug.write(EVENTS + 1, &[1 << EVENT]), 0);
        assert!(hotplug.sci());
        assert_eq!(hotplug.write(EVENTS, &[1 << EVENT]), 0);
        assert!(!hotplug.sci());
        assert_eq!((read(&mut hotplug, UP), read(&mut hotplug, UP)), (1 << 5 | 1 << 31, 0));
        assert!(hotplug.ask_to_unplug(5) && hotplug.sci());
        assert_eq!(read(&mut hotplug, EVENTS), 0x0202);
        assert_eq!((read(&mut hotplug, DOWN), read(&mut hotplug, DOWN)), (1 << 5, 0));
        assert_eq!(hotplug.write(EJECT, &(1u32 << 5 | 1).to_le_bytes()), 1 << 5, "the host bridge stays");
        assert_eq!((hotplug.write(EJECT, &[0xff]), hotplug.write(UP, &[0xff; 4])), (0, 0));
        assert!(hotplug.check().is_ok());
        assert!(Hotplug { up: 1, ..Hotplug::default() }.check().is_err());
    }
}
