//! A case run by the engine: one vCPU in 64-bit or compatibility mode at CPL 3, whose page tables map the case's pages at
//! the same linear addresses and with the same rights as the host executor does.
//!
//! Every vector's gate leads to a HLT of its own in ring 0. So the case has ended when the vCPU halts, RIP
//! tells the vector, and the frame on the ring-0 stack holds the interrupted state and the error code.
//! The selectors are Linux's, because instructions can read them.

use crate::case::{Case, Outcome, State, Stop, X87};
use crate::host;
use crate::layout::{ALL_PAGES, BACKING_BYTES, DATA_BYTES, PAGE, Pages, backing_of, bits_at, copy_pages, mapped};
use crate::undefined::Flow;
use anyhow::{Context, Result};
use anyvisor_engine::GuestIo;
use anyvisor_engine::memory::in_file;
use anyvisor_engine_translator::core::{Core, VcpuShared, VmShared};
use anyvisor_engine_translator::cpu::pending;
use anyvisor_engine_translator::interpret;
use anyvisor_engine_translator::ram::Ram;
use anyvisor_engine_translator::translate::Translator;
use anyvisor_x86::bits::{cr0, cr4, efer, xcr0};
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{Cpuid, CpuidResult, DescriptorTable, Segment};
use std::arch::asm;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::GuestAddress;

/// Guest-physical layout: page tables from 0x1000, descriptor tables, handlers, stack; then the backing.
const PML4: u64 = 0x1000;
const TABLES: u64 = 0x2000;
const GDT: u64 = 0x1_8000;
const IDT: u64 = 0x1_9000;
const TSS: u64 = 0x1_a000;
const HANDLERS: u64 = 0x1_b000;
const STACK_TOP: u64 = 0x1_e000;
const BACKING: u64 = 0x20_0000;
const RAM_BYTES: usize = 4 << 20;
/// Where the supervisor's first 2 MiB of physical memory are mapped.
const SUPERVISOR: u64 = 0xffff_8000_0000_0000;

const KERNEL_CODE: u16 = 0x08;
const USER_DATA: u16 = 0x2b;
const USER_CODE: u16 = 0x33;
const USER_CODE_32: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x40;
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const CODE_32_DESCRIPTOR: u64 = 0x00cf_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;
const DPL3: u64 = 0x6000_0000_0000;

/// Page tables are made anew, and TLBs flushed, after this many cases: so some writes find clean pages.
const CASES_PER_TABLES: u64 = 4096;
/// The interpreter's longest case, in instructions or iterations.
const PATIENCE: u32 = 1_000_000;
/// What an instruction takes at most in the translator: a signal, and an interpretation.
const SLOWEST_NS: u64 = 10_000;

/// MXCSR as Rust code has it.
const RUST_MXCSR: u32 = 0x1f80;

/// What executes the cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executor {
    Interpreter,
    Translator,
}

impl Executor {
    pub fn name(self) -> &'static str {
        match self {
            Executor::Interpreter => "interpreter",
            Executor::Translator => "translator",
        }
    }

    /// Instructions, or iterations of one, that a case has had when it is given up ([`Stop::Hang`]), at least.
    pub fn patience(self) -> u64 {
        match self {
            Executor::Interpreter => u64::from(PATIENCE),
            Executor::Translator => host::GUEST_NS / SLOWEST_NS,
        }
    }
}

/// A machine without devices.
struct NoDevices;

impl GuestIo for NoDevices {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn eoi(&self, _: u8) {}
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}

/// One vCPU and its memory.
pub struct Guest {
    core: Core,
    ram: Arc<Ram>,
    translator: Option<Translator>,
    /// See [`Guest::translate_in_way`].
    way: (bool, bool),
    attached: bool,
    cases: u64,
    /// See [`Guest::steps`].
    steps: u32,
    /// Which image the data pages hold, but for those of `dirty`.
    image: Option<u64>,
    dirty: Pages,
    written: Option<(usize, usize)>,
    /// The code there is in place already: running it again uses what was translated.
    loaded: Vec<u8>,
}

impl Guest {
    /// # Errors
    /// When the host refuses memory.
    pub fn new(executor: Executor) -> Result<Guest> {
        let memory = in_file(&[(GuestAddress(0), RAM_BYTES)]).context("memory for the guest")?;
        let ram = Arc::new(Ram::new(memory));
        let cpuid = host_cpuid();
        let translator = match executor {
            Executor::Interpreter => None,
            Executor::Translator => Some(Translator::new(&cpuid)?),
        };
        let vm = Arc::new(VmShared::new(ram.clone(), 1_000_000));
        let (shared, cpu) = VcpuShared::new(0);
        let mut core = Core::new(vm, shared, cpu, cpuid);
        set_system_state(&mut core);
        let mut guest = Guest {
            core,
            ram,
            translator,
            way: (false, true),
            attached: false,
            cases: 0,
            steps: 0,
            image: None,
            dirty: ALL_PAGES,
            written: None,
            loaded: Vec::new(),
        };
        guest.build_tables();
        Ok(guest)
    }

    /// Whether the translator treats all code as hot from now on, and whether memory is in windows.
    pub fn translate_in_way(&mut self, eager: bool, windows: bool) {
        if let Some(translator) = &mut self.translator
            && self.way != (eager, windows)
        {
            translator.translate_eagerly(eager);
            self.core.windows.allow(windows);
            translator.flush(&mut self.core);
            self.way = (eager, windows);
        }
    }

    /// The data pages.
    pub fn data(&self) -> &[u8] {
        let start = self.ram.host(BACKING, DATA_BYTES as u64).expect("the backing is in RAM");
        // SAFETY: mapped as long as self; only `run` writes there, and it borrows self mutably.
        unsafe { std::slice::from_raw_parts(start, DATA_BYTES) }
    }

    /// Takes what is at the linear addresses `range` from the host's data pages.
    pub fn take_from(&mut self, host: &[u8], range: std::ops::Range<u64>) {
        for offset in range.filter_map(backing_of).filter(|offset| *offset < DATA_BYTES) {
            self.write(BACKING + offset as u64, &host[offset..=offset]);
        }
    }

    /// Writes to the data pages what no case has.
    #[cfg(test)]
    pub fn spoil(&mut self, offset: usize) {
        self.write(BACKING + offset as u64, &[!self.data()[offset]]);
    }

    /// Says which data pages the last case left other than the image has them. Without that it is any.
    pub fn set_dirty(&mut self, pages: Pages) {
        self.dirty = pages;
    }

    /// Runs `case` on memory that starts as `image` with the case's pokes over it.
    pub fn run(&mut self, case: &Case, image: &[u8]) -> Outcome {
        self.cases += 1;
        if self.cases.is_multiple_of(CASES_PER_TABLES) {
            self.build_tables();
            self.core.flush_all();
        }
        self.load(case, image);
        set_user_state(&mut self.core, &case.state);
        self.core.cpu.pending.store(0, Ordering::Relaxed);
        host::watch(&self.core.cpu.pending);
        let x87 = self.execute(&case.state.x87);
        host::unwatch();
        self.outcome(x87)
    }

    /// How many instructions, or iterations of one, the last case had. Of the interpreter only.
    pub fn steps(&self) -> u64 {
        self.steps.into()
    }

    /// Whether `case` goes where nothing but a return address that it has overwritten can lead: to the middle of one
    /// of its instructions, say. For the interpreter only.
    pub fn strays(&mut self, case: &Case, image: &[u8], flow: &Flow) -> bool {
        self.load(case, image);
        set_user_state(&mut self.core, &case.state);
        self.core.cpu.pending.store(0, Ordering::Relaxed);
        let core = &mut self.core;
        let mut strayed = false;
        let mut from = u64::MAX;
        host::watch(&core.cpu.pending);
        with_x87(&case.state.x87, || {
            let mut patience = PATIENCE;
            while !core.cpu.halted && core.cpu.pending.load(Ordering::Relaxed) == 0 && patience > 0 && !strayed {
                patience -= 1;
                strayed = !flow.foresees(from, core.cpu.rip);
                from = core.cpu.rip;
                if interpret::step(core, &NoDevices) == interpret::Step::Shutdown {
                    break;
                }
            }
        });
        host::unwatch();
        strayed
    }

    fn execute(&mut self, x87: &X87) -> X87 {
        let (core, steps) = (&mut self.core, &mut self.steps);
        *steps = 0;
        match &mut self.translator {
            None => with_x87(x87, || {
                while !core.cpu.halted && core.cpu.pending.load(Ordering::Relaxed) == 0 && *steps < PATIENCE {
                    *steps += 1;
                    if interpret::step(core, &NoDevices) == interpret::Step::Shutdown {
                        break;
                    }
                }
            }),
            Some(translator) => {
                host::set_gs_base(std::ptr::from_ref(&*core.cpu) as u64);
                if !std::mem::replace(&mut self.attached, true) {
                    translator.attach(core).expect("the host lets this thread run translated code");
                }
                with_x87(x87, || {
                    // An interrupt that nobody sent may have left a request to look; ignore all but kicks.
                    while !core.cpu.halted && core.cpu.pending.load(Ordering::Relaxed) & pending::KICK == 0 {
                        core.cpu.pending.store(0, Ordering::Relaxed);
                        if translator.run(core, &NoDevices) == interpret::Step::Shutdown {
                            break;
                        }
                    }
                })
            }
        }
    }

    fn load(&mut self, case: &Case, image: &[u8]) {
        let start = self.ram.host(BACKING, BACKING_BYTES as u64).expect("the backing is in RAM");
        // SAFETY: BACKING_BYTES bytes of RAM that nothing else references now.
        let backing = unsafe { std::slice::from_raw_parts_mut(start, BACKING_BYTES) };
        let stale = if self.image == Some(case.memory) { self.dirty } else { ALL_PAGES };
        copy_pages(&mut backing[..DATA_BYTES], image, stale);
        (self.image, self.dirty) = (Some(case.memory), ALL_PAGES);
        for (address, bytes) in &case.pokes {
            let offset = backing_of(*address).expect("pokes are in data pages");
            backing[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        let start = backing_of(case.state.rip).expect("code is in code pages");
        let end = (start + case.code.len()).min(BACKING_BYTES);
        if self.written == Some((start, end)) && self.loaded == case.code {
            return;
        }
        let (old_start, old_end) = self.written.take().unwrap_or((DATA_BYTES, BACKING_BYTES));
        backing[old_start..old_end].fill(0xcc);
        backing[start..end].copy_from_slice(&case.code[..end - start]);
        self.written = Some((start, end));
        self.loaded.clone_from(&case.code);
        if let Some(translator) = &mut self.translator {
            // As if a device had written there. One byte more: the INT3 behind it may have become code.
            for (start, end) in [(old_start, old_end), (start, end)] {
                translator.code_written(&mut self.core, BACKING + start as u64, (end - start) as u64);
            }
        }
    }

    /// Reads the end of the case off the ring-0 stack.
    fn outcome(&mut self, x87: X87) -> Outcome {
        let cpu = &*self.core.cpu;
        let mut state = State {
            gpr: cpu.gpr,
            rip: cpu.rip,
            rflags: cpu.rflags,
            fs_base: cpu.seg[index::FS].base,
            gs_base: cpu.seg[index::GS].base,
            ymm: std::array::from_fn(|i| cpu.ymm[i].0),
            mxcsr: cpu.mxcsr,
            x87,
        };
        if !cpu.halted || cpu.cpl != 0 {
            return Outcome { stop: Stop::Hang, state };
        }
        let vector = (cpu.rip.wrapping_sub(SUPERVISOR + HANDLERS) / 16) as u8;
        let mut frame = [0; 48];
        let at = cpu.gpr[4].wrapping_sub(SUPERVISOR);
        assert!(self.ram.read(at, &mut frame), "the ring-0 stack is in RAM");
        let mut words = frame.as_chunks().0.iter();
        let mut pop = || u64::from_le_bytes(*words.next().expect("six words"));
        let error = if matches!(vector, 8 | 10..=14 | 17) { pop() as u32 } else { 0 };
        state.rip = pop();
        pop();
        state.rflags = pop();
        state.gpr[4] = pop();
        let cr2 = if vector == 14 { cpu.cr2 } else { 0 };
        Outcome { stop: Stop::Exception { vector, error, cr2 }, state }
    }

    /// Writes page tables (accessed and dirty bits clear), descriptor tables, TSS and handlers.
    fn build_tables(&mut self) {
        let zero = vec![0; (GDT - PML4) as usize];
        self.write(PML4, &zero);
        let mut next = TABLES;
        let supervisor_pde = self.entry(SUPERVISOR, &mut next, 3, 2);
        self.write(supervisor_pde, &0x83u64.to_le_bytes());
        for page in mapped() {
            let at = self.entry(page.linear, &mut next, 7, 1);
            let write = if page.writable { 2 } else { 0 };
            let no_execute = if page.executable { 0 } else { 1 << 63 };
            let entry = (BACKING + page.backing as u64 * PAGE) | 5 | write | no_execute;
            self.write(at, &entry.to_le_bytes());
        }
        for (selector, descriptor) in [
            (KERNEL_CODE, CODE_DESCRIPTOR),
            (0x10, DATA_DESCRIPTOR),
            (USER_DATA & !3, DATA_DESCRIPTOR | DPL3),
            (USER_CODE & !3, CODE_DESCRIPTOR | DPL3),
            (USER_CODE_32 & !3, CODE_32_DESCRIPTOR | DPL3),
        ] {
            self.write(GDT + u64::from(selector), &descriptor.to_le_bytes());
        }
        let tss = SUPERVISOR + TSS;
        let low = 0x67 | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56;
        self.write(GDT + u64::from(TSS_SELECTOR), &low.to_le_bytes());
        self.write(GDT + u64::from(TSS_SELECTOR) + 8, &(tss >> 32).to_le_bytes());
        self.write(TSS + 4, &(SUPERVISOR + STACK_TOP).to_le_bytes());
        self.write(TSS + 0x66, &0x68u16.to_le_bytes());
        for vector in 0..32u64 {
            let handler = SUPERVISOR + HANDLERS + 16 * vector;
            // Interrupt gates; those of INT3 and INTO may be used from ring 3.
            let rights: u64 = if matches!(vector, 3 | 4) { 0xee00 } else { 0x8e00 };
            let low = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | rights << 32 | (handler >> 16 & 0xffff) << 48;
            self.write(IDT + 16 * vector, &low.to_le_bytes());
            self.write(IDT + 16 * vector + 8, &(handler >> 32).to_le_bytes());
            self.write(HANDLERS + 16 * vector, &[0xf4; 16]);
        }
    }

    /// The guest-physical address of the table entry for `linear` at `level` (1: PTE, 2: PDE), making the
    /// tables above it with rights `rights`.
    fn entry(&self, linear: u64, next: &mut u64, rights: u64, level: u32) -> u64 {
        let mut table = PML4;
        for above in (level + 1..=4).rev() {
            let at = table + (linear >> (12 + 9 * (above - 1)) & 0x1ff) * 8;
            let mut entry = [0; 8];
            assert!(self.ram.read(at, &mut entry));
            let mut entry = u64::from_le_bytes(entry);
            if entry == 0 {
                entry = *next | rights;
                *next += PAGE;
                assert!(*next <= GDT, "room for page tables");
                self.write(at, &entry.to_le_bytes());
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        table + (linear >> (12 + 9 * (level - 1)) & 0x1ff) * 8
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(self.ram.write(gpa, bytes), "the tables are in RAM");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.attached
            && let Some(translator) = &mut self.translator
        {
            translator.detach();
        }
    }
}

/// Control registers, descriptor tables and task as a kernel would have set them.
fn set_system_state(core: &mut Core) {
    let cpu = &mut core.cpu;
    cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    cpu.cr3 = PML4;
    cpu.cr4 =
        cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::FSGSBASE | cr4::OSXSAVE | cr4::SMEP | cr4::SMAP;
    cpu.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    cpu.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    cpu.gdtr = DescriptorTable { base: SUPERVISOR + GDT, limit: 0x4f };
    cpu.idtr = DescriptorTable { base: SUPERVISOR + IDT, limit: 32 * 16 - 1 };
    let task = attr::P | 0xb;
    cpu.tr = Segment { base: SUPERVISOR + TSS, limit: 0x67, attributes: task, selector: TSS_SELECTOR };
    cpu.ldtr = Segment::unusable(0);
    core.cpu.dr[6] = 0xffff_0ff0;
    core.cpu.dr[7] = 0x400;
}

fn set_user_state(core: &mut Core, state: &State) {
    let cpu = &mut core.cpu;
    cpu.gpr = state.gpr;
    cpu.rip = state.rip;
    cpu.rflags = state.rflags;
    for (number, value) in state.ymm.iter().enumerate() {
        cpu.ymm[number].0 = *value;
    }
    cpu.mxcsr = state.mxcsr;
    cpu.cr2 = 0;
    cpu.cpl = 3;
    cpu.halted = false;
    cpu.interrupt_shadow = 0;
    cpu.seg = [Segment::unusable(0); 6];
    cpu.seg[index::CS] = match bits_at(state.rip) {
        32 => Segment::from_descriptor(USER_CODE_32, CODE_32_DESCRIPTOR | DPL3),
        _ => Segment::from_descriptor(USER_CODE, CODE_DESCRIPTOR | DPL3),
    };
    for number in [index::SS, index::DS, index::ES] {
        cpu.seg[number] = Segment::from_descriptor(USER_DATA, DATA_DESCRIPTOR | DPL3);
    }
    cpu.seg[index::FS].base = state.fs_base;
    cpu.seg[index::GS].base = state.gs_base;
}

/// The CPUID leaves that say what the host can do.
fn host_cpuid() -> Cpuid {
    let mut cpuid = Cpuid::default();
    for (leaf, subleaf) in [
        (0, None),
        (1, None),
        (7, Some(0)),
        (0xd, Some(0)),
        (0xd, Some(1)),
        (0x8000_0000, None),
        (0x8000_0001, None),
        (0x8000_0008, None),
    ] {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf.unwrap_or(0));
        cpuid.set(leaf, subleaf, CpuidResult { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx });
    }
    cpuid
}

/// An FXSAVE image (SDM vol. 1 table 10-2).
#[repr(C, align(16))]
struct Image([u8; 512]);

/// Runs `action` with the case's x87 state in the CPU, where the engine keeps it; returns what it became.
fn with_x87(state: &X87, action: impl FnOnce()) -> X87 {
    const MXCSR: usize = 24;
    const ST: usize = 32;
    let mut image = Image([0; 512]);
    let area = &mut image.0;
    area[0..2].copy_from_slice(&state.control.to_le_bytes());
    area[2..4].copy_from_slice(&state.status.to_le_bytes());
    area[4] = state.tag;
    area[MXCSR..MXCSR + 4].copy_from_slice(&RUST_MXCSR.to_le_bytes());
    for (value, place) in state.st.iter().zip(area[ST..].chunks_mut(16)) {
        place[..10].copy_from_slice(value);
    }
    // SAFETY: 512 aligned bytes are read. MXCSR stays as Rust has it; Rust code in between uses no x87 or MMX
    // registers.
    unsafe {
        asm!(
            "fxrstor64 [{}]",
            in(reg) area.as_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack)
        );
    }
    action();
    // SAFETY: 512 aligned bytes are written; FNINIT leaves the registers as Rust expects them.
    unsafe { asm!("fxsave64 [{}]", "fninit", in(reg) area.as_mut_ptr(), options(nostack)) };
    let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    X87 {
        control: word(0),
        status: word(2),
        tag: area[4],
        st: std::array::from_fn(|i| area[ST + 16 * i..ST + 16 * i + 10].try_into().expect("10 bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::CODE;

    #[test]
    fn the_layout_fits() {
        assert!(BACKING as usize + BACKING_BYTES <= RAM_BYTES);
        assert_eq!(backing_of(CODE), Some(DATA_BYTES));
    }

    #[test]
    fn x87_state_goes_through_the_cpu() {
        let state = X87 { control: 0x27f, status: 0x3800, tag: 0x81, st: std::array::from_fn(|i| [i as u8; 10]) };
        assert_eq!(with_x87(&state, || ()), state);
    }
}
