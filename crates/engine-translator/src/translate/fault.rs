//! Host signals raised by translated code, turned into exits.
//!
//! Guest instructions run as they are, so the CPU itself raises their #DE, #MF, #XM and alignment #GP,
//! which arrive as SIGFPE and SIGSEGV. The handler only redirects the thread to the `fault` thunk; the
//! interpreter then executes the instruction again and raises the guest's exception exactly.

use super::block::{ExitKind, word};
use super::{Block, Exit};
use crate::core::Core;
use crate::cpu::Cpu;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// The translator's tables as they are while translated code runs.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    pub blocks: *const [Block],
    pub exits: *const [Exit],
}

impl Tables {
    pub const NONE: Tables = Tables {
        blocks: std::ptr::slice_from_raw_parts(std::ptr::null(), 0),
        exits: std::ptr::slice_from_raw_parts(std::ptr::null(), 0),
    };
}

/// What the handler needs of the vCPU that this thread runs.
#[derive(Clone, Copy)]
pub struct Running {
    pub code_start: u64,
    pub code_end: u64,
    pub fault: u64,
    pub cpu: *mut Cpu,
    /// The guard of the return stack.
    pub guard_start: u64,
    pub guard_end: u64,
    /// Where the code can be written.
    pub writable: *mut u8,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
    static TABLES: Cell<Tables> = const { Cell::new(Tables::NONE) };
}

/// No further than this from 0 is where an empty micro-TLB entry (`MicroEntry::empty`) sends an access of a page, or of a
/// group that begins in it.
const EMPTY_ENTRY: u64 = 2 * 4096;

/// See [`page_faults`].
static PAGE_FAULTS: AtomicU64 = AtomicU64::new(0);

/// Host page faults that translated code has made outside the return stack's guard and what an empty micro-TLB
/// entry names. There should be none, as every access is to memory that was checked: a wrong address that happens
/// not to be mapped shows here only, because the interpreter then makes the access good.
pub fn page_faults() -> u64 {
    PAGE_FAULTS.load(Ordering::Relaxed)
}

/// Tells the handler which code is translated code on this thread.
pub fn set_running(running: Option<Running>) {
    RUNNING.set(running);
}

/// Tells the handler what there is to unlink, before translated code runs.
pub(super) fn set_tables(tables: Tables) {
    TABLES.set(tables);
}

/// If a signal has interrupted a block, makes its direct jumps leave for Rust. Async-signal-safe.
///
/// # Safety
/// `context` must be the `ucontext_t` of a signal delivered to this thread.
pub unsafe fn break_out(context: *mut libc::c_void) {
    let Some(running) = RUNNING.get() else { return };
    // SAFETY: by the contract.
    let rip = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] } as u64;
    if rip < running.code_start || rip >= running.code_end {
        return;
    }
    let tables = TABLES.get();
    // SAFETY: this thread is in translated code, so `set_tables` was called just before and no Rust code has
    // changed the tables since.
    let (blocks, exits) = unsafe { (&*tables.blocks, &*tables.exits) };
    let offset = (rip - running.code_start) as u32;
    let i = blocks.partition_point(|block| block.start <= offset);
    let Some(block) = i.checked_sub(1).map(|i| &blocks[i]) else { return };
    // SAFETY: as in `on_signal`.
    unsafe { (*running.cpu).translated[word::SAMPLE] = rip };
    for exit in &exits[block.exits.start as usize..block.exits.end as usize] {
        let (site, displacement) = match exit.kind {
            ExitKind::Direct { .. } | ExitKind::Loop { .. } => {
                (exit.site, exit.stub.wrapping_sub(exit.site + 4) as i32)
            }
            ExitKind::Far { link, .. } => {
                // SAFETY: as in `on_signal`; nothing but this thread's translated code uses links.
                unsafe { (*running.cpu).links[link as usize] = (*running.cpu).unlinked };
                continue;
            }
            ExitKind::Indirect { cut, .. } => {
                // SAFETY: as below.
                unsafe { running.writable.add((block.start + cut.at) as usize).cast::<[u8; 2]>().write(cut.cut) };
                continue;
            }
            _ => continue,
        };
        // SAFETY: the displacement of a jump in code memory. This thread executes it next after the
        // return from the signal, which serializes (SDM vol. 3A 9.3, IRET).
        unsafe { running.writable.add(site as usize).cast::<i32>().write_unaligned(displacement) };
    }
}

/// Handles a signal if it came from translated code. Async-signal-safe.
///
/// # Safety
/// `context` must be the `ucontext_t` of a signal delivered to this thread.
pub unsafe fn on_signal(context: *mut libc::c_void) -> bool {
    let Some(running) = RUNNING.get() else { return false };
    // SAFETY: by the contract, a ucontext_t that only this handler uses now.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    if rip < running.code_start || rip >= running.code_end {
        return false;
    }
    let address = registers[libc::REG_CR2 as usize] as u64;
    let is_page_fault = registers[libc::REG_TRAPNO as usize] == 14;
    if is_page_fault && address >= running.guard_start && address < running.guard_end {
        let rsp = registers[libc::REG_RSP as usize] as u64;
        // SAFETY: the vCPU that runs on this thread has its return stack attached, and it is full.
        registers[libc::REG_RSP as usize] = unsafe { super::return_stack::rescue(&*running.cpu, rsp) } as i64;
        return true;
    }
    // SAFETY: the vCPU that runs on this thread; it is in translated code, which has been entered with its core's address
    // there, and no Rust code holds a reference that is in use.
    let core = unsafe { &mut *((*running.cpu).translated[word::CORE] as *mut Core) };
    let in_window = is_page_fault && core.windows.contains(address);
    if in_window {
        const WRITE: i64 = 1 << 1; // of a page fault's error code (SDM vol. 3A 4.7)
        if core.window_fault(rip, address, registers[libc::REG_ERR as usize] & WRITE != 0) {
            return true;
        }
    }
    let expected = in_window || core.cpu.is_beyond(address) || (address as i64).unsigned_abs() < EMPTY_ENTRY;
    if is_page_fault && !expected && address >> 47 == 0 {
        PAGE_FAULTS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the block of the vCPU that runs on this thread; it is in translated code, so no Rust code
    // holds a reference that is in use.
    unsafe { (*running.cpu).translated[word::FAULT] = rip };
    registers[libc::REG_RIP as usize] = running.fault as i64;
    true
}
