//! Stubs: generated code that runs one guest instruction on the host.
//!
//! A stub is a function of the vCPU block and of the memory operand's place in the bounce buffer. It saves
//! the host's callee-saved registers and MXCSR, loads the registers that the instruction uses, runs it,
//! stores them back and returns. The guest's RSP never becomes the host's: where the instruction names it,
//! another register takes its place.
//!
//! Stubs are cached per vCPU by the instruction's bytes. The cache has a fixed size; when it is full it
//! is emptied and filled anew.

use super::{Unit, exception_of_trap, host_flags, signal, unit_of};
use crate::code_memory::CodeMemory;
use crate::core::Core;
use crate::cpu::{Cpu, Ymm};
use crate::interpret::memory::gpr_part;
use crate::vendor;
use anyvisor_x86::Exception;
use anyvisor_x86::bits::{gpr, rflags};
use iced_x86::{
    Encoder, EncodingKind, Instruction, InstructionInfo, InstructionInfoFactory, InstructionInfoOptions, Mnemonic as M,
    OpAccess, OpKind, Register, RflagsBits,
};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::mem::offset_of;

/// Bytes of code a vCPU keeps.
const ARENA_SIZE: usize = 512 * 1024;

/// No stub is longer: 16 general and 16 vector registers loaded and stored, and the frame.
const MAX_STUB: usize = 1024;

/// The memory operand of an instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemoryOperand {
    pub size: usize,
    /// What its address must be a multiple of.
    pub alignment: u32,
    pub read: bool,
    pub write: bool,
}

/// A generated stub.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stub {
    entry: u64,
    instruction: u64,
    resume: u64,
    uses_flags: bool,
    pub memory: Option<MemoryOperand>,
}

struct Arena {
    code: CodeMemory,
    used: usize,
    stubs: HashMap<u128, Stub, BuildHasherDefault<BytesHasher>>,
    info: InstructionInfoFactory,
    /// Kept for their buffers.
    encoder: Encoder,
    buffer: Vec<u8>,
}

/// Multiplicative hashing of an instruction's bytes: nobody attacks their own stubs.
#[derive(Default)]
struct BytesHasher(u64);

impl Hasher for BytesHasher {
    fn finish(&self) -> u64 {
        // Tables are indexed by the low bits, which the product has from the low bytes only.
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u128(u128::from(*byte)));
    }
    fn write_u128(&mut self, value: u128) {
        let folded = value as u64 ^ ((value >> 64) as u64).rotate_left(29);
        self.0 = (self.0 ^ folded).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// The stubs of one vCPU; their memory is there once it is prepared.
#[derive(Default)]
pub struct Stubs(Option<Arena>);

impl Stubs {
    /// Gets memory for stubs, as threads that may not make memory executable need done before.
    ///
    /// # Errors
    /// When the host refuses it.
    pub fn prepare(&mut self) -> anyvisor_engine::Result<()> {
        if self.0.is_none() {
            let code = CodeMemory::new(ARENA_SIZE)?;
            self.0 = Some(Arena {
                code,
                used: 0,
                stubs: HashMap::default(),
                info: InstructionInfoFactory::new(),
                encoder: Encoder::new(64),
                buffer: Vec::with_capacity(MAX_STUB),
            });
        }
        Ok(())
    }

    /// The stub for `insn`, decoded from `bytes` in `bitness`; `None` if the host cannot be given it.
    pub(super) fn find(&mut self, bytes: &[u8; 16], bitness: u8, insn: &Instruction) -> Option<Stub> {
        let counting = u128::MAX >> (128 - 8 * insn.len());
        let key = u128::from_le_bytes(*bytes) & counting | u128::from(bitness) << 120;
        self.prepare().expect("memory for generated code");
        let arena = self.0.as_mut().expect("prepared above");
        if let Some(stub) = arena.stubs.get(&key) {
            return Some(*stub);
        }
        let stub = arena.generate(insn)?;
        arena.stubs.insert(key, stub);
        Some(stub)
    }
}

/// The value of MMX register `register`.
pub(super) fn read_mmx(core: &mut Core, register: Register) -> Result<u64, Exception> {
    let insn = Instruction::with2(iced_x86::Code::Movq_rm64_mm, Register::RAX, register).expect("valid operands");
    let mut encoder = Encoder::new(64);
    let length = encoder.encode(&insn, 0).expect("MOVQ is encodable");
    let mut bytes = [0; 16];
    bytes[..length].copy_from_slice(&encoder.take_buffer());
    let mut insn = insn;
    insn.set_len(length);
    let rax = core.cpu.gpr[gpr::RAX];
    let stub = core.stubs.find(&bytes, 64, &insn).expect("MOVQ is encodable");
    let result = stub.run(core, 0);
    let value = std::mem::replace(&mut core.cpu.gpr[gpr::RAX], rax);
    result.map(|()| value)
}

impl Stub {
    /// Runs the instruction on `core`, its memory operand `at` bytes into the bounce buffer.
    ///
    /// # Errors
    /// The exception that it raised; registers and memory are unchanged then, but for MXCSR's status bits.
    pub(super) fn run(&self, core: &mut Core, at: usize) -> Result<(), Exception> {
        core.cpu.scratch[0] = host_flags(core.cpu.rflags);
        // Others are reserved and would fault.
        core.cpu.mxcsr &= vendor::mxcsr_bits();
        let bounce = core.bounce.0[at..].as_mut_ptr();
        let cpu: *mut Cpu = &raw mut *core.cpu;
        // SAFETY: `entry` is a stub in the vCPU's arena, which is not written while it runs; stubs have
        // this signature and touch the vCPU block, the bounce buffer and the registers they save.
        let trap = signal::with_recovery(self.instruction, self.resume, || unsafe {
            let entry: extern "C" fn(*mut Cpu, *mut u8) = std::mem::transmute(self.entry);
            entry(cpu, bounce);
        });
        if let Some(trap) = trap {
            return Err(exception_of_trap(core, trap));
        }
        if self.uses_flags {
            core.cpu.rflags = core.cpu.rflags & !rflags::STATUS | core.cpu.scratch[1] & rflags::STATUS;
        }
        Ok(())
    }
}

/// Registers that the instruction uses, by number.
#[derive(Default)]
struct Used {
    gpr: [bool; 16],
    /// An AH, BH, CH or DH operand, which forbids a REX prefix.
    high_byte: bool,
    vector: [bool; 16],
    mxcsr: bool,
}

impl Arena {
    fn generate(&mut self, original: &Instruction) -> Option<Stub> {
        let mut insn = *original;
        let has_memory = insn.op_kinds().any(|kind| kind == OpKind::Memory);
        if has_memory {
            insn.set_memory_base(Register::None);
            insn.set_memory_index(Register::None);
            insn.set_memory_displacement64(0);
            insn.set_segment_prefix(Register::None);
        }
        let info = self.info.info_options(&insn, InstructionInfoOptions::NO_MEMORY_USAGE);
        let mut used = used_registers(&insn, info);
        let memory = has_memory.then(|| memory_operand(original, info));
        // R8 and up last: they need a REX prefix, which a high byte register forbids.
        const CANDIDATES: [usize; 14] = [6, 3, 1, 2, 0, 5, 8, 9, 10, 11, 12, 13, 14, 15];
        let mut free = CANDIDATES.into_iter().filter(|n| !(used.gpr[*n] || used.high_byte && *n >= 8));
        let base = free.next()?;
        let stack = free.next()?;
        drop(free);
        if has_memory {
            insn.set_memory_base(Register::RAX + base as u32);
            insn.set_memory_displ_size(0);
        }
        let renames = used.gpr[gpr::RSP];
        if renames {
            rename_stack_pointer(&mut insn, stack);
            used.gpr[gpr::RSP] = false;
        }
        let flags = insn.rflags_read() | insn.rflags_modified();
        let status =
            RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;
        let plan = Plan {
            used,
            base: has_memory.then_some(base),
            stack: renames.then_some(stack),
            uses_flags: flags & status != 0,
            avx: std::is_x86_feature_detected!("avx"),
        };
        let encoded = self.encoder.encode(&insn, 0);
        let mut bytes = self.encoder.take_buffer();
        let (instruction, resume) = plan.emit(&bytes, &mut self.buffer);
        bytes.clear();
        self.encoder.set_buffer(bytes);
        encoded.ok()?;
        let code = &self.buffer;
        assert!(code.len() <= MAX_STUB);
        if self.used + MAX_STUB > self.code.length() {
            self.stubs.clear();
            self.used = 0;
        }
        let entry = self.code.address(self.used);
        self.code.write(self.used, code);
        self.used += code.len().next_multiple_of(16);
        Some(Stub {
            entry,
            instruction: entry + instruction as u64,
            resume: entry + resume as u64,
            uses_flags: plan.uses_flags,
            memory,
        })
    }
}

fn used_registers(insn: &Instruction, info: &InstructionInfo) -> Used {
    let mut used = Used::default();
    for register in info.used_registers() {
        let register = register.register();
        if let Some((number, shift, _)) = gpr_part(register) {
            used.gpr[number] = true;
            used.high_byte |= shift != 0;
        } else if register.is_vector_register() && register.number() < 16 {
            used.vector[register.number()] = true;
        }
    }
    for n in 0..insn.op_count() {
        if insn.op_kind(n) == OpKind::Register
            && let Some((_, shift, _)) = gpr_part(insn.op_register(n))
        {
            used.high_byte |= shift != 0;
        }
    }
    if touches_all_vectors(insn.mnemonic()) {
        used.vector = [true; 16];
    }
    // Conversions to general and MMX registers use it without any vector register.
    used.mxcsr = matches!(unit_of(insn), Unit::Sse | Unit::Avx | Unit::Fxsave | Unit::Xsave);
    used
}

/// The memory operand of `insn`; `info` may be that of the same instruction with another address.
fn memory_operand(insn: &Instruction, info: &InstructionInfo) -> MemoryOperand {
    let operand = (0..insn.op_count()).find(|n| insn.op_kind(*n) == OpKind::Memory).unwrap_or(0);
    let (read, write) = match info.op_access(operand) {
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write => (false, true),
        OpAccess::None | OpAccess::NoMemAccess => (false, false),
        _ => (true, true),
    };
    let size = insn.memory_size().size();
    MemoryOperand { size, alignment: required_alignment(insn, size), read, write }
}

/// Instructions on the whole vector state.
fn touches_all_vectors(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xrstor
            | M::Xrstor64
            | M::Vzeroall
            | M::Vzeroupper
    )
}

/// What the memory operand's address must be a multiple of (SDM vol. 2A 2.4, vol. 1 4.1.1).
fn required_alignment(insn: &Instruction, size: usize) -> u32 {
    match insn.mnemonic() {
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => 16,
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa => size as u32,
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => 1,
        M::Pcmpestri | M::Pcmpestrm | M::Pcmpistri | M::Pcmpistrm | M::Pcmpestri64 | M::Pcmpestrm64 => 1,
        // AMD's do not mind.
        M::Sha1msg1 | M::Sha1msg2 | M::Sha1nexte | M::Sha1rnds4 | M::Sha256msg1 | M::Sha256msg2 | M::Sha256rnds2
            if vendor::is_amd() =>
        {
            1
        }
        _ if insn.encoding() == EncodingKind::Legacy && size == 16 => 16,
        _ => 1,
    }
}

fn rename_stack_pointer(insn: &mut Instruction, to: usize) {
    for n in 0..insn.op_count() {
        if insn.op_kind(n) != OpKind::Register {
            continue;
        }
        if let Some((gpr::RSP, 0, size)) = gpr_part(insn.op_register(n)) {
            let first = match size {
                1 if to >= 8 => Register::R8L + (to as u32 - 8),
                1 if to >= 4 => Register::SPL + (to as u32 - 4),
                1 => Register::AL + to as u32,
                2 => Register::AX + to as u32,
                4 => Register::EAX + to as u32,
                _ => Register::RAX + to as u32,
            };
            insn.set_op_register(n, first);
        }
    }
}

/// All that decides a stub's code.
struct Plan {
    used: Used,
    /// The register that addresses the bounce buffer.
    base: Option<usize>,
    /// The register that stands for RSP.
    stack: Option<usize>,
    uses_flags: bool,
    avx: bool,
}

const RDI: usize = gpr::RDI;
const RSI: usize = gpr::RSI;

fn gpr_offset(n: usize) -> u32 {
    (offset_of!(Cpu, gpr) + 8 * n) as u32
}

impl Plan {
    /// Makes `c` the stub's code; returns the offsets of the guest's instruction and of what follows it.
    fn emit(&self, instruction: &[u8], c: &mut Vec<u8>) -> (usize, usize) {
        c.clear();
        // push rbx, rbp, r12..r15; sub rsp, 40; mov [rsp], rdi
        c.extend([0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
        c.extend([0x48, 0x83, 0xec, 0x28, 0x48, 0x89, 0x3c, 0x24]);
        if self.used.mxcsr {
            c.extend([0x0f, 0xae, 0x5c, 0x24, 0x08]); // stmxcsr [rsp+8]
            with_block(c, &[0x0f, 0xae], 2, offset_of!(Cpu, mxcsr) as u32); // ldmxcsr
        }
        self.vectors(c, false);
        if self.uses_flags {
            with_block(c, &[0xff], 6, offset_of!(Cpu, scratch) as u32); // push; popfq
            c.push(0x9d);
        }
        if let Some(base) = self.base {
            c.extend([0x48 | (base >> 3) as u8, 0x89, 0xc0 | (RSI << 3) as u8 | (base & 7) as u8]); // mov base, rsi
        }
        if let Some(stack) = self.stack {
            move_gpr(c, 0x8b, stack, gpr_offset(gpr::RSP));
        }
        for n in (0..16).filter(|n| self.used.gpr[*n] && *n != RDI) {
            move_gpr(c, 0x8b, n, gpr_offset(n));
        }
        if self.used.gpr[RDI] {
            move_gpr(c, 0x8b, RDI, gpr_offset(RDI));
        }
        let at = c.len();
        c.extend(instruction);
        let resume = c.len();
        // mov [rsp+16], rdi; mov rdi, [rsp]
        c.extend([0x48, 0x89, 0x7c, 0x24, 0x10, 0x48, 0x8b, 0x3c, 0x24]);
        if self.uses_flags {
            c.push(0x9c); // pushfq; pop
            with_block(c, &[0x8f], 0, offset_of!(Cpu, scratch) as u32 + 8);
        }
        for n in (0..16).filter(|n| self.used.gpr[*n] && *n != RDI) {
            move_gpr(c, 0x89, n, gpr_offset(n));
        }
        if let Some(stack) = self.stack {
            move_gpr(c, 0x89, stack, gpr_offset(gpr::RSP));
        }
        if self.used.gpr[RDI] {
            c.extend([0x48, 0x8b, 0x74, 0x24, 0x10]); // mov rsi, [rsp+16]
            move_gpr(c, 0x89, RSI, gpr_offset(RDI));
        }
        self.vectors(c, true);
        if self.used.mxcsr {
            with_block(c, &[0x0f, 0xae], 3, offset_of!(Cpu, mxcsr) as u32); // stmxcsr
            c.extend([0x0f, 0xae, 0x54, 0x24, 0x08]); // ldmxcsr [rsp+8]
            if self.avx && self.used.vector.contains(&true) {
                c.extend([0xc5, 0xf8, 0x77]); // vzeroupper
            }
        }
        // add rsp, 40; pop r15..r12, rbp, rbx; ret
        c.extend([0x48, 0x83, 0xc4, 0x28]);
        c.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        (at, resume)
    }

    /// Loads or stores the vector registers that are used: whole YMM registers where the host has them.
    fn vectors(&self, c: &mut Vec<u8>, store: bool) {
        for n in (0..16).filter(|n| self.used.vector[*n]) {
            let offset = (offset_of!(Cpu, ymm) + size_of::<Ymm>() * n) as u32;
            if self.avx {
                let vex = if n >= 8 { 0x7e } else { 0xfe };
                with_block(c, &[0xc5, vex, if store { 0x7f } else { 0x6f }], n as u8 & 7, offset); // vmovdqu
            } else {
                if n >= 8 {
                    c.push(0x44);
                }
                with_block(c, &[0x0f, if store { 0x11 } else { 0x10 }], n as u8 & 7, offset); // movups
            }
        }
    }
}

/// Emits `opcode` with ModRM for register field `register` and memory at `[rdi + offset]`.
fn with_block(c: &mut Vec<u8>, opcode: &[u8], register: u8, offset: u32) {
    c.extend(opcode);
    c.push(0x80 | register << 3 | RDI as u8);
    c.extend(offset.to_le_bytes());
}

/// MOV between 64-bit register `n` and `[rdi + offset]`: opcode 8Bh loads, 89h stores.
fn move_gpr(c: &mut Vec<u8>, opcode: u8, n: usize, offset: u32) {
    with_block(c, &[0x48 | (n >> 3 << 2) as u8, opcode], n as u8 & 7, offset);
}
