//! Where things are in guest-physical memory.
//!
//! RAM is one piece from 0 to at most 3 GiB, and the rest starts at 4 GiB; the gigabyte between them holds
//! PCI's window and the chips. Below 1 MiB live the structures of the boot protocols, which a kernel reads
//! once, and the ACPI tables, which it keeps.

/// GDT of the entry state.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH protocol, its memory map and module list behind it.
pub const PVH_START_INFO: u64 = 0x6000;
pub const PVH_MODULES: u64 = 0x6100;
pub const PVH_MEMORY_MAP: u64 = 0x6200;
/// `boot_params` of the Linux boot protocol, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of a small stack for the entry code.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Identity page tables: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// A `setup_data` node with a random seed.
pub const RNG_SEED: u64 = 0xf000;
/// The command line, at most [`COMMAND_LINE_MAX`] bytes with its NUL.
pub const COMMAND_LINE: u64 = 0x2_0000;
pub const COMMAND_LINE_MAX: usize = 0x1_0000;
/// End of conventional memory, where firmware keeps its extended BIOS data area.
pub const LOW_END: u64 = 0x9_fc00;
/// ACPI tables, in the area that an operating system searches for the RSDP (ACPI 6.5, 5.2.5.1).
pub const ACPI: u64 = 0xe_0000;
pub const ACPI_END: u64 = 0x10_0000;
/// Kernels are loaded from here up.
pub const HIGH_START: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_LIMIT: u64 = 0xc000_0000;
/// Where PCI's 32-bit BARs are unless firmware places them.
pub const PCI_WINDOW: u64 = LOW_RAM_LIMIT;
pub const PCI_WINDOW_END: u64 = ECAM;
/// PCI configuration space by memory access: of bus 0, the only one.
pub const ECAM: u64 = 0xe000_0000;
pub const ECAM_SIZE: u64 = anyvisor_devices::pci::ECAM_LENGTH;
/// I/O ports for PCI BARs, behind all that is anywhere fixed.
pub const PCI_PORTS: u16 = 0x1000;
pub const IO_APIC: u64 = anyvisor_devices::ioapic::DEFAULT_BASE;
/// Start and size of pages that KVM keeps for itself on processors without "unrestricted guest" (engine-kvm's `vm.rs`):
/// where QEMU has them, between the chips and flash memory.
pub const KVM_PAGES: (u64, u64) = (0xfeff_c000, 0x4000);
/// Most flash memory, which ends at 4 GiB: above all chips.
pub const FLASH_MAX: u64 = 16 << 20;
/// Most flash memory for UEFI variables, which is below that with the firmware, and most firmware then.
pub const VARIABLES_MAX: u64 = 1 << 20;
pub const FLASH_MAX_BESIDE_VARIABLES: u64 = 7 << 20;
/// Most flash memory in a machine with a test device, whose memory is below.
pub const FLASH_MAX_BESIDE_TEST_DEVICE: u64 = HIGH_RAM - TEST_MEMORY - anyvisor_devices::test_device::MEMORY_SIZE;
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Memory of the test device, where a machine has one.
pub const TEST_MEMORY: u64 = anyvisor_devices::test_device::MEMORY;
/// RAM beyond [`LOW_RAM_LIMIT`] continues here.
pub const HIGH_RAM: u64 = 1 << 32;

/// PCI's windows for 32-bit BARs, as (start, end), in a machine with `ram` bytes. Firmware that was made for other
/// chipsets puts them behind RAM, from 2 GiB on (OVMF), or behind ECAM (SeaBIOS).
pub fn pci_windows(ram: u64) -> [(u64, u64); 2] {
    [(ram.clamp(2 << 30, LOW_RAM_LIMIT), PCI_WINDOW_END), (ECAM + ECAM_SIZE, IO_APIC)]
}

/// Width of physical addresses that is enough for a machine with `ram` bytes and UEFI firmware. That makes page tables
/// for all of it, in pages of 2 MiB where it is 32-bit code: of 46 bits they were 256 MiB.
pub fn physical_bits_for_firmware(ram: u64) -> u8 {
    let end = HIGH_RAM + ram.saturating_sub(LOW_RAM_LIMIT);
    40.max(end.next_power_of_two().ilog2() as u8)
}

/// What a piece of guest-physical memory is for; the numbers are e820's types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    Ram = 1,
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    pub start: u64,
    pub size: u64,
    pub kind: MapKind,
}

/// The pieces of RAM, as (start, size), of a machine with `ram` bytes.
pub fn ram_pieces(ram: u64) -> Vec<(u64, u64)> {
    let low = ram.min(LOW_RAM_LIMIT);
    let mut pieces = vec![(0, low)];
    if ram > low {
        pieces.push((HIGH_RAM, ram - low));
    }
    pieces
}

/// The pieces of memory in ascending order: of RAM, and of `flash` bytes of flash memory.
pub fn memory_pieces(ram: u64, flash: u64) -> Vec<(u64, u64)> {
    let mut pieces = ram_pieces(ram);
    if flash > 0 {
        pieces.insert(1, (HIGH_RAM - flash, flash));
    }
    pieces
}

/// The memory map that a guest is told, in ascending order.
pub fn memory_map(ram: u64) -> Vec<MapEntry> {
    let low = ram.min(LOW_RAM_LIMIT);
    let entry = |start, end, kind| MapEntry { start, size: end - start, kind };
    let mut map = vec![
        entry(0, LOW_END, MapKind::Ram),
        entry(LOW_END, 0xa_0000, MapKind::Reserved),
        entry(ACPI, ACPI_END, MapKind::Reserved),
        entry(HIGH_START, low, MapKind::Ram),
        // Linux trusts MCFG only where the memory map reserves the area.
        entry(ECAM, ECAM + ECAM_SIZE, MapKind::Reserved),
    ];
    if ram > low {
        map.push(entry(HIGH_RAM, HIGH_RAM + (ram - low), MapKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn physical_addresses_reach_all_memory() {
        let bits = [8 << 20, 3 << 30, (1 << 40) - (1 << 30), 1 << 40].map(physical_bits_for_firmware);
        assert_eq!(bits, [40, 40, 40, 41]);
    }

    #[test]
    fn the_map_is_sorted_and_covers_the_ram() {
        for ram in [32 << 20, 3 << 30, (3 << 30) + 4096, 8 << 30] {
            let map = memory_map(ram);
            assert!(map.windows(2).all(|w| w[0].start + w[0].size <= w[1].start), "{map:x?}");
            let usable: u64 = map.iter().filter(|e| e.kind == MapKind::Ram).map(|e| e.size).sum();
            assert_eq!(usable, ram - (HIGH_START - LOW_END));
            assert_eq!(ram_pieces(ram).iter().map(|p| p.1).sum::<u64>(), ram);
            let [low, high] = pci_windows(ram);
            assert!(map[3].start + map[3].size <= low.0 && low.0 <= PCI_WINDOW && low.1 <= high.0, "{low:x?}");
        }
    }
}
