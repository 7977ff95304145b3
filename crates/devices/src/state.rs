//! Chips in snapshots: a chip is plain data, so its state is the chip itself, serialized.
//!
//! What comes back from a snapshot is untrusted. Deserializing checks types only; each chip's `check` then
//! refuses what no guest could have made of it and the chip's code relies on not to see. A chip that has not
//! been checked must not be used.

use serde::{Deserialize, Deserializer, Serializer};

/// A chip's saved state that cannot be: which chip, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{chip}: {what}")]
pub struct BadState {
    pub chip: &'static str,
    pub what: &'static str,
}

/// Guest time at which a restored chip can be at most, in nanoseconds: 146 years. Chips add to it freely.
pub const LATEST: u64 = 1 << 62;

/// Makes a `check` of conditions that must hold, by what is wrong otherwise.
pub(crate) fn require(chip: &'static str, conditions: &[(bool, &'static str)]) -> Result<(), BadState> {
    match conditions.iter().find(|(holds, _)| !holds) {
        Some(&(_, what)) => Err(BadState { chip, what }),
        None => Ok(()),
    }
}

/// Bytes as one string of hexadecimal digits, for `#[serde(with = "...")]` on arrays.
pub mod hex {
    use super::{Deserialize, Deserializer, Serializer};
    use serde::de::Error;

    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&text)
    }

    /// # Errors
    /// The text is not twice as many digits as there are bytes.
    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize>(deserializer: D) -> Result<[u8; N], D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        let digits = digits.filter(|digits| digits.len() == 2 * N);
        let digits = digits.ok_or_else(|| D::Error::custom(format!("not {N} bytes in hexadecimal digits")))?;
        let mut bytes = [0; N];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(bytes)
    }
}
