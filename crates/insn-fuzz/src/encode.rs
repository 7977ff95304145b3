//! Random encodings of a form: prefixes in any order, redundant ones too, every ModRM, SIB and
//! displacement shape. The bytes are put together here rather than by an encoder, because an encoder
//! writes each instruction one way only.

use crate::forms::Form;
use crate::rng::Rng;
use iced_x86::{EncodingKind, MandatoryPrefix, OpCodeTableKind};

/// Which registers operands are to use; empty lists mean any.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    pub bases: Vec<u8>,
    pub indices: Vec<u8>,
    /// Registers that are not for addresses: most register operands are among them.
    pub data: Vec<u8>,
    /// Memory operands are always `base`, `base + index` or relative to RIP, the first two mostly with 8 bits
    /// of displacement.
    pub plain: bool,
    /// For 32-bit code: no REX prefixes, eight registers.
    pub narrow: bool,
    /// `Some(true)`: a memory operand where the form allows one.
    pub memory: Option<bool>,
}

struct Parts {
    r: u8,
    x: u8,
    b: u8,
    modrm: Option<u8>,
    sib: Option<u8>,
    has_memory: bool,
}

/// One encoding of `form`, followed by random bytes: displacement and immediate as far as it has them.
pub fn encode(rng: &mut Rng, form: &Form, shape: &Shape) -> Vec<u8> {
    let mut code = Vec::with_capacity(64);
    encode_into(rng, form, shape, &mut code);
    code
}

/// As [`encode`], to a vector that is cleared first.
pub fn encode_into(rng: &mut Rng, form: &Form, shape: &Shape, code: &mut Vec<u8>) {
    code.clear();
    let mut parts = parts(rng, form, shape);
    if shape.narrow {
        (parts.r, parts.x, parts.b) = (0, 0, 0);
    }
    if !shape.plain {
        legacy_prefixes(rng, form, &parts, shape.narrow, code);
    } else if form.plain_prefix != 0 {
        code.push(form.plain_prefix);
    }
    match form.info.encoding() {
        EncodingKind::VEX => vex(rng, form, &parts, code),
        _ => legacy(rng, form, &parts, shape, code),
    }
    code.extend(parts.modrm);
    code.extend(parts.sib);
    code.extend_from_slice(&rng.integer().to_le_bytes());
    code.extend_from_slice(&rng.word().to_le_bytes());
}

fn parts(rng: &mut Rng, form: &Form, shape: &Shape) -> Parts {
    let operands = form.operands;
    let mut parts = Parts {
        r: rng.below(2) as u8,
        x: rng.below(2) as u8,
        b: rng.below(2) as u8,
        modrm: None,
        sib: None,
        has_memory: false,
    };
    if rng.percent(30) && form.info.encoding() == EncodingKind::Legacy {
        (parts.r, parts.x, parts.b) = (0, 0, 0);
    }
    if !operands.modrm {
        return parts;
    }
    let general = !shape.data.is_empty() && form.general && rng.percent(90);
    let reg = match form.info.is_group() {
        true => form.info.group_index() as u8,
        false if general => {
            let register = rng.pick(&shape.data);
            parts.r = register >> 3;
            register & 7
        }
        false => rng.below(8) as u8,
    };
    parts.has_memory = match (operands.memory, operands.register) {
        (true, true) => shape.memory.unwrap_or_else(|| rng.percent(50)),
        (memory, _) => memory,
    };
    if !parts.has_memory {
        let rm = match form.info.is_rm_group() {
            true => form.info.rm_group_index() as u8,
            false if general => {
                let register = rng.pick(&shape.data);
                parts.b = register >> 3;
                register & 7
            }
            false => rng.below(8) as u8,
        };
        parts.modrm = Some(0xc0 | reg << 3 | rm);
        return parts;
    }
    let mode = if shape.plain { 1 } else { rng.pick(&[0u8, 0, 1, 1, 1, 2]) };
    let restricted = !shape.bases.is_empty();
    let base = if restricted { rng.pick(&shape.bases) } else { rng.below(16) as u8 };
    let with_sib = operands.vsib || base & 7 == 4 || rng.percent(if shape.plain { 15 } else { 40 });
    if restricted && rng.percent(if shape.plain { 93 } else { 85 }) || operands.vsib {
        // A base that needs a displacement byte gets one: RBP and R13 have no form without.
        let mode = if mode == 0 && base & 7 == 5 { 1 } else { mode };
        parts.b = base >> 3;
        parts.modrm = Some(mode << 6 | reg << 3 | if with_sib { 4 } else { base & 7 });
        if with_sib {
            let index = if shape.indices.is_empty() || operands.vsib {
                rng.below(16) as u8
            } else if rng.percent(70) {
                rng.pick(&shape.indices)
            } else {
                4
            };
            parts.x = index >> 3;
            parts.sib = Some((rng.below(4) as u8) << 6 | (index & 7) << 3 | base & 7);
        }
    } else if restricted {
        // RIP-relative, or an absolute address.
        let rip = shape.plain || rng.percent(60);
        parts.modrm = Some(reg << 3 | if rip { 5 } else { 4 });
        if !rip {
            parts.x = 0;
            parts.sib = Some(0x25);
        }
    } else {
        let rm = if with_sib { 4 } else { rng.below(8) as u8 };
        parts.modrm = Some(mode << 6 | reg << 3 | rm);
        if rm == 4 {
            parts.sib = Some(rng.word() as u8);
        }
    }
    parts
}

fn legacy_prefixes(rng: &mut Rng, form: &Form, parts: &Parts, narrow_mode: bool, code: &mut Vec<u8>) {
    let info = form.info;
    let legacy = info.encoding() == EncodingKind::Legacy;
    let uses_memory = parts.has_memory || form.code.is_string_instruction();
    if uses_memory && rng.percent(12) || rng.percent(1) {
        let segment = rng.pick(&[0x64, 0x65, 0x64, 0x65, 0x26, 0x2e, 0x36, 0x3e]);
        code.push(segment);
    }
    let other_size = if narrow_mode { 16 } else { 32 };
    if info.address_size() == other_size
        || uses_memory && rng.percent(if narrow_mode { 3 } else { 8 })
        || rng.percent(1)
    {
        code.push(0x67);
    }
    if legacy {
        let mandatory = info.mandatory_prefix();
        let narrow = info.operand_size() == 16;
        if narrow || mandatory == MandatoryPrefix::P66 || mandatory == MandatoryPrefix::None && rng.percent(2) {
            code.push(0x66);
        }
        match mandatory {
            MandatoryPrefix::PF3 => code.push(0xf3),
            MandatoryPrefix::PF2 => code.push(0xf2),
            MandatoryPrefix::None if form.code.is_string_instruction() && rng.percent(60) => {
                code.push(rng.pick(&[0xf2, 0xf3]));
            }
            MandatoryPrefix::None if rng.percent(1) => code.push(rng.pick(&[0xf2, 0xf3])),
            _ => (),
        }
        if info.can_use_lock_prefix() && parts.has_memory && rng.percent(30) || rng.below(400) == 0 {
            code.push(0xf0);
        }
    }
    for i in (1..code.len()).rev() {
        code.swap(i, rng.below(i as u64 + 1) as usize);
    }
    // A REX prefix that is not the last prefix has no effect (SDM vol. 2A 2.2.1).
    if rng.below(200) == 0 && !code.is_empty() && legacy && !narrow_mode {
        code.insert(0, 0x40 | rng.below(16) as u8);
    }
}

fn opcode_bytes(rng: &mut Rng, form: &Form, code: &mut Vec<u8>) {
    let info = form.info;
    let opcode = info.op_code();
    if info.op_code_len() == 2 {
        code.push((opcode >> 8) as u8);
    }
    let register = if form.operands.in_opcode { rng.below(8) as u8 } else { 0 };
    code.push(opcode as u8 | register);
}

fn legacy(rng: &mut Rng, form: &Form, parts: &Parts, shape: &Shape, code: &mut Vec<u8>) {
    let info = form.info;
    let wide = info.operand_size() == 64 && !info.default_op_size64() && !info.force_op_size64();
    let ignored =
        !shape.plain && (info.operand_size() == 0 && rng.percent(10) || info.force_op_size64() && rng.percent(20));
    let wide = wide || ignored;
    let rex = u8::from(wide) << 3 | parts.r << 2 | parts.x << 1 | parts.b;
    if !shape.narrow && (rex != 0 || rng.percent(30)) {
        code.push(0x40 | rex);
    }
    match info.table() {
        OpCodeTableKind::T0F => code.push(0x0f),
        OpCodeTableKind::T0F38 => code.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => code.extend([0x0f, 0x3a]),
        _ => (),
    }
    opcode_bytes(rng, form, code);
}

fn vex(rng: &mut Rng, form: &Form, parts: &Parts, code: &mut Vec<u8>) {
    let info = form.info;
    let map = match info.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        _ => 3,
    };
    let pp = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let vvvv = if form.operands.vvvv || rng.below(300) == 0 { rng.below(16) as u8 } else { 15 };
    let w = if info.is_wig() || info.is_wig32() && info.w() == 0 { rng.below(2) as u8 } else { info.w() as u8 };
    let l = if info.is_lig() { rng.below(2) as u8 } else { info.l() as u8 };
    let last = vvvv << 3 | l << 2 | pp;
    if map == 1 && w == 0 && parts.x == 0 && parts.b == 0 && rng.percent(60) {
        code.extend([0xc5, (parts.r ^ 1) << 7 | last]);
    } else {
        code.extend([0xc4, (parts.r ^ 1) << 7 | (parts.x ^ 1) << 6 | (parts.b ^ 1) << 5 | map, w << 7 | last]);
    }
    opcode_bytes(rng, form, code);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forms::Forms;
    use anyvisor_engine_translator::vendor;
    use std::collections::HashSet;

    #[test]
    fn every_form_is_reached() {
        let mut rng = Rng::new(1);
        let mut missing = Vec::new();
        let mut seen = HashSet::new();
        for bits in [64, 32] {
            let shape = Shape { narrow: bits == 32, ..Shape::default() };
            for form in Forms::get(bits).all() {
                for _ in 0..60 {
                    let code = encode(&mut rng, form, &shape);
                    seen.insert((bits, vendor::decoder(bits, &code, 0).decode().code()));
                }
            }
            for form in Forms::get(bits).all() {
                if !seen.contains(&(bits, form.code)) {
                    missing.push((bits, form.code));
                }
            }
        }
        assert!(missing.is_empty(), "forms never generated: {missing:?}");
    }
}
