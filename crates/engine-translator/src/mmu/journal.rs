//! Which entries of a TLB have been filled since it was flushed, each named once.
//!
//! A guest that invalidates a page and touches it again, over and over, fills the same entry each time; whoever goes
//! through what is filled should not find it as often.

use crate::cpu::TLB_ENTRIES;

/// Indices in the order of their first fill.
pub struct Journal {
    indices: Vec<u16>,
    /// A bit for each that is in `indices`.
    noted: Box<[u64; TLB_ENTRIES / 64]>,
}

impl Default for Journal {
    fn default() -> Self {
        Journal { indices: Vec::new(), noted: Box::new([0; TLB_ENTRIES / 64]) }
    }
}

impl Journal {
    /// Notes that entry `index` is filled.
    pub fn note(&mut self, index: usize) {
        let (word, bit) = (&mut self.noted[index / 64], 1 << (index % 64));
        if *word & bit == 0 {
            *word |= bit;
            self.indices.push(index as u16);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.indices.iter().map(|&index| usize::from(index))
    }

    /// Forgets all: the entries are empty.
    pub fn clear(&mut self) {
        for index in self.indices.drain(..) {
            self.noted[usize::from(index) / 64] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Journal;

    #[test]
    fn each_entry_is_named_once_until_all_are_forgotten() {
        let mut journal = Journal::default();
        for index in [3, 8191, 3, 64, 64] {
            journal.note(index);
        }
        assert_eq!(journal.iter().collect::<Vec<_>>(), [3, 8191, 64]);
        journal.clear();
        journal.note(3);
        assert_eq!(journal.iter().collect::<Vec<_>>(), [3]);
    }
}
