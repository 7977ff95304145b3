//! What instructions do to their operands and to registers, kept by their code: iced finds it in many tables, and blocks are made by
//! the ten thousand.

use super::block::reads_writes;
use iced_x86::{
    Code, CodeSize, Instruction, InstructionInfoFactory, InstructionInfoOptions, OpAccess, OpKind, Register,
};

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Effects {
    /// To each operand.
    pub(super) accesses: [OpAccess; 5],
    /// A bit for each general register that it writes or may write.
    pub(super) written: u16,
}

/// What has been asked before.
pub(super) struct Facts {
    factory: InstructionInfoFactory,
    /// By code, without and with a memory operand: [`KNOWN`], four bits for each access, and from bit 32 on the registers written
    /// that are no operands.
    known: Box<[u64]>,
}

const KNOWN: u64 = 1 << 63;

impl Default for Facts {
    fn default() -> Self {
        Facts { factory: InstructionInfoFactory::new(), known: vec![0; 2 * Code::values().len()].into_boxed_slice() }
    }
}

impl Facts {
    pub(super) fn of(&mut self, instruction: &Instruction) -> Effects {
        if !is_plain(instruction) {
            return self.ask(instruction);
        }
        let place =
            2 * instruction.code() as usize + usize::from(operands(instruction, OpKind::Memory).next().is_some());
        if self.known[place] == 0 {
            self.known[place] = self.learn(*instruction);
        }
        let known = self.known[place];
        let accesses = std::array::from_fn(|i| ACCESSES[(known >> (4 * i)) as usize & 0xf]);
        let mut written = (known >> 32) as u16;
        for i in operands(instruction, OpKind::Register) {
            if reads_writes(accesses[i as usize]).1 {
                written |= bit(instruction.op_register(i));
            }
        }
        Effects { accesses, written }
    }

    /// What is kept of a plain instruction.
    fn learn(&mut self, mut instruction: Instruction) -> u64 {
        // Registers that no instruction writes but as operands.
        const OTHERS: [Register; 4] = [Register::R12, Register::R13, Register::R14, Register::R15];
        let registers = operands(&instruction, OpKind::Register).filter(|&i| instruction.op_register(i).is_gpr());
        let registers: Vec<u32> = registers.collect();
        let mut named = 0;
        for (i, other) in registers.into_iter().zip(OTHERS) {
            instruction.set_op_register(i, other);
            named |= bit(other);
        }
        let effects = self.ask(&instruction);
        let implied = effects.written & !named;
        let accesses = effects.accesses.iter().rev().fold(0, |all, &access| all << 4 | access as u64);
        KNOWN | u64::from(implied) << 32 | accesses
    }

    fn ask(&mut self, instruction: &Instruction) -> Effects {
        let usage = self.factory.info_options(instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
        let mut written = 0;
        for used in usage.used_registers() {
            if reads_writes(used.access()).1 {
                written |= bit(used.register());
            }
        }
        Effects { accesses: std::array::from_fn(|i| usage.op_access(i as u32)), written }
    }
}

/// Whether nothing but its code, and whether it has a memory operand, decides what it does: repetition, masks, and
/// registers that are named twice (XOR to clear one) do too.
fn is_plain(instruction: &Instruction) -> bool {
    let named =
        |i: u32| (instruction.op_kind(i) == OpKind::Register).then(|| instruction.op_register(i).full_register());
    let count = instruction.op_count();
    let twice = (1..count).any(|i| named(i).is_some_and(|register| (0..i).any(|other| named(other) == Some(register))));
    instruction.code_size() == CodeSize::Code64
        && !instruction.has_rep_prefix()
        && !instruction.has_repne_prefix()
        && !instruction.has_op_mask()
        && !twice
}

/// The operands of a kind, by number.
pub(super) fn operands(instruction: &Instruction, kind: OpKind) -> impl Iterator<Item = u32> + '_ {
    (0..instruction.op_count()).filter(move |&i| instruction.op_kind(i) == kind)
}

/// The bit of a general register; of others, none.
fn bit(register: Register) -> u16 {
    if register.is_gpr() { 1 << (register.full_register() as u16 - Register::RAX as u16) } else { 0 }
}

/// By number.
const ACCESSES: [OpAccess; 16] = {
    use OpAccess::*;
    let mut all = [None; 16];
    let values = [None, Read, CondRead, Write, CondWrite, ReadWrite, ReadCondWrite, NoMemAccess];
    let mut i = 0;
    while i < values.len() {
        all[values[i] as usize] = values[i];
        i += 1;
    }
    all
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vendor;

    /// Of instructions of all kinds, in an order that has each asked for after others of its code.
    #[test]
    fn what_is_kept_is_what_iced_says() {
        let mut facts = Facts::default();
        let (mut state, mut compared) = (1u64, 0);
        let mut random = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 33) as u8
        };
        for _ in 0..400_000 {
            let mut bytes: [u8; 15] = std::array::from_fn(|_| random());
            match random() % 4 {
                0 => bytes[0] = 0x0f,
                1 => (bytes[0], bytes[1]) = (0x40 | bytes[0] & 0xf, bytes[1] & 0xbf),
                2 => (bytes[0], bytes[1]) = (0xc4, bytes[1] & 0xe0 | (1 + bytes[1] % 3)),
                _ => {}
            }
            let instruction = vendor::decoder(64, &bytes, 0x1000).decode();
            if !instruction.is_invalid() {
                assert_eq!(facts.of(&instruction), facts.ask(&instruction), "{instruction:?} {bytes:02x?}");
                compared += usize::from(is_plain(&instruction));
            }
        }
        let codes = facts.known.iter().filter(|&&known| known != 0).count();
        assert!(compared > 100_000 && codes > 1000, "{compared} instructions of {codes} codes");
    }
}
