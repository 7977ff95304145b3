//! Protection keys: what PKRU and IA32_PKRS forbid, the instructions and the XSAVE component that set PKRU, and that
//! changes count at once (SDM vol. 3A 4.6.2).

use super::super::{End, Guest, Mismatch};
use super::prelude::*;
use anyvisor_x86::state::{PKRU_OFFSET, PKRU_SIZE};

const P: u32 = 1;
const W: u32 = 2;
const U: u32 = 4;
const KEY: u32 = 32;
/// For key 1: no access, no write.
const NO_ACCESS: u32 = 4;
const NO_WRITE: u32 = 8;
const NEEDS: &[Need] = &[Need::PKU];

pub fn add(suite: &mut Suite) {
    rights(suite.group("protection keys"));
    supervisor_keys(suite);
    instructions(suite);
    changes(suite);
    xsave(suite);
}

/// A page-table entry of the page of data, with key 1.
fn keyed(rights: u64) -> u64 {
    place::DATA | page::P | rights | 1 << 59
}

/// Enables keys of user pages, with `pkru`.
fn enable(g: &mut Guest, pkru: u32) {
    g.state.cr4 |= cr4::PKE;
    g.state.xsave.resize(PKRU_OFFSET + PKRU_SIZE, 0);
    g.state.xsave[PKRU_OFFSET..PKRU_OFFSET + 4].copy_from_slice(&pkru.to_le_bytes());
    g.state.xsave[513] |= (xcr0::PKRU >> 8) as u8;
}

fn load(g: &mut Guest) -> Result<End, Mismatch> {
    g.run(|a| a.mov(rax, qword_ptr(rdi)))
}

fn store(g: &mut Guest) -> Result<End, Mismatch> {
    g.run(|a| a.mov(qword_ptr(rdi), rax))
}

type Touch = fn(&mut Guest) -> Result<End, Mismatch>;

/// Mode, name, access, CR0.WP, rights of the page, PKRU or IA32_PKRS, error code (or none: the access is allowed).
type Row = (Mode, &'static str, Touch, u64, u64, u32, Option<u32>);

fn expect(end: &End, code: Option<u32>) -> Verdict {
    match code {
        Some(code) => end.page_fault(code, place::DATA),
        None => end.done(),
    }
}

fn rights(suite: &mut Suite) {
    const ALL: u64 = page::W | page::U;
    const WP: u64 = cr0::WP;
    let rows: &[Row] = &[
        (Mode::User, "a load without access", load, WP, ALL, NO_ACCESS, Some(U | P | KEY)),
        (Mode::User, "a store without access", store, WP, ALL, NO_ACCESS, Some(U | W | P | KEY)),
        (Mode::User, "a load without write", load, WP, ALL, NO_WRITE, None),
        (Mode::User, "a store without write", store, WP, ALL, NO_WRITE, Some(U | W | P | KEY)),
        (Mode::User, "a store without write, WP clear", store, 0, ALL, NO_WRITE, Some(U | W | P | KEY)),
        (Mode::User, "a store with other keys' rights", store, WP, ALL, !0xf, None),
        (Mode::User, "a store to a read-only page", store, WP, page::U, 0, Some(U | W | P)),
        (Mode::User, "a store to a read-only page, without write", store, WP, page::U, NO_WRITE, Some(U | W | P | KEY)),
        (Mode::User, "a load from a supervisor page", load, WP, page::W, NO_ACCESS, Some(U | P)),
        (Mode::Long, "a load without access", load, WP, ALL, NO_ACCESS, Some(P | KEY)),
        (Mode::Long, "a store without write", store, WP, ALL, NO_WRITE, Some(W | P | KEY)),
        (Mode::Long, "a store without write, WP clear", store, 0, ALL, NO_WRITE, None),
        (Mode::Long, "a store without access, WP clear", store, 0, ALL, NO_ACCESS, Some(W | P | KEY)),
        (Mode::Long, "a store to a supervisor page", store, WP, page::W, !0, None),
    ];
    for &(mode, name, touch, wp, rights, pkru, code) in rows {
        suite
            .add(name, &[mode], move |g| {
                enable(g, pkru);
                g.state.cr0 = g.state.cr0 & !cr0::WP | wp;
                g.map(place::DATA, keyed(rights));
                expect(&touch(g)?, code)
            })
            .needs(NEEDS);
    }
    suite
        .add("without CR4.PKE they mean nothing", &[Mode::User], |g| {
            enable(g, NO_ACCESS);
            g.state.cr4 &= !cr4::PKE;
            g.map(place::DATA, keyed(ALL));
            load(g)?.done()
        })
        .needs(NEEDS);
    suite
        .add("code is fetched without access", WIDE, |g| {
            enable(g, NO_ACCESS);
            g.map(place::CODE, place::CODE | page::ALL | 1 << 59);
            g.run(|a| a.nop())?.done()
        })
        .needs(NEEDS);
}

fn supervisor_keys(suite: &mut Suite) {
    let rows: &[Row] = &[
        (Mode::Long, "PKS: a load without access", load, cr0::WP, page::W, NO_ACCESS, Some(P | KEY)),
        (Mode::Long, "PKS: a load without write", load, cr0::WP, page::W, NO_WRITE, None),
        (Mode::Long, "PKS: a store without write", store, cr0::WP, page::W, NO_WRITE, Some(W | P | KEY)),
        (Mode::Long, "PKS: a store without write, WP clear", store, 0, page::W, NO_WRITE, None),
        (Mode::Long, "PKS: a store to a user page", store, cr0::WP, page::W | page::U, !3, None),
        (Mode::User, "PKS: a load from a supervisor page", load, cr0::WP, page::W, NO_ACCESS, Some(U | P | KEY)),
    ];
    for &(mode, name, touch, wp, rights, pkrs, code) in rows {
        suite
            .add(name, &[mode], move |g| {
                g.state.cr4 |= cr4::PKS;
                g.state.set_msr(msr::IA32_PKRS, pkrs.into());
                g.state.cr0 = g.state.cr0 & !cr0::WP | wp;
                g.map(place::DATA, keyed(rights));
                expect(&touch(g)?, code)
            })
            .needs(&[Need::PKS]);
    }
    suite
        .add("PKS: WRMSR counts at once", &[Mode::Long], |g| {
            g.state.cr4 |= cr4::PKS;
            g.map(place::DATA, keyed(page::W));
            (g.state.gpr[gpr::RCX], g.state.gpr[gpr::RAX]) = (msr::IA32_PKRS.into(), NO_ACCESS.into());
            let end = g.run(|a| {
                a.mov(qword_ptr(rdi), rbx)?;
                a.wrmsr()?;
                a.mov(rbx, qword_ptr(rdi))
            })?;
            end.page_fault(P | KEY, place::DATA)?;
            equal("IA32_PKRS of the state", end.state.msr(msr::IA32_PKRS), Some(NO_ACCESS.into()))
        })
        .needs(&[Need::PKS]);
    suite
        .add("PKS: IA32_PKRS has 32 bits", &[Mode::Long], |g| {
            (g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDX]) = (msr::IA32_PKRS.into(), 1);
            g.run(|a| a.wrmsr())?.gp0()
        })
        .needs(&[Need::PKS]);
}

fn instructions(suite: &mut Suite) {
    suite
        .add("WRPKRU and RDPKRU", PROTECTED_MODES, |g| {
            enable(g, 0);
            let end = g.run(|a| {
                a.mov(eax, 0x1234_5678)?;
                a.xor(ecx, ecx)?;
                a.xor(edx, edx)?;
                a.wrpkru()?;
                a.xor(eax, eax)?;
                a.dec(edx)?;
                a.rdpkru()
            })?;
            end.registers(&[(gpr::RAX, 0x1234_5678), (gpr::RDX, 0)])?;
            equal(
                "PKRU of the state",
                &end.state.xsave[PKRU_OFFSET..PKRU_OFFSET + 4],
                &0x1234_5678u32.to_le_bytes()[..],
            )
        })
        .needs(NEEDS);
    suite.add("RDPKRU without CR4.PKE is #UD", WIDE, |g| g.run(|a| a.rdpkru())?.fault(vector::UD)).needs(NEEDS);
    suite.add("WRPKRU without CR4.PKE is #UD", WIDE, |g| g.run(|a| a.wrpkru())?.fault(vector::UD)).needs(NEEDS);
    for (name, register) in [("ECX", gpr::RCX), ("EDX", gpr::RDX)] {
        suite
            .add(format!("WRPKRU with {name} is #GP"), WIDE, move |g| {
                enable(g, 0);
                (g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDX]) = (0, 0);
                g.state.gpr[register] = 1;
                g.run(|a| a.wrpkru())?.gp0()
            })
            .needs(NEEDS);
    }
    suite
        .add("RDPKRU with ECX is #GP", WIDE, |g| {
            enable(g, 0);
            g.state.gpr[gpr::RCX] = 1;
            g.run(|a| a.rdpkru())?.gp0()
        })
        .needs(NEEDS);
    suite
        .add("OSPKE follows CR4.PKE", &[Mode::Long], |g| {
            let pke = cr4::PKE as i32;
            let end = g.run(|a| {
                a.mov(eax, 7)?;
                a.xor(ecx, ecx)?;
                a.cpuid()?;
                a.mov(esi, ecx)?;
                a.mov(rax, cr4)?;
                a.or(rax, pke)?;
                a.mov(cr4, rax)?;
                a.mov(eax, 7)?;
                a.xor(ecx, ecx)?;
                a.cpuid()
            })?;
            end.done()?;
            equal("before and after", [end.gpr(gpr::RSI) >> 4 & 1, end.gpr(gpr::RCX) >> 4 & 1], [0, 1])
        })
        .needs(NEEDS);
}

fn changes(suite: &mut Suite) {
    for (name, pkru, code) in [("access", NO_ACCESS, U | W | P | KEY), ("write", NO_WRITE, U | W | P | KEY)] {
        suite
            .add(format!("WRPKRU takes {name} away at once"), &[Mode::User], move |g| {
                enable(g, 0);
                g.map(place::DATA, keyed(page::W | page::U));
                (g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDX], g.state.gpr[gpr::RAX]) = (0, 0, pkru.into());
                let end = g.run(|a| {
                    a.mov(qword_ptr(rdi), rbx)?;
                    a.wrpkru()?;
                    a.mov(qword_ptr(rdi), rbx)
                })?;
                end.page_fault(code, place::DATA)
            })
            .needs(NEEDS);
    }
    suite
        .add("WRPKRU gives rights back", &[Mode::User], |g| {
            enable(g, NO_WRITE);
            g.map(place::DATA, keyed(page::W | page::U));
            (g.state.gpr[gpr::RCX], g.state.gpr[gpr::RDX], g.state.gpr[gpr::RAX]) = (0, 0, 0);
            let end = g.run(|a| {
                a.mov(rbx, qword_ptr(rdi))?;
                a.wrpkru()?;
                a.mov(qword_ptr(rdi), rbx)
            })?;
            end.done()
        })
        .needs(NEEDS);
    suite
        .add("CR4.PKE counts at once", &[Mode::Long], |g| {
            enable(g, NO_ACCESS);
            g.state.cr4 &= !cr4::PKE;
            g.map(place::DATA, keyed(page::W | page::U));
            let pke = cr4::PKE as i32;
            let end = g.run(|a| {
                a.mov(rbx, qword_ptr(rdi))?;
                a.mov(rax, cr4)?;
                a.or(rax, pke)?;
                a.mov(cr4, rax)?;
                a.mov(rbx, qword_ptr(rdi))
            })?;
            end.page_fault(P | KEY, place::DATA)
        })
        .needs(NEEDS);
}

fn xsave(suite: &mut Suite) {
    /// An area in a page without a key.
    const AREA: u64 = place::DATA + 0x1000;
    fn with_component(g: &mut Guest, pkru: u32) {
        enable(g, pkru);
        g.state.cr4 |= cr4::OSXSAVE;
        g.state.xcr0 = 7 | xcr0::PKRU;
        g.state.gpr[gpr::RDI] = AREA;
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RDX]) = (xcr0::PKRU, 0);
    }
    let needs = &[Need::PKU, Need::AVX];
    suite
        .add("XSAVE writes PKRU", WIDE, |g| {
            with_component(g, 0x1234_5670);
            g.write(AREA, &[0; 0x400]);
            g.run(|a| a.xsave(byte_ptr(rdi)))?.done()?;
            equal("XSTATE_BV", g.read_u64(AREA + 512), xcr0::PKRU)?;
            equal("PKRU in the area", g.read_u64(AREA + PKRU_OFFSET as u64), 0x1234_5670)
        })
        .needs(needs);
    suite
        .add("XSAVE without the component leaves it alone", WIDE, |g| {
            with_component(g, 0x1234_5670);
            g.state.gpr[gpr::RAX] = 7;
            g.write(AREA, &[0; 0x400]);
            g.run(|a| a.xsave(byte_ptr(rdi)))?.done()?;
            equal("PKRU in XSTATE_BV", g.read_u64(AREA + 512) & xcr0::PKRU, 0)?;
            equal("PKRU in the area", g.read_u64(AREA + PKRU_OFFSET as u64), 0)
        })
        .needs(needs);
    for (name, header, pkru) in [("loads PKRU", xcr0::PKRU, 0x1234_5670), ("initializes PKRU", 0, 0)] {
        suite
            .add(format!("XRSTOR {name}"), WIDE, move |g| {
                with_component(g, 0x40);
                g.write(AREA, &[0; 0x400]);
                g.write_u32(AREA + 24, 0x1f80);
                g.write_u64(AREA + 512, header);
                g.write_u64(AREA + PKRU_OFFSET as u64, 0x1234_5670);
                let end = g.run(|a| {
                    a.xrstor(byte_ptr(rdi))?;
                    a.xor(ecx, ecx)?;
                    a.rdpkru()
                })?;
                end.registers(&[(gpr::RAX, pkru)])
            })
            .needs(needs);
    }
    suite
        .add("XRSTOR of PKRU counts at once", &[Mode::User], |g| {
            with_component(g, 0);
            g.map(place::DATA, keyed(page::W | page::U));
            g.state.gpr[gpr::RSI] = place::DATA;
            g.write(AREA, &[0; 0x400]);
            g.write_u32(AREA + 24, 0x1f80);
            g.write_u64(AREA + 512, xcr0::PKRU);
            g.write_u64(AREA + PKRU_OFFSET as u64, NO_ACCESS.into());
            let end = g.run(|a| {
                a.mov(rbx, qword_ptr(rsi))?;
                a.xrstor(byte_ptr(rdi))?;
                a.mov(rbx, qword_ptr(rsi))
            })?;
            end.page_fault(U | P | KEY, place::DATA)
        })
        .needs(needs);
    suite
        .add("CPUID tells of the component", &[Mode::Long], |g| {
            g.state.cr4 |= cr4::OSXSAVE;
            g.state.xcr0 = 7 | xcr0::PKRU;
            let end = g.run(|a| {
                a.mov(eax, 0xd)?;
                a.xor(ecx, ecx)?;
                a.cpuid()?;
                a.mov(esi, ebx)?;
                a.mov(edi, eax)?;
                a.mov(eax, 0xd)?;
                a.mov(ecx, 9)?;
                a.cpuid()
            })?;
            end.registers(&[(gpr::RAX, 8), (gpr::RBX, 832), (gpr::RSI, 840), (gpr::RDI, 7 | xcr0::PKRU)])
        })
        .needs(needs);
}
