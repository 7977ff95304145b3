//! Kicks: kept before a run, merged, from other threads, in loops, during HLT and between call-outs; and that
//! a run ends at an instruction boundary, from where it goes on.
//!
//! Loops run with IF set unless a case is about that: what wakes a processor in a guest for the host differs.

use super::super::{Asm, End, Guest, Mismatch};
use super::prelude::*;
use crate::Exit;
use anyvisor_x86::state::Activity;
use std::time::Duration;

const MODES: &[Mode] = &[Mode::Real, Mode::Protected, Mode::Long, Mode::User];

/// Runs `code`, which does not end by itself, and kicks the vCPU from another thread.
pub fn kicked(g: &mut Guest, code: impl FnOnce(&mut Asm) -> Result<(), iced_x86::IcedError>) -> Result<End, Mismatch> {
    let kicker = g.vcpu.kicker();
    let end = g.run_while(move || kicker.kick(), code)?;
    equal("exit", &end.exit, &Exit::Kicked)?;
    Ok(end)
}

pub fn add(suite: &mut Suite) {
    suite.group("kicks");
    suite.add("a kick before the run is kept", MODES, |g| {
        g.load(|a| a.nop())?;
        g.vcpu.set_state(&g.state)?;
        g.vcpu.kicker().kick();
        let end = g.resume()?;
        equal("exit", &end.exit, &Exit::Kicked)?;
        equal("RIP", end.state.rip, g.ip())?;
        g.resume()?.done()
    });
    suite.add("kicks before the run merge into one", MODES, |g| {
        g.load(|a| a.nop())?;
        g.vcpu.set_state(&g.state)?;
        let kicker = g.vcpu.kicker();
        for _ in 0..5 {
            kicker.kick();
        }
        let end = g.resume()?;
        equal("ended", end.ended, false)?;
        g.resume()?.done()
    });
    suite.add("a kick during a call-out ends the run behind the instruction", MODES, |g| {
        g.allow_port(0x80);
        let kicker = g.vcpu.kicker();
        g.io.on_out(0x80, move || kicker.kick());
        let end = g.run(|a| {
            a.out(0x80, al)?;
            a.db(&[0xeb, 0xfe])
        })?;
        equal("exit", &end.exit, &Exit::Kicked)?;
        equal("RIP", end.state.rip, g.ip() + 2)?;
        end.saw(&[Access::Out { port: 0x80, size: 1, value: 0 }])
    });
    suite.add("a read finished by a kicked run is complete", MODES, |g| {
        g.allow_port(0x80);
        g.allow_port(0x81);
        let kicker = g.vcpu.kicker();
        g.io.on_out(0x80, move || kicker.kick());
        g.io.answer(&[0x42]);
        let end = g.run(|a| {
            a.out(0x80, al)?;
            a.in_(al, 0x81)?;
            a.db(&[0xeb, 0xfe])
        })?;
        equal("exit", &end.exit, &Exit::Kicked)?;
        // The run ended before the IN or behind it, never within.
        let reads = end.log.iter().filter(|access| matches!(access, Access::In { .. })).count();
        let done = end.state.rip == g.ip() + 4;
        equal("AL", end.gpr(gpr::RAX), if done { 0x42 } else { 0 })?;
        equal("reads", reads, usize::from(done))
    });
    suite.add("a tight loop", MODES, |g| {
        g.state.rflags |= rflags::IF;
        let end = kicked(g, |a| a.db(&[0xeb, 0xfe]))?;
        equal("RIP", end.state.rip, g.ip())
    });
    suite.add("a loop with interrupts off", &[Mode::Real, Mode::Long], |g| {
        kicked(g, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.cli()?;
            a.inc(ax)?;
            a.jmp(again)
        })
        .map(drop)
    });
    suite.add("a loop of calls and returns", &[Mode::Long, Mode::User], |g| {
        g.state.rflags |= rflags::IF;
        let end = kicked(g, |a| {
            let (mut again, mut function) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.call(function)?;
            a.jmp(again)?;
            a.set_label(&mut function)?;
            a.inc(rax)?;
            a.ret()
        })?;
        ensure([place::STACK, place::STACK - 8].contains(&end.gpr(gpr::RSP)), || {
            format!("RSP {:#x}", end.gpr(gpr::RSP))
        })
    });
    suite.add("a long REP string instruction", &[Mode::Long, Mode::User], |g| {
        // Five million bytes, again and again: registers of a kicked run say how far it got.
        g.state.gpr[gpr::RDI] = place::HIGH_RAM;
        g.state.rflags |= rflags::IF;
        let end = kicked(g, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rdi, place::HIGH_RAM)?;
            a.mov(ecx, 5_000_000)?;
            a.rep().stosb()?;
            a.jmp(again)
        })?;
        let (rcx_now, rdi_now) = (end.gpr(gpr::RCX), end.gpr(gpr::RDI));
        let at_reload = end.state.rip <= place::CODE + 15;
        ensure(at_reload || rdi_now - place::HIGH_RAM + rcx_now == 5_000_000, || {
            format!("RCX {rcx_now:#x}, RDI {rdi_now:#x}, RIP {:#x}", end.state.rip)
        })
    });
    suite.add("HLT", &[Mode::Real, Mode::Protected, Mode::Long], |g| {
        let end = kicked(g, |a| a.hlt())?;
        equal("activity", end.state.activity, Activity::Halted)?;
        equal("RIP", end.state.rip, g.ip() + 1)
    });
    suite.add("many kicks from many threads, and the guest is none the wiser", &[Mode::Long, Mode::User], |g| {
        // The guest counts, and again, as long as the host kicks it. A bounded number: where runs are slow to begin,
        // endless kicks would leave the guest no time at all.
        g.state.rflags |= rflags::IF;
        g.load(|a| {
            let mut again = a.create_label();
            a.mov(ecx, 300_000)?;
            a.set_label(&mut again)?;
            a.add(rax, 3)?;
            a.dec(ecx)?;
            a.jne(again)
        })?;
        let senders = [(); 2].map(|()| {
            let kicker = g.vcpu.kicker();
            std::thread::spawn(move || {
                for _ in 0..100 {
                    kicker.kick();
                    std::thread::sleep(Duration::from_micros(200));
                }
            })
        });
        let mut kicking = true;
        while kicking {
            kicking = senders.iter().any(|sender| !sender.is_finished());
            let mut end = g.start()?;
            while end.exit == Exit::Kicked && !end.ended {
                end = g.resume()?;
            }
            end.registers(&[(gpr::RAX, 900_000), (gpr::RCX, 0)])?;
        }
        Ok(())
    });
    suite.add("a kick from a signal-like context while the vCPU is idle is not lost", &[Mode::Long], |g| {
        g.load(|a| a.nop())?;
        for _ in 0..50 {
            g.vcpu.set_state(&g.state)?;
            let kicker = g.vcpu.kicker();
            std::thread::spawn(move || kicker.kick()).join().expect("the sender does not panic");
            let end = g.resume()?;
            equal("ended", end.ended, false)?;
            g.resume()?.done()?;
        }
        Ok(())
    });
}
