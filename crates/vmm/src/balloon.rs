//! The guest's balloon: memory that it lends to the host, more or less of it as the host wants, and all that it has free.
//!
//! **Idea.** Whoever controls the VM says in [`Lending`] how much is wanted and reads there how much it is; the device's
//! thread does the rest. A page that the guest lends is taken from its file or mapping ([`memory::give_back`]), in every place
//! where it is mapped, and the engine is told as of any other write: what was translated from it is gone. When the
//! guest uses it again it reads as zeros, or in a restored VM as in the snapshot.

use crate::virtio::{Model, Queues};
use crate::{Error, Result, memory};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::balloon::{self, Balloon, Host, PAGE, STATISTICS_NAMES, Statistics};
use anyvisor_devices::virtio::pci::Offer;
use anyvisor_devices::virtio::{Broken, Written};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// What there is of a balloon, between the VM's control and its device.
#[derive(Default)]
pub struct Lending {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Wakes the device's thread; there is a device.
    event: Option<Arc<OwnedFd>>,
    /// In pages.
    wanted: u32,
    actual: u32,
    statistics: Statistics,
    /// The guest is to say how its memory is.
    refresh: bool,
}

/// A balloon, and what the guest said last of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lent {
    /// Bytes that the host wants, and has.
    pub wanted: u64,
    pub actual: u64,
    pub statistics: Statistics,
}

impl Lending {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// How it is now, after the guest was asked and has answered, or `patience` is over; `None` if there is no balloon.
    pub fn look(&self, patience: Duration) -> Option<Lent> {
        let mut state = self.lock();
        let event = state.event.clone()?;
        state.refresh = true;
        let before = state.statistics.count;
        wake(&event);
        let waited = self.changed.wait_timeout_while(state, patience, |state| state.statistics.count == before);
        let state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        let bytes = |pages: u32| u64::from(pages) * PAGE;
        Some(Lent { wanted: bytes(state.wanted), actual: bytes(state.actual), statistics: state.statistics })
    }

    /// Wants so many bytes of the guest's memory; false if there is no balloon.
    pub fn want(&self, bytes: u64) -> bool {
        let mut state = self.lock();
        let Some(event) = state.event.clone() else { return false };
        state.wanted = (bytes / PAGE) as u32;
        wake(&event);
        true
    }
}

impl Lent {
    /// In Firecracker's words, where it has them.
    pub fn describe(&self) -> Value {
        let mut value = json!({
            "target_mib": self.wanted >> 20,
            "actual_mib": self.actual >> 20,
            "target_pages": self.wanted / PAGE,
            "actual_pages": self.actual / PAGE,
        });
        for (name, number) in STATISTICS_NAMES.iter().zip(self.statistics.values) {
            if let Some(number) = number {
                value[*name] = json!(number);
            }
        }
        value
    }
}

fn wake(event: &OwnedFd) {
    // It fails only when it has been written very often and not been read: then it wakes the thread as well.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// The device.
pub struct BalloonModel {
    device: Balloon,
    lending: Arc<Lending>,
    event: Arc<OwnedFd>,
    /// What the driver has been shown, in pages, and what it says.
    wanted: u32,
    actual: u32,
}

/// A balloon in a snapshot.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    wanted: u32,
    actual: u32,
}

impl BalloonModel {
    /// A balloon that is to have `bytes` bytes, and `lending`, its control.
    ///
    /// # Errors
    /// The host's.
    pub fn new(bytes: u64, lending: Arc<Lending>) -> Result<BalloonModel> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::host("cannot make what wakes the balloon", error.into()))?;
        let (event, wanted) = (Arc::new(event), (bytes / PAGE) as u32);
        *lending.lock() = State { event: Some(event.clone()), wanted, ..State::default() };
        Ok(BalloonModel { device: Balloon::new(), lending, event, wanted, actual: 0 })
    }
}

/// Takes pages of `memory`.
struct Taker<'a> {
    memory: &'a GuestMemoryMmap,
    written: Written<'a>,
}

impl Host for Taker<'_> {
    fn give_back(&mut self, gpa: u64, length: u64) -> std::io::Result<()> {
        let result = memory::give_back(self.memory, gpa, length);
        if let Err(error) = &result {
            tracing::debug!("{length} bytes of the balloon stay where they are: {error}");
        }
        // Some of it may have gone in any case.
        (self.written)(gpa, length);
        result
    }
}

impl Model for BalloonModel {
    fn name(&self) -> String {
        "balloon".into()
    }

    fn offer(&self) -> Offer {
        let mut offer = balloon::offer(self.wanted);
        offer.config[balloon::ACTUAL].copy_from_slice(&self.actual.to_le_bytes());
        offer
    }

    fn reset(&mut self) {
        self.device.reset();
        self.actual = 0;
        let mut state = self.lending.lock();
        (state.actual, state.statistics) = (0, Statistics::default());
    }

    fn config_write(&mut self, config: &[u8]) {
        self.actual = u32::from_le_bytes(config[balloon::ACTUAL].try_into().expect("four bytes"));
        self.lending.lock().actual = self.actual;
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        vec![(self.event.as_fd(), PollFlags::IN)]
    }

    fn work(&mut self, queues: &mut Queues<'_>) -> std::result::Result<(), Broken> {
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
        let (wanted, refresh) = {
            let mut state = self.lending.lock();
            (state.wanted, std::mem::take(&mut state.refresh))
        };
        if std::mem::replace(&mut self.wanted, wanted) != wanted {
            queues.reconfigure();
        }
        if refresh {
            self.device.refresh();
        }
        let (features, mut taker) = (queues.features(), Taker { memory: queues.memory(), written: queues.written() });
        for n in 0..queues.count() {
            self.device.work(n as u16, &mut queues.queue(n), features, &mut taker)?;
        }
        let mut state = self.lending.lock();
        if state.statistics != self.device.statistics() {
            state.statistics = self.device.statistics();
            self.lending.changed.notify_all();
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Value> {
        let saved = Saved { wanted: self.wanted, actual: self.actual };
        Ok(serde_json::to_value(saved).expect("it is plain data"))
    }

    fn restore(&mut self, saved: &Value) -> std::result::Result<(), BadState> {
        let saved = serde_json::from_value::<Saved>(saved.clone());
        let Saved { wanted, actual } = saved.map_err(|_| BadState { chip: "balloon", what: "no state of one" })?;
        (self.wanted, self.actual) = (wanted, actual);
        let mut state = self.lending.lock();
        (state.wanted, state.actual) = (wanted, actual);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;
    use crate::virtio::driver::{Driver, fuzz};
    use vm_memory::{Bytes, GuestAddress};

    fn model() -> (BalloonModel, Arc<Lending>) {
        let lending = Arc::new(Lending::default());
        (BalloonModel::new(8 << 20, lending.clone()).unwrap(), lending)
    }

    /// In a file and not in one, as engines want it.
    #[test]
    fn pages_are_given_back() {
        for in_file in [true, false] {
            let memory = memory::allocate(32 << 20, HugePages::IfThere, in_file).unwrap();
            let resident = || {
                let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
                let address = vm_memory::GuestMemoryBackend::iter(&memory).next().unwrap().as_ptr() as usize;
                let mut lines = text.lines().skip_while(|line| !line.starts_with(&format!("{address:x}-")));
                let line = lines.find(|line| line.starts_with("Rss:")).expect("the mapping has the field");
                line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
            };
            memory.write_slice(&vec![7; 16 << 20], GuestAddress(0)).unwrap();
            let before = resident();
            assert!(before >= 16 << 10);
            memory::give_back(&memory, 4 << 20, 8 << 20).unwrap();
            assert!(resident() <= before - (8 << 10), "{in_file}: {} of {before}", resident());
            let byte = |gpa| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
            let edges = [(4 << 20) - 1, 4 << 20, (12 << 20) - 1, 12 << 20].map(byte);
            assert_eq!(edges, [7, 0, 0, 7]);
            memory.write_obj(9u8, GuestAddress(5 << 20)).unwrap();
            assert_eq!(byte(5 << 20), 9);
            assert!(
                memory::give_back(&memory, 32 << 20, 4096).is_err() && memory::give_back(&memory, 100, 4096).is_err()
            );
        }
    }

    #[test]
    fn a_driver_is_told_what_is_wanted() {
        let (mut model, lending) = model();
        assert_eq!(model.offer().config[..4], 2048u32.to_le_bytes());
        let mut driver = Driver::new(&mut model);
        driver.work(&mut model).unwrap();
        assert!(!driver.reconfigured);
        assert!(lending.want(4 << 20));
        driver.work(&mut model).unwrap();
        assert!(driver.reconfigured);
        assert_eq!(model.offer().config[..4], 1024u32.to_le_bytes());
        let mut config = model.offer().config;
        config[balloon::ACTUAL].copy_from_slice(&1000u32.to_le_bytes());
        model.config_write(&config);
        driver.memory.write_obj(7u8, GuestAddress(200 << 12)).unwrap();
        driver.ask(&mut model, 0, &[&200u32.to_le_bytes()], &[]);
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(200 << 12)).unwrap(), 0);
        assert!(driver.written.borrow().contains(&(200 << 12, 4096)));
        let statistics = [&4u16.to_le_bytes()[..], &5000u64.to_le_bytes()].concat();
        driver.send(2, &[&statistics], &[]);
        driver.work(&mut model).unwrap();
        let lent = lending.look(Duration::ZERO).unwrap();
        assert_eq!((lent.wanted, lent.actual), (4 << 20, 1000 << 12));
        assert_eq!(lent.describe()["free_memory"], 5000);
        // Into a snapshot and out of it.
        let saved = model.save().unwrap();
        let (mut other, lending) = self::model();
        other.restore(&saved).unwrap();
        assert_eq!(other.offer().config[..8], model.offer().config[..8]);
        assert_eq!(lending.look(Duration::ZERO).unwrap().actual, 1000 << 12);
        assert!(other.restore(&Value::Null).is_err());
        other.reset();
        assert_eq!(lending.look(Duration::ZERO).unwrap().actual, 0);
        assert_eq!(Lending::default().look(Duration::ZERO), None);
    }

    #[test]
    fn hostile_queues_harm_nobody() {
        let (mut model, _) = model();
        let pages: Vec<u8> = (0..16u32).flat_map(|n| (100 + 8 * n).to_le_bytes()).collect();
        let taken = fuzz(&mut model, &[pages, vec![4, 0, 1, 2, 3, 4, 5, 6, 7, 8]], 300, 1);
        assert!(taken.broken > 20 && taken.answered > 50, "{taken:?}");
    }
}
