//! What the host offers: the CPUID that guests can be given, the TSC's frequency, and this thread's GS base.

use anyvisor_engine::{Error, Result};
use anyvisor_x86::lapic::BUS_HZ;
use anyvisor_x86::{Cpuid, CpuidResult};
use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc, _xgetbv};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < list.len() {
        mask |= 1 << list[i];
        i += 1;
    }
    mask
}

/// Instructions that run natively: shown if the host has them. By result register of leaf 1: SSE3,
/// PCLMULQDQ, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C, RDRAND.
const LEAF1_ECX_HOST: u32 = bits(&[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
/// Emulated, whatever the host has: PCID, x2APIC, TSC deadline, hypervisor.
const LEAF1_ECX_OURS: u32 = bits(&[17, 21, 24, 31]);
/// FPU, CX8, CMOV, CLFLUSH, MMX, FXSR, SSE, SSE2.
const LEAF1_EDX_HOST: u32 = bits(&[0, 8, 15, 19, 23, 24, 25, 26]);
/// DE, PSE, TSC, MSR, PAE, MCE, APIC, SEP, MTRR, PGE, MCA, PAT, PSE36.
const LEAF1_EDX_OURS: u32 = bits(&[2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17]);
/// BMI1, AVX2, BMI2, RDSEED, ADX, CLFLUSHOPT, CLWB, SHA.
const LEAF7_EBX_HOST: u32 = bits(&[3, 5, 8, 18, 19, 23, 24, 29]);
/// FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, SMAP.
const LEAF7_EBX_OURS: u32 = bits(&[0, 1, 7, 9, 10, 20]);
/// GFNI, VAES, VPCLMULQDQ, RDPID.
const LEAF7_ECX_HOST: u32 = bits(&[8, 9, 10, 22]);
/// UMIP, PKU, PKS.
const LEAF7_ECX_OURS: u32 = bits(&[2, 3, 31]);
/// FSRM, IBRS and IBPB, STIBP, ARCH_CAPABILITIES, SSBD.
const LEAF7_EDX_OURS: u32 = bits(&[4, 26, 27, 29, 31]);
/// BHI_DIS_S.
const LEAF7_2_EDX_OURS: u32 = bits(&[4]);
/// AVX-VNNI.
const LEAF7_1_EAX_HOST: u32 = bits(&[4]);
/// LAHF, ABM, 3DNOWPREFETCH.
const EXTENDED_ECX_HOST: u32 = bits(&[0, 5, 8]);
/// SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const EXTENDED_EDX_OURS: u32 = bits(&[11, 20, 26, 27, 29]);

/// FMA, XSAVE, AVX, F16C: gone without an operating system that saves their state.
const LEAF1_ECX_AVX: u32 = bits(&[12, 28, 29]);
/// AVX2; VAES and VPCLMULQDQ; AVX-VNNI.
const LEAF7_EBX_AVX: u32 = bits(&[5]);
const LEAF7_ECX_AVX: u32 = bits(&[9, 10]);

/// KVM's features that exist here: no delay after port I/O (1), kvmclock with MSRs 4b564d00h and 01h (3), steal time (5),
/// kicks of halted processors (7), TLB flushes that wait for those that do not run (9), interrupts to many processors by one
/// hypercall (11), yielding (13), and a stable kvmclock (24).
const KVM_FEATURES: u32 = bits(&[1, 3, 5, 7, 9, 11, 13, 24]);

fn leaf(number: u32, sub: u32) -> CpuidResult {
    let max = __cpuid(number & 0xf000_0000).eax;
    if max < number || max & 0xf000_0000 != number & 0xf000_0000 {
        return CpuidResult::default();
    }
    let r = __cpuid_count(number, sub);
    CpuidResult { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
}

/// Whether the host's operating system saves the upper halves of the YMM registers.
fn host_saves_avx() -> bool {
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: XSAVE is enabled by the caller's check of OSXSAVE.
        unsafe { _xgetbv(0) }
    }
    let osxsave = leaf(1, 0).ecx >> 27 & 1 != 0;
    // SAFETY: OSXSAVE says that XGETBV works in user mode.
    osxsave && unsafe { xcr0() } & 6 == 6
}

/// Every leaf that a vCPU of this engine can be given on this host.
pub fn supported_cpuid(tsc_khz: u64) -> Cpuid {
    let mut table = Cpuid::default();
    let avx = host_saves_avx();
    let drop_avx = |value: u32, mask: u32| if avx { value } else { value & !mask };
    table.set(0, None, leaf(0, 0));
    let host = leaf(1, 0);
    let mut one = CpuidResult { eax: host.eax, ebx: host.ebx, ..CpuidResult::default() };
    one.ecx = drop_avx(host.ecx & LEAF1_ECX_HOST, LEAF1_ECX_AVX) | LEAF1_ECX_OURS;
    one.edx = host.edx & LEAF1_EDX_HOST | LEAF1_EDX_OURS;
    table.set(1, None, one);
    table.set(6, None, CpuidResult { eax: 1 << 2, ..CpuidResult::default() });
    let host = leaf(7, 0);
    let seven = CpuidResult {
        eax: 2,
        ebx: drop_avx(host.ebx & LEAF7_EBX_HOST, LEAF7_EBX_AVX) | LEAF7_EBX_OURS,
        ecx: drop_avx(host.ecx & LEAF7_ECX_HOST, LEAF7_ECX_AVX) | LEAF7_ECX_OURS,
        edx: LEAF7_EDX_OURS,
    };
    table.set(7, Some(0), seven);
    let eax = if host.eax >= 1 { drop_avx(leaf(7, 1).eax & LEAF7_1_EAX_HOST, !0) } else { 0 };
    table.set(7, Some(1), CpuidResult { eax, ..CpuidResult::default() });
    table.set(7, Some(2), CpuidResult { edx: LEAF7_2_EDX_OURS, ..CpuidResult::default() });
    for (number, result) in frequency_leaves(tsc_khz) {
        table.set(number, None, result);
    }
    paravirtual_leaves(tsc_khz, &mut table);
    extended_leaves(&mut table);
    table
}

/// Leaf 15h as a ratio to a "crystal" that is the APIC timer's clock, and leaf 16h. The ratio is left out if
/// it cannot be exact with the products that Linux's 32-bit arithmetic can take.
fn frequency_leaves(tsc_khz: u64) -> [(u32, CpuidResult); 2] {
    let crystal_khz = BUS_HZ / 1000;
    let divisor = gcd(tsc_khz, crystal_khz);
    let (numerator, denominator) = (tsc_khz / divisor, crystal_khz / divisor);
    let mhz = (tsc_khz / 1000) as u32;
    let ratio = if crystal_khz * numerator <= u64::from(u32::MAX) {
        CpuidResult { eax: denominator as u32, ebx: numerator as u32, ecx: BUS_HZ as u32, edx: 0 }
    } else {
        CpuidResult::default()
    };
    [(0x15, ratio), (0x16, CpuidResult { eax: mhz, ebx: mhz, ecx: 100, edx: 0 })]
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// KVM's leaves (Linux Documentation/virt/kvm/x86/cpuid.rst) and the timing leaf, in kHz.
fn paravirtual_leaves(tsc_khz: u64, table: &mut Cpuid) {
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    table.set(
        0x4000_0000,
        None,
        CpuidResult { eax: 0x4000_0010, ebx: word(b"KVMK"), ecx: word(b"VMKV"), edx: word(b"M\0\0\0") },
    );
    table.set(0x4000_0001, None, CpuidResult { eax: KVM_FEATURES, ..CpuidResult::default() });
    let timing = CpuidResult { eax: tsc_khz as u32, ebx: (BUS_HZ / 1000) as u32, ..CpuidResult::default() };
    table.set(0x4000_0010, None, timing);
}

fn extended_leaves(table: &mut Cpuid) {
    table.set(0x8000_0000, None, CpuidResult { eax: 0x8000_0008, ..leaf(0x8000_0000, 0) });
    let host = leaf(0x8000_0001, 0);
    let features = CpuidResult { eax: 0, ebx: 0, ecx: host.ecx & EXTENDED_ECX_HOST, edx: EXTENDED_EDX_OURS };
    table.set(0x8000_0001, None, features);
    for number in 0x8000_0002..=0x8000_0004 {
        table.set(number, None, leaf(number, 0));
    }
    let invariant = leaf(0x8000_0007, 0).edx & (1 << 8);
    table.set(0x8000_0007, None, CpuidResult { edx: invariant, ..CpuidResult::default() });
    let physical = match leaf(0x8000_0008, 0).eax & 0xff {
        0 => 36,
        bits => bits.clamp(36, 52),
    };
    table.set(0x8000_0008, None, CpuidResult { eax: physical | 48 << 8, ..CpuidResult::default() });
}

/// Nanoseconds of CPU time that the calling thread has used.
pub fn thread_time() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which is there for it. The clock exists since Linux 2.6.12.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Lets others run that wait for a CPU, if there are any.
pub fn give_way() {
    std::thread::yield_now();
}

/// The TSC's frequency in kHz: as a hypervisor under us says, as CPUID 15h says, as the kernel found out when
/// it booted, or measured (once).
pub fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let virtualized = leaf(1, 0).ecx >> 31 & 1 != 0;
        let timing = if virtualized { u64::from(leaf(0x4000_0010, 0).eax) } else { 0 };
        if timing >= 100_000 {
            return timing;
        }
        let ratio = leaf(0x15, 0);
        // Hypervisors may scale the TSC and pass the host's ratio through.
        if !virtualized && ratio.eax != 0 && ratio.ebx != 0 && ratio.ecx != 0 {
            return u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax) / 1000;
        }
        // One millisecond is enough to tell whether the kernel's number is the TSC's.
        match boot_khz() {
            Some(khz) if measure_tsc(Duration::from_millis(1)).abs_diff(khz) < khz / 1000 => khz,
            _ => measure_tsc(Duration::from_millis(25)),
        }
    })
}

/// The frequency that Linux calibrated when it booted, which is what /proc/cpuinfo shows on processors whose
/// speed it cannot follow (no APERF and MPERF, no cpufreq driver): most virtual machines. Unlike a measurement
/// it is the same each time.
fn boot_khz() -> Option<u64> {
    let followed = leaf(6, 0).ecx & 1 != 0 || Path::new("/sys/devices/system/cpu/cpu0/cpufreq").exists();
    let cpuinfo = if followed { None } else { std::fs::read_to_string("/proc/cpuinfo").ok() }?;
    let (mhz, khz) =
        cpuinfo.lines().find_map(|line| line.strip_prefix("cpu MHz"))?.split_once(':')?.1.trim().split_once('.')?;
    Some(1000 * mhz.parse::<u64>().ok()? + khz.parse::<u64>().ok().filter(|_| khz.len() == 3)?)
}

/// Counts the TSC against CLOCK_MONOTONIC for some time.
fn measure_tsc(time: Duration) -> u64 {
    let sample = || {
        // The tightest of a few readings bounds the error of the pair.
        (0..8)
            .map(|_| {
                let before = tsc();
                let now = Instant::now();
                let after = tsc();
                (after - before, now, before + (after - before) / 2)
            })
            .min_by_key(|sample| sample.0)
            .expect("eight samples")
    };
    let (_, start, start_tsc) = sample();
    std::thread::sleep(time);
    let (_, end, end_tsc) = sample();
    let nanoseconds = end.duration_since(start).as_nanos().max(1);
    (u128::from(end_tsc - start_tsc) * 1_000_000 / nanoseconds) as u64
}

/// The host's TSC.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions in user mode unless CR4.TSD is set, which Linux does on request only.
    unsafe { _rdtsc() }
}

/// Points this thread's GS base at `address`. Nothing else in the process uses GS.
///
/// # Errors
/// When the host refuses.
pub fn set_gs_base(address: u64) -> Result<()> {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    const ARCH_SET_GS: libc::c_int = 0x1001;
    // SAFETY: reads the auxiliary vector.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0 {
        // SAFETY: the kernel says that WRGSBASE works in user mode; no Rust or libc code addresses by GS.
        unsafe { std::arch::asm!("wrgsbase {}", in(reg) address, options(nomem, nostack, preserves_flags)) };
        return Ok(());
    }
    // SAFETY: as above, by the system call.
    if unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, address) } != 0 {
        return Err(Error::last_os("setting the GS base of a vCPU thread"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyvisor_x86::cpuid::CpuModel;

    #[test]
    fn frequency_agrees_with_the_clock() {
        let (said, measured) = (tsc_khz(), measure_tsc(Duration::from_millis(25)));
        assert!(said.abs_diff(measured) * 100 < said, "{said} kHz, measured {measured}");
    }

    #[test]
    fn models_are_possible_here() {
        let supported = supported_cpuid(tsc_khz());
        let table = CpuModel::Host.table(&supported, 1, 0).expect("the host model needs nothing special");
        assert_eq!(table.get(0x4000_0000, 0).unwrap().ebx, u32::from_le_bytes(*b"KVMK"));
        assert_eq!(table.get(0x8000_0008, 0).unwrap().eax >> 8 & 0xff, 48);
    }

    #[test]
    fn frequency_leaf_is_exact_or_absent() {
        for khz in [2_300_000, 2_299_998, 3_000_000, 2_100_500] {
            let [(_, ratio), _] = frequency_leaves(khz);
            let product = ratio.ecx / 1000 * ratio.ebx;
            if let Some(said) = product.checked_div(ratio.eax) {
                assert_eq!(u64::from(said), khz);
            }
        }
        assert_ne!(frequency_leaves(2_300_000)[0].1.eax, 0);
    }
}
