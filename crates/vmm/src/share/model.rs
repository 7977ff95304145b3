//! A shared folder as a virtio device: queues on one side, [`Files`] on the other.

use crate::virtio::{Model, Queues};
use crate::{Error, Result};
use anyvisor_devices::virtio::Broken;
use anyvisor_devices::virtio::fs::{self, Files, Server};
use anyvisor_devices::virtio::pci::Offer;
use rustix::event::PollFlags;
use serde_json::Value;
use std::os::fd::BorrowedFd;

/// Files for some of which one may have to wait.
pub trait Waits {
    /// What requests wait for.
    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        Vec::new()
    }

    /// They are about to be tried again.
    fn look_again(&mut self) {}
}

/// The device.
pub struct ShareModel<F> {
    name: String,
    tag: String,
    server: Server<F>,
}

impl<F: Files + Waits> ShareModel<F> {
    /// Shares `files` as `tag`; `name` is what and which it is, for messages.
    pub fn new(name: String, tag: &str, files: F) -> ShareModel<F> {
        ShareModel { name, tag: tag.into(), server: Server::new(files) }
    }
}

impl<F: Files + Waits> Model for ShareModel<F> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn offer(&self) -> Offer {
        fs::offer(&self.tag)
    }

    fn reset(&mut self) {
        self.server.reset();
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        self.server.files().sources()
    }

    fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        if self.server.has_waiting() {
            self.server.files_mut().look_again();
            for done in self.server.resume(queues.memory(), queues.written())? {
                queues.push(done.queue, done.head, done.length)?;
            }
            queues.signal()?;
        }
        for n in [fs::FIRST, fs::REQUESTS] {
            while let Some(chain) = queues.pop(n)? {
                if let Some(done) = self.server.serve(n, chain, queues.memory(), queues.written())? {
                    queues.push(n, done.head, done.length)?;
                    queues.signal()?;
                }
            }
        }
        Ok(())
    }

    /// Files that the guest has open are descriptors of this process, and chains may wait: neither can be saved.
    fn save(&mut self) -> Result<Value> {
        Err(Error::user(format!(
            "{} cannot be saved, for the guest may have files of it open; a VM that is to be saved takes no --share",
            self.name
        )))
    }
}
