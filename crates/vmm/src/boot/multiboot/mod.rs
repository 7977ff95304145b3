//! Kernels by the Multiboot specifications, version 0.6.96 ([`one`]) and 2.0 ([`two`]).
//!
//! A header near the start of the file says where the image goes, itself or by the ELF headers of the file;
//! the kernel is entered in 32-bit protected mode without paging, with the address of a structure in EBX that
//! has the command line, the modules and the memory map ("Machine state" in both specifications). A file with
//! both headers is booted by the second, which can tell it where the ACPI tables are.
//!
//! The image may lie anywhere in free memory, below 1 MiB too. So nothing else here has a fixed place: modules
//! and then the structure go to the first page-aligned gaps that the image leaves ([`Placement`]), and neither
//! page tables nor a GDT are written: GDTR "may be invalid" at the entry, by both specifications.

mod elf;
mod one;
mod two;

use super::{Boot, Entry, Image, check_command_line, damaged, length, too_little_memory};
use crate::config::show_mib;
use crate::{Error, Result, layout};
use std::io::SeekFrom;
use std::ops::Range;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A header of the second version begins within so many bytes of the file; one of the first within 8192.
const SEARCHED: usize = 32768;
/// Lowest address that is free: what is below belongs to firmware, and test programs start their processors there.
const FREE_START: u64 = 0x1000;
/// More modules than anybody gives; bounds the structure's size.
const MODULES_MAX: usize = 256;
/// ACPI 6.5, 5.2.5.3.
const RSDP_SIZE: usize = 36;
/// What the loader calls itself.
const LOADER_NAME: &str = "anyvisor";

/// What a header asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    version: Version,
    /// Where the image goes, if the header says it rather than ELF headers.
    place: Option<Place>,
    /// Where it is entered, if the header says it rather than ELF headers.
    entry: Option<u32>,
    /// The kernel could be loaded elsewhere and wants to be told where it is.
    relocatable: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// "The address fields" of both headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Where in the file the text segment begins.
    file_offset: u64,
    load: u32,
    /// 0: to the end of the file.
    load_end: u32,
    /// 0: no more memory than is loaded.
    bss_end: u32,
}

/// A piece of the image: `file_size` bytes of the file from `offset` on go to `gpa`, and zeros after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    gpa: u64,
    file_size: u64,
    memory_size: u64,
}

/// A module in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Loaded {
    start: u32,
    end: u32,
    text: String,
}

/// Loads the kernel if it has a Multiboot header; `None` if it has none.
///
/// # Errors
/// [`Error::User`] if it asks for what this machine lacks, is damaged or does not fit.
pub(super) fn load<F: Image>(
    memory: &GuestMemoryMmap,
    boot: &Boot,
    kernel: &mut F,
    initrd: Option<&mut F>,
    modules: &mut [F],
) -> Result<Option<Entry>> {
    let Some(header) = find_header(boot, kernel)? else { return Ok(None) };
    check_command_line(boot.command_line)?;
    let (segments, rip) = image(boot, &header, kernel)?;
    let mut placement = Placement::new(boot, &segments)?;
    for segment in &segments {
        // Fresh RAM is zero, so that only what the file has need be written.
        copy(memory, kernel, segment.offset, segment.gpa, segment.file_size).map_err(|error| damaged(boot, &error))?;
    }
    let mut loaded = Vec::new();
    let initrd = initrd.into_iter().map(|file| {
        let path = boot.initrd.unwrap_or(Path::new("?"));
        (file, "initrd", path, None)
    });
    let modules = modules.iter_mut().zip(boot.modules).map(|(file, module)| {
        let text = module.text.as_deref();
        (file, "module", module.path.as_path(), text)
    });
    for (file, what, path, text) in initrd.chain(modules) {
        loaded.push(load_module(memory, &mut placement, file, what, path, text)?);
    }
    if loaded.len() > MODULES_MAX {
        return Err(Error::user(format!("{} modules are too many; give at most {MODULES_MAX}", loaded.len())));
    }
    let gather = match header.version {
        Version::One => one::information,
        Version::Two => two::information,
    };
    let mut rsdp = [0; RSDP_SIZE];
    memory.read_slice(&mut rsdp, GuestAddress(boot.rsdp)).expect("RAM below 1 MiB exists in every machine");
    let load_base = load_base(&header, &segments);
    let facts = Facts { boot, command_line: command_line(boot), modules: &loaded, rsdp, load_base };
    // Its size does not depend on its place.
    let size = gather(&facts, 0).len() as u64;
    let info = placement.take(size).ok_or_else(|| too_little_memory(boot, boot.ram + size))? as u32;
    memory.write_slice(&gather(&facts, info), GuestAddress(info.into())).expect("it was found in RAM");
    let magic = match header.version {
        Version::One => one::LOADER_MAGIC,
        Version::Two => two::LOADER_MAGIC,
    };
    Ok(Some(Entry::Multiboot { rip, magic, info }))
}

/// What the structure is made of.
struct Facts<'a> {
    boot: &'a Boot<'a>,
    command_line: String,
    modules: &'a [Loaded],
    /// A copy of ACPI's root system description pointer.
    rsdp: [u8; RSDP_SIZE],
    /// Where the image begins, for a relocatable one.
    load_base: Option<u32>,
}

/// The first word is the kernel's name, as from most loaders: kernels drop it, or call it `argv[0]`.
fn command_line(boot: &Boot) -> String {
    let name = boot.kernel.file_name().map_or("kernel".into(), |name| name.to_string_lossy());
    format!("{} {}", name.replace([' ', '\t', '\0'], "_"), boot.command_line)
}

fn load_base(header: &Header, segments: &[Segment]) -> Option<u32> {
    let lowest = segments.iter().map(|segment| segment.gpa as u32).min();
    lowest.filter(|_| header.relocatable)
}

fn find_header<F: Image>(boot: &Boot, kernel: &mut F) -> Result<Option<Header>> {
    let size = length(kernel).map_err(|e| damaged(boot, &e.to_string()))?;
    let mut start = vec![0; size.min(SEARCHED as u64) as usize];
    super::read_at(kernel, 0, &mut start)
        .map_err(|e| Error::user(format!("cannot read kernel '{}': {e}", boot.kernel.display())))?;
    match two::find(&start) {
        Some(at) => two::parse(boot, &start, at).map(Some),
        None => one::find(&start).map(|at| one::parse(boot, &start, at)).transpose(),
    }
}

/// The image's pieces and its entry point.
fn image<F: Image>(boot: &Boot, header: &Header, kernel: &mut F) -> Result<(Vec<Segment>, u32)> {
    let size = length(kernel).map_err(|e| damaged(boot, &e.to_string()))?;
    let (segments, entry) = match header.place {
        Some(place) => {
            let entry = header.entry.ok_or_else(|| damaged(boot, "its Multiboot header has no entry point"))?;
            (
                vec![
                    place
                        .segment(size)
                        .ok_or_else(|| damaged(boot, "its Multiboot header has impossible addresses"))?,
                ],
                entry,
            )
        }
        None => {
            let (segments, entry) = elf::segments(boot, kernel)?;
            (segments, header.entry.unwrap_or(entry))
        }
    };
    let inside = |segment: &Segment| {
        let end = segment.gpa + segment.memory_size;
        (segment.gpa..end).contains(&u64::from(entry))
    };
    if !segments.iter().any(inside) {
        return Err(damaged(boot, &format!("its entry point {entry:#x} is outside of it")));
    }
    Ok((segments, entry))
}

impl Place {
    /// The one segment that the fields describe, of a file of `size` bytes; `None` if they contradict themselves.
    fn segment(&self, size: u64) -> Option<Segment> {
        let in_file = size.checked_sub(self.file_offset)?;
        let file_size = match self.load_end {
            0 => in_file,
            end => u64::from(end.checked_sub(self.load)?),
        };
        let memory_size = match self.bss_end {
            0 => file_size,
            end => u64::from(end.checked_sub(self.load)?),
        };
        let fits = file_size <= in_file && file_size <= memory_size && memory_size > 0;
        fits.then_some(Segment { offset: self.file_offset, gpa: self.load.into(), file_size, memory_size })
    }
}

/// Which memory is taken.
struct Placement {
    low_ram: u64,
    taken: Vec<Range<u64>>,
}

impl Placement {
    /// The memory of `boot`'s machine with an image in it.
    ///
    /// # Errors
    /// The image wants memory that is not there or not free.
    fn new(boot: &Boot, segments: &[Segment]) -> Result<Placement> {
        let low_ram = boot.ram.min(layout::LOW_RAM_LIMIT);
        let mut taken: Vec<Range<u64>> = vec![0..FREE_START, layout::LOW_END..layout::HIGH_START];
        let reserved = taken.clone();
        for segment in segments {
            let range = segment.gpa..segment.gpa + segment.memory_size;
            if range.end > low_ram {
                return Err(too_little_memory(boot, range.end));
            }
            if let Some(reserved) = reserved.iter().find(|other| overlap(other, &range)) {
                return Err(Error::user(format!(
                    "kernel '{}' wants to be loaded at {:#x}, where no memory is free ({:#x} to {:#x}); use one linked elsewhere",
                    boot.kernel.display(),
                    range.start,
                    reserved.start,
                    reserved.end - 1
                )));
            }
            taken.push(range);
        }
        Ok(Placement { low_ram, taken })
    }

    /// Takes `size` bytes on a page boundary, above 1 MiB if there is room: what is below, kernels often use before
    /// they look at the memory map.
    fn take(&mut self, size: u64) -> Option<u64> {
        let ends = self.taken.iter().map(|range| range.end.next_multiple_of(0x1000));
        let fits = |start: &u64| {
            let range = *start..start.saturating_add(size.max(1));
            range.end <= self.low_ram && !self.taken.iter().any(|taken| overlap(taken, &range))
        };
        let mut starts: Vec<u64> = ends.filter(fits).collect();
        starts.sort_by_key(|start| (*start < layout::HIGH_START, *start));
        let start = *starts.first()?;
        self.taken.push(start..start + size.max(1));
        Some(start)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn load_module<F: Image>(
    memory: &GuestMemoryMmap,
    placement: &mut Placement,
    file: &mut F,
    what: &str,
    path: &Path,
    text: Option<&str>,
) -> Result<Loaded> {
    let name = path.display();
    let size = length(file).map_err(|e| Error::user(format!("cannot read {what} '{name}': {e}")))?;
    let start = placement.take(size).ok_or_else(|| {
        let size = show_mib(size);
        Error::user(format!(
            "{what} '{name}' ({size}) does not fit beside the kernel; give more --memory or leave it out"
        ))
    })?;
    copy(memory, file, 0, start, size).map_err(|e| Error::user(format!("cannot read {what} '{name}': {e}")))?;
    let text = text.map_or_else(|| name.to_string(), str::to_owned).replace('\0', "_");
    // All of low RAM is below 4 GiB.
    Ok(Loaded { start: start as u32, end: (start + size) as u32, text })
}

fn copy<F: Image>(
    memory: &GuestMemoryMmap,
    file: &mut F,
    offset: u64,
    gpa: u64,
    size: u64,
) -> std::result::Result<(), String> {
    if size == 0 {
        return Ok(());
    }
    file.seek(SeekFrom::Start(offset)).map_err(|e| e.to_string())?;
    memory.read_exact_volatile_from(GuestAddress(gpa), file, size as usize).map_err(|e| e.to_string())
}

/// RAM below 640 KiB and from 1 MiB up to its first hole, in KiB, as the BIOS counts them (INT 12h, INT 15h AH=88h).
fn lower_and_upper(boot: &Boot) -> (u32, u32) {
    let upper = boot.ram.min(layout::LOW_RAM_LIMIT) - layout::HIGH_START;
    ((layout::LOW_END >> 10) as u32, (upper >> 10) as u32)
}

fn lacks(boot: &Boot, what: &str) -> Error {
    Error::user(format!(
        "kernel '{}' demands by its Multiboot header {what}, which no machine here has; use another kernel",
        boot.kernel.display()
    ))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
