//! What the translator does with each kind of instruction.
//!
//! Copying is by white list: an instruction that is not known to be harmless is interpreted. So a new or
//! forgotten instruction is slow, never wrong.

use super::block::Context;
use super::facts::operands;
use super::planted::{self, Bug};
use crate::vendor;
use anyvisor_x86::Cpuid;
use iced_x86::{Code, CpuidFeature as F, EncodingKind, FlowControl, Instruction, Mnemonic as M, OpKind, Register};

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing to do.
    Nop,
    /// Copied, registers renamed; touches no memory.
    Copy,
    /// Address computation.
    Lea,
    /// Copied with its memory operand redirected to host memory.
    Memory,
    Push,
    /// PUSH of a segment register in 32-bit code.
    PushSelector,
    Pop,
    Leave,
    CallDirect,
    CallIndirect,
    Return,
    JumpDirect,
    JumpIndirect,
    JumpIf,
    /// LOOP and JRCXZ.
    LoopJump,
    ReadTsc,
    /// MOV from a segment register to a general one.
    ReadSelector,
    /// See `sensitive`.
    Sensitive,
    /// See `strings`.
    String,
    /// BT and its kin on a bit string in memory.
    BitString,
    /// Left to the interpreter.
    Interpret,
}

/// What an instruction needs enabled, besides being in the CPU model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unit {
    Integer,
    /// x87, MMX, SSE: CR0.TS and EM clear, CR4.OSFXSR set.
    Fpu,
    /// VEX-encoded vectors: also CR4.OSXSAVE and XCR0.AVX.
    Avx,
}

/// Which CPUID features the vCPU shows.
pub struct Features {
    allowed: Vec<bool>,
}

impl Features {
    pub fn new(cpuid: &Cpuid) -> Features {
        let bit = |leaf, subleaf, register: usize, bit: u32| {
            let r = cpuid.get(leaf, subleaf).unwrap_or_default();
            [r.eax, r.ebx, r.ecx, r.edx][register] & (1 << bit) != 0
        };
        let mut allowed = vec![false; F::values().len()];
        let mut set = |feature: F, on: bool| allowed[feature as usize] = on;
        for f in [
            F::INTEL8086,
            F::INTEL186,
            F::INTEL286,
            F::INTEL386,
            F::INTEL486,
            F::X64,
            F::FPU,
            F::FPU287,
            F::FPU387,
            F::MULTIBYTENOP,
            F::PAUSE,
            F::CET_IBT,
        ] {
            set(f, true);
        }
        let (c, d, b) = (2, 3, 1);
        for (feature, leaf, register, number) in [
            (F::CX8, 1, d, 8),
            (F::CMOV, 1, d, 15),
            (F::MMX, 1, d, 23),
            (F::FXSR, 1, d, 24),
            (F::SSE, 1, d, 25),
            (F::SSE2, 1, d, 26),
            (F::SSE3, 1, c, 0),
            (F::PCLMULQDQ, 1, c, 1),
            (F::SSSE3, 1, c, 9),
            (F::FMA, 1, c, 12),
            (F::CMPXCHG16B, 1, c, 13),
            (F::SSE4_1, 1, c, 19),
            (F::SSE4_2, 1, c, 20),
            (F::MOVBE, 1, c, 22),
            (F::POPCNT, 1, c, 23),
            (F::AES, 1, c, 25),
            (F::AVX, 1, c, 28),
            (F::F16C, 1, c, 29),
            (F::RDRAND, 1, c, 30),
            (F::TSC, 1, d, 4),
            (F::BMI1, 7, b, 3),
            (F::AVX2, 7, b, 5),
            (F::BMI2, 7, b, 8),
            (F::RDSEED, 7, b, 18),
            (F::ADX, 7, b, 19),
            (F::SHA, 7, b, 29),
            (F::GFNI, 7, c, 8),
            (F::VAES, 7, c, 9),
            (F::VPCLMULQDQ, 7, c, 10),
            (F::LZCNT, 0x8000_0001, c, 5),
            (F::PREFETCHW, 0x8000_0001, c, 8),
            (F::RDTSCP, 0x8000_0001, d, 27),
        ] {
            set(feature, bit(leaf, 0, register, number));
        }
        let allowed = Code::values().map(|code| code.cpuid_features().iter().all(|f| allowed[*f as usize])).collect();
        Features { allowed }
    }

    fn allow(&self, instruction: &Instruction) -> bool {
        self.allowed[instruction.code() as usize]
    }
}

/// Classifies `instruction`; the caller has yet to check that its [`Unit`] is enabled.
pub fn classify(instruction: &Instruction, features: &Features, context: &Context) -> (Kind, Unit) {
    use Kind::*;
    let integer = |kind| (kind, Unit::Integer);
    if let Some(kind) = super::sensitive::kind(instruction.mnemonic(), context) {
        return integer(kind);
    }
    if instruction.is_invalid() || !features.allow(instruction) {
        return integer(Interpret);
    }
    // CS cannot be written.
    if context.bits() == 32 && instruction.segment_prefix() == Register::CS {
        return integer(Interpret);
    }
    // Stack accesses of the mode's own width; others have an operand-size prefix and are rare.
    let stack_bytes = if instruction.code_size() == iced_x86::CodeSize::Code64 { 8 } else { 4 };
    let wide_stack = instruction.stack_pointer_increment().unsigned_abs() == stack_bytes;
    match instruction.flow_control() {
        FlowControl::Next => {}
        FlowControl::UnconditionalBranch if instruction.is_jmp_short_or_near() => return integer(JumpDirect),
        FlowControl::IndirectBranch if instruction.code() == Code::Jmp_rm16 => return integer(Interpret),
        FlowControl::IndirectBranch if instruction.is_jmp_near_indirect() => return integer(JumpIndirect),
        FlowControl::ConditionalBranch => {
            return integer(if instruction.is_jcc_short_or_near() {
                JumpIf
            } else {
                match instruction.mnemonic() {
                    // Those that count in CX have no form in 64-bit code.
                    _ if counts_in_cx(instruction.code()) => Interpret,
                    M::Jrcxz | M::Jecxz | M::Loop | M::Loope | M::Loopne => LoopJump,
                    _ => Interpret,
                }
            });
        }
        FlowControl::Call if instruction.is_call_near() && wide_stack => return integer(CallDirect),
        FlowControl::IndirectCall if instruction.is_call_near_indirect() && wide_stack => {
            return integer(CallIndirect);
        }
        FlowControl::Return
            if matches!(instruction.code(), Code::Retnq | Code::Retnq_imm16 | Code::Retnd | Code::Retnd_imm16) =>
        {
            return integer(Return);
        }
        _ => return integer(Interpret),
    }
    if instruction.is_string_instruction() && super::strings::translatable(instruction, context.bits()).is_some() {
        return integer(String);
    }
    if instruction.is_privileged() || instruction.is_string_instruction() {
        return integer(Interpret);
    }
    if instruction.mnemonic() == M::Mov
        && instruction.op_kind(0) == OpKind::Register
        && instruction.op_kind(1) == OpKind::Register
        && instruction.op1_register().is_segment_register()
    {
        return integer(ReadSelector);
    }
    if context.bits() == 32
        && instruction.mnemonic() == M::Push
        && wide_stack
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().is_segment_register()
    {
        return integer(PushSelector);
    }
    for operand in 0..instruction.op_count() {
        let kind = instruction.op_kind(operand);
        let special = kind == OpKind::Register && {
            let r = instruction.op_register(operand);
            r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr() || r.is_k() || r.is_bnd() || r.is_zmm()
        };
        if special || matches!(kind, OpKind::FarBranch16 | OpKind::FarBranch32 | OpKind::MemoryESDI) {
            return integer(Interpret);
        }
    }
    if context.bits() == 32 && matches!(instruction.mnemonic(), M::Vzeroall | M::Vzeroupper) {
        // They leave YMM8 to YMM15 alone there.
        return (Interpret, Unit::Avx);
    }
    match instruction.mnemonic() {
        M::Nop
        | M::Endbr32
        | M::Endbr64
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw => integer(Nop),
        M::Lea => integer(Lea),
        M::Push if wide_stack => integer(Push),
        M::Pop if wide_stack => integer(Pop),
        M::Leave if matches!(instruction.code(), Code::Leaveq | Code::Leaved) => integer(Leave),
        M::Rdtsc | M::Rdtscp => integer(ReadTsc),
        // It reads more there than is known.
        M::Movsxd if instruction.code() == Code::Movsxd_r16_rm16 && vendor::is_amd() => integer(Interpret),
        // These set OF on AMD's, and nothing by what is known of their flags.
        M::Rcl | M::Rcr if turns_all_the_way(instruction) && vendor::is_amd() => integer(Interpret),
        mnemonic if is_plain_integer(mnemonic) => integer(with_operand(instruction)),
        mnemonic if is_unusual_vector(mnemonic) || instruction.is_vsib() => integer(Interpret),
        _ => classify_vector(instruction),
    }
}

/// Whether a rotation through CF, by a constant, ends where it began without having been by 0.
fn turns_all_the_way(instruction: &Instruction) -> bool {
    let bits = match instruction.op0_kind() {
        OpKind::Register => 8 * instruction.op0_register().size(),
        _ => 8 * instruction.memory_size().size(),
    };
    let by =
        if instruction.op1_kind() == OpKind::Immediate8 { usize::from(instruction.immediate8() & 0x1f) } else { 0 };
    by != 0 && bits < 32 && by % (bits + 1) == 0
}

fn with_operand(instruction: &Instruction) -> Kind {
    match operands(instruction, OpKind::Memory).next() {
        None => Kind::Copy,
        Some(_) if instruction.memory_size().size() == 0 => Kind::Interpret,
        Some(_) if is_bit_string(instruction) => {
            if instruction.memory_size().size() >= 4 {
                Kind::BitString
            } else {
                Kind::Interpret
            }
        }
        Some(_) => Kind::Memory,
    }
}

fn counts_in_cx(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX | Loopne_rel8_32_CX
    )
}

/// BT and its kin with a register offset address memory beyond their operand.
fn is_bit_string(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && instruction.op_kind(0) == OpKind::Memory
        && instruction.op_kind(1) == OpKind::Register
}

fn classify_vector(instruction: &Instruction) -> (Kind, Unit) {
    let vector = |r: Register| r.is_xmm() || r.is_ymm() || r.is_mm() || r.is_st();
    let features = instruction.cpuid_features();
    let fpu = features.iter().any(|f| {
        matches!(
            f,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::GFNI
        )
    });
    let avx = instruction.encoding() == EncodingKind::VEX
        && (features.iter().any(|f| matches!(f, F::AVX | F::AVX2 | F::FMA | F::F16C | F::VAES | F::VPCLMULQDQ))
            || (0..instruction.op_count())
                .any(|i| instruction.op_kind(i) == OpKind::Register && vector(instruction.op_register(i))));
    if avx {
        (with_operand(instruction), Unit::Avx)
    } else if fpu && instruction.encoding() == EncodingKind::Legacy {
        (with_operand(instruction), Unit::Fpu)
    } else {
        (Kind::Interpret, Unit::Integer)
    }
}

/// Vector and x87 instructions whose memory operand is implicit, masked, or larger than an operand.
fn is_unusual_vector(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Fnstenv
            | M::Fstenv
            | M::Fldenv
            | M::Clflush
            | M::Clflushopt
    )
}

/// Whether a copied instruction can raise an exception on the host: divisions, and anything with x87 or
/// SIMD arithmetic.
pub fn can_trap(instruction: &Instruction) -> bool {
    let mnemonic = instruction.mnemonic();
    matches!(mnemonic, M::Div | M::Idiv) || !is_plain_integer(mnemonic)
}

/// General-purpose instructions whose every effect is on renamed registers, status flags and their one
/// explicit memory operand.
fn is_plain_integer(mnemonic: M) -> bool {
    use M::*;
    matches!(
        mnemonic,
        Mov | Movzx
            | Movsx
            | Movsxd
            | Add
            | Or
            | Adc
            | Sbb
            | And
            | Sub
            | Xor
            | Cmp
            | Test
            | Inc
            | Dec
            | Neg
            | Not
            | Mul
            | Imul
            | Div
            | Idiv
            | Shl
            | Sal
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Bswap
            | Xchg
            | Xadd
            | Cmpxchg
            | Cmpxchg8b
            | Cmpxchg16b
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Lahf
            | Sahf
            | Clc
            | Stc
            | Cmc
            | Pause
            | Lfence
            | Mfence
            | Sfence
            | Crc32
            | Popcnt
            | Lzcnt
            | Tzcnt
            | Movbe
            | Movnti
            | Adcx
            | Adox
            | Rdrand
            | Rdseed
            | Andn
            | Bextr
            | Blsi
            | Blsmsk
            | Blsr
            | Bzhi
            | Mulx
            | Pdep
            | Pext
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Seto
            | Setno
            | Setb
            | Setae
            | Sete
            | Setne
            | Setbe
            | Seta
            | Sets
            | Setns
            | Setp
            | Setnp
            | Setl
            | Setge
            | Setle
            | Setg
            | Cmovo
            | Cmovno
            | Cmovb
            | Cmovae
            | Cmove
            | Cmovne
            | Cmovbe
            | Cmova
            | Cmovs
            | Cmovns
            | Cmovp
            | Cmovnp
            | Cmovl
            | Cmovge
            | Cmovle
            | Cmovg
    )
}

/// The RFLAGS bits of the status flags in so many of iced's bits.
const STATUS: [u32; 64] = {
    use anyvisor_x86::bits::rflags as r;
    use iced_x86::RflagsBits as B;
    let pairs = [(B::CF, r::CF), (B::PF, r::PF), (B::AF, r::AF), (B::ZF, r::ZF), (B::SF, r::SF), (B::OF, r::OF)];
    let mut table = [0; 64];
    let mut bits = 0;
    while bits < table.len() {
        let mut n = 0;
        while n < pairs.len() {
            assert!((pairs[n].0 as usize) < table.len());
            if bits & pairs[n].0 as usize != 0 {
                table[bits] |= pairs[n].1 as u32;
            }
            n += 1;
        }
        bits += 1;
    }
    table
};

/// Status flags that `instruction` reads and certainly overwrites, as RFLAGS bits.
pub fn flags(instruction: &Instruction) -> (u32, u32) {
    use anyvisor_x86::bits::rflags as r;
    let convert = |bits: u32| STATUS[bits as usize % STATUS.len()];
    let mut read = convert(instruction.rflags_read());
    if planted::is(Bug::CarryThoughtDead) {
        read &= !(r::CF as u32);
    }
    let written = convert(instruction.rflags_modified());
    if is_shift(instruction.mnemonic()) {
        // A count of zero leaves all flags as they were (SDM vol. 2B, SAL/SAR/SHL/SHR).
        let last = instruction.op_count() - 1;
        let certain = !matches!(instruction.mnemonic(), M::Rcl | M::Rcr)
            && match instruction.op_kind(last) {
                OpKind::Immediate8 => instruction.immediate8() & 0x1f != 0,
                _ => false,
            };
        if !certain {
            return (read, 0);
        }
    }
    (read, written)
}

fn is_shift(mnemonic: M) -> bool {
    matches!(mnemonic, M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd)
}

/// All six status flags.
pub const ALL_FLAGS: u32 = anyvisor_x86::bits::rflags::STATUS as u32;
