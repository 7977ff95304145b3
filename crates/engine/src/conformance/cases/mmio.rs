//! Memory that is not RAM: loads, stores, read-modify-write, string instructions, and accesses that are
//! partly RAM. RSI is at [`place::MMIO`], RDI in RAM.

use super::prelude::*;

const WIDE_AND_FLAT: &[Mode] = &[Mode::Protected, Mode::Compat, Mode::Long, Mode::User];

pub fn add(suite: &mut Suite) {
    loads_and_stores(suite.group("MMIO"));
    widths_of_64(suite);
    read_modify_write(suite);
    strings(suite);
    crossings(suite);
    vectors(suite);
    stack_and_jumps(suite);
}

const fn read(offset: u64, size: usize) -> Access {
    Access::Read { gpa: place::MMIO + offset, size }
}

const fn write(offset: u64, size: usize, value: u64) -> Access {
    Access::Write { gpa: place::MMIO + offset, size, value }
}

fn loads_and_stores(suite: &mut Suite) {
    suite.add("loads of 1, 2 and 4 bytes", WIDE_AND_FLAT, |g| {
        g.io.answer(&[0x11, 0x2222, 0x3333_3333]);
        let end = g.run(|a| {
            a.mov(al, byte_ptr(esi))?;
            a.mov(bx, word_ptr(esi + 2))?;
            a.mov(ecx, dword_ptr(esi + 4))
        })?;
        end.registers(&[(gpr::RAX, 0x11), (gpr::RBX, 0x2222), (gpr::RCX, 0x3333_3333)])?;
        end.saw(&[read(0, 1), read(2, 2), read(4, 4)])
    });
    suite.add("stores of 1, 2 and 4 bytes", WIDE_AND_FLAT, |g| {
        g.state.gpr[gpr::RAX] = 0x8765_4321;
        let end = g.run(|a| {
            a.mov(byte_ptr(esi), al)?;
            a.mov(word_ptr(esi + 2), ax)?;
            a.mov(dword_ptr(esi + 4), eax)
        })?;
        end.done()?;
        end.saw(&[write(0, 1, 0x21), write(2, 2, 0x4321), write(4, 4, 0x8765_4321)])
    });
    suite.add("stores of immediates", WIDE_AND_FLAT, |g| {
        let end = g.run(|a| {
            a.mov(byte_ptr(esi), 0x12)?;
            a.mov(word_ptr(esi), 0x1234)?;
            a.mov(dword_ptr(esi), 0x1234_5678)
        })?;
        end.done()?;
        end.saw(&[write(0, 1, 0x12), write(0, 2, 0x1234), write(0, 4, 0x1234_5678)])
    });
    suite.add("a high byte register", WIDE_AND_FLAT, |g| {
        g.state.gpr[gpr::RAX] = 0x1234;
        g.io.answer(&[0x99]);
        let end = g.run(|a| {
            a.mov(byte_ptr(esi), ah)?;
            a.mov(bh, byte_ptr(esi))
        })?;
        end.registers(&[(gpr::RBX, 0x9900)])?;
        end.saw(&[write(0, 1, 0x12), read(0, 1)])
    });
    suite.add("MOVZX and MOVSX", WIDE_AND_FLAT, |g| {
        g.io.answer(&[0x80, 0x80, 0x8000]);
        let end = g.run(|a| {
            a.movzx(eax, byte_ptr(esi))?;
            a.movsx(ebx, byte_ptr(esi))?;
            a.movsx(ecx, word_ptr(esi))
        })?;
        end.registers(&[(gpr::RAX, 0x80), (gpr::RBX, 0xffff_ff80), (gpr::RCX, 0xffff_8000)])?;
        end.saw(&[read(0, 1), read(0, 1), read(0, 2)])
    });
    suite.add("an address that nobody answers reads as ones", WIDE_AND_FLAT, |g| {
        g.run(|a| a.mov(eax, dword_ptr(esi)))?.registers(&[(gpr::RAX, 0xffff_ffff)])
    });
    suite.add("moffs forms", &[Mode::Protected, Mode::Compat], |g| {
        g.io.answer(&[0x44]);
        let end = g.run(|a| {
            // mov al, [0xa0010]; mov [0xa0020], eax
            a.db(&[0xa0, 0x10, 0, 0x0a, 0])?;
            a.db(&[0xa3, 0x20, 0, 0x0a, 0])
        })?;
        end.registers(&[(gpr::RAX, 0x44)])?;
        end.saw(&[read(0x10, 1), write(0x20, 4, 0x44)])
    });
    suite.add("loads and stores by a segment", &[Mode::Real], |g| {
        g.state.gpr[gpr::RAX] = 0x4321;
        g.io.answer(&[0x5555]);
        let end = g.run(|a| {
            a.mov(word_ptr(si).es(), ax)?;
            a.mov(bx, word_ptr(si + 8).es())
        })?;
        end.registers(&[(gpr::RBX, 0x5555)])?;
        end.saw(&[write(0, 2, 0x4321), read(8, 2)])
    });
    suite.add("CMP, TEST and BT only read", WIDE_AND_FLAT, |g| {
        g.io.answer(&[5, 4, 8]);
        let end = g.run(|a| {
            a.cmp(dword_ptr(esi), 5)?;
            a.setz(al)?;
            a.test(byte_ptr(esi), 4)?;
            a.setz(bl)?;
            a.bt(dword_ptr(esi), 3)?;
            a.setb(cl)
        })?;
        end.registers(&[(gpr::RAX, 1), (gpr::RBX, 0), (gpr::RCX, 1)])?;
        end.saw(&[read(0, 4), read(0, 1), read(0, 4)])
    });
    suite.add("arithmetic with a memory source", WIDE_AND_FLAT, |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RBX]) = (10, 0xff);
        g.io.answer(&[32, 0x0f]);
        let end = g.run(|a| {
            a.add(eax, dword_ptr(esi))?;
            a.and(bl, byte_ptr(esi))
        })?;
        end.registers(&[(gpr::RAX, 42), (gpr::RBX, 0x0f)])?;
        end.saw(&[read(0, 4), read(0, 1)])
    });
}

fn widths_of_64(suite: &mut Suite) {
    suite.add("loads and stores of 8 bytes", WIDE, |g| {
        g.state.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
        g.io.answer(&[0x8877_6655_4433_2211]);
        let end = g.run(|a| {
            a.mov(qword_ptr(rsi), rax)?;
            a.mov(rbx, qword_ptr(rsi + 8))
        })?;
        end.registers(&[(gpr::RBX, 0x8877_6655_4433_2211)])?;
        end.saw(&[write(0, 8, 0x1122_3344_5566_7788), read(8, 8)])
    });
    suite.add("a sign-extended immediate of 8 bytes", WIDE, |g| {
        g.run(|a| a.mov(qword_ptr(rsi), -2))?.saw(&[write(0, 8, 0xffff_ffff_ffff_fffe)])
    });
    suite.add("MOVSXD", WIDE, |g| {
        g.io.answer(&[0x8000_0000]);
        let end = g.run(|a| a.movsxd(rax, dword_ptr(rsi)))?;
        end.registers(&[(gpr::RAX, 0xffff_ffff_8000_0000)])?;
        end.saw(&[read(0, 4)])
    });
    suite.add("MOVNTI", WIDE, |g| {
        g.state.gpr[gpr::RAX] = 7;
        g.run(|a| a.movnti(qword_ptr(rsi), rax))?.saw(&[write(0, 8, 7)])
    });
    suite
        .add("MOVBE", WIDE, |g| {
            g.state.gpr[gpr::RAX] = 0x1122_3344;
            g.run(|a| a.movbe(dword_ptr(rsi), eax))?.saw(&[write(0, 4, 0x4433_2211)])
        })
        .needs(&[Need::MOVBE]);
    suite.add("registers R8 to R15", WIDE, |g| {
        (g.state.gpr[gpr::R14], g.state.gpr[gpr::R9]) = (place::MMIO, 0x77);
        g.io.answer(&[0x1234]);
        let end = g.run(|a| {
            a.mov(byte_ptr(r14 + 1), r9b)?;
            a.mov(r15, qword_ptr(r14))
        })?;
        end.registers(&[(gpr::R15, 0x1234)])?;
        end.saw(&[write(1, 1, 0x77), read(0, 8)])
    });
    suite.add("an unaligned access within a page is one access", WIDE, |g| {
        g.io.answer(&[1, 2]);
        let end = g.run(|a| {
            a.mov(rax, qword_ptr(rsi + 3))?;
            a.mov(ebx, dword_ptr(rsi + 1))
        })?;
        end.registers(&[(gpr::RAX, 1), (gpr::RBX, 2)])?;
        end.saw(&[read(3, 8), read(1, 4)])
    });
    suite.add("addresses above RAM", WIDE, |g| {
        g.state.gpr[gpr::RSI] = 0x1000_0000;
        g.io.answer(&[0x77]);
        let end = g.run(|a| {
            a.mov(dword_ptr(rsi), esi)?;
            a.mov(eax, dword_ptr(rsi))
        })?;
        end.registers(&[(gpr::RAX, 0x77)])?;
        end.saw(&[
            Access::Write { gpa: 0x1000_0000, size: 4, value: 0x1000_0000 },
            Access::Read { gpa: 0x1000_0000, size: 4 },
        ])
    });
    suite.add("addresses above 4 GiB", WIDE, |g| {
        g.map(place::MORE_CODE, 0x2_1234_5000 | page::ALL);
        g.state.gpr[gpr::RSI] = place::MORE_CODE;
        g.io.answer(&[0x99]);
        let end = g.run(|a| a.mov(rax, qword_ptr(rsi + 0x18)))?;
        end.registers(&[(gpr::RAX, 0x99)])?;
        end.saw(&[Access::Read { gpa: 0x2_1234_5018, size: 8 }])
    });
}

fn read_modify_write(suite: &mut Suite) {
    suite.add("ADD, OR, AND, XOR, SUB to memory", WIDE_AND_FLAT, |g| {
        g.state.gpr[gpr::RAX] = 0x0f;
        g.io.answer(&[1, 0x30, 0xff, 0xff, 0x10]);
        let end = g.run(|a| {
            a.add(dword_ptr(esi), eax)?;
            a.or(dword_ptr(esi), eax)?;
            a.and(dword_ptr(esi), eax)?;
            a.xor(dword_ptr(esi), eax)?;
            a.sub(dword_ptr(esi), eax)
        })?;
        end.done()?;
        let values = [0x10, 0x3f, 0x0f, 0xf0, 1];
        let expected: Vec<Access> = values.iter().flat_map(|&value| [read(0, 4), write(0, 4, value)]).collect();
        end.saw(&expected)
    });
    suite.add("INC, DEC, NOT, NEG of memory", WIDE_AND_FLAT, |g| {
        g.io.answer(&[1, 1, 1, 1]);
        let end = g.run(|a| {
            a.inc(byte_ptr(esi))?;
            a.dec(byte_ptr(esi))?;
            a.not(byte_ptr(esi))?;
            a.neg(byte_ptr(esi))
        })?;
        end.done()?;
        let values = [2, 0, 0xfe, 0xff];
        let expected: Vec<Access> = values.iter().flat_map(|&value| [read(0, 1), write(0, 1, value)]).collect();
        end.saw(&expected)
    });
    suite.add("BTS, BTR and BTC of memory", WIDE_AND_FLAT, |g| {
        g.io.answer(&[0, 0xff, 0x0f]);
        let end = g.run(|a| {
            a.bts(dword_ptr(esi), 4)?;
            a.btr(dword_ptr(esi), 4)?;
            a.btc(dword_ptr(esi), 4)
        })?;
        end.done()?;
        end.saw(&[read(0, 4), write(0, 4, 0x10), read(0, 4), write(0, 4, 0xef), read(0, 4), write(0, 4, 0x1f)])
    });
    suite.add("SHL, SAR and ROL of memory", WIDE_AND_FLAT, |g| {
        g.io.answer(&[1, 0x80, 0x8001]);
        let end = g.run(|a| {
            a.shl(dword_ptr(esi), 4)?;
            a.sar(byte_ptr(esi), 1)?;
            a.rol(word_ptr(esi), 1)
        })?;
        end.done()?;
        end.saw(&[read(0, 4), write(0, 4, 0x10), read(0, 1), write(0, 1, 0xc0), read(0, 2), write(0, 2, 3)])
    });
    suite.add("flags of an ADD to memory", WIDE_AND_FLAT, |g| {
        g.io.answer(&[0xff]);
        let end = g.run(|a| a.add(byte_ptr(esi), 1))?;
        end.done()?;
        end.flags(rflags::STATUS, rflags::CF | rflags::ZF | rflags::AF | rflags::PF)
    });
    suite.add("LOCK ADD, LOCK XADD, LOCK INC", WIDE_AND_FLAT, |g| {
        g.state.gpr[gpr::RAX] = 2;
        g.io.answer(&[5, 6, 7]);
        let end = g.run(|a| {
            a.lock().add(dword_ptr(esi), eax)?;
            a.lock().xadd(dword_ptr(esi), eax)?;
            a.lock().inc(dword_ptr(esi))
        })?;
        end.registers(&[(gpr::RAX, 6)])?;
        end.saw(&[read(0, 4), write(0, 4, 7), read(0, 4), write(0, 4, 8), read(0, 4), write(0, 4, 8)])
    });
    suite.add("XCHG", WIDE_AND_FLAT, |g| {
        g.state.gpr[gpr::RAX] = 0x1234;
        g.io.answer(&[0x5678]);
        let end = g.run(|a| a.xchg(dword_ptr(esi), eax))?;
        end.registers(&[(gpr::RAX, 0x5678)])?;
        end.saw(&[read(0, 4), write(0, 4, 0x1234)])
    });
    suite.add("CMPXCHG that matches", WIDE_AND_FLAT, |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RBX]) = (5, 9);
        g.io.answer(&[5]);
        let end = g.run(|a| a.lock().cmpxchg(dword_ptr(esi), ebx))?;
        end.registers(&[(gpr::RAX, 5)])?;
        end.flags(rflags::ZF, rflags::ZF)?;
        end.saw(&[read(0, 4), write(0, 4, 9)])
    });
    // The processor may write the old value back (SDM vol. 2A CMPXCHG): the log is not compared.
    suite.add("CMPXCHG that does not match", WIDE_AND_FLAT, |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RBX]) = (5, 9);
        g.io.answer(&[6]);
        let end = g.run(|a| a.cmpxchg(dword_ptr(esi), ebx))?;
        end.registers(&[(gpr::RAX, 6)])?;
        end.flags(rflags::ZF, 0)?;
        ensure(!end.log.contains(&write(0, 4, 9)), || "the new value was written".to_owned())
    });
    suite.add("ADD of 8 bytes", WIDE, |g| {
        g.state.gpr[gpr::RAX] = 0x1_0000_0000;
        g.io.answer(&[1]);
        g.run(|a| a.add(qword_ptr(rsi), rax))?.saw(&[read(0, 8), write(0, 8, 0x1_0000_0001)])
    });
}

fn strings(suite: &mut Suite) {
    suite.add("REP MOVSB from RAM", WIDE_AND_FLAT, |g| {
        (g.state.gpr[gpr::RSI], g.state.gpr[gpr::RDI], g.state.gpr[gpr::RCX]) = (place::DATA, place::MMIO, 3);
        g.write(place::DATA, &[1, 2, 3]);
        let end = g.run(|a| a.rep().movsb())?;
        end.registers(&[(gpr::RCX, 0), (gpr::RSI, place::DATA + 3), (gpr::RDI, place::MMIO + 3)])?;
        end.saw(&[write(0, 1, 1), write(1, 1, 2), write(2, 1, 3)])
    });
    suite.add("REP MOVSD to RAM", WIDE_AND_FLAT, |g| {
        g.state.gpr[gpr::RCX] = 2;
        g.io.answer(&[0x1111_1111, 0x2222_2222]);
        let end = g.run(|a| a.rep().movsd())?;
        end.registers(&[(gpr::RCX, 0), (gpr::RSI, place::MMIO + 8), (gpr::RDI, place::DATA + 8)])?;
        equal("memory", g.read_u64(place::DATA), 0x2222_2222_1111_1111)?;
        end.saw(&[read(0, 4), read(4, 4)])
    });
    suite.add("MOVSW between devices", WIDE_AND_FLAT, |g| {
        g.state.gpr[gpr::RDI] = place::MMIO + 0x100;
        g.io.answer(&[0x1234]);
        g.run(|a| a.movsw())?.saw(&[read(0, 2), write(0x100, 2, 0x1234)])
    });
    suite.add("REP STOSW", WIDE_AND_FLAT, |g| {
        (g.state.gpr[gpr::RDI], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RAX]) = (place::MMIO, 3, 0xabcd);
        let end = g.run(|a| a.rep().stosw())?;
        end.registers(&[(gpr::RCX, 0), (gpr::RDI, place::MMIO + 6)])?;
        end.saw(&[write(0, 2, 0xabcd), write(2, 2, 0xabcd), write(4, 2, 0xabcd)])
    });
    suite.add("LODSB and LODSD", WIDE_AND_FLAT, |g| {
        g.io.answer(&[0x12, 0x3456_789a]);
        let end = g.run(|a| {
            a.lodsb()?;
            a.mov(bl, al)?;
            a.lodsd()
        })?;
        end.registers(&[(gpr::RBX, 0x12), (gpr::RAX, 0x3456_789a), (gpr::RSI, place::MMIO + 5)])?;
        end.saw(&[read(0, 1), read(1, 4)])
    });
    suite.add("REPNE SCASB stops at the match", WIDE_AND_FLAT, |g| {
        (g.state.gpr[gpr::RDI], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RAX]) = (place::MMIO, 10, 3);
        g.io.answer(&[1, 2, 3]);
        let end = g.run(|a| a.repne().scasb())?;
        end.registers(&[(gpr::RCX, 7), (gpr::RDI, place::MMIO + 3)])?;
        end.flags(rflags::ZF, rflags::ZF)?;
        end.saw(&[read(0, 1), read(1, 1), read(2, 1)])
    });
    suite.add("CMPSB compares RAM with a device", WIDE_AND_FLAT, |g| {
        g.write(place::DATA, &[5]);
        g.io.answer(&[5]);
        let end = g.run(|a| a.cmpsb())?;
        end.done()?;
        end.flags(rflags::ZF, rflags::ZF)?;
        end.saw(&[read(0, 1)])
    });
    suite.add("MOVSQ", WIDE, |g| {
        g.io.answer(&[0x1122_3344_5566_7788]);
        let end = g.run(|a| a.movsq())?;
        end.done()?;
        equal("memory", g.read_u64(place::DATA), 0x1122_3344_5566_7788)?;
        end.saw(&[read(0, 8)])
    });
    suite.add("REP MOVSB that runs from RAM into a device", &[Mode::Protected, Mode::Long], |g| {
        (g.state.gpr[gpr::RSI], g.state.gpr[gpr::RDI], g.state.gpr[gpr::RCX]) = (place::DATA, place::MMIO - 2, 4);
        g.write(place::DATA, &[1, 2, 3, 4]);
        let end = g.run(|a| a.rep().movsb())?;
        end.registers(&[(gpr::RCX, 0)])?;
        equal("RAM", g.read(place::MMIO - 2, 2), vec![1, 2])?;
        end.saw(&[write(0, 1, 3), write(1, 1, 4)])
    });
    suite.add("REP STOSB with DF", &[Mode::Protected, Mode::Long], |g| {
        (g.state.gpr[gpr::RDI], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RAX]) = (place::MMIO + 1, 2, 9);
        g.state.rflags |= rflags::DF;
        g.run(|a| a.rep().stosb())?.saw(&[write(1, 1, 9), write(0, 1, 9)])
    });
}

/// Accesses that cross a page are split there, in the order of addresses.
fn crossings(suite: &mut Suite) {
    suite.add("a load that starts in RAM", WIDE, |g| {
        g.write(place::MMIO - 4, &[1, 2, 3, 4]);
        g.io.answer(&[0x8765_4321]);
        let end = g.run(|a| a.mov(rax, qword_ptr(rsi - 4)))?;
        end.registers(&[(gpr::RAX, 0x8765_4321_0403_0201)])?;
        end.saw(&[read(0, 4)])
    });
    suite.add("a store that starts in RAM", WIDE, |g| {
        g.state.gpr[gpr::RAX] = 0x8877_6655_4433_2211;
        let end = g.run(|a| a.mov(qword_ptr(rsi - 2), rax))?;
        end.done()?;
        equal("RAM", g.read(place::MMIO - 2, 2), vec![0x11, 0x22])?;
        // Six bytes: in one access or in several, but each byte once and in order.
        let mut bytes = Vec::new();
        for access in &end.log {
            let Access::Write { gpa, size, value } = *access else {
                return equal("accesses", end.log.as_slice(), &[][..]);
            };
            equal("address", gpa, place::MMIO + bytes.len() as u64)?;
            bytes.extend(&value.to_le_bytes()[..size]);
        }
        equal("bytes written", bytes, vec![0x33, 0x44, 0x55, 0x66, 0x77, 0x88])
    });
    suite.add("a load across two pages of devices", WIDE, |g| {
        g.io.answer(&[0x1111_1111, 0x2222_2222]);
        let end = g.run(|a| a.mov(rax, qword_ptr(rsi + 0xffc)))?;
        end.registers(&[(gpr::RAX, 0x2222_2222_1111_1111)])?;
        end.saw(&[read(0xffc, 4), read(0x1000, 4)])
    });
    suite.add("a store across two pages of devices", WIDE, |g| {
        g.state.gpr[gpr::RAX] = 0x2222_2222_1111_1111;
        let end = g.run(|a| a.mov(qword_ptr(rsi + 0xffc), rax))?;
        end.done()?;
        end.saw(&[write(0xffc, 4, 0x1111_1111), write(0x1000, 4, 0x2222_2222)])
    });
    suite.add("a load across two pages that are far apart", WIDE, |g| {
        g.map(place::MORE_CODE, (place::MMIO + 0x5000) | page::ALL);
        g.map(place::MORE_CODE + 0x1000, (place::MMIO + 0x2000) | page::ALL);
        g.state.gpr[gpr::RSI] = place::MORE_CODE + 0xffe;
        g.io.answer(&[0x1111, 0x2222]);
        let end = g.run(|a| a.mov(eax, dword_ptr(rsi)))?;
        end.registers(&[(gpr::RAX, 0x2222_1111)])?;
        end.saw(&[read(0x5ffe, 2), read(0x2000, 2)])
    });
    suite.add("a store whose second page is absent writes nothing", WIDE, |g| {
        g.map(place::MMIO + 0x1000, 0);
        let end = g.run(|a| a.mov(qword_ptr(rsi + 0xffc), rax))?;
        end.page_fault(if g.mode == Mode::User { 6 } else { 2 }, place::MMIO + 0x1000)?;
        end.saw(&[])
    });
    suite.add("a read-modify-write of a read-only page reads nothing", WIDE, |g| {
        g.map(place::MMIO, place::MMIO | page::P | page::U);
        let end = g.run(|a| a.add(dword_ptr(rsi), 1))?;
        end.page_fault(if g.mode == Mode::User { 7 } else { 3 }, place::MMIO)?;
        end.saw(&[])
    });
}

fn vectors(suite: &mut Suite) {
    suite.add("MOVUPS loads 16 bytes", WIDE, |g| {
        g.io.answer(&[0x1111_1111_1111_1111, 0x2222_2222_2222_2222]);
        let end = g.run(|a| {
            a.movups(xmm3, xmmword_ptr(rsi))?;
            a.movups(xmmword_ptr(rdi), xmm3)
        })?;
        end.done()?;
        equal("low", g.read_u64(place::DATA), 0x1111_1111_1111_1111)?;
        equal("high", g.read_u64(place::DATA + 8), 0x2222_2222_2222_2222)?;
        end.saw(&[read(0, 8), read(8, 8)])
    });
    suite.add("MOVDQA stores 16 bytes", WIDE, |g| {
        g.write_u64(place::DATA, 0x3333_3333);
        g.write_u64(place::DATA + 8, 0x4444_4444);
        let end = g.run(|a| {
            a.movdqa(xmm9, xmmword_ptr(rdi))?;
            a.movdqa(xmmword_ptr(rsi), xmm9)
        })?;
        end.done()?;
        end.saw(&[write(0, 8, 0x3333_3333), write(8, 8, 0x4444_4444)])
    });
    suite.add("an SSE instruction that computes", WIDE, |g| {
        g.io.answer(&[u64::from(2.5f32.to_bits())]);
        let end = g.run(|a| {
            a.movss(xmm0, dword_ptr(rsi))?;
            a.cvttss2si(eax, xmm0)
        })?;
        end.registers(&[(gpr::RAX, 2)])?;
        end.saw(&[read(0, 4)])
    });
    suite.add("an x87 load and store", WIDE, |g| {
        g.io.answer(&[1234]);
        let end = g.run(|a| {
            a.fild(qword_ptr(rsi))?;
            a.fistp(dword_ptr(rsi + 8))
        })?;
        end.done()?;
        end.saw(&[read(0, 8), write(8, 4, 1234)])
    });
}

fn stack_and_jumps(suite: &mut Suite) {
    suite.add("PUSH and POP of memory", WIDE, |g| {
        g.io.answer(&[0x1234]);
        let end = g.run(|a| {
            a.push(qword_ptr(rsi))?;
            a.pop(qword_ptr(rsi + 8))
        })?;
        end.registers(&[(gpr::RSP, place::STACK)])?;
        end.saw(&[read(0, 8), write(8, 8, 0x1234)])
    });
    suite.add("CALL through memory", WIDE, |g| {
        g.io.answer(&[place::MORE_CODE]);
        let there = g.user_code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.call(qword_ptr(rsi)))?;
        equal("RIP", end.state.rip, there)?;
        equal("return address", g.read_u64(place::STACK - 8), place::CODE + 2)?;
        end.saw(&[read(0, 8)])
    });
    suite.add("JMP through memory", WIDE, |g| {
        g.io.answer(&[place::MORE_CODE]);
        let there = g.user_code_at(place::MORE_CODE, 64, |a| a.nop())?;
        let end = g.run(|a| a.jmp(qword_ptr(rsi)))?;
        equal("RIP", end.state.rip, there)?;
        end.saw(&[read(0, 8)])
    });
    suite.add("a stack in a device", &[Mode::Long], |g| {
        g.state.gpr[gpr::RSP] = place::MMIO + 0x10;
        g.state.gpr[gpr::RAX] = 0x55;
        g.io.answer(&[0x66]);
        let end = g.run(|a| {
            a.push(rax)?;
            a.pop(rbx)
        })?;
        end.registers(&[(gpr::RBX, 0x66), (gpr::RSP, place::MMIO + 0x10)])?;
        end.saw(&[write(8, 8, 0x55), read(8, 8)])
    });
}
