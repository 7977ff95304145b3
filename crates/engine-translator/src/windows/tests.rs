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

/// Loads CR3, with bit 63 or without, as MOV does.
fn load_cr3(test: &mut TestVm, value: u64, keep: bool) {
    let core = test.core();
    let old = std::mem::replace(&mut core.cpu.cr3, value);
    if (old ^ value) & 0xfff != 0 {
        core.switch_address_space(old, keep);
    } else if !keep || old != value {
        core.flush_current();
    }
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
    for n in (0..spaces).chain((0..spaces).rev()).chain([3, 5, 3, 5]) {
        let to = n as u16 + 1;
        load_cr3(&mut test, tables(n) | u64::from(to), true);
        assert_eq!(run(&mut test, FROM, TO), wrote(0x80 + n as u8));
    }
    // What PCID 4 had is kept. Without bit 63, and by any PCID, it is looked up again.
    let before = test.core().windows.mapped();
    load_cr3(&mut test, tables(3) | 4, true);
    assert_eq!(run(&mut test, FROM, TO), wrote(0x83));
    assert_eq!(test.core().windows.mapped(), before);
    for (n, to) in [(6, 8), (5, 4), (3, 9), (6, 8), (5, 9), (3, 4), (5, 4), (3, 4)] {
        let entry = tables(3) + 0x3000 + 8 * (FROM >> 12);
        let page = test.read_u64(entry) ^ if n == 3 { 0x1000 } else { 0 };
        test.load(entry, &page.to_le_bytes());
        load_cr3(&mut test, tables(n) | to, false);
        let found = 0x80 + if n == 3 { page >> 12 & 0xff } else { n };
        assert_eq!(run(&mut test, FROM, TO), wrote(found as u8), "PCID {to}, space {n}");
    }
    for (n, to) in [(6, 8), (5, 4), (3, 9)] {
        load_cr3(&mut test, tables(n) | to, false);
        run(&mut test, FROM, TO);
    }
    let left = test.core().windows.kept.iter().filter(|space| space.root == tables(3)).count();
    assert_eq!(left, 0, "what there was of the current one is used");
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
    for n in 0..200_000u64 {
        // A busy host takes its time, and they would not come too fast.
        test.core().windows.looked = test.core().tsc();
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

/// What a kernel does that changes many pages at once: it loads CR3.
#[test]
fn what_a_flush_may_have_changed_is_looked_up_again() {
    const A: u64 = 0x20;
    const D: u64 = 0x40;
    let mut test = user(COPY);
    let pages = 8u64;
    let entry = |page: u64| place::PT + 8 * (page >> 12);
    for n in 0..2 * pages {
        test.load(FROM + 0x1000 * n, &(0x10 + n).to_le_bytes());
    }
    for at_once in [false, true] {
        for n in 0..pages {
            run(&mut test, FROM + 0x1000 * n, TO);
        }
        let before = test.core().windows.mapped();
        let flush = |test: &mut TestVm| {
            test.core().windows.review_ticks = if at_once { u64::MAX / 8 } else { 0 };
            test.core().flush_current();
        };
        // Another page, for one of them.
        let other = FROM + 0x1000 * (pages + 3);
        test.load(entry(FROM + 0x3000), &(other | 7).to_le_bytes());
        flush(&mut test);
        assert_eq!(run(&mut test, FROM + 0x3000, TO), wrote(0x10 + pages as u8 + 3));
        let kept = test.core().windows.mapped();
        assert!(if at_once { kept < before / 2 } else { kept >= before - 1 }, "{kept} of {before} are mapped");
        for n in (0..pages).filter(|&n| n != 3) {
            assert_eq!(run(&mut test, FROM + 0x1000 * n, TO), wrote(0x10 + n as u8));
        }
        // The kernel wants to know of the next access, and of the next write.
        test.load(entry(FROM), &(FROM | 7).to_le_bytes());
        test.load(entry(TO), &(TO | 7 | A).to_le_bytes());
        flush(&mut test);
        run(&mut test, FROM, TO);
        assert_eq!(test.read_u64(entry(FROM)) & (A | D), A);
        assert_eq!(test.read_u64(entry(TO)) & (A | D), A | D);
        // Fewer rights, and none.
        for (value, error) in [(TO | 5 | A | D, 7), (TO | 6, 6)] {
            test.load(entry(TO), &value.to_le_bytes());
            flush(&mut test);
            assert_eq!(run(&mut test, FROM, TO), wrote(FAULTED), "{value:#x}");
            let rsp = test.core().cpu.gpr[gpr::RSP];
            assert_eq!(test.read_u64(rsp), error, "{value:#x}");
            user_again(&mut test);
        }
        test.load(entry(TO), &(TO | 7).to_le_bytes());
        test.load(entry(FROM + 0x3000), &((FROM + 0x3000) | 7).to_le_bytes());
        test.core().flush_all();
    }
}

/// The base is in no region, or in another one than the operand.
#[test]
fn operands_far_from_their_base_are_where_they_belong() {
    // mov rax, [rdi - 8] / mov [rsi + 8], rax / out 0xf4, al
    let mut test = user(&[0x48, 0x8b, 0x47, 0xf8, 0x48, 0x89, 0x46, 0x08, 0xe6, 0xf4]);
    // The last page of the user half is FROM, too.
    let tables = 0x10_0000;
    for (at, value) in [(place::PML4 + 8 * 255, tables), (tables + 0xff8, tables + 0x1000)] {
        test.load(at, &(value | 7).to_le_bytes());
    }
    test.load(tables + 0x1ff8, &((tables + 0x2000) | 7).to_le_bytes());
    test.load(tables + 0x2ff8, &(FROM | 7).to_le_bytes());
    test.load(FROM + 0xff8, &0x77u64.to_le_bytes());
    test.core().flush_all();
    for _ in 0..3 {
        // Minus 8, plus 8: the first page.
        assert_eq!(run(&mut test, 1 << 47, 0u64.wrapping_sub(8)), wrote(0x77));
        assert_eq!(test.read_u64(0), 0x77);
        test.load(0, &[0; 8]);
    }
    assert_eq!(run(&mut test, 8, TO), wrote(0));
    // Not canonical, both.
    assert_eq!(run(&mut test, (1 << 47) + 16, TO), wrote(FAULTED));
    let core = test.core();
    let reservation = core.windows.reservation.as_ref().expect("the program has windows");
    for (region, delta) in core.cpu.regions.0.iter().enumerate() {
        let place = reservation.find(delta.wrapping_add((region as u64) << super::REGION_BITS));
        assert!(place.is_some_and(|(window, _)| region < super::REGIONS || window == 0), "{region:#x}");
    }
}

/// Whoever maps something here and leaves the place to the host must not get it in a window.
#[test]
fn nothing_else_is_mapped_in_windows() {
    let mut test = user(COPY);
    run(&mut test, FROM, TO);
    let _others: Vec<Vec<u8>> = (0..64).map(|n| vec![0; 1 << (12 + n % 16)]).collect();
    let reservation = test.core().windows.reservation.as_ref().expect("the program has windows");
    assert_eq!(reservation.bare, super::others_go_high());
    let maps = std::fs::read_to_string("/proc/self/maps").expect("it is there");
    let mut ours = 0;
    for line in maps.lines() {
        let (start, rest) = line.split_once('-').expect("a range");
        let start = u64::from_str_radix(start, 16).expect("an address");
        if reservation.contains(start) {
            let nothing = rest.split_whitespace().nth(1) == Some("---p");
            let ram = rest.contains("-s ") && rest.contains("memfd:");
            assert!(nothing || ram, "{line}");
            ours += usize::from(ram);
        }
    }
    assert!(ours > 0, "nothing of the guest is there:\n{maps}");
}
