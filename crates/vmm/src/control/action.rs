//! What can be asked on a control socket: method, path and body into one closed [`Action`].
//!
//! `/`, `/machine-config`, `/vm`, `/actions` and `/snapshot/create` are Firecracker's paths and mean what they
//! mean there; what it does not have lies under `/anyvisor`. See `docs/control-api.md`.

use super::http::Fault;
use crate::config::{Disk, Net};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;

/// One request, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `GET /`
    Describe,
    /// `GET /machine-config`
    MachineConfig,
    /// `PATCH /vm`
    Pause,
    /// `PATCH /vm`
    Resume,
    /// `PUT /snapshot/create`
    Snapshot { directory: PathBuf, parent: Option<PathBuf> },
    /// `GET /anyvisor`
    Details,
    /// `PUT /anyvisor/power-button`
    PressPowerButton,
    /// `PUT /anyvisor/stop`
    Stop,
    /// `GET /anyvisor/console`
    Console,
    /// `GET /anyvisor/stat`
    Statistics,
    /// `PUT /anyvisor/stat`
    Measure(bool),
    /// `GET /anyvisor/devices`
    Devices,
    /// `PUT /anyvisor/devices`
    AddDisk(Disk),
    /// `PUT /anyvisor/devices`
    AddNet(Net),
    /// `DELETE /anyvisor/devices`
    RemoveDevice(u8),
    /// `GET /balloon` and `GET /balloon/statistics`
    Balloon,
    /// `PATCH /balloon`: how many bytes it is to have.
    WantBalloon(u64),
}

/// `PATCH /vm`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmState {
    state: WantedState,
}

/// `PUT /anyvisor/stat`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Measurement {
    measure: bool,
}

/// `PUT /anyvisor/devices`: one of these.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum NewDevice {
    Disk(Disk),
    Net(Net),
}

/// `DELETE /anyvisor/devices`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OldDevice {
    slot: u8,
}

/// `PATCH /balloon`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonSize {
    amount_mib: u32,
}

#[derive(Deserialize)]
enum WantedState {
    Paused,
    Resumed,
}

/// `PUT /actions`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InstanceAction {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

/// `PUT /snapshot/create`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotParameters {
    snapshot_path: PathBuf,
    #[serde(default)]
    snapshot_type: SnapshotType,
    mem_file_path: Option<PathBuf>,
    parent_path: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
enum SnapshotType {
    #[default]
    Full,
    Diff,
}

/// Understands a request.
///
/// # Errors
/// The status and message for the client: an unknown path, a method that the path does not have, a bad body.
pub fn understand(method: &str, path: &str, body: &[u8]) -> Result<Action, Fault> {
    match (path, method) {
        ("/", "GET") => without_body(body, Action::Describe),
        ("/machine-config", "GET") => without_body(body, Action::MachineConfig),
        ("/vm", "PATCH") => Ok(match parse::<VmState>(body)?.state {
            WantedState::Paused => Action::Pause,
            WantedState::Resumed => Action::Resume,
        }),
        ("/actions", "PUT") => Err(Fault::new(
            400,
            match parse::<InstanceAction>(body)?.action_type {
                ActionType::InstanceStart => "the VM was started with its process",
                ActionType::SendCtrlAltDel => "the VM has no keyboard; use PUT /anyvisor/power-button",
                ActionType::FlushMetrics => "there are no metrics to flush",
            },
        )),
        ("/snapshot/create", "PUT") => snapshot(parse(body)?),
        ("/anyvisor", "GET") => without_body(body, Action::Details),
        ("/anyvisor/power-button", "PUT") => without_body(body, Action::PressPowerButton),
        ("/anyvisor/stop", "PUT") => without_body(body, Action::Stop),
        ("/anyvisor/console", "GET") => without_body(body, Action::Console),
        ("/anyvisor/stat", "GET") => without_body(body, Action::Statistics),
        ("/anyvisor/stat", "PUT") => Ok(Action::Measure(parse::<Measurement>(body)?.measure)),
        ("/anyvisor/devices", "GET") => without_body(body, Action::Devices),
        ("/anyvisor/devices", "PUT") => match parse(body)? {
            NewDevice::Disk(disk) if !disk.path.is_absolute() => {
                Err(Fault::new(400, format!("'{}' is not an absolute path", disk.path.display())))
            }
            NewDevice::Disk(disk) => Ok(Action::AddDisk(disk)),
            NewDevice::Net(net) => Ok(Action::AddNet(net)),
        },
        ("/anyvisor/devices", "DELETE") => Ok(Action::RemoveDevice(parse::<OldDevice>(body)?.slot)),
        ("/balloon" | "/balloon/statistics", "GET") => without_body(body, Action::Balloon),
        ("/balloon", "PATCH") => Ok(Action::WantBalloon(u64::from(parse::<BalloonSize>(body)?.amount_mib) << 20)),
        (known, _) if KNOWN.contains(&known) => Err(Fault::new(405, format!("{known} cannot be asked to {method}"))),
        _ => Err(Fault::new(404, format!("there is no {}", short(path)))),
    }
}

/// Every path.
const KNOWN: &[&str] = &[
    "/",
    "/machine-config",
    "/vm",
    "/actions",
    "/snapshot/create",
    "/anyvisor",
    "/anyvisor/power-button",
    "/anyvisor/stop",
    "/anyvisor/console",
    "/anyvisor/stat",
    "/anyvisor/devices",
    "/balloon",
    "/balloon/statistics",
];

fn snapshot(parameters: SnapshotParameters) -> Result<Action, Fault> {
    let SnapshotParameters { snapshot_path: directory, snapshot_type, mem_file_path, parent_path: parent } = parameters;
    if mem_file_path.is_some() {
        return Err(Fault::new(400, "a snapshot is one folder with the memory in it; leave mem_file_path out"));
    }
    match (snapshot_type, &parent) {
        (SnapshotType::Full, Some(_)) => return Err(Fault::new(400, "a full snapshot has no parent_path")),
        (SnapshotType::Diff, None) => {
            return Err(Fault::new(400, "a diff needs the folder of the earlier snapshot as parent_path"));
        }
        _ => {}
    }
    for path in [Some(&directory), parent.as_ref()].into_iter().flatten() {
        if !path.is_absolute() {
            return Err(Fault::new(400, format!("'{}' is not an absolute path", path.display())));
        }
    }
    Ok(Action::Snapshot { directory, parent })
}

fn without_body(body: &[u8], action: Action) -> Result<Action, Fault> {
    // Some clients send an empty object with every PUT.
    let text = body.trim_ascii();
    if text.is_empty() || text == b"{}" { Ok(action) } else { Err(Fault::new(400, "this takes no body")) }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| Fault::new(400, format!("bad body: {error}")))
}

/// The start of what a client sent, for a message.
fn short(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_understood() {
        for (method, path, body, expected) in [
            ("GET", "/", "", Action::Describe),
            ("GET", "/machine-config", "", Action::MachineConfig),
            ("PATCH", "/vm", r#"{"state":"Paused"}"#, Action::Pause),
            ("PATCH", "/vm", r#" { "state" : "Resumed" } "#, Action::Resume),
            ("GET", "/anyvisor", "", Action::Details),
            ("PUT", "/anyvisor/power-button", "{}", Action::PressPowerButton),
            ("PUT", "/anyvisor/stop", "", Action::Stop),
            ("GET", "/anyvisor/console", "", Action::Console),
            ("GET", "/anyvisor/stat", "", Action::Statistics),
            ("PUT", "/anyvisor/stat", r#"{"measure":true}"#, Action::Measure(true)),
            ("GET", "/balloon", "", Action::Balloon),
            ("GET", "/anyvisor/devices", "", Action::Devices),
            (
                "PUT",
                "/anyvisor/devices",
                r#"{"disk":{"path":"/a","read_only":true}}"#,
                Action::AddDisk("/a,ro".parse().unwrap()),
            ),
            (
                "PUT",
                "/anyvisor/devices",
                r#"{"net":"user,fwd=tcp:2222:22"}"#,
                Action::AddNet("user,fwd=tcp:2222:22".parse().unwrap()),
            ),
            ("DELETE", "/anyvisor/devices", r#"{"slot":5}"#, Action::RemoveDevice(5)),
            ("GET", "/balloon/statistics", "", Action::Balloon),
            ("PATCH", "/balloon", r#"{"amount_mib":256}"#, Action::WantBalloon(256 << 20)),
            (
                "PUT",
                "/snapshot/create",
                r#"{"snapshot_type":"Full","snapshot_path":"/tmp/s"}"#,
                Action::Snapshot { directory: "/tmp/s".into(), parent: None },
            ),
            (
                "PUT",
                "/snapshot/create",
                r#"{"snapshot_type":"Diff","snapshot_path":"/tmp/s","parent_path":"/tmp/r"}"#,
                Action::Snapshot { directory: "/tmp/s".into(), parent: Some("/tmp/r".into()) },
            ),
        ] {
            assert_eq!(understand(method, path, body.as_bytes()), Ok(expected));
        }
    }

    #[test]
    fn mistakes_are_one_line_with_a_status() {
        for (method, path, body, status, word) in [
            ("GET", "/nothing", "", 404, "/nothing"),
            ("GET", "/vm/", "", 404, "/vm/"),
            ("DELETE", "/vm", "", 405, "DELETE"),
            ("get", "/", "", 405, "get"),
            ("PATCH", "/vm", "", 400, "body"),
            ("PATCH", "/vm", "{", 400, "body"),
            ("PATCH", "/vm", r#"{"state":"Frozen"}"#, 400, "Frozen"),
            ("PATCH", "/vm", r#"{"state":"Paused","more":1}"#, 400, "more"),
            ("PATCH", "/vm", "\u{1}", 400, "body"),
            ("PUT", "/anyvisor/stop", "now", 400, "no body"),
            ("PUT", "/anyvisor/stat", r#"{"measure":1}"#, 400, "body"),
            ("PATCH", "/balloon", r#"{"amount_mib":-1}"#, 400, "body"),
            ("PUT", "/balloon", "", 405, "PUT"),
            ("PUT", "/anyvisor/devices", r#"{"disk":{"path":"a","read_only":true}}"#, 400, "absolute"),
            ("PUT", "/anyvisor/devices", r#"{"net":"bridge"}"#, 400, "unknown network 'bridge'"),
            ("PUT", "/anyvisor/devices", r#"{"net":"user","disk":{"path":"/a"}}"#, 400, "body"),
            ("PUT", "/anyvisor/devices", r#"{"fan":"user"}"#, 400, "`disk` or `net`"),
            ("PUT", "/anyvisor/devices", "{}", 400, "body"),
            ("DELETE", "/anyvisor/devices", r#"{"slot":256}"#, 400, "body"),
            ("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#, 400, "power-button"),
            ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, 400, "started"),
            ("PUT", "/actions", r#"{"action_type":"Fly"}"#, 400, "Fly"),
            ("PUT", "/snapshot/create", r#"{"snapshot_path":"s"}"#, 400, "absolute"),
            ("PUT", "/snapshot/create", r#"{"snapshot_path":"/s","mem_file_path":"/m"}"#, 400, "mem_file_path"),
            ("PUT", "/snapshot/create", r#"{"snapshot_path":"/s","snapshot_type":"Diff"}"#, 400, "parent_path"),
            ("PUT", "/snapshot/create", r#"{"snapshot_path":"/s","parent_path":"/p"}"#, 400, "parent_path"),
        ] {
            let fault = understand(method, path, body.as_bytes()).unwrap_err();
            assert_eq!(fault.status, status, "{method} {path} {body}: {fault:?}");
            assert!(fault.message.contains(word) && !fault.message.contains('\n'), "{fault:?}");
        }
    }

    #[test]
    fn every_known_path_is_served() {
        for path in KNOWN {
            assert_eq!(understand("BREW", path, b"").unwrap_err().status, 405, "{path}");
        }
    }

    #[test]
    fn deep_json_is_refused() {
        let deep = format!("{{\"state\":{}", "[".repeat(40_000));
        assert_eq!(understand("PATCH", "/vm", deep.as_bytes()).unwrap_err().status, 400);
    }
}
