//! Shared folders (virtio 1.2, 5.11): FUSE messages in virtqueues, and what they ask of [`Files`].
//!
//! **Idea.** A [`Server`] takes a message out of a chain, checks all of it, asks [`Files`] for what it says, and puts the
//! answer back. What is read and written goes between the files and guest RAM without a copy in between. What `Files`
//! cannot do yet, because somebody else has to come first, stays here until it can ([`Server::resume`]).
//!
//! **A guest that misbehaves.** A message that makes no sense gets EINVAL as its answer; a chain without a message, or
//! without room for an answer, breaks the device. Names are one component, never `.` or `..` ([`Name`]). What is kept
//! of a message is at most [`BODY_MAX`] bytes, and of an answer what the driver has room for.

mod wire;

use super::pci::Offer;
use super::queue::{Chain, Piece, gather, scatter, split, total};
use super::{Broken, Written, feature};
use std::time::Duration;
use vm_memory::GuestMemoryMmap;
pub use wire::{Attributes, Change, Entry, Errno, Header, Listed, Name, NewTime, Opened, Owner, Statistics, Time};
use wire::{Body, IN_HEADER, OUT_HEADER, opcode};

/// Most bytes of a tag, by which a guest mounts the folder.
pub const TAG_MAX: usize = 36;
/// The queue for messages that must not wait behind others, and the queue of all others.
pub const FIRST: usize = 0;
pub const REQUESTS: usize = 1;
/// The node of the shared folder itself.
pub const ROOT: u64 = 1;

const DEVICE: u16 = 26;
/// Mass storage, other.
const CLASS: u32 = 0x01_8000;
/// Drivers send data of as many pages as a queue has descriptors, but for a few.
const QUEUE_SIZE: u16 = 512;
const FIRST_SIZE: u16 = 128;
/// Most bytes of a message without its data: two names of 255 bytes, or a link's target of 4095 and a name, and more.
pub const BODY_MAX: u32 = 16 << 10;
/// Most bytes of a folder's list in one answer.
const LIST_MAX: u32 = 128 << 10;
/// What Linux lets be passed with open(2) that is not its own business.
const ACCESS_MODE: u32 = 3;

/// A folder that is shared, by nodes. Each answer of a node counts: the driver has it until it has forgotten that often.
///
/// Errors are for the guest, in Linux' numbers. What a file system does not have answers [`Errno::NOSYS`].
pub trait Files: Send {
    /// For how long the driver may believe what it is told of files without asking again.
    fn lasting(&self) -> Duration;
    /// Nothing is had or open any more.
    fn reset(&mut self);
    fn lookup(&mut self, parent: u64, name: Name) -> Result<Entry, Errno>;
    fn forget(&mut self, node: u64, count: u64);
    fn attributes(&mut self, node: u64, handle: Option<u64>) -> Result<Attributes, Errno>;
    fn change(&mut self, node: u64, change: &Change) -> Result<Attributes, Errno>;
    fn read_link(&mut self, node: u64) -> Result<Vec<u8>, Errno>;
    fn make(&mut self, parent: u64, name: Name, what: Make, owner: Owner) -> Result<Entry, Errno>;
    fn link(&mut self, node: u64, parent: u64, name: Name) -> Result<Entry, Errno>;
    /// Removes a folder or another file.
    fn remove(&mut self, parent: u64, name: Name, folder: bool) -> Result<(), Errno>;
    /// `flags` are renameat2(2)'s.
    fn rename(&mut self, from: (u64, Name), to: (u64, Name), flags: u32) -> Result<(), Errno>;
    /// `flags` are open(2)'s.
    fn open(&mut self, node: u64, flags: u32, folder: bool) -> Result<Opened, Errno>;
    fn create(&mut self, place: (u64, Name), mode: u32, flags: u32, owner: Owner) -> Result<(Entry, Opened), Errno>;
    fn close(&mut self, handle: u64) -> Result<(), Errno>;
    /// Reads into `data`: returns the bytes, fewer only at the end, or `None` if there are none yet.
    fn read(&mut self, handle: u64, offset: u64, data: &Data) -> Result<Option<u32>, Errno>;
    /// Writes `data`: returns the bytes, or `None` if there is no room yet.
    fn write(&mut self, handle: u64, offset: u64, data: &Data) -> Result<Option<u32>, Errno>;
    /// What a folder holds from `offset` on, 0 or a [`Listed::next`]: as much as fits into about `room` bytes.
    fn list(&mut self, handle: u64, offset: u64, room: usize) -> Result<Vec<Listed>, Errno>;
    /// Has what was written last; `data` without what is not needed to read it again.
    fn sync(&mut self, handle: u64, data: bool) -> Result<(), Errno>;
    /// `mode` is fallocate(2)'s.
    fn allocate(&mut self, handle: u64, mode: u32, offset: u64, length: u64) -> Result<(), Errno>;
    /// Where data or a hole begins; `whence` is lseek(2)'s.
    fn seek(&mut self, handle: u64, offset: u64, whence: u32) -> Result<u64, Errno>;
    /// Copies from one open file's offset to another's; returns the bytes.
    fn copy(&mut self, from: (u64, u64), to: (u64, u64), length: u64) -> Result<u64, Errno>;
    fn statistics(&mut self, node: u64) -> Result<Statistics, Errno>;
}

/// A file to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Make<'a> {
    Folder {
        mode: u32,
    },
    Link {
        target: &'a [u8],
    },
    /// Any other, by the type in its mode.
    Node {
        mode: u32,
    },
}

/// Guest RAM to read into, or to write from.
pub struct Data<'a> {
    pub memory: &'a GuestMemoryMmap,
    pub pieces: &'a [Piece],
}

/// What the device that shares a folder as `tag` offers.
///
/// # Panics
/// The tag is too long.
pub fn offer(tag: &str) -> Offer {
    let mut config = vec![0; TAG_MAX];
    config[..tag.len()].copy_from_slice(tag.as_bytes());
    config.extend(1u32.to_le_bytes());
    let features = feature::INDIRECT | feature::EVENT_INDEX;
    Offer { device: DEVICE, class: CLASS, features, queues: vec![FIRST_SIZE, QUEUE_SIZE], config, writable: 0..0 }
}

/// The device's side of a mounted folder.
pub struct Server<F> {
    files: F,
    /// Requests that could not be answered yet, by their queue.
    waiting: Vec<(usize, Chain)>,
}

/// A chain to give back, with so many bytes written into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub queue: usize,
    pub head: u16,
    pub length: u32,
}

/// What comes of a request.
enum Answer {
    /// These bytes.
    Bytes(Vec<u8>),
    /// As many bytes as have been put where they belong already.
    Data(u32),
    /// The driver expects none.
    None,
    Later,
}

impl<F: Files> Server<F> {
    pub fn new(files: F) -> Server<F> {
        Server { files, waiting: vec![] }
    }

    pub fn files(&self) -> &F {
        &self.files
    }

    pub fn files_mut(&mut self) -> &mut F {
        &mut self.files
    }

    /// The driver has reset the device.
    pub fn reset(&mut self) {
        self.waiting.clear();
        self.files.reset();
    }

    /// Whether requests wait for [`Server::resume`].
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Carries out the request in `chain` of queue `n`. `None` if it cannot be answered yet.
    ///
    /// # Errors
    /// The chain makes no sense.
    pub fn serve(
        &mut self,
        n: usize,
        chain: Chain,
        memory: &GuestMemoryMmap,
        written: Written,
    ) -> Result<Option<Done>, Broken> {
        let mut header = [0; IN_HEADER];
        gather(memory, &chain.readable, &mut header).ok_or(Broken("a request of a shared folder without a header"))?;
        let header = Header::parse(&header);
        let (head, data) = split(&chain.writable, OUT_HEADER as u64);
        let request = Request { header, chain: &chain, memory, written, data };
        let (error, length) = match self.carry_out(&request) {
            // A driver that follows the rules has no more chains than that out.
            Ok(Answer::Later) if self.waiting.len() >= usize::from(QUEUE_SIZE + FIRST_SIZE) => {
                return Err(Broken("more requests of a shared folder wait than its queues hold"));
            }
            Ok(Answer::Later) => {
                self.waiting.push((n, chain));
                return Ok(None);
            }
            Ok(Answer::None) => return Ok(Some(Done { queue: n, head: chain.head, length: 0 })),
            Ok(Answer::Data(length)) => (None, length),
            Ok(Answer::Bytes(bytes)) if bytes.len() as u64 > total(&request.data) => (Some(Errno::TOO_BIG), 0),
            Ok(Answer::Bytes(bytes)) => (None, scatter(memory, &request.data, &bytes, written)),
            Err(error) => (Some(error), 0),
        };
        if total(&head) < OUT_HEADER as u64 {
            return Err(Broken("a request of a shared folder without room for its answer"));
        }
        scatter(memory, &head, &header.answer(error, length), written);
        Ok(Some(Done { queue: n, head: chain.head, length: OUT_HEADER as u32 + length }))
    }

    /// Tries the requests again that could not be answered yet; returns those that could be now.
    ///
    /// # Errors
    /// As for [`Server::serve`].
    pub fn resume(&mut self, memory: &GuestMemoryMmap, written: Written) -> Result<Vec<Done>, Broken> {
        let waiting = std::mem::take(&mut self.waiting);
        let answers = waiting.into_iter().map(|(n, chain)| self.serve(n, chain, memory, written));
        answers.filter_map(Result::transpose).collect()
    }

    fn carry_out(&mut self, request: &Request) -> Result<Answer, Errno> {
        let Header { opcode, node, .. } = request.header;
        let bytes = match request.body() {
            // The driver does not read answers to these.
            Err(_) if matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET) => return Ok(Answer::None),
            bytes => bytes?,
        };
        let body = Body(&bytes);
        match opcode {
            opcode::READ => self.read(request, body),
            opcode::WRITE => self.write(request, body),
            opcode::FORGET => {
                self.files.forget(node, body.u64(0).unwrap_or(0));
                Ok(Answer::None)
            }
            opcode::BATCH_FORGET => {
                for one in bytes.get(8..).unwrap_or_default().chunks_exact(16).map(Body) {
                    self.files.forget(one.u64(0)?, one.u64(8)?);
                }
                Ok(Answer::None)
            }
            opcode::READDIR => self.list(request, body, false),
            opcode::READDIRPLUS => self.list(request, body, true),
            _ => {
                let mut reply = Vec::new();
                self.simple(request, body, &mut reply)?;
                Ok(Answer::Bytes(reply))
            }
        }
    }

    /// What is a call and its answer.
    fn simple(&mut self, request: &Request, body: Body, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let Header { opcode, node, owner, .. } = request.header;
        let lasting = self.files.lasting();
        let files = &mut self.files;
        match opcode {
            opcode::INIT => {
                reply.extend(wire::init(body)?);
                files.reset();
            }
            opcode::DESTROY => files.reset(),
            opcode::GETATTR => {
                const HANDLE: u32 = 1;
                let handle = if body.u32(0)? & HANDLE == 0 { None } else { Some(body.u64(8)?) };
                wire::put_attributes(&files.attributes(node, handle)?, lasting, reply);
            }
            opcode::SETATTR => {
                wire::put_attributes(&files.change(node, &Change::parse(body)?)?, lasting, reply);
            }
            opcode::READLINK => reply.extend(files.read_link(node)?),
            opcode::STATFS => files.statistics(node)?.put(reply),
            opcode::OPEN | opcode::OPENDIR => {
                let folder = opcode == opcode::OPENDIR;
                files.open(node, body.u32(0)?, folder)?.put(folder, reply);
            }
            opcode::RELEASE | opcode::RELEASEDIR => files.close(body.u64(0)?)?,
            opcode::FSYNC | opcode::FSYNCDIR => files.sync(body.u64(0)?, body.u32(8)? & 1 != 0)?,
            opcode::FALLOCATE => files.allocate(body.u64(0)?, body.u32(24)?, body.u64(8)?, body.u64(16)?)?,
            opcode::LSEEK => {
                let at = files.seek(body.u64(0)?, body.u64(8)?, body.u32(16)?)?;
                reply.extend(at.to_le_bytes());
            }
            opcode::COPY_FILE_RANGE => {
                // The answer has 32 bits for how many.
                let length = body.u64(40)?.min(0xffff_f000);
                let from = (body.u64(0)?, body.u64(8)?);
                let copied = files.copy(from, (body.u64(24)?, body.u64(32)?), length)?;
                reply.extend(copied.to_le_bytes());
            }
            opcode::UNLINK | opcode::RMDIR => files.remove(node, body.name(0)?.0, opcode == opcode::RMDIR)?,
            opcode::RENAME | opcode::RENAME2 => {
                let (to, flags, names) =
                    if opcode == opcode::RENAME { (body.u64(0)?, 0, 8) } else { (body.u64(0)?, body.u32(8)?, 16) };
                let (old, next) = body.name(names)?;
                files.rename((node, old), (to, body.name(next)?.0), flags)?;
            }
            opcode::CREATE => {
                let (mode, flags) = (body.u32(4)?, body.u32(0)?);
                let (entry, opened) = files.create((node, body.name(16)?.0), mode & 0o7777, flags, owner)?;
                entry.put(lasting, reply);
                opened.put(false, reply);
            }
            _ => {
                let found = match opcode {
                    opcode::LOOKUP => files.lookup(node, body.name(0)?.0),
                    opcode::MKDIR => {
                        let mode = body.u32(0)? & 0o7777;
                        files.make(node, body.name(8)?.0, Make::Folder { mode }, owner)
                    }
                    opcode::MKNOD => {
                        let mode = body.u32(0)?;
                        files.make(node, body.name(16)?.0, Make::Node { mode }, owner)
                    }
                    opcode::SYMLINK => {
                        let (name, next) = body.name(0)?;
                        files.make(node, name, Make::Link { target: body.text(next)?.0 }, owner)
                    }
                    opcode::LINK => files.link(body.u64(0)?, node, body.name(8)?.0),
                    _ => Err(Errno::NOSYS),
                };
                let entry = match found {
                    // The driver remembers that it is not there.
                    Err(Errno::NOENT) if opcode == opcode::LOOKUP && !lasting.is_zero() => Entry::default(),
                    found => found?,
                };
                entry.put(lasting, reply);
            }
        }
        Ok(())
    }

    fn read(&mut self, request: &Request, body: Body) -> Result<Answer, Errno> {
        let (handle, offset, size) = (body.u64(0)?, body.u64(8)?, body.u32(16)?);
        let (pieces, _) = split(&request.data, size.into());
        let data = Data { memory: request.memory, pieces: &pieces };
        let result = self.files.read(handle, offset, &data);
        // What a read that failed left there was written too.
        if result != Ok(None) {
            pieces.iter().for_each(|piece| (request.written)(piece.gpa, piece.length.into()));
        }
        Ok(result?.map_or(Answer::Later, Answer::Data))
    }

    fn write(&mut self, request: &Request, body: Body) -> Result<Answer, Errno> {
        let (handle, offset, size) = (body.u64(0)?, body.u64(8)?, body.u32(16)?);
        let (_, behind) = split(&request.chain.readable, (IN_HEADER + WRITE_BODY) as u64);
        let (pieces, _) = split(&behind, size.into());
        if total(&pieces) != u64::from(size) {
            return Err(Errno::INVAL);
        }
        let data = Data { memory: request.memory, pieces: &pieces };
        match self.files.write(handle, offset, &data)? {
            Some(length) => Ok(Answer::Bytes(u64::from(length).to_le_bytes().into())),
            None => Ok(Answer::Later),
        }
    }

    fn list(&mut self, request: &Request, body: Body, plus: bool) -> Result<Answer, Errno> {
        let (handle, offset, size) = (body.u64(0)?, body.u64(8)?, body.u32(16)?);
        let room = u64::from(size.min(LIST_MAX)).min(total(&request.data)) as usize;
        let mut reply = Vec::with_capacity(room);
        let lasting = self.files.lasting();
        for listed in self.files.list(handle, offset, room)? {
            // The driver takes node 0 for a name only, as which those that cannot be looked up come, too.
            let found = match Name::new(&listed.name) {
                Ok(name) if plus && listed.fits(true, room, &reply) => {
                    self.files.lookup(request.header.node, name).ok()
                }
                _ => None,
            };
            let entry = found.unwrap_or_default();
            if !listed.put(plus.then_some((&entry, lasting)), room, &mut reply) {
                break;
            }
        }
        Ok(Answer::Bytes(reply))
    }
}

/// Bytes of a write's message before its data.
const WRITE_BODY: usize = 40;

/// One message of the driver's.
struct Request<'a> {
    header: Header,
    chain: &'a Chain,
    memory: &'a GuestMemoryMmap,
    written: Written<'a>,
    /// Where the answer goes, without its header.
    data: Vec<Piece>,
}

impl Request<'_> {
    /// What is behind the header, without a write's data.
    fn body(&self) -> Result<Vec<u8>, Errno> {
        let length = self.header.length.checked_sub(IN_HEADER as u32).ok_or(Errno::INVAL)?;
        let length = if self.header.opcode == opcode::WRITE { length.min(WRITE_BODY as u32) } else { length };
        if length > BODY_MAX || u64::from(self.header.length) > total(&self.chain.readable) {
            return Err(Errno::INVAL);
        }
        let (_, behind) = split(&self.chain.readable, IN_HEADER as u64);
        let mut bytes = vec![0; length as usize];
        gather(self.memory, &behind, &mut bytes).ok_or(Errno::INVAL)?;
        Ok(bytes)
    }
}

/// The flags of open(2) in which reading and writing are told apart, of `flags`.
pub fn access_mode(flags: u32) -> u32 {
    flags & ACCESS_MODE
}

#[cfg(test)]
mod tests;
