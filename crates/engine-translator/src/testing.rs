//! A small machine for tests: RAM, page tables, descriptor tables, a vCPU, and devices that take notes.
//!
//! Everything lies at fixed guest-physical places, identity-mapped with user access, 2 MiB pages from 2 MiB
//! on. Exception handlers are a HLT each, at [`handler`], so that a test can see where a vector led by RIP.

use crate::core::{Core, VcpuShared, VmShared};
use crate::host;
use crate::interpret;
use crate::ram::Ram;
use crate::system::Step;
use crate::translate::Translator;
use crate::vcpu::TranslatorVcpu;
use anyvisor_engine::memory::in_file;
use anyvisor_engine::{Exit, GuestIo, Kicker, Vcpu};
use anyvisor_x86::bits::{cr0, cr4, efer, gpr, rflags, xcr0};
use anyvisor_x86::cpuid::CpuModel;
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::{Cpuid, DescriptorTable, Segment};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddress;

/// Guest-physical (and linear) addresses of what the machine sets up.
pub mod place {
    /// The top of the page tables; the rest follows.
    pub const PML4: u64 = 0x1000;
    /// The page table of the first 2 MiB.
    pub const PT: u64 = 0x4000;
    pub const GDT: u64 = 0x5000;
    pub const IDT: u64 = 0x6000;
    pub const TSS: u64 = 0x7000;
    pub const HANDLERS: u64 = 0x8000;
    /// Stack of CPL 0, growing down; what the TSS names.
    pub const KERNEL_STACK: u64 = 0xc000;
    /// The stack of IST 1.
    pub const IST_STACK: u64 = 0xd000;
    pub const STACK: u64 = 0xf000;
    pub const CODE: u64 = 0x1_0000;
    pub const DATA: u64 = 0x2_0000;
}

/// Selectors of the GDT.
pub mod selector {
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER_CODE32: u16 = 0x18 | 3;
    pub const USER_DATA: u16 = 0x20 | 3;
    pub const USER_CODE64: u16 = 0x28 | 3;
    pub const TSS: u16 = 0x30;
    pub const CODE32: u16 = 0x40;
    pub const CODE16: u16 = 0x48;
    pub const DATA16: u16 = 0x50;
    pub const NOT_PRESENT: u16 = 0x58;
    pub const CONFORMING64: u16 = 0x60;
    pub const READ_ONLY: u16 = 0x68;
    /// Free for a test's own descriptors, 16 bytes each.
    pub const FREE: u16 = 0x70;
    pub const COUNT: u16 = 0x10;
}

/// What a device saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    PioRead { port: u16, size: usize },
    PioWrite { port: u16, data: Vec<u8> },
    MmioRead { gpa: u64, size: usize },
    MmioWrite { gpa: u64, data: Vec<u8> },
    Eoi(u8),
    AcknowledgePic,
}

/// Devices that write down every access. Reads get the next of `answers`, or all ones.
#[derive(Default)]
pub struct MockIo {
    log: Mutex<Vec<Access>>,
    answers: Mutex<VecDeque<u64>>,
    pic: Mutex<Option<u8>>,
}

impl MockIo {
    /// Takes the accesses so far.
    pub fn take_log(&self) -> Vec<Access> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
    /// What the next read returns.
    pub fn answer(&self, value: u64) {
        self.answers.lock().unwrap().push_back(value);
    }
    /// The vector that the 8259 pair has ready, once.
    pub fn set_pic(&self, vector: Option<u8>) {
        *self.pic.lock().unwrap() = vector;
    }
    /// The same devices, of which port 0xf4 kicks.
    pub fn until_port(&self, kicker: Kicker) -> impl GuestIo {
        KickingIo { inner: self, kicker }
    }
    fn note(&self, access: Access) {
        self.log.lock().unwrap().push(access);
    }
    fn fill(&self, data: &mut [u8]) {
        let value = self.answers.lock().unwrap().pop_front().unwrap_or(u64::MAX);
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }
}

impl GuestIo for MockIo {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Access::PioRead { port, size: data.len() });
        self.fill(data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.note(Access::PioWrite { port, data: data.to_vec() });
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.note(Access::MmioRead { gpa, size: data.len() });
        self.fill(data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note(Access::MmioWrite { gpa, data: data.to_vec() });
    }
    fn eoi(&self, vector: u8) {
        self.note(Access::Eoi(vector));
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        self.note(Access::AcknowledgePic);
        self.pic.lock().unwrap().take()
    }
}

/// Where the handler of `vector` is.
pub fn handler(vector: u8) -> u64 {
    place::HANDLERS + 16 * u64::from(vector)
}

/// A descriptor of the GDT: `attributes` as in [`attr`].
pub fn descriptor(base: u32, limit: u32, attributes: u32) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(attributes & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | u64::from(attributes >> 12 & 0xf) << 52
        | (base >> 24) << 56
}

/// How a [`TestVm`]'s vCPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Interpret,
    Translate,
}

/// A machine with one vCPU.
pub struct TestVm {
    pub vcpu: TranslatorVcpu,
    pub vm: Arc<VmShared>,
    pub io: MockIo,
}

/// All that this host can show.
pub fn cpuid() -> Cpuid {
    CpuModel::Host.table(&host::supported_cpuid(host::tsc_khz()), 1, 0).expect("the host model always exists")
}

/// vCPU `id` of `vm`, as after reset.
fn vcpu(vm: &Arc<VmShared>, id: u32, method: Method) -> TranslatorVcpu {
    let (shared, cpu) = VcpuShared::new(id);
    vm.vcpus.write().unwrap().push(shared.clone());
    let core = Core::new(vm.clone(), shared, cpu, cpuid());
    let translator =
        (method == Method::Translate).then(|| Translator::new(&cpuid()).expect("the host gives code memory"));
    let mut vcpu = TranslatorVcpu::new(core, translator).expect("the reset state is valid");
    // Single steps do not look at events unless a test makes one.
    vcpu.core().cpu.pending.store(0, Ordering::SeqCst);
    vcpu
}

impl TestVm {
    /// A machine with `mib` MiB of RAM, at least 4, whose vCPU is as after reset.
    pub fn new(mib: u64, method: Method) -> TestVm {
        assert!(mib >= 4);
        crate::native::install_signal_handlers();
        let memory = in_file(&[(GuestAddress(0), (mib << 20) as usize)]).expect("host memory");
        let vm = Arc::new(VmShared::new(Arc::new(Ram::new(memory)), host::tsc_khz()));
        TestVm { vcpu: vcpu(&vm, 0, method), vm, io: MockIo::default() }
    }

    /// Another vCPU of the machine, in the same state as its own but for where it is about to run code, and on which stack.
    pub fn another_vcpu(&mut self, method: Method, rip: u64, rsp: u64) -> TranslatorVcpu {
        let id = self.vm.vcpus.read().unwrap().len() as u32;
        let mut other = vcpu(&self.vm, id, method);
        let mut state = self.vcpu.state().expect("a state");
        state.rip = rip;
        state.gpr[gpr::RSP] = rsp;
        state.lapic.clear();
        other.set_state(&state).expect("a valid state");
        other
    }

    /// A machine with 16 MiB and `code` at [`place::CODE`], about to run it in 64-bit mode at `cpl` (0 or 3)
    /// with interrupts off.
    pub fn long_mode(code: &[u8], cpl: u8) -> TestVm {
        TestVm::long_mode_by(code, cpl, Method::Interpret)
    }

    /// As [`TestVm::long_mode`], by either method.
    pub fn long_mode_by(code: &[u8], cpl: u8, method: Method) -> TestVm {
        let mut test = TestVm::new(16, method);
        test.write_tables();
        test.load(place::CODE, code);
        let cpu = &mut test.core().cpu;
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        cpu.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        cpu.cr3 = place::PML4;
        cpu.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        cpu.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        cpu.gdtr = DescriptorTable { base: place::GDT, limit: 8 * selector::COUNT - 1 };
        cpu.idtr = DescriptorTable { base: place::IDT, limit: 0xfff };
        cpu.ldtr = Segment::unusable(0);
        cpu.tr = Segment { base: place::TSS, limit: 0x67, attributes: attr::P | 0xb, selector: selector::TSS };
        cpu.star = u64::from(selector::CODE64) << 32 | u64::from(selector::USER_CODE32) << 48;
        let (code, data) =
            if cpl == 3 { (selector::USER_CODE64, selector::USER_DATA) } else { (selector::CODE64, selector::DATA) };
        for number in [index::ES, index::SS, index::DS, index::FS, index::GS] {
            test.set_segment(number, data);
        }
        test.set_segment(index::CS, code);
        let cpu = &mut test.core().cpu;
        cpu.cpl = cpl;
        cpu.rip = place::CODE;
        cpu.gpr[gpr::RSP] = place::STACK;
        test
    }

    /// A machine about to run `code` in 32-bit protected mode without paging at `cpl`.
    pub fn protected_mode(code: &[u8], cpl: u8) -> TestVm {
        let mut test = TestVm::long_mode(code, 0);
        let cpu = &mut test.core().cpu;
        cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
        cpu.efer = 0;
        cpu.cr4 = cr4::OSFXSR;
        // Gates and TSS of 32 bits; handlers are the same.
        let gates: Vec<u8> = (0..=255)
            .flat_map(|vector| {
                let offset = handler(vector);
                let gate = offset & 0xffff | u64::from(selector::CODE32) << 16 | 0x8e00 << 32 | (offset >> 16) << 48;
                gate.to_le_bytes()
            })
            .collect();
        test.load(place::IDT, &gates);
        test.load(place::TSS, &[0; 0x68]);
        test.load(place::TSS + 4, &(place::KERNEL_STACK as u32).to_le_bytes());
        test.load(place::TSS + 8, &u32::from(selector::DATA).to_le_bytes());
        test.load(place::TSS + 0x66, &0x68u16.to_le_bytes());
        let (code, data) =
            if cpl == 3 { (selector::USER_CODE32, selector::USER_DATA) } else { (selector::CODE32, selector::DATA) };
        for number in [index::ES, index::SS, index::DS, index::FS, index::GS] {
            test.set_segment(number, data);
        }
        test.set_segment(index::CS, code);
        test.core().cpu.cpl = cpl;
        test.core().flush_all();
        test
    }

    /// A machine about to run `code` in real mode, at linear address [`place::CODE`].
    pub fn real_mode(code: &[u8]) -> TestVm {
        let mut test = TestVm::new(16, Method::Interpret);
        test.load(place::CODE, code);
        for vector in 0..=255u8 {
            test.load(handler(vector), &[0xf4]);
            test.load(4 * u64::from(vector), &(handler(vector) as u32).to_le_bytes());
        }
        let cpu = &mut test.core().cpu;
        cpu.seg[index::CS] = Segment::real_mode((place::CODE >> 4) as u16, true);
        cpu.idtr = DescriptorTable { base: 0, limit: 0x3ff };
        cpu.rip = 0;
        cpu.gpr[gpr::RSP] = place::STACK;
        test
    }

    fn write_tables(&mut self) {
        let write = |at: u64, value: u64| assert!(self.vm.ram.write(at, &value.to_le_bytes()));
        write(place::PML4, 0x2007);
        write(0x2000, 0x3007);
        write(0x3000, place::PT | 7);
        for n in 1..512 {
            write(0x3000 + 8 * n, n << 21 | 0x87);
        }
        for n in 0..512 {
            write(place::PT + 8 * n, n << 12 | 7);
        }
        let code = attr::S | attr::P | attr::CODE | attr::WRITABLE | attr::G;
        let data = attr::S | attr::P | attr::WRITABLE | attr::G;
        let user = 3 << attr::DPL_SHIFT;
        let gdt = [
            (selector::CODE64, descriptor(0, 0xf_ffff, code | attr::L)),
            (selector::DATA, descriptor(0, 0xf_ffff, data | attr::DB)),
            (selector::USER_CODE32, descriptor(0, 0xf_ffff, code | user | attr::DB)),
            (selector::USER_DATA, descriptor(0, 0xf_ffff, data | user | attr::DB)),
            (selector::USER_CODE64, descriptor(0, 0xf_ffff, code | user | attr::L)),
            (selector::TSS, descriptor(place::TSS as u32, 0x67, attr::P | 0xb)),
            (selector::CODE32, descriptor(0, 0xf_ffff, code | attr::DB)),
            (selector::CODE16, descriptor(0, 0xffff, code & !attr::G)),
            (selector::DATA16, descriptor(0, 0xffff, data & !attr::G)),
            (selector::NOT_PRESENT, descriptor(0, 0xf_ffff, data & !attr::P)),
            (selector::CONFORMING64, descriptor(0, 0xf_ffff, code | attr::L | attr::EXPAND_DOWN)),
            (selector::READ_ONLY, descriptor(0, 0xf_ffff, data & !attr::WRITABLE)),
        ];
        for (selector, value) in gdt {
            write(place::GDT + u64::from(selector & !7), value);
        }
        for vector in 0..=255 {
            self.set_gate(vector, 0x8e, 0);
            self.load(handler(vector), &[0xf4]);
        }
        self.load(place::TSS + 4, &place::KERNEL_STACK.to_le_bytes());
        self.load(place::TSS + 0x24, &place::IST_STACK.to_le_bytes());
        self.load(place::TSS + 0x66, &0x68u16.to_le_bytes());
    }

    /// Sets the 64-bit gate of `vector`: `kind` is its type byte (8Eh an interrupt gate, EEh one for CPL 3).
    pub fn set_gate(&mut self, vector: u8, kind: u8, ist: u8) {
        let offset = handler(vector);
        let low = offset & 0xffff
            | u64::from(selector::CODE64) << 16
            | u64::from(ist) << 32
            | u64::from(kind) << 40
            | (offset >> 16 & 0xffff) << 48;
        let at = place::IDT + 16 * u64::from(vector);
        self.load(at, &low.to_le_bytes());
        self.load(at + 8, &(offset >> 32).to_le_bytes());
    }

    /// Loads a segment register from the GDT without checks.
    pub fn set_segment(&mut self, number: usize, selector: u16) {
        let raw = self.read_u64(place::GDT + u64::from(selector & !7));
        let mut segment = Segment::from_descriptor(selector, raw);
        segment.attributes |= attr::ACCESSED;
        self.core().cpu.seg[number] = segment;
    }

    /// Writes a page-table entry of the first 2 MiB: the page at `gva` becomes `entry`.
    pub fn map(&mut self, gva: u64, entry: u64) {
        assert!(gva < 2 << 20);
        self.load(place::PT + 8 * (gva >> 12), &entry.to_le_bytes());
        self.core().flush_all();
    }

    pub fn core(&mut self) -> &mut Core {
        self.vcpu.core()
    }

    /// Writes guest-physical memory.
    pub fn load(&self, gpa: u64, bytes: &[u8]) {
        assert!(self.vm.ram.write(gpa, bytes), "{gpa:#x} is not RAM");
    }

    /// Reads guest-physical memory.
    pub fn read_u64(&self, gpa: u64) -> u64 {
        let mut data = [0; 8];
        assert!(self.vm.ram.read(gpa, &mut data), "{gpa:#x} is not RAM");
        u64::from_le_bytes(data)
    }

    pub fn rip(&mut self) -> u64 {
        self.core().cpu.rip
    }

    /// The `n`-th quadword on the current stack.
    pub fn stack(&mut self, n: u64) -> u64 {
        let rsp = self.core().cpu.gpr[gpr::RSP];
        self.read_u64(rsp + 8 * n)
    }

    /// Interprets one instruction, without looking at events. x87 instructions need [`TestVm::run`].
    pub fn step(&mut self) -> Step {
        interpret::step(self.vcpu.core(), &self.io)
    }

    /// Interprets `n` instructions.
    pub fn steps(&mut self, n: usize) {
        for _ in 0..n {
            assert_eq!(self.step(), Step::Done);
        }
    }

    /// Interprets until HLT; panics after `limit` instructions or at a shutdown.
    pub fn step_to_halt(&mut self, limit: usize) {
        for _ in 0..limit {
            assert_eq!(self.step(), Step::Done, "shut down at {:#x}", self.rip());
            if self.core().cpu.halted {
                return;
            }
        }
        panic!("no HLT in {limit} instructions; RIP {:#x}", self.rip());
    }

    /// Runs the vCPU until an access to port 0xf4 or a shutdown; the access kicks it.
    pub fn run(&mut self) -> Exit {
        let io = self.io.until_port(self.vcpu.kicker());
        self.vcpu.run(&io).expect("the host supports the engine")
    }
}

/// Ends [`TestVm::run`] at an access to port 0xf4.
struct KickingIo<'a> {
    inner: &'a MockIo,
    kicker: Kicker,
}

impl GuestIo for KickingIo<'_> {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.inner.pio_read(port, data);
        if port == 0xf4 {
            self.kicker.kick();
        }
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.inner.pio_write(port, data);
        if port == 0xf4 {
            self.kicker.kick();
        }
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.inner.mmio_read(gpa, data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.inner.mmio_write(gpa, data);
    }
    fn eoi(&self, vector: u8) {
        self.inner.eoi(vector);
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        self.inner.acknowledge_pic()
    }
}

/// The status flags in RFLAGS that a test compares.
pub const STATUS: u64 = rflags::STATUS;
