//! Saved and restored machines, and what happens to bad snapshots.

use super::*;
use crate::config::HugePages;
use crate::snapshot::{self, Snapshot, Summary, Unfinished};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Places that the guest below writes.
const COUNT: u64 = 0x10_0000;
const TRAIL: u64 = 0x20_0000;
/// The highest page of 20 MiB.
const LAST: u64 = (20 << 20) - 4096;

/// Each time its vCPU enters guest code, counts and leaves a trail of pages, then waits for a kick.
fn counting(vm: &FakeVm, io: &dyn GuestIo) -> Exit {
    let count = vm.load(COUNT) + 1;
    vm.store(COUNT, count);
    vm.store(TRAIL + 4096 * count, count * count);
    vm.store(LAST, !count);
    outb(io, 0x3ff, count as u8);
    Exit::Kicked
}

fn check_count(vm: &FakeVm, io: &dyn GuestIo, count: u64) {
    assert_eq!(vm.load(COUNT), count);
    for n in 1..=count {
        assert_eq!(vm.load(TRAIL + 4096 * n), n * n);
    }
    assert_eq!(vm.load(TRAIL + 4096 * (count + 1)), 0, "the future");
    assert_eq!(vm.load(LAST), !count);
    assert_eq!(u64::from(inb(io, 0x3ff)), count, "the serial port's scratch register");
}

/// Runs a guest while `outside` controls it; the VM is stopped after that.
fn with_vm<T>(
    guest: impl Fn(&FakeVm, u32, &dyn GuestIo) -> Exit + Send + Sync + 'static,
    outside: impl FnOnce(&Remote) -> T,
) -> T {
    let kernel = KernelFile::new();
    with_machine(Config { memory: 20 << 20, ..config(&kernel) }, guest, outside)
}

fn with_machine<T>(
    config: Config,
    guest: impl Fn(&FakeVm, u32, &dyn GuestIo) -> Exit + Send + Sync + 'static,
    outside: impl FnOnce(&Remote) -> T,
) -> T {
    let output = Arc::new(Output::new(Box::new(std::io::sink())).unwrap());
    let engine = FakeEngine { guest: Arc::new(guest), states: Arc::default() };
    let (control, remote) = control();
    std::thread::scope(|scope| {
        let (config, engine, output) = (&config, &engine, &output);
        let vm = scope.spawn(move || run(config, engine, output, &Input::new(), &control, || Ok(())).unwrap());
        while remote.state() == State::Starting {
            std::thread::sleep(Duration::from_millis(1));
        }
        let result = outside(&remote);
        remote.stop();
        assert_eq!(vm.join().unwrap(), End::Stopped);
        result
    })
}

fn save(remote: &Remote, folder: &Path, parent: Option<&Path>) -> Result<Summary> {
    let (folder, parent) = (folder.to_owned(), parent.map(Path::to_owned));
    let saved = remote.with_paused(move |paused| snapshot::save(paused, &folder, parent.as_deref())).unwrap();
    saved.and_then(Unfinished::finish)
}

/// Goes on from `folder` with `guest`.
fn restore(
    folder: &Path,
    guest: impl Fn(&FakeVm, u32, &dyn GuestIo) -> Exit + Send + Sync + 'static,
) -> (Result<End>, Vec<VcpuState>) {
    let opened = match Snapshot::open(folder) {
        Ok(snapshot) => Arc::new(snapshot),
        Err(error) => return (Err(error), vec![]),
    };
    let config = opened.manifest().machine.config(crate::config::Serial::Null, OnReboot::Exit);
    let output = Arc::new(Output::new(Box::new(std::io::sink())).unwrap());
    let states = Arc::default();
    let engine = FakeEngine { guest: Arc::new(guest), states: Arc::clone(&states) };
    let (control, _remote) = control();
    let end = go_on(&config, &opened, &engine, &output, &Input::new(), &control, || Ok(()));
    (end, states.lock().unwrap().clone())
}

/// What a guest that finds `count` does, so that the restored VM ends well.
fn finds(count: u64) -> impl Fn(&FakeVm, u32, &dyn GuestIo) -> Exit + Send + Sync + 'static {
    move |vm, _, io| {
        check_count(vm, io, count);
        io.pio_write(0xf4, &[count as u8]);
        Exit::Kicked
    }
}

/// Waits until the counting guest has counted on.
fn counted(remote: &Remote) {
    let look = || remote.with_paused(|paused| paused.memory.read_obj::<u64>(GuestAddress(COUNT)).unwrap()).unwrap();
    let before = look();
    while look() == before {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A snapshot of a VM that has counted to the number returned.
fn saved_vm(folder: &Path) -> u64 {
    with_vm(
        |vm, _, io| counting(vm, io),
        |remote| {
            counted(remote);
            save(remote, folder, None).unwrap();
            read_count(folder)
        },
    )
}

/// What the guest in a snapshot had counted to.
fn read_count(folder: &Path) -> u64 {
    let memory = Snapshot::open(folder).unwrap().map_memory(HugePages::IfThere).unwrap();
    memory.read_obj(GuestAddress(COUNT)).unwrap()
}

#[test]
fn a_restored_machine_is_the_one_that_was_saved() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("one");
    let count = saved_vm(&folder);
    assert!(count > 0);
    let clock = Arc::new(AtomicU64::new(0));
    let seen = clock.clone();
    let (end, states) = restore(&folder, move |vm, cpu, io| {
        seen.store(*vm.clock.lock().unwrap() + 1, Ordering::SeqCst);
        finds(count)(vm, cpu, io)
    });
    assert_eq!(end.unwrap(), End::DebugExit(count as u32));
    let saved = Snapshot::open(&folder).unwrap().manifest().clone();
    assert_eq!(states, [saved.vcpus[0].state.clone()]);
    assert_eq!(clock.load(Ordering::SeqCst), saved.clock + 1);
    // And it can be restored once more: nothing was written to it.
    assert_eq!(restore(&folder, finds(count)).0.unwrap(), End::DebugExit(count as u32));
}

#[test]
fn incremental_snapshots_restore_each() {
    let scratch = tempfile::tempdir().unwrap();
    let name = |n: usize| scratch.path().join(format!("s{n}"));
    let sizes: Vec<u64> = with_vm(
        |vm, _, io| counting(vm, io),
        |remote| {
            counted(remote);
            (0..4)
                .map(|n: usize| {
                    let parent = n.checked_sub(1).map(&name);
                    let summary = save(remote, &name(n), parent.as_deref()).unwrap();
                    counted(remote);
                    summary.memory
                })
                .collect()
        },
    );
    assert!(sizes[1..].iter().all(|size| *size < 64 << 10 && *size < sizes[0]), "{sizes:?}");
    check_read_memory(&name(3));
    let mut last = 0;
    for n in 0..4 {
        let count = read_count(&name(n));
        assert!(count > last, "{count} after {last}");
        last = count;
        assert_eq!(restore(&name(n), finds(count)).0.unwrap(), End::DebugExit(count as u32), "snapshot {n}");
    }
    // They can be moved, together.
    std::fs::create_dir(scratch.path().join("elsewhere")).unwrap();
    for n in 0..4 {
        std::fs::rename(name(n), scratch.path().join(format!("elsewhere/s{n}"))).unwrap();
    }
    assert_eq!(restore(&scratch.path().join("elsewhere/s3"), finds(last)).0.unwrap(), End::DebugExit(last as u32));
    std::fs::remove_dir_all(scratch.path().join("elsewhere/s1")).unwrap();
    let message = restore(&scratch.path().join("elsewhere/s3"), finds(last)).0.unwrap_err().to_string();
    assert!(message.contains("s2' builds on another") && message.contains("s1"), "{message}");
}

/// Memory that is read, because it is to be on huge pages, is what mapped memory is.
fn check_read_memory(folder: &Path) {
    let snapshot = Snapshot::open(folder).unwrap();
    let mapped = snapshot.map_memory(HugePages::IfThere).unwrap();
    let read = match snapshot.map_memory(HugePages::Transparent) {
        Ok(memory) => memory,
        Err(error) => return println!("left out: {error}"),
    };
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..20 << 20).step_by(1 << 20) {
        mapped.read_slice(&mut one, GuestAddress(at)).unwrap();
        read.read_slice(&mut other, GuestAddress(at)).unwrap();
        assert!(one == other, "at {at:#x}");
    }
}

#[test]
fn flash_memory_is_in_snapshots() {
    let scratch = tempfile::tempdir().unwrap();
    let [firmware, full, more] = ["firmware", "full", "more"].map(|name| scratch.path().join(name));
    std::fs::write(&firmware, vec![0x55; 512 << 10]).unwrap();
    const WORD: u64 = layout::HIGH_RAM - 4096;
    let config = Config {
        memory: 20 << 20,
        firmware: Some(crate::config::Firmware { image: firmware.clone(), variables: None }),
        ..config(&KernelFile::new())
    };
    with_machine(
        config,
        |vm, _, io| {
            vm.store(WORD, vm.load(COUNT) + 1);
            counting(vm, io)
        },
        |remote| {
            counted(remote);
            save(remote, &full, None).unwrap();
            counted(remote);
            assert!(save(remote, &more, Some(&full)).unwrap().memory < 64 << 10);
        },
    );
    std::fs::remove_file(firmware).unwrap();
    for folder in [full, more] {
        let count = read_count(&folder);
        let (end, _) = restore(&folder, move |vm, cpu, io| {
            assert_eq!((vm.load(WORD), vm.load(WORD + 8)), (count, 0x5555_5555_5555_5555));
            assert_eq!(vm.load(layout::HIGH_RAM - (512 << 10)), 0x5555_5555_5555_5555);
            finds(count)(vm, cpu, io)
        });
        assert_eq!(end.unwrap(), End::DebugExit(count as u32), "{}", folder.display());
    }
}

#[test]
fn the_file_with_uefi_variables_goes_with_a_snapshot() {
    let scratch = tempfile::tempdir().unwrap();
    let [image, variables, folder] = ["firmware", "variables", "snapshot"].map(|name| scratch.path().join(name));
    std::fs::write(&image, vec![0; 512 << 10]).unwrap();
    std::fs::write(&variables, vec![0xff; 8192]).unwrap();
    // Below the firmware.
    const CHIP: u64 = layout::HIGH_RAM - (512 << 10) - 8192;
    let firmware = crate::config::Firmware { image, variables: Some(variables.clone()) };
    let config = Config { memory: 20 << 20, firmware: Some(firmware), ..config(&KernelFile::new()) };
    with_machine(
        config,
        |vm, _, io| {
            if vm.load(COUNT) == 0 {
                io.mmio_write(CHIP + 5, &[0x10]);
                io.mmio_write(CHIP + 5, &[0x5a]);
            }
            counting(vm, io)
        },
        |remote| {
            counted(remote);
            assert_eq!(std::fs::read(&variables).unwrap()[4..7], [0xff, 0x5a, 0xff]);
            save(remote, &folder, None).unwrap();
        },
    );
    let count = read_count(&folder);
    let goes_on = || {
        restore(&folder, move |vm, cpu, io| {
            let read = |at| {
                let mut byte = [0];
                io.mmio_read(CHIP + at, &mut byte);
                byte[0]
            };
            assert_eq!((read(0), read(8191), read(8192)), (0x80, 0x80, 0xff), "the chip shows its status");
            io.mmio_write(CHIP, &[0xff]);
            assert_eq!((read(0), read(5)), (0xff, 0x5a));
            finds(count)(vm, cpu, io)
        })
    };
    assert_eq!(goes_on().0.unwrap(), End::DebugExit(count as u32));
    std::fs::write(&variables, vec![0; 8192]).unwrap();
    let message = goes_on().0.unwrap_err().to_string();
    assert!(message.contains("variables', the file for UEFI variables, has changed"), "{message}");
}

#[test]
fn any_earlier_snapshot_of_the_vm_can_be_the_parent() {
    let scratch = tempfile::tempdir().unwrap();
    let (first, second, third) = (scratch.path().join("1"), scratch.path().join("2"), scratch.path().join("3"));
    let stranger = scratch.path().join("stranger");
    saved_vm(&stranger);
    with_vm(
        |vm, _, io| counting(vm, io),
        |remote| {
            counted(remote);
            let refused = save(remote, &first, Some(&stranger)).unwrap_err().to_string();
            assert!(refused.contains("stranger' is not one of this VM's latest"), "{refused}");
            assert!(!first.exists(), "nothing is left of it");
            save(remote, &first, None).unwrap();
            save(remote, &second, Some(&first)).unwrap();
            save(remote, &third, Some(&first)).unwrap();
            // A save that fails forgets nothing.
            save(remote, &stranger, Some(&third)).unwrap_err();
            save(remote, &scratch.path().join("4"), Some(&third)).unwrap();
        },
    );
    for name in ["1", "2", "3", "4"] {
        let count = read_count(&scratch.path().join(name));
        assert_eq!(
            restore(&scratch.path().join(name), finds(count)).0.unwrap(),
            End::DebugExit(count as u32),
            "{name}"
        );
    }
}

#[test]
fn a_restored_vm_is_saved_incrementally_too() {
    let scratch = tempfile::tempdir().unwrap();
    let (first, second) = (scratch.path().join("1"), scratch.path().join("2"));
    saved_vm(&first);
    let opened = Arc::new(Snapshot::open(&first).unwrap());
    let config = opened.manifest().machine.config(crate::config::Serial::Null, OnReboot::Exit);
    let output = Arc::new(Output::new(Box::new(std::io::sink())).unwrap());
    let engine = FakeEngine { guest: Arc::new(|vm, _, io| counting(vm, io)), states: Arc::default() };
    let (control, remote) = control();
    std::thread::scope(|scope| {
        let (config, opened, engine, output) = (&config, &opened, &engine, &output);
        let vm =
            scope.spawn(move || go_on(config, opened, engine, output, &Input::new(), &control, || Ok(())).unwrap());
        while remote.state() == State::Starting {
            std::thread::sleep(Duration::from_millis(1));
        }
        counted(&remote);
        assert!(save(&remote, &second, Some(&first)).unwrap().memory < 64 << 10);
        remote.stop();
        vm.join().unwrap();
    });
    let count = read_count(&second);
    assert!(count > read_count(&first));
    assert_eq!(restore(&second, finds(count)).0.unwrap(), End::DebugExit(count as u32));
}

#[test]
fn folders_that_will_not_do_are_refused_and_left_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let taken = scratch.path().join("taken");
    saved_vm(&taken);
    let full = scratch.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("thesis.txt"), "x").unwrap();
    let file = scratch.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let cut_short = scratch.path().join("cut-short");
    std::fs::create_dir(&cut_short).unwrap();
    std::fs::write(cut_short.join("memory"), [0; 100_000]).unwrap();
    std::fs::write(cut_short.join("manifest.partial"), "anyvisor-snapshot 1").unwrap();
    let message = restore(&cut_short, finds(1)).0.unwrap_err().to_string();
    assert!(message.contains("cut-short' holds a snapshot that was never finished"), "{message}");
    with_vm(
        |vm, _, io| counting(vm, io),
        |remote| {
            counted(remote);
            for (folder, why) in [
                (&taken, "has a snapshot already"),
                (&full, "is not empty"),
                (&file, "Not a directory"),
                (&scratch.path().join("no/such"), "No such file"),
            ] {
                let message = save(remote, folder, None).unwrap_err().to_string();
                assert!(message.contains(why) && message.contains(&folder.display().to_string()), "{message}");
                assert!(!message.contains('\n'));
            }
            save(remote, &cut_short, None).unwrap();
        },
    );
    assert_eq!(std::fs::read(full.join("thesis.txt")).unwrap(), b"x");
    let count = read_count(&taken);
    assert_eq!(restore(&taken, finds(count)).0.unwrap(), End::DebugExit(count as u32));
    let count = read_count(&cut_short);
    assert_eq!(restore(&cut_short, finds(count)).0.unwrap(), End::DebugExit(count as u32));
}

#[test]
fn a_snapshot_that_is_not_finished_is_none() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("one");
    with_vm(
        |vm, _, io| counting(vm, io),
        |remote| {
            let path = folder.clone();
            let unfinished = remote.with_paused(move |paused| snapshot::save(paused, &path, None)).unwrap().unwrap();
            assert!(Snapshot::open(&folder).is_err());
            let message = save(remote, &folder, None).unwrap_err().to_string();
            assert!(message.contains("another save"), "{message}");
            drop(unfinished);
            assert!(!folder.exists());
            save(remote, &folder, None).unwrap();
        },
    );
    Snapshot::open(&folder).unwrap();
}

#[test]
fn a_tsc_is_scaled_to_what_was_saved() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("one");
    let count = saved_vm(&folder);
    rewrite(&folder, |manifest| manifest["tsc_khz"] = 3_500_000.into());
    let seen = Arc::new(AtomicU64::new(0));
    let tsc = seen.clone();
    let (end, _) = restore(&folder, move |vm, cpu, io| {
        tsc.store(vm.tsc_khz().unwrap(), Ordering::SeqCst);
        finds(count)(vm, cpu, io)
    });
    assert_eq!((end.unwrap(), seen.load(Ordering::SeqCst)), (End::DebugExit(count as u32), 3_500_000));
}

#[test]
fn another_host_is_told_what_it_lacks() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("one");
    saved_vm(&folder);
    let lacks = |parts: &[&str]| {
        let message = restore(&folder, finds(1)).0.unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part) && !message.contains('\n'), "{message}");
        }
    };
    rewrite(&folder, |manifest| manifest["tsc_khz"] = 3_000_751.into());
    lacks(&["engine fake", "a TSC of 3000751 kHz (it is 3000000 kHz here, and cannot be scaled to that)"]);
    rewrite(&folder, |manifest| {
        for leaf in manifest["vcpus"][0]["cpuid"]["leaves"].as_array_mut().unwrap() {
            if leaf["leaf"] == 7 && leaf["subleaf"] == 1 {
                leaf["result"]["eax"] = 0x30.into();
            }
        }
    });
    lacks(&["lacks CPUID 7h.1:eax bit 5, avx_vnni"]);
}

#[test]
fn other_versions_are_refused_by_number() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("one");
    saved_vm(&folder);
    let path = folder.join("manifest");
    let text = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
    std::fs::write(&path, text.replacen("anyvisor-snapshot 2", "anyvisor-snapshot 3", 1)).unwrap();
    let message = Snapshot::open(&folder).err().unwrap().to_string();
    assert!(message.contains("format '3'") && message.contains("format 2"), "{message}");
}

/// Changes the manifest and gives it a right checksum again, as an adversary would.
fn rewrite(folder: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("manifest");
    let text = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
    let mut body: serde_json::Value = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
    change(&mut body);
    let body = body.to_string();
    let checksum = snapshot::Checksum::of(body.as_bytes());
    std::fs::write(&path, format!("anyvisor-snapshot 2 {checksum}\n{body}")).unwrap();
}

/// Knuth's linear congruential generator: the same numbers on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit.max(1)
    }
}

/// A copy of snapshot `from`.
fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir(to).unwrap();
    for name in ["manifest", "pages", "memory"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

#[test]
fn damage_is_found_wherever_it_is() {
    let scratch = tempfile::tempdir().unwrap();
    let (good, broken) = (scratch.path().join("good"), scratch.path().join("broken"));
    saved_vm(&good);
    let mut random = Random(11);
    for round in 0..150 {
        copy(&good, &broken);
        let name = ["manifest", "pages", "memory"][round % 3];
        let path = broken.join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        // Only what the table of pages names is memory; the rest of the file is never looked at.
        let used: Vec<usize> =
            (0..bytes.len()).step_by(4096).filter(|at| bytes[*at..].iter().take(4096).any(|b| *b != 0)).collect();
        match random.below(if name == "memory" { 3 } else { 5 }) {
            0 => bytes.truncate(random.below(bytes.len())),
            1 => bytes.extend([0; 9]),
            2 => {
                let at = used[random.below(used.len())] + random.below(4096);
                let at = at.min(bytes.len() - 1);
                bytes[at] ^= 1 << random.below(8);
            }
            3 => {
                let at = random.below(bytes.len());
                bytes.remove(at);
            }
            _ => {
                let (from, to) = (random.below(bytes.len()), random.below(bytes.len()));
                if bytes[from] == bytes[to] {
                    continue;
                }
                bytes.swap(from, to);
            }
        }
        std::fs::write(&path, bytes).unwrap();
        let found = Snapshot::open(&broken).and_then(|snapshot| snapshot.verify(&AtomicBool::new(false)));
        let message = found.expect_err(&format!("round {round}: {name} is damaged")).to_string();
        assert!(message.contains("broken'") && !message.contains('\n'), "{message}");
    }
}

#[test]
fn a_vm_on_damaged_memory_ends_with_the_reason() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("one");
    let count = saved_vm(&folder);
    let path = folder.join("memory");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[LAST as usize + 100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    // However it ends itself.
    let (end, _) = restore(&folder, finds(count));
    assert!(matches!(&end, Ok(End::Failed(why)) if why.contains("one' is damaged: its memory at byte")), "{end:?}");
}

#[test]
fn forged_manifests_are_refused_or_harmless() {
    let scratch = tempfile::tempdir().unwrap();
    let (good, forged) = (scratch.path().join("good"), scratch.path().join("forged"));
    saved_vm(&good);
    let mut random = Random(5);
    let (mut refused, mut harmless) = (0, 0);
    copy(&good, &forged);
    for _ in 0..400 {
        std::fs::copy(good.join("manifest"), forged.join("manifest")).unwrap();
        rewrite(&forged, |manifest| forge(&mut random, manifest));
        let off = |_: &FakeVm, _: u32, io: &dyn GuestIo| {
            (0..=0xff).for_each(|port| _ = inb(io, port));
            io.pio_write(0x604, &(5u16 << 10 | 1 << 13).to_le_bytes());
            Exit::Kicked
        };
        match restore(&forged, off).0 {
            Ok(End::PowerOff) => harmless += 1,
            Ok(end) => panic!("{end:?}"),
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 50 && harmless > 50, "{refused} refused, {harmless} harmless");
}

/// Changes one thing somewhere in `value`.
fn forge(random: &mut Random, value: &mut serde_json::Value) {
    use serde_json::Value;
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let n = random.below(fields.len());
            if random.below(30) == 0 {
                let name = fields.keys().nth(n).unwrap().clone();
                fields.remove(&name);
                return;
            }
            forge(random, fields.values_mut().nth(n).unwrap());
        }
        Value::Array(items) if !items.is_empty() && random.below(8) != 0 => {
            let n = random.below(items.len());
            forge(random, &mut items[n]);
        }
        Value::Array(items) => items.extend(vec![Value::from(1); random.below(5000)]),
        Value::String(text) if random.below(2) == 0 => text.push_str("/../é\n"),
        Value::String(text) => text.clear(),
        Value::Bool(value) => *value = !*value,
        _ => {
            *value = match random.below(5) {
                0 => Value::from(random.below(256)),
                1 => Value::from(u64::MAX),
                2 => Value::Null,
                3 => Value::from(-1),
                _ => Value::from(1u64 << random.below(64)),
            }
        }
    }
}
