//! The far end of the serial line: what happens to bytes between the 16550 and the host.
//!
//! A guest writes one byte at a time, on a vCPU thread, under the chip's lock; the host takes bytes in
//! blocks and may stall. So [`Output`] is a bounded buffer with a writer thread behind it, which sends what
//! has gathered in one system call. If the host stalls, the buffer fills and the guest waits: nothing is
//! lost. [`Input`] is the same in the other direction: the reader pushes, the chip pulls what its FIFO holds.
//!
//! Invariant: a stalled host never keeps a VM from ending; [`Output::abandon`] frees whoever waits.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes that either direction holds before the sender waits.
const CAPACITY: usize = 64 << 10;
/// How long output gathers before it is written: below what a person notices.
const GATHER: Duration = Duration::from_micros(500);

/// Where the guest's output goes.
pub struct Output {
    shared: Arc<OutputShared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct OutputShared {
    state: Mutex<OutputState>,
    changed: Condvar,
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
}

impl Output {
    /// Sends bytes to `sink`. If it fails, a warning is logged and later output dropped.
    ///
    /// # Errors
    /// The writer thread cannot be started.
    pub fn new(sink: Box<dyn Write + Send>) -> std::io::Result<Output> {
        let shared = Arc::new(OutputShared { state: Mutex::default(), changed: Condvar::new() });
        let for_writer = shared.clone();
        let writer = std::thread::Builder::new().name("serial-out".into()).spawn(move || for_writer.write_to(sink))?;
        Ok(Output { shared, writer: Mutex::new(Some(writer)) })
    }

    /// Takes one byte; waits while the buffer is full.
    pub fn put(&self, byte: u8) {
        let mut state = lock(&self.shared.state);
        while state.buffer.len() >= CAPACITY && !state.abandoned {
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
    fn write_to(&self, mut sink: Box<dyn Write + Send>) {
        loop {
            let mut state = lock(&self.state);
            while state.buffer.is_empty() && !state.finished && !state.abandoned {
                state.idle = true;
                self.changed.notify_all();
                state = wait(&self.changed, state);
            }
            if state.abandoned || state.buffer.is_empty() {
                return;
            }
            if !state.finished && state.buffer.len() < CAPACITY / 2 {
                drop(state);
                std::thread::sleep(GATHER);
                state = lock(&self.state);
            }
            let bytes = std::mem::take(&mut state.buffer);
            drop(state);
            self.changed.notify_all();
            if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                tracing::warn!("serial output is lost from here on: {error}");
                lock(&self.state).abandoned = true;
                self.changed.notify_all();
                return;
            }
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
