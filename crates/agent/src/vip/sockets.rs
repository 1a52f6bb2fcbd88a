//! Ends the connections that use an address, before the address goes.
//!
//! A connection whose own address is gone cannot even be closed: nothing leaves from it any more, and a client that
//! waits for an answer waits until its keepalives fail, hours later by default. So the kernel is asked to reset each of
//! them first, which clients hear at once: `SOCK_DESTROY` of sock_diag(7), in every distribution's kernel since 2018.

use std::io;
use std::net::IpAddr;

use rustix::io::Errno;
use rustix::net::netlink::SOCK_DIAG;

use super::netlink::{INET, Netlink, address_of, family_of, is};

// linux/sock_diag.h and linux/inet_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_DUMP: u16 = 0x300;
const TCP: u8 = 6;
/// All of tcp_states.h but LISTEN, which belongs to no client, and TIME_WAIT, which is over.
const STATES: u32 = 0xfff & !(1 << 10) & !(1 << 6) | 1 << 12;
const LISTEN: u32 = 1 << 10;
/// `struct inet_diag_sockid`: two ports, two addresses, an interface and a cookie.
const ID_BYTES: usize = 48;
const SOURCE: usize = 4;

/// How many connections it has ended; `None` where this kernel does not.
pub(super) fn end_all_of(address: IpAddr) -> io::Result<Option<usize>> {
    let mut netlink = Netlink::open(Some(SOCK_DIAG))?;
    let family = family_of(address);
    let mut found: Vec<[u8; ID_BYTES]> = Vec::new();
    netlink.ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request(family, &[0; ID_BYTES]), |_, body| {
        // struct inet_diag_msg begins with four bytes, the first of which is the family.
        let id = body.get(4..).and_then(|rest| rest.first_chunk::<ID_BYTES>());
        if let Some(id) = id.filter(|id| source(id, family) == Some(address)) {
            found.push(*id);
        }
    })?;
    let mut ended = 0;
    for id in &found {
        match netlink.ask(SOCK_DESTROY, 0, &request(family, id), |_, _| {}) {
            Ok(()) => ended += 1,
            Err(error) if is(&error, Errno::OPNOTSUPP) => return Ok(None),
            // It has ended by itself meanwhile.
            Err(error) if is(&error, Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(ended))
}

fn source(id: &[u8; ID_BYTES], family: u8) -> Option<IpAddr> {
    let length = if family == INET { 4 } else { 16 };
    address_of(id.get(SOURCE..SOURCE + length)?)
}

/// struct inet_diag_req_v2
fn request(family: u8, id: &[u8; ID_BYTES]) -> Vec<u8> {
    let mut body = vec![family, TCP, 0, 0];
    body.extend(STATES.to_ne_bytes());
    body.extend(id);
    body
}

/// Whether a connection to `port` of `address` would be taken, if the address were here.
pub(super) fn somebody_listens(address: IpAddr, port: u16) -> io::Result<bool> {
    let mut netlink = Netlink::open(Some(SOCK_DIAG))?;
    let mut listens = false;
    // One for IPv6 may take connections of IPv4 as well; PostgreSQL's do not.
    let family = family_of(address);
    let mut request = request(family, &[0; ID_BYTES]);
    request[4..8].copy_from_slice(&LISTEN.to_ne_bytes());
    netlink.ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request, |_, body| {
        let id = body.get(4..).and_then(|rest| rest.first_chunk::<ID_BYTES>());
        listens |= id.is_some_and(|id| {
            let everywhere = source(id, family).is_some_and(|source| source.is_unspecified());
            id[..2] == port.to_be_bytes() && (everywhere || source(id, family) == Some(address))
        });
    })?;
    Ok(listens)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_listener_on_one_address_does_not_listen_on_others() {
        let narrow = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = narrow.local_addr().unwrap().port();
        assert!(somebody_listens("127.0.0.1".parse().unwrap(), port).unwrap());
        assert!(!somebody_listens("192.0.2.1".parse().unwrap(), port).unwrap());
        let wide = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = wide.local_addr().unwrap().port();
        assert!(somebody_listens("192.0.2.1".parse().unwrap(), port).unwrap());
        drop(wide);
        assert!(!somebody_listens("192.0.2.1".parse().unwrap(), port).unwrap());
    }
}
