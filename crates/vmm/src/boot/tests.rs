//! Synthetic kernels, whole and damaged: what loading leaves in memory, and that no bytes make it panic.

use super::*;
use crate::layout::HIGH_START;
use std::io::Cursor;

const RAM: u64 = 64 << 20;

fn memory(ram: u64) -> GuestMemoryMmap {
    let pieces: Vec<_> = layout::ram_pieces(ram).into_iter().map(|(s, l)| (GuestAddress(s), l as usize)).collect();
    GuestMemoryMmap::from_ranges(&pieces).unwrap()
}

fn boot(initrd: bool) -> Boot<'static> {
    let initrd = initrd.then_some(Path::new("initrd"));
    Boot {
        kernel: Path::new("vmlinuz"),
        initrd,
        modules: &[],
        command_line: "console=ttyS0",
        ram: RAM,
        rsdp: layout::ACPI,
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A relocatable 64-bit bzImage of protocol 2.15 with 4 KiB of payload that is all 0xab.
pub(crate) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    image[1024..].fill(0xab);
    put(&mut image, 0x1f1, &[1]); // setup_sects
    put(&mut image, 0x1f4, &256u32.to_le_bytes()); // syssize
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]); // loadflags
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(&mut image, 0x234, &[1]); // relocatable_kernel
    put(&mut image, 0x236, &3u16.to_le_bytes()); // xloadflags
    put(&mut image, 0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(&mut image, 0x260, &0x40_0000u32.to_le_bytes()); // init_size
    image
}

/// An ELF image with a PVH note (entry 0x100_0010) and one segment of 256 bytes at 16 MiB.
fn pvh_image() -> Vec<u8> {
    let mut image = vec![0; 0x200];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0]);
    put(&mut image, 24, &0x100_0000u64.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes()); // e_phoff
    put(&mut image, 54, &[56, 0, 2, 0]);
    let program = |kind: u32, offset: u64, address: u64, size: u64, memory: u64| {
        let mut p = vec![0; 56];
        p[0..4].copy_from_slice(&kind.to_le_bytes());
        for (at, value) in [(8, offset), (24, address), (32, size), (40, memory)] {
            p[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        p
    };
    put(&mut image, 64, &program(1, 0x100, 0x100_0000, 0x100, 0x2000));
    put(&mut image, 120, &program(4, 0xc0, 0, 20, 20));
    put(&mut image, 0xc0, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0, 0x10, 0, 0, 1]);
    image[0x100..].fill(0xcd);
    image
}

fn load_bytes(memory: &GuestMemoryMmap, kernel: &[u8], initrd: Option<&[u8]>, boot: &Boot) -> Result<Entry> {
    load_images(memory, boot, &mut Cursor::new(kernel), initrd.map(Cursor::new).as_mut(), &mut [])
}

fn refusal(kernel: &[u8], boot: &Boot) -> String {
    let message = load_bytes(&memory(boot.ram), kernel, None, boot).unwrap_err().to_string();
    assert!(message.contains("vmlinuz") && !message.contains('\n'), "{message}");
    message
}

fn read<const N: usize>(memory: &GuestMemoryMmap, gpa: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

#[test]
fn bzimage_by_the_64_bit_protocol() {
    let memory = memory(RAM);
    let initrd = vec![7; 5000];
    let entry = load_bytes(&memory, &bzimage(), Some(&initrd), &boot(true)).unwrap();
    assert_eq!(entry, Entry::Linux64 { rip: 0x100_0200 });
    assert_eq!(read::<4>(&memory, 0x100_0ffc), [0xab; 4]);

    let page: [u8; 4096] = read(&memory, layout::ZERO_PAGE);
    let u32_at = |at: usize| u64::from(u32::from_le_bytes(page[at..at + 4].try_into().unwrap()));
    let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    assert_eq!(u64_at(0x70), layout::ACPI);
    assert_eq!(page[0x210], 0xff, "type_of_loader");
    assert_eq!(u32_at(0x228), layout::COMMAND_LINE);
    assert_eq!(read::<14>(&memory, layout::COMMAND_LINE), *b"console=ttyS0\0");
    assert_eq!((u32_at(0x218), u32_at(0x21c)), (RAM - 0x2000, 5000));
    assert_eq!(read::<1>(&memory, RAM - 0x2000), [7]);
    assert_eq!(u64_at(0x250), layout::RNG_SEED);
    assert_eq!(page[0x1e8], 5);
    assert_eq!((u64_at(0x2d0 + 60), u64_at(0x2d0 + 68), u32_at(0x2d0 + 76)), (HIGH_START, RAM - HIGH_START, 1));
    let seed: [u8; 48] = read(&memory, layout::RNG_SEED);
    assert_eq!((seed[8], seed[12]), (9, 32));
    assert_ne!(seed[16..], [0; 32]);
}

#[test]
fn entry_state_is_64_bit_mode_on_identity_tables() {
    let memory = memory(RAM);
    let entry = load_bytes(&memory, &bzimage(), None, &boot(false)).unwrap();
    let mut state = VcpuState::reset(0, 0);
    state.lapic = vec![0; 1024];
    entry.apply(&mut state);
    assert!(state.segments.seg[CS].is_long() && state.segments.tr.is_usable());
    assert_eq!(state.segments.seg[SS].limit, u32::MAX);
    assert_eq!((state.rip, state.gpr[gpr::RSI]), (0x100_0200, layout::ZERO_PAGE));
    assert_eq!(state.lapic[0x350..0x354], 0x700u32.to_le_bytes());

    struct Tables<'a>(&'a GuestMemoryMmap);
    impl anyvisor_x86::paging::PageTables for Tables<'_> {
        fn read(&self, gpa: u64, _size: u8) -> Option<u64> {
            self.0.read_obj(GuestAddress(gpa)).ok()
        }
        fn compare_exchange(&self, gpa: u64, _size: u8, _old: u64, new: u64) -> bool {
            self.0.write_obj(new, GuestAddress(gpa)).is_ok()
        }
    }
    use anyvisor_x86::paging::{Access, AccessKind, PagingMode, walk};
    let mode = PagingMode {
        cr0: state.cr0,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.msr(msr::EFER).unwrap(),
        ac: false,
        physical_bits: 46,
        pkru: 0,
        pkrs: 0,
    };
    let access = Access { kind: AccessKind::Fetch, user: false, implicit: false };
    for gva in [0, 0x7123, 0x100_0200, 0xbfff_ffff, 0xffff_ffff] {
        let mapping = walk(&Tables(&memory), &mode, gva, access).unwrap();
        assert_eq!((mapping.gpa, mapping.page_bits), (gva, 21));
    }
    assert!(walk(&Tables(&memory), &mode, 1 << 32, access).is_err());
}

#[test]
fn the_last_paragraph_of_a_payload_may_be_short() {
    let (memory, image) = (memory(RAM), bzimage());
    assert!(load_bytes(&memory, &image[..image.len() - 15], None, &boot(false)).is_ok());
    assert!(refusal(&image[..image.len() - 16], &boot(false)).contains("damaged"));
}

#[test]
fn a_32_bit_kernel_is_entered_in_protected_mode() {
    let memory = memory(RAM);
    let mut image = bzimage();
    put(&mut image, 0x236, &[0, 0]);
    let entry = load_bytes(&memory, &image, None, &boot(false)).unwrap();
    assert_eq!(entry, Entry::Linux32 { rip: 0x100_0000 });
    let mut state = VcpuState::reset(0, 0);
    entry.apply(&mut state);
    let code = state.segments.seg[CS];
    assert!(code.is_default_32() && !code.is_long() && code.limit == u32::MAX);
    assert_eq!((code.selector, state.segments.seg[DS].selector), (0x10, 0x18), "__BOOT_CS, __BOOT_DS");
    assert_eq!((state.cr0, state.gpr[gpr::RSI]), (cr0::PE | cr0::ET, layout::ZERO_PAGE));
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RBP], state.gpr[gpr::RDI]), (0, 0, 0));
    // What the registers say is in memory too.
    let descriptor = u64::from_le_bytes(read(&memory, state.gdtr.base + 0x10));
    assert_eq!(Segment::from_descriptor(0x10, descriptor), code);
}

#[test]
fn elf_by_pvh() {
    let memory = memory(RAM);
    let entry = load_bytes(&memory, &pvh_image(), Some(&[1; 100]), &boot(true)).unwrap();
    assert_eq!(entry, Entry::Pvh { rip: 0x100_0010 });
    assert_eq!(read::<4>(&memory, 0x100_00fc), [0xcd; 4]);
    let info: [u8; 56] = read(&memory, layout::PVH_START_INFO);
    assert_eq!(info[0..8], [0x78, 0xc5, 0x6e, 0x33, 1, 0, 0, 0]);
    assert_eq!((info[12], info[48]), (1, 5), "modules, memory map entries");
    let module: [u8; 16] = read(&memory, layout::PVH_MODULES);
    assert_eq!(module[0..8], (RAM - 0x1000).to_le_bytes());

    let mut state = VcpuState::reset(0, 0);
    entry.apply(&mut state);
    assert!(state.segments.seg[CS].is_default_32() && !state.segments.seg[CS].is_long());
    assert_eq!((state.cr0 & (cr0::PE | cr0::PG), state.gpr[gpr::RBX]), (cr0::PE, layout::PVH_START_INFO));
}

#[test]
fn a_machine_must_hold_the_unpacked_kernel() {
    let enough = Boot { ram: 20 << 20, ..boot(false) };
    assert!(load_bytes(&memory(enough.ram), &bzimage(), None, &enough).is_ok());
    let message = refusal(&bzimage(), &Boot { ram: (20 << 20) - 4096, ..boot(false) });
    assert!(message.contains("--memory 20M"), "{message}");
}

#[test]
fn wrong_kernels_are_refused_in_one_line() {
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = bzimage();
        put(&mut image, at, bytes);
        refusal(&image, &boot(false))
    };
    assert!(changed(0x202, b"HdrX").contains("not a kernel"));
    assert!(changed(0x206, &[4, 2]).contains("older than"));
    assert!(changed(0x1f4, &[0xff; 4]).contains("damaged"));
    assert!(changed(0x260, &[0xff; 4]).contains("below 3G"));
    assert!(changed(0x258, &[0xff; 8]).contains("damaged"));
    assert!(refusal(b"", &boot(false)).contains("not a kernel"));
    assert!(refusal(b"#!/bin/sh\n", &boot(false)).contains("not a kernel"));
    let mut other = pvh_image();
    other[18] = 0xb7;
    assert!(refusal(&other, &boot(false)).contains("another processor"));
    let mut no_note = pvh_image();
    no_note[120] = 0;
    assert!(refusal(&no_note, &boot(false)).contains("PVH note"));
    let mut low = pvh_image();
    put(&mut low, 64 + 24, &0x7000u64.to_le_bytes());
    assert!(refusal(&low, &boot(false)).contains("below 1 MiB"));
}

#[test]
fn command_lines_and_initrds_have_limits() {
    let long = "x".repeat(2048);
    let error = load_bytes(&memory(RAM), &bzimage(), None, &Boot { command_line: &long, ..boot(false) }).unwrap_err();
    assert!(error.to_string().contains("2048") && error.to_string().contains("2047"), "{error}");
    let error = load_bytes(&memory(RAM), &bzimage(), None, &Boot { command_line: "a\0b", ..boot(false) }).unwrap_err();
    assert!(error.to_string().contains("NUL"));
    let huge = vec![1; 50 << 20];
    let error = load_bytes(&memory(RAM), &bzimage(), Some(&huge), &boot(true)).unwrap_err();
    assert!(error.to_string().contains("does not fit") && error.to_string().contains("--memory 70M"), "{error}");
    let error = load_bytes(&memory(RAM), &bzimage(), Some(&[]), &boot(true)).unwrap_err();
    assert!(error.to_string().contains("empty"), "{error}");
}

/// Truncated, mutated and random images: an entry or a one-line refusal, never a panic.
#[test]
fn hostile_images_never_panic() {
    let small = Boot { ram: 32 << 20, ..boot(false) };
    let memory = memory(small.ram);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let check = |image: &[u8]| {
        if let Err(error) = load_bytes(&memory, image, None, &small) {
            assert!(matches!(error, Error::User(_)), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    };
    let interesting =
        [0u64, 1, 0x7f, 0xff, 0xfff, 0x8000_0000, 0xffff_ffff, 1 << 47, u64::MAX / 2, u64::MAX - 7, u64::MAX];
    for original in [bzimage(), pvh_image()] {
        for length in (0..original.len()).step_by(if original.len() > 1024 { 13 } else { 1 }) {
            check(&original[..length]);
        }
        for _ in 0..20_000 {
            let mut image = original.clone();
            for _ in 0..1 + next() % 4 {
                let span = image.len().min(0x280) - 8;
                let at = next() as usize % span;
                let value = if next() % 2 == 0 { next() } else { interesting[next() as usize % interesting.len()] };
                let size = 1 << (next() % 4);
                put(&mut image, at, &value.to_le_bytes()[..size]);
            }
            check(&image);
        }
    }
    for _ in 0..2_000 {
        let mut image: Vec<u8> = (0..64 + next() % 512).map(|_| next() as u8).collect();
        if next() % 2 == 0 {
            put(&mut image, 0, b"\x7fELF\x02");
        }
        check(&image);
    }
}
