//! Addresses and interfaces, asked of the kernel and told to it: rtnetlink(7), as far as this needs it.
//!
//! Three questions and two orders over a socket of the kernel's own, each answered within microseconds. A crate for all
//! of netlink would bring a runtime and a type for every attribute there is.
//!
//! Hazard: lengths. What comes is from the kernel, but every length in it is still compared with what is there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use pgherd_core::spec::vip::Prefixed;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

/// The mark on an address that an agent has set: `IFA_PROTO`, of no meaning to the kernel. Kernels before 5.18 know
/// none, and show none.
pub(super) const OURS: u8 = 0x70;

/// The kernel answers at once; a question that it does not understand is never answered.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// A page of answers is at most so long (`NLMSG_GOODSIZE` and `netlink_dump` in `af_netlink.c`).
const PAGE_BYTES: usize = 32 << 10;

// linux/netlink.h
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
// linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
// linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
// linux/if_addr.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_PROTO: u16 = 11;
const IFA_F_NODAD: u32 = 0x02;
const FOREVER: u32 = u32::MAX;
// linux/if.h
const IFF_UP: u32 = 0x1;
// linux/if_arp.h
const ARPHRD_ETHER: u16 = 1;
// The kernel's `AF_INET` and `AF_INET6`.
pub(super) const INET: u8 = 2;
pub(super) const INET6: u8 = 10;

/// A socket on which one question at a time is asked.
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) is_up: bool,
    /// Of an Ethernet; other links have nobody to be announced to in this way.
    pub(super) mac: Option<[u8; 6]>,
}

/// One address as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Present {
    pub(super) link: u32,
    pub(super) address: Prefixed,
    /// It stays until somebody removes it.
    pub(super) permanent: bool,
    pub(super) mark: Option<u8>,
}

impl Netlink {
    pub(super) fn route() -> io::Result<Netlink> {
        Netlink::open(None)
    }

    pub(super) fn open(protocol: Option<Protocol>) -> io::Result<Netlink> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_WITHIN))?;
        Ok(Netlink { socket, sequence: 0, buffer: vec![0; PAGE_BYTES] })
    }

    /// `None`: there is none by that name.
    pub(super) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        // struct ifinfomsg
        let mut body = vec![0; 16];
        let mut text = name.as_bytes().to_vec();
        text.push(0);
        attribute(&mut body, IFLA_IFNAME, &text);
        let mut found = None;
        let asked = self.ask(RTM_GETLINK, 0, &body, |kind, body| {
            if kind == RTM_NEWLINK {
                found = read_link(body);
            }
        });
        match asked {
            Ok(()) => Ok(found),
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every interface's entry for this address.
    pub(super) fn present(&mut self, address: IpAddr) -> io::Result<Vec<Present>> {
        let mut found = Vec::new();
        // struct ifaddrmsg
        let body = [family_of(address), 0, 0, 0, 0, 0, 0, 0];
        self.ask(RTM_GETADDR, NLM_F_DUMP, &body, |kind, body| {
            if kind == RTM_NEWADDR
                && let Some(present) = read_address(body)
                && present.address.address == address
            {
                found.push(present);
            }
        })?;
        Ok(found)
    }

    /// Sets the address, or gives the one that is there another `life`, after which the kernel removes it.
    pub(super) fn set(&mut self, link: u32, address: Prefixed, life: Duration) -> io::Result<()> {
        let valid = u32::try_from(life.as_secs()).unwrap_or(FOREVER - 1);
        if valid == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "less than a second is left"));
        }
        // Connections that this host begins itself do not leave from it: an address of IPv4 is secondary to the host's
        // own, and one of IPv6 is deprecated from the beginning.
        let preferred = if address.address.is_ipv4() { valid } else { 0 };
        let mut body = address_message(link, address);
        let mut cache = Vec::new();
        for number in [preferred, valid, 0, 0] {
            cache.extend(number.to_ne_bytes());
        }
        attribute(&mut body, IFA_CACHEINFO, &cache);
        attribute(&mut body, IFA_FLAGS, &IFA_F_NODAD.to_ne_bytes());
        attribute(&mut body, IFA_PROTO, &[OURS]);
        self.ask(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &body, |_, _| {})
    }

    /// `false`: it was not there.
    pub(super) fn remove(&mut self, link: u32, address: Prefixed) -> io::Result<bool> {
        match self.ask(RTM_DELADDR, NLM_F_ACK, &address_message(link, address), |_, _| {}) {
            Ok(()) => Ok(true),
            Err(error) if [Errno::ADDRNOTAVAIL, Errno::NODEV].iter().any(|errno| is(&error, *errno)) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Sends one message and hands over what comes back, until its end.
    pub(super) fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let many = flags & NLM_F_DUMP == NLM_F_DUMP;
        // Without an acknowledgement a single answer ends it.
        let flags = if many { flags } else { flags | NLM_F_ACK } | NLM_F_REQUEST;
        let length = HEADER_BYTES + body.len();
        let mut message = Vec::with_capacity(length);
        message.extend(u32::try_from(length).map_err(io::Error::other)?.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        sendto(&self.socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        loop {
            let (_, received) = match recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::empty()) {
                Err(Errno::INTR) => continue,
                received => received?,
            };
            let mut rest = self.buffer.get(..received).unwrap_or_default();
            while let Some((header, body, next)) = split_message(rest) {
                rest = next;
                // What an earlier question that was given up still brings.
                if header.sequence != self.sequence {
                    continue;
                }
                match header.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = body.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    kind => each(kind, body),
                }
            }
        }
    }
}

/// Whether [`OURS`] would be shown on what bears it. If that cannot be told, an address without it is nobody's of ours.
pub(super) fn kernel_knows_marks() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    knows_marks(&release)
}

fn knows_marks(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (5, 18),
        _ => true,
    }
}

pub(super) fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

pub(super) fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { INET } else { INET6 }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(super) fn address_of(octets: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(octets).ok().map(|octets| Ipv4Addr::from(octets).into());
    v4().or_else(|| <[u8; 16]>::try_from(octets).ok().map(|octets| Ipv6Addr::from(octets).into()))
}

fn address_message(link: u32, address: Prefixed) -> Vec<u8> {
    let mut body = vec![family_of(address.address), address.prefix, 0, 0];
    body.extend(link.to_ne_bytes());
    let octets = octets(address.address);
    attribute(&mut body, IFA_LOCAL, &octets);
    attribute(&mut body, IFA_ADDRESS, &octets);
    body
}

/// Appends an attribute, aligned as the kernel wants it.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("attributes here are a few bytes");
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

struct Header {
    kind: u16,
    sequence: u32,
}

/// The first message of `bytes`, and what stands behind it.
fn split_message(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let body = bytes.get(HEADER_BYTES..length)?;
    let header = Header {
        kind: u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?),
        sequence: u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?),
    };
    Some((header, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attributes in `bytes`; what does not fit ends them.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        // The upper two bits say how it is encoded.
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn read_link(body: &[u8]) -> Option<Link> {
    let kind = u16::from_ne_bytes(*body.get(2..)?.first_chunk()?);
    let index = u32::from_ne_bytes(*body.get(4..)?.first_chunk()?);
    let flags = u32::from_ne_bytes(*body.get(8..)?.first_chunk()?);
    let mac = attributes(body.get(16..)?).find(|(kind, _)| *kind == IFLA_ADDRESS);
    let mac = mac.and_then(|(_, mac)| <[u8; 6]>::try_from(mac).ok()).filter(|_| kind == ARPHRD_ETHER);
    Some(Link { index, is_up: flags & IFF_UP != 0, mac })
}

fn read_address(body: &[u8]) -> Option<Present> {
    let prefix = *body.get(1)?;
    let link = u32::from_ne_bytes(*body.get(4..)?.first_chunk()?);
    let (mut local, mut other, mut valid, mut mark) = (None, None, FOREVER, None);
    for (kind, value) in attributes(body.get(8..)?) {
        match kind {
            IFA_LOCAL => local = address_of(value),
            // The far end of a point-to-point link, and else the address itself.
            IFA_ADDRESS => other = address_of(value),
            IFA_CACHEINFO => {
                valid = value.get(4..)?.first_chunk().map_or(FOREVER, |b| u32::from_ne_bytes(*b));
            }
            IFA_PROTO => mark = value.first().copied(),
            _ => {}
        }
    }
    let address = Prefixed { address: local.or(other)?, prefix };
    Some(Present { link, address, permanent: valid == FOREVER, mark })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_attributes_end_where_they_say() {
        let mut body = Vec::new();
        attribute(&mut body, 7, b"abc");
        attribute(&mut body, 8, b"");
        assert_eq!(body.len(), 12, "aligned to four bytes");
        let read: Vec<_> = attributes(&body).collect();
        assert_eq!(read, [(7, b"abc".as_slice()), (8, b"".as_slice())]);

        // Cut off anywhere, it is read as far as it goes.
        for end in 0..body.len() {
            assert!(attributes(&body[..end]).count() <= 2);
        }
        // A length that is shorter than itself, or longer than the rest.
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[255, 255, 1, 0, 1, 2, 3, 4]).count(), 0);
        assert!(split_message(&[3, 0, 0, 0]).is_none());
        assert!(split_message(&[255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_none());
    }

    #[test]
    fn an_address_is_read_as_it_was_written() {
        for text in ["192.168.122.10/24", "2001:db8::10/64"] {
            let address: Prefixed = text.parse().unwrap();
            let mut body = address_message(7, address);
            let permanent = Present { link: 7, address, permanent: true, mark: None };
            assert_eq!(read_address(&body), Some(permanent));
            let cache: Vec<u8> = [1_u32, 2, 3, 4].iter().flat_map(|number| number.to_ne_bytes()).collect();
            attribute(&mut body, IFA_CACHEINFO, &cache);
            attribute(&mut body, IFA_PROTO, &[OURS]);
            let ours = Present { permanent: false, mark: Some(OURS), ..permanent };
            assert_eq!(read_address(&body), Some(ours));
        }
    }

    #[test]
    fn kernels_know_marks_since_5_18() {
        for (release, knows) in
            [("6.1.0-18-amd64\n", true), ("5.18.0", true), ("5.15.0-91-generic\n", false), ("4.18.0", false)]
        {
            assert_eq!(knows_marks(release), knows, "{release}");
        }
        assert!(knows_marks("who knows"), "then nothing without a mark is taken for ours");
    }

    #[test]
    fn the_loopback_is_found_and_what_is_not_there_is_not() {
        let mut netlink = Netlink::route().unwrap();
        let link = netlink.link("lo").unwrap().expect("every host has one");
        assert_eq!((link.index, link.mac), (1, None), "it is no Ethernet");
        assert_eq!(netlink.link("nosuchlink0").unwrap(), None);
        let gone: IpAddr = "192.0.2.123".parse().unwrap();
        assert_eq!(netlink.present(gone).unwrap(), []);
    }
}
