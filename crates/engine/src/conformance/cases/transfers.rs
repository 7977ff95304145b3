//! Changes of privilege and mode, by every road: SYSCALL and SYSRET, SYSENTER and SYSEXIT, IRET, far CALL,
//! JMP and RET, call gates, task switches, and the switch of modes by CR0 and EFER.

use super::super::tables::{self, descriptor};
use super::super::{Guest, Mismatch};
use super::prelude::*;

pub fn add(suite: &mut Suite) {
    syscall(suite.group("SYSCALL and SYSRET"));
    sysenter(suite.group("SYSENTER and SYSEXIT"));
    iret(suite.group("IRET"));
    far(suite.group("far transfers"));
    call_gates(suite.group("call gates"));
    tasks(suite.group("task switches"));
    modes(suite.group("mode switches"));
}

/// STAR as the table of selectors asks for.
const STAR: u64 = (selector::CODE64 as u64) << 32 | (selector::USER_CODE32 as u64) << 48;

fn syscall(suite: &mut Suite) {
    let setup = |g: &mut Guest| {
        g.state.set_msr(msr::STAR, STAR);
        g.state.set_msr(msr::LSTAR, place::MORE_CODE);
        g.state.set_msr(msr::SFMASK, rflags::IF | rflags::DF | rflags::TF);
    };
    suite.add("SYSCALL goes to LSTAR and keeps RIP in RCX, RFLAGS in R11", WIDE, move |g| {
        setup(g);
        g.state.rflags |= rflags::IF | rflags::CF;
        let before = g.state.rflags;
        g.code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.syscall())?;
        equal("RIP", end.state.rip, place::MORE_CODE + 3)?;
        equal("RCX, R11", (end.gpr(gpr::RCX), end.gpr(gpr::R11)), (place::CODE + 2, before))?;
        equal("CS", end.state.segments.seg[index::CS].selector, selector::CODE64)?;
        equal("SS", end.state.segments.seg[index::SS].selector, selector::DATA)?;
        equal("RSP", end.gpr(gpr::RSP), place::STACK)?;
        end.flags(rflags::IF | rflags::CF, rflags::CF)
    });
    suite.add("SYSCALL loads CS and SS without the GDT", &[Mode::User], move |g| {
        setup(g);
        g.code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.syscall())?;
        let (code, stack) = (end.state.segments.seg[index::CS], end.state.segments.seg[index::SS]);
        equal("base, limit of CS", (code.base, code.limit), (0, u32::MAX))?;
        equal("base, limit of SS", (stack.base, stack.limit), (0, u32::MAX))?;
        equal("DPL of CS and SS", (code.dpl(), stack.dpl()), (0, 0))
    });
    // AMD processors take CSTAR; Intel's raise #UD (SDM vol. 2B SYSCALL; AMD APM vol. 3).
    suite.add("SYSCALL from compatibility mode is #UD, or goes to CSTAR on AMD's", &[Mode::CompatUser], move |g| {
        setup(g);
        g.state.set_msr(msr::CSTAR, place::MORE_CODE);
        g.code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let vendor = g.cpuid.get(0, 0).unwrap_or_default().ebx;
        let end = g.run(|a| a.syscall())?;
        if vendor == u32::from_le_bytes(*b"Auth") {
            return equal("RIP", end.state.rip, place::MORE_CODE + 3);
        }
        end.fault(vector::UD)
    });
    suite.add("SYSRET to 64-bit mode", &[Mode::Long], move |g| {
        setup(g);
        (g.state.gpr[gpr::RCX], g.state.gpr[gpr::R11]) = (place::MORE_CODE, rflags::CF | rflags::IF);
        let there = g.user_code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.sysretq())?;
        equal("RIP", end.state.rip, there)?;
        equal("CS", end.state.segments.seg[index::CS].selector, selector::USER_CODE64)?;
        equal("SS", end.state.segments.seg[index::SS].selector, selector::USER_DATA)?;
        end.flags(rflags::CF | rflags::IF | rflags::FIXED, rflags::CF | rflags::IF | rflags::FIXED)
    });
    suite.add("SYSRET to compatibility mode", &[Mode::Long], move |g| {
        setup(g);
        (g.state.gpr[gpr::RCX], g.state.gpr[gpr::R11]) = (0xffff_0000_0000_0000 | place::MORE_CODE, 2);
        let there = g.user_code_at(place::MORE_CODE, 32, |a| a.nop())?;
        let end = g.run(|a| a.sysret())?;
        equal("RIP", end.state.rip, there)?;
        equal("CS", end.state.segments.seg[index::CS].selector, selector::USER_CODE32)
    });
    suite.add("SYSRET takes RFLAGS from R11 but for RF, VM and reserved bits", &[Mode::Long], move |g| {
        setup(g);
        (g.state.gpr[gpr::RCX], g.state.gpr[gpr::R11]) = (place::MORE_CODE, !(rflags::TF | rflags::AC));
        g.user_code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.sysretq())?;
        let all = rflags::STATUS | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::ID;
        end.flags(all | rflags::RF | rflags::VM | 1 << 15, all)
    });
    // TF is looked at behind it, as if the program's SYSCALL had been stepped; IRET's trap is an instruction later.
    suite.add("SYSRET that sets TF traps before the next instruction", &[Mode::Long], move |g| {
        setup(g);
        (g.state.gpr[gpr::RCX], g.state.gpr[gpr::R11]) = (place::MORE_CODE, rflags::TF | rflags::FIXED);
        g.user_code_at(place::MORE_CODE, 64, |a| a.inc(rax))?;
        let frame = g.run(|a| a.sysretq())?.vectored(vector::DB)?;
        equal("RIP, CS", (frame.rip, frame.cs), (place::MORE_CODE, selector::USER_CODE64))
    });
    // Intel's raise #GP at CPL 0; AMD's return and raise it at the fetch.
    suite.add("SYSRET to a non-canonical address is #GP, at the SYSRET or there", &[Mode::Long], move |g| {
        setup(g);
        (g.state.gpr[gpr::RCX], g.state.gpr[gpr::R11]) = (0x8000_0000_0000, 2);
        let end = g.run(|a| a.sysretq())?;
        let frame = end.vectored(vector::GP)?;
        equal("error code", frame.error_code, Some(0))?;
        let vendor = g.cpuid.get(0, 0).unwrap_or_default().ebx;
        let there = vendor == u32::from_le_bytes(*b"Auth");
        let want = if there { (0x8000_0000_0000, selector::USER_CODE64) } else { (place::CODE, selector::CODE64) };
        equal("RIP, CS", (frame.rip, frame.cs), want)
    });
    suite.add("SYSCALL and SYSRET, there and back", &[Mode::User], move |g| {
        setup(g);
        g.code_at(place::MORE_CODE, 64, |a| {
            a.add(rax, 1)?;
            a.sysretq()
        })?;
        let end = g.run(|a| {
            a.syscall()?;
            a.syscall()?;
            a.syscall()
        })?;
        end.registers(&[(gpr::RAX, 3)])?;
        equal("CS", end.state.segments.seg[index::CS].selector, selector::USER_CODE64)
    });
    suite.add("the state of SYSRET's segments does not depend on the GDT", &[Mode::Long], move |g| {
        setup(g);
        g.descriptor(selector::USER_CODE64, 0);
        g.descriptor(selector::USER_DATA, 0);
        (g.state.gpr[gpr::RCX], g.state.gpr[gpr::R11]) = (place::MORE_CODE, 2);
        g.user_code_at(place::MORE_CODE, 64, |a| a.mov(rax, qword_ptr(rdi)))?;
        let end = g.run(|a| a.sysretq())?;
        equal("ended", end.ended, true)?;
        equal("DPL of CS", end.state.segments.seg[index::CS].dpl(), 3)
    });
}

fn sysenter(suite: &mut Suite) {
    let setup = |g: &mut Guest| {
        g.state.set_msr(msr::SYSENTER_CS, selector::CODE64.into());
        g.state.set_msr(msr::SYSENTER_ESP, place::KERNEL_STACK);
        g.state.set_msr(msr::SYSENTER_EIP, place::MORE_CODE);
    };
    suite
        .add("SYSENTER from 64-bit mode", WIDE, move |g| {
            setup(g);
            g.state.rflags |= rflags::IF | rflags::CF;
            g.code_at(place::MORE_CODE, 64, |a| a.nop())?;
            let end = g.run(|a| a.sysenter())?;
            equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (place::MORE_CODE + 3, place::KERNEL_STACK))?;
            equal("CS", end.state.segments.seg[index::CS].selector, selector::CODE64)?;
            equal("SS", end.state.segments.seg[index::SS].selector, selector::DATA)?;
            end.flags(rflags::IF | rflags::CF, rflags::CF)
        })
        .needs(&[Need::SYSENTER]);
    suite
        .add("SYSENTER from protected mode", &[Mode::Protected, Mode::ProtectedUser], move |g| {
            setup(g);
            g.code_at(place::MORE_CODE, 32, |a| a.nop())?;
            let end = g.run(|a| a.sysenter())?;
            equal("EIP, ESP", (end.state.rip, end.gpr(gpr::RSP)), (place::MORE_CODE + 3, place::KERNEL_STACK))?;
            equal("CS", end.state.segments.seg[index::CS].selector, selector::CODE64)?;
            equal("CS is 32-bit", end.state.segments.seg[index::CS].is_default_32(), true)
        })
        .needs(&[Need::SYSENTER]);
    suite
        .add("SYSENTER with a null SYSENTER_CS is #GP", &[Mode::Long, Mode::User, Mode::ProtectedUser], move |g| {
            g.state.set_msr(msr::SYSENTER_CS, 3);
            g.run(|a| a.sysenter())?.gp0()
        })
        .needs(&[Need::SYSENTER]);
    suite
        .add("SYSENTER in real mode is #GP", &[Mode::Real], |g| g.run(|a| a.sysenter())?.gp0())
        .needs(&[Need::SYSENTER]);
    suite
        .add("SYSEXIT to 64-bit mode", &[Mode::Long], move |g| {
            setup(g);
            (g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDX]) = (place::STACK - 0x100, place::MORE_CODE);
            let there = g.user_code_at(place::MORE_CODE, 64, |a| a.nop())?;
            let end = g.run(|a| a.sysexitq())?;
            equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (there, place::STACK - 0x100))?;
            equal("CS", end.state.segments.seg[index::CS].selector, selector::USER_CODE64)?;
            equal("SS", end.state.segments.seg[index::SS].selector, selector::USER_DATA_2)
        })
        .needs(&[Need::SYSENTER]);
    suite
        .add("SYSEXIT to 32-bit code", &[Mode::Long, Mode::Protected], move |g| {
            setup(g);
            (g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDX]) = (place::STACK - 0x100, place::MORE_CODE);
            let there = g.user_code_at(place::MORE_CODE, 32, |a| a.nop())?;
            let end = g.run(|a| a.sysexit())?;
            equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (there, place::STACK - 0x100))?;
            equal("CS", end.state.segments.seg[index::CS].selector, selector::USER_CODE32)?;
            equal("SS", end.state.segments.seg[index::SS].selector, selector::USER_DATA)
        })
        .needs(&[Need::SYSENTER]);
    suite
        .add("SYSEXIT to a non-canonical address is #GP", &[Mode::Long], move |g| {
            setup(g);
            (g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDX]) = (place::STACK, 0x8000_0000_0000);
            g.run(|a| a.sysexitq())?.gp0()
        })
        .needs(&[Need::SYSENTER]);
}

/// Puts a 64-bit frame for IRETQ below [`place::STACK`] and points RSP at it.
fn frame(g: &mut Guest, rip: u64, code: u16, flags: u64, top: u64, stack: u16) {
    let at = place::STACK - 40;
    for (n, value) in [rip, code.into(), flags, top, stack.into()].into_iter().enumerate() {
        g.write_u64(at + 8 * n as u64, value);
    }
    g.state.gpr[gpr::RSP] = at;
}

/// The same of 32 bits for IRETD.
fn frame32(g: &mut Guest, words: &[u64]) {
    let at = place::STACK - 4 * words.len() as u64;
    for (n, &value) in words.iter().enumerate() {
        g.write_u32(at + 4 * n as u64, value as u32);
    }
    g.state.gpr[gpr::RSP] = at;
}

fn iret(suite: &mut Suite) {
    suite.add("to the same level loads RSP and SS too in 64-bit mode", &[Mode::Long, Mode::User], |g| {
        let (code, stack) = match g.mode {
            Mode::User => (selector::USER_CODE64, selector::USER_DATA),
            _ => (selector::CODE64, selector::DATA),
        };
        frame(g, place::MORE_CODE, code, rflags::FIXED | rflags::CF, place::STACK - 0x200, stack);
        let there = g.user_code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.iretq())?;
        equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (there, place::STACK - 0x200))?;
        end.flags(rflags::CF, rflags::CF)
    });
    suite.add("to CPL 3 in 64-bit mode", &[Mode::Long], |g| {
        frame(g, place::MORE_CODE, selector::USER_CODE64, rflags::FIXED | rflags::IF, 0x1234_5678, selector::USER_DATA);
        let there = g.user_code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.iretq())?;
        equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (there, 0x1234_5678))?;
        equal("CS", end.state.segments.seg[index::CS].selector, selector::USER_CODE64)?;
        end.flags(rflags::IF, rflags::IF)
    });
    suite.add("to CPL 3 nulls data segments of the kernel", &[Mode::Long, Mode::Protected], |g| {
        g.segment(index::ES, selector::USER_DATA);
        let there = g.user_code_at(place::MORE_CODE, if g.mode == Mode::Long { 64 } else { 32 }, |a| a.nop())?;
        let end = if g.mode == Mode::Long {
            frame(g, place::MORE_CODE, selector::USER_CODE64, rflags::FIXED, place::STACK, selector::USER_DATA);
            g.run(|a| a.iretq())?
        } else {
            frame32(g, &[place::MORE_CODE, selector::USER_CODE32.into(), 2, place::STACK, selector::USER_DATA.into()]);
            g.run(|a| a.iretd())?
        };
        equal("RIP", end.state.rip, there)?;
        let seg = &end.state.segments.seg;
        equal("DS, ES", (seg[index::DS].selector, seg[index::ES].selector), (0, selector::USER_DATA))
    });
    suite.add("to compatibility mode", &[Mode::Long], |g| {
        frame(g, place::MORE_CODE, selector::USER_CODE32, rflags::FIXED, place::STACK, selector::USER_DATA);
        let there = g.user_code_at(place::MORE_CODE, 32, |a| a.db(&[0x40]))?; // inc eax; a prefix in 64-bit mode
        let end = g.run(|a| a.iretq())?;
        equal("RIP, RAX", (end.state.rip, end.gpr(gpr::RAX)), (there, 1))
    });
    suite.add("to the same level in protected mode", &[Mode::Protected, Mode::ProtectedUser], |g| {
        let code = g.state.segments.seg[index::CS].selector;
        frame32(g, &[place::MORE_CODE, code.into(), rflags::FIXED | rflags::CF]);
        let there = g.user_code_at(place::MORE_CODE, 32, |a| a.nop())?;
        let end = g.run(|a| a.iretd())?;
        equal("EIP, ESP", (end.state.rip, end.gpr(gpr::RSP)), (there, place::STACK))?;
        end.flags(rflags::CF, rflags::CF)
    });
    suite.add("to virtual-8086 mode", &[Mode::Protected], |g| {
        let flags = rflags::FIXED | rflags::VM | rflags::IOPL;
        let segments = [0x1111u64, 0x2222, 0x3333, 0x4444];
        let code = place::MORE_CODE >> 4;
        frame32(g, &[0, code, flags, 0x8000, 0x100, segments[0], segments[1], segments[2], segments[3]]);
        g.code_at(place::MORE_CODE, 16, |a| a.nop())?;
        let end = g.run(|a| a.iretd())?;
        equal("IP, SP", (end.state.rip, end.gpr(gpr::RSP)), (3, 0x8000))?;
        let seg = &end.state.segments.seg;
        let got =
            [index::CS, index::SS, index::ES, index::DS, index::FS, index::GS].map(|n| u64::from(seg[n].selector));
        equal("CS, SS, ES, DS, FS, GS", got, [code, 0x100, 0x1111, 0x2222, 0x3333, 0x4444])?;
        equal("base of DS", seg[index::DS].base, 0x2_2220)?;
        end.flags(rflags::VM | rflags::IOPL, rflags::VM | rflags::IOPL)
    });
    suite.add("at CPL 3 leaves IF and IOPL", &[Mode::User], |g| {
        let flags = rflags::FIXED | rflags::IF | rflags::IOPL;
        frame(g, place::MORE_CODE, selector::USER_CODE64, flags, place::STACK, selector::USER_DATA);
        let there = g.user_code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.iretq())?;
        equal("RIP", end.state.rip, there)?;
        end.flags(rflags::IF | rflags::IOPL, 0)
    });
    suite.add("restores RF", &[Mode::Long], |g| {
        frame(g, place::MORE_CODE, selector::CODE64, rflags::FIXED | rflags::RF, place::STACK, selector::DATA);
        g.code_at(place::MORE_CODE, 64, |a| a.pushfq())?;
        let end = g.run(|a| a.iretq())?;
        equal("RIP", end.state.rip, place::MORE_CODE + 3)?;
        // RF held for one instruction; PUSHF shows it as zero anyway.
        end.flags(rflags::RF, 0)
    });
    // Name, CS, SS, what is raised.
    let rows: &[(&str, u16, u16, u8, u32)] = &[
        ("a null CS", 0, selector::DATA, vector::GP, 0),
        ("a data segment as CS", selector::DATA, selector::DATA, vector::GP, selector::DATA as u32),
        ("a CS beyond the GDT", 0x4f8, selector::DATA, vector::GP, 0x4f8),
        ("an absent CS", selector::ABSENT_CODE, selector::DATA, vector::NP, selector::ABSENT_CODE as u32),
        ("RPL 3 of a kernel CS", selector::CODE64 | 3, selector::USER_DATA, vector::GP, selector::CODE64 as u32),
        (
            "a user CS with RPL 0",
            selector::USER_CODE64 & !3,
            selector::DATA,
            vector::GP,
            (selector::USER_CODE64 & !3) as u32,
        ),
        ("a kernel SS for CPL 3", selector::USER_CODE64, selector::DATA, vector::GP, selector::DATA as u32),
        ("a null SS for CPL 3", selector::USER_CODE64, 0, vector::GP, 0),
        ("a read-only SS", selector::CODE64, selector::READ_ONLY, vector::GP, selector::READ_ONLY as u32),
        ("an absent SS", selector::CODE64, selector::ABSENT_DATA, vector::SS, selector::ABSENT_DATA as u32),
    ];
    for &(name, code, stack, vector, error) in rows {
        suite.add(format!("{name} raises vector {vector} at the IRET"), &[Mode::Long], move |g| {
            frame(g, place::MORE_CODE, code, rflags::FIXED, place::STACK, stack);
            g.run(|a| a.iretq())?.fault_code(vector, error)
        });
    }
    suite.add("to a non-canonical address is #GP", &[Mode::Long], |g| {
        frame(g, 0x8000_0000_0000, selector::CODE64, rflags::FIXED, place::STACK, selector::DATA);
        let end = g.run(|a| a.iretq())?;
        // Some processors raise it before, some after the new RIP is in place (SDM vol. 2A IRET says at the
        // IRET).
        end.gp0()
    });
    suite.add("with NT in 64-bit mode is #GP", &[Mode::Long], |g| {
        g.state.rflags |= rflags::NT;
        frame(g, place::MORE_CODE, selector::CODE64, rflags::FIXED, place::STACK, selector::DATA);
        g.run(|a| a.iretq())?.gp0()
    });
    suite.add("a null SS is fine at CPL 0 in 64-bit mode", &[Mode::Long], |g| {
        frame(g, place::MORE_CODE, selector::CODE64, rflags::FIXED, place::STACK, 0);
        g.code_at(place::MORE_CODE, 64, |a| a.push(rax))?;
        let end = g.run(|a| a.iretq())?;
        equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (place::MORE_CODE + 3, place::STACK - 8))
    });
}

/// Writes the far pointer `selector:offset` of 32 bits to [`place::DATA`].
fn pointer(g: &mut Guest, selector: u16, offset: u64) {
    g.write_u32(place::DATA, offset as u32);
    g.write(place::DATA + 4, &selector.to_le_bytes());
}

/// Far return with the operand size of the mode: 16 bits in real mode, else 32.
const RETF: &[u8] = &[0xcb];

fn far(suite: &mut Suite) {
    const JMP: &[u8] = &[0xff, 0x2f];
    const CALL: &[u8] = &[0xff, 0x1f];
    const KERNEL: &[Mode] = &[Mode::Protected, Mode::Compat, Mode::Long];
    let same = |g: &Guest| if g.mode == Mode::Long { selector::CODE64 } else { selector::CODE32 };
    suite.add("JMP to the same width", KERNEL, move |g| {
        pointer(g, same(g), place::MORE_CODE);
        g.code_at(place::MORE_CODE, g.mode.bits(), |a| a.nop())?;
        let end = g.run(|a| a.db(JMP))?;
        equal("RIP", end.state.rip, place::MORE_CODE + 3)?;
        equal("CS", end.state.segments.seg[index::CS].selector, same(g))
    });
    suite.add("CALL pushes CS and RIP", KERNEL, move |g| {
        pointer(g, same(g), place::MORE_CODE);
        g.code_at(place::MORE_CODE, g.mode.bits(), |a| a.nop())?;
        let end = g.run(|a| a.db(CALL))?;
        equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (place::MORE_CODE + 3, place::STACK - 8))?;
        // 32-bit operands, in 64-bit mode too.
        let pushed = (g.read_u32(place::STACK - 8), g.read_u32(place::STACK - 4));
        equal("pushed", pushed, (place::CODE as u32 + 2, u32::from(same(g))))
    });
    suite.add("CALL with REX.W pushes quadwords", &[Mode::Long], |g| {
        g.write_u64(place::DATA, place::MORE_CODE);
        g.write(place::DATA + 8, &selector::CODE64.to_le_bytes());
        // AMD's processors take a 32-bit pointer nevertheless (AMD APM vol. 3 CALL far).
        if g.cpuid.get(0, 0).unwrap_or_default().ebx == u32::from_le_bytes(*b"Auth") {
            g.write(place::DATA + 4, &selector::CODE64.to_le_bytes());
        }
        g.code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.db(&[0x48, 0xff, 0x1f]))?;
        equal("RIP", end.state.rip, place::MORE_CODE + 3)?;
        equal("RSP", end.gpr(gpr::RSP), place::STACK - 16)?;
        equal("return address", g.read_u64(place::STACK - 16), place::CODE + 3)
    });
    suite.add("JMP between 64-bit and compatibility mode", &[Mode::Long, Mode::Compat], |g| {
        let (target, bits) = if g.mode == Mode::Long { (selector::CODE32, 32) } else { (selector::CODE64, 64) };
        pointer(g, target, place::MORE_CODE);
        // 40h is INC EAX for one and a prefix for the other.
        g.code_at(place::MORE_CODE, bits, |a| a.db(&[0x40, 0x90]))?;
        let end = g.run(|a| a.db(JMP))?;
        equal("RIP", end.state.rip, place::MORE_CODE + 4)?;
        equal("RAX", end.gpr(gpr::RAX), u64::from(bits == 32))
    });
    suite.add("JMP by immediate", &[Mode::Protected, Mode::Compat], move |g| {
        let to = same(g);
        g.code_at(place::MORE_CODE, 32, |a| a.nop())?;
        let end = g.run(|a| a.jmp_far(to, place::MORE_CODE as u32))?;
        equal("RIP", end.state.rip, place::MORE_CODE + 3)
    });
    suite.add("CALL and RETF come back", KERNEL, move |g| {
        pointer(g, same(g), place::MORE_CODE);
        g.code_at(place::MORE_CODE, g.mode.bits(), |a| {
            a.mov(eax, 0x77)?;
            a.db(RETF)
        })?;
        let end = g.run(|a| {
            a.db(CALL)?;
            a.mov(ebx, 0x88)
        })?;
        end.registers(&[(gpr::RAX, 0x77), (gpr::RBX, 0x88), (gpr::RSP, place::STACK)])
    });
    suite.add("RETF n drops arguments", KERNEL, move |g| {
        frame32(g, &[place::MORE_CODE, same(g).into(), 1, 2]);
        g.code_at(place::MORE_CODE, g.mode.bits(), |a| a.nop())?;
        let end = g.run(|a| a.db(&[0xca, 8, 0]))?;
        equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (place::MORE_CODE + 3, place::STACK))
    });
    suite.add("RETF to CPL 3 loads SS:RSP", KERNEL, |g| {
        let (code, bits) = match g.mode {
            Mode::Long => (selector::USER_CODE64, 64),
            _ => (selector::USER_CODE32, 32),
        };
        frame32(g, &[place::MORE_CODE, code.into(), place::STACK - 0x300, selector::USER_DATA.into()]);
        let there = g.user_code_at(place::MORE_CODE, bits, |a| a.nop())?;
        let end = g.run(|a| a.db(RETF))?;
        equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (there, place::STACK - 0x300))?;
        equal("CS", end.state.segments.seg[index::CS].selector, code)?;
        equal("SS", end.state.segments.seg[index::SS].selector, selector::USER_DATA)
    });
    suite.add("RETF to a more privileged level is #GP", &[Mode::ProtectedUser, Mode::CompatUser, Mode::User], |g| {
        frame32(g, &[place::MORE_CODE, selector::CODE64.into()]);
        g.run(|a| a.db(RETF))?.fault_code(vector::GP, selector::CODE64.into())
    });
    suite.add("CALL to a conforming segment keeps the CPL", &[Mode::ProtectedUser, Mode::User], |g| {
        pointer(g, selector::CONFORMING, place::MORE_CODE);
        let there = g.user_code_at(place::MORE_CODE, g.mode.bits(), |a| a.nop())?;
        let end = g.run(|a| a.db(CALL))?;
        equal("RIP", end.state.rip, there)?;
        equal("CS", end.state.segments.seg[index::CS].selector, selector::CONFORMING | 3)
    });
    // Name, selector, what JMP raises.
    let rows: &[(&str, u16, u8, u32)] = &[
        ("a null selector", 0, vector::GP, 0),
        ("a data segment", selector::DATA, vector::GP, selector::DATA as u32),
        ("beyond the GDT", 0x4f8, vector::GP, 0x4f8),
        ("an absent segment", selector::ABSENT_CODE, vector::NP, selector::ABSENT_CODE as u32),
        ("a less privileged segment", selector::USER_CODE32, vector::GP, (selector::USER_CODE32 & !3) as u32),
        ("an LDT", selector::LDT, vector::GP, selector::LDT as u32),
    ];
    for &(name, to, vector, error) in rows {
        suite.add(format!("JMP to {name}"), KERNEL, move |g| {
            pointer(g, to, place::MORE_CODE);
            g.run(|a| a.db(JMP))?.fault_code(vector, error)
        });
    }
    suite.add("JMP to a more privileged segment is #GP", &[Mode::ProtectedUser, Mode::User], |g| {
        pointer(g, selector::CODE32, place::MORE_CODE);
        g.run(|a| a.db(JMP))?.fault_code(vector::GP, selector::CODE32.into())
    });
    suite.add("a TSS as the target of JMP is #GP in long mode", &[Mode::Long], |g| {
        pointer(g, selector::FREE_TSS, 0);
        g.run(|a| a.db(JMP))?.fault_code(vector::GP, selector::FREE_TSS.into())
    });
    suite.add("in real mode", &[Mode::Real, Mode::Vm86], |g| {
        g.write(place::DATA, &[0, 0]);
        g.write(place::DATA + 2, &((place::MORE_CODE >> 4) as u16).to_le_bytes());
        g.code_at(place::MORE_CODE, 16, |a| {
            a.mov(bx, 0x77)?;
            a.db(RETF)
        })?;
        // call far [0]
        let end = g.run(|a| {
            a.db(&[0xff, 0x1e, 0, 0])?;
            a.mov(cx, 0x88)
        })?;
        end.registers(&[(gpr::RBX, 0x77), (gpr::RCX, 0x88), (gpr::RSP, place::STACK)])
    });
}

/// Puts a call gate to `selector:offset` at [`selector::FREE`].
fn gate(g: &mut Guest, to: u16, offset: u64, dpl: u64, arguments: u64) {
    let low = offset & 0xffff
        | u64::from(to) << 16
        | arguments << 32
        | (0x8c | dpl << 5) << 40
        | (offset >> 16 & 0xffff) << 48;
    g.write_u64(place::GDT + u64::from(selector::FREE), low);
    g.write_u64(place::GDT + u64::from(selector::FREE) + 8, offset >> 32);
}

fn call_gates(suite: &mut Suite) {
    const CALL: &[u8] = &[0xff, 0x1f];
    let kernel_code = |g: &Guest| if g.mode.handler_bits() == 64 { selector::CODE64 } else { selector::CODE32 };
    suite.add(
        "CALL from CPL 3 switches to the TSS's stack",
        &[Mode::ProtectedUser, Mode::CompatUser, Mode::User],
        move |g| {
            gate(g, kernel_code(g), place::MORE_CODE, 3, 0);
            pointer(g, selector::FREE | 3, 0x1234_5678);
            let wide = g.mode.handler_bits() == 64;
            g.code_at(place::MORE_CODE, g.mode.handler_bits(), |a| a.nop())?;
            let (code, stack) = (g.state.segments.seg[index::CS].selector, g.state.segments.seg[index::SS].selector);
            let end = g.run(|a| a.db(CALL))?;
            equal("RIP", end.state.rip, place::MORE_CODE + 3)?;
            equal("CS", end.state.segments.seg[index::CS].selector, kernel_code(g))?;
            let width = if wide { 8 } else { 4 };
            let top = end.gpr(gpr::RSP);
            equal("RSP", top, place::KERNEL_STACK - 4 * width)?;
            let word = |n: u64| if wide { g.read_u64(top + 8 * n) } else { g.read_u32(top + 4 * n).into() };
            equal("pushed", [0, 1, 2, 3].map(word), [place::CODE + 2, code.into(), place::STACK, stack.into()])
        },
    );
    suite.add("there and back", &[Mode::ProtectedUser, Mode::User], move |g| {
        gate(g, kernel_code(g), place::MORE_CODE, 3, 0);
        pointer(g, selector::FREE | 3, 0);
        g.code_at(place::MORE_CODE, g.mode.handler_bits(), |a| {
            a.mov(ebx, 0x77)?;
            if a.bitness() == 64 { a.db(&[0x48, 0xcb]) } else { a.db(RETF) }
        })?;
        let end = g.run(|a| {
            a.db(CALL)?;
            a.mov(ecx, 0x88)
        })?;
        end.registers(&[(gpr::RBX, 0x77), (gpr::RCX, 0x88), (gpr::RSP, place::STACK)])
    });
    suite.add("arguments are copied to the new stack", &[Mode::ProtectedUser], |g| {
        gate(g, selector::CODE32, place::MORE_CODE, 3, 2);
        pointer(g, selector::FREE | 3, 0);
        g.write_u32(place::STACK - 8, 0x1111);
        g.write_u32(place::STACK - 4, 0x2222);
        g.state.gpr[gpr::RSP] = place::STACK - 8;
        g.code_at(place::MORE_CODE, 32, |a| a.nop())?;
        let end = g.run(|a| a.db(CALL))?;
        let top = end.gpr(gpr::RSP);
        equal("ESP", top, place::KERNEL_STACK - 24)?;
        equal("arguments", (g.read_u32(top + 8), g.read_u32(top + 12)), (0x1111, 0x2222))
    });
    suite.add("CALL at the same level switches no stack", &[Mode::Protected, Mode::Long], move |g| {
        gate(g, kernel_code(g), place::MORE_CODE, 0, 0);
        pointer(g, selector::FREE, 0);
        g.code_at(place::MORE_CODE, g.mode.bits(), |a| a.nop())?;
        let end = g.run(|a| a.db(CALL))?;
        let width = u64::from(g.mode.bits() / 8);
        equal("RIP, RSP", (end.state.rip, end.gpr(gpr::RSP)), (place::MORE_CODE + 3, place::STACK - 2 * width))
    });
    suite.add("a gate of DPL 0 is #GP at CPL 3", &[Mode::ProtectedUser, Mode::User], move |g| {
        gate(g, kernel_code(g), place::MORE_CODE, 0, 0);
        pointer(g, selector::FREE, 0);
        g.run(|a| a.db(CALL))?.fault_code(vector::GP, selector::FREE.into())
    });
    suite.add("an absent gate is #NP", &[Mode::ProtectedUser, Mode::User], move |g| {
        gate(g, kernel_code(g), place::MORE_CODE, 3, 0);
        let at = place::GDT + u64::from(selector::FREE) + 5;
        g.write(at, &[0x6c]);
        pointer(g, selector::FREE | 3, 0);
        g.run(|a| a.db(CALL))?.fault_code(vector::NP, selector::FREE.into())
    });
    suite.add("a gate to a data segment is #GP of that", &[Mode::ProtectedUser, Mode::User], |g| {
        gate(g, selector::DATA, place::MORE_CODE, 3, 0);
        pointer(g, selector::FREE | 3, 0);
        g.run(|a| a.db(CALL))?.fault_code(vector::GP, selector::DATA.into())
    });
    suite.add("a gate to 32-bit code is #GP of that in long mode", &[Mode::User], |g| {
        gate(g, selector::CODE32, place::MORE_CODE, 3, 0);
        pointer(g, selector::FREE | 3, 0);
        g.run(|a| a.db(CALL))?.fault_code(vector::GP, selector::CODE32.into())
    });
    suite.add("JMP through a gate may not change the level", &[Mode::ProtectedUser, Mode::User], move |g| {
        gate(g, kernel_code(g), place::MORE_CODE, 3, 0);
        pointer(g, selector::FREE | 3, 0);
        g.run(|a| a.db(&[0xff, 0x2f]))?.fault_code(vector::GP, kernel_code(g).into())
    });
}

/// Where the second task's TSS lies; its descriptor is [`selector::FREE`].
const TASK: u64 = place::TABLES;

/// Builds a second task that runs at [`place::MORE_CODE`], at CPL 0.
fn second_task(g: &mut Guest) -> Result<(), Mismatch> {
    g.descriptor(selector::FREE, descriptor(TASK, 0x67, attr::P | 9));
    let put = |offset: u64, value: u64| g.write_u32(TASK + offset, value as u32);
    put(0x20, place::MORE_CODE);
    put(0x24, rflags::FIXED | rflags::CF);
    put(0x28, 0xaaaa); // EAX
    put(0x38, place::STACK - 0x400); // ESP
    for (offset, value) in
        [(0x48, selector::DATA), (0x4c, selector::CODE32), (0x50, selector::DATA), (0x54, selector::DATA)]
    {
        put(offset, value.into());
    }
    put(0x66, 0x68);
    g.code_at(place::MORE_CODE, 32, |a| a.nop()).map(drop)
}

/// Hardware task switches, of protected mode only (SDM vol. 3A chapter 7).
fn tasks(suite: &mut Suite) {
    suite.add("JMP to a TSS switches tasks", &[Mode::Protected], |g| {
        second_task(g)?;
        g.state.gpr[gpr::RBX] = 0xbbbb;
        let end = g.run(|a| a.jmp_far(selector::FREE, 0))?;
        equal(
            "EIP, ESP, EAX",
            (end.state.rip, end.gpr(gpr::RSP), end.gpr(gpr::RAX)),
            (place::MORE_CODE + 3, place::STACK - 0x400, 0xaaaa),
        )?;
        equal("TR", end.state.segments.tr.selector, selector::FREE)?;
        equal("CR0.TS", end.state.cr0 & cr0::TS, cr0::TS)?;
        // The old task was saved and is no longer busy; the new one is.
        equal(
            "EIP, EBX as saved",
            (g.read_u32(place::TSS + 0x20), g.read_u32(place::TSS + 0x34)),
            (place::CODE as u32 + 7, 0xbbbb),
        )?;
        let kind = |which: u16| g.read_u64(place::GDT + u64::from(which)) >> 40 & 0xf;
        equal("types of the TSSs", (kind(selector::TSS), kind(selector::FREE)), (9, 0xb))
    });
    suite.add("CALL to a TSS nests, and IRET comes back", &[Mode::Protected], |g| {
        second_task(g)?;
        g.code_at(place::MORE_CODE, 32, |a| {
            a.mov(ebx, 0x77)?;
            a.iretd()
        })?;
        let end = g.run(|a| {
            a.call_far(selector::FREE, 0)?;
            a.mov(ecx, 0x88)
        })?;
        end.registers(&[(gpr::RCX, 0x88), (gpr::RSP, place::STACK), (gpr::RBX, 0)])?;
        equal("EBX of the second task", g.read_u32(TASK + 0x34), 0x77)?;
        equal("back link", g.read_u32(TASK) as u16, selector::TSS)
    });
    suite.add("an interrupt through a task gate", &[Mode::Protected], |g| {
        second_task(g)?;
        g.write_u64(place::IDT + 8 * 0x50, u64::from(selector::FREE) << 16 | 0x8500 << 32);
        let end = g.run(|a| a.int(0x50))?;
        equal("EIP, TR", (end.state.rip, end.state.segments.tr.selector), (place::MORE_CODE + 3, selector::FREE))?;
        equal("EIP as saved", g.read_u32(place::TSS + 0x20), place::CODE as u32 + 2)?;
        end.flags(rflags::NT, rflags::NT)
    });
    suite.add("an exception through a task gate pushes its error code on the new stack", &[Mode::Protected], |g| {
        second_task(g)?;
        g.write_u64(place::IDT + 8 * 13, u64::from(selector::FREE) << 16 | 0x8500 << 32);
        g.state.gpr[gpr::RAX] = 0x4f8;
        let end = g.run(|a| a.db(&[0x8e, 0xd8]))?;
        equal("EIP, ESP", (end.state.rip, end.gpr(gpr::RSP)), (place::MORE_CODE + 3, place::STACK - 0x404))?;
        equal("error code", g.read_u32(place::STACK - 0x404), 0x4f8)
    });
    suite.add("JMP to a busy TSS is #GP of it", &[Mode::Protected], |g| {
        second_task(g)?;
        g.descriptor(selector::FREE, descriptor(TASK, 0x67, attr::P | 0xb));
        g.run(|a| a.jmp_far(selector::FREE, 0))?.fault_code(vector::GP, selector::FREE.into())
    });
    suite.add("JMP to a TSS that is too short is #TS of it", &[Mode::Protected], |g| {
        second_task(g)?;
        g.descriptor(selector::FREE, descriptor(TASK, 0x66, attr::P | 9));
        g.run(|a| a.jmp_far(selector::FREE, 0))?.fault_code(vector::TS, selector::FREE.into())
    });
    suite.add("the T flag of a TSS raises #DB in the new task", &[Mode::Protected], |g| {
        second_task(g)?;
        g.write(TASK + 0x64, &[1]);
        let end = g.run(|a| a.jmp_far(selector::FREE, 0))?;
        let frame = end.vectored(vector::DB)?;
        equal("EIP", frame.rip, place::MORE_CODE)?;
        equal("DR6", end.state.dr[6], dr::DR6_FIXED | dr::DR6_BT)
    });
}

fn modes(suite: &mut Suite) {
    suite.add("real mode to protected mode and back", &[Mode::Real], |g| {
        let mut gdt = vec![0; 8];
        gdt.extend(descriptor(place::CODE, 0xffff, attr::S | attr::P | attr::CODE | attr::WRITABLE).to_le_bytes());
        gdt.extend(descriptor(0, 0xf_ffff, attr::S | attr::P | attr::WRITABLE | attr::DB | attr::G).to_le_bytes());
        g.write(place::TABLES, &gdt);
        g.write(place::DATA, &[0x17, 0, 0, 0, 4, 0]); // limit, base 0x40000
        g.write_u32(place::BIG_PAGE, 0x1234_5678);
        let end = g.run(|a| {
            a.db(&[0x66, 0x0f, 0x01, 0x16, 0, 0])?; // lgdt [0], 32-bit
            a.mov(eax, cr0)?;
            a.or(al, 1)?;
            a.mov(cr0, eax)?;
            a.mov(bx, 0x10)?;
            a.mov(fs, bx)?;
            a.mov(edi, place::BIG_PAGE as u32)?;
            a.mov(ecx, dword_ptr(edi).fs())?;
            a.and(al, 0xfe)?;
            a.mov(cr0, eax)?;
            // The cached descriptor goes on: big real mode.
            a.mov(edx, dword_ptr(edi).fs())
        })?;
        end.registers(&[(gpr::RCX, 0x1234_5678), (gpr::RDX, 0x1234_5678)])?;
        equal("CR0.PE", end.state.cr0 & cr0::PE, 0)
    });
    suite.add("protected mode to long mode", &[Mode::Protected], |g| {
        g.state.cr3 = place::PML4;
        g.code_at(place::MORE_CODE, 64, |a| {
            a.mov(rbx, 0x1122_3344_5566_7788u64)?;
            a.mov(r9, rbx)
        })?;
        let end = g.run(|a| {
            a.mov(eax, cr4)?;
            a.or(eax, cr4::PAE as i32)?;
            a.mov(cr4, eax)?;
            a.mov(ecx, msr::EFER)?;
            a.rdmsr()?;
            a.or(eax, efer::LME as i32)?;
            a.wrmsr()?;
            a.mov(eax, cr0)?;
            a.or(eax, 0x8000_0000u32)?;
            a.mov(cr0, eax)?;
            a.jmp_far(selector::CODE64, place::MORE_CODE as u32)
        })?;
        equal("ended", end.ended, true)?;
        equal("R9", end.gpr(gpr::R9), 0x1122_3344_5566_7788)?;
        equal("EFER", end.state.msr(msr::EFER), Some(efer::LME | efer::LMA))
    });
    suite.add("compatibility mode back to protected mode", &[Mode::Compat], |g| {
        let end = g.run(|a| {
            a.mov(eax, cr0)?;
            a.and(eax, 0x7fff_ffff)?;
            a.mov(cr0, eax)?;
            a.mov(ecx, msr::EFER)?;
            a.rdmsr()
        })?;
        end.done()?;
        equal("LMA", end.gpr(gpr::RAX) & efer::LMA, 0)
    });
    suite.add("turning on paging with LME but without PAE is #GP", &[Mode::Protected], |g| {
        g.state.cr3 = place::PML4;
        g.state.set_msr(msr::EFER, efer::LME);
        g.state.gpr[gpr::RAX] = g.state.cr0 | cr0::PG;
        g.run(|a| a.mov(cr0, eax))?.gp0()
    });
    suite.add("a far jump to the handlers of another mode ends where it should", &[Mode::Long], |g| {
        pointer(g, selector::CODE64, tables::handler(0x44));
        let end = g.run(|a| a.db(&[0xff, 0x2f]))?;
        equal("where it went", end.vector(), Some(0x44))
    });
}
