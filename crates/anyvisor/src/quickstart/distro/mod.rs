//! `anyvisor quickstart --distro`: from nothing to a whole Debian on a disk.
//!
//! The disk is made once ([`image`]) and keeps what is changed on it. On a terminal its serial console is there, with root
//! logged in; without one the machine checks itself (`check.sh`), as plain quickstart's does. Either way ssh reaches it
//! through a port of this host's, by a configuration file that knows port and keys.

mod image;
mod sources;

use super::progress;
use crate::cli::DistroOptions;
use anyvisor_vmm::config::{Disk, Format, Net};
use anyvisor_vmm::{Config, Error, Result};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// RAM, if nothing is said.
pub const MEMORY: u64 = 1 << 30;
/// Words for the kernel's command line. Where there are no vsock devices, systemd 257 complains of them otherwise.
pub const COMMAND_LINE: &str = "root=/dev/vda systemd.ssh_auto=no";
/// More of them for a check, whose console has no login.
pub const CHECK: &str = "systemd.mask=serial-getty@ttyS0.service";

const SSH: u16 = 22;
/// This host's port that leads to ssh, if it is free.
const SSH_HERE: u16 = 2222;
/// What ssh calls the machine.
const NAME: &str = "debian";

/// Makes the machine that `options` speak of if need be, and puts it into `config`. `cache` is where machines go that were
/// given no folder.
pub fn prepare(options: &DistroOptions, cache: &Path, config: &mut Config, verbose: bool) -> Result<()> {
    let folder = match &options.folder {
        Some(folder) => std::path::absolute(folder)
            .map_err(|e| Error::user(format!("cannot use folder '{}': {e}; check --folder", folder.display())))?,
        None => {
            let suite = options.suite.clone().or_else(sources::host_suite).unwrap_or("bookworm".into());
            cache.join(format!("debian-{suite}"))
        }
    };
    let include = Some(options.include.join(",")).filter(|include| !include.is_empty());
    let wish = image::Wish { suite: options.suite.clone(), size: options.size, include };
    let net = network(options.net.as_ref())?;
    image::prepare(&folder, &wish, options.fresh, verbose)?;
    let path = |name: &str| folder.join(name);
    config.kernel = path(image::KERNEL);
    config.initrd = Some(path(image::INITRD));
    config.disks = vec![disk(path(image::DISK))];
    config.disks.extend(options.disk.iter().cloned());
    if let Some(here) = net.way_to(SSH) {
        let file = path("ssh_config");
        fs::write(&file, ssh_config(&folder, here))
            .map_err(|e| Error::user(format!("cannot write '{}': {e}; check its folder's rights", file.display())))?;
        progress(&format!("to log in: ssh -F {} {NAME}", image::quoted(&file.display().to_string())));
    }
    config.nets = vec![net];
    Ok(())
}

fn disk(path: PathBuf) -> Disk {
    Disk { path, read_only: false, format: Some(Format::Raw), direct: false, iops: None, bandwidth: None }
}

/// The network, with a way to ssh in it.
fn network(given: Option<&Net>) -> Result<Net> {
    let net = given.map_or("user".into(), Net::to_string);
    if let Some(given) = given.filter(|net| net.way_to(SSH).is_some()) {
        return Ok(given.clone());
    }
    let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).and_then(|listener| listener.local_addr());
    let port =
        free(SSH_HERE).or_else(|_| free(0)).map_err(|e| Error::host("cannot find a free port for ssh", e))?.port();
    format!("{net},fwd=tcp:{port}:{SSH}").parse().map_err(Error::User)
}

/// What makes `ssh -F FILE debian` come to the machine in `folder`, and to no other.
fn ssh_config(folder: &Path, here: SocketAddr) -> String {
    let address = match here.ip() {
        ip if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        ip => ip,
    };
    // ssh replaces what begins with a percent sign.
    let path = |name: &str| folder.join(name).display().to_string().replace('%', "%%");
    format!(
        "Host {NAME}\n  HostName {address}\n  Port {port}\n  User root\n  IdentityFile \"{key}\"\n  IdentitiesOnly yes\n  \
         HostKeyAlias {NAME}\n  UserKnownHostsFile \"{known}\"\n  StrictHostKeyChecking yes\n",
        port = here.port(),
        key = path(image::KEY),
        known = path(image::KNOWN_HOSTS),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_has_a_port_in_every_network() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let port = |net: &str| network(Some(&net.parse().unwrap())).unwrap().way_to(SSH).unwrap().port();
        assert_eq!(port(&format!("user,fwd=tcp:{taken}:22")), taken);
        assert_ne!(port("user,fwd=tcp:8080:80,mtu=1400"), 8080);
        let _holder = TcpListener::bind((Ipv4Addr::LOCALHOST, SSH_HERE));
        let other = network(None).unwrap().way_to(SSH).unwrap();
        assert!(other.ip().is_loopback() && other.port() != SSH_HERE, "{other}");
    }

    #[test]
    fn ssh_is_told_all_it_needs() {
        let text = ssh_config(Path::new("/a b/50%"), "0.0.0.0:2222".parse().unwrap());
        assert!(text.contains("HostName 127.0.0.1\n") && text.contains("Port 2222\n"), "{text}");
        assert!(text.contains("IdentityFile \"/a b/50%%/id_ed25519\"\n"), "{text}");
    }
}
