//! x87, MMX, SSE and AVX through native stubs.

use super::*;

fn floats(values: [f32; 4]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn xmm_floats(core: &Core, n: usize) -> [f32; 4] {
    std::array::from_fn(|i| f32::from_le_bytes(core.cpu.ymm[n].0[4 * i..][..4].try_into().unwrap()))
}

#[test]
fn sse_on_registers_and_memory() {
    let mut core = machine(Long64);
    put(&mut core, DATA, &floats([1.0, 2.0, 3.0, 4.0]));
    core.cpu.gpr[RSP] = DATA;
    core.cpu.ymm[9].0[16..].fill(0xaa);
    run(&mut core, "44 0f 10 0c 24  44 0f 58 0c 24  45 0f 28 d1").unwrap(); // movups xmm9,[rsp]; addps; movaps xmm10
    assert_eq!(xmm_floats(&core, 10), [2.0, 4.0, 6.0, 8.0]);
    assert_eq!(core.cpu.ymm[9].0[16..], [0xaa; 16], "legacy SSE keeps the upper half");
    run(&mut core, "66 48 0f 6e c4  66 48 0f 7e c0  44 0f 11 0d 00 10 00 00").unwrap(); // movq xmm0,rsp; movq rax,xmm0
    assert_eq!(core.cpu.gpr[RAX], DATA);
    assert_eq!(get(&core, CODE + 0x12 + 0x1000, 4), u64::from(2.0f32.to_bits()));
    // ucomiss xmm9, xmm9 sets ZF; cvttss2si rsp, xmm9.
    run(&mut core, "45 0f 2e c9  f3 49 0f 2c e1").unwrap();
    assert_eq!(core.cpu.rflags & STATUS, ZF);
    assert_eq!(core.cpu.gpr[RSP], 2);
}

#[test]
fn alignment_is_the_guests() {
    let mut core = machine(Long64);
    for (address, code, expected) in [
        (DATA + 8, "0f 28 03", Err(Exception::gp(0))),     // movaps
        (DATA + 8, "0f 10 03", Ok(())),                    // movups
        (DATA + 8, "0f 58 03", Err(Exception::gp(0))),     // addps
        (DATA + 8, "c5 f8 58 03", Ok(())),                 // vaddps
        (DATA + 16, "c5 fc 28 03", Err(Exception::gp(0))), // vmovaps ymm
        (DATA + 0xff8, "0f 10 03", Ok(())),                // across pages
        (DATA + 8, "0f ae 03", Err(Exception::gp(0))),     // fxsave
        (DATA + 16, "0f ae 23", Err(Exception::gp(0))),    // xsave
        (DATA + 3, "66 0f 3a 63 03 00", Ok(())),           // pcmpistri
        (1 << 60, "0f 28 03", Err(Exception::gp(0))),
    ] {
        core.cpu.gpr[RBX] = address;
        assert_eq!(run(&mut core, code), expected, "{code} at {address:#x}");
    }
}

#[test]
fn avx_zeroes_the_upper_half() {
    let mut core = machine(Long64);
    core.cpu.ymm[1].0 = [0x11; 32];
    core.cpu.ymm[2].0 = [0x22; 32];
    run(&mut core, "c5 f1 fe c2").unwrap(); // vpaddd xmm0, xmm1, xmm2
    assert_eq!(core.cpu.ymm[0].0[..16], [0x33; 16]);
    assert_eq!(core.cpu.ymm[0].0[16..], [0; 16]);
    run(&mut core, "c5 f5 fe c2").unwrap();
    assert_eq!(core.cpu.ymm[0].0, [0x33; 32]);
    core.cpu.ymm[15].0 = [0xff; 32];
    run(&mut core, "c5 f8 77").unwrap(); // vzeroupper
    assert_eq!(core.cpu.ymm[15].0[16..], [0; 16]);
    assert_eq!(core.cpu.ymm[15].0[..16], [0xff; 16]);
}

#[test]
fn enabling_bits() {
    let avx = "c5 f1 fe c2";
    let sse = "0f 58 c1";
    let x87 = "d9 e8";
    let mmx = "0f fe c1";
    type Change = fn(&mut Core);
    let cases: [(Change, &str, Exception); 9] = [
        (|c| c.cpu.cr0 |= cr0::TS, avx, Exception::nm()),
        (|c| c.cpu.cr0 |= cr0::TS, sse, Exception::nm()),
        (|c| c.cpu.cr0 |= cr0::EM, sse, Exception::ud()),
        (|c| c.cpu.cr0 |= cr0::EM, x87, Exception::nm()),
        (|c| c.cpu.cr0 |= cr0::EM, mmx, Exception::ud()),
        (|c| c.cpu.cr4 &= !cr4::OSFXSR, sse, Exception::ud()),
        (|c| c.cpu.cr4 &= !cr4::OSXSAVE, avx, Exception::ud()),
        (|c| c.cpu.xcr0 = xcr0::X87 | xcr0::SSE, avx, Exception::ud()),
        (|c| c.cpu.cr0 |= cr0::TS | cr0::MP, "9b", Exception::nm()),
    ];
    for (change, code, expected) in cases {
        let mut core = machine(Long64);
        change(&mut core);
        assert_eq!(run(&mut core, code), Err(expected), "{code}");
    }
    let mut core = machine(Long64);
    core.cpu.cr0 |= cr0::TS;
    assert_eq!(run(&mut core, "9b"), Ok(()), "FWAIT without MP ignores TS");
}

#[test]
fn simd_and_x87_faults() {
    let mut core = machine(Long64);
    core.cpu.mxcsr = 0x1f80 & !(1 << 9); // division by zero unmasked
    core.cpu.ymm[0].0[..16].copy_from_slice(&floats([1.0; 4]));
    let before = core.cpu.ymm[0].0;
    assert_eq!(run(&mut core, "0f 5e c1"), Err(Exception::new(vector::XM))); // divps xmm0, xmm1
    assert_eq!(core.cpu.ymm[0].0, before);
    assert_eq!(core.cpu.mxcsr & 0x3f, 4, "the sticky flag is set");
    core.cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(run(&mut core, "0f 5e c1"), Err(Exception::ud()));

    // fninit; fldcw [rbx] (unmask ZE); fld1; fldz; fdivp raises nothing yet; fwait does; fnclex; fninit.
    core.cpu.gpr[RBX] = DATA;
    put(&mut core, DATA, &[0x7b, 0x03]);
    run(&mut core, "db e3 d9 2b d9 e8 d9 ee de f9").unwrap();
    assert_eq!(run(&mut core, "9b"), Err(Exception::new(vector::MF)));
    run(&mut core, "db e2 db e3").unwrap();
    // ldmxcsr with a reserved bit.
    put(&mut core, DATA, &[0, 0, 1, 0]);
    assert_eq!(run(&mut core, "0f ae 13"), Err(Exception::gp(0)));
}

#[test]
fn x87_state_stays_in_the_processor() {
    let mut core = machine(Long64);
    core.cpu.gpr[RBX] = DATA;
    run(&mut core, "db e3 d9 eb d9 e8 de c1 dd 1b").unwrap(); // fninit; fldpi; fld1; faddp; fstp qword [rbx]
    assert_eq!(f64::from_bits(get(&core, DATA, 8)), std::f64::consts::PI + 1.0);
    // fld1; fnstenv [rbx]: no host address in it. fninit.
    run(&mut core, "d9 e8 d9 33 db e3").unwrap();
    assert_eq!(get(&core, DATA + 12, 4), 0);
    assert_eq!(get(&core, DATA + 20, 8), 0);
}

#[test]
fn fxsave_and_fxrstor() {
    let mut core = machine(Long64);
    core.cpu.gpr[RBX] = DATA;
    core.cpu.ymm[7].0 = [0x77; 32];
    core.cpu.mxcsr = 0x1fa0;
    put(&mut core, DATA + 464, &[0x5a; 48]);
    run(&mut core, "db e3 d9 e8 48 0f ae 03").unwrap(); // fninit; fld1; fxsave64 [rbx]
    assert_eq!(get(&core, DATA + 24, 4), 0x1fa0);
    assert_eq!(get(&core, DATA + 160 + 7 * 16, 8), 0x7777_7777_7777_7777);
    assert_eq!((get(&core, DATA + 8, 8), get(&core, DATA + 16, 8)), (0, 0), "no host address");
    assert_eq!(get(&core, DATA + 464, 8), 0x5a5a_5a5a_5a5a_5a5a, "the software's bytes are untouched");
    core.cpu.ymm[7].0 = [0; 32];
    core.cpu.mxcsr = 0x1f80;
    run(&mut core, "db e3 48 0f ae 0b dd 1b").unwrap(); // fninit; fxrstor64; fstp qword
    assert_eq!(core.cpu.ymm[7].0[..16], [0x77; 16]);
    assert_eq!(core.cpu.mxcsr, 0x1fa0);
    assert_eq!(f64::from_bits(get(&core, DATA, 8)), 1.0);

    // In 32-bit code there are eight registers, in the image and in the processor.
    let mut core = machine(Protected32);
    core.cpu.gpr[RBX] = DATA;
    core.cpu.ymm = [crate::cpu::Ymm([0x44; 32]); 16];
    run(&mut core, "0f ae 03").unwrap();
    assert_eq!((get(&core, DATA + 280, 8), get(&core, DATA + 288, 8)), (0x4444_4444_4444_4444, 0));
    run(&mut core, "0f ae 0b c5 fc 77").unwrap(); // fxrstor; vzeroall
    assert_eq!((core.cpu.ymm[7].0, core.cpu.ymm[8].0), ([0; 32], [0x44; 32]));
}

#[test]
fn xsave_and_xrstor() {
    let mut core = machine(Long64);
    core.cpu.gpr[RBX] = DATA;
    (core.cpu.gpr[RAX], core.cpu.gpr[RDX]) = (u64::MAX, u64::MAX);
    core.cpu.ymm[3].0 = [0x33; 32];
    run(&mut core, "48 0f ae 23").unwrap(); // xsave64
    assert_eq!(core.cpu.gpr[RAX], u64::MAX);
    assert_eq!(get(&core, DATA + 512, 8) & 6, 6, "SSE and AVX are in use");
    assert_eq!(get(&core, DATA + 512, 8) & !7, 0, "nothing the guest has not enabled");
    assert_eq!(get(&core, DATA + 576 + 3 * 16, 8), 0x3333_3333_3333_3333);
    core.cpu.ymm[3].0 = [0; 32];
    run(&mut core, "48 0f ae 2b").unwrap(); // xrstor64
    assert_eq!(core.cpu.ymm[3].0, [0x33; 32]);
    // Only SSE asked for: the upper halves stay.
    core.cpu.ymm[3].0 = [0x55; 32];
    core.cpu.gpr[RAX] = 2;
    core.cpu.gpr[RDX] = 0;
    run(&mut core, "48 0f ae 2b").unwrap();
    assert_eq!((core.cpu.ymm[3].0[..16].to_vec(), core.cpu.ymm[3].0[16..].to_vec()), (vec![0x33; 16], vec![0x55; 16]));
    // A component that the guest has not enabled, and a compacted area.
    put(&mut core, DATA + 512, &[0xe7]);
    assert_eq!(run(&mut core, "48 0f ae 2b"), Err(Exception::gp(0)));
    put(&mut core, DATA + 512, &[7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80]);
    assert_eq!(run(&mut core, "48 0f ae 2b"), Err(Exception::gp(0)));
}

#[test]
fn masked_elements_do_not_fault() {
    let mut core = machine(Protected32);
    core.cpu.seg[index::DS].limit = (DATA + 7) as u32; // two elements fit
    core.cpu.gpr[RBX] = DATA;
    put(&mut core, DATA, &[1, 0, 0, 0, 2, 0, 0, 0]);
    core.cpu.ymm[1].0[..8].fill(0xff);
    core.cpu.ymm[0].0 = [0xee; 32];
    run(&mut core, "c4 e2 71 8c 03").unwrap(); // vpmaskmovd xmm0, xmm1, [ebx]
    let mut expected = [0; 32];
    (expected[0], expected[4]) = (1, 2);
    assert_eq!(core.cpu.ymm[0].0, expected);
    core.cpu.ymm[1].0[8..12].fill(0xff);
    assert_eq!(run(&mut core, "c4 e2 71 8c 03"), Err(Exception::gp(0)));

    // vpgatherdd xmm0, [ebx+xmm2*4], xmm1: element 2 faults, 0 and 1 are done.
    core.cpu.ymm[0].0 = [0xee; 32];
    core.cpu.ymm[2].0 = [0; 32];
    (core.cpu.ymm[2].0[0], core.cpu.ymm[2].0[8]) = (1, 9);
    assert_eq!(run(&mut core, "c4 e2 71 90 04 93"), Err(Exception::gp(0)));
    assert_eq!(core.cpu.ymm[0].0[..12], [2, 0, 0, 0, 1, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
    assert_eq!(core.cpu.ymm[1].0[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    core.cpu.ymm[2].0[8] = 0;
    run(&mut core, "c4 e2 71 90 04 93").unwrap();
    assert_eq!(core.cpu.ymm[0].0[..13], [2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0xee]);
    assert_eq!(core.cpu.ymm[0].0[16..], [0; 16]);
    assert_eq!(core.cpu.ymm[1].0, [0; 32]);
    assert_eq!(run(&mut core, "c4 e2 79 90 04 93"), Err(Exception::ud())); // one register twice
}

#[test]
fn byte_masked_stores() {
    let mut core = machine(Long64);
    core.cpu.gpr[RDI] = DATA;
    core.cpu.ymm[0].0[..16].fill(0x11);
    core.cpu.ymm[1].0[3] = 0x80;
    run(&mut core, "66 0f f7 c1").unwrap(); // maskmovdqu xmm0, xmm1
    assert_eq!(get(&core, DATA, 8), 0x1100_0000);
    put(&mut core, DATA + 8, &[0xab, 0xcd, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0]);
    core.cpu.gpr[RBX] = DATA;
    core.cpu.gpr[RAX] = 5;
    // movq mm0, [rbx+8]; movq mm1, [rbx+16]; maskmovq mm0, mm1; emms
    run(&mut core, "0f 6f 43 08 0f 6f 4b 10 0f f7 c1 0f 77").unwrap();
    assert_eq!(get(&core, DATA, 8), 0x1100_cd00);
    assert_eq!(core.cpu.gpr[RAX], 5);
}
