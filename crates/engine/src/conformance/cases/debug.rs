//! Debug registers, breakpoints and single-stepping (SDM vol. 3B chapter 18).

use super::super::{End, Guest, Mismatch};
use super::prelude::*;

/// DR7: breakpoint 0 enabled locally, with condition and length in bits 19:16.
const fn breakpoint_0(condition: u64, length: u64) -> u64 {
    dr::DR7_FIXED | 1 | (condition | length << 2) << 16
}
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const IO: u64 = 2;
const ACCESS: u64 = 3;
const BYTE: u64 = 0;
const WORD: u64 = 1;
const QUAD: u64 = 2;
const DOUBLE: u64 = 3;

const KERNEL: &[Mode] = &[Mode::Protected, Mode::Compat, Mode::Long];
const FLAT: &[Mode] = &[Mode::Protected, Mode::ProtectedUser, Mode::Compat, Mode::CompatUser, Mode::Long, Mode::User];

pub fn add(suite: &mut Suite) {
    single_step(suite.group("single step").each(|g| g.touch()));
    execution(suite.group("breakpoints").each(|g| g.touch()));
    data(suite);
    registers(suite.group("debug registers").each(|g| g.touch()));
}

/// #DB as a trap after `n` instructions, with `bits` in DR6.
fn trap_with(end: &End, n: usize, bits: u64) -> Verdict {
    end.trap_after(n, vector::DB)?;
    equal("DR6", end.state.dr[6], dr::DR6_FIXED | bits)
}

/// Runs MOV SS and two NOPs.
fn mov_ss(g: &mut Guest<'_>) -> Result<End, Mismatch> {
    g.state.gpr[gpr::RAX] = g.state.segments.seg[index::SS].selector.into();
    g.run(|a| {
        a.db(&[0x8e, 0xd0])?;
        a.nop()?;
        a.nop()
    })
}

fn single_step(suite: &mut Suite) {
    suite.add("TF traps after each instruction", EVERY_MODE, |g| {
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| {
            a.nop()?;
            a.nop()
        })?;
        trap_with(&end, 1, dr::DR6_BS)?;
        end.flags(rflags::TF, 0)
    });
    suite.add("the frame has TF set", FLAT, |g| {
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| a.nop())?;
        end.trap(vector::DB)?;
        equal("TF", end.frame().map(|frame| frame.rflags & rflags::TF), Some(rflags::TF))
    });
    suite.add("POPF that sets TF traps after the next instruction", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        let end = g.run(|a| {
            a.push(0x102)?;
            a.db(&[0x9d])?;
            a.nop()?;
            a.nop()
        })?;
        trap_with(&end, 3, dr::DR6_BS)
    });
    suite.add("a jump traps at its target", FLAT, |g| {
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| a.db(&[0xeb, 0x10]))?;
        end.vectored(vector::DB)?;
        equal("RIP", end.frame().map(|frame| frame.rip), Some(place::CODE + 0x12))
    });
    suite.add("INT n clears TF: the handler is not stepped", &[Mode::Protected, Mode::Long], |g| {
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| a.int(0x50))?;
        end.trap(0x50)
    });
    suite.add("a fault is delivered and not stepped", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        g.state.rflags |= rflags::TF;
        g.run(|a| a.ud2())?.fault(vector::UD)
    });
    suite.add("MOV SS holds the step off for one instruction", &[Mode::Protected, Mode::Long], |g| {
        g.state.rflags |= rflags::TF;
        let end = mov_ss(g)?;
        trap_with(&end, 2, dr::DR6_BS)
    });
    suite.add("HLT's own step ends the halt", &[Mode::Protected, Mode::Long], |g| {
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| {
            a.hlt()?;
            a.nop()
        })?;
        trap_with(&end, 1, dr::DR6_BS)
    });
    suite.add("REP steps once for each repetition", &[Mode::Protected, Mode::Long], |g| {
        g.state.rflags |= rflags::TF;
        g.state.gpr[gpr::RCX] = 3;
        let end = g.run(|a| a.rep().stosb())?;
        end.vectored(vector::DB)?;
        equal("RCX", end.gpr(gpr::RCX), 2)?;
        equal("RIP", end.frame().map(|frame| frame.rip), Some(place::CODE))
    });
    suite.add("a handler that returns steps through everything", WIDE, |g| {
        g.state.rflags |= rflags::TF;
        g.handler(vector::DB, |a| {
            a.inc(rbx)?;
            a.iretq()
        })?;
        // Five NOPs, and the OUT that ends the run is not stepped over.
        let end = g.run(|a| {
            for _ in 0..5 {
                a.nop()?;
            }
            Ok(())
        })?;
        equal("ended", end.ended, true)?;
        ensure((5..=6).contains(&end.gpr(gpr::RBX)), || format!("{} steps", end.gpr(gpr::RBX)))
    });
    suite.add("a load from a device is stepped", WIDE, |g| {
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| a.mov(rax, qword_ptr(rsi)))?;
        trap_with(&end, 1, dr::DR6_BS)
    });
    suite.add("port I/O is stepped", &[Mode::Protected, Mode::Long], |g| {
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| a.in_(al, 0x80))?;
        trap_with(&end, 1, dr::DR6_BS)
    });
    suite.add("CPUID and RDMSR are stepped", &[Mode::Long], |g| {
        g.state.rflags |= rflags::TF;
        g.handler(vector::DB, |a| {
            a.inc(rsi)?;
            a.iretq()
        })?;
        g.state.gpr[gpr::RSI] = 0;
        let end = g.run(|a| {
            a.cpuid()?;
            a.mov(ecx, msr::EFER)?;
            a.rdmsr()
        })?;
        equal("ended", end.ended, true)?;
        ensure((3..=4).contains(&end.gpr(gpr::RSI)), || format!("{} steps", end.gpr(gpr::RSI)))
    });
    suite.add("SYSCALL with SFMASK.TF is not stepped", &[Mode::User], |g| {
        g.state.rflags |= rflags::TF;
        g.state.set_msr(msr::STAR, u64::from(selector::CODE64) << 32 | u64::from(selector::USER_CODE32) << 48);
        g.state.set_msr(msr::LSTAR, place::MORE_CODE);
        g.state.set_msr(msr::SFMASK, rflags::TF);
        g.code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.syscall())?;
        equal("RIP", end.state.rip, place::MORE_CODE + 3)
    });
    suite.add("IRET to TF steps the next instruction", &[Mode::Long], |g| {
        let at = place::STACK - 40;
        let frame = [place::MORE_CODE, selector::CODE64.into(), 0x102, place::STACK, selector::DATA.into()];
        for (n, value) in frame.into_iter().enumerate() {
            g.write_u64(at + 8 * n as u64, value);
        }
        g.state.gpr[gpr::RSP] = at;
        g.code_at(place::MORE_CODE, 64, |a| {
            a.nop()?;
            a.nop()
        })?;
        let end = g.run(|a| a.iretq())?;
        equal("RIP", end.vectored(vector::DB)?.rip, place::MORE_CODE + 1)
    });
}

fn execution(suite: &mut Suite) {
    suite.add("an execution breakpoint is a fault at its instruction", FLAT, |g| {
        g.state.dr[0] = place::CODE + 1;
        g.state.dr[7] = breakpoint_0(EXECUTE, BYTE);
        let end = g.run(|a| {
            a.nop()?;
            a.nop()?;
            a.nop()
        })?;
        let frame = end.vectored(vector::DB)?;
        equal("RIP", frame.rip, place::CODE + 1)?;
        equal("DR6", end.state.dr[6], dr::DR6_FIXED | 1)
    });
    suite.add("RF in a returned frame passes it", &[Mode::Long], |g| {
        g.state.dr[0] = place::CODE + 1;
        g.state.dr[7] = breakpoint_0(EXECUTE, BYTE);
        g.handler(vector::DB, |a| {
            a.inc(rbx)?;
            a.or(dword_ptr(rsp + 16), rflags::RF as i32)?;
            a.iretq()
        })?;
        let end = g.run(|a| {
            a.nop()?;
            a.nop()?;
            a.nop()
        })?;
        end.registers(&[(gpr::RBX, 1)])
    });
    suite.add("RF in the state passes it", FLAT, |g| {
        g.state.dr[0] = place::CODE;
        g.state.dr[7] = breakpoint_0(EXECUTE, BYTE);
        g.state.rflags |= rflags::RF;
        g.run(|a| a.nop())?.done()
    });
    suite.add("MOV SS holds an execution breakpoint off on Intel's", &[Mode::Protected, Mode::Long], |g| {
        g.state.dr[0] = place::CODE + 2;
        g.state.dr[7] = breakpoint_0(EXECUTE, BYTE);
        let end = mov_ss(g)?;
        let intel = g.cpuid.get(0, 0).is_some_and(|leaf| leaf.ebx == u32::from_le_bytes(*b"Genu"));
        if intel { end.done() } else { equal("RIP", end.vectored(vector::DB)?.rip, place::CODE + 2) }
    });
    suite.add("a breakpoint that is not enabled does nothing", FLAT, |g| {
        g.state.dr[0] = place::CODE;
        g.state.dr[7] = breakpoint_0(EXECUTE, BYTE) & !1;
        g.run(|a| a.nop())?.done()
    });
    suite.add("a global enable works like a local one", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        g.state.dr[3] = place::CODE;
        g.state.dr[7] = dr::DR7_FIXED | 1 << 7;
        let end = g.run(|a| a.nop())?;
        equal("RIP", end.vectored(vector::DB)?.rip, place::CODE)?;
        equal("DR6", end.state.dr[6], dr::DR6_FIXED | 8)
    });
    suite.add("DR7 set by the guest counts for what follows", &[Mode::Long], |g| {
        g.state.gpr[gpr::RBX] = breakpoint_0(EXECUTE, BYTE);
        let end = g.run(|a| {
            let mut here = a.create_label();
            a.lea(rax, ptr(here))?;
            a.mov(dr0, rax)?;
            a.mov(dr7, rbx)?;
            a.nop()?;
            a.set_label(&mut here)?;
            a.nop()
        })?;
        let frame = end.vectored(vector::DB)?;
        equal("DR6", end.state.dr[6], dr::DR6_FIXED | 1)?;
        equal("RIP", frame.rip, end.gpr(gpr::RAX))
    });
    suite.add("a breakpoint at a loop's head is met each time", &[Mode::Long], |g| {
        g.handler(vector::DB, |a| {
            a.inc(rbx)?;
            a.or(dword_ptr(rsp + 16), rflags::RF as i32)?;
            a.iretq()
        })?;
        g.state.dr[0] = place::CODE + 5;
        g.state.dr[7] = breakpoint_0(EXECUTE, BYTE);
        let end = g.run(|a| {
            a.mov(ecx, 10)?; // 5 bytes
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.nop()?;
            a.dec(ecx)?;
            a.jne(again)
        })?;
        end.registers(&[(gpr::RBX, 10)])
    });
}

fn data(suite: &mut Suite) {
    /// DR0 at DATA + `offset`, with `condition` and `length`.
    fn watch(g: &mut Guest, offset: u64, condition: u64, length: u64) {
        g.state.dr[0] = place::DATA + offset;
        g.state.dr[7] = breakpoint_0(condition, length);
    }
    suite.add("a write breakpoint traps after the write", FLAT, |g| {
        watch(g, 0, WRITE, DOUBLE);
        g.state.gpr[gpr::RAX] = 0x42;
        let end = g.run(|a| a.mov(dword_ptr(edi), eax))?;
        trap_with(&end, 1, 1)?;
        equal("memory", g.read_u32(place::DATA), 0x42)
    });
    suite.add("a write breakpoint lets reads through", FLAT, |g| {
        watch(g, 0, WRITE, DOUBLE);
        g.run(|a| a.mov(eax, dword_ptr(edi)))?.done()
    });
    suite.add("an access breakpoint traps reads and writes", FLAT, |g| {
        watch(g, 0, ACCESS, DOUBLE);
        let end = g.run(|a| a.mov(eax, dword_ptr(edi)))?;
        trap_with(&end, 1, 1)?;
        let end = g.run(|a| a.mov(dword_ptr(edi), eax))?;
        trap_with(&end, 1, 1)
    });
    // Length, offset of a byte access, whether it is inside.
    for (name, length, offset, inside) in [
        ("one byte: itself", BYTE, 0, true),
        ("one byte: the next", BYTE, 1, false),
        ("a word: its second byte", WORD, 1, true),
        ("a word: behind it", WORD, 2, false),
        ("a doubleword: its last byte", DOUBLE, 3, true),
        ("a doubleword: behind it", DOUBLE, 4, false),
        ("a quadword: its last byte", QUAD, 7, true),
        ("a quadword: behind it", QUAD, 8, false),
    ] {
        suite.add(format!("the length of {name}"), &[Mode::Long, Mode::User], move |g| {
            watch(g, 0, WRITE, length);
            let end = g.run(|a| a.mov(byte_ptr(rdi + offset), al))?;
            if inside { trap_with(&end, 1, 1) } else { end.done() }
        });
    }
    suite.add("an access that only overlaps traps", &[Mode::Long, Mode::User], |g| {
        watch(g, 4, WRITE, BYTE);
        let end = g.run(|a| a.mov(qword_ptr(rdi), rax))?;
        trap_with(&end, 1, 1)
    });
    suite.add("PUSH, CALL and a vector store trap", &[Mode::Long, Mode::User], |g| {
        watch(g, 0, WRITE, QUAD);
        g.state.gpr[gpr::RSP] = place::DATA + 8;
        let end = g.run(|a| a.push(rax))?;
        trap_with(&end, 1, 1)?;
        g.state.gpr[gpr::RSP] = place::STACK;
        let end = g.run(|a| a.movups(xmmword_ptr(rdi), xmm0))?;
        trap_with(&end, 1, 1)
    });
    suite.add("REP STOSB stops behind the byte that hits", &[Mode::Long, Mode::User], |g| {
        watch(g, 2, WRITE, BYTE);
        g.state.gpr[gpr::RCX] = 8;
        let end = g.run(|a| a.rep().stosb())?;
        end.vectored(vector::DB)?;
        equal("DR6", end.state.dr[6], dr::DR6_FIXED | 1)?;
        // Fast strings may run to the end of a group before they look (SDM vol. 3B 18.2.5).
        ensure(end.gpr(gpr::RCX) <= 5, || format!("RCX {:#x}", end.gpr(gpr::RCX)))
    });
    suite.add("two breakpoints at once", &[Mode::Long], |g| {
        (g.state.dr[0], g.state.dr[1]) = (place::DATA, place::DATA + 4);
        g.state.dr[7] = dr::DR7_FIXED | 1 | 1 << 2 | (WRITE | DOUBLE << 2) << 16 | (WRITE | DOUBLE << 2) << 20;
        let end = g.run(|a| a.mov(qword_ptr(rdi), rax))?;
        trap_with(&end, 1, 3)
    });
    suite.add("a data breakpoint and a single step together", &[Mode::Long, Mode::User], |g| {
        watch(g, 0, WRITE, BYTE);
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| a.mov(byte_ptr(rdi), al))?;
        trap_with(&end, 1, 1 | dr::DR6_BS)
    });
    suite.add("an I/O breakpoint with CR4.DE", KERNEL, |g| {
        g.state.cr4 |= cr4::DE;
        g.state.dr[0] = 0x80;
        g.state.dr[7] = breakpoint_0(IO, BYTE);
        let end = g.run(|a| a.out(0x80, al))?;
        trap_with(&end, 1, 1)?;
        g.run(|a| a.out(0x81, al))?.done()
    });
    suite.add("MOV SS holds a data breakpoint off for one instruction", &[Mode::Protected, Mode::Long], |g| {
        watch(g, 0, ACCESS, WORD);
        let stack = g.state.segments.seg[index::SS].selector;
        g.write(place::DATA, &stack.to_le_bytes());
        // mov ss, [rdi]
        let end = g.run(|a| {
            a.db(&[0x8e, 0x17])?;
            a.nop()?;
            a.nop()
        })?;
        trap_with(&end, 2, 1)
    });
    suite.add("a data breakpoint that MOV SS held off is one with INT1", &[Mode::Long], |g| {
        watch(g, 0, ACCESS, WORD);
        let stack = g.state.segments.seg[index::SS].selector;
        g.write(place::DATA, &stack.to_le_bytes());
        g.handler(vector::DB, |a| {
            a.inc(rbx)?;
            a.iretq()
        })?;
        // mov ss, [rdi]; int1
        let end = g.run(|a| {
            a.db(&[0x8e, 0x17])?;
            a.db(&[0xf1])?;
            a.nop()
        })?;
        end.registers(&[(gpr::RBX, 1)])
    });
}

fn registers(suite: &mut Suite) {
    suite.add("DR0 to DR3 hold what is written", &[Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = 0xffff_8000_1234_5678;
        let end = g.run(|a| {
            a.mov(dr0, rax)?;
            a.mov(dr3, rax)?;
            a.mov(rbx, dr0)?;
            a.mov(rcx, dr3)
        })?;
        end.registers(&[(gpr::RBX, 0xffff_8000_1234_5678), (gpr::RCX, 0xffff_8000_1234_5678)])?;
        equal("DR0 of the state", end.state.dr[0], 0xffff_8000_1234_5678)
    });
    suite.add("fixed bits of DR6 and DR7", &[Mode::Protected, Mode::Long], |g| {
        let end = g.run(|a| {
            // mov dr6, rax; mov dr7, rax; mov rbx, dr6; mov rcx, dr7
            a.db(&[0x0f, 0x23, 0xf0])?;
            a.db(&[0x0f, 0x23, 0xf8])?;
            a.db(&[0x0f, 0x21, 0xf3])?;
            a.db(&[0x0f, 0x21, 0xf9])
        })?;
        end.registers(&[(gpr::RBX, dr::DR6_FIXED), (gpr::RCX, dr::DR7_FIXED)])
    });
    suite.add("DR4 and DR5 are DR6 and DR7 without CR4.DE", &[Mode::Protected, Mode::Long], |g| {
        g.state.dr[7] = dr::DR7_FIXED | 1 << 8;
        let end = g.run(|a| {
            a.db(&[0x0f, 0x21, 0xe3])?;
            a.db(&[0x0f, 0x21, 0xe9])
        })?;
        end.registers(&[(gpr::RBX, dr::DR6_FIXED), (gpr::RCX, dr::DR7_FIXED | 1 << 8)])
    });
    suite.add("upper halves of DR6 and DR7 are #GP", &[Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = 1 << 32;
        g.run(|a| a.mov(dr7, rax))?.gp0()?;
        g.run(|a| a.mov(dr6, rax))?.gp0()
    });
    suite.add("GD guards the debug registers, and is cleared", KERNEL, |g| {
        g.state.dr[7] = dr::DR7_FIXED | dr::DR7_GD;
        let end = g.run(|a| a.db(&[0x0f, 0x21, 0xc0]))?;
        let frame = end.vectored(vector::DB)?;
        equal("RIP", frame.rip, place::CODE)?;
        equal("DR6, DR7", (end.state.dr[6], end.state.dr[7]), (dr::DR6_FIXED | dr::DR6_BD, dr::DR7_FIXED))
    });
    suite.add("#DB does not clear what DR6 held", &[Mode::Long], |g| {
        // Bits B0 to B3 may be cleared (SDM vol. 3B 18.2.3); BS and BD are for software to clear.
        g.state.dr[6] = dr::DR6_FIXED | dr::DR6_BD;
        g.state.rflags |= rflags::TF;
        let end = g.run(|a| a.nop())?;
        end.trap(vector::DB)?;
        equal("DR6", end.state.dr[6], dr::DR6_FIXED | dr::DR6_BD | dr::DR6_BS)
    });
    suite.add("INT1 sets nothing in DR6", &[Mode::Long, Mode::User], |g| {
        let end = g.run(|a| a.int1())?;
        trap_with(&end, 1, 0)
    });
}
