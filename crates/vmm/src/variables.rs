//! The file that holds UEFI variables: what is in the flash chip that firmware finds below its own flash memory.
//!
//! It is locked as long as it is open, as a disk's image is, and what the guest changes is written to it at once: that
//! outlives this process, and after a save the host.

use crate::config::show_size;
use crate::disk::{self, Stamp};
use crate::{Error, Result, layout};
use anyvisor_devices::flash::BLOCK;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The open file.
pub struct Variables {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Variables {
    /// Opens and locks the file at `path`; with its contents.
    ///
    /// # Errors
    /// [`Error::User`]: why it cannot be used, and what to do.
    pub fn open(path: &Path) -> Result<(Variables, Vec<u8>)> {
        let shown = path.display();
        let trouble = |error: io::Error| {
            Error::user(format!(
                "cannot open '{shown}', the file for UEFI variables: {error}; check --firmware FILE,vars="
            ))
        };
        let file = disk::open_file(path, false).map_err(trouble)?;
        let found = file.metadata().map_err(trouble)?;
        let length = found.len();
        if !found.is_file() || length == 0 || length > layout::VARIABLES_MAX || !length.is_multiple_of(BLOCK) {
            return Err(Error::user(format!(
                "'{shown}' cannot hold UEFI variables: that is a file of at most {}, in steps of {}; make one from what \
                 comes with the firmware: cp /usr/share/OVMF/OVMF_VARS_4M.fd FILE",
                show_size(layout::VARIABLES_MAX),
                show_size(BLOCK)
            )));
        }
        if !disk::lock(&file, false).map_err(trouble)? {
            return Err(Error::user(format!(
                "'{shown}', the file for UEFI variables, is in use by another program; end that, or give this VM its own"
            )));
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0).map_err(trouble)?;
        Ok((Variables { path: path.to_owned(), file, length }, bytes))
    }

    /// Takes the file from the host's disk again, such that it can be written or not.
    #[cfg(test)]
    pub fn reopen(&mut self, writable: bool) {
        self.file = disk::open_file(&self.path, !writable).unwrap();
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// Writes what has changed. Called on vCPUs' threads, which may not do more than that.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset as u64)
    }

    /// What tells whether the file is still the same, once all of it is on the host's disk.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> io::Result<Stamp> {
        self.file.sync_data()?;
        self.stamp()
    }

    /// The same without waiting for the disk.
    ///
    /// # Errors
    /// The host's.
    pub fn stamp(&self) -> io::Result<Stamp> {
        let data = self.file.metadata()?;
        Ok(Stamp::new(data.len(), &data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_hold_variables_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vars");
        let refused = || {
            let message = Variables::open(&path).err().expect("an error").to_string();
            assert!(message.contains("vars'") && !message.contains('\n'), "{message}");
            message
        };
        assert!(refused().contains("No such file"));
        for length in [0, 4097, layout::VARIABLES_MAX + BLOCK] {
            File::create(&path).unwrap().set_len(length).unwrap();
            assert!(refused().contains("at most 1M"));
        }
        std::fs::write(&path, [7; 8192]).unwrap();
        let (one, bytes) = Variables::open(&path).unwrap();
        assert!(refused().contains("in use"));
        assert_eq!((bytes.as_slice(), one.length()), (&[7; 8192][..], 8192));
        one.write(8190, &[1, 2]).unwrap();
        let stamp = one.flush().unwrap();
        drop(one);
        let (again, bytes) = Variables::open(&path).unwrap();
        assert_eq!((&bytes[8188..], again.stamp().unwrap()), (&[7, 7, 1, 2][..], stamp));
    }
}
