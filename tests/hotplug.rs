//! Disks that come and go while Linux runs.

use anyvisor_tests::{assets, vm};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);
const MIB: usize = 1 << 20;

/// What Linux needs to have virtio disks, in the order of loading.
const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];

/// Runs a command about a VM, which must work; what it says.
fn fine(arguments: &[&str]) -> String {
    let ended = vm::run(arguments, PATIENCE);
    assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
    ended.output
}

#[test]
fn disks_come_and_go() {
    let folder = assets::scratch_folder();
    let [first, second] = ["first", "second"].map(|name| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("{name}\n{}", "\0".repeat(MIB - name.len() - 1))).unwrap();
        path.display().to_string()
    });
    let script = format!(
        r#"for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done
check() {{ if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }}
wait_for() {{ n=0; until [ $(ls /dev/vd? 2>/dev/null | wc -l) = $1 ]; do n=$((n + 1)); [ $n -lt 1000 ] || break; usleep 20000; done; }}
check before "$(ls /dev/vd?)" /dev/vda
echo ready; wait_for 2
check added "$(head -n 1 /dev/vdb) $(cat /sys/block/vdb/size)" "second 2048"
echo written | dd of=/dev/vdb conv=fsync 2>/dev/null
echo used; wait_for 1
check removed "$(ls /dev/vd?)" /dev/vda
echo gone; wait_for 2
check again "$(head -n 1 /dev/vd[bc])" written
check first "$(head -n 1 /dev/vda)" first
check complaints "$(dmesg | grep -c -E 'I/O error|BUG:|Oops|WARNING:|Call Trace|ACPI Error')" 0
echo checks done; poweroff -f"#,
        MODULES.join(" ")
    );
    let modules = assets::modules(&MODULES).expect("the kernel's modules");
    let initramfs = assets::scratch("hotplug", &assets::initramfs_with(&script, &modules).expect("busybox"));
    let initramfs = initramfs.expect("a file").display().to_string();
    let (kernel, id) = (assets::kernel().expect("a kernel"), format!("hotplug-{}", std::process::id()));
    let more = ["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet", "--disk", &first, "--id", &id];
    let mut vm = vm::Vm::start(&vm::arguments(&kernel, &more)).expect("anyvisor starts");
    vm.wait_for("ready\r\n", PATIENCE);
    // One that is in use stays out.
    let ended = vm::run(&["device", "add", &id, "--disk", &first], PATIENCE);
    assert!(ended.code() != 0 && ended.errors.contains("in use"), "{ended:?}");
    let slot = fine(&["device", "add", &id, "--disk", &second]);
    let slot = slot.trim();
    vm.wait_for("used\r\n", PATIENCE);
    let list = fine(&["device", "list", &id]);
    assert!(
        list.contains(&format!("   2  disk '{first}'\n")) && list.contains(&format!("   {slot}  disk '{second}'\n")),
        "{list}"
    );
    let snapshot = folder.path().join("snapshot").display().to_string();
    let ended = vm::run(&["snapshot", &id, &snapshot], PATIENCE);
    assert!(ended.code() != 0 && ended.errors.contains("devices were added"), "{ended:?}");
    fine(&["device", "remove", &id, slot]);
    assert!(!fine(&["device", "list", &id]).contains(&second));
    let ended = vm::run(&["device", "remove", &id, slot], PATIENCE);
    assert!(ended.code() != 0 && ended.errors.contains("no device is in slot"), "{ended:?}");
    vm.wait_for("gone\r\n", PATIENCE);
    // The image is free again.
    assert!(std::fs::read(&second).unwrap().starts_with(b"written\n"));
    assert_eq!(fine(&["device", "add", &id, "--disk", &second]).trim(), slot);
    let ended = vm.end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok\r\n").count(), 6, "{ended:?}");
}
