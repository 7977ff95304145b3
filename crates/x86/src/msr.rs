//! Model-specific register numbers (SDM vol. 4).

pub const IA32_TSC: u32 = 0x10;
pub const IA32_APIC_BASE: u32 = 0x1b;
pub const IA32_FEATURE_CONTROL: u32 = 0x3a;
pub const IA32_TSC_ADJUST: u32 = 0x3b;
pub const IA32_SPEC_CTRL: u32 = 0x48;
pub const IA32_PRED_CMD: u32 = 0x49;
pub const IA32_BIOS_SIGN_ID: u32 = 0x8b;
pub const MTRRCAP: u32 = 0xfe;
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
pub const IA32_PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const TSC_DEADLINE: u32 = 0x6e0;
pub const IA32_PKRS: u32 = 0x6e1;
pub const X2APIC_FIRST: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;

/// KVM's paravirtual MSRs (Linux Documentation/virt/kvm/x86/msr.rst).
pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
pub const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
pub const KVM_PV_EOI_EN: u32 = 0x4b56_4d04;
pub const KVM_POLL_CONTROL: u32 = 0x4b56_4d05;

/// The MSRs a [`crate::VcpuState`] carries, in this order; those that an engine or a CPU model does not have are
/// left out.
pub const SAVED: &[u32] = &[
    IA32_TSC,
    IA32_APIC_BASE,
    IA32_TSC_ADJUST,
    IA32_SPEC_CTRL,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    IA32_MISC_ENABLE,
    IA32_PAT,
    MTRR_DEF_TYPE,
    TSC_DEADLINE,
    IA32_PKRS,
    EFER,
    STAR,
    LSTAR,
    CSTAR,
    SFMASK,
    KERNEL_GS_BASE,
    TSC_AUX,
    KVM_WALL_CLOCK_NEW,
    KVM_SYSTEM_TIME_NEW,
    KVM_STEAL_TIME,
    KVM_PV_EOI_EN,
    KVM_POLL_CONTROL,
];
