//! A vCPU's registers in gdb's order: the target description, and a state to bytes and back.
//!
//! One table ([`REGISTERS`]) makes both, so that they agree. Names and features are gdb's (its manual, "i386
//! Features"); what it has no feature for, control and debug registers, stands in one of our own.

use anyvisor_x86::bits::rflags;
use anyvisor_x86::segment::index;
use anyvisor_x86::{VcpuState, msr};
use gdbstub::arch::{Arch, RegId, Registers};
use std::fmt::Write;
use std::num::NonZeroUsize;
use std::sync::LazyLock;

/// Where a register lives in a [`VcpuState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Gpr(usize),
    Rip,
    Flags,
    Selector(usize),
    Base(usize),
    St(usize),
    /// `fctrl`, `fstat`, `ftag`, `fiseg`, `fioff`, `foseg`, `fooff`, `fop`.
    Fpu(Fpu),
    Xmm(usize),
    YmmHigh(usize),
    Mxcsr,
    Msr(u32),
    Cr(u8),
    Dr(usize),
    Table(TableRegister),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fpu {
    Control,
    Status,
    Tag,
    /// Always 0: the pointers are 64 bits wide here, and have no segments.
    Segment,
    Instruction,
    Operand,
    Opcode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TableRegister {
    GdtBase,
    GdtLimit,
    IdtBase,
    IdtLimit,
}

/// One register: name, bits, gdb's type, place.
struct Register {
    name: String,
    bits: usize,
    kind: &'static str,
    place: Place,
}

/// A feature and its registers.
struct Feature {
    name: &'static str,
    /// Types that it defines, as XML.
    types: &'static str,
    registers: Vec<Register>,
}

/// Offsets in an XSAVE area (SDM vol. 1 tables 10-2 and 13-1).
mod area {
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const YMM_HIGH: usize = 576;
}

/// The flags' names, as gdb shows them.
const CORE_TYPES: &str = r#"<flags id="i386_eflags" size="4"><field name="CF" start="0" end="0"/><field name="" start="1" end="1"/><field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/><field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/><field name="TF" start="8" end="8"/><field name="IF" start="9" end="9"/><field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/><field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/><field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/><field name="VIF" start="19" end="19"/><field name="VIP" start="20" end="20"/><field name="ID" start="21" end="21"/></flags>"#;

/// The views of a vector register, as gdb shows them.
const SSE_TYPES: &str = r#"<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/><vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/><union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/><field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union><flags id="i386_mxcsr" size="4"><field name="IE" start="0" end="0"/><field name="DE" start="1" end="1"/><field name="ZE" start="2" end="2"/><field name="OE" start="3" end="3"/><field name="UE" start="4" end="4"/><field name="PE" start="5" end="5"/><field name="DAZ" start="6" end="6"/><field name="IM" start="7" end="7"/><field name="DM" start="8" end="8"/><field name="ZM" start="9" end="9"/><field name="OM" start="10" end="10"/><field name="UM" start="11" end="11"/><field name="PM" start="12" end="12"/><field name="FZ" start="15" end="15"/></flags>"#;

static FEATURES: LazyLock<Vec<Feature>> = LazyLock::new(features);

fn features() -> Vec<Feature> {
    let register = |name: &str, bits, kind, place| Register { name: name.into(), bits, kind, place };
    let word = |name: &str, place| register(name, 64, "int64", place);
    let mut core = Vec::new();
    // The encoding's order is rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi; gdb's is this.
    for (name, n) in [("rax", 0), ("rbx", 3), ("rcx", 1), ("rdx", 2), ("rsi", 6), ("rdi", 7), ("rbp", 5), ("rsp", 4)] {
        let kind = if matches!(name, "rbp" | "rsp") { "data_ptr" } else { "int64" };
        core.push(register(name, 64, kind, Place::Gpr(n)));
    }
    core.extend((8..16).map(|n| word(&format!("r{n}"), Place::Gpr(n))));
    core.push(register("rip", 64, "code_ptr", Place::Rip));
    core.push(register("eflags", 32, "i386_eflags", Place::Flags));
    for (name, n) in [
        ("cs", index::CS),
        ("ss", index::SS),
        ("ds", index::DS),
        ("es", index::ES),
        ("fs", index::FS),
        ("gs", index::GS),
    ] {
        core.push(register(name, 32, "int32", Place::Selector(n)));
    }
    core.extend((0..8).map(|n| register(&format!("st{n}"), 80, "i387_ext", Place::St(n))));
    for (name, part) in [
        ("fctrl", Fpu::Control),
        ("fstat", Fpu::Status),
        ("ftag", Fpu::Tag),
        ("fiseg", Fpu::Segment),
        ("fioff", Fpu::Instruction),
        ("foseg", Fpu::Segment),
        ("fooff", Fpu::Operand),
        ("fop", Fpu::Opcode),
    ] {
        core.push(register(name, 32, "int", Place::Fpu(part)));
    }
    let mut sse: Vec<_> = (0..16).map(|n| register(&format!("xmm{n}"), 128, "vec128", Place::Xmm(n))).collect();
    sse.push(register("mxcsr", 32, "i386_mxcsr", Place::Mxcsr));
    let avx = (0..16).map(|n| register(&format!("ymm{n}h"), 128, "uint128", Place::YmmHigh(n))).collect();
    let segments = vec![word("fs_base", Place::Base(index::FS)), word("gs_base", Place::Base(index::GS))];
    let mut system = vec![word("k_gs_base", Place::Msr(msr::KERNEL_GS_BASE))];
    system.extend([0, 2, 3, 4].map(|n| word(&format!("cr{n}"), Place::Cr(n))));
    system.push(word("efer", Place::Msr(msr::EFER)));
    system.extend([0, 1, 2, 3, 6, 7].map(|n| word(&format!("dr{n}"), Place::Dr(n))));
    for (name, part) in [
        ("gdt_base", TableRegister::GdtBase),
        ("gdt_limit", TableRegister::GdtLimit),
        ("idt_base", TableRegister::IdtBase),
        ("idt_limit", TableRegister::IdtLimit),
    ] {
        system.push(word(name, Place::Table(part)));
    }
    vec![
        Feature { name: "org.gnu.gdb.i386.core", types: CORE_TYPES, registers: core },
        Feature { name: "org.gnu.gdb.i386.sse", types: SSE_TYPES, registers: sse },
        Feature { name: "org.gnu.gdb.i386.avx", types: "", registers: avx },
        Feature { name: "org.gnu.gdb.i386.segments", types: "", registers: segments },
        Feature { name: "anyvisor.system", types: "", registers: system },
    ]
}

fn registers() -> impl Iterator<Item = &'static Register> {
    FEATURES.iter().flat_map(|feature| &feature.registers)
}

static DESCRIPTION: LazyLock<String> = LazyLock::new(|| {
    let mut xml = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\">\
         <architecture>i386:x86-64</architecture>",
    );
    for feature in FEATURES.iter() {
        // Writing to a string cannot fail.
        let _ = write!(xml, "<feature name=\"{}\">{}", feature.name, feature.types);
        for Register { name, bits, kind, place } in &feature.registers {
            let group = match place {
                Place::St(_) | Place::Fpu(_) => " group=\"float\"",
                Place::Xmm(_) | Place::YmmHigh(_) | Place::Mxcsr => " group=\"vector\"",
                _ if feature.name == "anyvisor.system" => " group=\"system\"",
                _ => "",
            };
            let _ = write!(xml, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"{group}/>");
        }
        xml.push_str("</feature>");
    }
    xml.push_str("</target>");
    xml
});

/// The architecture as gdbstub wants it.
#[derive(Debug)]
pub enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Image;
    type RegId = Number;
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        Some(&DESCRIPTION)
    }
}

/// A register's number, as gdb counts them.
#[derive(Clone, Copy, Debug)]
pub struct Number(usize);

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Number, Option<NonZeroUsize>)> {
        let register = registers().nth(id)?;
        Some((Number(id), NonZeroUsize::new(register.bits / 8)))
    }
    fn to_raw_id(&self) -> Option<usize> {
        Some(self.0)
    }
}

/// All registers' bytes, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    bytes: Vec<u8>,
    rip: u64,
}

impl Registers for Image {
    type ProgramCounter = u64;
    fn pc(&self) -> u64 {
        self.rip
    }
    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.bytes.iter().for_each(|byte| write_byte(Some(*byte)));
    }
    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        if bytes.len() != registers().map(|register| register.bits / 8).sum::<usize>() {
            return Err(());
        }
        self.bytes = bytes.to_vec();
        Ok(())
    }
}

/// The registers of `state`.
pub fn image(state: &VcpuState) -> Image {
    let bytes = registers().flat_map(|register| get(state, register)).collect();
    Image { bytes, rip: state.rip }
}

/// Puts the registers of `image` into `state`.
///
/// # Errors
/// The name of one that cannot be changed.
pub fn apply(state: &mut VcpuState, image: &Image) -> Result<(), String> {
    let mut bytes = image.bytes.as_slice();
    for register in registers() {
        let (value, rest) = bytes.split_at_checked(register.bits / 8).ok_or("too few bytes")?;
        bytes = rest;
        if get(state, register) != value {
            set(state, register, value)?;
        }
    }
    Ok(())
}

/// One register's bytes.
pub fn read(state: &VcpuState, number: Number) -> Vec<u8> {
    registers().nth(number.0).map(|register| get(state, register)).unwrap_or_default()
}

/// Sets one register.
///
/// # Errors
/// Its name, if it cannot be changed.
pub fn write(state: &mut VcpuState, number: Number, value: &[u8]) -> Result<(), String> {
    let register = registers().nth(number.0).ok_or("no such register")?;
    if value.len() != register.bits / 8 {
        return Err(register.name.clone());
    }
    if get(state, register) == value { Ok(()) } else { set(state, register, value) }
}

fn get(state: &VcpuState, register: &Register) -> Vec<u8> {
    let size = register.bits / 8;
    let bytes = |at: usize, size: usize| match state.xsave.get(at..at + size) {
        Some(bytes) => bytes.to_vec(),
        None => vec![0; size],
    };
    let low = |value: u64| value.to_le_bytes()[..size].to_vec();
    match register.place {
        Place::Gpr(n) => low(state.gpr[n]),
        Place::Rip => low(state.rip),
        Place::Flags => low(state.rflags),
        Place::Selector(n) => low(state.segments.seg[n].selector.into()),
        Place::Base(n) => low(state.segments.seg[n].base),
        Place::St(n) => bytes(area::ST + 16 * n, 10),
        Place::Fpu(part) => low(fpu(state, part)),
        Place::Xmm(n) => bytes(area::XMM + 16 * n, 16),
        Place::YmmHigh(n) => bytes(area::YMM_HIGH + 16 * n, 16),
        Place::Mxcsr => bytes(area::MXCSR, 4),
        Place::Msr(number) => low(state.msr(number).unwrap_or(0)),
        Place::Cr(0) => low(state.cr0),
        Place::Cr(2) => low(state.cr2),
        Place::Cr(3) => low(state.cr3),
        Place::Cr(_) => low(state.cr4),
        Place::Dr(n) => low(state.dr[n]),
        Place::Table(TableRegister::GdtBase) => low(state.gdtr.base),
        Place::Table(TableRegister::GdtLimit) => low(state.gdtr.limit.into()),
        Place::Table(TableRegister::IdtBase) => low(state.idtr.base),
        Place::Table(TableRegister::IdtLimit) => low(state.idtr.limit.into()),
    }
}

fn word(area: &[u8], at: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    if let Some(from) = area.get(at..at + size) {
        bytes[..size].copy_from_slice(from);
    }
    u64::from_le_bytes(bytes)
}

fn fpu(state: &VcpuState, part: Fpu) -> u64 {
    match part {
        Fpu::Control => word(&state.xsave, 0, 2),
        Fpu::Status => word(&state.xsave, 2, 2),
        Fpu::Tag => tags(&state.xsave),
        Fpu::Segment => 0,
        Fpu::Instruction => word(&state.xsave, area::FIP, 4),
        Fpu::Operand => word(&state.xsave, area::FDP, 4),
        Fpu::Opcode => word(&state.xsave, area::FOP, 2),
    }
}

/// The full tag word from FXSAVE's, which says only which registers are empty (SDM vol. 1 10.5.1.1).
fn tags(xsave: &[u8]) -> u64 {
    const EMPTY: u64 = 3;
    let top = word(xsave, 2, 2) >> 11 & 7;
    let used = word(xsave, 4, 1);
    (0..8u64).fold(0, |tags, physical| {
        let at = area::ST + 16 * ((physical.wrapping_sub(top)) & 7) as usize;
        let (mantissa, exponent) = (word(xsave, at, 8), word(xsave, at + 8, 2) & 0x7fff);
        let tag = match exponent {
            _ if used >> physical & 1 == 0 => EMPTY,
            0 if mantissa == 0 => 1,
            0 | 0x7fff => 2,
            _ if mantissa >> 63 == 0 => 2,
            _ => 0,
        };
        tags | tag << (2 * physical)
    })
}

fn set(state: &mut VcpuState, register: &Register, value: &[u8]) -> Result<(), String> {
    let number = word(value, 0, value.len().min(8));
    let fixed = || Err(register.name.clone());
    let limit = |number: u64| u16::try_from(number).map_err(|_| register.name.clone());
    let area = |state: &mut VcpuState, at: usize, value: &[u8]| match state.xsave.get_mut(at..at + value.len()) {
        Some(bytes) => {
            bytes.copy_from_slice(value);
            Ok(())
        }
        None => Err(register.name.clone()),
    };
    match register.place {
        Place::Gpr(n) => state.gpr[n] = number,
        Place::Rip => state.rip = number,
        Place::Flags => state.rflags = number & (rflags::WRITABLE | rflags::VM) | rflags::FIXED,
        // A selector alone is not a segment.
        Place::Selector(_) => return fixed(),
        Place::Base(n) => state.segments.seg[n].base = number,
        Place::St(n) => return area(state, area::ST + 16 * n, value),
        Place::Fpu(Fpu::Control) => return area(state, 0, &value[..2]),
        Place::Fpu(Fpu::Status) => return area(state, 2, &value[..2]),
        Place::Fpu(Fpu::Tag) => {
            let used = (0..8).filter(|n| number >> (2 * n) & 3 != 3).fold(0, |used, n| used | 1 << n);
            return area(state, 4, &[used]);
        }
        Place::Fpu(Fpu::Segment) => return fixed(),
        Place::Fpu(Fpu::Instruction) => return area(state, area::FIP, value),
        Place::Fpu(Fpu::Operand) => return area(state, area::FDP, value),
        Place::Fpu(Fpu::Opcode) => return area(state, area::FOP, &value[..2]),
        Place::Xmm(n) => return area(state, area::XMM + 16 * n, value),
        Place::YmmHigh(n) => return area(state, area::YMM_HIGH + 16 * n, value),
        Place::Mxcsr => return area(state, area::MXCSR, value),
        Place::Msr(msr) => state.set_msr(msr, number),
        Place::Cr(0) => state.cr0 = number,
        Place::Cr(2) => state.cr2 = number,
        Place::Cr(3) => state.cr3 = number,
        Place::Cr(_) => state.cr4 = number,
        Place::Dr(n) => state.dr[n] = number,
        Place::Table(TableRegister::GdtBase) => state.gdtr.base = number,
        Place::Table(TableRegister::GdtLimit) => state.gdtr.limit = limit(number)?,
        Place::Table(TableRegister::IdtBase) => state.idtr.base = number,
        Place::Table(TableRegister::IdtLimit) => state.idtr.limit = limit(number)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state whose registers all differ.
    fn state() -> VcpuState {
        let mut state = VcpuState::reset(0, 0);
        for (n, gpr) in state.gpr.iter_mut().enumerate() {
            *gpr = 0x1111_0000_0000 + n as u64;
        }
        (state.rip, state.cr3, state.dr[7]) = (0xffff_8000_0000_1234, 0x5000, 0x401);
        (state.segments.seg[index::FS].base, state.segments.seg[index::GS].base) = (0xf5, 0x65);
        state.set_msr(msr::KERNEL_GS_BASE, 77);
        for (n, byte) in state.xsave[area::ST..area::XMM + 256].iter_mut().enumerate() {
            *byte = n as u8;
        }
        state
    }

    #[test]
    fn an_image_is_the_state() {
        let (from, mut to) = (state(), VcpuState::reset(0, 0));
        apply(&mut to, &image(&from)).unwrap();
        assert_eq!(image(&to), image(&from));
        assert_eq!((to.gpr, to.rip, to.cr3), (from.gpr, from.rip, from.cr3));
        assert_eq!(to.msr(msr::KERNEL_GS_BASE), Some(77));
    }

    #[test]
    fn single_registers_are_parts_of_the_image() {
        let state = state();
        let mut joined = vec![];
        for n in 0.. {
            let Some((number, size)) = Number::from_raw_id(n) else { break };
            let bytes = read(&state, number);
            assert_eq!(Some(bytes.len()), size.map(NonZeroUsize::get));
            joined.extend(bytes);
        }
        assert_eq!(joined, image(&state).bytes);
    }

    #[test]
    fn gdbs_core_registers_lie_where_gdb_wants_them() {
        let names: Vec<_> = registers().map(|register| register.name.as_str()).collect();
        assert_eq!(names[..8], ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"]);
        assert_eq!((names[16], names[17], names[18], names[24], names[32]), ("rip", "eflags", "cs", "st0", "fctrl"));
        let mut state = state();
        write(&mut state, Number(1), &7u64.to_le_bytes()).unwrap();
        assert_eq!(state.gpr[3], 7);
        assert_eq!(write(&mut state, Number(18), &1u32.to_le_bytes()), Err("cs".into()));
        assert!(write(&mut state, Number(0), &[1]).is_err());
    }

    #[test]
    fn tags_tell_empty_zero_and_valid() {
        let mut state = VcpuState::reset(0, 0);
        assert_eq!(tags(&state.xsave), 0xffff);
        // TOP is 7: ST0 is register 7, and holds 1.0; ST1 is register 0, and holds 0.
        state.xsave[2..4].copy_from_slice(&(7u16 << 11).to_le_bytes());
        state.xsave[4] = 0x81;
        state.xsave[area::ST..area::ST + 10].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        assert_eq!(tags(&state.xsave), 0x3ffd);
    }

    #[test]
    fn the_description_is_whole() {
        let xml = X86::target_description_xml().unwrap();
        for word in ["i386:x86-64", "\"fs_base\"", "\"cr3\"", "\"ymm15h\"", "i386.segments", "</target>"] {
            assert!(xml.contains(word), "{word}");
        }
        assert_eq!(xml.matches("<reg ").count(), registers().count());
    }
}
