//! A vCPU's whole state from KVM and back.
//!
//! The state is the same plain struct as the other engine's, so what KVM keeps apart is put together, and
//! what only KVM knows is turned into what an instruction boundary looks like on hardware:
//!
//! - An interrupt that KVM has taken from the local APIC and not yet delivered goes back into IRR. One from
//!   the 8259 cannot go back, and is [`PendingEvents::interrupt`].
//! - An exception or NMI that is being delivered is pending. INT3 and INTO are not: RIP still points at
//!   the instruction, which raises them again.
//! - KVM's reset default for an MSR that a state lacks is replaced by what the other engine has.
//!
//! The order of writing matters and is KVM's: what is checked against CPUID after CPUID; the APIC's mode, in
//! the system registers, before its page; the page before the TSC deadline; events and activity last
//! (Linux Documentation/virt/kvm/api.rst).

use crate::vcpu::KvmVcpu;
use crate::{host_error, state_error};
use anyvisor_engine::{Error, Result};
use anyvisor_x86::bits::{efer, gpr, rflags, xcr0};
use anyvisor_x86::cpuid::{AVX, PKS, SPEC_CTRL, XSAVE};
use anyvisor_x86::exception::vector;
use anyvisor_x86::lapic::{self, LocalApic, Now, reg};
use anyvisor_x86::segment::{attr, index};
use anyvisor_x86::state::{Activity, PendingEvents, Segments, XSAVE_SIZE};
use anyvisor_x86::{Cpuid, DescriptorTable, Exception, Segment, VcpuState, msr};
use kvm_bindings as kvm;
use kvm_ioctls::VcpuFd;

/// MTRRs enabled, default type write-back: what firmware leaves. KVM's memory types do not depend on it.
const MTRR_DEFAULT: u64 = 0x806;
/// Fast strings on; branch trace and precise event sampling unavailable.
const MISC_ENABLE_DEFAULT: u64 = 0x1801;
/// SDM vol. 3A 11.12.4.
const PAT_DEFAULT: u64 = 0x0007_0406_0007_0406;

/// Offsets in the XSAVE area (SDM vol. 1 13.4).
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const MXCSR_DEFINED: u32 = 0xffff;
const X87_END: usize = 160;
const LEGACY_END: usize = 416;
const HEADER: usize = 512;
const YMM_HIGH: usize = 576;

/// Reads the whole state.
pub(crate) fn read(vcpu: &KvmVcpu) -> Result<VcpuState> {
    let fd = &vcpu.fd;
    let failed = |what: &'static str| move |error| host_error(format!("reading a vCPU's {what}"), error);
    // First: it lets an INIT or start-up IPI that waits happen.
    let activity = fd.get_mp_state().map_err(failed("activity"))?.mp_state;
    let events = fd.get_vcpu_events().map_err(failed("events"))?;
    let regs = fd.get_regs().map_err(failed("registers"))?;
    let sregs = fd.get_sregs().map_err(failed("system registers"))?;
    let debug = fd.get_debug_regs().map_err(failed("debug registers"))?;
    let area = fd.get_xsave().map_err(failed("XSAVE area"))?;
    let page = fd.get_lapic().map_err(failed("local APIC"))?;
    let mut lapic: Vec<u8> = page.regs.iter().map(|byte| *byte as u8).collect();
    let interrupt = give_back_interrupt(&events, &mut lapic);
    let mut dr = [0; 8];
    dr[..4].copy_from_slice(&debug.db);
    (dr[6], dr[7]) = (debug.dr6, debug.dr7);
    Ok(VcpuState {
        gpr: general(&regs),
        rip: regs.rip,
        rflags: regs.rflags,
        segments: segments(&sregs),
        gdtr: DescriptorTable { base: sregs.gdt.base, limit: sregs.gdt.limit },
        idtr: DescriptorTable { base: sregs.idt.base, limit: sregs.idt.limit },
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        dr,
        xcr0: read_xcr0(vcpu)?,
        msrs: read_msrs(vcpu, &sregs)?,
        xsave: xsave_area(&area),
        lapic,
        activity: match activity {
            kvm::KVM_MP_STATE_HALTED => Activity::Halted,
            kvm::KVM_MP_STATE_UNINITIALIZED | kvm::KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            _ => Activity::Running,
        },
        events: pending_events(&events, sregs.cr2, regs.rflags, interrupt),
    })
}

/// Writes the whole state.
pub(crate) fn write(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let fd = &vcpu.fd;
    check(vcpu, state)?;
    let lapic = lapic_page(vcpu, state)?;
    fd.set_sregs(&sregs(vcpu, state, &lapic)).map_err(|e| state_error("segments or control registers", e))?;
    fd.set_regs(&kvm_regs(state)).map_err(|e| state_error("registers", e))?;
    if vcpu.table.has(&XSAVE) {
        let mut xcrs = kvm::kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = state.xcr0;
        fd.set_xcrs(&xcrs).map_err(|e| state_error("XCR0", e))?;
    }
    let area = kvm_xsave(state, vcpu.table.has(&AVX))?;
    // SAFETY: KVM reads more than this structure only if the process has asked for larger states for its
    // guests (arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)), which nothing here does.
    unsafe { fd.set_xsave(&area) }.map_err(|e| state_error("XSAVE area", e))?;
    write_msrs(vcpu, &msrs_to_write(vcpu, state)?)?;
    let mut debug = kvm::kvm_debugregs { dr6: state.dr[6], dr7: state.dr[7], ..Default::default() };
    debug.db.copy_from_slice(&state.dr[..4]);
    fd.set_debug_regs(&debug).map_err(|e| state_error("debug registers", e))?;
    let mut page = kvm::kvm_lapic_state::default();
    page.regs.iter_mut().zip(&lapic).for_each(|(to, from)| *to = *from as _);
    fd.set_lapic(&page).map_err(|e| state_error("local APIC", e))?;
    vcpu.vm.expect_end(vcpu.id, level_triggered(&lapic))?;
    if vcpu.known_msrs().contains(&msr::TSC_DEADLINE) {
        write_msrs(vcpu, &[(msr::TSC_DEADLINE, state.msr(msr::TSC_DEADLINE).unwrap_or(0))])?;
    }
    fd.set_vcpu_events(&kvm_events(state)).map_err(|e| state_error("pending events", e))?;
    let mp_state = match state.activity {
        Activity::Running => kvm::KVM_MP_STATE_RUNNABLE,
        Activity::Halted => kvm::KVM_MP_STATE_HALTED,
        Activity::WaitForSipi => kvm::KVM_MP_STATE_INIT_RECEIVED,
    };
    fd.set_mp_state(kvm::kvm_mp_state { mp_state }).map_err(|e| state_error("activity", e))
}

fn bad(what: impl Into<String>) -> Error {
    Error::BadState(what.into())
}

/// Refuses what KVM would take and then trip over, or what it would refuse without saying why.
fn check(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let avx = state.xcr0 & xcr0::AVX != 0;
    if state.xcr0 & xcr0::X87 == 0 || state.xcr0 & !7 != 0 || avx && state.xcr0 & xcr0::SSE == 0 {
        return Err(bad(format!("XCR0 {:#x}", state.xcr0)));
    }
    if !vcpu.table.has(&XSAVE) && state.xcr0 != xcr0::X87 {
        return Err(bad(format!("XCR0 {:#x} without XSAVE", state.xcr0)));
    }
    if state.xsave.len() < YMM_HIGH || avx && state.xsave.len() < XSAVE_SIZE {
        return Err(bad(format!("an XSAVE area of {} bytes", state.xsave.len())));
    }
    if u32_at(&state.xsave, MXCSR) & !MXCSR_DEFINED != 0 {
        return Err(bad("reserved bits in MXCSR"));
    }
    if let Some(exception) = state.events.exception
        && (exception.vector > 31 || exception.vector == vector::NMI)
    {
        return Err(bad(format!("exception {}", exception.vector)));
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

// ---- general and system registers

fn general(r: &kvm::kvm_regs) -> [u64; 16] {
    let mut low = [0; 8];
    for (number, value) in [
        (gpr::RAX, r.rax),
        (gpr::RCX, r.rcx),
        (gpr::RDX, r.rdx),
        (gpr::RBX, r.rbx),
        (gpr::RSP, r.rsp),
        (gpr::RBP, r.rbp),
        (gpr::RSI, r.rsi),
        (gpr::RDI, r.rdi),
    ] {
        low[number] = value;
    }
    let [a, c, d, b, sp, bp, si, di] = low;
    [a, c, d, b, sp, bp, si, di, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]
}

fn kvm_regs(state: &VcpuState) -> kvm::kvm_regs {
    let g = &state.gpr;
    kvm::kvm_regs {
        rax: g[gpr::RAX],
        rbx: g[gpr::RBX],
        rcx: g[gpr::RCX],
        rdx: g[gpr::RDX],
        rsi: g[gpr::RSI],
        rdi: g[gpr::RDI],
        rsp: g[gpr::RSP],
        rbp: g[gpr::RBP],
        r8: g[gpr::R8],
        r9: g[gpr::R9],
        r10: g[gpr::R10],
        r11: g[gpr::R11],
        r12: g[gpr::R12],
        r13: g[gpr::R13],
        r14: g[gpr::R14],
        r15: g[gpr::R15],
        rip: state.rip,
        rflags: state.rflags,
    }
}

fn segments(s: &kvm::kvm_sregs) -> Segments {
    let mut seg = [Segment::default(); 6];
    for (number, from) in [
        (index::ES, &s.es),
        (index::CS, &s.cs),
        (index::SS, &s.ss),
        (index::DS, &s.ds),
        (index::FS, &s.fs),
        (index::GS, &s.gs),
    ] {
        seg[number] = segment(from);
    }
    Segments { seg, ldtr: segment(&s.ldt), tr: segment(&s.tr) }
}

fn segment(from: &kvm::kvm_segment) -> Segment {
    let bit = |value: u8, bit: u32| if value != 0 { bit } else { 0 };
    let attributes = u32::from(from.type_)
        | bit(from.s, attr::S)
        | u32::from(from.dpl & 3) << attr::DPL_SHIFT
        | bit(from.present, attr::P)
        | bit(from.avl, attr::AVL)
        | bit(from.l, attr::L)
        | bit(from.db, attr::DB)
        | bit(from.g, attr::G)
        | bit(from.unusable, attr::UNUSABLE);
    Segment { base: from.base, limit: from.limit, attributes, selector: from.selector }
}

fn kvm_segment(from: &Segment) -> kvm::kvm_segment {
    let bit = |bit: u32| u8::from(from.attributes & bit != 0);
    kvm::kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.attributes & attr::TYPE) as u8,
        present: bit(attr::P),
        dpl: from.dpl(),
        db: bit(attr::DB),
        s: bit(attr::S),
        l: bit(attr::L),
        g: bit(attr::G),
        avl: bit(attr::AVL),
        // VT-x does not enter a guest with a usable segment that is not present (SDM vol. 3C 27.3.1.2).
        unusable: u8::from(!from.is_usable() || from.attributes & attr::P == 0),
        padding: 0,
    }
}

fn sregs(vcpu: &KvmVcpu, state: &VcpuState, lapic: &[u8]) -> kvm::kvm_sregs {
    let seg = state.segments.seg.each_ref().map(kvm_segment);
    let efer_value = state.msr(msr::EFER).unwrap_or(0);
    let mut cs = seg[index::CS];
    if efer_value & efer::LMA == 0 {
        // The bit means nothing outside of long mode, and KVM does not take it.
        cs.l = 0;
    }
    let table = |from: &DescriptorTable| kvm::kvm_dtable { base: from.base, limit: from.limit, padding: [0; 3] };
    kvm::kvm_sregs {
        cs,
        ds: seg[index::DS],
        es: seg[index::ES],
        fs: seg[index::FS],
        gs: seg[index::GS],
        ss: seg[index::SS],
        tr: kvm_segment(&state.segments.tr),
        ldt: kvm_segment(&state.segments.ldtr),
        gdt: table(&state.gdtr),
        idt: table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: u64::from(u32_at(lapic, reg::TPR as usize) >> 4 & 0xf),
        efer: efer_value,
        apic_base: apic_base(vcpu.id, state),
        interrupt_bitmap: [0; 4],
    }
}

// ---- XSAVE

fn read_xcr0(vcpu: &KvmVcpu) -> Result<u64> {
    if !vcpu.table.has(&XSAVE) {
        return Ok(xcr0::X87);
    }
    let xcrs = vcpu.fd.get_xcrs().map_err(|e| host_error("reading a vCPU's XCR0", e))?;
    Ok(xcrs.xcrs[0].value)
}

/// KVM's area, in which components that are not in use hold their initial values, with all components.
fn xsave_area(area: &kvm::kvm_xsave) -> Vec<u8> {
    let from: Vec<u8> = area.region.iter().take(XSAVE_SIZE / 4).flat_map(|word| word.to_le_bytes()).collect();
    let mut image = vec![0; XSAVE_SIZE];
    image[..LEGACY_END].copy_from_slice(&from[..LEGACY_END]);
    image[MXCSR_MASK..MXCSR_MASK + 4].copy_from_slice(&MXCSR_DEFINED.to_le_bytes());
    let present = u64::from(u32_at(&from, HEADER));
    if present & xcr0::AVX != 0 {
        image[YMM_HIGH..].copy_from_slice(&from[YMM_HIGH..]);
    }
    image[HEADER] = (xcr0::X87 | xcr0::SSE | xcr0::AVX) as u8;
    image
}

fn kvm_xsave(state: &VcpuState, avx: bool) -> Result<kvm::kvm_xsave> {
    let mut image = [0u8; XSAVE_SIZE];
    let length = state.xsave.len().min(XSAVE_SIZE);
    let present = u64::from(u32_at(&state.xsave, HEADER));
    let initial = anyvisor_x86::state::initial_xsave();
    let component = |bit: u64| if present & bit != 0 { &state.xsave } else { &initial };
    image[..X87_END].copy_from_slice(&component(xcr0::X87)[..X87_END]);
    image[MXCSR..MXCSR + 4].copy_from_slice(&state.xsave[MXCSR..MXCSR + 4]);
    image[MXCSR_MASK..MXCSR_MASK + 4].fill(0);
    image[X87_END..LEGACY_END].copy_from_slice(&component(xcr0::SSE)[X87_END..LEGACY_END]);
    if present & xcr0::AVX != 0 && length == XSAVE_SIZE {
        image[YMM_HIGH..].copy_from_slice(&state.xsave[YMM_HIGH..XSAVE_SIZE]);
    }
    if !avx && image[YMM_HIGH..].iter().any(|byte| *byte != 0) {
        return Err(bad("YMM registers on a processor without AVX"));
    }
    image[HEADER] = (xcr0::X87 | xcr0::SSE | if avx { xcr0::AVX } else { 0 }) as u8;
    let mut area = kvm::kvm_xsave::default();
    for (word, bytes) in area.region.iter_mut().zip(image.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    Ok(area)
}

// ---- MSRs

impl KvmVcpu {
    /// The MSRs of a state that this vCPU has, without those that KVM keeps among the system registers.
    pub(crate) fn known_msrs(&self) -> Vec<u32> {
        let of_kvm = self.vm.msrs.get_or_init(|| {
            let by_number = msr::SAVED.iter().copied().filter(|n| !matches!(*n, msr::EFER | msr::IA32_APIC_BASE));
            by_number.filter(|number| read_msr(&self.fd, *number).is_some()).collect()
        });
        of_kvm.iter().copied().filter(|number| shown(&self.table, *number)).collect()
    }
}

/// Whether a guest with this table has the MSR, as far as that depends on the table.
fn shown(table: &Cpuid, number: u32) -> bool {
    let paravirtual = |bit: u32| table.get(0x4000_0001, 0).is_some_and(|leaf| leaf.eax >> bit & 1 != 0);
    match number {
        msr::IA32_SPEC_CTRL => table.has(&SPEC_CTRL),
        msr::IA32_PKRS => table.has(&PKS),
        msr::KVM_WALL_CLOCK_NEW | msr::KVM_SYSTEM_TIME_NEW => paravirtual(3),
        msr::KVM_STEAL_TIME => paravirtual(5),
        msr::KVM_PV_EOI_EN => paravirtual(6),
        msr::KVM_POLL_CONTROL => paravirtual(12),
        _ => true,
    }
}

fn entry(index: u32, data: u64) -> kvm::kvm_msr_entry {
    kvm::kvm_msr_entry { index, data, ..Default::default() }
}

fn read_msr(fd: &VcpuFd, number: u32) -> Option<u64> {
    let mut msrs = kvm::Msrs::from_entries(&[entry(number, 0)]).expect("one entry");
    matches!(fd.get_msrs(&mut msrs), Ok(1)).then(|| msrs.as_slice()[0].data)
}

/// All MSRs of the state, in the order of [`msr::SAVED`].
fn read_msrs(vcpu: &KvmVcpu, sregs: &kvm::kvm_sregs) -> Result<Vec<(u32, u64)>> {
    let entries: Vec<_> = vcpu.known_msrs().into_iter().map(|number| entry(number, 0)).collect();
    let mut msrs = kvm::Msrs::from_entries(&entries).expect("fewer MSRs than KVM takes");
    let count = vcpu.fd.get_msrs(&mut msrs).map_err(|e| host_error("reading a vCPU's MSRs", e))?;
    if let Some(failed) = entries.get(count) {
        return Err(Error::Unsupported(format!("KVM does not read MSR {:#x} any more", failed.index)));
    }
    let value = |number: u32| match number {
        msr::EFER => Some(sregs.efer),
        msr::IA32_APIC_BASE => Some(sregs.apic_base),
        _ => msrs.as_slice().iter().find(|entry| entry.index == number).map(|entry| entry.data),
    };
    Ok(msr::SAVED.iter().filter_map(|number| Some((*number, value(*number)?))).collect())
}

/// What an MSR is if the state lacks it.
fn default_msr(number: u32) -> u64 {
    match number {
        msr::MTRR_DEF_TYPE => MTRR_DEFAULT,
        msr::IA32_MISC_ENABLE => MISC_ENABLE_DEFAULT,
        msr::IA32_PAT => PAT_DEFAULT,
        msr::KVM_POLL_CONTROL => 1,
        _ => 0,
    }
}

/// The MSRs to write before the local APIC. A TSC that the state lacks goes on as it is.
fn msrs_to_write(vcpu: &KvmVcpu, state: &VcpuState) -> Result<Vec<(u32, u64)>> {
    let known = vcpu.known_msrs();
    let elsewhere = [msr::EFER, msr::IA32_APIC_BASE, msr::TSC_DEADLINE];
    for (number, value) in &state.msrs {
        if !known.contains(number) && !elsewhere.contains(number) && *value != default_msr(*number) {
            return Err(bad(format!("MSR {number:#x}, which it has, does not exist under KVM with its CPU model")));
        }
    }
    let written = known.into_iter().filter(|number| !elsewhere.contains(number));
    Ok(written
        .filter_map(|number| match state.msr(number) {
            Some(value) => Some((number, value)),
            None if number == msr::IA32_TSC => None,
            None => Some((number, default_msr(number))),
        })
        .collect())
}

fn write_msrs(vcpu: &KvmVcpu, values: &[(u32, u64)]) -> Result<()> {
    let entries: Vec<_> = values.iter().map(|(number, value)| entry(*number, *value)).collect();
    let msrs = kvm::Msrs::from_entries(&entries).expect("fewer MSRs than KVM takes");
    let count = vcpu.fd.set_msrs(&msrs).map_err(|e| host_error("setting a vCPU's MSRs", e))?;
    match values.get(count) {
        Some((number, value)) => Err(bad(format!("MSR {number:#x} cannot be {value:#x}"))),
        None => Ok(()),
    }
}

// ---- local APIC

fn apic_base(id: u32, state: &VcpuState) -> u64 {
    let bsp = if id == 0 { lapic::base::BSP } else { 0 };
    state.msr(msr::IA32_APIC_BASE).unwrap_or(lapic::DEFAULT_BASE | lapic::base::EN | bsp)
}

/// The register page to write: the state's, or that of a reset local APIC.
fn lapic_page(vcpu: &KvmVcpu, state: &VcpuState) -> Result<Vec<u8>> {
    if !state.lapic.is_empty() {
        if state.lapic.len() != lapic::PAGE_SIZE {
            return Err(bad(format!("a local APIC page of {} bytes", state.lapic.len())));
        }
        return Ok(state.lapic.clone());
    }
    let leaf = vcpu.table.get(1, 0).unwrap_or_default();
    let features =
        lapic::Features { x2apic: leaf.ecx >> 21 & 1 != 0, tsc_deadline: leaf.ecx >> 24 & 1 != 0, physical_bits: 36 };
    let mut apic = LocalApic::new(vcpu.id, features);
    if vcpu.id == 0 {
        apic.set_virtual_wire();
    }
    Ok(apic.save(Now::default()))
}

/// Byte and bit of `vector` in one of the page's 256-bit registers.
fn vector_bit(register: u32, vector: u8) -> (usize, u8) {
    (register as usize + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8), 1 << (vector % 8))
}

fn has_vector(lapic: &[u8], register: u32, vector: u8) -> bool {
    let (at, bit) = vector_bit(register, vector);
    lapic[at] & bit != 0
}

/// The level-triggered vectors that wait or are in service: their EOI is the I/O APIC's business.
fn level_triggered(lapic: &[u8]) -> impl Iterator<Item = u8> + '_ {
    (16..=255u8).filter(|vector| {
        has_vector(lapic, reg::TMR, *vector)
            && (has_vector(lapic, reg::IRR, *vector) || has_vector(lapic, reg::ISR, *vector))
    })
}

/// Takes back the acknowledgement of an interrupt that has not been delivered yet. One that did not come from
/// the local APIC is returned.
fn give_back_interrupt(events: &kvm::kvm_vcpu_events, lapic: &mut [u8]) -> Option<u8> {
    // A software interrupt's instruction is executed again.
    if events.interrupt.injected == 0 || events.interrupt.soft != 0 {
        return None;
    }
    let vector = events.interrupt.nr;
    if !has_vector(lapic, reg::ISR, vector) {
        return Some(vector);
    }
    let (at, bit) = vector_bit(reg::ISR, vector);
    lapic[at] &= !bit;
    let (at, bit) = vector_bit(reg::IRR, vector);
    lapic[at] |= bit;
    None
}

// ---- events

fn pending_events(events: &kvm::kvm_vcpu_events, cr2: u64, rflags: u64, interrupt: Option<u8>) -> PendingEvents {
    let from = &events.exception;
    let again = from.injected != 0 && matches!(from.nr, vector::BP | vector::OF);
    let there = (from.injected != 0 || from.pending != 0) && !again;
    let payload = match from.nr {
        _ if events.exception_has_payload != 0 => events.exception_payload,
        vector::PF => cr2,
        _ => 0,
    };
    PendingEvents {
        exception: there.then(|| Exception {
            vector: from.nr,
            error_code: (from.has_error_code != 0).then_some(from.error_code),
            payload,
        }),
        nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
        nmi_blocked: events.nmi.masked != 0 && events.nmi.injected == 0,
        interrupt_shadow: shadow(events.interrupt.shadow.into(), rflags),
        interrupt,
    }
}

/// AMD-V has one kind of interrupt shadow, which KVM shows as both (APM vol. 2 15.21.5). It is STI's if interrupts are
/// enabled: the other would be as good, and VT-x takes STI's only then (SDM vol. 3C 27.3.1.5).
fn shadow(from: u32, flags: u64) -> u8 {
    const STI: u8 = 1;
    const MOV_SS: u8 = 2;
    match (from & kvm::KVM_X86_SHADOW_INT_STI != 0, from & kvm::KVM_X86_SHADOW_INT_MOV_SS != 0) {
        (true, true) if flags & rflags::IF == 0 => MOV_SS,
        (true, _) => STI,
        (false, true) => MOV_SS,
        (false, false) => 0,
    }
}

fn kvm_events(state: &VcpuState) -> kvm::kvm_vcpu_events {
    let from = &state.events;
    let mut events = kvm::kvm_vcpu_events {
        flags: kvm::KVM_VCPUEVENT_VALID_NMI_PENDING
            | kvm::KVM_VCPUEVENT_VALID_SHADOW
            | kvm::KVM_VCPUEVENT_VALID_PAYLOAD,
        ..Default::default()
    };
    if let Some(exception) = from.exception {
        events.exception.pending = 1;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = exception.error_code.is_some().into();
        events.exception.error_code = exception.error_code.unwrap_or(0);
        events.exception_has_payload = matches!(exception.vector, vector::PF | vector::DB).into();
        events.exception_payload = exception.payload;
    }
    if let Some(vector) = from.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    let shadow = |bit: u8, kvm_bit: u32| if from.interrupt_shadow & bit != 0 { kvm_bit as u8 } else { 0 };
    events.interrupt.shadow = shadow(1, kvm::KVM_X86_SHADOW_INT_STI) | shadow(2, kvm::KVM_X86_SHADOW_INT_MOV_SS);
    events.nmi.pending = from.nmi_pending.into();
    events.nmi.masked = from.nmi_blocked.into();
    events
}
