//! Real mode, and the way from there to long mode as a boot loader goes it.

use crate::system::Step;
use crate::testing::{Method, TestVm, handler, place};
use anyvisor_engine::Exit;
use anyvisor_x86::Segment;
use anyvisor_x86::bits::{cr0, gpr, rflags};
use anyvisor_x86::segment::index;

#[test]
fn real_mode_interrupts_and_iret() {
    let mut test = TestVm::real_mode(&[0xcd, 0x21, 0xf4]); // int 0x21; hlt
    test.load(handler(0x21), &[0xcf]);
    test.core().cpu.rflags |= rflags::IF;
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.seg[index::CS].base + cpu.rip, cpu.gpr[gpr::RSP]), (handler(0x21), place::STACK - 6));
    assert_eq!(cpu.rflags & rflags::IF, 0);
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.seg[index::CS].base, cpu.rip, cpu.gpr[gpr::RSP]), (place::CODE, 2, place::STACK));
    assert_ne!(cpu.rflags & rflags::IF, 0);
}

#[test]
fn real_mode_faults_push_no_error_code() {
    let mut test = TestVm::real_mode(&[0x0f, 0x00, 0xd8]); // ltr ax: not recognised
    test.steps(1);
    assert_eq!(test.core().cpu.seg[index::CS].base + test.rip(), handler(6));
    assert_eq!(test.core().cpu.gpr[gpr::RSP], place::STACK - 6);
    // An access beyond 64 KiB is #GP.
    let mut test = TestVm::real_mode(&[0x66, 0x67, 0x8b, 0x03]); // mov eax, [ebx]
    test.core().cpu.gpr[gpr::RBX] = 0x1_0000;
    test.steps(1);
    assert_eq!(test.core().cpu.seg[index::CS].base + test.rip(), handler(13));
    // A vector table that is too short for anything shuts down.
    let mut test = TestVm::real_mode(&[0x0f, 0x0b]);
    test.core().cpu.idtr.limit = 3;
    assert_eq!(test.step(), Step::Shutdown);
}

#[test]
fn real_mode_segments_and_far_calls() {
    // mov ax, 0x2000; mov ds, ax; call 0x1000:0x20; hlt; ... at 0x20: mov byte [0], 0x5a; retf
    let mut code = vec![0xb8, 0x00, 0x20, 0x8e, 0xd8, 0x9a, 0x20, 0x00, 0x00, 0x10, 0xf4];
    code.resize(0x20, 0x90);
    code.extend([0xc6, 0x06, 0x00, 0x00, 0x5a, 0xcb]);
    let mut test = TestVm::real_mode(&code);
    test.step_to_halt(10);
    assert_eq!(test.read_u64(place::DATA) & 0xff, 0x5a);
    assert_eq!(test.rip(), 11);
    assert_eq!(test.core().cpu.gpr[gpr::RSP], place::STACK);
}

#[test]
fn unreal_mode_keeps_the_limit() {
    let mut test = TestVm::real_mode(&[0x8e, 0xd8]); // mov ds, ax
    test.core().cpu.seg[index::DS].limit = !0;
    test.core().cpu.gpr[gpr::RAX] = 0x300;
    test.steps(1);
    let ds = test.core().cpu.seg[index::DS];
    assert_eq!((ds.base, ds.limit), (0x3000, !0));
}

/// A boot stub: real mode → protected mode → long mode, and a byte to port 0xf4 from 64-bit code.
///
/// ```text
/// 00  lgdt [cs:0x80]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 0x08:0x10014
/// 14  mov eax, 0x20; mov cr4, eax; mov eax, 0x1000; mov cr3, eax
///     mov ecx, 0xc0000080; rdmsr; or ah, 1; wrmsr
///     mov eax, cr0; or eax, 0x80000000; mov cr0, eax; jmp 0x10:0x10050
/// 50  mov al, 0x64; out 0xf4, al; hlt
/// ```
fn boot_stub() -> Vec<u8> {
    let mut code = vec![0x2e, 0x66, 0x0f, 0x01, 0x16, 0x80, 0x00, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0];
    code.extend([0xea, 0x14, 0x00, 0x08, 0x00]);
    assert_eq!(code.len(), 0x14);
    code.extend([0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0, 0xb8, 0x00, 0x10, 0, 0, 0x0f, 0x22, 0xd8]);
    code.extend([0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x80, 0xcc, 0x01, 0x0f, 0x30]);
    code.extend([0x0f, 0x20, 0xc0, 0x0d, 0, 0, 0, 0x80, 0x0f, 0x22, 0xc0]);
    code.extend([0xea, 0x50, 0x00, 0x01, 0x00, 0x10, 0x00]);
    code.resize(0x50, 0x90);
    code.extend([0xb0, 0x64, 0xe6, 0xf4, 0xf4]);
    code.resize(0x80, 0);
    // GDTR: limit, base; then the GDT: null, 32-bit code (its base is the stub's), 64-bit code.
    code.extend(0x17u16.to_le_bytes());
    code.extend((place::CODE as u32 + 0x88).to_le_bytes());
    code.resize(0x88, 0);
    for descriptor in [0u64, 0x00cf_9b00_0000_ffff | place::CODE << 16, 0x00af_9b00_0000_ffff] {
        code.extend(descriptor.to_le_bytes());
    }
    code
}

#[test]
fn from_real_mode_to_long_mode() {
    for method in [Method::Interpret, Method::Translate] {
        let mut test = TestVm::long_mode_by(&[], 0, method);
        test.load(place::CODE, &boot_stub());
        let cpu = &mut test.core().cpu;
        (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer) = (cr0::ET, 0, 0, 0);
        for number in 0..6 {
            cpu.seg[number] = Segment::real_mode(0, number == index::CS);
        }
        cpu.seg[index::CS] = Segment::real_mode((place::CODE >> 4) as u16, true);
        cpu.rip = 0;
        test.core().flush_all();
        assert_eq!(test.run(), Exit::Kicked);
        let cpu = &test.core().cpu;
        assert!(cpu.is_long_mode() && cpu.seg[index::CS].is_long(), "{method:?}");
        assert_eq!((cpu.rip, cpu.gpr[gpr::RAX] & 0xff), (place::CODE + 0x54, 0x64));
    }
}
