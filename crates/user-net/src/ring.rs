//! A queue of bytes that grows as it is needed, up to a limit.

/// Smallest allocation, in bytes.
const FIRST: usize = 16 << 10;

/// Bytes, first in first out.
#[derive(Default)]
pub struct Ring {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Ring {
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The `length` bytes from `offset` on, in two parts, of which the second may be empty.
    ///
    /// # Panics
    /// There are fewer.
    pub fn slices(&self, offset: usize, length: usize) -> [&[u8]; 2] {
        assert!(offset + length <= self.length, "bytes that are there");
        if length == 0 {
            return [&[], &[]];
        }
        let from = (self.start + offset) % self.bytes.len();
        let front = length.min(self.bytes.len() - from);
        [&self.bytes[from..from + front], &self.bytes[..length - front]]
    }

    /// Room for more bytes, in one piece, of at most `limit` bytes in all; empty when it is full. Fill it and [`Ring::commit`].
    pub fn room(&mut self, limit: usize) -> &mut [u8] {
        if self.length == self.bytes.len() && self.length < limit {
            self.grow((self.bytes.len() * 2).clamp(FIRST, limit.max(FIRST)));
        }
        let size = self.bytes.len();
        let free = (size - self.length).min(limit.saturating_sub(self.length));
        if free == 0 {
            return &mut [];
        }
        let from = (self.start + self.length) % size;
        let end = size.min(from + free);
        &mut self.bytes[from..end]
    }

    /// The first `count` bytes of [`Ring::room`] have been filled.
    pub fn commit(&mut self, count: usize) {
        self.length += count;
        assert!(self.length <= self.bytes.len(), "no more than there was room for");
    }

    /// Appends as much of `bytes` as there is room for under `limit`, and returns how much that was.
    pub fn push(&mut self, bytes: &[u8], limit: usize) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let room = self.room(limit);
            let part = room.len().min(bytes.len() - done);
            if part == 0 {
                break;
            }
            room[..part].copy_from_slice(&bytes[done..done + part]);
            self.commit(part);
            done += part;
        }
        done
    }

    /// Drops the first `count` bytes.
    ///
    /// # Panics
    /// There are fewer.
    pub fn consume(&mut self, count: usize) {
        assert!(count <= self.length, "bytes that are there");
        self.length -= count;
        self.start = if self.length == 0 { 0 } else { (self.start + count) % self.bytes.len() };
    }

    /// Gives its memory back if it is empty.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            *self = Ring::default();
        }
    }

    fn grow(&mut self, size: usize) {
        let mut bytes = vec![0; size];
        let [front, back] = self.slices(0, self.length);
        bytes[..front.len()].copy_from_slice(front);
        bytes[front.len()..self.length].copy_from_slice(back);
        (self.bytes, self.start) = (bytes, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn a_ring_is_a_queue() {
        let (mut ring, mut model) = (Ring::default(), VecDeque::new());
        let (mut state, mut next) = (1u64, 0u8);
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let amount = (state >> 33) as usize % 5000;
            if state >> 63 == 0 {
                let bytes: Vec<u8> = (0..amount).map(|n| next.wrapping_add(n as u8)).collect();
                let taken = ring.push(&bytes, 50_000);
                assert_eq!(taken, amount.min(50_000 - model.len()));
                next = next.wrapping_add(taken as u8);
                model.extend(&bytes[..taken]);
            } else {
                let amount = amount.min(model.len());
                ring.consume(amount);
                model.drain(..amount);
            }
            assert_eq!(ring.len(), model.len());
            let offset = model.len() / 3;
            let [front, back] = ring.slices(offset, model.len() - offset);
            assert!(front.iter().chain(back).eq(model.iter().skip(offset)));
        }
        assert!(ring.room(10).is_empty() || ring.len() < 10);
    }
}
