//! Sockets between guest and host, as Linux uses them: in both directions, half closed, refused, and over a snapshot.

use anyvisor_tests::{assets, vm};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);

/// What Linux needs, in the order of loading.
const MODULES: [&str; 8] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];

/// An initramfs that runs `script` with the program `vsock` (tests/guests/vsock.c).
fn initramfs(name: &str, script: &str) -> PathBuf {
    let mut files = assets::modules(&MODULES).expect("the kernel's modules");
    let program = std::fs::read(assets::vsock().expect("a compiler")).unwrap();
    files.push(("bin/vsock".into(), program));
    let script = format!(
        r#"for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done
check() {{ if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }}
{script}
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace')" 0
echo checks done; poweroff -f"#,
        MODULES.join(" ")
    );
    assets::scratch(name, &assets::initramfs_with(&script, &files).expect("busybox")).expect("a file")
}

fn start(initramfs: &Path, more: &[&str]) -> vm::Vm {
    let kernel = assets::kernel().expect("a kernel");
    let initramfs = initramfs.display().to_string();
    let options = [&["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet"][..], more].concat();
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

fn all_pass(ended: &vm::Ended, checks: usize) {
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok\r\n").count(), checks, "{ended:?}");
}

/// Connects to a port of the guest; the answer of whoever is behind `path`.
fn call(path: &Path, port: u32) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut line = vec![];
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        if stream.read(&mut byte).unwrap() == 0 {
            break;
        }
        line.push(byte[0]);
    }
    (stream, String::from_utf8(line).unwrap())
}

#[test]
fn guest_and_host_reach_each_other() {
    let folder = assets::scratch_folder();
    let (path, listening) = (folder.path().join("v"), folder.path().join("v_53"));
    let listener = UnixListener::bind(&listening).unwrap();
    let script = r#"
vsock echo 5000; check echoed $? 0
check refused "$(echo x | vsock call 99)" "connect: Connection reset by peer"
seq 1 100000 >/tmp/numbers
check called "$(vsock call 53 </tmp/numbers | md5sum)" "$(rev </tmp/numbers | md5sum)"
"#;
    let address = format!("3:{}", path.display());
    let mut vm = start(&initramfs("vsock", script), &["--vsock", &address]);
    vm.wait_for("listening\r\n", PATIENCE);
    assert_eq!(call(&path, 4999).1, "", "nobody listens there");
    // More than any buffer on the way holds, each way at once.
    let (mut stream, answer) = call(&path, 5000);
    assert!(answer.starts_with("OK "), "{answer}");
    let sent: Vec<u8> = (0..4 << 20u32).map(|n| (n / 5) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let heard = std::thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut heard = vec![];
        stream.read_to_end(&mut heard).unwrap();
        heard
    });
    assert!(heard == sent, "{} bytes came back", heard.len());
    // The guest calls: what it says is answered line by line, turned round, once it has ended.
    let (mut stream, _) = listener.accept().unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let turned: String = text.lines().map(|line| line.chars().rev().collect::<String>() + "\n").collect();
    stream.write_all(turned.as_bytes()).unwrap();
    drop(stream);
    all_pass(&vm.end(PATIENCE), 4);
    assert!(!path.exists());
}

#[test]
fn a_restored_guest_connects_again() {
    let folder = assets::scratch_folder();
    let (path, saved) = (folder.path().join("v"), folder.path().join("saved"));
    let listener = UnixListener::bind(folder.path().join("v_53")).unwrap();
    let script = r#"
check reset "$(vsock hold 53 | tee /dev/console | tail -n 1)" "read: Connection reset by peer"
check again "$(echo hello | vsock call 53)" "hello yourself"
"#;
    let (address, id) = (format!("3:{}", path.display()), format!("vsock-{}", std::process::id()));
    let mut vm = start(&initramfs("vsock-saved", script), &["--vsock", &address, "--id", &id]);
    let held = listener.accept().unwrap();
    vm.wait_for("holding", PATIENCE);
    let saved = saved.display().to_string();
    let ended = vm::run(&["snapshot", &id, &saved], PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    vm.signal(libc::SIGKILL);
    vm.end(PATIENCE);
    drop(held);
    let answer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(b"hello yourself\n").unwrap();
        text
    });
    let ended = vm::run(&["run", "--restore", &saved], PATIENCE);
    all_pass(&ended, 3);
    assert_eq!(answer.join().unwrap(), "hello\n");
}
