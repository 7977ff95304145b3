//! The `kvm` engine: guest code runs on the CPU in guest mode, through Linux' `/dev/kvm`.
//!
//! **Problem.** KVM's interface is wide and grew for twenty years; the contract is narrow. What is hard is
//! what happens between the two: kicks that are never lost ([`kick`]), instructions that are never half done
//! when [`Vcpu::run`](anyvisor_engine::Vcpu::run) returns ([`vcpu`]), a state that is the same plain struct as
//! the other engine's ([`state`]), EOIs that reach the I/O APIC model ([`routes`]).
//!
//! **Idea.** KVM's "split" interrupt chips: local APICs in the kernel, where timers, IPIs and posted
//! interrupts are fast; the I/O APIC, 8259 and 8254 in the machine, the same as for the other engine. HLT
//! blocks inside the kernel.
//!
//! **What a host must have.** Linux 4.20 for the newest of [`REQUIRED`]; whether 64-bit kernel code really
//! runs on its CPU is for [`probe`] to find out.

mod cpuid;
mod debug;
mod kick;
mod probe;
mod routes;
mod state;
mod vcpu;
mod vm;

pub use probe::{ProbeFailure, probe};

use anyvisor_engine::{Engine, Error, Result, Vm};
use anyvisor_x86::Cpuid;
use kvm_bindings as kvm;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// What this engine cannot do without, by KVM's number and in words.
const REQUIRED: &[(u32, &str)] = &[
    (kvm::KVM_CAP_SPLIT_IRQCHIP, "split interrupt chips"),
    (kvm::KVM_CAP_IMMEDIATE_EXIT, "immediate exits"),
    (kvm::KVM_CAP_EXCEPTION_PAYLOAD, "exception payloads"),
    (kvm::KVM_CAP_X2APIC_API, "32-bit APIC IDs"),
    (kvm::KVM_CAP_SIGNAL_MSI, "message-signalled interrupts"),
    (kvm::KVM_CAP_VCPU_EVENTS, "vCPU events"),
    (kvm::KVM_CAP_DEBUGREGS, "debug registers"),
    (kvm::KVM_CAP_XSAVE, "XSAVE areas"),
    (kvm::KVM_CAP_ADJUST_CLOCK, "a settable clock"),
];

/// The engine: an open `/dev/kvm` that has what is needed.
pub struct Kvm {
    device: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`Error::Host`] when it cannot be opened; [`Error::Unsupported`] when it lacks something.
    pub fn new() -> Result<Kvm> {
        let device = kvm_ioctls::Kvm::new().map_err(|e| host_error("opening /dev/kvm", e))?;
        let version = device.get_api_version();
        if version != kvm::KVM_API_VERSION as i32 {
            return Err(Error::Unsupported(format!(
                "/dev/kvm speaks version {version} of its interface, not {}; use --engine translator",
                kvm::KVM_API_VERSION
            )));
        }
        for (number, name) in REQUIRED {
            if device.check_extension_raw((*number).into()) <= 0 {
                return Err(Error::Unsupported(format!(
                    "this host's KVM has no {name}; use Linux 4.20 or newer, or --engine translator"
                )));
            }
        }
        Ok(Kvm { device })
    }

    /// Whether guests can have a TSC of another frequency than the host's.
    pub fn scales_tsc(&self) -> bool {
        self.device.check_extension(kvm_ioctls::Cap::TscControl)
    }
}

impl Engine for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn supported_cpuid(&self) -> Cpuid {
        cpuid::supported(&self.device)
    }

    fn create_vm(&self, memory: GuestMemoryMmap) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(vm::KvmVm::new(&self.device, memory)?))
    }
}

/// What KVM answered to `what`.
fn host_error(what: impl Into<String>, error: kvm_ioctls::Error) -> Error {
    Error::Host { what: what.into(), source: error.into() }
}

/// As [`host_error`] for something that came out of a saved state: an invalid argument is the state's fault.
fn state_error(what: &str, error: kvm_ioctls::Error) -> Error {
    match error.errno() {
        libc::EINVAL => Error::BadState(format!("KVM does not take its {what}")),
        _ => host_error(format!("setting a vCPU's {what}"), error),
    }
}
