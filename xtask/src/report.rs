//! The table of a bench run, and its place in docs/performance.md.

use crate::bench::{Results, Row, Runner};
use crate::root;
use anyhow::{Context, Result};
use std::fmt::Write;

/// Classes in the order of the table. `boot` has no native time.
const CLASSES: [&str; 6] = ["int", "fp", "mem", "sys", "smp", "time"];

/// The geometric mean; `None` of nothing.
pub fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.into_iter().map(f64::ln).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}

/// Everything as Markdown.
pub fn markdown(results: &Results) -> String {
    let mut text = String::new();
    let mut line = |l: String| writeln!(text, "{l}").expect("writing to a string");
    line(format!("Host: {}. Scale {}, medians of {} runs.", results.host, results.scale, results.runs));
    line(String::new());
    line(
        "| class | benchmark | native s | QEMU s | anyvisor s | QEMU/native | anyvisor/native | QEMU/anyvisor |".into(),
    );
    line("|---|---|---|---|---|---|---|---|".into());
    for class in CLASSES {
        let rows: Vec<&Row> = results.rows.iter().filter(|r| r.class == class).collect();
        for row in &rows {
            line(row_line(row));
        }
        if !rows.is_empty() {
            line(mean_line(class, &rows));
        }
    }
    let all: Vec<&Row> = results.rows.iter().filter(|r| r.class != "boot").collect();
    line(mean_line("all", &all));
    line(String::new());
    if let Some(boot) = results.rows.iter().find(|r| r.class == "boot") {
        let time = |runner| boot.seconds.get(&runner).map_or("–".into(), |s| format!("{s:.2} s"));
        let factor = speedup(boot).map_or("–".into(), |f| format!("{f:.2}"));
        let (qemu, ours) = (time(Runner::Qemu), time(Runner::Anyvisor));
        line(format!("Boot to init (guest time): QEMU {qemu}, anyvisor {ours}, speed over QEMU {factor}."));
    }
    if let Some(footprint) = results.footprint {
        line(format!(
            "At a shell prompt: {:.1} MiB of memory over the guest's RAM, {:.2}% of a host CPU.",
            footprint.overhead_kib as f64 / 1024.0,
            footprint.idle_cpu * 100.0
        ));
    }
    text
}

fn speedup(row: &Row) -> Option<f64> {
    Some(row.seconds.get(&Runner::Qemu)? / row.seconds.get(&Runner::Anyvisor)?)
}

pub fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".into(), |v| format!("{v:.digits$}"))
}

fn row_line(row: &Row) -> String {
    let seconds = |runner| cell(row.seconds.get(&runner).copied(), 3);
    format!(
        "| {} | {} | {} | {} | {} | {} | {} | {} |",
        row.class,
        row.name,
        seconds(Runner::Native),
        seconds(Runner::Qemu),
        seconds(Runner::Anyvisor),
        cell(row.over_native(Runner::Qemu), 2),
        cell(row.over_native(Runner::Anyvisor), 2),
        cell(speedup(row), 2),
    )
}

fn mean_line(class: &str, rows: &[&Row]) -> String {
    let mean = |of: &dyn Fn(&Row) -> Option<f64>| cell(geometric_mean(rows.iter().filter_map(|r| of(r))), 2);
    format!(
        "| **{class}** | **geometric mean** | | | | **{}** | **{}** | **{}** |",
        mean(&|r| r.over_native(Runner::Qemu)),
        mean(&|r| r.over_native(Runner::Anyvisor)),
        mean(&speedup),
    )
}

/// Puts the benchmark's table and chart between their markers of docs/performance.md.
///
/// # Errors
/// When the file cannot be read or written, or has no markers.
pub fn write(table: &str) -> Result<()> {
    write_section("bench", &format!("{table}\n![Time over native, by benchmark](performance.svg)"))
}

/// Puts what `cargo xtask COMMAND` made between its markers of docs/performance.md.
///
/// # Errors
/// As for [`write`].
pub fn write_section(command: &str, content: &str) -> Result<()> {
    let path = root().join("docs/performance.md");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let text = replace(&text, command, content)
        .with_context(|| format!("{}: the markers {:?} are missing", path.display(), markers(command)))?;
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

fn markers(command: &str) -> (String, String) {
    (format!("<!-- {command}:begin (written by cargo xtask {command}) -->"), format!("<!-- {command}:end -->"))
}

fn replace(text: &str, command: &str, content: &str) -> Option<String> {
    let (begin, end) = markers(command);
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{content}\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn row(name: &str, class: &str, native: f64, qemu: f64, ours: f64) -> Row {
        let seconds = BTreeMap::from([(Runner::Native, native), (Runner::Qemu, qemu), (Runner::Anyvisor, ours)]);
        Row { name: name.into(), class: class.into(), seconds }
    }

    #[test]
    fn means_are_geometric_and_by_class() {
        let rows = vec![row("a", "int", 1.0, 8.0, 2.0), row("b", "int", 1.0, 2.0, 8.0), row("c", "fp", 1.0, 4.0, 1.0)];
        let results = Results { rows, scale: 1.0, runs: 1, footprint: None, host: "test".into() };
        let text = markdown(&results);
        assert!(text.contains("| **int** | **geometric mean** | | | | **4.00** | **4.00** | **1.00** |"), "{text}");
        assert!(text.contains("| **fp** | **geometric mean** | | | | **4.00** | **1.00** | **4.00** |"), "{text}");
    }

    #[test]
    fn only_the_generated_part_changes() {
        let (begin, end) = markers("bench");
        let text = format!("before\n{begin}\nold\n{end}\nafter\n");
        let new = replace(&text, "bench", "new table").unwrap();
        assert!(new.starts_with("before\n") && new.ends_with("\nafter\n"));
        assert!(new.contains("new table") && !new.contains("old"));
        assert_eq!(replace(&new, "bench", "new table").unwrap(), new);
        assert_eq!(replace(&text, "programs", "x"), None);
    }
}
