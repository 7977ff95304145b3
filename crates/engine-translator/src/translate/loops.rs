//! Loops over one block, with the probes of their accesses hoisted out of the iterations.
//!
//! A block that jumps back to its own start is a loop. Accesses whose addresses stay, or move by the same
//! few bytes in every iteration, are checked before it: all their pages at once, with how far each may go to
//! its page's end. One register that moves with them tells when the nearest end is reached; then they are
//! checked again. In windows ([`crate::windows`]) there is no end: what moves on and on meets the guard.
//! Registers of an address that the loop leaves alone are added to its delta once.
//!
//! ```text
//! start: check every group ──── one is not in the TLB, or about to leave its page ──┐
//! fast:  the body without those probes                                              │
//!        not the end? ── limit not reached ──> fast                                 │
//!                     └─ limit reached ──────> start                                │
//!        leave for the next instruction                                             │
//! plain: the whole block as ever  <─────────────────────────────────────────────────┘
//! ```
//!
//! The check costs as much as some iterations save, so only blocks that a sample of where the time goes has
//! met are translated so, and those where it meets the check more often than the body no more (see
//! `Translator::sample`).
//!
//! - A check that fails changes nothing: no page is touched for an access that may never be made.
//! - The jump from `fast` to itself can be cut by [`super::fault::break_out`] like any other.
//! - What changes a mapping happens in Rust, and Rust comes back at a block's start; only misses return into
//!   an iteration, and they only add to the TLB. So a delta stays right while the loop runs.

use super::assembler::*;
use super::block::*;
use super::classify::Kind;
use super::coalesce::{Coalescer, Hoist, Limit, LoopPlan, Parts, Role};
use super::planted::{self, Bug};
use crate::cpu::{DELTAS, TlbEntry};
use std::mem::offset_of;

/// Where the limit is kept.
const LIMIT: usize = 3;

/// Instructions that may be in such a loop: they go on to the next one, or leave.
fn fits(kind: Kind) -> bool {
    matches!(kind, Kind::Nop | Kind::Copy | Kind::Lea | Kind::Memory | Kind::Push | Kind::Pop | Kind::JumpIf)
}

impl Builder<'_> {
    /// The length of the loop that the block starts with, in instructions, if it is one that can be hoisted.
    pub(super) fn loop_length(&self, insns: &[Insn]) -> Option<usize> {
        if self.bits() != 64 || !self.source.coalesce || self.source.crossing.is_some() || insns[0].live_in != 0 {
            return None;
        }
        for (i, insn) in insns.iter().enumerate() {
            let back = || insn.instruction.near_branch_target() == self.source.rip;
            match insn.kind {
                Kind::JumpIf | Kind::JumpDirect if back() => return Some(i + 1),
                kind if !fits(kind) => return None,
                _ => {}
            }
        }
        None
    }

    /// Plans the accesses of the loop `body`; those of the plan come first.
    pub(super) fn plan_loop(&mut self, body: &[Insn]) -> Option<LoopPlan> {
        let (mix, windowed, bits) = (self.source.mix, self.source.windowed, self.bits());
        let (mut groups, mut planned) = (std::mem::take(&mut self.groups), std::mem::take(&mut self.planned));
        planned.clear();
        let mut coalescer = Coalescer::new(&mut groups, mix, windowed, bits);
        for insn in body {
            for access in self.accesses(insn).into_iter().flatten() {
                let region = self.region(insn, &access, &coalescer);
                coalescer.access(&access, false);
                planned.push(Planned { access, role: Role::Single, region });
            }
            coalescer.execute(insn);
        }
        let (plan, roles) = coalescer.loop_plan();
        planned.iter_mut().zip(roles).for_each(|(planned, role)| planned.role = role);
        (self.planned, self.next_planned, self.groups) = (planned, 0, groups);
        (!plan.hoists.is_empty()).then_some(plan)
    }

    /// Emits the check and the fast body; what follows is the plain block.
    pub(super) fn fast_loop(&mut self, body: &[Insn], mut plan: LoopPlan) {
        let mut to_plain = Vec::new();
        self.map.push((0, 0));
        // In windows, the delta that the most is added to is made last, and so is in RSI. The first access's is in RDI.
        let mut kept = [None; 2];
        if let Some(&Planned { role: Role::Follower { slot, .. }, .. }) =
            self.planned.first().filter(|_| self.source.windowed)
        {
            let most = plan.hoists.iter().rev().find(|hoist| hoist.added != Parts::default());
            kept = match most.filter(|most| most.slot != slot) {
                Some(most) => [Some(most.slot), Some(slot).filter(|_| !most.ea.needs_rdi())],
                None => [Some(slot), None],
            };
        }
        plan.hoists
            .sort_by_key(|hoist| kept.iter().rev().position(|&kept| kept == Some(hoist.slot)).map_or(0, |at| at + 1));
        let mut first = true;
        for hoist in &plan.hoists {
            self.check(hoist, plan.limit.as_ref(), &mut first, &mut to_plain);
            if kept[1] == Some(hoist.slot) {
                self.a.mov(RDI, RSI);
            }
        }
        self.deltas = kept;
        let fast = self.a.position();
        self.iteration(body, plan.limit.as_ref(), fast, kept);
        self.fast = Some((fast as u32, self.a.position() as u32));
        // What follows is seldom run.
        self.micro.end = self.micro.start;
        self.places = [None; DELTAS];
        self.held = [None; 2];
        self.deltas = [None; 2];
        for hole in to_plain {
            self.a.bind(hole);
        }
    }

    /// Emits the body once, and the jump back to it. `kept`: the deltas that are in RSI and RDI at its start.
    fn iteration(&mut self, body: &[Insn], limit: Option<&Limit>, fast: usize, kept: [Option<u8>; 2]) {
        let (last, others) = body.split_last().expect("a loop has an instruction");
        for (i, insn) in others.iter().enumerate() {
            self.map.push((self.a.position() as u32, insn.offset));
            self.at = insn.offset;
            self.next_uses = next_uses(&body[i + 1..]);
            if !self.emit(insn) {
                return self.interpret(insn);
            }
        }
        self.map.push((self.a.position() as u32, last.offset));
        self.at = last.offset;
        self.adjust_stack(0);
        self.write_back_all();
        self.before_flags(last);
        for (which, register) in [RSI, RDI].into_iter().enumerate() {
            if let Some(slot) = kept[which].filter(|_| self.deltas[which] != kept[which]) {
                self.load_delta(register, slot);
                self.held[which] = None;
            }
        }
        self.back_edge(last, limit, fast);
        self.forget_flags();
    }

    /// Checks one group, keeps its delta, and lowers the limit to where it leaves its page.
    fn check(&mut self, hoist: &Hoist, limit: Option<&Limit>, first: &mut bool, to_plain: &mut Vec<Hole>) {
        if self.source.windowed {
            // Its window is all there is to find; its pages are the host's business.
            self.effective_address(&hoist.ea);
            self.likely_delta_ahead(hoist);
            self.add_parts(RSI, hoist);
            return self.keep_delta(hoist.slot, RSI);
        }
        let tag = if hoist.write { offset_of!(TlbEntry, write) } else { offset_of!(TlbEntry, read) } as i32;
        let table = self.table();
        self.probe_index(&hoist.ea);
        self.a.alu(Alu::Add, RSI, Rm::GsBase(RDI, table + tag));
        self.a.alu_imm(Alu::Cmp, true, Rm::Reg(RSI), 4096 - hoist.size);
        to_plain.push(self.a.jcc(cc::A));
        self.a.load(RDI, Rm::GsBase(RDI, table + offset_of!(TlbEntry, delta) as i32));
        self.add_parts(RDI, hoist);
        self.keep_delta(hoist.slot, RDI);
        let (Some(ratio), Some(limit)) = (hoist.budget, limit) else { return };
        let up = limit.stride > 0;
        // Bytes left in the direction of the loop, in units of the counting register.
        if up || planted::is(Bug::BudgetOfWrongSide) {
            self.a.alu_imm(Alu::Sub, true, Rm::Reg(RSI), 4096 - hoist.size);
            self.a.neg64(RSI);
        }
        match ratio {
            0 => {}
            1.. => self.a.shl64(RSI, ratio as u8),
            _ => self.a.shr64(RSI, -ratio as u8),
        }
        if !up {
            self.a.neg64(RSI);
        }
        self.lower_limit(limit, first, to_plain);
    }

    /// Puts the delta of the group whose address is in RSI there. Nothing of it is learned from and nothing faults:
    /// the accesses may never be made.
    fn likely_delta_ahead(&mut self, hoist: &Hoist) {
        let own = |planned: &&Planned| matches!(planned.role, Role::Follower { slot, .. } if slot == hoist.slot);
        match self.planned.iter().find(own).and_then(|planned| planned.region) {
            Some(region) => self.likely_delta(RSI, RSI, region, false),
            None => self.region_delta(RSI, RSI, true),
        }
    }

    /// Adds what the loop leaves alone of its accesses' addresses to the delta in `register`.
    fn add_parts(&mut self, register: u8, hoist: &Hoist) {
        let place = |number: u8| host_register(usize::from(number)).map_or(slot(usize::from(number)), Rm::Reg);
        if let Some(base) = hoist.ea.base.filter(|_| hoist.added.base) {
            self.a.alu(Alu::Add, register, place(base));
        }
        match hoist.ea.index.filter(|_| hoist.added.index).map(place) {
            Some(Rm::Reg(index)) => {
                self.a.lea(register, Rm::Indexed { base: register, index, scale: hoist.ea.scale, displacement: 0 });
            }
            Some(index) => self.a.alu(Alu::Add, register, index),
            None => {}
        }
    }

    /// The counting register may go on by what is in RSI.
    fn lower_limit(&mut self, limit: &Limit, first: &mut bool, to_plain: &mut Vec<Hole>) {
        let up = limit.stride > 0;
        self.a.alu(Alu::Add, RSI, counter(limit));
        to_plain.push(self.a.jcc(cc::O));
        if planted::is(Bug::LimitOneTooFar) {
            self.a.alu_imm(Alu::Add, true, Rm::Reg(RSI), limit.stride as i32);
        }
        // Nor may the register overflow on its last step beyond the limit.
        self.a.mov(RDI, RSI);
        self.a.alu_imm(Alu::Add, true, Rm::Reg(RDI), limit.stride as i32);
        to_plain.push(self.a.jcc(cc::O));
        if !std::mem::take(first) {
            self.a.alu(Alu::Cmp, RSI, scratch(LIMIT));
            self.a.cmov(if up { cc::G } else { cc::L }, RSI, scratch(LIMIT));
        }
        self.a.store(scratch(LIMIT), RSI);
    }

    /// The jump back of the loop: to `fast` while the limit allows, to the check when it does not.
    fn back_edge(&mut self, insn: &Insn, limit: Option<&Limit>, fast: usize) {
        let conditional = insn.kind == Kind::JumpIf;
        let condition =
            if conditional { insn.instruction.condition_code() as u8 - iced_x86::ConditionCode::o as u8 } else { 0 };
        let kind = ExitKind::Loop { target: self.source.rip, inside: fast as u32 };
        let Some(limit) = limit else {
            let hole = if conditional { self.a.jcc(condition) } else { self.a.jmp() };
            self.exits.push(PendingExit::new(hole, kind));
            return self.after_loop(insn);
        };
        let over = conditional.then(|| self.a.short(0x70 | (condition ^ 1)));
        match host_register(limit.register) {
            Some(host) => self.a.alu(Alu::Cmp, host, scratch(LIMIT)),
            None => {
                self.a.load(RSI, slot(limit.register));
                self.a.alu(Alu::Cmp, RSI, scratch(LIMIT));
            }
        }
        let hole = self.a.jcc(if limit.stride > 0 { cc::LE } else { cc::GE });
        self.exits.push(PendingExit::new(hole, kind));
        let hole = self.a.jmp();
        self.exits.push(PendingExit::new(hole, ExitKind::Loop { target: self.source.rip, inside: 0 }));
        if let Some(over) = over {
            self.a.bind_short(over);
        }
        self.after_loop(insn);
    }

    fn after_loop(&mut self, insn: &Insn) {
        if insn.kind == Kind::JumpIf {
            self.direct(insn.instruction.next_ip(), insn.live_out != 0);
        }
    }
}

fn counter(limit: &Limit) -> Rm {
    host_register(limit.register).map_or(slot(limit.register), Rm::Reg)
}
