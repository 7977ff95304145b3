//! What a command in a guest reads and writes: four files in a shared folder that is no folder of the host's.
//!
//! **Idea.** A guest that has its root by virtio-fs needs no other driver for a command's standard streams. `input`,
//! `output` and `error` are streams whose other ends are pipes on the host; `status` takes a text that says how the
//! command ended. Requests for which a pipe has nothing, or no room, wait in the device until it has. Writes come in the
//! order in which the guest makes them: when it writes the status, all of its output is in the pipes.

use super::model::Waits;
use anyvisor_devices::virtio::fs::{
    Attributes, Change, Data, Entry, Errno, Files, Listed, Make, Name, Opened, Owner, ROOT, Statistics,
};
use anyvisor_devices::virtio::queue::{gather, scatter, total};
use rustix::event::PollFlags;
use rustix::io::Errno as HostErrno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

type Answer<T> = Result<T, Errno>;

/// The files, of which each one's node and handle is its place here behind the root's.
const NAMES: [&[u8]; 4] = [b"input", b"output", b"error", b"status"];
const INPUT: u64 = ROOT + 1;
const OUTPUT: u64 = ROOT + 2;
const ERROR: u64 = ROOT + 3;
const STATUS: u64 = ROOT + 4;

/// Most bytes that are passed on at a time, and of a status.
const CHUNK: usize = 64 << 10;
const STATUS_MAX: u64 = 256;

/// The host's ends, which do not block.
pub struct Streams {
    pub input: OwnedFd,
    pub output: OwnedFd,
    pub error: OwnedFd,
    /// Told the status.
    pub ended: Box<dyn Fn(&str) + Send + Sync>,
}

/// Streams as part of a [`Config`](crate::Config), by which each VM made of it has the same.
#[derive(Clone)]
pub struct Channel(pub Arc<Streams>);

impl PartialEq for Channel {
    fn eq(&self, other: &Channel) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Channel {}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Channel")
    }
}

/// The files as one guest has them.
pub(crate) struct ChannelFiles {
    streams: Arc<Streams>,
    /// What requests wait for: nodes.
    waits: Vec<u64>,
}

impl ChannelFiles {
    pub fn new(channel: &Channel) -> ChannelFiles {
        ChannelFiles { streams: channel.0.clone(), waits: vec![] }
    }

    fn stream(&self, node: u64) -> Answer<BorrowedFd<'_>> {
        match node {
            INPUT => Ok(self.streams.input.as_fd()),
            OUTPUT => Ok(self.streams.output.as_fd()),
            ERROR => Ok(self.streams.error.as_fd()),
            _ => Err(Errno::BADF),
        }
    }

    /// The bytes that a pipe took or gave, or none for now.
    fn passed(&mut self, node: u64, result: rustix::io::Result<usize>) -> Answer<Option<u32>> {
        match result {
            Ok(length) => Ok(Some(length as u32)),
            Err(HostErrno::AGAIN | HostErrno::INTR) => {
                if !self.waits.contains(&node) {
                    self.waits.push(node);
                }
                Ok(None)
            }
            Err(error) => Err(super::nodes::errno(error)),
        }
    }
}

impl Waits for ChannelFiles {
    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let source = |node: &u64| {
            let flags = if *node == INPUT { PollFlags::IN } else { PollFlags::OUT };
            self.stream(*node).map(|stream| (stream, flags)).ok()
        };
        self.waits.iter().filter_map(source).collect()
    }

    fn look_again(&mut self) {
        self.waits.clear();
    }
}

impl Files for ChannelFiles {
    fn lasting(&self) -> Duration {
        Duration::from_secs(3600)
    }

    fn reset(&mut self) {
        self.waits.clear();
    }

    fn lookup(&mut self, parent: u64, name: Name) -> Answer<Entry> {
        let place = NAMES.iter().position(|known| *known == name.bytes());
        let node = place.filter(|_| parent == ROOT).map(|place| INPUT + place as u64).ok_or(Errno::NOENT)?;
        Ok(Entry { node, attributes: self.attributes(node, None)? })
    }

    fn forget(&mut self, _: u64, _: u64) {}

    fn attributes(&mut self, node: u64, _: Option<u64>) -> Answer<Attributes> {
        let mode = match node {
            ROOT => libc::S_IFDIR | 0o555,
            INPUT..=STATUS => libc::S_IFREG | 0o600,
            _ => return Err(Errno::BADF),
        };
        Ok(Attributes { inode: node, mode, links: 1, block_size: 4096, ..Attributes::default() })
    }

    fn open(&mut self, node: u64, _: u32, _: bool) -> Answer<Opened> {
        self.attributes(node, None)?;
        Ok(Opened { handle: node, keep: false, stream: node != ROOT })
    }

    fn close(&mut self, _: u64) -> Answer<()> {
        Ok(())
    }

    fn read(&mut self, handle: u64, _: u64, data: &Data) -> Answer<Option<u32>> {
        if handle != INPUT {
            return Err(Errno::BADF);
        }
        let mut bytes = vec![0; (total(data.pieces) as usize).min(CHUNK)];
        let result = rustix::io::read(self.stream(INPUT)?, &mut bytes);
        if let Ok(length) = result {
            // The device reports what it may have written.
            scatter(data.memory, data.pieces, &bytes[..length], &|_, _| {});
        }
        self.passed(INPUT, result)
    }

    fn write(&mut self, handle: u64, _: u64, data: &Data) -> Answer<Option<u32>> {
        let length = total(data.pieces);
        if handle == STATUS && length > STATUS_MAX {
            return Err(Errno::INVAL);
        }
        let mut bytes = vec![0; (length as usize).min(CHUNK)];
        gather(data.memory, data.pieces, &mut bytes).ok_or(Errno::INVAL)?;
        if handle == STATUS {
            (self.streams.ended)(&String::from_utf8_lossy(&bytes));
            return Ok(Some(length as u32));
        }
        if handle == INPUT {
            return Err(Errno::BADF);
        }
        let result = rustix::io::write(self.stream(handle)?, &bytes);
        self.passed(handle, result)
    }

    fn change(&mut self, node: u64, _: &Change) -> Answer<Attributes> {
        // Opening with O_TRUNC says so.
        self.attributes(node, None)
    }

    fn read_link(&mut self, _: u64) -> Answer<Vec<u8>> {
        Err(Errno::INVAL)
    }
    fn make(&mut self, _: u64, _: Name, _: Make, _: Owner) -> Answer<Entry> {
        Err(Errno::ROFS)
    }
    fn link(&mut self, _: u64, _: u64, _: Name) -> Answer<Entry> {
        Err(Errno::ROFS)
    }
    fn remove(&mut self, _: u64, _: Name, _: bool) -> Answer<()> {
        Err(Errno::ROFS)
    }
    fn rename(&mut self, _: (u64, Name), _: (u64, Name), _: u32) -> Answer<()> {
        Err(Errno::ROFS)
    }
    fn create(&mut self, _: (u64, Name), _: u32, _: u32, _: Owner) -> Answer<(Entry, Opened)> {
        Err(Errno::ROFS)
    }
    fn list(&mut self, _: u64, _: u64, _: usize) -> Answer<Vec<Listed>> {
        Ok(vec![])
    }
    fn sync(&mut self, _: u64, _: bool) -> Answer<()> {
        Ok(())
    }
    fn allocate(&mut self, _: u64, _: u32, _: u64, _: u64) -> Answer<()> {
        Err(Errno::NOSYS)
    }
    fn seek(&mut self, _: u64, _: u64, _: u32) -> Answer<u64> {
        Err(Errno::NOSYS)
    }
    fn copy(&mut self, _: (u64, u64), _: (u64, u64), _: u64) -> Answer<u64> {
        Err(Errno::NOSYS)
    }
    fn statistics(&mut self, _: u64) -> Answer<Statistics> {
        Ok(Statistics { name_max: 255, ..Statistics::default() })
    }
}
