//! The chips on their buses, and the wires between them: what a vCPU meets outside its engine.
//!
//! Every chip is a pure model behind its own lock. After each access its interrupt level goes to the 8259
//! pair and the I/O APIC while the chip's lock is still held, so that levels arrive in the order in which
//! they were computed, and its next event goes to the [`Alarm`].
//!
//! While the VM is paused nothing comes in from outside, timers or input, so that the chips stand still; it
//! waits in the alarm and the console, and comes in on resume.
//!
//! Lock order: `still`, a chip, then `interrupts` or the alarm or the console, then the engine's own.

mod hotplugging;
mod state;

use hotplugging::Changes;
pub use hotplugging::Plugged;
pub use state::BoardState;

use super::devices::{Bell, Device, FIRST_SLOT};
use super::timer::Alarm;
use super::variables::VariablesChip;
use super::{End, Notify, Parts, lock};
use crate::acpi::{PCI_PINS, SCI};
use crate::config::Console;
use crate::console::{Input, Output};
use crate::{Config, Error, Result, firmware, layout, memory};
use anyvisor_devices::acpi_pm::{self, AcpiPm};
use anyvisor_devices::fw_cfg::{self, FwCfg};
use anyvisor_devices::i8042::{self, I8042};
use anyvisor_devices::ioapic::{self, IoApic};
use anyvisor_devices::pci::hotplug::{self, Hotplug};
use anyvisor_devices::pci::{self, PciRoot, Space};
use anyvisor_devices::pic::{self, Pic};
use anyvisor_devices::pit::{self, Pit};
use anyvisor_devices::power;
use anyvisor_devices::rtc::{self, Rtc};
use anyvisor_devices::serial::{self, Serial};
use anyvisor_devices::test_device::{self, TestDevice};
use anyvisor_devices::{Bus, BusDevice, Width};
use anyvisor_engine::{GuestIo, Vm};
use anyvisor_x86::Msi;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use vm_memory::GuestMemoryMmap;

/// ISA interrupt of the PIT, which is on I/O APIC pin 2.
const PIT_IRQ: u8 = 0;

/// The buses with everything on them.
pub struct Board {
    ports: Bus,
    memory: Bus,
    chips: Arc<Wired>,
}

/// The chips and what they are wired to.
pub(super) struct Wired {
    /// When the board was made, and what guest time it was then, in nanoseconds.
    epoch: Instant,
    start: u64,
    /// The VM is paused. Held for reading by what comes from outside while it touches chips: input that waits
    /// for a chip must not keep the timers.
    still: RwLock<bool>,
    vm: Arc<dyn Vm>,
    notify: Arc<Notify>,
    output: Arc<Output>,
    input: Arc<Input>,
    alarm: Alarm,
    serial: Mutex<Serial>,
    pit: Mutex<Pit>,
    rtc: Mutex<Rtc>,
    i8042: Mutex<I8042>,
    acpi_pm: Mutex<AcpiPm>,
    pci: PciRoot,
    /// OVMF is to find a PIIX4, and no keyboard controller: of that only the reset lines are there.
    piix: bool,
    /// For firmware that has somewhere to keep its variables.
    variables: Option<Mutex<VariablesChip>>,
    /// In the order of their slots, unless some have come since: see `hotplugging`.
    devices: RwLock<Vec<Arc<Device>>>,
    hotplug: Mutex<Hotplug>,
    /// If devices have come or gone while the machine runs.
    changes: Mutex<Option<Changes>>,
    /// The console's bytes go to and from virtio devices, and not the serial port.
    virtio_console: bool,
    /// In machines that start firmware.
    fw_cfg: Option<Mutex<FwCfg>>,
    test_device: Option<Mutex<TestDevice>>,
    interrupts: Mutex<Interrupts>,
}

/// What the chips are connected to beyond the machine.
pub(super) struct Outside<'a> {
    pub output: &'a Arc<Output>,
    pub input: &'a Arc<Input>,
    pub notify: &'a Arc<Notify>,
}

/// Both interrupt controllers: a line goes to both.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interrupts {
    pub pic: Pic,
    pub io_apic: IoApic,
    /// Levels of the 16 ISA lines, by bit.
    pub lines: u16,
    /// For each of [`PCI_PINS`], the PCI devices that drive it, by bit. They say so again after a restore.
    #[serde(skip)]
    pub pci: [u32; 4],
}

/// Every chip of a machine that stands still, locked.
pub struct Chips<'a> {
    pub serial: MutexGuard<'a, Serial>,
    pub pit: MutexGuard<'a, Pit>,
    pub rtc: MutexGuard<'a, Rtc>,
    pub i8042: MutexGuard<'a, I8042>,
    pub acpi_pm: MutexGuard<'a, AcpiPm>,
    pub pci: &'a PciRoot,
    pub fw_cfg: Option<MutexGuard<'a, FwCfg>>,
    pub test_device: Option<MutexGuard<'a, TestDevice>>,
    pub interrupts: MutexGuard<'a, Interrupts>,
}

impl Board {
    /// The chips after power-on, at guest time `start` in nanoseconds, and `parts`.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(
        config: &Config,
        vm: Arc<dyn Vm>,
        memory: &GuestMemoryMmap,
        parts: Parts,
        outside: &Outside<'_>,
        start: u64,
    ) -> Result<Board> {
        let Outside { output, input, notify } = *outside;
        let utc = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let low = config.memory.min(layout::LOW_RAM_LIMIT);
        let flash = memory::flash_size(memory);
        let piix = flash > 0;
        let variables = parts.variables.map(|(file, bytes)| Mutex::new(VariablesChip::new(file, bytes)));
        let bells = parts.models.iter().map(|_| Bell::new()).collect::<std::io::Result<Vec<_>>>();
        let bells = bells.map_err(|error| Error::host("cannot make what wakes devices", error))?;
        let device = |(n, (model, bell)), wired: &Weak<Wired>| {
            Arc::new(Device::new(FIRST_SLOT + n as u8, model, bell, memory.clone(), vm.clone(), wired.clone()))
        };
        let chips = Arc::new_cyclic(|wired| {
            let devices: Vec<_> =
                parts.models.into_iter().zip(bells).enumerate().map(|part| device(part, wired)).collect();
            Wired {
                epoch: Instant::now(),
                start,
                still: RwLock::new(false),
                vm: vm.clone(),
                notify: notify.clone(),
                output: output.clone(),
                input: input.clone(),
                alarm: Alarm::default(),
                serial: Mutex::new(Serial::new()),
                pit: Mutex::new(Pit::new()),
                rtc: Mutex::new(Rtc::new(utc, start, low, config.memory - low)),
                i8042: Mutex::new(I8042::new()),
                acpi_pm: Mutex::new(AcpiPm::new()),
                pci: pci_bus(&devices, config.firmware.is_some(), piix),
                piix,
                variables,
                devices: RwLock::new(devices),
                hotplug: Mutex::default(),
                changes: Mutex::default(),
                virtio_console: config.console == Console::Virtio,
                fw_cfg: config.firmware.as_ref().map(|_| Mutex::new(firmware::device(config))),
                test_device: config.test_device.then(Mutex::default),
                interrupts: Mutex::new(Interrupts { pic: Pic::new(), io_apic: IoApic::new(), lines: 0, pci: [0; 4] }),
            }
        });
        let (ports, memory) = buses(&chips, config, layout::HIGH_RAM - flash);
        Ok(Board { ports, memory, chips })
    }

    /// Lets the console's input reach the serial port, now and whenever more comes.
    pub(super) fn connect_input(&self) {
        let chips = self.chips.clone();
        self.chips.input.set_ready(Some(Arc::new(move || chips.take_input())));
        self.chips.take_input();
    }

    /// Runs the chips' timers until `stop_timers`.
    pub(super) fn run_timers(&self) {
        let chips = &self.chips;
        chips.alarm.run(
            || chips.now(),
            |now| {
                let still = chips.still();
                if *still {
                    return None;
                }
                let pit = chips.settle_pit(&mut lock(&chips.pit), now);
                let mut rtc = lock(&chips.rtc);
                rtc.poll(now);
                let rtc = chips.settle_rtc(&mut rtc);
                let mut pm = lock(&chips.acpi_pm);
                pm.poll(now);
                let pm = chips.settle_acpi_pm(&mut pm);
                [pit, rtc, pm].into_iter().flatten().min()
            },
        );
    }

    pub(super) fn stop_timers(&self) {
        self.chips.alarm.stop();
    }

    /// Lets nothing in from outside, until `let_go`. When this returns nothing is under way either.
    pub(super) fn hold_still(&self) {
        *self.chips.still_mut() = true;
        self.devices().iter().for_each(|device| device.settle());
    }

    /// Goes on after `hold_still`: what came due or was typed meanwhile comes in now.
    pub(super) fn let_go(&self) {
        *self.chips.still_mut() = false;
        self.chips.alarm.look_again();
        self.chips.take_input();
        self.devices().iter().for_each(|device| device.ring());
    }

    pub(super) fn devices(&self) -> Vec<Arc<Device>> {
        self.chips.devices()
    }

    /// Nanoseconds of guest time that the chips count in.
    pub fn now(&self) -> u64 {
        self.chips.now()
    }

    /// The chips, for a machine that stands still.
    pub fn chips(&self) -> Chips<'_> {
        let chips = &*self.chips;
        Chips {
            serial: lock(&chips.serial),
            pit: lock(&chips.pit),
            rtc: lock(&chips.rtc),
            i8042: lock(&chips.i8042),
            acpi_pm: lock(&chips.acpi_pm),
            pci: &chips.pci,
            fw_cfg: chips.fw_cfg.as_ref().map(lock),
            test_device: chips.test_device.as_ref().map(lock),
            interrupts: lock(&chips.interrupts),
        }
    }

    /// Presses the power button; says whether the guest has its event enabled.
    pub fn press_power_button(&self) -> bool {
        let mut pm = lock(&self.chips.acpi_pm);
        let heard = pm.press_power_button();
        self.chips.alarm.set(self.chips.settle_acpi_pm(&mut pm));
        heard
    }
}

/// The PCI bus with its devices, which have addresses unless firmware gives them some.
fn pci_bus(devices: &[Arc<Device>], firmware: bool, piix: bool) -> PciRoot {
    let root = if firmware { PciRoot::new_for_firmware() } else { PciRoot::new() };
    if piix {
        root.add_piix(acpi_pm::PIIX_PORT);
    }
    let mut base = layout::PCI_WINDOW;
    for device in devices {
        if !firmware {
            base = device.place(base);
        }
        root.add(device.slot(), device.clone()).expect("there are no more devices than slots");
    }
    root
}

/// Who answers which address. The chip with UEFI variables ends at `variables_end`.
fn buses(chips: &Arc<Wired>, config: &Config, variables_end: u64) -> (Bus, Bus) {
    let device = |chip: Chip, base: u64| Arc::new(OnBus { chips: chips.clone(), chip, base });
    let mut ports = Bus::new();
    let mut add = |base: u16, length: u64, width: Width, chip: Chip| {
        ports.add(base.into(), length, width, device(chip, base.into())).expect("port ranges are disjoint");
    };
    for base in [pic::MASTER_PORT, pic::SLAVE_PORT, pic::ELCR_PORT] {
        add(base, 2, Width::Byte, Chip::Pic);
    }
    add(pit::PORT, 4, Width::Byte, Chip::Pit);
    add(pit::PORT_B, 1, Width::Byte, Chip::Pit);
    for base in [i8042::DATA, i8042::COMMAND, i8042::PORT_A] {
        add(base, 1, Width::Byte, Chip::I8042);
    }
    add(rtc::PORT, 2, Width::Byte, Chip::Rtc);
    add(serial::COM1_PORT, 8, Width::Byte, Chip::Serial);
    add(acpi_pm::PORT, acpi_pm::LENGTH.into(), Width::Dword, Chip::AcpiPm);
    add(hotplug::PORT, hotplug::LENGTH.into(), Width::Dword, Chip::Hotplug);
    add(pci::CONFIG_PORT, pci::CONFIG_PORTS.into(), Width::Dword, Chip::PciConfig);
    if chips.fw_cfg.is_some() {
        add(fw_cfg::PORT, fw_cfg::LENGTH, Width::Word, Chip::FwCfg);
    }
    let test_device = chips.test_device.is_some();
    // What lies amid PCI's ports, in ascending order.
    let mut amid = vec![];
    if test_device {
        add(test_device::LATCH_PORT, 4, Width::Dword, Chip::TestLatch);
        add(test_device::FLUSH_PORT, 4, Width::Dword, Chip::TestFlush);
        add(test_device::BYTES_PORT, 4, Width::Byte, Chip::TestLatch);
        amid.push((test_device::LINES_PORT, test_device::LINES, Chip::TestLines));
    }
    if chips.piix {
        amid.push((acpi_pm::PIIX_PORT, acpi_pm::LENGTH, Chip::PiixPm));
    }
    let mut pci_ports = layout::PCI_PORTS;
    for (base, length, chip) in amid {
        add(pci_ports, (base - pci_ports).into(), Width::Dword, Chip::PciPorts);
        add(base, length.into(), Width::Dword, chip);
        pci_ports = base + length;
    }
    add(pci_ports, 0x1_0000 - u64::from(pci_ports), Width::Dword, Chip::PciPorts);
    if config.debug_exit {
        add(power::DEBUG_EXIT_PORT, 4, Width::Dword, Chip::DebugExit);
    }
    let mut memory = Bus::new();
    let mut add = |base: u64, length: u64, width: Width, chip: Chip| {
        memory.add(base, length, width, device(chip, 0)).expect("memory ranges are disjoint");
    };
    add(layout::IO_APIC, ioapic::LENGTH, Width::Dword, Chip::IoApic);
    add(layout::ECAM, layout::ECAM_SIZE, Width::Dword, Chip::Ecam);
    if test_device {
        add(layout::TEST_MEMORY, test_device::MEMORY_SIZE, Width::Qword, Chip::TestMemory);
    }
    if let Some(variables) = &chips.variables {
        let length = lock(variables).length();
        add(variables_end - length, length, Width::Qword, Chip::Variables);
    }
    for (base, end) in layout::pci_windows(config.memory) {
        memory
            .add(base, end - base, Width::Qword, Arc::new(OnBus { chips: chips.clone(), chip: Chip::PciMemory, base }))
            .expect("memory ranges are disjoint");
    }
    (ports, memory)
}

#[derive(Clone, Copy)]
enum Chip {
    Serial,
    Pic,
    Pit,
    Rtc,
    I8042,
    AcpiPm,
    Hotplug,
    PiixPm,
    DebugExit,
    IoApic,
    PciConfig,
    PciPorts,
    Ecam,
    PciMemory,
    FwCfg,
    Variables,
    TestLatch,
    TestFlush,
    TestLines,
    TestMemory,
}

/// A chip at a place on a bus. Byte-wide chips see single bytes, because the bus splits accesses for them.
struct OnBus {
    chips: Arc<Wired>,
    chip: Chip,
    /// First port, or address of a window.
    base: u64,
}

impl BusDevice for OnBus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let chips = &*self.chips;
        let now = chips.now();
        let port = (self.base + offset) as u16;
        match self.chip {
            Chip::AcpiPm | Chip::PiixPm => lock(&chips.acpi_pm).read(offset as u16, data, now),
            Chip::Hotplug => lock(&chips.hotplug).read(offset as u16, data),
            Chip::IoApic => {
                let value = lock(&chips.interrupts).io_apic.read(offset & !3);
                copy_lanes(offset, value, data);
            }
            Chip::DebugExit => data.fill(0xff),
            Chip::Serial => data[0] = chips.read_serial(offset as u16),
            Chip::Pic => {
                let mut interrupts = lock(&chips.interrupts);
                data[0] = interrupts.pic.read(port);
                chips.tell_intr(&mut interrupts);
            }
            Chip::Pit => data[0] = lock(&chips.pit).read(port, now),
            Chip::Rtc => {
                let mut rtc = lock(&chips.rtc);
                data[0] = rtc.read(port, now);
                chips.alarm.set(chips.settle_rtc(&mut rtc));
            }
            // OVMF waits seconds for a keyboard to answer, unless nothing answers at all.
            Chip::I8042 if chips.piix && port != i8042::PORT_A => data[0] = 0xff,
            Chip::I8042 => {
                let mut i8042 = lock(&chips.i8042);
                data[0] = i8042.read(port);
                chips.settle_i8042(&i8042);
            }
            Chip::PciConfig => chips.pci.port_read(offset as u16, data),
            Chip::PciPorts => chips.pci.window_read(Space::Io, port.into(), data),
            Chip::Ecam => chips.pci.ecam_read(offset, data),
            Chip::PciMemory => chips.pci.window_read(Space::Memory, self.base + offset, data),
            Chip::Variables => chips.with_variables(|chip| chip.flash.read(offset, data)),
            Chip::FwCfg => chips.with_fw_cfg(|device| device.read(offset as u16, data)),
            Chip::TestLatch => chips.with_test_device(|device| device.read_latch(offset as u16, data)),
            Chip::TestFlush | Chip::TestLines => data.fill(0xff),
            Chip::TestMemory => chips.with_test_device(|device| device.read_memory(offset, data)),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let chips = &*self.chips;
        let now = chips.now();
        let port = (self.base + offset) as u16;
        match self.chip {
            Chip::AcpiPm | Chip::PiixPm => {
                let mut pm = lock(&chips.acpi_pm);
                let event = match self.chip {
                    Chip::PiixPm => pm.write_as_piix(offset as u16, data, now),
                    _ => pm.write(offset as u16, data, now),
                };
                chips.alarm.set(chips.settle_acpi_pm(&mut pm));
                chips.power(event);
            }
            Chip::Hotplug => {
                let mut hotplug = lock(&chips.hotplug);
                let ejected = hotplug.write(offset as u16, data);
                drop(hotplug);
                chips.eject(ejected);
                chips.settle_acpi_pm(&mut lock(&chips.acpi_pm));
            }
            Chip::IoApic => {
                // The registers are 32 bits wide; narrower writes are undefined and ignored.
                let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
                let messages = lock(&chips.interrupts).io_apic.write(offset, value);
                messages.into_iter().for_each(|msi| chips.send(msi));
            }
            Chip::DebugExit => chips.power((offset == 0).then(|| power::debug_exit(data))),
            Chip::Serial => chips.write_serial(offset as u16, data[0]),
            Chip::Pic => {
                let mut interrupts = lock(&chips.interrupts);
                interrupts.pic.write(port, data[0]);
                chips.tell_intr(&mut interrupts);
            }
            Chip::Pit => {
                let mut pit = lock(&chips.pit);
                pit.write(port, data[0], now);
                chips.alarm.set(chips.settle_pit(&mut pit, now));
            }
            Chip::Rtc => {
                let mut rtc = lock(&chips.rtc);
                rtc.write(port, data[0], now);
                chips.alarm.set(chips.settle_rtc(&mut rtc));
            }
            Chip::I8042 => {
                let mut i8042 = lock(&chips.i8042);
                let event = i8042.write(port, data[0]);
                chips.settle_i8042(&i8042);
                chips.power(event);
            }
            Chip::PciConfig => chips.power(chips.pci.port_write(offset as u16, data)),
            Chip::PciPorts => chips.pci.window_write(Space::Io, port.into(), data),
            Chip::Ecam => chips.pci.ecam_write(offset, data),
            Chip::PciMemory => chips.pci.window_write(Space::Memory, self.base + offset, data),
            Chip::Variables => chips.with_variables(|chip| chip.write(offset, data)),
            Chip::FwCfg => chips.with_fw_cfg(|device| device.write(offset as u16, data)),
            Chip::TestLatch => chips.with_test_device(|device| device.write_latch(offset as u16, data)),
            Chip::TestFlush => {}
            Chip::TestLines => chips.set_test_line(offset as u8, data.iter().any(|byte| *byte != 0)),
            Chip::TestMemory => chips.with_test_device(|device| device.write_memory(offset, data)),
        }
    }
}

/// The bytes of a 32-bit register that a narrower access at `offset` sees.
fn copy_lanes(offset: u64, value: u32, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    let first = (offset & 3) as usize;
    data.copy_from_slice(&bytes[first..first + data.len()]);
}

impl Wired {
    fn now(&self) -> u64 {
        self.start + self.epoch.elapsed().as_nanos() as u64
    }

    fn power(&self, event: Option<anyvisor_devices::PowerEvent>) {
        if let Some(event) = event {
            self.notify.power(event);
        }
    }

    pub(super) fn send(&self, msi: Msi) {
        if let Err(error) = self.vm.signal_msi(msi) {
            self.notify.end(End::Failed(format!("cannot deliver an interrupt: {error}")));
        }
    }

    /// Sets ISA line `irq`; the caller holds the lock of the chip that drives it.
    fn set_line(&self, irq: u8, level: bool) {
        let mut interrupts = lock(&self.interrupts);
        let bit = 1 << irq;
        let lines = if level { interrupts.lines | bit } else { interrupts.lines & !bit };
        if lines == interrupts.lines {
            return;
        }
        interrupts.lines = lines;
        interrupts.pic.set_irq(irq, level);
        self.tell_intr(&mut interrupts);
        let pin = if irq == PIT_IRQ { 2 } else { irq };
        let message = interrupts.io_apic.set_irq(pin, level);
        drop(interrupts);
        if let Some(msi) = message {
            self.send(msi);
        }
    }

    fn with_fw_cfg(&self, act: impl FnOnce(&mut FwCfg)) {
        if let Some(device) = &self.fw_cfg {
            act(&mut lock(device));
        }
    }

    fn with_variables(&self, act: impl FnOnce(&mut VariablesChip)) {
        if let Some(chip) = &self.variables {
            act(&mut lock(chip));
        }
    }

    fn with_test_device(&self, act: impl FnOnce(&mut TestDevice)) {
        if let Some(device) = &self.test_device {
            act(&mut lock(device));
        }
    }

    /// Sets a line of the test device: an ISA line, or an I/O APIC pin that has none. On a PC there is no ISA
    /// line 2, because the 8259s are joined there.
    fn set_test_line(&self, line: u8, level: bool) {
        match line {
            2 => {}
            0..16 => self.set_line(line, level),
            _ => {
                let message = lock(&self.interrupts).io_apic.set_irq(line, level);
                message.into_iter().for_each(|msi| self.send(msi));
            }
        }
    }

    /// Sets INTA# of PCI device `device`; the caller holds the lock of the chip that drives it. Several devices share
    /// a pin of the I/O APIC, which is high while one of them drives it. The 8259 pair has no part in it.
    pub(super) fn set_pci_pin(&self, device: u8, level: bool) {
        let n = usize::from(device) % PCI_PINS.len();
        let mut interrupts = lock(&self.interrupts);
        let bit = 1 << device;
        let drivers = &mut interrupts.pci[n];
        *drivers = if level { *drivers | bit } else { *drivers & !bit };
        let level = *drivers != 0;
        let message = interrupts.io_apic.set_irq(PCI_PINS[n] as u8, level);
        drop(interrupts);
        message.into_iter().for_each(|msi| self.send(msi));
    }

    /// Passes INTR on if it has changed, in order, because the lock is held.
    fn tell_intr(&self, interrupts: &mut MutexGuard<Interrupts>) {
        if let Some(level) = interrupts.pic.intr_change()
            && let Err(error) = self.vm.set_pic_intr(level)
        {
            self.notify.end(End::Failed(format!("cannot deliver an interrupt: {error}")));
        }
    }

    fn settle_pit(&self, pit: &mut Pit, now: u64) -> Option<u64> {
        let out = pit.poll(now);
        if out.edge {
            self.set_line(PIT_IRQ, false);
            self.set_line(PIT_IRQ, true);
        }
        self.set_line(PIT_IRQ, out.level);
        pit.next_event(now)
    }

    fn settle_rtc(&self, rtc: &mut Rtc) -> Option<u64> {
        self.set_line(rtc::IRQ, rtc.interrupt());
        rtc.next_event()
    }

    fn settle_acpi_pm(&self, pm: &mut AcpiPm) -> Option<u64> {
        self.set_line(SCI, pm.sci() || lock(&self.hotplug).sci());
        pm.next_event()
    }

    fn settle_i8042(&self, i8042: &I8042) {
        let (keyboard, aux) = i8042.interrupts();
        self.set_line(i8042::KEYBOARD_IRQ, keyboard);
        self.set_line(i8042::AUX_IRQ, aux);
    }

    fn read_serial(&self, offset: u16) -> u8 {
        let mut serial = lock(&self.serial);
        let value = serial.read(offset);
        self.settle_serial(&mut serial);
        value
    }

    fn write_serial(&self, offset: u16, value: u8) {
        let mut serial = lock(&self.serial);
        let sent = serial.write(offset, value);
        self.settle_serial(&mut serial);
        // Under the lock, so that bytes of several vCPUs keep their order.
        if let Some(byte) = sent.filter(|_| !self.virtio_console) {
            self.output.put(byte);
        }
    }

    fn settle_serial(&self, serial: &mut Serial) {
        if serial.wants_input() {
            self.feed_serial(serial);
        } else {
            self.set_line(serial::COM1_IRQ, serial.interrupt());
        }
    }

    pub(super) fn still(&self) -> RwLockReadGuard<'_, bool> {
        self.still.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn still_mut(&self) -> RwLockWriteGuard<'_, bool> {
        self.still.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Input that waits goes to the serial port, unless the VM is paused.
    fn take_input(&self) {
        if self.virtio_console {
            // Those that have no console find nothing to do.
            return self.devices().iter().for_each(|device| device.ring());
        }
        let still = self.still();
        if !*still {
            self.feed_serial(&mut lock(&self.serial));
        }
    }

    fn feed_serial(&self, serial: &mut Serial) {
        if self.virtio_console {
            return self.set_line(serial::COM1_IRQ, serial.interrupt());
        }
        self.input.pull(|bytes| if bytes.is_empty() { 0 } else { serial.enqueue(bytes) });
        self.set_line(serial::COM1_IRQ, serial.interrupt());
    }
}

impl GuestIo for Board {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.memory.read(gpa, data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.memory.write(gpa, data);
    }
    fn eoi(&self, vector: u8) {
        let messages = lock(&self.chips.interrupts).io_apic.eoi(vector);
        messages.into_iter().for_each(|msi| self.chips.send(msi));
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        let mut interrupts = lock(&self.chips.interrupts);
        let vector = interrupts.pic.acknowledge();
        self.chips.tell_intr(&mut interrupts);
        vector
    }
}
