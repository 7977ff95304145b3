//! What a debugger from outside can stop ([`GuestDebug`]), and that the guest goes on as if nothing had been.

use super::super::{End, Guest, Mismatch};
use super::interrupts::{enable_apic, msi};
use super::kicks::kicked;
use super::prelude::*;
use crate::{Exit, GuestDebug, HARDWARE_BREAKPOINTS, HardwareBreakpoint, Stop, Watch};
use anyvisor_x86::state::Activity;

/// Modes whose code is at linear addresses equal to RIP.
const FLAT: &[Mode] = &[Mode::Protected, Mode::ProtectedUser, Mode::Compat, Mode::CompatUser, Mode::Long, Mode::User];
const FEW: &[Mode] = &[Mode::Real, Mode::Protected, Mode::Long, Mode::User];

pub fn add(suite: &mut Suite) {
    breakpoints(suite.group("debugger").each(|g| g.touch()));
    watchpoints(suite);
    steps(suite);
    beside_the_guests_own(suite);
}

fn hardware(address: u64, length: u8, watch: Watch) -> GuestDebug {
    GuestDebug { hardware: vec![HardwareBreakpoint { address, length, watch }], ..GuestDebug::default() }
}

fn execute(address: u64) -> GuestDebug {
    hardware(address, 1, Watch::Execute)
}

fn software(address: u64) -> GuestDebug {
    GuestDebug { software: vec![address], ..GuestDebug::default() }
}

const STEP: GuestDebug = GuestDebug { single_step: true, software: vec![], hardware: vec![] };

/// Sets the state, and what stops the vCPU after it; runs.
fn start(g: &mut Guest, debug: &GuestDebug) -> Result<End, Mismatch> {
    g.vcpu.set_state(&g.state)?;
    go_on(g, debug)
}

fn go_on(g: &mut Guest, debug: &GuestDebug) -> Result<End, Mismatch> {
    g.vcpu.set_debug(debug)?;
    g.resume()
}

/// The run stopped for `stop`, `offset` bytes into the code.
fn stopped(end: &End, stop: Stop, offset: u64) -> Verdict {
    equal("exit and linear RIP", (&end.exit, end.linear_rip()), (&Exit::Debug(stop), place::CODE + offset))
}

fn breakpoints(suite: &mut Suite) {
    for (name, kind, stop) in [
        ("a software breakpoint", software as fn(u64) -> GuestDebug, Stop::Software),
        ("a hardware breakpoint", execute, Stop::Hardware(0)),
    ] {
        suite.add(format!("{name} stops before its instruction, again and again"), EVERY_MODE, move |g| {
            g.load(|a| {
                a.inc(cx)?;
                a.inc(dx)
            })?;
            g.state.gpr[gpr::RCX] = 5;
            g.state.gpr[gpr::RDX] = 7;
            let second = if g.mode.bits() == 16 { 1 } else { 3 };
            let second = if matches!(g.mode.bits(), 32) { 2 } else { second };
            let end = start(g, &kind(place::CODE + second))?;
            stopped(&end, stop, second)?;
            equal("CX and DX", (end.gpr(gpr::RCX), end.gpr(gpr::RDX)), (6, 7))?;
            stopped(&g.resume()?, stop, second)?;
            go_on(g, &GuestDebug::default())?.registers(&[(gpr::RCX, 6), (gpr::RDX, 8)])
        });
        suite.add(format!("{name} at the first instruction stops at once"), FEW, move |g| {
            g.load(|a| a.nop())?;
            stopped(&start(g, &kind(place::CODE))?, stop, 0)?;
            go_on(g, &GuestDebug::default())?.done()
        });
        suite.add(format!("{name} at a jump, and where it leads"), FEW, move |g| {
            // nop; jmp over; nop; over: nop
            g.load(|a| a.db(&[0x90, 0xeb, 0x01, 0x90, 0x90]))?;
            stopped(&start(g, &kind(place::CODE + 1))?, stop, 1)?;
            stopped(&go_on(g, &kind(place::CODE + 4))?, stop, 4)?;
            go_on(g, &GuestDebug::default())?.done()
        });
        suite.add(format!("{name} in a loop stops each time"), FEW, move |g| {
            g.load(|a| {
                // again: nop; nop; loop again
                a.db(&[0x90, 0x90, 0xe2, 0xfc])
            })?;
            g.state.gpr[gpr::RCX] = 4;
            g.vcpu.set_state(&g.state)?;
            for left in (1..=4).rev() {
                let end = go_on(g, &kind(place::CODE + 1))?;
                stopped(&end, stop, 1)?;
                equal("RCX", end.gpr(gpr::RCX), left)?;
                stopped(&go_on(g, &STEP)?, Stop::Step, 2)?;
            }
            go_on(g, &kind(place::CODE + 1))?.registers(&[(gpr::RCX, 0)])
        });
        suite.add(format!("{name} in code that runs already"), &[Mode::Long, Mode::User], move |g| {
            g.state.rflags |= rflags::IF;
            kicked(g, |a| a.db(&[0x48, 0xff, 0xc0, 0x48, 0xff, 0xc3, 0xeb, 0xf8]))?;
            stopped(&go_on(g, &kind(place::CODE + 3))?, stop, 3)
        });
    }
    suite.add("the flags at a breakpoint are exact, whatever comes behind", &[Mode::Long, Mode::User], |g| {
        g.load(|a| {
            a.db(&[0x83, 0xf8, 5])?; // cmp eax, 5
            a.nop()?;
            a.xor(ebx, ebx)
        })?;
        g.state.gpr[gpr::RAX] = 4;
        let end = start(g, &execute(place::CODE + 3))?;
        stopped(&end, Stop::Hardware(0), 3)?;
        let flags = end.state.rflags & rflags::STATUS;
        equal("flags", flags, rflags::CF | rflags::SF | rflags::AF | rflags::PF)
    });
    suite.add("code that the debugger changed is seen", &[Mode::Real, Mode::Long], |g| {
        g.load(|a| a.db(&[0xb0, 1, 0x90]))?;
        stopped(&start(g, &execute(place::CODE + 2))?, Stop::Hardware(0), 2)?;
        go_on(g, &GuestDebug::default())?.done()?;
        g.write(place::CODE + 1, &[2]);
        let end = start(g, &execute(place::CODE + 2))?;
        equal("AL", end.gpr(gpr::RAX) & 0xff, 2)
    });
    suite.add("what no processor has is refused, and what was set stays", &[Mode::Long], |g| {
        g.load(|a| a.nop())?;
        g.vcpu.set_state(&g.state)?;
        g.vcpu.set_debug(&execute(place::CODE))?;
        let breakpoint = HardwareBreakpoint { address: place::DATA, length: 4, watch: Watch::Write };
        for bad in [
            GuestDebug { hardware: vec![breakpoint; HARDWARE_BREAKPOINTS + 1], ..GuestDebug::default() },
            hardware(place::DATA + 1, 4, Watch::Write),
            hardware(place::DATA, 3, Watch::Access),
            hardware(place::CODE, 2, Watch::Execute),
        ] {
            ensure(g.vcpu.set_debug(&bad).is_err(), || format!("{bad:?} is taken"))?;
        }
        stopped(&g.resume()?, Stop::Hardware(0), 0)
    });
    suite.add("four hardware breakpoints tell which", &[Mode::Real, Mode::Long], |g| {
        g.load(|a| a.db(&[0x90; 8]))?;
        let places = [6, 2, 4, 1];
        let hardware =
            places.map(|n| HardwareBreakpoint { address: place::CODE + n, length: 1, watch: Watch::Execute });
        let all = GuestDebug { hardware: hardware.to_vec(), ..GuestDebug::default() };
        g.vcpu.set_state(&g.state)?;
        for (offset, index) in [(1, 3), (2, 1), (4, 2), (6, 0)] {
            stopped(&go_on(g, &all)?, Stop::Hardware(index), offset)?;
            stopped(&go_on(g, &STEP)?, Stop::Step, offset + 1)?;
        }
        go_on(g, &all)?.done()
    });
}

fn watchpoints(suite: &mut Suite) {
    suite.add("a write watchpoint stops behind the write, and not for reads", FLAT, |g| {
        g.load(|a| {
            a.mov(eax, dword_ptr(ebx))?;
            a.mov(dword_ptr(ebx), ecx)?;
            a.nop()
        })?;
        g.state.gpr[gpr::RBX] = place::DATA;
        g.state.gpr[gpr::RCX] = 0x1234;
        let end = start(g, &hardware(place::DATA, 4, Watch::Write))?;
        let second = if g.mode.bits() == 64 { 6 } else { 4 };
        stopped(&end, Stop::Hardware(0), second)?;
        equal("memory", g.read_u32(place::DATA), 0x1234)?;
        g.resume()?.done()
    });
    suite.add("an access watchpoint stops behind a read", FLAT, |g| {
        g.load(|a| {
            a.mov(eax, dword_ptr(ebx))?;
            a.nop()
        })?;
        g.state.gpr[gpr::RBX] = place::DATA;
        g.write_u32(place::DATA, 77);
        let end = start(g, &hardware(place::DATA, 1, Watch::Access))?;
        stopped(&end, Stop::Hardware(0), if g.mode.bits() == 64 { 3 } else { 2 })?;
        equal("EAX", end.gpr(gpr::RAX), 77)?;
        g.resume()?.done()
    });
    suite.add("a watchpoint is exact to the byte", &[Mode::Long, Mode::User], |g| {
        g.load(|a| {
            a.mov(byte_ptr(rbx + 3), cl)?;
            a.mov(byte_ptr(rbx + 6), cl)?;
            a.mov(word_ptr(rbx + 5), cx)?;
            a.mov(byte_ptr(rbx + 4), cl)?;
            a.mov(qword_ptr(rbx - 3), rcx)
        })?;
        g.state.gpr[gpr::RBX] = place::DATA;
        let watch = hardware(place::DATA + 4, 1, Watch::Write);
        let end = start(g, &watch)?;
        stopped(&end, Stop::Hardware(0), 13)?;
        let end = g.resume()?;
        stopped(&end, Stop::Hardware(0), 17)?;
        g.resume()?.done()
    });
    suite.add("a watchpoint in a hot loop of stores", &[Mode::Long, Mode::User], |g| {
        g.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(qword_ptr(rbx + rcx * 8), rcx)?;
            a.inc(rcx)?;
            a.cmp(rcx, 1000)?;
            a.jne(again)
        })?;
        g.state.gpr[gpr::RBX] = place::HIGH_RAM;
        g.state.gpr[gpr::RCX] = 0;
        let end = start(g, &hardware(place::HIGH_RAM + 8 * 700, 8, Watch::Write))?;
        equal("exit", &end.exit, &Exit::Debug(Stop::Hardware(0)))?;
        equal("RCX", end.gpr(gpr::RCX), 700)?;
        equal("memory", g.read_u64(place::HIGH_RAM + 8 * 700), 700)?;
        g.resume()?.registers(&[(gpr::RCX, 1000)])
    });
    suite.add("a watchpoint sees string instructions and pushes", &[Mode::Long, Mode::User], |g| {
        g.load(|a| {
            a.rep().stosq()?;
            a.push(rax)?;
            a.nop()
        })?;
        g.state.gpr[gpr::RDI] = place::DATA;
        g.state.gpr[gpr::RCX] = 100;
        let watch = |address| hardware(address, 8, Watch::Write);
        let end = start(g, &watch(place::DATA + 8 * 50))?;
        equal("exit", &end.exit, &Exit::Debug(Stop::Hardware(0)))?;
        ensure(end.gpr(gpr::RCX) <= 49, || format!("RCX {}", end.gpr(gpr::RCX)))?;
        let top = end.gpr(gpr::RSP) - 8;
        stopped(&go_on(g, &watch(top))?, Stop::Hardware(0), 4)?;
        g.resume()?.done()
    });
    suite.add("an access that faults does not stop", &[Mode::User], |g| {
        g.map(place::DATA, place::DATA | page::P | page::U);
        g.load(|a| a.mov(dword_ptr(rbx), ecx))?;
        g.state.gpr[gpr::RBX] = place::DATA;
        let end = start(g, &hardware(place::DATA, 4, Watch::Write))?;
        end.vectored(vector::PF).map(|_| ())
    });
}

fn steps(suite: &mut Suite) {
    suite.add("a step is one instruction, and TF is not set", EVERY_MODE, |g| {
        g.load(|a| a.db(&[0x90, 0xeb, 0x01, 0xf4, 0x90]))?;
        let mut end = start(g, &STEP)?;
        for offset in [1, 4, 5] {
            stopped(&end, Stop::Step, offset)?;
            end.flags(rflags::TF, 0)?;
            end = g.resume()?;
        }
        Ok(())
    });
    suite.add("a step over I/O is whole", &[Mode::Real, Mode::Protected, Mode::Long], |g| {
        g.io.answer(&[0x5a]);
        g.load(|a| {
            a.in_(al, 0x80)?;
            a.out(0x80, al)
        })?;
        let end = start(g, &STEP)?;
        stopped(&end, Stop::Step, 2)?;
        equal("AL", end.gpr(gpr::RAX) & 0xff, 0x5a)?;
        let end = g.resume()?;
        stopped(&end, Stop::Step, 4)?;
        end.saw(&[Access::Out { port: 0x80, size: 1, value: 0x5a }])
    });
    suite.add("a step over an access to a device is whole", &[Mode::Long], |g| {
        g.load(|a| a.mov(dword_ptr(rbx), ecx))?;
        g.state.gpr[gpr::RBX] = place::MMIO;
        g.state.gpr[gpr::RCX] = 9;
        let end = start(g, &STEP)?;
        stopped(&end, Stop::Step, 2)?;
        equal("accesses", end.log.len(), 1)
    });
    suite.add("a step of a repeated instruction is some iterations", &[Mode::Protected, Mode::Long], |g| {
        g.load(|a| a.rep().stosb())?;
        g.state.gpr[gpr::RDI] = place::DATA;
        g.state.gpr[gpr::RCX] = 3;
        let mut end = start(g, &STEP)?;
        // The last iteration and the end may be two.
        for _ in 0..3 {
            if end.linear_rip() == place::CODE {
                stopped(&end, Stop::Step, 0)?;
                end = g.resume()?;
            }
        }
        stopped(&end, Stop::Step, 2)?;
        equal("RCX", end.gpr(gpr::RCX), 0)?;
        equal("memory", g.read(place::DATA, 3), vec![end.gpr(gpr::RAX) as u8; 3])
    });
    suite.add("interrupts wait while it steps", &[Mode::Real, Mode::Protected, Mode::Long], |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        g.load(|a| {
            a.nop()?;
            a.nop()?;
            a.db(&[0xeb, 0xfe])
        })?;
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(msi(0x50))?;
        for offset in [1, 2] {
            stopped(&go_on(g, &STEP)?, Stop::Step, offset)?;
        }
        go_on(g, &GuestDebug::default())?.vectored(0x50).map(|_| ())
    });
    suite.add("a step over HLT halts, and the next waits for an interrupt", &[Mode::Long], |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        let handler = g.handler(0x50, |a| {
            a.nop()?;
            a.nop()
        })?;
        g.load(|a| {
            a.hlt()?;
            a.nop()
        })?;
        let end = start(g, &STEP)?;
        stopped(&end, Stop::Step, 1)?;
        equal("activity", end.state.activity, Activity::Halted)?;
        g.vm.signal_msi(msi(0x50))?;
        let end = go_on(g, &STEP)?;
        equal("exit", &end.exit, &Exit::Debug(Stop::Step))?;
        equal("activity", end.state.activity, Activity::Running)?;
        // Before or behind the handler's first instruction.
        ensure((handler..=handler + 1).contains(&end.state.rip), || format!("RIP {:#x}", end.state.rip))?;
        equal("ended", go_on(g, &GuestDebug::default())?.ended, true)
    });
    suite.add("a step into an exception ends in its handler", &[Mode::Protected, Mode::Long], |g| {
        let handler = g.handler(vector::UD, |a| {
            a.nop()?;
            a.nop()
        })?;
        g.load(|a| a.ud2())?;
        let end = start(g, &STEP)?;
        equal("exit", &end.exit, &Exit::Debug(Stop::Step))?;
        // Before or behind the handler's first instruction.
        ensure((handler..=handler + 1).contains(&end.state.rip), || format!("RIP {:#x}", end.state.rip))
    });
    suite.add("a kick comes before a step or after it", &[Mode::Long], |g| {
        g.load(|a| a.nop())?;
        g.vcpu.set_state(&g.state)?;
        g.vcpu.set_debug(&STEP)?;
        g.vcpu.kicker().kick();
        let (first, second) = (g.resume()?, g.resume()?);
        let stopped = |end: &End| end.exit == Exit::Debug(Stop::Step) && end.state.rip == place::CODE + 1;
        let kicked = |end: &End| end.exit == Exit::Kicked;
        let fine = kicked(&first) && stopped(&second) || stopped(&first) && kicked(&second);
        ensure(fine, || format!("{:?}, then {:?}", first.exit, second.exit))
    });
}

fn beside_the_guests_own(suite: &mut Suite) {
    suite.add("the guest's INT3 is its own", &[Mode::Real, Mode::Protected, Mode::Long], |g| {
        g.load(|a| {
            a.int3()?;
            a.nop()
        })?;
        let far = software(place::MORE_CODE);
        start(g, &far)?.vectored(vector::BP).map(|_| ())
    });
    suite.add("the guest's TF is its own", &[Mode::Protected, Mode::Long], |g| {
        g.state.rflags |= rflags::TF;
        g.load(|a| {
            a.nop()?;
            a.nop()
        })?;
        let end = start(g, &execute(place::MORE_CODE))?;
        end.trap_after(1, vector::DB)?;
        equal("DR6", end.state.dr[6], dr::DR6_FIXED | dr::DR6_BS)
    });
    suite.add("the guest's debug registers stay as they are", &[Mode::Long], |g| {
        g.state.dr[0] = place::DATA;
        g.state.dr[7] = dr::DR7_FIXED | 1 | 0xd << 16;
        g.load(|a| {
            a.mov(rax, dr0)?;
            a.mov(rbx, dr7)?;
            a.nop()
        })?;
        let end = start(g, &execute(place::CODE + 6))?;
        stopped(&end, Stop::Hardware(0), 6)?;
        equal("DR0 and DR7", (end.gpr(gpr::RAX), end.gpr(gpr::RBX)), (g.state.dr[0], g.state.dr[7]))?;
        equal("DR6", end.state.dr[6], g.state.dr[6])?;
        go_on(g, &GuestDebug::default())?.done()?;
        equal("DR7", g.vcpu.state()?.dr[7], g.state.dr[7])
    });
    suite.add("the guest's breakpoints work while the debugger has none", &[Mode::Long], |g| {
        g.state.dr[0] = place::CODE + 1;
        g.state.dr[7] = dr::DR7_FIXED | 1;
        g.load(|a| {
            a.nop()?;
            a.nop()
        })?;
        g.vcpu.set_state(&g.state)?;
        g.vcpu.set_debug(&execute(place::MORE_CODE))?;
        let end = go_on(g, &GuestDebug::default())?;
        equal("RIP", end.vectored(vector::DB)?.rip, place::CODE + 1)
    });
}
