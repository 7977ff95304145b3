//! A disk as a virtio device: requests of all its queues, many under way at once, within limits.

use super::ring::DEPTH;
use super::rush::{self, Rush};
use super::storage::Storage;
use super::{Image, Stamp};
use crate::virtio::{Model, Queues};
use crate::{Error, Result};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::Broken;
use anyvisor_devices::virtio::block::{self, Action, Geometry, ID_SIZE, Request, Status};
use anyvisor_devices::virtio::limit::Bucket;
use anyvisor_devices::virtio::pci::Offer;
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// How long requests that end at once may wait for the interrupt that tells of all of them.
const TOGETHER: Duration = Duration::from_micros(100);
/// How long they are carried out before others have a say, such as who wants to pause the VM.
const TURN: Duration = Duration::from_millis(20);

/// A disk on an image.
pub struct DiskModel {
    /// For messages.
    name: String,
    image: Image,
    storage: Box<dyn Storage>,
    geometry: Geometry,
    id: [u8; ID_SIZE],
    limits: Limits,
    /// Under way, by tag, with their queues; and the tags that are free.
    requests: Vec<Option<(usize, Request)>>,
    free: Vec<u16>,
    /// The queue whose turn is next.
    turn: usize,
    rush: Rush,
    /// An error of the host was told already.
    told: bool,
}

/// What a disk may do in a second.
struct Limits {
    epoch: Instant,
    buckets: Vec<(Unit, Bucket)>,
    /// When it may go on, if it had to stop.
    until: Option<Instant>,
}

/// What a limit counts.
#[derive(Clone, Copy)]
enum Unit {
    Requests,
    Bytes,
}

/// A disk in a snapshot.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    image: Stamp,
}

impl DiskModel {
    /// Disk number `n`, with this geometry.
    pub(super) fn new(
        n: usize,
        image: Image,
        storage: Box<dyn Storage>,
        geometry: Geometry,
        [iops, bandwidth]: [Option<u64>; 2],
    ) -> DiskModel {
        let mut id = [0; ID_SIZE];
        let serial = format!("anyvisor-disk{n}");
        id[..serial.len()].copy_from_slice(serial.as_bytes());
        let limits = [(Unit::Requests, iops), (Unit::Bytes, bandwidth)];
        let buckets = limits.into_iter().filter_map(|(unit, rate)| Some((unit, Bucket::new(rate?, 0))));
        DiskModel {
            name: format!("disk '{}'", image.path.display()),
            image,
            storage,
            geometry,
            id,
            limits: Limits { epoch: Instant::now(), buckets: buckets.collect(), until: None },
            requests: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH as u16).rev().collect(),
            turn: 0,
            rush: Rush::default(),
            told: false,
        }
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn trouble(&self, what: &str, error: io::Error) -> Error {
        Error::host(format!("cannot {what} {}", self.name), error)
    }

    /// The next chain, queue by queue.
    fn pop(&mut self, queues: &mut Queues<'_>) -> Result<Option<(usize, Request)>, Broken> {
        for _ in 0..queues.count() {
            let n = self.turn % queues.count();
            self.turn = n + 1;
            if let Some(chain) = queues.pop(n)? {
                let request = Request::parse(&chain, queues.features(), &self.geometry, queues.memory())?;
                return Ok(Some((n, request)));
            }
        }
        Ok(None)
    }

    /// Begins what can be begun. Returns whether some of it has ended already. With `looking` the driver need not notify of what
    /// comes next.
    fn begin(&mut self, queues: &mut Queues<'_>, looking: bool) -> Result<bool, Broken> {
        let (mut ended, began) = (false, Instant::now());
        let mut told = began;
        self.limits.until = None;
        while !self.free.is_empty() && self.limits.allow() {
            if looking && queues.are_empty()? {
                break;
            }
            let Some((queue, request)) = self.pop(queues)? else { break };
            self.limits.take(&request);
            self.rush.begun();
            let result = match request.action {
                Action::Refuse(status) => {
                    let length = request.finish(status, 0, queues.memory(), queues.written());
                    queues.push(queue, request.head, length)?;
                    continue;
                }
                Action::Id => Some(Ok(())),
                action => {
                    let tag = self.free.pop().expect("one is free");
                    let result = self.storage.begin(tag, action, &request.data, queues.memory());
                    match result {
                        None => {
                            self.requests[usize::from(tag)] = Some((queue, request));
                            continue;
                        }
                        Some(result) => {
                            self.free.push(tag);
                            Some(result)
                        }
                    }
                }
            };
            self.finish(queues, queue, &request, result.expect("others go on"))?;
            ended = true;
            let now = Instant::now();
            if now - told > TOGETHER {
                queues.signal()?;
                told = now;
            }
            if now - began > TURN {
                queues.give_way();
            }
        }
        Ok(ended)
    }

    /// Answers what has ended; with `wait`, waits for some of what is under way. Returns whether there was any.
    fn progress(&mut self, queues: &mut Queues<'_>, wait: bool) -> Result<bool, Broken> {
        let mut ended = Vec::new();
        if let Err(error) = self.storage.progress(&mut ended, wait) {
            tracing::error!("{}: the host carries out no more requests: {error}", self.name);
            return Err(Broken("the host carries out no more requests"));
        }
        let some = !ended.is_empty();
        for (tag, result) in ended {
            let (queue, request) = self.requests[usize::from(tag)].take().expect("a request under way");
            self.free.push(tag);
            self.finish(queues, queue, &request, result)?;
        }
        Ok(some)
    }

    fn finish(
        &mut self,
        queues: &mut Queues<'_>,
        queue: usize,
        request: &Request,
        result: io::Result<()>,
    ) -> Result<(), Broken> {
        let (memory, written) = (queues.memory(), queues.written());
        let told = if request.action == Action::Id { request.tell_id(&self.id, memory, written) } else { 0 };
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    let action = request.action;
                    tracing::warn!("{}: {action:x?}: {error}; the guest sees I/O errors, this is told once", self.name);
                }
                Status::Failed
            }
        };
        let length = request.finish(status, told, memory, written);
        queues.push(queue, request.head, length)
    }

    /// Waits for the next request, or the end of one, but not for long. Whether there is any.
    fn comes_more(&mut self, queues: &mut Queues<'_>) -> Result<bool, Broken> {
        let began = Instant::now();
        while self.limits.until.is_none() && began.elapsed() < rush::PATIENCE {
            if !queues.are_empty()? || self.progress(queues, false)? {
                return Ok(!self.free.is_empty());
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }

    fn is_idle(&self) -> bool {
        self.free.len() == DEPTH
    }
}

impl Limits {
    /// Whether another request may begin now.
    fn allow(&mut self) -> bool {
        if self.buckets.is_empty() {
            return true;
        }
        let now = self.epoch.elapsed().as_nanos() as u64;
        let until = self.buckets.iter_mut().filter_map(|(_, bucket)| bucket.wait(now)).max();
        self.until = until.map(|until| self.epoch + Duration::from_nanos(until));
        until.is_none()
    }

    fn take(&mut self, request: &Request) {
        for (unit, bucket) in &mut self.buckets {
            bucket.take(match unit {
                Unit::Requests => 1,
                Unit::Bytes => request.length(),
            });
        }
    }
}

impl Model for DiskModel {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn offer(&self) -> Offer {
        block::offer(&self.geometry)
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let source = self.storage.source().filter(|_| !self.is_idle());
        source.into_iter().map(|source| (source, PollFlags::IN)).collect()
    }

    fn deadline(&self) -> Option<Instant> {
        self.limits.until
    }

    fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let mut told = Instant::now();
        let mut looking = self.rush.begin(queues.count());
        loop {
            let begun = self.begin(queues, looking)?;
            let ended = self.progress(queues, false)?;
            if looking && told.elapsed() < TOGETHER && !queues.is_cut_short() && self.comes_more(queues)? {
                continue;
            }
            queues.signal()?;
            if looking {
                told = Instant::now();
                looking = self.rush.goes_on() && !queues.is_cut_short();
            } else if !begun && !ended {
                return Ok(());
            }
        }
    }

    fn settle(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while !self.is_idle() {
            self.progress(queues, true)?;
        }
        Ok(())
    }

    /// What the guest has written lasts after this.
    fn save(&mut self) -> Result<Value> {
        self.storage.flush().map_err(|error| self.trouble("write through", error))?;
        let image = self.image.stamp().map_err(|error| self.trouble("look at", error))?;
        Ok(serde_json::to_value(Saved { image }).expect("it is plain data"))
    }

    fn difference(&self, saved: &Value) -> Result<Option<String>> {
        // What makes no sense is refused later.
        let Ok(saved) = serde_json::from_value::<Saved>(saved.clone()) else { return Ok(None) };
        let name = &self.name;
        Ok((self.image.found != saved.image).then(|| {
            format!(
                "{name} has changed since; put the image back as it was then (a copy made with cp -p while the VM was \
                 paused or had ended)"
            )
        }))
    }

    fn restore(&mut self, saved: &Value) -> Result<(), BadState> {
        let saved = serde_json::from_value::<Saved>(saved.clone());
        saved.map(drop).map_err(|_| BadState { chip: "disk", what: "its image is not described" })
    }
}

#[cfg(test)]
mod tests;
