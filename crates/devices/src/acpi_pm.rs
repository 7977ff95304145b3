//! The ACPI fixed hardware: PM1a events and control, and the power management timer (ACPI 6.5, 4.8).
//!
//! Pure state. The SCI is a level, [`AcpiPm::sci`]. Registers lie in one block of [`LENGTH`] ports:
//! PM1 status at 0, PM1 enable at 2, PM1 control at 4, the timer at 8.

use crate::power::PowerEvent;
use crate::state::{BadState, LATEST, require};
use serde::{Deserialize, Serialize};

/// Where the block is, unless the machine chooses another place (it tells the guest in the FADT).
pub const PORT: u16 = 0x600;
/// Where a PIIX4's is as firmware sets it up, and where OVMF takes it to be when it powers off.
pub const PIIX_PORT: u16 = 0xb000;
/// Ports in the block.
pub const LENGTH: u16 = 0x10;
/// Offsets of the register blocks, for the FADT.
pub const PM1_EVENT: u16 = 0;
pub const PM1_CONTROL: u16 = 4;
pub const TIMER: u16 = 8;

/// The timer's frequency in Hz; it has 32 bits.
pub const TIMER_FREQUENCY: u64 = 3_579_545;

/// SLP_TYP for S5, for the DSDT's `_S5`.
pub const SLEEP_TYPE_S5: u8 = 5;

const TIMER_STATUS: u16 = 1 << 0;
const POWER_BUTTON: u16 = 1 << 8;
/// Status bits that a write of 1 clears: timer, bus master, global lock, power and sleep button, RTC, wake.
const STATUS_BITS: u16 = 0x8731;
/// Enable bits: timer, global lock, power and sleep button, RTC.
const ENABLE_BITS: u16 = 0x0721;
/// Control bits that are kept: SCI_EN, bus master reload, global release, SLP_TYP.
const CONTROL_BITS: u16 = 0x1c07;
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_ENABLE: u16 = 1 << 13;

/// The fixed hardware's registers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    /// Value of the timer's top bit up to which status is worked out.
    timer_top: u64,
}

fn timer(now_ns: u64) -> u64 {
    (u128::from(now_ns) * u128::from(TIMER_FREQUENCY) / 1_000_000_000) as u64
}

impl AcpiPm {
    /// After reset. SCI_EN is set from the start: the platform has no legacy mode, and its FADT no SMI
    /// command port (ACPI 6.5, 4.8.2.5).
    pub fn new() -> AcpiPm {
        AcpiPm { control: SCI_ENABLE, ..AcpiPm::default() }
    }

    /// Refuses a restored state that no guest can have reached by guest time `now_ns`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, now_ns: u64) -> Result<(), BadState> {
        require(
            "ACPI PM",
            &[
                (now_ns <= LATEST, "a time too far in the future"),
                (self.status & !STATUS_BITS == 0, "undefined status bits"),
                (self.enable & !ENABLE_BITS == 0, "undefined enable bits"),
                (self.control & !CONTROL_BITS == 0 && self.control & SCI_ENABLE != 0, "an impossible PM1 control"),
                (self.timer_top <= timer(now_ns) >> 31, "its timer was seen in the future"),
            ],
        )
    }

    /// Reads 1, 2 or 4 bytes at `offset`, all within one register.
    pub fn read(&mut self, offset: u16, data: &mut [u8], now_ns: u64) {
        self.poll(now_ns);
        let mut block = [0; LENGTH as usize];
        block[0..2].copy_from_slice(&self.status.to_le_bytes());
        block[2..4].copy_from_slice(&self.enable.to_le_bytes());
        block[4..6].copy_from_slice(&self.control.to_le_bytes());
        block[8..12].copy_from_slice(&(timer(now_ns) as u32).to_le_bytes());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = block.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes 1, 2 or 4 bytes at `offset`; returns a power-off request.
    pub fn write(&mut self, offset: u16, data: &[u8], now_ns: u64) -> Option<PowerEvent> {
        self.poll(now_ns);
        let mut event = None;
        for (at, &byte) in (offset..).zip(data) {
            let shift = 8 * (at & 1);
            let bits = u16::from(byte) << shift;
            let lane = 0xff << shift;
            match at & !1 {
                0 => self.status &= !(bits & STATUS_BITS),
                2 => self.enable = self.enable & !lane | bits & ENABLE_BITS,
                4 => {
                    event = event.or(self.write_control(lane, bits));
                }
                _ => {}
            }
        }
        event
    }

    /// As [`AcpiPm::write`], but SLP_TYP 0 powers off too, as with the PIIX4 that QEMU makes: OVMF writes that without
    /// having looked into the DSDT.
    pub fn write_as_piix(&mut self, offset: u16, data: &[u8], now_ns: u64) -> Option<PowerEvent> {
        let event = self.write(offset, data, now_ns);
        let control = match (offset, data) {
            (PM1_CONTROL, &[low, high, ..]) => u16::from_le_bytes([low, high]),
            _ => return event,
        };
        let soft_off = control & SLEEP_ENABLE != 0 && control >> 10 & 7 == 0;
        event.or(soft_off.then_some(PowerEvent::PowerOff))
    }

    fn write_control(&mut self, lane: u16, bits: u16) -> Option<PowerEvent> {
        // SLP_EN is write-only; SCI_EN belongs to the platform.
        let kept = self.control & !lane | SCI_ENABLE;
        self.control = kept | bits & CONTROL_BITS;
        let sleeps = bits & SLEEP_ENABLE != 0;
        let type_s5 = (self.control >> 10 & 7) as u8 == SLEEP_TYPE_S5;
        (sleeps && type_s5).then_some(PowerEvent::PowerOff)
    }

    /// Works out the timer's status bit: its top bit has changed (ACPI 6.5, 4.8.2.1).
    pub fn poll(&mut self, now_ns: u64) {
        let top = timer(now_ns) >> 31;
        if top > self.timer_top {
            self.status |= TIMER_STATUS;
            self.timer_top = top;
        }
    }

    /// When [`AcpiPm::poll`] will raise the SCI for the timer; `None` unless the guest enabled that.
    pub fn next_event(&self) -> Option<u64> {
        let wanted = self.enable & TIMER_STATUS != 0 && self.status & TIMER_STATUS == 0;
        let tick = u128::from(self.timer_top + 1) << 31;
        wanted.then(|| (tick * 1_000_000_000).div_ceil(u128::from(TIMER_FREQUENCY)) as u64)
    }

    /// The user pressed the power button. Says whether the guest has enabled its event; a guest that has not
    /// may clear the status unseen when it does.
    pub fn press_power_button(&mut self) -> bool {
        self.status |= POWER_BUTTON;
        self.enable & POWER_BUTTON != 0
    }

    /// The level of the SCI.
    pub fn sci(&self) -> bool {
        self.control & SCI_ENABLE != 0 && self.status & self.enable & ENABLE_BITS != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pm: &mut AcpiPm, offset: u16, now: u64) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data, now);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_timer_counts_at_its_frequency() {
        let mut pm = AcpiPm::new();
        // It wraps at 32 bits, after 1,199.9 s.
        for (now, ticks) in [(0, 0), (1_000_000, 3579), (1_000_000_000, 3_579_545), (1_200_000_000_000, 486_704)] {
            let mut data = [0; 4];
            pm.read(TIMER, &mut data, now);
            assert_eq!(u32::from_le_bytes(data), ticks, "at {now} ns");
        }
    }

    #[test]
    fn the_timer_status_rises_with_its_top_bit() {
        let mut pm = AcpiPm::new();
        assert_eq!(pm.next_event(), None);
        assert_eq!(pm.write(2, &[1, 0], 0), None);
        let due = pm.next_event().unwrap();
        assert_eq!(due / 1_000_000_000, (1 << 31) / TIMER_FREQUENCY);
        pm.poll(due - 1);
        assert!(!pm.sci());
        pm.poll(due);
        assert!(pm.sci());
        assert_eq!(pm.next_event(), None);
        assert_eq!(pm.write(0, &[1, 0], due), None);
        assert!(!pm.sci());
        assert!(pm.next_event().unwrap() > due);
    }

    #[test]
    fn the_power_button_raises_the_sci() {
        let mut pm = AcpiPm::new();
        assert!(!pm.press_power_button());
        assert!(!pm.sci(), "not enabled");
        assert_eq!(pm.write(PM1_EVENT + 2, &[0x20, 0x01], 0), None);
        assert!(pm.press_power_button());
        assert!(pm.sci());
        assert_eq!(read(&mut pm, PM1_EVENT, 0), 0x100);
        assert_eq!(pm.write(PM1_EVENT, &[0xff, 0x00], 0), None);
        assert!(pm.sci(), "other bits cleared");
        assert_eq!(pm.write(PM1_EVENT + 1, &[0x01], 0), None);
        assert!(!pm.sci());
    }

    #[test]
    fn writable_bits() {
        let mut pm = AcpiPm::new();
        assert_eq!(read(&mut pm, PM1_CONTROL, 0), 1);
        for (offset, value, expected) in [(2, 0xffff, 0x0721), (4, 0x0000, 0x0001), (4, 0x03ff, 0x0007)] {
            assert_eq!(pm.write(offset, &u16::to_le_bytes(value), 0), None);
            assert_eq!(read(&mut pm, offset, 0), expected);
        }
        let mut data = [0; 4];
        pm.read(14, &mut data, 0);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
    }

    #[test]
    fn ovmf_powers_off() {
        // ResetSystemLib clears bits 10 to 13 and then sets the last.
        let mut pm = AcpiPm::new();
        assert_eq!(pm.write_as_piix(4, &[1, 0], 0), None);
        assert_eq!(pm.write_as_piix(4, &[1, 0x20], 0), Some(PowerEvent::PowerOff));
        assert_eq!(pm.write_as_piix(4, &[1, 0x24], 0), None);
        assert_eq!(pm.write_as_piix(4, &[1, SLEEP_TYPE_S5 << 2 | 0x20], 0), Some(PowerEvent::PowerOff));
        assert_eq!(pm.write_as_piix(2, &[0, 0x20], 0), None);
    }

    #[test]
    fn s5_powers_off() {
        let s5 = u16::from(SLEEP_TYPE_S5) << 10;
        // Writes to PM1 control in turn, and the event of the last. Linux writes SLP_TYP, then SLP_EN too.
        for (writes, expected) in [
            (&[(4, s5), (4, s5 | 0x2000)][..], Some(PowerEvent::PowerOff)),
            (&[(4, s5 | 0x2001)], Some(PowerEvent::PowerOff)),
            (&[(4, s5)], None),
            (&[(4, 0x2000)], None),
            (&[(4, 0x0400 | 0x2000)], None),
        ] {
            let mut pm = AcpiPm::new();
            let last = writes.iter().map(|&(at, value)| pm.write(at, &u16::to_le_bytes(value), 0)).last().unwrap();
            assert_eq!(last, expected, "{writes:x?}");
        }
        let mut pm = AcpiPm::new();
        assert_eq!(pm.write(5, &[(s5 >> 8) as u8 | 0x20], 0), Some(PowerEvent::PowerOff), "by its high byte");
        let mut pm = AcpiPm::new();
        assert_eq!(pm.write(2, &[0, 0, 1, (s5 >> 8) as u8 | 0x20], 0), Some(PowerEvent::PowerOff), "as a dword");
    }
}
