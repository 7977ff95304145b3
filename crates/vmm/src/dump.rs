//! A vCPU's state in readable form, for the user whose guest has crashed.

use anyvisor_x86::VcpuState;
use anyvisor_x86::bits::efer;
use anyvisor_x86::msr;
use anyvisor_x86::paging::{Access, AccessKind, PageTables, PagingMode, walk};
use anyvisor_x86::segment::index::CS;
use std::fmt::Write;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of code shown from the instruction pointer on.
const CODE_BYTES: u64 = 24;

/// Registers, control registers, segments and the code at the instruction pointer of vCPU `cpu`.
pub fn vcpu(cpu: usize, state: &VcpuState, memory: &GuestMemoryMmap) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_state(&mut out, cpu, state, memory);
    out
}

fn write_state(out: &mut String, cpu: usize, state: &VcpuState, memory: &GuestMemoryMmap) -> std::fmt::Result {
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    writeln!(out, "vCPU {cpu}: rip {:016x}  rflags {:016x}", state.rip, state.rflags)?;
    for row in 0..4 {
        for column in 0..4 {
            let i = row * 4 + column;
            write!(out, "  {:>3} {:016x}", NAMES[i], state.gpr[i])?;
        }
        writeln!(out)?;
    }
    let efer_value = state.msr(msr::EFER).unwrap_or(0);
    writeln!(
        out,
        "  cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {efer_value:04x}",
        state.cr0, state.cr2, state.cr3, state.cr4
    )?;
    let segments = state.segments.seg.iter().chain([&state.segments.ldtr, &state.segments.tr]);
    for (name, segment) in ["es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr"].into_iter().zip(segments) {
        writeln!(
            out,
            "  {name:>3} {:04x}  base {:016x}  limit {:08x}  attributes {:05x}",
            segment.selector, segment.base, segment.limit, segment.attributes
        )?;
    }
    for (name, table) in [("gdt", state.gdtr), ("idt", state.idtr)] {
        writeln!(out, "  {name}       base {:016x}  limit {:04x}", table.base, table.limit)?;
    }
    write!(out, "  code")?;
    for byte in code(state, memory) {
        match byte {
            Some(byte) => write!(out, " {byte:02x}")?,
            None => write!(out, " ??")?,
        }
    }
    Ok(())
}

/// The bytes at CS:RIP; `None` for those that are not mapped to RAM.
fn code(state: &VcpuState, memory: &GuestMemoryMmap) -> Vec<Option<u8>> {
    /// Memory that the walk cannot change.
    struct ReadOnly<'a>(&'a GuestMemoryMmap);
    impl PageTables for ReadOnly<'_> {
        fn read(&self, gpa: u64, size: u8) -> Option<u64> {
            match size {
                4 => self.0.read_obj::<u32>(GuestAddress(gpa)).ok().map(u64::from),
                _ => self.0.read_obj::<u64>(GuestAddress(gpa)).ok(),
            }
        }
        fn compare_exchange(&self, _gpa: u64, _size: u8, _old: u64, _new: u64) -> bool {
            true
        }
    }
    let efer_value = state.msr(msr::EFER).unwrap_or(0);
    let mode =
        PagingMode { cr0: state.cr0, cr3: state.cr3, cr4: state.cr4, efer: efer_value, ac: true, physical_bits: 52 };
    let cs = &state.segments.seg[CS];
    let base = if efer_value & efer::LMA != 0 && cs.is_long() { 0 } else { cs.base };
    let access = Access { kind: AccessKind::Read, user: false, implicit: false };
    (0..CODE_BYTES)
        .map(|i| {
            let gva = base.wrapping_add(state.rip).wrapping_add(i);
            let mapping = walk(&ReadOnly(memory), &mode, gva, access).ok()?;
            memory.read_obj::<u8>(GuestAddress(mapping.gpa)).ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_has_registers_and_code() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        memory.write_slice(&[0x0f, 0x0b, 0xf4], GuestAddress(0x1ffd)).unwrap();
        let mut state = VcpuState::reset(0, 0);
        state.segments.seg[CS].base = 0;
        state.rip = 0x1ffd;
        state.gpr[3] = 0xdead_beef;
        let text = vcpu(1, &state, &memory);
        assert!(text.starts_with("vCPU 1: rip 0000000000001ffd"), "{text}");
        assert!(text.contains("rbx 00000000deadbeef"), "{text}");
        assert!(text.contains("code 0f 0b f4 ?? ??"), "{text}");
    }
}
