//! Which instructions a CPU model has: iced's feature names against the CPUID table.

use anyvisor_x86::Cpuid;
use anyvisor_x86::cpuid::Register::{self, Eax, Ebx, Ecx, Edx};
use iced_x86::{CpuidFeature as F, Instruction};

/// Whether the model shows everything that `instruction` needs. What is not named here (AVX-512, AMX, TSX,
/// CET, VMX, AMD's own extensions, ...) no model has.
pub fn is_supported(cpuid: &Cpuid, instruction: &Instruction) -> bool {
    instruction.cpuid_features().iter().all(|f| has_feature(cpuid, *f))
}

/// Whether `feature` belongs to the x87 unit.
pub(super) fn is_x87(feature: F) -> bool {
    matches!(feature, F::FPU | F::FPU287 | F::FPU287XL_ONLY | F::FPU387 | F::FPU387SL_ONLY)
}

/// Whether the CPUID table shows `feature`.
pub fn has_feature(cpuid: &Cpuid, feature: F) -> bool {
    match bit_of(feature) {
        Some((leaf, subleaf, register, bit)) => {
            cpuid.get(leaf, subleaf).is_some_and(|result| register.of(&result) >> bit & 1 != 0)
        }
        None => is_baseline(feature),
    }
}

/// What every x86-64 processor has and CPUID has no bit for.
fn is_baseline(feature: F) -> bool {
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CPUID
            | F::PAUSE
            | F::MULTIBYTENOP
            | F::RDPMC
            | F::FPU287
            | F::FPU387
    )
}

fn bit_of(feature: F) -> Option<(u32, u32, Register, u32)> {
    Some(match feature {
        F::SSE3 => (1, 0, Ecx, 0),
        F::PCLMULQDQ => (1, 0, Ecx, 1),
        F::SSSE3 => (1, 0, Ecx, 9),
        F::FMA => (1, 0, Ecx, 12),
        F::CMPXCHG16B => (1, 0, Ecx, 13),
        F::SSE4_1 => (1, 0, Ecx, 19),
        F::SSE4_2 => (1, 0, Ecx, 20),
        F::MOVBE => (1, 0, Ecx, 22),
        F::POPCNT => (1, 0, Ecx, 23),
        F::AES => (1, 0, Ecx, 25),
        F::XSAVE => (1, 0, Ecx, 26),
        F::AVX => (1, 0, Ecx, 28),
        F::F16C => (1, 0, Ecx, 29),
        F::RDRAND => (1, 0, Ecx, 30),
        F::FPU => (1, 0, Edx, 0),
        F::TSC => (1, 0, Edx, 4),
        F::MSR => (1, 0, Edx, 5),
        F::CX8 => (1, 0, Edx, 8),
        F::SEP => (1, 0, Edx, 11),
        F::CMOV => (1, 0, Edx, 15),
        F::CLFSH => (1, 0, Edx, 19),
        F::MMX => (1, 0, Edx, 23),
        F::FXSR => (1, 0, Edx, 24),
        F::SSE => (1, 0, Edx, 25),
        F::SSE2 => (1, 0, Edx, 26),
        F::FSGSBASE => (7, 0, Ebx, 0),
        F::BMI1 => (7, 0, Ebx, 3),
        F::AVX2 => (7, 0, Ebx, 5),
        F::BMI2 => (7, 0, Ebx, 8),
        F::INVPCID => (7, 0, Ebx, 10),
        F::RDSEED => (7, 0, Ebx, 18),
        F::ADX => (7, 0, Ebx, 19),
        F::SMAP => (7, 0, Ebx, 20),
        F::CLFLUSHOPT => (7, 0, Ebx, 23),
        F::CLWB => (7, 0, Ebx, 24),
        F::SHA => (7, 0, Ebx, 29),
        F::GFNI => (7, 0, Ecx, 8),
        F::VAES => (7, 0, Ecx, 9),
        F::VPCLMULQDQ => (7, 0, Ecx, 10),
        F::RDPID => (7, 0, Ecx, 22),
        F::MOVDIRI => (7, 0, Ecx, 27),
        F::MOVDIR64B => (7, 0, Ecx, 28),
        F::SERIALIZE => (7, 0, Edx, 14),
        F::AVX_VNNI => (7, 1, Eax, 4),
        F::XSAVEOPT => (0xd, 1, Eax, 0),
        F::LZCNT => (0x8000_0001, 0, Ecx, 5),
        F::PREFETCHW => (0x8000_0001, 0, Ecx, 8),
        F::SYSCALL => (0x8000_0001, 0, Edx, 11),
        F::RDTSCP => (0x8000_0001, 0, Edx, 27),
        _ => return None,
    })
}
