//! Guest RAM: anonymous host memory, allocated as the guest touches it.
//!
//! The one place of this crate with `unsafe`: RAM asks for huge pages, which halves what a TLB miss of
//! the host costs a guest under either engine.
#![allow(unsafe_code)]

use crate::config::show_size;
use crate::{Error, Result, layout};
use std::fs::File;
use std::os::fd::AsRawFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// RAM of `size` bytes in the pieces of [`layout::ram_pieces`].
///
/// # Errors
/// [`Error::User`] if the host cannot give that much.
pub fn allocate(size: u64) -> Result<GuestMemoryMmap> {
    let pieces: Vec<_> =
        layout::ram_pieces(size).into_iter().map(|(start, size)| (GuestAddress(start), size as usize)).collect();
    let memory = GuestMemoryMmap::from_ranges(&pieces).map_err(|error| {
        Error::user(format!("the host cannot give {} of memory ({error}); use a smaller --memory", show_size(size)))
    })?;
    for region in memory.iter() {
        // SAFETY: the range is exactly the region's own mapping, and the advice does not change its contents.
        // A kernel without huge pages refuses, and nothing is lost.
        unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
    Ok(memory)
}

/// Puts `length` bytes of `file` from `offset` on in the place of RAM at guest-physical address `gpa`, all
/// multiples of 4 KiB and within one piece of RAM. The guest's writes are its own and never reach the file.
///
/// # Errors
/// The host's.
///
/// # Panics
/// The range is not RAM.
pub fn map_file(memory: &GuestMemoryMmap, gpa: u64, length: u64, file: &File, offset: u64) -> std::io::Result<()> {
    let region = memory.find_region(GuestAddress(gpa)).expect("it is RAM");
    let start = gpa - region.start_addr().0;
    assert!(start + length <= region.len() && (gpa | length | offset).is_multiple_of(4096), "a range of one piece");
    // SAFETY: the range lies in the region's own mapping, of which only its address counts to those who hold
    // it; no Rust reference to guest memory exists. A private mapping of the same size and rights takes its
    // place, and goes with the region when that is unmapped.
    let address = unsafe {
        libc::mmap(
            region.as_ptr().add(start as usize).cast(),
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if address == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
