//! Network cards: virtio devices, with the rootless user-mode network (`anyvisor_user_net`) or a tap device of the host behind them.
//!
//! The card moves frames between its queues and a [`Link`]. A frame is taken from the link only when the guest has buffers for it, so
//! what cannot go on waits where it is: in a socket, in the tap device, in the guest.

mod config;
mod model;
mod tap;
mod user;

pub use config::{Backend, Net, is_same_card};
pub use model::NetModel;

use crate::{Error, Result};
use anyvisor_devices::state::BadState;
use anyvisor_devices::virtio::net::Header;
use rustix::event::PollFlags;
use serde_json::Value;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// Most network cards: they share a bus with all other devices.
pub const NETS_MAX: usize = 8;

/// What is at the other end of a card's cable.
trait Link: Send {
    /// The features that it lets the card offer (`virtio::net::bits`).
    fn features(&self) -> u64;

    /// The driver has set the card up, with these features.
    fn start(&mut self, features: u64);

    /// The driver has reset the card.
    fn reset(&mut self);

    /// What a snapshot needs of it.
    fn save(&mut self) -> Value {
        Value::Null
    }

    /// Takes what was saved, which is untrusted. [`Link::start`] follows.
    fn restore(&mut self, _saved: &Value) -> Result<(), BadState> {
        Ok(())
    }

    /// What becomes readable when there is something to [`Link::poll`] for or to [`Link::receive`]; the guest may have no room
    /// for that now.
    fn source(&self, has_room: bool) -> Option<(BorrowedFd<'_>, PollFlags)>;

    /// When there is at the latest.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Looks what has happened outside.
    fn poll(&mut self, now: Instant);

    /// Sends a frame of the guest's; what cannot be sent is lost.
    fn transmit(&mut self, header: &Header, frame: &[u8], now: Instant);

    /// The next frame for the guest, of at most `room` bytes. One that does not fit waits if there may be more room later.
    fn receive(&mut self, room: usize, may_grow: bool, now: Instant) -> Option<Received<'_>>;
}

/// A frame for the guest, in parts.
struct Received<'a> {
    header: Header,
    parts: [&'a [u8]; 3],
}

/// Connects the cards of `nets`.
///
/// # Errors
/// [`Error::User`]: which cannot be connected, why, and what to do.
pub fn open(nets: &[Net]) -> Result<Vec<NetModel>> {
    if nets.len() > NETS_MAX {
        return Err(Error::user(format!("--net is given {} times; a machine takes {NETS_MAX}", nets.len())));
    }
    nets.iter().enumerate().map(|(n, net)| open_one(net, net.mac_of(n))).collect()
}

/// Connects a card that comes while the machine runs and has cards with the addresses `taken`.
///
/// # Errors
/// As for [`open`].
pub fn open_another(net: &Net, taken: &[[u8; 6]]) -> Result<NetModel> {
    if taken.len() >= NETS_MAX {
        return Err(Error::user(format!("the machine has {NETS_MAX} network cards already, the most there can be")));
    }
    let net = net.beside(taken).map_err(Error::user)?;
    open_one(&net, net.mac_of(0))
}

fn open_one(net: &Net, mac: [u8; 6]) -> Result<NetModel> {
    let link: Box<dyn Link> = match &net.backend {
        Backend::User { forwards } => Box::new(user::User::open(net, mac, forwards)?),
        Backend::Tap { name } => Box::new(tap::Tap::open(name)?),
    };
    Ok(NetModel::new(net, mac, link))
}

#[cfg(test)]
mod tests;
