//! A debugger's breakpoints and steps, by KVM_SET_GUEST_DEBUG.
//!
//! - **Software breakpoints** are INT3s in guest memory. They belong to the VM, because vCPUs share it: each counts
//!   the vCPUs that want it. One that the guest has overwritten is not put back.
//! - **Hardware breakpoints** take the processor's debug registers; the guest's own breakpoints are off meanwhile,
//!   though the guest reads what it wrote.
//! - **Steps** use TF, which a guest sees in the flags that it pushes.
//!
//! A debug exception that none of those explains is the guest's own, and is given back to it.

use crate::host_error;
use crate::vcpu::KvmVcpu;
use crate::vm::lock;
use anyvisor_engine::{Error, GuestDebug, Result, Stop, Watch, linear};
use anyvisor_x86::VcpuState;
use anyvisor_x86::bits::dr;
use anyvisor_x86::exception::vector;
use kvm_bindings as kvm;
use std::collections::HashMap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const INT3: u8 = 0xcc;

/// One vCPU's part.
#[derive(Debug, Default)]
pub(crate) struct Debug {
    wanted: GuestDebug,
    /// Where its INT3s are.
    planted: Vec<u64>,
}

impl Debug {
    /// Whether the vCPU executes one instruction only.
    pub fn steps(&self) -> bool {
        self.wanted.single_step
    }
}

/// A VM's INT3s: by guest-physical address the byte that was there, and how many vCPUs want it.
pub(crate) type Planted = HashMap<u64, (u8, usize)>;

impl KvmVcpu {
    /// Stops for `wanted` from now on. If that fails, for what it was before.
    pub fn stop_for(&mut self, wanted: &GuestDebug) -> Result<()> {
        let places = if wanted.software.is_empty() { vec![] } else { self.places(&wanted.software)? };
        let control = self.control(wanted)?;
        tell(self, wanted, control)?;
        self.lift();
        let mut planted = lock(&self.vm.planted);
        for &gpa in &places {
            let byte = self.vm.memory.read_obj(GuestAddress(gpa)).unwrap_or(INT3);
            let entry = planted.entry(gpa).or_insert((byte, 0));
            entry.1 += 1;
            // `places` found RAM there.
            let _ = self.vm.memory.write_obj(INT3, GuestAddress(gpa));
        }
        drop(planted);
        self.debug = Debug { wanted: wanted.clone(), planted: places };
        Ok(())
    }

    /// Takes this vCPU's INT3s away.
    fn lift(&mut self) {
        let mut planted = lock(&self.vm.planted);
        for gpa in std::mem::take(&mut self.debug.planted) {
            let Some((byte, count)) = planted.get_mut(&gpa) else { continue };
            *count -= 1;
            if *count == 0 {
                put_back(&self.vm.memory, gpa, *byte);
                planted.remove(&gpa);
            }
        }
    }

    /// Where `addresses` are in RAM.
    fn places(&mut self, addresses: &[u64]) -> Result<Vec<u64>> {
        let state = crate::state::read(self)?;
        let place = |&gva: &u64| self.place(&state, gva);
        addresses.iter().map(place).collect()
    }

    fn place(&self, state: &VcpuState, gva: u64) -> Result<u64> {
        let gpa = linear::physical(&self.vm.memory, state, gva);
        gpa.filter(|&gpa| self.vm.memory.read_obj::<u8>(GuestAddress(gpa)).is_ok()).ok_or_else(|| {
            Error::Unsupported(format!("no memory at {gva:#x} for a software breakpoint; use a hardware breakpoint"))
        })
    }

    /// The flags of KVM_SET_GUEST_DEBUG for `wanted`.
    fn control(&self, wanted: &GuestDebug) -> Result<u32> {
        if wanted.is_off() {
            return Ok(0);
        }
        if self.vm.capability(kvm::KVM_CAP_SET_GUEST_DEBUG) == 0 {
            return Err(Error::Unsupported("this host's KVM cannot debug guests; use --engine translator".into()));
        }
        let mut control = kvm::KVM_GUESTDBG_ENABLE;
        if wanted.single_step {
            control |= kvm::KVM_GUESTDBG_SINGLESTEP;
            let activity = self.fd.get_mp_state().map_err(|e| host_error("reading a vCPU's activity", e))?;
            let known = self.vm.capability(kvm::KVM_CAP_SET_GUEST_DEBUG2);
            // Kernels before 5.16 cannot hold interrupts off; a step may then end in a handler.
            if activity.mp_state != kvm::KVM_MP_STATE_HALTED && known & kvm::KVM_GUESTDBG_BLOCKIRQ != 0 {
                control |= kvm::KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        if !wanted.software.is_empty() {
            control |= kvm::KVM_GUESTDBG_USE_SW_BP;
        }
        if !wanted.hardware.is_empty() {
            control |= kvm::KVM_GUESTDBG_USE_HW_BP;
        }
        Ok(control)
    }

    /// What a debug exit means: a reason to stop, or an exception of the guest's, which is given back to it.
    pub fn judge(&mut self, event: &kvm::kvm_debug_exit_arch) -> Result<Option<Stop>> {
        let wanted = &self.debug.wanted;
        if event.exception == u32::from(vector::BP) {
            if wanted.software.contains(&event.pc) {
                return Ok(Some(Stop::Software));
            }
            self.give_back(kvm::KVM_GUESTDBG_INJECT_BP)?;
            return Ok(None);
        }
        let hit = (0..wanted.hardware.len()).find(|n| event.dr6 >> n & 1 != 0);
        if let Some(hit) = hit {
            return Ok(Some(Stop::Hardware(hit)));
        }
        if wanted.single_step {
            return Ok(Some(Stop::Step));
        }
        let failed = |error| host_error("a vCPU's debug registers", error);
        let mut registers = self.fd.get_debug_regs().map_err(failed)?;
        registers.dr6 |= event.dr6 & (dr::DR6_BS | dr::DR6_BD | dr::DR6_BT | 0xf);
        self.fd.set_debug_regs(&registers).map_err(failed)?;
        self.give_back(kvm::KVM_GUESTDBG_INJECT_DB)?;
        Ok(None)
    }

    fn give_back(&self, injection: u32) -> Result<()> {
        tell(self, &self.debug.wanted, self.control(&self.debug.wanted)? | kvm::KVM_GUESTDBG_ENABLE | injection)
    }
}

fn tell(vcpu: &KvmVcpu, wanted: &GuestDebug, control: u32) -> Result<()> {
    let mut request = kvm::kvm_guest_debug { control, ..Default::default() };
    for (n, breakpoint) in wanted.hardware.iter().enumerate() {
        let condition = match breakpoint.watch {
            Watch::Execute => 0,
            Watch::Write => 1,
            Watch::Access => 3,
        };
        let length = match breakpoint.length {
            2 => 1,
            4 => 3,
            8 => 2,
            _ => 0,
        };
        request.arch.debugreg[n] = breakpoint.address;
        request.arch.debugreg[7] |= 2 << (2 * n) | (condition | length << 2) << (16 + 4 * n);
    }
    if !wanted.hardware.is_empty() {
        request.arch.debugreg[7] |= dr::DR7_FIXED;
    }
    vcpu.fd.set_guest_debug(&request).map_err(|e| host_error("setting a vCPU's breakpoints", e))
}

/// Puts `byte` back where an INT3 is, unless the guest has written there.
fn put_back(memory: &GuestMemoryMmap, gpa: u64, byte: u8) {
    if memory.read_obj::<u8>(GuestAddress(gpa)).is_ok_and(|now| now == INT3) {
        // It was RAM when the INT3 was put there.
        let _ = memory.write_obj(byte, GuestAddress(gpa));
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.lift();
    }
}
