//! The guest's root file system: busybox and a script, in the "newc" cpio format that Linux unpacks
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

/// The archive's bytes.
pub fn build(busybox: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        archive.add(directory, 0o040755, (0, 0), &[]);
    }
    // The kernel opens it as the first process's standard streams.
    archive.add("dev/console", 0o020600, (5, 1), &[]);
    archive.add("bin/busybox", 0o100755, (0, 0), busybox);
    archive.add("bin/sh", 0o120777, (0, 0), b"busybox");
    archive.add("init", 0o100755, (0, 0), include_bytes!("init.sh"));
    archive.finish()
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds an entry: its mode with the file type, the device numbers of a special file, and its contents
    /// (a link's target).
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        self.write(self.inode, name, mode, device, data);
    }

    fn finish(mut self) -> Vec<u8> {
        self.write(0, "TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn write(&mut self, inode: u32, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        let name_size = name.len() as u32 + 1;
        let size = u32::try_from(data.len()).expect("files here are far below 4 GiB");
        // Inode, mode, uid, gid, links, time, size, device, special device, name size, checksum.
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
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

    #[test]
    fn entries_are_aligned_and_counted() {
        let archive = build(b"12345");
        assert_eq!(archive.len() % 4, 0);
        assert_eq!(&archive[..6], b"070701");
        let text = String::from_utf8_lossy(&archive);
        assert_eq!(text.matches("070701").count(), 11);
        assert!(text.ends_with("TRAILER!!!\0\0\0\0"));
    }

    /// cpio itself can read it (busybox's or GNU's, where there is one).
    #[test]
    fn cpio_lists_it() {
        let spawned = Command::new("cpio").arg("-t").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = spawned else {
            eprintln!("no cpio on this host");
            return;
        };
        child.stdin.take().unwrap().write_all(&build(b"12345")).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let names = String::from_utf8(output.stdout).unwrap();
        assert_eq!(names.lines().count(), 10);
        assert!(names.lines().any(|name| name == "dev/console") && names.lines().any(|name| name == "init"));
    }
}
