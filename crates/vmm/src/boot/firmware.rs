//! Firmware in place of a kernel: a ROM image whose last byte is the last below 1 MiB.
//!
//! A processor starts at FFFFFFF0h, in the ROM's copy at the end of the first 4 GiB (SDM vol. 3A 9.1.4), and the
//! first thing that a PC's firmware does is to jump from there to its copy below 1 MiB, F000:xxxx. Here only that
//! copy exists, in RAM, as behind a chipset that has shadowed it; so the processor starts at F000:FFF0, which are
//! the same bytes.

use super::{Entry, Image, length};
use crate::config::show_size;
use crate::{Error, Result};
use std::io::SeekFrom;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// End of the ROM in memory.
const END: u64 = 1 << 20;
/// Largest image: it may begin where video memory and the ROMs of adapters end.
const SIZE_MAX: u64 = 256 << 10;
/// ROMs come in such multiples.
const UNIT: u64 = 4 << 10;

/// Loads the image.
///
/// # Errors
/// [`Error::User`] if it cannot be read or has no size that a ROM has.
pub(super) fn load<F: Image>(memory: &GuestMemoryMmap, path: &Path, image: &mut F) -> Result<Entry> {
    let name = path.display();
    let unreadable = |error: String| Error::user(format!("cannot read firmware '{name}': {error}"));
    let size = length(image).map_err(|e| unreadable(e.to_string()))?;
    if size == 0 || size > SIZE_MAX || !size.is_multiple_of(UNIT) {
        return Err(Error::user(format!(
            "firmware '{name}' is {} long; give a BIOS image of {} to {}, in steps of {}",
            show_size(size),
            show_size(UNIT),
            show_size(SIZE_MAX),
            show_size(UNIT)
        )));
    }
    image.seek(SeekFrom::Start(0)).map_err(|e| unreadable(e.to_string()))?;
    memory
        .read_exact_volatile_from(GuestAddress(END - size), image, size as usize)
        .map_err(|e| unreadable(e.to_string()))?;
    Ok(Entry::Firmware)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyvisor_x86::VcpuState;
    use anyvisor_x86::segment::index::CS;
    use std::io::Cursor;

    fn load_bytes(bytes: &[u8]) -> Result<(GuestMemoryMmap, Entry)> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let entry = load(&memory, Path::new("bios.bin"), &mut Cursor::new(bytes))?;
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
    fn sizes_that_no_rom_has_are_refused() {
        for size in [0, 1, 65_535, (256 << 10) + 4096, 1 << 20] {
            let message = load_bytes(&vec![0; size]).unwrap_err().to_string();
            assert!(message.contains("bios.bin") && message.contains("256K") && !message.contains('\n'), "{message}");
        }
    }
}
