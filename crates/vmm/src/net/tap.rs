//! A tap device of the host's behind a card (Linux Documentation/networking/tuntap.rst): frames with virtio's header, large ones
//! uncut.
//!
//! The interface must be there already: whoever may make one decides who may use it. The only unsafe code is the ioctls that
//! attach to it and set it up.
#![allow(unsafe_code)]

use super::{Link, Received};
use crate::{Error, Result};
use anyvisor_devices::virtio::net::{FRAME_MAX, HEADER, Header, bits};
use rustix::event::PollFlags;
use rustix::io::Errno;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

const DEVICE: &str = "/dev/net/tun";
/// Requests (Linux uapi if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;
/// Flags of an interface: Ethernet, several queues, no header of tun's own, virtio's header.
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// What the guest takes uncut.
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;

pub(super) struct Tap {
    file: File,
    /// A header and a frame.
    buffer: Vec<u8>,
    /// Bytes of the frame that waits for room in the guest.
    waiting: Option<usize>,
}

/// `struct ifreq` with flags.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Attaches to the interface called `name`, with more `flags`.
fn attach(file: &File, name: &str, flags: u16) -> std::io::Result<()> {
    let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads and writes a struct ifreq, which `Request` has the size and layout of.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

impl Tap {
    /// Attaches to the interface called `name`.
    ///
    /// # Errors
    /// [`Error::User`]: why that cannot be, and what to do.
    pub fn open(name: &str) -> Result<Tap> {
        let trouble = |what: &str| Error::user(format!("--net tap={name}: {what}"));
        let exists = CString::new(name).is_ok_and(|name| {
            // SAFETY: it reads a string that ends with a zero.
            unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
        });
        if !exists {
            return Err(trouble(&format!(
                "this host has no interface '{name}'; make one, as root: ip tuntap add dev {name} mode tap user USER"
            )));
        }
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
        let file = file.map_err(|error| trouble(&format!("cannot open {DEVICE}: {error}; check its rights")))?;
        // One that was made for several queues is attached to as such only.
        let attached = match attach(&file, name, 0) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => attach(&file, name, IFF_MULTI_QUEUE),
            attached => attached,
        };
        if let Err(error) = attached {
            let what = match error.raw_os_error() {
                Some(libc::EBUSY) => "another program has it; end that".to_owned(),
                Some(libc::EPERM) => format!("it is not yours; as root: ip tuntap add dev {name} mode tap user USER"),
                Some(libc::EINVAL) => format!("interface '{name}' is not a tap device; choose another"),
                _ => format!("cannot attach to it: {error}"),
            };
            return Err(trouble(&what));
        }
        let size = HEADER as libc::c_int;
        let yes: libc::c_int = 1;
        // SAFETY: both requests read an int.
        let set = unsafe {
            libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) >= 0
                && libc::ioctl(file.as_raw_fd(), TUNSETVNETLE, &raw const yes) >= 0
        };
        if !set {
            let error = std::io::Error::last_os_error();
            return Err(Error::host(format!("--net tap={name}: cannot have frames with virtio's header"), error));
        }
        let mut tap = Tap { file, buffer: vec![0; HEADER + FRAME_MAX], waiting: None };
        tap.set_offload(0);
        Ok(tap)
    }

    /// Says what the guest takes uncut. Kernels from 2.6.27 on can all that is asked for.
    fn set_offload(&mut self, offload: libc::c_ulong) {
        // SAFETY: the request takes a number.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, offload) } < 0 {
            tracing::warn!("a tap device does not take offloads: {}", std::io::Error::last_os_error());
        }
    }
}

impl Link for Tap {
    fn features(&self) -> u64 {
        let four = bits::GUEST_TSO4 | bits::HOST_TSO4;
        bits::CHECKSUM | bits::GUEST_CHECKSUM | four | bits::GUEST_TSO6 | bits::HOST_TSO6
    }

    fn start(&mut self, features: u64) {
        let takes = |bit, flag| if features & bit != 0 { flag } else { 0 };
        // Large segments have no checksums.
        self.set_offload(match takes(bits::GUEST_CHECKSUM, TUN_F_CSUM) {
            0 => 0,
            sums => sums | takes(bits::GUEST_TSO4, TUN_F_TSO4) | takes(bits::GUEST_TSO6, TUN_F_TSO6),
        });
    }

    fn reset(&mut self) {
        self.waiting = None;
        self.set_offload(0);
    }

    fn source(&self, has_room: bool) -> Option<(BorrowedFd<'_>, PollFlags)> {
        (has_room && self.waiting.is_none()).then(|| (self.file.as_fd(), PollFlags::IN))
    }

    fn poll(&mut self, _now: Instant) {}

    fn transmit(&mut self, header: &Header, frame: &[u8], _now: Instant) {
        // An interface that is down or full loses frames, as a wire does.
        let _ = rustix::io::writev(&self.file, &[IoSlice::new(&header.bytes(0)), IoSlice::new(frame)]);
    }

    fn receive(&mut self, room: usize, may_grow: bool, _now: Instant) -> Option<Received<'_>> {
        loop {
            let length = match self.waiting.take() {
                Some(length) => length,
                None => match rustix::io::read(&self.file, &mut self.buffer[..]) {
                    Ok(count) => count.checked_sub(HEADER)?,
                    Err(Errno::INTR) => continue,
                    Err(_) => return None,
                },
            };
            if length > room {
                if may_grow {
                    self.waiting = Some(length);
                    return None;
                }
                continue;
            }
            let header = self.buffer[..HEADER].try_into().expect("it has that size");
            // What the kernel makes no sense with is dropped as the guest's would be.
            let Some(header) = Header::of_host(header, length) else { continue };
            return Some(Received { header, parts: [&self.buffer[HEADER..HEADER + length], &[], &[]] });
        }
    }
}
