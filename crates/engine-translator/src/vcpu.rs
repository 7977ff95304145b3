//! One vCPU behind the engine contract: its run loop, and its state to and from [`VcpuState`].
//!
//! The loop alternates between looking at what is pending (kicks, messages, the timer, interrupts) and
//! executing guest code until something is. While a thread is inside [`Vcpu::run`] the x87 registers hold the
//! guest's values, GS points at the vCPU block, and the timer's signal reaches this vCPU.

use crate::core::{Core, VcpuShared};
use crate::cpu::{Cpu, Ymm, pending};
use crate::host;
use crate::interpret;
use crate::measure;
use crate::system::{self, Step, steal_time};
use crate::timer::{self, ThreadTimer};
use crate::translate::Translator;
use crate::vendor;
use anyvisor_engine::tally::{Tally, event};
use anyvisor_engine::{Error, Exit, GuestDebug, GuestIo, Kick, Kicker, Result, Vcpu};
use anyvisor_x86::bits::{cr0, cr4, efer, rflags, xcr0};
use anyvisor_x86::cpuid::PKU;
use anyvisor_x86::lapic::{LocalApic, RestoreError};
use anyvisor_x86::segment::index;
use anyvisor_x86::state::{Activity, PKRU_OFFSET, PKRU_SIZE, PendingEvents, Segments, XSAVE_SIZE};
use anyvisor_x86::{Exception, VcpuState, msr};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// An FXSAVE image; only its x87 part is meaningful.
#[repr(C, align(16))]
struct Fxsave([u8; 512]);

/// Bytes of the XSAVE area: legacy region (SDM vol. 1 table 13-1), header, AVX.
mod area {
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const X87_REGISTERS: std::ops::Range<usize> = 32..160;
    pub const XMM: usize = 160;
    pub const HEADER: usize = 512;
    pub const YMM_HIGH: usize = 576;
    pub const LEGACY_SIZE: usize = 512;
}

/// PKRU in XSTATE_BV.
const PKRU: u32 = xcr0::PKRU as u32;

/// A vCPU of the translator engine.
pub struct TranslatorVcpu {
    core: Core,
    /// `None` for a vCPU that only interprets.
    translator: Option<Translator>,
    x87: Box<Fxsave>,
    timer: Option<ThreadTimer>,
    /// From a restored state: to be delivered before anything else.
    exception: Option<Exception>,
    /// From a restored state: an interrupt of the 8259 that has been acknowledged.
    interrupt: Option<u8>,
}

impl TranslatorVcpu {
    /// A vCPU in the state after reset.
    pub(crate) fn new(core: Core, translator: Option<Translator>) -> Result<TranslatorVcpu> {
        let state = VcpuState::reset(core.shared.id, core.cpuid(1, 0).eax);
        let mut vcpu = TranslatorVcpu {
            core,
            translator,
            x87: Box::new(Fxsave([0; 512])),
            timer: None,
            exception: None,
            interrupt: None,
        };
        vcpu.core.stubs.prepare()?;
        vcpu.set_state(&state)?;
        Ok(vcpu)
    }

    /// The vCPU's inside, for tests.
    pub fn core(&mut self) -> &mut Core {
        &mut self.core
    }

    /// What translates for it, for tests.
    #[cfg(test)]
    pub(crate) fn translator(&mut self) -> Option<&mut Translator> {
        self.translator.as_mut()
    }

    /// Makes the calling thread this vCPU's.
    fn enter_thread(&mut self) -> Result<()> {
        if !self.timer.as_ref().is_some_and(ThreadTimer::is_mine) {
            self.timer = Some(ThreadTimer::new()?);
        }
        host::set_gs_base(std::ptr::from_ref::<Cpu>(&self.core.cpu) as u64)?;
        if let Some(translator) = &mut self.translator {
            translator.attach(&mut self.core)?;
        }
        let timer = self.timer.as_ref().expect("made above");
        // SAFETY: it outlives `run`, and `leave_thread` takes the address back.
        unsafe { timer::set_running(Arc::as_ptr(&self.core.shared), timer) };
        self.load_x87();
        Ok(())
    }

    fn leave_thread(&mut self) {
        self.save_x87();
        let timer = self.timer.as_mut().expect("made by enter_thread");
        timer.settle();
        // SAFETY: null is always valid.
        unsafe { timer::set_running(std::ptr::null(), timer) };
        if let Some(translator) = &mut self.translator {
            translator.detach();
        }
    }

    /// Loads the guest's x87 state into the CPU. FXRSTOR also loads XMM registers and MXCSR: the former
    /// belong to nobody here, the latter must stay the host's.
    fn load_x87(&mut self) {
        let mut host_mxcsr = 0u32;
        // SAFETY: STMXCSR stores four bytes at the given address.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut host_mxcsr, options(nostack, preserves_flags)) };
        self.x87.0[area::MXCSR..area::MXCSR + 4].copy_from_slice(&host_mxcsr.to_le_bytes());
        // SAFETY: the image is 512 bytes, 16-byte aligned, and its MXCSR is valid, the host's own; the XMM and
        // x87 registers that it changes are declared.
        unsafe {
            std::arch::asm!("fxrstor64 [{}]", in(reg) self.x87.0.as_ptr(), options(nostack),
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
                out("st(6)") _, out("st(7)") _);
        }
    }

    /// Takes the guest's x87 state out of the CPU, and leaves a clean one for Rust.
    fn save_x87(&mut self) {
        // SAFETY: the image is 512 bytes and 16-byte aligned.
        unsafe {
            std::arch::asm!("fxsave64 [{}]", "fninit", in(reg) self.x87.0.as_mut_ptr(), options(nostack));
        }
    }

    fn run_loop(&mut self, io: &dyn GuestIo) -> Exit {
        let core = &mut self.core;
        system::clock::refresh_system_time(core, io);
        steal_time::go_on(core);
        if let Some(exception) = self.exception.take()
            && system::deliver_exception(core, io, exception) == Step::Shutdown
        {
            return Exit::Shutdown;
        }
        if let Some(vector) = self.interrupt.take() {
            core.cpu.halted = false;
            if system::deliver_interrupt(core, io, vector) == Step::Shutdown {
                return Exit::Shutdown;
            }
        }
        core.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
        loop {
            let reasons = core.cpu.pending.load(Ordering::SeqCst);
            if reasons & pending::DEBUG != 0 {
                core.cpu.pending.fetch_and(!pending::DEBUG, Ordering::SeqCst);
                if let Some(stop) = core.debugger.take() {
                    return Exit::Debug(stop);
                }
            }
            if reasons & pending::KICK != 0 {
                core.cpu.pending.fetch_and(!pending::KICK, Ordering::SeqCst);
                return Exit::Kicked;
            }
            if reasons & pending::FLUSH != 0 {
                core.cpu.pending.fetch_and(!pending::FLUSH, Ordering::SeqCst);
                core.flush_all();
            }
            if reasons & pending::BUS != 0 {
                core.cpu.pending.fetch_and(!pending::BUS, Ordering::SeqCst);
                core.vm.wait_for_bus();
            }
            if reasons & pending::CODE != 0 {
                core.cpu.pending.fetch_and(!pending::CODE, Ordering::SeqCst);
                let notices = core.shared.take_notices();
                if let Some(translator) = &mut self.translator {
                    translator.notice(core, &notices);
                }
            }
            let steps = core.debugger.steps();
            if steps && !core.cpu.halted && !core.cpu.wait_for_sipi {
                if !core.shared.begin() {
                    continue;
                }
                let step = match &mut self.translator {
                    Some(translator) => translator.interpret(core, io),
                    None => interpret_until_pending(core, io, true),
                };
                core.shared.end();
                if step == Step::Shutdown {
                    return Exit::Shutdown;
                }
                continue;
            }
            if reasons != 0 {
                if measure::poll(core, io) == Step::Shutdown {
                    return Exit::Shutdown;
                }
                steal_time::refresh(core, io);
            }
            let timer = self.timer.as_mut().expect("made by enter_thread");
            if core.cpu.halted || core.cpu.wait_for_sipi {
                timer.settle();
                let began = core.meter.start();
                sleep(core, io);
                core.meter.stop(began, event::HALT);
                continue;
            }
            if steps {
                // Woken up.
                core.debugger_looks_back();
                continue;
            }
            if reasons != 0 {
                timer.follow(core);
            }
            if !core.shared.begin() {
                continue;
            }
            // An event may be left pending because of an interrupt shadow: one instruction ends that.
            let single = core.cpu.pending.load(Ordering::Relaxed) != 0;
            let step = match &mut self.translator {
                Some(translator) if single => translator.interpret(core, io),
                Some(translator) => translator.run(core, io),
                None => interpret_until_pending(core, io, single),
            };
            core.shared.end();
            if step == Step::Shutdown {
                return Exit::Shutdown;
            }
        }
    }
}

/// Waits for something to do: a message, a kick, or the timer.
fn sleep(core: &mut Core, io: &dyn GuestIo) {
    steal_time::stand_still(core, io);
    let timeout = core.lapic.next_deadline().map(|deadline| timer::until(deadline, core.now(), core.vm.tsc_khz));
    if timeout != Some(0) {
        core.shared.wait(timeout);
    }
    steal_time::move_again(core);
    core.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
}

/// Interprets until something is pending, or one instruction only.
fn interpret_until_pending(core: &mut Core, io: &dyn GuestIo, single: bool) -> Step {
    loop {
        let step = interpret::step_watched(core, io);
        if step == Step::Shutdown {
            return Step::Shutdown;
        }
        // Nobody translates, so nobody needs to know.
        core.code_writes.clear();
        if single || core.cpu.halted || core.cpu.pending.load(Ordering::Relaxed) != 0 {
            return Step::Done;
        }
    }
}

impl Vcpu for TranslatorVcpu {
    fn run(&mut self, io: &dyn GuestIo) -> Result<Exit> {
        self.enter_thread()?;
        let exit = self.run_loop(io);
        self.leave_thread();
        Ok(exit)
    }

    fn kicker(&self) -> Kicker {
        Kicker::new(Arc::new(VcpuKick(self.core.shared.clone())))
    }

    fn state(&mut self) -> Result<VcpuState> {
        system::take_messages(&mut self.core);
        // One moment for all that is time: a timer that fires between two readings would be in neither.
        let now = self.core.now();
        let lapic = self.core.lapic.save(now);
        let msrs = msr::SAVED
            .iter()
            .filter_map(|&number| {
                let value = match number {
                    msr::IA32_TSC => Some(now.tsc),
                    msr::TSC_DEADLINE => Some(self.core.lapic.tsc_deadline(now)),
                    _ => system::msr::read(&mut self.core, number).ok(),
                };
                value.map(|value| (number, value))
            })
            .collect();
        let woken = self.core.woken;
        let (nmi_pending, xsave) = (self.core.nmis_pending > 0, self.save_xsave());
        let cpu = &self.core.cpu;
        Ok(VcpuState {
            gpr: cpu.gpr,
            rip: cpu.rip,
            rflags: cpu.rflags,
            segments: Segments { seg: cpu.seg, ldtr: cpu.ldtr, tr: cpu.tr },
            gdtr: cpu.gdtr,
            idtr: cpu.idtr,
            cr0: cpu.cr0,
            cr2: cpu.cr2,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            dr: cpu.dr,
            xcr0: cpu.xcr0,
            msrs,
            xsave,
            lapic,
            activity: if cpu.wait_for_sipi {
                Activity::WaitForSipi
            } else if cpu.halted && !woken {
                Activity::Halted
            } else {
                Activity::Running
            },
            events: PendingEvents {
                exception: self.exception,
                nmi_pending,
                nmi_blocked: cpu.nmi_blocked,
                interrupt_shadow: cpu.interrupt_shadow,
                interrupt: self.interrupt,
            },
        })
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        check(&self.core, state)?;
        self.set_registers(state);
        self.set_msrs(state);
        self.set_xsave(&state.xsave);
        self.set_lapic(state)?;
        let core = &mut self.core;
        self.exception = state.events.exception;
        self.interrupt = state.events.interrupt;
        core.nmis_pending = state.events.nmi_pending.into();
        core.cpu.nmi_blocked = state.events.nmi_blocked;
        core.cpu.interrupt_shadow = state.events.interrupt_shadow & 3;
        core.cpu.halted = state.activity == Activity::Halted;
        core.woken = false;
        core.cpu.wait_for_sipi = state.activity == Activity::WaitForSipi;
        core.flush_all();
        // Whoever sets a state may have changed the code in memory too: a restored snapshot, a debugger.
        if let Some(translator) = &mut self.translator {
            translator.flush(core);
        }
        core.cpu.pending.fetch_or(pending::EVENT, Ordering::SeqCst);
        Ok(())
    }

    fn set_debug(&mut self, debug: &GuestDebug) -> Result<()> {
        debug.check()?;
        let core = &mut self.core;
        core.debugger.set(debug);
        core.cpu.pending.fetch_and(!pending::DEBUG, Ordering::SeqCst);
        core.flush_all();
        if let Some(translator) = &mut self.translator {
            translator.flush(core);
        }
        Ok(())
    }

    fn measure(&mut self, tally: Option<Arc<Tally>>) {
        self.core.meter.set(tally);
    }
}

/// What [`TranslatorVcpu::kicker`] gives out.
struct VcpuKick(Arc<VcpuShared>);

impl Kick for VcpuKick {
    fn kick(&self) {
        self.0.notify(pending::KICK);
    }
}

fn bad(what: impl Into<String>) -> Error {
    Error::BadState(what.into())
}

/// Refuses states that no processor can be in and that this engine relies on not to see.
fn check(core: &Core, state: &VcpuState) -> Result<()> {
    let efer = state.msr(msr::EFER).unwrap_or(0);
    let paging = state.cr0 & cr0::PG != 0;
    if paging && state.cr0 & cr0::PE == 0 {
        return Err(bad("CR0 has PG without PE"));
    }
    if (efer & efer::LMA != 0) != (paging && efer & efer::LME != 0) {
        return Err(bad("EFER.LMA does not follow from EFER.LME and CR0.PG"));
    }
    if efer & efer::LMA != 0 && state.cr4 & cr4::PAE == 0 {
        return Err(bad("long mode without CR4.PAE"));
    }
    if state.cr3 >> core.physical_bits != 0 {
        return Err(bad(format!("CR3 {:#x} is wider than physical addresses", state.cr3)));
    }
    let (x87, avx) = (state.xcr0 & xcr0::X87 != 0, state.xcr0 & xcr0::AVX != 0);
    let pku = core.cpuid.has(&PKU);
    let defined = 7 | if pku { xcr0::PKRU } else { 0 };
    if !x87 || state.xcr0 & !defined != 0 || avx && state.xcr0 & xcr0::SSE == 0 {
        return Err(bad(format!("XCR0 {:#x}", state.xcr0)));
    }
    if state.xsave.len() < area::LEGACY_SIZE + 64 || avx && state.xsave.len() < XSAVE_SIZE {
        return Err(bad(format!("an XSAVE area of {} bytes", state.xsave.len())));
    }
    if pku && state.xsave.len() < PKRU_OFFSET + PKRU_SIZE && u32_at(&state.xsave, area::HEADER) & PKRU != 0 {
        return Err(bad(format!("an XSAVE area of {} bytes with PKRU", state.xsave.len())));
    }
    if u32_at(&state.xsave, area::MXCSR) & !vendor::mxcsr_bits() != 0 {
        return Err(bad("reserved bits in MXCSR"));
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

// The parts of a state.
impl TranslatorVcpu {
    fn set_registers(&mut self, state: &VcpuState) {
        let cpu = &mut self.core.cpu;
        cpu.gpr = state.gpr;
        cpu.rip = state.rip;
        cpu.rflags = state.rflags & (rflags::WRITABLE | rflags::VM) | rflags::FIXED;
        cpu.seg = state.segments.seg;
        cpu.ldtr = state.segments.ldtr;
        cpu.tr = state.segments.tr;
        cpu.gdtr = state.gdtr;
        cpu.idtr = state.idtr;
        cpu.cr0 = state.cr0;
        cpu.cr2 = state.cr2;
        cpu.cr3 = state.cr3;
        cpu.cr4 = state.cr4;
        cpu.dr = state.dr;
        cpu.xcr0 = state.xcr0;
        // The privilege level is SS's DPL, as in VMX guest state (SDM vol. 3C 25.4.1).
        cpu.cpl = if !cpu.is_protected() {
            0
        } else if cpu.is_vm86() {
            3
        } else {
            cpu.seg[index::SS].dpl()
        };
    }

    /// MSRs that the state lacks get their reset values. Those of the APIC come with it.
    fn set_msrs(&mut self, state: &VcpuState) {
        let core = &mut self.core;
        let value = |number, default| state.msr(number).unwrap_or(default);
        let tsc_offset = match state.msr(msr::IA32_TSC) {
            Some(tsc) => tsc.wrapping_sub(host::tsc()),
            None => 0u64.wrapping_sub(core.vm.tsc_started),
        };
        core.clock.system_time_msr = value(msr::KVM_SYSTEM_TIME_NEW, 0);
        core.clock.wall_clock_msr = value(msr::KVM_WALL_CLOCK_NEW, 0);
        core.steal_time.msr = value(msr::KVM_STEAL_TIME, 0) & !steal_time::RESERVED;
        // RAM may hold another VM's clock.
        core.clock.published = None;
        let cpu = &mut core.cpu;
        cpu.tsc_offset = tsc_offset;
        cpu.tsc_adjust = value(msr::IA32_TSC_ADJUST, 0);
        cpu.spec_ctrl = value(msr::IA32_SPEC_CTRL, 0);
        cpu.pkrs = value(msr::IA32_PKRS, 0) as u32;
        cpu.sysenter_cs = value(msr::SYSENTER_CS, 0);
        cpu.sysenter_esp = value(msr::SYSENTER_ESP, 0);
        cpu.sysenter_eip = value(msr::SYSENTER_EIP, 0);
        cpu.misc_enable = value(msr::IA32_MISC_ENABLE, system::msr::MISC_ENABLE_DEFAULT);
        cpu.pat = value(msr::IA32_PAT, system::msr::PAT_DEFAULT);
        cpu.mtrr_def_type = value(msr::MTRR_DEF_TYPE, system::msr::MTRR_DEFAULT);
        cpu.efer = value(msr::EFER, 0);
        cpu.star = value(msr::STAR, 0);
        cpu.lstar = value(msr::LSTAR, 0);
        cpu.cstar = value(msr::CSTAR, 0);
        cpu.sfmask = value(msr::SFMASK, 0);
        cpu.kernel_gs_base = value(msr::KERNEL_GS_BASE, 0);
        cpu.tsc_aux = value(msr::TSC_AUX, 0);
    }

    fn set_lapic(&mut self, state: &VcpuState) -> Result<()> {
        let now = self.core.now();
        let mut apic = LocalApic::new(self.core.shared.id, self.core.lapic_features());
        if state.lapic.is_empty() {
            if self.core.shared.id == 0 {
                apic.set_virtual_wire();
            }
        } else {
            let base = state.msr(msr::IA32_APIC_BASE).unwrap_or(apic.base());
            let deadline = state.msr(msr::TSC_DEADLINE).unwrap_or(0);
            apic.restore(&state.lapic, base, deadline, now).map_err(|error| match error {
                RestoreError::Length => bad(format!("a local APIC page of {} bytes", state.lapic.len())),
                RestoreError::Base => bad(format!("IA32_APIC_BASE {base:#x}")),
            })?;
        }
        self.core.lapic = apic;
        self.core.shared.set_address(self.core.lapic.address());
        Ok(())
    }

    /// Components that XSTATE_BV does not name are in their initial configuration (SDM vol. 1 13.6).
    fn set_xsave(&mut self, image: &[u8]) {
        let present = u32_at(image, area::HEADER);
        let has = |component: u64| u64::from(present) & component != 0;
        self.x87.0 = [0; 512];
        self.x87.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        if has(xcr0::X87) {
            self.x87.0[..area::MXCSR].copy_from_slice(&image[..area::MXCSR]);
            self.x87.0[area::X87_REGISTERS].copy_from_slice(&image[area::X87_REGISTERS]);
        }
        let pkru = self.core.cpuid.has(&PKU) && has(xcr0::PKRU);
        let cpu = &mut self.core.cpu;
        cpu.pkru = if pkru { u32_at(image, PKRU_OFFSET) } else { 0 };
        cpu.mxcsr = u32_at(image, area::MXCSR);
        for (n, register) in cpu.ymm.iter_mut().enumerate() {
            *register = Ymm([0; 32]);
            let (low, high) = (area::XMM + 16 * n, area::YMM_HIGH + 16 * n);
            if has(xcr0::SSE) {
                register.0[..16].copy_from_slice(&image[low..low + 16]);
            }
            if has(xcr0::AVX) && image.len() >= XSAVE_SIZE {
                register.0[16..].copy_from_slice(&image[high..high + 16]);
            }
        }
    }

    fn save_xsave(&self) -> Vec<u8> {
        let mut image = vec![0; XSAVE_SIZE];
        image[..area::MXCSR].copy_from_slice(&self.x87.0[..area::MXCSR]);
        image[area::X87_REGISTERS].copy_from_slice(&self.x87.0[area::X87_REGISTERS]);
        let cpu = &self.core.cpu;
        image[area::MXCSR..area::MXCSR + 4].copy_from_slice(&cpu.mxcsr.to_le_bytes());
        image[area::MXCSR_MASK..area::MXCSR_MASK + 4].copy_from_slice(&vendor::mxcsr_bits().to_le_bytes());
        for (n, register) in cpu.ymm.iter().enumerate() {
            let (low, high) = (area::XMM + 16 * n, area::YMM_HIGH + 16 * n);
            image[low..low + 16].copy_from_slice(&register.0[..16]);
            image[high..high + 16].copy_from_slice(&register.0[16..]);
        }
        let mut present = (xcr0::X87 | xcr0::SSE | xcr0::AVX) as u32;
        if self.core.cpuid.has(&PKU) {
            present |= PKRU;
            image.extend(u64::from(cpu.pkru).to_le_bytes());
        }
        image[area::HEADER..area::HEADER + 4].copy_from_slice(&present.to_le_bytes());
        image
    }
}
