//! Random numbers (SplitMix64) and the values that break instructions: carries, signs, infinities.
//!
//! Everything a case holds comes from one 64-bit seed, so that a seed names a case for ever.

/// A seeded generator; the same seed gives the same numbers on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`; `bound` must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.word()) * u128::from(bound)) >> 64) as u64
    }

    /// True in `percent` of 100 cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// A general-register value: small, a power of two and its neighbours, a sign boundary, or random.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(16),
            1 => self.below(16).wrapping_neg(),
            2 => (1u64 << self.below(64)).wrapping_add(self.below(3)).wrapping_sub(1),
            3 => self.pick(&EDGES),
            4 => self.word() & 0xffff_ffff,
            5 => self.word() >> self.below(64),
            _ => self.word(),
        }
    }

    /// Eight bytes for a vector register or memory: integers, doubles, pairs of floats, text-like bytes.
    pub fn lane(&mut self) -> u64 {
        match self.below(8) {
            0 => self.integer(),
            1 => self.pick(&DOUBLES),
            2 => u64::from(self.pick(&FLOATS)) | u64::from(self.pick(&FLOATS)) << 32,
            3 => (self.word() & 0x800f_ffff_ffff_ffff) | (0x3f0 + self.below(32)) << 52,
            4 => (self.word() & 0x807f_ffff_807f_ffff) | ((0x3f80_0000 + (self.below(8) << 23)) * 0x1_0000_0001),
            5 => u64::from_ne_bytes([self.below(4) as u8; 8]) ^ (self.word() & 0x0101_0101_0101_0101),
            _ => self.word(),
        }
    }

    pub fn ymm(&mut self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.lane().to_le_bytes());
        }
        bytes
    }

    /// An 80-bit x87 value: numbers of every class, the invalid encodings included (SDM vol. 1 table 8-3).
    pub fn extended(&mut self) -> [u8; 10] {
        let (exponent, mantissa) = match self.below(10) {
            0 => (0, 0),
            1 => (0x3fff, 1 << 63),
            2 => (0x7fff, 1 << 63),
            3 => (0x7fff, 0xc000_0000_0000_0000 | self.word() >> 2),
            4 => (0x7fff, 0x8000_0000_0000_0000 | self.word() >> 2),
            5 => (0, self.word() >> 1),
            6 => (self.word() & 0x7fff, self.word()),
            7 => (0x3fff + self.below(70), (1 << 63) | self.word()),
            8 => (0x403e - self.below(64), (1 << 63) | self.below(1000) << 50),
            _ => (0x3ff0 + self.below(32), (1 << 63) | self.word()),
        };
        let top = (exponent | self.below(2) << 15) as u16;
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&top.to_le_bytes());
        bytes
    }
}

const EDGES: [u64; 20] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
    0xffff_ffff_8000_0000,
    0xffff_ffff_7fff_ffff,
    0x5555_5555_5555_5555,
    0xaaaa_aaaa_aaaa_aaaa,
    0x0f0f_0f0f_0f0f_0f0f,
];

/// Doubles: zeros, ones, infinities, NaNs (quiet and signalling), denormals, extremes, integer limits.
const DOUBLES: [u64; 18] = [
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x4000_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0x7ff4_0000_0000_0001,
    0xfff8_0000_0000_0001,
    0x0000_0000_0000_0001,
    0x000f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0020_0000,
    0x43e0_0000_0000_0000,
];

const FLOATS: [u32; 16] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x4000_0000,
    0x3f00_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7fa0_0001,
    0x0000_0001,
    0x007f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0x4f00_0000,
    0x5f00_0000,
];
