//! SIGINT, SIGTERM, SIGHUP and SIGQUIT end the VM, or the console session.
//!
//! The signals are blocked in every thread and taken by one that waits for them, so that nothing runs in
//! signal context. The first ends the VM in order; if that has not ended the process soon, or a second
//! signal comes, the process leaves at once with the terminal restored.

use crate::control::runtime;
use crate::terminal;
use anyvisor_vmm::{Error, Remote, Result};
use std::mem::MaybeUninit;
use std::time::Duration;

/// How long an ordered end may take.
const PATIENCE: Duration = Duration::from_secs(3);

const SIGNALS: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Lets signals end the VM. Call it before starting other threads, which inherit the mask.
pub fn end_vm_on_signals(remote: Remote) -> Result<()> {
    watch(move |set| {
        remote.stop();
        std::thread::spawn(|| {
            std::thread::sleep(PATIENCE);
            leave();
        });
        wait(set);
        leave();
    })
}

/// Lets the first signal end the process, with the terminal as it was.
pub fn leave_on_signals() -> Result<()> {
    watch(|_| leave())
}

/// Starts the thread that waits for a signal and then does `then`.
fn watch(then: impl FnOnce(&libc::sigset_t) + Send + 'static) -> Result<()> {
    let set = signal_set();
    // SAFETY: `set` is initialized, and the old mask is not asked for.
    let status = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    if status != 0 {
        return Err(Error::host("cannot block signals", std::io::Error::from_raw_os_error(status)));
    }
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            wait(&set);
            then(&set);
        })
        .map_err(|e| Error::host("cannot start the signal thread", e))?;
    Ok(())
}

fn leave() -> ! {
    terminal::restore();
    runtime::remove_claimed();
    std::process::exit(1);
}

fn signal_set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set; sigaddset then only gets valid signal numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in SIGNALS {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

fn wait(set: &libc::sigset_t) {
    let mut signal = 0;
    // SAFETY: `set` is initialized and `signal` is a valid place for the answer.
    unsafe { libc::sigwait(set, &mut signal) };
}
