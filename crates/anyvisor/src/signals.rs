//! SIGINT, SIGTERM, SIGHUP and SIGQUIT end the VM, or the console session.
//!
//! The signals are blocked in every thread and taken by one that waits for them, so that nothing runs in
//! signal context. The first ends the VM in order; if that has not ended the process soon, or a second
//! signal comes, the process leaves at once with the terminal restored.

use crate::control::runtime;
use crate::terminal;
use anyvisor_vmm::{Error, Remote, Result};
use std::mem::MaybeUninit;
use std::process::{Child, ExitStatus};
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

/// Calls `then` whenever the terminal's size changes. Call it before starting other threads.
pub fn on_resize(then: impl Fn() + Send + 'static) -> Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set; sigaddset then gets a valid signal number.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGWINCH);
        set.assume_init()
    };
    block(&set)?;
    let thread = std::thread::Builder::new().name("resizes".into()).spawn(move || {
        loop {
            wait(&set);
            then();
        }
    });
    thread.map(drop).map_err(|e| Error::host("cannot start the thread for the terminal's size", e))
}

/// Waits for a program that leads a process group of its own. A signal is passed on to the group, which may then clean up;
/// there is no exit status then. The signals stay blocked in this thread.
pub fn wait_for(child: &mut Child) -> Result<Option<ExitStatus>> {
    let mut set = signal_set();
    // SAFETY: the set is initialized, and the signal's number is valid.
    unsafe { libc::sigaddset(&mut set, libc::SIGCHLD) };
    block(&set)?;
    let trouble = |e| Error::host("cannot wait for a program", e);
    let mut passed = false;
    loop {
        // A program that ends from here on leaves a signal.
        if let Some(status) = child.try_wait().map_err(trouble)? {
            return Ok((!passed).then_some(status));
        }
        let signal = wait(&set);
        if signal != libc::SIGCHLD {
            passed = true;
            // SAFETY: kill has no memory effects here; the child has not been waited for, so the group is its own.
            unsafe { libc::kill(-(child.id() as i32), signal) };
        }
    }
}

/// Starts the thread that waits for a signal and then does `then`.
fn watch(then: impl FnOnce(&libc::sigset_t) + Send + 'static) -> Result<()> {
    let set = signal_set();
    block(&set)?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            wait(&set);
            then(&set);
        })
        .map_err(|e| Error::host("cannot start the signal thread", e))?;
    Ok(())
}

/// Blocks the signals in this thread, and in those that it starts.
fn block(set: &libc::sigset_t) -> Result<()> {
    // SAFETY: `set` is initialized, and the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(Error::host("cannot block signals", std::io::Error::from_raw_os_error(error))),
    }
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

/// The next of the signals.
fn wait(set: &libc::sigset_t) -> libc::c_int {
    let mut signal = 0;
    // SAFETY: `set` is initialized and `signal` is a valid place for the answer.
    unsafe { libc::sigwait(set, &mut signal) };
    signal
}
