//! Devices that come and go while the machine runs.
//!
//! A device that comes is on the bus at once, without addresses, and the operating system finds it when it looks, as the
//! event tells it to. One that is to go stays until the operating system has let go of it. A machine some of whose devices
//! have come or gone is not the one that its configuration describes, so it cannot be saved.

use super::{Board, Wired};
use crate::config::{Disk, Net};
use crate::machine::devices::{self, Bell, DEVICES_MAX, Device, FIRST_SLOT, Farewell};
use crate::machine::lock;
use crate::virtio::Model;
use crate::{Error, Result, disk, net};
use std::sync::Arc;
use std::thread::JoinHandle;
use vm_memory::GuestMemoryMmap;

/// What has come of devices that came or went.
#[derive(Default)]
pub(super) struct Changes {
    threads: Vec<JoinHandle<()>>,
    /// Taken out of the bus, though what was under way may not have ended: after that their threads free what they have of the
    /// host. They are kept for the owner's thread to drop, for vCPUs' may not close files.
    leaving: Vec<Arc<Device>>,
}

/// A device, for those who may take it out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// Its number on the bus.
    pub slot: u8,
    pub name: String,
}

impl Board {
    /// The devices on the bus of a machine that stands still, and those that are just leaving it.
    pub fn plugged(&self) -> Vec<Plugged> {
        let plugged = |device: &Arc<Device>| Plugged { slot: device.slot().device, name: device.name().to_owned() };
        self.present().iter().map(plugged).collect()
    }

    fn present(&self) -> Vec<Arc<Device>> {
        let mut changes = lock(&self.chips.changes);
        let leaving = changes.as_mut().map_or(vec![], |changes| {
            // Its thread has ended.
            changes.leaving.retain(|device| Arc::strong_count(device) > 1);
            changes.leaving.clone()
        });
        drop(changes);
        self.devices().into_iter().chain(leaving).collect()
    }

    /// Puts a disk on the bus of a machine that stands still and has so many vCPUs. Returns its number there.
    ///
    /// # Errors
    /// The image cannot be used, no slot is free; or the host's.
    pub fn plug_disk(&self, disk: &Disk, cpus: u32, memory: &GuestMemoryMmap) -> Result<u8> {
        self.plug(memory, |slot| Ok(Box::new(disk::open_another(disk, slot.into(), cpus)?)))
    }

    /// Puts a network card on the bus of a machine that stands still. Returns its number there.
    ///
    /// # Errors
    /// It cannot be connected, there are too many, its address is another's; or the host's.
    pub fn plug_net(&self, net: &Net, memory: &GuestMemoryMmap) -> Result<u8> {
        let taken: Vec<_> = self.present().iter().filter_map(|device| device.mac()).collect();
        self.plug(memory, |_| Ok(Box::new(net::open_another(net, &taken)?)))
    }

    fn plug(&self, memory: &GuestMemoryMmap, make: impl FnOnce(u8) -> Result<Box<dyn Model>>) -> Result<u8> {
        let chips = &self.chips;
        let slots = FIRST_SLOT..FIRST_SLOT + DEVICES_MAX as u8;
        let taken: Vec<_> = self.plugged().iter().map(|plugged| plugged.slot).collect();
        let Some(slot) = slots.into_iter().find(|slot| !taken.contains(slot)) else {
            return Err(Error::user(format!("the machine has {DEVICES_MAX} devices already, the most there can be")));
        };
        let model = make(slot)?;
        let bell = Bell::new().map_err(|error| Error::host("cannot make what wakes a device", error))?;
        let wired = Arc::downgrade(chips);
        let device = Arc::new(Device::new(slot, model, bell, memory.clone(), chips.vm.clone(), wired));
        let thread = devices::spawn(device.clone(), chips.notify.clone());
        let thread = thread.map_err(|error| Error::host("cannot start the thread of a device", error))?;
        let mut changes = lock(&chips.changes);
        let threads = &mut changes.get_or_insert_default().threads;
        // Of those that have gone nothing is left.
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        drop(changes);
        chips.pci.add(device.slot(), device.clone()).expect("the slot is free");
        chips.devices_mut().push(device);
        lock(&chips.hotplug).plug(slot);
        chips.alarm.set(chips.settle_acpi_pm(&mut lock(&chips.acpi_pm)));
        Ok(slot)
    }

    /// Asks the operating system to let go of the device in `slot`. Says whether it listens.
    pub fn ask_to_unplug(&self, slot: u8) -> bool {
        let chips = &self.chips;
        let heard = lock(&chips.hotplug).ask_to_unplug(slot);
        chips.alarm.set(chips.settle_acpi_pm(&mut lock(&chips.acpi_pm)));
        heard
    }

    /// Whether devices have come or gone.
    pub fn has_changed(&self) -> bool {
        lock(&self.chips.changes).is_some()
    }

    /// The threads of devices that came while the machine ran.
    pub(in crate::machine) fn take_threads(&self) -> Vec<JoinHandle<()>> {
        let mut changes = lock(&self.chips.changes);
        changes.as_mut().map(|changes| std::mem::take(&mut changes.threads)).unwrap_or_default()
    }
}

impl Wired {
    pub(super) fn devices(&self) -> Vec<Arc<Device>> {
        self.devices.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn devices_mut(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Arc<Device>>> {
        self.devices.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes the devices in `slots`, by bit, out of the bus. On a vCPU's thread: nobody is waited for.
    pub(super) fn eject(&self, slots: u32) {
        let is_ejected = |device: &Arc<Device>| slots >> device.slot().device & 1 != 0;
        for device in self.devices().into_iter().filter(is_ejected) {
            lock(&self.changes).get_or_insert_default().leaving.push(device.clone());
            self.pci.remove(device.slot());
            device.stop(Farewell::Settle);
            device.release_pin();
            self.devices_mut().retain(|other| !Arc::ptr_eq(other, &device));
            tracing::info!("{} is taken out of slot {}", device.name(), device.slot().device);
        }
    }
}
