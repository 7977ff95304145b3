//! What a case looks at after a run.

use super::tables::{self, Ending};
use super::{Access, Assembled, Mismatch, Mode, Verdict, ensure, equal};
use crate::Exit;
use anyvisor_x86::VcpuState;
use anyvisor_x86::bits::{gpr, rflags};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::index;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What an exception or interrupt pushed. `rsp` and `ss` are there if the frame has them: always in long
/// mode, else after a change of privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub error_code: Option<u32>,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    pub rsp: Option<u64>,
    pub ss: Option<u16>,
}

/// The end of a run.
#[derive(Clone, Debug)]
pub struct End {
    pub exit: Exit,
    /// Whether the guest got to an end: a write to [`super::END_PORT`] or [`tables::place::END`].
    pub ended: bool,
    pub state: VcpuState,
    /// What devices saw during the run.
    pub log: Vec<Access>,
    pub(super) mode: Mode,
    /// The code of the run, and its first RIP.
    pub(super) code: Assembled,
    pub(super) ip: u64,
    pub(super) memory: GuestMemoryMmap,
}

/// Vectors that push an error code outside real mode (SDM vol. 3A table 6-1).
fn has_error_code(number: u8) -> bool {
    matches!(number, vector::DF | vector::TS | vector::NP | vector::SS | vector::GP | vector::PF | vector::AC | 21)
}

/// RFLAGS bits that show in a frame, for a message.
fn where_it_is(end: &End) -> String {
    let state = &end.state;
    let at = state.segments.seg[index::CS].base + state.rip;
    match end.vector() {
        Some(vector) => format!("in vector {vector:#x} {:x?}, CR2 {:#x}", end.frame(), state.cr2),
        None if end.is_done() => "at the end of the code".to_owned(),
        None => format!("{:?} at {at:#x}", end.exit),
    }
}

impl End {
    /// The register of index `n` (see [`gpr`]).
    pub fn gpr(&self, n: usize) -> u64 {
        self.state.gpr[n]
    }

    /// The linear address of the next instruction.
    pub fn linear_rip(&self) -> u64 {
        match self.state.segments.seg[index::CS].is_long() {
            true => self.state.rip,
            false => (self.state.segments.seg[index::CS].base + self.state.rip) & 0xffff_ffff,
        }
    }

    /// The vector in whose default handler the run ended.
    pub fn vector(&self) -> Option<u8> {
        let offset = self.linear_rip().wrapping_sub(tables::place::HANDLERS + Ending::PORT.length);
        (self.ended && offset < 16 * 256 && offset.is_multiple_of(16)).then_some((offset / 16) as u8)
    }

    /// The offset of the last instruction of the code.
    pub fn last_offset(&self) -> u64 {
        self.code.last()
    }

    fn is_done(&self) -> bool {
        self.ended && self.state.rip == self.ip + self.code.end() + Ending::of(self.mode).length
    }

    /// The code ran to its end.
    pub fn done(&self) -> Verdict {
        ensure(self.is_done(), || format!("expected the end of the code, got {}", where_it_is(self)))
    }

    /// The run ended with a shutdown: a triple fault.
    pub fn shutdown(&self) -> Verdict {
        ensure(self.exit == Exit::Shutdown, || format!("expected a shutdown, got {}", where_it_is(self)))
    }

    /// The code ran to its end with these values in general registers (indices of [`gpr`]).
    pub fn registers(&self, expected: &[(usize, u64)]) -> Verdict {
        self.done()?;
        for &(register, value) in expected {
            equal(GPR_NAMES[register], self.state.gpr[register], value)?;
        }
        Ok(())
    }

    /// The run ended in the default handler of `vector`.
    pub fn vectored(&self, vector: u8) -> Result<Frame, Mismatch> {
        ensure(self.vector() == Some(vector), || format!("expected vector {vector:#x}, got {}", where_it_is(self)))?;
        Ok(self.frame().expect("there is a vector"))
    }

    /// The frame at the top of the handler's stack, in the run's handler.
    pub fn frame(&self) -> Option<Frame> {
        self.vector().map(|vector| self.frame_of(vector))
    }

    fn frame_of(&self, vector: u8) -> Frame {
        let width = u64::from(self.mode.handler_bits() / 8);
        let ss = &self.state.segments.seg[index::SS];
        let top = self.state.gpr[gpr::RSP] + if width == 8 { 0 } else { ss.base };
        let word = |n: u64| {
            let mut bytes = [0; 8];
            let at = GuestAddress(top + width * n);
            // A stack outside RAM reads as zeros: no frame will be what a case expects.
            let _ = self.memory.read_slice(&mut bytes[..width as usize], at);
            u64::from_le_bytes(bytes)
        };
        let coded = width > 2 && has_error_code(vector);
        let first = u64::from(coded);
        let (cs, rflags) = (word(first + 1) as u16, word(first + 2));
        let switched = width == 8 || width == 4 && (cs & 3 == 3 || rflags & rflags::VM != 0);
        Frame {
            error_code: coded.then(|| word(0) as u32),
            rip: word(first),
            cs,
            rflags,
            rsp: switched.then(|| word(first + 3)),
            ss: switched.then(|| word(first + 4) as u16),
        }
    }

    /// The last instruction of the code raised `vector`, which has no error code, as a fault: the frame's
    /// RIP is the instruction's. (That RF is set in its flags has cases of its own.)
    pub fn fault(&self, vector: u8) -> Verdict {
        self.fault_at(self.code.offsets.len().saturating_sub(1), vector, None)
    }

    /// As [`End::fault`], with an error code.
    pub fn fault_code(&self, vector: u8, code: u32) -> Verdict {
        self.fault_at(self.code.offsets.len().saturating_sub(1), vector, Some(code))
    }

    /// #GP(0) at the last instruction.
    pub fn gp0(&self) -> Verdict {
        self.fault_code(vector::GP, 0)
    }

    /// Instruction `n` of the code, from 0, raised `vector` as a fault. In real mode no error code is pushed.
    pub fn fault_at(&self, n: usize, vector: u8, code: Option<u32>) -> Verdict {
        let frame = self.vectored(vector)?;
        let ip = self.ip + self.code.offsets.get(n).copied().unwrap_or(0);
        let code = if self.mode == Mode::Real { None } else { code };
        equal(&format!("vector {vector:#x}, error code and RIP"), (frame.error_code, frame.rip), (code, ip))
    }

    /// Something led to `vector` after the last instruction: a trap, a software interrupt or an external
    /// one. The frame's RIP is behind the code, its RF is clear.
    pub fn trap(&self, vector: u8) -> Verdict {
        self.trap_after(self.code.offsets.len(), vector)
    }

    /// As [`End::trap`], after `n` instructions.
    pub fn trap_after(&self, n: usize, vector: u8) -> Verdict {
        let frame = self.vectored(vector)?;
        let ip = self.ip + self.code.offsets.get(n).copied().unwrap_or(self.code.end());
        equal(&format!("vector {vector:#x}, RIP of the frame"), frame.rip, ip)?;
        equal(&format!("vector {vector:#x}, RF of the frame"), frame.rflags & rflags::RF, 0)
    }

    /// The last instruction raised #PF with `code` (SDM vol. 3A 4.7) and `address` in CR2.
    pub fn page_fault(&self, code: u32, address: u64) -> Verdict {
        self.fault_code(vector::PF, code)?;
        equal("CR2", self.state.cr2, address)
    }

    /// What devices saw, exactly.
    pub fn saw(&self, expected: &[Access]) -> Verdict {
        equal("device accesses", self.log.as_slice(), expected)
    }

    /// `flags` of RFLAGS are as in `expected`.
    pub fn flags(&self, flags: u64, expected: u64) -> Verdict {
        equal("RFLAGS", self.state.rflags & flags, expected)
    }
}

const GPR_NAMES: [&str; 16] =
    ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15"];
