//! Exceptions (SDM vol. 3A 6.3, 6.15): vector, error code, and what a page fault leaves in CR2.

/// Exception vectors.
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// Page-fault error code bits (SDM vol. 3A 4.7).
pub mod pf {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
    /// A protection key forbids it.
    pub const KEY: u32 = 1 << 5;
}

/// An exception raised by a guest instruction, not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exception {
    pub vector: u8,
    /// The error code pushed on the handler's stack, for the vectors that have one.
    pub error_code: Option<u32>,
    /// For #PF, the linear address that goes to CR2 on delivery; for #DB, the bits that go to DR6.
    pub payload: u64,
}

impl Exception {
    pub const fn new(vector: u8) -> Self {
        Exception { vector, error_code: None, payload: 0 }
    }
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Exception { vector, error_code: Some(code), payload: 0 }
    }
    /// #GP with error code `code`: zero, or the selector concerned without its RPL.
    pub const fn gp(code: u32) -> Self {
        Self::with_code(vector::GP, code)
    }
    pub const fn ss(code: u32) -> Self {
        Self::with_code(vector::SS, code)
    }
    pub const fn np(code: u32) -> Self {
        Self::with_code(vector::NP, code)
    }
    pub const fn ts(code: u32) -> Self {
        Self::with_code(vector::TS, code)
    }
    pub const fn ud() -> Self {
        Self::new(vector::UD)
    }
    pub const fn nm() -> Self {
        Self::new(vector::NM)
    }
    pub const fn de() -> Self {
        Self::new(vector::DE)
    }
    /// #DB; `dr6` holds the status bits (BS, BD, B0–B3) that its delivery sets in DR6.
    pub const fn db(dr6: u64) -> Self {
        Exception { vector: vector::DB, error_code: None, payload: dr6 }
    }
    /// #PF at linear address `address` with error code bits from [`pf`].
    pub const fn page_fault(address: u64, code: u32) -> Self {
        Exception { vector: vector::PF, error_code: Some(code), payload: address }
    }

    /// Whether it counts as contributory in the double-fault rules (SDM vol. 3A table 6-4).
    pub fn is_contributory(vector: u8) -> bool {
        matches!(vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
    }
}
