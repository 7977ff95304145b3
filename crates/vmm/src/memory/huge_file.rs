//! A file in memory that is on transparent huge pages.
//!
//! Whether a file in memory may have them is up to its file system. memfd's is the kernel's own and has none on most hosts
//! (`shmem_enabled` is `never` by default); a tmpfs says so itself, with `huge=` (tmpfs(5)). So the file goes to a tmpfs
//! of its own, which is never attached to any folder and goes with the file. Who may not mount makes it in a user
//! namespace, where the host lets users have some.

use anyvisor_engine::memory::FILE_NAME;
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::{DupFlags, dup3, write};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// A file of `size` bytes, wholly of huge pages but for a rest at the end.
///
/// # Errors
/// The host lets this user have no such file: it is older than Linux 5.2, or user namespaces are forbidden.
pub fn create(size: u64) -> io::Result<File> {
    let bytes = size.to_string();
    let file = File::from(make(&bytes).or_else(|_| make_in_namespace(&bytes))?);
    file.set_len(size)?;
    Ok(file)
}

/// An empty file that may grow to `bytes`, a decimal number. Makes system calls and nothing else.
fn make(bytes: &str) -> rustix::io::Result<OwnedFd> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "huge", "within_size")?;
    fsconfig_set_string(&fs, "size", bytes)?;
    fsconfig_create(&fs)?;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    openat(&mount, FILE_NAME, flags, Mode::RUSR | Mode::WUSR)
}

/// The same, by a process of its own, in namespaces of its own in which this user may mount.
fn make_in_namespace(bytes: &str) -> io::Result<OwnedFd> {
    const NAMESPACES: libc::c_int = libc::CLONE_NEWUSER | libc::CLONE_NEWNS;
    // The other process puts the file in its place.
    let mut file: OwnedFd = File::open("/dev/null")?.into();
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let maps = [
        ("/proc/self/setgroups", "deny".into()),
        ("/proc/self/uid_map", format!("{user} {user} 1")),
        ("/proc/self/gid_map", format!("{group} {group} 1")),
    ];
    let fill = |file: &mut OwnedFd| -> rustix::io::Result<()> {
        for (path, text) in &maps {
            write(open(*path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?, text.as_bytes())?;
        }
        dup3(make(bytes)?, file, DupFlags::CLOEXEC)
    };
    // SAFETY: a new process, as by fork(2), but for the descriptors, which are shared. Other threads of this process do
    // not exist in it and may hold locks for ever: it makes system calls, on memory that is there already, and ends.
    let process = unsafe { libc::syscall(libc::SYS_clone, NAMESPACES | libc::CLONE_FILES, 0, 0, 0, 0) } as libc::pid_t;
    if process == 0 {
        let status = fill(&mut file).err().map_or(0, |error| error.raw_os_error());
        // SAFETY: has no preconditions.
        unsafe { libc::_exit(status) };
    }
    if process < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: writes to `status`. __WALL: the process ends without a signal to this one, who might have a handler for it.
    while unsafe { libc::waitpid(process, &mut status, libc::__WALL) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(file),
        (true, error) => Err(io::Error::from_raw_os_error(error)),
        _ => Err(io::Error::other("the process that was to make a file did not end well")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn is_a_file_of_its_own(file: &File) {
        let (mut file, mut text) = (file.try_clone().unwrap(), String::new());
        file.write_all(b"something").unwrap();
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "something");
    }

    #[test]
    fn users_who_may_not_mount_have_files() {
        match make_in_namespace("4194304") {
            Ok(file) => {
                let flags = rustix::io::fcntl_getfd(&file).unwrap();
                assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
                is_a_file_of_its_own(&file.into());
            }
            Err(error) => {
                println!("left out: this host has no namespaces for this user: {error}");
                let refusals = [libc::EPERM, libc::EACCES, libc::ENOSPC, libc::EUSERS];
                assert!(error.raw_os_error().is_some_and(|number| refusals.contains(&number)), "{error}");
            }
        }
    }
}
