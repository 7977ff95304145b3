//! What `--disk` says of a disk.

use crate::config::{Disk, Format};

/// For messages.
const OPTIONS: &str = "ro, format=raw, format=qcow2, direct, iops=N or bw=N";

impl Disk {
    /// The disk in the image at `path`, with what is usual.
    pub fn new(path: impl Into<std::path::PathBuf>) -> Disk {
        Disk { path: path.into(), read_only: false, format: None, direct: false, iops: None, bandwidth: None }
    }
}

impl std::str::FromStr for Disk {
    type Err = String;

    /// A path, and options behind commas.
    fn from_str(text: &str) -> Result<Disk, String> {
        let mut parts = text.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(format!("a disk has no file; write PATH, and behind it {OPTIONS}, with commas"));
        }
        let mut disk = Disk::new(path);
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => disk.read_only = true,
                None if part == "direct" => disk.direct = true,
                Some(("format", "raw")) => disk.format = Some(Format::Raw),
                Some(("format", "qcow2")) => disk.format = Some(Format::Qcow2),
                Some(("format", other)) => {
                    return Err(format!("disk format '{other}' is not supported; convert the image to raw or qcow2"));
                }
                Some(("iops", number)) => disk.iops = Some(rate(number).ok_or_else(|| bad_rate(part))?),
                Some(("bw", number)) => disk.bandwidth = Some(rate(number).ok_or_else(|| bad_rate(part))?),
                _ => return Err(format!("unknown option '{part}' of a disk; use {OPTIONS}")),
            }
        }
        Ok(disk)
    }
}

fn bad_rate(part: &str) -> String {
    format!("bad limit '{part}' of a disk; write a number of at least 1, and behind it K, M or G if need be: bw=20M")
}

/// A number with a binary unit, or none.
fn rate(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    let number: u64 = digits.parse().ok()?;
    // No host does as much as the largest in a second.
    number.checked_mul(1 << shift).filter(|rate| (1..1 << 50).contains(rate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_parse() {
        let disk = |change: fn(&mut Disk)| {
            let mut disk = Disk::new("a b");
            change(&mut disk);
            Ok(disk)
        };
        assert_eq!("a b".parse(), disk(|_| {}));
        assert_eq!("a b,ro".parse(), disk(|disk| disk.read_only = true));
        assert_eq!(
            "a b,format=raw,ro".parse(),
            disk(|disk| {
                disk.read_only = true;
                disk.format = Some(Format::Raw);
            })
        );
        assert_eq!(
            "a b,direct,format=qcow2,iops=500,bw=20m".parse(),
            disk(|disk| {
                disk.direct = true;
                disk.format = Some(Format::Qcow2);
                disk.iops = Some(500);
                disk.bandwidth = Some(20 << 20);
            })
        );
        for (bad, part) in [
            ("", "no file"),
            (",ro", "no file"),
            ("a,rw", "'rw'"),
            ("a,format=vmdk", "'vmdk'"),
            ("a,iops=0", "'iops=0'"),
            ("a,iops=", "'iops='"),
            ("a,bw=1T", "'bw=1T'"),
            ("a,bw=-1", "'bw=-1'"),
            ("a,bw=99999999999G", "'bw=99999999999G'"),
        ] {
            let message = bad.parse::<Disk>().unwrap_err();
            assert!(message.contains(part) && !message.contains('\n'), "{message}");
        }
    }
}
