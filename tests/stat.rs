//! `anyvisor stat` and `run --stat`: what intercepts guest code, counted and timed.

use anyvisor_tests::elf::{HALT, debug_exit, print, pvh};
use anyvisor_tests::{assets, vm};
use serde_json::Value;
use std::process::Output;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);
const LINUX_PATIENCE: Duration = Duration::from_secs(150);

/// Prints dots for ever.
const DOTS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xb0, b'.', 0xee, // next: mov al, '.'; out dx, al
    0xb9, 0x40, 0x00, 0x00, 0x00, // mov ecx, 40h
    0xe2, 0xfe, // loop $
    0xeb, 0xf4, // jmp next
];

fn anyvisor(arguments: &[&str]) -> Output {
    vm::command().args(arguments).output().expect("anyvisor starts")
}

/// The numbers of event `name` of a vCPU: samples, and times in nanoseconds in all, at least and at most.
fn event(vcpu: &Value, name: &str) -> Option<[u64; 4]> {
    let events = vcpu["events"].as_array().expect("a list of events");
    let event = events.iter().find(|event| event["event"] == name)?;
    Some(["samples", "time_ns", "min_ns", "max_ns"].map(|key| event[key].as_u64().expect("a number")))
}

#[test]
fn a_running_guest_is_counted_for_a_while() {
    for engine in ["translator", "kvm"] {
        if engine == "kvm" && std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            println!("skipped: /dev/kvm cannot be opened");
            continue;
        }
        let id = format!("stat-{engine}");
        let kernel = assets::scratch(&id, &pvh(DOTS)).unwrap();
        let options = ["--memory", "64M", "--id", &id, "--engine", engine, "--cpu-model", "host", "--serial", "null"];
        let vm = vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts");
        let mut said = anyvisor(&["stat", &id, "--time", "300ms", "--json"]);
        for _ in 0..100 {
            // It may still be starting.
            if said.status.success() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
            said = anyvisor(&["stat", &id, "--time", "300ms", "--json"]);
        }
        assert!(said.status.success(), "{engine}: {said:?}");
        let seen: Value = serde_json::from_slice(&said.stdout).expect("JSON");
        let vcpu = &seen["vcpus"][0];
        let elapsed = vcpu["elapsed_ns"].as_u64().expect("a time");
        assert!(elapsed >= 300_000_000, "{engine}: {seen:#}");
        let [samples, time, min, max] = event(vcpu, "I/O port").unwrap_or_else(|| panic!("{engine}: {seen:#}"));
        assert!(
            samples > 10 && min <= time / samples && time / samples <= max && time <= elapsed,
            "{engine}: {seen:#}"
        );

        let table = anyvisor(&["stat", &id, "--time", "50ms"]);
        let text = String::from_utf8_lossy(&table.stdout);
        for word in ["vCPU 0: ", "samples%", "time%", "I/O port"] {
            assert!(text.contains(word), "{engine}: {word:?} is not in\n{text}");
        }
        // Nothing is counted for nobody.
        let mut stream =
            std::os::unix::net::UnixStream::connect(vm::runtime_folder().join("anyvisor").join(format!("{id}.sock")))
                .unwrap();
        use std::io::{Read, Write};
        stream.write_all(b"GET /anyvisor/stat HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with(r#"{"measuring":false,"vcpus":[]}"#), "{answer}");
        vm.signal(libc::SIGTERM);
        vm.end(PATIENCE);
    }
}

#[test]
fn a_vm_can_be_counted_from_its_first_instruction() {
    let code = [&print("hello\n"), &debug_exit(1)[..], HALT].concat();
    let kernel = assets::scratch("stat-first", &pvh(&code)).unwrap();
    let options = ["--memory", "64M", "--debug-exit", "--engine", "translator", "--stat"];
    let ended = vm::run(&vm::arguments(&kernel, &options), PATIENCE);
    assert_eq!((ended.code(), ended.output.trim()), (3, "hello"), "{ended:?}");
    let line = ended.errors.lines().find(|line| line.contains("I/O port")).unwrap_or_else(|| panic!("{ended:?}"));
    // Six characters and the end.
    assert_eq!(line.split_whitespace().nth(2), Some("7"), "{ended:?}");
}

#[test]
fn a_linux_shows_every_kind() {
    let initramfs = assets::initramfs("sleep 1; poweroff -f").expect("busybox");
    let initramfs = assets::scratch("stat-linux", &initramfs).unwrap().display().to_string();
    let options = ["--initrd", &initramfs, "--engine", "translator", "--stat"];
    let ended = vm::run(&vm::arguments(&assets::kernel().expect("a kernel"), &options), LINUX_PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    let table = &ended.errors[ended.errors.find("vCPU 0: ").unwrap_or_else(|| panic!("{ended:?}"))..];
    for kind in [
        "TLB miss",
        "translation",
        "invalidation",
        "interpretation",
        "I/O port",
        "MMIO",
        "interrupt",
        "exception",
        "halt",
        "WRMSR",
        "RDMSR",
        "CPUID",
        "MOV CR",
    ] {
        assert!(table.lines().any(|line| line.trim_start().starts_with(kind)), "no {kind} in\n{table}");
    }
}
