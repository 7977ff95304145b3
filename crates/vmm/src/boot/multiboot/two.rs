//! Multiboot 2.0: the header with its tags (3.1) and the information structure with its own (3.6).

use super::{Boot, Facts, Header, LOADER_NAME, Place, SEARCHED, Version, damaged, lacks, lower_and_upper, u32_at};
use crate::{Result, layout};

/// EAX at the entry.
pub(super) const LOADER_MAGIC: u32 = 0x36d7_6289;
const HEADER_MAGIC: u32 = 0xe852_50d6;
/// 32-bit protected mode of i386.
const ARCHITECTURE_I386: u32 = 0;
/// Magic, architecture, length, checksum.
const HEADER_FIXED: usize = 16;

/// A header tag that may be ignored if it cannot be served.
const OPTIONAL: u32 = 1;

/// Types of header tags.
mod ask {
    pub const END: u32 = 0;
    pub const INFORMATION: u32 = 1;
    pub const ADDRESS: u32 = 2;
    pub const ENTRY: u32 = 3;
    pub const CONSOLE: u32 = 4;
    pub const MODULE_ALIGNMENT: u32 = 6;
    /// Of EFI, which is not what boots here: for such a machine they say nothing.
    pub const EFI_BOOT_SERVICES: u32 = 7;
    pub const EFI_ENTRY_32: u32 = 8;
    pub const EFI_ENTRY_64: u32 = 9;
    pub const RELOCATABLE: u32 = 10;
}

/// Types of information tags.
mod tell {
    pub const END: u32 = 0;
    pub const COMMAND_LINE: u32 = 1;
    pub const LOADER_NAME: u32 = 2;
    pub const MODULE: u32 = 3;
    pub const MEMORY: u32 = 4;
    pub const MEMORY_MAP: u32 = 6;
    pub const ACPI_NEW: u32 = 15;
    pub const LOAD_BASE: u32 = 21;
}
const TOLD: [u32; 6] =
    [tell::COMMAND_LINE, tell::LOADER_NAME, tell::MODULE, tell::MEMORY, tell::MEMORY_MAP, tell::ACPI_NEW];

/// Where the header is.
pub(super) fn find(start: &[u8]) -> Option<usize> {
    (0..SEARCHED.min(start.len()).saturating_sub(HEADER_FIXED - 1)).step_by(8).find(|&at| {
        let word = |n: usize| u32_at(start, at + 4 * n).unwrap_or(0);
        let sum = (0..4).fold(0u32, |sum, n| sum.wrapping_add(word(n)));
        word(0) == HEADER_MAGIC && sum == 0
    })
}

/// Reads the header at `at` and its tags.
pub(super) fn parse(boot: &Boot, start: &[u8], at: usize) -> Result<Header> {
    let nonsense = || damaged(boot, "its Multiboot2 header makes no sense");
    let word = |at: usize| u32_at(start, at).ok_or_else(nonsense);
    if word(at + 4)? != ARCHITECTURE_I386 {
        return Err(lacks(boot, "another processor"));
    }
    let length = word(at + 8)? as usize;
    let end = at.checked_add(length).filter(|end| *end <= start.len()).ok_or_else(nonsense)?;
    let mut header = Header { version: Version::Two, place: None, entry: None, relocatable: false };
    let mut tag = at + HEADER_FIXED;
    while tag + 8 <= end {
        let (kind, flags) = (word(tag)? & 0xffff, word(tag)? >> 16);
        let size = word(tag + 4)? as usize;
        if size < 8 || size > end - tag {
            return Err(nonsense());
        }
        let body = &start[tag + 8..tag + size];
        let field = |n: usize| u32_at(body, 4 * n).ok_or_else(nonsense);
        match kind {
            ask::END => return Ok(header),
            ask::INFORMATION => check_request(boot, body, flags)?,
            ask::ADDRESS => {
                let (header_address, load) = (field(0)?, field(1)?);
                // -1: the file goes there from its beginning on.
                let file_offset = match load {
                    u32::MAX => Some(0),
                    load => header_address.checked_sub(load).and_then(|far| (at as u64).checked_sub(far.into())),
                };
                let load = if load == u32::MAX { header_address.checked_sub(at as u32) } else { Some(load) };
                let (file_offset, load) = file_offset.zip(load).ok_or_else(nonsense)?;
                header.place = Some(Place { file_offset, load, load_end: field(2)?, bss_end: field(3)? });
            }
            ask::ENTRY => header.entry = Some(field(0)?),
            ask::RELOCATABLE => header.relocatable = true,
            // Modules are always on pages; the serial port is a console.
            ask::CONSOLE | ask::MODULE_ALIGNMENT => {}
            ask::EFI_BOOT_SERVICES | ask::EFI_ENTRY_32 | ask::EFI_ENTRY_64 => {}
            _ if flags & OPTIONAL != 0 => {}
            5 => return Err(lacks(boot, "a framebuffer")),
            _ => return Err(lacks(boot, &format!("a feature (tag {kind})"))),
        }
        // The length of a damaged header need not be a multiple of 8.
        tag = (tag + size).next_multiple_of(8);
    }
    // GRUB does not insist on the end tag either.
    Ok(header)
}

fn check_request(boot: &Boot, types: &[u8], flags: u32) -> Result<()> {
    let wanted = types.chunks_exact(4).filter_map(|bytes| u32_at(bytes, 0));
    match wanted.into_iter().find(|kind| !TOLD.contains(kind)) {
        Some(kind) if flags & OPTIONAL == 0 => Err(lacks(boot, &format!("information of type {kind}"))),
        _ => Ok(()),
    }
}

/// The information structure. It points to nothing but itself, so that its place does not matter.
pub(super) fn information(facts: &Facts, _at: u32) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    let mut tag = |kind: u32, body: &[u8]| {
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&(8 + body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    };
    let string = |text: &str| [text.as_bytes(), &[0]].concat();
    let (lower, upper) = lower_and_upper(facts.boot);
    tag(tell::COMMAND_LINE, &string(&facts.command_line));
    tag(tell::LOADER_NAME, &string(LOADER_NAME));
    for module in facts.modules {
        tag(
            tell::MODULE,
            &[&module.start.to_le_bytes()[..], &module.end.to_le_bytes(), &string(&module.text)].concat(),
        );
    }
    tag(tell::MEMORY, &[lower.to_le_bytes(), upper.to_le_bytes()].concat());
    tag(tell::MEMORY_MAP, &memory_map(facts.boot.ram));
    tag(tell::ACPI_NEW, &facts.rsdp);
    if let Some(base) = facts.load_base {
        tag(tell::LOAD_BASE, &base.to_le_bytes());
    }
    tag(tell::END, &[]);
    let total = bytes.len() as u32;
    bytes[..4].copy_from_slice(&total.to_le_bytes());
    bytes
}

/// Size and version of an entry, then the entries: address, length, type, a reserved word.
fn memory_map(ram: u64) -> Vec<u8> {
    let mut bytes = [24u32.to_le_bytes(), 0u32.to_le_bytes()].concat();
    for entry in layout::memory_map(ram) {
        bytes.extend_from_slice(&entry.start.to_le_bytes());
        bytes.extend_from_slice(&entry.size.to_le_bytes());
        bytes.extend_from_slice(&u64::from(entry.kind as u32).to_le_bytes());
    }
    bytes
}
