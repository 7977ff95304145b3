//! Guest RAM: anonymous host memory, allocated as the guest touches it.
//!
//! The one place of this crate with `unsafe`: RAM asks for huge pages, which halves what a TLB miss of
//! the host costs a guest under either engine.
#![allow(unsafe_code)]

use crate::config::show_size;
use crate::{Error, Result, layout};
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
