//! Cases that once differed, replayed; and a bounded run of new ones.
//!
//! The host executor owns this process's signals, so everything is one test, in a process of its own.

use anyvisor_insn_fuzz::bench::{Bench, Verdict};
use anyvisor_insn_fuzz::case::Case;
use anyvisor_insn_fuzz::fuzz::{Event, Plan, describe, run};
use anyvisor_insn_fuzz::generate::Options;
use anyvisor_insn_fuzz::guest::Executor;

const KEPT: &str = include_str!("../cases/kept.txt");

/// New cases on each test run, a few seconds' worth.
const CASES: u64 = 200_000;

fn note(reports: &mut Vec<String>, event: Event) {
    if let Event::Finding(finding) = event {
        reports.push(describe(finding));
    }
}

#[test]
fn kept_and_random_cases_do_not_differ() {
    let mut bench = Bench::new(&[Executor::Interpreter, Executor::Translator]).unwrap();
    let mut reports = Vec::new();
    let mut kept = 0;
    for line in KEPT.lines().filter(|l| !l.starts_with('#') && !l.trim().is_empty()) {
        let case = Case::from_line(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        kept += 1;
        reports.extend(bench.check(&case).finding().as_ref().map(describe));
    }
    assert!(kept >= 20, "{kept} kept cases");
    // mov ecx, 200000h; dec ecx; jnz: done soon on the host, but not in the interpreter.
    let long = Case::from_line("code=b900002000ffc975fc rip=120100000 flags=202 memory=0 seed=1").unwrap();
    assert!(matches!(bench.check(&long), Verdict::TooLong));
    // mov al, [rax], at an address that only this process has.
    let mut own = Case { code: vec![0x8a, 0x00], ..Case::default() };
    own.state.gpr[0] = KEPT.as_ptr() as u64;
    assert!(matches!(bench.check(&own), Verdict::Elsewhere));
    let plan = Plan { seed: 1, cases: CASES, options: bench.options(), findings: 10, deadline: None };
    let tally = run(&mut bench, &plan, |event| note(&mut reports, event));
    let narrow = Plan { options: Options { bits: 32, ..plan.options }, cases: CASES / 4, ..plan };
    let narrow_tally = run(&mut bench, &narrow, |event| note(&mut reports, event));
    assert_eq!(narrow_tally.cases, CASES / 4);
    assert!(reports.is_empty(), "{} differences\n{}", reports.len(), reports.join("\n"));
    assert_eq!(tally.cases, CASES);
    // The cases are worth something: most run to their end, and every common kind of fault occurs.
    let stopped_by = |vector: u8| tally.stops.get(&vector).copied().unwrap_or(0);
    assert!(stopped_by(3) > CASES / 2, "{tally:?}");
    for vector in [0, 6, 12, 13, 14, 16, 19] {
        assert!(stopped_by(vector) > 0, "no case raised exception {vector}: {tally:?}");
    }
}
