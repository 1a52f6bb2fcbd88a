//! What a repository has of one cluster: its backups, how each of them ended, and its WAL.
//!
//! Read anew for each question; whoever answers many keeps it in memory. Leaves out: what is done about it. Hazard: a backup that is shown
//! and cannot be restored, or the other way round; what cannot be read is an error, and never a backup less.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use jiff::Timestamp;
use pgherd_api::backup::{
    Backup, BackupMode, BackupStatus, Backups, FoundBy, FoundChanges, Keep, RecoveryWindow, WalGap,
};
use pgherd_backup::document::ReadError;
use pgherd_backup::format::Repository;
use pgherd_backup::keep::{self, KeepError, Kept};
use pgherd_backup::manifest::{self, Manifest, Outcome};
use pgherd_backup::name::{BackupId, Kind, Place};
use pgherd_backup::recovery::{Refusal, walk};
use pgherd_backup::store::StoreError;
use pgherd_backup::tombstone::{self, State, TombstoneError};
use pgherd_backup::wal::records::Landmark;
use pgherd_backup::wal::{Archive, BackupRange, Inventory, SegmentError, Segments, Window, window};
use pgherd_core::retention;
use pgherd_core::types::{Lsn, SystemId};

use crate::repository::{self, RepositoryError};

/// Of `server_version_num`, what a major version has.
const MAJOR: u32 = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("the repository in {place} has nothing of any cluster")]
    Empty { place: String },
    #[error("the repository in {place} has nothing of cluster {system}")]
    NoCluster { place: String, system: String, there: Vec<SystemId> },
    #[error("the repository in {place} has several clusters: {}", listed(.there))]
    Several { place: String, there: Vec<SystemId> },
    #[error(
        "\"{text}\" is no backup: it is named by the time in UTC when it was begun, such as 20261120T205454"
    )]
    Malformed { text: String },
    #[error("there is no backup {id}")]
    NoBackup { id: BackupId },
    #[error("there is no backup that was completed")]
    NoneDone,
    #[error("backup {id} is deleted")]
    Deleted { id: BackupId },
    #[error("backup {id} was not completed")]
    NotDone { id: BackupId },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tombstone(#[from] TombstoneError),
    #[error(transparent)]
    Keep(#[from] KeepError),
    #[error(transparent)]
    Window(#[from] Refusal),
    #[error(transparent)]
    Segments(#[from] SegmentError),
}

fn listed(systems: &[SystemId]) -> String {
    systems.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl CatalogError {
    pub fn hint(&self) -> Option<String> {
        match self {
            CatalogError::Repository(error) => error.hint(),
            CatalogError::Empty { .. } | CatalogError::NoneDone => {
                Some("pgherd backup create takes one".to_owned())
            }
            CatalogError::NoCluster { there, .. } if !there.is_empty() => {
                Some(format!("it has: {}", listed(there)))
            }
            CatalogError::Several { .. } => Some(
                "name one with --cluster-system; pg_controldata calls it \"Database system identifier\""
                    .to_owned(),
            ),
            CatalogError::NoBackup { .. } | CatalogError::Malformed { .. } | CatalogError::NotDone { .. } => {
                Some("pgherd backup list shows those that there are".to_owned())
            }
            CatalogError::Deleted { id } => {
                Some(format!("pgherd backup undelete {id} takes that back, until its grace has passed"))
            }
            _ => None,
        }
    }
}

/// Which backup somebody means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    First,
    Last,
    Named(BackupId),
}

impl std::str::FromStr for Which {
    type Err = CatalogError;

    /// `first`, `oldest`, `last`, `latest`, or a name.
    fn from_str(text: &str) -> Result<Which, CatalogError> {
        match text {
            "first" | "oldest" => Ok(Which::First),
            "last" | "latest" => Ok(Which::Last),
            name => match name.parse() {
                Ok(id) => Ok(Which::Named(id)),
                Err(_) => Err(CatalogError::Malformed { text: text.to_owned() }),
            },
        }
    }
}

/// What there is of a backup.
#[derive(Clone, Debug)]
pub struct Entry {
    /// None for one that has not ended.
    pub outcome: Option<Outcome>,
    pub state: State,
    /// What was said last of whether it is kept.
    pub kept: Option<Kept>,
}

impl Entry {
    /// One that can be restored, if its WAL is there.
    pub fn manifest(&self) -> Option<&Manifest> {
        match (&self.outcome, &self.state) {
            (Some(Outcome::Committed(manifest)), State::Kept { .. }) => Some(manifest),
            _ => None,
        }
    }
}

/// The backups of one cluster in one repository.
#[derive(Debug)]
pub struct Catalog {
    pub repository: Repository,
    pub place: Place,
    pub entries: BTreeMap<BackupId, Entry>,
}

impl Catalog {
    /// Of the cluster `system`, or of the only one, in the repository that a file names.
    pub async fn open(file: &Path, system: Option<&str>) -> Result<Catalog, CatalogError> {
        let repository = repository::open(file).await?;
        let place = Place(cluster(&repository, system).await?);
        Catalog::read(repository, place).await
    }

    pub async fn read(repository: Repository, place: Place) -> Result<Catalog, CatalogError> {
        let mut outcomes = manifest::outcomes(&repository, place).await?;
        let mut entries = BTreeMap::new();
        for listed in repository.store().list_all(&place.all(Kind::Intents)).await? {
            let Ok(id) = listed.name.last().parse::<BackupId>() else { continue };
            // One that was collected meanwhile is listed without an end; it has a tombstone then.
            let state = tombstone::state(&repository, place, id).await?;
            entries.insert(id, Entry { outcome: None, state, kept: None });
        }
        while let Some((id, outcome)) = outcomes.pop_first() {
            let state = tombstone::state(&repository, place, id).await?;
            let kept = keep::of(&repository, place, id).await?;
            entries.insert(id, Entry { outcome: Some(outcome), state, kept });
        }
        // Of one that was given up the word stays for ever; who has deleted it has seen it, and who goes on from it stands for it.
        let is_over = |entry: &Entry| match (&entry.outcome, &entry.state) {
            (_, State::Swept) => true,
            (Some(Outcome::Abandoned(word)), state) => word.continued_by.is_some() || state.is_deleted(),
            _ => false,
        };
        entries.retain(|_, entry| !is_over(entry));
        Ok(Catalog { repository, place, entries })
    }

    /// Those that can be restored, the oldest first.
    pub fn manifests(&self) -> impl DoubleEndedIterator<Item = &Manifest> {
        self.entries.values().filter_map(Entry::manifest)
    }

    pub fn ranges(&self) -> Vec<BackupRange> {
        self.manifests().map(BackupRange::from).collect()
    }

    /// The WAL, with segments as the newest backup has them. None without a backup.
    pub fn archive(&self) -> Result<Option<Archive>, CatalogError> {
        let Some(newest) = self.manifests().next_back() else { return Ok(None) };
        let segments = Segments::new(newest.wal_segment_bytes)?;
        Ok(Some(Archive::new(&self.repository, self.place.0, segments)))
    }

    /// The backup that is meant, whatever became of it.
    pub fn entry(&self, which: Which) -> Result<(BackupId, &Entry), CatalogError> {
        let id = match which {
            Which::Named(id) => Some(id),
            Which::First => self.manifests().next().map(|manifest| manifest.id),
            Which::Last => self.manifests().next_back().map(|manifest| manifest.id),
        };
        let id = id.ok_or(CatalogError::NoneDone)?;
        Ok((id, self.entries.get(&id).ok_or(CatalogError::NoBackup { id })?))
    }

    /// The backup that is meant, if it can be restored.
    pub fn manifest(&self, which: Which) -> Result<&Manifest, CatalogError> {
        let (id, entry) = self.entry(which)?;
        entry.manifest().ok_or(match entry.state {
            State::Kept { .. } => CatalogError::NotDone { id },
            State::Buried(_) | State::Swept => CatalogError::Deleted { id },
        })
    }
}

/// Segments that are looked through, from the end, for the last transaction.
const LOOKED_BACK: u64 = 4;

/// All backups of a cluster, with what can be restored from them.
pub async fn list(catalog: &Catalog) -> Result<Backups, CatalogError> {
    let mut backups = Backups {
        repository: catalog.repository.store().place().to_owned(),
        system_identifier: catalog.place.0.to_string(),
        recovery_window: None,
        gaps: Vec::new(),
        backups: catalog.entries.iter().map(|(id, entry)| report(*id, entry)).collect(),
    };
    let Some(archive) = catalog.archive()? else { return Ok(backups) };
    let inventory = archive.inventory().await?;
    let window = window(&catalog.ranges(), &inventory);
    backups.gaps = window
        .gaps
        .iter()
        .map(|gap| WalGap { timeline: gap.timeline.0, from: gap.from.to_string(), to: gap.to.to_string() })
        .collect();
    backups.recovery_window = told(&archive, &inventory, &window).await?;
    for backup in &mut backups.backups {
        let reach = window.reaches.iter().find(|reach| reach.backup.id.to_string() == backup.id);
        backup.can_be_restored = reach.map(|reach| reach.end.is_some());
    }
    Ok(backups)
}

/// From when to when any moment can be restored.
async fn told(
    archive: &Archive,
    inventory: &Inventory,
    window: &Window,
) -> Result<Option<RecoveryWindow>, CatalogError> {
    let (Some(from), Some((timeline, to))) = (window.from, window.to) else { return Ok(None) };
    let segments = archive.segments();
    let mut last = None;
    if let Some(history) = inventory.history(timeline) {
        let end = segments.number(Lsn(to.0.saturating_sub(1)));
        let first = segments.number(from.start);
        // In an idle hour segments have no transaction.
        for number in (first.max(end.saturating_sub(LOOKED_BACK - 1))..=end).rev() {
            let begin = Lsn(number * u64::from(segments.bytes()));
            walk(archive, inventory, history, begin, |record, landmark| {
                if record.start >= to {
                    return ControlFlow::Break(());
                }
                if let Some(Landmark::Commit { at, .. }) = landmark {
                    last = Some(at);
                }
                ControlFlow::Continue(())
            })
            .await?;
            if last.is_some() {
                break;
            }
        }
    }
    Ok(Some(RecoveryWindow {
        from: time(from.stopped),
        from_backup: from.id.to_string(),
        from_lsn: from.stop.to_string(),
        to: last.map(time),
        to_lsn: to.to_string(),
        to_timeline: timeline.0,
    }))
}

/// One backup, whatever became of it.
pub async fn show(catalog: &Catalog, which: Which) -> Result<Backup, CatalogError> {
    let (id, _) = catalog.entry(which)?;
    let found = list(catalog).await?.backups.into_iter().find(|backup| backup.id == id.to_string());
    found.ok_or(CatalogError::NoBackup { id })
}

/// The cluster that is meant: the named one, or the only one.
async fn cluster(repository: &Repository, named: Option<&str>) -> Result<SystemId, CatalogError> {
    let there = repository.clusters().await?;
    let place = repository.store().place().to_owned();
    match (named, there.as_slice()) {
        (Some(named), _) => {
            let found = there.iter().find(|system| system.to_string() == named).copied();
            found.ok_or_else(|| CatalogError::NoCluster { place, system: named.to_owned(), there })
        }
        (None, [only]) => Ok(*only),
        (None, []) => Err(CatalogError::Empty { place }),
        (None, _) => Err(CatalogError::Several { place, there }),
    }
}

/// A backup as it is told.
pub fn report(id: BackupId, entry: &Entry) -> Backup {
    let (status, why) = match (&entry.state, &entry.outcome) {
        (State::Buried(tombstone), _) => (BackupStatus::Deleted, Some(tombstone.why.clone())),
        (State::Swept, _) => (BackupStatus::Deleted, None),
        (State::Kept { .. }, Some(Outcome::Committed(_))) => (BackupStatus::Done, None),
        (State::Kept { .. }, Some(Outcome::Abandoned(abandoned))) => {
            (BackupStatus::Failed, Some(abandoned.why.clone()))
        }
        (State::Kept { .. }, None) => (BackupStatus::Started, None),
    };
    let backup = Backup {
        id: id.to_string(),
        status,
        why,
        keep: entry.kept.as_ref().and_then(|kept| keeping(kept, Timestamp::now())),
        can_be_restored: None,
        node: None,
        term: None,
        mode: None,
        parent: None,
        continues: None,
        timeline: None,
        begin_time: None,
        end_time: None,
        begin_lsn: None,
        end_lsn: None,
        begin_wal: None,
        end_wal: None,
        files: None,
        size_bytes: None,
        stored_bytes: None,
        referenced_bytes: None,
        postgresql_version: None,
        data_checksums: None,
        changes: None,
        held_back_seconds: None,
    };
    match &entry.outcome {
        Some(Outcome::Committed(manifest)) => with_manifest(backup, manifest),
        _ => backup,
    }
}

/// How it is kept at this moment, if it is.
pub(super) fn keeping(kept: &Kept, now: Timestamp) -> Option<Keep> {
    let target = match kept.holds(now)? {
        retention::Keep::Full => "full",
        retention::Keep::Standalone => "standalone",
    };
    Some(Keep { target: target.to_owned(), until: kept.until.map(time), since: time(kept.at) })
}

fn with_manifest(backup: Backup, manifest: &Manifest) -> Backup {
    let facts = &manifest.facts;
    let own = manifest.packs.get(&manifest.id).into_iter().flatten().map(|pack| pack.bytes).sum();
    let wal = Segments::new(manifest.wal_segment_bytes).ok().map(|segments| {
        let mut names = segments
            .covering(manifest.timeline, manifest.start, manifest.stop)
            .map(|segment| segments.file_name(segment));
        let first = names.next().unwrap_or_default();
        let last = names.last().unwrap_or_else(|| first.clone());
        (first, last)
    });
    let (begin_wal, end_wal) = wal.unzip();
    Backup {
        node: Some(manifest.node.to_string()),
        // Without a herd there is none.
        term: Some(manifest.term.0).filter(|term| *term > 0),
        mode: Some(if manifest.parent.is_some() { BackupMode::Incremental } else { BackupMode::Full }),
        parent: manifest.parent.map(|parent| parent.to_string()),
        continues: manifest.continues.map(|former| former.to_string()),
        timeline: Some(manifest.timeline.0),
        begin_time: Some(time(facts.started)),
        end_time: Some(time(facts.stopped)),
        begin_lsn: Some(manifest.start.to_string()),
        end_lsn: Some(manifest.stop.to_string()),
        begin_wal,
        end_wal,
        files: Some(manifest.files),
        size_bytes: Some(manifest.bytes),
        stored_bytes: Some(own),
        referenced_bytes: Some(manifest.all_packs().map(|(_, pack)| pack.bytes).sum()),
        postgresql_version: Some(version(facts.postgresql_version)),
        data_checksums: Some(facts.data_checksums),
        changes: manifest.changes.as_ref().map(changes),
        held_back_seconds: manifest.held_back_seconds,
        ..backup
    }
}

fn changes(changes: &manifest::Changes) -> FoundChanges {
    FoundChanges {
        found_by: match changes.found_by {
            manifest::FoundBy::Wal => FoundBy::Wal,
            manifest::FoundBy::Comparison => FoundBy::Comparison,
            manifest::FoundBy::Both => FoundBy::Both,
        },
        why: changes.why.clone(),
        read_bytes: changes.read_bytes,
        wal_bytes: changes.wal_bytes,
        unexplained_pages: changes.unexplained,
    }
}

/// `150014` is 15.14.
pub(super) fn version(number: u32) -> String {
    format!("{}.{}", number / MAJOR, number % MAJOR)
}

pub(super) fn time(at: Timestamp) -> String {
    at.to_string()
}
