//! The fuzzer finds bugs: each of those that the translator lets a test plant, and none where there is none.

use anyvisor_engine_translator::translate::planted::{ALL, plant};
use anyvisor_insn_fuzz::bench::Bench;
use anyvisor_insn_fuzz::fuzz::{Event, Plan, run};
use anyvisor_insn_fuzz::guest::Executor;

/// Far more cases than any of the bugs needs.
const CASES: u64 = 60_000;

/// How many cases it took to find a difference, if one was found.
fn search() -> Option<u64> {
    // A new translator each time: nothing translated earlier is left.
    let mut bench = Bench::new(&[Executor::Translator]).unwrap();
    let plan = Plan { seed: 1, cases: CASES, options: bench.options(), findings: 1, deadline: None };
    let mut found = false;
    let tally = run(&mut bench, &plan, |event| found |= matches!(event, Event::Finding(_)));
    found.then_some(tally.cases)
}

#[test]
fn planted_bugs_are_found() {
    plant(None);
    assert_eq!(search(), None, "a difference without a planted bug");
    let mut missed = Vec::new();
    for bug in ALL {
        plant(Some(bug));
        let cases = search();
        plant(None);
        println!("{bug:?}: found after {cases:?} cases");
        missed.extend(cases.is_none().then_some(bug));
    }
    assert!(missed.is_empty(), "{missed:?} not found in {CASES} cases each");
}
