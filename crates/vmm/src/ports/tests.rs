//! Ends of ports on the host: pipes, sockets, files.

use super::*;
use rustix::pipe::{PipeFlags, pipe, pipe_with};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

fn port(name: &str, target: Target) -> Port {
    Port { name: name.into(), target }
}

/// A model with one port, whose end can be used directly.
fn model(target: Target) -> PortsModel {
    PortsModel::new(&[port("p", target)], None).unwrap()
}

impl PortsModel {
    /// The one port's end, with what is known of it by now.
    fn line(&mut self) -> &mut Line {
        self.watch();
        &mut self.lines[0]
    }
}

fn would_block<T: std::fmt::Debug>(result: std::io::Result<T>) -> bool {
    result.unwrap_err().kind() == ErrorKind::WouldBlock
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("anyvisor-ports-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn options_parse() {
    assert_eq!("a.b=/x y".parse(), Ok(port("a.b", Target::Socket("/x y".into()))));
    assert_eq!("a=file:b=c".parse(), Ok(port("a", Target::File("b=c".into()))));
    let long = format!("{}=x", "a".repeat(65));
    for bad in ["", "a", "=x", "a=", "a=file:", "a/b=x", "..=x", "a b=x", long.as_str()] {
        let message = bad.parse::<Port>().unwrap_err();
        assert!(!message.contains('\n') && message.contains("port"), "{message}");
    }
    let twice = [port("a", Target::File("x".into())), port("a", Target::File("y".into()))];
    assert!(check(&twice).unwrap_err().to_string().contains("--port a is given twice"));
    let many: Vec<_> = (0..31).map(|n| port(&n.to_string(), Target::File("x".into()))).collect();
    assert!(check(&many).is_err() && check(&many[..30]).is_ok());
}

/// Blocking pipes, as a shell gives them.
#[test]
fn pipes_are_never_waited_for() {
    let ((from, mut to_guest), (from_guest, to)) =
        (pipe().map(|(r, w)| (r, std::fs::File::from(w))).unwrap(), pipe().unwrap());
    let mut from_guest = std::fs::File::from(from_guest);
    let mut model = model(Target::Descriptors { input: Some(from.into()), output: Some(to.into()) });
    let mut data = [0; 100];
    assert!(would_block(model.line().read(&mut data)));
    to_guest.write_all(b"hello").unwrap();
    assert_eq!(model.line().read(&mut data).unwrap(), 5);
    assert!(would_block(model.line().read(&mut data)));
    let mut sent = 0;
    while let Ok(length) = model.line().write(&[7; 10_000]) {
        sent += length;
    }
    assert!(sent >= 4096 && model.line().is_full());
    let mut taken = vec![0; sent];
    from_guest.read_exact(&mut taken).unwrap();
    assert_eq!(model.line().write(b"x").unwrap(), 1, "there is room again");
    drop(to_guest);
    assert_eq!(model.line().read(&mut data).unwrap(), 0);
    assert!(model.line().is_open(), "it still takes bytes");
    drop(from_guest);
    assert_eq!(model.line().write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert!(!model.line().is_open());
}

#[test]
fn one_way_ports_end_with_their_descriptor() {
    let (from, to) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut model = model(Target::Descriptors { input: Some(from.into()), output: None });
    assert_eq!(model.line().write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe, "nobody hears it");
    assert!(model.line().is_open());
    drop(to);
    assert_eq!(model.line().read(&mut [0; 9]).unwrap(), 0);
    assert!(!model.line().is_open());
    assert!(model.save().unwrap_err().to_string().contains("cannot be saved"));
}

/// What is read or written by others too, and what cannot be opened anew, keeps its flags.
#[test]
fn sockets_keep_their_flags() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let descriptor = Descriptor::from(OwnedFd::from(ours.try_clone().unwrap()));
    let mut model = model(Target::Descriptors { input: Some(descriptor.clone()), output: Some(descriptor) });
    assert!(would_block(model.line().read(&mut [0; 9])));
    theirs.write_all(b"abc").unwrap();
    assert_eq!(model.line().read(&mut [0; 9]).unwrap(), 3);
    while model.line().write(&[0; 4096]).is_ok() {}
    assert!(model.line().is_full());
    assert!(!rustix::fs::fcntl_getfl(&ours).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
}

#[test]
fn files_take_what_the_guest_writes() {
    let path = folder("file").join("out");
    std::fs::write(&path, "before").unwrap();
    let mut model = model(Target::File(path.clone()));
    assert_eq!(model.line().write(b"after").unwrap(), 5);
    assert!(would_block(model.line().read(&mut [0; 9])) && model.line().is_open());
    assert_eq!(std::fs::read(&path).unwrap(), b"after");
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
}

#[test]
fn sockets_have_one_client_after_another() {
    let path = folder("socket").join("port");
    let mut model = model(Target::Socket(path.clone()));
    assert!(!model.line().is_open());
    let mut client = UnixStream::connect(&path).unwrap();
    let mut second = UnixStream::connect(&path).unwrap();
    model.line().tend(false);
    assert!(model.line().is_open());
    client.write_all(b"one").unwrap();
    second.write_all(b"two").unwrap();
    let mut data = [0; 9];
    assert_eq!(model.line().read(&mut data).unwrap(), 3);
    assert_eq!(model.line().write(b"answer").unwrap(), 6);
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    // It only listens from now on; then it goes.
    client.write_all(b"bye").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!((model.line().read(&mut data).unwrap(), model.line().read(&mut data).unwrap()), (3, 0));
    assert!(model.line().is_open());
    drop(client);
    assert_eq!(model.line().read(&mut data).unwrap(), 0);
    assert!(!model.line().is_open());
    model.line().tend(true);
    assert_eq!(model.line().read(&mut data).unwrap(), 3);
    assert_eq!(&data[..3], b"two");
    // One that leaves something that nobody wants to read.
    second.write_all(b"unread").unwrap();
    drop(second);
    model.line().tend(true);
    assert!(model.line().is_open());
    model.line().tend(false);
    assert!(!model.line().is_open());
    // The file goes with the device, and is taken over from a process that has not cleaned up.
    drop(model);
    assert!(!path.exists());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let again = self::model(Target::Socket(path.clone()));
    let message = |target| PortsModel::new(&[port("p", target)], None).map(|_| ()).unwrap_err().to_string();
    assert!(message(Target::Socket(path.clone())).contains("another program listens there"));
    drop(again);
    std::fs::write(&path, "").unwrap();
    assert!(message(Target::Socket(path.clone())).contains("no socket"));
    assert!(message(Target::File("/nonexistent/x".into())).contains("--port p"));
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
}

#[test]
fn hostile_queues_harm_nobody() {
    let message = |port: u32, what: u16, value: u16| {
        [port.to_le_bytes().as_slice(), &what.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let headers: Vec<_> = (0..8).flat_map(|what| (0..3).map(move |port| message(port, what, 1))).collect();
    let (from, to) = (std::fs::File::open("/dev/zero").unwrap(), std::fs::File::create("/dev/null").unwrap());
    let target =
        Target::Descriptors { input: Some(OwnedFd::from(from).into()), output: Some(OwnedFd::from(to).into()) };
    let mut model = PortsModel::new(&[port("a", target.clone()), port("b", target)], None).unwrap();
    let taken = crate::virtio::driver::fuzz(&mut model, &headers, 300, 1);
    assert!(taken.broken > 20 && taken.answered > 1000, "{taken:?}");
}
