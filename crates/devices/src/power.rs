//! What a guest can ask of the machine as a whole, and the small ports that ask it.

use crate::state::{BadState, require};

/// A request that ends the VM or starts it afresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// System reset: the i8042, port 0x92, the reset control register or a keyboard controller pulse.
    Reset,
    /// ACPI S5.
    PowerOff,
    /// A write of this value to the debug-exit port.
    DebugExit(u32),
}

/// The debug-exit port (as QEMU's `isa-debug-exit`), for test guests. Four ports from here.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// A write of 1 to 4 bytes to the debug-exit port.
pub fn debug_exit(data: &[u8]) -> PowerEvent {
    let mut value = [0; 4];
    value[..data.len()].copy_from_slice(data);
    PowerEvent::DebugExit(u32::from_le_bytes(value))
}

/// The process exit code for a debug-exit value: `(value << 1) | 1`, of which the system keeps 8 bits.
pub fn debug_exit_code(value: u32) -> i32 {
    (value << 1 | 1) as i32
}

/// The reset control register (ICH9 datasheet 13.7.5), a byte in the middle of the PCI address port.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// What the FADT tells the guest to write there.
pub const RESET_CONTROL_VALUE: u8 = 0x06;

/// The reset control register's state.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    pub fn read(&self) -> u8 {
        self.value
    }

    /// Refuses a restored state that no guest can reach.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), BadState> {
        require("reset control", &[(self.value & !0x0e == 0, "undefined bits")])
    }

    /// Bit 2 going from 0 to 1 resets (bit 1 says how hard, which is all the same here).
    pub fn write(&mut self, value: u8) -> Option<PowerEvent> {
        let resets = value & !self.value & 4 != 0;
        self.value = value & 0x0e;
        resets.then_some(PowerEvent::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_exit_values() {
        for (data, value, code) in [(&[0][..], 0, 1), (&[0x10], 0x10, 33), (&[1, 2, 0, 0], 0x201, 0x403)] {
            assert_eq!(debug_exit(data), PowerEvent::DebugExit(value));
            assert_eq!(debug_exit_code(value), code);
        }
    }

    #[test]
    fn reset_control_wants_a_rising_bit() {
        // Linux' native_machine_emergency_restart BOOT_CF9: 2, then 6 or 0xe.
        for (writes, expected) in [
            (&[0x02, 0x06][..], Some(PowerEvent::Reset)),
            (&[0x06], Some(PowerEvent::Reset)),
            (&[0x02, 0x0e], Some(PowerEvent::Reset)),
            (&[0x02], None),
            (&[0x06, 0x06], None),
        ] {
            let mut register = ResetControl::default();
            let last = writes.iter().map(|&value| register.write(value)).last().unwrap();
            assert_eq!(last, expected, "{writes:x?}");
        }
    }
}
