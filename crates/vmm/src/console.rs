//! The far end of the serial line: what happens to bytes between the 16550 and the host.
//!
//! A guest writes one byte at a time, on a vCPU thread, under the chip's lock; the host takes bytes in
//! blocks and may stall. So [`Output`] is a bounded buffer with a writer thread behind it, which sends what
//! has gathered in one system call. If the host stalls, the buffer fills and the guest waits: nothing is
//! lost. [`Input`] is the same in the other direction: the reader pushes, the chip pulls what its FIFO holds.
//!
//! Others may listen ([`Output::listen`]): each gets the last lines and then what comes, through a bounded
//! buffer of its own. One that is too slow loses output, and is told; it never stalls the guest.
//!
//! Invariant: a stalled host never keeps a VM from ending, [`Output::abandon`] frees whoever waits, nor from
//! pausing, [`Output::set_patient`].

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes that either direction holds before the sender waits.
const CAPACITY: usize = 64 << 10;
/// How long output gathers before it is written: below what a person notices.
const GATHER: Duration = Duration::from_micros(500);
/// Bytes of past output that a new listener gets.
const SCROLLBACK: usize = 16 << 10;
/// Bytes that a listener may be behind.
const BEHIND: usize = 256 << 10;

/// Where the guest's output goes.
pub struct Output {
    shared: Arc<OutputShared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct OutputShared {
    state: Mutex<OutputState>,
    changed: Condvar,
    audience: Mutex<Audience>,
}

/// Who listens besides the sink, and what they would like to have heard.
#[derive(Default)]
struct Audience {
    scrollback: VecDeque<u8>,
    listeners: Vec<Weak<Ear>>,
    ended: bool,
}

#[derive(Default)]
struct OutputState {
    buffer: Vec<u8>,
    /// Everything is written.
    idle: bool,
    /// No more bytes will come.
    finished: bool,
    /// Bytes are dropped from now on.
    abandoned: bool,
    /// Nobody waits for room.
    impatient: bool,
}

impl Output {
    /// Sends bytes to `sink`. If it fails, a warning is logged and later output dropped.
    ///
    /// # Errors
    /// The writer thread cannot be started.
    pub fn new(sink: Box<dyn Write + Send>) -> std::io::Result<Output> {
        let shared =
            Arc::new(OutputShared { state: Mutex::default(), changed: Condvar::new(), audience: Mutex::default() });
        let for_writer = shared.clone();
        let writer = std::thread::Builder::new().name("serial-out".into()).spawn(move || for_writer.write_to(sink))?;
        Ok(Output { shared, writer: Mutex::new(Some(writer)) })
    }

    /// Takes one byte; waits while the buffer is full.
    pub fn put(&self, byte: u8) {
        let mut state = lock(&self.shared.state);
        while state.buffer.len() >= CAPACITY && !state.abandoned && !state.impatient {
            state = wait(&self.shared.changed, state);
        }
        if !state.abandoned {
            state.buffer.push(byte);
            state.idle = false;
            if state.buffer.len() == 1 {
                self.shared.changed.notify_all();
            }
        }
    }

    /// Whether [`Output::put`] waits for room, as it does at first. If not, the buffer grows beyond its
    /// bounds by what the vCPUs write before they stop.
    pub fn set_patient(&self, patient: bool) {
        lock(&self.shared.state).impatient = !patient;
        self.shared.changed.notify_all();
    }

    /// The last lines of the output, and then what comes.
    pub fn listen(&self) -> Listener {
        let mut audience = lock(&self.shared.audience);
        let (front, back) = audience.scrollback.as_slices();
        let mut bytes = [front, back].concat();
        if bytes.len() == SCROLLBACK {
            // Its first line is not whole.
            let whole = bytes.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            bytes.drain(..whole);
        }
        let heard = Heard { bytes, lost: 0, ended: audience.ended };
        let ear = Arc::new(Ear { heard: Mutex::new(heard), changed: Condvar::new() });
        audience.listeners.push(Arc::downgrade(&ear));
        Listener(ear)
    }

    /// Drops what is not written yet, and all that comes.
    pub fn abandon(&self) {
        lock(&self.shared.state).abandoned = true;
        self.shared.changed.notify_all();
    }

    /// [`Output::abandon`], but gives the host up to `limit` to take what waits now.
    pub fn abandon_after(&self, limit: Duration) {
        let state = lock(&self.shared.state);
        let waits = |state: &mut OutputState| !state.idle && !state.abandoned;
        drop(self.shared.changed.wait_timeout_while(state, limit, waits));
        self.abandon();
    }

    /// Waits until everything is written, unless abandoned.
    pub fn finish(&self) {
        lock(&self.shared.state).finished = true;
        self.shared.changed.notify_all();
        let writer = lock(&self.writer).take();
        let abandoned = lock(&self.shared.state).abandoned;
        // An abandoned writer may be stuck in its write; it holds nothing that anyone needs.
        if let Some(writer) = writer.filter(|_| !abandoned)
            && writer.join().is_err()
        {
            tracing::error!("the serial output thread panicked");
        }
    }
}

impl OutputShared {
    fn write_to(&self, sink: Box<dyn Write + Send>) {
        let mut sink = Some(sink);
        while let Some(bytes) = self.gather() {
            lock(&self.audience).say(&bytes);
            if let Some(to) = &mut sink
                && let Err(error) = to.write_all(&bytes).and_then(|()| to.flush())
            {
                tracing::warn!("serial output is lost from here on: {error}");
                sink = None;
            }
        }
        lock(&self.audience).end();
    }

    /// Waits for bytes; `None` when no more come.
    fn gather(&self) -> Option<Vec<u8>> {
        let mut state = lock(&self.state);
        while state.buffer.is_empty() && !state.finished && !state.abandoned {
            state.idle = true;
            self.changed.notify_all();
            state = wait(&self.changed, state);
        }
        if state.abandoned || state.buffer.is_empty() {
            return None;
        }
        if !state.finished && state.buffer.len() < CAPACITY / 2 {
            drop(state);
            std::thread::sleep(GATHER);
            state = lock(&self.state);
        }
        let bytes = std::mem::take(&mut state.buffer);
        drop(state);
        self.changed.notify_all();
        Some(bytes)
    }
}

impl Audience {
    fn say(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(SCROLLBACK)..];
        let excess = (self.scrollback.len() + kept.len()).saturating_sub(SCROLLBACK);
        self.scrollback.drain(..excess);
        self.scrollback.extend(kept);
        self.listeners.retain(|ear| {
            let Some(ear) = ear.upgrade() else { return false };
            lock(&ear.heard).add(bytes);
            ear.changed.notify_all();
            true
        });
    }

    fn end(&mut self) {
        self.ended = true;
        for ear in self.listeners.iter().filter_map(Weak::upgrade) {
            lock(&ear.heard).ended = true;
            ear.changed.notify_all();
        }
    }
}

/// One who listens to the output; see [`Output::listen`].
pub struct Listener(Arc<Ear>);

struct Ear {
    heard: Mutex<Heard>,
    changed: Condvar,
}

struct Heard {
    bytes: Vec<u8>,
    /// Bytes that came while there was no room.
    lost: usize,
    ended: bool,
}

/// What a [`Listener`] hears.
#[derive(Debug, PartialEq, Eq)]
pub enum Sound {
    Bytes(Vec<u8>),
    /// So many bytes were lost at this place, because the listener was slow.
    Lost(usize),
    /// Nothing for now.
    Silence,
    /// Nothing any more.
    End,
}

impl Heard {
    fn add(&mut self, bytes: &[u8]) {
        if self.lost > 0 || self.bytes.len() + bytes.len() > BEHIND {
            // All from here on, until the listener is told.
            self.lost += bytes.len();
        } else {
            self.bytes.extend_from_slice(bytes);
        }
    }
}

impl Listener {
    /// Waits at most for `patience`.
    pub fn hear(&self, patience: Duration) -> Sound {
        let heard = lock(&self.0.heard);
        let quiet = |heard: &mut Heard| heard.bytes.is_empty() && heard.lost == 0 && !heard.ended;
        let waited = self.0.changed.wait_timeout_while(heard, patience, quiet);
        let mut heard = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        if !heard.bytes.is_empty() {
            Sound::Bytes(std::mem::take(&mut heard.bytes))
        } else if heard.lost > 0 {
            Sound::Lost(std::mem::take(&mut heard.lost))
        } else if heard.ended {
            Sound::End
        } else {
            Sound::Silence
        }
    }
}

/// What the host types. Outlives a VM, so that a restarted guest reads on.
#[derive(Default)]
pub struct Input {
    state: Mutex<InputState>,
    taken: Condvar,
}

#[derive(Default)]
struct InputState {
    queue: VecDeque<u8>,
    ready: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Input {
    pub fn new() -> Arc<Input> {
        Arc::default()
    }

    /// Adds bytes, and waits while the guest does not take them.
    pub fn push(&self, bytes: &[u8]) {
        for chunk in bytes.chunks(CAPACITY) {
            let mut state = lock(&self.state);
            while state.queue.len() + chunk.len() > CAPACITY {
                state = wait(&self.taken, state);
            }
            self.add(state, chunk);
        }
    }

    /// Adds as many bytes as fit, after waiting for room at most for `patience`; says how many.
    pub fn push_some(&self, bytes: &[u8], patience: Duration) -> usize {
        let state = lock(&self.state);
        let full = |state: &mut InputState| state.queue.len() >= CAPACITY;
        let waited = self.taken.wait_timeout_while(state, patience, full);
        let state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        let room = CAPACITY - state.queue.len();
        let fitting = &bytes[..bytes.len().min(room)];
        self.add(state, fitting);
        fitting.len()
    }

    /// Adds bytes; drops those that do not fit, as a terminal does.
    pub fn offer(&self, bytes: &[u8]) {
        let state = lock(&self.state);
        let room = CAPACITY - state.queue.len();
        self.add(state, &bytes[..bytes.len().min(room)]);
    }

    fn add(&self, mut state: MutexGuard<InputState>, bytes: &[u8]) {
        state.queue.extend(bytes);
        let ready = state.ready.clone();
        drop(state);
        // Without the lock: the chip's lock comes before this one.
        if let Some(ready) = ready {
            ready();
        }
    }

    /// Lets `take` see what waits; it returns how many bytes it took.
    pub fn pull(&self, take: impl FnOnce(&[u8]) -> usize) {
        let mut state = lock(&self.state);
        let taken = take(state.queue.make_contiguous());
        state.queue.drain(..taken);
        self.taken.notify_all();
    }

    /// Calls `ready` (or nobody) whenever bytes have been added.
    pub fn set_ready(&self, ready: Option<Arc<dyn Fn() + Send + Sync>>) {
        lock(&self.state).ready = ready;
    }
}

/// The data are plain bytes, valid whatever a panicking holder did.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_arrives_whole_and_in_order() {
        let seen = Arc::default();
        let output = Output::new(Box::new(Sink(Arc::clone(&seen)))).unwrap();
        let sent: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        sent.iter().for_each(|byte| output.put(*byte));
        output.finish();
        assert_eq!(*seen.lock().unwrap(), sent);
    }

    #[test]
    fn a_stalled_host_stalls_the_guest_until_it_is_abandoned() {
        struct Stalled(mpsc::Receiver<()>);
        impl Write for Stalled {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.recv();
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (hold, held) = mpsc::channel();
        let output = Arc::new(Output::new(Box::new(Stalled(held))).unwrap());
        let (done, finished) = mpsc::channel();
        let guest = output.clone();
        std::thread::spawn(move || {
            (0..3 * CAPACITY).for_each(|_| guest.put(b'x'));
            done.send(()).unwrap();
        });
        assert!(finished.recv_timeout(Duration::from_millis(50)).is_err(), "the guest waits");
        output.abandon();
        finished.recv_timeout(Duration::from_secs(10)).unwrap();
        output.finish();
        drop(hold);
    }

    #[test]
    fn listeners_hear_the_last_lines_and_then_what_comes() {
        let output = Output::new(Box::new(std::io::sink())).unwrap();
        let say = |text: &str| text.bytes().for_each(|byte| output.put(byte));
        let first = output.listen();
        assert_eq!(first.hear(Duration::ZERO), Sound::Silence);
        let line = format!("{}\n", "x".repeat(99));
        say(&line.repeat(1000));
        say("prompt> ");
        let mut all = vec![];
        while all.len() < 100_008 {
            let Sound::Bytes(bytes) = first.hear(Duration::from_secs(20)) else { panic!("after {}", all.len()) };
            all.extend(bytes);
        }
        let second = output.listen();
        let Sound::Bytes(bytes) = second.hear(Duration::ZERO) else { panic!("no scrollback") };
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.len() > SCROLLBACK - 100 && text.len() <= SCROLLBACK, "{}", text.len());
        assert!(text.starts_with(&line) && text.ends_with("\nprompt> "));
        say("bye");
        output.finish();
        assert_eq!(second.hear(Duration::from_secs(20)), Sound::Bytes(b"bye".to_vec()));
        assert_eq!(second.hear(Duration::from_secs(20)), Sound::End);
        let Sound::Bytes(bytes) = output.listen().hear(Duration::ZERO) else { panic!("no scrollback") };
        assert!(bytes.ends_with(b"\nprompt> bye"), "after the end too");
    }

    #[test]
    fn a_slow_listener_loses_output_and_is_told() {
        let output = Output::new(Box::new(std::io::sink())).unwrap();
        let slow = output.listen();
        let total = 2 * BEHIND;
        (0..total).for_each(|_| output.put(b'y'));
        output.finish();
        let Sound::Bytes(bytes) = slow.hear(Duration::ZERO) else { panic!("nothing") };
        assert!(bytes.len() <= BEHIND && bytes.len() > BEHIND / 2);
        assert_eq!(slow.hear(Duration::ZERO), Sound::Lost(total - bytes.len()));
        assert_eq!(slow.hear(Duration::ZERO), Sound::End);
    }

    #[test]
    fn a_failing_sink_leaves_the_listeners() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let output = Output::new(Box::new(Broken)).unwrap();
        let listener = output.listen();
        output.put(b'a');
        assert_eq!(listener.hear(Duration::from_secs(20)), Sound::Bytes(b"a".to_vec()));
        output.put(b'b');
        assert_eq!(listener.hear(Duration::from_secs(20)), Sound::Bytes(b"b".to_vec()));
        output.finish();
    }

    #[test]
    fn input_is_pulled_as_it_fits_and_the_pusher_waits() {
        let input = Input::new();
        let (tell, told) = mpsc::channel();
        input.set_ready(Some(Arc::new(move || tell.send(()).unwrap())));
        input.push(b"hello");
        told.recv().unwrap();
        let mut got: Vec<u8> = vec![];
        input.pull(|bytes| {
            got.extend(&bytes[..2]);
            2
        });
        input.pull(|bytes| {
            got.extend(bytes);
            bytes.len()
        });
        assert_eq!(got, b"hello");
        input.set_ready(None);

        input.offer(&vec![1; CAPACITY + 10]);
        let pusher = input.clone();
        let thread = std::thread::spawn(move || pusher.push(b"more"));
        let mut total = 0;
        while total < CAPACITY + 4 {
            input.pull(|bytes| {
                total += bytes.len();
                bytes.len()
            });
        }
        thread.join().unwrap();
        assert_eq!(total, CAPACITY + 4);
    }
}
