//! CPUID tables to and from KVM's.

use crate::host_error;
use anyvisor_engine::Result;
use anyvisor_x86::cpuid::HYPERVISOR;
use anyvisor_x86::{Cpuid, CpuidResult};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

/// KVM's feature leaf (Linux Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;

/// The paravirtual features that guests are shown, if this KVM has them: those whose state is in a
/// `VcpuState`. No I/O delay (1), kvmclock (3), steal time (5), EOI without exit (6), kicks of spinning vCPUs
/// (7), remote TLB flush (9), many-target IPIs (11), polling control (12), yield to (13), stable clock (24).
/// Asynchronous page faults are left out: one under way cannot be saved.
const PARAVIRTUAL: u32 = 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 24;

/// CPUID.1:ECX.TSC_DEADLINE. KVM has it in its local APIC, and older kernels list it elsewhere.
const TSC_DEADLINE: u32 = 1 << 24;

/// CPUID.7:ECX.PKU, OSPKE and PKS. The state has no PKRU of the hardware's, whose place in XSAVE areas differs.
const PROTECTION_KEYS: u32 = 1 << 3 | 1 << 4 | 1 << 31;

/// Everything that this KVM can show to guests on this host. Empty if it does not tell, which no model
/// accepts.
pub(crate) fn supported(kvm: &Kvm) -> Cpuid {
    let mut table = Cpuid::default();
    let entries = match kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!("KVM does not list its CPUID: {error}");
            return table;
        }
    };
    for entry in entries.as_slice() {
        let subleaf = (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index);
        let mut result = CpuidResult { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx };
        match entry.function {
            1 => {
                result.ecx |= 1 << HYPERVISOR.bit;
                if kvm.check_extension(Cap::TscDeadlineTimer) {
                    result.ecx |= TSC_DEADLINE;
                }
            }
            7 if entry.index == 0 => result.ecx &= !PROTECTION_KEYS,
            KVM_FEATURES => result.eax &= PARAVIRTUAL,
            _ => {}
        }
        table.set(entry.function, subleaf, result);
    }
    table
}

/// Gives `vcpu` its table.
pub(crate) fn apply(vcpu: &VcpuFd, table: &Cpuid) -> Result<()> {
    let entries: Vec<_> = table
        .leaves
        .iter()
        .map(|leaf| kvm_cpuid_entry2 {
            function: leaf.leaf,
            index: leaf.subleaf.unwrap_or(0),
            flags: if leaf.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: leaf.result.eax,
            ebx: leaf.result.ebx,
            ecx: leaf.result.ecx,
            edx: leaf.result.edx,
            padding: [0; 3],
        })
        .collect();
    let entries = CpuId::from_entries(&entries).expect("a model has fewer leaves than KVM takes");
    vcpu.set_cpuid2(&entries).map_err(|e| host_error("setting a vCPU's CPUID", e))
}
