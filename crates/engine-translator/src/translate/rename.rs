//! Renaming the registers of a copied instruction.
//!
//! Most guest registers have a host register of their own; the three that live in the vCPU block are used
//! there where the instruction allows a memory operand, or pass through a scratch register.

use super::assembler::*;
use super::block::{Builder, Insn, NO_USE, SLOTS, host_register, reads_writes, slot, slot_number};
use super::encoding::{Fields, Layout, Place, gpr_operands};
use super::planted::{self, Bug};
use iced_x86::{Instruction, Register};

impl Builder<'_> {
    /// Decides how the registers of an instruction are renamed, without emitting anything.
    pub(super) fn plan(&mut self, insn: &Insn, memory: Option<Rm>) -> Option<Plan> {
        let instruction = &insn.instruction;
        let start = insn.offset as usize;
        let layout = Layout::parse(&self.source.bytes[start..start + insn.length as usize], self.bits())?;
        let mut fields = Fields { reg: layout.reg, vvvv: layout.vex.map_or(0, |v| v.vvvv), ..Fields::default() };
        let mut rm = memory.unwrap_or(Rm::Reg(layout.rm));
        let mut spills = Spills::new(memory.is_some(), self.held, self.next_uses);
        let mut written_in_place = None;
        let (mut high_byte, mut low_byte) = (false, false);
        // Reads first: a register that is only written may then share the scratch of one that is read.
        let operands = gpr_operands(instruction);
        let mut placed = 0u32;
        // Without registers that live in the vCPU block there are no scratch registers to give out in order.
        for pass in 0..if insn.names_slots() { 3 } else { 1 } {
            for operand in operands.iter().flatten() {
                let index = operand.register.full_register() as usize - Register::RAX as usize;
                let (reads, writes) = reads_writes(insn.accesses[operand.operand as usize]);
                // XOR r, r and its kin count as reading neither operand; here both matter.
                let idiom = matches!(instruction.mnemonic(), iced_x86::Mnemonic::Xor | iced_x86::Mnemonic::Sub);
                let partial = operand.register.size() < 4;
                let reads = reads || !writes || idiom || partial;
                // Then writes to a register that is read too: nothing else may be written to its scratch.
                let turn = if reads || slot_number(index).is_none() {
                    0
                } else if spills.has(index) {
                    1
                } else {
                    2
                };
                if turn > pass || (placed & (1 << operand.operand)) != 0 {
                    continue;
                }
                placed |= 1 << operand.operand;
                let host = if matches!(operand.register, Register::AH | Register::CH | Register::DH | Register::BH) {
                    high_byte = true;
                    operand.register as u8 - Register::AH as u8 + 4
                } else {
                    match host_register(index) {
                        Some(host) => {
                            low_byte |= operand.register.size() == 1 && (4..8).contains(&host);
                            host
                        }
                        None if operand.or_memory
                            && memory.is_none()
                            && !self.held.iter().flatten().any(|held| held.index == index)
                            && in_place(instruction, operand.register, writes) =>
                        {
                            rm = slot(index);
                            if writes {
                                written_in_place = Some(index);
                            }
                            continue;
                        }
                        None => {
                            let host = spills.assign(index, reads, writes)?;
                            low_byte |= operand.register.size() == 1;
                            host
                        }
                    }
                };
                match operand.place {
                    Place::Reg => fields.reg = host,
                    Place::Vvvv => fields.vvvv = host,
                    Place::Opcode => {
                        fields.opcode = host;
                        fields.opcode_is_register = true;
                    }
                    Place::Rm => rm = Rm::Reg(host),
                }
            }
        }
        // AH–BH cannot be named next to a REX prefix: MOVZX and MOVSX from them go through a scratch.
        let mut widen = None;
        if high_byte && (layout.needs_rex(&fields, rm) || low_byte) {
            use iced_x86::Mnemonic::{Movsx, Movzx};
            if layout.w || memory.is_some() || !matches!(instruction.mnemonic(), Movzx | Movsx) || fields.reg < 8 {
                return None;
            }
            if layout.operand_size {
                return None;
            }
            widen = Some(fields.reg);
            fields.reg = RSI;
        }
        Some(Plan { layout, fields, rm, spills, written_in_place, force_rex: low_byte, high_byte, widen })
    }

    pub(super) fn emit_plan(&mut self, plan: &Plan) {
        for spill in plan.spills.used() {
            self.clobber(spill.host);
            // Whatever else the scratch holds has to go; what is read may be newer in the other one.
            let here = held_slot(spill.host);
            if self.held[here].is_some_and(|held| held.index != spill.index) {
                self.write_back(here);
                self.held[here] = None;
            }
            if spill.reads && self.held[here].is_none() {
                self.write_back(1 - here);
                self.a.load(spill.host, slot(spill.index));
            }
        }
        if plan.widen.is_some() {
            self.write_back(held_slot(RSI));
            self.held[held_slot(RSI)] = None;
            self.clobber(RSI);
        }
        plan.layout.emit(&mut self.a, &plan.fields, plan.rm, plan.force_rex);
        if let Some(host) = plan.widen {
            self.a.mov32(host, RSI);
        }
        for spill in plan.spills.used().filter(|s| s.writes) {
            self.forget_held(spill.index);
        }
        // A scratch that was read for one register and written for another holds the latter.
        for writes in [false, true] {
            for spill in plan.spills.used().filter(|s| s.writes == writes) {
                let dirty =
                    writes || self.held[held_slot(spill.host)].is_some_and(|h| h.index == spill.index && h.dirty);
                self.held[held_slot(spill.host)] = Some(Held { index: spill.index, dirty });
            }
        }
        if let Some(index) = plan.written_in_place {
            self.forget_held(index);
        }
    }

    fn forget_held(&mut self, index: usize) {
        for held in self.held.iter_mut().filter(|held| held.is_some_and(|h| h.index == index)) {
            *held = None;
        }
    }

    /// Stores what a scratch register holds if the vCPU block does not have it yet.
    pub(super) fn write_back(&mut self, which: usize) {
        if let Some(held) = &mut self.held[which]
            && std::mem::take(&mut held.dirty)
        {
            self.a.store(slot(held.index), HELD_HOSTS[which]);
        }
    }

    /// Brings the vCPU block up to date: before anything that can leave the block.
    pub(super) fn write_back_all(&mut self) {
        self.write_back(0);
        self.write_back(1);
    }

    /// Brings the vCPU block up to date and forgets what the scratch registers hold: they are needed.
    pub(super) fn release_scratch(&mut self) {
        self.write_back_all();
        self.held = [None; 2];
    }
}

/// Whether a register that lives in the vCPU block can be a memory operand right there: when it is only
/// read, or when writing it in memory does the same as writing the register (64 bits: no zero extension).
fn in_place(instruction: &Instruction, register: Register, writes: bool) -> bool {
    use iced_x86::Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    if matches!(mnemonic, M::Xchg | M::Xadd | M::Cmpxchg | M::Bt | M::Bts | M::Btr | M::Btc) {
        return false;
    }
    let plain = matches!(
        mnemonic,
        M::Mov
            | M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Imul
            | M::Movsxd
            | M::Movzx
            | M::Movsx
    );
    plain && (!writes || register.size() == 8)
}

/// How an instruction's registers are renamed.
pub struct Plan {
    pub layout: Layout,
    pub fields: Fields,
    pub rm: Rm,
    pub spills: Spills,
    /// A register that is written where it lives, in the vCPU block.
    pub written_in_place: Option<usize>,
    pub force_rex: bool,
    /// AH, CH, DH or BH is an operand.
    pub high_byte: bool,
    /// The result of a MOVZX or MOVSX from AH–BH goes through RSI to this register.
    pub widen: Option<u8>,
}

/// Scratch registers that stand for guest registers which live in the vCPU block.
pub struct Spills {
    entries: [Option<Spill>; 3],
    /// RSI holds the memory operand's address.
    rsi_taken: bool,
    /// What the scratch registers hold now, and when it is used again.
    held: [Option<Held>; 2],
    next_uses: [u8; SLOTS],
}

/// A guest register whose value a scratch register holds; `dirty` if the vCPU block has an older one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub index: usize,
    pub dirty: bool,
}

const HELD_HOSTS: [u8; 2] = [RSI, RDI];

fn held_slot(host: u8) -> usize {
    usize::from(host == RDI)
}

#[derive(Clone, Copy)]
pub struct Spill {
    index: usize,
    host: u8,
    reads: bool,
    writes: bool,
}

impl Spill {
    /// Whether the scratch register must have the guest register's value before the instruction.
    pub(super) fn reads(&self) -> bool {
        self.reads
    }
}

impl Spills {
    pub(super) fn new(rsi_taken: bool, held: [Option<Held>; 2], next_uses: [u8; SLOTS]) -> Spills {
        Spills { entries: [None; 3], rsi_taken, held, next_uses }
    }

    pub(super) fn used(&self) -> impl Iterator<Item = Spill> + '_ {
        self.entries.iter().flatten().copied()
    }

    pub(super) fn has(&self, index: usize) -> bool {
        self.used().any(|e| e.index == index)
    }

    /// A scratch for guest register `index`; `None` when there are not enough. Operands that are read come
    /// first, so that one only written can take the place of one only read.
    pub(super) fn assign(&mut self, index: usize, reads: bool, writes: bool) -> Option<u8> {
        if let Some(entry) = self.entries.iter_mut().flatten().find(|e| e.index == index) {
            entry.reads |= reads;
            entry.writes |= writes && !planted::is(Bug::SpillNotStored);
            return Some(entry.host);
        }
        let taken = |host: u8| {
            self.used().any(|e| e.host == host && (e.writes || reads)) || (host == RSI && self.rsi_taken && reads)
        };
        // The one that has the value. Else RDI, which keeps it across accesses that RSI is needed for, unless it has a
        // value that is used sooner.
        let next = |index: usize| slot_number(index).map_or(NO_USE, |slot| self.next_uses[slot]);
        let rank = |host: u8| match self.held[held_slot(host)] {
            Some(held) if held.index == index => 0,
            Some(held) if host == RDI && next(held.index) < next(index) => 3,
            _ if host == RDI => 1,
            _ => 2,
        };
        let host = [RDI, RSI].into_iter().filter(|&h| !taken(h)).min_by_key(|&h| rank(h))?;
        let free = self.entries.iter_mut().find(|e| e.is_none())?;
        *free = Some(Spill { index, host, reads, writes });
        Some(host)
    }
}
