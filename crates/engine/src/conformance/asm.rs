//! Guest code from the assembler of `iced-x86`, and where each instruction of it lies.

use super::Mismatch;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::{BlockEncoderOptions, IcedError};

/// The assembler that cases write into: one method an instruction, registers and operands from
/// `iced_x86::code_asm`.
pub type Asm = CodeAssembler;

/// Machine code, and the offset of each instruction in it.
#[derive(Clone, Debug, Default)]
pub struct Assembled {
    pub bytes: Vec<u8>,
    pub offsets: Vec<u64>,
}

impl Assembled {
    /// Assembles `code` for address `ip`, in `bits`-bit mode.
    pub fn new(
        bits: u32,
        ip: u64,
        code: impl FnOnce(&mut Asm) -> Result<(), IcedError>,
    ) -> Result<Assembled, Mismatch> {
        let mut assembler = CodeAssembler::new(bits)?;
        code(&mut assembler)?;
        if assembler.instructions().is_empty() {
            return Ok(Assembled::default());
        }
        let result = assembler.assemble_options(ip, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let offsets = result.inner.new_instruction_offsets.iter().map(|&offset| u64::from(offset)).collect();
        Ok(Assembled { bytes: result.inner.code_buffer, offsets })
    }

    /// The offset of the last instruction.
    pub fn last(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// The offset behind all instructions.
    pub fn end(&self) -> u64 {
        self.bytes.len() as u64
    }
}
