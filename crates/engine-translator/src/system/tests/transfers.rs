//! SYSCALL and friends, IRET, far branches, segment loads.

use crate::testing::{Method, TestVm, descriptor, handler, place, selector};
use anyvisor_x86::bits::{cr4, efer, gpr, rflags};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::{attr, index};

fn kernel(code: &[u8]) -> TestVm {
    TestVm::long_mode(code, 0)
}

fn user(code: &[u8]) -> TestVm {
    TestVm::long_mode(code, 3)
}

/// Puts quadwords on the stack, the first on top.
fn push(test: &mut TestVm, values: &[u64]) {
    let rsp = test.core().cpu.gpr[gpr::RSP] - 8 * values.len() as u64;
    for (n, value) in values.iter().enumerate() {
        test.load(rsp + 8 * n as u64, &value.to_le_bytes());
    }
    test.core().cpu.gpr[gpr::RSP] = rsp;
}

fn assert_fault(test: &mut TestVm, vector: u8, error: u64) {
    test.steps(1);
    assert_eq!(test.rip(), handler(vector));
    assert_eq!(test.stack(0), error);
}

#[test]
fn syscall_and_sysret() {
    let mut test = user(&[0x0f, 0x05, 0x90]);
    test.load(place::DATA, &[0x48, 0x0f, 0x07]); // sysretq
    let cpu = &mut test.core().cpu;
    cpu.lstar = place::DATA;
    cpu.sfmask = rflags::IF | rflags::TF | rflags::DF;
    cpu.rflags |= rflags::IF | rflags::DF | rflags::CF;
    let flags = cpu.rflags;
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[gpr::RCX]), (place::DATA, 0, place::CODE + 2));
    assert_eq!((cpu.gpr[gpr::R11], cpu.rflags), (flags, flags & !(rflags::IF | rflags::DF)));
    assert_eq!((cpu.seg[index::CS].selector, cpu.seg[index::SS].selector), (selector::CODE64, selector::DATA));
    assert_eq!(cpu.gpr[gpr::RSP], place::STACK, "SYSCALL does not switch stacks");
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.cpl, cpu.rflags), (place::CODE + 2, 3, flags));
    let selectors = (cpu.seg[index::CS].selector, cpu.seg[index::SS].selector);
    assert_eq!(selectors, (selector::USER_CODE64, selector::USER_DATA));
    assert!(cpu.seg[index::CS].is_long() && cpu.seg[index::SS].dpl() == 3);
}

#[test]
fn sysret_to_compatibility_mode_and_its_faults() {
    let mut test = kernel(&[0x0f, 0x07]);
    test.core().cpu.gpr[gpr::RCX] = 0xffff_0000_0000 | place::DATA;
    test.core().cpu.gpr[gpr::R11] = rflags::FIXED | rflags::VM | rflags::RF;
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.rflags), (place::DATA, rflags::FIXED));
    assert!(!cpu.seg[index::CS].is_long() && cpu.seg[index::CS].is_default_32());
    // A non-canonical RCX faults at CPL 0, or on AMD's when it is there.
    let mut test = kernel(&[0x48, 0x0f, 0x07]);
    test.core().cpu.gpr[gpr::RCX] = 1 << 47;
    let there = test.core().is_amd();
    if there {
        test.steps(1);
        assert_eq!(test.rip(), 1 << 47);
    }
    assert_fault(&mut test, vector::GP, 0);
    assert_eq!(test.stack(2), u64::from(if there { selector::USER_CODE64 } else { selector::CODE64 }));
}

#[test]
fn sysenter_and_sysexit() {
    let mut test = user(&[0x0f, 0x34]);
    test.load(place::DATA, &[0x48, 0x0f, 0x35]); // sysexit, 64-bit
    assert_fault(&mut test, vector::GP, 0);
    let mut test = user(&[0x0f, 0x34]);
    test.load(place::DATA, &[0x48, 0x0f, 0x35]);
    let cpu = &mut test.core().cpu;
    cpu.sysenter_cs = u64::from(selector::CODE64);
    (cpu.sysenter_eip, cpu.sysenter_esp) = (place::DATA, place::KERNEL_STACK);
    cpu.rflags |= rflags::IF;
    test.steps(1);
    let cpu = &mut test.core().cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.cpl), (place::DATA, place::KERNEL_STACK, 0));
    assert_eq!(cpu.rflags & rflags::IF, 0);
    (cpu.gpr[gpr::RDX], cpu.gpr[gpr::RCX]) = (place::CODE, place::STACK);
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.cpl), (place::CODE, place::STACK, 3));
    assert_eq!(cpu.seg[index::CS].selector, (selector::CODE64 + 32) | 3);
}

#[test]
fn swapgs_and_bases() {
    let mut test = kernel(&[0x0f, 0x01, 0xf8, 0xf3, 0x48, 0x0f, 0xae, 0xd8]); // swapgs; wrgsbase rax
    let cpu = &mut test.core().cpu;
    cpu.seg[index::GS].base = 0x1111;
    cpu.kernel_gs_base = 0xffff_8000_0000_2222;
    cpu.gpr[gpr::RAX] = 0x8000_0000_0000;
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.seg[index::GS].base, cpu.kernel_gs_base), (0xffff_8000_0000_2222, 0x1111));
    assert_fault(&mut test, vector::GP, 0);
}

#[test]
fn iretq_to_user_and_within_the_kernel() {
    let mut test = kernel(&[0x48, 0xcf]);
    let frame = [
        place::DATA,
        selector::USER_CODE64.into(),
        rflags::FIXED | rflags::IF | rflags::ZF,
        place::STACK - 0x100,
        selector::USER_DATA.into(),
    ];
    push(&mut test, &frame);
    test.core().cpu.nmi_blocked = true;
    test.core().cpu.seg[index::FS].base = 0x7000_0000_1234;
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[gpr::RSP]), (place::DATA, 3, place::STACK - 0x100));
    assert_eq!(cpu.rflags, frame[2]);
    assert!(!cpu.nmi_blocked, "IRET ends the blocking of NMIs");
    // Data segments of CPL 0 are taken away; the base of FS is not a descriptor's.
    assert_eq!(cpu.seg[index::DS].selector, 0);
    assert_eq!(cpu.seg[index::FS].base, 0x7000_0000_1234);
    // At CPL 0 with a null SS.
    let mut test = kernel(&[0x48, 0xcf]);
    push(&mut test, &[place::DATA, selector::CODE64.into(), rflags::FIXED, place::STACK, 0]);
    test.steps(1);
    assert_eq!((test.rip(), test.core().cpu.seg[index::SS].selector), (place::DATA, 0));
}

#[test]
fn iretq_keeps_what_user_code_may_not_change() {
    // At CPL 3 IOPL and IF stay (IOPL 0).
    let mut test = user(&[0x48, 0xcf]);
    test.core().cpu.rflags |= rflags::IF;
    let flags = rflags::FIXED | rflags::IOPL | rflags::CF;
    push(&mut test, &[place::DATA, selector::USER_CODE64.into(), flags, place::STACK, selector::USER_DATA.into()]);
    test.steps(1);
    assert_eq!(test.core().cpu.rflags, rflags::FIXED | rflags::IF | rflags::CF);
}

#[test]
fn iretq_faults_before_it_commits() {
    let ok = [place::DATA, selector::USER_CODE64.into(), 2, place::STACK, selector::USER_DATA.into()];
    let bad = |n: usize, value: u64, vector: u8, error: u64| {
        let mut test = kernel(&[0x48, 0xcf]);
        let mut frame = ok;
        frame[n] = value;
        push(&mut test, &frame);
        assert_fault(&mut test, vector, error);
        assert_eq!(test.stack(1), place::CODE);
        assert_eq!(test.stack(2), u64::from(selector::CODE64));
    };
    bad(0, 1 << 47, vector::GP, 0);
    bad(1, 0, vector::GP, 0);
    bad(1, 0xff8, vector::GP, 0xff8);
    bad(1, selector::DATA.into(), vector::GP, selector::DATA.into());
    bad(1, u64::from(selector::CODE64) | 3, vector::GP, selector::CODE64.into());
    bad(4, 0, vector::GP, 0);
    bad(4, selector::DATA.into(), vector::GP, selector::DATA.into());
    bad(4, u64::from(selector::NOT_PRESENT) | 3, vector::GP, selector::NOT_PRESENT.into());
    // NT in long mode.
    let mut test = kernel(&[0x48, 0xcf]);
    push(&mut test, &ok);
    test.core().cpu.rflags |= rflags::NT;
    assert_fault(&mut test, vector::GP, 0);
    // To a less privileged level than now is fine, to a more privileged one not.
    let mut test = user(&[0x48, 0xcf]);
    push(&mut test, &[place::DATA, selector::CODE64.into(), 2, place::STACK, selector::DATA.into()]);
    assert_fault(&mut test, vector::GP, selector::CODE64.into());
}

#[test]
fn segment_loads() {
    let load = |code: &[u8], cpl: u8, selector: u16| {
        let mut test = TestVm::long_mode(code, cpl);
        test.core().cpu.gpr[gpr::RAX] = selector.into();
        test
    };
    const DS: &[u8] = &[0x8e, 0xd8];
    const SS: &[u8] = &[0x8e, 0xd0];
    let mut test = load(DS, 0, selector::DATA);
    test.steps(1);
    assert_ne!(test.read_u64(place::GDT + u64::from(selector::DATA)) >> 40 & 1, 0, "the accessed bit is set");
    let mut test = load(DS, 3, 3);
    test.steps(1);
    assert!(!test.core().cpu.seg[index::DS].is_usable());
    assert_fault(&mut load(DS, 3, selector::DATA), vector::GP, selector::DATA.into());
    assert_fault(&mut load(DS, 0, selector::NOT_PRESENT), vector::NP, selector::NOT_PRESENT.into());
    assert_fault(&mut load(DS, 0, selector::TSS), vector::GP, selector::TSS.into());
    assert_fault(&mut load(DS, 0, 0x1000), vector::GP, 0x1000);
    assert_fault(&mut load(DS, 0, 4 | 8), vector::GP, 4 | 8);
    assert_fault(&mut load(SS, 0, selector::READ_ONLY), vector::GP, selector::READ_ONLY.into());
    assert_fault(&mut load(SS, 0, selector::NOT_PRESENT), vector::SS, selector::NOT_PRESENT.into());
    assert_fault(&mut load(SS, 0, selector::USER_DATA), vector::GP, u64::from(selector::USER_DATA) & !3);
    assert_fault(&mut load(SS, 3, 0), vector::GP, 0);
    let mut test = load(SS, 0, 0);
    test.steps(1);
    assert_eq!(test.core().cpu.interrupt_shadow, 2, "MOV SS holds interrupts off");
    // Into CS: #UD.
    let mut test = load(&[0x8e, 0xc8], 0, selector::CODE64);
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::UD));
}

#[test]
fn pop_of_a_bad_selector_leaves_the_stack() {
    let mut test = kernel(&[0x0f, 0xa1]); // pop fs
    push(&mut test, &[0x2222]);
    let rsp = test.core().cpu.gpr[gpr::RSP];
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::GP));
    assert_eq!(test.stack(4), rsp);
    let mut test = kernel(&[0x0f, 0xa0, 0x0f, 0xa9]); // push fs; pop gs
    test.core().cpu.seg[index::GS].selector = 0;
    test.steps(2);
    assert_eq!(test.core().cpu.seg[index::GS].selector, selector::DATA);
    assert_eq!(test.core().cpu.gpr[gpr::RSP], place::STACK);
}

#[test]
fn lar_lsl_verr_verw() {
    let run = |code: &[u8], cpl: u8, selector: u16| {
        let mut test = TestVm::long_mode(code, cpl);
        test.core().cpu.gpr[gpr::RAX] = selector.into();
        test.core().cpu.gpr[gpr::RBX] = 0x1234_5678_9abc_def0;
        test.steps(1);
        (test.core().cpu.rflags & rflags::ZF != 0, test.core().cpu.gpr[gpr::RBX])
    };
    const LAR: &[u8] = &[0x0f, 0x02, 0xd8]; // lar ebx, eax
    const LSL: &[u8] = &[0x0f, 0x03, 0xd8];
    const VERR: &[u8] = &[0x0f, 0x00, 0xe0];
    const VERW: &[u8] = &[0x0f, 0x00, 0xe8];
    assert_eq!(run(LAR, 3, selector::USER_DATA), (true, 0xcf_f200));
    assert_eq!(run(LAR, 3, selector::DATA), (false, 0x1234_5678_9abc_def0));
    assert_eq!(run(LSL, 0, selector::CODE16), (true, 0xffff));
    assert_eq!(run(LSL, 0, selector::DATA), (true, 0xffff_ffff));
    assert!(!run(LSL, 0, 0).0);
    assert!(run(VERR, 3, selector::USER_CODE64).0 && !run(VERW, 3, selector::USER_CODE64).0);
    assert!(run(VERR, 0, selector::READ_ONLY).0 && !run(VERW, 0, selector::READ_ONLY).0);
    assert!(run(VERR, 3, selector::CONFORMING64).0, "conforming code is readable from everywhere");
}

#[test]
fn ltr_and_lldt() {
    let set = |test: &mut TestVm, kind: u32, upper: u64| {
        let raw = descriptor(0x1_2000, 0x67, attr::P | kind);
        let at = place::GDT + u64::from(selector::FREE);
        test.load(at, &raw.to_le_bytes());
        test.load(at + 8, &upper.to_le_bytes());
        test.core().cpu.gpr[gpr::RAX] = selector::FREE.into();
    };
    let mut test = kernel(&[0x0f, 0x00, 0xd8]);
    set(&mut test, 9, 0xffff_8000);
    test.steps(1);
    let tr = test.core().cpu.tr;
    assert_eq!((tr.base, tr.attributes & 0xf), (0xffff_8000_0001_2000, 0xb));
    assert_eq!(test.read_u64(place::GDT + u64::from(selector::FREE)) >> 40 & 0xf, 0xb, "busy in memory too");
    let mut test = kernel(&[0x0f, 0x00, 0xd8]);
    set(&mut test, 0xb, 0);
    assert_fault(&mut test, vector::GP, selector::FREE.into());
    let mut test = kernel(&[0x0f, 0x00, 0xd0]);
    set(&mut test, 2, 0);
    test.steps(1);
    assert_eq!(test.core().cpu.ldtr.base, 0x1_2000);
    let mut test = kernel(&[0x0f, 0x00, 0xd0]);
    set(&mut test, 9, 0);
    assert_fault(&mut test, vector::GP, selector::FREE.into());
}

#[test]
fn far_return_and_call_between_modes() {
    // From 64-bit code to compatibility mode by RETFQ, and back by a far JMP in 32-bit code.
    let mut test = kernel(&[0x48, 0xcb]);
    push(&mut test, &[place::DATA, selector::CODE32.into()]);
    let mut jump = vec![0xea];
    jump.extend((place::CODE as u32).to_le_bytes());
    jump.extend(selector::CODE64.to_le_bytes());
    test.load(place::DATA, &jump);
    test.steps(1);
    assert_eq!(test.rip(), place::DATA);
    assert!(!test.core().cpu.seg[index::CS].is_long());
    test.steps(1);
    assert_eq!(test.rip(), place::CODE);
    assert!(test.core().cpu.seg[index::CS].is_long());
    // To a data segment it is #GP.
    let mut test = kernel(&[0x48, 0xcb]);
    push(&mut test, &[place::DATA, selector::DATA.into()]);
    assert_fault(&mut test, vector::GP, selector::DATA.into());
}

#[test]
fn call_gate_to_the_kernel_and_back() {
    // call far [rdi] through a 64-bit call gate of DPL 3; retfq returns.
    let mut test = user(&[0xff, 0x1f]);
    let gate = place::DATA & 0xffff | u64::from(selector::CODE64) << 16 | 0xec << 40 | (place::DATA >> 16) << 48;
    test.load(place::GDT + u64::from(selector::FREE), &gate.to_le_bytes());
    test.load(place::GDT + u64::from(selector::FREE) + 8, &0u64.to_le_bytes());
    test.load(place::DATA, &[0x48, 0xcb]);
    test.load(place::DATA + 0x100 + 4, &(u64::from(selector::FREE) | 3).to_le_bytes());
    test.core().cpu.gpr[gpr::RDI] = place::DATA + 0x100;
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[gpr::RSP]), (place::DATA, 0, place::KERNEL_STACK - 32));
    assert_eq!(test.stack(0), place::CODE + 2);
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[gpr::RSP]), (place::CODE + 2, 3, place::STACK));
}

#[test]
fn virtual_8086_mode() {
    // IRETD with VM set enters it; INT through the IDT leaves it with nine words on the stack.
    let mut test = TestVm::protected_mode(&[0xcf], 0);
    let frame: [u32; 9] =
        [0x10, 0x2000, (rflags::FIXED | rflags::VM | rflags::IOPL) as u32, 0x8000, 0x3000, 0x11, 0x22, 0x33, 0x44];
    let esp = place::STACK - 36;
    for (n, value) in frame.into_iter().enumerate() {
        test.load(esp + 4 * n as u64, &value.to_le_bytes());
    }
    test.core().cpu.gpr[gpr::RSP] = esp;
    test.load(0x2_0010, &[0xcd, 0x40]);
    test.load(place::IDT + 8 * 0x40 + 5, &[0xee]);
    test.steps(1);
    let cpu = &test.core().cpu;
    assert!(cpu.is_vm86() && cpu.cpl == 3 && cpu.rip == 0x10);
    assert_eq!((cpu.seg[index::CS].base, cpu.seg[index::GS].base), (0x2_0000, 0x440));
    test.steps(1);
    assert_eq!(test.rip(), handler(0x40));
    let esp = test.core().cpu.gpr[gpr::RSP];
    assert_eq!(esp, place::KERNEL_STACK - 36);
    let word = |n: u64| test.read_u64(esp + 4 * n) as u32;
    let pushed: Vec<u32> = (0..9).map(word).collect();
    assert_eq!(pushed[..2], [0x12, 0x2000]);
    assert_eq!(pushed[3..], [0x8000, 0x3000, 0x11, 0x22, 0x33, 0x44]);
    assert!(!test.core().cpu.is_vm86() && !test.core().cpu.seg[index::DS].is_usable());
    test.steps(0);
}

#[test]
fn vm86_below_iopl3_traps_sensitive_instructions() {
    for code in [&[0xcd, 0x40][..], &[0xfa], &[0xfb], &[0x9c], &[0x9d], &[0xcf]] {
        let mut test = TestVm::protected_mode(&[0x90], 3);
        for number in 0..6 {
            let selector = if number == index::CS { (place::CODE >> 4) as u16 } else { 0 };
            test.core().cpu.seg[number] = crate::system::descriptor::vm86_segment(selector);
        }
        test.load(place::CODE, code);
        test.core().cpu.rflags |= rflags::VM;
        test.core().cpu.rip = 0;
        test.steps(1);
        assert_eq!(test.rip(), handler(vector::GP), "{code:x?}");
    }
}

#[test]
fn task_switch_by_jump_and_back_by_iret() {
    // JMP to a second TSS, whose code is a CALL back to the first, whose IRET comes back.
    let mut test = TestVm::protected_mode(&[], 0);
    let second = place::DATA;
    let far = |selector: u16| {
        let mut code = vec![0x9a, 0, 0, 0, 0];
        code.extend(selector.to_le_bytes());
        code
    };
    test.load(place::CODE, &far(selector::FREE));
    test.load(second, &[0; 0x68]);
    let put = |at: u64, value: u32| test.load(second + at, &value.to_le_bytes());
    put(0x20, 0x3_0000);
    put(0x24, rflags::FIXED as u32);
    put(0x28, 0x1234); // EAX
    put(0x38, place::STACK as u32 - 0x100);
    for (n, selector) in
        [selector::DATA, selector::CODE32, selector::DATA, selector::DATA, 0, 0].into_iter().enumerate()
    {
        put(0x48 + 4 * n as u64, selector.into());
    }
    test.load(0x3_0000, &[0xcf]); // iret: NT is set by the CALL
    test.load(place::GDT + u64::from(selector::FREE), &descriptor(second as u32, 0x67, attr::P | 9).to_le_bytes());
    test.core().cpu.gpr[gpr::RAX] = 0x5678;
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RAX], cpu.tr.base), (0x3_0000, 0x1234, second));
    assert_ne!(cpu.rflags & rflags::NT, 0);
    assert_eq!(test.read_u64(second) & 0xffff, u64::from(selector::TSS), "the link");
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RAX], cpu.tr.base), (place::CODE + 7, 0x5678, place::TSS));
    assert_eq!(cpu.rflags & rflags::NT, 0);
    assert_eq!(test.read_u64(place::GDT + u64::from(selector::FREE)) >> 40 & 0xf, 9, "not busy any more");
}

#[test]
fn a_16_bit_tss_fills_the_upper_halves_of_registers_with_ones() {
    let mut test = TestVm::protected_mode(&[], 0);
    let second = place::DATA;
    // JMP to the TSS; its fields are words: IP at 0Eh, FLAGS, AX to DI, then ES, CS, SS and DS.
    let [low, high] = selector::FREE.to_le_bytes();
    test.load(place::CODE, &[0xea, 0, 0, 0, 0, low, high]);
    test.load(second, &[0; 0x2c]);
    let fields = [0x100, rflags::FIXED as u16, 0x1234, 2, 3, 4, 5, 6, 7, 8];
    let selectors = [selector::DATA, selector::CODE32, selector::DATA, selector::DATA];
    for (n, value) in (0..).zip(fields.into_iter().chain(selectors)) {
        test.load(second + 0x0e + 2 * n, &value.to_le_bytes());
    }
    test.load(place::GDT + u64::from(selector::FREE), &descriptor(second as u32, 0x2b, attr::P | 1).to_le_bytes());
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!((cpu.rip, cpu.tr.base), (0x100, second));
    assert_eq!((cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDI]), (0xffff_1234, 0xffff_0008));
}

#[test]
fn popf_by_privilege() {
    let everything = rflags::WRITABLE;
    let run = |cpl: u8, iopl: u64, code: u8| {
        let mut test = TestVm::long_mode(&[code], cpl);
        test.core().cpu.rflags |= iopl << rflags::IOPL_SHIFT;
        push(&mut test, &[everything & !rflags::TF]);
        test.steps(1);
        test.core().cpu.rflags
    };
    assert_eq!(run(0, 0, 0x9d), everything & !(rflags::TF | rflags::RF) | rflags::FIXED);
    let user = run(3, 0, 0x9d);
    assert_eq!(user & (rflags::IF | rflags::IOPL), 0);
    assert_ne!(user & rflags::AC, 0);
    assert_eq!(run(3, 3, 0x9d) & (rflags::IF | rflags::IOPL), rflags::IF | rflags::IOPL);
}

#[test]
fn stac_and_clac() {
    let mut test = kernel(&[0x0f, 0x01, 0xcb, 0x0f, 0x01, 0xca]);
    test.core().cpu.cr4 |= cr4::SMAP;
    test.map(place::CODE, place::CODE | 3);
    test.steps(1);
    assert_ne!(test.core().cpu.rflags & rflags::AC, 0);
    test.steps(1);
    assert_eq!(test.core().cpu.rflags & rflags::AC, 0);
}

#[test]
fn lss_loads_both_or_neither() {
    let mut test = kernel(&[0x0f, 0xb2, 0x27]); // lss esp, [rdi]
    test.core().cpu.gpr[gpr::RDI] = place::DATA;
    test.load(place::DATA, &0x1_2345u64.to_le_bytes());
    test.load(place::DATA + 4, &selector::DATA.to_le_bytes());
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RSP], 0x1_2345);
    assert!(test.core().cpu.efer & efer::LMA != 0);
    let mut test = kernel(&[0x0f, 0xb2, 0x27]);
    test.core().cpu.gpr[gpr::RDI] = place::DATA;
    test.load(place::DATA + 4, &selector::READ_ONLY.to_le_bytes());
    assert_fault(&mut test, vector::GP, selector::READ_ONLY.into());
    assert_eq!(test.stack(4), place::STACK);
}

#[test]
fn selectors_are_read_in_every_width() {
    for number in 0..16u8 {
        if number == gpr::RSP as u8 {
            continue;
        }
        for (prefix, keeps) in [(0x66, !0xffff), (0x2e, 0), (0x48, 0)] {
            // mov r, ds; out 0xf4, al. The prefixes: 16 bits, 32 bits (CS has no effect), 64 bits.
            let rex = (number >> 3) | if prefix == 0x48 { 8 } else { 0 } | 0x40;
            let code = [if prefix == 0x48 { 0x2e } else { prefix }, rex, 0x8c, 0xd8 | number & 7, 0xe6, 0xf4];
            for method in [Method::Interpret, Method::Translate] {
                let mut test = TestVm::long_mode_by(&code, 0, method);
                test.core().cpu.gpr = [0x1122_3344_5566_7788; 16];
                assert_eq!(test.run(), anyvisor_engine::Exit::Kicked);
                let expected = 0x1122_3344_5566_7788 & keeps | u64::from(selector::DATA);
                assert_eq!(test.core().cpu.gpr[usize::from(number)], expected, "{code:x?} {method:?}");
            }
        }
    }
}
