//! Two vCPUs at once: what one writes and the other executes.

use crate::testing::{Method, TestVm, place};
use crate::vcpu::TranslatorVcpu;
use anyvisor_engine::{Exit, Kicker, Vcpu};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const WRITER: u64 = 0x1_1000;
const ROUNDS: u64 = 3000;

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

/// Runs both until each has written to port 0xf4; panics if they do not in time.
fn run(test: &mut TestVm, other: &mut TranslatorVcpu) {
    let kickers: [Kicker; 2] = [test.vcpu.kicker(), other.kicker()];
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads = [(&mut test.vcpu, &kickers[0]), (other, &kickers[1])].map(|(vcpu, kicker)| {
            let io = test.io.until_port(kicker.clone());
            scope.spawn(move || assert_eq!(vcpu.run(&io).expect("the host supports the engine"), Exit::Kicked))
        });
        scope.spawn(|| {
            let began = Instant::now();
            while !ended.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(10));
                if began.elapsed() > PATIENCE {
                    // Whoever waits for the other does so no more.
                    kickers.iter().for_each(Kicker::kick);
                }
            }
        });
        let results = threads.map(|thread| thread.join());
        ended.store(true, Ordering::SeqCst);
        results.into_iter().for_each(|result| result.expect("no vCPU's thread panics"));
    });
}

/// One vCPU writes the operand of an instruction and then a number; the other waits for the number, serializes itself, and
/// executes the instruction (SDM vol. 3A 9.1.3). Both count in the same page, by locked instructions.
/// ```text
/// executor: mov ebp, 1
/// again: mov ebx, 0x20000 / spin: pause / cmp [rbx], ebp / jne spin / xor eax, eax / cpuid / mov edi, 0x30000 / call rdi
///  cmp eax, ebp / jne fail / lock inc dword [0x30800] / mov [0x20040], ebp / inc ebp / cmp ebp, 3001 / jne again
/// fail: mov [0x20080], eax / out 0xf4, al
/// writer: mov ebp, 1 / mov ebx, 0x20000
/// again: mov [0x30001], ebp / mov [rbx], ebp / lock inc dword [0x30800] / spin: cmp [0x20040], ebp / jne spin
///  inc ebp / cmp ebp, 3001 / jne again / out 0xf4, al
/// ```
#[test]
fn code_that_another_vcpu_writes() {
    let executor = bytes(
        "bd01000000bb00000200f390392b75fa31c00fa2bf00000300ffd739e87519f0ff042500080300892c2540000200ffc581fdb90b000075cd\
         89042580000200e6f4",
    );
    let writer =
        bytes("bd01000000bb00000200892c2501000300892bf0ff042500080300392c254000020075f7ffc581fdb90b000075dce6f4");
    for method in [Method::Translate, Method::Interpret] {
        let mut test = TestVm::long_mode_by(&executor, 0, method);
        test.load(WRITER, &writer);
        // mov eax, 0 / ret
        test.load(0x3_0000, &bytes("b800000000c3"));
        let mut other = test.another_vcpu(method, WRITER, place::STACK - 0x800);
        run(&mut test, &mut other);
        assert_eq!(test.read_u64(place::DATA + 0x80) & 0xffff_ffff, ROUNDS, "{method:?}: the last value executed");
        assert_eq!(test.read_u64(0x3_0800) & 0xffff_ffff, 2 * ROUNDS, "{method:?}: counted");
    }
}

/// Both add to eight bytes that lie on two pages, which are not next to each other in physical memory: none of the sums
/// may get lost, nor a carry from one page to the other.
/// ```text
/// mov ebp, 10000 / mov ebx, 0x20ffd / mov eax, 0x101
/// again: lock add [rbx], rax / dec ebp / jne again / out 0xf4, al
/// ```
#[test]
fn locked_accesses_across_pages() {
    let code = bytes("bd10270000bbfd0f0200b801010000f0480103ffcd75f8e6f4");
    for method in [Method::Translate, Method::Interpret] {
        let mut test = TestVm::long_mode_by(&code, 0, method);
        test.load(WRITER, &code);
        let (entry, page) = (place::PT + 8 * ((place::DATA + 0x1000) >> 12), place::DATA + 0x3000);
        test.load(entry, &(page | 7).to_le_bytes());
        let mut other = test.another_vcpu(method, WRITER, place::STACK - 0x800);
        run(&mut test, &mut other);
        let mut sum = [0; 8];
        sum[..3].copy_from_slice(&test.read_u64(place::DATA + 0xffd).to_le_bytes()[..3]);
        sum[3..].copy_from_slice(&test.read_u64(page).to_le_bytes()[..5]);
        assert_eq!(u64::from_le_bytes(sum), 2 * 10_000 * 0x101, "{method:?}");
    }
}
