//! Delivery of exceptions and software interrupts: frames, gates, stacks, and what happens when delivery
//! fails (SDM vol. 3A chapter 6).

use super::super::Mismatch;
use super::super::tables::{descriptor, handler};
use super::exceptions::sse_division_by_zero;
use super::prelude::*;

/// Error-code bits of a failed delivery (SDM vol. 3A 6.13): an external or earlier event, and the IDT.
const EXT: u32 = 1;
const IDT: u32 = 2;

pub fn add(suite: &mut Suite) {
    frames(suite.group("delivery"));
    resume_flag(suite);
    gates(suite);
    stacks(suite);
    failures(suite);
    double_faults(suite);
    real_mode(suite);
}

fn frames(suite: &mut Suite) {
    suite.add(
        "the frame holds CS, RFLAGS, RSP and SS",
        &[Mode::Long, Mode::User, Mode::CompatUser, Mode::ProtectedUser],
        |g| {
            g.state.rflags |= rflags::CF | rflags::OF | rflags::IF;
            g.state.gpr[gpr::RSP] = place::STACK - 0x18;
            let selectors = [index::CS, index::SS].map(|n| g.state.segments.seg[n].selector);
            let flags = g.state.rflags;
            let end = g.run(|a| a.ud2())?;
            end.fault(vector::UD)?;
            let frame = end.frame().expect("a fault has one");
            equal("CS, RFLAGS", (frame.cs, frame.rflags & !rflags::RF), (selectors[0], flags))?;
            equal("SS, RSP", (frame.ss, frame.rsp), (Some(selectors[1]), Some(place::STACK - 0x18)))
        },
    );
    suite.add("no stack switch at CPL 0 in protected mode", &[Mode::Protected], |g| {
        g.run(|a| a.ud2())?.fault(vector::UD)?;
        let end = g.start()?;
        equal("ESP", end.gpr(gpr::RSP), place::STACK - 12)
    });
    suite.add("the handler runs at CPL 0 with the gate's CS", PROTECTED_MODES, |g| {
        let expected = if g.mode.handler_bits() == 64 { selector::CODE64 } else { selector::CODE32 };
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("CS", end.state.segments.seg[index::CS].selector, expected)
    });
    suite.add("a change of privilege makes SS null in long mode", &[Mode::User, Mode::CompatUser], |g| {
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("SS", end.state.segments.seg[index::SS].selector, 0)
    });
    suite.add("no change of privilege leaves SS in long mode", &[Mode::Long], |g| {
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("SS", end.state.segments.seg[index::SS].selector, selector::DATA)
    });
    suite.add("a change of privilege loads SS:ESP from the TSS in protected mode", &[Mode::ProtectedUser], |g| {
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("SS", end.state.segments.seg[index::SS].selector, selector::DATA)?;
        equal("ESP", end.gpr(gpr::RSP), place::KERNEL_STACK - 20)
    });
    suite.add("data segments stay as they were", &[Mode::User, Mode::ProtectedUser], |g| {
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("DS", end.state.segments.seg[index::DS].selector, selector::USER_DATA)
    });
    suite.add("the stack is aligned to 16 bytes in long mode", &[Mode::Long], |g| {
        g.state.gpr[gpr::RSP] = place::STACK - 5;
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("RSP", end.gpr(gpr::RSP), place::STACK - 16 - 40)?;
        equal("RSP in the frame", end.frame().and_then(|frame| frame.rsp), Some(place::STACK - 5))
    });
    suite.add("the return address of a trap is behind the instruction", WIDE, |g| {
        g.gate_kind(0x50, 0xee);
        g.run(|a| {
            a.nop()?;
            a.int(0x50)
        })?
        .trap(0x50)
    });
}

/// RF is set in what a fault pushes, so that the instruction does not meet its breakpoint again (SDM vol. 3B
/// 17.3.1.1).
fn resume_flag(suite: &mut Suite) {
    type Fault = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let rows: &[(&str, &[Mode], Fault)] = &[
        ("#DE", PROTECTED_MODES, |a| a.div(cl)),
        ("#UD", PROTECTED_MODES, |a| a.ud2()),
        ("#GP of a selector", PROTECTED_MODES, |a| {
            a.mov(eax, 0x4f8)?;
            a.db(&[0x8e, 0xd8])
        }),
        ("#GP of a privileged instruction", &[Mode::ProtectedUser, Mode::CompatUser, Mode::User], |a| a.hlt()),
        ("#PF", WIDE, |a| {
            a.mov(rax, 1u64 << 40)?;
            a.mov(ebx, dword_ptr(rax))
        }),
        ("#NM", PROTECTED_MODES, |a| a.fld1()),
    ];
    for &(name, modes, code) in rows {
        suite.add(format!("RF is set in the frame of {name}"), modes, move |g| {
            g.state.cr0 |= cr0::EM;
            let end = g.run(code)?;
            let frame = end.frame().ok_or_else(|| Mismatch("no exception".to_owned()))?;
            equal("RIP", frame.rip, place::CODE + end.last_offset())?;
            equal("RF of the frame", frame.rflags & rflags::RF, rflags::RF)?;
            end.flags(rflags::RF, 0)
        });
    }
}

fn gates(suite: &mut Suite) {
    const MODES: &[Mode] = &[Mode::Protected, Mode::Compat, Mode::Long];
    suite.add("an interrupt gate clears IF", MODES, |g| {
        g.state.rflags |= rflags::IF;
        let end = g.run(|a| a.int(0x50))?;
        end.trap(0x50)?;
        end.flags(rflags::IF, 0)
    });
    suite.add("a trap gate leaves IF", MODES, |g| {
        g.state.rflags |= rflags::IF;
        g.gate_kind(0x50, 0x8f);
        let end = g.run(|a| a.int(0x50))?;
        end.trap(0x50)?;
        end.flags(rflags::IF, rflags::IF)
    });
    suite.add("delivery clears NT and TF and leaves AC, DF and status", MODES, |g| {
        let kept = rflags::DF | rflags::CF | rflags::AC;
        g.state.rflags |= rflags::NT | kept;
        let end = g.run(|a| a.int(0x50))?;
        end.trap(0x50)?;
        end.flags(rflags::NT | rflags::TF | kept, kept)
    });
    suite.add("a gate that is no gate is #GP", MODES, |g| {
        // A data segment's type.
        g.gate_kind(0x50, 0x82);
        g.run(|a| a.int(0x50))?.fault_code(vector::GP, 0x50 * 8 + IDT)
    });
    suite.add("a 16-bit gate in long mode is #GP", &[Mode::Long], |g| {
        g.gate_kind(0x50, 0x86);
        g.run(|a| a.int(0x50))?.fault_code(vector::GP, 0x50 * 8 + IDT)
    });
    suite.add("a null selector in a gate is #GP", MODES, |g| {
        g.gate_selector(0x50, 0);
        g.run(|a| a.int(0x50))?.fault_code(vector::GP, 0)
    });
    suite.add("a data segment in a gate is #GP of its selector", MODES, |g| {
        g.gate_selector(0x50, selector::DATA);
        g.run(|a| a.int(0x50))?.fault_code(vector::GP, u32::from(selector::DATA))
    });
    suite.add("a selector beyond the GDT in a gate is #GP of it", MODES, |g| {
        g.gate_selector(0x50, 0x4f8);
        g.run(|a| a.int(0x50))?.fault_code(vector::GP, 0x4f8)
    });
    suite.add("an absent code segment in a gate is #NP of its selector", MODES, |g| {
        g.gate_selector(0x50, selector::ABSENT_CODE);
        g.run(|a| a.int(0x50))?.fault_code(vector::NP, u32::from(selector::ABSENT_CODE))
    });
    suite.add("a user code segment in a gate is #GP at CPL 0", MODES, |g| {
        let user = if g.mode.handler_bits() == 64 { selector::USER_CODE64 } else { selector::USER_CODE32 };
        g.gate_selector(0x50, user);
        g.run(|a| a.int(0x50))?.fault_code(vector::GP, u32::from(user & !3))
    });
    suite.add("32-bit code in a 64-bit gate is #GP", &[Mode::Long], |g| {
        g.gate_selector(0x50, selector::CODE32);
        g.run(|a| a.int(0x50))?.fault_code(vector::GP, u32::from(selector::CODE32))
    });
    suite.add("a conforming segment in a gate keeps the CPL", &[Mode::User, Mode::ProtectedUser], |g| {
        g.gate_kind(0x50, 0xee);
        g.gate_selector(0x50, selector::CONFORMING);
        let end = g.run(|a| a.int(0x50))?;
        equal("vector", end.vector(), Some(0x50))?;
        equal("CS", end.state.segments.seg[index::CS].selector, selector::CONFORMING | 3)?;
        equal("SS", end.state.segments.seg[index::SS].selector, selector::USER_DATA)
    });
    suite.add("an offset beyond the code segment is #GP", &[Mode::Protected], |g| {
        g.descriptor(selector::FREE, descriptor(0, 0x8fff, attr::S | attr::P | attr::CODE | attr::WRITABLE | attr::DB));
        g.gate_selector(0x50, selector::FREE);
        g.run(|a| a.int(0x50))?.fault_code(vector::GP, 0)
    });
    suite.add("a 16-bit gate pushes words", &[Mode::Protected], |g| {
        g.gate_kind(0x50, 0x86);
        let end = g.run(|a| a.int(0x50))?;
        equal("vector", end.vector(), Some(0x50))?;
        equal("ESP", end.gpr(gpr::RSP), place::STACK - 6)?;
        // IP is 16 bits wide: the code's offset 0x10002 is cut.
        equal("IP, CS", g.read_u32(place::STACK - 6), u32::from(selector::CODE32) << 16 | 2)
    });
}

fn stacks(suite: &mut Suite) {
    suite.add("an interrupt stack is taken from CPL 3 and CPL 0", WIDE, |g| {
        g.gate_ist(vector::UD, 1);
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("RSP", end.gpr(gpr::RSP), place::IST_STACK - 40)
    });
    suite.add("an interrupt stack at CPL 0 leaves SS", &[Mode::Long], |g| {
        g.gate_ist(vector::UD, 1);
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("SS", end.state.segments.seg[index::SS].selector, selector::DATA)
    });
    suite.add("RSP0 is taken from CPL 3", &[Mode::User, Mode::CompatUser], |g| {
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        equal("RSP", end.gpr(gpr::RSP), place::KERNEL_STACK - 40)
    });
    suite.add("a non-canonical RSP0 is #SS", &[Mode::User], |g| {
        g.write_u64(place::TSS + 4, 0x8000_0000_1000);
        g.gate_kind(0x50, 0xee);
        g.gate_ist(vector::SS, 1);
        g.run(|a| a.int(0x50))?.fault_code(vector::SS, 0)
    });
    suite.add("a bad stack selector in the TSS is #TS of it", &[Mode::ProtectedUser], |g| {
        g.gate_kind(0x50, 0xee);
        // #TS itself needs a stack: a 32-bit handler without change of privilege is not possible here, so
        // the delivery of #TS fails the same way: #DF, and then shutdown.
        g.write_u32(place::TSS + 8, u32::from(selector::READ_ONLY));
        g.run(|a| a.int(0x50))?.shutdown()
    });
    suite.add("a TSS too short for RSP0 is a shutdown from CPL 3", &[Mode::User, Mode::ProtectedUser], |g| {
        g.state.segments.tr.limit = 3;
        g.run(|a| a.ud2())?.shutdown()
    });
    suite.add("an absent stack page is #PF with the frame's address", &[Mode::User], |g| {
        g.map(place::KERNEL_STACK - 0x1000, 0);
        g.gate_ist(vector::PF, 1);
        let end = g.run(|a| a.ud2())?;
        end.fault_code(vector::PF, 2)?;
        equal("CR2", end.state.cr2, place::KERNEL_STACK - 8)
    });
}

fn failures(suite: &mut Suite) {
    suite.add(
        "an exception through an absent gate is #NP with EXT",
        &[Mode::User, Mode::ProtectedUser, Mode::Long],
        |g| {
            g.gate_kind(vector::UD, 0x0e);
            g.run(|a| a.ud2())?.fault_code(vector::NP, 6 * 8 + IDT + EXT)
        },
    );
    suite.add("an exception beyond the IDT is #GP with EXT", &[Mode::User, Mode::Long], |g| {
        // #GP is vector 13, #XM 19.
        g.state.idtr.limit = 19 * 16 - 1;
        sse_division_by_zero(g)?.fault_code(vector::GP, 19 * 8 + IDT + EXT)
    });
    suite.add("an IDT in an absent page is #PF", &[Mode::Long], |g| {
        // Vectors of 0xe0 and up lie in a page of their own.
        g.state.idtr.base = place::TABLES + 0x200;
        let table = g.read(place::IDT, 4096);
        g.write(place::TABLES + 0x200, &table);
        g.map(place::TABLES + 0x1000, 0);
        let end = g.run(|a| a.int(0xff))?;
        end.page_fault(0, place::TABLES + 0x200 + 0xff0)
    });
}

/// Which pairs of exceptions become #DF (SDM vol. 3A table 6-5).
fn double_faults(suite: &mut Suite) {
    suite.add("#GP and #NP become #DF with error code 0", &[Mode::User, Mode::ProtectedUser, Mode::Long], |g| {
        g.gate_kind(vector::GP, 0x0e);
        // MOV to DS of a selector beyond the GDT.
        g.state.gpr[gpr::RAX] = 0x4f8;
        let end = g.run(|a| a.db(&[0x8e, 0xd8]))?;
        equal("error code of #DF", end.vectored(vector::DF)?.error_code, Some(0))
    });
    suite.add("#DE and #NP become #DF", &[Mode::User, Mode::Long], |g| {
        g.gate_kind(vector::DE, 0x0e);
        let end = g.run(|a| a.div(cl))?;
        equal("error code of #DF", end.vectored(vector::DF)?.error_code, Some(0))
    });
    suite.add("#PF and #PF become #DF, with CR2 of the second", &[Mode::User], |g| {
        g.map(place::DATA, 0);
        g.map(place::KERNEL_STACK - 0x1000, 0);
        g.gate_ist(vector::DF, 1);
        let end = g.run(|a| a.mov(rax, qword_ptr(rdi)))?;
        equal("error code of #DF", end.vectored(vector::DF)?.error_code, Some(0))?;
        equal("CR2", end.state.cr2, place::KERNEL_STACK - 8)
    });
    suite.add("#PF and #NP become #DF", &[Mode::User, Mode::Long], |g| {
        g.map(place::DATA, 0);
        g.gate_kind(vector::PF, 0x0e);
        let end = g.run(|a| a.mov(rax, qword_ptr(rdi)))?;
        equal("error code of #DF", end.vectored(vector::DF)?.error_code, Some(0))
    });
    suite.add("#GP and #PF do not: the second is delivered", &[Mode::User], |g| {
        g.map(place::KERNEL_STACK - 0x1000, 0);
        g.gate_ist(vector::PF, 1);
        let end = g.run(|a| a.hlt())?;
        end.fault_code(vector::PF, 2)
    });
    suite.add("#UD and #NP do not: the second is delivered", WIDE, |g| {
        g.gate_kind(vector::UD, 0x0e);
        g.run(|a| a.ud2())?.fault_code(vector::NP, 6 * 8 + IDT + EXT)
    });
    suite.add("no IDT at all is a shutdown", EVERY_MODE, |g| {
        g.state.idtr.limit = 0;
        g.run(|a| a.ud2())?.shutdown()
    });
    suite.add("an absent gate of #DF is a shutdown", WIDE, |g| {
        g.gate_kind(vector::GP, 0x0e);
        g.gate_kind(vector::DF, 0x0e);
        g.state.gpr[gpr::RAX] = 0x4f8;
        g.run(|a| a.db(&[0x8e, 0xd8]))?.shutdown()
    });
    suite.add("a shutdown by INT with an empty IDT, as kernels reboot", &[Mode::Protected, Mode::Long], |g| {
        g.write(place::DATA, &[0; 10]);
        g.run(|a| {
            if a.bitness() == 64 {
                a.lidt(tword_ptr(rdi))?
            } else {
                a.lidt(fword_ptr(edi))?
            }
            a.int3()
        })?
        .shutdown()
    });
}

fn real_mode(suite: &mut Suite) {
    const REAL: &[Mode] = &[Mode::Real];
    suite.add("INT pushes FLAGS, CS and IP and clears IF and TF", REAL, |g| {
        g.state.rflags |= rflags::IF | rflags::CF;
        let end = g.run(|a| a.int(0x21))?;
        end.trap(0x21)?;
        let frame = end.frame().expect("a trap has one");
        equal("CS", frame.cs, (place::CODE >> 4) as u16)?;
        equal("FLAGS", frame.rflags, rflags::IF | rflags::CF | rflags::FIXED)?;
        equal("SP", end.gpr(gpr::RSP), place::STACK - 6)?;
        end.flags(rflags::IF | rflags::CF, rflags::CF)
    });
    suite.add("IRET comes back", REAL, |g| {
        g.handler(0x21, |a| {
            a.mov(bx, 0x1234)?;
            a.iret()
        })?;
        g.state.rflags |= rflags::IF;
        let end = g.run(|a| {
            a.int(0x21)?;
            a.mov(cx, 0x5678)
        })?;
        end.registers(&[(gpr::RBX, 0x1234), (gpr::RCX, 0x5678), (gpr::RSP, place::STACK)])?;
        end.flags(rflags::IF, rflags::IF)
    });
    suite.add("the vector table may lie elsewhere", REAL, |g| {
        g.state.idtr.base = place::TABLES;
        let at = handler(0x33);
        g.write_u32(place::TABLES + 4 * 0x21, ((at >> 4) << 16) as u32);
        let end = g.run(|a| a.int(0x21))?;
        equal("where it went", end.vector(), Some(0x33))
    });
    suite.add("a vector beyond the table is #GP", REAL, |g| {
        g.state.idtr.limit = 0x21 * 4 + 2;
        let end = g.run(|a| a.int(0x21))?;
        end.fault_at(0, vector::GP, None)
    });
    suite.add("an offset beyond the limit of DS is #GP", REAL, |g| {
        g.state.gpr[gpr::RBX] = 0xffff;
        g.run(|a| a.mov(ax, word_ptr(bx)))?.fault(vector::GP)
    });
    suite.add("a stack pointer that wraps", REAL, |g| {
        g.state.segments.seg[index::SS] = g.state.segments.seg[index::DS];
        (g.state.gpr[gpr::RSP], g.state.gpr[gpr::RAX]) = (0, 0x1234);
        let end = g.run(|a| a.push(ax))?;
        end.registers(&[(gpr::RSP, 0xfffe)])?;
        equal("memory", g.read(place::DATA + 0xfffe, 2), vec![0x34, 0x12])
    });
}
