//! Guests of a few instructions: ELF files with a PVH note, which start in 32-bit protected mode with flat
//! segments and paging off (Xen's PVH boot protocol, docs/misc/pvh.pandoc).

/// Where the code is loaded and starts.
pub const ENTRY: u32 = 0x10_0000;

/// XEN_ELFNOTE_PHYS32_ENTRY: the note that holds the entry point.
const PHYS32_ENTRY: u32 = 18;

/// An ELF file whose PVH entry point is `code`, followed by zeros up to 64 KiB.
pub fn pvh(code: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    const NOTE: usize = 12 + 4 + 4;
    let code_offset = 4096usize;
    let mut file = vec![0u8; code_offset];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes()); // ET_EXEC
    put(18, &62u16.to_le_bytes()); // x86-64
    put(20, &1u32.to_le_bytes());
    put(24, &u64::from(ENTRY).to_le_bytes());
    put(32, &64u64.to_le_bytes()); // program headers
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    // PT_LOAD, read, write and execute.
    let mut header = |at: usize, kind: u32, offset: usize, address: u64, size: u64, memory: u64| {
        put(at, &kind.to_le_bytes());
        put(at + 4, &7u32.to_le_bytes());
        for (i, value) in [offset as u64, address, address, size, memory, 4].iter().enumerate() {
            put(at + 8 + 8 * i, &value.to_le_bytes());
        }
    };
    header(64, 1, code_offset, u64::from(ENTRY), code.len() as u64, 0x1_0000);
    header(64 + 56, 4, HEADERS, 0, NOTE as u64, NOTE as u64);
    put(HEADERS, &4u32.to_le_bytes());
    put(HEADERS + 4, &4u32.to_le_bytes());
    put(HEADERS + 8, &PHYS32_ENTRY.to_le_bytes());
    put(HEADERS + 12, b"Xen\0");
    put(HEADERS + 16, &ENTRY.to_le_bytes());
    file.extend_from_slice(code);
    file
}

/// A flat image with a Multiboot header of version 1 or 2 (Multiboot 0.6.96, 3.1; Multiboot 2.0, 3.1), loaded at
/// [`ENTRY`] and entered at `code` behind the header.
pub fn multiboot(version: u8, code: &[u8]) -> Vec<u8> {
    const CODE: u32 = ENTRY + 0x100;
    let words: Vec<u32> = if version == 1 {
        let flags = 1 << 16;
        let checksum = 0u32.wrapping_sub(0x1bad_b002 + flags);
        vec![0x1bad_b002, flags, checksum, ENTRY, ENTRY, 0, 0, CODE]
    } else {
        let checksum = 0u32.wrapping_sub(0xe852_50d6).wrapping_sub(64);
        // Addresses, entry point and its padding, end.
        let tags = [2, 24, ENTRY, ENTRY, 0, 0, 3, 12, CODE, 0, 0, 8];
        [vec![0xe852_50d6, 0, 64, checksum], tags.to_vec()].concat()
    };
    let mut file: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    file.resize((CODE - ENTRY) as usize, 0);
    file.extend_from_slice(code);
    file
}

/// Code that prints `text` on the first serial port.
pub fn print(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code
}

/// Code that writes `value` to the debug-exit port.
pub fn debug_exit(value: u8) -> Vec<u8> {
    // mov al, value; mov dx, 0xf4; out dx, al
    vec![0xb0, value, 0x66, 0xba, 0xf4, 0x00, 0xee]
}

/// Code that halts for ever with interrupts off.
pub const HALT: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];

/// Code that never ends and never halts.
pub const SPIN: &[u8] = &[0xeb, 0xfe];
