//! Memory that the guest lends back to the host (virtio 1.2, 5.5): on request, and whatever it has free.
//!
//! **Idea.** The host says how many pages it wants ([`config`]), the guest takes them out of use and says which they are; those
//! the host gives to others ([`Host::give_back`]). Beside that the guest reports free pages by itself (5.5.6.7), which
//! cost nobody anything. What is in such pages is lost, and they read as anything when the guest uses them again: it need not
//! tell the host before (MUST_TELL_HOST is not offered), for they are never out of its address space.
//!
//! **Queue numbers.** A driver that counts only the queues there are finds that of reports at 3, one that follows the
//! specification's list at 4 (Linux has done both): so all from 3 on are for reports.

use super::pci::Offer;
use super::queue::{Chains, gather, total};
use super::{Broken, feature};
use std::io;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Bytes of the pages that a balloon is counted in, whatever the guest's are.
pub const PAGE: u64 = 4096;
/// Where in the configuration the driver writes how large the balloon is.
pub const ACTUAL: std::ops::Range<usize> = 4..8;

const DEVICE: u16 = 5;
/// Unclassified: PCI has no class for it.
const CLASS: u32 = 0x00_ff00;
const QUEUE_SIZE: u16 = 128;
const QUEUES: usize = 5;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
/// Most pages in one buffer: bounds how long one takes. Linux has 256.
const PAGES_MAX: u64 = 16 << 10;

/// Feature bits (5.5.3).
mod bits {
    pub const STATISTICS: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

/// What a guest tells of its memory, by tag (5.5.6.4.1): in bytes, or how often something happened.
pub const STATISTICS_NAMES: [&str; 10] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
];
/// Bytes of one: a tag and a value.
const STATISTIC: usize = 10;
/// Most that are looked at.
const STATISTICS_MAX: usize = 64;

/// Who takes pages.
pub trait Host {
    /// The guest has no use for `length` bytes of RAM at `gpa`, multiples of [`PAGE`]. What is there may change, and is
    /// reported by the host itself.
    ///
    /// # Errors
    /// The host's: they stay as they are.
    fn give_back(&mut self, gpa: u64, length: u64) -> io::Result<()>;
}

/// What a guest said last of its memory, in the order of [`STATISTICS_NAMES`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub values: [Option<u64>; STATISTICS_NAMES.len()],
    /// How often it said so since the device was reset.
    pub count: u64,
}

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    statistics: Statistics,
    /// The buffer with statistics that is there has been read.
    read: bool,
    /// The driver is to say how its memory is.
    refresh: bool,
}

/// What the device offers, for a balloon of `pages` pages to begin with.
pub fn offer(pages: u32) -> Offer {
    let own = bits::STATISTICS | bits::DEFLATE_ON_OOM | bits::REPORTING;
    let features = own | feature::INDIRECT | feature::EVENT_INDEX;
    let queues = vec![QUEUE_SIZE; QUEUES];
    Offer { device: DEVICE, class: CLASS, features, queues, config: config(pages), writable: ACTUAL }
}

/// `struct virtio_balloon_config` (5.5.4) for a balloon that is to have `pages` pages.
pub fn config(pages: u32) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes[..4].copy_from_slice(&pages.to_le_bytes());
    bytes
}

impl Balloon {
    /// A device after reset.
    pub fn new() -> Balloon {
        Balloon::default()
    }

    /// The driver has reset the device.
    pub fn reset(&mut self) {
        *self = Balloon::default();
    }

    /// Has the driver say how its memory is, when its queue is next worked on.
    pub fn refresh(&mut self) {
        self.refresh = true;
    }

    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Does what can be done for queue number `number`.
    ///
    /// # Errors
    /// The queue or what is in it makes no sense.
    pub fn work(
        &mut self,
        number: u16,
        queue: &mut dyn Chains,
        features: u64,
        host: &mut dyn Host,
    ) -> Result<(), Broken> {
        match number {
            INFLATE => inflate(queue, host),
            DEFLATE => deflate(queue),
            STATISTICS if features & bits::STATISTICS != 0 => self.hear(queue),
            _ if features & bits::REPORTING != 0 => take_reports(queue, host),
            _ => Ok(()),
        }
    }

    /// There is one buffer, which the driver fills anew each time it is given back (5.5.6.4).
    fn hear(&mut self, queue: &mut dyn Chains) -> Result<(), Broken> {
        while let Some(chain) = queue.pop()? {
            if !self.read {
                let length = total(&chain.readable).min((STATISTIC * STATISTICS_MAX) as u64) as usize;
                let mut bytes = vec![0; length - length % STATISTIC];
                gather(queue.memory(), &chain.readable, &mut bytes).ok_or(Broken("statistics that are not in RAM"))?;
                self.statistics.take(&bytes);
                self.read = true;
            }
            if !std::mem::take(&mut self.refresh) {
                queue.put_back();
                break;
            }
            self.read = false;
            queue.push(chain.head, 0)?;
        }
        Ok(())
    }
}

impl Statistics {
    fn take(&mut self, bytes: &[u8]) {
        self.count += 1;
        for one in bytes.chunks_exact(STATISTIC) {
            let tag = u16::from_le_bytes([one[0], one[1]]);
            // Others are of drivers that know more.
            if let Some(value) = self.values.get_mut(usize::from(tag)) {
                *value = Some(u64::from_le_bytes(one[2..].try_into().expect("eight bytes")));
            }
        }
    }
}

/// Gives the host the pages whose numbers are in the buffers.
fn inflate(queue: &mut dyn Chains, host: &mut dyn Host) -> Result<(), Broken> {
    while let Some(chain) = queue.pop()? {
        let length = total(&chain.readable);
        if !length.is_multiple_of(4) || length / 4 > PAGES_MAX {
            return Err(Broken("page numbers that are no whole ones, or too many"));
        }
        let mut bytes = vec![0; length as usize];
        gather(queue.memory(), &chain.readable, &mut bytes).ok_or(Broken("page numbers that are not in RAM"))?;
        let numbers = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")));
        for (gpa, length) in ranges(numbers.collect()) {
            if queue.memory().get_slice(GuestAddress(gpa), length as usize).is_err() {
                return Err(Broken("a page in the balloon that is not RAM"));
            }
            // If it cannot be given away, it is merely idle.
            let _ = host.give_back(gpa, length);
        }
        queue.push(chain.head, 0)?;
    }
    Ok(())
}

/// Addresses and lengths of the pages with these numbers, next to each other in one.
fn ranges(mut numbers: Vec<u32>) -> Vec<(u64, u64)> {
    numbers.sort_unstable();
    numbers.dedup();
    let mut ranges: Vec<(u64, u64)> = vec![];
    for gpa in numbers.into_iter().map(|number| u64::from(number) * PAGE) {
        match ranges.last_mut() {
            Some((start, length)) if *start + *length == gpa => *length += PAGE,
            _ => ranges.push((gpa, PAGE)),
        }
    }
    ranges
}

/// The guest uses pages again: they are where they always were.
fn deflate(queue: &mut dyn Chains) -> Result<(), Broken> {
    while let Some(chain) = queue.pop()? {
        queue.push(chain.head, 0)?;
    }
    Ok(())
}

/// Gives the host the pages that the buffers themselves are: the guest does not use them until it has them back.
fn take_reports(queue: &mut dyn Chains, host: &mut dyn Host) -> Result<(), Broken> {
    while let Some(chain) = queue.pop()? {
        if !chain.readable.is_empty() {
            return Err(Broken("free pages that are to be read"));
        }
        for piece in &chain.writable {
            let (start, end) = (piece.gpa.next_multiple_of(PAGE), (piece.gpa + u64::from(piece.length)) & !(PAGE - 1));
            if start < end {
                let _ = host.give_back(start, end - start);
            }
        }
        queue.push(chain.head, 0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::hostile::{Chance, Way, torment};
    use super::super::queue::tests::{
        DESCRIPTORS, DRIVER, Plain, RAM, describe, memory, offer as make_available, queue,
    };
    use super::*;
    use crate::virtio::Written;
    use vm_memory::{Bytes, GuestMemoryMmap};

    const WRITABLE: u16 = 2;
    const BUFFER: u64 = 0x8000;
    const ALL: u64 = bits::STATISTICS | bits::REPORTING;

    /// Takes notes.
    #[derive(Default)]
    struct Taker(Vec<(u64, u64)>);

    impl Host for Taker {
        fn give_back(&mut self, gpa: u64, length: u64) -> io::Result<()> {
            self.0.push((gpa, length));
            if gpa == 0 { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
        }
    }

    /// What is given back for a buffer with `bytes`, and whether it was returned.
    fn send(number: u16, features: u64, at: u64, bytes: &[u8], flags: u16) -> (Result<bool, Broken>, Vec<(u64, u64)>) {
        let (memory, mut queue, mut taker) = (memory(), queue(), Taker::default());
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
        describe(&memory, DESCRIPTORS, 0, at, bytes.len() as u32, flags, 0);
        make_available(&memory, 0);
        let mut queue = Plain::new(&mut queue, &memory, &|_, _| {});
        let result = Balloon::new().work(number, &mut queue, features, &mut taker);
        (result.map(|()| queue.pushed > 0), taker.0)
    }

    fn numbers(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    #[test]
    fn pages_go_in_ranges() {
        let pages = numbers(&[9, 20, 8, 7, 9, 255]);
        let given = [(0x7000, 0x3000), (0x1_4000, 0x1000), (0xf_f000, 0x1000)];
        assert_eq!(send(INFLATE, 0, BUFFER, &pages, 0), (Ok(true), given.to_vec()));
        assert_eq!(send(INFLATE, 0, BUFFER, &numbers(&[0]), 0).0, Ok(true), "the host does not want it");
        assert_eq!(send(DEFLATE, 0, BUFFER, &pages, 0), (Ok(true), vec![]));
        let none = |result: (Result<bool, Broken>, Vec<(u64, u64)>)| result.0.is_err() && result.1.is_empty();
        for bad in [(RAM / PAGE) as u32, u32::MAX] {
            assert!(none(send(INFLATE, 0, BUFFER, &numbers(&[bad]), 0)), "{bad:#x}");
        }
        assert!(none(send(INFLATE, 0, BUFFER, &[0; 6], 0)), "one and a half");
        assert!(none(send(INFLATE, 0, BUFFER, &vec![1; 4 * PAGES_MAX as usize + 4], 0)), "too many");
    }

    #[test]
    fn free_pages_are_buffers() {
        for number in [3, 4] {
            let whole = send(number, ALL, 0x9000, &[0; 0x3000], WRITABLE);
            assert_eq!(whole, (Ok(true), vec![(0x9000, 0x3000)]));
        }
        assert_eq!(send(2, bits::REPORTING, 0x9000, &[0; 0x1000], WRITABLE).1, [(0x9000, 0x1000)], "no statistics");
        assert_eq!(send(4, ALL, 0x9001, &[0; 0x2ffe], WRITABLE), (Ok(true), vec![(0xa000, 0x1000)]));
        assert_eq!(send(4, ALL, 0x9001, &[0; 0x1000], WRITABLE), (Ok(true), vec![]), "no whole page");
        assert!(send(4, ALL, 0x9000, &[0; 0x1000], 0).0.is_err());
        assert_eq!(send(3, bits::STATISTICS, 0x9000, &[0; 0x1000], WRITABLE), (Ok(false), vec![]));
    }

    #[test]
    fn statistics_are_asked_for_again_and_again() {
        let (memory, mut queue, mut balloon) = (memory(), queue(), Balloon::new());
        let give = |values: &[(u16, u64)]| {
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
                .collect();
            memory.write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
            describe(&memory, DESCRIPTORS, 0, BUFFER, bytes.len() as u32, 0, 0);
            make_available(&memory, 0);
        };
        let mut work = |balloon: &mut Balloon| {
            let mut queue = Plain::new(&mut queue, &memory, &|_, _| {});
            balloon.work(STATISTICS, &mut queue, ALL, &mut Taker::default()).unwrap();
            queue.pushed > 0
        };
        give(&[(4, 1000), (99, 1), (5, 2000)]);
        assert!(!work(&mut balloon) && !work(&mut balloon));
        let Statistics { values, count } = balloon.statistics();
        assert_eq!((values[4], values[5], values[0], count), (Some(1000), Some(2000), None, 1));
        balloon.refresh();
        assert!(work(&mut balloon) && !work(&mut balloon), "there is one buffer");
        give(&[(4, 900)]);
        assert!(!work(&mut balloon));
        assert_eq!((balloon.statistics().values[4], balloon.statistics().count), (Some(900), 2));
        // One that was asked for before there was a buffer.
        let index: u16 = memory.read_obj(GuestAddress(DRIVER + 2)).unwrap();
        memory.write_obj(index - 1, GuestAddress(DRIVER + 2)).unwrap();
        balloon.refresh();
        assert!(!work(&mut balloon));
        memory.write_obj(index, GuestAddress(DRIVER + 2)).unwrap();
        assert!(work(&mut balloon));
        balloon.reset();
        assert_eq!(balloon.statistics(), Statistics::default());
    }

    #[test]
    fn the_configuration_is_the_specifications() {
        let offer = offer(0x0102_0304);
        assert_eq!((&offer.config[..8], offer.config.len()), (&[4, 3, 2, 1, 0, 0, 0, 0][..], 16));
        assert_eq!(offer.queues.len(), QUEUES);
    }

    #[test]
    fn hostile_queues_harm_nobody() {
        struct Zeroer<'a>(&'a GuestMemoryMmap, Written<'a>);
        impl Host for Zeroer<'_> {
            fn give_back(&mut self, gpa: u64, length: u64) -> io::Result<()> {
                self.0.write_slice(&vec![0; length as usize], GuestAddress(gpa)).expect("RAM");
                (self.1)(gpa, length);
                Ok(())
            }
        }
        // Numbers of pages that no other buffer is in.
        let fill = |chance: &mut Chance, bytes: &mut [u8]| {
            let pages = if chance.one_in(200) { 1 << 20 } else { 4 };
            bytes
                .chunks_mut(4)
                .for_each(|b| b.copy_from_slice(&(60 + chance.below(pages) as u32).to_le_bytes()[..b.len()]));
        };
        let ways = [Way::ToDevice, Way::ToDevice, Way::ToDevice, Way::ToDriver, Way::ToDriver];
        let mut given = 0;
        let outcome = torment(2000, &ways, &fill, |chance, queues| {
            let mut balloon = Balloon::new();
            let only = chance.below(5) as u16;
            for number in [only, (only + 2) % 5] {
                balloon.refresh();
                let queue = &mut queues[usize::from(number)];
                let mut zeroer = Zeroer(queue.memory, queue.written);
                if number == INFLATE {
                    let mut taker = Taker::default();
                    let result = balloon.work(number, queue, ALL, &mut taker);
                    given += taker.0.len();
                    result?;
                } else {
                    balloon.work(number, queue, ALL, &mut zeroer)?;
                }
            }
            Ok(())
        });
        assert!(
            outcome.fine > 500 && outcome.broken > 200 && outcome.used > 2000 && given > 300,
            "{outcome:?} {given}"
        );
    }
}
