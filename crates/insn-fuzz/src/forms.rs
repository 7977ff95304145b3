//! Which instruction forms are tested: every [`Code`] of the decoder whose CPU features are allowed, but
//! for those whose result the host and a guest do not share or that would leave user mode.
//!
//! Left out, and why:
//! - SYSCALL, SYSENTER, INT n, INTO, IRET, far CALL, JMP and RET: they leave for the host kernel, or change CS.
//! - loads of segment registers, LAR, LSL, VERR, VERW, SGDT, SIDT, SLDT, STR, SMSW: descriptor tables are
//!   the system's own (and UMIP lets the host kernel emulate some).
//! - CPUID, RDTSC, RDTSCP, RDPMC, RDPID, RDRAND, RDSEED, XGETBV: not the same twice, or not shared.
//! - POPA: when it faults midway the CPU has popped some registers already, which restarting makes good.
//! - XSAVE and its kin, FXRSTOR, FRSTOR, FLDENV and what stores the x87 pointers: the images hold addresses
//!   of instructions executed before, and the host's XCR0.

use anyvisor_engine_translator::vendor;
use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, MandatoryPrefix, Mnemonic, OpCodeInfo, OpCodeOperandKind,
};
use std::sync::OnceLock;

/// What `--class` selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Class {
    /// Integer instructions, BMI and ADX included.
    Int,
    /// Integer instructions with a memory operand.
    Mem,
    /// SSE to SSE4.2, AES, PCLMULQDQ, SHA.
    Sse,
    /// AVX, AVX2, FMA, F16C.
    Avx,
    X87,
    Mmx,
    /// MOVS, STOS and their kin, repeated or not.
    String,
    /// Jumps, calls, returns, and what always raises an exception.
    Branch,
    /// PUSH, POP, ENTER, LEAVE, PUSHF, POPF.
    Stack,
    /// Instructions that user mode must not execute.
    Privileged,
    /// Code as compilers make it: the common instructions of other classes in blocks with shared base registers,
    /// flags that are used later, loops, calls and returns ([`crate::blocks`]).
    Block,
}

/// One instruction form.
#[derive(Clone, Copy)]
pub struct Form {
    pub code: Code,
    pub class: Class,
    pub info: &'static OpCodeInfo,
    pub operands: Operands,
    /// Its explicit register operands are general registers.
    pub general: bool,
    /// The one prefix that it needs, if any.
    pub plain_prefix: u8,
}

const FEATURES: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::ADX,
    CpuidFeature::AES,
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::CET_IBT,
    CpuidFeature::CLFLUSHOPT,
    CpuidFeature::CLFSH,
    CpuidFeature::CLWB,
    CpuidFeature::CMOV,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CX8,
    CpuidFeature::F16C,
    CpuidFeature::FMA,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FSGSBASE,
    CpuidFeature::FXSR,
    CpuidFeature::LZCNT,
    CpuidFeature::MMX,
    CpuidFeature::MOVBE,
    CpuidFeature::MSR,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::PCLMULQDQ,
    CpuidFeature::POPCNT,
    CpuidFeature::PREFETCHW,
    CpuidFeature::SHA,
    CpuidFeature::SMAP,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::SSSE3,
];

fn excluded(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Syscall | Sysenter | Int | Int1 | Into | Iret | Iretd | Iretq | Retf
            | Lss | Lfs | Lgs | Lds | Les | Lar | Lsl | Verr | Verw | Sgdt | Sidt | Sldt | Str | Smsw
            | Cpuid | Rdtsc | Rdtscp | Rdpmc | Rdpid | Rdrand | Rdseed | Xgetbv
            | Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Fnsave | Frstor | Fnstenv | Fldenv
            // Undefined by the manual in a way that differs by state of the CPU, not of the program.
            | Ud0 | Ud1
            // Undocumented or obsolete encodings that the decoder knows under an allowed feature.
            | Popa
            | Popad
            | Loadall | Umov | Ibts | Xbts | Rsm
    )
}

fn loads_segment(info: &OpCodeInfo) -> bool {
    use OpCodeOperandKind::*;
    let sink = info.op_count() > 0 && matches!(info.op0_kind(), seg_reg | es | cs | ss | ds | fs | gs);
    let far = info.op_kinds().iter().any(|k| matches!(k, farbr2_2 | farbr4_2));
    (sink && info.mnemonic() != Mnemonic::Push) || far
}

fn form(code: Code, bits: u32) -> Option<Form> {
    let info = code.op_code();
    let far = matches!(
        code,
        Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664 | Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664
    );
    let encodings = matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    if !info.is_instruction()
        || !info.is_available_in_mode(bits)
        || !(match (vendor::is_amd(), bits) {
            (false, 64) => info.intel_decoder64(),
            (false, _) => info.intel_decoder32(),
            (true, 64) => info.amd_decoder64(),
            (true, _) => info.amd_decoder32(),
        })
        || info.fwait()
        || !encodings
        || far
        || loads_segment(info)
    {
        return None;
    }
    if !code.cpuid_features().iter().all(|f| FEATURES.contains(f)) || excluded(code.mnemonic()) {
        return None;
    }
    let narrow = info.operand_size() == 16;
    let plain_prefix = match info.mandatory_prefix() {
        _ if info.encoding() == EncodingKind::VEX => 0,
        MandatoryPrefix::P66 => 0x66,
        MandatoryPrefix::PF3 => 0xf3,
        MandatoryPrefix::PF2 => 0xf2,
        _ if narrow => 0x66,
        _ => 0,
    };
    let general = info.op_kinds().iter().all(|kind| !is_vector(*kind));
    Some(Form { code, class: class_of(code, info), info, operands: operands(info), general, plain_prefix })
}

/// Whether the operand is an MMX or a vector register, or may be.
fn is_vector(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(
        kind,
        mm_or_mem | mm_reg | mm_rm | xmm_or_mem | xmm_reg | xmm_rm | ymm_or_mem | ymm_reg | ymm_rm | sti_opcode
    )
}

fn class_of(code: Code, info: &OpCodeInfo) -> Class {
    let has = |wanted: &[CpuidFeature]| code.cpuid_features().iter().any(|f| wanted.contains(f));
    if code.is_privileged() || info.is_input_output() {
        Class::Privileged
    } else if code.flow_control() != FlowControl::Next {
        Class::Branch
    } else if code.is_string_instruction() {
        Class::String
    } else if code.is_stack_instruction() {
        Class::Stack
    } else if has(&[CpuidFeature::BMI1, CpuidFeature::BMI2]) {
        Class::Int
    } else if info.encoding() == EncodingKind::VEX {
        Class::Avx
    } else if has(&[CpuidFeature::FPU, CpuidFeature::FPU287, CpuidFeature::FPU387]) {
        Class::X87
    } else if info
        .op_kinds()
        .iter()
        .any(|k| matches!(k, OpCodeOperandKind::mm_or_mem | OpCodeOperandKind::mm_reg | OpCodeOperandKind::mm_rm))
        || has(&[CpuidFeature::MMX])
    {
        Class::Mmx
    } else if info
        .op_kinds()
        .iter()
        .any(|k| matches!(k, OpCodeOperandKind::xmm_or_mem | OpCodeOperandKind::xmm_reg | OpCodeOperandKind::xmm_rm))
    {
        Class::Sse
    } else {
        Class::Int
    }
}

/// The forms tested, indexed two ways.
pub struct Forms {
    by_code: Vec<Option<Form>>,
    all: Vec<Form>,
}

impl Forms {
    /// Those of 64-bit or of 32-bit code.
    pub fn get(bits: u32) -> &'static Forms {
        static FORMS: [OnceLock<Forms>; 2] = [OnceLock::new(), OnceLock::new()];
        FORMS[usize::from(bits == 64)].get_or_init(|| {
            let by_code: Vec<_> = Code::values().map(|code| form(code, bits)).collect();
            let all = by_code.iter().flatten().copied().collect();
            Forms { by_code, all }
        })
    }

    /// The form of a decoded instruction, if it is one that is tested.
    pub fn of(&self, code: Code) -> Option<&Form> {
        self.by_code[code as usize].as_ref()
    }

    pub fn all(&self) -> &[Form] {
        &self.all
    }

    /// The forms of `class`; for [`Class::Mem`], those of [`Class::Int`] that can have a memory operand.
    pub fn of_class(&self, class: Class) -> Vec<Form> {
        let wanted = |f: &&Form| match class {
            Class::Mem => f.class == Class::Int && f.operands.memory,
            _ => f.class == class,
        };
        self.all.iter().filter(wanted).copied().collect()
    }
}

/// What a form's ModRM byte may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operands {
    pub modrm: bool,
    pub memory: bool,
    pub register: bool,
    pub vsib: bool,
    pub vvvv: bool,
    /// A register number in the low bits of the opcode.
    pub in_opcode: bool,
}

/// Reads off the operand kinds how the form is encoded.
pub fn operands(info: &OpCodeInfo) -> Operands {
    use OpCodeOperandKind::*;
    let mut result = Operands::default();
    let mut both = false;
    for kind in info.op_kinds() {
        match kind {
            mem | mem_mib | mem_mpx => result.memory = true,
            mem_vsib32x | mem_vsib64x | mem_vsib32y | mem_vsib64y => {
                result.memory = true;
                result.vsib = true;
            }
            r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem | ymm_or_mem => both = true,
            r16_rm | r32_rm | r64_rm | mm_rm | xmm_rm | ymm_rm | r16_reg_mem | r32_reg_mem | r64_reg_mem => {
                result.register = true;
            }
            r8_reg | r16_reg | r32_reg | r64_reg | mm_reg | xmm_reg | ymm_reg | seg_reg | cr_reg | dr_reg => {
                result.modrm = true;
            }
            r32_vvvv | r64_vvvv | xmm_vvvv | ymm_vvvv => result.vvvv = true,
            r8_opcode | r16_opcode | r32_opcode | r64_opcode | sti_opcode => result.in_opcode = true,
            _ => (),
        }
    }
    result.memory |= both;
    result.register |= both;
    result.modrm |= result.memory || result.register || info.is_group();
    if result.modrm && !result.memory && !result.register {
        result.register = true;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_what_it_should() {
        let forms = Forms::get(64);
        for code in [Code::Add_rm64_r64, Code::VEX_Vpgatherdd_xmm_vm32x_xmm, Code::Fsin, Code::Cmpxchg16b_m128] {
            assert!(forms.of(code).is_some(), "{code:?}");
        }
        for code in [Code::Syscall, Code::Mov_Sreg_r32m16, Code::Xbegin_rel32, Code::Int_imm8, Code::Vmcall] {
            assert!(forms.of(code).is_none(), "{code:?}");
        }
        assert!(forms.all().len() > 1800, "{} forms", forms.all().len());
    }
}
