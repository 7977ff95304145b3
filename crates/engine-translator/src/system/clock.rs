//! kvmclock (Linux Documentation/virt/kvm/x86/msr.rst): guest time without a trap. The guest registers a
//! structure that says how to turn TSC ticks into nanoseconds.
//!
//! All vCPUs get the same pair of reference values ([`ClockReference`]: the VM's start, or the moment at which
//! the clock was set), so time is the same on all and the TSC_STABLE flag is true.

use crate::core::{ClockReference, Core, VmShared};
use crate::host;
use anyvisor_engine::GuestIo;
use std::time::{Duration, SystemTime};

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
    publish(core, io);
}

/// Fills the vCPU's structure again if what it says has changed since: the VM's clock was set, or the vCPU
/// was given another state.
pub fn refresh_system_time(core: &mut Core, io: &dyn GuestIo) {
    let reference = *core.vm.clock.lock().unwrap();
    if core.clock.published != Some((reference, core.cpu.tsc_offset)) {
        publish(core, io);
    }
}

fn publish(core: &mut Core, io: &dyn GuestIo) {
    let value = core.clock.system_time_msr;
    if value & ENABLE == 0 {
        return;
    }
    let reference = *core.vm.clock.lock().unwrap();
    core.clock.published = Some((reference, core.cpu.tsc_offset));
    let gpa = value & !ENABLE & physical_mask(core);
    // struct pvclock_vcpu_time_info: version, pad, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift,
    // flags, pad. An odd version says that an update is under way; a guest that was stopped while it read the
    // structure must see that the version has moved on.
    let mut old = [0u8; 4];
    core.read_physical(io, gpa, &mut old);
    let updating = u32::from_le_bytes(old).wrapping_add(1) | 1;
    core.write_physical(io, gpa, &updating.to_le_bytes());
    let scale = TscScale::new(core.vm.tsc_khz);
    let tsc = reference.tsc.wrapping_add(core.cpu.tsc_offset);
    let mut data = [0u8; 24];
    data[0..8].copy_from_slice(&tsc.to_le_bytes());
    data[8..16].copy_from_slice(&reference.ns.to_le_bytes());
    data[16..20].copy_from_slice(&scale.multiplier.to_le_bytes());
    data[20] = scale.shift as u8;
    data[21] = FLAG_TSC_STABLE;
    core.write_physical(io, gpa.wrapping_add(8), &data);
    core.write_physical(io, gpa, &updating.wrapping_add(1).to_le_bytes());
}

impl VmShared {
    /// Guest time in nanoseconds when the host's TSC is `tsc`, by the same arithmetic as the guest's.
    pub fn clock_at(&self, tsc: u64) -> u64 {
        let ClockReference { tsc: since, ns } = *self.clock.lock().unwrap();
        ns.wrapping_add(TscScale::new(self.tsc_khz).to_ns(tsc.wrapping_sub(since)))
    }
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
    let started = now.saturating_sub(Duration::from_nanos(vm.clock_at(host::tsc())));
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
