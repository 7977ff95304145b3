//! Firmware in place of a kernel: a ROM image whose last byte is the last below 4 GiB.
//!
//! A processor starts at FFFFFFF0h, 16 bytes before the ROM's end (SDM vol. 3A 9.1.4). UEFI firmware runs there, in flash
//! memory ([`with_flash`]). The first thing that a PC's BIOS does is to jump from there to its copy below 1 MiB,
//! F000:xxxx. For a small image only that copy exists, in RAM, as behind a chipset that has shadowed it; so the processor
//! starts at F000:FFF0, which are the same bytes.

use super::{Entry, Image, length};
use crate::config::show_size;
use crate::{Error, Result, layout};
use std::io::SeekFrom;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// End of the BIOS in memory.
const END: u64 = 1 << 20;
/// Largest BIOS: it may begin where video memory and the ROMs of adapters end. What is larger is UEFI firmware.
const BIOS_MAX: u64 = 256 << 10;
/// ROMs come in such multiples.
const UNIT: u64 = 4 << 10;

/// `memory`, with flash memory if the image is too large for the space below 1 MiB.
///
/// # Errors
/// As for [`load`]; or the host cannot give the memory.
pub(super) fn with_flash<F: Image>(memory: GuestMemoryMmap, path: &Path, image: &mut F) -> Result<GuestMemoryMmap> {
    let size = size(path, image)?;
    if size > BIOS_MAX { crate::memory::with_flash(&memory, size) } else { Ok(memory) }
}

/// Loads the image: into the flash memory that [`with_flash`] made for it, or below 1 MiB.
///
/// # Errors
/// [`Error::User`] if it cannot be read or has no size that a ROM has.
pub(super) fn load<F: Image>(memory: &GuestMemoryMmap, path: &Path, image: &mut F) -> Result<Entry> {
    let size = size(path, image)?;
    let (end, entry) = if size > BIOS_MAX { (layout::HIGH_RAM, Entry::Flash) } else { (END, Entry::Bios) };
    image.seek(SeekFrom::Start(0)).map_err(|error| unreadable(path, &error.to_string()))?;
    memory
        .read_exact_volatile_from(GuestAddress(end - size), image, size as usize)
        .map_err(|error| unreadable(path, &error.to_string()))?;
    Ok(entry)
}

fn size<F: Image>(path: &Path, image: &mut F) -> Result<u64> {
    let size = length(image).map_err(|error| unreadable(path, &error.to_string()))?;
    if size == 0 || size > layout::FLASH_MAX || !size.is_multiple_of(UNIT) {
        return Err(Error::user(format!(
            "firmware '{}' is {} long; give a BIOS image of at most {} or UEFI firmware of at most {}, in steps of {}",
            path.display(),
            show_size(size),
            show_size(BIOS_MAX),
            show_size(layout::FLASH_MAX),
            show_size(UNIT)
        )));
    }
    Ok(size)
}

fn unreadable(path: &Path, error: &str) -> Error {
    Error::user(format!("cannot read firmware '{}': {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyvisor_x86::VcpuState;
    use anyvisor_x86::segment::index::CS;
    use std::io::Cursor;

    fn load_bytes(bytes: &[u8]) -> Result<(GuestMemoryMmap, Entry)> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let (path, mut image) = (Path::new("bios.bin"), Cursor::new(bytes));
        let memory = with_flash(memory, path, &mut image)?;
        let entry = load(&memory, path, &mut image)?;
        Ok((memory, entry))
    }

    #[test]
    fn the_image_ends_at_1_mib_and_starts_16_bytes_before() {
        for size in [64 << 10, 128 << 10, 256 << 10] {
            let mut image = vec![0xaa; size];
            image[size - 16] = 0xea;
            let (memory, entry) = load_bytes(&image).unwrap();
            let byte = |gpa: u64| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
            let start = END - size as u64;
            assert_eq!((byte(start - 1), byte(start), byte(END - 1), byte(END)), (0, 0xaa, 0xaa, 0));
            let mut state = VcpuState::reset(0, 0x600);
            entry.apply(&mut state);
            let first = state.segments.seg[CS].base + state.rip;
            assert_eq!((first, byte(first), state.segments.seg[CS].selector), (0xf_fff0, 0xea, 0xf000));
            let reset = VcpuState::reset(0, 0x600);
            assert_eq!((state.gpr, state.cr0, state.rflags), (reset.gpr, reset.cr0, reset.rflags));
        }
    }

    #[test]
    fn a_large_image_ends_at_4_gib_and_starts_16_bytes_before() {
        for size in [260 << 10, 1920 << 10, 16 << 20] {
            let mut image = vec![0xaa; size];
            image[size - 16] = 0xe9;
            let (memory, entry) = load_bytes(&image).unwrap();
            assert_eq!(crate::memory::flash_size(&memory), size as u64);
            let byte = |gpa: u64| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
            assert_eq!((byte((1 << 32) - size as u64), byte((1 << 32) - 1), byte(END - 1)), (0xaa, 0xaa, 0));
            let mut state = VcpuState::reset(0, 0x600);
            entry.apply(&mut state);
            assert_eq!(byte(state.segments.seg[CS].base + state.rip), 0xe9);
            assert_eq!(state, VcpuState::reset(0, 0x600));
        }
    }

    #[test]
    fn sizes_that_no_rom_has_are_refused() {
        for size in [0, 1, 65_535, (2 << 20) + 512, (16 << 20) + 4096] {
            let message = load_bytes(&vec![0; size]).unwrap_err().to_string();
            assert!(message.contains("bios.bin") && message.contains("256K") && !message.contains('\n'), "{message}");
            assert!(message.contains("16M") && message.contains("4K"), "{message}");
        }
    }
}
