//! Whether 64-bit kernel code really runs on the CPU here.
//!
//! **Problem.** A `/dev/kvm` that opens and makes VMs says little: there are page-table-based ones (PVM) on
//! hosts without VT-x and AMD-V, which run real mode and user mode, but emulate kernel mode at a few million
//! instructions a second, and not every instruction. A stock kernel does not boot there.
//!
//! **Idea.** Ask for what a kernel needs: a small VM in long mode, privilege level 0, with instructions that
//! KVM's emulator does not know (`cmpxchg16b`, `fxsave`), and then a loop whose time is compared with that of
//! the same loop here. An emulator is hundreds of times slower, an emulated host (nested in QEMU's TCG, say)
//! as slow as the loop here.

use crate::Kvm;
use anyvisor_engine::{Engine, Error, Exit, GuestIo, Kicker, VcpuId};
use anyvisor_x86::bits::{cr0, cr4, efer, gpr};
use anyvisor_x86::segment::attr;
use anyvisor_x86::{Segment, VcpuState, msr};
use std::fmt;
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Iterations of the timed loop: some 20 µs on hardware, longer than an exit takes there.
const ITERATIONS: u32 = 40_000;
/// More than this much slower than the host's loop is not native. Exits cost a nested guest a few times the loop.
const SLOWER_MAX: f64 = 20.0;
/// The best of so many rounds counts, since the host may be busy.
const ROUNDS: u32 = 3;
/// How long the whole probe may take.
const PATIENCE: Duration = Duration::from_secs(5);

const MEMORY: usize = 0x1_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;
/// Writes here say how far the guest is.
const PORT: u16 = 0x80;
const LOOP_BEGINS: u8 = 1;
const LOOP_ENDED: u8 = 2;

/// RSI = DATA, EBX = ITERATIONS.
const PROGRAM: &[u8] = &[
    0x48,
    0x0f,
    0xc7,
    0x0e, // cmpxchg16b [rsi]
    0x48,
    0x0f,
    0xae,
    0x06, // fxsave64 [rsi]
    0x48,
    0x0f,
    0xae,
    0x0e, // fxrstor64 [rsi]
    0x66,
    0x0f,
    0x6f,
    0x06, // movdqa xmm0, [rsi]
    // round:
    0xb0,
    LOOP_BEGINS, // mov al, 1
    0xe6,
    PORT as u8, // out PORT, al
    0x89,
    0xd9, // mov ecx, ebx
    0xff,
    0xc9, // loop: dec ecx
    0x75,
    0xfc, // jnz loop
    0xb0,
    LOOP_ENDED, // mov al, 2
    0xe6,
    PORT as u8, // out PORT, al
    0xeb,
    0xf0, // jmp round
];

/// Why KVM is of no use here.
#[derive(Debug)]
pub enum ProbeFailure {
    /// The VM could not be made or run.
    Host(Error),
    /// KVM gave up on the code.
    CannotRun(String),
    /// The loop took so many times as long as on the host.
    Slow(f64),
    /// It did not come to an end.
    NoEnd,
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeFailure::Host(error) => write!(f, "{error}"),
            ProbeFailure::CannotRun(why) => write!(f, "64-bit kernel code does not run in it: {why}"),
            ProbeFailure::Slow(times) => {
                write!(f, "64-bit kernel code runs {times:.0} times slower in it than on the CPU")
            }
            ProbeFailure::NoEnd => write!(f, "64-bit kernel code makes no progress in it"),
        }
    }
}

impl From<Error> for ProbeFailure {
    fn from(error: Error) -> ProbeFailure {
        ProbeFailure::Host(error)
    }
}

/// Runs the probe; on hardware it takes some milliseconds.
///
/// # Errors
/// Why the translator is the better choice.
pub fn probe(engine: &Kvm) -> std::result::Result<(), ProbeFailure> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(|e| Error::Unsupported(format!("no memory for a probe VM: {e}")))?;
    fill(&memory);
    let vm = engine.create_vm(memory)?;
    let mut vcpu = vm.create_vcpu(VcpuId(0), &engine.supported_cpuid())?;
    vcpu.set_state(&entry())?;
    let io = Watch { kicker: vcpu.kicker(), host: host_loop(), seen: Mutex::default() };
    let (done, waiting) = mpsc::channel::<()>();
    let kicker = vcpu.kicker();
    let watchdog = std::thread::spawn(move || {
        if waiting.recv_timeout(PATIENCE).is_err_and(|e| e == mpsc::RecvTimeoutError::Timeout) {
            kicker.kick();
        }
    });
    let exit = vcpu.run(&io);
    drop(done);
    // It does not panic.
    let _ = watchdog.join();
    let seen = io.seen.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    match (exit?, seen.best) {
        (Exit::Kicked, Some(best)) if best <= SLOWER_MAX => Ok(()),
        (Exit::Kicked, Some(best)) => Err(ProbeFailure::Slow(best)),
        (Exit::Kicked, None) => Err(ProbeFailure::NoEnd),
        (Exit::Shutdown, _) => Err(ProbeFailure::CannotRun("it ends in a triple fault".into())),
        (Exit::Failed(why), _) => Err(ProbeFailure::CannotRun(why)),
        (Exit::Debug(stop), _) => Err(ProbeFailure::CannotRun(format!("it stops for no debugger ({stop:?})"))),
    }
}

/// The program and its page tables: the first 2 MiB, mapped onto themselves.
fn fill(memory: &GuestMemoryMmap) {
    const TABLE: u64 = 0b11; // present, writable
    const LARGE: u64 = 1 << 7 | TABLE;
    for (at, value) in [(PML4, PDPT | TABLE), (PDPT, DIRECTORY | TABLE), (DIRECTORY, LARGE)] {
        memory.write_obj(value, GuestAddress(at)).expect("within the probe's memory");
    }
    memory.write_slice(PROGRAM, GuestAddress(CODE)).expect("within the probe's memory");
    // What cmpxchg16b leaves is what fxsave overwrites: any data does.
}

/// Long mode at privilege level 0, at the program.
fn entry() -> VcpuState {
    let mut state = VcpuState::reset(0, 0);
    let flat = |attributes| Segment { base: 0, limit: !0, attributes, selector: 8 };
    let common = attr::P | attr::S | attr::G | attr::WRITABLE | attr::ACCESSED;
    state.segments.seg = [flat(common | attr::DB); 6];
    state.segments.seg[anyvisor_x86::segment::index::CS] = flat(common | attr::CODE | attr::L);
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    state.cr3 = PML4;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.set_msr(msr::EFER, efer::LME | efer::LMA);
    state.rip = CODE;
    state.gpr = [0; 16];
    state.gpr[gpr::RSI] = DATA;
    state.gpr[gpr::RBX] = ITERATIONS.into();
    state
}

/// How long the loop takes here: the best of a few times.
fn host_loop() -> Duration {
    let once = || {
        let began = Instant::now();
        // SAFETY: counts a register down.
        unsafe {
            std::arch::asm!("2: dec {0:e}", "jnz 2b", inout(reg) ITERATIONS => _, options(nomem, nostack));
        }
        began.elapsed()
    };
    (0..ROUNDS).map(|_| once()).min().expect("some rounds").max(Duration::from_nanos(1))
}

/// Times the guest's rounds, and ends them.
struct Watch {
    kicker: Kicker,
    host: Duration,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    began: Option<Instant>,
    rounds: u32,
    /// The best round's time, relative to the host's.
    best: Option<f64>,
}

impl GuestIo for Watch {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _port: u16, data: &[u8]) {
        let now = Instant::now();
        let Ok(mut seen) = self.seen.lock() else { return };
        match (data, seen.began) {
            ([LOOP_BEGINS], _) => seen.began = Some(now),
            ([LOOP_ENDED], Some(began)) => {
                let times = (now - began).as_secs_f64() / self.host.as_secs_f64();
                seen.best = Some(seen.best.map_or(times, |best| best.min(times)));
                seen.rounds += 1;
                if times <= SLOWER_MAX || seen.rounds == ROUNDS {
                    self.kicker.kick();
                }
            }
            _ => {}
        }
    }
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn eoi(&self, _vector: u8) {}
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}
