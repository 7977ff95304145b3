//! Code that changes: by the guest itself, through another mapping, by the host, on the page it runs on (SDM
//! vol. 3A 11.6: a jump after the store is enough on one processor).

use super::super::{End, Guest, Mismatch};
use super::prelude::*;
use iced_x86::IcedError;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

/// Puts `mov eax, value; ret` at `address`.
fn function(g: &Guest, address: u64, value: u8) {
    g.write(address, &[0xb8, value, 0, 0, 0, 0xc3]);
}

/// Calls a [`function`] at `address`, in RSI, before and after `change`, which makes it return 2 instead of 1.
fn called_around(
    g: &mut Guest,
    address: u64,
    change: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Verdict {
    function(g, address, 1);
    g.state.gpr[gpr::RSI] = address;
    let call = |a: &mut CodeAssembler| if a.bitness() == 64 { a.call(rsi) } else { a.call(esi) };
    let end = g.run(|a| {
        call(a)?;
        a.mov(ebx, eax)?;
        change(a)?;
        call(a)
    })?;
    end.registers(&[(gpr::RBX, 1), (gpr::RAX, 2)])
}

/// Calls what is in RSI, near the end of a page, three times, and once more when the next page is mapped elsewhere: the
/// results are in EBX and EAX.
fn called_around_remapping(g: &mut Guest) -> Result<End, Mismatch> {
    g.state.gpr[gpr::RBP] = place::PT + 8 * ((place::MORE_CODE >> 12) + 1);
    g.run(|a| {
        for _ in 0..3 {
            a.call(rsi)?;
        }
        a.mov(ebx, eax)?;
        a.add(qword_ptr(rbp), 0x1000)?;
        a.invlpg(byte_ptr(rsi + 8))?;
        a.call(rsi)
    })
}

/// How often [`changed_by_device`] changes the code.
const CHANGES: u8 = 50;

/// A device makes a function that the guest keeps calling return 1, 2, ..., and tells the guest in memory what it
/// returns now. The guest calls it once more for each, compares, and answers.
fn changed_by_device(g: &mut Guest) -> Verdict {
    function(g, place::MORE_CODE, 0);
    g.state.gpr[gpr::RSI] = place::MORE_CODE;
    let (vm, memory, patience) = (g.vm.clone(), g.memory.clone(), g.patience);
    let device = move || {
        let until = Instant::now() + patience;
        for n in 1..=CHANGES {
            for (gpa, value) in [(place::MORE_CODE + 1, n), (place::DATA, n)] {
                memory.write_obj(value, GuestAddress(gpa)).expect("it is RAM");
                vm.memory_written(gpa, 1);
            }
            while memory.read_obj::<u8>(GuestAddress(place::DATA + 8)).expect("it is RAM") != n {
                if Instant::now() > until {
                    return;
                }
                std::hint::spin_loop();
            }
        }
    };
    let end = g.run_while(device, |a| {
        let (mut again, mut out) = (a.create_label(), a.create_label());
        let wide = a.bitness() == 64;
        let call = |a: &mut CodeAssembler| if wide { a.call(rsi) } else { a.call(esi) };
        a.xor(ecx, ecx)?;
        a.set_label(&mut again)?;
        call(a)?;
        a.mov(bl, if wide { byte_ptr(rdi) } else { byte_ptr(edi) })?;
        a.cmp(bl, cl)?;
        a.je(again)?;
        a.mov(cl, bl)?;
        call(a)?;
        a.cmp(al, cl)?;
        a.jne(out)?;
        a.mov(if wide { byte_ptr(rdi + 8) } else { byte_ptr(edi + 8) }, cl)?;
        a.cmp(cl, i32::from(CHANGES))?;
        a.jne(again)?;
        a.set_label(&mut out)?;
        a.nop()
    })?;
    end.registers(&[(gpr::RAX, u64::from(CHANGES)), (gpr::RCX, u64::from(CHANGES))])
}

pub fn add(suite: &mut Suite) {
    suite.group("code that changes");
    suite.add("a store to code that ran before", PROTECTED_MODES, |g| {
        called_around(g, place::MORE_CODE, |a| match a.bitness() {
            64 => a.mov(byte_ptr(rsi + 1), 2),
            _ => a.mov(byte_ptr(esi + 1), 2),
        })
    });
    suite.add("a store to the next instruction", WIDE, |g| {
        // The instruction behind the store is replaced: the processor sees it, jump or not.
        let end = g.run(|a| {
            let mut next = a.create_label();
            a.lea(rsi, ptr(next))?;
            a.mov(byte_ptr(rsi + 1), 0x77)?;
            a.set_label(&mut next)?;
            a.mov(al, 0x11)
        })?;
        end.registers(&[(gpr::RAX, 0x77)])
    });
    suite.add("a loop that changes itself", WIDE, |g| {
        let end = g.run(|a| {
            let (mut again, mut patched) = (a.create_label(), a.create_label());
            a.mov(ecx, 100)?;
            a.lea(rsi, ptr(patched))?;
            a.set_label(&mut again)?;
            a.nop()?;
            a.set_label(&mut patched)?;
            a.mov(dl, 0)?; // its immediate counts
            a.add(ebx, edx)?;
            a.inc(byte_ptr(rsi + 1))?;
            a.dec(ecx)?;
            a.jne(again)
        })?;
        end.registers(&[(gpr::RBX, (0..100).sum())])
    });
    suite.add("a store through another mapping of the page", WIDE, |g| {
        g.map(place::MORE_CODE + 0x1000, place::MORE_CODE | page::ALL);
        called_around(g, place::MORE_CODE, |a| a.mov(byte_ptr(rsi + 0x1001), 2))
    });
    suite.add("a change by REP MOVSB", WIDE, |g| {
        function(g, place::DATA, 2);
        called_around(g, place::MORE_CODE, |a| {
            a.xchg(rsi, rdi)?;
            a.mov(ecx, 6)?;
            a.rep().movsb()?;
            a.lea(rsi, qword_ptr(rdi - 6))
        })
    });
    suite.add("a change by a vector store", WIDE, |g| {
        function(g, place::DATA, 2);
        called_around(g, place::MORE_CODE, |a| {
            a.movups(xmm0, xmmword_ptr(rdi))?;
            a.movups(xmmword_ptr(rsi), xmm0)
        })
    });
    suite.add("a change by a push", WIDE, |g| {
        g.state.gpr[gpr::RBP] = 0x9090_c300_0000_02b8;
        called_around(g, place::MORE_CODE, |a| {
            a.mov(rdx, rsp)?;
            a.lea(rsp, qword_ptr(rsi + 8))?;
            a.push(rbp)?;
            a.mov(rsp, rdx)
        })
    });
    suite.add("a change by the host between runs", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        g.run(|a| a.mov(eax, 1))?.registers(&[(gpr::RAX, 1)])?;
        g.run(|a| a.mov(eax, 2))?.registers(&[(gpr::RAX, 2)])?;
        g.run(|a| a.mov(eax, 3))?.registers(&[(gpr::RAX, 3)])
    });
    suite.add("a change by a device between runs", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        function(g, place::MORE_CODE, 1);
        g.state.gpr[gpr::RSI] = place::MORE_CODE;
        g.load(|a| if a.bitness() == 64 { a.call(rsi) } else { a.call(esi) })?;
        g.start()?.registers(&[(gpr::RAX, 1)])?;
        function(g, place::MORE_CODE, 2);
        g.vm.memory_written(place::MORE_CODE, 6);
        g.start()?.registers(&[(gpr::RAX, 2)])
    });
    suite.add("changes by a device while the guest runs", &[Mode::Protected, Mode::Long, Mode::User], |g| {
        changed_by_device(g)
    });
    suite.add("a page of code that is mapped elsewhere", &[Mode::Long], |g| {
        function(g, place::MORE_CODE + 0x1000, 2);
        g.state.gpr[gpr::RBP] = place::PT + 8 * (place::MORE_CODE >> 12);
        called_around(g, place::MORE_CODE, |a| {
            a.add(qword_ptr(rbp), 0x1000)?;
            a.invlpg(byte_ptr(rsi))
        })
    });
    suite.add("code that crosses into a page that changes", WIDE, |g| {
        // Its immediate is on the next page.
        called_around(g, place::MORE_CODE + 0xfff, |a| a.mov(byte_ptr(rsi + 1), 2))
    });
    suite.add("code that crosses into a page that is mapped elsewhere", &[Mode::Long], |g| {
        // mov eax, 1, from a page to the next / add eax, 1 or 2 / ret
        g.write(place::MORE_CODE + 0xffe, &[0xb8, 1, 0, 0, 0, 0x83, 0xc0, 1, 0xc3]);
        g.write(place::MORE_CODE + 0x2000, &[0, 0, 0, 0x83, 0xc0, 2, 0xc3]);
        g.state.gpr[gpr::RSI] = place::MORE_CODE + 0xffe;
        let end = called_around_remapping(g)?;
        end.registers(&[(gpr::RBX, 2), (gpr::RAX, 3)])
    });
    suite.add("a jump that crosses into a page that is mapped elsewhere", &[Mode::Long], |g| {
        // jmp over, from a page to the next / int3 (twice) / over: mov eax, 1 or 2 / ret
        g.write(place::MORE_CODE + 0xfff, &[0xeb, 2, 0xcc, 0xcc, 0xb8, 1, 0, 0, 0, 0xc3]);
        g.write(place::MORE_CODE + 0x2000, &[2, 0xcc, 0xcc, 0xb8, 2, 0, 0, 0, 0xc3]);
        g.state.gpr[gpr::RSI] = place::MORE_CODE + 0xfff;
        let end = called_around_remapping(g)?;
        end.registers(&[(gpr::RBX, 1), (gpr::RAX, 2)])
    });
    suite.add("data beside code may change at will", WIDE, |g| {
        let end = g.run(|a| {
            let (mut again, mut over, mut data) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(ecx, 1000)?;
            a.set_label(&mut again)?;
            a.inc(qword_ptr(data))?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.mov(rax, qword_ptr(data))?;
            a.jmp(over)?;
            a.set_label(&mut data)?;
            a.dq(&[0])?;
            a.set_label(&mut over)?;
            a.nop()
        })?;
        end.registers(&[(gpr::RAX, 1000)])
    });
    suite.add("code in real mode", &[Mode::Real, Mode::Vm86], |g| {
        // mov byte cs:[next + 1], 0x77 needs a writable segment: DS at the code.
        g.state.segments.seg[index::DS] = g.state.segments.seg[index::CS];
        g.state.segments.seg[index::DS].attributes &= !attr::CODE;
        let end = g.run(|a| {
            let mut next = a.create_label();
            a.mov(bx, 1)?;
            let mut go = a.create_label();
            a.set_label(&mut go)?;
            a.db(&[0xb0, 0x11])?; // mov al, 0x11 at offset 3
            a.mov(byte_ptr(4u32), 0x77)?;
            a.dec(bx)?;
            a.jns(go)?;
            a.set_label(&mut next)?;
            a.nop()
        })?;
        end.done()?;
        equal("AL", end.gpr(gpr::RAX), 0x77)
    });
}
