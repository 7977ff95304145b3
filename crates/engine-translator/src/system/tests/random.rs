//! Guests that are noise: whatever they do, the engine goes on or shuts them down, and never panics.
//!
//! The bytes are biased towards system instructions, and registers towards addresses of tables, so that the
//! noise reaches descriptor loads, far transfers, task switches and mode changes. `ANYVISOR_RANDOM_GUESTS`
//! sets how many guests are tried.

use crate::cpu::pending;
use crate::system::{Step, poll_events};
use crate::testing::{Method, TestVm, place, selector};
use anyvisor_engine::{Exit, Vcpu};
use anyvisor_x86::bits::{cr0, cr4, efer, rflags};
use anyvisor_x86::segment::index;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// xorshift64*, seeded by the guest's number.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    fn one_of(&mut self, choices: &[&'static [u8]]) -> &'static [u8] {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// Openings of instructions; random bytes follow.
const OPENINGS: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0xa1],
    &[0x0f, 0xb2],
    &[0xcf],
    &[0x48, 0xcf],
    &[0x66, 0xcf],
    &[0xcb],
    &[0xca],
    &[0xcd],
    &[0xcc],
    &[0xce],
    &[0xf1],
    &[0x8e],
    &[0x8c],
    &[0x9a],
    &[0xea],
    &[0xff, 0x18],
    &[0xff, 0x28],
    &[0x48, 0xff, 0x28],
    &[0x9d],
    &[0x9c],
    &[0xfa],
    &[0xfb],
    &[0xf3, 0x6c],
    &[0xf3, 0x6f],
    &[0x66, 0x6d],
    &[0xe4],
    &[0xee],
    &[0xc5],
    &[0x0f, 0xc7],
    &[0x0f, 0xae],
    &[0xf3, 0x0f, 0xae],
    &[0x66, 0x0f, 0x38, 0x82],
    &[0xf3, 0xa4],
    &[0x07],
    &[0x17],
    &[0x63],
    &[],
];

fn noise(random: &mut Random, length: usize) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < length {
        code.extend_from_slice(random.one_of(OPENINGS));
        for _ in 0..random.below(5) {
            code.push(random.next() as u8);
        }
    }
    code
}

fn interesting(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.next(),
        1 => random.below(0x80),
        2 => u64::from(selector::FREE) | random.below(4),
        3 => 1 << random.below(64),
        4 => 0xc000_0080 + random.below(8),
        5 => 0x800 + random.below(0x40),
        6 => u64::MAX - random.below(32),
        _ => 0x1000 * random.below(64) + random.below(16),
    }
}

fn set_up(random: &mut Random, method: Method) -> TestVm {
    let code = noise(random, 200);
    let cpl = if random.below(2) == 0 { 0 } else { 3 };
    let mut test = match random.below(4) {
        0 => TestVm::real_mode(&code),
        1 => TestVm::protected_mode(&code, cpl),
        _ => TestVm::long_mode_by(&code, cpl, method),
    };
    // Descriptors, a TSS and stacks of noise, and sometimes holes in the address space.
    for at in (place::GDT + u64::from(selector::FREE)..place::GDT + 0x80).step_by(8) {
        test.load(at, &interesting(random).to_le_bytes());
    }
    for n in 0..64 {
        let value = interesting(random);
        test.load(place::STACK - 0x100 + 8 * n, &value.to_le_bytes());
        test.load(place::DATA + 8 * n, &interesting(random).to_le_bytes());
    }
    if random.below(3) == 0 {
        let at = place::IDT + 8 * random.below(0x200);
        test.load(at, &random.next().to_le_bytes());
    }
    if random.below(4) == 0 {
        let page = random.below(64) << 12;
        let entry = page | random.next() & 0x8000_0000_0000_01ff;
        test.map(page, entry);
    }
    let values: [u64; 16] = std::array::from_fn(|_| interesting(random));
    let flags = random.next() & (rflags::WRITABLE | rflags::VM);
    let in_protected = test.core().cpu.is_protected();
    let long = test.core().cpu.efer & efer::LMA != 0;
    let cpu = &mut test.core().cpu;
    cpu.gpr = values;
    cpu.gpr[4] = place::STACK - random_offset(values[4]);
    if random_bool(values[0]) {
        cpu.rflags |= flags & if in_protected && !long { !rflags::VM } else { !(rflags::VM | rflags::NT) };
    }
    if long {
        cpu.cr4 |= values[1] & (cr4::SMEP | cr4::UMIP | cr4::PCIDE | cr4::TSD);
    }
    cpu.cr0 |= values[2] & (cr0::AM | cr0::TS);
    test
}

fn random_offset(value: u64) -> u64 {
    value & 0xf8
}

fn random_bool(value: u64) -> bool {
    value.count_ones().is_multiple_of(2)
}

/// Runs a guest for a while; events arrive in between.
fn run(random: &mut Random, test: &mut TestVm) {
    for _ in 0..300 {
        if random.below(16) == 0 {
            let vector = random.next() as u8;
            test.core().shared.send(match random.below(4) {
                0 => crate::core::Message::Nmi,
                _ => crate::core::Message::Interrupt { vector, level: vector & 1 != 0 },
            });
        }
        if test.core().cpu.pending.load(Ordering::SeqCst) & pending::EVENT != 0
            && poll_events(test.vcpu.core(), &test.io) == Step::Shutdown
        {
            return;
        }
        if test.core().cpu.wait_for_sipi || test.core().cpu.halted {
            test.core().cpu.halted = false;
            if test.core().cpu.wait_for_sipi {
                return;
            }
        }
        if test.step() == Step::Shutdown {
            return;
        }
        let cpu = &test.core().cpu;
        let level = if cpu.is_vm86() { 3 } else { cpu.seg[index::SS].dpl() };
        assert!(!cpu.is_protected() || cpu.cpl == level, "the privilege level is SS's");
        assert_ne!(cpu.rflags & rflags::FIXED, 0);
        assert!(!cpu.is_long_mode() || cpu.cr0 & cr0::PG != 0 && !cpu.is_vm86());
        assert!(cpu.is_protected() || cpu.cpl == 0);
        test.io.take_log();
    }
}

/// Tries guests `1..=count` with `body`; panics with the number of the first that panics.
fn try_guests(count: u64, method: Method, body: impl Fn(&mut Random, &mut TestVm) + std::panic::RefUnwindSafe) {
    let count = std::env::var("ANYVISOR_RANDOM_GUESTS").ok().and_then(|n| n.parse().ok()).unwrap_or(count);
    for guest in 1..=count {
        let outcome = std::panic::catch_unwind(|| {
            let mut random = Random(guest.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut test = set_up(&mut random, method);
            body(&mut random, &mut test);
        });
        assert!(outcome.is_ok(), "guest number {guest}");
    }
}

#[test]
fn noise_never_panics() {
    try_guests(400, Method::Interpret, run);
}

#[test]
fn translated_noise_never_panics_or_hangs() {
    try_guests(100, Method::Translate, |_, test| {
        let kicker = test.vcpu.kicker();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                    kicker.kick();
                }
            });
            for _ in 0..3 {
                if test.run() == Exit::Shutdown {
                    break;
                }
            }
            done.store(true, Ordering::SeqCst);
        });
    });
}
