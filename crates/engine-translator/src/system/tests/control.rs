//! Control registers, MSRs, CPUID, kvmclock, TLB invalidation.

use crate::testing::{Access, Method, TestVm, handler, place};
use anyvisor_engine::Exit;
use anyvisor_x86::bits::{cr0, cr4, efer, gpr, rflags, xcr0};
use anyvisor_x86::exception::vector;
use anyvisor_x86::lapic::{Now, reg};
use anyvisor_x86::{cpuid, lapic, msr};

fn kernel(code: &[u8]) -> TestVm {
    TestVm::long_mode(code, 0)
}

/// Executes one instruction with RAX = `value`; whether it raised #GP.
fn gp_with(mut test: TestVm, value: u64) -> (bool, TestVm) {
    test.core().cpu.gpr[gpr::RAX] = value;
    test.steps(1);
    let gp = test.rip() == handler(vector::GP);
    (gp, test)
}

#[test]
fn cr0_combinations() {
    let load = |value| gp_with(kernel(&[0x0f, 0x22, 0xc0]), value);
    let base = cr0::PE | cr0::PG | cr0::NE | cr0::WP;
    assert!(!load(base).0);
    assert!(load(base & !cr0::PE).0, "PG without PE");
    assert!(load(base | cr0::NW).0, "NW without CD");
    assert!(load(base | 1 << 32).0, "reserved");
    assert!(load(base & !cr0::PG).0, "paging off in 64-bit mode");
    let (_, mut test) = load(base | 1 << 6);
    assert_eq!(test.core().cpu.cr0, base | cr0::ET, "undefined bits do not stick, ET does");
}

#[test]
fn cr3_and_cr4_bits() {
    let cr3 = |value| gp_with(kernel(&[0x0f, 0x22, 0xd8]), value).0;
    assert!(!cr3(place::PML4) && cr3(place::PML4 | 1 << 63) && cr3(1 << 52));
    let mut test = kernel(&[0x0f, 0x22, 0xd8]);
    test.core().cpu.cr4 |= cr4::PCIDE;
    let (gp, mut test) = gp_with(test, place::PML4 | 5 | 1 << 63);
    assert!(!gp && test.core().cpu.cr3 == place::PML4 | 5, "bit 63 is not kept");
    let cr4 = |value| gp_with(kernel(&[0x0f, 0x22, 0xe0]), value).0;
    assert!(!cr4(cr4::PAE | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::PCIDE | cr4::FSGSBASE));
    assert!(cr4(0), "PAE off in long mode");
    assert!(cr4(cr4::PAE | cr4::LA57) && cr4(cr4::PAE | cr4::PKE) && cr4(cr4::PAE | 1 << 13));
    // PCIDE needs CR3 bits 11:0 clear.
    let mut test = kernel(&[0x0f, 0x22, 0xe0]);
    test.core().cpu.cr3 |= 0x18;
    assert!(gp_with(test, cr4::PAE | cr4::PCIDE).0);
    assert!(gp_with(kernel(&[0x44, 0x0f, 0x22, 0xc0]), 16).0, "CR8");
}

#[test]
fn msr_values() {
    let write = |number: u32, value: u64| {
        let mut test = kernel(&[0x0f, 0x30]);
        let cpu = &mut test.core().cpu;
        cpu.gpr[gpr::RCX] = number.into();
        cpu.gpr[gpr::RDX] = value >> 32;
        gp_with(test, value & 0xffff_ffff).0
    };
    assert!(write(0x1234_5678, 0), "unknown");
    for number in [msr::LSTAR, msr::CSTAR, msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE, msr::SYSENTER_EIP] {
        assert!(write(number, 1 << 47) && !write(number, !0 << 47), "{number:#x}");
    }
    assert!(write(msr::EFER, efer::LME | efer::LMA | 1 << 1), "reserved bit of EFER");
    assert!(write(msr::EFER, efer::SCE), "LME while paging");
    assert!(write(msr::IA32_PAT, 2) && write(msr::IA32_PAT, 8) && !write(msr::IA32_PAT, 0x0007_0406_0107_0406));
    assert!(write(msr::MTRR_DEF_TYPE, 2) && !write(msr::MTRR_DEF_TYPE, 0xc06));
    assert!(write(msr::TSC_AUX, 1 << 32) && write(msr::IA32_SPEC_CTRL, 1 << 3) && !write(msr::IA32_PRED_CMD, 1));
    assert!(write(msr::IA32_ARCH_CAPABILITIES, 0), "read-only");
    assert!(write(msr::KVM_PV_EOI_EN, 1), "not advertised");
    let mut test = kernel(&[0x0f, 0x32]);
    test.core().cpu.gpr[gpr::RCX] = msr::IA32_ARCH_CAPABILITIES.into();
    test.steps(1);
    let cpu = &test.core().cpu;
    assert_eq!(cpu.gpr[gpr::RAX] | cpu.gpr[gpr::RDX] << 32, cpuid::ARCH_CAPABILITIES);
}

#[test]
fn the_tsc_can_be_set() {
    let mut test = kernel(&[0x0f, 0x30, 0x0f, 0x31]); // wrmsr; rdtsc
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDX]) = (msr::IA32_TSC.into(), 0, 0x1000);
    test.steps(2);
    let cpu = &test.core().cpu;
    assert_eq!(cpu.gpr[gpr::RDX], 0x1000);
    assert_ne!(cpu.tsc_adjust, 0);
}

#[test]
fn cpuid_follows_the_state() {
    let mut test = kernel(&[0x0f, 0xa2, 0x0f, 0xa2]);
    test.core().cpu.gpr[gpr::RAX] = 1;
    test.steps(1);
    assert_ne!(test.core().cpu.gpr[gpr::RCX] & 1 << 27, 0, "OSXSAVE");
    test.core().cpu.cr4 &= !cr4::OSXSAVE;
    test.core().cpu.gpr[gpr::RAX] = 1;
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RCX] & 1 << 27, 0);
    let size = |value: u64| {
        let mut test = kernel(&[0x0f, 0xa2]);
        test.core().cpu.xcr0 = value;
        test.core().cpu.gpr[gpr::RAX] = 0xd;
        test.core().cpu.gpr[gpr::RCX] = 0;
        test.steps(1);
        test.core().cpu.gpr[gpr::RBX]
    };
    assert_eq!(size(xcr0::X87 | xcr0::SSE), 576);
    if std::arch::is_x86_feature_detected!("avx") {
        assert_eq!(size(xcr0::X87 | xcr0::SSE | xcr0::AVX), 832);
    }
}

#[test]
fn xsetbv_checks() {
    let set = |index: u64, value: u64| {
        let mut test = kernel(&[0x0f, 0x01, 0xd1]);
        test.core().cpu.gpr[gpr::RCX] = index;
        test.core().cpu.gpr[gpr::RDX] = 0;
        gp_with(test, value).0
    };
    assert!(!set(0, 1) && !set(0, 3));
    assert!(set(0, 0) && set(0, 5) && set(0, 0x203) && set(1, 1));
}

#[test]
fn invlpg_drops_a_translation_and_only_then() {
    // mov rax, [rdi]; invlpg [rdi]; mov rax, [rdi]
    let mut test = kernel(&[0x48, 0x8b, 0x07, 0x0f, 0x01, 0x3f, 0x48, 0x8b, 0x07]);
    test.core().cpu.gpr[gpr::RDI] = place::DATA;
    test.load(place::DATA, &1u64.to_le_bytes());
    test.load(place::DATA + 0x1000, &2u64.to_le_bytes());
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 1);
    test.load(place::PT + 8 * (place::DATA >> 12), &((place::DATA + 0x1000) | 7).to_le_bytes());
    test.steps(2);
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 2);
}

#[test]
fn invpcid_checks_its_descriptor() {
    let run = |kind: u64, pcid: u64, address: u64| {
        let mut test = kernel(&[0x66, 0x0f, 0x38, 0x82, 0x07]); // invpcid rax, [rdi]
        test.core().cpu.gpr[gpr::RDI] = place::DATA;
        test.load(place::DATA, &pcid.to_le_bytes());
        test.load(place::DATA + 8, &address.to_le_bytes());
        gp_with(test, kind).0
    };
    assert!(!run(0, 0, place::DATA) && !run(1, 0, 0) && !run(2, !0, !0) && !run(3, !0, !0));
    assert!(run(4, 0, 0) && run(0, 1 << 12, 0) && run(0, 0, 1 << 47) && run(0, 5, 0));
}

#[test]
fn kvmclock_tells_the_time() {
    let mut test = kernel(&[0x0f, 0x30, 0x0f, 0x30]);
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDX]) = (msr::KVM_SYSTEM_TIME_NEW.into(), place::DATA | 1, 0);
    test.steps(1);
    let version = test.read_u64(place::DATA) as u32;
    assert!(version != 0 && version.is_multiple_of(2));
    // The guest's arithmetic (pvclock-abi.h): ns = system_time + ((tsc - timestamp) << shift) * mul >> 32.
    let (timestamp, system_time) = (test.read_u64(place::DATA + 8), test.read_u64(place::DATA + 16));
    let scale = test.read_u64(place::DATA + 24);
    let (mul, shift, flags) = (scale as u32, (scale >> 32) as i8, (scale >> 40) as u8);
    assert_eq!(flags, 1, "stable");
    let before = test.core().now_ns();
    let delta = test.core().tsc().wrapping_sub(timestamp);
    let after = test.core().now_ns();
    let delta = if shift < 0 { delta >> -shift } else { delta << shift };
    let ns = system_time + ((u128::from(delta) * u128::from(mul)) >> 32) as u64;
    let slack = 1_000_000;
    assert!(ns + slack >= before && ns <= after + slack, "{before} {ns} {after}");
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RAX]) = (msr::KVM_WALL_CLOCK_NEW.into(), place::DATA + 64);
    test.steps(1);
    let seconds = test.read_u64(place::DATA + 68) as u32;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(seconds.into()) < 5);
}

#[test]
fn hypercalls_are_unknown_ones() {
    let mut test = kernel(&[0x0f, 0x01, 0xc1]);
    test.core().cpu.gpr[gpr::RAX] = 1;
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RAX] as i64, -1000);
    let mut test = TestVm::long_mode(&[0x0f, 0x01, 0xd9], 3);
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RAX] as i64, -1, "not at CPL 3");
}

/// KVM_HC_KICK_CPU of a vCPU by itself: before a HLT, which is then over at once, and not twice.
#[test]
fn a_hypercall_ends_a_halt() {
    // vmcall; hlt; hlt
    let mut test = kernel(&[0x0f, 0x01, 0xc1, 0xf4, 0xf4]);
    for (register, value) in [(gpr::RAX, 5), (gpr::RBX, 0), (gpr::RCX, 0)] {
        test.core().cpu.gpr[register] = value;
    }
    test.core().cpu.rflags &= !rflags::IF;
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 0);
    crate::system::take_messages(test.core());
    test.steps(1);
    assert!(!test.core().cpu.halted);
    test.steps(1);
    assert!(test.core().cpu.halted);
    test.core().shared.send(crate::core::Message::Wake);
    let TestVm { vcpu, io, .. } = &mut test;
    assert_eq!(crate::system::poll_events(vcpu.core(), io), crate::system::Step::Done);
    assert!(!test.core().cpu.halted);
}

/// A vCPU that halts says so, and flushes its TLB when another has asked for that meanwhile.
#[test]
fn halted_vcpus_are_marked_and_flush_later() {
    use crate::system::steal_time;
    // wrmsr; mov rax, [rsi]; mov rax, [rsi]
    let mut test = kernel(&[0x0f, 0x30, 0x48, 0x8b, 0x06, 0x48, 0x8b, 0x06]);
    let page = place::DATA + 0x1000;
    test.load(page, &1u64.to_le_bytes());
    test.load(page + 0x1000, &2u64.to_le_bytes());
    let cpu = &mut test.core().cpu;
    (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RSI]) = (msr::KVM_STEAL_TIME.into(), page);
    (cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDX]) = (place::DATA | 1, 0);
    test.steps(2);
    assert_eq!((test.core().cpu.gpr[gpr::RAX], test.read_u64(place::DATA + 8) as u32 & 1), (1, 0));
    assert_eq!(test.read_u64(place::DATA + 16) as u8, 0);
    let TestVm { vcpu, io, .. } = &mut test;
    steal_time::stand_still(vcpu.core(), io);
    assert_eq!(test.read_u64(place::DATA + 16) as u8, 1);
    // Another maps the page elsewhere, and leaves a note.
    let entry = place::PT + 8 * (page >> 12);
    let mapped = test.read_u64(entry);
    test.load(entry, &(mapped + 0x1000).to_le_bytes());
    test.load(place::DATA + 16, &[3]);
    steal_time::move_again(test.core());
    assert_eq!(test.read_u64(place::DATA + 16) as u8, 0);
    test.steps(1);
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 2);
}

#[test]
fn time_without_a_cpu_is_stolen() {
    use crate::system::steal_time;
    let mut test = kernel(&[0x0f, 0x30]);
    let cpu = &mut test.core().cpu;
    cpu.gpr[gpr::RCX] = msr::KVM_STEAL_TIME.into();
    (cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDX]) = (place::DATA | 1, 0);
    test.load(place::DATA, &5_000_000_000u64.to_le_bytes());
    test.steps(1);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let TestVm { vcpu, io, .. } = &mut test;
    steal_time::refresh(vcpu.core(), io);
    let stolen = test.read_u64(place::DATA) - 5_000_000_000;
    assert!((15_000_000..10_000_000_000).contains(&stolen), "{stolen}");
    let version = test.read_u64(place::DATA + 8) as u32;
    // Halted is not stolen.
    steal_time::stand_still(test.vcpu.core(), &test.io);
    let before = test.read_u64(place::DATA);
    std::thread::sleep(std::time::Duration::from_millis(20));
    steal_time::move_again(test.core());
    let TestVm { vcpu, io, .. } = &mut test;
    steal_time::refresh(vcpu.core(), io);
    assert!(test.read_u64(place::DATA) - before < 15_000_000);
    assert!(version > 0 && version.is_multiple_of(2), "{version}");
    let mut test = kernel(&[0x0f, 0x30]);
    test.core().cpu.gpr[gpr::RCX] = msr::KVM_STEAL_TIME.into();
    assert!(gp_with(test, place::DATA | 3).0, "a reserved bit");
}

/// KVM_HC_SEND_IPI in a machine whose one vCPU has number 0: bitmap, first APIC ID, ICR, and what comes of it.
#[test]
fn a_hypercall_sends_interrupts() {
    for (low, first, icr, result, arrives) in [
        (1, 0, 0x51, 1, true),
        (6, 0, 0x51, 0, false),
        (!0, 0xffff_ffff, 0, 0, false),
        (1, 0, 0x4_0051, -22, false),
        (1, 0, 0x651, -22, false),
    ] {
        let mut test = kernel(&[0x0f, 0x01, 0xc1]);
        assert_eq!(test.core().lapic.write32(reg::SVR, 0x1ff, Now::default()), lapic::Work::None);
        let registers = [(gpr::RAX, 10), (gpr::RBX, low), (gpr::RCX, 0), (gpr::RDX, first), (gpr::RSI, icr)];
        registers.into_iter().for_each(|(register, value): (usize, u64)| test.core().cpu.gpr[register] = value);
        test.steps(1);
        assert_eq!(test.core().cpu.gpr[gpr::RAX] as i64, result, "{low:x} {first:x} {icr:x}");
        crate::system::take_messages(test.core());
        assert_eq!(test.core().lapic.highest_pending(), arrives.then_some(0x51));
    }
}

#[test]
fn dr7_and_dr6_reserved_bits() {
    let mut test = kernel(&[0x0f, 0x23, 0xf8, 0x0f, 0x21, 0xf8]);
    test.core().cpu.gpr[gpr::RAX] = 0xffff_dfff;
    test.steps(2);
    assert_eq!(test.core().cpu.gpr[gpr::RAX], 0xffff_07ff);
    assert!(gp_with(kernel(&[0x0f, 0x23, 0xf8]), 1 << 32).0);
}

const NO_FLUSH: u64 = 1 << 63;

/// In PCID 1: reads DATA; in PCID 2: executes `between` and changes DATA's page-table entry; then goes back to
/// PCID 1 by loading `back` into CR3 and reads DATA again, which this returns. The pages hold 1 and 2.
fn across_pcids(between: &[u8], back: u64) -> u64 {
    // mov rax, [rdi]; mov cr3, rbx; `between`; mov [r8], r9; mov cr3, rcx; mov rax, [rdi]; hlt
    let mut code = vec![0x48, 0x8b, 0x07, 0x0f, 0x22, 0xdb];
    code.extend(between);
    code.extend([0x4d, 0x89, 0x08, 0x0f, 0x22, 0xd9, 0x48, 0x8b, 0x07, 0xf4]);
    let mut test = kernel(&code);
    test.load(place::DATA, &1u64.to_le_bytes());
    test.load(place::DATA + 0x1000, &2u64.to_le_bytes());
    // What `between` finds at [rsi]: INVPCID's descriptor for DATA in PCID 1.
    test.load(place::DATA + 0x2000, &1u64.to_le_bytes());
    test.load(place::DATA + 0x2008, &place::DATA.to_le_bytes());
    let cpu = &mut test.core().cpu;
    cpu.cr4 |= cr4::PCIDE;
    cpu.cr3 = place::PML4 | 1;
    (cpu.gpr[gpr::RDI], cpu.gpr[gpr::RSI]) = (place::DATA, place::DATA + 0x2000);
    (cpu.gpr[gpr::RBX], cpu.gpr[gpr::RCX]) = (place::PML4 | 2 | NO_FLUSH, back);
    (cpu.gpr[gpr::R8], cpu.gpr[gpr::R9]) = (place::PT + 8 * (place::DATA >> 12), (place::DATA + 0x1000) | 7);
    test.step_to_halt(10);
    test.core().cpu.gpr[gpr::RAX]
}

#[test]
fn pcids_keep_translations_if_asked() {
    let keep = place::PML4 | 1 | NO_FLUSH;
    assert_eq!(across_pcids(&[], keep), 1, "kept, and so out of date");
    assert_eq!(across_pcids(&[], place::PML4 | 1), 2, "CR3 without bit 63 drops the PCID's translations");
    // invpcid r10, [rsi], with R10 = 0 … 3 by mov r10b, n
    let invpcid = |kind: u8| [0x41, 0xb2, kind, 0x66, 0x44, 0x0f, 0x38, 0x82, 0x16];
    for kind in 0..=3 {
        assert_eq!(across_pcids(&invpcid(kind), keep), 2, "INVPCID type {kind}");
    }
    // A change of CR4.PGE drops all: mov rax, cr4; xor al, 0x80; mov cr4, rax
    assert_eq!(across_pcids(&[0x0f, 0x20, 0xe0, 0x34, 0x80, 0x0f, 0x22, 0xe0], keep), 2);
}

#[test]
fn a_kept_translation_sees_code_made_meanwhile() {
    // In PCID 1 a RET is written to DATA, in PCID 2 called, in PCID 1 overwritten with NOP and called again.
    let code = [
        0xb0, 0xc3, 0x88, 0x07, 0x0f, 0x22, 0xdb, 0xff, 0xd7, 0x0f, 0x22, 0xd9, 0xc6, 0x07, 0x90, 0xff, 0xd7, 0xb0,
        0x11, 0xe6, 0xf4,
    ];
    for method in [Method::Interpret, Method::Translate] {
        let mut test = TestVm::long_mode_by(&code, 0, method);
        test.load(place::DATA, &[0x90, 0xb0, 0x77, 0xe6, 0xf4]); // nop; mov al, 0x77; out 0xf4, al
        let cpu = &mut test.core().cpu;
        cpu.cr4 |= cr4::PCIDE;
        cpu.cr3 = place::PML4 | 1;
        cpu.gpr[gpr::RDI] = place::DATA;
        (cpu.gpr[gpr::RBX], cpu.gpr[gpr::RCX]) = (place::PML4 | 2 | NO_FLUSH, place::PML4 | 1 | NO_FLUSH);
        assert_eq!(test.run(), Exit::Kicked);
        assert_eq!(test.io.take_log(), [Access::PioWrite { port: 0xf4, data: vec![0x77] }], "{method:?}");
    }
}

#[test]
fn invlpg_of_a_page_with_translated_code() {
    // call rdi; mov al, 0x11; out 0xf4, al. The page at DATA returns, the next one does not.
    for (cpl, method) in
        [(0, Method::Interpret), (0, Method::Translate), (3, Method::Interpret), (3, Method::Translate)]
    {
        let mut test = TestVm::long_mode_by(&[0xff, 0xd7, 0xb0, 0x11, 0xe6, 0xf4], cpl, method);
        test.load(place::DATA, &[0xc3]);
        test.load(place::DATA + 0x1000, &[0xb0, 0x77, 0xe6, 0xf4]);
        test.core().cpu.rflags |= anyvisor_x86::bits::rflags::IOPL;
        let mut wrote = |target: u64| {
            test.load(place::PT + 8 * (place::DATA >> 12), &(target | 7).to_le_bytes());
            test.core().invalidate_page(place::DATA);
            let cpu = &mut test.core().cpu;
            (cpu.rip, cpu.gpr[gpr::RDI], cpu.gpr[gpr::RSP]) = (place::CODE, place::DATA, place::STACK);
            assert_eq!(test.run(), Exit::Kicked);
            test.io.take_log()
        };
        let write = |value: u8| [Access::PioWrite { port: 0xf4, data: vec![value] }];
        for _ in 0..3 {
            assert_eq!(wrote(place::DATA), write(0x11), "CPL {cpl}, {method:?}");
            assert_eq!(wrote(place::DATA + 0x1000), write(0x77), "CPL {cpl}, {method:?}");
        }
    }
}

/// Kernels drop the pages of data all the time: with them no jump to code goes.
#[test]
fn invlpg_of_data_leaves_jumps_alone() {
    let mut test = TestVm::long_mode_by(&[0xe6, 0xf4], 0, Method::Translate);
    let core = test.core();
    for half in [0x40_0000, 0xffff_ffff_8000_0000u64] {
        for page in 0..64 {
            core.note_code(half + 0x1000 * page);
        }
        let before = core.cpu.code_generation;
        for page in 64..100_000 {
            core.invalidate_page(half + 0x1000 * page);
        }
        assert_eq!(core.cpu.code_generation, before, "{half:#x}");
        core.invalidate_page(half + 0x3000);
        assert_ne!(core.cpu.code_generation[1], before[1], "{half:#x}");
    }
}
