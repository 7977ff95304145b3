//! The reference: a case run by the host CPU in this process.
//!
//! The case's pages are mapped at its linear addresses. [`jump_into`] loads all its registers, the whole vector
//! and x87 state included, and jumps to it. Whatever ends the case is a signal (an INT3 follows the code), whose
//! frame holds the outcome: vector, error code and CR2 as the CPU reported them. The handler has the frame go
//! back to where the jump was made.
//!
//! A signal costs more than all else here, so [`Host::run`] puts a jump behind the code instead of the INT3, to where
//! the registers are saved ([`exit_stub`]), and says that the case ended with the INT3. The jump is E9 CC CC CC CC:
//! all but its first byte is as it was, so only a case that reads that byte, or comes to it otherwise than by
//! running to its end, can tell. Such a case may differ from the executors, which have the INT3; then
//! [`Host::run_exactly`] says what is right.
//!
//! While a case runs, FS does not point at Rust's thread-local storage if the case wants an FS base. So
//! the handlers touch statics only, and put FS back before they return to Rust. One executor exists at a
//! time, on the thread that made it.
//!
//! A case could in principle store anywhere in this process. The generator aims accesses at the case's
//! own pages or at unmapped ones, and no address of this process is in any register.

use crate::case::{Case, Outcome, State, Stop, X87};
use crate::layout::{
    ALL_PAGES, BACKING_BYTES, CODE, CODE_32, CODE_PAGES, DATA_BYTES, HIGH, LOW, PAGE, Pages, REGION_PAGES, backing_of,
    bits_at, copy_pages, mapped,
};
use anyhow::{Context, Result, bail};
use anyvisor_engine_translator::cpu::pending;
use anyvisor_engine_translator::native;
use anyvisor_engine_translator::translate::fault;
use std::arch::x86_64::_rdtsc;
use std::arch::{asm, naked_asm};
use std::cell::UnsafeCell;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, compiler_fence};

/// Phases of a run; see [`Shared::phase`].
const IDLE: u32 = 0;
const RUNNING: u32 = 1;

const ALT_STACK: usize = 256 * 1024;
const INT3: u8 = 0xcc;
/// JMP rel32 to where a case that has run to its end leaves; the distance looks like INT3s.
const EXIT_JUMP: [u8; 5] = [0xe9, INT3, INT3, INT3, INT3];
/// Where [`EXIT_JUMP`] at the start of the code pages leads, in either mode: in 32-bit code addresses wrap.
const EXITS: u64 = (CODE + 5).wrapping_add(0xffff_ffff_cccc_cccc);
const _: () = assert!(EXITS == (CODE_32 + 5).wrapping_add(0xcccc_cccc) & 0xffff_ffff);
/// The pages that it can lead to, and one for [`LANDING`].
const EXIT_START: u64 = EXITS & !(PAGE - 1);
const EXIT_BYTES: usize = ((CODE_PAGES + 3) * PAGE) as usize;
/// Where 32-bit cases come back to 64-bit mode.
const LANDING: u64 = EXIT_START + (CODE_PAGES + 2) * PAGE;
/// A case on the host is given up when it meets the second tick ...
const TICK_NS: i64 = 10_000_000;
/// ... and one in a guest, which is slower, after this many more.
const GUEST_TICKS: u32 = 100;
/// CPU time that a guest has for a case, at least.
pub const GUEST_NS: u64 = GUEST_TICKS as u64 * TICK_NS as u64;
const ARCH_SET_GS: i32 = 0x1001;
/// Linux's selectors for 32-bit code, and for data.
const USER_CODE_32: u16 = 0x23;
const USER_CODE: u16 = 0x33;
const USER_DATA: u16 = 0x2b;
/// The flags that user code may have, TF, ID and NT aside: they outlive a case, or end it too early.
const CASE_FLAGS: u64 = 0xcd5 | 1 << 18;

/// Offsets in the XSAVE area of a signal frame (SDM vol. 1 13.4; the kernel uses the standard format).
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
const YMM_HIGH: usize = 576;

/// libc's order of general registers in a signal frame, by encoding index.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// What the handlers and [`Host::run`] share.
struct Shared {
    phase: AtomicU32,
    /// Counts runs; `watched` is the count at the timer's last tick, which was the `ticks`th in that run.
    runs: AtomicU64,
    watched: AtomicU64,
    ticks: AtomicU32,
    swap_bases: AtomicBool,
    /// The pending word of the guest vCPU that runs now, for the watchdog to kick.
    kick: AtomicPtr<AtomicU32>,
    data: UnsafeCell<Exchange>,
}

// SAFETY: `data` is touched only by the executor's thread and by signal handlers on that thread, which
// `phase` orders; the rest is atomic.
unsafe impl Sync for Shared {}

struct Exchange {
    state: State,
    stop: Stop,
    previous: [Option<libc::sigaction>; 5],
}

/// What [`jump_into`] loads, at fixed addresses: at the end no register is left to find it by.
#[repr(C, align(64))]
struct Entry {
    /// x87, SSE and AVX state in the standard format.
    xsave: [u8; 832],
    gpr: [u64; 16],
    rflags: u64,
    /// A far pointer.
    rip: u64,
    selector: u64,
    /// Where the last jump goes.
    jump: u64,
    fs_base: u64,
    set_fs: u64,
    /// Where the handler continues: instruction and stack pointer.
    resume: u64,
    stack: u64,
    /// The bases that the process had.
    host_fs: u64,
    host_gs: u64,
    /// MXCSR as Rust wants it.
    mxcsr: u32,
    /// The case came to [`exit_stub`], which has saved its registers here and in `gpr` and `xsave`.
    direct: u32,
    end_rflags: u64,
    end_fs: u64,
    end_gs: u64,
}

#[repr(transparent)]
struct EntryCell(UnsafeCell<Entry>);

// SAFETY: as for [`Shared`].
unsafe impl Sync for EntryCell {}

static ENTRY: EntryCell = EntryCell(UnsafeCell::new(Entry {
    xsave: [0; 832],
    gpr: [0; 16],
    rflags: 0,
    rip: 0,
    selector: 0,
    jump: 0,
    fs_base: 0,
    set_fs: 0,
    resume: 0,
    stack: 0,
    host_fs: 0,
    host_gs: 0,
    mxcsr: 0x1f80,
    direct: 0,
    end_rflags: 0,
    end_fs: 0,
    end_gs: 0,
}));

const SIGNALS: [i32; 5] = [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

static SHARED: Shared = Shared {
    phase: AtomicU32::new(IDLE),
    runs: AtomicU64::new(0),
    watched: AtomicU64::new(0),
    ticks: AtomicU32::new(0),
    swap_bases: AtomicBool::new(false),
    kick: AtomicPtr::new(std::ptr::null_mut()),
    data: UnsafeCell::new(Exchange {
        state: State {
            gpr: [0; 16],
            rip: 0,
            rflags: 0,
            fs_base: 0,
            gs_base: 0,
            ymm: [[0; 32]; 16],
            mxcsr: 0,
            x87: X87 { control: 0, status: 0, tag: 0, st: [[0; 10]; 8] },
        },
        stop: Stop::Hang,
        previous: [None; 5],
    }),
};

static EXISTS: AtomicBool = AtomicBool::new(false);

/// The executor. Not `Send`: signals and FS belong to its thread.
pub struct Host {
    backing: *mut u8,
    timer: libc::timer_t,
    /// Start and end, in the backing, of the code last written, so that it can be wiped.
    written: Option<(usize, usize)>,
    /// Which image the data pages hold, but for those of `dirty`.
    image: Option<u64>,
    dirty: Pages,
    ticks: u64,
}

impl Host {
    /// Maps the layout and takes the signals.
    ///
    /// # Errors
    /// When another executor exists, or the host refuses a mapping, the timer or a handler.
    pub fn new() -> Result<Host> {
        if EXISTS.swap(true, Ordering::SeqCst) {
            bail!("one host executor at a time");
        }
        let backing = map_layout()?;
        map_exits()?;
        // SAFETY: AT_HWCAP2 bit 1 says that FSGSBASE works in user mode.
        SHARED.swap_bases.store(unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0, Ordering::SeqCst);
        take_signals()?;
        let timer = start_watchdog()?;
        Ok(Host { backing, timer, written: None, image: None, dirty: ALL_PAGES, ticks: 0 })
    }

    /// Whether cases may have FS and GS bases of their own.
    pub fn can_set_bases(&self) -> bool {
        SHARED.swap_bases.load(Ordering::SeqCst)
    }

    /// The data pages.
    pub fn data(&self) -> &[u8] {
        // SAFETY: the backing is mapped as long as self; nothing writes it while a shared borrow lives.
        unsafe { std::slice::from_raw_parts(self.backing, DATA_BYTES) }
    }

    /// TSC ticks that the last case took, with what it takes to begin and to end one.
    pub fn ticks(&self) -> u64 {
        self.ticks
    }

    /// Says which data pages the last case left other than the image has them. Without that it is any.
    pub fn set_dirty(&mut self, pages: Pages) {
        self.dirty = pages;
    }

    /// Runs `case` on memory that starts as `image` with the case's pokes over it. A case that can see that no INT3
    /// follows its code may come to another end than it should ([`Host::run_exactly`]).
    pub fn run(&mut self, case: &Case, image: &[u8]) -> Outcome {
        self.start(case, image, true)
    }

    /// As [`Host::run`], with nothing in the process that the case should not see.
    pub fn run_exactly(&mut self, case: &Case, image: &[u8]) -> Outcome {
        // SAFETY: the pages are this value's; nothing uses them between these calls.
        unsafe { protect_exits(libc::PROT_NONE) };
        let outcome = self.start(case, image, false);
        // SAFETY: as above.
        unsafe { protect_exits(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) };
        outcome
    }

    fn start(&mut self, case: &Case, image: &[u8], direct: bool) -> Outcome {
        let end = self.load(case, image, direct);
        set_selectors();
        count_run();
        // SAFETY: the handlers do not run now: phase is IDLE, and stays so until the store. The generated case
        // does not touch memory outside the backing, by the module's argument.
        unsafe {
            let entry = &mut *ENTRY.0.get();
            fill_entry(entry, &case.state);
            if SHARED.swap_bases.load(Ordering::Relaxed) {
                asm!("rdfsbase {}", out(reg) entry.host_fs, options(nomem, nostack, preserves_flags));
                asm!("rdgsbase {}", out(reg) entry.host_gs, options(nomem, nostack, preserves_flags));
                asm!("wrgsbase {}", in(reg) case.state.gs_base, options(nomem, nostack, preserves_flags));
            }
            // Handlers run on this thread: order for the compiler is enough.
            compiler_fence(Ordering::SeqCst);
            let began = _rdtsc();
            SHARED.phase.store(RUNNING, Ordering::Relaxed);
            jump_into();
            self.ticks = _rdtsc().wrapping_sub(began);
        }
        assert_eq!(SHARED.phase.load(Ordering::Relaxed), IDLE, "the case has ended");
        // SAFETY: phase is IDLE again, and `jump_into` is over.
        let (entry, data) = unsafe { (&*ENTRY.0.get(), &*SHARED.data.get()) };
        match entry.direct {
            0 => Outcome { stop: data.stop, state: data.state.clone() },
            _ => Outcome { stop: AT_INT3, state: end_state(entry, case, end) },
        }
    }

    /// Puts a case's code and memory in place, with the exit if the case is to leave by one; returns the linear
    /// address of the code's end.
    fn load(&mut self, case: &Case, image: &[u8], direct: bool) -> u64 {
        // SAFETY: the backing has BACKING_BYTES bytes, and no other reference to it lives here.
        let backing = unsafe { std::slice::from_raw_parts_mut(self.backing, BACKING_BYTES) };
        let stale = if self.image == Some(case.memory) { self.dirty } else { ALL_PAGES };
        copy_pages(&mut backing[..DATA_BYTES], image, stale);
        (self.image, self.dirty) = (Some(case.memory), ALL_PAGES);
        if let Some((start, end)) = self.written.take() {
            backing[start..end].fill(INT3);
        }
        for (address, bytes) in &case.pokes {
            let offset = backing_of(*address).expect("pokes are in data pages");
            backing[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        let start = backing_of(case.state.rip).expect("code is in code pages");
        let end = (start + case.code.len()).min(BACKING_BYTES);
        backing[start..end].copy_from_slice(&case.code[..end - start]);
        let linear = case.state.rip + (end - start) as u64;
        let jump = end..end + EXIT_JUMP.len();
        if direct && jump.end <= BACKING_BYTES {
            backing[jump.clone()].copy_from_slice(&EXIT_JUMP);
            write_exit(linear);
            self.written = Some((start, jump.end));
        } else {
            self.written = Some((start, end));
        }
        linear
    }
}

/// How a case ends that has run to its end.
const AT_INT3: Stop = Stop::Exception { vector: 3, error: 0, cr2: 0 };

/// Writes what [`EXIT_JUMP`] at linear address `from` jumps to.
fn write_exit(from: u64) {
    let at = (EXITS + from % (CODE_PAGES * PAGE)) as *mut u8;
    // SAFETY: the exits are mapped, with room behind each, and nothing else refers to them.
    unsafe {
        if bits_at(from) == 32 {
            // A far jump to 64-bit code.
            at.write(0xea);
            at.add(1).cast::<u32>().write_unaligned(LANDING as u32);
            at.add(5).cast::<u16>().write_unaligned(USER_CODE);
        } else {
            write_jump(at, exit_stub as *const () as u64);
        }
    }
}

/// JMP `[rip]`, and behind it the address to jump to.
///
/// # Safety
/// `at` has room for 14 bytes, which nothing refers to.
unsafe fn write_jump(at: *mut u8, to: u64) {
    // SAFETY: by the contract.
    unsafe {
        at.cast::<[u8; 6]>().write([0xff, 0x25, 0, 0, 0, 0]);
        at.add(6).cast::<u64>().write_unaligned(to);
    }
}

/// # Safety
/// The exits are mapped, and no case runs that needs them.
unsafe fn protect_exits(protection: i32) {
    // SAFETY: the range is the executor's own.
    let result = unsafe { libc::mprotect(EXIT_START as *mut libc::c_void, EXIT_BYTES, protection) };
    assert_eq!(result, 0, "mprotect of the exits");
}

/// The state that the INT3 at `end` would have shown.
fn end_state(entry: &Entry, case: &Case, end: u64) -> State {
    let mut state = State {
        gpr: entry.gpr,
        rip: end + 1,
        rflags: entry.end_rflags,
        fs_base: entry.end_fs,
        gs_base: entry.end_gs,
        ..State::default()
    };
    if entry.set_fs == 0 {
        (state.fs_base, state.gs_base) = (case.state.fs_base, case.state.gs_base);
    }
    // SAFETY: XSAVE has just written the area.
    unsafe { read_vectors(entry.xsave.as_ptr(), &mut state) };
    state
}

/// Gives the data segment registers what cases expect of them. The last case may have loaded them: no instruction that
/// is generated does, but one in the middle of another may.
fn set_selectors() {
    let (ds, es, fs, gs): (u16, u16, u16, u16);
    // SAFETY: 64-bit code uses neither DS nor ES; the selectors are Linux's. A null selector in FS or GS is what
    // threads have; the base that it may clear is put back at once.
    unsafe {
        asm!(
            "mov {0:x}, ds", "mov {1:x}, es", "mov {2:x}, fs", "mov {3:x}, gs",
            out(reg) ds, out(reg) es, out(reg) fs, out(reg) gs,
            options(nomem, nostack, preserves_flags)
        );
        if (ds, es) != (USER_DATA, USER_DATA) {
            asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) USER_DATA, options(nostack, preserves_flags));
        }
        if (fs, gs) != (0, 0) && SHARED.swap_bases.load(Ordering::Relaxed) {
            asm!(
                "rdfsbase {base}", "mov fs, {null:x}", "wrfsbase {base}",
                "rdgsbase {base}", "mov gs, {null:x}", "wrgsbase {base}",
                base = out(reg) _, null = in(reg) 0u64,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// Puts a case's registers where [`jump_into`] wants them.
fn fill_entry(entry: &mut Entry, state: &State) {
    // SAFETY: the area has the size that the function wants.
    unsafe { write_vectors(entry.xsave.as_mut_ptr(), state) };
    entry.gpr = state.gpr;
    entry.rflags = 0x202 | state.rflags & CASE_FLAGS;
    entry.rip = state.rip;
    // A far jump reads the selector right behind 32 bits of offset.
    if bits_at(state.rip) == 32 {
        entry.rip |= u64::from(USER_CODE_32) << 32;
    }
    entry.selector = u64::from(bits_at(state.rip) == 32);
    entry.fs_base = state.fs_base;
    entry.set_fs = u64::from(SHARED.swap_bases.load(Ordering::Relaxed));
    entry.direct = 0;
}

/// Loads the registers of [`ENTRY`] and jumps; returns when the case has ended.
///
/// # Safety
/// [`ENTRY`] holds a case, whose code does not touch memory of this process other than its own; phase is RUNNING.
unsafe fn jump_into() {
    // SAFETY: the handler resumes behind the jump with RSP as saved, RFLAGS, x87 and MXCSR at their defaults and
    // the bases put back. RBX and RBP are saved on the stack, all else is declared clobbered.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "lea rax, [rip + 3f]",
            "mov [rip + {entry} + {resume}], rax",
            "mov [rip + {entry} + {stack}], rsp",
            "mov eax, 7",
            "xor edx, edx",
            "xrstor64 [rip + {entry}]",
            "cmp qword ptr [rip + {entry} + {set_fs}], 0",
            "je 2f",
            "mov rax, [rip + {entry} + {fs_base}]",
            "wrfsbase rax",
            "2:",
            // 32-bit code takes a far jump.
            "lea rax, [rip + 4f]",
            "cmp qword ptr [rip + {entry} + {selector}], 0",
            "cmove rax, [rip + {entry} + {rip}]",
            "mov [rip + {entry} + {jump}], rax",
            "push qword ptr [rip + {entry} + {rflags}]",
            "popfq",
            "mov rax, [rip + {entry} + {gpr}]",
            "mov rcx, [rip + {entry} + {gpr} + 8]",
            "mov rdx, [rip + {entry} + {gpr} + 16]",
            "mov rbx, [rip + {entry} + {gpr} + 24]",
            "mov rsp, [rip + {entry} + {gpr} + 32]",
            "mov rbp, [rip + {entry} + {gpr} + 40]",
            "mov rsi, [rip + {entry} + {gpr} + 48]",
            "mov rdi, [rip + {entry} + {gpr} + 56]",
            "mov r8, [rip + {entry} + {gpr} + 64]",
            "mov r9, [rip + {entry} + {gpr} + 72]",
            "mov r10, [rip + {entry} + {gpr} + 80]",
            "mov r11, [rip + {entry} + {gpr} + 88]",
            "mov r12, [rip + {entry} + {gpr} + 96]",
            "mov r13, [rip + {entry} + {gpr} + 104]",
            "mov r14, [rip + {entry} + {gpr} + 112]",
            "mov r15, [rip + {entry} + {gpr} + 120]",
            "jmp qword ptr [rip + {entry} + {jump}]",
            "4:",
            "jmp fword ptr [rip + {entry} + {rip}]",
            "3:",
            "pop rbp",
            "pop rbx",
            entry = sym ENTRY,
            resume = const offset_of!(Entry, resume),
            stack = const offset_of!(Entry, stack),
            set_fs = const offset_of!(Entry, set_fs),
            fs_base = const offset_of!(Entry, fs_base),
            rflags = const offset_of!(Entry, rflags),
            selector = const offset_of!(Entry, selector),
            jump = const offset_of!(Entry, jump),
            gpr = const offset_of!(Entry, gpr),
            rip = const offset_of!(Entry, rip),
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            clobber_abi("C"),
        );
    }
}

/// Where a case comes that has run to its end: saves its registers, puts back what Rust wants, and goes on where
/// [`jump_into`] wants the handler to. Only to be jumped to.
#[unsafe(naked)]
unsafe extern "C" fn exit_stub() {
    naked_asm!(
        // From here on a signal is none of the case's.
        "mov dword ptr [rip + {shared} + {phase}], {idle}",
        "mov [rip + {entry} + {gpr}], rax",
        "mov [rip + {entry} + {gpr} + 8], rcx",
        "mov [rip + {entry} + {gpr} + 16], rdx",
        "mov [rip + {entry} + {gpr} + 24], rbx",
        "mov [rip + {entry} + {gpr} + 32], rsp",
        "mov [rip + {entry} + {gpr} + 40], rbp",
        "mov [rip + {entry} + {gpr} + 48], rsi",
        "mov [rip + {entry} + {gpr} + 56], rdi",
        "mov [rip + {entry} + {gpr} + 64], r8",
        "mov [rip + {entry} + {gpr} + 72], r9",
        "mov [rip + {entry} + {gpr} + 80], r10",
        "mov [rip + {entry} + {gpr} + 88], r11",
        "mov [rip + {entry} + {gpr} + 96], r12",
        "mov [rip + {entry} + {gpr} + 104], r13",
        "mov [rip + {entry} + {gpr} + 112], r14",
        "mov [rip + {entry} + {gpr} + 120], r15",
        "mov rsp, [rip + {entry} + {stack}]",
        "pushfq",
        "pop qword ptr [rip + {entry} + {end_rflags}]",
        "push 0x202",
        "popfq",
        "mov eax, 7",
        "xor edx, edx",
        "xsave64 [rip + {entry}]",
        "fninit",
        "ldmxcsr [rip + {entry} + {mxcsr}]",
        "vzeroupper",
        "cmp qword ptr [rip + {entry} + {set_fs}], 0",
        "je 2f",
        "rdfsbase rax",
        "mov [rip + {entry} + {end_fs}], rax",
        "rdgsbase rax",
        "mov [rip + {entry} + {end_gs}], rax",
        "mov rax, [rip + {entry} + {host_fs}]",
        "wrfsbase rax",
        "mov rax, [rip + {entry} + {host_gs}]",
        "wrgsbase rax",
        "2:",
        "mov dword ptr [rip + {entry} + {direct}], 1",
        "jmp qword ptr [rip + {entry} + {resume}]",
        shared = sym SHARED,
        phase = const offset_of!(Shared, phase),
        idle = const IDLE,
        entry = sym ENTRY,
        gpr = const offset_of!(Entry, gpr),
        stack = const offset_of!(Entry, stack),
        end_rflags = const offset_of!(Entry, end_rflags),
        mxcsr = const offset_of!(Entry, mxcsr),
        set_fs = const offset_of!(Entry, set_fs),
        end_fs = const offset_of!(Entry, end_fs),
        end_gs = const offset_of!(Entry, end_gs),
        host_fs = const offset_of!(Entry, host_fs),
        host_gs = const offset_of!(Entry, host_gs),
        direct = const offset_of!(Entry, direct),
        resume = const offset_of!(Entry, resume),
    );
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: the timer and the mappings are this value's; the handlers replaced are put back first.
        unsafe {
            libc::timer_delete(self.timer);
            let data = &*SHARED.data.get();
            for (signal, previous) in SIGNALS.iter().zip(&data.previous) {
                if let Some(previous) = previous {
                    libc::sigaction(*signal, previous, std::ptr::null_mut());
                }
            }
            libc::munmap(self.backing.cast(), BACKING_BYTES);
            libc::munmap(EXIT_START as *mut libc::c_void, EXIT_BYTES);
            for base in [LOW, HIGH] {
                libc::munmap(base as *mut libc::c_void, (REGION_PAGES * PAGE) as usize);
            }
            for base in [CODE, CODE_32] {
                libc::munmap(base as *mut libc::c_void, ((CODE_PAGES + 1) * PAGE) as usize);
            }
        }
        EXISTS.store(false, Ordering::SeqCst);
    }
}

/// Makes the backing, and maps its pages at the case's addresses between reserved, inaccessible ones.
fn map_layout() -> Result<*mut u8> {
    // SAFETY: fresh mappings: the fixed ones with NOREPLACE, then pages inside those that this call made.
    unsafe {
        let fd = libc::memfd_create(c"anyvisor-insn-fuzz".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 || libc::ftruncate(fd, BACKING_BYTES as i64) != 0 {
            return Err(std::io::Error::last_os_error()).context("memory for the cases");
        }
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let populate = libc::MAP_SHARED | libc::MAP_POPULATE;
        let backing = libc::mmap(std::ptr::null_mut(), BACKING_BYTES, rw, populate, fd, 0);
        if backing == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("mapping memory for the cases");
        }
        std::ptr::write_bytes(backing.cast::<u8>().add(DATA_BYTES), INT3, BACKING_BYTES - DATA_BYTES);
        let regions = [(LOW, REGION_PAGES), (HIGH, REGION_PAGES), (CODE, CODE_PAGES + 1), (CODE_32, CODE_PAGES + 1)];
        for (base, pages) in regions {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
            let length = (pages * PAGE) as usize;
            let at = libc::mmap(base as *mut libc::c_void, length, libc::PROT_NONE, flags, -1, 0);
            if at as u64 != base {
                bail!("the address range of the cases at {base:#x} is taken in this process");
            }
        }
        for page in mapped() {
            let write = if page.writable { libc::PROT_WRITE } else { 0 };
            let execute = if page.executable { libc::PROT_EXEC } else { 0 };
            let protection = libc::PROT_READ | write | execute;
            let offset = page.backing as i64 * PAGE as i64;
            let at = page.linear as *mut libc::c_void;
            if libc::mmap(at, PAGE as usize, protection, populate | libc::MAP_FIXED, fd, offset) != at {
                return Err(std::io::Error::last_os_error()).context("mapping a page of the cases");
            }
            // Touch it, so that no case pays for, or sees, the first fault.
            if page.writable {
                at.cast::<u8>().write_volatile(0);
            } else {
                at.cast::<u8>().read_volatile();
            }
        }
        libc::close(fd);
        Ok(backing.cast())
    }
}

/// Maps the pages of the exits. They are writable for [`write_exit`], and no case is given their addresses.
fn map_exits() -> Result<()> {
    // SAFETY: a fresh mapping, which is filled.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let at = libc::mmap(EXIT_START as *mut libc::c_void, EXIT_BYTES, protection, flags, -1, 0);
        if at as u64 != EXIT_START {
            bail!("the address range of the exits at {EXIT_START:#x} is taken in this process");
        }
        std::ptr::write_bytes(at.cast::<u8>(), INT3, EXIT_BYTES);
        write_jump(LANDING as *mut u8, exit_stub as *const () as u64);
    }
    Ok(())
}

fn take_signals() -> Result<()> {
    // The engine's handlers use thread-local storage: they must come behind ours.
    native::install_signal_handlers();
    // SAFETY: an alternate stack that is never freed; handlers of the right signature.
    unsafe {
        let stack = Box::leak(vec![0u8; ALT_STACK].into_boxed_slice());
        let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: ALT_STACK };
        if libc::sigaltstack(&stack, std::ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error()).context("sigaltstack");
        }
        for (i, &signal) in SIGNALS.iter().enumerate() {
            let mut previous: libc::sigaction = std::mem::zeroed();
            install(signal, on_fault, &mut previous)?;
            (*SHARED.data.get()).previous[i] = Some(previous);
        }
        install(libc::SIGVTALRM, on_tick, std::ptr::null_mut())
    }
}

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Whether this process has memory at `address` that is none of the cases'.
pub fn is_own(address: u64) -> bool {
    let regions = [(LOW, REGION_PAGES), (HIGH, REGION_PAGES), (CODE, CODE_PAGES + 1), (CODE_32, CODE_PAGES + 1)];
    if regions.iter().any(|&(base, pages)| address.wrapping_sub(base) < pages * PAGE) {
        return false;
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().any(|line| {
        let mut words = line.split([' ', '-']);
        let mut bound = || words.next().and_then(|word| u64::from_str_radix(word, 16).ok());
        let (Some(start), Some(end)) = (bound(), bound()) else { return false };
        (start..end).contains(&address) && words.next().is_some_and(|rights| !rights.is_empty())
    })
}

/// # Safety
/// `handler` must be async-signal-safe and `previous` null or writable.
unsafe fn install(signal: i32, handler: Handler, previous: *mut libc::sigaction) -> Result<()> {
    // SAFETY: by the contract; the structure is plain data.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // A case ends once.
        libc::sigaddset(&mut action.sa_mask, libc::SIGVTALRM);
        if libc::sigaction(signal, &action, previous) != 0 {
            return Err(std::io::Error::last_os_error()).context("sigaction");
        }
    }
    Ok(())
}

/// A tick every [`TICK_NS`] of this thread's CPU time; see [`on_tick`].
fn start_watchdog() -> Result<libc::timer_t> {
    // SAFETY: plain system calls on structures of this function.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGVTALRM;
        event.sigev_notify_thread_id = libc::syscall(libc::SYS_gettid) as i32;
        let mut timer: libc::timer_t = std::ptr::null_mut();
        let interval = libc::timespec { tv_sec: 0, tv_nsec: TICK_NS };
        let times = libc::itimerspec { it_interval: interval, it_value: interval };
        if libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &mut event, &mut timer) != 0
            || libc::timer_settime(timer, 0, &times, std::ptr::null_mut()) != 0
        {
            return Err(std::io::Error::last_os_error()).context("the watchdog's timer");
        }
        Ok(timer)
    }
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid frame, and phase says that the exchange is the handlers' now.
    unsafe {
        let frame = &mut *context.cast::<libc::ucontext_t>();
        match SHARED.phase.load(Ordering::SeqCst) {
            RUNNING => leave(frame, false),
            _ => chain(signal, info, context),
        }
    }
}

/// Ends a case that has been running for too long: on the host at once, in a guest by a kick.
extern "C" fn on_tick(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let runs = SHARED.runs.load(Ordering::SeqCst);
    if SHARED.watched.swap(runs, Ordering::SeqCst) != runs {
        return SHARED.ticks.store(0, Ordering::SeqCst);
    }
    let ticks = SHARED.ticks.fetch_add(1, Ordering::SeqCst);
    if SHARED.phase.load(Ordering::SeqCst) == RUNNING {
        // SAFETY: as in `on_fault`; the signal came while the case ran, or between its loading and its end.
        unsafe { leave(&mut *context.cast::<libc::ucontext_t>(), true) };
    } else if ticks >= GUEST_TICKS {
        // SAFETY: null, or set by `watch` to a word that lives until `unwatch`.
        if let Some(word) = unsafe { SHARED.kick.load(Ordering::SeqCst).as_ref() } {
            word.fetch_or(pending::KICK, Ordering::SeqCst);
            // SAFETY: the context of the signal being handled.
            unsafe { fault::break_out(context) };
        }
    }
}

/// Has the watchdog kick the vCPU with this pending word if it runs for too long.
pub fn watch(word: &AtomicU32) {
    count_run();
    SHARED.kick.store(std::ptr::from_ref(word).cast_mut(), Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
}

/// Tells the watchdog that another run begins.
fn count_run() {
    // Only this thread writes it, and the handlers that read it run on this thread.
    SHARED.runs.store(SHARED.runs.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// Ends what [`watch`] began.
pub fn unwatch() {
    compiler_fence(Ordering::SeqCst);
    SHARED.kick.store(std::ptr::null_mut(), Ordering::Relaxed);
}

/// Points GS, which Rust does not use, at `base`.
pub fn set_gs_base(base: u64) {
    if SHARED.swap_bases.load(Ordering::Relaxed) {
        // SAFETY: the host has FSGSBASE; nothing of Rust's or libc's is reached through GS.
        unsafe { asm!("wrgsbase {}", in(reg) base, options(nomem, nostack, preserves_flags)) };
        return;
    }
    // SAFETY: ARCH_SET_GS on this thread; nothing of Rust's or libc's is reached through GS.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
    assert_eq!(result, 0, "arch_prctl(ARCH_SET_GS)");
}

/// A signal that is not a host case's: the translator's, or whoever handled it before gets it.
///
/// # Safety
/// Called from a handler with what the kernel passed it.
unsafe fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: `previous` was filled before this handler could run, and holds what sigaction gave.
    unsafe {
        if fault::on_signal(context) {
            return;
        }
        let data = &*SHARED.data.get();
        let index = SIGNALS.iter().position(|s| *s == signal).expect("one of ours");
        match &data.previous[index] {
            Some(old) if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN => {
                let handler: Handler = std::mem::transmute(old.sa_sigaction);
                handler(signal, info, context);
            }
            _ => {
                // The default action, when the instruction runs again.
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

/// Takes the outcome from the frame that ended the case, and goes back to [`Host::run`].
///
/// # Safety
/// `frame` is the frame of a signal of this thread, which came while the case ran.
unsafe fn leave(frame: &mut libc::ucontext_t, hang: bool) {
    // SAFETY: the exchange is the handler's; the frame's XSAVE area is as the kernel made it. AC is the case's: with it AMD's
    // processors refuse what the compiler makes of copies, MOVDQU of what is not aligned.
    unsafe {
        asm!("pushfq", "and dword ptr [rsp], {not_ac}", "popfq", not_ac = const !(1i32 << 18));
        let data = &mut *SHARED.data.get();
        if SHARED.swap_bases.load(Ordering::Relaxed) {
            asm!("rdfsbase {}", out(reg) data.state.fs_base, options(nostack));
            asm!("rdgsbase {}", out(reg) data.state.gs_base, options(nostack));
            asm!("wrfsbase {}", in(reg) (*ENTRY.0.get()).host_fs, options(nostack));
            asm!("wrgsbase {}", in(reg) (*ENTRY.0.get()).host_gs, options(nostack));
        }
        let registers = &mut frame.uc_mcontext.gregs;
        for (index, &register) in GREGS.iter().enumerate() {
            data.state.gpr[index] = registers[register as usize] as u64;
        }
        data.state.rip = registers[libc::REG_RIP as usize] as u64;
        data.state.rflags = registers[libc::REG_EFL as usize] as u64;
        let vector = registers[libc::REG_TRAPNO as usize] as u8;
        data.stop = if hang {
            Stop::Hang
        } else {
            let error = registers[libc::REG_ERR as usize] as u32;
            let cr2 = if vector == 14 { registers[libc::REG_CR2 as usize] as u64 } else { 0 };
            Stop::Exception { vector, error, cr2 }
        };
        let area = frame.uc_mcontext.fpregs.cast::<u8>();
        read_vectors(area, &mut data.state);
        let entry = &*ENTRY.0.get();
        registers[libc::REG_RIP as usize] = entry.resume as i64;
        registers[libc::REG_RSP as usize] = entry.stack as i64;
        registers[libc::REG_EFL as usize] = 0x202;
        let selectors = &mut registers[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | i64::from(USER_CODE);
        let defaults = X87::default();
        area.cast::<u16>().write_unaligned(defaults.control);
        area.add(2).cast::<u16>().write_unaligned(0);
        area.add(4).cast::<u16>().write_unaligned(0);
        area.add(MXCSR).cast::<u32>().write_unaligned(0x1f80);
        let present = area.add(XSTATE_BV).cast::<u64>();
        present.write_unaligned(present.read_unaligned() | 3);
    }
    SHARED.phase.store(IDLE, Ordering::SeqCst);
}

/// # Safety
/// `area` is an XSAVE area with AVX state.
unsafe fn write_vectors(area: *mut u8, state: &State) {
    // SAFETY: offsets inside the area; components 0 to 2 exist on every host with AVX.
    unsafe {
        area.cast::<u16>().write_unaligned(state.x87.control);
        area.add(2).cast::<u16>().write_unaligned(state.x87.status);
        area.add(4).cast::<u16>().write_unaligned(u16::from(state.x87.tag));
        std::ptr::write_bytes(area.add(6), 0, 18);
        area.add(MXCSR).cast::<u32>().write_unaligned(state.mxcsr);
        for (i, value) in state.x87.st.iter().enumerate() {
            std::ptr::copy_nonoverlapping(value.as_ptr(), area.add(ST + 16 * i), 10);
        }
        for (i, value) in state.ymm.iter().enumerate() {
            std::ptr::copy_nonoverlapping(value.as_ptr(), area.add(XMM + 16 * i), 16);
            std::ptr::copy_nonoverlapping(value.as_ptr().add(16), area.add(YMM_HIGH + 16 * i), 16);
        }
        let present = area.add(XSTATE_BV).cast::<u64>();
        present.write_unaligned(present.read_unaligned() | 7);
    }
}

/// # Safety
/// As for [`write_vectors`].
unsafe fn read_vectors(area: *const u8, state: &mut State) {
    // SAFETY: as in `write_vectors`.
    unsafe {
        let present = area.add(XSTATE_BV).cast::<u64>().read_unaligned();
        state.mxcsr = area.add(MXCSR).cast::<u32>().read_unaligned();
        state.x87 = X87::default();
        if present & 1 != 0 {
            state.x87.control = area.cast::<u16>().read_unaligned();
            state.x87.status = area.add(2).cast::<u16>().read_unaligned();
            state.x87.tag = area.add(4).read();
            for (i, value) in state.x87.st.iter_mut().enumerate() {
                std::ptr::copy_nonoverlapping(area.add(ST + 16 * i), value.as_mut_ptr(), 10);
            }
        }
        for (i, value) in state.ymm.iter_mut().enumerate() {
            *value = [0; 32];
            if present & 2 != 0 {
                std::ptr::copy_nonoverlapping(area.add(XMM + 16 * i), value.as_mut_ptr(), 16);
            }
            if present & 4 != 0 {
                std::ptr::copy_nonoverlapping(area.add(YMM_HIGH + 16 * i), value.as_mut_ptr().add(16), 16);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::case::image;
    use std::sync::Mutex;

    /// Held by a test that has an executor.
    pub static ONE: Mutex<()> = Mutex::new(());

    fn run(code: &[u8], prepare: impl FnOnce(&mut State)) -> (Outcome, Vec<u8>) {
        let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
        let mut case = Case { code: code.to_vec(), ..Case::default() };
        prepare(&mut case.state);
        let mut host = Host::new().unwrap();
        let outcome = host.run(&case, &image(1));
        let again = host.run(&case, &image(1));
        assert_eq!(outcome, again, "a case is deterministic");
        (outcome, host.data().to_vec())
    }

    #[test]
    fn registers_go_in_and_come_out() {
        let (outcome, _) = run(&[0x48, 0x01, 0xd8, 0xc5, 0xfd, 0xfe, 0xc1], |s| {
            s.gpr = std::array::from_fn(|i| i as u64 * 0x1111);
            s.ymm = std::array::from_fn(|i| [i as u8 + 1; 32]);
            s.x87.st[3] = [7; 10];
            s.x87.tag = 0x81;
        });
        assert_eq!(outcome.stop, Stop::Exception { vector: 3, error: 0, cr2: 0 });
        assert_eq!(outcome.state.gpr[0], 3 * 0x1111);
        assert_eq!(outcome.state.gpr[15], 15 * 0x1111);
        assert_eq!(outcome.state.ymm[0], [3; 32]);
        assert_eq!(outcome.state.ymm[15], [16; 32]);
        assert_eq!((outcome.state.x87.st[3], outcome.state.x87.tag), ([7; 10], 0x81));
        assert_eq!(outcome.state.rip, CODE + 8);
    }

    #[test]
    fn memory_is_written_and_faults_are_seen() {
        let (outcome, data) = run(&[0xc6, 0x00, 0x5a], |s| s.gpr[0] = LOW + PAGE);
        assert_eq!(outcome.stop, Stop::Exception { vector: 3, error: 0, cr2: 0 });
        assert_eq!(data[0], 0x5a);
        for (address, error) in [(LOW + 3 * PAGE, 7), (HIGH, 6)] {
            let (outcome, _) = run(&[0xc6, 0x00, 0x5a], |s| s.gpr[0] = address);
            assert_eq!(outcome.stop, Stop::Exception { vector: 14, error, cr2: address });
            assert_eq!(outcome.state.rip, CODE);
        }
        let (outcome, _) = run(&[0xc6, 0x00, 0x5a], |s| s.gpr[0] = 1 << 63);
        assert_eq!(outcome.stop, Stop::Exception { vector: 13, error: 0, cr2: 0 });
        let (outcome, _) = run(&[0x50], |s| s.gpr[4] = 1 << 63);
        assert_eq!(outcome.stop, Stop::Exception { vector: 12, error: 0, cr2: 0 });
    }

    #[test]
    fn other_exceptions_and_endless_loops_end() {
        let (outcome, _) = run(&[0x0f, 0x0b], |_| ());
        assert_eq!(outcome.stop, Stop::Exception { vector: 6, error: 0, cr2: 0 });
        let (outcome, _) = run(&[0xf7, 0xf1], |_| ());
        assert_eq!(outcome.stop, Stop::Exception { vector: 0, error: 0, cr2: 0 });
        let (outcome, _) = run(&[0xeb, 0xfe], |_| ());
        assert_eq!(outcome.stop, Stop::Hang);
    }

    #[test]
    fn bases_are_the_cases_own() {
        let (outcome, data) = run(&[0x64, 0xc6, 0x00, 0x5a], |s| {
            s.fs_base = LOW;
            s.gpr[0] = PAGE + 5;
        });
        assert_eq!(outcome.stop, Stop::Exception { vector: 3, error: 0, cr2: 0 });
        assert_eq!((data[5], outcome.state.fs_base), (0x5a, LOW));
    }

    #[test]
    fn cases_of_both_modes_leave_without_a_signal() {
        for rip in [CODE, CODE + 3, CODE + 31 * PAGE + 4000, CODE_32, CODE_32 + 0x1_f000] {
            // add eax, ecx; or ebx, -1
            let (outcome, _) = run(&[0x01, 0xc8, 0x83, 0xcb, 0xff], |s| {
                s.rip = rip;
                (s.gpr[0], s.gpr[1], s.gpr[4]) = (5, 7, LOW + PAGE);
                s.rflags |= 1 << 10;
                s.mxcsr = 0x1fa0;
                s.x87.control = 0x27f;
            });
            let state = &outcome.state;
            assert_eq!((outcome.stop, state.rip), (AT_INT3, rip + 6));
            assert_eq!((state.gpr[0] as u32, state.gpr[3] as u32, state.gpr[4]), (12, u32::MAX, LOW + PAGE));
            assert_eq!((state.rflags & !(1 << 1 | 1 << 9), state.mxcsr), (1 << 10 | 0x84, 0x1fa0));
            assert_eq!(state.x87.control, 0x27f);
            // SAFETY: no case runs now.
            assert_eq!(unsafe { (*ENTRY.0.get()).direct }, 1, "at {rip:#x}");
        }
    }

    #[test]
    fn the_process_knows_its_own_memory() {
        let here = 0u8;
        assert!(is_own(&raw const here as u64) && is_own(is_own as *const () as u64));
        let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
        let _host = Host::new().unwrap();
        for address in [0, LOW + PAGE, LOW + 4 * PAGE, CODE, CODE_32 + 5, 1 << 63] {
            assert!(!is_own(address), "{address:#x}");
        }
        assert!(is_own(LANDING));
    }

    #[test]
    fn a_case_finds_the_selectors_that_it_expects() {
        // push 0; pop es; push 0; pop ds: nothing that is generated, but a case may jump into an instruction.
        let (outcome, _) = run(&[0x6a, 0, 0x07, 0x6a, 0, 0x1f], |s| (s.rip, s.gpr[4]) = (CODE_32, LOW + PAGE + 64));
        assert_eq!(outcome.stop, AT_INT3);
        // mov eax, 2bh; mov fs, eax; mov gs, eax
        let (outcome, _) = run(&[0xb8, 0x2b, 0, 0, 0, 0x8e, 0xe0, 0x8e, 0xe8], |_| ());
        assert_eq!(outcome.stop, AT_INT3);
        // mov eax, es; mov ecx, ds; mov edx, fs; mov ebx, gs
        let (outcome, _) = run(&[0x8c, 0xc0, 0x8c, 0xd9, 0x8c, 0xe2, 0x8c, 0xeb], |_| ());
        assert_eq!(outcome.state.gpr[..4], [0x2b, 0x2b, 0, 0]);
    }

    #[test]
    fn a_case_that_looks_behind_itself_can_be_run_exactly() {
        let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
        let mut host = Host::new().unwrap();
        // mov al, [rip + 0]
        let case = Case { code: vec![0x8a, 0x05, 0, 0, 0, 0], ..Case::default() };
        let quick = host.run(&case, &image(1));
        assert_eq!((quick.stop, quick.state.gpr[0]), (AT_INT3, 0xe9));
        let exact = host.run_exactly(&case, &image(1));
        assert_eq!((exact.stop, exact.state.gpr[0]), (AT_INT3, 0xcc));
        assert_eq!(exact.state.rip, quick.state.rip);
        // jmp to behind the next byte, which is inside the exit's jump.
        let case = Case { code: vec![0xeb, 1], ..Case::default() };
        for outcome in [host.run(&case, &image(1)), host.run_exactly(&case, &image(1))] {
            assert_eq!((outcome.stop, outcome.state.rip), (AT_INT3, CODE + 4));
        }
        // jmp to where the exits are: nothing is there for a case.
        let mut case = Case { code: vec![0xff, 0xe0], ..Case::default() };
        case.state.gpr[0] = EXITS;
        let exact = host.run_exactly(&case, &image(1));
        assert!(matches!(exact.stop, Stop::Exception { vector: 14, cr2: EXITS, .. }), "{exact:?}");
        assert_eq!(host.run(&Case { code: vec![0x90], ..Case::default() }, &image(1)).state.rip, CODE + 2);
    }
}
