//! What one vCPU thread owns ([`Core`]) and what other threads reach of it ([`VcpuShared`], [`VmShared`]).

use crate::cpu::{Cpu, pending};
use crate::debugger::Debugger;
use crate::host;
use crate::mmu::Mmu;
use crate::native::Stubs;
use crate::ram::Ram;
use crate::system::steal_time::StealTime;
use crate::timer;
use crate::translate::Twins;
use crate::vendor;
use crate::windows::Windows;
use anyvisor_engine::tally::Meter;
use anyvisor_x86::lapic::{self, LocalApic};
use anyvisor_x86::{Cpuid, CpuidResult};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

/// How often somebody who waits for a vCPU looks whether it has left translated code.
const TOLD_POLL: Duration = Duration::from_micros(200);

/// How often he looks before he sleeps: a signal takes a few microseconds.
const TOLD_SPINS: u32 = 500;

/// vCPUs of a VM at most: sets of them are 64 bits.
pub const MAX_VCPUS: u32 = u64::BITS;

/// Everything shared by the vCPUs of a VM.
pub struct VmShared {
    pub ram: Arc<Ram>,
    /// vCPUs by APIC ID. Lock order: this, then a vCPU's `inbox`.
    pub vcpus: RwLock<Vec<Arc<VcpuShared>>>,
    /// Guest nanoseconds are counted from here.
    pub started: Instant,
    /// The 8259's INTR line.
    pub pic_intr: AtomicBool,
    /// Frequency of the guest's TSC in kHz, which is the host's.
    pub tsc_khz: u64,
    /// The host's TSC at `started`: the guest's TSC counts from there.
    pub tsc_started: u64,
    /// Two readings of one moment, from which kvmclock counts.
    pub clock: Mutex<ClockReference>,
    /// The vCPU that last received a lowest-priority interrupt.
    pub last_receiver: AtomicU32,
    /// Held by who alone may execute instructions ([`Core::with_bus`]).
    bus: Mutex<()>,
}

impl VmShared {
    /// A VM without vCPUs whose time starts now. `tsc_khz` is the host TSC's frequency.
    pub fn new(ram: Arc<Ram>, tsc_khz: u64) -> VmShared {
        let tsc_started = host::tsc();
        VmShared {
            ram,
            vcpus: RwLock::default(),
            started: Instant::now(),
            pic_intr: AtomicBool::new(false),
            tsc_khz,
            tsc_started,
            clock: Mutex::new(ClockReference { tsc: tsc_started, ns: 0 }),
            last_receiver: AtomicU32::new(0),
            bus: Mutex::default(),
        }
    }
}

impl VmShared {
    /// Returns once nobody holds the bus that does now.
    pub(crate) fn wait_for_bus(&self) {
        drop(self.bus());
    }

    /// It guards no data that a panic could leave half done.
    fn bus(&self) -> MutexGuard<'_, ()> {
        self.bus.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Guest time was `ns` when the host's TSC was `tsc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockReference {
    pub tsc: u64,
    pub ns: u64,
}

/// A message to a vCPU's local APIC from another thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A fixed or lowest-priority interrupt that is already routed to this vCPU.
    Interrupt {
        vector: u8,
        level: bool,
    },
    Nmi,
    Init,
    /// A start-up IPI with its vector.
    Sipi(u8),
    /// The end of the halt that it is in, or else of the next one: KVM_HC_KICK_CPU.
    Wake,
}

/// What others tell a vCPU's translator. Until it knows, translated code that is right no more may still run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// So many bytes from a guest-physical address on have been written, and there is translated code of them.
    CodeWritten(u64, u32),
    /// Code is made of the page at this guest-physical address: nobody may write to it unseen.
    CodeMade(u64),
}

/// The part of a vCPU that any thread may touch.
pub struct VcpuShared {
    pub id: u32,
    cpu: NonNull<Cpu>,
    /// Waiting in `wait`, so that a wake-up is needed.
    asleep: AtomicU32,
    /// The thread that may be in translated code, which takes a signal to notice anything; else 0.
    running: AtomicI32,
    pub inbox: Mutex<Vec<Message>>,
    /// What the vCPU does not know yet.
    notices: Mutex<Vec<Notice>>,
    told: Condvar,
    /// The thread is in translated code, or in what that has called. It looks at `pending` before.
    inside: AtomicBool,
    /// The thread executes instructions. It looks at `pending` before.
    busy: AtomicBool,
    /// The [`lapic::Address`] of the vCPU's APIC, packed; senders match destinations against it.
    address: AtomicU64,
}

// SAFETY: other threads touch only `pending` of the block, which is atomic; the rest belongs to the one
// thread that holds the `CpuBox`.
unsafe impl Send for VcpuShared {}
// SAFETY: as above.
unsafe impl Sync for VcpuShared {}

impl VcpuShared {
    /// Makes a vCPU block and the owner's handle to it.
    pub fn new(id: u32) -> (Arc<VcpuShared>, CpuBox) {
        let cpu = Cpu::allocate();
        let shared = Arc::new(VcpuShared {
            id,
            cpu,
            asleep: AtomicU32::new(0),
            running: AtomicI32::new(0),
            inbox: Mutex::new(Vec::new()),
            notices: Mutex::default(),
            told: Condvar::new(),
            inside: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            address: AtomicU64::new(0),
        });
        let owner = CpuBox { shared: shared.clone() };
        (shared, owner)
    }

    pub(crate) fn pending(&self) -> &AtomicU32 {
        // SAFETY: the block lives as long as self; only the atomic field is borrowed, through a raw
        // projection, so this never aliases the owner's `&mut Cpu` on other fields.
        unsafe { &*std::ptr::addr_of!((*self.cpu.as_ptr()).pending) }
    }

    /// Sets bits of [`Cpu::pending`], and wakes the vCPU if it sleeps or gets it out of translated code.
    /// Async-signal-safe.
    pub fn notify(&self, bits: u32) {
        self.pending().fetch_or(bits, Ordering::SeqCst);
        let thread = self.running.load(Ordering::SeqCst);
        if thread != 0 {
            timer::interrupt(thread);
        }
        if self.asleep.load(Ordering::SeqCst) != 0 {
            // SAFETY: futex wake on an address that lives as long as self.
            unsafe {
                libc::syscall(libc::SYS_futex, self.pending().as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1);
            }
        }
    }

    /// Notes that the calling thread is about to run translated code, or (0) has left it.
    pub(crate) fn set_running(&self, thread: libc::pid_t) {
        self.running.store(thread, Ordering::SeqCst);
    }

    /// Whether its thread is between two looks at `pending`.
    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst) != 0
    }

    /// Queues a message for the vCPU's APIC.
    pub fn send(&self, message: Message) {
        self.inbox.lock().unwrap().push(message);
        self.notify(pending::EVENT);
    }

    /// Tells the vCPU, which knows before it is in translated code again. See [`VcpuShared::wait_until_told`].
    pub fn tell(&self, notices: impl IntoIterator<Item = Notice>) {
        let mut queue = self.notices.lock().unwrap();
        let knows_of_some = !queue.is_empty();
        queue.extend(notices);
        if knows_of_some {
            // A signal for each of very many would leave it no time to look.
            return;
        }
        self.pending().fetch_or(pending::CODE, Ordering::SeqCst);
        drop(queue);
        if self.inside.load(Ordering::SeqCst) {
            timer::interrupt(self.running.load(Ordering::SeqCst));
        }
    }

    /// Returns once the vCPU executes nothing any more that what it was told speaks against. It need not know yet: what
    /// is not in translated code looks at [`Cpu::pending`] before it is.
    pub fn wait_until_told(&self) {
        for _ in 0..TOLD_SPINS {
            if !self.inside.load(Ordering::SeqCst) {
                return;
            }
            std::hint::spin_loop();
        }
        let mut notices = self.notices.lock().unwrap();
        while !notices.is_empty() && self.inside.load(Ordering::SeqCst) {
            // It may leave translated code without a word.
            notices = self.told.wait_timeout(notices, TOLD_POLL).unwrap().0;
        }
    }

    /// What the vCPU was told: its own thread's part.
    pub(crate) fn take_notices(&self) -> Vec<Notice> {
        let taken = std::mem::take(&mut *self.notices.lock().unwrap());
        self.told.notify_all();
        taken
    }

    /// Notes that its thread is about to be in translated code. `false` if it must not be: something is pending.
    pub(crate) fn enter(&self) -> bool {
        self.inside.store(true, Ordering::SeqCst);
        if self.pending().load(Ordering::SeqCst) != 0 {
            self.leave();
            return false;
        }
        true
    }

    /// Notes that its thread has left translated code.
    pub(crate) fn leave(&self) {
        self.inside.store(false, Ordering::SeqCst);
    }

    /// Notes that its thread is about to execute instructions. `false` if it must not: somebody wants the bus.
    pub(crate) fn begin(&self) -> bool {
        self.busy.store(true, Ordering::SeqCst);
        if self.pending().load(Ordering::SeqCst) & pending::BUS != 0 {
            self.end();
            return false;
        }
        true
    }

    /// Notes that its thread executes no instructions, or waits in the middle of one before it has accessed anything.
    pub(crate) fn end(&self) {
        self.busy.store(false, Ordering::SeqCst);
    }

    /// How the vCPU's APIC is addressed.
    pub fn address(&self) -> lapic::Address {
        let packed = self.address.load(Ordering::Acquire);
        lapic::Address {
            id: (packed >> 40) as u32,
            ldr: packed as u32,
            dfr: (packed >> 32) as u32 & 0xf,
            enabled: packed >> 36 & 1 != 0,
            x2apic: packed >> 37 & 1 != 0,
        }
    }

    /// Publishes how the vCPU's APIC is addressed from now on.
    pub fn set_address(&self, address: lapic::Address) {
        let packed = u64::from(address.ldr)
            | u64::from(address.dfr) << 32
            | u64::from(address.enabled) << 36
            | u64::from(address.x2apic) << 37
            | u64::from(address.id) << 40;
        self.address.store(packed, Ordering::Release);
    }

    /// Sleeps until a bit of `pending` is set, or for `timeout_ns`.
    pub fn wait(&self, timeout_ns: Option<u64>) {
        self.asleep.store(1, Ordering::SeqCst);
        let timeout = timeout_ns
            .map(|ns| libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 });
        let timeout_ptr = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: futex wait while `pending` is 0, on an address that lives as long as self.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.pending().as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                0,
                timeout_ptr,
            );
        }
        self.asleep.store(0, Ordering::SeqCst);
    }
}

impl Drop for VcpuShared {
    fn drop(&mut self) {
        // SAFETY: the block came from `allocate` in `new`, and the last handle is gone.
        unsafe { Cpu::free(self.cpu) };
    }
}

/// The owning thread's handle to its vCPU block. There is exactly one for each [`VcpuShared`].
pub struct CpuBox {
    shared: Arc<VcpuShared>,
}

impl Deref for CpuBox {
    type Target = Cpu;
    fn deref(&self) -> &Cpu {
        // SAFETY: this is the only handle, so only `pending` is touched elsewhere, and that is atomic.
        unsafe { self.shared.cpu.as_ref() }
    }
}

impl DerefMut for CpuBox {
    fn deref_mut(&mut self) -> &mut Cpu {
        // SAFETY: as for `deref`.
        unsafe { &mut *self.shared.cpu.as_ptr() }
    }
}

/// Size of [`Bounce`] in bytes: the largest memory operand there is (the XSAVE area), rounded up.
pub const BOUNCE_SIZE: usize = 1024;

/// Where an instruction finds its memory operand when it runs on a copy.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; BOUNCE_SIZE]);

/// One vCPU as its own thread sees it: all that the interpreter and the system instructions work on.
pub struct Core {
    pub cpu: CpuBox,
    pub ram: Arc<Ram>,
    pub vm: Arc<VmShared>,
    pub shared: Arc<VcpuShared>,
    pub lapic: LocalApic,
    pub mmu: Mmu,
    pub cpuid: Cpuid,
    /// Width of guest-physical addresses in bits.
    pub physical_bits: u8,
    /// NMIs that are to be delivered: one at most while another blocks them, else two, as if the first had been delivered at
    /// once.
    pub nmis_pending: u8,
    /// The next halt ends at once.
    pub woken: bool,
    /// Guest-physical ranges written that hold translated code; the translator drains it after each step.
    pub code_writes: Vec<(u64, u32)>,
    /// Nanoseconds that guest code runs at most before somebody looks where.
    pub sample_period: u64,
    /// When the micro-TLB's fills were last looked into.
    pub micro_looked: u64,
    /// A micro-TLB entry that is filled too often.
    pub micro_complaint: Option<usize>,
    /// What hot user code accesses without probes.
    pub windows: Windows,
    pub bounce: Box<Bounce>,
    /// Where translated code goes on whose shared probes do not fit.
    pub twins: Twins,
    /// Of the interpreter's vector and floating-point instructions.
    pub stubs: Stubs,
    pub clock: Clock,
    pub steal_time: StealTime,
    /// What stops this vCPU for a debugger.
    pub debugger: Debugger,
    /// What counts interceptions, and what the current one has turned out to be.
    pub meter: Meter,
    pub met: Option<&'static str>,
}

/// kvmclock's registration (Linux Documentation/virt/kvm/x86/msr.rst).
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// MSR_KVM_SYSTEM_TIME_NEW as written; bit 0 enables.
    pub system_time_msr: u64,
    /// MSR_KVM_WALL_CLOCK_NEW as written.
    pub wall_clock_msr: u64,
    /// What the vCPU's structure was last made of: the reference, and the vCPU's TSC offset.
    pub published: Option<(ClockReference, u64)>,
}

impl Core {
    /// The shortest and the longest [`Core::sample_period`].
    pub const SAMPLE_PERIODS: std::ops::Range<u64> = 250_000..8_000_000;

    pub fn new(vm: Arc<VmShared>, shared: Arc<VcpuShared>, cpu: CpuBox, cpuid: Cpuid) -> Core {
        let physical_bits = cpuid.get(0x8000_0008, 0).map_or(36, |r| (r.eax & 0xff) as u8).clamp(32, 52);
        Core {
            cpu,
            ram: vm.ram.clone(),
            lapic: LocalApic::new(shared.id, lapic_features(&cpuid, physical_bits)),
            mmu: Mmu::new(),
            vm,
            shared,
            cpuid,
            physical_bits,
            nmis_pending: 0,
            woken: false,
            code_writes: Vec::new(),
            sample_period: Self::SAMPLE_PERIODS.start,
            micro_looked: 0,
            micro_complaint: None,
            windows: Windows::default(),
            bounce: Box::new(Bounce([0; BOUNCE_SIZE])),
            twins: Twins::default(),
            stubs: Stubs::default(),
            clock: Clock::default(),
            steal_time: StealTime::default(),
            debugger: Debugger::default(),
            meter: Meter::default(),
            met: None,
        }
    }

    /// This vCPU in a set of vCPUs.
    pub fn bit(&self) -> u64 {
        1 << self.shared.id
    }

    /// Tells the vCPUs in `set`, but for this one; with `wait`, they execute nothing any more that this speaks against.
    pub fn tell_others(&self, set: u64, notice: Notice, wait: bool) {
        let vcpus = self.vm.vcpus.read().unwrap();
        let others = || vcpus.iter().filter(|vcpu| vcpu.id != self.shared.id && set >> vcpu.id & 1 != 0);
        others().for_each(|vcpu| vcpu.tell([notice]));
        if wait {
            others().for_each(|vcpu| vcpu.wait_until_told());
        }
    }

    /// Has `act` access memory while no other vCPU executes anything, as a locked access that crosses pages needs it
    /// (SDM vol. 3A 8.1.2.2). They stop at the ends of their instructions.
    pub fn with_bus<T>(&mut self, act: impl FnOnce(&mut Core) -> T) -> T {
        let vm = self.vm.clone();
        // Whoever has the bus waits for this one.
        self.shared.end();
        let _alone = vm.bus();
        self.shared.busy.store(true, Ordering::SeqCst);
        let vcpus = vm.vcpus.read().unwrap();
        let others = || vcpus.iter().filter(|vcpu| vcpu.id != self.shared.id);
        others().for_each(|vcpu| vcpu.notify(pending::BUS));
        for vcpu in others() {
            while vcpu.busy.load(Ordering::SeqCst) {
                host::give_way();
            }
        }
        drop(vcpus);
        act(self)
    }

    /// What the vCPU's local APIC has.
    pub fn lapic_features(&self) -> lapic::Features {
        lapic_features(&self.cpuid, self.physical_bits)
    }

    /// Nanoseconds of guest time: host monotonic time since the VM was made.
    pub fn now_ns(&self) -> u64 {
        self.vm.started.elapsed().as_nanos() as u64
    }

    /// The guest's TSC.
    pub fn tsc(&self) -> u64 {
        // SAFETY: RDTSC has no preconditions in user mode here (CR4.TSD is never set for us).
        unsafe { core::arch::x86_64::_rdtsc() }.wrapping_add(self.cpu.tsc_offset)
    }

    /// What CPUID shows for `leaf` and `subleaf`; zeros where the table has nothing.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        self.cpuid.get(leaf, subleaf).unwrap_or_default()
    }

    /// Whether the vCPU's CPUID names AMD or Hygon.
    pub fn is_amd(&self) -> bool {
        vendor::names_amd(self.cpuid(0, 0).ebx)
    }
}

fn lapic_features(cpuid: &Cpuid, physical_bits: u8) -> lapic::Features {
    let leaf = cpuid.get(1, 0).unwrap_or_default();
    lapic::Features { x2apic: leaf.ecx >> 21 & 1 != 0, tsc_deadline: leaf.ecx >> 24 & 1 != 0, physical_bits }
}
