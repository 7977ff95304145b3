//! bzImage by the Linux boot protocol, version 2.12 and later (Documentation/x86/boot.rst): by its 64-bit entry
//! where the kernel has one, else by the 32-bit entry.

use super::{
    Boot, Entry, Image, command_line_fits, damaged, length, load_initrd, not_a_kernel, read_at, too_little_memory,
    write_command_line,
};
use crate::{Error, Result, layout};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{KernelLoader, bzimage::BzImage};
use std::io::Read;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

const HEADER_OFFSET: u64 = 0x1f1;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Oldest protocol that says whether there is a 64-bit entry point.
const VERSION_MIN: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// "Undefined" boot loader, as the protocol has it for those without a number.
const LOADER_UNDEFINED: u8 = 0xff;
/// The 64-bit entry point's distance from the load address.
const ENTRY_64: u64 = 0x200;
/// `setup_data` type of a random seed (arch/x86/include/uapi/asm/bootparam.h, SETUP_RNG_SEED).
const SETUP_RNG_SEED: u32 = 9;

/// Whether [`load`] would take the image.
pub(super) fn check<F: Image>(boot: &Boot, kernel: &mut F) -> Result<()> {
    let header = read_header(boot, kernel)?;
    choose_address(boot, &header).map(drop)
}

pub(super) fn load<F: Image>(
    memory: &GuestMemoryMmap,
    boot: &Boot,
    kernel: &mut F,
    initrd: Option<&mut F>,
) -> Result<Entry> {
    let header = read_header(boot, kernel)?;
    let start = choose_address(boot, &header)?;
    let is_64_bit = header.xloadflags & XLF_KERNEL_64 != 0;
    BzImage::load(memory, Some(GuestAddress(start)), kernel, None).map_err(|e| damaged(boot, &e.to_string()))?;

    // `init_size` is what the kernel uses before it reads the memory map.
    let end = start + u64::from(header.init_size);
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: boot.rsdp, ..boot_params::default() };
    if let Some(initrd) = initrd {
        let limit = u64::from(header.initrd_addr_max) + 1;
        let (address, size) = load_initrd(memory, boot, initrd, end, limit)?;
        // Both are below 4 GiB because low RAM is.
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    command_line_fits(boot.command_line, header.cmdline_size as usize)?;
    write_command_line(memory, boot.command_line);
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.code32_start = start as u32;
    params.hdr.setup_data = write_seed(memory)?;
    for (slot, entry) in params.e820_table.iter_mut().zip(layout::memory_map(boot.ram)) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind as u32 };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE)).expect("RAM below 1 MiB exists in every machine");
    Ok(if is_64_bit { Entry::Linux64 { rip: start + ENTRY_64 } } else { Entry::Linux32 { rip: start as u32 } })
}

/// The setup header, as long as the image says it is (offset 201h holds its end), rest zero.
fn read_header<F: Image>(boot: &Boot, kernel: &mut F) -> Result<setup_header> {
    let mut header = setup_header::default();
    read_at(kernel, HEADER_OFFSET, header.as_mut_slice()).map_err(|_| not_a_kernel(boot))?;
    let header_end = 0x202 + u64::from(header.jump >> 8);
    let used = header_end.saturating_sub(HEADER_OFFSET) as usize;
    if let Some(beyond) = header.as_mut_slice().get_mut(used..) {
        beyond.fill(0);
    }
    if header.boot_flag != 0xaa55 || header.header != HEADER_MAGIC {
        return Err(not_a_kernel(boot));
    }
    let name = boot.kernel.display();
    if header.version < VERSION_MIN || header.loadflags & LOADED_HIGH == 0 {
        return Err(Error::user(format!("kernel '{name}' is older than Linux 3.8; use a newer one")));
    }
    // The payload's length in the file, in 16-byte paragraphs, against the file's.
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup = (setup_sectors + 1) * 512;
    let payload = u64::from(header.syssize) * 16;
    let size = length(kernel).map_err(|e| damaged(boot, &e.to_string()))?;
    // The last paragraph may be short: memtest86+'s is.
    if size + 15 < setup + payload || payload <= ENTRY_64 {
        return Err(damaged(boot, &format!("{size} bytes long where its header says {}", setup + payload)));
    }
    Ok(header)
}

/// Where to load: where the kernel prefers. Lower would not save memory, because a relocatable kernel then
/// moves itself up to there before it unpacks (boot.rst, `pref_address`).
fn choose_address(boot: &Boot, header: &setup_header) -> Result<u64> {
    let low_ram = boot.ram.min(layout::LOW_RAM_LIMIT);
    let start = header.pref_address;
    if header.init_size == 0 || !(layout::HIGH_START..1 << 32).contains(&start) {
        return Err(damaged(boot, "its header has impossible sizes"));
    }
    let end = start + u64::from(header.init_size);
    if end > low_ram {
        return Err(too_little_memory(boot, end));
    }
    Ok(start)
}

/// A `setup_data` node with 32 random bytes, which Linux 6.0 and later mix into their pool: a CPU model
/// without RDRAND would wait for entropy otherwise.
fn write_seed(memory: &GuestMemoryMmap) -> Result<u64> {
    let mut node = [0; 16 + 32];
    node[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    node[12..16].copy_from_slice(&32u32.to_le_bytes());
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut node[16..]))
        .map_err(|e| Error::host("cannot read /dev/urandom", e))?;
    memory.write_slice(&node, GuestAddress(layout::RNG_SEED)).expect("RAM below 1 MiB exists in every machine");
    Ok(layout::RNG_SEED)
}
