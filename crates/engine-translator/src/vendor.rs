//! Where processors of different makers differ in what programs can see.
//!
//! Code that is copied behaves as the host's processor does, so what is interpreted must do the same,
//! whatever vendor CPUID names: a guest may not see which of its instructions were translated. KVM's guests
//! see the same. What is known is what the fuzzer met on Intel's and AMD's processors; others count as
//! Intel's.
//!
//! Everything that decodes guest code does so by [`decoder`] and [`adapt`], which take most of it: what is
//! left asks [`is_amd`] in place. What no translated code does, SYSCALL outside 64-bit mode for one, goes by
//! the vendor that the guest's CPUID names ([`Core::is_amd`](crate::core::Core::is_amd)).

use crate::interpret::memory::is_canonical;
use iced_x86::{Code, CodeSize, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use std::arch::x86_64::__cpuid;
use std::sync::OnceLock;

/// Whether the host's processor is AMD's, or Hygon's, which are made as those are.
pub fn is_amd() -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    *AMD.get_or_init(|| names_amd(__cpuid(0).ebx))
}

/// Whether EBX of CPUID leaf 0 begins the name of AMD or of Hygon.
pub(crate) fn names_amd(ebx: u32) -> bool {
    [*b"Auth", *b"Hygo"].map(u32::from_le_bytes).contains(&ebx)
}

/// What guest code is decoded with. On AMD's, near branches take an operand-size prefix in 64-bit code, and far pointers no
/// REX.W (APM vol. 3, "Near Branches in 64-Bit Mode"; CALL far, JMP far, LSS).
pub fn decoder_options() -> u32 {
    if is_amd() { DecoderOptions::AMD } else { DecoderOptions::NONE }
}

/// How many bytes the offset of a far pointer in memory takes whose operand size is `size`.
pub fn far_offset_size(size: u32) -> u32 {
    if is_amd() { size.min(4) } else { size }
}

/// How many bytes a selector that is pushed takes of its 32-bit slot: Intel's processors leave the upper
/// ones alone (SDM vol. 2B, PUSH), AMD's clear them.
pub fn pushed_selector_size() -> u32 {
    if is_amd() { 4 } else { 2 }
}

/// The bit of AMD's in MXCSR by which misaligned operands are taken (APM vol. 1 4.2.2).
pub const MXCSR_MM: u32 = 1 << 17;

/// The bits that MXCSR has. Guests can set AMD's though CPUID does not tell them of it.
pub fn mxcsr_bits() -> u32 {
    if is_amd() { 0xffff | MXCSR_MM } else { 0xffff }
}

/// Whether 64-bit code may use `offset` in a segment, if what comes of it is canonical. AMD's processors
/// (seen: family 1Ah) want that of the offset itself, which differs from the address in FS and GS only.
pub fn takes_offset(offset: u64) -> bool {
    !is_amd() || is_canonical(offset)
}

/// Whether an access at the end of a segment with the largest limit goes on at its begin, instead of being beyond it.
pub fn wraps_at_4_gib() -> bool {
    !is_amd()
}

/// A decoder of guest code of `bits` bits at `rip`.
pub fn decoder(bits: u32, bytes: &[u8], rip: u64) -> Decoder<'_> {
    Decoder::with_ip(bits, bytes, rip, decoder_options())
}

/// The instructions in `bytes`, invalid ones too, as the host's processor takes them.
pub fn instructions(bits: u32, bytes: &[u8], rip: u64) -> impl Iterator<Item = Instruction> {
    let mut decoder = decoder(bits, bytes, rip);
    std::iter::from_fn(move || {
        let at = decoder.position();
        let mut instruction = decoder.can_decode().then(|| decoder.decode())?;
        adapt(&mut instruction, &bytes[at..]);
        Some(instruction)
    })
}

/// Makes of `instruction`, which starts at `bytes`, the one that the host's processor takes it for. Invalid ones stay so.
pub fn adapt(instruction: &mut Instruction, bytes: &[u8]) {
    if is_amd() {
        adapt_to_amd(instruction, bytes);
    }
}

fn adapt_to_amd(instruction: &mut Instruction, bytes: &[u8]) {
    const LOCK: u8 = 0xf0;
    match instruction.mnemonic() {
        // REX.B makes it XCHG of R8, F3 or not.
        Mnemonic::Pause if instruction.len() >= 2 && instruction.code_size() == CodeSize::Code64 => {
            let rex = bytes[instruction.len() - 2];
            if rex & 0xf1 == 0x41 {
                let narrow = bytes[..instruction.len() - 2].contains(&0x66);
                let (code, r8, rax) = match (rex & 8 != 0, narrow) {
                    (true, _) => (Code::Xchg_r64_RAX, Register::R8, Register::RAX),
                    (_, true) => (Code::Xchg_r16_AX, Register::R8W, Register::AX),
                    _ => (Code::Xchg_r32_EAX, Register::R8D, Register::EAX),
                };
                instruction.set_code(code);
                instruction.set_op0_register(r8);
                instruction.set_op0_kind(OpKind::Register);
                instruction.set_op1_register(rax);
                instruction.set_op1_kind(OpKind::Register);
                instruction.set_has_rep_prefix(false);
            }
        }
        // A REP prefix chooses the condition, as it does that of CMPS.
        Mnemonic::Loope if instruction.has_repne_prefix() => instruction.set_code(other_loop(instruction.code())),
        Mnemonic::Loopne if instruction.has_rep_prefix() => instruction.set_code(other_loop(instruction.code())),
        // Outside 64-bit code Intel's ignore VEX.W of these.
        Mnemonic::Vpextrd | Mnemonic::Vpinsrd if is_wide_vex(instruction, bytes) => instruction.set_code(Code::INVALID),
        // LOCK makes CR8 of CR0 if CPUID says so (APM vol. 3, MOV CRn), which it does not here.
        Mnemonic::Mov if has_cr(instruction) && bytes[..instruction.len() - 3].contains(&LOCK) => {
            instruction.set_code(Code::INVALID)
        }
        // REX.W widens what is pushed, though not the pointer (seen: family 1Ah).
        Mnemonic::Call if instruction.code() == Code::Call_m1632 && has_rex_w(instruction, bytes) => {
            instruction.set_code(Code::Call_m1664)
        }
        // Without a memory operand 0F 0D is no NOP.
        Mnemonic::Reservednop if is_prefetch_of_register(instruction) => instruction.set_code(Code::INVALID),
        _ => {}
    }
}

/// LOOPNE for LOOPE and the other way round.
fn other_loop(code: Code) -> Code {
    use Code::*;
    const PAIRS: [(Code, Code); 7] = [
        (Loope_rel8_16_CX, Loopne_rel8_16_CX),
        (Loope_rel8_32_CX, Loopne_rel8_32_CX),
        (Loope_rel8_16_ECX, Loopne_rel8_16_ECX),
        (Loope_rel8_32_ECX, Loopne_rel8_32_ECX),
        (Loope_rel8_64_ECX, Loopne_rel8_64_ECX),
        (Loope_rel8_16_RCX, Loopne_rel8_16_RCX),
        (Loope_rel8_64_RCX, Loopne_rel8_64_RCX),
    ];
    PAIRS.iter().find_map(|&(e, ne)| if code == e { Some(ne) } else { (code == ne).then_some(e) }).unwrap_or(code)
}

/// Whether VEX.W is set, outside 64-bit code.
fn is_wide_vex(instruction: &Instruction, bytes: &[u8]) -> bool {
    const LONG_VEX: u8 = 0xc4;
    let vex = bytes[..instruction.len()].iter().position(|byte| *byte == LONG_VEX);
    instruction.code_size() != CodeSize::Code64 && vex.is_some_and(|at| bytes[at + 2] & 0x80 != 0)
}

/// Whether 64-bit code has a REX prefix with W, right before the opcode.
fn has_rex_w(instruction: &Instruction, bytes: &[u8]) -> bool {
    const LEGACY: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
    let rex = bytes.iter().find(|byte| !LEGACY.contains(byte));
    instruction.code_size() == CodeSize::Code64 && rex.is_some_and(|rex| rex & 0xf8 == 0x48)
}

fn has_cr(instruction: &Instruction) -> bool {
    instruction.op0_register().is_cr() || instruction.op1_register().is_cr()
}

fn is_prefetch_of_register(instruction: &Instruction) -> bool {
    use Code::*;
    matches!(instruction.code(), Reservednop_rm16_r16_0F0D | Reservednop_rm32_r32_0F0D | Reservednop_rm64_r64_0F0D)
        && instruction.op0_kind() == OpKind::Register
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: &[u8]) -> String {
        let mut instruction = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::AMD).decode();
        adapt_to_amd(&mut instruction, bytes);
        instruction.to_string()
    }

    #[test]
    fn what_amds_processors_take_instructions_for() {
        for (bytes, expected) in [
            (&[0xf3, 0x90][..], "pause"),
            (&[0xf3, 0x41, 0x90], "xchg r8d,eax"),
            (&[0xf3, 0x4f, 0x90], "xchg r8,rax"),
            (&[0x66, 0xf3, 0x41, 0x90], "xchg r8w,ax"),
            (&[0xf3, 0xe0, 2], "loope 0000000000001005h"),
            (&[0xf2, 0xe1, 2], "loopne 0000000000001005h"),
            (&[0xf3, 0xe1, 2], "loope 0000000000001005h"),
            (&[0x66, 0x74, 2], "data16 je short 1005h"),
            (&[0x66, 0xe8, 2, 0], "data16 call 1006h"),
            (&[0x66, 0xc3], "data16 ret"),
            (&[0x48, 0xff, 0x1f], "call far tbyte ptr [rdi]"),
            (&[0x2e, 0x66, 0x49, 0xff, 0x1f], "call far tbyte ptr [r15]"),
            (&[0x41, 0xff, 0x1f], "call far fword ptr [r15]"),
            (&[0x48, 0xff, 0x2f], "jmp far fword ptr [rdi]"),
            (&[0x0f, 0x0d, 0xc8], "(bad)"),
            (&[0xf0, 0x0f, 0x20, 0xc0], "(bad)"),
        ] {
            assert_eq!(decoded(bytes), expected, "{bytes:02x?}");
        }
    }
}
