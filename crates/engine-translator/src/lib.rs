//! The `translator` engine: guest code runs on the host CPU in user mode, by same-ISA binary translation.
//!
//! `vcpu` runs one vCPU: it lets [`translate`] execute blocks of translated code, [`interpret`] single
//! instructions, and [`system`] everything that is more than computing. All of them work on a [`core::Core`],
//! whose heart is the vCPU block ([`cpu::Cpu`]) that generated code reaches through GS; guest memory is
//! reached through the software TLB ([`mmu`]).

mod ahead;
pub mod code_memory;
pub mod core;
pub mod cpu;
pub mod debugger;
mod hash;
pub mod host;
pub mod interpret;
mod measure;
pub mod mmu;
pub mod native;
pub mod ram;
#[cfg(test)]
mod several_vcpus;
pub mod system;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod timer;
pub mod translate;
pub mod vcpu;
pub mod vendor;
pub mod windows;

use crate::core::{ClockReference, Core, MAX_VCPUS, Notice, VcpuShared, VmShared};
use crate::cpu::pending;
use crate::ram::Ram;
use crate::vcpu::TranslatorVcpu;
use anyvisor_engine::{DirtyPages, Doorbells, Engine, Error, Result, Vcpu, VcpuId, Vm};
use anyvisor_x86::{Cpuid, Msi, lapic};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vm_memory::GuestMemoryMmap;

/// The environment variable that, when set, makes the engine interpret every instruction: slow, and the
/// reference when translated code is in doubt.
const INTERPRET_VARIABLE: &str = "ANYVISOR_INTERPRET";

/// The environment variable that, when set, makes the engine translate everything as if it were hot.
const EAGER_VARIABLE: &str = "ANYVISOR_EAGER";

/// What becomes of guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Execution {
    /// It is translated, again if it turns out to be hot.
    Translate,
    /// It is translated as hot code from the start.
    TranslateEagerly,
    Interpret,
}

/// The engine.
pub struct Translator {
    tsc_khz: u64,
    execution: Execution,
}

impl Translator {
    /// Prepares the host: the signal handlers of native execution, and the TSC's frequency.
    ///
    /// # Errors
    /// When the host does not let this process have executable memory.
    pub fn new() -> Result<Translator> {
        native::install_signal_handlers();
        code_memory::CodeMemory::new(4096)?;
        let wants = |variable: &str| std::env::var_os(variable).is_some();
        let execution = match (wants(INTERPRET_VARIABLE), wants(EAGER_VARIABLE)) {
            (true, _) => Execution::Interpret,
            (false, true) => Execution::TranslateEagerly,
            (false, false) => Execution::Translate,
        };
        Ok(Translator { tsc_khz: host::tsc_khz(), execution })
    }

    /// As [`Translator::new`], but vCPUs interpret every instruction.
    ///
    /// # Errors
    /// As for `new`.
    pub fn interpreting() -> Result<Translator> {
        Ok(Translator { execution: Execution::Interpret, ..Translator::new()? })
    }

    /// As [`Translator::new`], but all code is translated as hot code: for tests.
    ///
    /// # Errors
    /// As for `new`.
    pub fn eager() -> Result<Translator> {
        Ok(Translator { execution: Execution::TranslateEagerly, ..Translator::new()? })
    }
}

impl Engine for Translator {
    fn name(&self) -> &'static str {
        "translator"
    }

    fn supported_cpuid(&self) -> Cpuid {
        host::supported_cpuid(self.tsc_khz)
    }

    fn wants_files(&self) -> bool {
        true
    }

    fn create_vm(&self, memory: GuestMemoryMmap) -> Result<Arc<dyn Vm>> {
        let what = || "starting the thread that has guest RAM allocated".into();
        let ram = Ram::ahead(memory).map_err(|source| Error::Host { what: what(), source })?;
        let shared = Arc::new(VmShared::new(Arc::new(ram), self.tsc_khz));
        Ok(Arc::new(TranslatorVm { shared, execution: self.execution }))
    }
}

/// One VM.
struct TranslatorVm {
    shared: Arc<VmShared>,
    execution: Execution,
}

impl TranslatorVm {
    /// Every vCPU looks pages up anew, which marks those it writes, before it executes anything.
    fn drop_write_tags(&self) {
        self.shared.vcpus.read().unwrap().iter().for_each(|vcpu| vcpu.notify(pending::FLUSH));
    }
}

impl Vm for TranslatorVm {
    fn create_vcpu(&self, id: VcpuId, cpuid: &Cpuid) -> Result<Box<dyn Vcpu>> {
        if id.0 >= MAX_VCPUS {
            return Err(Error::Unsupported(format!(
                "the translator engine runs {MAX_VCPUS} vCPUs at most; use --cpus {MAX_VCPUS}"
            )));
        }
        let (shared, cpu) = VcpuShared::new(id.0);
        {
            let mut vcpus = self.shared.vcpus.write().unwrap();
            if vcpus.iter().any(|vcpu| vcpu.id == id.0) {
                return Err(Error::Unsupported(format!("vCPU {} exists already", id.0)));
            }
            vcpus.push(shared.clone());
        }
        let core = Core::new(self.shared.clone(), shared, cpu, cpuid.clone());
        let translator = if self.execution == Execution::Interpret {
            None
        } else {
            let mut translator = translate::Translator::new(cpuid)?;
            translator.translate_eagerly(self.execution == Execution::TranslateEagerly);
            Some(translator)
        };
        Ok(Box::new(TranslatorVcpu::new(core, translator)?))
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        // A reserved delivery mode is the guest's mistake: nothing arrives.
        if let Some(message) = lapic::Message::from_msi(msi) {
            self.shared.route(&message, None);
        }
        Ok(())
    }

    fn set_pic_intr(&self, level: bool) -> Result<()> {
        self.shared.pic_intr.store(level, Ordering::SeqCst);
        if level && let Some(vcpu) = self.shared.vcpus.read().unwrap().iter().find(|vcpu| vcpu.id == 0) {
            vcpu.notify(pending::EVENT);
        }
        Ok(())
    }

    /// Guest code reads the host's TSC, moved but not scaled.
    fn want_tsc_khz(&self, _khz: u64) {}

    fn tsc_khz(&self) -> Result<u64> {
        Ok(self.shared.tsc_khz)
    }

    fn clock(&self) -> Result<u64> {
        Ok(self.shared.clock_at(host::tsc()))
    }

    fn set_clock(&self, ns: u64) -> Result<()> {
        *self.shared.clock.lock().unwrap() = ClockReference { tsc: host::tsc(), ns };
        Ok(())
    }

    fn log_dirty(&self, on: bool) -> Result<()> {
        self.shared.ram.log_dirty(on);
        self.drop_write_tags();
        Ok(())
    }

    fn memory_written(&self, gpa: u64, length: u64) {
        // Either this sees that code has been made from a page, or who makes it later sees what has been written.
        fence(Ordering::SeqCst);
        let code = self.shared.ram.written(gpa, length);
        if !code.is_empty() {
            let vcpus = self.shared.vcpus.read().unwrap();
            let notices = code.iter().map(|&(gpa, length)| Notice::CodeWritten(gpa, length));
            vcpus.iter().for_each(|vcpu| vcpu.tell(notices.clone()));
            vcpus.iter().for_each(|vcpu| vcpu.wait_until_told());
        }
    }

    fn take_dirty(&self) -> Result<DirtyPages> {
        let dirty = self.shared.ram.take_dirty();
        self.drop_write_tags();
        dirty.ok_or_else(|| Error::Unsupported("no dirty pages are being logged".to_owned()))
    }

    fn doorbells(&self) -> Option<&dyn Doorbells> {
        None
    }
}
