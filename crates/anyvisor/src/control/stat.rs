//! `anyvisor stat`, and the table of `run --stat`: what intercepts guest code, in the manner of `perf kvm stat`.

use super::client::{SOON, Target};
use super::commands::print;
use crate::cli::StatOptions;
use anyvisor_vmm::Result;
use serde_json::{Value, json};
use std::fmt::Write;

const PATH: &str = "/anyvisor/stat";

/// Shows what a VM counts, or lets it count for a while.
pub fn command(options: &StatOptions) -> Result<u8> {
    let target = Target::find(&options.id)?;
    let read = || {
        let answer = target.ask("GET", PATH, None, Some(SOON)).map_err(|trouble| target.error(trouble))?;
        Ok::<_, anyvisor_vmm::Error>(answer.unwrap_or_default())
    };
    let measure = |on: bool| {
        let asked = target.ask("PUT", PATH, Some(&json!({ "measure": on })), None);
        asked.map(drop).map_err(|trouble| target.error(trouble))
    };
    let mut seen = read()?;
    if seen["measuring"] != true {
        measure(true)?;
        std::thread::sleep(options.time);
        seen = read()?;
        measure(false)?;
    }
    print(&if options.json { format!("{seen:#}\n") } else { table(&seen) });
    Ok(0)
}

/// A table a vCPU of what [`anyvisor_vmm::control::statistics`] gives. `time%` is the part of the time in
/// interceptions, which is said in the heading; halts are waiting, and stand apart.
pub fn table(statistics: &Value) -> String {
    let mut out = String::new();
    for vcpu in statistics["vcpus"].as_array().into_iter().flatten() {
        // Writing to a string cannot fail.
        let _ = write_table(&mut out, vcpu);
    }
    out
}

const HALT: &str = "halt";

fn write_table(out: &mut String, vcpu: &Value) -> std::fmt::Result {
    let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or(0);
    let empty = vec![];
    let events = vcpu["events"].as_array().unwrap_or(&empty);
    let sum =
        |key: &str| events.iter().filter(|event| event["event"] != HALT).map(|event| number(event, key)).sum::<u64>();
    let (samples, time, elapsed) = (sum("samples"), sum("time_ns"), number(vcpu, "elapsed_ns"));
    let halted: u64 = events.iter().filter(|event| event["event"] == HALT).map(|event| number(event, "time_ns")).sum();
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    writeln!(
        out,
        "vCPU {}: {samples} interceptions in {:.2} s, {:.2}% of the time; halted {:.2}%",
        number(vcpu, "vcpu"),
        elapsed as f64 / 1e9,
        percent(time, elapsed),
        percent(halted, elapsed),
    )?;
    let [event, samples_of, part, part_of_time, min, max, average] =
        ["event", "samples", "samples%", "time%", "min", "max", "avg"];
    writeln!(out, "{event:>20} {samples_of:>10} {part:>9} {part_of_time:>7} {min:>11} {max:>11} {average:>11}")?;
    let micros = |ns: u64| format!("{:.2}us", ns as f64 / 1000.0);
    for event in events {
        let name = event["event"].as_str().unwrap_or("?");
        let (n, total) = (number(event, "samples"), number(event, "time_ns"));
        let share = |part, whole| if name == HALT { "-".into() } else { format!("{:.2}%", percent(part, whole)) };
        writeln!(
            out,
            "{name:>20} {n:>10} {:>9} {:>7} {:>11} {:>11} {:>11}",
            share(n, samples),
            share(total, time),
            micros(number(event, "min_ns")),
            micros(number(event, "max_ns")),
            micros(total / n.max(1)),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_an_event() {
        let event = |name, samples, time| json!({ "event": name, "samples": samples, "time_ns": time, "min_ns": 100, "max_ns": 9_000 });
        let events = [event("halt", 2, 500_000_000), event("I/O port", 30, 75_000), event("CPUID", 10, 25_000)];
        let text = table(&json!({ "vcpus": [{ "vcpu": 1, "elapsed_ns": 1_000_000_000, "events": events }] }));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "vCPU 1: 40 interceptions in 1.00 s, 0.01% of the time; halted 50.00%");
        let words = |line: usize| lines[line].split_whitespace().collect::<Vec<_>>();
        assert_eq!(words(1), ["event", "samples", "samples%", "time%", "min", "max", "avg"]);
        assert_eq!(words(2)[..4], ["halt", "2", "-", "-"]);
        assert_eq!(words(3), ["I/O", "port", "30", "75.00%", "75.00%", "0.10us", "9.00us", "2.50us"]);
        assert_eq!(lines.len(), 5);
    }
}
