//! An unmodified Linux: boots, computes, powers off.

use anyvisor_tests::{assets, vm};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);

/// Boots the distribution's kernel with `script` as init.
fn boot(name: &str, script: &str, more: &[&str]) -> vm::Ended {
    let vm = start(name, script, more);
    vm.end(PATIENCE)
}

fn start(name: &str, script: &str, more: &[&str]) -> vm::Vm {
    let kernel = assets::kernel().expect("a kernel");
    let initramfs = assets::scratch(name, &assets::initramfs(script).expect("busybox")).unwrap();
    let initramfs = initramfs.display().to_string();
    let mut options = vec!["--initrd", &initramfs];
    options.extend_from_slice(more);
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

#[test]
fn boots_to_a_shell_and_powers_off() {
    let ended = boot("poweroff", "echo hello from $(uname -s); poweroff -f", &[]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("hello from Linux"), "{ended:?}");
    assert!(ended.output.contains("KVM") || ended.output.contains("kvm-clock"), "paravirtual clock\n{ended:?}");
}

#[test]
fn several_vcpus_share_the_work() {
    let script = r#"
echo "processors $(nproc)"
for n in 1 2 3 4; do (seq 1 100000 | sort -r | md5sum > /sum$n; uname > /dev/null) & done
wait
echo "sums $(cat /sum1 /sum2 /sum3 /sum4 | sort | uniq -c | awk '{ print $1, $2 }')"
echo "idle $(grep -E '^cpu[0-9]' /proc/stat | awk '$2 + $4 == 0' | wc -l)"
echo "complaints $(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace|stall|lockup')"
dmesg | grep -E 'BUG:|Oops|WARNING:|Call Trace|stall|lockup'
echo "paravirtual $(dmesg | grep -c -E 'PV spinlocks enabled|setup pv remote TLB flush|setup PV sched yield|setup PV IPIs')"
grep '^cpu ' /proc/stat | awk '{ print "stolen", $9 < 100000 }'
poweroff -f
"#;
    for cpus in ["2", "4"] {
        let ended = boot("vcpus", script, &["--cpus", cpus, "--cmdline", "console=ttyS0 quiet"]);
        assert_eq!(ended.code(), 0, "{ended:?}");
        let sum = "sums 4 16e9bddca1cd9b49e68a3dbfc627d734";
        for line in [&format!("processors {cpus}"), sum, "idle 0", "complaints 0", "paravirtual 4", "stolen 1"] {
            assert!(ended.output.contains(line), "no '{line}'\n{ended:?}");
        }
    }
}

#[test]
fn a_reboot_ends_the_vm_too() {
    let ended = boot("reboot", "reboot -f", &[]);
    assert_eq!(ended.code(), 0, "{ended:?}");
}

#[test]
fn real_programs_give_right_answers() {
    let script = r#"
check() { if [ "$2" = "$3" ]; then echo "check $1 ok"; else echo "check $1 FAILED: $2, not $3"; fi; }
check sum "$(i=0; s=0; while [ $i -lt 3000 ]; do s=$((s + i * i)); i=$((i + 1)); done; echo $s)" 8995500500
check hash "$(dd if=/dev/zero bs=1024 count=1024 2>/dev/null | sha256sum | cut -c1-16)" 30e14955ebf13522
check pipes "$(seq 1 5000 | sort -r | uniq | wc -l)" 5000
check gzip "$(seq 1 20000 | gzip | gunzip | md5sum | cut -c1-8)" "$(seq 1 20000 | md5sum | cut -c1-8)"
check bc "$(echo '2^200' | bc)" 1606938044258990275541962092341162602522202993782792835301376
check forks "$(i=0; while [ $i -lt 100 ]; do /bin/true && i=$((i + 1)); done; echo $i)" 100
before=$(cut -d. -f1 /proc/uptime); sleep 2; after=$(cut -d. -f1 /proc/uptime)
check clock "$([ $((after - before)) -ge 1 ] && [ $((after - before)) -le 4 ] && echo yes)" yes
check source "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource | grep -c -E 'kvm-clock|tsc')" 1
check complaints "$(dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace|unchecked MSR|soft lockup')" 0
dmesg | grep -E 'BUG:|Oops|WARNING:|Call Trace|unchecked MSR'
echo checks done
poweroff -f
"#;
    let ended = boot("programs", script, &["--cmdline", "console=ttyS0 quiet"]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("FAILED"), "{ended:?}");
    assert_eq!(ended.output.matches(" ok").count(), 9, "{ended:?}");
}

#[test]
fn the_console_takes_input() {
    let mut vm = start("console", "echo ready; exec setsid cttyhack sh -i", &["--cmdline", "console=ttyS0 quiet"]);
    vm.wait_for("ready", PATIENCE);
    vm.type_in("echo $((6 * 7)) is the answer\n").unwrap();
    vm.wait_for("42 is the answer", PATIENCE);
    vm.type_in("poweroff -f\n").unwrap();
    let ended = vm.end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
}

#[test]
fn sigterm_ends_a_running_linux() {
    let mut vm = start("sigterm", "echo ready; while true; do :; done", &["--cmdline", "console=ttyS0 quiet"]);
    vm.wait_for("ready", PATIENCE);
    vm.signal(libc::SIGTERM);
    let ended = vm.end(Duration::from_secs(10));
    assert_ne!(ended.status.code(), Some(101), "a panic\n{ended:?}");
    assert_ne!(ended.status.code(), Some(0), "a killed VM has not succeeded\n{ended:?}");
}

#[test]
fn older_cpu_models_boot() {
    let script = "echo processors with avx2: $(grep -c avx2 /proc/cpuinfo); grep -q sse4_2 /proc/cpuinfo && echo has sse4_2; poweroff -f";
    let ended = boot("v2", script, &["--cpu-model", "x86-64-v2", "--cmdline", "console=ttyS0 quiet"]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("has sse4_2") && ended.output.contains("with avx2: 0"), "{ended:?}");
}
