//! What `--net` says.

use crate::config::parse_rate;
use anyvisor_user_net::{Forward, MTU_MIN, Protocol};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// What a card reports as its largest IP packet if nothing is said.
const MTU: u16 = 1500;
/// Of the first card that is given no address; locally administered, as QEMU's users know them.
const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
/// Bytes of an interface's name (Linux uapi `IFNAMSIZ`, with its end).
const NAME_MAX: usize = 15;

/// A network card and what it is connected to.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Net {
    pub backend: Backend,
    pub mac: Option<[u8; 6]>,
    pub mtu: u16,
    /// Most bytes and frames a second, in each direction.
    pub bandwidth: Option<u64>,
    pub frames: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The host's sockets.
    User { forwards: Vec<Forward> },
    /// An interface of the host that exists.
    Tap { name: String },
}

impl Net {
    /// The address of card number `n`.
    pub fn mac_of(&self, n: usize) -> [u8; 6] {
        if let Some(mac) = self.mac {
            return mac;
        }
        let mut mac = MAC;
        if let Backend::Tap { name } = &self.backend {
            // Other VMs may be on the same bridge: their interfaces have other names (FNV-1a).
            let hash =
                name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
            mac[3..].copy_from_slice(&hash.to_be_bytes()[1..]);
        }
        mac[5] = mac[5].wrapping_add(n as u8);
        mac
    }

    /// This card with an address that no other has of a VM whose cards have the addresses `taken`.
    ///
    /// # Errors
    /// One line: it is to have one of those.
    pub fn beside(&self, taken: &[[u8; 6]]) -> Result<Net, String> {
        if self.mac.is_some_and(|mac| taken.contains(&mac)) {
            return Err(format!("--net {self}: another card of the VM has that mac; choose another"));
        }
        // One more than are taken.
        let mac = (0..=taken.len()).map(|n| self.mac_of(n)).find(|mac| !taken.contains(mac));
        Ok(Net { mac: Some(mac.expect("a VM has few cards")), ..self.clone() })
    }

    /// The host's address that leads to the guest's TCP `port`.
    pub fn way_to(&self, port: u16) -> Option<SocketAddr> {
        let Backend::User { forwards } = &self.backend else { return None };
        forwards.iter().find(|way| way.protocol == Protocol::Tcp && way.port == port).map(|way| way.host)
    }
}

/// Whether a guest that had card number `n` as `saved` can go on with it as `given`: it sees the same, whatever is behind it.
pub fn is_same_card(n: usize, given: &Net, saved: &Net) -> bool {
    let kind = |net: &Net| matches!(net.backend, Backend::User { .. });
    (kind(given), given.mac_of(n), given.mtu) == (kind(saved), saved.mac_of(n), saved.mtu)
}

impl FromStr for Net {
    type Err = String;

    /// `user` or `tap=NAME`, and options behind commas: `fwd=`, `mac=`, `mtu=`, `bw=`, `pps=`.
    fn from_str(text: &str) -> Result<Net, String> {
        let mut parts = text.split(',');
        let backend = match parts.next().unwrap_or_default().split_once('=') {
            None if text.split(',').next() == Some("user") => Backend::User { forwards: Vec::new() },
            Some(("tap", name)) if (1..=NAME_MAX).contains(&name.len()) => Backend::Tap { name: name.to_owned() },
            Some(("tap", name)) => {
                return Err(format!("'{name}' is no name of an interface: 1 to {NAME_MAX} bytes; write tap=NAME"));
            }
            _ => return Err(format!("unknown network '{text}'; use user or tap=NAME, and options behind commas")),
        };
        let mut net = Net { backend, mac: None, mtu: MTU, bandwidth: None, frames: None };
        for part in parts {
            let Some((name, value)) = part.split_once('=') else {
                return Err(format!("unknown option '{part}' of a network; use fwd=, mac=, mtu=, bw= or pps="));
            };
            match (name, &mut net.backend) {
                ("fwd", Backend::User { forwards }) => forwards.push(value.parse()?),
                ("fwd", Backend::Tap { .. }) => {
                    return Err(format!(
                        "fwd={value} goes with --net user; a tap device is reached by the host itself"
                    ));
                }
                ("mac", _) => net.mac = Some(parse_mac(value)?),
                ("mtu", _) => {
                    let mtu = value.parse().ok().filter(|mtu| *mtu >= MTU_MIN);
                    net.mtu = mtu.ok_or_else(|| format!("bad mtu '{value}'; use {MTU_MIN} to {}", u16::MAX))?;
                }
                ("bw", _) => net.bandwidth = Some(parse_rate("bw", value)?),
                ("pps", _) => net.frames = Some(parse_rate("pps", value)?),
                _ => return Err(format!("unknown option '{name}' of a network; use fwd=, mac=, mtu=, bw= or pps=")),
            }
        }
        Ok(net)
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("bad mac '{text}'; write six bytes such as 52:54:00:12:34:56, the first one even");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    // The lowest bit of the first byte is for groups.
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] { Err(wrong()) } else { Ok(mac) }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.backend {
            Backend::User { forwards } => {
                write!(f, "user")?;
                forwards.iter().try_for_each(|forward| write!(f, ",fwd={forward}"))?;
            }
            Backend::Tap { name } => write!(f, "tap={name}")?,
        }
        if let Some([a, b, c, d, e, g]) = self.mac {
            write!(f, ",mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")?;
        }
        if self.mtu != MTU {
            write!(f, ",mtu={}", self.mtu)?;
        }
        self.bandwidth.map_or(Ok(()), |rate| write!(f, ",bw={rate}"))?;
        self.frames.map_or(Ok(()), |rate| write!(f, ",pps={rate}"))
    }
}

impl TryFrom<String> for Net {
    type Error = String;
    fn try_from(text: String) -> Result<Net, String> {
        text.parse()
    }
}

impl From<Net> for String {
    fn from(net: Net) -> String {
        net.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_parse() {
        for text in [
            "user",
            "user,fwd=tcp:127.0.0.1:2222:22,fwd=udp:0.0.0.0:53:53,mac=52:54:00:00:00:01,mtu=9000,bw=1048576,pps=10",
            "tap=tap0",
            "tap=tap0,mac=02:00:00:00:00:ff",
        ] {
            assert_eq!(text.parse::<Net>().map(|net| net.to_string()), Ok(text.to_owned()));
        }
        assert_eq!(
            "user,bw=10M,pps=2K".parse::<Net>().map(|net| net.to_string()),
            Ok("user,bw=10485760,pps=2048".into())
        );
        for (bad, part) in [
            ("", "unknown network ''"),
            ("bridge", "unknown network 'bridge'"),
            ("user=x", "unknown network 'user=x'"),
            ("tap", "unknown network 'tap'"),
            ("tap=", "'' is no name"),
            ("tap=abcdefghijklmnop", "'abcdefghijklmnop' is no name"),
            ("tap=t,fwd=tcp:1:2", "fwd=tcp:1:2 goes with --net user"),
            ("user,fwd=tcp:1", "bad forward 'tcp:1'"),
            ("user,mac=1:2:3:4:5:6", "bad mac"),
            ("user,mac=01:00:00:00:00:00", "bad mac"),
            ("user,mac=00:00:00:00:00:00", "bad mac"),
            ("user,mtu=500", "bad mtu '500'; use 576"),
            ("user,bw=fast", "'fast'"),
            ("user,bw=0", "'0'"),
            ("user,on", "unknown option 'on'"),
            ("user,x=1", "unknown option 'x'"),
        ] {
            let message = bad.parse::<Net>().unwrap_err();
            assert!(message.contains(part) && !message.contains('\n'), "{bad}: {message}");
        }
    }

    #[test]
    fn cards_have_addresses_of_their_own() {
        let mac = |text: &str, n| text.parse::<Net>().unwrap().mac_of(n);
        assert_eq!(mac("user", 1), [0x52, 0x54, 0, 0x12, 0x34, 0x57]);
        assert_eq!(mac("user,mac=02:00:00:00:00:ff", 1), [2, 0, 0, 0, 0, 0xff]);
        assert_ne!(mac("tap=tap0", 0), mac("tap=tap1", 0));
        assert_eq!(mac("tap=tap0", 0), mac("tap=tap0", 0));
        let beside = |text: &str, taken: &[[u8; 6]]| text.parse::<Net>().unwrap().beside(taken);
        let shown = |text: &str, taken: &[[u8; 6]]| beside(text, taken).map(|net| net.to_string());
        let (first, second, third) = (mac("user", 0), mac("user", 1), mac("user", 2));
        for (text, taken, expected) in [
            ("user,fwd=tcp:1:2", &[][..], "user,fwd=tcp:127.0.0.1:1:2,mac=52:54:00:12:34:56"),
            ("user", &[mac("tap=t", 0), first], "user,mac=52:54:00:12:34:57"),
            ("user", &[third, first], "user,mac=52:54:00:12:34:57"),
            ("user", &[second], "user,mac=52:54:00:12:34:56"),
            ("user", &[second, third, first], "user,mac=52:54:00:12:34:59"),
            ("user,mac=02:00:00:00:00:ff", &[first], "user,mac=02:00:00:00:00:ff"),
        ] {
            assert_eq!(shown(text, taken), Ok(expected.to_owned()), "{taken:x?}");
        }
        assert_eq!(beside("tap=t", &[mac("tap=t", 0)]).map(|net| net.mac), Ok(Some(mac("tap=t", 1))));
        let message = shown("user,mac=52:54:00:12:34:57", &[first, second]).unwrap_err();
        assert!(message.contains("mac=52:54:00:12:34:57: another card") && !message.contains('\n'), "{message}");
        let same = |given: &str, saved: &str| is_same_card(0, &given.parse().unwrap(), &saved.parse().unwrap());
        assert!(same("user,fwd=tcp:1:2,bw=9", "user") && same("user,mac=52:54:00:12:34:56", "user"));
        assert!(!same("user,mtu=9000", "user") && !same("tap=t,mac=52:54:00:12:34:56", "user"));
    }
}
