//! Descriptors of the host that devices read and write without ever waiting for them, and sockets that make some.

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most bytes that are written at once to what might block: what a pipe that can be written to at all takes (pipe(7)).
const ATOMIC: usize = 4096;

/// A socket that is listened to, whose file goes with it.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// A socket at `path`, where one that nobody listens to any more may be.
    ///
    /// # Errors
    /// The host's; or what is there already.
    pub fn new(path: &Path) -> io::Result<Listener> {
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                if UnixStream::connect(path).is_ok() {
                    return Err(io::Error::other("another program listens there"));
                }
                if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                    return Err(io::Error::other("there is a file that is no socket"));
                }
                std::fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            result => result,
        }?;
        socket.set_nonblocking(true)?;
        Ok(Listener { socket, path: path.to_owned() })
    }

    /// The next client, if one waits.
    pub fn accept(&self) -> Option<OwnedFd> {
        rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC).ok()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One direction of a descriptor, which is never waited for.
pub struct Stream {
    fd: Arc<OwnedFd>,
    kind: Kind,
    /// It has not said yet that it would block. Whoever watches it sets this.
    pub ready: bool,
}

/// How a descriptor is kept from blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asked by each call not to block.
    Socket,
    /// Does not block.
    Other,
    /// Might block: it is asked first whether it would.
    Blocking,
}

impl Stream {
    pub fn new(fd: Arc<OwnedFd>, kind: Kind) -> Stream {
        Stream { fd, kind, ready: true }
    }

    /// A descriptor that others may use too, to be read (`RDONLY`) or written (`WRONLY`).
    ///
    /// # Errors
    /// The host's.
    pub fn of_shared(fd: &Arc<OwnedFd>, access: OFlags) -> io::Result<Stream> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
        let (fd, kind) = match kind {
            FileType::Socket => (fd.try_clone()?, Kind::Socket),
            // Those of pipes and terminals are opened anew: not to block is a flag that all who share one have.
            FileType::Fifo | FileType::CharacterDevice => {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                match rustix::fs::open(path, flags, Mode::empty()) {
                    Ok(own) => (own, Kind::Other),
                    Err(_) => (fd.try_clone()?, Kind::Blocking),
                }
            }
            _ => (fd.try_clone()?, Kind::Other),
        };
        Ok(Stream::new(Arc::new(fd), kind))
    }

    /// Reads what there is; 0 bytes are the end.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if there is nothing, or no room, now; or the host's.
    pub fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.try_to(|fd, kind| match kind {
            Kind::Socket => rustix::net::recv(fd, &mut *data, RecvFlags::DONTWAIT).map(|(length, _)| length),
            Kind::Blocking if !would_not_block(fd, rustix::event::PollFlags::IN) => Err(Errno::AGAIN),
            _ => rustix::io::read(fd, &mut *data),
        })
    }

    /// Writes as much as there is room for, at least a byte.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if there is nothing, or no room, now; or the host's.
    pub fn write(&mut self, data: &[u8]) -> io::Result<usize> {
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

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn would_not_block(fd: BorrowedFd<'_>, flags: rustix::event::PollFlags) -> bool {
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, flags)];
    rustix::event::poll(&mut fds, Some(&Default::default())).is_ok_and(|ready| ready > 0)
}
