//! Control transfers out of a block: linked jumps on the same page, jumps through a link in the vCPU block to known
//! targets elsewhere, jump-cache probes for everything else.
//!
//! Whatever closes a loop has to notice pending work. Jumps need no code for that: the signal that announces it
//! unlinks them and makes probes miss ([`super::fault::break_out`]). It leaves returns alone: a loop of nothing else
//! runs out of stack.

use super::assembler::*;
use super::block::*;
use super::flags::Redo;
use super::planted::{self, Bug};
use crate::cpu::{Cpu, JUMP_CACHE_ENTRIES, JumpContext, JumpEntry};
use iced_x86::Mnemonic;
use std::mem::offset_of;

/// A direct jump off the page, out of line.
pub struct FarJump {
    hole: Hole,
    target: u64,
    flags: bool,
    redo: Option<Redo>,
}

impl Builder<'_> {
    fn jump_table(&self, context: JumpContext) -> i32 {
        let context = context as usize;
        (offset_of!(Cpu, jump_cache) + context * size_of::<[JumpEntry; JUMP_CACHE_ENTRIES]>()) as i32
    }

    /// Jumps to `target`. `flags`: the status flags are alive there.
    pub(super) fn direct(&mut self, target: u64, flags: bool) {
        if self.linkable(target) {
            self.flags_home(flags);
            let hole = self.a.jmp();
            self.exits.push(PendingExit::new(hole, ExitKind::Direct { target }));
        } else {
            self.far(target, flags);
        }
    }

    /// Makes destroyed flags again if they are alive where control goes.
    fn flags_home(&mut self, flags: bool) {
        if flags {
            self.settle();
        }
        self.destroyed = false;
    }

    /// Gives held flags back before code that expects them in place.
    fn release_flags(&mut self) {
        if std::mem::take(&mut self.flags_held) {
            self.restore_flags();
        }
    }

    /// Leaves unless linear addresses still mean what they meant at `generation`.
    pub(super) fn check_generation(&mut self, generation: u32) {
        self.a.mov(RSI, RCX);
        self.a.mov_imm(RCX, 0); // mov ecx, imm32: minus the generation, patched
        let patch = self.a.position() - 4;
        self.a.code[patch..].copy_from_slice(&generation.wrapping_neg().to_le_bytes());
        let counter = offset_of!(Cpu, code_generation) + 4 * self.source.context.jumps.generation();
        self.a.load32(RDI, Rm::Gs(counter as i32));
        self.a.lea32(RCX, Rm::Indexed { base: RCX, index: RDI, scale: 0, displacement: 0 });
        let same = self.a.short(0xe3);
        self.a.mov(RCX, RSI);
        let hole = self.a.jmp();
        self.exits.push(PendingExit::new(hole, ExitKind::Recheck { patch: patch as u32 }));
        self.a.bind_short(same);
        self.a.mov(RCX, RSI);
    }

    /// Whether calls and returns of this context use the return stack. Contexts whose addresses do not tell
    /// them apart from another's do not.
    fn uses_return_stack(&self) -> bool {
        !matches!(self.source.context.jumps, JumpContext::KernelAc | JumpContext::KernelAc32)
    }

    /// Pushes the entry of a call that returns to `next`; may use RSI.
    fn push_entry(&mut self, next: u64) {
        let mut key = next.wrapping_neg();
        if self.bits() == 32 {
            key = i64::from(key as i32) as u64; // only its low half is compared
        }
        if key as i64 == i64::from(key as i32) {
            self.fixed = true;
            self.a.push_imm(key as i32);
        } else {
            self.moved_constant(RSI, key, true);
            self.a.push(RSI);
        }
    }

    /// Where the return of a call comes back: drops the entry and goes on at `next`.
    fn returned(&mut self, next: u64) {
        self.forget_flags();
        self.a.lea(RSP, Rm::Base(RSP, 8));
        if self.same_page(next) {
            self.direct(next, true);
        } else {
            self.far(next, true); // what a crossing call has checked may have changed since
        }
    }

    /// Calls `target`, to return to `next`; the guest's return address is pushed already.
    pub(super) fn call_direct(&mut self, target: u64, next: u64, flags: bool) {
        if !self.uses_return_stack() {
            self.release_flags();
            return self.direct(target, flags);
        }
        if self.linkable(target) {
            self.release_flags();
            self.flags_home(flags);
            self.push_entry(next);
            let hole = self.a.call();
            self.exits.push(PendingExit::new(hole, ExitKind::Direct { target }));
        } else {
            self.release_flags();
            self.flags_home(flags);
            self.push_entry(next);
            self.through_link(self.source.context.jumps, target, Assembler::call_rm);
        }
        self.returned(next);
    }

    /// Leaves zero in RDI, and the flags of that, if the entry whose key is at `key` is of a call that returns to RSI.
    fn compare_return(&mut self, key: Rm) {
        self.load_word(RDI, key);
        if self.bits() == 64 {
            self.a.alu(Alu::Add, RDI, Rm::Reg(RSI));
        } else {
            self.a.alu32(Alu::Add, RDI, Rm::Reg(RSI));
        }
    }

    /// Returns to the guest address in RSI.
    pub(super) fn return_to(&mut self, flags: bool) {
        if !self.uses_return_stack() {
            self.release_flags();
            return self.indirect(flags);
        }
        let key = Rm::Base(RSP, 8);
        let unequal = if planted::is(Bug::ReturnUnchecked) { cc::O } else { cc::NE };
        if std::mem::take(&mut self.flags_held) {
            self.compare_return(key);
            let miss = self.a.short(0x70 | unequal);
            self.restore_flags();
            self.a.ret();
            self.a.bind_short(miss);
            self.restore_flags();
        } else if flags && let Some(redo) = self.redo {
            self.compare_return(key);
            let miss = self.a.jcc(unequal);
            self.emit_redo(&redo, RDI);
            self.a.ret();
            self.a.bind(miss);
            self.destroyed = true;
        } else if flags {
            self.a.mov(RDI, RCX);
            self.load_word(RCX, key);
            let sum = Rm::Indexed { base: RCX, index: RSI, scale: 0, displacement: 0 };
            if self.bits() == 64 {
                self.a.lea(RCX, sum)
            } else {
                self.a.lea32(RCX, sum)
            }
            let hit = self.a.short(0xe3);
            self.a.mov(RCX, RDI);
            let miss = self.a.jmp();
            self.a.bind_short(hit);
            self.a.mov(RCX, RDI);
            self.a.ret();
            self.a.bind(miss);
        } else {
            self.compare_return(key);
            let miss = self.a.jcc(unequal);
            self.a.ret();
            self.a.bind(miss);
        }
        self.a.load(RSP, Rm::Gs(offset_of!(Cpu, return_stack_base) as i32));
        self.indirect(flags);
    }

    /// A jump to another page: its mapping can change, so it goes through a link.
    fn far(&mut self, target: u64, flags: bool) {
        self.far_in(self.source.context.jumps, target, flags);
    }

    /// As `far`, to code that runs in another context.
    pub(super) fn far_in(&mut self, context: JumpContext, target: u64, flags: bool) {
        self.release_flags();
        self.flags_home(flags);
        self.through_link(context, target, Assembler::jmp_rm);
    }

    /// Jumps or calls through the link to `target`. RSI says by which exit, should the link lead nowhere.
    fn through_link(&mut self, context: JumpContext, target: u64, branch: fn(&mut Assembler, Rm)) {
        let target = if context.bits() == 32 { target & 0xffff_ffff } else { target };
        self.a.mov_imm(RSI, u64::from(self.source.first_exit) + self.exits.len() as u64);
        self.numbers.push(self.a.position() as u32 - 4);
        branch(&mut self.a, Rm::Gs(0));
        // The displacement ends the instruction.
        let hole = Hole { at: self.a.position() - 4 };
        self.exits.push(PendingExit::new(hole, ExitKind::Far { target, context, link: 0 }));
    }

    /// Jumps to the guest address in RSI through the jump cache.
    pub(super) fn indirect(&mut self, flags: bool) {
        self.indirect_in(self.source.context.jumps, None, flags);
    }

    /// Calls the guest address in RSI through the jump cache, to return to `next`.
    pub(super) fn call_indirect_to(&mut self, next: u64, flags: bool) {
        let next = self.uses_return_stack().then_some(next);
        self.indirect_in(self.source.context.jumps, next, flags);
    }

    /// As `indirect`, to code that runs in another context.
    /// With `call` it is a call that returns there.
    pub(super) fn indirect_in(&mut self, context: JumpContext, call: Option<u64>, flags: bool) {
        let table = self.jump_table(context);
        self.a.movzx16(RDI, RSI);
        self.a.lea32(RDI, Rm::Indexed { base: RDI, index: RDI, scale: 0, displacement: 0 });
        let key = Rm::GsScaled { index: RDI, scale: 3, displacement: table };
        let host = Rm::GsScaled { index: RDI, scale: 3, displacement: table + 8 };
        if std::mem::take(&mut self.flags_held) {
            self.a.alu(Alu::Add, RSI, key);
            let cut = Cut::jne(self.a.position());
            let miss = self.a.jcc(cc::NE);
            self.restore_flags();
            self.found(host, call);
            self.a.bind(miss);
            self.a.alu(Alu::Sub, RSI, key);
            self.restore_flags();
            self.indirect_miss(cut);
        } else if flags && let Some(redo) = self.redo {
            self.a.alu(Alu::Add, RSI, key);
            let cut = Cut::jne(self.a.position());
            let miss = self.a.jcc(cc::NE);
            self.emit_redo(&redo, RSI);
            self.found(host, call);
            self.a.bind(miss);
            self.a.alu(Alu::Sub, RSI, key);
            self.redo = Some(redo);
            self.destroyed = true;
            self.indirect_miss(cut);
        } else if flags {
            self.a.store(scratch(SAVED_RCX), RCX);
            self.a.load(RCX, key);
            self.a.lea(RCX, Rm::Indexed { base: RCX, index: RSI, scale: 0, displacement: 0 });
            let hit = self.a.short(0xe3);
            self.a.load(RCX, scratch(SAVED_RCX));
            self.a.store(Rm::Gs(word_offset(word::TARGET)), RSI);
            let hole = self.a.jmp();
            self.a.bind_short(hit);
            let cut = Cut::jrcxz(hit - 1, self.a.code[hit]);
            let (rip, stack) = self.origin;
            self.exits.push(PendingExit::new(hole, ExitKind::Indirect { rip, stack, cut }));
            self.a.load(RCX, scratch(SAVED_RCX));
            self.found(host, call);
        } else {
            self.a.alu(Alu::Add, RSI, key);
            let cut = Cut::jne(self.a.position());
            let miss = self.a.jcc(cc::NE);
            self.found(host, call);
            self.a.bind(miss);
            self.a.alu(Alu::Sub, RSI, key);
            self.indirect_miss(cut);
        }
    }

    fn found(&mut self, host: Rm, call: Option<u64>) {
        match call {
            None => self.a.jmp_rm(host),
            Some(next) => {
                self.push_entry(next);
                self.a.call_rm(host);
                self.returned(next);
            }
        }
    }

    fn indirect_miss(&mut self, cut: Cut) {
        self.a.store(Rm::Gs(word_offset(word::TARGET)), RSI);
        self.settle_with(RSI);
        let hole = self.a.jmp();
        let (rip, stack) = self.origin;
        self.exits.push(PendingExit::new(hole, ExitKind::Indirect { rip, stack, cut }));
    }

    pub(super) fn jump_if(&mut self, insn: &Insn) {
        let instruction = &insn.instruction;
        let target = instruction.near_branch_target();
        let condition = instruction.condition_code() as u8 - iced_x86::ConditionCode::o as u8;
        let flags = insn.live_out != 0;
        if !self.linkable(target) {
            let hole = self.a.jcc(condition);
            self.far_jumps.push(FarJump { hole, target, flags, redo: self.redo });
        } else {
            let hole = self.a.jcc(condition);
            self.exits.push(PendingExit::new(hole, ExitKind::Direct { target }));
        }
    }

    /// LOOPcc and JRCXZ, whose own displacement reaches only a stub.
    pub(super) fn loop_jump(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        let target = instruction.near_branch_target();
        let opcode = match instruction.mnemonic() {
            Mnemonic::Loopne => 0xe0,
            Mnemonic::Loope => 0xe1,
            Mnemonic::Loop => 0xe2,
            _ => 0xe3,
        };
        use iced_x86::Code;
        let narrow = matches!(
            instruction.code(),
            Code::Loop_rel8_64_ECX
                | Code::Loope_rel8_64_ECX
                | Code::Loopne_rel8_64_ECX
                | Code::Jecxz_rel8_64
                | Code::Loop_rel8_16_ECX
                | Code::Loope_rel8_16_ECX
                | Code::Loopne_rel8_16_ECX
                | Code::Jecxz_rel8_16
        ) || self.bits() == 32;
        if narrow {
            self.a.byte(0x67);
        }
        let taken = self.a.short(opcode);
        let over = self.a.short(0xeb);
        self.a.bind_short(taken);
        self.direct(target, insn.live_out != 0);
        self.a.bind_short(over);
        true
    }

    /// The out-of-line parts of conditional jumps to other pages.
    pub(super) fn far_jumps(&mut self) {
        let mut jumps = std::mem::take(&mut self.far_jumps);
        for jump in jumps.drain(..) {
            self.a.bind(jump.hole);
            self.redo = jump.redo;
            self.destroyed = false;
            self.far(jump.target, jump.flags);
        }
        self.far_jumps = jumps;
    }

    /// The stubs that unlinked exits jump to: each tells its number and leaves.
    pub(super) fn exit_stubs(&mut self) {
        let mut pending = std::mem::take(&mut self.exits);
        for (i, exit) in pending.drain(..).enumerate() {
            let stub = self.a.position();
            if let ExitKind::Far { .. } = exit.kind {
                self.finished_exits.push(BlockExit { kind: exit.kind, site: exit.hole.at as u32, stub: 0 });
                continue;
            }
            match exit.kind {
                ExitKind::Loop { inside, .. } => self.a.bind_to(exit.hole, inside as usize),
                _ => self.a.bind(exit.hole),
            }
            if let Some(redo) = exit.redo {
                self.emit_redo(&redo, RSI);
            }
            self.a.store32_imm(Rm::Gs(word_offset(word::EXIT)), self.source.first_exit + i as u32);
            self.numbers.push(self.a.position() as u32 - 4);
            let jump = self.a.jmp();
            self.thunk_calls.push((jump.at as u32, Thunk::Exit));
            self.finished_exits.push(BlockExit { kind: exit.kind, site: exit.hole.at as u32, stub: stub as u32 });
        }
        self.exits = pending;
    }
}
