//! Disks, as Linux uses them: read, written, discarded, read-only, by messages and by pin; and what is refused.

use anyvisor_tests::{assets, vm};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);
const MIB: usize = 1 << 20;

/// What Linux needs to have virtio disks, in the order of loading.
const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];

/// An initramfs that has disks when it runs `script`, in which `check NAME IS SHOULD` prints a line.
fn initramfs(name: &str, script: &str) -> PathBuf {
    let found = assets::modules(&MODULES).expect("the kernel's modules");
    let script = format!(
        r#"for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done
check() {{ if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }}
{script}
echo checks done; poweroff -f"#,
        MODULES.join(" ")
    );
    assets::scratch(name, &assets::initramfs_with(&script, &found).expect("busybox")).expect("a file")
}

/// An image of `size` bytes whose sectors hold their number, over and over.
fn image(folder: &Path, name: &str, size: usize) -> PathBuf {
    let bytes: Vec<u8> = (0..size / 512).flat_map(|sector| (sector as u32).to_le_bytes().repeat(128)).collect();
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn start(initramfs: &Path, command_line: &str, disks: &[String]) -> vm::Vm {
    let kernel = assets::kernel().expect("a kernel");
    let initramfs = initramfs.display().to_string();
    let mut options = vec!["--initrd", &initramfs, "--cmdline", command_line];
    disks.iter().for_each(|disk| options.extend(["--disk", disk]));
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

fn all_pass(ended: &vm::Ended, checks: usize) {
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok\r\n").count(), checks, "{ended:?}");
}

#[test]
fn linux_uses_disks() {
    let folder = assets::scratch_folder();
    let (first, second) = (image(folder.path(), "first", 64 * MIB), image(folder.path(), "second", 4 * MIB));
    // What the second has, by the host.
    let sum = std::process::Command::new("md5sum").arg(&second).output().expect("md5sum runs");
    let sum = String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap().to_owned();
    let script = format!(
        r#"
check size "$(cat /sys/block/vda/size) $(cat /sys/block/vdb/size)" "131072 8192"
check name "$(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)" "anyvisor-disk0 anyvisor-disk1"
check read "$(md5sum </dev/vdb)" "{sum}  -"
check ro "$(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro)" "0 1"
check refused "$(dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync 2>&1 | grep -c -i 'not permitted\|read-only\|error')" 1
check messages "$(grep -c 'PCI-MSI.*virtio[01]-req' /proc/interrupts)" 2
seq 1 300000 >/tmp/numbers
dd if=/tmp/numbers of=/dev/vda bs=64k seek=16 conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
check written "$(dd if=/dev/vda bs=64k skip=16 2>/dev/null | head -c $(stat -c %s /tmp/numbers) | md5sum)" "$(md5sum </tmp/numbers)"
mke2fs -F /dev/vda >/dev/null 2>&1
mkdir /disk; mount -t ext4 /dev/vda /disk
i=0; while [ $i -lt 20 ]; do cp /tmp/numbers /disk/$i; i=$((i + 1)); done
sync; umount /disk; echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /disk
check files "$(cat /disk/[0-9]* | md5sum)" "$(i=0; while [ $i -lt 20 ]; do cat /tmp/numbers; i=$((i + 1)); done | md5sum)"
rm /disk/[0-9]*; check trim "$(fstrim /disk && echo done)" done
umount /disk
check discarded "$(blkdiscard -o 1048576 -l 1048576 /dev/vda && dd if=/dev/vda bs=1M skip=1 count=1 2>/dev/null | tr -d '\0' | wc -c)" 0
check complaints "$(dmesg | grep -c -E 'I/O error|BUG:|Oops|WARNING:|Call Trace')" 0
"#
    );
    let disks = [first.display().to_string(), format!("{},ro,format=raw", second.display())];
    let ended = start(&initramfs("disks", &script), "console=ttyS0 quiet", &disks).end(PATIENCE);
    all_pass(&ended, 11);
    assert_eq!(std::fs::metadata(&first).unwrap().len(), 64 * MIB as u64);
    // The host sees what the guest wrote: an ext2 superblock, and zeros.
    let bytes = std::fs::read(&first).unwrap();
    assert_eq!(bytes[1024 + 56..1024 + 58], [0x53, 0xef]);
    assert!(bytes[MIB..2 * MIB].iter().all(|byte| *byte == 0));
}

#[test]
fn interrupts_by_pin_do_too() {
    let folder = assets::scratch_folder();
    // Slots 2, 3, 4, 5, 6: the first and the last share a pin.
    let disks: Vec<_> = (0..5).map(|n| image(folder.path(), &n.to_string(), MIB).display().to_string()).collect();
    let script = r#"
check pins "$(grep -c 'IO-APIC.*virtio' /proc/interrupts)" 4
for d in a b c d e; do cat /dev/vd$d & done | wc -c >/tmp/bytes
check bytes "$(cat /tmp/bytes)" 5242880
check complaints "$(dmesg | grep -c -E 'nobody cared|I/O error|BUG:|Oops|WARNING:|Call Trace')" 0
"#;
    let ended = start(&initramfs("pins", script), "console=ttyS0 quiet pci=nomsi", &disks).end(PATIENCE);
    all_pass(&ended, 3);
}

/// qcow2 with an image behind it, past the page cache, with limits, by several queues: what is there is read, and what is written is
/// there after.
#[test]
fn disks_of_every_kind_hold_a_file_system() {
    let folder = assets::scratch_folder();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let base = image(folder.path(), "base", 16 * MIB);
    let sum = std::process::Command::new("md5sum").arg(&base).output().expect("md5sum runs");
    let sum = String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap().to_owned();
    let qemu_img = |arguments: &[&str]| {
        let output = std::process::Command::new("qemu-img").args(arguments).output().expect("qemu-img runs");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", &at("top")]);
    image(folder.path(), "direct", 16 * MIB);
    image(folder.path(), "limited", 4 * MIB);
    let script = format!(
        r#"
check queues "$(ls /sys/block/vda/mq | wc -l) $(ls /sys/block/vdb/mq | wc -l)" "2 2"
check behind "$(md5sum </dev/vda)" "{sum}  -"
seq 1 200000 >/tmp/numbers
for d in a b; do
    mke2fs -F /dev/vd$d >/dev/null 2>&1; mkdir -p /$d; mount -t ext4 /dev/vd$d /$d
    for i in 1 2 3 4; do cp /tmp/numbers /$d/$i & done; wait
    sync; rm /$d/1; fstrim /$d; umount /$d; echo 3 >/proc/sys/vm/drop_caches; mount -t ext4 /dev/vd$d /$d
    check files$d "$(cat /$d/[0-9]* | md5sum)" "$(cat /tmp/numbers /tmp/numbers /tmp/numbers | md5sum)"
    umount /$d
done
start=$(cut -d. -f1 /proc/uptime); dd if=/dev/vdc of=/dev/null bs=64k 2>/dev/null; end=$(cut -d. -f1 /proc/uptime)
check limit "$([ $((end - start)) -ge 2 ] && echo slow)" slow
check complaints "$(dmesg | grep -c -E 'I/O error|BUG:|Oops|WARNING:|Call Trace')" 0
"#
    );
    let disks =
        [format!("{},format=qcow2", at("top")), format!("{},direct", at("direct")), format!("{},bw=1M", at("limited"))];
    let kernel = assets::kernel().expect("a kernel");
    let initramfs = initramfs("kinds", &script).display().to_string();
    let mut more = vec!["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet", "--cpus", "2"];
    disks.iter().for_each(|disk| more.extend(["--disk", disk]));
    let ended = vm::Vm::start(&vm::arguments(&kernel, &more)).expect("anyvisor starts").end(PATIENCE);
    all_pass(&ended, 6);
    qemu_img(&["check", "-q", &at("top")]);
    let now = std::fs::read(&base).unwrap();
    assert!(now == std::fs::read(image(folder.path(), "again", 16 * MIB)).unwrap(), "what is behind stays as it was");
}

#[test]
fn a_disk_is_found_again_after_a_reboot() {
    let folder = assets::scratch_folder();
    let disk = image(folder.path(), "disk", MIB).display().to_string();
    let script = r#"
if [ -e /dev/vda ] && [ "$(head -c 5 /dev/vda)" != again ]; then echo again | dd of=/dev/vda conv=fsync 2>/dev/null; reboot -f; fi
check again "$(head -c 5 /dev/vda)" again
"#;
    let initramfs = initramfs("again", script);
    let kernel = assets::kernel().expect("a kernel");
    let initramfs = initramfs.display().to_string();
    let more = ["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet", "--disk", &disk, "--on-reboot", "restart"];
    let ended = vm::Vm::start(&vm::arguments(&kernel, &more)).expect("anyvisor starts").end(PATIENCE);
    all_pass(&ended, 1);
}

/// Runs a command about a VM, which must work.
fn fine(arguments: &[&str]) {
    let ended = vm::run(arguments, PATIENCE);
    assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
}

/// Copies an image with its times, as `cp -p` does.
fn copy(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").arg("-p").args([from, to]).status().expect("cp runs");
    assert!(status.success());
}

/// A guest under load from its disk is saved twice, and goes on from the second with the image as it was then.
#[test]
fn a_vm_with_a_disk_is_saved_and_restored() {
    let folder = assets::scratch_folder();
    let disk = image(folder.path(), "disk", 16 * MIB);
    let (kept, [first, second]) =
        (folder.path().join("kept"), ["first", "second"].map(|name| folder.path().join(name)));
    // The upper half is read again and again; counting is in the lower half, written through.
    let script = r#"
sum=$(dd if=/dev/vda bs=1M skip=8 2>/dev/null | md5sum); n=0; wrong=0
while [ $n -lt 40 ]; do
    n=$((n + 1)); echo "count $n" | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(dd if=/dev/vda bs=1M skip=8 2>/dev/null | md5sum)" = "$sum" ] || wrong=$((wrong + 1))
    [ "$(head -n 1 /dev/vda)" = "count $n" ] || wrong=$((wrong + 1))
    echo "step $n"
done
check wrong $wrong 0
check complaints "$(dmesg | grep -c -E 'I/O error|BUG:|Oops|WARNING:|Call Trace')" 0
"#;
    let initramfs = initramfs("saved", script);
    let (kernel, id) = (assets::kernel().expect("a kernel"), format!("disks-{}", std::process::id()));
    let (initramfs, shown) = (initramfs.display().to_string(), disk.display().to_string());
    let more = ["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet", "--disk", &shown, "--id", &id];
    let mut vm = vm::Vm::start(&vm::arguments(&kernel, &more)).expect("anyvisor starts");
    let [first, second] = [&first, &second].map(|path| path.display().to_string());
    vm.wait_for("step 5\r\n", PATIENCE);
    fine(&["snapshot", &id, &first]);
    vm.wait_for("step 12\r\n", PATIENCE);
    fine(&["pause", &id]);
    fine(&["snapshot", &id, &second, "--parent", &first]);
    copy(&disk, &kept);
    fine(&["resume", &id]);
    vm.wait_for("step 20\r\n", PATIENCE);
    vm.signal(libc::SIGKILL);
    vm.end(PATIENCE);
    // What was flushed is there, and the image has gone on without the snapshot.
    let mut head = [0; 9];
    std::io::Read::read_exact(&mut std::fs::File::open(&disk).unwrap(), &mut head).unwrap();
    let count: u32 = String::from_utf8_lossy(&head[6..8]).trim().parse().expect("a count");
    assert!(head.starts_with(b"count ") && count >= 20, "{head:?}");
    let ended = vm::run(&["run", "--restore", &second], PATIENCE);
    assert_eq!(ended.code(), 2, "{ended:?}");
    assert!(ended.errors.contains("has changed since"), "{ended:?}");
    copy(&kept, &disk);
    let ended = vm::run(&["run", "--restore", &second], PATIENCE);
    all_pass(&ended, 2);
    assert!(ended.output.contains("step 13\r\n") && ended.output.contains("step 40\r\n"), "{ended:?}");
}

#[test]
fn bad_disks_are_refused() {
    let folder = assets::scratch_folder();
    let kernel = assets::kernel().expect("a kernel");
    let used = image(folder.path(), "used", MIB);
    let holder = std::fs::File::open(&used).unwrap();
    holder.lock().unwrap();
    let qcow = folder.path().join("qcow");
    std::fs::write(&qcow, [b"QFI\xfb".as_slice(), &[0; 508]].concat()).unwrap();
    let (used, qcow) = (used.display().to_string(), qcow.display().to_string());
    for (disk, part) in [
        ("/nonexistent", "cannot open disk '/nonexistent'"),
        (&*used, "in use by another program"),
        (&*qcow, "looks like a qcow2 image"),
        (&format!("{qcow},format=qcow2"), "cannot be used as qcow2"),
        ("x,format=vmdk", "'vmdk' is not supported"),
        ("x,iops=0", "bad limit 'iops=0'"),
        ("x,rw", "unknown option 'rw'"),
        (&format!("{},ro", folder.path().display()), "neither a file nor a block device"),
    ] {
        let ended = vm::run(&vm::arguments(&kernel, &["--disk", disk]), Duration::from_secs(30));
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.errors.contains(part) && ended.errors.trim().lines().count() == 1, "{disk}: {ended:?}");
    }
}
