//! Multiboot 0.6.96: the header (3.1) and the information structure (3.3).

use super::{Boot, Facts, Header, LOADER_NAME, Place, Version, damaged, lacks, lower_and_upper, u32_at};
use crate::{Result, layout};

/// EAX at the entry.
pub(super) const LOADER_MAGIC: u32 = 0x2bad_b002;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header begins within so many bytes of the file, on 4 bytes.
const SEARCHED: usize = 8192;

/// Header flags: modules on pages, memory information, video modes, and the address fields.
const FLAG_PAGE_ALIGN: u32 = 1 << 0;
const FLAG_MEMORY: u32 = 1 << 1;
const FLAG_VIDEO: u32 = 1 << 2;
const FLAG_ADDRESSES: u32 = 1 << 16;
/// "If the boot loader sees any of these bits set but doesn't understand the flag … it should fail to load".
const FLAGS_DEMANDS: u32 = 0xffff;

/// Where the header is.
pub(super) fn find(start: &[u8]) -> Option<usize> {
    let word = |at| u32_at(start, at);
    (0..SEARCHED.min(start.len()).saturating_sub(11)).step_by(4).find(|&at| {
        let (Some(magic), Some(flags), Some(checksum)) = (word(at), word(at + 4), word(at + 8)) else { return false };
        magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0
    })
}

/// Reads the header at `at`. Of video modes a kernel is told that there are none.
pub(super) fn parse(boot: &Boot, start: &[u8], at: usize) -> Result<Header> {
    let cut = || damaged(boot, "its Multiboot header is cut off");
    let word = |n: usize| u32_at(start, at + 4 * n).ok_or_else(cut);
    let flags = word(1)?;
    let unknown = flags & FLAGS_DEMANDS & !(FLAG_PAGE_ALIGN | FLAG_MEMORY | FLAG_VIDEO);
    if unknown != 0 {
        return Err(lacks(boot, &format!("a feature (flags {unknown:#x})")));
    }
    let mut header = Header { version: Version::One, place: None, entry: None, relocatable: false };
    if flags & FLAG_ADDRESSES != 0 {
        let (header_address, load) = (word(3)?, word(4)?);
        let before = header_address.checked_sub(load).and_then(|distance| (at as u64).checked_sub(distance.into()));
        let file_offset = before.ok_or_else(|| damaged(boot, "its Multiboot header has impossible addresses"))?;
        header.place = Some(Place { file_offset, load, load_end: word(5)?, bss_end: word(6)? });
        header.entry = Some(word(7)?);
    }
    Ok(header)
}

/// Bytes of the structure up to and without the fields of video.
const FIXED: u32 = 88;
const HAS_MEMORY: u32 = 1 << 0;
const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MEMORY_MAP: u32 = 1 << 6;
const HAS_LOADER_NAME: u32 = 1 << 9;

/// The information structure for address `at`, with what it points to behind it.
pub(super) fn information(facts: &Facts, at: u32) -> Vec<u8> {
    let mut bytes = vec![0; FIXED as usize];
    let mut put = |offset: usize, value: u32| bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    let (lower, upper) = lower_and_upper(facts.boot);
    let modules_size = 16 * facts.modules.len() as u32;
    let map: Vec<u8> = memory_map(facts.boot.ram);
    put(0, HAS_MEMORY | HAS_COMMAND_LINE | HAS_MODULES | HAS_MEMORY_MAP | HAS_LOADER_NAME);
    put(4, lower);
    put(8, upper);
    let modules_at = at + FIXED;
    put(20, facts.modules.len() as u32);
    put(24, modules_at);
    let map_at = modules_at + modules_size;
    put(44, map.len() as u32);
    put(48, map_at);
    let mut strings = Vec::new();
    let strings_at = map_at + map.len() as u32;
    let mut string = |text: &str| {
        let place = strings_at + strings.len() as u32;
        strings.extend_from_slice(text.as_bytes());
        strings.push(0);
        place
    };
    put(16, string(&facts.command_line));
    put(64, string(LOADER_NAME));
    for module in facts.modules {
        for value in [module.start, module.end, string(&module.text), 0] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    }
    [bytes, map, strings].concat()
}

/// The memory map: each entry's size without the field that says it, then as from INT 15h, AX=E820h.
fn memory_map(ram: u64) -> Vec<u8> {
    let entry = |entry: layout::MapEntry| {
        let mut bytes = 20u32.to_le_bytes().to_vec();
        bytes.extend_from_slice(&entry.start.to_le_bytes());
        bytes.extend_from_slice(&entry.size.to_le_bytes());
        bytes.extend_from_slice(&(entry.kind as u32).to_le_bytes());
        bytes
    };
    layout::memory_map(ram).into_iter().flat_map(entry).collect()
}
