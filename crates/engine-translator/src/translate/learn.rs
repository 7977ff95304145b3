//! What translated code tells about itself while it runs, and what is made of that: blocks are translated again.
//!
//! Samples of where the time goes find hot loops and, outside of windows, hot code; complaints find micro-TLB entries that
//! are filled too often, accesses that are elsewhere than thought, and code that has pages mapped all the time.

use super::block::{Learned, word};
use super::{BLOCK_MICROS, Key, Translator};
use crate::core::Core;
use crate::cpu::{JumpContext, MICRO_ENTRIES, MicroEntry};

/// Samples outside a loop's iterations, more than inside, after which its probes are hoisted no more.
const SAMPLES: i8 = 4;

/// Accesses to other regions than thought after which one is looked into ...
const REGION_BUDGET: i32 = 256;
/// ... and translated anew, if they come faster than one in this many TSC ticks.
const REGION_TICKS: u64 = 500;
/// How often a block must be where pages are mapped fast, in so many seconds, until it is probed.
const SUSPICIONS: u32 = 32;
const SUSPICION_SECONDS: u64 = 2;
/// Blocks that a hot one's jumps lead to, and that are hot with it.
const HOT_NEIGHBOURS: usize = 32;

/// What has been learned of a block.
#[derive(Clone, Default)]
pub(super) struct Lesson {
    /// Reads that lead writes do not pay; nor do any shared probes.
    pub(super) unmixed: bool,
    pub(super) uncoalesced: bool,
    /// A loop that samples met; one of them that hoisted probes do not pay for.
    pub(super) hot_loop: bool,
    pub(super) short_loop: bool,
    /// Samples met it, or a neighbour: its accesses have micro-TLB entries. Or they should not.
    pub(super) hot: bool,
    pub(super) cold: bool,
    /// In which regions accesses are, by offset in the block, if not where their registers pointed at first.
    pub(super) regions: Learned,
}

impl Lesson {
    /// Whether a block in windows is not as it would be without this.
    pub(super) fn changes_code(&self) -> bool {
        let Lesson { unmixed, uncoalesced, hot_loop, short_loop, hot: _, cold, regions } = self;
        *unmixed || *uncoalesced || *hot_loop || *short_loop || *cold || !regions.is_empty()
    }
}

impl Translator {
    fn lesson(&mut self, key: Key) -> &mut Lesson {
        self.lessons.entry(key).or_default()
    }

    fn learned(&self, key: Key, what: impl Fn(&Lesson) -> bool) -> bool {
        self.lessons.get(&key).is_some_and(what)
    }

    /// Learns from where translated code was interrupted: a loop that is met there gets its probes hoisted,
    /// and one that is met mostly outside its iterations, because they are few, loses that again.
    pub(super) fn sample(&mut self, core: &mut Core) {
        let at = std::mem::take(&mut core.cpu.translated[word::SAMPLE]);
        let (Some(offset), Some(id)) = (self.code.offset_of(at), self.block_at(at)) else { return };
        let id = id as usize;
        let block = &mut self.blocks[id];
        let key = block.key;
        // Kernels run the same code for many stacks and objects: their accesses don't stay on a page.
        let user = matches!(key.context.jumps, JumpContext::User | JumpContext::User32);
        if user && block.alive && !block.about.hot && !self.learned(key, |lesson| lesson.cold) && self.may_heat(core) {
            self.heat(core, id as u32);
            core.sample_period = Core::SAMPLE_PERIODS.start;
        } else {
            core.sample_period = (core.sample_period * 2).min(Core::SAMPLE_PERIODS.end);
        }
        let short_loop = self.learned(key, |lesson| lesson.short_loop);
        let block = &mut self.blocks[id];
        if block.about.hoistable && block.about.fast.is_none() && !short_loop {
            self.lesson(key).hot_loop = true;
            return self.kill(core, id as u32);
        }
        if !block.alive || !block.about.hoistable || short_loop {
            return;
        }
        let Some((from, to)) = block.about.fast else { return };
        let offset = offset as u32 - block.start;
        if offset >= from && offset < to {
            block.samples = (block.samples + 1).min(SAMPLES);
        } else {
            block.samples -= 1;
            if block.samples <= -SAMPLES {
                let lesson = self.lesson(key);
                (lesson.hot_loop, lesson.short_loop) = (false, true);
                self.kill(core, id as u32);
            }
        }
    }

    /// The access of the instruction at `rip`, of block `id`, was in another region than thought, and that has been so often
    /// that it may be worth a new translation.
    pub(super) fn learn_region(&mut self, core: &mut Core, id: u32, rip: u64) {
        core.cpu.region_budget = REGION_BUDGET;
        let now = core.tsc();
        if now.wrapping_sub(std::mem::replace(&mut self.learned, now)) > REGION_BUDGET as u64 * REGION_TICKS {
            return;
        }
        let region = core.cpu.translated[word::REGION] as u8;
        self.guess = region;
        let key = self.blocks[id as usize].key;
        let at = rip.wrapping_sub(key.rip) as u16;
        let known = &mut self.lesson(key).regions;
        match known.iter_mut().find(|(other, _)| *other == at) {
            Some((_, known)) => *known = None,
            None => known.push((at, Some(region))),
        }
        self.kill(core, id);
    }

    /// The block with host code `at` has had a page mapped while many were. Programs that start do that; where it is always
    /// the same block, that is translated with probes.
    pub(super) fn close_windows(&mut self, core: &mut Core, at: u64) {
        let Some(id) = self.block_at(at) else { return };
        let key = self.blocks[id as usize].key;
        let now = core.tsc();
        if now.wrapping_sub(self.suspected) > SUSPICION_SECONDS * 1000 * core.vm.tsc_khz {
            self.suspected = now;
            self.suspects.clear();
        }
        let suspicions = self.suspects.entry(key).or_default();
        *suspicions += 1;
        if *suspicions >= SUSPICIONS {
            self.lesson(key).cold = true;
            self.kill(core, id);
        }
    }

    /// The block that host address `at` belongs to.
    fn block_at(&self, at: u64) -> Option<u32> {
        let offset = self.code.offset_of(at)?;
        let i = self.blocks.partition_point(|b| b.start as usize <= offset);
        i.checked_sub(1).map(|i| i as u32)
    }

    /// Has `id` and what its jumps lead to translated again, as hot ones.
    fn heat(&mut self, core: &mut Core, id: u32) {
        let mut found = vec![id];
        let mut next = 0;
        while next < found.len() && found.len() < HOT_NEIGHBOURS {
            for exit in self.blocks[found[next] as usize].exits.clone() {
                if let Some(to) = self.exits[exit as usize].linked
                    && !found.contains(&to)
                {
                    found.push(to);
                }
            }
            next += 1;
        }
        for id in found {
            let block = &self.blocks[id as usize];
            if block.alive && !block.about.hot && !block.key.alone && !self.learned(block.key, |lesson| lesson.cold) {
                let key = block.key;
                self.lesson(key).hot = true;
                self.kill(core, id);
            }
        }
    }

    /// Has the block whose micro-TLB entry this is translated again, without such entries.
    pub(super) fn cool(&mut self, core: &mut Core, entry: usize) {
        let Some(&key) = self.micro_owners.get(entry) else { return };
        let lesson = self.lesson(key);
        (lesson.hot, lesson.cold) = (false, true);
        if let Some(&id) = self.index.get(&key) {
            self.kill(core, id);
        }
    }

    /// Takes the micro-TLB entries away from all blocks: there are too few for another one.
    pub(super) fn recycle_micro(&mut self, core: &mut Core) {
        for key in std::mem::take(&mut self.micro_owners) {
            if let Some(&id) = self.index.get(&key) {
                self.kill(core, id);
            }
        }
        self.lessons.values_mut().for_each(|lesson| lesson.hot = false);
        self.recycled = core.tsc();
        core.cpu.micro = [MicroEntry::empty(core.cpu.micro_nowhere, 0); MICRO_ENTRIES];
    }

    pub(super) fn is_micro_full(&self) -> bool {
        self.micro_owners.len() + BLOCK_MICROS > MICRO_ENTRIES
    }

    /// Whether there are micro-TLB entries for another hot block. Where very much is hot, a second's first
    /// get them: translating again costs more than they save.
    fn may_heat(&mut self, core: &mut Core) -> bool {
        if self.is_micro_full() {
            if core.tsc().wrapping_sub(self.recycled) < core.vm.tsc_khz * 1000 {
                return false;
            }
            self.recycle_micro(core);
        }
        true
    }
}
