//! String instructions: single ones as one or two probes, REP MOVS and REP STOS by a shared thunk that works page
//! by page with the host's own REP. Blocks are made for a clear direction flag.

use super::assembler::*;
use super::block::*;
use super::coalesce::Access;
use crate::cpu::{Cpu, TLB_ENTRIES, Tag, TlbEntry};
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};
use std::mem::offset_of;

/// log2 of the operand size of a string instruction that is translated, in `bits`-bit code with addresses of that
/// width and flat segments.
pub fn translatable(instruction: &Instruction, bits: u32) -> Option<u8> {
    let (kind, size) = match instruction.mnemonic() {
        M::Movsb => (M::Movsb, 0),
        M::Movsw => (M::Movsb, 1),
        M::Movsd => (M::Movsb, 2),
        M::Movsq => (M::Movsb, 3),
        M::Stosb => (M::Stosb, 0),
        M::Stosw => (M::Stosb, 1),
        M::Stosd => (M::Stosb, 2),
        M::Stosq => (M::Stosb, 3),
        M::Lodsb => (M::Lodsb, 0),
        M::Lodsw => (M::Lodsb, 1),
        M::Lodsd => (M::Lodsb, 2),
        M::Lodsq => (M::Lodsb, 3),
        M::Scasb => (M::Scasb, 0),
        M::Scasw => (M::Scasb, 1),
        M::Scasd => (M::Scasb, 2),
        M::Scasq => (M::Scasb, 3),
        M::Cmpsb => (M::Scasb, 0),
        M::Cmpsw => (M::Scasb, 1),
        M::Cmpsd => (M::Scasb, 2),
        M::Cmpsq => (M::Scasb, 3),
        _ => return None,
    };
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    if matches!(kind, M::Lodsb | M::Scasb) && repeated {
        return None;
    }
    let flat = !matches!(instruction.segment_prefix(), Register::FS | Register::GS);
    let own_width = (0..instruction.op_count()).all(|i| match instruction.op_kind(i) {
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => bits == 64,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => bits == 32,
        OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::Memory => false,
        _ => true,
    });
    (flat && own_width).then_some(size)
}

impl Builder<'_> {
    /// The accesses of a string instruction that is not repeated.
    pub(super) fn string_accesses(&self, instruction: &Instruction) -> [Option<Access>; 2] {
        let Some(log) = translatable(instruction, self.bits()) else { return [None, None] };
        if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
            return [None, None];
        }
        let size = 1 << log;
        let source = Some(Access { ea: self.at_register(6), size, write: false });
        let destination = Some(Access { ea: self.at_register(7), size, write: true });
        let compared = Some(Access { ea: self.at_register(7), size, write: false });
        match instruction.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => [source, destination],
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => [destination, None],
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => [compared, None],
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => [source, compared],
            _ => [source, None],
        }
    }

    pub(super) fn string(&mut self, insn: &Insn) -> bool {
        let instruction = &insn.instruction;
        let Some(log) = translatable(instruction, self.bits()) else { return false };
        let moves = matches!(instruction.mnemonic(), M::Movsb | M::Movsw | M::Movsd | M::Movsq);
        let context = self.source.context.tlb;
        if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
            let again = self.a.position();
            let call = self.a.call();
            self.thunk_calls.push((call.at as u32, Thunk::Repeat { context, moves, log }));
            // It also comes back when the TLB has got a page that it did not have.
            let done = self.a.short(0xe3);
            let back = self.a.position() + 2 - again;
            self.a.bytes(&[0xeb, (back as u8).wrapping_neg()]);
            self.a.bind_short(done);
            return true;
        }
        let (size, flags) = (1usize << log, insn.live_in != 0);
        let (source, destination) = (self.at_register(6), self.at_register(7));
        if moves {
            let rm = self.access(&source, size, false, flags, false);
            self.a.load_sized(log, RDI, rm);
            self.a.store(scratch(VALUE), RDI);
            let rm = self.access(&destination, size, true, flags, true);
            self.a.load(RDI, scratch(VALUE));
            self.a.store_sized(log, rm, RDI);
            self.advance(GUEST_RSI, size);
            self.advance(GUEST_RDI, size);
        } else if matches!(instruction.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq) {
            let rm = self.access(&source, size, false, flags, false);
            self.a.load_sized(log, RDI, rm);
            self.a.store(scratch(VALUE), RDI);
            let rm = self.access(&destination, size, false, flags, true);
            self.a.load(RDI, scratch(VALUE));
            self.a.cmp_sized(log, RDI, rm);
            self.advance(GUEST_RSI, size);
            self.advance(GUEST_RDI, size);
        } else if matches!(instruction.mnemonic(), M::Scasb | M::Scasw | M::Scasd | M::Scasq) {
            let rm = self.access(&destination, size, false, flags, false);
            self.a.cmp_sized(log, RAX, rm);
            self.advance(GUEST_RDI, size);
        } else if matches!(instruction.mnemonic(), M::Stosb | M::Stosw | M::Stosd | M::Stosq) {
            let rm = self.access(&destination, size, true, flags, false);
            self.a.store_sized(log, rm, RAX);
            self.advance(GUEST_RDI, size);
        } else {
            let rm = self.access(&source, size, false, flags, false);
            self.a.load_accumulator(log, rm);
            self.advance(GUEST_RSI, size);
        }
        true
    }

    /// Moves a pointer behind the element it points to. Leaves flags alone.
    fn advance(&mut self, pointer: u8, size: usize) {
        let next = Rm::Base(pointer, size as i32);
        if self.bits() == 64 { self.a.lea(pointer, next) } else { self.a.lea32(pointer, next) }
    }
}

const SAVED_AX: usize = 3;
const SAVED_RDX: usize = 4;
const SAVED_RBX: usize = 5;
const SAVED_FLAGS: usize = 6;

/// The thunk for REP MOVS (`moves`) or REP STOS in TLB context `context`: called with guest registers in place, returns when
/// RCX is 0, or as `fill`, the thunks by tag for a TLB miss with live flags, does. An element across pages, or pending work,
/// leaves through `fault` with the guest registers precise, and the interpreter goes on from there.
pub fn repeat(a: &mut Assembler, context: usize, moves: bool, log: u8, fill: &[[usize; 2]], fault: usize) {
    let table = offset_of!(Cpu, tlb) + context * size_of::<[TlbEntry; TLB_ENTRIES]>();
    let size = 1i32 << log;
    a.store(scratch(SAVED_AX), RAX);
    a.lahf();
    a.bytes(&[0x0f, 0x90, 0xc0]); // seto al
    a.store(scratch(SAVED_FLAGS), RAX);
    a.store(scratch(SAVED_RDX), RDX);
    a.store(scratch(SAVED_RBX), RBX);
    let again = a.position();
    a.alu_imm(Alu::Cmp, true, Rm::Reg(RCX), 0);
    let done = a.jcc(cc::E);
    a.alu_imm(Alu::Cmp, false, pending(), 0);
    let interrupted = a.jcc(cc::NE);
    let mut missed = Vec::new();
    if moves {
        let hole = probe(a, table + offset_of!(TlbEntry, read), GUEST_RSI, RSI, size);
        missed.push((hole, RSI, Tag::Read));
        a.mov_imm(RDX, 4096);
        a.alu32(Alu::Sub, RDX, Rm::Reg(RSI));
        a.alu(Alu::Add, RSI, Rm::GsBase(RDI, (table + offset_of!(TlbEntry, host)) as i32));
    } else {
        a.mov_imm(RDX, 4096);
    }
    let hole = probe(a, table + offset_of!(TlbEntry, write), GUEST_RDI, RBX, size);
    missed.push((hole, RBX, Tag::Write));
    a.mov_imm(RAX, 4096);
    a.alu32(Alu::Sub, RAX, Rm::Reg(RBX));
    a.alu(Alu::Add, RBX, Rm::GsBase(RDI, (table + offset_of!(TlbEntry, host)) as i32));
    a.mov(RDI, RBX);
    a.alu32(Alu::Cmp, RDX, Rm::Reg(RAX));
    a.bytes(&[0x0f, 0x47, 0xd0]); // cmova edx, eax
    if log > 0 {
        a.shr32(RDX, log);
    }
    a.alu(Alu::Cmp, RCX, Rm::Reg(RDX));
    a.bytes(&[0x48, 0x0f, 0x42, 0xd1]); // cmovb rdx, rcx
    a.mov(RBX, RCX);
    a.alu(Alu::Sub, RBX, Rm::Reg(RDX));
    a.mov(RCX, RDX);
    let step = |base| match log {
        0 => Rm::Indexed { base, index: RDX, scale: 0, displacement: 0 },
        log => Rm::Indexed { base, index: RDX, scale: log, displacement: 0 },
    };
    if moves {
        a.lea(GUEST_RSI, step(GUEST_RSI));
    }
    a.lea(GUEST_RDI, step(GUEST_RDI));
    if !moves {
        a.load(RAX, scratch(SAVED_AX));
    }
    if log == 1 {
        a.byte(0x66);
    }
    a.byte(0xf3);
    if log == 3 {
        a.byte(0x48);
    }
    a.byte(match (moves, log) {
        (true, 0) => 0xa4,
        (true, _) => 0xa5,
        (false, 0) => 0xaa,
        (false, _) => 0xab,
    });
    a.mov(RCX, RBX);
    let back = a.jmp();
    a.bind_to(back, again);
    a.bind(done);
    restore(a);
    a.ret();
    let mut leave = vec![interrupted];
    for (hole, address, tag) in missed {
        a.bind(hole);
        a.alu_imm(Alu::Cmp, true, Rm::Reg(address), 4095);
        let crosses = a.jcc(cc::BE);
        if moves && tag == Tag::Write {
            // Pages that take each other's entry would do so for ever.
            a.mov(RAX, GUEST_RSI);
            a.alu(Alu::Xor, RAX, Rm::Reg(GUEST_RDI));
            a.alu_imm(Alu::And, false, Rm::Reg(RAX), ((TLB_ENTRIES - 1) << 12) as i32);
            leave.push(a.jcc(cc::E));
        }
        if address != RSI {
            a.mov(RSI, address);
        }
        restore(a);
        let to_fill = a.jmp();
        a.bind_to(to_fill, fill[tag as usize][1]);
        leave.push(crosses);
    }
    for hole in leave {
        a.bind(hole);
    }
    restore(a);
    // The return address belongs to the next instruction already, the byte before it does not.
    a.pop(RSI);
    a.lea(RSI, Rm::Base(RSI, -1));
    a.store(Rm::Gs(word_offset(word::FAULT)), RSI);
    let out = a.jmp();
    a.bind_to(out, fault);
}

/// Probes for the element at `address`: its offset in the page, if it is there, to `to`, the entry's offset to RDI.
fn probe(a: &mut Assembler, tag: usize, address: u8, to: u8, size: i32) -> Hole {
    a.mov(to, address);
    a.mov32(RDI, to);
    a.shr32(RDI, 7);
    a.alu_imm(Alu::And, false, Rm::Reg(RDI), ((TLB_ENTRIES - 1) << 5) as i32);
    a.alu(Alu::Add, to, Rm::GsBase(RDI, tag as i32));
    a.alu_imm(Alu::Cmp, true, Rm::Reg(to), 4096 - size);
    a.jcc(cc::A)
}

fn restore(a: &mut Assembler) {
    a.load(RAX, scratch(SAVED_FLAGS));
    a.bytes(&[0x04, 0x7f]); // add al, 0x7f
    a.sahf();
    a.load(RAX, scratch(SAVED_AX));
    a.load(RDX, scratch(SAVED_RDX));
    a.load(RBX, scratch(SAVED_RBX));
}
