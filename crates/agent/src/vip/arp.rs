//! ARP as bytes: RFC 826, with the announcements and probes of RFC 5227.

use std::net::Ipv4Addr;

pub(super) const FRAME_BYTES: usize = 42;
pub(super) const ETHERTYPE: u16 = 0x0806;
const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERNET: u16 = 1;
const IPV4: u16 = 0x0800;
const REQUEST: u16 = 1;

/// "It is I who has this address": a request for it, from itself.
pub(super) fn announcement(mac: [u8; 6], address: Ipv4Addr) -> [u8; FRAME_BYTES] {
    request(mac, address, address)
}

/// "Does anybody have this address?", asked by nobody, so that no neighbour remembers who asked.
pub(super) fn probe(mac: [u8; 6], address: Ipv4Addr) -> [u8; FRAME_BYTES] {
    request(mac, Ipv4Addr::UNSPECIFIED, address)
}

fn request(mac: [u8; 6], from: Ipv4Addr, about: Ipv4Addr) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    let parts: [&[u8]; 12] = [
        &BROADCAST,
        &mac,
        &ETHERTYPE.to_be_bytes(),
        &ETHERNET.to_be_bytes(),
        &IPV4.to_be_bytes(),
        &[6, 4],
        &REQUEST.to_be_bytes(),
        &mac,
        &from.octets(),
        &[0; 6],
        &about.octets(),
        &[],
    ];
    let mut at = 0;
    for part in parts {
        frame[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    frame
}

/// Who says in this frame that it has `address`; a probe says nothing of the kind.
pub(super) fn claims(frame: &[u8], address: Ipv4Addr) -> Option<[u8; 6]> {
    let packet = frame.get(14..FRAME_BYTES)?;
    let is_arp = frame.get(12..14)? == ETHERTYPE.to_be_bytes()
        && packet[..6] == [0, 1, 8, 0, 6, 4]
        && matches!(packet[6..8], [0, 1 | 2]);
    let sender: [u8; 4] = packet[14..18].try_into().ok()?;
    if !is_arp || Ipv4Addr::from(sender) != address {
        return None;
    }
    packet[8..14].try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn an_announcement_claims_and_a_probe_does_not() {
        let address = Ipv4Addr::new(192, 168, 122, 10);
        let announced = announcement(MAC, address);
        assert_eq!(
            announced,
            [
                255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 7, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0,
                7, 192, 168, 122, 10, 0, 0, 0, 0, 0, 0, 192, 168, 122, 10
            ]
        );
        assert_eq!(claims(&announced, address), Some(MAC));
        assert_eq!(claims(&announced, Ipv4Addr::new(192, 168, 122, 11)), None);
        assert_eq!(claims(&probe(MAC, address), address), None);
        for end in 0..FRAME_BYTES {
            assert_eq!(claims(&announced[..end], address), None, "cut at {end}");
        }
        let mut reply = announced.to_vec();
        reply[21] = 2;
        reply.extend([0; 18]);
        assert_eq!(claims(&reply, address), Some(MAC), "padded to what an Ethernet carries");
        reply[21] = 8;
        assert_eq!(claims(&reply, address), None, "neither question nor answer");
    }
}
