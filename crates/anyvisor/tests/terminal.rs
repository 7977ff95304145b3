//! The user's terminal through the real binary, on a pseudo-terminal: raw while a guest has it, and as it
//! was found after every way out.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// 32-bit code that says `>` on the serial port, echoes what it gets, and powers off after a `q`.
const ECHO: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xb0, b'>', 0xee, // mov al, '>'; out dx, al
    0x66, 0xba, 0xfd, 0x03, // next: mov dx, 3fdh
    0xec, 0xa8, 0x01, 0x74, 0xf7, // in al, dx; test al, 1; jz next
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xec, 0xee, // in al, dx; out dx, al
    0x3c, b'q', 0x75, 0xed, // cmp al, 'q'; jne next
    0x66, 0xba, 0x04, 0x06, // mov dx, 604h
    0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, // mov ax, 3400h; out dx, ax
    0xeb, 0xfe, // jmp $
];

/// An ELF file that enters `code` at 16 MiB by its PVH note.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let mut put = |value: u64, size: usize| file.extend(&value.to_le_bytes()[..size]);
    // Type, machine, version, entry, program headers at 64, section headers, flags, header sizes and counts.
    for (value, size) in
        [(2, 2), (62, 2), (1, 4), (0x100_0000, 8), (64, 8), (0, 8), (0, 4), (64, 2), (56, 2), (2, 2), (0, 6)]
    {
        put(value, size);
    }
    // Type, flags, offset, virtual and physical address, sizes in file and memory, alignment.
    let length = code.len() as u64;
    for header in [[1, 7, 200, 0x100_0000, 0x100_0000, length, length, 1], [4, 4, 176, 0, 0, 20, 20, 4]] {
        put(header[0], 4);
        put(header[1], 4);
        header[2..].iter().for_each(|value| put(*value, 8));
    }
    // The note: sizes, type 18, "Xen", the entry.
    for value in [4, 4, 18, u64::from(u32::from_le_bytes(*b"Xen\0")), 0x100_0000] {
        put(value, 4);
    }
    file.resize(200, 0);
    file.extend_from_slice(code);
    file
}

/// The echo guest's file, deleted with the value, in a runtime folder of its own.
struct Guest {
    folder: PathBuf,
}

impl Guest {
    fn new(name: &str) -> Guest {
        let folder = std::env::temp_dir().join(format!("anyvisor-terminal-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("kernel"), elf(ECHO)).unwrap();
        Guest { folder }
    }

    /// `anyvisor` with the runtime folder.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_anyvisor"));
        command.env("XDG_RUNTIME_DIR", &self.folder).args(arguments);
        command
    }

    /// `anyvisor run`.
    fn run(&self, more: &[&str]) -> Command {
        let mut command = self.command(&["run", "--engine", "translator", "--memory", "32M"]);
        command.args(more).arg("--kernel").arg(self.folder.join("kernel"));
        command
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A command on a pseudo-terminal.
struct Session {
    child: Child,
    keyboard: File,
    /// The terminal side, to ask for its settings.
    terminal: OwnedFd,
    before: Settings,
    screen: Arc<Mutex<Vec<u8>>>,
    _guest: Option<Guest>,
}

/// The settings of a terminal, as far as raw mode changes them: input, output, control and local flags.
type Settings = (u32, u32, u32, u32);

fn settings(terminal: &OwnedFd) -> Settings {
    // SAFETY: an all-zero termios is valid, and tcgetattr fills it.
    let settings = unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &mut settings), 0);
        settings
    };
    (settings.c_iflag, settings.c_oflag, settings.c_cflag, settings.c_lflag)
}

impl Session {
    /// Starts the echo guest and waits until it is ready.
    fn start(name: &str) -> Session {
        let guest = Guest::new(name);
        let session = Session::open(guest.run(&[]), Some(guest));
        session.wait_for(b">");
        session
    }

    /// Starts `command`, which puts the terminal into raw mode.
    fn open(mut command: Command, guest: Option<Guest>) -> Session {
        let (mut master, mut slave) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: openpty fills the two descriptors; everything else may be null.
        assert_eq!(unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) }, 0);
        // SAFETY: both are open, and nobody else owns them.
        let (keyboard, terminal) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let before = settings(&terminal);
        assert_ne!(before.3 & libc::ICANON, 0);
        let stdio = || terminal.try_clone().unwrap();
        let child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        let screen = Arc::new(Mutex::new(vec![]));
        let (mut reader, shown) = (keyboard.try_clone().unwrap(), screen.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                shown.lock().unwrap().extend(&buffer[..length]);
            }
        });
        let session = Session { child, keyboard, terminal, before, screen, _guest: guest };
        let start = Instant::now();
        while settings(&session.terminal).3 & (libc::ICANON | libc::ECHO | libc::ISIG) != 0 {
            assert!(start.elapsed() < PATIENCE, "no raw mode");
            std::thread::sleep(Duration::from_millis(1));
        }
        session
    }

    fn wait_for(&self, text: &[u8]) {
        let start = Instant::now();
        while !self.screen.lock().unwrap().windows(text.len()).any(|part| part == text) {
            let shown = String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned();
            assert!(start.elapsed() < PATIENCE, "no {text:?} in {shown:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a plain system call on our own child, which has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Waits for the end, and checks that the terminal is as it was.
    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert_eq!(settings(&self.terminal), self.before, "terminal settings");
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the VM does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_key_but_the_escape_goes_to_the_guest() {
    let mut session = Session::start("keys");
    // Ctrl-C, Ctrl-Z and Ctrl-D are the guest's; Ctrl-A twice is one Ctrl-A.
    session.press(b"a\x03\x1a\x04b\x01\x01c");
    session.wait_for(b">a\x03\x1a\x04b\x01c");
    session.press(b"q");
    assert_eq!(session.end().code(), Some(0));
}

#[test]
fn ctrl_a_x_leaves() {
    let mut session = Session::start("leave");
    session.press(b"\x01x");
    assert_eq!(session.end().code(), Some(1));
}

/// A VM that runs without a terminal, killed when dropped.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_console_attaches_and_detaches() {
    let guest = Guest::new("console");
    let vm = guest.run(&["--id", "far", "--serial", "null"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    let mut vm = Background(vm);
    let start = Instant::now();
    while !guest.folder.join("anyvisor/far.sock").exists() {
        assert!(start.elapsed() < PATIENCE, "no control socket");
        std::thread::sleep(Duration::from_millis(5));
    }
    for round in ["first", "second"] {
        let mut session = Session::open(guest.command(&["console", "far"]), None);
        session.wait_for(b"Ctrl-A X detaches");
        session.wait_for(b">");
        // Keys that would be signals or commands are the guest's.
        session.press(format!("\x03{round}\x1a\x01\x01").as_bytes());
        session.wait_for(format!("\x03{round}\x1a\x01").as_bytes());
        session.press(b"\x01x");
        assert_eq!(session.end().code(), Some(0));
        session.wait_for(b"detached from far, which runs on");
        assert!(vm.0.try_wait().unwrap().is_none(), "the VM runs on");
    }
    let mut session = Session::open(guest.command(&["console", "far"]), None);
    session.signal(libc::SIGTERM);
    assert_eq!(session.end().code(), Some(1));
    assert!(vm.0.try_wait().unwrap().is_none(), "the VM runs on");
    let mut session = Session::open(guest.command(&["console", "far"]), None);
    session.press(b"q");
    assert_eq!(session.end().code(), Some(0));
    session.wait_for(b"far has ended");
    assert_eq!(vm.0.wait().unwrap().code(), Some(0));
}

#[test]
fn signals_from_outside_restore_the_terminal() {
    for (name, signal) in [("int", libc::SIGINT), ("term", libc::SIGTERM), ("hup", libc::SIGHUP)] {
        let mut session = Session::start(name);
        session.signal(signal);
        assert_eq!(session.end().code(), Some(1), "{name}");
    }
}

#[test]
fn a_crash_of_the_process_restores_the_terminal() {
    use std::os::unix::process::ExitStatusExt;
    for (name, signal) in [("abort", libc::SIGABRT), ("segv", libc::SIGSEGV), ("bus", libc::SIGBUS)] {
        let mut session = Session::start(name);
        session.signal(signal);
        assert_eq!(session.end().signal(), Some(signal), "{name}");
    }
}
