//! The files of a shared folder that the guest knows, by number, and how they are found again.
//!
//! **Idea.** A node is a file, named by its device and inode, and held by a descriptor that can do nothing but name it
//! (O_PATH). There may be more nodes than this process may have descriptors, so these are a cache: a node also knows its
//! folder and its name there, and is opened again from there, one component at a time, without following links; it must be
//! the same file then.
//!
//! Invariants: each name is one component ([`Name`]); what is reached by names from the root lies below it. A node is
//! kept as long as the guest has references to it or to a node below it. A file that the guest has removed has no way
//! back, so its descriptor stays.

use anyvisor_devices::virtio::fs::{Errno, Name, ROOT};
use rustix::fs::{AtFlags, Mode, OFlags, Stat, fstat, openat, statat};
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Most nodes that a guest can have: bounds what they take of this process's memory.
const NODES_MAX: usize = 1 << 20;
/// Components between a node and the next that is open, beyond which a tree makes no sense.
const DEPTH_MAX: usize = 4096;

const OPEN: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// File systems that are a window into the host's kernel, this process included: /proc and its like. Their folders can be
/// seen, so that a guest can mount its own there, and nothing below.
const CLOSED: [i64; 19] = [
    libc::PROC_SUPER_MAGIC,
    libc::SYSFS_MAGIC,
    libc::DEBUGFS_MAGIC,
    libc::TRACEFS_MAGIC,
    libc::SECURITYFS_MAGIC,
    libc::CGROUP_SUPER_MAGIC,
    libc::CGROUP2_SUPER_MAGIC,
    libc::BPF_FS_MAGIC,
    libc::SELINUX_MAGIC,
    libc::SMACK_MAGIC,
    libc::RDTGROUP_SUPER_MAGIC,
    libc::NSFS_MAGIC,
    libc::DEVPTS_SUPER_MAGIC,
    libc::HUGETLBFS_MAGIC,
    // Of the kernel's own headers: EFI variables, binfmt_misc, pstore, configfs, POSIX message queues.
    0xde5e_81e4,
    0x4249_4e4d,
    0x6165_676c,
    0x6265_6570,
    0x1980_0202,
];

/// What tells files apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Id {
    device: u64,
    inode: u64,
}

/// What a node is as long as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct What {
    id: Id,
    /// The type's bits of its mode.
    kind: u32,
    /// It is on one of the [`CLOSED`] file systems.
    closed: bool,
}

impl What {
    /// Of an open file. On the file system of its folder, if that is known, it is as that.
    fn of(fd: impl AsFd, folder: Option<What>) -> Result<(What, Stat), Errno> {
        let stat = fstat(&fd).map_err(errno)?;
        let closed = match folder {
            Some(folder) if folder.id.device == stat.st_dev => folder.closed,
            // Numbers of file systems are used again: it is looked at each time.
            _ => CLOSED.contains(&rustix::fs::fstatfs(fd).map_err(errno)?.f_type),
        };
        let id = Id { device: stat.st_dev, inode: stat.st_ino };
        Ok((What { id, kind: stat.st_mode & libc::S_IFMT, closed }, stat))
    }
}

struct Node {
    what: What,
    parent: u64,
    name: Box<[u8]>,
    references: u64,
    /// Nodes that are found through this one.
    below: u64,
    fd: Option<Arc<OwnedFd>>,
    /// Used since the cache looked last.
    recent: bool,
    /// It cannot be opened again.
    gone: bool,
}

/// All nodes of a folder.
pub struct Nodes {
    nodes: HashMap<u64, Node>,
    numbers: HashMap<Id, u64>,
    next: u64,
    /// Nodes that hold a descriptor, in the order in which they may lose it.
    cached: VecDeque<u64>,
    cached_max: usize,
    /// File systems that were met; the root's is the first.
    devices: Vec<u64>,
}

impl Nodes {
    /// The nodes of the folder `root`, which may hold about `cached_max` descriptors.
    ///
    /// # Errors
    /// The host's.
    pub fn new(root: Arc<OwnedFd>, cached_max: usize) -> Result<Nodes, Errno> {
        let (what, _) = What::of(&root, None)?;
        let node = Node {
            what,
            parent: ROOT,
            name: Box::default(),
            references: 1,
            below: 0,
            fd: Some(root),
            recent: true,
            gone: true,
        };
        Ok(Nodes {
            numbers: HashMap::from([(what.id, ROOT)]),
            nodes: HashMap::from([(ROOT, node)]),
            next: ROOT + 1,
            cached: VecDeque::new(),
            cached_max: cached_max.max(8),
            devices: vec![what.id.device],
        })
    }

    /// Forgets all but the root.
    pub fn clear(&mut self) {
        self.nodes.retain(|number, _| *number == ROOT);
        self.numbers.retain(|_, number| *number == ROOT);
        self.cached.clear();
        if let Some(root) = self.nodes.get_mut(&ROOT) {
            root.below = 0;
        }
    }

    /// The type's bits of the node's mode.
    pub fn kind(&self, number: u64) -> Result<u32, Errno> {
        Ok(self.get(number)?.what.kind)
    }

    /// Whether the node's file system is open to the guest.
    pub fn check_open(&self, number: u64) -> Result<(), Errno> {
        if self.get(number)?.what.closed { Err(Errno::ACCES) } else { Ok(()) }
    }

    /// What the guest is told of the inode's number, so that files of several file systems have different ones.
    pub fn shown_inode(&self, stat: &Stat) -> u64 {
        let nth = self.devices.iter().position(|device| *device == stat.st_dev).unwrap_or(0);
        stat.st_ino ^ (nth as u64) << 48
    }

    /// The node's descriptor, which names it and can do nothing else.
    ///
    /// # Errors
    /// There is no such node, or it is not found any more where it was.
    pub fn fd(&mut self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        let mut way = vec![];
        let mut at = number;
        let mut fd = loop {
            let node = self.nodes.get_mut(&at).ok_or(Errno::BADF)?;
            if let Some(fd) = &node.fd {
                node.recent = true;
                break fd.clone();
            }
            if way.len() > DEPTH_MAX || node.gone {
                return Err(Errno::STALE);
            }
            way.push(at);
            at = node.parent;
        };
        for number in way.into_iter().rev() {
            let node = self.get(number)?;
            let above = self.get(node.parent)?.what;
            let opened = openat(&fd, &*node.name, OPEN, Mode::empty()).map_err(errno)?;
            if above.closed || What::of(&opened, Some(above))?.0 != node.what {
                return Err(Errno::STALE);
            }
            fd = Arc::new(opened);
            self.cache(number, fd.clone())?;
        }
        Ok(fd)
    }

    /// The descriptor of a folder in which names may be looked at.
    ///
    /// # Errors
    /// As for [`Nodes::fd`], and what is behind the folder is not the guest's business.
    pub fn folder(&mut self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        self.check_open(number)?;
        self.fd(number)
    }

    /// Finds a file, and counts one reference to its node.
    ///
    /// # Errors
    /// The host's; and there are too many nodes.
    pub fn look_up(&mut self, parent: u64, name: Name) -> Result<(u64, Stat), Errno> {
        let folder = self.folder(parent)?;
        let fd = openat(folder, name.bytes(), OPEN, Mode::empty()).map_err(errno)?;
        let (what, stat) = What::of(&fd, Some(self.get(parent)?.what))?;
        if let Some(&number) = self.numbers.get(&what.id)
            && let node = self.get_mut(number)?
            // Else the inode's number is another file's by now.
            && node.what == what
        {
            node.references = node.references.saturating_add(1);
            if number != ROOT {
                self.put(number, parent, name);
            }
            return Ok((number, stat));
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(Errno::NFILE);
        }
        if !self.devices.contains(&stat.st_dev) {
            self.devices.push(stat.st_dev);
        }
        let number = self.next;
        self.next += 1;
        let node = Node {
            what,
            parent,
            name: name.bytes().into(),
            references: 1,
            below: 0,
            fd: None,
            recent: false,
            gone: false,
        };
        self.nodes.insert(number, node);
        self.numbers.insert(what.id, number);
        self.get_mut(parent)?.below += 1;
        if let Err(error) = self.cache(number, Arc::new(fd)) {
            self.forget(number, 1);
            return Err(error);
        }
        Ok((number, stat))
    }

    /// Takes references from a node.
    pub fn forget(&mut self, number: u64, count: u64) {
        if number == ROOT {
            return;
        }
        if let Ok(node) = self.get_mut(number) {
            node.references = node.references.saturating_sub(count);
        }
        self.drop_unused(number);
    }

    fn drop_unused(&mut self, mut number: u64) {
        while let Some(node) = self.nodes.get(&number)
            && number != ROOT
            && node.references == 0
            && node.below == 0
        {
            let (id, parent) = (node.what.id, node.parent);
            self.nodes.remove(&number);
            // The same inode may be another file by now.
            if self.numbers.get(&id) == Some(&number) {
                self.numbers.remove(&id);
            }
            if let Ok(above) = self.get_mut(parent) {
                above.below -= 1;
            }
            number = parent;
        }
    }

    /// The node of the file that is called `name`, if the guest has one.
    pub fn known(&self, folder: impl AsFd, name: Name) -> Option<u64> {
        let stat = statat(folder, name.bytes(), AtFlags::SYMLINK_NOFOLLOW).ok()?;
        self.numbers.get(&Id { device: stat.st_dev, inode: stat.st_ino }).copied()
    }

    /// The node is now to be found there.
    pub fn put(&mut self, number: u64, parent: u64, name: Name) {
        let Some(node) = self.nodes.get(&number) else { return };
        if node.parent == parent && *node.name == *name.bytes() {
            return;
        }
        // A folder that is mounted in itself is found where it was.
        let mut above = parent;
        while above != ROOT {
            match self.nodes.get(&above) {
                Some(folder) if above != number => above = folder.parent,
                _ => return,
            }
        }
        let Some(node) = self.nodes.get_mut(&number) else { return };
        let before = std::mem::replace(&mut node.parent, parent);
        node.name = name.bytes().into();
        if let Ok(above) = self.get_mut(parent) {
            above.below += 1;
        }
        if let Ok(above) = self.get_mut(before) {
            above.below -= 1;
        }
        self.drop_unused(before);
    }

    /// The node's name is removed: its file is known by its descriptor only, and another may get its inode's number.
    pub fn remove(&mut self, number: u64, last: bool) {
        if let Some(node) = self.nodes.get_mut(&number)
            && number != ROOT
        {
            node.gone = true;
            if last {
                self.numbers.remove(&node.what.id);
            }
        }
    }

    /// Keeps the descriptor of a node, for which another may lose its own.
    fn cache(&mut self, number: u64, fd: Arc<OwnedFd>) -> Result<(), Errno> {
        let mut left = 2 * self.cached.len();
        while self.cached.len() >= self.cached_max {
            if left == 0 {
                return Err(Errno::NFILE);
            }
            left -= 1;
            let Some(first) = self.cached.pop_front() else { break };
            match self.nodes.get_mut(&first) {
                None => {}
                Some(node) if node.recent || node.gone => {
                    node.recent = false;
                    self.cached.push_back(first);
                }
                Some(node) => node.fd = None,
            }
        }
        self.get_mut(number)?.fd = Some(fd);
        self.cached.push_back(number);
        Ok(())
    }

    fn get(&self, number: u64) -> Result<&Node, Errno> {
        self.nodes.get(&number).ok_or(Errno::BADF)
    }

    fn get_mut(&mut self, number: u64) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&number).ok_or(Errno::BADF)
    }

    #[cfg(test)]
    pub fn count(&self) -> (usize, usize) {
        (self.nodes.len(), self.nodes.values().filter(|node| node.fd.is_some()).count())
    }
}

/// The host's error, for the guest.
pub fn errno(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}
