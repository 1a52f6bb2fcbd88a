//! The commit point of a base backup: with this object it exists, without it nothing of it counts.
//!
//! It names everything that a restore needs, with the hashes by which it is believed: maps, packs (its own and those of its
//! parent that it refers to), the range of WAL, the history of its timeline, what the server returned at the end of the
//! backup, and the settings that recovery must not go below. It is small, so that a collection needs nothing else.
//!
//! Only [`Backup::commit`](crate::backup::Backup::commit) writes one, and asks for the proofs that packs, maps and WAL are
//! durable.
//!
//! Left out: reading the files. Hazard: a manifest of something that cannot be restored is a backup that fails on the day
//! it is needed. It is checked when it is written and each time it is read, against itself and against its name.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pgherd_core::types::{Lsn, NodeName, SystemId, Term, Timeline};
use serde::{Deserialize, Serialize};

use crate::document::{self, Damage, Document, ReadError};
use crate::format::Repository;
use crate::hash::{Hash, from_hex, to_hex};
use crate::intent::Abandoned;
use crate::map::{MapEntry, MapReader};
use crate::name::{BackupId, Kind, Place};
use crate::pack::{PackEntry, PackId, PackReader};
use crate::wal::{Fork, History, Segments};

/// The oldest PostgreSQL that is backed up.
const MIN_VERSION: u32 = 140_000;

/// Bytes that are text nearly always, and are read by people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Text {
    Utf8(String),
    Bytes { hex: String },
}

impl Text {
    pub fn new(bytes: &[u8]) -> Text {
        match std::str::from_utf8(bytes) {
            Ok(text) => Text::Utf8(text.to_owned()),
            Err(_) => Text::Bytes { hex: to_hex(bytes) },
        }
    }

    pub fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            Text::Utf8(text) => Some(text.as_bytes().to_vec()),
            Text::Bytes { hex } => {
                let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
                let byte = |pair: &[u8; 2]| {
                    std::str::from_utf8(pair).ok().and_then(from_hex::<1>).map(|[byte]| byte)
                };
                rest.is_empty().then(|| pairs.iter().map(byte).collect::<Option<Vec<u8>>>()).flatten()
            }
        }
    }
}

/// Values that a server has to have at least, or it does not come up as a standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub max_connections: u32,
    pub max_worker_processes: u32,
    pub max_wal_senders: u32,
    pub max_prepared_transactions: u32,
    pub max_locks_per_transaction: u32,
}

/// What the server says of itself and of the backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// As in `server_version_num`.
    pub postgresql_version: u32,
    pub page_bytes: u32,
    pub data_checksums: bool,
    pub settings: Settings,
    pub started: Timestamp,
    pub stopped: Timestamp,
    /// As `pg_backup_stop` returned them.
    pub backup_label: Text,
    pub tablespace_map: Text,
}

/// How it was found what has changed since the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundBy {
    /// By WAL: pages that it does not name were not read.
    Wal,
    /// Everything was read, and compared with the parent's change hashes.
    Comparison,
    /// Everything was read and compared, and then held against WAL.
    Both,
}

/// What an incremental backup says of how it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Changes {
    pub found_by: FoundBy,
    /// Why it was not by WAL, where that was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Of the server's files, and of WAL.
    pub read_bytes: u64,
    pub wal_bytes: u64,
    /// Backups that were made by WAL since both ways were held against each other last, with this one; more of them where the next has to do that.
    pub unchecked: u32,
    /// Pages that have changed without a word in WAL: it cannot be relied upon then.
    pub unexplained: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub id: BackupId,
    pub parent: Option<BackupId>,
    /// A backup that was not completed, from which it went on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continues: Option<BackupId>,
    pub system_identifier: SystemId,
    pub node: NodeName,
    pub term: Term,
    pub timeline: Timeline,
    /// Where recovery begins, and the first position at which it may end.
    pub start: Lsn,
    pub stop: Lsn,
    pub wal_segment_bytes: u32,
    /// How its timeline came about.
    pub history: Vec<Fork>,
    pub facts: Facts,
    /// Regular files, and their bytes.
    pub files: u64,
    pub bytes: u64,
    pub maps: Vec<MapEntry>,
    /// Every pack that the maps refer to, by the backup that wrote it.
    pub packs: BTreeMap<BackupId, Vec<PackEntry>>,
    /// None of a full backup, and of one by a version that compared always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<Changes>,
    /// For how long the server's clients were given way to; none where that was no second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back_seconds: Option<u64>,
}

impl Document for Manifest {
    const KIND: &'static str = "manifest";

    fn validate(&self) -> Result<(), String> {
        let facts = &self.facts;
        if self.parent.is_some_and(|parent| parent >= self.id) {
            return Err("its parent is not older than itself".to_owned());
        }
        if self.continues.is_some_and(|former| former >= self.id) {
            return Err("what it went on from is not older than itself".to_owned());
        }
        if facts.postgresql_version < MIN_VERSION {
            return Err(format!("PostgreSQL's version {}", facts.postgresql_version));
        }
        if !facts.page_bytes.is_power_of_two() || !(1024..=32_768).contains(&facts.page_bytes) {
            return Err(format!("pages of {} bytes", facts.page_bytes));
        }
        Segments::new(self.wal_segment_bytes).map_err(|error| error.to_string())?;
        if self.start > self.stop || self.start == Lsn::ZERO {
            return Err(format!("WAL from {} to {}", self.start, self.stop));
        }
        let history = History::new(self.timeline, self.history.clone()).map_err(|error| error.to_string())?;
        if history.timeline_at(self.start) != self.timeline {
            return Err(format!("timeline {} does not begin before {}", self.timeline, self.start));
        }
        let label = facts.backup_label.bytes().ok_or("a label that is not in hexadecimal digits")?;
        facts.tablespace_map.bytes().ok_or("a tablespace map that is not in hexadecimal digits")?;
        validate_label(&label, self.start, self.timeline)?;
        if self.maps.is_empty() {
            return Err("there is no map".to_owned());
        }
        if !self.maps.iter().enumerate().all(|(number, map)| map.number as usize == number) {
            return Err("its maps are not numbered".to_owned());
        }
        for (backup, packs) in &self.packs {
            let builds_upon = self.parent.is_some() || self.continues.is_some();
            if *backup > self.id || (*backup != self.id && !builds_upon) {
                return Err(format!("packs of {backup}, which is not before it"));
            }
            if packs.is_empty() || !packs.is_sorted_by(|one, next| one.number < next.number) {
                return Err(format!("the packs of {backup} are not in order"));
            }
        }
        Ok(())
    }
}

/// The label says where recovery begins; one of another backup would begin elsewhere.
fn validate_label(label: &[u8], start: Lsn, timeline: Timeline) -> Result<(), String> {
    let label = String::from_utf8_lossy(label);
    let value = |key: &str| label.lines().find_map(|line| line.strip_prefix(key));
    let wal = value("START WAL LOCATION: ").and_then(|line| line.split(' ').next()?.parse::<Lsn>().ok());
    if wal != Some(start) {
        return Err(format!("its label does not begin at {start}"));
    }
    match value("START TIMELINE: ").map(str::parse::<u32>) {
        Some(Ok(number)) if number == timeline.0 => Ok(()),
        _ => Err(format!("its label is not of timeline {timeline}")),
    }
}

impl Manifest {
    pub fn history(&self) -> Result<History, Damage> {
        History::new(self.timeline, self.history.clone())
            .map_err(|error| Damage::malformed(error.to_string()))
    }

    /// Every pack with its hash.
    pub fn all_packs(&self) -> impl Iterator<Item = (PackId, &PackEntry)> {
        self.packs.iter().flat_map(|(backup, packs)| {
            packs.iter().map(|pack| (PackId { backup: *backup, number: pack.number }, pack))
        })
    }

    fn place(&self) -> Place {
        Place(self.system_identifier)
    }

    /// Reads what the backup consists of.
    pub fn entries(&self, repository: &Repository) -> MapReader {
        MapReader::new(repository.clone(), self.place(), self.id, self.maps.clone())
    }

    /// Reads contents of its files.
    pub fn contents(&self, repository: &Repository) -> PackReader {
        let packs: BTreeMap<PackId, Hash> = self.all_packs().map(|(id, pack)| (id, pack.hash)).collect();
        PackReader::new(repository.clone(), self.place(), packs)
    }
}

/// How a backup ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Committed(Box<Manifest>),
    Abandoned(Abandoned),
}

/// How `id` ended; none if it has not, or never was. A manifest is compared with its name.
pub async fn outcome(
    repository: &Repository,
    place: Place,
    id: BackupId,
) -> Result<Option<Outcome>, ReadError> {
    let name = place.backup(id);
    let store = repository.store();
    let bytes = match store.read(&name, document::MAX_DOCUMENT_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_absent() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let damaged = |damage| ReadError::damaged(store, &name, damage);
    match document::decode::<Manifest>(&bytes, &name, repository.protection()) {
        Ok(manifest) if manifest.id == id && manifest.place() == place => {
            Ok(Some(Outcome::Committed(Box::new(manifest))))
        }
        Ok(_) => Err(damaged(Damage::OtherObject { wanted: name.to_string() })),
        Err(Damage::OtherKind { .. }) => {
            let abandoned: Abandoned =
                document::decode(&bytes, &name, repository.protection()).map_err(damaged)?;
            match abandoned.id == id {
                true => Ok(Some(Outcome::Abandoned(abandoned))),
                false => Err(damaged(Damage::OtherObject { wanted: name.to_string() })),
            }
        }
        Err(damage) => Err(damaged(damage)),
    }
}

/// All backups of a cluster that are listed, with those that were given up.
pub async fn outcomes(
    repository: &Repository,
    place: Place,
) -> Result<BTreeMap<BackupId, Outcome>, ReadError> {
    let mut all = BTreeMap::new();
    for listed in repository.store().list_all(&place.all(Kind::Backups)).await? {
        let id = listed.name.last().parse::<BackupId>().map_err(|error| {
            ReadError::damaged(repository.store(), &listed.name, Damage::malformed(error.to_string()))
        })?;
        // Listed and gone since: somebody collected it.
        if let Some(outcome) = outcome(repository, place, id).await? {
            all.insert(id, outcome);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests;
