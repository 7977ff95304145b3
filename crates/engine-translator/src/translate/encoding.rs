//! Taking an instruction's encoding apart and putting it together with other registers or another memory
//! operand (SDM vol. 2A chapter 2).
//!
//! A same-ISA translator hardly needs an assembler: it keeps the guest's own opcode, prefixes and
//! immediate, and replaces the ModRM fields. So semantics are never restated here, only moved.

use super::assembler::{Assembler, Rm};
use iced_x86::{Instruction, Mnemonic as M, OpCodeOperandKind as K, OpKind, Register};

/// Opcode map selected by the escape bytes or by VEX.mmmmm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    Primary,
    Escape0f,
    Escape0f38,
    Escape0f3a,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vex {
    /// VEX.L and VEX.pp as encoded.
    pub l: bool,
    pub pp: u8,
    pub vvvv: u8,
}

/// The parts of one instruction's encoding.
#[derive(Clone, Debug)]
pub struct Layout {
    pub operand_size: bool,
    pub repeat: Option<u8>,
    pub lock: bool,
    /// REX.W or VEX.W.
    pub w: bool,
    pub has_rex: bool,
    pub vex: Option<Vex>,
    pub map: Map,
    pub opcode: u8,
    /// ModRM.reg with its extension bit, if there is a ModRM byte.
    pub reg: u8,
    /// ModRM.rm (register form) with its extension bit.
    pub rm: u8,
    pub has_modrm: bool,
    pub is_memory: bool,
    immediate: [u8; 8],
    immediate_length: u8,
}

impl Layout {
    pub fn immediate(&self) -> &[u8] {
        &self.immediate[..self.immediate_length as usize]
    }

    /// Takes `bytes`, one whole valid instruction for `bits`-bit code, apart. `None` for encodings that
    /// are never copied: EVEX, XOP, far immediates, 16-bit addressing.
    pub fn parse(bytes: &[u8], bits: u32) -> Option<Layout> {
        let mut layout = Layout {
            operand_size: false,
            repeat: None,
            lock: false,
            w: false,
            has_rex: false,
            vex: None,
            map: Map::Primary,
            opcode: 0,
            reg: 0,
            rm: 0,
            has_modrm: false,
            is_memory: false,
            immediate: [0; 8],
            immediate_length: 0,
        };
        let mut at = 0;
        let mut address_size = false;
        let mut rex = 0;
        loop {
            match *bytes.get(at)? {
                0x66 => layout.operand_size = true,
                0x67 => address_size = true,
                p @ (0xf2 | 0xf3) => layout.repeat = Some(p),
                0xf0 => layout.lock = true,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                // A REX prefix counts only right before the opcode (SDM vol. 2A 2.2.1).
                p @ 0x40..=0x4f if bits == 64 => {
                    rex = p;
                    at += 1;
                    continue;
                }
                _ => break,
            }
            rex = 0;
            at += 1;
        }
        if address_size && bits != 64 {
            return None;
        }
        let (mut r, mut b) = ((rex & 4) << 1, (rex & 1) << 3);
        layout.has_rex = rex != 0;
        layout.w = rex & 8 != 0;
        let byte = *bytes.get(at)?;
        at += 1;
        let next = *bytes.get(at).unwrap_or(&0);
        if (byte == 0xc4 || byte == 0xc5) && (bits == 64 || next >= 0xc0) {
            at = layout.parse_vex(bytes, at, byte, &mut r, &mut b)?;
            if bits != 64 {
                layout.ignore_vex_bits();
            }
        } else if byte == 0x62 && (bits == 64 || next >= 0xc0) {
            return None;
        } else if byte == 0x8f && next & 0x38 != 0 {
            return None; // XOP
        } else if byte == 0x0f {
            let second = next;
            at += 1;
            match second {
                0x38 | 0x3a => {
                    layout.map = if second == 0x38 { Map::Escape0f38 } else { Map::Escape0f3a };
                    layout.opcode = *bytes.get(at)?;
                    at += 1;
                }
                _ => {
                    layout.map = Map::Escape0f;
                    layout.opcode = second;
                }
            }
            layout.has_modrm = layout.map != Map::Escape0f || has_modrm_0f(second);
        } else {
            layout.opcode = byte;
            layout.has_modrm = has_modrm_primary(byte);
        }
        if layout.vex.is_some() {
            layout.has_modrm = !(layout.map == Map::Escape0f && layout.opcode == 0x77);
        }
        if layout.has_modrm {
            at = layout.parse_modrm(bytes, at, r, b)?;
        } else {
            if layout.map == Map::Primary {
                match layout.opcode {
                    // MOV with an absolute offset: the same as the ModRM forms with the accumulator.
                    0xa0..=0xa3 => {
                        layout.opcode = [0x8a, 0x8b, 0x88, 0x89][(layout.opcode & 3) as usize];
                        layout.has_modrm = true;
                        layout.is_memory = true;
                        return Some(layout);
                    }
                    // INC and DEC by opcode; in 64-bit code these bytes are REX prefixes.
                    0x40..=0x4f => {
                        layout.rm = layout.opcode & 7;
                        layout.reg = (layout.opcode >> 3) & 1;
                        layout.opcode = 0xff;
                        layout.has_modrm = true;
                        return Some(layout);
                    }
                    0x9a | 0xea => return None,
                    _ => {}
                }
            }
        }
        let immediate = bytes.get(at..)?;
        if immediate.len() > 8 {
            return None;
        }
        layout.immediate[..immediate.len()].copy_from_slice(immediate);
        if bits == 32
            && let Some(vex) = &mut layout.vex
        {
            // The top bits of VEX.vvvv and of a register in the immediate are ignored (SDM vol. 2A 2.3.5).
            vex.vvvv &= 7;
            if layout.map == Map::Escape0f3a && matches!(layout.opcode, 0x4a..=0x4c) {
                layout.immediate[0] &= 0x7f;
            }
        }
        layout.immediate_length = immediate.len() as u8;
        Some(layout)
    }

    fn parse_vex(&mut self, bytes: &[u8], at: usize, byte: u8, r: &mut u8, b: &mut u8) -> Option<usize> {
        let first = *bytes.get(at)?;
        *r = if first & 0x80 == 0 { 8 } else { 0 };
        let (last, next) = if byte == 0xc5 {
            self.map = Map::Escape0f;
            (first, at + 1)
        } else {
            *b = if first & 0x20 == 0 { 8 } else { 0 };
            self.map = match first & 0x1f {
                1 => Map::Escape0f,
                2 => Map::Escape0f38,
                3 => Map::Escape0f3a,
                _ => return None,
            };
            let second = *bytes.get(at + 1)?;
            self.w = second & 0x80 != 0;
            (second, at + 2)
        };
        self.vex = Some(Vex { l: last & 4 != 0, pp: last & 3, vvvv: (!last >> 3) & 0xf });
        self.opcode = *bytes.get(next)?;
        Some(next + 1)
    }

    /// Outside 64-bit mode the upper registers do not exist and general registers are 32 bits wide: the bits
    /// of VEX that say otherwise are ignored (SDM vol. 2A 2.3.5.4 and 2.3.6.1).
    fn ignore_vex_bits(&mut self) {
        if let Some(vex) = &mut self.vex {
            vex.vvvv &= 7;
        }
        let general = match self.map {
            Map::Primary => false,
            Map::Escape0f => matches!(self.opcode, 0x2a | 0x2c | 0x2d | 0x6e | 0x7e),
            Map::Escape0f38 => matches!(self.opcode, 0xf2..=0xf7),
            Map::Escape0f3a => matches!(self.opcode, 0x16 | 0x22 | 0x60 | 0x61 | 0xf0),
        };
        if general {
            self.w = false;
        }
    }

    fn parse_modrm(&mut self, bytes: &[u8], mut at: usize, r: u8, b: u8) -> Option<usize> {
        let modrm = *bytes.get(at)?;
        at += 1;
        self.reg = ((modrm >> 3) & 7) | r;
        self.rm = (modrm & 7) | b;
        let mode = modrm >> 6;
        // MOV to and from control and debug registers ignore mod; they are never copied.
        self.is_memory = mode != 3;
        if self.is_memory {
            let mut base = modrm & 7;
            if base == 4 {
                base = *bytes.get(at)? & 7;
                at += 1;
            }
            at += match mode {
                0 if base == 5 => 4,
                0 => 0,
                1 => 1,
                _ => 4,
            };
        }
        Some(at)
    }

    /// Emits the instruction with these ModRM.reg, ModRM.rm, VEX.vvvv and opcode registers.
    ///
    /// `force_rex`: a byte operand is SPL, BPL, SIL or DIL. The caller has made sure that AH–BH occur only
    /// where no REX prefix comes out; see [`Self::needs_rex`].
    pub fn emit(&self, a: &mut Assembler, regs: &Fields, rm: Rm, force_rex: bool) {
        if self.lock {
            a.byte(0xf0);
        }
        if rm.is_gs() {
            a.byte(0x65);
        }
        let rm = if self.has_modrm { rm } else { Rm::Reg(regs.opcode) };
        let (x, b) = rm.extension_bits();
        let r = if self.has_modrm { regs.reg >> 3 } else { 0 };
        if let Some(vex) = self.vex {
            let map = match self.map {
                Map::Primary => unreachable!("VEX has no primary map"),
                Map::Escape0f => 1,
                Map::Escape0f38 => 2,
                Map::Escape0f3a => 3,
            };
            a.byte(0xc4);
            a.byte((((r ^ 1) << 7) | ((x ^ 1) << 6) | ((b ^ 1) << 5)) | map);
            a.byte((u8::from(self.w) << 7) | ((!regs.vvvv & 0xf) << 3) | (u8::from(vex.l) << 2) | vex.pp);
        } else {
            if self.operand_size {
                a.byte(0x66);
            }
            if let Some(prefix) = self.repeat {
                a.byte(prefix);
            }
            let rex = 0x40 | (u8::from(self.w) << 3) | (r << 2) | (x << 1) | b;
            if rex != 0x40 || force_rex {
                a.byte(rex);
            }
            match self.map {
                Map::Primary => {}
                Map::Escape0f => a.byte(0x0f),
                Map::Escape0f38 => a.bytes(&[0x0f, 0x38]),
                Map::Escape0f3a => a.bytes(&[0x0f, 0x3a]),
            }
        }
        if self.has_modrm {
            a.byte(self.opcode);
            a.modrm(regs.reg & 7, rm);
        } else if regs.opcode_is_register {
            a.byte((self.opcode & 0xf8) | (regs.opcode & 7));
        } else {
            a.byte(self.opcode);
        }
        a.bytes(self.immediate());
    }

    /// Whether emitting with these fields needs a REX prefix (legacy encodings).
    pub fn needs_rex(&self, regs: &Fields, rm: Rm) -> bool {
        let rm = if self.has_modrm { rm } else { Rm::Reg(regs.opcode) };
        let (x, b) = rm.extension_bits();
        self.w || x != 0 || b != 0 || (self.has_modrm && regs.reg >= 8)
    }
}

/// Register numbers to emit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fields {
    pub reg: u8,
    pub vvvv: u8,
    pub opcode: u8,
    pub opcode_is_register: bool,
}

/// Where in the encoding an operand's register is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Reg,
    Rm,
    Vvvv,
    Opcode,
}

/// A general register operand: operand number, place, register.
#[derive(Clone, Copy, Debug)]
pub struct GprOperand {
    pub operand: u32,
    pub place: Place,
    pub register: Register,
    /// The encoding also allows memory in this place.
    pub or_memory: bool,
}

/// The explicit general-register operands of `instruction`. Implicit ones (AL, CL, RAX … fixed by the
/// opcode) are not listed: those registers keep their own names in translated code.
pub fn gpr_operands(instruction: &Instruction) -> [Option<GprOperand>; 5] {
    let info = instruction.op_code();
    std::array::from_fn(|operand| {
        let operand = operand as u32;
        if operand >= instruction.op_count() || instruction.op_kind(operand) != OpKind::Register {
            return None;
        }
        let register = instruction.op_register(operand);
        if !register.is_gpr() {
            return None;
        }
        let kind = info.op_kind(operand);
        let place = match kind {
            K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::r32_or_mem_mpx | K::r64_or_mem_mpx => {
                Place::Rm
            }
            K::r16_rm | K::r32_rm | K::r64_rm => Place::Rm,
            K::r8_reg | K::r16_reg | K::r32_reg | K::r64_reg => Place::Reg,
            K::r16_reg_mem | K::r32_reg_mem | K::r64_reg_mem => Place::Reg,
            // INC and DEC by opcode come out with a ModRM byte.
            K::r16_opcode | K::r32_opcode if matches!(instruction.mnemonic(), M::Inc | M::Dec) => Place::Rm,
            K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => Place::Opcode,
            K::r32_vvvv | K::r64_vvvv => Place::Vvvv,
            _ => return None,
        };
        let or_memory = matches!(kind, K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem);
        Some(GprOperand { operand, place, register, or_memory })
    })
}

/// ModRM in the primary map (SDM vol. 2D table A-2).
fn has_modrm_primary(opcode: u8) -> bool {
    match opcode {
        0x00..=0x3f => opcode & 7 < 4,
        0x62 | 0x63 | 0x69 | 0x6b => true,
        0x80..=0x8f => true,
        0xc0 | 0xc1 | 0xc4..=0xc7 => true,
        0xd0..=0xd3 | 0xd8..=0xdf => true,
        0xf6 | 0xf7 | 0xfe | 0xff => true,
        _ => false,
    }
}

/// ModRM in the 0F map (SDM vol. 2D table A-3).
fn has_modrm_0f(opcode: u8) -> bool {
    !matches!(opcode,
        0x04..=0x0c | 0x0e | 0x30..=0x37 | 0x39 | 0x3b..=0x3f | 0x77 | 0x80..=0x8f
        | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf)
}
