//! Which status flags a case leaves undefined, so that no difference in them counts.
//!
//! The manual leaves some flags of some instructions undefined (SDM vol. 1 appendix A); the decoder's
//! tables say which. A case whose later instructions read such a flag is not generated.

use crate::layout::bits_at;
use anyvisor_engine_translator::vendor;
use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};

/// The bits of RFLAGS for the decoder's set of flags.
fn rflags(bits: u32) -> u64 {
    const SETS: usize = 64;
    const ALL: u32 =
        RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;
    const _: () = assert!(ALL < SETS as u32);
    const TABLE: [u16; SETS] = {
        let flags = [
            (RflagsBits::CF, 0),
            (RflagsBits::PF, 2),
            (RflagsBits::AF, 4),
            (RflagsBits::ZF, 6),
            (RflagsBits::SF, 7),
            (RflagsBits::OF, 11),
        ];
        let mut table = [0; SETS];
        let mut set = 0;
        while set < SETS {
            let mut flag = 0;
            while flag < flags.len() {
                table[set] |= ((set as u32 & flags[flag].0 != 0) as u16) << flags[flag].1;
                flag += 1;
            }
            set += 1;
        }
        table
    };
    u64::from(TABLE[(bits & ALL) as usize])
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

/// Grows a straight line of instructions with jumps forward, or a loop around it, that reads no flag which one of its
/// instructions has left undefined. The jumps need not be linked yet.
#[derive(Debug, Default)]
pub struct Line {
    instructions: Vec<Instruction>,
    looped: bool,
    behind: Passed,
}

/// What is so behind some instructions.
#[derive(Clone, Copy, Debug, Default)]
struct Passed {
    undefined: u64,
    branches: bool,
}

impl Passed {
    /// Goes on behind `instruction`; `false` if that reads an undefined flag.
    fn pass(&mut self, instruction: &Instruction) -> bool {
        if read(instruction) & self.undefined != 0 {
            return false;
        }
        self.branches |= instruction.flow_control() != FlowControl::Next;
        self.undefined = match self.branches {
            true => self.undefined | left_undefined(instruction),
            false => after(instruction, self.undefined),
        };
        true
    }
}

impl Line {
    pub fn new(looped: bool) -> Line {
        Line { looped, ..Line::default() }
    }

    /// Appends `instruction`, unless the line would read an undefined flag then.
    pub fn push(&mut self, instruction: Instruction) -> bool {
        let mut behind = self.behind;
        if !behind.pass(&instruction) {
            return false;
        }
        // In a loop all of them follow themselves.
        let mut again = behind;
        if self.looped && !self.instructions.iter().chain([&instruction]).all(|i| again.pass(i)) {
            return false;
        }
        self.behind = behind;
        self.instructions.push(instruction);
        true
    }
}

/// The status flags that it reads.
fn read(instruction: &Instruction) -> u64 {
    // PUSHF and the like read every flag, whatever the decoder's table says.
    match instruction.code() {
        Code::Pushfq | Code::Pushfw | Code::Pushfd => STATUS,
        // AMD's set OF by it after whole turns too, of which the decoder's table says that they do nothing.
        _ if instruction.mnemonic() == Mnemonic::Rcl && vendor::is_amd() && !may_do_nothing(instruction) => {
            rflags(instruction.rflags_read()) | CF
        }
        _ => rflags(instruction.rflags_read()),
    }
}

fn left_undefined(instruction: &Instruction) -> u64 {
    rflags(instruction.rflags_undefined())
}

/// The flags that are undefined after the instruction, if `before` are before it.
fn after(instruction: &Instruction, before: u64) -> u64 {
    let defined = match may_do_nothing(instruction) {
        true => 0,
        false => rflags(instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set()),
    };
    before & !defined | left_undefined(instruction)
}

const STATUS: u64 = 0x8d5;
const CF: u64 = 1;

/// Where an instruction may go on: indices of instructions; their number stands for everything else.
#[derive(Clone, Copy)]
enum Successors {
    One([usize; 1]),
    Two([usize; 2]),
    /// [`Flow::taken`].
    Taken,
}

/// A case's code, decoded, with where each instruction may go on.
pub struct Flow {
    instructions: Vec<Instruction>,
    successors: Vec<Successors>,
    /// Where returns and indirect jumps may go: behind calls, to addresses that are taken, elsewhere.
    taken: Vec<usize>,
    /// Status flags that may be undefined before each, and elsewhere.
    undefined: Vec<u64>,
}

impl Flow {
    pub fn new(code: &[u8], rip: u64) -> Flow {
        let instructions: Vec<_> =
            vendor::instructions(bits_at(rip), code, rip).take_while(|instruction| !instruction.is_invalid()).collect();
        let outside = instructions.len();
        let index = |ip: u64| instructions.binary_search_by_key(&ip, Instruction::ip).unwrap_or(outside);
        let mut taken = vec![outside];
        for instruction in &instructions {
            if matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall) {
                taken.push(index(instruction.next_ip()));
            } else if instruction.mnemonic() == Mnemonic::Lea && instruction.is_ip_rel_memory_operand() {
                taken.push(index(instruction.ip_rel_memory_address()));
            }
        }
        let successors = instructions
            .iter()
            .map(|instruction| {
                let near = matches!(
                    instruction.op0_kind(),
                    OpKind::NearBranch64 | OpKind::NearBranch32 | OpKind::NearBranch16
                );
                match instruction.flow_control() {
                    // What raises an exception stops there or behind it.
                    FlowControl::Next | FlowControl::Interrupt | FlowControl::Exception => {
                        Successors::One([index(instruction.next_ip())])
                    }
                    FlowControl::ConditionalBranch => {
                        Successors::Two([index(instruction.next_ip()), index(instruction.near_branch_target())])
                    }
                    FlowControl::UnconditionalBranch | FlowControl::Call if near => {
                        Successors::One([index(instruction.near_branch_target())])
                    }
                    _ => Successors::Taken,
                }
            })
            .collect();
        let mut flow = Flow { undefined: vec![0; outside + 1], instructions, successors, taken };
        flow.find_undefined();
        flow
    }

    fn find_undefined(&mut self) {
        let mut undefined = std::mem::take(&mut self.undefined);
        let mut changed = true;
        while std::mem::take(&mut changed) {
            for (i, instruction) in self.instructions.iter().enumerate() {
                let flags = after(instruction, undefined[i]);
                for &next in self.successors(i) {
                    changed |= flags & !undefined[next] != 0;
                    undefined[next] |= flags;
                }
            }
        }
        self.undefined = undefined;
    }

    fn successors(&self, index: usize) -> &[usize] {
        match &self.successors[index] {
            Successors::One(next) => next,
            Successors::Two(next) => next,
            Successors::Taken => &self.taken,
        }
    }

    /// The instructions that read a flag which may be undefined, by index.
    pub fn reads_undefined(&self) -> Vec<usize> {
        let instructions = self.instructions.iter().zip(&self.undefined).enumerate();
        instructions.filter(|(_, (instruction, flags))| read(instruction) & *flags != 0).map(|(i, _)| i).collect()
    }

    /// The status flags that may be undefined when the case stops with RIP at `stopped`.
    pub fn undefined_at(&self, stopped: u64) -> u64 {
        match self.instructions.binary_search_by_key(&stopped, Instruction::ip) {
            Ok(at) => self.undefined[at],
            Err(_) if self.is_inside(stopped) => STATUS,
            Err(_) => self.undefined[self.instructions.len()],
        }
    }

    /// Whether `ip` is in the middle of an instruction.
    fn is_inside(&self, ip: u64) -> bool {
        match self.instructions.binary_search_by_key(&ip, Instruction::ip) {
            Ok(_) | Err(0) => false,
            Err(behind) => ip < self.instructions[behind - 1].next_ip(),
        }
    }

    /// Whether the code can go on from `from` to `to` as far as is known here.
    pub fn foresees(&self, from: u64, to: u64) -> bool {
        if from == to {
            return true;
        }
        let index = |ip: u64| self.instructions.binary_search_by_key(&ip, Instruction::ip);
        match (index(from), index(to)) {
            (Ok(from), Ok(to)) => self.successors(from).contains(&to),
            (Err(_), Ok(to)) => to == 0,
            (_, Err(_)) => !self.is_inside(to),
        }
    }

    /// Whether an instruction of the case is at `ip` and is a near CALL.
    pub fn is_call(&self, ip: u64) -> bool {
        self.instructions.iter().any(|i| i.ip() == ip && (i.is_call_near() || i.is_call_near_indirect()))
    }

    /// Whether an instruction of the case is at `ip` and has an MMX register.
    pub fn is_mmx(&self, ip: u64) -> bool {
        self.instructions.iter().any(|i| i.ip() == ip && (0..i.op_count()).any(|n| i.op_register(n).is_mm()))
    }

    /// Status flags that the code from `fault` on overwrites before it reads them, whichever way its jumps go:
    /// dead at the fault. The translator does not keep them across an access that faults, because the restarted
    /// instruction and what follows cannot see them.
    pub fn dead_at(&self, fault: u64) -> u64 {
        // Outside, where the INT3 shows all, every flag is live.
        let mut live = vec![0; self.instructions.len() + 1];
        live[self.instructions.len()] = STATUS;
        let mut changed = true;
        while std::mem::take(&mut changed) {
            for (i, instruction) in self.instructions.iter().enumerate().rev() {
                let after = self.successors(i).iter().fold(0, |flags, &next| flags | live[next]);
                let written = if may_do_nothing(instruction) { 0 } else { rflags(instruction.rflags_modified()) };
                let before = read(instruction) | after & !written;
                changed |= live[i] != before;
                live[i] = before;
            }
        }
        match self.instructions.binary_search_by_key(&fault, Instruction::ip) {
            Ok(at) => STATUS & !live[at],
            // A jump to somewhere else, which only minimised cases have: nothing is known.
            Err(_) => STATUS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::CODE;

    const AF: u64 = 1 << 4;

    #[test]
    fn flags_become_undefined_and_defined_again() {
        let at_end = |code: &[u8]| Flow::new(code, CODE).undefined_at(CODE + code.len() as u64 + 1);
        let reads = |code: &[u8]| Flow::new(code, CODE).reads_undefined();
        // and eax, ecx leaves AF undefined; add eax, ecx defines it.
        assert_eq!((at_end(&[0x21, 0xc8]), reads(&[0x21, 0xc8])), (AF, vec![]));
        assert_eq!((at_end(&[0x21, 0xc8, 0x01, 0xc8]), reads(&[0x21, 0xc8, 0x01, 0xc8])), (0, vec![]));
        // lahf after it reads AF.
        assert_eq!(reads(&[0x21, 0xc8, 0x9f]), [1]);
        // pushfq reads AF too.
        assert_eq!(reads(&[0x21, 0xc8, 0x9c]), [1]);
        // A shift that may do nothing does not define the flags again.
        assert_ne!(at_end(&[0x21, 0xc8, 0xd3, 0xe0]) & AF, 0);
        // A return may lead to the INT3 before the first instruction.
        assert_eq!(Flow::new(&[0x21, 0xc8, 0xc3], CODE).undefined_at(CODE - 1), AF);
        assert_eq!(Flow::new(&[0x21, 0xc8, 0x01, 0xc8, 0xc3], CODE).undefined_at(CODE - 1), 0);
        // div ecx leaves CF undefined, and rcl al, 9 sets OF by it on AMD's.
        assert_eq!(reads(&[0xf7, 0xf1, 0xc0, 0xd0, 9]), if vendor::is_amd() { vec![1] } else { vec![] });
    }

    #[test]
    fn flags_are_dead_where_they_are_overwritten_unread() {
        // mov eax, [rcx]; and eax, ecx; adc eax, ecx.
        let code = [0x8b, 0x01, 0x21, 0xc8, 0x11, 0xc8];
        assert_eq!(Flow::new(&code, CODE).dead_at(CODE), 0x8d5);
        // The adc reads CF.
        assert_eq!(Flow::new(&code, CODE).dead_at(CODE + 4), 0x8d4);
        // mov eax, [rcx]; jrcxz over the and; and eax, ecx: live on one way.
        assert_eq!(Flow::new(&[0x8b, 0x01, 0xe3, 0x02, 0x21, 0xc8], CODE).dead_at(CODE), 0);
    }

    #[test]
    fn what_did_not_run_does_not_count() {
        // and [rax], ecx faults at its own start when it touches memory: nothing is undefined.
        assert_eq!(Flow::new(&[0x21, 0x08], CODE).undefined_at(CODE), 0);
        assert_eq!(Flow::new(&[0x21, 0x08], CODE).undefined_at(CODE + 3), AF);
    }

    #[test]
    fn calls_and_loops_carry_flags_on() {
        // call +2; jmp end; and eax, ecx; ret; end: what the function leaves undefined is so at the end.
        let code = [0xe8, 2, 0, 0, 0, 0xeb, 3, 0x21, 0xc8, 0xc3];
        assert_eq!(Flow::new(&code, CODE).undefined_at(CODE + 5), AF);
        // lahf; and eax, ecx; dec edx; jnz to the lahf: AF is defined by dec; without it lahf reads what and left.
        assert_eq!(Flow::new(&[0x9f, 0x21, 0xc8, 0xff, 0xca, 0x75, 0xf9], CODE).reads_undefined(), Vec::<usize>::new());
        assert_eq!(Flow::new(&[0x9f, 0x21, 0xc8, 0x75, 0xfb], CODE).reads_undefined(), [0]);
    }
}
