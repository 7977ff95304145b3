//! Tests of the local APIC, by the tables and figures of SDM vol. 3A chapter 10.

use super::*;

const T0: Now = Now { ns: 0, tsc: 0 };

fn ns(ns: u64) -> Now {
    Now { ns, tsc: 0 }
}

fn tsc(tsc: u64) -> Now {
    Now { ns: 0, tsc }
}

/// An xAPIC that software has enabled.
fn xapic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(id, Features::default());
    assert_eq!(apic.write32(reg::SVR, 0x1ff, T0), Work::None);
    apic
}

/// The same in x2APIC mode.
fn x2apic(id: u32) -> LocalApic {
    let mut apic = xapic(id);
    let base = apic.base() | base::EXTD;
    assert_eq!(apic.write_msr(msr::IA32_APIC_BASE, base, T0), Ok(Work::None));
    apic
}

fn set(apic: &mut LocalApic, offset: u32, value: u32) {
    assert_eq!(apic.write32(offset, value, T0), Work::None, "register {offset:#x}");
}

#[test]
fn reset_values() {
    let mut apic = LocalApic::new(3, Features::default());
    for (offset, value) in [
        (reg::ID, 3 << 24),
        (reg::VERSION, 0x50014),
        (reg::TPR, 0),
        (reg::LDR, 0),
        (reg::DFR, !0),
        (reg::SVR, 0xff),
        (reg::LVT_TIMER, 0x10000),
        (reg::LVT_LINT0, 0x10000),
        (reg::LVT_LINT1, 0x10000),
        (reg::LVT_ERROR, 0x10000),
        (reg::LVT_PERF, 0x10000),
        (reg::LVT_THERMAL, 0x10000),
        (reg::INITIAL_COUNT, 0),
        (reg::CURRENT_COUNT, 0),
        (reg::DIVIDE, 0),
    ] {
        assert_eq!(apic.read32(offset, T0), value, "register {offset:#x}");
    }
    assert_eq!(apic.base(), 0xfee0_0800);
    assert_eq!(LocalApic::new(0, Features::default()).base(), 0xfee0_0900);
    assert_eq!(apic.mmio_base(), Some(DEFAULT_BASE));
    assert_eq!(apic.next_deadline(), None);
}

/// Writes of all ones and what then reads back, in xAPIC mode.
#[test]
fn writable_bits() {
    for (offset, expected) in [
        (reg::ID, 1 << 24),
        (reg::VERSION, 0x50014),
        (reg::TPR, 0xff),
        (reg::LDR, 0xff00_0000),
        (reg::DFR, !0),
        (reg::SVR, 0x3ff),
        (reg::ICR_HIGH, 0xff00_0000),
        (reg::LVT_THERMAL, 0x107ff),
        (reg::LVT_PERF, 0x107ff),
        (reg::LVT_LINT0, 0x1a7ff),
        (reg::LVT_LINT1, 0x1a7ff),
        (reg::LVT_ERROR, 0x100ff),
        (reg::DIVIDE, 0xb),
        (reg::CURRENT_COUNT, 0),
        (reg::ISR, 0),
        (reg::IRR + 0x70, 0),
    ] {
        let mut apic = xapic(1);
        set(&mut apic, offset, !0);
        assert_eq!(apic.read32(offset, T0), expected, "register {offset:#x}");
        set(&mut apic, reg::ESR, 0);
        assert_eq!(apic.read32(reg::ESR, T0), 0, "register {offset:#x} is an error");
    }
    let mut apic = xapic(1);
    set(&mut apic, reg::DFR, 0);
    assert_eq!(apic.read32(reg::DFR, T0), 0x0fff_ffff);
}

#[test]
fn illegal_registers_are_noted_in_esr_and_raise_the_error_interrupt_once() {
    for offset in [0, 0x10, 0x40, 0x70, 0x290, 0x2f0, 0x3a0, 0x3d0, 0x3f0, 0x84, 0x325] {
        let mut apic = xapic(0);
        set(&mut apic, reg::LVT_ERROR, 0xfe);
        assert_eq!(apic.read32(offset, T0), 0);
        assert_eq!(apic.highest_pending(), Some(0xfe));
        assert_eq!(apic.acknowledge(), Some(0xfe));
        assert_eq!(apic.read32(reg::ESR, T0), 0, "not latched before a write");
        set(&mut apic, offset, 0);
        assert_eq!(apic.eoi(), None);
        assert_eq!(apic.highest_pending(), None, "not armed again before a write of ESR");
        set(&mut apic, reg::ESR, 0);
        assert_eq!(apic.read32(reg::ESR, T0), esr::ILLEGAL_REGISTER, "offset {offset:#x}");
        set(&mut apic, reg::ESR, 0);
        assert_eq!(apic.read32(reg::ESR, T0), 0);
    }
}

#[test]
fn mode_transitions() {
    const DISABLED: u64 = DEFAULT_BASE;
    const XAPIC: u64 = DEFAULT_BASE | base::EN;
    const X2APIC: u64 = XAPIC | base::EXTD;
    // SDM figure 10-27; from, to, allowed.
    for (from, to, allowed) in [
        (DISABLED, DISABLED, true),
        (DISABLED, XAPIC, true),
        (DISABLED, X2APIC, false),
        (DISABLED, DEFAULT_BASE | base::EXTD, false),
        (XAPIC, DISABLED, true),
        (XAPIC, XAPIC, true),
        (XAPIC, X2APIC, true),
        (XAPIC, DEFAULT_BASE | base::EXTD, false),
        (X2APIC, DISABLED, true),
        (X2APIC, XAPIC, false),
        (X2APIC, X2APIC, true),
        (X2APIC, DEFAULT_BASE | base::EXTD, false),
        (XAPIC, XAPIC | 1, false),
        (XAPIC, XAPIC | 1 << 9, false),
        (XAPIC, XAPIC | 1 << 46, false),
        (XAPIC, XAPIC | 1 << 45, true),
        (XAPIC, XAPIC | base::BSP, true),
    ] {
        let mut apic = LocalApic::new(1, Features::default());
        for step in [XAPIC, from] {
            assert_eq!(apic.write_msr(msr::IA32_APIC_BASE, step, T0), Ok(Work::None));
        }
        let result = apic.write_msr(msr::IA32_APIC_BASE, to, T0);
        assert_eq!(result.is_ok(), allowed, "{from:#x} to {to:#x}");
        assert_eq!(apic.read_msr(msr::IA32_APIC_BASE, T0), Ok(if allowed { to } else { from }));
    }
    let mut old = LocalApic::new(1, Features { x2apic: false, ..Features::default() });
    assert_eq!(old.write_msr(msr::IA32_APIC_BASE, X2APIC, T0), Err(GeneralProtection));
}

#[test]
fn entering_x2apic_keeps_interrupts_and_sets_the_identity() {
    let mut apic = xapic(0x25);
    assert!(apic.accept(0x41, false));
    set(&mut apic, reg::LDR, 0x0100_0000);
    set(&mut apic, reg::ICR_HIGH, 0x0700_0000);
    assert_eq!(apic.write_msr(msr::IA32_APIC_BASE, apic.base() | base::EXTD, T0), Ok(Work::None));
    assert_eq!(apic.mmio_base(), None);
    assert_eq!(apic.highest_pending(), Some(0x41));
    assert_eq!(apic.read_msr(0x802, T0), Ok(0x25));
    assert_eq!(apic.read_msr(0x80d, T0), Ok(0x2_0020));
    assert_eq!(apic.read_msr(0x80f, T0), Ok(0x1ff));
    assert_eq!(apic.read_msr(0x830, T0), Ok(0));
    apic.init();
    assert!(apic.is_x2apic());
    assert_eq!(apic.read_msr(0x80d, T0), Ok(0x2_0020));
    assert_eq!(apic.read_msr(0x80f, T0), Ok(0xff));
    // Through disabled back to xAPIC everything is as after reset.
    for base in [DEFAULT_BASE, DEFAULT_BASE | base::EN] {
        assert_eq!(apic.write_msr(msr::IA32_APIC_BASE, base, T0), Ok(Work::None));
    }
    assert_eq!(apic.read32(reg::ID, T0), 0x2500_0000);
    assert_eq!(apic.read32(reg::LDR, T0), 0);
    assert_eq!(apic.highest_pending(), None);
}

#[test]
fn x2apic_register_rules() {
    let readable = |index: u32| x2apic(2).read_msr(index, T0).is_ok();
    let writable = |index: u32, value: u64| x2apic(2).write_msr(index, value, T0).is_ok();
    // SDM table 10-6.
    let read_write = [0x808, 0x80f, 0x828, 0x830, 0x832, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x83e];
    let read_only = [0x802, 0x803, 0x80a, 0x80d, 0x810, 0x817, 0x818, 0x81f, 0x820, 0x827, 0x839];
    let write_only = [0x80b, 0x83f];
    for index in 0x800..=0x8ff {
        let in_bitmap = (0x810..0x828).contains(&index);
        let rw = read_write.contains(&index);
        assert_eq!(readable(index), rw || read_only.contains(&index) || in_bitmap, "read {index:#x}");
        assert_eq!(writable(index, 0), rw || write_only.contains(&index), "write {index:#x}");
    }
    // Index, highest legal value, and an illegal one.
    for (index, legal, illegal) in [
        (0x808, 0xff, 0x100),
        (0x80b, 0, 1),
        (0x80f, 0x3ff, 0x1000),
        (0x828, 0, 1),
        (0x830, 0xffff_ffff_000c_cfff, 0x0010_0000),
        (0x830, 0, 0x2000),
        (0x830, 0, 0x1_0000),
        (0x832, 0x7_00ff, 0x100),
        (0x833, 0x1_07ff, 0x2000),
        (0x835, 0x1_e7ff, 0x800),
        (0x837, 0x1_00ff, 0x400),
        (0x838, 0xffff_ffff, 1 << 32),
        (0x83e, 0xb, 4),
        (0x83f, 0xff, 0x100),
    ] {
        assert!(writable(index, legal), "{index:#x} {legal:#x}");
        assert!(!writable(index, illegal), "{index:#x} {illegal:#x}");
        assert!(index == 0x830 || !writable(index, legal | 1 << 32), "{index:#x} upper half");
    }
    let mut plain = xapic(2);
    assert_eq!(plain.read_msr(0x802, T0), Err(GeneralProtection));
    assert_eq!(plain.write_msr(0x80b, 0, T0), Err(GeneralProtection));
}

#[test]
fn priorities_nest() {
    let mut apic = xapic(0);
    for vector in [0x31, 0x35, 0x52, 0xef] {
        assert!(apic.accept(vector, false));
    }
    assert_eq!(apic.acknowledge(), Some(0xef));
    assert_eq!(apic.ppr(), 0xe0);
    assert!(apic.accept(0xe1, false));
    assert_eq!(apic.acknowledge(), None, "the same class waits");
    assert!(apic.accept(0xf0, false));
    assert_eq!(apic.acknowledge(), Some(0xf0));
    assert_eq!((apic.eoi(), apic.eoi()), (None, None));
    assert_eq!(apic.acknowledge(), Some(0xe1));
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.acknowledge(), Some(0x52));
    assert_eq!(apic.eoi(), None);
    apic.set_cr8(3);
    assert_eq!((apic.tpr(), apic.cr8(), apic.ppr()), (0x30, 3, 0x30));
    assert_eq!(apic.highest_pending(), None);
    apic.set_cr8(2);
    assert_eq!(apic.acknowledge(), Some(0x35));
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.acknowledge(), Some(0x31));
    assert_eq!(apic.eoi(), None);
    assert_eq!((apic.acknowledge(), apic.eoi()), (None, None));
}

#[test]
fn ppr_takes_the_full_tpr_or_the_class_of_isr() {
    for (tpr, isr, ppr) in [(0, 0, 0), (0x3c, 0, 0x3c), (0x3c, 0x35, 0x3c), (0x3c, 0x47, 0x40), (0xff, 0xfe, 0xff)] {
        let mut apic = xapic(0);
        if isr != 0 {
            assert!(apic.accept(isr, false));
            assert_eq!(apic.acknowledge(), Some(isr));
        }
        set(&mut apic, reg::TPR, tpr);
        assert_eq!(apic.read32(reg::PPR, T0), ppr, "tpr {tpr:#x} isr {isr:#x}");
    }
}

#[test]
fn every_vector_travels_through_the_registers() {
    for vector in 0..=255u8 {
        let mut apic = xapic(0);
        assert_eq!(apic.accept(vector, vector % 2 == 0), vector >= 16);
        if vector < 16 {
            set(&mut apic, reg::ESR, 0);
            assert_eq!(apic.read32(reg::ESR, T0), esr::RECEIVE_ILLEGAL_VECTOR);
            continue;
        }
        let word = u32::from(vector / 32) * 16;
        let bit = 1 << (vector % 32);
        let tmr = if vector % 2 == 0 { bit } else { 0 };
        assert_eq!(apic.read32(reg::IRR + word, T0), bit);
        assert_eq!(apic.read32(reg::TMR + word, T0), tmr);
        assert_eq!(apic.acknowledge(), Some(vector));
        assert_eq!((apic.read32(reg::IRR + word, T0), apic.read32(reg::ISR + word, T0)), (0, bit));
        let work = apic.write32(reg::EOI, 0, T0);
        assert_eq!(work, if vector % 2 == 0 { Work::Eoi(vector) } else { Work::None });
        assert_eq!(apic.read32(reg::ISR + word, T0), 0);
    }
}

#[test]
fn highest_is_kept_under_random_traffic() {
    let mut apic = xapic(0);
    let mut seed = 1u32;
    for _ in 0..20_000 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        match seed >> 30 {
            0 | 1 => {
                apic.accept((seed >> 16) as u8, seed & 1 != 0);
            }
            2 => {
                apic.acknowledge();
            }
            _ => {
                apic.eoi();
            }
        }
        assert_eq!(apic.highest_irr, apic.highest(reg::IRR));
        assert_eq!(apic.highest_isr, apic.highest(reg::ISR));
    }
}

#[test]
fn software_disable_masks_and_refuses() {
    let mut apic = xapic(0);
    set(&mut apic, reg::LVT_LINT0, 0x700);
    assert!(apic.accepts_extint());
    assert!(apic.accept(0x40, false));
    set(&mut apic, reg::SVR, 0xff);
    assert_eq!(apic.read32(reg::LVT_LINT0, T0), 0x10700);
    set(&mut apic, reg::LVT_LINT0, 0x700);
    assert!(!apic.accepts_extint(), "the mask cannot be cleared");
    assert!(!apic.accept(0x50, false));
    assert_eq!(apic.highest_pending(), Some(0x40), "what was accepted stays");
    assert_eq!(apic.deliver(DeliveryMode::Nmi, 0, false), Delivery::Nmi);
    assert_eq!(apic.deliver(DeliveryMode::StartUp, 0x9a, false), Delivery::StartUp(0x9a));
    assert_eq!(apic.deliver(DeliveryMode::Fixed, 0x50, false), Delivery::Ignored);
}

#[test]
fn icr_becomes_a_message() {
    use Destination::{Broadcast, Logical, Physical};
    let message = |mode, vector, destination, exclude_self| {
        Work::Ipi(Message { mode, vector, level: false, destination, exclude_self })
    };
    // ICR low, destination, and the message in xAPIC mode.
    for (low, destination, expected) in [
        (0x0000_00fd, 2, message(DeliveryMode::Fixed, 0xfd, Physical(2), false)),
        (0x0000_08fd, 2, message(DeliveryMode::Fixed, 0xfd, Logical(2), false)),
        (0x0000_00fd, 0xff, message(DeliveryMode::Fixed, 0xfd, Broadcast, false)),
        (0x0000_08fd, 0xff, message(DeliveryMode::Fixed, 0xfd, Logical(0xff), false)),
        (0x0000_c0fd, 2, message(DeliveryMode::Fixed, 0xfd, Physical(2), false)),
        (0x0000_09fd, 3, message(DeliveryMode::LowestPriority, 0xfd, Logical(3), false)),
        (0x0000_0400, 1, message(DeliveryMode::Nmi, 0, Physical(1), false)),
        (0x0000_c500, 1, message(DeliveryMode::Init, 0, Physical(1), false)),
        (0x0000_8500, 1, Work::None),
        (0x0000_0699, 1, message(DeliveryMode::StartUp, 0x99, Physical(1), false)),
        (0x0000_0200, 1, message(DeliveryMode::Smi, 0, Physical(1), false)),
        (0x0008_00fd, 0, message(DeliveryMode::Fixed, 0xfd, Broadcast, false)),
        (0x000c_00fd, 0, message(DeliveryMode::Fixed, 0xfd, Broadcast, true)),
        (0x000c_4500, 0, message(DeliveryMode::Init, 0, Broadcast, true)),
        (0x0000_0300, 1, Work::None),
        (0x0000_0700, 1, Work::None),
        (0x0004_0400, 1, Work::None),
    ] {
        let mut apic = xapic(0);
        set(&mut apic, reg::ICR_HIGH, destination << 24);
        assert_eq!(apic.write32(reg::ICR_LOW, low | 1 << 12, T0), expected, "ICR {low:#x}");
        assert_eq!(apic.read32(reg::ICR_LOW, T0), low, "and is never busy");
        let mut apic = x2apic(0);
        let value = u64::from(if destination == 0xff { !0 } else { destination }) << 32 | u64::from(low);
        let expected = match expected {
            Work::Ipi(Message { destination: Logical(0xff), .. }) => {
                message(DeliveryMode::Fixed, 0xfd, Broadcast, false)
            }
            other => other,
        };
        assert_eq!(apic.write_msr(0x830, value, T0), Ok(expected), "x2APIC ICR {value:#x}");
        assert_eq!(apic.read_msr(0x830, T0), Ok(value));
    }
}

#[test]
fn self_ipis_stay_here_and_illegal_vectors_are_errors() {
    let mut apic = xapic(0);
    set(&mut apic, reg::ICR_LOW, 0x0004_0061);
    assert_eq!(apic.highest_pending(), Some(0x61));
    set(&mut apic, reg::ICR_LOW, 0x000c_000f);
    set(&mut apic, reg::ESR, 0);
    assert_eq!(apic.read32(reg::ESR, T0), esr::SEND_ILLEGAL_VECTOR);
    let mut apic = x2apic(7);
    assert_eq!(apic.write_msr(0x83f, 0x72, T0), Ok(Work::None));
    assert_eq!(apic.highest_pending(), Some(0x72));
    assert_eq!(apic.write_msr(0x83f, 5, T0), Ok(Work::None));
    assert_eq!(apic.write_msr(0x828, 0, T0), Ok(Work::None));
    assert_eq!(apic.read_msr(0x828, T0), Ok(esr::SEND_ILLEGAL_VECTOR.into()));
}

#[test]
fn destinations() {
    use Destination::{Broadcast, Logical, Physical};
    let flat = |ldr: u32| {
        let mut apic = xapic(3);
        set(&mut apic, reg::LDR, ldr << 24);
        apic
    };
    let cluster = |ldr: u32| {
        let mut apic = flat(ldr);
        set(&mut apic, reg::DFR, 0);
        apic
    };
    for (name, apic, destination, expected) in [
        ("physical", xapic(3), Physical(3), true),
        ("physical", xapic(3), Physical(4), false),
        ("broadcast", xapic(3), Broadcast, true),
        ("no LDR yet", xapic(3), Logical(0xff), false),
        ("flat", flat(0x08), Logical(0x0a), true),
        ("flat", flat(0x08), Logical(0x07), false),
        ("flat all", flat(0x08), Logical(0xff), true),
        ("flat, 32 bits", flat(0x08), Logical(0x108), false),
        ("cluster", cluster(0x24), Logical(0x26), true),
        ("cluster", cluster(0x24), Logical(0x22), false),
        ("other cluster", cluster(0x24), Logical(0x14), false),
        ("every cluster", cluster(0x24), Logical(0xf4), true),
        ("every cluster", cluster(0x24), Logical(0xf2), false),
        ("x2APIC", x2apic(0x123), Physical(0x123), true),
        ("x2APIC", x2apic(0x123), Physical(0x23), false),
        ("x2APIC logical", x2apic(0x123), Logical(0x12_0008), true),
        ("x2APIC logical", x2apic(0x123), Logical(0x12_0004), false),
        ("x2APIC logical", x2apic(0x123), Logical(0x13_0008), false),
        ("x2APIC, 8 bits", x2apic(3), Logical(0x08), true),
    ] {
        assert_eq!(apic.matches_destination(destination), expected, "{name} {destination:x?}");
    }
    let mut off = xapic(3);
    assert_eq!(off.write_msr(msr::IA32_APIC_BASE, DEFAULT_BASE, T0), Ok(Work::None));
    assert!(!off.matches_destination(Broadcast));
}

#[test]
fn msi_becomes_a_message() {
    let message = |address, data| Message::from_msi(Msi { address, data });
    let expected =
        |mode, level, destination| Some(Message { mode, vector: 0x31, level, destination, exclude_self: false });
    use Destination::{Broadcast, Logical, Physical};
    for (address, data, result) in [
        (0xfee0_2000, 0x0031, expected(DeliveryMode::Fixed, false, Physical(2))),
        (0xfee0_2004, 0x0031, expected(DeliveryMode::Fixed, false, Logical(2))),
        (0xfee0_200c, 0x0031, expected(DeliveryMode::LowestPriority, false, Logical(2))),
        (0xfeef_f000, 0x0031, expected(DeliveryMode::Fixed, false, Broadcast)),
        (0xfeef_f004, 0x0031, expected(DeliveryMode::Fixed, false, Logical(0xff))),
        (0xfee0_2020, 0xc131, expected(DeliveryMode::LowestPriority, true, Physical(0x102))),
        (0xfee0_0000, 0x0331, None),
    ] {
        assert_eq!(message(address, data), result, "{address:#x} {data:#x}");
    }
}

#[test]
fn lowest_priority_takes_turns_among_equals() {
    for (candidates, last, expected) in [
        (&[][..], 0, None),
        (&[(0, 0x20), (1, 0x10)], 0, Some(1)),
        (&[(0, 0x10), (1, 0x10), (2, 0x10)], 0, Some(1)),
        (&[(0, 0x10), (1, 0x10), (2, 0x10)], 1, Some(2)),
        (&[(0, 0x10), (1, 0x10), (2, 0x10)], 2, Some(0)),
    ] {
        assert_eq!(lowest_priority(candidates.iter().copied(), last), expected);
    }
}

#[test]
fn one_shot_counts_down_and_fires_once() {
    // Divide register and divider (SDM figure 10-10).
    for (divide, divider) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let mut apic = xapic(0);
        set(&mut apic, reg::LVT_TIMER, 0x30);
        set(&mut apic, reg::DIVIDE, divide);
        assert_eq!(apic.write32(reg::INITIAL_COUNT, 1000, ns(50)), Work::None);
        let due = 50 + 1000 * divider;
        assert_eq!(apic.next_deadline(), Some(Deadline::Ns(due)));
        assert_eq!(apic.read32(reg::CURRENT_COUNT, ns(50)), 1000);
        assert_eq!(apic.read32(reg::CURRENT_COUNT, ns(50 + 400 * divider)), 600);
        assert!(!apic.tick(ns(due - 1)));
        assert!(apic.tick(ns(due)));
        assert_eq!(apic.acknowledge(), Some(0x30));
        assert_eq!(apic.read32(reg::CURRENT_COUNT, ns(due)), 0);
        assert_eq!(apic.next_deadline(), None);
        assert!(!apic.tick(ns(due * 10)));
    }
}

#[test]
fn periodic_rearms_and_merges_missed_periods() {
    let mut apic = xapic(0);
    set(&mut apic, reg::LVT_TIMER, 0x2_0030);
    set(&mut apic, reg::DIVIDE, 0xb);
    set(&mut apic, reg::INITIAL_COUNT, 100);
    assert!(apic.tick(ns(100)));
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(200)));
    assert!(apic.tick(ns(555)));
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(600)));
    assert!(!apic.tick(ns(599)));
    assert_eq!(apic.read32(reg::CURRENT_COUNT, ns(590)), 10);
    assert_eq!(apic.read32(reg::CURRENT_COUNT, ns(610)), 90, "reloads before the tick is taken");
    set(&mut apic, reg::INITIAL_COUNT, 0);
    assert_eq!(apic.next_deadline(), None);
}

#[test]
fn a_masked_timer_runs_on() {
    let mut apic = xapic(0);
    set(&mut apic, reg::LVT_TIMER, 0x1_0030);
    set(&mut apic, reg::DIVIDE, 0xb);
    set(&mut apic, reg::INITIAL_COUNT, 100);
    assert_eq!(apic.next_deadline(), None);
    assert_eq!(apic.read32(reg::CURRENT_COUNT, ns(40)), 60);
    assert_eq!(apic.write32(reg::LVT_TIMER, 0x30, ns(150)), Work::None);
    assert!(!apic.tick(ns(200)), "it expired while masked");
    assert_eq!(apic.highest_pending(), None);
    assert_eq!(apic.write32(reg::INITIAL_COUNT, 100, ns(300)), Work::None);
    assert_eq!(apic.write32(reg::DIVIDE, 0, ns(360)), Work::None);
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(440)), "40 counts left, now of 2 ns");
}

#[test]
fn tsc_deadline() {
    let mut apic = xapic(0);
    assert_eq!(apic.write_msr(msr::TSC_DEADLINE, 500, T0), Ok(Work::None));
    assert_eq!(apic.read_msr(msr::TSC_DEADLINE, T0), Ok(0), "ignored outside its mode");
    set(&mut apic, reg::LVT_TIMER, 0x4_00ec);
    set(&mut apic, reg::INITIAL_COUNT, 100);
    assert_eq!(apic.read32(reg::CURRENT_COUNT, T0), 0, "no counting in this mode");
    assert_eq!(apic.write_msr(msr::TSC_DEADLINE, 500, tsc(10)), Ok(Work::None));
    assert_eq!(apic.read_msr(msr::TSC_DEADLINE, tsc(10)), Ok(500));
    assert_eq!(apic.next_deadline(), Some(Deadline::Tsc(500)));
    assert!(!apic.tick(tsc(499)));
    assert!(apic.tick(tsc(500)));
    assert_eq!(apic.read_msr(msr::TSC_DEADLINE, tsc(500)), Ok(0));
    assert_eq!(apic.acknowledge(), Some(0xec));
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.write_msr(msr::TSC_DEADLINE, 400, tsc(500)), Ok(Work::None));
    assert_eq!(apic.acknowledge(), Some(0xec), "a deadline in the past fires at once");
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.write_msr(msr::TSC_DEADLINE, 900, tsc(500)), Ok(Work::None));
    assert_eq!(apic.write_msr(msr::TSC_DEADLINE, 0, tsc(500)), Ok(Work::None));
    assert_eq!(apic.next_deadline(), None);
    assert_eq!(apic.write_msr(msr::TSC_DEADLINE, 900, tsc(500)), Ok(Work::None));
    set(&mut apic, reg::LVT_TIMER, 0xec);
    assert_eq!(apic.next_deadline(), None, "a change of mode disarms");
    let mut old = LocalApic::new(0, Features { tsc_deadline: false, ..Features::default() });
    assert_eq!(old.write_msr(msr::TSC_DEADLINE, 1, T0), Err(GeneralProtection));
    assert_eq!(old.read_msr(msr::TSC_DEADLINE, T0), Err(GeneralProtection));
}

#[test]
fn lint_pins() {
    let mut apic = LocalApic::new(0, Features::default());
    assert!(!apic.accepts_extint());
    assert_eq!(apic.set_lint(Lint::Lint1, true), Delivery::Ignored);
    assert_eq!(apic.set_lint(Lint::Lint1, false), Delivery::Ignored);
    apic.set_virtual_wire();
    assert!(apic.accepts_extint());
    assert_eq!(apic.set_lint(Lint::Lint0, true), Delivery::ExtInt);
    assert_eq!(apic.set_lint(Lint::Lint1, true), Delivery::Nmi);
    assert_eq!(apic.set_lint(Lint::Lint1, true), Delivery::Ignored, "an edge, not a level");
    set(&mut apic, reg::SVR, 0x1ff);
    // Linux' check_timer tries LINT0 as a fixed interrupt.
    set(&mut apic, reg::LVT_LINT0, 0x30);
    assert!(!apic.accepts_extint());
    assert_eq!(apic.set_lint(Lint::Lint0, false), Delivery::Ignored);
    assert_eq!(apic.set_lint(Lint::Lint0, true), Delivery::Accepted);
    assert_eq!(apic.acknowledge(), Some(0x30));
    assert_eq!(apic.write_msr(msr::IA32_APIC_BASE, DEFAULT_BASE, T0), Ok(Work::None));
    assert!(apic.accepts_extint(), "LINT0 is INTR when the APIC is off");
    assert_eq!(apic.set_lint(Lint::Lint1, false), Delivery::Ignored);
    assert_eq!(apic.set_lint(Lint::Lint1, true), Delivery::Nmi);
}

#[test]
fn level_triggered_lint_repeats_until_the_pin_drops() {
    let mut apic = xapic(0);
    assert_eq!(apic.set_lint(Lint::Lint1, true), Delivery::Ignored);
    set(&mut apic, reg::LVT_LINT1, lvt::LEVEL | 0x55);
    assert_eq!(apic.read32(reg::LVT_LINT1, T0), lvt::LEVEL | lvt::REMOTE_IRR | 0x55);
    assert_eq!(apic.acknowledge(), Some(0x55));
    assert_eq!(apic.highest_pending(), None);
    assert_eq!(apic.eoi(), Some(0x55));
    assert_eq!(apic.acknowledge(), Some(0x55), "still high");
    assert_eq!(apic.set_lint(Lint::Lint1, false), Delivery::Ignored);
    assert_eq!(apic.eoi(), Some(0x55));
    assert_eq!(apic.highest_pending(), None);
    assert_eq!(apic.read32(reg::LVT_LINT1, T0), lvt::LEVEL | 0x55);
}

#[test]
fn a_performance_interrupt_masks_its_entry() {
    let mut apic = xapic(0);
    set(&mut apic, reg::LVT_PERF, 0x400);
    assert_eq!(apic.local_interrupt(reg::LVT_PERF), Delivery::Nmi);
    assert_eq!(apic.read32(reg::LVT_PERF, T0), 0x10400);
    assert_eq!(apic.local_interrupt(reg::LVT_PERF), Delivery::Ignored);
}

#[test]
fn saves_and_restores() {
    let mut apic = x2apic(5);
    for (index, value) in [(0x83e, 0xb), (0x832, 0x2_0030), (0x808, 0x20), (0x838, 1000)] {
        assert_eq!(apic.write_msr(index, value, ns(7)), Ok(Work::None));
    }
    for vector in [0x31, 0x82, 0xfe] {
        assert!(apic.accept(vector, vector == 0x82));
    }
    assert_eq!(apic.acknowledge(), Some(0xfe));
    let page = apic.save(ns(107));
    assert_eq!(page.len(), PAGE_SIZE);
    assert_eq!(page[0x390..0x394], 900u32.to_le_bytes());
    assert_eq!(page[0xa0], 0xf0);
    let mut other = LocalApic::new(5, Features::default());
    assert_eq!(other.restore(&page, apic.base(), 0, ns(50_107)), Ok(()));
    assert_eq!(other.next_deadline(), Some(Deadline::Ns(51_007)));
    assert_eq!(other.save(ns(50_107)), page);
    assert_eq!(other.eoi(), None);
    assert_eq!(other.acknowledge(), Some(0x82));
    assert_eq!(other.eoi(), Some(0x82));

    let mut deadline = xapic(0);
    set(&mut deadline, reg::LVT_TIMER, 0x4_0030);
    let page = deadline.save(T0);
    assert_eq!(other.restore(&page, deadline.base(), 99, T0), Ok(()));
    assert_eq!(other.next_deadline(), Some(Deadline::Tsc(99)));
    assert_eq!(other.read32(reg::ID, T0), 5 << 24, "the ID is the processor's own");
}

#[test]
fn saved_states_are_checked() {
    let mut apic = xapic(1);
    let base = apic.base();
    let all_ones = [0xff; PAGE_SIZE];
    assert_eq!(apic.restore(&all_ones[1..], base, 0, T0), Err(RestoreError::Length));
    for bad in [base | 1, base | 1 << 50, DEFAULT_BASE | base::EXTD] {
        assert_eq!(apic.restore(&all_ones, bad, 0, T0), Err(RestoreError::Base));
    }
    assert_eq!(apic.read32(reg::LVT_LINT0, T0), 0x10000, "refusals change nothing");
    assert_eq!(apic.restore(&all_ones, base, !0, T0), Ok(()));
    assert_eq!(apic.read32(reg::IRR, T0), 0xffff_0000, "no vectors below 16");
    assert_eq!(apic.read32(reg::VERSION, T0), VERSION);
    assert_eq!(apic.read32(reg::LVT_TIMER, T0), 0x7_00ff);
    while apic.eoi().is_some() {}
    assert_eq!(apic.highest_isr, 0);
}

#[test]
fn any_guest_keeps_the_invariants() {
    let mut seed = 11u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 20
    };
    let mut apic = xapic(0);
    let mut now = T0;
    for step in 0..300_000 {
        now.ns += random() >> (14 + random() % 30);
        now.tsc = now.ns.wrapping_mul(3);
        let value = random() >> (random() % 44);
        let offset = (random() & 0x3ff) as u32 & if random() & 7 == 0 { !0 } else { !0xf };
        match random() % 8 {
            0 | 1 if !apic.is_x2apic() => _ = apic.write32(offset, value as u32, now),
            2 if !apic.is_x2apic() => _ = apic.read32(offset, now),
            3 => _ = apic.write_msr(0x800 + (offset >> 4), value, now),
            4 => _ = apic.read_msr(0x800 + (offset >> 4), now),
            5 => {
                _ = apic.deliver(
                    DeliveryMode::from_bits(value as u32).unwrap_or(DeliveryMode::Fixed),
                    value as u8,
                    true,
                )
            }
            6 => _ = apic.set_lint(if value & 1 == 0 { Lint::Lint0 } else { Lint::Lint1 }, value & 2 != 0),
            _ => match random() % 64 {
                0 => _ = apic.write_msr(msr::IA32_APIC_BASE, DEFAULT_BASE | (value & 3) << 10, now),
                1 => apic.init(),
                2 => {
                    let page = apic.save(now);
                    let (base, deadline) = (apic.base(), apic.tsc_deadline(now));
                    assert_eq!(apic.restore(&page, base, deadline, now), Ok(()));
                    // A periodic timer that stood still starts: the page cannot tell it from one that reloads.
                    if apic.timer_mode() != TimerMode::Periodic {
                        assert!(apic.save(now) == page, "step {step}");
                    }
                }
                n if n < 20 => _ = apic.eoi(),
                n if n < 40 => _ = apic.acknowledge(),
                _ => _ = apic.write_msr(msr::TSC_DEADLINE, now.tsc.wrapping_add(value), now),
            },
        }
        apic.tick(now);
        assert_eq!((apic.highest_irr, apic.highest_isr), (apic.highest(reg::IRR), apic.highest(reg::ISR)));
        assert!(apic.reg(reg::SVR) & SVR_ENABLE != 0 || apic.reg(reg::LVT_TIMER) & lvt::MASKED != 0);
        match apic.next_deadline() {
            Some(Deadline::Ns(due)) => assert!(due > now.ns, "step {step}"),
            Some(Deadline::Tsc(due)) => assert!(due > now.tsc, "step {step}"),
            None => {}
        }
    }
}

/// Without x2APIC mode the ID is software's to choose, until the APIC is disabled.
#[test]
fn ids_can_be_changed_without_x2apic_mode() {
    let mut apic = LocalApic::new(2, Features { x2apic: false, ..Features::default() });
    set(&mut apic, reg::ID, 0x7f12_3456);
    assert_eq!(apic.read32(reg::ID, T0), 0x7f00_0000);
    assert!(
        apic.matches_destination(Destination::Physical(0x7f)) && !apic.matches_destination(Destination::Physical(2))
    );
    apic.init();
    assert_eq!((apic.read32(reg::ID, T0), apic.id()), (0x7f00_0000, 2));
    let page = apic.save(T0);
    let mut other = LocalApic::new(2, Features { x2apic: false, ..Features::default() });
    assert_eq!(other.restore(&page, apic.base(), 0, T0), Ok(()));
    assert_eq!(other.read32(reg::ID, T0), 0x7f00_0000);
    for base in [0, base::EN] {
        assert_eq!(apic.write_msr(msr::IA32_APIC_BASE, DEFAULT_BASE | base, T0), Ok(Work::None));
    }
    assert_eq!(apic.read32(reg::ID, T0), 0x0200_0000);
}
