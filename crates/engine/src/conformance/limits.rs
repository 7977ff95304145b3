//! What a host, or an emulator of hardware virtualization, is known not to be able to run: by name, with a
//! reason for each. Anything that is not listed here must pass.

/// Cases that a host cannot run.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// Part of the case's name.
    pub pattern: &'static str,
    pub reason: &'static str,
}

impl Limit {
    /// Whether this is about the case called `name`.
    pub fn covers(&self, name: &str) -> bool {
        name.contains(self.pattern)
    }
}

/// A host with its limits.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// As on the runner's command line.
    pub name: &'static str,
    pub what: &'static str,
    pub limits: &'static [Limit],
}

/// All hosts that have limits.
pub const ALL: &[Host] = &[];

/// The limit that keeps `host` from running the case called `name`.
pub fn of<'a>(host: &'a Host, name: &str) -> Option<&'a Limit> {
    host.limits.iter().find(|limit| limit.covers(name))
}
