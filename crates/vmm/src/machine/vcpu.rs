//! The thread that drives one vCPU.

use super::{Board, End, Notify, lock};
use crate::{confine, dump};
use anyvisor_engine::{Exit, Vcpu};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vm_memory::GuestMemoryMmap;

/// A vCPU, locked by its thread while it runs and by the owner while it is paused.
pub(super) type SharedVcpu = Arc<Mutex<Box<dyn Vcpu>>>;

/// Starts the thread of vCPU `cpu`. It ends with the VM, or ends the VM.
pub(super) fn spawn(
    cpu: usize,
    vcpu: SharedVcpu,
    board: Arc<Board>,
    memory: GuestMemoryMmap,
    notify: Arc<Notify>,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("vcpu{cpu}")).spawn(move || {
        let guard = PanicGuard { cpu, notify: &notify };
        if let Err(error) = confine::this_thread() {
            tracing::warn!("vCPU {cpu} runs with all system calls, for this host takes no filter: {error}");
        }
        while notify.gate.pass(cpu) {
            let mut vcpu = lock(&vcpu);
            let end = match vcpu.run(&*board) {
                Ok(Exit::Kicked) => continue,
                Ok(Exit::Debug(stop)) => {
                    notify.stopped(cpu, stop);
                    continue;
                }
                Ok(Exit::Shutdown) => End::TripleFault(match vcpu.state() {
                    Ok(state) => dump::vcpu(cpu, &state, &memory),
                    Err(error) => format!("vCPU {cpu}: {error}"),
                }),
                Ok(Exit::Failed(why)) => End::Failed(match vcpu.state() {
                    Ok(state) => format!("vCPU {cpu}: {why}\n{}", dump::vcpu(cpu, &state, &memory)),
                    Err(error) => format!("vCPU {cpu}: {why}; {error}"),
                }),
                Err(error) => End::Failed(format!("vCPU {cpu}: {error}")),
            };
            notify.end(end);
        }
        drop(guard);
    })
}

/// Ends the VM if the thread panics.
struct PanicGuard<'a> {
    cpu: usize,
    notify: &'a Notify,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.notify.end(End::Failed(format!("vCPU {}: internal error, see above; please report it", self.cpu)));
        }
    }
}
