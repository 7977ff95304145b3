//! One block: from guest bytes to host code.
//!
//! A block starts where control arrives and runs through not-taken conditional branches to the first
//! transfer that does not fall through, to the page's end, or to a limit. Two passes: decode with the
//! liveness of the status flags, backwards; then emission.
//!
//! Conventions of translated code:
//! - GS is the vCPU block. RSP is a real host stack, 16-byte aligned.
//! - Guest RSP is in R9, RSI in R10 and RDI in R11, the others in the registers of the same name, but for guest
//!   R9–R11: compilers use these least, and they live in the vCPU block. RSI and RDI are scratch.
//! - Status flags are the guest's; DF is clear (a block is only made for a guest DF of 0).
//! - What can fault or miss comes before anything is committed, so that the interpreter can execute the
//!   instruction from the state at its start.

use super::access::{Ea, Elsewhere, Miss};
use super::assembler::*;
use super::classify::{self, ALL_FLAGS, Features, Kind, Unit};
use super::coalesce::{Access, Coalescer, Groups, Regions, Role};
use super::control::FarJump;
use super::encoding::{Fields, Layout};
use super::facts::{Effects, Facts, operands};
use super::flags::Redo;
use super::planted::{self, Bug};
use super::rename::{Held, Plan};
use super::sensitive::{OddBase, OddSyscall};
use crate::cpu::{Cpu, DELTAS, JumpContext, Tag};
use crate::vendor;
use anyvisor_x86::bits::gpr;
use iced_x86::{Instruction, OpAccess, OpKind, Register};
use std::mem::offset_of;

/// Guest instructions in a block at most.
const MAX_INSTRUCTIONS: usize = 64;
/// Conditional branches a block runs through at most.
const MAX_BRANCHES: usize = 6;
/// Instructions looked at to see whether a branch target overwrites the flags.
const PEEK_INSTRUCTIONS: usize = 12;

/// What translation depends on besides the code bytes; part of a block's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub jumps: JumpContext,
    pub tlb: u8,
    /// x87, MMX and SSE may run (CR0.TS and EM clear, CR4.OSFXSR set).
    pub fpu: bool,
    /// VEX vectors may run too.
    pub avx: bool,
    /// SMAP is enabled, so that RFLAGS.AC chooses the TLB.
    pub smap: bool,
    /// CR4.FSGSBASE is set.
    pub fsgsbase: bool,
    /// CR4.TSD allows RDTSC.
    pub tsc: bool,
}

impl std::hash::Hash for Context {
    /// In one step: blocks are looked for all the time.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        let flags = [self.fpu, self.avx, self.smap, self.fsgsbase, self.tsc];
        let flags = flags.iter().fold(0, |all, &flag| all << 1 | u64::from(flag));
        state.write_u64(flags << 16 | u64::from(self.tlb) << 8 | self.jumps as u64);
    }
}

impl Context {
    pub fn bits(&self) -> u32 {
        self.jumps.bits()
    }
}

/// What happens at one way out of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// Go on at this linear address, on a page of the block; the jump may be linked to the block there.
    Direct { target: u64 },
    /// As `Direct`, but on another page, so that the mapping may change, or in another context: through a link
    /// ([`Cpu::links`]) that goes when it does. Which one is known once the block is placed.
    Far { target: u64, context: JumpContext, link: u32 },
    /// As `Direct` to the block's own start, but linked to `inside`, a position in its own code.
    Loop { target: u64, inside: u32 },
    /// Interpret the instruction at this address.
    Interpret { rip: u64 },
    /// The meaning of linear addresses may have changed since this instruction, which runs over the end of
    /// the page, was last checked. The generation it was checked at is the 32-bit immediate at `patch`.
    Recheck { patch: u32 },
    /// Go on at the address in [`word::TARGET`]. Should it not be canonical, the branch at `rip` has to be
    /// interpreted with RSP moved back by `stack`.
    Indirect { rip: u64, stack: i32, cut: Cut },
}

/// Two bytes of code that let an indirect jump go on to what it has found, and those that make it leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Position in the block.
    pub at: u32,
    pub whole: [u8; 2],
    pub cut: [u8; 2],
}

impl Cut {
    /// The JNE with a long displacement that has just been emitted at `at`: it becomes NOP and JMP.
    pub(super) fn jne(at: usize) -> Cut {
        Cut { at: at as u32, whole: [0x0f, 0x85], cut: [0x90, 0xe9] }
    }

    /// The JRCXZ at `at`, by `distance`: it becomes two NOPs.
    pub(super) fn jrcxz(at: usize, distance: u8) -> Cut {
        Cut { at: at as u32, whole: [0xe3, distance], cut: [0x90, 0x90] }
    }
}

/// A way out: the jump to patch (for `Direct`) and the stub it jumps to while unlinked.
#[derive(Clone, Copy, Debug)]
pub struct BlockExit {
    pub kind: ExitKind,
    /// Position of the 32-bit displacement that leads here; of `Far`, the one in GS that names the link.
    pub site: u32,
    pub stub: u32,
}

/// A finished translation, not yet placed.
#[derive(Default)]
pub struct Translation {
    pub code: Vec<u8>,
    /// Jumps to thunks: position of the displacement, and which.
    pub thunk_calls: Vec<(u32, Thunk)>,
    pub exits: Vec<BlockExit>,
    /// Host positions, ascending, with the offset of the guest instruction they belong to.
    pub map: Vec<(u32, u16)>,
    /// Guest bytes from the start of the block.
    pub length: u16,
    /// Further bytes on the page, `(offset in page, length)`, that the translation depends on.
    pub peeked: Vec<(u16, u16)>,
    /// It can be moved, with these.
    pub movable: bool,
    pub constants: Vec<Constant>,
    /// Where 32-bit numbers of exits are.
    pub numbers: Vec<u32>,
    /// The only instruction runs over the page's end, and its other bytes were not given.
    pub incomplete: bool,
    /// Some accesses share a probe.
    pub coalesced: bool,
    /// It is a loop whose probes could be hoisted, or are.
    pub hoistable: bool,
    /// The host code of a hoisted loop's iterations, from and to.
    pub fast: Option<(u32, u32)>,
    /// The first micro-TLB entry that is still free.
    pub micro: u16,
    /// Those that are used, with [`MicroEntry::low`](crate::cpu::MicroEntry::low).
    pub lows: Vec<(u16, i32)>,
}

/// A 64-bit constant in a block's code that moves with the block's linear address, or against it.
#[derive(Clone, Copy, Debug)]
pub struct Constant {
    pub at: u32,
    pub negated: bool,
    /// The displacement that names its region in [`Cpu::regions`], where there is one.
    pub region: Option<u32>,
}

/// Shared code that blocks jump to or call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thunk {
    Exit,
    /// TLB miss for a context, with live flags or without.
    Fill {
        context: u8,
        tag: Tag,
        flags: bool,
    },
    /// As `Fill`, for a micro-TLB entry.
    FillMicro {
        context: u8,
        tag: Tag,
        flags: bool,
    },
    /// REP MOVS (`moves`) or REP STOS of 2^`log` bytes.
    Repeat {
        context: u8,
        moves: bool,
        log: u8,
    },
    /// Puts the delta of the region in the low byte of RDI, which was thought to be another, into `to`.
    Elsewhere {
        to: u8,
    },
}

/// Indices into [`Cpu::translated`].
pub mod word {
    /// Number of the exit taken.
    pub const EXIT: usize = 0;
    /// Host code to enter.
    pub const ENTER: usize = 1;
    /// `*mut Core`.
    pub const CORE: usize = 2;
    /// Guest address of an indirect jump that missed.
    pub const TARGET: usize = 3;
    /// Host address that faulted or missed.
    pub const FAULT: usize = 4;
    /// Host address of a block that was interrupted, or 0.
    pub const SAMPLE: usize = 6;
    /// The offset of the micro-TLB's entry that was filled last, in the micro-TLB.
    pub const MICRO: usize = 8;
    /// The region of an access that was thought to be in another one.
    pub const REGION: usize = 9;
    /// 1 if the last miss was a [`Fill::Misfit`](crate::mmu::Fill::Misfit).
    pub const MISFIT: usize = 5;
    /// Where a miss that cannot be served goes: the `fault` thunk, or a twin of the block.
    pub const LEAVE: usize = 7;
}

/// Offset of word `index`.
pub fn word_offset(index: usize) -> i32 {
    (offset_of!(Cpu, translated) + 8 * index) as i32
}

/// Operand `gs:[field]` for scratch word `index`.
pub(super) fn scratch(index: usize) -> Rm {
    Rm::Gs((offset_of!(Cpu, scratch) + 8 * index) as i32)
}

pub(super) const SAVED_RAX: usize = 0;
pub(super) const SAVED_RCX: usize = 1;
pub(super) const VALUE: usize = 2;

/// Where the guest registers live whose namesakes have other uses.
pub const GUEST_RSP: u8 = R9;
pub const GUEST_RSI: u8 = R10;
pub const GUEST_RDI: u8 = R11;

/// Host register of guest register `index`, or `None` for the ones that live in the vCPU block.
pub fn host_register(index: usize) -> Option<u8> {
    match index {
        gpr::RSP => Some(GUEST_RSP),
        gpr::RSI => Some(GUEST_RSI),
        gpr::RDI => Some(GUEST_RDI),
        gpr::R9 | gpr::R10 | gpr::R11 => None,
        other => Some(other as u8),
    }
}

pub(super) fn slot(index: usize) -> Rm {
    Rm::Gs((offset_of!(Cpu, gpr) + 8 * index) as i32)
}

/// How many registers live in the vCPU block.
pub(super) const SLOTS: usize = 3;

/// The number of a register that lives there.
pub(super) fn slot_number(index: usize) -> Option<usize> {
    (gpr::R9..=gpr::R11).contains(&index).then(|| index - gpr::R9)
}

/// The distance of a use that is too far away to count, or does not come.
pub(super) const NO_USE: u8 = 8;

/// How many instructions from the first of `insns` on each register that lives in the vCPU block is read as an operand again.
pub(super) fn next_uses(insns: &[Insn]) -> [u8; SLOTS] {
    let near = &insns[..insns.len().min(usize::from(NO_USE))];
    if !near.iter().any(Insn::names_slots) {
        return [NO_USE; SLOTS];
    }
    std::array::from_fn(|slot| {
        let names = |insn: &Insn| (insn.slots_read | insn.slots_written) >> slot & 1 != 0;
        match near.iter().position(names) {
            Some(at) if near[at].slots_read >> slot & 1 != 0 => at as u8,
            _ => NO_USE,
        }
    })
}

pub(super) fn pending() -> Rm {
    Rm::Gs(offset_of!(Cpu, pending) as i32)
}

#[derive(Clone, Copy)]
pub(super) struct Insn {
    pub(super) instruction: Instruction,
    pub(super) offset: u16,
    pub(super) length: u8,
    pub(super) kind: Kind,
    /// Which of the registers that live in the vCPU block are operands that it reads, and which others.
    slots_read: u8,
    slots_written: u8,
    /// What it does to each operand.
    pub(super) accesses: [OpAccess; 5],
    /// A bit for each general register that it writes or may write.
    pub(super) written: u16,
    /// Status flags alive before it, at the point where it may miss or fault.
    pub(super) live_in: u32,
    pub(super) live_out: u32,
}

impl Insn {
    /// Whether a register that lives in the vCPU block is one of its operands.
    pub(super) fn names_slots(&self) -> bool {
        self.slots_read | self.slots_written != 0
    }
}

/// An access to come.
#[derive(Clone, Copy)]
pub(super) struct Planned {
    pub(super) access: Access,
    pub(super) role: Role,
    /// The region that it is likely in.
    pub(super) region: Option<u8>,
}

pub(super) struct PendingExit {
    pub(super) hole: Hole,
    pub(super) kind: ExitKind,
    /// What makes the flags again that the way here has destroyed.
    pub(super) redo: Option<Redo>,
}

impl PendingExit {
    pub(super) fn new(hole: Hole, kind: ExitKind) -> PendingExit {
        PendingExit { hole, kind, redo: None }
    }
}

/// The regions that the accesses of instructions (offset in the block) are in, or `None` where that changes.
pub type Learned = Vec<(u16, Option<u8>)>;

/// Inputs of a translation.
pub struct Source<'a> {
    /// Bytes of the page from the block's start to the page's end, and for an instruction that runs over it
    /// some of the next page.
    pub bytes: &'a [u8],
    /// For an instruction over the page's end: the [`Cpu::code_generation`] at which the next page was found.
    pub crossing: Option<u32>,
    /// The whole page, for peeking.
    pub page: &'a [u8],
    pub rip: u64,
    pub context: Context,
    pub features: &'a Features,
    /// Number that the first exit of this block gets.
    pub first_exit: u32,
    /// Let accesses share probes.
    pub coalesce: bool,
    /// Let reads lead writes.
    pub mix: bool,
    /// Hoist a loop's probes.
    pub hoist: bool,
    /// Its accesses go to the guest's own mappings: [`crate::windows`].
    pub windowed: bool,
    /// The regions of what registers hold now, at the block's start.
    pub regions: Regions,
    /// The region that others are likely in, where a guess is worth its code.
    pub guess: Option<u8>,
    /// What else is known.
    pub learned: Learned,
    /// The micro-TLB entries that its accesses may have.
    pub micro: std::ops::Range<u16>,
    /// Addresses of instructions that are left to the interpreter, where a debugger stops.
    pub breakpoints: Vec<u64>,
}

pub struct Builder<'a> {
    pub(super) a: Assembler,
    pub(super) source: &'a Source<'a>,
    insns: Vec<Insn>,
    pub(super) groups: Groups,
    pub(super) map: Vec<(u32, u16)>,
    pub(super) misses: Vec<Miss>,
    pub(super) elsewhere: Vec<Elsewhere>,
    /// See [`Translation`].
    pub(super) constants: Vec<Constant>,
    pub(super) numbers: Vec<u32>,
    /// The displacement that names the next constant's region.
    pub(super) constant_region: Option<u32>,
    /// There is more that depends on the linear address.
    pub(super) fixed: bool,
    pub(super) far_jumps: Vec<FarJump>,
    pub(super) exits: Vec<PendingExit>,
    pub(super) finished_exits: Vec<BlockExit>,
    pub(super) syscalls: Vec<OddSyscall>,
    pub(super) odd_bases: Vec<OddBase>,
    pub(super) thunk_calls: Vec<(u32, Thunk)>,
    peeked: Vec<(u16, u16)>,
    /// Offset of the instruction being emitted.
    pub(super) at: u16,
    /// A probe is being emitted whose flags wait in AX.
    pub(super) flags_in_ax: bool,
    /// What is still to be added to the stack pointer's register.
    pub(super) deferred: i32,
    /// The instruction being emitted changes nothing before its access.
    pub(super) faults_first: bool,
    /// Micro-TLB entries that are free.
    pub(super) micro: std::ops::Range<u16>,
    /// What the places of micro-TLB entries add to the address for the range of their groups.
    pub(super) lows: Vec<(u16, i32)>,
    /// The micro-TLB entry that holds a group's delta, where one does.
    pub(super) places: [Option<u16>; DELTAS],
    /// The accesses to come, with their roles.
    pub(super) planned: Vec<Planned>,
    pub(super) next_planned: usize,
    coalesced: bool,
    hoistable: bool,
    pub(super) fast: Option<(u32, u32)>,
    incomplete: bool,
    /// The next probe is to leave live flags in AX (and RAX in memory) for the control transfer after it.
    pub(super) hold_flags: bool,
    /// It has done so.
    pub(super) flags_held: bool,
    /// How live flags can be made again.
    pub(super) redo: Option<Redo>,
    /// They must be before they are used: a check has destroyed them. Only if `redo` is there.
    pub(super) destroyed: bool,
    /// The accesses of the instruction being emitted put them in place.
    pub(super) settle_after: bool,
    /// Guest registers that the scratch registers, RSI and RDI, hold copies of.
    pub(super) held: [Option<Held>; 2],
    /// When each register that lives in the vCPU block is used again: see [`next_uses`].
    pub(super) next_uses: [u8; SLOTS],
    /// Shared deltas that they hold, by slot. Never both for one register.
    pub(super) deltas: [Option<u8>; 2],
    /// The instruction being emitted overwrites RAX and does not read it.
    pub(super) overwrites_rax: bool,
    /// Address of the indirect branch being emitted, and what undoes its change of RSP.
    pub(super) origin: (u64, i32),
}

/// Memory that translations use in turn.
#[derive(Default)]
pub struct Workspace {
    spare: Translation,
    facts: Facts,
    insns: Vec<Insn>,
    groups: Groups,
    planned: Vec<Planned>,
    misses: Vec<Miss>,
    elsewhere: Vec<Elsewhere>,
    far_jumps: Vec<FarJump>,
    exits: Vec<PendingExit>,
}

impl Workspace {
    /// Takes back the memory of a translation.
    pub fn recycle(&mut self, mut translation: Translation) {
        translation.code.clear();
        translation.thunk_calls.clear();
        translation.exits.clear();
        translation.map.clear();
        translation.peeked.clear();
        translation.constants.clear();
        translation.numbers.clear();
        translation.lows.clear();
        self.spare = translation;
    }
}

/// Translates the code at `source`. At least one instruction is covered, if only by interpretation.
pub fn translate(source: &Source, workspace: &mut Workspace) -> Translation {
    let spare = std::mem::take(&mut workspace.spare);
    let mut builder = Builder {
        a: Assembler { code: spare.code },
        source,
        insns: std::mem::take(&mut workspace.insns),
        groups: std::mem::take(&mut workspace.groups),
        map: spare.map,
        misses: std::mem::take(&mut workspace.misses),
        elsewhere: std::mem::take(&mut workspace.elsewhere),
        constants: spare.constants,
        numbers: spare.numbers,
        constant_region: None,
        fixed: false,
        far_jumps: std::mem::take(&mut workspace.far_jumps),
        exits: std::mem::take(&mut workspace.exits),
        finished_exits: spare.exits,
        syscalls: Vec::new(),
        odd_bases: Vec::new(),
        thunk_calls: spare.thunk_calls,
        peeked: spare.peeked,
        at: 0,
        flags_in_ax: false,
        deferred: 0,
        faults_first: false,
        micro: source.micro.clone(),
        lows: spare.lows,
        places: [None; DELTAS],
        planned: std::mem::take(&mut workspace.planned),
        next_planned: 0,
        coalesced: false,
        hoistable: false,
        fast: None,
        incomplete: false,
        hold_flags: false,
        flags_held: false,
        redo: None,
        destroyed: false,
        settle_after: false,
        held: [None; 2],
        next_uses: [NO_USE; SLOTS],
        deltas: [None; 2],
        overwrites_rax: false,
        origin: (source.rip, 0),
    };
    let insns = builder.decode(&mut workspace.facts);
    builder.hoist(&insns);
    builder.plan_accesses(&insns);
    builder.body(&insns);
    builder.insns = insns;
    builder.finish(workspace)
}

impl<'a> Builder<'a> {
    pub(super) fn bits(&self) -> u32 {
        self.source.context.bits()
    }

    pub(super) fn same_page(&self, target: u64) -> bool {
        target >> 12 == self.source.rip >> 12
    }

    /// Whether a jump to `target` may be linked: its page is the block's, or the second one of a block that
    /// has just checked where that is.
    pub(super) fn linkable(&self, target: u64) -> bool {
        let page = self.source.rip >> 12;
        target >> 12 == page || (self.source.crossing.is_some() && target >> 12 == page + 1)
    }

    /// Bytes of a stack slot, and of a near code pointer.
    pub(super) fn word(&self) -> i64 {
        i64::from(self.bits() / 8)
    }

    pub(super) fn stack(&self, displacement: i64) -> Ea {
        Ea::stack(displacement, self.bits())
    }

    /// Moves the stack pointer, with what [`Self::defer_stack`] has put off.
    pub(super) fn adjust_stack(&mut self, by: i32) {
        let by = by + std::mem::take(&mut self.deferred);
        if by == 0 {
            return;
        }
        self.stack_moves(by);
        if self.bits() == 64 {
            self.a.lea(GUEST_RSP, Rm::Base(GUEST_RSP, by));
        } else {
            self.a.lea32(GUEST_RSP, Rm::Base(GUEST_RSP, by));
        }
    }

    /// Moves the stack pointer, later: several pushes or pops that share a probe move it once. Between them
    /// nothing can leave the block.
    pub(super) fn defer_stack(&mut self, by: i32) {
        self.deferred += by;
    }

    /// Whether `insn` accesses the stack, by a probe made earlier, and does nothing else with its pointer.
    fn may_defer(&self, insn: &Insn) -> bool {
        if self.source.windowed {
            // What follows may fault.
            return false;
        }
        let follows = matches!(self.planned.get(self.next_planned), Some(Planned { role: Role::Follower { .. }, .. }));
        let instruction = &insn.instruction;
        let plain = match insn.kind {
            Kind::Push | Kind::Pop => match instruction.op0_kind() {
                OpKind::Register => instruction.op0_register().full_register() != Register::RSP,
                kind => kind != OpKind::Memory,
            },
            Kind::Return | Kind::CallDirect => true,
            _ => false,
        };
        follows && plain
    }

    pub(super) fn load_word(&mut self, reg: u8, rm: Rm) {
        if self.bits() == 64 {
            self.a.load(reg, rm);
        } else {
            self.a.load32(reg, rm);
        }
    }

    pub(super) fn store_word(&mut self, rm: Rm, reg: u8) {
        if self.bits() == 64 {
            self.a.store(rm, reg);
        } else {
            self.a.store32(rm, reg);
        }
    }

    pub(super) fn store_word_imm(&mut self, rm: Rm, value: i32) {
        if self.bits() == 64 {
            self.a.store_imm32(rm, value);
        } else {
            self.a.store32_imm(rm, value as u32);
        }
    }

    // Pass 1: decoding and flag liveness.

    fn decode(&mut self, facts: &mut Facts) -> Vec<Insn> {
        let source = self.source;
        let mut decoder = vendor::decoder(self.bits(), source.bytes, source.rip);
        let mut insns = std::mem::take(&mut self.insns);
        insns.clear();
        let mut branches = 0;
        while insns.len() < MAX_INSTRUCTIONS && decoder.can_decode() {
            let offset = decoder.position() as u16;
            let mut instruction = decoder.decode();
            vendor::adapt(&mut instruction, &source.bytes[usize::from(offset)..]);
            self.fixed |= is_absolute(&instruction);
            // An absolute target of 16 bits.
            self.fixed |= instruction.op0_kind() == OpKind::NearBranch16;
            if instruction.is_invalid() && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
                // Runs over the page's end.
                if insns.is_empty() {
                    self.incomplete = true;
                    insns.push(decoded(facts, instruction, offset, Kind::Interpret));
                }
                break;
            }
            let (mut kind, unit) = classify::classify(&instruction, source.features, &source.context);
            let enabled = match unit {
                Unit::Integer => true,
                Unit::Fpu => source.context.fpu,
                Unit::Avx => source.context.avx,
            };
            let breakpoint = source.breakpoints.contains(&instruction.ip());
            if !enabled || (kind == Kind::ReadTsc && !source.context.tsc) || breakpoint {
                kind = Kind::Interpret;
            }
            insns.push(decoded(facts, instruction, offset, kind));
            if source.crossing.is_some() {
                break;
            }
            match kind {
                Kind::JumpIf | Kind::LoopJump => {
                    branches += 1;
                    if branches >= MAX_BRANCHES {
                        break;
                    }
                }
                Kind::JumpDirect if self.follows(&instruction) && insns.len() < MAX_INSTRUCTIONS => {
                    let target = instruction.near_branch_target();
                    decoder.set_position((target - source.rip) as usize).expect("it is on the page");
                    decoder.set_ip(target);
                    insns.last_mut().expect("it was just put there").kind = Kind::Nop;
                }
                Kind::CallDirect
                | Kind::CallIndirect
                | Kind::Return
                | Kind::JumpDirect
                | Kind::JumpIndirect
                | Kind::Interpret => break,
                Kind::Sensitive if ends_block(&instruction, kind) => break,
                _ => {}
            }
        }
        if let Some(last) = insns.last_mut().filter(|last| is_followed(last)) {
            // Nothing came of it.
            last.kind = Kind::JumpDirect;
        }
        self.liveness(&mut insns);
        insns
    }

    /// Whether the block goes on where `jump` leads: further on in its page.
    fn follows(&self, jump: &Instruction) -> bool {
        let target = jump.near_branch_target();
        jump.op0_kind() == OpKind::NearBranch64
            && self.source.crossing.is_none()
            && self.same_page(target)
            && target > jump.ip()
    }

    fn liveness(&mut self, insns: &mut [Insn]) {
        let mut live = match insns.last() {
            Some(last) if ends_block(&last.instruction, last.kind) => ALL_FLAGS,
            Some(last) => self.live_at(last.instruction.next_ip()),
            None => ALL_FLAGS,
        };
        for insn in insns.iter_mut().rev() {
            match insn.kind {
                Kind::JumpIf | Kind::LoopJump => live |= self.live_at(insn.instruction.near_branch_target()),
                Kind::JumpDirect | Kind::CallDirect => live = self.live_at(insn.instruction.near_branch_target()),
                _ if planted::is(Bug::FollowedJumpKillsFlags) && is_followed(insn) => live = 0,
                _ => {}
            }
            insn.live_out = live;
            let (read, written) = classify::flags(&insn.instruction);
            live = if needs_flags(insn) { ALL_FLAGS } else { (live & !written) | read };
            insn.live_in = live;
        }
    }

    /// Status flags that may be read at `target` before they are overwritten: all of them unless the code
    /// there, on this page, tells.
    fn live_at(&mut self, target: u64) -> u32 {
        if !self.same_page(target) {
            return ALL_FLAGS;
        }
        let start = (target & 0xfff) as usize;
        let mut decoder = vendor::decoder(self.bits(), &self.source.page[start..], target);
        let (mut live, mut undecided) = (0, ALL_FLAGS);
        for _ in 0..PEEK_INSTRUCTIONS {
            if !decoder.can_decode() {
                break;
            }
            let at = start + decoder.position();
            let mut instruction = decoder.decode();
            vendor::adapt(&mut instruction, &self.source.page[at..]);
            let (kind, _) = classify::classify(&instruction, self.source.features, &self.source.context);
            if instruction.is_invalid()
                || kind == Kind::Interpret
                || self.source.breakpoints.contains(&instruction.ip())
            {
                break;
            }
            let (read, written) = classify::flags(&instruction);
            live |= read & undecided;
            undecided &= !(written | read);
            if undecided == 0
                || !matches!(kind, Kind::Nop | Kind::Copy | Kind::Lea | Kind::Memory | Kind::Push | Kind::Pop)
            {
                break;
            }
        }
        let length = decoder.position() as u16;
        self.peeked.push((start as u16, length));
        live | undecided
    }

    // Pass 2: which accesses share probes, after those of a loop that are made before it.

    fn hoist(&mut self, insns: &[Insn]) {
        let Some(length) = self.loop_length(insns) else { return };
        let body = &insns[..length];
        let Some(plan) = self.plan_loop(body) else { return };
        self.hoistable = true;
        if self.source.hoist {
            self.fast_loop(body, plan);
        }
    }

    fn plan_accesses(&mut self, insns: &[Insn]) {
        let (mix, windowed, bits) = (self.source.mix, self.source.windowed, self.bits());
        let (mut groups, mut planned) = (std::mem::take(&mut self.groups), std::mem::take(&mut self.planned));
        planned.clear();
        let mut coalescer = Coalescer::new(&mut groups, mix, windowed, bits);
        for insn in insns {
            if matches!(insn.kind, Kind::Nop | Kind::Copy | Kind::Lea | Kind::JumpIf) {
                // Most instructions have none.
                coalescer.execute(insn);
                continue;
            }
            let alone = self.source.windowed && matches!(insn.kind, Kind::Sensitive | Kind::String);
            for access in self.accesses(insn).into_iter().flatten() {
                let region = self.region(insn, &access, &coalescer);
                coalescer.access(&access, alone);
                planned.push(Planned { access, role: Role::Single, region });
            }
            coalescer.execute(insn);
        }
        if self.source.coalesce {
            for (planned, role) in planned.iter_mut().zip(coalescer.roles()) {
                planned.role = role;
                self.coalesced |= role != Role::Single;
            }
        }
        (self.planned, self.next_planned, self.groups) = (planned, 0, groups);
    }

    /// The region that the next access of the block, one of `insn`, is likely in.
    pub(super) fn region(&self, insn: &Insn, access: &Access, coalescer: &Coalescer) -> Option<u8> {
        match self.source.learned.iter().find(|(at, _)| *at == insn.offset) {
            Some(&(_, region)) => region,
            None => coalescer.region(&access.ea, &self.source.regions).or(self.source.guess),
        }
    }

    /// The memory accesses that emitting `insn` will make, in order.
    pub(super) fn accesses(&mut self, insn: &Insn) -> [Option<Access>; 2] {
        let instruction = &insn.instruction;
        let word = self.word() as usize;
        let bits = self.bits();
        let ea = || Ea::of(instruction, bits);
        let push = Some(Access { ea: self.stack(-(word as i64)), size: word, write: true });
        let pop = Some(Access { ea: self.stack(0), size: word, write: false });
        let operand = || ea().map(|ea| Access { ea, size: word, write: false });
        match insn.kind {
            Kind::Memory | Kind::BitString => {
                let number = operands(instruction, OpKind::Memory).next();
                let access = number.map_or(OpAccess::NoMemAccess, |n| insn.accesses[n as usize]);
                if access == OpAccess::NoMemAccess {
                    return [None, None];
                }
                let (_, write) = reads_writes(access);
                let size = instruction.memory_size().size();
                let ea = ea().map(|ea| match insn.kind {
                    Kind::BitString => self.bit_string_ea(instruction, ea),
                    _ => ea,
                });
                let write =
                    if insn.kind == Kind::BitString { instruction.mnemonic() != iced_x86::Mnemonic::Bt } else { write };
                [ea.map(|ea| Access { ea, size, write }), None]
            }
            Kind::Push if instruction.op0_kind() == OpKind::Memory => [operand(), push],
            Kind::PushSelector => {
                [push.map(|access| Access { size: vendor::pushed_selector_size() as usize, ..access }), None]
            }
            Kind::Push | Kind::CallDirect => [push, None],
            Kind::Pop | Kind::Return => [pop, None],
            Kind::Leave => [Some(Access { ea: Ea::register(RBP, bits), size: word, write: false }), None],
            Kind::CallIndirect if instruction.op0_kind() == OpKind::Memory => [operand(), push],
            Kind::CallIndirect => [push, None],
            Kind::JumpIndirect if instruction.op0_kind() == OpKind::Memory => [operand(), None],
            Kind::String => self.string_accesses(instruction),
            Kind::Sensitive => match instruction.mnemonic() {
                iced_x86::Mnemonic::Pushfq | iced_x86::Mnemonic::Pushfd => [push, None],
                iced_x86::Mnemonic::Popfq | iced_x86::Mnemonic::Popfd => [pop, None],
                iced_x86::Mnemonic::Iretq => [pop.map(|access| Access { size: 40, ..access }), None],
                _ => [None, None],
            },
            _ => [None, None],
        }
    }

    // Pass 3: emission.

    fn body(&mut self, insns: &[Insn]) {
        if let Some(generation) = self.source.crossing {
            self.map.push((0, 0));
            self.check_generation(generation);
        }
        for (i, insn) in insns.iter().enumerate() {
            self.map.push((self.a.position() as u32, insn.offset));
            self.at = insn.offset;
            self.next_uses = next_uses(&insns[i + 1..]);
            if !self.emit(insn) {
                self.interpret(insn);
                return;
            }
        }
        self.adjust_stack(0);
        self.write_back_all();
        match insns.last() {
            Some(last) if ends_block(&last.instruction, last.kind) => {}
            Some(last) => self.direct(last.instruction.next_ip(), last.live_out != 0),
            None => unreachable!("a block has an instruction"),
        }
    }

    /// Emits one instruction; `false` if it has to be interpreted after all (nothing emitted then).
    pub(super) fn emit(&mut self, insn: &Insn) -> bool {
        if !self.may_defer(insn) {
            self.adjust_stack(0);
        }
        let changes = self.before_flags(insn);
        let emitted = self.emit_kind(insn);
        if emitted {
            self.after_flags(insn, changes);
        }
        emitted
    }

    fn emit_kind(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        match insn.kind {
            Kind::Nop | Kind::Lea => {}
            Kind::Copy if !classify::can_trap(instruction) => {}
            Kind::Copy | Kind::JumpIf => self.write_back_all(),
            Kind::Memory => {}
            _ => self.release_scratch(),
        }
        // These know what they do to the scratch registers.
        if !matches!(
            insn.kind,
            Kind::Nop | Kind::Lea | Kind::Copy | Kind::Memory | Kind::Push | Kind::Pop | Kind::JumpIf
        ) {
            self.deltas = [None; 2];
        }
        self.faults_first = !matches!(insn.kind, Kind::Sensitive | Kind::String);
        if insn.kind == Kind::Memory {
            self.release_for_access(insn);
        }
        match insn.kind {
            Kind::Nop => true,
            Kind::Copy => self.copy(insn, None),
            Kind::Lea => self.lea(insn),
            Kind::Memory => self.memory(insn),
            Kind::Push => self.push(insn),
            Kind::PushSelector => {
                self.push_selector(insn);
                true
            }
            Kind::Pop => self.pop(insn),
            Kind::Leave => self.leave(insn),
            Kind::CallDirect => {
                self.hold_flags = true;
                self.push_return_address(insn);
                self.call_direct(instruction.near_branch_target(), instruction.next_ip(), insn.live_out != 0);
                true
            }
            Kind::CallIndirect => self.call_indirect(insn),
            Kind::Return => self.ret(insn),
            Kind::JumpDirect => {
                self.direct(instruction.near_branch_target(), insn.live_out != 0);
                true
            }
            Kind::JumpIndirect => self.jump_indirect(insn),
            Kind::JumpIf => {
                self.jump_if(insn);
                true
            }
            Kind::LoopJump => self.loop_jump(insn),
            Kind::ReadSelector => self.read_selector(insn),
            Kind::ReadTsc => {
                self.read_tsc(insn);
                true
            }
            Kind::Sensitive => self.sensitive(insn),
            Kind::String => self.string(insn),
            Kind::BitString => self.bit_string(insn),
            Kind::Interpret => false,
        }
    }

    pub(super) fn interpret(&mut self, insn: &Insn) {
        self.settle();
        self.write_back_all();
        let hole = self.a.jmp();
        self.exits.push(PendingExit::new(hole, ExitKind::Interpret { rip: insn.instruction.ip() }));
    }

    /// Copies an instruction with its registers renamed and `memory` in the place of its memory operand.
    fn copy(&mut self, insn: &Insn, memory: Option<Rm>) -> bool {
        match self.plan(insn, memory) {
            Some(plan) => {
                self.emit_plan(&plan);
                true
            }
            None => false,
        }
    }

    /// Brings the vCPU block up to date before an access, and forgets what the scratch registers hold that it needs.
    fn release_for_access(&mut self, insn: &Insn) {
        self.write_back_all();
        let keeps = |ea: Ea| self.leaves_rdi(&ea);
        let rdi = self.held[1].filter(|_| Ea::of(&insn.instruction, self.bits()).is_some_and(keeps));
        self.held = [None, rdi];
    }

    fn memory(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        let operand = operands(instruction, OpKind::Memory).next();
        let Some(operand) = operand else { return false };
        let access = insn.accesses[operand as usize];
        if access == OpAccess::NoMemAccess {
            return true;
        }
        let (_, write) = reads_writes(access);
        let size = instruction.memory_size().size();
        // Either form of host address will do for the plan; only its registers matter.
        let Some(plan) = self.plan(insn, Some(Rm::Base(RSI, 0))) else { return false };
        let keep_rdi = plan.spills.used().any(|spill| spill.reads()) || self.held[1].is_some();
        let Some(ea) = Ea::of(instruction, self.bits()) else { return false };
        use iced_x86::Mnemonic::{Mov, Movsx, Movsxd, Movzx};
        self.overwrites_rax = matches!(instruction.mnemonic(), Mov | Movsx | Movsxd | Movzx)
            && operand == 1
            && matches!(instruction.op0_register(), Register::RAX | Register::EAX);
        let mut rm = self.access(&ea, size, write, insn.live_in != 0, keep_rdi);
        self.overwrites_rax = false;
        if plan.high_byte && rm.extension_bits() != (0, 0) {
            // AH–BH cannot be named next to a REX prefix.
            self.a.lea(RSI, rm);
            self.clobber(RSI);
            rm = Rm::Base(RSI, 0);
        }
        self.emit_plan(&Plan { rm, ..plan });
        true
    }

    /// MOV of a segment register's selector to a register.
    fn read_selector(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        let segment = instruction.op1_register() as usize - Register::ES as usize;
        let register = instruction.op0_register();
        let index = register.full_register() as usize - Register::RAX as usize;
        self.a.load_sized(1, RSI, super::stack::selector(segment));
        match (host_register(index), register.size()) {
            (Some(host), 2) => {
                self.a.byte(0x66);
                self.a.mov32(host, RSI);
            }
            (Some(host), _) => self.a.mov(host, RSI),
            (None, 2) => self.a.store16(slot(index), RSI),
            (None, _) => self.a.store(slot(index), RSI),
        }
        true
    }

    /// RDTSC and RDTSCP with the guest's offset. RAX and RDX are overwritten anyway, so live flags wait in
    /// a copy of AX.
    fn read_tsc(&mut self, insn: &Insn) {
        let live = insn.live_in != 0;
        if live {
            self.a.lahf();
            self.a.bytes(&[0x0f, 0x90, 0xc0]); // seto al
            self.a.mov32(RSI, RAX);
        }
        if insn.instruction.mnemonic() == iced_x86::Mnemonic::Rdtscp {
            self.a.bytes(&[0x0f, 0xae, 0xe8]); // lfence: RDTSCP waits for earlier instructions
            self.a.load32(RCX, Rm::Gs(offset_of!(Cpu, tsc_aux) as i32));
        }
        self.a.bytes(&[0x0f, 0x31]);
        self.a.shl64(RDX, 32);
        self.a.alu(Alu::Or, RAX, Rm::Reg(RDX));
        self.a.alu(Alu::Add, RAX, Rm::Gs(offset_of!(Cpu, tsc_offset) as i32));
        self.a.mov(RDX, RAX);
        self.a.shr64(RDX, 32);
        self.a.mov32(RAX, RAX);
        if live {
            self.a.mov32(RDI, RAX);
            self.a.mov32(RAX, RSI);
            self.a.bytes(&[0x04, 0x7f]); // add al, 0x7f
            self.a.sahf();
            self.a.mov32(RAX, RDI);
        }
    }

    /// BT, BTS, BTR or BTC of a register's bit in a string of bits in memory.
    fn bit_string(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        let Some(ea) = Ea::of(instruction, self.bits()) else { return false };
        let start = insn.offset as usize;
        let bytes = &self.source.bytes[start..start + insn.length as usize];
        let Some(layout) = Layout::parse(bytes, self.bits()) else { return false };
        let size = instruction.memory_size().size();
        let write = instruction.mnemonic() != iced_x86::Mnemonic::Bt;
        let rm = self.access(&self.bit_string_ea(instruction, ea), size, write, insn.live_in != 0, true);
        let fields = Fields { reg: RDI, ..Fields::default() };
        layout.emit(&mut self.a, &fields, rm, false);
        true
    }

    fn bit_string_ea(&self, instruction: &Instruction, ea: Ea) -> Ea {
        let register = instruction.op1_register();
        let index = (register.full_register() as usize - Register::RAX as usize) as u8;
        ea.with_bit(index, instruction.memory_size().size())
    }

    /// `[register]` for a guest register.
    pub(super) fn at_register(&self, number: u8) -> Ea {
        Ea::register(number, self.bits())
    }

    fn lea(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        let Some(ea) = Ea::of(instruction, self.bits()) else { return false };
        let register = instruction.op0_register();
        let index = register.full_register() as usize - Register::RAX as usize;
        if let (8 | 4, Some(host), Some(rm)) = (register.size(), host_register(index), self.plain_address(&ea)) {
            if register.size() == 4 || ea.narrow {
                self.a.lea32(host, rm);
            } else {
                self.a.lea(host, rm);
            }
            return true;
        }
        self.release_scratch();
        self.deltas = [None; 2];
        self.effective_address(&ea);
        match (register.size(), host_register(index)) {
            (8, Some(host)) => self.a.mov(host, RSI),
            (8, None) => self.a.store(slot(index), RSI),
            (4, Some(host)) => self.a.mov32(host, RSI),
            (4, None) => {
                self.a.mov32(RSI, RSI);
                self.a.store(slot(index), RSI);
            }
            (_, Some(host)) => {
                self.a.byte(0x66);
                self.a.mov32(host, RSI);
            }
            (_, None) => {
                self.a.bytes(&[0x65, 0x66, 0x89, 0x34, 0x25]); // mov gs:[disp32], si
                self.a.imm32((offset_of!(Cpu, gpr) + 8 * index) as i32);
            }
        }
        true
    }

    fn finish(mut self, workspace: &mut Workspace) -> Translation {
        self.misses();
        self.elsewhere();
        self.far_jumps();
        self.odd_syscalls();
        self.odd_bases();
        self.exit_stubs();
        let last = self.insns.last().expect("a block has an instruction");
        let length = last.offset + u16::from(last.length);
        workspace.insns = self.insns;
        workspace.groups = self.groups;
        workspace.planned = self.planned;
        workspace.misses = self.misses;
        workspace.elsewhere = self.elsewhere;
        workspace.far_jumps = self.far_jumps;
        workspace.exits = self.exits;
        Translation {
            code: self.a.code,
            thunk_calls: self.thunk_calls,
            exits: self.finished_exits,
            map: self.map,
            movable: self.source.windowed && !self.fixed && !self.incomplete,
            constants: self.constants,
            numbers: self.numbers,
            length,
            peeked: self.peeked,
            incomplete: self.incomplete,
            coalesced: self.coalesced,
            hoistable: self.hoistable,
            fast: self.fast,
            micro: self.micro.start,
            lows: self.lows,
        }
    }
}

fn decoded(facts: &mut Facts, instruction: Instruction, offset: u16, kind: Kind) -> Insn {
    let length = instruction.len() as u8;
    let Effects { accesses, written } = facts.of(&instruction);
    let (mut slots_read, mut slots_written) = (0, 0);
    for operand in operands(&instruction, OpKind::Register) {
        let register = instruction.op_register(operand);
        if register.is_gpr()
            && let Some(slot) = slot_number(register.full_register() as usize - Register::RAX as usize)
        {
            let (reads, _) = reads_writes(accesses[operand as usize]);
            let all = if reads || register.size() < 4 { &mut slots_read } else { &mut slots_written };
            *all |= 1 << slot;
        }
    }
    let (live_in, live_out) = (ALL_FLAGS, ALL_FLAGS);
    Insn { instruction, offset, length, kind, slots_read, slots_written, accesses, written, live_in, live_out }
}

fn ends_block(instruction: &Instruction, kind: Kind) -> bool {
    use iced_x86::Mnemonic as M;
    if kind == Kind::Sensitive {
        return matches!(instruction.mnemonic(), M::Syscall | M::Sysretq | M::Iretq | M::Stac | M::Clac);
    }
    matches!(
        kind,
        Kind::CallDirect | Kind::CallIndirect | Kind::Return | Kind::JumpDirect | Kind::JumpIndirect | Kind::Interpret
    )
}

/// Whether the operand of `instruction` has an address of its own in 64-bit code, which is no distance from the instruction's and
/// not from what a register or a segment's base hold.
fn is_absolute(instruction: &Instruction) -> bool {
    let displacement = instruction.memory_displacement64() as i64;
    let in_segment = matches!(instruction.memory_segment(), Register::FS | Register::GS);
    instruction.memory_displ_size() == 8
        && instruction.memory_base() == Register::None
        && instruction.memory_index() == Register::None
        && !(in_segment && i64::from(displacement as i32) == displacement)
}

/// Whether `insn` is a jump that the block goes on behind ([`Builder::follows`]).
fn is_followed(insn: &Insn) -> bool {
    insn.kind == Kind::Nop && insn.instruction.is_jmp_short_or_near()
}

/// Whether all status flags must be right before `insn`, because it shows or keeps them.
fn needs_flags(insn: &Insn) -> bool {
    use iced_x86::Mnemonic as M;
    match insn.kind {
        Kind::Interpret => true,
        Kind::Sensitive => !matches!(insn.instruction.mnemonic(), M::Popfq | M::Popfd | M::Sysretq | M::Iretq),
        _ => false,
    }
}

/// Whether an access reads, and whether it writes (conditional ones count as both).
pub(super) fn reads_writes(access: OpAccess) -> (bool, bool) {
    match access {
        OpAccess::None | OpAccess::NoMemAccess => (false, false),
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write => (false, true),
        OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite => (true, true),
    }
}
