//! No guest can make a chip panic, hang, or ask for something at a time past: random accesses to all of them.

use anyvisor_devices::acpi_pm::AcpiPm;
use anyvisor_devices::i8042::I8042;
use anyvisor_devices::ioapic::IoApic;
use anyvisor_devices::pci::{PciRoot, Space};
use anyvisor_devices::pic::Pic;
use anyvisor_devices::pit::Pit;
use anyvisor_devices::rtc::Rtc;
use anyvisor_devices::serial::{FIFO_SIZE, Serial};

const STEPS: u32 = 200_000;

/// Knuth's linear congruential generator: the same numbers on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 16
    }
    fn byte(&mut self) -> u8 {
        self.next() as u8
    }
    fn one_of(&mut self, ports: &[u16]) -> u16 {
        ports[self.next() as usize % ports.len()]
    }
    fn chance(&mut self) -> bool {
        self.next() & 4 != 0
    }
}

#[test]
fn pic() {
    let (mut random, mut pic) = (Random(1), Pic::new());
    for _ in 0..STEPS {
        let port = random.one_of(&[0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1]);
        match random.next() % 4 {
            0 => pic.write(port, random.byte()),
            1 => _ = pic.read(port),
            2 => pic.set_irq(random.byte() & 15, random.chance()),
            _ => {
                let intr = pic.intr();
                assert_eq!(pic.acknowledge().is_some(), intr, "INTR and an acknowledge cycle agree");
            }
        }
        pic.intr_change();
        assert_eq!(pic.intr_change(), None, "told once");
    }
}

#[test]
fn ioapic() {
    let (mut random, mut chip) = (Random(2), IoApic::new());
    for _ in 0..STEPS {
        let sent = match random.next() % 5 {
            0 => chip.write(0, random.next() as u32 & 0x3f),
            1 => chip.write(0x10, random.next() as u32),
            2 => chip.write(u64::from(random.byte()), random.next() as u32),
            3 => chip.set_irq(random.byte() % 24, random.chance()).into_iter().collect(),
            _ => chip.eoi(random.byte()),
        };
        assert!(sent.len() <= 24);
        for message in sent {
            assert_eq!(message.address >> 20, 0xfee);
        }
        chip.read(u64::from(random.byte()));
    }
}

#[test]
fn serial() {
    let (mut random, mut port) = (Random(3), Serial::new());
    for _ in 0..STEPS {
        match random.next() % 4 {
            0 => _ = port.write(random.byte().into(), random.byte()),
            1 => _ = port.read(random.byte().into()),
            2 => {
                let room = port.room();
                assert!(room <= FIFO_SIZE);
                assert_eq!(port.enqueue(&[7; 20]), room);
            }
            _ => port.receive_break(),
        }
        port.interrupt();
        port.wants_input();
    }
}

#[test]
fn timers() {
    let mut random = Random(4);
    let (mut pit, mut rtc, mut pm) = (Pit::new(), Rtc::new(1 << 60, 5, 1 << 40, 1 << 50), AcpiPm::new());
    let mut now = 0u64;
    for _ in 0..STEPS {
        // From a nanosecond to decades between accesses.
        now = now.saturating_add(random.next() >> (random.next() % 48));
        let value = random.byte();
        let pit_port = random.one_of(&[0x40, 0x41, 0x42, 0x43, 0x61]);
        let pm_offset = random.byte() as u16 & 0xf;
        rtc.write(0x70, random.byte() & 0x3f, now);
        if random.chance() {
            pit.write(pit_port, value, now);
            rtc.write(0x71, value, now);
            pm.write(pm_offset, &[value, random.byte()], now);
        } else {
            pit.read(pit_port, now);
            rtc.read(0x71, now);
            pm.read(pm_offset, &mut [0; 4], now);
        }
        pit.poll(now);
        rtc.poll(now);
        pm.poll(now);
        for event in [pit.next_event(now), rtc.next_event(), pm.next_event()].into_iter().flatten() {
            assert!(event >= now, "the next event is not in the past");
        }
    }
}

#[test]
fn timers_survive_the_end_of_time() {
    for now in [u64::MAX, u64::MAX - 1, 1 << 63] {
        let (mut pit, mut rtc, mut pm) = (Pit::new(), Rtc::new(u64::MAX, 0, 0, 0), AcpiPm::new());
        for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0)] {
            pit.write(port, value, now);
        }
        pit.poll(now);
        pit.next_event(now);
        for (index, value) in [(0x0a, 0x2f), (0x0b, 0x72), (0x09, 0xff), (0x32, 0xff)] {
            rtc.write(0x70, index, now);
            rtc.write(0x71, value, now);
        }
        rtc.read(0x71, now);
        rtc.next_event();
        pm.write(2, &[0xff, 0xff], now);
        pm.next_event();
    }
}

#[test]
fn i8042() {
    let (mut random, mut chip) = (Random(5), I8042::new());
    for _ in 0..STEPS {
        let port = random.one_of(&[0x60, 0x64, 0x92]);
        if random.chance() {
            chip.write(port, random.byte());
        } else {
            chip.read(port);
        }
        assert_ne!(chip.interrupts(), (true, true), "one byte, one interrupt");
    }
}

#[test]
fn pci() {
    let (mut random, root) = (Random(6), PciRoot::new());
    for _ in 0..STEPS {
        let mut data = [0; 4];
        let size = 1 << (random.next() % 3);
        let offset = (random.next() & 7) & !(size as u64 - 1);
        let value = (random.next() as u32).to_le_bytes();
        root.port_write(offset as u16, &value[..size]);
        root.port_read(offset as u16, &mut data[..size]);
        let offset = random.next() & 0x1f_ffff & !(size as u64 - 1);
        root.ecam_write(offset, &value[..size]);
        root.ecam_read(offset, &mut data[..size]);
        root.window_read(Space::Memory, random.next(), &mut data);
        assert_eq!(data, [0xff; 4], "nobody decodes memory");
    }
    let mut id = [0; 4];
    root.ecam_read(0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x0008_1b36, "the host bridge is still itself");
}
