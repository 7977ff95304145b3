//! Operands of the instruction being executed: reading, writing, and read-modify-write.

use super::alu::mask;
use super::memory::{self, load, operand_address, store};
use super::{Exec, atomic, debug};
use crate::core::Core;
use crate::mmu::{InRam, Rights};
use crate::ram::{PAGE_SIZE, copy_from_guest, copy_to_guest};
use anyvisor_x86::Exception;
use anyvisor_x86::bits::rflags;
use anyvisor_x86::paging::AccessKind;
use iced_x86::{OpKind, Register};

impl Exec<'_> {
    /// Size in bytes of register or memory operand `n`.
    pub fn operand_size(&self, n: u32) -> u32 {
        match self.insn.op_kind(n) {
            OpKind::Register => self.insn.op_register(n).size() as u32,
            _ => self.insn.memory_size().size() as u32,
        }
    }

    pub fn is_memory(&self, n: u32) -> bool {
        self.insn.op_kind(n) == OpKind::Memory
    }

    pub fn register(&self, register: Register) -> u64 {
        memory::read_register(&self.core.cpu, register)
    }

    pub fn set_register(&mut self, register: Register, value: u64) {
        memory::write_register(&mut self.core.cpu, register, value);
    }

    /// The low `size` bytes of general register number `n` in encodings.
    pub fn gpr(&self, n: usize, size: u32) -> u64 {
        self.core.cpu.gpr[n] & mask(size)
    }

    pub fn set_gpr(&mut self, n: usize, size: u32, value: u64) {
        memory::write_gpr(&mut self.core.cpu, n, 0, size, value);
    }

    /// Reads operand `n`, immediates sign-extended as the instruction says, as `size` bytes.
    pub fn read(&mut self, n: u32, size: u32) -> Result<u64, Exception> {
        match self.insn.op_kind(n) {
            OpKind::Register => Ok(self.register(self.insn.op_register(n)) & mask(size)),
            OpKind::Memory => self.read_memory(size),
            _ => Ok(self.insn.immediate(n) & mask(size)),
        }
    }

    /// Reads the memory operand.
    pub fn read_memory(&mut self, size: u32) -> Result<u64, Exception> {
        let address = operand_address(self.core, self.insn, u64::from(size), false)?;
        load(self.core, self.io, address, size)
    }

    /// Writes operand `n`.
    pub fn write(&mut self, n: u32, size: u32, value: u64) -> Result<(), Exception> {
        match self.insn.op_kind(n) {
            OpKind::Register => {
                self.set_register(self.insn.op_register(n), value);
                Ok(())
            }
            _ => {
                let address = operand_address(self.core, self.insn, u64::from(size), true)?;
                store(self.core, self.io, address, size, value)
            }
        }
    }

    /// Replaces operand `n` by what `f` makes of it; atomically in memory if the instruction is locked.
    /// `f` may be called more than once; the last call counts.
    pub fn update(&mut self, n: u32, size: u32, f: impl FnMut(u64) -> u64) -> Result<(), Exception> {
        if self.insn.op_kind(n) == OpKind::Register {
            let register = self.insn.op_register(n);
            let mut f = f;
            let value = f(self.register(register));
            self.set_register(register, value);
            return Ok(());
        }
        let address = operand_address(self.core, self.insn, u64::from(size), true)?;
        self.update_memory(address, size, self.insn.has_lock_prefix(), f)
    }

    /// [`Exec::update`] at a linear address.
    pub fn update_memory(
        &mut self,
        address: u64,
        size: u32,
        locked: bool,
        mut f: impl FnMut(u64) -> u64,
    ) -> Result<(), Exception> {
        debug::note_access(self.core, address, u64::from(size), true);
        let mut place = self.core.host_address(address, u64::from(size), true, Rights::Current)?;
        if locked && place.is_none() {
            place = self.ram_behind(address, u64::from(size))?;
        }
        if let Some(InRam { host, gpa }) = place {
            // SAFETY: host_address, or ram_behind, checked that `size` writable bytes of RAM are there.
            unsafe { update_host(host, size, locked, f) };
            self.core.wrote(gpa, u64::from(size));
            return Ok(());
        }
        self.core.probe_write(address, size as usize, Rights::Current)?;
        let (io, size) = (self.io, size as usize);
        let mut replace = |core: &mut Core| {
            let mut data = [0; 8];
            core.read(io, address, &mut data[..size], Rights::Current)?;
            let new = f(u64::from_le_bytes(data));
            core.write(io, address, &new.to_le_bytes()[..size], Rights::Current)
        };
        if locked { self.core.with_bus(replace) } else { replace(self.core) }
    }

    /// Where a write target is, within one page of RAM, that `host_address` withholds because translated code is there.
    pub fn ram_behind(&mut self, address: u64, size: u64) -> Result<Option<InRam>, Exception> {
        if (address & (PAGE_SIZE - 1)) + size > PAGE_SIZE {
            return Ok(None);
        }
        let gpa = self.core.translate(address, AccessKind::Write, Rights::Current)?.gpa;
        if self.core.lapic.mmio_base() == Some(gpa & !(PAGE_SIZE - 1)) {
            return Ok(None);
        }
        Ok(self.core.ram.host(gpa, size).map(|host| InRam { host, gpa }))
    }

    pub fn flags(&self) -> u64 {
        self.core.cpu.rflags
    }

    pub fn flag(&self, flag: u64) -> bool {
        self.core.cpu.rflags & flag != 0
    }

    /// Replaces the status flags in `which` by those in `flags`.
    pub fn set_flags(&mut self, which: u64, flags: u64) {
        self.core.cpu.rflags = self.core.cpu.rflags & !which | flags & which;
    }

    /// Replaces all six status flags.
    pub fn set_status(&mut self, flags: u64) {
        self.set_flags(rflags::STATUS, flags);
    }
}

/// # Safety
/// `host` must point at `size` bytes of mapped writable memory that Rust holds no reference to.
unsafe fn update_host(host: *mut u8, size: u32, locked: bool, mut f: impl FnMut(u64) -> u64) {
    let mut data = [0; 8];
    // SAFETY: by the contract.
    unsafe { copy_from_guest(host, &mut data[..size as usize]) };
    let mut old = u64::from_le_bytes(data);
    loop {
        let new = f(old);
        if !locked {
            // SAFETY: by the contract.
            unsafe { copy_to_guest(host, &new.to_le_bytes()[..size as usize]) };
            return;
        }
        // SAFETY: by the contract.
        let found = unsafe { atomic::compare_exchange(host, size, old, new & mask(size)) };
        if found == old {
            return;
        }
        old = found;
    }
}
