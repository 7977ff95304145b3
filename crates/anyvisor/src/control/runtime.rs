//! The runtime folder: each VM of this user has `ID.sock`, its control socket, and `ID.lock` there.
//!
//! **Problem.** A VM that was killed leaves its socket behind; a name must belong to one VM at a time; and
//! nobody else may put anything there, or listen in our place.
//!
//! **Idea.** A VM holds an exclusive lock (`flock`) on its lock file as long as its process lives: the kernel
//! lets go of it whatever kills the process. Who gets the lock of a file that is there knows that its VM is
//! dead, and may clean up. The file holds the process id, for messages only.
//!
//! The folder is `anyvisor` in `$XDG_RUNTIME_DIR`, else in `/run/user/UID`, else `/tmp/anyvisor-UID`; it is ours
//! alone (mode 0700, checked). A VM may have its socket elsewhere (`--api-sock`), with the lock beside it.

use anyvisor_vmm::{Error, Result};
use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// Most characters of a VM's name.
const ID_MAX: usize = 64;
/// Most bytes of a socket's path: what `sockaddr_un` holds, without the closing zero.
const SOCKET_PATH_MAX: usize = 107;

/// Checks a VM's name: it is part of a file's name, and of messages and tables.
///
/// # Errors
/// One line about what is wrong with it.
pub fn check_id(id: &str) -> std::result::Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if id.is_empty() || id.len() > ID_MAX {
        return Err(format!("a VM's name has 1 to {ID_MAX} characters, not {}", id.len()));
    }
    if !id.chars().all(good) || !id.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(format!("bad name '{id}'; use letters, digits, '-', '_' and '.', a letter or digit first"));
    }
    Ok(id.to_owned())
}

/// The runtime folder's path; it need not exist.
///
/// # Errors
/// What stands at its place is not this user's alone.
pub fn find_folder() -> std::io::Result<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let xdg = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let folder = choose_folder(xdg.as_deref(), uid, &|path| {
        std::fs::metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == uid)
    });
    match std::fs::symlink_metadata(&folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(found) if found.is_dir() && found.uid() == uid && found.permissions().mode() & 0o077 == 0 => {}
        Ok(_) => {
            let path = folder.display();
            return Err(std::io::Error::other(format!("'{path}' is not a folder of this user alone (mode 0700)")));
        }
    }
    Ok(folder)
}

/// The runtime folder, made if need be.
fn make_folder() -> std::io::Result<PathBuf> {
    let folder = find_folder()?;
    match DirBuilder::new().mode(0o700).create(&folder) {
        Ok(()) => Ok(folder),
        // Somebody may have been quicker, with anything.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => find_folder(),
        Err(error) => Err(std::io::Error::new(error.kind(), format!("cannot make '{}': {error}", folder.display()))),
    }
}

fn choose_folder(xdg: Option<&Path>, uid: u32, is_ours: &dyn Fn(&Path) -> bool) -> PathBuf {
    let user = PathBuf::from(format!("/run/user/{uid}"));
    let bases = [xdg.filter(|path| path.is_absolute()), Some(&user)];
    match bases.into_iter().flatten().find(|base| is_ours(base)) {
        Some(base) => base.join("anyvisor"),
        None => format!("/tmp/anyvisor-{uid}").into(),
    }
}

/// Where a VM's socket and lock are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub socket: PathBuf,
    pub lock: PathBuf,
}

impl Place {
    /// In runtime folder `folder`.
    pub fn of_id(folder: &Path, id: &str) -> Place {
        Place { socket: folder.join(format!("{id}.sock")), lock: folder.join(format!("{id}.lock")) }
    }

    /// Of `--api-sock`.
    pub fn of_socket(socket: &Path) -> Place {
        let mut lock = socket.as_os_str().to_owned();
        lock.push(".lock");
        Place { socket: socket.to_owned(), lock: lock.into() }
    }
}

/// What `run` was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    Nothing,
    /// In the runtime folder; if that cannot be had, a warning will do.
    InFolder,
    At(PathBuf),
}

/// What this process has claimed, for [`remove_claimed`].
static CLAIMED: Mutex<Option<Place>> = Mutex::new(None);

/// A VM's name and socket, for as long as the value lives.
pub struct Claim {
    place: Place,
    _lock: File,
}

impl Claim {
    /// Claims the socket of VM `id`. `None`, after a warning on stderr, if the host has no place for it.
    ///
    /// # Errors
    /// The name is another VM's, or the place that the user gave will not do.
    pub fn new(id: &str, wanted: &Wanted) -> Result<Option<(Claim, UnixListener)>> {
        let place = match wanted {
            Wanted::Nothing => return Ok(None),
            Wanted::At(path) => Place::of_socket(path),
            Wanted::InFolder => match make_folder() {
                Ok(folder) => Place::of_id(&folder, id),
                Err(error) => {
                    eprintln!("anyvisor: {id}: no control socket: {error}; --no-api says that none is wanted");
                    return Ok(None);
                }
            },
        };
        let length = place.socket.as_os_str().len();
        if length > SOCKET_PATH_MAX {
            let path = place.socket.display();
            let what = format!("the control socket's path '{path}' has {length} bytes; {SOCKET_PATH_MAX} is the most");
            return Err(Error::user(format!("{what}; use a shorter --id, --api-sock PATH or --no-api")));
        }
        let (lock, left_by) = claim_lock(id, &place, wanted)?;
        let bound = remove_socket(&place, id, left_by).and_then(|()| UnixListener::bind(&place.socket));
        let listener = bound.map_err(|error| {
            let _ = std::fs::remove_file(&place.lock);
            Error::user(format!("cannot make control socket '{}': {error}", place.socket.display()))
        })?;
        *claimed() = Some(place.clone());
        let claim = Claim { place, _lock: lock };
        // In a folder that is ours alone nobody came before this; elsewhere the server asks who connects.
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&claim.place.socket, mode)
            .map_err(|error| Error::host(format!("cannot protect '{}'", claim.place.socket.display()), error))?;
        Ok(Some((claim, listener)))
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        remove(&self.place);
        *claimed() = None;
    }
}

/// Removes what this process has claimed. For one that leaves without running destructors.
pub fn remove_claimed() {
    if let Some(place) = &*claimed() {
        remove(place);
    }
}

/// A path is whole whatever a panicking holder did.
fn claimed() -> MutexGuard<'static, Option<Place>> {
    CLAIMED.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Removes socket and lock file; the lock must be held. What cannot be removed is found dead later.
fn remove(place: &Place) {
    // The lock last: it protects both.
    let _ = std::fs::remove_file(&place.socket);
    let _ = std::fs::remove_file(&place.lock);
}

/// The lock, with our process id in it, and the process that held it last, if it did not let go in order.
fn claim_lock(id: &str, place: &Place, wanted: &Wanted) -> Result<(File, Option<u32>)> {
    let trouble = |error: std::io::Error| {
        Error::user(format!("cannot make control socket '{}': {error}", place.socket.display()))
    };
    // One who merely looks whether the VM lives holds the lock for a moment.
    for attempt in 0..6 {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&place.lock).map_err(trouble)?;
        match file.try_lock() {
            Ok(()) if is_at(&file, &place.lock) => {
                let left_by = read_pid(&place.lock);
                let pid = std::process::id().to_string();
                file.set_len(0).and_then(|()| file.write_all_at(pid.as_bytes(), 0)).map_err(trouble)?;
                return Ok((file, left_by));
            }
            // Its VM has just ended and removed the file: there is a new one to be made.
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if attempt < 5 => std::thread::sleep(Duration::from_millis(20)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(trouble(error)),
        }
    }
    let by = holder(&place.lock);
    Err(Error::user(match wanted {
        Wanted::At(path) => format!("control socket '{}' is that of a running VM{by}; choose another", path.display()),
        _ => format!("a VM called '{id}' is running already{by}; choose another --id"),
    }))
}

/// ` (process 123)`, if the lock file says so.
fn holder(lock: &Path) -> String {
    match read_pid(lock) {
        Some(pid) => format!(" (process {pid})"),
        None => String::new(),
    }
}

/// The process id in a lock file.
pub fn read_pid(lock: &Path) -> Option<u32> {
    let mut text = String::new();
    File::open(lock).ok()?.take(20).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Whether `file` is still the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Removes the socket of a dead VM, and tells. Nothing but a socket on which nobody listens is ever removed.
fn remove_socket(place: &Place, id: &str, left_by: Option<u32>) -> std::io::Result<()> {
    let found = match std::fs::symlink_metadata(&place.socket) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if !found.file_type().is_socket() {
        return Err(std::io::Error::other("a file that is no socket is in its place"));
    }
    if UnixStream::connect(&place.socket).is_ok() {
        return Err(std::io::Error::other("another program listens there"));
    }
    std::fs::remove_file(&place.socket)?;
    let by = left_by.map_or(String::new(), |pid| format!(" (process {pid})"));
    eprintln!("anyvisor: {id}: removed the control socket of a dead VM{by}");
    Ok(())
}

/// Whether a VM lives.
#[derive(Debug)]
pub enum Life {
    /// Its process lives; by the open lock file its end can be waited for.
    Alive(Handle),
    /// It was killed. What it left has been removed.
    Dead { pid: Option<u32> },
    /// There never was one, or it ended in order.
    None,
}

/// A living VM's lock file.
#[derive(Debug)]
pub struct Handle {
    file: File,
    pub pid: Option<u32>,
}

impl Handle {
    /// Whether the VM's process has ended.
    pub fn has_ended(&self) -> bool {
        let free = self.file.try_lock_shared().is_ok();
        if free {
            // Unlocking cannot fail, and a lock on what a dead VM left would be in nobody's way for long.
            let _ = self.file.unlock();
        }
        free
    }
}

/// Looks whether a VM lives, and cleans up after a dead one.
///
/// # Errors
/// Its lock file cannot be read.
pub fn look(place: &Place) -> std::io::Result<Life> {
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&place.lock) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Life::None),
        other => other?,
    };
    if !file.metadata()?.is_file() {
        return Ok(Life::None);
    }
    let pid = read_pid(&place.lock);
    match file.try_lock() {
        Ok(()) if is_at(&file, &place.lock) => {
            remove(place);
            Ok(Life::Dead { pid })
        }
        Ok(()) => Ok(Life::None),
        Err(TryLockError::WouldBlock) => Ok(Life::Alive(Handle { file, pid })),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The names of all VMs in the runtime folder, living and dead, in order.
///
/// # Errors
/// The folder is there but cannot be read.
pub fn list(folder: &Path) -> std::io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
        other => other?,
    };
    let mut ids = vec![];
    for entry in entries {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("lock"))
            && let Some(id) = path.file_stem().and_then(OsStr::to_str)
            && check_id(id).is_ok()
        {
            ids.push(id.to_owned());
        }
    }
    ids.sort();
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(tempfile::TempDir);
    impl Scratch {
        fn new() -> Scratch {
            Scratch(tempfile::tempdir().unwrap())
        }
        fn at(&self, name: &str) -> Wanted {
            Wanted::At(self.0.path().join(name))
        }
        fn files(&self) -> usize {
            std::fs::read_dir(self.0.path()).unwrap().count()
        }
    }

    fn refusal(wanted: &Wanted) -> String {
        let Err(Error::User(text)) = Claim::new("x", wanted).map(|_| ()) else { panic!("not refused") };
        assert!(!text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn names() {
        for good in ["vm", "a", "vm-1234", "Web_1.example", "0", &"x".repeat(64)] {
            assert_eq!(check_id(good).as_deref(), Ok(good));
        }
        for bad in ["", ".", "..", "-x", ".x", "a/b", "a b", "a\nb", "ü", "a\0", "$(x)", &"x".repeat(65)] {
            let message = check_id(bad).unwrap_err();
            assert!(message.contains("name"), "{message}");
        }
    }

    #[test]
    fn folders_in_order_of_preference() {
        let xdg = Path::new("/run/xdg");
        let choose = |xdg: Option<&str>, ours: &[&str]| {
            choose_folder(xdg.map(Path::new), 7, &|path| ours.iter().any(|our| Path::new(our) == path))
        };
        assert_eq!(choose(xdg.to_str(), &["/run/xdg", "/run/user/7"]), xdg.join("anyvisor"));
        assert_eq!(choose(xdg.to_str(), &["/run/user/7"]), Path::new("/run/user/7/anyvisor"));
        assert_eq!(choose(None, &["/run/user/7"]), Path::new("/run/user/7/anyvisor"));
        assert_eq!(choose(Some("relative"), &["relative"]), Path::new("/tmp/anyvisor-7"));
        assert_eq!(choose(None, &[]), Path::new("/tmp/anyvisor-7"));
    }

    #[test]
    fn a_place_belongs_to_one_vm_until_it_ends() {
        let scratch = Scratch::new();
        let wanted = scratch.at("a.sock");
        let (claim, _listener) = Claim::new("x", &wanted).unwrap().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&claim.place.socket), mode(&claim.place.lock)), (0o600, 0o600));
        assert!(refusal(&wanted).contains(&format!("process {}", std::process::id())));
        let Life::Alive(handle) = look(claim.place()).unwrap() else { panic!("not alive") };
        assert_eq!((handle.pid, handle.has_ended()), (Some(std::process::id()), false));
        drop(claim);
        assert!(handle.has_ended());
        assert_eq!(scratch.files(), 0);
        assert!(Claim::new("x", &wanted).unwrap().is_some());
    }

    #[test]
    fn what_a_dead_vm_left_is_cleaned_up() {
        let scratch = Scratch::new();
        let place = Place::of_socket(&scratch.0.path().join("a.sock"));
        for clean in [false, true] {
            drop(UnixListener::bind(&place.socket).unwrap());
            std::fs::write(&place.lock, "4000000000").unwrap();
            if clean {
                let Life::Dead { pid } = look(&place).unwrap() else { panic!("not dead") };
                assert_eq!((pid, scratch.files()), (Some(4_000_000_000), 0));
            } else {
                drop(Claim::new("x", &scratch.at("a.sock")).unwrap().unwrap());
            }
        }
        assert!(matches!(look(&place).unwrap(), Life::None));
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let scratch = Scratch::new();
        std::fs::write(scratch.0.path().join("file"), "precious").unwrap();
        assert!(refusal(&scratch.at("file")).contains("no socket"));
        assert_eq!(std::fs::read(scratch.0.path().join("file")).unwrap(), b"precious");
        let _other = UnixListener::bind(scratch.0.path().join("taken")).unwrap();
        assert!(refusal(&scratch.at("taken")).contains("listens"));
        assert!(refusal(&scratch.at("missing/folder")).contains("missing/folder"));
        assert!(refusal(&scratch.at(&"x".repeat(100))).contains("107"));
        // A link in place of the lock file is not followed.
        std::os::unix::fs::symlink(scratch.0.path().join("file"), scratch.0.path().join("linked.lock")).unwrap();
        refusal(&scratch.at("linked"));
        assert_eq!(std::fs::read(scratch.0.path().join("file")).unwrap(), b"precious");
    }

    #[test]
    fn lists_are_of_locks_with_good_names() {
        let scratch = Scratch::new();
        for name in ["b.lock", "a.lock", "a.sock", "a.log", ".lock", "-x.lock"] {
            std::fs::write(scratch.0.path().join(name), "").unwrap();
        }
        assert_eq!(list(scratch.0.path()).unwrap(), ["a", "b"]);
        assert!(list(&scratch.0.path().join("missing")).unwrap().is_empty());
    }
}
