//! Blocks of the same code at other linear addresses.
//!
//! A program or library that is mapped again, by the next process at a random address, would be translated again only to
//! change some constants: addresses relative to RIP and return addresses, in code and in exits. Where a block's translation
//! has noted all of them ([`block::Moving`]), it is copied instead. What linking and signals have changed in the original is put
//! back in the copy, which is a block of its own from then on.
//!
//! - Only blocks in windows are moved: they have no TLB index made from an address.
//! - Constants must be as long as before, so nothing is moved to or from low addresses.
//! - What samples and misfits have told about a block is kept by its own address: such a block is translated.

use super::block::{BlockExit, Constant, ExitKind};
use super::learn::Lesson;
use super::pool::List;
use super::{About, CODE_RESERVE, Context, Exit, Key, LINK_RESERVE, Translator, access, assembler};
use crate::core::Core;
use crate::cpu::LINKS;
use crate::windows::REGION_BITS;

/// Most blocks that are moved at once.
const COMPANY: usize = 16;

/// The places in a block's code that depend on where the block is: in linear memory, and in code memory.
#[derive(Clone, Copy)]
pub(super) struct Moving {
    pub(super) constants: List<Constant>,
    /// 32-bit numbers of exits.
    pub(super) numbers: List<u32>,
}

/// What blocks have in common that differ only in their linear addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    gpa: u64,
    context: Context,
    alone: bool,
}

impl Place {
    pub(super) fn of(key: &Key) -> Place {
        Place { gpa: key.gpa, context: key.context, alone: key.alone }
    }
}

impl Translator {
    /// The block for `key`, made from one of the same code at another linear address: where a program or library is
    /// mapped again, translating it again would only change some constants. What the other is linked to on its page comes along,
    /// linked too: an exit for each would cost more.
    pub(super) fn moved(&mut self, core: &mut Core, key: Key) -> Option<u32> {
        let (first, original) = self.moved_alone(core, key)?;
        let mut waiting = [(first, original); COMPANY];
        let mut known = 1;
        let mut next = 0;
        while next < known {
            let (block, original) = waiting[next];
            next += 1;
            let exits = self.blocks[block as usize].exits.clone();
            for (exit, old) in exits.zip(self.blocks[original as usize].exits.clone()) {
                let ExitKind::Direct { target } = self.exits[exit as usize].kind else { continue };
                let linked = |exit: u32| self.exits[exit as usize].linked.is_some();
                if target >> 12 != key.rip >> 12 || linked(exit) || !linked(old) {
                    continue;
                }
                let there = Key { gpa: key.gpa & !0xfff | target & 0xfff, rip: target, ..key };
                let found = self.index.get(&there).copied();
                let found = found.or_else(|| {
                    let moved = (known < COMPANY).then(|| self.moved_alone(core, there))??;
                    waiting[known] = moved;
                    known += 1;
                    Some(moved.0)
                });
                if let Some(found) = found {
                    self.link(core, exit, found);
                }
            }
        }
        Some(first)
    }

    /// The block for `key`, and the one that it was made from.
    fn moved_alone(&mut self, core: &mut Core, key: Key) -> Option<(u32, u32)> {
        let &old = self.movable.get(&Place::of(&key))?;
        let full = self.used + CODE_RESERVE > self.room || self.links.len() + LINK_RESERVE > LINKS;
        let plain = core.debugger.breakpoints().is_empty() && core.has_windows();
        if full || !plain || self.lessons.get(&key).is_some_and(Lesson::changes_code) {
            return None;
        }
        let block = &self.blocks[old as usize];
        let moving = block.about.moving?;
        let by = key.rip.wrapping_sub(block.key.rip);
        // Shorter constants would have shorter instructions.
        if by & 0xfff != 0 || key.rip >> REGION_BITS == 0 {
            return None;
        }
        let (about, start, exits) = (block.about, block.start, block.exits.clone());
        let mut code = std::mem::take(&mut self.moved_code);
        self.code.read_into(start as usize, block.length as usize, &mut code);
        let fits = self.lists.constants.get(moving.constants).iter().all(|constant| constant.moved(by, &mut code))
            && self.crossing_moved(
                core,
                key,
                about.next_page,
                &self.exits[exits.start as usize..exits.end as usize],
                &mut code,
            );
        let next = self.exits.len() as u32;
        for &at in self.lists.numbers.get(moving.numbers) {
            let place = &mut code[at as usize..][..4];
            let number = u32::from_le_bytes((&*place).try_into().expect("4 bytes")) - exits.start + next;
            place.copy_from_slice(&number.to_le_bytes());
        }
        let mut moved_exits = std::mem::take(&mut self.moved_exits);
        moved_exits.clear();
        let exits = self.exits[exits.start as usize..exits.end as usize].iter();
        moved_exits.extend(exits.map(|exit| exit.moved(start, by, &mut code)));
        let id = fits.then(|| self.place(core, key, &mut code, &mut moved_exits, About { hot: true, ..about }));
        self.statistics.moved += u64::from(fits);
        (self.moved_code, self.moved_exits) = (code, moved_exits);
        Some((id?, old))
    }

    /// Whether `code` at `key` goes on in page `next_page`, if it has an instruction that runs over the end of its first one. Notes
    /// in it that this was looked up now.
    fn crossing_moved(
        &self,
        core: &mut Core,
        key: Key,
        next_page: Option<u64>,
        exits: &[Exit],
        code: &mut [u8],
    ) -> bool {
        if next_page.is_none() {
            return true;
        }
        for exit in exits {
            if let ExitKind::Recheck { patch } = exit.kind {
                let generation = core.cpu.code_generation[key.context.jumps.generation()];
                code[patch as usize..][..4].copy_from_slice(&generation.wrapping_neg().to_le_bytes());
            }
        }
        self.next_page(core, key.rip).map(|(gpa, _)| gpa >> 12) == next_page
    }
}

impl Constant {
    /// Changes it in `code`, for a place that is `by` further. `false` if it would have another length there.
    fn moved(&self, by: u64, code: &mut [u8]) -> bool {
        let place = &mut code[self.at as usize..][..8];
        let value = u64::from_le_bytes((&*place).try_into().expect("8 bytes"));
        let value = if self.negated { value.wrapping_neg() } else { value };
        let new = value.wrapping_add(by);
        if new >> REGION_BITS == 0 || new >> 47 != 0 {
            return false;
        }
        place.copy_from_slice(&(if self.negated { new.wrapping_neg() } else { new }).to_le_bytes());
        if let Some(at) = self.region {
            let assembler::Rm::Gs(place) = access::region_place((new >> REGION_BITS) as u8) else {
                unreachable!("in the block")
            };
            code[at as usize..][..4].copy_from_slice(&place.to_le_bytes());
        }
        true
    }
}

impl Exit {
    /// The same exit of the block `code`, which was at `start` and is now `by` further in linear memory; puts what
    /// linking and signals have changed in it back.
    fn moved(&self, start: u32, by: u64, code: &mut [u8]) -> BlockExit {
        let site = self.site - start;
        let mut leads = |to: u32| {
            let displacement = to.wrapping_sub(site + 4);
            code[site as usize..][..4].copy_from_slice(&displacement.to_le_bytes());
        };
        let kind = match self.kind {
            ExitKind::Direct { target } => {
                leads(self.stub - start);
                ExitKind::Direct { target: target.wrapping_add(by) }
            }
            ExitKind::Loop { target, inside } => {
                leads(inside);
                ExitKind::Loop { target: target.wrapping_add(by), inside }
            }
            ExitKind::Far { target, context, .. } => {
                ExitKind::Far { target: target.wrapping_add(by), context, link: 0 }
            }
            ExitKind::Interpret { rip } => ExitKind::Interpret { rip: rip.wrapping_add(by) },
            ExitKind::Recheck { patch } => ExitKind::Recheck { patch },
            ExitKind::Indirect { rip, stack, cut } => {
                code[cut.at as usize..][..2].copy_from_slice(&cut.whole);
                ExitKind::Indirect { rip: rip.wrapping_add(by), stack, cut }
            }
        };
        BlockExit { kind, site, stub: self.stub - start }
    }
}
