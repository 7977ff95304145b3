//! A machine from a snapshot, ready to go on.

use super::{Board, End, Machine, Notify, Outside, Parts, lock};
use crate::console::{Input, Output};
use crate::snapshot::{History, Manifest, Snapshot};
use crate::{Config, Result};
use anyvisor_engine::{Engine, VcpuId};
use anyvisor_x86::{Cpuid, VcpuState, msr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How far the TSC's frequency may be from what the guest was told, in parts per million: KVM's own measure
/// (its parameter `tsc_tolerance_ppm`), half of what NTP corrects.
const TSC_TOLERANCE_PPM: u64 = 250;

impl Machine {
    /// The machine that `snapshot` holds, on `engine`, which need not be the one it was saved on.
    ///
    /// # Errors
    /// The engine on this host lacks what the guest uses: everything that differs, in one line. Or the
    /// state makes no sense, or the host failed.
    pub(super) fn restore(
        config: &Config,
        snapshot: &Arc<Snapshot>,
        engine: &dyn Engine,
        output: &Arc<Output>,
        input: &Arc<Input>,
        notify: Arc<Notify>,
    ) -> Result<Machine> {
        let saved = snapshot.manifest();
        let supported = engine.supported_cpuid();
        let memory = snapshot.map_memory(config.huge_pages)?;
        let vm = engine.create_vm(memory.clone())?;
        let mut missing = missing(saved, &supported);
        vm.want_tsc_khz(saved.tsc_khz);
        let mut vcpus = Vec::new();
        // Without what they are to show they cannot even be made.
        if missing.is_empty() {
            for (cpu, vcpu) in (0..).zip(&saved.vcpus) {
                vcpus.push(vm.create_vcpu(VcpuId(cpu), &vcpu.cpuid)?);
            }
            missing.extend(other_frequency(saved.tsc_khz, vm.tsc_khz()?));
        }
        if !missing.is_empty() {
            let (name, list) = (engine.name(), missing.join(", "));
            return Err(snapshot.error(&format!("cannot go on under engine {name} on this host, which lacks {list}")));
        }
        let start = saved.board.now;
        let outside = Outside { output, input, notify: &notify };
        let parts = Parts::open(config, &memory, &outside)?;
        let board = Arc::new(Board::new(config, vm.clone(), &memory, parts, &outside, start)?);
        if let Some(difference) = board.changed_image(&saved.board)? {
            return Err(snapshot.error(&format!("cannot go on: {difference}")));
        }
        let nonsense = |what: String| snapshot.error(&format!("makes no sense: {what}"));
        board.restore(&saved.board).map_err(|error| nonsense(error.to_string()))?;
        for (vcpu, saved) in vcpus.iter_mut().zip(&saved.vcpus) {
            vcpu.set_state(&saved.state).map_err(|error| match error {
                anyvisor_engine::Error::BadState(_) => nonsense(error.to_string()),
                error => error.into(),
            })?;
            lock(&notify.kickers).push(vcpu.kicker());
        }
        vm.set_clock(saved.clock)?;
        if let (Some(vcpu), Some(saved)) = (vcpus.first_mut(), saved.vcpus.first())
            && let Some(jump) = tsc_jump(&saved.state, &vcpu.state()?, vm.tsc_khz()?)
        {
            tracing::warn!(id = config.id, "{} cannot set the guest's TSC, which {jump}", engine.name());
        }
        let history = History::since(&memory, snapshot.checksum(), &*vm)?;
        let tables = saved.vcpus.iter().map(|vcpu| vcpu.cpuid.clone()).collect();
        Ok(Machine { memory, vm, board, vcpus, tables, history, unverified: Some(snapshot.clone()), notify })
    }
}

/// What the guest was shown and an engine that supports `supported` lacks.
fn missing(saved: &Manifest, supported: &Cpuid) -> Vec<String> {
    let mut list: Vec<String> = saved.vcpus.iter().flat_map(|vcpu| vcpu.cpuid.differences(supported)).collect();
    list.sort();
    list.dedup();
    list
}

/// What is wrong if the TSC counted with `was` kHz and now counts with `is`, having been asked for that.
fn other_frequency(was: u64, is: u64) -> Option<String> {
    let near = u128::from(is.abs_diff(was)) * 1_000_000 <= u128::from(was) * u128::from(TSC_TOLERANCE_PPM);
    (!near).then(|| format!("a TSC of {was} kHz (it is {is} kHz here, and cannot be scaled to that)"))
}

/// How the TSC of a vCPU that was given state `saved`, and has `now`, has jumped: not every KVM sets it.
fn tsc_jump(saved: &VcpuState, now: &VcpuState, khz: u64) -> Option<String> {
    let (saved, now) = (saved.msr(msr::IA32_TSC)?, now.msr(msr::IA32_TSC)?);
    // Looking takes far less than a second.
    let moved = now.wrapping_sub(saved) > 1000 * khz;
    moved.then(|| format!("jumps from {saved} to {now}"))
}

/// How long the guest has the processor and the disk to itself.
const HEAD_START: Duration = Duration::from_millis(100);

/// The comparison of a restored VM's memory with its checksums, while the VM runs already.
///
/// A VM that runs on damaged memory may end in any way: how it ended counts only when the memory was right.
pub(super) struct Verification {
    thread: std::io::Result<JoinHandle<Option<String>>>,
    stop: Arc<AtomicBool>,
}

impl Verification {
    /// Starts it. Damage ends the VM.
    pub fn start(snapshot: Arc<Snapshot>, notify: Arc<Notify>) -> Verification {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let ending = notify.clone();
        let thread = std::thread::Builder::new().name("verify".into()).spawn(move || {
            std::thread::park_timeout(HEAD_START);
            let damage = snapshot.verify(&stopped).err()?.to_string();
            notify.end(End::Failed(damage.clone()));
            Some(damage)
        });
        if let Err(error) = &thread {
            ending.end(End::Failed(format!("cannot start the thread that verifies memory: {error}")));
        }
        Verification { thread, stop }
    }

    /// How the VM ended, in truth.
    pub fn judge(self, end: End) -> End {
        if matches!(end, End::Stopped | End::Left) {
            self.stop.store(true, Ordering::Relaxed);
        }
        if let Ok(thread) = &self.thread {
            thread.thread().unpark();
        }
        match self.thread.map(JoinHandle::join) {
            Ok(Ok(Some(damage))) => End::Failed(damage),
            Ok(Ok(None)) | Err(_) => end,
            Ok(Err(_)) => End::Failed("internal error, see above; please report it".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tsc_that_was_not_set_is_seen() {
        let state = |tsc| {
            let mut state = VcpuState::default();
            state.set_msr(msr::IA32_TSC, tsc);
            state
        };
        let jump = |now| tsc_jump(&state(5_000_000_000), &state(now), 2_000_000);
        assert_eq!((jump(5_000_000_000), jump(5_900_000_000)), (None, None));
        assert!(jump(8_000_000_000).is_some() && jump(4_999_999_999).is_some());
        assert_eq!(tsc_jump(&VcpuState::default(), &state(1), 1), None);
    }
}
