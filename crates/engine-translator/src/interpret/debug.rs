//! Debug registers: instruction, data and I/O breakpoints (SDM vol. 3B 18.2, 18.3.1).
//!
//! Cheap when unused: every access tests DR7's enable bits and no more. Hits of data breakpoints collect in
//! a thread-local word until the instruction's end, where they become one #DB trap.

use crate::core::Core;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::cr4;
use std::cell::Cell;

/// DR7: any of the four breakpoints enabled, locally or globally.
const ANY_ENABLED: u64 = 0xff;

thread_local! {
    static DATA_HITS: Cell<u64> = const { Cell::new(0) };
}

/// DR7's R/W field of a breakpoint.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Execute,
    Write,
    Io,
    ReadWrite,
}

/// Enabled breakpoints of DR7: number, kind, address and length in bytes.
fn enabled(dr: &[u64; 8]) -> impl Iterator<Item = (u32, Kind, u64, u64)> + '_ {
    let dr7 = dr[7];
    (0..4u32).filter(move |n| dr7 >> (2 * n) & 3 != 0).map(move |n| {
        let field = dr7 >> (16 + 4 * n);
        let kind = [Kind::Execute, Kind::Write, Kind::Io, Kind::ReadWrite][(field & 3) as usize];
        (n, kind, dr[n as usize], [1, 2, 8, 4][(field >> 2 & 3) as usize])
    })
}

/// Whether DR7 enables any breakpoint, or a debugger watches memory.
pub fn armed(core: &Core) -> bool {
    core.cpu.dr[7] & ANY_ENABLED != 0 || core.debugger.watches()
}

/// The #DB fault of an instruction breakpoint at linear address `rip`.
///
/// # Errors
/// That fault.
pub fn check_execution(core: &Core, rip: u64) -> Result<(), Exception> {
    let hits = enabled(&core.cpu.dr)
        .filter(|(_, kind, address, _)| *kind == Kind::Execute && *address == rip)
        .fold(0, |hits, (n, ..)| hits | 1 << n);
    if hits != 0 { Err(Exception::db(hits)) } else { Ok(()) }
}

/// Notes a data access of `size` bytes at linear address `gva` against the data breakpoints.
#[inline]
pub fn note_access(core: &Core, gva: u64, size: u64, write: bool) {
    if armed(core) {
        match_access(core, gva, size, write);
    }
}

#[cold]
fn match_access(core: &Core, gva: u64, size: u64, write: bool) {
    core.debugger.note(gva, size, write);
    for (n, kind, address, length) in enabled(&core.cpu.dr) {
        let watched = match kind {
            Kind::Write => write,
            Kind::ReadWrite => true,
            Kind::Execute | Kind::Io => false,
        };
        let base = address & !(length - 1);
        if watched && gva < base.saturating_add(length) && base < gva.saturating_add(size) {
            DATA_HITS.set(DATA_HITS.get() | 1 << n);
        }
    }
}

/// Notes an access to `size` ports from `port` against the I/O breakpoints, which CR4.DE makes possible (SDM
/// vol. 3B 18.2.4).
pub fn note_port(core: &Core, port: u16, size: u64) {
    if !armed(core) || core.cpu.cr4 & cr4::DE == 0 {
        return;
    }
    let port = u64::from(port);
    for (n, kind, address, length) in enabled(&core.cpu.dr) {
        let base = address & !(length - 1);
        if kind == Kind::Io && port < base.saturating_add(length) && base < port + size {
            DATA_HITS.set(DATA_HITS.get() | 1 << n);
        }
    }
}

/// Forgets what an instruction hit that faulted after all.
pub fn forget_hits(core: &Core) {
    DATA_HITS.set(0);
    core.debugger.forget();
}

/// Takes the DR6 bits of the data breakpoints hit so far.
pub fn take_hits() -> u64 {
    DATA_HITS.take()
}
