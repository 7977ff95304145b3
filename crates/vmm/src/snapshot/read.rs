//! Opening a snapshot with all it builds on, and turning it into guest memory.
//!
//! Opening reads the manifests and tables of pages, and checks all of them. Memory is mapped, not read: a page
//! comes from the file when the guest touches it, and belongs to the guest when it writes it. Its checksums
//! are another pass ([`Snapshot::verify`]), which the machine makes while the guest already runs.

use super::manifest::{Checksum, Machine, Manifest, SIZE_MAX};
use super::pages::{self, EXTENT_MAX, Extent};
use super::{CHAIN_MAX, MANIFEST, MEMORY, PAGE, PAGES};
use crate::config::HugePages;
use crate::{Error, Result, layout, memory};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Fewest pages in a row that are mapped from an incremental snapshot instead of copied: a mapping costs about
/// as much as copying a few pages does.
const MAP_MIN: u32 = 16;
/// In a full snapshot, gaps of fewer pages than this are mapped too: fewer and larger mappings.
const GAP_MAX: u64 = 64;
/// Most mappings that a snapshot may cost: the host gives a process 65,530.
const MAPPINGS_MAX: usize = 20_000;

/// A snapshot whose files make sense, and the chain it builds on.
pub struct Snapshot {
    manifest: Manifest,
    checksum: Checksum,
    /// The one without a parent first, this one last.
    layers: Vec<Layer>,
}

/// One folder.
struct Layer {
    folder: PathBuf,
    memory: File,
    extents: Vec<Extent>,
}

impl Snapshot {
    /// Opens the snapshot in `folder`.
    ///
    /// # Errors
    /// In one line: which folder holds no snapshot, or what is wrong with it.
    pub fn open(folder: &Path) -> Result<Snapshot> {
        let (manifest, checksum) = read_manifest(folder)?;
        let mut layers = vec![Layer::open(folder, &manifest)?];
        let mut folder = folder.to_owned();
        let mut parent = manifest.parent.clone();
        while let Some(wanted) = parent {
            if layers.len() == CHAIN_MAX {
                return Err(bad(&folder, &format!("has more than {} before it", CHAIN_MAX - 1)));
            }
            let at = folder.join(&wanted.path);
            let (older, found) = read_manifest(&at).map_err(|error| {
                one_line(&format!("snapshot '{}' builds on another, and {error}", folder.display()))
            })?;
            if found != wanted.checksum {
                let what = format!("builds on snapshot {}, and '{}' has {found}", wanted.checksum, at.display());
                return Err(bad(&folder, &what));
            }
            if !older.machine.has_memory_of(&manifest.machine) {
                return Err(bad(&folder, "makes no sense: it builds on a machine with another size of memory"));
            }
            layers.push(Layer::open(&at, &older)?);
            folder = at;
            parent = older.parent;
        }
        layers.reverse();
        Ok(Snapshot { manifest, checksum, layers })
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The snapshot's name.
    pub fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// How many folders it takes.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    fn folder(&self) -> &Path {
        &self.layers.last().expect("at least one").folder
    }

    /// Memory with the saved contents, of which nothing is read before it is touched, but for scattered pages of
    /// incremental snapshots. The files must stay as they are while it is in use. If `pages` are to be huge ones, which
    /// no file is mapped with, all of it is read here instead.
    ///
    /// # Errors
    /// The host cannot give the memory, or not read the files.
    pub fn map_memory(&self, pages: HugePages) -> Result<GuestMemoryMmap> {
        let Machine { memory: ram, flash, .. } = self.manifest.machine;
        let mut memory = memory::allocate(ram, pages, false)?;
        if flash > 0 {
            memory = memory::with_flash(&memory, flash)?;
        }
        let places = layout::memory_pieces(ram, flash);
        let lazy = pages == HugePages::IfThere;
        let mut mappings = 0;
        for (n, layer) in self.layers.iter().enumerate() {
            let plan = if n == 0 && lazy { merge(&layer.extents) } else { layer.extents.clone() };
            let mut buffer = vec![0; (EXTENT_MAX * PAGE) as usize];
            for extent in plan {
                let trouble = |error| Error::host(format!("cannot read snapshot '{}'", layer.folder.display()), error);
                for (gpa, offset, length) in pieces(&places, &extent) {
                    if lazy && mappings < MAPPINGS_MAX && (n == 0 || extent.count >= MAP_MIN) {
                        memory::map_file(&memory, gpa, length, &layer.memory, offset).map_err(trouble)?;
                        mappings += 1;
                        continue;
                    }
                    for at in (0..length).step_by(buffer.len()) {
                        let part = (length - at).min(buffer.len() as u64);
                        let bytes = &mut buffer[..part as usize];
                        layer.memory.read_exact_at(bytes, offset + at).map_err(trouble)?;
                        memory.write_slice(bytes, GuestAddress(gpa + at)).expect("pieces lie in RAM");
                    }
                }
            }
        }
        Ok(memory)
    }

    /// Reads all of the memory and compares it with its checksums, until `stop` is set.
    ///
    /// # Errors
    /// In one line: where it is damaged, or cannot be read.
    pub fn verify(&self, stop: &AtomicBool) -> Result<()> {
        let mut buffer = vec![0; (EXTENT_MAX * PAGE) as usize];
        for layer in &self.layers {
            for extent in &layer.extents {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let (offset, length) = extent.bytes();
                let bytes = &mut buffer[..length];
                layer.memory.read_exact_at(bytes, offset).map_err(|error| {
                    Error::host(format!("cannot read the memory of snapshot '{}'", layer.folder.display()), error)
                })?;
                if crc32fast::hash(bytes) != extent.crc {
                    let what = format!("is damaged: its memory at byte {offset} does not have its checksum");
                    return Err(bad(&layer.folder, &what));
                }
            }
        }
        Ok(())
    }

    /// An error about this snapshot, in words that follow "snapshot '...'".
    pub(crate) fn error(&self, what: &str) -> Error {
        bad(self.folder(), what)
    }
}

impl Layer {
    fn open(folder: &Path, manifest: &Manifest) -> Result<Layer> {
        let table = open_file(folder, PAGES)?;
        let length = table.metadata().map_err(|error| trouble(folder, error))?.len();
        if length != manifest.pages_size() {
            let what = format!("is damaged: its table of pages has {length} bytes, not {}", manifest.pages_size());
            return Err(bad(folder, &what));
        }
        let (extents, checksum) = pages::read(table, manifest.memory.extents, manifest.page_count())
            .map_err(|error| trouble(folder, error))?
            .map_err(|what| bad(folder, &format!("is damaged: its table of pages {what}")))?;
        if checksum != manifest.memory.checksum {
            return Err(bad(folder, "is damaged: its table of pages does not have its checksum"));
        }
        let memory = open_file(folder, MEMORY)?;
        let length = memory.metadata().map_err(|error| trouble(folder, error))?.len();
        let right = manifest.machine.memory_size();
        if length != right {
            let what = format!("is damaged: its memory has {length} bytes, not {right}");
            return Err(bad(folder, &what));
        }
        Ok(Layer { folder: folder.to_owned(), memory, extents })
    }
}

/// A user's error. What comes from a snapshot may hold anything; line breaks and the like are not shown.
fn one_line(message: &str) -> Error {
    Error::user(message.chars().map(|c| if c.is_control() { '?' } else { c }).collect::<String>())
}

fn bad(folder: &Path, what: &str) -> Error {
    one_line(&format!("snapshot '{}' {what}", folder.display()))
}

fn trouble(folder: &Path, error: std::io::Error) -> Error {
    let shown = folder.display();
    match error.kind() {
        ErrorKind::PermissionDenied => {
            one_line(&format!("cannot read snapshot '{shown}': {error}; only the user who saved it, or root, can"))
        }
        _ => Error::host(format!("cannot read snapshot '{shown}'"), error),
    }
}

fn read_manifest(folder: &Path) -> Result<(Manifest, Checksum)> {
    match std::fs::metadata(folder.join(MANIFEST)) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(trouble(folder, error)),
        Err(_) => {
            let shown = folder.display();
            return Err(one_line(&if folder.join(MEMORY).exists() {
                format!("'{shown}' holds a snapshot that was never finished; save again")
            } else if folder.exists() {
                format!("'{shown}' holds no snapshot")
            } else {
                format!("there is no '{shown}'")
            }));
        }
    }
    let bytes = read_file(folder, MANIFEST, SIZE_MAX)?;
    Manifest::decode(&bytes).map_err(|what| bad(folder, &format!("cannot be used: its manifest {what}")))
}

/// Opens a file of `folder`, which must be a plain one: nothing that blocks or has no length.
fn open_file(folder: &Path, name: &str) -> Result<File> {
    let path = folder.join(name);
    let found = std::fs::metadata(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => bad(folder, &format!("is damaged: it has no '{name}'")),
        _ => trouble(folder, error),
    })?;
    if !found.is_file() {
        return Err(bad(folder, &format!("is damaged: '{name}' is no plain file")));
    }
    File::open(path).map_err(|error| trouble(folder, error))
}

/// Reads a file of `folder` with at most `limit` bytes.
fn read_file(folder: &Path, name: &str, limit: u64) -> Result<Vec<u8>> {
    let file = open_file(folder, name)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| trouble(folder, error))?;
    if bytes.len() as u64 > limit {
        return Err(bad(folder, &format!("is damaged: '{name}' has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Fewer, larger extents for mapping a full snapshot, with the gaps between them, which are zeros too.
fn merge(extents: &[Extent]) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::new();
    for extent in extents {
        if let Some(last) = merged.last_mut() {
            let end = last.first + u64::from(last.count);
            let together = extent.first + u64::from(extent.count) - last.first;
            if extent.first - end < GAP_MAX && together <= u64::from(u32::MAX) {
                last.count = together as u32;
                continue;
            }
        }
        merged.push(*extent);
    }
    merged
}

/// Where an extent's pages are in the `places` of memory: guest-physical address, byte of the file, bytes.
fn pieces(places: &[(u64, u64)], extent: &Extent) -> impl Iterator<Item = (u64, u64, u64)> {
    let begin = extent.first * PAGE;
    let end = begin + u64::from(extent.count) * PAGE;
    let mut before = 0;
    places.iter().filter_map(move |&(start, size)| {
        let (low, high) = (begin.max(before), end.min(before + size));
        let piece = (low < high).then(|| (start + low - before, low, high - low));
        before += size;
        piece
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(first: u64, count: u32) -> Extent {
        Extent { first, count, crc: 0 }
    }

    #[test]
    fn near_extents_are_mapped_together() {
        let merged = merge(&[extent(0, 1), extent(64, 1), extent(65, 10), extent(139, 5), extent(500, 1)]);
        assert_eq!(merged, [extent(0, 75), extent(139, 5), extent(500, 1)]);
    }

    #[test]
    fn pieces_leave_the_hole_out() {
        let low = layout::LOW_RAM_LIMIT;
        let ram = low + (1 << 20);
        let last = low / PAGE - 1;
        let found = |flash, extent| pieces(&layout::memory_pieces(ram, flash), &extent).collect::<Vec<_>>();
        assert_eq!(found(0, extent(last, 3)), [(low - PAGE, low - PAGE, PAGE), (layout::HIGH_RAM, low, 2 * PAGE)]);
        assert_eq!(found(0, extent(5, 2)), [(5 * PAGE, 5 * PAGE, 2 * PAGE)]);
        let [below, flash, above] = [low - PAGE, layout::HIGH_RAM - PAGE, layout::HIGH_RAM];
        let three = [(below, below, PAGE), (flash, low, PAGE), (above, low + PAGE, PAGE)];
        assert_eq!(found(PAGE, extent(last, 3)), three);
    }
}
