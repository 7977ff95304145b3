//! The contract between the machine and what executes its guest code.
//!
//! Two engines implement it: `kvm`, on hardware virtualization, and `translator`, a same-ISA binary
//! translator in host user mode. Nothing above this crate knows which one runs.
//!
//! - Port and memory-mapped I/O is a call-out ([`GuestIo`]); control is the return value ([`Exit`]). So
//!   [`Vcpu::run`] returns only at an instruction boundary, and no half-done instruction is ever visible.
//! - Exits are architectural, never a vendor's or KVM's numbers.
//! - An optional ability is an `Option<&dyn Trait>`: no capability booleans, no methods that only panic.
//! - A misbehaving guest gets what hardware would give it (an exception, all-ones reads), never an `Err`;
//!   an `Err` means that the host failed.
#![forbid(unsafe_code)]

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod linear;
pub mod memory;
pub mod tally;

use anyvisor_x86::{Cpuid, Msi, VcpuState};
use std::sync::Arc;
use tally::Tally;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// What creates VMs.
pub trait Engine: Send + Sync {
    /// `kvm` or `translator`, as on the command line.
    fn name(&self) -> &'static str;

    /// Every CPUID leaf that a vCPU on this host can be given, KVM's paravirtual ones included
    /// (Linux Documentation/virt/kvm/x86/cpuid.rst). A CPU model is a subset of it.
    fn supported_cpuid(&self) -> Cpuid;

    /// Whether guest RAM is better in files, mapped shared, than in memory of the process's own: the engine then maps
    /// parts of it again.
    fn wants_files(&self) -> bool {
        false
    }

    /// Makes a VM over `memory`, which is mapped at the guest-physical addresses it carries.
    fn create_vm(&self, memory: GuestMemoryMmap) -> Result<Arc<dyn Vm>>;
}

/// A vCPU's number in its VM; also its APIC ID. The bootstrap processor is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u32);

/// One virtual machine: memory, interrupt wires, vCPUs.
pub trait Vm: Send + Sync {
    /// Makes vCPU `id`, in the state after reset, showing `cpuid`. Its thread is the caller's business.
    fn create_vcpu(&self, id: VcpuId, cpuid: &Cpuid) -> Result<Box<dyn Vcpu>>;

    /// Delivers a message-signalled interrupt, from a device or from the IO-APIC model.
    fn signal_msi(&self, msi: Msi) -> Result<()>;

    /// Sets the level of the 8259's INTR output, wired to LINT0 of the bootstrap processor. While it is
    /// high and LINT0 accepts ExtINT, the engine asks [`GuestIo::acknowledge_pic`] for the vector.
    fn set_pic_intr(&self, level: bool) -> Result<()>;

    /// Asks that vCPUs made from now on have a TSC of `khz`, as a saved VM's had. Where the host cannot scale its own
    /// to that, they have the host's: [`Vm::tsc_khz`] tells.
    fn want_tsc_khz(&self, khz: u64);

    /// Frequency of the guest's TSC in kHz. A vCPU must have been made.
    fn tsc_khz(&self) -> Result<u64>;

    /// Nanoseconds of guest time since the VM was made: what kvmclock shows. It follows the TSC.
    fn clock(&self) -> Result<u64>;

    /// Sets guest time. No vCPU may be running; each learns of it when it runs again.
    fn set_clock(&self, ns: u64) -> Result<()>;

    /// Starts or stops logging of the pages that are written. Starting forgets what was logged. No vCPU may be
    /// running.
    fn log_dirty(&self, on: bool) -> Result<()>;

    /// Says that `length` bytes of RAM at `gpa` have been written by somebody else than a vCPU: a device, or the
    /// machine. Translations of code that was there are gone when this returns, and the pages are in the log. Devices
    /// call it after they have written and before they tell the guest so. On any thread, also while vCPUs run; the
    /// caller may hold a lock that a vCPU takes in a call-out. What is not RAM is ignored.
    fn memory_written(&self, gpa: u64, length: u64);

    /// The pages written since logging started or since the last call, by vCPUs or as [`Vm::memory_written`] was
    /// told. No vCPU may be running. Pages that were only read may be among them.
    ///
    /// # Errors
    /// Nothing is being logged, or the host failed.
    fn take_dirty(&self) -> Result<DirtyPages>;

    /// Event file descriptors that bypass the call-outs, where the engine has them.
    fn doorbells(&self) -> Option<&dyn Doorbells>;
}

/// Pages of RAM that have been written, by region. Pages are 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyPages {
    pub regions: Vec<DirtyRegion>,
}

/// One region of RAM: bit `n % 64` of word `n / 64` is page `n` from `start`, a guest-physical address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyRegion {
    pub start: u64,
    pub bitmap: Vec<u64>,
}

impl DirtyPages {
    /// Guest-physical addresses of the pages, in ascending order within each region.
    pub fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        self.regions.iter().flat_map(|region| {
            let words = region.bitmap.iter().enumerate().filter(|(_, word)| **word != 0);
            words.flat_map(move |(n, &word)| {
                let bits = (0..64).filter(move |bit| word >> bit & 1 != 0);
                bits.map(move |bit| region.start + ((64 * n as u64 + bit) << 12))
            })
        })
    }
}

/// Guest accesses and interrupts by file descriptor (KVM's ioeventfd and irqfd).
pub trait Doorbells: Send + Sync {
    /// Signals `event` on each guest write of `length` bytes to `gpa` instead of calling out.
    fn attach_write(&self, gpa: u64, length: u32, event: &EventFd) -> Result<()>;
    /// Delivers `msi` each time `event` is signalled.
    fn attach_interrupt(&self, event: &EventFd, msi: Msi) -> Result<()>;
}

/// One virtual CPU. It is driven by one thread at a time.
pub trait Vcpu: Send {
    /// Executes guest code until something needs the machine. Blocks while the guest is halted.
    fn run(&mut self, io: &dyn GuestIo) -> Result<Exit>;

    /// Makes the current or next [`Vcpu::run`] return [`Exit::Kicked`] soon; usable from any thread and
    /// from a signal handler. Kicks that arrive before `run` is entered are kept, and merge into one.
    fn kicker(&self) -> Kicker;

    /// The whole architectural state.
    fn state(&mut self) -> Result<VcpuState>;

    /// Replaces the whole architectural state. An empty `lapic` means a reset local APIC. Guest code that the
    /// host changed in memory before is seen after.
    fn set_state(&mut self, state: &VcpuState) -> Result<()>;

    /// Says what stops this vCPU for a debugger from now on; the default stops nothing and costs nothing. Guest code
    /// that the host changed in memory before is seen after.
    ///
    /// # Errors
    /// More than the engine can do here: it then stops for what it did before.
    fn set_debug(&mut self, debug: &GuestDebug) -> Result<()>;

    /// Counts what intercepts guest code into `tally` from now on, or nothing. What an engine cannot see (what KVM does
    /// inside the kernel) is not counted.
    fn measure(&mut self, tally: Option<Arc<Tally>>);
}

/// What stops a vCPU with [`Exit::Debug`]. Addresses are linear, in every address space.
///
/// A vCPU that stands at a breakpoint stops there again: to go on, it is stepped without it first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Execute one instruction, or some iterations of a repeated one, and stop. Interrupts wait meanwhile, unless
    /// the vCPU is halted: then it stops once one has woken it. Behind an exception it stops in its handler, or once
    /// that has returned.
    pub single_step: bool,
    /// Instructions before which to stop, any number. An engine may plant INT3 there as long as this is set,
    /// visible to the guest, and refuse addresses that are not mapped to RAM.
    pub software: Vec<u64>,
    /// Up to [`HARDWARE_BREAKPOINTS`], invisible to the guest. An engine may take the guest's own debug registers
    /// for them, whose breakpoints are then off.
    pub hardware: Vec<HardwareBreakpoint>,
}

/// How many [`GuestDebug::hardware`] may have: the processor's four.
pub const HARDWARE_BREAKPOINTS: usize = 4;

/// What DR0 to DR3 can do (SDM vol. 3B 18.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardwareBreakpoint {
    /// A multiple of `length`.
    pub address: u64,
    /// 1, 2, 4 or 8 bytes; 1 for [`Watch::Execute`].
    pub length: u8,
    pub watch: Watch,
}

/// What a [`HardwareBreakpoint`] stops at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Before the instruction at the address.
    Execute,
    /// After an instruction that wrote there.
    Write,
    /// After an instruction that read or wrote there.
    Access,
}

impl GuestDebug {
    /// Whether nothing stops the vCPU.
    pub fn is_off(&self) -> bool {
        !self.single_step && self.software.is_empty() && self.hardware.is_empty()
    }

    /// Refuses what no engine can do.
    ///
    /// # Errors
    /// One line about it.
    pub fn check(&self) -> Result<()> {
        if self.hardware.len() > HARDWARE_BREAKPOINTS {
            let (n, most) = (self.hardware.len(), HARDWARE_BREAKPOINTS);
            return Err(Error::Unsupported(format!("{n} hardware breakpoints; a processor has {most}")));
        }
        for breakpoint in &self.hardware {
            let HardwareBreakpoint { address, length, watch } = *breakpoint;
            let known = matches!(length, 1 | 2 | 4 | 8) && (watch != Watch::Execute || length == 1);
            if !known || !address.is_multiple_of(u64::from(length)) {
                return Err(Error::Unsupported(format!("a hardware breakpoint of {length} bytes at {address:#x}")));
            }
        }
        Ok(())
    }
}

/// Why a debugged vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Step,
    /// It stands at one of [`GuestDebug::software`].
    Software,
    /// The index in [`GuestDebug::hardware`].
    Hardware(usize),
}

/// The machine as seen from a vCPU. Called on vCPU threads, concurrently.
///
/// Data slices are 1 to 8 bytes (ports 1, 2 or 4). Addresses nobody answers read as all ones. None of
/// these may use floating point: the translator calls them with the guest's x87 state in the CPU.
pub trait GuestIo: Send + Sync {
    fn pio_read(&self, port: u16, data: &mut [u8]);
    fn pio_write(&self, port: u16, data: &[u8]);
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// The guest ended level-triggered interrupt `vector` (an EOI that a LAPIC broadcasts to IO-APICs).
    fn eoi(&self, vector: u8);
    /// An interrupt acknowledge cycle to the 8259 pair: the vector, or `None` if INTR has dropped.
    fn acknowledge_pic(&self) -> Option<u8>;
}

/// Why [`Vcpu::run`] returned. The vCPU is at an instruction boundary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A [`Kicker`] was used.
    Kicked,
    /// What [`Vcpu::set_debug`] asked for.
    Debug(Stop),
    /// A triple fault, or another shutdown event (SDM vol. 3A 6.15, interrupt 8).
    Shutdown,
    /// The engine cannot go on with this guest: what it could not do, for the user.
    Failed(String),
}

/// Gets a vCPU out of [`Vcpu::run`]; see [`Vcpu::kicker`].
#[derive(Clone)]
pub struct Kicker(Arc<dyn Kick>);

/// What an engine does to kick a vCPU. Must be async-signal-safe.
pub trait Kick: Send + Sync {
    fn kick(&self);
}

impl Kicker {
    pub fn new(kick: Arc<dyn Kick>) -> Kicker {
        Kicker(kick)
    }
    pub fn kick(&self) {
        self.0.kick();
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// A failure of the host. What was tried, on what, and what the host said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {source}")]
    Host { what: String, source: std::io::Error },
    #[error("{0}")]
    Unsupported(String),
    #[error("vCPU state refused: {0}")]
    BadState(String),
}

impl Error {
    /// The last OS error, as what `what` failed with.
    pub fn last_os(what: impl Into<String>) -> Error {
        Error::Host { what: what.into(), source: std::io::Error::last_os_error() }
    }
}
