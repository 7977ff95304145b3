//! The ACPI tables (ACPI 6.5): what the machine tells an operating system about itself.
//!
//! A fixed-hardware platform (PM1a, PM timer, SCI on IRQ 9) without system management mode: ACPI mode is
//! always on. The DSDT has processors, the PCI root with its windows and interrupt routing, the serial
//! port, the clock, the motherboard's resources and the sleep state S5. No keyboard controller is listed:
//! the chip is there for its reset line, and an operating system need not look for a keyboard.
//! Addresses come from [`layout`], so that a table cannot disagree with the machine.
//!
//! All tables are made as bytes first ([`tables`]) and then written below 1 MiB, where the RSDP must be, or handed to
//! firmware that places them ([`relocatable`]).

use crate::layout;
use acpi_tables::aml::{self, AddressSpace, AddressSpaceCacheable, EISAName, IO, Name, ResourceTemplate};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, facs::FACS, mcfg::MCFG};
use anyvisor_devices::pci::hotplug;
use anyvisor_devices::{acpi_pm, pci, pic, power, rtc, serial};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const OEM_ID: [u8; 6] = *b"ANYVSR";
const OEM_TABLE: [u8; 8] = *b"ANYVISOR";
const OEM_REVISION: u32 = 1;
/// ACPI's system control interrupt, level-triggered.
pub const SCI: u8 = 9;
const PM1_EVENT: u16 = acpi_pm::PORT + acpi_pm::PM1_EVENT;
const PM1_CONTROL: u16 = acpi_pm::PORT + acpi_pm::PM1_CONTROL;
const HOTPLUG_EVENTS: u16 = hotplug::PORT + hotplug::EVENTS;
const PM_TIMER: u16 = acpi_pm::PORT + acpi_pm::TIMER;
/// IO-APIC pins that PCI's INTA# to INTD# are wired to, with the device number added as usual.
pub const PCI_PINS: [u32; 4] = [16, 17, 18, 19];
/// Offsets of the FADT's pointers.
const FADT_FACS: u32 = 36;
const FADT_DSDT: u32 = 40;
const FADT_X_DSDT: u32 = 140;
/// Offsets of the RSDP's checksums: of its first 20 bytes, and of all.
pub const RSDP_CHECKSUM: usize = 8;
pub const RSDP_LONG_CHECKSUM: usize = 32;
const PCI_BUSES: u16 = (layout::ECAM_SIZE >> 20) as u16;

/// Writes the tables for a machine with `cpus` processors and `ram` bytes; returns the RSDP's address.
pub fn write(memory: &GuestMemoryMmap, cpus: u32, ram: u64) -> u64 {
    let put = |gpa: u64, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(gpa)).expect("RAM below 1 MiB exists in every machine");
    };
    let set = tables(cpus, ram, FIRST_TABLE);
    assert!(FIRST_TABLE + set.bytes.len() as u64 <= layout::ACPI_END, "the ACPI tables outgrew their area");
    put(FIRST_TABLE, &set.bytes);
    put(layout::ACPI, &bytes_of(&Rsdp::new(OEM_ID, set.xsdt)));
    layout::ACPI
}

/// Behind the RSDP, which is at [`layout::ACPI`].
const FIRST_TABLE: u64 = layout::ACPI + 0x40;

/// Tables that somebody else places: their pointers are as if they began at 0.
pub struct Relocatable {
    pub tables: Vec<u8>,
    pub rsdp: Vec<u8>,
    /// Where in `tables` pointers are, and how many bytes they have.
    pub pointers: Vec<(u32, u8)>,
    /// Where tables with such pointers begin, and their lengths: their checksums, at byte 9, depend on the place and
    /// are 0 here, as is the RSDP's. (OVMF counts what it finds there in, SeaBIOS does not.)
    pub checksums: Vec<(u32, u32)>,
}

/// The tables for a machine with `cpus` processors and `ram` bytes, to be placed at a multiple of 64.
pub fn relocatable(cpus: u32, ram: u64) -> Relocatable {
    let set = tables(cpus, ram, 0);
    let (fadt, xsdt) = (set.fadt as u32, set.xsdt as u32);
    let mut pointers = vec![(fadt + FADT_FACS, 4), (fadt + FADT_DSDT, 4), (fadt + FADT_X_DSDT, 8)];
    let length = |at: u32| {
        let at = at as usize + 4;
        u32::from_le_bytes(set.bytes[at..at + 4].try_into().expect("four bytes"))
    };
    pointers.extend((36..length(xsdt)).step_by(8).map(|at| (xsdt + at, 8)));
    let checksums = [fadt, xsdt].map(|at| (at, length(at))).to_vec();
    let mut bytes = set.bytes;
    checksums.iter().for_each(|(at, _)| bytes[*at as usize + 9] = 0);
    let mut rsdp = bytes_of(&Rsdp::new(OEM_ID, set.xsdt));
    [RSDP_CHECKSUM, RSDP_LONG_CHECKSUM].iter().for_each(|at| rsdp[*at] = 0);
    Relocatable { tables: bytes, rsdp, pointers, checksums }
}

/// Every table but the RSDP, one behind the other.
struct Set {
    bytes: Vec<u8>,
    /// Addresses.
    fadt: u64,
    xsdt: u64,
}

/// The tables for `base`, a multiple of 64.
fn tables(cpus: u32, ram: u64, base: u64) -> Set {
    let mut bytes: Vec<u8> = Vec::new();
    let mut place = |table: Vec<u8>| {
        let gpa = base + bytes.len() as u64;
        bytes.extend(table);
        // The FACS wants 64 bytes; the others take it too.
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        gpa
    };
    let facs = place(bytes_of(&FACS::new()));
    let dsdt = place(dsdt(cpus, ram));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    let [fadt, _, _] = [fadt(facs, dsdt), madt(cpus), mcfg()].map(|table| {
        let gpa = place(table);
        xsdt.add_entry(gpa);
        gpa
    });
    let xsdt = place(bytes_of(&xsdt));
    Set { bytes, fadt, xsdt }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed ACPI description (5.2.9), as bytes by offset.
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    const WBINVD: u32 = 1 << 0;
    const PROC_C1: u32 = 1 << 2;
    const SLEEP_BUTTON_ABSENT: u32 = 1 << 5;
    const FIXED_RTC_ABSENT: u32 = 1 << 6;
    const TIMER_32_BIT: u32 = 1 << 8;
    const RESET_REGISTER: u32 = 1 << 10;
    const LEGACY_DEVICES: u16 = 1 << 0;
    const NO_VGA: u16 = 1 << 2;

    let mut table = Sdt::new(*b"FACP", 276, 6, OEM_ID, OEM_TABLE, OEM_REVISION);
    table.write_u32(FADT_FACS as usize, facs as u32);
    table.write_u32(FADT_DSDT as usize, dsdt as u32);
    table.write_u16(46, u16::from(SCI));
    // 48: no SMI command port, so ACPI mode is on from the start.
    table.write_u32(56, u32::from(PM1_EVENT));
    table.write_u32(64, u32::from(PM1_CONTROL));
    table.write_u32(76, u32::from(PM_TIMER));
    table.write_u32(80, u32::from(HOTPLUG_EVENTS));
    table.write_u8(88, 4);
    table.write_u8(89, 2);
    table.write_u8(91, 4);
    table.write_u8(92, hotplug::EVENTS_LENGTH);
    table.write_u16(96, 0xffff); // no C2
    table.write_u16(98, 0xffff); // no C3
    table.write_u8(108, rtc::CENTURY); // the century's byte in CMOS
    table.write_u16(109, LEGACY_DEVICES | NO_VGA);
    let flags = WBINVD | PROC_C1 | SLEEP_BUTTON_ABSENT | FIXED_RTC_ABSENT | TIMER_32_BIT | RESET_REGISTER;
    table.write_u32(112, flags);
    table.write_bytes(116, &generic(GenericAddress::io_port_address::<u8>(power::RESET_CONTROL_PORT)));
    table.write_u8(128, power::RESET_CONTROL_VALUE);
    table.write_u8(131, 5); // minor version
    table.write_u64(FADT_X_DSDT as usize, dsdt);
    table.write_bytes(148, &generic(GenericAddress::io_port_address::<u32>(PM1_EVENT)));
    table.write_bytes(172, &generic(GenericAddress::io_port_address::<u16>(PM1_CONTROL)));
    table.write_bytes(208, &generic(GenericAddress::io_port_address::<u32>(PM_TIMER)));
    table.write_bytes(220, &generic(GenericAddress::io_port_address::<u16>(HOTPLUG_EVENTS)));
    table.write_bytes(268, b"anyvisor");
    table.as_slice().to_vec()
}

/// A generic address structure's 12 bytes (5.2.3.2).
fn generic(address: GenericAddress) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0] = address.address_space_id;
    bytes[1] = address.register_bit_width;
    bytes[3] = address.access_size;
    bytes[4..].copy_from_slice(&{ address.address }.to_le_bytes());
    bytes
}

/// Interrupt controllers (5.2.12). ISA interrupts are wired to the IO-APIC pin of their number, but for
/// the PIT, which is on pin 2 as on every PC.
fn madt(cpus: u32) -> Vec<u8> {
    const PC_AT_8259: u32 = 1;
    const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
    let mut table = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE, OEM_REVISION);
    table.write_u32(36, layout::LOCAL_APIC as u32);
    table.write_u32(40, PC_AT_8259);
    for cpu in 0..cpus as u8 {
        table.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    let mut io_apic = [1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    io_apic[4..8].copy_from_slice(&(layout::IO_APIC as u32).to_le_bytes());
    table.append_slice(&io_apic);
    let source_override = |irq: u8, gsi: u8, flags: u16| {
        let flags = flags.to_le_bytes();
        [2, 10, 0, irq, gsi, 0, 0, 0, flags[0], flags[1]]
    };
    table.append_slice(&source_override(0, 2, 0));
    table.append_slice(&source_override(SCI, SCI, ACTIVE_HIGH_LEVEL));
    // NMI on LINT1 of every processor.
    table.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    table.as_slice().to_vec()
}

/// Memory-mapped configuration space (PCI firmware specification 3.3, 4.1.2).
fn mcfg() -> Vec<u8> {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    table.add_ecam(layout::ECAM, 0, 0, (PCI_BUSES - 1) as u8);
    bytes_of(&table)
}

/// Differentiated system description: the name space.
fn dsdt(cpus: u32, ram: u64) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    let mut code = processors(cpus);
    code.extend(pci_root(ram));
    code.extend(hotplug_slots());
    code.extend(isa_devices());
    let s5: [&dyn Aml; 4] = [&acpi_pm::SLEEP_TYPE_S5, &acpi_pm::SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO];
    Name::new("_S5_".into(), &aml::Package::new(s5.to_vec())).to_aml_bytes(&mut code);
    table.append_slice(&code);
    table.as_slice().to_vec()
}

fn scope(devices: &[&dyn Aml]) -> Vec<u8> {
    bytes_of(&aml::Scope::new("\\_SB_".into(), devices.to_vec()))
}

fn processors(cpus: u32) -> Vec<u8> {
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uids: Vec<_> = (0..cpus).map(|cpu| Name::new("_UID".into(), &cpu)).collect();
    let devices: Vec<_> = uids
        .iter()
        .enumerate()
        .map(|(cpu, uid)| aml::Device::new(format!("C{cpu:03X}").as_str().into(), vec![&hid, uid]))
        .collect();
    scope(&devices.iter().map(|d| d as &dyn Aml).collect::<Vec<_>>())
}

/// PCI host bridge with its windows and interrupt routing.
fn pci_root(ram: u64) -> Vec<u8> {
    let buses = AddressSpace::new_bus_number(0u16, PCI_BUSES - 1);
    let config_ports = IO::new(pci::CONFIG_PORT, pci::CONFIG_PORT, 1, pci::CONFIG_PORTS as u8);
    let low_ports = AddressSpace::new_io(0u16, pci::CONFIG_PORT - 1, None);
    let high_ports = AddressSpace::new_io(layout::PCI_PORTS, 0xffff, None);
    let [low, high] = layout::pci_windows(ram).map(|(start, end)| {
        let (first, last) = (start as u32, (end - 1) as u32);
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
    });
    let windows = ResourceTemplate::new(vec![&buses, &config_ports, &low_ports, &high_ports, &low, &high]);

    let mut routing = aml::PackageBuilder::new();
    for device in 0..32u32 {
        for pin in 0..4u8 {
            let address = device << 16 | 0xffff;
            let gsi = PCI_PINS[(device as usize + usize::from(pin)) % 4];
            routing.add_element(&aml::Package::new(vec![&address, &pin, &aml::ZERO, &gsi]));
        }
    }
    scope(&[&aml::Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_SEG".into(), &aml::ZERO),
            &Name::new("_BBN".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &windows),
            &Name::new("_PRT".into(), &routing),
        ],
    )])
}

/// PCI device numbers whose devices come and go.
const HOTPLUG_SLOTS: std::ops::RangeInclusive<u32> = 2..=31;

/// AML as bytes.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// The slots, the registers that say whose devices come and go ([`hotplug`]), and the event's method. Linux then has its driver
/// `acpiphp` for the slots, because of their `_EJ0`.
fn hotplug_slots() -> Vec<u8> {
    let name = |slot: u32| format!("S{slot:03X}");
    let region = aml::OpRegion::new("HPRG".into(), aml::OpRegionSpace::SystemIO, &hotplug::PORT, &hotplug::EVENTS);
    let fields = [*b"HPUP", *b"HPDN", *b"HPEJ"].map(|name| aml::FieldEntry::Named(name, 32)).to_vec();
    let (access, update) = (aml::FieldAccessType::DWord, aml::FieldUpdateRule::WriteAsZeroes);
    let fields = aml::Field::new("HPRG".into(), access, aml::FieldLockRule::NoLock, update, fields);
    let mut code = [bytes_of(&region), bytes_of(&fields)].concat();
    let mut notifications = bytes_of(&aml::Store::new(&aml::Local(0), &aml::Path::new("HPUP")));
    notifications.extend(bytes_of(&aml::Store::new(&aml::Local(1), &aml::Path::new("HPDN"))));
    for slot in HOTPLUG_SLOTS {
        let (address, bit, path) = (slot << 16, 1u32 << slot, aml::Path::new(&name(slot)));
        let eject_register = aml::Path::new("HPEJ");
        let store = aml::Store::new(&eject_register, &bit);
        let eject = aml::Method::new("_EJ0".into(), 1, true, vec![&store]);
        let (address, number) = (Name::new("_ADR".into(), &address), Name::new("_SUN".into(), &slot));
        code.extend(bytes_of(&aml::Device::new(name(slot).as_str().into(), vec![&address, &number, &eject])));
        // Device check, and eject request (ACPI 6.5, 5.6.6).
        for (local, value) in [(0, 1u8), (1, 3)] {
            let local = aml::Local(local);
            let (is_set, notify) = (aml::And::new(&aml::ZERO, &local, &bit), aml::Notify::new(&path, &value));
            notifications.extend(bytes_of(&aml::If::new(&is_set, vec![&notify])));
        }
    }
    let notifications = Raw(notifications);
    code.extend(bytes_of(&aml::Method::new("HPLK".into(), 0, true, vec![&notifications])));
    let mut all = aml::Scope::raw("\\_SB_.PCI0".into(), code);
    // By edge: the event is cleared before the registers are read, so that none is lost.
    let look = aml::MethodCall::new("\\_SB_.PCI0.HPLK".into(), vec![]);
    let event = aml::Method::new(format!("_E{:02X}", hotplug::EVENT).as_str().into(), 0, true, vec![&look]);
    all.extend(bytes_of(&aml::Scope::new("\\_GPE".into(), vec![&event])));
    all
}

/// The devices that no bus enumerates.
fn isa_devices() -> Vec<u8> {
    let edge = |irq: u8| aml::Interrupt::new(true, true, false, false, u32::from(irq));
    let hid = |id: &str| Name::new("_HID".into(), &EISAName::new(id));
    let crs = |resources: Vec<&dyn Aml>| Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let com1 = crs(vec![&IO::new(serial::COM1_PORT, serial::COM1_PORT, 1, 8), &edge(serial::COM1_IRQ)]);
    let clock = crs(vec![&IO::new(rtc::PORT, rtc::PORT, 1, 2), &edge(rtc::IRQ)]);
    // What nobody else claims. Linux uses the configuration space only if it is listed here.
    let board = crs(vec![
        &aml::Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32),
        &IO::new(acpi_pm::PORT, acpi_pm::PORT, 1, acpi_pm::LENGTH as u8),
        &IO::new(hotplug::PORT, hotplug::PORT, 1, hotplug::LENGTH as u8),
        &IO::new(pic::ELCR_PORT, pic::ELCR_PORT, 1, 2),
    ]);
    scope(&[
        &aml::Device::new("COM1".into(), vec![&hid("PNP0501"), &Name::new("_UID".into(), &aml::ONE), &com1]),
        &aml::Device::new("RTC_".into(), vec![&hid("PNP0B00"), &clock]),
        &aml::Device::new("MBRD".into(), vec![&hid("PNP0C02"), &Name::new("_UID".into(), &aml::ZERO), &board]),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }
    fn u32_at(bytes: &[u8], at: usize) -> u64 {
        u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()))
    }

    /// Follows the pointers as an operating system does.
    #[test]
    fn tables_are_found_from_the_rsdp() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let rsdp = write(&memory, 3, 1 << 30);
        let read = |gpa: u64, size: usize| {
            let mut bytes = vec![0; size];
            memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
            bytes
        };
        let table = |gpa: u64, signature: &[u8]| {
            let bytes = read(gpa, u32_at(&read(gpa, 8), 4) as usize);
            assert_eq!(&bytes[..4], signature);
            assert_eq!(sum(&bytes), 0, "checksum");
            bytes
        };
        let root = read(rsdp, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root), sum(&root[..20])), (0, 0));
        let xsdt = table(u32_at(&root, 24), b"XSDT");
        let fadt = table(u32_at(&xsdt, 36), b"FACP");
        let madt = table(u32_at(&xsdt, 44), b"APIC");
        let mcfg = table(u32_at(&xsdt, 52), b"MCFG");
        let dsdt = table(u32_at(&fadt, 40), b"DSDT");
        assert_eq!(read(u32_at(&fadt, 36), 4), b"FACS");
        assert_eq!(u32_at(&fadt, 36) % 64, 0);
        assert_eq!(u32_at(&fadt, 140), u32_at(&fadt, 40));
        assert_eq!((fadt[46], u32_at(&fadt, 112) >> 20 & 1), (9, 0), "SCI, hardware-reduced");
        assert_eq!((fadt[116], u32_at(&fadt, 120), fadt[128]), (1, 0xcf9, 6));
        assert_eq!(madt[44..].chunks(8).take_while(|c| c[..2] == [0, 8]).count(), 3);
        assert_eq!(u32_at(&mcfg, 44), layout::ECAM);
        assert_eq!(mcfg[54..56], [0, 0], "buses");
        assert!(dsdt.windows(4).any(|w| w == b"_S5_") && dsdt.windows(4).any(|w| w == b"C002"));
    }

    #[test]
    fn the_largest_machine_fits() {
        let size = tables(crate::config::CPUS_MAX, 1 << 30, FIRST_TABLE).bytes.len() as u64;
        assert!(FIRST_TABLE + size < layout::ACPI_END);
    }
}
