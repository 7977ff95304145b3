//! Results, test by test, and their place in docs/conformance.md.

use crate::root;
use anyhow::{Context, Result};
use std::fmt::Write;

/// What became of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    /// It found that there is nothing for it to test.
    Skip,
    /// In a few words.
    Fail(String),
    /// Not run, because it cannot tell anything here.
    Aside,
}

impl Verdict {
    fn text(&self) -> String {
        match self {
            Verdict::Pass => "pass".into(),
            Verdict::Skip => "skip".into(),
            Verdict::Fail(how) => format!("**{how}**"),
            Verdict::Aside => "–".into(),
        }
    }

    /// As kept in a file.
    pub fn encode(&self) -> String {
        match self {
            Verdict::Pass => "pass".into(),
            Verdict::Skip => "skip".into(),
            Verdict::Aside => "aside".into(),
            Verdict::Fail(how) => format!("fail: {how}"),
        }
    }

    /// What [`Verdict::encode`] made.
    pub fn decode(text: &str) -> Option<Verdict> {
        Some(match text {
            "pass" => Verdict::Pass,
            "skip" => Verdict::Skip,
            "aside" => Verdict::Aside,
            _ => Verdict::Fail(text.strip_prefix("fail: ")?.into()),
        })
    }
}

/// One test on both.
pub struct Row {
    pub name: String,
    /// How many tests the row stands for.
    pub tests: usize,
    /// On the host itself, for suites of programs.
    pub native: Option<Verdict>,
    pub ours: Verdict,
    /// `None` if QEMU has not been asked.
    pub tcg: Option<Verdict>,
    /// Why it does not pass, or what to know about it.
    pub remark: String,
}

/// A suite's results.
pub struct Suite {
    /// As in the markers of the document.
    pub name: &'static str,
    /// What was run how.
    pub about: String,
    pub rows: Vec<Row>,
}

impl Suite {
    /// Tests that fail without a reason.
    pub fn unexplained(&self) -> Vec<&str> {
        let bad = |row: &&Row| matches!(row.ours, Verdict::Fail(_)) && row.remark.is_empty();
        self.rows.iter().filter(bad).map(|row| row.name.as_str()).collect()
    }

    /// Everything, as Markdown.
    pub fn markdown(&self) -> String {
        let native = self.rows.iter().any(|row| row.native.is_some());
        let head = match native {
            true => "| test | natively | anyvisor | QEMU TCG | remark |\n|---|---|---|---|---|\n",
            false => "| test | anyvisor | QEMU TCG | remark |\n|---|---|---|---|\n",
        };
        let mut text = format!("{} CPU: {}.\n\n{}\n\n{head}", self.about, super::host_cpu(), self.sums());
        let known = |verdict: &Option<Verdict>| verdict.as_ref().map_or("?".into(), Verdict::text);
        for row in &self.rows {
            let Row { name, ours, remark, .. } = row;
            let natively = if native { format!(" {} |", known(&row.native)) } else { String::new() };
            writeln!(text, "| {name} |{natively} {} | {} | {remark} |", ours.text(), known(&row.tcg))
                .expect("writing to a string");
        }
        text
    }

    fn sums(&self) -> String {
        let count =
            |is: &dyn Fn(&Row) -> bool| -> usize { self.rows.iter().filter(|row| is(row)).map(|row| row.tests).sum() };
        let pass = |verdict: &Option<Verdict>| *verdict == Some(Verdict::Pass);
        let fail = |verdict: &Option<Verdict>| matches!(verdict, Some(Verdict::Fail(_)));
        let mut text = format!(
            "Of {} tests anyvisor passes {} and fails {}",
            count(&|_| true),
            count(&|row| row.ours == Verdict::Pass),
            count(&|row| matches!(row.ours, Verdict::Fail(_))),
        );
        if self.rows.iter().any(|row| row.tcg.is_some()) {
            write!(
                text,
                "; QEMU's TCG passes {} and fails {}. {} pass here that fail there, and {} do not pass here that pass there.",
                count(&|row| pass(&row.tcg)),
                count(&|row| fail(&row.tcg)),
                count(&|row| row.ours == Verdict::Pass && fail(&row.tcg)),
                count(&|row| row.ours != Verdict::Pass && pass(&row.tcg)),
            )
            .expect("writing to a string");
        } else {
            text.push('.');
        }
        if self.rows.iter().any(|row| row.native.is_some()) {
            let (passed, lost) =
                (count(&|row| pass(&row.native)), count(&|row| pass(&row.native) && row.ours != Verdict::Pass));
            write!(text, " Natively {passed} pass, of which {lost} do not pass here.").expect("writing to a string");
        }
        text
    }

    /// Puts the table between the suite's markers of docs/conformance.md.
    ///
    /// # Errors
    /// The file cannot be read or written, or has no markers for the suite.
    pub fn write(&self) -> Result<()> {
        let path = root().join("docs/conformance.md");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let text = replace(&text, self.name, &self.markdown())
            .with_context(|| format!("{} has no markers for {}", path.display(), self.name))?;
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }
}

fn replace(text: &str, name: &str, table: &str) -> Option<String> {
    let begin = format!("<!-- {name}:begin (written by cargo xtask suites) -->");
    let end = format!("<!-- {name}:end -->");
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{table}{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, ours: Verdict, tcg: Option<Verdict>, remark: &str) -> Row {
        Row { name: name.into(), tests: 1, native: None, ours, tcg, remark: remark.into() }
    }

    #[test]
    fn sums_compare_both() {
        let fail = || Verdict::Fail("1 of 2".into());
        let rows = vec![
            row("a", Verdict::Pass, Some(fail()), ""),
            row("b", Verdict::Pass, Some(Verdict::Pass), ""),
            row("c", fail(), Some(Verdict::Pass), "why"),
            row("d", fail(), None, ""),
            row("e", Verdict::Aside, Some(Verdict::Skip), "no"),
        ];
        let suite = Suite { name: "s", about: "About.".into(), rows };
        let text = suite.markdown();
        assert!(
            text.contains("Of 5 tests anyvisor passes 2 and fails 2; QEMU's TCG passes 2 and fails 1. 1 pass here"),
            "{text}"
        );
        assert!(text.contains("| c | **1 of 2** | pass | why |"), "{text}");
        assert_eq!(suite.unexplained(), ["d"]);
    }

    #[test]
    fn rows_can_stand_for_many_and_tell_of_the_host() {
        let mut rows = vec![row("a", Verdict::Skip, None, ""), row("b", Verdict::Pass, Some(Verdict::Pass), "")];
        (rows[0].native, rows[1].native, rows[1].tests) = (Some(Verdict::Pass), Some(Verdict::Pass), 40);
        let text = Suite { name: "s", about: "About.".into(), rows }.markdown();
        assert!(
            text.contains("Of 41 tests anyvisor passes 40") && text.contains("Natively 41 pass, of which 1 do"),
            "{text}"
        );
        assert!(text.contains("| a | pass | skip | ? |  |"), "{text}");
    }

    #[test]
    fn only_the_suites_own_part_changes() {
        let markers = |name: &str| {
            format!("<!-- {name}:begin (written by cargo xtask suites) -->\nold {name}\n<!-- {name}:end -->\n")
        };
        let text = format!("before\n{}between\n{}after\n", markers("a"), markers("b"));
        let new = replace(&text, "b", "new\n").unwrap();
        assert!(new.contains("old a") && !new.contains("old b") && new.contains("new") && new.ends_with("after\n"));
        assert_eq!(replace(&text, "c", ""), None);
    }

    #[test]
    fn verdicts_are_kept() {
        for verdict in [Verdict::Pass, Verdict::Skip, Verdict::Aside, Verdict::Fail("x: y".into())] {
            assert_eq!(Verdict::decode(&verdict.encode()), Some(verdict));
        }
        assert_eq!(Verdict::decode("what"), None);
    }
}
