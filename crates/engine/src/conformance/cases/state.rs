//! The vCPU's state through the contract: what is set comes back, in the same VM and in a fresh one; a guest
//! that is taken out in the middle goes on as if nothing had been.

use super::super::{Guest, Mismatch};
use super::apic;
use super::interrupts::{NMI, enable_apic, iret_to_next, msi, returns_from_nmi, set_apic};
use super::prelude::*;
use crate::Exit;
use anyvisor_x86::lapic::reg;
use anyvisor_x86::state::Activity;

pub fn add(suite: &mut Suite) {
    round_trips(suite.group("state"));
    reset(suite);
    refused(suite);
    events(suite);
    moves(suite.group("moves to a fresh VM"));
}

/// `state` without what moves by itself: the TSC and the timer's current count.
fn still(mut state: VcpuState) -> VcpuState {
    state.msrs.retain(|(number, _)| *number != msr::IA32_TSC);
    if let Some(count) = state.lapic.get_mut(reg::CURRENT_COUNT as usize..reg::CURRENT_COUNT as usize + 4) {
        count.fill(0);
    }
    state
}

/// Both states are the same, but for what moves; named part by part, so that a failure can be read.
fn same(got: &VcpuState, want: &VcpuState) -> Verdict {
    let (got, want) = (still(got.clone()), still(want.clone()));
    equal("general registers", got.gpr, want.gpr)?;
    equal("RIP, RFLAGS", (got.rip, got.rflags), (want.rip, want.rflags))?;
    for (n, (got, want)) in got.segments.seg.iter().zip(&want.segments.seg).enumerate() {
        equal(["ES", "CS", "SS", "DS", "FS", "GS"][n], got, want)?;
    }
    equal("LDTR", got.segments.ldtr, want.segments.ldtr)?;
    equal("TR", got.segments.tr, want.segments.tr)?;
    equal("GDTR, IDTR", (got.gdtr, got.idtr), (want.gdtr, want.idtr))?;
    equal("CR0, CR2, CR3, CR4", (got.cr0, got.cr2, got.cr3, got.cr4), (want.cr0, want.cr2, want.cr3, want.cr4))?;
    equal("debug registers", got.dr, want.dr)?;
    equal("XCR0", got.xcr0, want.xcr0)?;
    equal("MSRs", &got.msrs, &want.msrs)?;
    for (n, (got, want)) in got.lapic.chunks(4).zip(want.lapic.chunks(4)).enumerate() {
        equal(&format!("local APIC register {:#x}", 4 * n), got, want)?;
    }
    equal("activity", got.activity, want.activity)?;
    equal("events", got.events, want.events)?;
    equal("bytes of the XSAVE area", got.xsave.len(), want.xsave.len())?;
    match got.xsave.iter().zip(&want.xsave).position(|(got, want)| got != want) {
        Some(at) => equal(&format!("byte {at} of the XSAVE area"), got.xsave[at], want.xsave[at]),
        None => Ok(()),
    }
}

/// A second VM like the first, with what its memory holds below devices: no case here uses the rest.
fn fresh<'a>(g: &Guest<'a>) -> Result<Guest<'a>, Mismatch> {
    let other = g.sibling()?;
    other.write(0, &g.read(0, place::MMIO as usize));
    Ok(other)
}

fn round_trips(suite: &mut Suite) {
    suite.add("what is set comes back", EVERY_MODE, |g| {
        fill(g);
        g.vcpu.set_state(&g.state)?;
        let got = g.vcpu.state()?;
        same(&got, &g.state)
    });
    suite.add("state, set_state, state", EVERY_MODE, |g| {
        g.run(|a| a.nop())?.done()?;
        let first = g.vcpu.state()?;
        g.vcpu.set_state(&first)?;
        let second = g.vcpu.state()?;
        same(&second, &first)
    });
    suite.add("the same in a fresh VM", EVERY_MODE, |g| {
        fill(g);
        g.vcpu.set_state(&g.state)?;
        let first = g.vcpu.state()?;
        let mut other = fresh(g)?;
        other.vcpu.set_state(&first)?;
        let second = other.vcpu.state()?;
        same(&second, &first)
    });
    suite.add("state() changes nothing", &[Mode::Real, Mode::Long, Mode::User], |g| {
        g.load(|a| {
            a.mov(al, 7)?;
            a.mov(bl, 8)
        })?;
        g.vcpu.set_state(&g.state)?;
        for _ in 0..3 {
            g.vcpu.state()?;
        }
        g.resume()?.registers(&[(gpr::RAX, 7), (gpr::RBX, 8)])
    });
    suite.add("the time-stamp counter goes on from what is set", &[Mode::Long], |g| {
        g.state.set_msr(msr::IA32_TSC, 1 << 50);
        g.vcpu.set_state(&g.state)?;
        let now = g.vcpu.state()?.msr(msr::IA32_TSC).unwrap_or(0);
        ensure((1 << 50..(1 << 50) + (1 << 40)).contains(&now), || format!("{now:#x}"))
    });
}

/// Values in every register that the mode lets be anything.
fn fill(g: &mut Guest) {
    for (n, register) in g.state.gpr.iter_mut().enumerate() {
        *register = 0x1111_1111_1111_1111 * n as u64;
    }
    g.state.rflags |= rflags::CF | rflags::ZF | rflags::OF | rflags::DF | rflags::IF | rflags::ID;
    g.state.cr2 = 0xffff_8888_1234_5678;
    g.state.dr[..4].copy_from_slice(&[0x1000, 0x2000, 0x3000, 0x4000]);
    g.state.dr[7] = dr::DR7_FIXED | 0x55;
    g.state.dr[6] = dr::DR6_FIXED | 5;
    for (number, value) in [
        (msr::SYSENTER_CS, 8),
        (msr::SYSENTER_ESP, 0xffff_8000_0000_1000),
        (msr::SYSENTER_EIP, 0xffff_8000_0000_2000),
        (msr::IA32_PAT, 0x0007_0106_0500_0406),
        (msr::STAR, 0x0018_0008_1234_5678),
        (msr::LSTAR, 0xffff_8000_0000_3000),
        (msr::CSTAR, 0xffff_8000_0000_4000),
        (msr::SFMASK, 0x700),
        (msr::KERNEL_GS_BASE, 0xffff_8000_0000_5000),
    ] {
        g.state.set_msr(number, value);
    }
    // XMM registers, the control word and MXCSR.
    for n in 160..288 {
        g.state.xsave[n] = n as u8;
    }
    g.state.xsave[0..2].copy_from_slice(&0x27fu16.to_le_bytes());
    g.state.xsave[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
    g.state.xsave[512] |= 3;
    // The processor priority follows from the task priority.
    set_apic(g, reg::TPR, 0x20);
    set_apic(g, reg::PPR, 0x20);
    set_apic(g, reg::SVR, 0x1ff);
    set_apic(g, reg::LVT_ERROR, 0xfe);
    set_apic(g, reg::LVT_LINT0, 0x700);
}

fn reset(suite: &mut Suite) {
    suite.add("a new vCPU is in the state after reset", &[Mode::Real], |g| {
        let mut other = g.sibling()?;
        let got = other.vcpu.state()?;
        let mut want = VcpuState::reset(0, g.cpuid.get(1, 0).unwrap_or_default().eax);
        // What `reset` leaves to the engine, or is the model's.
        want.msrs.clone_from(&got.msrs);
        want.lapic.clone_from(&got.lapic);
        want.xsave.clone_from(&got.xsave);
        same(&got, &want)
    });
    suite.add("an empty local APIC page is a reset local APIC", &[Mode::Long], |g| {
        enable_apic(g);
        g.vcpu.set_state(&g.state)?;
        g.state.lapic.clear();
        g.vcpu.set_state(&g.state)?;
        let got = g.vcpu.state()?;
        let at = |register: u32| {
            let bytes = &got.lapic[register as usize..register as usize + 4];
            u32::from_le_bytes(bytes.try_into().expect("four bytes"))
        };
        equal("SVR, LVT timer", (at(reg::SVR), at(reg::LVT_TIMER)), (0xff, 0x1_0000))
    });
}

/// States that no processor can be in are refused, and leave the vCPU usable.
fn refused(suite: &mut Suite) {
    type Spoil = fn(&mut VcpuState);
    let rows: &[(&str, Spoil)] = &[
        ("PG without PE", |state| state.cr0 = cr0::PG | cr0::ET),
        ("LMA without PAE", |state| state.cr4 &= !cr4::PAE),
        ("LMA without LME", |state| state.set_msr(msr::EFER, efer::LMA)),
        ("XCR0 without x87", |state| state.xcr0 = 2),
        ("reserved bits in MXCSR", |state| state.xsave[27] = 0x80),
        ("an XSAVE area that is too short", |state| state.xsave.truncate(100)),
        ("a local APIC page of the wrong length", |state| state.lapic.truncate(100)),
    ];
    for &(name, spoil) in rows {
        suite.add(format!("{name} is refused"), &[Mode::Long], move |g| {
            let mut bad = g.state.clone();
            spoil(&mut bad);
            ensure(g.vcpu.set_state(&bad).is_err(), || "it was accepted".to_owned())?;
            g.run(|a| a.mov(eax, 7))?.registers(&[(gpr::RAX, 7)])
        });
    }
}

fn events(suite: &mut Suite) {
    suite.add("an exception in the state is delivered first", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        g.state.events.exception = Some(Exception::gp(0x18));
        let end = g.run(|a| a.nop())?;
        let frame = end.vectored(vector::GP)?;
        equal("error code, RIP", (frame.error_code, frame.rip), (Some(0x18), place::CODE))
    });
    suite.add("a page fault in the state sets CR2", &[Mode::Long, Mode::User], |g| {
        g.state.events.exception = Some(Exception::page_fault(0x1234_5000, 7));
        let end = g.run(|a| a.nop())?;
        equal("error code", end.vectored(vector::PF)?.error_code, Some(7))?;
        equal("CR2", end.state.cr2, 0x1234_5000)
    });
    suite.add("interrupts that wait are part of the state", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(msi(0x50))?;
        // The message may lie in a mailbox until the vCPU looks.
        g.load(|a| a.nop())?;
        g.resume()?.done()?;
        g.state.lapic = g.vcpu.state()?.lapic;
        let mut other = fresh(g)?;
        other.state = g.state.clone();
        other
            .run(|a| {
                a.sti()?;
                a.nop()?;
                a.nop()
            })?
            .trap_after(2, 0x50)
    });
    suite.add("an NMI that waits is part of the state", &[Mode::Long], |g| {
        g.state.events.nmi_blocked = true;
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(NMI)?;
        g.load(|a| a.nop())?;
        g.resume()?.done()?;
        let events = g.vcpu.state()?.events;
        equal("NMI pending, blocked", (events.nmi_pending, events.nmi_blocked), (true, true))?;
        g.state.events = events;
        let end = g.run(iret_to_next)?;
        returns_from_nmi(g, &end)
    });
    // What the 8259 has been asked for cannot be asked for again.
    const PIC: &[Mode] = &[Mode::Real, Mode::Protected, Mode::Long, Mode::User];
    suite.add("an interrupt of the 8259 in the state is delivered first", PIC, |g| {
        g.state.rflags |= rflags::IF;
        g.state.events.interrupt = Some(0x33);
        let end = g.run(|a| a.nop())?;
        end.trap_after(0, 0x33)?;
        end.saw(&[])?;
        equal("the interrupt that waits", end.state.events.interrupt, None)
    });
    suite.add("an interrupt of the 8259 that was not delivered goes to a fresh VM", PIC, |g| {
        g.state.rflags |= rflags::IF;
        g.state.events.interrupt = Some(0x33);
        g.load(|a| a.nop())?;
        g.vcpu.set_state(&g.state)?;
        equal("the interrupt that waits", g.vcpu.state()?.events.interrupt, Some(0x33))?;
        // This kick ends the run before the first instruction.
        g.vcpu.kicker().kick();
        let end = g.resume()?;
        equal("exit", &end.exit, &Exit::Kicked)?;
        let mut other = fresh(g)?;
        other.vcpu.set_state(&end.state)?;
        let end = other.resume()?;
        end.trap_after(0, 0x33)?;
        end.saw(&[])
    });
    suite.add("a shadow is part of the state", &[Mode::Real, Mode::Long], |g| {
        g.state.events.interrupt_shadow = 1;
        g.state.rflags |= rflags::IF;
        g.vcpu.set_state(&g.state)?;
        equal("shadow", g.vcpu.state()?.events.interrupt_shadow, 1)
    });
}

fn moves(suite: &mut Suite) {
    const MODES: &[Mode] = &[Mode::Real, Mode::Protected, Mode::ProtectedUser, Mode::Compat, Mode::Long, Mode::User];
    suite.add("a guest goes on in a fresh VM from wherever it was", MODES, |g| {
        // A loop that writes to port 0x80 in between; each write kicks it, and each kick moves it.
        g.allow_port(0x80);
        g.state.gpr[gpr::RSI] = 0;
        g.load(|a| {
            let mut again = a.create_label();
            a.mov(cx, 20)?;
            a.set_label(&mut again)?;
            a.add(bx, cx)?;
            a.push(cx)?;
            a.out(0x80, al)?;
            a.pop(dx)?;
            a.add(si, dx)?;
            a.dec(cx)?;
            a.jne(again)
        })?;
        let mut state = g.state.clone();
        let mut here = fresh(g)?;
        for moves in 0.. {
            let kicker = here.vcpu.kicker();
            here.io.on_out(0x80, move || kicker.kick());
            here.vcpu.set_state(&state)?;
            let end = here.resume()?;
            if end.ended {
                let got = [gpr::RBX, gpr::RSI, gpr::RCX, gpr::RSP].map(|n| end.gpr(n));
                equal("RBX, RSI, RCX, RSP", got, [210, 210, 0, place::STACK])?;
                return ensure(moves >= 15, || format!("{moves} moves"));
            }
            equal("exit", &end.exit, &Exit::Kicked)?;
            state = end.state;
            here = fresh(&here)?;
        }
        Ok(())
    });
    suite.add("a halted guest wakes in a fresh VM", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        let kicker = g.vcpu.kicker();
        g.io.on_out(0x80, move || kicker.kick());
        // The kick ends the run at the OUT or at the HLT behind it; both will do.
        let end = g.run(|a| {
            a.out(0x80, al)?;
            a.sti()?;
            a.hlt()
        })?;
        equal("exit", &end.exit, &Exit::Kicked)?;
        let mut other = fresh(g)?;
        other.vcpu.set_state(&end.state)?;
        let vm = other.vm.clone();
        let end = other.resume_while(move || vm.signal_msi(msi(0x50)).expect("the engine takes messages"))?;
        end.vectored(0x50)?;
        equal("activity", end.state.activity, Activity::Running)
    });
    suite.add("an interrupt in service stays so", &[Mode::Long], |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        g.load(|a| a.db(&[0xeb, 0xfe]))?;
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(msi(0x51))?;
        let end = g.resume()?;
        end.vectored(0x51)?;
        // In the fresh VM 0x50 waits until 0x51 is over.
        let mut other = fresh(g)?;
        let mut state = end.state;
        state.rip = place::CODE;
        state.rflags |= rflags::IF;
        state.gpr[gpr::RBX] = place::APIC;
        other.load(|a| {
            a.nop()?;
            a.nop()?;
            a.mov(ecx, 7)?;
            a.mov(dword_ptr(rbx + reg::EOI as i32), 0)?;
            a.db(&[0xeb, 0xfe])
        })?;
        other.vcpu.set_state(&state)?;
        other.vm.signal_msi(msi(0x50))?;
        let end = other.resume()?;
        end.vectored(0x50)?;
        equal("RCX", end.gpr(gpr::RCX), 7)
    });
    suite.add("a periodic timer goes on", &[Mode::Long], |g| {
        apic::setup(g);
        let kicker = g.vcpu.kicker();
        g.io.on_out(0x80, move || kicker.kick());
        apic::ticks_handler(g)?;
        let end = g.run(|a| {
            apic::start_ticks(a)?;
            a.out(0x80, al)?;
            apic::await_ticks(a)
        })?;
        equal("exit", &end.exit, &Exit::Kicked)?;
        let mut other = fresh(g)?;
        other.vcpu.set_state(&end.state)?;
        let end = other.resume()?;
        ensure(end.ended && end.gpr(gpr::RDX) >= apic::TICKS, || format!("{} ticks, {:?}", end.gpr(gpr::RDX), end.exit))
    });
}
