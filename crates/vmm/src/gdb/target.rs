//! The VM as gdbstub sees it: every operation is a request to the owner, between two stops.

use super::registers::{self, Image, Number, X86};
use crate::machine::{Debugger, Paused, Plan, Refused};
use anyvisor_engine::{GuestDebug, HARDWARE_BREAKPOINTS, HardwareBreakpoint, Stop, Vcpu, Watch, linear};
use anyvisor_x86::VcpuState;
use anyvisor_x86::state::Activity;
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use std::num::NonZeroUsize;
use vm_memory::{Bytes, GuestAddress};

/// What gdb is told: bad address, and bad argument.
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;

/// A step or not, for those vCPUs that gdb names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
}

/// See the module.
pub struct Machine<'a> {
    debugger: &'a Debugger,
    cpus: usize,
    /// Software breakpoints, with the vCPUs whose engine took them.
    software: Vec<(u64, Vec<usize>)>,
    hardware: Vec<HardwareBreakpoint>,
    /// As gdb asked for watchpoints: it is told the same.
    watched: Vec<(HardwareBreakpoint, WatchKind, u64)>,
    actions: Vec<Option<Action>>,
    /// vCPUs without an action do not run.
    locked: bool,
}

pub fn tid(cpu: usize) -> Tid {
    NonZeroUsize::new(cpu + 1).expect("one more than something")
}

fn cpu(tid: Tid) -> usize {
    tid.get() - 1
}

type Reason = MultiThreadStopReason<u64>;

impl<'a> Machine<'a> {
    pub fn new(debugger: &'a Debugger, cpus: u32) -> Machine<'a> {
        let cpus = cpus as usize;
        Machine {
            debugger,
            cpus,
            software: vec![],
            hardware: vec![],
            watched: vec![],
            actions: vec![None; cpus],
            locked: false,
        }
    }

    /// What gdb is told about the first of the vCPUs that have stopped, if one has.
    pub fn reason(&self) -> Option<Reason> {
        let (cpu, stop) = self.debugger.stops().into_iter().next()?;
        let tid = tid(cpu);
        Some(match stop {
            Stop::Step => Reason::SignalWithThread { tid, signal: Signal::SIGTRAP },
            Stop::Software => Reason::SwBreak(tid),
            Stop::Hardware(n) => match self.hardware.get(n) {
                Some(hit) if hit.watch != Watch::Execute => {
                    let asked = self.watched.iter().find(|(breakpoint, ..)| breakpoint == hit);
                    let (kind, addr) = asked.map_or((WatchKind::Write, hit.address), |(_, kind, addr)| (*kind, *addr));
                    Reason::Watch { tid, kind, addr }
                }
                _ => Reason::HwBreak(tid),
            },
        })
    }

    /// What is told of a stop that gdb asked for.
    pub fn interrupted() -> Reason {
        Reason::SignalWithThread { tid: tid(0), signal: Signal::SIGINT }
    }

    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Paused) -> Result<T, Failure> + Send + 'static,
    ) -> TargetResult<T, Self> {
        match self.debugger.remote().with_paused(work) {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(failure)) => {
                tracing::debug!("gdb is refused something: {}", failure.why);
                Err(TargetError::Errno(failure.code))
            }
            Err(refused) => Err(TargetError::Fatal(refused)),
        }
    }

    /// What stops vCPU `cpu`, without a step.
    fn debug_of(&self, cpu: usize) -> GuestDebug {
        let software = self.software.iter().filter(|(_, cpus)| cpus.contains(&cpu)).map(|(address, _)| *address);
        GuestDebug { single_step: false, software: software.collect(), hardware: self.hardware.clone() }
    }

    /// Whether some vCPU takes each of `wanted`, by vCPU. Nothing stays in force.
    fn attempt(&self, wanted: Vec<GuestDebug>) -> TargetResult<Vec<bool>, Self> {
        self.ask(move |paused| {
            let taken: Vec<_> = paused
                .vcpus
                .iter_mut()
                .zip(&wanted)
                .map(|(vcpu, wanted)| {
                    let taken = vcpu.set_debug(wanted).map_err(Failure::invalid);
                    if let Err(Failure { why, .. }) = &taken {
                        tracing::debug!("gdb's breakpoint is refused: {why}");
                    }
                    vcpu.set_debug(&GuestDebug::default()).map_err(Failure::invalid)?;
                    Ok(taken.is_ok())
                })
                .collect::<Result<_, Failure>>()?;
            Ok(taken)
        })
    }

    fn add_hardware(&mut self, breakpoint: HardwareBreakpoint) -> TargetResult<bool, Self> {
        if self.hardware.contains(&breakpoint) {
            return Ok(true);
        }
        if self.hardware.len() == HARDWARE_BREAKPOINTS {
            return Ok(false);
        }
        self.hardware.push(breakpoint);
        let taken = self.attempt((0..self.cpus).map(|cpu| self.debug_of(cpu)).collect());
        if !matches!(&taken, Ok(taken) if taken.iter().all(|taken| *taken)) {
            self.hardware.pop();
        }
        Ok(taken?.iter().all(|taken| *taken))
    }

    fn remove_hardware(&mut self, breakpoint: HardwareBreakpoint) -> bool {
        let before = self.hardware.len();
        self.hardware.retain(|other| *other != breakpoint);
        self.hardware.len() < before
    }

    /// Lets the VM go on, for good or until a stop.
    fn plan(&self) -> Plan {
        let mut plan = Plan::default();
        for cpu in 0..self.cpus {
            let action = self.actions[cpu];
            if action.is_none() && self.locked {
                plan.held |= 1 << cpu;
            }
            plan.debug.push(GuestDebug { single_step: action == Some(Action::Step), ..self.debug_of(cpu) });
        }
        plan
    }

    fn set_action(&mut self, tid: Tid, action: Action) {
        if let Some(slot) = self.actions.get_mut(cpu(tid)) {
            *slot = Some(action);
        }
    }
}

/// Why gdb does not get something: an error number for it, and a line for the log.
struct Failure {
    code: u8,
    why: String,
}

impl Failure {
    fn invalid(why: impl ToString) -> Failure {
        Failure { code: EINVAL, why: why.to_string() }
    }
    fn unmapped(gva: u64) -> Failure {
        Failure { code: EFAULT, why: format!("no memory at {gva:#x}") }
    }
}

/// vCPU `tid`, in a machine that stands still.
fn vcpu<'a>(paused: &'a mut Paused, tid: Tid) -> Result<&'a mut Box<dyn Vcpu>, Failure> {
    let vcpu = paused.vcpus.get_mut(cpu(tid)).ok_or_else(|| Failure::invalid("no such vCPU"))?;
    Ok(&mut **vcpu)
}

fn state(paused: &mut Paused, tid: Tid) -> Result<VcpuState, Failure> {
    vcpu(paused, tid)?.state().map_err(Failure::invalid)
}

/// The parts of `length` bytes at `gva` that lie in one page, with their offsets.
fn pages(gva: u64, length: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = gva.wrapping_add(at as u64);
        let size = (0x1000 - (start & 0xfff) as usize).min(length - at);
        let part = (start, at..at + size);
        at += size;
        (size > 0).then_some(part)
    })
}

impl Target for Machine<'_> {
    type Arch = X86;
    type Error = Refused;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Refused> {
        BaseOps::MultiThread(self)
    }
    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Machine<'_> {
    fn read_registers(&mut self, registers: &mut Image, tid: Tid) -> TargetResult<(), Self> {
        *registers = self.ask(move |paused| Ok(registers::image(&state(paused, tid)?)))?;
        Ok(())
    }

    fn write_registers(&mut self, registers: &Image, tid: Tid) -> TargetResult<(), Self> {
        let image = registers.clone();
        self.ask(move |paused| {
            let mut state = state(paused, tid)?;
            registers::apply(&mut state, &image).map_err(Failure::invalid)?;
            vcpu(paused, tid)?.set_state(&state).map_err(Failure::invalid)
        })
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let length = data.len();
        let bytes = self.ask(move |paused| {
            let state = state(paused, tid)?;
            let mut bytes = vec![0; length];
            for (gva, range) in pages(start, length) {
                let from = range.start;
                let gpa = linear::physical(paused.memory, &state, gva);
                let read = gpa.map(|gpa| paused.memory.read_slice(&mut bytes[range], GuestAddress(gpa)));
                if !matches!(read, Some(Ok(()))) {
                    bytes.truncate(from);
                    break;
                }
            }
            if bytes.is_empty() && length > 0 { Err(Failure::unmapped(start)) } else { Ok(bytes) }
        })?;
        data[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    /// Read-only pages are written too, as debuggers do. Engines see changed code when the VM goes on.
    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let data = data.to_vec();
        self.ask(move |paused| {
            let state = state(paused, tid)?;
            let places: Vec<_> = pages(start, data.len())
                .map(|(gva, range)| {
                    let gpa = linear::physical(paused.memory, &state, gva);
                    let gpa = gpa
                        .filter(|&gpa| paused.memory.read_slice(&mut vec![0; range.len()], GuestAddress(gpa)).is_ok());
                    gpa.map(|gpa| (gpa, range)).ok_or_else(|| Failure::unmapped(gva))
                })
                .collect::<Result<_, _>>()?;
            for (gpa, range) in places {
                let bytes = &data[range];
                paused.memory.write_slice(bytes, GuestAddress(gpa)).map_err(Failure::invalid)?;
                paused.vm.memory_written(gpa, bytes.len() as u64);
            }
            Ok(())
        })
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Refused> {
        (0..self.cpus).for_each(|cpu| thread_is_active(tid(cpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Machine<'_> {
    fn read_register(&mut self, tid: Tid, number: Number, buffer: &mut [u8]) -> TargetResult<usize, Self> {
        let bytes = self.ask(move |paused| Ok(registers::read(&state(paused, tid)?, number)))?;
        let length = bytes.len().min(buffer.len());
        buffer[..length].copy_from_slice(&bytes[..length]);
        Ok(length)
    }

    fn write_register(&mut self, tid: Tid, number: Number, value: &[u8]) -> TargetResult<(), Self> {
        let value = value.to_vec();
        self.ask(move |paused| {
            let mut state = state(paused, tid)?;
            registers::write(&mut state, number, &value).map_err(Failure::invalid)?;
            vcpu(paused, tid)?.set_state(&state).map_err(Failure::invalid)
        })
    }
}

impl ThreadExtraInfo for Machine<'_> {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Refused> {
        let activity = self.ask(move |paused| Ok(state(paused, tid)?.activity));
        let what = match activity {
            Ok(Activity::Running) => "running",
            Ok(Activity::Halted) => "halted",
            Ok(Activity::WaitForSipi) => "not started",
            Err(TargetError::Fatal(refused)) => return Err(refused),
            Err(_) => "unknown",
        };
        let text = format!("vCPU {}, {what}", cpu(tid));
        let length = text.len().min(buffer.len());
        buffer[..length].copy_from_slice(&text.as_bytes()[..length]);
        Ok(length)
    }
}

impl MultiThreadResume for Machine<'_> {
    fn resume(&mut self) -> Result<(), Refused> {
        self.debugger.drain();
        self.debugger.go(self.plan())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Refused> {
        self.actions.fill(None);
        self.locked = false;
        Ok(())
    }

    /// A signal has no meaning to a machine.
    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Refused> {
        self.set_action(tid, Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Machine<'_> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Refused> {
        self.set_action(tid, Action::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Machine<'_> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Refused> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Machine<'_> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Machine<'_> {
    /// A vCPU in whose address space nothing is mapped there does without, as long as another takes it.
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        if self.software.iter().any(|(other, _)| *other == address) {
            return Ok(true);
        }
        let wanted = (0..self.cpus)
            .map(|cpu| {
                let mut debug = self.debug_of(cpu);
                debug.software.push(address);
                debug
            })
            .collect();
        let taken = self.attempt(wanted)?;
        let cpus: Vec<_> = (0..self.cpus).filter(|cpu| taken.get(*cpu) == Some(&true)).collect();
        if cpus.is_empty() {
            return Ok(false);
        }
        self.software.push((address, cpus));
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let before = self.software.len();
        self.software.retain(|(other, _)| *other != address);
        Ok(self.software.len() < before)
    }
}

fn execute(address: u64) -> HardwareBreakpoint {
    HardwareBreakpoint { address, length: 1, watch: Watch::Execute }
}

impl HwBreakpoint for Machine<'_> {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.add_hardware(execute(address))
    }
    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_hardware(execute(address)))
    }
}

/// A watchpoint's parts: the processor watches 1, 2, 4 or 8 bytes at a multiple of that. At most `most` of them.
fn parts(address: u64, length: u64, watch: Watch, most: usize) -> Option<Vec<HardwareBreakpoint>> {
    let end = address.checked_add(length)?;
    let (mut at, mut parts) = (address, vec![]);
    while at < end {
        let size = [8u64, 4, 2, 1].into_iter().find(|size| at.is_multiple_of(*size) && at + size <= end)?;
        parts.push(HardwareBreakpoint { address: at, length: size as u8, watch });
        at += size;
        if parts.len() > most {
            return None;
        }
    }
    (!parts.is_empty()).then_some(parts)
}

/// The processor watches no reads alone; gdb asks again whether the value has changed.
fn watch_of(kind: WatchKind) -> Watch {
    match kind {
        WatchKind::Write => Watch::Write,
        WatchKind::Read | WatchKind::ReadWrite => Watch::Access,
    }
}

impl HwWatchpoint for Machine<'_> {
    fn add_hw_watchpoint(&mut self, address: u64, length: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let free = HARDWARE_BREAKPOINTS - self.hardware.len();
        let Some(parts) = parts(address, length, watch_of(kind), free) else { return Ok(false) };
        for (n, part) in parts.iter().enumerate() {
            if !self.add_hardware(*part)? {
                for part in &parts[..n] {
                    self.remove_hardware(*part);
                }
                return Ok(false);
            }
            self.watched.push((*part, kind, address));
        }
        Ok(true)
    }

    fn remove_hw_watchpoint(&mut self, address: u64, length: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let Some(parts) = parts(address, length, watch_of(kind), HARDWARE_BREAKPOINTS) else { return Ok(false) };
        self.watched.retain(|(part, ..)| !parts.contains(part));
        Ok(parts.into_iter().all(|part| self.remove_hardware(part)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchpoints_are_cut_as_the_processor_wants_them() {
        let cut = |address, length| {
            let parts = parts(address, length, Watch::Write, 4)?;
            Some(parts.iter().map(|part| (part.address, part.length)).collect::<Vec<_>>())
        };
        assert_eq!(cut(0x1000, 8), Some(vec![(0x1000, 8)]));
        assert_eq!(cut(0x1001, 4), Some(vec![(0x1001, 1), (0x1002, 2), (0x1004, 1)]));
        assert_eq!(cut(0x1000, 32).map(|parts| parts.len()), Some(4));
        assert_eq!(cut(0x1000, 33), None);
        assert_eq!(cut(0x1000, 0), None);
        assert_eq!(cut(u64::MAX, 8), None);
    }

    #[test]
    fn accesses_are_cut_at_pages() {
        let cut = |gva, length| pages(gva, length).collect::<Vec<_>>();
        assert_eq!(cut(0x1ffe, 4), [(0x1ffe, 0..2), (0x2000, 2..4)]);
        assert_eq!(cut(0x1000, 0), []);
        assert_eq!(cut(u64::MAX, 2), [(u64::MAX, 0..1), (0, 1..2)]);
    }
}
