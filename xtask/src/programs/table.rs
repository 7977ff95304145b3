//! The table of a run of programs.

use super::Program;
use crate::bench::{Runner, host};
use crate::report::{cell, geometric_mean};
use std::collections::BTreeMap;
use std::fmt::Write;

type Samples = BTreeMap<Runner, Vec<f64>>;

const HEAD: &str = "| program | native s | QEMU s | anyvisor s | anyvisor/native | by CPU time | QEMU/anyvisor \
                    | by the host's clock | by CPU time |";

/// Everything as Markdown.
pub fn markdown(programs: &[Program], count: usize) -> String {
    let mut text = String::new();
    let mut line = |l: String| writeln!(text, "{l}").expect("writing to a string");
    line(format!("Host: {}. Medians of {count} runs. Times and first ratios by the guest's clock.", host()));
    line(String::new());
    line(HEAD.into());
    line("|---|---|---|---|---|---|---|---|---|".into());
    for program in programs {
        let seconds = |runner| cell(median(&program.seconds, runner), 2);
        line(format!(
            "| {} | {} | {} | {} | {} |",
            program.name,
            seconds(Runner::Native),
            seconds(Runner::Qemu),
            seconds(Runner::Anyvisor),
            program.ratios().map(|ratio| cell(ratio, 2)).join(" | "),
        ));
    }
    let means: Vec<_> = (0..RATIOS)
        .map(|n| geometric_mean(programs.iter().filter_map(|program| program.ratios()[n])))
        .map(|mean| format!("**{}**", cell(mean, 2)))
        .collect();
    line(format!("| **geometric mean** | | | | {} |", means.join(" | ")));
    text
}

const RATIOS: usize = 5;

impl Program {
    /// Ratios in the order of the columns.
    fn ratios(&self) -> [Option<f64>; RATIOS] {
        use Runner::{Anyvisor, Native, Qemu};
        [
            ratio(&self.seconds, Anyvisor, Native),
            self.on_host(&self.cpu, Anyvisor, Native),
            ratio(&self.seconds, Qemu, Anyvisor),
            self.on_host(&self.wall, Qemu, Anyvisor),
            self.on_host(&self.cpu, Qemu, Anyvisor),
        ]
    }

    /// A ratio of times seen from outside. `openssl speed` and `7z b` find a speed in a time of their own choice, of
    /// which those say nothing.
    fn on_host(&self, samples: &Samples, over: Runner, under: Runner) -> Option<f64> {
        let finds_speed = ["openssl sha256", "openssl aes-256-gcm", "openssl rsa2048", "7z b"].contains(&&*self.name);
        ratio(samples, over, under).filter(|_| !finds_speed)
    }
}

fn ratio(samples: &Samples, over: Runner, under: Runner) -> Option<f64> {
    Some(median(samples, over)? / median(samples, under)?)
}

fn median(samples: &Samples, runner: Runner) -> Option<f64> {
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
        Program { name: name.into(), seconds: times.clone(), wall: times.clone(), cpu: times }
    }

    #[test]
    fn ratios_are_of_medians_and_means_geometric() {
        let text = markdown(&[program("gcc", 1.0, 8.0, 2.0), program("7z b", 1.0, 18.0, 2.0)], 3);
        assert!(text.contains("| gcc | 1.00 | 8.00 | 2.00 | 2.00 | 2.00 | 4.00 | 4.00 | 4.00 |"), "{text}");
        assert!(text.contains("| 7z b | 1.00 | 18.00 | 2.00 | 2.00 | – | 9.00 | – | – |"), "{text}");
        assert!(
            text.contains("| **geometric mean** | | | | **2.00** | **2.00** | **6.00** | **4.00** | **4.00** |"),
            "{text}"
        );
    }
}
