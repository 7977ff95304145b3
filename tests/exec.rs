//! `anyvisor exec`, as a user has it: a command's streams, exit code, folder and files, and the host as it was.

use anyvisor_tests::{assets, vm};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// `exec` with the distribution's kernel, in `folder`.
fn exec(options: &[&str], command: &[&str], folder: &Path) -> Command {
    let tree = assets::kernel_tree().expect("a kernel");
    let mut exec = vm::command();
    exec.arg("exec").arg("--kernel").arg(assets::kernel_of(&tree).expect("a kernel")).arg("--modules").arg(&tree);
    exec.args(options).arg("--").args(command).current_dir(folder).stdin(Stdio::null());
    exec
}

fn run(options: &[&str], command: &[&str]) -> Output {
    exec(options, command, Path::new("/")).output().expect("anyvisor starts")
}

#[track_caller]
fn check(output: &Output, code: i32, stdout: &str, stderr: &str) {
    let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let found = (output.status.code(), shown(&output.stdout), shown(&output.stderr));
    assert_eq!(found, (Some(code), stdout.into(), stderr.into()));
}

#[test]
fn streams_are_apart_and_the_exit_code_is_the_commands() {
    check(&run(&[], &["true"]), 0, "", "");
    check(&run(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]), 7, "out\n", "err\n");
    check(
        &run(&[], &["sh", "-c", "echo out >/dev/stdout; echo err >/dev/stderr; kill -TERM $$"]),
        143,
        "out\n",
        "err\n",
    );
    check(&run(&[], &["/nonexistent/command", "-x"]), 127, "", "anyvisor: /nonexistent/command: command not found\n");
    check(&run(&[], &["/etc/passwd"]), 126, "", "anyvisor: /etc/passwd: cannot be run\n");
}

#[test]
fn the_command_is_where_it_was_and_the_host_stays_as_it_is() {
    let folder = assets::scratch_folder();
    let (inside, rw) = (folder.path().join("in side"), folder.path().join("rw"));
    std::fs::create_dir(&inside).unwrap();
    std::fs::create_dir(&rw).unwrap();
    std::fs::write(inside.join("kept"), "before\n").unwrap();
    std::os::unix::net::UnixListener::bind(inside.join("socket")).unwrap();
    let script = r#"pwd; cat kept; echo "$VARIABLE"; echo after >kept; touch new /etc/anyvisor-exec; cat kept; ls; ls /etc/anyvisor-exec
echo shared >"$1/new"; mkdir "$1/d"; hostname; nproc
ls -d /proc/self/fd /dev/pts /dev/null /sys/kernel; cat /proc/1/comm"#;
    let rw_shown = rw.display().to_string();
    let mut command = exec(&["--rw", &rw_shown, "--cpus", "2"], &["sh", "-c", script, "sh", &rw_shown], &inside);
    let output = command.env("VARIABLE", "it's \"set\"").output().expect("anyvisor starts");
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let expected = format!(
        "{}\nbefore\nit's \"set\"\nafter\nkept\nnew\nsocket\n/etc/anyvisor-exec\n{host}2\n/dev/null\n/dev/pts\n\
         /proc/self/fd\n/sys/kernel\ninit\n",
        inside.display()
    );
    check(&output, 0, &expected, "");
    assert_eq!(std::fs::read_to_string(inside.join("kept")).unwrap(), "before\n");
    assert!(!inside.join("new").exists() && !Path::new("/etc/anyvisor-exec").exists());
    assert_eq!(std::fs::read_to_string(rw.join("new")).unwrap(), "shared\n");
    assert!(rw.join("d").is_dir());
}

#[test]
fn much_goes_in_and_out() {
    let bytes: Vec<u8> = (0..10u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let script = "cat; echo done >&2";
    let mut child = exec(&[], &["sh", "-c", script], Path::new("/"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("anyvisor starts");
    let (mut input, sent) = (child.stdin.take().expect("piped"), bytes.clone());
    let writer = std::thread::spawn(move || input.write_all(&sent));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b"done\n"[..]));
    assert!(output.stdout == bytes, "{} bytes came back, or others", output.stdout.len());
    // Who stops reading ends the command, as in any pipe.
    let mut child = exec(&[], &["sh", "-c", "yes; echo $? >&2"], Path::new("/"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("anyvisor starts");
    let mut head = [0; 4];
    std::io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut head).unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((head, String::from_utf8_lossy(&output.stderr).trim()), (*b"y\ny\n", "141"));
}

#[test]
fn a_network_is_there_if_it_is_asked_for() {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let thread =
        std::thread::spawn(move || server.accept().map(|(mut client, _)| client.write_all(b"from the host\n")));
    let script = format!("cat </dev/tcp/10.0.2.2/{port}; cat /etc/resolv.conf");
    check(&run(&["--net", "user"], &["bash", "-c", &script]), 0, "from the host\nnameserver 10.0.2.3\n", "");
    thread.join().unwrap().unwrap().unwrap();
    check(&run(&[], &["sh", "-c", "ls /sys/class/net"]), 0, "lo\n", "");
}

#[test]
fn what_goes_wrong_is_told() {
    let output = run(&["--timeout", "2s"], &["sleep", "1000"]);
    check(&output, 124, "", "");
    let output = run(&[], &["sh", "-c", "echo c >/proc/sysrq-trigger"]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("kernel panicked: sysrq triggered crash") && said.trim().lines().count() == 1, "{said}");
    let kernel = assets::kernel().expect("a kernel").display().to_string();
    let arguments = ["exec", "--kernel", &kernel, "--modules", "/nonexistent", "true"];
    let output = vm::command().args(arguments).output().expect("anyvisor starts");
    assert_eq!(
        (output.status.code(), String::from_utf8_lossy(&output.stderr).lines().count()),
        (Some(125), 1),
        "{output:?}"
    );
    // A kernel that lacks what it takes.
    let empty = assets::scratch_folder();
    let arguments = ["exec", "--kernel", &kernel, "--modules", &empty.path().display().to_string(), "true"];
    let output = vm::command().args(arguments).output().expect("anyvisor starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(125) && said.contains("VIRTIO_FS"), "{output:?}");
}
