//! Segmentation: limits, types, rights, loads of segment registers and descriptor tables (SDM vol. 3A
//! chapters 3 and 5).

use super::super::tables::descriptor;
use super::prelude::*;

pub fn add(suite: &mut Suite) {
    limits(suite.group("segments"));
    loads(suite);
    bases(suite);
    tables(suite.group("descriptor tables"));
    queries(suite);
}

fn limits(suite: &mut Suite) {
    const P32: &[Mode] = &[Mode::Protected, Mode::Compat];
    suite.add("a load beyond the limit is #GP", P32, |g| {
        g.segment(index::DS, selector::SMALL);
        g.run(|a| a.mov(eax, dword_ptr(0x1000u32)))?.gp0()
    });
    suite.add("a load up to the limit works", P32, |g| {
        g.segment(index::DS, selector::SMALL);
        g.run(|a| a.mov(eax, dword_ptr(0xffcu32)))?.done()
    });
    suite.add("a load across the limit is #GP", P32, |g| {
        g.segment(index::DS, selector::SMALL);
        g.run(|a| a.mov(eax, dword_ptr(0xffdu32)))?.gp0()
    });
    suite.add("a store beyond the limit is #GP", P32, |g| {
        g.segment(index::ES, selector::SMALL);
        g.run(|a| a.mov(dword_ptr(0xfffu32).es(), eax))?.gp0()
    });
    suite.add("a store to a read-only segment is #GP", P32, |g| {
        g.segment(index::DS, selector::READ_ONLY);
        g.run(|a| a.mov(dword_ptr(edi), eax))?.gp0()
    });
    suite.add("a load from a read-only segment works", P32, |g| {
        g.segment(index::DS, selector::READ_ONLY);
        g.run(|a| a.mov(eax, dword_ptr(edi)))?.done()
    });
    suite.add("a load below an expand-down segment is #GP", P32, |g| {
        g.segment(index::DS, selector::EXPAND_DOWN);
        g.run(|a| a.mov(eax, dword_ptr(edi - 1)))?.gp0()
    });
    suite.add("a load inside an expand-down segment works", P32, |g| {
        g.segment(index::DS, selector::EXPAND_DOWN);
        g.run(|a| a.mov(eax, dword_ptr(edi)))?.done()
    });
    suite.add("a store by CS is #GP", P32, |g| g.run(|a| a.mov(dword_ptr(edi).cs(), eax))?.gp0());
    suite.add("a load by CS works", P32, |g| {
        g.write_u32(place::DATA, 0x42);
        g.run(|a| a.mov(eax, dword_ptr(edi).cs()))?.registers(&[(gpr::RAX, 0x42)])
    });
    suite.add("a load by a null segment is #GP", P32, |g| {
        g.state.segments.seg[index::FS] = Segment::unusable(0);
        g.run(|a| a.mov(eax, dword_ptr(edi).fs()))?.gp0()
    });
    suite.add("PUSH beyond the limit of SS is #SS", P32, |g| {
        g.state.segments.seg[index::SS].limit = 0x7fff;
        g.state.segments.seg[index::SS].attributes &= !attr::G;
        // The handler needs a stack; #SS switches none at CPL 0, so it is a double fault and a shutdown in
        // protected mode. Compatibility mode has an interrupt stack.
        if g.mode == Mode::Compat {
            g.gate_ist(vector::SS, 1);
            return g.run(|a| a.push(eax))?.fault_code(vector::SS, 0);
        }
        g.run(|a| a.push(eax))?.shutdown()
    });
    suite.add("a load by EBP beyond the limit of SS is #SS", P32, |g| {
        g.state.segments.seg[index::SS].limit = 0xffff;
        g.state.segments.seg[index::SS].attributes &= !attr::G;
        g.state.gpr[gpr::RBP] = 0x1_0000;
        g.run(|a| a.mov(eax, dword_ptr(ebp)))?.fault_code(vector::SS, 0)
    });
    suite.add("64-bit mode knows no limits", WIDE, |g| {
        for n in [index::DS, index::ES, index::SS] {
            g.state.segments.seg[n].limit = 0xfff;
            g.state.segments.seg[n].attributes &= !attr::G;
        }
        g.run(|a| {
            a.mov(rax, qword_ptr(rdi))?;
            a.push(rax)
        })?
        .done()
    });
    suite.add("code that runs beyond the limit of CS is #GP", &[Mode::Protected], |g| {
        let end_of_code = place::CODE as u32 + 3;
        let kind = attr::S | attr::P | attr::CODE | attr::WRITABLE | attr::DB;
        g.descriptor(selector::FREE, descriptor(0, end_of_code, kind));
        g.segment(index::CS, selector::FREE);
        g.run(|a| {
            a.nop()?;
            a.nop()?;
            a.nop()?;
            a.nop()?;
            a.nop()
        })?
        .fault_at(4, vector::GP, Some(0))
    });
    suite.add("a jump beyond the limit of CS is #GP at the jump", &[Mode::Protected], |g| {
        let kind = attr::S | attr::P | attr::CODE | attr::WRITABLE | attr::DB;
        g.descriptor(selector::FREE, descriptor(0, place::CODE as u32 + 0xff, kind));
        g.segment(index::CS, selector::FREE);
        g.state.gpr[gpr::RAX] = place::CODE + 0x100;
        g.run(|a| a.jmp(eax))?.gp0()
    });
}

/// Name, segment register's number in the encoding (ES 0, SS 2, DS 3, FS 4), selector, and what a load of it
/// raises: vector and error code.
type Load = (&'static str, u8, u16, Option<(u8, u32)>);

fn loads(suite: &mut Suite) {
    const KERNEL: &[Mode] = &[Mode::Protected, Mode::Compat, Mode::Long];
    let rows: &[Load] = &[
        ("DS: data", 3, selector::DATA, None),
        ("DS: user data", 3, selector::USER_DATA, None),
        ("DS: readable code", 3, selector::CODE32, None),
        ("DS: null", 3, 0, None),
        ("DS: null with RPL 3", 3, 3, None),
        ("DS: execute-only code", 3, selector::EXECUTE_ONLY, Some((vector::GP, selector::EXECUTE_ONLY as u32))),
        ("DS: absent data", 3, selector::ABSENT_DATA, Some((vector::NP, selector::ABSENT_DATA as u32))),
        ("DS: a TSS", 3, selector::TSS, Some((vector::GP, selector::TSS as u32))),
        ("DS: beyond the GDT", 3, 0x4f8, Some((vector::GP, 0x4f8))),
        ("DS: RPL 3 of a kernel segment", 3, selector::DATA | 3, Some((vector::GP, selector::DATA as u32))),
        ("DS: the LDT when there is none", 3, 0xc, Some((vector::GP, 0xc))),
        ("FS: data", 4, selector::DATA, None),
        ("SS: data", 2, selector::DATA, None),
        ("SS: user data", 2, selector::USER_DATA, Some((vector::GP, (selector::USER_DATA & !3) as u32))),
        ("SS: read-only data", 2, selector::READ_ONLY, Some((vector::GP, selector::READ_ONLY as u32))),
        ("SS: code", 2, selector::CODE32, Some((vector::GP, selector::CODE32 as u32))),
        ("SS: absent data", 2, selector::ABSENT_DATA, Some((vector::SS, selector::ABSENT_DATA as u32))),
        ("SS: RPL 3", 2, selector::DATA | 3, Some((vector::GP, selector::DATA as u32))),
    ];
    for &(name, number, value, raises) in rows {
        suite.add(format!("MOV to {name}"), KERNEL, move |g| {
            g.state.gpr[gpr::RAX] = value.into();
            let end = g.run(|a| a.db(&[0x8e, 0xc0 | number << 3]))?;
            match raises {
                Some((vector, code)) => end.fault_code(vector, code),
                None => {
                    end.done()?;
                    equal("selector", end.state.segments.seg[usize::from(number)].selector, value)
                }
            }
        });
    }
    suite.add("MOV to SS: null in 64-bit mode at CPL 0", &[Mode::Long], |g| g.run(|a| a.db(&[0x8e, 0xd0]))?.done());
    suite.add("MOV to SS: null at CPL 3 or outside 64-bit mode", &[Mode::User, Mode::Compat, Mode::Protected], |g| {
        g.run(|a| a.db(&[0x8e, 0xd0]))?.gp0()
    });
    suite.add("MOV to DS of a kernel segment at CPL 3", &[Mode::ProtectedUser, Mode::User], |g| {
        g.state.gpr[gpr::RAX] = selector::DATA.into();
        g.run(|a| a.db(&[0x8e, 0xd8]))?.fault_code(vector::GP, selector::DATA.into())
    });
    suite.add("a load sets the descriptor's accessed bit", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        let data = if g.mode.is_user() { selector::USER_DATA_2 } else { selector::DATA };
        g.state.gpr[gpr::RAX] = data.into();
        g.run(|a| a.db(&[0x8e, 0xe0]))?.done()?;
        equal("type", g.read_u64(place::GDT + u64::from(data & !7)) >> 40 & 0xf, 3)
    });
    suite.add("a load fills in base, limit and attributes", &[Mode::Protected, Mode::Long, Mode::Compat], |g| {
        let kind = attr::S | attr::P | attr::WRITABLE | attr::DB | attr::AVL;
        g.descriptor(selector::FREE, descriptor(0x12_3456, 0x789ab, kind));
        g.state.gpr[gpr::RAX] = selector::FREE.into();
        let end = g.run(|a| a.db(&[0x8e, 0xe8]))?;
        end.done()?;
        let gs_now = end.state.segments.seg[index::GS];
        let expected =
            Segment { base: 0x12_3456, limit: 0x789ab, attributes: kind | attr::ACCESSED, selector: selector::FREE };
        equal("GS", gs_now, expected)
    });
    suite.add("a segment from the LDT", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        let kind = attr::S | attr::P | attr::WRITABLE | attr::DB | 3 << attr::DPL_SHIFT;
        g.state.segments.ldtr = g.cached(selector::LDT);
        g.write_u64(place::LDT + 8, descriptor(0x7_0000, 0xffff, kind));
        g.state.gpr[gpr::RAX] = 0xf;
        let end = g.run(|a| a.db(&[0x8e, 0xe8]))?;
        end.done()?;
        equal(
            "GS",
            (end.state.segments.seg[index::GS].base, end.state.segments.seg[index::GS].selector),
            (0x7_0000, 0xf),
        )
    });
    suite.add("PUSH and POP of FS", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        let data = if g.mode.is_user() { selector::USER_DATA_2 } else { selector::READ_ONLY };
        g.state.gpr[gpr::RAX] = data.into();
        let end = g.run(|a| {
            a.db(&[0x50])?;
            a.db(&[0x0f, 0xa1])?;
            a.db(&[0x0f, 0xa0])?;
            a.db(&[0x5b])
        })?;
        end.registers(&[(gpr::RBX, data.into()), (gpr::RSP, place::STACK)])?;
        equal("FS", end.state.segments.seg[index::FS].selector, data)
    });
    suite.add("LFS loads a far pointer", &[Mode::Protected, Mode::Compat, Mode::Long], |g| {
        g.write_u32(place::DATA, 0x1234_5678);
        g.write(place::DATA + 4, &selector::DATA.to_le_bytes());
        let end = g.run(|a| a.db(&[0x0f, 0xb4, 0x07]))?;
        end.registers(&[(gpr::RAX, 0x1234_5678)])?;
        equal("FS", end.state.segments.seg[index::FS].selector, selector::DATA)
    });
    suite.add("a load in real mode sets base = 16 × selector", &[Mode::Real, Mode::Vm86], |g| {
        g.state.gpr[gpr::RAX] = 0x1234;
        let end = g.run(|a| a.mov(fs, ax))?;
        end.done()?;
        let fs_now = end.state.segments.seg[index::FS];
        equal("FS", (fs_now.selector, fs_now.base, fs_now.limit), (0x1234, 0x1_2340, 0xffff))
    });
}

fn bases(suite: &mut Suite) {
    suite.add("64-bit mode ignores the bases of DS, ES and SS", WIDE, |g| {
        for n in [index::DS, index::ES, index::SS] {
            g.state.segments.seg[n].base = 0x1000;
        }
        g.write_u64(place::DATA, 0x42);
        g.run(|a| a.mov(rax, qword_ptr(rdi)))?.registers(&[(gpr::RAX, 0x42)])
    });
    suite.add("64-bit mode uses the bases of FS and GS", WIDE, |g| {
        g.state.segments.seg[index::FS].base = 0x1000;
        g.state.segments.seg[index::GS].base = 0u64.wrapping_sub(0x1000);
        g.write_u64(place::DATA + 0x1000, 0x42);
        g.write_u64(place::DATA + 0x2000, 0x43);
        let end = g.run(|a| {
            a.mov(rax, qword_ptr(rdi).fs())?;
            a.mov(rbx, qword_ptr(rdi + 0x3000).gs())
        })?;
        end.registers(&[(gpr::RAX, 0x42), (gpr::RBX, 0x43)])
    });
    suite.add("32-bit code adds bases and wraps at 4 GiB", &[Mode::Protected, Mode::Compat, Mode::CompatUser], |g| {
        g.state.segments.seg[index::ES].base = 0xffff_f000;
        g.write_u32(place::DATA, 0x42);
        g.run(|a| a.mov(eax, dword_ptr(edi + 0x1000).es()))?.registers(&[(gpr::RAX, 0x42)])
    });
    suite.add("an address size of 32 bits wraps in 64-bit mode", WIDE, |g| {
        g.state.gpr[gpr::RDI] = 0xffff_ffff_0000_0000 | place::DATA;
        g.write_u64(place::DATA, 0x42);
        g.run(|a| a.mov(rax, qword_ptr(edi)))?.registers(&[(gpr::RAX, 0x42)])
    });
    suite.add("a segment limit beyond 64 KiB survives the return to real mode", &[Mode::Real], |g| {
        // "Big real mode": what boot loaders rely on.
        g.state.segments.seg[index::FS].limit = 0xffff_ffff;
        g.state.segments.seg[index::FS].attributes |= attr::G;
        g.write_u32(place::BIG_PAGE, 0x1234_5678);
        g.state.gpr[gpr::RDI] = place::BIG_PAGE;
        g.run(|a| a.mov(eax, dword_ptr(edi).fs()))?.registers(&[(gpr::RAX, 0x1234_5678)])
    });
    suite.add("16-bit protected code addresses by BX and SI", &[Mode::Protected], |g| {
        g.segment(index::CS, selector::CODE16);
        g.state.rip = 0;
        g.write(place::DATA + 0x34, &[0x55]);
        g.state.segments.seg[index::DS].base = place::DATA;
        (g.state.gpr[gpr::RBX], g.state.gpr[gpr::RSI]) = (0xffff_0030, 0xffff_0004);
        // mov al, [bx + si]
        let end = g.run(|a| a.db(&[0x8a, 0x00]))?;
        equal("ended", end.ended, true)?;
        equal("AL", end.gpr(gpr::RAX), 0x55)
    });
}

fn tables(suite: &mut Suite) {
    suite.add("LGDT and SGDT, LIDT and SIDT", &[Mode::Long], |g| {
        g.write(place::DATA, &[0x34, 0x12, 0, 0, 7, 0, 0, 0x80, 0xff, 0xff]);
        let end = g.run(|a| {
            a.sgdt(tword_ptr(rdi + 0x20))?;
            a.lidt(tword_ptr(rdi))?;
            a.sidt(tword_ptr(rdi + 0x40))
        })?;
        end.done()?;
        let gdt = [g.read(place::DATA + 0x20, 2), g.read(place::DATA + 0x22, 8)].concat();
        equal("GDTR", gdt, [selector::LIMIT.to_le_bytes().to_vec(), place::GDT.to_le_bytes().to_vec()].concat())?;
        equal("IDTR as stored", g.read(place::DATA + 0x40, 10), g.read(place::DATA, 10))?;
        equal("IDTR", (end.state.idtr.base, end.state.idtr.limit), (0xffff_8000_0007_0000, 0x1234))
    });
    suite.add("LGDT with 16-bit operands takes 24 bits of base", &[Mode::Real, Mode::Protected], |g| {
        g.write(place::DATA, &[0xff, 0, 0x00, 0x60, 0x00, 0x77]);
        let end = g.run(|a| {
            let code: &[u8] = if a.bitness() == 16 { &[0x0f, 0x01, 0x15] } else { &[0x66, 0x0f, 0x01, 0x17] };
            a.db(code)
        })?;
        end.done()?;
        equal("GDTR", (end.state.gdtr.base, end.state.gdtr.limit), (0x6000, 0xff))
    });
    suite.add("LGDT of a non-canonical base is #GP", &[Mode::Long], |g| {
        g.write(place::DATA, &[0x34, 0x12, 0, 0, 0, 0, 0, 0x80, 0, 0]);
        g.run(|a| a.lgdt(tword_ptr(rdi)))?.gp0()
    });
    suite.add("LLDT and SLDT", &[Mode::Protected, Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = selector::LDT.into();
        let end = g.run(|a| {
            a.lldt(ax)?;
            a.sldt(ebx)
        })?;
        end.registers(&[(gpr::RBX, selector::LDT.into())])?;
        equal("LDTR", (end.state.segments.ldtr.base, end.state.segments.ldtr.limit), (place::LDT, 0xff))
    });
    suite.add("LLDT of a null selector", &[Mode::Protected, Mode::Long], |g| {
        g.state.segments.ldtr = g.cached(selector::LDT);
        let end = g.run(|a| a.lldt(ax))?;
        end.done()?;
        ensure(!end.state.segments.ldtr.is_usable(), || "LDTR is still usable".to_owned())
    });
    suite.add("LLDT of a data segment is #GP of it", &[Mode::Protected, Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = selector::DATA.into();
        g.run(|a| a.lldt(ax))?.fault_code(vector::GP, selector::DATA.into())
    });
    suite.add("LTR and STR, and the TSS becomes busy", &[Mode::Protected, Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = selector::FREE_TSS.into();
        let end = g.run(|a| {
            a.ltr(ax)?;
            a.str(ebx)
        })?;
        end.registers(&[(gpr::RBX, selector::FREE_TSS.into())])?;
        equal("type in the GDT", g.read_u64(place::GDT + u64::from(selector::FREE_TSS)) >> 40 & 0xf, 0xb)
    });
    suite.add("LTR of a busy TSS is #GP of it", &[Mode::Protected, Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = selector::TSS.into();
        g.run(|a| a.ltr(ax))?.fault_code(vector::GP, selector::TSS.into())
    });
    suite.add("LTR of an absent TSS is #NP of it", &[Mode::Protected, Mode::Long], |g| {
        g.descriptor(selector::FREE, descriptor(place::TSS, 0x67, 9));
        g.state.gpr[gpr::RAX] = selector::FREE.into();
        g.run(|a| a.ltr(ax))?.fault_code(vector::NP, selector::FREE.into())
    });
    suite.add("LTR of a null selector is #GP", &[Mode::Protected, Mode::Long], |g| g.run(|a| a.ltr(ax))?.gp0());
}

/// LAR, LSL, VERR, VERW, ARPL.
fn queries(suite: &mut Suite) {
    const MODES: &[Mode] = &[Mode::Protected, Mode::ProtectedUser, Mode::Long, Mode::User];
    suite.add("LAR of a segment that may be used", MODES, |g| {
        g.state.gpr[gpr::RAX] = selector::USER_DATA.into();
        g.write_u64(place::GDT + u64::from(selector::USER_DATA & !7), descriptor(0, 0xf_ffff, 0xc0f3));
        let end = g.run(|a| a.lar(ebx, eax))?;
        end.done()?;
        // Bits 19:16 are undefined (SDM vol. 2A LAR).
        equal("RBX", end.gpr(gpr::RBX) & !0xf_0000, 0x00c0_f300)?;
        end.flags(rflags::ZF, rflags::ZF)
    });
    suite.add("LAR of a segment that may not be used clears ZF", MODES, |g| {
        g.state.rflags |= rflags::ZF;
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RBX]) = (0x4f8, 7);
        let end = g.run(|a| a.lar(ebx, eax))?;
        end.registers(&[(gpr::RBX, 7)])?;
        end.flags(rflags::ZF, 0)
    });
    suite.add("LAR of a kernel segment at CPL 3 clears ZF", &[Mode::ProtectedUser, Mode::User], |g| {
        g.state.gpr[gpr::RAX] = selector::DATA.into();
        g.state.rflags |= rflags::ZF;
        g.run(|a| a.lar(ebx, eax))?.flags(rflags::ZF, 0)
    });
    suite.add("LSL scales by the granularity", MODES, |g| {
        g.state.gpr[gpr::RAX] = selector::USER_DATA.into();
        let end = g.run(|a| a.lsl(ebx, eax))?;
        end.registers(&[(gpr::RBX, 0xffff_ffff)])?;
        end.flags(rflags::ZF, rflags::ZF)
    });
    suite.add("LSL of a small segment", MODES, |g| {
        g.state.gpr[gpr::RAX] = u64::from(selector::SMALL | 3);
        g.run(|a| a.lsl(ebx, eax))?.registers(&[(gpr::RBX, 0xfff)])
    });
    suite.add("VERR and VERW", MODES, |g| {
        g.state.gpr[gpr::RAX] = selector::USER_DATA.into();
        g.state.gpr[gpr::RBX] = selector::USER_CODE32.into();
        let end = g.run(|a| {
            a.verr(ax)?;
            a.setz(cl)?;
            a.verw(ax)?;
            a.setz(dl)?;
            a.verw(bx)?;
            a.setz(al)?;
            a.movzx(eax, al)
        })?;
        end.registers(&[(gpr::RCX, 1), (gpr::RDX, 1), (gpr::RAX, 0)])
    });
    suite.add("ARPL", &[Mode::Protected, Mode::ProtectedUser, Mode::CompatUser], |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RBX]) = (0x10, 3);
        // arpl ax, bx
        let end = g.run(|a| a.db(&[0x63, 0xd8]))?;
        end.registers(&[(gpr::RAX, 0x13)])?;
        end.flags(rflags::ZF, rflags::ZF)
    });
}
