//! Cases like compiled code: what a translator does across instructions shows in these.
//!
//! The common instructions of a program use a few data registers, and memory at a few offsets from a few base
//! registers, so that accesses can share their probes and flags are read some instructions after they were set.
//! Around them are conditional jumps, loops with their counters (in a loop, pointers that move by constants),
//! functions that are called directly and through registers, that recurse, and that sometimes return to
//! where they were not called from.
//!
//! ```text
//!        segments: straight code, if, if-else, loop, call, push ... pop
//!        jmp end
//! f0:    segments without loops; calls of later functions
//!        ret
//! f1:    the last function may loop or call itself
//!        ret
//! end:   (INT3)
//! ```
//!
//! Every loop has a counter that nothing else writes, and a function calls only later ones, so every case ends.
//! A block that would read an undefined flag is mended: the reader is dropped, or a TEST put before it.

use crate::case::Case;
use crate::encode::Shape;
use crate::forms::{Class, Form, Forms};
use crate::generate::{Generator, Piece, Pinned, Pool, RCX, RSP, gpr_index};
use crate::layout::{CODE_PAGES, HIGH, LOW, PAGE, bits_at};
use crate::rng::Rng;
use crate::undefined::Flow;
use iced_x86::{Mnemonic, OpCodeOperandKind, OpKind, Register};

/// A place in the code, by number.
type Label = usize;

/// What a block is laid out from: each is one instruction, but for labels.
enum Item {
    /// With the data that it addresses relative to RIP.
    Piece(Piece, Option<u64>),
    Raw(Vec<u8>),
    /// A relative jump or call. The opcode of its long form: one byte, or two with 0F first.
    Jump {
        opcode: Opcode,
        to: Label,
        short: bool,
    },
    /// LEA of a label's address.
    Address {
        register: u8,
        to: Label,
    },
    Label(Label),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Opcode {
    If(u8),
    Jump,
    Call,
}

impl Item {
    fn length(&self) -> usize {
        match self {
            Item::Piece(piece, _) => piece.bytes().len(),
            Item::Raw(bytes) => bytes.len(),
            Item::Jump { opcode: Opcode::If(_) | Opcode::Jump, short: true, .. } => 2,
            Item::Jump { opcode: Opcode::If(_), .. } => 6,
            Item::Jump { .. } => 5,
            Item::Address { .. } => 7,
            Item::Label(_) => 0,
        }
    }
}

/// RSI and RDI.
const STRING_POINTERS: [u8; 2] = [6, 7];

/// The forms of blocks, by weight.
pub(crate) fn common_forms(bits: u32) -> Pool {
    use Mnemonic::*;
    let groups: [(u64, &[Mnemonic]); 11] = [
        (26, &[Mov]),
        (8, &[Lea, Movzx, Movsx, Movsxd, Xchg]),
        (26, &[Add, Sub, And, Or, Xor, Inc, Dec, Neg]),
        (12, &[Cmp, Test]),
        (11, &[Adc, Sbb, Seta, Setb, Sete, Setne, Setg, Setl, Sets, Seto, Cmove, Cmovne, Cmovb, Cmova, Cmovl, Cmovs]),
        (5, &[Shl, Shr, Sar, Rol, Ror, Shld, Shrd]),
        (4, &[Imul, Bt, Bts, Bsf, Bsr, Popcnt, Tzcnt, Not, Bswap, Cdqe, Cqo, Cdq, Andn, Shlx, Rorx, Xadd, Cmpxchg]),
        (3, &[Push, Pop]),
        (
            4,
            &[Movups, Movdqu, Movd, Movq, Movsd, Movss, Addsd, Ucomisd, Cvtsi2sd, Vmovdqu, Vpxor, Vpaddd, Vbroadcastss],
        ),
        (1, &[Movaps, Movdqa, Pxor, Paddd]),
        (1, &[Movsb, Movsq, Stosb, Stosd, Stosq, Lodsb, Scasb, Cmpsb]),
    ];
    let suits = |form: &&Form, mnemonics: &[Mnemonic]| {
        let absolute = form.info.op_kinds().contains(&OpCodeOperandKind::mem_offs);
        let class = !matches!(form.class, Class::Privileged | Class::Mmx);
        mnemonics.contains(&form.code.mnemonic()) && class && !absolute
    };
    groups
        .iter()
        .map(|(weight, mnemonics)| {
            (*weight, Forms::get(bits).all().iter().filter(|f| suits(f, mnemonics)).copied().collect())
        })
        .collect()
}

/// Registers and offsets of one block.
struct Plan {
    pinned: Pinned,
    /// Counters of loops in the main part, outer and inner, and of the last function.
    counters: Vec<u8>,
    pointers: Vec<u8>,
    shape: Shape,
    /// Displacements from base registers.
    offsets: Vec<i8>,
    /// Data that is addressed relative to RIP, or absolutely in 32-bit code.
    anchor: u64,
    rip: u64,
}

struct Maker<'a> {
    generator: &'a mut Generator,
    rng: &'a mut Rng,
    plan: Plan,
    items: Vec<Item>,
    labels: Label,
    functions: Vec<Label>,
}

impl Generator {
    /// Makes `case` a block.
    pub(crate) fn block(&mut self, rng: &mut Rng, case: &mut Case) -> Pinned {
        let plan = plan(rng, case);
        let pinned = plan.pinned;
        let functions = rng.below(3) as usize;
        let mut maker = Maker { generator: self, rng, plan, items: Vec::new(), labels: 0, functions: Vec::new() };
        maker.functions = (0..functions).map(|_| maker.label()).collect();
        maker.program();
        maker.mend();
        case.code = maker.lay_out();
        // A block has no use for a place that cuts it off.
        let end = case.state.rip % (CODE_PAGES * PAGE) + case.code.len() as u64;
        if end > CODE_PAGES * PAGE - 16 {
            case.state.rip -= 2 * PAGE;
            maker.plan.rip = case.state.rip;
            case.code = maker.lay_out();
        }
        pinned
    }
}

fn plan(rng: &mut Rng, case: &mut Case) -> Plan {
    let narrow = bits_at(case.state.rip) == 32;
    let registers = if narrow { 8 } else { 16 };
    let mut free: Vec<u8> = (0..registers).filter(|r| usize::from(*r) != RSP).collect();
    let mut take = |rng: &mut Rng, count: usize| -> Vec<u8> {
        (0..count).map(|_| free.swap_remove(rng.below(free.len() as u64) as usize)).collect()
    };
    let mut pointers = take(rng, if narrow { 2 } else { 3 });
    // Some have what string instructions want.
    let strings = rng.percent(30);
    if strings {
        free.extend(&pointers);
        free.retain(|r| !STRING_POINTERS.contains(r));
        pointers = STRING_POINTERS.to_vec();
    }
    let mut take = |rng: &mut Rng, count: usize| -> Vec<u8> {
        (0..count).map(|_| free.swap_remove(rng.below(free.len() as u64) as usize)).collect()
    };
    let indices = take(rng, if narrow { 1 } else { 2 });
    let counters = take(rng, if narrow { 1 } else { 3 });
    let data = take(rng, if narrow { 3 } else { 5 });
    let mask = |list: &[u8]| list.iter().fold(0, |mask, register| mask | 1u32 << register);
    let region = |rng: &mut Rng| if narrow || rng.percent(20) { LOW } else { HIGH };
    for &pointer in pointers.iter().chain(&[RSP as u8]) {
        let near_end = PAGE * 2 - 64 + rng.below(128);
        let inside = match rng.below(12) {
            0 => near_end,
            1 => near_end + PAGE,
            _ => PAGE + 512 + rng.below(2 * PAGE - 1024),
        };
        case.state.gpr[usize::from(pointer)] = region(rng) + (inside & !15) + if rng.percent(10) { 3 } else { 0 };
    }
    for &index in &indices {
        case.state.gpr[usize::from(index)] = rng.below(24).wrapping_sub(8);
    }
    if let Some(&depth) = counters.get(2) {
        case.state.gpr[usize::from(depth)] = rng.below(6);
    }
    let first = rng.below(224) as i8 as i64 & !15;
    let offsets = (0..5)
        .map(|_| {
            let step = rng.pick(&[0, 4, 8, 16, 16, 32, 48]) + if rng.percent(15) { rng.below(8) as i64 } else { 0 };
            (first + step).clamp(-128, 127) as i8
        })
        .collect();
    let mut bases = pointers.clone();
    bases.push(RSP as u8);
    let pinned = Pinned { pointers: mask(&bases), indices: mask(&indices), counters: mask(&counters) };
    let shape = Shape { bases, indices, data, plain: true, narrow, memory: None };
    let anchor = if narrow { LOW } else { HIGH } + PAGE + (rng.below(2 * PAGE - 128) & !15);
    Plan { pinned, counters, pointers, shape, offsets, anchor, rip: case.state.rip }
}

impl Maker<'_> {
    fn label(&mut self) -> Label {
        self.labels += 1;
        self.labels - 1
    }

    fn jump(&mut self, opcode: Opcode, to: Label) {
        let short = opcode != Opcode::Call && self.rng.percent(60);
        self.items.push(Item::Jump { opcode, to, short });
    }

    fn jump_if(&mut self, to: Label) {
        let condition = self.rng.below(16) as u8;
        self.jump(Opcode::If(condition), to);
    }

    fn program(&mut self) {
        let end = self.label();
        for _ in 0..2 + self.rng.below(4) {
            self.segment(0, 0);
        }
        if !self.functions.is_empty() {
            self.jump(Opcode::Jump, end);
        }
        for (number, label) in self.functions.clone().into_iter().enumerate() {
            self.items.push(Item::Label(label));
            self.function(number, label, end);
        }
        self.items.push(Item::Label(end));
    }

    /// A function; the last one may recurse or loop, by the last counter.
    fn function(&mut self, number: usize, label: Label, end: Label) {
        let last = number + 1 == self.functions.len() && self.plan.counters.len() > 2;
        match self.rng.below(4) {
            0 if last => {
                // Down to -1, whatever the counter was: a call behind that comes back at once.
                let out = self.label();
                self.count_down(self.plan.counters[2]);
                self.jump(Opcode::If(8), out);
                self.straight(2);
                self.jump(Opcode::Call, label);
                self.straight(2);
                self.items.push(Item::Label(out));
            }
            1 if last => self.counted_loop(2, number + 1, 1 + number),
            _ => {
                for _ in 0..1 + self.rng.below(2) {
                    self.segment(9, number + 1);
                }
            }
        }
        self.leave_function(end);
    }

    fn leave_function(&mut self, end: Label) {
        match self.rng.below(20) {
            // To where it was not called from: the caller is forgotten.
            0 => {
                self.raw(&[0x83, 0xc4, 8], false); // add rsp, 8
                self.jump(Opcode::Jump, end);
            }
            1 => self.items.push(Item::Raw(vec![0xc2, 8, 0])),
            _ => self.items.push(Item::Raw(vec![0xc3])),
        }
    }

    /// A piece of program; `depth` counts the loops around it, and only functions from `callee` on are called.
    fn segment(&mut self, depth: usize, callee: usize) {
        match self.rng.below(12) {
            0..3 => self.straight(6),
            3..5 => {
                let over = self.label();
                self.compare();
                self.jump_if(over);
                self.straight(3);
                self.items.push(Item::Label(over));
            }
            5 => {
                let (other, over) = (self.label(), self.label());
                self.straight(2);
                self.jump_if(other);
                self.straight(2);
                self.jump(Opcode::Jump, over);
                self.items.push(Item::Label(other));
                self.straight(2);
                self.items.push(Item::Label(over));
            }
            6..8 if depth < 2.min(self.plan.counters.len()) => self.counted_loop(depth, callee, depth),
            8..10 if callee < self.functions.len() => self.call(callee),
            10 => {
                let register = self.data();
                self.raw_register(0x50, register);
                self.straight(3);
                let register = self.data();
                self.raw_register(0x58, register);
            }
            11 if !self.plan.shape.narrow => {
                // A jump or a return to an address that is taken.
                let (register, to) = (self.data(), self.label());
                self.items.push(Item::Address { register, to });
                if self.rng.percent(50) {
                    self.raw_register(0x50, register);
                    self.items.push(Item::Raw(vec![0xc3]));
                } else {
                    self.straight(2);
                    self.items.push(Item::Address { register, to });
                    self.through(register, 4);
                }
                self.items.push(Item::Label(to));
            }
            _ => self.straight(4),
        }
    }

    fn call(&mut self, callee: usize) {
        let number = callee + self.rng.below((self.functions.len() - callee) as u64) as usize;
        let to = self.functions[number];
        if self.rng.percent(25) && !self.plan.shape.narrow {
            let register = self.data();
            self.items.push(Item::Address { register, to });
            self.through(register, 2);
        } else {
            self.jump(Opcode::Call, to);
        }
    }

    /// A call (`group` 2) or jump (4) through `register`, or through memory that it is put to first.
    fn through(&mut self, register: u8, group: u8) {
        match self.rng.below(4) {
            0 => {
                // push register; call [rsp + 0]; lea rsp, [rsp + 8]
                self.raw_register(0x50, register);
                self.items.push(Item::Raw(vec![0xff, 0x44 | group << 3, 0x24, 0]));
                if group == 2 {
                    self.items.push(Item::Raw(vec![0x48, 0x8d, 0x64, 0x24, 8]));
                }
            }
            1 => {
                // mov [pointer + offset], register; call [pointer + offset]
                let (pointer, offset) = (self.rng.pick(&self.plan.pointers), self.rng.pick(&self.plan.offsets));
                let (low, high) = (pointer & 7, pointer >> 3);
                let sib: &[u8] = if low == 4 { &[0x24] } else { &[] };
                for (rex, opcode, reg) in [(0x48 | (register >> 3) << 2, 0x89, register & 7), (0x40, 0xff, group)] {
                    let mut code = vec![rex | high, opcode, 0x40 | reg << 3 | low];
                    code.extend_from_slice(sib);
                    code.push(offset as u8);
                    self.items.push(Item::Raw(code));
                }
            }
            _ => {
                let mut code = if register >= 8 { vec![0x41] } else { Vec::new() };
                code.extend([0xff, 0xc0 | group << 3 | register & 7]);
                self.items.push(Item::Raw(code));
            }
        }
    }

    /// A loop that counts down, by counter number `which`.
    fn counted_loop(&mut self, which: usize, callee: usize, depth: usize) {
        let counter = self.plan.counters[which];
        let plain = self.rng.percent(60);
        let count = match depth {
            0 if plain => self.rng.pick(&[2, 3, 5, 9, 30, 60]),
            0 => self.rng.pick(&[2, 3, 5]),
            _ => self.rng.pick(&[1, 2, 4]),
        };
        // mov counter, count
        let mut code = if counter >= 8 { vec![0x41] } else { Vec::new() };
        code.push(0xb8 | counter & 7);
        code.extend_from_slice(&i32::to_le_bytes(count));
        self.items.push(Item::Raw(code));
        let (top, test) = (self.label(), self.label());
        let tested_first = self.rng.percent(15);
        if tested_first {
            self.jump(Opcode::Jump, test);
        }
        self.items.push(Item::Label(top));
        if plain {
            let most = self.rng.pick(&[2, 6]);
            self.straight(most);
        } else {
            self.straight(2);
            self.segment(depth + 1, callee);
        }
        for pointer in self.plan.pointers.clone() {
            if self.rng.percent(if plain { 65 } else { 40 }) {
                self.advance(pointer);
            }
        }
        self.items.push(Item::Label(test));
        self.count_down(counter);
        self.jump(Opcode::If(5), top);
    }

    /// Counts `register` down and leaves ZF and SF as for the result.
    fn count_down(&mut self, register: u8) {
        match self.rng.below(4) {
            0 => self.raw(&[0x83, 0xe8 | register & 7, 1], register >= 8),
            1 => {
                self.raw(&[0x83, 0xc0 | register & 7, 0xff], register >= 8);
                self.flagless();
            }
            2 if !self.plan.shape.narrow => {
                // lea register, [register - 1]; test register, register
                let high = register >> 3;
                self.items.push(Item::Raw(vec![
                    0x48 | high << 2 | high,
                    0x8d,
                    0x44 | (register & 7) << 3,
                    0x20 | register & 7,
                    0xff,
                ]));
                self.test(register);
            }
            // 32-bit code has other meanings for the one-byte forms of DEC; this is the long one.
            _ => self.raw(&[0xff, 0xc8 | register & 7], register >= 8),
        }
    }

    /// A 64-bit instruction on one register (in 32-bit code: a 32-bit one).
    fn raw(&mut self, code: &[u8], high: bool) {
        let mut bytes = Vec::with_capacity(8);
        if !self.plan.shape.narrow {
            bytes.push(0x48 | u8::from(high));
        }
        bytes.extend_from_slice(code);
        self.items.push(Item::Raw(bytes));
    }

    /// A one-byte instruction with a register in it.
    fn raw_register(&mut self, opcode: u8, register: u8) {
        let mut bytes = if register >= 8 { vec![0x41] } else { Vec::new() };
        bytes.push(opcode | register & 7);
        self.items.push(Item::Raw(bytes));
    }

    /// Moves a pointer by a constant.
    fn advance(&mut self, register: u8) {
        let by = self.rng.pick(&[1i8, 4, 8, 8, 16, 32, 64, -1, -8, -8, -16, -64]);
        let (code, high) = match self.rng.percent(60) {
            true => ([0x83, 0xc0 | register & 7, by as u8], register >= 8),
            false => ([0x83, 0xe8 | register & 7, by.wrapping_neg() as u8], register >= 8),
        };
        self.raw(&code, high);
    }

    fn test(&mut self, register: u8) {
        let high = register >> 3;
        let mut code = if self.plan.shape.narrow { Vec::new() } else { vec![0x48 | high << 2 | high] };
        code.extend([0x85, 0xc0 | (register & 7) << 3 | register & 7]);
        self.items.push(Item::Raw(code));
    }

    fn compare(&mut self) {
        match self.rng.below(3) {
            0 => {
                let register = self.data();
                self.test(register);
            }
            1 => self.straight(2),
            _ => {
                let (one, other) = (self.data(), self.data());
                let rex = 0x48 | (other >> 3) << 2 | one >> 3;
                let mut code = if self.plan.shape.narrow { Vec::new() } else { vec![rex] };
                code.extend([0x39, 0xc0 | (other & 7) << 3 | one & 7]);
                self.items.push(Item::Raw(code));
            }
        }
        self.flagless();
    }

    /// Now and then a few instructions that leave the flags alone, between a comparison and what uses it.
    fn flagless(&mut self) {
        if !self.rng.percent(35) {
            return;
        }
        for _ in 0..1 + self.rng.below(3) {
            let piece = self.piece();
            if piece.instruction.rflags_modified() == 0 {
                self.push_piece(piece);
            }
        }
    }

    fn data(&mut self) -> u8 {
        self.rng.pick(&self.plan.shape.data)
    }

    fn straight(&mut self, most: u64) {
        for _ in 0..1 + self.rng.below(most) {
            let piece = self.piece();
            self.push_piece(piece);
        }
    }

    fn piece(&mut self) -> Piece {
        self.generator.block_piece(self.rng, &self.plan.shape, self.plan.rip, self.plan.pinned)
    }

    fn push_piece(&mut self, mut piece: Piece) {
        let instruction = piece.instruction;
        let pinned = self.plan.pinned;
        if instruction.is_string_instruction() && !STRING_POINTERS.iter().all(|r| pinned.pointers >> r & 1 != 0) {
            return;
        }
        if instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix()) {
            if (pinned.pointers | pinned.indices | pinned.counters) >> RCX & 1 != 0 {
                return;
            }
            let mut code = vec![0xb8 | RCX as u8];
            code.extend_from_slice(&(self.rng.below(16) as u32).to_le_bytes());
            self.items.push(Item::Raw(code));
        }
        let memory = instruction.op_kinds().any(|kind| kind == OpKind::Memory);
        let mut target = None;
        if memory && instruction.memory_base() == Register::None && piece.offsets.displacement_size() == 4 {
            piece.set_displacement(self.plan.anchor + self.rng.below(8) * 8);
        } else if memory && instruction.is_ip_rel_memory_operand() {
            target = Some(self.plan.anchor + self.rng.below(8) * 8);
        } else if memory && piece.offsets.displacement_size() == 1 && gpr_index(instruction.memory_base()).is_some() {
            let offset = self.rng.pick(&self.plan.offsets);
            piece.set_displacement(offset as u64);
        }
        self.items.push(Item::Piece(piece, target));
    }

    /// Takes out what would read an undefined flag.
    fn mend(&mut self) {
        for _ in 0..16 {
            let code = self.lay_out();
            let readers = Flow::new(&code, self.plan.rip).reads_undefined();
            if readers.is_empty() {
                return;
            }
            // The last first: an index stays right as long as only what follows has changed.
            let instructions = self.items.iter().enumerate().filter(|(_, item)| !matches!(item, Item::Label(_)));
            let places: Vec<_> = instructions.map(|(index, _)| index).collect();
            for index in readers.into_iter().rev().map(|reader| places[reader]) {
                if matches!(self.items[index], Item::Piece(..)) {
                    self.items.remove(index);
                } else {
                    let register = self.data();
                    let behind = self.items.split_off(index);
                    self.test(register);
                    self.items.extend(behind);
                }
            }
        }
        // Not in so many steps: what is left then has only flags of its own.
        self.items.retain(|item| !matches!(item, Item::Piece(..)));
    }

    /// The code, at the plan's address. Short jumps that don't reach become long.
    fn lay_out(&mut self) -> Vec<u8> {
        loop {
            let mut places = vec![0; self.labels];
            let mut at = 0;
            for item in &self.items {
                if let Item::Label(label) = item {
                    places[*label] = at;
                }
                at += item.length();
            }
            let mut code = Vec::with_capacity(at);
            let mut fits = true;
            for item in &mut self.items {
                let next = code.len() + item.length();
                match item {
                    Item::Raw(bytes) => code.extend_from_slice(bytes),
                    Item::Label(_) => (),
                    Item::Piece(piece, None) => code.extend_from_slice(piece.bytes()),
                    Item::Piece(piece, Some(target)) => {
                        piece.set_displacement(target.wrapping_sub(self.plan.rip + next as u64));
                        code.extend_from_slice(piece.bytes());
                    }
                    Item::Address { register, to } => {
                        code.extend([0x48 | (*register >> 3) << 2, 0x8d, 5 | (*register & 7) << 3]);
                        code.extend_from_slice(&(places[*to] as i32 - next as i32).to_le_bytes());
                    }
                    Item::Jump { opcode, to, short } => {
                        let distance = places[*to] as i32 - next as i32;
                        if *short && i8::try_from(distance).is_err() {
                            (*short, fits) = (false, false);
                        }
                        encode_jump(&mut code, *opcode, distance, *short);
                    }
                }
            }
            if fits {
                return code;
            }
        }
    }
}

fn encode_jump(code: &mut Vec<u8>, opcode: Opcode, distance: i32, short: bool) {
    match (opcode, short) {
        (Opcode::If(condition), true) => code.extend([0x70 | condition, distance as u8]),
        (Opcode::Jump, true) => code.extend([0xeb, distance as u8]),
        (Opcode::If(condition), false) => code.extend([0x0f, 0x80 | condition]),
        (Opcode::Jump, false) => code.push(0xe9),
        (Opcode::Call, _) => code.push(0xe8),
    }
    if !short || opcode == Opcode::Call {
        code.extend_from_slice(&distance.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::image;
    use crate::generate::Options;
    use crate::layout::bits_at;
    use anyvisor_engine_translator::vendor;
    use iced_x86::FlowControl;

    #[test]
    fn blocks_have_what_they_are_for() {
        let image = image(0);
        let mut seen = [0; 5];
        for bits in [64, 32] {
            let options = Options { class: Some(Class::Block), bits, bases: true };
            let mut generator = Generator::new(options);
            for seed in 0..4000 {
                let case = generator.case(seed, 0, &image);
                assert_eq!(
                    Flow::new(&case.code, case.state.rip).reads_undefined(),
                    Vec::<usize>::new(),
                    "{}",
                    case.to_line()
                );
                let mut next = case.state.rip;
                for instruction in vendor::instructions(bits_at(case.state.rip), &case.code, case.state.rip) {
                    assert!(!instruction.is_invalid(), "{}", case.to_line());
                    next = instruction.next_ip();
                    let back = instruction.is_jcc_short_or_near() && instruction.near_branch64() < instruction.ip();
                    seen[0] += u32::from(back);
                    seen[1] += u32::from(instruction.flow_control() == FlowControl::Call);
                    seen[2] += u32::from(instruction.flow_control() == FlowControl::IndirectCall);
                    seen[3] += u32::from(instruction.is_string_instruction());
                    seen[4] += u32::from(instruction.is_ip_rel_memory_operand());
                }
                assert_eq!(next, case.state.rip + case.code.len() as u64);
            }
        }
        assert!(seen.iter().all(|count| *count > 20), "{seen:?}");
    }
}
