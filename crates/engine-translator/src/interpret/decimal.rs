//! Decimal adjustment (SDM vol. 1 7.3.3), which 64-bit mode does not have.

use super::Exec;
use super::alu::result_flags;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::gpr::RAX;
use anyvisor_x86::bits::rflags::{AF, CF};
use iced_x86::Mnemonic as M;

impl Exec<'_> {
    /// Executes AAA, AAD, AAM, AAS, DAA or DAS; `false` if the instruction is none of them.
    pub(super) fn decimal_instruction(&mut self) -> Result<bool, Exception> {
        match self.insn.mnemonic() {
            M::Aaa => self.ascii_adjust(false),
            M::Aas => self.ascii_adjust(true),
            M::Daa => self.decimal_adjust(false),
            M::Das => self.decimal_adjust(true),
            M::Aam => {
                let (al, base) = (self.gpr(RAX, 1), u64::from(self.insn.immediate8()));
                if base == 0 {
                    return Err(Exception::de());
                }
                self.set_gpr(RAX, 2, ((al / base) << 8) | (al % base));
                self.set_status(result_flags(1, al % base));
            }
            M::Aad => {
                let (ax, base) = (self.gpr(RAX, 2), u64::from(self.insn.immediate8()));
                let al = (ax & 0xff).wrapping_add((ax >> 8) * base) & 0xff;
                self.set_gpr(RAX, 2, al);
                self.set_status(result_flags(1, al));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// AAA and AAS.
    fn ascii_adjust(&mut self, subtract: bool) {
        let ax = self.gpr(RAX, 2);
        let adjust = ax & 0xf > 9 || self.flag(AF);
        let adjusted = match (adjust, subtract) {
            (false, _) => ax,
            (true, false) => ax.wrapping_add(0x106),
            (true, true) => ax.wrapping_sub(0x106),
        };
        self.set_gpr(RAX, 2, adjusted & 0xff0f);
        let flags = if adjust { AF | CF } else { 0 };
        self.set_status(result_flags(1, adjusted & 0xf) | flags);
    }

    /// DAA and DAS.
    fn decimal_adjust(&mut self, subtract: bool) {
        let (old, carry) = (self.gpr(RAX, 1), self.flag(CF));
        let (mut al, mut flags) = (old, 0);
        let apply = |al: u64, by: u64| if subtract { al.wrapping_sub(by) } else { al + by };
        if old & 0xf > 9 || self.flag(AF) {
            al = apply(al, 6);
            flags |= AF;
            if carry || al > 0xff {
                flags |= CF;
            }
        }
        if old > 0x99 || carry {
            al = apply(al, 0x60);
            flags |= CF;
        }
        self.set_gpr(RAX, 1, al);
        self.set_status(result_flags(1, al) | flags);
    }
}
