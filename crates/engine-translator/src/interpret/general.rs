//! Which code executes which instruction, and the general-purpose instructions (SDM vol. 1 chapter 7)
//! that have no file of their own.

use super::alu::{self, Shift, mask, sign_extend};
use super::memory::{self, linear, operand_address};
use super::{Exec, Handled, atomic};
use crate::cpu::PAUSES;
use crate::host;
use crate::mmu::{InRam, Rights};
use crate::native::is_supported;
use crate::system;
use crate::vendor;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::gpr::{RAX, RBX, RCX, RDX, RSP};
use anyvisor_x86::bits::rflags::{CF, DF, PF, SF, STATUS, ZF};
use anyvisor_x86::exception::vector;
use anyvisor_x86::segment::index;
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic as M, OpKind, Register};

type Outcome = Result<(), Exception>;

/// Executes `x.insn` if it is an integer or a system instruction. RIP is already behind it.
pub(super) fn execute(x: &mut Exec) -> Result<Handled, Exception> {
    let insn = x.insn;
    match insn.mnemonic() {
        M::Mov => mov(x)?,
        M::Add => arithmetic(x, |size, a, b, _| alu::add(size, a, b, false))?,
        M::Adc => arithmetic(x, |size, a, b, old| alu::add(size, a, b, old & CF != 0))?,
        M::Sub => arithmetic(x, |size, a, b, _| alu::sub(size, a, b, false))?,
        M::Sbb => arithmetic(x, |size, a, b, old| alu::sub(size, a, b, old & CF != 0))?,
        M::And => arithmetic(x, |size, a, b, _| (a & b, alu::logic(size, a & b)))?,
        M::Or => arithmetic(x, |size, a, b, _| (a | b, alu::logic(size, a | b)))?,
        M::Xor => arithmetic(x, |size, a, b, _| (a ^ b, alu::logic(size, a ^ b)))?,
        M::Cmp => compare(x, |size, a, b| alu::sub(size, a, b, false).1)?,
        M::Test => compare(x, |size, a, b| alu::logic(size, a & b))?,
        M::Inc => unary(x, alu::inc)?,
        M::Dec => unary(x, alu::dec)?,
        M::Neg => unary(x, |size, a, _| alu::sub(size, 0, a, false))?,
        M::Not => unary(x, |size, a, old| (!a & mask(size), old))?,
        M::Lea => lea(x),
        M::Movzx => move_extended(x, |_, v| v)?,
        M::Movsx | M::Movsxd => move_extended(x, |size, v| sign_extend(size, v) as u64)?,
        M::Movnti | M::Movdiri => move_plain_checked(x)?,
        M::Xchg => exchange(x)?,
        M::Xadd => exchange_add(x)?,
        M::Cmpxchg => compare_exchange(x)?,
        M::Cmpxchg8b => compare_exchange_8(x)?,
        M::Cmpxchg16b => compare_exchange_16(x)?,
        M::Rol => shift(x, Shift::Rol)?,
        M::Ror => shift(x, Shift::Ror)?,
        M::Rcl => shift(x, Shift::Rcl)?,
        M::Rcr => shift(x, Shift::Rcr)?,
        M::Shl | M::Sal => shift(x, Shift::Shl)?,
        M::Shr => shift(x, Shift::Shr)?,
        M::Sar => shift(x, Shift::Sar)?,
        M::Shld => double_shift(x, true)?,
        M::Shrd => double_shift(x, false)?,
        M::Mul => multiply(x, false)?,
        M::Imul => signed_multiply(x)?,
        M::Div => divide(x, false)?,
        M::Idiv => divide(x, true)?,
        M::Cbw | M::Cwde | M::Cdqe => extend_accumulator(x),
        M::Cwd | M::Cdq | M::Cqo => extend_to_high(x),
        M::Bswap => byte_swap(x),
        M::Movbe => move_swapped(x)?,
        M::Xlatb => translate_byte(x)?,
        M::Lahf => lahf(x),
        M::Sahf => sahf(x),
        M::Cmc => x.core.cpu.rflags ^= CF,
        M::Clc => x.set_flags(CF, 0),
        M::Stc => x.set_flags(CF, CF),
        M::Cld => x.set_flags(DF, 0),
        M::Std => x.set_flags(DF, DF),
        M::Salc => {
            let value = if x.flag(CF) { 0xff } else { 0 };
            x.set_gpr(RAX, 1, value);
        }
        M::Bound => bound(x)?,
        M::Crc32 => crc32(x)?,
        M::Rdrand | M::Rdseed => random(x)?,
        M::Rdpid => read_processor_id(x)?,
        M::Movdir64b => move_64_bytes(x)?,
        M::Pause => pause(x),
        M::Nop | M::Lfence | M::Sfence | M::Mfence | M::Endbr32 | M::Endbr64 => {}
        M::Reservednop | M::Rdsspd | M::Rdsspq | M::Cldemote => {}
        M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchnta => {}
        M::Prefetchw | M::Prefetchwt1 | M::Prefetch | M::Prefetchit0 | M::Prefetchit1 => {}
        M::Serialize => require(x)?,
        M::Clflush | M::Clflushopt | M::Clwb => flush_line(x)?,
        M::Ud0 | M::Ud1 | M::Ud2 | M::INVALID => return Err(Exception::ud()),
        _ => return execute_rest(x),
    }
    Ok(Handled::Done)
}

/// Lets others run now and then.
fn pause(x: &mut Exec) {
    let pauses = &mut x.core.cpu.pauses;
    *pauses -= 1;
    if *pauses == 0 {
        *pauses = PAUSES;
        host::give_way();
    }
}

/// Conditional instructions, control flow, string, bit and decimal instructions, then the system's.
fn execute_rest(x: &mut Exec) -> Result<Handled, Exception> {
    if is_system(x.insn) {
        system::execute(x.core, x.io, x.insn)?;
        return Ok(Handled::Done);
    }
    if x.insn.condition_code() != ConditionCode::None && x.conditional()? {
        return Ok(Handled::Done);
    }
    if x.insn.is_string_instruction() && x.string_instruction()? {
        return Ok(Handled::Done);
    }
    if x.control_transfer()? || x.bit_instruction()? || x.decimal_instruction()? {
        return Ok(Handled::Done);
    }
    Ok(Handled::No)
}

/// Sensitive instructions, far transfers, and everything that touches segment or control registers.
pub(crate) fn is_system(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        M::Cli | M::Sti | M::Pushf | M::Pushfd | M::Pushfq | M::Popf | M::Popfd | M::Popfq => true,
        M::Iret | M::Iretd | M::Iretq | M::Hlt | M::In | M::Out => true,
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => true,
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdmsr | M::Wrmsr | M::Rdpmc => true,
        M::Invlpg | M::Invpcid | M::Wbinvd | M::Wbnoinvd | M::Invd | M::Xsetbv | M::Xgetbv | M::Swapgs => true,
        M::Rdpkru | M::Wrpkru => true,
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase | M::Clac | M::Stac | M::Clts | M::Rsm => true,
        M::Int | M::Int1 | M::Int3 | M::Into | M::Syscall | M::Sysret | M::Sysretq => true,
        M::Sysenter | M::Sysexit | M::Sysexitq | M::Vmcall | M::Vmmcall => true,
        M::Lgdt | M::Lidt | M::Sgdt | M::Sidt | M::Lldt | M::Sldt | M::Ltr | M::Str | M::Lmsw | M::Smsw => true,
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Arpl => true,
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss | M::Retf => true,
        M::Jmp | M::Call => is_far(insn),
        M::Pop => insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register(),
        _ => false,
    }
}

fn is_far(insn: &Instruction) -> bool {
    insn.is_jmp_far() || insn.is_jmp_far_indirect() || insn.is_call_far() || insn.is_call_far_indirect()
}

/// #UD unless the CPU model has the instruction.
pub(super) fn require(x: &Exec) -> Outcome {
    if is_supported(&x.core.cpuid, x.insn) { Ok(()) } else { Err(Exception::ud()) }
}

fn mov(x: &mut Exec) -> Outcome {
    let (to, from) = (x.insn.op0_kind(), x.insn.op1_kind());
    if to == OpKind::Register && memory::gpr_part(x.insn.op0_register()).is_none() {
        return system::execute(x.core, x.io, x.insn);
    }
    if from == OpKind::Register && x.insn.op1_register().is_segment_register() {
        // Always 16 bits to memory; zero-extended to a wider register.
        let selector = x.core.cpu.seg[x.insn.op1_register() as usize - Register::ES as usize].selector;
        return x.write(0, if x.is_memory(0) { 2 } else { x.operand_size(0) }, u64::from(selector));
    }
    if from == OpKind::Register && memory::gpr_part(x.insn.op1_register()).is_none() {
        return system::execute(x.core, x.io, x.insn);
    }
    let size = x.operand_size(0);
    let value = x.read(1, size)?;
    x.write(0, size, value)
}

/// MOVNTI and MOVDIRI: a store that the CPU model may lack.
fn move_plain_checked(x: &mut Exec) -> Outcome {
    require(x)?;
    let size = x.operand_size(1);
    let value = x.read(1, size)?;
    x.write(0, size, value)
}

fn arithmetic(x: &mut Exec, f: impl Fn(u32, u64, u64, u64) -> (u64, u64)) -> Outcome {
    let size = x.operand_size(0);
    let b = x.read(1, size)?;
    let (old, mut flags) = (x.flags(), 0);
    x.update(0, size, |a| {
        let (r, new) = f(size, a, b, old);
        flags = new;
        r
    })?;
    x.set_status(flags);
    Ok(())
}

fn compare(x: &mut Exec, f: impl Fn(u32, u64, u64) -> u64) -> Outcome {
    let size = x.operand_size(0);
    let a = x.read(0, size)?;
    let b = x.read(1, size)?;
    x.set_status(f(size, a, b));
    Ok(())
}

fn unary(x: &mut Exec, f: impl Fn(u32, u64, u64) -> (u64, u64)) -> Outcome {
    let size = x.operand_size(0);
    let (old, mut flags) = (x.flags(), 0);
    x.update(0, size, |a| {
        let (r, new) = f(size, a, old);
        flags = new;
        r
    })?;
    x.set_status(flags);
    Ok(())
}

fn lea(x: &mut Exec) {
    let address = memory::effective_address(&x.core.cpu, x.insn);
    x.set_register(x.insn.op0_register(), address);
}

fn move_extended(x: &mut Exec, extend: impl Fn(u32, u64) -> u64) -> Outcome {
    let mut size = x.operand_size(1);
    if x.insn.code() == Code::Movsxd_r16_rm16 && vendor::is_amd() {
        // It reads 32 bits for 16.
        size = 4;
    }
    let value = x.read(1, size)?;
    x.set_register(x.insn.op0_register(), extend(size, value));
    Ok(())
}

/// XCHG, which locks memory with or without the prefix.
fn exchange(x: &mut Exec) -> Outcome {
    let size = x.operand_size(0);
    // iced puts the memory operand first.
    let register = x.insn.op1_register();
    let new = x.register(register);
    if !x.is_memory(0) {
        let old = x.read(0, size)?;
        x.write(0, size, new)?;
        x.set_register(register, old);
        return Ok(());
    }
    let address = operand_address(x.core, x.insn, u64::from(size), true)?;
    let mut old = 0;
    x.update_memory(address, size, true, |found| {
        old = found;
        new
    })?;
    x.set_register(register, old);
    Ok(())
}

fn exchange_add(x: &mut Exec) -> Outcome {
    let size = x.operand_size(0);
    let source = x.insn.op1_register();
    let b = x.register(source);
    let (mut flags, mut old, mut sum) = (0, 0, 0);
    let add = |a| {
        old = a;
        (sum, flags) = alu::add(size, a, b, false);
        sum
    };
    x.update(0, size, add)?;
    // With the same register twice the sum stays (SDM vol. 2D, XADD: the destination is written last).
    x.set_register(source, old);
    if !x.is_memory(0) {
        x.write(0, size, sum)?;
    }
    x.set_status(flags);
    Ok(())
}

fn compare_exchange(x: &mut Exec) -> Outcome {
    let size = x.operand_size(0);
    let accumulator = x.gpr(RAX, size);
    let new = x.read(1, size)?;
    if !x.is_memory(0) {
        let old = x.read(0, size)?;
        if old == accumulator {
            x.write(0, size, new)?;
        } else {
            x.set_gpr(RAX, size, old);
        }
        x.set_status(alu::sub(size, accumulator, old, false).1);
        return Ok(());
    }
    let mut old = 0;
    x.update(0, size, |found| {
        old = found;
        if found == accumulator { new } else { found }
    })?;
    if old != accumulator {
        x.set_gpr(RAX, size, old);
    }
    x.set_status(alu::sub(size, accumulator, old, false).1);
    Ok(())
}

fn compare_exchange_8(x: &mut Exec) -> Outcome {
    let expected = x.gpr(RDX, 4) << 32 | x.gpr(RAX, 4);
    let new = x.gpr(RCX, 4) << 32 | x.gpr(RBX, 4);
    let mut old = 0;
    x.update(0, 8, |found| {
        old = found;
        if found == expected { new } else { found }
    })?;
    if old == expected {
        x.set_flags(ZF, ZF);
    } else {
        x.set_flags(ZF, 0);
        x.set_gpr(RAX, 4, old);
        x.set_gpr(RDX, 4, old >> 32);
    }
    Ok(())
}

fn compare_exchange_16(x: &mut Exec) -> Outcome {
    require(x)?;
    let segment = memory::operand_segment(&x.core.cpu, x.insn);
    let offset = memory::effective_address(&x.core.cpu, x.insn);
    let address = memory::aligned_linear(x.core, segment, offset, 16, 16, true)?;
    super::debug::note_access(x.core, address, 16, true);
    let pair = |x: &Exec, high, low| u128::from(x.gpr(high, 8)) << 64 | u128::from(x.gpr(low, 8));
    let (expected, new) = (pair(x, RDX, RAX), pair(x, RCX, RBX));
    let place = match x.core.host_address(address, 16, true, Rights::Current)? {
        Some(place) => Some(place),
        None => x.ram_behind(address, 16)?,
    };
    let old = if let Some(InRam { host, gpa }) = place {
        // SAFETY: host_address, or ram_behind, checked the 16 bytes, and page-aligned mappings keep the alignment.
        let old = unsafe { atomic::compare_exchange_16(host, expected, new) };
        x.core.wrote(gpa, 16);
        old
    } else {
        let mut data = [0; 16];
        x.core.read(x.io, address, &mut data, Rights::Current)?;
        let old = u128::from_le_bytes(data);
        let value = if old == expected { new } else { old };
        x.core.write(x.io, address, &value.to_le_bytes(), Rights::Current)?;
        old
    };
    x.set_flags(ZF, if old == expected { ZF } else { 0 });
    if old != expected {
        x.set_gpr(RAX, 8, old as u64);
        x.set_gpr(RDX, 8, (old >> 64) as u64);
    }
    Ok(())
}

fn shift(x: &mut Exec, kind: Shift) -> Outcome {
    let size = x.operand_size(0);
    let count = x.read(1, 1)?;
    let (old, mut flags) = (x.flags(), 0);
    x.update(0, size, |value| {
        let (r, new) = alu::shift(kind, size, value, count, old);
        flags = new;
        r
    })?;
    x.set_status(flags);
    Ok(())
}

fn double_shift(x: &mut Exec, left: bool) -> Outcome {
    let size = x.operand_size(0);
    let fill = x.read(1, size)?;
    let count = x.read(2, 1)?;
    let (old, mut flags) = (x.flags(), 0);
    x.update(0, size, |value| {
        let (r, new) = alu::double_shift(left, size, value, fill, count, old);
        flags = new;
        r
    })?;
    x.set_status(flags);
    Ok(())
}

fn multiply(x: &mut Exec, signed: bool) -> Outcome {
    let size = x.operand_size(0);
    let b = x.read(0, size)?;
    let (low, high, flags) = alu::multiply(size, x.gpr(RAX, size), b, signed);
    if size == 1 {
        x.set_gpr(RAX, 2, high << 8 | low);
    } else {
        x.set_gpr(RAX, size, low);
        x.set_gpr(RDX, size, high);
    }
    x.set_status(flags);
    Ok(())
}

fn signed_multiply(x: &mut Exec) -> Outcome {
    let size = x.operand_size(0);
    let (a, b) = match x.insn.op_count() {
        1 => return multiply(x, true),
        2 => (x.read(0, size)?, x.read(1, size)?),
        _ => (x.read(1, size)?, x.read(2, size)?),
    };
    let (low, _, flags) = alu::multiply(size, a, b, true);
    x.write(0, size, low)?;
    x.set_status(flags);
    Ok(())
}

/// DIV and IDIV; the status flags, undefined by the manual, are left alone.
fn divide(x: &mut Exec, signed: bool) -> Outcome {
    let size = x.operand_size(0);
    let divisor = x.read(0, size)?;
    let (high, low) = if size == 1 {
        let ax = x.gpr(RAX, 2);
        (ax >> 8, ax & 0xff)
    } else {
        (x.gpr(RDX, size), x.gpr(RAX, size))
    };
    let (quotient, remainder) = alu::divide(size, high, low, divisor, signed).ok_or(Exception::de())?;
    if size == 1 {
        x.set_gpr(RAX, 2, remainder << 8 | quotient);
    } else {
        x.set_gpr(RAX, size, quotient);
        x.set_gpr(RDX, size, remainder);
    }
    Ok(())
}

/// CBW, CWDE, CDQE.
fn extend_accumulator(x: &mut Exec) {
    let size = match x.insn.mnemonic() {
        M::Cbw => 1,
        M::Cwde => 2,
        _ => 4,
    };
    let value = sign_extend(size, x.gpr(RAX, size)) as u64;
    x.set_gpr(RAX, 2 * size, value);
}

/// CWD, CDQ, CQO.
fn extend_to_high(x: &mut Exec) {
    let size = match x.insn.mnemonic() {
        M::Cwd => 2,
        M::Cdq => 4,
        _ => 8,
    };
    let sign = sign_extend(size, x.gpr(RAX, size)) >> 63;
    x.set_gpr(RDX, size, sign as u64);
}

/// BSWAP; of a 16-bit register it is undefined by the manual and clears it on Intel processors.
fn byte_swap(x: &mut Exec) {
    let register = x.insn.op0_register();
    let size = register.size() as u32;
    let value = x.register(register);
    let swapped = if size == 2 { 0 } else { value.swap_bytes() >> (64 - 8 * size) };
    x.set_register(register, swapped);
}

fn move_swapped(x: &mut Exec) -> Outcome {
    require(x)?;
    let size = x.operand_size(0);
    let value = x.read(1, size)?.swap_bytes() >> (64 - 8 * size);
    x.write(0, size, value)
}

fn translate_byte(x: &mut Exec) -> Outcome {
    let offset = memory::effective_address(&x.core.cpu, x.insn);
    let segment = memory::implicit_segment(&x.core.cpu, x.insn);
    let address = linear(x.core, segment, offset, 1, false)?;
    let value = memory::load(x.core, x.io, address, 1)?;
    x.set_gpr(RAX, 1, value);
    Ok(())
}

fn lahf(x: &mut Exec) {
    let flags = x.flags() & (STATUS & 0xff) | 2;
    x.set_register(Register::AH, flags);
}

fn sahf(x: &mut Exec) {
    let ah = x.register(Register::AH);
    x.set_flags(SF | ZF | anyvisor_x86::bits::rflags::AF | PF | CF, ah);
}

/// BOUND: #BR if the index is outside the pair of bounds in memory.
fn bound(x: &mut Exec) -> Outcome {
    let size = x.operand_size(0);
    // Intel's want both bounds in the segment, and compare the lower one before they read the upper one.
    let both = !vendor::is_amd();
    let address = operand_address(x.core, x.insn, u64::from(if both { 2 * size } else { size }), false)?;
    let low = sign_extend(size, memory::load(x.core, x.io, address, size)?);
    let index = sign_extend(size, x.read(0, size)?);
    if index < low && both {
        return Err(Exception::new(vector::BR));
    }
    operand_address(x.core, x.insn, u64::from(2 * size), false)?;
    let high = sign_extend(size, memory::load(x.core, x.io, address.wrapping_add(u64::from(size)), size)?);
    if index < low || index > high { Err(Exception::new(vector::BR)) } else { Ok(()) }
}

fn crc32(x: &mut Exec) -> Outcome {
    require(x)?;
    let size = x.operand_size(1);
    let data = x.read(1, size)?;
    let crc = x.register(x.insn.op0_register()) as u32;
    x.set_register(x.insn.op0_register(), u64::from(alu::crc32c(crc, data, size)));
    Ok(())
}

/// RDRAND and RDSEED, from the host's generator of the same kind.
fn random(x: &mut Exec) -> Outcome {
    require(x)?;
    let (value, ok): (u64, u8);
    if x.insn.mnemonic() == M::Rdrand {
        // SAFETY: the CPU models are subsets of the host, so it has RDRAND.
        unsafe { std::arch::asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack)) };
    } else {
        // SAFETY: likewise RDSEED.
        unsafe { std::arch::asm!("rdseed {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack)) };
    }
    x.set_register(x.insn.op0_register(), if ok != 0 { value } else { 0 });
    x.set_status(u64::from(ok) * CF);
    Ok(())
}

fn read_processor_id(x: &mut Exec) -> Outcome {
    require(x)?;
    let value = u64::from(x.core.cpu.tsc_aux as u32);
    x.set_register(x.insn.op0_register(), value);
    Ok(())
}

/// MOVDIR64B: 64 bytes from the memory operand to ES:register, which must be a multiple of 64.
fn move_64_bytes(x: &mut Exec) -> Outcome {
    require(x)?;
    let register = x.insn.op0_register();
    let to = linear(x.core, index::ES, x.register(register), 64, true)?;
    if to & 63 != 0 {
        return Err(Exception::gp(0));
    }
    let from = operand_address(x.core, x.insn, 64, false)?;
    let mut data = [0; 64];
    x.core.read(x.io, from, &mut data, Rights::Current)?;
    x.core.write(x.io, to, &data, Rights::Current)
}

/// CLFLUSH and its kin: coherent caches need nothing, but the address is checked as for a load.
fn flush_line(x: &mut Exec) -> Outcome {
    require(x)?;
    x.read_memory(1)?;
    Ok(())
}

impl Exec<'_> {
    /// Jcc, SETcc and CMOVcc; `false` if the instruction is none of them.
    fn conditional(&mut self) -> Result<bool, Exception> {
        let number = condition_number(self.insn.condition_code());
        let holds = alu::condition(number, self.flags());
        if self.insn.is_jcc_short_or_near() {
            if holds {
                self.jump(self.insn.near_branch_target())?;
            }
        } else if self.insn.op_count() == 1 && matches!(self.insn.op0_kind(), OpKind::Register | OpKind::Memory) {
            self.write(0, 1, u64::from(holds))?;
        } else if self.insn.op_count() == 2 && memory::gpr_part(self.insn.op0_register()).is_some() {
            let register = self.insn.op0_register();
            let size = register.size() as u32;
            let source = self.read(1, size)?;
            let value = if holds { source } else { self.register(register) };
            self.set_register(register, value);
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// PUSH of anything but flags.
    pub(super) fn push_operand(&mut self) -> Outcome {
        let size = self.insn.stack_pointer_increment().unsigned_abs();
        if self.insn.op0_kind() == OpKind::Register && self.insn.op0_register().is_segment_register() {
            return self.push_selector(size);
        }
        let value = self.read(0, size)?;
        memory::push(self.core, self.io, size, value)
    }

    /// In 64-bit mode a selector is zero-extended.
    fn push_selector(&mut self, size: u32) -> Outcome {
        let segment = self.insn.op0_register() as usize - Register::ES as usize;
        let selector = u64::from(self.core.cpu.seg[segment].selector);
        let rsp = memory::moved_stack_pointer(&self.core.cpu, -i64::from(size));
        let written = if size == 4 { vendor::pushed_selector_size() } else { size };
        let address = memory::stack_address(self.core, rsp, size, true)?;
        memory::store(self.core, self.io, address, written, selector)?;
        self.core.cpu.gpr[RSP] = rsp;
        Ok(())
    }

    /// POP into a general register or memory, whose address is computed with the popped RSP.
    pub(super) fn pop_operand(&mut self) -> Outcome {
        let size = self.insn.stack_pointer_increment().unsigned_abs();
        let old = self.core.cpu.gpr[RSP];
        let value = memory::pop(self.core, self.io, size)?;
        self.write(0, size, value).inspect_err(|_| self.core.cpu.gpr[RSP] = old)
    }
}

fn condition_number(condition: ConditionCode) -> u32 {
    match condition {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        _ => 15,
    }
}

/// Whether the instruction's near branch or return has a 16-, 32- or 64-bit operand size, in bytes.
pub(super) fn branch_size(insn: &Instruction) -> u32 {
    match insn.code() {
        Code::Retnw | Code::Retnw_imm16 | Code::Call_rel16 | Code::Call_rm16 | Code::Jmp_rm16 => 2,
        Code::Retnd | Code::Retnd_imm16 | Code::Call_rel32_32 | Code::Call_rm32 | Code::Jmp_rm32 => 4,
        _ => 8,
    }
}
