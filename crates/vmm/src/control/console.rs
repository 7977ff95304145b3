//! `GET /anyvisor/console`: a connection that becomes the guest's serial console.
//!
//! After `101 Switching Protocols` the bytes are the console's: first the last lines of the past, then what
//! comes; what the client sends is typed. Any number may be attached; all see everything, all can type. A
//! client that does not read loses output and finds a note in its place. The guest never waits for a client; a
//! client that types faster than the guest reads waits.

use super::Shared;
use super::http::{Fault, Response};
use crate::console::Sound;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The name in the Upgrade header.
pub const PROTOCOL: &str = "anyvisor-console";

/// How often a waiting thread looks whether its client or the VM has gone.
const LOOK: Duration = Duration::from_millis(250);

/// Serves `stream` as a console until the client or the VM ends. `typed` came with the request.
pub fn serve(shared: &Arc<Shared>, stream: &UnixStream, typed: &[u8]) -> std::io::Result<()> {
    let mut to_client = stream;
    let done = Arc::new(AtomicBool::new(false));
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(Some(LOOK))?;
    let typist = Typist { shared: shared.clone(), stream: stream.try_clone()?, done: done.clone() };
    let first = typed.to_vec();
    // The reader may be spawned only once it is clear that the client gets its answer.
    let builder = std::thread::Builder::new().name("control-typist".into()).stack_size(super::STACK);
    let thread = match builder.spawn(move || typist.run(&first)) {
        Ok(thread) => thread,
        Err(error) => {
            let fault = Fault::new(503, format!("cannot start a thread: {error}"));
            return to_client.write_all(&Response::from(fault).to_bytes(false));
        }
    };
    let told = format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n\r\n");
    let result = send(stream, told.as_bytes()).and_then(|()| show(shared, stream));
    done.store(true, Ordering::SeqCst);
    // Wakes the typist from its read, and tells the client.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let _ = thread.join();
    result
}

/// Carries the guest's output to the client.
fn show(shared: &Shared, stream: &UnixStream) -> std::io::Result<()> {
    let listener = shared.output.listen();
    loop {
        match listener.hear(LOOK) {
            Sound::Bytes(bytes) => send(stream, &bytes)?,
            Sound::Lost(count) => {
                send(stream, format!("\r\n[anyvisor: {count} bytes of output are lost here]\r\n").as_bytes())?;
            }
            Sound::Silence if has_gone(stream) => return Ok(()),
            Sound::Silence => {}
            Sound::End => return Ok(()),
        }
    }
}

/// Writes all of `bytes`, however long the client takes, unless it goes.
fn send(mut stream: &UnixStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether the client has closed the connection; one that only types no more has not.
fn has_gone(stream: &UnixStream) -> bool {
    let mut asked = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut asked, Some(&now)).is_ok_and(|_| asked[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

/// Carries what the client types to the guest.
struct Typist {
    shared: Arc<Shared>,
    stream: UnixStream,
    /// Nobody shows this client any more.
    done: Arc<AtomicBool>,
}

impl Typist {
    fn run(self, first: &[u8]) {
        self.push(first);
        let mut buffer = [0; 4096];
        loop {
            match (&self.stream).read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => self.push(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn push(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.done.load(Ordering::SeqCst) {
            let taken = self.shared.input.push_some(bytes, LOOK);
            bytes = &bytes[taken..];
        }
    }
}
