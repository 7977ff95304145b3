//! Loads a kernel, and leaves the bootstrap processor where the kernel's boot protocol wants it.
//!
//! Three protocols: Linux's own for bzImage ([`linux`], entered at the decompressor, so that it runs in the guest
//! and KASLR works, in 64-bit mode or, for a 32-bit kernel, in 32-bit protected mode), Multiboot for images with
//! one of its headers ([`multiboot`]) and PVH for other ELF images ([`pvh`]), both entered in 32-bit protected mode
//! without paging. The image decides which.
//!
//! Or firmware is loaded, which finds its kernel itself ([`firmware`]).
//!
//! Images are untrusted: whatever the bytes are, loading ends in a kernel in guest memory or in one line of
//! [`Error::User`]. Every address that an image names is checked against RAM before it is used. The
//! structures below 1 MiB ([`layout`]) are written after the image, which must not reach there; only Multiboot
//! has none there.

mod firmware;
mod linux;
mod multiboot;
mod pvh;

use crate::config::{Module, show_mib};
use crate::{Error, Result, layout};
use anyvisor_x86::bits::{cr0, cr4, efer, gpr, rflags};
use anyvisor_x86::segment::index::{CS, DS, ES, FS, GS, SS};
use anyvisor_x86::{DescriptorTable, Segment, VcpuState, msr};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

/// Largest kernel or initrd file in bytes. The check against RAM is tighter; this bounds arithmetic.
const FILE_MAX: u64 = 1 << 40;

/// What to boot.
#[derive(Debug)]
pub struct Boot<'a> {
    pub kernel: &'a Path,
    pub initrd: Option<&'a Path>,
    /// Further modules, for a Multiboot kernel.
    pub modules: &'a [Module],
    pub command_line: &'a str,
    /// RAM in bytes.
    pub ram: u64,
    /// Address of the ACPI RSDP.
    pub rsdp: u64,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, identity page tables, RSI = `boot_params` (Documentation/x86/boot.rst, 64-bit protocol).
    Linux64 { rip: u64 },
    /// 32-bit protected mode without paging, ESI = `boot_params` (Documentation/x86/boot.rst, 32-bit protocol).
    Linux32 { rip: u32 },
    /// 32-bit protected mode without paging, EBX = `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h).
    Pvh { rip: u32 },
    /// As [`Entry::Pvh`], with EBX = the information structure and EAX = `magic`, which says of which version
    /// (Multiboot 0.6.96, 3.2; Multiboot 2.0, 3.3).
    Multiboot { rip: u32, magic: u32, info: u32 },
    /// As after reset, but in the copy of the firmware below 1 MiB.
    Bios,
    /// As after reset.
    Flash,
}

/// Loads kernel and initrd into `memory` and writes what the protocol wants beside them.
///
/// # Errors
/// [`Error::User`] if a file cannot be read, is no kernel, is damaged or does not fit.
pub fn load(memory: &GuestMemoryMmap, boot: &Boot) -> Result<Entry> {
    let mut kernel = open(boot.kernel, "kernel")?;
    let mut initrd = boot.initrd.map(|path| open(path, "initrd")).transpose()?;
    let modules = boot.modules.iter().map(|module| open(&module.path, "module"));
    let mut modules = modules.collect::<Result<Vec<_>>>()?;
    load_images(memory, boot, &mut kernel, initrd.as_mut(), &mut modules)
}

/// Loads the firmware at `path`.
///
/// # Errors
/// [`Error::User`] if it cannot be read or is too large.
pub fn load_firmware(memory: &GuestMemoryMmap, path: &Path) -> Result<Entry> {
    firmware::load(memory, path, &mut open(path, "firmware")?)
}

/// `memory`, and flash memory in it if the firmware at `path` is too large for the space below 1 MiB.
///
/// # Errors
/// As for [`load_firmware`].
pub fn with_flash(memory: GuestMemoryMmap, path: &Path) -> Result<GuestMemoryMmap> {
    firmware::with_flash(memory, path, &mut open(path, "firmware")?)
}

/// [`load`] for images that need not be files.
fn load_images<F: Image>(
    memory: &GuestMemoryMmap,
    boot: &Boot,
    kernel: &mut F,
    mut initrd: Option<&mut F>,
    modules: &mut [F],
) -> Result<Entry> {
    check_command_line(boot.command_line)?;
    if let Some(entry) = multiboot::load(memory, boot, kernel, initrd.as_deref_mut(), modules)? {
        return Ok(entry);
    }
    if !modules.is_empty() {
        let name = boot.kernel.display();
        return Err(Error::user(format!("kernel '{name}' is no Multiboot kernel and takes no --module; use --initrd")));
    }
    let mut magic = [0; 4];
    read_at(kernel, 0, &mut magic).map_err(|_| not_a_kernel(boot))?;
    let entry = if magic == *b"\x7fELF" {
        pvh::load(memory, boot, kernel, initrd)?
    } else {
        linux::load(memory, boot, kernel, initrd)?
    };
    write_tables(memory, entry);
    Ok(entry)
}

/// Whether the file at `path` is a bzImage that [`load`] can boot, given memory.
///
/// # Errors
/// [`Error::User`] says why not.
pub fn check_kernel(path: &Path) -> Result<()> {
    let boot = Boot { kernel: path, initrd: None, modules: &[], command_line: "", ram: layout::LOW_RAM_LIMIT, rsdp: 0 };
    linux::check(&boot, &mut open(path, "kernel")?)
}

/// A seekable image.
trait Image: Read + ReadVolatile + Seek {}
impl<T: Read + ReadVolatile + Seek> Image for T {}

impl Entry {
    /// Changes a bootstrap processor's state after reset into the state at the kernel's entry.
    pub fn apply(self, state: &mut VcpuState) {
        if self == Entry::Flash {
            return;
        }
        if self == Entry::Bios {
            state.segments.seg[CS].base = u64::from(state.segments.seg[CS].selector) << 4;
            return;
        }
        state.gdtr = DescriptorTable { base: layout::GDT, limit: (gdt(self).len() * 8 - 1) as u16 };
        state.idtr = DescriptorTable { base: 0, limit: 0 };
        state.rflags = rflags::FIXED;
        state.gpr = [0; 16];
        let flat = gdt(self);
        let segment = |selector: u16| Segment::from_descriptor(selector, flat[usize::from(selector >> 3)]);
        state.segments.ldtr = Segment::unusable(0);
        state.segments.tr = segment(TSS);
        let data = segment(DATA);
        for i in [DS, ES, SS, FS, GS] {
            state.segments.seg[i] = data;
        }
        match self {
            Entry::Bios | Entry::Flash => {}
            Entry::Linux64 { rip } => {
                state.segments.seg[CS] = segment(CODE);
                state.rip = rip;
                state.gpr[gpr::RSI] = layout::ZERO_PAGE;
                state.gpr[gpr::RSP] = layout::BOOT_STACK;
                state.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::PG;
                state.cr3 = layout::PAGE_TABLES;
                state.cr4 = cr4::PAE;
                state.set_msr(msr::EFER, efer::LME | efer::LMA);
            }
            Entry::Linux32 { rip } => {
                state.segments.seg[CS] = segment(CODE);
                state.rip = u64::from(rip);
                state.gpr[gpr::RSI] = layout::ZERO_PAGE;
                state.gpr[gpr::RSP] = layout::BOOT_STACK;
                state.cr0 = cr0::PE | cr0::ET;
                state.cr4 = 0;
            }
            Entry::Pvh { rip } => {
                state.segments.seg[CS] = segment(CODE32);
                state.rip = u64::from(rip);
                state.gpr[gpr::RBX] = layout::PVH_START_INFO;
                state.cr0 = cr0::PE | cr0::ET;
                state.cr4 = 0;
            }
            Entry::Multiboot { rip, magic, info } => {
                // There is no table in memory: the kernel must load its own before it touches a segment register.
                state.gdtr = DescriptorTable { base: 0, limit: 0 };
                state.segments.seg[CS] = segment(CODE32);
                state.rip = u64::from(rip);
                state.gpr[gpr::RAX] = u64::from(magic);
                state.gpr[gpr::RBX] = u64::from(info);
                state.cr0 = cr0::PE | cr0::ET;
                state.cr4 = 0;
            }
        }
        virtual_wire(&mut state.lapic);
    }
}

/// Leaves the local APIC as firmware does, in virtual wire mode (MP specification 1.4, 3.6.2.2): enabled,
/// LINT0 = ExtINT from the 8259, LINT1 = NMI. An empty page is a reset APIC, and stays one.
fn virtual_wire(lapic: &mut [u8]) {
    for (offset, value) in [(0xf0, 0x1ffu32), (0x350, 0x700), (0x360, 0x400)] {
        if let Some(register) = lapic.get_mut(offset..offset + 4) {
            register.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Selectors of [`gdt`]; Linux wants its code at 10h and its data at 18h.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;
const CODE32: u16 = 0x28;

/// Flat segments (SDM vol. 3A 3.4.5): code for a Linux kernel's mode, data, a busy TSS of 104 bytes, 32-bit code.
fn gdt(entry: Entry) -> [u64; 6] {
    const FLAT_32: u64 = 0x00cf_9b00_0000_ffff;
    let code = if matches!(entry, Entry::Linux32 { .. }) { FLAT_32 } else { 0x00af_9b00_0000_ffff };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, FLAT_32]
}

/// Writes the GDT and page tables that map the first 4 GiB onto themselves with 2 MiB pages.
fn write_tables(memory: &GuestMemoryMmap, entry: Entry) {
    let put = |gpa: u64, value: u64| {
        memory.write_obj(value, GuestAddress(gpa)).expect("RAM below 1 MiB exists in every machine");
    };
    for (i, descriptor) in gdt(entry).into_iter().enumerate() {
        put(layout::GDT + 8 * i as u64, descriptor);
    }
    const TABLE: u64 = 0b11; // present, writable
    const LARGE: u64 = 1 << 7 | TABLE;
    let (pdpt, directories) = (layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    put(layout::PAGE_TABLES, pdpt | TABLE);
    for gigabyte in 0..4 {
        put(pdpt + 8 * gigabyte, (directories + 0x1000 * gigabyte) | TABLE);
    }
    for page in 0..2048 {
        put(directories + 8 * page, page << 21 | LARGE);
    }
}

fn check_command_line(text: &str) -> Result<()> {
    if text.contains('\0') {
        return Err(Error::user("--cmdline contains a NUL character; remove it"));
    }
    command_line_fits(text, layout::COMMAND_LINE_MAX - 1)
}

fn command_line_fits(text: &str, max: usize) -> Result<()> {
    if text.len() > max {
        return Err(Error::user(format!(
            "--cmdline is {} bytes long and this kernel takes {max}; shorten it",
            text.len()
        )));
    }
    Ok(())
}

fn write_command_line(memory: &GuestMemoryMmap, text: &str) {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(layout::COMMAND_LINE)).expect("RAM below 1 MiB exists in every machine");
}

/// Puts `initrd` as high as it goes: below `limit` and the end of low RAM, above `kernel_end`. Returns its
/// address and size.
fn load_initrd<F: Image>(
    memory: &GuestMemoryMmap,
    boot: &Boot,
    initrd: &mut F,
    kernel_end: u64,
    limit: u64,
) -> Result<(u64, u64)> {
    let name = boot.initrd.unwrap_or(Path::new("?")).display();
    let size = length(initrd).map_err(|e| Error::user(format!("cannot read initrd '{name}': {e}")))?;
    if size == 0 {
        return Err(Error::user(format!("initrd '{name}' is empty; give a cpio archive")));
    }
    let low_ram = boot.ram.min(layout::LOW_RAM_LIMIT);
    let place = |ram: u64| {
        let start = ram.min(limit).checked_sub(size)? & !0xfff;
        (start >= kernel_end.next_multiple_of(0x1000)).then_some(start)
    };
    let Some(start) = place(low_ram) else {
        let needed = kernel_end.next_multiple_of(0x1000) + size.next_multiple_of(0x1000);
        let advice = match place(layout::LOW_RAM_LIMIT) {
            Some(_) => format!("give at least --memory {}", show_mib(needed)),
            None => "use a smaller initrd".into(),
        };
        return Err(Error::user(format!(
            "initrd '{name}' ({}) does not fit beside the kernel; {advice}",
            show_mib(size)
        )));
    };
    initrd
        .seek(SeekFrom::Start(0))
        .map_err(|e| e.to_string())
        .and_then(|_| {
            memory.read_exact_volatile_from(GuestAddress(start), initrd, size as usize).map_err(|e| e.to_string())
        })
        .map_err(|e| Error::user(format!("cannot read initrd '{name}': {e}")))?;
    Ok((start, size))
}

fn open(path: &Path, what: &str) -> Result<File> {
    let explain =
        |e: std::io::Error| Error::user(format!("cannot read {what} '{}': {e}; check --{what}", path.display()));
    // A FIFO would wait for somebody who writes to it.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(explain)?;
    if !file.metadata().map_err(explain)?.is_file() {
        return Err(Error::user(format!("{what} '{}' is not a regular file; check --{what}", path.display())));
    }
    Ok(file)
}

fn length<F: Seek>(image: &mut F) -> std::io::Result<u64> {
    let length = image.seek(SeekFrom::End(0))?;
    if length > FILE_MAX {
        return Err(std::io::Error::other("the file is too large"));
    }
    Ok(length)
}

fn read_at<F: Read + Seek>(image: &mut F, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
    image.seek(SeekFrom::Start(offset))?;
    image.read_exact(bytes)
}

fn not_a_kernel(boot: &Boot) -> Error {
    Error::user(format!(
        "'{}' is not a kernel that anyvisor can boot; give a Linux bzImage (vmlinuz), an ELF vmlinux with a PVH note or a Multiboot kernel",
        boot.kernel.display()
    ))
}

fn damaged(boot: &Boot, why: &str) -> Error {
    Error::user(format!("kernel '{}' is damaged: {why}; get a fresh copy", boot.kernel.display()))
}

fn too_little_memory(boot: &Boot, needed: u64) -> Error {
    if needed > layout::LOW_RAM_LIMIT {
        return Error::user(format!(
            "kernel '{}' wants {} of memory below 3G, which no machine here has; use another kernel",
            boot.kernel.display(),
            show_mib(needed)
        ));
    }
    Error::user(format!(
        "kernel '{}' needs more memory than {}; give at least --memory {}",
        boot.kernel.display(),
        show_mib(boot.ram),
        show_mib(needed)
    ))
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::bzimage as test_image;
