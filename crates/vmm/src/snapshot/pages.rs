//! Which pages a snapshot holds: a table of extents, each with the CRC-32 of its bytes.
//!
//! Pages are numbered through all pieces of RAM in ascending order, so page n lies at byte 4096 n of `memory`.
//! An extent has at most [`EXTENT_MAX`] pages, so that checking one takes little memory. A page in an extent
//! may be a hole of the file, and is all zeros then; in a snapshot without parent a page in no extent is too.

use super::PAGE;
use super::manifest::{Checksum, Hash};
use std::io::Read;

/// Most pages of an extent: 2 MiB.
pub const EXTENT_MAX: u64 = 512;

const MAGIC: &[u8; 8] = b"AVPAGES1";
const ENTRY: usize = 16;

/// Pages in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub first: u64,
    pub count: u32,
    /// CRC-32 (IEEE 802.3) of the pages' bytes.
    pub crc: u32,
}

impl Extent {
    /// First byte in `memory`, and how many.
    pub fn bytes(&self) -> (u64, usize) {
        (self.first * PAGE, self.count as usize * PAGE as usize)
    }
}

/// Size of a table of `extents`.
pub fn file_size(extents: u64) -> u64 {
    MAGIC.len() as u64 + extents * ENTRY as u64
}

/// The file: magic, then for each extent the first page (8 bytes), the count and the CRC (4 each).
pub fn encode(extents: &[Extent]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(file_size(extents.len() as u64) as usize);
    bytes.extend(MAGIC);
    for extent in extents {
        bytes.extend(extent.first.to_le_bytes());
        bytes.extend(extent.count.to_le_bytes());
        bytes.extend(extent.crc.to_le_bytes());
    }
    bytes
}

/// Reads a table of `extents` entries for a machine of `pages` pages: ascending extents that do not overlap.
/// Gives up at the first that makes no sense, so that no more is read or kept than does.
///
/// # Errors
/// What is wrong with it, in words that follow "its table of pages", or the host's failure.
pub fn read(mut from: impl Read, extents: u64, pages: u64) -> std::io::Result<Result<(Vec<Extent>, Checksum), String>> {
    let mut hash = Hash::default();
    let mut magic = [0; MAGIC.len()];
    from.read_exact(&mut magic)?;
    hash.add(&magic);
    if magic != *MAGIC {
        return Ok(Err("is none of anyvisor's".into()));
    }
    let mut table = Vec::new();
    let mut end = 0;
    let mut buffer = vec![0; ENTRY * 4096];
    while (table.len() as u64) < extents {
        let entries = (extents - table.len() as u64).min(4096) as usize;
        let bytes = &mut buffer[..ENTRY * entries];
        from.read_exact(bytes)?;
        hash.add(bytes);
        for entry in bytes.as_chunks::<ENTRY>().0 {
            let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
            let first = u64::from(word(0)) | u64::from(word(4)) << 32;
            let extent = Extent { first, count: word(8), crc: word(12) };
            let count = u64::from(extent.count);
            if count == 0 || count > EXTENT_MAX || first < end || first >= pages || pages - first < count {
                return Ok(Err(format!("makes no sense at entry {}", table.len())));
            }
            end = first + count;
            table.push(extent);
        }
    }
    Ok(Ok((table, hash.finish())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8], extents: u64, pages: u64) -> Option<Vec<Extent>> {
        Some(read(bytes, extents, pages).ok()?.ok()?.0)
    }

    #[test]
    fn tables_round_trip() {
        let extent = |first, count, crc| Extent { first, count, crc };
        let extents = [extent(0, 1, 7), extent(1, 512, !0), extent(1 << 20, 3, 0)];
        let bytes = encode(&extents);
        assert_eq!(bytes.len() as u64, file_size(3));
        let (found, checksum) = read(&bytes[..], 3, (1 << 20) + 3).unwrap().unwrap();
        assert_eq!((&found[..], checksum), (&extents[..], Checksum::of(&bytes)));
        assert_eq!(decode(&bytes, 3, (1 << 20) + 2), None, "beyond the end of RAM");
        assert_eq!(decode(&encode(&[]), 0, 0), Some(vec![]));
        let many: Vec<_> = (0..10_000).map(|n| extent(2 * n, 1, n as u32)).collect();
        assert_eq!(decode(&encode(&many), 10_000, 20_000), Some(many));
    }

    #[test]
    fn impossible_tables_are_refused() {
        let extent = |first, count| Extent { first, count, crc: 0 };
        for bad in [
            &[extent(0, 0)][..],
            &[extent(0, 513)],
            &[extent(u64::MAX, 1)],
            &[extent(u64::MAX - 3, 512)],
            &[extent(5, 2), extent(6, 1)],
            &[extent(5, 2), extent(0, 1)],
        ] {
            assert_eq!(decode(&encode(bad), bad.len() as u64, 1000), None, "{bad:?}");
        }
        let good = encode(&[extent(1, 1)]);
        for end in 0..good.len() {
            assert_eq!(decode(&good[..end], 1, 1000), None, "cut at {end}");
        }
    }
}
