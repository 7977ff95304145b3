//! Any guest whatsoever can at worst end its own VM: random code, random files, hostile devices' use.

use anyvisor_tests::elf::pvh;
use anyvisor_tests::{assets, vm};
use std::time::Duration;

/// Numbers that look random and are the same each time (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next() as u8).take(count).collect()
    }
}

/// Runs a guest for a while, ends it by SIGTERM if it does not end itself, and checks that anyvisor lived.
fn survives(name: &str, file: &[u8]) -> i32 {
    let kernel = assets::scratch(name, file).unwrap();
    let vm = vm::Vm::start(&vm::arguments(&kernel, &["--memory", "64M"])).expect("anyvisor starts");
    let ended = match vm.try_end(Duration::from_millis(400)) {
        Ok(ended) => ended,
        Err(vm) => {
            vm.signal(libc::SIGTERM);
            vm.end(Duration::from_secs(5))
        }
    };
    std::fs::remove_file(kernel).unwrap();
    assert!(!ended.errors.contains("panicked"), "{name}\n{ended:?}");
    let code = ended.status.code().unwrap_or_else(|| panic!("{name}: died of a signal\n{ended:?}"));
    assert!((0..=3).contains(&code) || code > 128, "{name}: exit code {code}\n{ended:?}");
    code
}

#[test]
fn random_bytes_are_no_kernel() {
    let mut random = Random(1);
    for length in [1, 63, 512, 4096, 100_000] {
        let bytes = random.bytes(length);
        assert_eq!(survives("bytes", &bytes), 2, "a file of {length} random bytes is a user's mistake");
    }
}

#[test]
fn random_code_ends_only_its_own_vm() {
    let mut random = Random(2);
    for round in 0..24 {
        survives(&format!("code{round}"), &pvh(&random.bytes(2048)));
    }
}

#[test]
fn random_code_among_port_accesses_ends_only_its_own_vm() {
    let mut random = Random(3);
    for round in 0..12 {
        let mut code = Vec::new();
        for _ in 0..400 {
            // mov edx, port; mov eax, value; out dx, al|ax|eax or in
            let port = match random.next() % 4 {
                0 => 0xcf8 + random.next() % 8,
                1 => 0x3f8 + random.next() % 8,
                2 => random.next() % 0x100,
                _ => random.next() % 0x1_0000,
            } as u32;
            // Reset and power-off would end the round early.
            if matches!(port, 0x64 | 0x92 | 0xcf9 | 0x604) {
                continue;
            }
            code.push(0xba);
            code.extend_from_slice(&port.to_le_bytes());
            code.push(0xb8);
            code.extend_from_slice(&(random.next() as u32).to_le_bytes());
            let instruction: &[u8] =
                [&[0xee][..], &[0x66, 0xef], &[0xef], &[0xec], &[0x66, 0xed], &[0xed]][(random.next() % 6) as usize];
            code.extend_from_slice(instruction);
        }
        code.extend_from_slice(&random.bytes(64));
        survives(&format!("ports{round}"), &pvh(&code));
    }
}

#[test]
fn damaged_kernels_end_only_their_own_vm() {
    let mut random = Random(4);
    let kernel = std::fs::read(assets::kernel().expect("a kernel")).unwrap();
    for round in 0..8 {
        let mut damaged = kernel.clone();
        // In the setup header, where the loader reads, and in the compressed kernel behind it.
        for _ in 0..6 {
            let at = 0x1f1 + (random.next() % 0x7f) as usize;
            damaged[at] = random.next() as u8;
        }
        let at = (random.next() as usize) % damaged.len();
        damaged[at] ^= 1 << (random.next() % 8);
        survives(&format!("damaged{round}"), &damaged);
    }
    for cut in [0x200, 0x1000, kernel.len() / 2] {
        survives("cut", &kernel[..cut]);
    }
}
