//! ELF images by the PVH boot protocol: a note names the 32-bit entry point, and a start-info structure
//! tells the kernel its memory map, modules and command line (Xen, docs/misc/pvh.pandoc).

use super::{
    Boot, Entry, Image, damaged, length, load_initrd, not_a_kernel, read_at, too_little_memory, write_command_line,
};
use crate::{Error, Result, layout};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const START_MAGIC: u32 = 0x336e_c578;
const ELFCLASS64: u8 = 2;
const EM_X86_64: u16 = 62;
/// Linked for fixed addresses: a program for an operating system is usually not.
const ET_EXEC: u16 = 2;
const PROGRAM_HEADER_SIZE: u64 = 56;
const PT_LOAD: u32 = 1;
/// More program headers than any kernel has; bounds the time an image can cost.
const PROGRAM_HEADERS_MAX: u16 = 128;

pub(super) fn load<F: Image>(
    memory: &GuestMemoryMmap,
    boot: &Boot,
    kernel: &mut F,
    initrd: Option<&mut F>,
) -> Result<Entry> {
    let end = check_headers(boot, kernel)?;
    let loaded = Elf::load(memory, None, kernel, None).map_err(|e| damaged(boot, &e.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(Error::user(format!(
            "kernel '{}' is an ELF file without a PVH note; use its bzImage, or build it with CONFIG_PVH",
            boot.kernel.display()
        )));
    };
    let mut info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: boot.rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        ..hvm_start_info::default()
    };
    if let Some(initrd) = initrd {
        let (paddr, size) = load_initrd(memory, boot, initrd, end, layout::LOW_RAM_LIMIT)?;
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
        put(memory, layout::PVH_MODULES, hvm_modlist_entry { paddr, size, ..hvm_modlist_entry::default() });
    }
    for (i, entry) in layout::memory_map(boot.ram).into_iter().enumerate() {
        let entry =
            hvm_memmap_table_entry { addr: entry.start, size: entry.size, type_: entry.kind as u32, reserved: 0 };
        put(memory, layout::PVH_MEMORY_MAP + i as u64 * size_of::<hvm_memmap_table_entry>() as u64, entry);
        info.memmap_entries += 1;
    }
    put(memory, layout::PVH_START_INFO, info);
    write_command_line(memory, boot.command_line);
    Ok(Entry::Pvh { rip: entry.0 as u32 })
}

fn put<T: vm_memory::ByteValued>(memory: &GuestMemoryMmap, gpa: u64, value: T) {
    memory.write_obj(value, GuestAddress(gpa)).expect("RAM below 1 MiB exists in every machine");
}

/// Checks every address and size in the headers against the file and RAM; returns the end of the image in
/// guest memory, zeroed data included.
fn check_headers<F: Image>(boot: &Boot, kernel: &mut F) -> Result<u64> {
    let size = length(kernel).map_err(|e| damaged(boot, &e.to_string()))?;
    let mut header = [0; 64];
    read_at(kernel, 0, &mut header).map_err(|_| not_a_kernel(boot))?;
    if header[4] != ELFCLASS64 || u16_at(&header, 18) != EM_X86_64 {
        return Err(Error::user(format!(
            "kernel '{}' is an ELF file for another processor; use a 64-bit x86 one",
            boot.kernel.display()
        )));
    }
    if u16_at(&header, 16) != ET_EXEC {
        return Err(not_a_kernel(boot));
    }
    let (offset, entry_size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if u64::from(entry_size) != PROGRAM_HEADER_SIZE || count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(not_a_kernel(boot));
    }
    let mut end = 0;
    for i in 0..u64::from(count) {
        let mut program = [0; PROGRAM_HEADER_SIZE as usize];
        let at = offset.checked_add(i * PROGRAM_HEADER_SIZE).filter(|at| *at < size);
        at.and_then(|at| read_at(kernel, at, &mut program).ok())
            .ok_or_else(|| damaged(boot, "its headers are cut off"))?;
        let (file_offset, address) = (u64_at(&program, 8), u64_at(&program, 24));
        let (file_size, memory_size) = (u64_at(&program, 32), u64_at(&program, 40));
        if file_offset.checked_add(file_size).is_none_or(|e| e > size) {
            return Err(damaged(boot, "it is shorter than its headers say"));
        }
        if u32_at(&program, 0) != PT_LOAD || memory_size == 0 {
            continue;
        }
        let Some(segment_end) =
            address.checked_add(memory_size).filter(|e| *e <= FILE_END_MAX && file_size <= memory_size)
        else {
            return Err(damaged(boot, "its headers have impossible sizes"));
        };
        if address < layout::HIGH_START {
            return Err(Error::user(format!(
                "kernel '{}' wants to be loaded at {address:#x}, below 1 MiB; use one linked higher",
                boot.kernel.display()
            )));
        }
        end = end.max(segment_end);
    }
    if end == 0 {
        return Err(not_a_kernel(boot));
    }
    if end > boot.ram.min(layout::LOW_RAM_LIMIT) {
        return Err(too_little_memory(boot, end));
    }
    Ok(end)
}

/// Bounds addresses in headers far below overflow.
const FILE_END_MAX: u64 = 1 << 48;

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
