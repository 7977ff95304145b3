//! What firmware is told of the machine: the contents of the firmware configuration device.
//!
//! SeaBIOS and OVMF, made for QEMU, ask for it: memory map, processors, the port of the console, and the ACPI tables with
//! a script that says how to place them (SeaBIOS src/fw/romfile_loader.h).
//! The tables are the ones that kernels get without firmware ([`crate::acpi`]), so that the machine has one description.

use crate::{Config, acpi, layout};
use anyvisor_devices::fw_cfg::{FwCfg, item};
use anyvisor_devices::serial;

const TABLES: &str = "etc/acpi/tables";
const RSDP: &str = "etc/acpi/rsdp";
const SCRIPT: &str = "etc/table-loader";

/// Bytes of a command of the script, and of a file's name in it.
const COMMAND: usize = 128;
const NAME: usize = 56;
/// Where the loader puts a file: anywhere, or where an operating system searches for the RSDP.
const ANYWHERE: u8 = 1;
const BELOW_1_MIB: u8 = 2;

/// The device of the machine that `config` describes.
pub fn device(config: &Config) -> FwCfg {
    let cpus = (config.cpus as u16).to_le_bytes().to_vec();
    let acpi = acpi::relocatable(config.cpus, config.memory);
    let items = [
        (item::CPUS, cpus.clone()),
        (item::MAX_CPUS, cpus),
        // Without a menu nobody is waited for.
        (item::BOOT_MENU, vec![0, 0]),
        // The PIT is on pin 2 of the I/O APIC.
        (item::IRQ0_OVERRIDE, vec![1]),
    ];
    let files = vec![
        ("etc/e820", memory_map(config.memory)),
        ("etc/sercon-port", serial::COM1_PORT.to_le_bytes().to_vec()),
        (SCRIPT, script(&acpi)),
        (TABLES, acpi.tables),
        (RSDP, acpi.rsdp),
    ];
    FwCfg::new(&items, files)
}

/// RAM, and what else is not for PCI, in e820's format.
fn memory_map(ram: u64) -> Vec<u8> {
    let ram = layout::ram_pieces(ram).into_iter().map(|(start, size)| (start, size, layout::MapKind::Ram as u32));
    let reserved = [(layout::ECAM, layout::ECAM_SIZE), layout::KVM_PAGES];
    let reserved = reserved.into_iter().map(|(start, size)| (start, size, layout::MapKind::Reserved as u32));
    let entry = |(start, size, kind): (u64, u64, u32)| {
        [start.to_le_bytes().as_slice(), &size.to_le_bytes(), &kind.to_le_bytes()].concat()
    };
    ram.chain(reserved).flat_map(entry).collect()
}

/// The script: where the files go, which pointers to move with them, which checksums to make right after that.
fn script(acpi: &acpi::Relocatable) -> Vec<u8> {
    let mut script = vec![allocate(RSDP, 16, BELOW_1_MIB), allocate(TABLES, 64, ANYWHERE)];
    script.extend(acpi.pointers.iter().map(|&(offset, size)| add_pointer(TABLES, offset, size)));
    script.extend(acpi.checksums.iter().map(|&(start, length)| add_checksum(TABLES, start + 9, start, length)));
    // The RSDP names the XSDT at byte 24, and has a checksum of its old and one of its whole length (ACPI 6.5, 5.2.5.3).
    script.push(add_pointer(RSDP, 24, 8));
    script.push(add_checksum(RSDP, acpi::RSDP_CHECKSUM as u32, 0, 20));
    script.push(add_checksum(RSDP, acpi::RSDP_LONG_CHECKSUM as u32, 0, acpi.rsdp.len() as u32));
    script.concat()
}

fn allocate(file: &str, alignment: u32, zone: u8) -> Vec<u8> {
    command(1, &[&name(file), &alignment.to_le_bytes(), &[zone]])
}

/// The address of the tables is added to `size` bytes at `offset` of `file`.
fn add_pointer(file: &str, offset: u32, size: u8) -> Vec<u8> {
    command(2, &[&name(file), &name(TABLES), &offset.to_le_bytes(), &[size]])
}

fn add_checksum(file: &str, offset: u32, start: u32, length: u32) -> Vec<u8> {
    command(3, &[&name(file), &offset.to_le_bytes(), &start.to_le_bytes(), &length.to_le_bytes()])
}

fn name(file: &str) -> Vec<u8> {
    let mut bytes = file.as_bytes().to_vec();
    bytes.resize(NAME, 0);
    bytes
}

fn command(number: u32, parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = [&[&number.to_le_bytes()[..]], parts].concat().concat();
    bytes.resize(COMMAND, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    /// Places the tables as a loader does, and follows the pointers as an operating system does.
    #[test]
    fn placed_tables_are_whole() {
        const AT: u64 = 0x7fe_0040;
        let acpi = acpi::relocatable(2, 1 << 30);
        let (mut tables, mut rsdp) = (acpi.tables.clone(), acpi.rsdp.clone());
        for step in script(&acpi).chunks(COMMAND) {
            let to = if step[4..].starts_with(RSDP.as_bytes()) { &mut rsdp } else { &mut tables };
            match step[0] {
                1 => {}
                2 => {
                    let (at, size) = (u32_at(step, 116), usize::from(step[120]));
                    let mut value = [0; 8];
                    value[..size].copy_from_slice(&to[at..at + size]);
                    let moved = u64::from_le_bytes(value) + AT;
                    to[at..at + size].copy_from_slice(&moved.to_le_bytes()[..size]);
                }
                3 => {
                    let (at, start, length) = (u32_at(step, 60), u32_at(step, 64), u32_at(step, 68));
                    let sum = to[start..start + length].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                    // SeaBIOS subtracts the sum, OVMF puts its negative there.
                    assert_eq!(to[at], 0);
                    to[at] = sum.wrapping_neg();
                }
                other => panic!("command {other}"),
            }
        }
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((sum(&rsdp), sum(&rsdp[..20])), (0, 0));
        let table = |at: usize, signature: &[u8]| {
            let table = &tables[at - AT as usize..];
            let table = &table[..u32_at(table, 4)];
            assert_eq!((&table[..4], sum(table)), (signature, 0));
            table
        };
        let xsdt = table(u32_at(&rsdp, 24), b"XSDT");
        let fadt = table(u32_at(xsdt, 36), b"FACP");
        table(u32_at(xsdt, 44), b"APIC");
        table(u32_at(xsdt, 52), b"MCFG");
        table(u32_at(fadt, 40), b"DSDT");
        assert_eq!(u32_at(fadt, 140), u32_at(fadt, 40));
        assert_eq!(&tables[u32_at(fadt, 36) - AT as usize..][..4], b"FACS");
        assert_eq!(u32_at(fadt, 36) % 64, 0);
    }

    #[test]
    fn the_memory_map_has_all_ram() {
        let map = memory_map(4 << 30);
        let entries: Vec<_> = map.chunks(20).map(|entry| (u32_at(entry, 16), u32_at(entry, 0))).collect();
        assert_eq!(entries, [(1, 0), (1, 0), (2, 0xe000_0000), (2, 0xfeff_c000)]);
        assert_eq!(u32_at(&map, 8), 0xc000_0000);
        assert_eq!(map[24], 1, "4 GiB");
    }
}
