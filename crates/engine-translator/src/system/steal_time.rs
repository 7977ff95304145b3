//! KVM's steal time (Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME): a structure of the guest's says how long
//! the vCPU wanted to run and could not, and whether it is running.
//!
//! Other vCPUs look at the latter before they spin for this one, and ask there for a TLB flush ([`FLUSH_TLB`]) instead of
//! interrupting a processor that does not run. What is known here is only that a vCPU is halted; one whose thread the host
//! has taken the CPU from counts as running.

use crate::core::Core;
use crate::host;
use anyvisor_engine::GuestIo;

/// Bits of the MSR: it is in use; reserved ones.
const ENABLE: u64 = 1;
pub const RESERVED: u64 = 0x3e;
/// `struct kvm_steal_time`: nanoseconds, an even version when they are whole, whether the vCPU is not running.
const STEAL: u64 = 0;
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;
/// Bits of the last: it is not running; its TLB is to be flushed before it does.
const NOT_RUNNING: u8 = 1;
const FLUSH_TLB: u8 = 2;
/// Nanoseconds after which the structure is brought up to date, if the vCPU leaves translated code at all.
const PERIOD: u64 = 1_000_000;

/// What a vCPU knows of its steal time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StealTime {
    /// MSR_KVM_STEAL_TIME as written.
    pub msr: u64,
    /// Guest time, and the CPU time of the vCPU's thread, up to which steal time has been counted; in nanoseconds.
    counted: u64,
    used: u64,
}

impl StealTime {
    /// Where the structure is.
    fn address(&self) -> Option<u64> {
        (self.msr & ENABLE != 0).then_some(self.msr & !(ENABLE | RESERVED))
    }
}

/// Takes a write of MSR_KVM_STEAL_TIME, without reserved bits.
pub(super) fn set(core: &mut Core, io: &dyn GuestIo, value: u64) {
    core.steal_time.msr = value;
    go_on(core);
    publish(core, io);
}

/// The vCPU runs from now on: what was before is not counted.
pub fn go_on(core: &mut Core) {
    if core.steal_time.address().is_some() {
        (core.steal_time.counted, core.steal_time.used) = (core.now_ns(), host::thread_time());
    }
}

/// Brings the structure up to date now and then.
pub fn refresh(core: &mut Core, io: &dyn GuestIo) {
    if core.steal_time.address().is_some() && core.now_ns() >= core.steal_time.counted + PERIOD {
        publish(core, io);
    }
}

fn publish(core: &mut Core, io: &dyn GuestIo) {
    let Some(gpa) = core.steal_time.address() else { return };
    let (now, used) = (core.now_ns(), host::thread_time());
    let steal_time = &mut core.steal_time;
    let passed = now.saturating_sub(std::mem::replace(&mut steal_time.counted, now));
    let stolen = passed.saturating_sub(used.saturating_sub(std::mem::replace(&mut steal_time.used, used)));
    let (mut steal, mut version) = ([0; 8], [0; 4]);
    core.read_physical(io, gpa + STEAL, &mut steal);
    core.read_physical(io, gpa + VERSION, &mut version);
    let updating = u32::from_le_bytes(version).wrapping_add(1) | 1;
    core.write_physical(io, gpa + VERSION, &updating.to_le_bytes());
    core.write_physical(io, gpa + STEAL, &u64::from_le_bytes(steal).wrapping_add(stolen).to_le_bytes());
    core.write_physical(io, gpa + VERSION, &updating.wrapping_add(1).to_le_bytes());
}

/// Says that the vCPU is about to halt.
pub fn stand_still(core: &mut Core, io: &dyn GuestIo) {
    refresh(core, io);
    set_preempted(core, NOT_RUNNING);
}

/// Says that the vCPU runs again, and does what was asked of it meanwhile.
pub fn move_again(core: &mut Core) {
    if set_preempted(core, 0) & FLUSH_TLB != 0 {
        core.flush_all();
    }
    go_on(core);
}

/// Returns what was there; 0 if there is no structure.
fn set_preempted(core: &mut Core, value: u8) -> u8 {
    let place = core.steal_time.address().map(|gpa| gpa + PREEMPTED);
    let before = place.and_then(|gpa| core.ram.swap(gpa, value));
    if let (Some(gpa), Some(_)) = (place, before) {
        core.wrote(gpa, 1);
    }
    before.unwrap_or(0)
}
