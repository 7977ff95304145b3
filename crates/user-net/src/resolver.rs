//! The host's name servers, from resolv.conf(5).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long what was read counts.
const FRESH: Duration = Duration::from_secs(2);

/// Which name server is asked: the next one when one does not answer.
pub struct Resolver {
    path: PathBuf,
    port: u16,
    servers: Vec<SocketAddr>,
    read: Option<Instant>,
    current: usize,
}

impl Resolver {
    /// The name servers that the file at `path` lists, on `port`.
    pub fn new(path: PathBuf, port: u16) -> Resolver {
        Resolver { path, port, servers: Vec::new(), read: None, current: 0 }
    }

    /// Whom to ask now.
    pub fn server(&mut self, now: Instant) -> SocketAddr {
        if self.read.is_none_or(|read| now > read + FRESH) {
            self.read = Some(now);
            let servers = std::fs::read_to_string(&self.path).map(|text| parse(&text, self.port)).unwrap_or_default();
            if servers != self.servers {
                (self.servers, self.current) = (servers, 0);
            }
        }
        // Without one, a name server on this host is meant (resolv.conf(5)).
        let here = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.port);
        self.servers.get(self.current % self.servers.len().max(1)).copied().unwrap_or(here)
    }

    /// The one that was asked has not answered.
    pub fn is_silent(&mut self) {
        self.current = self.current.wrapping_add(1);
    }

    /// The one that was asked has answered.
    pub fn answers(&mut self) {
        self.current %= self.servers.len().max(1);
    }
}

fn parse(text: &str, port: u16) -> Vec<SocketAddr> {
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        address.parse::<IpAddr>().ok()
    });
    lines.map(|address| SocketAddr::new(address, port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_found() {
        let text = "# nameserver 9.9.9.9\nsearch example.org\nnameserver 127.0.0.53\n nameserver ::1 \nnameserver x\nnameserver\n";
        assert_eq!(parse(text, 53), ["127.0.0.53:53".parse().unwrap(), "[::1]:53".parse().unwrap()]);
    }

    #[test]
    fn the_next_is_asked_when_one_is_silent() {
        let path = std::env::temp_dir().join(format!("anyvisor-resolver-{}", std::process::id()));
        std::fs::write(&path, "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").unwrap();
        let mut resolver = Resolver::new(path.clone(), 53);
        let mut now = Instant::now();
        assert_eq!(resolver.server(now).to_string(), "192.0.2.1:53");
        resolver.is_silent();
        assert_eq!(resolver.server(now).to_string(), "192.0.2.2:53");
        resolver.answers();
        assert_eq!(resolver.server(now).to_string(), "192.0.2.2:53");
        resolver.is_silent();
        assert_eq!(resolver.server(now).to_string(), "192.0.2.1:53");
        std::fs::remove_file(path).unwrap();
        now += FRESH * 2;
        assert_eq!(resolver.server(now).to_string(), "127.0.0.1:53");
    }
}
