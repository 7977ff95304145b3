//! Guest memory operands: the effective address, the TLB probe, and the way to a miss.
//!
//! A probe leaves the host address of the operand in RSI, alone or with RDI as index, having compared the
//! page, the access right and the distance to the page's end in one comparison (see
//! [`TlbEntry`](crate::cpu::TlbEntry)). The comparison destroys the status flags, so where they are alive
//! they wait in AX meanwhile.

use super::assembler::*;
use super::block::{Builder, Constant, Planned, SAVED_RAX, Thunk, host_register, scratch, slot};
use super::coalesce::{Access, Parts, Role};
use super::flags::Redo;
use super::planted::{self, Bug};
use crate::cpu::{Cpu, MicroEntry, TLB_ENTRIES, Tag, TlbEntry};
use crate::windows::REGION_BITS;
use anyvisor_x86::bits::gpr;
use anyvisor_x86::segment::{Segment, index};
use iced_x86::{Instruction, Register};
use std::mem::offset_of;

fn delta(slot: u8) -> Rm {
    Rm::Gs((offset_of!(Cpu, deltas) + 8 * slot as usize) as i32)
}

/// The field at `field` of micro-TLB entry `number`.
fn micro(number: u16, field: usize) -> Rm {
    Rm::Gs((offset_of!(Cpu, micro) + usize::from(number) * size_of::<MicroEntry>() + field) as i32)
}

fn segment_base(segment: u8) -> Rm {
    let base = offset_of!(Cpu, seg) + segment as usize * size_of::<Segment>() + offset_of!(Segment, base);
    Rm::Gs(base as i32)
}

/// See [`Cpu::closed`].
fn closed(segment: u8) -> Rm {
    Rm::Gs((offset_of!(Cpu, closed) + 8 * (segment as usize - index::FS)) as i32)
}

/// log2 of the size of a TLB entry.
pub(super) const ENTRY_BITS: u8 = 5;
const _: () = assert!(size_of::<TlbEntry>() == 1 << ENTRY_BITS);

/// An effective address: `segment base + base + index × 2^scale + displacement`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ea {
    /// Guest register numbers.
    pub base: Option<u8>,
    pub index: Option<u8>,
    pub scale: u8,
    pub displacement: i64,
    /// FS or GS; other segments are flat.
    pub segment: Option<u8>,
    /// The offset is 32 bits wide.
    pub narrow: bool,
    /// The operand is the element of a bit string that holds the bit numbered by this guest register;
    /// and the element's size in bytes, 4 or 8.
    pub bit: Option<(u8, u8)>,
}

impl Ea {
    /// The memory operand of `instruction` in `bits`-bit code; `None` for forms that are not translated.
    pub fn of(instruction: &Instruction, bits: u32) -> Option<Ea> {
        let number = |r: Register| (r.full_register() as u32 - Register::RAX as u32) as u8;
        let (base, idx) = (instruction.memory_base(), instruction.memory_index());
        let mut ea = Ea {
            base: None,
            index: None,
            scale: instruction.memory_index_scale().trailing_zeros() as u8,
            displacement: instruction.memory_displacement64() as i64,
            segment: match instruction.memory_segment() {
                Register::FS => Some(index::FS as u8),
                Register::GS => Some(index::GS as u8),
                _ => None,
            },
            narrow: bits == 32,
            bit: None,
        };
        for register in [base, idx] {
            match register {
                Register::None | Register::RIP => {}
                // What is added to it, a bit string's offset, is truncated with it.
                Register::EIP => ea.narrow = true,
                r if r.is_gpr64() => {}
                r if r.is_gpr32() => ea.narrow = true,
                _ => return None,
            }
        }
        if base.is_gpr() {
            ea.base = Some(number(base));
        }
        if idx.is_gpr() {
            ea.index = Some(number(idx));
        }
        let constant = ea.base.is_none() && ea.index.is_none();
        ea.narrow |= base == Register::None && constant && instruction.memory_displ_size() == 4;
        if !constant && i64::from(ea.displacement as i32) != ea.displacement {
            // 32-bit addresses: only the low half counts.
            if !ea.narrow {
                return None;
            }
            ea.displacement = i64::from(ea.displacement as i32);
        }
        Some(ea)
    }

    /// `[rsp + displacement]`
    pub fn stack(displacement: i64, bits: u32) -> Ea {
        Ea { displacement, ..Ea::register(4, bits) }
    }

    /// `[register]`
    pub fn register(number: u8, bits: u32) -> Ea {
        Ea { base: Some(number), index: None, scale: 0, displacement: 0, segment: None, narrow: bits == 32, bit: None }
    }

    /// The element of the bit string at this address that bit number `register` is in. After the probe RDI
    /// holds the bit's number in the element.
    pub fn with_bit(self, register: u8, size: usize) -> Ea {
        Ea { bit: Some((register, size as u8)), ..self }
    }

    /// What is left when `parts` have been added up.
    fn without(self, parts: Parts) -> Ea {
        Ea { base: self.base.filter(|_| !parts.base), index: self.index.filter(|_| !parts.index), ..self }
    }

    /// Whether [`Builder::effective_address`] takes RDI for it.
    pub fn needs_rdi(&self) -> bool {
        self.index.is_some_and(|index| host_register(index as usize).is_none())
    }

    pub fn constant(&self) -> Option<u64> {
        let plain = self.segment.is_none() && self.bit.is_none();
        (plain && self.base.is_none() && self.index.is_none()).then_some(self.displacement as u64)
    }
}

/// An out-of-line TLB miss.
pub struct Miss {
    hole: Hole,
    retry: usize,
    flags: bool,
    tag: Tag,
    offset: u16,
    /// What was added to the address for the range of a group.
    low: i32,
    /// The address, for `probe_constant`.
    constant: Option<i32>,
    /// Where to load the delta from that RDI holds across the probe.
    rdi: Option<Rm>,
    /// What makes the flags again, if they are not kept in AX.
    redo: Option<Redo>,
    /// The micro-TLB entry that was asked.
    micro: Option<u16>,
}

/// An access that is not where it was thought to be, out of line.
pub struct Elsewhere {
    hole: Hole,
    /// Scratch register for the delta, and where the block goes on.
    to: u8,
    back: usize,
    /// Offset of the instruction.
    at: u16,
    /// See [`Builder::likely_delta`].
    learn: bool,
}

/// The delta of the region that a register holds the number of.
fn region_at(register: u8) -> Rm {
    Rm::GsScaled { index: register, scale: 3, displacement: offset_of!(Cpu, regions) as i32 }
}

pub(super) fn region_place(region: u8) -> Rm {
    Rm::Gs((offset_of!(Cpu, regions) + 8 * usize::from(region)) as i32)
}

/// The address of an access that `probe_constant` can serve: it does not cross its page, and its page's
/// tag and its own address fit immediates.
fn short_constant(ea: &Ea, size: usize) -> Option<i32> {
    let address = ea.constant()?;
    let short = address as i32;
    let fits = i64::from(short) == address as i64 && short & !0xfff != i32::MIN;
    (fits && (address & 0xfff) as usize + size <= 4096).then_some(short)
}

fn constant_index(address: i32) -> usize {
    (address as i64 as u64 >> 12) as usize & (TLB_ENTRIES - 1)
}

impl Builder<'_> {
    /// Computes the offset part of `ea` into RSI (zero-extended if narrow). Uses RDI; leaves flags alone.
    pub(super) fn effective_address(&mut self, ea: &Ea) {
        if ea.base.is_none() && ea.index.is_none() {
            return self.absolute(RSI, ea.displacement as u64);
        }
        let narrow = ea.narrow && !planted::is(Bug::AddressNotTruncated);
        let displacement = ea.displacement as i32;
        let load = |a: &mut Assembler, scratch: u8, number: u8| match host_register(number as usize) {
            Some(host) => host,
            None => {
                a.load(scratch, slot(number as usize));
                scratch
            }
        };
        let a = &mut self.a;
        let rm = match (ea.base, ea.index) {
            (None, None) => unreachable!("a constant"),
            (Some(base), None) => Rm::Base(load(a, RSI, base), displacement),
            (None, Some(index)) => {
                let index = load(a, RSI, index);
                Rm::Scaled { index, scale: ea.scale, displacement }
            }
            (Some(base), Some(index)) => {
                let (base, index) = (load(a, RSI, base), load(a, RDI, index));
                Rm::Indexed { base, index, scale: ea.scale, displacement }
            }
        };
        match rm {
            Rm::Base(base, 0) if narrow => a.mov32(RSI, base),
            Rm::Base(RSI, 0) => {}
            Rm::Base(base, 0) => a.mov(RSI, base),
            rm if narrow => a.lea32(RSI, rm),
            rm => a.lea(RSI, rm),
        }
    }

    /// Makes `size` bytes at `ea` accessible: by a probe of the TLB, or by the delta that a leader of the
    /// same group has found. Returns the operand to use, which leaves RDI free if `keep_rdi`. `flags`: the
    /// status flags are alive.
    pub(super) fn access(&mut self, ea: &Ea, size: usize, write: bool, flags: bool, keep_rdi: bool) -> Rm {
        let hold_flags = std::mem::take(&mut self.hold_flags);
        let Planned { access, role, region } = self.planned[self.next_planned];
        self.next_planned += 1;
        assert_eq!(access, Access { ea: *ea, size, write }, "accesses are emitted as planned");
        let mut tag = if write { Tag::Write } else { Tag::Read };
        let (slot, low, high) = match role {
            Role::Follower { slot, added } => {
                if self.settle_after {
                    self.settle();
                }
                if self.source.windowed && flags {
                    self.settle(); // it may fault
                }
                let register = self.delta_register(slot, keep_rdi);
                let rest = ea.without(added);
                if added != Parts::default() && rest.base.is_none() && rest.index.is_none() {
                    return Rm::Base(register, ea.displacement as i32);
                }
                return self.operand(register, &rest, keep_rdi);
            }
            Role::Leader { slot, low, high, upgrade } => {
                if upgrade && !planted::is(Bug::ReadLeadsUnasked) {
                    tag = Tag::Upgrade;
                }
                let own = (low, high) == (0, 0);
                if own { (Some(slot), 0, size as i32) } else { (Some(slot), low, high) }
            }
            Role::Single => (None, 0, size as i32),
        };
        assert_eq!(self.deferred, 0, "a probe may leave the block");
        if self.source.windowed && self.faults_first && ea.bit.is_none() {
            if flags {
                self.settle();
            }
            return self.through_window(ea, slot, keep_rdi, region, flags);
        }
        let table = self.table();
        let constant = short_constant(ea, size);
        let again = flags && self.redo.is_some();
        let entry = if ea.constant().is_none() && self.faults_first { self.micro.next() } else { None };
        let uses_rdi = ea.bit.is_some() || ea.needs_rdi();
        if constant.is_none() && (entry.is_none() || uses_rdi) {
            self.deltas[1] = None;
        }
        match constant {
            Some(address) => self.probe_constant(address, tag, flags),
            None => self.probe(ea, tag, flags, low, high, entry),
        }
        self.deltas[0] = slot;
        if keep_rdi || (entry.is_some() && slot.is_none()) {
            self.deltas[1] = None;
        }
        if let Some(slot) = slot {
            self.places[usize::from(slot)] = entry;
        }
        match slot {
            Some(slot) if constant.is_some() => self.keep_delta(slot, RSI),
            None if constant.is_some() => {}
            Some(_) if let Some(entry) = entry => self.a.load(RSI, micro(entry, offset_of!(MicroEntry, delta))),
            None if let Some(entry) = entry => {
                let host = micro(entry, offset_of!(MicroEntry, host));
                if keep_rdi { self.a.alu(Alu::Add, RSI, host) } else { self.a.load(RDI, host) }
            }
            Some(slot) => {
                self.a.load(RSI, Rm::GsBase(RDI, table + offset_of!(TlbEntry, delta) as i32));
                self.keep_delta(slot, RSI);
            }
            None if keep_rdi => self.a.alu(Alu::Add, RSI, Rm::GsBase(RDI, table + offset_of!(TlbEntry, host) as i32)),
            None => self.a.load(RDI, Rm::GsBase(RDI, table + offset_of!(TlbEntry, host) as i32)),
        }
        if let Some((register, size)) = ea.bit {
            self.load_bit_number(register, size);
            self.a.alu_imm(Alu::And, false, Rm::Reg(RDI), i32::from(size) * 8 - 1);
        }
        if again {
            self.destroyed = true;
            if self.settle_after {
                self.settle();
            }
        } else if flags && hold_flags {
            self.flags_held = true;
        } else if flags {
            // A probe for itself needs RAX no more; a leader may, for its operand.
            let addressed = slot.is_some() && (ea.base == Some(RAX) || ea.index == Some(RAX));
            if self.overwrites_rax && !addressed {
                self.restore_status_flags();
            } else {
                self.restore_flags();
            }
        }
        match slot {
            _ if constant.is_some() => self.operand(RSI, ea, keep_rdi),
            Some(_) => self.operand(RSI, ea, keep_rdi),
            None if keep_rdi => Rm::Base(RSI, 0),
            None => Rm::Indexed { base: RSI, index: RDI, scale: 0, displacement: 0 },
        }
    }

    /// Loads an address that is a constant of this block's place, or minus one.
    pub(super) fn absolute(&mut self, register: u8, address: u64) {
        self.moved_constant(register, address, false);
    }

    pub(super) fn moved_constant(&mut self, register: u8, value: u64, negated: bool) {
        let before = self.a.position();
        self.a.mov_imm(register, value);
        let after = self.a.position();
        if after - before == 10 {
            self.constants.push(Constant { at: (after - 8) as u32, negated, region: self.constant_region.take() });
        } else {
            self.fixed = true;
        }
    }

    /// Puts the delta of the region that the address in `from` is in into scratch register `to`. Leaves flags alone if they are
    /// alive. If not, addresses that nobody has fault here already, beyond the table, and those that somebody has come sooner.
    pub(super) fn region_delta(&mut self, to: u8, from: u8, flags: bool) {
        if flags {
            self.a.rorx(to, from, REGION_BITS as u8);
            self.a.movzx8(to);
        } else {
            if to != from {
                self.a.mov(to, from);
            }
            self.a.shr64(to, REGION_BITS as u8);
        }
        self.a.load(to, region_at(to));
    }

    /// The same; if the region is likely to be `region`, without anybody having to wait for the address. The other
    /// scratch register stays as it is.
    fn delta_of(&mut self, to: u8, from: u8, region: Option<u8>, flags: bool) {
        match region.filter(|_| !flags) {
            Some(region) => self.likely_delta(to, from, region, true),
            None => self.region_delta(to, from, flags),
        }
    }

    /// The same where it is likely to be `region`. Destroys flags. With `learn`, accesses elsewhere are looked into.
    pub(super) fn likely_delta(&mut self, to: u8, from: u8, region: u8, learn: bool) {
        self.a.rorx(to, from, REGION_BITS as u8);
        if planted::is(Bug::RegionUnchecked) {
            return self.a.load(to, region_place(region));
        }
        self.a.bytes(&[0x40, 0x80, 0xf8 | to, region]); // cmp sil or dil, region
        let hole = self.a.jcc(cc::NE);
        self.a.load(to, region_place(region));
        self.elsewhere.push(Elsewhere { hole, to, back: self.a.position(), at: self.at, learn });
    }

    /// The out-of-line parts of accesses to likely regions.
    pub(super) fn elsewhere(&mut self) {
        let mut elsewhere = std::mem::take(&mut self.elsewhere);
        for access in elsewhere.drain(..) {
            self.a.bind(access.hole);
            self.map.push((self.a.position() as u32, access.at));
            if access.learn {
                let call = self.a.call();
                self.thunk_calls.push((call.at as u32, Thunk::Elsewhere { to: access.to }));
            } else {
                self.a.movzx8(access.to);
                self.a.load(access.to, region_at(access.to));
            }
            let back = self.a.jmp();
            self.a.bind_to(back, access.back);
        }
        self.elsewhere = elsewhere;
    }

    /// The operand at `ea` where the guest's own mapping is, whose faults are the host's. Its region's delta is that of
    /// `slot` too. Leaves flags alone if they are alive.
    fn through_window(&mut self, ea: &Ea, slot: Option<u8>, keep_rdi: bool, region: Option<u8>, flags: bool) -> Rm {
        let short = i64::from(ea.displacement as i32) == ea.displacement;
        let plain = ea.index.is_none() || (ea.base.is_some() && planted::is(Bug::IndexUnchecked));
        let simple = plain && !ea.narrow && short;
        self.deltas = [None; 2];
        if let Some(address) = ea.constant() {
            self.a.load(RSI, region_place((address >> REGION_BITS) as u8));
            self.constant_region = Some(self.a.position() as u32 - 4);
        } else if simple && (ea.segment.is_none() || ea.base.is_none()) {
            // Displacements do not leave the guard.
            let base = match (ea.segment, ea.base) {
                (Some(segment), _) => {
                    self.a.load(RSI, segment_base(segment));
                    RSI
                }
                (None, Some(base)) => self.guest_register(base, RSI),
                (None, None) => unreachable!("not a constant"),
            };
            self.delta_of(RSI, base, region, flags);
        } else {
            self.effective_address(ea);
            if let Some(segment) = ea.segment {
                self.a.load(RDI, segment_base(segment));
                self.a.lea(RSI, Rm::Indexed { base: RSI, index: RDI, scale: 0, displacement: 0 });
            }
            self.delta_of(RDI, RSI, region, flags);
            if let Some(slot) = slot {
                self.keep_delta(slot, RDI);
                self.places[usize::from(slot)] = None;
            }
            let rm = Rm::Indexed { base: RSI, index: RDI, scale: 0, displacement: 0 };
            if keep_rdi {
                self.a.lea(RSI, rm);
                return Rm::Base(RSI, 0);
            }
            self.deltas[1] = slot;
            return rm;
        }
        if let Some(slot) = slot {
            self.keep_delta(slot, RSI);
            self.places[usize::from(slot)] = None;
        }
        self.deltas[0] = slot;
        self.operand(RSI, ea, keep_rdi)
    }

    /// Whether the next access, at `ea`, uses RSI alone, if RDI is to be left alone.
    pub(super) fn leaves_rdi(&self, ea: &Ea) -> bool {
        let Some(planned) = self.planned.get(self.next_planned).filter(|planned| planned.access.ea == *ea) else {
            return false;
        };
        let in_host = |register: Option<u8>| register.is_none_or(|number| host_register(number as usize).is_some());
        let plain = ea.segment.is_none() && ea.bit.is_none() && !ea.narrow && ea.constant().is_none();
        let in_window = self.source.windowed && self.faults_first;
        let simple = in_window && ea.index.is_none() && i64::from(ea.displacement as i32) == ea.displacement;
        plain && in_host(ea.base) && in_host(ea.index) && (matches!(planned.role, Role::Follower { .. }) || simple)
    }

    /// A scratch register that holds the delta in `slot`: RSI if RDI must stay free.
    fn delta_register(&mut self, slot: u8, keep_rdi: bool) -> u8 {
        if keep_rdi {
            self.deltas[1] = None;
        }
        if let Some(which) = self.deltas.iter().position(|&held| held == Some(slot)) {
            return [RSI, RDI][which];
        }
        let which = usize::from(!keep_rdi && self.deltas[0].is_some() && self.deltas[1].is_none());
        let register = [RSI, RDI][which];
        self.a.load(register, self.delta_place(slot));
        self.deltas[which] = Some(slot);
        register
    }

    /// The place of the delta in RDI.
    fn kept_in_rdi(&self) -> Option<Rm> {
        self.deltas[1].map(|slot| self.delta_place(slot))
    }

    /// Where the delta of a group is.
    fn delta_place(&self, slot: u8) -> Rm {
        match self.places[usize::from(slot)] {
            Some(entry) => micro(entry, offset_of!(MicroEntry, delta)),
            None => delta(slot),
        }
    }

    /// Notes that scratch register `host` is used for something else.
    pub(super) fn clobber(&mut self, host: u8) {
        self.deltas[usize::from(host == RDI)] = None;
    }

    pub(super) fn table(&self) -> i32 {
        let tlb = self.source.context.tlb as usize;
        (offset_of!(Cpu, tlb) + tlb * size_of::<[TlbEntry; TLB_ENTRIES]>()) as i32
    }

    /// Probes for `low..high` around `ea`. Leaves the offset in the page in RSI, the entry's offset in RDI,
    /// and live flags in AX.
    /// With `entry` it asks the micro-TLB and leaves RDI alone, but for what `ea` needs.
    fn probe(&mut self, ea: &Ea, kind: Tag, flags: bool, low: i32, high: i32, entry: Option<u16>) {
        let table = self.table();
        let tag = if planted::is(Bug::WriteProbesForRead) { Tag::Read } else { kind }.offset();
        let high = if planted::is(Bug::PageEndUnchecked) { low + 1 } else { high };
        let redo = self.redo.filter(|_| flags);
        let retry = self.a.position();
        self.effective_address(ea);
        let in_ax = flags && redo.is_none();
        if in_ax {
            self.a.store(scratch(SAVED_RAX), RAX);
            self.a.lahf();
            self.a.bytes(&[0x0f, 0x90, 0xc0]); // seto al
        }
        self.flags_in_ax = in_ax;
        if let Some((register, size)) = ea.bit {
            self.load_bit_number(register, size);
            self.a.sar64(RDI, if size == 8 { 6 } else { 5 });
            let scale = if size == 8 { 3 } else { 2 };
            self.a.lea(RSI, Rm::Indexed { base: RSI, index: RDI, scale, displacement: 0 });
            if ea.narrow {
                self.a.mov32(RSI, RSI);
            }
        }
        if let Some(segment) = ea.segment {
            self.a.alu(Alu::Add, RSI, segment_base(segment));
            if self.bits() == 32 {
                self.a.mov32(RSI, RSI);
                self.a.alu(Alu::Add, RSI, closed(segment));
            }
        }
        match entry {
            Some(entry) => self.a.alu(Alu::Add, RSI, micro(entry, offset_of!(MicroEntry, tag))),
            None => {
                self.entry_offset(ea);
                self.a.alu(Alu::Add, RSI, Rm::GsBase(RDI, table + tag));
            }
        }
        match entry {
            Some(entry) => self.lows.push((entry, low)),
            None if low != 0 => self.a.alu_imm(Alu::Add, true, Rm::Reg(RSI), low),
            None => {}
        }
        self.a.alu_imm(Alu::Cmp, true, Rm::Reg(RSI), 4096 - (high - low));
        let hole = self.a.jcc(cc::A);
        let rdi = self.kept_in_rdi();
        let offset = self.at;
        self.misses.push(Miss { hole, retry, flags, tag: kind, offset, low, constant: None, rdi, redo, micro: entry });
    }

    /// Puts the offset of the TLB entry for the address in RSI, which is that of `ea`, into RDI.
    fn entry_offset(&mut self, ea: &Ea) {
        match ea.constant() {
            Some(address) => {
                let index = (address >> 12) as usize & (TLB_ENTRIES - 1);
                self.fixed = true;
                self.a.mov_imm(RDI, (index << ENTRY_BITS) as u64);
            }
            None => {
                self.a.mov32(RDI, RSI);
                self.a.shr32(RDI, 12 - ENTRY_BITS);
                self.a.alu_imm(Alu::And, false, Rm::Reg(RDI), ((TLB_ENTRIES - 1) << ENTRY_BITS) as i32);
            }
        }
    }

    /// Puts the address `ea`, which has no segment, into RSI and the offset of its TLB entry into RDI.
    pub(super) fn probe_index(&mut self, ea: &Ea) {
        self.effective_address(ea);
        self.entry_offset(ea);
    }

    /// Loads the delta that [`Self::keep_delta`] has kept.
    pub(super) fn load_delta(&mut self, register: u8, slot: u8) {
        self.a.load(register, delta(slot));
    }

    /// Keeps the delta in `register` for the followers of `slot`.
    pub(super) fn keep_delta(&mut self, slot: u8, register: u8) {
        self.a.store(delta(slot), register);
    }

    /// Probes for an access at a constant address inside its page: the entry is known, and one comparison
    /// with its tag does. Leaves the page's delta in RSI.
    fn probe_constant(&mut self, address: i32, kind: Tag, flags: bool) {
        self.fixed = true;
        let tag = kind.offset();
        let entry = self.table() + (constant_index(address) << ENTRY_BITS) as i32;
        let redo = self.redo.filter(|_| flags);
        let retry = self.a.position();
        if flags && redo.is_none() {
            self.a.store(scratch(SAVED_RAX), RAX);
            self.a.lahf();
            self.a.bytes(&[0x0f, 0x90, 0xc0]); // seto al
        }
        self.a.alu_imm(Alu::Cmp, true, Rm::Gs(entry + tag), (address & !0xfff).wrapping_neg());
        let hole = self.a.jcc(cc::NE);
        let constant = Some(address);
        self.misses.push(Miss {
            hole,
            retry,
            flags,
            tag: kind,
            offset: self.at,
            low: 0,
            constant,
            rdi: self.kept_in_rdi(),
            redo,
            micro: None,
        });
        self.a.load(RSI, Rm::Gs(entry + offset_of!(TlbEntry, delta) as i32));
    }

    /// The operand at `ea` when `register`, RSI or RDI, holds the delta of its page. Leaves flags alone, and
    /// RDI free if `keep_rdi`; then `register` is RSI.
    fn operand(&mut self, register: u8, ea: &Ea, keep_rdi: bool) -> Rm {
        let other = if register == RSI { RDI } else { RSI };
        let mut ea = *ea;
        if ea.base == Some(gpr::RSP as u8) {
            ea.displacement += i64::from(self.deferred);
        }
        if ea.narrow && ea.constant().is_none() {
            return self.narrow_operand(register, &ea, keep_rdi);
        }
        let displacement = ea.displacement as i32;
        if let Some(address) = ea.constant() {
            if address as i64 == i64::from(displacement) {
                self.fixed = true;
                return Rm::Base(register, displacement);
            }
            self.absolute(other, address);
            self.clobber(other);
            return self.sum(register, other, 0, 0, keep_rdi);
        }
        if let Some(segment) = ea.segment {
            self.a.load(other, segment_base(segment));
            self.clobber(other);
            return self.sum(register, other, 0, displacement, keep_rdi);
        }
        match (ea.base, ea.index) {
            (Some(base), None) => {
                let base = self.guest_register(base, other);
                self.sum(register, base, 0, displacement, keep_rdi && base == RDI)
            }
            (None, Some(index)) => {
                let index = self.guest_register(index, other);
                self.sum(register, index, ea.scale, displacement, keep_rdi && index == RDI)
            }
            (Some(base), Some(index)) => {
                let base = self.guest_register(base, other);
                // The delta survives if the other scratch register is free for the sum.
                let sum = if keep_rdi || host_register(index as usize).is_none() { register } else { other };
                self.a.lea(sum, Rm::Indexed { base: register, index: base, scale: 0, displacement: 0 });
                self.clobber(sum);
                let index = self.guest_register(index, other);
                self.sum(sum, index, ea.scale, displacement, keep_rdi && index == RDI)
            }
            (None, None) => unreachable!("constant or segment-relative"),
        }
    }

    /// The same in 32-bit code, whose addresses wrap at 2^32: the sum is made in the other scratch register, so that
    /// it stays in the page that was checked whatever the registers hold.
    fn narrow_operand(&mut self, register: u8, ea: &Ea, keep_rdi: bool) -> Rm {
        let other = if register == RSI { RDI } else { RSI };
        match ea.segment {
            Some(segment) => {
                self.a.load(other, segment_base(segment));
                self.a.lea32(other, Rm::Base(other, ea.displacement as i32));
            }
            None => {
                let sum = self.plain_address(ea).expect("registers of 32-bit code have host registers");
                self.a.lea32(other, sum);
            }
        }
        self.clobber(other);
        self.sum(register, other, 0, 0, keep_rdi)
    }

    /// `[base + index × 2^scale + displacement]`, computed into `base` if the index must not be used.
    fn sum(&mut self, base: u8, index: u8, scale: u8, displacement: i32, compute: bool) -> Rm {
        let rm = Rm::Indexed { base, index, scale, displacement };
        if compute {
            self.a.lea(base, rm);
            self.clobber(base);
            return Rm::Base(base, 0);
        }
        rm
    }

    /// The host register with a guest register's value: its own, or `other`.
    fn guest_register(&mut self, number: u8, other: u8) -> u8 {
        host_register(number as usize).unwrap_or_else(|| {
            self.a.load(other, slot(number as usize));
            self.clobber(other);
            other
        })
    }

    /// The address as one operand, if no scratch register and no segment base is needed for it.
    pub(super) fn plain_address(&self, ea: &Ea) -> Option<Rm> {
        let displacement = ea.displacement as i32;
        match (ea.base, ea.index) {
            (None, None) => None,
            (Some(base), None) => Some(Rm::Base(host_register(base as usize)?, displacement)),
            (None, Some(index)) => {
                Some(Rm::Scaled { index: host_register(index as usize)?, scale: ea.scale, displacement })
            }
            (Some(base), Some(index)) => Some(Rm::Indexed {
                base: host_register(base as usize)?,
                index: host_register(index as usize)?,
                scale: ea.scale,
                displacement,
            }),
        }
    }

    /// Loads guest register `number`, sign-extended from `size` bytes, into RDI. While flags wait in AX,
    /// RAX is in memory.
    fn load_bit_number(&mut self, number: u8, size: u8) {
        let rm = match host_register(number as usize) {
            None => slot(number as usize),
            Some(RAX) if self.flags_in_ax => scratch(SAVED_RAX),
            Some(host) => Rm::Reg(host),
        };
        if size == 8 {
            self.a.load(RDI, rm);
        } else {
            self.a.movsxd(RDI, rm);
        }
    }

    /// Takes the status flags back from AX, and RAX from where it waits.
    pub(super) fn restore_flags(&mut self) {
        self.restore_status_flags();
        self.a.load(RAX, scratch(SAVED_RAX));
    }

    /// The same, leaving RAX to the instruction that overwrites it.
    fn restore_status_flags(&mut self) {
        self.a.bytes(&[0x04, 0x7f]); // add al, 0x7f: OF again
        self.a.sahf();
    }

    /// The out-of-line parts of all probes.
    pub(super) fn misses(&mut self) {
        let mut misses = std::mem::take(&mut self.misses);
        for miss in misses.drain(..) {
            self.a.bind(miss.hole);
            self.map.push((self.a.position() as u32, miss.offset));
            if let Some(address) = miss.constant {
                // What the thunk expects: the entry's offset, and the address plus the tag.
                let tag = miss.tag.offset();
                self.a.mov_imm(RDI, (constant_index(address) << ENTRY_BITS) as u64);
                self.a.load(RSI, Rm::GsBase(RDI, self.table() + tag));
                self.a.lea(RSI, Rm::Base(RSI, address));
            }
            if miss.low != 0 && miss.micro.is_none() {
                self.a.lea(RSI, Rm::Base(RSI, -miss.low));
            }
            if let Some(entry) = miss.micro {
                self.a.mov_imm(RDI, u64::from(entry) * size_of::<MicroEntry>() as u64);
            }
            match &miss.redo {
                Some(redo) => self.redo_at_miss(redo),
                None if miss.flags => self.restore_flags(),
                None => {}
            }
            let call = self.a.call();
            let context = self.source.context.tlb;
            let (tag, flags) = (miss.tag, miss.flags);
            let thunk = match miss.micro {
                Some(_) => Thunk::FillMicro { context, tag, flags },
                None => Thunk::Fill { context, tag, flags },
            };
            self.thunk_calls.push((call.at as u32, thunk));
            if let Some(place) = miss.rdi {
                self.a.load(RDI, place);
            }
            let back = self.a.jmp();
            self.a.bind_to(back, miss.retry);
        }
        self.misses = misses;
    }
}
