//! Small programs, translated and interpreted, with the same result.

use super::*;
use crate::core::{VcpuShared, VmShared};
use crate::cpu::pending;
use crate::ram::Ram;
use anyvisor_x86::CpuidResult;
use anyvisor_x86::bits::efer;
use anyvisor_x86::segment::{Segment, attr};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};
use vm_memory::{GuestAddress, GuestMemoryMmap};

struct NoIo;

impl GuestIo for NoIo {
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

const CODE: u64 = 0x1_0000;
const RAM: u64 = 16 << 20;

fn cpuid() -> Cpuid {
    let mut cpuid = Cpuid::default();
    let leaf = |eax, ebx, ecx, edx| CpuidResult { eax, ebx, ecx, edx };
    cpuid.set(1, None, leaf(0, 0, !0, !0));
    cpuid.set(7, Some(0), leaf(0, !(1 << 16), 0, 0));
    cpuid.set(0x8000_0001, None, leaf(0, 0, !0, !0));
    cpuid.set(0x8000_0008, None, leaf(0x3028, 0, 0, 0));
    cpuid
}

/// A vCPU at CPL 3 in 64-bit mode with the first 16 MiB identity-mapped, `code` at 0x10000.
fn core(code: &[u8]) -> Core {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let vm = Arc::new(VmShared {
        ram: Arc::new(Ram::new(memory)),
        vcpus: RwLock::new(Vec::new()),
        started: std::time::Instant::now(),
        pic_intr: AtomicBool::new(false),
        tsc_khz: 1_000_000,
        tsc_started: 0,
        clock: Default::default(),
        last_receiver: std::sync::atomic::AtomicU32::new(0),
    });
    let (shared, cpu) = VcpuShared::new(0);
    let mut core = Core::new(vm, shared, cpu, cpuid());
    let ram = core.ram.clone();
    let entry = |gpa: u64, value: u64| assert!(ram.write(gpa, &value.to_le_bytes()));
    entry(0x1000, 0x2000 | 7);
    entry(0x2000, 0x3000 | 7);
    entry(0x3000, 0x4000 | 7);
    for page in 0..512 {
        entry(0x4000 + 8 * page, (page << 12) | 7);
    }
    for page in 1..RAM >> 21 {
        entry(0x3000 + 8 * page, (page << 21) | 0x87);
    }
    assert!(ram.write(CODE, code));
    let cpu = &mut core.cpu;
    cpu.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE;
    cpu.cr3 = 0x1000;
    cpu.cr4 = cr4::PAE | cr4::OSFXSR;
    cpu.efer = efer::LME | efer::LMA;
    cpu.rflags = rflags::FIXED;
    cpu.cpl = 3;
    let flat = |code| {
        let kind = if code { attr::CODE | attr::L } else { attr::DB };
        Segment {
            base: 0,
            limit: !0,
            attributes: kind | 3 | attr::S | attr::P | 3 << attr::DPL_SHIFT | attr::G,
            selector: 0x33,
        }
    };
    cpu.seg = [flat(false), flat(true), flat(false), flat(false), flat(false), flat(false)];
    cpu.rip = CODE;
    core
}

/// Runs until RIP is `end`, where an endless loop is.
fn run_translated(core: &mut Core, end: u64) -> Translator {
    let mut translator = Translator::new(&cpuid()).unwrap();
    // SAFETY: GS is not used by Rust code; the block outlives the use of the translator on this thread.
    let result = unsafe {
        libc::syscall(libc::SYS_arch_prctl, 0x1001, std::ptr::from_mut::<Cpu>(&mut core.cpu)) // ARCH_SET_GS
    };
    assert_eq!(result, 0);
    translator.attach(core).unwrap();
    core.cpu.pending.store(pending::KICK, Ordering::Relaxed);
    for _ in 0..100_000 {
        if core.cpu.rip == end {
            return translator;
        }
        assert!(matches!(translator.advance(core, &NoIo), Step::Done));
    }
    panic!("did not reach {end:#x}, is at {:#x}", core.cpu.rip);
}

fn run_interpreted(core: &mut Core, end: u64) {
    for _ in 0..100_000 {
        if core.cpu.rip == end {
            return;
        }
        assert!(matches!(interpret::step(core, &NoIo), Step::Done));
    }
    panic!("did not reach {end:#x}, is at {:#x}", core.cpu.rip);
}

/// Translates and interprets `code`, whose last two bytes are a jump to itself; compares all of it.
fn check(code: &str) -> Core {
    let code: Vec<u8> = (0..code.len()).step_by(2).map(|i| u8::from_str_radix(&code[i..i + 2], 16).unwrap()).collect();
    let end = CODE + code.len() as u64 - 2;
    let mut translated = core(&code);
    run_translated(&mut translated, end);
    let mut interpreted = core(&code);
    run_interpreted(&mut interpreted, end);
    assert_eq!(translated.cpu.gpr, interpreted.cpu.gpr);
    assert_eq!(translated.cpu.rflags, interpreted.cpu.rflags);
    let bytes = |core: &Core| {
        let mut bytes = vec![0; RAM as usize];
        assert!(core.ram.read(0, &mut bytes));
        bytes
    };
    assert!(bytes(&translated) == bytes(&interpreted), "memory differs");
    translated
}

/// Loops, calls, pushes, high bytes, registers that live in memory, flags across memory accesses, LOOP,
/// RIP-relative and absolute operands, accesses across pages, LOCK:
/// ```text
///  mov r13, 0x20000 / mov r14d, 10 / xor r15d, r15d / mov rsp, 0x30000
/// again: mov [r13+r14*8], r14 / add r15, [r13+r14*8] / push r14 / push qword [r13+r14*8] / pop rsi / pop rdi
///  call func / lea rbx, [rsi+rdi*2+5] / cmp r14, 5 / mov rcx, [r13+r14*8] / adc rdx, rcx / movzx edi, ah
///  dec r14 / jne again / mov eax, [rel data] / mov r9, [rel data] / mov rcx, 3
/// l: add r11, 7 / loop l / mov byte [0x20fff], 0x11 / mov rbp, [0x20ffc] / lock xadd [r13], rbp (twice) / jmp end
/// func: mov rax, rsp / add rax, 0x1234 / ret
/// ```
#[test]
fn a_bit_of_everything() {
    let core = check(include_str!("../../tests/everything.hex").trim());
    assert_eq!(core.cpu.gpr[11], 21);
    assert_eq!(core.cpu.gpr[15], 55);
}
