//! A vCPU's state in readable form, for the user whose guest has crashed.

use anyvisor_engine::linear;
use anyvisor_x86::VcpuState;
use anyvisor_x86::msr;
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
    let start = linear::instruction_pointer(state);
    (0..CODE_BYTES)
        .map(|i| {
            let gpa = linear::physical(memory, state, start.wrapping_add(i))?;
            memory.read_obj::<u8>(GuestAddress(gpa)).ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyvisor_x86::segment::index::CS;

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
