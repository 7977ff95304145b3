//! x87, MMX, SSE and AVX instructions, executed by the host CPU.
//!
//! The guest's instruction set is the host's, so these need no semantics of ours: [`execute`] runs *the
//! same instruction* in a small stub of generated code, with its registers loaded from the vCPU block and
//! its memory operand redirected to the bounce buffer, which is filled before and written back after. The
//! x87 and MMX state is the guest's already while a vCPU runs (see [`cpu`](crate::cpu)).
//!
//! Invariants:
//! - What can fault happens before what commits: writability of a memory destination is checked before the
//!   instruction runs, and an instruction that faults on the host leaves through its stub's exit with the
//!   registers unchanged ([`signal`]).
//! - The bounce buffer has the guest address's offset in its 64-byte line, so that alignment faults are
//!   the guest's.
//! - An instruction runs only if the CPU model has it ([`is_supported`]) and the guest's control registers
//!   enable it.
//! - The host's addresses do not reach the guest: x87 instruction and data pointers are stored as zero.

mod features;
mod masked;
mod signal;
mod stub;

pub use features::{has_feature, is_supported};
pub use signal::{install_signal_handlers, on_signal};

use crate::core::{BOUNCE_SIZE, Core};
use crate::cpu::Mode;
use crate::interpret::Fetched;
use crate::interpret::debug::note_access;
use crate::interpret::memory::{aligned_linear, check_alignment, effective_address, is_64bit, operand_segment};
use crate::mmu::Rights;
use crate::vendor;
use anyvisor_engine::GuestIo;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::{cr0, cr4, gpr, rflags, xcr0};
use anyvisor_x86::exception::vector;
use anyvisor_x86::state::{PKRU_OFFSET, PKRU_SIZE};
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};
pub use stub::Stubs;
use stub::{MemoryOperand, Stub};

/// Which enabling bits an instruction depends on (SDM vol. 3A 2.5, vol. 1 13.5, vol. 2A 2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    X87,
    Wait,
    Mmx,
    Sse,
    Avx,
    Fxsave,
    Xsave,
}

/// Bytes of the XSAVE area without and with the AVX component, standard format.
const XSAVE_LEGACY: usize = 576;
const XSAVE_AVX: usize = 832;
/// With PKRU too.
const XSAVE_ALL: usize = PKRU_OFFSET + PKRU_SIZE;
const XSTATE_BV: std::ops::Range<usize> = 512..520;

/// Executes a vector or floating-point instruction. RIP is already behind it.
///
/// # Errors
/// The exception that it raises.
pub fn execute(core: &mut Core, io: &dyn GuestIo, fetched: &Fetched) -> Result<(), Exception> {
    let insn = &fetched.instruction;
    if !is_supported(&core.cpuid, insn) {
        return Err(Exception::ud());
    }
    let unit = unit_of(insn);
    check_enabled(core, unit)?;
    let waits = match unit {
        Unit::X87 => !is_non_waiting(insn),
        Unit::Mmx => true,
        // The conversions to MMX; not those from MMX, when their operand is in memory.
        _ => matches!(
            insn.mnemonic(),
            Mnemonic::Cvtps2pi | Mnemonic::Cvttps2pi | Mnemonic::Cvtpd2pi | Mnemonic::Cvttpd2pi
        ),
    };
    if waits && x87_exception_pending() {
        // Before anything that the memory operand may raise.
        return Err(Exception::new(vector::MF));
    }
    if masked::execute(core, io, insn)? {
        return Ok(());
    }
    let Some(stub) = core.stubs.find(&fetched.bytes, fetched.bitness, insn) else {
        tracing::error!(instruction = %insn, bytes = ?fetched.bytes, "cannot be re-encoded for the host; raising #UD");
        return Err(Exception::ud());
    };
    // Outside 64-bit mode the upper eight registers do not exist and no instruction touches them.
    let hidden: Option<[_; 8]> = (!is_64bit(&core.cpu)).then(|| core.cpu.ymm[8..].try_into().unwrap());
    let result = match insn.mnemonic() {
        Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => xsave(core, io, insn, &stub),
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => xrstor(core, io, insn, &stub),
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => fxsave(core, io, insn, &stub),
        _ => match stub.memory {
            Some(memory) => run_on_memory(core, io, insn, &stub, memory),
            None => stub.run(core, 0),
        },
    };
    if let Some(hidden) = hidden {
        core.cpu.ymm[8..].copy_from_slice(&hidden);
    }
    result
}

/// The x87 instructions that execute without regard to a pending exception (SDM vol. 1 8.3.11).
fn is_non_waiting(insn: &Instruction) -> bool {
    matches!(
        insn.mnemonic(),
        Mnemonic::Fnstcw
            | Mnemonic::Fnstsw
            | Mnemonic::Fnstenv
            | Mnemonic::Fnsave
            | Mnemonic::Fninit
            | Mnemonic::Fnclex
            | Mnemonic::Fneni
            | Mnemonic::Fndisi
            | Mnemonic::Fnsetpm
    )
}

/// The guest's x87 status word has its error summary set: the next waiting instruction raises #MF.
fn x87_exception_pending() -> bool {
    let status: u16;
    // SAFETY: FNSTSW reads the status word, which belongs to the guest, and changes nothing.
    unsafe { std::arch::asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status & 0x80 != 0
}

/// Whether [`execute_on_host`] can run it: 64-bit code has an encoding for it.
#[cfg(test)]
pub(crate) fn runs_on_host(core: &mut Core, fetched: &Fetched) -> bool {
    core.stubs.find(&fetched.bytes, fetched.bitness, &fetched.instruction).is_some()
}

/// Runs any instruction with at most one memory operand on the host CPU, whatever the CPU model says: the
/// oracle of the interpreter's tests.
///
/// # Errors
/// The exception that it raises.
#[cfg(test)]
pub(crate) fn execute_on_host(core: &mut Core, io: &dyn GuestIo, fetched: &Fetched) -> Result<(), Exception> {
    let insn = &fetched.instruction;
    let stub = core
        .stubs
        .find(&fetched.bytes, fetched.bitness, insn)
        .unwrap_or_else(|| panic!("cannot be re-encoded: {insn:?}"));
    match stub.memory {
        Some(memory) => run_on_memory(core, io, insn, &stub, memory),
        None => stub.run(core, 0),
    }
}

fn unit_of(insn: &Instruction) -> Unit {
    match insn.mnemonic() {
        Mnemonic::Wait => return Unit::Wait,
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => return Unit::Fxsave,
        Mnemonic::Emms => return Unit::Mmx,
        Mnemonic::Cvtps2pi | Mnemonic::Cvttps2pi | Mnemonic::Cvtpd2pi | Mnemonic::Cvttpd2pi => return Unit::Sse,
        _ => {}
    }
    let features = insn.cpuid_features();
    if features.contains(&CpuidFeature::XSAVE) || features.contains(&CpuidFeature::XSAVEOPT) {
        return Unit::Xsave;
    }
    if insn.encoding() == EncodingKind::VEX {
        return Unit::Avx;
    }
    if features.iter().any(|f| features::is_x87(*f)) {
        return Unit::X87;
    }
    let has = |test: fn(iced_x86::Register) -> bool| {
        (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && test(insn.op_register(n)))
    };
    if has(|r| r.is_mm()) && !has(|r| r.is_xmm()) { Unit::Mmx } else { Unit::Sse }
}

fn check_enabled(core: &Core, unit: Unit) -> Result<(), Exception> {
    let cpu = &core.cpu;
    let (em, ts) = (cpu.cr0 & cr0::EM != 0, cpu.cr0 & cr0::TS != 0);
    let needs = |good: bool| if good { Ok(()) } else { Err(Exception::ud()) };
    let not_available = match unit {
        Unit::X87 | Unit::Fxsave => em || ts,
        Unit::Wait => cpu.cr0 & cr0::MP != 0 && ts,
        Unit::Mmx => {
            needs(!em)?;
            ts
        }
        Unit::Sse => {
            needs(!em && cpu.cr4 & cr4::OSFXSR != 0)?;
            ts
        }
        Unit::Avx => {
            let avx = xcr0::SSE | xcr0::AVX;
            needs(cpu.mode() != Mode::Real && cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & avx == avx)?;
            ts
        }
        Unit::Xsave => {
            needs(cpu.cr4 & cr4::OSXSAVE != 0)?;
            ts
        }
    };
    if not_available { Err(Exception::nm()) } else { Ok(()) }
}

/// Linear address of the memory operand, with the instruction's own alignment rule.
fn address_of(core: &Core, insn: &Instruction, memory: MemoryOperand, write: bool) -> Result<u64, Exception> {
    let size = memory.size as u64;
    let offset = effective_address(&core.cpu, insn);
    // AMD's bit for misaligned operands, of what is no move.
    let any = core.cpu.mxcsr & vendor::MXCSR_MM != 0 && memory.alignment == 16 && !wants_alignment(insn);
    let alignment = if any { 1 } else { memory.alignment };
    let address = aligned_linear(core, operand_segment(&core.cpu, insn), offset, size, alignment, write)?;
    check_alignment(core, address, size)?;
    note_access(core, address, size, write);
    Ok(address)
}

/// Whether it wants its operand aligned in any case (APM vol. 1 4.2.2).
fn wants_alignment(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let moves = matches!(insn.mnemonic(), Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq | Movntdqa);
    moves || matches!(insn.mnemonic(), Fxsave | Fxsave64 | Fxrstor | Fxrstor64)
}

/// Runs `stub` with its memory operand in the bounce buffer.
fn run_on_memory(
    core: &mut Core,
    io: &dyn GuestIo,
    insn: &Instruction,
    stub: &Stub,
    memory: MemoryOperand,
) -> Result<(), Exception> {
    let unit = unit_of(insn);
    let target = address_of(core, insn, memory, memory.write).and_then(|address| {
        // SSE and AVX stores change nothing but memory and MXCSR, so theirs may fault last, as on processors.
        // (VCVTPS2PH, which computes, sets no flags on AMD's before it faults.)
        let first = insn.mnemonic() == Mnemonic::Vcvtps2ph && vendor::is_amd();
        if memory.write && (memory.read || first || !matches!(unit, Unit::Sse | Unit::Avx)) {
            core.probe_write(address, memory.size, Rights::Current)?;
        }
        Ok(address)
    });
    let address = match target {
        Ok(address) => address,
        Err(fault) if vendor::is_amd() => return Err(fault),
        Err(fault) if unit == Unit::X87 && memory.write && !memory.read => {
            return x87_store_that_faults(core, io, insn, stub, memory, fault);
        }
        Err(fault) => {
            if insn.mnemonic() == Mnemonic::Vcvtps2ph {
                // The only store that computes: its exceptions come before the memory operand's.
                stub.run(core, 0)?;
            }
            return Err(fault);
        }
    };
    let mut copy = [0; BOUNCE_SIZE];
    let copy = &mut copy[..memory.size];
    // A store does not read: devices would notice.
    let x87_store = unit == Unit::X87 && memory.write && !memory.read && !is_non_waiting(insn);
    if memory.read {
        core.read(io, address, copy, Rights::Current)?;
    } else if x87_store {
        copy.fill(UNTOUCHED);
    }
    let at = (address & 63) as usize;
    core.bounce.0[at..at + memory.size].copy_from_slice(copy);
    stub.run(core, at)?;
    if memory.write && !(x87_store && x87_stored_nothing(&core.bounce.0[at..at + memory.size])) {
        copy.copy_from_slice(&core.bounce.0[at..at + memory.size]);
        hide_pointers(insn, copy);
        core.write(io, address, copy, Rights::Current)?;
    }
    Ok(())
}

/// What the bounce buffer holds before an x87 store.
const UNTOUCHED: u8 = 0xa5;

/// Whether an x87 store to `target` has left memory alone: an unmasked exception of its own (invalid operand,
/// overflow, underflow; SDM vol. 1 8.5) does that, and is pending then.
fn x87_stored_nothing(target: &[u8]) -> bool {
    x87_exception_pending() && target.iter().all(|byte| *byte == UNTOUCHED)
}

/// An x87 store whose memory operand raises `fault`, on Intel's processors: AMD's raise it first of all. An
/// unmasked exception of its own (invalid operand, overflow, ...) keeps it from storing: then that exception is
/// pending, and the instruction is complete. Otherwise it faults, and the x87 state stays as it was.
fn x87_store_that_faults(
    core: &mut Core,
    io: &dyn GuestIo,
    insn: &Instruction,
    stub: &Stub,
    memory: MemoryOperand,
    fault: Exception,
) -> Result<(), Exception> {
    let mut state = [0u8; 108];
    // SAFETY: FNSAVE writes 108 bytes and initializes the unit; FRSTOR brings the guest's state back.
    unsafe { std::arch::asm!("fnsave [{s}]", "frstor [{s}]", s = in(reg) state.as_mut_ptr(), options(nostack)) };
    core.bounce.0[..memory.size].fill(UNTOUCHED);
    stub.run(core, 0)?;
    if !is_non_waiting(insn) && x87_stored_nothing(&core.bounce.0[..memory.size]) {
        return Ok(());
    }
    // SAFETY: FNINIT clears what is pending, so that FRSTOR of the state saved above cannot fault.
    unsafe { std::arch::asm!("fninit", "frstor [{s}]", s = in(reg) state.as_ptr(), options(nostack)) };
    if memory.size == 10 {
        // Processors store ten bytes as eight and two; the first part may have been done.
        let first = MemoryOperand { size: 8, ..memory };
        let low: [u8; 8] = core.bounce.0[..8].try_into().expect("8 bytes");
        let _ = address_of(core, insn, first, true).and_then(|to| core.write(io, to, &low, Rights::Current));
    }
    Err(fault)
}

/// Clears the x87 instruction and data pointers, which are the host's, in a stored environment (SDM vol. 1
/// figures 8-9 to 8-12).
fn hide_pointers(insn: &Instruction, image: &mut [u8]) {
    match insn.mnemonic() {
        Mnemonic::Fnstenv | Mnemonic::Fnsave => {
            if matches!(image.len(), 14 | 94) {
                image[6..14].fill(0);
            } else {
                image[12..18].fill(0);
                image[20..28].fill(0);
            }
        }
        _ => {}
    }
}

/// Reads the whole area that a save instruction writes parts of, after checking that it is writable.
fn open_area(
    core: &mut Core,
    io: &dyn GuestIo,
    insn: &Instruction,
    memory: MemoryOperand,
    copy: &mut [u8],
) -> Result<u64, Exception> {
    let address = address_of(core, insn, memory, true)?;
    core.probe_write(address, memory.size, Rights::Current)?;
    core.read(io, address, copy, Rights::Current)?;
    Ok(address)
}

/// Runs a save instruction over `copy`; outside 64-bit mode XMM8–15 have no place in the image.
fn save_into(core: &mut Core, stub: &Stub, copy: &mut [u8]) -> Result<(), Exception> {
    const UPPER_XMM: std::ops::Range<usize> = 288..416;
    let upper: [u8; 128] = copy[UPPER_XMM].try_into().expect("128 bytes");
    core.bounce.0[..copy.len()].copy_from_slice(copy);
    stub.run(core, 0)?;
    copy.copy_from_slice(&core.bounce.0[..copy.len()]);
    if !is_64bit(&core.cpu) {
        copy[UPPER_XMM].copy_from_slice(&upper);
    }
    Ok(())
}

/// The place of FIP and FDP in an FXSAVE image (SDM vol. 1 table 10-2).
const FXSAVE_POINTERS: std::ops::Range<usize> = 8..24;

fn fxsave(core: &mut Core, io: &dyn GuestIo, insn: &Instruction, stub: &Stub) -> Result<(), Exception> {
    let memory = MemoryOperand { size: 512, alignment: 16, read: true, write: true };
    let mut copy = [0; 512];
    let address = open_area(core, io, insn, memory, &mut copy)?;
    save_into(core, stub, &mut copy)?;
    copy[FXSAVE_POINTERS].fill(0);
    core.write(io, address, &copy, Rights::Current)
}

/// EDX:EAX as the requested-feature bitmap, and what of it the guest has enabled.
fn requested_components(core: &Core) -> u64 {
    let requested = core.cpu.gpr[gpr::RDX] << 32 | core.cpu.gpr[gpr::RAX] & 0xffff_ffff;
    requested & core.cpu.xcr0
}

/// Runs with EDX:EAX narrowed to `components`: the host has enabled more than the guest.
fn with_components<R>(core: &mut Core, components: u64, f: impl FnOnce(&mut Core) -> R) -> R {
    let (rax, rdx) = (core.cpu.gpr[gpr::RAX], core.cpu.gpr[gpr::RDX]);
    core.cpu.gpr[gpr::RAX] = components & 0xffff_ffff;
    core.cpu.gpr[gpr::RDX] = components >> 32;
    let result = f(core);
    core.cpu.gpr[gpr::RAX] = rax;
    core.cpu.gpr[gpr::RDX] = rdx;
    result
}

fn area_size(components: u64) -> usize {
    match components {
        components if components & xcr0::PKRU != 0 => XSAVE_ALL,
        components if components & xcr0::AVX != 0 => XSAVE_AVX,
        _ => XSAVE_LEGACY,
    }
}

/// XSTATE_BV of an XSAVE area.
fn present(area: &[u8]) -> u64 {
    u64::from_le_bytes(area[XSTATE_BV].try_into().expect("8 bytes"))
}

/// XSAVE, and XSAVEOPT without its optimization: the host would track the bounce buffer. The host knows nothing of the
/// guest's PKRU, so that component is made here.
fn xsave(core: &mut Core, io: &dyn GuestIo, insn: &Instruction, stub: &Stub) -> Result<(), Exception> {
    let components = requested_components(core);
    let size = area_size(components);
    let memory = MemoryOperand { size, alignment: 64, read: true, write: true };
    let mut copy = [0; XSAVE_ALL];
    let copy = &mut copy[..size];
    let address = open_area(core, io, insn, memory, copy)?;
    let hosts = size.min(XSAVE_AVX);
    with_components(core, components & !xcr0::PKRU, |core| save_into(core, stub, &mut copy[..hosts]))?;
    if components & xcr0::PKRU != 0 {
        let in_use = core.cpu.pkru != 0;
        let header = present(copy) & !xcr0::PKRU | if in_use { xcr0::PKRU } else { 0 };
        copy[XSTATE_BV].copy_from_slice(&header.to_le_bytes());
        copy[PKRU_OFFSET..].copy_from_slice(&u64::from(core.cpu.pkru).to_le_bytes());
    }
    if components & xcr0::X87 != 0 {
        copy[FXSAVE_POINTERS].fill(0);
    }
    core.write(io, address, copy, Rights::Current)
}

/// XRSTOR of a standard-format area (SDM vol. 1 13.8.1).
fn xrstor(core: &mut Core, io: &dyn GuestIo, insn: &Instruction, stub: &Stub) -> Result<(), Exception> {
    let components = requested_components(core);
    let size = area_size(components);
    let memory = MemoryOperand { size, alignment: 64, read: true, write: false };
    let address = address_of(core, insn, memory, false)?;
    let mut copy = [0; XSAVE_ALL];
    let copy = &mut copy[..size];
    core.read(io, address, copy, Rights::Current)?;
    let word = |at: usize| u64::from_le_bytes(copy[at..at + 8].try_into().expect("8 bytes"));
    // XSTATE_BV within XCR0; XCOMP_BV and the next 8 bytes zero.
    if word(512) & !core.cpu.xcr0 != 0 || word(520) != 0 || word(528) != 0 {
        return Err(Exception::gp(0));
    }
    let header = present(copy);
    copy[XSTATE_BV].copy_from_slice(&(header & !xcr0::PKRU).to_le_bytes());
    core.bounce.0[..size].copy_from_slice(copy);
    with_components(core, components & !xcr0::PKRU, |core| stub.run(core, 0))?;
    if components & xcr0::PKRU != 0 {
        let saved = u32::from_le_bytes(copy[PKRU_OFFSET..PKRU_OFFSET + 4].try_into().expect("4 bytes"));
        core.set_protection_keys(if header & xcr0::PKRU != 0 { saved } else { 0 }, core.cpu.pkrs);
    }
    Ok(())
}

/// The exception behind a host trap number that a stub left with.
fn exception_of_trap(core: &Core, trap: u8) -> Exception {
    match trap {
        vector::UD => Exception::ud(),
        vector::MF => Exception::new(vector::MF),
        vector::XM if core.cpu.cr4 & cr4::OSXMMEXCPT != 0 => Exception::new(vector::XM),
        vector::XM => Exception::ud(),
        vector::DE => Exception::de(),
        vector::NM => Exception::nm(),
        _ => Exception::gp(0),
    }
}

/// The status flags that a stub loads: nothing else of RFLAGS may reach the host.
fn host_flags(rflags: u64) -> u64 {
    rflags & rflags::STATUS | rflags::FIXED
}
