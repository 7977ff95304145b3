//! The command's standard streams on the host: pipes to the guest's channel, and threads that join them to ours.
//!
//! A thread may wait for somebody who never comes, a terminal's user or whoever reads our output. So nobody waits for the
//! reader of input, and for the others only as long as the VM lives or there is something left to write.

use crate::terminal::{self, Escape};
use anyvisor_vmm::share::{Channel, Streams};
use anyvisor_vmm::{Error, Remote, Result};
use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bytes that a pipe holds, if the host lets it.
const CAPACITY: usize = 1 << 20;
/// Kinds of what is typed at a terminal, for the guest (`agent.rs`).
const KEYS: u8 = 0;
const SIZE: u8 = 1;

/// Our ends.
pub struct Ends {
    pub input: Typed,
    output: File,
    error: File,
}

/// Pipes for a command that says how it ended to `ended`: the guest's ends, and ours.
pub fn pipes(ended: Box<dyn Fn(&str) + Send + Sync>) -> Result<(Channel, Ends)> {
    let trouble = |error: rustix::io::Errno| Error::host("cannot make a pipe for the command", error.into());
    let pipe = || -> rustix::io::Result<(OwnedFd, OwnedFd)> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // What a user may have in pipes is limited.
        let _ = fcntl_setpipe_size(&writer, CAPACITY);
        Ok((reader, writer))
    };
    let (input, ours) = pipe().map_err(trouble)?;
    let (output, guests_output) = pipe().map_err(trouble)?;
    let (error, guests_error) = pipe().map_err(trouble)?;
    for end in [&input, &guests_output, &guests_error] {
        rustix::fs::fcntl_setfl(end, OFlags::NONBLOCK).map_err(trouble)?;
    }
    let channel = Channel(Arc::new(Streams { input, output: guests_output, error: guests_error, ended }));
    let ends = Ends { input: Typed(Arc::new(Mutex::new(ours.into()))), output: output.into(), error: error.into() };
    Ok((channel, ends))
}

/// The threads for output. They end when the guest's ends are closed.
pub struct Outputs(mpsc::Receiver<()>);

impl Outputs {
    /// Waits until all is written; not for longer than `limit`, if there is one.
    pub fn finish(&self, limit: Option<Duration>) {
        // Each thread holds a sender until it ends.
        let _ = match limit {
            None => self.0.recv().ok(),
            Some(limit) => self.0.recv_timeout(limit).ok(),
        };
    }
}

/// Starts the threads. A `terminal` has been put into raw mode: its size comes with what is typed, and the user can leave.
pub fn connect(ends: Ends, terminal: bool, remote: Remote) -> Result<Outputs> {
    let Ends { input, output, error } = ends;
    let (sender, receiver) = mpsc::channel();
    copy("output", output, io::stdout(), sender.clone())?;
    copy("error", error, io::stderr(), sender)?;
    start("input", move || if terminal { input.type_all(&remote) } else { input.copy_all() })?;
    Ok(Outputs(receiver))
}

fn copy(name: &str, from: File, mut to: impl Write + Send + 'static, done: mpsc::Sender<()>) -> Result<()> {
    start(name, move || {
        let mut buffer = vec![0; 64 << 10];
        // When nobody reads ours, nobody reads the guest's: its end is told.
        while let Ok(length) = (&from).read(&mut buffer)
            && length > 0
            && to.write_all(&buffer[..length]).and_then(|()| to.flush()).is_ok()
        {}
        drop(done);
    })
}

fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    thread.map(drop).map_err(|error| Error::host("cannot start a thread for the command's streams", error))
}

/// What the guest reads.
#[derive(Clone)]
pub struct Typed(Arc<Mutex<File>>);

impl Typed {
    fn copy_all(self) {
        let mut file = self.lock();
        let _ = io::copy(&mut io::stdin().lock(), &mut *file);
        // The end of ours is the end of the command's, though others hold the pipe.
        if let Ok(null) = File::open("/dev/null") {
            *file = null;
        }
    }

    fn type_all(self, remote: &Remote) {
        let mut escape = Escape::default();
        let mut buffer = [0; 4096];
        while let Ok(length) = io::stdin().lock().read(&mut buffer)
            && length > 0
        {
            let (keys, leaves) = escape.filter(&buffer[..length]);
            self.send(KEYS, &keys);
            if leaves {
                return remote.leave();
            }
        }
    }

    /// Tells the guest the terminal's size.
    pub fn resize(&self) {
        if let Some((rows, columns)) = terminal::size() {
            let [[a, b], [c, d]] = [rows, columns].map(u16::to_le_bytes);
            self.send(SIZE, &[a, b, c, d]);
        }
    }

    fn send(&self, kind: u8, content: &[u8]) {
        let [low, high] = (content.len() as u16).to_le_bytes();
        // The guest may be gone.
        let _ = self.lock().write_all(&[&[kind, low, high], content].concat());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, File> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
