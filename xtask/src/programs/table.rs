//! The table of a run of programs.

use super::Program;
use crate::bench::{Runner, host};
use crate::report::{cell, geometric_mean};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Everything as Markdown.
pub fn markdown(programs: &[Program], count: usize) -> String {
    let mut text = String::new();
    let mut line = |l: String| writeln!(text, "{l}").expect("writing to a string");
    line(format!(
        "Host: {}. Medians of {count} runs; ratios over QEMU by the guest's clock and by the host's.",
        host()
    ));
    line(String::new());
    line(
        "| program | native s | QEMU s | anyvisor s | QEMU/native | anyvisor/native | QEMU/anyvisor | host's clock |"
            .into(),
    );
    line("|---|---|---|---|---|---|---|---|".into());
    for program in programs {
        let seconds = |runner| cell(median(&program.seconds, runner), 2);
        line(format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            program.name,
            seconds(Runner::Native),
            seconds(Runner::Qemu),
            seconds(Runner::Anyvisor),
            cell(program.ratio(Runner::Qemu, Runner::Native), 2),
            cell(program.ratio(Runner::Anyvisor, Runner::Native), 2),
            cell(program.ratio(Runner::Qemu, Runner::Anyvisor), 2),
            cell(program.wall_speedup(), 2),
        ));
    }
    let mean = |of: &dyn Fn(&Program) -> Option<f64>| cell(geometric_mean(programs.iter().filter_map(of)), 2);
    line(format!(
        "| **geometric mean** | | | | **{}** | **{}** | **{}** | **{}** |",
        mean(&|p| p.ratio(Runner::Qemu, Runner::Native)),
        mean(&|p| p.ratio(Runner::Anyvisor, Runner::Native)),
        mean(&|p| p.ratio(Runner::Qemu, Runner::Anyvisor)),
        mean(&Program::wall_speedup),
    ));
    text
}

impl Program {
    fn ratio(&self, over: Runner, under: Runner) -> Option<f64> {
        Some(median(&self.seconds, over)? / median(&self.seconds, under)?)
    }

    /// `openssl speed` and `7z b` find a speed in a time of their own choice: theirs says nothing on the host's clock.
    fn wall_speedup(&self) -> Option<f64> {
        let by_clock = !["openssl sha256", "openssl aes-256-gcm", "openssl rsa2048", "7z b"].contains(&&*self.name);
        let speedup = median(&self.wall, Runner::Qemu)? / median(&self.wall, Runner::Anyvisor)?;
        by_clock.then_some(speedup)
    }
}

fn median(samples: &BTreeMap<Runner, Vec<f64>>, runner: Runner) -> Option<f64> {
    let mut times = samples.get(&runner)?.clone();
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(name: &str, native: f64, qemu: f64, ours: f64) -> Program {
        let times = BTreeMap::from([
            (Runner::Native, vec![native]),
            (Runner::Qemu, vec![qemu, qemu * 3.0, qemu / 2.0]),
            (Runner::Anyvisor, vec![ours]),
        ]);
        Program { name: name.into(), seconds: times.clone(), wall: times }
    }

    #[test]
    fn ratios_are_of_medians_and_means_geometric() {
        let text = markdown(&[program("gcc", 1.0, 8.0, 2.0), program("7z b", 1.0, 18.0, 2.0)], 3);
        assert!(text.contains("| gcc | 1.00 | 8.00 | 2.00 | 8.00 | 2.00 | 4.00 | 4.00 |"), "{text}");
        assert!(text.contains("| 7z b | 1.00 | 18.00 | 2.00 | 18.00 | 2.00 | 9.00 | – |"), "{text}");
        assert!(text.contains("| **geometric mean** | | | | **12.00** | **2.00** | **6.00** | **4.00** |"), "{text}");
    }
}
