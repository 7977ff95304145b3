//! The binary translator: guest code to host code, kept and linked.
//!
//! A [`Translator`] belongs to one vCPU thread. Its blocks are found by physical address, linear address
//! and context, so they survive changes of address space; the jump caches in the vCPU block are indexed by
//! linear address and are emptied when the meaning of linear addresses changes. A direct jump within a page
//! is patched to go straight to its target; one to another page goes through a link, which is emptied likewise;
//! everything else probes the jump cache.
//!
//! Code memory is never reclaimed piecemeal: when it is full, everything goes.

mod access;
mod assembler;
mod block;
mod classify;
mod coalesce;
mod control;
mod encoding;
mod enter;
mod facts;
pub mod fault;
mod flags;
mod learn;
mod loops;
mod moving;
pub mod planted;
mod pool;
mod rename;
mod return_stack;
mod sensitive;
mod stack;
mod strings;
#[cfg(test)]
mod tests;
mod twins;

use crate::code_memory::CodeMemory;
use crate::core::{Core, Notice};
use crate::cpu::{
    CLOSED, Cpu, JUMP_CACHE_ENTRIES, JUMP_CONTEXTS, JumpContext, LINKS, MICRO_ENTRIES, MicroEntry, Mode, TlbContext,
};
use crate::hash::AddressMap;
use crate::interpret::{self, Step};
use crate::ram::Page;
use crate::system;
use crate::timer;
use crate::vendor;
use crate::windows::REGION_BITS;
use anyvisor_engine::tally::event;
use anyvisor_engine::{GuestIo, Result};
use anyvisor_x86::bits::{cr0, cr4, gpr, rflags, xcr0};
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{Cpuid, Exception, Segment};
use block::{BlockExit, Constant, Context, ExitKind, Source, Thunk, word};
use classify::Features;
use coalesce::Regions;
use enter::{EXIT_ELSEWHERE, EXIT_FAULT, EXIT_INDIRECT, Thunks};
use learn::Lesson;
use moving::{Moving, Place};
use planted::Bug;
use pool::{List, Pool};
use return_stack::ReturnStack;
use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::atomic::Ordering;
pub use twins::Twins;

/// Bytes of code memory per vCPU.
const CODE_SIZE: usize = 128 << 20;
/// Left free so that the largest block fits.
const CODE_RESERVE: usize = 64 << 10;
/// Links left free so that the largest block fits.
const LINK_RESERVE: usize = 256;
/// Code is tracked for writes in granules of this many bytes, 64 to a page.
const GRANULE: u64 = 64;
/// Writes to the code of a page after which all of it is dropped, so that further ones are just writes.
const MAX_CODE_WRITES: u32 = 64;
/// Misfits of a block with shared probes after which it is translated with fewer ...
const MAX_MISFITS: u32 = 64;
/// ... if they come faster than one in this many TSC ticks; rarer ones cost less than shared probes save.
const MISFIT_TICKS: u64 = 2_000;

/// Micro-TLB entries that a block can have.
const BLOCK_MICROS: usize = 24;
/// Translations after which eager translation takes all micro-TLB entries away.
const EAGER_RECYCLE: u64 = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    gpa: u64,
    rip: u64,
    context: Context,
    /// Every access has a probe of its own: for going on where a shared probe does not fit.
    alone: bool,
}

struct Block {
    key: Key,
    /// Offset of the host code, and its length.
    start: u32,
    length: u32,
    exits: std::ops::Range<u32>,
    /// Exits of blocks that are linked to this one.
    incoming: Vec<u32>,
    alive: bool,
    /// How often a shared probe has been in vain, and the TSC at the first of them.
    misfits: u32,
    first_misfit: u64,
    /// How much more often samples met the iterations of a loop than its check.
    samples: i8,
    about: About,
}

/// What is known of a block's code wherever it is.
#[derive(Clone, Copy)]
struct About {
    /// Host positions in it, ascending, with the offset of the guest instruction they belong to.
    map: List<(u32, u16)>,
    /// Bytes of the page that it was made from: offset and length.
    ranges: List<(u16, u16)>,
    /// Where the rest of an instruction that runs over the page's end was: guest-physical page.
    next_page: Option<u64>,
    /// Some accesses share a probe.
    coalesced: bool,
    /// It is a loop whose probes could be hoisted; where they are, the host code of its iterations.
    hoistable: bool,
    fast: Option<(u32, u32)>,
    /// It is translated as a hot one.
    hot: bool,
    /// Positions of calls of thunks.
    thunk_calls: List<(u32, Thunk)>,
    /// What it takes to make the same for another linear address.
    moving: Option<Moving>,
}

/// The lists of all blocks.
#[derive(Default)]
struct Lists {
    maps: Pool<(u32, u16)>,
    ranges: Pool<(u16, u16)>,
    constants: Pool<Constant>,
    numbers: Pool<u32>,
    thunk_calls: Pool<(u32, Thunk)>,
}

struct Exit {
    kind: ExitKind,
    /// Offsets in code memory.
    site: u32,
    stub: u32,
    block: u32,
    linked: Option<u32>,
}

impl Lists {
    fn clear(&mut self) {
        self.maps.clear();
        self.ranges.clear();
        self.constants.clear();
        self.numbers.clear();
        self.thunk_calls.clear();
    }
}

/// The translated code of one guest-physical page.
#[derive(Default)]
struct CodePage {
    blocks: Vec<u32>,
    /// Granules that blocks were made from.
    granules: u64,
    /// Where blocks start, in steps of 4 bytes: most jumps lead where there is none yet.
    starts: [u64; 16],
    /// Writes that hit them.
    hits: u32,
}

impl CodePage {
    /// The word of `starts` for what starts at `offset`, and the bit in it.
    fn start(offset: u64) -> (usize, u64) {
        let number = (offset & 0xfff) / 4;
        ((number / 64) as usize, 1 << (number % 64))
    }

    /// Whether a block may start at `offset`.
    fn may_start(&self, offset: u64) -> bool {
        let (word, bit) = CodePage::start(offset);
        self.starts[word] & bit != 0
    }
}

/// How control comes to a block that is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Via {
    /// By an indirect jump, or from Rust: the jump cache will know the block.
    Jump,
    /// By a jump that can be linked to it.
    Link,
    /// By a shared probe that did not fit: the block without them is wanted.
    Misfit,
}

/// Counts of what the translator did; see [`Translator::statistics`].
#[derive(Default)]
struct Statistics {
    blocks: u64,
    moved: u64,
    exits: u64,
    links: u64,
    interpreted: HashMap<iced_x86::Mnemonic, u64>,
    faults: u64,
    invalidated: u64,
    flushes: u64,
}

pub struct Translator {
    code: CodeMemory,
    /// Bytes of code memory that may be used.
    room: usize,
    used: usize,
    thunks: Thunks,
    thunk_bytes: usize,
    return_stack: ReturnStack,
    /// Whose calls are on it: [`JumpContext::returns`].
    returns: u8,
    features: Features,
    workspace: block::Workspace,
    /// A copy of the page at a guest-physical address, which is protected: the last one that a block was made from.
    page: Option<(u64, Vec<u8>)>,
    /// The region that accesses have been in lately when they were not where they were thought to be.
    guess: u8,
    blocks: Vec<Block>,
    /// Where each block's code starts.
    starts: Vec<u32>,
    lists: Lists,
    exits: Vec<Exit>,
    index: AddressMap<Key, u32>,
    /// The last block that can be moved, by where its code is in guest-physical memory.
    movable: AddressMap<Place, u32>,
    pages: AddressMap<u64, CodePage>,
    /// The link to each target of jumps to other pages, by the context of the code there.
    links: AddressMap<(JumpContext, u64), u32>,
    /// What has been learned of blocks.
    lessons: AddressMap<Key, Lesson>,
    /// How often blocks had pages mapped too fast.
    suspects: AddressMap<Key, u32>,
    /// Since when they are counted.
    suspected: u64,
    /// When something about regions was learned last.
    learned: u64,
    /// When all micro-TLB entries were taken away last.
    recycled: u64,
    /// Whose each micro-TLB entry is.
    micro_owners: Vec<Key>,
    /// Treat every block as a hot one, and hoist the probes of every loop.
    eager: bool,
    /// Memory for blocks that are moved.
    moved_code: Vec<u8>,
    moved_exits: Vec<BlockExit>,
    /// Counts the times everything was dropped.
    generation: u64,
    /// What of the last context the jump caches do not tell apart: FPU, AVX, SMAP, FSGSBASE; and CR4.TSD.
    hidden: (bool, bool, bool, bool),
    tsc_denied: bool,
    /// Which block is behind each entry of the jump caches, as far as this vCPU remembers.
    jump_blocks: Box<[u32]>,
    statistics: Statistics,
    /// The thread that is attached.
    thread: libc::pid_t,
    /// Count interpreted instructions by mnemonic.
    count: bool,
}

impl Translator {
    /// A translator for a vCPU that shows `cpuid`.
    ///
    /// # Errors
    /// When the host refuses memory for code.
    pub fn new(cpuid: &Cpuid) -> Result<Translator> {
        let mut code = CodeMemory::new(CODE_SIZE)?;
        let (bytes, thunks) = enter::generate();
        code.write(0, &bytes);
        let thunk_bytes = bytes.len().next_multiple_of(64);
        Ok(Translator {
            code,
            room: CODE_SIZE,
            used: thunk_bytes,
            thunks,
            thunk_bytes,
            return_stack: ReturnStack::new()?,
            returns: 0,
            features: Features::new(cpuid),
            workspace: block::Workspace::default(),
            page: None,
            guess: 0,
            blocks: Vec::new(),
            starts: Vec::new(),
            lists: Lists::default(),
            exits: Vec::new(),
            index: AddressMap::default(),
            movable: AddressMap::default(),
            pages: AddressMap::default(),
            links: AddressMap::default(),
            lessons: AddressMap::default(),
            suspects: AddressMap::default(),
            suspected: 0,
            learned: 0,
            recycled: 0,
            micro_owners: Vec::new(),
            eager: false,
            moved_code: Vec::new(),
            moved_exits: Vec::new(),
            generation: 0,
            hidden: (false, false, false, false),
            tsc_denied: false,
            jump_blocks: vec![0; JUMP_CONTEXTS * JUMP_CACHE_ENTRIES].into_boxed_slice(),
            statistics: Statistics::default(),
            thread: 0,
            count: tracing::enabled!(tracing::Level::DEBUG),
        })
    }

    /// Whether to translate everything as hot code from now on, not just what samples meet: for tests.
    pub fn translate_eagerly(&mut self, eager: bool) {
        self.eager = eager;
    }

    /// From now on code memory has room for blocks of `bytes`, more or less, before it is full.
    #[cfg(test)]
    pub fn leave_room(&mut self, bytes: usize) {
        self.room = self.thunk_bytes + CODE_RESERVE + bytes;
    }

    /// Tells the signal handler about this translator for as long as this thread runs it. GS must already
    /// point at the vCPU block.
    ///
    /// # Errors
    /// When the host refuses a signal stack.
    pub fn attach(&mut self, core: &mut Core) -> Result<()> {
        self.thread = timer::attach_thread();
        let code_start = self.code.address(0);
        self.return_stack.attach(&mut core.cpu, return_stack::no_return(code_start, &self.thunks))?;
        core.cpu.unlinked = self.code.address(self.thunks.unlinked);
        core.twins.fault = self.code.address(self.thunks.fault);
        let guard = self.return_stack.guard();
        fault::set_running(Some(fault::Running {
            code_start,
            code_end: code_start + self.code.length() as u64,
            fault: self.code.address(self.thunks.fault),
            cpu: std::ptr::from_mut::<Cpu>(&mut core.cpu),
            guard_start: guard.start,
            guard_end: guard.end,
            writable: self.code.writable(),
        }));
        Ok(())
    }

    /// Undoes [`Self::attach`].
    pub fn detach(&mut self) {
        fault::set_running(None);
        self.return_stack.detach();
    }

    /// Executes guest code until something is pending, the vCPU halts, or it shuts down.
    pub fn run(&mut self, core: &mut Core, io: &dyn GuestIo) -> Step {
        core.shared.set_running(self.thread);
        let step = self.run_until_pending(core, io);
        core.shared.set_running(0);
        step
    }

    fn run_until_pending(&mut self, core: &mut Core, io: &dyn GuestIo) -> Step {
        while core.cpu.pending.load(Ordering::Relaxed) == 0 && !core.cpu.halted && !core.cpu.wait_for_sipi {
            if let Step::Shutdown = self.advance(core, io) {
                return Step::Shutdown;
            }
        }
        Step::Done
    }

    /// Runs translated code once, or interprets one instruction.
    fn advance(&mut self, core: &mut Core, io: &dyn GuestIo) -> Step {
        // The frame of an interrupt or exception may have gone over code.
        self.apply_code_writes(core);
        if core.cpu.translated[word::SAMPLE] != 0 {
            self.sample(core);
        }
        if let Some(entry) = core.micro_complaint.take() {
            self.cool(core, entry);
        }
        let Some(context) = self.context(core) else {
            return self.interpret(core, io);
        };
        let block = match self.find(core, context, Via::Jump) {
            Ok(Some(block)) => block,
            Ok(None) => return self.interpret(core, io),
            Err(exception) => return system::deliver_exception(core, io, exception),
        };
        if let Some(at) = core.windows.take_complaint() {
            self.close_windows(core, at);
            return Step::Done;
        }
        core.fill_awaited();
        if core.windows.take_thrashing() {
            tracing::debug!("a program uses more scattered pages than can be mapped: no windows from now on");
            core.windows.allow(false);
            self.flush(core);
            return Step::Done;
        }
        let mut next = block;
        loop {
            let Some(exit) = self.enter(core, next) else { return Step::Done };
            self.statistics.exits += 1;
            if exit == EXIT_FAULT {
                let (block, rip) = self.guest_position(core.cpu.translated[word::FAULT]);
                core.cpu.rip = rip;
                self.statistics.faults += 1;
                let misfit = std::mem::take(&mut core.cpu.translated[word::MISFIT]) != 0;
                let generation = self.generation;
                if misfit
                    && self.blocks[block as usize].about.coalesced
                    && let Ok(Some(found)) = self.find(core, context, Via::Misfit)
                {
                    // Making a block may have dropped all others.
                    if self.generation == generation {
                        self.misfit(core, block, found);
                    }
                    next = found;
                    continue;
                }
                return self.interpret(core, io);
            }
            if exit == EXIT_ELSEWHERE {
                let (block, rip) = self.guest_position(core.cpu.translated[word::FAULT]);
                core.cpu.rip = rip;
                self.learn_region(core, block, rip);
                return self.interpret(core, io);
            }
            if exit == EXIT_INDIRECT {
                core.cpu.rip = core.cpu.translated[word::TARGET];
                return Step::Done;
            }
            let mut via = Via::Jump;
            match self.exits[exit as usize].kind {
                ExitKind::Interpret { rip } => {
                    core.cpu.rip = rip;
                    return self.interpret(core, io);
                }
                ExitKind::Recheck { patch } => {
                    self.recheck(core, exit, patch);
                    return Step::Done;
                }
                ExitKind::Indirect { rip, stack, .. } => {
                    core.cpu.rip = core.cpu.translated[word::TARGET];
                    if context.bits() == 64 && !is_canonical(core.cpu.rip) {
                        core.cpu.rip = rip;
                        let rsp = &mut core.cpu.gpr[gpr::RSP];
                        *rsp = rsp.wrapping_add(stack as u64);
                        // Not by interpreting it: a CALL's push may have overwritten its operand.
                        return system::deliver_exception(core, io, Exception::gp(0));
                    }
                }
                ExitKind::Direct { target } | ExitKind::Loop { target, .. } | ExitKind::Far { target, .. } => {
                    core.cpu.rip = target;
                    via = Via::Link;
                }
            }
            if context.bits() == 32 {
                core.cpu.rip &= 0xffff_ffff;
            }
            if core.cpu.pending.load(Ordering::Relaxed) != 0 {
                return Step::Done;
            }
            // The exit may have led to other rights: SYSCALL, SYSRET, STAC.
            let Some(context) = self.context(core) else { return Step::Done };
            let generation = self.generation;
            match self.find(core, context, via) {
                Ok(Some(found)) => {
                    if self.generation == generation {
                        self.link(core, exit, found);
                    }
                    next = found;
                }
                Ok(None) => return self.interpret(core, io),
                Err(exception) => return system::deliver_exception(core, io, exception),
            }
        }
    }

    /// The context to translate for. The jump caches know only a part of it, so they are emptied when
    /// another part changes.
    fn context(&mut self, core: &mut Core) -> Option<Context> {
        let context = translatable(core)?;
        let hidden = (context.fpu, context.avx, context.smap, context.fsgsbase);
        if hidden != self.hidden {
            self.hidden = hidden;
            core.flush_jumps();
        }
        // RDTSC depends on CPL too, which the caches do tell apart.
        let denied = core.cpu.cr4 & cr4::TSD != 0;
        if denied != self.tsc_denied {
            self.tsc_denied = denied;
            core.flush_jumps();
        }
        Some(context)
    }

    /// Interprets one instruction and acts on what it did to translated code.
    pub fn interpret(&mut self, core: &mut Core, io: &dyn GuestIo) -> Step {
        if self.count {
            self.note_interpreted(core);
        }
        let step = interpret::step_watched(core, io);
        self.apply_code_writes(core);
        step
    }

    /// Drops the translations of code that Rust has written over, and tells other vCPUs that have some. They need not know at
    /// once: a processor executes what another has written after it has serialized itself (SDM vol. 3A 9.1.3), and all that does
    /// so leaves translated code.
    fn apply_code_writes(&mut self, core: &mut Core) {
        if !core.code_writes.is_empty() {
            let began = core.meter.start();
            for (gpa, length) in std::mem::take(&mut core.code_writes) {
                let owners = core.ram.page(gpa).map_or(0, Page::code_owners);
                if owners & !core.bit() != 0 {
                    core.tell_others(owners, Notice::CodeWritten(gpa, length), false);
                }
                self.code_written(core, gpa, u64::from(length));
            }
            core.meter.stop(began, event::INVALIDATION);
        }
    }

    /// Acts on what others have told this vCPU.
    pub fn notice(&mut self, core: &mut Core, notices: &[Notice]) {
        let began = core.meter.start();
        for &notice in notices {
            match notice {
                Notice::CodeWritten(gpa, length) => self.code_written(core, gpa, u64::from(length)),
                Notice::CodeMade(gpa) => core.take_write_tags(gpa),
            }
        }
        core.meter.stop(began, event::INVALIDATION);
    }

    fn note_interpreted(&mut self, core: &mut Core) {
        let mut bytes = [0; 15];
        let rip = core.cpu.rip.wrapping_add(if core.cpu.is_long_mode() { 0 } else { core.cpu.seg[index::CS].base });
        if let Ok(n) = core.fetch(rip, &mut bytes) {
            let bits = core.cpu.mode().bits();
            let mnemonic = vendor::decoder(bits, &bytes[..n], rip).decode().mnemonic();
            *self.statistics.interpreted.entry(mnemonic).or_default() += 1;
        }
    }

    /// Runs from the start of `block`; returns the number of the exit taken. `None` if something is pending: `block` may even be
    /// out of date.
    fn enter(&mut self, core: &mut Core, block: u32) -> Option<u32> {
        if self.blocks[block as usize].key.context.jumps == JumpContext::User {
            core.settle_windows();
        }
        timer::set_entered(true);
        if !core.shared.enter() {
            timer::set_entered(false);
            return None;
        }
        core.cpu.translated[word::ENTER] = self.code.address(self.blocks[block as usize].start as usize);
        core.cpu.rflags &= !rflags::RF;
        let jumps = self.blocks[block as usize].key.context.jumps;
        if jumps.bits() == 32 {
            prepare_32(&mut core.cpu);
        }
        if self.returns != jumps.returns() {
            self.returns = jumps.returns();
            core.cpu.return_stack = core.cpu.return_stack_base;
        }
        let upper = core.cpu.ymm.iter().fold(0, |all, r| all | u128::from_ne_bytes(r.0[16..].try_into().unwrap()));
        core.cpu.upper_halves = u8::from(upper != 0);
        core.cpu.translated[word::CORE] = std::ptr::from_mut(core) as u64;
        fault::set_tables(fault::Tables { blocks: &raw const *self.blocks, exits: &raw const *self.exits });
        let exit;
        // SAFETY: the thunk is a sysv64 function without arguments. GS points at this core's vCPU block
        // (`attach`), whose words say where to go; translated code reaches only the block, guest RAM by
        // checked addresses, and `tlb_miss`, which uses `core` while nothing else here does.
        unsafe {
            let enter: extern "sysv64" fn() -> u32 =
                std::mem::transmute(self.code.address(self.thunks.enter) as *const ());
            exit = enter();
        }
        timer::set_entered(false);
        core.shared.leave();
        Some(exit)
    }

    /// The block for the current RIP, made if need be. `None` if the code there is not in RAM.
    fn find(&mut self, core: &mut Core, context: Context, via: Via) -> std::result::Result<Option<u32>, Exception> {
        let rip = core.cpu.rip;
        let alone = via == Via::Misfit;
        let place = context.jumps as usize * JUMP_CACHE_ENTRIES + (rip as usize & (JUMP_CACHE_ENTRIES - 1));
        if !alone && let Some(block) = self.find_in_jump_cache(core, context, place) {
            return Ok(Some(block));
        }
        let (gpa, host) = core.fetch_page(rip)?;
        let Some(host) = host else { return Ok(None) };
        let key = Key { gpa, rip, context, alone };
        let known = self.index.get(&key).copied();
        let block = match known.or_else(|| self.moved(core, key)) {
            Some(block) => block,
            None => {
                let generation = self.generation;
                core.protect_code_page(gpa);
                let page = self.copy_of_page(gpa, host);
                let began = core.meter.start();
                let block = self.translate(core, key, page.as_slice().try_into().expect("a page"));
                core.meter.stop(began, event::TRANSLATION);
                if self.generation == generation {
                    self.page = Some((gpa & !0xfff, page));
                }
                block
            }
        };
        let address = self.code.address(self.blocks[block as usize].start as usize);
        match via {
            Via::Jump => {
                core.add_jump(context.jumps, rip, address);
                self.jump_blocks[place] = block;
            }
            Via::Link => core.note_code(rip),
            Via::Misfit => {}
        }
        Ok(Some(block))
    }

    /// The bytes of the page at `gpa`, which is protected and `host` is in.
    fn copy_of_page(&mut self, gpa: u64, host: *mut u8) -> Vec<u8> {
        match self.page.take() {
            Some((known, page)) if known == gpa & !0xfff => page,
            other => {
                let mut page = other.map_or_else(|| vec![0; 4096], |(_, page)| page);
                // SAFETY: `host` is the address of `gpa` in a page of RAM.
                unsafe { crate::ram::copy_from_guest(host.wrapping_sub((gpa & 0xfff) as usize), &mut page) };
                page
            }
        }
    }

    /// The page at `gpa` may have other contents from now on.
    fn forget_page(&mut self, gpa: u64) {
        self.page.take_if(|(known, _)| *known == gpa & !0xfff);
    }

    /// The block for the current RIP if the jump cache has its code. What is in the jump cache is good
    /// without further checks; which block it is may have been forgotten.
    fn find_in_jump_cache(&self, core: &Core, context: Context, place: usize) -> Option<u32> {
        let entry = core.cpu.jump_cache[context.jumps as usize][place % JUMP_CACHE_ENTRIES];
        let id = self.jump_blocks[place];
        let block = self.blocks.get(id as usize)?;
        let same = entry.key == 0u64.wrapping_sub(core.cpu.rip)
            && entry.host == self.code.address(block.start as usize)
            && block.alive
            && block.key.context == context;
        same.then_some(id)
    }

    fn translate(&mut self, core: &mut Core, key: Key, page: &[u8; 4096]) -> u32 {
        if self.used + CODE_RESERVE > self.room || self.links.len() + LINK_RESERVE > LINKS {
            self.flush(core);
            core.protect_code_page(key.gpa);
        }
        if self.eager && self.statistics.blocks.is_multiple_of(EAGER_RECYCLE) {
            self.recycle_micro(core);
        }
        let lesson = self.lessons.get(&key).cloned().unwrap_or_default();
        let windowed = key.context.jumps == JumpContext::User && !lesson.cold && core.has_windows();
        let wanted = (self.eager || lesson.hot) && !windowed && !key.alone;
        let hot = wanted && !lesson.cold && !self.is_micro_full();
        let hoist = self.eager || lesson.hot_loop;
        let first_micro = self.micro_owners.len();
        let first_exit = self.exits.len() as u32;
        let mut source = Source {
            bytes: &page[(key.gpa & 0xfff) as usize..],
            crossing: None,
            page,
            rip: key.rip,
            context: key.context,
            features: &self.features,
            first_exit,
            coalesce: !key.alone && !lesson.uncoalesced,
            mix: !lesson.unmixed,
            hoist,
            windowed,
            regions: regions(&core.cpu),
            guess: (windowed && hoist).then_some(self.guess),
            learned: lesson.regions,
            micro: first_micro as u16..(first_micro + if hot { BLOCK_MICROS } else { 0 }) as u16,
            breakpoints: core.debugger.breakpoints().to_vec(),
        };
        let mut translation = block::translate(&source, &mut self.workspace);
        let mut next_page = None;
        if translation.incomplete
            && let Some((gpa, rest)) = self.next_page(core, key.rip)
        {
            let mut bytes = source.bytes.to_vec();
            bytes.extend_from_slice(&rest);
            source.bytes = &bytes;
            source.crossing = Some(core.cpu.code_generation[key.context.jumps.generation()]);
            translation = block::translate(&source, &mut self.workspace);
            next_page = Some(gpa >> 12);
        }
        self.micro_owners.resize(usize::from(translation.micro), key);
        for &(entry, low) in &translation.lows {
            core.cpu.micro[usize::from(entry)] = MicroEntry::empty(core.cpu.micro_nowhere, low as u64);
        }
        core.cpu.micro_used = self.micro_owners.len() as u32;
        self.install(core, key, translation, next_page, hot || windowed)
    }

    /// The first bytes of the page after the one that `rip` is on, if they can be executed: their
    /// guest-physical address, and the bytes, which are now watched for writes.
    fn next_page(&self, core: &mut Core, rip: u64) -> Option<(u64, [u8; 15])> {
        let next = (rip & !0xfff).wrapping_add(0x1000);
        let (gpa, _) = core.fetch_page(next).ok()?;
        core.protect_code_page(gpa);
        core.note_code(next);
        let mut bytes = [0; 15];
        core.ram.read(gpa, &mut bytes).then_some((gpa, bytes))
    }

    /// Looks again where the second page of a crossing instruction is.
    fn recheck(&mut self, core: &mut Core, exit: u32, patch: u32) {
        let id = self.exits[exit as usize].block;
        let block = &self.blocks[id as usize];
        let (rip, jumps, start, next_page) =
            (block.key.rip, block.key.context.jumps, block.start, block.about.next_page);
        core.cpu.rip = rip;
        if self.next_page(core, rip).map(|(gpa, _)| gpa >> 12) == next_page {
            let value = core.cpu.code_generation[jumps.generation()].wrapping_neg();
            self.code.write((start + patch) as usize, &value.to_le_bytes());
        } else {
            self.kill(core, id);
        }
    }

    /// Places a translation and links it with the blocks it jumps to.
    fn install(
        &mut self,
        core: &mut Core,
        key: Key,
        mut translation: block::Translation,
        next_page: Option<u64>,
        hot: bool,
    ) -> u32 {
        let offset = (key.gpa & 0xfff) as u16;
        translation.peeked.push((offset, translation.length.min(0x1000 - offset)));
        let about = About {
            map: self.lists.maps.add(&translation.map),
            ranges: self.lists.ranges.add(&translation.peeked),
            next_page,
            coalesced: translation.coalesced,
            hoistable: translation.hoistable,
            fast: translation.fast,
            hot,
            thunk_calls: self.lists.thunk_calls.add(&translation.thunk_calls),
            moving: translation.movable.then(|| Moving {
                constants: self.lists.constants.add(&translation.constants),
                numbers: self.lists.numbers.add(&translation.numbers),
            }),
        };
        let id = self.place(core, key, &mut translation.code, &mut translation.exits, about);
        self.workspace.recycle(translation);
        id
    }

    /// Places the code of a block, which is not finished where it depends on its place, and links it.
    fn place(&mut self, core: &mut Core, key: Key, code: &mut [u8], exits: &mut [BlockExit], about: About) -> u32 {
        let first_exit = self.exits.len() as u32;
        let start = self.used;
        let id = self.blocks.len() as u32;
        for &(at, thunk) in self.lists.thunk_calls.get(about.thunk_calls) {
            let target = self.thunks.address(thunk);
            let displacement = (target as i64 - (start as i64 + i64::from(at) + 4)) as i32;
            code[at as usize..at as usize + 4].copy_from_slice(&displacement.to_le_bytes());
        }
        let base = start as u32;
        for exit in exits {
            if let ExitKind::Far { target, context, link } = &mut exit.kind {
                *link = self.link_to(core, *context, *target);
                let place = offset_of!(Cpu, links) + size_of::<u64>() * *link as usize;
                code[exit.site as usize..][..4].copy_from_slice(&(place as i32).to_le_bytes());
            }
            let (site, stub) = (base + exit.site, base + exit.stub);
            self.exits.push(Exit { kind: exit.kind, site, stub, block: id, linked: None });
        }
        self.code.write(start, code);
        self.used = (start + code.len()).next_multiple_of(16);
        let code_page = self.pages.entry(key.gpa >> 12).or_default();
        code_page.blocks.push(id);
        let (word, bit) = CodePage::start(key.gpa);
        code_page.starts[word] |= bit;
        for &(offset, length) in self.lists.ranges.get(about.ranges) {
            code_page.granules |= granules(u64::from(offset), u64::from(length));
        }
        if let Some(page) = about.next_page {
            let code_page = self.pages.entry(page).or_default();
            code_page.blocks.push(id);
            code_page.granules |= 1;
        }
        if about.moving.is_some() {
            self.movable.insert(Place::of(&key), id);
        }
        self.blocks.push(Block {
            key,
            start: base,
            length: code.len() as u32,
            exits: first_exit..self.exits.len() as u32,
            incoming: Vec::new(),
            alive: true,
            misfits: 0,
            first_misfit: 0,
            samples: 0,
            about,
        });
        self.starts.push(base);
        self.index.insert(key, id);
        self.statistics.blocks += 1;
        self.link_on_pages(core, id);
        id
    }

    /// Links the exits of a new block with the blocks that are there already.
    fn link_on_pages(&mut self, core: &mut Core, id: u32) {
        let block = &self.blocks[id as usize];
        let (key, next_page) = (block.key, block.about.next_page);
        for exit in block.exits.clone() {
            if let ExitKind::Direct { target } = self.exits[exit as usize].kind {
                let page = if target >> 12 == key.rip >> 12 { Some(key.gpa >> 12) } else { next_page };
                let Some(page) = page.filter(|page| self.pages.get(page).is_some_and(|page| page.may_start(target)))
                else {
                    continue;
                };
                let gpa = page << 12 | target & 0xfff;
                let target_key = Key { gpa, rip: target, context: key.context, alone: false };
                if let Some(&found) = self.index.get(&target_key) {
                    self.link(core, exit, found);
                }
            }
        }
    }

    /// The link for jumps to `target`, code of `context`.
    fn link_to(&mut self, core: &mut Core, context: JumpContext, target: u64) -> u32 {
        let next = self.links.len() as u32;
        *self.links.entry((context, target)).or_insert_with(|| {
            core.cpu.links[next as usize] = core.cpu.unlinked;
            next
        })
    }

    /// Makes the jump of `exit` go straight to `to`, if it is one that may.
    fn link(&mut self, core: &mut Core, exit: u32, to: u32) {
        let record = &self.exits[exit as usize];
        let from = &self.blocks[record.block as usize];
        match record.kind {
            ExitKind::Direct { .. } => {}
            // Only `break_out` ever cuts these.
            ExitKind::Loop { inside, .. } if from.alive => return self.patch(record.site, from.start + inside),
            ExitKind::Far { context, link, .. } => {
                let target = &self.blocks[to as usize];
                if target.key.context.jumps == context {
                    core.set_link(context, link, self.code.address(target.start as usize));
                }
                return;
            }
            ExitKind::Indirect { cut, .. } if from.alive => {
                return self.code.write_if_changed((from.start + cut.at) as usize, &cut.whole);
            }
            _ => return,
        }
        let target = &self.blocks[to as usize];
        let second = target.key.rip >> 12 != from.key.rip >> 12;
        let page = if second { from.about.next_page } else { Some(from.key.gpa >> 12) };
        if !from.alive || !target.alive || page != Some(target.key.gpa >> 12) {
            return;
        }
        if record.linked.is_some() {
            // `break_out` has cut it.
            return self.patch(record.site, target.start);
        }
        self.patch(record.site, target.start);
        self.exits[exit as usize].linked = Some(to);
        self.blocks[to as usize].incoming.push(exit);
        self.statistics.links += 1;
    }

    fn patch(&mut self, site: u32, target: u32) {
        let displacement = (i64::from(target) - (i64::from(site) + 4)) as i32;
        self.code.write(site as usize, &displacement.to_le_bytes());
    }

    /// Counts an access that a shared probe did not serve; too many too fast, and the block's reads lead no
    /// writes from now on; again, and its accesses probe alone.
    fn misfit(&mut self, core: &mut Core, id: u32, twin: u32) {
        let now = core.tsc();
        let probe = core.cpu.translated[word::FAULT] + 1; // where the miss handler would have returned to
        let served = core.twins.note(probe, self.code.address(self.blocks[twin as usize].start as usize));
        let block = &mut self.blocks[id as usize];
        if !block.alive {
            return;
        }
        if block.misfits == 0 {
            block.first_misfit = now;
        }
        block.misfits += 1 + u32::from(served);
        if block.misfits < MAX_MISFITS {
            return;
        }
        let misfits = u64::from(std::mem::take(&mut block.misfits));
        if now.wrapping_sub(block.first_misfit) < misfits * MISFIT_TICKS {
            let key = block.key;
            let lesson = self.lessons.entry(key).or_default();
            lesson.uncoalesced = lesson.unmixed;
            lesson.unmixed = true;
            self.kill(core, id);
        }
    }

    /// The block and the guest address of the instruction that host address `at` belongs to.
    fn guest_position(&self, at: u64) -> (u32, u64) {
        let offset = self.code.offset_of(at).expect("a fault in translated code") as u32;
        let i = self.starts.partition_point(|&start| start <= offset);
        let block = &self.blocks[i.checked_sub(1).expect("a fault in a block, not in a thunk")];
        assert!(offset <= block.start + block.length, "a fault between blocks");
        let map = self.lists.maps.get(block.about.map);
        let j = map.partition_point(|&(host, _)| host <= offset - block.start);
        (i as u32 - 1, block.key.rip + u64::from(map[j - 1].1))
    }

    /// The guest (or a device) wrote to a page with translated code.
    pub fn code_written(&mut self, core: &mut Core, gpa: u64, length: u64) {
        if planted::is(Bug::StaleCode) {
            return;
        }
        let first = gpa >> 12;
        let last = (gpa + length - 1) >> 12;
        for page in first..=last {
            let start = gpa.max(page << 12) & 0xfff;
            let end = (gpa + length).min((page + 1) << 12) - (page << 12);
            self.forget_page(page << 12);
            let Some(code_page) = self.pages.get_mut(&page) else { continue };
            if code_page.granules & granules(start, end - start) == 0 {
                continue;
            }
            code_page.hits += 1;
            if code_page.hits >= MAX_CODE_WRITES {
                self.drop_page(core, page);
            } else {
                self.drop_written(core, page, start as u16..end as u16);
            }
        }
    }

    /// Drops the blocks made from bytes `written` of a page.
    fn drop_written(&mut self, core: &mut Core, page: u64, written: std::ops::Range<u16>) {
        let Some(mut code_page) = self.pages.remove(&page) else { return };
        code_page.granules = 0;
        let mut blocks = std::mem::take(&mut code_page.blocks);
        blocks.retain(|&id| {
            let block = &self.blocks[id as usize];
            if !block.alive {
                return false;
            }
            let second = [(0, 15)];
            let ranges = if block.about.next_page == Some(page) {
                &second[..]
            } else {
                self.lists.ranges.get(block.about.ranges)
            };
            if ranges.iter().any(|&(offset, length)| offset < written.end && written.start < offset + length) {
                self.kill(core, id);
                return false;
            }
            for &(offset, length) in ranges {
                code_page.granules |= granules(u64::from(offset), u64::from(length));
            }
            true
        });
        if blocks.is_empty() {
            self.forget_page(page << 12);
            core.unprotect_code_page(page << 12);
        } else {
            code_page.blocks = blocks;
            self.pages.insert(page, code_page);
        }
    }

    fn drop_page(&mut self, core: &mut Core, page: u64) {
        let Some(code_page) = self.pages.remove(&page) else { return };
        for id in code_page.blocks {
            self.kill(core, id);
        }
        self.forget_page(page << 12);
        core.unprotect_code_page(page << 12);
    }

    fn kill(&mut self, core: &mut Core, id: u32) {
        let block = &mut self.blocks[id as usize];
        if !block.alive {
            return; // on two pages, and the other one went first
        }
        self.statistics.invalidated += 1;
        block.alive = false;
        block.about.moving = None;
        let (key, start, exits) = (block.key, block.start, block.exits.clone());
        let incoming = std::mem::take(&mut block.incoming);
        for exit in incoming {
            let record = &mut self.exits[exit as usize];
            record.linked = None;
            let (site, stub) = (record.site, record.stub);
            self.patch(site, stub);
        }
        for exit in exits {
            if let Some(target) = self.exits[exit as usize].linked.take() {
                self.blocks[target as usize].incoming.retain(|&e| e != exit);
            }
        }
        self.index.remove(&key);
        core.cpu.return_stack = core.cpu.return_stack_base;
        let address = self.code.address(start as usize);
        if key.alone {
            core.twins.forget();
        }
        core.remove_jump(key.context.jumps, key.rip, address);
        if let Some(&link) = self.links.get(&(key.context.jumps, key.rip)) {
            core.remove_link(link, address);
        }
    }

    /// Drops every translation.
    pub fn flush(&mut self, core: &mut Core) {
        self.blocks.clear();
        self.starts.clear();
        self.lists.clear();
        self.exits.clear();
        self.index.clear();
        self.movable.clear();
        self.lessons.clear();
        self.suspects.clear();
        self.micro_owners.clear();
        core.cpu.micro = [MicroEntry::empty(core.cpu.micro_nowhere, 0); MICRO_ENTRIES];
        self.page = None;
        for page in std::mem::take(&mut self.pages).into_keys() {
            core.unprotect_code_page(page << 12);
        }
        core.flush_jumps();
        self.links.clear();
        core.twins.forget();
        self.used = self.thunk_bytes;
        self.generation += 1;
        self.statistics.flushes += 1;
    }

    /// Loops whose probes are hoisted now.
    pub fn hoisted(&self) -> usize {
        self.lessons.values().filter(|lesson| lesson.hot_loop).count()
    }

    /// Blocks that were made from others of the same code.
    pub fn moved_blocks(&self) -> u64 {
        self.statistics.moved
    }

    /// One line for a developer.
    pub fn statistics(&self) -> String {
        let s = &self.statistics;
        let mut interpreted: Vec<_> = s.interpreted.iter().collect();
        interpreted.sort_by(|a, b| b.1.cmp(a.1));
        let top: Vec<_> = interpreted.iter().take(40).map(|(m, n)| format!("{m:?} {n}")).collect();
        format!(
            "{} blocks ({} moved, {} invalidated, {} flushes, {} hoisted loops, {} too short), {} KiB of code, {} exits, {} links, {} faults; interpreted: {}",
            s.blocks,
            s.moved,
            s.invalidated,
            s.flushes,
            self.hoisted(),
            self.lessons.values().filter(|lesson| lesson.short_loop).count(),
            self.used >> 10,
            s.exits,
            s.links,
            s.faults,
            top.join(", ")
        )
    }
}

impl Drop for Translator {
    fn drop(&mut self) {
        tracing::debug!("translator: {}", self.statistics());
    }
}

/// The granules that `length` bytes at `offset` in a page touch.
fn granules(offset: u64, length: u64) -> u64 {
    let first = offset / GRANULE;
    let last = ((offset + length.max(1) - 1) / GRANULE).min(63);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

/// The regions of what `cpu`'s registers hold.
fn regions(cpu: &Cpu) -> Regions {
    let region = |address: u64| (address >> REGION_BITS) as u8;
    Regions {
        registers: cpu.gpr.map(region),
        bases: [index::FS, index::GS].map(|segment| region(cpu.seg[segment].base)),
    }
}

fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// Whether 32-bit code sees one flat 4 GiB segment everywhere but through FS and GS.
fn flat(cpu: &Cpu) -> bool {
    let code = &cpu.seg[index::CS];
    let readable_code = attr::S | attr::P | attr::WRITABLE | attr::CODE;
    let flat_code = code.limit == u32::MAX && code.attributes & (readable_code | attr::UNUSABLE) == readable_code;
    let data = [index::ES, index::SS, index::DS].map(|i| &cpu.seg[i]);
    let flat_data = data.iter().all(|s| s.base == 0 && is_unlimited_data(s));
    code.base == 0 && flat_code && flat_data && cpu.seg[index::SS].is_default_32()
}

/// Every offset of 32 bits can be read and written.
fn is_unlimited_data(segment: &Segment) -> bool {
    let kind = attr::S | attr::P | attr::WRITABLE;
    let mask = kind | attr::UNUSABLE | attr::EXPAND_DOWN | attr::CODE;
    segment.limit == u32::MAX && segment.attributes & mask == kind
}

/// The context to translate for, or `None` where only the interpreter will do.
fn translatable(core: &Core) -> Option<Context> {
    let cpu = &*core.cpu;
    let blocked = rflags::TF | rflags::DF | rflags::VM;
    if cpu.rflags & blocked != 0 || cpu.interrupt_shadow != 0 || cpu.dr[7] & 0xff != 0 {
        return None;
    }
    if cpu.cpl == 3 && cpu.rflags & rflags::AC != 0 && cpu.cr0 & cr0::AM != 0 {
        return None;
    }
    let tlb = cpu.data_context();
    let jumps = match (cpu.mode(), cpu.cpl) {
        (Mode::Long64, 3) => JumpContext::User,
        (Mode::Long64, 0) if tlb == TlbContext::KernelAc => JumpContext::KernelAc,
        (Mode::Long64, 0) => JumpContext::Kernel,
        (Mode::Compat32 | Mode::Protected32, 3) if flat(cpu) => JumpContext::User32,
        (Mode::Compat32 | Mode::Protected32, 0) if flat(cpu) => match tlb {
            TlbContext::KernelAc => JumpContext::KernelAc32,
            _ => JumpContext::Kernel32,
        },
        _ => return None,
    };
    let fpu = cpu.cr0 & (cr0::TS | cr0::EM) == 0 && cpu.cr4 & cr4::OSFXSR != 0;
    let avx_states = xcr0::SSE | xcr0::AVX;
    let avx = fpu && cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & avx_states == avx_states;
    let tsc = cpu.cpl == 0 || cpu.cr4 & cr4::TSD == 0;
    let smap = cpu.cr4 & cr4::SMAP != 0;
    let fsgsbase = cpu.cr4 & cr4::FSGSBASE != 0;
    Some(Context { jumps, tlb: tlb as u8, fpu, avx, smap, fsgsbase, tsc })
}

/// Before 32-bit code: its addresses are sums of registers whose upper halves are clear, which SDM vol. 1 3.4.1.1
/// allows after a change from 64-bit mode, and FS and GS may be used where they have no limit.
fn prepare_32(cpu: &mut Cpu) {
    for register in &mut cpu.gpr[..8] {
        *register &= 0xffff_ffff;
    }
    cpu.closed = [index::FS, index::GS].map(|i| if is_unlimited_data(&cpu.seg[i]) { 0 } else { CLOSED });
}
