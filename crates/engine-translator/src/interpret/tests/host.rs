//! Random integer instructions: the interpreter against the host CPU, which runs the same instruction in a
//! native stub.

use super::*;
use crate::native;
use iced_x86::{EncodingKind, FlowControl, OpKind, Register, RflagsBits};

/// A small generator (xorshift64*): the tests want the same cases on each run.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A value as arithmetic likes it: small, all ones, a power of two, or anything.
    pub fn operand(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => u64::MAX - self.below(3),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            _ => self.next(),
        }
    }

    /// Bytes of an instruction with a register or simple memory operand.
    fn instruction(&mut self, rex: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.below(4) == 0 {
            bytes.push([0x66, 0xf2, 0xf3, 0xf0][self.below(4) as usize]);
        }
        if self.below(8) == 0 {
            // VEX with maps 1 to 3.
            bytes = vec![0xc4, self.next() as u8 & 0xe0 | (1 + self.below(3)) as u8, self.next() as u8 & 0xfb];
        } else {
            if rex && self.below(2) == 0 {
                bytes.push(0x40 | self.below(16) as u8);
            }
            match self.below(8) {
                0..4 => {}
                4..7 => bytes.push(0x0f),
                _ => bytes.extend([0x0f, 0x38]),
            }
        }
        bytes.push(self.next() as u8);
        let modrm = self.next() as u8;
        bytes.push(match modrm & 7 {
            4 | 5 => modrm | 0xc0,
            _ if self.below(3) == 0 => modrm & 0x3f,
            _ => modrm | 0xc0,
        });
        bytes.extend(self.next().to_le_bytes());
        bytes
    }
}

/// Whether `insn` reads or writes x87 or vector state through its memory operand.
fn uses_other_state(insn: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    let other = [F::FPU, F::FPU287, F::FPU387, F::SSE, F::FXSR, F::XSAVE, F::XSAVEOPT, F::XSAVEC, F::XSAVES, F::AVX];
    insn.cpuid_features().iter().any(|f| other.contains(f))
}

/// Whether `insn` computes on registers and one memory operand only, and the host may run it in a stub.
fn comparable(insn: &Instruction) -> bool {
    let plain = |kind| {
        matches!(kind, OpKind::Register | OpKind::Memory)
            || (OpKind::Immediate8 as u32..=OpKind::Immediate32to64 as u32).contains(&(kind as u32))
    };
    let integer = |n: u32| insn.op_kind(n) != OpKind::Register || memory::gpr_part(insn.op_register(n)).is_some();
    let bit_string = insn.op0_kind() == OpKind::Memory
        && insn.op1_kind() == OpKind::Register
        && matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    let has_memory = insn.op_kinds().any(|kind| kind == OpKind::Memory);
    insn.op_kinds().all(plain)
        && (!has_memory || memory::gpr_part(insn.memory_base()).is_some())
        && (0..insn.op_count()).all(integer)
        && !insn.is_privileged()
        && !insn.is_stack_instruction()
        && insn.flow_control() == FlowControl::Next
        && insn.segment_prefix() == Register::None
        && !general::is_system(insn)
        && !bit_string
        && !uses_other_state(insn)
        && !matches!(
            insn.mnemonic(),
            Mnemonic::Xabort
                | Mnemonic::Movdir64b
                | Mnemonic::Rdrand
                | Mnemonic::Rdseed
                | Mnemonic::Rdpid
                | Mnemonic::Cld
                | Mnemonic::Std
                | Mnemonic::Lea
                | Mnemonic::Xlatb
                | Mnemonic::Leave
                | Mnemonic::Enter
                | Mnemonic::Nop
                | Mnemonic::Prefetchit0
                | Mnemonic::Prefetchit1
                | Mnemonic::Reservednop
                | Mnemonic::Clflush
                | Mnemonic::Clflushopt
                | Mnemonic::Clwb
                | Mnemonic::Cldemote
                | Mnemonic::Ud0
                | Mnemonic::Ud1
                | Mnemonic::Wait
        )
}

/// The status flags that the manual leaves undefined after `insn`, and that differ from host to host.
fn undefined_flags(insn: &Instruction) -> u64 {
    let mut bits = insn.rflags_undefined();
    // All the way round: what sets OF there the stub does not look at.
    if matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) && insn.rflags_modified() == 0 {
        bits |= RflagsBits::OF;
    }
    [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::SF, SF),
        (RflagsBits::OF, OF),
    ]
    .iter()
    .filter(|(iced, _)| bits & iced != 0)
    .fold(0, |all, (_, flag)| all | flag)
}

/// Runs `cases` random instructions in `mode` both ways; returns how many kinds there were among them.
fn compare(mode: Mode, seed: u64, cases: u32) -> usize {
    let mut random = Random(seed);
    let (mut ours, mut host) = (machine(mode), machine(mode));
    let (mut compared, mut kinds) = (0, std::collections::BTreeSet::new());
    // Outside 64-bit mode only the low halves of eight registers exist; in real mode offsets have 16 bits.
    let (registers, width) = match mode {
        Long64 => (16, u64::MAX),
        Real => (8, 0xffff),
        _ => (8, 0xffff_ffff),
    };
    while compared < cases {
        let bytes = random.instruction(mode == Long64);
        for core in [&mut ours, &mut host] {
            put(core, CODE, &bytes);
            core.cpu.rip = CODE;
        }
        let Ok(fetched) = decode_at(&mut ours, CODE) else { continue };
        let insn = fetched.instruction;
        if mode == Real && insn.encoding() == EncodingKind::VEX {
            continue; // #UD, whatever the host thinks
        }
        if !comparable(&insn) || !native::is_supported(&ours.cpuid, &insn) || !native::runs_on_host(&mut ours, &fetched)
        {
            continue;
        }
        let mut gpr = std::array::from_fn(|n| if n < registers { random.operand() & width } else { 0 });
        if let Some((number, ..)) = memory::gpr_part(insn.memory_base()) {
            // Room for an 8-bit displacement and a 16-byte aligned operand.
            gpr[number] = DATA + 0x100 + 16 * random.below(16);
        }
        let memory: [u8; 0x400] = std::array::from_fn(|_| random.next() as u8);
        let flags = random.next() & STATUS | FIXED;
        for core in [&mut ours, &mut host] {
            put(core, DATA, &memory);
            core.cpu.gpr = gpr;
            core.cpu.rflags = flags;
        }
        let our_result = run_one(&mut ours).map(|_| ());
        let host_result = native::execute_on_host(&mut host, &NoDevices, &fetched);
        compared += 1;
        kinds.insert(format!("{:?}", insn.code()));
        let case = format!("{mode:?} {insn} ({bytes:02x?}) on {gpr:#x?}, flags {flags:#x}");
        assert_eq!(our_result, host_result, "{case}");
        if our_result.is_err() {
            continue;
        }
        assert_eq!(ours.cpu.gpr, host.cpu.gpr, "{case}");
        let difference = (ours.cpu.rflags ^ host.cpu.rflags) & !undefined_flags(&insn);
        assert_eq!(difference, 0, "{case}: flags {:#x}, host {:#x}", ours.cpu.rflags, host.cpu.rflags);
        let (mut a, mut b) = ([0; 0x400], [0; 0x400]);
        assert!(ours.ram.read(DATA, &mut a) && host.ram.read(DATA, &mut b));
        assert!(a == b, "{case}: memory differs");
    }
    kinds.len()
}

#[test]
fn the_interpreter_agrees_with_the_host() {
    for (mode, cases, kinds) in
        [(Long64, 60_000, 250), (Protected32, 20_000, 150), (Compat32, 5_000, 80), (Real, 20_000, 150)]
    {
        let found = compare(mode, 0x9e37_79b9_7f4a_7c15, cases);
        assert!(found > kinds, "{mode:?}: only {found} kinds of instructions");
    }
}
