//! Disks and network cards that come and go while Linux runs.

use anyvisor_tests::{assets, vm};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(180);
const MIB: usize = 1 << 20;

/// What Linux needs to have virtio devices, in the order of loading.
const VIRTIO: [&str; 5] = ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"];

/// And what it needs beside to have network cards.
const NET: [&str; 3] = ["failover", "net_failover", "virtio_net"];

/// What runs Linux with these modules beside [`VIRTIO`], and with `more` arguments. In its script `check NAME IS SHOULD` prints a line
/// and `until_there_are N PATTERN` waits for so many files.
fn linux(id: &str, modules: &[&str], script: &str, more: &[&str]) -> Vec<String> {
    let modules = [&VIRTIO[..], modules].concat();
    let script = format!(
        r#"for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done
check() {{ if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }}
until_there_are() {{ n=0; until [ $(ls -d $2 2>/dev/null | wc -l) = $1 ]; do n=$((n + 1)); [ $n -lt 1000 ] || break; usleep 20000; done; }}
{script}
check complaints "$(dmesg | grep -c -E 'I/O error|BUG:|Oops|WARNING:|Call Trace|ACPI Error|bad gso')" 0
echo checks done; poweroff -f"#,
        modules.join(" ")
    );
    let files = assets::modules(&modules).expect("the kernel's modules");
    let initramfs = assets::scratch(id, &assets::initramfs_with(&script, &files).expect("busybox"));
    let initramfs = initramfs.expect("a file").display().to_string();
    let kernel = assets::kernel().expect("a kernel");
    let always = ["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet", "--id", id];
    vm::arguments(&kernel, &[&always[..], more].concat())
}

/// The guest powers off, and all its checks have passed.
fn all_pass(vm: vm::Vm, checks: usize) {
    let ended = vm.end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok\r\n").count(), checks, "{ended:?}");
}

/// Runs a command about a VM, which must work; what it says.
fn fine(arguments: &[&str]) -> String {
    let ended = vm::run(arguments, PATIENCE);
    assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
    ended.output
}

/// Runs a command about a VM, which must be refused in one line that has `part`.
fn refused(arguments: &[&str], part: &str) {
    let ended = vm::run(arguments, PATIENCE);
    let line = ended.errors.trim();
    assert!(ended.code() != 0 && line.contains(part) && line.lines().count() == 1, "{arguments:?}: {ended:?}");
}

#[test]
fn disks_come_and_go() {
    let folder = assets::scratch_folder();
    let [first, second] = ["first", "second"].map(|name| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("{name}\n{}", "\0".repeat(MIB - name.len() - 1))).unwrap();
        path.display().to_string()
    });
    let script = r#"
wait_for() { until_there_are $1 '/dev/vd?'; }
check before "$(ls /dev/vd?)" /dev/vda
echo ready; wait_for 2
check added "$(head -n 1 /dev/vdb) $(cat /sys/block/vdb/size)" "second 2048"
echo written | dd of=/dev/vdb conv=fsync 2>/dev/null
echo used; wait_for 1
check removed "$(ls /dev/vd?)" /dev/vda
echo gone; wait_for 2
check again "$(head -n 1 /dev/vd[bc])" written
check first "$(head -n 1 /dev/vda)" first
"#;
    let id = format!("hotplug-disks-{}", std::process::id());
    let mut vm = vm::Vm::start(&linux(&id, &["virtio_blk"], script, &["--disk", &first])).expect("anyvisor starts");
    vm.wait_for("ready\r\n", PATIENCE);
    // One that is in use stays out.
    refused(&["device", "add", &id, "--disk", &first], "in use");
    let slot = fine(&["device", "add", &id, "--disk", &second]);
    let slot = slot.trim();
    vm.wait_for("used\r\n", PATIENCE);
    let list = fine(&["device", "list", &id]);
    assert!(
        list.contains(&format!("   2  disk '{first}'\n")) && list.contains(&format!("   {slot}  disk '{second}'\n")),
        "{list}"
    );
    let snapshot = folder.path().join("snapshot").display().to_string();
    refused(&["snapshot", &id, &snapshot], "devices were added");
    fine(&["device", "remove", &id, slot]);
    assert!(!fine(&["device", "list", &id]).contains(&second));
    refused(&["device", "remove", &id, slot], "no device is in slot");
    vm.wait_for("gone\r\n", PATIENCE);
    // The image is free again.
    assert!(std::fs::read(&second).unwrap().starts_with(b"written\n"));
    assert_eq!(fine(&["device", "add", &id, "--disk", &second]).trim(), slot);
    all_pass(vm, 6);
}

/// Asks the guest's web server behind a forwarded port for a file, which may not be there yet.
fn fetch(port: u16, path: &str) -> Vec<u8> {
    let began = Instant::now();
    loop {
        let mut answer = Vec::new();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the port is forwarded");
        let asked = stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes());
        let done = asked.and_then(|()| stream.read_to_end(&mut answer));
        if let (Ok(_), Some(end)) = (done, answer.windows(4).position(|window| window == b"\r\n\r\n")) {
            return answer.split_off(end + 4);
        }
        assert!(began.elapsed() < PATIENCE, "nobody is there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether a process has a thread with this name.
fn has_thread(process: u32, name: &str) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let mut names = threads.flatten().filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
    names.any(|comm| comm.trim() == name)
}

/// What is wrong is said in one line, and changes nothing.
fn mistakes_with_networks(id: &str) {
    let before = fine(&["device", "list", id]);
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("user,fwd=tcp:{}:80", holder.local_addr().unwrap().port());
    refused(&["device", "add", id, "--net", &taken], "another program has that port");
    refused(&["device", "add", id, "--net", "tap=nothere"], "this host has no interface 'nothere'");
    refused(&["device", "add", id, "--net", "user,mac=52:54:00:12:34:56"], "another card of the VM has that mac");
    refused(&["device", "add", id, "--net", "bridge"], "unknown network 'bridge'");
    refused(&["device", "add", id], "--net");
    let nobody = format!("{id}-else");
    refused(&["device", "add", &nobody, "--net", "user"], &format!("no VM '{nobody}' is running"));
    refused(&["device", "remove", id, "3"], "no device is in slot 3");
    assert_eq!(fine(&["device", "list", id]), before);
}

#[test]
fn network_cards_come_and_go() {
    let script = r#"
wait_for() { until_there_are $1 '/sys/class/net/eth*'; }
cards() { cat /sys/class/net/eth*/address | cut -c 13- | tr '\n' ' '; }
up() { ip link set eth1 up; ip addr add 10.0.2.15/24 dev eth1; ip route add default via 10.0.2.2; }
mkdir /www; seq 1 200000 >/www/numbers; echo hello >/www/hello; ip link set lo up; httpd -p 80 -h /www
echo ready; wait_for 2
check added "$(cards)" "34:56 34:57 "
up; echo up; wait_for 1
check removed "$(cards)" "34:56 "
echo gone; wait_for 2
check again "$(cards)" "34:56 34:57 "
up; echo up again; wait_for 8
check all "$(cat /sys/class/net/eth*/address | sort -u | wc -l)" 8
check echo "$(ping -c 2 -W 20 10.0.2.2 | grep -c 'bytes from 10.0.2.2')" 2
echo full; read line
"#;
    let id = format!("hotplug-nets-{}", std::process::id());
    let mut vm = vm::Vm::start(&linux(&id, &NET, script, &["--net", "user"])).expect("anyvisor starts");
    vm.wait_for("ready\r\n", PATIENCE);
    mistakes_with_networks(&id);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let net = format!("user,fwd=tcp:{port}:80");
    assert_eq!(fine(&["device", "add", &id, "--net", &net]), "3\n");
    assert_eq!(
        fine(&["device", "list", &id]),
        format!("SLOT  DEVICE\n   2  net 'user'\n   3  net 'user,fwd=tcp:127.0.0.1:{port}:80,mac=52:54:00:12:34:57'\n")
    );
    vm.wait_for("up\r\n", PATIENCE);
    let numbers: Vec<u8> = (1..=200_000).flat_map(|n| format!("{n}\n").into_bytes()).collect();
    let got = fetch(port, "/numbers");
    assert!(got == numbers, "{} bytes", got.len());
    refused(&["device", "add", &id, "--net", &net], "another program has that port");
    assert!(has_thread(vm.process(), "net1"));
    fine(&["device", "remove", &id, "3"]);
    // Nothing of it is left: not its port, nor its thread, which has nothing more to do.
    TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
    let began = Instant::now();
    while has_thread(vm.process(), "net1") {
        assert!(began.elapsed() < PATIENCE, "its thread is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!fine(&["device", "list", &id]).contains("fwd="));
    vm.wait_for("gone\r\n", PATIENCE);
    let folder = assets::scratch_folder();
    let snapshot = folder.path().join("snapshot").display().to_string();
    refused(&["snapshot", &id, &snapshot], "devices were added");
    assert_eq!(fine(&["device", "add", &id, "--net", &net]), "3\n");
    vm.wait_for("up again\r\n", PATIENCE);
    assert_eq!(fetch(port, "/hello"), b"hello\n");
    for slot in 4..10 {
        assert_eq!(fine(&["device", "add", &id, "--net", "user"]), format!("{slot}\n"));
    }
    refused(&["device", "add", &id, "--net", "user"], "the machine has 8 network cards already");
    vm.wait_for("full\r\n", PATIENCE);
    vm.type_in("\n").unwrap();
    all_pass(vm, 6);
}

/// In a network namespace of its own; where there can be none the test says so.
#[test]
fn a_tap_device_comes_and_goes() {
    let setup = "ip link set lo up && ip tuntap add dev tap0 mode tap && ip addr add 192.168.77.1/24 dev tap0 && ip link set tap0 up";
    match Command::new("unshare").args(["-n", "sh", "-c", setup]).output() {
        Ok(output) if output.status.success() => {}
        other => {
            let why = other.map(|output| String::from_utf8_lossy(&output.stderr).trim().to_owned());
            println!("left out: no network namespace with a tap device can be made here: {why:?}");
            return;
        }
    }
    let script = r#"
wait_for() { until_there_are $1 '/sys/class/net/eth*'; }
echoes() { ip link set eth0 up; ip addr add 192.168.77.2/24 dev eth0; ping -c 2 -W 20 192.168.77.1 | grep -c 'bytes from'; }
echo ready; wait_for 1
check first "$(echoes)" 2
echo used; wait_for 0
echo gone; wait_for 1
check second "$(echoes)" 2
"#;
    let id = format!("hotplug-tap-{}", std::process::id());
    let inside = format!("{setup} && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.env("XDG_RUNTIME_DIR", vm::runtime_folder()).args(["-n", "sh", "-c", &inside, "sh"]);
    command.arg(vm::binary()).args(linux(&id, &NET, script, &[]));
    let mut vm = vm::Vm::start_by(&mut command).expect("anyvisor starts");
    vm.wait_for("ready\r\n", PATIENCE);
    refused(&["device", "add", &id, "--net", "tap=lo"], "interface 'lo' is not a tap device");
    assert_eq!(fine(&["device", "add", &id, "--net", "tap=tap0"]), "2\n");
    vm.wait_for("used\r\n", PATIENCE);
    refused(&["device", "add", &id, "--net", "tap=tap0"], "another program has it");
    fine(&["device", "remove", &id, "2"]);
    vm.wait_for("gone\r\n", PATIENCE);
    assert_eq!(fine(&["device", "add", &id, "--net", "tap=tap0"]), "2\n");
    all_pass(vm, 3);
}
