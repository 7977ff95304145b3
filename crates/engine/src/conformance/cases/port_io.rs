//! Port I/O: IN, OUT and their string forms, of all widths (SDM vol. 1 chapter 19). Privilege is in
//! `exceptions`.

use super::prelude::*;

const KERNEL_MODES: &[Mode] = &[Mode::Real, Mode::Protected, Mode::Compat, Mode::Long];
const FLAT: &[Mode] = &[Mode::Protected, Mode::Compat, Mode::Long];

pub fn add(suite: &mut Suite) {
    single(suite.group("port I/O"));
    strings(suite);
    string_faults(suite);
}

const fn port_in(port: u16, size: usize) -> Access {
    Access::In { port, size }
}

const fn port_out(port: u16, size: usize, value: u64) -> Access {
    Access::Out { port, size, value }
}

fn single(suite: &mut Suite) {
    const RAX: u64 = 0x1111_2222_3333_4444;
    // The upper half of RAX survives outside 64-bit mode too: nothing of less than 32 bits touches it, and 32
    // bits clear it in 64-bit mode only.
    suite.add("IN AL, imm8 changes AL only", &[Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = RAX;
        g.io.answer(&[0x5a]);
        let end = g.run(|a| a.in_(al, 0x60))?;
        end.registers(&[(gpr::RAX, 0x1111_2222_3333_445a)])?;
        end.saw(&[port_in(0x60, 1)])
    });
    suite.add("IN AX, DX changes AX only", &[Mode::Long], |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RDX]) = (RAX, 0x3f8);
        g.io.answer(&[0x5a5b]);
        let end = g.run(|a| a.in_(ax, dx))?;
        end.registers(&[(gpr::RAX, 0x1111_2222_3333_5a5b)])?;
        end.saw(&[port_in(0x3f8, 2)])
    });
    suite.add("IN EAX, DX clears the upper half", &[Mode::Long], |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RDX]) = (RAX, 0xcf8);
        g.io.answer(&[0x8765_4321]);
        let end = g.run(|a| a.in_(eax, dx))?;
        end.registers(&[(gpr::RAX, 0x8765_4321)])?;
        end.saw(&[port_in(0xcf8, 4)])
    });
    suite.add("IN of 1, 2 and 4 bytes", KERNEL_MODES, |g| {
        g.state.gpr[gpr::RDX] = 0x1234;
        g.io.answer(&[0x11, 0x2222, 0x3333_3333]);
        let end = g.run(|a| {
            a.in_(al, dx)?;
            a.mov(bl, al)?;
            a.in_(ax, dx)?;
            a.mov(cx, ax)?;
            a.in_(eax, dx)
        })?;
        end.registers(&[(gpr::RBX, 0x11), (gpr::RCX, 0x2222), (gpr::RAX, 0x3333_3333)])?;
        end.saw(&[port_in(0x1234, 1), port_in(0x1234, 2), port_in(0x1234, 4)])
    });
    suite.add("OUT of 1, 2 and 4 bytes", KERNEL_MODES, |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RDX]) = (0x8765_4321, 0xffff);
        let end = g.run(|a| {
            a.out(0x80, al)?;
            a.out(0x81, ax)?;
            a.out(0x82, eax)?;
            a.out(dx, al)
        })?;
        end.done()?;
        end.saw(&[
            port_out(0x80, 1, 0x21),
            port_out(0x81, 2, 0x4321),
            port_out(0x82, 4, 0x8765_4321),
            port_out(0xffff, 1, 0x21),
        ])
    });
    suite.add("a port that nobody answers reads as ones", KERNEL_MODES, |g| {
        g.run(|a| a.in_(eax, 0x99))?.registers(&[(gpr::RAX, 0xffff_ffff)])
    });
    suite.add("a REX.W prefix does not widen IN", &[Mode::Long], |g| {
        let end = g.run(|a| a.db(&[0x48, 0xe5, 0x99]))?;
        end.registers(&[(gpr::RAX, 0xffff_ffff)])?;
        end.saw(&[port_in(0x99, 4)])
    });
    suite.add("IN and OUT leave the flags alone", KERNEL_MODES, |g| {
        g.state.rflags |= rflags::STATUS;
        let end = g.run(|a| {
            a.in_(al, 0x99)?;
            a.out(0x98, al)
        })?;
        end.done()?;
        end.flags(rflags::STATUS, rflags::STATUS)
    });
}

fn strings(suite: &mut Suite) {
    suite.add("INSB, INSW, INSD store and move RDI", FLAT, |g| {
        g.state.gpr[gpr::RDX] = 0x170;
        g.io.answer(&[0x11, 0x2222, 0x4444_4444]);
        let end = g.run(|a| {
            a.insb()?;
            a.insw()?;
            a.insd()
        })?;
        end.registers(&[(gpr::RDI, place::DATA + 7)])?;
        equal("memory", g.read_u64(place::DATA), 0x44_4444_4422_2211)?;
        end.saw(&[port_in(0x170, 1), port_in(0x170, 2), port_in(0x170, 4)])
    });
    suite.add("OUTSB, OUTSW, OUTSD load and move RSI", FLAT, |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RSI]) = (0x170, place::DATA);
        g.write_u64(place::DATA, 0x44_4444_4422_2211);
        let end = g.run(|a| {
            a.outsb()?;
            a.outsw()?;
            a.outsd()
        })?;
        end.registers(&[(gpr::RSI, place::DATA + 7)])?;
        end.saw(&[port_out(0x170, 1, 0x11), port_out(0x170, 2, 0x2222), port_out(0x170, 4, 0x4444_4444)])
    });
    suite.add("REP INSB counts RCX down to zero", FLAT, |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX]) = (0x170, 5);
        g.io.answer(&[1, 2, 3, 4, 5]);
        let end = g.run(|a| a.rep().insb())?;
        end.registers(&[(gpr::RDI, place::DATA + 5), (gpr::RCX, 0)])?;
        equal("memory", g.read_u64(place::DATA), 0x05_0403_0201)?;
        end.saw(&[port_in(0x170, 1); 5])
    });
    suite.add("REP INSW", FLAT, |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX]) = (0x1f0, 3);
        g.io.answer(&[0x1111, 0x2222, 0x3333]);
        let end = g.run(|a| a.rep().insw())?;
        end.registers(&[(gpr::RDI, place::DATA + 6), (gpr::RCX, 0)])?;
        equal("memory", g.read_u64(place::DATA), 0x3333_2222_1111)?;
        end.saw(&[port_in(0x1f0, 2); 3])
    });
    suite.add("REP OUTSD", FLAT, |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RSI]) = (0x1f0, 2, place::DATA);
        g.write_u64(place::DATA, 0x2222_2222_1111_1111);
        let end = g.run(|a| a.rep().outsd())?;
        end.registers(&[(gpr::RSI, place::DATA + 8), (gpr::RCX, 0)])?;
        end.saw(&[port_out(0x1f0, 4, 0x1111_1111), port_out(0x1f0, 4, 0x2222_2222)])
    });
    suite.add("REP INSB with RCX 0 does nothing", FLAT, |g| {
        let end = g.run(|a| a.rep().insb())?;
        end.registers(&[(gpr::RDI, place::DATA)])?;
        end.saw(&[])
    });
    suite.add("REP OUTSB with DF goes down", FLAT, |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RSI]) = (0x80, 3, place::DATA + 2);
        g.state.rflags |= rflags::DF;
        g.write(place::DATA, &[1, 2, 3]);
        let end = g.run(|a| a.rep().outsb())?;
        end.registers(&[(gpr::RSI, place::DATA - 1), (gpr::RCX, 0)])?;
        end.saw(&[port_out(0x80, 1, 3), port_out(0x80, 1, 2), port_out(0x80, 1, 1)])
    });
    suite.add("REP INSB of many bytes across pages", FLAT, |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDI]) = (0x170, 3000, place::DATA + 0xf00);
        let values: Vec<u64> = (0..3000).map(|n| (n * 7) & 0xff).collect();
        g.io.answer(&values);
        let end = g.run(|a| a.rep().insb())?;
        end.registers(&[(gpr::RDI, place::DATA + 0xf00 + 3000), (gpr::RCX, 0)])?;
        let expected: Vec<u8> = values.iter().map(|&value| value as u8).collect();
        equal("memory", g.read(place::DATA + 0xf00, 3000), expected)?;
        equal("accesses", end.log.len(), 3000)
    });
    suite.add("REP OUTSW of many words across pages", FLAT, |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RSI]) = (0x170, 3000, place::DATA + 0xf01);
        let bytes: Vec<u8> = (0..6000u32).map(|n| ((n * 7) >> 3) as u8).collect();
        g.write(place::DATA + 0xf01, &bytes);
        let end = g.run(|a| a.rep().outsw())?;
        end.registers(&[(gpr::RSI, place::DATA + 0xf01 + 6000), (gpr::RCX, 0)])?;
        let expected: Vec<Access> =
            bytes.chunks(2).map(|pair| port_out(0x170, 2, u64::from(u16::from_le_bytes([pair[0], pair[1]])))).collect();
        end.saw(&expected)
    });
    suite.add("an address-size prefix makes REP INSB use ECX and EDI", &[Mode::Long], |g| {
        g.state.gpr[gpr::RDX] = 0x80;
        g.state.gpr[gpr::RCX] = 0xffff_ffff_0000_0002;
        g.state.gpr[gpr::RDI] = 0xffff_ffff_0000_0000 | place::DATA;
        g.io.answer(&[0xaa, 0xbb]);
        let end = g.run(|a| a.db(&[0x67, 0xf3, 0x6c]))?;
        end.registers(&[(gpr::RDI, place::DATA + 2), (gpr::RCX, 0)])?;
        equal("memory", g.read(place::DATA, 2), vec![0xaa, 0xbb])
    });
    suite.add("OUTSB from a port hole: memory of a device", &[Mode::Protected, Mode::Long], |g| {
        g.state.gpr[gpr::RDX] = 0x80;
        g.io.answer(&[0x77]);
        let end = g.run(|a| a.outsb())?;
        end.done()?;
        end.saw(&[Access::Read { gpa: place::MMIO, size: 1 }, port_out(0x80, 1, 0x77)])
    });
    suite.add("INSB stores to ES:DI", &[Mode::Real], |g| {
        g.state.segments.seg[index::ES] = g.state.segments.seg[index::DS];
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDI]) = (0x60, 2, 0x10);
        g.io.answer(&[1, 2]);
        let end = g.run(|a| a.rep().insb())?;
        end.registers(&[(gpr::RDI, 0x12), (gpr::RCX, 0)])?;
        equal("memory", g.read(place::DATA + 0x10, 2), vec![1, 2])
    });
    suite.add("OUTSW loads from DS:SI, which wraps at 64 KiB", &[Mode::Real], |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX], g.state.gpr[gpr::RSI]) = (0x60, 2, 0xfffe);
        g.write(place::DATA, &[3, 4]);
        g.write(place::DATA + 0xfffe, &[1, 2]);
        let end = g.run(|a| a.rep().outsw())?;
        end.registers(&[(gpr::RSI, 2), (gpr::RCX, 0)])?;
        end.saw(&[port_out(0x60, 2, 0x0201), port_out(0x60, 2, 0x0403)])
    });
    suite.add("OUTSB with a segment override", &[Mode::Real], |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RSI]) = (0x60, place::STACK);
        g.write(place::STACK, &[0x33]);
        g.run(|a| a.db(&[0x36, 0x6e]))?.saw(&[port_out(0x60, 1, 0x33)])
    });
}

/// What faults in the middle stops there: RCX and the index count what was done (SDM vol. 2B REP).
fn string_faults(suite: &mut Suite) {
    suite.add("REP OUTSB stops at a page that is absent", &[Mode::Long], |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX]) = (0x80, 8);
        g.state.gpr[gpr::RSI] = place::DATA + 0xffd;
        g.write(place::DATA + 0xffd, &[1, 2, 3]);
        g.map(place::DATA + 0x1000, 0);
        let end = g.run(|a| a.rep().outsb())?;
        end.page_fault(0, place::DATA + 0x1000)?;
        equal("RCX, RSI", (end.gpr(gpr::RCX), end.gpr(gpr::RSI)), (5, place::DATA + 0x1000))?;
        end.saw(&[port_out(0x80, 1, 1), port_out(0x80, 1, 2), port_out(0x80, 1, 3)])
    });
    // Whether the port is read before the fault is not said; registers and memory are.
    suite.add("REP INSB stops at a page that is read-only", &[Mode::Long], |g| {
        (g.state.gpr[gpr::RDX], g.state.gpr[gpr::RCX]) = (0x80, 8);
        g.state.gpr[gpr::RDI] = place::DATA + 0xffe;
        g.io.answer(&[0x21, 0x22, 0x23]);
        g.map(place::DATA + 0x1000, (place::DATA + 0x1000) | page::P);
        let end = g.run(|a| a.rep().insb())?;
        end.page_fault(3, place::DATA + 0x1000)?;
        equal("RCX, RDI", (end.gpr(gpr::RCX), end.gpr(gpr::RDI)), (6, place::DATA + 0x1000))?;
        equal("memory", g.read(place::DATA + 0xffe, 3), vec![0x21, 0x22, 0])
    });
}
