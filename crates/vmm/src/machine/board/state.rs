//! The board in a snapshot: its chips, and the guest time they count in.
//!
//! Guest time stands still while the VM is saved, for every chip but the RTC: that has a battery.

use super::{Board, Interrupts};
use crate::Result;
use crate::machine::devices::DeviceState;
use crate::machine::lock;
use crate::machine::variables::VariablesState;
use anyvisor_devices::acpi_pm::AcpiPm;
use anyvisor_devices::fw_cfg::{self, FwCfg};
use anyvisor_devices::i8042::I8042;
use anyvisor_devices::pci::PciState;
use anyvisor_devices::pci::hotplug::Hotplug;
use anyvisor_devices::pit::Pit;
use anyvisor_devices::rtc::Rtc;
use anyvisor_devices::serial::Serial;
use anyvisor_devices::state::BadState;
use anyvisor_devices::test_device::TestDevice;
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// Every chip at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoardState {
    /// Guest time in nanoseconds, as the chips count it.
    pub now: u64,
    /// The real time at that moment, in nanoseconds since 1970 (UTC).
    pub real: u64,
    pub serial: Serial,
    pub pit: Pit,
    pub rtc: Rtc,
    pub i8042: I8042,
    pub acpi_pm: AcpiPm,
    pub pci: PciState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fw_cfg: Option<fw_cfg::Position>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_device: Option<TestDevice>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceState>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<VariablesState>,
    #[serde(default, skip_serializing_if = "is_unused")]
    pub hotplug: Hotplug,
    pub interrupts: Interrupts,
}

/// Nobody has enabled its event.
fn is_unused(hotplug: &Hotplug) -> bool {
    *hotplug == Hotplug::default()
}

impl BoardState {
    /// Refuses what no guest can have made of the chips. Those that lock themselves check on
    /// [`Board::restore`].
    ///
    /// # Errors
    /// The first chip that is wrong, and what is.
    pub fn check(&self) -> std::result::Result<(), BadState> {
        self.serial.check()?;
        self.pit.check(self.now)?;
        self.rtc.check(self.now)?;
        self.i8042.check()?;
        self.acpi_pm.check(self.now)?;
        self.test_device.as_ref().map_or(Ok(()), TestDevice::check)?;
        self.devices.iter().try_for_each(DeviceState::check)?;
        self.hotplug.check()?;
        self.interrupts.io_apic.check()?;
        self.interrupts.pic.clone().check()
    }
}

fn real_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

impl Board {
    /// The state of a board that stands still. What the guest has written to its disks lasts after this.
    ///
    /// # Errors
    /// The host's, about a disk; or a device that cannot be saved.
    pub fn save(&self) -> Result<BoardState> {
        if self.has_changed() {
            return Err(crate::Error::user(
                "a VM to which devices were added, or from which some were removed, cannot be saved",
            ));
        }
        let devices = self.devices().iter().map(|device| device.save()).collect::<Result<_>>()?;
        let variables = self.chips.variables.as_ref().map(|chip| lock(chip).save()).transpose()?;
        let chips = self.chips();
        let interrupts = &*chips.interrupts;
        Ok(BoardState {
            now: self.now(),
            real: real_now(),
            serial: chips.serial.clone(),
            pit: chips.pit.clone(),
            rtc: chips.rtc.clone(),
            i8042: chips.i8042.clone(),
            acpi_pm: chips.acpi_pm.clone(),
            pci: chips.pci.save(),
            fw_cfg: chips.fw_cfg.as_deref().map(FwCfg::position),
            test_device: chips.test_device.as_deref().cloned(),
            devices,
            variables,
            hotplug: lock(&self.chips.hotplug).clone(),
            interrupts: interrupts.clone(),
        })
    }

    /// What about the images of disks and variables is not as it was when `state` was saved, in one line.
    ///
    /// # Errors
    /// The host's.
    pub(in crate::machine) fn changed_image(&self, state: &BoardState) -> Result<Option<String>> {
        if let (Some(chip), Some(saved)) = (&self.chips.variables, &state.variables)
            && let Some(difference) = lock(chip).difference(saved)?
        {
            return Ok(Some(difference));
        }
        for (device, saved) in self.devices().iter().zip(&state.devices) {
            if let Some(difference) = device.difference(saved)? {
                return Ok(Some(difference));
            }
        }
        Ok(None)
    }

    /// Makes the chips of a new board, whose time begins at `state.now`, what they were, and drives their
    /// wires. Nothing runs yet.
    ///
    /// # Errors
    /// A chip refuses its state.
    pub(in crate::machine) fn restore(&self, state: &BoardState) -> std::result::Result<(), BadState> {
        state.check()?;
        let chips = &*self.chips;
        chips.pci.restore(&state.pci)?;
        *lock(&chips.serial) = state.serial.clone();
        *lock(&chips.pit) = state.pit.clone();
        *lock(&chips.i8042) = state.i8042.clone();
        *lock(&chips.acpi_pm) = state.acpi_pm.clone();
        *lock(&chips.hotplug) = state.hotplug.clone();
        if let (Some(device), Some(position)) = (&chips.fw_cfg, state.fw_cfg) {
            lock(device).set_position(position);
        }
        match (&chips.variables, &state.variables) {
            (Some(chip), Some(saved)) => lock(chip).restore(saved),
            (None, None) => {}
            _ => {
                return Err(BadState {
                    chip: "UEFI variables",
                    what: "they are there in only one of machine and state",
                });
            }
        }
        match (&chips.test_device, &state.test_device) {
            (Some(device), Some(saved)) => *lock(device) = saved.clone(),
            (None, None) => {}
            _ => return Err(BadState { chip: "test device", what: "it is there in only one of machine and state" }),
        }
        let mut rtc = state.rtc.clone();
        let away = i128::from(real_now()) - i128::from(state.real);
        rtc.skip(i64::try_from(away).map_err(|_| BadState { chip: "RTC", what: "an impossible time" })?);
        *lock(&chips.rtc) = rtc;
        let mut interrupts = lock(&chips.interrupts);
        *interrupts = state.interrupts.clone();
        interrupts.pic.check()?;
        chips.tell_intr(&mut interrupts);
        drop(interrupts);
        // They drive their pins again.
        let devices = chips.devices();
        if devices.len() != state.devices.len() {
            return Err(BadState { chip: "virtio devices", what: "another number of them" });
        }
        devices.iter().zip(&state.devices).try_for_each(|(device, saved)| device.restore(saved))
    }
}
