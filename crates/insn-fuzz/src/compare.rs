//! What counts as a difference between the host's outcome and the engine's.
//!
//! Everything does, but for:
//! - status flags that the manual leaves undefined ([`crate::undefined`]);
//! - for the translator, status flags at a fault that are dead there ([`Flow::dead_at`]);
//! - what 32-bit code cannot see: R8 to R15 and the upper halves of the others;
//! - RFLAGS.RF, which the host's frame may show set;
//! - for page faults outside the host's user half, the error code's present bit, which the host kernel
//!   hides from signal handlers;
//! - what a CALL to an address that is none leaves below the stack ([`excused`]);
//! - x87 instruction and data pointers, and the last opcode;
//! - the x87 stack's top and tags after an MMX instruction that faulted: the CPU may already have made the
//!   change that all MMX instructions make (SDM vol. 1 9.5), which the restarted instruction makes again.

use crate::case::{Case, Outcome, State, Stop, register_name};
use crate::guest::Executor;
use crate::layout::{bits_at, linear_of};
use crate::undefined::Flow;
use anyvisor_engine_translator::vendor;
use std::fmt::Write;
use std::ops::Range;

const RF: u64 = 1 << 16;
/// FSW's stack pointer.
const TOP: u16 = 7 << 11;
/// Where the host kernel ends the user half of the address space: a page below the canonical limit.
const USER_END: u64 = 0x7fff_ffff_f000;

/// Whether the outcomes are the same without any exception made: then [`differences`] has none to tell.
pub fn same(case: &Case, host: &Outcome, guest: &Outcome) -> bool {
    let (h, g) = (&host.state, &guest.state);
    let narrow = bits_at(case.state.rip) == 32;
    let same_registers = match narrow {
        true => (0..8).all(|i| h.gpr[i] as u32 == g.gpr[i] as u32),
        false => h.gpr == g.gpr,
    };
    canonical_stop(host.stop) == canonical_stop(guest.stop)
        && same_registers
        && (h.rip, h.rflags & !RF, h.fs_base, h.gs_base) == (g.rip, g.rflags & !RF, g.fs_base, g.gs_base)
        && (h.ymm == g.ymm && h.mxcsr == g.mxcsr && h.x87 == g.x87)
}

/// The differences, a line each; empty if there is none. `flow` is the case's.
pub fn differences(case: &Case, flow: &Flow, executor: Executor, host: &Outcome, guest: &Outcome) -> String {
    let mut text = String::new();
    if canonical_stop(host.stop) != canonical_stop(guest.stop) {
        line(&mut text, "end", &describe(host.stop), &describe(guest.stop));
        if guest.stop == Stop::Hang || host.stop == Stop::Hang {
            return text;
        }
    }
    let mut host = host.clone();
    let mut guest = guest.clone();
    if flow.is_mmx(host.state.rip) {
        for outcome in [&mut host, &mut guest] {
            let x87 = &mut outcome.state.x87;
            x87.st.rotate_right(usize::from((x87.status & TOP) >> 11));
            x87.status &= !TOP;
            x87.tag = 0;
        }
    }
    if bits_at(case.state.rip) == 32 {
        for outcome in [&mut host, &mut guest] {
            outcome.state.gpr = std::array::from_fn(|i| if i < 8 { outcome.state.gpr[i] & 0xffff_ffff } else { 0 });
        }
    }
    let stopped = match host.stop {
        // The INT3 before the case: RIP is behind it (SDM vol. 3A 6.15, vector 3).
        Stop::Exception { vector: 3, .. } if host.state.rip == case.state.rip => host.state.rip - 1,
        _ => host.state.rip,
    };
    let mut undefined = flow.undefined_at(stopped) | RF;
    if executor == Executor::Translator && matches!(host.stop, Stop::Exception { vector, .. } if vector != 3) {
        undefined |= flow.dead_at(host.state.rip);
    }
    registers(&mut text, &host.state, &guest.state, undefined);
    vectors(&mut text, &host.state, &guest.state);
    text
}

fn line(text: &mut String, what: &str, host: &str, guest: &str) {
    writeln!(text, "  {what:8} host {host}  engine {guest}").expect("writing to a string");
}

fn canonical_stop(stop: Stop) -> Stop {
    match stop {
        Stop::Exception { vector: 14, error, cr2 } if cr2 >= USER_END => {
            Stop::Exception { vector: 14, error: error | 1, cr2 }
        }
        other => other,
    }
}

fn describe(stop: Stop) -> String {
    match stop {
        Stop::Exception { vector: 14, error, cr2 } => format!("#PF error {error:#x} at {cr2:#x}"),
        Stop::Exception { vector, error, .. } => format!("vector {vector} error {error:#x}"),
        Stop::Hang => "still running".into(),
    }
}

fn registers(text: &mut String, host: &State, guest: &State, undefined: u64) {
    let mut number = |name: &str, h: u64, g: u64| {
        if h != g {
            line(text, name, &format!("{h:016x}"), &format!("{g:016x}"));
        }
    };
    number("rip", host.rip, guest.rip);
    number("rflags", host.rflags & !undefined, guest.rflags & !undefined);
    for i in 0..16 {
        number(register_name(i), host.gpr[i], guest.gpr[i]);
    }
    number("fs base", host.fs_base, guest.fs_base);
    number("gs base", host.gs_base, guest.gs_base);
    number("mxcsr", u64::from(host.mxcsr), u64::from(guest.mxcsr));
    number("fcw", u64::from(host.x87.control), u64::from(guest.x87.control));
    number("fsw", u64::from(host.x87.status), u64::from(guest.x87.status));
    number("ftw", u64::from(host.x87.tag), u64::from(guest.x87.tag));
}

fn vectors(text: &mut String, host: &State, guest: &State) {
    let mut wide = |name: &str, i: usize, h: &[u8], g: &[u8]| {
        if h != g {
            line(text, &format!("{name}{i}"), &hex(h), &hex(g));
        }
    };
    for i in 0..8 {
        wide("st", i, &host.x87.st[i], &guest.x87.st[i]);
    }
    for i in 0..16 {
        wide("ymm", i, &host.ymm[i], &guest.ymm[i]);
    }
}

/// Bytes as a number: the highest first.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string");
        text
    })
}

/// Where translated code may leave other memory than the host: below the stack pointer of an AMD processor's CALL to an address
/// that is none. It looks at the address before it writes where it came from; Intel's after, and as those does
/// translated code. Nobody can have anything there: a CALL that goes on overwrites it.
pub fn excused(case: &Case, executor: Executor, host: &Outcome) -> Option<Range<u64>> {
    const GP: u8 = 13;
    const RETURN_ADDRESS: u64 = 8;
    let rsp = host.state.gpr[anyvisor_x86::bits::gpr::RSP];
    let possible = vendor::is_amd() && executor == Executor::Translator;
    let is_gp = matches!(host.stop, Stop::Exception { vector: GP, .. });
    let is_call = || Flow::new(&case.code, case.state.rip).is_call(host.state.rip);
    (possible && is_gp && is_call()).then(|| rsp.wrapping_sub(RETURN_ADDRESS)..rsp)
}

/// The differences in memory, at most a few lines.
pub fn memory_differences(host: &[u8], guest: &[u8]) -> String {
    let mut text = String::new();
    if host == guest {
        return text;
    }
    for (offset, (h, g)) in host.iter().zip(guest).enumerate().filter(|(_, (h, g))| h != g).take(16) {
        writeln!(text, "  [{:x}] host {h:02x}  engine {g:02x}", linear_of(offset)).expect("writing to a string");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_defined_counts() {
        let case = Case { code: vec![0x21, 0xc8], ..Case::default() };
        let flow = Flow::new(&case.code, case.state.rip);
        let end = Stop::Exception { vector: 3, error: 0, cr2: 0 };
        let host = Outcome { stop: end, state: State { rip: case.state.rip + 3, ..State::default() } };
        let mut guest = host.clone();
        guest.state.rflags ^= 1 << 4 | RF;
        assert_eq!(differences(&case, &flow, Executor::Interpreter, &host, &guest), "");
        guest.state.rflags ^= 1;
        assert!(differences(&case, &flow, Executor::Interpreter, &host, &guest).contains("rflags"));
        guest = host.clone();
        guest.state.ymm[3][31] = 1;
        assert!(differences(&case, &flow, Executor::Interpreter, &host, &guest).contains("ymm3"));
        guest = Outcome { stop: Stop::Exception { vector: 13, error: 0, cr2: 0 }, ..host.clone() };
        assert!(differences(&case, &flow, Executor::Interpreter, &host, &guest).contains("vector 13"));
    }

    #[test]
    fn the_present_bit_of_kernel_addresses_is_hidden() {
        let at = |error| Stop::Exception { vector: 14, error, cr2: 0xffff_8000_0000_0000 };
        assert_eq!(canonical_stop(at(4)), canonical_stop(at(5)));
        assert_ne!(canonical_stop(at(5)), canonical_stop(at(7)));
    }
}
