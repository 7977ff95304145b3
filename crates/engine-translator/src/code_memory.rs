//! Memory for generated code: one anonymous file mapped twice, writable at one address and executable at
//! another, so that no page is ever both.

use anyvisor_engine::{Error, Result};

/// A range of generated code.
pub struct CodeMemory {
    writable: *mut u8,
    executable: *const u8,
    length: usize,
    /// Bytes that the host has allocated, more or less.
    allocated: usize,
}

/// Bytes that the host allocates at once: it maps its neighbours with an executable page then, as far as they are there.
const CHUNK: usize = 64 << 10;

// SAFETY: the mappings belong to this value alone and are reachable from any thread.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Maps `length` bytes (rounded up to pages).
    ///
    /// # Errors
    /// When the host refuses the file or a mapping, for instance executable ones.
    pub fn new(length: usize) -> Result<CodeMemory> {
        let length = length.next_multiple_of(4096);
        // SAFETY: plain system calls on a descriptor that this function owns; both mappings are fresh.
        unsafe {
            let fd = libc::memfd_create(c"anyvisor-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(Error::last_os("memfd_create for translated code"));
            }
            let map = |protection| libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, 0);
            let result = if libc::ftruncate(fd, length as i64) != 0 {
                Err(Error::last_os(format!("allocating {length} bytes for translated code")))
            } else {
                let writable = map(libc::PROT_READ | libc::PROT_WRITE);
                let executable = map(libc::PROT_READ | libc::PROT_EXEC);
                if writable == libc::MAP_FAILED || executable == libc::MAP_FAILED {
                    Err(Error::last_os("mapping executable memory for translated code"))
                } else {
                    Ok(CodeMemory { writable: writable.cast(), executable: executable.cast(), length, allocated: 0 })
                }
            };
            libc::close(fd);
            result
        }
    }

    pub fn length(&self) -> usize {
        self.length
    }

    /// The address at which the byte at `offset` executes.
    pub fn address(&self, offset: usize) -> u64 {
        assert!(offset <= self.length);
        self.executable as u64 + offset as u64
    }

    /// Where the byte at offset 0 can be written.
    pub fn writable(&self) -> *mut u8 {
        self.writable
    }

    /// Whether `address` is an executable address here, and at which offset.
    pub fn offset_of(&self, address: u64) -> Option<usize> {
        let offset = address.wrapping_sub(self.executable as u64);
        (offset < self.length as u64).then_some(offset as usize)
    }

    /// Writes `code` at `offset`, unless it is there: a write makes the processor fetch anew.
    pub fn write_if_changed<const N: usize>(&mut self, offset: usize, code: &[u8; N]) {
        assert!(offset + N <= self.length);
        // SAFETY: in bounds of the writable mapping, which nothing else references.
        let old = unsafe { self.writable.add(offset).cast::<[u8; N]>().read() };
        if old != *code {
            self.write(offset, code);
        }
    }

    /// Puts the `length` bytes of code at `offset` into `code`.
    pub fn read_into(&self, offset: usize, length: usize, code: &mut Vec<u8>) {
        assert!(offset + length <= self.length);
        code.clear();
        // SAFETY: in bounds of the writable mapping, which nothing else references.
        code.extend_from_slice(unsafe { std::slice::from_raw_parts(self.writable.add(offset), length) });
    }

    /// Writes code at `offset`. x86 keeps instruction fetches coherent with stores of the same thread;
    /// the next jump there sees them (SDM vol. 3A 12.6).
    pub fn write(&mut self, offset: usize, code: &[u8]) {
        assert!(offset + code.len() <= self.length);
        if offset + code.len() > self.allocated {
            self.allocate();
        }
        // SAFETY: in bounds of the writable mapping, which nothing else references.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(offset), code.len()) };
    }

    /// Has the host allocate some more. Where it cannot (before Linux 5.14), it does so when each page is written.
    #[cold]
    fn allocate(&mut self) {
        let length = CHUNK.min(self.length - self.allocated);
        // SAFETY: in bounds of the writable mapping, whose contents stay as they are.
        unsafe { libc::madvise(self.writable.add(self.allocated).cast(), length, libc::MADV_POPULATE_WRITE) };
        self.allocated += length;
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `new` with this length.
        unsafe {
            libc::munmap(self.writable.cast(), self.length);
            libc::munmap(self.executable.cast_mut().cast(), self.length);
        }
    }
}
