//! Saving: everything that needs the VM to stand still, and then everything that takes long.
//!
//! [`save`] runs while the VM is paused and leaves it as it was; [`Unfinished::finish`] makes the snapshot last
//! and valid, while the VM may go on. Whatever fails, what was written is removed, and the next save of the VM
//! holds what this one should have held.

use super::history::{Mark, PageSet};
use super::manifest::{Checksum, Machine, Manifest, Memory, Parent, Vcpu};
use super::pages::{self, EXTENT_MAX, Extent};
use super::{CHAIN_MAX, History, MANIFEST, MANIFEST_PARTIAL, MEMORY, PAGE, PAGES, Snapshot};
use crate::machine::Paused;
use crate::{Error, Result};
use anyvisor_x86::{VcpuState, msr};
use serde::Serialize;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// What was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub folder: PathBuf,
    /// The snapshot's name: the SHA-256 of its manifest, in hexadecimal digits.
    pub checksum: String,
    /// Bytes of memory in it.
    pub memory: u64,
}

/// A snapshot that is written but not yet valid. Dropping it removes it.
pub struct Unfinished {
    folder: Folder,
    memory: File,
    pages: File,
    manifest: Vec<u8>,
    summary: Summary,
    checksum: Checksum,
    history: Arc<Mutex<History>>,
    mark: Mark,
}

/// Saves the paused VM to `folder`, which must not exist, be empty, or hold what a save left that was cut
/// short. With `parent`, the folder of an earlier snapshot of this VM, only what was written since.
///
/// # Errors
/// The folder or the parent will not do, or the host failed: its disk may be full. The VM can go on.
pub fn save(paused: &mut Paused, folder: &Path, parent: Option<&Path>) -> Result<Unfinished> {
    let machine = Machine::of(paused.config, paused.memory);
    let parent = parent.map(|path| open_parent(path, &machine)).transpose()?;
    let target = Folder::prepare(folder)?;
    let history = paused.history.clone();
    let mut known = history.lock().unwrap_or_else(PoisonError::into_inner);
    let mark = known.mark(paused.vm)?;
    let written = match &parent {
        Some((path, parent)) => Some(known.written_since(parent.checksum(), mark).ok_or_else(|| {
            Error::user(format!(
                "snapshot '{}' is not one of this VM's latest; save without a parent, or from its last one",
                path.display()
            ))
        })?),
        None => None,
    };
    drop(known);
    let trouble = |what: &str| {
        let what = format!("cannot save to '{}': {what}", folder.display());
        move |source| Error::host(what, source)
    };
    let memory = target.create(MEMORY).map_err(trouble("creating its memory file"))?;
    let extents = write_memory(paused.memory, written.as_ref(), &memory).map_err(trouble("writing memory"))?;
    let table = pages::encode(&extents);
    let mut pages = target.create(PAGES).map_err(trouble("creating its table of pages"))?;
    pages.write_all(&table).map_err(trouble("writing its table of pages"))?;
    let parent = match parent {
        Some((path, parent)) => Some(Parent {
            path: relative(&target.path, &path).map_err(trouble("finding the way to its parent"))?,
            checksum: parent.checksum(),
        }),
        None => None,
    };
    let memory_file = Memory { extents: extents.len() as u64, checksum: Checksum::of(&table) };
    let (manifest, checksum) = describe(paused, machine, parent, memory_file)?.encode().map_err(|error| {
        Error::user(format!("cannot save to '{}': {error}; use paths in UTF-8 only", folder.display()))
    })?;
    let summary = Summary {
        folder: target.path.clone(),
        checksum: checksum.to_string(),
        memory: extents.iter().map(|extent| extent.bytes().1 as u64).sum(),
    };
    Ok(Unfinished { folder: target, memory, pages, manifest, summary, checksum, history, mark })
}

impl Unfinished {
    /// Writes everything through to the disk, and then makes it a snapshot. Takes as long as the disk does.
    ///
    /// # Errors
    /// The host's: there is no snapshot then.
    pub fn finish(mut self) -> Result<Summary> {
        self.make_last().map_err(|source| {
            Error::host(format!("cannot save to '{}': writing to disk", self.folder.path.display()), source)
        })?;
        self.folder.finished = true;
        self.history.lock().unwrap_or_else(PoisonError::into_inner).succeeded(self.mark, self.checksum);
        Ok(self.summary.clone())
    }

    fn make_last(&self) -> std::io::Result<()> {
        self.memory.sync_all()?;
        self.pages.sync_all()?;
        let mut manifest = self.folder.create(MANIFEST_PARTIAL)?;
        manifest.write_all(&self.manifest)?;
        manifest.sync_all()?;
        // The names of the other files last before the manifest's does.
        self.folder.lock.sync_all()?;
        std::fs::rename(self.folder.path.join(MANIFEST_PARTIAL), self.folder.path.join(MANIFEST))?;
        self.folder.lock.sync_all()?;
        match self.folder.path.parent() {
            Some(above) => File::open(above)?.sync_all(),
            None => Ok(()),
        }
    }
}

fn open_parent(path: &Path, machine: &Machine) -> Result<(PathBuf, Snapshot)> {
    let parent = Snapshot::open(path)?;
    if !parent.manifest().machine.has_memory_of(machine) {
        return Err(Error::user(format!("snapshot '{}' is another VM's; save without a parent", path.display())));
    }
    if parent.depth() >= CHAIN_MAX {
        return Err(Error::user(format!(
            "snapshot '{}' has {} before it already, the most there can be; save without a parent",
            path.display(),
            parent.depth() - 1
        )));
    }
    let real = path.canonicalize().map_err(|e| Error::host(format!("cannot find '{}'", path.display()), e))?;
    Ok((real, parent))
}

/// A folder that a snapshot is written to.
struct Folder {
    /// Without links.
    path: PathBuf,
    /// The open folder: one save at a time.
    lock: File,
    made: bool,
    finished: bool,
}

impl Folder {
    fn prepare(path: &Path) -> Result<Folder> {
        let shown = path.display();
        let made = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(cannot_save(path, error)),
        };
        let trouble = |error| cannot_save(path, error);
        // Nothing but a folder is opened: a FIFO would wait for somebody who writes to it, and the VM with it.
        let only = libc::O_DIRECTORY | libc::O_NONBLOCK;
        let lock = OpenOptions::new().read(true).custom_flags(only).open(path).map_err(trouble)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::user(format!("another save to '{shown}' is under way; give another folder")));
            }
            Err(TryLockError::Error(error)) => return Err(trouble(error)),
        }
        for entry in std::fs::read_dir(path).map_err(trouble)? {
            let name = entry.map_err(trouble)?.file_name();
            if name == MANIFEST {
                return Err(Error::user(format!("'{shown}' has a snapshot already; give another folder")));
            }
            if ![MEMORY, PAGES, MANIFEST_PARTIAL].iter().any(|ours| name == *ours) {
                return Err(Error::user(format!("'{shown}' is not empty; give a new folder")));
            }
        }
        let folder = Folder { path: path.canonicalize().map_err(trouble)?, lock, made, finished: false };
        folder.remove_files();
        Ok(folder)
    }

    /// A new file, for nobody else to read: it holds all that the guest knows.
    fn create(&self, name: &str) -> std::io::Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(self.path.join(name))
    }

    fn remove_files(&self) {
        for name in [MANIFEST_PARTIAL, PAGES, MEMORY] {
            match std::fs::remove_file(self.path.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!("cannot remove '{}' of a snapshot that failed: {error}", name);
                }
                _ => {}
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.remove_files();
        if self.made {
            // Not if somebody else has put something there.
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

/// Why nothing can be saved to `path`: its user's choice, or the host's failure.
fn cannot_save(path: &Path, error: std::io::Error) -> Error {
    let what = format!("cannot save to '{}'", path.display());
    match error.kind() {
        ErrorKind::NotFound
        | ErrorKind::NotADirectory
        | ErrorKind::PermissionDenied
        | ErrorKind::ReadOnlyFilesystem
        | ErrorKind::InvalidFilename => Error::user(format!("{what}: {error}; give another folder")),
        _ => Error::host(what, error),
    }
}

/// Everything but the memory.
fn describe(paused: &mut Paused, machine: Machine, parent: Option<Parent>, memory: Memory) -> Result<Manifest> {
    let clock = paused.vm.clock()?;
    let tsc_khz = paused.vm.tsc_khz()?;
    let mut vcpus: Vec<Vcpu> = Vec::new();
    for (vcpu, cpuid) in paused.vcpus.iter_mut().zip(paused.tables) {
        let mut state = vcpu.state()?;
        let later = paused.vm.clock()?.saturating_sub(clock);
        align_tsc(&mut state, vcpus.first().map(|first| &first.state), later, tsc_khz);
        vcpus.push(Vcpu { cpuid: cpuid.clone(), state });
    }
    let saved_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    Ok(Manifest {
        writer: format!("anyvisor {}", env!("CARGO_PKG_VERSION")),
        engine: paused.engine.to_owned(),
        saved_at,
        parent,
        machine,
        tsc_khz,
        clock,
        vcpus,
        board: paused.board.save()?,
        memory,
    })
}

/// Gives `state`, read up to `later` ns after that of the `first` vCPU, the TSC of the same moment, if the guest keeps
/// the two the same. Reading takes its time, and a TSC that is behind another's is one that Linux distrusts.
fn align_tsc(state: &mut VcpuState, first: Option<&VcpuState>, later: u64, khz: u64) {
    let (Some(tsc), Some(first)) = (state.msr(msr::IA32_TSC), first.and_then(|first| first.msr(msr::IA32_TSC))) else {
        return;
    };
    let passed = u128::from(later) * u128::from(khz) / 1_000_000;
    // A guest that sets one apart sets it further apart than this.
    let slack = u128::from(khz) / 10;
    if u128::from(tsc.wrapping_sub(first)) <= passed + slack {
        state.set_msr(msr::IA32_TSC, first);
    }
}

/// Writes the pages that matter to `file`: those in `written`, or else all that are not zeros.
fn write_memory(memory: &GuestMemoryMmap, written: Option<&PageSet>, file: &File) -> std::io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut buffer = vec![0; (EXTENT_MAX * PAGE) as usize];
    let mut region_page = 0;
    for region in memory.iter() {
        let pages = region.len() / PAGE;
        for block in (0..pages).step_by(EXTENT_MAX as usize) {
            let count = EXTENT_MAX.min(pages - block);
            let first = region_page + block;
            if written.is_some_and(|written| !(first..first + count).any(|page| written.contains(page))) {
                continue;
            }
            let bytes = &mut buffer[..(count * PAGE) as usize];
            let start = GuestAddress(region.start_addr().0 + block * PAGE);
            memory.read_slice(bytes, start).expect("the block lies in a region");
            write_block(bytes, first, written, file, &mut extents)?;
        }
        region_page += pages;
    }
    file.set_len(region_page * PAGE)?;
    Ok(extents)
}

/// Writes what matters of a block of pages that begins with page `first`.
fn write_block(
    bytes: &[u8],
    first: u64,
    written: Option<&PageSet>,
    file: &File,
    extents: &mut Vec<Extent>,
) -> std::io::Result<()> {
    let matters = |n: usize| match written {
        Some(written) => written.contains(first + n as u64),
        None => !is_zero(&bytes[n * PAGE as usize..][..PAGE as usize]),
    };
    let pages = bytes.len() / PAGE as usize;
    let mut n = 0;
    while n < pages {
        if !matters(n) {
            n += 1;
            continue;
        }
        let begin = n;
        while n < pages && matters(n) {
            n += 1;
        }
        let run = &bytes[begin * PAGE as usize..n * PAGE as usize];
        let extent = Extent { first: first + begin as u64, count: (n - begin) as u32, crc: crc32fast::hash(run) };
        file.write_all_at(run, extent.bytes().0)?;
        extents.push(extent);
    }
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    // Word by word, and out at the first that is not: most pages differ early.
    page.as_chunks::<64>().0.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The way from folder `from` to `to`, both absolute and without links.
fn relative(from: &Path, to: &Path) -> std::io::Result<PathBuf> {
    if !from.is_absolute() || !to.is_absolute() {
        return Err(std::io::Error::other("not an absolute path"));
    }
    let (mut from, mut to) = (from.components().peekable(), to.components().peekable());
    while from.peek().is_some() && from.peek() == to.peek() {
        from.next();
        to.next();
    }
    Ok(from.map(|_| Path::new("..")).chain(to.map(|part| Path::new(part.as_os_str()))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_between_folders() {
        for (from, to, way) in [("/a/b", "/a/c", "../c"), ("/a", "/a/b/c", "b/c"), ("/x/y", "/z", "../../z")] {
            assert_eq!(relative(Path::new(from), Path::new(to)).unwrap(), Path::new(way));
        }
    }

    #[test]
    fn tscs_read_one_after_another_are_saved_as_one() {
        let state = |tsc| {
            let mut state = VcpuState::default();
            state.set_msr(msr::IA32_TSC, tsc);
            state
        };
        let first = state(5_000_000);
        // 1 ms at 3 GHz is 3,000,000 ticks.
        for (read, saved) in
            [(5_000_000, 5_000_000), (8_000_000, 5_000_000), (9_000_000, 9_000_000), (4_000_000, 4_000_000)]
        {
            let mut second = state(read);
            align_tsc(&mut second, Some(&first), 1_000_000, 3_000_000);
            assert_eq!(second.msr(msr::IA32_TSC), Some(saved));
        }
    }

    #[test]
    fn zeros_are_seen() {
        let mut page = [0u8; PAGE as usize];
        assert!(is_zero(&page));
        for at in [0, 63, 64, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page));
            page[at] = 0;
        }
    }
}
