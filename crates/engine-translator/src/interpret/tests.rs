//! Tests of the interpreter: cases by hand, and random instructions against the host CPU.

use super::*;
use crate::core::{VcpuShared, VmShared};
use crate::ram::Ram;
use crate::vendor;
use anyvisor_x86::bits::{cr0, cr4, efer, gpr::*, rflags::*, xcr0};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::attr;
use anyvisor_x86::{Cpuid, CpuidResult, Segment};
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

mod host;
mod random_guests;
mod vector_units;

/// Bytes of RAM at address 0.
const RAM_SIZE: u64 = 0x10_0000;
const CODE: u64 = 0x1000;
const DATA: u64 = 0x8000;
const STACK: u64 = 0x7000;

/// A machine without devices.
struct NoDevices;

impl GuestIo for NoDevices {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn eoi(&self, _vector: u8) {}
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}

/// The host's own features, so that everything it has can be tested.
fn host_cpuid() -> Cpuid {
    let mut table = Cpuid::default();
    for (leaf, subleaf) in [(1, 0), (7, 0), (7, 1), (0xd, 0), (0x8000_0001, 0)] {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        table.set(leaf, Some(subleaf), CpuidResult { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx });
    }
    table
}

/// A vCPU with `RAM_SIZE` bytes of RAM, no paging, and everything enabled, in `mode`.
fn machine(mode: Mode) -> Core {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).unwrap();
    let vm = Arc::new(VmShared::new(Arc::new(Ram::new(memory)), 1_000_000));
    let (shared, cpu) = VcpuShared::new(0);
    let mut core = Core::new(vm, shared, cpu, host_cpuid());
    let long = matches!(mode, Mode::Long64 | Mode::Compat16 | Mode::Compat32);
    let size = match mode {
        Mode::Long64 => attr::L,
        Mode::Compat32 | Mode::Protected32 => attr::DB,
        _ => 0,
    };
    let flat = attr::S | attr::P | attr::G | attr::WRITABLE | attr::ACCESSED;
    let data = Segment { base: 0, limit: u32::MAX, attributes: flat | size & attr::DB, selector: 0x10 };
    let code = Segment { base: 0, limit: u32::MAX, attributes: flat | attr::CODE | size, selector: 0x8 };
    core.cpu.seg = [data, code, data, data, data, data];
    if mode == Mode::Real {
        core.cpu.seg = [Segment::real_mode(0, false); 6];
        core.cpu.seg[index::CS] = Segment::real_mode(0, true);
    } else {
        core.cpu.cr0 = cr0::PE;
    }
    core.cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    core.cpu.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    core.cpu.efer = if long { efer::LMA | efer::LME } else { 0 };
    core.cpu.rflags = FIXED;
    core.cpu.rip = CODE;
    core.cpu.gpr[RSP] = STACK;
    assert_eq!(core.cpu.mode(), mode);
    core
}

use crate::cpu::Mode;

/// Bytes from hexadecimal text; spaces are ignored.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

fn put(core: &mut Core, gpa: u64, bytes: &[u8]) {
    assert!(core.ram.write(gpa, bytes));
}

fn get(core: &Core, gpa: u64, size: usize) -> u64 {
    let mut bytes = [0; 8];
    assert!(core.ram.read(gpa, &mut bytes[..size]));
    u64::from_le_bytes(bytes)
}

/// Executes the instruction at RIP, without delivery of what it raises.
fn run_one(core: &mut Core) -> Result<u64, Exception> {
    let (rip, flags) = (core.cpu.rip, core.cpu.rflags);
    execute(core, &NoDevices, rip, flags).inspect_err(|_| core.cpu.rip = rip)
}

/// Executes `code` at `CODE`, to its end.
fn run(core: &mut Core, code: &str) -> Result<(), Exception> {
    let code = hex(code);
    put(core, CODE, &code);
    core.cpu.rip = CODE;
    while core.cpu.rip != CODE + code.len() as u64 {
        run_one(core)?;
    }
    Ok(())
}

/// Registers and status flags to set, or to expect; `M(address, size)` is memory.
#[derive(Clone, Copy, Debug)]
enum At {
    R(usize),
    M(u64, usize),
    Flags,
    Rip,
}
use At::{Flags, M, R, Rip};

/// Executes `code` in `mode` with `before` set, and expects `after`.
fn check(mode: Mode, code: &str, before: &[(At, u64)], after: &[(At, u64)]) {
    let mut core = machine(mode);
    for &(at, value) in before {
        match at {
            R(n) => core.cpu.gpr[n] = value,
            M(gpa, size) => put(&mut core, gpa, &value.to_le_bytes()[..size]),
            Flags => core.cpu.rflags = value | FIXED,
            Rip => core.cpu.rip = value,
        }
    }
    let bytes = hex(code);
    let rip = core.cpu.rip;
    put(&mut core, rip, &bytes);
    let result = run_one(&mut core);
    assert!(result.is_ok(), "{mode:?} {code}: {result:?}");
    for &(at, expected) in after {
        let found = match at {
            R(n) => core.cpu.gpr[n],
            M(gpa, size) => get(&core, gpa, size),
            Flags => core.cpu.rflags & !FIXED,
            Rip => core.cpu.rip,
        };
        assert_eq!(found, expected, "{mode:?} {code}: {at:x?} is {found:#x}, not {expected:#x}");
    }
}

/// Executes `code` in `mode` with `before` set, and expects it to raise `exception` and change nothing.
fn check_fault(mode: Mode, code: &str, before: &[(usize, u64)], exception: Exception) {
    let mut core = machine(mode);
    for &(n, value) in before {
        core.cpu.gpr[n] = value;
    }
    put(&mut core, CODE, &hex(code));
    let gpr = core.cpu.gpr;
    assert_eq!(run_one(&mut core), Err(exception), "{mode:?} {code}");
    assert_eq!((core.cpu.gpr, core.cpu.rip), (gpr, CODE), "{mode:?} {code}");
}

use Mode::{Compat32, Long64, Protected32, Real};

#[test]
fn moves_zero_extend_and_merge() {
    check(Long64, "89 d8", &[(R(RAX), u64::MAX), (R(RBX), 0x1_2345_6789)], &[(R(RAX), 0x2345_6789)]); // mov eax, ebx
    check(Long64, "66 89 d8", &[(R(RAX), u64::MAX), (R(RBX), 0x1234)], &[(R(RAX), 0xffff_ffff_ffff_1234)]);
    check(Long64, "88 dc", &[(R(RAX), 0), (R(RBX), 0x56)], &[(R(RAX), 0x5600)]); // mov ah, bl
    check(Long64, "40 88 dc", &[(R(RSP), 0x100), (R(RBX), 0x56)], &[(R(RSP), 0x156)]); // mov spl, bl
    check(Long64, "0f 42 c3", &[(R(RAX), u64::MAX), (Flags, 0)], &[(R(RAX), 0xffff_ffff)]); // cmovb not taken
    check(Long64, "48 63 c3", &[(R(RBX), 0x8000_0000)], &[(R(RAX), 0xffff_ffff_8000_0000)]); // movsxd
    check(Long64, "a1 00 80 00 00 00 00 00 00", &[(M(DATA, 4), 7)], &[(R(RAX), 7)]); // mov eax, moffs
    check(
        Long64,
        "38 f2 66 0f 38 f0 03".get(6..).unwrap(),
        &[(R(RBX), DATA), (M(DATA, 2), 0x1234)],
        &[(R(RAX), 0x3412)],
    );
}

#[test]
fn addresses_wrap_at_the_address_size() {
    // lea eax, [bx+si+0x10] in real mode; lea rax, [ebx+4] with a 67h prefix; RIP-relative.
    check(Real, "66 8d 40 10", &[(R(RBX), 0xfff8), (R(RSI), 0)], &[(R(RAX), 8)]);
    check(Long64, "67 48 8d 43 04", &[(R(RBX), 0xffff_fffe)], &[(R(RAX), 2)]);
    check(Long64, "8b 05 f9 6f 00 00", &[(M(DATA, 4), 0), (M(0x7fff, 4), 0x55)], &[(R(RAX), 0x55)]);
    check(Compat32, "8d 44 24 04", &[(R(RSP), 0xffff_fffe)], &[(R(RAX), 2)]);
    // A word at offset 0xffff crosses the limit in real mode, and a push wraps the 16-bit stack.
    check_fault(Real, "8b 07", &[(RBX, 0xffff)], Exception::gp(0));
    check(Real, "50", &[(R(RAX), 0x1234), (R(RSP), 0x5_0000)], &[(R(RSP), 0x5_fffe), (M(0xfffe, 2), 0x1234)]);
}

#[test]
fn stack_instructions() {
    check(Long64, "54", &[(R(RSP), STACK)], &[(R(RSP), STACK - 8), (M(STACK - 8, 8), STACK)]); // push rsp
    check(Long64, "5c", &[(M(STACK, 8), 0x1234)], &[(R(RSP), 0x1234)]); // pop rsp
    check(Long64, "6a ff", &[], &[(M(STACK - 8, 8), u64::MAX)]);
    check(Long64, "66 6a ff", &[(M(STACK - 8, 8), 0)], &[(R(RSP), STACK - 2), (M(STACK - 4, 4), 0xffff_0000)]);
    // pop qword [rsp]: the address is computed after the increment.
    check(Long64, "8f 04 24", &[(M(STACK, 8), 0x99)], &[(M(STACK + 8, 8), 0x99), (R(RSP), STACK + 8)]);
    check(Long64, "c8 10 00 00", &[(R(RBP), 5)], &[(R(RBP), STACK - 8), (R(RSP), STACK - 0x18), (M(STACK - 8, 8), 5)]);
    check(
        Long64,
        "c8 10 00 02", // enter 16, 2
        &[(R(RBP), DATA), (M(DATA - 8, 8), 0x77)],
        &[(R(RBP), STACK - 8), (R(RSP), STACK - 0x28), (M(STACK - 16, 8), 0x77), (M(STACK - 24, 8), STACK - 8)],
    );
    check(Long64, "c9", &[(R(RBP), DATA), (M(DATA, 8), 6)], &[(R(RBP), 6), (R(RSP), DATA + 8)]);
    check(Protected32, "60", &[(R(RAX), 1), (R(RDI), 8)], &[(R(RSP), STACK - 32), (M(STACK - 4, 4), 1)]);
    check(
        Protected32,
        "61",
        &[(M(STACK, 4), 8), (M(STACK + 12, 4), 0xdead), (M(STACK + 28, 4), 1)],
        &[(R(RDI), 8), (R(RAX), 1), (R(RSP), STACK + 32)],
    );
    check_fault(Long64, "50", &[(RSP, 0x8000_0000_0000_0004)], Exception::ss(0));
    check_fault(Long64, "8b 45 00", &[(RBP, 1 << 60)], Exception::ss(0));
    check_fault(Long64, "8b 43 00", &[(RBX, 1 << 60)], Exception::gp(0));
}

#[test]
fn near_transfers() {
    check(Long64, "e8 10 00 00 00", &[], &[(Rip, CODE + 0x15), (M(STACK - 8, 8), CODE + 5)]);
    check(Long64, "ff d3", &[(R(RBX), 0x4000)], &[(Rip, 0x4000), (R(RSP), STACK - 8)]);
    check(Long64, "c2 10 00", &[(M(STACK, 8), 0x5000)], &[(Rip, 0x5000), (R(RSP), STACK + 0x18)]);
    check(Long64, "e2 fe", &[(R(RCX), 2)], &[(Rip, CODE), (R(RCX), 1)]);
    check(Long64, "67 e2 fd", &[(R(RCX), 1 << 32)], &[(Rip, CODE), (R(RCX), 0xffff_ffff)]);
    check(Long64, "e1 fe", &[(R(RCX), 5), (Flags, 0)], &[(Rip, CODE + 2), (R(RCX), 4)]);
    check(Long64, "e3 10", &[(R(RCX), 0)], &[(Rip, CODE + 0x12)]);
    check(Long64, "0f 84 00 01 00 00", &[(Flags, ZF)], &[(Rip, CODE + 0x106)]);
    check(Real, "eb 7f", &[(Rip, 0xff90)], &[(Rip, 0x11)]);
    check_fault(Long64, "ff e0", &[(RAX, 1 << 50)], Exception::gp(0));
    check_fault(Real, "66 ff e0", &[(RAX, 0x1_0000)], Exception::gp(0));
}

#[test]
fn locked_and_exchanging_instructions() {
    let at = (R(RBX), DATA);
    check(Long64, "87 03", &[at, (R(RAX), 1), (M(DATA, 4), 2)], &[(R(RAX), 2), (M(DATA, 4), 1)]);
    check(Long64, "f0 0f c1 03", &[at, (R(RAX), 3), (M(DATA, 4), 4)], &[(R(RAX), 4), (M(DATA, 4), 7)]);
    check(
        Long64,
        "f0 48 0f b1 0b",
        &[at, (R(RAX), 3), (R(RCX), 9), (M(DATA, 8), 3)],
        &[(M(DATA, 8), 9), (R(RAX), 3), (Flags, ZF | PF)],
    );
    check(Long64, "f0 0f b1 0b", &[at, (R(RAX), 3), (M(DATA, 4), 8)], &[(M(DATA, 4), 8), (R(RAX), 8)]);
    check(
        Long64,
        "f0 48 0f c7 0b",
        &[at, (R(RAX), 1), (R(RDX), 2), (M(DATA, 8), 1), (M(DATA + 8, 8), 2), (R(RCX), 7)],
        &[(M(DATA, 8), DATA), (M(DATA + 8, 8), 7), (Flags, ZF)],
    );
    check(
        Long64,
        "0f c7 0b",
        &[at, (R(RAX), u64::MAX), (R(RDX), 2), (M(DATA, 8), 0x5_0000_0006)],
        &[(R(RAX), 6), (R(RDX), 5), (Flags, 0)],
    );
    check_fault(Long64, "48 0f c7 0b", &[(RBX, DATA + 8)], Exception::gp(0));
    // Across a page, where no single host access can do it.
    check(Long64, "f0 ff 03", &[(R(RBX), 0x8ffe), (M(0x8ffe, 4), 0xffff)], &[(M(0x8ffe, 4), 0x1_0000)]);
}

#[test]
fn bit_strings_reach_beyond_the_operand() {
    let at = (R(RBX), DATA);
    check(Long64, "0f ab 03", &[at, (R(RAX), 100)], &[(M(DATA + 12, 4), 0x10), (Flags, 0)]);
    check(Long64, "0f a3 03", &[at, (R(RAX), (-1i64) as u64), (M(DATA - 4, 4), 1 << 31)], &[(Flags, CF)]);
    check(Long64, "0f ba 23 23", &[at, (M(DATA, 4), 8)], &[(Flags, CF)]); // bt [rbx], 35: modulo 32
}

#[test]
fn string_instructions() {
    let (from, to) = (DATA, DATA + 0x5000);
    let mut core = machine(Long64);
    let data: Vec<u8> = (0..9000u32).map(|i| (i * 7) as u8).collect();
    put(&mut core, from, &data);
    (core.cpu.gpr[RSI], core.cpu.gpr[RDI], core.cpu.gpr[RCX]) = (from, to + 3, 9000);
    run(&mut core, "f3 a4").unwrap();
    let mut copy = vec![0; 9000];
    assert!(core.ram.read(to + 3, &mut copy));
    assert_eq!(copy, data);
    assert_eq!((core.cpu.gpr[RSI], core.cpu.gpr[RDI], core.cpu.gpr[RCX]), (from + 9000, to + 9003, 0));

    // An overlapping upward move repeats; a downward one does not.
    check_string("f3 a4", DATA, DATA + 1, 7, 0, b"abcdefgh", b"aaaaaaaa");
    check_string("f3 a4", DATA + 6, DATA + 7, 7, DF, b"abcdefgh", b"aabcdefg");
    check_string("f3 ab", 0, DATA, 2, 0, b"abcdefgh", b"xyzwxyzw");
    check(
        Long64,
        "f3 a6",
        &[(R(RSI), DATA), (R(RDI), DATA + 8), (R(RCX), 8), (M(DATA, 4), 0x4030201), (M(DATA + 8, 4), 0x4990201)],
        &[(R(RCX), 5), (R(RSI), DATA + 3), (Flags, CF | PF | AF)],
    );
    check(Long64, "f2 ae", &[(R(RDI), DATA), (R(RCX), 9), (R(RAX), 5), (M(DATA + 2, 1), 5)], &[(R(RCX), 6)]);
    check(
        Long64,
        "67 f3 a4",
        &[(R(RCX), 1 << 32), (R(RSI), 5)],
        &[(R(RSI), 5), (R(RCX), if vendor::is_amd() { 1 << 32 } else { 0 })],
    );
}

fn check_string(code: &str, from: u64, to: u64, count: u64, flags: u64, before: &[u8; 8], after: &[u8; 8]) {
    let mut core = machine(Long64);
    put(&mut core, DATA, before);
    (core.cpu.gpr[RSI], core.cpu.gpr[RDI], core.cpu.gpr[RCX]) = (from, to, count);
    core.cpu.gpr[RAX] = u64::from(u32::from_le_bytes(*b"xyzw"));
    core.cpu.rflags |= flags;
    run(&mut core, code).unwrap();
    assert_eq!(get(&core, DATA, 8), u64::from_le_bytes(*after), "{code}");
}

#[test]
fn a_fault_in_a_repeated_move_leaves_precise_registers() {
    let mut core = machine(Protected32);
    core.cpu.seg[index::ES].limit = (DATA + 9) as u32;
    (core.cpu.gpr[RSI], core.cpu.gpr[RDI], core.cpu.gpr[RCX]) = (0x9000, DATA, 100);
    assert_eq!(run(&mut core, "f3 a5"), Err(Exception::gp(0)));
    assert_eq!((core.cpu.gpr[RSI], core.cpu.gpr[RDI], core.cpu.gpr[RCX]), (0x9008, DATA + 8, 98));
    assert_eq!(core.cpu.rip, CODE);
}

#[test]
fn divide_errors() {
    check_fault(Long64, "f7 f3", &[(RDX, 1), (RAX, 0), (RBX, 1)], Exception::de());
    check_fault(Long64, "48 f7 fb", &[(RDX, u64::MAX), (RAX, 1 << 63), (RBX, u64::MAX)], Exception::de());
    check_fault(Long64, "f6 f3", &[], Exception::de());
    check(Long64, "48 f7 f3", &[(R(RDX), 1), (R(RBX), 2)], &[(R(RAX), 1 << 63), (R(RDX), 0)]);
    check_fault(Protected32, "d4 00", &[], Exception::de());
}

#[test]
fn decimal_adjustment() {
    check(Protected32, "27", &[(R(RAX), 0x9a), (Flags, 0)], &[(R(RAX), 0), (Flags, CF | AF | ZF | PF)]);
    check(Protected32, "2f", &[(R(RAX), 0x1f), (Flags, 0)], &[(R(RAX), 0x19), (Flags, AF)]);
    check(Protected32, "37", &[(R(RAX), 0x10f), (Flags, 0)], &[(R(RAX), 0x205)]);
    check(Protected32, "3f", &[(R(RAX), 0x20f), (Flags, 0)], &[(R(RAX), 0x109)]);
    check(Protected32, "d4 0a", &[(R(RAX), 75)], &[(R(RAX), 0x705)]);
    check(Protected32, "d5 0a", &[(R(RAX), 0x705)], &[(R(RAX), 75)]);
}

#[test]
fn invalid_and_unsupported_instructions() {
    check_fault(Long64, "0f 0b", &[], Exception::ud());
    check_fault(Long64, "06", &[], Exception::ud());
    check_fault(Long64, "f0 01 d8", &[], Exception::ud()); // lock add eax, ebx
    check_fault(Long64, "62 f1 7c 48 58 c1", &[], Exception::ud()); // vaddps zmm0: no model has AVX-512
    check_fault(Long64, &"66".repeat(15), &[], Exception::gp(0));
    check_fault(Real, "c4 e2 60 f3 c8", &[], Exception::ud()); // blsr: VEX is not for real mode
    check(Long64, "f3 0f 1e fa", &[], &[(Rip, CODE + 4)]); // endbr64
    check(Long64, "0f 1f 44 00 00", &[], &[(Rip, CODE + 5)]);
    for hint in ["0f 1a c0", "0f 1b 03", "0f 19 c0", "0f 1c 00", "0f 1d c0", "0f 0d 03", "0f 18 3b", "0f 1e c8"] {
        let bytes = hex(hint).len() as u64;
        check(Long64, hint, &[(R(RBX), 1 << 60)], &[(Rip, CODE + bytes)]);
    }
    check(Long64, "0f 18 0f", &[(R(RDI), 1 << 60)], &[(Rip, CODE + 3)]); // prefetch never faults

    let mut core = machine(Long64);
    core.cpuid = Cpuid::default();
    assert_eq!(run(&mut core, "66 0f 38 f0 03"), Err(Exception::ud())); // movbe
    (core.cpu.gpr[RBX], core.cpu.gpr[RAX]) = (0x80, 0);
    run(&mut core, "f3 0f bd c3").unwrap(); // lzcnt is bsr on a processor without it
    assert_eq!(core.cpu.gpr[RAX], 7);
}

#[test]
fn segment_checks_of_protected_mode() {
    let mut core = machine(Protected32);
    core.cpu.gpr[RBX] = DATA;
    core.cpu.seg[index::DS].attributes &= !attr::WRITABLE;
    assert_eq!(run(&mut core, "89 03"), Err(Exception::gp(0)));
    assert_eq!(run(&mut core, "8b 03"), Ok(()));
    assert_eq!(run(&mut core, "2e 89 03"), Err(Exception::gp(0))); // code is not writable
    core.cpu.seg[index::FS] = Segment::unusable(0);
    assert_eq!(run(&mut core, "64 8b 03"), Err(Exception::gp(0)));
    core.cpu.seg[index::GS].base = 0x100;
    put(&mut core, DATA + 0x100, &[9, 0, 0, 0]);
    run(&mut core, "65 8b 03").unwrap();
    assert_eq!(core.cpu.gpr[RAX], 9);
    // Expand-down: valid above the limit only.
    core.cpu.seg[index::ES].attributes |= attr::EXPAND_DOWN;
    core.cpu.seg[index::ES].limit = (DATA + 1) as u32;
    assert_eq!(run(&mut core, "26 8b 03"), Err(Exception::gp(0)));
    assert_eq!(run(&mut core, "26 8b 43 02"), Ok(()));
    core.cpu.seg[index::SS].limit = 0xfff;
    assert_eq!(run(&mut core, "50"), Err(Exception::ss(0)));
}

#[test]
fn alignment_checks() {
    let mut core = machine(Long64);
    core.cpu.gpr[RBX] = DATA + 1;
    core.cpu.cr0 |= cr0::AM;
    core.cpu.rflags |= anyvisor_x86::bits::rflags::AC;
    assert_eq!(run(&mut core, "8b 03"), Ok(()));
    core.cpu.cpl = 3;
    assert_eq!(run(&mut core, "8b 03"), Err(Exception::with_code(vector::AC, 0)));
    assert_eq!(run(&mut core, "8a 03"), Ok(()));
}

#[test]
fn debug_traps() {
    let mut core = machine(Long64);
    put(&mut core, CODE, &hex("90 8b 03 89 03 90"));
    core.cpu.gpr[RBX] = DATA;
    core.cpu.rflags |= TF;
    assert_eq!(run_one(&mut core), Ok(dr::DR6_BS));
    core.cpu.rflags &= !TF;
    // Breakpoint 0 on writes of 4 bytes at DATA, 1 on execution of the last instruction.
    (core.cpu.dr[0], core.cpu.dr[1]) = (DATA + 2, CODE + 5);
    core.cpu.dr[7] = 0x405 | 0b1101 << 16;
    assert_eq!(run_one(&mut core), Ok(0));
    assert_eq!(run_one(&mut core), Ok(1));
    assert_eq!(run_one(&mut core), Err(Exception::db(2)));
    core.cpu.rflags |= RF;
    assert_eq!(run_one(&mut core), Ok(0));
    assert_eq!(core.cpu.rflags & RF, 0);
}

#[test]
fn fetch_faults() {
    check_fault(Long64, "0f 0b", &[], Exception::ud());
    let mut core = machine(Protected32);
    core.cpu.seg[index::CS].limit = CODE as u32 + 1;
    assert_eq!(run(&mut core, "b8 01 02 03 04"), Err(Exception::gp(0)));
    assert_eq!(run(&mut core, "31 c0"), Ok(()));
    assert_eq!(run_one(&mut core), Err(Exception::gp(0)));
}
