//! A port's end on the host: descriptors, which are never waited for.

use super::{Descriptor, Port, Target};
use crate::console::{Input, Output};
use crate::descriptors::{Kind, Listener, Stream};
use crate::{Error, Result};
use anyvisor_devices::virtio::console::End;
use rustix::event::epoll;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// The console's end: what the serial port has otherwise.
pub struct Screen {
    pub output: Arc<Output>,
    pub input: Arc<Input>,
}

impl End for Screen {
    fn is_open(&self) -> bool {
        true
    }

    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let mut length = 0;
        self.input.pull(|bytes| {
            length = bytes.len().min(data.len());
            data[..length].copy_from_slice(&bytes[..length]);
            length
        });
        if length == 0 { Err(ErrorKind::WouldBlock.into()) } else { Ok(length) }
    }

    /// Waits for a slow reader, as the serial port does.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        data.iter().for_each(|byte| self.output.put(*byte));
        Ok(data.len())
    }
}

/// A named port's end.
pub struct Line {
    name: String,
    number: u64,
    /// Makes clients.
    listener: Option<Listener>,
    input: Option<Stream>,
    output: Option<Stream>,
    /// The other side has gone, though there may be something left to read.
    hung: bool,
    /// Watches all lines.
    epoll: OwnedFd,
}

impl Line {
    /// The end of `port`, which is number `number` in `epoll`.
    ///
    /// # Errors
    /// [`Error::User`]: what cannot be made, and why.
    pub fn open(port: &Port, number: u64, epoll: BorrowedFd<'_>) -> Result<Line> {
        let host = |error: io::Error| Error::host(format!("cannot watch port '{}'", port.name), error);
        let epoll = epoll.try_clone_to_owned().map_err(host)?;
        let mut line =
            Line { name: port.name.clone(), number, listener: None, input: None, output: None, hung: false, epoll };
        let cannot = |path: &Path, error: io::Error| {
            Error::user(format!("cannot make '{}' for --port {}: {error}", path.display(), port.name))
        };
        match &port.target {
            Target::Socket(path) => {
                let listener = Listener::new(path).map_err(|error| cannot(path, error))?;
                line.add(listener.as_fd(), epoll::EventFlags::IN | epoll::EventFlags::ET).map_err(host)?;
                line.listener = Some(listener);
            }
            Target::File(path) => {
                let file = std::fs::File::create(path).map_err(|error| cannot(path, error))?;
                line.output = Some(Stream::new(Arc::new(file.into()), Kind::Other));
            }
            Target::Descriptors { input, output } => {
                line.input =
                    input.as_ref().map(|input| line.stream(input, OFlags::RDONLY)).transpose().map_err(host)?;
                line.output =
                    output.as_ref().map(|output| line.stream(output, OFlags::WRONLY)).transpose().map_err(host)?;
            }
        }
        Ok(line)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the guest's bytes wait for it.
    pub fn is_full(&self) -> bool {
        self.output.as_ref().is_some_and(|output| !output.ready)
    }

    /// Whether it leads to descriptors of this process.
    pub fn is_ours(&self) -> bool {
        self.listener.is_none()
    }

    /// A descriptor that somebody else may use too, to be read or written.
    fn stream(&self, descriptor: &Descriptor, access: OFlags) -> io::Result<Stream> {
        let stream = Stream::of_shared(&descriptor.0, access)?;
        let direction = if access == OFlags::RDONLY { epoll::EventFlags::IN } else { epoll::EventFlags::OUT };
        self.add(stream.as_fd(), direction | epoll::EventFlags::ET)?;
        Ok(stream)
    }

    /// Watches `fd`. What is always ready, as files are, cannot be watched.
    fn add(&self, fd: BorrowedFd<'_>, flags: epoll::EventFlags) -> io::Result<()> {
        match epoll::add(&self.epoll, fd, epoll::EventData::new_u64(self.number), flags) {
            Ok(()) | Err(Errno::PERM) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Something has happened to one of its descriptors.
    pub fn wake(&mut self, flags: epoll::EventFlags) {
        let any = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        if let Some(input) = &mut self.input {
            input.ready |= flags.intersects(epoll::EventFlags::IN | any);
        }
        if let Some(output) = &mut self.output {
            output.ready |= flags.intersects(epoll::EventFlags::OUT | any);
        }
        self.hung |= self.listener.is_some() && self.input.is_some() && flags.contains(epoll::EventFlags::HUP);
    }

    /// Takes the next client if there is none, and lets one go that has gone and whom nobody in the guest hears.
    pub fn tend(&mut self, guest_open: bool) {
        if self.hung && !guest_open {
            self.hang_up();
        }
        let Some(listener) = self.listener.as_ref().filter(|_| self.input.is_none()) else { return };
        let Some(client) = listener.accept() else { return };
        let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        if let Err(error) = self.add(client.as_fd(), edges) {
            return tracing::warn!("port '{}' cannot have a client: {error}", self.name);
        }
        let fd = Arc::new(client);
        let half = || Stream::new(fd.clone(), Kind::Socket);
        (self.input, self.output, self.hung) = (Some(half()), Some(half()), false);
    }

    fn hang_up(&mut self) {
        // Closing it takes it out of epoll.
        (self.input, self.output, self.hung) = (None, None, false);
    }
}

impl End for Line {
    fn is_open(&self) -> bool {
        self.input.is_some() || self.output.is_some()
    }

    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let Some(input) = &mut self.input else { return Err(ErrorKind::WouldBlock.into()) };
        let result = input.read(data);
        let over = match &result {
            // A client that only listens from now on is still there.
            Ok(0) if self.listener.is_some() => self.hung,
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        };
        if over && self.listener.is_some() {
            self.hang_up();
        } else if over {
            self.input = None;
        }
        match result {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some(output) = &mut self.output else { return Err(ErrorKind::BrokenPipe.into()) };
        let result = output.write(data);
        if let Err(error) = &result
            && error.kind() != ErrorKind::WouldBlock
        {
            if self.listener.is_none() && error.kind() != ErrorKind::BrokenPipe {
                tracing::warn!("what the guest writes to port '{}' is lost from here on: {error}", self.name);
            }
            // What a client said before it went is still read.
            if self.listener.is_none() {
                self.output = None;
            }
        }
        result
    }
}
