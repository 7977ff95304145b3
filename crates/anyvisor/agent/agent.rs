//! The first process of a guest of `anyvisor exec`: makes the guest's root of the host's, runs the command, passes its
//! streams on, and tells how it ended.
//!
//! **Idea.** One static program of a few kilobytes without a library, compiled by the build script and put into the initramfs:
//! the guest needs no shell and no busybox, and is at the command some milliseconds after the kernel is done. What to do is in
//! `/plan`, a list of texts that each end with a zero; the first byte says what the text is ([`Plan`]).
//!
//! **Streams.** The command has pipes, or a terminal; this process copies between them and the files of the channel
//! (`anyvisor_vmm::share::channel`). Input has a process of its own, for reading it waits. When the command has ended, what is
//! left in the pipes is passed on, then its status. Processes that it left behind are not waited for.
//!
//! **Errors** before the command runs go to the console, where the host looks for [`COMPLAINT`].
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::ffi::CStr;

/// What a line on the console begins with that says why the command cannot be run.
const COMPLAINT: &str = "anyvisor-agent: ";

// The kernel's numbers (x86-64).
mod call {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const OPEN: usize = 2;
    pub const CLOSE: usize = 3;
    pub const POLL: usize = 7;
    pub const IOCTL: usize = 16;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const DUP2: usize = 33;
    pub const SOCKET: usize = 41;
    pub const FORK: usize = 57;
    pub const EXECVE: usize = 59;
    pub const EXIT: usize = 60;
    pub const WAIT4: usize = 61;
    pub const FCNTL: usize = 72;
    pub const CHDIR: usize = 80;
    pub const MKDIR: usize = 83;
    pub const UNLINK: usize = 87;
    pub const SYMLINK: usize = 88;
    pub const SETUID: usize = 105;
    pub const SETGID: usize = 106;
    pub const SETSID: usize = 112;
    pub const SETGROUPS: usize = 116;
    pub const CHROOT: usize = 161;
    pub const SYNC: usize = 162;
    pub const MOUNT: usize = 165;
    pub const REBOOT: usize = 169;
    pub const SETHOSTNAME: usize = 170;
    pub const SIGNALFD4: usize = 289;
    pub const PIPE2: usize = 293;
    pub const FINIT_MODULE: usize = 313;
}

const ENOENT: isize = -2;
const EINTR: isize = -4;
const EAGAIN: isize = -11;
const EEXIST: isize = -17;

const O_RDONLY: usize = 0;
const O_WRONLY: usize = 1;
const O_RDWR: usize = 2;
const O_NOCTTY: usize = 0o400;
const O_NONBLOCK: usize = 0o4000;
const O_CLOEXEC: usize = 0o2000000;
const MS_RDONLY: usize = 1;
const MS_NOSUID: usize = 2;
const MS_NODEV: usize = 4;
const MS_NOEXEC: usize = 8;
const MS_MOVE: usize = 8192;

/// Bytes that are passed on at a time, and that a pipe holds.
const CHUNK: usize = 64 << 10;
const PIPE: usize = 1 << 20;
/// Most bytes of a plan: as much as a command's arguments and environment can be, and some.
const PLAN_MAX: usize = 3 << 20;
/// Most arguments, or variables of the environment.
const LIST_MAX: usize = 1 << 16;

static mut PLAN: [u8; PLAN_MAX] = [0; PLAN_MAX];
static mut ARGUMENTS: [*const u8; LIST_MAX + 1] = [core::ptr::null(); LIST_MAX + 1];
static mut ENVIRONMENT: [*const u8; LIST_MAX + 1] = [core::ptr::null(); LIST_MAX + 1];
static mut BUFFER: [u8; CHUNK] = [0; CHUNK];

/// A system call.
///
/// # Safety
/// As that call says: what it is told the address of must be there.
unsafe fn system(number: usize, a: usize, b: usize, c: usize, d: usize, e: usize) -> isize {
    let result;
    // SAFETY: the kernel's convention; it keeps all registers but those named.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            in("r8") e, out("rcx") _, out("r11") _, options(nostack));
    }
    result
}

/// A system call whose arguments are numbers, so that it touches no memory of ours.
fn plain(number: usize, a: usize, b: usize, c: usize) -> isize {
    // SAFETY: the callers below pass no addresses.
    unsafe { system(number, a, b, c, 0, 0) }
}

/// A system call about a path.
fn of_path(number: usize, path: &CStr, b: usize, c: usize) -> isize {
    // SAFETY: the path ends with a zero, and the call only reads it.
    unsafe { system(number, path.as_ptr() as usize, b, c, 0, 0) }
}

fn open(path: &CStr, flags: usize) -> isize {
    of_path(call::OPEN, path, flags | O_CLOEXEC, 0)
}

fn close(fd: usize) {
    plain(call::CLOSE, fd, 0, 0);
}

fn read(fd: usize, to: &mut [u8]) -> isize {
    loop {
        // SAFETY: the kernel writes no more than the buffer has.
        let result = unsafe { system(call::READ, fd, to.as_mut_ptr() as usize, to.len(), 0, 0) };
        if result != EINTR {
            return result;
        }
    }
}

/// Writes all of it; false if the other end is gone.
fn write_all(fd: usize, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        // SAFETY: the kernel reads no more than the buffer has.
        match unsafe { system(call::WRITE, fd, bytes.as_ptr() as usize, bytes.len(), 0, 0) } {
            EINTR => {}
            done if done > 0 => bytes = &bytes[done as usize..],
            _ => return false,
        }
    }
    true
}

fn mount(what: &CStr, place: &CStr, kind: &CStr, flags: usize, options: &CStr) -> isize {
    let [what, place, kind, options] = [what, place, kind, options].map(|text| text.as_ptr() as usize);
    // SAFETY: texts that end with a zero.
    unsafe { system(call::MOUNT, what, place, kind, flags, options) }
}

/// A number in decimal, at the end of `room`.
fn decimal(mut number: usize, room: &mut [u8; 24]) -> &[u8] {
    let mut at = room.len();
    loop {
        at -= 1;
        room[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &room[at..];
        }
    }
}

/// Says why it cannot go on, and ends the guest.
fn fail(what: &str, which: &CStr, error: isize) -> ! {
    let console = open(c"/dev/console", O_WRONLY | O_NOCTTY);
    let console = if console < 0 { 1 } else { console as usize };
    let mut room = [0; 24];
    for part in [COMPLAINT.as_bytes(), what.as_bytes(), b" ", which.to_bytes(), b": error "] {
        write_all(console, part);
    }
    write_all(console, decimal(error.unsigned_abs(), &mut room));
    write_all(console, b"\n");
    end()
}

/// Powers off.
fn end() -> ! {
    loop {
        // SAFETY: numbers only (LINUX_REBOOT_MAGIC1, MAGIC2, CMD_POWER_OFF).
        unsafe { system(call::REBOOT, 0xfee1_dead, 672_274_793, 0x4321_fedc, 0, 0) };
    }
}

fn must(what: &str, which: &CStr, result: isize) -> usize {
    if result < 0 {
        fail(what, which, result);
    }
    result as usize
}

/// What the host wants, each a text.
struct Plan {
    folder: &'static CStr,
    host: &'static CStr,
    /// Rows and columns of the terminal, if the command gets one.
    terminal: Option<(u16, u16)>,
    user: Option<(usize, usize)>,
    /// Shares can be written to.
    sync: bool,
    /// There is a network card.
    network: bool,
    arguments: usize,
    variables: usize,
}

/// The texts of the plan.
fn texts() -> impl Iterator<Item = (u8, &'static CStr)> {
    // SAFETY: nobody writes to it after `read_plan`.
    let mut rest: &'static [u8] = unsafe { &*core::ptr::addr_of!(PLAN) };
    core::iter::from_fn(move || {
        let (kind, text) = rest.split_first().filter(|(kind, _)| **kind != 0)?;
        let text = CStr::from_bytes_until_nul(text).ok()?;
        rest = &rest[text.to_bytes().len() + 2..];
        Some((*kind, text))
    })
}

/// The first number of a text, and the rest.
fn number(text: &[u8]) -> (usize, &[u8]) {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let value = text[..digits].iter().fold(0usize, |value, digit| value * 10 + usize::from(digit - b'0'));
    (value, text.get(digits + 1..).unwrap_or_default())
}

fn pair(text: &CStr) -> (usize, usize) {
    let (first, rest) = number(text.to_bytes());
    (first, number(rest).0)
}

fn read_plan() -> Plan {
    let file = must("cannot open", c"/plan", open(c"/plan", O_RDONLY));
    // SAFETY: the only process, and nothing refers to it yet.
    let room: &mut [u8] = unsafe { &mut *core::ptr::addr_of_mut!(PLAN) };
    let mut length = 0;
    while length < PLAN_MAX - 1 {
        match read(file, &mut room[length..PLAN_MAX - 1]) {
            more if more > 0 => length += more as usize,
            _ => break,
        }
    }
    close(file);
    let mut plan =
        Plan { folder: c"/", host: c"anyvisor", terminal: None, user: None, sync: false, network: false, arguments: 0, variables: 0 };
    for (kind, text) in texts() {
        // SAFETY: one process with one thread; the lists are read after this.
        let (arguments, variables) =
            unsafe { (&mut *core::ptr::addr_of_mut!(ARGUMENTS), &mut *core::ptr::addr_of_mut!(ENVIRONMENT)) };
        match kind {
            b'd' => plan.folder = text,
            b'h' => plan.host = text,
            b't' => plan.terminal = Some((pair(text).0 as u16, pair(text).1 as u16)),
            b'u' => plan.user = Some(pair(text)),
            b'w' => plan.sync = true,
            b'n' => plan.network = true,
            b'a' if plan.arguments < LIST_MAX => {
                arguments[plan.arguments] = text.as_ptr().cast();
                plan.arguments += 1;
            }
            b'e' if plan.variables < LIST_MAX => {
                variables[plan.variables] = text.as_ptr().cast();
                plan.variables += 1;
            }
            _ => {}
        }
    }
    plan
}

/// Loads the kernel's modules, in the plan's order.
fn load_modules() {
    for (_, path) in texts().filter(|(kind, _)| *kind == b'm') {
        let file = must("cannot open module", path, open(path, O_RDONLY));
        // SAFETY: a file and a text.
        let result = unsafe { system(call::FINIT_MODULE, file, c"".as_ptr() as usize, 0, 0, 0) };
        if result != EEXIST {
            must("cannot load module", path, result);
        }
        close(file);
    }
}

/// Makes the root: the host's, which nothing changes, under a layer in memory; and what a system has there.
fn make_root() {
    let none = c"";
    must("cannot mount the host's root by", c"virtiofs", mount(c"anyvisor-root", c"/lower", c"virtiofs", MS_RDONLY, none));
    must("cannot mount", c"tmpfs", mount(c"tmpfs", c"/upper", c"tmpfs", 0, c"size=75%,mode=755"));
    of_path(call::MKDIR, c"/upper/files", 0o755, 0);
    of_path(call::MKDIR, c"/upper/work", 0o755, 0);
    let layers = c"lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work";
    must("cannot mount the root by", c"overlay", mount(c"root", c"/new", c"overlay", 0, layers));
    let safe = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    for (kind, place, flags, options) in [
        (c"proc", c"/new/proc", safe, none),
        (c"sysfs", c"/new/sys", safe, none),
        (c"devtmpfs", c"/new/dev", MS_NOSUID, none),
        (c"tmpfs", c"/new/run", MS_NOSUID | MS_NODEV, c"mode=755"),
        (c"devpts", c"/new/dev/pts", MS_NOSUID | MS_NOEXEC, c"ptmxmode=666,mode=620,gid=5"),
        (c"tmpfs", c"/new/dev/shm", MS_NOSUID | MS_NODEV, none),
        (c"cgroup2", c"/new/sys/fs/cgroup", safe, none),
        (c"debugfs", c"/new/sys/kernel/debug", safe, none),
        (c"tracefs", c"/new/sys/kernel/tracing", safe, none),
        (c"bpf", c"/new/sys/fs/bpf", safe, none),
    ] {
        of_path(call::MKDIR, place, 0o755, 0);
        // What a kernel lacks of these, its commands do without.
        mount(kind, place, kind, flags, options);
    }
    for (target, link) in [
        (c"/proc/self/fd", c"/new/dev/fd"),
        (c"/proc/self/fd/0", c"/new/dev/stdin"),
        (c"/proc/self/fd/1", c"/new/dev/stdout"),
        (c"/proc/self/fd/2", c"/new/dev/stderr"),
    ] {
        of_path(call::SYMLINK, target, link.as_ptr() as usize, 0);
    }
}

/// Mounts the shares that are named in the plan: a tag and, in the next text, where.
fn mount_shares() {
    let mut tag = c"";
    for (kind, text) in texts() {
        match kind {
            b's' => tag = text,
            b'p' => _ = must("cannot mount a share at", text, mount(tag, text, c"virtiofs", 0, c"")),
            _ => {}
        }
    }
}

fn change_root() {
    must("cannot enter", c"/new", of_path(call::CHDIR, c"/new", 0, 0));
    must("cannot move", c"/new", mount(c".", c"/", c"", MS_MOVE, c""));
    must("cannot change the root to", c"/new", of_path(call::CHROOT, c".", 0, 0));
    of_path(call::CHDIR, c"/", 0, 0);
}

/// Gives the guest its own address and, with a `network`, the one that its host has for it (docs/networks.md).
fn set_up_network(network: bool) {
    const SIOCADDRT: usize = 0x890b;
    const SIOCSIFFLAGS: usize = 0x8914;
    const SIOCSIFADDR: usize = 0x8916;
    const SIOCSIFNETMASK: usize = 0x891c;
    const AF_INET: u8 = 2;
    const UP: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];
    let address = |bytes: [u8; 4]| [AF_INET, 0, 0, 0, bytes[0], bytes[1], bytes[2], bytes[3]];
    let socket = plain(call::SOCKET, AF_INET.into(), 2, 0);
    if socket < 0 {
        return;
    }
    let ask = |number: usize, request: &[u8]| {
        // SAFETY: the kernel reads the structure, of as many bytes.
        unsafe { system(call::IOCTL, socket as usize, number, request.as_ptr() as usize, 0, 0) }
    };
    let set = |card: &[u8], number: usize, value: [u8; 8]| {
        // struct ifreq: a name, and flags or an address.
        let mut request = [0u8; 40];
        request[..card.len()].copy_from_slice(card);
        request[16..24].copy_from_slice(&value);
        ask(number, &request)
    };
    set(b"lo", SIOCSIFFLAGS, UP);
    if network {
        must("cannot find the network card", c"eth0", set(b"eth0", SIOCSIFADDR, address([10, 0, 2, 15])));
        set(b"eth0", SIOCSIFNETMASK, address([255, 255, 255, 0]));
        set(b"eth0", SIOCSIFFLAGS, UP);
        // struct rtentry: where to, by way of whom, a mask, and flags (RTF_UP, RTF_GATEWAY).
        let mut route = [0u8; 120];
        for (at, to) in [(8, [0; 4]), (24, [10, 0, 2, 2]), (40, [0; 4])] {
            route[at..at + 8].copy_from_slice(&address(to));
        }
        route[56] = 3;
        ask(SIOCADDRT, &route);
        name_server();
    }
    close(socket as usize);
}

/// Has names looked up by the network's own server. The host's file may be a link to what is not here.
fn name_server() {
    const O_CREAT: usize = 0o100;
    of_path(call::UNLINK, c"/etc/resolv.conf", 0, 0);
    let file = of_path(call::OPEN, c"/etc/resolv.conf", O_WRONLY | O_CREAT | O_CLOEXEC, 0o644);
    if file >= 0 {
        write_all(file as usize, b"nameserver 10.0.2.3\n");
        close(file as usize);
    }
}

fn pipe() -> [usize; 2] {
    let mut ends = [0i32; 2];
    // SAFETY: the kernel writes two descriptors.
    must("cannot make", c"a pipe", unsafe { system(call::PIPE2, ends.as_mut_ptr() as usize, O_CLOEXEC, 0, 0, 0) });
    const F_SETPIPE_SZ: usize = 1031;
    plain(call::FCNTL, ends[0] as usize, F_SETPIPE_SZ, PIPE);
    ends.map(|end| end as usize)
}

/// The ends of the command's streams: its own, and ours. A terminal's output has both.
struct Streams {
    theirs: [usize; 3],
    input: usize,
    output: usize,
    error: Option<usize>,
}

fn terminal_size(terminal: usize, rows: u16, columns: u16) {
    const TIOCSWINSZ: usize = 0x5414;
    let size = [rows, columns, 0, 0];
    // SAFETY: the kernel reads a winsize.
    unsafe { system(call::IOCTL, terminal, TIOCSWINSZ, size.as_ptr() as usize, 0, 0) };
}

fn terminal(rows: u16, columns: u16) -> Streams {
    const TIOCGPTN: usize = 0x8004_5430;
    const TIOCSPTLCK: usize = 0x4004_5431;
    let main = must("cannot open", c"/dev/ptmx", open(c"/dev/ptmx", O_RDWR | O_NOCTTY));
    let (mut n, unlocked) = (0u32, 0u32);
    // SAFETY: the kernel reads and writes numbers.
    unsafe {
        system(call::IOCTL, main, TIOCSPTLCK, core::ptr::addr_of!(unlocked) as usize, 0, 0);
        system(call::IOCTL, main, TIOCGPTN, core::ptr::addr_of_mut!(n) as usize, 0, 0);
    }
    let mut name = *b"/dev/pts/\0\0\0\0\0\0\0\0\0\0\0";
    let mut room = [0; 24];
    let digits = decimal(n as usize, &mut room);
    name[9..9 + digits.len()].copy_from_slice(digits);
    let name = CStr::from_bytes_until_nul(&name).unwrap_or(c"/dev/pts/0");
    let theirs = must("cannot open", name, open(name, O_RDWR | O_NOCTTY));
    terminal_size(main, rows, columns);
    Streams { theirs: [theirs; 3], input: main, output: main, error: None }
}

fn pipes() -> Streams {
    let ([their_input, input], [output, their_output], [error, their_error]) = (pipe(), pipe(), pipe());
    Streams { theirs: [their_input, their_output, their_error], input, output, error: Some(error) }
}

/// In a process of its own: passes what comes in on, until it ends or nobody reads it.
fn pump_input(from: usize, to: usize, terminal: bool) -> ! {
    // SAFETY: this process has the buffer to itself.
    let buffer: &mut [u8] = unsafe { &mut *core::ptr::addr_of_mut!(BUFFER) };
    let mut filled = 0;
    loop {
        let length = read(from, &mut buffer[filled..]);
        if length <= 0 {
            plain(call::EXIT, 0, 0, 0);
        }
        if !terminal {
            if !write_all(to, &buffer[..length as usize]) {
                plain(call::EXIT, 0, 0, 0);
            }
            continue;
        }
        filled += length as usize;
        filled = pass_messages(to, buffer, filled);
    }
}

/// Carries whole messages out: a kind (0: keys, 1: rows and columns), a length in two bytes, and as many. Returns how much is
/// left, at the buffer's start.
fn pass_messages(to: usize, buffer: &mut [u8], filled: usize) -> usize {
    let mut at = 0;
    while let [kind, low, high, rest @ ..] = &buffer[at..filled] {
        let length = usize::from(*low) | usize::from(*high) << 8;
        let Some(content) = rest.get(..length) else { break };
        match (*kind, content) {
            (1, [a, b, c, d]) => terminal_size(to, u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d])),
            _ => _ = write_all(to, content),
        }
        at += 3 + length;
    }
    buffer.copy_within(at..filled, 0);
    filled - at
}

/// In the command's process.
fn become_command(plan: &Plan, streams: &Streams) -> ! {
    const TIOCSCTTY: usize = 0x540e;
    plain(call::SETSID, 0, 0, 0);
    if plan.terminal.is_some() {
        plain(call::IOCTL, streams.theirs[0], TIOCSCTTY, 0);
    }
    for (fd, theirs) in streams.theirs.into_iter().enumerate() {
        plain(call::DUP2, theirs, fd, 0);
    }
    block_child_signal(false);
    if let Some((user, group)) = plan.user {
        plain(call::SETGROUPS, 0, 0, 0);
        plain(call::SETGID, group, 0, 0);
        plain(call::SETUID, user, 0, 0);
    }
    let entered = of_path(call::CHDIR, plan.folder, 0, 0);
    if entered < 0 {
        complain(plan.folder, ": the guest cannot enter this folder\n");
        plain(call::EXIT, 126, 0, 0);
    }
    let error = run();
    let name = texts().find(|(kind, _)| *kind == b'a').map_or(c"", |(_, text)| text);
    complain(name, if error == ENOENT { ": command not found\n" } else { ": cannot be run\n" });
    plain(call::EXIT, if error == ENOENT { 127 } else { 126 }, 0, 0);
    end()
}

fn complain(which: &CStr, what: &str) {
    for part in [b"anyvisor: ", which.to_bytes(), what.as_bytes()] {
        write_all(2, part);
    }
}

/// Replaces this process by the command, found by the plan's PATH. Returns why not.
fn run() -> isize {
    // SAFETY: both end with a null, and their texts with a zero.
    let execute = |path: *const u8| unsafe {
        let (arguments, environment) = (core::ptr::addr_of!(ARGUMENTS), core::ptr::addr_of!(ENVIRONMENT));
        system(call::EXECVE, path as usize, arguments as usize, environment as usize, 0, 0)
    };
    let Some((_, name)) = texts().find(|(kind, _)| *kind == b'a') else { return ENOENT };
    let name = name.to_bytes();
    if name.contains(&b'/') {
        return execute(name.as_ptr());
    }
    let paths = texts().find_map(|(kind, text)| text.to_bytes().strip_prefix(b"PATH=").filter(|_| kind == b'e'));
    let paths = paths.unwrap_or(b"/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin");
    let mut result = ENOENT;
    for folder in paths.split(|byte| *byte == b':') {
        let mut path = [0u8; 4096];
        let (end, length) = (folder.len(), folder.len() + 1 + name.len());
        if name.is_empty() || length >= path.len() {
            continue;
        }
        path[..end].copy_from_slice(folder);
        path[end] = b'/';
        path[end + 1..length].copy_from_slice(name);
        // A part that is empty is the current folder.
        let error = execute(path[usize::from(folder.is_empty())..].as_ptr());
        if error != ENOENT && error != -20 {
            result = error;
        }
    }
    result
}

const CHILD_SIGNAL: u64 = 1 << (17 - 1);

fn block_child_signal(blocked: bool) {
    let set = CHILD_SIGNAL;
    // SAFETY: the kernel reads eight bytes.
    unsafe { system(call::RT_SIGPROCMASK, usize::from(!blocked), core::ptr::addr_of!(set) as usize, 0, 8, 0) };
}

#[repr(C)]
struct PollFd {
    fd: i32,
    events: i16,
    happened: i16,
}

/// Passes on what there is now; false at its end.
fn pass(from: usize, to: usize) -> bool {
    // SAFETY: this process has one thread, and the buffer is used nowhere else in it.
    let buffer: &mut [u8] = unsafe { &mut *core::ptr::addr_of_mut!(BUFFER) };
    match read(from, buffer) {
        EAGAIN => true,
        length if length > 0 => write_all(to, &buffer[..length as usize]),
        _ => false,
    }
}

/// Passes all on that is there.
fn drain(from: usize, to: usize) {
    // SAFETY: as in `pass`.
    let buffer: &mut [u8] = unsafe { &mut *core::ptr::addr_of_mut!(BUFFER) };
    loop {
        let length = read(from, buffer);
        if length <= 0 || !write_all(to, &buffer[..length as usize]) {
            return;
        }
    }
}

/// Takes processes that have ended; the command's wait status, if it has.
fn reap(command: isize) -> Option<u32> {
    const NO_WAITING: usize = 1;
    let mut found = None;
    loop {
        let mut status = 0u32;
        // SAFETY: the kernel writes a status.
        let process = unsafe { system(call::WAIT4, usize::MAX, core::ptr::addr_of_mut!(status) as usize, NO_WAITING, 0, 0) };
        if process <= 0 {
            return found;
        }
        if process == command {
            found = Some(status);
        }
    }
}

/// Passes output on until the command has ended; its wait status.
fn attend(command: isize, streams: &Streams, output: usize, error: usize) -> u32 {
    const POLLIN: i16 = 1;
    let set = CHILD_SIGNAL;
    // SAFETY: the kernel reads eight bytes.
    let signals = unsafe {
        let flags = O_CLOEXEC | O_NONBLOCK;
        system(call::SIGNALFD4, usize::MAX, core::ptr::addr_of!(set) as usize, 8, flags, 0)
    };
    const F_SETFL: usize = 4;
    let mut ways = [(streams.output, output), (streams.error.unwrap_or(usize::MAX), error)];
    for (from, _) in ways {
        plain(call::FCNTL, from, F_SETFL, O_NONBLOCK | if streams.error.is_none() { O_RDWR } else { 0 });
    }
    loop {
        let waited = |fd: usize| PollFd { fd: fd as i32, events: POLLIN, happened: 0 };
        let mut fds = [waited(signals as usize), waited(ways[0].0), waited(ways[1].0)];
        // SAFETY: three entries. Negative descriptors are passed over.
        unsafe { system(call::POLL, fds.as_mut_ptr() as usize, 3, usize::MAX, 0, 0) };
        for (way, fd) in ways.iter_mut().zip(&fds[1..]) {
            if fd.happened != 0 && !pass(way.0, way.1) {
                // Whoever writes there is told, and a terminal stays for its input.
                if streams.error.is_some() {
                    close(way.0);
                }
                way.0 = usize::MAX;
            }
        }
        if fds[0].happened != 0 {
            read(signals as usize, &mut [0; 128]);
            if let Some(status) = reap(command) {
                ways.iter().for_each(|(from, to)| drain(*from, *to));
                return status;
            }
        }
    }
}

fn tell(file: usize, status: u32) {
    let (kind, value): (&[u8], u32) =
        if status & 0x7f == 0 { (b"exit ", status >> 8 & 0xff) } else { (b"signal ", status & 0x7f) };
    let mut room = [0; 24];
    let digits = decimal(value as usize, &mut room);
    let mut text = [0; 40];
    text[..kind.len()].copy_from_slice(kind);
    text[kind.len()..kind.len() + digits.len()].copy_from_slice(digits);
    write_all(file, &text[..kind.len() + digits.len()]);
}

fn main() -> ! {
    let plan = read_plan();
    load_modules();
    must("cannot mount the channel by", c"virtiofs", mount(c"anyvisor-channel", c"/channel", c"virtiofs", 0, c""));
    let [input, output, error, status] = [
        (c"/channel/input", O_RDONLY),
        (c"/channel/output", O_WRONLY),
        (c"/channel/error", O_WRONLY),
        (c"/channel/status", O_WRONLY),
    ]
    .map(|(path, flags)| must("cannot open", path, open(path, flags)));
    make_root();
    change_root();
    mount_shares();
    set_up_network(plan.network);
    of_path(call::SETHOSTNAME, plan.host, plan.host.to_bytes().len(), 0);
    block_child_signal(true);
    let streams = match plan.terminal {
        Some((rows, columns)) => terminal(rows, columns),
        None => pipes(),
    };
    let command = plain(call::FORK, 0, 0, 0);
    if command == 0 {
        become_command(&plan, &streams);
    }
    must("cannot start", c"a process", command);
    streams.theirs.into_iter().for_each(close);
    if plain(call::FORK, 0, 0, 0) == 0 {
        // A terminal's output is its input too.
        if let Some(error) = streams.error {
            close(streams.output);
            close(error);
        }
        pump_input(input, streams.input, plan.terminal.is_some());
    }
    if streams.error.is_some() {
        close(streams.input);
    }
    let ended = attend(command, &streams, output, error);
    if plan.sync {
        plain(call::SYNC, 0, 0, 0);
    }
    tell(status, ended);
    end()
}

// The stack begins as the kernel leaves it: aligned, and without a return address.
global_asm!(".globl _start", "_start:", "xor %ebp, %ebp", "and $-16, %rsp", "call {main}", "ud2", main = sym start, options(att_syntax));

extern "C" fn start() -> ! {
    main()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    fail("internal error in", c"the agent", 0)
}

/// What the compiler calls for copies and comparisons.
mod memory {
    use core::arch::asm;

    /// # Safety
    /// C's.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
        // SAFETY: the caller's ranges.
        unsafe {
            asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") length => _, options(nostack))
        };
        to
    }

    /// # Safety
    /// C's.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= length {
            // SAFETY: copying upwards does not overwrite what is yet to be read.
            return unsafe { memcpy(to, from, length) };
        }
        // SAFETY: the caller's ranges, from their ends; the direction flag is put back.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rdi") to.add(length).sub(1) => _,
                inout("rsi") from.add(length).sub(1) => _, inout("rcx") length => _, options(nostack))
        };
        to
    }

    /// # Safety
    /// C's.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, length: usize) -> *mut u8 {
        // SAFETY: the caller's range.
        unsafe {
            asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") length => _, options(nostack))
        };
        to
    }

    /// # Safety
    /// C's.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, length: usize) -> i32 {
        for i in 0..length {
            // SAFETY: within the caller's ranges.
            let (a, b) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    /// # Safety
    /// C's.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, length: usize) -> i32 {
        // SAFETY: the caller's ranges.
        unsafe { memcmp(a, b, length) }
    }

    /// # Safety
    /// C's.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn strlen(text: *const u8) -> usize {
        let mut length = 0;
        // SAFETY: it ends with a zero.
        while unsafe { text.add(length).read_volatile() } != 0 {
            length += 1;
        }
        length
    }

    // Nothing unwinds: panics end the guest. The core library's tables name these all the same.
    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}
    #[unsafe(no_mangle)]
    extern "C" fn _Unwind_Resume() -> ! {
        super::end()
    }
}
