//! User code whose memory is in windows: what it sees is what the guest's page tables say.

use crate::testing::{Access, Method, TestVm, handler, place, selector};
use anyvisor_engine::Exit;
use anyvisor_x86::bits::{cr4, gpr, rflags};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::index;

/// mov rax, [rdi] / mov [rsi], rax / out 0xf4, al
const COPY: &[u8] = &[0x48, 0x8b, 0x07, 0x48, 0x89, 0x06, 0xe6, 0xf4];
/// What a handler writes.
const FAULTED: u8 = 0xee;

/// A machine that runs `code` as user code which may use ports.
fn user(code: &[u8]) -> TestVm {
    let mut test = TestVm::long_mode_by(code, 3, Method::Translate);
    test.core().cpu.rflags |= rflags::IOPL;
    for vector in [vector::SS, vector::GP, vector::PF] {
        test.load(handler(vector), &[0xb0, FAULTED, 0xe6, 0xf4]); // mov al, FAULTED / out 0xf4, al
    }
    test
}

/// Runs the program once with these pointers, to its OUT or a handler's.
fn run(test: &mut TestVm, from: u64, to: u64) -> Vec<Access> {
    let cpu = &mut test.core().cpu;
    (cpu.rip, cpu.gpr[gpr::RDI], cpu.gpr[gpr::RSI], cpu.gpr[gpr::RSP]) = (place::CODE, from, to, place::STACK);
    assert_eq!(test.run(), Exit::Kicked);
    test.io.take_log()
}

fn wrote(value: u8) -> Vec<Access> {
    vec![Access::PioWrite { port: 0xf4, data: vec![value] }]
}

const FROM: u64 = place::DATA;
const TO: u64 = place::DATA + 0x8000;

#[test]
fn what_invlpg_drops_is_mapped_anew() {
    let mut test = user(COPY);
    for n in 0..4u64 {
        test.load(FROM + 0x1000 * n, &(0x11 * n).to_le_bytes());
    }
    for n in (0..4).chain(0..4) {
        test.load(place::PT + 8 * (FROM >> 12), &((FROM + 0x1000 * n) | 7).to_le_bytes());
        test.core().invalidate_page(FROM);
        assert_eq!(run(&mut test, FROM, TO), wrote(0x11 * n as u8));
        assert_eq!(test.read_u64(TO), 0x11 * n);
        assert!(test.core().windows.mapped() > 0, "nothing goes through a window");
    }
}

/// What a kernel does that moves a page: it changes the entry, and goes back to the program by code that was translated
/// with it.
#[test]
fn what_a_system_call_drops_is_gone_when_it_returns() {
    const KERNEL: u64 = place::CODE + 0x1000;
    // mov rax, [rdi] / mov rbx, rax / syscall / mov rax, [rdi] / mov [rsi], rax / hlt, which faults
    let mut test = user(&[0x48, 0x8b, 0x07, 0x48, 0x89, 0xc3, 0x0f, 0x05, 0x48, 0x8b, 0x07, 0x48, 0x89, 0x06, 0xf4]);
    // mov [r8], r9 / invlpg [rdi] / sysretq
    test.load(KERNEL, &[0x4d, 0x89, 0x08, 0x0f, 0x01, 0x3f, 0x48, 0x0f, 0x07]);
    for n in 0..2u64 {
        test.load(FROM + 0x1000 * n, &(0x11 * (n + 1)).to_le_bytes());
    }
    let cpu = &mut test.core().cpu;
    (cpu.lstar, cpu.sfmask) = (KERNEL, rflags::AC | rflags::TF | rflags::DF | rflags::NT | rflags::STATUS);
    let (entry, pages) = (place::PT + 8 * (FROM >> 12), [FROM | 7, (FROM + 0x1000) | 7]);
    for n in 0..8 {
        test.load(entry, &pages[n & 1].to_le_bytes());
        test.core().invalidate_page(FROM);
        user_again(&mut test);
        let cpu = &mut test.core().cpu;
        // The return is in line if it changes no more than a program may.
        cpu.rflags &= !rflags::IOPL;
        (cpu.gpr[gpr::R8], cpu.gpr[gpr::R9]) = (entry, pages[!n & 1]);
        assert_eq!(run(&mut test, FROM, TO), wrote(FAULTED));
        let found = [0x11, 0x22];
        assert_eq!(test.core().cpu.gpr[gpr::RBX], found[n & 1], "round {n}");
        assert_eq!(test.read_u64(TO), found[!n & 1], "round {n}");
        assert!(test.core().windows.mapped() > 0, "nothing goes through a window");
    }
}

#[test]
fn neighbours_come_along_only_where_they_belong() {
    let mut test = user(COPY);
    // Every other page is elsewhere.
    for n in 0..16u64 {
        test.load(FROM + 0x1000 * n, &(0x10 + n).to_le_bytes());
        let at = FROM + 0x1000 * (n ^ (n & 1) << 1);
        test.load(place::PT + 8 * ((FROM >> 12) + n), &(at | 7).to_le_bytes());
    }
    test.core().flush_all();
    for n in 0..16u64 {
        assert_eq!(run(&mut test, FROM + 0x1000 * n, place::STACK - 8), wrote(0x10 + (n ^ (n & 1) << 1) as u8));
    }
}

#[test]
fn rights_are_the_page_tables_own() {
    let mut test = user(COPY);
    test.load(FROM, &0x55u64.to_le_bytes());
    let pte = |test: &TestVm, gva: u64, value: u64| test.load(place::PT + 8 * (gva >> 12), &value.to_le_bytes());
    for (entry, error) in [(TO | 5, 7), (TO | 6, 6), (TO | 3, 7)] {
        pte(&test, TO, entry);
        test.core().flush_all();
        assert_eq!(run(&mut test, FROM, TO), wrote(FAULTED), "{entry:#x}");
        assert_eq!(test.core().cpu.cr2, TO);
        let rsp = test.core().cpu.gpr[gpr::RSP];
        assert_eq!(test.read_u64(rsp), error, "{entry:#x}");
        // More rights take no INVLPG.
        pte(&test, TO, TO | 7);
        user_again(&mut test);
        assert_eq!(run(&mut test, FROM, TO), wrote(0x55), "{entry:#x}");
        user_again(&mut test);
    }
    // An operand of two pages, of which one is not there.
    pte(&test, TO + 0x1000, 0);
    test.core().flush_all();
    assert_eq!(run(&mut test, FROM, TO + 0xffc), wrote(FAULTED));
    assert_eq!(test.core().cpu.cr2, TO + 0x1000);
}

/// Back to CPL 3 from the handler.
fn user_again(test: &mut TestVm) {
    test.set_segment(index::CS, selector::USER_CODE64);
    test.set_segment(index::SS, selector::USER_DATA);
    let cpu = &mut test.core().cpu;
    cpu.cpl = 3;
    cpu.rflags |= rflags::IOPL;
}

#[test]
fn accessed_and_dirty_flags_are_set() {
    const FLAGS: u64 = 0x60;
    let mut test = user(COPY);
    run(&mut test, FROM, FROM);
    assert_eq!(test.read_u64(place::PT + 8 * (FROM >> 12)) & FLAGS, 0x60);
    // Read first, so that it is mapped; then written.
    run(&mut test, TO, FROM);
    assert_eq!(test.read_u64(place::PT + 8 * (TO >> 12)) & FLAGS, 0x20);
    run(&mut test, FROM, TO);
    assert_eq!(test.read_u64(place::PT + 8 * (TO >> 12)) & FLAGS, 0x60);
}

#[test]
fn address_spaces_keep_their_own() {
    let mut test = user(COPY);
    test.core().cpu.cr4 |= cr4::PCIDE;
    // More than there are windows. Each has a page table of its own, with another page at FROM.
    let spaces = 60u64;
    let tables = |n: u64| 0x10_0000 + 0x4000 * n;
    for n in 0..spaces {
        for (level, from) in [place::PML4, 0x2000, 0x3000, place::PT].into_iter().enumerate() {
            let mut page = [0; 4096];
            assert!(test.vm.ram.read(from, &mut page));
            let next = tables(n) + 0x1000 * (level as u64 + 1);
            if level < 3 {
                page[..8].copy_from_slice(&(next | 7).to_le_bytes());
            } else {
                let at = 8 * (FROM >> 12) as usize;
                page[at..at + 8].copy_from_slice(&((0x40_0000 + 0x1000 * n) | 7).to_le_bytes());
            }
            test.load(next - 0x1000, &page);
        }
        test.load(0x40_0000 + 0x1000 * n, &(0x80 + n).to_le_bytes());
    }
    let mut pcid = 0;
    for n in (0..spaces).chain((0..spaces).rev()).chain([3, 5, 3, 5]) {
        let to = n as u16 + 1;
        test.core().cpu.cr3 = tables(n) | u64::from(to);
        if to != pcid {
            test.core().switch_address_space(pcid, to, true);
        }
        pcid = to;
        assert_eq!(run(&mut test, FROM, TO), wrote(0x80 + n as u8));
    }
    // What PCID 4 had is kept; it is dropped without bit 63.
    let before = test.core().windows.mapped();
    test.core().cpu.cr3 = tables(3) | 4;
    test.core().switch_address_space(pcid, 4, true);
    assert_eq!(run(&mut test, FROM, TO), wrote(0x83));
    assert_eq!(test.core().windows.mapped(), before);
    test.core().switch_address_space(4, 5, false);
    assert!(test.core().windows.mapped() < before);
}

#[test]
fn writes_to_code_are_seen() {
    // mov [rsi], rax's code ends with a call of it: mov rax, [rdi] / mov [rsi], rax / call rsi / out 0xf4, al
    let mut test = user(&[0x48, 0x8b, 0x07, 0x48, 0x89, 0x06, 0xff, 0xd6, 0xe6, 0xf4]);
    for n in (0..8u8).chain(0..8) {
        test.load(FROM, &[0xb0, n, 0xc3, 0, 0, 0, 0, 0]); // mov al, n / ret
        assert_eq!(run(&mut test, FROM, TO), wrote(n));
        // The next page of the same mapping is still written through a window.
        assert_eq!(run(&mut test, FROM, TO + 0x1000), wrote(n));
    }
}

#[test]
fn pages_written_through_windows_are_logged() {
    let mut test = user(COPY);
    let page = |test: &TestVm| {
        let dirty = test.vm.ram.take_dirty().expect("it is logged");
        dirty.regions[0].bitmap[(TO >> 18) as usize] >> (TO >> 12 & 63) & 1 != 0
    };
    run(&mut test, FROM, TO);
    test.vm.ram.log_dirty(true);
    for _ in 0..3 {
        test.core().flush_all();
        assert!(!page(&test), "nothing has written yet");
        run(&mut test, FROM, TO);
        assert!(page(&test));
    }
}

#[test]
fn addresses_beyond_the_user_half_fault() {
    for address in [0x8000_0000_0000, 0x7fff_ffff_fffc, u64::MAX - 8, 0xffff_8000_0002_0000, 1 << 62] {
        let mut test = user(COPY);
        run(&mut test, FROM, TO);
        assert_eq!(run(&mut test, address, TO), wrote(FAULTED), "{address:#x}");
    }
}

#[test]
fn a_program_that_takes_too_many_pages_is_probed() {
    let mut test = user(COPY);
    test.core().windows.room = 8;
    let pages = 32u64;
    for n in 0..pages {
        // Scattered, so that no neighbour comes along.
        let at = FROM + 0x1000 * (n * 7 % pages);
        test.load(at, &(0x80 + n).to_le_bytes());
        test.load(place::PT + 8 * ((FROM >> 12) + n), &(at | 7).to_le_bytes());
    }
    test.core().flush_all();
    for round in 0..3 {
        for n in 0..pages {
            assert_eq!(run(&mut test, FROM + 0x1000 * n, place::STACK - 8), wrote(0x80 + n as u8), "round {round}");
        }
    }
    assert!(!test.core().has_windows(), "windows were full again and again");
}

#[test]
fn what_is_writable_is_listed_once() {
    let mut test = user(COPY);
    run(&mut test, FROM, TO);
    run(&mut test, FROM, TO);
    test.core().windows.list_writers();
    let listed: Vec<_> = test.core().windows.writers.values().map(Vec::len).collect();
    assert!(!listed.is_empty() && listed.iter().all(|&n| n == 1), "{listed:?}");
    assert_eq!(test.core().windows.writer_count, listed.len());
    // And what code is made of is still taken out.
    test.core().protect_code_page(TO);
    assert!(!test.core().windows.writers.contains_key(&TO));
}

#[test]
fn code_that_maps_pages_all_the_time_is_probed() {
    let mut test = user(COPY);
    // A busy host may take its time in between; then they don't come too fast.
    for n in 0..200_000u64 {
        test.load(FROM, &(n & 0x7f).to_le_bytes());
        test.core().invalidate_page(FROM);
        let without = test.core().windows.mapped();
        assert_eq!(run(&mut test, FROM, TO), wrote(n as u8 & 0x7f));
        if n > 2 && test.core().windows.mapped() == without {
            assert!(test.core().has_windows(), "other code may have them");
            return;
        }
    }
    panic!("FROM is mapped again and again");
}

#[test]
fn mappings_are_counted_as_the_host_has_them() {
    let mut space = super::Space::default();
    for (page, gpa, pieces) in
        [(5, 0x5000, 1), (6, 0x6000, 1), (8, 0x8000, 2), (7, 0x7000, 1), (7, 0x9000, 3), (4, 0x4001, 4)]
    {
        space.insert(page, gpa);
        assert_eq!(space.pieces, pieces, "{page}");
    }
    for (page, pieces) in [(7, 3), (5, 3), (5, 3), (6, 2), (4, 1), (8, 0)] {
        space.remove(page);
        assert_eq!(space.pieces, pieces, "without {page}");
    }
}
