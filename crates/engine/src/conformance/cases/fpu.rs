//! x87, SSE and AVX state: what saving and restoring it keeps, XCR0, and what the vCPU's state shows (SDM
//! vol. 1 chapters 8, 10, 13).

use super::prelude::*;
use anyvisor_x86::state::XSAVE_SIZE;

pub fn add(suite: &mut Suite) {
    fxsave(suite.group("FXSAVE"));
    xsave(suite.group("XSAVE"));
    xcr0_register(suite.group("XCR0"));
    state(suite.group("vector state"));
}

const AREA: u64 = place::DATA;

fn fxsave(suite: &mut Suite) {
    suite.add("FXSAVE stores control words and registers", WIDE, |g| {
        g.state.xsave[160..176].copy_from_slice(&[0x11; 16]);
        g.state.xsave[160 + 15 * 16..160 + 16 * 16].copy_from_slice(&[0x22; 16]);
        g.state.xsave[512] = 3;
        g.run(|a| a.fxsave64(byte_ptr(rdi)))?.done()?;
        equal("FCW", g.read(AREA, 2), vec![0x7f, 3])?;
        equal("MXCSR", g.read_u32(AREA + 24), 0x1f80)?;
        equal("XMM0", g.read(AREA + 160, 16), vec![0x11; 16])?;
        equal("XMM15", g.read(AREA + 400, 16), vec![0x22; 16])
    });
    suite.add("FXSAVE and FXRSTOR are inverse", WIDE, |g| {
        g.write_u64(AREA + 0x800, 0x1234_5678_9abc_def0);
        let end = g.run(|a| {
            a.fld1()?;
            a.fldpi()?;
            a.movsd_2(xmm5, qword_ptr(rdi + 0x800))?;
            a.fxsave64(byte_ptr(rdi))?;
            a.fninit()?;
            a.pxor(xmm5, xmm5)?;
            a.fxrstor64(byte_ptr(rdi))?;
            a.movq(rax, xmm5)?;
            a.fstp(st0)?;
            a.fistp(qword_ptr(rdi + 0x808))
        })?;
        end.registers(&[(gpr::RAX, 0x1234_5678_9abc_def0)])?;
        equal("ST1 was one", g.read_u64(AREA + 0x808), 1)
    });
    suite.add("FXSAVE to an unaligned address is #GP", WIDE, |g| g.run(|a| a.fxsave(byte_ptr(rdi + 8)))?.gp0());
    suite.add("FXRSTOR of reserved MXCSR bits is #GP", WIDE, |g| {
        g.write_u32(AREA + 24, 0x8000_1f80);
        g.run(|a| a.fxrstor(byte_ptr(rdi)))?.gp0()
    });
    suite.add("FXSAVE with CR0.TS is #NM", WIDE, |g| {
        g.state.cr0 |= cr0::TS;
        g.run(|a| a.fxsave(byte_ptr(rdi)))?.fault(vector::NM)
    });
    suite.add("FNSAVE initializes, FRSTOR brings back", WIDE, |g| {
        let end = g.run(|a| {
            a.fldpi()?;
            a.fnsave(byte_ptr(rdi))?;
            a.fnstsw(ax)?;
            a.mov(ebx, eax)?;
            a.frstor(byte_ptr(rdi))?;
            a.fnstsw(ax)?;
            a.fistp(qword_ptr(rdi + 0x100))
        })?;
        end.registers(&[(gpr::RBX, 0), (gpr::RAX, 7 << 11)])?;
        equal("pi, rounded", g.read_u64(AREA + 0x100), 3)
    });
}

fn xsave(suite: &mut Suite) {
    /// Everything enabled: x87, SSE, AVX.
    fn enable(g: &mut super::super::Guest) {
        g.state.cr4 |= cr4::OSXSAVE;
        g.state.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        g.state.gpr[gpr::RAX] = 7;
    }
    suite
        .add("XSAVE and XRSTOR keep the upper halves of YMM", WIDE, |g| {
            enable(g);
            for n in 0..4 {
                g.write_u64(AREA + 0x800 + 8 * n, 0x1111_1111_1111_1111 * (n + 1));
            }
            let end = g.run(|a| {
                a.vmovups(ymm7, ymmword_ptr(rdi + 0x800))?;
                a.xsave64(byte_ptr(rdi))?;
                a.vzeroall()?;
                a.xrstor64(byte_ptr(rdi))?;
                a.vmovups(ymmword_ptr(rdi + 0x900), ymm7)
            })?;
            end.done()?;
            equal("YMM7", g.read(AREA + 0x900, 32), g.read(AREA + 0x800, 32))
        })
        .needs(&[Need::AVX]);
    suite
        .add("XSAVE writes the components asked for only", WIDE, |g| {
            enable(g);
            g.state.gpr[gpr::RAX] = 1;
            g.write(AREA, &[0xcc; 0x400]);
            g.write(AREA + 512, &[0; 64]);
            g.run(|a| a.xsave(byte_ptr(rdi)))?.done()?;
            equal("XMM0 in the area", g.read(AREA + 160, 16), vec![0xcc; 16])?;
            equal("YMM in the area", g.read(AREA + 576, 16), vec![0xcc; 16])
        })
        .needs(&[Need::AVX]);
    suite
        .add("XRSTOR initializes what XSTATE_BV lacks", WIDE, |g| {
            enable(g);
            g.write_u32(AREA + 24, 0x1f80);
            let end = g.run(|a| {
                a.vpcmpeqb(xmm3, xmm3, xmm3)?;
                a.xrstor(byte_ptr(rdi))?;
                a.movq(rax, xmm3)
            })?;
            end.registers(&[(gpr::RAX, 0)])
        })
        .needs(&[Need::AVX]);
    suite
        .add("XRSTOR of a component beyond XCR0 is #GP", WIDE, |g| {
            enable(g);
            g.state.xcr0 = xcr0::X87 | xcr0::SSE;
            g.write(AREA + 512, &[7]);
            g.write_u32(AREA + 24, 0x1f80);
            g.run(|a| a.xrstor(byte_ptr(rdi)))?.gp0()
        })
        .needs(&[Need::AVX]);
    suite
        .add("XSAVE to an unaligned address is #GP", WIDE, |g| {
            enable(g);
            g.run(|a| a.xsave(byte_ptr(rdi + 16)))?.gp0()
        })
        .needs(&[Need::AVX]);
    suite
        .add("AVX without XCR0.AVX is #UD", WIDE, |g| {
            enable(g);
            g.state.xcr0 = xcr0::X87 | xcr0::SSE;
            g.run(|a| a.vxorps(ymm0, ymm0, ymm0))?.fault(vector::UD)
        })
        .needs(&[Need::AVX]);
    suite
        .add("AVX with CR0.TS is #NM", WIDE, |g| {
            enable(g);
            g.state.cr0 |= cr0::TS;
            g.run(|a| a.vxorps(ymm0, ymm0, ymm0))?.fault(vector::NM)
        })
        .needs(&[Need::AVX]);
    suite
        .add("XSAVE across a page that is absent stores nothing there", &[Mode::Long], |g| {
            enable(g);
            g.map(AREA + 0x1000, 0);
            g.state.gpr[gpr::RDI] = AREA + 0xf00;
            let end = g.run(|a| a.xsave(byte_ptr(rdi)))?;
            end.page_fault(2, AREA + 0x1000)
        })
        .needs(&[Need::AVX]);
}

fn xcr0_register(suite: &mut Suite) {
    suite
        .add("XSETBV and XGETBV", &[Mode::Long], |g| {
            g.state.cr4 |= cr4::OSXSAVE;
            g.state.gpr[gpr::RAX] = 3;
            let end = g.run(|a| {
                a.xsetbv()?;
                a.xor(eax, eax)?;
                a.xgetbv()
            })?;
            end.registers(&[(gpr::RAX, 3), (gpr::RDX, 0)])?;
            equal("XCR0 of the state", end.state.xcr0, 3)
        })
        .needs(&[Need::XSAVE]);
    for (name, value) in
        [("without x87", 2u64), ("AVX without SSE", 5), ("a reserved bit", 1 << 62 | 3), ("nothing", 0)]
    {
        suite
            .add(format!("XSETBV of {name} is #GP"), &[Mode::Long], move |g| {
                g.state.cr4 |= cr4::OSXSAVE;
                (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RDX]) = (value & 0xffff_ffff, value >> 32);
                g.run(|a| a.xsetbv())?.gp0()
            })
            .needs(&[Need::XSAVE]);
    }
    suite
        .add("XSETBV of another register is #GP", &[Mode::Long], |g| {
            g.state.cr4 |= cr4::OSXSAVE;
            (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RCX]) = (3, 1);
            g.run(|a| a.xsetbv())?.gp0()
        })
        .needs(&[Need::XSAVE]);
    suite
        .add("XGETBV at CPL 3", &[Mode::User, Mode::CompatUser, Mode::ProtectedUser], |g| {
            g.state.cr4 |= cr4::OSXSAVE;
            g.state.xcr0 = 3;
            g.run(|a| a.xgetbv())?.registers(&[(gpr::RAX, 3)])
        })
        .needs(&[Need::XSAVE]);
}

fn state(suite: &mut Suite) {
    suite.add("XMM and MXCSR come from the state and go to it", WIDE, |g| {
        g.state.xsave[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
        g.state.xsave[160 + 16 * 4..160 + 16 * 5].copy_from_slice(&[0x5a; 16]);
        g.state.xsave[512] = 3;
        let end = g.run(|a| {
            a.stmxcsr(dword_ptr(rdi))?;
            a.movdqa(xmm9, xmm4)
        })?;
        end.done()?;
        equal("MXCSR", g.read_u32(place::DATA), 0x1fa0)?;
        equal("XMM9", &end.state.xsave[160 + 16 * 9..160 + 16 * 10], &[0x5a; 16][..])
    });
    suite.add("the x87 stack goes to the state", WIDE, |g| {
        let end = g.run(|a| {
            a.fld1()?;
            a.fldpi()
        })?;
        end.done()?;
        let area = &end.state.xsave;
        equal("status, tags", (area[3] >> 3 & 7, area[4]), (6, 0xc0))?;
        // ST0 is pi, ST1 is 1.0.
        equal("ST0", &area[32..42], &[0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40][..])?;
        equal("ST1", &area[48..58], &[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f][..])
    });
    suite.add("the x87 stack comes from the state", WIDE, |g| {
        g.state.xsave[3] = 7 << 3;
        g.state.xsave[4] = 0x80;
        g.state.xsave[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0xa0, 0x02, 0x40]); // 10.0
        g.state.xsave[512] = 1;
        g.run(|a| a.fistp(qword_ptr(rdi)))?.done()?;
        equal("stored", g.read_u64(place::DATA), 10)
    });
    suite
        .add("YMM comes from the state and goes to it", WIDE, |g| {
            g.state.cr4 |= cr4::OSXSAVE;
            g.state.xcr0 = 7;
            let size = g.state.xsave.len().max(XSAVE_SIZE);
            g.state.xsave.resize(size, 0);
            g.state.xsave[160 + 16 * 2..160 + 16 * 3].copy_from_slice(&[0x11; 16]);
            g.state.xsave[576 + 16 * 2..576 + 16 * 3].copy_from_slice(&[0x22; 16]);
            g.state.xsave[512] = 7;
            let end = g.run(|a| a.vmovups(ymm5, ymm2))?;
            end.done()?;
            equal("low half of YMM5", &end.state.xsave[160 + 16 * 5..160 + 16 * 6], &[0x11; 16][..])?;
            equal("high half of YMM5", &end.state.xsave[576 + 16 * 5..576 + 16 * 6], &[0x22; 16][..])
        })
        .needs(&[Need::AVX]);
    suite.add("MMX aliases the x87 registers", WIDE, |g| {
        g.state.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
        let end = g.run(|a| a.movq(mm3, rax))?;
        end.done()?;
        equal("ST3", &end.state.xsave[32 + 48..32 + 56], &0x1122_3344_5566_7788u64.to_le_bytes()[..])?;
        equal("tags", end.state.xsave[4], 0xff)
    });
}
