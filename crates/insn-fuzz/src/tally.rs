//! What a run has seen, by kind of case, by class of instruction and by how cases ended; as a line that another
//! process can add up, and for people.

use crate::bench::Verdict;
use crate::case::Stop;
use crate::forms::Class;
use crate::generate::{Kind, Made};
use anyhow::{Context, Result};
use clap::ValueEnum;
use std::collections::BTreeMap;
use std::fmt;

/// Counts of cases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub cases: u64,
    /// By what they are made of: [`Kind::ALL`].
    pub kinds: [u64; Kind::ALL.len()],
    /// Cases with an instruction of a class, by [`Class`].
    pub classes: [u64; CLASSES],
    /// By the vector that ended them; a case that ran to its end is a 3.
    pub stops: BTreeMap<u8, u64>,
    /// Differences that count, all of them.
    pub different: u64,
    /// Not compared: the host did not end it.
    pub endless: u64,
    /// Not compared: the host ended it, after more instructions than an executor is given.
    pub too_long: u64,
    /// Differed, but does not count, because it met memory of the fuzzer's own.
    pub elsewhere: u64,
    /// Differed, but does not count, because it strayed (see [`crate::guest::Guest::strays`]).
    pub strays: u64,
}

/// How many classes there are.
pub const CLASSES: usize = Class::Block as usize + 1;

impl Tally {
    /// Counts a case that the generator has made so and that came to `verdict`.
    pub fn count(&mut self, made: Made, verdict: &Verdict) {
        self.cases += 1;
        self.kinds[made.kind as usize] += 1;
        for (class, count) in self.classes.iter_mut().enumerate() {
            *count += u64::from(made.classes >> class & 1);
        }
        match verdict {
            Verdict::Same(Stop::Exception { vector, .. }) => *self.stops.entry(*vector).or_default() += 1,
            Verdict::Same(Stop::Hang) | Verdict::Endless => self.endless += 1,
            Verdict::TooLong => self.too_long += 1,
            Verdict::Elsewhere => self.elsewhere += 1,
            Verdict::Stray => self.strays += 1,
            Verdict::Different(_) => self.different += 1,
        }
    }

    /// Adds what another run has seen.
    pub fn add(&mut self, other: &Tally) {
        for (mine, theirs) in self.counts_mut().into_iter().zip(other.clone().counts_mut()) {
            *mine += *theirs;
        }
        for (vector, count) in &other.stops {
            *self.stops.entry(*vector).or_default() += count;
        }
    }

    fn counts_mut(&mut self) -> Vec<&mut u64> {
        let single = [&mut self.cases, &mut self.different, &mut self.endless, &mut self.too_long];
        let single = single.into_iter().chain([&mut self.elsewhere, &mut self.strays]);
        single.into_iter().chain(&mut self.kinds).chain(&mut self.classes).collect()
    }

    /// The counts as one line of numbers.
    pub fn to_line(&self) -> String {
        let mut tally = self.clone();
        let counts: Vec<_> = tally.counts_mut().into_iter().map(|count| count.to_string()).collect();
        let stops: Vec<_> = self.stops.iter().map(|(vector, count)| format!("{vector}:{count}")).collect();
        format!("{} {}", counts.join(" "), stops.join(" ")).trim_end().to_owned()
    }

    /// Reads what [`Tally::to_line`] wrote.
    ///
    /// # Errors
    /// When the line is not of that form.
    pub fn from_line(line: &str) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut words = line.split_whitespace();
        for count in tally.counts_mut() {
            *count = words.next().context("a count is missing")?.parse()?;
        }
        for word in words {
            let (vector, count) = word.split_once(':').context("vector:count is wanted")?;
            tally.stops.insert(vector.parse()?, count.parse()?);
        }
        Ok(tally)
    }

    /// Cases that no executor's outcome was held against the host's.
    pub fn not_compared(&self) -> u64 {
        self.endless + self.too_long + self.elsewhere + self.strays
    }
}

impl fmt::Display for Tally {
    /// Some lines, of what cases were not compared, what they were made of, and how they ended.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let share = self.not_compared() as f64 / self.cases.max(1) as f64 * 1e6;
        writeln!(
            f,
            "  not compared: {} endless on the host, {} too long for an executor, {} in the fuzzer's own memory, {} strayed \
             ({share:.1} in a million)",
            self.endless, self.too_long, self.elsewhere, self.strays
        )?;
        let list = |items: Vec<String>| items.join(", ");
        let kinds = Kind::ALL.iter().zip(self.kinds).map(|(kind, count)| format!("{count} {}", kind.name())).collect();
        writeln!(f, "  made of: {}", list(kinds))?;
        let classes = Class::value_variants().iter().zip(self.classes).filter(|(_, count)| *count != 0);
        let name = |class: &Class| class.to_possible_value().expect("none is skipped").get_name().to_owned();
        writeln!(
            f,
            "  with instructions of class: {}",
            list(classes.map(|(class, count)| format!("{} {count}", name(class))).collect())
        )?;
        let stops = self.stops.iter().map(|(vector, count)| format!("{vector}: {count}")).collect();
        write!(f, "  ended by vector (3 is the end of the code): {}", list(stops))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tallies_are_added_up_by_lines() {
        let made = |kind, classes| Made { kind, classes };
        let end = |vector| Verdict::Same(Stop::Exception { vector, error: 0, cr2: 0 });
        let mut one = Tally::default();
        one.count(made(Kind::Single, 1), &end(3));
        one.count(made(Kind::Block, 3), &Verdict::TooLong);
        let mut other = Tally::default();
        other.count(made(Kind::Sequence, 2), &end(14));
        other.count(made(Kind::Sequence, 2), &Verdict::Stray);
        other.count(made(Kind::Sequence, 0), &Verdict::Endless);
        let mut sum = Tally::from_line(&one.to_line()).unwrap();
        sum.add(&Tally::from_line(&other.to_line()).unwrap());
        assert_eq!((sum.cases, sum.kinds, &sum.classes[..2]), (5, [1, 3, 1], &[2, 3][..]));
        assert_eq!((sum.not_compared(), sum.endless, sum.too_long, sum.strays), (3, 1, 1, 1));
        assert_eq!(sum.stops, BTreeMap::from([(3, 1), (14, 1)]));
        assert!(Tally::from_line("1 2").is_err());
        assert!(Tally::from_line(&(one.to_line() + " x")).is_err());
    }
}
