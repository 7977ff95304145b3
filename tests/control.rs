//! Control sockets: every command against running guests, tiny ones and an unmodified Linux.

use anyvisor_tests::elf::{HALT, SPIN, debug_exit, print, pvh};
use anyvisor_tests::{assets, vm};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take on a busy machine; Linux takes longer.
const PATIENCE: Duration = Duration::from_secs(30);
const LINUX_PATIENCE: Duration = Duration::from_secs(150);

/// Prints dots for ever.
const DOTS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xb0, b'.', 0xee, // next: mov al, '.'; out dx, al
    0xb9, 0x00, 0x40, 0x00, 0x00, // mov ecx, 4000h
    0xe2, 0xfe, // loop $
    0xeb, 0xf4, // jmp next
];

/// Echoes what it gets.
const ECHO: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // next: mov dx, 3fdh
    0xec, 0xa8, 0x01, 0x74, 0xf7, // in al, dx; test al, 1; jz next
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xec, 0xee, // in al, dx; out dx, al
    0xeb, 0xef, // jmp next
];

/// Enables the power button's event, waits for its status, and powers off.
fn obedient() -> Vec<u8> {
    let arm = [0x66, 0xba, 0x02, 0x06, 0x66, 0xb8, 0x00, 0x01, 0x66, 0xef]; // mov dx, 602h; mov ax, 100h; out dx, ax
    // mov dx, 600h; wait: in ax, dx; test ah, 1; jz wait
    let wait = [0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9];
    let off = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef]; // mov dx, 604h; mov ax, 3400h; out dx, ax
    [&arm[..], &print("armed\n"), &wait, &print("pressed\n"), &off, HALT].concat()
}

fn start(id: &str, code: &[u8], more: &[&str]) -> vm::Vm {
    let kernel = assets::scratch(&format!("control-{id}"), &pvh(code)).unwrap();
    let mut options = vec!["--memory", "64M", "--id", id];
    options.extend_from_slice(more);
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

/// Runs a command to its end.
fn anyvisor(arguments: &[&str]) -> Output {
    let mut command = vm::command();
    command.args(arguments).stdin(Stdio::null()).output().expect("anyvisor starts")
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("ended by a signal: {output:?}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The command must succeed, and say nothing on stderr.
#[track_caller]
fn fine(arguments: &[&str]) -> String {
    let output = anyvisor(arguments);
    assert!(code(&output) == 0 && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    text(&output.stdout)
}

/// The command must fail with `expected`, and one line that has all of `words`.
#[track_caller]
fn refused(expected: i32, arguments: &[&str], words: &[&str]) {
    let output = anyvisor(arguments);
    let errors = text(&output.stderr);
    assert_eq!(code(&output), expected, "{arguments:?}: {output:?}");
    assert_eq!(errors.trim_end().lines().count(), 1, "one line: {errors:?}");
    for word in words {
        assert!(errors.contains(word), "{word:?} is not in {errors:?}");
    }
}

/// The row of VM `id` in `ps --json`.
fn row(id: &str) -> Option<Value> {
    let rows: Vec<Value> = serde_json::from_slice(&anyvisor(&["ps", "--json"]).stdout).expect("a JSON array");
    rows.into_iter().find(|row| row["id"] == id)
}

fn socket(id: &str) -> PathBuf {
    vm::runtime_folder().join("anyvisor").join(format!("{id}.sock"))
}

#[track_caller]
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn ps_shows_what_runs() {
    let mut vm = start("shown", &[&print("ready\n"), SPIN].concat(), &["--engine", "translator"]);
    vm.wait_for("ready", PATIENCE);
    let seen = row("shown").expect("it runs");
    assert_eq!((&seen["state"], &seen["engine"]), (&"Running".into(), &"translator".into()));
    assert_eq!((&seen["pid"], &seen["vcpus"]), (&vm.process().into(), &1.into()));
    assert_eq!(seen["memory_bytes"], 64 << 20);
    assert!(seen["uptime_ms"].as_u64().is_some_and(|ms| ms < 60_000), "{seen}");
    let table = fine(&["ps"]);
    let line = table.lines().find(|line| line.starts_with("shown ")).expect("a row");
    let words: Vec<&str> = line.split_whitespace().collect();
    let pid = vm.process().to_string();
    assert_eq!(words[..6], ["shown", &pid, "translator", "1", "64M", "Running"], "{table}");
    assert!(table.starts_with("ID "), "{table}");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&socket("shown")), mode(socket("shown").parent().unwrap())), (0o600, 0o700));
    vm.signal(libc::SIGTERM);
    vm.end(PATIENCE);
    assert!(row("shown").is_none());
    assert!(!socket("shown").exists() && !socket("shown").with_extension("lock").exists());
}

#[test]
fn a_paused_guest_stands_still() {
    let mut vm = start("dots", DOTS, &[]);
    vm.wait_for("..........", PATIENCE);
    for _ in 0..5 {
        fine(&["pause", "dots"]);
        fine(&["pause", "dots"]);
        assert_eq!(row("dots").unwrap()["state"], "Paused");
        // What was under way arrives.
        std::thread::sleep(Duration::from_millis(50));
        let before = vm.output().len();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(vm.output().len(), before);
        fine(&["resume", "dots"]);
        fine(&["resume", "dots"]);
        wait_until("the guest goes on", || vm.output().len() > before);
        assert_eq!(row("dots").unwrap()["state"], "Running");
    }
    // A signal ends a paused one as well.
    fine(&["pause", "dots"]);
    vm.signal(libc::SIGTERM);
    assert_eq!(vm.end(PATIENCE).code(), 1);
}

#[test]
fn the_power_button_reaches_a_guest_that_listens() {
    for paused in [false, true] {
        let mut vm = start("obedient", &obedient(), &[]);
        vm.wait_for("armed", PATIENCE);
        if paused {
            fine(&["pause", "obedient"]);
        }
        fine(&["stop", "obedient"]);
        let ended = vm.end(PATIENCE);
        assert_eq!(ended.code(), 0, "{ended:?}");
        assert!(ended.output.contains("pressed"), "{ended:?}");
    }
}

/// The button is pressed until the guest listens: a guest that is still booting is not forgotten.
#[test]
fn a_guest_that_listens_late_is_stopped_too() {
    // Some seconds of nothing: mov ecx, 2000000h; loop $
    let nap = [0xb9, 0x00, 0x00, 0x00, 0x02, 0xe2, 0xfe];
    let mut vm = start("late", &[&print("ready\n"), &nap[..], &obedient()].concat(), &[]);
    vm.wait_for("ready", PATIENCE);
    fine(&["stop", "late", "--timeout", "2m"]);
    assert_eq!(vm.end(PATIENCE).code(), 0);
}

#[test]
fn a_guest_that_does_not_listen_is_ended_by_force() {
    for guest in [HALT, SPIN] {
        let mut vm = start("deaf", &[&print("ready\n"), guest].concat(), &[]);
        vm.wait_for("ready", PATIENCE);
        let began = Instant::now();
        let output = anyvisor(&["stop", "deaf", "--timeout", "700ms"]);
        assert_eq!(code(&output), 0, "{output:?}");
        assert!(
            text(&output.stderr).contains("does not listen") && began.elapsed() >= Duration::from_millis(700),
            "{output:?}"
        );
        assert_eq!(vm.end(PATIENCE).code(), 1);
    }
    // One that listens and does nothing.
    let armed = obedient();
    let deaf = [&armed[..10], &print("armed\n"), SPIN].concat();
    let mut vm = start("defiant", &deaf, &[]);
    vm.wait_for("armed", PATIENCE);
    let output = anyvisor(&["stop", "defiant", "--timeout", "300ms"]);
    assert!(code(&output) == 0 && text(&output.stderr).contains("did not power off within 300ms"), "{output:?}");
    vm.end(PATIENCE);
    // Without asking.
    let mut vm = start("forced", &[&print("ready\n"), SPIN].concat(), &[]);
    vm.wait_for("ready", PATIENCE);
    fine(&["stop", "forced", "--force"]);
    vm.end(PATIENCE);
}

#[test]
fn a_name_belongs_to_one_vm() {
    let mut first = start("twin", &[&print("ready\n"), SPIN].concat(), &[]);
    first.wait_for("ready", PATIENCE);
    let second = start("twin", SPIN, &["--engine", "translator"]).end(PATIENCE);
    assert_eq!(second.code(), 2, "{second:?}");
    assert_eq!(second.errors.lines().count(), 1, "{second:?}");
    let pid = format!("process {}", first.process());
    assert!(second.errors.contains("'twin'") && second.errors.contains(&pid), "{second:?}");
    assert_eq!(row("twin").unwrap()["pid"], first.process());
}

#[test]
fn what_a_killed_vm_leaves_is_cleaned_up() {
    for look_first in [false, true] {
        let mut vm = start("killed", &[&print("ready\n"), SPIN].concat(), &[]);
        vm.wait_for("ready", PATIENCE);
        let pid = vm.process();
        vm.signal(libc::SIGKILL);
        vm.end(PATIENCE);
        assert!(socket("killed").exists());
        if look_first {
            let output = anyvisor(&["ps"]);
            let told = text(&output.stderr);
            assert!(told.contains("'killed'") && told.contains(&pid.to_string()), "{output:?}");
            assert!(!text(&output.stdout).contains("killed") && !socket("killed").exists(), "{output:?}");
            refused(2, &["pause", "killed"], &["killed", "ps"]);
        }
        let mut next = start("killed", &[&print("ready\n"), SPIN].concat(), &[]);
        next.wait_for("ready", PATIENCE);
        assert_eq!(next.errors().contains("dead VM"), !look_first, "{}", next.errors());
        fine(&["pause", "killed"]);
    }
    // A command notices it, too.
    let mut vm = start("killed2", &[&print("ready\n"), SPIN].concat(), &[]);
    vm.wait_for("ready", PATIENCE);
    vm.signal(libc::SIGKILL);
    vm.end(PATIENCE);
    refused(2, &["stop", "killed2"], &["killed2", "dead"]);
    assert!(!socket("killed2").exists());
}

#[test]
fn a_vm_that_cannot_answer_is_listed_all_the_same() {
    let mut vm = start("frozen", &[&print("ready\n"), SPIN].concat(), &[]);
    vm.wait_for("ready", PATIENCE);
    vm.signal(libc::SIGSTOP);
    let seen = row("frozen").expect("it is there");
    assert_eq!((&seen["state"], &seen["pid"]), (&"Unresponsive".into(), &vm.process().into()));
    vm.signal(libc::SIGCONT);
    assert_eq!(row("frozen").unwrap()["state"], "Running");
    fine(&["stop", "frozen", "--force"]);
    vm.end(PATIENCE);
}

#[test]
fn mistakes() {
    for command in ["pause", "resume", "stop", "console"] {
        refused(2, &[command, "nobody"], &["'nobody'", "anyvisor ps"]);
        refused(2, &[command, "no body"], &["bad name 'no body'"]);
        refused(2, &[command, ".."], &["bad name '..'"]);
        refused(2, &[command, "/no/such/socket"], &["/no/such/socket"]);
    }
    refused(2, &["snapshot", "nobody", "somewhere"], &["'nobody'"]);
    refused(2, &["stop", "nobody", "--timeout", "1"], &["bad time '1'"]);
    let kernel = assets::scratch("control-mistakes", &pvh(SPIN)).unwrap().display().to_string();
    let run = |more: &[&'static str]| -> Vec<String> {
        ["run", "--kernel", &kernel].into_iter().chain(more.iter().copied()).map(String::from).collect()
    };
    let long = "x".repeat(65);
    for (more, word) in [
        (&["--id", "a/b"][..], "bad name 'a/b'"),
        (&["--id", ""], "name"),
        (&["--api-sock", "/nonexistent/folder/x"], "/nonexistent/folder/x"),
        (&["--api-sock", "/dev/null"], "/dev/null"),
        (&["--detach", "--no-api"], "--no-api"),
        (&["--detach", "--serial", "stdio"], "anyvisor console"),
    ] {
        let arguments = run(more);
        refused(2, &arguments.iter().map(String::as_str).collect::<Vec<_>>(), &[word]);
    }
    refused(2, &["run", "--kernel", &kernel, "--id", &long], &["64"]);
    let deep = vm::runtime_folder().join("y".repeat(100)).display().to_string();
    refused(2, &["run", "--kernel", &kernel, "--api-sock", &deep], &["107"]);
    // The mistakes of a detached VM are seen where they are made.
    refused(2, &["run", "-d", "--kernel", "/nonexistent/kernel", "--engine", "translator"], &["/nonexistent/kernel"]);
}

#[test]
fn a_vm_runs_without_a_runtime_folder() {
    let quit = [print("hello\n"), debug_exit(0), HALT.to_vec()].concat();
    let kernel = assets::scratch("control-nofolder", &pvh(&quit)).unwrap().display().to_string();
    let spoiled = vm::runtime_folder().join("spoiled");
    std::fs::create_dir_all(&spoiled).unwrap();
    std::fs::write(spoiled.join("anyvisor"), "not a folder").unwrap();
    let run = |more: &[&str]| {
        let mut command = vm::command();
        command.args(["run", "--engine", "translator", "--debug-exit", "--kernel", &kernel]).args(more);
        command.env("XDG_RUNTIME_DIR", &spoiled).stdin(Stdio::null()).output().unwrap()
    };
    let warned = run(&[]);
    assert_eq!((code(&warned), text(&warned.stdout).as_str()), (1, "hello\n"), "{warned:?}");
    assert!(text(&warned.stderr).contains("no control socket") && text(&warned.stderr).lines().count() == 1);
    let silent = run(&["--no-api"]);
    assert!(code(&silent) == 1 && silent.stderr.is_empty(), "{silent:?}");
    // The commands cannot do without.
    let mut ps = vm::command();
    let ps = ps.arg("ps").env("XDG_RUNTIME_DIR", &spoiled).output().unwrap();
    assert!(code(&ps) == 1 && text(&ps.stderr).contains("spoiled"), "{ps:?}");
    // A folder that others can write to is no better.
    let open = vm::runtime_folder().join("open");
    std::fs::create_dir_all(open.join("anyvisor")).unwrap();
    std::fs::set_permissions(open.join("anyvisor"), std::fs::Permissions::from_mode(0o777)).unwrap();
    let mut ps = vm::command();
    let ps = ps.arg("ps").env("XDG_RUNTIME_DIR", &open).output().unwrap();
    assert!(code(&ps) == 1 && text(&ps.stderr).contains("0700"), "{ps:?}");
}

#[test]
fn a_socket_of_ones_own() {
    let path = vm::runtime_folder().join("own.sock").display().to_string();
    let mut vm = start("own", &obedient(), &["--api-sock", &path]);
    vm.wait_for("armed", PATIENCE);
    assert!(row("own").is_none(), "it is not in the runtime folder");
    fine(&["pause", &path]);
    fine(&["resume", &path]);
    fine(&["stop", &path]);
    assert_eq!(vm.end(PATIENCE).code(), 0);
    assert!(!Path::new(&path).exists());
}

#[test]
fn a_detached_vm_outlives_its_command() {
    let kernel = assets::scratch("control-detached", &pvh(ECHO)).unwrap().display().to_string();
    let run = ["run", "--detach", "--engine", "translator", "--memory", "64M", "--kernel", &kernel];
    let id = fine(&run).trim_end().to_owned();
    // Ended whatever happens here.
    struct Stop(String);
    impl Drop for Stop {
        fn drop(&mut self) {
            anyvisor(&["stop", &self.0, "--force"]);
        }
    }
    let stop = Stop(id.clone());
    assert_eq!(id, format!("vm-{}", row(&id).expect("it runs")["pid"]));
    assert!(console_answers(&id, "hello"));
    drop(stop);
    assert!(row(&id).is_none());
    // Its messages are in a log, which is where a triple fault is told.
    let fault = assets::scratch("control-fault", &pvh(&[0x0f, 0x0b])).unwrap().display().to_string();
    fine(&["run", "-d", "--engine", "translator", "--memory", "64M", "--id", "faulty", "--kernel", &fault]);
    let log = vm::runtime_folder().join("anyvisor/faulty.log");
    wait_until("the log tells", || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("triple fault")));
}

/// Whether the guest's console gives `typed` back.
fn console_answers(id: &str, typed: &str) -> bool {
    let mut command = vm::command();
    let mut console =
        command.args(["console", id]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("anyvisor starts");
    console.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let mut out = console.stdout.take().unwrap();
    let mut shown = vec![0; typed.len()];
    let answered = out.read_exact(&mut shown).is_ok() && shown == typed.as_bytes();
    console.kill().unwrap();
    console.wait().unwrap();
    answered
}

#[test]
fn consoles_share_a_vm() {
    // Attached to a VM whose own console is nowhere.
    let mut vm = start("null", &[&print("login: "), ECHO].concat(), &["--serial", "null"]);
    wait_until("the VM is there", || row("null").is_some());
    assert!(console_answers("null", "login: "), "what is typed comes after what was said");
    assert!(console_answers("null", "login: "), "and the past is shown again");
    vm.signal(libc::SIGTERM);
    vm.end(PATIENCE);
    // And to one with its console on stdio, which sees everything too.
    vm = start("stdio", ECHO, &[]);
    wait_until("the VM is there", || row("stdio").is_some());
    assert!(console_answers("stdio", "from outside"));
    vm.wait_for("from outside", PATIENCE);
    vm.type_in("from inside").unwrap();
    vm.wait_for("from inside", PATIENCE);
    assert!(console_answers("stdio", "from outsidefrom inside"));
}

#[test]
fn a_console_ends_with_its_vm() {
    let vm = start("brief", &obedient(), &["--serial", "null"]);
    wait_until("the VM is there", || row("brief").is_some());
    let mut command = vm::command();
    let console = command.args(["console", "brief"]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    fine(&["stop", "brief"]);
    let output = console.wait_with_output().unwrap();
    assert_eq!((code(&output), text(&output.stdout).as_str()), (0, "armed\npressed\n"));
    assert_eq!(vm.end(PATIENCE).code(), 0);
}

/// Sends `bytes` and returns the answer.
fn raw(id: &str, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket(id)).expect("the VM listens");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A VM that has heard enough closes.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = vec![];
    let _ = stream.read_to_end(&mut answer);
    text(&answer)
}

#[test]
fn firecrackers_requests() {
    let mut vm = start("fire", DOTS, &[]);
    vm.wait_for("...", PATIENCE);
    let ask = |method: &str, path: &str, body: &str| {
        let length = body.len();
        raw("fire", format!("{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}").as_bytes())
    };
    assert!(ask("GET", "/", "").contains(r#""state":"Running""#));
    assert!(ask("PATCH", "/vm", r#"{"state":"Paused"}"#).starts_with("HTTP/1.1 204"));
    assert!(ask("GET", "/", "").contains(r#""state":"Paused""#));
    assert!(ask("PUT", "/anyvisor/power-button", "").starts_with("HTTP/1.1 409"));
    assert!(ask("PATCH", "/vm", r#"{"state":"Resumed"}"#).starts_with("HTTP/1.1 204"));
    assert!(ask("GET", "/machine-config", "").contains(r#""mem_size_mib":64"#));
    assert!(ask("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#).contains("fault_message"));
    assert!(ask("PUT", "/anyvisor/stop", "").starts_with("HTTP/1.1 204"));
    assert_eq!(vm.end(PATIENCE).code(), 1);
}

/// Another user is not served, even where the file's mode would let them in. Needs root to become one.
#[test]
fn other_users_are_not_served() {
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("not root: skipped");
        return;
    }
    let folder = vm::runtime_folder().join("public");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("api.sock");
    let mut vm = start("public", DOTS, &["--api-sock", &path.display().to_string()]);
    vm.wait_for("...", PATIENCE);
    for (path, mode) in [(vm::runtime_folder(), 0o755), (&folder, 0o755), (&path, 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let ask = |path: &Path| {
        let mut stream = UnixStream::connect(path).unwrap();
        // It may be closed already.
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
        let mut answer = vec![];
        let _ = stream.read_to_end(&mut answer);
        text(&answer)
    };
    assert!(ask(&path).contains("Running"));
    let stranger = path.clone();
    let answer = std::thread::spawn(move || {
        // SAFETY: the raw system call changes this thread's user only, and the thread ends here.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        ask(&stranger)
    });
    assert_eq!(answer.join().unwrap(), "");
    std::fs::set_permissions(vm::runtime_folder(), std::fs::Permissions::from_mode(0o700)).unwrap();
}

fn linux(id: &str, script: &str, cmdline: &str) -> vm::Vm {
    let kernel = assets::kernel().expect("a kernel");
    let modules = assets::modules(&["button", "evdev"]).expect("the kernel's modules");
    let initramfs = assets::initramfs_with(script, &modules).expect("busybox");
    let initramfs = assets::scratch(&format!("control-{id}"), &initramfs).unwrap().display().to_string();
    let options = ["--initrd", &initramfs, "--id", id, "--cmdline", cmdline];
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

/// An unmodified Linux with busybox's acpid, as its distribution would set it up.
#[test]
fn linux_powers_off_by_its_button() {
    let script = r#"
for module in /button.ko /evdev.ko; do [ -e $module ] && insmod $module; done
mkdir -p /etc/acpi/PWRF /var/run
printf '#!/bin/sh\necho the button was pressed >/dev/console\npoweroff -f\n' >/etc/acpi/PWRF/00000080
chmod +x /etc/acpi/PWRF/00000080
cat /sys/firmware/acpi/interrupts/ff_pwr_btn
echo ready
exec acpid -d -l /dev/null
"#;
    let mut vm = linux("acpid", script, "console=ttyS0 quiet");
    vm.wait_for("ready", LINUX_PATIENCE);
    // acpid must have opened its events.
    std::thread::sleep(Duration::from_secs(1));
    fine(&["stop", "acpid", "--timeout", "60s"]);
    let ended = vm.end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("the button was pressed"), "{ended:?}");
}

/// Pausing in the middle of work changes no result, and clocks are right afterwards. A long pause is no lockup:
/// the watchdog's limit is two seconds here, and the guest was away for longer.
#[test]
fn linux_works_through_pauses() {
    let script = r#"
echo started
i=0; s=0; while [ $i -lt 30000 ]; do s=$((s + i * i)); i=$((i + 1)); done
echo sum is $s
for n in 1 2 3 4; do seq 1 20000 | gzip | gunzip | md5sum; done | uniq | wc -l
echo computed
cut -d. -f1 /proc/uptime; date +%s
read -r line
echo after the pause
cut -d. -f1 /proc/uptime; date +%s
dmesg | grep -E 'BUG:|Oops|WARNING:|Call Trace|lockup|stall|unstable' && echo complaints
echo checks done
poweroff -f
"#;
    let mut vm = linux("busy", script, "console=ttyS0 quiet watchdog_thresh=1");
    vm.wait_for("started", LINUX_PATIENCE);
    // An idle processor's watchdog does not mind; this one works.
    fine(&["pause", "busy"]);
    std::thread::sleep(Duration::from_secs(5));
    fine(&["resume", "busy"]);
    let mut pauses = 0;
    while !vm.output().contains("computed") {
        fine(&["pause", "busy"]);
        fine(&["resume", "busy"]);
        pauses += 1;
        assert!(pauses < 5000, "the guest makes no progress\n{}", vm.output());
    }
    assert!(pauses > 5, "the guest was paused while it worked");
    // Its two numbers.
    let numbers = |output: &str, after: &str| -> Vec<i64> {
        let rest = output.split(after).nth(1).unwrap_or_default();
        rest.lines().filter_map(|line| line.trim().parse().ok()).take(2).collect()
    };
    wait_until("the clocks", || numbers(&vm.output(), "computed").len() == 2 && vm.output().ends_with('\n'));
    std::thread::sleep(Duration::from_millis(200));
    fine(&["pause", "busy"]);
    std::thread::sleep(Duration::from_secs(3));
    // Typed while it is paused, and read when it goes on.
    vm.type_in("go\n").unwrap();
    fine(&["resume", "busy"]);
    let ended = vm.end(LINUX_PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("sum is 8999550005000"), "{ended:?}");
    assert!(ended.output.contains("checks done") && !ended.output.contains("complaints"), "{ended:?}");
    let (before, after) = (numbers(&ended.output, "computed"), numbers(&ended.output, "after the pause"));
    for (before, after) in before.iter().zip(&after) {
        assert!((3..40).contains(&(after - before)), "time goes on in a pause: {before} to {after}\n{ended:?}");
    }
    assert_eq!(after.len(), 2, "{ended:?}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!((now - after[1]).abs() < 60, "the guest's clock: {} and not {now}", after[1]);
}

/// Clients that send rubbish, too much or nothing, many at once, while a guest works.
#[test]
fn hostile_clients_do_not_hurt_the_guest() {
    let script = r#"
echo started
i=0; s=0; while [ $i -lt 30000 ]; do s=$((s + i * i)); i=$((i + 1)); done
echo sum is $s
poweroff -f
"#;
    let mut vm = linux("besieged", script, "console=ttyS0 quiet");
    vm.wait_for("started", LINUX_PATIENCE);
    let large =
        [b"PUT /snapshot/create HTTP/1.1\r\nContent-Length: 51200\r\n\r\n".to_vec(), vec![b'['; 200_000]].concat();
    let idle: Vec<_> = (0..20).map(|_| UnixStream::connect(socket("besieged")).unwrap()).collect();
    for round in 0..100u32 {
        for bytes in [
            &b"\x00\x01\x02\xff"[..],
            b"GET / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            &large,
            b"GET /anyvisor/console HTTP/1.1\r\nUpgrade: anyvisor-console\r\n\r\n",
        ] {
            // Some go away without waiting for an answer.
            let mut stream = UnixStream::connect(socket("besieged")).unwrap();
            let _ = stream.write_all(&bytes[..bytes.len().min(1 + (round as usize * 7919) % bytes.len())]);
        }
    }
    drop(idle);
    wait_until("it answers", || raw("besieged", b"GET / HTTP/1.1\r\n\r\n").contains("Running"));
    let ended = vm.end(LINUX_PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.output.contains("sum is 8999550005000"), "{ended:?}");
}
