//! Status flags that are made again rather than kept.
//!
//! A TLB probe and a comparison with a jump cache's key destroy the status flags. Keeping live ones through
//! AH, or comparing by JRCXZ, costs more than the check itself. But often the instruction that they come from
//! can be executed again: CMP and TEST have left their operands as they were, the result of a logical
//! instruction says all that its flags do, and of ADD and SUB the old operand follows from the result.
//!
//! So the builder notes such an instruction (`redo`). While its registers keep their values, checks destroy
//! the flags freely, and they are made again where something reads, keeps or shows them: before an
//! instruction that does, at an exit, and before a miss that may end in a fault.

use super::assembler::*;
use super::block::{Builder, Insn, host_register, scratch};
use super::classify::{self, Kind};
use super::planted::{self, Bug};
use anyvisor_x86::bits::gpr;
use iced_x86::{Mnemonic as M, OpKind, Register};

/// Where a miss keeps RSI meanwhile; only indirect jumps use it else.
use super::block::SAVED_RCX as SAVED_RSI;

/// How to make the status flags again.
#[derive(Clone, Copy)]
pub struct Redo {
    how: How,
    /// Guest registers that must not change.
    needs: u16,
}

#[derive(Clone, Copy)]
enum How {
    /// By this CMP or TEST.
    Again(Insn),
    /// By a TEST of the result.
    Logic {
        result: u8,
        wide: bool,
    },
    /// By adding to, or comparing with, what was there before.
    Immediate {
        adds: bool,
        result: u8,
        wide: bool,
        value: i32,
        moved: i32,
    },
    Registers {
        adds: bool,
        result: u8,
        other: u8,
        wide: bool,
    },
    /// By a comparison with itself.
    Zero {
        result: u8,
        wide: bool,
    },
}

impl Redo {
    fn needs_scratch(&self) -> bool {
        matches!(self.how, How::Immediate { .. } | How::Registers { .. })
    }

    /// Whether it is `rsp ± constant`, which pushes and pops only move on.
    fn follows_stack(&self) -> bool {
        matches!(self.how, How::Immediate { wide: true, .. }) && self.needs == 1 << gpr::RSP
    }
}

impl Builder<'_> {
    /// Before `insn` is emitted: puts destroyed flags in place if it shows them or changes what they are to
    /// be made from. Returns whether it does the latter.
    pub(super) fn before_flags(&mut self, insn: &Insn) -> bool {
        self.settle_after = false;
        let Some(redo) = self.redo else { return false };
        if insn.live_in == 0 {
            self.forget_flags();
            return false;
        }
        let stack = matches!(insn.kind, Kind::Push | Kind::Pop | Kind::Leave);
        let jump = matches!(
            insn.kind,
            Kind::CallDirect | Kind::CallIndirect | Kind::Return | Kind::JumpDirect | Kind::JumpIndirect | Kind::JumpIf
        );
        let plain = matches!(insn.kind, Kind::Nop | Kind::Lea | Kind::Copy | Kind::Memory);
        if !stack && !jump && !plain {
            self.settle();
            self.forget_flags();
            return false;
        }
        let changes = redo.needs & self.moved_apart(insn, &redo) != 0 && !planted::is(Bug::FlagsFromNewOperand);
        let instruction = &insn.instruction;
        let shows = instruction.rflags_read() | instruction.rflags_modified() != 0
            || (matches!(insn.kind, Kind::Copy | Kind::Memory) && classify::can_trap(instruction));
        if !shows && !changes {
            return false;
        }
        if !stack && insn.kind != Kind::Memory {
            self.settle();
            if changes && jump {
                self.forget_flags();
            }
        } else if redo.needs_scratch() {
            // The scratch registers are the operand's.
            self.settle();
            self.forget_flags();
        } else {
            self.settle_after = true;
        }
        changes
    }

    /// After `insn` was emitted: whether its flags can be made again.
    pub(super) fn after_flags(&mut self, insn: &Insn, changed: bool) {
        self.settle_after = false;
        if insn.instruction.rflags_modified() != 0 {
            self.destroyed = false;
            self.redo = self.redo_of(insn);
        } else if changed {
            assert!(!self.destroyed, "flags are in place before their operands change");
            self.redo = None;
        }
    }

    pub(super) fn forget_flags(&mut self) {
        self.redo = None;
        self.destroyed = false;
    }

    /// Guest registers that `insn` changes, but for a stack pointer that `redo` follows.
    fn moved_apart(&self, insn: &Insn, redo: &Redo) -> u16 {
        let steps = match insn.kind {
            Kind::Push | Kind::CallDirect | Kind::CallIndirect | Kind::Return => true,
            Kind::Pop => insn.instruction.op0_register().full_register() != Register::RSP,
            _ => false,
        };
        if steps && redo.follows_stack() { insn.written & !(1 << gpr::RSP) } else { insn.written }
    }

    /// The stack pointer moves by `by`.
    pub(super) fn stack_moves(&mut self, by: i32) {
        if let Some(redo) = &mut self.redo
            && redo.follows_stack()
            && let How::Immediate { moved, .. } = &mut redo.how
        {
            *moved += by;
        }
    }

    /// How the flags that `insn` leaves can be made again, if all live ones are its own.
    fn redo_of(&mut self, insn: &Insn) -> Option<Redo> {
        let instruction = &insn.instruction;
        let (_, written) = classify::flags(instruction);
        if insn.live_out == 0 || insn.live_out & !written != 0 || !matches!(insn.kind, Kind::Copy | Kind::Memory) {
            return None;
        }
        let register = |i: u32| {
            let register = instruction.op_register(i);
            let index = register.full_register() as usize - Register::RAX as usize;
            let host = host_register(index)?;
            Some((host, register.size() == 8, 1u16 << index))
        };
        let is_register = |i: u32| {
            instruction.op_kind(i) == OpKind::Register
                && (instruction.op_register(i).is_gpr32() || instruction.op_register(i).is_gpr64())
        };
        let same = is_register(0) && is_register(1) && instruction.op0_register() == instruction.op1_register();
        match instruction.mnemonic() {
            M::Cmp | M::Test => self.again(insn),
            M::And | M::Or | M::Xor if is_register(0) => {
                let (result, wide, needs) = register(0)?;
                Some(Redo { how: How::Logic { result, wide }, needs })
            }
            M::Sub if same => {
                let (result, wide, needs) = register(0)?;
                Some(Redo { how: How::Zero { result, wide }, needs })
            }
            mnemonic @ (M::Add | M::Sub) if is_register(0) && !same => {
                let (result, wide, needs) = register(0)?;
                let adds = mnemonic == M::Add;
                if is_register(1) {
                    let (other, _, other_needs) = register(1)?;
                    let how = How::Registers { adds, result, other, wide };
                    return Some(Redo { how, needs: needs | other_needs });
                }
                if matches!(instruction.op1_kind(), OpKind::Register | OpKind::Memory) {
                    return None;
                }
                let value = instruction.immediate(1) as i32;
                // Leaves room for what pushes and pops add.
                let near = value.unsigned_abs() < 1 << 30;
                near.then_some(Redo { how: How::Immediate { adds, result, wide, value, moved: 0 }, needs })
            }
            _ => None,
        }
    }

    /// `insn` itself, if it reads registers that have host registers and nothing else.
    fn again(&mut self, insn: &Insn) -> Option<Redo> {
        let instruction = &insn.instruction;
        let mut needs = 0;
        for i in 0..instruction.op_count() {
            match instruction.op_kind(i) {
                OpKind::Register if instruction.op_register(i).is_gpr() => {
                    let index = instruction.op_register(i).full_register() as usize - Register::RAX as usize;
                    host_register(index)?;
                    needs |= 1 << index;
                }
                OpKind::Register | OpKind::Memory => return None,
                _ => {}
            }
        }
        let plan = self.plan(insn, None)?;
        plan.widen.is_none().then_some(Redo { how: How::Again(*insn), needs })
    }

    /// Puts flags that have been destroyed in place; for where the scratch registers may hold something.
    pub(super) fn settle(&mut self) {
        if !self.destroyed {
            return;
        }
        let needs_scratch = self.redo.as_ref().is_some_and(Redo::needs_scratch);
        let which = usize::from(self.held[0].is_some() || self.deltas[0].is_some());
        let scratch = [RSI, RDI][which];
        if needs_scratch {
            self.write_back(which);
            self.held[which] = None;
            self.clobber(scratch);
        }
        self.settle_with(scratch);
    }

    /// Puts flags that have been destroyed in place, using `scratch` if need be.
    pub(super) fn settle_with(&mut self, scratch: u8) {
        if std::mem::take(&mut self.destroyed) {
            let redo = self.redo.expect("flags are destroyed only if they can be made again");
            self.emit_redo(&redo, scratch);
        }
    }

    /// Makes the flags again, in the middle of a miss: RSI and RDI are kept.
    pub(super) fn redo_at_miss(&mut self, redo: &Redo) {
        self.a.store(scratch(SAVED_RSI), RSI);
        self.emit_redo(redo, RSI);
        self.a.load(RSI, scratch(SAVED_RSI));
    }

    pub(super) fn emit_redo(&mut self, redo: &Redo, scratch: u8) {
        let lea = |a: &mut Assembler, wide: bool, rm: Rm| if wide { a.lea(scratch, rm) } else { a.lea32(scratch, rm) };
        let alu = |a: &mut Assembler, op: Alu, wide: bool, reg: u8, other: u8| {
            if wide { a.alu(op, reg, Rm::Reg(other)) } else { a.alu32(op, reg, Rm::Reg(other)) }
        };
        match redo.how {
            How::Again(insn) => {
                let plan = self.plan(&insn, None).expect("it was planned before");
                plan.layout.emit(&mut self.a, &plan.fields, plan.rm, plan.force_rex);
            }
            How::Logic { result, wide } => self.a.test(wide, result, result),
            How::Zero { result, wide } => alu(&mut self.a, Alu::Cmp, wide, result, result),
            How::Immediate { adds, result, wide, value, moved } => {
                let back = -moved + if adds { -value } else { value };
                lea(&mut self.a, wide, Rm::Base(result, back));
                self.a.alu_imm(if adds { Alu::Add } else { Alu::Cmp }, wide, Rm::Reg(scratch), value);
            }
            How::Registers { adds: true, result, other, wide } => {
                self.a.mov(scratch, result);
                alu(&mut self.a, Alu::Sub, wide, scratch, other);
                alu(&mut self.a, Alu::Add, wide, scratch, other);
            }
            How::Registers { adds: false, result, other, wide } => {
                lea(&mut self.a, wide, Rm::Indexed { base: result, index: other, scale: 0, displacement: 0 });
                alu(&mut self.a, Alu::Cmp, wide, scratch, other);
            }
        }
    }
}
