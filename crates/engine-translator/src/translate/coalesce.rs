//! Sharing TLB probes between the memory accesses of a block.
//!
//! Accesses whose addresses differ by constants known at translation time form a group. The first, the leader,
//! checks that the whole range of the group lies in its page, and keeps the page's *delta* (host address minus
//! linear address) in the vCPU block; the others only add that delta to their own address. Reads may lead writes.
//! Such a leader asks for a page that can be written *already*: no dirty bit is set for a write that may not
//! happen, and a page that is only read so far is a misfit. The delta stays right to the block's end: whatever
//! changes a mapping ends the block.
//!
//! A leader whose range leaves the page, or that misfits otherwise, goes on in a twin of the block without
//! groups. A block where that happens often is translated again, with groups of one kind of access first, and
//! without any then.

use super::access::Ea;
use super::block::{Insn, host_register};
use super::planted::{self, Bug};
use crate::cpu::DELTAS;
use anyvisor_x86::bits::gpr;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// The widest range of a group, in bytes: a wider one leaves its page more often.
const RANGE: i64 = 384;
/// The same in a window, whose guard makes a delta good for all of them.
const WINDOW_RANGE: i64 = 1 << 30;

/// What an access does about its probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Probes for itself.
    Single,
    /// Probes for `low..high` around its address and keeps the delta in `slot`.
    /// With `upgrade` it is a read that leads writes.
    Leader { slot: u8, low: i32, high: i32, upgrade: bool },
    /// Uses the delta in `slot`, which `added` have been added to.
    Follower { slot: u8, added: Parts },
}

/// Registers of an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    pub base: bool,
    pub index: bool,
}

/// The regions of what registers held.
#[derive(Clone, Copy, Debug)]
pub struct Regions {
    pub registers: [u8; 16],
    /// Of the bases of FS and GS.
    pub bases: [u8; 2],
}

impl Regions {
    fn segment(&self, segment: u8) -> u8 {
        self.bases[usize::from(segment) - anyvisor_x86::segment::index::FS]
    }
}

/// One memory access, in the order of emission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub ea: Ea,
    pub size: usize,
    pub write: bool,
}

/// A register's value, as a constant distance from some unknown value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value {
    origin: u32,
    offset: i64,
}

impl Value {
    /// Of a register at the block's start.
    fn at_start(register: u8) -> Value {
        Value { origin: u32::from(register), offset: 0 }
    }
}

/// The part of an address that groups share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Page(u64),
    Segment { segment: u8, version: u32 },
    Registers { base: Option<u32>, index: Option<(u32, u8)> },
}

struct Group {
    origin: Origin,
    write: bool,
    /// The leader is a write itself.
    led_by_write: bool,
    low: i64,
    high: i64,
    /// The number of the first access, and its offset.
    first: (usize, i64),
    members: usize,
    /// What every access names by a register that holds what it held at the block's start.
    unmoved: Parts,
    /// Of its delta, where it has one.
    slot: Option<u8>,
    /// The delta is there before the first access, and this is added to it.
    hoisted: Option<Parts>,
}

/// The memory that coalescers use in turn.
#[derive(Default)]
pub struct Groups {
    groups: Vec<Group>,
    /// The group of each access, where it is in one.
    owners: Vec<Option<u16>>,
}

/// Tracks register values through a block.
pub struct Coalescer<'a> {
    values: [Value; 16],
    next: u32,
    segments: u32,
    found: &'a mut Groups,
    /// Reads may lead writes.
    mix: bool,
    /// Accesses go through windows: see [`crate::windows`].
    windowed: bool,
    /// Of the code: 32 or 64. Addresses and offsets in 32-bit code are meant modulo 2^32.
    bits: u32,
}

impl Coalescer<'_> {
    pub fn new(found: &mut Groups, mix: bool, windowed: bool, bits: u32) -> Coalescer<'_> {
        found.groups.clear();
        found.owners.clear();
        Coalescer {
            found,
            mix: mix || windowed,
            windowed,
            bits,
            values: std::array::from_fn(|i| Value::at_start(i as u8)),
            next: 16,
            segments: 0,
        }
    }

    /// Notes the next access of the block; the registers are as before its instruction but for what
    /// [`Self::adjust`] has told.
    /// With `alone` it is in no group.
    pub fn access(&mut self, access: &Access, alone: bool) {
        let number = self.found.owners.len();
        let owner = if alone { None } else { self.group(access, number) };
        self.found.owners.push(owner);
    }

    /// The group for access `number`.
    fn group(&mut self, access: &Access, number: usize) -> Option<u16> {
        let (origin, offset) = self.address(&access.ea)?;
        if matches!(origin, Origin::Page(_)) && offset + access.size as i64 > 4096 {
            return None;
        }
        let end = offset + access.size as i64;
        let mix = self.mix;
        let range = if self.windowed { WINDOW_RANGE } else { RANGE };
        let fits = |g: &Group| {
            g.origin == origin && (g.write || !access.write || mix) && g.high.max(end) - g.low.min(offset) <= range
        };
        let unmoved =
            |register: Option<u8>| register.is_some_and(|r| self.values[usize::from(r)] == Value::at_start(r));
        let unmoved = Parts { base: unmoved(access.ea.base), index: unmoved(access.ea.index) };
        let groups = &mut self.found.groups;
        if let Some(i) = groups.iter().rposition(fits) {
            let group = &mut groups[i];
            group.unmoved.base &= unmoved.base;
            group.unmoved.index &= unmoved.index;
            group.write |= access.write;
            group.low = group.low.min(offset);
            group.high = group.high.max(end);
            group.members += 1;
            return Some(i as u16);
        }
        let write = access.write;
        let (first, members, slot, hoisted) = ((number, offset), 1, None, None);
        let (low, high) = (offset, end);
        groups.push(Group { origin, write, led_by_write: write, low, high, first, members, unmoved, slot, hoisted });
        Some(groups.len() as u16 - 1)
    }

    /// The region ([`crate::windows`]) that the address is likely in, from those of what the registers held at the block's
    /// start.
    pub fn region(&self, ea: &Ea, at_start: &Regions) -> Option<u8> {
        match self.address(ea)?.0 {
            Origin::Segment { segment, .. } => Some(at_start.segment(segment)),
            Origin::Registers { base: Some(base), .. } => at_start.registers.get(base as usize).copied(),
            // A table at a low address.
            Origin::Registers { base: None, .. } => Some(0),
            Origin::Page(_) => None,
        }
    }

    /// The shared part of an address, and the distance from it.
    fn address(&self, ea: &Ea) -> Option<(Origin, i64)> {
        if (ea.narrow && self.bits == 64) || ea.bit.is_some() {
            return None;
        }
        if let Some(segment) = ea.segment {
            let short = i64::from(ea.displacement as i32) == ea.displacement;
            let plain = ea.base.is_none() && ea.index.is_none() && short;
            return plain.then_some((Origin::Segment { segment, version: self.segments }, ea.displacement));
        }
        if let Some(address) = ea.constant() {
            return Some((Origin::Page(address >> 12), (address & 0xfff) as i64));
        }
        let base = ea.base.map(|r| self.values[r as usize]);
        let index = ea.index.map(|r| self.values[r as usize]);
        let offset = base
            .map_or(0, |v| v.offset)
            .wrapping_add(index.map_or(0, |v| v.offset << ea.scale))
            .wrapping_add(ea.displacement);
        let origin = Origin::Registers { base: base.map(|v| v.origin), index: index.map(|v| (v.origin, ea.scale)) };
        // Far-off offsets cannot share a page with others; keep the arithmetic of ranges small.
        (offset.unsigned_abs() < 1 << 40).then_some((origin, offset))
    }

    /// Notes that an instruction being looked at has moved the stack pointer, between its accesses.
    pub fn adjust(&mut self, register: usize, by: i64) {
        self.values[register].offset = self.values[register].offset.wrapping_add(by);
    }

    fn forget(&mut self, register: usize) {
        self.values[register] = Value { origin: self.next, offset: 0 };
        self.next += 1;
    }

    /// Notes what `insn` does to registers.
    pub fn execute(&mut self, insn: &Insn) {
        let instruction = &insn.instruction;
        let word = i64::from(self.bits / 8);
        let wide = |i: u32| {
            let register = (instruction.op_kind(i) == OpKind::Register).then(|| instruction.op_register(i))?;
            let whole = register.is_gpr() && register.size() as i64 == word;
            whole.then(|| register.full_register() as usize - Register::RAX as usize)
        };
        let constant = || match word {
            8 => instruction.immediate(1) as i64,
            _ => i64::from(instruction.immediate(1) as i32),
        };
        match instruction.mnemonic() {
            M::Push => return self.adjust(4, -word),
            M::Pop => {
                self.adjust(4, word);
                match wide(0) {
                    Some(r) => self.forget(r),
                    None => self.forget(4),
                }
                return;
            }
            M::Leave => {
                self.values[4] = self.values[5];
                self.adjust(4, word);
                return self.forget(5);
            }
            M::Swapgs => self.segments += 1,
            M::Add | M::Sub
                if instruction.op1_kind() != OpKind::Register && instruction.op1_kind() != OpKind::Memory =>
            {
                if let Some(r) = wide(0) {
                    let by = constant();
                    return self.adjust(r, if instruction.mnemonic() == M::Add { by } else { by.wrapping_neg() });
                }
            }
            M::Inc | M::Dec => {
                if let Some(r) = wide(0) {
                    return self.adjust(r, if instruction.mnemonic() == M::Inc { 1 } else { -1 });
                }
            }
            M::Mov => {
                if let (Some(to), Some(from)) = (wide(0), wide(1)) {
                    self.values[to] = self.values[from];
                    return;
                }
            }
            M::Lea => {
                if let (Some(to), Some(value)) = (wide(0), self.lea(instruction)) {
                    self.values[to] = value;
                    return;
                }
            }
            _ => {}
        }
        for register in (0..16).filter(|r| insn.written & (1 << r) != 0) {
            self.forget(register);
        }
    }

    fn lea(&self, instruction: &Instruction) -> Option<Value> {
        let base = instruction.memory_base();
        if instruction.memory_index() != Register::None || !base.is_gpr() || base.size() as u32 * 8 != self.bits {
            return None;
        }
        let value = self.values[base.full_register() as usize - Register::RAX as usize];
        let displacement = instruction.memory_displacement64();
        let displacement = if self.bits == 64 { displacement as i64 } else { i64::from(displacement as i32) };
        Some(Value { offset: value.offset.wrapping_add(displacement), ..value })
    }

    /// Lets accesses share probes: the role of each, in order.
    pub fn roles(self) -> impl Iterator<Item = Role> {
        let shared = self.found.groups.iter_mut().filter(|g| g.members > 1).take(DELTAS);
        for (slot, group) in shared.enumerate() {
            group.slot = Some(slot as u8);
        }
        self.found.roles()
    }

    /// What can be checked before a loop, if all that was noted is its body; and the roles that this leaves.
    pub fn loop_plan(self) -> (LoopPlan, impl Iterator<Item = Role>) {
        let mut plan = LoopPlan { hoists: Vec::new(), limit: None };
        let mut slot = 0;
        for i in 0..self.found.groups.len() {
            if usize::from(slot) == DELTAS {
                break;
            }
            let group = &self.found.groups[i];
            let mut hoisted = None;
            if plan.hoists.len() < MAX_HOISTS
                && let Some(hoist) = self.hoist(group, slot, &mut plan.limit)
            {
                plan.hoists.push(hoist);
                hoisted = Some(hoist.added);
            } else if group.members == 1 {
                continue;
            }
            let group = &mut self.found.groups[i];
            (group.slot, group.hoisted) = (Some(slot), hoisted);
            slot += 1;
        }
        (plan, self.found.roles())
    }

    /// What an iteration adds to a register, if that is always the same.
    fn stride(&self, register: u32) -> Option<i64> {
        let value = self.values.get(register as usize)?;
        (value.origin == register).then_some(value.offset)
    }

    fn hoist(&self, group: &Group, slot: u8, limit: &mut Option<Limit>) -> Option<Hoist> {
        let size = (group.high - group.low) as i32;
        let ea = Ea {
            base: None,
            index: None,
            scale: 0,
            displacement: i64::from(i32::try_from(group.low).ok()?),
            segment: None,
            narrow: false,
            bit: None,
        };
        let (base, index) = match group.origin {
            Origin::Page(page) => {
                let displacement = (page << 12) as i64 + group.low;
                let ea = Ea { displacement, ..ea };
                return Some(Hoist { slot, ea, size, write: group.write, added: Parts::default(), budget: None });
            }
            Origin::Registers { base, index } => (base, index),
            Origin::Segment { .. } => return None,
        };
        let mut stride = 0;
        let mut counter = None;
        for (register, scale) in base.map(|b| (b, 0)).into_iter().chain(index) {
            let own = self.stride(register)?;
            stride += own << scale;
            if own != 0 {
                counter = Some(Limit { register: register as usize, stride: own });
            }
        }
        let number = |register: u32| register as u8;
        let (index, scale) = index.map_or((None, 0), |(index, scale)| (Some(number(index)), scale));
        let ea = Ea { base: base.map(number), index, scale, ..ea };
        // The stack pointer in its host register may be behind.
        let stays = |register: Option<u8>| {
            let still = |r: u8| self.stride(u32::from(r)) == Some(0) || planted::is(Bug::MovingPartAdded);
            register.is_some_and(|r| r != gpr::RSP as u8 && still(r))
        };
        let one_step = scale == 0 || index.is_some_and(|index| host_register(usize::from(index)).is_some());
        let added = Parts {
            base: group.unmoved.base && stays(ea.base),
            index: group.unmoved.index && stays(index) && one_step,
        };
        let hoist = Hoist { slot, ea, size, write: group.write, added, budget: None };
        if stride == 0 {
            // Nothing moves, or two registers cancel each other out.
            return Some(hoist);
        }
        if self.windowed {
            // Every iteration makes the access: it meets the guard before it is anywhere else.
            return (stride.unsigned_abs() <= WINDOW_RANGE as u64).then_some(hoist);
        }
        let by = limit.or(counter)?;
        // Bytes are counted in units of the register, exactly.
        let exact = (MIN_RATIO..=MAX_RATIO)
            .find(|&ratio| by.stride == shift(stride, ratio) && shift(by.stride, -ratio) == stride);
        if stride.unsigned_abs() > MAX_STRIDE || by.stride.unsigned_abs() > MAX_STRIDE {
            return None;
        }
        let ratio = exact?;
        *limit = Some(by);
        Some(Hoist { budget: Some(ratio), ..hoist })
    }
}

impl Groups {
    /// The role of each access, in order.
    fn roles(&self) -> impl Iterator<Item = Role> {
        self.owners.iter().enumerate().map(|(number, owner)| match owner {
            Some(owner) => self.groups[usize::from(*owner)].role(number),
            None => Role::Single,
        })
    }
}

impl Group {
    /// The first access has the probe and the others its result.
    fn role(&self, number: usize) -> Role {
        let Some(slot) = self.slot else { return Role::Single };
        let (leader, at) = self.first;
        if self.hoisted.is_some() || number != leader {
            return Role::Follower { slot, added: self.hoisted.unwrap_or_default() };
        }
        // A constant address's page is known: its own bytes are all there is to check.
        let (low, high) = match self.origin {
            Origin::Page(_) => (0, 0),
            _ if planted::is(Bug::LeaderChecksItself) => (0, 0),
            _ => ((self.low - at) as i32, (self.high - at) as i32),
        };
        Role::Leader { slot, low, high, upgrade: self.write && !self.led_by_write }
    }
}

/// `value` × 2^`by`, rounded.
fn shift(value: i64, by: i8) -> i64 {
    if by >= 0 { value << by } else { value >> -by }
}

/// Groups that are checked before a loop at most.
const MAX_HOISTS: usize = 6;
/// Bytes by which an iteration may move a group that is checked before the loop: further, and the check
/// comes too often to pay.
const MAX_STRIDE: u64 = 128;
/// Powers of two between a counting register's steps and an address's.
const MIN_RATIO: i8 = -7;
const MAX_RATIO: i8 = 7;

/// A group of accesses that is checked before a loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hoist {
    pub slot: u8,
    /// The lowest address, in terms of the registers at the start of an iteration.
    pub ea: Ea,
    /// Bytes from there.
    pub size: i32,
    pub write: bool,
    /// What the loop leaves alone of its accesses' addresses, to be added to the delta.
    pub added: Parts,
    /// For a group that moves and is probed for: the counting register may go 2^this times as far as the group to its page's end.
    pub budget: Option<i8>,
}

/// The register that tells how far a loop has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub register: usize,
    /// What an iteration adds to it; not 0.
    pub stride: i64,
}

/// How the accesses of a loop's body do without probes.
#[derive(Debug)]
pub struct LoopPlan {
    pub hoists: Vec<Hoist>,
    /// There if any of `hoists` has a budget.
    pub limit: Option<Limit>,
}
