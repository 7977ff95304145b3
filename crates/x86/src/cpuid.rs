//! CPUID tables and the CPU models.
//!
//! A vCPU's table is a pure function of a model, of what the engine supports on this host and of the
//! vCPU's place in the topology: [`CpuModel::table`]. The named models are a psABI level plus the system
//! features a kernel wants, with one fixed identity, so that a VM can move between hosts; `host` is
//! everything the engine supports, but for what has to be asked for ([`CpuChoice`]: `host,+pku`) because VMs with it
//! cannot move to every engine. No table ever shows a feature that the engine does not list, and what a model needs
//! and the host lacks is an error that names it.
//!
//! Four things in a table change while the vCPU runs and are the engine's business: 1.ECX.OSXSAVE
//! (CR4.OSXSAVE), 7.ECX.OSPKE (CR4.PKE), 1.EDX.APIC (IA32_APIC_BASE) and Dh.0.EBX (the XSAVE size for the current XCR0; the
//! table holds the size for all components).
//!
//! Left out of every model: 5-level paging, AVX-512, TSX, XSAVEC/XSAVES/XSAVEOPT, CET, MONITOR, the
//! PMU, debug store, VMX and SGX. They need state or traps that the machine does not have.

use crate::bits::xcr0;
use crate::state::{PKRU_OFFSET, PKRU_SIZE};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What CPUID returns for one leaf and subleaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// One entry of a [`Cpuid`] table. A leaf without subleaves has `subleaf: None` and answers for any ECX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    pub leaf: u32,
    pub subleaf: Option<u32>,
    pub result: CpuidResult,
}

/// A table of leaves: what a host supports, or what a vCPU shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpuid {
    pub leaves: Vec<CpuidLeaf>,
}

impl Cpuid {
    /// The exact entry for `leaf` and `subleaf`, if the table has one.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<CpuidResult> {
        self.leaves.iter().find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf)).map(|l| l.result)
    }

    /// Adds or replaces an entry.
    pub fn set(&mut self, leaf: u32, subleaf: Option<u32>, result: CpuidResult) {
        match self.leaves.iter_mut().find(|l| l.leaf == leaf && l.subleaf == subleaf) {
            Some(entry) => entry.result = result,
            None => self.leaves.push(CpuidLeaf { leaf, subleaf, result }),
        }
    }

    /// Changes what the entry that answers for `leaf` and `subleaf` says.
    fn replace(&mut self, leaf: u32, subleaf: u32, result: CpuidResult) {
        let answers = |entry: &&mut CpuidLeaf| entry.leaf == leaf && entry.subleaf.is_none_or(|s| s == subleaf);
        if let Some(entry) = self.leaves.iter_mut().find(answers) {
            entry.result = result;
        }
    }

    /// Whether `feature` is set.
    pub fn has(&self, feature: &Feature) -> bool {
        self.get(feature.leaf, feature.subleaf).is_some_and(|r| feature.register.of(&r) >> feature.bit & 1 != 0)
    }
}

/// Registers that hold a feature in each bit, which must all be in a host's table to be in a vCPU's.
const FEATURE_REGISTERS: &[(u32, u32, Register)] = &[
    (1, 0, Register::Ecx),
    (1, 0, Register::Edx),
    (7, 0, Register::Ebx),
    (7, 0, Register::Ecx),
    (7, 0, Register::Edx),
    (7, 1, Register::Eax),
    (7, 1, Register::Edx),
    (7, 2, Register::Edx),
    (0x4000_0001, 0, Register::Eax),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0007, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
];

/// Bits of these that say what software or the topology does, not what the processor can: OSXSAVE, hypervisor,
/// HT.
const NOT_FEATURES: &[(u32, Register, u32)] = &[(1, Register::Ecx, 1 << 27 | 1 << 31), (1, Register::Edx, 1 << 28)];

impl Cpuid {
    /// What a vCPU with this table, saved elsewhere, needs and `supported` lacks, by name; empty if it can go on
    /// there. Frequencies are not compared.
    pub fn differences(&self, supported: &Cpuid) -> Vec<String> {
        let mut missing = Vec::new();
        for &(leaf, subleaf, register) in FEATURE_REGISTERS {
            let bits = |table: &Cpuid| table.get(leaf, subleaf).map_or(0, |result| register.of(&result));
            let ignored = NOT_FEATURES.iter().find(|(l, r, _)| (*l, *r) == (leaf, register)).map_or(0, |entry| entry.2);
            let lacking = bits(self) & !bits(supported) & !ignored;
            missing.extend((0..32).filter(|bit| lacking >> bit & 1 != 0).map(|bit| name(leaf, subleaf, register, bit)));
        }
        let signature = |table: &Cpuid| table.get(0x4000_0000, 0).map(|r| (r.ebx, r.ecx, r.edx));
        if signature(self).is_some_and(|own| Some(own) != signature(supported)) {
            missing.push("KVM's paravirtual interface".into());
        }
        let width = |table: &Cpuid| table.get(0x8000_0008, 0).map_or(36, |result| result.eax & 0xff);
        if width(self) > width(supported) {
            missing.push(format!("{}-bit physical addresses", width(self)));
        }
        missing
    }
}

/// The name of a feature bit: Linux's, or where it is.
fn name(leaf: u32, subleaf: u32, register: Register, bit: u32) -> String {
    let known = [BASELINE, V2, V3, SYSTEM, HOST_EXTRAS, ON_REQUEST].into_iter().flatten();
    match known.into_iter().find(|f| (f.leaf, f.subleaf, f.register, f.bit) == (leaf, subleaf, register, bit)) {
        Some(feature) => feature.name.to_owned(),
        None => format!("CPUID {leaf:X}h.{subleaf}:{register:?} bit {bit}").replace(":E", ":e"),
    }
}

/// The value of IA32_ARCH_CAPABILITIES (SDM vol. 4, MSR 10Ah) that vCPUs read: "not affected" by every
/// enumerated speculation flaw.
///
/// What it claims, and what not: a guest kernel's own defences (page-table isolation, retpolines, buffer
/// clearing, ...) guard the boundary between its user and kernel mode. Under the translator both run in
/// one host process, in host user mode, where those defences separate nothing, so the guest should not
/// pay for them. It is no claim that guest processes cannot spy on each other or on the guest's kernel
/// through the microarchitecture: run mutually distrusting workloads in VMs (host processes) of their own.
///
/// IBRS_ALL makes Linux choose "enhanced IBRS" (one write to IA32_SPEC_CTRL at boot, which the engine
/// accepts) instead of retpolines; it needs [`SPEC_CTRL`] in the table.
pub const ARCH_CAPABILITIES: u64 = arch_capabilities::RDCL_NO
    | arch_capabilities::IBRS_ALL
    | arch_capabilities::SKIP_L1DFL_VMENTRY
    | arch_capabilities::SSB_NO
    | arch_capabilities::MDS_NO
    | arch_capabilities::PSCHANGE_MC_NO
    | arch_capabilities::TAA_NO
    | arch_capabilities::SBDR_SSDP_NO
    | arch_capabilities::FBSDP_NO
    | arch_capabilities::PSDP_NO
    | arch_capabilities::BHI_NO
    | arch_capabilities::PBRSB_NO
    | arch_capabilities::GDS_NO
    | arch_capabilities::RFDS_NO
    | arch_capabilities::ITS_NO;

/// Bits of IA32_ARCH_CAPABILITIES.
pub mod arch_capabilities {
    /// Not susceptible to Meltdown (rogue data cache load).
    pub const RDCL_NO: u64 = 1 << 0;
    /// IBRS may stay set: "enhanced IBRS".
    pub const IBRS_ALL: u64 = 1 << 1;
    pub const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    pub const SSB_NO: u64 = 1 << 4;
    pub const MDS_NO: u64 = 1 << 5;
    pub const PSCHANGE_MC_NO: u64 = 1 << 6;
    pub const TAA_NO: u64 = 1 << 8;
    pub const SBDR_SSDP_NO: u64 = 1 << 13;
    pub const FBSDP_NO: u64 = 1 << 14;
    pub const PSDP_NO: u64 = 1 << 15;
    pub const BHI_NO: u64 = 1 << 20;
    pub const PBRSB_NO: u64 = 1 << 24;
    pub const GDS_NO: u64 = 1 << 26;
    pub const RFDS_NO: u64 = 1 << 27;
    /// Not affected by indirect target selection; a Linux guest that does not see it assumes the worst.
    pub const ITS_NO: u64 = 1 << 62;
}

/// A result register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    /// The register's value in `result`.
    pub fn of(self, result: &CpuidResult) -> u32 {
        match self {
            Register::Eax => result.eax,
            Register::Ebx => result.ebx,
            Register::Ecx => result.ecx,
            Register::Edx => result.edx,
        }
    }

    fn of_mut(self, result: &mut CpuidResult) -> &mut u32 {
        match self {
            Register::Eax => &mut result.eax,
            Register::Ebx => &mut result.ebx,
            Register::Ecx => &mut result.ecx,
            Register::Edx => &mut result.edx,
        }
    }

    fn set_bit(self, result: &mut CpuidResult, bit: u32) {
        *self.of_mut(result) |= 1 << bit;
    }

    fn clear_bit(self, result: &mut CpuidResult, bit: u32) {
        *self.of_mut(result) &= !(1 << bit);
    }
}

/// One feature flag, with the name that Linux shows in /proc/cpuinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    pub name: &'static str,
    pub leaf: u32,
    pub subleaf: u32,
    pub register: Register,
    pub bit: u32,
}

const fn f1_ecx(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 1, subleaf: 0, register: Register::Ecx, bit }
}
const fn f1_edx(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 1, subleaf: 0, register: Register::Edx, bit }
}
const fn f7_ebx(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 7, subleaf: 0, register: Register::Ebx, bit }
}
const fn f7_ecx(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 7, subleaf: 0, register: Register::Ecx, bit }
}
const fn f7_edx(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 7, subleaf: 0, register: Register::Edx, bit }
}
const fn f7_1_eax(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 7, subleaf: 1, register: Register::Eax, bit }
}
const fn f7_2_edx(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 7, subleaf: 2, register: Register::Edx, bit }
}
const fn fx_ecx(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 0x8000_0001, subleaf: 0, register: Register::Ecx, bit }
}
const fn fx_edx(name: &'static str, bit: u32) -> Feature {
    Feature { name, leaf: 0x8000_0001, subleaf: 0, register: Register::Edx, bit }
}

pub const BMI2: Feature = f7_ebx("bmi2", 8);
pub const AVX: Feature = f1_ecx("avx", 28);
pub const AVX2: Feature = f7_ebx("avx2", 5);
pub const FSGSBASE: Feature = f7_ebx("fsgsbase", 0);
pub const XSAVE: Feature = f1_ecx("xsave", 26);
/// Protection keys of user pages: CR4.PKE, PKRU and component 9 of XSAVE areas.
pub const PKU: Feature = f7_ecx("pku", 3);
/// Protection keys of supervisor pages: CR4.PKS and IA32_PKRS.
pub const PKS: Feature = f7_ecx("pks", 31);
pub const HYPERVISOR: Feature = f1_ecx("hypervisor", 31);
pub const VMX: Feature = f1_ecx("vmx", 5);
pub const SVM: Feature = fx_ecx("svm", 2);
/// IBRS and IBPB: IA32_SPEC_CTRL and IA32_PRED_CMD exist.
pub const SPEC_CTRL: Feature = f7_edx("spec_ctrl", 26);
/// IA32_ARCH_CAPABILITIES exists.
pub const ARCH_CAPABILITIES_PRESENT: Feature = f7_edx("arch_capabilities", 29);
/// IA32_SPEC_CTRL.BHI_DIS_S exists. Linux overlooks BHI_NO of [`ARCH_CAPABILITIES`] under a hypervisor; with
/// this bit it sets BHI_DIS_S once instead of running a loop of branches at every system call.
pub const BHI_CTRL: Feature = f7_2_edx("bhi_ctrl", 4);
const HT: Feature = f1_edx("ht", 28);

/// x86-64-v1: what every x86-64 processor and every 64-bit kernel takes for granted.
const BASELINE: &[Feature] = &[
    f1_edx("fpu", 0),
    f1_edx("de", 2),
    f1_edx("pse", 3),
    f1_edx("tsc", 4),
    f1_edx("msr", 5),
    f1_edx("pae", 6),
    f1_edx("cx8", 8),
    f1_edx("apic", 9),
    f1_edx("pge", 13),
    f1_edx("cmov", 15),
    f1_edx("pat", 16),
    f1_edx("clflush", 19),
    f1_edx("mmx", 23),
    f1_edx("fxsr", 24),
    f1_edx("sse", 25),
    f1_edx("sse2", 26),
    fx_edx("syscall", 11),
    fx_edx("nx", 20),
    fx_edx("lm", 29),
];

/// What x86-64-v2 adds (x86-64 psABI 3.1.1, table 3.1).
const V2: &[Feature] = &[
    f1_ecx("pni", 0),
    f1_ecx("ssse3", 9),
    f1_ecx("cx16", 13),
    f1_ecx("sse4_1", 19),
    f1_ecx("sse4_2", 20),
    f1_ecx("popcnt", 23),
    fx_ecx("lahf_lm", 0),
];

/// What x86-64-v3 adds.
const V3: &[Feature] = &[
    f1_ecx("fma", 12),
    f1_ecx("movbe", 22),
    XSAVE,
    AVX,
    f1_ecx("f16c", 29),
    f7_ebx("bmi1", 3),
    AVX2,
    BMI2,
    fx_ecx("abm", 5),
];

/// System features that every model shows where the engine has them: they make a kernel faster or better
/// behaved and no program depends on them.
const SYSTEM: &[Feature] = &[
    f1_edx("vme", 1),
    f1_edx("mce", 7),
    f1_edx("sep", 11),
    f1_edx("mtrr", 12),
    f1_edx("mca", 14),
    f1_edx("pse36", 17),
    f1_ecx("pcid", 17),
    f1_ecx("x2apic", 21),
    f1_ecx("tsc_deadline_timer", 24),
    FSGSBASE,
    f7_ebx("tsc_adjust", 1),
    f7_ebx("smep", 7),
    f7_ebx("erms", 9),
    f7_ebx("invpcid", 10),
    f7_ebx("smap", 20),
    f7_ecx("umip", 2),
    f7_edx("fsrm", 4),
    SPEC_CTRL,
    ARCH_CAPABILITIES_PRESENT,
    BHI_CTRL,
    fx_edx("pdpe1gb", 26),
    fx_edx("rdtscp", 27),
    // Its rate does not change, and it does not stop.
    Feature { name: "nonstop_tsc", leaf: 0x8000_0007, subleaf: 0, register: Register::Edx, bit: 8 },
];

/// Instructions beyond x86-64-v3 that `host` shows where the engine has them. All work on the general,
/// XMM and YMM registers only.
const HOST_EXTRAS: &[Feature] = &[
    f1_ecx("pclmulqdq", 1),
    f1_ecx("aes", 25),
    f1_ecx("rdrand", 30),
    f7_ebx("rdseed", 18),
    f7_ebx("adx", 19),
    f7_ebx("clflushopt", 23),
    f7_ebx("clwb", 24),
    f7_ebx("sha_ni", 29),
    f7_ecx("gfni", 8),
    f7_ecx("vaes", 9),
    f7_ecx("vpclmulqdq", 10),
    f7_ecx("rdpid", 22),
    f7_ecx("cldemote", 25),
    f7_ecx("movdiri", 27),
    f7_ecx("movdir64b", 28),
    f7_edx("serialize", 14),
    f7_1_eax("avx_vnni", 4),
    fx_ecx("3dnowprefetch", 8),
];

/// Features that no model shows by itself: an engine makes them whatever the host has, so that VMs with them cannot
/// move to an engine that does not.
const ON_REQUEST: &[Feature] = &[PKU, PKS];

/// Vendor, signature and name that the named models show: family 6, model FFh, which no processor has. Linux knows no flaw
/// of it that [`ARCH_CAPABILITIES`] cannot deny, unlike those of the first x86-64-v3 processors. Programs that gcc made for
/// several processors (`target_clones` with `arch=`) look at the model alone, so a real one must have all it is known for:
/// stress-ng runs AVX-512 on model 8Fh.
const NAMED_VENDOR: &[u8; 12] = b"GenuineIntel";
const NAMED_SIGNATURE: u32 = 0x000f_06f0;

/// Physical address bits that named models show at most, so that VMs can move.
const NAMED_PHYSICAL_BITS: u32 = 46;

/// KVM features that named models show, because every engine has them: no delay after port I/O (1), kvmclock (3) and that it
/// is stable (24), and what many vCPUs want (KVM: since Linux 5.4): steal time (5), kicks (7), TLB flushes (9), IPIs to many
/// (11), yielding (13).
const NAMED_PARAVIRTUAL: u32 = 1 << 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 13 | 1 << 24;

/// Highest basic leaf of a table: 16h, the frequencies.
const MAX_BASIC: u32 = 0x16;

/// What a vCPU looks like to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuModel {
    #[serde(rename = "x86-64-v2")]
    V2,
    #[serde(rename = "x86-64-v3")]
    V3,
    #[serde(rename = "host")]
    Host,
}

impl CpuModel {
    pub const ALL: [CpuModel; 3] = [CpuModel::V2, CpuModel::V3, CpuModel::Host];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            CpuModel::V2 => "x86-64-v2",
            CpuModel::V3 => "x86-64-v3",
            CpuModel::Host => "host",
        }
    }

    /// The CPUID table of the vCPU with APIC ID `apic_id` among `cpus` (at least 1): one package, one
    /// thread a core, APIC IDs from 0. `supported` is what the engine can show on this host.
    ///
    /// # Errors
    /// The features that the model needs and `supported` lacks.
    pub fn table(self, supported: &Cpuid, cpus: u32, apic_id: u32) -> Result<Cpuid, MissingFeatures> {
        assert!(cpus >= 1 && apic_id < cpus, "apic id {apic_id} of {cpus} cpus");
        let missing: Vec<_> = self.required().filter(|f| !supported.has(f)).map(|f| f.name).collect();
        if !missing.is_empty() {
            return Err(MissingFeatures { model: self, features: missing });
        }
        let mut table = Cpuid::default();
        self.basic_leaves(supported, cpus, apic_id, &mut table);
        self.extended_leaves(supported, cpus, &mut table);
        for leaf in supported.leaves.iter().filter(|l| (0x4000_0000..=0x4fff_ffff).contains(&l.leaf)) {
            let mut result = leaf.result;
            if leaf.leaf == 0x4000_0001 && self != CpuModel::Host {
                result.eax &= NAMED_PARAVIRTUAL;
            }
            table.set(leaf.leaf, leaf.subleaf, result);
        }
        Ok(table)
    }

    fn required(self) -> impl Iterator<Item = &'static Feature> {
        let (v2, v3): (&[Feature], &[Feature]) = match self {
            CpuModel::V2 => (V2, &[]),
            CpuModel::V3 => (V2, V3),
            CpuModel::Host => (&[], &[]),
        };
        BASELINE.iter().chain(v2).chain(v3)
    }

    fn optional(self) -> impl Iterator<Item = &'static Feature> {
        let rest: [&[Feature]; 3] = match self {
            CpuModel::Host => [V2, V3, HOST_EXTRAS],
            CpuModel::V2 | CpuModel::V3 => [&[], &[], &[]],
        };
        SYSTEM.iter().chain(rest.into_iter().flatten())
    }

    /// The feature bits of `leaf` and `subleaf`, all other bits clear.
    fn features(self, supported: &Cpuid, leaf: u32, subleaf: u32) -> CpuidResult {
        let mut result = CpuidResult::default();
        for feature in self.required().chain(self.optional()) {
            if feature.leaf == leaf && feature.subleaf == subleaf && supported.has(feature) {
                feature.register.set_bit(&mut result, feature.bit);
            }
        }
        result
    }

    fn basic_leaves(self, supported: &Cpuid, cpus: u32, apic_id: u32, table: &mut Cpuid) {
        let host = self == CpuModel::Host;
        let vendor = match supported.get(0, 0) {
            Some(r) if host => CpuidResult { eax: MAX_BASIC, ..r },
            _ => text_leaf(MAX_BASIC, NAMED_VENDOR),
        };
        table.set(0, None, vendor);

        let mut leaf1 = self.features(supported, 1, 0);
        HYPERVISOR.register.set_bit(&mut leaf1, HYPERVISOR.bit);
        if cpus > 1 {
            HT.register.set_bit(&mut leaf1, HT.bit);
        }
        leaf1.eax = if host { supported.get(1, 0).unwrap_or_default().eax } else { NAMED_SIGNATURE };
        // CLFLUSH line in 8-byte units, logical processors (a power of two, as on hardware), APIC ID.
        leaf1.ebx = 8 << 8 | cpus.next_power_of_two().min(128) << 16 | (apic_id & 0xff) << 24;
        table.set(1, None, leaf1);

        // SDM vol. 2A table 3-12: no descriptors here, see leaf 4.
        table.set(2, None, CpuidResult { eax: 0x00fe_ff01, ..CpuidResult::default() });
        cache_leaves(cpus, table);
        for leaf in [3, 5, 8, 9, 0xa, 0xc, 0xe, 0xf, 0x10, 0x11, 0x12, 0x13, 0x14] {
            table.set(leaf, None, CpuidResult::default());
        }
        // The APIC timer runs in every sleep state (ARAT).
        table.set(6, None, CpuidResult { eax: 1 << 2, ..CpuidResult::default() });

        let leaf7_1 = self.features(supported, 7, 1);
        let mut leaf7 = self.features(supported, 7, 0);
        let leaf7_2 = self.features(supported, 7, 2);
        leaf7.eax = match (leaf7_1, leaf7_2) {
            (_, leaf) if leaf != CpuidResult::default() => 2,
            (leaf, _) => u32::from(leaf != CpuidResult::default()),
        };
        table.set(7, Some(0), leaf7);
        table.set(7, Some(1), leaf7_1);
        table.set(7, Some(2), leaf7_2);

        topology_leaf(cpus, apic_id, table);
        xsave_leaf(table.has(&XSAVE), table.has(&AVX), table);
        for leaf in [0x15, 0x16] {
            table.set(leaf, None, supported.get(leaf, 0).unwrap_or_default());
        }
    }

    fn extended_leaves(self, supported: &Cpuid, cpus: u32, table: &mut Cpuid) {
        let host = self == CpuModel::Host;
        let max = CpuidResult { eax: 0x8000_0008, ..CpuidResult::default() };
        // AMD repeats the vendor here, Intel has zeros.
        let vendor = supported.get(0x8000_0000, 0).filter(|_| host).unwrap_or_default();
        table.set(0x8000_0000, None, CpuidResult { eax: max.eax, ..vendor });
        table.set(0x8000_0001, None, self.features(supported, 0x8000_0001, 0));

        let brand = match self {
            CpuModel::V2 => Some("anyvisor x86-64-v2"),
            CpuModel::V3 => Some("anyvisor x86-64-v3"),
            CpuModel::Host => None,
        };
        let mut padded = [0u8; 48];
        if let Some(brand) = brand {
            padded[..brand.len()].copy_from_slice(brand.as_bytes());
        }
        for (i, chunk) in padded.as_chunks::<16>().0.iter().enumerate() {
            let leaf = 0x8000_0002 + i as u32;
            let own =
                CpuidResult { eax: word(chunk, 0), ebx: word(chunk, 4), ecx: word(chunk, 8), edx: word(chunk, 12) };
            let result = if host { supported.get(leaf, 0).unwrap_or_default() } else { own };
            table.set(leaf, None, result);
        }
        table.set(0x8000_0005, None, CpuidResult::default());
        // L2: 2048 KiB, 16-way (encoding 8), 64-byte lines.
        table.set(0x8000_0006, None, CpuidResult { ecx: 2048 << 16 | 8 << 12 | 64, ..CpuidResult::default() });
        // Invariant TSC, where the engine has it.
        let invariant = supported.get(0x8000_0007, 0).unwrap_or_default().edx & (1 << 8);
        table.set(0x8000_0007, None, CpuidResult { edx: invariant, ..CpuidResult::default() });
        let widths = supported.get(0x8000_0008, 0).unwrap_or_default().eax;
        let physical = match widths & 0xff {
            0 => 36, // SDM vol. 3A 4.1.4: processors without the leaf have 36
            bits if host => bits,
            bits => bits.min(NAMED_PHYSICAL_BITS),
        };
        // 48-bit linear addresses: no 5-level paging. ECX 7:0 is AMD's core count.
        let cores = if vendor.ebx != 0 { (cpus - 1).min(255) } else { 0 };
        table.set(0x8000_0008, None, CpuidResult { eax: physical | 48 << 8, ecx: cores, ..CpuidResult::default() });
    }
}

impl FromStr for CpuModel {
    type Err = String;
    fn from_str(name: &str) -> Result<CpuModel, String> {
        CpuModel::ALL
            .into_iter()
            .find(|m| m.name() == name)
            .ok_or_else(|| format!("unknown CPU model '{name}'; use x86-64-v3, x86-64-v2 or host"))
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A model, without some of the features that it shows where they are: what a VM is to have on several hosts; or with
/// features on request.
///
/// As text it is the model's name and the features' with a minus, for example `x86-64-v2,-pcid,-smap`, or with a plus
/// (`host,+pku`); and
/// `phys-bits=40` for physical addresses of at most so many bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuChoice {
    pub model: CpuModel,
    /// Bit n is feature n of [`CpuChoice::removable`].
    without: u64,
    /// Bit n is feature n of [`ON_REQUEST`].
    with: u8,
    /// Most bits of a physical address, if fewer than the model has.
    physical_bits: Option<u8>,
}

impl CpuChoice {
    /// All features that some model shows only where they are.
    fn removable() -> impl Iterator<Item = &'static Feature> {
        [SYSTEM, V2, V3, HOST_EXTRAS].into_iter().flatten()
    }

    fn removed(self) -> impl Iterator<Item = &'static Feature> {
        CpuChoice::removable().enumerate().filter(move |(n, _)| self.without >> n & 1 != 0).map(|(_, feature)| feature)
    }

    fn added(self) -> impl Iterator<Item = &'static Feature> {
        ON_REQUEST.iter().enumerate().filter(move |(n, _)| self.with >> n & 1 != 0).map(|(_, feature)| feature)
    }

    /// The same with physical addresses of at most `bits`, or fewer.
    pub fn with_physical_bits_at_most(self, bits: u8) -> CpuChoice {
        CpuChoice { physical_bits: Some(self.physical_bits.map_or(bits, |most| most.min(bits))), ..self }
    }

    /// As [`CpuModel::table`], without the features left out and with those asked for.
    ///
    /// # Errors
    /// The features that the model needs and `supported` lacks.
    pub fn table(self, supported: &Cpuid, cpus: u32, apic_id: u32) -> Result<Cpuid, MissingFeatures> {
        let mut limited = supported.clone();
        for feature in self.removed() {
            if let Some(mut result) = limited.get(feature.leaf, feature.subleaf) {
                feature.register.clear_bit(&mut result, feature.bit);
                limited.replace(feature.leaf, feature.subleaf, result);
            }
        }
        if let (Some(most), Some(mut widths)) = (self.physical_bits, limited.get(0x8000_0008, 0)) {
            widths.eax = widths.eax & !0xff | (widths.eax & 0xff).min(most.into());
            limited.replace(0x8000_0008, 0, widths);
        }
        let mut table = self.model.table(&limited, cpus, apic_id)?;
        let missing: Vec<_> = self.added().filter(|f| !limited.has(f)).map(|f| f.name).collect();
        if !missing.is_empty() {
            return Err(MissingFeatures { model: self.model, features: missing });
        }
        for feature in self.added() {
            let mut result = table.get(feature.leaf, feature.subleaf).unwrap_or_default();
            feature.register.set_bit(&mut result, feature.bit);
            table.replace(feature.leaf, feature.subleaf, result);
        }
        if table.has(&PKU) && table.has(&XSAVE) {
            xsave_leaf_with_keys(&mut table);
        }
        Ok(table)
    }
}

impl From<CpuModel> for CpuChoice {
    fn from(model: CpuModel) -> CpuChoice {
        CpuChoice { model, without: 0, with: 0, physical_bits: None }
    }
}

impl FromStr for CpuChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<CpuChoice, String> {
        let mut parts = text.split(',');
        let mut choice = CpuChoice::from(parts.next().unwrap_or("").parse::<CpuModel>()?);
        for part in parts {
            if let Some(bits) = part.strip_prefix("phys-bits=") {
                let bits = bits.parse().ok().filter(|bits| (36..=52).contains(bits));
                choice.physical_bits =
                    Some(bits.ok_or_else(|| format!("'{part}' in CPU model '{text}' is not a number from 36 to 52"))?);
                continue;
            }
            if let Some(name) = part.strip_prefix('+') {
                let found = ON_REQUEST.iter().position(|feature| feature.name == name);
                choice.with |= 1
                    << found.ok_or_else(|| {
                        format!("'{part}' in CPU model '{text}' is no feature to ask for; pku and pks are")
                    })?;
                continue;
            }
            let name = part.strip_prefix('-').ok_or_else(|| {
                format!("'{part}' in CPU model '{text}' is no feature to leave out; write for example x86-64-v2,-pcid")
            })?;
            let found = CpuChoice::removable().position(|feature| feature.name == name);
            let optional = choice.model.optional().any(|feature| feature.name == name);
            match found.filter(|_| optional) {
                Some(n) => choice.without |= 1 << n,
                None => return Err(format!("CPU model {} has no feature '{name}' to leave out", choice.model)),
            }
        }
        Ok(choice)
    }
}

impl TryFrom<String> for CpuChoice {
    type Error = String;
    fn try_from(text: String) -> Result<CpuChoice, String> {
        text.parse()
    }
}

impl From<CpuChoice> for String {
    fn from(choice: CpuChoice) -> String {
        choice.to_string()
    }
}

impl fmt::Display for CpuChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model.name())?;
        self.removed().try_for_each(|feature| write!(f, ",-{}", feature.name))?;
        self.added().try_for_each(|feature| write!(f, ",+{}", feature.name))?;
        self.physical_bits.map_or(Ok(()), |bits| write!(f, ",phys-bits={bits}"))
    }
}

/// A model's features that the host, under the chosen engine, does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingFeatures {
    pub model: CpuModel,
    pub features: Vec<&'static str>,
}

impl fmt::Display for MissingFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this host cannot run CPU model {}: it lacks {}", self.model, self.features.join(", "))?;
        if self.features.iter().all(|name| ON_REQUEST.iter().any(|feature| feature.name == *name)) {
            return write!(f, ", which only some engines make; leave it out or choose another --engine");
        }
        match self.model {
            CpuModel::V3 => write!(f, "; try --cpu-model x86-64-v2 or host"),
            CpuModel::V2 => write!(f, "; try --cpu-model host"),
            CpuModel::Host => write!(f, "; use a 64-bit x86 host"),
        }
    }
}

impl std::error::Error for MissingFeatures {}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Leaf 0: the vendor in EBX, EDX, ECX.
fn text_leaf(eax: u32, text: &[u8; 12]) -> CpuidResult {
    CpuidResult { eax, ebx: word(text, 0), edx: word(text, 4), ecx: word(text, 8) }
}

/// Bits of the APIC ID that number the cores of a package.
fn core_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// Leaf 4, deterministic cache parameters: private L1 and L2, one shared L3.
fn cache_leaves(cpus: u32, table: &mut Cpuid) {
    let shared = (1 << core_bits(cpus)) - 1;
    let cores = shared.min(63) << 26;
    // Type (1 data, 2 instruction, 3 unified), level, ways, sets, processors that share it less one.
    let caches = [(1, 1, 8, 64, 0), (2, 1, 8, 64, 0), (3, 2, 16, 2048, 0), (3, 3, 16, 16384, shared)];
    for (i, (kind, level, ways, sets, sharing)) in caches.into_iter().enumerate() {
        let result = CpuidResult {
            eax: kind | level << 5 | 1 << 8 | sharing << 14 | cores,
            ebx: 63 | (ways - 1) << 22,
            ecx: sets - 1,
            edx: 0,
        };
        table.set(4, Some(i as u32), result);
    }
    table.set(4, Some(4), CpuidResult::default());
}

/// Leaf 0Bh, extended topology: one thread a core, all cores in one package.
fn topology_leaf(cpus: u32, apic_id: u32, table: &mut Cpuid) {
    let levels = [(0, 1, 1 << 8), (core_bits(cpus), cpus, 2 << 8 | 1), (0, 0, 2)];
    for (i, (eax, ebx, ecx)) in levels.into_iter().enumerate() {
        table.set(0xb, Some(i as u32), CpuidResult { eax, ebx, ecx, edx: apic_id });
    }
}

/// Leaf 0Dh: standard-format XSAVE areas of x87, SSE and, at 576, 256 bytes of AVX (SDM vol. 1 13.2).
fn xsave_leaf(xsave: bool, avx: bool, table: &mut Cpuid) {
    let (mask, size) = match (xsave, avx) {
        (false, _) => (0, 0),
        (true, false) => (0b011, 576),
        (true, true) => (0b111, 832),
    };
    table.set(0xd, Some(0), CpuidResult { eax: mask, ebx: size, ecx: size, edx: 0 });
    table.set(0xd, Some(1), CpuidResult::default());
    let avx_component =
        if mask & 4 != 0 { CpuidResult { eax: 256, ebx: 576, ecx: 0, edx: 0 } } else { CpuidResult::default() };
    table.set(0xd, Some(2), avx_component);
}

/// Adds component 9, PKRU, behind AVX's place, which is where AMD's processors have it (SDM vol. 1 13.5.7).
fn xsave_leaf_with_keys(table: &mut Cpuid) {
    let mut sizes = table.get(0xd, 0).unwrap_or_default();
    sizes.eax |= xcr0::PKRU as u32;
    sizes.ecx = (PKRU_OFFSET + PKRU_SIZE) as u32;
    // As without it: the size with all that the table shows. Engines put there what XCR0 has enabled.
    sizes.ebx = sizes.ecx;
    table.replace(0xd, 0, sizes);
    let component = CpuidResult { eax: PKRU_SIZE as u32, ebx: PKRU_OFFSET as u32, ecx: 0, edx: 0 };
    table.set(0xd, Some(9), component);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything any table could show.
    fn rich_host() -> Cpuid {
        let mut host = Cpuid::default();
        let all = CpuidResult { eax: !0, ebx: !0, ecx: !0, edx: !0 };
        host.set(0, None, text_leaf(0x20, b"GenuineIntel"));
        host.set(1, None, CpuidResult { eax: 0xc06f2, ..all });
        host.set(7, Some(0), all);
        host.set(7, Some(1), all);
        host.set(7, Some(2), all);
        host.set(0x8000_0001, None, all);
        host.set(0x8000_0007, None, all);
        host.set(0x8000_0008, None, CpuidResult { eax: 0x3930, ..CpuidResult::default() });
        host.set(0x4000_0001, None, CpuidResult { eax: 0xb, ..CpuidResult::default() });
        host
    }

    #[test]
    fn named_models_do_not_depend_on_what_else_the_host_has() {
        let table = CpuModel::V3.table(&rich_host(), 1, 0).unwrap();
        for feature in HOST_EXTRAS.iter().chain([&VMX, &SVM]) {
            assert!(!table.has(feature), "{}", feature.name);
        }
        for feature in BASELINE.iter().chain(V2).chain(V3).chain(SYSTEM) {
            assert!(table.has(feature), "{}", feature.name);
        }
        assert_eq!(table.get(7, 0).unwrap().ebx & (1 << 16 | 1 << 11 | 1 << 4), 0, "AVX-512F, RTM, HLE");
        assert_eq!(table.get(7, 0).unwrap().ecx & (1 << 16 | 1 << 3), 0, "LA57, PKU");
        assert_eq!(table.get(0x8000_0008, 0).unwrap().eax, 48 << 8 | 46);
        assert_eq!(table.get(0x4000_0001, 0).unwrap().eax, 0xa);
        let own = CpuModel::Host.table(&rich_host(), 1, 0).unwrap();
        assert_eq!(own.get(0x4000_0001, 0).unwrap().eax, 0xb);
        assert_eq!(table.get(0, 0).unwrap().ebx, u32::from_le_bytes(*b"Genu"));
    }

    #[test]
    fn v2_has_no_extended_state() {
        let table = CpuModel::V2.table(&rich_host(), 1, 0).unwrap();
        assert!(!table.has(&XSAVE) && !table.has(&AVX) && !table.has(&AVX2) && !table.has(&BMI2));
        assert_eq!(table.get(0xd, 0).unwrap(), CpuidResult::default());
    }

    #[test]
    fn xsave_sizes_agree_with_the_mask() {
        let table = CpuModel::V3.table(&rich_host(), 1, 0).unwrap();
        assert_eq!(table.get(0xd, 0).unwrap(), CpuidResult { eax: 7, ebx: 832, ecx: 832, edx: 0 });
        assert_eq!(table.get(0xd, 1).unwrap(), CpuidResult::default());
        assert_eq!(table.get(0xd, 2).unwrap(), CpuidResult { eax: 256, ebx: 576, ecx: 0, edx: 0 });
    }

    #[test]
    fn a_missing_feature_is_named() {
        let mut host = rich_host();
        let mut leaf7 = host.get(7, 0).unwrap();
        leaf7.ebx &= !(1 << 8 | 1 << 5);
        host.set(7, Some(0), leaf7);
        let error = CpuModel::V3.table(&host, 1, 0).unwrap_err();
        assert_eq!(error.features, ["avx2", "bmi2"]);
        assert!(error.to_string().contains("x86-64-v3") && error.to_string().contains("avx2, bmi2"));
        assert!(CpuModel::V2.table(&host, 1, 0).is_ok());
        let table = CpuModel::Host.table(&host, 1, 0).unwrap();
        assert!(!table.has(&AVX2) && table.has(&AVX) && table.has(&HOST_EXTRAS[0]));
        assert_eq!(table.get(1, 0).unwrap().eax, 0xc06f2);
    }

    #[test]
    fn topology_counts_cores_in_one_package() {
        for cpus in [1, 2, 3, 4, 64] {
            let table = CpuModel::V3.table(&rich_host(), cpus, cpus - 1).unwrap();
            let cores = table.get(0xb, 1).unwrap();
            assert_eq!((cores.ebx, cores.edx), (cpus, cpus - 1));
            assert!(1 << cores.eax >= cpus && (cpus == 1 || 1 << (cores.eax - 1) < cpus));
            assert_eq!(table.get(1, 0).unwrap().ebx >> 24, cpus - 1);
            assert_eq!(table.get(4, 3).unwrap().eax >> 26, (1 << cores.eax) - 1);
            assert_eq!(table.has(&HT), cpus > 1);
        }
    }

    #[test]
    fn features_can_be_left_out() {
        let host = rich_host();
        let choice: CpuChoice = "x86-64-v2,-smap,-pcid".parse().unwrap();
        let (full, less) = (CpuModel::V2.table(&host, 1, 0).unwrap(), choice.table(&host, 1, 0).unwrap());
        assert_eq!(full.differences(&less), ["pcid", "smap"]);
        assert_eq!(less.differences(&full), [] as [String; 0]);
        assert_eq!(choice.to_string(), "x86-64-v2,-pcid,-smap");
        assert_eq!(choice.to_string().parse(), Ok(choice));
        assert_eq!("x86-64-v3".parse(), Ok(CpuChoice::from(CpuModel::V3)));
        let narrow: CpuChoice = "x86-64-v3,phys-bits=40,-nonstop_tsc".parse().unwrap();
        assert_eq!(narrow.to_string(), "x86-64-v3,-nonstop_tsc,phys-bits=40");
        let table = narrow.table(&host, 1, 0).unwrap();
        assert_eq!((table.get(0x8000_0008, 0).unwrap().eax, table.get(0x8000_0007, 0).unwrap().edx), (48 << 8 | 40, 0));
        assert!("host,-avx2".parse::<CpuChoice>().unwrap().table(&host, 1, 0).is_ok_and(|table| !table.has(&AVX2)));
        for (bad, part) in [
            ("x86-64-v3,-avx2", "no feature 'avx2'"),
            ("x86-64-v2,-avx2", "no feature 'avx2'"),
            ("x86-64-v2,pcid", "'pcid'"),
            ("x86-64-v2,-", "no feature ''"),
            ("pentium,-pcid", "pentium"),
            ("host,phys-bits=99", "36 to 52"),
        ] {
            let message = bad.parse::<CpuChoice>().unwrap_err();
            assert!(message.contains(part) && !message.contains('\n'), "{message}");
        }
        assert!(CpuChoice::removable().count() <= 64);
    }

    #[test]
    fn differences_are_named() {
        let host = rich_host();
        let table = CpuModel::V3.table(&host, 2, 0).unwrap();
        assert_eq!(table.differences(&host), [] as [String; 0]);
        let mut poor = host.clone();
        let mut leaf7 = poor.get(7, 0).unwrap();
        leaf7.ebx &= !(1 << 5);
        poor.set(7, Some(0), leaf7);
        poor.set(0x8000_0008, None, CpuidResult { eax: 40, ..CpuidResult::default() });
        poor.set(0x4000_0001, None, CpuidResult { eax: 0x3, ..CpuidResult::default() });
        assert_eq!(table.differences(&poor), ["avx2", "CPUID 40000001h.0:eax bit 3", "46-bit physical addresses"]);
        let mut named = table.clone();
        named.set(0x4000_0000, None, text_leaf(0, b"KVMKVMKVM\0\0\0"));
        assert_eq!(named.differences(&host), ["KVM's paravirtual interface"]);
    }

    #[test]
    fn model_names_round_trip() {
        for model in CpuModel::ALL {
            assert_eq!(model.name().parse(), Ok(model));
        }
        assert!("pentium".parse::<CpuModel>().unwrap_err().contains("pentium"));
    }

    #[test]
    fn protection_keys_are_shown_on_request() {
        let keyed: CpuChoice = "host,-smap,+pku,+pks".parse().unwrap();
        assert_eq!(keyed.to_string(), "host,-smap,+pku,+pks");
        let table = keyed.table(&rich_host(), 1, 0).unwrap();
        assert!(table.has(&PKU) && table.has(&PKS) && !CpuModel::Host.table(&rich_host(), 1, 0).unwrap().has(&PKU));
        assert_eq!(table.get(0xd, 0), Some(CpuidResult { eax: 0x207, ebx: 840, ecx: 840, edx: 0 }));
        assert_eq!(table.get(0xd, 9).map(|leaf| (leaf.eax, leaf.ebx)), Some((8, 832)));
        let mut without = rich_host();
        without.replace(7, 0, CpuidResult { ecx: !(1 << 3), ..without.get(7, 0).unwrap() });
        let error = keyed.table(&without, 1, 0).unwrap_err().to_string();
        assert!(error.contains("lacks pku, which only some engines make"), "{error}");
        assert_eq!(table.differences(&without), ["pku"]);
        assert!("host,+smap".parse::<CpuChoice>().unwrap_err().contains("pku and pks are"));
    }
}
