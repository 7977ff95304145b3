//! A network card as a virtio device: frames between its queues and a [`Link`], as fast as they may.

use super::{Link, Net, Received};
use crate::Result;
use crate::virtio::{Model, Queues};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::Broken;
use anyvisor_devices::virtio::limit::Bucket;
use anyvisor_devices::virtio::net::{self, RECEIVE, Receiver, TRANSMIT};
use anyvisor_devices::virtio::pci::Offer;
use rustix::event::PollFlags;
use serde_json::Value;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Frames that go one way before the other way has its turn.
const TURN: usize = 64;

pub struct NetModel {
    name: String,
    mac: [u8; 6],
    mtu: u16,
    link: Box<dyn Link>,
    receiver: Receiver,
    /// Limits on what the guest receives and sends, by queue.
    limits: [Limit; 2],
    /// The guest may receive now.
    has_room: bool,
    /// When a limit lets the next frame pass.
    later: Option<Instant>,
    began: Instant,
    /// The frame that is being sent.
    frame: Vec<u8>,
}

/// Limits in one direction.
struct Limit {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
}

impl Limit {
    fn new(net: &Net) -> Limit {
        let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, 0));
        Limit { bytes: bucket(net.bandwidth), frames: bucket(net.frames) }
    }

    /// When the next frame may pass: `None` for now.
    fn wait(&mut self, now: u64) -> Option<u64> {
        let buckets = self.bytes.iter_mut().chain(&mut self.frames);
        buckets.filter_map(|bucket| bucket.wait(now)).max()
    }

    fn take(&mut self, bytes: usize, frames: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes as u64);
        }
        if let Some(bucket) = &mut self.frames {
            bucket.take(frames);
        }
    }
}

impl NetModel {
    pub(super) fn new(net: &Net, mac: [u8; 6], link: Box<dyn Link>) -> NetModel {
        NetModel {
            name: format!("net '{net}'"),
            mac,
            mtu: net.mtu,
            link,
            receiver: Receiver::default(),
            limits: [Limit::new(net), Limit::new(net)],
            has_room: true,
            later: None,
            began: Instant::now(),
            frame: Vec::new(),
        }
    }

    /// Whether a frame may pass in the direction of queue `n`; if not, the device is called when it may.
    fn may_pass(&mut self, n: usize, now: Instant) -> bool {
        let wait = self.limits[n].wait((now - self.began).as_nanos() as u64);
        if let Some(then) = wait {
            let then = self.began + Duration::from_nanos(then);
            self.later = Some(self.later.map_or(then, |later| later.min(then)));
        }
        wait.is_none()
    }

    /// Passes on what the guest sends; returns whether there may be more.
    fn transmit(&mut self, queues: &mut Queues<'_>, now: Instant) -> Result<bool, Broken> {
        for _ in 0..TURN {
            if !self.may_pass(TRANSMIT, now) {
                return Ok(false);
            }
            let Some(chain) = queues.pop(TRANSMIT)? else { return Ok(false) };
            if let Some(header) = net::transmitted(&chain, queues.features(), queues.memory(), &mut self.frame)? {
                self.limits[TRANSMIT].take(self.frame.len(), header.frames(self.frame.len()));
                self.link.transmit(&header, &self.frame, now);
            }
            queues.push(TRANSMIT, chain.head, 0)?;
        }
        Ok(true)
    }

    /// Gives the guest what there is for it; returns whether there may be more.
    fn receive(&mut self, queues: &mut Queues<'_>, now: Instant) -> Result<bool, Broken> {
        let features = queues.features();
        let may_grow = features & net::bits::MERGEABLE != 0;
        for _ in 0..TURN {
            while !self.receiver.is_content(features)
                && let Some(chain) = queues.pop(RECEIVE)?
            {
                self.receiver.add(chain)?;
            }
            self.has_room = self.receiver.held() > 0 && self.may_pass(RECEIVE, now);
            if !self.has_room {
                return Ok(false);
            }
            let room = self.receiver.room(features);
            let Some(Received { header, parts }) = self.link.receive(room, may_grow, now) else { return Ok(false) };
            let length = parts.iter().map(|part| part.len()).sum();
            self.limits[RECEIVE].take(length, header.frames(length));
            let (memory, written) = (queues.memory(), queues.written());
            self.receiver.put(&header, &parts, memory, written, |head, length| queues.push(RECEIVE, head, length))?;
        }
        Ok(true)
    }
}

impl Model for NetModel {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn offer(&self) -> Offer {
        net::offer(self.mac, self.mtu, self.link.features())
    }

    fn mac(&self) -> Option<[u8; 6]> {
        Some(self.mac)
    }

    fn start(&mut self, features: u64) {
        self.link.start(features);
    }

    fn reset(&mut self) {
        self.link.reset();
        self.receiver.clear();
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        self.link.source(self.has_room).into_iter().collect()
    }

    fn deadline(&self) -> Option<Instant> {
        self.link.deadline().into_iter().chain(self.later).min()
    }

    fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let mut now = Instant::now();
        self.later = None;
        self.link.poll(now);
        loop {
            let sends = self.transmit(queues, now)?;
            let receives = self.receive(queues, now)?;
            queues.signal()?;
            if !sends && !receives {
                return Ok(());
            }
            now = Instant::now();
            self.link.poll(now);
        }
    }

    fn save(&mut self) -> Result<Value> {
        Ok(self.link.save())
    }

    fn restore(&mut self, saved: &Value) -> Result<(), BadState> {
        self.link.restore(saved)
    }

    fn settle(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        queues.put_back(RECEIVE, self.receiver.held() as u16);
        self.receiver.clear();
        Ok(())
    }
}
