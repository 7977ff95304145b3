//! Linear addresses as a debugger sees them: through the guest's page tables, without a trace.

use anyvisor_x86::bits::efer;
use anyvisor_x86::paging::{Access, AccessKind, PagingMode, Untouched, walk};
use anyvisor_x86::segment::index::CS;
use anyvisor_x86::{VcpuState, msr};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The guest-physical address at linear address `gva` for a vCPU in `state`, whatever its privilege level is; `None`
/// where nothing is mapped. There need not be RAM.
pub fn physical(memory: &GuestMemoryMmap, state: &VcpuState, gva: u64) -> Option<u64> {
    let efer = state.msr(msr::EFER).unwrap_or(0);
    let mode = PagingMode {
        cr0: state.cr0,
        cr3: state.cr3,
        cr4: state.cr4,
        efer,
        ac: true,
        physical_bits: 52,
        pkru: 0,
        pkrs: 0,
    };
    let access = Access { kind: AccessKind::Read, user: false, implicit: false };
    let tables = Untouched::new(|gpa, size| match size {
        4 => memory.read_obj::<u32>(GuestAddress(gpa)).ok().map(u64::from),
        _ => memory.read_obj::<u64>(GuestAddress(gpa)).ok(),
    });
    walk(&tables, &mode, gva, access).ok().map(|mapping| mapping.gpa)
}

/// The linear address of the instruction pointer of a vCPU in `state`.
pub fn instruction_pointer(state: &VcpuState) -> u64 {
    let cs = &state.segments.seg[CS];
    let long = state.msr(msr::EFER).unwrap_or(0) & efer::LMA != 0 && cs.is_long();
    if long { state.rip } else { cs.base.wrapping_add(state.rip) & 0xffff_ffff }
}
