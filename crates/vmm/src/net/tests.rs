//! A card with the rootless network behind it, and a driver in front.

use super::*;
use crate::virtio::Model;
use crate::virtio::driver::{Driver, fuzz};
use anyvisor_devices::virtio::net::{HEADER, RECEIVE, TRANSMIT};

/// An ARP request for the router, behind a header.
fn arp() -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 2, 15]);
    frame.extend([0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    frame
}

fn card(net: &str) -> NetModel {
    open(&[net.parse().unwrap()]).unwrap().pop().unwrap()
}

#[test]
fn a_card_sends_and_receives() {
    let mut model = card("user");
    let mut driver = Driver::new(&mut model);
    // Small buffers, so that an answer takes several.
    let buffers: Vec<_> = (0..8).map(|_| driver.send(RECEIVE, &[], &[20])).collect();
    let sent = driver.send(TRANSMIT, &[&arp()[..5], &arp()[5..]], &[]);
    driver.work(&mut model).unwrap();
    let back = driver.used(TRANSMIT);
    assert_eq!((back.len(), back[0].head, back[0].length), (1, sent, 0));
    let got = driver.used(RECEIVE);
    assert_eq!(got.iter().map(|used| used.length).collect::<Vec<_>>(), [20, 20, 14]);
    let bytes: Vec<u8> = got.iter().flat_map(|used| used.bytes[..used.length as usize].to_vec()).collect();
    // In three buffers, valid: an answer from 10.0.2.2.
    assert_eq!((bytes[0], bytes[10], &bytes[HEADER + 12..HEADER + 22]), (2, 3, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2][..]));
    assert_eq!(bytes[HEADER + 28..HEADER + 32], [10, 0, 2, 2]);
    // What was taken in advance is given back, and is used after that.
    driver.settle(&mut model).unwrap();
    driver.send(TRANSMIT, &[&arp()], &[]);
    driver.work(&mut model).unwrap();
    assert_eq!(driver.used(RECEIVE).iter().map(|used| used.head).collect::<Vec<_>>(), buffers[3..6]);
}

#[test]
fn limits_hold() {
    let mut model = card("user,pps=20");
    let mut driver = Driver::new(&mut model);
    for _ in 0..10 {
        driver.send(TRANSMIT, &[&arp()], &[]);
    }
    let began = Instant::now();
    driver.work(&mut model).unwrap();
    let sent = driver.used(TRANSMIT).len();
    // Two at once, and what time brings.
    let most = 3 + (began.elapsed().as_millis() / 50) as usize;
    assert!((2..=most).contains(&sent), "{sent} of {most}");
    let deadline = model.deadline().expect("the rest waits");
    assert!(deadline > began && deadline < Instant::now() + std::time::Duration::from_millis(100));
}

#[test]
fn nonsense_in_a_cards_queues_is_taken() {
    let mut dhcp = vec![0; HEADER];
    dhcp.extend([0xff; 6]);
    dhcp.extend([2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 1, 0x2c, 0, 0, 0, 0, 64, 17, 0x39, 0xc2, 0, 0, 0, 0]);
    dhcp.extend([0xff, 0xff, 0xff, 0xff, 0, 68, 0, 67, 1, 0x18, 0, 0, 1, 1, 6, 0]);
    let mut offload = dhcp.clone();
    offload[..HEADER].copy_from_slice(&[1, 1, 54, 0, 0, 5, 34, 0, 16, 0, 0, 0]);
    let taken = fuzz(&mut card("user"), &[arp(), dhcp, offload], 300, 1);
    assert!(taken.broken > 20 && taken.answered > 300, "{taken:?}");
}

#[test]
fn a_card_that_comes_later_has_an_address_of_its_own() {
    let net: Net = "user".parse().unwrap();
    let macs: Vec<_> = (0..NETS_MAX).map(|n| net.mac_of(n)).collect();
    let message = |taken: &[[u8; 6]], net: &str| open_another(&net.parse().unwrap(), taken).err().unwrap().to_string();
    assert_eq!(open_another(&net, &macs[1..]).ok().and_then(|card| card.mac()), Some(macs[0]));
    assert!(message(&macs, "user").contains("8 network cards already"));
    assert!(message(&macs[..1], "user,mac=52:54:00:12:34:56").contains("another card"));
    // A port that one card has is another's when that has gone.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let forwarded = format!("user,fwd=tcp:{port}:22");
    let first = open_another(&forwarded.parse().unwrap(), &[]).expect("the port is free");
    assert!(message(&macs[..1], &forwarded).contains("another program has that port"));
    drop(first);
    assert!(open_another(&forwarded.parse().unwrap(), &macs[..1]).is_ok());
}
