//! MSI-X: a function's table of interrupt messages (PCI 3.0, 6.8.2).
//!
//! A function fires a vector; while that is masked, alone or with all, its bit waits in the pending array and the
//! message goes out when the mask does. Who owns a table maps [`Msix::read`] and [`Msix::write`] into a BAR, puts
//! the capability into configuration space, and passes the control word on.

use super::config::ConfigSpace;
use crate::state::{BadState, require};
use anyvisor_x86::Msi;
use serde::{Deserialize, Serialize};

const CAPABILITY: u8 = 0x11;
/// Message control: bit 15 enables, bit 14 masks all vectors.
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// Dwords of a table entry: address, upper address, data, control.
const ENTRY: usize = 4;
const MASKED: u32 = 1;
/// Most vectors that this model has: the pending array is one word.
pub const VECTORS_MAX: u16 = 64;

/// Table, pending array, and the writable bits of the capability's control word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msix {
    table: Vec<u32>,
    pending: u64,
    control: u16,
}

impl Msix {
    /// As after reset, with `vectors` (1 to [`VECTORS_MAX`]).
    pub fn new(vectors: u16) -> Msix {
        assert!((1..=VECTORS_MAX).contains(&vectors), "{vectors} vectors");
        let table = [0, 0, 0, MASKED].repeat(vectors.into());
        Msix { table, pending: 0, control: 0 }
    }

    pub fn vectors(&self) -> u16 {
        (self.table.len() / ENTRY) as u16
    }

    /// Puts the capability into `config`: table and pending array are in BAR `bar`, at these offsets. Returns where
    /// its control word is.
    pub fn add_capability(&self, config: &mut ConfigSpace, bar: u8, table: u32, pending: u32) -> u16 {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(ENABLE | MASK_ALL).to_le_bytes());
        config.add_capability(CAPABILITY, &body, &writable) + 2
    }

    /// Whether messages are used instead of the interrupt pin.
    pub fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// The guest has written the control word. Returns the messages that waited for it.
    pub fn set_control(&mut self, control: u16) -> Vec<Msi> {
        self.control = control & (ENABLE | MASK_ALL);
        self.release()
    }

    /// Fires `vector`: the message to send now, if any. A vector that does not exist is none.
    pub fn fire(&mut self, vector: u16) -> Option<Msi> {
        if vector >= self.vectors() || !self.is_enabled() {
            return None;
        }
        if self.is_masked(vector) {
            self.pending |= 1 << vector;
            return None;
        }
        self.message(vector)
    }

    /// Reads at `offset` into the table; all ones beyond.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let dword = usize::try_from(at / 4).ok().and_then(|n| self.table.get(n));
            *byte = dword.map_or(0xff, |dword| dword.to_le_bytes()[(at % 4) as usize]);
        }
    }

    /// Reads at `offset` into the pending array; zeros beyond.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.pending.to_le_bytes().get(at as usize).copied().unwrap_or(0);
        }
    }

    /// Writes at `offset` into the table. Returns the messages that waited for it.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Vec<Msi> {
        for (at, &byte) in (offset..).zip(data) {
            let Some(dword) = usize::try_from(at / 4).ok().and_then(|n| self.table.get_mut(n)) else { break };
            let mut bytes = dword.to_le_bytes();
            bytes[(at % 4) as usize] = byte;
            *dword = u32::from_le_bytes(bytes);
            if at / 4 % 4 == 3 {
                *dword &= MASKED;
            }
        }
        self.release()
    }

    /// Refuses what no guest can have made of a table with `vectors`.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, vectors: u16) -> Result<(), BadState> {
        let size = self.table.len() == usize::from(vectors) * ENTRY;
        require(
            "MSI-X",
            &[
                (size, "another number of vectors"),
                (self.table.iter().skip(3).step_by(ENTRY).all(|control| control & !MASKED == 0), "undefined bits"),
                (self.control & !(ENABLE | MASK_ALL) == 0, "undefined control bits"),
                (vectors == VECTORS_MAX || self.pending >> vectors == 0, "more pending than vectors"),
            ],
        )
    }

    fn is_masked(&self, vector: u16) -> bool {
        self.control & MASK_ALL != 0 || self.table[usize::from(vector) * ENTRY + 3] & MASKED != 0
    }

    /// The message of `vector`. A guest that has it sent to anything but local APICs gets none.
    fn message(&self, vector: u16) -> Option<Msi> {
        let entry = &self.table[usize::from(vector) * ENTRY..][..ENTRY];
        let address = u64::from(entry[1]) << 32 | u64::from(entry[0]);
        (address >> 20 == 0xfee).then_some(Msi { address, data: entry[2] })
    }

    /// Takes what is pending and no longer masked.
    fn release(&mut self) -> Vec<Msi> {
        if !self.is_enabled() || self.pending == 0 {
            return Vec::new();
        }
        let ready = (0..self.vectors()).filter(|&vector| self.pending >> vector & 1 != 0 && !self.is_masked(vector));
        let ready: Vec<u16> = ready.collect();
        for vector in &ready {
            self.pending &= !(1 << vector);
        }
        ready.into_iter().filter_map(|vector| self.message(vector)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(msix: &mut Msix, vector: u64, dword: u64, value: u32) -> Vec<Msi> {
        msix.write(16 * vector + 4 * dword, &value.to_le_bytes())
    }

    #[test]
    fn messages_wait_while_masked() {
        let mut msix = Msix::new(3);
        let message = Msi { address: 0xfee0_1000, data: 0x4041 };
        assert_eq!(msix.fire(1), None, "not enabled");
        assert_eq!(msix.set_control(!MASK_ALL), []);
        put(&mut msix, 1, 0, message.address as u32);
        put(&mut msix, 1, 2, message.data);
        assert_eq!(msix.fire(1), None, "masked from the start");
        assert_eq!(put(&mut msix, 1, 3, 0), [message]);
        assert_eq!(msix.fire(1), Some(message));
        assert_eq!(msix.set_control(ENABLE | MASK_ALL), []);
        assert_eq!((msix.fire(1), msix.fire(1)), (None, None));
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(msix.set_control(ENABLE), [message], "once");
        assert_eq!(msix.set_control(ENABLE), []);
        assert_eq!((msix.fire(3), msix.fire(0xffff)), (None, None), "there is none");
    }

    #[test]
    fn only_local_apics_get_messages() {
        let mut msix = Msix::new(1);
        msix.set_control(ENABLE);
        put(&mut msix, 0, 3, 0);
        for (low, high, reaches) in [(0xfee0_0000, 0, true), (0x1000, 0, false), (0xfee0_0000, 1, false)] {
            put(&mut msix, 0, 0, low);
            put(&mut msix, 0, 1, high);
            assert_eq!(msix.fire(0).is_some(), reaches, "{high:x}:{low:x}");
        }
    }

    #[test]
    fn the_table_is_memory_with_reserved_bits() {
        let mut msix = Msix::new(2);
        let mut data = [0; 16];
        msix.read(16, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        msix.write(16, &[0xff; 32]);
        msix.read(16, &mut data);
        assert_eq!(data, [255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0]);
        let mut beyond = [0; 4];
        msix.read(32, &mut beyond);
        assert_eq!(beyond, [0xff; 4]);
        assert!(msix.check(2).is_ok() && msix.check(1).is_err());
        assert!(Msix { pending: 4, ..msix.clone() }.check(2).is_err());
        assert!(Msix { control: 1, ..msix }.check(2).is_err());
    }

    #[test]
    fn the_capability_tells_where_things_are() {
        let mut config = super::super::config::tests::space();
        let at = Msix::new(2).add_capability(&mut config, 1, 0, 0x800);
        let mut data = [0; 12];
        config.read(at - 2, &mut data);
        assert_eq!(data, [0x11, 0, 1, 0, 1, 0, 0, 0, 1, 8, 0, 0]);
        config.write(at, &[0xff; 10]);
        config.read(at - 2, &mut data);
        assert_eq!(data, [0x11, 0, 1, 0xc0, 1, 0, 0, 0, 1, 8, 0, 0]);
    }
}
