//! Interrupting guest code, when the local APIC's timer is due or another thread wants something: by a
//! signal to the vCPU's thread.
//!
//! Loops in translated code poll nothing. The signal's handler sets [`pending::EVENT`] and unlinks the jumps
//! of the block that it interrupted ([`fault::break_out`]), so that the block is left for Rust. A block may have no such
//! jump (it returns, or jumps indirectly), or the thread may just be in a helper that it has called: so the handler has
//! itself called again after [`RETRY_NS`], until translated code is left.

use crate::core::{Core, VcpuShared};
use crate::cpu::pending;
use crate::translate::fault;
use anyvisor_engine::{Error, Result};
use anyvisor_x86::lapic::{Deadline, Now};
use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

/// Nanoseconds after which an interruption that has not ended translated code yet is repeated.
const RETRY_NS: i64 = 40_000;

/// What the signal handler of a thread knows. Plain, constant initialization: a signal handler reads it.
struct Running {
    /// The vCPU that this thread runs; null outside `Vcpu::run`.
    vcpu: Cell<*const VcpuShared>,
    timer: Cell<libc::timer_t>,
    /// The handler has set the timer.
    disturbed: Cell<bool>,
    /// Translated code runs, or something that it has called.
    entered: Cell<bool>,
    /// The thread's number, once it has run translated code.
    thread: Cell<libc::pid_t>,
}

thread_local! {
    static RUNNING: Running = const {
        Running {
            vcpu: Cell::new(std::ptr::null()),
            timer: Cell::new(std::ptr::null_mut()),
            disturbed: Cell::new(false),
            entered: Cell::new(false),
            thread: Cell::new(0),
        }
    };
}

/// Tells the signal handler of this thread which vCPU it runs, and with which timer.
///
/// # Safety
/// `vcpu` must stay valid until this is called again on this thread, with this or another value.
pub unsafe fn set_running(vcpu: *const VcpuShared, timer: &ThreadTimer) {
    RUNNING.with(|running| {
        running.timer.set(timer.timer);
        running.vcpu.set(vcpu);
    });
}

fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 6
}

/// Prepares the calling thread for translated code; returns its number.
pub fn attach_thread() -> libc::pid_t {
    let thread = current_thread();
    RUNNING.with(|running| running.thread.set(thread));
    thread
}

/// Notes that translated code is entered, or left.
pub fn set_entered(entered: bool) {
    RUNNING.with(|running| running.entered.set(entered));
}

/// Interrupts the vCPU that `thread` runs. Async-signal-safe.
pub fn interrupt(thread: libc::pid_t) {
    // A vCPU that does something to itself is not in translated code, unless a signal handler calls this.
    if RUNNING.with(|running| running.thread.get() == thread && !running.entered.get()) {
        return;
    }
    // SAFETY: a plain system call. The thread may be gone; then nobody needs the signal.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal_number()) };
}

extern "C" fn on_interrupt(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    RUNNING.with(|running| {
        // SAFETY: set_running's contract.
        let Some(vcpu) = (unsafe { running.vcpu.get().as_ref() }) else { return };
        vcpu.pending().fetch_or(pending::EVENT, Ordering::SeqCst);
        // Who is not in translated code looks before he is. Called again and again he might never get there.
        if vcpu.is_running() && running.entered.get() {
            // SAFETY: the context of the signal being handled on this thread.
            unsafe { fault::break_out(context) };
            running.disturbed.set(true);
            set_timer(running.timer.get(), libc::timespec { tv_sec: 0, tv_nsec: RETRY_NS });
        }
    });
}

/// Sets `timer` to fire once, after `value`; zero stops it. Async-signal-safe.
fn set_timer(timer: libc::timer_t, value: libc::timespec) {
    let interval = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let setting = libc::itimerspec { it_interval: interval, it_value: value };
    // SAFETY: every caller has a timer that is not deleted; it cannot fail for such and a valid time.
    let result = unsafe { libc::timer_settime(timer, 0, &raw const setting, std::ptr::null_mut()) };
    assert_eq!(result, 0, "timer_settime");
}

fn install_handler() -> Result<()> {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    let ok = *INSTALLED.get_or_init(|| {
        // SAFETY: a plain system call with an initialized structure; the handler is
        // async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_interrupt as *const () as usize;
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
        self.settle();
        let Some(deadline) = core.lapic.next_deadline() else { return };
        let now = core.now();
        if let Some((armed, fires)) = self.armed
            && armed == deadline
            && now.ns < fires
        {
            return;
        }
        // A timer of zero would be a stopped one.
        let wait = until(deadline, now, core.vm.tsc_khz).clamp(1, core.sample_period);
        self.armed = Some((deadline, now.ns.saturating_add(wait)));
        set_timer(
            self.timer,
            libc::timespec { tv_sec: (wait / 1_000_000_000) as i64, tv_nsec: (wait % 1_000_000_000) as i64 },
        );
    }

    /// Stops the timer if the signal handler has set it.
    pub fn settle(&mut self) {
        if RUNNING.with(|running| running.disturbed.take()) {
            self.armed = None;
            set_timer(self.timer, libc::timespec { tv_sec: 0, tv_nsec: 0 });
        }
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
