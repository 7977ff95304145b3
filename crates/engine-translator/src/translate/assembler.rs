//! The few host instructions that translated code is glued together with.

/// Host register numbers (SDM vol. 2A table 2-2).
pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const RDX: u8 = 2;
pub const RBX: u8 = 3;
pub const RSP: u8 = 4;
pub const RBP: u8 = 5;
pub const RSI: u8 = 6;
pub const RDI: u8 = 7;
pub const R9: u8 = 9;
pub const R10: u8 = 10;
pub const R11: u8 = 11;
pub const R12: u8 = 12;
pub const R13: u8 = 13;
pub const R14: u8 = 14;
pub const R15: u8 = 15;

/// A register or memory operand of a host instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rm {
    Reg(u8),
    /// `[base + displacement]`
    Base(u8, i32),
    /// `[base + index × 2^scale + displacement]`
    Indexed {
        base: u8,
        index: u8,
        scale: u8,
        displacement: i32,
    },
    /// `[index × 2^scale + displacement]`
    Scaled {
        index: u8,
        scale: u8,
        displacement: i32,
    },
    /// `gs:[displacement]`
    Gs(i32),
    /// `gs:[base + displacement]`
    GsBase(u8, i32),
    /// `gs:[index × 2^scale + displacement]`
    GsScaled {
        index: u8,
        scale: u8,
        displacement: i32,
    },
}

impl Rm {
    pub fn is_gs(self) -> bool {
        matches!(self, Rm::Gs(_) | Rm::GsBase(..) | Rm::GsScaled { .. })
    }

    /// REX.X and REX.B.
    pub fn extension_bits(self) -> (u8, u8) {
        match self {
            Rm::Reg(r) | Rm::Base(r, _) | Rm::GsBase(r, _) => (0, r >> 3),
            Rm::Indexed { base, index, .. } => (index >> 3, base >> 3),
            Rm::Scaled { index, .. } | Rm::GsScaled { index, .. } => (index >> 3, 0),
            Rm::Gs(_) => (0, 0),
        }
    }
}

/// Condition codes (SDM vol. 1 B.1).
pub mod cc {
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
    pub const S: u8 = 8;
    pub const O: u8 = 0;
    pub const L: u8 = 12;
    pub const GE: u8 = 13;
    pub const LE: u8 = 14;
    pub const G: u8 = 15;
}

/// The eight two-operand arithmetic instructions, by the number in their opcodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// A jump whose 32-bit displacement, at `at` in the buffer, is not known yet.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Hole {
    pub at: usize,
}

/// A buffer of host code. Positions are relative to its start.
#[derive(Default)]
pub struct Assembler {
    pub code: Vec<u8>,
}

impl Assembler {
    pub fn position(&self) -> usize {
        self.code.len()
    }
    pub fn byte(&mut self, byte: u8) {
        self.code.push(byte);
    }
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }
    pub fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    /// ModRM, SIB and displacement; the caller has emitted prefixes.
    pub fn modrm(&mut self, reg: u8, rm: Rm) {
        let reg = (reg & 7) << 3;
        match rm {
            Rm::Reg(r) => self.byte(0xc0 | reg | (r & 7)),
            Rm::Base(base, displacement) | Rm::GsBase(base, displacement) => {
                let mode = mode_for(base, displacement);
                self.byte((mode << 6) | reg | (base & 7));
                if base & 7 == 4 {
                    self.byte(0x24);
                }
                self.displacement(mode, displacement);
            }
            Rm::Indexed { base, index, scale, displacement } => {
                let mode = mode_for(base, displacement);
                self.byte((mode << 6) | reg | 4);
                self.byte((scale << 6) | ((index & 7) << 3) | (base & 7));
                self.displacement(mode, displacement);
            }
            Rm::Scaled { index, scale, displacement } | Rm::GsScaled { index, scale, displacement } => {
                self.byte(reg | 4);
                self.byte((scale << 6) | ((index & 7) << 3) | 5);
                self.imm32(displacement);
            }
            Rm::Gs(displacement) => {
                self.byte(reg | 4);
                self.byte(0x25);
                self.imm32(displacement);
            }
        }
    }

    fn displacement(&mut self, mode: u8, displacement: i32) {
        match mode {
            1 => self.byte(displacement as u8),
            2 => self.imm32(displacement),
            _ => {}
        }
    }

    /// `[gs] [rex] opcode modrm`; 64-bit if `wide`.
    fn op(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: Rm) {
        if rm.is_gs() {
            self.byte(0x65);
        }
        let (x, b) = rm.extension_bits();
        let rex = 0x40 | (u8::from(wide) << 3) | ((reg >> 3) << 2) | (x << 1) | b;
        if rex != 0x40 {
            self.byte(rex);
        }
        self.bytes(opcode);
        self.modrm(reg, rm);
    }

    pub fn load(&mut self, reg: u8, rm: Rm) {
        self.op(true, &[0x8b], reg, rm);
    }
    pub fn load32(&mut self, reg: u8, rm: Rm) {
        self.op(false, &[0x8b], reg, rm);
    }
    pub fn store(&mut self, rm: Rm, reg: u8) {
        self.op(true, &[0x89], reg, rm);
    }
    pub fn store32(&mut self, rm: Rm, reg: u8) {
        self.op(false, &[0x89], reg, rm);
    }
    pub fn store8(&mut self, rm: Rm, value: u8) {
        self.op(false, &[0xc6], 0, rm);
        self.byte(value);
    }
    /// `mov r64, r64`
    pub fn mov(&mut self, to: u8, from: u8) {
        self.op(true, &[0x89], from, Rm::Reg(to));
    }
    /// `mov r32, r32`
    pub fn mov32(&mut self, to: u8, from: u8) {
        self.op(false, &[0x89], from, Rm::Reg(to));
    }
    /// Loads a constant by the shortest encoding that leaves flags alone.
    pub fn mov_imm(&mut self, reg: u8, value: u64) {
        if value <= u64::from(u32::MAX) {
            if reg >= 8 {
                self.byte(0x41);
            }
            self.byte(0xb8 | (reg & 7));
            self.imm32(value as i32);
        } else if value as i64 == i64::from(value as i32) {
            self.op(true, &[0xc7], 0, Rm::Reg(reg));
            self.imm32(value as i32);
        } else {
            self.byte(0x48 | (reg >> 3));
            self.byte(0xb8 | (reg & 7));
            self.bytes(&value.to_le_bytes());
        }
    }
    /// `mov qword rm, imm32` sign-extended.
    pub fn store_imm32(&mut self, rm: Rm, value: i32) {
        self.op(true, &[0xc7], 0, rm);
        self.imm32(value);
    }
    /// `mov dword rm, imm32`
    pub fn store32_imm(&mut self, rm: Rm, value: u32) {
        self.op(false, &[0xc7], 0, rm);
        self.imm32(value as i32);
    }
    pub fn lea(&mut self, reg: u8, rm: Rm) {
        self.op(true, &[0x8d], reg, rm);
    }
    pub fn lea32(&mut self, reg: u8, rm: Rm) {
        self.op(false, &[0x8d], reg, rm);
    }
    pub fn alu(&mut self, op: Alu, reg: u8, rm: Rm) {
        self.op(true, &[(op as u8) << 3 | 3], reg, rm);
    }
    pub fn alu32(&mut self, op: Alu, reg: u8, rm: Rm) {
        self.op(false, &[(op as u8) << 3 | 3], reg, rm);
    }
    pub fn not32(&mut self, reg: u8) {
        self.op(false, &[0xf7], 2, Rm::Reg(reg));
    }
    pub fn not64(&mut self, reg: u8) {
        self.op(true, &[0xf7], 2, Rm::Reg(reg));
    }
    /// `neg r64`
    pub fn neg64(&mut self, reg: u8) {
        self.op(true, &[0xf7], 3, Rm::Reg(reg));
    }
    /// `cmovcc r64, rm`
    pub fn cmov(&mut self, condition: u8, reg: u8, rm: Rm) {
        self.op(true, &[0x0f, 0x40 | condition], reg, rm);
    }
    pub fn alu_imm(&mut self, op: Alu, wide: bool, rm: Rm, value: i32) {
        if i32::from(value as i8) == value {
            self.op(wide, &[0x83], op as u8, rm);
            self.byte(value as u8);
        } else {
            self.op(wide, &[0x81], op as u8, rm);
            self.imm32(value);
        }
    }
    /// `shr r32, count`
    pub fn shr32(&mut self, reg: u8, count: u8) {
        self.op(false, &[0xc1], 5, Rm::Reg(reg));
        self.byte(count);
    }
    /// `shl r64, count`
    pub fn shl64(&mut self, reg: u8, count: u8) {
        self.op(true, &[0xc1], 4, Rm::Reg(reg));
        self.byte(count);
    }
    /// `shr r64, count`
    pub fn shr64(&mut self, reg: u8, count: u8) {
        self.op(true, &[0xc1], 5, Rm::Reg(reg));
        self.byte(count);
    }
    /// `sar r64, count`
    pub fn sar64(&mut self, reg: u8, count: u8) {
        self.op(true, &[0xc1], 7, Rm::Reg(reg));
        self.byte(count);
    }
    /// `movsxd r64, r32`
    pub fn movsxd(&mut self, to: u8, from: Rm) {
        self.op(true, &[0x63], to, from);
    }
    /// Loads 2^`log` bytes, zero-extended.
    pub fn load_sized(&mut self, log: u8, reg: u8, rm: Rm) {
        match log {
            0 => self.op(false, &[0x0f, 0xb6], reg, rm),
            1 => self.op(false, &[0x0f, 0xb7], reg, rm),
            2 => self.load32(reg, rm),
            _ => self.load(reg, rm),
        }
    }
    /// Loads 2^`log` bytes into AL, AX, EAX or RAX as MOV does.
    pub fn load_accumulator(&mut self, log: u8, rm: Rm) {
        match log {
            0 => self.op(false, &[0x8a], RAX, rm),
            1 => {
                self.byte(0x66);
                self.load32(RAX, rm);
            }
            2 => self.load32(RAX, rm),
            _ => self.load(RAX, rm),
        }
    }
    /// Stores the low 2^`log` bytes. A byte goes out with a REX prefix, so that RSI and RDI mean SIL and DIL.
    pub fn store_sized(&mut self, log: u8, rm: Rm, reg: u8) {
        match log {
            0 => {
                assert!(!rm.is_gs());
                let (x, b) = rm.extension_bits();
                self.bytes(&[0x40 | ((reg >> 3) << 2) | (x << 1) | b, 0x88]);
                self.modrm(reg, rm);
            }
            1 => {
                self.byte(0x66);
                self.store32(rm, reg);
            }
            2 => self.store32(rm, reg),
            _ => self.store(rm, reg),
        }
    }
    /// `cmp reg, rm` of 2^`log` bytes, with RSI and RDI as SIL and DIL.
    pub fn cmp_sized(&mut self, log: u8, reg: u8, rm: Rm) {
        match log {
            0 => {
                assert!(!rm.is_gs());
                let (x, b) = rm.extension_bits();
                self.bytes(&[0x40 | ((reg >> 3) << 2) | (x << 1) | b, 0x3a]);
                self.modrm(reg, rm);
            }
            1 => {
                self.byte(0x66);
                self.alu32(Alu::Cmp, reg, rm);
            }
            2 => self.alu32(Alu::Cmp, reg, rm),
            _ => self.alu(Alu::Cmp, reg, rm),
        }
    }
    /// `mov [rm], r16`
    pub fn store16(&mut self, rm: Rm, reg: u8) {
        self.byte(0x66);
        self.store32(rm, reg);
    }
    /// `movzx r32, r16`
    /// RORX: rotates right, leaving flags alone.
    pub fn rorx(&mut self, to: u8, from: u8, count: u8) {
        self.bytes(&[0xc4, (to >> 3 ^ 1) << 7 | 0x40 | (from >> 3 ^ 1) << 5 | 3, 0xfb, 0xf0]);
        self.bytes(&[0xc0 | (to & 7) << 3 | from & 7, count]);
    }
    /// Zero-extends the low byte of a register to itself.
    pub fn movzx8(&mut self, reg: u8) {
        self.bytes(&[0x40 | ((reg >> 3) * 5), 0x0f, 0xb6, 0xc0 | ((reg & 7) * 9)]);
    }
    pub fn movzx16(&mut self, to: u8, from: u8) {
        self.op(false, &[0x0f, 0xb7], to, Rm::Reg(from));
    }
    pub fn push(&mut self, reg: u8) {
        if reg >= 8 {
            self.byte(0x41);
        }
        self.byte(0x50 | (reg & 7));
    }
    /// `push imm32`, sign-extended.
    pub fn push_imm(&mut self, value: i32) {
        self.byte(0x68);
        self.imm32(value);
    }
    pub fn pop(&mut self, reg: u8) {
        if reg >= 8 {
            self.byte(0x41);
        }
        self.byte(0x58 | (reg & 7));
    }
    pub fn push_rm(&mut self, rm: Rm) {
        self.op(false, &[0xff], 6, rm);
    }
    pub fn pushfq(&mut self) {
        self.byte(0x9c);
    }
    pub fn popfq(&mut self) {
        self.byte(0x9d);
    }
    pub fn lahf(&mut self) {
        self.byte(0x9f);
    }
    pub fn sahf(&mut self) {
        self.byte(0x9e);
    }
    pub fn ret(&mut self) {
        self.byte(0xc3);
    }
    pub fn jmp_rm(&mut self, rm: Rm) {
        self.op(false, &[0xff], 4, rm);
    }
    pub fn call_rm(&mut self, rm: Rm) {
        self.op(false, &[0xff], 2, rm);
    }
    /// LDMXCSR (`2`) or STMXCSR (`3`).
    pub fn mxcsr(&mut self, which: u8, rm: Rm) {
        self.op(false, &[0x0f, 0xae], which, rm);
    }
    /// `vmovdqu ymm, [rm]` (load) or the store; VEX.256.F3.0F.
    pub fn vmovdqu(&mut self, store: bool, ymm: u8, rm: Rm) {
        if rm.is_gs() {
            self.byte(0x65);
        }
        let (x, b) = rm.extension_bits();
        self.byte(0xc4);
        self.byte(((((ymm >> 3) ^ 1) << 7) | ((x ^ 1) << 6) | ((b ^ 1) << 5)) | 1);
        self.byte(0x7e); // W0, vvvv unused, L1, pp F3
        self.byte(if store { 0x7f } else { 0x6f });
        self.modrm(ymm & 7, rm);
    }
    /// `movdqu xmm, [rm]` (load) or the store.
    pub fn movdqu(&mut self, store: bool, xmm: u8, rm: Rm) {
        if rm.is_gs() {
            self.byte(0x65);
        }
        self.byte(0xf3);
        let (x, b) = rm.extension_bits();
        let rex = 0x40 | ((xmm >> 3) << 2) | (x << 1) | b;
        if rex != 0x40 {
            self.byte(rex);
        }
        self.bytes(&[0x0f, if store { 0x7f } else { 0x6f }]);
        self.modrm(xmm & 7, rm);
    }
    /// `vorps a, a, b` on 256 bits.
    pub fn vorps(&mut self, a: u8, b: u8) {
        self.byte(0xc4);
        self.byte(((((a >> 3) ^ 1) << 7) | 0x40 | (((b >> 3) ^ 1) << 5)) | 1);
        self.byte(((!a & 0xf) << 3) | 4);
        self.byte(0x56);
        self.modrm(a & 7, Rm::Reg(b & 7));
    }
    /// Sets ZF if the upper half of YMM0 is zero; destroys XMM0.
    pub fn test_upper0(&mut self) {
        self.bytes(&[0xc4, 0xe3, 0x7d, 0x19, 0xc0, 0x01]); // vextractf128 xmm0, ymm0, 1
        self.bytes(&[0xc4, 0xe2, 0x79, 0x17, 0xc0]); // vptest xmm0, xmm0
    }
    /// `setne byte [rm]`
    pub fn setne(&mut self, rm: Rm) {
        self.op(false, &[0x0f, 0x95], 0, rm);
    }
    /// `test byte [rm], imm8`
    /// `test r, r` of 64 or 32 bits
    pub fn test(&mut self, wide: bool, a: u8, b: u8) {
        self.op(wide, &[0x85], a, Rm::Reg(b));
    }
    pub fn test8(&mut self, rm: Rm, value: u8) {
        self.op(false, &[0xf6], 0, rm);
        self.byte(value);
    }
    pub fn vzeroupper(&mut self) {
        self.bytes(&[0xc5, 0xf8, 0x77]);
    }

    /// `jmp rel32`, target to be filled in.
    pub fn jmp(&mut self) -> Hole {
        self.byte(0xe9);
        self.imm32(0);
        Hole { at: self.position() - 4 }
    }
    /// `jcc rel32`, target to be filled in.
    pub fn jcc(&mut self, condition: u8) -> Hole {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.imm32(0);
        Hole { at: self.position() - 4 }
    }
    /// `call rel32`, target to be filled in.
    pub fn call(&mut self) -> Hole {
        self.byte(0xe8);
        self.imm32(0);
        Hole { at: self.position() - 4 }
    }
    /// A short jump by `opcode` (EB, 7x, E3), target to be filled in by [`Self::bind_short`].
    pub fn short(&mut self, opcode: u8) -> usize {
        self.byte(opcode);
        self.byte(0);
        self.position() - 1
    }
    pub fn bind_short(&mut self, at: usize) {
        let distance = self.position() - (at + 1);
        assert!(distance < 128);
        self.code[at] = distance as u8;
    }
    /// Makes `hole` jump here.
    pub fn bind(&mut self, hole: Hole) {
        self.bind_to(hole, self.position());
    }
    /// Makes `hole` jump to `position` of this buffer.
    pub fn bind_to(&mut self, hole: Hole, position: usize) {
        let displacement = position as i64 - (hole.at as i64 + 4);
        self.code[hole.at..hole.at + 4].copy_from_slice(&(displacement as i32).to_le_bytes());
    }
}

fn mode_for(base: u8, displacement: i32) -> u8 {
    if displacement == 0 && base & 7 != 5 {
        0
    } else if i32::from(displacement as i8) == displacement {
        1
    } else {
        2
    }
}
