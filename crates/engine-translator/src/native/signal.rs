//! Faults of native stubs: from a host signal back to a guest exception.
//!
//! Before a stub runs, the thread notes the address of the guest's instruction in it and where the stub
//! goes on after it. A synchronous signal at exactly that address is the guest's fault: the handler notes
//! the trap number and resumes at the stub's exit, which saves the (unchanged) registers and returns. Every
//! other signal is passed on to whoever had the handler before.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// The signals that x86 traps become.
const SIGNALS: [libc::c_int; 4] = [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS];

/// What the handler needs of the stub that runs on this thread; plain words, so that a signal handler may
/// touch them.
struct Recovery {
    /// Host address of the guest's instruction; 0 while no stub runs.
    instruction: Cell<u64>,
    resume: Cell<u64>,
    /// Trap number plus one, or 0.
    trap: Cell<u32>,
}

thread_local! {
    static RECOVERY: Recovery =
        const { Recovery { instruction: Cell::new(0), resume: Cell::new(0), trap: Cell::new(0) } };
}

static PREVIOUS: OnceLock<[libc::sigaction; SIGNALS.len()]> = OnceLock::new();

/// Runs `f`, which executes the stub whose guest instruction is at host address `instruction`; returns the
/// number of the trap that it raised, if any.
pub(super) fn with_recovery(instruction: u64, resume: u64, f: impl FnOnce()) -> Option<u8> {
    install_signal_handlers();
    RECOVERY.with(|recovery| {
        recovery.trap.set(0);
        recovery.resume.set(resume);
        recovery.instruction.set(instruction);
        f();
        recovery.instruction.set(0);
        recovery.trap.get().checked_sub(1).map(|trap| trap as u8)
    })
}

/// Handles a signal of a native stub: `true` if it was one, and the context now resumes at its exit.
///
/// # Safety
/// `context` must be the `ucontext_t` that the kernel passed to a handler of this thread.
pub unsafe fn on_signal(context: *mut libc::c_void) -> bool {
    // SAFETY: by the contract; nothing else refers to the context while the handler runs.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    RECOVERY.with(|recovery| {
        if rip != recovery.instruction.get() || rip == 0 {
            return false;
        }
        recovery.trap.set(registers[libc::REG_TRAPNO as usize] as u32 + 1);
        registers[libc::REG_RIP as usize] = recovery.resume.get() as i64;
        true
    })
}

/// Installs the process's handlers, once. Whoever installs handlers for these signals later must call
/// [`on_signal`] from them.
pub fn install_signal_handlers() {
    PREVIOUS.get_or_init(|| {
        SIGNALS.map(|signal| {
            let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: plain system calls on local, initialized structures; the handler keeps to what a
            // signal handler may do.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&raw mut action.sa_mask);
                libc::sigaction(signal, &raw const action, previous.as_mut_ptr());
                previous.assume_init()
            }
        })
    });
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: `context` is what the kernel passed.
    if unsafe { crate::translate::fault::on_signal(context) || on_signal(context) } {
        return;
    }
    let previous = PREVIOUS.get().and_then(|all| Some(all[SIGNALS.iter().position(|s| *s == signal)?]));
    match previous {
        Some(action) if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN => {
            // SAFETY: the address is a handler that was installed for this signal with these flags.
            unsafe {
                if action.sa_flags & libc::SA_SIGINFO != 0 {
                    let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(action.sa_sigaction);
                    call(signal, info, context);
                } else {
                    let call: extern "C" fn(libc::c_int) = std::mem::transmute(action.sa_sigaction);
                    call(signal);
                }
            }
        }
        _ => {
            // The instruction faults again after the return, now with the default action: the process ends
            // with the right signal, and a core dump at the right place.
            // SAFETY: a plain system call.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}
