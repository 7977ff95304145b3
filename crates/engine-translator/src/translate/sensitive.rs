//! Sensitive instructions that kernels execute so often that leaving for the interpreter would show.
//!
//! Each is the common case only; what is not common (a fault, a flag that changes how code is translated,
//! an interrupt that waits for the window this instruction opens) leaves for the interpreter before
//! anything is committed. RFLAGS bits other than the status flags live in [`Cpu::rflags`].

use super::assembler::*;
use super::block::*;
use super::classify::Kind;
use crate::cpu::{Cpu, JumpContext};
use anyvisor_x86::bits::{gpr, rflags};
use anyvisor_x86::segment::{Segment, attr, index};
use iced_x86::Mnemonic as M;
use std::mem::offset_of;

const STATUS: i32 = rflags::STATUS as i32;

fn field(offset: usize) -> Rm {
    Rm::Gs(offset as i32)
}

fn rflags_field() -> Rm {
    field(offset_of!(Cpu, rflags))
}

fn segment_field(segment: usize, offset: usize) -> Rm {
    field(offset_of!(Cpu, seg) + segment * size_of::<Segment>() + offset)
}

fn base_of(segment: usize) -> Rm {
    segment_field(segment, offset_of!(Segment, base))
}

/// Whether `mnemonic` is translated here when executed in `context`.
pub fn kind(mnemonic: M, context: &Context) -> Option<Kind> {
    let kernel = context.jumps.is_kernel();
    let known = match mnemonic {
        M::Cld | M::Pause => true,
        M::Cli | M::Sti | M::Stac | M::Clac => kernel,
        M::Swapgs | M::Sysretq | M::Popfq => kernel && context.bits() == 64,
        M::Popfd => kernel && context.bits() == 32,
        M::Iretq => context.jumps == JumpContext::Kernel,
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => context.bits() == 64 && context.fsgsbase,
        M::Syscall => context.jumps == JumpContext::User,
        M::Pushfq => context.bits() == 64,
        M::Pushfd => context.bits() == 32,
        _ => false,
    };
    known.then_some(Kind::Sensitive)
}

impl Builder<'_> {
    pub(super) fn sensitive(&mut self, insn: &Insn) -> bool {
        match insn.instruction.mnemonic() {
            M::Cld => {} // blocks are made for DF = 0
            M::Cli => self.with_flags(insn.live_out != 0, |b| {
                b.a.alu_imm(Alu::And, false, rflags_field(), !(rflags::IF as i32));
            }),
            M::Sti => self.sti(insn),
            M::Pause => self.pause(insn),
            M::Swapgs => {
                let other = field(offset_of!(Cpu, kernel_gs_base));
                self.a.load(RSI, base_of(index::GS));
                self.a.load(RDI, other);
                self.a.store(base_of(index::GS), RDI);
                self.a.store(other, RSI);
            }
            M::Stac | M::Clac => return self.set_ac(insn),
            M::Pushfq | M::Pushfd => self.pushf(insn),
            M::Popfq | M::Popfd => self.popf(insn),
            M::Iretq => self.iretq(insn),
            M::Rdfsbase => self.read_base(insn, index::FS),
            M::Rdgsbase => self.read_base(insn, index::GS),
            M::Wrfsbase => self.write_base(insn, index::FS),
            M::Wrgsbase => self.write_base(insn, index::GS),
            M::Syscall => self.syscall(insn),
            M::Sysretq => self.sysret(insn),
            _ => return false,
        }
        true
    }

    /// Emits code that destroys the status flags, keeping them in AX meanwhile if they are alive.
    pub(super) fn with_flags(&mut self, live: bool, code: impl FnOnce(&mut Self)) {
        if live {
            self.a.mov(RSI, RAX);
            self.a.lahf();
            self.a.bytes(&[0x0f, 0x90, 0xc0]); // seto al
        }
        code(self);
        if live {
            self.a.bytes(&[0x04, 0x7f]); // add al, 0x7f
            self.a.sahf();
            self.a.mov(RAX, RSI);
        }
    }

    /// Leaves for the interpreter if `condition` holds.
    fn interpret_if(&mut self, condition: u8, insn: &Insn) {
        let hole = self.a.jcc(condition);
        self.exits.push(PendingExit::new(hole, ExitKind::Interpret { rip: insn.instruction.ip() }));
    }

    fn sti(&mut self, insn: &Insn) {
        let rip = insn.instruction.ip();
        let waiting = field(offset_of!(Cpu, irq_waiting));
        self.a.mov(RSI, RCX);
        self.a.load32(RCX, waiting);
        let none = self.a.short(0xe3);
        self.a.mov(RCX, RSI);
        let hole = self.a.jmp();
        self.exits.push(PendingExit::new(hole, ExitKind::Interpret { rip }));
        self.a.bind_short(none);
        self.a.mov(RCX, RSI);
        self.with_flags(insn.live_out != 0, |b| {
            b.a.alu_imm(Alu::Or, false, rflags_field(), rflags::IF as i32);
        });
    }

    /// Counts, without touching flags, and leaves for the interpreter where others are to run.
    fn pause(&mut self, insn: &Insn) {
        let pauses = field(offset_of!(Cpu, pauses));
        self.a.bytes(&[0xf3, 0x90]);
        self.a.mov(RSI, RCX);
        self.a.load32(RCX, pauses);
        self.a.lea32(RCX, Rm::Base(RCX, -1));
        let last = self.a.short(0xe3); // jrcxz
        self.a.store32(pauses, RCX);
        self.a.mov(RCX, RSI);
        let over = self.a.short(0xeb); // jmp
        self.a.bind_short(last);
        self.a.mov(RCX, RSI);
        let hole = self.a.jmp();
        self.exits.push(PendingExit::new(hole, ExitKind::Interpret { rip: insn.instruction.ip() }));
        self.a.bind_short(over);
    }

    /// STAC and CLAC end the block: the code after them uses another TLB.
    fn set_ac(&mut self, insn: &Insn) -> bool {
        if !self.source.context.smap {
            return false;
        }
        let on = insn.instruction.mnemonic() == M::Stac;
        self.with_flags(true, |b| {
            if on {
                b.a.alu_imm(Alu::Or, false, rflags_field(), rflags::AC as i32);
            } else {
                b.a.alu_imm(Alu::And, false, rflags_field(), !(rflags::AC as i32));
            }
        });
        let table = match (self.bits(), on) {
            (64, true) => JumpContext::KernelAc,
            (64, false) => JumpContext::Kernel,
            (_, true) => JumpContext::KernelAc32,
            (_, false) => JumpContext::Kernel32,
        };
        self.far_in(table, insn.instruction.next_ip(), true);
        true
    }

    fn pushf(&mut self, insn: &Insn) {
        let word = self.word();
        let rm = self.access(&self.stack(-word), word as usize, true, true, true);
        self.a.pushfq();
        self.a.load(RDI, rflags_field());
        self.a.alu_imm(Alu::And, true, Rm::Reg(RDI), !(STATUS | (rflags::RF | rflags::VM) as i32));
        self.a.alu_imm(Alu::And, false, Rm::Base(RSP, 0), STATUS);
        self.a.alu(Alu::Or, RDI, Rm::Base(RSP, 0));
        self.store_word(rm, RDI);
        if insn.live_out != 0 {
            self.a.popfq();
        } else {
            self.a.lea(RSP, Rm::Base(RSP, 8));
        }
        self.adjust_stack(-word as i32);
    }

    fn popf(&mut self, insn: &Insn) {
        let word = self.word();
        let rm = self.access(&self.stack(0), word as usize, false, false, false);
        self.load_word(RDI, rm);
        self.check_rflags(insn);
        self.load_rflags();
        self.adjust_stack(word as i32);
    }

    /// To the same privilege level, code and stack segment, whose hidden parts stay as they are.
    fn iretq(&mut self, insn: &Insn) {
        let rm = self.access(&self.stack(0), 40, false, false, false);
        self.a.lea(RSI, rm);
        self.a.store(scratch(VALUE), RSI);
        self.a.test8(field(offset_of!(Cpu, nmi_blocked)), 0xff);
        self.interpret_if(cc::NE, insn);
        for (segment, offset) in [(index::CS, 8), (index::SS, 32)] {
            self.a.load_sized(1, RDI, segment_field(segment, offset_of!(Segment, selector)));
            self.a.alu(Alu::Sub, RDI, Rm::Base(RSI, offset));
            self.interpret_if(cc::NE, insn);
        }
        self.a.load(RDI, Rm::Base(RSI, 16));
        self.a.alu_imm(Alu::And, true, Rm::Reg(RDI), !(rflags::RF as i32));
        self.check_rflags(insn);
        self.load_rflags();
        self.a.load(RSI, scratch(VALUE));
        self.a.load(GUEST_RSP, Rm::Base(RSI, 24));
        self.a.load(RSI, Rm::Base(RSI, 0));
        self.origin = (insn.instruction.ip(), 0);
        self.indirect_in(JumpContext::Kernel, None, true);
    }

    fn read_base(&mut self, insn: &Insn, segment: usize) {
        let register = insn.instruction.op0_register();
        let number = register.full_register() as usize - iced_x86::Register::RAX as usize;
        if register.size() == 4 {
            self.a.load32(RSI, base_of(segment));
        } else {
            self.a.load(RSI, base_of(segment));
        }
        match host_register(number) {
            Some(host) => self.a.mov(host, RSI),
            None => self.a.store(slot(number), RSI),
        }
    }

    fn write_base(&mut self, insn: &Insn, segment: usize) {
        let register = insn.instruction.op0_register();
        let number = register.full_register() as usize - iced_x86::Register::RAX as usize;
        let rm = host_register(number).map_or(slot(number), Rm::Reg);
        if register.size() == 4 {
            self.a.load32(RDI, rm);
        } else {
            self.a.load(RDI, rm);
            // Only user addresses here: bits 63:47 zero. Others, canonical or not, are interpreted.
            let live = insn.live_in != 0;
            if live {
                self.a.mov(RSI, RAX);
                self.a.lahf();
                self.a.bytes(&[0x0f, 0x90, 0xc0]); // seto al
                self.a.store(scratch(VALUE), RSI);
            }
            self.a.mov(RSI, RDI);
            self.a.shr64(RSI, 47);
            let odd = self.a.jcc(cc::NE);
            if live {
                self.a.bytes(&[0x04, 0x7f]); // add al, 0x7f
                self.a.sahf();
                self.a.load(RAX, scratch(VALUE));
            }
            self.odd_bases.push(OddBase { hole: odd, live, rip: insn.instruction.ip() });
        }
        self.a.store(base_of(segment), RDI);
    }

    /// Leaves for the interpreter unless loading RFLAGS from RDI changes only IF and the status flags, and
    /// opens no window that an interrupt waits for. Uses RSI; flags are dead.
    fn check_rflags(&mut self, insn: &Insn) {
        let free = STATUS | (rflags::IF | rflags::FIXED) as i32;
        self.a.load(RSI, rflags_field());
        self.a.alu(Alu::Xor, RSI, Rm::Reg(RDI));
        self.a.alu_imm(Alu::And, false, Rm::Reg(RSI), !free);
        self.interpret_if(cc::NE, insn);
        // (flags >> 9 & 1) & waiting
        self.a.mov32(RSI, RDI);
        self.a.shr32(RSI, 9);
        self.a.alu32(Alu::And, RSI, field(offset_of!(Cpu, irq_waiting)));
        self.a.alu_imm(Alu::And, false, Rm::Reg(RSI), 1);
        self.interpret_if(cc::NE, insn);
    }

    /// Loads RFLAGS from RDI, which `check_rflags` has passed.
    fn load_rflags(&mut self) {
        self.a.mov(RSI, RDI);
        self.a.alu_imm(Alu::Or, true, Rm::Reg(RSI), rflags::FIXED as i32);
        self.a.store(rflags_field(), RSI);
        self.a.alu_imm(Alu::And, false, Rm::Reg(RDI), STATUS);
        self.a.push(RDI);
        self.a.popfq();
    }

    /// Loads CS and SS as SYSCALL and SYSRET do; SI is CS's selector. Flags are dead.
    fn flat_segments(&mut self, dpl: u32) {
        let common = attr::S | attr::P | attr::G | dpl << attr::DPL_SHIFT | attr::WRITABLE | attr::ACCESSED;
        for (segment, attributes) in [(index::CS, common | attr::CODE | attr::L), (index::SS, common | attr::DB)] {
            self.a.store_imm32(segment_field(segment, offset_of!(Segment, base)), 0);
            self.a.store32_imm(segment_field(segment, offset_of!(Segment, limit)), u32::MAX);
            self.a.store32_imm(segment_field(segment, offset_of!(Segment, attributes)), attributes);
        }
        let selector = |segment| segment_field(segment, offset_of!(Segment, selector));
        self.a.store16(selector(index::CS), RSI);
        // SS is the next descriptor after SYSCALL, the one before after SYSRET.
        self.a.alu_imm(if dpl == 0 { Alu::Add } else { Alu::Sub }, false, Rm::Reg(RSI), 8);
        self.a.store16(selector(index::SS), RSI);
        self.a.store8(field(offset_of!(Cpu, cpl)), dpl as u8);
    }

    /// With EFER.SCE set and SFMASK clearing AC, TF and DF, so that the kernel's own context follows.
    fn syscall(&mut self, insn: &Insn) {
        self.a.pushfq();
        self.a.pop(RDI);
        // The exit stub needs the flags back: they are still unchanged after the push and pop.
        self.a.store(scratch(VALUE), RDI);
        let needed = (rflags::AC | rflags::TF | rflags::DF | rflags::NT) as i32 | STATUS;
        self.a.load32(RSI, field(offset_of!(Cpu, sfmask)));
        self.a.not32(RSI);
        self.a.alu_imm(Alu::And, false, Rm::Reg(RSI), needed);
        let odd = self.a.jcc(cc::NE);
        self.a.load32(RSI, field(offset_of!(Cpu, efer)));
        self.a.not32(RSI);
        self.a.alu_imm(Alu::And, false, Rm::Reg(RSI), anyvisor_x86::bits::efer::SCE as i32);
        let disabled = self.a.jcc(cc::NE);
        self.syscalls.push(OddSyscall { holes: [odd, disabled], rip: insn.instruction.ip() });
        self.absolute(RCX, insn.instruction.next_ip());
        self.a.alu_imm(Alu::And, false, Rm::Reg(RDI), STATUS);
        self.a.load(RSI, rflags_field());
        self.a.alu_imm(Alu::And, true, Rm::Reg(RSI), !(STATUS | rflags::RF as i32));
        self.a.alu(Alu::Or, RSI, Rm::Reg(RDI));
        self.a.store(slot(gpr::R11), RSI);
        self.a.load(RDI, field(offset_of!(Cpu, sfmask)));
        self.a.not64(RDI);
        self.a.alu(Alu::And, RDI, Rm::Reg(RSI));
        self.a.alu_imm(Alu::Or, true, Rm::Reg(RDI), rflags::FIXED as i32);
        self.a.store(rflags_field(), RDI);
        self.a.load32(RSI, field(offset_of!(Cpu, star) + 4));
        self.a.alu_imm(Alu::And, false, Rm::Reg(RSI), 0xfffc);
        self.flat_segments(0);
        // SFMASK clears all status flags: so does this sum.
        self.a.mov_imm(RSI, 0);
        self.a.alu_imm(Alu::Add, false, Rm::Reg(RSI), 1);
        self.a.load(RSI, field(offset_of!(Cpu, lstar)));
        self.origin = (insn.instruction.ip(), 0);
        self.indirect_in(JumpContext::Kernel, None, true);
    }

    /// Out of line: give the flags back and interpret.
    pub(super) fn odd_syscalls(&mut self) {
        for syscall in std::mem::take(&mut self.syscalls) {
            for hole in syscall.holes {
                self.a.bind(hole);
            }
            self.a.push_rm(scratch(VALUE));
            self.a.popfq();
            let hole = self.a.jmp();
            self.exits.push(PendingExit::new(hole, ExitKind::Interpret { rip: syscall.rip }));
        }
    }

    /// Out of line: give the flags back and interpret.
    pub(super) fn odd_bases(&mut self) {
        for odd in std::mem::take(&mut self.odd_bases) {
            self.a.bind(odd.hole);
            if odd.live {
                self.a.bytes(&[0x04, 0x7f]); // add al, 0x7f
                self.a.sahf();
                self.a.load(RAX, scratch(VALUE));
            }
            let hole = self.a.jmp();
            self.exits.push(PendingExit::new(hole, ExitKind::Interpret { rip: odd.rip }));
        }
    }

    fn sysret(&mut self, insn: &Insn) {
        // Canonical: bits 63:47 alike. A user address: all zero.
        self.a.mov(RSI, RCX);
        self.a.shr64(RSI, 47);
        self.interpret_if(cc::NE, insn);
        // R11 may set the status flags and IF, nothing else.
        let allowed = STATUS | (rflags::IF | rflags::FIXED | rflags::RF) as i32;
        self.a.load(RSI, slot(gpr::R11));
        self.a.alu_imm(Alu::And, false, Rm::Reg(RSI), !allowed & (rflags::WRITABLE as i32));
        self.interpret_if(cc::NE, insn);
        self.a.test8(field(offset_of!(Cpu, stale_windows)), 0xff);
        self.interpret_if(cc::NE, insn);
        self.a.load(RSI, slot(gpr::R11));
        self.a.shr32(RSI, 9);
        self.a.alu32(Alu::And, RSI, field(offset_of!(Cpu, irq_waiting)));
        self.a.alu_imm(Alu::And, false, Rm::Reg(RSI), 1);
        self.interpret_if(cc::NE, insn);
        self.a.load(RDI, slot(gpr::R11));
        self.a.alu_imm(Alu::And, false, Rm::Reg(RDI), STATUS | rflags::IF as i32);
        self.a.alu_imm(Alu::Or, false, Rm::Reg(RDI), rflags::FIXED as i32);
        self.a.store(rflags_field(), RDI);
        self.a.load32(RSI, field(offset_of!(Cpu, star) + 6));
        self.a.alu_imm(Alu::Add, false, Rm::Reg(RSI), 16);
        self.a.alu_imm(Alu::Or, false, Rm::Reg(RSI), 3);
        self.flat_segments(3);
        self.a.alu_imm(Alu::And, false, Rm::Reg(RDI), STATUS);
        self.a.push(RDI);
        self.a.popfq();
        self.a.mov(RSI, RCX);
        self.origin = (insn.instruction.ip(), 0);
        self.indirect_in(JumpContext::User, None, true);
    }
}

/// A write of a segment base that is not a user address.
pub struct OddBase {
    hole: Hole,
    live: bool,
    rip: u64,
}

/// A SYSCALL that is not the usual one.
pub struct OddSyscall {
    holes: [Hole; 2],
    rip: u64,
}
