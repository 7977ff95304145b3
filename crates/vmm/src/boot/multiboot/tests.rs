//! Synthetic Multiboot kernels, whole and damaged, and what they find in memory.

use super::super::{Entry, load_images};
use super::*;
use crate::config::Module;
use std::io::Cursor;

const RAM: u64 = 64 << 20;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

fn boot(modules: &[Module]) -> Boot<'_> {
    let kernel = Path::new("dir/my kernel");
    Boot { kernel, initrd: None, modules, command_line: "a=b c", ram: RAM, rsdp: layout::ACPI }
}

fn module(text: Option<&str>) -> Module {
    Module { path: "m".into(), text: text.map(str::to_owned) }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// An ELF file of either class with one segment, 0x300 bytes of 0xcd at `gpa` and as many zeros, entered at its
/// start + 0x10 by its virtual address, with `header` behind the program header.
fn elf(wide: bool, gpa: u64, virt: u64, header: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x500];
    image[0x200..].fill(0xcd);
    image[..7].copy_from_slice(if wide { b"\x7fELF\x02\x01\x01" } else { b"\x7fELF\x01\x01\x01" });
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &[2, 0, if wide { 62 } else { 3 }, 0]);
    if wide {
        put(24, &(virt + 0x10).to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &[56, 0, 1, 0]);
        put(64, &words(&[1, 7]));
        for (n, value) in [0x200u64, virt, gpa, 0x300, 0x600, 0x1000].into_iter().enumerate() {
            put(72 + 8 * n, &value.to_le_bytes());
        }
    } else {
        put(24, &words(&[(virt + 0x10) as u32, 64]));
        put(42, &[32, 0, 1, 0]);
        put(64, &words(&[1, 0x200, virt as u32, gpa as u32, 0x300, 0x600, 7, 0x1000]));
    }
    put(128, header);
    image
}

fn header_one(flags: u32, addresses: &[u32]) -> Vec<u8> {
    words(&[&[0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags)], addresses].concat())
}

fn header_two(tags: &[(u16, u16, &[u32])]) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    for (kind, flags, body) in tags.iter().copied().chain([(0, 0, &[][..])]) {
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&words(&[8 + 4 * body.len() as u32]));
        bytes.extend_from_slice(&words(body));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    let length = bytes.len() as u32;
    let checksum = 0u32.wrapping_sub(0xe852_50d6).wrapping_sub(length);
    bytes[..16].copy_from_slice(&words(&[0xe852_50d6, 0, length, checksum]));
    bytes
}

fn load_bytes(memory: &GuestMemoryMmap, kernel: &[u8], modules: &[&[u8]], boot: &Boot) -> Result<Entry> {
    let mut modules: Vec<_> = modules.iter().map(|bytes| Cursor::new(*bytes)).collect();
    load_images(memory, boot, &mut Cursor::new(kernel), None, &mut modules)
}

fn refusal(kernel: &[u8]) -> String {
    let message = load_bytes(&memory(), kernel, &[], &boot(&[])).unwrap_err().to_string();
    assert!(message.contains("my kernel") && !message.contains('\n'), "{message}");
    message
}

fn u32_of(memory: &GuestMemoryMmap, gpa: u32) -> u32 {
    memory.read_obj(GuestAddress(gpa.into())).unwrap()
}

fn text(memory: &GuestMemoryMmap, gpa: u32) -> String {
    let byte = |i: u32| memory.read_obj::<u8>(GuestAddress((gpa + i).into())).unwrap();
    (0..).map(byte).take_while(|byte| *byte != 0).map(char::from).collect()
}

#[test]
fn version_one_by_elf() {
    let memory = memory();
    let modules = [module(None), module(Some("second one"))];
    let kernel = elf(false, 0x40_0000, 0xc040_0000, &header_one(3, &[]));
    let entry = load_bytes(&memory, &kernel, &[&[7; 5000], &[]], &boot(&modules)).unwrap();
    let Entry::Multiboot { rip, magic, info } = entry else { panic!("{entry:?}") };
    assert_eq!((rip, magic), (0x40_0010, 0x2bad_b002));
    assert_eq!(u32_of(&memory, 0x40_02fc), 0xcdcd_cdcd);
    assert_eq!(u32_of(&memory, 0x40_0300), 0);
    let field = |at: u32| u32_of(&memory, info + at);
    assert_eq!(field(0), 0x24d);
    assert_eq!((field(4), u64::from(field(8))), (639, (RAM >> 10) - 1024));
    assert_eq!(text(&memory, field(16)), "my_kernel a=b c");
    assert_eq!(text(&memory, field(64)), "anyvisor");
    assert_eq!(field(20), 2);
    let of_module = |n: u32, at: u32| u32_of(&memory, field(24) + 16 * n + at);
    let (start, end) = (of_module(0, 0), of_module(0, 4));
    assert_eq!((start % 4096, end - start, u32_of(&memory, start)), (0, 5000, 0x0707_0707));
    assert!(start >= 0x10_0000 && !(0x40_0000..0x40_0600).contains(&start));
    assert_eq!((text(&memory, of_module(0, 8)), text(&memory, of_module(1, 8))), ("m".into(), "second one".into()));
    assert_eq!(of_module(1, 0), of_module(1, 4), "an empty one");
    let (length, map) = (field(44), field(48));
    assert_eq!(length as usize, 24 * layout::memory_map(RAM).len());
    assert_eq!((u32_of(&memory, map), u32_of(&memory, map + 4), u32_of(&memory, map + 20)), (20, 0, 1));
    assert_eq!(u64::from(u32_of(&memory, map + 12)), layout::LOW_END);
}

#[test]
fn version_two_by_elf_has_the_acpi_tables() {
    let memory = memory();
    memory.write_slice(b"RSD PTR ", GuestAddress(layout::ACPI)).unwrap();
    let tags: [(u16, u16, &[u32]); 5] =
        [(1, 0, &[6, 4, 1]), (1, 1, &[5, 8]), (5, 1, &[1024, 768, 32]), (10, 0, &[0, !0, 0x1000, 0]), (6, 0, &[])];
    let kernel = elf(true, 0x20_0000, 0xffff_ffff_8020_0000, &header_two(&tags));
    let entry = load_bytes(&memory, &kernel, &[&[1]], &boot(&[module(Some("x"))])).unwrap();
    let Entry::Multiboot { rip, magic, info } = entry else { panic!("{entry:?}") };
    assert_eq!((rip, magic), (0x20_0010, 0x36d7_6289));
    let (mut seen, mut at, end) = (vec![], info + 8, info + u32_of(&memory, info));
    while at < end {
        let (kind, size) = (u32_of(&memory, at), u32_of(&memory, at + 4));
        match kind {
            1 => assert_eq!(text(&memory, at + 8), "my_kernel a=b c"),
            3 => assert_eq!(
                (u32_of(&memory, at + 12) - u32_of(&memory, at + 8), text(&memory, at + 16)),
                (1, "x".into())
            ),
            6 => assert_eq!((u32_of(&memory, at + 8), u32_of(&memory, at + 24)), (24, layout::LOW_END as u32)),
            15 => assert_eq!((size, text(&memory, at + 8)), (44, "RSD PTR ".into())),
            21 => assert_eq!(u32_of(&memory, at + 8), 0x20_0000),
            _ => {}
        }
        seen.push(kind);
        at = (at + size).next_multiple_of(8);
    }
    assert_eq!(seen, [1, 2, 3, 4, 6, 15, 21, 0]);
    assert_eq!(at, end);
}

/// Both versions without ELF headers: loaded low, where test programs are, with the header inside of the image.
#[test]
fn flat_images_go_where_their_header_says() {
    let one = header_one(1 << 16, &[0x8010, 0x8000, 0x8100, 0x9000, 0x8040]);
    let two = header_two(&[(2, 0, &[0x8010, 0x8000, 0, 0]), (3, 0, &[0x8040])]);
    let whole = header_two(&[(2, 0, &[0x8040, !0, 0, 0]), (3, 0, &[0x8048])]);
    for (header, first) in [(one, 0x30), (two, 0x30), (whole, 0)] {
        let memory = memory();
        let mut kernel = vec![0xab; 0x200];
        kernel[0x40..0x40 + header.len()].copy_from_slice(&header);
        kernel[first] = 0x77;
        let entry = load_bytes(&memory, &kernel, &[], &boot(&[])).unwrap();
        let Entry::Multiboot { info, .. } = entry else { panic!("{entry:?}") };
        assert!(u64::from(info) >= layout::HIGH_START);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x8000)).unwrap(), 0x77, "{first:x}");
    }
}

#[test]
fn the_entry_is_flat_32_bit_code() {
    use anyvisor_x86::bits::{cr0, gpr};
    use anyvisor_x86::segment::index::{CS, DS, SS};
    let memory = memory();
    let entry = load_bytes(&memory, &elf(false, 0x8000, 0x8000, &header_one(0, &[])), &[], &boot(&[])).unwrap();
    let mut state = anyvisor_x86::VcpuState::reset(0, 0);
    entry.apply(&mut state);
    let Entry::Multiboot { info, .. } = entry else { panic!("{entry:?}") };
    assert_eq!((state.rip, state.gpr[gpr::RAX], state.gpr[gpr::RBX]), (0x8010, 0x2bad_b002, info.into()));
    assert!(state.segments.seg[CS].is_default_32() && !state.segments.seg[CS].is_long());
    assert!([DS, SS].iter().all(|&i| state.segments.seg[i].limit == u32::MAX && state.segments.seg[i].base == 0));
    assert_eq!((state.cr0 & (cr0::PE | cr0::PG), state.cr4, state.gdtr.limit), (cr0::PE, 0, 0));
    // Nothing else was written below 1 MiB: such an image may have code where other protocols have tables.
    for gpa in (0x500..0x8000).chain(0x8600..layout::LOW_END).step_by(4) {
        assert_eq!(u32_of(&memory, gpa as u32), 0, "{gpa:x}");
    }
}

#[test]
fn what_cannot_be_had_is_refused_in_one_line() {
    let elf_with = |header: &[u8]| refusal(&elf(false, 0x40_0000, 0x40_0000, header));
    assert!(elf_with(&header_one(8, &[])).contains("flags 0x8"));
    assert!(elf_with(&header_two(&[(1, 0, &[7])])).contains("type 7"));
    assert!(elf_with(&header_two(&[(5, 0, &[0, 0, 0])])).contains("framebuffer"));
    assert!(elf_with(&header_two(&[(77, 0, &[])])).contains("tag 77"));
    assert!(elf_with(&header_one(1 << 16, &[0, 0x1000, 0, 0, 0])).contains("impossible addresses"));
    assert!(elf_with(&header_one(1 << 16, &[0x8080, 0x8000, 0x7000, 0, 0x8000])).contains("impossible addresses"));
    assert!(elf_with(&header_one(1 << 16, &[0x8080, 0x8000, 0, 0, 0x7fff])).contains("entry point"));
    let at = |gpa: u64| refusal(&elf(true, gpa, gpa, &header_one(0, &[])));
    assert!(at(0x9_f800).contains("no memory is free"));
    assert!(at(0x800).contains("no memory is free"));
    assert!(at(RAM).contains("--memory"));
    assert!(at(0xffff_ff00).contains("impossible sizes"));
    let mut arm = elf(false, 0x40_0000, 0x40_0000, &header_one(0, &[]));
    arm[18] = 40;
    assert!(refusal(&arm).contains("another processor"));
    let mut flat = vec![0; 4096];
    flat[..12].copy_from_slice(&header_one(0, &[]));
    assert!(refusal(&flat).contains("no ELF file"));
    let kernel = elf(false, 0x40_0000, 0x40_0000, &header_one(0, &[]));
    let large = vec![1; 61 << 20];
    let message = load_bytes(&memory(), &kernel, &[&large], &boot(&[module(None)])).unwrap_err().to_string();
    assert!(message.contains("module 'm' (61M) does not fit"), "{message}");
    let message = load_bytes(&memory(), &super::super::test_image(), &[&large], &boot(&[module(None)])).unwrap_err();
    assert!(message.to_string().contains("takes no --module"), "{message}");
}

/// Truncated and mutated images: an entry or a one-line refusal, never a panic.
#[test]
fn hostile_images_never_panic() {
    let memory = memory();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let check = |image: &[u8]| {
        if let Err(error) = load_bytes(&memory, image, &[], &boot(&[])) {
            assert!(matches!(error, Error::User(_)) && !error.to_string().contains('\n'), "{error}");
        }
    };
    let address_tags: [(u16, u16, &[u32]); 2] = [(2, 0, &[0x40_0080, 0x40_0000, 0, 0]), (3, 0, &[0x40_0000])];
    let interesting = [0u64, 1, 0x7f, 0xfff, 0x8000_0000, 0xffff_ffff, 1 << 32, 1 << 47, u64::MAX - 7, u64::MAX];
    let originals = [
        elf(false, 0x40_0000, 0x40_0000, &header_one(0, &[])),
        elf(true, 0x40_0000, 0x40_0000, &header_two(&[(1, 1, &[6, 9]), (10, 0, &[0, 0, 0, 0])])),
        elf(false, 0, 0, &header_one(1 << 16, &[0x40_0080, 0x40_0000, 0, 0x50_0000, 0x40_0100])),
        elf(false, 0, 0, &header_two(&address_tags)),
    ];
    for original in originals {
        for length in 0..original.len() {
            check(&original[..length]);
        }
        for _ in 0..20_000 {
            let mut image = original.clone();
            for _ in 0..1 + next() % 3 {
                // Not the magic of the header, and its checksum is put right, or nothing would get far.
                let at = match next() % 2 {
                    0 => next() as usize % 120,
                    _ => 132 + next() as usize % 80,
                };
                let value = if next() % 2 == 0 { next() } else { interesting[next() as usize % interesting.len()] };
                let size = 1 << (next() % 4);
                image[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            let word = |n: usize| u32_at(&image, 128 + 4 * n).unwrap();
            let (place, sum) = match word(0) {
                0x1bad_b002 => (136, word(0).wrapping_add(word(1))),
                _ => (140, word(0).wrapping_add(word(1)).wrapping_add(word(2))),
            };
            image[place..place + 4].copy_from_slice(&0u32.wrapping_sub(sum).to_le_bytes());
            check(&image);
        }
    }
}
