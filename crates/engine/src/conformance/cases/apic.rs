//! The local APIC as guests use it: registers by memory and by MSR, IPIs to self, the timer in its three
//! modes (SDM vol. 3A chapter 10).

use super::super::{Guest, Mismatch};
use super::interrupts::{enable_apic, returns_from_nmi, set_apic};
use super::prelude::*;
use anyvisor_x86::lapic::reg;
use iced_x86::IcedError;

const KERNEL: &[Mode] = &[Mode::Long];

pub fn add(suite: &mut Suite) {
    registers(suite.group("local APIC"));
    x2apic(suite.group("x2APIC"));
    ipis(suite.group("IPI to self"));
    timer(suite.group("APIC timer"));
}

/// `mov reg32, [APIC + register]` with RBX at the APIC.
fn at(register: u32) -> AsmMemoryOperand {
    dword_ptr(rbx + register as i32)
}

/// The APIC enabled, RBX at its registers.
pub(super) fn setup(g: &mut Guest) {
    enable_apic(g);
    g.state.gpr[gpr::RBX] = place::APIC;
}

fn registers(suite: &mut Suite) {
    suite.add("ID, version and the number of LVT entries", KERNEL, |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(eax, at(reg::ID))?;
            a.mov(ecx, at(reg::VERSION))
        })?;
        end.done()?;
        equal("ID", end.gpr(gpr::RAX), 0)?;
        equal("version", end.gpr(gpr::RCX) & 0xf0, 0x10)?;
        ensure((3..=6).contains(&(end.gpr(gpr::RCX) >> 16 & 0xff)), || format!("version {:#x}", end.gpr(gpr::RCX)))
    });
    suite.add("after reset it is disabled and its LVT masked", KERNEL, |g| {
        g.state.gpr[gpr::RBX] = place::APIC;
        let end = g.run(|a| {
            a.mov(eax, at(reg::SVR))?;
            a.mov(ecx, at(reg::LVT_TIMER))?;
            a.mov(edx, at(reg::DFR))
        })?;
        end.registers(&[(gpr::RAX, 0xff), (gpr::RCX, 0x1_0000), (gpr::RDX, 0xffff_ffff)])
    });
    suite.add("registers hold what is written", KERNEL, |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(at(reg::TPR), 0x40)?;
            a.mov(at(reg::LVT_ERROR), 0xfe)?;
            a.mov(at(reg::LDR), 0x1200_0000)?;
            a.mov(at(reg::DIVIDE), 0xb)?;
            a.mov(eax, at(reg::TPR))?;
            a.mov(ecx, at(reg::LVT_ERROR))?;
            a.mov(edx, at(reg::LDR))?;
            a.mov(esi, at(reg::DIVIDE))
        })?;
        end.registers(&[(gpr::RAX, 0x40), (gpr::RCX, 0xfe), (gpr::RDX, 0x1200_0000), (gpr::RSI, 0xb)])
    });
    suite.add("accesses reach no device", KERNEL, |g| {
        setup(g);
        g.run(|a| a.mov(eax, at(reg::TPR)))?.saw(&[])
    });
    suite.add("disabling it by SVR masks the LVT", KERNEL, |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(at(reg::LVT_ERROR), 0xfe)?;
            a.mov(at(reg::SVR), 0xff)?;
            a.mov(eax, at(reg::LVT_ERROR))
        })?;
        end.registers(&[(gpr::RAX, 0x1_00fe)])
    });
    suite.add("IRR shows what waits and ISR what is handled", KERNEL, |g| {
        setup(g);
        g.handler(0x51, |a| {
            a.mov(ecx, at(reg::IRR + 0x20))?;
            a.mov(edx, at(reg::ISR + 0x20))?;
            a.mov(esi, at(reg::PPR))
        })?;
        // A self-IPI with IF clear, then STI.
        let end = g.run(|a| {
            a.mov(at(reg::ICR_LOW), 0x4_0051)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.mov(eax, at(reg::IRR + 0x20))?;
            a.test(eax, eax)?;
            a.je(wait)?;
            a.sti()?;
            a.nop()?;
            a.nop()
        })?;
        let bit = 1 << (0x51 % 32);
        let seen = [gpr::RAX, gpr::RCX, gpr::RDX, gpr::RSI].map(|n| end.gpr(n));
        equal("IRR before, IRR and ISR and PPR in the handler", seen, [bit, 0, bit, 0x50])
    });
    suite.add("APIC base: BSP and enabled", KERNEL, |g| {
        g.state.gpr[gpr::RCX] = msr::IA32_APIC_BASE.into();
        g.run(|a| a.rdmsr())?.registers(&[(gpr::RAX, 0xfee0_0900), (gpr::RDX, 0)])
    });
    suite.add("a disabled APIC is memory of devices", KERNEL, |g| {
        g.state.gpr[gpr::RCX] = msr::IA32_APIC_BASE.into();
        g.state.gpr[gpr::RAX] = 0xfee0_0100;
        g.state.gpr[gpr::RBX] = place::APIC;
        g.io.answer(&[0x77]);
        let end = g.run(|a| {
            a.wrmsr()?;
            a.mov(eax, at(reg::VERSION))
        })?;
        end.registers(&[(gpr::RAX, 0x77)])?;
        end.saw(&[Access::Read { gpa: place::APIC + u64::from(reg::VERSION), size: 4 }])
    });
}

fn x2apic(suite: &mut Suite) {
    let enable = |a: &mut CodeAssembler| {
        a.mov(ecx, msr::IA32_APIC_BASE)?;
        a.mov(eax, 0xfee0_0d00u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()
    };
    suite
        .add("registers are MSRs", KERNEL, move |g| {
            enable_apic(g);
            let end = g.run(|a| {
                enable(a)?;
                a.mov(ecx, 0x808)?;
                a.mov(eax, 0x30)?;
                a.wrmsr()?;
                a.xor(eax, eax)?;
                a.rdmsr()?;
                a.mov(rbx, cr8)
            })?;
            end.registers(&[(gpr::RAX, 0x30), (gpr::RDX, 0), (gpr::RBX, 3)])
        })
        .needs(&[Need::X2APIC]);
    suite
        .add("LDR follows from the ID", KERNEL, move |g| {
            let end = g.run(|a| {
                enable(a)?;
                a.mov(ecx, 0x80d)?;
                a.rdmsr()
            })?;
            end.registers(&[(gpr::RAX, 1), (gpr::RDX, 0)])
        })
        .needs(&[Need::X2APIC]);
    suite
        .add("a register that does not exist is #GP", KERNEL, move |g| {
            g.run(|a| {
                enable(a)?;
                a.mov(ecx, 0x80e)?; // DFR
                a.rdmsr()
            })?
            .gp0()
        })
        .needs(&[Need::X2APIC]);
    suite
        .add("a write to a read-only register is #GP", KERNEL, move |g| {
            g.run(|a| {
                enable(a)?;
                a.mov(ecx, 0x802)?; // ID
                a.wrmsr()
            })?
            .gp0()
        })
        .needs(&[Need::X2APIC]);
    suite
        .add("reserved bits are #GP", KERNEL, move |g| {
            g.run(|a| {
                enable(a)?;
                a.mov(ecx, 0x808)?;
                a.mov(eax, 0x100)?;
                a.wrmsr()
            })?
            .gp0()
        })
        .needs(&[Need::X2APIC]);
    suite.add("MSRs are #GP in xAPIC mode", KERNEL, |g| {
        g.state.gpr[gpr::RCX] = 0x808;
        g.run(|a| a.rdmsr())?.gp0()
    });
    suite
        .add("from x2APIC back to xAPIC mode is #GP", KERNEL, move |g| {
            g.run(|a| {
                enable(a)?;
                a.mov(eax, 0xfee0_0900u32)?;
                a.wrmsr()
            })?
            .gp0()
        })
        .needs(&[Need::X2APIC]);
    suite
        .add("SELF IPI", KERNEL, move |g| {
            enable_apic(g);
            g.state.rflags |= rflags::IF;
            let end = g.run(|a| {
                enable(a)?;
                a.mov(ecx, 0x83f)?;
                a.mov(eax, 0x77)?;
                a.wrmsr()?;
                a.db(&[0xeb, 0xfe])
            })?;
            end.vectored(0x77).map(drop)
        })
        .needs(&[Need::X2APIC]);
    suite
        .add("ICR to its own ID, and EOI", KERNEL, move |g| {
            enable_apic(g);
            g.handler(0x61, |a| {
                a.inc(rbx)?;
                a.mov(ecx, 0x80b)?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.wrmsr()?;
                a.iretq()
            })?;
            let end = g.run(|a| {
                enable(a)?;
                for _ in 0..2 {
                    a.mov(ecx, 0x830)?;
                    a.mov(eax, 0x4061)?;
                    a.xor(edx, edx)?;
                    a.wrmsr()?;
                    a.sti()?;
                    a.nop()?;
                    a.nop()?;
                    a.cli()?;
                }
                a.nop()
            })?;
            end.registers(&[(gpr::RBX, 2)])
        })
        .needs(&[Need::X2APIC]);
}

fn ipis(suite: &mut Suite) {
    // ICR low: shorthand self (01 in bits 19:18), all including self (10), all but self (11).
    for (name, command, arrives) in [
        ("the self shorthand", 0x4_0055, true),
        ("all including self", 0x8_0055, true),
        ("all but self does not arrive", 0xc_0055, false),
        ("by physical ID", 0x0_0055, true),
    ] {
        suite.add(name, KERNEL, move |g| {
            setup(g);
            g.state.rflags |= rflags::IF;
            let end = g.run(|a| {
                a.mov(at(reg::ICR_HIGH), 0)?;
                a.mov(at(reg::ICR_LOW), command)?;
                // Time to arrive, and an end for what does not.
                a.mov(ecx, 1000)?;
                let mut wait = a.create_label();
                a.set_label(&mut wait)?;
                a.dec(ecx)?;
                a.jne(wait)
            })?;
            if arrives { end.vectored(0x55).map(drop) } else { end.done() }
        });
    }
    suite.add("an NMI", KERNEL, |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(at(reg::ICR_HIGH), 0)?;
            a.mov(at(reg::ICR_LOW), 0x400)?;
            a.db(&[0xeb, 0xfe])
        })?;
        returns_from_nmi(g, &end)
    });
    suite.add("by logical destination", KERNEL, |g| {
        setup(g);
        set_apic(g, reg::LDR, 0x0200_0000);
        g.state.rflags |= rflags::IF;
        let end = g.run(|a| {
            a.mov(at(reg::ICR_HIGH), 0x0600_0000)?;
            a.mov(at(reg::ICR_LOW), 0x856)?;
            a.db(&[0xeb, 0xfe])
        })?;
        end.vectored(0x56).map(drop)
    });
    suite.add("the delivery status is idle", KERNEL, |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(at(reg::ICR_LOW), 0x4_0055)?;
            a.mov(eax, at(reg::ICR_LOW))?;
            a.and(eax, 0x1000)
        })?;
        end.registers(&[(gpr::RAX, 0)])
    });
}

/// Ticks that [`await_ticks`] waits for, in RDX.
pub(super) const TICKS: u64 = 5;

/// Vector 40h counts in RDX. RBX points to the local APIC, here and below.
pub(super) fn ticks_handler(g: &mut Guest) -> Result<u64, Mismatch> {
    g.handler(0x40, |a| {
        a.inc(rdx)?;
        a.mov(at(reg::EOI), 0)?;
        a.iretq()
    })
}

/// Starts a periodic timer with vector 40h.
pub(super) fn start_ticks(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(at(reg::DIVIDE), 0xb)?;
    a.mov(at(reg::LVT_TIMER), 0x2_0040)?;
    a.mov(at(reg::INITIAL_COUNT), 2_000_000)
}

/// Halts until there have been [`TICKS`].
pub(super) fn await_ticks(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.sti()?;
    a.hlt()?;
    a.cli()?;
    a.cmp(rdx, TICKS as i32)?;
    a.jb(wait)
}

fn timer(suite: &mut Suite) {
    suite.add("one-shot", KERNEL, |g| {
        setup(g);
        g.state.rflags |= rflags::IF;
        let end = g.run(|a| {
            a.mov(at(reg::DIVIDE), 0xb)?;
            a.mov(at(reg::LVT_TIMER), 0x40)?;
            a.mov(at(reg::INITIAL_COUNT), 1_000_000)?;
            a.db(&[0xeb, 0xfe])
        })?;
        end.vectored(0x40).map(drop)
    });
    suite.add("one-shot wakes HLT", KERNEL, |g| {
        setup(g);
        g.run(|a| {
            a.mov(at(reg::DIVIDE), 0xb)?;
            a.mov(at(reg::LVT_TIMER), 0x40)?;
            a.mov(at(reg::INITIAL_COUNT), 1_000_000)?;
            a.sti()?;
            a.hlt()
        })?
        .trap(0x40)
    });
    suite.add("the current count runs down to zero and stays", KERNEL, |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(at(reg::DIVIDE), 0xb)?;
            a.mov(at(reg::LVT_TIMER), 0x1_0040)?;
            a.mov(at(reg::INITIAL_COUNT), 10_000_000)?;
            a.mov(esi, at(reg::CURRENT_COUNT))?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.mov(eax, at(reg::CURRENT_COUNT))?;
            a.test(eax, eax)?;
            a.jne(wait)?;
            a.mov(ecx, at(reg::CURRENT_COUNT))?;
            a.mov(edx, at(reg::IRR + 0x20))
        })?;
        end.registers(&[(gpr::RAX, 0), (gpr::RCX, 0), (gpr::RDX, 0)])?;
        let first = end.gpr(gpr::RSI);
        ensure(first > 0 && first <= 10_000_000, || format!("the first count is {first}"))
    });
    suite.add("an initial count of zero stops it", KERNEL, |g| {
        setup(g);
        let end = g.run(|a| {
            a.mov(at(reg::DIVIDE), 0xb)?;
            a.mov(at(reg::LVT_TIMER), 0x40)?;
            a.mov(at(reg::INITIAL_COUNT), 100_000_000)?;
            a.mov(at(reg::INITIAL_COUNT), 0)?;
            a.mov(eax, at(reg::CURRENT_COUNT))
        })?;
        end.registers(&[(gpr::RAX, 0)])
    });
    suite.add("periodic", KERNEL, |g| {
        setup(g);
        ticks_handler(g)?;
        let end = g.run(|a| {
            start_ticks(a)?;
            await_ticks(a)
        })?;
        end.done()?;
        ensure(end.gpr(gpr::RDX) >= TICKS, || format!("{} ticks", end.gpr(gpr::RDX)))
    });
    suite.add("a masked timer interrupts nothing", KERNEL, |g| {
        setup(g);
        g.state.rflags |= rflags::IF;
        let end = g.run(|a| {
            a.mov(at(reg::DIVIDE), 0xb)?;
            a.mov(at(reg::LVT_TIMER), 0x1_0040)?;
            a.mov(at(reg::INITIAL_COUNT), 100_000)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.mov(eax, at(reg::CURRENT_COUNT))?;
            a.test(eax, eax)?;
            a.jne(wait)?;
            a.nop()
        })?;
        end.done()
    });
    // RDTSC plus a little into the deadline MSR. Guests' TSCs tick at 1 to 5 GHz.
    let deadline = |a: &mut CodeAssembler, cycles: i32| {
        a.mov(at(reg::LVT_TIMER), 0x4_0040)?;
        a.rdtsc()?;
        a.add(eax, cycles)?;
        a.adc(edx, 0)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.wrmsr()
    };
    suite
        .add("TSC deadline", KERNEL, move |g| {
            setup(g);
            g.run(|a| {
                deadline(a, 2_000_000)?;
                a.sti()?;
                a.hlt()
            })?
            .trap(0x40)
        })
        .needs(&[Need::TSC_DEADLINE]);
    suite
        .add("a TSC deadline in the past comes at once", KERNEL, move |g| {
            setup(g);
            g.state.rflags |= rflags::IF;
            let end = g.run(|a| {
                deadline(a, 0)?;
                a.db(&[0xeb, 0xfe])
            })?;
            end.vectored(0x40).map(drop)
        })
        .needs(&[Need::TSC_DEADLINE]);
    suite
        .add("a TSC deadline reads back until it is over", KERNEL, move |g| {
            setup(g);
            let end = g.run(|a| {
                a.mov(at(reg::LVT_TIMER), 0x4_0040)?;
                a.mov(ecx, msr::TSC_DEADLINE)?;
                a.mov(eax, 0x1234)?;
                a.mov(edx, 0x7fff_0000)?;
                a.wrmsr()?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.rdmsr()?;
                a.mov(esi, eax)?;
                a.mov(ebp, edx)?;
                // Now one that is over: it reads as zero once the interrupt is there.
                deadline(a, 0)?;
                let mut wait = a.create_label();
                a.set_label(&mut wait)?;
                a.cmp(at(reg::IRR + 0x20), 0)?;
                a.je(wait)?;
                a.rdmsr()
            })?;
            end.registers(&[(gpr::RSI, 0x1234), (gpr::RBP, 0x7fff_0000), (gpr::RAX, 0), (gpr::RDX, 0)])
        })
        .needs(&[Need::TSC_DEADLINE]);
    suite
        .add("a TSC deadline outside its mode is ignored", KERNEL, move |g| {
            setup(g);
            let end = g.run(|a| {
                a.mov(at(reg::LVT_TIMER), 0x40)?;
                a.mov(ecx, msr::TSC_DEADLINE)?;
                a.mov(eax, 0x1234)?;
                a.mov(edx, 0x7fff_0000)?;
                a.wrmsr()?;
                a.rdmsr()
            })?;
            end.registers(&[(gpr::RAX, 0), (gpr::RDX, 0)])
        })
        .needs(&[Need::TSC_DEADLINE]);
}
