//! The control socket: a VM as an HTTP server on a Unix socket, with Firecracker's paths where they fit.
//!
//! **Problem.** Other processes want to pause, stop, save and look at a VM; some of them are slow, broken or
//! hostile, and none may hurt it.
//!
//! **Idea.** One thread accepts, one thread serves each connection, and neither ever holds anything of the
//! VM: what it asks for goes to the owner through [`Remote`], one request after another. Bytes become a
//! [`http::Head`] and a body, both bounded; those become an [`Action`], a closed set; that is carried out here.
//! There is no state between requests.
//!
//! Invariants:
//! - Only this user and root are served (SO_PEERCRED), whatever the socket file's mode is.
//! - Connections, sizes and times are bounded: [`CONNECTIONS_MAX`], [`http::HEAD_MAX`], [`http::BODY_MAX`],
//!   [`REQUEST_TIME`], [`IDLE_TIME`].
//! - Nothing here keeps a VM from ending: the server waits for its connections a fraction of a second.

mod action;
mod console;
pub mod http;
mod snapshot;

use crate::config::check_balloon;
use crate::console::{Input, Output};
use crate::machine::{Refused, Remote};
pub use action::{Action, understand};
use http::{Fault, Head, Response};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Connections served at a time; more are told to come again.
pub const CONNECTIONS_MAX: usize = 32;
/// How long a request may take to arrive after its first byte.
pub const REQUEST_TIME: Duration = Duration::from_secs(5);
/// How long a connection may stay open between requests.
pub const IDLE_TIME: Duration = Duration::from_secs(10);
/// How long an answer may take to be taken.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long the end of the VM waits for answers under way.
const FAREWELL: Duration = Duration::from_millis(300);
/// A connection's thread needs little.
const STACK: usize = 256 << 10;

/// What a VM tells about itself.
#[derive(Clone, Debug)]
pub struct Identity {
    pub id: String,
    /// The engine's name.
    pub engine: String,
    pub cpus: u32,
    /// RAM in bytes.
    pub memory: u64,
    /// Of the program.
    pub version: String,
}

/// A running server. Dropping it ends it.
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

/// What the threads share.
struct Shared {
    listener: UnixListener,
    identity: Identity,
    started: Instant,
    remote: Remote,
    output: Arc<Output>,
    input: Arc<Input>,
    closing: AtomicBool,
    connections: Mutex<Vec<Connection>>,
    /// A connection has ended.
    changed: Condvar,
}

/// One that is open.
struct Connection {
    number: u64,
    stream: UnixStream,
}

impl Server {
    /// Serves the VM behind `remote` on `listener`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        listener: UnixListener,
        identity: Identity,
        remote: Remote,
        output: Arc<Output>,
        input: Arc<Input>,
    ) -> std::io::Result<Server> {
        let shared = Arc::new(Shared {
            listener,
            identity,
            started: Instant::now(),
            remote,
            output,
            input,
            closing: AtomicBool::new(false),
            connections: Mutex::default(),
            changed: Condvar::new(),
        });
        let for_thread = shared.clone();
        let builder = std::thread::Builder::new().name("control".into()).stack_size(STACK);
        let acceptor = builder.spawn(move || accept(&for_thread))?;
        Ok(Server { shared, acceptor: Some(acceptor) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.closing.store(true, Ordering::SeqCst);
        // Wakes the acceptor. It cannot fail on a listening socket, and if it did the process would end it.
        let _ = rustix::net::shutdown(&shared.listener, rustix::net::Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let connections = shared.connections();
        for connection in connections.iter() {
            // No more requests; answers under way go out.
            let _ = connection.stream.shutdown(Shutdown::Read);
        }
        drop(shared.changed.wait_timeout_while(connections, FAREWELL, |open| !open.is_empty()));
    }
}

impl Shared {
    /// The list stays valid whatever a panicking holder did.
    fn connections(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }
}

fn accept(shared: &Arc<Shared>) {
    for number in 0.. {
        let stream = match shared.listener.accept() {
            _ if shared.is_closing() => return,
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors or memory, most likely; connections wait meanwhile.
                tracing::warn!("the control socket cannot accept a connection: {error}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if let Err(why) = admit(shared, number, stream) {
            // Not a warning: anybody could fill the terminal with those.
            tracing::info!("the control socket refuses a connection: {why}");
        }
    }
}

/// Gives `stream` a thread.
fn admit(shared: &Arc<Shared>, number: u64, stream: UnixStream) -> std::io::Result<()> {
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    let (peer, own) = (peer.uid, rustix::process::geteuid());
    if peer != own && !peer.is_root() {
        let what = format!("user {} may not control a VM of user {}", peer.as_raw(), own.as_raw());
        return Err(std::io::Error::new(ErrorKind::PermissionDenied, what));
    }
    let mut connections = shared.connections();
    if connections.len() >= CONNECTIONS_MAX {
        drop(connections);
        let busy = Fault::new(503, format!("{CONNECTIONS_MAX} connections are open; close one"));
        // Never waits: a new socket's buffer is empty.
        return (&stream).write_all(&Response::from(busy).to_bytes(false));
    }
    connections.push(Connection { number, stream: stream.try_clone()? });
    drop(connections);
    let guard = Guard { shared: shared.clone(), number };
    let builder = std::thread::Builder::new().name("control-client".into()).stack_size(STACK);
    builder.spawn(move || {
        if let Err(error) = serve(&guard.shared, &stream) {
            tracing::debug!("a client of the control socket: {error}");
        }
    })?;
    Ok(())
}

/// Takes the connection off the list, however its thread ends.
struct Guard {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.connections().retain(|connection| connection.number != self.number);
        self.shared.changed.notify_all();
    }
}

/// Serves one connection to its end.
fn serve(shared: &Arc<Shared>, stream: &UnixStream) -> std::io::Result<()> {
    let mut received = Vec::new();
    loop {
        let (head, body) = match receive(stream, &mut received) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(Trouble::Io(error)) => return Err(error),
            Err(Trouble::Fault(fault)) => {
                answer(stream, &fault.into(), false)?;
                return Ok(());
            }
        };
        tracing::debug!(method = head.method, path = head.path, "control");
        let keep_alive = head.keep_alive && !shared.is_closing();
        match understand(&head.method, &head.path, &body) {
            Ok(Action::Console) if head.upgrade.as_deref() == Some(console::PROTOCOL) => {
                return console::serve(shared, stream, &received);
            }
            Ok(Action::Stop) => {
                // First, because the process may end before an answer after it.
                answer(stream, &Response::done(), keep_alive)?;
                shared.remote.stop();
            }
            Ok(action) => {
                let response = carry_out(shared, action).unwrap_or_else(Response::from);
                answer(stream, &response, keep_alive)?;
            }
            Err(fault) => answer(stream, &fault.into(), keep_alive)?,
        }
        if !keep_alive {
            return Ok(());
        }
    }
}

fn answer(mut stream: &UnixStream, response: &Response, keep_alive: bool) -> std::io::Result<()> {
    stream.write_all(&response.to_bytes(keep_alive))
}

enum Trouble {
    Io(std::io::Error),
    /// The client is told, and the connection closed.
    Fault(Fault),
}

/// Receives a request, which begins with what is in `received` already, and leaves there what follows it.
/// `None` if the client has gone or was idle too long.
fn receive(mut stream: &UnixStream, received: &mut Vec<u8>) -> Result<Option<(Head, Vec<u8>)>, Trouble> {
    let mut deadline = None;
    let mut head: Option<(Head, usize)> = None;
    loop {
        if head.is_none() {
            head = http::parse_head(received).map_err(Trouble::Fault)?;
            if let Some((head, size)) = &head
                && head.expects_continue
                && received.len() < size + head.length
            {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").map_err(Trouble::Io)?;
            }
        }
        if let Some((head, size)) = head.take_if(|(head, size)| received.len() >= *size + head.length) {
            let rest = received.split_off(size + head.length);
            let body = std::mem::replace(received, rest).split_off(size);
            return Ok(Some((head, body)));
        }
        if !received.is_empty() && deadline.is_none() {
            deadline = Some(Instant::now() + REQUEST_TIME);
        }
        let left = deadline.map_or(IDLE_TIME, |at| at.saturating_duration_since(Instant::now()));
        let late = || Trouble::Fault(Fault::new(408, format!("the request did not arrive within {REQUEST_TIME:?}")));
        if left.is_zero() {
            return Err(late());
        }
        stream.set_read_timeout(Some(left)).map_err(Trouble::Io)?;
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(None),
            Ok(length) => received.extend_from_slice(&chunk[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return if received.is_empty() { Ok(None) } else { Err(late()) };
            }
            Err(error) => return Err(Trouble::Io(error)),
        }
    }
}

fn carry_out(shared: &Shared, action: Action) -> Result<Response, Fault> {
    let remote = &shared.remote;
    Ok(match action {
        Action::Describe => Response::json(describe(shared)),
        Action::MachineConfig => Response::json(machine_config(&shared.identity)),
        Action::Details => Response::json(details(shared)),
        Action::Pause => {
            remote.pause()?;
            Response::done()
        }
        Action::Resume => {
            remote.resume()?;
            Response::done()
        }
        Action::PressPowerButton => Response::json(json!({ "enabled": remote.press_power_button()? })),
        Action::Snapshot { directory, parent } => Response::json(snapshot::save(remote, directory, parent)?),
        Action::Statistics => Response::json(statistics(remote)),
        Action::Measure(on) => {
            remote.measure(on)?;
            Response::done()
        }
        Action::Devices => {
            let devices = remote.devices()?;
            let devices: Vec<_> = devices.iter().map(|d| json!({ "slot": d.slot, "name": d.name })).collect();
            Response::json(json!({ "devices": devices }))
        }
        Action::AddDisk(disk) => Response::json(json!({ "slot": remote.add_disk(disk)? })),
        Action::AddNet(net) => Response::json(json!({ "slot": remote.add_net(net)? })),
        Action::RemoveDevice(slot) => Response::json(json!({ "heard": remote.remove_device(slot)? })),
        Action::Balloon => {
            let lent = remote.balloon()?;
            let mut answer = lent.describe();
            answer["amount_mib"] = json!(lent.wanted >> 20);
            Response::json(answer)
        }
        Action::WantBalloon(bytes) => {
            check_balloon(bytes, shared.identity.memory).map_err(|error| Fault::new(400, error.to_string()))?;
            remote.want_balloon(bytes)?;
            Response::done()
        }
        Action::Console => {
            return Err(Fault::new(426, format!("ask with Connection: Upgrade and Upgrade: {}", console::PROTOCOL)));
        }
        Action::Stop => unreachable!("is answered before it is carried out"),
    })
}

impl From<Refused> for Fault {
    fn from(refused: Refused) -> Fault {
        let status = match refused {
            Refused::Ended => 410,
            Refused::State(_) => 409,
            Refused::Failed(_) => 500,
        };
        Fault::new(status, refused.to_string())
    }
}

/// Firecracker's InstanceInfo.
fn describe(shared: &Shared) -> Value {
    let identity = &shared.identity;
    json!({
        "app_name": "anyvisor",
        "id": identity.id,
        "state": shared.remote.state().name(),
        "vmm_version": identity.version,
    })
}

/// Firecracker's MachineConfiguration.
fn machine_config(identity: &Identity) -> Value {
    json!({ "vcpu_count": identity.cpus, "mem_size_mib": identity.memory >> 20, "smt": false })
}

fn details(shared: &Shared) -> Value {
    let identity = &shared.identity;
    json!({
        "id": identity.id,
        "pid": std::process::id(),
        "engine": identity.engine,
        "vcpus": identity.cpus,
        "memory_bytes": identity.memory,
        "state": shared.remote.state().name(),
        "uptime_ms": u64::try_from(shared.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "version": identity.version,
    })
}

/// What has intercepted guest code, by vCPU and kind: kinds that took the most time first.
pub fn statistics(remote: &Remote) -> Value {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let tallies = remote.tallies();
    let vcpus: Vec<_> = tallies
        .iter()
        .flatten()
        .enumerate()
        .map(|(cpu, tally)| {
            let events: Vec<_> = tally
                .read()
                .into_iter()
                .map(|(event, counts)| {
                    json!({
                        "event": event,
                        "samples": counts.samples,
                        "time_ns": nanoseconds(counts.time),
                        "min_ns": nanoseconds(counts.min),
                        "max_ns": nanoseconds(counts.max),
                    })
                })
                .collect();
            json!({ "vcpu": cpu, "elapsed_ns": nanoseconds(tally.elapsed()), "events": events })
        })
        .collect();
    json!({ "measuring": tallies.is_some(), "vcpus": vcpus })
}

#[cfg(test)]
mod tests;
