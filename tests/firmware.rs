//! Firmware that finds its system on a disk: SeaBIOS and OVMF, GRUB, and what GRUB loads.

use anyvisor_tests::{assets, grub, vm};
use std::path::Path;
use std::time::Duration;

/// A busy host interprets 16-bit code for long.
const PATIENCE: Duration = Duration::from_secs(400);

/// Starts SeaBIOS with `disk`.
fn boot(disk: &Path, more: &[&str]) -> vm::Vm {
    boot_with(&grub::seabios().expect("SeaBIOS").display().to_string(), disk, more)
}

/// Starts OVMF, the image called `firmware`, with `disk`.
fn boot_ovmf(firmware: &str, disk: &Path, more: &[&str]) -> vm::Vm {
    boot_with(&grub::ovmf(firmware).expect("OVMF").display().to_string(), disk, more)
}

fn boot_with(firmware: &str, disk: &Path, more: &[&str]) -> vm::Vm {
    let disk = disk.display().to_string();
    vm::Vm::start(&[&["run", "--firmware", firmware, "--disk", &disk], more].concat()).expect("anyvisor starts")
}

/// What Linux needs to have virtio disks, in the order of loading.
const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];

/// GRUB's configuration for [`Linux::files`].
const START_LINUX: &str = "echo GRUB loads Linux\nlinux /boot/vmlinuz console=ttyS0 quiet\ninitrd /boot/initrd\nboot";

/// A kernel, and an initramfs that loads [`MODULES`] and more, and runs a script.
struct Linux {
    kernel: Vec<u8>,
    initramfs: Vec<u8>,
}

impl Linux {
    fn new(more: &[&str], script: &str) -> Linux {
        let names = [&MODULES[..], more].concat();
        let load = format!("for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done", names.join(" "));
        let modules = assets::modules(&names).expect("the kernel's modules");
        let initramfs = assets::initramfs_with(&format!("{load}\n{script}"), &modules).expect("busybox");
        Linux { kernel: std::fs::read(assets::kernel().expect("a kernel")).unwrap(), initramfs }
    }

    fn files(&self) -> [(&str, &[u8]); 2] {
        [("boot/vmlinuz", &self.kernel), ("boot/initrd", &self.initramfs)]
    }
}

/// From the reset vector to a shell: BIOS, boot sector, GRUB, kernel and initramfs from the disk, which Linux finds again.
#[test]
fn seabios_and_grub_boot_linux_from_a_disk() {
    let folder = assets::scratch_folder();
    let disk = folder.path().join("disk");
    let linux = Linux::new(
        &[],
        r#"mkdir /disk; mount -t ext4 -o ro /dev/vda1 /disk && echo "found $(ls /disk/boot)"
grep -E 'System RAM|BOOT_IMAGE' /proc/iomem /proc/cmdline
echo "e820 $(dmesg | grep -c BIOS-e820) acpi $(dmesg | grep -c 'ACPI: DSDT') power $(dmesg | grep -c 'S5')"
dmesg | grep -E 'BUG:|Oops|WARNING:|Call Trace|ACPI.*[Ee]rror'
exec setsid cttyhack sh -i"#,
    );
    grub::bios_image(&disk, 48, START_LINUX, &linux.files()).expect("an image");
    let mut vm = boot(&disk, &["--memory", "256M"]);
    vm.wait_for("SeaBIOS (version", PATIENCE);
    vm.wait_for("GRUB loads Linux", PATIENCE);
    vm.wait_for("found grub", PATIENCE);
    vm.wait_for("acpi 1", PATIENCE);
    vm.type_in("echo $((6 * 7)) is the answer\n").unwrap();
    vm.wait_for("42 is the answer", PATIENCE);
    // By ACPI's S5, whose tables SeaBIOS has placed.
    vm.type_in("poweroff -f\n").unwrap();
    let ended = vm.end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("BOOT_IMAGE=/boot/vmlinuz"), "{ended:?}");
    assert!(ended.output.contains("0ffdffff : System RAM") || ended.output.contains("0fff"), "{ended:?}");
    for complaint in ["BUG:", "Oops", "Call Trace", "rror"] {
        assert!(!ended.output.contains(complaint), "{ended:?}");
    }
}

/// GRUB loads memtest86+ in its 16-bit way.
#[test]
fn grub_starts_memtest86() {
    let folder = assets::scratch_folder();
    let disk = folder.path().join("disk");
    let program = assets::package("memtest86+").expect("memtest86+").join("boot/memtest86+x64.bin");
    let program = std::fs::read(program).unwrap();
    let configuration = "linux16 /boot/memtest console=ttyS0,115200\nboot";
    grub::bios_image(&disk, 8, configuration, &[("boot/memtest", &program)]).expect("an image");
    let mut vm = boot(&disk, &["--memory", "16M"]);
    vm.wait_for("Memtest86+", PATIENCE);
    vm.wait_for("Pass", PATIENCE);
    vm.signal(libc::SIGTERM);
    vm.end(PATIENCE);
}

/// A disk without a boot sector is told by the BIOS, and what it says comes to the console.
#[test]
fn a_disk_without_a_boot_sector_is_told() {
    let folder = assets::scratch_folder();
    let disk = folder.path().join("empty");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut vm = boot(&disk, &["--memory", "16M"]);
    vm.wait_for("not a bootable disk", PATIENCE);
    vm.signal(libc::SIGTERM);
    vm.end(PATIENCE);
}

/// From the reset vector to a shell by UEFI: GRUB is a file on the disk's EFI system partition, and reads kernel and
/// initramfs through the firmware. Then the VM is saved and goes on.
#[test]
fn ovmf_and_grub_boot_linux_from_a_disk() {
    let folder = assets::scratch_folder();
    let (disk, snapshot) = (folder.path().join("disk"), folder.path().join("snapshot").display().to_string());
    let linux = Linux::new(
        &[],
        r#"echo "partition $(cat /sys/block/vda/vda1/size) uefi $(cat /sys/firmware/efi/fw_platform_size)"
dmesg | grep -E 'ACPI: PM: .supports|efi: EFI v'
echo "reserved $(grep -c 'PCI MMCONFIG 0000' /proc/iomem)"
dmesg | grep -E 'BUG:|Oops|WARNING:|Call Trace|ACPI.*[Ee]rror|ACPI Warning'
exec setsid cttyhack sh -i"#,
    );
    grub::efi_image(&disk, 64, START_LINUX, &linux.files()).expect("an image");
    let id = format!("ovmf-{}", std::process::id());
    let mut vm = boot_ovmf("OVMF_CODE.fd", &disk, &["--memory", "256M", "--id", &id]);
    vm.wait_for("GRUB loads Linux", PATIENCE);
    vm.wait_for("partition 129024 uefi 64", PATIENCE);
    vm.wait_for("reserved 1", PATIENCE);
    vm.type_in("echo $((6 * 7)) is the answer\n").unwrap();
    vm.wait_for("42 is the answer", PATIENCE);
    let saved = vm::run(&["snapshot", &id, &snapshot], PATIENCE);
    assert_eq!(saved.code(), 0, "{saved:?}");
    vm.signal(libc::SIGKILL);
    let ended = vm.end(PATIENCE);
    for expected in ["efi: EFI v2", "(supports S0 S5)"] {
        assert!(ended.output.contains(expected), "{ended:?}");
    }
    for complaint in ["BUG:", "Oops", "Call Trace", "Error", "Warning"] {
        assert!(!ended.output.contains(complaint), "{ended:?}");
    }
    let mut vm = vm::Vm::start(&["run", "--restore", &snapshot]).expect("anyvisor starts");
    // By ACPI's S5, whose tables OVMF has placed.
    vm.type_in("echo $((7 * 8)) is another; poweroff -f\n").unwrap();
    vm.wait_for("56 is another", PATIENCE);
    assert_eq!(vm.end(PATIENCE).code(), 0);
}

/// The larger build of OVMF, whose shell sees a disk without a file system.
#[test]
fn the_shell_of_ovmf_sees_a_disk() {
    let folder = assets::scratch_folder();
    let disk = folder.path().join("empty");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut vm = boot_ovmf("OVMF_CODE_4M.fd", &disk, &["--memory", "256M"]);
    vm.wait_for("BLK0:", PATIENCE);
    vm.wait_for("PciRoot(0x0)/Pci(0x2,0x0)", PATIENCE);
    vm.type_in("\x1b").unwrap();
    vm.wait_for("Shell> ", PATIENCE);
    vm.type_in("reset -s\r").unwrap();
    let ended = vm.end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
}

/// Linux sets a variable, and finds it after a reboot.
#[test]
fn uefi_variables_are_kept() {
    let folder = assets::scratch_folder();
    let (disk, variables) = (folder.path().join("disk"), folder.path().join("variables"));
    let linux = Linux::new(
        &["efivarfs"],
        r#"mount -t efivarfs efivarfs /sys/firmware/efi/efivars
f=/sys/firmware/efi/efivars/Answer-5b4d1d0e-93d4-4d5e-8c0b-0f6f0a4a7c11
if [ -e $f ]; then echo "kept $(tail -c 4 $f)"; poweroff -f; fi
printf '\007\000\000\000x=42' >$f && echo "set $(tail -c 4 $f)"
reboot -f"#,
    );
    grub::efi_image(&disk, 64, START_LINUX, &linux.files()).expect("an image");
    std::fs::copy(grub::ovmf("OVMF_VARS_4M.fd").expect("OVMF"), &variables).unwrap();
    let firmware = format!("{},vars={}", grub::ovmf("OVMF_CODE_4M.fd").unwrap().display(), variables.display());
    let ended = boot_with(&firmware, &disk, &["--memory", "256M", "--on-reboot", "restart"]).end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("set x=42") && ended.output.contains("kept x=42"), "{ended:?}");
    let bytes = std::fs::read(variables).unwrap();
    assert!(bytes.windows(4).any(|window| window == b"x=42"), "it is in the file");
}
