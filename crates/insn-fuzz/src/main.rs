//! `insn-fuzz`: the differential fuzzer's command line; `cargo xtask fuzz-insn` calls it.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use anyvisor_insn_fuzz::case::Case;
use anyvisor_insn_fuzz::forms::Class;
use anyvisor_insn_fuzz::fuzz::{Bench, Plan, Survey, Tally, case_of_seed, describe, run, survey};
use anyvisor_insn_fuzz::guest::Executor;
use clap::Parser;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Compares random instructions on the host CPU, the interpreter and the translator.
#[derive(Parser)]
#[command(name = "insn-fuzz")]
struct Args {
    /// How many cases to run.
    #[arg(long, default_value_t = 1_000_000)]
    cases: u64,
    /// Names the cases: those with this and the following numbers.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop after this many seconds, whatever --cases says.
    #[arg(long)]
    seconds: Option<u64>,
    /// Only instructions of this class.
    #[arg(long)]
    class: Option<Class>,
    /// 64-bit code, or 32-bit code (compatibility mode).
    #[arg(long, default_value = "64", value_parser = ["32", "64"])]
    bits: String,
    /// Only this executor; else both.
    #[arg(long)]
    engine: Option<EngineName>,
    /// Processes that share the cases.
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// Stop after this many different findings.
    #[arg(long, default_value_t = 1)]
    findings: usize,
    /// Run the cases of this file (a line each, `#` comments) instead of random ones.
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Print the case with number --seed instead of running it.
    #[arg(long)]
    print: bool,
    /// Say what the cases are made of instead of running them.
    #[arg(long)]
    survey: bool,
    /// Run this one case, as a report shows it.
    #[arg(long)]
    case: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum EngineName {
    Interpreter,
    Translator,
}

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("insn-fuzz: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether no difference was found.
fn start(args: &Args) -> Result<bool> {
    if args.jobs > 1 {
        return share(args);
    }
    let executors: &[Executor] = match args.engine {
        None => &[Executor::Interpreter, Executor::Translator],
        Some(EngineName::Interpreter) => &[Executor::Interpreter],
        Some(EngineName::Translator) => &[Executor::Translator],
    };
    let mut bench = Bench::new(executors)?;
    if let Some(line) = &args.case {
        return replay(&mut bench, line);
    }
    if let Some(path) = &args.replay {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        return replay(&mut bench, &text);
    }
    let mut options = bench.options();
    options.class = args.class;
    options.bits = if args.bits == "32" { 32 } else { 64 };
    if args.print {
        println!("{}", case_of_seed(options, args.seed).to_line());
        return Ok(true);
    }
    let began = Instant::now();
    let plan = Plan {
        seed: args.seed,
        cases: args.cases,
        options,
        findings: args.findings,
        deadline: args.seconds.map(|s| began + Duration::from_secs(s)),
    };
    if args.survey {
        let Survey { cases, codes, blocks, instructions, encodings, shapes, forms } = survey(&plan);
        println!(
            "{cases} cases: {codes} codes, {blocks} of them of several instructions; {instructions} instructions: \
             {encodings} different encodings, {shapes} but for displacement and immediate, of {forms} forms"
        );
        return Ok(true);
    }
    let mut found = 0;
    let tally = run(&mut bench, &plan, |finding| {
        found += 1;
        println!("{}", describe(finding));
    });
    summary(&tally, began.elapsed(), found);
    Ok(found == 0)
}

fn summary(tally: &Tally, took: Duration, found: u64) {
    let mut stops: Vec<_> = tally.stops.iter().collect();
    stops.sort();
    let stops: Vec<_> = stops.iter().map(|(vector, count)| format!("{vector}: {count}")).collect();
    println!(
        "{} cases in {:.1} s ({:.0} a second), {found} differences; ends by vector {}; {} endless, {} stray",
        tally.cases,
        took.as_secs_f64(),
        tally.cases as f64 / took.as_secs_f64(),
        stops.join(", "),
        tally.hangs,
        tally.strays
    );
}

fn replay(bench: &mut Bench, text: &str) -> Result<bool> {
    let mut good = true;
    let mut count = 0;
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let case = Case::from_line(line.strip_prefix("case ").unwrap_or(line))?;
        count += 1;
        if let (_, Some(finding)) = bench.check(&case) {
            good = false;
            println!("{}", describe(&finding));
        }
    }
    println!("{count} cases replayed, {}", if good { "no differences" } else { "with differences" });
    Ok(good)
}

/// Splits the cases among processes: the executors' signal handlers want a process each.
fn share(args: &Args) -> Result<bool> {
    let program = std::env::current_exe().context("finding this program")?;
    let each = args.cases.div_ceil(args.jobs);
    let mut children = Vec::new();
    for job in 0..args.jobs {
        let mut command = Command::new(&program);
        command.arg(format!("--seed={}", args.seed + job * each));
        command.arg(format!("--cases={}", each.min(args.cases - (job * each).min(args.cases))));
        command.arg(format!("--findings={}", args.findings));
        command.args(args.seconds.map(|s| format!("--seconds={s}")));
        command.args(args.class.map(|c| format!("--class={}", value_name(&c))));
        command.arg(format!("--bits={}", args.bits));
        command.args(args.engine.map(|e| format!("--engine={}", value_name(&e))));
        children.push(command.spawn().context("starting a job")?);
    }
    let mut good = true;
    for mut child in children {
        let status = child.wait()?;
        match status.code() {
            Some(0) => (),
            Some(1) => good = false,
            _ => bail!("a job ended with {status}"),
        }
    }
    Ok(good)
}

fn value_name<T: clap::ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}
