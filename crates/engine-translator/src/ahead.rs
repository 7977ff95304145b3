//! Guest RAM that the host allocates ahead of its use, on a thread of its own.
//!
//! Half of what it takes the host to give a process a page that nobody has touched is to find one and to note whose it is. Kernels
//! hand memory out in order: who has touched some chunks in a row gets the next ones before they are needed, as a file is read
//! ahead. They are cleared and mapped when the guest comes, as ever: the process's page tables are left to those who use them.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use vm_memory::FileOffset;

/// The thread. It ends when this is dropped, after what it has still to do, a millisecond's work or so.
pub struct Ahead {
    requests: Option<Sender<(FileOffset, Range<u64>)>>,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    /// # Errors
    /// When the host starts no thread.
    pub fn start() -> std::io::Result<Ahead> {
        let (requests, received) = channel();
        let work = move || received.into_iter().for_each(|(file, bytes)| allocate(&file, &bytes));
        let thread = std::thread::Builder::new().name("ram".into()).spawn(work)?;
        Ok(Ahead { requests: Some(requests), thread: Some(thread) })
    }

    /// Has `bytes` behind where `file` starts allocated. What is there stays; what the host has not got is found, or not, when it
    /// is touched.
    pub fn request(&self, file: &FileOffset, bytes: Range<u64>) {
        let requests = self.requests.as_ref().expect("it is there until the end");
        requests.send((file.clone(), bytes)).expect("the thread waits for more");
    }
}

fn allocate(file: &FileOffset, bytes: &Range<u64>) {
    let (start, length) = (file.start() + bytes.start, bytes.end - bytes.start);
    let descriptor = file.file().as_raw_fd();
    // SAFETY: a system call on an open file, which changes none of its bytes.
    unsafe {
        libc::fallocate(descriptor, libc::FALLOC_FL_KEEP_SIZE, start as libc::off_t, length as libc::off_t);
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.requests = None;
        self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use crate::ram::{CHUNK, Ram};
    use anyvisor_engine::memory;
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, Instant};
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    /// Chunks of a VM's RAM that the host has, once there are `wanted`, after these were written to.
    fn allocated(written: &[u64], wanted: u64) -> u64 {
        let memory = memory::in_file(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let file = memory.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap();
        let ram = Ram::ahead(memory).unwrap();
        for chunk in written {
            ram.allocate_around(chunk * CHUNK + 0x3000);
        }
        let began = Instant::now();
        loop {
            let chunks = file.metadata().unwrap().blocks() * 512 / CHUNK;
            if chunks >= wanted || began.elapsed() > Duration::from_secs(10) {
                drop(ram);
                return file.metadata().unwrap().blocks() * 512 / CHUNK;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn who_comes_in_order_gets_more() {
        let in_order: Vec<u64> = (100..105).collect();
        assert_eq!(allocated(&in_order, 21), 5 + 16);
        // The next one is where more is asked for, and nothing is before that.
        assert_eq!(allocated(&(100..106).collect::<Vec<_>>(), 37), 5 + 32);
        assert_eq!(allocated(&(100..121).collect::<Vec<_>>(), 37), 5 + 32);
        assert_eq!(allocated(&(100..122).collect::<Vec<_>>(), 53), 5 + 48);
    }

    #[test]
    fn who_goes_about_gets_what_he_takes() {
        assert_eq!(allocated(&[100, 110, 120, 130, 140, 101, 111, 99], 8), 8);
    }

    #[test]
    fn memory_ends_somewhere() {
        assert_eq!(allocated(&(1015..1024).collect::<Vec<_>>(), 9), 9);
        assert_eq!(allocated(&(1010..1020).collect::<Vec<_>>(), 14), 14);
    }
}
