//! Entropy for the guest, from the host's kernel.

use crate::virtio::{Model, Queues};
use anyvisor_devices::virtio::Broken;
use anyvisor_devices::virtio::pci::Offer;
use anyvisor_devices::virtio::rng::{self, Source};
use rustix::rand::{GetRandomFlags, getrandom};

/// The device.
pub struct RngModel;

impl Model for RngModel {
    fn name(&self) -> String {
        "rng".into()
    }

    fn offer(&self) -> Offer {
        rng::offer()
    }

    fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while rng::serve(&mut queues.queue(0), self)? {}
        Ok(())
    }
}

impl Source for RngModel {
    fn fill(&mut self, data: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            match getrandom(&mut data[done..], GetRandomFlags::empty()) {
                Ok(length) => done += length,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
