//! Shared folders, as Linux uses them: read, written, listed, read-only; and what is refused.

use anyvisor_tests::{assets, vm};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(180);

/// What Linux needs to have virtio-fs, in the order of loading.
const MODULES: [&str; 7] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "fuse", "virtiofs"];

/// An initramfs that can mount shares when it runs `script`, in which `check NAME IS SHOULD` prints a line.
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

#[test]
fn linux_uses_shared_folders() {
    let folder = assets::scratch_folder();
    let (ours, kept) = (folder.path().join("ours"), folder.path().join("kept"));
    for place in [&ours, &kept] {
        std::fs::create_dir(place).unwrap();
    }
    std::fs::write(kept.join("large"), (0..1_000_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>()).unwrap();
    std::os::unix::fs::symlink("../ours", kept.join("up")).unwrap();
    std::fs::write(folder.path().join("secret"), "outside").unwrap();
    (0..300).for_each(|n| std::fs::write(kept.join(format!("file {n}")), n.to_string()).unwrap());
    let sum = std::process::Command::new("md5sum").arg(kept.join("large")).output().expect("md5sum runs");
    let sum = String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap().to_owned();
    let script = format!(
        r#"
mkdir /a /b; mount -t virtiofs ours /a; mount -t virtiofs other /b
check read "$(md5sum </b/large)" "{sum}  -"
check list "$(ls /b | wc -l) $(ls /b/.. | grep -c secret)" "302 0"
check up "$(cat /b/up/x 2>&1 | grep -c 'No such file')" 1
echo new 2>/dev/null >/b/new; rm /b/large 2>/dev/null; chmod 0 /b/large 2>/dev/null
check ro "$(ls /b | wc -l) $(stat -c %a /b/large)" "302 644"
cp /b/large /a/copy; mkdir /a/d; mv /a/copy /a/d/moved; ln -s moved /a/d/link; ln /a/d/moved /a/hard; chmod 751 /a/d
echo 3 >/proc/sys/vm/drop_caches
check written "$(md5sum </a/d/link)" "{sum}  -"
for i in 1 2 3; do echo $i >>/a/log; done; check append "$(cat /a/log | tr '\n' ' ')" "1 2 3 "
mkfifo /a/fifo; (echo through >/a/fifo &); check fifo "$(cat /a/fifo)" through
i=0; while [ $i -lt 200 ]; do echo $i >/a/f$i; i=$((i + 1)); done; rm /a/f1*; check many "$(ls /a/f* | wc -l)" 90
exec 3<>/a/open; rm /a/open; echo still >&3; check removed "$(cat /proc/self/fd/3)" still; exec 3>&-
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace')" 0
"#
    );
    let kernel = assets::kernel().expect("a kernel");
    let (initramfs, id) =
        (initramfs("shares", &script).display().to_string(), format!("shares-{}", std::process::id()));
    let (ours_shown, kept_shown) = (ours.display().to_string(), format!("{}:other,ro,cache=always", kept.display()));
    let more = ["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet", "--id", &id];
    let more = [&more[..], &["--share", &ours_shown, "--share", &kept_shown]].concat();
    let ended = vm::Vm::start(&vm::arguments(&kernel, &more)).expect("anyvisor starts").end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok\r\n").count(), 10, "{ended:?}");
    // What the host sees of it.
    assert_eq!(std::fs::read(ours.join("hard")).unwrap(), std::fs::read(kept.join("large")).unwrap());
    assert_eq!(std::fs::metadata(ours.join("d")).unwrap().permissions().mode() & 0o7777, 0o751);
    assert_eq!(std::fs::read_to_string(ours.join("log")).unwrap(), "1\n2\n3\n");
}

#[test]
fn a_vm_with_a_share_is_not_saved() {
    let folder = assets::scratch_folder();
    let kernel = assets::kernel().expect("a kernel");
    let (initramfs, id) = (initramfs("share-saved", "sleep 100"), format!("share-saved-{}", std::process::id()));
    let (initramfs, shared) = (initramfs.display().to_string(), folder.path().display().to_string());
    let more = ["--initrd", &initramfs, "--cmdline", "console=ttyS0 quiet", "--id", &id, "--share", &shared];
    let mut vm = vm::Vm::start(&vm::arguments(&kernel, &more)).expect("anyvisor starts");
    vm.wait_for("", PATIENCE);
    let to = folder.path().join("snapshot").display().to_string();
    let began = std::time::Instant::now();
    let ended = loop {
        let ended = vm::run(&["snapshot", &id, &to], PATIENCE);
        // The VM may not have its socket yet.
        if !ended.errors.contains("no VM") || began.elapsed() > PATIENCE {
            break ended;
        }
    };
    assert_ne!(ended.code(), 0, "{ended:?}");
    assert!(ended.errors.contains("cannot be saved") && ended.errors.trim().lines().count() == 1, "{ended:?}");
}

#[test]
fn bad_shares_are_refused() {
    let kernel = assets::kernel().expect("a kernel");
    for (shares, part) in [
        (&["/nonexistent"][..], "cannot share folder '/nonexistent'"),
        (&["/etc/passwd"], "cannot share folder '/etc/passwd'"),
        (&["/proc"], "a view of this host's kernel"),
        (&["/usr/lib", "/var/lib"], "two shared folders are called 'lib'"),
        (&["/usr,rw"], "unknown option 'rw'"),
        (&["/usr:"], "bad name ''"),
    ] {
        let options: Vec<&str> = shares.iter().flat_map(|share| ["--share", share]).collect();
        let ended = vm::run(&vm::arguments(&kernel, &options), Duration::from_secs(30));
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.errors.contains(part) && ended.errors.trim().lines().count() == 1, "{shares:?}: {ended:?}");
    }
}
