//! What a disk's contents are in, as the device sees it.

use anyvisor_devices::virtio::block::Action;
use anyvisor_devices::virtio::queue::Piece;
use std::io;
use std::os::fd::BorrowedFd;
use vm_memory::GuestMemoryMmap;

/// Carries out what requests ask for. Each is named by a tag below [`super::ring::DEPTH`].
pub trait Storage: Send {
    /// Begins `action`, one that is about contents, on `data`, which is RAM. Returns its end if it has ended already;
    /// others go to the host with the next [`Storage::progress`].
    fn begin(&mut self, tag: u16, action: Action, data: &[Piece], memory: &GuestMemoryMmap) -> Option<io::Result<()>>;

    /// Adds to `ended` what has ended by now, and with `wait` waits for one if any is under way.
    ///
    /// # Errors
    /// The host's: nothing that is under way will end.
    fn progress(&mut self, ended: &mut Vec<(u16, io::Result<()>)>, wait: bool) -> io::Result<()>;

    /// Becomes readable when something has ended; `None` if nothing is under way, ever.
    fn source(&self) -> Option<BorrowedFd<'_>>;

    /// Makes last all that was written. Nothing is under way.
    ///
    /// # Errors
    /// The host's.
    fn flush(&mut self) -> io::Result<()>;
}
