//! The words of the domain as types: positions, timelines, terms, names, points in time.
//!
//! Everything here is a value. Nothing reads a clock: an [`Instant`] is made by the caller from
//! `CLOCK_BOOTTIME` (which, unlike `CLOCK_MONOTONIC`, goes on while a machine is suspended), and the
//! simulator makes its own.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A position in the write-ahead log, printed as PostgreSQL prints it: `16/B374D848`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    pub const ZERO: Lsn = Lsn(0);

    /// Bytes from `earlier` to `self`; 0 if `earlier` lies ahead.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 as u32)
    }
}

/// A text that should have been one of this module's types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    pub what: &'static str,
    pub text: String,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" is not {}", self.text, self.what)
    }
}

impl std::error::Error for Malformed {}

impl FromStr for Lsn {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Lsn, Malformed> {
        let half = |part: &str| {
            let fits = (1..=8).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            fits.then(|| u32::from_str_radix(part, 16).ok()).flatten()
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Lsn(u64::from(half(high)?) << 32 | u64::from(half(low)?))))
            .ok_or_else(|| Malformed { what: "an LSN such as 16/B374D848", text: text.to_owned() })
    }
}

/// JSON numbers lose precision past 2^53, so positions and system identifiers travel as text.
macro_rules! serde_as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

serde_as_text!(Lsn);

/// PostgreSQL's number of a line of history; 1 after initdb, a greater one after each promotion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timeline(pub u32);

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The number of a primary's reign in its cluster; 0 before the first. Not the timeline: an incumbent
/// that wins an election goes on on its timeline under a new term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub u64);

impl Term {
    pub fn next(self) -> Term {
        Term(self.0 + 1)
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// PostgreSQL's `system_identifier`, written by initdb; one per cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for SystemId {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<SystemId, Malformed> {
        let wrong = |_| Malformed { what: "a system identifier", text: text.to_owned() };
        text.parse().map(SystemId).map_err(wrong)
    }
}

serde_as_text!(SystemId);

/// The name of a node, witness, keeper or cluster: `[a-z][a-z0-9_]{0,47}`. It also names the node's
/// replication slot and certificate, which is why the alphabet is that of a slot. Cheap to clone: connections carry it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(Arc<str>);

/// What the repository is called where it is a member of the durability rule. No node can be: pgherd's own names begin so.
const REPOSITORY: &str = "pgherd_repository";

impl NodeName {
    pub const MAX_BYTES: usize = 48;

    pub fn repository() -> NodeName {
        NodeName(REPOSITORY.into())
    }

    pub fn is_repository(&self) -> bool {
        *self.0 == *REPOSITORY
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for NodeName {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<NodeName, Malformed> {
        let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
        let rest =
            text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        if first && rest && text.len() <= NodeName::MAX_BYTES {
            return Ok(NodeName(text.into()));
        }
        Err(Malformed {
            what: "a name: a lower-case letter, then up to 47 lower-case letters, digits or underscores",
            text: text.to_owned(),
        })
    }
}

serde_as_text!(NodeName);

/// One life of a node's data directory. A clone gets a fresh number from the store and no number is used
/// twice in a cluster, so that a copy made from scratch is never taken for the voter it replaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A node in one incarnation: what a durability rule counts. Printed as `b_7`, which is also its slot's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    pub node: NodeName,
    pub incarnation: Incarnation,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.node, self.incarnation)
    }
}

impl FromStr for Member {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Member, Malformed> {
        text.rsplit_once('_')
            .and_then(|(node, number)| {
                Some(Member { node: node.parse().ok()?, incarnation: Incarnation(number.parse().ok()?) })
            })
            .ok_or_else(|| Malformed { what: "a member such as b_7", text: text.to_owned() })
    }
}

serde_as_text!(Member);

/// A member that streams, and the timeline that it has adopted for it. Printed as `b_7.3`, its `application_name`.
///
/// The list of synchronous standbys names streams. PostgreSQL takes a standby along onto whatever timeline its
/// upstream is promoted to; under the name for the former one it is not counted there, until its node has noted the
/// timeline. If it were, its vote would not count what it has acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stream {
    pub member: Member,
    pub timeline: Timeline,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.member, self.timeline)
    }
}

impl FromStr for Stream {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Stream, Malformed> {
        text.split_once('.')
            .and_then(|(member, number)| {
                Some(Stream { member: member.parse().ok()?, timeline: Timeline(number.parse().ok()?) })
            })
            .ok_or_else(|| Malformed {
                what: "a member and its timeline such as b_7.3",
                text: text.to_owned(),
            })
    }
}

/// A moment on one machine's `CLOCK_BOOTTIME`. Moments of different machines are never compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

impl Instant {
    pub fn from_boot(since_boot: Duration) -> Instant {
        Instant(since_boot)
    }

    pub fn since_boot(self) -> Duration {
        self.0
    }

    /// Time from `earlier` to `self`; zero if `earlier` lies ahead.
    pub fn since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, span: Duration) -> Instant {
        Instant(self.0.saturating_add(span))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_reads_and_prints_like_postgresql() {
        for text in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().unwrap().to_string(), text);
        }
        for wrong in ["", "/", "1", "1/", "/1", "1/123456789", "1/G", "+1/0", "1/-2"] {
            assert!(wrong.parse::<Lsn>().is_err(), "{wrong} must not be an LSN");
        }
    }

    #[test]
    fn names_are_those_of_slots() {
        for right in ["a", "node_1", &"x".repeat(48)] {
            assert!(right.parse::<NodeName>().is_ok());
        }
        for wrong in ["", "A", "1a", "_a", "a-b", "ä", &"x".repeat(49), "a b", "a\0"] {
            assert!(wrong.parse::<NodeName>().is_err(), "{wrong:?} must not be a name");
        }
    }

    #[test]
    fn a_member_survives_its_own_text_even_with_underscores_in_the_name() {
        let member: Member = "db_1_12".parse().unwrap();
        assert_eq!((member.node.as_str(), member.incarnation), ("db_1", Incarnation(12)));
        assert_eq!(member.to_string(), "db_1_12");
        let stream: Stream = "db_1_12.3".parse().unwrap();
        assert_eq!((&stream.member, stream.timeline), (&member, Timeline(3)));
        assert_eq!(stream.to_string(), "db_1_12.3");
        assert!("db_1_12".parse::<Stream>().is_err() && "db_1_12.3".parse::<Member>().is_err());
    }
}
