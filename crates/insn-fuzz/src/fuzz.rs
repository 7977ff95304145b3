//! The loop: generate, run on the host and on the engine, compare; then minimise what differs.

use crate::case::{Case, State, Stop, X87, image};
use crate::compare::{differences, memory_differences, same};
use crate::generate::{Generator, Options};
use crate::guest::{Executor, Guest};
use crate::host::Host;
use crate::layout::bits_at;
use crate::undefined::Flow;
use anyhow::Result;
use anyvisor_engine_translator::translate::fault;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use std::collections::{HashMap, HashSet};
use std::fmt::Write;

/// How often a finding is gone over to make it smaller, at most.
const MINIMISER_PASSES: usize = 16;
/// Cases in a row that share their memory image.
const CASES_PER_IMAGE: u64 = 512;

/// Host and engine side by side.
pub struct Bench {
    host: Host,
    guests: Vec<(Executor, Guest)>,
    /// An interpreter that looks where cases went which differ.
    tracer: Guest,
    /// How many did not count because they strayed.
    strays: u64,
    image: (u64, Vec<u8>),
}

/// A case on which an executor differs from the host.
#[derive(Clone, Debug)]
pub struct Finding {
    pub case: Case,
    pub executor: Executor,
    /// What differs, a line each.
    pub differences: String,
}

/// Counts of what a run saw.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub cases: u64,
    /// By vector; a case that ran to its end is a 3.
    pub stops: HashMap<u8, u64>,
    /// Cases skipped because the host did not end them.
    pub hangs: u64,
    /// Cases whose difference does not count, because they strayed (see [`Guest::strays`]).
    pub strays: u64,
}

impl Bench {
    /// # Errors
    /// When the host refuses memory or signals.
    pub fn new(executors: &[Executor]) -> Result<Bench> {
        let host = Host::new()?;
        let guests = executors.iter().map(|e| Ok((*e, Guest::new(*e)?))).collect::<Result<_>>()?;
        let tracer = Guest::new(Executor::Interpreter)?;
        Ok(Bench { host, guests, tracer, strays: 0, image: (0, image(0)) })
    }

    /// Options that suit this host.
    pub fn options(&self) -> Options {
        Options { class: None, bits: 64, bases: self.host.can_set_bases() }
    }

    /// Runs `case` everywhere; the first executor that differs from the host, if any.
    pub fn check(&mut self, case: &Case) -> (Stop, Option<Finding>) {
        if self.image.0 != case.memory {
            self.image = (case.memory, image(case.memory));
        }
        let host = self.host.run(case, &self.image.1);
        if host.stop == Stop::Hang {
            return (host.stop, None);
        }
        for (executor, guest) in &mut self.guests {
            // The translator runs twice: when it translates, and from what it has kept and linked. A kept case
            // runs so with probes hoisted and without, others one way or the other, in turns.
            let eager = case.seed >> 6 & 1 == 0;
            let runs = match executor {
                Executor::Translator if case.seed == 0 => &[true, true, false, false][..],
                Executor::Translator => &[eager, eager],
                Executor::Interpreter => &[false],
            };
            for &eager in runs {
                guest.translate_eagerly(eager);
                let faults = fault::page_faults();
                let outcome = guest.run(case, &self.image.1);
                let faults = fault::page_faults() - faults;
                let same_memory = self.host.data() == guest.data();
                if same_memory {
                    guest.set_dirty(self.host.dirty());
                }
                if same_memory && faults == 0 && same(case, &host, &outcome) {
                    continue;
                }
                let mut text = differences(case, *executor, &host, &outcome);
                text += &memory_differences(self.host.data(), guest.data());
                if faults != 0 {
                    writeln!(text, "  faults   of the host's pages by translated code: {faults}").expect("a string");
                }
                if !text.is_empty() {
                    // What such a case reads may be undefined, and nobody looked.
                    let flow = Flow::new(&case.code, case.state.rip);
                    if faults == 0 && self.tracer.strays(case, &self.image.1, &flow) {
                        self.strays += 1;
                        return (host.stop, None);
                    }
                    let finding = Finding { case: case.clone(), executor: *executor, differences: text };
                    return (host.stop, Some(finding));
                }
            }
        }
        (host.stop, None)
    }

    /// Makes a finding's case smaller for as long as its executor still differs from the host.
    pub fn minimise(&mut self, finding: Finding) -> Finding {
        let mut best = finding;
        // A difference that comes and goes could make each pass end elsewhere.
        for _ in 0..MINIMISER_PASSES {
            let before = best.case.clone();
            for smaller in smaller_codes(&best.case) {
                self.keep_if_different(&mut best, smaller);
            }
            let pokes = best.case.pokes.len();
            for i in (0..pokes).rev() {
                let mut smaller = best.case.clone();
                smaller.pokes.remove(i);
                self.keep_if_different(&mut best, smaller);
            }
            for change in state_changes() {
                let mut smaller = best.case.clone();
                change(&mut smaller.state);
                self.keep_if_different(&mut best, smaller);
            }
            if best.case == before {
                break;
            }
        }
        best
    }

    fn keep_if_different(&mut self, best: &mut Finding, case: Case) -> bool {
        if case == best.case || case.code.is_empty() {
            return false;
        }
        let executor = best.executor;
        match self.check(&case).1 {
            Some(finding) if finding.executor == executor => {
                *best = finding;
                true
            }
            _ => false,
        }
    }
}

/// The case without each one of its instructions.
fn smaller_codes(case: &Case) -> Vec<Case> {
    let mut decoder = Decoder::with_ip(bits_at(case.state.rip), &case.code, case.state.rip, DecoderOptions::NONE);
    let mut pieces = Vec::new();
    while decoder.can_decode() {
        let start = decoder.position();
        let _ = decoder.decode();
        pieces.push(start..decoder.position());
    }
    if pieces.len() < 2 {
        return Vec::new();
    }
    pieces
        .into_iter()
        .rev()
        .map(|piece| {
            let mut smaller = case.clone();
            smaller.code.drain(piece);
            smaller
        })
        .collect()
}

type Change = Box<dyn Fn(&mut State)>;

fn state_changes() -> Vec<Change> {
    let mut changes: Vec<Change> = vec![
        Box::new(|s| s.ymm = [[0; 32]; 16]),
        Box::new(|s| s.x87 = X87::default()),
        Box::new(|s| s.x87.st = [[0; 10]; 8]),
        Box::new(|s| s.x87.tag = 0xff),
        Box::new(|s| s.x87.status = 0),
        Box::new(|s| s.mxcsr = 0x1f80),
        Box::new(|s| s.rflags &= 0x602),
        Box::new(|s| s.rflags &= !0x400),
        Box::new(|s| s.fs_base = 0),
        Box::new(|s| s.gs_base = 0),
    ];
    for i in 0..16 {
        changes.push(Box::new(move |s| s.gpr[i] = 0));
        changes.push(Box::new(move |s| s.ymm[i] = [0; 32]));
    }
    for i in 0..8 {
        changes.push(Box::new(move |s| s.x87.st[i] = [0; 10]));
    }
    changes
}

/// What to run, and when to stop.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The first seed; cases have the seeds that follow it.
    pub seed: u64,
    pub cases: u64,
    pub options: Options,
    /// Stop after this many different findings.
    pub findings: usize,
    pub deadline: Option<std::time::Instant>,
}

/// Runs `plan`. Findings are minimised, one for each kind (see [`signature`]).
pub fn run(bench: &mut Bench, plan: &Plan, mut report: impl FnMut(&Finding)) -> Tally {
    let mut generator = Generator::new(plan.options);
    let mut tally = Tally::default();
    let mut seen: HashMap<String, u64> = HashMap::new();
    for seed in plan.seed..plan.seed + plan.cases {
        if seed % 256 == 0 && plan.deadline.is_some_and(|d| std::time::Instant::now() >= d) {
            break;
        }
        let memory = seed / CASES_PER_IMAGE;
        if bench.image.0 != memory {
            bench.image = (memory, image(memory));
        }
        let case = generator.case(seed, memory, &bench.image.1);
        let strays = bench.strays;
        let (stop, finding) = bench.check(&case);
        tally.cases += 1;
        tally.strays += bench.strays - strays;
        match stop {
            Stop::Exception { vector, .. } => *tally.stops.entry(vector).or_default() += 1,
            Stop::Hang => tally.hangs += 1,
        }
        if let Some(finding) = finding {
            let smallest = bench.minimise(finding);
            let count = seen.entry(signature(&smallest)).or_default();
            *count += 1;
            if *count == 1 {
                report(&smallest);
            }
            if seen.len() >= plan.findings {
                break;
            }
        }
    }
    tally
}

/// The case that a run with these options has for `seed`.
pub fn case_of_seed(options: Options, seed: u64) -> Case {
    let memory = seed / CASES_PER_IMAGE;
    Generator::new(options).case(seed, memory, &image(memory))
}

/// What the cases of a plan are made of.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    pub cases: u64,
    /// Different codes, and those of more than one instruction.
    pub codes: u64,
    pub blocks: u64,
    /// Instructions in those codes; different ones, with displacement and immediate and without; forms.
    pub instructions: u64,
    pub encodings: usize,
    pub shapes: usize,
    pub forms: usize,
}

/// Looks at the cases of `plan` without running them.
pub fn survey(plan: &Plan) -> Survey {
    let mut generator = Generator::new(plan.options);
    let mut memory = (0, image(0));
    let (mut encodings, mut shapes, mut forms) = (HashSet::new(), HashSet::new(), HashSet::new());
    let mut survey = Survey { cases: plan.cases, ..Survey::default() };
    let mut last = Vec::new();
    for seed in plan.seed..plan.seed + plan.cases {
        if memory.0 != seed / CASES_PER_IMAGE {
            memory = (seed / CASES_PER_IMAGE, image(seed / CASES_PER_IMAGE));
        }
        let case = generator.case(seed, memory.0, &memory.1);
        if case.code == last {
            continue;
        }
        survey.codes += 1;
        let before = survey.instructions;
        let mut decoder = Decoder::new(plan.options.bits, &case.code, DecoderOptions::NONE);
        while decoder.can_decode() {
            let start = decoder.position();
            let instruction = decoder.decode();
            let constants = decoder.get_constant_offsets(&instruction);
            let mut bytes = case.code[start..decoder.position()].to_vec();
            encodings.insert(bytes.clone());
            let (displacement, immediate) = (constants.displacement_offset(), constants.immediate_offset());
            bytes[displacement..displacement + constants.displacement_size()].fill(0);
            bytes[immediate..immediate + constants.immediate_size()].fill(0);
            shapes.insert(bytes);
            forms.insert(instruction.code());
            survey.instructions += 1;
        }
        survey.blocks += u64::from(survey.instructions > before + 1);
        last = case.code;
    }
    Survey { encodings: encodings.len(), shapes: shapes.len(), forms: forms.len(), ..survey }
}

/// What makes two findings the same bug, mostly: executor, instructions, and the first thing that differs.
pub fn signature(finding: &Finding) -> String {
    let mut text = format!("{:?} {}", finding.executor, bits_at(finding.case.state.rip));
    for instruction in Decoder::new(bits_at(finding.case.state.rip), &finding.case.code, DecoderOptions::NONE) {
        write!(text, " {:?}", instruction.code()).expect("writing to a string");
    }
    let first = finding.differences.split_whitespace().next().unwrap_or_default();
    let class = if first.starts_with('[') { "memory" } else { first.trim_end_matches(|c: char| c.is_ascii_digit()) };
    text + " " + class
}

/// A report for people: the code, what differs, the case as a line for `--replay`.
pub fn describe(finding: &Finding) -> String {
    let mut text = format!("{} differs from the host\n", finding.executor.name());
    let case = &finding.case;
    let mut formatter = IntelFormatter::new();
    let mut decoder = Decoder::with_ip(bits_at(case.state.rip), &case.code, case.state.rip, DecoderOptions::NONE);
    while decoder.can_decode() {
        let start = decoder.position();
        let instruction = decoder.decode();
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        let bytes: String = case.code[start..decoder.position()].iter().map(|b| format!("{b:02x}")).collect();
        writeln!(text, "  {:x}  {bytes:30}  {line}", instruction.ip()).expect("writing to a string");
    }
    text + &finding.differences + "  case " + &case.to_line() + "\n"
}
