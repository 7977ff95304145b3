//! Guests of a few instructions: how a VM ends, as its exit code tells.

use anyvisor_tests::elf::{ENTRY, HALT, SPIN, debug_exit, multiboot, print, pvh};
use anyvisor_tests::{assets, vm};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

fn start(name: &str, code: &[u8], more: &[&str]) -> vm::Vm {
    let kernel = assets::scratch(name, &pvh(code)).unwrap();
    let mut options = vec!["--memory", "64M"];
    options.extend_from_slice(more);
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

#[test]
fn debug_exit_gives_its_code() {
    for value in [0, 1, 0x2a, 0x7f] {
        let code = [print("bye\n"), debug_exit(value), HALT.to_vec()].concat();
        let ended = start("exit", &code, &["--debug-exit"]).end(PATIENCE);
        assert_eq!(ended.code(), i32::from(value) << 1 | 1, "{ended:?}");
        assert!(ended.output.contains("bye"), "{ended:?}");
    }
}

#[test]
fn without_the_option_the_port_does_nothing() {
    let code = [debug_exit(3), print("still here\n"), HALT.to_vec()].concat();
    let mut vm = start("no-exit", &code, &[]);
    vm.wait_for("still here", PATIENCE);
    vm.signal(libc::SIGTERM);
    let ended = vm.end(PATIENCE);
    assert_ne!(ended.code(), 7, "{ended:?}");
}

#[test]
fn a_triple_fault_shows_the_registers() {
    // mov eax, 0xdeadbeef; lidt [ENTRY + 0x1000], which is zeros; ud2
    let mut code = vec![0xb8, 0xef, 0xbe, 0xad, 0xde, 0x0f, 0x01, 0x1d];
    code.extend_from_slice(&(ENTRY + 0x1000).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    let ended = start("triple", &code, &[]).end(PATIENCE);
    assert_eq!(ended.code(), 3, "{ended:?}");
    assert!(ended.errors.to_lowercase().contains("deadbeef"), "a register dump\n{ended:?}");
    assert!(ended.errors.contains("0f 0b") || ended.errors.contains("0f0b"), "a code dump\n{ended:?}");
}

#[test]
fn a_keyboard_controller_reset_is_a_reboot() {
    // mov al, 0xfe; out 0x64, al
    let code = [&[0xb0, 0xfe, 0xe6, 0x64], HALT].concat();
    let ended = start("reset", &code, &[]).end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
}

#[test]
fn signals_end_a_guest_that_spins_or_halts() {
    for (name, code) in [("spin", SPIN), ("halt", HALT)] {
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let code = [print("ready\n"), code.to_vec()].concat();
            let mut vm = start(name, &code, &[]);
            vm.wait_for("ready", PATIENCE);
            vm.signal(signal);
            let ended = vm.end(Duration::from_secs(5));
            assert_ne!(ended.status.code(), Some(101), "a panic\n{ended:?}");
        }
    }
}

#[test]
fn serial_output_can_go_to_a_file() {
    let file = assets::scratch("serial.txt", b"").unwrap();
    let code = [print("to the file\n"), debug_exit(0), HALT.to_vec()].concat();
    let option = format!("file:{}", file.display());
    let ended = start("serial", &code, &["--debug-exit", "--serial", &option]).end(PATIENCE);
    assert_eq!(ended.code(), 1, "{ended:?}");
    assert!(std::fs::read_to_string(&file).unwrap().contains("to the file"));
    assert!(!ended.output.contains("to the file"));
}

/// Each version's kernel prints its second module's text's first letter, and exits with the low byte of EAX.
#[test]
fn multiboot_kernels_find_their_modules() {
    let module = assets::scratch("module", b"contents").unwrap();
    let module = format!("{},Zebra", module.display());
    // Version 1: mods_addr at 24, entries of 16 bytes, the text's address at 8 of each.
    // mov esi, [ebx+24]; mov esi, [esi+16+8]
    let one: &[u8] = &[0x8b, 0x73, 24, 0x8b, 0x76, 24];
    // Version 2: tags from 8 on; the second of type 3, text at 16 of it; its size rounded up to 8 leads on.
    // lea esi, [ebx+8]; xor ecx, ecx
    // L: cmp dword [esi], 3; jne N; inc ecx; cmp ecx, 2; je F
    // N: mov edx, [esi+4]; add edx, 7; and edx, -8; add esi, edx; jmp L
    // F: add esi, 16
    let two: &[u8] = &[
        0x8d, 0x73, 8, 0x31, 0xc9, 0x83, 0x3e, 3, 0x75, 6, 0x41, 0x83, 0xf9, 2, 0x74, 13, 0x8b, 0x56, 4, 0x83, 0xc2, 7,
        0x83, 0xe2, 0xf8, 0x01, 0xd6, 0xeb, 0xe8, 0x90, 0x90, 0x83, 0xc6, 16,
    ];
    for (version, find, magic) in [(1, one, 0x02u32), (2, two, 0x89)] {
        // mov edi, eax; FIND; mov al, [esi]; mov dx, 0x3f8; out dx, al; mov eax, edi; mov dx, 0xf4; out dx, al
        let rest = [0x8a, 0x06, 0x66, 0xba, 0xf8, 0x03, 0xee, 0x89, 0xf8, 0x66, 0xba, 0xf4, 0x00, 0xee];
        let code = [&[0x89, 0xc7], find, &rest, HALT].concat();
        let kernel = assets::scratch(&format!("multiboot{version}"), &multiboot(version, &code)).unwrap();
        let options = ["--memory", "64M", "--debug-exit", "--module", "/dev/null,first", "--module", &module];
        let refused = vm::Vm::start(&vm::arguments(&kernel, &options)).unwrap().end(PATIENCE);
        assert_eq!(refused.code(), 2, "a device is no file\n{refused:?}");
        let first = assets::scratch("first", b"").unwrap().display().to_string();
        let options = ["--memory", "64M", "--debug-exit", "--module", &first, "--module", &module];
        let ended = vm::Vm::start(&vm::arguments(&kernel, &options)).unwrap().end(PATIENCE);
        assert_eq!(ended.code() as u32, (magic << 1 | 1) & 0xff, "{ended:?}");
        assert!(ended.output.contains('Z'), "{ended:?}");
    }
}

#[test]
fn the_kvm_engine_runs_a_tiny_guest() {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return println!("skipped: /dev/kvm cannot be opened: {error}");
    }
    let code = [print("on kvm\n"), debug_exit(0x15), HALT.to_vec()].concat();
    let ended = start("kvm", &code, &["--engine", "kvm", "--cpu-model", "host", "--debug-exit"]).end(PATIENCE);
    assert_eq!(ended.code(), 0x15 << 1 | 1, "{ended:?}");
    assert!(ended.output.contains("on kvm"), "{ended:?}");
    assert!(!ended.errors.contains("because"), "an engine that was asked for needs no reason\n{ended:?}");
}

#[test]
fn auto_says_which_engine_and_why() {
    let code = [debug_exit(1), HALT.to_vec()].concat();
    let ended = start("auto", &code, &["--engine", "auto", "--cpu-model", "host", "--debug-exit"]).end(PATIENCE);
    assert_eq!(ended.code(), 3, "{ended:?}");
    let notes: Vec<_> = ended.errors.lines().filter(|line| line.contains(": engine ")).collect();
    assert_eq!(notes.len(), 1, "one line\n{ended:?}");
    assert!(notes[0].contains(", because ") && notes[0].len() < 140, "{ended:?}");
}
