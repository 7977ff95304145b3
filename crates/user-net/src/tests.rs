//! A guest that is smoltcp's TCP/IP, on one side, and sockets of the host's on the other.

use super::*;
use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint, Ipv4Cidr};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

const CARD: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's card: it does what is left to it, and may lose frames.
struct Card {
    network: Network,
    now: Instant,
    /// Segments of a frame that was more than one.
    cut: VecDeque<Vec<u8>>,
    /// Of a thousand frames, and the state of the dice.
    lost: u64,
    dice: u64,
    large: usize,
}

impl Card {
    fn loses(&mut self) -> bool {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % 1000 < self.lost
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        if let Some(frame) = self.cut.pop_front() {
            return Some(frame);
        }
        let frame = self.network.receive(70_000, self.now)?;
        let offload = frame.offload;
        let frame = frame.parts.concat();
        self.large = self.large.max(frame.len());
        self.cut = complete(frame, offload).into();
        self.cut.pop_front()
    }
}

/// Does what `offload` leaves to do: cuts, and fills in checksums.
fn complete(frame: Vec<u8>, offload: Offload) -> Vec<Vec<u8>> {
    let Some((start, offset)) = offload.checksum else {
        assert_eq!(offload.segment, None);
        return vec![frame];
    };
    assert_eq!((usize::from(start), offset), (frame::HEADERS, 16));
    let headers = frame::HEADERS + usize::from(frame[frame::HEADERS + 12] >> 4) * 4;
    let parts: Vec<&[u8]> = match offload.segment {
        Some(size) => {
            assert!(frame.len() > headers + usize::from(size), "it is more than one");
            frame[headers..].chunks(size.into()).collect()
        }
        None => vec![&frame[headers..]],
    };
    let mut sequence = u32::from_be_bytes(frame[frame::HEADERS + 4..][..4].try_into().unwrap());
    let last = parts.len() - 1;
    let complete = parts.into_iter().enumerate().map(|(n, part)| {
        let mut bytes = [&frame[..headers], part].concat();
        let mut ip = Ipv4Packet::new_unchecked(&mut bytes[frame::IP..]);
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        ip.set_total_len((headers - frame::IP + part.len()) as u16);
        ip.fill_checksum();
        let mut tcp = smoltcp::wire::TcpPacket::new_unchecked(ip.payload_mut());
        tcp.set_seq_number(smoltcp::wire::TcpSeqNumber(sequence as i32));
        tcp.set_fin(tcp.fin() && n == last);
        tcp.fill_checksum(&from.into(), &to.into());
        sequence = sequence.wrapping_add(part.len() as u32);
        bytes
    });
    complete.collect()
}

struct Received(Vec<u8>);
impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}
struct Sent<'a>(&'a mut Card);
impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        if !self.0.loses() {
            let now = self.0.now;
            self.0.network.transmit(&frame, false, now);
        }
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;
    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        let frame = self.take()?;
        if self.loses() { None } else { Some((Received(frame), Sent(self))) }
    }
    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sent<'_>> {
        Some(Sent(self))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

struct Guest {
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    began: Instant,
    /// Added to the clock at each step.
    hurry: Duration,
}

impl Guest {
    fn new(config: &Config) -> Guest {
        let now = Instant::now();
        let network = Network::new(config).expect("a network");
        let mut card = Card { network, now, cut: VecDeque::new(), lost: 0, dice: 1, large: 0 };
        let address = HardwareAddress::Ethernet(EthernetAddress(CARD));
        let mut interface =
            Interface::new(smoltcp::iface::Config::new(address), &mut card, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|list| list.push(IpCidr::Ipv4(Ipv4Cidr::new(GUEST, 24))).unwrap());
        interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        Guest { card, interface, sockets: SocketSet::new(vec![]), began: now, hurry: Duration::ZERO }
    }

    fn usual() -> Guest {
        Guest::new(&Config::new(CARD))
    }

    fn step(&mut self) {
        self.card.now = (self.card.now + self.hurry).max(Instant::now());
        let now = self.card.now;
        self.card.network.poll(now);
        let time = smoltcp::time::Instant::from_micros((now - self.began).as_micros() as i64);
        self.interface.poll(time, &mut self.card, &mut self.sockets);
    }

    /// Goes on until `done` says something.
    fn until<T>(&mut self, mut done: impl FnMut(&mut Guest) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            self.step();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(began.elapsed() < PATIENCE, "it takes too long");
            std::thread::yield_now();
        }
    }

    fn tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 100_000]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, to: (Ipv4Addr, u16), from: u16) -> SocketHandle {
        let handle = self.tcp();
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.interface.context(), to, from).unwrap();
        handle
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }
}

fn pattern(length: usize, seed: u32) -> Vec<u8> {
    (0..length as u32).map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
}

/// The guest and a host's socket send each other `there` and `back` at once, and end: the host when it will, or, because
/// smoltcp sends nothing again after it has seen the end (0.12, CLOSE-WAIT), when it has seen the guest's.
fn exchange(guest: &mut Guest, handle: SocketHandle, stream: TcpStream, there: Vec<u8>, back: Vec<u8>) {
    let waits = guest.card.lost > 0;
    let (expected, reply) = (there.clone(), back.clone());
    let mut writer = stream.try_clone().unwrap();
    let host = std::thread::spawn(move || {
        let write = std::thread::spawn(move || {
            writer.write_all(&reply).unwrap();
            if !waits {
                writer.shutdown(std::net::Shutdown::Write).unwrap();
            }
        });
        let mut got = Vec::new();
        let mut stream = stream;
        stream.read_to_end(&mut got).unwrap();
        write.join().unwrap();
        assert!(got == expected, "what the guest sent: {} bytes of {}", got.len(), expected.len());
    });
    let (mut sent, mut got) = (0, Vec::new());
    guest.until(|guest| {
        let socket = guest.socket(handle);
        if sent < there.len() && socket.can_send() {
            sent += socket.send_slice(&there[sent..]).unwrap();
            if sent == there.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
        (sent == there.len() && !socket.may_recv() && !socket.can_recv()).then_some(())
    });
    assert!(got == back, "what the host sent: {} bytes of {}", got.len(), back.len());
    // Until both have seen the other's end.
    guest
        .until(|guest| matches!(guest.socket(handle).state(), tcp::State::TimeWait | tcp::State::Closed).then_some(()));
    while !host.is_finished() {
        guest.step();
    }
    host.join().unwrap();
}

#[test]
fn an_address_is_leased() {
    let mut config = Config::new(CARD);
    config.mtu = 1400;
    let mut guest = Guest::new(&config);
    guest.interface.update_ip_addrs(|list| list.clear());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    guest.hurry = Duration::from_millis(5);
    let lease = guest.until(|guest| match guest.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
        Some(dhcpv4::Event::Configured(lease)) => {
            Some((lease.address, lease.router, lease.dns_servers.to_vec(), lease.server.address))
        }
        _ => None,
    });
    assert_eq!(lease, (Ipv4Cidr::new(GUEST, 24), Some(GATEWAY), vec![DNS], GATEWAY));
}

#[test]
fn the_router_answers_echoes() {
    let mut guest = Guest::usual();
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let handle = guest.sockets.add(icmp::Socket::new(buffer(), buffer()));
    let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
    socket.bind(icmp::Endpoint::Ident(77)).unwrap();
    let message = smoltcp::wire::Icmpv4Repr::EchoRequest { ident: 77, seq_no: 3, data: b"hello" };
    let bytes = socket.send(message.buffer_len(), GATEWAY.into()).unwrap();
    message.emit(&mut smoltcp::wire::Icmpv4Packet::new_unchecked(bytes), &Default::default());
    let answer =
        guest.until(|guest| guest.sockets.get_mut::<icmp::Socket>(handle).recv().ok().map(|(b, _)| b.to_vec()));
    assert_eq!((answer[0], &answer[4..]), (0, &[0, 77, 0, 3, b'h', b'e', b'l', b'l', b'o'][..]));
}

#[test]
fn the_guest_talks_to_the_host() {
    for segments in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut guest = Guest::usual();
        guest.card.network.start(Abilities { checksum: segments, segments });
        let handle = guest.connect((GATEWAY, listener.local_addr().unwrap().port()), 1025);
        guest.until(|guest| guest.socket(handle).may_send().then_some(()));
        let (stream, _) = listener.accept().unwrap();
        exchange(&mut guest, handle, stream, pattern(3_000_000, 1), pattern(5_000_001, 2));
        assert_eq!(guest.card.large > 20_000, segments, "{}", guest.card.large);
        guest.until(|guest| (guest.card.network.tcp.count() == 0).then_some(()));
    }
}

#[test]
fn what_the_guest_loses_is_sent_again() {
    for seed in 0..4 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut guest = Guest::usual();
        guest.card.network.start(Abilities { checksum: true, segments: seed % 2 == 0 });
        (guest.card.lost, guest.card.dice) = (20, seed);
        guest.hurry = Duration::from_millis(2);
        let handle = guest.connect((GATEWAY, listener.local_addr().unwrap().port()), 1025);
        guest.until(|guest| guest.socket(handle).may_send().then_some(()));
        let (stream, _) = listener.accept().unwrap();
        exchange(&mut guest, handle, stream, pattern(300_000, 3), pattern(500_000, 4));
    }
}

#[test]
fn a_port_where_nobody_is_refuses() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::usual();
    let handle = guest.connect((GATEWAY, port), 1025);
    guest.step();
    guest.until(|guest| (guest.socket(handle).state() == tcp::State::Closed).then_some(()));
    // What is nowhere is refused too, and 127.0.0.1 is the guest's own.
    for address in [Ipv4Addr::new(10, 0, 2, 77), Ipv4Addr::new(127, 0, 0, 1), DNS] {
        assert_eq!(guest.card.network.host(address, 80, Instant::now()), None);
    }
}

#[test]
fn resets_reach_the_other_side() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::usual();
    let [first, second] = [1025, 1026].map(|from| guest.connect((GATEWAY, port), from));
    guest.until(|guest| (guest.socket(first).may_send() && guest.socket(second).may_send()).then_some(()));
    let mut streams = [listener.accept().unwrap().0, listener.accept().unwrap().0];
    streams.sort_by_key(|stream| stream.peer_addr().unwrap().port());
    // Which is which is told by what arrives.
    guest.socket(first).send_slice(b"1").unwrap();
    guest.socket(second).send_slice(b"2").unwrap();
    let mut names = [0; 2];
    for (stream, name) in streams.iter_mut().zip(&mut names) {
        stream.set_nonblocking(true).unwrap();
        *name = guest.until(|_| {
            let mut byte = [0];
            stream.read(&mut byte).ok().map(|_| byte[0])
        });
    }
    let at = names.iter().position(|name| *name == b'1').unwrap();
    guest.socket(first).abort();
    let error = guest.until(|_| streams[at].read(&mut [0]).err().filter(|error| error.kind() != ErrorKind::WouldBlock));
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    sockopt_reset(&streams[1 - at]);
    drop(streams);
    guest.until(|guest| (guest.socket(second).state() == tcp::State::Closed).then_some(()));
    guest.until(|guest| (guest.card.network.tcp.count() == 0).then_some(()));
}

#[test]
fn another_network_breaks_the_connections_of_the_first() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::usual();
    let handle = guest.connect((GATEWAY, listener.local_addr().unwrap().port()), 1025);
    guest.until(|guest| guest.socket(handle).may_send().then_some(()));
    let saved = guest.card.network.save();
    assert_eq!(saved.len(), 1);
    guest.card.network = Network::new(&Config::new(CARD)).unwrap();
    guest.card.network.restore(saved);
    guest.until(|guest| (guest.socket(handle).state() == tcp::State::Closed).then_some(()));
}

fn sockopt_reset(stream: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn forwarded_ports_lead_to_the_guest() {
    let (port, closed) = (free_port(), free_port());
    let mut config = Config::new(CARD);
    config.forwards = vec![format!("tcp:{port}:22").parse().unwrap(), format!("tcp:{closed}:23").parse().unwrap()];
    let mut guest = Guest::new(&config);
    let handle = guest.tcp();
    guest.socket(handle).listen(22).unwrap();
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    guest.until(|guest| guest.socket(handle).may_send().then_some(()));
    let remote = guest.socket(handle).remote_endpoint().unwrap();
    assert_eq!(remote, IpEndpoint::new(GATEWAY.into(), stream.local_addr().unwrap().port()));
    exchange(&mut guest, handle, stream, pattern(1_000_000, 5), pattern(700_000, 6));
    // Nobody is there in the guest.
    let mut stream = TcpStream::connect(("127.0.0.1", closed)).unwrap();
    stream.set_nonblocking(true).unwrap();
    let error = guest.until(|_| stream.read(&mut [0]).err().filter(|error| error.kind() != ErrorKind::WouldBlock));
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let message = Network::new(&config).err().expect("the ports are taken").to_string();
    assert!(message.contains(&format!("tcp:127.0.0.1:{port}:22")), "{message}");
}

fn udp_socket(guest: &mut Guest, port: u16) -> SocketHandle {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
    let handle = guest.sockets.add(udp::Socket::new(buffer(), buffer()));
    guest.sockets.get_mut::<udp::Socket>(handle).bind(port).unwrap();
    handle
}

#[test]
fn datagrams_go_both_ways() {
    let port = {
        let probe = UdpSocket::bind("127.0.0.1:0").unwrap();
        probe.local_addr().unwrap().port()
    };
    let mut config = Config::new(CARD);
    config.forwards = vec![format!("udp:{port}:7").parse().unwrap()];
    let mut guest = Guest::new(&config);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let to = IpEndpoint::new(GATEWAY.into(), server.local_addr().unwrap().port());
    let handle = udp_socket(&mut guest, 7);
    guest.sockets.get_mut::<udp::Socket>(handle).send_slice(b"question", to).unwrap();
    let mut buffer = [0; 100];
    let (length, from) = guest.until(|_| server.recv_from(&mut buffer).ok());
    assert_eq!(&buffer[..length], b"question");
    server.send_to(b"answer", from).unwrap();
    let receive = |guest: &mut Guest| {
        guest.until(|guest| {
            let socket = guest.sockets.get_mut::<udp::Socket>(handle);
            socket.recv().ok().map(|(bytes, meta)| (bytes.to_vec(), meta.endpoint))
        })
    };
    assert_eq!(receive(&mut guest), (b"answer".to_vec(), to));
    // A client of the forwarded port, and the guest's answer.
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"knock", ("127.0.0.1", port)).unwrap();
    let (bytes, from) = receive(&mut guest);
    assert_eq!(
        (&bytes[..], from.addr, from.port),
        (&b"knock"[..], GATEWAY.into(), client.local_addr().unwrap().port())
    );
    guest.sockets.get_mut::<udp::Socket>(handle).send_slice(b"come in", from).unwrap();
    client.set_nonblocking(true).unwrap();
    let (length, from) = guest.until(|_| client.recv_from(&mut buffer).ok());
    assert_eq!((&buffer[..length], from.port()), (&b"come in"[..], port));
}

#[test]
fn names_are_asked_of_the_hosts_servers() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let folder = std::env::temp_dir().join(format!("anyvisor-names-{}", std::process::id()));
    std::fs::write(&folder, "nameserver 127.0.0.1\n").unwrap();
    let config = Config {
        resolv_conf: folder.clone(),
        name_server_port: server.local_addr().unwrap().port(),
        ..Config::new(CARD)
    };
    let mut guest = Guest::new(&config);
    let handle = udp_socket(&mut guest, 1053);
    let to = IpEndpoint::new(DNS.into(), 53);
    guest.sockets.get_mut::<udp::Socket>(handle).send_slice(b"who is it", to).unwrap();
    let mut buffer = [0; 100];
    let (_, from) = guest.until(|_| server.recv_from(&mut buffer).ok());
    server.send_to(b"me", from).unwrap();
    let (bytes, meta) = guest.until(|guest| {
        let socket = guest.sockets.get_mut::<udp::Socket>(handle);
        socket.recv().ok().map(|(bytes, meta)| (bytes.to_vec(), meta))
    });
    assert_eq!((&bytes[..], meta.endpoint), (&b"me"[..], to));
    std::fs::remove_file(folder).unwrap();
}

/// A frame with an IP packet from the guest.
fn frame_with(protocol: IpProtocol, destination: Ipv4Addr, payload: &[u8], offset: u16, more: bool) -> Vec<u8> {
    let wire = Wire { ours: EthernetAddress(CARD), guest: MAC };
    let packet = frame::Packet { source: GUEST, destination, protocol, identity: 9 };
    let mut frame = vec![0; frame::HEADERS + payload.len()];
    wire.write_fragment(&mut frame, &packet, payload.len(), offset, more);
    frame[frame::HEADERS..].copy_from_slice(payload);
    frame
}

#[test]
fn long_datagrams_are_cut_and_put_together() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut network = Network::new(&Config::new(CARD)).unwrap();
    let data = pattern(4000, 7);
    let mut udp = vec![0; 8];
    udp[..2].copy_from_slice(&99u16.to_be_bytes());
    udp[2..4].copy_from_slice(&server.local_addr().unwrap().port().to_be_bytes());
    udp[4..6].copy_from_slice(&4008u16.to_be_bytes());
    udp.extend(&data);
    let now = Instant::now();
    for at in [2400, 0, 1200] {
        let part = &udp[at..3400.min(at + 1200)];
        network.transmit(&frame_with(IpProtocol::Udp, GATEWAY, part, at as u16, true), false, now);
    }
    assert_eq!(network.datagrams.count(), 0, "a part is missing");
    network.transmit(&frame_with(IpProtocol::Udp, GATEWAY, &udp[3400..], 3400, false), false, now);
    let mut buffer = [0; 5000];
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..length] == data);
    server.send_to(&data, from).unwrap();
    let mut fragments = Fragments::default();
    let began = Instant::now();
    let whole = loop {
        network.poll(now);
        if let Some(frame) = network.receive(1514, now) {
            let bytes = frame.parts.concat();
            assert!(bytes.len() <= 1514);
            let ip = Ipv4Packet::new_checked(&bytes[frame::IP..]).unwrap();
            assert!(ip.verify_checksum());
            if let Some(whole) = fragments.add(&ip, now) {
                break whole;
            }
        }
        assert!(began.elapsed() < PATIENCE);
    };
    let ip = Ipv4Packet::new_checked(&whole[..]).unwrap();
    let udp = UdpPacket::new_checked(ip.payload()).unwrap();
    assert!(udp.verify_checksum(&GATEWAY.into(), &GUEST.into()) && udp.payload() == data);
}

#[test]
fn silence_is_told() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut network = Network::new(&Config::new(CARD)).unwrap();
    let now = Instant::now();
    let mut udp = [0, 99, 0, 0, 0, 8, 0, 0];
    udp[2..4].copy_from_slice(&port.to_be_bytes());
    network.transmit(&frame_with(IpProtocol::Udp, GATEWAY, &udp, 0, false), false, now);
    let began = Instant::now();
    let bytes = loop {
        network.poll(now);
        if let Some(frame) = network.receive(1514, now) {
            break frame.parts.concat();
        }
        assert!(began.elapsed() < PATIENCE);
    };
    let icmp = &bytes[frame::HEADERS..];
    assert_eq!(icmp[..2], [3, 3], "port unreachable");
    assert_eq!((icmp[8 + 9], &icmp[8 + 16..8 + 24]), (17, &[10, 0, 2, 2, 0, 99, udp[2], udp[3]][..]));
    assert_eq!(frame::checksum(0, &[icmp]), 0);
}

#[test]
fn flows_have_a_limit_and_an_end() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut network = Network::new(&Config::new(CARD)).unwrap();
    let now = Instant::now();
    for from in 1..2000u16 {
        let mut udp = [0, 0, 0, 0, 0, 8, 0, 0];
        udp[..2].copy_from_slice(&from.to_be_bytes());
        udp[2..4].copy_from_slice(&server.local_addr().unwrap().port().to_be_bytes());
        network.transmit(&frame_with(IpProtocol::Udp, GATEWAY, &udp, 0, false), false, now);
    }
    assert_eq!(network.datagrams.count(), 512);
    network.poll(now + Duration::from_secs(100));
    assert_eq!(network.datagrams.count(), 512);
    network.poll(now + Duration::from_secs(200));
    assert_eq!((network.datagrams.count(), network.deadline()), (0, None));
}

/// Whatever comes, nothing panics and nothing grows without end.
#[test]
fn frames_without_sense_do_no_harm() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut network = Network::new(&Config::new(CARD)).unwrap();
    network.start(Abilities { checksum: true, segments: true });
    let mut dice = 7u64;
    let mut roll = |most: usize| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) as usize % most
    };
    let mut now = Instant::now();
    for round in 0..60_000 {
        let mut payload: Vec<u8> = (0..roll(120)).map(|_| roll(256) as u8).collect();
        let protocol = [IpProtocol::Tcp, IpProtocol::Udp, IpProtocol::Icmp, IpProtocol::Igmp][roll(4)];
        let destination = [GATEWAY, GATEWAY, DNS, GUEST, Ipv4Addr::BROADCAST, Ipv4Addr::new(127, 0, 0, 1)][roll(6)];
        // Few ends, so that segments meet connections, and flags and lengths that may make sense.
        if payload.len() >= 20 {
            payload[..2].copy_from_slice(&(1000 + roll(3) as u16).to_be_bytes());
            let to = [port, port, 67, 53][roll(4)];
            payload[2..4].copy_from_slice(&to.to_be_bytes());
            if protocol == IpProtocol::Tcp {
                payload[4..12].copy_from_slice(&[0, 0, 0, roll(9) as u8, 0, 0, 0, 0]);
                if roll(2) == 0
                    && let Some(number) = network.tcp.any_number()
                {
                    payload[8..12].copy_from_slice(&number.wrapping_sub(roll(3) as u32).to_be_bytes());
                }
                payload[12] = [0x50, 0x60, 0x80, 0xf0, 0x40][roll(5)];
                payload[13] = [2, 16, 24, 17, 4, 18, 16, 255][roll(8)];
            } else {
                let length = payload.len() as u16;
                payload[4..6].copy_from_slice(&length.to_be_bytes());
            }
        }
        let more = roll(10) == 0;
        let offset = if roll(10) == 0 { roll(9000) as u16 & !7 } else { 0 };
        let mut frame = frame_with(protocol, destination, &payload, offset, more);
        match roll(8) {
            0 => frame.truncate(roll(frame.len() + 1)),
            1 => {
                let at = roll(frame.len());
                frame[at] = roll(256) as u8;
            }
            2 => frame[12..14].copy_from_slice(&[8, 6]),
            _ => {}
        }
        network.transmit(&frame, roll(2) == 0, now);
        if round % 16 == 0 {
            now += Duration::from_millis(roll(3000) as u64);
            network.poll(now);
            let room = [60, 1514, 70_000][roll(3)];
            for _ in 0..roll(40) {
                if let Some(frame) = network.receive(room, now) {
                    assert!(frame.length() <= room);
                }
            }
        }
        if round % 500 == 0 {
            listener.set_nonblocking(true).unwrap();
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.write(&[1; 5000]);
            }
        }
        assert!(network.tcp.count() <= 512 && network.datagrams.count() <= 512);
    }
    network.reset();
    assert_eq!(network.tcp.count() + network.datagrams.count(), 0);
}
