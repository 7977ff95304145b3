//! Guest RAM on huge pages: what the host's kernel says a VM's memory is made of.

use anyvisor_tests::elf::{HALT, print, pvh};
use anyvisor_tests::{assets, vm};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

/// Writes to 30 places, 2 MiB apart; then, for ever, reads them and prints a dot if they are right.
fn guest() -> Vec<u8> {
    let write = [
        0xbf, 0x00, 0x00, 0x20, 0x00, 0xb9, 0x1e, 0x00, 0x00, 0x00, // mov edi, 200000h; mov ecx, 30
        0x89, 0x3f, 0x81, 0xc7, 0x00, 0x00, 0x20, 0x00, 0xe2,
        0xf6, // next: mov [edi], edi; add edi, 200000h; loop next
    ];
    let check = [
        0xbf, 0x00, 0x00, 0x20, 0x00, 0xb9, 0x1e, 0x00, 0x00, 0x00, // check: mov edi, 200000h; mov ecx, 30
        0x39, 0x3f, 0x75, 0x14, // next: cmp [edi], edi; jne bad
        0x81, 0xc7, 0x00, 0x00, 0x20, 0x00, 0xe2, 0xf4, // add edi, 200000h; loop next
        0xb0, b'.', 0xee, // mov al, '.'; out dx, al
        0xb9, 0x00, 0x40, 0x00, 0x00, 0xe2, 0xfe, // mov ecx, 4000h; loop $
        0xeb, 0xde, // jmp check
        0xb0, b'X', 0xee, // bad: mov al, 'X'; out dx, al
    ];
    [&write[..], &print("written "), &check, HALT].concat()
}

/// The engines of this host, but for a KVM that is not there.
fn engines() -> Vec<&'static str> {
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &kvm {
        println!("left out for engine kvm: /dev/kvm cannot be opened: {error}");
    }
    ["translator", "kvm"].into_iter().filter(|engine| *engine == "translator" || kvm.is_ok()).collect()
}

fn start(engine: &str, id: &str, memory: &str) -> vm::Vm {
    let kernel = assets::scratch("memory-guest", &pvh(&guest())).unwrap();
    let options = ["--engine", engine, "--cpu-model", "host", "--memory", memory, "--id", id];
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

/// KiB of `field` in the mappings of `vm` for which `of_interest` (proc(5), smaps).
fn smaps(vm: &vm::Vm, of_interest: &str, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps", vm.process())).expect("a living process");
    // Each mapping's entry begins with its range of addresses, whose first letter is no capital.
    let mut entries: Vec<Vec<&str>> = vec![];
    for line in text.lines() {
        if line.starts_with(|c: char| c.is_ascii_uppercase()) {
            entries.last_mut().expect("fields come after an entry's beginning").push(line);
        } else {
            entries.push(vec![]);
        }
    }
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let value = |entry: &[&str]| -> Option<u64> {
        entry.iter().find(|line| line.starts_with(field))?.split_whitespace().nth(1)?.parse().ok()
    };
    let wanted = entries.iter().filter(|entry| entry.iter().any(|line| words(line).contains(of_interest)));
    wanted.filter_map(|entry| value(entry)).sum()
}

/// KiB of RAM on transparent huge pages, of the VM's own or of a file.
fn on_transparent_pages(vm: &vm::Vm) -> u64 {
    smaps(vm, " hg", "AnonHugePages:") + smaps(vm, " hg", "ShmemPmdMapped:")
}

/// The guest's dots go on, and nothing else is seen.
#[track_caller]
fn works(vm: &mut vm::Vm) {
    let before = vm.output().len();
    vm.wait_for(".....", PATIENCE);
    assert!(!vm.output()[before..].contains('X'), "memory has changed");
}

fn end(vm: vm::Vm) {
    vm.signal(libc::SIGTERM);
    vm.end(PATIENCE);
}

/// Why this host has no transparent huge pages on request.
fn no_transparent() -> Option<String> {
    match std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled") {
        Ok(state) if !state.contains("[never]") => None,
        Ok(_) => Some("transparent huge pages are off".into()),
        Err(error) => Some(format!("no transparent huge pages: {error}")),
    }
}

#[test]
fn transparent_huge_pages() {
    for engine in engines() {
        let mut vm = start(engine, "thp", "64M,hugepages=thp");
        if let Some(why) = no_transparent() {
            println!("left out: {why}; checked that it is refused");
            let ended = vm.end(PATIENCE);
            assert!(ended.code() == 2 && ended.errors.contains("huge pages"), "{ended:?}");
            continue;
        }
        vm.wait_for("written", PATIENCE);
        works(&mut vm);
        let huge = on_transparent_pages(&vm);
        assert!(huge >= 56 << 10, "{engine}: {huge} KiB of 60 MiB are on huge pages");
        // A restored VM has them, too.
        let scratch = assets::scratch_folder();
        let folder = scratch.path().join("one");
        let saved = vm::run(&["snapshot", "thp", &folder.display().to_string()], PATIENCE);
        assert_eq!(saved.code(), 0, "{saved:?}");
        end(vm);
        let restore = ["run", "--engine", engine, "--restore", &folder.display().to_string(), "--memory"];
        let mut vm = vm::Vm::start(&[&restore[..], &["64M,hugepages=thp"]].concat()).expect("anyvisor starts");
        works(&mut vm);
        let huge = on_transparent_pages(&vm);
        assert!(huge >= 56 << 10, "{engine}: {huge} KiB of 60 MiB are on huge pages after a restore");
        end(vm);
    }
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Tests of the pool take turns: its size is read and then written, and what one has added another's VM may take.
static TURN: Mutex<()> = Mutex::new(());

/// Pages that this test has added to the host's pool; it takes them away again.
struct Pool {
    added: u64,
    _turn: MutexGuard<'static, ()>,
}

impl Pool {
    fn size() -> Option<u64> {
        std::fs::read_to_string(POOL).ok()?.trim().parse().ok()
    }

    fn grow(pages: u64) -> Result<Pool, String> {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = Pool::size().ok_or("this kernel has no pool of huge pages")?;
        std::fs::write(POOL, (before + pages).to_string()).map_err(|e| format!("the pool cannot be enlarged: {e}"))?;
        let added = Pool { added: pages, _turn };
        let after = Pool::size().unwrap_or(0);
        if after < before + pages {
            Err(format!("the pool has {after} pages, not {}", before + pages))
        } else {
            Ok(added)
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let size = Pool::size().unwrap_or(0);
        let _ = std::fs::write(POOL, size.saturating_sub(self.added).to_string());
    }
}

#[test]
fn pages_of_the_pool() {
    let _pool = match Pool::grow(32) {
        Ok(pool) => pool,
        Err(why) => return println!("left out: {why}"),
    };
    for engine in engines() {
        let mut vm = start(engine, "pool", "64M,hugepages=2M");
        vm.wait_for("written", PATIENCE);
        works(&mut vm);
        let check = |vm: &vm::Vm| {
            let pool = "KernelPageSize: 2048 kB";
            assert_eq!(smaps(vm, pool, "Size:"), 64 << 10, "{engine}: all of RAM");
            let used = smaps(vm, pool, "Shared_Hugetlb:") + smaps(vm, pool, "Private_Hugetlb:");
            assert!(used >= 60 << 10, "{engine}: {used} KiB of 60 MiB are on huge pages");
        };
        check(&vm);
        // A VM is saved from there and restored to there.
        let scratch = assets::scratch_folder();
        let folder = scratch.path().join("one");
        let saved = vm::run(&["snapshot", "pool", &folder.display().to_string()], PATIENCE);
        assert_eq!(saved.code(), 0, "{saved:?}");
        end(vm);
        let restore = ["run", "--engine", engine, "--restore", &folder.display().to_string(), "--memory"];
        let mut vm = vm::Vm::start(&[&restore[..], &["64M,hugepages=2M"]].concat()).expect("anyvisor starts");
        works(&mut vm);
        check(&vm);
        // And saved again, with what it has written since.
        let more = folder.with_extension("more");
        let (more, folder) = (more.display().to_string(), folder.display().to_string());
        let saved = vm::run(&["snapshot", "pool", &more, "--parent", &folder], PATIENCE);
        assert_eq!(saved.code(), 0, "{saved:?}");
        end(vm);
        let mut vm = vm::Vm::start(&["run", "--engine", engine, "--restore", &more]).expect("anyvisor starts");
        works(&mut vm);
        assert_eq!(smaps(&vm, "KernelPageSize: 2048 kB", "Size:"), 0, "where none are asked for, none are taken");
        end(vm);
    }
}

/// A reset gives the pages back before the next VM takes them.
#[test]
fn pages_of_the_pool_through_a_reset() {
    let _pool = match Pool::grow(8) {
        Ok(pool) => pool,
        Err(why) => return println!("left out: {why}"),
    };
    // mov dx, 0cf9h; mov al, 6; out dx, al
    let reset = [0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee];
    let kernel = assets::scratch("memory-reset", &pvh(&[&print("again "), &reset[..], HALT].concat())).unwrap();
    let options = ["--memory", "16M,hugepages=2M", "--on-reboot", "restart", "--engine", "translator"];
    let mut vm = vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts");
    vm.wait_for("again again again again", PATIENCE);
    end(vm);
}

#[test]
fn what_the_host_does_not_have_is_refused() {
    let kernel = assets::scratch("memory-refused", &pvh(HALT)).unwrap();
    for (memory, words) in [
        ("1024G,hugepages=2M", &["huge pages"][..]),
        ("9M,hugepages=2M", &["9M", "multiple of 2M"]),
        ("64M,hugepages=1G", &["hugepages=1G", "hugepages=2M"]),
        ("64M,pages=thp", &["pages=thp"]),
    ] {
        let ended = vm::run(&vm::arguments(&kernel, &["--memory", memory]), PATIENCE);
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert_eq!(ended.errors.trim_end().lines().count(), 1, "{ended:?}");
        assert!(words.iter().all(|word| ended.errors.contains(word)), "{ended:?}");
        if memory.starts_with("1024G") && std::path::Path::new(POOL).exists() {
            assert!(ended.errors.contains("sysctl vm.nr_hugepages="), "{ended:?}");
        }
    }
}
