//! The user's terminal: raw mode while a guest has it, restored on every way out.
//!
//! In raw mode every key goes to the guest, but for the escape: Ctrl-A X leaves (which ends the VM of `run`, and
//! detaches from that of `console`), Ctrl-A Ctrl-A types one Ctrl-A. The settings found at the start are kept in
//! one place, and [`restore`] puts them back from anywhere: the guard's drop, the panic hook, the signal thread,
//! and the handler of fatal signals (an abort, or a fault in this process), which may only call what is
//! async-signal-safe, as tcsetattr is.

use anyvisor_vmm::Remote;
use anyvisor_vmm::console::Input;
use std::io::{Read, Write};
use std::sync::{Arc, OnceLock};

/// The settings to go back to; set once, before raw mode is entered for the first time.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();

/// Raw mode, while it lives.
pub struct Raw(());

impl Raw {
    /// Puts the terminal on stdin into raw mode.
    ///
    /// # Errors
    /// Stdin is no terminal, or refuses.
    pub fn enter() -> std::io::Result<Raw> {
        let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the structure it is given.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded.
        let original = *ORIGINAL.get_or_init(|| unsafe { settings.assume_init() });
        restore_on_panic();
        let mut raw = original;
        // SAFETY: `raw` is an initialized termios.
        unsafe { libc::cfmakeraw(&mut raw) };
        // SAFETY: as above.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Raw(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was found; does nothing if it was never changed. Async-signal-safe.
pub fn restore() {
    if let Some(original) = ORIGINAL.get() {
        // SAFETY: `original` is an initialized termios.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, original) };
    }
}

fn restore_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        default(info);
    }));
}

/// Restores on signals that kill the process from inside. Call it before anything else installs handlers:
/// those (an engine's for SIGSEGV) then come first and pass on what is not theirs.
pub fn restore_on_fatal_signals() {
    const MEMORY: &[u8] = b"anyvisor: a page of memory cannot be had: a file of the snapshot that this VM goes on \
        from was changed, a disk failed, or memory ran out\n";
    extern "C" fn handler(signal: libc::c_int) {
        restore();
        if signal == libc::SIGBUS {
            // SAFETY: async-signal-safe, and the bytes are there for ever.
            unsafe { libc::write(libc::STDERR_FILENO, MEMORY.as_ptr().cast(), MEMORY.len()) };
        }
        // SAFETY: async-signal-safe. The signal is blocked until this returns; then the default action for
        // it, or for the fault that happens again, ends the process.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    for signal in [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE] {
        // SAFETY: an all-zero sigaction is valid; the handler only makes async-signal-safe calls. It runs on
        // the alternate stack that Rust gives each thread, so that a stack overflow is seen too.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_ONSTACK;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Rows and columns of the terminal on stdin.
pub fn size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ fills the structure it is given.
    let status = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &mut size) };
    (status == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Starts the thread that carries stdin to the guest until its end. A terminal's excess is dropped, a pipe's
/// waits for the guest.
///
/// # Errors
/// The thread cannot be started.
pub fn spawn_reader(input: Arc<Input>, remote: Remote, terminal: bool) -> std::io::Result<()> {
    std::thread::Builder::new().name("serial-in".into()).spawn(move || {
        let mut escape = Escape::default();
        let mut buffer = [0; 4096];
        loop {
            let length = match std::io::stdin().lock().read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return tracing::warn!("serial input ends: {error}"),
            };
            if !terminal {
                input.push(&buffer[..length]);
                continue;
            }
            let (bytes, leave) = escape.filter(&buffer[..length]);
            input.offer(&bytes);
            if leave {
                return remote.leave();
            }
        }
    })?;
    Ok(())
}

const CTRL_A: u8 = 1;

/// Finds the escape sequences in what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    /// The last key was Ctrl-A.
    armed: bool,
}

impl Escape {
    /// What the guest gets of `typed`, and whether the user wants to leave.
    pub fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut bytes = Vec::with_capacity(typed.len());
        for &key in typed {
            match (std::mem::take(&mut self.armed), key) {
                (false, CTRL_A) => self.armed = true,
                (false, _) | (true, CTRL_A) => bytes.push(key),
                (true, b'x' | b'X') => return (bytes, true),
                // Any other key is no command: it goes through with its Ctrl-A.
                (true, _) => bytes.extend([CTRL_A, key]),
            }
        }
        (bytes, false)
    }
}

/// Stderr for log lines. In raw mode the terminal does not return the carriage, so lines end in CR LF.
pub fn log_writer() -> impl Write {
    struct Log;
    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if ORIGINAL.get().is_none() {
                return std::io::stderr().write(bytes);
            }
            for line in bytes.split_inclusive(|byte| *byte == b'\n') {
                std::io::stderr().write_all(line)?;
                if line.ends_with(b"\n") {
                    std::io::stderr().write_all(b"\r")?;
                }
            }
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    Log
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        let check = |typed: &[&[u8]], guest: &[u8], leaves: bool| {
            let mut escape = Escape::default();
            let mut got = vec![];
            let mut left = false;
            for part in typed {
                let (bytes, leave) = escape.filter(part);
                got.extend(bytes);
                left |= leave;
            }
            assert_eq!((got.as_slice(), left), (guest, leaves), "{typed:?}");
        };
        check(&[b"ls\r"], b"ls\r", false);
        check(&[b"a\x01x"], b"a", true);
        check(&[b"a\x01", b"Xb"], b"a", true);
        check(&[b"\x01\x01"], b"\x01", false);
        check(&[b"\x01\x01x"], b"\x01x", false);
        check(&[b"\x01c"], b"\x01c", false);
    }
}
