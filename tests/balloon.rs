//! The balloon, as Linux uses it: free memory goes back to the host, more on request, and comes again; and over a snapshot.

use anyvisor_tests::{assets, vm};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(180);

/// What Linux needs, in the order of loading.
const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_balloon"];

fn initramfs(name: &str, script: &str) -> PathBuf {
    let files = assets::modules(&MODULES).expect("the kernel's modules");
    let script = format!(
        r#"for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done
check() {{ if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }}
# Files full of numbers, so many MiB of them: their checksum as it was, and as it is read.
seq 1 600000 | head -c 1048000 >/numbers
fill() {{ n=0; while [ $n -lt $1 ]; do {{ echo $n; cat /numbers; }} >/tmp/f$n; n=$((n + 1)); done; cat /tmp/f* | md5sum; }}
{script}
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace')" 0
echo checks done; poweroff -f"#,
        MODULES.join(" ")
    );
    assets::scratch(name, &assets::initramfs_with(&script, &files).expect("busybox")).expect("a file")
}

fn all_pass(ended: &vm::Ended, checks: usize) {
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok\r\n").count(), checks, "{ended:?}");
}

/// MiB of guest memory that the host holds for a process: of a file in memory, or its own.
fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = |field: &str| {
        let line = text.lines().find(|line| line.starts_with(field)).expect("the field");
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    (value("RssShmem:") + value("RssAnon:")) >> 10
}

/// Runs a command about a VM, which must work; what it says.
fn fine(arguments: &[&str]) -> String {
    let ended = vm::run(arguments, PATIENCE);
    assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
    ended.output
}

#[test]
fn memory_goes_to_the_host_and_back() {
    let folder = assets::scratch_folder();
    let saved = folder.path().join("saved").display().to_string();
    let script = r#"
sum=$(fill 160); echo filled; read go
rm /tmp/f*; echo 3 >/proc/sys/vm/drop_caches; echo freed; read go
check smaller "$(awk '/MemAvailable/ { print ($2 < 300000) }' /proc/meminfo)" 1
check kept "$(fill 80)" "$(fill 80)"; rm /tmp/f*; echo small; read go
check larger "$(awk '/MemAvailable/ { print ($2 > 330000) }' /proc/meminfo)" 1
check whole "$(fill 160)" "$sum"
"#;
    let (kernel, id) = (assets::kernel().expect("a kernel"), format!("balloon-{}", std::process::id()));
    let initramfs = initramfs("balloon", script).display().to_string();
    let more = ["--initrd", &initramfs, "--memory", "512M", "--balloon", "0M", "--id", &id];
    let more = [&more[..], &["--cmdline", "console=ttyS0 quiet"]].concat();
    let mut vm = vm::Vm::start(&vm::arguments(&kernel, &more)).expect("anyvisor starts");
    vm.wait_for("filled\r\n", PATIENCE);
    let full = resident(vm.process());
    vm.type_in("go\n").unwrap();
    vm.wait_for("freed\r\n", PATIENCE);
    // Linux reports what is free every two seconds.
    let begun = Instant::now();
    while resident(vm.process()) + 120 > full {
        assert!(begun.elapsed() < PATIENCE, "{full} MiB have only become {}", resident(vm.process()));
        std::thread::sleep(Duration::from_millis(100));
    }
    let said = fine(&["balloon", &id, "200M"]);
    assert!(said.starts_with("lends 200M; of "), "{said}");
    vm.type_in("go\n").unwrap();
    vm.wait_for("small\r\n", PATIENCE);
    fine(&["snapshot", &id, &saved]);
    let ended = vm::run(&["balloon", &id, "600M"], PATIENCE);
    assert_eq!(ended.code(), 2, "{ended:?}");
    let finish = |mut vm: vm::Vm| {
        let said = fine(&["balloon", &id, "0M"]);
        assert!(said.starts_with("lends 0M; of "), "{said}");
        vm.type_in("go\n").unwrap();
        vm.end(PATIENCE)
    };
    all_pass(&finish(vm), 5);
    let restored = vm::Vm::start(&["run", "--restore", &saved]).expect("anyvisor starts");
    let begun = Instant::now();
    while vm::run(&["balloon", &id], PATIENCE).code() != 0 {
        assert!(begun.elapsed() < PATIENCE);
    }
    assert!(fine(&["balloon", &id]).starts_with("lends 200M; of "));
    all_pass(&finish(restored), 3);
}
