//! `anyvisor device`: a VM's devices come and go while it runs.

use super::client::{SOON, Target};
use super::commands::print;
use crate::cli::{DeviceCommand, NewDevice};
use anyvisor_vmm::config::Disk;
use anyvisor_vmm::{Error, Result, snapshot};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PATH: &str = "/anyvisor/devices";
/// How long the guest may take to let go of a device.
const PATIENCE: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(100);

pub fn command(command: &DeviceCommand) -> Result<u8> {
    match command {
        DeviceCommand::List(vm) => {
            let lines = devices(&Target::find(&vm.id)?)?;
            let lines: Vec<_> = lines.iter().map(|(slot, name)| format!("{slot:>4}  {name}\n")).collect();
            print(&format!("SLOT  DEVICE\n{}", lines.concat()));
        }
        DeviceCommand::Add { id, device: NewDevice { disk, net } } => {
            let target = Target::find(id)?;
            let disk = disk.as_ref().map(|disk| Disk { path: snapshot::absolute(&disk.path), ..disk.clone() });
            let device = disk.map(|disk| json!({ "disk": disk })).or(net.as_ref().map(|net| json!({ "net": net })));
            let answer = ask(&target, "PUT", device.as_ref())?;
            print(&format!("{}\n", answer["slot"]));
        }
        DeviceCommand::Remove { id, slot } => remove(&Target::find(id)?, *slot)?,
    }
    Ok(0)
}

fn ask(target: &Target, method: &str, body: Option<&Value>) -> Result<Value> {
    let answer = target.ask(method, PATH, body, Some(SOON)).map_err(|trouble| target.error(trouble))?;
    Ok(answer.unwrap_or_default())
}

/// Slots and names.
fn devices(target: &Target) -> Result<Vec<(u64, String)>> {
    let answer = ask(target, "GET", None)?;
    let one = |device: &Value| Some((device["slot"].as_u64()?, device["name"].as_str()?.to_owned()));
    Ok(answer["devices"].as_array().into_iter().flatten().filter_map(one).collect())
}

fn remove(target: &Target, slot: u8) -> Result<()> {
    let heard = ask(target, "DELETE", Some(&json!({ "slot": slot })))?["heard"] == true;
    let begun = Instant::now();
    while devices(target)?.iter().any(|(number, _)| *number == u64::from(slot)) {
        if !heard || begun.elapsed() > PATIENCE {
            let why = match heard {
                true => "the guest has not let go of it yet; see that nothing uses it there",
                false => "the guest does not listen to such requests",
            };
            return Err(Error::host(&target.name, std::io::Error::other(format!("slot {slot}: {why}"))));
        }
        std::thread::sleep(AGAIN);
    }
    Ok(())
}
