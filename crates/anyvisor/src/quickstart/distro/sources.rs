//! Where Debian's packages come from: as this host's apt has it, if it knows the release, else from Debian's own archive.

use std::path::Path;
use std::process::Command;

/// Debian's keys, as its package of that name has them, on other distributions too.
const KEYS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// Where apt in the guest finds services of the host's own (`--net user`).
const HOST_IN_GUEST: &str = "10.0.2.2";

/// The release that this host is of, if it is a Debian.
pub fn host_suite() -> Option<String> {
    suite_of(&std::fs::read_to_string("/etc/os-release").ok()?)
}

fn suite_of(os_release: &str) -> Option<String> {
    let value = |name: &str| {
        let found = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        found.map(|value| value.trim_matches('"').to_owned())
    };
    value("VERSION_CODENAME").filter(|_| value("ID").as_deref() == Some("debian"))
}

/// The file with Debian's keys, if this host has it.
pub fn keys() -> Option<&'static str> {
    KEYS.into_iter().find(|path| Path::new(path).is_file())
}

/// Lines for apt's sources with release `suite`, its updates and its security updates as this host has them. Empty if it
/// has them not, or has never fetched their lists.
pub fn lines(suite: &str, keys: &str) -> Vec<String> {
    let format = "$(REPO_URI) $(CODENAME) $(COMPONENT)";
    let asked = ["indextargets", "--format", format, "Created-By: Packages", "Origin: Debian"];
    let targets = output(Command::new("apt-get").args(asked)).unwrap_or_default();
    lines_of(&targets, suite, keys)
}

fn lines_of(targets: &str, suite: &str, keys: &str) -> Vec<String> {
    let wanted = [suite.to_owned(), format!("{suite}-updates"), format!("{suite}-security")];
    let mut lines: Vec<String> = vec![];
    for target in targets.lines() {
        let Ok([uri, release, component]) = <[&str; 3]>::try_from(target.split(' ').collect::<Vec<_>>()) else {
            continue;
        };
        let reachable = uri.starts_with("http://") || uri.starts_with("https://");
        let line = format!("deb [signed-by={keys}] {uri} {release} {component}");
        if reachable && wanted.iter().any(|wanted| wanted == release) && !lines.contains(&line) {
            lines.push(line);
        }
    }
    // Updates alone are no Debian.
    let complete = lines.iter().any(|line| line.split(' ').nth(3) == Some(suite));
    if complete { lines } else { vec![] }
}

/// The HTTP proxy that this host's apt uses.
pub fn proxy() -> Option<String> {
    let settings = output(Command::new("apt-config").args(["dump", "--format", "%f %v%n"])).unwrap_or_default();
    let of_apt = settings.lines().find_map(|line| line.strip_prefix("Acquire::http::Proxy ")).map(str::to_owned);
    of_apt.or_else(|| std::env::var("http_proxy").ok()).filter(|proxy| proxy.contains("://"))
}

/// What apt in the guest is to be told of the host's `proxy`.
pub fn guest_settings(proxy: &str) -> String {
    let mut proxy = proxy.to_owned();
    for name in ["127.0.0.1", "localhost"] {
        let (scheme, rest) = proxy.split_once("://").unwrap_or(("http", &proxy));
        if let Some(rest) = rest.strip_prefix(name).filter(|rest| rest.starts_with([':', '/']) || rest.is_empty()) {
            proxy = format!("{scheme}://{HOST_IN_GUEST}{rest}");
        }
    }
    format!("Acquire::http::Proxy \"{proxy}\";")
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.env("LC_ALL", "C").output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_release() {
        assert_eq!(suite_of("ID=debian\nVERSION_CODENAME=trixie\n").as_deref(), Some("trixie"));
        assert_eq!(suite_of("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n"), None);
        assert_eq!(suite_of("PRETTY_NAME=\"Debian GNU/Linux forky/sid\"\nID=debian\n"), None);
    }

    #[test]
    fn the_hosts_sources() {
        let targets = "http://a/debian/ bookworm main\nhttp://a/debian/ bookworm contrib\nhttp://s/ bookworm-security main\n\
                       http://a/debian/ bookworm main\nhttp://a/debian/ bookworm-backports main\nhttp://a/debian/ trixie main\n";
        let lines = lines_of(targets, "bookworm", "/k");
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert_eq!(lines[0], "deb [signed-by=/k] http://a/debian/ bookworm main");
        assert!(lines_of(targets, "sid", "/k").is_empty());
        assert!(lines_of("http://s/ bookworm-security main\n", "bookworm", "/k").is_empty());
        assert!(lines_of("file:/srv/debian/ bookworm main\ncdrom\n", "bookworm", "/k").is_empty());
    }

    #[test]
    fn a_proxy_on_this_host_is_elsewhere_for_the_guest() {
        for (host, guest) in [
            ("http://127.0.0.1:3142", "http://10.0.2.2:3142"),
            ("http://localhost:3142/", "http://10.0.2.2:3142/"),
            ("http://localhost.example:3142", "http://localhost.example:3142"),
        ] {
            assert_eq!(guest_settings(host), format!("Acquire::http::Proxy \"{guest}\";"));
        }
    }
}
