//! String instructions (SDM vol. 1 7.3.9) with all repeat forms.
//!
//! A repeated instruction does a bounded number of iterations in one step and leaves RIP at itself if it
//! is not finished, so that interrupts are taken between. Registers are written back after each
//! iteration, so that a fault leaves them precise. MOVS and STOS upward through plain RAM go by whole
//! chunks within a page.

use super::alu::{self, mask};
use super::memory::{self, linear, load, store};
use super::{Exec, debug};
use crate::mmu::{InRam, Rights};
use crate::ram::PAGE_SIZE;
use crate::vendor;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::gpr::{RAX, RCX, RDI, RSI};
use anyvisor_x86::bits::rflags::{DF, TF, ZF};
use anyvisor_x86::segment::index;
use iced_x86::{Mnemonic as M, OpKind};

/// Iterations done one by one in a step.
const SINGLE_ITERATIONS: u64 = 512;

/// Bytes moved by chunks in a step.
const CHUNK_BYTES: u64 = 2 * PAGE_SIZE;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
}

/// A string instruction's constants.
struct StringOp {
    operation: Operation,
    /// Bytes an element.
    size: u32,
    /// Bytes of the address registers used.
    address_size: u32,
    /// Segment register number of the source.
    source: usize,
    /// What an iteration adds to SI and DI.
    step: u64,
}

impl Exec<'_> {
    /// Executes MOVS, STOS, LODS, CMPS or SCAS; `false` if the instruction is none of them.
    pub(super) fn string_instruction(&mut self) -> Result<bool, Exception> {
        let (operation, size) = match self.insn.mnemonic() {
            M::Movsb => (Operation::Movs, 1),
            M::Movsw => (Operation::Movs, 2),
            M::Movsd => (Operation::Movs, 4),
            M::Movsq => (Operation::Movs, 8),
            M::Stosb => (Operation::Stos, 1),
            M::Stosw => (Operation::Stos, 2),
            M::Stosd => (Operation::Stos, 4),
            M::Stosq => (Operation::Stos, 8),
            M::Lodsb => (Operation::Lods, 1),
            M::Lodsw => (Operation::Lods, 2),
            M::Lodsd => (Operation::Lods, 4),
            M::Lodsq => (Operation::Lods, 8),
            M::Cmpsb => (Operation::Cmps, 1),
            M::Cmpsw => (Operation::Cmps, 2),
            M::Cmpsd => (Operation::Cmps, 4),
            M::Cmpsq => (Operation::Cmps, 8),
            M::Scasb => (Operation::Scas, 1),
            M::Scasw => (Operation::Scas, 2),
            M::Scasd => (Operation::Scas, 4),
            M::Scasq => (Operation::Scas, 8),
            _ => return Ok(false),
        };
        let step = if self.flag(DF) { u64::from(size).wrapping_neg() } else { u64::from(size) };
        let op = StringOp {
            operation,
            size,
            address_size: self.string_address_size(),
            source: memory::implicit_segment(&self.core.cpu, self.insn),
            step,
        };
        if self.insn.has_rep_prefix() || self.insn.has_repne_prefix() {
            self.repeat(&op)?;
        } else if let Some(flags) = self.iteration(&op)? {
            self.set_status(flags);
        }
        Ok(true)
    }

    /// The address size, from whichever operand is in memory.
    fn string_address_size(&self) -> u32 {
        for kind in self.insn.op_kinds() {
            match kind {
                OpKind::MemorySegSI | OpKind::MemoryESDI => return 2,
                OpKind::MemorySegESI | OpKind::MemoryESEDI => return 4,
                OpKind::MemorySegRSI | OpKind::MemoryESRDI => return 8,
                _ => {}
            }
        }
        8
    }

    /// A repeated instruction: some iterations, or all that are left.
    fn repeat(&mut self, op: &StringOp) -> Result<(), Exception> {
        let mut count = self.gpr(RCX, op.address_size);
        self.truncate_registers(op);
        if count == 0 {
            return Ok(());
        }
        let compares = matches!(op.operation, Operation::Cmps | Operation::Scas);
        // Single-stepping and breakpoints trap after each iteration.
        let careful = self.flag(TF) || debug::armed(self.core);
        if !careful && !compares && op.operation != Operation::Lods {
            let moved = self.chunks(op, count)?;
            count -= moved;
            if moved != 0 {
                // What is left is for translated code, or for the next step.
                if count != 0 {
                    self.core.cpu.rip = self.start;
                }
                return Ok(());
            }
        }
        let mut left = if careful { 1 } else { SINGLE_ITERATIONS };
        let mut new_flags = None;
        while count != 0 && left != 0 {
            match self.iteration(op) {
                Ok(flags) => new_flags = flags,
                Err(fault) => {
                    if let Some(flags) = new_flags.filter(|_| vendor::is_amd()) {
                        self.set_status(flags);
                    }
                    return Err(fault);
                }
            }
            count -= 1;
            left -= 1;
            self.set_gpr(RCX, op.address_size, count);
            if let Some(flags) = new_flags
                && (flags & ZF != 0) != self.insn.has_repe_prefix()
            {
                self.set_status(flags);
                return Ok(());
            }
        }
        if count != 0 {
            self.core.cpu.rip = self.start;
        }
        if let Some(flags) = new_flags.filter(|_| count == 0 || vendor::is_amd()) {
            self.set_status(flags);
        }
        Ok(())
    }

    /// With a 32-bit address size the count register is written first of all on Intel processors, even if it
    /// is zero or the first iteration faults, which clears its upper half; MOVS and STOS do so with their
    /// address registers too. AMD's write them after the first iteration.
    fn truncate_registers(&mut self, op: &StringOp) {
        if op.address_size != 4 || vendor::is_amd() {
            return;
        }
        self.set_gpr(RCX, 4, self.gpr(RCX, 4));
        if matches!(op.operation, Operation::Movs | Operation::Stos) {
            self.set_gpr(RDI, 4, self.gpr(RDI, 4));
            if op.operation == Operation::Movs {
                self.set_gpr(RSI, 4, self.gpr(RSI, 4));
            }
        }
    }

    /// One iteration; the status flags of a comparison are returned, not set, because a fault in a later
    /// iteration leaves the flags as they were before the instruction (SDM vol. 2B, REP). On AMD's processors they are
    /// those of the last iteration that was done (APM vol. 3, "Repeat Prefixes").
    fn iteration(&mut self, op: &StringOp) -> Result<Option<u64>, Exception> {
        let size = op.size;
        let (mut si, mut di) = (self.gpr(RSI, op.address_size), self.gpr(RDI, op.address_size));
        let (mut moves_source, mut moves_destination) = (true, true);
        let mut flags = None;
        match op.operation {
            Operation::Movs => {
                let from = self.element(op.source, si, size, false)?;
                let value = load(self.core, self.io, from, size)?;
                let to = self.element(index::ES, di, size, true)?;
                store(self.core, self.io, to, size, value)?;
            }
            Operation::Stos => {
                let to = self.element(index::ES, di, size, true)?;
                let value = self.gpr(RAX, size);
                store(self.core, self.io, to, size, value)?;
                moves_source = false;
            }
            Operation::Lods => {
                let from = self.element(op.source, si, size, false)?;
                let value = load(self.core, self.io, from, size)?;
                self.set_gpr(RAX, size, value);
                moves_destination = false;
            }
            Operation::Cmps => {
                let mut read = |segment, offset| {
                    let address = self.element(segment, offset, size, false)?;
                    load(self.core, self.io, address, size)
                };
                // The destination first, as Intel's processors do, or second, as AMD's.
                let (a, b);
                if vendor::is_amd() {
                    a = read(op.source, si)?;
                    b = read(index::ES, di)?;
                } else {
                    b = read(index::ES, di)?;
                    a = read(op.source, si)?;
                }
                flags = Some(alu::sub(size, a, b, false).1);
            }
            Operation::Scas => {
                let to = self.element(index::ES, di, size, false)?;
                let b = load(self.core, self.io, to, size)?;
                flags = Some(alu::sub(size, self.gpr(RAX, size), b, false).1);
                moves_source = false;
            }
        }
        if moves_source {
            si = si.wrapping_add(op.step);
            self.set_gpr(RSI, op.address_size, si);
        }
        if moves_destination {
            di = di.wrapping_add(op.step);
            self.set_gpr(RDI, op.address_size, di);
        }
        Ok(flags)
    }

    fn element(&self, segment: usize, offset: u64, size: u32, write: bool) -> Result<u64, Exception> {
        let address = linear(self.core, segment, offset, u64::from(size), write)?;
        memory::check_alignment(self.core, address, u64::from(size))?;
        Ok(address)
    }

    /// Moves or stores whole chunks where nothing can go wrong in them; returns the iterations done. What
    /// it declines, the iterations one by one do, faults included.
    fn chunks(&mut self, op: &StringOp, count: u64) -> Result<u64, Exception> {
        let mut done = 0;
        while op.step == u64::from(op.size) && done < count && done * op.step < CHUNK_BYTES {
            let Some(elements) = self.chunk(op, count - done) else { break };
            done += elements;
            self.set_gpr(RCX, op.address_size, count - done);
        }
        Ok(done)
    }

    /// One chunk within one page on each side; `None` where that is not plain RAM.
    fn chunk(&mut self, op: &StringOp, count: u64) -> Option<u64> {
        let size = u64::from(op.size);
        let moves = op.operation == Operation::Movs;
        let (si, di) = (self.gpr(RSI, op.address_size), self.gpr(RDI, op.address_size));
        let to = linear(self.core, index::ES, di, size, true).ok()?;
        let from = if moves { linear(self.core, op.source, si, size, false).ok()? } else { to };
        let room = |address: u64| PAGE_SIZE - (address & (PAGE_SIZE - 1));
        // The offsets must not wrap within the chunk either.
        let unwrapped = |offset: u64| (mask(op.address_size) - offset).saturating_add(1);
        let mut bytes = room(to).min(room(from)).min(unwrapped(di)).min(count.saturating_mul(size));
        if moves {
            bytes = bytes.min(unwrapped(si));
        }
        bytes -= bytes % size;
        if bytes < 2 * size {
            return None;
        }
        linear(self.core, index::ES, di, bytes, true).ok()?;
        memory::check_alignment(self.core, to | from, size).ok()?;
        let InRam { host: to, gpa } = self.core.host_address(to, bytes, true, Rights::Current).ok()??;
        if moves {
            linear(self.core, op.source, si, bytes, false).ok()?;
            let from = self.core.host_address(from, bytes, false, Rights::Current).ok()??.host;
            // Moving upward onto what is still to be read repeats it: that is for single iterations.
            if (to as u64).wrapping_sub(from as u64) < bytes {
                return None;
            }
            // SAFETY: host_address checked both ranges of `bytes` bytes of guest RAM.
            unsafe { std::ptr::copy(from, to, bytes as usize) };
            self.set_gpr(RSI, op.address_size, si.wrapping_add(bytes));
        } else {
            // SAFETY: as above, for the destination.
            unsafe { fill(to, op.size, self.core.cpu.gpr[RAX], bytes) };
        }
        self.core.wrote(gpa, bytes);
        self.set_gpr(RDI, op.address_size, di.wrapping_add(bytes));
        Some(bytes / size)
    }
}

/// Fills `bytes` bytes, a multiple of `size`, with the low `size` bytes of `value`.
///
/// # Safety
/// `to` must point at that many bytes of mapped writable memory that Rust holds no reference to.
unsafe fn fill(to: *mut u8, size: u32, value: u64, bytes: u64) {
    let pattern = value.to_le_bytes();
    // SAFETY: by the contract; every write is within `bytes`.
    unsafe {
        if size == 1 {
            std::ptr::write_bytes(to, pattern[0], bytes as usize);
            return;
        }
        let mut at = 0;
        while at < bytes {
            std::ptr::copy_nonoverlapping(pattern.as_ptr(), to.add(at as usize), size as usize);
            at += u64::from(size);
        }
    }
}
