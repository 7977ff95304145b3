//! Crossing between Rust and translated code.
//!
//! Generated once per vCPU at the start of its code memory:
//! - `enter(cpu)`, a sysv64 function: guest registers into the CPU, jump to [`word::ENTER`]. It returns
//!   when translated code jumps to `exit`, with the number of the exit taken.
//! - `fill`, one for each kind of access: a TLB miss calls it, it calls [`tlb_miss`] and returns to the
//!   probe, or leaves through `exit` when the instruction has to be interpreted, or goes on in a twin of the block
//!   that has no shared probes.
//! - `no_return`: where a guest return that matches nothing on the return stack goes.
//! - `fault`: where the signal handler sends a host fault in translated code.

use super::access::ENTRY_BITS;
use super::assembler::*;
use super::block::{Thunk, host_register, slot, word, word_offset};
use super::planted::{self, Bug};
use crate::core::Core;
use crate::cpu::{Cpu, MicroEntry, TLB_CONTEXTS, TLB_ENTRIES, Tag, TlbContext, TlbEntry, Ymm};
use crate::mmu::Fill;
use anyvisor_engine::tally::event;
use anyvisor_x86::bits::rflags;
use std::mem::offset_of;

/// Fills of the micro-TLB after which the one that makes the number full is looked into.
const MICRO_BUDGET: i32 = 256;
/// If so many came faster than one in this many TSC ticks, that one's block does better without.
const MICRO_TICKS: u64 = 4_000;

/// The exit number that means: go on at [`word::TARGET`].
pub const EXIT_INDIRECT: u32 = u32::MAX - 1;

/// The exit number that means: the access of the instruction that [`word::FAULT`] belongs to was in the region of
/// [`word::REGION`], not where it was thought to be, and has to be interpreted.
pub const EXIT_ELSEWHERE: u32 = u32::MAX - 2;

/// The exit number that means: interpret the instruction that [`word::FAULT`] belongs to.
pub const EXIT_FAULT: u32 = u32::MAX;

const STATUS: i32 = rflags::STATUS as i32;

/// Positions of the thunks in code memory.
#[derive(Clone, Debug, Default)]
pub struct Thunks {
    pub enter: usize,
    pub exit: usize,
    pub fault: usize,
    /// What a return finds on an empty return stack.
    pub no_return: usize,
    /// Where a link leads whose target is not known: leaves by the exit in ESI.
    pub unlinked: usize,
    /// By context, tag, flags.
    pub fill: [[[usize; 2]; Tag::ALL.len()]; TLB_CONTEXTS],
    pub fill_micro: [[[usize; 2]; Tag::ALL.len()]; TLB_CONTEXTS],
    /// By context, MOVS, log2 of the size.
    pub repeat: [[[usize; 4]; 2]; TLB_CONTEXTS],
    /// By register, RSI and RDI.
    pub elsewhere: [usize; 2],
}

impl Thunks {
    /// Where a thunk that blocks call is.
    pub fn address(&self, thunk: Thunk) -> usize {
        match thunk {
            Thunk::Exit => self.exit,
            Thunk::Fill { context, tag, flags } => self.fill[context as usize][tag as usize][usize::from(flags)],
            Thunk::FillMicro { context, tag, flags } => {
                self.fill_micro[context as usize][tag as usize][usize::from(flags)]
            }
            Thunk::Repeat { context, moves, log } => self.repeat[context as usize][usize::from(moves)][log as usize],
            Thunk::Elsewhere { to } => self.elsewhere[usize::from(to == RDI)],
        }
    }
}

/// Generates the thunks for code memory that starts at offset 0.
pub fn generate() -> (Vec<u8>, Thunks) {
    let avx = std::arch::is_x86_feature_detected!("avx");
    let mut a = Assembler::default();
    let mut thunks = Thunks { enter: a.position(), ..Thunks::default() };
    enter(&mut a, avx);
    thunks.exit = a.position();
    exit(&mut a, avx);
    thunks.fault = a.position();
    a.store32_imm(Rm::Gs(word_offset(word::EXIT)), EXIT_FAULT);
    let to_exit = a.jmp();
    a.bind_to(to_exit, thunks.exit);
    thunks.no_return = a.position();
    a.load(RSP, Rm::Gs(offset_of!(Cpu, return_stack_base) as i32));
    a.store(Rm::Gs(word_offset(word::TARGET)), RSI);
    a.store32_imm(Rm::Gs(word_offset(word::EXIT)), EXIT_INDIRECT);
    let to_exit = a.jmp();
    a.bind_to(to_exit, thunks.exit);
    thunks.unlinked = a.position();
    a.store32(Rm::Gs(word_offset(word::EXIT)), RSI);
    let to_exit = a.jmp();
    a.bind_to(to_exit, thunks.exit);
    for context in 0..TLB_CONTEXTS {
        for tag in Tag::ALL {
            for flags in 0..2 {
                thunks.fill[context][tag as usize][flags] = a.position();
                fill(&mut a, avx, context, tag, flags == 1);
                thunks.fill_micro[context][tag as usize][flags] = a.position();
                fill_micro(&mut a, context, tag, flags == 1, thunks.fill[context][tag as usize][flags]);
            }
        }
    }
    for context in 0..TLB_CONTEXTS {
        for moves in 0..2 {
            for log in 0..4 {
                thunks.repeat[context][moves][log] = a.position();
                let fill = &thunks.fill[context];
                super::strings::repeat(&mut a, context, moves == 1, log as u8, fill, thunks.fault);
            }
        }
    }
    for (i, to) in [RSI, RDI].into_iter().enumerate() {
        thunks.elsewhere[i] = a.position();
        elsewhere(&mut a, to, thunks.exit);
    }
    (a.code, thunks)
}

const CALLEE_SAVED: [u8; 6] = [RBX, RBP, R12, R13, R14, R15];

fn enter(a: &mut Assembler, avx: bool) {
    for r in CALLEE_SAVED {
        a.push(r);
    }
    a.alu_imm(Alu::Sub, true, Rm::Reg(RSP), 8);
    a.store(Rm::Gs(offset_of!(Cpu, host_rsp) as i32), RSP);
    a.mxcsr(3, Rm::Gs(offset_of!(Cpu, host_mxcsr) as i32));
    a.mxcsr(2, Rm::Gs(offset_of!(Cpu, mxcsr) as i32));
    load_vectors(a, avx);
    a.load(RAX, Rm::Gs(offset_of!(Cpu, rflags) as i32));
    a.alu_imm(Alu::And, false, Rm::Reg(RAX), STATUS);
    a.push(RAX);
    a.popfq();
    a.load(RSP, Rm::Gs(offset_of!(Cpu, return_stack) as i32));
    for (guest, host) in mapped() {
        a.load(host, slot(guest));
    }
    a.jmp_rm(Rm::Gs(word_offset(word::ENTER)));
}

fn exit(a: &mut Assembler, avx: bool) {
    for (guest, host) in mapped() {
        a.store(slot(guest), host);
    }
    a.store(Rm::Gs(offset_of!(Cpu, return_stack) as i32), RSP);
    a.load(RSP, Rm::Gs(offset_of!(Cpu, host_rsp) as i32));
    a.pushfq();
    a.pop(RAX);
    let rflags = Rm::Gs(offset_of!(Cpu, rflags) as i32);
    a.load(RCX, rflags);
    a.alu_imm(Alu::And, true, Rm::Reg(RAX), STATUS);
    a.alu_imm(Alu::And, true, Rm::Reg(RCX), !STATUS);
    a.alu(Alu::Or, RCX, Rm::Reg(RAX));
    a.store(rflags, RCX);
    save_vectors(a, avx);
    a.mxcsr(3, Rm::Gs(offset_of!(Cpu, mxcsr) as i32));
    a.mxcsr(2, Rm::Gs(offset_of!(Cpu, host_mxcsr) as i32));
    a.alu_imm(Alu::Add, true, Rm::Reg(RSP), 8);
    for r in CALLEE_SAVED.into_iter().rev() {
        a.pop(r);
    }
    a.load32(RAX, Rm::Gs(word_offset(word::EXIT)));
    a.ret();
}

/// Entered by a call from a probe that missed: RSI is the address plus the tag, RDI the entry's offset.
fn fill(a: &mut Assembler, avx: bool, context: usize, tag: Tag, flags: bool) {
    let caller_saved: Vec<_> = mapped().filter(|(_, host)| !CALLEE_SAVED.contains(host)).collect();
    for &(guest, host) in &caller_saved {
        a.store(slot(guest), host);
    }
    if flags {
        a.pushfq();
    } else {
        a.push(RAX);
    }
    // Rust runs on its own stack.
    a.store(Rm::Gs(offset_of!(Cpu, return_stack) as i32), RSP);
    let table = offset_of!(Cpu, tlb) + context * size_of::<[TlbEntry; TLB_ENTRIES]>();
    a.alu(Alu::Sub, RSI, Rm::GsBase(RDI, table as i32 + tag.offset()));
    save_vectors(a, avx);
    a.mov_imm(RDX, (context * 4 + tag as usize) as u64);
    a.load(RDI, Rm::Gs(word_offset(word::CORE)));
    a.load(RSP, Rm::Gs(offset_of!(Cpu, host_rsp) as i32));
    a.mov_imm(RAX, tlb_miss as *const () as u64);
    a.call_rm(Rm::Reg(RAX));
    a.load(RSP, Rm::Gs(offset_of!(Cpu, return_stack) as i32));
    a.mov(RSI, RAX);
    load_vectors(a, avx);
    for &(guest, host) in &caller_saved {
        a.load(host, slot(guest));
    }
    // A flag-free test of the result, RSI: 0 is "ready".
    a.mov(RDI, RCX);
    a.mov(RCX, RSI);
    let ready = a.short(0xe3);
    a.mov(RCX, RDI);
    if flags {
        a.popfq();
    } else {
        a.pop(RSI);
    }
    // The return address belongs to the next instruction already, the byte before it does not.
    a.pop(RSI);
    a.lea(RSI, Rm::Base(RSI, -1));
    a.store(Rm::Gs(word_offset(word::FAULT)), RSI);
    a.jmp_rm(Rm::Gs(word_offset(word::LEAVE)));
    a.bind_short(ready);
    a.mov(RCX, RDI);
    if flags {
        a.popfq();
    } else {
        a.pop(RSI);
    }
    a.ret();
}

/// Entered by a call from a probe that its micro-TLB entry did not serve: RSI is the address plus that
/// entry's tag, RDI the entry's offset. Copies what the TLB has, or goes on to `fill`: if the TLB has not
/// got the page, if the entry has it already (so that what is wrong is the page's end), or if there have
/// been many such calls.
fn fill_micro(a: &mut Assembler, context: usize, tag: Tag, flags: bool, fill: usize) {
    let table = (offset_of!(Cpu, tlb) + context * size_of::<[TlbEntry; TLB_ENTRIES]>()) as i32;
    let micro = |field: usize| (offset_of!(Cpu, micro) + field) as i32;
    let asked = if planted::is(Bug::MicroForRead) { Tag::Read } else { tag };
    let entry_tag = Rm::GsBase(RDI, table + asked.offset());
    if flags {
        a.pushfq();
    }
    a.push(RAX);
    a.store(Rm::Gs(word_offset(word::MICRO)), RDI);
    a.load(RAX, Rm::GsBase(RDI, micro(offset_of!(MicroEntry, tag))));
    a.alu(Alu::Sub, RSI, Rm::Reg(RAX));
    a.alu(Alu::Sub, RAX, Rm::GsBase(RDI, micro(offset_of!(MicroEntry, low))));
    a.mov32(RDI, RSI);
    a.shr32(RDI, 12 - ENTRY_BITS);
    a.alu_imm(Alu::And, false, Rm::Reg(RDI), ((TLB_ENTRIES - 1) << ENTRY_BITS) as i32);
    let mut slow = Vec::new();
    a.alu(Alu::Cmp, RAX, entry_tag);
    slow.push(a.jcc(cc::E));
    a.mov(RAX, RSI);
    a.alu(Alu::Add, RAX, entry_tag);
    a.alu_imm(Alu::Cmp, true, Rm::Reg(RAX), 4095);
    slow.push(a.jcc(cc::A));
    a.alu_imm(Alu::Sub, false, Rm::Gs(offset_of!(Cpu, micro_budget) as i32), 1);
    slow.push(a.jcc(cc::S));
    a.load(RSI, Rm::Gs(word_offset(word::MICRO)));
    let copies = [
        (offset_of!(TlbEntry, host), offset_of!(MicroEntry, host)),
        (offset_of!(TlbEntry, delta), offset_of!(MicroEntry, delta)),
    ];
    for (from, to) in copies {
        a.load(RAX, Rm::GsBase(RDI, table + from as i32));
        a.store(Rm::GsBase(RSI, micro(to)), RAX);
    }
    a.load(RAX, entry_tag);
    a.alu(Alu::Add, RAX, Rm::GsBase(RSI, micro(offset_of!(MicroEntry, low))));
    a.store(Rm::GsBase(RSI, micro(offset_of!(MicroEntry, tag))), RAX);
    a.store32_imm(Rm::Gs(offset_of!(Cpu, micro_filled) as i32), 1);
    a.pop(RAX);
    if flags {
        a.popfq();
    }
    a.ret();
    for hole in slow {
        a.bind(hole);
    }
    a.alu(Alu::Add, RSI, Rm::GsBase(RDI, table + tag.offset()));
    a.pop(RAX);
    if flags {
        a.popfq();
    }
    let to_fill = a.jmp();
    a.bind_to(to_fill, fill);
}

/// Entered by a call from an access that is not in the region it was thought to be in, with that in the low byte of `to`. Leaves
/// the region's delta in `to`, or leaves the block if there have been many such calls. Destroys flags.
fn elsewhere(a: &mut Assembler, to: u8, exit: usize) {
    a.movzx8(to);
    a.alu_imm(Alu::Sub, false, Rm::Gs(offset_of!(Cpu, region_budget) as i32), 1);
    let often = a.jcc(cc::S);
    a.load(to, Rm::GsScaled { index: to, scale: 3, displacement: offset_of!(Cpu, regions) as i32 });
    a.ret();
    a.bind(often);
    a.store(Rm::Gs(word_offset(word::REGION)), to);
    // The byte before the return address is the call's.
    a.pop(RSI);
    a.lea(RSI, Rm::Base(RSI, -1));
    a.store(Rm::Gs(word_offset(word::FAULT)), RSI);
    a.store32_imm(Rm::Gs(word_offset(word::EXIT)), EXIT_ELSEWHERE);
    let to_exit = a.jmp();
    a.bind_to(to_exit, exit);
}

/// Guest registers that have a host register, with it.
fn mapped() -> impl Iterator<Item = (usize, u8)> {
    (0..16).filter_map(|guest| host_register(guest).map(|host| (guest, host)))
}

fn ymm(i: u8) -> Rm {
    Rm::Gs((offset_of!(Cpu, ymm) + usize::from(i) * size_of::<Ymm>()) as i32)
}

/// Saves the vector registers, notes whether any upper half is in use, and leaves the upper halves clean.
fn save_vectors(a: &mut Assembler, avx: bool) {
    for i in 0..16 {
        if avx {
            a.vmovdqu(true, i, ymm(i));
        } else {
            a.movdqu(true, i, ymm(i));
        }
    }
    if avx {
        for i in 4..16 {
            a.vorps(i & 3, i);
        }
        a.vorps(0, 1);
        a.vorps(2, 3);
        a.vorps(0, 2);
        a.test_upper0();
        a.setne(Rm::Gs(offset_of!(Cpu, upper_halves) as i32));
        a.vzeroupper();
    }
}

/// Loads the vector registers. Upper halves that are zero are not written: CPUs take mixed SSE and AVX code
/// for the slow case (SDM optimization manual 15.3) once an upper half has been, whatever it holds.
fn load_vectors(a: &mut Assembler, avx: bool) {
    if !avx {
        (0..16).for_each(|i| a.movdqu(false, i, ymm(i)));
        return;
    }
    a.test8(Rm::Gs(offset_of!(Cpu, upper_halves) as i32), 1);
    let full = a.jcc(cc::NE);
    a.vzeroupper();
    (0..16).for_each(|i| a.movdqu(false, i, ymm(i)));
    let done = a.jmp();
    a.bind(full);
    (0..16).for_each(|i| a.vmovdqu(false, i, ymm(i)));
    a.bind(done);
}

/// Handles a TLB miss of translated code: 0 to look again, 1 to leave the block for [`word::LEAVE`].
///
/// # Safety
/// Called only by `fill`, with the `Core` whose translated code is running on this thread.
unsafe extern "sysv64" fn tlb_miss(core: *mut Core, gva: u64, how: u64) -> u64 {
    // SAFETY: `Translator::run` put its own exclusive `Core` there and is waiting for translated code.
    let core = unsafe { &mut *core };
    let context = match how >> 2 {
        0 => TlbContext::Kernel,
        1 => TlbContext::KernelAc,
        _ => TlbContext::User,
    };
    if core.cpu.micro_budget < 0 {
        // Not a miss of the TLB: look again, or leave to have this place's block translated again.
        core.cpu.micro_budget = MICRO_BUDGET;
        let now = core.tsc();
        let elapsed = now.wrapping_sub(std::mem::replace(&mut core.micro_looked, now));
        if elapsed >= MICRO_BUDGET as u64 * MICRO_TICKS {
            return 0;
        }
        core.micro_complaint = Some(core.cpu.translated[word::MICRO] as usize / size_of::<MicroEntry>());
        core.cpu.translated[word::MISFIT] = 0;
        core.cpu.translated[word::LEAVE] = core.twins.fault;
        return 1;
    }
    let began = core.meter.start();
    let fill = core.fill(context, gva, Tag::ALL[(how & 3) as usize]);
    core.meter.stop(began, event::TLB_MISS);
    if fill == Fill::Ready {
        return 0;
    }
    let misfit = fill == Fill::Misfit;
    // SAFETY: `fill` has left its return address, the probe's, in the return stack's second word.
    let probe = unsafe { *(core.cpu.return_stack as *const u64).add(1) };
    let twin = if misfit { core.twins.of(probe) } else { None };
    core.cpu.translated[word::MISFIT] = u64::from(misfit && twin.is_none());
    core.cpu.translated[word::LEAVE] = twin.unwrap_or(core.twins.fault);
    1
}
