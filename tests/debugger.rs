//! `--gdb`: Debian's gdb against a booting Linux and tiny guests; and what is no gdb at the other end.

use anyvisor_tests::elf::{HALT, SPIN, debug_exit, print, pvh};
use anyvisor_tests::{assets, vm};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);
const LINUX_PATIENCE: Duration = Duration::from_secs(150);

/// Where a test's debuggers meet its VM.
fn meeting(name: &str) -> PathBuf {
    vm::runtime_folder().join(format!("gdb-{name}"))
}

/// The VM's options, and the VM, whose guest has not started.
fn start(name: &str, code: &[u8], more: &[&str]) -> (vm::Vm, PathBuf) {
    let (kernel, path) = (assets::scratch(&format!("gdb-{name}"), &pvh(code)).unwrap(), meeting(name));
    let path_text = path.display().to_string();
    let mut options = vec!["--memory", "64M", "--id", name, "--debug-exit", "--gdb", &path_text];
    options.extend_from_slice(more);
    let vm = vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts");
    waits(&vm);
    (vm, path)
}

/// Waits until the VM says how to attach.
fn waits(vm: &vm::Vm) {
    let began = Instant::now();
    while !vm.errors().contains("waits for gdb") {
        assert!(began.elapsed() < PATIENCE, "it does not say how to attach: {}", vm.errors());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// gdb with a script of commands, after which it ends. What is wrong with them ends it too.
fn gdb(at: &Path, commands: &[String]) -> Child {
    let mut command = Command::new("gdb");
    command.args(["-nx", "-batch", "-ex", "set pagination off", "-ex", "set confirm off"]);
    command.args(["-ex", "set tcp connect-timeout 20", "-ex", &format!("target remote {}", at.display())]);
    for line in commands {
        command.args(["-ex", line]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("gdb starts; cargo xtask test installs it")
}

/// What gdb said, once it has ended.
fn said(gdb: Child) -> String {
    let Output { stdout, stderr, .. } = gdb.wait_with_output().expect("gdb ends");
    format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr))
}

fn lines(commands: &[&str]) -> Vec<String> {
    commands.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn has_all(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
}

/// `echo` in gdb, to find the place in its output.
fn mark(name: &str) -> String {
    format!("echo [{name}]\\n")
}

/// What gdb said between a mark and the next.
#[track_caller]
fn section<'a>(said: &'a str, name: &str) -> &'a str {
    let start = said.find(&format!("[{name}]\n")).unwrap_or_else(|| panic!("no [{name}] in:\n{said}"));
    let rest = &said[start + name.len() + 3..];
    rest.find("\n[").map_or(rest, |end| &rest[..end + 1])
}

/// The number that a `printf "name=%lx"` printed.
#[track_caller]
fn value(text: &str, name: &str) -> u64 {
    let at = text.find(&format!("{name}=")).unwrap_or_else(|| panic!("no {name} in:\n{text}"));
    let digits: String = text[at + name.len() + 1..].chars().take_while(char::is_ascii_hexdigit).collect();
    u64::from_str_radix(&digits, 16).unwrap_or_else(|_| panic!("no number {name} in:\n{text}"))
}

/// Addresses of the kernel without KASLR, from a boot of it.
fn symbols(names: &[&str]) -> HashMap<String, u64> {
    let pattern = names.join("|");
    let script = format!("grep -E ' ({pattern})$' /proc/kallsyms; poweroff -f");
    let vm = linux("gdb-symbols", &script, &[]);
    let ended = vm.end(LINUX_PATIENCE);
    let found = ended.output.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        Some((words.nth(1)?.to_owned(), address))
    });
    let found: HashMap<_, _> = found.collect();
    assert!(names.iter().all(|name| found.get(*name).is_some_and(|address| *address != 0)), "{found:x?}\n{ended:?}");
    found
}

fn linux(name: &str, script: &str, more: &[&str]) -> vm::Vm {
    let kernel = assets::kernel().expect("a kernel");
    let initramfs = assets::scratch(name, &assets::initramfs(script).expect("busybox")).unwrap();
    let initramfs = initramfs.display().to_string();
    let mut options = vec!["--initrd", &initramfs, "--cmdline", "console=ttyS0 nokaslr"];
    options.extend_from_slice(more);
    vm::Vm::start(&vm::arguments(&kernel, &options)).expect("anyvisor starts")
}

/// Breakpoints of both kinds, steps, a watchpoint, Ctrl-C and a detach, while an unmodified Linux boots; then the
/// boot goes on to its end.
#[test]
fn a_booting_linux() {
    let names = ["start_kernel", "jiffies_64", "kernel_init", "linux_banner", "do_sys_openat2", "system_state"];
    let at = symbols(&names);
    let path = meeting("linux");
    let path_text = path.display().to_string();
    let script = "cat /proc/version /proc/uptime /proc/stat >/tmp/seen; echo up; sleep 5; echo done; poweroff -f";
    let mut vm = linux("gdb-linux", script, &["--engine", "translator", "--gdb", &path_text]);
    waits(&vm);
    let registers = "printf \"rip=%lx cr3=%lx cr4=%lx gs_base=%lx\\n\", $rip, $cr3, $cr4, $gs_base";
    let place = |name: &str| format!("{:#x}", at[name]);
    let commands = vec![
        mark("entry"),
        registers.into(),
        // Nothing is mapped there yet: only hardware breakpoints can wait for it on every engine.
        format!("hbreak *{}", place("start_kernel")),
        "continue".into(),
        mark("start_kernel"),
        registers.into(),
        format!("x/s {}", place("linux_banner")),
        "stepi".into(),
        "stepi".into(),
        "stepi".into(),
        mark("stepped"),
        registers.into(),
        "printf \"eflags=%lx\\n\", $eflags".into(),
        "delete".into(),
        format!("break *{}", place("kernel_init")),
        "continue".into(),
        mark("kernel_init"),
        registers.into(),
        format!("x/5i {}", place("kernel_init")),
        "info threads".into(),
        "set $kept = $rax".into(),
        "set $rax = 0x1234567890abcdef".into(),
        "printf \"rax=%lx\\n\", $rax".into(),
        "set $rax = $kept".into(),
        "delete".into(),
        format!("watch *(unsigned long *) {}", place("jiffies_64")),
        "continue".into(),
        mark("watched"),
        registers.into(),
        "delete".into(),
        format!("break *{} if $rsi != 0", place("do_sys_openat2")),
        "continue".into(),
        "continue".into(),
        "continue".into(),
        mark("openat"),
        registers.into(),
        "delete".into(),
        mark("detached"),
        "detach".into(),
    ];
    let said = said(gdb(&path, &commands));
    assert_eq!(value(section(&said, "entry"), "cr3"), 0x9000, "the boot page tables\n{said}");
    assert_eq!(value(section(&said, "start_kernel"), "rip"), at["start_kernel"], "{said}");
    has_all(section(&said, "start_kernel"), &["Linux version "]);
    let stepped = section(&said, "stepped");
    assert_ne!(value(stepped, "rip"), at["start_kernel"], "{said}");
    assert_eq!(value(stepped, "eflags") & 0x100, 0, "TF shows\n{said}");
    assert_eq!(value(section(&said, "kernel_init"), "rip"), at["kernel_init"], "{said}");
    let kernel_init = section(&said, "kernel_init");
    has_all(kernel_init, &["atchpoint 3", "Old value", "New value"]);
    has_all(kernel_init, &["vCPU 0, running", "rax=1234567890abcdef"]);
    assert_eq!(value(section(&said, "openat"), "rip"), at["do_sys_openat2"], "{said}");

    // Another debugger, which interrupts a guest that sleeps; and goes.
    vm.wait_for("up", LINUX_PATIENCE);
    let commands = ["echo [there]\\n", "continue", "echo [back]\\n", "info registers rip cr0", "detach"];
    let second = gdb(&path, &lines(&commands));
    std::thread::sleep(Duration::from_millis(1500));
    // SAFETY: kill has no memory effects here; the child has not been waited for.
    unsafe { libc::kill(second.id() as i32, libc::SIGINT) };
    let second_said = self::said(second);
    has_all(&second_said, &["[there]", "SIGINT", "[back]", "cr0"]);
    let ended = vm.end(LINUX_PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}\n{said}");
    has_all(&ended.output, &["up", "done", "reboot: Power down"]);
    assert!(!ended.output.contains("Call Trace"), "{ended:?}");
    assert!(!path.exists(), "the socket is left behind");
}

/// Prints, counts to three million in EBX and at 2 MiB, and ends the VM with code 3.
fn counter() -> Vec<u8> {
    let count = [
        0x31, 0xdb, // xor ebx, ebx
        0xff, 0xc3, // next: inc ebx
        0x89, 0x1d, 0x00, 0x00, 0x20, 0x00, // mov [200000h], ebx
        0x81, 0xfb, 0xc0, 0xc6, 0x2d, 0x00, // cmp ebx, 3000000
        0x75, 0xf0, // jne next
    ];
    [&print("counting\n"), &count[..], &debug_exit(1), HALT].concat()
}

/// Where `inc ebx` of [`counter`] is.
fn next() -> u64 {
    u64::from(anyvisor_tests::elf::ENTRY) + print("counting\n").len() as u64 + 2
}

#[test]
fn memory_and_breakpoints_of_a_tiny_guest() {
    let (vm, path) = start("tiny", &counter(), &["--engine", "translator"]);
    let (next, store) = (format!("*{:#x}", next()), format!("*{:#x}", self::next() + 2));
    let code = self::next();
    let commands = [
        "printf \"pc=%lx\\n\", $pc",
        &format!("break {next}"),
        "continue",
        "continue",
        "continue",
        "printf \"ebx=%lx\\n\", $rbx",
        "set $rbx = 1000",
        &format!("tbreak {store}"),
        "continue",
        "printf \"changed=%lx\\n\", $rbx",
        "delete",
        "watch *(int *) 0x200000 if *(int *) 0x200000 == 1200",
        "continue",
        "printf \"watched=%lx\\n\", $rbx",
        "delete",
        // `inc ebx` becomes two NOPs for a while.
        &format!("set *(short *) {code:#x} = (short) 0x9090"),
        "stepi 10",
        "printf \"patched=%lx\\n\", $rbx",
        &format!("set *(short *) {code:#x} = (short) 0xc3ff"),
        "echo [end]\\n",
        "detach",
    ];
    let said = said(gdb(&path, &lines(&commands)));
    assert_eq!(value(&said, "pc"), u64::from(anyvisor_tests::elf::ENTRY), "{said}");
    assert_eq!(value(&said, "ebx"), 2, "{said}");
    assert_eq!(value(&said, "changed"), 1001, "{said}");
    assert_eq!(value(&said, "watched"), 1200, "{said}");
    assert_eq!(value(&said, "patched"), 1200, "{said}");
    let ended = vm.end(PATIENCE);
    assert_eq!((ended.code(), ended.output.trim()), (3, "counting"), "{ended:?}\n{said}");
}

#[test]
fn the_end_is_told_and_kill_ends() {
    let (vm, path) = start("end", &counter(), &["--engine", "translator"]);
    let told = said(gdb(&path, &lines(&["continue"])));
    has_all(&told, &["exited normally"]);
    assert_eq!(vm.end(PATIENCE).code(), 3, "{told}");

    let (vm, path) = start("kill", SPIN, &["--engine", "translator"]);
    let told = said(gdb(&path, &lines(&["stepi", "kill"])));
    assert_eq!(vm.end(PATIENCE).code(), 1, "{told}");
}

/// Sends a packet of gdb's protocol.
fn send(stream: &mut UnixStream, content: &str) -> std::io::Result<()> {
    let sum = content.bytes().fold(0u8, u8::wrapping_add);
    stream.write_all(format!("${content}#{sum:02x}").as_bytes())
}

/// Sends a packet; the answer's content.
fn packet(stream: &mut UnixStream, content: &str) -> String {
    send(stream, content).unwrap();
    let mut text = String::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).unwrap_or_else(|error| panic!("{error} after {text:?} to {content}"));
        text.push(char::from(byte[0]));
        let answer = text.find('$').map(|start| &text[start + 1..]);
        if let Some((content, sum)) = answer.and_then(|answer| answer.split_once('#'))
            && sum.len() == 2
        {
            // After a detach nobody takes it.
            let _ = stream.write_all(b"+");
            return content.to_owned();
        }
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn a_debugger_that_breaks_off_hurts_nobody() {
    let (mut vm, path) = start("broken", &counter(), &["--engine", "translator"]);
    for garbage in
        [&b"GET / HTTP/1.0\r\n\r\n"[..], b"$vMustReply", b"$#00$#zz", b"\x03\x03\x03", &[0xff; 5000], b"$g#00"]
    {
        // It may be cut off while it is sent, here and below.
        let _ = connect(&path).write_all(garbage);
    }
    let _ = send(&mut connect(&path), &format!("m{}", "1".repeat(100_000)));
    for content in [
        "mzz,1",
        "m0,ffffffffffffffff",
        "M0,10:00",
        "Z9,0,1",
        "Z2,0,ffffffff",
        "P999=00",
        "Hgffffffff",
        "vCont;x",
        "G00",
    ] {
        let mut stream = connect(&path);
        let _ = send(&mut stream, content);
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let _ = stream.read(&mut [0; 100]);
    }
    // The guest has not started meanwhile, and is whole.
    assert_eq!(vm.output(), "");
    let mut stream = connect(&path);
    assert!(packet(&mut stream, "?").starts_with(['S', 'T']));
    assert_eq!(packet(&mut stream, &format!("Z0,{:x},1", next())), "OK");
    assert_eq!(packet(&mut stream, "m100000,4"), "66baf803");
    assert!(packet(&mut stream, "vCont;c").starts_with('T'));
    // Gone with a breakpoint set, while the guest is stopped: it stays so ...
    drop(stream);
    vm.wait_for("counting", PATIENCE);
    let mut stream = connect(&path);
    assert!(packet(&mut stream, "?").starts_with(['S', 'T']));
    // ... and gone while it runs: it runs on, without the breakpoint.
    assert_eq!(packet(&mut stream, "Z0,200000,1"), "OK");
    send(&mut stream, "vCont;c").unwrap();
    stream.read_exact(&mut [0]).unwrap(); // its "+"
    std::thread::sleep(Duration::from_millis(50));
    drop(stream);
    let ended = vm.end(PATIENCE);
    assert_eq!((ended.code(), ended.output.trim()), (3, "counting"), "{ended:?}");
    assert!(!ended.errors.contains("panicked"), "{ended:?}");
}

#[test]
fn only_the_debugger_resumes_what_it_stopped() {
    let (vm, path) = start("held", &counter(), &["--engine", "translator"]);
    let command = |words: &[&str]| vm::command().args(words).output().expect("anyvisor starts");
    let refused = command(&["resume", "held"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    has_all(&String::from_utf8_lossy(&refused.stderr), &["debugger"]);
    let folder = vm::runtime_folder().join("gdb-snapshot");
    let mut stream = connect(&path);
    assert_eq!(packet(&mut stream, &format!("Z0,{:x},1", next())), "OK");
    assert!(packet(&mut stream, "vCont;c").starts_with('T'));
    // A snapshot of a stopped VM knows nothing of breakpoints, and does not let it go on.
    let saved = command(&["snapshot", "held", &folder.display().to_string()]);
    assert!(saved.status.success(), "{saved:?}");
    assert_eq!(packet(&mut stream, &format!("m{:x},2", next())), "ffc3");
    assert_eq!(packet(&mut stream, "D"), "OK");
    assert_eq!(vm.end(PATIENCE).code(), 3);
    let restored = vm::run(&["run", "--restore", &folder.display().to_string(), "--engine", "translator"], PATIENCE);
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(restored.code(), 3, "{restored:?}");
}

#[test]
fn addresses_that_cannot_be_listened_at() {
    let kernel = assets::scratch("gdb-bad", &pvh(HALT)).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let file = assets::scratch("gdb-taken", b"").unwrap();
    let file = file.display().to_string();
    for (address, words) in [
        (port.as_str(), &[port.as_str(), "in use"][..]),
        (&file, &[file.as_str(), "exists"]),
        ("/no/such/folder/gdb", &["/no/such/folder/gdb"]),
        ("70000", &["70000"]),
        ("gdb", &["'gdb'", "path"]),
    ] {
        let ended = vm::run(&vm::arguments(&kernel, &["--gdb", address]), PATIENCE);
        assert_eq!(ended.code(), 2, "{address}: {ended:?}");
        assert_eq!(ended.errors.trim_end().lines().count(), 1, "{ended:?}");
        has_all(&ended.errors, words);
    }
    assert!(Path::new(&file).exists(), "another's file is removed");
}

#[test]
fn a_port_is_this_hosts_only() {
    let kernel = assets::scratch("gdb-port", &pvh(&counter())).unwrap();
    let options = ["--memory", "64M", "--debug-exit", "--engine", "translator", "--gdb", "0"];
    let vm = vm::Vm::start(&vm::arguments(&kernel, &options)).unwrap();
    waits(&vm);
    let errors = vm.errors();
    let address = errors.split("target remote ").nth(1).and_then(|rest| rest.split('\'').next()).expect("an address");
    assert!(address.starts_with("127.0.0.1:"), "{errors}");
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.write_all(b"$D#44").unwrap();
    assert_eq!(vm.end(PATIENCE).code(), 3);
}
