//! Paging: faults of every kind with their error codes and CR2, rights, accessed and dirty bits, page sizes,
//! the three paging modes, and the TLB (SDM vol. 3A chapter 4).

use super::super::{End, Guest, Mismatch};
use super::prelude::*;

const P: u32 = 1;
const W: u32 = 2;
const U: u32 = 4;
const RSVD: u32 = 8;
const I: u32 = 16;

pub fn add(suite: &mut Suite) {
    faults(suite.group("page faults"));
    fetches(suite);
    levels(suite);
    supervisor(suite);
    accessed_and_dirty(suite.group("paging"));
    sizes(suite);
    tlb(suite);
    pcid(suite);
    legacy(suite.group("32-bit paging"));
    pae(suite.group("PAE paging"));
}

/// A load of the quadword at RDI.
fn load(g: &mut Guest) -> Result<End, Mismatch> {
    g.run(|a| a.mov(rax, qword_ptr(rdi)))
}

fn store(g: &mut Guest) -> Result<End, Mismatch> {
    g.run(|a| a.mov(qword_ptr(rdi), rax))
}

/// How a case touches memory.
type Touch = fn(&mut Guest) -> Result<End, Mismatch>;

fn faults(suite: &mut Suite) {
    let page = place::DATA;
    // Name, mode, access, entry, error code (or none: the access is allowed).
    let rows: &[(&str, Mode, Touch, u64, Option<u32>)] = &[
        ("a load from an absent page", Mode::Long, load, 0, Some(0)),
        ("a load from an absent page", Mode::User, load, 0, Some(U)),
        ("a store to an absent page", Mode::Long, store, 0, Some(W)),
        ("a store to an absent page", Mode::User, store, 0, Some(U | W)),
        ("a load from an absent entry with all other bits set", Mode::User, load, !1 & !page::NX, Some(U)),
        ("a load from a supervisor page", Mode::User, load, page | page::P | page::W, Some(U | P)),
        ("a store to a supervisor page", Mode::User, store, page | page::P | page::W, Some(U | W | P)),
        ("a load from a read-only page", Mode::User, load, page | page::P | page::U, None),
        ("a store to a read-only page", Mode::User, store, page | page::P | page::U, Some(U | W | P)),
        ("a store to a read-only page with WP", Mode::Long, store, page | page::P, Some(W | P)),
        ("a store to a read-only user page with WP", Mode::Long, store, page | page::P | page::U, Some(W | P)),
        ("a load from a supervisor page", Mode::Long, load, page | page::P, None),
        ("a load with a reserved bit", Mode::Long, load, page | page::ALL | 1 << 51, Some(RSVD | P)),
        ("a load with a reserved bit", Mode::User, load, page | page::ALL | 1 << 51, Some(RSVD | U | P)),
        ("a store with a reserved bit", Mode::User, store, page | page::ALL | 1 << 51, Some(RSVD | U | W | P)),
        (
            "a store with a reserved bit to a read-only page",
            Mode::User,
            store,
            page | page::P | page::U | 1 << 51,
            Some(RSVD | U | W | P),
        ),
        ("a load from a page that may not be executed", Mode::User, load, page | page::ALL | page::NX, None),
        ("a load with ignored bits set", Mode::User, load, page | page::ALL | 0xe00 | 0x7f << 52, None),
    ];
    for &(name, mode, touch, entry, error) in rows {
        suite.add(name, &[mode], move |g| {
            // Physical addresses of 52 bits have no reserved bit at 51.
            if entry & page::P != 0 && entry >> 51 & 1 != 0 && physical_bits(g) == 52 {
                return Ok(());
            }
            g.map(place::DATA, entry);
            g.state.gpr[gpr::RDI] = place::DATA + 0x123;
            let end = touch(g)?;
            match error {
                Some(code) => end.page_fault(code, place::DATA + 0x123),
                None => end.done(),
            }
        });
    }
    suite.add("NX is reserved without EFER.NXE", &[Mode::Long], |g| {
        g.state.set_msr(msr::EFER, efer::LME | efer::LMA | efer::SCE);
        g.map(place::DATA, place::DATA | page::ALL | page::NX);
        load(g)?.page_fault(RSVD | P, place::DATA)
    });
    suite.add("a load across a page end faults at the second page", WIDE, |g| {
        let user = if g.mode == Mode::User { U } else { 0 };
        g.map(place::DATA + 0x1000, 0);
        g.state.gpr[gpr::RDI] = place::DATA + 0xffd;
        load(g)?.page_fault(user, place::DATA + 0x1000)
    });
    suite.add("a store across a page end writes nothing if the second page is read-only", WIDE, |g| {
        let user = if g.mode == Mode::User { U } else { 0 };
        g.map(place::DATA + 0x1000, (place::DATA + 0x1000) | page::P | page::U);
        g.state.gpr[gpr::RDI] = place::DATA + 0xffd;
        g.state.gpr[gpr::RAX] = u64::MAX;
        store(g)?.page_fault(user | W | P, place::DATA + 0x1000)?;
        equal("the first page", g.read(place::DATA + 0xffd, 3), vec![0; 3])
    });
    // A read-modify-write asks for write access at once (SDM vol. 3A 4.7: W is set if it was a write).
    suite.add("ADD to a read-only page is a write", WIDE, |g| {
        let user = if g.mode == Mode::User { U } else { 0 };
        g.map(place::DATA, place::DATA | page::P | page::U);
        g.run(|a| a.add(qword_ptr(rdi), 1))?.page_fault(user | W | P, place::DATA)
    });
    suite.add("CMPXCHG that does not match is a write", &[Mode::User], |g| {
        g.map(place::DATA, place::DATA | page::P | page::U);
        g.state.gpr[gpr::RAX] = 5;
        g.run(|a| a.lock().cmpxchg(qword_ptr(rdi), rbx))?.page_fault(U | W | P, place::DATA)
    });
    suite.add("PUSH to an absent page leaves RSP", &[Mode::User], |g| {
        g.map(place::DATA, 0);
        g.state.gpr[gpr::RSP] = place::DATA + 0x1000;
        let end = g.run(|a| a.push(rax))?;
        end.page_fault(U | W, place::DATA + 0xff8)?;
        equal("RSP in the frame", end.frame().and_then(|frame| frame.rsp), Some(place::DATA + 0x1000))
    });
    suite.add("CALL with an absent stack stays at the CALL", &[Mode::User], |g| {
        g.map(place::DATA, 0);
        g.state.gpr[gpr::RSP] = place::DATA + 0x1000;
        g.run(|a| a.call(place::MORE_CODE))?.page_fault(U | W, place::DATA + 0xff8)
    });
    suite.add("POP from an absent page", &[Mode::User], |g| {
        g.map(place::DATA, 0);
        g.state.gpr[gpr::RSP] = place::DATA;
        g.run(|a| a.pop(rax))?.page_fault(U, place::DATA)
    });
    suite.add("REP MOVSB stops where the target ends", WIDE, |g| {
        let user = if g.mode == Mode::User { U } else { 0 };
        g.map(place::DATA + 0x1000, 0);
        (g.state.gpr[gpr::RDI], g.state.gpr[gpr::RCX]) = (place::DATA + 0xff0, 0x100);
        g.state.gpr[gpr::RSI] = place::MORE_CODE;
        g.write(place::MORE_CODE, &[7; 0x20]);
        let end = g.run(|a| a.rep().movsb())?;
        end.page_fault(user | W, place::DATA + 0x1000)?;
        let registers = (end.gpr(gpr::RCX), end.gpr(gpr::RSI), end.gpr(gpr::RDI));
        equal("RCX, RSI, RDI", registers, (0xf0, place::MORE_CODE + 0x10, place::DATA + 0x1000))?;
        equal("memory", g.read(place::DATA + 0xff0, 0x10), vec![7; 0x10])
    });
    suite.add("a vector load from an absent page", WIDE, |g| {
        let user = if g.mode == Mode::User { U } else { 0 };
        g.map(place::DATA, 0);
        g.run(|a| a.movups(xmm0, xmmword_ptr(rdi + 0x20)))?.page_fault(user, place::DATA + 0x20)
    });
    suite.add("an x87 store to a read-only page", WIDE, |g| {
        let user = if g.mode == Mode::User { U } else { 0 };
        g.map(place::DATA, place::DATA | page::P | page::U);
        g.run(|a| {
            a.fld1()?;
            a.fstp(tword_ptr(rdi))
        })?
        .page_fault(user | W | P, place::DATA)
    });
}

/// Width of physical addresses (CPUID 80000008h.EAX).
fn physical_bits(g: &Guest) -> u32 {
    g.cpuid.get(0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff)
}

fn fetches(suite: &mut Suite) {
    let there = place::MORE_CODE;
    let rows: &[(&str, Mode, u64, u32)] = &[
        ("a jump to an absent page", Mode::User, 0, U | I),
        ("a jump to an absent page", Mode::Long, 0, I),
        ("a jump to a page with NX", Mode::User, there | page::ALL | page::NX, U | I | P),
        ("a jump to a page with NX", Mode::Long, there | page::P | page::NX, I | P),
        ("a jump to a supervisor page", Mode::User, there | page::P, U | I | P),
    ];
    for &(name, mode, entry, error) in rows {
        suite.add(name, &[mode], move |g| {
            g.map(place::MORE_CODE, entry);
            g.state.gpr[gpr::RDI] = place::MORE_CODE + 0x10;
            let end = g.run(|a| a.jmp(rdi))?;
            let frame = end.vectored(vector::PF)?;
            equal("error code, RIP", (frame.error_code, frame.rip), (Some(error), place::MORE_CODE + 0x10))?;
            equal("CR2", end.state.cr2, place::MORE_CODE + 0x10)
        });
    }
    suite.add("an instruction that runs into an absent page", WIDE, |g| {
        let user = if g.mode == Mode::User { U } else { 0 };
        g.map(place::MORE_CODE + 0x1000, 0);
        // The first three bytes of mov eax, imm32.
        g.write(place::MORE_CODE + 0xffd, &[0xb8, 1, 2]);
        g.state.gpr[gpr::RDI] = place::MORE_CODE + 0xffd;
        let end = g.run(|a| a.jmp(rdi))?;
        let frame = end.vectored(vector::PF)?;
        equal("error code, RIP", (frame.error_code, frame.rip), (Some(user | I), place::MORE_CODE + 0xffd))?;
        equal("CR2", end.state.cr2, place::MORE_CODE + 0x1000)
    });
    suite.add("an instruction whose bytes lie in two pages far apart", WIDE, |g| {
        g.map(place::MORE_CODE, (place::MORE_CODE + 0x3000) | page::ALL);
        // mov eax, 0x44332211; ud2
        g.write(place::MORE_CODE + 0x3ffd, &[0xb8, 0x11, 0x22]);
        g.write(place::MORE_CODE + 0x1000, &[0x33, 0x44, 0x0f, 0x0b]);
        g.state.gpr[gpr::RDI] = place::MORE_CODE + 0xffd;
        let end = g.run(|a| a.jmp(rdi))?;
        end.vectored(vector::UD)?;
        equal("RAX", end.gpr(gpr::RAX), 0x4433_2211)
    });
}

/// The faulting entry may be at any level.
fn levels(suite: &mut Suite) {
    // Name, address of the entry, what it becomes, error code of a store at CPL 3.
    let rows: &[(&str, u64, u64, u32)] = &[
        ("absent at the PDE", place::PD + 8, 0, U | W),
        ("absent at the PDPTE", place::PDPT + 8, 0, U | W),
        ("absent at the PML4E", place::PML4 + 8, 0, U | W),
        ("read-only by the PDE", place::PD + 8, 0x20_0000 | page::P | page::U | page::PS, U | W | P),
        ("supervisor by the PDE", place::PD + 8, 0x20_0000 | page::P | page::W | page::PS, U | W | P),
        ("a reserved bit in a large PDE", place::PD + 8, 0x20_2000 | page::ALL | page::PS, RSVD | U | W | P),
    ];
    for &(name, entry, value, error) in rows {
        suite.add(name, &[Mode::User], move |g| {
            g.write_u64(entry, value);
            g.state.gpr[gpr::RDI] = match entry {
                e if e == place::PD + 8 => place::BIG_PAGE + 0x8,
                e if e == place::PDPT + 8 => 1 << 30,
                _ => 1 << 39,
            };
            let address = g.state.gpr[gpr::RDI];
            store(g)?.page_fault(error, address)
        });
    }
    suite.add("PS in a PML4E is reserved", &[Mode::User], |g| {
        g.write_u64(place::PML4 + 8, place::PDPT | page::ALL | page::PS);
        g.state.gpr[gpr::RDI] = 1 << 39;
        load(g)?.page_fault(RSVD | U | P, 1 << 39)
    });
    suite.add("rights of all levels count together", &[Mode::User], |g| {
        // A second way to the data: read-only by its PDPTE alone.
        g.write_u64(place::PDPT + 8, place::PD | page::P | page::U);
        g.state.gpr[gpr::RDI] = (1 << 30) + place::DATA;
        store(g)?.page_fault(U | W | P, (1 << 30) + place::DATA)
    });
    suite.add("NX of an upper level counts", &[Mode::User], |g| {
        g.write_u64(place::PDPT + 8, place::PD | page::ALL | page::NX);
        g.state.gpr[gpr::RDI] = (1 << 30) + place::MORE_CODE;
        let end = g.run(|a| a.jmp(rdi))?;
        equal("error code", end.vectored(vector::PF)?.error_code, Some(U | I | P))
    });
    suite.add("the upper half of the address space", WIDE, |g| {
        g.write_u64(place::PML4 + 8 * 511, place::PDPT | page::ALL);
        g.write_u64(place::DATA, 0x1234);
        g.state.gpr[gpr::RDI] = 0xffff_ff80_0000_0000 + place::DATA;
        load(g)?.registers(&[(gpr::RAX, 0x1234)])
    });
}

fn supervisor(suite: &mut Suite) {
    suite.add("without WP the supervisor writes read-only pages", &[Mode::Long], |g| {
        g.state.cr0 &= !cr0::WP;
        g.map(place::DATA, place::DATA | page::P);
        g.state.gpr[gpr::RAX] = 0x77;
        store(g)?.done()?;
        equal("memory", g.read_u64(place::DATA), 0x77)
    });
    suite.add("without WP a user still may not", &[Mode::User], |g| {
        g.state.cr0 &= !cr0::WP;
        g.map(place::DATA, place::DATA | page::P | page::U);
        store(g)?.page_fault(U | W | P, place::DATA)
    });
    suite
        .add("SMEP: the supervisor may not fetch from a user page", &[Mode::Long], |g| {
            g.state.cr4 |= cr4::SMEP;
            g.supervisor_pages(&[place::MORE_CODE]);
            g.state.gpr[gpr::RDI] = place::MORE_CODE;
            let end = g.run(|a| a.jmp(rdi))?;
            let frame = end.vectored(vector::PF)?;
            equal("error code, RIP", (frame.error_code, frame.rip), (Some(I | P), place::MORE_CODE))
        })
        .needs(&[Need::SMEP]);
    suite
        .add("SMEP: the supervisor may read a user page", &[Mode::Long], |g| {
            g.state.cr4 |= cr4::SMEP;
            g.supervisor_pages(&[place::DATA]);
            load(g)?.done()
        })
        .needs(&[Need::SMEP]);
    let smap = |g: &mut Guest| {
        g.state.cr4 |= cr4::SMAP;
        g.supervisor_pages(&[place::DATA]);
    };
    suite
        .add("SMAP: the supervisor may not read a user page", &[Mode::Long], move |g| {
            smap(g);
            load(g)?.page_fault(P, place::DATA)
        })
        .needs(&[Need::SMAP]);
    suite
        .add("SMAP: the supervisor may not write a user page", &[Mode::Long], move |g| {
            smap(g);
            store(g)?.page_fault(W | P, place::DATA)
        })
        .needs(&[Need::SMAP]);
    suite
        .add("SMAP: AC suspends it", &[Mode::Long], move |g| {
            smap(g);
            g.state.rflags |= rflags::AC;
            load(g)?.done()
        })
        .needs(&[Need::SMAP]);
    suite
        .add("SMAP: STAC and CLAC", &[Mode::Long], move |g| {
            smap(g);
            let end = g.run(|a| {
                a.stac()?;
                a.mov(qword_ptr(rdi), rax)?;
                a.clac()?;
                a.mov(qword_ptr(rdi), rax)
            })?;
            end.page_fault(W | P, place::DATA)
        })
        .needs(&[Need::SMAP]);
    // Accesses to system tables are the processor's own: AC does not suspend SMAP for them (SDM vol. 3A 4.6.1).
    suite
        .add("SMAP: AC does not help an access to the LDT", &[Mode::Long], |g| {
            g.state.cr4 |= cr4::SMAP;
            g.state.rflags |= rflags::AC;
            g.supervisor_pages(&[place::LDT]);
            g.state.segments.ldtr = g.cached(selector::LDT);
            g.state.gpr[gpr::RAX] = 8 | 4;
            g.run(|a| a.mov(ds, ax))?.page_fault(P, place::LDT + 8)
        })
        .needs(&[Need::SMAP]);
    suite.add("a user loads a segment from a supervisor page", &[Mode::User], |g| {
        g.supervisor_pages(&[place::CODE]);
        g.state.gpr[gpr::RAX] = selector::USER_DATA.into();
        g.run(|a| a.mov(ds, ax))?.done()
    });
}

fn accessed_and_dirty(suite: &mut Suite) {
    let entry = place::PT + 8 * (place::DATA >> 12);
    suite.add("a load sets A", WIDE, move |g| {
        load(g)?.done()?;
        equal("A, D", g.read_u64(entry) & (page::A | page::D), page::A)
    });
    suite.add("a store sets A and D", WIDE, move |g| {
        store(g)?.done()?;
        equal("A, D", g.read_u64(entry) & (page::A | page::D), page::A | page::D)
    });
    suite.add("a store after a load sets D", WIDE, move |g| {
        let end = g.run(|a| {
            a.mov(rax, qword_ptr(rdi))?;
            a.mov(rbx, qword_ptr(rdi + 8))?;
            a.mov(qword_ptr(rdi), rax)
        })?;
        end.done()?;
        equal("A, D", g.read_u64(entry) & (page::A | page::D), page::A | page::D)
    });
    suite.add("a fault sets no D", &[Mode::User], move |g| {
        g.map(place::DATA, place::DATA | page::P | page::U);
        store(g)?.page_fault(U | W | P, place::DATA)?;
        equal("D", g.read_u64(entry) & page::D, 0)
    });
    suite.add("a fetch sets A", WIDE, |g| {
        g.run(|a| a.nop())?.done()?;
        let code = place::PT + 8 * (place::CODE >> 12);
        equal("A, D of the code's page", g.read_u64(code) & (page::A | page::D), page::A)
    });
    suite.add("A is set at every level, D at the last", WIDE, |g| {
        store(g)?.done()?;
        for table in [place::PML4, place::PDPT, place::PD] {
            equal("A, D of an upper entry", g.read_u64(table) & (page::A | page::D), page::A)?;
        }
        Ok(())
    });
    suite.add("a store to a large page sets D in the PDE", WIDE, |g| {
        g.state.gpr[gpr::RDI] = place::BIG_PAGE;
        store(g)?.done()?;
        equal("A, D", g.read_u64(place::PD + 8) & (page::A | page::D), page::A | page::D)
    });
    suite.add("D set once more after software clears it", &[Mode::Long], move |g| {
        g.state.gpr[gpr::RBX] = entry;
        let end = g.run(|a| {
            a.mov(qword_ptr(rdi), rax)?;
            a.and(qword_ptr(rbx), !(page::D as i32))?;
            a.invlpg(byte_ptr(rdi))?;
            a.mov(qword_ptr(rdi), rax)
        })?;
        end.done()?;
        equal("D", g.read_u64(entry) & page::D, page::D)
    });
    suite.add("the processor's frame sets D of the stack", &[Mode::User], |g| {
        g.run(|a| a.ud2())?.fault(vector::UD)?;
        let stack = place::PT + 8 * ((place::KERNEL_STACK - 1) >> 12);
        equal("A, D of the kernel stack's page", g.read_u64(stack) & (page::A | page::D), page::A | page::D)
    });
}

fn sizes(suite: &mut Suite) {
    suite.add("2 MiB pages", WIDE, |g| {
        g.write_u64(place::PD + 8 * 5, place::BIG_PAGE | page::ALL | page::PS);
        g.write_u64(place::BIG_PAGE + 0x12_3450, 0x77);
        g.state.gpr[gpr::RDI] = 5 * 0x20_0000 + 0x12_3450;
        load(g)?.registers(&[(gpr::RAX, 0x77)])
    });
    suite
        .add("1 GiB pages", WIDE, |g| {
            g.write_u64(place::PDPT + 8, page::ALL | page::PS);
            g.write_u64(place::BIG_PAGE + 0x18, 0x78);
            g.state.gpr[gpr::RDI] = (1 << 30) + place::BIG_PAGE + 0x18;
            load(g)?.registers(&[(gpr::RAX, 0x78)])
        })
        .needs(&[Need::GIB_PAGES]);
    suite
        .add("a reserved bit of a 1 GiB page", WIDE, |g| {
            let user = if g.mode == Mode::User { U } else { 0 };
            g.write_u64(place::PDPT + 8, 1 << 20 | page::ALL | page::PS);
            g.state.gpr[gpr::RDI] = 1 << 30;
            load(g)?.page_fault(user | RSVD | P, 1 << 30)
        })
        .needs(&[Need::GIB_PAGES]);
    suite.add("one page at two addresses", WIDE, |g| {
        g.map(place::MORE_CODE, place::DATA | page::ALL);
        g.state.gpr[gpr::RBX] = place::MORE_CODE;
        g.state.gpr[gpr::RAX] = 0x99;
        let end = g.run(|a| {
            a.mov(rcx, qword_ptr(rbx))?;
            a.mov(qword_ptr(rdi), rax)?;
            a.mov(rcx, qword_ptr(rbx))
        })?;
        end.registers(&[(gpr::RCX, 0x99)])
    });
}

fn tlb(suite: &mut Suite) {
    let entry = place::PT + 8 * (place::DATA >> 12);
    let elsewhere = place::MORE_CODE | page::ALL;
    let setup = move |g: &mut Guest| {
        g.write_u64(place::DATA, 1);
        g.write_u64(place::MORE_CODE, 2);
        (g.state.gpr[gpr::RBX], g.state.gpr[gpr::RCX]) = (entry, elsewhere);
    };
    suite.add("INVLPG makes a new mapping seen", &[Mode::Long], move |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(rax, qword_ptr(rdi))?;
            a.mov(qword_ptr(rbx), rcx)?;
            a.invlpg(byte_ptr(rdi))?;
            a.mov(rdx, qword_ptr(rdi))
        })?;
        end.registers(&[(gpr::RAX, 1), (gpr::RDX, 2)])
    });
    suite.add("a load of CR3 makes a new mapping seen", &[Mode::Long], move |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(rax, qword_ptr(rdi))?;
            a.mov(qword_ptr(rbx), rcx)?;
            a.mov(rsi, cr3)?;
            a.mov(cr3, rsi)?;
            a.mov(rdx, qword_ptr(rdi))
        })?;
        end.registers(&[(gpr::RAX, 1), (gpr::RDX, 2)])
    });
    suite.add("a change of CR4.PGE flushes global pages", &[Mode::Long], move |g| {
        setup(g);
        g.state.cr4 |= cr4::PGE;
        g.map(place::DATA, place::DATA | page::ALL | page::G);
        let end = g.run(|a| {
            a.mov(rax, qword_ptr(rdi))?;
            a.mov(qword_ptr(rbx), rcx)?;
            a.mov(rsi, cr4)?;
            a.and(rsi, !(cr4::PGE as i32))?;
            a.mov(cr4, rsi)?;
            a.mov(rdx, qword_ptr(rdi))
        })?;
        end.registers(&[(gpr::RAX, 1), (gpr::RDX, 2)])
    });
    suite.add("INVLPG of an address inside a large page", &[Mode::Long], |g| {
        g.write_u64(place::BIG_PAGE + 8, 1);
        g.write_u64(2 * place::BIG_PAGE + 8, 2);
        g.state.gpr[gpr::RDI] = place::BIG_PAGE;
        g.state.gpr[gpr::RBX] = place::PD + 8;
        g.state.gpr[gpr::RCX] = (2 * place::BIG_PAGE) | page::ALL | page::PS;
        let end = g.run(|a| {
            a.mov(rax, qword_ptr(rdi + 8))?;
            a.mov(qword_ptr(rbx), rcx)?;
            // An address elsewhere in the page.
            a.invlpg(byte_ptr(rdi + 0x12_3456))?;
            a.mov(rdx, qword_ptr(rdi + 8))
        })?;
        end.registers(&[(gpr::RAX, 1), (gpr::RDX, 2)])
    });
    // A page that becomes present needs no invalidation (SDM vol. 3A 4.10.4.3).
    suite.add("a page that becomes present is seen at once", &[Mode::Long], move |g| {
        g.map(place::DATA, 0);
        g.write_u64(place::DATA, 5);
        (g.state.gpr[gpr::RBX], g.state.gpr[gpr::RCX]) = (entry, place::DATA | page::ALL);
        g.handler(vector::PF, |a| {
            a.mov(qword_ptr(rbx), rcx)?;
            a.add(rsp, 8)?;
            a.iretq()
        })?;
        load(g)?.registers(&[(gpr::RAX, 5)])
    });
    suite.add("INVLPG of a non-canonical address does nothing", &[Mode::Long], |g| {
        g.state.gpr[gpr::RDI] = 0x8000_0000_0000;
        g.run(|a| a.invlpg(byte_ptr(rdi)))?.done()
    });
    suite.add("a switch of CR3 changes the address space", &[Mode::Long], |g| {
        // A second PML4 whose first GiB is elsewhere but for the first 2 MiB of code and tables.
        let (pml4, pdpt, pd, pt) =
            (place::TABLES, place::TABLES + 0x1000, place::TABLES + 0x2000, place::TABLES + 0x3000);
        let copy = g.read(place::PT, 4096);
        g.write(pt, &copy);
        g.write_u64(pt + 8 * (place::DATA >> 12), place::MORE_CODE | page::ALL);
        g.write_u64(pd, pt | page::ALL);
        g.write_u64(pdpt, pd | page::ALL);
        g.write_u64(pml4, pdpt | page::ALL);
        g.write_u64(place::DATA, 1);
        g.write_u64(place::MORE_CODE, 2);
        g.state.gpr[gpr::RBX] = pml4;
        let end = g.run(|a| {
            a.mov(rax, qword_ptr(rdi))?;
            a.mov(rsi, cr3)?;
            a.mov(cr3, rbx)?;
            a.mov(rcx, qword_ptr(rdi))?;
            a.mov(cr3, rsi)?;
            a.mov(rdx, qword_ptr(rdi))
        })?;
        end.registers(&[(gpr::RAX, 1), (gpr::RCX, 2), (gpr::RDX, 1)])
    });
}

fn pcid(suite: &mut Suite) {
    suite
        .add("PCID: bit 63 of CR3 is not stored", &[Mode::Long], |g| {
            g.state.cr4 |= cr4::PCIDE;
            g.state.gpr[gpr::RAX] = 1 << 63 | place::PML4 | 5;
            let end = g.run(|a| {
                a.mov(cr3, rax)?;
                a.mov(rbx, cr3)
            })?;
            end.registers(&[(gpr::RBX, place::PML4 | 5)])
        })
        .needs(&[Need::PCID]);
    suite.add("bit 63 of CR3 without PCIDE is #GP", &[Mode::Long], |g| {
        g.state.gpr[gpr::RAX] = 1 << 63 | place::PML4;
        g.run(|a| a.mov(cr3, rax))?.gp0()
    });
    suite
        .add("setting PCIDE with a PCID in CR3 is #GP", &[Mode::Long], |g| {
            g.state.cr3 |= 8;
            let end = g.run(|a| {
                a.mov(rax, cr4)?;
                a.or(rax, cr4::PCIDE as i32)?;
                a.mov(cr4, rax)
            })?;
            end.gp0()
        })
        .needs(&[Need::PCID]);
    for (name, kind, descriptor) in [
        ("one address", 0u64, [5u64, place::DATA]),
        ("one context", 1, [5, 0]),
        ("everything", 2, [0, 0]),
        ("all but global pages", 3, [0, 0]),
    ] {
        suite
            .add(format!("INVPCID of {name}"), &[Mode::Long], move |g| {
                let entry = place::PT + 8 * (place::DATA >> 12);
                g.state.cr4 |= cr4::PCIDE;
                g.state.cr3 |= 5;
                g.write_u64(place::DATA, 1);
                g.write_u64(place::MORE_CODE, 2);
                g.write_u64(place::MORE_CODE + 0x1000, descriptor[0]);
                g.write_u64(place::MORE_CODE + 0x1008, descriptor[1]);
                (g.state.gpr[gpr::RBX], g.state.gpr[gpr::RCX]) = (entry, place::MORE_CODE | page::ALL);
                (g.state.gpr[gpr::RSI], g.state.gpr[gpr::R8]) = (place::MORE_CODE + 0x1000, kind);
                let end = g.run(|a| {
                    a.mov(rax, qword_ptr(rdi))?;
                    a.mov(qword_ptr(rbx), rcx)?;
                    a.invpcid(r8, xmmword_ptr(rsi))?;
                    a.mov(rdx, qword_ptr(rdi))
                })?;
                end.registers(&[(gpr::RAX, 1), (gpr::RDX, 2)])
            })
            .needs(&[Need::PCID, Need::INVPCID]);
    }
    suite
        .add("INVPCID of a type that does not exist is #GP", &[Mode::Long], |g| {
            g.state.gpr[gpr::RAX] = 4;
            g.run(|a| a.invpcid(rax, xmmword_ptr(rdi)))?.gp0()
        })
        .needs(&[Need::INVPCID]);
    suite
        .add("INVPCID with reserved bits is #GP", &[Mode::Long], |g| {
            g.write_u64(place::DATA, 1 << 12);
            g.state.gpr[gpr::RAX] = 1;
            g.run(|a| a.invpcid(rax, xmmword_ptr(rdi)))?.gp0()
        })
        .needs(&[Need::INVPCID]);
    suite
        .add("PCID: a load of CR3 with bit 63 clear drops that PCID's mappings", &[Mode::Long], |g| {
            let entry = place::PT + 8 * (place::DATA >> 12);
            g.state.cr4 |= cr4::PCIDE;
            g.write_u64(place::DATA, 1);
            g.write_u64(place::MORE_CODE, 2);
            (g.state.gpr[gpr::RBX], g.state.gpr[gpr::RCX]) = (entry, place::MORE_CODE | page::ALL);
            let end = g.run(|a| {
                a.mov(rax, qword_ptr(rdi))?;
                a.mov(qword_ptr(rbx), rcx)?;
                a.mov(rsi, place::PML4 | 7)?;
                a.mov(cr3, rsi)?;
                a.mov(rsi, place::PML4)?;
                a.mov(cr3, rsi)?;
                a.mov(rdx, qword_ptr(rdi))
            })?;
            end.registers(&[(gpr::RAX, 1), (gpr::RDX, 2)])
        })
        .needs(&[Need::PCID]);
}

fn legacy(suite: &mut Suite) {
    const BOTH: &[Mode] = &[Mode::Protected, Mode::ProtectedUser];
    let table = place::TABLES + 0x1000;
    let entry = table + 4 * (place::DATA >> 12);
    let touch = |g: &mut Guest| g.run(|a| a.mov(dword_ptr(edi), eax));
    suite.add("a mapped page works and A and D are set", BOTH, move |g| {
        g.legacy_paging();
        touch(g)?.done()?;
        equal("A, D", u64::from(g.read_u32(entry)) & (page::A | page::D), page::A | page::D)
    });
    suite.add("an absent page", BOTH, move |g| {
        g.legacy_paging();
        let user = if g.mode.is_user() { U } else { 0 };
        g.write_u32(entry, 0);
        touch(g)?.page_fault(user | W, place::DATA)
    });
    suite.add("an absent page directory entry", BOTH, move |g| {
        g.legacy_paging();
        let user = if g.mode.is_user() { U } else { 0 };
        g.state.gpr[gpr::RDI] = 0x80_0000;
        touch(g)?.page_fault(user | W, 0x80_0000)
    });
    suite.add("a read-only page with WP", BOTH, move |g| {
        g.legacy_paging();
        let user = if g.mode.is_user() { U } else { 0 };
        g.write_u32(entry, (place::DATA | page::P | page::U) as u32);
        touch(g)?.page_fault(user | W | P, place::DATA)
    });
    suite.add("a read-only page without WP", &[Mode::Protected], move |g| {
        g.legacy_paging();
        g.state.cr0 &= !cr0::WP;
        g.write_u32(entry, (place::DATA | page::P | page::U) as u32);
        touch(g)?.done()
    });
    suite.add("a supervisor page", &[Mode::ProtectedUser], move |g| {
        g.legacy_paging();
        g.write_u32(entry, (place::DATA | page::P | page::W) as u32);
        touch(g)?.page_fault(U | W | P, place::DATA)
    });
    suite.add("4 MiB pages with CR4.PSE", BOTH, |g| {
        g.legacy_paging();
        g.state.cr4 |= cr4::PSE;
        g.write_u32(place::TABLES + 4 * 3, 0x40_0000 | (page::ALL | page::PS) as u32);
        g.write_u32(0x40_1234, 0x55);
        g.state.gpr[gpr::RDI] = 3 * 0x40_0000 + 0x1234;
        g.run(|a| a.mov(eax, dword_ptr(edi)))?.registers(&[(gpr::RAX, 0x55)])
    });
    suite.add("PS without CR4.PSE is ignored", BOTH, move |g| {
        g.legacy_paging();
        g.write_u32(place::TABLES + 4 * 3, table as u32 | (page::ALL | page::PS) as u32);
        g.write_u32(place::DATA, 0x56);
        g.state.gpr[gpr::RDI] = 3 * 0x40_0000 + place::DATA;
        g.run(|a| a.mov(eax, dword_ptr(edi)))?.registers(&[(gpr::RAX, 0x56)])
    });
    suite.add("no I bit in a fetch's error code without NX", BOTH, |g| {
        g.legacy_paging();
        let user = if g.mode.is_user() { U } else { 0 };
        g.write_u32(place::TABLES + 0x1000 + 4 * (place::MORE_CODE as u32 as u64 >> 12), 0);
        g.state.gpr[gpr::RDI] = place::MORE_CODE;
        let end = g.run(|a| a.jmp(edi))?;
        equal("error code", end.vectored(vector::PF)?.error_code, Some(user))?;
        equal("CR2", end.state.cr2, place::MORE_CODE)
    });
    suite.add("MOV to CR0 turns paging on and off", &[Mode::Protected], |g| {
        g.legacy_paging();
        g.state.cr0 &= !cr0::PG;
        g.write_u32(place::TABLES + 0x1000 + 4 * 0x20, (place::MORE_CODE | page::ALL) as u32);
        g.write_u32(place::DATA, 1);
        g.write_u32(place::MORE_CODE, 2);
        let end = g.run(|a| {
            a.mov(ebx, dword_ptr(edi))?;
            a.mov(eax, cr0)?;
            a.or(eax, 0x8000_0000u32)?;
            a.mov(cr0, eax)?;
            a.mov(ecx, dword_ptr(edi))?;
            a.and(eax, 0x7fff_ffff)?;
            a.mov(cr0, eax)?;
            a.mov(edx, dword_ptr(edi))
        })?;
        end.registers(&[(gpr::RBX, 1), (gpr::RCX, 2), (gpr::RDX, 1)])
    });
}

fn pae(suite: &mut Suite) {
    const BOTH: &[Mode] = &[Mode::Protected, Mode::ProtectedUser];
    let entry = place::PT + 8 * (place::DATA >> 12);
    let touch = |g: &mut Guest| g.run(|a| a.mov(dword_ptr(edi), eax));
    suite.add("a mapped page works and A and D are set", BOTH, move |g| {
        g.pae_paging();
        touch(g)?.done()?;
        equal("A, D", g.read_u64(entry) & (page::A | page::D), page::A | page::D)
    });
    suite.add("an absent page", BOTH, move |g| {
        g.pae_paging();
        let user = if g.mode.is_user() { U } else { 0 };
        g.map(place::DATA, 0);
        touch(g)?.page_fault(user | W, place::DATA)
    });
    suite.add("an absent pointer", BOTH, move |g| {
        g.pae_paging();
        let user = if g.mode.is_user() { U } else { 0 };
        g.state.gpr[gpr::RDI] = 0x4000_0000;
        touch(g)?.page_fault(user | W, 0x4000_0000)
    });
    suite.add("2 MiB pages need no CR4.PSE", BOTH, |g| {
        g.pae_paging();
        g.write_u32(place::BIG_PAGE + 0x1234, 0x57);
        g.state.gpr[gpr::RDI] = place::BIG_PAGE + 0x1234;
        g.run(|a| a.mov(eax, dword_ptr(edi)))?.registers(&[(gpr::RAX, 0x57)])
    });
    suite.add("NX with EFER.NXE", BOTH, |g| {
        g.pae_paging();
        let user = if g.mode.is_user() { U } else { 0 };
        g.state.set_msr(msr::EFER, efer::NXE);
        g.map(place::MORE_CODE, place::MORE_CODE | page::ALL | page::NX);
        g.state.gpr[gpr::RDI] = place::MORE_CODE;
        let end = g.run(|a| a.jmp(edi))?;
        equal("error code", end.vectored(vector::PF)?.error_code, Some(user | I | P))
    });
    suite.add("NX without EFER.NXE is reserved", BOTH, move |g| {
        g.pae_paging();
        let user = if g.mode.is_user() { U } else { 0 };
        g.map(place::DATA, place::DATA | page::ALL | page::NX);
        touch(g)?.page_fault(user | RSVD | W | P, place::DATA)
    });
    // Pointers are loaded with CR3, and reserved bits in them are #GP then (SDM vol. 3A 4.4.1). Writing bits 1
    // and 2 is what a kernel that forgets they are reserved here would do.
    suite.add("a reserved bit in a pointer is #GP at the load of CR3", &[Mode::Protected], |g| {
        g.pae_paging();
        g.write_u64(place::TABLES + 0x20, place::PD | page::P | page::W);
        g.state.gpr[gpr::RAX] = place::TABLES + 0x20;
        g.run(|a| a.mov(cr3, eax))?.gp0()
    });
    suite.add("a pointer that changes in memory counts after the next load of CR3", &[Mode::Protected], |g| {
        g.pae_paging();
        // The second GiB becomes another view of the first.
        g.state.gpr[gpr::RBX] = place::TABLES + 8;
        g.state.gpr[gpr::RCX] = place::PD | page::P;
        g.state.gpr[gpr::RDI] = 0x4000_0000 + place::DATA;
        g.write_u32(place::DATA, 0x58);
        let end = g.run(|a| {
            a.mov(dword_ptr(ebx), ecx)?;
            a.mov(eax, cr3)?;
            a.mov(cr3, eax)?;
            a.mov(eax, dword_ptr(edi))
        })?;
        end.registers(&[(gpr::RAX, 0x58)])
    });
}
