//! External interrupts, NMIs, shadows, HLT, the APIC timer, INIT and start-up.

use crate::core::Message;
use crate::cpu::pending;
use crate::system::{Step, poll_events};
use crate::testing::{Access, Method, TestVm, handler, place, selector};
use anyvisor_engine::{Exit, Vcpu};
use anyvisor_x86::bits::{cr0, gpr, rflags};
use anyvisor_x86::lapic::{Destination, Now, reg};
use anyvisor_x86::msi::DeliveryMode;
use anyvisor_x86::segment::index;
use anyvisor_x86::{lapic, msr};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A kernel program with its APIC on and interrupts as `interrupts`.
fn machine(code: &[u8], interrupts: bool) -> TestVm {
    let mut test = TestVm::long_mode(code, 0);
    enable_apic(&mut test);
    if interrupts {
        test.core().cpu.rflags |= rflags::IF;
    }
    test
}

fn enable_apic(test: &mut TestVm) {
    assert_eq!(test.core().lapic.write32(reg::SVR, 0x1ff, Now::default()), lapic::Work::None);
}

fn poll(test: &mut TestVm) {
    assert_eq!(poll_events(test.vcpu.core(), &test.io), Step::Done);
}

fn send(test: &mut TestVm, vector: u8) {
    test.core().shared.send(Message::Interrupt { vector, level: false });
}

fn event_pending(test: &mut TestVm) -> bool {
    test.core().cpu.pending.load(Ordering::SeqCst) & pending::EVENT != 0
}

#[test]
fn an_interrupt_is_delivered_and_acknowledged() {
    let mut test = machine(&[0x90], true);
    send(&mut test, 0x50);
    poll(&mut test);
    assert_eq!(test.rip(), handler(0x50));
    assert_eq!((test.stack(0), test.stack(2) & rflags::RF), (place::CODE, 0));
    assert_eq!(test.core().cpu.rflags & rflags::IF, 0);
    // In service: the same class waits, a higher one does not.
    send(&mut test, 0x51);
    test.core().cpu.rflags |= rflags::IF;
    poll(&mut test);
    assert_eq!(test.rip(), handler(0x50));
    send(&mut test, 0x60);
    poll(&mut test);
    assert_eq!(test.rip(), handler(0x60));
}

#[test]
fn interrupts_wait_for_if_and_sti_opens_the_window_one_instruction_late() {
    let mut test = machine(&[0xfb, 0x90, 0x90], false); // sti; nop; nop
    send(&mut test, 0x50);
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE);
    assert_ne!(test.core().cpu.irq_waiting, 0);
    assert!(!event_pending(&mut test));
    test.steps(1);
    assert!(event_pending(&mut test), "STI asks for another look");
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE + 1, "the shadow of STI");
    assert!(event_pending(&mut test), "and the next boundary must look again");
    test.steps(1);
    poll(&mut test);
    assert_eq!((test.rip(), test.stack(0)), (handler(0x50), place::CODE + 2));
}

#[test]
fn sti_while_interrupts_are_on_has_no_shadow() {
    let mut test = machine(&[0xfb, 0x90], true);
    test.steps(1);
    send(&mut test, 0x50);
    poll(&mut test);
    assert_eq!((test.rip(), test.stack(0)), (handler(0x50), place::CODE + 1));
}

#[test]
fn popf_and_iret_open_the_window_too() {
    let mut test = machine(&[0x9d, 0x90], false);
    test.load(place::STACK - 8, &(rflags::FIXED | rflags::IF).to_le_bytes());
    test.core().cpu.gpr[gpr::RSP] = place::STACK - 8;
    send(&mut test, 0x50);
    poll(&mut test);
    test.steps(1);
    assert!(event_pending(&mut test));
    poll(&mut test);
    assert_eq!(test.rip(), handler(0x50));
}

#[test]
fn mov_ss_holds_off_interrupts_and_nmis() {
    let mut test = machine(&[0x8e, 0xd0, 0x90], true);
    test.core().cpu.gpr[gpr::RAX] = selector::DATA.into();
    test.steps(1);
    send(&mut test, 0x50);
    test.core().shared.send(Message::Nmi);
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE + 2);
    test.steps(1);
    poll(&mut test);
    assert_eq!(test.rip(), handler(2), "the NMI comes first");
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut test = machine(&[0x90], false);
    test.load(handler(2), &[0x90, 0x48, 0xcf]); // nop; iretq
    test.core().shared.send(Message::Nmi);
    poll(&mut test);
    assert_eq!(test.rip(), handler(2), "an NMI needs no IF");
    test.core().shared.send(Message::Nmi);
    poll(&mut test);
    test.steps(1);
    poll(&mut test);
    assert_eq!(test.rip(), handler(2) + 1, "blocked");
    test.steps(1);
    assert_eq!(test.rip(), place::CODE);
    poll(&mut test);
    assert_eq!(test.rip(), handler(2), "the one that waited");
}

/// One is delivered, and one waits until then; more are lost.
#[test]
fn two_of_several_nmis_arrive() {
    let mut test = machine(&[0x90], false);
    test.load(handler(2), &[0x48, 0xcf]); // iretq
    (0..3).for_each(|_| test.core().shared.send(Message::Nmi));
    for _ in 0..2 {
        poll(&mut test);
        assert_eq!(test.rip(), handler(2));
        test.steps(1);
        assert_eq!(test.rip(), place::CODE);
    }
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE, "no third");
}

#[test]
fn hlt_wakes_for_what_is_accepted_only() {
    let mut test = machine(&[0xf4, 0x90], false);
    test.steps(1);
    assert!(test.core().cpu.halted);
    send(&mut test, 0x50);
    poll(&mut test);
    assert!(test.core().cpu.halted, "IF is clear");
    test.core().shared.send(Message::Nmi);
    poll(&mut test);
    assert!(!test.core().cpu.halted);
    assert_eq!((test.rip(), test.stack(0)), (handler(2), place::CODE + 1), "behind HLT");
}

#[test]
fn task_priority_holds_vectors_back() {
    let mut test = machine(&[0x44, 0x0f, 0x22, 0xc0, 0x44, 0x0f, 0x22, 0xc1], true); // mov cr8, rax; mov cr8, rcx
    test.core().cpu.gpr[gpr::RAX] = 5;
    test.core().cpu.gpr[gpr::RCX] = 4;
    test.steps(1);
    send(&mut test, 0x5f);
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE + 4);
    test.steps(1);
    assert!(event_pending(&mut test));
    poll(&mut test);
    assert_eq!(test.rip(), handler(0x5f));
}

#[test]
fn extint_comes_from_the_pic_through_lint0() {
    let mut test = machine(&[0x90], true);
    test.vm.pic_intr.store(true, Ordering::SeqCst);
    assert_eq!(test.core().lapic.write32(reg::LVT_LINT0, 0x1_0700, Now::default()), lapic::Work::None);
    poll(&mut test);
    assert_eq!((test.rip(), test.io.take_log()), (place::CODE, vec![]), "masked");
    assert_eq!(test.core().lapic.write32(reg::LVT_LINT0, 0x700, Now::default()), lapic::Work::None);
    // INTR that has dropped again is spurious: nothing happens.
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE);
    test.io.set_pic(Some(0x30));
    poll(&mut test);
    assert_eq!(test.rip(), handler(0x30));
    assert_eq!(test.io.take_log(), [Access::AcknowledgePic, Access::AcknowledgePic]);
}

#[test]
fn level_triggered_interrupts_end_with_an_eoi_to_the_machine() {
    // mov dword [rdi], eax to the xAPIC's EOI register.
    let mut test = machine(&[0x89, 0x07], true);
    test.core().shared.send(Message::Interrupt { vector: 0x41, level: true });
    poll(&mut test);
    test.load(handler(0x41), &[0x89, 0x07]);
    test.core().cpu.gpr[gpr::RDI] = 0xfee0_00b0;
    // The page is beyond the tables: map it by a 1 GiB entry.
    test.load(0x2000 + 8 * 3, &(3u64 << 30 | 0x83).to_le_bytes());
    test.core().flush_all();
    test.steps(1);
    assert_eq!(test.io.take_log(), [Access::Eoi(0x41)]);
    assert!(event_pending(&mut test));
}

#[test]
fn self_ipi_by_x2apic_msr() {
    // wrmsr to 0x83f.
    let mut test = machine(&[0x0f, 0x30, 0x90], true);
    test.core().lapic.write_msr(msr::IA32_APIC_BASE, 0xfee0_0d00, Now::default()).map(drop).unwrap();
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDX]) = (0x83f, 0x77, 0);
    test.steps(1);
    assert!(event_pending(&mut test));
    poll(&mut test);
    assert_eq!(test.rip(), handler(0x77));
}

#[test]
fn messages_are_routed_by_destination() {
    let mut test = machine(&[0x90], true);
    let message = |destination| lapic::Message {
        mode: DeliveryMode::Fixed,
        vector: 0x44,
        level: false,
        destination,
        exclude_self: false,
    };
    test.vm.route(&message(Destination::Physical(1)), None);
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE, "for another vCPU");
    let mut others = message(Destination::Broadcast);
    others.exclude_self = true;
    test.vm.route(&others, Some(0));
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE, "to all but the sender");
    let mut lowest = message(Destination::Broadcast);
    lowest.mode = DeliveryMode::LowestPriority;
    test.vm.route(&lowest, None);
    poll(&mut test);
    assert_eq!(test.rip(), handler(0x44));
}

#[test]
fn init_and_start_up() {
    let mut test = machine(&[0x90], false);
    // As an application processor: not the bootstrap bit.
    test.core().lapic.write_msr(msr::IA32_APIC_BASE, 0xfee0_0800, Now::default()).map(drop).unwrap();
    test.core().shared.send(Message::Sipi(0x10));
    poll(&mut test);
    assert_eq!(test.rip(), place::CODE, "a start-up IPI without INIT is nothing");
    test.core().shared.send(Message::Init);
    poll(&mut test);
    let cpu = &test.core().cpu;
    assert!(cpu.wait_for_sipi && cpu.cr0 & cr0::PE == 0 && !cpu.is_long_mode());
    test.core().shared.send(Message::Sipi(0x10));
    poll(&mut test);
    let cpu = &test.core().cpu;
    assert!(!cpu.wait_for_sipi);
    assert_eq!((cpu.seg[index::CS].base, cpu.seg[index::CS].selector, cpu.rip), (0x1_0000, 0x1000, 0));
}

/// A program that arms the APIC timer (one-shot, `count` ns) and runs `body`; the handler writes port 0xf4.
fn timer_program(body: &[u8], count: u32, method: Method) -> TestVm {
    let mut test = TestVm::long_mode_by(body, 0, method);
    enable_apic(&mut test);
    test.load(handler(0x99), &[0xb0, 0x55, 0xe6, 0xf4, 0xeb, 0xfe]); // mov al, 0x55; out 0xf4, al; jmp $
    let now = test.core().now();
    let lapic = &mut test.core().lapic;
    for (register, value) in [(reg::DIVIDE, 0xb), (reg::LVT_TIMER, 0x99), (reg::INITIAL_COUNT, count)] {
        assert_eq!(lapic.write32(register, value, now), lapic::Work::None);
    }
    test
}

#[test]
fn the_timer_interrupts_a_busy_loop() {
    for method in [Method::Interpret, Method::Translate] {
        let mut test = timer_program(&[0xfb, 0xeb, 0xfe], 5_000_000, method); // sti; jmp $
        assert_eq!(test.run(), Exit::Kicked, "{method:?}");
        assert_eq!(test.io.take_log(), [Access::PioWrite { port: 0xf4, data: vec![0x55] }]);
        assert!(test.core().now_ns() >= 5_000_000);
    }
}

#[test]
fn the_timer_wakes_a_halt_and_uses_no_processor_meanwhile() {
    fn processor_time() -> Duration {
        // SAFETY: a plain system call on a local structure.
        let time = unsafe {
            let mut time: libc::timespec = std::mem::zeroed();
            libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time);
            time
        };
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
    let mut test = timer_program(&[0xfb, 0xf4, 0xeb, 0xfd], 100_000_000, Method::Translate); // sti; hlt; jmp -1
    let (wall, processor) = (Instant::now(), processor_time());
    assert_eq!(test.run(), Exit::Kicked);
    assert!(wall.elapsed() >= Duration::from_millis(90));
    assert!(processor_time() - processor < Duration::from_millis(50));
}

#[test]
fn kicks_end_a_loop_and_a_halt_and_are_kept() {
    for method in [Method::Interpret, Method::Translate] {
        for code in [&[0xeb, 0xfe][..], &[0xf4]] {
            let mut test = TestVm::long_mode_by(code, 0, method);
            test.vcpu.kicker().kick();
            assert_eq!(test.run(), Exit::Kicked, "before run");
            let kicker = test.vcpu.kicker();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                kicker.kick();
            });
            assert_eq!(test.run(), Exit::Kicked);
            thread.join().unwrap();
        }
    }
}

#[test]
fn state_survives_a_round_trip() {
    let mut test = machine(&[0x90], true);
    send(&mut test, 0x22);
    test.core().cpu.rflags &= !rflags::IF;
    poll(&mut test);
    test.core().cpu.gpr = std::array::from_fn(|n| 0x1111 * n as u64);
    test.core().cpu.ymm[7].0 = std::array::from_fn(|n| n as u8);
    let state = test.vcpu.state().unwrap();
    let mut other = TestVm::new(16, Method::Interpret);
    other.vcpu.set_state(&state).unwrap();
    let mut again = other.vcpu.state().unwrap();
    // The TSC runs on.
    let tsc = state.msr(msr::IA32_TSC).unwrap();
    assert!(again.msr(msr::IA32_TSC).unwrap() >= tsc);
    again.set_msr(msr::IA32_TSC, tsc);
    assert_eq!(again, state);
    assert_eq!(other.core().lapic.highest_pending(), Some(0x22));
    // Impossible states are refused.
    let mut bad = state.clone();
    bad.cr0 &= !cr0::PE;
    assert!(other.vcpu.set_state(&bad).is_err());
    let mut bad = state.clone();
    bad.lapic.truncate(100);
    assert!(other.vcpu.set_state(&bad).is_err());
}

#[test]
fn the_x87_state_is_the_guests_while_it_runs() {
    // fld1; fldpi; out 0xf4, al; then the same state again: fstp qword [rdi].
    for method in [Method::Interpret, Method::Translate] {
        let code = [0xd9, 0xe8, 0xd9, 0xeb, 0xe6, 0xf4, 0xdd, 0x1f, 0xe6, 0xf4];
        let mut test = TestVm::long_mode_by(&code, 0, method);
        test.core().cpu.gpr[gpr::RDI] = place::DATA;
        assert_eq!(test.run(), Exit::Kicked);
        let state = test.vcpu.state().unwrap();
        assert_eq!(state.xsave[4], 0xc0, "two registers in use: {method:?}");
        // Another vCPU's run in between on the same thread must not disturb it.
        let mut other = TestVm::long_mode(&[0xdb, 0xe3, 0xe6, 0xf4], 0);
        assert_eq!(other.run(), Exit::Kicked);
        assert_eq!(test.run(), Exit::Kicked);
        assert_eq!(f64::from_bits(test.read_u64(place::DATA)), std::f64::consts::PI);
    }
}
