//! Ports of the host that lead to the guest.

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::str::FromStr;

/// Connections that wait to be taken.
const BACKLOG: i32 = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// One port: what comes to `host` goes to the guest's `port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forward {
    pub protocol: Protocol,
    pub host: SocketAddr,
    pub port: u16,
}

impl FromStr for Forward {
    type Err = String;

    /// `tcp:[ADDRESS:]PORT:GUESTPORT`, an IPv6 address in brackets; 127.0.0.1 by default.
    fn from_str(text: &str) -> Result<Forward, String> {
        let wrong =
            || format!("bad forward '{text}'; write tcp:[ADDRESS:]PORT:GUESTPORT or udp:[ADDRESS:]PORT:GUESTPORT");
        let (protocol, rest) = text.split_once(':').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong()),
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(wrong);
        let (address, host) = match host.rsplit_once(':') {
            Some((address, host)) => {
                let address = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
                (address.parse::<IpAddr>().map_err(|_| wrong())?, host)
            }
            None => (Ipv4Addr::LOCALHOST.into(), host),
        };
        Ok(Forward { protocol, host: SocketAddr::new(address, number(host)?), port: number(port)? })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{protocol}:{}:{}", self.host, self.port)
    }
}

/// The socket that takes what comes for a [`Forward`].
pub struct Listener {
    pub socket: OwnedFd,
    /// The guest's.
    pub port: u16,
    /// Something may be there to take.
    pub ready: bool,
}

impl Listener {
    /// Takes the host's port.
    ///
    /// # Errors
    /// The host's, such as that it is in use.
    pub fn open(forward: &Forward) -> rustix::io::Result<Listener> {
        let family = if forward.host.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = match forward.protocol {
            Protocol::Tcp => {
                let socket = socket_with(family, SocketType::STREAM, flags, None)?;
                // What an earlier VM left in TIME_WAIT is no reason to refuse.
                sockopt::set_socket_reuseaddr(&socket, true)?;
                bind(&socket, &forward.host)?;
                listen(&socket, BACKLOG)?;
                socket
            }
            Protocol::Udp => {
                let socket = socket_with(family, SocketType::DGRAM, flags, None)?;
                bind(&socket, &forward.host)?;
                socket
            }
        };
        Ok(Listener { socket, port: forward.port, ready: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_parse() {
        for (text, shown) in [
            ("tcp:2222:22", "tcp:127.0.0.1:2222:22"),
            ("udp:0.0.0.0:53:5353", "udp:0.0.0.0:53:5353"),
            ("tcp:[::1]:80:8080", "tcp:[::1]:80:8080"),
            ("tcp:::1:80:8080", "tcp:[::1]:80:8080"),
        ] {
            assert_eq!(text.parse::<Forward>().map(|forward| forward.to_string()), Ok(shown.to_owned()));
        }
        for bad in ["", "tcp", "tcp:1", "tcp:1:", "tcp:0:1", "tcp:1:65536", "sctp:1:2", "tcp:x:1:2", "tcp:1:2:3:4"] {
            let message = bad.parse::<Forward>().unwrap_err();
            assert!(message.contains(&format!("'{bad}'")) && !message.contains('\n'), "{message}");
        }
    }
}
