//! Fetching and decoding, with a small cache of decoded instructions.
//!
//! The bytes are fetched anew for each instruction, so the cache needs no invalidation: an entry is used
//! only where the same bytes are at the same RIP in the same mode.

use super::memory::is_64bit;
use crate::core::Core;
use crate::ram::{PAGE_SIZE, copy_from_guest};
use crate::vendor;
use anyvisor_x86::Exception;
use anyvisor_x86::segment::index;
use iced_x86::{DecoderError, Instruction};
use std::cell::RefCell;

/// The longest instruction there is, in bytes.
const MAX_LENGTH: usize = 15;

/// log2 of the decode cache's entries.
const CACHE_BITS: u32 = 13;

/// An instruction with its bytes.
#[derive(Clone, Copy)]
pub struct Fetched {
    pub instruction: Instruction,
    /// The bytes from RIP on, zeros where none could be fetched; [`Instruction::len`] of them count.
    pub bytes: [u8; 16],
    /// 16, 32 or 64.
    pub bitness: u8,
}

thread_local! {
    static CACHE: RefCell<Vec<Fetched>> = const { RefCell::new(Vec::new()) };
}

/// Fetches and decodes the instruction at `rip`, an offset in CS.
///
/// # Errors
/// What fetching or decoding raises: #PF, #GP(0) beyond the limit or 15 bytes, #UD.
pub fn decode_at(core: &mut Core, rip: u64) -> Result<Fetched, Exception> {
    let long = is_64bit(&core.cpu);
    let mut bytes = [0u8; 16];
    let (address, within_limit) = if long {
        if !super::memory::is_canonical(rip) {
            return Err(Exception::gp(0));
        }
        (rip, MAX_LENGTH)
    } else {
        let cs = &core.cpu.seg[index::CS];
        let rest = (u64::from(cs.limit) + 1).saturating_sub(rip).min(MAX_LENGTH as u64) as usize;
        if rest == 0 {
            return Err(Exception::gp(0));
        }
        (cs.base.wrapping_add(rip) & 0xffff_ffff, rest)
    };
    let got = fetch(core, address, &mut bytes, within_limit)?;
    let bitness = core.cpu.mode().bits() as u8;
    if got != MAX_LENGTH {
        // At the end of a page or segment: not for the cache, which compares whole fetches.
        let instruction = decode(core, &bytes[..got], address, within_limit, bitness, rip)?;
        return Ok(Fetched { instruction, bytes, bitness });
    }
    CACHE.with_borrow_mut(|cache| {
        if cache.is_empty() {
            let empty = Fetched { instruction: Instruction::default(), bytes: [0; 16], bitness: 0 };
            cache.resize(1 << CACHE_BITS, empty);
        }
        let slot = &mut cache[(rip ^ rip >> CACHE_BITS) as usize & ((1 << CACHE_BITS) - 1)];
        if slot.instruction.ip() == rip && slot.bitness == bitness {
            let counting = u128::MAX >> (128 - 8 * slot.instruction.len());
            let difference = u128::from_le_bytes(slot.bytes) ^ u128::from_le_bytes(bytes);
            if difference & counting == 0 {
                return Ok(Fetched { instruction: slot.instruction, bytes, bitness });
            }
        }
        let instruction = decode(core, &bytes[..got], address, within_limit, bitness, rip)?;
        *slot = Fetched { instruction, bytes, bitness };
        Ok(*slot)
    })
}

/// Fetches up to 15 bytes, and no more than `within_limit`, from linear address `address`; returns how many.
fn fetch(core: &mut Core, address: u64, bytes: &mut [u8; 16], within_limit: usize) -> Result<usize, Exception> {
    if within_limit == MAX_LENGTH
        && address & (PAGE_SIZE - 1) <= PAGE_SIZE - 16
        && let (_, Some(host)) = core.fetch_page(address)?
    {
        // SAFETY: `host` is in a page of guest RAM with 16 bytes or more to its end.
        unsafe { copy_from_guest(host, &mut bytes[..]) };
        bytes[MAX_LENGTH] = 0;
        return Ok(MAX_LENGTH);
    }
    core.fetch(address, &mut bytes[..within_limit])
}

fn decode(
    core: &mut Core,
    bytes: &[u8],
    address: u64,
    within_limit: usize,
    bitness: u8,
    rip: u64,
) -> Result<Instruction, Exception> {
    let mut decoder = vendor::decoder(u32::from(bitness), bytes, rip);
    let mut instruction = decoder.decode();
    vendor::adapt(&mut instruction, bytes);
    match decoder.last_error() {
        DecoderError::None if instruction.is_invalid() => Err(Exception::ud()),
        DecoderError::None => Ok(instruction),
        DecoderError::NoMoreBytes if bytes.len() < within_limit => {
            // It goes on in a page that could not be fetched: that page's fault.
            let mut byte = [0];
            core.fetch(next_page(core, address), &mut byte)?;
            Err(Exception::gp(0))
        }
        DecoderError::NoMoreBytes => Err(Exception::gp(0)),
        // An instruction beyond the 15 bytes counts as invalid there, with all of them consumed.
        _ if decoder.position() >= MAX_LENGTH => Err(Exception::gp(0)),
        _ => Err(Exception::ud()),
    }
}

fn next_page(core: &Core, address: u64) -> u64 {
    let next = (address & !0xfff).wrapping_add(0x1000);
    if is_64bit(&core.cpu) { next } else { next & 0xffff_ffff }
}
