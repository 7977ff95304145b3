//! Interrupting guest code when the local APIC's timer is due: a POSIX timer per vCPU thread, whose signal
//! does nothing but set [`pending::EVENT`] in the vCPU block.

use crate::core::Core;
use crate::cpu::pending;
use anyvisor_engine::{Error, Result};
use anyvisor_x86::lapic::{Deadline, Now};
use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

thread_local! {
    /// The `pending` word of the vCPU that this thread runs; null outside `Vcpu::run`. Plain, constant
    /// initialization: a signal handler reads it.
    static PENDING: Cell<*const AtomicU32> = const { Cell::new(std::ptr::null()) };
}

/// Tells the signal handler of this thread which vCPU it runs.
///
/// # Safety
/// `pending` must stay valid until this is called again on this thread.
pub unsafe fn set_running(pending: *const AtomicU32) {
    PENDING.with(|cell| cell.set(pending));
}

fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 6
}

extern "C" fn on_timer(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let word = PENDING.with(Cell::get);
    if !word.is_null() {
        // SAFETY: set_running's contract.
        unsafe { (*word).fetch_or(pending::EVENT, Ordering::SeqCst) };
    }
}

fn install_handler() -> Result<()> {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    let ok = *INSTALLED.get_or_init(|| {
        // SAFETY: a plain system call with an initialized structure; the handler only sets an atomic word.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_timer as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(signal_number(), &raw const action, std::ptr::null_mut()) == 0
        }
    });
    if ok { Ok(()) } else { Err(Error::last_os("installing the timer's signal handler")) }
}

/// Nanoseconds from `now` until `deadline`, rounded up; 0 if it is past.
pub fn until(deadline: Deadline, now: Now, tsc_khz: u64) -> u64 {
    match deadline {
        Deadline::Ns(ns) => ns.saturating_sub(now.ns),
        Deadline::Tsc(tsc) => {
            let ticks = u128::from(tsc.saturating_sub(now.tsc));
            u64::try_from(ticks * 1_000_000 / u128::from(tsc_khz) + u128::from(ticks != 0)).unwrap_or(u64::MAX)
        }
    }
}

/// One thread's timer.
pub struct ThreadTimer {
    timer: libc::timer_t,
    thread: libc::pid_t,
    /// What it is set to, and the guest time at which it fires.
    armed: Option<(Deadline, u64)>,
}

// SAFETY: `timer_t` is a handle of the process, valid on every thread.
unsafe impl Send for ThreadTimer {}

impl ThreadTimer {
    /// A timer that signals the calling thread.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new() -> Result<ThreadTimer> {
        install_handler()?;
        let thread = current_thread();
        let mut timer = std::ptr::null_mut();
        // SAFETY: plain system calls on local, initialized structures.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal_number());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal_number();
            event.sigev_notify_thread_id = thread;
            if libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) != 0 {
                return Err(Error::last_os("creating a vCPU's timer"));
            }
        }
        Ok(ThreadTimer { timer, thread, armed: None })
    }

    /// Whether it signals the calling thread.
    pub fn is_mine(&self) -> bool {
        self.thread == current_thread()
    }

    /// Sets the timer to the local APIC's next deadline, if that is not what it is set to already.
    pub fn follow(&mut self, core: &Core) {
        let Some(deadline) = core.lapic.next_deadline() else { return };
        let now = core.now();
        if let Some((armed, fires)) = self.armed
            && armed == deadline
            && now.ns < fires
        {
            return;
        }
        // A timer of zero would be a stopped one.
        let wait = until(deadline, now, core.vm.tsc_khz).max(1);
        self.armed = Some((deadline, now.ns.saturating_add(wait)));
        let value = libc::timespec { tv_sec: (wait / 1_000_000_000) as i64, tv_nsec: (wait % 1_000_000_000) as i64 };
        let interval = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let setting = libc::itimerspec { it_interval: interval, it_value: value };
        // SAFETY: the timer is this value's own; it cannot fail for a valid timer and a valid time.
        let result = unsafe { libc::timer_settime(self.timer, 0, &raw const setting, std::ptr::null_mut()) };
        assert_eq!(result, 0, "timer_settime of {wait} ns");
    }
}

impl Drop for ThreadTimer {
    fn drop(&mut self) {
        // SAFETY: the timer is this value's own.
        unsafe { libc::timer_delete(self.timer) };
    }
}

fn current_thread() -> libc::pid_t {
    // SAFETY: a plain system call.
    unsafe { libc::gettid() }
}
