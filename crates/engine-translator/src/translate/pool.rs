//! Short lists of many owners, in one piece of memory: blocks are made by the ten thousand, and go all at once.

use std::marker::PhantomData;

/// A list in a [`Pool`] of the same type.
pub(super) struct List<T> {
    start: u32,
    length: u32,
    of: PhantomData<T>,
}

impl<T> Clone for List<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for List<T> {}

pub(super) struct Pool<T>(Vec<T>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool(Vec::new())
    }
}

impl<T: Copy> Pool<T> {
    pub(super) fn add(&mut self, items: &[T]) -> List<T> {
        let start = self.0.len() as u32;
        self.0.extend_from_slice(items);
        List { start, length: items.len() as u32, of: PhantomData }
    }

    pub(super) fn get(&self, list: List<T>) -> &[T] {
        &self.0[list.start as usize..][..list.length as usize]
    }

    /// Drops all lists; none that was added before may be asked for.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
