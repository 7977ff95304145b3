//! The control commands against a Linux under `--engine kvm`: `ps`, `pause`, `resume`, `console`, `snapshot`, `run
//! --restore` and `stop`, by the power button and by force, as a user of L1 types them.
//!
//! The guest counts aloud and carries out the lines that it is sent, so that L1's script sees whether it stands still
//! and what reaches it. What the commands do in detail is the business of `tests/control.rs`.

use super::image;
use anyhow::Result;
use anyvisor_tests::assets;
use std::path::PathBuf;

/// Where L1 has the guest's initramfs.
pub const INITRD: &str = "guest/control-initrd";

/// The guest's initramfs, in a file.
///
/// # Errors
/// The kernel package or busybox is not to be had.
pub fn guest() -> Result<PathBuf> {
    let modules = image::modules(&["button", "evdev"])?;
    let initramfs = assets::initramfs_with(
        r#"
for module in /modules-*.ko; do insmod $module; done
mkdir -p /etc/acpi/PWRF /var/run
printf '#!/bin/sh\necho the button was pressed >/dev/console\npoweroff -f\n' >/etc/acpi/PWRF/00000080
chmod +x /etc/acpi/PWRF/00000080
acpid -l /dev/null
(n=0; while :; do n=$((n + 1)); echo "tick $n"; usleep 200000; done) &
echo ready
while read -r line; do eval "$line"; done
"#,
        &modules.into_iter().map(|(name, bytes)| (format!("modules-{name}.ko"), bytes)).collect::<Vec<_>>(),
    )?;
    assets::scratch("nested-control-initrd", &initramfs)
}

/// What L1 does, with `seconds` for whatever takes long.
pub fn script(seconds: u64) -> String {
    SCRIPT.replace("@SECONDS@", &seconds.to_string())
}

const SCRIPT: &str = r#"
export XDG_RUNTIME_DIR=/run
began=$(cut -d. -f1 /proc/uptime)
fail() { echo "control: FAILED: $1"; tail -n 20 /tmp/console /tmp/said; exit 1; }
# Attaches to the console, and waits until it says something new.
attach() { /anyvisor console control </dev/null >/tmp/console 2>/tmp/said & }
says() { n=0; until grep -q "$1" /tmp/console; do n=$((n + 1)); [ $n -lt @SECONDS@ ] || fail "the guest does not say '$1'"; sleep 1; done; }
state() { /anyvisor ps | awk -v id=control '$1 == id { print $3, $6 }'; }
ticks() { grep -c '^tick' /tmp/console || true; }
later() { n=0; from=$(ticks); until [ $(ticks) -gt $from ]; do n=$((n + 1)); [ $n -lt @SECONDS@ ] || fail "the guest stands still"; sleep 1; done; }
type() { (echo "$1"; sleep 3) | timeout 30 /anyvisor console control >/dev/null 2>&1 || true; }

/anyvisor run --detach --engine kvm --cpu-model host --memory 192M --kernel /guest/vmlinuz --initrd /guest/control-initrd \
  --cmdline 'console=ttyS0 quiet' --id control >/tmp/id || fail "run --detach"
[ "$(cat /tmp/id)" = control ] || fail "the name is $(cat /tmp/id)"
attach; says ready; later
[ "$(state)" = "kvm Running" ] || fail "ps shows $(state)"
/anyvisor pause control || fail pause
[ "$(state)" = "kvm Paused" ] || fail "paused, ps shows $(state)"
sleep 1; before=$(ticks); sleep 2
[ $(ticks) = $before ] || fail "a paused guest goes on"
/anyvisor resume control || fail resume
later
type 'echo got it >/dev/console'; says '^got it'
/anyvisor snapshot control /tmp/saved 2>/dev/null || fail snapshot
later
type 'killall acpid; echo it is deaf >/dev/console'; says '^it is deaf'
/anyvisor stop control --timeout 2s 2>/tmp/said || fail "stop by force"
grep -q 'did not power off within 2s; ended by force' /tmp/said || fail "stop by force says nothing"
[ -z "$(state)" ] || fail "stopped, ps shows $(state)"
/anyvisor run --detach --engine kvm --restore /tmp/saved >/tmp/id || fail "run --restore"
attach; later
[ "$(state)" = "kvm Running" ] || fail "restored, ps shows $(state)"
/anyvisor stop control --timeout @SECONDS@s 2>/tmp/said || fail "stop"
[ -s /tmp/said ] && fail "stop was not by the button"
says 'the button was pressed'
[ -z "$(state)" ] && [ -z "$(ls /run/anyvisor | grep -v log)" ] || fail "something is left: $(ls /run/anyvisor)"
rm -rf /tmp/saved
echo "control commands: ok, $(($(cut -d. -f1 /proc/uptime) - began)) s"
"#;
