//! The conformance suite on this engine, translating and interpreting; and that it notices engines that are
//! broken.

use anyvisor_engine::conformance::{Bench, Outcome, cases};
use anyvisor_engine::tally::Tally;
use anyvisor_engine::{DirtyPages, Doorbells, Engine, Exit, GuestDebug, GuestIo, Kicker, Result, Vcpu, VcpuId, Vm};
use anyvisor_engine_translator::Translator;
use anyvisor_x86::{Cpuid, Msi, VcpuState};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Runs all cases; panics with all that failed.
fn all_pass(engine: &Translator) {
    let bench = Bench::new(engine, Duration::from_secs(30));
    let failed: Vec<String> = cases()
        .iter()
        .filter_map(|case| match bench.run(case) {
            Outcome::Failed(why) => Some(format!("{}: {why}", case.name)),
            Outcome::Ok | Outcome::Skipped(_) => None,
        })
        .collect();
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn translating() {
    all_pass(&Translator::new().expect("the host supports the engine"));
}

/// Every block with micro-TLB entries and every loop with its probes before it, which else only hot code gets.
#[test]
fn translating_eagerly() {
    all_pass(&Translator::eager().expect("the host supports the engine"));
}

#[test]
fn interpreting() {
    all_pass(&Translator::interpreting().expect("the host supports the engine"));
}

/// What is wrong with a [`Broken`] engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Defect {
    /// The end of level-triggered interrupts is not told.
    EoiLost,
    /// INTR of the 8259 cannot be taken back.
    IntrSticks,
    /// A state comes without its interrupt shadow.
    ShadowLost,
    /// Writes to devices of four bytes go out as two.
    WritesSplit,
    /// What devices write is not logged.
    DeviceWritesLost,
}

/// The translator engine with a defect.
struct Broken(Translator, Defect);
struct BrokenVm(Arc<dyn Vm>, Defect);
struct BrokenVcpu(Box<dyn Vcpu>, Defect);
struct BrokenIo<'a>(&'a dyn GuestIo, Defect);

impl Engine for Broken {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn supported_cpuid(&self) -> Cpuid {
        self.0.supported_cpuid()
    }
    fn create_vm(&self, memory: GuestMemoryMmap) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(BrokenVm(self.0.create_vm(memory)?, self.1)))
    }
}

impl Vm for BrokenVm {
    fn create_vcpu(&self, id: VcpuId, cpuid: &Cpuid) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(BrokenVcpu(self.0.create_vcpu(id, cpuid)?, self.1)))
    }
    fn signal_msi(&self, msi: Msi) -> Result<()> {
        self.0.signal_msi(msi)
    }
    fn set_pic_intr(&self, level: bool) -> Result<()> {
        self.0.set_pic_intr(level || self.1 == Defect::IntrSticks)
    }
    fn want_tsc_khz(&self, khz: u64) {
        self.0.want_tsc_khz(khz)
    }
    fn tsc_khz(&self) -> Result<u64> {
        self.0.tsc_khz()
    }
    fn clock(&self) -> Result<u64> {
        self.0.clock()
    }
    fn set_clock(&self, ns: u64) -> Result<()> {
        self.0.set_clock(ns)
    }
    fn log_dirty(&self, on: bool) -> Result<()> {
        self.0.log_dirty(on)
    }
    fn memory_written(&self, gpa: u64, length: u64) {
        if self.1 != Defect::DeviceWritesLost {
            self.0.memory_written(gpa, length);
        }
    }
    fn take_dirty(&self) -> Result<DirtyPages> {
        self.0.take_dirty()
    }
    fn doorbells(&self) -> Option<&dyn Doorbells> {
        self.0.doorbells()
    }
}

impl Vcpu for BrokenVcpu {
    fn run(&mut self, io: &dyn GuestIo) -> Result<Exit> {
        self.0.run(&BrokenIo(io, self.1))
    }
    fn kicker(&self) -> Kicker {
        self.0.kicker()
    }
    fn state(&mut self) -> Result<VcpuState> {
        let mut state = self.0.state()?;
        if self.1 == Defect::ShadowLost {
            state.events.interrupt_shadow = 0;
        }
        Ok(state)
    }
    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        self.0.set_state(state)
    }
    fn set_debug(&mut self, debug: &GuestDebug) -> Result<()> {
        self.0.set_debug(debug)
    }
    fn measure(&mut self, tally: Option<Arc<Tally>>) {
        self.0.measure(tally);
    }
}

impl GuestIo for BrokenIo<'_> {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.0.pio_read(port, data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.0.pio_write(port, data);
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.0.mmio_read(gpa, data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if self.1 == Defect::WritesSplit && data.len() == 4 {
            self.0.mmio_write(gpa, &data[..2]);
            return self.0.mmio_write(gpa + 2, &data[2..]);
        }
        self.0.mmio_write(gpa, data);
    }
    fn eoi(&self, vector: u8) {
        if self.1 != Defect::EoiLost {
            self.0.eoi(vector);
        }
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        self.0.acknowledge_pic()
    }
}

#[test]
fn a_broken_engine_is_noticed() {
    for (defect, group) in [
        (Defect::EoiLost, "interrupts: "),
        (Defect::IntrSticks, "interrupts: "),
        (Defect::ShadowLost, "state: "),
        (Defect::WritesSplit, "MMIO: "),
        (Defect::DeviceWritesLost, "dirty log: "),
    ] {
        let engine = Broken(Translator::interpreting().expect("the host supports the engine"), defect);
        let bench = Bench::new(&engine, Duration::from_secs(30));
        let failed = cases()
            .iter()
            .filter(|case| case.name.starts_with(group))
            .filter(|case| matches!(bench.run(case), Outcome::Failed(_)))
            .count();
        assert!(failed > 0, "{defect:?} is not noticed");
    }
}
