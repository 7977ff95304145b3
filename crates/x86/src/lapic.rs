//! The local APIC (SDM vol. 3A chapter 10) as a pure state machine.
//!
//! **Problem.** Each vCPU of an engine without an in-kernel APIC needs one that is exact (Linux, BSDs and
//! test suites probe its corners) and cheap (the run loop asks it at every interrupt window).
//!
//! **Idea.** The state is the register page itself (SDM table 10-1), which is also the saved form. Nothing
//! here has a thread, a clock or a file descriptor: time comes in as [`Now`], and what the rest of the
//! machine must do comes out as a value ([`Work`], [`Delivery`]). The caller is the vCPU's own thread;
//! messages for other vCPUs ([`Message`]) are routed by the VM with [`LocalApic::matches_destination`].
//!
//! **Invariants.**
//! - `highest_irr` and `highest_isr` are the highest bits of IRR and ISR in `regs`, 0 when empty (vectors
//!   0–15 can be in neither). So [`LocalApic::highest_pending`] reads three bytes.
//! - Registers hold only bits that are writable or defined; reserved ones stay zero.
//! - While the APIC is disabled by software, every LVT entry is masked (SDM 10.4.7.2).
//! - The count-down timer ticks at 1 GHz before its divider ([`BUS_HZ`]).
//!
//! A typical run loop: `tick(now)` when [`LocalApic::next_deadline`] is due, `deliver` what arrived,
//! `highest_pending` when interrupts are enabled, `acknowledge` to take the vector.

use crate::msi::{DeliveryMode, Msi};
use crate::msr;

/// Frequency of the timer's input before the divider, for CPUID 15h and KVM's timing leaf.
pub const BUS_HZ: u64 = 1_000_000_000;

/// Guest-physical address of the register page after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;

/// Size of the saved register page in bytes, as KVM's `kvm_lapic_state`.
pub const PAGE_SIZE: usize = 0x400;

/// Bits of IA32_APIC_BASE (SDM 10.4.4, 10.12.1).
pub mod base {
    pub const BSP: u64 = 1 << 8;
    /// x2APIC mode.
    pub const EXTD: u64 = 1 << 10;
    /// Global enable.
    pub const EN: u64 = 1 << 11;
}

/// Register offsets in the page (SDM table 10-1). The x2APIC MSR is `0x800 + (offset >> 4)`.
pub mod reg {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const RRD: u32 = 0xc0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR_LOW: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PERF: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Bits of the error status register (SDM figure 10-9).
pub mod esr {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Bits of a local vector table entry (SDM figure 10-8).
pub mod lvt {
    /// Delivery mode field, and two of its values.
    pub const MODE: u32 = 7 << 8;
    pub const NMI: u32 = 4 << 8;
    pub const EXTINT: u32 = 7 << 8;
    pub const REMOTE_IRR: u32 = 1 << 14;
    pub const LEVEL: u32 = 1 << 15;
    pub const MASKED: u32 = 1 << 16;
}

const SVR_ENABLE: u32 = 1 << 8;
/// Version 0x14, six LVT entries, no suppression of EOI broadcasts: what KVM shows too.
const VERSION: u32 = 0x0005_0014;

const LVT_ENTRIES: [u32; 6] =
    [reg::LVT_TIMER, reg::LVT_THERMAL, reg::LVT_PERF, reg::LVT_LINT0, reg::LVT_LINT1, reg::LVT_ERROR];

/// The time of an access: guest nanoseconds for the count-down timer, the guest's TSC for the deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    pub ns: u64,
    pub tsc: u64,
}

/// When the timer is due, in the unit of its mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// Guest nanoseconds, as in [`Now::ns`].
    Ns(u64),
    /// The guest's TSC, as in [`Now::tsc`].
    Tsc(u64),
}

/// The access raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// Why [`LocalApic::restore`] refused a saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreError {
    /// The page is not [`PAGE_SIZE`] bytes long.
    Length,
    /// IA32_APIC_BASE has reserved bits, or x2APIC mode without the enable bit.
    Base,
}

/// Whom a [`Message`] addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    Broadcast,
    /// An APIC ID.
    Physical(u32),
    /// A logical destination: 8 bits against LDR and DFR, 32 bits (cluster and mask) against x2APICs.
    Logical(u32),
}

/// What decides whether a message is for an APIC. Small, so that it can be published to senders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// In the mode that it is in: 8 bits in xAPIC mode.
    pub id: u32,
    pub ldr: u32,
    /// The model, bits 31:28 of DFR.
    pub dfr: u32,
    pub enabled: bool,
    pub x2apic: bool,
}

impl Address {
    /// Whether a message to `destination` is for this APIC (SDM 10.6.2).
    pub fn matches(&self, destination: Destination) -> bool {
        if !self.enabled {
            return false;
        }
        let ldr = self.ldr;
        match destination {
            Destination::Broadcast => true,
            Destination::Physical(id) => id == self.id,
            Destination::Logical(mda) if self.x2apic => mda >> 16 == ldr >> 16 && mda & ldr & 0xffff != 0,
            Destination::Logical(mda) if mda > 0xff => false,
            Destination::Logical(mda) => match self.dfr {
                0xf => mda & ldr >> 24 != 0,
                0 => (mda >> 4 == ldr >> 28 || mda >> 4 == 0xf) && mda & ldr >> 24 & 0xf != 0,
                _ => false,
            },
        }
    }
}

/// An interrupt message between APICs: an IPI, or a device's MSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub mode: DeliveryMode,
    /// For StartUp, the page number of the start address.
    pub vector: u8,
    /// Level-triggered: the matching EOI is broadcast.
    pub level: bool,
    pub destination: Destination,
    /// The sender is not addressed (the shorthand "all excluding self").
    pub exclude_self: bool,
}

impl Message {
    /// An MSI as a message (SDM 10.11); `None` for the reserved delivery mode. A redirection hint asks for
    /// one receiver among several, which is lowest-priority delivery.
    pub fn from_msi(msi: Msi) -> Option<Message> {
        let mode = match msi.delivery_mode()? {
            DeliveryMode::Fixed if msi.address & (1 << 3) != 0 => DeliveryMode::LowestPriority,
            mode => mode,
        };
        let destination = match msi.destination() {
            0xff if !msi.is_logical() => Destination::Broadcast,
            id if msi.is_logical() => Destination::Logical(id),
            id => Destination::Physical(id),
        };
        Some(Message { mode, vector: msi.vector(), level: msi.is_level(), destination, exclude_self: false })
    }
}

/// What a register write asks of the machine.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    None,
    /// Route this. IPIs by the shorthand "self" never appear here.
    Ipi(Message),
    /// A level-triggered vector ended: broadcast it to the IO-APICs.
    Eoi(u8),
}

/// What became of a message or local interrupt at this APIC; what is not a vector is the CPU's to do.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Masked, not accepted, or an illegal vector (noted in ESR).
    Ignored,
    /// In IRR; see [`LocalApic::highest_pending`].
    Accepted,
    Nmi,
    Smi,
    Init,
    /// A start-up IPI: execution begins at `vector << 12` in real mode.
    StartUp(u8),
    /// The vector comes from the 8259 pair.
    ExtInt,
}

/// The two local interrupt pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lint {
    Lint0,
    Lint1,
}

/// What this APIC's processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// CPUID.1:ECX bit 21.
    pub x2apic: bool,
    /// CPUID.1:ECX bit 24.
    pub tsc_deadline: bool,
    /// MAXPHYADDR, at most 52: bits of IA32_APIC_BASE from here on are reserved.
    pub physical_bits: u8,
}

impl Default for Features {
    fn default() -> Features {
        Features { x2apic: true, tsc_deadline: true, physical_bits: 46 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The encoding 3, and TSC-deadline on a processor without it: nothing ever fires.
    Reserved,
}

/// One vCPU's local APIC.
#[derive(Clone, Debug)]
pub struct LocalApic {
    /// The register page, one entry for each 16 bytes. PPR and CURRENT_COUNT are computed on read.
    regs: [u32; 64],
    highest_irr: u8,
    highest_isr: u8,
    id: u32,
    /// The ID in xAPIC mode, which software may change on processors without x2APIC mode (SDM 10.4.6).
    xapic_id: u8,
    base: u64,
    features: Features,
    /// Errors since the last write of ESR.
    errors: u32,
    /// When the count-down timer reaches zero, in ns; `None` when it stands still.
    count_due: Option<u64>,
    /// IA32_TSC_DEADLINE; 0 is disarmed.
    deadline: u64,
    /// Input levels of LINT0 and LINT1; they belong to the outside and are not saved.
    lint: [bool; 2],
}

// Construction, modes, saving.
impl LocalApic {
    /// The APIC of processor `id` after RESET: enabled in xAPIC mode, software-disabled, LVT masked.
    /// Processor 0 is the bootstrap processor.
    pub fn new(id: u32, features: Features) -> LocalApic {
        assert!(features.physical_bits >= 32 && features.physical_bits <= 52);
        let mut apic = LocalApic {
            regs: [0; 64],
            highest_irr: 0,
            highest_isr: 0,
            id,
            xapic_id: id as u8,
            base: DEFAULT_BASE | base::EN | if id == 0 { base::BSP } else { 0 },
            features,
            errors: 0,
            count_due: None,
            deadline: 0,
            lint: [false; 2],
        };
        apic.init();
        apic
    }

    /// What INIT does (SDM 10.4.7.3, 10.12.5.1): all registers to their reset values except the APIC ID;
    /// IA32_APIC_BASE, and so the mode, stays.
    pub fn init(&mut self) {
        self.regs = [0; 64];
        *self.reg_mut(reg::VERSION) = VERSION;
        *self.reg_mut(reg::DFR) = !0;
        *self.reg_mut(reg::SVR) = 0xff;
        for entry in LVT_ENTRIES {
            *self.reg_mut(entry) = lvt::MASKED;
        }
        self.highest_irr = 0;
        self.highest_isr = 0;
        self.errors = 0;
        self.count_due = None;
        self.deadline = 0;
        self.set_identity();
    }

    /// The wiring a PC's firmware leaves on the bootstrap processor: LINT0 = ExtINT, LINT1 = NMI
    /// (MultiProcessor Specification 3.6.2.2, "virtual wire mode"). As KVM's users do it, SVR stays as it is:
    /// the pins work although the APIC is still software-disabled.
    pub fn set_virtual_wire(&mut self) {
        *self.reg_mut(reg::LVT_LINT0) = lvt::EXTINT;
        *self.reg_mut(reg::LVT_LINT1) = lvt::NMI;
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Globally enabled, in either mode.
    pub fn is_enabled(&self) -> bool {
        self.base & base::EN != 0
    }

    pub fn is_x2apic(&self) -> bool {
        self.base & base::EXTD != 0
    }

    /// Where the register page is decoded: `None` when disabled or in x2APIC mode.
    pub fn mmio_base(&self) -> Option<u64> {
        (self.base & (base::EN | base::EXTD) == base::EN).then_some(self.base & !0xfff)
    }

    /// Whether SVR enables the APIC (and IA32_APIC_BASE does).
    pub fn is_software_enabled(&self) -> bool {
        self.is_enabled() && self.reg(reg::SVR) & SVR_ENABLE != 0
    }

    /// The register page as of `now`, whose timer is fired first if due; KVM's format with 32-bit x2APIC IDs.
    /// IA32_APIC_BASE ([`Self::base`]) and IA32_TSC_DEADLINE ([`Self::tsc_deadline`]) are saved apart.
    pub fn save(&mut self, now: Now) -> Vec<u8> {
        self.tick(now);
        let mut regs = self.regs;
        regs[index(reg::PPR)] = self.ppr().into();
        regs[index(reg::CURRENT_COUNT)] = self.current_count(now);
        regs.iter().flat_map(|&value| [value, 0, 0, 0]).flat_map(u32::to_le_bytes).collect()
    }

    /// Takes over a saved state. The APIC ID is this processor's own, whatever the page says, unless software can change
    /// it; bits that no guest could have set are dropped. Errors leave the APIC as it was.
    pub fn restore(&mut self, page: &[u8], base: u64, deadline: u64, now: Now) -> Result<(), RestoreError> {
        if page.len() != PAGE_SIZE {
            return Err(RestoreError::Length);
        }
        if !self.base_is_valid(base) {
            return Err(RestoreError::Base);
        }
        let saved = |offset: u32| {
            let at = offset as usize;
            u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
        };
        self.init();
        self.base = base;
        for offset in (0..PAGE_SIZE as u32).step_by(16) {
            if let Some(writable) = self.saved_bits(offset) {
                *self.reg_mut(offset) = saved(offset) & writable;
            }
        }
        *self.reg_mut(reg::DFR) |= 0x0fff_ffff;
        if !self.features.x2apic {
            self.xapic_id = (saved(reg::ID) >> 24) as u8;
        }
        self.set_identity();
        self.highest_irr = self.highest(reg::IRR);
        self.highest_isr = self.highest(reg::ISR);
        match self.timer_mode() {
            TimerMode::TscDeadline => self.deadline = deadline,
            // A periodic timer caught in the instant of its reload.
            TimerMode::Periodic if saved(reg::CURRENT_COUNT) == 0 => {
                self.start_count(self.reg(reg::INITIAL_COUNT), now);
            }
            _ => self.start_count(saved(reg::CURRENT_COUNT), now),
        }
        Ok(())
    }

    /// The bits of a register that a saved page may carry; `None` for those that are not state.
    fn saved_bits(&self, offset: u32) -> Option<u32> {
        Some(match offset {
            reg::TPR => 0xff,
            reg::LDR => 0xff00_0000,
            reg::DFR => 0xf000_0000,
            reg::SVR => 0x3ff,
            reg::ESR => 0xff,
            reg::ISR | reg::TMR | reg::IRR => 0xffff_0000,
            _ if (reg::ISR..reg::ESR).contains(&offset) => !0,
            reg::ICR_LOW => 0x000c_cfff,
            reg::ICR_HIGH | reg::INITIAL_COUNT => !0,
            reg::DIVIDE => 0xb,
            reg::LVT_LINT0 | reg::LVT_LINT1 => lvt_bits(offset) | lvt::REMOTE_IRR,
            _ if LVT_ENTRIES.contains(&offset) => lvt_bits(offset),
            _ => return None,
        })
    }

    /// ID and, in x2APIC mode, the LDR that follows from it (SDM 10.12.10.2).
    fn set_identity(&mut self) {
        if self.is_x2apic() {
            *self.reg_mut(reg::ID) = self.id;
            *self.reg_mut(reg::LDR) = (self.id >> 4) << 16 | 1 << (self.id & 0xf);
        } else {
            *self.reg_mut(reg::ID) = u32::from(self.xapic_id) << 24;
        }
    }

    fn base_is_valid(&self, value: u64) -> bool {
        let mut writable = ((1u64 << self.features.physical_bits) - 0x1000) | base::BSP | base::EN;
        if self.features.x2apic {
            writable |= base::EXTD;
        }
        value & !writable == 0 && value & (base::EN | base::EXTD) != base::EXTD
    }

    /// Writes IA32_APIC_BASE: the transitions of SDM figure 10-27.
    fn write_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        const MODE: u64 = base::EN | base::EXTD;
        if !self.base_is_valid(value) {
            return Err(GeneralProtection);
        }
        match (self.base & MODE, value & MODE) {
            (MODE, base::EN) | (0, MODE) => return Err(GeneralProtection),
            (old, new) if old == new => self.base = value,
            (_, MODE) => {
                self.base = value;
                *self.reg_mut(reg::ICR_HIGH) = 0;
                self.set_identity();
            }
            // To disabled, and from there to xAPIC: the registers start afresh (SDM 10.4.3).
            _ => {
                self.base = value;
                self.xapic_id = self.id as u8;
                self.init();
            }
        }
        Ok(())
    }
}

// Register access.
impl LocalApic {
    /// Reads a register of the page in xAPIC mode. `offset` is that of the register, a multiple of 16 below
    /// 0x400; anything else reads 0 and is noted in ESR, as are reserved registers. (Narrower accesses take
    /// their bytes out of the 32; what lies between registers reads 0.)
    pub fn read32(&mut self, offset: u32, now: Now) -> u32 {
        match self.read_register(offset, now) {
            Some(value) => value,
            None => {
                self.error(esr::ILLEGAL_REGISTER);
                0
            }
        }
    }

    /// Writes a register of the page in xAPIC mode. Reserved bits and read-only registers ignore writes;
    /// reserved registers are noted in ESR.
    pub fn write32(&mut self, offset: u32, value: u32, now: Now) -> Work {
        match offset {
            reg::LDR => *self.reg_mut(reg::LDR) = value & 0xff00_0000,
            reg::DFR => *self.reg_mut(reg::DFR) = value | 0x0fff_ffff,
            reg::ICR_HIGH => *self.reg_mut(reg::ICR_HIGH) = value & 0xff00_0000,
            reg::ICR_LOW => {
                let high = self.reg(reg::ICR_HIGH);
                return self.write_icr(value, high, high >> 24);
            }
            _ => return self.write_register(offset, value, now),
        }
        Work::None
    }

    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    pub fn read_msr(&mut self, index: u32, now: Now) -> Result<u64, GeneralProtection> {
        match index {
            msr::IA32_APIC_BASE => Ok(self.base),
            msr::TSC_DEADLINE if self.features.tsc_deadline => Ok(self.tsc_deadline(now)),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.is_x2apic() => {
                let offset = (index - msr::X2APIC_FIRST) << 4;
                match offset {
                    reg::ICR_LOW => Ok(u64::from(self.reg(reg::ICR_HIGH)) << 32 | u64::from(self.reg(reg::ICR_LOW))),
                    reg::ICR_HIGH | reg::DFR | reg::APR | reg::RRD | reg::EOI => Err(GeneralProtection),
                    _ => self.read_register(offset, now).map(u64::from).ok_or(GeneralProtection),
                }
            }
            _ => Err(GeneralProtection),
        }
    }

    /// Writes IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register (SDM table 10-6).
    pub fn write_msr(&mut self, index: u32, value: u64, now: Now) -> Result<Work, GeneralProtection> {
        match index {
            msr::IA32_APIC_BASE => self.write_base(value).map(|()| Work::None),
            msr::TSC_DEADLINE if self.features.tsc_deadline => {
                // Outside its mode the MSR reads 0 and ignores writes (SDM 10.5.4.1).
                if self.is_enabled() && self.timer_mode() == TimerMode::TscDeadline {
                    self.deadline = value;
                    self.tick(now);
                }
                Ok(Work::None)
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.is_x2apic() => {
                self.write_x2apic((index - msr::X2APIC_FIRST) << 4, value, now)
            }
            _ => Err(GeneralProtection),
        }
    }

    fn write_x2apic(&mut self, offset: u32, value: u64, now: Now) -> Result<Work, GeneralProtection> {
        let high = (value >> 32) as u32;
        if offset == reg::ICR_LOW {
            // Bit 12 was the delivery status; it is gone in x2APIC mode, and writing it is harmless.
            if value as u32 & !0x000c_dfff != 0 {
                return Err(GeneralProtection);
            }
            return Ok(self.write_icr(value as u32, high, high));
        }
        let writable = match offset {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x3ff,
            reg::DIVIDE => 0xb,
            reg::INITIAL_COUNT => !0,
            // Delivery status and remote IRR are read-only, not reserved.
            reg::LVT_LINT0 | reg::LVT_LINT1 => lvt_bits(offset) | 1 << 12 | lvt::REMOTE_IRR,
            _ if LVT_ENTRIES.contains(&offset) => lvt_bits(offset) | 1 << 12,
            _ => return Err(GeneralProtection),
        };
        if high != 0 || value as u32 & !writable != 0 {
            return Err(GeneralProtection);
        }
        if offset == reg::SELF_IPI {
            return Ok(self.write_icr(1 << 18 | value as u32, 0, 0));
        }
        Ok(self.write_register(offset, value as u32, now))
    }

    /// Registers common to both modes; `None` for what does not exist or cannot be read.
    fn read_register(&self, offset: u32, now: Now) -> Option<u32> {
        match offset {
            reg::PPR => Some(self.ppr().into()),
            reg::APR | reg::RRD | reg::EOI => Some(0),
            reg::CURRENT_COUNT => Some(self.current_count(now)),
            reg::ID | reg::VERSION | reg::TPR | reg::LDR | reg::DFR | reg::SVR => Some(self.reg(offset)),
            reg::ISR..=reg::ESR if offset.is_multiple_of(16) => Some(self.reg(offset)),
            reg::ICR_LOW..=reg::INITIAL_COUNT if offset.is_multiple_of(16) => Some(self.reg(offset)),
            reg::DIVIDE => Some(self.reg(offset)),
            _ => None,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32, now: Now) -> Work {
        match offset {
            reg::TPR => *self.reg_mut(reg::TPR) = value & 0xff,
            reg::EOI => return self.eoi().map_or(Work::None, Work::Eoi),
            reg::SVR => self.write_svr(value & 0x3ff),
            reg::ESR => *self.reg_mut(reg::ESR) = std::mem::take(&mut self.errors),
            reg::LVT_TIMER => self.write_lvt_timer(value, now),
            reg::LVT_LINT0 | reg::LVT_LINT1 => self.write_lvt_lint(offset, value),
            reg::LVT_THERMAL | reg::LVT_PERF | reg::LVT_ERROR => *self.reg_mut(offset) = self.lvt_value(offset, value),
            reg::INITIAL_COUNT => {
                // Ignored in TSC-deadline mode (SDM 10.5.4.1).
                if self.timer_mode() != TimerMode::TscDeadline {
                    *self.reg_mut(reg::INITIAL_COUNT) = value;
                    self.start_count(value, now);
                }
            }
            reg::DIVIDE => {
                self.tick(now);
                let count = self.current_count(now);
                *self.reg_mut(reg::DIVIDE) = value & 0xb;
                self.start_count(count, now);
            }
            reg::ID if !self.features.x2apic => {
                self.xapic_id = (value >> 24) as u8;
                self.set_identity();
            }
            // Read-only registers ignore writes; what does not exist is an error.
            _ if self.read_register(offset, now).is_some() => {}
            _ => self.error(esr::ILLEGAL_REGISTER),
        }
        Work::None
    }

    fn write_svr(&mut self, value: u32) {
        *self.reg_mut(reg::SVR) = value;
        if value & SVR_ENABLE == 0 {
            for entry in LVT_ENTRIES {
                *self.reg_mut(entry) |= lvt::MASKED;
            }
        }
    }

    /// What an LVT entry holds after a write of `value`.
    fn lvt_value(&self, offset: u32, value: u32) -> u32 {
        let forced = if self.is_software_enabled() { 0 } else { lvt::MASKED };
        value & lvt_bits(offset) | forced
    }

    fn write_lvt_lint(&mut self, offset: u32, value: u32) {
        let new = self.lvt_value(offset, value);
        // Remote IRR is read-only and means something for level-triggered fixed interrupts only.
        let keep = if new & lvt::LEVEL != 0 { self.reg(offset) & lvt::REMOTE_IRR } else { 0 };
        *self.reg_mut(offset) = new | keep;
        let pin = if offset == reg::LVT_LINT0 { Lint::Lint0 } else { Lint::Lint1 };
        let _ = self.repeat_level(pin);
    }

    fn write_icr(&mut self, low: u32, high: u32, destination: u32) -> Work {
        let low = low & 0x000c_cfff;
        *self.reg_mut(reg::ICR_LOW) = low;
        *self.reg_mut(reg::ICR_HIGH) = high;
        let vector = low as u8;
        let Some(mode) = DeliveryMode::from_bits(low >> 8) else { return Work::None };
        if matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) && vector < 16 {
            self.error(esr::SEND_ILLEGAL_VECTOR);
            return Work::None;
        }
        // INIT level de-assert only synchronised arbitration IDs, on processors long gone (SDM 10.6.1).
        let deassert = low & (1 << 15) != 0 && low & (1 << 14) == 0;
        if mode == DeliveryMode::ExtInt || mode == DeliveryMode::Init && deassert {
            return Work::None;
        }
        let broadcast = if self.is_x2apic() { !0 } else { 0xff };
        let (destination, exclude_self) = match low >> 18 & 3 {
            // Self goes with Fixed only (SDM table 10-3).
            1 => {
                if mode == DeliveryMode::Fixed {
                    self.accept(vector, false);
                }
                return Work::None;
            }
            2 => (Destination::Broadcast, false),
            3 => (Destination::Broadcast, true),
            // In x2APIC mode all ones is everybody in either destination mode (SDM 10.12.9); in xAPIC mode a
            // logical 0xff is matched against LDRs like any other.
            _ if destination == broadcast && (self.is_x2apic() || low & (1 << 11) == 0) => {
                (Destination::Broadcast, false)
            }
            _ if low & (1 << 11) != 0 => (Destination::Logical(destination), false),
            _ => (Destination::Physical(destination), false),
        };
        // IPIs are edge-triggered whatever the trigger bit says (SDM 10.6.1).
        Work::Ipi(Message { mode, vector, level: false, destination, exclude_self })
    }

    fn reg(&self, offset: u32) -> u32 {
        self.regs[index(offset)]
    }

    fn reg_mut(&mut self, offset: u32) -> &mut u32 {
        &mut self.regs[index(offset)]
    }
}

// Interrupts.
impl LocalApic {
    /// Puts a fixed interrupt into IRR. False when the APIC is disabled or the vector illegal.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.is_software_enabled() {
            return false;
        }
        if vector < 16 {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        let (word, bit) = place(vector);
        self.regs[index(reg::IRR) + word] |= bit;
        let tmr = &mut self.regs[index(reg::TMR) + word];
        *tmr = if level { *tmr | bit } else { *tmr & !bit };
        self.highest_irr = self.highest_irr.max(vector);
        true
    }

    /// Takes a message addressed to this APIC. A disabled APIC receives nothing; one disabled by software
    /// still takes NMI, INIT and StartUp (SDM 10.4.7.2).
    pub fn deliver(&mut self, mode: DeliveryMode, vector: u8, level: bool) -> Delivery {
        if !self.is_enabled() {
            return Delivery::Ignored;
        }
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if self.accept(vector, level) {
                    Delivery::Accepted
                } else {
                    Delivery::Ignored
                }
            }
            DeliveryMode::Smi => Delivery::Smi,
            DeliveryMode::Nmi => Delivery::Nmi,
            DeliveryMode::Init => Delivery::Init,
            DeliveryMode::StartUp => Delivery::StartUp(vector),
            DeliveryMode::ExtInt => Delivery::ExtInt,
        }
    }

    /// Whether a message to `destination` is for this APIC (SDM 10.6.2).
    pub fn matches_destination(&self, destination: Destination) -> bool {
        self.address().matches(destination)
    }

    /// How messages address this APIC now.
    pub fn address(&self) -> Address {
        Address {
            id: if self.is_x2apic() { self.id } else { self.xapic_id.into() },
            ldr: self.reg(reg::LDR),
            dfr: self.reg(reg::DFR) >> 28,
            enabled: self.is_enabled(),
            x2apic: self.is_x2apic(),
        }
    }

    /// The vector to deliver now if the processor takes interrupts: highest in IRR, of a class above PPR's.
    #[inline]
    pub fn highest_pending(&self) -> Option<u8> {
        (self.highest_irr >> 4 > self.ppr() >> 4 && self.is_enabled()).then_some(self.highest_irr)
    }

    /// Begins service of [`Self::highest_pending`]: moves it from IRR to ISR.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.highest_pending()?;
        let (word, bit) = place(vector);
        self.regs[index(reg::IRR) + word] &= !bit;
        self.regs[index(reg::ISR) + word] |= bit;
        self.highest_irr = self.highest(reg::IRR);
        self.highest_isr = vector;
        Some(vector)
    }

    /// Ends service of the highest vector in ISR. Returns it if it was level-triggered: broadcast it.
    pub fn eoi(&mut self) -> Option<u8> {
        if self.highest_isr == 0 {
            return None;
        }
        let vector = self.highest_isr;
        let (word, bit) = place(vector);
        self.regs[index(reg::ISR) + word] &= !bit;
        self.highest_isr = self.highest(reg::ISR);
        if self.regs[index(reg::TMR) + word] & bit == 0 {
            return None;
        }
        for (pin, offset) in [(Lint::Lint0, reg::LVT_LINT0), (Lint::Lint1, reg::LVT_LINT1)] {
            if self.reg(offset) & (lvt::REMOTE_IRR | 0xff) == lvt::REMOTE_IRR | u32::from(vector) {
                *self.reg_mut(offset) &= !lvt::REMOTE_IRR;
                let _ = self.repeat_level(pin);
            }
        }
        Some(vector)
    }

    /// Whether LINT0 lets the 8259's INTR through to the processor: unmasked with ExtINT, or connected
    /// straight to the INTR pin because the APIC is globally disabled (SDM 10.4.3).
    pub fn accepts_extint(&self) -> bool {
        !self.is_enabled() || self.reg(reg::LVT_LINT0) & (lvt::MASKED | lvt::MODE) == lvt::EXTINT
    }

    /// Sets the level of a local interrupt pin. NMI and fixed modes act here; ExtINT on LINT0 is a level
    /// that the caller keeps and asks [`Self::accepts_extint`] about, reported on its rising edge too.
    pub fn set_lint(&mut self, pin: Lint, level: bool) -> Delivery {
        let was = std::mem::replace(&mut self.lint[pin as usize], level);
        if !self.is_enabled() {
            // The pins are INTR and NMI then.
            return match (pin, level && !was) {
                (_, false) => Delivery::Ignored,
                (Lint::Lint0, true) => Delivery::ExtInt,
                (Lint::Lint1, true) => Delivery::Nmi,
            };
        }
        let entry = self.reg(lint_register(pin));
        if entry & (lvt::MASKED | lvt::LEVEL | lvt::MODE) == lvt::LEVEL {
            return self.repeat_level(pin);
        }
        if level && !was { self.local_interrupt(lint_register(pin)) } else { Delivery::Ignored }
    }

    /// Raises the interrupt of an LVT entry ([`reg::LVT_PERF`], [`reg::LVT_THERMAL`], ...), if unmasked.
    /// A performance-monitoring interrupt masks its own entry (SDM vol. 3B 19.6.2.6).
    pub fn local_interrupt(&mut self, offset: u32) -> Delivery {
        assert!(LVT_ENTRIES.contains(&offset));
        let entry = self.reg(offset);
        if entry & lvt::MASKED != 0 {
            return Delivery::Ignored;
        }
        if offset == reg::LVT_PERF {
            *self.reg_mut(offset) |= lvt::MASKED;
        }
        match DeliveryMode::from_bits(entry >> 8) {
            Some(mode @ (DeliveryMode::Fixed | DeliveryMode::Nmi | DeliveryMode::Smi | DeliveryMode::ExtInt)) => {
                self.deliver(mode, entry as u8, false)
            }
            Some(DeliveryMode::Init) if offset != reg::LVT_PERF => Delivery::Init,
            _ => Delivery::Ignored,
        }
    }

    /// A level-triggered fixed LINT interrupt is sent while its pin is high and no EOI is outstanding.
    fn repeat_level(&mut self, pin: Lint) -> Delivery {
        let offset = lint_register(pin);
        let entry = self.reg(offset);
        let wants = entry & (lvt::MASKED | lvt::LEVEL | lvt::REMOTE_IRR | lvt::MODE) == lvt::LEVEL;
        if !wants || !self.lint[pin as usize] || !self.accept(entry as u8, true) {
            return Delivery::Ignored;
        }
        *self.reg_mut(offset) |= lvt::REMOTE_IRR;
        Delivery::Accepted
    }

    /// The task priority, 0–255.
    pub fn tpr(&self) -> u8 {
        self.reg(reg::TPR) as u8
    }

    /// CR8: the task priority's class, 0–15.
    pub fn cr8(&self) -> u8 {
        self.tpr() >> 4
    }

    /// Writes CR8; bits above 3 are the caller's #GP.
    pub fn set_cr8(&mut self, class: u8) {
        *self.reg_mut(reg::TPR) = u32::from(class & 0xf) << 4;
    }

    /// The processor priority (SDM 10.8.3.1).
    #[inline]
    pub fn ppr(&self) -> u8 {
        let tpr = self.tpr();
        if tpr >> 4 >= self.highest_isr >> 4 { tpr } else { self.highest_isr & 0xf0 }
    }

    /// For [`lowest_priority`]: the processor's priority with what already waits (SDM 10.6.2.4).
    pub fn arbitration_priority(&self) -> u8 {
        self.ppr().max(self.highest_irr & 0xf0)
    }

    /// Notes an error; the first since ESR was last written raises the error interrupt (SDM 10.5.3).
    fn error(&mut self, bits: u32) {
        let armed = self.errors == 0;
        self.errors |= bits;
        if armed {
            let _ = self.local_interrupt(reg::LVT_ERROR);
        }
    }

    /// The highest bit in one of ISR, TMR and IRR; 0 if none.
    fn highest(&self, array: u32) -> u8 {
        let words = &self.regs[index(array)..index(array) + 8];
        match words.iter().rposition(|&word| word != 0) {
            Some(word) => (word as u32 * 32 + words[word].ilog2()) as u8,
            None => 0,
        }
    }
}

// The timer.
impl LocalApic {
    /// When [`Self::tick`] has something to do; `None` while the timer stands or is masked.
    pub fn next_deadline(&self) -> Option<Deadline> {
        if self.reg(reg::LVT_TIMER) & lvt::MASKED != 0 {
            return None;
        }
        match self.timer_mode() {
            TimerMode::TscDeadline => (self.deadline != 0).then_some(Deadline::Tsc(self.deadline)),
            TimerMode::Reserved => None,
            TimerMode::OneShot | TimerMode::Periodic => self.count_due.map(Deadline::Ns),
        }
    }

    /// Fires the timer if it is due; true if it was and IRR got its vector. Missed periods merge into one.
    pub fn tick(&mut self, now: Now) -> bool {
        let due = match self.timer_mode() {
            TimerMode::TscDeadline => {
                let due = self.deadline != 0 && now.tsc >= self.deadline;
                if due {
                    self.deadline = 0;
                }
                due
            }
            TimerMode::Reserved => false,
            mode => match self.count_due {
                Some(due) if now.ns >= due => {
                    let period = u64::from(self.reg(reg::INITIAL_COUNT)) << self.divide_shift();
                    self.count_due = if mode == TimerMode::Periodic && period != 0 {
                        Some(due.saturating_add(((now.ns - due) / period + 1) * period))
                    } else {
                        None
                    };
                    true
                }
                _ => false,
            },
        };
        let entry = self.reg(reg::LVT_TIMER);
        due && entry & lvt::MASKED == 0 && self.accept(entry as u8, false)
    }

    /// IA32_TSC_DEADLINE: 0 when disarmed or past.
    pub fn tsc_deadline(&self, now: Now) -> u64 {
        if now.tsc >= self.deadline { 0 } else { self.deadline }
    }

    fn write_lvt_timer(&mut self, value: u32, now: Now) {
        // A masked timer runs on unwatched: settle what it did until now.
        self.tick(now);
        let before = self.timer_mode();
        *self.reg_mut(reg::LVT_TIMER) = self.lvt_value(reg::LVT_TIMER, value);
        let after = self.timer_mode();
        // To or from TSC-deadline mode disarms the timer (SDM 10.5.4.1).
        if before != after && (before == TimerMode::TscDeadline || after == TimerMode::TscDeadline) {
            self.deadline = 0;
            self.count_due = None;
            *self.reg_mut(reg::INITIAL_COUNT) = 0;
        }
    }

    fn timer_mode(&self) -> TimerMode {
        match self.reg(reg::LVT_TIMER) >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            2 if self.features.tsc_deadline => TimerMode::TscDeadline,
            _ => TimerMode::Reserved,
        }
    }

    /// log2 of the divider (SDM figure 10-10).
    fn divide_shift(&self) -> u32 {
        let value = self.reg(reg::DIVIDE);
        ((value & 3 | value >> 1 & 4) + 1) & 7
    }

    fn start_count(&mut self, count: u32, now: Now) {
        self.count_due = (count != 0).then(|| now.ns.saturating_add(u64::from(count) << self.divide_shift()));
    }

    fn current_count(&self, now: Now) -> u32 {
        let Some(due) = self.count_due else { return 0 };
        let shift = self.divide_shift();
        let left = match due.checked_sub(now.ns) {
            Some(left) => left,
            // Due but not yet ticked: one-shot stands at 0, periodic has been reloaded meanwhile.
            None if self.timer_mode() == TimerMode::Periodic => {
                let period = u64::from(self.reg(reg::INITIAL_COUNT)) << shift;
                if period == 0 { 0 } else { period - (now.ns - due) % period }
            }
            None => 0,
        };
        left.div_ceil(1 << shift) as u32
    }
}

/// Chooses the receiver of a lowest-priority message among `(processor, arbitration priority)` pairs: the
/// lowest priority, and among equals the first after `last`, so that equals take turns.
pub fn lowest_priority(candidates: impl IntoIterator<Item = (u32, u8)>, last: u32) -> Option<u32> {
    candidates.into_iter().min_by_key(|&(id, priority)| (priority, id <= last, id)).map(|(id, _)| id)
}

/// Position of a register in the page.
fn index(offset: u32) -> usize {
    (offset >> 4) as usize
}

/// Word and bit of a vector in ISR, TMR or IRR.
fn place(vector: u8) -> (usize, u32) {
    (usize::from(vector) / 32, 1 << (vector % 32))
}

fn lint_register(pin: Lint) -> u32 {
    match pin {
        Lint::Lint0 => reg::LVT_LINT0,
        Lint::Lint1 => reg::LVT_LINT1,
    }
}

/// The writable bits of an LVT entry (SDM figure 10-8).
fn lvt_bits(offset: u32) -> u32 {
    match offset {
        reg::LVT_TIMER => 0x7_00ff,
        reg::LVT_THERMAL | reg::LVT_PERF => 0x1_07ff,
        reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_a7ff,
        _ => 0x1_00ff,
    }
}

#[cfg(test)]
mod tests;
