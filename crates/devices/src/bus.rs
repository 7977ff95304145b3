//! The port and memory buses: who answers an address.
//!
//! **Problem.** A guest may access any address with any size: a 32-bit read over four 8-bit ports, an
//! 8-byte write to a 32-bit register, an access across two devices, or where nobody lives.
//!
//! **Idea.** A bus is a sorted list of ranges, built once and then read without locks. As a chipset does, it
//! splits an access into naturally aligned pieces no wider than the device's data path and not beyond its
//! range; pieces nobody claims read as all ones and are written to nowhere. Devices lock themselves.
//!
//! Invariant: ranges do not overlap, and none wraps around the address space.

use std::sync::Arc;

/// A device on a bus. Called on any vCPU's thread, concurrently.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes (1, 2, 4 or 8, at most the [`Width`] it was added with, naturally aligned on
    /// the bus) at `offset` bytes into its range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes; sizes as in [`BusDevice::read`].
    fn write(&self, offset: u64, data: &[u8]);
}

/// The width of a device's data path: wider accesses are split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    Byte = 1,
    Word = 2,
    Dword = 4,
    Qword = 8,
}

/// A range that was refused: empty, wrapping, or overlapping another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bus range {base:#x}+{length:#x} is empty or overlaps another")]
pub struct BadRange {
    pub base: u64,
    pub length: u64,
}

struct Range {
    base: u64,
    /// Inclusive, so that a range may end at the top of the address space.
    last: u64,
    width: Width,
    device: Arc<dyn BusDevice>,
}

/// One address space with its devices.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Lets `device` answer `length` addresses from `base`.
    pub fn add(&mut self, base: u64, length: u64, width: Width, device: Arc<dyn BusDevice>) -> Result<(), BadRange> {
        let refused = BadRange { base, length };
        let last = length.checked_sub(1).and_then(|l| base.checked_add(l)).ok_or(refused)?;
        let at = self.ranges.partition_point(|range| range.base < base);
        let after = self.ranges.get(at).is_some_and(|next| next.base <= last);
        let before = at > 0 && self.ranges[at - 1].last >= base;
        if after || before {
            return Err(refused);
        }
        self.ranges.insert(at, Range { base, last, width, device });
        Ok(())
    }

    /// Reads `data.len()` bytes from `address`; unclaimed bytes are 0xff.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = address.wrapping_add(done as u64);
            let (length, range) = self.piece(at, data.len() - done);
            let part = &mut data[done..done + length];
            match range {
                Some(range) => range.device.read(at - range.base, part),
                None => part.fill(0xff),
            }
            done += length;
        }
    }

    /// Writes `data` to `address`; bytes nobody claims are lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = address.wrapping_add(done as u64);
            let (length, range) = self.piece(at, data.len() - done);
            if let Some(range) = range {
                range.device.write(at - range.base, &data[done..done + length]);
            }
            done += length;
        }
    }

    /// Whether a device answers at `address`.
    pub fn claims(&self, address: u64) -> bool {
        self.find(address).is_some()
    }

    /// The next piece of an access of `left` bytes at `address`, and who answers it.
    fn piece(&self, address: u64, left: usize) -> (usize, Option<&Range>) {
        let Some(range) = self.find(address) else { return (1, None) };
        let mut length = range.width as usize;
        let room = (range.last - address).saturating_add(1);
        while length > left || length as u64 > room || !address.is_multiple_of(length as u64) {
            length /= 2;
        }
        (length, Some(range))
    }

    fn find(&self, address: u64) -> Option<&Range> {
        let after = self.ranges.partition_point(|range| range.base <= address);
        self.ranges[..after].last().filter(|range| range.last >= address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Notes accesses as (offset, length); reads its offset plus a tag.
    struct Probe {
        tag: u8,
        log: Mutex<Vec<(u64, usize)>>,
    }

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.log.lock().unwrap().push((offset, data.len()));
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = self.tag + offset as u8 + i as u8;
            }
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.log.lock().unwrap().push((offset, data.len()));
        }
    }

    fn probe(tag: u8) -> Arc<Probe> {
        Arc::new(Probe { tag, log: Mutex::default() })
    }

    /// Device width, address (the range is 0x100..0x110), size, and the pieces the device sees.
    type Case = (Width, u64, usize, &'static [(u64, usize)]);

    #[test]
    fn accesses_are_split_as_the_device_needs() {
        use Width::{Byte, Dword, Qword, Word};
        let cases: [Case; 11] = [
            (Byte, 0x100, 1, &[(0, 1)]),
            (Byte, 0x104, 4, &[(4, 1), (5, 1), (6, 1), (7, 1)]),
            (Word, 0x102, 4, &[(2, 2), (4, 2)]),
            (Dword, 0x104, 4, &[(4, 4)]),
            (Dword, 0x105, 4, &[(5, 1), (6, 2), (8, 1)]),
            (Dword, 0x108, 8, &[(8, 4), (12, 4)]),
            (Qword, 0x108, 8, &[(8, 8)]),
            (Qword, 0x104, 8, &[(4, 4), (8, 4)]),
            (Dword, 0x10e, 4, &[(14, 2)]),
            (Dword, 0xfe, 4, &[(0, 2)]),
            (Dword, 0x110, 4, &[]),
        ];
        for (width, address, size, pieces) in cases {
            let device = probe(0);
            let mut bus = Bus::new();
            bus.add(0x100, 0x10, width, device.clone()).unwrap();
            let mut data = [0x55; 8];
            bus.read(address, &mut data[..size]);
            assert_eq!(*device.log.lock().unwrap(), pieces, "{width:?} {address:#x} {size}");
            let expected: Vec<u8> =
                (address..).take(size).map(|a| if (0x100..0x110).contains(&a) { a as u8 } else { 0xff }).collect();
            assert_eq!(data[..size], expected, "{width:?} {address:#x} {size}");
            device.log.lock().unwrap().clear();
            bus.write(address, &data[..size]);
            assert_eq!(*device.log.lock().unwrap(), pieces);
        }
    }

    #[test]
    fn neighbours_share_an_access() {
        let mut bus = Bus::new();
        bus.add(0x60, 1, Width::Byte, probe(0x10)).unwrap();
        bus.add(0x61, 1, Width::Byte, probe(0x20)).unwrap();
        bus.add(0x64, 1, Width::Byte, probe(0x30)).unwrap();
        let mut data = [0; 4];
        bus.read(0x60, &mut data);
        assert_eq!(data, [0x10, 0x20, 0xff, 0xff]);
        bus.read(0x62, &mut data);
        assert_eq!(data, [0xff, 0xff, 0x30, 0xff]);
        assert!(bus.claims(0x64) && !bus.claims(0x63) && !bus.claims(0));
    }

    #[test]
    fn bad_ranges_are_refused() {
        let mut bus = Bus::new();
        bus.add(0x100, 0x10, Width::Byte, probe(0)).unwrap();
        for (base, length) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0xf0, 0x100), (0x105, 2), (0x300, 0), (u64::MAX, 2)]
        {
            assert_eq!(bus.add(base, length, Width::Byte, probe(0)), Err(BadRange { base, length }));
        }
        bus.add(0x110, 1, Width::Byte, probe(0)).unwrap();
        bus.add(0xff, 1, Width::Byte, probe(0)).unwrap();
        bus.add(u64::MAX, 1, Width::Byte, probe(0)).unwrap();
        let mut data = [0; 2];
        bus.read(u64::MAX, &mut data);
        assert_eq!(data, [0, 0xff], "an access past the top wraps");
    }
}
