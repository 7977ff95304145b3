//! Guest RAM for tests and tools.

use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// RAM at `ranges`, of first address and size, as [`Engine::wants_files`](crate::Engine::wants_files): shared mappings of
/// a file in memory.
///
/// # Errors
/// The host gives no such file, or refuses a mapping.
pub fn in_file(ranges: &[(GuestAddress, usize)]) -> io::Result<GuestMemoryMmap> {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
    file.set_len(ranges.iter().map(|&(_, size)| size as u64).sum())?;
    let mut offset = 0;
    let mut pieces = Vec::new();
    for &(start, size) in ranges {
        pieces.push((start, size, Some(FileOffset::new(file.try_clone()?, offset))));
        offset += size as u64;
    }
    GuestMemoryMmap::from_ranges_with_files(pieces).map_err(io::Error::other)
}
