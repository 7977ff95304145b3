//! `insn-fuzz`: the differential fuzzer's command line; `cargo xtask fuzz-insn` calls it.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, anyhow, bail};
use anyvisor_insn_fuzz::bench::Bench;
use anyvisor_insn_fuzz::case::Case;
use anyvisor_insn_fuzz::forms::Class;
use anyvisor_insn_fuzz::fuzz::{Event, Plan, Survey, case_of_seed, describe, run, survey};
use anyvisor_insn_fuzz::guest::Executor;
use anyvisor_insn_fuzz::tally::Tally;
use clap::Parser;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// What a job's last line begins with; its counts follow.
const TALLY: &str = "tally ";

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
    /// Say after every so many seconds how far it is.
    #[arg(long, default_value_t = 60)]
    progress: u64,
    /// End with a line of counts for the process that has started this one, instead of a summary.
    #[arg(long, hide = true)]
    job: bool,
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
    let mut last = began;
    let tally = run(&mut bench, &plan, |event| match event {
        Event::Finding(finding) => println!("{}", describe(finding)),
        Event::Progress(tally) if last.elapsed().as_secs() >= args.progress => {
            last = Instant::now();
            println!("{}", headline(args, tally, began.elapsed()));
        }
        Event::Progress(_) => (),
    });
    match args.job {
        true => println!("{TALLY}{}", tally.to_line()),
        false => summary(args, &tally, began.elapsed()),
    }
    Ok(tally.different == 0)
}

/// One line: what was run, how fast, and what differed.
fn headline(args: &Args, tally: &Tally, took: Duration) -> String {
    let what = args.class.map_or("all classes".into(), |class| value_name(&class));
    format!(
        "seeds {} to {}, {what}, {} bits: {} of {} cases in {:.1} s ({:.0} a second), {} differences, {} not compared",
        args.seed,
        args.seed + args.cases.max(1) - 1,
        args.bits,
        tally.cases,
        args.cases,
        took.as_secs_f64(),
        tally.cases as f64 / took.as_secs_f64(),
        tally.different,
        tally.not_compared()
    )
}

fn summary(args: &Args, tally: &Tally, took: Duration) {
    println!("{}\n{tally}", headline(args, tally, took));
}

fn replay(bench: &mut Bench, text: &str) -> Result<bool> {
    let mut good = true;
    let mut count = 0;
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let case = Case::from_line(line.strip_prefix("case ").unwrap_or(line))?;
        count += 1;
        if let Some(finding) = bench.check(&case).finding() {
            good = false;
            println!("{}", describe(&finding));
        }
    }
    println!("{count} cases replayed, {}", if good { "no differences" } else { "with differences" });
    Ok(good)
}

/// Splits the cases among processes: the executors' signal handlers want a process each.
fn share(args: &Args) -> Result<bool> {
    let began = Instant::now();
    let program = std::env::current_exe().context("finding this program")?;
    let each = args.cases.div_ceil(args.jobs);
    let mut children = Vec::new();
    for job in 0..args.jobs {
        let mut command = Command::new(&program);
        command.arg("--job");
        command.arg(format!("--seed={}", args.seed + job * each));
        command.arg(format!("--cases={}", each.min(args.cases - (job * each).min(args.cases))));
        command.arg(format!("--findings={}", args.findings));
        command.arg(format!("--progress={}", args.progress));
        command.args(args.seconds.map(|s| format!("--seconds={s}")));
        command.args(args.class.map(|c| format!("--class={}", value_name(&c))));
        command.arg(format!("--bits={}", args.bits));
        command.args(args.engine.map(|e| format!("--engine={}", value_name(&e))));
        children.push(command.stdout(Stdio::piped()).spawn().context("starting a job")?);
    }
    // A thread for each, or one that says much would wait for those before it.
    let jobs: Vec<_> = children.into_iter().map(|child| std::thread::spawn(|| follow(child))).collect();
    // What the others have found counts, even if one has crashed.
    let (mut sum, mut crash) = (Tally::default(), None);
    for job in jobs {
        match job.join().unwrap_or_else(|_| Err(anyhow!("following a job failed"))) {
            Ok(tally) => sum.add(&tally),
            Err(error) => crash = crash.or(Some(error)),
        }
    }
    summary(args, &sum, began.elapsed());
    match crash {
        Some(error) => Err(error.context("the sum lacks the cases of a job")),
        None => Ok(sum.different == 0),
    }
}

/// Passes on what a job says; returns its counts.
fn follow(mut child: Child) -> Result<Tally> {
    let mut tally = None;
    for line in BufReader::new(child.stdout.take().context("a job's output")?).lines() {
        let line = line.context("reading a job's output")?;
        match line.strip_prefix(TALLY) {
            Some(counts) => tally = Some(Tally::from_line(counts)?),
            None => println!("{line}"),
        }
    }
    let status = child.wait()?;
    match (status.code(), tally) {
        (Some(0 | 1), Some(tally)) => Ok(tally),
        _ => bail!("a job ended with {status}"),
    }
}

fn value_name<T: clap::ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}
