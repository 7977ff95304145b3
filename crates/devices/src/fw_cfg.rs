//! QEMU's firmware configuration device: how firmware that was made for QEMU learns what the machine has (QEMU
//! docs/specs/fw_cfg.rst).
//!
//! A set of byte strings by number, and a directory of those that have names. The guest selects one and reads it byte by
//! byte through a port. The interface by DMA is not offered: what is read here is small.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// First of the two ports: the selector, 16 bits wide, and from the second the data.
pub const PORT: u16 = 0x510;
pub const LENGTH: u64 = 2;

/// Numbers of items without names.
pub mod item {
    pub const SIGNATURE: u16 = 0x00;
    pub const ID: u16 = 0x01;
    pub const CPUS: u16 = 0x05;
    pub const BOOT_MENU: u16 = 0x0e;
    pub const MAX_CPUS: u16 = 0x0f;
    pub const DIRECTORY: u16 = 0x19;
    pub const FIRST_FILE: u16 = 0x20;
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// Longest name in the directory, with its NUL.
const NAME_SIZE: usize = 56;
/// The bit of [`item::ID`] for the interface by ports.
const PORTS: u32 = 1;

/// What the guest can change of the device, and so its saved state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    selected: u16,
    offset: u32,
}

/// The device.
#[derive(Clone, Debug)]
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    position: Position,
}

impl FwCfg {
    /// A device with `items` by number, and `files` by name, each of at most 55 bytes.
    pub fn new(items: &[(u16, Vec<u8>)], mut files: Vec<(&str, Vec<u8>)>) -> FwCfg {
        let mut all: BTreeMap<u16, Vec<u8>> = items.iter().cloned().collect();
        all.insert(item::SIGNATURE, b"QEMU".to_vec());
        all.insert(item::ID, PORTS.to_le_bytes().to_vec());
        files.sort_by_key(|(name, _)| *name);
        // The directory is in big-endian byte order.
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        for (number, (name, bytes)) in (item::FIRST_FILE..).zip(files) {
            assert!(name.len() < NAME_SIZE, "file name {name} is too long");
            directory.extend((bytes.len() as u32).to_be_bytes());
            directory.extend(number.to_be_bytes());
            directory.extend([0, 0]);
            directory.extend(name.bytes().chain(std::iter::repeat(0)).take(NAME_SIZE));
            all.insert(number, bytes);
        }
        all.insert(item::DIRECTORY, directory);
        FwCfg { items: all, position: Position::default() }
    }

    /// Reads 1 or 2 bytes at `offset` (0 or 1) from [`PORT`]. Only the data port answers; behind an item's end, and
    /// where there is no item, it reads as zero.
    pub fn read(&mut self, offset: u16, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = if port == 1 { self.next() } else { 0 };
        }
    }

    /// Writes 1 or 2 bytes at `offset` from [`PORT`]: 2 bytes at 0 select. Data cannot be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if let (0, &[low, high]) = (offset, data) {
            self.position = Position { selected: u16::from_le_bytes([low, high]), offset: 0 };
        }
    }

    fn next(&mut self) -> u8 {
        let item = self.items.get(&self.position.selected);
        let Some(byte) = item.and_then(|item| item.get(self.position.offset as usize)) else { return 0 };
        self.position.offset += 1;
        *byte
    }

    /// Where the guest is reading.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes to a saved position. Any will do: one behind the end reads zeros.
    pub fn set_position(&mut self, position: Position) {
        self.position = position;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &mut FwCfg, item: u16, length: usize) -> Vec<u8> {
        device.write(0, &item.to_le_bytes());
        let mut byte = [0];
        (0..length)
            .map(|_| {
                device.read(1, &mut byte);
                byte[0]
            })
            .collect()
    }

    #[test]
    fn items_and_files_are_found() {
        let items = [(item::CPUS, vec![3, 0])];
        let mut device = FwCfg::new(&items, vec![("etc/b", vec![9; 300]), ("etc/a", b"hello".to_vec())]);
        assert_eq!(read(&mut device, item::SIGNATURE, 6), b"QEMU\0\0");
        assert_eq!(read(&mut device, item::ID, 4), [1, 0, 0, 0]);
        assert_eq!(read(&mut device, item::CPUS, 2), [3, 0]);
        assert_eq!(read(&mut device, 0x7777, 3), [0; 3]);
        let directory = read(&mut device, item::DIRECTORY, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..18], *b"\0\0\0\x05\0\x20\0\0etc/a\0");
        assert_eq!(directory[68..82], *b"\0\0\x01\x2c\0\x21\0\0etc/b\0");
        assert_eq!(read(&mut device, 0x20, 5), b"hello");
        assert_eq!(read(&mut device, 0x21, 301)[298..], [9, 9, 0]);
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let mut device = FwCfg::new(&[], vec![]);
        device.write(0, &[0, 0]);
        device.write(0, &[5]);
        device.write(1, &[5]);
        let mut data = [9; 2];
        device.read(0, &mut data);
        assert_eq!(data, [0, b'Q'], "the selector's port reads as zero");
        let position = device.position();
        let mut other = FwCfg::new(&[], vec![]);
        other.set_position(position);
        other.read(1, &mut data[..1]);
        assert_eq!(data[0], b'E');
        other.set_position(Position { selected: 0, offset: u32::MAX });
        other.read(1, &mut data[..1]);
        assert_eq!(data[0], 0);
    }
}
