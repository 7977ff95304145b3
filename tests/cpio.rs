//! Initramfs archives: the `newc` format (Linux Documentation/driver-api/early-userspace/buffer-format.rst).

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An archive with `/dev/console`, which the kernel opens for init.
    pub fn new() -> Archive {
        let mut archive = Archive::default();
        for directory in ["dev", "proc", "sys", "tmp", "bin"] {
            archive.entry(directory, DIRECTORY | 0o755, (0, 0), &[]);
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
    pub fn program(&mut self, name: &str, content: &[u8]) -> &mut Archive {
        self.entry(name, REGULAR | 0o755, (0, 0), content);
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
        // Magic; inode, mode, uid, gid, links, mtime, size, device, rdev (major and minor), name size, check.
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

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::new();
        archive.program("init", b"abc");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("TRAILER!!!") && text.contains("dev/console"));
        let at = text.find("init\0").unwrap();
        assert_eq!(&bytes[(at + 5).next_multiple_of(4)..][..3], b"abc");
    }
}
