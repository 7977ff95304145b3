//! Stack instructions, calls and returns.

use super::access::Ea;
use super::assembler::*;
use super::block::*;
use super::planted::{self, Bug};
use crate::cpu::Cpu;
use crate::vendor;
use anyvisor_x86::bits::gpr;
use anyvisor_x86::segment::Segment;
use iced_x86::{OpKind, Register};
use std::mem::offset_of;

/// Where the vCPU block has the selector in a segment register, by encoding.
pub(super) fn selector(segment: usize) -> Rm {
    let offset = offset_of!(Cpu, seg) + segment * size_of::<Segment>() + offset_of!(Segment, selector);
    Rm::Gs(offset as i32)
}

impl Builder<'_> {
    pub(super) fn push(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        let flags = insn.live_in != 0;
        match instruction.op0_kind() {
            OpKind::Register => {
                let index = instruction.op0_register().full_register() as usize - Register::RAX as usize;
                let host = host_register(index);
                let rm = self.access(&self.stack(-self.word()), self.word() as usize, true, flags, host.is_none());
                if host.is_none() {
                    self.a.load(RDI, slot(index));
                    self.clobber(RDI);
                }
                self.store_word(rm, host.unwrap_or(RDI));
            }
            OpKind::Memory => {
                let Some(ea) = Ea::of(instruction, self.bits()) else { return false };
                let rm = self.access(&ea, self.word() as usize, false, flags, false);
                self.load_word(RDI, rm);
                self.clobber(RDI);
                self.a.store(scratch(VALUE), RDI);
                let rm = self.access(&self.stack(-self.word()), self.word() as usize, true, flags, true);
                self.a.load(RDI, scratch(VALUE));
                self.store_word(rm, RDI);
                self.deltas = [None; 2];
            }
            _ => {
                let value = instruction.immediate(0) as i64 as i32;
                let rm = self.access(&self.stack(-self.word()), self.word() as usize, true, flags, false);
                self.store_word_imm(rm, value);
            }
        }
        self.defer_stack(-(self.word() as i32));
        true
    }

    /// PUSH of a segment register: into as much of a 32-bit slot as the host's processor writes.
    pub(super) fn push_selector(&mut self, insn: &Insn) {
        let segment = insn.instruction.op0_register() as usize - Register::ES as usize;
        let size = vendor::pushed_selector_size() as usize;
        let rm = self.access(&self.stack(-self.word()), size, true, insn.live_in != 0, true);
        self.a.load_sized(1, RDI, selector(segment));
        match size {
            2 => self.a.store16(rm, RDI),
            _ => self.a.store32(rm, RDI),
        }
        self.adjust_stack(-(self.word() as i32));
    }

    pub(super) fn pop(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        if instruction.op0_kind() != OpKind::Register {
            return false;
        }
        let index = instruction.op0_register().full_register() as usize - Register::RAX as usize;
        self.overwrites_rax = index == gpr::RAX;
        let rm = self.access(&self.stack(0), self.word() as usize, false, insn.live_in != 0, false);
        self.overwrites_rax = false;
        match host_register(index) {
            Some(host) => self.load_word(host, rm),
            None => {
                // Not the register with the delta, which the next pop wants.
                let scratch = if self.deltas[0].is_some() { RDI } else { RSI };
                self.a.load(scratch, rm);
                self.clobber(scratch);
                self.a.store(slot(index), scratch);
            }
        }
        if index != gpr::RSP {
            self.defer_stack(self.word() as i32);
        }
        true
    }

    pub(super) fn leave(&mut self, insn: &Insn) -> bool {
        let word = self.word() as i32;
        let rm = self.access(&Ea::register(RBP, self.bits()), word as usize, false, insn.live_in != 0, false);
        self.load_word(RSI, rm);
        self.clobber(RSI);
        if word == 8 {
            self.a.lea(GUEST_RSP, Rm::Base(RBP, word));
        } else {
            self.a.lea32(GUEST_RSP, Rm::Base(RBP, word));
        }
        self.a.mov(RBP, RSI);
        true
    }

    pub(super) fn push_return_address(&mut self, insn: &Insn) {
        let address = insn.instruction.next_ip();
        let short = self.bits() == 32 || address as i64 == i64::from(address as i32);
        let rm = self.access(&self.stack(-self.word()), self.word() as usize, true, insn.live_in != 0, !short);
        if short {
            self.fixed = true;
            self.store_word_imm(rm, address as i32);
        } else {
            self.absolute(RDI, address);
            self.a.store(rm, RDI);
        }
        self.adjust_stack(-(self.word() as i32));
    }

    /// Puts the target of an indirect jump or call into RSI; `false` if it is to be interpreted.
    pub(super) fn indirect_target(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        match instruction.op0_kind() {
            OpKind::Register if instruction.op0_register().size() as i64 == self.word() => {
                let index = instruction.op0_register().full_register() as usize - Register::RAX as usize;
                match host_register(index) {
                    Some(host) if self.bits() == 32 => self.a.mov32(RSI, host),
                    Some(host) => self.a.mov(RSI, host),
                    None => self.a.load(RSI, slot(index)),
                }
                true
            }
            OpKind::Memory if instruction.memory_size().size() as i64 == self.word() => {
                let Some(ea) = Ea::of(instruction, self.bits()) else { return false };
                let rm = self.access(&ea, self.word() as usize, false, insn.live_in != 0, false);
                self.load_word(RSI, rm);
                if !planted::is(Bug::DeltaThoughtKept) {
                    self.clobber(RSI);
                }
                true
            }
            _ => false,
        }
    }

    pub(super) fn call_indirect(&mut self, insn: &Insn) -> bool {
        // A register still has the target after the push; memory is not read twice.
        let register = insn.instruction.op0_kind() == OpKind::Register
            && insn.instruction.op0_register().full_register() != Register::RSP;
        if register {
            if insn.instruction.op0_register().size() as i64 != self.word() {
                return false;
            }
        } else if self.indirect_target(insn) {
            self.a.store(scratch(VALUE), RSI);
        } else {
            return false;
        }
        self.hold_flags = true;
        self.push_return_address(insn);
        if !register {
            self.a.load(RSI, scratch(VALUE));
        } else if self.flags_held && insn.instruction.op0_register().full_register() == Register::RAX {
            self.a.load(RSI, scratch(SAVED_RAX));
        } else if !self.indirect_target(insn) {
            unreachable!("it was a register before");
        }
        self.origin = (insn.instruction.ip(), 8);
        self.call_indirect_to(insn.instruction.next_ip(), insn.live_out != 0);
        true
    }

    pub(super) fn jump_indirect(&mut self, insn: &Insn) -> bool {
        self.hold_flags = insn.instruction.op0_kind() == OpKind::Memory;
        if !self.indirect_target(insn) {
            self.hold_flags = false;
            return false;
        }
        self.origin = (insn.instruction.ip(), 0);
        self.indirect(insn.live_out != 0);
        true
    }

    pub(super) fn ret(&mut self, insn: &Insn) -> bool {
        let extra = if insn.instruction.op_count() == 1 { i32::from(insn.instruction.immediate16()) } else { 0 };
        self.hold_flags = true;
        let rm = self.access(&self.stack(0), self.word() as usize, false, insn.live_in != 0, false);
        self.load_word(RSI, rm);
        self.adjust_stack(self.word() as i32 + extra);
        self.origin = (insn.instruction.ip(), -(self.word() as i32 + extra));
        self.return_to(insn.live_out != 0);
        true
    }
}
