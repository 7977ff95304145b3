//! What a VM does for its machine: the log of written pages, and guest time.
//!
//! An engine may log a page that the guest has read and could have written without the engine's notice; pages
//! that the guest has not touched are not in the log.

use super::super::{Guest, Mismatch};
use super::prelude::*;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

pub fn add(suite: &mut Suite) {
    dirty(suite.group("dirty log"));
    clock(suite.group("guest time"));
}

/// The guest-physical addresses of pages in the log, in order.
fn taken(g: &Guest) -> Result<Vec<u64>, Mismatch> {
    let mut pages: Vec<u64> = g.vm.take_dirty()?.addresses().collect();
    pages.sort_unstable();
    Ok(pages)
}

/// `page` is in the log and `others` are not.
fn logged(g: &Guest, page: u64, others: &[u64]) -> Verdict {
    let pages = taken(g)?;
    ensure(pages.contains(&page), || format!("{page:#x} is not among {pages:x?}"))?;
    match others.iter().find(|other| pages.contains(other)) {
        Some(other) => Err(Mismatch(format!("{other:#x} was not touched but is among {pages:x?}"))),
        None => Ok(()),
    }
}

fn dirty(suite: &mut Suite) {
    const MODES: &[Mode] = &[Mode::Real, Mode::Protected, Mode::Long, Mode::User];
    suite.add("a store logs its page and none that the guest has not touched", MODES, |g| {
        g.vm.log_dirty(true)?;
        let end = g.run(|a| match a.bitness() {
            16 => a.mov(byte_ptr(di), al),
            _ => a.mov(byte_ptr(edi), al),
        })?;
        end.done()?;
        logged(g, place::DATA, &[place::DATA + 0x1000, place::MORE_CODE, place::HIGH_RAM])
    });
    suite.add("what is taken is gone, and a new store is logged again", &[Mode::Long, Mode::User], |g| {
        g.vm.log_dirty(true)?;
        g.load(|a| a.mov(qword_ptr(rdi), rax))?;
        g.start()?.done()?;
        logged(g, place::DATA, &[])?;
        equal("taken again", taken(g)?, vec![])?;
        g.start()?.done()?;
        logged(g, place::DATA, &[])
    });
    suite.add("a store to a page that was written before logging", &[Mode::Long, Mode::User], |g| {
        // The same block, the same page: whatever the engine keeps of both must not hide the second store.
        g.load(|a| a.mov(qword_ptr(rdi), rax))?;
        g.start()?.done()?;
        g.vm.log_dirty(true)?;
        g.vcpu.set_state(&g.state)?;
        g.resume()?.done()?;
        logged(g, place::DATA, &[])
    });
    suite.add("a guest that goes on without a new state", &[Mode::Long], |g| {
        let kicker = g.vcpu.kicker();
        g.io.on_out(0x80, move || kicker.kick());
        let end = g.run(|a| {
            a.mov(qword_ptr(rdi), rax)?;
            a.out(0x80, al)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.cmp(qword_ptr(rdi + 0x1000), 0)?;
            a.je(wait)?;
            a.mov(qword_ptr(rdi), rax)
        })?;
        equal("exit", &end.exit, &crate::Exit::Kicked)?;
        g.vm.log_dirty(true)?;
        g.write_u64(place::DATA + 0x1000, 1);
        g.resume()?.done()?;
        logged(g, place::DATA, &[])
    });
    suite.add("a store across pages logs both", &[Mode::Long, Mode::User], |g| {
        g.vm.log_dirty(true)?;
        g.run(|a| a.mov(qword_ptr(rdi + 0xffc), rax))?.done()?;
        let pages = taken(g)?;
        let both = [place::DATA, place::DATA + 0x1000].iter().all(|page| pages.contains(page));
        ensure(both, || format!("{pages:x?}"))
    });
    suite.add("string, vector, locked stores and pushes", &[Mode::Long, Mode::User], |g| {
        g.vm.log_dirty(true)?;
        g.state.gpr[gpr::RCX] = 0x3000;
        g.state.gpr[gpr::RBX] = place::MORE_CODE;
        let end = g.run(|a| {
            a.rep().stosb()?;
            a.movups(xmmword_ptr(rbx + 0x10), xmm0)?;
            a.lock().inc(qword_ptr(rbx + 0x1000))?;
            a.push(rax)
        })?;
        end.done()?;
        let pages = taken(g)?;
        let data = place::DATA;
        let want =
            [data, data + 0x1000, data + 0x2000, place::MORE_CODE, place::MORE_CODE + 0x1000, place::STACK - 0x1000];
        match want.iter().find(|page| !pages.contains(page)) {
            Some(page) => Err(Mismatch(format!("{page:#x} is not among {pages:x?}"))),
            None => Ok(()),
        }
    });
    suite.add("the processor's own writes: accessed bits and frames", &[Mode::User], |g| {
        g.vm.log_dirty(true)?;
        g.run(|a| a.ud2())?.fault(vector::UD)?;
        let pages = taken(g)?;
        for page in [place::PT, place::KERNEL_STACK - 0x1000] {
            ensure(pages.contains(&page), || format!("{page:#x} is not among {pages:x?}"))?;
        }
        Ok(())
    });
    suite.add("a store by another mapping logs the physical page", &[Mode::Long, Mode::User], |g| {
        g.map(place::MORE_CODE, (place::DATA + 0x3000) | page::ALL);
        g.state.gpr[gpr::RDI] = place::MORE_CODE;
        g.vm.log_dirty(true)?;
        g.run(|a| a.mov(qword_ptr(rdi), rax))?.done()?;
        logged(g, place::DATA + 0x3000, &[place::MORE_CODE])
    });
    suite.add("a large page is logged by its 4 KiB pages", &[Mode::Long, Mode::User], |g| {
        g.state.gpr[gpr::RDI] = place::BIG_PAGE + 0x5000;
        g.vm.log_dirty(true)?;
        g.run(|a| a.mov(qword_ptr(rdi), rax))?.done()?;
        logged(g, place::BIG_PAGE + 0x5000, &[place::BIG_PAGE, place::BIG_PAGE + 0x6000])
    });
    suite.add("what devices wrote is logged, once", &[Mode::Long], |g| {
        let (first, last) = (place::DATA + 0x5000, place::HIGH_RAM);
        g.vm.memory_written(place::DATA + 0x7000, 1);
        g.vm.log_dirty(true)?;
        // Half of it is no RAM.
        g.vm.memory_written(first + 0xfff, 2);
        g.vm.memory_written(last - 0x1000, 0x1001);
        g.vm.memory_written(u64::MAX - 1, 2);
        equal("logged", taken(g)?, vec![first, first + 0x1000, last])?;
        equal("taken again", taken(g)?, vec![])
    });
    suite.add("what a device writes while the guest runs is logged", &[Mode::Long], |g| {
        g.vm.log_dirty(true)?;
        let (vm, memory) = (g.vm.clone(), g.memory.clone());
        let device = move || {
            memory.write_obj(2u64, GuestAddress(place::DATA + 0x5000)).expect("it is RAM");
            vm.memory_written(place::DATA + 0x5000, 8);
        };
        let end = g.run_while(device, |a| {
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.cmp(qword_ptr(rdi + 0x5000), 2)?;
            a.jne(wait)
        })?;
        end.done()?;
        logged(g, place::DATA + 0x5000, &[place::DATA + 0x6000])
    });
    suite.add("without logging there is nothing to take", &[Mode::Long], |g| {
        ensure(g.vm.take_dirty().is_err(), || "pages were taken".to_owned())?;
        g.vm.log_dirty(true)?;
        g.vm.log_dirty(false)?;
        ensure(g.vm.take_dirty().is_err(), || "pages were taken after logging stopped".to_owned())
    });
}

fn clock(suite: &mut Suite) {
    suite.add("it goes on", &[Mode::Long], |g| {
        let first = g.vm.clock()?;
        std::thread::sleep(Duration::from_millis(5));
        let second = g.vm.clock()?;
        ensure(second >= first + 5_000_000, || format!("{first} ns, then {second} ns"))
    });
    suite.add("it can be set", &[Mode::Long], |g| {
        const HOUR: u64 = 3_600_000_000_000;
        g.vm.set_clock(HOUR)?;
        let now = g.vm.clock()?;
        ensure((HOUR..HOUR + HOUR / 2).contains(&now), || format!("{now} ns"))
    });
    suite.add("it can be set back", &[Mode::Long], |g| {
        g.vm.set_clock(3_600_000_000_000)?;
        g.vm.set_clock(1_000)?;
        let now = g.vm.clock()?;
        ensure(now < 1_800_000_000_000, || format!("{now} ns"))
    });
    suite.add("the TSC's frequency is plausible", &[Mode::Long], |g| {
        let khz = g.vm.tsc_khz()?;
        // An emulated processor may be slow.
        ensure((1_000..100_000_000).contains(&khz), || format!("{khz} kHz"))
    });
}
