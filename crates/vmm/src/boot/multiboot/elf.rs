//! The segments of an ELF image, of 32 or 64 bits, for a loader that goes by physical addresses.

use super::super::pvh::{u16_at, u32_at, u64_at};
use super::super::{damaged, length, not_a_kernel, read_at};
use super::{Boot, Image, Segment};
use crate::{Error, Result};

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
/// More program headers than any kernel has; bounds the time an image can cost.
const PROGRAM_HEADERS_MAX: u16 = 128;
/// A segment's end at most: multiboot kernels run in 32-bit mode first.
const END_MAX: u64 = 1 << 32;

/// One program header, of either class.
struct Program {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    memory_size: u64,
}

/// What is to be loaded, and the entry point as a physical address.
///
/// Kernels that are linked for high virtual addresses have a virtual entry point; as GRUB does, it is taken to
/// mean the place in the segment that holds it.
pub(super) fn segments<F: Image>(boot: &Boot, kernel: &mut F) -> Result<(Vec<Segment>, u32)> {
    let size = length(kernel).map_err(|e| damaged(boot, &e.to_string()))?;
    let mut header = [0; 64];
    let available = size.min(64) as usize;
    read_at(kernel, 0, &mut header[..available]).map_err(|_| not_a_kernel(boot))?;
    if header[..4] != *b"\x7fELF" || available < 52 {
        return Err(damaged(boot, "it has a Multiboot header without addresses and is no ELF file"));
    }
    let wide = header[4] == CLASS_64;
    if !matches!((header[4], u16_at(&header, 18)), (CLASS_32, EM_386) | (CLASS_64, EM_X86_64)) {
        let name = boot.kernel.display();
        return Err(Error::user(format!("kernel '{name}' is an ELF file for another processor; use an x86 one")));
    }
    let (entry, table) = if wide {
        (u64_at(&header, 24), u64_at(&header, 32))
    } else {
        (u32_at(&header, 24).into(), u32_at(&header, 28).into())
    };
    let sizes = if wide { 54 } else { 42 };
    let (entry_size, count) = (u16_at(&header, sizes), u16_at(&header, sizes + 2));
    let expected = if wide { 56 } else { 32 };
    if entry_size != expected || count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(damaged(boot, "its ELF headers make no sense"));
    }
    let mut segments = Vec::new();
    let mut start = None;
    for i in 0..u64::from(count) {
        let mut bytes = [0; 56];
        let bytes = &mut bytes[..usize::from(expected)];
        let at = table.checked_add(i * u64::from(expected)).filter(|at| *at < size);
        at.and_then(|at| read_at(kernel, at, bytes).ok()).ok_or_else(|| damaged(boot, "its headers are cut off"))?;
        let program = if wide { Program::of_64(bytes) } else { Program::of_32(bytes) };
        if program.kind != PT_LOAD || program.memory_size == 0 {
            continue;
        }
        segments.push(program.segment(boot, size)?);
        let offset = entry.wrapping_sub(program.virt);
        if offset < program.memory_size && start.is_none() {
            start = Some(program.phys + offset);
        }
    }
    if segments.is_empty() {
        return Err(damaged(boot, "it has nothing to load"));
    }
    let entry = u32::try_from(start.unwrap_or(entry)).map_err(|_| damaged(boot, "its entry point is above 4 GiB"))?;
    Ok((segments, entry))
}

impl Program {
    fn of_32(bytes: &[u8]) -> Program {
        let word = |n: usize| u64::from(u32_at(bytes, 4 * n));
        Program {
            kind: u32_at(bytes, 0),
            offset: word(1),
            virt: word(2),
            phys: word(3),
            file_size: word(4),
            memory_size: word(5),
        }
    }

    fn of_64(bytes: &[u8]) -> Program {
        Program {
            kind: u32_at(bytes, 0),
            offset: u64_at(bytes, 8),
            virt: u64_at(bytes, 16),
            phys: u64_at(bytes, 24),
            file_size: u64_at(bytes, 32),
            memory_size: u64_at(bytes, 40),
        }
    }

    fn segment(&self, boot: &Boot, size: u64) -> Result<Segment> {
        if self.offset.checked_add(self.file_size).is_none_or(|end| end > size) {
            return Err(damaged(boot, "it is shorter than its headers say"));
        }
        let end = self.phys.checked_add(self.memory_size);
        if end.is_none_or(|end| end > END_MAX) || self.file_size > self.memory_size {
            return Err(damaged(boot, "its headers have impossible sizes"));
        }
        Ok(Segment { offset: self.offset, gpa: self.phys, file_size: self.file_size, memory_size: self.memory_size })
    }
}
