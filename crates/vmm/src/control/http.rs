//! HTTP/1.1 as far as a control socket needs it: requests in, JSON out (RFC 9112).
//!
//! Parsing is a pure function of the bytes received, with every size bounded; `httparse` splits the head.
//! What is not understood is refused, never guessed: two lengths, transfer codings, an odd method.

use serde_json::{Value, json};

/// Most bytes of request line and headers.
pub const HEAD_MAX: usize = 8 << 10;
/// Most bytes of a body; Firecracker's limit.
pub const BODY_MAX: usize = 51_200;
/// Most headers.
const HEADERS_MAX: usize = 64;

/// A request's line and headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub method: String,
    pub path: String,
    /// Bytes of the body.
    pub length: usize,
    /// The connection may serve another request.
    pub keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// The protocol that the client wants to go on with.
    pub upgrade: Option<String>,
}

/// A refusal, or any other failure, as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub status: u16,
    /// One line for people.
    pub message: String,
}

impl Fault {
    pub fn new(status: u16, message: impl Into<String>) -> Fault {
        Fault { status, message: message.into() }
    }
}

/// Parses the head at the start of `bytes`: the head and its size, or `None` if it is not whole yet.
///
/// # Errors
/// What is wrong; the connection is of no use after that.
pub fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, Fault> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let bounded = &bytes[..bytes.len().min(HEAD_MAX)];
    let size = match request.parse(bounded) {
        Ok(httparse::Status::Complete(size)) => size,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_MAX => return Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(Fault::new(431, format!("the headers are over {HEAD_MAX} bytes or {HEADERS_MAX} lines")));
        }
        Err(error) => return Err(Fault::new(400, format!("not an HTTP request: {error}"))),
    };
    let mut head = Head {
        method: request.method.unwrap_or_default().to_owned(),
        path: request.path.unwrap_or_default().to_owned(),
        length: 0,
        keep_alive: request.version == Some(1),
        expects_continue: false,
        upgrade: None,
    };
    let mut lengths = 0;
    for header in request.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if is("content-length") {
            lengths += 1;
            head.length = body_length(value)?;
        } else if is("transfer-encoding") {
            return Err(Fault::new(501, "transfer codings are not supported; send a Content-Length"));
        } else if is("expect") {
            head.expects_continue = value.eq_ignore_ascii_case("100-continue");
        } else if is("upgrade") {
            head.upgrade = Some(value.to_owned());
        } else if is("connection") {
            let has = |option: &str| value.split(',').any(|word| word.trim().eq_ignore_ascii_case(option));
            head.keep_alive = !has("close") && (head.keep_alive || has("keep-alive"));
        }
    }
    if lengths > 1 {
        return Err(Fault::new(400, "more than one Content-Length"));
    }
    Ok(Some((head, size)))
}

fn body_length(value: &str) -> Result<usize, Fault> {
    // No sign, no blanks: digits only (RFC 9110 8.6).
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    match value.parse::<usize>() {
        Ok(length) if digits && length <= BODY_MAX => Ok(length),
        // Too many digits for a number are too many bytes too.
        _ if digits => Err(Fault::new(413, format!("a body of {value} bytes; at most {BODY_MAX} are taken"))),
        _ => Err(Fault::new(400, format!("bad Content-Length '{value}'"))),
    }
}

/// What is sent back.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    pub status: u16,
    pub body: Option<Value>,
}

impl Response {
    /// Done, and nothing to say.
    pub fn done() -> Response {
        Response { status: 204, body: None }
    }

    pub fn json(body: Value) -> Response {
        Response { status: 200, body: Some(body) }
    }

    /// The bytes on the wire.
    pub fn to_bytes(&self, keep_alive: bool) -> Vec<u8> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut text = format!("HTTP/1.1 {} {}\r\nServer: anyvisor\r\n", self.status, reason(self.status));
        text += &format!("Connection: {connection}\r\n");
        match &self.body {
            Some(body) => {
                let body = body.to_string();
                text += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            }
            None => text += "\r\n",
        }
        text.into_bytes()
    }
}

impl From<Fault> for Response {
    /// As Firecracker reports errors.
    fn from(fault: Fault) -> Response {
        Response { status: fault.status, body: Some(json!({ "fault_message": fault.message })) }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        413 => "Content Too Large",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(text: &str) -> Option<u16> {
        parse_head(text.as_bytes()).err().map(|fault| fault.status)
    }

    #[test]
    fn a_request_of_curl() {
        let text = "PATCH /vm HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\
                    Content-Type: application/json\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}";
        let (head, size) = parse_head(text.as_bytes()).unwrap().unwrap();
        assert_eq!((head.method.as_str(), head.path.as_str(), head.length), ("PATCH", "/vm", 18));
        assert!(head.keep_alive && !head.expects_continue && head.upgrade.is_none());
        assert_eq!(&text[size..], "{\"state\":\"Paused\"}");
        for cut in 0..size {
            assert_eq!(parse_head(&text.as_bytes()[..cut]), Ok(None), "{cut} bytes");
        }
    }

    #[test]
    fn headers_that_count() {
        let head =
            |headers: &str| parse_head(format!("GET / HTTP/1.1\r\n{headers}\r\n").as_bytes()).unwrap().unwrap().0;
        assert!(!head("Connection: close\r\n").keep_alive);
        assert!(head("Expect: 100-Continue\r\ncontent-length: 3\r\n").expects_continue);
        let upgrade = head("Connection: keep-alive, Upgrade\r\nUpgrade: anyvisor-console\r\n");
        assert_eq!((upgrade.upgrade.as_deref(), upgrade.keep_alive), (Some("anyvisor-console"), true));
        let old = parse_head(b"GET / HTTP/1.0\r\n\r\n").unwrap().unwrap().0;
        assert!(!old.keep_alive);
    }

    #[test]
    fn what_is_refused() {
        let get = |headers: &str| status(&format!("GET / HTTP/1.1\r\n{headers}\r\n\r\n"));
        assert_eq!(get("Content-Length: 51201"), Some(413));
        assert_eq!(get("Content-Length: 99999999999999999999999"), Some(413));
        for bad in ["", "-1", "+1", "1 1", "0x10", "1,1"] {
            assert_eq!(get(&format!("Content-Length: {bad}")), Some(400), "{bad:?}");
        }
        assert_eq!(get("Content-Length: 1\r\nContent-Length: 1"), Some(400));
        assert_eq!(get("Transfer-Encoding: chunked"), Some(501));
        assert_eq!(get(&"A: b\r\n".repeat(65)), Some(431));
        assert_eq!(get(&format!("A: {}", "b".repeat(HEAD_MAX))), Some(431));
        assert_eq!(status(&"x".repeat(HEAD_MAX)), Some(431));
        assert_eq!(status("\u{16}\u{3}\u{1}hello"), Some(400), "TLS");
        assert_eq!(status("GET / HTTP/2.0\r\n\r\n"), Some(400));
    }

    #[test]
    fn responses() {
        let text = |response: Response| String::from_utf8(response.to_bytes(true)).unwrap();
        let fault = text(Fault::new(404, "no such \"path\"").into());
        assert!(fault.starts_with("HTTP/1.1 404 Not Found\r\n"), "{fault}");
        assert!(
            fault.ends_with("\r\nContent-Length: 36\r\n\r\n{\"fault_message\":\"no such \\\"path\\\"\"}"),
            "{fault}"
        );
        assert!(text(Response::done()).ends_with("Connection: keep-alive\r\n\r\n"));
    }
}
