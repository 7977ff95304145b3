//! The host's side of sockets, with a driver that speaks for the guest.

use super::*;
use crate::virtio::driver::{Driver, fuzz};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

const CID: u64 = 42;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;

fn packet(guest: u32, host: u32, op: u16, flags: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    [CID, vsock::HOST_CID].iter().for_each(|cid| bytes.extend(cid.to_le_bytes()));
    for field in [guest, host, data.len() as u32, 1 | u32::from(op) << 16, flags, 1 << 16, 0] {
        bytes.extend(field.to_le_bytes());
    }
    [bytes, data.to_vec()].concat()
}

/// A device, a driver, and a folder for sockets.
struct Bench {
    model: VsockModel,
    driver: Driver,
    path: PathBuf,
}

impl Bench {
    fn new(name: &str) -> Bench {
        let path = std::env::temp_dir().join(format!("anyvisor-vsock-{}-{name}", std::process::id()));
        let mut model = VsockModel::new(&Address { cid: CID, path: path.clone() }).unwrap();
        let driver = Driver::new(&mut model);
        Bench { model, driver, path }
    }

    fn send(&mut self, guest: u32, host: u32, op: u16, flags: u32, data: &[u8]) {
        self.driver.send(vsock::TRANSMIT.into(), &[&packet(guest, host, op, flags, data)], &[]);
        self.driver.work(&mut self.model).unwrap();
        self.driver.used(vsock::TRANSMIT.into());
    }

    /// The next packet for the guest: its ports, what it is for, and its data.
    fn next(&mut self) -> (u32, u32, u16, Vec<u8>) {
        let used = self.driver.ask(&mut self.model, vsock::RECEIVE.into(), &[], &[44, 4096]);
        let field = |at: usize| u32::from_le_bytes(used.bytes[at..at + 4].try_into().unwrap());
        (field(20), field(16), (field(28) >> 16) as u16, used.bytes[44..].to_vec())
    }
}

#[test]
fn addresses_parse() {
    assert_eq!("3:/a:b".parse(), Ok(Address { cid: 3, path: "/a:b".into() }));
    for bad in ["", "3", "3:", "x:/a", "2:/a", "4294967295:/a", "-3:/a"] {
        let message = bad.parse::<Address>().unwrap_err();
        assert!(message.contains("vsock") && !message.contains('\n'), "{message}");
    }
}

#[test]
fn the_guest_reaches_who_listens() {
    let mut bench = Bench::new("out");
    let mut name = bench.path.clone().into_os_string();
    name.push("_80");
    bench.send(1000, 80, REQUEST, 0, b"");
    assert_eq!(bench.next(), (1000, 80, RST, vec![]), "nobody is there");
    let listener = UnixListener::bind(&name).unwrap();
    bench.send(1000, 80, REQUEST, 0, b"");
    let (mut stream, _) = listener.accept().unwrap();
    assert_eq!(bench.next(), (1000, 80, RESPONSE, vec![]));
    bench.send(1000, 80, RW, 0, b"question");
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(bench.next(), (1000, 80, RW, b"answer".to_vec()));
    // The guest sends no more; then the host goes.
    bench.send(1000, 80, SHUTDOWN, 2, b"");
    assert_eq!(stream.read(&mut bytes).unwrap(), 0);
    stream.write_all(b"last").unwrap();
    drop(stream);
    assert_eq!((bench.next().3, bench.next().2), (b"last".to_vec(), SHUTDOWN));
    bench.send(1000, 80, RST, 0, b"");
    assert!(bench.model.sockets.connections.is_empty() && bench.model.sockets.keys.is_empty());
    drop(bench);
    std::fs::remove_file(name).unwrap();
}

#[test]
fn the_host_reaches_who_listens() {
    let mut bench = Bench::new("in");
    let mut client = UnixStream::connect(&bench.path).unwrap();
    // In two parts, and more behind it.
    client.write_all(b"CONN").unwrap();
    bench.driver.work(&mut bench.model).unwrap();
    client.write_all(b"ECT 22\nearly").unwrap();
    let (guest, host, op, _) = bench.next();
    assert_eq!((guest, op), (22, REQUEST));
    bench.send(22, host, RESPONSE, 0, b"");
    assert_eq!(bench.next(), (22, host, RW, b"early".to_vec()));
    bench.send(22, host, RW, 0, b"hello");
    let expected = format!("OK {host}\nhello");
    let mut bytes = vec![0; expected.len()];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    // Refused, nonsense, too long, gone.
    let mut refused = UnixStream::connect(&bench.path).unwrap();
    refused.write_all(b"CONNECT 23\n").unwrap();
    let (guest, host, ..) = bench.next();
    bench.send(guest, host, RST, 0, b"");
    assert_eq!(refused.read(&mut [0; 9]).unwrap(), 0);
    for line in ["GET / HTTP/1.0\r\n", "CONNECT x\n", "CONNECT 4294967296\n", &"1".repeat(100)] {
        let mut client = UnixStream::connect(&bench.path).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        bench.driver.work(&mut bench.model).unwrap();
        assert!(!matches!(client.read(&mut [0; 9]), Ok(1..)), "{line}");
    }
    drop(UnixStream::connect(&bench.path).unwrap());
    bench.driver.work(&mut bench.model).unwrap();
    assert!(bench.model.sockets.undecided.is_empty());
    // Many who say nothing.
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(&bench.path).unwrap()).collect();
    bench.driver.work(&mut bench.model).unwrap();
    assert_eq!(bench.model.sockets.undecided.len(), UNDECIDED_MAX);
    drop(silent);
}

#[test]
fn a_restored_guest_is_told() {
    let mut bench = Bench::new("restored");
    bench.model.restore(&Value::Null).unwrap();
    let used = bench.driver.ask(&mut bench.model, vsock::EVENTS.into(), &[], &[8]);
    assert_eq!(used.bytes, [0; 4]);
    assert!(bench.model.restore(&Value::Bool(true)).is_err());
}

#[test]
fn hostile_queues_harm_nobody() {
    let mut bench = Bench::new("hostile");
    let mut name = bench.path.clone().into_os_string();
    name.push("_0");
    let listener = UnixListener::bind(&name).unwrap();
    listener.set_nonblocking(true).unwrap();
    let headers: Vec<_> = (0..9).map(|op| packet(1, 0, op, 0, &[7; 40])).collect();
    let taken = fuzz(&mut bench.model, &headers, 300, 1);
    assert!(taken.broken > 20 && taken.answered > 50, "{taken:?}");
    std::fs::remove_file(name).unwrap();
}
