//! Near control transfers, and the stack instructions that procedures use (SDM vol. 1 6.4).

use super::Exec;
use super::alu::mask;
use super::general::branch_size;
use super::memory::{self, is_canonical};
use crate::mmu::Rights;
use crate::vendor;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::gpr::{RBP, RCX, RSP};
use anyvisor_x86::bits::rflags::ZF;
use anyvisor_x86::segment::index;
use iced_x86::{Mnemonic as M, OpKind};

type Outcome = Result<(), Exception>;

impl Exec<'_> {
    /// Executes a near transfer or a stack instruction; `false` if the instruction is neither.
    pub(super) fn control_transfer(&mut self) -> Result<bool, Exception> {
        match self.insn.mnemonic() {
            M::Jmp => {
                let target = self.near_target()?;
                self.jump(target)?;
            }
            M::Call => self.call()?,
            M::Ret => self.ret()?,
            M::Push => self.push_operand()?,
            M::Pop => self.pop_operand()?,
            M::Leave => self.leave()?,
            M::Enter => self.enter()?,
            M::Pusha | M::Pushad => self.push_all()?,
            M::Popa | M::Popad => self.pop_all()?,
            M::Loop => self.count_and_jump(|_| true)?,
            M::Loope => self.count_and_jump(|flags| flags & ZF != 0)?,
            M::Loopne => self.count_and_jump(|flags| flags & ZF == 0)?,
            M::Jcxz => self.jump_if_zero(2)?,
            M::Jecxz => self.jump_if_zero(4)?,
            M::Jrcxz => self.jump_if_zero(8)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Checks a target in the current code segment.
    fn check_target(&self, target: u64) -> Outcome {
        let good =
            if self.long { is_canonical(target) } else { target <= u64::from(self.core.cpu.seg[index::CS].limit) };
        if good { Ok(()) } else { Err(Exception::gp(0)) }
    }

    /// Sets RIP after the checks of a near transfer.
    pub(super) fn jump(&mut self, target: u64) -> Outcome {
        self.check_target(target)?;
        self.core.cpu.rip = target;
        Ok(())
    }

    fn near_target(&mut self) -> Result<u64, Exception> {
        match self.insn.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Ok(self.insn.near_branch_target()),
            _ => self.read(0, branch_size(self.insn)),
        }
    }

    fn call(&mut self) -> Outcome {
        let size = branch_size(self.insn);
        let target = self.near_target()?;
        let next = self.core.cpu.rip;
        let rsp = memory::moved_stack_pointer(&self.core.cpu, -i64::from(size));
        // Intel's write the return address before they check the target; AMD's only see that they can.
        if vendor::is_amd() {
            let address = memory::stack_address(self.core, rsp, size, true)?;
            self.core.probe_write(address, size as usize, Rights::Current)?;
            self.check_target(target)?;
        }
        self.store_on_stack(rsp, size, next)?;
        self.jump(target)?;
        self.core.cpu.gpr[RSP] = rsp;
        Ok(())
    }

    fn ret(&mut self) -> Outcome {
        let size = branch_size(self.insn);
        let target = memory::peek(self.core, self.io, 0, size)?;
        self.jump(target)?;
        let extra = if self.insn.op_count() == 1 { self.insn.immediate16() } else { 0 };
        self.core.cpu.gpr[RSP] = memory::moved_stack_pointer(&self.core.cpu, i64::from(size) + i64::from(extra));
        Ok(())
    }

    fn leave(&mut self) -> Outcome {
        let size = self.stack_operand_size();
        let stack = self.core.cpu.stack_bits() / 8;
        let frame = self.gpr(RBP, stack);
        let address = memory::stack_address(self.core, frame, size, false)?;
        let value = memory::load(self.core, self.io, address, size)?;
        self.set_gpr(RSP, stack, frame.wrapping_add(u64::from(size)));
        self.set_gpr(RBP, size, value);
        Ok(())
    }

    /// Operand size of LEAVE and ENTER from their code.
    fn stack_operand_size(&self) -> u32 {
        use iced_x86::Code;
        match self.insn.code() {
            Code::Leavew | Code::Enterw_imm16_imm8 => 2,
            Code::Leaved | Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        }
    }

    /// ENTER (SDM vol. 2A): registers are written at the end only, so that a fault leaves them alone.
    fn enter(&mut self) -> Outcome {
        let size = self.stack_operand_size();
        let stack = self.core.cpu.stack_bits() / 8;
        let level = u64::from(self.insn.immediate8_2nd() & 31);
        let old_rbp = self.core.cpu.gpr[RBP];
        let mut rsp = memory::moved_stack_pointer(&self.core.cpu, -i64::from(size));
        let frame = rsp;
        self.store_on_stack(rsp, size, old_rbp & mask(size))?;
        let step = u64::from(size);
        for n in 1..=level {
            rsp = rsp.wrapping_sub(step);
            let value = if n == level {
                frame
            } else {
                let from = (old_rbp & mask(stack)).wrapping_sub(n * step);
                let address = memory::stack_address(self.core, from, size, false)?;
                memory::load(self.core, self.io, address, size)?
            };
            self.store_on_stack(rsp, size, value & mask(size))?;
        }
        rsp = rsp.wrapping_sub(u64::from(self.insn.immediate16()));
        // A push there must be possible.
        let address = memory::stack_address(self.core, rsp, size, true)?;
        self.core.probe_write(address, size as usize, Rights::Current)?;
        self.set_gpr(RBP, size, frame);
        self.set_gpr(RSP, stack, rsp);
        Ok(())
    }

    fn store_on_stack(&mut self, rsp: u64, size: u32, value: u64) -> Outcome {
        let address = memory::stack_address(self.core, rsp, size, true)?;
        memory::store(self.core, self.io, address, size, value)
    }

    fn push_all(&mut self) -> Outcome {
        let size = if self.insn.mnemonic() == M::Pusha { 2 } else { 4 };
        let old = self.core.cpu.gpr[RSP];
        for n in 0..8 {
            let rsp = memory::moved_stack_pointer(&self.core.cpu, -i64::from(size * (n as u32 + 1)));
            let value = if n == RSP { old } else { self.core.cpu.gpr[n] };
            self.store_on_stack(rsp, size, value & mask(size))?;
        }
        self.core.cpu.gpr[RSP] = memory::moved_stack_pointer(&self.core.cpu, -i64::from(8 * size));
        Ok(())
    }

    fn pop_all(&mut self) -> Outcome {
        let size = if self.insn.mnemonic() == M::Popa { 2 } else { 4 };
        let mut values = [0; 8];
        for (n, value) in values.iter_mut().enumerate() {
            *value = memory::peek(self.core, self.io, n as u32 * size, size)?;
        }
        self.core.cpu.gpr[RSP] = memory::moved_stack_pointer(&self.core.cpu, i64::from(8 * size));
        for (n, value) in values.iter().rev().enumerate() {
            if n != RSP {
                self.set_gpr(n, size, *value);
            }
        }
        Ok(())
    }

    /// The width of the count register of LOOPcc, in bytes: the address size.
    fn loop_count_size(&self) -> u32 {
        use iced_x86::Code::*;
        match self.insn.code() {
            Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
            | Loopne_rel8_32_CX => 2,
            Loop_rel8_64_RCX | Loop_rel8_16_RCX | Loope_rel8_64_RCX | Loope_rel8_16_RCX | Loopne_rel8_64_RCX
            | Loopne_rel8_16_RCX => 8,
            _ => 4,
        }
    }

    fn count_and_jump(&mut self, condition: impl Fn(u64) -> bool) -> Outcome {
        let size = self.loop_count_size();
        let count = self.gpr(RCX, size).wrapping_sub(1) & mask(size);
        if count != 0 && condition(self.flags()) {
            self.jump(self.insn.near_branch_target())?;
        }
        self.set_gpr(RCX, size, count);
        Ok(())
    }

    fn jump_if_zero(&mut self, size: u32) -> Outcome {
        if self.gpr(RCX, size) == 0 {
            self.jump(self.insn.near_branch_target())?;
        }
        Ok(())
    }
}
