//! Guests beyond the usual 64-bit Linux: 32-bit kernels and programs, kexec, memtest86+.

use anyvisor_tests::{assets, vm};
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);
const CONSOLE: [&str; 2] = ["--cmdline", "console=ttyS0 quiet"];

/// Checks that `program32.c` makes.
const PROGRAM_CHECKS: usize = 17;

fn boot(kernel: &Path, name: &str, initramfs: &[u8], more: &[&str]) -> vm::Ended {
    let initramfs = assets::scratch(name, initramfs).unwrap().display().to_string();
    let mut options = vec!["--initrd", &initramfs];
    options.extend_from_slice(more);
    let ended = vm::run(&vm::arguments(kernel, &options), PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    ended
}

fn all_checks_passed(ended: &vm::Ended, checks: usize) {
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok").count(), checks, "{ended:?}");
}

/// What a 32-bit kernel and its programs show: memory on both sides of paging's bits, pipes, system calls, clocks.
const SCRIPT_32: &str = r#"
check() { if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }
check machine "$(uname -m)" i686
check hash "$(dd if=/dev/zero bs=1024 count=1024 2>/dev/null | sha256sum | cut -c1-16)" 30e14955ebf13522
check pipes "$(seq 1 3000 | sort -r | gzip | gunzip | uniq | wc -l)" 3000
check forks "$(i=0; while [ $i -lt 30 ]; do /bin/true && i=$((i + 1)); done; echo $i)" 30
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace|unchecked MSR|soft lockup')" 0
dmesg | grep -E 'BUG:|Oops|WARNING:|Call Trace|unchecked MSR'
/bin/program32
poweroff -f
"#;

fn boot_32(flavour: &str) {
    let kernel = assets::kernel_32(flavour).expect("a 32-bit kernel");
    let busybox = std::fs::read(assets::busybox_32().expect("a 32-bit busybox")).unwrap();
    let program = std::fs::read(assets::program_32().expect("gcc")).unwrap();
    let files = [("bin/program32".to_owned(), program)];
    let ended = boot(&kernel, flavour, &assets::initramfs_of(&busybox, SCRIPT_32, &files), &CONSOLE);
    all_checks_passed(&ended, 5 + PROGRAM_CHECKS);
}

#[test]
fn a_32_bit_kernel_with_pae_boots() {
    boot_32("686-pae");
}

#[test]
fn a_32_bit_kernel_without_pae_boots() {
    boot_32("686");
}

#[test]
fn a_64_bit_kernel_runs_32_bit_programs() {
    let busybox = std::fs::read(assets::busybox_32().expect("a 32-bit busybox")).unwrap();
    let program = std::fs::read(assets::program_32().expect("gcc")).unwrap();
    let script = r#"
check() { if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }
check hash "$(dd if=/dev/zero bs=1024 count=512 2>/dev/null | /bin/busybox32 sha256sum | cut -c1-16)" 07854d2fef297a06
check shell "$(/bin/busybox32 sh -c 'i=0; s=0; while [ $i -lt 2000 ]; do s=$((s + i * i)); i=$((i + 1)); done; echo $s')" 2664667000
check pipes "$(/bin/busybox32 seq 1 3000 | /bin/busybox32 sort -r | sort -n | /bin/busybox32 tail -1)" 3000
/bin/program32
poweroff -f
"#;
    let files = [("bin/busybox32".to_owned(), busybox), ("bin/program32".to_owned(), program)];
    let initramfs = assets::initramfs_with(script, &files).expect("busybox");
    let ended = boot(&assets::kernel().expect("a kernel"), "programs32", &initramfs, &CONSOLE);
    all_checks_passed(&ended, 3 + PROGRAM_CHECKS);
}

#[test]
fn kexec_starts_another_kernel() {
    let kernel = assets::kernel().expect("a kernel");
    let second = assets::initramfs("echo in the second kernel: $(cat /proc/cmdline); poweroff -f").expect("busybox");
    let files = [
        ("kexec".to_owned(), std::fs::read(assets::kexec().expect("gcc")).unwrap()),
        ("kernel".to_owned(), std::fs::read(&kernel).unwrap()),
        ("second".to_owned(), second),
    ];
    let script = "echo in the first kernel; /kexec /kernel /second 'console=ttyS0 quiet another=one'";
    let initramfs = assets::initramfs_with(script, &files).expect("busybox");
    let ended = boot(&kernel, "kexec", &initramfs, &["--memory", "512M", CONSOLE[0], CONSOLE[1]]);
    assert!(ended.output.contains("in the first kernel"), "{ended:?}");
    assert!(ended.output.contains("in the second kernel: console=ttyS0 quiet another=one"), "{ended:?}");
}

/// Runs memtest86+ through its first three tests: the fourth to the seventh move inversions. It shows which one runs
/// every now and then only.
fn memtest(file: &str) {
    let kernel = assets::memtest(file).expect("memtest86+");
    let options = ["--memory", "32M", "--cmdline", "console=ttyS0,115200"];
    let mut vm = vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts");
    vm.wait_for("[Moving inversions", PATIENCE);
    let screen = vm.output();
    // All that was ever on the screen: the last count is how it stands.
    let count =
        |shown: &str| shown.trim_start().split_once(|c: char| !c.is_ascii_digit()).map(|(count, _)| count.to_owned());
    let counts = screen.split("Errors:").skip(1).filter_map(count).filter(|count| !count.is_empty());
    assert_eq!(counts.last().as_deref(), Some("0"), "{screen}");
    // A row for each failure, below a headline.
    assert!(!screen.contains("Failing Address") && !screen.contains("Unexpected"), "{screen}");
}

#[test]
fn memtest_finds_no_errors() {
    memtest("memtest86+x64.bin");
}

#[test]
fn memtest_finds_no_errors_with_32_bit_code() {
    memtest("memtest86+ia32.bin");
}
