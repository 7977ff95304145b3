//! Sharing TLB probes between the memory accesses of a block.
//!
//! Accesses whose addresses differ by constants known at translation time form a group. The first, the
//! leader, checks that the whole range of the group lies in its page, and keeps the page's *delta* (host
//! address minus linear address) in the vCPU block; the others only add that delta to their own address.
//! Reads may lead writes. Such a leader asks for a page that can be written *already*: no dirty bit is set for
//! a write that may not happen, and a page that is only read so far is a misfit. The delta stays right to the block's end: whatever changes a mapping ends the block.
//!
//! A leader whose range leaves the page, or that misfits otherwise, goes on in a twin of the block without
//! groups. A block where that happens often is translated again, with groups of one kind of access first, and
//! without any then.

use super::access::Ea;
use super::block::Insn;
use super::planted::{self, Bug};
use crate::cpu::DELTAS;
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
    /// Uses the delta in `slot`.
    Follower { slot: u8 },
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
    members: Vec<(usize, i64)>,
}

/// Tracks register values through a block.
pub struct Coalescer {
    values: [Value; 16],
    next: u32,
    segments: u32,
    groups: Vec<Group>,
    /// Reads may lead writes.
    mix: bool,
    /// Accesses go through windows: see [`crate::windows`].
    windowed: bool,
    /// Of the code: 32 or 64. Addresses and offsets in 32-bit code are meant modulo 2^32.
    bits: u32,
    count: usize,
}

impl Coalescer {
    pub fn new(mix: bool, windowed: bool, bits: u32) -> Coalescer {
        Coalescer {
            mix: mix || windowed,
            windowed,
            bits,
            values: std::array::from_fn(|i| Value { origin: i as u32, offset: 0 }),
            next: 16,
            segments: 0,
            groups: Vec::new(),
            count: 0,
        }
    }

    /// Notes the next access of the block; the registers are as before its instruction but for what
    /// [`Self::adjust`] has told.
    /// With `alone` it is in no group.
    pub fn access(&mut self, access: &Access, alone: bool) {
        let number = self.count;
        self.count += 1;
        if alone {
            return;
        }
        let Some((origin, offset)) = self.address(&access.ea) else { return };
        if matches!(origin, Origin::Page(_)) && offset + access.size as i64 > 4096 {
            return;
        }
        let end = offset + access.size as i64;
        let mix = self.mix;
        let range = if self.windowed { WINDOW_RANGE } else { RANGE };
        let fits = |g: &&mut Group| {
            g.origin == origin && (g.write || !access.write || mix) && g.high.max(end) - g.low.min(offset) <= range
        };
        if let Some(group) = self.groups.iter_mut().rev().find(fits) {
            group.write |= access.write;
            group.low = group.low.min(offset);
            group.high = group.high.max(end);
            group.members.push((number, offset));
        } else {
            let members = vec![(number, offset)];
            let write = access.write;
            self.groups.push(Group { origin, write, led_by_write: write, low: offset, high: end, members });
        }
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

    /// The role of each access, in order.
    pub fn roles(self) -> Vec<Role> {
        let mut roles = vec![Role::Single; self.count];
        let shared = self.groups.iter().filter(|g| g.members.len() > 1).take(DELTAS);
        for (slot, group) in shared.enumerate() {
            group.assign(slot as u8, &mut roles);
        }
        roles
    }

    /// What can be checked before a loop, if all that was noted is its body and anything can.
    pub fn loop_plan(self) -> Option<LoopPlan> {
        let mut plan = LoopPlan { hoists: Vec::new(), limit: None, roles: vec![Role::Single; self.count] };
        let mut slot = 0;
        for group in &self.groups {
            if usize::from(slot) == DELTAS {
                break;
            }
            if plan.hoists.len() < MAX_HOISTS
                && let Some(hoist) = self.hoist(group, slot, &mut plan.limit)
            {
                plan.hoists.push(hoist);
                for &(member, _) in &group.members {
                    plan.roles[member] = Role::Follower { slot };
                }
            } else if group.members.len() > 1 {
                group.assign(slot, &mut plan.roles);
            } else {
                continue;
            }
            slot += 1;
        }
        (!plan.hoists.is_empty()).then_some(plan)
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
                return Some(Hoist { slot, ea, size, write: group.write, budget: None });
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
        if stride == 0 {
            // Nothing moves, or two registers cancel each other out.
            return Some(Hoist { slot, ea, size, write: group.write, budget: None });
        }
        let by = limit.or(counter)?;
        if self.windowed {
            let most = stride.unsigned_abs().max(by.stride.unsigned_abs());
            let iterations = WINDOW_RANGE as u64 / most;
            if iterations < MIN_ITERATIONS {
                return None;
            }
            *limit = Some(by);
            let budget = Some(Budget::Window((iterations * by.stride.unsigned_abs()) as i32));
            return Some(Hoist { slot, ea, size, write: group.write, budget });
        }
        // Bytes are counted in units of the register, exactly.
        let exact = (MIN_RATIO..=MAX_RATIO)
            .find(|&ratio| by.stride == shift(stride, ratio) && shift(by.stride, -ratio) == stride);
        if stride.unsigned_abs() > MAX_STRIDE || by.stride.unsigned_abs() > MAX_STRIDE {
            return None;
        }
        let ratio = exact?;
        *limit = Some(by);
        Some(Hoist { slot, ea, size, write: group.write, budget: Some(Budget::Page(ratio)) })
    }
}

impl Group {
    /// Gives the first member the probe and the others its result.
    fn assign(&self, slot: u8, roles: &mut [Role]) {
        let (leader, at) = self.members[0];
        // A constant address's page is known: its own bytes are all there is to check.
        let (low, high) = match self.origin {
            Origin::Page(_) => (0, 0),
            _ if planted::is(Bug::LeaderChecksItself) => (0, 0),
            _ => ((self.low - at) as i32, (self.high - at) as i32),
        };
        roles[leader] = Role::Leader { slot, low, high, upgrade: self.write && !self.led_by_write };
        for &(member, _) in &self.members[1..] {
            roles[member] = Role::Follower { slot };
        }
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
/// Iterations after which a check pays.
const MIN_ITERATIONS: u64 = 1000;
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
    /// For a group that moves: how far the counting register may go.
    pub budget: Option<Budget>,
}

/// How far a counting register may go until a group that moves with it is checked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// 2^this times as far as the group to its page's end.
    Page(i8),
    /// This far: the group stays in its window's guard.
    Window(i32),
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
    /// There if any of `hoists` moves.
    pub limit: Option<Limit>,
    pub roles: Vec<Role>,
}
