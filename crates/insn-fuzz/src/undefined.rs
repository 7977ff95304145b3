//! Which status flags a case leaves undefined, so that no difference in them counts.
//!
//! The manual leaves some flags of some instructions undefined (SDM vol. 1 appendix A); the decoder's
//! tables say which. A case whose later instructions read such a flag is not generated.

use crate::layout::bits_at;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};

/// The bits of RFLAGS for the decoder's set of flags.
fn rflags(bits: u32) -> u64 {
    [
        (RflagsBits::CF, 1u64 << 0),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::OF, 1 << 11),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |mask, (_, value)| mask | value)
}

/// Whether the instruction may leave all flags as they were: shifts by a count that may be 0, REP with RCX 0.
fn may_do_nothing(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let shift = matches!(instruction.mnemonic(), Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd);
    let by_cl = (1..instruction.op_count()).any(|n| instruction.op_register(n) == Register::CL);
    let by_zero = instruction.op_kinds().any(|k| k == OpKind::Immediate8) && instruction.immediate8() & 0x1f == 0;
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    shift && (by_cl || by_zero) || repeated && instruction.is_string_instruction()
}

/// What running `code` from `rip` up to (not including) `end` leaves undefined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undefined {
    /// Status flags, as bits of RFLAGS.
    pub flags: u64,
    /// An instruction reads a flag that an earlier one left undefined.
    pub read: bool,
}

pub fn undefined(code: &[u8], rip: u64, end: u64) -> Undefined {
    let mut result = Undefined::default();
    let mut decoder = Decoder::with_ip(bits_at(rip), code, rip, DecoderOptions::NONE);
    let mut branches = false;
    while decoder.can_decode() && decoder.ip() < end {
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break;
        }
        result.read |= rflags(instruction.rflags_read()) & result.flags != 0;
        // PUSHF and the like read every flag, whatever the decoder's table says.
        if matches!(instruction.code(), Code::Pushfq | Code::Pushfw | Code::Pushfd) {
            result.read |= result.flags != 0;
        }
        branches |= instruction.flow_control() != FlowControl::Next;
        if !branches && !may_do_nothing(&instruction) {
            result.flags &=
                !rflags(instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set());
        }
        result.flags |= rflags(instruction.rflags_undefined());
    }
    result
}

/// [`undefined`] for a case that stopped with RIP at `stopped`. Jumps go forward, so an instruction that
/// faulted had only earlier ones before it; a loop's earlier rounds add what the whole leaves undefined.
pub fn at_stop(code: &[u8], rip: u64, stopped: u64) -> u64 {
    let inside = stopped >= rip && stopped < rip + code.len() as u64;
    let end = if inside { stopped } else { u64::MAX };
    let earlier_rounds = if loops(code, rip) { undefined(code, rip, u64::MAX).flags } else { 0 };
    undefined(code, rip, end).flags | earlier_rounds
}

/// Whether a jump goes back: the loop around a whole sequence.
fn loops(code: &[u8], rip: u64) -> bool {
    Decoder::with_ip(bits_at(rip), code, rip, DecoderOptions::NONE).into_iter().any(|i| {
        let jump = matches!(i.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32);
        jump && (rip..=i.ip()).contains(&i.near_branch64())
    })
}

const STATUS: u64 = 0x8d5;

/// Status flags that the code from `fault` on overwrites before it reads them, whichever way its jumps go:
/// dead at the fault. The translator does not keep them across an access that faults, because the restarted
/// instruction and what follows cannot see them.
pub fn dead(code: &[u8], rip: u64, fault: u64) -> u64 {
    let instructions: Vec<_> = Decoder::with_ip(bits_at(rip), code, rip, DecoderOptions::NONE).into_iter().collect();
    // What is live before each instruction, and at the end, where the INT3 shows all. A loop needs a second
    // pass, and a third to be sure.
    let mut live = vec![0; instructions.len() + 1];
    live[instructions.len()] = STATUS;
    for (i, instruction) in (0..3).flat_map(|_| instructions.iter().enumerate().rev()) {
        let at = |ip: u64| instructions.iter().position(|other| other.ip() == ip).unwrap_or(instructions.len());
        let jump = matches!(instruction.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32);
        let after = match instruction.flow_control() {
            FlowControl::Next => live[i + 1],
            FlowControl::ConditionalBranch => live[i + 1] | live[at(instruction.near_branch64())],
            FlowControl::UnconditionalBranch | FlowControl::Call if jump => live[at(instruction.near_branch64())],
            _ => STATUS,
        };
        let written = if may_do_nothing(instruction) { 0 } else { rflags(instruction.rflags_modified()) };
        live[i] = rflags(instruction.rflags_read()) | after & !written;
    }
    match instructions.iter().position(|i| i.ip() == fault) {
        Some(at) => STATUS & !live[at],
        // A jump to somewhere else, which only minimised cases have: nothing is known.
        None => STATUS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::CODE;

    const ALL: u64 = u64::MAX;
    const AF: u64 = 1 << 4;

    #[test]
    fn flags_become_undefined_and_defined_again() {
        // and eax, ecx leaves AF undefined; add eax, ecx defines it.
        assert_eq!(undefined(&[0x21, 0xc8], CODE, ALL), Undefined { flags: AF, read: false });
        assert_eq!(undefined(&[0x21, 0xc8, 0x01, 0xc8], CODE, ALL), Undefined { flags: 0, read: false });
        // lahf after it reads AF.
        assert!(undefined(&[0x21, 0xc8, 0x9f], CODE, ALL).read);
        // pushfq reads AF too.
        assert!(undefined(&[0x21, 0xc8, 0x9c], CODE, ALL).read);
        // A shift that may do nothing does not define the flags again.
        assert_ne!(undefined(&[0x21, 0xc8, 0xd3, 0xe0], CODE, ALL).flags & AF, 0);
    }

    #[test]
    fn flags_are_dead_where_they_are_overwritten_unread() {
        // mov eax, [rcx]; and eax, ecx; adc eax, ecx.
        let code = [0x8b, 0x01, 0x21, 0xc8, 0x11, 0xc8];
        assert_eq!(dead(&code, CODE, CODE), 0x8d5);
        // The adc reads CF.
        assert_eq!(dead(&code, CODE, CODE + 4), 0x8d4);
        // mov eax, [rcx]; jrcxz over the and; and eax, ecx: live on one way.
        assert_eq!(dead(&[0x8b, 0x01, 0xe3, 0x02, 0x21, 0xc8], CODE, CODE), 0);
    }

    #[test]
    fn what_did_not_run_does_not_count() {
        // and eax, ecx faults at its own start when it touches memory: nothing is undefined.
        assert_eq!(at_stop(&[0x21, 0x08], CODE, CODE), 0);
        assert_eq!(at_stop(&[0x21, 0x08], CODE, CODE + 3), AF);
    }
}
