//! Saving and restoring: a Linux goes on where it was, whatever it was doing, and nothing that happens to a
//! save costs an earlier snapshot.

use anyvisor_tests::{assets, vm};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);
const QUIET: &[&str] = &["--cmdline", "console=ttyS0 quiet"];

/// A chain of hashes; each line has the step, the hash, the time since boot and the time of day.
const HASHES: &str = r#"
i=0; h=start
while [ $i -lt 60 ]; do
    h=$(echo $h | sha256sum | cut -c1-64); i=$((i + 1))
    echo "step $i $h $(cut -d' ' -f1 /proc/uptime) $(date +%s)"
    usleep 10000
done
echo "result $h"
poweroff -f
"#;

/// What the guest's chain of hashes comes to.
fn chain(steps: usize) -> String {
    (0..steps).fold("start".to_owned(), |text, _| {
        Sha256::digest(format!("{text}\n")).iter().map(|byte| format!("{byte:02x}")).collect()
    })
}

/// A name for a VM that no other test uses.
fn name(test: &str) -> String {
    format!("snapshots-{test}-{}", std::process::id())
}

/// Boots Linux with `script` as init, called `id`.
fn boot(id: &str, script: &str, more: &[&str]) -> vm::Vm {
    let kernel = assets::kernel().expect("a kernel");
    let initramfs = assets::scratch(id, &assets::initramfs(script).expect("busybox")).unwrap();
    let initramfs = initramfs.display().to_string();
    let mut options = vec!["--initrd", &initramfs, "--id", id];
    options.extend_from_slice(more);
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

/// Saves VM `id`, which must work.
fn save(id: &str, folder: &Path, parent: Option<&Path>) {
    let ended = try_save(id, folder, parent);
    assert_eq!(ended.code(), 0, "{ended:?}");
}

fn try_save(id: &str, folder: &Path, parent: Option<&Path>) -> vm::Ended {
    start_save(id, folder, parent).end(PATIENCE)
}

fn start_save(id: &str, folder: &Path, parent: Option<&Path>) -> vm::Vm {
    let mut arguments = vec!["snapshot".into(), id.into(), folder.display().to_string()];
    if let Some(parent) = parent {
        arguments.extend(["--parent".into(), parent.display().to_string()]);
    }
    vm::Vm::start(&arguments).expect("anyvisor starts")
}

fn restore(folder: &Path, more: &[&str]) -> vm::Vm {
    let folder = folder.display().to_string();
    vm::Vm::start(&[&["run", "--restore", &folder], more].concat()).expect("anyvisor starts")
}

/// Ends a VM as a power cut does.
fn kill(vm: vm::Vm) -> vm::Ended {
    vm.signal(libc::SIGKILL);
    vm.end(PATIENCE)
}

/// A line of [`HASHES`]: step, seconds since boot, seconds since 1970.
fn steps(output: &str) -> Vec<(usize, f64, u64)> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &["step", step, hash, uptime, date] = words.as_slice() else { return None };
        let step: usize = step.parse().ok()?;
        assert_eq!(hash, chain(step), "a wrong result");
        Some((step, uptime.parse().ok()?, date.parse().ok()?))
    };
    output.lines().filter_map(line).collect()
}

/// The restored guest goes on with the next step but for those it did after it was saved, its clocks go on too,
/// and its result is right.
fn check_hashes(before: &str, ended: &vm::Ended) {
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains(&format!("result {}", chain(60))), "{ended:?}");
    let (before, after) = (steps(before), steps(&ended.output));
    let (&first, &last) = (after.first().expect("steps"), after.last().expect("steps"));
    assert_eq!(last.0, 60, "{ended:?}");
    let known = before.iter().rfind(|step| step.0 < first.0).expect("the step before");
    assert_eq!(known.0 + 1, first.0, "a step is missing\n{before:?}\n{ended:?}");
    for pair in [&[*known][..], &after].concat().windows(2) {
        assert!(pair[1].1 >= pair[0].1 && pair[1].2 >= pair[0].2, "a clock went back: {pair:?}");
        assert!(pair[1].1 < pair[0].1 + 30.0, "a clock jumped: {pair:?}");
    }
}

#[test]
fn a_computation_goes_on_with_right_results_and_clock() {
    let scratch = assets::scratch_folder();
    let (id, folder) = (name("goes-on"), scratch.path().join("one"));
    let mut vm = boot(&id, HASHES, QUIET);
    vm.wait_for("step 10 ", PATIENCE);
    save(&id, &folder, None);
    vm.wait_for("step 25 ", PATIENCE);
    let before = kill(vm).output;
    check_hashes(&before, &restore(&folder, &[]).end(PATIENCE));
    // Once more, with everything compared first; and with options that say what the snapshot says.
    let again = restore(&folder, &["--verify-first", "--memory", "512M", "--cpus", "1", "--cpu-model", "x86-64-v3"]);
    check_hashes(&before, &again.end(PATIENCE));
}

#[test]
fn three_incremental_snapshots_restore_each() {
    let scratch = assets::scratch_folder();
    let id = name("three");
    let folders = ["a", "b", "c", "d"].map(|name| scratch.path().join(name));
    let mut vm = boot(&id, HASHES, QUIET);
    for (n, folder) in folders.iter().enumerate() {
        vm.wait_for(&format!("step {} ", 8 * n + 4), PATIENCE);
        save(&id, folder, n.checked_sub(1).map(|n| &*folders[n]));
    }
    let before = vm.end(PATIENCE);
    assert_eq!(before.code(), 0, "the original is none the worse\n{before:?}");
    for (n, folder) in folders.iter().enumerate() {
        check_hashes(&before.output, &restore(folder, &[]).end(PATIENCE));
        let pages = std::fs::metadata(folder.join("memory")).map(|data| std::os::unix::fs::MetadataExt::blocks(&data));
        assert!(n == 0 || pages.unwrap() * 512 < 32 << 20, "an incremental snapshot is small");
    }
}

#[test]
fn a_restored_vm_can_be_saved_and_restored_again() {
    let scratch = assets::scratch_folder();
    let id = name("again");
    let mut before = String::new();
    let mut parent: Option<PathBuf> = None;
    let mut vm = boot(&id, HASHES, QUIET);
    for generation in 1..4 {
        vm.wait_for(&format!("step {} ", 12 * generation), PATIENCE);
        let folder = scratch.path().join(generation.to_string());
        save(&id, &folder, parent.as_deref());
        before.push_str(&kill(vm).output);
        vm = restore(&folder, &["--id", &id]);
        parent = Some(folder);
    }
    check_hashes(&before, &vm.end(PATIENCE));
}

#[test]
fn it_goes_on_from_anywhere_in_the_boot() {
    let scratch = assets::scratch_folder();
    let id = name("boot");
    let vm = boot(&id, "echo hello from init; poweroff -f", &["--memory", "256M"]);
    let mut parent: Option<PathBuf> = None;
    let mut folders = vec![];
    for n in 0..6 {
        std::thread::sleep(Duration::from_millis(if n < 3 { 20 } else { 150 }));
        let folder = scratch.path().join(n.to_string());
        // The first may come before the VM has its socket, the last after its end.
        if try_save(&id, &folder, parent.as_deref()).code() == 0 {
            parent = Some(folder.clone());
            folders.push(folder);
        }
    }
    kill(vm);
    assert!(folders.len() >= 2, "{folders:?}");
    for folder in folders {
        let ended = restore(&folder, &[]).end(PATIENCE);
        assert_eq!(ended.code(), 0, "{folder:?}\n{ended:?}");
        assert!(ended.output.contains("hello from init"), "{folder:?}\n{ended:?}");
        assert!(!ended.output.contains("Call Trace"), "{folder:?}\n{ended:?}");
    }
}

#[test]
fn a_halted_guest_wakes_up_and_takes_input() {
    let scratch = assets::scratch_folder();
    let (id, folder) = (name("halted"), scratch.path().join("one"));
    let script = "echo ready; exec setsid cttyhack sh -i";
    let mut vm = boot(&id, script, QUIET);
    vm.wait_for("ready", PATIENCE);
    std::thread::sleep(Duration::from_millis(500));
    save(&id, &folder, None);
    kill(vm);
    let mut vm = restore(&folder, &[]);
    vm.type_in("sleep 1; echo $((6 * 7)) is the answer\n").unwrap();
    vm.wait_for("42 is the answer", PATIENCE);
    vm.type_in("dmesg | grep -c -E 'soft lockup|Call Trace|BUG:'; poweroff -f\n").unwrap();
    let ended = vm.end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.lines().any(|line| line.trim() == "0"), "no complaints\n{ended:?}");
}

#[test]
fn a_busy_program_goes_on_in_its_registers() {
    let scratch = assets::scratch_folder();
    let (id, folder) = (name("busy"), scratch.path().join("one"));
    // bc and awk keep integers and floating point going, without asking the kernel for anything.
    let script = "echo ready
awk 'BEGIN { x = 0.5; for (i = 0; i < 3000000; i++) { x = 3.75 * x * (1 - x); s += i % 7 } printf \"awk %.15f %d\\n\", x, s }'
poweroff -f";
    let mut vm = boot(&id, script, QUIET);
    vm.wait_for("ready", PATIENCE);
    std::thread::sleep(Duration::from_millis(150));
    save(&id, &folder, None);
    let result = |output: &str| output.lines().find(|line| line.starts_with("awk ")).map(|line| line.trim().to_owned());
    let whole = result(&vm.end(PATIENCE).output).expect("the original's result");
    let ended = restore(&folder, &[]).end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(result(&ended.output), Some(whole), "{ended:?}");
}

/// The TSC's frequency, the TSC and guest time in a snapshot.
fn times(folder: &Path) -> (u64, u64, u64) {
    let text = std::fs::read_to_string(folder.join("manifest")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
    let msrs = manifest["vcpus"][0]["state"]["msrs"].as_array().unwrap();
    let tsc = msrs.iter().find(|msr| msr[0] == 0x10).expect("IA32_TIME_STAMP_COUNTER")[1].as_u64().unwrap();
    (manifest["tsc_khz"].as_u64().unwrap(), tsc, manifest["clock"].as_u64().unwrap())
}

/// Prints dots for ever.
const DOTS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xb0, b'.', 0xee, // next: mov al, '.'; out dx, al
    0xb9, 0x00, 0x40, 0x00, 0x00, // mov ecx, 4000h
    0xe2, 0xfe, // loop $
    0xeb, 0xf4, // jmp next
];

/// What this host's KVM lacks of the translator's host model, as features to leave out; `None` if it cannot be used.
fn common_model(scratch: &tempfile::TempDir, kernel: &Path) -> Option<String> {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        println!("left out: /dev/kvm cannot be opened: {error}");
        return None;
    }
    let mut model = "host".to_owned();
    for attempt in 0..5 {
        let (id, folder) = (name("common"), scratch.path().join(format!("common-{attempt}")));
        let options = ["--engine", "translator", "--cpu-model", &model, "--memory", "32M", "--id", &id];
        let mut vm = vm::Vm::start(&vm::arguments(kernel, &options)).expect("anyvisor starts");
        vm.wait_for("..", PATIENCE);
        save(&id, &folder, None);
        // In order: a killed one's name would be a second line.
        vm.signal(libc::SIGTERM);
        vm.end(PATIENCE);
        match restore(&folder, &["--engine", "kvm"]).try_end(Duration::from_millis(500)) {
            Err(vm) => {
                kill(vm);
                return Some(model);
            }
            Ok(ended) => {
                // A mismatch is refused in one line, with the list of what differs.
                assert_eq!((ended.code(), ended.errors.trim().lines().count()), (2, 1), "{ended:?}");
                let lacks = ended.errors.trim().split_once("which lacks ").expect("a list").1;
                lacks.split(", ").for_each(|feature| model += &format!(",-{feature}"));
            }
        }
    }
    println!("left out: this host's engines have no CPU model in common but {model}");
    None
}

/// The guest's TSC and its time go on from where they were, together, through saves and under another engine.
#[test]
fn tsc_and_clock_go_on_together() {
    let scratch = assets::scratch_folder();
    let kernel = assets::scratch("snapshots-dots", &anyvisor_tests::elf::pvh(DOTS)).unwrap();
    let common = common_model(&scratch, &kernel);
    let engines = if common.is_some() { &["translator", "kvm", "translator"][..] } else { &["translator"; 3] };
    let (id, model) = (name("times"), common.unwrap_or("host".into()));
    let mut last: Option<(PathBuf, (u64, u64, u64))> = None;
    for (n, engine) in engines.iter().enumerate() {
        let mut vm = match &last {
            Some((folder, _)) => restore(folder, &["--engine", engine, "--id", &id]),
            None => {
                let options = ["--engine", engine, "--cpu-model", &model, "--memory", "32M", "--id", &id];
                vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
            }
        };
        for save_number in 0..2 {
            vm.wait_for("....", PATIENCE);
            let folder = scratch.path().join(format!("{n}-{save_number}"));
            save(&id, &folder, None);
            let (khz, tsc, clock) = times(&folder);
            if let Some((_, (old_khz, old_tsc, old_clock))) = last {
                assert!(khz.abs_diff(old_khz) * 4000 <= khz, "{old_khz} kHz, then {khz} kHz");
                // Not while it was saved: it goes on at once.
                assert!(clock > old_clock && clock - old_clock < 60_000_000_000, "{old_clock} ns, then {clock} ns");
                let (ticks, nanoseconds) = (tsc.wrapping_sub(old_tsc), clock - old_clock);
                let apart = (ticks as i128 * 1_000_000 / i128::from(khz) - i128::from(nanoseconds)).abs();
                if vm.errors().contains("cannot set the guest's TSC") && save_number == 0 {
                    println!("left out: this host's KVM gives guests its own TSC, and the user was told");
                } else {
                    assert!(apart < 5_000_000, "under {engine}: {ticks} ticks of {khz} kHz in {nanoseconds} ns");
                }
            }
            last = Some((folder, (khz, tsc, clock)));
        }
        kill(vm);
    }
}

/// How often the next test kills: a few times, or what this variable says.
const KILLS_VARIABLE: &str = "ANYVISOR_KILLS";

#[test]
fn a_save_cut_short_costs_nothing() {
    let scratch = assets::scratch_folder();
    let (id, first) = (name("killed"), scratch.path().join("first"));
    let script =
        "n=0; while true; do n=$((n + 1)); dd if=/dev/urandom of=/tmp/x bs=1M count=4 2>/dev/null; echo round $n; done";
    let mut vm = boot(&id, script, QUIET);
    vm.wait_for("round 3", PATIENCE);
    save(&id, &first, None);
    kill(vm);
    let kills = std::env::var(KILLS_VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let (mut finished, mut cut) = (0, 0);
    for n in 0..kills {
        let folder = scratch.path().join(n.to_string());
        // This restores the earlier snapshot each time.
        let mut vm = restore(&first, &["--id", &id]);
        vm.wait_for("round", PATIENCE);
        let full = n % 3 == 2;
        let saving = start_save(&id, &folder, (!full).then_some(&*first));
        // From before it begins to after it is done, at odd moments.
        std::thread::sleep(Duration::from_micros(n * 7_919 % if full { 300_000 } else { 90_000 }));
        kill(vm);
        saving.end(PATIENCE);
        let mut again = restore(&folder, &["--id", &id]);
        if folder.join("manifest").exists() {
            again.wait_for("round", PATIENCE);
            kill(again);
            finished += 1;
        } else {
            let ended = again.end(PATIENCE);
            assert_eq!(ended.code(), 2, "{ended:?}");
            assert_eq!(
                ended
                    .errors
                    .trim()
                    .lines()
                    .filter(|line| line.contains("snapshot") || line.contains("there is no"))
                    .count(),
                1,
                "{ended:?}"
            );
            cut += 1;
        }
        let _ = std::fs::remove_dir_all(&folder);
    }
    println!("{kills} kills: {cut} saves cut short, {finished} finished");
    assert!(cut > 0, "no save was cut short");
}

/// A file system of a few MiB, if this user may mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(path: PathBuf) -> Option<SmallDisk> {
        std::fs::create_dir_all(&path).unwrap();
        let mut command = std::process::Command::new("mount");
        let mounted = assets::run(command.args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(&path));
        mounted.is_ok().then_some(SmallDisk(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = assets::run(std::process::Command::new("umount").arg(&self.0));
    }
}

#[test]
fn a_full_disk_is_an_error_and_nothing_more() {
    let scratch = assets::scratch_folder();
    let Some(disk) = SmallDisk::new(scratch.path().join("disk")) else {
        println!("left out: only root can mount a small file system");
        return;
    };
    let (id, first, second) = (name("full"), scratch.path().join("first"), disk.0.join("second"));
    let mut vm = boot(&id, HASHES, QUIET);
    vm.wait_for("step 5 ", PATIENCE);
    save(&id, &first, None);
    let ended = try_save(&id, &second, None);
    assert_ne!(ended.code(), 0, "{ended:?}");
    assert!(ended.errors.contains("No space left") && ended.errors.contains("disk/second"), "{ended:?}");
    assert_eq!(ended.errors.trim().lines().count(), 1, "{ended:?}");
    assert!(!second.exists(), "nothing is left of it");
    // The log of written pages was not lost with it.
    vm.wait_for("step 20 ", PATIENCE);
    save(&id, &scratch.path().join("third"), Some(&first));
    let whole = vm.end(PATIENCE);
    assert_eq!(whole.code(), 0, "the VM goes on\n{whole:?}");
    for name in ["first", "third"] {
        check_hashes(&whole.output, &restore(&scratch.path().join(name), &[]).end(PATIENCE));
    }
}

#[test]
fn what_cannot_be_restored_is_refused_in_one_line() {
    let scratch = assets::scratch_folder();
    let (id, folder) = (name("refused"), scratch.path().join("one"));
    let mut vm = boot(&id, "echo ready; while true; do :; done", &[QUIET, &["--memory", "128M"]].concat());
    vm.wait_for("ready", PATIENCE);
    save(&id, &folder, None);
    let taken = try_save(&id, &folder, None);
    assert!(taken.code() == 2 && taken.errors.contains("has a snapshot already"), "{taken:?}");
    kill(vm);
    let refused = |options: &[&str], parts: &[&str]| {
        let ended = restore(&folder, options).end(PATIENCE);
        assert_eq!(ended.code(), 2, "{ended:?}");
        let line = ended.errors.trim();
        assert!(line.lines().count() == 1 && parts.iter().all(|part| line.contains(part)), "{ended:?}");
    };
    refused(&["--memory", "1G"], &["--memory 1G contradicts", "128M"]);
    refused(&["--cpus", "2"], &["--cpus 2 contradicts", "which has 1"]);
    refused(&["--cpu-model", "host"], &["--cpu-model host contradicts", "x86-64-v3"]);
    refused(&["--cmdline", "quiet"], &["--cmdline 'quiet' contradicts", "console=ttyS0 quiet"]);
    refused(&["--kernel", "/boot/other"], &["--kernel '/boot/other' contradicts"]);
    refused(&["--initrd", "/boot/other"], &["--initrd '/boot/other' contradicts"]);
    refused(&["--debug-exit"], &["--debug-exit contradicts"]);
    let manifest = folder.join("manifest");
    let good = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, good.replacen("anyvisor-snapshot 2 ", "anyvisor-snapshot 99 ", 1)).unwrap();
    refused(&[], &["has format '99'", "format 2"]);
    std::fs::write(&manifest, good.replacen("\"clock\":", "\"clock\":1", 1)).unwrap();
    refused(&[], &["does not have its checksum"]);
    // A TSC that no host has, with a right checksum.
    let (_, body) = good.split_once('\n').unwrap();
    let (khz, ..) = times(&folder);
    let body = body.replacen(&format!("\"tsc_khz\":{khz}"), "\"tsc_khz\":123456789", 1);
    let checksum: String = Sha256::digest(&body).iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(&manifest, format!("anyvisor-snapshot 2 {checksum}\n{body}")).unwrap();
    refused(
        &["--no-api"],
        &["cannot go on under engine translator", "a TSC of 123456789 kHz", &format!("it is {khz} kHz here")],
    );
    std::fs::write(&manifest, &good).unwrap();
    let memory = std::fs::OpenOptions::new().write(true).open(folder.join("memory")).unwrap();
    memory.set_len(1 << 20).unwrap();
    refused(&[], &["its memory has 1048576 bytes"]);
    std::fs::remove_file(&manifest).unwrap();
    refused(&[], &["holds a snapshot that was never finished"]);
}

#[test]
fn a_flipped_bit_of_memory_is_found() {
    use std::os::unix::fs::FileExt;
    let scratch = assets::scratch_folder();
    let (id, folder) = (name("flipped"), scratch.path().join("one"));
    let mut vm = boot(&id, "echo ready; sleep 1; echo survived; poweroff -f", &[QUIET, &["--memory", "128M"]].concat());
    vm.wait_for("ready", PATIENCE);
    save(&id, &folder, None);
    kill(vm);
    // In the first page that the table names; entries begin after 8 bytes with the page's number.
    let table = std::fs::read(folder.join("pages")).unwrap();
    let page = u64::from_le_bytes(table[8..16].try_into().unwrap());
    let memory = std::fs::OpenOptions::new().read(true).write(true).open(folder.join("memory")).unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, 4096 * page + 5).unwrap();
    memory.write_all_at(&[byte[0] ^ 0x10], 4096 * page + 5).unwrap();
    for (options, code) in [(&[][..], 1), (&["--verify-first"], 2)] {
        let ended = restore(&folder, options).end(PATIENCE);
        assert_eq!(ended.code(), code, "{ended:?}");
        assert!(ended.errors.contains("is damaged: its memory at byte"), "{ended:?}");
    }
}

/// Starts the guest that prints dots.
fn dots(id: &str) -> vm::Vm {
    let kernel = assets::scratch(id, &anyvisor_tests::elf::pvh(DOTS)).unwrap();
    let mut vm = vm::Vm::start(&vm::arguments(&kernel, &["--memory", "32M", "--id", id])).expect("anyvisor starts");
    vm.wait_for("..", PATIENCE);
    vm
}

/// Whatever a save is pointed at, it says in one line why not, and the VM goes on.
#[test]
fn places_that_will_not_do_are_refused_and_hold_up_nobody() {
    let scratch = assets::scratch_folder();
    let id = name("places");
    let mut vm = dots(&id);
    let (fifo, file) = (scratch.path().join("fifo"), scratch.path().join("file"));
    assets::run(std::process::Command::new("mkfifo").arg(&fifo)).unwrap();
    std::fs::write(&file, "precious").unwrap();
    let too_long = scratch.path().join("x".repeat(300));
    let missing = scratch.path().join("no/such");
    for place in [&*fifo, &file, &too_long, &missing, Path::new("/proc/nothing"), Path::new("/dev/null")] {
        let ended = try_save(&id, place, None);
        assert_eq!((ended.code(), ended.errors.trim().lines().count()), (2, 1), "{ended:?}");
        assert!(ended.errors.contains("cannot save to") && ended.errors.contains("give another folder"), "{ended:?}");
        vm.wait_for("..", PATIENCE);
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    // And whatever a restore is.
    let good = scratch.path().join("good");
    save(&id, &good, None);
    vm.signal(libc::SIGTERM);
    vm.end(PATIENCE);
    for (missing, word) in [("memory", "it has no 'memory'"), ("pages", "it has no 'pages'")] {
        let away = scratch.path().join("away");
        std::fs::rename(good.join(missing), &away).unwrap();
        let ended = restore(&good, &[]).end(PATIENCE);
        assert!(ended.code() == 2 && ended.errors.contains(word), "{ended:?}");
        assert_eq!(ended.errors.trim().lines().count(), 1, "{ended:?}");
        std::fs::rename(&away, good.join(missing)).unwrap();
    }
    let kernel = vm::arguments(&fifo, &[]);
    let ended = vm::run(&kernel, PATIENCE);
    assert!(ended.code() == 2 && ended.errors.contains("not a regular file"), "{ended:?}");
    restore(&good, &[]).wait_for("..", PATIENCE);
}

/// Somebody cuts the file off that a VM's memory is mapped from: the VM cannot go on, and says why.
#[test]
fn a_file_that_goes_away_under_a_vm_is_told() {
    use std::os::unix::process::ExitStatusExt;
    let scratch = assets::scratch_folder();
    let (id, folder) = (name("cut-off"), scratch.path().join("one"));
    let vm = dots(&id);
    save(&id, &folder, None);
    kill(vm);
    let mut vm = restore(&folder, &["--engine", "translator"]);
    // Its checksums have been compared by then.
    vm.wait_for("..", PATIENCE);
    std::thread::sleep(Duration::from_millis(500));
    std::fs::OpenOptions::new().write(true).open(folder.join("memory")).unwrap().set_len(0).unwrap();
    let ended = vm.end(PATIENCE);
    assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{ended:?}");
    assert!(ended.errors.contains("a file of the snapshot that this VM goes on from was changed"), "{ended:?}");
}

/// How many forgeries the next test tries: some, or what this variable says.
const FORGERIES_VARIABLE: &str = "ANYVISOR_FORGERIES";

/// An adversary makes snapshots with right checksums. Whatever they say, anyvisor refuses them in a line, or runs
/// a guest that does what it likes within its VM.
#[test]
fn forged_snapshots_are_refused_or_run_as_guests() {
    let scratch = assets::scratch_folder();
    let (id, folder) = (name("forged"), scratch.path().join("one"));
    let script = "echo ready; i=0; while true; do i=$((i + 1)); done";
    let mut vm = boot(&id, script, &[QUIET, &["--memory", "128M"]].concat());
    vm.wait_for("ready", PATIENCE);
    save(&id, &folder, None);
    kill(vm);
    let manifest = folder.join("manifest");
    let good = std::fs::read_to_string(&manifest).unwrap();
    let good: serde_json::Value = serde_json::from_str(good.split_once('\n').unwrap().1).unwrap();
    let count = std::env::var(FORGERIES_VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let seed = std::env::var("ANYVISOR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut random = Random(seed);
    let (mut refused, mut ran) = (0, 0);
    for n in 0..count {
        let mut forged = good.clone();
        for _ in 0..=random.below(3) {
            // The vCPU's state is what an engine must make sense of.
            match forged.pointer_mut("/vcpus/0/state").filter(|_| random.below(4) != 0) {
                Some(state) => forge(&mut random, state),
                None => forge(&mut random, &mut forged),
            }
        }
        let body = forged.to_string();
        let checksum: String = Sha256::digest(&body).iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(&manifest, format!("anyvisor-snapshot 2 {checksum}\n{body}")).unwrap();
        let vm = restore(&folder, &["--id", &id]);
        let ended = match vm.try_end(Duration::from_millis(150)) {
            Ok(ended) => ended,
            Err(vm) => {
                vm.signal(libc::SIGTERM);
                vm.end(PATIENCE)
            }
        };
        let kept = || {
            let kept = assets::folder().join(format!("forged-{seed}-{n}"));
            std::fs::copy(&manifest, &kept).unwrap();
            kept
        };
        // 0 to 3 are ways to end; anything else is a panic or a crash.
        let status = ended.status.code();
        assert!(matches!(status, Some(0..=3)), "{status:?}, kept as {}\n{ended:?}", kept().display());
        assert!(!ended.errors.contains("panicked"), "kept as {}\n{ended:?}", kept().display());
        if status == Some(2) {
            let notes = ["anyvisor: engine ", "removed the control socket of a dead VM"];
            let is_note = |line: &str| notes.iter().any(|note| line.contains(note));
            let lines: Vec<_> = ended.errors.lines().filter(|line| !is_note(line)).collect();
            assert_eq!(lines.len(), 1, "kept as {}\n{ended:?}", kept().display());
            refused += 1;
        } else {
            ran += 1;
        }
    }
    println!("{count} forgeries: {refused} refused, {ran} ran");
    assert!(refused > 0 && ran > 0, "{refused} refused, {ran} ran");
}

/// Knuth's linear congruential generator: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit.max(1)
    }
}

/// Changes one thing somewhere in `value`.
fn forge(random: &mut Random, value: &mut serde_json::Value) {
    use serde_json::Value;
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let n = random.below(fields.len());
            forge(random, fields.values_mut().nth(n).expect("that many"));
        }
        Value::Array(items) if !items.is_empty() && random.below(20) != 0 => {
            let n = random.below(items.len());
            forge(random, &mut items[n]);
        }
        Value::Array(items) => items.truncate(random.below(items.len())),
        Value::String(text) => text.push_str("..."),
        Value::Bool(value) => *value = !*value,
        Value::Number(number) => {
            let number = number.as_u64().unwrap_or(0);
            // Mostly what fits its type: a bit that a number of this size can have.
            let width = 64 - number.max(255).leading_zeros() as usize;
            *value = match random.below(10) {
                0 => Value::from(0),
                1 => Value::from(random.below(256)),
                2 => Value::from(1u64 << random.below(64)),
                3 => Value::from(u64::MAX),
                _ => Value::from(number ^ 1 << random.below(width)),
            };
        }
        _ => *value = serde_json::json!({ "vector": random.below(256), "error_code": 5, "payload": 7 }),
    }
}
