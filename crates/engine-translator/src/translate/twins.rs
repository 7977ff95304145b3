//! Twins of blocks: where to go on when a shared probe does not fit.
//!
//! Accesses that share a probe have to be on one page, and a read that leads a write needs the right to write. Where
//! that does not hold, the instruction continues in a block without shared probes, made for that address. Finding it
//! takes longer than running it, so the miss handler looks here first: by the host address of the probe that missed.
//!
//! An entry serves [`SERVINGS`] times; then the translator looks at how fast they went by.
//! Entries name live code only: the translator forgets all of them when a twin dies.

/// How often an entry serves.
pub const SERVINGS: u8 = 64;

const ENTRIES: usize = 1024;

#[derive(Clone, Copy, Default)]
struct Entry {
    probe: u64,
    twin: u64,
    servings: u8,
}

/// Twins by the probes that they stand in for.
pub struct Twins {
    entries: Box<[Entry; ENTRIES]>,
    /// The `fault` thunk, which leaves translated code.
    pub fault: u64,
}

impl Default for Twins {
    fn default() -> Twins {
        Twins { entries: Box::new([Entry::default(); ENTRIES]), fault: 0 }
    }
}

impl Twins {
    /// Code to go on at after the miss of the probe that returns to host address `probe`, if that is known.
    pub fn of(&mut self, probe: u64) -> Option<u64> {
        let entry = &mut self.entries[index(probe)];
        if entry.probe != probe || entry.servings == 0 {
            return None;
        }
        entry.servings -= 1;
        Some(entry.twin)
    }

    /// Notes the twin for a probe. Returns how often it has served since it was noted last.
    pub fn note(&mut self, probe: u64, twin: u64) -> u8 {
        let entry = &mut self.entries[index(probe)];
        let served = if entry.probe == probe { SERVINGS - entry.servings } else { 0 };
        *entry = Entry { probe, twin, servings: SERVINGS };
        served
    }

    /// Some code has died.
    pub fn forget(&mut self) {
        self.entries.fill(Entry::default());
    }
}

fn index(probe: u64) -> usize {
    (probe ^ probe >> 10) as usize % ENTRIES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_serve_so_often_and_are_told_apart() {
        let mut twins = Twins::default();
        assert_eq!((twins.of(0x1234), twins.note(0x1234, 7)), (None, 0));
        for _ in 0..SERVINGS {
            assert_eq!(twins.of(0x1234), Some(7));
        }
        assert_eq!(twins.of(0x1234), None);
        assert_eq!(twins.note(0x1234, 8), SERVINGS);
        assert_eq!(twins.of(0x1234), Some(8));
        let same_place = 0x1234 ^ 0x400 ^ 1;
        assert_eq!((index(same_place), twins.of(same_place)), (index(0x1234), None));
        assert_eq!(twins.note(same_place, 9), 0);
        assert_eq!(twins.of(0x1234), None);
        twins.forget();
        assert_eq!(twins.of(same_place), None);
    }
}
