//! No guest can make a chip panic, hang, or ask for something at a time past: random accesses to all of them.
//! Nor can a snapshot: whatever a guest makes of a chip is saved and restored, and what it cannot is refused or
//! harmless.

use anyvisor_devices::BadState;
use anyvisor_devices::acpi_pm::AcpiPm;
use anyvisor_devices::flash::Flash;
use anyvisor_devices::i8042::I8042;
use anyvisor_devices::ioapic::IoApic;
use anyvisor_devices::pci::{PciRoot, Space};
use anyvisor_devices::pic::Pic;
use anyvisor_devices::pit::Pit;
use anyvisor_devices::rtc::Rtc;
use anyvisor_devices::serial::{FIFO_SIZE, Serial};
use anyvisor_devices::test_device::TestDevice;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

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

fn step_pic(random: &mut Random, pic: &mut Pic) {
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

/// Puts a chip through JSON, as a snapshot does: what a guest made of it comes back and goes on the same; what
/// somebody forged is refused, or as harmless as any guest.
fn save_and_restore<Chip: Clone + Serialize + DeserializeOwned>(
    seed: u64,
    fresh: &Chip,
    step: impl Fn(&mut Random, &mut Chip),
    check: impl Fn(&mut Chip) -> Result<(), BadState>,
) {
    let mut random = Random(seed);
    let mut chip = fresh.clone();
    let (mut refused, mut harmless) = (0, 0);
    for _ in 0..STEPS / 100 {
        for _ in 0..random.next() % 50 {
            step(&mut random, &mut chip);
        }
        let saved = serde_json::to_value(&chip).unwrap();
        let mut restored: Chip = serde_json::from_value(saved.clone()).unwrap();
        check(&mut restored).unwrap_or_else(|error| panic!("{error}: {saved}"));
        let same = random.next();
        let (mut one, mut other) = (Random(same), Random(same));
        for _ in 0..20 {
            step(&mut one, &mut chip);
            step(&mut other, &mut restored);
        }
        assert_eq!(without_told(&chip), without_told(&restored), "they went on differently");

        let mut forged = saved;
        forge(&mut random, &mut forged);
        let accepted = serde_json::from_value::<Chip>(forged).ok();
        match accepted.map(|mut chip| check(&mut chip).map(|()| chip)) {
            Some(Ok(mut chip)) => {
                (0..20).for_each(|_| step(&mut random, &mut chip));
                harmless += 1;
            }
            Some(Err(_)) | None => refused += 1,
        }
    }
    assert!(refused > 10 && harmless > 10, "{refused} refused, {harmless} harmless");
}

/// The 8259's last word to the machine is told anew after a restore.
fn without_told(chip: &impl Serialize) -> serde_json::Value {
    let mut value = serde_json::to_value(chip).unwrap();
    if let Some(fields) = value.as_object_mut() {
        fields.remove("told");
    }
    value
}

/// Changes one number, string or the like somewhere in `value`.
fn forge(random: &mut Random, value: &mut serde_json::Value) {
    use serde_json::Value;
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let n = random.next() as usize % fields.len();
            forge(random, fields.values_mut().nth(n).unwrap());
        }
        Value::Array(items) if !items.is_empty() && !random.next().is_multiple_of(8) => {
            let n = random.next() as usize % items.len();
            forge(random, &mut items[n]);
        }
        Value::Array(items) => items.extend(vec![Value::from(1); random.next() as usize % 40]),
        Value::String(text) => text.truncate(random.next() as usize % 100),
        Value::Bool(value) => *value = !*value,
        _ => {
            *value = match random.next() % 4 {
                0 => Value::from(random.byte()),
                1 => Value::from(random.next() << 16),
                2 => Value::Null,
                _ => Value::from(1u64 << (random.next() % 64)),
            }
        }
    }
}

#[test]
fn pic() {
    let (mut random, mut pic) = (Random(1), Pic::new());
    for _ in 0..STEPS {
        step_pic(&mut random, &mut pic);
    }
    save_and_restore(1, &Pic::new(), step_pic, |pic| pic.check());
}

fn step_ioapic(random: &mut Random, chip: &mut IoApic) {
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

#[test]
fn ioapic() {
    let (mut random, mut chip) = (Random(2), IoApic::new());
    for _ in 0..STEPS {
        step_ioapic(&mut random, &mut chip);
    }
    save_and_restore(2, &IoApic::new(), step_ioapic, |chip| chip.check());
}

fn step_serial(random: &mut Random, port: &mut Serial) {
    match random.next() % 4 {
        0 => _ = port.write(random.next() as u16 & 7, random.byte()),
        1 => _ = port.read(random.next() as u16 & 7),
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

#[test]
fn serial() {
    let (mut random, mut port) = (Random(3), Serial::new());
    for _ in 0..STEPS {
        step_serial(&mut random, &mut port);
        port.read(random.byte().into());
    }
    save_and_restore(3, &Serial::new(), step_serial, |port| port.check());
}

#[derive(Clone, Serialize, Deserialize)]
struct Timers {
    pit: Pit,
    rtc: Rtc,
    pm: AcpiPm,
    now: u64,
}

impl Timers {
    fn new() -> Timers {
        Timers { pit: Pit::new(), rtc: Rtc::new(1 << 60, 5, 1 << 40, 1 << 50), pm: AcpiPm::new(), now: 5 }
    }

    /// An access from a nanosecond to `longest` after the one before.
    fn step(&mut self, random: &mut Random, longest: u64) {
        let Timers { pit, rtc, pm, now } = self;
        *now = now.saturating_add((random.next() >> (random.next() % 48)) % longest);
        let now = *now;
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
fn timers() {
    let (mut random, mut timers) = (Random(4), Timers::new());
    for _ in 0..STEPS {
        timers.step(&mut random, u64::MAX);
    }
    save_and_restore(
        4,
        &Timers::new(),
        |random, timers| timers.step(random, 1 << 40),
        |timers| {
            let now = timers.now;
            timers.pit.check(now).and(timers.rtc.check(now)).and(timers.pm.check(now))
        },
    );
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

fn step_i8042(random: &mut Random, chip: &mut I8042) {
    let port = random.one_of(&[0x60, 0x64, 0x92]);
    if random.chance() {
        chip.write(port, random.byte());
    } else {
        chip.read(port);
    }
    assert_ne!(chip.interrupts(), (true, true), "one byte, one interrupt");
}

#[test]
fn i8042() {
    let (mut random, mut chip) = (Random(5), I8042::new());
    for _ in 0..STEPS {
        step_i8042(&mut random, &mut chip);
    }
    save_and_restore(5, &I8042::new(), step_i8042, |chip| chip.check());
}

fn step_test_device(random: &mut Random, device: &mut TestDevice) {
    let mut data = random.next().to_le_bytes();
    let size = 1 << (random.next() % 4);
    match random.next() % 4 {
        0 => device.write_latch(random.next() as u16 & 3, &data[..size.min(4)]),
        1 => device.read_latch(random.next() as u16 & 3, &mut data[..size.min(4)]),
        2 => device.write_memory(random.next() & 0xffff, &data[..size]),
        _ => device.read_memory(random.next() & 0xffff, &mut data[..size]),
    }
}

#[test]
fn test_device() {
    let mut random = Random(7);
    for seed in 0..5 {
        let mut device = TestDevice::new();
        (0..200).for_each(|_| step_test_device(&mut random, &mut device));
        let saved = serde_json::to_string(&device).unwrap();
        let mut back: TestDevice = serde_json::from_str(&saved).unwrap();
        back.check().unwrap();
        (0..200).for_each(|_| step_test_device(&mut Random(seed), &mut device));
        (0..200).for_each(|_| step_test_device(&mut Random(seed), &mut back));
        assert_eq!(serde_json::to_string(&back).unwrap(), serde_json::to_string(&device).unwrap());
    }
}

/// What the chip says that it changed is all that it changed; and from its state and contents it goes on the same.
#[test]
fn flash() {
    const SIZE: u64 = 16 << 10;
    const COMMANDS: [u8; 8] = [0xff, 0x70, 0x50, 0x10, 0x40, 0x20, 0xd0, 0xe8];
    let mut random = Random(8);
    let mut flash = Flash::new(vec![0xff; SIZE as usize]);
    let mut kept = flash.bytes().to_vec();
    let (mut programmed, mut erased) = (0, 0);
    for step in 0..STEPS {
        let size = 1 << (random.next() % 4);
        let offset = (random.next() % SIZE) & !(size as u64 - 1);
        let mut value = random.next().to_le_bytes();
        if random.chance() {
            value[0] = COMMANDS[random.next() as usize % COMMANDS.len()];
        }
        if let Some(range) = flash.write(offset, &value[..size]) {
            *if range.len() == 4096 { &mut erased } else { &mut programmed } += 1;
            kept[range.clone()].copy_from_slice(&flash.bytes()[range]);
        }
        if step % 50 == 0 {
            assert!(kept == flash.bytes());
            let state = serde_json::to_string(&flash.state()).unwrap();
            flash = Flash::new(kept.clone());
            flash.set_state(serde_json::from_str(&state).unwrap());
        }
        let mut data = [0; 8];
        flash.read(offset, &mut data[..size]);
    }
    assert!(programmed > 1000 && erased > 100, "{programmed} {erased}");
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
