//! A NOR flash chip with Intel's command set, byte-wide: where UEFI firmware keeps its variables (Intel StrataFlash
//! 28F640J3 data sheet, 9 and 11; OVMF's OvmfPkg/QemuFlashFvbServicesRuntimeDxe is the driver).
//!
//! Reads give the contents until a command changes that. A write is a command, or what the last command waits for.
//! Programming can only clear bits; erasing sets those of a whole block. Both are done at once, so that the chip is never
//! busy. Commands beside those that OVMF uses (buffered programming, lock bits, CFI query) are taken for "read array".
//!
//! The contents are the caller's to keep: [`Flash::write`] says what it changed.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What is erased at once, as in QEMU's chip: OVMF's PcdOvmfFirmwareBlockSize.
pub const BLOCK: u64 = 4096;

/// Commands. Any other is "read array".
const READ_STATUS: u8 = 0x70;
const CLEAR_STATUS: u8 = 0x50;
const PROGRAM: u8 = 0x10;
const PROGRAM_TOO: u8 = 0x40;
const ERASE: u8 = 0x20;
const CONFIRM: u8 = 0xd0;

/// Status bits. OVMF takes the chip for flash memory only if all are clear after "clear status", as QEMU's are, and not
/// for memory that can just be written; so the ready bit is set by what makes the chip ready again.
const READY: u8 = 1 << 7;
const ERASE_ERROR: u8 = 1 << 5;
const PROGRAM_ERROR: u8 = 1 << 4;

/// What the next access means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    #[default]
    Array,
    Status,
    /// The next write is data.
    Program,
    /// The next write confirms.
    Erase,
}

/// The chip but for its contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlashState {
    mode: Mode,
    status: u8,
}

/// The chip.
#[derive(Clone, Debug)]
pub struct Flash {
    bytes: Vec<u8>,
    state: FlashState,
}

impl Flash {
    /// A chip with these contents, a multiple of [`BLOCK`].
    pub fn new(bytes: Vec<u8>) -> Flash {
        assert!((bytes.len() as u64).is_multiple_of(BLOCK), "half a block of flash memory");
        Flash { bytes, state: FlashState::default() }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn state(&self) -> FlashState {
        self.state
    }

    /// Goes on in a saved state. Any will do.
    pub fn set_state(&mut self, state: FlashState) {
        self.state = state;
    }

    /// Reads 1 to 8 bytes at `offset`, which are within the chip.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        match self.state.mode {
            Mode::Array => data.copy_from_slice(&self.bytes[offset as usize..][..data.len()]),
            _ => data.fill(self.state.status),
        }
    }

    /// Writes 1 to 8 bytes at `offset`, which are within the chip; returns which of its contents changed by that.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Range<usize>> {
        let state = &mut self.state;
        match (state.mode, data[0]) {
            (Mode::Program, _) => {
                let range = offset as usize..offset as usize + data.len();
                self.bytes[range.clone()].iter_mut().zip(data).for_each(|(byte, new)| *byte &= new);
                *state = FlashState { mode: Mode::Status, status: state.status | READY };
                return Some(range);
            }
            (Mode::Erase, CONFIRM) => {
                let start = offset - offset % BLOCK;
                let range = start as usize..(start + BLOCK) as usize;
                self.bytes[range.clone()].fill(0xff);
                *state = FlashState { mode: Mode::Status, status: state.status | READY };
                return Some(range);
            }
            (Mode::Erase, _) => {
                *state = FlashState { mode: Mode::Status, status: state.status | READY | ERASE_ERROR | PROGRAM_ERROR };
            }
            (_, READ_STATUS) => state.mode = Mode::Status,
            (_, CLEAR_STATUS) => *state = FlashState::default(),
            (_, PROGRAM | PROGRAM_TOO) => state.mode = Mode::Program,
            (_, ERASE) => state.mode = Mode::Erase,
            (_, _) => state.mode = Mode::Array,
        }
        None
    }

    /// Tells the guest that its last change failed, because it could not be kept. What it reads then is the changed contents
    /// all the same: of a failed command's cells the data sheet promises nothing.
    pub fn fail(&mut self) {
        self.state.status |= PROGRAM_ERROR | ERASE_ERROR;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ_ARRAY: u8 = 0xff;

    fn read(flash: &Flash, offset: u64) -> u8 {
        let mut byte = [0];
        flash.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn ovmf_takes_it_for_flash() {
        // QemuFlashDetected: neither RAM, which keeps the command, nor ROM, which shows its contents again.
        let mut flash = Flash::new(vec![0xaa; 8192]);
        assert_eq!((flash.write(0, &[CLEAR_STATUS]), read(&flash, 0)), (None, 0xaa));
        assert_eq!((flash.write(0, &[READ_STATUS]), read(&flash, 0)), (None, 0));
        assert_eq!((flash.write(0, &[READ_ARRAY]), read(&flash, 0)), (None, 0xaa));
    }

    #[test]
    fn bits_are_cleared_one_by_one_and_set_by_the_block() {
        let mut flash = Flash::new(vec![0xff; 8192]);
        for (data, result) in [(0xf0, 0xf0), (0x0f, 0), (0xff, 0)] {
            assert_eq!(flash.write(5000, &[PROGRAM]), None);
            assert_eq!(flash.write(5000, &[data]), Some(5000..5001));
            assert_eq!((read(&flash, 5000), flash.bytes()[5000]), (READY, result));
        }
        assert_eq!(flash.write(5004, &[PROGRAM_TOO]), None);
        assert_eq!(flash.write(5004, &[1, 2, 3, 4]), Some(5004..5008));
        assert_eq!(flash.write(0, &[READ_ARRAY]), None);
        let mut wide = [0; 8];
        flash.read(5000, &mut wide);
        assert_eq!(wide, [0, 0xff, 0xff, 0xff, 1, 2, 3, 4]);
        assert_eq!(flash.write(8191, &[ERASE]), None);
        assert_eq!(flash.write(8191, &[CONFIRM]), Some(4096..8192));
        assert!(flash.bytes().iter().all(|byte| *byte == 0xff));
        assert_eq!(read(&flash, 0), READY);
    }

    #[test]
    fn what_is_not_confirmed_or_kept_is_an_error() {
        let mut flash = Flash::new(vec![0; 4096]);
        assert_eq!((flash.write(0, &[ERASE]), flash.write(0, &[READ_ARRAY])), (None, None));
        assert_eq!((read(&flash, 0), flash.bytes()[0]), (READY | ERASE_ERROR | PROGRAM_ERROR, 0));
        assert_eq!((flash.write(0, &[CLEAR_STATUS]), flash.write(0, &[PROGRAM])), (None, None));
        assert_eq!(flash.write(0, &[0]), Some(0..1));
        let saved = flash.state();
        flash.fail();
        assert_eq!(read(&flash, 0), READY | ERASE_ERROR | PROGRAM_ERROR);
        flash.set_state(saved);
        assert_eq!(read(&flash, 0), READY);
    }
}
