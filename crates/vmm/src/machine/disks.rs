//! The machine's disks: a virtio device on the PCI bus, an image, and a thread that brings them together.
//!
//! vCPUs touch the registers and never wait for a file, except to reset the device, for which the request under way
//! ends first. The thread takes one request at a time from the queue. It is outside of the VM as the console is: while
//! the VM is paused it does nothing, so that between requests, where everything stands still, the device can be saved
//! as it is. What it writes to guest memory it tells the engine before the guest can know ([`Vm::memory_written`]).
//!
//! Lock order: `still`, `side`, `transport`, then as in [`super::board`].

use super::board::Wired;
use super::{End, lock};
use crate::disk::{Image, Stamp};
use crate::{Error, Result, layout};
use anyvisor_devices::pci::{PciFunction, Slot, Window};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::block::{self, Storage};
use anyvisor_devices::virtio::pci::{Registers, Request, Transport, Work};
use anyvisor_devices::virtio::queue::Queue;
use anyvisor_engine::Vm;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Condvar, Mutex, Weak};
use vm_memory::GuestMemoryMmap;

/// The first disk's device number on the bus; what is below is the chipset's.
const FIRST_SLOT: u8 = 2;

/// One disk.
pub(super) struct Disk {
    slot: Slot,
    image: Image,
    memory: GuestMemoryMmap,
    vm: Arc<dyn Vm>,
    wired: Weak<Wired>,
    side: Mutex<Side>,
    transport: Mutex<Pins>,
    bell: Bell,
}

/// The registers, and the level of the interrupt pin as the chips know it.
struct Pins {
    transport: Transport,
    level: bool,
}

/// The side of the thread.
#[derive(Default)]
struct Side {
    /// Empty until the driver starts the device.
    queues: Vec<Option<Queue>>,
    /// The driver has been told not to notify.
    quiet: bool,
}

/// A disk in a snapshot. Its configuration space is the bus's.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskState {
    registers: Registers,
    queues: Vec<Option<Queue>>,
    image: Stamp,
}

impl DiskState {
    /// Refuses what no machine can have made.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> std::result::Result<(), BadState> {
        self.queues.iter().flatten().try_for_each(Queue::check)
    }
}

impl Disk {
    /// Disk number `n`, on `image`.
    pub fn new(n: usize, image: Image, memory: GuestMemoryMmap, vm: Arc<dyn Vm>, wired: Weak<Wired>) -> Disk {
        let transport = Transport::new(block::offer(&image));
        Disk {
            slot: Slot { device: FIRST_SLOT + n as u8, function: 0 },
            image,
            memory,
            vm,
            wired,
            side: Mutex::default(),
            transport: Mutex::new(Pins { transport, level: false }),
            bell: Bell::default(),
        }
    }

    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// Gives its BARs addresses from `base`, and returns where the next device's can be.
    pub fn place(&self, base: u64) -> u64 {
        let end = lock(&self.transport).transport.place(base);
        assert!(end <= layout::PCI_WINDOW_END, "the disks' registers do not fit");
        end
    }

    /// Has the thread look at the queue.
    pub fn ring(&self) {
        self.bell.ring();
    }

    /// Ends [`Disk::run`].
    pub fn stop(&self) {
        self.bell.stop();
    }

    /// Carries out requests until [`Disk::stop`].
    pub fn run(&self) {
        while self.bell.wait() {
            while self.work() {}
        }
    }

    /// Carries out one request; false if there is none to carry out now.
    fn work(&self) -> bool {
        let Some(wired) = self.wired.upgrade() else { return false };
        let still = wired.still();
        // Whoever lets go rings.
        if *still {
            return false;
        }
        let mut side = lock(&self.side);
        let features = {
            let pins = lock(&self.transport);
            if !pins.transport.may_work() {
                return false;
            }
            pins.transport.features()
        };
        let Side { queues, quiet } = &mut *side;
        let Some(Some(queue)) = queues.first_mut() else { return false };
        let (memory, written) = (&self.memory, |gpa, length| self.vm.memory_written(gpa, length));
        let mut step = || {
            if !block::serve(queue, features, &self.image, memory, &written)? {
                *quiet = false;
                return Ok((false, queue.want_notifications(memory, true, &written)?));
            }
            if !std::mem::replace(quiet, true) {
                queue.want_notifications(memory, false, &written)?;
            }
            Ok((queue.wants_interrupt(memory)?, true))
        };
        match step() {
            Ok((interrupt, more)) => {
                if interrupt {
                    self.signal(&wired, |transport| transport.interrupt_queue(0));
                }
                more
            }
            Err(broken) => {
                self.break_down(&wired, broken);
                false
            }
        }
    }

    fn break_down(&self, wired: &Wired, broken: anyvisor_devices::virtio::Broken) {
        tracing::warn!("disk '{}' stops until the guest resets it: {broken}", self.image.path().display());
        self.signal(wired, Transport::break_down);
    }

    /// Sends the message that `change` makes, and drives the pin.
    fn signal(&self, wired: &Wired, change: impl FnOnce(&mut Transport) -> Option<anyvisor_x86::Msi>) {
        let mut pins = lock(&self.transport);
        if let Some(message) = change(&mut pins.transport) {
            wired.send(message);
        }
        self.settle(wired, &mut pins);
    }

    /// Passes the pin's level on if it has changed, in order, because the lock is held.
    fn settle(&self, wired: &Wired, pins: &mut Pins) {
        let level = pins.transport.pin();
        if std::mem::replace(&mut pins.level, level) != level {
            wired.set_pci_pin(self.slot.device, level);
        }
    }

    /// An access of a vCPU to the registers, and what comes of it. What may start or reset the device waits for the
    /// thread's request to end.
    fn access<T>(&self, changes_life: bool, act: impl FnOnce(&mut Transport) -> (T, Work)) -> Option<T> {
        let wired = self.wired.upgrade()?;
        let mut side = changes_life.then(|| lock(&self.side));
        let mut pins = lock(&self.transport);
        let (result, work) = act(&mut pins.transport);
        work.messages.into_iter().for_each(|message| wired.send(message));
        match (work.request, &mut side) {
            (Some(Request::Start), Some(side)) => {
                **side = Side { queues: pins.transport.queues(), quiet: false };
                let bad = side.queues.iter().flatten().find_map(|queue| queue.check_areas(&self.memory).err());
                if let Some(broken) = bad {
                    side.queues.clear();
                    drop(pins);
                    self.break_down(&wired, broken);
                    return Some(result);
                }
            }
            (Some(Request::Reset), Some(side)) => **side = Side::default(),
            _ => {}
        }
        if work.request.is_some() {
            self.bell.ring();
        }
        self.settle(&wired, &mut pins);
        Some(result)
    }

    /// Makes all that the guest has written last, for a snapshot that is to match.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> Result<()> {
        let what = || format!("cannot write disk '{}' through", self.image.path().display());
        self.image.flush().map_err(|error| Error::host(what(), error))
    }

    /// The state of a disk that stands still.
    ///
    /// # Errors
    /// The host does not tell how the image is.
    pub fn save(&self) -> Result<DiskState> {
        let what = || format!("cannot look at disk '{}'", self.image.path().display());
        let image = self.image.stamp().map_err(|error| Error::host(what(), error))?;
        let queues = lock(&self.side).queues.clone();
        Ok(DiskState { registers: lock(&self.transport).transport.save().1, queues, image })
    }

    /// Says what about the image is not as it was when `state` was saved.
    ///
    /// # Errors
    /// The host's.
    pub fn difference(&self, state: &DiskState) -> Result<Option<String>> {
        let what = || format!("cannot look at disk '{}'", self.image.path().display());
        let now = self.image.stamp().map_err(|error| Error::host(what(), error))?;
        let name = self.image.path().display();
        Ok((now != state.image).then(|| {
            format!(
                "disk '{name}' has changed since; put the image back as it was then (a copy made with cp -p while the VM \
                 was paused or had ended)"
            )
        }))
    }

    /// Takes a saved state, which is untrusted. The bus has restored the configuration space.
    ///
    /// # Errors
    /// No guest can have made it so.
    pub fn restore(&self, state: &DiskState) -> std::result::Result<(), BadState> {
        let bad = |what| Err(BadState { chip: "disk", what });
        state.check()?;
        let mut side = lock(&self.side);
        let mut pins = lock(&self.transport);
        pins.transport.restore(&state.registers)?;
        let driven = pins.transport.queues();
        if !state.queues.is_empty() && state.queues.len() != driven.len() {
            return bad("another number of queues");
        }
        if state.queues.iter().flatten().any(|queue| queue.check_areas(&self.memory).is_err()) {
            return bad("a queue that is not in RAM");
        }
        *side = Side { queues: state.queues.clone(), quiet: false };
        if let Some(wired) = self.wired.upgrade() {
            self.settle(&wired, &mut pins);
        }
        drop(pins);
        self.bell.ring();
        Ok(())
    }
}

impl PciFunction for Disk {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.access(false, |transport| (transport.config_read(offset, data), Work::default()));
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.access(true, |transport| ((), transport.config_write(offset, data)));
        // It may have become bus master.
        self.bell.ring();
    }
    fn windows(&self) -> Vec<Window> {
        lock(&self.transport).transport.windows()
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.access(false, |transport| (transport.bar_read(bar, offset, data), Work::default()));
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let life = Transport::may_change_life(bar, offset, data.len());
        self.access(life, |transport| ((), transport.bar_write(bar, offset, data)));
    }
    fn save(&self) -> Vec<u8> {
        lock(&self.transport).transport.save().0
    }
    fn restore(&self, saved: &[u8]) -> std::result::Result<(), BadState> {
        lock(&self.transport).transport.restore_config(saved)
    }
}

/// Wakes the thread; rings while it works make it look once more.
#[derive(Default)]
struct Bell {
    state: Mutex<Rung>,
    changed: Condvar,
}

#[derive(Default)]
struct Rung {
    rung: bool,
    stopped: bool,
}

impl Bell {
    fn ring(&self) {
        lock(&self.state).rung = true;
        self.changed.notify_one();
    }

    fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_one();
    }

    /// Waits for a ring; false if it was stopped.
    fn wait(&self) -> bool {
        let mut state = lock(&self.state);
        while !state.rung && !state.stopped {
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.rung = false;
        !state.stopped
    }
}

/// Starts the thread of `disk`. It ends with the VM, or ends the VM.
pub(super) fn spawn(disk: Arc<Disk>, notify: Arc<super::Notify>) -> std::io::Result<std::thread::JoinHandle<()>> {
    let name = format!("disk{}", disk.slot.device - FIRST_SLOT);
    std::thread::Builder::new().name(name.clone()).spawn(move || {
        let guard = PanicGuard { name, notify };
        disk.run();
        drop(guard);
    })
}

/// Ends the VM if the thread panics.
struct PanicGuard {
    name: String,
    notify: Arc<super::Notify>,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let why = format!("{}: internal error, see above; please report it", self.name);
            self.notify.end(End::Failed(why));
        }
    }
}
