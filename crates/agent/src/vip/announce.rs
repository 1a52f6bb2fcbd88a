//! Tells the neighbours where an address is now, and hears who else says that he has it.
//!
//! Neighbours remember for minutes by which station an address is reached. They correct that at once when they hear an
//! announcement: a gratuitous ARP (RFC 5227) or, for IPv6, an unsolicited neighbour advertisement (RFC 4861, 7.2.6).
//! One may be lost, and a switch that has just brought a port up loses all, so it is said again and again for a while.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::sockopt::{set_ipv6_multicast_hops, set_ipv6_multicast_if, set_ipv6_multicast_loop};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, ipproto, recv, send,
    sendto, socket_with,
};

use super::arp;
use super::netlink::Link;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// A neighbour that is asked through a router is none.
const HOPS: u32 = 255;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// It overrides what neighbours remember.
const OVERRIDE: u8 = 0x20;
const TARGET_LINK_LAYER: u8 = 2;
/// Claims are told of one after the other; a flood of them is not read to its end at once.
const MAX_READ: usize = 64;

/// A way to the neighbours on one interface.
#[derive(Debug)]
pub(super) struct Neighbours {
    address: IpAddr,
    mac: [u8; 6],
    link: u32,
    socket: OwnedFd,
}

impl Neighbours {
    /// `None`: on a link without stations there is nobody to tell.
    pub(super) fn of(link: &Link, address: IpAddr) -> io::Result<Option<Neighbours>> {
        let Some(mac) = link.mac else { return Ok(None) };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match address {
            IpAddr::V4(_) => {
                let ethertype =
                    Protocol::from_raw(u32::from(arp::ETHERTYPE.to_be()).try_into().expect("not 0"));
                let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(ethertype))?;
                bind(&socket, &PacketAddress { protocol: arp::ETHERTYPE.to_be(), link: link.index })?;
                socket
            }
            IpAddr::V6(_) => {
                let socket =
                    socket_with(AddressFamily::INET6, SocketType::RAW, flags, Some(ipproto::ICMPV6))?;
                set_ipv6_multicast_if(&socket, link.index)?;
                set_ipv6_multicast_hops(&socket, HOPS)?;
                set_ipv6_multicast_loop(&socket, false)?;
                socket
            }
        };
        Ok(Some(Neighbours { address, mac, link: link.index, socket }))
    }

    /// Asks whether somebody has the address. Nobody waits for the answer.
    pub(super) fn probe(&self) -> io::Result<()> {
        match self.address {
            IpAddr::V4(address) => self.send(&arp::probe(self.mac, address)),
            IpAddr::V6(address) => {
                // To the multicast group that whoever has the address listens to.
                let [.., a, b, c] = address.octets();
                let group =
                    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
                self.send_icmp(&solicitation(self.mac, address), group)
            }
        }
    }

    pub(super) fn announce(&self) -> io::Result<()> {
        match self.address {
            IpAddr::V4(address) => self.send(&arp::announcement(self.mac, address)),
            IpAddr::V6(address) => self.send_icmp(&advertisement(self.mac, address), ALL_NODES),
        }
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(&self.socket, frame, SendFlags::empty())?;
        Ok(())
    }

    fn send_icmp(&self, message: &[u8], to: Ipv6Addr) -> io::Result<()> {
        let to = SocketAddrV6::new(to, 0, 0, self.link);
        sendto(&self.socket, message, SendFlags::empty(), &to)?;
        Ok(())
    }

    /// The stations, other than this one, that have said since the last time that they have the address.
    pub(super) fn others(&self) -> io::Result<Vec<[u8; 6]>> {
        let mut others = Vec::new();
        let mut buffer = [0; 256];
        for _ in 0..MAX_READ {
            let received = match recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((_, received)) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            };
            let packet = buffer.get(..received).unwrap_or(&buffer);
            let claims = match self.address {
                IpAddr::V4(address) => arp::claims(packet, address),
                IpAddr::V6(address) => claims_v6(packet, address),
            };
            others.extend(claims.filter(|mac| *mac != self.mac));
        }
        Ok(others)
    }
}

impl AsFd for Neighbours {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The kernel fills in the checksum.
fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend([TARGET_LINK_LAYER, 1]);
    message.extend(mac);
    message
}

fn solicitation(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    const SOURCE_LINK_LAYER: u8 = 1;
    let mut message = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    message.extend(address.octets());
    message.extend([SOURCE_LINK_LAYER, 1]);
    message.extend(mac);
    message
}

/// Who says in this advertisement that it has `address`. Without a link-layer address it says nothing that helps.
fn claims_v6(message: &[u8], address: Ipv6Addr) -> Option<[u8; 6]> {
    let target: [u8; 16] = *message.get(8..)?.first_chunk()?;
    if message[0] != NEIGHBOUR_ADVERTISEMENT || Ipv6Addr::from(target) != address {
        return None;
    }
    match message.get(24..)? {
        [TARGET_LINK_LAYER, 1, mac @ ..] => mac.first_chunk().copied(),
        _ => None,
    }
}

/// `struct sockaddr_ll`, as far as bind(2) looks at it: which packets, and of which interface.
#[derive(Debug)]
struct PacketAddress {
    /// In network byte order.
    protocol: u16,
    link: u32,
}

// SAFETY: the pointer is to a whole `sockaddr_ll`, laid out as packet(7) has it, and lives while `f` is called.
#[allow(unsafe_code, reason = "rustix has no type for an address of a packet socket")]
unsafe impl SocketAddrArg for PacketAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        let mut bytes = Aligned([0; LENGTH]);
        bytes.0[0..2].copy_from_slice(&AddressFamily::PACKET.as_raw().to_ne_bytes());
        bytes.0[2..4].copy_from_slice(&self.protocol.to_ne_bytes());
        bytes.0[4..8].copy_from_slice(&self.link.to_ne_bytes());
        f(std::ptr::from_ref(&bytes).cast(), LENGTH as SocketAddrLen)
    }
}

/// `sizeof(struct sockaddr_ll)`
const LENGTH: usize = 20;

#[repr(align(4))]
struct Aligned([u8; LENGTH]);

/// For messages.
pub(super) fn station(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn an_advertisement_claims_and_a_solicitation_does_not() {
        let address: Ipv6Addr = "2001:db8::10".parse().unwrap();
        let said = advertisement(MAC, address);
        assert_eq!(said.len(), 32);
        assert_eq!(claims_v6(&said, address), Some(MAC));
        assert_eq!(claims_v6(&said, "2001:db8::11".parse().unwrap()), None);
        assert_eq!(claims_v6(&solicitation(MAC, address), address), None);
        for end in 0..said.len() {
            assert_eq!(claims_v6(&said[..end], address), None, "cut at {end}");
        }
        assert_eq!(station(MAC), "02:00:00:00:00:07");
    }
}
