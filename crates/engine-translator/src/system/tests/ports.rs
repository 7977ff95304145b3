//! IN, OUT and their string forms; the I/O permission bitmap.

use crate::testing::{Access, TestVm, handler, place};
use anyvisor_x86::bits::{gpr, rflags};
use anyvisor_x86::exception::vector;

#[test]
fn widths_and_registers() {
    // in al, 0x60; in ax, dx; in eax, dx; out dx, ax
    let mut test = TestVm::long_mode(&[0xe4, 0x60, 0x66, 0xed, 0xed, 0x66, 0xef], 0);
    test.core().cpu.gpr[gpr::RDX] = 0x1f0;
    test.core().cpu.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
    for value in [0xaa, 0xbbcc, 0xdead_beef] {
        test.io.answer(value);
    }
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 0x1122_3344_5566_77aa);
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 0x1122_3344_5566_bbcc);
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 0xdead_beef, "32 bits clear the rest");
    test.steps(1);
    assert_eq!(
        test.io.take_log(),
        [
            Access::PioRead { port: 0x60, size: 1 },
            Access::PioRead { port: 0x1f0, size: 2 },
            Access::PioRead { port: 0x1f0, size: 4 },
            Access::PioWrite { port: 0x1f0, data: vec![0xef, 0xbe] },
        ]
    );
}

#[test]
fn the_bitmap_decides_above_iopl() {
    let run = |port: u64, code: &[u8]| {
        let mut test = TestVm::long_mode(code, 3);
        // A bitmap from 0x68 on: ports 0x80-0x87 allowed, the limit after port 0xff's byte and one more.
        test.load(place::TSS + 0x68, &[0xff; 0x24]);
        test.load(place::TSS + 0x68 + 0x10, &[0x00]);
        test.core().cpu.tr.limit = 0x68 + 0x20;
        test.core().cpu.gpr[gpr::RDX] = port;
        test.steps(1);
        test.rip() == place::CODE + code.len() as u64
    };
    assert!(run(0x80, &[0xec]));
    assert!(run(0x84, &[0xed]));
    assert!(!run(0x85, &[0xed]), "the fourth port is not allowed");
    assert!(!run(0x88, &[0xec]));
    assert!(!run(0x1000, &[0xec]), "beyond the TSS");
    // IOPL 3 needs no bitmap.
    let mut test = TestVm::long_mode(&[0xec], 3);
    test.core().cpu.rflags |= rflags::IOPL;
    test.steps(1);
    assert_eq!(test.rip(), place::CODE + 1);
}

#[test]
fn string_output_and_input() {
    let mut test = TestVm::long_mode(&[0xf3, 0x6e, 0xf3, 0x6d], 0); // rep outsb; rep insd
    test.load(place::DATA, b"hello");
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RSI], cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDX]) = (place::DATA, 5, 0x3f8);
    test.steps(1);
    let cpu = &mut test.core().cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSI], cpu.gpr[gpr::RCX]), (place::CODE + 2, place::DATA + 5, 0));
    let written: Vec<u8> = test
        .io
        .take_log()
        .into_iter()
        .flat_map(|access| if let Access::PioWrite { data, .. } = access { data } else { vec![] })
        .collect();
    assert_eq!(written, b"hello");
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RDI], cpu.gpr[gpr::RCX]) = (place::DATA + 4, 2);
    cpu.rflags |= rflags::DF;
    test.io.answer(0x1111_1111);
    test.io.answer(0x2222_2222);
    test.steps(1);
    assert_eq!(test.read_u64(place::DATA), 0x1111_1111_2222_2222);
    assert_eq!(test.core().cpu.gpr[gpr::RDI], place::DATA - 4);
}

#[test]
fn a_long_string_is_interruptible() {
    let mut test = TestVm::long_mode(&[0xf3, 0x6e], 0);
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RSI], cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDX]) = (place::DATA, 1000, 0x3f8);
    test.steps(1);
    let left = test.core().cpu.gpr[gpr::RCX];
    assert!(left > 0 && left < 1000);
    assert_eq!(test.rip(), place::CODE);
    assert_eq!(test.core().cpu.gpr[gpr::RSI], place::DATA + 1000 - left);
    while test.rip() == place::CODE {
        test.steps(1);
    }
    assert_eq!((test.rip(), test.core().cpu.gpr[gpr::RCX]), (place::CODE + 2, 0));
    assert_eq!(test.io.take_log().len(), 1000);
}

#[test]
fn a_fault_in_the_middle_keeps_what_is_done_and_loses_no_input() {
    let mut test = TestVm::long_mode(&[0xf3, 0x6c], 0); // rep insb
    let page = place::DATA + 0x1000;
    test.map(page, 0);
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RDI], cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDX]) = (page - 2, 5, 0x1f0);
    test.steps(1);
    assert_eq!(test.rip(), handler(vector::PF));
    let cpu = &test.core().cpu;
    assert_eq!((cpu.cr2, cpu.gpr[gpr::RDI], cpu.gpr[gpr::RCX]), (page, page, 3));
    assert_eq!(test.stack(1), place::CODE, "restarts at the instruction");
    assert_eq!(test.io.take_log().len(), 2, "no third read of the device");
}
