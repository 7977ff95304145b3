//! A function's configuration space: type 0 header, base address registers, capabilities (PCI 3.0, 6.1–6.7).
//!
//! Bytes with a mask of writable bits beside them: the sizing protocol of BARs and the read-only fields all
//! follow from the masks. 256 bytes; beyond, reads are all ones, which guests take for "no extended space".

use super::{Space, Window};
use crate::state::{BadState, require};

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const HEADER_TYPE: usize = 0x0e;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

const COMMAND_IO: u8 = 1 << 0;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_MASTER: u8 = 1 << 2;
/// I/O, memory, bus master, parity and SERR response, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
const COMMAND_PIN_DISABLE: u8 = 1 << 2;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Whether a write to the dword with `register` may change what a function decodes.
pub(super) fn may_move_windows(register: u16) -> bool {
    matches!(register, 0x04..0x08 | 0x10..0x28)
}

/// Who a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    /// Base class, subclass and programming interface: 0xCCSSPP.
    pub class: u32,
    pub revision: u8,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    Io,
    /// Below 4 GiB.
    Memory32,
    /// Anywhere; takes the next BAR too.
    Memory64 {
        prefetchable: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// Configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    bars: [Option<Bar>; 6],
    /// Where the next capability goes, and the pointer that will name it.
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs or capabilities.
    pub fn new(identity: Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; 256],
            writable: [0; 256],
            bars: [None; 6],
            next_capability: 0x40,
            last_pointer: CAPABILITIES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND..STATUS].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // Cache line size, latency timer and interrupt line are scratch to us.
        space.writable[0x0c] = 0xff;
        space.writable[0x0d] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Adds BAR `index` (0–5) of `size` bytes, a power of two: at least 16 for memory, 4 to 256 for I/O.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) {
        let (smallest, largest) = match kind {
            BarKind::Io => (4, 256),
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 { .. } => (16, 1 << 62),
        };
        assert!(size.is_power_of_two() && (smallest..=largest).contains(&size), "BAR size {size:#x}");
        let wide = matches!(kind, BarKind::Memory64 { .. });
        assert!(index + usize::from(wide) < 6, "BAR index {index}");
        assert!(self.bars[index].is_none() && !(index > 0 && self.is_upper_half(index)), "BAR {index} is taken");
        assert!(!wide || self.bars[index + 1].is_none(), "BAR {} is taken", index + 1);
        self.bars[index] = Some(Bar { kind, size });
        let at = BARS + 4 * index;
        self.bytes[at] = match kind {
            BarKind::Io => 0x1,
            BarKind::Memory32 => 0x0,
            BarKind::Memory64 { prefetchable } => 0x4 | u8::from(prefetchable) << 3,
        };
        let mask = (!(size - 1)).to_le_bytes();
        let length = if wide { 8 } else { 4 };
        self.writable[at..at + length].copy_from_slice(&mask[..length]);
    }

    /// Sets a BAR's address, as firmware would.
    pub fn set_bar(&mut self, index: usize, address: u64) {
        let bar = self.bars[index].expect("no such BAR");
        assert!(address.is_multiple_of(bar.size), "BAR {index} at {address:#x} is not aligned");
        let length = if matches!(bar.kind, BarKind::Memory64 { .. }) { 8 } else { 4 };
        self.write(BAR_REGISTERS[index], &address.to_le_bytes()[..4]);
        if length == 8 {
            self.write(BAR_REGISTERS[index] + 4, &address.to_le_bytes()[4..]);
        }
    }

    /// Adds a capability with `id`: its bytes after ID and next pointer, and which of their bits are
    /// writable. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        assert_eq!(body.len(), writable.len());
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= 256, "no room for capability {id:#x}");
        self.bytes[self.last_pointer] = at as u8;
        self.bytes[at] = id;
        self.put(at + 2, body);
        self.writable[at + 2..end].copy_from_slice(writable);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        at as u16
    }

    /// Says which INTx pin the function drives (1 is INTA#).
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.bytes[INTERRUPT_PIN] = pin;
    }

    /// Says that the device has functions beyond this one, function 0.
    pub fn set_multifunction(&mut self) {
        self.bytes[HEADER_TYPE] = 0x80;
    }

    /// Reads bytes at `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes bytes at `offset`; read-only bits stay.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, &byte) in (usize::from(offset)..).zip(data) {
            if let Some(&mask) = self.writable.get(at) {
                self.bytes[at] = self.bytes[at] & !mask | byte & mask;
            }
        }
    }

    /// What a guest can have changed of the 256 bytes, for [`ConfigSpace::restore`] of a space of the same make.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes the writable bits from a saved space, which is untrusted; the others stay as they are.
    ///
    /// # Errors
    /// There are not 256 bytes.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), BadState> {
        require("PCI function", &[(saved.len() == self.bytes.len(), "a configuration space of another size")])?;
        self.write(0, saved);
        Ok(())
    }

    /// Whether the guest lets the function read and write memory, MSI included.
    pub fn is_bus_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MASTER != 0
    }

    /// Whether the guest keeps the interrupt pin inactive.
    pub fn is_pin_disabled(&self) -> bool {
        self.bytes[COMMAND + 1] & COMMAND_PIN_DISABLE != 0
    }

    /// Shows in the status register whether an interrupt by pin is pending, disabled or not.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = self.bytes[STATUS] & !STATUS_INTERRUPT;
        self.bytes[STATUS] = status | if pending { STATUS_INTERRUPT } else { 0 };
    }

    /// Sets bytes at `offset`, read-only or not: the function's own writes.
    pub fn put_window(&mut self, offset: u16, bytes: &[u8]) {
        self.put(offset.into(), bytes);
    }

    /// What the BARs decode now. A BAR of zero is unassigned; one that wraps decodes nothing.
    pub fn windows(&self) -> Vec<Window> {
        let command = self.bytes[COMMAND];
        let window = |index: usize| {
            let bar = self.bars[index]?;
            let (space, enable) = match bar.kind {
                BarKind::Io => (Space::Io, COMMAND_IO),
                _ => (Space::Memory, COMMAND_MEMORY),
            };
            let base = self.bar_address(index, bar);
            let decodes = command & enable != 0 && base != 0 && base.checked_add(bar.size).is_some();
            decodes.then_some(Window { space, base, length: bar.size, bar: index as u8 })
        };
        (0..6).filter_map(window).collect()
    }

    fn bar_address(&self, index: usize, bar: Bar) -> u64 {
        let dword = |at: usize| {
            u32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
        };
        let at = BARS + 4 * index;
        let upper = if matches!(bar.kind, BarKind::Memory64 { .. }) { dword(at + 4) } else { 0 };
        (u64::from(upper) << 32 | u64::from(dword(at))) & !(bar.size - 1)
    }

    fn is_upper_half(&self, index: usize) -> bool {
        self.bars[index - 1].is_some_and(|bar| matches!(bar.kind, BarKind::Memory64 { .. }))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

const BAR_REGISTERS: [u16; 6] = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24];

#[cfg(test)]
pub(in crate::pci) mod tests {
    use super::*;

    pub fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_8000,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        })
    }

    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn put(space: &mut ConfigSpace, offset: u16, value: u32) {
        space.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn the_header_and_its_writable_bits() {
        let mut space = space();
        // Register, as made, and after writing all ones.
        for (offset, fresh, written) in [
            (0x00, 0x1042_1af4, 0x1042_1af4),
            (0x04, 0, 0x0547),
            (0x08, 0x0180_0001, 0x0180_0001),
            (0x0c, 0, 0xffff),
            (0x10, 0, 0),
            (0x28, 0, 0),
            (0x2c, 0x0002_1af4, 0x0002_1af4),
            (0x30, 0, 0),
            (0x34, 0, 0),
            (0x3c, 0, 0xff),
            (0x40, 0, 0),
            (0x100, !0, !0),
        ] {
            assert_eq!(dword(&space, offset), fresh, "register {offset:#x}");
            put(&mut space, offset, !0);
            assert_eq!(dword(&space, offset), written, "register {offset:#x}");
        }
        assert!(space.is_bus_master());
    }

    #[test]
    fn bars_tell_their_size() {
        // Kind, size, and what reads back after writing all ones (PCI 3.0, 6.2.5.1).
        for (kind, size, low, high) in [
            (BarKind::Io, 0x20, 0xffff_ffe1u32, 0),
            (BarKind::Memory32, 0x1000, 0xffff_f000, 0),
            (BarKind::Memory64 { prefetchable: false }, 0x4000, 0xffff_c004, !0),
            (BarKind::Memory64 { prefetchable: true }, 1 << 33, 0x0000_000c, !1),
        ] {
            let mut space = space();
            space.add_bar(2, kind, size);
            put(&mut space, 0x18, !0);
            put(&mut space, 0x1c, !0);
            assert_eq!((dword(&space, 0x18), dword(&space, 0x1c)), (low, high), "{kind:?} {size:#x}");
        }
    }

    #[test]
    fn windows_need_an_address_and_decoding() {
        let mut space = space();
        space.add_bar(0, BarKind::Io, 0x40);
        space.add_bar(1, BarKind::Memory32, 0x1000);
        space.add_bar(4, BarKind::Memory64 { prefetchable: true }, 0x8000);
        assert_eq!(space.windows(), []);
        put(&mut space, 4, 3);
        assert_eq!(space.windows(), [], "no addresses");
        space.set_bar(0, 0xc040);
        space.set_bar(1, 0xe000_1000);
        space.set_bar(4, 0x12_3450_0000);
        let io = Window { space: Space::Io, base: 0xc040, length: 0x40, bar: 0 };
        let low = Window { space: Space::Memory, base: 0xe000_1000, length: 0x1000, bar: 1 };
        let high = Window { space: Space::Memory, base: 0x12_3450_0000, length: 0x8000, bar: 4 };
        assert_eq!(space.windows(), [io, low, high]);
        put(&mut space, 4, 1);
        assert_eq!(space.windows(), [io]);
        put(&mut space, 4, 2);
        put(&mut space, 0x20, !0);
        put(&mut space, 0x24, !0);
        assert_eq!(space.windows(), [low], "while sizing, a BAR at the top decodes nothing");
    }

    #[test]
    fn capabilities_are_chained() {
        let mut space = space();
        let first = space.add_capability(0x09, &[1, 2, 3], &[0xff, 0, 0]);
        let second = space.add_capability(0x11, &[0xaa, 0xbb], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(dword(&space, 4) >> 16, 0x10);
        assert_eq!(dword(&space, 0x34), 0x40);
        assert_eq!(dword(&space, 0x40), 0x0201_4809);
        assert_eq!(dword(&space, 0x48), 0xbbaa_0011);
        put(&mut space, 0x40, 0);
        put(&mut space, 0x48, 0);
        assert_eq!(dword(&space, 0x40), 0x0200_4809);
        assert_eq!(dword(&space, 0x48), 0x3baa_0011);
        space.set_interrupt_pin(1);
        assert_eq!(dword(&space, 0x3c), 0x100);
        space.set_multifunction();
        assert_eq!(dword(&space, 0x0c), 0x80_0000);
    }

    #[test]
    #[should_panic(expected = "taken")]
    fn bars_do_not_overlap() {
        let mut space = space();
        space.add_bar(0, BarKind::Memory64 { prefetchable: false }, 0x1000);
        space.add_bar(1, BarKind::Memory32, 0x1000);
    }
}
