//! Compare-and-swap on guest memory at any alignment, as LOCK-prefixed instructions need it.
//!
//! Rust's atomics demand natural alignment; the CPU does not, and a guest may rely on that.

use std::arch::asm;

/// Replaces `old` by `new` in the `size` (1, 2, 4 or 8) bytes at `host` if they hold `old`, as one locked
/// operation. Returns what was there.
///
/// # Safety
/// `host` must point at `size` bytes of mapped writable memory that Rust holds no reference to.
pub unsafe fn compare_exchange(host: *mut u8, size: u32, old: u64, new: u64) -> u64 {
    let mut found = old;
    // SAFETY: by the contract; the instructions touch only that memory, RAX and the flags.
    unsafe {
        match size {
            1 => asm!("lock cmpxchg [{p}], {n}", p = in(reg) host, n = in(reg_byte) new as u8,
                      inout("rax") found, options(nostack)),
            2 => asm!("lock cmpxchg [{p}], {n:x}", p = in(reg) host, n = in(reg) new,
                      inout("rax") found, options(nostack)),
            4 => asm!("lock cmpxchg [{p}], {n:e}", p = in(reg) host, n = in(reg) new,
                      inout("rax") found, options(nostack)),
            8 => asm!("lock cmpxchg [{p}], {n}", p = in(reg) host, n = in(reg) new,
                      inout("rax") found, options(nostack)),
            _ => unreachable!("atomic access of {size} bytes"),
        }
    }
    found & super::alu::mask(size)
}

/// As [`compare_exchange`] for 16 bytes.
///
/// # Safety
/// As there, and `host` must be a multiple of 16.
pub unsafe fn compare_exchange_16(host: *mut u8, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: by the contract. RBX is saved because LLVM reserves it.
    unsafe {
        asm!("xchg {b}, rbx", "lock cmpxchg16b [{p}]", "mov rbx, {b}",
             p = in(reg) host, b = inout(reg) new as u64 => _, in("rcx") (new >> 64) as u64,
             inout("rax") low, inout("rdx") high, options(nostack));
    }
    u128::from(high) << 64 | u128::from(low)
}
