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
pub const ALL: &[Host] = &[QEMU_SVM, BOCHS_VMX];

const fn limit(pattern: &'static str, reason: &'static str) -> Limit {
    Limit { pattern, reason }
}

/// Why all user modes are left out under QEMU.
const BUSY_TSS: &str = "QEMU keeps a guest's TSS descriptor busy and then takes it for no TSS: it refuses the port that \
                        ends a case at CPL 3, and aborts at a change of stacks";

/// kvm_amd in QEMU 7.2's TCG (target/i386/tcg).
const QEMU_SVM: Host = Host {
    name: "qemu-svm",
    what: "kvm_amd in QEMU's TCG",
    limits: &[
        limit("[user]", BUSY_TSS),
        limit("[compat user]", BUSY_TSS),
        limit("[protected user]", BUSY_TSS),
        limit("[vm86]", BUSY_TSS),
    ],
};

/// kvm_intel in Bochs 2.7.
const BOCHS_VMX: Host = Host { name: "bochs-vmx", what: "kvm_intel in Bochs", limits: &[] };

/// The limit that keeps `host` from running the case called `name`.
pub fn of<'a>(host: &'a Host, name: &str) -> Option<&'a Limit> {
    host.limits.iter().find(|limit| limit.covers(name))
}
