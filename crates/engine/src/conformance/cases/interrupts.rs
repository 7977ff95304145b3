//! External interrupts, NMIs, shadows and HLT: what is delivered when (SDM vol. 3A 6.8, chapter 10).
//!
//! A write to port [`SEND`] makes the machine send interrupts in the middle of a run. An interrupt comes
//! "soon": where a case needs one to have come, the guest waits in a loop.

use super::super::guest::A_LITTLE;
use super::super::tables::Ending;
use super::super::{Asm, End, Guest, Mismatch};
use super::prelude::*;
use anyvisor_x86::lapic::reg;
use anyvisor_x86::state::Activity;
use iced_x86::IcedError;

const SEND: u16 = 0x80;
/// Modes with a LAPIC that code of CPL 0 can use.
const MODES: &[Mode] = &[Mode::Real, Mode::Protected, Mode::Compat, Mode::Long];

pub fn add(suite: &mut Suite) {
    messages(suite.group("interrupts"));
    shadows(suite);
    priorities(suite);
    pic(suite);
    nmi(suite.group("NMI"));
    hlt(suite.group("HLT"));
}

/// A fixed, edge-triggered interrupt to APIC 0.
pub fn msi(vector: u8) -> Msi {
    Msi { address: 0xfee0_0000, data: u32::from(vector) }
}

/// An NMI to APIC 0.
pub const NMI: Msi = Msi { address: 0xfee0_0000, data: 0x400 };

/// Enables the local APIC by software, as guests do by its spurious vector register.
pub fn enable_apic(g: &mut Guest) {
    set_apic(g, reg::SVR, 0x1ff);
}

/// Sets a register of the local APIC's page in the initial state.
pub fn set_apic(g: &mut Guest, register: u32, value: u32) {
    g.state.lapic[register as usize..register as usize + 4].copy_from_slice(&value.to_le_bytes());
}

/// Sends `messages` at each write to [`SEND`].
pub fn send_on_out(g: &Guest, messages: &'static [Msi]) {
    let vm = g.vm.clone();
    g.io.on_out(SEND, move || {
        for &message in messages {
            vm.signal_msi(message).expect("the engine takes messages");
        }
    });
}

/// What sends `message` to the machine, from whatever thread.
fn sends(g: &Guest, message: Msi) -> impl FnOnce() + Send + use<> {
    let vm = g.vm.clone();
    move || vm.signal_msi(message).expect("the engine takes messages")
}

/// `jmp $`.
fn forever(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.db(&[0xeb, 0xfe])
}

/// Has the messages of [`send_on_out`] sent, and waits.
fn send_and_wait(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(SEND as i32, al)?;
    forever(a)
}

/// Sleeps until an interrupt.
fn sti_hlt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.sti()?;
    a.hlt()
}

fn messages(suite: &mut Suite) {
    const MSG: &[Msi] = &[Msi { address: 0xfee0_0000, data: 0x50 }];
    suite.add("an MSI before the run is delivered at once", EVERY_MODE, |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        g.load(forever)?;
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(msi(0x50))?;
        let end = g.resume()?;
        let frame = end.vectored(0x50)?;
        equal("RIP", frame.rip, g.ip())?;
        end.flags(rflags::IF, 0)
    });
    suite.add("an MSI during the run", MODES, |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        send_on_out(g, MSG);
        let end = g.run(send_and_wait)?;
        end.vectored(0x50).map(drop)
    });
    suite.add("an MSI from another thread during a loop", &[Mode::Real, Mode::Long, Mode::User], |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        let message = sends(g, msi(0x51));
        g.run_while(message, forever)?.vectored(0x51).map(drop)
    });
    suite.add("no interrupt while IF is clear", MODES, |g| {
        enable_apic(g);
        send_on_out(g, MSG);
        let end = g.run(|a| {
            a.out(SEND as i32, al)?;
            a.nop()?;
            a.nop()
        })?;
        end.done()
    });
    suite.add("no interrupt while the local APIC is disabled", &[Mode::Real, Mode::Long], |g| {
        g.state.rflags |= rflags::IF;
        send_on_out(g, MSG);
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.nop()
        })?
        .done()
    });
    suite.add("an MSI to another APIC ID is not ours", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        send_on_out(g, &[Msi { address: 0xfee0_5000, data: 0x50 }]);
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.nop()
        })?
        .done()
    });
    suite.add("a broadcast MSI is ours", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        send_on_out(g, &[Msi { address: 0xfeef_f000, data: 0x50 }]);
        let end = g.run(send_and_wait)?;
        end.vectored(0x50).map(drop)
    });
    suite.add("a logical MSI goes by LDR", &[Mode::Long], |g| {
        enable_apic(g);
        set_apic(g, reg::LDR, 0x0400_0000);
        g.state.rflags |= rflags::IF;
        send_on_out(g, &[Msi { address: 0xfee0_2004, data: 0x60 }, Msi { address: 0xfee0_6004, data: 0x50 }]);
        let end = g.run(send_and_wait)?;
        end.vectored(0x50).map(drop)
    });
    suite.add("an interrupt has no error code even on vector 0x1e", &[Mode::Long], |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x1e }]);
        let end = g.run(send_and_wait)?;
        equal("vector", end.vector(), Some(0x1e))?;
        let rip = g.read_u64(end.gpr(gpr::RSP));
        ensure((place::CODE + 2..=place::CODE + 4).contains(&rip), || format!("top of the stack is {rip:#x}"))
    });
    suite.add("two MSIs of one vector before delivery are one interrupt", &[Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x50 }, Msi { address: 0xfee0_0000, data: 0x50 }]);
        count_interrupts(g, 0x50)?;
        let end = g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.nop()?;
            a.nop()?;
            a.cli()
        })?;
        end.registers(&[(gpr::RBX, 1)])
    });
    suite.add("interrupts return to where they came from", &[Mode::Long, Mode::User], |g| {
        enable_apic(g);
        g.allow_port(SEND);
        send_on_out(g, MSG);
        g.state.rflags |= rflags::IF;
        count_interrupts(g, 0x50)?;
        let end = g.run(|a| {
            let mut again = a.create_label();
            a.mov(ecx, 1000)?;
            a.set_label(&mut again)?;
            a.test(ecx, 0xff)?;
            let mut no = a.create_label();
            a.jne(no)?;
            a.out(SEND as i32, al)?;
            a.set_label(&mut no)?;
            a.add(rdx, 3)?;
            a.dec(ecx)?;
            a.jne(again)?;
            // The last one may still be on its way.
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.cmp(rbx, 3)?;
            a.jb(wait)
        })?;
        end.registers(&[(gpr::RBX, 3), (gpr::RDX, 3000)])
    });
    level_triggered(suite);
}

/// A handler that counts in RBX, ends the interrupt at the xAPIC and returns.
fn count_interrupts(g: &mut Guest, vector: u8) -> Verdict {
    g.handler(vector, |a| {
        a.inc(rbx)?;
        a.push(rax)?;
        a.mov(rax, place::APIC)?;
        a.mov(dword_ptr(rax + i32::try_from(reg::EOI).expect("a small offset")), 0)?;
        a.pop(rax)?;
        a.iretq()
    })
    .map(drop)
}

fn level_triggered(suite: &mut Suite) {
    // What an I/O APIC sends for a level-triggered pin.
    const LEVEL: &[Msi] = &[Msi { address: 0xfee0_0000, data: 0xc041 }];
    suite.add("the end of a level-triggered interrupt is told to the machine", &[Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, LEVEL);
        count_interrupts(g, 0x41)?;
        let end = g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.nop()?;
            a.nop()
        })?;
        end.registers(&[(gpr::RBX, 1)])?;
        end.saw(&[Access::Out { port: SEND, size: 1, value: 0 }, Access::Eoi(0x41)])
    });
    suite.add("the end of an edge-triggered interrupt is not", &[Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x41 }]);
        count_interrupts(g, 0x41)?;
        let end = g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.nop()?;
            a.nop()
        })?;
        end.registers(&[(gpr::RBX, 1)])?;
        end.saw(&[Access::Out { port: SEND, size: 1, value: 0 }])
    });
}

fn shadows(suite: &mut Suite) {
    const MSG: &[Msi] = &[Msi { address: 0xfee0_0000, data: 0x50 }];
    let setup = |g: &mut Guest| {
        enable_apic(g);
        send_on_out(g, MSG);
    };
    suite.add("STI lets one more instruction run", MODES, move |g| {
        setup(g);
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.nop()?;
            a.nop()
        })?
        .trap_after(3, 0x50)
    });
    suite.add("STI; CLI lets nothing in", MODES, move |g| {
        setup(g);
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.cli()?;
            a.nop()
        })?
        .done()
    });
    suite.add("only the first STI has a shadow", MODES, move |g| {
        setup(g);
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.sti()?;
            a.nop()
        })?
        .trap_after(3, 0x50)
    });
    suite.add(
        "MOV SS holds interrupts off for one instruction",
        &[Mode::Real, Mode::Protected, Mode::Long],
        move |g| {
            setup(g);
            g.state.gpr[gpr::RAX] = g.state.segments.seg[index::SS].selector.into();
            // STI's shadow covers MOV SS, whose own covers the first NOP.
            g.run(|a| {
                a.out(SEND as i32, al)?;
                a.sti()?;
                a.db(&[0x8e, 0xd0])?;
                a.nop()?;
                a.nop()
            })?
            .trap_after(4, 0x50)
        },
    );
    suite.add("POP SS holds interrupts off for one instruction", &[Mode::Real, Mode::Protected], move |g| {
        setup(g);
        g.state.gpr[gpr::RAX] = g.state.segments.seg[index::SS].selector.into();
        g.run(|a| {
            a.db(&[0x50])?;
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.db(&[0x17])?;
            a.nop()?;
            a.nop()
        })?
        .trap_after(5, 0x50)
    });
    suite.add("POPF has no shadow", &[Mode::Real, Mode::Protected, Mode::Long], move |g| {
        setup(g);
        g.run(|a| {
            a.push(0x202)?;
            a.out(SEND as i32, al)?;
            a.db(&[0x9d])?;
            a.nop()
        })?
        .trap_after(3, 0x50)
    });
    suite.add("IRET has no shadow", &[Mode::Long], move |g| {
        setup(g);
        let target = place::MORE_CODE;
        g.code_at(target, 64, |a| a.nop())?;
        let end = g.run(|a| {
            a.push(i32::from(selector::DATA))?;
            a.push(place::STACK as i32)?;
            a.push(0x202)?;
            a.push(i32::from(selector::CODE64))?;
            a.push(target as i32)?;
            a.out(SEND as i32, al)?;
            a.iretq()
        })?;
        equal("RIP", end.vectored(0x50)?.rip, target)
    });
    suite.add("a shadow can be set by the state", MODES, |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        g.state.events.interrupt_shadow = 1;
        g.load(|a| {
            a.nop()?;
            a.nop()
        })?;
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(msi(0x50))?;
        g.resume()?.trap_after(1, 0x50)
    });
}

fn priorities(suite: &mut Suite) {
    suite.add("the higher vector comes first", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x50 }, Msi { address: 0xfee0_0000, data: 0x90 }]);
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.nop()?;
            a.nop()
        })?
        .trap_after(3, 0x90)
    });
    suite.add("the same class waits for the EOI", &[Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x50 }, Msi { address: 0xfee0_0000, data: 0x51 }]);
        // The handler of 0x51 lets interrupts in, in vain, and then ends it.
        g.handler(0x51, |a| {
            a.sti()?;
            a.nop()?;
            a.mov(rbx, rsp)?;
            a.mov(rax, place::APIC + u64::from(reg::EOI))?;
            a.mov(dword_ptr(rax), 0)?;
            forever(a)
        })?;
        let end = g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.nop()
        })?;
        end.vectored(0x50)?;
        ensure(end.gpr(gpr::RBX) != 0, || "0x50 came before the EOI of 0x51".to_owned())
    });
    suite.add("a higher class interrupts the handler", &[Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x60 }]);
        g.handler(0x50, |a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            forever(a)
        })?;
        g.state.rflags |= rflags::IF;
        g.load(forever)?;
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(msi(0x50))?;
        g.resume()?.vectored(0x60).map(drop)
    });
    suite.add("CR8 holds back its class and below", &[Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x5f }]);
        g.state.rflags |= rflags::IF;
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RCX]) = (5, 4);
        g.run(|a| {
            a.mov(cr8, rax)?;
            a.out(SEND as i32, al)?;
            a.nop()?;
            a.mov(cr8, rcx)?;
            forever(a)
        })?
        .trap_after(4, 0x5f)
    });
    suite.add("CR8 lets a higher class through", &[Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x60 }]);
        g.state.rflags |= rflags::IF;
        g.state.gpr[gpr::RAX] = 5;
        g.run(|a| {
            a.mov(cr8, rax)?;
            a.out(SEND as i32, al)?;
            forever(a)
        })?
        .vectored(0x60)
        .map(drop)
    });
    suite.add("CR8 and the APIC's TPR are one", &[Mode::Long], |g| {
        enable_apic(g);
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RBX]) = (7, place::APIC);
        let end = g.run(|a| {
            a.mov(cr8, rax)?;
            a.mov(ecx, dword_ptr(rbx + reg::TPR as i32))?;
            a.mov(dword_ptr(rbx + reg::TPR as i32), 0x9f)?;
            a.mov(rdx, cr8)
        })?;
        end.registers(&[(gpr::RCX, 0x70), (gpr::RDX, 9)])
    });
    suite.add("reserved bits of CR8 are #GP", &[Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = 16;
        g.run(|a| a.mov(cr8, rax))?.gp0()
    });
    suite.add("an exception comes before a waiting interrupt can", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x50 }]);
        // UD2 is in STI's shadow: #UD first, and its interrupt gate keeps 0x50 out.
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.ud2()
        })?
        .fault(vector::UD)
    });
}

/// Lets LINT0 take interrupts from the 8259 pair (ExtINT), which has `vector` ready.
fn lint0_takes_pic(g: &mut Guest, vector: u8) {
    enable_apic(g);
    set_apic(g, reg::LVT_LINT0, 0x700);
    g.io.set_pic(&[vector]);
}

/// Runs `code` with the 8259's wire raised.
fn run_raised(g: &mut Guest, code: impl FnOnce(&mut Asm) -> Result<(), IcedError>) -> Result<End, Mismatch> {
    g.load(code)?;
    g.vcpu.set_state(&g.state)?;
    g.vm.set_pic_intr(true)?;
    g.resume()
}

fn pic(suite: &mut Suite) {
    suite.add("ExtINT by LINT0 takes the vector from the PIC", MODES, |g| {
        lint0_takes_pic(g, 0x30);
        g.state.rflags |= rflags::IF;
        let end = run_raised(g, forever)?;
        end.vectored(0x30)?;
        ensure(end.log.contains(&Access::AcknowledgePic), || "no acknowledge cycle".to_owned())
    });
    suite.add("ExtINT needs no enabled APIC after reset", &[Mode::Real, Mode::Long], |g| {
        // The bootstrap processor starts in virtual wire mode.
        g.state.lapic.clear();
        g.state.rflags |= rflags::IF;
        g.io.set_pic(&[0x31]);
        run_raised(g, forever)?.vectored(0x31).map(drop)
    });
    suite.add("a masked LINT0 lets nothing through", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        set_apic(g, reg::LVT_LINT0, 0x1_0700);
        g.state.rflags |= rflags::IF;
        g.io.set_pic(&[0x30]);
        let end = run_raised(g, |a| a.nop())?;
        end.done()?;
        end.saw(&[])
    });
    suite.add("ExtINT waits for IF", &[Mode::Real, Mode::Long], |g| {
        lint0_takes_pic(g, 0x30);
        run_raised(g, |a| {
            a.nop()?;
            a.sti()?;
            a.nop()?;
            a.nop()
        })?
        .trap_after(3, 0x30)
    });
    suite.add("INTR that has dropped delivers nothing", &[Mode::Real, Mode::Long], |g| {
        lint0_takes_pic(g, 0x30);
        g.load(|a| {
            a.sti()?;
            a.nop()?;
            a.nop()
        })?;
        g.vcpu.set_state(&g.state)?;
        g.vm.set_pic_intr(true)?;
        g.vm.set_pic_intr(false)?;
        g.resume()?.done()
    });
    suite.add("INTR raised and dropped during the run", &[Mode::Real, Mode::Long], |g| {
        lint0_takes_pic(g, 0x33);
        let vm = g.vm.clone();
        g.io.on_out(SEND, move || vm.set_pic_intr(true).expect("the engine takes it"));
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.nop()?;
            a.nop()
        })?
        .trap_after(3, 0x33)
    });
}

/// IRETQ to what follows it, a NOP, with interrupts off.
pub fn iret_to_next(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut after = a.create_label();
    a.push(i32::from(selector::DATA))?;
    a.push(place::STACK as i32)?;
    a.push(2)?;
    a.push(i32::from(selector::CODE64))?;
    a.lea(rax, ptr(after))?;
    a.push(rax)?;
    a.iretq()?;
    a.set_label(&mut after)?;
    a.nop()
}

/// What an NMI's IRET returns to, before the end. KVM on AMD-V takes an IRET for executed when it meets another RIP
/// than the IRET's, whatever CS is: these are beyond the handler's offset in real mode.
const NOPS: [u8; 4] = [0x90; 4];

/// Goes on from the default handler of NMIs, where `end` is, with an IRET, which ends the blocking. There is an end
/// where the NMI came.
///
/// Bochs forgets at VM entries that NMIs are no longer blocked (`cpu/vmx.cc`, `VMenterLoadCheckGuestState` only sets
/// the block): without an IRET no later guest of the processor would get one.
fn back_from_nmi(g: &mut Guest, end: &End) -> Result<End, Mismatch> {
    let frame = end.vectored(vector::NMI)?;
    equal("NMIs blocked in the handler", end.state.events.nmi_blocked, true)?;
    let base = if g.mode == Mode::Real { u64::from(frame.cs) << 4 } else { 0 };
    g.write(base + frame.rip, &[&NOPS[..], Ending::PORT.code].concat());
    g.write(end.linear_rip(), if g.mode.handler_bits() == 64 { &[0x48, 0xcf] } else { &[0xcf] });
    g.vcpu.set_state(&end.state)?;
    let end = g.resume()?;
    equal("NMIs blocked behind the IRET", end.state.events.nmi_blocked, false)?;
    Ok(end)
}

/// As [`back_from_nmi`], and nothing else comes.
pub fn returns_from_nmi(g: &mut Guest, end: &End) -> Verdict {
    let back = end.vectored(vector::NMI)?.rip;
    let end = back_from_nmi(g, end)?;
    equal("RIP behind the end", (end.ended, end.state.rip), (true, back + NOPS.len() as u64 + Ending::PORT.length))
}

fn nmi(suite: &mut Suite) {
    const ONE: &[Msi] = &[NMI];
    suite.add("an NMI needs no IF", MODES, |g| {
        enable_apic(g);
        send_on_out(g, ONE);
        let end = g.run(send_and_wait)?;
        returns_from_nmi(g, &end)
    });
    suite.add("an NMI needs no enabled APIC", &[Mode::Real, Mode::Long], |g| {
        send_on_out(g, ONE);
        let end = g.run(send_and_wait)?;
        returns_from_nmi(g, &end)
    });
    suite.add("an NMI waits while one is handled, until IRET", &[Mode::Long], |g| {
        // The handler asks for another, which comes after its IRET only: it counts entries in RBX and runs
        // to its end each time (RDX).
        send_on_out(g, ONE);
        g.handler(vector::NMI, |a| {
            a.inc(rbx)?;
            a.cmp(rbx, 2)?;
            let mut last = a.create_label();
            a.je(last)?;
            a.out(SEND as i32, al)?;
            a.nop()?;
            a.nop()?;
            a.set_label(&mut last)?;
            a.shl(rdx, 4)?;
            a.or(rdx, rbx)?;
            a.iretq()
        })?;
        let end = g.run(|a| {
            a.out(SEND as i32, al)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.cmp(rbx, 2)?;
            a.jne(wait)
        })?;
        end.registers(&[(gpr::RBX, 2), (gpr::RDX, 0x12)])?;
        equal("NMIs blocked", end.state.events.nmi_blocked, false)
    });
    suite.add("two NMIs while one is handled are one", &[Mode::Long], |g| {
        send_on_out(g, &[NMI, NMI, NMI]);
        g.handler(vector::NMI, |a| {
            a.inc(rbx)?;
            a.iretq()
        })?;
        // One is delivered, one can wait; the third has no place (SDM vol. 3A 6.7.1). Whether the first is
        // taken before the others arrive is open: two in all at the most.
        let end = g.run(|a| {
            a.mov(ecx, 10_000)?;
            a.out(SEND as i32, al)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.dec(ecx)?;
            a.jne(wait)
        })?;
        end.done()?;
        ensure((1..=2).contains(&end.gpr(gpr::RBX)), || format!("{} NMIs", end.gpr(gpr::RBX)))
    });
    suite.add("an NMI comes before an interrupt", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        g.state.rflags |= rflags::IF;
        g.load(forever)?;
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(msi(0x50))?;
        g.vm.signal_msi(NMI)?;
        let end = g.resume()?;
        back_from_nmi(g, &end)?.vectored(0x50).map(drop)
    });
    suite.add("a waiting NMI is part of the state", &[Mode::Long], |g| {
        g.state.events.nmi_pending = true;
        let end = g.run(forever)?;
        returns_from_nmi(g, &end)
    });
    suite.add("blocked NMIs are part of the state", &[Mode::Long], |g| {
        g.state.events.nmi_pending = true;
        g.state.events.nmi_blocked = true;
        let end = g.run(|a| {
            a.nop()?;
            a.nop()
        })?;
        end.done()?;
        let events = end.state.events;
        equal("NMI pending, blocked", (events.nmi_pending, events.nmi_blocked), (true, true))?;
        let end = g.run(iret_to_next)?;
        returns_from_nmi(g, &end)
    });
    suite.add("any IRET ends the blocking", &[Mode::Long], |g| {
        g.state.events.nmi_blocked = true;
        let end = g.run(iret_to_next)?;
        end.done()?;
        equal("NMIs blocked", end.state.events.nmi_blocked, false)
    });
    suite.add("LINT1 as NMI does not depend on the vector", &[Mode::Long], |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x477 }]);
        let end = g.run(send_and_wait)?;
        returns_from_nmi(g, &end)
    });
}

fn hlt(suite: &mut Suite) {
    suite.add("an interrupt wakes it and returns behind it", MODES, |g| {
        enable_apic(g);
        let message = sends(g, msi(0x50));
        g.run_while(message, sti_hlt)?.trap(0x50)
    });
    suite.add("STI; HLT with an interrupt waiting does not sleep", MODES, |g| {
        enable_apic(g);
        send_on_out(g, &[Msi { address: 0xfee0_0000, data: 0x50 }]);
        g.run(|a| {
            a.out(SEND as i32, al)?;
            a.sti()?;
            a.hlt()
        })?
        .trap(0x50)
    });
    suite.add("an NMI wakes it with IF clear", &[Mode::Real, Mode::Long], |g| {
        let message = sends(g, NMI);
        let end = g.run_while(message, |a| a.hlt())?;
        end.trap(vector::NMI)?;
        returns_from_nmi(g, &end)
    });
    suite.add("the PIC wakes it", &[Mode::Real, Mode::Long], |g| {
        lint0_takes_pic(g, 0x30);
        let vm = g.vm.clone();
        g.run_while(move || vm.set_pic_intr(true).expect("the engine takes the wire"), sti_hlt)?.trap(0x30)
    });
    suite.add("an interrupt with IF clear does not wake it", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        let (kicker, message) = (g.vcpu.kicker(), sends(g, msi(0x50)));
        let end = g.run_while(
            move || {
                message();
                std::thread::sleep(A_LITTLE);
                kicker.kick();
            },
            |a| a.hlt(),
        )?;
        equal("activity", end.state.activity, Activity::Halted)?;
        equal("RIP", end.state.rip, g.ip() + 1)
    });
    suite.add("a halted vCPU stays halted over a kick", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        let kicker = g.vcpu.kicker();
        let end = g.run_while(move || kicker.kick(), sti_hlt)?;
        equal("exit", &end.exit, &crate::Exit::Kicked)?;
        equal("activity", end.state.activity, Activity::Halted)?;
        g.vm.signal_msi(msi(0x52))?;
        g.resume()?.trap(0x52)
    });
    suite.add("halted is part of the state", &[Mode::Real, Mode::Long], |g| {
        enable_apic(g);
        g.state.activity = Activity::Halted;
        g.state.rflags |= rflags::IF;
        g.load(|a| a.nop())?;
        g.vcpu.set_state(&g.state)?;
        g.vm.signal_msi(msi(0x52))?;
        g.resume()?.trap_after(0, 0x52)
    });
    suite.add("the return from the handler goes on behind it", &[Mode::Long], |g| {
        enable_apic(g);
        count_interrupts(g, 0x50)?;
        let message = sends(g, msi(0x50));
        let end = g.run_while(message, |a| {
            sti_hlt(a)?;
            a.mov(ecx, 7)
        })?;
        end.registers(&[(gpr::RBX, 1), (gpr::RCX, 7)])
    });
}
