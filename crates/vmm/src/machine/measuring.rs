//! Counting what intercepts guest code, for as long as somebody wants to know.
//!
//! Each vCPU has a [`Tally`] while it is measured, and none otherwise, so that nothing is counted for nobody. Tallies
//! outlive a restart of the VM. Reading them asks nobody.

use super::lock;
use super::remote::{Refused, Remote};
use anyvisor_engine::Vcpu;
use anyvisor_engine::tally::Tally;
use std::sync::{Arc, Mutex};

/// The tallies by vCPU; `None` if nothing is measured.
#[derive(Default)]
pub(super) struct Measuring(Mutex<Option<Vec<Arc<Tally>>>>);

impl Measuring {
    /// Lets the vCPUs of a VM that has been built count, if they are to.
    pub fn begin(&self, vcpus: &mut [Box<dyn Vcpu>]) {
        if let Some(tallies) = &mut *lock(&self.0) {
            tallies.resize_with(vcpus.len(), Arc::default);
            for (vcpu, tally) in vcpus.iter_mut().zip(tallies) {
                vcpu.measure(Some(tally.clone()));
            }
        }
    }
}

impl Remote {
    /// Lets a VM that has not been built yet count from its first instruction on.
    pub fn measure_from_start(&self) {
        *lock(&self.measuring.0) = Some(Vec::new());
    }

    /// Starts counting, from nothing, or stops.
    ///
    /// # Errors
    /// As for [`Remote::pause`]: the vCPUs are told at a standstill.
    pub fn measure(&self, on: bool) -> Result<(), Refused> {
        let measuring = self.measuring.clone();
        self.with_paused(move |paused| {
            *lock(&measuring.0) = on.then(|| paused.vcpus.iter().map(|_| Arc::default()).collect());
            for (cpu, vcpu) in paused.vcpus.iter_mut().enumerate() {
                let tallies = lock(&measuring.0);
                vcpu.measure(tallies.as_ref().and_then(|tallies| tallies.get(cpu)).cloned());
            }
        })
    }

    /// What has been counted, by vCPU; `None` if nothing is.
    pub fn tallies(&self) -> Option<Vec<Arc<Tally>>> {
        lock(&self.measuring.0).clone()
    }
}
