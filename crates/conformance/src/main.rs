//! `conformance`: runs the suite of `anyvisor_engine::conformance` on an engine of this host.
//!
//! One line a case: `ok`, `FAILED` with what was expected and seen, or `skipped` with the reason. Exit code 0 if
//! all passed, 1 if a case failed, 2 if the suite could not be run. It links statically, to be carried into a
//! nested Linux:
//! `RUSTFLAGS='-C target-feature=+crt-static' cargo build -p anyvisor-conformance --target x86_64-unknown-linux-gnu`.
#![forbid(unsafe_code)]

mod engines;

use anyhow::{Context, Result, anyhow};
use anyvisor_engine::conformance::{self, Bench, Case, Outcome, limits};
use clap::Parser;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A case that takes so long says how long.
const SLOW: Duration = Duration::from_secs(2);

/// Runs the conformance suite on an engine of this host.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The engine to test.
    #[arg(long, value_parser = engines::NAMES, required_unless_present = "list")]
    engine: Option<String>,
    /// Runs only cases whose name contains TEXT.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Prints the names of the cases and runs none.
    #[arg(long)]
    list: bool,
    /// Writes the lines to FILE too.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Skips what this host, or the emulator that it runs in, is known not to be able to run.
    #[arg(long, value_name = "HOST", value_parser = host)]
    host: Option<&'static limits::Host>,
    /// Runs the cases that --host would skip, and only those.
    #[arg(long, requires = "host")]
    limited: bool,
    /// Seconds after which a case counts as hung.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    patience: u64,
}

fn host(name: &str) -> Result<&'static limits::Host, String> {
    let names: Vec<_> = limits::ALL.iter().map(|host| host.name).collect();
    limits::ALL.iter().find(|host| host.name == name).ok_or_else(|| format!("known are: {}", names.join(", ")))
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("conformance: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether all cases passed.
fn run(options: &Options) -> Result<bool> {
    let wanted = |case: &Case| options.filter.as_ref().is_none_or(|text| case.name.contains(text));
    let cases: Vec<Case> = conformance::cases().into_iter().filter(wanted).collect();
    if options.list {
        for case in &cases {
            println!("{}", case.name);
        }
        return Ok(true);
    }
    if cases.is_empty() {
        return Err(anyhow!("no case has {:?} in its name; --list shows all", options.filter.as_deref().unwrap_or("")));
    }
    let engine = engines::open(options.engine.as_deref().context("--engine is missing")?)?;
    let bench = Bench::new(&*engine, Duration::from_secs(options.patience));
    let mut report = match &options.report {
        Some(path) => Some(File::create(path).with_context(|| format!("creating {}", path.display()))?),
        None => None,
    };
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let start = Instant::now();
    for case in &cases {
        let begun = Instant::now();
        // The name first: if the host goes down, it is the last thing seen.
        print!("{} ... ", case.name);
        std::io::stdout().flush().context("writing to standard output")?;
        let limit = options.host.and_then(|host| limits::of(host, &case.name));
        let outcome = match limit {
            Some(limit) if !options.limited => Outcome::Skipped(limit.reason.to_owned()),
            None if options.limited => Outcome::Skipped("not limited".to_owned()),
            _ => bench.run(case),
        };
        let outcome = match (outcome, options.host) {
            (Outcome::Failed(why), Some(host)) => match limits::excuse(host, &case.name, &why.to_string()) {
                Some(limit) => Outcome::Skipped(format!("{} ({why})", limit.reason)),
                None => Outcome::Failed(why),
            },
            (outcome, _) => outcome,
        };
        let line = match outcome {
            Outcome::Ok => {
                passed += 1;
                "ok".to_owned()
            }
            Outcome::Failed(why) => {
                failed += 1;
                format!("FAILED: {}", why.to_string().replace('\n', " "))
            }
            Outcome::Skipped(why) => {
                skipped += 1;
                format!("skipped: {why}")
            }
        };
        // In the lines of a slow run, where its time goes.
        let took = begun.elapsed();
        if took >= SLOW {
            println!("{line} ({:.1} s)", took.as_secs_f64())
        } else {
            println!("{line}")
        }
        if let Some(file) = &mut report {
            writeln!(file, "{} ... {line}", case.name).context("writing the report")?;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} cases on {}: {passed} passed, {failed} failed, {skipped} skipped, {seconds:.1} s",
        cases.len(),
        engine.name()
    );
    Ok(failed == 0)
}
