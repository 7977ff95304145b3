//! The guest's root file system: busybox and a script.

use anyvisor_initramfs::Archive;

/// The archive's bytes.
pub fn build(busybox: &[u8]) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.program("bin/busybox", busybox).link("bin/sh", "busybox").program("init", include_bytes!("init.sh"));
    archive.finish()
}
