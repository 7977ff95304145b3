//! Small programs, translated and interpreted, with the same result; and loops that nothing but a kick ends.

use super::Translator;
use crate::testing::{Method, TestVm, place};
use anyvisor_engine::{Exit, Vcpu};
use anyvisor_x86::bits::{gpr, rflags};
use anyvisor_x86::segment::index;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Translates and interprets `code`, whose last two bytes are OUT 0xf4, AL; compares all of it.
fn check(code: &str) -> TestVm {
    check_prepared(code, |_| {})
}

fn check_prepared(code: &str, prepare: impl Fn(&mut Translator)) -> TestVm {
    let code: Vec<u8> = (0..code.len()).step_by(2).map(|i| u8::from_str_radix(&code[i..i + 2], 16).unwrap()).collect();
    let run = |method| {
        let mut test = TestVm::long_mode_by(&code, 0, method);
        test.vcpu.translator().into_iter().for_each(&prepare);
        assert_eq!(test.run(), Exit::Kicked);
        let mut bytes = vec![0; 16 << 20];
        assert!(test.vm.ram.read(0, &mut bytes));
        (test, bytes)
    };
    let (mut translated, translated_bytes) = run(Method::Translate);
    let (mut interpreted, interpreted_bytes) = run(Method::Interpret);
    let (left, right) = (&translated.core().cpu, &interpreted.core().cpu);
    assert_eq!((left.gpr, left.rip, left.rflags), (right.gpr, right.rip, right.rflags));
    assert!(translated_bytes == interpreted_bytes, "memory differs");
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
    let mut test = check(include_str!("../../tests/everything.hex").trim());
    let cpu = &test.core().cpu;
    assert_eq!(cpu.gpr[11], 21);
    assert_eq!(cpu.gpr[15], 55);
}

/// MOV RAX, imm64 over the end of a page, and OUT, at other addresses: the same code where the same page follows, no other.
#[test]
fn an_instruction_over_two_pages_is_moved_if_both_are_the_same() {
    const OTHER_PT: u64 = place::DATA + 0x10_000;
    const OTHER_PAGE: u64 = place::DATA + 0x11_000;
    let second = place::CODE + 0x1000;
    let mut test = TestVm::long_mode_by(&[0x90], 3, Method::Translate);
    test.core().cpu.rflags |= rflags::IOPL;
    test.load(second - 5, &[0x48, 0xb8, 1, 0, 0, 0, 0, 0, 0, 0, 0xe6, 0xf4]);
    test.load(OTHER_PAGE, &[2, 0, 0, 0, 0, 0xe6, 0xf4]);
    let tables = test.read_u64(place::PML4);
    test.load(place::PML4 + 8 * 0xff, &tables.to_le_bytes());
    // As the first 2 MiB, but for the second page.
    for page in 0..512 {
        let entry = test.read_u64(place::PT + 8 * page);
        test.load(OTHER_PT + 8 * page, &entry.to_le_bytes());
    }
    test.load(OTHER_PT + 8 * (second >> 12), &(OTHER_PAGE | 7).to_le_bytes());
    for (entry, table) in [(1, place::PT), (2, OTHER_PT), (3, place::PT)] {
        test.load(0x3000 + 8 * entry, &(table | 7).to_le_bytes());
    }
    test.core().flush_all();
    let at = |megabytes: u64| 0x7f80_0000_0000 + (megabytes << 20) + second - 5;
    let run = |test: &mut TestVm, rip: u64| {
        test.core().cpu.rip = rip;
        assert_eq!(test.run(), Exit::Kicked);
        (test.core().cpu.gpr[gpr::RAX] >> 24, test.vcpu.translator().unwrap().moved_blocks())
    };
    let first = run(&mut test, at(0));
    assert_eq!(first.0, 0);
    let moved = run(&mut test, at(2));
    assert!(moved.0 == 0 && moved.1 > first.1);
    assert_eq!(run(&mut test, at(2)), moved, "it is there");
    // Another page follows.
    assert_eq!(run(&mut test, at(4)).0, 2);
    // The second page changes: all of them do.
    test.load(second, &[3]);
    test.core().wrote(second, 1);
    assert_eq!(run(&mut test, at(2)).0, 3);
    assert_eq!(run(&mut test, at(6)).0, 3);
    // And where it is changes.
    test.load(0x3000 + 8, &(OTHER_PT | 7).to_le_bytes());
    test.core().flush_all();
    assert_eq!(run(&mut test, at(2)).0, 2);
}

/// Addresses that are not relative to RIP stay when code moves: those of FS (a stack's canary), of an index and of MOV's 64-bit
/// form, which alone keeps a block where it is.
#[test]
fn absolute_addresses_stay() {
    let base = 0x7f80_0000_0000u64;
    // mov rax, fs:[0x28] / mov ecx, 2 / mov rcx, [rcx*8+0x20100] / out 0xf4, al
    const RELATIVE: &[u8] =
        &[0x64, 0x48, 0x8b, 4, 0x25, 0x28, 0, 0, 0, 0xb9, 2, 0, 0, 0, 0x48, 0x8b, 0xc, 0xcd, 0, 1, 2, 0, 0xe6, 0xf4];
    // mov rax, [base + DATA] / out 0xf4, al; and mov rax, fs:[1 TiB]
    let absolute = [(&[0x48, 0xa1][..], base + place::DATA), (&[0x64, 0x48, 0xa1], 1 << 40)]
        .map(|(mov, address)| [mov, &address.to_le_bytes(), &[0xe6, 0xf4]].concat());
    for (code, moves) in [(RELATIVE, true), (&absolute[0], false), (&absolute[1], false)] {
        let mut test = TestVm::long_mode_by(code, 3, Method::Translate);
        test.core().cpu.rflags |= rflags::IOPL;
        let tables = test.read_u64(place::PML4);
        test.load(place::PML4 + 8 * 0xff, &tables.to_le_bytes());
        test.load(0x3008, &(place::PT | 7).to_le_bytes());
        test.core().flush_all();
        let fs = if code[..3] == [0x64, 0x48, 0xa1] { base - (1 << 40) } else { base };
        test.core().cpu.seg[index::FS].base = fs + place::DATA;
        test.load(place::DATA, &7u64.to_le_bytes());
        test.load(place::DATA + 0x28, &7u64.to_le_bytes());
        test.load(place::DATA + 0x110, &8u64.to_le_bytes());
        let mut moved = Vec::new();
        for rip in [base, base + (2 << 20)] {
            test.core().cpu.rip = rip + place::CODE;
            assert_eq!(test.run(), Exit::Kicked);
            assert_eq!(test.core().cpu.gpr[gpr::RAX], 7);
            assert!(!moves || test.core().cpu.gpr[gpr::RCX] == 8);
            moved.push(test.vcpu.translator().unwrap().moved_blocks());
        }
        assert_eq!(moved[1] > moved[0], moves);
    }
}

/// A block that is made, for a jump, a return or a shared probe that does not fit, drops those that lead to it.
#[test]
fn code_memory_may_be_full_at_any_time() {
    for bytes in (0..40).map(|n| 40 * n) {
        let little = |translator: &mut Translator| translator.leave_room(bytes);
        check_prepared(include_str!("../../tests/everything.hex").trim(), little);
        // mov ebx, 0x20ff8 / mov ecx, 50 / l: mov rax, [rbx] / mov rdx, [rbx + 8] / inc rbx / loop l / out 0xf4, al
        check_prepared("bbf80f0200b932000000488b03488b530848ffc3e2f4e6f4", little);
    }
}

/// REP MOVS between pages that take each other's place in the TLB, elements across pages on both sides, and REP STOS:
/// ```text
///  mov qword [0x3090], 0x6000e7 ; 36 MiB is at 6 MiB too
///  mov byte [0x600123], 0x5a / mov esi, 0x2400010 / mov edi, 0x400010 / mov ecx, 0x2000 / rep movsb
///  mov esi, 0x2400ffd / mov edi, 0x401ffa / mov ecx, 0x300 / rep movsq
///  mov edi, 0x403fff / mov ecx, 0x1000 / mov eax, 0x1234 / rep stosw / out 0xf4, al
/// ```
#[test]
fn repeated_strings_over_pages() {
    check(concat!(
        "48c7042590300000e7006000c6042523016000",
        "5abe10004002bf10004000b900200000f3a4",
        "befd0f4002bffa1f4000b900030000f348a5",
        "bfff3f4000b900100000b83412000066f3abe6f4"
    ));
}

const CROSSING: (&[u8], &[u8]) = {
    let mut first = [0x90; 4096];
    first[0] = 0xe9; // jmp +0xff9
    (first[1], first[2], first[3], first[4]) = (0xf9, 0x0f, 0, 0);
    (first[0xffe], first[0xfff]) = (0xf9, 0x72);
    (&{ first }, b"\x00\x72\xfb")
};

/// Loops that never end by themselves, in every way that translated code can close one, as code for two
/// adjacent pages.
const ENDLESS: &[(&str, &[u8], &[u8])] = &[
    ("a jump to itself", b"\xeb\xfe", b""),
    // l: xor eax, eax / jz l
    ("a conditional jump back", b"\x31\xc0\x74\xfc", b""),
    // stc / l: jc l
    ("a conditional jump back with flags alive", b"\xf9\x72\xfe", b""),
    // l: jmp m / nop / m: jmp l
    ("two blocks", b"\xeb\x01\x90\xeb\xfb", b""),
    // l: mov ecx, 2 / loop . / jmp l
    ("LOOP", b"\xb9\x02\x00\x00\x00\xe2\xfe\xeb\xf7", b""),
    // l: call f / jmp l / f: ret
    ("a call and its return", b"\xe8\x02\x00\x00\x00\xeb\xf9\xc3", b""),
    // jmp s / f: ret / s: call f / jmp s
    ("a call back", b"\xeb\x01\xc3\xe8\xfa\xff\xff\xff\xeb\xf9", b""),
    // lea rax, [rel l] / l: jmp rax
    ("an indirect jump", b"\x48\x8d\x05\x00\x00\x00\x00\xff\xe0", b""),
    // l: lea rax, [rel l] / push rax / ret
    ("returns that match no call", b"\x48\x8d\x05\xf9\xff\xff\xff\x50\xc3", b""),
    // l: jmp m / page / m: jmp l
    ("jumps between pages", b"\xe9\xfb\x0f\x00\x00", b"\xe9\xfb\xef\xff\xff"),
    // l: stc / jc m / page / m: jc l + 1
    ("conditional jumps between pages", b"\xf9\x0f\x82\xf9\x0f\x00\x00", b"\x0f\x82\xfb\xef\xff\xff"),
    // jmp s / s: stc / jc m, from a page to the next / m: jc s
    ("a jump across a page's end and one back", CROSSING.0, CROSSING.1),
    // l: call f / jmp l / page / f: ret
    ("calls to another page", b"\xe8\xfb\x0f\x00\x00\xeb\xf9", b"\xc3"),
    // l: add rbx, 0x1000 / and rbx, 0x7ff000 / mov rax, [rbx] / jmp l
    ("misses", b"\x48\x81\xc3\x00\x10\x00\x00\x48\x81\xe3\x00\xf0\x7f\x00\x48\x8b\x03\xeb\xed", b""),
    // l: mov edi, 0x400000 / mov ecx, 0x300000 / xor eax, eax / rep stosb / jmp l
    ("string stores", b"\xbf\x00\x00\x40\x00\xb9\x00\x00\x30\x00\x31\xc0\xf3\xaa\xeb\xf0", b""),
    // l: cpuid / jmp l
    ("an interpreted instruction", b"\x0f\xa2\xeb\xfc", b""),
];

#[test]
fn a_kick_ends_every_loop() {
    for &(name, first, second) in ENDLESS {
        let mut code = vec![0xcc; 8192];
        code[..first.len()].copy_from_slice(first);
        code[4096..4096 + second.len()].copy_from_slice(second);
        let mut test = TestVm::long_mode_by(&code, 0, Method::Translate);
        let kicker = test.vcpu.kicker();
        for _ in 0..20 {
            let kick = kicker.clone();
            let other = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(300));
                kick.kick();
            });
            let start = Instant::now();
            assert_eq!(test.run(), Exit::Kicked, "{name}");
            // Far beyond what a busy host can be late, far below what a guest's clock tick is worth waiting for.
            assert!(start.elapsed() < Duration::from_secs(5), "{name}: {:?}", start.elapsed());
            other.join().unwrap();
        }
    }
}

/// ```text
///  mov r8d, 20000
/// outer: mov esi, 0x20000 / mov ecx, 1024
/// inner: add rax, [rsi] / add rsi, 8 / dec ecx / jnz inner
///  dec r8d / jnz outer / out 0xf4, al
/// ```
const SUM: &[u8] = b"\x41\xb8\x20\x4e\x00\x00\xbe\x00\x00\x02\x00\xb9\x00\x04\x00\x00\x48\x03\x06\x48\x83\xc6\x08\xff\xc9\x75\xf5\x41\xff\xc8\x75\xe6\xe6\xf4";

#[test]
fn a_loop_that_samples_meet_is_hoisted_and_still_right() {
    let mut test = TestVm::long_mode_by(SUM, 0, Method::Translate);
    for i in 0..1024u64 {
        test.load(0x2_0000 + 8 * i, &(i * i).to_le_bytes());
    }
    let done = Arc::new(AtomicBool::new(false));
    let (kicker, ended) = (test.vcpu.kicker(), done.clone());
    let other = std::thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_micros(100));
            kicker.kick();
        }
    });
    let end = place::CODE + SUM.len() as u64;
    while test.rip() != end {
        assert_eq!(test.run(), Exit::Kicked);
    }
    done.store(true, Ordering::Relaxed);
    other.join().unwrap();
    let sum: u64 = (0..1024).map(|i| i * i).sum();
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 20_000 * sum);
    assert!(test.vcpu.translator().unwrap().hoisted() > 0);
}

/// ```text
///  lea rsi, [rel 0x20000] / call f / mov rdx, [rel 0x20008] / jnz next / ud2
/// next: (on the next page) out 0xf4, al
/// f: mov rax, [rel 0x20010] / mov [rsi], rax / test rsi, rsi / ret
/// ```
const PLACED: &[u8] =
    b"\x48\x8d\x35\xf9\xff\x00\x00\xe8\x14\x00\x00\x00\x48\x8b\x15\xf5\xff\x00\x00\x0f\x85\xe7\x0f\x00\x00\x0f\x0b\
\x90\x90\x90\x90\x90\x48\x8b\x05\xe9\xff\x00\x00\x48\x89\x06\x48\x85\xf6\xc3";

#[test]
fn code_at_another_address_is_moved_and_right() {
    let mut test = TestVm::long_mode_by(PLACED, 3, Method::Translate);
    test.core().cpu.rflags |= rflags::IOPL;
    test.load(place::CODE + 0x1000, &[0xe6, 0xf4]);
    let tables = test.read_u64(place::PML4);
    for region in [0xab, 0xfe, 0xff] {
        test.load(place::PML4 + 8 * region, &tables.to_le_bytes());
    }
    let mut moved = 0;
    for (n, base) in
        [0x7f80_0000_0000u64, 0x7f00_0020_0000, 0x5580_3fe0_0000, 0x5580_0000_0000, 0].into_iter().enumerate()
    {
        // The same pages from 2 MiB on, so that a region can have them at other places.
        test.load(0x3008, &(place::PT | 7).to_le_bytes());
        test.load(0x3ff8, &(place::PT | 7).to_le_bytes());
        test.core().flush_all();
        for round in 0..3u64 {
            let value = round << 8 | n as u64;
            test.load(place::DATA + 0x10, &value.to_le_bytes());
            test.load(place::DATA + 8, &(!value).to_le_bytes());
            let cpu = &mut test.core().cpu;
            (cpu.rip, cpu.gpr[gpr::RSP]) = (base + place::CODE, base + place::STACK);
            assert_eq!(test.run(), Exit::Kicked);
            let cpu = &test.core().cpu;
            assert_eq!((cpu.rip, cpu.gpr[gpr::RSI]), (base + place::CODE + 0x1002, base + place::DATA), "{base:#x}");
            assert_eq!((cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDX]), (value, !value), "{base:#x}");
            assert_eq!(test.read_u64(place::DATA), value);
            assert_eq!(test.read_u64(place::STACK - 8), base + place::CODE + 12, "the return address");
        }
        let now = test.vcpu.translator().unwrap().moved_blocks();
        // Not the first, and none to a low address, where constants are shorter.
        assert_eq!(now > moved, n != 0 && base != 0, "{base:#x}");
        moved = now;
    }
}
