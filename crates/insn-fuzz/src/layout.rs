//! Where a case's code and data are. The host process and the guest see the same linear addresses with
//! the same rights, so that one case runs in both unchanged.
//!
//! Two data regions of equal shape, 4 GiB apart, so that an address truncated to 32 bits by an
//! address-size prefix lands in the low one:
//!
//! ```text
//! page  0     1    2    3    4     5    6
//!       none  RW   RW   R    none  RW   none
//! ```
//!
//! and one code region (read, execute) that is followed by nothing, mapped at two addresses: 64-bit cases run
//! in the high one, 32-bit cases (compatibility mode) in the low one. Behind it all is one run of pages, the
//! *backing*: the data pages of the low region, those of the high region, the code pages.

/// Linear address of page 0 of the low and of the high data region.
pub const LOW: u64 = 0x2000_0000;
pub const HIGH: u64 = 0x1_2000_0000;
/// Pages in a data region, mapped or not.
pub const REGION_PAGES: u64 = 7;
/// Mapped pages in a data region: page number, writable.
pub const PAGES: [(u64, bool); 4] = [(1, true), (2, true), (3, false), (5, true)];
/// Linear address of the code region for 64-bit cases.
pub const CODE: u64 = 0x1_2010_0000;
/// Linear address of the code region for 32-bit cases.
pub const CODE_32: u64 = 0x2010_0000;
pub const CODE_PAGES: u64 = 32;
pub const PAGE: u64 = 4096;

/// Data pages in the backing.
pub const DATA_PAGES: usize = 2 * PAGES.len();
pub const DATA_BYTES: usize = DATA_PAGES * PAGE as usize;
pub const CODE_BYTES: usize = (CODE_PAGES * PAGE) as usize;
pub const BACKING_BYTES: usize = DATA_BYTES + CODE_BYTES;

/// A set of data pages: bit `n` is page `n` of the backing.
pub type Pages = u8;
pub const ALL_PAGES: Pages = Pages::MAX;
const _: () = assert!(DATA_PAGES == Pages::BITS as usize);

/// The data pages in which `one` and `other` differ.
pub fn pages_that_differ(one: &[u8], other: &[u8]) -> Pages {
    let pages = one.chunks(PAGE as usize).zip(other.chunks(PAGE as usize)).enumerate();
    pages.filter(|(_, (a, b))| a != b).fold(0, |set, (n, _)| set | 1 << n)
}

/// Whether `pages` are the same.
pub fn same_pages(one: &[u8], other: &[u8], pages: Pages) -> bool {
    let both = one.chunks(PAGE as usize).zip(other.chunks(PAGE as usize)).enumerate();
    both.filter(|(n, _)| pages >> n & 1 != 0).all(|(_, (one, other))| one == other)
}

/// Copies data pages.
pub fn copy_pages(to: &mut [u8], from: &[u8], pages: Pages) {
    for (n, (to, from)) in to.chunks_mut(PAGE as usize).zip(from.chunks(PAGE as usize)).enumerate() {
        if pages >> n & 1 != 0 {
            to.copy_from_slice(from);
        }
    }
}

/// One mapped page: its linear address, its number in the backing, its rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub linear: u64,
    pub backing: usize,
    pub writable: bool,
    pub executable: bool,
}

/// Every mapped page of the layout.
pub fn mapped() -> impl Iterator<Item = Mapped> {
    let data = [LOW, HIGH].into_iter().enumerate().flat_map(|(region, base)| {
        PAGES.iter().enumerate().map(move |(i, &(page, writable))| Mapped {
            linear: base + page * PAGE,
            backing: region * PAGES.len() + i,
            writable,
            executable: false,
        })
    });
    let code = [CODE, CODE_32].into_iter().flat_map(|base| {
        (0..CODE_PAGES).map(move |i| Mapped {
            linear: base + i * PAGE,
            backing: DATA_PAGES + i as usize,
            writable: false,
            executable: true,
        })
    });
    data.chain(code)
}

/// Where the byte at linear address `linear` is in the backing, if it is mapped.
pub fn backing_of(linear: u64) -> Option<usize> {
    for (region, base) in [LOW, HIGH].into_iter().enumerate() {
        let offset = linear.wrapping_sub(base);
        if offset < REGION_PAGES * PAGE {
            let page = PAGES.iter().position(|&(p, _)| p == offset / PAGE)?;
            return Some((region * PAGES.len() + page) * PAGE as usize + (offset % PAGE) as usize);
        }
    }
    let inside = |base: u64| Some(linear.wrapping_sub(base)).filter(|offset| *offset < CODE_PAGES * PAGE);
    inside(CODE).or_else(|| inside(CODE_32)).map(|offset| DATA_BYTES + offset as usize)
}

/// The mode that code at `rip` runs in: 32 or 64 bits.
pub fn bits_at(rip: u64) -> u32 {
    if rip >> 32 == 0 { 32 } else { 64 }
}

/// The linear address of byte `offset` of the data part of the backing.
pub fn linear_of(offset: usize) -> u64 {
    let page = offset / PAGE as usize;
    let base = if page < PAGES.len() { LOW } else { HIGH };
    base + PAGES[page % PAGES.len()].0 * PAGE + offset as u64 % PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_and_linear_addresses_are_inverse() {
        for page in mapped() {
            let offset = backing_of(page.linear + 7).unwrap();
            assert_eq!(offset, page.backing * PAGE as usize + 7);
            if !page.executable {
                assert_eq!(linear_of(offset), page.linear + 7);
            }
        }
        assert_eq!(backing_of(LOW), None);
        assert_eq!(backing_of(HIGH + 4 * PAGE), None);
        assert_eq!(backing_of(CODE + CODE_PAGES * PAGE), None);
    }
}
