//! The other end of a control socket: finds a VM and asks it.

use super::runtime::{self, Handle, Life, Place};
use anyvisor_vmm::{Error, Result};
use serde_json::Value;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a VM may take to what it does at once.
pub const SOON: Duration = Duration::from_secs(15);
/// Most bytes of an answer.
const ANSWER_MAX: usize = 1 << 20;

/// A VM that lived when it was found.
#[derive(Debug)]
pub struct Target {
    /// As the user named it.
    pub name: String,
    place: Place,
    handle: Handle,
}

/// Why there was no answer.
#[derive(Debug)]
pub enum Trouble {
    /// The VM said no: status and message.
    Fault(u16, String),
    /// There is no connection (any more).
    Gone(std::io::Error),
    /// No answer came in time.
    Late,
}

impl Target {
    /// The VM called `name`, or the one whose control socket is at `name`, if that has a slash.
    ///
    /// # Errors
    /// There is none, which is the user's mistake.
    pub fn find(name: &str) -> Result<Target> {
        let place = if name.contains('/') {
            Place::of_socket(Path::new(name))
        } else {
            let id = runtime::check_id(name).map_err(Error::User)?;
            let folder = runtime::find_folder().map_err(|e| Error::host("cannot use the runtime folder", e))?;
            Place::of_id(&folder, &id)
        };
        let life = runtime::look(&place)
            .map_err(|e| Error::user(format!("cannot look after VM '{name}': {}: {e}", place.lock.display())))?;
        match life {
            Life::Alive(handle) => Ok(Target { name: name.to_owned(), place, handle }),
            Life::Dead { pid } => {
                let by = pid.map_or(String::new(), |pid| format!(" (process {pid})"));
                Err(Error::user(format!("VM '{name}'{by} is dead; what it left is removed now")))
            }
            Life::None => Err(Error::user(format!("no VM '{name}' is running; anyvisor ps lists those that are"))),
        }
    }

    /// The process, for messages.
    pub fn pid(&self) -> Option<u32> {
        self.handle.pid
    }

    pub fn has_ended(&self) -> bool {
        self.handle.has_ended()
    }

    /// Waits at most for `patience` until the VM's process has ended; whether it has.
    pub fn wait_for_end(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if self.has_ended() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
    }

    /// Asks the VM; the answer's body, if it has one.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        patience: Option<Duration>,
    ) -> std::result::Result<Option<Value>, Trouble> {
        let mut stream = self.connect(patience)?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: anyvisor\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).map_err(classify)?;
        let (status, body, _) = receive(&mut stream)?;
        let body = serde_json::from_slice::<Value>(&body).ok();
        if status < 300 {
            return Ok(body);
        }
        let message = body.as_ref().and_then(|body| body["fault_message"].as_str());
        Err(Trouble::Fault(status, message.map_or(format!("status {status}"), ToOwned::to_owned)))
    }

    /// A connection that is the VM's console now, and what has come of it already.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub fn console(&self) -> std::result::Result<(UnixStream, Vec<u8>), Trouble> {
        let mut stream = self.connect(Some(SOON))?;
        let request = "GET /anyvisor/console HTTP/1.1\r\nHost: anyvisor\r\n\
                       Connection: Upgrade\r\nUpgrade: anyvisor-console\r\n\r\n";
        stream.write_all(request.as_bytes()).map_err(classify)?;
        match receive(&mut stream)? {
            (101, _, rest) => {
                stream.set_read_timeout(None).map_err(Trouble::Gone)?;
                Ok((stream, rest))
            }
            (status, body, _) => {
                let text = String::from_utf8_lossy(&body).into_owned();
                Err(Trouble::Fault(status, text))
            }
        }
    }

    fn connect(&self, patience: Option<Duration>) -> std::result::Result<UnixStream, Trouble> {
        let stream = UnixStream::connect(&self.place.socket).map_err(Trouble::Gone)?;
        stream.set_read_timeout(patience).map_err(Trouble::Gone)?;
        stream.set_write_timeout(Some(SOON)).map_err(Trouble::Gone)?;
        Ok(stream)
    }

    /// As an error for the user, about this VM.
    pub fn error(&self, trouble: Trouble) -> Error {
        let name = &self.name;
        match trouble {
            Trouble::Fault(400..=408, message) => Error::user(format!("{name}: {message}")),
            Trouble::Fault(_, message) => Error::host(name, std::io::Error::other(message)),
            Trouble::Gone(_) if self.has_ended() => Error::host(name, std::io::Error::other("the VM has ended")),
            Trouble::Gone(error) => {
                let socket = self.place.socket.display();
                Error::host(format!("{name}: cannot talk to its control socket '{socket}'"), error)
            }
            Trouble::Late => {
                let pid = self.pid().map_or("its process".into(), |pid| format!("process {pid}"));
                let why = format!("the VM does not answer; {pid} may be stopped (kill -CONT) or very busy");
                Error::host(name, std::io::Error::other(why))
            }
        }
    }
}

fn classify(error: std::io::Error) -> Trouble {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Trouble::Late,
        _ => Trouble::Gone(error),
    }
}

/// An answer: its status, its body, and what has come after it.
type Answer = (u16, Vec<u8>, Vec<u8>);

/// Receives an answer.
fn receive(stream: &mut UnixStream) -> std::result::Result<Answer, Trouble> {
    let mut bytes = vec![];
    let mut chunk = [0; 4096];
    loop {
        if let Some(answer) = parse(&bytes)? {
            return Ok(answer);
        }
        match stream.read(&mut chunk) {
            Ok(0) => return Err(Trouble::Gone(ErrorKind::UnexpectedEof.into())),
            Ok(length) => bytes.extend_from_slice(&chunk[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(classify(error)),
        }
        if bytes.len() > ANSWER_MAX {
            return Err(Trouble::Gone(std::io::Error::other("the answer is too long")));
        }
    }
}

/// The answer at the start of `bytes`, if it is whole.
fn parse(bytes: &[u8]) -> std::result::Result<Option<Answer>, Trouble> {
    let strange = |why: String| Trouble::Gone(std::io::Error::other(format!("it does not speak HTTP: {why}")));
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let size = match response.parse(bytes).map_err(|error| strange(error.to_string()))? {
        httparse::Status::Complete(size) => size,
        httparse::Status::Partial => return Ok(None),
    };
    let status = response.code.unwrap_or_default();
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = match length {
        None => 0,
        Some(header) => std::str::from_utf8(header.value)
            .ok()
            .and_then(|text| text.parse::<usize>().ok())
            .ok_or_else(|| strange("its Content-Length is no number".into()))?,
    };
    if length > ANSWER_MAX {
        return Err(strange(format!("an answer of {length} bytes")));
    }
    let rest = &bytes[size..];
    Ok((rest.len() >= length).then(|| (status, rest[..length].to_vec(), rest[length..].to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        let text = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}more";
        let (status, body, rest) = parse(text).unwrap().unwrap();
        assert_eq!((status, body.as_slice(), rest.as_slice()), (200, &b"{}"[..], &b"more"[..]));
        for cut in 0..text.len() - 4 {
            assert!(parse(&text[..cut]).unwrap().is_none(), "{cut} bytes");
        }
        let upgraded = parse(b"HTTP/1.1 101 Switching Protocols\r\n\r\nlogin:").unwrap().unwrap();
        assert_eq!(upgraded, (101, vec![], b"login:".to_vec()));
        for bad in [
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
