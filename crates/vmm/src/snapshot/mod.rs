//! Saving a VM to a folder, and going on from there. The format is in docs/snapshot-format.md.
//!
//! ```text
//!   save:     paused VM ──> memory, pages ──┬──> (VM goes on) ──> fsync ──> manifest, renamed into place
//!   restore:  manifest ──> parents' ──> pages ──> checks ──> memory mapped, chips and vCPUs set
//! ```
//!
//! A snapshot is a folder of three files: `manifest` (what the machine is and the state of all but its memory),
//! `memory` (a sparse image of RAM) and `pages` (which pages the image holds, with their checksums). A
//! snapshot with a parent holds the pages written since the parent was saved; all others are the parent's.
//!
//! Invariants:
//! - A folder without a manifest is no snapshot, and the manifest comes last, by rename: a save that was cut
//!   short at any moment left none. Nothing of an earlier snapshot is ever written.
//! - A snapshot's name is the SHA-256 of its manifest, which holds that of its `pages`, which holds the
//!   checksums of its memory; a parent is named so. The folder's place does not matter.
//! - What is read is untrusted: every number is checked before it is used, nothing is allocated that the
//!   files' size does not justify, and the error is one line.
//! - Guest time stands still while a VM is saved. Only the RTC, which has a battery, shows the real time.

mod history;
mod manifest;
mod pages;
mod read;
mod write;

pub use history::History;
pub use manifest::{Checksum, FORMAT, Machine, Manifest, Parent, Vcpu, absolute};
pub use read::Snapshot;
pub use write::{Summary, Unfinished, save};

/// Names in a snapshot's folder.
const MANIFEST: &str = "manifest";
const MEMORY: &str = "memory";
const PAGES: &str = "pages";
/// The manifest while it is written.
const MANIFEST_PARTIAL: &str = "manifest.partial";

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Most snapshots that a chain of parents may have: what one restore opens.
const CHAIN_MAX: usize = 64;
