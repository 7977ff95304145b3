//! Limits on how much a device does in a second.
//!
//! **Idea.** A bucket holds what may be done at once and fills at a steady rate. Whoever finds it not empty may do
//! one thing of any size, and takes that size out of it, so that it may owe: the next one waits until the debt is paid. So
//! nothing is cut in pieces, and over time the rate is kept. Time comes in, in nanoseconds.

const SECOND: u128 = 1_000_000_000;

/// A limit of so many things a second.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: u64,
    most: i128,
    /// In billionths of a thing.
    level: i128,
    at: u64,
}

impl Bucket {
    /// A full bucket at time `now`: `rate` a second, at least 1, of which a tenth of a second's may come at once.
    pub fn new(rate: u64, now: u64) -> Bucket {
        let rate = rate.max(1);
        let most = (i128::from(rate) * SECOND as i128 / 10).max(SECOND as i128);
        Bucket { rate, most, level: most, at: now }
    }

    /// When the next thing may be done: `None` for now.
    pub fn wait(&mut self, now: u64) -> Option<u64> {
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        self.level = (self.level + i128::from(passed) * i128::from(self.rate)).min(self.most);
        // A thing is there when the level is above zero: at the latest a nanosecond after the debt is paid.
        (self.level <= 0).then(|| now + (self.level.unsigned_abs() / u128::from(self.rate)) as u64 + 1)
    }

    /// Takes `amount` of what is limited.
    pub fn take(&mut self, amount: u64) {
        self.level -= i128::from(amount) * SECOND as i128;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many things of `size` are done until `end`, by someone who does them as soon as they may.
    fn done(bucket: &mut Bucket, size: u64, end: u64) -> u64 {
        let (mut now, mut done) = (0, 0);
        while now < end {
            match bucket.wait(now) {
                Some(when) => {
                    assert!(when > now);
                    now = when;
                }
                None => {
                    bucket.take(size);
                    done += 1;
                }
            }
        }
        done
    }

    #[test]
    fn the_rate_is_kept() {
        for (rate, size, seconds) in [
            (1, 1, 1000),
            (100, 1, 1000),
            (1_000_000, 4096, 100),
            (10 << 20, 1 << 20, 1000),
            (7, 1000, 100_000),
            (1 << 40, 1 << 20, 1),
        ] {
            let done = done(&mut Bucket::new(rate, 0), size, seconds * 1_000_000_000) * size;
            let expected = rate * seconds;
            // What is in a full bucket comes on top, and the last one may owe.
            let more = rate / 10 + size + 1;
            assert!((expected - size..=expected + more).contains(&done), "{rate} {size}: {done}");
        }
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut bucket = Bucket::new(100, 0);
        let hour = 3_600_000_000_000;
        let mut burst = 0;
        while bucket.wait(hour).is_none() {
            bucket.take(1);
            burst += 1;
        }
        assert_eq!(burst, 10);
        assert_eq!(bucket.wait(hour), Some(hour + 1));
        assert_eq!(bucket.wait(hour - 1), Some(hour), "a clock that goes back changes nothing");
    }
}
