//! The flash chip with UEFI variables, and the file that keeps them. What a vCPU changes is written to the file before
//! its access ends. In a snapshot the file is named and not held, as disks' images are.
//!
//! Where the host refuses a write, the guest is told so, and chip and file differ from then on. So the next write is one of the
//! whole chip, and nothing is saved before the file has it.

use crate::disk::Stamp;
use crate::variables::Variables;
use crate::{Error, Result};
use anyvisor_devices::flash::{Flash, FlashState};
use serde::{Deserialize, Serialize};

/// Chip and file.
pub(super) struct VariablesChip {
    pub flash: Flash,
    file: Variables,
    /// The file lacks something that the chip has: a write has failed, and none has succeeded since.
    failed: bool,
}

/// The same in a snapshot.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariablesState {
    chip: FlashState,
    file: Stamp,
}

impl VariablesChip {
    /// A chip with the contents of `file`.
    pub fn new(file: Variables, bytes: Vec<u8>) -> VariablesChip {
        VariablesChip { flash: Flash::new(bytes), file, failed: false }
    }

    pub fn length(&self) -> u64 {
        self.flash.bytes().len() as u64
    }

    /// A vCPU's write of 1 to 8 bytes, within the chip.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(changed) = self.flash.write(offset, data) else { return };
        let lacking = if self.failed { 0..self.flash.bytes().len() } else { changed };
        match self.file.write(lacking.start, &self.flash.bytes()[lacking]) {
            Ok(()) => self.failed = false,
            Err(error) => {
                self.flash.fail();
                // The guest may try for ever.
                if !std::mem::replace(&mut self.failed, true) {
                    tracing::warn!("cannot write UEFI variables to '{}': {error}", self.file.path().display());
                }
            }
        }
    }

    /// The chip's state, with all that the guest has changed on the host's disk.
    ///
    /// # Errors
    /// The host's.
    pub fn save(&mut self) -> Result<VariablesState> {
        if self.failed {
            self.file.write(0, self.flash.bytes()).map_err(|error| self.trouble("cannot write", error))?;
            self.failed = false;
        }
        let file = self.file.flush().map_err(|error| self.trouble("cannot write", error))?;
        Ok(VariablesState { chip: self.flash.state(), file })
    }

    /// What about the file is not as it was when `state` was saved.
    ///
    /// # Errors
    /// The host's.
    pub fn difference(&self, state: &VariablesState) -> Result<Option<String>> {
        let now = self.file.stamp().map_err(|error| self.trouble("cannot look at", error))?;
        Ok((now != state.file).then(|| {
            format!(
                "'{}', the file for UEFI variables, has changed since; put it back as it was then (a copy made with cp -p \
                 while the VM was paused or had ended)",
                self.file.path().display()
            )
        }))
    }

    pub fn restore(&mut self, state: &VariablesState) {
        self.flash.set_state(state.chip);
    }

    fn trouble(&self, what: &str, error: std::io::Error) -> Error {
        Error::host(format!("{what} '{}', the file for UEFI variables", self.file.path().display()), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clears the bits of byte `offset` that `value` has not; the chip's status then, and what the chip has there.
    fn program(chip: &mut VariablesChip, offset: u64, value: u8) -> (u8, u8) {
        chip.write(offset, &[0x50]);
        chip.write(offset, &[0x10]);
        chip.write(offset, &[value]);
        let mut status = [0];
        chip.flash.read(offset, &mut status);
        (status[0], chip.flash.bytes()[offset as usize])
    }

    #[test]
    fn what_the_file_could_not_take_is_written_later() {
        const GOOD: u8 = 0x80;
        const BAD: u8 = 0xb0;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vars");
        std::fs::write(&path, [0xff; 8192]).unwrap();
        let (file, bytes) = Variables::open(&path).unwrap();
        let mut chip = VariablesChip::new(file, bytes);
        let kept = |offset: usize| std::fs::read(&path).unwrap()[offset];
        assert_eq!((program(&mut chip, 1, 0x5a), kept(1)), ((GOOD, 0x5a), 0x5a));
        let before = chip.save().unwrap();

        chip.file.reopen(false);
        for offset in 2..4 {
            assert_eq!((program(&mut chip, offset, 0x5a), kept(offset as usize)), ((BAD, 0x5a), 0xff));
        }
        let message = chip.save().unwrap_err().to_string();
        assert!(message.contains("cannot write") && message.contains("vars'"), "{message}");
        assert_eq!(chip.difference(&before).unwrap(), None, "nothing was written");

        chip.file.reopen(true);
        chip.save().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), chip.flash.bytes());
        chip.file.reopen(false);
        assert_eq!(program(&mut chip, 5000, 0x5a), (BAD, 0x5a));
        chip.file.reopen(true);
        assert_eq!(program(&mut chip, 7, 0x5a), (GOOD, 0x5a));
        assert_eq!((kept(5000), kept(7)), (0x5a, 0x5a), "another write brings it too");
    }
}
