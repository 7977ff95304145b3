//! Message-signalled interrupts (SDM vol. 3A 10.11).

/// One message: what a device or the IO-APIC writes to 0xfee0_0000 and up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Msi {
    /// Address: bits 19:12 destination ID, bit 3 redirection hint, bit 2 destination mode (1 = logical).
    /// With the KVM extended-destination-ID convention bits 11:5 carry destination bits 14:8.
    pub address: u64,
    /// Data: bits 7:0 vector, 10:8 delivery mode, bit 14 level (1 = assert), bit 15 trigger mode (1 = level).
    pub data: u32,
}

/// Delivery modes (SDM vol. 3A 10.6.1); the encodings of the ICR, LVT, IO-APIC and MSI data alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Nmi,
    Init,
    StartUp,
    ExtInt,
}

impl DeliveryMode {
    /// From the three-bit encoding; 3 is reserved.
    pub fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

impl Msi {
    pub fn vector(&self) -> u8 {
        self.data as u8
    }
    pub fn delivery_mode(&self) -> Option<DeliveryMode> {
        DeliveryMode::from_bits(self.data >> 8)
    }
    pub fn is_level(&self) -> bool {
        self.data & (1 << 15) != 0
    }
    pub fn is_logical(&self) -> bool {
        self.address & (1 << 2) != 0
    }
    /// APIC destination: 8 bits, with bits 14:8 from address bits 11:5.
    pub fn destination(&self) -> u32 {
        ((self.address >> 12) & 0xff) as u32 | (((self.address >> 5) & 0x7f) << 8) as u32
    }
}
