//! Guest RAM in files: the file for a caller who maps it, or all of it mapped, for tests and tools.

use rustix::fs::{MemfdFlags, fstatfs, memfd_create};
use std::fs::File;
use std::io;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// What files with guest RAM are called, in /proc/PID/maps for instance.
pub const FILE_NAME: &str = "guest-ram";

/// A file of `size` bytes in memory.
///
/// # Errors
/// The host gives none, or none of that size.
pub fn ram_file(size: u64) -> io::Result<File> {
    let file = File::from(memfd_create(FILE_NAME, MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    Ok(file)
}

/// Whether `file` is in a pool of huge pages (hugetlbfs), of which only whole huge pages can be mapped.
pub fn is_in_pool(file: &File) -> bool {
    /// `HUGETLBFS_MAGIC` (Linux uapi magic.h).
    const MAGIC: i64 = 0x9584_58f6;
    fstatfs(file).is_ok_and(|system| system.f_type == MAGIC)
}

/// RAM at `ranges`, of first address and size, as [`Engine::wants_files`](crate::Engine::wants_files): shared mappings of
/// a file in memory.
///
/// # Errors
/// The host gives no such file, or refuses a mapping.
pub fn in_file(ranges: &[(GuestAddress, usize)]) -> io::Result<GuestMemoryMmap> {
    let file = ram_file(ranges.iter().map(|&(_, size)| size as u64).sum())?;
    let mut offset = 0;
    let mut pieces = Vec::new();
    for &(start, size) in ranges {
        pieces.push((start, size, Some(FileOffset::new(file.try_clone()?, offset))));
        offset += size as u64;
    }
    GuestMemoryMmap::from_ranges_with_files(pieces).map_err(io::Error::other)
}
