//! A driver's requests, on images of each kind.

use super::super::raw::{Direct, Raw};
use super::super::{Stamp, open};
use super::*;
use crate::config::{Disk, Format};
use crate::virtio::driver::{Driver, Random, Used, fuzz};
use std::path::Path;
use std::process::Command;

const SIZE: u64 = 1 << 20;

fn request(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn image() -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    image
}

fn model(disk: &Disk) -> DiskModel {
    open(std::slice::from_ref(disk), 1).unwrap().remove(0)
}

/// The kinds of storage that a disk can have.
fn models(folder: &Path) -> Vec<(&'static str, DiskModel)> {
    let path = |n: usize| folder.join(format!("raw{n}"));
    let file = |n| {
        let file = std::fs::File::options().create(true).truncate(true).read(true).write(true).open(path(n)).unwrap();
        file.set_len(SIZE).unwrap();
        file
    };
    let geometry = Geometry { sectors: SIZE / 512, read_only: false, block: 512, queues: 1 };
    let of = |n, storage: Raw| {
        let image = Image { path: path(n), file: file(n), found: Stamp { length: SIZE, modified: 0 } };
        DiskModel::new(0, image, Box::new(storage), geometry, [None; 2])
    };
    let mut models = vec![
        ("by io_uring", of(0, Raw::new(file(0), false, None, "x"))),
        ("one by one", of(1, Raw::new(file(1), false, None, "x").without_ring())),
    ];
    let cached = file(2);
    match Direct::open(&path(2), false) {
        Ok(direct) => models.push(("direct", of(2, Raw::new(cached, false, Some(direct), "x")))),
        Err(error) => println!("left out: this file system has no O_DIRECT ({error})"),
    }
    if let Some(path) = qcow2(folder, "qcow2", &[]) {
        models.push(("qcow2", model(&Disk { format: Some(Format::Qcow2), ..Disk::new(path) })));
    }
    models
}

/// A qcow2 image that `qemu-img` makes, if the host has it.
fn qcow2(folder: &Path, name: &str, more: &[&str]) -> Option<std::path::PathBuf> {
    let path = folder.join(name);
    let mut command = Command::new("qemu-img");
    match command.args(["create", "-q", "-f", "qcow2"]).args(more).arg(&path).arg(SIZE.to_string()).status() {
        Ok(status) => assert!(status.success()),
        Err(_) => {
            println!("left out: there is no qemu-img");
            return None;
        }
    }
    Some(path)
}

fn check(path: &Path) {
    let output = Command::new("qemu-img").args(["check", "-q"]).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn status(used: &Used) -> u8 {
    *used.bytes.last().expect("a status")
}

fn read(driver: &mut Driver, model: &mut DiskModel, sector: u64, length: u32) -> Vec<u8> {
    let used = driver.ask(model, 0, &[&request(IN, sector)], &[length, 1]);
    assert_eq!(status(&used), 0);
    used.bytes[..length as usize].to_vec()
}

fn write(driver: &mut Driver, model: &mut DiskModel, sector: u64, data: &[u8]) {
    let used = driver.ask(model, 0, &[&request(OUT, sector), data], &[1]);
    assert_eq!(used.bytes, [0]);
}

/// Whatever is written, zeroed and flushed is read again, on each kind of storage.
#[test]
fn disks_hold_what_is_written() {
    let folder = tempfile::tempdir().unwrap();
    for (kind, mut model) in models(folder.path()) {
        let mut random = Random(7);
        let mut expected = vec![0; SIZE as usize];
        let mut driver = Driver::new(&mut model);
        for round in 0..300 {
            let sector = random.below(SIZE / 512 - 64);
            let sectors = 1 + random.below(64);
            let range = (512 * sector) as usize..(512 * (sector + sectors)) as usize;
            match random.below(8) {
                0..3 => {
                    let data: Vec<u8> = (0..512 * sectors).map(|n| (n / 512 + round) as u8).collect();
                    write(&mut driver, &mut model, sector, &data);
                    expected[range].copy_from_slice(&data);
                }
                3 => {
                    let unmap = random.below(2) as u32;
                    let what =
                        [&sector.to_le_bytes()[..], &(sectors as u32).to_le_bytes(), &unmap.to_le_bytes()].concat();
                    let used = driver.ask(&mut model, 0, &[&request(WRITE_ZEROES, 0), &what], &[1]);
                    assert_eq!(used.bytes, [0], "{kind}");
                    expected[range].fill(0);
                }
                4 => assert_eq!(driver.ask(&mut model, 0, &[&request(FLUSH, 0)], &[1]).bytes, [0], "{kind}"),
                _ => assert!(
                    read(&mut driver, &mut model, sector, (512 * sectors) as u32) == expected[range],
                    "{kind}: sector {sector}"
                ),
            }
        }
        // What it reads as afterwards is undefined.
        let what = [&0u64.to_le_bytes()[..], &64u32.to_le_bytes(), &[0; 4]].concat();
        assert_eq!(driver.ask(&mut model, 0, &[&request(DISCARD, 0), &what], &[1]).bytes, [0], "{kind}");
        let id = driver.ask(&mut model, 0, &[&request(8, 0)], &[20, 1]);
        assert!(id.bytes.starts_with(b"anyvisor-disk0\0"), "{kind}");
        assert_eq!(driver.ask(&mut model, 0, &[&request(IN, SIZE / 512 + 1)], &[1]).bytes, [1], "{kind}");
    }
    if folder.path().join("qcow2").exists() {
        check(&folder.path().join("qcow2"));
    }
}

#[test]
fn many_requests_are_under_way_and_end() {
    let folder = tempfile::tempdir().unwrap();
    for (kind, mut model) in models(folder.path()) {
        let mut driver = Driver::new(&mut model);
        for n in 0..20u8 {
            driver.send(0, &[&request(OUT, n.into()), &[n; 512]], &[1]);
        }
        driver.work(&mut model).unwrap();
        driver.settle(&mut model).unwrap();
        assert_eq!(driver.used(0).len(), 20, "{kind}");
        for n in 0..20u8 {
            assert_eq!(read(&mut driver, &mut model, n.into(), 512), [n; 512], "{kind}");
        }
    }
}

#[test]
fn an_image_that_ends_early_is_an_error() {
    let image = image();
    let mut model = model(&Disk::new(image.path()));
    image.as_file().set_len(512).unwrap();
    let mut driver = Driver::new(&mut model);
    assert_eq!(status(&driver.ask(&mut model, 0, &[&request(IN, 0)], &[1024, 1])), 1);
    assert_eq!(read(&mut driver, &mut model, 0, 512), [0; 512]);
}

#[test]
fn limits_hold_requests_up() {
    let image = image();
    let mut model = model(&Disk { iops: Some(50), ..Disk::new(image.path()) });
    let mut driver = Driver::new(&mut model);
    for n in 0..15 {
        driver.send(0, &[&request(IN, n)], &[512, 1]);
    }
    let began = Instant::now();
    driver.work(&mut model).unwrap();
    driver.settle(&mut model).unwrap();
    // A tenth of a second's, and what came due meanwhile.
    let first = driver.used(0).len();
    assert!(first >= 5, "{first}");
    let mut done = first;
    while done < 15 {
        if let Some(deadline) = model.deadline() {
            std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
        }
        driver.work(&mut model).unwrap();
        driver.settle(&mut model).unwrap();
        done += driver.used(0).len();
    }
    assert!(began.elapsed() >= Duration::from_millis(170), "{:?}", began.elapsed());
    std::thread::sleep(Duration::from_millis(30));
    driver.work(&mut model).unwrap();
    assert_eq!(model.deadline(), None);
}

#[test]
fn images_behind_images_are_read_and_locked() {
    let folder = tempfile::tempdir().unwrap();
    let Some(base) = qcow2(folder.path(), "base", &[]) else { return };
    let as_qcow2 = |path: &Path| Disk { format: Some(Format::Qcow2), ..Disk::new(path) };
    {
        let mut model = model(&as_qcow2(&base));
        let mut driver = Driver::new(&mut model);
        write(&mut driver, &mut model, 10, &[1; 1024]);
    }
    check(&base);
    let top = qcow2(folder.path(), "top", &["-b", "base", "-F", "qcow2"]).unwrap();
    let before = std::fs::read(&base).unwrap();
    {
        let mut first = model(&as_qcow2(&top));
        let mut driver = Driver::new(&mut first);
        write(&mut driver, &mut first, 11, &[2; 512]);
        let data = read(&mut driver, &mut first, 10, 1024);
        assert!(data[..512] == [1; 512] && data[512..] == [2; 512]);
        let refused = open(&[as_qcow2(&base)], 1).err().expect("it is in use").to_string();
        assert!(refused.contains("in use"), "{refused}");
        let other = qcow2(folder.path(), "other", &["-b", "base", "-F", "qcow2"]).unwrap();
        model(&as_qcow2(&other));
    }
    check(&top);
    assert!(std::fs::read(&base).unwrap() == before);
    let writer = model(&as_qcow2(&base));
    let refused = open(&[as_qcow2(&top)], 1).err().expect("what is behind it is written").to_string();
    assert!(refused.contains("base") && refused.contains("written by another"), "{refused}");
    drop(writer);
    let endless = qcow2(folder.path(), "loop", &[]).unwrap();
    let status = Command::new("qemu-img")
        .args(["rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "loop"])
        .arg(&endless)
        .status();
    assert!(status.unwrap().success());
    let refused = open(&[Disk { read_only: true, ..as_qcow2(&endless) }], 1).err().expect("a loop").to_string();
    assert!(refused.contains("too many images"), "{refused}");
}

/// What was written before a flush is in the image although nobody closes it.
#[test]
fn a_flush_needs_no_close() {
    let folder = tempfile::tempdir().unwrap();
    let Some(path) = qcow2(folder.path(), "image", &[]) else { return };
    let mut model = model(&Disk { format: Some(Format::Qcow2), ..Disk::new(&path) });
    let mut driver = Driver::new(&mut model);
    for n in 0..8 {
        write(&mut driver, &mut model, 256 * n, &[n as u8 + 1; 512]);
    }
    driver.ask(&mut model, 0, &[&request(FLUSH, 0)], &[1]);
    let copy = folder.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    check(&copy);
    let mut model = self::model(&Disk { format: Some(Format::Qcow2), read_only: true, ..Disk::new(&copy) });
    let mut driver = Driver::new(&mut model);
    for n in 0..8 {
        assert_eq!(read(&mut driver, &mut model, 256 * n, 512), [n as u8 + 1; 512]);
    }
}

#[test]
fn nonsense_in_a_disks_queue_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let kinds = [IN, OUT, FLUSH, 8, DISCARD, WRITE_ZEROES, 99];
    let range = [8, 0, 0, 0, 0, 0, 0, 0];
    let headers: Vec<_> =
        kinds.iter().flat_map(|kind| [3, 2040].map(|sector| [&request(*kind, sector)[..], &range].concat())).collect();
    for (kind, mut model) in models(folder.path()) {
        let taken = fuzz(&mut model, &headers, 200, 1);
        assert!(taken.broken > 20 && taken.answered > 300, "{kind}: {taken:?}");
    }
    assert_eq!(std::fs::metadata(folder.path().join("raw0")).unwrap().len(), SIZE);
    if folder.path().join("qcow2").exists() {
        check(&folder.path().join("qcow2"));
    }
}
