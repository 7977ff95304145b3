//! The i8042 keyboard controller without a keyboard (IBM PS/2 technical reference), and port 0x92.
//!
//! Guests use it to reset the machine, to open the A20 gate and to find out that nothing is plugged in.
//! For the last, a byte sent to a device is answered at once with "timed out", so that a driver's probe
//! does not wait for a keyboard that will not answer.

use crate::power::PowerEvent;
use crate::state::{BadState, hex, require};
use serde::{Deserialize, Serialize};

/// Data port.
pub const DATA: u16 = 0x60;
/// Command and status port.
pub const COMMAND: u16 = 0x64;
/// System control port A: A20 gate and fast reset.
pub const PORT_A: u16 = 0x92;
/// ISA interrupts of the two ports of the controller.
pub const KEYBOARD_IRQ: u8 = 1;
pub const AUX_IRQ: u8 = 12;

mod status {
    pub const OUTPUT_FULL: u8 = 1 << 0;
    pub const SYSTEM: u8 = 1 << 2;
    /// The last write was to the command port.
    pub const COMMAND: u8 = 1 << 3;
    pub const UNLOCKED: u8 = 1 << 4;
    /// The output byte is from the auxiliary port.
    pub const AUX: u8 = 1 << 5;
    pub const TIMEOUT: u8 = 1 << 6;
}

/// Bits of the command byte, RAM cell 0.
mod control {
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub const AUX_INTERRUPT: u8 = 1 << 1;
    pub const SYSTEM: u8 = 1 << 2;
    pub const KEYBOARD_OFF: u8 = 1 << 4;
    pub const AUX_OFF: u8 = 1 << 5;
}

/// "Resend": what a driver finds in the buffer with the time-out flag.
const NO_ANSWER: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0x55;
/// Output port: A20 open, not in reset.
const OUTPUT_PORT: u8 = 0x03;

/// The controller's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042 {
    /// The controller's RAM; cell 0 is the command byte.
    #[serde(with = "hex")]
    ram: [u8; 32],
    /// A byte for the guest, with its status flags.
    output: Option<(u8, u8)>,
    last_output: u8,
    /// A command that waits for its data byte.
    command: Option<u8>,
    last_was_command: bool,
    output_port: u8,
}

impl Default for I8042 {
    fn default() -> I8042 {
        I8042::new()
    }
}

impl I8042 {
    /// As firmware leaves it: both ports off.
    pub fn new() -> I8042 {
        let mut ram = [0; 32];
        ram[0] = control::SYSTEM | control::KEYBOARD_OFF | control::AUX_OFF;
        I8042 { ram, output: None, last_output: 0, command: None, last_was_command: false, output_port: OUTPUT_PORT }
    }

    /// Refuses a restored state that no guest can reach.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), BadState> {
        let flags = self.output.map_or(0, |(_, flags)| flags);
        let waits = self.command.is_none_or(|command| matches!(command, 0x60..=0x7f | 0xd1..=0xd4));
        require(
            "i8042",
            &[
                (flags & !(status::AUX | status::TIMEOUT) == 0, "undefined status bits"),
                (waits, "a command that waits for no data"),
            ],
        )
    }

    /// Reads port 0x60, 0x64 or 0x92.
    pub fn read(&mut self, port: u16) -> u8 {
        match port {
            DATA => {
                if let Some((byte, _)) = self.output.take() {
                    self.last_output = byte;
                }
                self.last_output
            }
            COMMAND => {
                let output = self.output.map_or(0, |(_, flags)| status::OUTPUT_FULL | flags);
                let command = if self.last_was_command { status::COMMAND } else { 0 };
                self.ram[0] & status::SYSTEM | status::UNLOCKED | command | output
            }
            PORT_A => self.output_port & 2,
            _ => 0xff,
        }
    }

    /// Writes port 0x60, 0x64 or 0x92; returns a reset request.
    pub fn write(&mut self, port: u16, value: u8) -> Option<PowerEvent> {
        match port {
            DATA => {
                self.last_was_command = false;
                self.write_data(value)
            }
            COMMAND => {
                self.last_was_command = true;
                self.command = None;
                self.write_command(value)
            }
            PORT_A => {
                self.output_port = self.output_port & !2 | value & 2;
                (value & 1 != 0).then_some(PowerEvent::Reset)
            }
            _ => None,
        }
    }

    /// The levels of IRQ 1 and IRQ 12.
    pub fn interrupts(&self) -> (bool, bool) {
        match self.output {
            Some((_, flags)) if flags & status::AUX != 0 => (false, self.ram[0] & control::AUX_INTERRUPT != 0),
            Some(_) => (self.ram[0] & control::KEYBOARD_INTERRUPT != 0, false),
            None => (false, false),
        }
    }

    fn write_command(&mut self, value: u8) -> Option<PowerEvent> {
        match value {
            0x20..=0x3f => self.answer(self.ram[usize::from(value & 0x1f)], 0),
            0x60..=0x7f | 0xd1..=0xd4 => self.command = Some(value),
            0xa7 => self.ram[0] |= control::AUX_OFF,
            0xa8 => self.ram[0] &= !control::AUX_OFF,
            // Interface tests find nothing wrong.
            0xa9 | 0xab => self.answer(0, 0),
            0xaa => {
                self.ram[0] |= control::SYSTEM;
                self.answer(SELF_TEST_PASSED, 0);
            }
            0xad => self.ram[0] |= control::KEYBOARD_OFF,
            0xae => self.ram[0] &= !control::KEYBOARD_OFF,
            // Input port: not locked.
            0xc0 => self.answer(0x80, 0),
            0xd0 => self.answer(self.output_port, 0),
            // Pulse the output port's bits that are 0 in the command; bit 0 is the CPU's reset.
            0xf0..=0xff => return (value & 1 == 0).then_some(PowerEvent::Reset),
            _ => {}
        }
        None
    }

    fn write_data(&mut self, value: u8) -> Option<PowerEvent> {
        match self.command.take() {
            Some(command @ 0x60..=0x7f) => self.ram[usize::from(command & 0x1f)] = value,
            Some(0xd1) => {
                self.output_port = value;
                return (value & 1 == 0).then_some(PowerEvent::Reset);
            }
            Some(0xd2) => self.answer(value, 0),
            // The controller has no auxiliary port, so its loopback does not answer either: Linux then
            // looks for no mouse. What is sent to a mouse times out.
            Some(0xd3) => {}
            Some(_) => self.answer(NO_ANSWER, status::AUX | status::TIMEOUT),
            None => {
                // Sending to the keyboard switches its port on.
                self.ram[0] &= !control::KEYBOARD_OFF;
                self.answer(NO_ANSWER, status::TIMEOUT);
            }
        }
        None
    }

    fn answer(&mut self, byte: u8, flags: u8) {
        self.output = Some((byte, flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a command and its data, and returns status and answer.
    fn ask(chip: &mut I8042, command: u8, data: &[u8]) -> (u8, u8) {
        assert_eq!(chip.write(COMMAND, command), None);
        for &byte in data {
            assert_eq!(chip.write(DATA, byte), None);
        }
        (chip.read(COMMAND), chip.read(DATA))
    }

    #[test]
    fn resets() {
        for (writes, expected) in [
            (&[(COMMAND, 0xfe)][..], true),
            (&[(COMMAND, 0xf0)], true),
            (&[(COMMAND, 0xff)], false),
            (&[(COMMAND, 0xd1), (DATA, 0xfe)], true),
            (&[(COMMAND, 0xd1), (DATA, 0xdf)], false),
            (&[(COMMAND, 0xd1), (COMMAND, 0xaa), (DATA, 0xfe)], false),
            (&[(PORT_A, 1)], true),
            (&[(PORT_A, 2)], false),
        ] {
            let mut chip = I8042::new();
            let last = writes.iter().map(|&(port, value)| chip.write(port, value)).last().unwrap();
            assert_eq!(last.is_some(), expected, "{writes:x?}");
        }
    }

    #[test]
    fn linux_probe_finds_a_controller_and_no_mouse() {
        // drivers/input/serio/i8042.c: flush, self test, command byte, AUX loopback.
        let mut chip = I8042::new();
        assert_eq!(chip.read(COMMAND) & status::OUTPUT_FULL, 0, "nothing to flush");
        let (state, answer) = ask(&mut chip, 0xaa, &[]);
        assert_eq!((state & 0x61, answer), (0x01, 0x55));
        let (_, byte) = ask(&mut chip, 0x20, &[]);
        assert_eq!(byte, 0x34);
        let (state, _) = ask(&mut chip, 0x60, &[byte & !0x30 | 1]);
        assert_eq!(state & 1, 0, "writing RAM answers nothing");
        assert_eq!(ask(&mut chip, 0x20, &[]).1, 0x05);
        let (state, _) = ask(&mut chip, 0xd3, &[0x5a]);
        assert_eq!(state & 1, 0, "no loopback");
    }

    #[test]
    fn a_keyboard_command_times_out_at_once() {
        let mut chip = I8042::new();
        ask(&mut chip, 0x60, &[0x05]);
        assert_eq!(chip.write(DATA, 0xf2), None);
        assert_eq!(chip.interrupts(), (true, false));
        assert_eq!(chip.read(COMMAND) & 0x61, 0x41);
        assert_eq!(chip.read(DATA), 0xfe);
        assert_eq!(chip.interrupts(), (false, false));
        assert_eq!(chip.read(DATA), 0xfe, "the buffer keeps its last byte");
    }

    #[test]
    fn a_mouse_command_times_out_on_the_other_interrupt() {
        let mut chip = I8042::new();
        ask(&mut chip, 0x60, &[0x07]);
        assert_eq!(chip.write(COMMAND, 0xd4), None);
        assert_eq!(chip.write(DATA, 0xff), None);
        assert_eq!(chip.interrupts(), (false, true));
        assert_eq!(chip.read(COMMAND) & 0x61, 0x61);
        chip.read(DATA);
        assert_eq!(chip.interrupts(), (false, false));
    }

    #[test]
    fn ram_and_output_port() {
        let mut chip = I8042::new();
        for cell in 1..32 {
            ask(&mut chip, 0x60 | cell, &[cell * 3]);
        }
        for cell in 1..32 {
            assert_eq!(ask(&mut chip, 0x20 | cell, &[]).1, cell * 3);
        }
        assert_eq!(ask(&mut chip, 0xd0, &[]).1, 0x03);
        assert_eq!(chip.read(PORT_A), 2, "A20 is open");
        assert_eq!(chip.write(PORT_A, 0), None);
        assert_eq!(ask(&mut chip, 0xd0, &[]).1, 0x01);
        assert_eq!(ask(&mut chip, 0xd2, &[0x77]).1, 0x77);
        assert_eq!(ask(&mut chip, 0xab, &[]).1, 0);
        assert_eq!(ask(&mut chip, 0xc0, &[]).1, 0x80);
    }

    #[test]
    fn status_shows_the_last_port_written() {
        let mut chip = I8042::new();
        assert_eq!(chip.write(COMMAND, 0xae), None);
        assert_eq!(chip.read(COMMAND) & 8, 8);
        assert_eq!(chip.write(DATA, 0xed), None);
        assert_eq!(chip.read(COMMAND) & 8, 0);
    }
}
