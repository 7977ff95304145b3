//! The ports and memory that kvm-unit-tests expect of a machine, as QEMU's `pc-testdev` has them: a latch to
//! read back what was written in other widths, lines to raise interrupts by hand, and memory that is a device's.
//!
//! Pure state. What a write of a line does to the interrupt controllers is the machine's.

use crate::state::{BadState, require};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The latch: four ports of one 32-bit register, which any width reads and writes.
pub const LATCH_PORT: u16 = 0xe0;
/// A write makes the host's mapping of the guest page at that address go and come back, in QEMU. A guest cannot
/// tell, so that here nothing happens. Four ports.
pub const FLUSH_PORT: u16 = 0xe4;
/// The latch's bytes again, for accesses of one byte. Four ports.
pub const BYTES_PORT: u16 = 0xe8;
/// Interrupt lines: a write to port n sets line n, to low if the value is 0.
pub const LINES_PORT: u16 = 0x2000;
/// Lines: what an I/O APIC has pins for.
pub const LINES: u16 = 24;
/// Where the memory is, by guest-physical address, and its size in bytes.
pub const MEMORY: u64 = 0xff00_0000;
pub const MEMORY_SIZE: u64 = 0x1_0000;

/// The test device's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestDevice {
    latch: [u8; 4],
    #[serde(serialize_with = "write_memory", deserialize_with = "read_memory")]
    memory: Vec<u8>,
}

impl Default for TestDevice {
    fn default() -> TestDevice {
        TestDevice { latch: [0; 4], memory: vec![0; MEMORY_SIZE as usize] }
    }
}

impl TestDevice {
    pub fn new() -> TestDevice {
        TestDevice::default()
    }

    /// Reads from the latch at `offset` on; bytes beyond it are 0xff.
    pub fn read_latch(&self, offset: u16, data: &mut [u8]) {
        read(&self.latch, offset.into(), data);
    }

    /// Writes to the latch; bytes beyond it are lost.
    pub fn write_latch(&mut self, offset: u16, data: &[u8]) {
        write(&mut self.latch, offset.into(), data);
    }

    /// Reads the memory at `offset` on; bytes beyond it are 0xff.
    pub fn read_memory(&self, offset: u64, data: &mut [u8]) {
        read(&self.memory, offset, data);
    }

    /// Writes to the memory; bytes beyond it are lost.
    pub fn write_memory(&mut self, offset: u64, data: &[u8]) {
        write(&mut self.memory, offset, data);
    }

    /// Refuses a restored state that cannot be.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), BadState> {
        require("test device", &[(self.memory.len() as u64 == MEMORY_SIZE, "its memory has another size")])
    }
}

fn read(bytes: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset..).zip(data) {
        *byte = bytes.get(at as usize).copied().unwrap_or(0xff);
    }
}

fn write(bytes: &mut [u8], offset: u64, data: &[u8]) {
    for (at, byte) in (offset..).zip(data) {
        if let Some(place) = bytes.get_mut(at as usize) {
            *place = *byte;
        }
    }
}

/// The memory in hexadecimal digits, without the zeros at its end: in most machines, nothing.
fn write_memory<S: Serializer>(memory: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    let used = memory.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let text: String = memory[..used].iter().map(|byte| format!("{byte:02x}")).collect();
    serializer.serialize_str(&text)
}

fn read_memory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    use serde::de::Error;
    let text = String::deserialize(deserializer)?;
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0 && digits.len() as u64 <= 2 * MEMORY_SIZE);
    let digits = digits.ok_or_else(|| D::Error::custom("not the test device's memory in hexadecimal digits"))?;
    let mut memory: Vec<u8> = digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    memory.resize(MEMORY_SIZE as usize, 0);
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latch_holds_what_any_width_wrote() {
        let mut device = TestDevice::new();
        device.write_latch(0, &[1, 2, 3, 4]);
        device.write_latch(2, &[9]);
        let mut data = [0; 4];
        device.read_latch(0, &mut data);
        assert_eq!(data, [1, 2, 9, 4]);
        device.write_latch(3, &[7, 7]);
        device.read_latch(2, &mut data);
        assert_eq!(data, [9, 7, 0xff, 0xff]);
    }

    #[test]
    fn memory_is_kept_and_saved() {
        let mut device = TestDevice::new();
        device.write_memory(0x100, &[1, 2, 3, 4, 5, 6, 7, 8]);
        device.write_memory(MEMORY_SIZE - 1, &[1, 2]);
        let text = serde_json::to_string(&device).unwrap();
        let mut back: TestDevice = serde_json::from_str(&text).unwrap();
        back.check().unwrap();
        let mut data = [0; 3];
        back.read_memory(0x101, &mut data);
        assert_eq!(data, [2, 3, 4]);
        back.read_memory(MEMORY_SIZE - 1, &mut data);
        assert_eq!(data, [1, 0xff, 0xff]);
        assert!(serde_json::from_str::<TestDevice>(r#"{"latch":[0,0,0,0],"memory":"0"}"#).is_err());
        let long = format!(r#"{{"latch":[0,0,0,0],"memory":"{}"}}"#, "00".repeat(MEMORY_SIZE as usize + 1));
        assert!(serde_json::from_str::<TestDevice>(&long).is_err());
        back.memory.pop();
        assert!(back.check().is_err());
    }
}
