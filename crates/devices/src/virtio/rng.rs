//! Entropy (virtio 1.2, 5.4): buffers to be filled with random bytes.
//!
//! The device may write less than a buffer has room for, and at least one byte (5.4.6.1): so a request takes what the host
//! gives in a moment, however large the guest makes it.

use super::pci::Offer;
use super::queue::{Chains, scatter, total};
use super::{Broken, feature};
use std::io;

const DEVICE: u16 = 4;
/// Unclassified: PCI has no class for it.
const CLASS: u32 = 0x00_ff00;
const QUEUE_SIZE: u16 = 16;
/// Most random bytes for one request.
const PART: usize = 4096;

/// Where random bytes come from.
pub trait Source {
    /// Fills `data`.
    ///
    /// # Errors
    /// The host's.
    fn fill(&mut self, data: &mut [u8]) -> io::Result<()>;
}

/// What the device offers.
pub fn offer() -> Offer {
    let features = feature::INDIRECT | feature::EVENT_INDEX;
    Offer { device: DEVICE, class: CLASS, features, queues: vec![QUEUE_SIZE], config: vec![], writable: 0..0 }
}

/// Answers the next request of `queue`. Says whether there was one.
///
/// # Errors
/// The queue or the request makes no sense, or the host has no random bytes.
pub fn serve(queue: &mut dyn Chains, source: &mut dyn Source) -> Result<bool, Broken> {
    let Some(chain) = queue.pop()? else { return Ok(false) };
    let room = total(&chain.writable).min(PART as u64) as usize;
    if room == 0 || !chain.readable.is_empty() {
        return Err(Broken("a request for random bytes that has no room for them, or something to say"));
    }
    let mut data = [0; PART];
    source.fill(&mut data[..room]).map_err(|_| Broken("the host has no random bytes"))?;
    let length = scatter(queue.memory(), &chain.writable, &data[..room], queue.written());
    queue.push(chain.head, length)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::super::hostile::{Way, torment};
    use super::super::queue::tests::{
        DESCRIPTORS, DEVICE as USED, Plain, describe, memory, offer as make_available, queue,
    };
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    /// Counts.
    struct Numbers(u8);

    impl Source for Numbers {
        fn fill(&mut self, data: &mut [u8]) -> io::Result<()> {
            data.iter_mut().for_each(|byte| {
                self.0 = self.0.wrapping_add(1);
                *byte = self.0;
            });
            Ok(())
        }
    }

    /// The result for a buffer with `length` bytes and `flags`, and how many bytes it was said to have.
    fn ask(length: u32, flags: u16) -> (Result<bool, Broken>, u32) {
        let (memory, mut queue) = (memory(), queue());
        describe(&memory, DESCRIPTORS, 0, 0x8000, length, flags, 0);
        make_available(&memory, 0);
        let mut queue = Plain::new(&mut queue, &memory, &|_, _| {});
        let result = serve(&mut queue, &mut Numbers(0));
        assert!(result.is_err() || memory.read_obj::<[u8; 3]>(GuestAddress(0x8000)).unwrap() == [1, 2, 3]);
        assert!(result.is_err() || serve(&mut queue, &mut Numbers(0)) == Ok(false));
        (result, memory.read_obj(GuestAddress(USED + 8)).unwrap())
    }

    #[test]
    fn buffers_are_filled() {
        assert_eq!(ask(64, 2), (Ok(true), 64));
        assert_eq!(ask(100_000, 2), (Ok(true), 4096), "as much as is there in a moment");
        assert!(ask(64, 0).0.is_err());
    }

    #[test]
    fn hostile_queues_harm_nobody() {
        let outcome = torment(1000, &[Way::ToDriver], &|_, _| {}, |_, queues| {
            while serve(&mut queues[0], &mut Numbers(0))? {}
            Ok(())
        });
        assert!(outcome.fine > 200 && outcome.broken > 200 && outcome.used > 2000, "{outcome:?}");
    }
}
