//! Cases from seeds: instructions of the wanted classes, registers that aim their memory operands, and
//! memory and states full of edge values.
//!
//! An instruction comes first as random bytes of a form ([`crate::encode`]); the decoder then says what it
//! reads, and registers, displacements and memory are chosen so that it reads something worth reading:
//! mapped data mostly, but page crossings, read-only, unmapped, non-canonical and code addresses too.
//!
//! A *single* case has one instruction and aims freely. A *sequence* has 2 to 12, with jumps forward among
//! them, or is a loop; some registers are pointers and indices throughout, so that most accesses hit. A *block* is
//! what [`crate::blocks`] makes. A block comes with four states, as so many
//! cases.

use crate::blocks;
use crate::case::{Case, State, X87};
use crate::encode::{Shape, encode_into};
use crate::forms::{Class, Form, Forms};
use crate::layout::{CODE, CODE_32, CODE_PAGES, DATA_BYTES, HIGH, LOW, PAGE, backing_of, bits_at};
use crate::rng::Rng;
use crate::undefined::Line;
use anyvisor_engine_translator::vendor;
use iced_x86::{
    ConstantOffsets, CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    MemorySize, Mnemonic, OpAccess, OpKind, Register,
};

const RAX: usize = 0;
pub(crate) const RCX: usize = 1;
const RDX: usize = 2;
pub(crate) const RSP: usize = 4;

/// States in which a block is run, one after the other; a power of two.
const STATES: u64 = 4;

/// Room for one case's code: it starts at least this far from the end of the code pages, mostly.
const SLOT: u64 = 512;

/// What is generated.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Only this class; else all, by weight.
    pub class: Option<Class>,
    /// 32 or 64: the mode that cases run in.
    pub bits: u32,
    /// The host can give a case FS and GS bases.
    pub bases: bool,
}

/// What a case is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Single,
    Sequence,
    Block,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Single, Kind::Sequence, Kind::Block];

    /// For reports, of several.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Single => "single instructions",
            Kind::Sequence => "sequences",
            Kind::Block => "blocks",
        }
    }
}

/// A case's kind, and the classes that its instructions are of: bit `n` is number `n` of [`Class`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    pub kind: Kind,
    pub classes: u16,
}

/// Generates cases. The same seed and options give the same case.
pub struct Generator {
    options: Options,
    /// By mode: 32 and 64 bits.
    classes: [Pool; 2],
    common: [Pool; 2],
    info: InstructionInfoFactory,
    encoded: Vec<u8>,
    /// The block that was made last, in its first state, by the seed of that and the memory.
    last: Option<(u64, u64, Case, Pinned)>,
    made: Made,
}

/// Forms to choose from, by weight.
pub(crate) type Pool = Vec<(u64, Vec<Form>)>;

/// One instruction with its decoded form.
#[derive(Clone)]
pub(crate) struct Piece {
    bytes: [u8; 15],
    pub instruction: Instruction,
    pub offsets: ConstantOffsets,
}

impl Piece {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.instruction.len()]
    }

    /// Overwrites the displacement with as much of `value` as it has room for.
    pub fn set_displacement(&mut self, value: u64) {
        let (at, size) = (self.offsets.displacement_offset(), self.offsets.displacement_size());
        self.bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
}

/// Registers that a sequence keeps for addresses and for counting, as bit masks by encoding index.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pinned {
    pub pointers: u32,
    pub indices: u32,
    /// Nothing but the loop or function whose they are may change these.
    pub counters: u32,
}

impl Generator {
    pub fn new(options: Options) -> Generator {
        const WEIGHTS: [(Class, u64); 10] = [
            (Class::Int, 25),
            (Class::Mem, 17),
            (Class::Sse, 14),
            (Class::Avx, 14),
            (Class::X87, 8),
            (Class::Mmx, 4),
            (Class::String, 6),
            (Class::Branch, 6),
            (Class::Stack, 5),
            (Class::Privileged, 1),
        ];
        let classes = [32, 64].map(|bits| {
            WEIGHTS
                .iter()
                .filter(|(class, _)| options.class.is_none_or(|wanted| wanted == *class))
                .map(|(class, weight)| (*weight, Forms::get(bits).of_class(*class)))
                .collect()
        });
        Generator {
            options,
            classes,
            common: [32, 64].map(blocks::common_forms),
            info: InstructionInfoFactory::new(),
            encoded: Vec::with_capacity(64),
            last: None,
            made: Made { kind: Kind::Single, classes: 0 },
        }
    }

    /// What the case that was made last is made of.
    pub fn made(&self) -> Made {
        self.made
    }

    /// The case named `seed`, which runs on memory `image` (named `memory`).
    pub fn case(&mut self, seed: u64, memory: u64, image: &[u8]) -> Case {
        let first = seed & !(STATES - 1);
        let kind = Rng::new(!first).below(100);
        let (single, sequence) = match self.options.class {
            None => (kind < 45, kind < 80),
            Some(Class::Block) => (false, false),
            Some(_) => (kind < 60, true),
        };
        self.made.kind = match (single, sequence) {
            (true, _) => Kind::Single,
            (false, true) => Kind::Sequence,
            (false, false) => Kind::Block,
        };
        let mut rng = Rng::new(seed);
        if single || sequence {
            let mut case = self.start(&mut rng, seed, memory);
            match single {
                true => self.single(&mut rng, &mut case, image),
                false => self.sequence(&mut rng, &mut case, image),
            }
            return self.finish(&mut rng, case);
        }
        let (mut case, pinned) = match self.last.take() {
            Some((key, image, case, pinned)) if (key, image) == (first, memory) => (case, pinned),
            _ => {
                let mut rng = Rng::new(first);
                let mut case = self.start(&mut rng, first, memory);
                let pinned = self.block(&mut rng, &mut case);
                (self.finish(&mut rng, case), pinned)
            }
        };
        self.last = Some((first, memory, case.clone(), pinned));
        if seed != first {
            case.seed = seed;
            vary(&mut rng, &mut case, pinned, self.options.bases);
            case = self.finish(&mut rng, case);
        }
        case
    }

    /// A case without code yet.
    fn start(&self, rng: &mut Rng, seed: u64, memory: u64) -> Case {
        let mut case = Case { seed, memory, ..Case::default() };
        random_state(rng, &mut case.state, self.options.bases);
        case.state.rip = if self.options.bits == 32 { CODE_32 } else { CODE }
            + match rng.below(20) {
                0 => rng.below(CODE_PAGES - 1) * PAGE + PAGE - 1 - rng.below(30),
                1 => CODE_PAGES * PAGE - 1 - rng.below(40),
                _ => rng.below(CODE_PAGES * PAGE - SLOT),
            };
        case
    }

    /// Fills the vector and x87 registers, with values worth having where the code uses any.
    fn finish(&mut self, rng: &mut Rng, mut case: Case) -> Case {
        if self.options.bits == 32 {
            case.state.gpr = std::array::from_fn(|i| if i < 8 { case.state.gpr[i] & 0xffff_ffff } else { 0 });
        }
        let used = used_by(&case);
        self.made.classes = used.classes;
        for (register, value) in case.state.ymm.iter_mut().enumerate() {
            match used.vectors >> register & 1 {
                // Gathers have had their indices chosen.
                _ if used.indices >> register & 1 != 0 => (),
                0 => value.as_chunks_mut::<8>().0.iter_mut().for_each(|lane| *lane = rng.word().to_le_bytes()),
                _ => *value = rng.ymm(),
            }
        }
        let st = &mut case.state.x87.st;
        match used.x87 {
            true => *st = std::array::from_fn(|_| rng.extended()),
            false => *st = std::array::from_fn(|_| [rng.word() as u8; 10]),
        }
        case
    }

    /// A random form of the wanted classes, as bytes that decode to an instruction that is tested.
    fn piece(&mut self, rng: &mut Rng, shape: &Shape, rip: u64, common: bool) -> Piece {
        let long = usize::from(!shape.narrow);
        loop {
            let classes = if common { &self.common[long] } else { &self.classes[long] };
            let total = classes.iter().map(|(w, _)| w).sum();
            let mut at = rng.below(total);
            let (_, forms) = classes
                .iter()
                .find(|(w, _)| {
                    let here = at < *w;
                    at = at.wrapping_sub(*w);
                    here
                })
                .expect("weights sum to the total");
            let form = &forms[rng.below(forms.len() as u64) as usize];
            encode_into(rng, form, shape, &mut self.encoded);
            let Some(piece) = decode(&self.encoded, rip) else { continue };
            let mnemonic = piece.instruction.mnemonic();
            if matches!(mnemonic, Mnemonic::Wrfsbase | Mnemonic::Wrgsbase) && !self.options.bases {
                continue;
            }
            // Whether one with a clear mask looks at its segment, null in 32-bit code, is the CPU's choice.
            let segment = piece.instruction.memory_segment();
            let null = shape.narrow && matches!(segment, Register::FS | Register::GS);
            let masked = is_masked_store(&piece.instruction);
            if masked && (null || piece.instruction.op0_kind() == OpKind::MemorySegDI) {
                continue;
            }
            return piece;
        }
    }

    fn shape(&self) -> Shape {
        let memory = (self.options.class == Some(Class::Mem)).then_some(true);
        Shape { memory, narrow: self.options.bits == 32, ..Shape::default() }
    }

    /// A piece of a block: common instructions, and any now and then.
    pub(crate) fn block_piece(&mut self, rng: &mut Rng, shape: &Shape, rip: u64, pinned: Pinned) -> Piece {
        loop {
            let any = rng.percent(2) && self.options.class.is_none();
            let mut piece = match any {
                true => self.piece(rng, &Shape { plain: false, ..shape.clone() }, rip, false),
                false => self.piece(rng, shape, rip, true),
            };
            if any && !matches!(piece.instruction.flow_control(), FlowControl::Next) {
                continue;
            }
            edge_immediate(rng, &mut piece);
            if self.suits_sequence(rng, &piece, pinned, 1) {
                return piece;
            }
        }
    }

    fn single(&mut self, rng: &mut Rng, case: &mut Case, image: &[u8]) {
        let mut piece = self.piece(rng, &self.shape(), case.state.rip, false);
        edge_immediate(rng, &mut piece);
        let pinned = Pinned::default();
        self.prepare(rng, case, &mut piece, pinned, image);
        if let Some(target) = relative_target(&piece) {
            let distance = match rng.below(10) {
                0..2 => 0,
                2..8 => rng.below(100) as i64,
                8 => i64::from(rng.word() as i32),
                _ => (rng.below(1 << 20) as i64) * 4096 - case.state.rip as i64 % 4096,
            };
            set_target(&mut piece, target, distance);
        }
        case.code = piece.bytes().to_vec();
    }

    fn sequence(&mut self, rng: &mut Rng, case: &mut Case, image: &[u8]) {
        let mut pinned = Pinned { pointers: 1 << RSP | 1 << 6 | 1 << 7, indices: 0, counters: 0 };
        let narrow = bits_at(case.state.rip) == 32;
        let registers = if narrow { 8 } else { 16 };
        for _ in 0..2 {
            pinned.pointers |= 1 << rng.below(registers);
            pinned.indices |= 1 << rng.below(registers);
        }
        pinned.indices &= !pinned.pointers;
        // Some sequences are a loop's body; its counter is a register that stays as it is in the body.
        let counters: Vec<u8> = (0..registers as u8).filter(|r| pinned.indices >> r & 1 != 0).collect();
        let looped = if rng.percent(25) && !counters.is_empty() { Some(rng.pick(&counters)) } else { None };
        // The pointers of some of those move from iteration to iteration, over the ends of their pages.
        let strides = looped.is_some() && !narrow && rng.percent(60);
        let most = if strides { rng.pick(&[4, 40, 40, 200]) } else { 4 };
        pinned.counters = looped.map_or(0, |register| 1 << register);
        for register in 0..16 {
            if pinned.pointers >> register & 1 != 0 {
                let region = if rng.percent(70) && !narrow { HIGH } else { LOW };
                case.state.gpr[register] = region + PAGE + 256 + rng.below(2 * PAGE - 512);
            } else if pinned.indices >> register & 1 != 0 {
                let counts = looped == Some(register as u8);
                case.state.gpr[register] = if counts { 2 + rng.below(most) } else { rng.below(64) };
            }
        }
        let list = |mask: u32| (0..registers as u8).filter(|r| mask >> r & 1 != 0).collect();
        let kept = pinned.pointers | pinned.indices;
        let (bases, indices, data) = (list(pinned.pointers), list(pinned.indices), list(!kept));
        let shape = Shape { bases, indices, data, ..self.shape() };
        let count = 2 + rng.below(11) as usize;
        let mut pieces: Vec<Piece> = Vec::with_capacity(count);
        let mut line = Line::new(looped.is_some());
        let mut rip = case.state.rip;
        for _ in 0..count * 4 {
            if pieces.len() == count {
                break;
            }
            let mut piece = self.piece(rng, &shape, rip, false);
            edge_immediate(rng, &mut piece);
            if !self.suits_sequence(rng, &piece, pinned, 8) {
                continue;
            }
            if !line.push(piece.instruction) {
                continue;
            }
            self.prepare(rng, case, &mut piece, pinned, image);
            rip += piece.bytes().len() as u64;
            pieces.push(piece);
        }
        link_jumps(rng, &mut pieces);
        case.code = pieces.iter().flat_map(Piece::bytes).copied().collect();
        if strides {
            for register in 0..16u8 {
                let free = (pinned.pointers | pinned.indices) >> register & 1 != 0 && looped != Some(register);
                if free && usize::from(register) != RSP && rng.percent(70) {
                    advance(rng, &mut case.code, register, pinned.indices >> register & 1 != 0);
                }
            }
        }
        if let Some(counter) = looped {
            close_loop(&mut case.code, counter, narrow);
        }
    }

    /// Whether a sequence goes on after `piece`, with its pointers intact, but for `lost` percent of those that
    /// would write one.
    fn suits_sequence(&mut self, rng: &mut Rng, piece: &Piece, pinned: Pinned, lost: u64) -> bool {
        let instruction = &piece.instruction;
        match instruction.flow_control() {
            FlowControl::Next | FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => (),
            FlowControl::Call => (),
            _ => return rng.percent(3),
        }
        if matches!(
            instruction.mnemonic(),
            Mnemonic::Popf
                | Mnemonic::Popfd
                | Mnemonic::Popfq
                | Mnemonic::Wrfsbase
                | Mnemonic::Wrgsbase
                | Mnemonic::Maskmovq
                | Mnemonic::Maskmovdqu
                | Mnemonic::Vmaskmovdqu
        ) {
            return false;
        }
        if instruction.has_lock_prefix() && !instruction.op_kinds().any(|k| k == OpKind::Memory) {
            return rng.percent(3);
        }
        let moves = instruction.is_stack_instruction() || instruction.is_string_instruction();
        let kept = pinned.pointers | pinned.indices;
        let info = self.info.info_options(instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
        let overwrites = info
            .used_registers()
            .iter()
            .any(|used| writes(used.access()) && gpr_index(used.register()).is_some_and(|i| kept >> i & 1 != 0));
        // A loop ends by its counter, which nothing else may change.
        let counts = |register: Register| gpr_index(register).is_some_and(|i| pinned.counters >> i & 1 != 0);
        let counter_lost = info.used_registers().iter().any(|used| writes(used.access()) && counts(used.register()));
        if counter_lost || pinned.counters >> RCX & 1 != 0 && writes_counter(instruction) {
            return false;
        }
        moves || !overwrites || rng.percent(lost)
    }

    /// Chooses registers, displacement and memory for `piece`.
    fn prepare(&mut self, rng: &mut Rng, case: &mut Case, piece: &mut Piece, pinned: Pinned, image: &[u8]) {
        let instruction = piece.instruction;
        if pinned.pointers == 0 {
            self.aim_implicit(rng, case, &instruction);
        }
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        let kept = pinned.indices | pinned.pointers;
        if repeated && instruction.is_string_instruction() && kept >> RCX & 1 == 0 {
            case.state.gpr[RCX] = if rng.percent(96) { rng.below(30) } else { rng.integer() };
        }
        special_operands(rng, case, &instruction, pinned);
        let has_memory = instruction.op_kinds().any(|k| k == OpKind::Memory);
        if has_memory {
            // The displacement may change in the bytes; nothing that follows asks the instruction for it.
            let address = aim(rng, &mut case.state, piece, pinned);
            poke_operand(rng, case, piece, address, pinned, image);
        }
        jump_through_register(rng, case, piece, pinned);
    }

    /// Aims the implicit operands of stack and string instructions, XLAT, MASKMOV and LEAVE.
    fn aim_implicit(&mut self, rng: &mut Rng, case: &mut Case, instruction: &Instruction) {
        let low = bits_at(case.state.rip) == 32;
        case.state.gpr[RSP] = target(rng, 8, low);
        let info = self.info.info(instruction);
        for memory in info.used_memory() {
            let base = memory.base();
            let narrow = base.size() == 4;
            let Some(index) = gpr_index(base) else { continue };
            let explicit = instruction.op_kinds().any(|k| k == OpKind::Memory) && instruction.memory_base() == base;
            if explicit || !base.is_gpr() {
                continue;
            }
            let size = memory.memory_size().size().max(1) as u64;
            let segment = segment_base(&case.state, memory.segment());
            // Whether MASKMOV with a clear mask touches its page is the CPU's choice: give it a good one.
            let masked = is_masked_store(instruction);
            let wanted = if masked { LOW + PAGE + rng.below(2 * PAGE - 16) } else { target(rng, size, narrow) };
            let value = wanted.wrapping_sub(segment);
            case.state.gpr[index] = if narrow { value & 0xffff_ffff | rng.word() << 32 } else { value };
        }
        if matches!(instruction.mnemonic(), Mnemonic::Leave | Mnemonic::Enter) {
            case.state.gpr[5] = target(rng, 8, low);
        }
    }
}

/// Appends an instruction that moves `register`, an index or a pointer, by a constant.
fn advance(rng: &mut Rng, code: &mut Vec<u8>, register: u8, index: bool) {
    let by: i8 =
        if index { rng.pick(&[1, 1, 2, 8, -1]) } else { rng.pick(&[1, 2, 4, 8, 8, 16, 32, 64, 96, -1, -8, -64]) };
    let (high, low) = (register >> 3, register & 7);
    match rng.below(3) {
        // add or sub r64, imm8
        0 => code.extend_from_slice(&[0x48 | high, 0x83, 0xc0 | low, by as u8]),
        1 => code.extend_from_slice(&[0x48 | high, 0x83, 0xe8 | low, by.wrapping_neg() as u8]),
        // lea r64, [r64 + disp8], with a SIB byte, which any base can have
        _ => code.extend_from_slice(&[0x48 | high << 2 | high, 0x8d, 0x44 | low << 3, 0x20 | low, by as u8]),
    }
}

/// MASKMOVQ and MASKMOVDQU: whether one with a clear mask touches its page is the CPU's choice.
fn is_masked_store(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu)
}

fn writes(access: OpAccess) -> bool {
    !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
}

/// The encoding index of the full register that a general register is part of.
pub(crate) fn gpr_index(register: Register) -> Option<usize> {
    let full = register.full_register();
    full.is_gpr64().then(|| full.number())
}

/// Decodes the first instruction of `bytes` and cuts them to its length, if it is one that is tested.
/// Encodings that the decoder calls invalid are kept at a low rate elsewhere; not here.
fn decode(code: &[u8], rip: u64) -> Option<Piece> {
    let bits = bits_at(rip);
    let mut bytes = [0; 15];
    let length = code.len().min(15);
    bytes[..length].copy_from_slice(&code[..length]);
    let mut decoder = vendor::decoder(bits, &bytes, rip);
    let mut instruction = decoder.decode();
    let offsets = decoder.get_constant_offsets(&instruction);
    vendor::adapt(&mut instruction, &bytes);
    if instruction.is_invalid() || Forms::get(bits).of(instruction.code()).is_none() {
        return None;
    }
    Some(Piece { bytes, instruction, offsets })
}

/// What a case's code uses.
#[derive(Clone, Copy, Default)]
struct Used {
    /// See [`Made`].
    classes: u16,
    /// Vector registers that are named.
    vectors: u32,
    /// Those that are the indices of a gather.
    indices: u32,
    /// Some instruction is of the x87 or MMX.
    x87: bool,
}

fn used_by(case: &Case) -> Used {
    let rip = case.state.rip;
    let forms = Forms::get(bits_at(rip));
    let mut used = Used::default();
    let mut instruction = Instruction::default();
    let mut decoder = vendor::decoder(bits_at(rip), &case.code, rip);
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if let Some(form) = forms.of(instruction.code()) {
            let memory = form.class == Class::Int && instruction.memory_size() != MemorySize::Unknown;
            used.classes |= 1 << form.class as u16 | u16::from(memory) << Class::Mem as u16;
        }
        for operand in 0..instruction.op_count() {
            let register = instruction.op_register(operand);
            if register.is_vector_register() {
                used.vectors |= 1 << (register.number() & 15);
            }
            used.x87 |= register.is_mm() || register.is_st();
        }
        let index = instruction.memory_index();
        if index.is_vector_register() {
            used.indices |= 1 << (index.number() & 15);
        }
        // MASKMOV and BLENDV have operands that are not named; x87 instructions mostly too.
        let features = instruction.cpuid_features();
        used.x87 |= features
            .iter()
            .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX));
        used.vectors |= 1;
    }
    used
}

/// Another state for a block: what is not needed for its addresses and counts.
fn vary(rng: &mut Rng, case: &mut Case, pinned: Pinned, bases: bool) {
    let old = std::mem::take(&mut case.state);
    random_state(rng, &mut case.state, bases);
    let state = &mut case.state;
    state.rip = old.rip;
    let kept = pinned.pointers | pinned.indices | pinned.counters;
    for register in 0..16 {
        if kept >> register & 1 != 0 || rng.percent(40) {
            state.gpr[register] = old.gpr[register];
        }
        // Pointers stay in their page; that makes other ones of them meet or cross its end.
        if pinned.pointers >> register & 1 != 0 && rng.percent(60) {
            let page = old.gpr[register] & !(PAGE - 1);
            state.gpr[register] = page
                | match rng.below(4) {
                    0 => PAGE - 8 * (1 + rng.below(16)),
                    1 => 8 * rng.below(32),
                    2 => rng.below(PAGE),
                    _ => rng.below(PAGE) & !15,
                };
        }
    }
    if pinned.counters != 0 && rng.percent(50) {
        for register in (0..16).filter(|r| pinned.counters >> r & 1 != 0) {
            state.gpr[register] = 1 + rng.below(old.gpr[register].clamp(1, 64));
        }
    }
    state.ymm = old.ymm;
}

/// A general register, flag, vector and x87 state full of edge values.
fn random_state(rng: &mut Rng, state: &mut State, bases: bool) {
    state.gpr = std::array::from_fn(|_| rng.integer());
    let status = rng.word() & 0x8d5;
    state.rflags = 0x202 | status | if rng.percent(12) { 0x400 } else { 0 };
    if bases {
        let mut base = || match rng.below(6) {
            0 => 0,
            1 => LOW + rng.below(PAGE),
            2 => rng.integer() as i32 as i64 as u64 & 0x7fff_ffff,
            _ => HIGH + PAGE + rng.below(PAGE),
        };
        (state.fs_base, state.gs_base) = (base(), base());
    }
    let modes = (rng.word() & 0xe000) as u32;
    let modes = if rng.percent(60) { 0 } else { modes | if rng.percent(20) { 0x40 } else { 0 } };
    let masks = if rng.percent(96) { 0x1f80 } else { (rng.word() & 0x1f80) as u32 };
    state.mxcsr = modes | masks | if rng.percent(50) { 0 } else { (rng.word() & 0x3f) as u32 & (masks >> 7) };
    state.x87 = random_x87(rng);
}

fn random_x87(rng: &mut Rng) -> X87 {
    let modes = if rng.percent(60) { 0x300 } else { (rng.word() & 0xf00) as u16 };
    let masks = if rng.percent(96) { 0x3f } else { (rng.word() & 0x3f) as u16 };
    // Flags of unmasked exceptions stay clear: their summary bit would have to agree.
    let flags = (rng.word() & 0x7f) as u16 & (masks | 0x40);
    X87 {
        control: 0x40 | modes | masks,
        status: (rng.word() & 0x7f00) as u16 | if rng.percent(50) { 0 } else { flags },
        tag: match rng.below(4) {
            0 => 0xff,
            1 => 0,
            _ => rng.word() as u8,
        },
        st: [[0; 10]; 8],
    }
}

/// An address for an access of `size` bytes: mostly good, sometimes each kind of bad.
fn target(rng: &mut Rng, size: u64, low: bool) -> u64 {
    let region = if low || rng.percent(25) { LOW } else { HIGH };
    let inside = |rng: &mut Rng| {
        let page = rng.pick(&[1, 1, 2, 2, 5]);
        region + page * PAGE + rng.below(PAGE.saturating_sub(size).max(1))
    };
    let crossing = |rng: &mut Rng, page: u64| region + page * PAGE - 1 - rng.below(size.max(2) - 1);
    match rng.below(100) {
        0..60 => inside(rng) & !(size.next_power_of_two().min(64) - 1),
        60..72 => inside(rng),
        72..82 => crossing(rng, 2),
        82..85 => crossing(rng, 3),
        85..87 => crossing(rng, 4),
        87..91 => region + 3 * PAGE + rng.below(PAGE),
        91..93 => region + rng.below(PAGE),
        93..95 => crossing(rng, 6),
        95..96 => crossing(rng, 1),
        96..97 if !low => rng
            .pick(&[0x8000_0000_0000_0000u64, 0x0000_8000_0000_0000, 0xffff_7fff_ffff_fff8, 0x7fff_ffff_ffff])
            .wrapping_add(rng.below(16)),
        97..98 if !low => 0xffff_8000_0000_0000 + rng.below(1 << 40),
        98..99 => CODE + rng.below(PAGE),
        _ => inside(rng),
    }
}

fn segment_base(state: &State, segment: Register) -> u64 {
    match segment {
        Register::FS => state.fs_base,
        Register::GS => state.gs_base,
        _ => 0,
    }
}

/// Aims the explicit memory operand; returns the linear address it came to, as far as can be told.
fn aim(rng: &mut Rng, state: &mut State, piece: &mut Piece, pinned: Pinned) -> Option<u64> {
    let instruction = piece.instruction;
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    if index.is_vector_register() {
        aim_vector(rng, state, piece, pinned);
        return None;
    }
    let narrow = base.size() == 4 && base != Register::None
        || index.size() == 4 && index != Register::None
        || base == Register::None && index == Register::None && instruction.memory_displ_size() == 4;
    let size = instruction.memory_size().size().max(1) as u64;
    let segment = segment_base(state, instruction.memory_segment());
    let absolute = base == Register::None
        && index == Register::None
        && instruction.memory_displ_size() == 8
        && piece.offsets.displacement_size() == 4;
    let wanted = target(rng, size, narrow || absolute).wrapping_sub(segment);
    let scale = u64::from(instruction.memory_index_scale());
    let displacement = instruction.memory_displacement64();
    if base.is_ip() {
        let distance = wanted.wrapping_sub(instruction.next_ip());
        piece.set_displacement(distance);
        return Some(wanted.wrapping_add(segment));
    }
    let base_index = gpr_index(base);
    let index_index = if index == Register::None { None } else { gpr_index(index) };
    let fixed = |i: usize| pinned.pointers >> i & 1 != 0 || pinned.indices >> i & 1 != 0;
    let set = |state: &mut State, rng: &mut Rng, i: usize, value: u64| {
        state.gpr[i] = if narrow { value & 0xffff_ffff | rng.word() << 32 } else { value };
    };
    match (base_index, index_index) {
        (None, None) => piece.set_displacement(wanted),
        (Some(b), None) if !fixed(b) => set(state, rng, b, wanted.wrapping_sub(displacement)),
        (None, Some(i)) if !fixed(i) => {
            set(state, rng, i, wanted.wrapping_sub(displacement) / scale);
            let rest = wanted.wrapping_sub((wanted.wrapping_sub(displacement) / scale).wrapping_mul(scale));
            piece.set_displacement(rest);
        }
        (Some(b), Some(i)) if b == i && !fixed(b) => {
            set(state, rng, b, wanted.wrapping_sub(displacement) / (scale + 1))
        }
        (Some(b), Some(i)) if !fixed(b) => {
            if !fixed(i) && rng.percent(80) {
                let value = rng.below(128).wrapping_sub(64);
                set(state, rng, i, value);
            }
            let offset = state.gpr[i].wrapping_mul(scale);
            set(state, rng, b, wanted.wrapping_sub(displacement).wrapping_sub(offset));
        }
        (b, i) => {
            let at = b.map_or(0, |b| state.gpr[b]).wrapping_add(i.map_or(0, |i| state.gpr[i]).wrapping_mul(scale));
            let near = b.map_or(wanted, |_| at.wrapping_add(rng.below(512)).wrapping_sub(256));
            if piece.offsets.displacement_size() == 4 {
                piece.set_displacement(near.wrapping_sub(at));
            }
        }
    }
    (!narrow).then(|| wanted.wrapping_add(segment))
}

/// Gathers: a base in the middle of data, and small indices.
fn aim_vector(rng: &mut Rng, state: &mut State, piece: &mut Piece, pinned: Pinned) {
    let instruction = piece.instruction;
    let scale = i64::from(instruction.memory_index_scale());
    let wide = rng.percent(10);
    let number = instruction.memory_index().number();
    let long = matches!(
        instruction.mnemonic(),
        Mnemonic::Vgatherqpd | Mnemonic::Vgatherqps | Mnemonic::Vpgatherqq | Mnemonic::Vpgatherqd
    );
    let mut index = || {
        let range = if wide { 9000 } else { 1000 } / scale;
        rng.below(2 * range as u64) as i64 - range
    };
    for lane in state.ymm[number & 15].chunks_mut(if long { 8 } else { 4 }) {
        let bytes = index().to_le_bytes();
        lane.copy_from_slice(&bytes[..lane.len()]);
    }
    let base = instruction.memory_base();
    if let Some(b) = gpr_index(base)
        && pinned.pointers >> b & 1 == 0
    {
        let displacement = instruction.memory_displacement64();
        let segment = segment_base(state, instruction.memory_segment());
        let region = if base.size() == 4 { LOW } else { HIGH };
        state.gpr[b] = (region + 2 * PAGE).wrapping_sub(displacement).wrapping_sub(segment);
    } else if base == Register::None {
        piece.set_displacement(LOW + 2 * PAGE);
    }
}

/// Replaces half of the immediates by edge values.
fn edge_immediate(rng: &mut Rng, piece: &mut Piece) {
    let (at, size) = (piece.offsets.immediate_offset(), piece.offsets.immediate_size());
    let branch = !matches!(piece.instruction.flow_control(), FlowControl::Next);
    if size == 0 || branch || rng.percent(50) {
        return;
    }
    piece.bytes[at..at + size].copy_from_slice(&rng.integer().to_le_bytes()[..size]);
    // The only ones that anything asks for: counts of shifts.
    if piece.instruction.op_kinds().any(|kind| kind == OpKind::Immediate8) {
        piece.instruction.set_immediate8(piece.bytes[at]);
    }
}

/// Register operands that random values would rarely make interesting.
fn special_operands(rng: &mut Rng, case: &mut Case, instruction: &Instruction, pinned: Pinned) {
    use Mnemonic::*;
    let free = |i: usize| pinned.pointers >> i & 1 == 0 && pinned.indices >> i & 1 == 0;
    let gpr = &mut case.state.gpr;
    match instruction.mnemonic() {
        // A quotient that fits, most of the time.
        Div | Idiv if rng.percent(70) => {
            if free(RDX) {
                gpr[RDX] = rng.below(4).wrapping_sub(rng.below(2));
            }
            if free(RAX) && rng.percent(50) {
                gpr[RAX] = rng.below(1 << 14);
            }
        }
        Bt | Bts | Btr | Btc if instruction.op1_kind() == OpKind::Register => {
            if let Some(i) = gpr_index(instruction.op1_register())
                && free(i)
            {
                gpr[i] = if rng.percent(80) { rng.below(4096).wrapping_sub(2048) } else { rng.integer() };
            }
        }
        Bzhi | Bextr | Shl | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd if free(RCX) && rng.percent(60) => {
            gpr[RCX] = rng.integer() & !0xff | rng.below(70);
        }
        Loop | Loope | Loopne | Jrcxz | Jecxz if free(RCX) && rng.percent(60) => {
            gpr[RCX] = rng.below(3) | if rng.percent(30) { 1 << 32 } else { 0 };
        }
        Xlatb if free(3) => gpr[RAX] = gpr[RAX] & !0xff | rng.below(64),
        Fscale | Fprem | Fprem1 | Fyl2x | Fpatan if rng.percent(60) => {
            case.state.x87.tag = 0xff;
        }
        _ => (),
    }
}

/// Memory contents that some instructions need to be interesting, put at the operand's address.
fn poke_operand(rng: &mut Rng, case: &mut Case, piece: &Piece, address: Option<u64>, pinned: Pinned, image: &[u8]) {
    use Mnemonic::*;
    let instruction = &piece.instruction;
    let Some(address) = address else { return };
    let Some(at) = data_offset(address, 16) else { return };
    let free = |i: usize| pinned.pointers >> i & 1 == 0 && pinned.indices >> i & 1 == 0;
    let word = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().expect("8 bytes"));
    match instruction.mnemonic() {
        Ldmxcsr | Vldmxcsr if rng.percent(85) => {
            let value = 0x1f80 | (rng.word() & 0xe07f) as u32;
            case.pokes.push((address, value.to_le_bytes().to_vec()));
        }
        Fldcw if rng.percent(85) => {
            let value = 0x37f | (rng.word() & 0xf00) as u16;
            case.pokes.push((address, value.to_le_bytes().to_vec()));
        }
        Cmpxchg if free(RAX) && rng.percent(50) && pinned.pointers == 0 && !uses(instruction, RAX) => {
            case.state.gpr[RAX] = word(at);
        }
        Cmpxchg8b | Cmpxchg16b if rng.percent(50) && pinned.pointers == 0 => {
            let wide = instruction.mnemonic() == Cmpxchg16b;
            let (low, high) = if wide { (word(at), word(at + 8)) } else { (word(at) & 0xffff_ffff, word(at) >> 32) };
            if !uses(instruction, RAX) && !uses(instruction, RDX) {
                (case.state.gpr[RAX], case.state.gpr[RDX]) = (low, high);
            }
        }
        Jmp | Call if pinned.pointers == 0 => {
            let target = code_target(rng, case.state.rip);
            case.pokes.push((address, target.to_le_bytes().to_vec()));
        }
        _ => (),
    }
}

/// Whether the memory operand's address uses general register `index`.
fn uses(instruction: &Instruction, index: usize) -> bool {
    [instruction.memory_base(), instruction.memory_index()].iter().any(|r| gpr_index(*r) == Some(index))
}

/// Where `size` bytes at `address` are in the image, if they are all data of one page.
fn data_offset(address: u64, size: u64) -> Option<usize> {
    let in_page = address % PAGE + size <= PAGE;
    backing_of(address).filter(|offset| in_page && *offset < DATA_BYTES)
}

/// Somewhere for an indirect jump: padding, data, nothing, or no canonical address.
fn code_target(rng: &mut Rng, rip: u64) -> u64 {
    match rng.below(10) {
        0 => HIGH + PAGE + rng.below(PAGE),
        1 => rng.integer(),
        2 => HIGH,
        3 => 1 << 63 | rng.word(),
        _ => (rip & !(PAGE - 1)) + (rip + 64 + rng.below(2000)) % PAGE,
    }
}

/// Gives indirect jumps, returns and POPF something good to take.
fn jump_through_register(rng: &mut Rng, case: &mut Case, piece: &Piece, pinned: Pinned) {
    if pinned.pointers != 0 {
        return;
    }
    let instruction = &piece.instruction;
    let stack = case.state.gpr[RSP];
    match instruction.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call if instruction.op0_kind() == OpKind::Register => {
            if let Some(i) = gpr_index(instruction.op0_register())
                && i != RSP
            {
                case.state.gpr[i] = code_target(rng, case.state.rip);
            }
        }
        Mnemonic::Ret if data_offset(stack, 8).is_some() => {
            let target = code_target(rng, case.state.rip);
            case.pokes.push((stack, target.to_le_bytes().to_vec()));
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            // No TF, AC or NT: the case would trap after its end, or in the host's kernel. No ID: the
            // kernel would keep it for the cases that follow.
            let flags = rng.word() & !(1 << 8 | 1 << 18 | 1 << 14 | 1 << 21);
            if data_offset(stack, 8).is_none() {
                case.state.gpr[RSP] = if bits_at(case.state.rip) == 32 { LOW } else { HIGH } + PAGE + 64;
            }
            case.pokes.push((case.state.gpr[RSP], flags.to_le_bytes().to_vec()));
        }
        _ => (),
    }
}

/// Offset and size of the displacement of a relative jump or call.
fn relative_target(piece: &Piece) -> Option<(usize, usize)> {
    let near = matches!(piece.instruction.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32);
    near.then(|| (piece.offsets.immediate_offset(), piece.offsets.immediate_size()))
}

/// Points a relative jump `distance` bytes behind its end; what does not fit becomes a distance of 0.
fn set_target(piece: &mut Piece, (at, size): (usize, usize), distance: i64) {
    let fits = if size == 1 { i64::from(distance as i8) == distance } else { i64::from(distance as i32) == distance };
    // Backward into the instruction itself, or just before it, could loop.
    let distance = if fits && !(-64..0).contains(&distance) { distance } else { 0 };
    piece.bytes[at..at + size].copy_from_slice(&distance.to_le_bytes()[..size]);
}

/// Whether it counts in RCX, which the decoder's register use does not always say.
fn writes_counter(instruction: &Instruction) -> bool {
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    repeated || matches!(instruction.mnemonic(), Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne)
}

/// Makes the sequence a loop: counts `counter` down and jumps to the start.
fn close_loop(code: &mut Vec<u8>, counter: u8, narrow: bool) {
    if !narrow {
        code.push(0x48 | counter >> 3);
    }
    code.extend([0xff, 0xc8 | counter & 7]); // dec
    let distance = -(code.len() as i32 + 6);
    code.extend([0x0f, 0x85]); // jnz
    code.extend_from_slice(&distance.to_le_bytes());
}

/// Points each relative jump of a sequence to the start of a later instruction, or behind the last.
fn link_jumps(rng: &mut Rng, pieces: &mut [Piece]) {
    for i in 0..pieces.len() {
        let Some(place) = relative_target(&pieces[i]) else { continue };
        let to = i + 1 + rng.below((pieces.len() - i) as u64) as usize;
        let distance: usize = pieces[i + 1..to].iter().map(|p| p.bytes().len()).sum();
        set_target(&mut pieces[i], place, distance as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::image;
    use crate::undefined::Flow;

    #[test]
    fn a_seed_names_a_case() {
        let image = image(3);
        for (seed, bits) in (0..500).zip([32, 64].into_iter().cycle()) {
            let options = Options { class: None, bits, bases: true };
            let (mut one, mut two) = (Generator::new(options), Generator::new(options));
            let case = one.case(seed, 3, &image);
            assert_eq!(case, two.case(seed, 3, &image));
            assert!(!case.code.is_empty());
            assert!(case.code.len() < 16 || Flow::new(&case.code, case.state.rip).reads_undefined().is_empty());
        }
    }

    /// FNV-1a of the lines of `count` cases.
    fn digest(options: Options, count: u64) -> u64 {
        let mut generator = Generator::new(options);
        let mut digest = 0xcbf2_9ce4_8422_2325;
        let mut memory = (0, image(0));
        for seed in 0..count {
            if memory.0 != seed / 512 {
                memory = (seed / 512, image(seed / 512));
            }
            for byte in generator.case(seed, memory.0, &memory.1).to_line().bytes() {
                digest = (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
        digest
    }

    #[test]
    fn a_seed_names_its_case_for_ever() {
        // Reports name cases by their seeds, and campaigns the ground they have covered. AMD's processors have other
        // instructions.
        let expected = [
            (None, 64, [0x56d3_3357_c3c1_1d51, 0xc460_459a_83a1_1542]),
            (None, 32, [0x1f43_59e1_640e_b556, 0xfcc3_09d7_e89e_3338]),
            (Some(Class::Block), 64, [0xff6b_ab35_062b_f4d8, 0xff6b_ab35_062b_f4d8]),
            (Some(Class::Mem), 64, [0xd522_d9c8_8069_cd32, 0xd522_d9c8_8069_cd32]),
        ];
        for (class, bits, expected) in expected {
            let expected = expected[usize::from(vendor::is_amd())];
            let found = digest(Options { class, bits, bases: true }, 2_000);
            assert_eq!(found, expected, "{class:?}, {bits} bits: {found:#x}");
        }
    }
}
