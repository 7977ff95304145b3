//! What a virtio device of the machine does behind its registers: [`Model`], and the queues that it works on.
//!
//! **Idea.** The machine gives each device a slot, registers, an interrupt and a thread (`machine::devices`). What the
//! device is for, disk or network, is a [`Model`]: it takes requests from [`Queues`] and gives them back, as far as
//! it can without waiting. The thread waits, for the driver's notifications and for whatever else the model names.
//!
//! **Invariants.** A model is called by one thread at a time, never while the VM stands still, except to be saved. When it
//! has settled it holds no chain, so that queues and registers are all there is to save of a request. What it writes to
//! guest memory is reported before the guest can learn of it: [`Queues::written`].

#[cfg(test)]
pub(crate) mod driver;

use crate::Result;
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::pci::Offer;
use anyvisor_devices::virtio::queue::{Chain, Chains, Queue};
use anyvisor_devices::virtio::{Broken, Written};
use rustix::event::PollFlags;
use serde_json::Value;
use std::os::fd::BorrowedFd;
use std::time::Instant;
use vm_memory::GuestMemoryMmap;

/// Most chains that a device takes before its thread looks whether the VM is to stand still.
const TURN: u32 = 1024;

/// What a device does. All of it is called on the device's thread, unless it says otherwise.
pub trait Model: Send {
    /// For messages: what it is and which, as `disk 'a.img'`. The first word names the thread.
    fn name(&self) -> String;

    /// What the registers show. Asked for before the guest starts, after [`Model::restore`], and after
    /// [`Queues::reconfigure`]: only `config` may change, and not its length. On any thread.
    fn offer(&self) -> Offer;

    /// A network card's address. On any thread.
    fn mac(&self) -> Option<[u8; 6]> {
        None
    }

    /// The driver has set the device up, with these features.
    fn start(&mut self, _features: u64) {}

    /// The driver has reset the device, or starts it anew. It has settled before.
    fn reset(&mut self) {}

    /// The driver has written some of [`Offer::writable`]: all of the configuration, as it is now.
    fn config_write(&mut self, _config: &[u8]) {}

    /// What has it called beside notifications. Asked for before each wait.
    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        Vec::new()
    }

    /// When it wants to be called anyway.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Works on the queues as far as it can without waiting for long.
    ///
    /// # Errors
    /// The driver's mistake, after which the device needs a reset.
    fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken>;

    /// Ends what is under way, waiting for it, and gives all chains back. Called before a reset, and when the VM is to
    /// stand still, then on the owner's thread.
    ///
    /// # Errors
    /// As for [`Model::work`].
    fn settle(&mut self, _queues: &mut Queues<'_>) -> Result<(), Broken> {
        Ok(())
    }

    /// The VM has ended by itself: what the guest has said and is not where it should be goes there now, as long as that is
    /// worth waiting for.
    fn finish(&mut self, _queues: &mut Queues<'_>) {}

    /// What a snapshot needs of it beside registers and queues. It has settled. On the owner's thread.
    ///
    /// # Errors
    /// The host's; or why a VM with this device cannot be saved.
    fn save(&mut self) -> Result<Value> {
        Ok(Value::Null)
    }

    /// What outside of the VM is not as it was when `saved` was made, in one line. `saved` is untrusted. On the owner's thread.
    ///
    /// # Errors
    /// The host's.
    fn difference(&self, _saved: &Value) -> Result<Option<String>> {
        Ok(None)
    }

    /// Takes a saved state, which is untrusted; [`Model::start`] follows if the device was at work. On the owner's thread.
    ///
    /// # Errors
    /// No guest can have made it so.
    fn restore(&mut self, saved: &Value) -> Result<(), BadState> {
        if saved.is_null() {
            Ok(())
        } else {
            Err(BadState { chip: "virtio device", what: "a state where there is none" })
        }
    }
}

/// A queue that the driver has enabled.
pub(crate) struct Driven {
    pub queue: Queue,
    /// The driver need not notify, for the device looks by itself.
    quiet: bool,
    /// Something was given back of which the driver may not know.
    pushed: bool,
}

impl Driven {
    pub fn new(queue: Queue) -> Driven {
        // Whatever the driver knows now, it is told when the device has nothing left to do.
        Driven { queue, quiet: true, pushed: false }
    }
}

/// A device's queues, by number, and the memory they are in.
pub struct Queues<'a> {
    driven: &'a mut [Option<Driven>],
    features: u64,
    memory: &'a GuestMemoryMmap,
    written: Written<'a>,
    interrupt: &'a dyn Fn(&[u16]),
    left: u32,
    reconfigured: bool,
}

impl<'a> Queues<'a> {
    /// `interrupt` sends the interrupts of these queues.
    pub(crate) fn new(
        driven: &'a mut [Option<Driven>],
        features: u64,
        memory: &'a GuestMemoryMmap,
        written: Written<'a>,
        interrupt: &'a dyn Fn(&[u16]),
    ) -> Queues<'a> {
        Queues { driven, features, memory, written, interrupt, left: TURN, reconfigured: false }
    }

    /// How many there are, enabled or not.
    pub fn count(&self) -> usize {
        self.driven.len()
    }

    /// Features that driver and device have agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    pub fn memory(&self) -> &'a GuestMemoryMmap {
        self.memory
    }

    /// To be told what was written to guest memory, before the chain is given back.
    pub fn written(&self) -> Written<'a> {
        self.written
    }

    /// Takes the next chain of queue `n`. If there is none, the driver notifies of the next.
    ///
    /// # Errors
    /// The queue or the chain makes no sense.
    pub fn pop(&mut self, n: usize) -> Result<Option<Chain>, Broken> {
        let Some(Some(driven)) = self.driven.get_mut(n) else { return Ok(None) };
        if self.left == 0 {
            return Ok(None);
        }
        loop {
            if let Some(chain) = driven.queue.pop(self.memory)? {
                self.left -= 1;
                if !std::mem::replace(&mut driven.quiet, true) {
                    driven.queue.want_notifications(self.memory, false, self.written)?;
                }
                return Ok(Some(chain));
            }
            if !std::mem::replace(&mut driven.quiet, false) {
                return Ok(None);
            }
            // One may have come meanwhile.
            driven.queue.want_notifications(self.memory, true, self.written)?;
        }
    }

    /// Whether no queue has a chain now. Whoever asks looks again by itself: no notification is asked for.
    ///
    /// # Errors
    /// A queue is not in RAM.
    pub fn are_empty(&self) -> Result<bool, Broken> {
        for driven in self.driven.iter().flatten() {
            if !driven.queue.is_empty(self.memory)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives chain `head` of queue `n` back, into whose buffers `length` bytes have been written and reported.
    ///
    /// # Errors
    /// The queue is not in RAM.
    pub fn push(&mut self, n: usize, head: u16, length: u32) -> Result<(), Broken> {
        let Some(Some(driven)) = self.driven.get_mut(n) else { return Ok(()) };
        driven.pushed = true;
        driven.queue.push(self.memory, head, length, self.written)
    }

    /// Makes the last `chains` popped from queue `n`, none of which has been pushed, available again.
    pub fn put_back(&mut self, n: usize, chains: u16) {
        if let Some(Some(driven)) = self.driven.get_mut(n) {
            driven.queue.put_back(chains);
        }
    }

    /// Interrupts now for what has been pushed, as far as the driver wants it. Otherwise it happens when the model returns.
    ///
    /// # Errors
    /// A queue is not in RAM.
    pub fn signal(&mut self) -> Result<(), Broken> {
        let mut wanted = Vec::new();
        for (n, driven) in (0..).zip(self.driven.iter_mut()) {
            if let Some(driven) = driven
                && std::mem::take(&mut driven.pushed)
                && driven.queue.wants_interrupt(self.memory)?
            {
                wanted.push(n);
            }
        }
        if !wanted.is_empty() {
            (self.interrupt)(&wanted);
        }
        Ok(())
    }

    /// Queue `n` by itself.
    pub fn queue(&mut self, n: usize) -> OneQueue<'_, 'a> {
        OneQueue { queues: self, n }
    }

    /// Lets a model that is not to be interrupted take as many chains again.
    pub(crate) fn new_turn(&mut self) {
        self.left = TURN;
    }

    /// Takes no more chains in this turn: the model is called again at once, after others who want something of the device.
    pub fn give_way(&mut self) {
        self.left = 0;
    }

    /// The configuration in [`Model::offer`] has changed: the driver is told when the model returns.
    pub fn reconfigure(&mut self) {
        self.reconfigured = true;
    }

    /// Whether [`Queues::reconfigure`] was called.
    pub(crate) fn is_reconfigured(&self) -> bool {
        self.reconfigured
    }

    /// Whether a model was told that there is nothing more only because it was another's turn.
    pub(crate) fn is_cut_short(&self) -> bool {
        self.left == 0
    }
}

/// One of a device's queues.
pub struct OneQueue<'q, 'a> {
    queues: &'q mut Queues<'a>,
    n: usize,
}

impl Chains for OneQueue<'_, '_> {
    fn pop(&mut self) -> std::result::Result<Option<Chain>, Broken> {
        self.queues.pop(self.n)
    }
    fn push(&mut self, head: u16, length: u32) -> std::result::Result<(), Broken> {
        self.queues.push(self.n, head, length)
    }
    fn put_back(&mut self) {
        self.queues.put_back(self.n, 1);
    }
    fn memory(&self) -> &GuestMemoryMmap {
        self.queues.memory
    }
    fn written(&self) -> Written<'_> {
        self.queues.written
    }
}
