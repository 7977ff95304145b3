//! PCI: configuration access, the root bus, and the windows behind base address registers.
//!
//! **Problem.** A guest finds and configures functions in two ways (configuration mechanism #1 at ports
//! 0xcf8–0xcff, and the memory-mapped ECAM), and may move their windows at any time.
//!
//! **Idea.** [`PciRoot`] is bus 0 and nothing else. Functions implement [`PciFunction`], mostly by holding
//! a [`config::ConfigSpace`]. The machine gives the root whole address ranges once (the ports, the ECAM, the
//! PCI memory and I/O apertures); the root finds the function by what its BARs say at the moment.
//!
//! **Invariants.** `windows` always holds what the functions decode: configuration writes that may change
//! it happen under its write lock. Lock order: `windows`, then `functions` for a moment,
//! then a function's own; functions never call back.

pub mod config;
pub mod hotplug;
pub mod msix;

use crate::power::{PowerEvent, RESET_CONTROL_PORT, ResetControl};
use crate::state::{BadState, require};
use config::{ConfigSpace, Identity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// First of the eight ports of configuration mechanism #1 (address at +0, data at +4).
pub const CONFIG_PORT: u16 = 0xcf8;
/// Ports of configuration mechanism #1.
pub const CONFIG_PORTS: u16 = 8;
/// Bytes of ECAM for the one bus there is.
pub const ECAM_LENGTH: u64 = 1 << 20;

/// Where a function is on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// 0–31.
    pub device: u8,
    /// 0–7.
    pub function: u8,
}

/// Which address space a window is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Io,
    Memory,
}

/// A range that a function answers, because a BAR says so and decoding is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub space: Space,
    pub base: u64,
    pub length: u64,
    pub bar: u8,
}

/// One PCI function. Called on any vCPU's thread; it locks itself.
pub trait PciFunction: Send + Sync {
    /// Reads 1, 2 or 4 bytes of configuration space, within one dword.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes 1, 2 or 4 bytes of configuration space, within one dword.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// What the function decodes now.
    fn windows(&self) -> Vec<Window>;
    /// Reads 1 to 8 bytes at `offset` into BAR `bar`.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes 1 to 8 bytes at `offset` into BAR `bar`.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
    /// The function's whole state, in a format of its own.
    fn save(&self) -> Vec<u8>;
    /// Replaces the function's state by a saved one, which is untrusted.
    ///
    /// # Errors
    /// No guest can have made the function so.
    fn restore(&self, saved: &[u8]) -> Result<(), BadState>;
}

/// The bus's state: its ports, and the functions on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciState {
    address: u32,
    reset: ResetControl,
    functions: Vec<(Slot, Vec<u8>)>,
}

/// A slot that was refused: out of range, or taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PCI slot 00:{:02x}.{} does not exist or is taken", .0.device, .0.function)]
pub struct BadSlot(pub Slot);

/// Bits of the address register that are kept.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

#[derive(Clone, Copy, Default)]
struct Ports {
    address: u32,
    reset: ResetControl,
}

/// The root bus.
#[derive(Default)]
pub struct PciRoot {
    functions: RwLock<BTreeMap<Slot, Arc<dyn PciFunction>>>,
    ports: Mutex<Ports>,
    windows: RwLock<Vec<(Window, Slot)>>,
}

impl PciRoot {
    /// A bus with a generic host bridge at 00:00.0.
    pub fn new() -> PciRoot {
        PciRoot::with_bridge(ChipsetFunction::generic())
    }

    /// A bus with a host bridge that firmware made for QEMU's older machine knows.
    pub fn new_for_firmware() -> PciRoot {
        PciRoot::with_bridge(ChipsetFunction::i440fx())
    }

    /// Adds what OVMF looks for beside an 82441FX: an ISA bridge, on which it finds the serial port, and a PIIX4's power
    /// management, which says where it has its `ports` for ACPI: there OVMF reads its timer.
    pub fn add_piix(&self, ports: u16) {
        for (function, chip) in [(0, ChipsetFunction::piix_isa()), (3, ChipsetFunction::piix_power(ports))] {
            self.add(Slot { device: 1, function }, Arc::new(chip)).expect("the slot is the chipset's");
        }
    }

    fn with_bridge(bridge: ChipsetFunction) -> PciRoot {
        let root = PciRoot::default();
        root.add(Slot { device: 0, function: 0 }, Arc::new(bridge)).expect("the bus is empty");
        root
    }

    /// Plugs in a function. While the machine runs it must decode nothing yet.
    ///
    /// # Errors
    /// There is no such slot, or it is taken.
    pub fn add(&self, slot: Slot, function: Arc<dyn PciFunction>) -> Result<(), BadSlot> {
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if slot.device > 31 || slot.function > 7 || functions.contains_key(&slot) {
            return Err(BadSlot(slot));
        }
        windows.extend(function.windows().into_iter().map(|window| (window, slot)));
        functions.insert(slot, function);
        Ok(())
    }

    /// Takes out the function in `slot`: nobody answers there any more.
    pub fn remove(&self, slot: Slot) {
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        windows.retain(|(_, owner)| *owner != slot);
        self.functions.write().unwrap_or_else(PoisonError::into_inner).remove(&slot);
    }

    fn function(&self, slot: Slot) -> Option<Arc<dyn PciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&slot).cloned()
    }

    fn all(&self) -> Vec<(Slot, Arc<dyn PciFunction>)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().map(|(slot, function)| (*slot, function.clone())).collect()
    }

    /// The state of the bus and its functions.
    pub fn save(&self) -> PciState {
        let Ports { address, reset } = *self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let functions = self.all().iter().map(|(slot, function)| (*slot, function.save())).collect();
        PciState { address, reset, functions }
    }

    /// Replaces the state of the bus and its functions, which must be those that were saved.
    ///
    /// # Errors
    /// Other functions were saved, or one refuses its state.
    pub fn restore(&self, saved: &PciState) -> Result<(), BadState> {
        saved.reset.check()?;
        let functions = self.all();
        let same = saved.functions.iter().map(|(slot, _)| slot).eq(functions.iter().map(|(slot, _)| slot));
        require(
            "PCI bus",
            &[(saved.address & !ADDRESS_BITS == 0, "undefined address bits"), (same, "other functions are on it")],
        )?;
        for ((slot, state), (_, function)) in saved.functions.iter().zip(&functions) {
            function.restore(state)?;
            self.moved(*slot, &**function);
        }
        *self.ports.lock().unwrap_or_else(PoisonError::into_inner) =
            Ports { address: saved.address, reset: saved.reset };
        Ok(())
    }

    /// Notes where the function in `slot` decodes now.
    fn moved(&self, slot: Slot, function: &dyn PciFunction) {
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        windows.retain(|(_, owner)| *owner != slot);
        windows.extend(function.windows().into_iter().map(|window| (window, slot)));
    }

    /// Reads 1, 2 or 4 aligned bytes at `offset` (0–7) from [`CONFIG_PORT`].
    pub fn port_read(&self, offset: u16, data: &mut [u8]) {
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, data.len()) {
            // The address register is one dword, and answers as nothing less (PCI 3.0, 3.2.2.3.2).
            (0, 4) => data.copy_from_slice(&ports.address.to_le_bytes()),
            (0..4, _) => {
                data.fill(0xff);
                if CONFIG_PORT + offset == RESET_CONTROL_PORT {
                    data[0] = ports.reset.read();
                }
            }
            _ => {
                let address = ports.address;
                drop(ports);
                match mechanism1(address, offset) {
                    Some((slot, register)) => self.config_read(slot, register, data),
                    None => data.fill(0xff),
                }
            }
        }
    }

    /// Writes 1, 2 or 4 aligned bytes at `offset` (0–7) from [`CONFIG_PORT`]. Among these ports is the reset
    /// control register, whose request this returns.
    pub fn port_write(&self, offset: u16, data: &[u8]) -> Option<PowerEvent> {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, data) {
            (0, &[b0, b1, b2, b3]) => ports.address = u32::from_le_bytes([b0, b1, b2, b3]) & ADDRESS_BITS,
            (0..4, &[value, ..]) if CONFIG_PORT + offset == RESET_CONTROL_PORT => return ports.reset.write(value),
            (0..4, _) => {}
            _ => {
                let address = ports.address;
                drop(ports);
                if let Some((slot, register)) = mechanism1(address, offset) {
                    self.config_write(slot, register, data);
                }
            }
        }
        None
    }

    /// Reads 1, 2 or 4 aligned bytes at `offset` into the ECAM (PCI Express 7.2.2).
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        match ecam(offset) {
            Some((slot, register)) => self.config_read(slot, register, data),
            None => data.fill(0xff),
        }
    }

    /// Writes 1, 2 or 4 aligned bytes at `offset` into the ECAM.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = ecam(offset) {
            self.config_write(slot, register, data);
        }
    }

    /// Reads from the PCI memory or I/O aperture at the bus address `address`; all ones if nobody answers.
    pub fn window_read(&self, space: Space, address: u64, data: &mut [u8]) {
        match self.find(space, address, data.len()) {
            Some((function, bar, offset)) => function.bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the PCI memory or I/O aperture.
    pub fn window_write(&self, space: Space, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.find(space, address, data.len()) {
            function.bar_write(bar, offset, data);
        }
    }

    fn config_read(&self, slot: Slot, register: u16, data: &mut [u8]) {
        match self.function(slot) {
            Some(function) => function.config_read(register, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, slot: Slot, register: u16, data: &[u8]) {
        let Some(function) = self.function(slot) else { return };
        if !config::may_move_windows(register) {
            return function.config_write(register, data);
        }
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        function.config_write(register, data);
        windows.retain(|(_, owner)| *owner != slot);
        // It may have been taken out meanwhile.
        if self.function(slot).is_some() {
            windows.extend(function.windows().into_iter().map(|window| (window, slot)));
        }
    }

    /// The function, BAR and offset of an access that lies whole in a window.
    fn find(&self, space: Space, address: u64, length: usize) -> Option<(Arc<dyn PciFunction>, u8, u64)> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        let (window, slot) = windows.iter().find(|(window, _)| {
            let offset = address.wrapping_sub(window.base);
            window.space == space && offset < window.length && window.length - offset >= length as u64
        })?;
        Some((self.function(*slot)?, window.bar, address - window.base))
    }
}

/// Slot and register of an access to the data port; `None` if the address register is off or names
/// another bus.
fn mechanism1(address: u32, offset: u16) -> Option<(Slot, u16)> {
    let slot = Slot { device: (address >> 11 & 31) as u8, function: (address >> 8 & 7) as u8 };
    let register = (address & 0xfc) as u16 | offset & 3;
    (address >> 16 == 0x8000).then_some((slot, register))
}

fn ecam(offset: u64) -> Option<(Slot, u16)> {
    let slot = Slot { device: (offset >> 15 & 31) as u8, function: (offset >> 12 & 7) as u8 };
    (offset < ECAM_LENGTH).then_some((slot, (offset & 0xfff) as u16))
}

/// A function of the chipset, which exists, so that guests believe in the bus or know the machine, and does nothing.
struct ChipsetFunction {
    config: Mutex<ConfigSpace>,
}

impl ChipsetFunction {
    /// The generic PCI Express host bridge, for which no guest has quirks.
    fn generic() -> ChipsetFunction {
        ChipsetFunction { config: Mutex::new(ConfigSpace::new(bridge_identity(0x1b36, 0x0008))) }
    }

    /// An Intel 82441FX, by which SeaBIOS and OVMF know QEMU's machine, with its seven registers for the memory from
    /// C0000h to FFFFFh (82441FX data sheet, 3.2.19): RAM that can be read and written, whatever is written to them.
    fn i440fx() -> ChipsetFunction {
        let mut config = ConfigSpace::new(bridge_identity(0x8086, 0x1237));
        config.put_window(PAM, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        ChipsetFunction { config: Mutex::new(config) }
    }

    /// An 82371SB's ISA bridge, as QEMU's machine has it.
    fn piix_isa() -> ChipsetFunction {
        let mut config = ConfigSpace::new(Identity { class: 0x06_0100, ..bridge_identity(0x8086, 0x7000) });
        config.set_multifunction();
        ChipsetFunction { config: Mutex::new(config) }
    }

    /// An 82371AB's power management, whose ports are on and stay where they are (82371AB data sheet, 7.2.1 and 7.2.9),
    /// and which has no system management interrupt that somebody would have to set up (7.2.5).
    fn piix_power(ports: u16) -> ChipsetFunction {
        let mut config = ConfigSpace::new(Identity { class: 0x06_8000, ..bridge_identity(0x8086, 0x7113) });
        config.put_window(PMBA, &(u32::from(ports) | 1).to_le_bytes());
        config.put_window(DEVACTB, &[2]);
        config.put_window(PMREGMISC, &[1]);
        ChipsetFunction { config: Mutex::new(config) }
    }
}

/// Registers of the 82371AB's power management: where its ports are, an enable bit of APM's, and whether ports are decoded.
const PMBA: u16 = 0x40;
const DEVACTB: u16 = 0x5b;
const PMREGMISC: u16 = 0x80;
/// First of the 82441FX' programmable attribute map registers.
const PAM: u16 = 0x59;

/// A host bridge of QEMU's, which is what firmware looks for in the subsystem.
fn bridge_identity(vendor: u16, device: u16) -> Identity {
    Identity { vendor, device, class: 0x06_0000, revision: 0, subsystem_vendor: 0x1af4, subsystem: 0x1100 }
}

impl PciFunction for ChipsetFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }
    fn windows(&self) -> Vec<Window> {
        Vec::new()
    }
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn save(&self) -> Vec<u8> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).save()
    }
    fn restore(&self, saved: &[u8]) -> Result<(), BadState> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).restore(saved)
    }
}

#[cfg(test)]
mod tests {
    use super::config::BarKind;
    use super::*;

    /// A function with one 4 KiB memory BAR over RAM of its own.
    struct Card {
        config: Mutex<ConfigSpace>,
        memory: Mutex<Vec<u8>>,
    }

    impl Card {
        fn new() -> Arc<Card> {
            let mut config = ConfigSpace::new(Identity {
                vendor: 0x1234,
                device: 0x5678,
                class: 0x01_0802,
                revision: 1,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            config.add_bar(0, BarKind::Memory32, 0x1000);
            config.add_bar(1, BarKind::Io, 0x20);
            Arc::new(Card { config: Mutex::new(config), memory: Mutex::new(vec![0; 0x1000]) })
        }
    }

    impl PciFunction for Card {
        fn config_read(&self, offset: u16, data: &mut [u8]) {
            self.config.lock().unwrap().read(offset, data);
        }
        fn config_write(&self, offset: u16, data: &[u8]) {
            self.config.lock().unwrap().write(offset, data);
        }
        fn windows(&self) -> Vec<Window> {
            self.config.lock().unwrap().windows()
        }
        fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
            if bar == 1 {
                return data.fill(offset as u8);
            }
            data.copy_from_slice(&self.memory.lock().unwrap()[offset as usize..][..data.len()]);
        }
        fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
            self.memory.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        }
        fn save(&self) -> Vec<u8> {
            [self.config.lock().unwrap().save(), self.memory.lock().unwrap().clone()].concat()
        }
        fn restore(&self, saved: &[u8]) -> Result<(), BadState> {
            require("card", &[(saved.len() == 0x1100, "another size")])?;
            self.config.lock().unwrap().restore(&saved[..256])?;
            self.memory.lock().unwrap().copy_from_slice(&saved[256..]);
            Ok(())
        }
    }

    const CARD: Slot = Slot { device: 3, function: 0 };

    fn root() -> PciRoot {
        let root = PciRoot::new();
        root.add(CARD, Card::new()).unwrap();
        root
    }

    fn address(slot: Slot, register: u32) -> u32 {
        0x8000_0000 | u32::from(slot.device) << 11 | u32::from(slot.function) << 8 | register
    }

    fn get(root: &PciRoot, slot: Slot, register: u32) -> u32 {
        assert_eq!(root.port_write(0, &address(slot, register).to_le_bytes()), None);
        let mut data = [0; 4];
        root.port_read(4, &mut data);
        u32::from_le_bytes(data)
    }

    fn put(root: &PciRoot, slot: Slot, register: u32, value: u32) {
        assert_eq!(root.port_write(0, &address(slot, register).to_le_bytes()), None);
        assert_eq!(root.port_write(4, &value.to_le_bytes()), None);
    }

    #[test]
    fn linux_finds_mechanism_1() {
        // arch/x86/pci/direct.c pci_check_type1 and pci_sanity_check.
        let root = PciRoot::new();
        assert_eq!(root.port_write(3, &[1]), None);
        assert_eq!(root.port_write(0, &0x8000_0000u32.to_le_bytes()), None);
        let mut data = [0; 4];
        root.port_read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
        let bridge = Slot { device: 0, function: 0 };
        assert_eq!(get(&root, bridge, 0), 0x0008_1b36);
        assert_eq!(get(&root, bridge, 8) >> 16, 0x0600);
        assert_eq!(get(&root, bridge, 0x0c), 0, "a type 0 header");
    }

    #[test]
    fn firmware_finds_its_bridge_and_its_memory_unlocked() {
        let root = PciRoot::new_for_firmware();
        let bridge = Slot { device: 0, function: 0 };
        assert_eq!((get(&root, bridge, 0), get(&root, bridge, 0x2c)), (0x1237_8086, 0x1100_1af4));
        put(&root, bridge, 0x58, 0);
        assert_eq!((get(&root, bridge, 0x58), get(&root, bridge, 0x5c)), (0x3333_3000, 0x3333_3333));
    }

    #[test]
    fn ovmf_finds_the_timer() {
        let root = PciRoot::new_for_firmware();
        root.add_piix(0x600);
        let (isa, power) = (Slot { device: 1, function: 0 }, Slot { device: 1, function: 3 });
        assert_eq!((get(&root, isa, 0), get(&root, isa, 8) >> 8), (0x7000_8086, 0x06_0100));
        assert_eq!(get(&root, isa, 0xc) >> 16, 0x80, "there are other functions");
        for value in [0, !0] {
            put(&root, power, PMBA.into(), value);
            put(&root, power, PMREGMISC.into(), value);
        }
        assert_eq!((get(&root, power, PMBA.into()), get(&root, power, PMREGMISC.into()) & 1), (0x601, 1));
        assert_eq!(get(&root, power, 0) >> 16, 0x7113);
    }

    #[test]
    fn an_empty_bus_reads_all_ones() {
        let root = PciRoot::new();
        for device in 1..32 {
            assert_eq!(get(&root, Slot { device, function: 0 }, 0), !0);
        }
        // Another bus, and the enable bit off.
        for address in [0x8001_0000u32, 0x0000_0000] {
            assert_eq!(root.port_write(0, &address.to_le_bytes()), None);
            let mut data = [0; 4];
            root.port_read(4, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
    }

    #[test]
    fn ecam_and_ports_see_the_same() {
        let root = root();
        let base = u64::from(CARD.device) << 15;
        for register in (0..0x40).step_by(4) {
            let mut data = [0; 4];
            root.ecam_read(base + register, &mut data);
            assert_eq!(u32::from_le_bytes(data), get(&root, CARD, register as u32));
        }
        let mut data = [0; 2];
        root.ecam_read(base + 2, &mut data);
        assert_eq!(u16::from_le_bytes(data), 0x5678);
        assert_eq!(root.port_write(0, &address(CARD, 0).to_le_bytes()), None);
        root.port_read(6, &mut data);
        assert_eq!(u16::from_le_bytes(data), 0x5678);
        root.ecam_write(base + 0x3c, &[11]);
        assert_eq!(get(&root, CARD, 0x3c) & 0xff, 11);
        for offset in [base + 0x100, 1 << 15, ECAM_LENGTH] {
            root.ecam_read(offset, &mut data);
            assert_eq!(data, [0xff; 2], "at {offset:#x}");
        }
    }

    #[test]
    fn windows_follow_bars_and_the_command_register() {
        let root = root();
        put(&root, CARD, 0x10, 0xe000_0000);
        put(&root, CARD, 0x14, 0xc000);
        let probe = |space, address| {
            let mut data = [0; 1];
            root.window_read(space, address, &mut data);
            data[0]
        };
        assert_eq!(probe(Space::Memory, 0xe000_0010), 0xff, "decoding is off");
        put(&root, CARD, 0x04, 0x2);
        root.window_write(Space::Memory, 0xe000_0010, &[0x42]);
        assert_eq!(probe(Space::Memory, 0xe000_0010), 0x42);
        assert_eq!(probe(Space::Io, 0xc005), 0xff);
        put(&root, CARD, 0x04, 0x3);
        assert_eq!(probe(Space::Io, 0xc005), 0x05);
        assert_eq!(probe(Space::Io, 0xc020), 0xff);
        put(&root, CARD, 0x10, 0xe123_4000);
        assert_eq!(probe(Space::Memory, 0xe000_0010), 0xff);
        assert_eq!(probe(Space::Memory, 0xe123_4010), 0x42);
        let mut data = [0; 4];
        root.window_read(Space::Memory, 0xe123_4ffe, &mut data);
        assert_eq!(data, [0xff; 4], "across the end");
    }

    #[test]
    fn a_saved_bus_decodes_as_it_did() {
        let root = root();
        put(&root, CARD, 0x10, 0xe000_0000);
        put(&root, CARD, 0x04, 0x2);
        root.window_write(Space::Memory, 0xe000_0010, &[0x42]);
        assert_eq!(root.port_write(1, &[0x02]), None);
        let saved = root.save();
        let other = self::root();
        other.restore(&saved).unwrap();
        let mut data = [0];
        other.window_read(Space::Memory, 0xe000_0010, &mut data);
        assert_eq!(data, [0x42]);
        other.port_read(1, &mut data);
        assert_eq!(data, [2]);
        assert!(PciRoot::new().restore(&saved).is_err(), "the card is missing");
        let mut strange = saved.clone();
        strange.functions[0].1.pop();
        assert!(other.restore(&strange).is_err());
        let mut forged = saved;
        forged.functions[0].1[..2].copy_from_slice(&[0x11, 0x22]);
        other.restore(&forged).unwrap();
        assert_eq!(get(&other, Slot { device: 0, function: 0 }, 0), 0x0008_1b36, "read-only is not restored");
    }

    #[test]
    fn the_reset_control_register_is_among_the_ports() {
        let root = PciRoot::new();
        assert_eq!(root.port_write(0, &address(CARD, 0x40).to_le_bytes()), None);
        assert_eq!(root.port_write(1, &[0x02]), None);
        let mut data = [0];
        root.port_read(1, &mut data);
        assert_eq!(data, [2]);
        assert_eq!(root.port_write(1, &[0x06]), Some(PowerEvent::Reset));
        let mut data = [0; 4];
        root.port_read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), address(CARD, 0x40), "not part of the address");
    }

    #[test]
    fn slots_are_checked() {
        let root = root();
        for slot in
            [CARD, Slot { device: 0, function: 0 }, Slot { device: 32, function: 0 }, Slot { device: 1, function: 8 }]
        {
            assert_eq!(root.add(slot, Card::new()), Err(BadSlot(slot)));
        }
    }
}
