//! Getting a vCPU out of `KVM_RUN`, from any thread and from signal handlers, without ever losing a kick.
//!
//! **Problem.** A signal interrupts `KVM_RUN`, but one that arrives just before the call does nothing.
//!
//! **Idea.** KVM reads the byte `immediate_exit` of the page it shares with us after it has blocked
//! nothing but before it enters the guest, and looks for pending signals after that. The vCPU's thread says
//! in `runner` that it is about to call, and *then* looks at `reasons`; a kicker leaves its reason, and
//! *then* looks at `runner`. One of them sees the other. A kicker that sees a runner sets
//! `immediate_exit` and sends the signal: whatever the thread is doing between its look and the guest's
//! entry, one of the two stops it.
//!
//! A late kicker may stop a later `KVM_RUN`: the loop in `vcpu` takes an interruption without reason as none.

use crate::host_error;
use anyvisor_engine::{Error, Kick, Result};
use kvm_bindings::{KVMIO, kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_4};
use kvm_ioctls::VcpuFd;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, Ordering};
use vmm_sys_util::ioctl::ioctl_with_ptr;
use vmm_sys_util::ioctl_iow_nr;

/// Why a vCPU's loop is interrupted.
pub(crate) mod reason {
    /// By a [`anyvisor_engine::Kicker`].
    pub const KICK: u32 = 1 << 0;
    /// The 8259 raised INTR.
    pub const PIC: u32 = 1 << 1;
}

/// The first page of what KVM shares, mapped once more, since kickers outlive vCPUs.
struct RunPage(NonNull<kvm_run>);

// SAFETY: the mapping belongs to this struct, and all access is to single bytes, atomic or volatile.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

const PAGE: usize = 4096;

impl RunPage {
    fn new(vcpu: &VcpuFd) -> Result<RunPage> {
        const { assert!(size_of::<kvm_run>() <= PAGE) };
        let (protection, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, kind, vcpu.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(Error::last_os("mapping a vCPU's shared page"));
        }
        Ok(RunPage(NonNull::new(page.cast()).expect("mmap does not map page zero")))
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < PAGE);
        // SAFETY: within the mapping, which lives as long as `self`; a byte is always aligned and valid.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().cast::<u8>().add(offset)) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is this struct's own, and nothing refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

/// What a vCPU shares with those who interrupt it.
pub(crate) struct Shared {
    page: RunPage,
    /// The thread that is in `KVM_RUN` or about to be, else 0.
    runner: AtomicI32,
    /// Bits of [`reason`].
    reasons: AtomicU32,
    process: libc::pid_t,
}

impl Shared {
    pub fn new(vcpu: &VcpuFd) -> Result<Shared> {
        install_handler()?;
        let page = RunPage::new(vcpu)?;
        // SAFETY: has no preconditions.
        let process = unsafe { libc::getpid() };
        Ok(Shared { page, runner: AtomicI32::new(0), reasons: AtomicU32::new(0), process })
    }

    /// Leaves a reason, and stops the vCPU if it is in the guest. Async-signal-safe.
    pub fn interrupt(&self, reason: u32) {
        self.reasons.fetch_or(reason, Ordering::SeqCst);
        let runner = self.runner.load(Ordering::SeqCst);
        if runner != 0 {
            self.set_immediate_exit(true);
            // SAFETY: sends a signal whose handler does nothing to a thread of this process. A thread that is
            // gone, or another one that has its number now, is not harmed.
            unsafe { libc::syscall(libc::SYS_tgkill, self.process, runner, signal()) };
        }
    }

    /// Takes the reasons in `mask`.
    pub fn take(&self, mask: u32) -> bool {
        self.reasons.load(Ordering::SeqCst) & mask != 0 && self.reasons.fetch_and(!mask, Ordering::SeqCst) & mask != 0
    }

    /// Whether a reason of `mask` is there.
    pub fn has(&self, mask: u32) -> bool {
        self.reasons.load(Ordering::SeqCst) & mask != 0
    }

    /// The calling thread is about to call `KVM_RUN`. `false` if there is a reason not to.
    pub fn enter(&self) -> bool {
        self.set_immediate_exit(false);
        // SAFETY: has no preconditions.
        self.runner.store(unsafe { libc::gettid() }, Ordering::SeqCst);
        let free = self.reasons.load(Ordering::SeqCst) == 0;
        if !free {
            self.leave();
        }
        free
    }

    /// The thread has returned from `KVM_RUN`.
    pub fn leave(&self) {
        self.runner.store(0, Ordering::SeqCst);
    }

    /// Whether `KVM_RUN` returns before it enters the guest.
    pub fn set_immediate_exit(&self, on: bool) {
        self.page.byte(offset_of!(kvm_run, immediate_exit)).store(on.into(), Ordering::SeqCst);
    }

    /// Whether `KVM_RUN` returns once the guest accepts interrupts from the 8259.
    pub fn set_interrupt_window(&self, on: bool) {
        self.page.byte(offset_of!(kvm_run, request_interrupt_window)).store(on.into(), Ordering::SeqCst);
    }

    /// Whether, when `KVM_RUN` last returned, the guest accepted interrupts from the 8259, and no event was half
    /// delivered.
    pub fn accepts_interrupt(&self) -> bool {
        self.page.byte(offset_of!(kvm_run, ready_for_interrupt_injection)).load(Ordering::SeqCst) != 0
    }

    /// What [`Shared::accepts_interrupt`] said is not true any more.
    pub fn expect_no_interrupt(&self) {
        self.page.byte(offset_of!(kvm_run, ready_for_interrupt_injection)).store(0, Ordering::SeqCst);
    }

    /// Bytes of one element of the port I/O that `KVM_RUN` returned for: 1, 2 or 4.
    pub fn io_size(&self) -> usize {
        let offset = offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm_run__bindgen_ty_1__bindgen_ty_4, size);
        self.page.byte(offset).load(Ordering::Relaxed).into()
    }
}

/// While it exists, `KVM_RUN` on this thread does what KVM has been asked to do for the vCPU, and does not enter the
/// guest: a signal waits that only `KVM_RUN` lets through. (`immediate_exit` does nothing at all.)
///
/// The vCPU must outlive it.
pub(crate) struct Held {
    vcpu: RawFd,
    mask: libc::sigset_t,
}

/// What KVM_SET_SIGNAL_MASK takes: a length in bytes and the kernel's set of 64 signals, here none.
#[repr(C, packed)]
struct SignalMask {
    length: u32,
    signals: u64,
}

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);

impl Held {
    pub fn new(vcpu: &VcpuFd) -> Result<Held> {
        let mut mask = std::mem::MaybeUninit::uninit();
        let mut only = std::mem::MaybeUninit::uninit();
        // SAFETY: the sets are initialized before they are read, and the signal is valid; it goes to this thread,
        // which does not take it now.
        let mask = unsafe {
            libc::sigemptyset(only.as_mut_ptr());
            libc::sigaddset(only.as_mut_ptr(), signal());
            libc::pthread_sigmask(libc::SIG_BLOCK, only.as_ptr(), mask.as_mut_ptr());
            libc::pthread_kill(libc::pthread_self(), signal());
            mask.assume_init()
        };
        let held = Held { vcpu: vcpu.as_raw_fd(), mask };
        let none = SignalMask { length: 8, signals: 0 };
        // SAFETY: KVM reads the length, and as many bytes behind it.
        if unsafe { ioctl_with_ptr(vcpu, KVM_SET_SIGNAL_MASK(), &raw const none) } != 0 {
            return Err(Error::last_os("setting a vCPU's signal mask"));
        }
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: without a mask KVM goes back to the thread's own. The saved mask is an initialized set; restoring
        // it lets the signal through to its handler, which does nothing.
        unsafe {
            ioctl_with_ptr(&self.vcpu, KVM_SET_SIGNAL_MASK(), std::ptr::null::<SignalMask>());
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, std::ptr::null_mut());
        }
    }
}

impl Kick for Shared {
    fn kick(&self) {
        self.interrupt(reason::KICK);
    }
}

/// The signal that interrupts `KVM_RUN`; the translator engine's timer is its neighbour.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

/// Gives the signal a handler that does nothing: being handled is what interrupts.
fn install_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // SAFETY: all zeros is a valid sigaction; the handler is async-signal-safe. Other system calls of
        // the thread restart.
        let status = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal(), &action, std::ptr::null_mut())
        };
        if status != 0 {
            result = Err(host_error("installing a signal handler", kvm_ioctls::Error::last()));
        }
    });
    result
}
