//! Segment registers with their hidden part, and descriptors (SDM vol. 3A 3.4).

/// Indices of segment registers in encodings (SDM vol. 2A table B-8).
pub mod index {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// A segment register: selector, base, limit in bytes, and attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    /// Last valid offset, in bytes (granularity already applied).
    pub limit: u32,
    /// Descriptor bits 55:52 and 47:40 as in VMX access rights (SDM vol. 3C table 25-2):
    /// type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
    pub attributes: u32,
    pub selector: u16,
}

/// Bits of [`Segment::attributes`].
pub mod attr {
    pub const TYPE: u32 = 0xf;
    pub const ACCESSED: u32 = 1 << 0;
    /// Data: writable. Code: readable.
    pub const WRITABLE: u32 = 1 << 1;
    /// Data: expand-down. Code: conforming.
    pub const EXPAND_DOWN: u32 = 1 << 2;
    pub const CODE: u32 = 1 << 3;
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

impl Segment {
    pub fn dpl(&self) -> u8 {
        ((self.attributes >> attr::DPL_SHIFT) & 3) as u8
    }
    pub fn is_long(&self) -> bool {
        self.attributes & attr::L != 0
    }
    pub fn is_default_32(&self) -> bool {
        self.attributes & attr::DB != 0
    }
    pub fn is_usable(&self) -> bool {
        self.attributes & attr::UNUSABLE == 0
    }

    /// The hidden part that a load of `descriptor` (8 bytes of the GDT or LDT) puts behind `selector`.
    /// System descriptors of 16 bytes add their upper half to `base` (SDM vol. 3A 3.5).
    pub fn from_descriptor(selector: u16, descriptor: u64) -> Segment {
        let d = descriptor;
        let base = ((d >> 16) & 0xff_ffff) | ((d >> 32) & 0xff00_0000);
        let mut limit = ((d & 0xffff) | ((d >> 32) & 0xf_0000)) as u32;
        let attributes = ((d >> 40) & 0xf0ff) as u32;
        if attributes & attr::G != 0 {
            limit = (limit << 12) | 0xfff;
        }
        Segment { base, limit, attributes, selector }
    }

    /// A flat segment as real mode has after reset: base 16 × selector, limit 0xffff.
    pub fn real_mode(selector: u16, code: bool) -> Segment {
        let kind = if code { attr::CODE } else { 0 } | attr::WRITABLE | attr::ACCESSED;
        Segment { base: u64::from(selector) << 4, limit: 0xffff, attributes: kind | attr::S | attr::P, selector }
    }

    /// A null selector's hidden part.
    pub fn unusable(selector: u16) -> Segment {
        Segment { base: 0, limit: 0, attributes: attr::UNUSABLE, selector }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(C)]
pub struct DescriptorTable {
    pub base: u64,
    /// Last valid byte's offset.
    pub limit: u16,
}
