//! The virtio console and ports, as Linux uses them: bytes both ways, ends of file, more than fits; and entropy.

use anyvisor_tests::{assets, vm};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(180);

/// What Linux needs for these devices, in the order of loading.
const MODULES: [&str; 7] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
    "virtio-rng",
];

/// An initramfs that runs `script`, in which `port NAME` is the file of a port and `check NAME IS SHOULD` prints a line.
fn initramfs(name: &str, script: &str) -> PathBuf {
    let found = assets::modules(&MODULES).expect("the kernel's modules");
    let script = format!(
        r#"for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done
check() {{ if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }}
port() {{ until grep -l "^$1\$" /sys/class/virtio-ports/*/name 2>/dev/null | sed 's,/sys/class/virtio-ports/,/dev/,;s,/name,,'; do usleep 10000; done; }}
{script}
echo checks done; poweroff -f"#,
        MODULES.join(" ")
    );
    assets::scratch(name, &assets::initramfs_with(&script, &found).expect("busybox")).expect("a file")
}

fn start(initramfs: &Path, command_line: &str, more: &[&str]) -> vm::Vm {
    let kernel = assets::kernel().expect("a kernel");
    let initramfs = initramfs.display().to_string();
    let options = [&["--initrd", &initramfs, "--cmdline", command_line][..], more].concat();
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

fn all_pass(ended: &vm::Ended, checks: usize) {
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok\r\n").count(), checks, "{ended:?}");
}

/// A client of a port's socket, which the VM makes.
fn connect(path: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn ports_carry_bytes_both_ways() {
    let folder = assets::scratch_folder();
    let [talk, log] = ["talk", "log"].map(|name| folder.path().join(name));
    // A client that is slow to read gets all the same, and the guest waits for it.
    let script = r#"
talk=/dev/$(basename $(port org.test.talk)); log=$(port log)
check names "$(cat /sys/class/virtio-ports/*/name | sort | tr '\n' ' ')" "log org.test.talk "
exec 3<>$talk
read line <&3; check heard "$line" "hello, guest"
seq 1 200000 | tee $log >&3
head -c 3000000 <&3 | md5sum >/tmp/sum
check sum "$(cat /tmp/sum)" "d6f4b105282c30e3820372f2a275d730  -"
exec 3>&-
check random "$(cat /sys/class/misc/hw_random/rng_current) $(head -c 65536 /dev/hwrng | gzip | wc -c | cut -c 1-2)" "virtio_rng.0 65"
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace')" 0
"#;
    // What the host sends: the guest knows its checksum.
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n / 3) as u8).collect();
    let ports = [format!("org.test.talk={}", talk.display()), format!("log=file:{}", log.display())];
    let options = ["--port", &ports[0], "--port", &ports[1], "--rng"];
    let vm = start(&initramfs("ports", script), "console=ttyS0 quiet", &options);
    let mut client = connect(&talk);
    client.write_all(b"hello, guest\n").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let mut reader = client.try_clone().unwrap();
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    let mut heard = vec![0; expected.len()];
    reader.read_exact(&mut heard).unwrap();
    assert!(heard == expected.as_bytes(), "what the guest said is not whole");
    client.write_all(&sent).unwrap();
    let ended = vm.end(PATIENCE);
    all_pass(&ended, 5);
    assert!(std::fs::read(&log).unwrap() == expected.as_bytes(), "the file is not whole");
    assert!(!talk.exists());
}

#[test]
fn the_console_can_be_virtio() {
    let script = r#"
until [ -e /dev/hvc0 ]; do usleep 10000; done
exec </dev/hvc0 >/dev/hvc0 2>&1
echo "not here" >/dev/ttyS0
echo type; read line; check typed "$line" "some words"
seq 1 20000
"#;
    let mut vm = start(&initramfs("hvc", script), "console=hvc0 quiet", &["--console", "virtio"]);
    vm.wait_for("type\r\n", PATIENCE);
    vm.type_in("some words\n").expect("it reads");
    let ended = vm.end(PATIENCE);
    all_pass(&ended, 1);
    let numbers: String = (1..=20_000).map(|n| format!("{n}\r\n")).collect();
    assert!(ended.output.contains(&numbers) && !ended.output.contains("not here"), "{ended:?}");
}
