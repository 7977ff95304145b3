//! Flows, found by who talks to whom and by number.

use std::collections::HashMap;
use std::net::SocketAddrV4;

/// Who talks to whom, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub guest: SocketAddrV4,
    pub remote: SocketAddrV4,
    pub ping: bool,
}

/// The number of a flow. Another that gets its place has another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id {
    pub index: u32,
    /// 24 bits.
    pub generation: u32,
}

pub struct Table<T> {
    slots: Vec<(u32, Option<(Key, T)>)>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Table<T> {
        Table { slots: Vec::new(), free: Vec::new(), by_key: HashMap::new() }
    }
}

impl<T> Table<T> {
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    pub fn find(&self, key: &Key) -> Option<Id> {
        let index = *self.by_key.get(key)?;
        Some(Id { index, generation: self.slots[index as usize].0 })
    }

    pub fn get(&mut self, id: Id) -> Option<(&Key, &mut T)> {
        match self.slots.get_mut(id.index as usize)? {
            (generation, Some((key, value))) if *generation == id.generation => Some((key, value)),
            _ => None,
        }
    }

    /// The number that the next [`Table::insert`] gives.
    pub fn next_id(&mut self) -> Id {
        let index = self.free.last().copied().unwrap_or(self.slots.len() as u32);
        Id { index, generation: self.slots.get(index as usize).map_or(0, |slot| slot.0) }
    }

    /// Adds a flow.
    ///
    /// # Panics
    /// There is one of this key.
    pub fn insert(&mut self, key: Key, value: T) -> Id {
        let id = self.next_id();
        match self.free.pop() {
            Some(index) => self.slots[index as usize].1 = Some((key, value)),
            None => self.slots.push((0, Some((key, value)))),
        }
        assert!(self.by_key.insert(key, id.index).is_none(), "flows have keys of their own");
        id
    }

    pub fn remove(&mut self, id: Id) -> Option<(Key, T)> {
        self.get(id)?;
        let slot = &mut self.slots[id.index as usize];
        slot.0 = (slot.0 + 1) & 0xff_ffff;
        let (key, value) = slot.1.take()?;
        self.by_key.remove(&key);
        self.free.push(id.index);
        Some((key, value))
    }

    /// All flows, by number.
    pub fn ids(&self) -> Vec<Id> {
        let slots = (0..).zip(&self.slots).filter(|(_, slot)| slot.1.is_some());
        slots.map(|(index, slot)| Id { index, generation: slot.0 }).collect()
    }

    pub fn clear(&mut self) {
        self.ids().into_iter().for_each(|id| drop(self.remove(id)));
    }
}
