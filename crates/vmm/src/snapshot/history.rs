//! What a running VM has written since each of its snapshots.
//!
//! The engine's log of written pages starts anew each time it is asked. So that a save that fails loses
//! nothing, and that any earlier snapshot can be a parent, what it gives is kept in a list: one bitmap for
//! each stretch of time between two snapshots. What was written since a snapshot is in its bitmap or a later one.

use super::Checksum;
use anyvisor_engine::{DirtyPages, Vm};
use std::collections::VecDeque;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Snapshots that can be a parent: the latest ones.
const KEPT: usize = 16;

/// A set of pages by number.
#[derive(Clone, Debug, Default)]
pub(super) struct PageSet(Vec<u64>);

impl PageSet {
    fn new(pages: u64) -> PageSet {
        PageSet(vec![0; pages.div_ceil(64) as usize])
    }

    pub fn contains(&self, page: u64) -> bool {
        self.0.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    fn insert(&mut self, page: u64) {
        if let Some(word) = self.0.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }

    fn join(&mut self, other: &PageSet) {
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }
}

/// A stretch of time.
struct Stretch {
    /// The snapshot with which it begins; `None` while that is being written, and if it failed.
    since: Option<Checksum>,
    /// What was written in it.
    written: PageSet,
}

/// Marks a snapshot that is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark(u64);

/// The stretches of a VM's life since its first snapshot.
pub struct History {
    /// Where its memory is: starts and sizes, ascending.
    places: Vec<(u64, u64)>,
    stretches: VecDeque<Stretch>,
    /// Number of the first stretch in the list.
    first: u64,
}

impl History {
    /// For a VM with this memory that has not been saved.
    pub fn new(memory: &GuestMemoryMmap) -> History {
        let places = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        History { places, stretches: VecDeque::new(), first: 0 }
    }

    /// For a VM with this memory that goes on from snapshot `since`. Starts the log.
    ///
    /// # Errors
    /// The engine's.
    pub fn since(memory: &GuestMemoryMmap, since: Checksum, vm: &dyn Vm) -> anyvisor_engine::Result<History> {
        vm.log_dirty(true)?;
        let mut history = History::new(memory);
        history.stretches.push_back(Stretch { since: Some(since), written: PageSet::new(history.pages()) });
        Ok(history)
    }

    fn pages(&self) -> u64 {
        self.places.iter().map(|(_, size)| size / super::PAGE).sum()
    }

    /// Closes the stretch that ends now, for a snapshot that is to be written, and begins the next. The first
    /// time, it starts the log.
    ///
    /// # Errors
    /// The engine's.
    pub(super) fn mark(&mut self, vm: &dyn Vm) -> anyvisor_engine::Result<Mark> {
        if self.stretches.is_empty() {
            vm.log_dirty(true)?;
        } else {
            match vm.take_dirty() {
                Ok(dirty) => self.add(&dirty),
                Err(error) => {
                    // Some of it may be lost: nothing saved so far can be a parent any more.
                    self.first += self.stretches.len() as u64;
                    self.stretches.clear();
                    return Err(error);
                }
            }
        }
        if self.stretches.len() == KEPT {
            self.stretches.pop_front();
            self.first += 1;
        }
        self.stretches.push_back(Stretch { since: None, written: PageSet::new(self.pages()) });
        Ok(Mark(self.first + self.stretches.len() as u64 - 1))
    }

    fn add(&mut self, dirty: &DirtyPages) {
        let Some(last) = self.stretches.back_mut() else { return };
        for gpa in dirty.addresses() {
            if let Some(page) = page_number(&self.places, gpa) {
                last.written.insert(page);
            }
        }
    }

    /// The snapshot at `mark` is written, as `checksum`.
    pub(super) fn succeeded(&mut self, mark: Mark, checksum: Checksum) {
        let at = mark.0.checked_sub(self.first).and_then(|n| usize::try_from(n).ok());
        if let Some(stretch) = at.and_then(|n| self.stretches.get_mut(n)) {
            stretch.since = Some(checksum);
        }
    }

    /// What was written between snapshot `parent` and `mark`; `None` if this VM does not know `parent`.
    pub(super) fn written_since(&self, parent: Checksum, mark: Mark) -> Option<PageSet> {
        let from = self.stretches.iter().position(|stretch| stretch.since == Some(parent))?;
        let to = usize::try_from(mark.0.checked_sub(self.first)?).ok()?;
        let mut all = PageSet::new(self.pages());
        self.stretches.range(from..to).for_each(|stretch| all.join(&stretch.written));
        Some(all)
    }
}

/// Number of the page at guest-physical address `gpa` in a machine with memory in `places`.
fn page_number(places: &[(u64, u64)], gpa: u64) -> Option<u64> {
    let mut before = 0;
    for &(start, size) in places {
        if (start..start + size).contains(&gpa) {
            return Some((before + gpa - start) / super::PAGE);
        }
        before += size;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;

    #[test]
    fn pages_are_numbered_through_all_ram() {
        let ram = (3 << 30) + (1 << 20);
        let number = |flash, gpa| page_number(&layout::memory_pieces(ram, flash), gpa);
        assert_eq!(number(0, 0xfff), Some(0));
        assert_eq!(number(0, 0xbfff_f000), Some((3 << 18) - 1));
        assert_eq!(number(0, 0xc000_0000), None);
        assert_eq!(number(0, 1 << 32), Some(3 << 18));
        assert_eq!(number(0, (1 << 32) + (1 << 20)), None);
        assert_eq!(number(8192, 0xffff_f000), Some((3 << 18) + 1));
        assert_eq!(number(8192, 1 << 32), Some((3 << 18) + 2));
    }
}
