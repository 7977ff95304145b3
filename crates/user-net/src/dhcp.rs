//! The DHCP server of a network with one client (RFC 2131): it always gets the same address.

use crate::{DNS, GATEWAY, GUEST, MASK};
use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};
use std::net::Ipv4Addr;

pub const SERVER_PORT: u16 = 67;
pub const CLIENT_PORT: u16 = 68;
/// A day, in seconds; whoever asks again gets the same.
const LEASE: u32 = 86400;
/// Option 26 (RFC 2132, 5.1): the interface's MTU.
const MTU: u8 = 26;
/// What clients take as a message at least (RFC 951).
const MESSAGE_MIN: usize = 300;

/// The answer to a message of a client, and where to: none to what is no question for a server.
pub fn answer(message: &[u8], mtu: u16) -> Option<(Ipv4Addr, Vec<u8>)> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    if request.server_identifier.is_some_and(|server| server != GATEWAY) {
        return None;
    }
    let wanted = request.requested_ip.unwrap_or(request.client_ip);
    let message_type = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if wanted == GUEST => DhcpMessageType::Ack,
        DhcpMessageType::Request => DhcpMessageType::Nak,
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let agrees = message_type != DhcpMessageType::Nak;
    let leases = agrees && request.message_type != DhcpMessageType::Inform;
    let mtu = mtu.to_be_bytes();
    let options = [DhcpOption { kind: MTU, data: &mtu }];
    let reply = DhcpRepr {
        message_type,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if agrees { request.client_ip } else { Ipv4Addr::UNSPECIFIED },
        your_ip: if leases { GUEST } else { Ipv4Addr::UNSPECIFIED },
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: agrees.then_some(GATEWAY),
        subnet_mask: agrees.then_some(MASK),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: agrees.then(|| [DNS].into_iter().collect()),
        max_size: None,
        lease_duration: leases.then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if agrees { &options } else { &[] },
    };
    let mut bytes = vec![0; reply.buffer_len().max(MESSAGE_MIN)];
    reply.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).ok()?;
    let known = agrees && request.client_ip != Ipv4Addr::UNSPECIFIED;
    Some((if known { request.client_ip } else { Ipv4Addr::BROADCAST }, bytes))
}
