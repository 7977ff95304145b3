//! Networks, as Linux uses them: an address, connections out and in, with the rootless network and a tap device.

use anyvisor_tests::{assets, vm};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(180);

/// What Linux needs to have virtio network cards, in the order of loading.
const MODULES: [&str; 8] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
];

/// What udhcpc runs (busybox, networking/udhcp).
const LEASED: &str = r#"#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr add $ip/$mask dev $interface; ip route add default via $router
echo "nameserver $dns" >/etc/resolv.conf; echo "$ip $router $dns $mtu" >/tmp/lease
"#;

/// An initramfs that has network cards when it runs `script`, in which `check NAME IS SHOULD` prints a line.
fn initramfs(name: &str, script: &str) -> PathBuf {
    let mut files = assets::modules(&MODULES).expect("the kernel's modules");
    files.push(("leased".into(), LEASED.into()));
    files.push(("etc/resolv.conf".into(), vec![]));
    let script = format!(
        r#"for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done
check() {{ if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }}
ip link set lo up; ip link set eth0 up
{script}
echo checks done; poweroff -f"#,
        MODULES.join(" ")
    );
    assets::scratch(name, &assets::initramfs_with(&script, &files).expect("busybox")).expect("a file")
}

fn arguments(initramfs: &std::path::Path, more: &[&str]) -> Vec<String> {
    let initramfs = initramfs.display().to_string();
    let kernel = assets::kernel().expect("a kernel");
    vm::arguments(&kernel, &[&["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet"], more].concat())
}

fn all_pass(ended: &vm::Ended, checks: usize) {
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok\r\n").count(), checks, "{ended:?}");
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("md5sum runs");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap().to_owned()
}

/// Connects to a port that may not be forwarded to somebody yet, and reads what is there.
fn fetch(port: u16, request: &[u8]) -> Vec<u8> {
    let began = Instant::now();
    loop {
        let mut answer = Vec::new();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the port is forwarded");
        let done = stream.write_all(request).and_then(|()| stream.read_to_end(&mut answer));
        if done.is_ok() && !answer.is_empty() {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "nobody is there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn linux_uses_the_rootless_network() {
    let data = pattern(6_000_000);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, closed, forwarded) = (server.local_addr().unwrap().port(), free_port(), free_port());
    let script = format!(
        r#"
udhcpc -i eth0 -s /leased -q -n -t 10 >/dev/null 2>&1
check lease "$(cat /tmp/lease)" "10.0.2.15 10.0.2.2 10.0.2.3 1400"
check mac "$(cat /sys/class/net/eth0/address) $(cat /sys/class/net/eth0/mtu)" "52:54:00:aa:bb:cc 1400"
check echo "$(ping -c 2 -W 20 10.0.2.2 | grep -c 'bytes from 10.0.2.2')" 2
check received "$(nc 10.0.2.2 {port} </dev/null | md5sum)" "{sum}  -"
seq 1 500000 >/tmp/numbers
nc 10.0.2.2 {port} </tmp/numbers >/tmp/answer
check sent "$(cat /tmp/answer)" "$(md5sum </tmp/numbers | cut -c 1-32)"
check refused "$(nc 10.0.2.2 {closed} </dev/null 2>&1 | grep -c -i refused)" 1
check interrupts "$(grep -c 'PCI-MSI.*virtio0-\(input\|output\)' /proc/interrupts)" 2
mkdir /www; cp /tmp/numbers /www/; httpd -p 80 -h /www
echo serving; read line
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace|bad gso|unexpected')" 0
"#,
        sum = md5(&data)
    );
    let sends = data.clone();
    let host = std::thread::spawn(move || {
        server.accept().unwrap().0.write_all(&sends).unwrap();
        let mut got = Vec::new();
        let (mut stream, _) = server.accept().unwrap();
        stream.read_to_end(&mut got).unwrap();
        stream.write_all(md5(&got).as_bytes()).unwrap();
    });
    let net = format!("user,fwd=tcp:{forwarded}:80,mac=52:54:00:aa:bb:cc,mtu=1400");
    let mut guest =
        vm::Vm::start(&arguments(&initramfs("network", &script), &["--net", &net])).expect("anyvisor starts");
    guest.wait_for("serving", PATIENCE);
    let answer = fetch(forwarded, b"GET /numbers HTTP/1.0\r\n\r\n");
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("a header") + 4;
    let numbers: Vec<u8> = (1..=500_000).flat_map(|n| format!("{n}\n").into_bytes()).collect();
    assert!(answer[body..] == numbers, "{} bytes", answer.len());
    guest.type_in("\n").unwrap();
    let ended = guest.end(PATIENCE);
    all_pass(&ended, 8);
    host.join().unwrap();
}

/// A connection does not survive, and the guest hears of it; what comes later works, on another port too.
#[test]
fn a_vm_with_a_network_is_saved_and_restored() {
    let folder = assets::scratch_folder();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, first, second) = (server.local_addr().unwrap().port(), free_port(), free_port());
    let script = format!(
        r#"
ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
mkdir /www; echo hello >/www/file; httpd -p 80 -h /www
nc 10.0.2.2 {port} </dev/null >/tmp/answer 2>&1; echo "ended $?" >>/tmp/answer
check answer "$(tr '\n' ' ' </tmp/answer | cut -c 1-8)" "greeting"
check again "$(nc 10.0.2.2 {port} </dev/null)" "once more"
echo serving; read line
"#
    );
    let initramfs = initramfs("network-saved", &script);
    let id = format!("network-{}", std::process::id());
    let snapshot = folder.path().join("snapshot").display().to_string();
    let net = format!("user,fwd=tcp:{first}:80");
    let mut guest = vm::Vm::start(&arguments(&initramfs, &["--net", &net, "--id", &id])).expect("anyvisor starts");
    let (mut stream, _) = server.accept().unwrap();
    stream.write_all(b"greeting\n").unwrap();
    assert!(fetch(first, b"GET /file HTTP/1.0\r\n\r\n").ends_with(b"hello\n"));
    let ended = vm::run(&["snapshot", &id, &snapshot], PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    guest.signal(libc::SIGKILL);
    guest.end(PATIENCE);
    drop(stream);
    // As it was it cannot go on while somebody has the port.
    let holder = TcpListener::bind(("127.0.0.1", first)).unwrap();
    let ended = vm::run(&["run", "--restore", &snapshot], PATIENCE);
    assert_eq!(ended.code(), 2, "{ended:?}");
    assert!(ended.errors.contains(&format!("cannot listen on 127.0.0.1:{first}")), "{ended:?}");
    drop(holder);
    let host = std::thread::spawn(move || server.accept().unwrap().0.write_all(b"once more").unwrap());
    let net = format!("user,fwd=tcp:{second}:80");
    guest = vm::Vm::start(&["run", "--restore", &snapshot, "--net", &net]).expect("anyvisor starts");
    // The guest hears that its connection is broken, though it says nothing.
    guest.wait_for("serving", PATIENCE);
    assert!(fetch(second, b"GET /file HTTP/1.0\r\n\r\n").ends_with(b"hello\n"));
    guest.type_in("\n").unwrap();
    all_pass(&guest.end(PATIENCE), 2);
    host.join().unwrap();
}

/// A network namespace of its own has a tap device; where there can be none the test says so.
#[test]
fn linux_uses_a_tap_device() {
    let setup = "ip link set lo up && ip tuntap add dev tap0 mode tap && ip addr add 192.168.77.1/24 dev tap0 && ip link set tap0 up";
    let possible = Command::new("unshare").args(["-n", "sh", "-c", setup]).output();
    match possible {
        Ok(output) if output.status.success() => {}
        other => {
            let why = other.map(|output| String::from_utf8_lossy(&output.stderr).trim().to_owned());
            println!("left out: no network namespace with a tap device can be made here: {why:?}");
            return;
        }
    }
    let anyvisor = vm::binary().display().to_string();
    let busybox = assets::busybox().expect("busybox").display().to_string();
    let script = r#"
ip addr add 192.168.77.2/24 dev eth0
check echo "$(ping -c 2 -W 20 192.168.77.1 | grep -c 'bytes from')" 2
n=0; while [ $n -lt 100 ] && ! nc 192.168.77.1 4000 </dev/null >/tmp/got; do n=$((n + 1)); sleep 0.1; done
check received "$(md5sum </tmp/got)" "$(seq 1 600000 | md5sum)"
check sent "$(seq 1 400000 | nc 192.168.77.1 4001)" "$(seq 1 400000 | md5sum)"
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace|bad gso')" 0
"#;
    let arguments = arguments(&initramfs("tap", script), &["--net", "tap=tap0"]);
    let quoted: Vec<_> = arguments.iter().map(|argument| format!("'{argument}'")).collect();
    let kernel = assets::kernel().expect("a kernel").display().to_string();
    // Nothing that is left over holds this test's pipes.
    let whole = format!(
        "{setup}; timeout 170 {busybox} nc -l -p 4000 -e seq 1 600000 >/dev/null 2>&1 & \
         timeout 170 {busybox} nc -l -p 4001 -e md5sum >/dev/null 2>&1 & \
         '{anyvisor}' run --kernel '{kernel}' --net tap=lo; '{anyvisor}' run --kernel '{kernel}' --net tap=tap9; \
         '{anyvisor}' {}",
        quoted.join(" ")
    );
    let output = Command::new("timeout").args(["180", "unshare", "-n", "sh", "-c", &whole]).output().expect("sh runs");
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("checks done") && !said.contains("FAILED"), "{said}\n{errors}");
    assert_eq!(said.matches(" ok\r\n").count(), 4, "{said}");
    assert!(
        errors.contains("interface 'lo' is not a tap device") && errors.contains("no interface 'tap9'"),
        "{errors}"
    );
}

#[test]
fn bad_networks_are_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let kernel = assets::kernel().expect("a kernel");
    for (net, part) in [
        (&*format!("user,fwd=tcp:{port}:22"), "another program has that port"),
        ("user,fwd=tcp:192.0.2.1:7777:22", "this host has no such address"),
        ("user,fwd=tcp:22", "bad forward 'tcp:22'"),
        ("tap=nothere", "this host has no interface 'nothere'"),
        ("bridge", "unknown network 'bridge'"),
    ] {
        let ended = vm::run(&vm::arguments(&kernel, &["--net", net]), Duration::from_secs(30));
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.errors.contains(part) && ended.errors.trim().lines().count() == 1, "{net}: {ended:?}");
    }
}
