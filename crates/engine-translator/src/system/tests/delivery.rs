//! Exceptions: which, with which error code, and what is on the handler's stack.

use crate::system::Step;
use crate::testing::{Access, Method, TestVm, handler, place, selector};
use anyvisor_engine::Exit;
use anyvisor_x86::bits::{cr0, cr4, dr, gpr, rflags};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::index;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const NX: u64 = 1 << 63;

/// Runs one instruction of `code` at `cpl`, which must raise `vector` as a fault with `error`.
fn faults(mut test: TestVm, vector: u8, error: Option<u64>) -> TestVm {
    let (rip, rsp, cs) = (test.rip(), test.core().cpu.gpr[gpr::RSP], test.core().cpu.seg[index::CS].selector);
    let flags = test.core().cpu.rflags;
    assert_eq!(test.step(), Step::Done);
    assert_eq!(test.rip(), handler(vector), "vector");
    let frame = if let Some(error) = error {
        assert_eq!(test.stack(0), error, "error code");
        1
    } else {
        0
    };
    assert_eq!(test.stack(frame), rip, "pushed RIP");
    assert_eq!(test.stack(frame + 1), u64::from(cs), "pushed CS");
    assert_eq!(test.stack(frame + 2), flags | rflags::RF, "pushed RFLAGS");
    assert_eq!(test.stack(frame + 3), rsp, "pushed RSP");
    let now = test.core().cpu.rflags;
    assert_eq!(now & (rflags::RF | rflags::TF | rflags::NT | rflags::VM | rflags::IF), 0);
    assert_eq!(test.core().cpu.cpl, 0);
    test
}

fn user(code: &[u8]) -> TestVm {
    TestVm::long_mode(code, 3)
}

fn kernel(code: &[u8]) -> TestVm {
    TestVm::long_mode(code, 0)
}

#[test]
fn privileged_instructions_at_cpl3() {
    let cases: &[&[u8]] = &[
        &[0xf4],                         // hlt
        &[0x0f, 0x20, 0xc0],             // mov rax, cr0
        &[0x0f, 0x22, 0xd8],             // mov cr3, rax
        &[0x0f, 0x21, 0xc0],             // mov rax, dr0
        &[0x0f, 0x30],                   // wrmsr
        &[0x0f, 0x32],                   // rdmsr
        &[0x0f, 0x06],                   // clts
        &[0x0f, 0x08],                   // invd
        &[0x0f, 0x09],                   // wbinvd
        &[0x0f, 0x01, 0x3f],             // invlpg [rdi]
        &[0x0f, 0x01, 0x17],             // lgdt [rdi]
        &[0x0f, 0x01, 0x1f],             // lidt [rdi]
        &[0x0f, 0x00, 0xd0],             // lldt ax
        &[0x0f, 0x00, 0xd8],             // ltr ax
        &[0x0f, 0x01, 0xf0],             // lmsw ax
        &[0x0f, 0x01, 0xf8],             // swapgs
        &[0x48, 0x0f, 0x07],             // sysretq
        &[0x0f, 0x35],                   // sysexit
        &[0x0f, 0x01, 0xd1],             // xsetbv
        &[0x66, 0x0f, 0x38, 0x82, 0x07], // invpcid rax, [rdi]
        &[0xfa],                         // cli
        &[0xfb],                         // sti
        &[0xec],                         // in al, dx
        &[0xef],                         // out dx, eax
        &[0x6c],                         // insb
        &[0x0f, 0x33],                   // rdpmc
    ];
    for code in cases {
        let mut test = user(code);
        test.core().cpu.gpr[gpr::RDI] = place::DATA;
        test.core().cpu.gpr[gpr::RDX] = 0x100;
        faults(test, vector::GP, Some(0));
    }
}

#[test]
fn undefined_instructions() {
    for code in [
        &[0x0f, 0x0b][..],   // ud2
        &[0x0f, 0xff, 0xc0], // ud0
        &[0x0f, 0xb9, 0xc0], // ud1
        &[0x0f, 0xaa],       // rsm
        &[0x0f, 0x01, 0xc8], // monitor
        &[0x0f, 0x01, 0xc9], // mwait
        &[0x0f, 0x20, 0xc8], // mov rax, cr1
        &[0x0f, 0x01, 0xca], // clac, at CPL 3
        &[0x0f, 0x01, 0xc2], // vmlaunch
        &[0x0f, 0x01, 0xd8], // vmrun
    ] {
        faults(user(code), vector::UD, None);
    }
    // With CR4.DE, DR4 does not exist.
    let mut test = kernel(&[0x0f, 0x21, 0xe0]);
    test.core().cpu.cr4 |= cr4::DE;
    faults(test, vector::UD, None);
    // Without CR4.FSGSBASE and OSXSAVE neither do these.
    for code in [&[0xf3, 0x48, 0x0f, 0xae, 0xc0][..], &[0x0f, 0x01, 0xd0]] {
        let mut test = user(code);
        test.core().cpu.cr4 &= !(cr4::FSGSBASE | cr4::OSXSAVE);
        faults(test, vector::UD, None);
    }
    // SYSCALL without EFER.SCE.
    let mut test = user(&[0x0f, 0x05]);
    test.core().cpu.efer &= !1;
    faults(test, vector::UD, None);
}

#[test]
fn umip_guards_the_tables() {
    for code in [
        &[0x0f, 0x01, 0x07][..], // sgdt [rdi]
        &[0x0f, 0x01, 0x0f],     // sidt
        &[0x0f, 0x00, 0xc0],     // sldt eax
        &[0x0f, 0x00, 0xc8],     // str eax
        &[0x0f, 0x01, 0xe0],     // smsw eax
    ] {
        let mut test = user(code);
        test.core().cpu.gpr[gpr::RDI] = place::DATA;
        test.steps(1);
        assert_eq!(test.rip(), place::CODE + 3, "allowed without UMIP");
        let mut test = user(code);
        test.core().cpu.gpr[gpr::RDI] = place::DATA;
        test.core().cpu.cr4 |= cr4::UMIP;
        faults(test, vector::GP, Some(0));
    }
    let mut test = user(&[0x0f, 0x01, 0x07]);
    test.core().cpu.gpr[gpr::RDI] = place::DATA;
    test.steps(1);
    assert_eq!(test.read_u64(place::DATA) & 0xffff, 8 * u64::from(selector::COUNT) - 1);
    assert_eq!(test.read_u64(place::DATA + 2), place::GDT);
}

#[test]
fn tsd_guards_the_tsc() {
    for code in [&[0x0f, 0x31][..], &[0x0f, 0x01, 0xf9]] {
        let mut test = user(code);
        test.core().cpu.cr4 |= cr4::TSD;
        faults(test, vector::GP, Some(0));
    }
    let mut test = user(&[0x0f, 0x31]);
    test.steps(1);
    assert_eq!(test.rip(), place::CODE + 2);
}

/// A load or store through RDI, a page at DATA mapped as `entry`, and the error code expected.
fn page_fault(test: TestVm, entry: u64, error: u64) {
    let mut test = test;
    test.core().cpu.gpr[gpr::RDI] = place::DATA + 8;
    test.map(place::DATA, entry);
    let mut test = faults(test, vector::PF, Some(error));
    assert_eq!(test.core().cpu.cr2, place::DATA + 8);
}

const LOAD: &[u8] = &[0x48, 0x8b, 0x07];
const STORE: &[u8] = &[0x48, 0x89, 0x07];
const JUMP: &[u8] = &[0xff, 0xe7];

#[test]
fn page_faults_of_every_kind() {
    let page = place::DATA;
    page_fault(kernel(LOAD), 0, 0);
    page_fault(kernel(STORE), 0, 2);
    page_fault(user(LOAD), 0, 4);
    page_fault(user(STORE), 0, 6);
    page_fault(user(LOAD), page | P | W, 5);
    page_fault(user(STORE), page | P | U, 7);
    page_fault(kernel(STORE), page | P, 3);
    page_fault(user(LOAD), page | P | U | 1 << 51, 13);
    page_fault(user(STORE), page | P | W, 7);
    // A write to a read-only page by the supervisor without CR0.WP is allowed.
    let mut test = kernel(STORE);
    test.core().cpu.cr0 &= !cr0::WP;
    test.core().cpu.gpr[gpr::RDI] = page;
    test.map(page, page | P);
    test.steps(1);
    assert_eq!(test.rip(), place::CODE + 3);
    // SMAP, and RFLAGS.AC that suspends it.
    let mut test = kernel(LOAD);
    test.core().cpu.cr4 |= cr4::SMAP;
    for n in 0..512 {
        test.map(n << 12, n << 12 | P | W);
    }
    page_fault(test, page | P | W | U, 1);
    let mut test = kernel(LOAD);
    test.core().cpu.cr4 |= cr4::SMAP;
    test.core().cpu.rflags |= rflags::AC;
    test.core().cpu.gpr[gpr::RDI] = page;
    test.steps(1);
    assert_eq!(test.rip(), place::CODE + 3);
}

#[test]
fn fetch_faults() {
    let fetch = |mut test: TestVm, entry: u64, error: u64| {
        test.core().cpu.gpr[gpr::RDI] = place::DATA;
        test.map(place::DATA, entry);
        test.steps(1);
        assert_eq!(test.rip(), place::DATA);
        let mut test = faults(test, vector::PF, Some(error));
        assert_eq!(test.core().cpu.cr2, place::DATA);
    };
    fetch(user(JUMP), place::DATA | P | U | NX, 0x15);
    fetch(user(JUMP), 0, 0x14);
    fetch(kernel(JUMP), place::DATA | P | NX, 0x11);
    let mut smep = kernel(JUMP);
    smep.map(place::CODE, place::CODE | P | W);
    smep.core().cpu.cr4 |= cr4::SMEP;
    smep.core().flush_all();
    fetch(smep, place::DATA | P | U, 0x11);
}

#[test]
fn accessed_and_dirty_bits() {
    let mut test = user(&[LOAD, STORE].concat());
    test.core().cpu.gpr[gpr::RDI] = place::DATA;
    test.map(place::DATA, place::DATA | P | W | U);
    let entry = place::PT + 8 * (place::DATA >> 12);
    test.steps(1);
    assert_eq!(test.read_u64(entry) & 0x60, 0x20);
    test.steps(1);
    assert_eq!(test.read_u64(entry) & 0x60, 0x60);
}

#[test]
fn non_canonical_addresses() {
    let mut test = user(LOAD);
    test.core().cpu.gpr[gpr::RDI] = 0x8000_0000_0000;
    faults(test, vector::GP, Some(0));
    // By the stack pointer it is #SS.
    let mut test = user(&[0x50]);
    test.core().cpu.gpr[gpr::RSP] = 0x9000_0000_0000;
    faults(test, vector::SS, Some(0));
}

#[test]
fn software_interrupts_check_the_gate() {
    // INT 0x40 through a gate of DPL 0: #GP with the gate's index and the IDT bit, EXT clear.
    let test = faults(user(&[0xcd, 0x40]), vector::GP, Some(0x40 * 8 + 2));
    drop(test);
    let mut test = user(&[0xcd, 0x40]);
    test.set_gate(0x40, 0xee, 0);
    test.core().cpu.rflags |= rflags::IF;
    test.steps(1);
    assert_eq!(test.rip(), handler(0x40));
    assert_eq!(test.stack(0), place::CODE + 2, "a trap: the next instruction");
    assert_eq!(test.stack(2) & rflags::RF, 0);
    assert_eq!(test.core().cpu.rflags & rflags::IF, 0, "an interrupt gate");
    assert_eq!(test.core().cpu.gpr[gpr::RSP], place::KERNEL_STACK - 40);
    assert_eq!(test.core().cpu.seg[index::SS].selector, 0, "SS is null after a change of privilege");
    // INT3 with DPL 3; a trap gate leaves IF alone.
    let mut test = user(&[0xcc]);
    test.set_gate(3, 0xef, 0);
    test.core().cpu.rflags |= rflags::IF;
    test.steps(1);
    assert_eq!((test.rip(), test.stack(0)), (handler(3), place::CODE + 1));
    assert_ne!(test.core().cpu.rflags & rflags::IF, 0);
    // INT1 needs no DPL.
    let mut test = user(&[0xf1]);
    test.steps(1);
    assert_eq!((test.rip(), test.stack(0)), (handler(1), place::CODE + 1));
}

#[test]
fn an_absent_gate_is_np_and_a_short_idt_gp() {
    let mut test = user(&[0x0f, 0x0b]);
    test.set_gate(vector::UD, 0x0e, 0);
    let test = faults(test, vector::NP, Some(6 * 8 + 3));
    drop(test);
    let mut test = user(&[0xcd, 0x90]);
    test.core().cpu.idtr.limit = 0x8ff;
    faults(test, vector::GP, Some(0x90 * 8 + 2));
}

#[test]
fn interrupt_stack_table() {
    let mut test = kernel(&[0x0f, 0x0b]);
    test.set_gate(vector::UD, 0x8e, 1);
    test.core().cpu.gpr[gpr::RSP] = place::STACK - 4;
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::UD));
    assert_eq!(test.core().cpu.gpr[gpr::RSP], place::IST_STACK - 40);
    assert_eq!(test.stack(3), place::STACK - 4);
    // Without IST the same stack goes on, aligned to 16 bytes.
    let mut test = kernel(&[0x0f, 0x0b]);
    test.core().cpu.gpr[gpr::RSP] = place::STACK - 4;
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RSP], place::STACK - 16 - 40);
}

#[test]
fn double_and_triple_faults() {
    // A page fault while delivering a page fault: the kernel stack is absent.
    let mut test = user(LOAD);
    test.set_gate(vector::DF, 0x8e, 1);
    test.core().cpu.gpr[gpr::RDI] = place::DATA;
    test.map(place::DATA, 0);
    test.map(place::KERNEL_STACK - 8, 0);
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::DF));
    assert_eq!(test.stack(0), 0, "error code of #DF");
    assert_eq!(test.core().cpu.cr2, place::KERNEL_STACK - 8, "CR2 of the second page fault");
    // #GP, then #NP of its gate: contributory twice.
    let mut test = user(&[0xf4]);
    test.set_gate(vector::GP, 0x0e, 0);
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::DF));
    // #UD is benign: the second exception is simply delivered.
    let mut test = user(&[0x0f, 0x0b]);
    test.set_gate(vector::UD, 0x0e, 0);
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::NP));
    // No gate at all.
    let mut test = user(&[0x0f, 0x0b]);
    test.core().cpu.idtr.limit = 0;
    assert_eq!(test.step(), Step::Shutdown);
}

#[test]
fn single_step_and_debug_registers() {
    // nop with TF: #DB after it, RF clear in the frame, BS in DR6, TF off in the handler.
    let mut test = user(&[0x90, 0x90]);
    test.core().cpu.rflags |= rflags::TF;
    test.steps(1);
    assert_eq!((test.rip(), test.stack(0)), (handler(1), place::CODE + 1));
    assert_eq!(test.stack(2) & (rflags::RF | rflags::TF), rflags::TF);
    assert_eq!(test.core().cpu.dr[6], dr::DR6_FIXED | dr::DR6_BS);
    // GD: an access to a debug register is a fault, and GD is cleared.
    let mut test = kernel(&[0x0f, 0x21, 0xc0]);
    test.core().cpu.dr[7] |= dr::DR7_GD;
    test.steps(1);
    assert_eq!((test.rip(), test.stack(0)), (handler(1), place::CODE));
    assert_eq!(test.core().cpu.dr[6], dr::DR6_FIXED | dr::DR6_BD);
    assert_eq!(test.core().cpu.dr[7] & dr::DR7_GD, 0);
}

#[test]
fn a_failed_delivery_leaves_the_registers_alone() {
    let mut test = user(&[0x0f, 0x0b]);
    test.core().cpu.tr.limit = 3;
    test.core().cpu.gpr[gpr::RSP] = 0x1234;
    assert_eq!(test.step(), Step::Shutdown, "no stack for anything");
    assert_eq!(test.core().cpu.cpl, 3);
    assert_eq!((test.rip(), test.core().cpu.gpr[gpr::RSP]), (place::CODE, 0x1234));
    assert_eq!(test.core().cpu.seg[index::CS].selector, selector::USER_CODE64);
}

#[test]
fn protected_mode_frames() {
    // From CPL 3: SS, ESP, EFLAGS, CS, EIP and the error code, 32 bits each, on the TSS's stack.
    let mut test = TestVm::protected_mode(&[0xf4], 3);
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::GP));
    let esp = test.core().cpu.gpr[gpr::RSP];
    assert_eq!(esp, place::KERNEL_STACK - 24);
    let word = |n: u64| test.read_u64(esp + 4 * n) as u32;
    assert_eq!((word(0), word(1), word(2)), (0, place::CODE as u32, u32::from(selector::USER_CODE32)));
    assert_eq!((word(4), word(5)), (place::STACK as u32, u32::from(selector::USER_DATA)));
    assert_eq!(test.core().cpu.seg[index::SS].selector, selector::DATA);
    // At the same level: no stack switch.
    let mut test = TestVm::protected_mode(&[0x0f, 0x0b], 0);
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::UD));
    assert_eq!(test.core().cpu.gpr[gpr::RSP], place::STACK - 12);
}

#[test]
fn a_frame_over_translated_code_is_seen() {
    // mov edi, handler; call rdi; mov esp, handler + 48; mov eax, 0xf4e4; mov ds, eax
    let at = handler(vector::GP) as u32;
    let mut code = vec![0xbf];
    code.extend(at.to_le_bytes());
    code.extend([0xff, 0xd7, 0xbc]);
    code.extend((at + 48).to_le_bytes());
    code.extend([0xb8, 0xe4, 0xf4, 0, 0, 0x8e, 0xd8]);
    for method in [Method::Interpret, Method::Translate] {
        let mut test = TestVm::long_mode_by(&code, 0, method);
        test.load(at.into(), &[0xc3]);
        // The error code lands on the handler itself, and is `in al, 0xf4`.
        assert_eq!(test.run(), Exit::Kicked);
        assert_eq!(test.io.take_log(), [Access::PioRead { port: 0xf4, size: 1 }], "{method:?}");
    }
}
