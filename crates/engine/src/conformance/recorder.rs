//! The devices of a case: they write down every access, answer what they are told to, and let a case act on
//! the machine in the middle of a run.

use super::{END_PORT, place};
use crate::{GuestIo, Kicker};
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a device saw. Sizes in bytes, values little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    In { port: u16, size: usize },
    Out { port: u16, size: usize, value: u64 },
    Read { gpa: u64, size: usize },
    Write { gpa: u64, size: usize, value: u64 },
    Eoi(u8),
    AcknowledgePic,
}

type Hook = Box<dyn Fn() + Send + Sync>;

/// See the module.
#[derive(Default)]
pub struct Recorder {
    log: Mutex<Vec<Access>>,
    answers: Mutex<VecDeque<u64>>,
    pic: Mutex<VecDeque<u8>>,
    hooks: Mutex<Vec<(u16, Hook)>>,
    ender: Mutex<Option<Kicker>>,
    ended: AtomicBool,
}

impl Recorder {
    /// Takes the accesses so far; those that end a run are not among them.
    pub fn take_log(&self) -> Vec<Access> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// What the next reads of ports or memory return; without answers they return all ones.
    pub fn answer(&self, values: &[u64]) {
        self.answers.lock().unwrap().extend(values);
    }

    /// The vectors that the 8259 pair answers acknowledge cycles with.
    pub fn set_pic(&self, vectors: &[u8]) {
        self.pic.lock().unwrap().extend(vectors);
    }

    /// Calls `hook` at each write to `port`, on the vCPU's thread, before the write is over.
    pub fn on_out(&self, port: u16, hook: impl Fn() + Send + Sync + 'static) {
        self.hooks.lock().unwrap().push((port, Box::new(hook)));
    }

    /// What an end of a run kicks.
    pub(super) fn set_ender(&self, kicker: Kicker) {
        *self.ender.lock().unwrap() = Some(kicker);
    }

    /// Whether a guest has got to an end since the last call.
    pub(super) fn take_ended(&self) -> bool {
        self.ended.swap(false, Ordering::SeqCst)
    }

    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(kicker) = &*self.ender.lock().unwrap() {
            kicker.kick();
        }
    }

    fn note(&self, access: Access) {
        self.log.lock().unwrap().push(access);
    }

    fn fill(&self, data: &mut [u8]) {
        let value = self.answers.lock().unwrap().pop_front().unwrap_or(u64::MAX);
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }
}

fn number(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    u64::from_le_bytes(bytes)
}

impl GuestIo for Recorder {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Access::In { port, size: data.len() });
        self.fill(data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if port == END_PORT {
            return self.end();
        }
        self.note(Access::Out { port, size: data.len(), value: number(data) });
        for (_, hook) in self.hooks.lock().unwrap().iter().filter(|(at, _)| *at == port) {
            hook();
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.note(Access::Read { gpa, size: data.len() });
        self.fill(data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if gpa == place::END {
            return self.end();
        }
        self.note(Access::Write { gpa, size: data.len(), value: number(data) });
    }

    fn eoi(&self, vector: u8) {
        self.note(Access::Eoi(vector));
    }

    fn acknowledge_pic(&self) -> Option<u8> {
        self.note(Access::AcknowledgePic);
        self.pic.lock().unwrap().pop_front()
    }
}
