//! The return stack: guest returns by host returns.
//!
//! A guest CALL pushes the guest's return address (negated) and then *calls* the target's translation, so
//! that the host's return predictor learns the pair; a guest RET compares the address it popped with the
//! one on top and, if they agree, returns to the code that follows the call. If they don't (a context
//! switch, longjmp), the stack is emptied and the jump cache decides. So the stack is only a prediction,
//! but one that must never name dead code or another address space's: dropping translations and changing
//! mappings empty it too.
//!
//! It is the host stack while translated code runs. Deep recursion runs into the guard below it; the signal
//! handler then moves the newest entries to the top and forgets the rest. Signals have a stack of their own.

use super::enter::Thunks;
use crate::cpu::Cpu;
use anyvisor_engine::{Error, Result};

/// Bytes of entries, at 16 a call.
const SIZE: usize = 256 << 10;
/// Inaccessible bytes below.
const GUARD: usize = 64 << 10;
/// Bytes above the empty stack: the entry that says so, and what a rescue moves.
const TOP: usize = 4096;
/// Bytes of the newest entries that survive an overflow.
const KEPT: usize = 256;
/// Bytes of the signal stack: the largest signal frames (AMX) and the handler.
const SIGNAL_STACK: usize = 64 << 10;
/// The address that an empty stack "returns" to, negated: not canonical, and nobody's.
const NOWHERE: u64 = 0x8123_4567_89ab_cdef;

/// A vCPU's return stack, with the signal stack its thread needs.
pub struct ReturnStack {
    mapping: *mut u8,
    signal_stack: Box<[u8]>,
    /// The thread's signal stack before `attach`.
    previous: Option<libc::stack_t>,
}

// SAFETY: the mapping belongs to this value alone and is reachable from any thread.
unsafe impl Send for ReturnStack {}

impl ReturnStack {
    /// # Errors
    /// When the host refuses the memory.
    pub fn new() -> Result<ReturnStack> {
        // SAFETY: a fresh anonymous mapping, and a change of protection inside it.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let length = GUARD + SIZE + TOP;
            let mapping = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if mapping == libc::MAP_FAILED || libc::mprotect(mapping, GUARD, libc::PROT_NONE) != 0 {
                return Err(Error::last_os("mapping the return stack"));
            }
            Ok(ReturnStack {
                mapping: mapping.cast(),
                signal_stack: vec![0; SIGNAL_STACK].into_boxed_slice(),
                previous: None,
            })
        }
    }

    fn base(&self) -> u64 {
        self.mapping as u64 + (GUARD + SIZE) as u64
    }

    /// Makes this the return stack of `cpu`; `no_return` is the thunk's address.
    pub fn attach(&mut self, cpu: &mut Cpu, no_return: u64) -> Result<()> {
        cpu.return_stack_base = self.base();
        cpu.return_stack = self.base();
        // SAFETY: two words in the part of the mapping above the empty stack. The signal stack lives as long
        // as self, and `Translator::detach` is called before that ends.
        unsafe {
            (self.base() as *mut u64).write(no_return);
            (self.base() as *mut u64).add(1).write(NOWHERE);
            let mut previous: libc::stack_t = std::mem::zeroed();
            let stack =
                libc::stack_t { ss_sp: self.signal_stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: SIGNAL_STACK };
            if libc::sigaltstack(&raw const stack, &raw mut previous) != 0 {
                return Err(Error::last_os("sigaltstack for a vCPU thread"));
            }
            self.previous = Some(previous);
        }
        Ok(())
    }

    /// Gives the thread its own signal stack back: this one may be freed next.
    pub fn detach(&mut self) {
        if let Some(previous) = self.previous.take() {
            // SAFETY: what the thread had before, whose owner still has it; no signal is being handled.
            unsafe { libc::sigaltstack(&raw const previous, std::ptr::null_mut()) };
        }
    }

    /// Addresses whose access means that the stack is full.
    pub fn guard(&self) -> std::ops::Range<u64> {
        self.mapping as u64..self.mapping as u64 + GUARD as u64
    }
}

impl Drop for ReturnStack {
    fn drop(&mut self) {
        self.detach();
        // SAFETY: mapped by `new` with this length; nothing runs on it any more.
        unsafe { libc::munmap(self.mapping.cast(), GUARD + SIZE + TOP) };
    }
}

/// Makes room on a full stack whose pointer is `rsp`: returns the new pointer, with the newest entries.
/// Async-signal-safe.
///
/// # Safety
/// `cpu` has a return stack attached and `rsp` is at its full end.
pub unsafe fn rescue(cpu: &Cpu, rsp: u64) -> u64 {
    let to = cpu.return_stack_base - KEPT as u64;
    // SAFETY: both ranges are in the mapping: `rsp` is at its low end, and it is much larger than KEPT.
    unsafe { std::ptr::copy_nonoverlapping(rsp as *const u8, to as *mut u8, KEPT) };
    to
}

/// The address of the `no_return` thunk in code that starts at `code`.
pub fn no_return(code: u64, thunks: &Thunks) -> u64 {
    code + thunks.no_return as u64
}
