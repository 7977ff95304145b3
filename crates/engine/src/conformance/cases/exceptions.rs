//! Exceptions that instructions raise: vector, error code, where the frame points (SDM vol. 3A 6.15).

use super::super::{End, Guest, Mismatch};
use super::prelude::*;

pub fn add(suite: &mut Suite) {
    software(suite.group("exceptions"));
    arithmetic(suite);
    floating_point(suite);
    undefined(suite);
    general_protection(suite);
    privileged(suite.group("privileged instructions"));
    privileged_in_vm86(suite);
}

/// Modes at CPL 0, in which every gate can be called.
const KERNEL_MODES: &[Mode] = &[Mode::Real, Mode::Protected, Mode::Compat, Mode::Long];

fn software(suite: &mut Suite) {
    suite.add("UD2 is a fault", EVERY_MODE, |g| g.run(|a| a.ud2())?.fault(vector::UD));
    suite.add("INT3 is a trap", KERNEL_MODES, |g| g.run(|a| a.int3())?.trap(vector::BP));
    suite.add("INT 3 of two bytes is a trap", KERNEL_MODES, |g| g.run(|a| a.db(&[0xcd, 3]))?.trap(vector::BP));
    suite.add("INT n leads to vector n", KERNEL_MODES, |g| g.run(|a| a.int(0x80))?.trap(0x80));
    suite.add("INT 255 leads to vector 255", KERNEL_MODES, |g| g.run(|a| a.int(0xff))?.trap(0xff));
    suite.add("INT 13 pushes no error code", &[Mode::Protected, Mode::Long], |g| {
        let end = g.run(|a| a.int(13))?;
        equal("vector", end.vector(), Some(vector::GP))?;
        // The stack's top is the return address.
        let top = end.gpr(gpr::RSP);
        let pushed = if g.mode == Mode::Long { g.read_u64(top) } else { u64::from(g.read_u32(top)) };
        equal("top of the stack", pushed, place::CODE + 2)
    });
    suite.add("INT1 is a trap that needs no DPL", &[Mode::Real, Mode::ProtectedUser, Mode::Long, Mode::User], |g| {
        g.run(|a| a.int1())?.trap(vector::DB)
    });
    for (name, code) in [("INT3", &[0xcc][..]), ("INT 0x40", &[0xcd, 0x40])] {
        let number = if code.len() == 1 { 3 } else { code[1] };
        let error = u32::from(number) * 8 + 2;
        let protected_users = &[Mode::ProtectedUser, Mode::CompatUser, Mode::User];
        suite.add(format!("{name} checks the gate's DPL"), protected_users, move |g| {
            g.run(|a| a.db(code))?.fault_code(vector::GP, error)
        });
        suite.add(format!("{name} through a gate of DPL 3"), protected_users, move |g| {
            g.gate_kind(number, 0xee);
            g.run(|a| a.db(code))?.trap(number)
        });
        suite.add(format!("{name} through an absent gate is #NP"), protected_users, move |g| {
            g.gate_kind(number, 0x6e);
            g.run(|a| a.db(code))?.fault_code(vector::NP, error)
        });
    }
    suite.add("INT n beyond the IDT's limit is #GP", &[Mode::Protected, Mode::Compat, Mode::Long, Mode::User], |g| {
        let size = g.mode.handler_bits() as u16 / 4;
        g.state.idtr.limit = 0x90 * size + size - 2;
        g.run(|a| a.int(0x90))?.fault_code(vector::GP, 0x90 * 8 + 2)
    });
    suite.add("INT n at the IDT's very limit works", &[Mode::Protected, Mode::Long], |g| {
        let size = g.mode.handler_bits() as u16 / 4;
        g.state.idtr.limit = 0x90 * size + size - 1;
        g.run(|a| a.int(0x90))?.trap(0x90)
    });
    suite.add("INTO with OF is a trap", &[Mode::Real, Mode::Protected, Mode::Compat], |g| {
        g.state.rflags |= rflags::OF;
        g.run(|a| a.into())?.trap(vector::OF)
    });
    suite.add("INTO without OF does nothing", &[Mode::Real, Mode::Protected, Mode::Compat, Mode::CompatUser], |g| {
        g.run(|a| a.into())?.done()
    });
    suite.add("INTO checks the gate's DPL", &[Mode::ProtectedUser, Mode::CompatUser], |g| {
        g.state.rflags |= rflags::OF;
        g.run(|a| a.into())?.fault_code(vector::GP, 4 * 8 + 2)
    });
    suite.add("BOUND outside its bounds is #BR", &[Mode::Protected, Mode::ProtectedUser, Mode::Compat], |g| {
        g.write_u32(place::DATA, 10);
        g.write_u32(place::DATA + 4, 20);
        g.state.gpr[gpr::RAX] = 21;
        g.run(|a| a.bound(eax, qword_ptr(edi)))?.fault(vector::BR)
    });
    suite.add("BOUND within its bounds does nothing", &[Mode::Protected, Mode::CompatUser], |g| {
        g.write_u32(place::DATA, 10);
        g.write_u32(place::DATA + 4, 20);
        g.state.gpr[gpr::RAX] = 20;
        g.run(|a| a.bound(eax, qword_ptr(edi)))?.done()
    });
}

fn arithmetic(suite: &mut Suite) {
    suite.add("DIV by zero is #DE", EVERY_MODE, |g| g.run(|a| a.div(cl))?.fault(vector::DE));
    suite.add("DIV of 32 bits whose quotient does not fit is #DE", PROTECTED_MODES, |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX]) = (5, 5);
        g.run(|a| a.div(ecx))?.fault(vector::DE)
    });
    suite.add("IDIV of the least number by -1 is #DE", PROTECTED_MODES, |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RDX]) = (0x8000_0000, 0xffff_ffff);
        g.state.gpr[gpr::RCX] = 0xffff_ffff;
        g.run(|a| a.idiv(ecx))?.fault(vector::DE)
    });
    suite.add("DIV of 64 bits by zero in memory is #DE", WIDE, |g| g.run(|a| a.div(qword_ptr(rdi)))?.fault(vector::DE));
    suite.add("AAM by zero is #DE", &[Mode::Real, Mode::Protected, Mode::CompatUser], |g| {
        g.run(|a| a.aam(0))?.fault(vector::DE)
    });
    suite.add("a fault leaves the registers as they were", PROTECTED_MODES, |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RDX], g.state.gpr[gpr::RBX]) = (1, 2, 3);
        let end = g.run(|a| a.div(ecx))?;
        end.fault(vector::DE)?;
        equal("RAX, RDX, RBX", (end.gpr(gpr::RAX), end.gpr(gpr::RDX), end.gpr(gpr::RBX)), (1, 2, 3))
    });
}

fn floating_point(suite: &mut Suite) {
    const MODES: &[Mode] = &[Mode::Protected, Mode::ProtectedUser, Mode::Compat, Mode::Long, Mode::User];
    suite.add("x87 with CR0.TS is #NM", MODES, |g| {
        g.state.cr0 |= cr0::TS;
        g.run(|a| a.fld1())?.fault(vector::NM)
    });
    suite.add("x87 with CR0.EM is #NM", MODES, |g| {
        g.state.cr0 |= cr0::EM;
        g.run(|a| a.fld1())?.fault(vector::NM)
    });
    suite.add("FWAIT with CR0.TS and MP is #NM", MODES, |g| {
        g.state.cr0 |= cr0::TS | cr0::MP;
        g.run(|a| a.wait())?.fault(vector::NM)
    });
    suite.add("FWAIT with CR0.TS alone does nothing", MODES, |g| {
        g.state.cr0 = g.state.cr0 & !cr0::MP | cr0::TS;
        g.run(|a| a.wait())?.done()
    });
    suite.add("SSE with CR0.TS is #NM", MODES, |g| {
        g.state.cr0 |= cr0::TS;
        g.run(|a| a.movaps(xmm0, xmm1))?.fault(vector::NM)
    });
    suite.add("SSE with CR0.EM is #UD", MODES, |g| {
        g.state.cr0 |= cr0::EM;
        g.run(|a| a.movaps(xmm0, xmm1))?.fault(vector::UD)
    });
    suite.add("SSE without CR4.OSFXSR is #UD", MODES, |g| {
        g.state.cr4 &= !cr4::OSFXSR;
        g.run(|a| a.movaps(xmm0, xmm1))?.fault(vector::UD)
    });
    suite.add("CLTS ends #NM", &[Mode::Protected, Mode::Long], |g| {
        g.state.cr0 |= cr0::TS;
        g.run(|a| {
            a.clts()?;
            a.movaps(xmm0, xmm1)
        })?
        .done()
    });
    // An unmasked x87 exception waits for the next waiting instruction (SDM vol. 1 8.7).
    suite.add("an unmasked x87 exception is #MF at the next instruction that waits", PROTECTED_MODES, |g| {
        g.state.cr0 |= cr0::NE;
        g.write(place::DATA, &0x37bu16.to_le_bytes());
        g.run(|a| {
            if g_bits(a) == 64 {
                a.fldcw(word_ptr(rdi))?
            } else {
                a.fldcw(word_ptr(edi))?
            }
            a.fld1()?;
            a.fldz()?;
            a.fdivp(st1, st0)?;
            a.nop()?;
            a.wait()
        })?
        .fault(vector::MF)
    });
    suite.add("an unmasked SSE exception is #XM", WIDE, |g| sse_division_by_zero(g)?.fault(vector::XM));
    suite.add("an unmasked SSE exception without OSXMMEXCPT is #UD", WIDE, |g| {
        g.state.cr4 &= !cr4::OSXMMEXCPT;
        sse_division_by_zero(g)?.fault(vector::UD)
    });
    suite.add("reserved bits in MXCSR are #GP", WIDE, |g| {
        g.write_u32(place::DATA, 0x8000_1f80);
        g.run(|a| a.ldmxcsr(dword_ptr(rdi)))?.gp0()
    });
}

/// An SSE division by zero with that exception unmasked, which is the code's last instruction.
pub fn sse_division_by_zero(g: &mut Guest) -> Result<End, Mismatch> {
    g.write_u32(place::DATA, 0x1d80);
    g.write_u32(place::DATA + 4, 1f32.to_bits());
    g.run(|a| {
        a.ldmxcsr(dword_ptr(rdi))?;
        a.movss(xmm0, dword_ptr(rdi + 4))?;
        a.xorps(xmm1, xmm1)?;
        a.divss(xmm0, xmm1)
    })
}

/// Width of the code being assembled.
fn g_bits(a: &CodeAssembler) -> u32 {
    a.bitness()
}

fn undefined(suite: &mut Suite) {
    let everywhere: &[(&str, &'static [u8])] = &[
        ("UD0", &[0x0f, 0xff, 0xc0]),
        ("UD1", &[0x0f, 0xb9, 0xc0]),
        ("LOCK before a register operand", &[0xf0, 0x01, 0xc0]),
        ("LOCK before NOP", &[0xf0, 0x90]),
        ("LOCK before MOV", &[0xf0, 0x89, 0x07]),
        ("LOCK before CMP", &[0xf0, 0x39, 0x07]),
        ("MOV to CS", &[0x8e, 0xc8]),
        ("MOV to segment register 6", &[0x8e, 0xf0]),
        ("MOV from segment register 7", &[0x8c, 0xf8]),
        ("LEA of a register", &[0x8d, 0xc0]),
        ("FEh /7", &[0xfe, 0xf8]),
        ("FFh /7", &[0xff, 0xf8]),
        ("C6h /1", &[0xc6, 0xc8, 0]),
        ("0F 0A", &[0x0f, 0x0a]),
        ("RSM outside SMM", &[0x0f, 0xaa]),
        ("CMPXCHG8B of a register", &[0x0f, 0xc7, 0xc8]),
        ("LSS of a register", &[0x0f, 0xb2, 0xc0]),
        ("far call of a register", &[0xff, 0xd8]),
        ("far jump of a register", &[0xff, 0xe8]),
        ("0F 04", &[0x0f, 0x04]),
    ];
    for &(name, code) in everywhere {
        suite.add(format!("{name} is #UD"), &[Mode::Real, Mode::ProtectedUser, Mode::Long, Mode::User], move |g| {
            g.run(|a| a.db(code))?.fault(vector::UD)
        });
    }
    // Opcodes that 64-bit mode took away (SDM vol. 2, "Invalid in 64-Bit Mode").
    let not_in_64: &[(&str, &'static [u8])] = &[
        ("PUSH ES", &[0x06]),
        ("POP ES", &[0x07]),
        ("PUSH CS", &[0x0e]),
        ("PUSH SS", &[0x16]),
        ("POP DS", &[0x1f]),
        ("DAA", &[0x27]),
        ("DAS", &[0x2f]),
        ("AAA", &[0x37]),
        ("AAS", &[0x3f]),
        ("PUSHA", &[0x60]),
        ("POPA", &[0x61]),
        ("82h", &[0x82, 0xc0, 1]),
        ("far CALL by immediate", &[0x9a, 0, 0, 0, 0, 8, 0]),
        ("INTO", &[0xce]),
        ("AAM", &[0xd4, 10]),
        ("AAD", &[0xd5, 10]),
        ("SALC", &[0xd6]),
        ("far JMP by immediate", &[0xea, 0, 0, 0, 0, 8, 0]),
    ];
    for &(name, code) in not_in_64 {
        suite.add(format!("{name} is #UD in 64-bit mode"), WIDE, move |g| g.run(|a| a.db(code))?.fault(vector::UD));
    }
    let real: &[(&str, &'static [u8])] = &[
        ("SLDT", &[0x0f, 0x00, 0xc0]),
        ("STR", &[0x0f, 0x00, 0xc8]),
        ("LLDT", &[0x0f, 0x00, 0xd0]),
        ("LTR", &[0x0f, 0x00, 0xd8]),
        ("VERR", &[0x0f, 0x00, 0xe0]),
        ("VERW", &[0x0f, 0x00, 0xe8]),
        ("LAR", &[0x0f, 0x02, 0xc0]),
        ("LSL", &[0x0f, 0x03, 0xc0]),
        ("ARPL", &[0x63, 0xc0]),
    ];
    for &(name, code) in real {
        suite.add(format!("{name} is #UD without protection"), &[Mode::Real, Mode::Vm86], move |g| {
            g.run(|a| a.db(code))?.fault(vector::UD)
        });
    }
    let system: &[(&str, &'static [u8])] = &[
        ("MOV from CR1", &[0x0f, 0x20, 0xc8]),
        ("MOV to CR5", &[0x0f, 0x22, 0xe8]),
        ("MOV from CR7", &[0x0f, 0x20, 0xf8]),
    ];
    for &(name, code) in system {
        suite.add(format!("{name} is #UD"), &[Mode::Protected, Mode::Long], move |g| {
            g.run(|a| a.db(code))?.fault(vector::UD)
        });
    }
    suite.add("DR4 is #UD with CR4.DE", &[Mode::Protected, Mode::Long], |g| {
        g.state.cr4 |= cr4::DE;
        g.run(|a| a.db(&[0x0f, 0x21, 0xe0]))?.fault(vector::UD)
    });
    suite.add("SYSCALL without EFER.SCE is #UD", WIDE, |g| {
        g.state.set_msr(msr::EFER, efer::LME | efer::LMA | efer::NXE);
        g.run(|a| a.syscall())?.fault(vector::UD)
    });
    suite.add("XGETBV without CR4.OSXSAVE is #UD", WIDE, |g| g.run(|a| a.xgetbv())?.fault(vector::UD));
    suite.add("RDFSBASE without CR4.FSGSBASE is #UD", WIDE, |g| g.run(|a| a.rdfsbase(rax))?.fault(vector::UD));
    suite
        .add("RDFSBASE outside 64-bit mode is #UD", &[Mode::Compat], |g| {
            g.state.cr4 |= cr4::FSGSBASE;
            g.run(|a| a.db(&[0xf3, 0x0f, 0xae, 0xc0]))?.fault(vector::UD)
        })
        .needs(&[Need::FSGSBASE]);
    suite.add("CLAC at CPL 3 is #UD", &[Mode::User], |g| g.run(|a| a.clac())?.fault(vector::UD)).needs(&[Need::SMAP]);
    suite.add("SWAPGS outside 64-bit mode is #UD", &[Mode::Protected, Mode::Compat], |g| {
        g.run(|a| a.db(&[0x0f, 0x01, 0xf8]))?.fault(vector::UD)
    });
}

fn general_protection(suite: &mut Suite) {
    const LOW: u64 = 0x8000_0000_0000;
    suite.add("a load from a non-canonical address is #GP", WIDE, |g| {
        g.state.gpr[gpr::RDI] = LOW;
        g.run(|a| a.mov(rax, qword_ptr(rdi)))?.gp0()
    });
    suite.add("a store to a non-canonical address is #GP", WIDE, |g| {
        g.state.gpr[gpr::RDI] = LOW;
        g.run(|a| a.mov(qword_ptr(rdi), rax))?.gp0()
    });
    suite.add("a load that runs into non-canonical addresses is #GP", WIDE, |g| {
        g.state.gpr[gpr::RDI] = LOW - 4;
        g.run(|a| a.mov(rax, qword_ptr(rdi)))?.gp0()
    });
    suite.add("PUSH to a non-canonical address is #SS", WIDE, |g| {
        g.state.gpr[gpr::RSP] = 0x9000_0000_0000;
        // CPL 0 would push the frame there too: an interrupt stack takes it.
        g.gate_ist(vector::SS, 1);
        g.run(|a| a.push(rax))?.fault_code(vector::SS, 0)
    });
    suite.add("a load by RBP from a non-canonical address is #SS", WIDE, |g| {
        g.state.gpr[gpr::RBP] = LOW;
        g.run(|a| a.mov(rax, qword_ptr(rbp)))?.fault_code(vector::SS, 0)
    });
    suite.add("a jump to a non-canonical address is #GP at the jump", WIDE, |g| {
        g.state.gpr[gpr::RAX] = LOW;
        g.run(|a| a.jmp(rax))?.gp0()
    });
    suite.add("a call to a non-canonical address pushes nothing", WIDE, |g| {
        g.state.gpr[gpr::RAX] = LOW;
        let end = g.run(|a| a.call(rax))?;
        end.gp0()?;
        equal("RSP in the frame", end.frame().and_then(|frame| frame.rsp), Some(place::STACK))
    });
    suite.add("a return to a non-canonical address is #GP at the RET", WIDE, |g| {
        g.write_u64(place::STACK - 8, LOW);
        g.state.gpr[gpr::RSP] = place::STACK - 8;
        let end = g.run(|a| a.ret())?;
        end.gp0()?;
        equal("RSP in the frame", end.frame().and_then(|frame| frame.rsp), Some(place::STACK - 8))
    });
    suite.add("an unaligned MOVAPS is #GP", WIDE, |g| g.run(|a| a.movaps(xmm0, xmmword_ptr(rdi + 8)))?.gp0());
    suite.add("an instruction of 16 bytes is #GP", EVERY_MODE, |g| {
        let mut code = [0x66; 16];
        code[15] = 0x90;
        g.run(|a| a.db(&code))?.gp0()
    });
    suite.add("an instruction of 15 bytes is fine", EVERY_MODE, |g| {
        let mut code = [0x66; 15];
        code[14] = 0x90;
        g.run(|a| a.db(&code))?.done()
    });
    let mut alignment = |name: &str, modes: &'static [Mode], am: bool, ac: bool, raises: bool| {
        suite.add(name, modes, move |g| {
            g.state.cr0 = g.state.cr0 & !cr0::AM | if am { cr0::AM } else { 0 };
            g.state.rflags |= if ac { rflags::AC } else { 0 };
            let end = g.run(|a| a.mov(eax, dword_ptr(edi + 1)))?;
            if raises { end.fault_code(vector::AC, 0) } else { end.done() }
        });
    };
    alignment(
        "an unaligned load with AM and AC is #AC at CPL 3",
        &[Mode::ProtectedUser, Mode::CompatUser, Mode::User],
        true,
        true,
        true,
    );
    alignment(
        "an unaligned load with AM and AC is fine at CPL 0",
        &[Mode::Protected, Mode::Compat, Mode::Long],
        true,
        true,
        false,
    );
    alignment("an unaligned load with AC alone is fine", &[Mode::ProtectedUser, Mode::User], false, true, false);
    alignment("an unaligned load with AM alone is fine", &[Mode::ProtectedUser, Mode::User], true, false, false);
}

fn privileged(suite: &mut Suite) {
    let everywhere: &[(&str, &'static [u8])] = &[
        ("HLT", &[0xf4]),
        ("CLI", &[0xfa]),
        ("STI", &[0xfb]),
        ("IN AL, imm8", &[0xe4, 0x60]),
        ("IN AL, DX", &[0xec]),
        ("IN EAX, DX", &[0xed]),
        ("OUT imm8, AL", &[0xe6, 0x60]),
        ("OUT DX, EAX", &[0xef]),
        ("INSB", &[0x6c]),
        ("OUTSD", &[0x6f]),
        ("LGDT", &[0x0f, 0x01, 0x17]),
        ("LIDT", &[0x0f, 0x01, 0x1f]),
        ("LLDT", &[0x0f, 0x00, 0xd0]),
        ("LTR", &[0x0f, 0x00, 0xd8]),
        ("LMSW", &[0x0f, 0x01, 0xf0]),
        ("CLTS", &[0x0f, 0x06]),
        ("INVD", &[0x0f, 0x08]),
        ("WBINVD", &[0x0f, 0x09]),
        ("INVLPG", &[0x0f, 0x01, 0x3f]),
        ("RDMSR", &[0x0f, 0x32]),
        ("WRMSR", &[0x0f, 0x30]),
        ("RDPMC", &[0x0f, 0x33]),
        ("MOV from CR0", &[0x0f, 0x20, 0xc0]),
        ("MOV from CR2", &[0x0f, 0x20, 0xd0]),
        ("MOV from CR3", &[0x0f, 0x20, 0xd8]),
        ("MOV from CR4", &[0x0f, 0x20, 0xe0]),
        ("MOV to CR0", &[0x0f, 0x22, 0xc0]),
        ("MOV to CR3", &[0x0f, 0x22, 0xd8]),
        ("MOV to CR4", &[0x0f, 0x22, 0xe0]),
        ("MOV from DR0", &[0x0f, 0x21, 0xc0]),
        ("MOV from DR6", &[0x0f, 0x21, 0xf0]),
        ("MOV to DR7", &[0x0f, 0x23, 0xf8]),
    ];
    for &(name, code) in everywhere {
        suite.add(format!("{name} at CPL 3 is #GP"), &[Mode::ProtectedUser, Mode::CompatUser, Mode::User], move |g| {
            g.run(|a| a.db(code))?.gp0()
        });
    }
    let long: &[(&str, &'static [u8])] = &[
        ("SWAPGS", &[0x0f, 0x01, 0xf8]),
        ("SYSRET", &[0x48, 0x0f, 0x07]),
        ("MOV from CR8", &[0x44, 0x0f, 0x20, 0xc0]),
        ("MOV to CR8", &[0x44, 0x0f, 0x22, 0xc0]),
    ];
    for &(name, code) in long {
        suite.add(format!("{name} at CPL 3 is #GP"), &[Mode::User], move |g| g.run(|a| a.db(code))?.gp0());
    }
    suite.add("SYSEXIT at CPL 3 is #GP", &[Mode::User], |g| g.run(|a| a.sysexit())?.gp0()).needs(&[Need::SYSENTER]);
    suite
        .add("XSETBV at CPL 3 is #GP", &[Mode::User], |g| {
            g.state.cr4 |= cr4::OSXSAVE;
            g.run(|a| a.xsetbv())?.gp0()
        })
        .needs(&[Need::XSAVE]);
    suite
        .add("INVPCID at CPL 3 is #GP", &[Mode::User], |g| g.run(|a| a.invpcid(rax, xmmword_ptr(rdi)))?.gp0())
        .needs(&[Need::INVPCID]);
    suite.add(
        "the I/O bitmap lets CPL 3 use a port",
        &[Mode::Vm86, Mode::ProtectedUser, Mode::CompatUser, Mode::User],
        |g| {
            g.allow_port(0x60);
            g.io.answer(&[0x5a]);
            let end = g.run(|a| a.in_(al, 0x60))?;
            end.registers(&[(gpr::RAX, 0x5a)])?;
            end.saw(&[Access::In { port: 0x60, size: 1 }])
        },
    );
    suite.add("the I/O bitmap guards each byte of a port access", &[Mode::ProtectedUser, Mode::User], |g| {
        g.allow_port(0x60);
        g.allow_port(0x61);
        g.allow_port(0x62);
        g.run(|a| a.in_(eax, 0x60))?.gp0()
    });
    suite.add("IOPL 3 lets CPL 3 use every port", &[Mode::ProtectedUser, Mode::CompatUser, Mode::User], |g| {
        g.state.rflags |= rflags::IOPL;
        g.state.gpr[gpr::RDX] = 0x1234;
        g.run(|a| a.out(dx, eax))?.saw(&[Access::Out { port: 0x1234, size: 4, value: 0 }])
    });
    suite.add("IOPL 3 lets CPL 3 use CLI and STI", &[Mode::ProtectedUser, Mode::CompatUser, Mode::User], |g| {
        g.state.rflags |= rflags::IOPL;
        let end = g.run(|a| {
            a.sti()?;
            a.nop()
        })?;
        end.done()?;
        end.flags(rflags::IF, rflags::IF)?;
        let end = g.run(|a| a.cli())?;
        end.done()?;
        end.flags(rflags::IF, 0)
    });
    suite.add("POPF at CPL 3 leaves IF and IOPL alone", &[Mode::ProtectedUser, Mode::CompatUser, Mode::User], |g| {
        g.state.rflags |= rflags::IF;
        let end = g.run(|a| {
            a.push(0x3000)?;
            if g_bits(a) == 64 { a.popfq() } else { a.popfd() }
        })?;
        end.done()?;
        end.flags(rflags::IF | rflags::IOPL, rflags::IF)
    });
    umip(suite);
    suite.add("RDTSC at CPL 3 with CR4.TSD is #GP", &[Mode::ProtectedUser, Mode::CompatUser, Mode::User], |g| {
        g.state.cr4 |= cr4::TSD;
        g.run(|a| a.rdtsc())?.gp0()
    });
    suite.add("RDTSC at CPL 0 with CR4.TSD works", &[Mode::Protected, Mode::Compat, Mode::Long], |g| {
        g.state.cr4 |= cr4::TSD;
        g.run(|a| a.rdtsc())?.done()
    });
}

fn umip(suite: &mut Suite) {
    let tables: &[(&str, &'static [u8])] = &[
        ("SGDT", &[0x0f, 0x01, 0x07]),
        ("SIDT", &[0x0f, 0x01, 0x0f]),
        ("SLDT", &[0x0f, 0x00, 0xc0]),
        ("STR", &[0x0f, 0x00, 0xc8]),
        ("SMSW", &[0x0f, 0x01, 0xe0]),
    ];
    for &(name, code) in tables {
        suite.add(
            format!("{name} at CPL 3 is allowed"),
            &[Mode::ProtectedUser, Mode::CompatUser, Mode::User],
            move |g| g.run(|a| a.db(code))?.done(),
        );
        suite
            .add(
                format!("{name} at CPL 3 with CR4.UMIP is #GP"),
                &[Mode::ProtectedUser, Mode::CompatUser, Mode::User],
                move |g| {
                    g.state.cr4 |= cr4::UMIP;
                    g.run(|a| a.db(code))?.gp0()
                },
            )
            .needs(&[Need::UMIP]);
    }
}

/// Virtual-8086 mode with IOPL 0 (SDM vol. 3B 21.2.7).
fn privileged_in_vm86(suite: &mut Suite) {
    let sensitive: &[(&str, &'static [u8])] = &[
        ("HLT", &[0xf4]),
        ("CLI", &[0xfa]),
        ("STI", &[0xfb]),
        ("PUSHF", &[0x9c]),
        ("POPF", &[0x9d]),
        ("INT 0x21", &[0xcd, 0x21]),
        ("IRET", &[0xcf]),
        ("IN AL, imm8", &[0xe4, 0x60]),
        ("OUT DX, AX", &[0xef]),
        ("MOV from CR0", &[0x0f, 0x20, 0xc0]),
        ("MOV to DR7", &[0x0f, 0x23, 0xf8]),
        ("LGDT", &[0x0f, 0x01, 0x17]),
        ("LMSW", &[0x0f, 0x01, 0xf0]),
        ("CLTS", &[0x0f, 0x06]),
        ("WBINVD", &[0x0f, 0x09]),
        ("RDMSR", &[0x0f, 0x32]),
    ];
    for &(name, code) in sensitive {
        suite.add(format!("{name} is #GP"), &[Mode::Vm86], move |g| g.run(|a| a.db(code))?.gp0());
    }
    suite.add("with IOPL 3 PUSHF, CLI and STI work", &[Mode::Vm86], |g| {
        g.state.rflags |= rflags::IOPL;
        let end = g.run(|a| {
            a.sti()?;
            a.pushf()?;
            a.cli()?;
            a.pop(ax)
        })?;
        end.done()?;
        equal("IF as pushed", end.gpr(gpr::RAX) & rflags::IF, rflags::IF)?;
        end.flags(rflags::IF, 0)
    });
    suite.add("INT3 with IOPL 0 checks the gate only", &[Mode::Vm86], |g| {
        g.gate_kind(3, 0xee);
        g.run(|a| a.int3())?.trap(vector::BP)
    });
    suite.add("an exception saves and clears the data segments", &[Mode::Vm86], |g| {
        let end = g.run(|a| a.ud2())?;
        end.fault(vector::UD)?;
        let frame = end.frame().expect("a fault has one");
        equal("VM in the frame", frame.rflags & rflags::VM, rflags::VM)?;
        equal("CS of the frame", frame.cs, (place::CODE >> 4) as u16)?;
        equal("SS:ESP of the frame", (frame.ss, frame.rsp), (Some(0), Some(place::STACK)))?;
        let top = end.gpr(gpr::RSP);
        let saved = [20, 24, 28, 32].map(|at| g.read_u32(top + at) as u16);
        equal("ES, DS, FS, GS as pushed", saved, [(place::MMIO >> 4) as u16, (place::DATA >> 4) as u16, 0, 0])?;
        let now = [index::ES, index::DS, index::FS, index::GS].map(|n| end.state.segments.seg[n].selector);
        equal("ES, DS, FS, GS in the handler", now, [0; 4])?;
        end.flags(rflags::VM, 0)
    });
}
