//! Bit test, bit scan, and the BMI1, BMI2 and ADX extensions.

use super::Exec;
use super::alu::{self, mask, result_flags, sign_extend};
use super::general::require;
use super::memory::{self, check_alignment, linear};
use crate::cpu::Mode;
use crate::native::has_feature;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::gpr::RDX;
use anyvisor_x86::bits::rflags::{AF, CF, OF, PF, SF, ZF};
use iced_x86::{CpuidFeature, Mnemonic as M, OpKind};

type Outcome = Result<(), Exception>;

impl Exec<'_> {
    /// Executes a bit instruction; `false` if it is none.
    pub(super) fn bit_instruction(&mut self) -> Result<bool, Exception> {
        match self.insn.mnemonic() {
            M::Bt => self.bit_test(None)?,
            M::Bts => self.bit_test(Some(|value, bit| value | bit))?,
            M::Btr => self.bit_test(Some(|value, bit| value & !bit))?,
            M::Btc => self.bit_test(Some(|value, bit| value ^ bit))?,
            M::Bsf => self.bit_scan(false)?,
            M::Bsr => self.bit_scan(true)?,
            // Without the feature the prefix means nothing and they are BSF and BSR.
            M::Tzcnt if has_feature(&self.core.cpuid, CpuidFeature::BMI1) => self.count_zeros(false)?,
            M::Tzcnt => self.bit_scan(false)?,
            M::Lzcnt if has_feature(&self.core.cpuid, CpuidFeature::LZCNT) => self.count_zeros(true)?,
            M::Lzcnt => self.bit_scan(true)?,
            M::Popcnt => self.population_count()?,
            M::Adcx => self.add_with(CF)?,
            M::Adox => self.add_with(OF)?,
            M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi => self.bit_manipulation()?,
            M::Mulx | M::Pdep | M::Pext | M::Rorx | M::Sarx | M::Shlx | M::Shrx => self.flagless()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// VEX-encoded instructions exist in protected mode only, and if the CPU model has them.
    fn require_vex(&self) -> Outcome {
        if self.core.cpu.mode() == Mode::Real { Err(Exception::ud()) } else { require(self) }
    }

    /// BT and, with a change, BTS, BTR, BTC. A register bit offset reaches beyond the memory operand.
    fn bit_test(&mut self, change: Option<fn(u64, u64) -> u64>) -> Outcome {
        let size = self.operand_size(0);
        let offset = self.read(1, size)?;
        let bit = 1u64 << (offset & u64::from(8 * size - 1));
        let mut old = 0;
        if !self.is_memory(0) {
            old = self.read(0, size)?;
            if let Some(change) = change {
                self.write(0, size, change(old, bit))?;
            }
        } else {
            let mut address = memory::effective_address(&self.core.cpu, self.insn);
            if self.insn.op1_kind() == OpKind::Register {
                let elements = sign_extend(size, offset) >> (8 * size).trailing_zeros();
                address = address.wrapping_add_signed(elements * i64::from(size));
                address &= memory::address_mask(self.insn);
            }
            let segment = memory::operand_segment(&self.core.cpu, self.insn);
            let address = linear(self.core, segment, address, u64::from(size), change.is_some())?;
            check_alignment(self.core, address, u64::from(size))?;
            match change {
                None => old = memory::load(self.core, self.io, address, size)?,
                Some(change) => self.update_memory(address, size, self.insn.has_lock_prefix(), |value| {
                    old = value;
                    change(value, bit)
                })?,
            }
        }
        self.set_flags(CF, if old & bit != 0 { CF } else { 0 });
        Ok(())
    }

    /// BSF and BSR; PF, undefined, is the result's. A zero source leaves the destination alone (documented by AMD,
    /// relied upon everywhere).
    fn bit_scan(&mut self, from_top: bool) -> Outcome {
        let size = self.operand_size(0);
        let source = self.read(1, size)?;
        if source == 0 {
            self.set_status(result_flags(size, 0));
            return Ok(());
        }
        let position = if from_top { 63 - source.leading_zeros() } else { source.trailing_zeros() };
        self.write(0, size, u64::from(position))?;
        self.set_status(result_flags(size, u64::from(position)) & PF);
        Ok(())
    }

    fn count_zeros(&mut self, leading: bool) -> Outcome {
        let size = self.operand_size(0);
        let source = self.read(1, size)?;
        let bits = u64::from(8 * size);
        let count = if leading {
            u64::from(source.leading_zeros()) - (64 - bits)
        } else {
            u64::from(source.trailing_zeros()).min(bits)
        };
        self.write(0, size, count)?;
        let flags = if source == 0 { CF } else { 0 } | if count == 0 { ZF } else { 0 };
        self.set_status(flags);
        Ok(())
    }

    fn population_count(&mut self) -> Outcome {
        require(self)?;
        let size = self.operand_size(0);
        let source = self.read(1, size)?;
        self.write(0, size, u64::from(source.count_ones()))?;
        self.set_status(if source == 0 { ZF } else { 0 });
        Ok(())
    }

    /// ADCX and ADOX: addition whose carry goes through one flag and touches no other.
    fn add_with(&mut self, flag: u64) -> Outcome {
        require(self)?;
        let size = self.operand_size(0);
        let (a, b) = (self.read(0, size)?, self.read(1, size)?);
        let (sum, flags) = alu::add(size, a, b, self.flag(flag));
        self.write(0, size, sum)?;
        self.set_flags(flag, if flags & CF != 0 { flag } else { 0 });
        Ok(())
    }

    /// The BMI instructions that write flags.
    fn bit_manipulation(&mut self) -> Outcome {
        self.require_vex()?;
        let size = self.operand_size(0);
        let bits = u64::from(8 * size);
        let a = self.read(1, size)?;
        let (r, carry) = match self.insn.mnemonic() {
            M::Andn => (!a & self.read(2, size)?, false),
            M::Blsi => (a & a.wrapping_neg(), a != 0),
            M::Blsmsk => (a ^ a.wrapping_sub(1), a == 0),
            M::Blsr => (a & a.wrapping_sub(1), a == 0),
            M::Bextr => {
                let control = self.read(2, size)?;
                let (start, length) = (control & 0xff, control >> 8 & 0xff);
                let shifted = if start < 64 { a >> start } else { 0 };
                (if length < 64 { shifted & ((1 << length) - 1) } else { shifted }, false)
            }
            _ => {
                let index = self.read(2, size)? & 0xff;
                (if index < bits { a & ((1 << index) - 1) } else { a }, index > bits - 1)
            }
        };
        let r = r & mask(size);
        self.write(0, size, r)?;
        let carry = if carry { CF } else { 0 };
        self.set_flags(SF | ZF | CF | OF | AF | PF, result_flags(size, r) & !PF | carry);
        Ok(())
    }

    /// The BMI2 instructions that leave the flags alone.
    fn flagless(&mut self) -> Outcome {
        self.require_vex()?;
        let size = self.operand_size(0);
        let a = self.read(1, size)?;
        let bits = u64::from(8 * size);
        let r = match self.insn.mnemonic() {
            M::Mulx => {
                let b = self.read(2, size)?;
                let (low, high, _) = alu::multiply(size, self.gpr(RDX, size), b, false);
                // With the same register twice it gets the high half (SDM vol. 2B, MULX).
                self.write(1, size, low)?;
                return self.write(0, size, high);
            }
            M::Pdep => alu::deposit(a, self.read(2, size)?),
            M::Pext => alu::extract(a, self.read(2, size)?),
            M::Rorx => {
                let by = u64::from(self.insn.immediate8()) & (bits - 1);
                if by == 0 { a } else { a >> by | a << (bits - by) }
            }
            other => {
                let by = self.read(2, size)? & (bits - 1);
                match other {
                    M::Sarx => (sign_extend(size, a) >> by) as u64,
                    M::Shlx => a << by,
                    _ => a >> by,
                }
            }
        };
        self.write(0, size, r & mask(size))
    }
}
