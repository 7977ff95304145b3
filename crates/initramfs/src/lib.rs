//! Initramfs archives: the "newc" cpio format that Linux unpacks into its first root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst). `quickstart` and the tests' guests are made of them.
#![forbid(unsafe_code)]

const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written. Names are paths without a slash in front.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An archive with the usual folders, and `/dev/console`, which the kernel opens as init's standard streams.
    pub fn new() -> Archive {
        let mut archive = Archive::default();
        for directory in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            archive.directory(directory);
        }
        archive.entry("dev/console", CHARACTER | 0o600, (5, 1), &[]);
        archive
    }

    /// Adds a folder, whose parent is there.
    pub fn directory(&mut self, name: &str) -> &mut Archive {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[]);
        self
    }

    /// Adds an executable file.
    ///
    /// # Panics
    /// It has 4 GiB or more, which the format does not hold.
    pub fn program(&mut self, name: &str, content: &[u8]) -> &mut Archive {
        self.entry(name, REGULAR | 0o755, (0, 0), content);
        self
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, target: &str) -> &mut Archive {
        self.entry(name, LINK | 0o777, (0, 0), target.as_bytes());
        self
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let length = u32::try_from(content.len()).expect("an initramfs file below 4 GiB");
        let name_length = name.len() as u32 + 1;
        // Inode, mode, uid, gid, links, mtime, size, device, rdev (major and minor each), name size, checksum.
        let fields = [self.inode, mode, 0, 0, 1, 0, length, 0, 0, device.0, device.1, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn example() -> Vec<u8> {
        let mut archive = Archive::new();
        archive.program("init", b"abc").directory("run").link("bin/sh", "busybox");
        archive.finish()
    }

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let bytes = example();
        assert_eq!((bytes.len() % 4, &bytes[..6]), (0, &b"070701"[..]));
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 11);
        assert!(text.ends_with("TRAILER!!!\0\0\0\0"));
        let at = text.find("init\0").unwrap();
        assert_eq!(&bytes[(at + 5).next_multiple_of(4)..][..3], b"abc");
    }

    /// cpio itself can read it (busybox's or GNU's, where there is one).
    #[test]
    fn cpio_lists_it() {
        let spawned = Command::new("cpio").arg("-t").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = spawned else {
            eprintln!("no cpio on this host");
            return;
        };
        child.stdin.take().unwrap().write_all(&example()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let names = String::from_utf8(output.stdout).unwrap();
        assert_eq!(names.lines().count(), 10);
        assert!(names.lines().any(|name| name == "dev/console") && names.lines().any(|name| name == "init"));
    }
}
