//! Names of objects: what is where in a repository.
//!
//! Left out: what is in the objects. Hazard: two things under one name would be one thing, and a name that means
//! something to a file system (`..`, a leading dot) would lead out of the repository; so names are parsed, and every name
//! of the repository is made here.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use pgherd_core::types::{Incarnation, Malformed, SystemId, Term, Timeline};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::hash::Hash;

/// The name of an object: parts of letters, digits, `.`, `-` and `_` with `/` between them; no part begins with a dot.
/// Ordered by bytes, as object stores list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Name {
    /// Object stores take 1,024 bytes; a file's name may have 255, and a temporary one is made of a whole object's name.
    pub const MAX_BYTES: usize = 200;

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands behind the last `/`.
    pub fn last(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    /// For names that are put together from parts that are known to be good.
    fn of(text: String) -> Name {
        debug_assert!(text.parse::<Name>().is_ok(), "{text} is made of good parts");
        Name(text.into())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Name, Malformed> {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        let part = |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(letter);
        if text.len() <= Name::MAX_BYTES && text.split('/').all(part) {
            return Ok(Name(text.into()));
        }
        Err(Malformed { what: "the name of an object", text: text.to_owned() })
    }
}

/// A base backup's name, after the time in UTC when it was begun: `20261120T205454`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId([u8; 15]);

impl BackupId {
    pub fn at(time: Timestamp) -> BackupId {
        let text = time.to_zoned(TimeZone::UTC).strftime("%Y%m%dT%H%M%S").to_string();
        // Years of more than four digits do not come out of a clock; they would not be told apart.
        text.parse().unwrap_or(BackupId(*b"99991231T235959"))
    }

    pub(crate) fn bytes(&self) -> &[u8; 15] {
        &self.0
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{}", char::from(*byte)))
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BackupId {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<BackupId, Malformed> {
        let fits = |bytes: &[u8; 15]| {
            bytes.iter().enumerate().all(|(at, byte)| match at {
                8 => *byte == b'T',
                _ => byte.is_ascii_digit(),
            })
        };
        <[u8; 15]>::try_from(text.as_bytes())
            .ok()
            .filter(fits)
            .map(BackupId)
            .ok_or_else(|| Malformed { what: "a backup such as 20261120T205454", text: text.to_owned() })
    }
}

impl Serialize for BackupId {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BackupId {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<BackupId, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The first object of a repository: without it nothing else means anything.
pub fn format() -> Name {
    Name::of("format".to_owned())
}

/// The wrapped data keys of a repository, by generation.
pub fn keys(repository: &str, generation: u32) -> Name {
    Name::of(format!("keys/{repository}/{generation:08}"))
}

pub fn all_keys(repository: &str) -> String {
    format!("keys/{repository}/")
}

/// For trying out whether a store keeps its promises.
pub fn probe(random: u64) -> Name {
    Name::of(format!("probe/{random:016x}"))
}

/// What the names of all clusters' objects begin with.
pub(crate) const CLUSTERS: &str = "cluster/";

/// The cluster that an object belongs to.
pub(crate) fn cluster_of(object: &Name) -> Option<Place> {
    let system = object.as_str().strip_prefix(CLUSTERS)?.split('/').next()?;
    system.parse().ok().filter(|parsed: &SystemId| parsed.to_string() == system).map(Place)
}

/// Where everything of one cluster is. Clusters of one repository share nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(pub SystemId);

impl Place {
    fn object(&self, rest: fmt::Arguments<'_>) -> Name {
        Name::of(format!("cluster/{}/{rest}", self.0))
    }

    /// Behind every object of the cluster, and before those of the next one. Nothing has this name.
    pub(crate) fn last(&self) -> Name {
        self.object(format_args!("zzz"))
    }

    /// For listings: everything of a kind, such as `packs`.
    pub fn all(&self, kind: Kind) -> String {
        format!("cluster/{}/{}/", self.0, kind.folder())
    }

    pub fn intent(&self, backup: BackupId) -> Name {
        self.object(format_args!("intent/{backup}"))
    }

    /// A sign of life of whoever takes a backup.
    pub fn heartbeat(&self, backup: BackupId, number: u32) -> Name {
        self.object(format_args!("heartbeat/{backup}/{number:08}"))
    }

    pub fn pack(&self, backup: BackupId, number: u32) -> Name {
        self.object(format_args!("packs/{backup}/{number:08}"))
    }

    pub fn map(&self, backup: BackupId, number: u32) -> Name {
        self.object(format_args!("maps/{backup}/{number:08}"))
    }

    /// How a backup ended: its manifest, or the word that it was given up.
    pub fn backup(&self, backup: BackupId) -> Name {
        self.object(format_args!("backup/{backup}"))
    }

    pub fn tombstone(&self, backup: BackupId, number: u32) -> Name {
        self.object(format_args!("tombstone/{backup}/{number:08}"))
    }

    /// What came of a tombstone: it was taken back, or carried out.
    pub fn verdict(&self, backup: BackupId, number: u32) -> Name {
        self.object(format_args!("gc/{backup}/{number:08}"))
    }

    /// That it is kept by hand, or released.
    pub fn keep(&self, backup: BackupId, number: u32) -> Name {
        self.object(format_args!("keep/{backup}/{number:08}"))
    }

    /// `file` is PostgreSQL's name of the segment.
    pub fn wal(&self, timeline: Timeline, file: &str) -> Name {
        self.object(format_args!("wal/{:08X}/{file}", timeline.0))
    }

    /// Of one timeline, for listings.
    pub fn wal_of(&self, timeline: Timeline) -> String {
        format!("cluster/{}/wal/{:08X}/", self.0, timeline.0)
    }

    /// A segment that is not complete; two of one name may differ, so the content is part of ours.
    pub fn partial(&self, timeline: Timeline, file: &str, content: &Hash) -> Name {
        let content = crate::hash::to_hex(&content.0[..16]);
        self.object(format_args!("partial/{:08X}/{file}-{content}", timeline.0))
    }

    /// A part of a segment that is being written; both ends are offsets in it, and its content follows from its name.
    pub fn piece(&self, timeline: Timeline, file: &str, from: u32, to: u32) -> Name {
        self.object(format_args!("piece/{:08X}/{file}-{from:08X}-{to:08X}", timeline.0))
    }

    pub fn history(&self, timeline: Timeline) -> Name {
        self.object(format_args!("history/{:08X}", timeline.0))
    }

    /// Nothing is told in the name of this incarnation of the repository any more by whoever streams for an older term. With all digits, in
    /// which the order of names is that of terms.
    pub fn seal(&self, incarnation: Incarnation, term: Term) -> Name {
        self.object(format_args!("voter/{:020}/seal/{:020}", incarnation.0, term.0))
    }

    /// Of one incarnation, for listings.
    pub fn seals_of(&self, incarnation: Incarnation) -> String {
        format!("cluster/{}/voter/{:020}/seal/", self.0, incarnation.0)
    }

    /// Under which term WAL of a timeline was put for this incarnation.
    pub fn adopted(&self, incarnation: Incarnation, timeline: Timeline) -> Name {
        self.object(format_args!("voter/{:020}/adopted/{:08X}", incarnation.0, timeline.0))
    }

    /// Of one incarnation, for listings.
    pub fn adopted_of(&self, incarnation: Incarnation) -> String {
        format!("cluster/{}/voter/{:020}/adopted/", self.0, incarnation.0)
    }

    /// What came under the name of something else that was there before.
    pub fn quarantine(&self, file: &str, content: &Hash) -> Name {
        let content = crate::hash::to_hex(&content.0[..16]);
        self.object(format_args!("quarantine/{file}-{content}"))
    }
}

/// What a cluster's part of a repository consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Intents,
    Heartbeats,
    Packs,
    Maps,
    Backups,
    Tombstones,
    Verdicts,
    Keeps,
    Wal,
    Partials,
    Pieces,
    Histories,
    Quarantine,
    Voters,
}

impl Kind {
    fn folder(self) -> &'static str {
        match self {
            Kind::Intents => "intent",
            Kind::Heartbeats => "heartbeat",
            Kind::Packs => "packs",
            Kind::Maps => "maps",
            Kind::Backups => "backup",
            Kind::Tombstones => "tombstone",
            Kind::Verdicts => "gc",
            Kind::Keeps => "keep",
            Kind::Wal => "wal",
            Kind::Partials => "partial",
            Kind::Pieces => "piece",
            Kind::Histories => "history",
            Kind::Quarantine => "quarantine",
            Kind::Voters => "voter",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_the_repository() {
        for right in ["format", "a/b", "cluster/7/wal/00000001/000000010000000000000001", "a..b"] {
            assert!(right.parse::<Name>().is_ok(), "{right}");
        }
        let long = "x".repeat(Name::MAX_BYTES + 1);
        for wrong in ["", "/", "a/", "/a", "a//b", "..", "a/../b", ".incoming/a", "a b", "ä", "a\0", &long] {
            assert!(wrong.parse::<Name>().is_err(), "{wrong:?} must not be a name");
        }
    }

    #[test]
    fn a_backup_is_named_after_its_time() {
        let id = BackupId::at("2026-11-20T20:54:54.9Z".parse().unwrap());
        assert_eq!(id.to_string(), "20261120T205454");
        assert_eq!(id.to_string().parse::<BackupId>().unwrap(), id);
        for wrong in ["", "20261120T20545", "20261120 205454", "20261120T2054545", "2026112OT205454"] {
            assert!(wrong.parse::<BackupId>().is_err(), "{wrong:?} must not be a backup");
        }
    }
}
