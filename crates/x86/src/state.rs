//! The whole architectural state of one vCPU: debug dump, snapshot payload and test oracle.

use crate::exception::Exception;
use crate::segment::{DescriptorTable, Segment};
use serde::{Deserialize, Serialize};

/// Segment registers by encoding index (ES, CS, SS, DS, FS, GS), then LDTR and TR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segments {
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
}

/// Whether a vCPU executes, and why not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    #[default]
    Running,
    /// After HLT, until an interrupt.
    Halted,
    /// An application processor after INIT, until a start-up IPI.
    WaitForSipi,
}

/// Events that are neither registers nor LAPIC contents (SDM vol. 3C 25.4.2 lists the same).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PendingEvents {
    /// Raised but not yet delivered.
    pub exception: Option<Exception>,
    /// An NMI that waits.
    pub nmi_pending: bool,
    /// Between an NMI's delivery and the next IRET.
    pub nmi_blocked: bool,
    /// The next instruction boundary accepts no interrupt: after STI (bit 0) or MOV SS/POP SS (bit 1).
    pub interrupt_shadow: u8,
    /// The vector of an interrupt that the 8259 has been asked for and that is not delivered yet. One from the
    /// local APIC is still in IRR.
    #[serde(default)]
    pub interrupt: Option<u8>,
}

/// Architectural state of one vCPU at an instruction boundary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// General registers in encoding order (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15).
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub segments: Segments,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// DR0–DR3, then DR6 and DR7 at their own indices; 4 and 5 stay zero.
    pub dr: [u64; 8],
    pub xcr0: u64,
    /// MSRs by number, those of [`crate::msr::SAVED`] and no others. FS and GS bases live in `segments`.
    pub msrs: Vec<(u32, u64)>,
    /// XSAVE area in the standard format (SDM vol. 1 13.4), components by `xcr0`; PKRU whatever `xcr0` says.
    pub xsave: Vec<u8>,
    /// The local APIC's register page, a u32 at each multiple of 16 bytes (SDM vol. 3A table 10-1), 1 KiB.
    pub lapic: Vec<u8>,
    pub activity: Activity,
    pub events: PendingEvents,
}

impl VcpuState {
    /// State after RESET of processor `apic_id` (SDM vol. 3A table 9-1). The bootstrap processor (0) runs
    /// at the reset vector, others wait for a start-up IPI. `xsave` is the initial FPU configuration;
    /// `lapic` is empty, which `set_state` reads as a reset local APIC.
    pub fn reset(apic_id: u32, signature: u32) -> VcpuState {
        use crate::bits::{cr0, dr, rflags, xcr0};
        use crate::segment::attr;
        let data = Segment::real_mode(0, false);
        let mut code = Segment::real_mode(0xf000, true);
        code.base = 0xffff_0000;
        let table = Segment { limit: 0xffff, attributes: attr::P | 2, ..Segment::default() };
        let task = Segment { limit: 0xffff, attributes: attr::P | 0xb, ..Segment::default() };
        let mut state = VcpuState {
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segments: Segments { seg: [data, code, data, data, data, data], ldtr: table, tr: task },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: cr0::ET | cr0::NW | cr0::CD,
            xcr0: xcr0::X87,
            xsave: initial_xsave(),
            activity: if apic_id == 0 { Activity::Running } else { Activity::WaitForSipi },
            ..VcpuState::default()
        };
        state.gpr[crate::bits::gpr::RDX] = u64::from(signature);
        state.dr[6] = dr::DR6_FIXED;
        state.dr[7] = dr::DR7_FIXED;
        state
    }

    /// The value of an MSR in `msrs`, if there.
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|(i, _)| *i == index).map(|(_, v)| *v)
    }

    /// Sets or adds an MSR in `msrs`.
    pub fn set_msr(&mut self, index: u32, value: u64) {
        match self.msrs.iter_mut().find(|(i, _)| *i == index) {
            Some(entry) => entry.1 = value,
            None => self.msrs.push((index, value)),
        }
    }
}

/// Size of the XSAVE area for x87, SSE and AVX in bytes.
pub const XSAVE_SIZE: usize = 832;

/// Where vCPUs with protection keys have PKRU in the XSAVE area, and the size of that component, in bytes.
pub const PKRU_OFFSET: usize = XSAVE_SIZE;
pub const PKRU_SIZE: usize = 8;

/// An XSAVE area in its initial configuration (SDM vol. 1 13.6): FCW 0x37f, MXCSR 0x1f80.
pub fn initial_xsave() -> Vec<u8> {
    let mut area = vec![0; XSAVE_SIZE];
    area[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area
}
