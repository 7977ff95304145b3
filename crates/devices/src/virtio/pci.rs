//! virtio over PCI, modern devices only (virtio 1.2, 4.1): configuration space and the registers in its BARs.
//!
//! **Idea.** [`Transport`] is all that a vCPU touches of a device, and never looks at guest memory. What a write asks
//! for beyond registers comes out as [`Work`]. Whoever owns the queues asks it for the interrupt of a queue, and tells
//! it when the device is broken.
//!
//! BAR 0 holds the four structures that the capabilities name, each in a page of its own, BAR 1 MSI-X. There is one
//! vector for the configuration and one for each queue.

use super::queue::{Queue, SIZE_MAX};
use super::{feature, status};
use crate::pci::Window;
use crate::pci::config::{BarKind, ConfigSpace, Identity};
use crate::pci::msix::Msix;
use crate::state::{BadState, require};
use anyvisor_x86::Msi;
use serde::{Deserialize, Serialize};
use std::ops::Range;

const VENDOR: u16 = 0x1af4;
/// Modern devices' PCI numbers are their type's behind this (4.1.2.1).
const DEVICE: u16 = 0x1040;

/// Bytes of BAR 0 and BAR 1.
pub const REGISTERS_SIZE: u64 = 0x4000;
pub const MSIX_SIZE: u64 = 0x1000;
const REGISTERS_BAR: u8 = 0;
const MSIX_BAR: u8 = 1;
const PENDING: u32 = 0x800;

/// The structures, by page of BAR 0, and what the capabilities call them (4.1.4).
const COMMON: (u64, u8) = (0x0000, 1);
const NOTIFY: (u64, u8) = (0x3000, 2);
const ISR: (u64, u8) = (0x1000, 3);
const SPECIFIC: (u64, u8) = (0x2000, 4);
const PCI_ACCESS: u8 = 5;
const PAGE: u64 = 0x1000;
/// Bytes between two queues' notification registers.
const NOTIFY_MULTIPLIER: u32 = 4;
const COMMON_SIZE: usize = 64;

const VENDOR_CAPABILITY: u8 = 0x09;
/// A vector that is none.
pub const NO_VECTOR: u16 = 0xffff;
/// ISR bits (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What a device is and offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Device type (chapter 5).
    pub device: u16,
    /// PCI class code: 0xCCSSPP.
    pub class: u32,
    /// Feature bits.
    pub features: u64,
    /// Most descriptors of each queue.
    pub queues: Vec<u16>,
    /// The device-specific configuration.
    pub config: Vec<u8>,
    /// Its bytes that drivers may write.
    pub writable: Range<usize>,
}

/// What a write asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Look at this queue.
    Notify(u16),
    /// The driver is ready: begin with the queues of [`Transport::queues`].
    Start,
    /// Forget the queues. The registers are reset already.
    Reset,
    /// The driver has written the configuration: see [`Transport::take_written_config`].
    Configure,
}

/// What comes of an access.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub messages: Vec<Msi>,
    pub request: Option<Request>,
}

/// The registers, which are a device's saved state beside its configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    generation: u8,
    queue_select: u16,
    isr: u8,
    queues: Vec<QueueRegisters>,
    msix: Msix,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueRegisters {
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// Fields of the common configuration (4.1.4.3): offset and size.
const FIELDS: [(usize, usize); 16] = [
    (0, 4),
    (4, 4),
    (8, 4),
    (12, 4),
    (16, 2),
    (18, 2),
    (20, 1),
    (21, 1),
    (22, 2),
    (24, 2),
    (26, 2),
    (28, 2),
    (30, 2),
    (32, 8),
    (40, 8),
    (48, 8),
];

/// See the module.
pub struct Transport {
    offer: Offer,
    /// The driver has written the device's configuration since it was last asked.
    configured: bool,
    config: ConfigSpace,
    registers: Registers,
    /// Offsets in configuration space: MSI-X's control word, and the capability for access without BARs.
    msix_control: u16,
    access: u16,
}

impl Transport {
    /// A device after reset. [`feature::VERSION_1`] is offered in any case.
    pub fn new(mut offer: Offer) -> Transport {
        assert!(offer.queues.iter().all(|size| size.is_power_of_two() && *size <= SIZE_MAX), "{:?}", offer.queues);
        offer.features |= feature::VERSION_1;
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE + offer.device,
            class: offer.class,
            revision: 1,
            subsystem_vendor: VENDOR,
            // 0x40 and more tell drivers of the legacy interface to keep off (4.1.2.1).
            subsystem: 0x1100,
        });
        config.add_bar(REGISTERS_BAR.into(), BarKind::Memory32, REGISTERS_SIZE);
        config.add_bar(MSIX_BAR.into(), BarKind::Memory32, MSIX_SIZE);
        config.set_interrupt_pin(1);
        let registers = Registers::new(&offer);
        let msix_control = registers.msix.add_capability(&mut config, MSIX_BAR, 0, PENDING);
        for ((offset, kind), length) in [
            (COMMON, COMMON_SIZE as u64),
            (ISR, 1),
            (SPECIFIC, offer.config.len() as u64),
            (NOTIFY, u64::from(NOTIFY_MULTIPLIER) * offer.queues.len() as u64),
        ] {
            // A device without configuration has no structure of it (4.1.4.6).
            if length == 0 {
                continue;
            }
            let multiplier = (kind == NOTIFY.1).then_some(NOTIFY_MULTIPLIER);
            let body = capability(kind, offset as u32, length as u32, multiplier);
            config.add_capability(VENDOR_CAPABILITY, &body, &vec![0; body.len()]);
        }
        // Here BAR, offset, length and a window of four bytes are for the driver to choose (4.1.4.9).
        let body = capability(PCI_ACCESS, 0, 0, Some(0));
        let mut writable = vec![0xff; body.len()];
        writable[..2].fill(0);
        writable[3..6].fill(0);
        let access = config.add_capability(VENDOR_CAPABILITY, &body, &writable);
        Transport { offer, configured: false, config, registers, msix_control, access }
    }

    /// Gives the BARs addresses, as firmware would, from `base`, which must be aligned to [`REGISTERS_SIZE`]. Returns
    /// the first address behind them.
    pub fn place(&mut self, base: u64) -> u64 {
        self.config.set_bar(REGISTERS_BAR.into(), base);
        self.config.set_bar(MSIX_BAR.into(), base + REGISTERS_SIZE);
        (base + REGISTERS_SIZE + MSIX_SIZE).next_multiple_of(REGISTERS_SIZE)
    }

    /// Reads configuration space, within a dword.
    pub fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        let window = self.access + 16;
        if (window..window + 4).contains(&offset)
            && let Some((bar, at, length)) = self.chosen()
        {
            let mut bytes = [0; 4];
            self.bar_read(bar, at, &mut bytes[..length]);
            self.config.put_window(window, &bytes);
        }
        let pending = self.registers.isr != 0 && !self.registers.msix.is_enabled();
        self.config.set_interrupt_status(pending);
        self.config.read(offset, data);
    }

    /// Writes configuration space, within a dword.
    pub fn config_write(&mut self, offset: u16, data: &[u8]) -> Work {
        self.config.write(offset, data);
        let window = self.access + 16;
        if (window..window + 4).contains(&offset)
            && let Some((bar, at, length)) = self.chosen()
        {
            let mut bytes = [0; 4];
            self.config.read(window, &mut bytes);
            return self.bar_write(bar, at, &bytes[..length]);
        }
        let end = offset + data.len() as u16;
        if offset < self.msix_control + 2 && end > self.msix_control {
            let mut control = [0; 2];
            self.config.read(self.msix_control, &mut control);
            let messages = self.registers.msix.set_control(u16::from_le_bytes(control));
            return Work { messages, request: None };
        }
        Work::default()
    }

    /// BAR, offset and size (1, 2 or 4) of the access through configuration space.
    fn chosen(&self) -> Option<(u8, u64, usize)> {
        let mut bytes = [0; 16];
        self.config.read(self.access, &mut bytes);
        let dword = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (offset, length) = (dword(8), dword(12));
        let fits = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        fits.then_some((bytes[4], offset.into(), length as usize))
    }

    /// What the BARs decode now.
    pub fn windows(&self) -> Vec<Window> {
        self.config.windows()
    }

    /// Reads 1 to 8 bytes in a BAR.
    pub fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let within = offset % PAGE;
        match (bar, offset - within) {
            (MSIX_BAR, 0) if within < PENDING.into() => self.registers.msix.read(within, data),
            (MSIX_BAR, 0) => self.registers.msix.read_pending(within - u64::from(PENDING), data),
            (REGISTERS_BAR, page) if page == COMMON.0 => copy(&self.common(), within, data),
            (REGISTERS_BAR, page) if page == ISR.0 => {
                data.fill(0);
                if within == 0 {
                    data[0] = std::mem::take(&mut self.registers.isr);
                }
            }
            (REGISTERS_BAR, page) if page == SPECIFIC.0 => copy(&self.offer.config, within, data),
            (REGISTERS_BAR, page) if page == NOTIFY.0 => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// Writes 1 to 8 bytes in a BAR.
    pub fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) -> Work {
        let within = offset % PAGE;
        let request = match (bar, offset - within) {
            (MSIX_BAR, 0) if within < PENDING.into() => {
                return Work { messages: self.registers.msix.write(within, data), request: None };
            }
            (REGISTERS_BAR, page) if page == COMMON.0 => self.common_write(within as usize, data),
            (REGISTERS_BAR, page) if page == SPECIFIC.0 => self.specific_write(within as usize, data),
            (REGISTERS_BAR, page) if page == NOTIFY.0 && data.len() >= 2 => {
                Some(Request::Notify(u16::from_le_bytes([data[0], data[1]])))
            }
            _ => None,
        };
        Work { messages: Vec::new(), request }
    }

    /// Whether a write of `length` bytes at `offset` of a BAR only notifies of a queue: that needs no register.
    pub fn only_notifies(bar: u8, offset: u64, length: usize) -> bool {
        bar == REGISTERS_BAR && offset >= NOTIFY.0 && length >= 2
    }

    fn specific_write(&mut self, offset: usize, data: &[u8]) -> Option<Request> {
        let mut request = None;
        for (at, &byte) in (offset..).zip(data) {
            if self.offer.writable.contains(&at) {
                self.offer.config[at] = byte;
                self.configured = true;
                request = Some(Request::Configure);
            }
        }
        request
    }

    /// The device's configuration, if the driver has written it since this was last asked.
    pub fn take_written_config(&mut self) -> Option<&[u8]> {
        std::mem::take(&mut self.configured).then_some(&self.offer.config[..])
    }

    /// Changes the device's configuration, of which what the driver writes stays as it is, and says so (2.5). Returns
    /// the message that tells the driver, if it wants one.
    pub fn change_config(&mut self, config: &[u8]) -> Option<Msi> {
        assert_eq!(config.len(), self.offer.config.len(), "a configuration of another size");
        for (at, &byte) in config.iter().enumerate().filter(|(at, _)| !self.offer.writable.contains(at)) {
            self.offer.config[at] = byte;
        }
        self.registers.generation = self.registers.generation.wrapping_add(1);
        let live = self.registers.status & status::DRIVER_OK != 0;
        if live { self.interrupt(self.registers.config_vector, ISR_CONFIG) } else { None }
    }

    /// Takes the configuration of a device that has been restored, all of it, and tells nobody.
    pub fn restore_device_config(&mut self, config: &[u8]) {
        assert_eq!(config.len(), self.offer.config.len(), "a configuration of another size");
        self.offer.config.copy_from_slice(config);
    }

    /// The common configuration as bytes.
    fn common(&self) -> [u8; COMMON_SIZE] {
        let registers = &self.registers;
        let mut bytes = [0; COMMON_SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        put(0, &registers.device_feature_select.to_le_bytes());
        put(4, &half(self.offer.features, registers.device_feature_select).to_le_bytes());
        put(8, &registers.driver_feature_select.to_le_bytes());
        put(12, &half(registers.driver_features, registers.driver_feature_select).to_le_bytes());
        put(16, &registers.config_vector.to_le_bytes());
        put(18, &(registers.queues.len() as u16).to_le_bytes());
        put(20, &[registers.status, registers.generation]);
        put(22, &registers.queue_select.to_le_bytes());
        if let Some(queue) = registers.queues.get(usize::from(registers.queue_select)) {
            put(24, &queue.size.to_le_bytes());
            put(26, &queue.vector.to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &registers.queue_select.to_le_bytes());
            put(32, &queue.descriptors.to_le_bytes());
            put(40, &queue.driver.to_le_bytes());
            put(48, &queue.device.to_le_bytes());
        }
        bytes
    }

    /// Writes the fields that `data` at `offset` touches, each with the bytes that it does not touch as they are.
    fn common_write(&mut self, offset: usize, data: &[u8]) -> Option<Request> {
        let end = offset + data.len();
        let mut request = None;
        for (at, size) in FIELDS {
            if at >= end || at + size <= offset {
                continue;
            }
            let mut value = [0; 8];
            value[..size].copy_from_slice(&self.common()[at..at + size]);
            for (byte, value) in (at..).zip(&mut value[..size]) {
                if (offset..end).contains(&byte) {
                    *value = data[byte - offset];
                }
            }
            request = request.or(self.set_field(at, u64::from_le_bytes(value)));
        }
        request
    }

    fn set_field(&mut self, at: usize, value: u64) -> Option<Request> {
        let registers = &mut self.registers;
        let vector = |value: u64| if value < registers.msix.vectors().into() { value as u16 } else { NO_VECTOR };
        match at {
            0 => registers.device_feature_select = value as u32,
            8 => registers.driver_feature_select = value as u32,
            // What has been agreed on stays (3.1.1).
            12 if registers.status & status::FEATURES_OK == 0 => {
                let features = &mut registers.driver_features;
                match registers.driver_feature_select {
                    0 => *features = *features & !0xffff_ffff | value,
                    1 => *features = *features & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            16 => registers.config_vector = vector(value),
            20 => return self.set_status(value as u8),
            22 => registers.queue_select = value as u16,
            24..56 => {
                let vector = vector(value);
                let select = usize::from(registers.queue_select);
                let most = self.offer.queues.get(select).copied()?;
                registers.queues[select].set(at, value, vector, most);
            }
            _ => {}
        }
        None
    }

    fn set_status(&mut self, value: u8) -> Option<Request> {
        let registers = &mut self.registers;
        if value == 0 {
            let msix = registers.msix.clone();
            // MSI-X belongs to PCI, not to the device (4.1.4.3.1); vectors of queues go.
            *registers = Registers { msix, ..Registers::new(&self.offer) };
            return Some(Request::Reset);
        }
        let mut value = value | registers.status & status::NEEDS_RESET;
        let agreed = registers.driver_features;
        let good = agreed & !self.offer.features == 0 && agreed & feature::VERSION_1 != 0;
        if registers.status & status::FEATURES_OK == 0 && !good {
            // The driver looks whether it stays (3.1.1, step 6).
            value &= !status::FEATURES_OK;
        }
        let was = std::mem::replace(&mut registers.status, value);
        let starts = !was & value & status::DRIVER_OK != 0 && value & status::FEATURES_OK != 0;
        starts.then_some(Request::Start)
    }

    /// Features that driver and device have agreed on.
    pub fn features(&self) -> u64 {
        self.registers.driver_features & self.offer.features
    }

    /// Whether the device may work on its queues and touch memory.
    pub fn may_work(&self) -> bool {
        let status = self.registers.status;
        self.is_driven() && status & (status::NEEDS_RESET | status::FAILED) == 0 && self.config.is_bus_master()
    }

    /// Whether the driver has the device at work, as far as it goes.
    pub fn is_driven(&self) -> bool {
        let wanted = status::DRIVER_OK | status::FEATURES_OK;
        self.registers.status & wanted == wanted
    }

    /// The queues as the driver has set them up; `None` for those that it has not enabled.
    pub fn queues(&self) -> Vec<Option<Queue>> {
        let event_index = self.features() & feature::EVENT_INDEX != 0;
        let queue =
            |q: &QueueRegisters| q.enabled.then(|| Queue::new(q.size, q.descriptors, q.driver, q.device, event_index));
        self.registers.queues.iter().map(queue).collect()
    }

    /// Interrupts because of `queue`, by the message that this returns or by the pin.
    pub fn interrupt_queue(&mut self, queue: u16) -> Option<Msi> {
        let vector = self.registers.queues.get(usize::from(queue))?.vector;
        self.interrupt(vector, ISR_QUEUE)
    }

    /// The device cannot go on with its driver. Returns the message that tells it, if it wants one.
    pub fn break_down(&mut self) -> Option<Msi> {
        self.registers.status |= status::NEEDS_RESET;
        self.registers.generation = self.registers.generation.wrapping_add(1);
        // Before that it is not told (2.1.2).
        if self.registers.status & status::DRIVER_OK == 0 {
            return None;
        }
        self.interrupt(self.registers.config_vector, ISR_CONFIG)
    }

    fn interrupt(&mut self, vector: u16, cause: u8) -> Option<Msi> {
        if !self.config.is_bus_master() && self.registers.msix.is_enabled() {
            return None;
        }
        if self.registers.msix.is_enabled() {
            return self.registers.msix.fire(vector);
        }
        self.registers.isr |= cause;
        None
    }

    /// Level of the interrupt pin.
    pub fn pin(&self) -> bool {
        self.registers.isr != 0 && !self.registers.msix.is_enabled() && !self.config.is_pin_disabled()
    }

    /// The saved configuration space and registers.
    pub fn save(&self) -> (Vec<u8>, Registers) {
        (self.config.save(), self.registers.clone())
    }

    /// Takes a saved configuration space, which is untrusted.
    ///
    /// # Errors
    /// It is none.
    pub fn restore_config(&mut self, saved: &[u8]) -> Result<(), BadState> {
        self.config.restore(saved)
    }

    /// Takes saved registers, which are untrusted.
    ///
    /// # Errors
    /// No guest can have made them so.
    pub fn restore(&mut self, saved: &Registers) -> Result<(), BadState> {
        let vectors = self.registers.msix.vectors();
        saved.msix.check(vectors)?;
        let vector = |vector: u16| vector < vectors || vector == NO_VECTOR;
        let queue = |(queue, most): (&QueueRegisters, &u16)| {
            vector(queue.vector) && queue.size.is_power_of_two() && queue.size <= *most
        };
        let features = saved.driver_features & !self.offer.features == 0;
        require(
            "virtio device",
            &[
                (saved.queues.len() == self.offer.queues.len(), "another number of queues"),
                (saved.queues.iter().zip(&self.offer.queues).all(queue), "an impossible queue"),
                (vector(saved.config_vector), "an impossible vector"),
                (features || saved.status & status::FEATURES_OK == 0, "features that it does not have"),
                (saved.isr & !(ISR_QUEUE | ISR_CONFIG) == 0, "undefined interrupts"),
            ],
        )?;
        self.registers = saved.clone();
        self.configured = false;
        Ok(())
    }
}

impl Registers {
    fn new(offer: &Offer) -> Registers {
        let queue = |&size: &u16| QueueRegisters {
            size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        };
        Registers {
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            generation: 0,
            queue_select: 0,
            isr: 0,
            queues: offer.queues.iter().map(queue).collect(),
            msix: Msix::new(offer.queues.len() as u16 + 1),
        }
    }
}

impl QueueRegisters {
    /// Writes the field at `at`. An enabled queue takes another vector and nothing else (4.1.4.3.2).
    fn set(&mut self, at: usize, value: u64, vector: u16, most: u16) {
        match at {
            26 => self.vector = vector,
            _ if self.enabled => {}
            24 if value.is_power_of_two() && value <= most.into() => self.size = value as u16,
            28 => self.enabled = value == 1,
            32 => self.descriptors = value,
            40 => self.driver = value,
            48 => self.device = value,
            _ => {}
        }
    }
}

/// A capability behind its ID and next pointer: where a structure is (4.1.4), and a last dword that some have.
fn capability(kind: u8, offset: u32, length: u32, last: Option<u32>) -> Vec<u8> {
    let size = if last.is_some() { 20 } else { 16 };
    let mut body = vec![size, kind, REGISTERS_BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(last.map(u32::to_le_bytes).into_iter().flatten());
    body
}

/// Reads at `offset` of `bytes`; zeros behind them.
fn copy(bytes: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset as usize..).zip(data) {
        *byte = bytes.get(at).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests;
