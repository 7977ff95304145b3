//! A user's mistakes: exit code 2, and one line that says what, which, and what to do.

use anyvisor_tests::elf::{HALT, pvh};
use anyvisor_tests::{assets, vm};
use std::path::Path;
use std::time::Duration;

/// Runs with `arguments` and checks that they are refused in one line that has all of `words`.
fn refused(arguments: &[String], words: &[&str]) {
    let ended = vm::run(arguments, Duration::from_secs(20));
    assert_eq!(ended.code(), 2, "{arguments:?}\n{ended:?}");
    assert_eq!(ended.errors.trim_end().lines().count(), 1, "one line\n{ended:?}");
    for word in words {
        assert!(ended.errors.contains(word), "{word:?} is not in the message\n{ended:?}");
    }
    assert!(!ended.errors.contains("panicked"), "{ended:?}");
}

fn good_kernel() -> std::path::PathBuf {
    assets::scratch("good.elf", &pvh(HALT)).unwrap()
}

#[test]
fn kernels_that_are_none() {
    refused(&vm::arguments(Path::new("/no/such/kernel"), &[]), &["/no/such/kernel"]);
    refused(&vm::arguments(Path::new("/"), &[]), &["/"]);
    let empty = assets::scratch("empty", &[]).unwrap();
    refused(&vm::arguments(&empty, &[]), &["empty"]);
    let text = assets::scratch("text", b"This is not a kernel.\n").unwrap();
    refused(&vm::arguments(&text, &[]), &["text", "kernel"]);
    let mut cut = pvh(HALT);
    cut.truncate(100);
    let cut = assets::scratch("cut", &cut).unwrap();
    refused(&vm::arguments(&cut, &[]), &["cut"]);
}

#[test]
fn initrds_that_do_not_work() {
    let kernel = good_kernel();
    refused(&vm::arguments(&kernel, &["--initrd", "/no/such/initrd"]), &["/no/such/initrd"]);
    let large = assets::scratch("large", &vec![0; 80 << 20]).unwrap();
    let name = large.display().to_string();
    refused(&vm::arguments(&kernel, &["--initrd", &name, "--memory", "64M"]), &["large"]);
    std::fs::remove_file(large).unwrap();
}

#[test]
fn options_that_make_no_sense() {
    let kernel = good_kernel();
    for (options, words) in [
        (vec!["--memory", "lots"], vec!["lots"]),
        (vec!["--memory", "0"], vec!["memory"]),
        (vec!["--memory", "9999999T"], vec!["memory"]),
        (vec!["--cpus", "0"], vec!["cpu"]),
        (vec!["--cpu-model", "pentium"], vec!["pentium"]),
        (vec!["--engine", "steam"], vec!["steam"]),
        (vec!["--serial", "telepathy"], vec!["telepathy"]),
        (vec!["--serial", "file:/no/such/folder/x"], vec!["/no/such/folder/x"]),
        (vec!["--on-reboot", "dance"], vec!["dance"]),
        (vec!["--colour", "red"], vec!["--colour"]),
    ] {
        refused(&vm::arguments(&kernel, &options), &words);
    }
    refused(&["run".to_owned()], &["--kernel"]);
    refused(&["fly".to_owned()], &["fly"]);
    refused(&[], &["anyvisor"]);
}

#[test]
fn too_little_memory_for_a_kernel() {
    let kernel = assets::kernel().expect("a kernel");
    refused(&vm::arguments(&kernel, &["--memory", "4M"]), &["memory"]);
}

#[test]
fn doctor_says_what_auto_takes() {
    let ended = vm::run(&["doctor"], Duration::from_secs(20));
    assert_eq!(ended.code(), 0, "{ended:?}");
    for word in ["translator", "kvm", "auto", "\n  transparent huge pages: ", "(shmem_enabled): "] {
        assert!(ended.output.contains(word), "{ended:?}");
    }
}
