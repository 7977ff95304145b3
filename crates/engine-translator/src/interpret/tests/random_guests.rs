//! Guests made of random bytes, in every mode: whatever they do, the interpreter goes on or shuts down.

use super::host::Random;
use super::*;
use crate::cpu::Ymm;

/// A machine in `mode` full of random bytes, with registers that often point into RAM.
fn random_machine(random: &mut Random, mode: Mode) -> Core {
    let mut core = machine(mode);
    let bytes: Vec<u8> = (0..0x2_0000).map(|_| random.next() as u8).collect();
    put(&mut core, 0, &bytes);
    core.cpu.gpr =
        std::array::from_fn(|_| if random.below(2) == 0 { random.below(RAM_SIZE) } else { random.operand() });
    core.cpu.ymm = std::array::from_fn(|_| Ymm(std::array::from_fn(|_| random.next() as u8)));
    core.cpu.rflags |= random.next() & (STATUS | DF | IOPL);
    core.cpu.cpl = if mode == Real || random.below(2) == 0 { 0 } else { 3 };
    core.cpu.mxcsr = random.next() as u32 & 0xffff;
    if random.below(4) == 0 {
        core.cpu.dr[7] = random.next() & 0xffff_03ff;
        core.cpu.dr[0] = random.below(0x2_0000);
    }
    core
}

/// Runs `guests` random guests for some steps each; returns how many there were, successful ones twice.
fn run_guests(seed: u64, guests: u32) -> u64 {
    use Mode::{Compat16, Protected16};
    let mut random = Random(seed);
    let mut steps = 0;
    for _ in 0..guests {
        let mode = [Real, Protected16, Protected32, Compat16, Compat32, Long64][random.below(6) as usize];
        let mut core = random_machine(&mut random, mode);
        for n in 0..2000 {
            core.cpu.rip = random.below(0x2_0000);
            steps += 1;
            // Delivery now and then only: with random descriptor tables it is mostly a triple fault.
            if n % 64 != 63 {
                steps += u64::from(run_one(&mut core).is_ok());
            } else if step(&mut core, &NoDevices) == Step::Shutdown {
                core.cpu.gpr = std::array::from_fn(|_| random.below(RAM_SIZE));
            }
        }
    }
    steps
}

#[test]
fn random_guests_end_only_themselves() {
    assert!(run_guests(0x1234_5678_9abc_def1, 30) > 70_000);
}
