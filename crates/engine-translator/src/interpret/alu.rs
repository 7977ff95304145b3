//! Integer arithmetic and the status flags it leaves, as pure functions on zero-extended values.
//!
//! `size` is the operand's size in bytes (1, 2, 4 or 8); operands and results are zero-extended to 64
//! bits. Each function returns its result and the six status flags as they stand in RFLAGS. Flags that the
//! manual leaves undefined get the values that Intel's processors give them, except where AMD's are named;
//! where a flag is left alone the caller passes the old flags in.

use crate::vendor;
use anyvisor_x86::bits::rflags::{AF, CF, OF, PF, SF, STATUS, ZF};

/// All ones in `size` bytes.
pub const fn mask(size: u32) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// The sign bit of `size` bytes.
pub const fn sign_bit(size: u32) -> u64 {
    1 << (8 * size - 1)
}

/// `value`, of `size` bytes, sign-extended to 64 bits.
pub const fn sign_extend(size: u32, value: u64) -> i64 {
    let shift = 64 - 8 * size;
    ((value << shift) as i64) >> shift
}

const fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// SF, ZF and PF of a result.
pub const fn result_flags(size: u32, result: u64) -> u64 {
    when(result & mask(size) == 0, ZF)
        | when(result & sign_bit(size) != 0, SF)
        | when((result as u8).count_ones().is_multiple_of(2), PF)
}

/// ADD and ADC.
pub const fn add(size: u32, a: u64, b: u64, carry: bool) -> (u64, u64) {
    let wide = a as u128 + b as u128 + carry as u128;
    let r = wide as u64 & mask(size);
    let flags = result_flags(size, r)
        | when(wide > mask(size) as u128, CF)
        | ((a ^ b ^ r) & AF)
        | when((a ^ r) & (b ^ r) & sign_bit(size) != 0, OF);
    (r, flags)
}

/// SUB, SBB and CMP.
pub const fn sub(size: u32, a: u64, b: u64, borrow: bool) -> (u64, u64) {
    let r = a.wrapping_sub(b).wrapping_sub(borrow as u64) & mask(size);
    let flags = result_flags(size, r)
        | when((a as u128) < b as u128 + borrow as u128, CF)
        | ((a ^ b ^ r) & AF)
        | when((a ^ b) & (a ^ r) & sign_bit(size) != 0, OF);
    (r, flags)
}

/// Flags of AND, OR, XOR and TEST.
pub const fn logic(size: u32, result: u64) -> u64 {
    result_flags(size, result)
}

/// INC: as ADD 1, CF kept.
pub const fn inc(size: u32, a: u64, old: u64) -> (u64, u64) {
    let (r, flags) = add(size, a, 1, false);
    (r, flags & !CF | old & CF)
}

/// DEC: as SUB 1, CF kept.
pub const fn dec(size: u32, a: u64, old: u64) -> (u64, u64) {
    let (r, flags) = sub(size, a, 1, false);
    (r, flags & !CF | old & CF)
}

/// The eight operations of opcode group 2 (SDM vol. 2B, RCL/RCR/ROL/ROR and SAL/SAR/SHL/SHR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// A shift or rotate by `count`, which is masked here as the CPU does. A masked count of zero leaves all
/// flags alone. OF, undefined for counts above 1, is what a count of 1 would give, as on Intel processors.
pub fn shift(kind: Shift, size: u32, value: u64, count: u64, old: u64) -> (u64, u64) {
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    let old = old & STATUS;
    if count == 0 {
        return (value, old);
    }
    match kind {
        Shift::Rol | Shift::Ror | Shift::Rcl | Shift::Rcr => rotate(kind, size, value, count, old),
        Shift::Shl => {
            let wide = u128::from(value) << count;
            let r = wide as u64 & mask(size);
            let carry = wide >> (8 * size) & 1 != 0;
            let overflow = (value << 1 ^ value) & sign_bit(size) != 0;
            (r, result_flags(size, r) | when(carry, CF) | when(overflow, OF))
        }
        Shift::Shr => {
            let r = value.checked_shr(count).unwrap_or(0);
            let carry = value.checked_shr(count - 1).unwrap_or(0) & 1 != 0;
            let overflow = value & sign_bit(size) != 0;
            (r, result_flags(size, r) | when(carry, CF) | when(overflow, OF))
        }
        Shift::Sar => {
            let signed = sign_extend(size, value);
            let r = (signed >> count.min(63)) as u64 & mask(size);
            let carry = signed >> (count - 1).min(63) & 1 != 0;
            (r, result_flags(size, r) | when(carry, CF))
        }
    }
}

/// Rotates write CF and OF only.
fn rotate(kind: Shift, size: u32, value: u64, count: u32, old: u64) -> (u64, u64) {
    let bits = 8 * size;
    let (r, carry) = match kind {
        Shift::Rol => {
            let r = rotate_left(size, value, count % bits);
            (r, r & 1 != 0)
        }
        Shift::Ror => {
            let r = rotate_left(size, value, (bits - count % bits) % bits);
            (r, r & sign_bit(size) != 0)
        }
        _ => {
            // A rotate through carry turns bits + 1 bits: the carry is the highest of them.
            let turn = bits + 1;
            let by = if kind == Shift::Rcl { count % turn } else { (turn - count % turn) % turn };
            if by == 0 && vendor::is_amd() {
                // Intel's leave OF alone as well.
                let other = if kind == Shift::Rcl { old & CF != 0 } else { value << 1 & sign_bit(size) != 0 };
                let overflow = (value & sign_bit(size) != 0) != other;
                return (value, old & !OF | when(overflow, OF));
            }
            if by == 0 {
                return (value, old);
            }
            let wide = u128::from(value) | u128::from(old & CF) << bits;
            let all = (1u128 << turn) - 1;
            let turned = (wide << by | wide >> (turn - by)) & all;
            (turned as u64 & mask(size), turned >> bits & 1 != 0)
        }
    };
    let top = value & sign_bit(size) != 0;
    let overflow = match kind {
        Shift::Rol | Shift::Rcl => top != (value << 1 & sign_bit(size) != 0),
        Shift::Ror => top != (value & 1 != 0),
        _ => top != (old & CF != 0),
    };
    (r, old & !(CF | OF) | when(carry, CF) | when(overflow, OF))
}

fn rotate_left(size: u32, value: u64, by: u32) -> u64 {
    if by == 0 { value } else { (value << by | value >> (8 * size - by)) & mask(size) }
}

/// SHLD (`left`) and SHRD: shifts `value`, filling from `fill`. A masked count of zero changes nothing.
/// Counts above 16 on 16-bit operands are undefined by the manual; Intel's processors then rotate the three
/// words `value:fill:value`.
pub fn double_shift(left: bool, size: u32, value: u64, fill: u64, count: u64, old: u64) -> (u64, u64) {
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    if count == 0 {
        return (value, old & STATUS);
    }
    let bits = 8 * size;
    let (r, carry) = if size == 2 && count > 16 && vendor::is_amd() {
        // AMD's rotate what they fill with, and clear CF.
        let by = if left { count - 16 } else { 32 - count };
        (u64::from((fill as u16).rotate_left(by)), false)
    } else if size == 2 {
        let (v, f) = (u128::from(value), u128::from(fill));
        let wide = v << 32 | f << 16 | v;
        if left {
            ((wide << count >> 32) as u64 & mask(size), wide >> (48 - count) & 1 != 0)
        } else {
            ((wide >> count) as u64 & mask(size), wide >> (count - 1) & 1 != 0)
        }
    } else if left {
        ((value << count | fill >> (bits - count)) & mask(size), value >> (bits - count) & 1 != 0)
    } else {
        ((value >> count | fill << (bits - count)) & mask(size), value >> (count - 1) & 1 != 0)
    };
    let incoming = if left { value << 1 } else { fill << (bits - 1) };
    let overflow = (incoming ^ value) & sign_bit(size) != 0;
    (r, result_flags(size, r) | when(carry, CF) | when(overflow, OF))
}

/// MUL and one-operand IMUL: the double-width product, low and high half. CF and OF tell whether the high
/// half is more than the low half's extension.
pub fn multiply(size: u32, a: u64, b: u64, signed: bool) -> (u64, u64, u64) {
    let (low, high, fits) = if signed {
        let product = i128::from(sign_extend(size, a)) * i128::from(sign_extend(size, b));
        let low = product as u64 & mask(size);
        (low, (product >> (8 * size)) as u64 & mask(size), i128::from(sign_extend(size, low)) == product)
    } else {
        let product = u128::from(a) * u128::from(b);
        let high = (product >> (8 * size)) as u64;
        (product as u64 & mask(size), high, high == 0)
    };
    (low, high, multiply_flags(size, low, fits))
}

/// SF, ZF, AF and PF are undefined; Intel processors set SF and PF by the low half and clear the others.
fn multiply_flags(size: u32, low: u64, fits: bool) -> u64 {
    result_flags(size, low) & !ZF | when(!fits, CF | OF)
}

/// Divides the double-width `high:low` by `divisor`; `None` for #DE.
pub fn divide(size: u32, high: u64, low: u64, divisor: u64, signed: bool) -> Option<(u64, u64)> {
    if divisor == 0 {
        return None;
    }
    let bits = 8 * size;
    if !signed {
        let dividend = u128::from(high) << bits | u128::from(low);
        let quotient = dividend / u128::from(divisor);
        return (quotient <= u128::from(mask(size)))
            .then(|| (quotient as u64, (dividend % u128::from(divisor)) as u64));
    }
    let dividend = i128::from(sign_extend(size, high)) << bits | i128::from(low);
    let divisor = i128::from(sign_extend(size, divisor));
    let quotient = dividend.checked_div(divisor)?;
    let limit = i128::from(sign_bit(size));
    (-limit <= quotient && quotient < limit)
        .then(|| (quotient as u64 & mask(size), (dividend % divisor) as u64 & mask(size)))
}

/// The condition of a Jcc, SETcc or CMOVcc by its number in the encoding (SDM vol. 2D table B-10).
pub const fn condition(number: u32, flags: u64) -> bool {
    let holds = match number >> 1 {
        0 => flags & OF != 0,
        1 => flags & CF != 0,
        2 => flags & ZF != 0,
        3 => flags & (CF | ZF) != 0,
        4 => flags & SF != 0,
        5 => flags & PF != 0,
        6 => (flags & SF != 0) != (flags & OF != 0),
        _ => flags & ZF != 0 || (flags & SF != 0) != (flags & OF != 0),
    };
    holds != (number & 1 != 0)
}

/// CRC32 (the Castagnoli polynomial, bit-reflected) of `size` bytes of `data`.
pub fn crc32c(mut crc: u32, data: u64, size: u32) -> u32 {
    for byte in &data.to_le_bytes()[..size as usize] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    crc
}

/// PDEP: spreads the low bits of `source` to the set bits of `selector`.
pub fn deposit(source: u64, mut selector: u64) -> u64 {
    let (mut r, mut next) = (0, source);
    while selector != 0 {
        let bit = selector & selector.wrapping_neg();
        if next & 1 != 0 {
            r |= bit;
        }
        next >>= 1;
        selector ^= bit;
    }
    r
}

/// PEXT: gathers the bits of `source` at the set bits of `selector`.
pub fn extract(source: u64, mut selector: u64) -> u64 {
    let (mut r, mut at) = (0, 0);
    while selector != 0 {
        let bit = selector & selector.wrapping_neg();
        r |= u64::from(source & bit != 0) << at;
        at += 1;
        selector ^= bit;
    }
    r
}
