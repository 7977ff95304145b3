//! The vCPU's local APIC as its thread uses it: register accesses by memory and MSR, what they cause
//! elsewhere, and the routing of messages between vCPUs.
//!
//! Whatever a register access changes (priorities, the timer, an own interrupt) is acted on at the next
//! instruction boundary: every write sets [`pending::EVENT`], so that `poll_events` looks at the APIC again.

use crate::core::{Core, Message, VmShared};
use crate::cpu::pending;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use anyvisor_x86::lapic::{self, GeneralProtection, Now, Work};
use anyvisor_x86::msi::DeliveryMode;
use std::sync::atomic::Ordering;

/// Registers of the page end here; the rest of it reads as zero.
const REGISTERS_END: u64 = 0x400;

impl Core {
    /// The time as the APIC timer wants it.
    pub fn now(&self) -> Now {
        Now { ns: self.now_ns(), tsc: self.tsc() }
    }

    /// Reads the xAPIC page. Registers are 32 bits at multiples of 16 bytes; other accesses are undefined
    /// (SDM vol. 3A 10.4.1) and read here as the bytes that are there.
    pub(crate) fn lapic_mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= REGISTERS_END {
            return;
        }
        let now = self.now();
        let word = self.lapic.read32((offset & 0xff0) as u32, now).to_le_bytes();
        for (byte, value) in data.iter_mut().zip(word.iter().skip((offset & 0xf) as usize)) {
            *byte = *value;
        }
    }

    /// Writes the xAPIC page; narrower writes are undefined and extended with zeros, those that are not to
    /// the start of a register are ignored.
    pub(crate) fn lapic_mmio_write(&mut self, io: &dyn GuestIo, offset: u64, data: &[u8]) {
        if offset >= REGISTERS_END || offset & 0xf != 0 {
            return;
        }
        let mut word = [0; 4];
        let length = data.len().min(4);
        word[..length].copy_from_slice(&data[..length]);
        let now = self.now();
        let work = self.lapic.write32(offset as u32, u32::from_le_bytes(word), now);
        self.after_lapic_write(io, work);
    }

    /// Reads one of the APIC's MSRs.
    ///
    /// # Errors
    /// #GP(0) as the manual says.
    pub(crate) fn lapic_read_msr(&mut self, index: u32) -> Result<u64, Exception> {
        let now = self.now();
        self.lapic.read_msr(index, now).map_err(|GeneralProtection| Exception::gp(0))
    }

    /// Writes one of the APIC's MSRs.
    ///
    /// # Errors
    /// #GP(0) as the manual says.
    pub(crate) fn lapic_write_msr(&mut self, io: &dyn GuestIo, index: u32, value: u64) -> Result<(), Exception> {
        let now = self.now();
        let old_base = self.lapic.mmio_base();
        let work = self.lapic.write_msr(index, value, now).map_err(|GeneralProtection| Exception::gp(0))?;
        if self.lapic.mmio_base() != old_base {
            // RAM may lie under the page where it was or now is.
            self.flush_all();
        }
        self.after_lapic_write(io, work);
        Ok(())
    }

    fn after_lapic_write(&mut self, io: &dyn GuestIo, work: Work) {
        self.shared.set_address(self.lapic.address());
        match work {
            Work::None => {}
            Work::Eoi(vector) => io.eoi(vector),
            Work::Ipi(message) => self.vm.route(&message, Some(self.shared.id)),
        }
        self.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
    }
}

impl VmShared {
    /// Sends a message to the vCPUs it addresses. `sender` is the vCPU it comes from, if one.
    pub fn route(&self, message: &lapic::Message, sender: Option<u32>) {
        let vcpus = self.vcpus.read().unwrap();
        let mut targets = vcpus.iter().filter(|vcpu| {
            !(message.exclude_self && sender == Some(vcpu.id)) && vcpu.address().matches(message.destination)
        });
        let interrupt = Message::Interrupt { vector: message.vector, level: message.level };
        let text = match message.mode {
            DeliveryMode::LowestPriority => {
                // Task priorities are the receivers' own; equals take turns (SDM vol. 3A 10.6.2.4).
                let last = self.last_receiver.load(Ordering::Relaxed);
                let receiver = lapic::lowest_priority(targets.map(|vcpu| (vcpu.id, 0)), last);
                if let Some(vcpu) = receiver.and_then(|id| vcpus.iter().find(|vcpu| vcpu.id == id)) {
                    self.last_receiver.store(vcpu.id, Ordering::Relaxed);
                    vcpu.send(interrupt);
                }
                return;
            }
            DeliveryMode::Fixed => interrupt,
            DeliveryMode::Nmi => Message::Nmi,
            DeliveryMode::Init => Message::Init,
            DeliveryMode::StartUp => Message::Sipi(message.vector),
            // There is no system-management mode, and ExtINT comes by LINT0 only.
            DeliveryMode::Smi | DeliveryMode::ExtInt => return,
        };
        targets.by_ref().for_each(|vcpu| vcpu.send(text));
    }
}
