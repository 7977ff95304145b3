//! The machine's virtio devices: registers on the PCI bus, queues, a [`Model`] of what the device does, and its thread.
//!
//! vCPUs touch the registers. They ring for the thread and never wait for it, except to reset the device, for which what is
//! under way ends first. The thread has the model work on the queues. It is outside of the VM as the console is: before
//! the VM stands still the model settles, and then does nothing, so that the device can be saved as it is. What it writes to
//! guest memory it tells the engine before the guest can know ([`Vm::memory_written`]).
//!
//! Lock order: `still`, `side`, `pins` or `life`, then as in [`super::board`]. While it waits the thread holds `side`, and
//! lets go when rung: others who want it ring first, while the VM stands still.

use super::board::Wired;
use super::{End, lock};
use crate::virtio::{Driven, Model, Queues};
use crate::{Result, layout};
use anyvisor_devices::pci::{PciFunction, Slot, Window};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::Broken;
use anyvisor_devices::virtio::pci::{Offer, Registers, Request, Transport, Work};
use anyvisor_devices::virtio::queue::Queue;
use anyvisor_engine::Vm;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::Instant;
use vm_memory::GuestMemoryMmap;

/// The first device's number on the bus; what is below is the chipset's.
pub(super) const FIRST_SLOT: u8 = 2;
/// Most devices: the slots of a bus that the chipset leaves.
pub(super) const DEVICES_MAX: usize = 32 - FIRST_SLOT as usize;

/// One device.
pub(super) struct Device {
    slot: Slot,
    name: String,
    mac: Option<[u8; 6]>,
    memory: GuestMemoryMmap,
    vm: Arc<dyn Vm>,
    wired: Weak<Wired>,
    side: Mutex<Side>,
    pins: Mutex<Pins>,
    life: Mutex<Life>,
    obeyed: Condvar,
    bell: Bell,
}

/// The registers, and the level of the interrupt pin as the chips know it.
struct Pins {
    transport: Transport,
    level: bool,
}

/// The side of the thread.
struct Side {
    model: Box<dyn Model>,
    /// Empty until the driver starts the device.
    queues: Vec<Option<Driven>>,
}

/// What vCPUs ask of the thread: to look whether the driver has started or reset the device. Requests are counted.
#[derive(Default)]
struct Life {
    asked: u64,
    done: u64,
    stopped: bool,
    farewell: Farewell,
}

/// What a device does when it is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Farewell {
    /// Nothing: the VM is ended from outside.
    #[default]
    None,
    /// The VM has ended by itself: what the guest said last still goes out.
    HearOut,
    /// It is taken out of a VM that goes on: what is under way ends.
    Settle,
}

/// A device in a snapshot. Its configuration space is the bus's.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    registers: Registers,
    queues: Vec<Option<Queue>>,
    /// The model's own.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    model: Value,
}

impl DeviceState {
    /// Refuses what no machine can have made, as far as it can be seen without the device.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), BadState> {
        self.queues.iter().flatten().try_for_each(Queue::check)
    }
}

/// What the thread does after it has looked.
enum Next {
    Again,
    /// Waits for the model's sources and its deadline too.
    Wait,
    /// Waits to be rung for.
    Rest,
}

impl Device {
    /// The device with number `number` on the bus, which does what `model` does.
    pub fn new(
        number: u8,
        model: Box<dyn Model>,
        bell: Bell,
        memory: GuestMemoryMmap,
        vm: Arc<dyn Vm>,
        wired: Weak<Wired>,
    ) -> Device {
        let transport = Transport::new(model.offer());
        Device {
            slot: Slot { device: number, function: 0 },
            name: model.name(),
            mac: model.mac(),
            memory,
            vm,
            wired,
            side: Mutex::new(Side { model, queues: Vec::new() }),
            pins: Mutex::new(Pins { transport, level: false }),
            life: Mutex::default(),
            obeyed: Condvar::new(),
            bell,
        }
    }

    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// Gives its BARs addresses from `base`, and returns where the next device's can be.
    pub fn place(&self, base: u64) -> u64 {
        let end = lock(&self.pins).transport.place(base);
        assert!(end <= layout::PCI_WINDOW_END, "the devices' registers do not fit");
        end
    }

    /// What it is, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A network card's address.
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.mac
    }

    /// It has been taken out of the bus: drives its pin no more.
    pub fn release_pin(&self) {
        let mut pins = lock(&self.pins);
        if std::mem::take(&mut pins.level)
            && let Some(wired) = self.wired.upgrade()
        {
            wired.set_pci_pin(self.slot.device, false);
        }
    }

    /// Has the thread look at the queues.
    pub fn ring(&self) {
        self.bell.ring();
    }

    /// Ends [`Device::run`], and nobody waits for the thread any more.
    pub fn stop(&self, farewell: Farewell) {
        let mut life = lock(&self.life);
        (life.stopped, life.farewell) = (true, farewell);
        drop(life);
        self.obeyed.notify_all();
        self.bell.ring();
    }

    /// Has the model work until [`Device::stop`].
    ///
    /// # Errors
    /// The host's: it cannot wait.
    fn run(&self) -> std::io::Result<()> {
        while !lock(&self.life).stopped {
            match self.look() {
                Next::Again => {}
                Next::Rest => self.bell.wait(Vec::new(), None)?,
                Next::Wait => {
                    let side = lock(&self.side);
                    self.bell.wait(side.model.sources(), side.model.deadline())?;
                }
            }
        }
        let farewell = lock(&self.life).farewell;
        if farewell != Farewell::None {
            self.say(farewell);
        }
        Ok(())
    }

    fn say(&self, farewell: Farewell) {
        let Some(wired) = self.wired.upgrade() else { return };
        let mut side = lock(&self.side);
        self.obey(&wired, &mut side);
        if farewell == Farewell::Settle {
            self.attend(&wired, &mut side, 0, |model, queues| model.settle(queues));
            // What it has of the host is free at once: files, sockets, ports.
            let offer = side.model.offer();
            side.model = Box::new(Gone(offer));
            return;
        }
        let features = {
            let pins = lock(&self.pins);
            pins.transport.may_work().then(|| pins.transport.features())
        };
        if let Some(features) = features {
            self.attend(&wired, &mut side, features, |model, queues| {
                model.finish(queues);
                Ok(())
            });
        }
    }

    /// Does what there is to do now.
    fn look(&self) -> Next {
        let Some(wired) = self.wired.upgrade() else { return Next::Rest };
        let still = wired.still();
        // Whoever lets go rings.
        if *still {
            return Next::Rest;
        }
        let mut side = lock(&self.side);
        self.obey(&wired, &mut side);
        let features = {
            let mut pins = lock(&self.pins);
            if let Some(config) = pins.transport.take_written_config() {
                side.model.config_write(config);
            }
            if !pins.transport.may_work() {
                return Next::Rest;
            }
            pins.transport.features()
        };
        if self.attend(&wired, &mut side, features, |model, queues| model.work(queues)) {
            Next::Again
        } else {
            Next::Wait
        }
    }

    /// Lets the model at the queues, and sends what comes of it. Returns whether there is more to do at once.
    fn attend(
        &self,
        wired: &Wired,
        side: &mut Side,
        features: u64,
        act: impl FnOnce(&mut dyn Model, &mut Queues<'_>) -> Result<(), Broken>,
    ) -> bool {
        let written = |gpa, length| self.vm.memory_written(gpa, length);
        let interrupt = |queues: &[u16]| {
            self.signal(wired, |transport| {
                queues.iter().filter_map(|queue| transport.interrupt_queue(*queue)).collect()
            })
        };
        let mut queues = Queues::new(&mut side.queues, features, &self.memory, &written, &interrupt);
        let result = act(&mut *side.model, &mut queues).and_then(|()| queues.signal());
        if queues.is_reconfigured() {
            let config = side.model.offer().config;
            self.signal(wired, |transport| transport.change_config(&config).into_iter().collect());
        }
        match result {
            Ok(()) => queues.is_cut_short(),
            Err(broken) => {
                self.break_down(wired, broken);
                false
            }
        }
    }

    fn break_down(&self, wired: &Wired, broken: Broken) {
        tracing::warn!("{} stops until the guest resets it: {broken}", self.name);
        self.signal(wired, |transport| transport.break_down().into_iter().collect());
    }

    /// Sends the messages that `change` makes, and drives the pin.
    fn signal(&self, wired: &Wired, change: impl FnOnce(&mut Transport) -> Vec<anyvisor_x86::Msi>) {
        let mut pins = lock(&self.pins);
        change(&mut pins.transport).into_iter().for_each(|message| wired.send(message));
        self.drive_pin(wired, &mut pins);
    }

    /// Passes the pin's level on if it has changed, in order, because the lock is held.
    fn drive_pin(&self, wired: &Wired, pins: &mut Pins) {
        let level = pins.transport.pin();
        if std::mem::replace(&mut pins.level, level) != level {
            wired.set_pci_pin(self.slot.device, level);
        }
    }

    /// Ends what is under way if the driver has reset the device or started it, and starts it if that is what the registers
    /// say by now.
    fn obey(&self, wired: &Wired, side: &mut Side) {
        let asked = {
            let life = lock(&self.life);
            if life.asked == life.done {
                return;
            }
            life.asked
        };
        // The registers are reset already: nobody is interrupted, nor told of mistakes.
        self.attend(wired, side, 0, |model, queues| model.settle(queues));
        side.queues.clear();
        side.model.reset();
        let started = {
            let pins = lock(&self.pins);
            pins.transport.is_driven().then(|| (pins.transport.queues(), pins.transport.features()))
        };
        if let Some((queues, features)) = started {
            match queues.iter().flatten().find_map(|queue| queue.check_areas(&self.memory).err()) {
                Some(broken) => self.break_down(wired, broken),
                None => {
                    side.queues = queues.into_iter().map(|queue| queue.map(Driven::new)).collect();
                    side.model.start(features);
                }
            }
        }
        lock(&self.life).done = asked;
        self.obeyed.notify_all();
    }

    /// An access of a vCPU to the registers, and what comes of it.
    fn access<T>(&self, act: impl FnOnce(&mut Transport) -> (T, Work)) -> Option<T> {
        let wired = self.wired.upgrade()?;
        let mut pins = lock(&self.pins);
        let (result, work) = act(&mut pins.transport);
        work.messages.into_iter().for_each(|message| wired.send(message));
        self.drive_pin(&wired, &mut pins);
        drop(pins);
        match work.request {
            None => {}
            Some(Request::Notify(_) | Request::Configure) => self.ring(),
            Some(Request::Start) => drop(self.ask()),
            // When the driver reads that the device is reset, its memory is no longer touched (2.4.1).
            Some(Request::Reset) => {
                let mut life = self.ask();
                let ticket = life.asked;
                while life.done < ticket && !life.stopped {
                    life = self.obeyed.wait(life).unwrap_or_else(|poisoned| poisoned.into_inner());
                }
            }
        }
        Some(result)
    }

    /// Has the thread look at the registers.
    fn ask(&self) -> MutexGuard<'_, Life> {
        let mut life = lock(&self.life);
        life.asked += 1;
        self.bell.ring();
        life
    }

    /// Ends what is under way, in a VM that is to stand still.
    pub fn settle(&self) {
        self.bell.ring();
        let mut side = lock(&self.side);
        let Some(wired) = self.wired.upgrade() else { return };
        self.obey(&wired, &mut side);
        let features = lock(&self.pins).transport.features();
        self.attend(&wired, &mut side, features, |model, queues| model.settle(queues));
    }

    /// The state of a device that stands still.
    ///
    /// # Errors
    /// The model cannot be saved.
    pub fn save(&self) -> Result<DeviceState> {
        let mut side = lock(&self.side);
        let model = side.model.save()?;
        let queues = side.queues.iter().map(|driven| driven.as_ref().map(|driven| driven.queue.clone())).collect();
        Ok(DeviceState { registers: lock(&self.pins).transport.save().1, queues, model })
    }

    /// Says what outside of the VM is not as it was when `state` was saved.
    ///
    /// # Errors
    /// The host's.
    pub fn difference(&self, state: &DeviceState) -> Result<Option<String>> {
        lock(&self.side).model.difference(&state.model)
    }

    /// Takes a saved state, which is untrusted. The bus has restored the configuration space.
    ///
    /// # Errors
    /// No guest can have made it so.
    pub fn restore(&self, state: &DeviceState) -> Result<(), BadState> {
        let bad = |what| Err(BadState { chip: "virtio device", what });
        state.check()?;
        let mut side = lock(&self.side);
        let mut pins = lock(&self.pins);
        pins.transport.restore(&state.registers)?;
        if !state.queues.is_empty() && state.queues.len() != pins.transport.queues().len() {
            return bad("another number of queues");
        }
        if state.queues.iter().flatten().any(|queue| queue.check_areas(&self.memory).is_err()) {
            return bad("a queue that is not in RAM");
        }
        side.queues = state.queues.iter().map(|queue| queue.clone().map(Driven::new)).collect();
        side.model.restore(&state.model)?;
        pins.transport.restore_device_config(&side.model.offer().config);
        if !side.queues.is_empty() {
            side.model.start(pins.transport.features());
        }
        if let Some(wired) = self.wired.upgrade() {
            self.drive_pin(&wired, &mut pins);
        }
        drop(pins);
        self.bell.ring();
        Ok(())
    }
}

impl PciFunction for Device {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.access(|transport| (transport.config_read(offset, data), Work::default()));
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.access(|transport| ((), transport.config_write(offset, data)));
        // It may have become bus master.
        self.bell.ring();
    }
    fn windows(&self) -> Vec<Window> {
        lock(&self.pins).transport.windows()
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.access(|transport| (transport.bar_read(bar, offset, data), Work::default()));
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if Transport::only_notifies(bar, offset, data.len()) {
            return self.bell.ring();
        }
        self.access(|transport| ((), transport.bar_write(bar, offset, data)));
    }
    fn save(&self) -> Vec<u8> {
        lock(&self.pins).transport.save().0
    }
    fn restore(&self, saved: &[u8]) -> Result<(), BadState> {
        lock(&self.pins).transport.restore_config(saved)
    }
}

/// What a device does that has been taken out of a VM that goes on: nothing.
struct Gone(Offer);

impl Model for Gone {
    fn name(&self) -> String {
        "nothing".into()
    }
    fn offer(&self) -> Offer {
        self.0.clone()
    }
    fn work(&mut self, _queues: &mut Queues<'_>) -> Result<(), Broken> {
        Ok(())
    }
}

/// Wakes the thread. Ringing costs a system call only if it sleeps.
pub(super) struct Bell {
    event: OwnedFd,
    rung: AtomicBool,
    asleep: AtomicBool,
}

impl Bell {
    /// # Errors
    /// The host's.
    pub fn new() -> std::io::Result<Bell> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Bell { event, rung: AtomicBool::new(false), asleep: AtomicBool::new(false) })
    }

    fn ring(&self) {
        self.rung.store(true, Ordering::SeqCst);
        // Either this sees that the thread goes to sleep, or the thread sees that it was rung for.
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            // It fails only when it has been written very often and not been read: then it wakes the thread as well.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Waits for a ring, for one of `sources` or for `deadline`. A ring before, while the thread was busy, ends it at once.
    fn wait(
        &self,
        sources: Vec<(std::os::fd::BorrowedFd<'_>, PollFlags)>,
        deadline: Option<Instant>,
    ) -> std::io::Result<()> {
        self.asleep.store(true, Ordering::SeqCst);
        let result = if self.rung.load(Ordering::SeqCst) { Ok(()) } else { self.sleep(sources, deadline) };
        self.asleep.store(false, Ordering::SeqCst);
        self.rung.swap(false, Ordering::SeqCst);
        result
    }

    fn sleep(
        &self,
        sources: Vec<(std::os::fd::BorrowedFd<'_>, PollFlags)>,
        deadline: Option<Instant>,
    ) -> std::io::Result<()> {
        let mut waited = vec![PollFd::from_borrowed_fd(self.event.as_fd(), PollFlags::IN)];
        waited.extend(sources.into_iter().map(|(source, flags)| PollFd::from_borrowed_fd(source, flags)));
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match poll(&mut waited, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !waited[0].revents().is_empty() {
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        }
        Ok(())
    }
}

/// Starts the thread of `device`. It ends with the VM, or ends the VM.
pub(super) fn spawn(device: Arc<Device>, notify: Arc<super::Notify>) -> std::io::Result<std::thread::JoinHandle<()>> {
    let kind = device.name.split(' ').next().unwrap_or("device");
    let name = format!("{kind}{}", device.slot.device - FIRST_SLOT);
    std::thread::Builder::new().name(name.clone()).spawn(move || {
        let guard = PanicGuard { name, notify };
        if let Err(error) = device.run() {
            guard.notify.end(End::Failed(format!("the thread of {} cannot wait: {error}", device.name)));
        }
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
