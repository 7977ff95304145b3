//! Fetching and decoding, with a small cache of decoded instructions.
//!
//! The bytes are fetched anew for each instruction, so the cache needs no invalidation: an entry is used
//! only where the same bytes are at the same RIP in the same mode.

use super::memory::is_64bit;
use crate::core::Core;
use anyvisor_x86::Exception;
use anyvisor_x86::segment::index;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use std::cell::RefCell;

/// The longest instruction there is, in bytes.
const MAX_LENGTH: usize = 15;

/// log2 of the decode cache's entries.
const CACHE_BITS: u32 = 11;

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
    let got = core.fetch(address, &mut bytes[..within_limit])?;
    bytes[got..].fill(0);
    let bitness = core.cpu.mode().bits() as u8;

    CACHE.with_borrow_mut(|cache| {
        if cache.is_empty() {
            let empty = Fetched { instruction: Instruction::default(), bytes: [0; 16], bitness: 0 };
            cache.resize(1 << CACHE_BITS, empty);
        }
        let slot = &mut cache[(rip ^ rip >> CACHE_BITS) as usize & ((1 << CACHE_BITS) - 1)];
        // Full fetches only: what an entry was decoded from must be what is there now.
        if got == MAX_LENGTH && slot.instruction.ip() == rip && slot.bitness == bitness {
            let length = slot.instruction.len();
            if slot.bytes[..length] == bytes[..length] {
                slot.bytes = bytes;
                return Ok(*slot);
            }
        }
        let instruction = decode(core, &bytes[..got], address, within_limit, bitness, rip)?;
        let fetched = Fetched { instruction, bytes, bitness };
        if got == MAX_LENGTH {
            *slot = fetched;
        }
        Ok(fetched)
    })
}

fn decode(
    core: &mut Core,
    bytes: &[u8],
    address: u64,
    within_limit: usize,
    bitness: u8,
    rip: u64,
) -> Result<Instruction, Exception> {
    let mut decoder = Decoder::with_ip(u32::from(bitness), bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    match decoder.last_error() {
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
