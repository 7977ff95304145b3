//! kvmclock (Linux Documentation/virt/kvm/x86/msr.rst): guest time without a trap. The guest registers a
//! structure that says how to turn TSC ticks into nanoseconds.
//!
//! All vCPUs get the same pair of reference values, the VM's start, so time is the same on all and the
//! TSC_STABLE flag is true.

use crate::core::{Core, VmShared};
use anyvisor_engine::GuestIo;
use std::time::SystemTime;

/// Bit 0 of MSR_KVM_SYSTEM_TIME_NEW.
const ENABLE: u64 = 1;
const FLAG_TSC_STABLE: u8 = 1;

/// `ns = ((ticks << shift) * multiplier) >> 32`, with a negative shift to the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    pub multiplier: u32,
    pub shift: i8,
}

impl TscScale {
    /// For a TSC of `khz`, which is not zero. The multiplier has its top bit set, for the best precision.
    pub fn new(khz: u64) -> TscScale {
        assert!(khz != 0, "the TSC has a frequency");
        let hz = u128::from(khz) * 1000;
        let mut shift = 0i8;
        // multiplier = 10^9 * 2^(32 - shift) / hz, wanted in 2^31 .. 2^32.
        let scaled = |shift: i8| ((1_000_000_000u128 << (64 - i32::from(shift))) / hz) >> 32;
        while scaled(shift) >> 32 != 0 {
            shift += 1;
        }
        while scaled(shift) >> 31 == 0 {
            shift -= 1;
        }
        TscScale { multiplier: scaled(shift) as u32, shift }
    }

    /// Nanoseconds in `ticks`.
    pub fn to_ns(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let shifted = if self.shift >= 0 { ticks << self.shift } else { ticks >> -self.shift };
        ((shifted * u128::from(self.multiplier)) >> 32) as u64
    }
}

/// Takes a write of MSR_KVM_SYSTEM_TIME_NEW: fills the vCPU's structure, if the write enables it.
pub(super) fn set_system_time(core: &mut Core, io: &dyn GuestIo, value: u64) {
    core.clock.system_time_msr = value;
    if value & ENABLE == 0 {
        return;
    }
    let gpa = value & !ENABLE & physical_mask(core);
    let scale = TscScale::new(core.vm.tsc_khz);
    let tsc = core.vm.tsc_started.wrapping_add(core.cpu.tsc_offset);
    // struct pvclock_vcpu_time_info: version, pad, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift,
    // flags, pad. An odd version says that an update is under way.
    let mut data = [0u8; 32];
    data[0..4].copy_from_slice(&1u32.to_le_bytes());
    data[8..16].copy_from_slice(&tsc.to_le_bytes());
    data[16..24].copy_from_slice(&0u64.to_le_bytes());
    data[24..28].copy_from_slice(&scale.multiplier.to_le_bytes());
    data[28] = scale.shift as u8;
    data[29] = FLAG_TSC_STABLE;
    core.write_physical(io, gpa, &data);
    core.write_physical(io, gpa, &2u32.to_le_bytes());
}

/// Takes a write of MSR_KVM_WALL_CLOCK_NEW: the time of day at the VM's start.
pub(super) fn set_wall_clock(core: &mut Core, io: &dyn GuestIo, value: u64) {
    core.clock.wall_clock_msr = value;
    let (seconds, nanoseconds) = started_at(&core.vm);
    let mut data = [0u8; 12];
    data[0..4].copy_from_slice(&2u32.to_le_bytes());
    data[4..8].copy_from_slice(&seconds.to_le_bytes());
    data[8..12].copy_from_slice(&nanoseconds.to_le_bytes());
    let gpa = value & physical_mask(core);
    core.write_physical(io, gpa, &data);
}

fn physical_mask(core: &Core) -> u64 {
    (1 << core.physical_bits) - 1
}

/// The time of day when guest time was zero.
fn started_at(vm: &VmShared) -> (u32, u32) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let started = now.saturating_sub(vm.started.elapsed());
    (started.as_secs() as u32, started.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::TscScale;

    #[test]
    fn scales_ticks_exactly_enough() {
        for khz in [1_000, 999_999, 1_000_000, 1_000_001, 2_300_000, 3_700_123, 8_000_000] {
            let scale = TscScale::new(khz);
            assert!(scale.multiplier >> 31 == 1, "{scale:?}");
            let hour = scale.to_ns(khz * 1000 * 3600);
            assert!(hour.abs_diff(3_600_000_000_000) < 20_000, "{khz} kHz: {hour} {scale:?}");
        }
    }
}
