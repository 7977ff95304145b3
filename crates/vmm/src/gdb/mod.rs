//! `--gdb`: a VM behind gdb's remote protocol.
//!
//! **Problem.** gdb wants to see and stop everything, on a protocol of packets that anybody may send anything on; the
//! guest must not notice, and a debugger that breaks off must leave a VM that can go on.
//!
//! **Idea.** One thread serves one debugger after another; gdbstub speaks the protocol. It holds nothing of the
//! VM: what gdb asks is done by the owner, on a VM that stands still ([`crate::machine::Debugger`]), vCPUs are gdb's
//! threads, and all stop when one does.
//!
//! A debugger that detaches lets the VM go on; `kill` ends it. One that breaks off while the VM is stopped leaves it
//! so, for the next. Only this machine's users can connect: on a TCP port any of them, on a Unix socket this user
//! and root.

mod registers;
mod target;

use crate::machine::{Debugger, Refused, State};
use crate::{Error, Result};
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as Stub;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError, MultiThreadStopReason};
use rustix::event::{PollFd, PollFlags, poll};
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use target::Machine;

/// How long gdb may take to take an answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// How long the end of the VM waits for gdb to be told.
const FAREWELL: Duration = Duration::from_millis(300);
/// How much is read at once.
const BUFFER: usize = 4096;

/// Where to wait for a debugger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port of 127.0.0.1; 0 for any that is free.
    Port(u16),
    Path(PathBuf),
}

impl FromStr for Address {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Address, String> {
        // gdb's users write ports with a colon.
        let number = text.strip_prefix(':').unwrap_or(text);
        if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) {
            let port = number.parse().map_err(|_| format!("bad port '{number}'; give 1 to 65535, or a path"))?;
            return Ok(Address::Port(port));
        }
        if text.is_empty() || !text.contains('/') {
            return Err(format!("bad address '{text}'; give a port such as 1234, or a path with a slash"));
        }
        Ok(Address::Path(text.into()))
    }
}

/// What a debugger can connect to.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    /// Removed with the listener.
    path: Option<PathBuf>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens at `address`.
    ///
    /// # Errors
    /// The address is taken, or the host refuses it.
    pub fn new(address: &Address) -> Result<Listener> {
        match address {
            Address::Port(port) => {
                let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).map_err(|error| {
                    let advice = if error.kind() == ErrorKind::AddrInUse { "; give another port, or 0" } else { "" };
                    Error::user(format!("--gdb cannot listen on port {port}: {error}{advice}"))
                })?;
                Ok(Listener { socket: Socket::Tcp(socket), path: None })
            }
            Address::Path(path) => {
                let shown = path.display();
                let socket = UnixListener::bind(path).map_err(|error| match error.kind() {
                    ErrorKind::AddrInUse => {
                        Error::user(format!("--gdb '{shown}' exists; remove it, or give another path"))
                    }
                    _ => Error::user(format!("--gdb cannot listen at '{shown}': {error}")),
                })?;
                // Who may connect is checked too; the mode says it where it can be seen.
                let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600));
                Ok(Listener { socket: Socket::Unix(socket), path: Some(path.clone()) })
            }
        }
    }

    fn accept(&self) -> io::Result<Line> {
        let socket: Box<dyn Stream> = match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(ANSWER_TIME))?;
                Box::new(stream)
            }
            Socket::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                let peer = rustix::net::sockopt::socket_peercred(&stream)?.uid;
                if peer != rustix::process::geteuid() && !peer.is_root() {
                    let what = format!("user {} may not debug another user's VM", peer.as_raw());
                    return Err(io::Error::new(ErrorKind::PermissionDenied, what));
                }
                stream.set_write_timeout(Some(ANSWER_TIME))?;
                Box::new(stream)
            }
        };
        Ok(Line { socket, buffer: Vec::with_capacity(BUFFER), at: 0 })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener) => listener.as_fd(),
        }
    }
}

impl fmt::Display for Listener {
    /// As gdb's `target remote` wants it.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match (&self.socket, &self.path) {
            (Socket::Tcp(listener), _) => match listener.local_addr() {
                Ok(address) => write!(f, "{address}"),
                Err(error) => write!(f, "({error})"),
            },
            (_, Some(path)) => write!(f, "{}", path.display()),
            (_, None) => write!(f, "(unnamed)"),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A socket of either kind.
trait Stream: Read + Write + AsFd + Send {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

/// A debugger's connection, with what it sent and nobody has read.
struct Line {
    socket: Box<dyn Stream>,
    buffer: Vec<u8>,
    at: usize,
}

impl Line {
    /// The next byte; waits for it.
    fn byte(&mut self) -> io::Result<u8> {
        if self.at == self.buffer.len() {
            self.buffer.resize(BUFFER, 0);
            let length = self.socket.read(&mut self.buffer)?;
            self.buffer.truncate(length);
            self.at = 0;
            if length == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        self.at += 1;
        Ok(self.buffer[self.at - 1])
    }

    fn has_byte(&self) -> bool {
        self.at < self.buffer.len()
    }
}

impl Connection for Line {
    type Error = io::Error;
    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.socket.write_all(&[byte])
    }
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// Serves debuggers, until it is dropped.
pub struct Server {
    closing: Arc<AtomicBool>,
    /// Disconnected when the thread has ended.
    ended: mpsc::Receiver<()>,
}

impl Server {
    /// Lets the VM of `cpus` vCPUs that `debugger` controls be debugged by who connects to `listener`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(listener: Listener, debugger: Debugger, cpus: u32) -> io::Result<Server> {
        let closing = Arc::new(AtomicBool::new(false));
        let (sender, ended) = mpsc::channel::<()>();
        let flag = closing.clone();
        std::thread::Builder::new().name("gdb".into()).spawn(move || {
            serve(&listener, &debugger, cpus, &flag);
            drop(listener);
            drop(sender);
        })?;
        Ok(Server { closing, ended })
    }
}

impl Drop for Server {
    /// The VM has ended, which the thread has been told.
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        let _ = self.ended.recv_timeout(FAREWELL);
    }
}

fn serve(listener: &Listener, debugger: &Debugger, cpus: u32, closing: &AtomicBool) {
    loop {
        match wait(listener.fd(), debugger.event()) {
            Ok(Ready::Socket) => {}
            // A stop that nobody waits for: of a debugger that is gone.
            Ok(Ready::Event) if debugger.remote().state() != State::Ended && !closing.load(Ordering::SeqCst) => {
                debugger.drain();
                continue;
            }
            Ok(Ready::Event) | Err(_) => return,
        }
        let line = match listener.accept() {
            Ok(line) => line,
            Err(error) => {
                tracing::warn!("--gdb cannot accept a connection: {error}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        match session(line, debugger, cpus) {
            Ok(After::Next) => {}
            Ok(After::Ended) => return,
            Err(why) => {
                if debugger.remote().state() == State::Ended {
                    return;
                }
                tracing::warn!("{why}");
            }
        }
    }
}

/// What is to be done after a debugger has gone.
enum After {
    /// Wait for another.
    Next,
    Ended,
}

/// Serves one debugger until it goes.
fn session(line: Line, debugger: &Debugger, cpus: u32) -> std::result::Result<After, String> {
    if debugger.stop().is_err() {
        return Ok(After::Ended);
    }
    debugger.drain();
    tracing::info!("gdb is there; the VM stands still");
    let mut machine = Machine::new(debugger, cpus);
    let done = talk(line, debugger, &mut machine);
    match done {
        Ok(DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_)) => Ok(After::Ended),
        Ok(DisconnectReason::Kill) => {
            debugger.remote().stop();
            Ok(After::Ended)
        }
        Ok(DisconnectReason::Disconnect) => {
            tracing::info!("gdb detaches; the VM goes on");
            // If it has ended, the next wait says so.
            let _ = debugger.go(crate::machine::Plan::default());
            Ok(After::Next)
        }
        Err(error) => {
            let _ = debugger.leave();
            let stands = match debugger.remote().state() {
                State::Paused => "the VM stands still, for the next or for anyvisor resume",
                _ => "the VM goes on",
            };
            Err(format!("gdb is gone ({error}); {stands}"))
        }
    }
}

/// Why a session ended that nobody ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Line(#[from] io::Error),
    /// What it sent, or what the VM made of it.
    #[error("{0}")]
    Stub(#[from] GdbStubError<Refused, io::Error>),
}

/// The protocol's state machine, fed with bytes and stops.
fn talk(line: Line, debugger: &Debugger, machine: &mut Machine) -> std::result::Result<DisconnectReason, Broken> {
    let mut stub = GdbStub::new(line).run_state_machine(machine)?;
    loop {
        stub = match stub {
            Stub::Idle(mut idle) => {
                let byte = idle.borrow_conn().byte()?;
                idle.incoming_data(machine, byte)?
            }
            Stub::Disconnected(disconnected) => return Ok(disconnected.get_reason()),
            Stub::CtrlCInterrupt(interrupt) => {
                let reason = match debugger.stop() {
                    Ok(()) => machine.reason().unwrap_or(Machine::interrupted()),
                    Err(_) => MultiThreadStopReason::Exited(0),
                };
                interrupt.interrupt_handled(machine, Some(reason))?
            }
            Stub::Running(mut running) => {
                let line = running.borrow_conn();
                let ready = if line.has_byte() { Ready::Socket } else { wait(line.socket.as_fd(), debugger.event())? };
                match ready {
                    Ready::Socket => {
                        let byte = running.borrow_conn().byte()?;
                        running.incoming_data(machine, byte)?
                    }
                    Ready::Event => {
                        debugger.drain();
                        if debugger.remote().state() == State::Ended {
                            running.report_stop(machine, MultiThreadStopReason::Exited(0))?
                        } else if let Some(reason) = machine.reason() {
                            running.report_stop(machine, reason)?
                        } else {
                            running.into()
                        }
                    }
                }
            }
        };
    }
}

enum Ready {
    Socket,
    Event,
}

/// Waits until something can be read; the event counts first.
fn wait(socket: BorrowedFd, event: BorrowedFd) -> io::Result<Ready> {
    let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN), PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return Ok(Ready::Event),
            Ok(_) => return Ok(Ready::Socket),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
