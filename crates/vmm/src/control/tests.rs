//! The server over real sockets, for a VM that is only its [`Remote`]; clients that do not behave.

use super::*;
use crate::console::Sound;
use crate::machine;
use std::os::unix::net::SocketAddr;

/// A server without a VM: requests to the owner are never answered, unless it has ended.
struct Bench {
    server: Option<Server>,
    path: std::path::PathBuf,
    input: Arc<Input>,
    output: Arc<Output>,
    _control: machine::Control,
}

impl Bench {
    fn new(name: &str) -> Bench {
        let path = std::env::temp_dir().join(format!("anyvisor-control-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind_addr(&SocketAddr::from_pathname(&path).unwrap()).unwrap();
        let (control, remote) = machine::control();
        let identity =
            Identity { id: "t".into(), engine: "fake".into(), cpus: 3, memory: 64 << 20, version: "0".into() };
        let output = Arc::new(Output::new(Box::new(std::io::sink())).unwrap());
        let input = Input::new();
        let server = Server::start(listener, identity, remote, output.clone(), input.clone()).unwrap();
        Bench { server: Some(server), path, input, output, _control: control }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// What is answered to `bytes`, to the end of the connection.
    fn ask(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        let mut text = String::new();
        let asked = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
        // A server that turns a client away does not read what it sent, so the kernel may reset the connection.
        if let Err(error) = asked.and_then(|()| stream.read_to_string(&mut text)) {
            assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
        }
        text
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.server = None;
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Reads until `text` has come.
fn wait_for(stream: &mut UnixStream, text: &str) -> String {
    let mut got = String::new();
    let mut buffer = [0; 4096];
    while !got.contains(text) {
        let length = stream.read(&mut buffer).unwrap();
        assert!(length > 0, "no {text:?} in {got:?}");
        got += &String::from_utf8_lossy(&buffer[..length]);
    }
    got
}

#[test]
fn several_requests_on_one_connection() {
    let bench = Bench::new("keep");
    let text = bench.ask(
        b"GET / HTTP/1.1\r\n\r\nGET /machine-config HTTP/1.1\r\n\r\nPATCH /vm HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}\
          GET /anyvisor HTTP/1.1\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    );
    assert_eq!(text.matches("HTTP/1.1 ").count(), 4, "{text}");
    assert!(text.contains(r#""state":"Starting""#) && text.contains(r#""vcpu_count":3"#), "{text}");
    assert!(text.contains("400 Bad Request") && text.contains(r#""engine":"fake""#), "{text}");
}

#[test]
fn a_request_in_pieces() {
    let bench = Bench::new("pieces");
    let mut stream = bench.connect();
    for byte in b"PATCH /vm HTTP/1.1\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n" {
        stream.write_all(&[*byte]).unwrap();
    }
    wait_for(&mut stream, "100 Continue\r\n\r\n");
    stream.write_all(b"{\"state\":1").unwrap();
    assert!(wait_for(&mut stream, "}").contains("400 Bad Request"));
}

#[test]
fn a_slow_request_is_cut_off() {
    let bench = Bench::new("slow");
    let mut stream = bench.connect();
    let began = Instant::now();
    stream.write_all(b"GET / HT").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 408"), "{text}");
    assert!(began.elapsed() >= REQUEST_TIME);
}

#[test]
fn too_many_connections_are_told_so() {
    let bench = Bench::new("many");
    let mut held: Vec<_> = (0..CONNECTIONS_MAX).map(|_| bench.connect()).collect();
    let mut text = String::new();
    bench.connect().read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 503"), "{text}");
    held.pop();
    let began = Instant::now();
    while !bench.ask(b"GET / HTTP/1.1\r\n\r\n").contains("200 OK") {
        assert!(began.elapsed() < Duration::from_secs(5), "the place is not free again");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_console_goes_both_ways_and_starts_with_the_past() {
    let bench = Bench::new("console");
    "login: ".bytes().for_each(|byte| bench.output.put(byte));
    let began = Instant::now();
    let heard = bench.output.listen();
    while heard.hear(Duration::from_millis(50)) == Sound::Silence {
        assert!(began.elapsed() < Duration::from_secs(20));
    }
    let mut stream = bench.connect();
    let ask = "GET /anyvisor/console HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: anyvisor-console\r\n\r\nro";
    stream.write_all(ask.as_bytes()).unwrap();
    let text = wait_for(&mut stream, "login: ");
    assert!(text.starts_with("HTTP/1.1 101 "), "{text}");
    stream.write_all(b"ot\r").unwrap();
    let mut typed: Vec<u8> = vec![];
    while typed.len() < 5 {
        assert!(began.elapsed() < Duration::from_secs(20), "{typed:?}");
        bench.input.pull(|bytes| {
            typed.extend(bytes);
            bytes.len()
        });
    }
    assert_eq!(typed, b"root\r");
    "Password: ".bytes().for_each(|byte| bench.output.put(byte));
    wait_for(&mut stream, "Password: ");
    // Not HTTP any more, and one that only listens goes on listening.
    stream.shutdown(Shutdown::Write).unwrap();
    std::thread::sleep(2 * Duration::from_millis(250));
    bench.output.put(b'!');
    wait_for(&mut stream, "!");
    bench.output.finish();
    assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0, "the VM's end is the console's");
}

/// A client that types to a guest that does not read, or does not read itself, and goes: its place is free.
#[test]
fn stuck_consoles_let_go() {
    let bench = Bench::new("stuck");
    for _ in 0..2 * CONNECTIONS_MAX {
        let mut stream = bench.connect();
        stream.set_write_timeout(Some(Duration::from_millis(10))).unwrap();
        let ask = "GET /anyvisor/console HTTP/1.1\r\nUpgrade: anyvisor-console\r\n\r\n";
        let began = Instant::now();
        loop {
            stream.write_all(ask.as_bytes()).unwrap();
            if wait_for(&mut stream, "HTTP/1.1 ").contains("101") {
                break;
            }
            // All places are still taken by those who have gone.
            assert!(began.elapsed() < Duration::from_secs(20), "no place becomes free");
            std::thread::sleep(Duration::from_millis(20));
            stream = bench.connect();
        }
        (0..300_000).for_each(|_| bench.output.put(b'z'));
        while stream.write(&[b'k'; 4096]).is_ok() {}
    }
    let began = Instant::now();
    drop(bench);
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn the_console_must_be_asked_for_as_an_upgrade() {
    let bench = Bench::new("upgrade");
    assert!(bench.ask(b"GET /anyvisor/console HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 426"));
}

#[test]
fn a_dead_owner_is_told_and_the_server_ends_at_once() {
    let mut bench = Bench::new("dead");
    let idle = bench.connect();
    let began = Instant::now();
    bench.server = None;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    drop(idle);
}

/// Bytes that are no requests, or nearly: an answer or a closed connection, never a panic, and the server lives.
#[test]
fn random_bytes_harm_nobody() {
    let seeds: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\nExpect: 100-continue\r\n\r\n{\"state\":\"Starte\"}",
        b"PUT /snapshot/create HTTP/1.0\r\nContent-Length: 23\r\n\r\n{\"snapshot_path\":\"a/b\"}",
        b"PUT /actions HTTP/1.1\r\nConnection: close\r\ncontent-length:31\r\n\r\n{\"action_type\":\"SendCtrlAltDel\"}",
    ];
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut mutated = || {
        let mut bytes = seeds[(next() % 4) as usize].to_vec();
        for _ in 0..next() % 6 {
            let at = (next() as usize) % bytes.len();
            match next() % 5 {
                0 => bytes[at] = next() as u8,
                1 => bytes[at] ^= 1 << (next() % 8),
                2 => drop(bytes.remove(at)),
                3 => bytes.insert(at, b"\r\n\0{}[]\",:% "[(next() % 12) as usize]),
                _ => {
                    let part = bytes[at..].to_vec();
                    bytes.extend(part);
                }
            }
            if bytes.is_empty() {
                bytes.push(b'G');
            }
        }
        bytes
    };
    // The pure part, many times.
    for _ in 0..200_000 {
        let bytes = mutated();
        if let Ok(Some((head, size))) = http::parse_head(&bytes) {
            assert!(size <= bytes.len() && head.length <= http::BODY_MAX);
            let end = (size + head.length).min(bytes.len());
            let _ = understand(&head.method, &head.path, &bytes[size..end]);
        }
    }
    // The whole of it, some times. Those that would stop or pause the VM need an owner who answers.
    let bench = Bench::new("random");
    for _ in 0..1000 {
        let bytes = mutated();
        if !bytes.windows(8).any(|part| part == b"Paused\"}") {
            bench.ask(&bytes);
        }
    }
    assert!(bench.ask(b"GET / HTTP/1.1\r\n\r\n").contains("200 OK"));
}
