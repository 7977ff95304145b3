//! A whole Debian on a disk: made by `quickstart --distro`, run by `run --disk`, used over ssh and the network.

use anyvisor_tests::{assets, vm};
use sha2::Digest;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// To make a disk; on two busy cores, too.
const MAKING: Duration = Duration::from_secs(600);
const PATIENCE: Duration = Duration::from_secs(180);

const PACKAGES: &str = "gcc,libc6-dev,python3";
/// What disks are made by, which makes others of them.
const SCRIPTS: [&str; 3] = ["configure.sh", "image.sh", "check.sh"];

/// The folder with the disk, which has just passed its self-check and is not in use.
fn machine() -> &'static Path {
    static MACHINE: OnceLock<PathBuf> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let folder = assets::root().join("crates/anyvisor/src/quickstart/distro");
        let scripts = SCRIPTS.map(|name| std::fs::read(folder.join(name)).expect("a script"));
        let digest = sha2::Sha256::digest([PACKAGES.as_bytes(), &scripts.concat()].concat());
        let name = format!("debian-{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3]);
        let folder = assets::folder().join(name);
        let shown = folder.display().to_string();
        let options = [
            "quickstart",
            "--distro",
            "--engine",
            "translator",
            "--folder",
            &shown,
            "--include",
            PACKAGES,
            "--size",
            "4G",
        ];
        let ended = vm::run(&options, MAKING);
        assert_eq!(ended.code(), 0, "{ended:?}");
        assert!(ended.output.contains("anyvisor self-check passed: "), "{ended:?}");
        assert!(ended.errors.contains("to log in: ssh -F "), "{ended:?}");
        folder
    })
}

/// A copy of the disk, as `run` shall have it.
struct Debian {
    guest: vm::Vm,
    /// The host's ports that lead to ssh and to a web server.
    ssh: u16,
    web: u16,
}

impl Debian {
    fn start(disk: &Path) -> Debian {
        let [ssh, web] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
        let (kernel, initrd) = (machine().join("vmlinuz"), machine().join("initrd.img").display().to_string());
        let (disk, net) = (disk.display().to_string(), format!("user,fwd=tcp:{ssh}:22,fwd=tcp:{web}:8000"));
        let options = ["--engine", "translator", "--memory", "1G", "--cpus", "2", "--initrd", &initrd, "--disk", &disk];
        let more = ["--net", &net, "--cmdline", "console=ttyS0 root=/dev/vda quiet"];
        let guest = vm::Vm::start(&vm::arguments(&kernel, &[&options[..], &more].concat())).expect("anyvisor starts");
        Debian { guest, ssh, web }
    }

    fn ssh(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(machine().join("ssh_config")).args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=60"]);
        ssh.args(["-p", &self.ssh.to_string(), "debian", command]).stdin(Stdio::null());
        ssh
    }

    /// What a command says that succeeds in the guest.
    fn says(&self, command: &str) -> String {
        let output = self.ssh(command).output().expect("ssh runs (is openssh-client installed?)");
        let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command}: {}\n{said}\n{errors}", output.status);
        said.trim().to_owned()
    }
}

/// Whether this host reaches one of the archives in apt's sources itself.
fn reachable(sources: &str) -> bool {
    let host = |line: &str| Some(line.split_once("http://")?.1.split(['/', ' ']).next()?.to_owned());
    let reaches = |host: &String| {
        let address = (host.as_str(), 80).to_socket_addrs().ok().and_then(|mut found| found.next());
        address.is_some_and(|address| TcpStream::connect_timeout(&address, Duration::from_secs(10)).is_ok())
    };
    sources.lines().find_map(host).as_ref().is_some_and(reaches)
}

/// What a web server of the guest's has, once it is there.
fn page(port: u16) -> String {
    let began = Instant::now();
    loop {
        let mut answer = String::new();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the port is forwarded");
        let done = stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").and_then(|()| stream.read_to_string(&mut answer));
        if done.is_ok() && !answer.is_empty() {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "no web server is there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn file_system_is_clean(disk: &Path) {
    let checked = Command::new("e2fsck").env("PATH", "/usr/sbin:/sbin").arg("-fn").arg(disk).output();
    let checked = checked.expect("e2fsck runs (is e2fsprogs installed?)");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

#[test]
fn a_debian_disk_boots_to_a_login_and_works() {
    let folder = assets::scratch_folder();
    let disk = folder.path().join("disk.img");
    let source = machine().join("disk.img");
    assets::run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(source).arg(&disk)).unwrap();
    let mut debian = Debian::start(&disk);
    debian.guest.wait_for("debian login: root (automatic login)", PATIENCE);
    debian.guest.wait_for("root@debian:~#", PATIENCE);
    debian.guest.type_in("systemctl is-system-running --wait | sed 's/^/it is /'\n").unwrap();
    debian.guest.wait_for("it is running", PATIENCE);

    assert_eq!(debian.says("hostname; id -un; nproc"), "debian\nroot\n2");
    // Nobody comes in without the key.
    let others = Command::new("ssh")
        .args([
            "-F",
            "none",
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ])
        .args(["-o", "IdentityFile=none", "-p", &debian.ssh.to_string(), "root@127.0.0.1", "true"])
        .output()
        .expect("ssh runs");
    let why = String::from_utf8_lossy(&others.stderr);
    assert!(why.contains("Permission denied (publickey)"), "{why}");

    let program = r#"printf '#include <stdio.h>\nint main(void) { double s = 0; for (int n = 1; n < 1000000; n++) s += 1.0 / n / n;
        printf("%%.6f\\n", s); return 0; }\n' >sum.c && gcc -O2 -Wall -Werror -o sum sum.c && ./sum"#;
    assert_eq!(debian.says(program), "1.644933");
    assert_eq!(
        debian.says("python3 -c 'import json, hashlib; print(json.dumps([2 ** 100, hashlib.md5(b\"\").hexdigest()]))'"),
        "[1267650600228229401496703205376, \"d41d8cd98f00b204e9800998ecf8427e\"]"
    );
    // python3 has sqlite's library; the program comes from the archive.
    let sources = debian.says("cat /etc/apt/sources.list");
    if reachable(&sources) {
        debian.says("apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends sqlite3 lighttpd");
        assert_eq!(debian.says("systemctl is-active lighttpd"), "active");
        let queries = "create table t(n integer primary key, s text);
            with recursive c(n) as (select 1 union all select n + 1 from c where n < 20000) insert into t select n, hex(n * n) from c;
            select count(*), sum(length(s)), max(s) from t where n % 3 = 0; pragma integrity_check;";
        assert_eq!(debian.says(&format!("sqlite3 base.db '{queries}'")), "6666|110244|39393938323434\nok");
    } else {
        println!("left out: apt, because this host reaches no archive of {sources}");
    }
    debian.says("cd /srv && uname -r >page && systemd-run --quiet --working-directory=/srv python3 -m http.server");
    let (page, kernel) = (page(debian.web), debian.says("uname -r"));
    assert!(page.starts_with("HTTP/1.0 200 ") && page.ends_with(&format!("\r\n\r\n{kernel}\n")), "{page}");
    assert_eq!(debian.says("dmesg | grep -c -E 'BUG:|Oops|WARNING:|Call Trace|EXT4-fs error|I/O error' || true"), "0");

    // It says so, and may be gone before ssh ends.
    let _ = debian.ssh("poweroff").output();
    let ended = debian.guest.end(PATIENCE);
    assert_eq!(ended.code(), 0, "{ended:?}");
    file_system_is_clean(&disk);
}

#[test]
fn a_disk_is_made_once_and_as_it_was_asked_for() {
    let folder = machine().display().to_string();
    let other = assets::scratch_folder();
    std::fs::write(other.path().join("precious"), "").unwrap();
    let other = other.path().display().to_string();
    for (options, part) in [
        (
            ["--folder", &folder, "--include", "nosuchpackage"],
            "was made with --include gcc,libc6-dev,python3, not nosuchpackage",
        ),
        (["--folder", &folder, "--size", "5G"], "was made with --size 4G, not 5G"),
        (["--folder", &other, "--size", "5G"], "has other things in it"),
        (["--folder", &other, "--size", "4K"], "has other things in it"),
        (["--folder", "nosuchfolder", "--size", "4K"], "a disk of 4K is too small"),
        (["--folder", "nosuchfolder", "--net", "tap=tap0"], "use user"),
    ] {
        let ended = vm::run(&[&["quickstart", "--distro"], &options[..]].concat(), PATIENCE);
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.errors.lines().last().unwrap_or_default().contains(part), "{part}\n{ended:?}");
    }
}
