//! CPUID, MSRs, control registers and the time-stamp counter: what reads back, what is refused.

use super::super::Guest;
use super::prelude::*;
use anyvisor_x86::lapic::base;

const KERNEL: &[Mode] = &[Mode::Long];

pub fn add(suite: &mut Suite) {
    cpuid(suite.group("CPUID"));
    msrs(suite.group("MSRs"));
    control(suite.group("control registers"));
    tsc(suite.group("time-stamp counter"));
}

/// What `table` says about a leaf, as EAX, EBX, ECX, EDX.
fn leaf(g: &Guest, number: u32, sub: u32) -> [u64; 4] {
    let r = g.cpuid.get(number, sub).unwrap_or_default();
    [r.eax, r.ebx, r.ecx, r.edx].map(u64::from)
}

fn cpuid(suite: &mut Suite) {
    for (number, sub) in
        [(0, 0), (0x15, 0), (0x16, 0), (0x8000_0000, 0), (0x8000_0001, 0), (0x8000_0002, 0), (0x8000_0008, 0), (7, 1)]
    {
        suite.add(format!("leaf {number:#x}.{sub} is what the vCPU was made with"), EVERY_MODE, move |g| {
            let want = leaf(g, number, sub);
            (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RCX]) = (number.into(), sub.into());
            let end = g.run(|a| a.cpuid())?;
            end.done()?;
            let got = [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX].map(|n| end.gpr(n));
            equal("EAX, EBX, ECX, EDX", got, want)
        });
    }
    // Bits of leaf 1 that the processor changes while it runs: OSXSAVE, and APIC by IA32_APIC_BASE.
    suite.add("leaf 1 but for OSXSAVE", EVERY_MODE, |g| {
        let want = leaf(g, 1, 0);
        g.state.gpr[gpr::RAX] = 1;
        let end = g.run(|a| a.cpuid())?;
        end.done()?;
        let osxsave = 1 << 27;
        equal("EAX", end.gpr(gpr::RAX), want[0])?;
        equal("EBX", end.gpr(gpr::RBX), want[1])?;
        equal("ECX", end.gpr(gpr::RCX) & !osxsave, want[2] & !osxsave)?;
        equal("EDX", end.gpr(gpr::RDX), want[3])
    });
    suite
        .add("OSXSAVE follows CR4", KERNEL, |g| {
            let osxsave = cr4::OSXSAVE as i32;
            let end = g.run(|a| {
                a.mov(eax, 1)?;
                a.cpuid()?;
                a.mov(esi, ecx)?;
                a.mov(rax, cr4)?;
                a.or(rax, osxsave)?;
                a.mov(cr4, rax)?;
                a.mov(eax, 1)?;
                a.cpuid()
            })?;
            end.done()?;
            equal("before", end.gpr(gpr::RSI) >> 27 & 1, 0)?;
            equal("after", end.gpr(gpr::RCX) >> 27 & 1, 1)
        })
        .needs(&[Need::XSAVE]);
    suite
        .add("the size of the XSAVE area follows XCR0", KERNEL, |g| {
            g.state.cr4 |= cr4::OSXSAVE;
            let end = g.run(|a| {
                a.mov(eax, 0xd)?;
                a.xor(ecx, ecx)?;
                a.cpuid()?;
                a.mov(esi, ebx)?;
                a.mov(eax, 7)?;
                a.xor(edx, edx)?;
                a.xor(ecx, ecx)?;
                a.xsetbv()?;
                a.mov(eax, 0xd)?;
                a.xor(ecx, ecx)?;
                a.cpuid()
            })?;
            end.done()?;
            equal("sizes before and after", [end.gpr(gpr::RSI), end.gpr(gpr::RBX)], [576, 832])
        })
        .needs(&[Need::AVX]);
    suite.add("the APIC bit follows IA32_APIC_BASE", KERNEL, |g| {
        let end = g.run(|a| {
            a.mov(ecx, msr::IA32_APIC_BASE)?;
            a.rdmsr()?;
            a.and(eax, !(base::EN as i32))?;
            a.wrmsr()?;
            a.mov(eax, 1)?;
            a.cpuid()
        })?;
        end.done()?;
        equal("APIC bit", end.gpr(gpr::RDX) >> 9 & 1, 0)
    });
    suite.add("CPUID clears the upper halves of its registers", WIDE, |g| {
        for n in [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX] {
            g.state.gpr[n] = 0xffff_ffff_0000_0000;
        }
        let end = g.run(|a| a.cpuid())?;
        end.done()?;
        let upper = [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX].map(|n| end.gpr(n) >> 32);
        equal("upper halves", upper, [0; 4])
    });
    suite.add("the hypervisor bit is set", &[Mode::Long, Mode::User], |g| {
        g.state.gpr[gpr::RAX] = 1;
        let end = g.run(|a| a.cpuid())?;
        equal("hypervisor bit", end.gpr(gpr::RCX) >> 31, 1)
    });
}

/// RDMSR or WRMSR of `number`, with EDX:EAX = `value`.
fn with(g: &mut Guest, number: u32, value: u64) {
    g.state.gpr[gpr::RCX] = number.into();
    g.state.gpr[gpr::RAX] = value & 0xffff_ffff;
    g.state.gpr[gpr::RDX] = value >> 32;
}

fn msrs(suite: &mut Suite) {
    const HIGH: u64 = 0xffff_8123_4567_89ab;
    let kept: &[(&str, u32, u64)] = &[
        ("SYSENTER_CS", msr::SYSENTER_CS, 0x1234),
        ("SYSENTER_ESP", msr::SYSENTER_ESP, HIGH),
        ("SYSENTER_EIP", msr::SYSENTER_EIP, HIGH),
        ("PAT", msr::IA32_PAT, 0x0007_0106_0500_0406),
        ("STAR", msr::STAR, 0x0123_4567_89ab_cdef),
        ("LSTAR", msr::LSTAR, HIGH),
        ("CSTAR", msr::CSTAR, HIGH),
        ("SFMASK", msr::SFMASK, 0x4_7700),
        ("FS_BASE", msr::FS_BASE, HIGH),
        ("GS_BASE", msr::GS_BASE, HIGH),
        ("KERNEL_GS_BASE", msr::KERNEL_GS_BASE, HIGH),
    ];
    for &(name, number, value) in kept {
        suite.add(format!("{name} reads back what was written"), KERNEL, move |g| {
            with(g, number, value);
            let end = g.run(|a| {
                a.wrmsr()?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.rdmsr()
            })?;
            end.registers(&[(gpr::RAX, value & 0xffff_ffff), (gpr::RDX, value >> 32)])
        });
    }
    suite
        .add("TSC_AUX is what RDTSCP returns", KERNEL, |g| {
            with(g, msr::TSC_AUX, 0x1234_5678);
            let end = g.run(|a| {
                a.wrmsr()?;
                a.rdtscp()
            })?;
            end.registers(&[(gpr::RCX, 0x1234_5678)])
        })
        .needs(&[Need::RDTSCP]);
    suite
        .add("TSC_AUX is what RDPID returns", WIDE, |g| {
            g.state.set_msr(msr::TSC_AUX, 0x77);
            g.run(|a| a.rdpid(rax))?.registers(&[(gpr::RAX, 0x77)])
        })
        .needs(&[Need::RDPID]);
    suite.add("RDMSR clears the upper halves of RAX and RDX", KERNEL, |g| {
        (g.state.gpr[gpr::RAX], g.state.gpr[gpr::RDX]) = (u64::MAX, u64::MAX);
        g.state.gpr[gpr::RCX] = 0xffff_ffff_0000_0000 | u64::from(msr::STAR);
        g.state.set_msr(msr::STAR, 0x1111_2222_3333_4444);
        g.run(|a| a.rdmsr())?.registers(&[(gpr::RAX, 0x3333_4444), (gpr::RDX, 0x1111_2222)])
    });
    // 10Bh is FLUSH_CMD: no model shows L1D_FLUSH.
    for number in [0x10b, 0x7777, 0x8000_0000, 0xc000_0000, 0xffff_ffff] {
        suite.add(format!("RDMSR of {number:#x}, which does not exist, is #GP"), KERNEL, move |g| {
            with(g, number, 0);
            g.run(|a| a.rdmsr())?.gp0()
        });
        suite.add(format!("WRMSR of {number:#x}, which does not exist, is #GP"), KERNEL, move |g| {
            with(g, number, 0);
            g.run(|a| a.wrmsr())?.gp0()
        });
    }
    const LOW: u64 = 0x8000_0000_0000;
    let refused: &[(&str, u32, u64)] = &[
        ("a non-canonical LSTAR", msr::LSTAR, LOW),
        ("a non-canonical FS_BASE", msr::FS_BASE, LOW),
        ("a non-canonical GS_BASE", msr::GS_BASE, LOW),
        ("a non-canonical KERNEL_GS_BASE", msr::KERNEL_GS_BASE, LOW),
        ("a PAT of type 2", msr::IA32_PAT, 2),
        ("a PAT of type 8", msr::IA32_PAT, 8 << 56),
        ("EFER with LME changed while paging", msr::EFER, efer::SCE | efer::NXE),
        ("EFER with a reserved bit", msr::EFER, efer::LME | efer::LMA | efer::SCE | 1 << 2),
        ("APIC_BASE with a reserved bit", msr::IA32_APIC_BASE, 0xfee0_0901),
        ("APIC_BASE with EXTD but not EN", msr::IA32_APIC_BASE, 0xfee0_0500),
    ];
    for &(name, number, value) in refused {
        suite.add(format!("{name} is #GP"), KERNEL, move |g| {
            with(g, number, value);
            g.run(|a| a.wrmsr())?.gp0()
        });
    }
    suite.add("EFER.LMA is read-only", &[Mode::Protected], |g| {
        with(g, msr::EFER, efer::SCE | efer::NXE);
        let end = g.run(|a| {
            a.wrmsr()?;
            a.rdmsr()
        })?;
        end.registers(&[(gpr::RAX, efer::SCE | efer::NXE)])
    });
    suite.add("EFER shows LME and LMA in long mode", KERNEL, |g| {
        with(g, msr::EFER, 0);
        g.run(|a| a.rdmsr())?.registers(&[(gpr::RAX, efer::LME | efer::LMA | efer::SCE | efer::NXE)])
    });
    suite.add("FS_BASE moves FS", KERNEL, |g| {
        with(g, msr::FS_BASE, place::DATA);
        g.write_u64(place::DATA + 8, 0x42);
        let end = g.run(|a| {
            a.wrmsr()?;
            a.mov(ebx, 8)?;
            a.mov(rax, qword_ptr(rbx).fs())
        })?;
        end.registers(&[(gpr::RAX, 0x42)])
    });
    suite.add("SWAPGS swaps the bases", KERNEL, |g| {
        g.state.segments.seg[index::GS].base = 0x1111;
        g.state.set_msr(msr::KERNEL_GS_BASE, 0x2222);
        let end = g.run(|a| a.swapgs())?;
        end.done()?;
        equal("GS base", end.state.segments.seg[index::GS].base, 0x2222)?;
        equal("KERNEL_GS_BASE", end.state.msr(msr::KERNEL_GS_BASE), Some(0x1111))
    });
    suite
        .add("RDFSBASE, WRFSBASE and their like", WIDE, |g| {
            g.state.cr4 |= cr4::FSGSBASE;
            g.state.segments.seg[index::GS].base = 0xffff_8000_0000_1234;
            g.state.gpr[gpr::RAX] = 0x1_0000_5678;
            let end = g.run(|a| {
                a.wrfsbase(rax)?;
                a.rdfsbase(rbx)?;
                a.rdgsbase(rcx)?;
                a.wrgsbase(eax)?;
                a.rdgsbase(rdx)
            })?;
            let values = [(gpr::RBX, 0x1_0000_5678), (gpr::RCX, 0xffff_8000_0000_1234), (gpr::RDX, 0x5678)];
            end.registers(&values)
        })
        .needs(&[Need::FSGSBASE]);
    suite
        .add("WRGSBASE of a non-canonical address is #GP", WIDE, |g| {
            g.state.cr4 |= cr4::FSGSBASE;
            g.state.gpr[gpr::RAX] = LOW;
            g.run(|a| a.wrgsbase(rax))?.gp0()
        })
        .needs(&[Need::FSGSBASE]);
}

fn control(suite: &mut Suite) {
    suite.add("CR2 holds what is written", KERNEL, |g| {
        g.state.gpr[gpr::RAX] = 0xffff_8000_1234_5678;
        let end = g.run(|a| {
            a.mov(cr2, rax)?;
            a.mov(rbx, cr2)
        })?;
        end.registers(&[(gpr::RBX, 0xffff_8000_1234_5678)])
    });
    let cr0_now = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    let rows: &[(&str, u64)] = &[
        ("PG without PE", cr0_now & !cr0::PE),
        ("NW without CD", cr0_now | cr0::NW),
        ("a bit above 31", cr0_now | 1 << 32),
    ];
    for &(name, value) in rows {
        suite.add(format!("CR0 with {name} is #GP"), KERNEL, move |g| {
            g.state.gpr[gpr::RAX] = value;
            g.run(|a| a.mov(cr0, rax))?.gp0()
        });
    }
    suite.add("clearing CR0.PG in 64-bit code is #GP", KERNEL, move |g| {
        g.state.gpr[gpr::RAX] = cr0_now & !cr0::PG;
        g.run(|a| a.mov(cr0, rax))?.gp0()
    });
    suite.add("CR0.ET is always one", &[Mode::Real, Mode::Protected], |g| {
        let end = g.run(|a| {
            a.mov(eax, cr0)?;
            a.and(eax, !(cr0::ET as i32))?;
            a.mov(cr0, eax)?;
            a.mov(ebx, cr0)
        })?;
        end.done()?;
        equal("ET", end.gpr(gpr::RBX) & cr0::ET, cr0::ET)
    });
    suite.add("reserved bits of CR0 below 32 are ignored", KERNEL, move |g| {
        g.state.gpr[gpr::RAX] = cr0_now | 1 << 7;
        let end = g.run(|a| {
            a.mov(cr0, rax)?;
            a.mov(rbx, cr0)
        })?;
        end.registers(&[(gpr::RBX, cr0_now)])
    });
    for (name, bit) in [("a reserved bit", 1u64 << 15), ("a bit above 31", 1 << 33)] {
        suite.add(format!("CR4 with {name} is #GP"), KERNEL, move |g| {
            g.state.gpr[gpr::RAX] = cr4::PAE | cr4::OSFXSR | bit;
            g.run(|a| a.mov(cr4, rax))?.gp0()
        });
    }
    suite.add("clearing CR4.PAE in long mode is #GP", KERNEL, |g| {
        g.state.gpr[gpr::RAX] = cr4::OSFXSR;
        g.run(|a| a.mov(cr4, rax))?.gp0()
    });
    suite.add("CR3 with bits beyond physical addresses is #GP", KERNEL, |g| {
        g.state.gpr[gpr::RAX] = 1 << 55 | place::PML4;
        g.run(|a| a.mov(cr3, rax))?.gp0()
    });
    suite.add("CR3 reads back with its PWT and PCD bits", KERNEL, |g| {
        g.state.gpr[gpr::RAX] = place::PML4 | 0x18;
        let end = g.run(|a| {
            a.mov(cr3, rax)?;
            a.mov(rbx, cr3)
        })?;
        end.registers(&[(gpr::RBX, place::PML4 | 0x18)])
    });
    suite.add("SMSW and LMSW", &[Mode::Real, Mode::Protected], |g| {
        let end = g.run(|a| {
            a.smsw(ax)?;
            a.or(ax, 8)?; // TS
            a.lmsw(ax)?;
            a.smsw(bx)
        })?;
        end.done()?;
        equal("TS", end.gpr(gpr::RBX) & cr0::TS, cr0::TS)
    });
    suite.add("LMSW cannot leave protected mode", &[Mode::Protected], |g| {
        let end = g.run(|a| {
            a.xor(eax, eax)?;
            a.lmsw(ax)?;
            a.mov(ebx, cr0)
        })?;
        end.done()?;
        equal("PE", end.gpr(gpr::RBX) & cr0::PE, cr0::PE)
    });
    suite.add("the operand size of MOV from CR0 is 64 bits", KERNEL, |g| {
        g.state.gpr[gpr::RBX] = u64::MAX;
        // With an operand-size prefix, which means nothing here.
        g.run(|a| a.db(&[0x66, 0x0f, 0x20, 0xc3]))?.registers(&[(gpr::RBX, 0x8001_0033)])
    });
    suite.add("mod bits of MOV CR are ignored", KERNEL, |g| {
        g.run(|a| a.db(&[0x0f, 0x20, 0x03]))?.registers(&[(gpr::RBX, 0x8001_0033)])
    });
}

fn tsc(suite: &mut Suite) {
    suite.add("it goes up", &[Mode::Real, Mode::ProtectedUser, Mode::Long, Mode::User], |g| {
        let end = g.run(|a| {
            a.rdtsc()?;
            a.mov(esi, eax)?;
            a.mov(ebp, edx)?;
            a.rdtsc()
        })?;
        end.done()?;
        let first = end.gpr(gpr::RBP) << 32 | end.gpr(gpr::RSI);
        let second = end.gpr(gpr::RDX) << 32 | end.gpr(gpr::RAX) & 0xffff_ffff;
        ensure(second > first, || format!("{first:#x}, then {second:#x}"))
    });
    suite.add("a write moves it", KERNEL, |g| {
        with(g, msr::IA32_TSC, 0x10_0000_0000_0000);
        let end = g.run(|a| {
            a.wrmsr()?;
            a.rdtsc()
        })?;
        end.done()?;
        let now = end.gpr(gpr::RDX) << 32 | end.gpr(gpr::RAX);
        ensure((0x10_0000_0000_0000..0x10_1000_0000_0000).contains(&now), || format!("{now:#x}"))
    });
    suite.add("it is part of the state", KERNEL, |g| {
        g.state.set_msr(msr::IA32_TSC, 0x20_0000_0000_0000);
        let end = g.run(|a| a.rdtsc())?;
        end.done()?;
        let now = end.gpr(gpr::RDX) << 32 | end.gpr(gpr::RAX);
        ensure((0x20_0000_0000_0000..0x20_1000_0000_0000).contains(&now), || format!("{now:#x}"))
    });
    suite
        .add("TSC_ADJUST moves it and shows writes to it", KERNEL, |g| {
            with(g, msr::IA32_TSC_ADJUST, 0x1_0000_0000_0000);
            g.state.set_msr(msr::IA32_TSC, 0x20_0000_0000_0000);
            g.state.set_msr(msr::IA32_TSC_ADJUST, 0);
            let end = g.run(|a| {
                a.wrmsr()?;
                a.rdtsc()?;
                a.mov(esi, edx)?;
                a.rdmsr()
            })?;
            end.registers(&[(gpr::RAX, 0), (gpr::RDX, 0x1_0000)])?;
            equal("upper half of the TSC", end.gpr(gpr::RSI) >> 12, 0x21_0000 >> 12)
        })
        .needs(&[Need::TSC_ADJUST]);
}
