//! A port's end on the host: descriptors, which are never waited for.

use super::{Descriptor, Port, Target};
use crate::console::{Input, Output};
use crate::{Error, Result};
use anyvisor_devices::virtio::console::End;
use rustix::event::epoll;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most bytes that are written at once to what might block: what a pipe that can be written to at all takes (pipe(7)).
const ATOMIC: usize = 4096;

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

/// A socket, whose file goes with it.
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One direction of a descriptor.
struct Stream {
    fd: Arc<OwnedFd>,
    kind: Kind,
    /// It has not said yet that it would block.
    ready: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Asked by each call not to block.
    Socket,
    /// Does not block.
    Other,
    /// Might block: it is asked first whether it would.
    Blocking,
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
                let socket = listen(path).map_err(|error| cannot(path, error))?;
                let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
                line.add(socket.as_fd(), edges).map_err(host)?;
                line.listener = Some(Listener { socket, path: path.clone() });
            }
            Target::File(path) => {
                let file = std::fs::File::create(path).map_err(|error| cannot(path, error))?;
                line.output = Some(Stream { fd: Arc::new(file.into()), kind: Kind::Other, ready: true });
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
        let fd = &descriptor.0;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
        let stream = |fd: Arc<OwnedFd>, kind| Stream { fd, kind, ready: true };
        let stream = match kind {
            FileType::Socket => stream(fd.clone(), Kind::Socket),
            // Those of pipes and terminals are opened anew: not to block is a flag that all who share one have.
            FileType::Fifo | FileType::CharacterDevice => {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                match rustix::fs::open(path, flags, Mode::empty()) {
                    Ok(own) => stream(Arc::new(own), Kind::Other),
                    Err(_) => stream(fd.clone(), Kind::Blocking),
                }
            }
            _ => stream(fd.clone(), Kind::Other),
        };
        let direction = if access == OFlags::RDONLY { epoll::EventFlags::IN } else { epoll::EventFlags::OUT };
        // The same one may be watched for the other direction already.
        let own = stream.fd.try_clone()?;
        let stream = Stream { fd: Arc::new(own), ..stream };
        self.add(stream.fd.as_fd(), direction | epoll::EventFlags::ET)?;
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
        let Ok(client) = rustix::net::accept_with(&listener.socket, SocketFlags::CLOEXEC) else { return };
        let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        if let Err(error) = self.add(client.as_fd(), edges) {
            return tracing::warn!("port '{}' cannot have a client: {error}", self.name);
        }
        let fd = Arc::new(client);
        let half = || Stream { fd: fd.clone(), kind: Kind::Socket, ready: true };
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

impl Stream {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.try_to(|fd, kind| match kind {
            Kind::Socket => rustix::net::recv(fd, &mut *data, RecvFlags::DONTWAIT).map(|(length, _)| length),
            Kind::Blocking if !would_not_block(fd, rustix::event::PollFlags::IN) => Err(Errno::AGAIN),
            _ => rustix::io::read(fd, &mut *data),
        })
    }

    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.try_to(|fd, kind| match kind {
            Kind::Socket => rustix::net::send(fd, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Kind::Blocking if !would_not_block(fd, rustix::event::PollFlags::OUT) => Err(Errno::AGAIN),
            Kind::Blocking => rustix::io::write(fd, &data[..data.len().min(ATOMIC)]),
            Kind::Other => rustix::io::write(fd, data),
        })
    }

    fn try_to(&mut self, mut act: impl FnMut(BorrowedFd<'_>, Kind) -> rustix::io::Result<usize>) -> io::Result<usize> {
        while self.ready {
            match act(self.fd.as_fd(), self.kind) {
                Err(Errno::AGAIN) => self.ready = false,
                Err(Errno::INTR) => {}
                result => return result.map_err(io::Error::from),
            }
        }
        Err(ErrorKind::WouldBlock.into())
    }
}

fn would_not_block(fd: BorrowedFd<'_>, flags: rustix::event::PollFlags) -> bool {
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, flags)];
    rustix::event::poll(&mut fds, Some(&Default::default())).is_ok_and(|ready| ready > 0)
}

/// A socket at `path`, where one that nobody listens to any more may be.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(io::Error::other("another program listens there"));
            }
            let is_socket = std::os::unix::fs::FileTypeExt::is_socket(&std::fs::symlink_metadata(path)?.file_type());
            if !is_socket {
                return Err(io::Error::other("there is a file that is no socket"));
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
