//! `[cluster.vip]`: an address that is on the interface of whoever the gate is open on.
//!
//! What is wrong with one in itself is said here; what is wrong with it among nodes and times, in
//! [`check`](super::check).

use core::net::IpAddr;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Linux gives names of interfaces so many bytes.
const INTERFACE_MAX_BYTES: usize = 15;
const LOOPBACK: &str = "lo";

/// An address is asked to be gone this long before the end of the lease. The kernel counts its lifetime in whole
/// seconds and has been seen to remove it up to 340 ms late.
pub const GONE_BEFORE_LEASE_END: Duration = Duration::from_millis(400);
/// The shortest lifetime that the kernel can give an address.
pub const SHORTEST_LIFE: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VipSpec {
    pub address: Prefixed,
    pub interface: String,
}

impl fmt::Display for VipSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.address, self.interface)
    }
}

/// An address of one host with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefixed {
    pub address: IpAddr,
    pub prefix: u8,
}

impl Prefixed {
    fn bits(self) -> u8 {
        if self.address.is_ipv4() { 32 } else { 128 }
    }
}

impl fmt::Display for Prefixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotPrefixed {
    NoPrefix { address: IpAddr },
    PrefixTooLong { longest: u8 },
    Malformed { text: String },
}

impl fmt::Display for NotPrefixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotPrefixed::NoPrefix { address } => write!(f, "{address} has no prefix length"),
            NotPrefixed::PrefixTooLong { longest } => write!(f, "a prefix length is 1 to {longest} here"),
            NotPrefixed::Malformed { text } => write!(f, "\"{text}\" is no address with a prefix length"),
        }
    }
}

impl std::error::Error for NotPrefixed {}

impl FromStr for Prefixed {
    type Err = NotPrefixed;

    fn from_str(text: &str) -> Result<Prefixed, NotPrefixed> {
        let malformed = || NotPrefixed::Malformed { text: text.to_owned() };
        let Some((address, prefix)) = text.split_once('/') else {
            return Err(match text.parse() {
                Ok(address) => NotPrefixed::NoPrefix { address },
                Err(_) => malformed(),
            });
        };
        let address: IpAddr = address.parse().map_err(|_| malformed())?;
        if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(malformed());
        }
        let longest = Prefixed { address, prefix: 0 }.bits();
        match prefix.parse() {
            Ok(prefix) if (1..=longest).contains(&prefix) => Ok(Prefixed { address, prefix }),
            _ => Err(NotPrefixed::PrefixTooLong { longest }),
        }
    }
}

impl Serialize for Prefixed {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Prefixed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Prefixed, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What is wrong with an address, whatever else the file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsuitable {
    Network,
    Broadcast,
    NoHostsOwn,
    LinkLocal,
}

impl fmt::Display for Unsuitable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unsuitable::Network => "is the address of the network itself",
            Unsuitable::Broadcast => "is the network's broadcast address",
            Unsuitable::NoHostsOwn => "is no address that a host on a network has",
            Unsuitable::LinkLocal => {
                "is local to the link, and clients would have to name their interface with it"
            }
        })
    }
}

/// `None`: a host can have it.
pub(super) fn unsuitable(prefixed: Prefixed) -> Option<Unsuitable> {
    let Prefixed { address, prefix } = prefixed;
    let first_octet_zero = matches!(address, IpAddr::V4(v4) if v4.octets()[0] == 0 || v4.octets()[0] >= 240);
    if address.is_loopback() || address.is_multicast() || address.is_unspecified() || first_octet_zero {
        return Some(Unsuitable::NoHostsOwn);
    }
    match address {
        IpAddr::V4(v4) => {
            // Point-to-point networks have neither of the two.
            let host_bits = 32 - u32::from(prefix);
            let host = u32::from(v4) & (1_u32.checked_shl(host_bits).unwrap_or(0)).wrapping_sub(1);
            match host_bits {
                0 | 1 => None,
                _ if host == 0 => Some(Unsuitable::Network),
                _ if host == (1_u32 << host_bits) - 1 => Some(Unsuitable::Broadcast),
                _ => None,
            }
        }
        IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80 => Some(Unsuitable::LinkLocal),
        // The subnet-router anycast address.
        IpAddr::V6(v6) if prefix < 127 && u128::from(v6) & ((1_u128 << (128 - prefix)) - 1) == 0 => {
            Some(Unsuitable::Network)
        }
        IpAddr::V6(_) => None,
    }
}

/// `false` for what Linux would not have as a name, and for the loopback, from which nothing is announced.
pub(super) fn is_interface(name: &str) -> bool {
    let visible = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    (1..=INTERFACE_MAX_BYTES).contains(&name.len())
        && name.bytes().all(visible)
        && ![".", "..", LOOPBACK].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_is_written() {
        for text in ["192.168.122.10/24", "10.0.0.1/32", "2001:db8::10/64"] {
            let read: Prefixed = text.parse().unwrap();
            assert_eq!(read.to_string(), text);
            let stored = serde_json::to_string(&read).unwrap();
            assert_eq!(stored, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<Prefixed>(&stored).unwrap(), read);
        }
        let wrong = |text: &str| text.parse::<Prefixed>().unwrap_err().to_string();
        assert_eq!(wrong("10.0.0.1"), "10.0.0.1 has no prefix length");
        assert_eq!(wrong("10.0.0.1/33"), "a prefix length is 1 to 32 here");
        assert_eq!(wrong("10.0.0.1/0"), "a prefix length is 1 to 32 here");
        assert_eq!(wrong("::1/129"), "a prefix length is 1 to 128 here");
        for malformed in ["", "a/24", "10.0.0.1/", "10.0.0.1/+8", "10.0.0/8", "10.0.0.1/255.0.0.0"] {
            assert!(wrong(malformed).ends_with("is no address with a prefix length"), "{malformed}");
        }
    }

    #[test]
    fn what_no_host_can_have() {
        let told = |text: &str| unsuitable(text.parse().unwrap());
        for (text, why) in [
            ("192.168.122.0/24", Unsuitable::Network),
            ("192.168.122.255/24", Unsuitable::Broadcast),
            ("127.0.0.1/8", Unsuitable::NoHostsOwn),
            ("0.0.0.1/8", Unsuitable::NoHostsOwn),
            ("239.1.1.1/24", Unsuitable::NoHostsOwn),
            ("255.255.255.255/32", Unsuitable::NoHostsOwn),
            ("::1/128", Unsuitable::NoHostsOwn),
            ("ff02::1/64", Unsuitable::NoHostsOwn),
            ("fe80::1/64", Unsuitable::LinkLocal),
            ("2001:db8::/64", Unsuitable::Network),
        ] {
            assert_eq!(told(text), Some(why), "{text}");
        }
        for right in ["192.168.122.10/24", "10.0.0.0/32", "10.0.0.0/31", "10.1.0.0/1", "2001:db8::/128"] {
            assert_eq!(told(right), None, "{right}");
        }
    }

    #[test]
    fn names_of_interfaces() {
        for right in ["eth0", "enp1s0f0np0", "br-lan", "bond0.100", "a"] {
            assert!(is_interface(right), "{right}");
        }
        for wrong in ["", "lo", "eth0:1", "a/b", "..", "with space", "sixteen_bytes_xx", "ä"] {
            assert!(!is_interface(wrong), "{wrong}");
        }
    }
}
