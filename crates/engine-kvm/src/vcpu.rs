//! One vCPU: its run loop, and the 8259's interrupts.
//!
//! **Instruction boundaries.** After an exit for I/O the instruction is half done: KVM completes it at the
//! start of the next `KVM_RUN`. Before the loop returns it therefore runs once more with `immediate_exit`,
//! which completes the instruction and does not enter the guest. An instruction may need several such exits
//! (a string, an access across pages); each is served.
//!
//! **The 8259.** Its vector is injected the way a state is set, as an event that is being delivered, rather
//! than by KVM_INTERRUPT, because a vector given by the latter can be seen nowhere until it is delivered,
//! and would be missing in a snapshot. It happens only when KVM says that the guest accepts interrupts, which
//! includes LINT0, and that nothing else is half delivered.

use crate::debug::Debug;
use crate::host_error;
use crate::kick::{Held, Shared, reason};
use crate::state;
use crate::vm::VmShared;
use anyvisor_engine::tally::{Meter, Tally, event};
use anyvisor_engine::{Exit, GuestDebug, GuestIo, Kicker, Result, Stop, Vcpu};
use anyvisor_x86::{Cpuid, VcpuState};
use kvm_bindings as kvm;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;

/// A vCPU of the KVM engine.
pub(crate) struct KvmVcpu {
    pub fd: VcpuFd,
    pub id: u32,
    pub table: Cpuid,
    pub vm: Arc<VmShared>,
    pub shared: Arc<Shared>,
    /// What stops it for a debugger.
    pub debug: Debug,
    meter: Meter,
    /// An instruction waits to be completed by the next `KVM_RUN`.
    unfinished: bool,
}

/// What an exit from the guest asks for.
enum After {
    /// To go on.
    Continue,
    /// To go on, which completes the instruction.
    Unfinished,
    Return(Exit),
    /// To find out whose debug exception it was.
    Debug(kvm::kvm_debug_exit_arch),
    /// To find out what went wrong inside KVM.
    InternalError,
    UnknownExit,
}

impl KvmVcpu {
    /// A vCPU in the state after reset.
    pub fn new(fd: VcpuFd, id: u32, table: Cpuid, vm: Arc<VmShared>, shared: Arc<Shared>) -> Result<KvmVcpu> {
        let signature = table.get(1, 0).unwrap_or_default().eax;
        let mut vcpu =
            KvmVcpu { fd, id, table, vm, shared, debug: Debug::default(), meter: Meter::default(), unfinished: false };
        vcpu.set_state(&VcpuState::reset(id, signature))?;
        Ok(vcpu)
    }

    /// Whether the 8259 wants an interrupt delivered here.
    fn pic_waits(&self) -> bool {
        self.id == 0 && self.vm.pic_intr()
    }

    /// Delivers the 8259's interrupt, if there is one and the guest takes it now; else asks to be told when.
    fn offer_pic_interrupt(&mut self, io: &dyn GuestIo) -> Result<()> {
        self.shared.take(reason::PIC);
        let waits = self.pic_waits();
        let accepts = waits && !self.unfinished && self.shared.accepts_interrupt();
        if accepts {
            let mut events = self.fd.get_vcpu_events().map_err(|e| host_error("reading a vCPU's events", e))?;
            // Kernels before 5.10 accept an interrupt while another event is half delivered.
            if events.interrupt.injected | events.exception.injected | events.exception.pending | events.nmi.injected
                == 0
            {
                self.shared.set_interrupt_window(false);
                let Some(vector) = io.acknowledge_pic() else { return Ok(()) };
                events.interrupt = kvm::kvm_vcpu_events__bindgen_ty_2 { injected: 1, nr: vector, soft: 0, shadow: 0 };
                return self.inject(&mut events);
            }
        }
        self.shared.set_interrupt_window(waits);
        Ok(())
    }

    fn inject(&mut self, events: &mut kvm::kvm_vcpu_events) -> Result<()> {
        events.flags = 0;
        self.fd.set_vcpu_events(events).map_err(|e| host_error("injecting an interrupt", e))?;
        self.shared.expect_no_interrupt();
        // An event that is being delivered does not by itself end a halt.
        let activity = self.fd.get_mp_state().map_err(|e| host_error("reading a vCPU's activity", e))?;
        if activity.mp_state == kvm::KVM_MP_STATE_HALTED {
            let running = kvm::kvm_mp_state { mp_state: kvm::KVM_MP_STATE_RUNNABLE };
            self.fd.set_mp_state(running).map_err(|e| host_error("waking a vCPU", e))?;
        }
        Ok(())
    }

    /// Tells the machine of EOIs that KVM has taken and not reported yet: it does so only when it is about to enter
    /// the guest, which is too late for one who reads the state now.
    fn tell_ends(&mut self, io: &dyn GuestIo) -> Result<()> {
        while self.vm.awaits_end() {
            self.shared.set_immediate_exit(false);
            let held = Held::new(&self.fd)?;
            let result = self.fd.run();
            drop(held);
            match result {
                Ok(VcpuExit::IoapicEoi(vector)) => {
                    self.vm.end_of_interrupt(vector);
                    io.eoi(vector);
                }
                Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr) => {}
                Ok(exit) => unreachable!("KVM did not enter the guest, and returned {exit:?}"),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Ok(()),
                Err(error) => return Err(host_error("running a vCPU", error)),
            }
        }
        Ok(())
    }

    /// Runs the guest until its next exit.
    fn enter(&mut self, io: &dyn GuestIo) -> Result<After> {
        let finish = self.unfinished && (self.shared.has(reason::KICK) || self.pic_waits() || self.debug.steps());
        if finish {
            self.shared.set_immediate_exit(true);
        } else if !self.shared.enter() {
            return Ok(if self.unfinished { After::Unfinished } else { After::Continue });
        }
        let result = self.fd.run();
        self.shared.leave();
        match result {
            Ok(exit) => {
                let (began, kind) = (self.meter.start(), kind(&exit));
                let after = serve(exit, &self.shared, &self.vm, io);
                self.meter.stop(began, kind);
                Ok(after)
            }
            // KVM's emulator does not stop behind an access to a device that is stepped.
            Err(error) if error.errno() == libc::EINTR && finish && self.debug.steps() => {
                Ok(After::Return(Exit::Debug(Stop::Step)))
            }
            // Interrupted, or an application processor's INIT or start-up IPI has come.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(After::Continue),
            Err(error) => Err(host_error("running a vCPU", error)),
        }
    }

    /// What KVM says about its own failure.
    fn internal_error(&mut self) -> String {
        // SAFETY: the last exit was for an internal error, and all its fields are plain numbers.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let data = &error.data[..(error.ndata as usize).min(error.data.len())];
        match error.suberror {
            kvm::KVM_INTERNAL_ERROR_EMULATION => {
                let code = instruction(data).map_or_else(String::new, |code| format!(" ({code})"));
                format!("KVM cannot emulate an instruction{code}")
            }
            kvm::KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met two exceptions at once".into(),
            kvm::KVM_INTERNAL_ERROR_DELIVERY_EV => format!("KVM failed to deliver an event (data {data:x?})"),
            kvm::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                format!("the processor left the guest for a reason KVM does not know (data {data:x?})")
            }
            other => format!("KVM failed with internal error {other} (data {data:x?})"),
        }
    }

    fn unknown_exit(&mut self) -> String {
        // SAFETY: the last exit was KVM_EXIT_UNKNOWN; the field is a plain number.
        let reason = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.hw.hardware_exit_reason };
        format!("the processor left the guest for a reason KVM does not handle ({reason:#x})")
    }
}

/// The bytes of the instruction that an emulation failure tells of, if it does (struct `emulation_failure` of
/// Linux' kvm.h: flags, then a count and 15 bytes).
fn instruction(data: &[u64]) -> Option<String> {
    let (&flags, bytes) = data.split_first()?;
    if flags & u64::from(kvm::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) == 0 || bytes.len() < 2 {
        return None;
    }
    let bytes: Vec<u8> = bytes.iter().flat_map(|word| word.to_le_bytes()).collect();
    let count = usize::from(bytes[0]).min(15);
    let text: Vec<_> = bytes[1..=count].iter().map(|byte| format!("{byte:02x}")).collect();
    Some(text.join(" "))
}

/// What a tally calls an exit.
fn kind(exit: &VcpuExit) -> &'static str {
    match exit {
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => event::IO_PORT,
        VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => event::MMIO,
        VcpuExit::IoapicEoi(_) => event::END_OF_INTERRUPT,
        VcpuExit::IrqWindowOpen => event::INTERRUPT_WINDOW,
        VcpuExit::Intr => event::SIGNAL,
        VcpuExit::Debug(_) => event::DEBUG,
        _ => "end",
    }
}

/// Serves what the guest left for.
fn serve(exit: VcpuExit, shared: &Shared, vm: &VmShared, io: &dyn GuestIo) -> After {
    match exit {
        VcpuExit::IoIn(port, data) => {
            data.chunks_exact_mut(shared.io_size()).for_each(|element| io.pio_read(port, element));
            After::Unfinished
        }
        VcpuExit::IoOut(port, data) => {
            data.chunks_exact(shared.io_size()).for_each(|element| io.pio_write(port, element));
            After::Unfinished
        }
        VcpuExit::MmioRead(gpa, data) => {
            io.mmio_read(gpa, data);
            After::Unfinished
        }
        VcpuExit::MmioWrite(gpa, data) => {
            io.mmio_write(gpa, data);
            After::Unfinished
        }
        VcpuExit::IoapicEoi(vector) => {
            vm.end_of_interrupt(vector);
            io.eoi(vector);
            After::Continue
        }
        VcpuExit::IrqWindowOpen | VcpuExit::Intr => After::Continue,
        VcpuExit::Debug(event) => After::Debug(event),
        VcpuExit::Shutdown => After::Return(Exit::Shutdown),
        VcpuExit::InternalError => After::InternalError,
        VcpuExit::Unknown => After::UnknownExit,
        VcpuExit::FailEntry(reason, _) => {
            After::Return(Exit::Failed(format!("the processor refused to enter the guest (reason {reason:#x})")))
        }
        VcpuExit::MemoryFault { gpa, size, .. } => {
            After::Return(Exit::Failed(format!("KVM cannot access {size} bytes of guest memory at {gpa:#x}")))
        }
        other => After::Return(Exit::Failed(format!("KVM returned an exit that nobody asked for: {other:?}"))),
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, io: &dyn GuestIo) -> Result<Exit> {
        loop {
            if !self.unfinished && self.shared.has(reason::KICK) {
                self.tell_ends(io)?;
                self.shared.take(reason::KICK);
                return Ok(Exit::Kicked);
            }
            if self.id == 0 {
                self.offer_pic_interrupt(io)?;
            }
            let after = self.enter(io)?;
            self.unfinished = matches!(after, After::Unfinished);
            match after {
                After::Continue | After::Unfinished => {}
                After::Return(exit) => return Ok(exit),
                After::Debug(event) => {
                    if let Some(stop) = self.judge(&event)? {
                        return Ok(Exit::Debug(stop));
                    }
                }
                After::InternalError => return Ok(Exit::Failed(self.internal_error())),
                After::UnknownExit => return Ok(Exit::Failed(self.unknown_exit())),
            }
        }
    }

    fn kicker(&self) -> Kicker {
        Kicker::new(self.shared.clone())
    }

    fn state(&mut self) -> Result<VcpuState> {
        state::read(self)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        state::write(self, state)?;
        self.shared.expect_no_interrupt();
        Ok(())
    }

    fn set_debug(&mut self, debug: &GuestDebug) -> Result<()> {
        debug.check()?;
        self.stop_for(debug)
    }

    fn measure(&mut self, tally: Option<Arc<Tally>>) {
        self.meter.set(tally);
    }
}

#[cfg(test)]
mod tests {
    use super::instruction;

    #[test]
    fn failed_instructions_are_shown() {
        let bytes = [[3, 0x0f, 0xc7, 0x0e, 0, 0, 0, 0], [0; 8]].map(u64::from_le_bytes);
        assert_eq!(instruction(&[1, bytes[0], bytes[1]]).as_deref(), Some("0f c7 0e"));
        assert_eq!(instruction(&[0, bytes[0], bytes[1]]), None);
        assert_eq!(instruction(&[]), None);
        assert_eq!(instruction(&[1, u64::MAX, u64::MAX]).map(|text| text.len()), Some(15 * 3 - 1));
    }
}
