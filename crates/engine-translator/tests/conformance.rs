//! The conformance suite on this engine, translating and interpreting.

use anyvisor_engine::conformance::{Bench, Outcome, cases};
use anyvisor_engine_translator::Translator;
use std::time::Duration;

/// Runs all cases; panics with all that failed.
fn all_pass(engine: &Translator) {
    let bench = Bench::new(engine, Duration::from_secs(30));
    let failed: Vec<String> = cases()
        .iter()
        .filter_map(|case| match bench.run(case) {
            Outcome::Failed(why) => Some(format!("{}: {why}", case.name)),
            Outcome::Ok | Outcome::Skipped(_) => None,
        })
        .collect();
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn translating() {
    all_pass(&Translator::new().expect("the host supports the engine"));
}

#[test]
fn interpreting() {
    all_pass(&Translator::interpreting().expect("the host supports the engine"));
}
