//! The loop: generate cases, check them, count; then minimise what differs.

use crate::bench::{Bench, Finding};
use crate::case::{Case, image};
use crate::generate::{Generator, Options};
use crate::layout::bits_at;
use crate::minimise::minimise;
use crate::tally::Tally;
use anyvisor_engine_translator::vendor;
use iced_x86::{Formatter, IntelFormatter};
use std::collections::HashSet;
use std::fmt::Write;
use std::time::Instant;

/// Cases in a row that share their memory image.
const CASES_PER_IMAGE: u64 = 512;
/// Cases in a row after which memory is compared that was left for later.
const CASES_PER_SETTLEMENT: u64 = 16;
const _: () = assert!(CASES_PER_IMAGE.is_multiple_of(CASES_PER_SETTLEMENT));
/// Seeds between two looks at the clock.
const CASES_PER_LOOK: u64 = 256;

/// What to run, and when to stop.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The first seed; cases have the seeds that follow it.
    pub seed: u64,
    pub cases: u64,
    pub options: Options,
    /// Stop after this many different findings.
    pub findings: usize,
    pub deadline: Option<Instant>,
}

/// What [`run`] tells while it runs.
pub enum Event<'a> {
    /// A finding of a new kind, minimised.
    Finding(&'a Finding),
    /// What has been counted so far, now and then.
    Progress(&'a Tally),
}

/// Runs `plan`. Findings are minimised, one for each kind (see [`signature`]).
pub fn run(bench: &mut Bench, plan: &Plan, mut report: impl FnMut(Event)) -> Tally {
    let mut generator = Generator::new(plan.options);
    let mut tally = Tally::default();
    let mut seen = HashSet::new();
    let mut note = |bench: &mut Bench, report: &mut dyn FnMut(Event), finding: Finding| {
        let smallest = minimise(bench, finding);
        if seen.insert(signature(&smallest)) {
            report(Event::Finding(&smallest));
        }
        seen.len() >= plan.findings
    };
    for seed in plan.seed..plan.seed + plan.cases {
        if seed.is_multiple_of(CASES_PER_LOOK) {
            if plan.deadline.is_some_and(|d| Instant::now() >= d) {
                break;
            }
            report(Event::Progress(&tally));
        }
        if seed.is_multiple_of(CASES_PER_SETTLEMENT)
            && let Some(finding) = bench.settle()
        {
            tally.different += 1;
            if note(bench, &mut report, finding) {
                return tally;
            }
        }
        let memory = seed / CASES_PER_IMAGE;
        let case = generator.case(seed, memory, bench.image(memory));
        let verdict = bench.check_soon(case);
        tally.count(generator.made(), &verdict);
        if let Some(finding) = verdict.finding()
            && note(bench, &mut report, finding)
        {
            return tally;
        }
    }
    if let Some(finding) = bench.settle() {
        tally.different += 1;
        note(bench, &mut report, finding);
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
        let mut decoder = vendor::decoder(plan.options.bits, &case.code, 0);
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
    for instruction in vendor::instructions(bits_at(finding.case.state.rip), &finding.case.code, 0) {
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
    let mut decoder = vendor::decoder(bits_at(case.state.rip), &case.code, case.state.rip);
    while decoder.can_decode() {
        let start = decoder.position();
        let mut instruction = decoder.decode();
        vendor::adapt(&mut instruction, &case.code[start..]);
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        let bytes: String = case.code[start..decoder.position()].iter().map(|b| format!("{b:02x}")).collect();
        writeln!(text, "  {:x}  {bytes:30}  {line}", instruction.ip()).expect("writing to a string");
    }
    text + &finding.differences + "  case " + &case.to_line() + "\n"
}
