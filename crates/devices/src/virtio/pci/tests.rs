//! What a driver sees of the registers.

use super::*;

const BAR: u64 = 0xc000_0000;

fn device() -> Transport {
    let offer = Offer {
        device: 2,
        class: 0x01_0000,
        features: feature::EVENT_INDEX | 1 << 5,
        queues: vec![256, 16],
        config: vec![1, 2, 3, 4, 5, 6, 7, 8, 9],
        writable: 4..6,
    };
    let mut device = Transport::new(offer);
    device.place(BAR);
    // Memory and bus mastering.
    device.config_write(4, &[6, 0]);
    device
}

fn get(device: &mut Transport, offset: u64, size: usize) -> u64 {
    let mut data = [0; 8];
    device.bar_read(0, offset, &mut data[..size]);
    u64::from_le_bytes(data)
}

fn put(device: &mut Transport, offset: u64, size: usize, value: u64) -> Option<Request> {
    let work = device.bar_write(0, offset, &value.to_le_bytes()[..size]);
    assert_eq!(work.messages, []);
    work.request
}

/// As a driver does (3.1.1), with these features.
fn drive(device: &mut Transport, features: u64) -> Option<Request> {
    put(device, 20, 1, 3);
    for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
        put(device, 8, 4, select);
        put(device, 12, 4, half);
    }
    put(device, 20, 1, 11);
    put(device, 22, 2, 0);
    put(device, 24, 2, 8);
    put(device, 32, 8, 0x1000);
    put(device, 40, 4, 0x2000);
    put(device, 44, 4, 1);
    put(device, 48, 8, 0x3000);
    put(device, 28, 2, 1);
    let status = get(device, 20, 1);
    put(device, 20, 1, status | 4)
}

#[test]
fn a_driver_finds_its_structures() {
    let mut device = device();
    let byte = |device: &mut Transport, at: u16| {
        let mut data = [0];
        device.config_read(at, &mut data);
        data[0]
    };
    let mut kinds = Vec::new();
    let mut at = u16::from(byte(&mut device, 0x34));
    while at != 0 {
        if byte(&mut device, at) == VENDOR_CAPABILITY {
            let mut body = [0; 16];
            device.config_read(at, &mut body);
            kinds.push((body[3], body[4], u32::from_le_bytes(body[8..12].try_into().unwrap())));
        } else {
            assert_eq!(byte(&mut device, at), 0x11, "MSI-X");
        }
        at = byte(&mut device, at + 1).into();
    }
    assert_eq!(kinds, [(1, 0, 0), (3, 0, 0x1000), (4, 0, 0x2000), (2, 0, 0x3000), (5, 0, 0)]);
    let mut id = [0; 4];
    device.config_read(0, &mut id);
    assert_eq!(id, [0xf4, 0x1a, 0x42, 0x10]);
    let windows: Vec<_> = device.windows().iter().map(|w| (w.bar, w.base, w.length)).collect();
    assert_eq!(windows, [(0, BAR, 0x4000), (1, BAR + 0x4000, 0x1000)]);
    assert_eq!(get(&mut device, 0x2000, 8), 0x0807_0605_0403_0201);
    assert_eq!(get(&mut device, 0x2007, 4), 0x908, "zeros behind the configuration");
}

#[test]
fn a_driver_starts_and_resets_it() {
    let mut device = device();
    assert_eq!((get(&mut device, 18, 2), get(&mut device, 24, 2)), (2, 256));
    put(&mut device, 0, 4, 1);
    assert_eq!(get(&mut device, 4, 4), 1, "version 1");
    assert!(!device.may_work());
    assert_eq!(drive(&mut device, feature::VERSION_1 | feature::EVENT_INDEX), Some(Request::Start));
    assert!(device.may_work());
    assert_eq!(device.features(), feature::VERSION_1 | feature::EVENT_INDEX);
    assert_eq!(device.queues(), [Some(Queue::new(8, 0x1000, 0x1_0000_2000, 0x3000, true)), None]);
    assert_eq!(put(&mut device, 0x3000, 2, 0), Some(Request::Notify(0)));
    assert_eq!(put(&mut device, 20, 1, 15), None, "it has started");
    put(&mut device, 32, 8, 0x9000);
    assert_eq!(get(&mut device, 32, 8), 0x1000, "an enabled queue stays where it is");
    device.config_write(4, &[2, 0]);
    assert!(!device.may_work(), "it is no bus master");
    device.config_write(4, &[6, 0]);
    assert_eq!(put(&mut device, 20, 1, 0), Some(Request::Reset));
    assert_eq!((get(&mut device, 20, 1), get(&mut device, 28, 2), get(&mut device, 24, 2)), (0, 0, 256));
    assert!(!device.may_work());
}

#[test]
fn only_offered_features_are_agreed_on() {
    for (features, fine) in [
        (feature::VERSION_1, true),
        (feature::VERSION_1 | 1 << 5, true),
        (feature::EVENT_INDEX, false),
        (feature::VERSION_1 | 1 << 6, false),
        (feature::VERSION_1 | 1 << 63, false),
    ] {
        let mut device = device();
        assert_eq!(drive(&mut device, features).is_some(), fine, "{features:x}");
        assert_eq!(get(&mut device, 20, 1) & 8 != 0, fine);
        assert_eq!(device.may_work(), fine);
    }
    let mut device = device();
    drive(&mut device, feature::VERSION_1);
    put(&mut device, 8, 4, 0);
    put(&mut device, 12, 4, 1 << 5);
    assert_eq!(device.features(), feature::VERSION_1, "what has been agreed on stays");
}

#[test]
fn bad_values_are_not_taken() {
    let mut device = device();
    for size in [0, 3, 512, 0xffff] {
        put(&mut device, 24, 2, size);
        assert_eq!(get(&mut device, 24, 2), 256, "size {size}");
    }
    for (vector, taken) in [(0, 0), (2, 2), (3, 0xffff), (0xffff, 0xffff)] {
        put(&mut device, 26, 2, vector);
        put(&mut device, 16, 2, vector);
        assert_eq!((get(&mut device, 26, 2), get(&mut device, 16, 2)), (taken, taken), "vector {vector}");
    }
    put(&mut device, 22, 2, 2);
    put(&mut device, 24, 2, 8);
    put(&mut device, 28, 2, 1);
    assert_eq!((get(&mut device, 24, 8), get(&mut device, 32, 8)), (0, 0), "there is no such queue");
    put(&mut device, 4, 4, !0);
    put(&mut device, 18, 2, 9);
    assert_eq!(get(&mut device, 18, 2), 2, "read-only");
}

#[test]
fn interrupts_by_pin_and_by_message() {
    let mut device = device();
    drive(&mut device, feature::VERSION_1);
    assert!(!device.pin());
    assert_eq!(device.interrupt_queue(0), None);
    assert!(device.pin());
    let mut status = [0; 2];
    device.config_read(6, &mut status);
    assert_eq!(status[0] & 8, 8, "interrupt status");
    device.config_write(4, &[6, 4]);
    assert!(!device.pin(), "disabled");
    device.config_write(4, &[6, 0]);
    assert!(device.pin());
    assert_eq!(get(&mut device, 0x1000, 1), 1);
    assert!(!device.pin(), "reading acknowledges");
    let control = device.msix_control;
    device.config_write(control, &[0, 0x80]);
    put(&mut device, 26, 2, 1);
    for (at, value) in [(16, 0xfee0_0000u32), (24, 0x33), (28, 0)] {
        device.bar_write(1, at, &value.to_le_bytes());
    }
    assert_eq!(device.interrupt_queue(0), Some(Msi { address: 0xfee0_0000, data: 0x33 }));
    assert_eq!((device.interrupt_queue(1), device.interrupt_queue(7)), (None, None));
    assert!(!device.pin());
}

#[test]
fn a_broken_device_says_so_until_it_is_reset() {
    let mut device = device();
    drive(&mut device, feature::VERSION_1);
    assert_eq!(device.break_down(), None);
    assert!(!device.may_work() && device.pin());
    assert_eq!(get(&mut device, 0x1000, 1), 2);
    assert_eq!(get(&mut device, 20, 1), 15 | 64);
    put(&mut device, 20, 1, 15);
    assert_eq!(get(&mut device, 20, 1), 15 | 64, "it stays");
    put(&mut device, 20, 1, 0);
    assert_eq!(get(&mut device, 20, 1), 0);
}

#[test]
fn firmware_can_do_without_bars() {
    let mut device = device();
    let access = device.access;
    let select = |device: &mut Transport, offset: u32, length: u32| {
        device.config_write(access + 4, &[0]);
        device.config_write(access + 8, &offset.to_le_bytes());
        device.config_write(access + 12, &length.to_le_bytes());
    };
    select(&mut device, 20, 1);
    device.config_write(access + 16, &[3]);
    assert_eq!(get(&mut device, 20, 1), 3);
    let mut data = [0; 4];
    select(&mut device, 0x2004, 4);
    device.config_read(access + 16, &mut data);
    assert_eq!(data, [5, 6, 7, 8]);
    select(&mut device, 0x3000, 2);
    assert_eq!(device.config_write(access + 16, &[1, 0]).request, Some(Request::Notify(1)));
    for (offset, length) in [(1, 2), (0, 3), (0, 8), (0xffff_fff0, 4)] {
        select(&mut device, offset, length);
        device.config_write(access + 16, &[0xff; 4]);
        device.config_read(access + 16, &mut data);
    }
    assert_eq!(get(&mut device, 20, 1), 3, "nothing happened");
}

#[test]
fn saved_registers_are_restored_and_checked() {
    let mut device = device();
    drive(&mut device, feature::VERSION_1);
    let (config, registers) = device.save();
    let mut other = Transport::new(device.offer.clone());
    other.restore_config(&config).unwrap();
    other.restore(&registers).unwrap();
    assert!(other.may_work() && other.is_driven());
    assert_eq!((other.queues(), other.windows()), (device.queues(), device.windows()));
    let bad = |change: fn(&mut Registers)| {
        let mut registers = registers.clone();
        change(&mut registers);
        assert!(Transport::new(device.offer.clone()).restore(&registers).is_err());
    };
    bad(|registers| registers.queues[1].size = 32);
    bad(|registers| registers.queues[1].size = 0);
    bad(|registers| registers.queues[0].vector = 3);
    bad(|registers| registers.config_vector = 9);
    bad(|registers| registers.isr = 4);
    bad(|registers| registers.driver_features = !0);
    bad(|registers| registers.queues.truncate(1));
}

#[test]
fn notifications_are_known_by_their_address() {
    assert!(Transport::only_notifies(0, 0x3000, 2) && Transport::only_notifies(0, 0x3004, 4));
    assert!(!Transport::only_notifies(0, 0x2ffe, 2) && !Transport::only_notifies(0, 0x3000, 1));
    assert!(!Transport::only_notifies(1, 0x3000, 2));
}

#[test]
fn configurations_change_on_both_sides() {
    let mut device = device();
    assert_eq!(put(&mut device, 0x2003, 4, 0xaabb_ccdd), Some(Request::Configure));
    assert_eq!(put(&mut device, 0x2006, 2, 0xffff), None);
    assert_eq!(get(&mut device, 0x2000, 8), 0x0807_bbcc_0403_0201, "only what is writable");
    assert_eq!(device.take_written_config(), Some(&[1, 2, 3, 4, 0xcc, 0xbb, 7, 8, 9][..]));
    assert_eq!(device.take_written_config(), None);
    assert_eq!(device.change_config(&[9; 9]), None, "there is no driver yet");
    drive(&mut device, feature::VERSION_1);
    let generation = get(&mut device, 21, 1);
    assert_eq!(device.change_config(&[5; 9]), None);
    assert_eq!((get(&mut device, 0x2000, 8), device.pin()), (0x0505_bbcc_0505_0505, true));
    assert_ne!(get(&mut device, 21, 1), generation);
    assert_eq!(get(&mut device, 0x1000, 1), 2);
}
