//! One case: code, where it stands, the registers and the memory it starts from; and how it ended.
//!
//! A case is written as one line of `key=value` words; zeros are left out. That is what a report prints,
//! what `--replay` takes and what the files of kept cases hold.

use crate::layout::{CODE, DATA_BYTES, DATA_PAGES, PAGE};
use crate::rng::Rng;
use anyhow::{Context, Result, bail};
use std::fmt::Write;

/// The registers an instruction in user mode can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// In encoding order.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ymm: [[u8; 32]; 16],
    pub mxcsr: u32,
    pub x87: X87,
}

/// The x87 registers as FXSAVE has them, without the instruction and data pointers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87 {
    pub control: u16,
    pub status: u16,
    /// Abridged: a set bit means that the physical register is not empty (SDM vol. 1 10.5.1.1).
    pub tag: u8,
    /// ST0 to ST7.
    pub st: [[u8; 10]; 8],
}

impl Default for X87 {
    fn default() -> Self {
        X87 { control: 0x37f, status: 0, tag: 0, st: [[0; 10]; 8] }
    }
}

impl Default for State {
    fn default() -> Self {
        State {
            gpr: [0; 16],
            rip: CODE,
            rflags: 0x202,
            fs_base: 0,
            gs_base: 0,
            ymm: [[0; 32]; 16],
            mxcsr: 0x1f80,
            x87: X87::default(),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Case {
    /// The instructions. An INT3 follows them, and fills the rest of their page and the next.
    pub code: Vec<u8>,
    pub state: State,
    /// Names the contents of memory; see [`image`].
    pub memory: u64,
    /// Bytes put in data memory over the image, by linear address.
    pub pokes: Vec<(u64, Vec<u8>)>,
    /// What made the case, for reports.
    pub seed: u64,
}

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An exception; CR2 for page faults, else 0. The state is the one its handler's frame shows.
    Exception { vector: u8, error: u32, cr2: u64 },
    /// It was still running when patience ended.
    Hang,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub stop: Stop,
    pub state: State,
}

/// The data pages' contents named by `seed`.
pub fn image(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed ^ 0x006d_656d_6f72_7921);
    let mut bytes = Vec::with_capacity(DATA_BYTES);
    for page in 0..DATA_PAGES {
        for _ in 0..PAGE / 8 {
            // Code addresses among the data give indirect jumps and returns somewhere to go.
            let word = match rng.below(16) {
                0 => CODE + rng.below(8 * PAGE),
                _ if page % 2 == 0 => rng.integer(),
                _ => rng.lane(),
            };
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// The name of general register `index`.
pub fn register_name(index: usize) -> &'static str {
    NAMES[index]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string");
        text
    })
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        bail!("{text}: an even number of hexadecimal digits is wanted");
    }
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).with_context(|| format!("{text}: not hexadecimal")))
        .collect()
}

impl Case {
    /// The case as one line.
    pub fn to_line(&self) -> String {
        let s = &self.state;
        let mut line =
            format!("code={} rip={:x} flags={:x} memory={:x}", hex(&self.code), s.rip, s.rflags, self.memory);
        let mut number = |name: &str, value: u64, default: u64| {
            if value != default {
                write!(line, " {name}={value:x}").expect("writing to a string");
            }
        };
        for (name, value) in NAMES.iter().zip(s.gpr) {
            number(name, value, 0);
        }
        number("fs", s.fs_base, 0);
        number("gs", s.gs_base, 0);
        number("mxcsr", u64::from(s.mxcsr), 0x1f80);
        number("fcw", u64::from(s.x87.control), 0x37f);
        number("fsw", u64::from(s.x87.status), 0);
        number("ftw", u64::from(s.x87.tag), 0);
        number("seed", self.seed, 0);
        for (i, value) in s.x87.st.iter().enumerate().filter(|(_, v)| **v != [0; 10]) {
            write!(line, " st{i}={}", hex(value)).expect("writing to a string");
        }
        for (i, value) in s.ymm.iter().enumerate().filter(|(_, v)| **v != [0; 32]) {
            write!(line, " ymm{i}={}", hex(value)).expect("writing to a string");
        }
        for (address, bytes) in &self.pokes {
            write!(line, " poke={address:x}:{}", hex(bytes)).expect("writing to a string");
        }
        line
    }

    /// Reads what [`Case::to_line`] wrote.
    ///
    /// # Errors
    /// When a word is not of that form.
    pub fn from_line(line: &str) -> Result<Case> {
        let mut case = Case::default();
        for word in line.split_whitespace() {
            let (key, value) = word.split_once('=').with_context(|| format!("{word}: key=value is wanted"))?;
            case.set(key, value)?;
        }
        if case.code.is_empty() {
            bail!("no code= in the case");
        }
        Ok(case)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let number = || u64::from_str_radix(value, 16).with_context(|| format!("{key}={value}: not hexadecimal"));
        let s = &mut self.state;
        match key {
            "code" => self.code = unhex(value)?,
            "rip" => s.rip = number()?,
            "flags" => s.rflags = number()?,
            "memory" => self.memory = number()?,
            "fs" => s.fs_base = number()?,
            "gs" => s.gs_base = number()?,
            "mxcsr" => s.mxcsr = number()? as u32,
            "fcw" => s.x87.control = number()? as u16,
            "fsw" => s.x87.status = number()? as u16,
            "ftw" => s.x87.tag = number()? as u8,
            "seed" => self.seed = number()?,
            "poke" => {
                let (address, bytes) = value.split_once(':').context("poke=address:bytes is wanted")?;
                self.pokes.push((u64::from_str_radix(address, 16)?, unhex(bytes)?));
            }
            _ => return self.set_indexed(key, value),
        }
        Ok(())
    }

    fn set_indexed(&mut self, key: &str, value: &str) -> Result<()> {
        let s = &mut self.state;
        if let Some(i) = NAMES.iter().position(|n| *n == key) {
            s.gpr[i] = u64::from_str_radix(value, 16)?;
        } else if let Some(i) = key.strip_prefix("st").and_then(|i| i.parse::<usize>().ok()).filter(|i| *i < 8) {
            s.x87.st[i] = unhex(value)?.try_into().ok().context("an x87 register has 10 bytes")?;
        } else if let Some(i) = key.strip_prefix("ymm").and_then(|i| i.parse::<usize>().ok()).filter(|i| *i < 16) {
            s.ymm[i] = unhex(value)?.try_into().ok().context("a YMM register has 32 bytes")?;
        } else {
            bail!("{key}: unknown key");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_survives_its_line() {
        let mut rng = Rng::new(5);
        let mut case = Case { code: vec![0x90, 0xc3], memory: 7, seed: 9, ..Case::default() };
        case.state.gpr = std::array::from_fn(|_| rng.integer());
        case.state.ymm = std::array::from_fn(|_| rng.ymm());
        case.state.x87.st = std::array::from_fn(|_| rng.extended());
        case.state.mxcsr = 0x1fa0;
        case.pokes.push((0x2000_1000, vec![1, 2, 3]));
        assert_eq!(Case::from_line(&case.to_line()).unwrap(), case);
    }

    #[test]
    fn bad_lines_are_refused() {
        for line in ["", "code", "code=9", "code=90 rax=zz", "code=90 ymm99=00", "code=90 what=1"] {
            assert!(Case::from_line(line).is_err(), "{line}");
        }
    }
}
