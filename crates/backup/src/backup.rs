//! Taking a base backup, as far as the repository is concerned: intent, packs and maps, commit.
//!
//! ```text
//! Backup::begin        the intent is durable, the parent is pinned and was not about to be deleted; so is what it goes on from
//!   .packs(), .maps()  contents and entries; each writer ends with a proof that all of it is durable
//! Archive::prove       every WAL segment from start to stop is durable
//!   .commit(proofs)    the manifest
//! ```
//!
//! The proofs are values that only the writers make; a commit cannot be called without them, and compares them with each
//! other: maps refer to packs that are proven, are the parent's, or were there when it went on from them, WAL covers exactly this backup.
//!
//! Left out: PostgreSQL. Hazard: a manifest that comes before what it names is a backup that a crash makes unrestorable.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_core::types::{Lsn, NodeName, SystemId, Term, Timeline};

use crate::document::{self, ReadError, WriteError};
use crate::format::Repository;
use crate::former::{Former, FormerError};
use crate::hash::to_hex;
use crate::intent::{Heartbeat, Intent};
use crate::manifest::{self, Changes, Facts, Manifest, Outcome};
use crate::map::{DurableMaps, MapWriter};
use crate::name::{BackupId, Place};
use crate::pack::{DurablePacks, PackEntry, PackId, PackWriter};
use crate::seal::SealError;
use crate::store::{Failure, Put};
use crate::tombstone::{self, TombstoneError};
use crate::wal::ProvenWal;

/// What a backup begins with.
#[derive(Clone, Debug)]
pub struct Beginning {
    pub system_identifier: SystemId,
    pub parent: Option<BackupId>,
    /// A backup that nobody completes any more, from which this one goes on.
    pub continues: Option<BackupId>,
    pub timeline: Timeline,
    /// A position that the server had passed before; WAL from there on is kept.
    pub wal_from: Lsn,
    pub node: NodeName,
    pub term: Term,
    pub now: Timestamp,
}

#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    #[error("backup {id} was begun by somebody else in the same second; begin again")]
    Taken { id: BackupId },
    #[error("backup {parent} cannot be built upon: {why}")]
    Parent { parent: BackupId, why: &'static str },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Tombstone(#[from] TombstoneError),
    #[error("a backup cannot be begun")]
    Seal(#[from] SealError),
    #[error("what an earlier attempt has left cannot be seen")]
    Former(#[from] FormerError),
}

#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    #[error("backup {id} was given up by somebody who took its writer for dead; begin a new one")]
    Abandoned { id: BackupId },
    #[error("the maps of backup {id} refer to pack {number} of {of}, which is not proven to be durable")]
    PackNotProven { id: BackupId, of: BackupId, number: u32 },
    #[error("a proof for backup {id} is one of {of}")]
    OtherProof { id: BackupId, of: BackupId },
    #[error("the proven WAL is that of another cluster or timeline than backup {id}'s")]
    OtherWal { id: BackupId },
    #[error("WAL from {from} on was pinned for backup {id}, which begins earlier, at {start}")]
    NotPinned { id: BackupId, from: Lsn, start: Lsn },
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A base backup that is being taken.
#[derive(Debug)]
pub struct Backup {
    repository: Repository,
    place: Place,
    intent: Intent,
    parent: Option<Manifest>,
    former: Option<Arc<Former>>,
    packs: Arc<AtomicU32>,
    beats: u32,
    changes: Option<Changes>,
    held_back: Duration,
}

impl Backup {
    /// Writes the intent, then looks whether the parent may still be built upon. In this order: whoever deletes the parent
    /// puts a tombstone first and looks at the intents later, so that one of the two sees the other.
    pub async fn begin(repository: &Repository, beginning: Beginning) -> Result<Backup, BeginError> {
        let place = Place(beginning.system_identifier);
        let id = BackupId::at(beginning.now);
        let intent = Intent {
            id,
            parent: beginning.parent,
            continues: beginning.continues,
            system_identifier: beginning.system_identifier,
            timeline: beginning.timeline,
            wal_from: beginning.wal_from,
            node: beginning.node,
            term: beginning.term,
            begun: beginning.now,
            writer: to_hex(&crate::seal::random::<16>()?),
        };
        let name = place.intent(id);
        match document::put(repository.store(), &name, &intent, repository.protection()).await {
            Ok(Put::Created | Put::Same) => {}
            Err(WriteError::Store(error)) if error.failure == Failure::Present => {
                return Err(BeginError::Taken { id });
            }
            Err(error) => return Err(error.into()),
        }
        // A backup of this name was collected long ago, when a clock was ahead.
        let used = manifest::outcome(repository, place, id).await?.is_some()
            || tombstone::state(repository, place, id).await?.is_deleted();
        if used {
            return Err(BeginError::Taken { id });
        }
        let parent = match intent.parent {
            None => None,
            Some(parent) => Some(Backup::pin(repository, place, parent).await?),
        };
        // Behind the intent: whoever collects asks for it by its name, when he sees who goes on.
        let former = match intent.continues {
            None => None,
            Some(former) => Former::take_over(repository, former, (&intent, parent.as_ref())).await?,
        };
        Ok(Backup {
            repository: repository.clone(),
            place,
            intent,
            parent,
            former: former.map(Arc::new),
            packs: Arc::default(),
            beats: 0,
            changes: None,
            held_back: Duration::ZERO,
        })
    }

    async fn pin(repository: &Repository, place: Place, parent: BackupId) -> Result<Manifest, BeginError> {
        let refuse = |why| BeginError::Parent { parent, why };
        let manifest = match manifest::outcome(repository, place, parent).await? {
            Some(Outcome::Committed(manifest)) => *manifest,
            Some(Outcome::Abandoned(_)) => return Err(refuse("it was given up")),
            None => return Err(refuse("there is no such backup")),
        };
        if tombstone::state(repository, place, parent).await?.is_deleted() {
            return Err(refuse("it is being deleted"));
        }
        Ok(manifest)
    }

    pub fn id(&self) -> BackupId {
        self.intent.id
    }

    /// The backup whose packs this one may refer to.
    pub fn parent(&self) -> Option<&Manifest> {
        self.parent.as_ref()
    }

    /// What an earlier attempt has left, if this one goes on from it.
    pub fn former(&self) -> Option<&Arc<Former>> {
        self.former.as_ref()
    }

    /// How it was found what has changed since the parent, for the manifest.
    pub fn tell_changes(&mut self, changes: Changes) {
        self.changes = Some(changes);
    }

    /// For how long it was held back for the server's clients, for the manifest.
    pub fn tell_held_back(&mut self, span: Duration) {
        self.held_back = span;
    }

    /// For contents; several can write beside each other.
    pub fn packs(&self, frame_pages: usize) -> PackWriter {
        let packs = Arc::clone(&self.packs);
        PackWriter::new(self.repository.clone(), self.place, self.id(), packs, frame_pages)
    }

    /// For the entries, in order of their paths.
    pub fn maps(&self) -> MapWriter {
        MapWriter::new(self.repository.clone(), self.place, self.id())
    }

    /// A sign of life. If one is refused by the store, the next one has another number.
    pub async fn beat(&mut self, now: Timestamp) -> Result<(), WriteError> {
        self.beats += 1;
        let beat = Heartbeat { id: self.id(), number: self.beats, at: now };
        let name = self.place.heartbeat(self.id(), self.beats);
        document::put(self.repository.store(), &name, &beat, self.repository.protection()).await?;
        Ok(())
    }

    /// The manifest: from here on the backup exists.
    pub async fn commit(
        self,
        packs: Vec<DurablePacks>,
        maps: DurableMaps,
        wal: ProvenWal,
        facts: Facts,
    ) -> Result<Manifest, CommitError> {
        let id = self.id();
        let own = packs.iter().map(|proof| proof.backup).chain([maps.backup]);
        if let Some(of) = own.into_iter().find(|of| *of != id) {
            return Err(CommitError::OtherProof { id, of });
        }
        if wal.system != self.intent.system_identifier || wal.history.timeline() != self.intent.timeline {
            return Err(CommitError::OtherWal { id });
        }
        if wal.start < self.intent.wal_from {
            let (from, start) = (self.intent.wal_from, wal.start);
            return Err(CommitError::NotPinned { id, from, start });
        }
        let manifest = Manifest {
            id,
            parent: self.intent.parent,
            continues: self.former.as_ref().map(|former| former.id()),
            system_identifier: wal.system,
            node: self.intent.node.clone(),
            term: self.intent.term,
            timeline: wal.history.timeline(),
            start: wal.start,
            stop: wal.stop,
            wal_segment_bytes: wal.segments.bytes(),
            history: wal.history.forks().to_vec(),
            facts,
            files: maps.files,
            bytes: maps.bytes,
            packs: self.referenced(packs, &maps)?,
            maps: maps.maps,
            changes: self.changes.clone(),
            held_back_seconds: Some(self.held_back.as_secs()).filter(|seconds| *seconds > 0),
        };
        let name = self.place.backup(id);
        let written =
            document::put(self.repository.store(), &name, &manifest, self.repository.protection()).await;
        let error = match written {
            Ok(Put::Created | Put::Same) => return Ok(manifest),
            Err(error) => error,
        };
        // Something is there, or nobody knows: it may be this very manifest, whose answer was lost on its way.
        match (manifest::outcome(&self.repository, self.place, id).await, error) {
            (Ok(Some(Outcome::Committed(there))), _) if *there == manifest => Ok(manifest),
            (Ok(Some(_)), _) => Err(CommitError::Abandoned { id }),
            (_, error) => Err(error.into()),
        }
    }

    /// The packs that the maps refer to, all of them durable.
    fn referenced(
        &self,
        own: Vec<DurablePacks>,
        maps: &DurableMaps,
    ) -> Result<BTreeMap<BackupId, Vec<PackEntry>>, CommitError> {
        let own = own.into_iter().flat_map(|proof| {
            let backup = proof.backup;
            proof.packs.into_iter().map(move |pack| (PackId { backup, number: pack.number }, pack))
        });
        let mut durable: BTreeMap<PackId, PackEntry> = own.collect();
        if let Some(parent) = &self.parent {
            durable.extend(parent.all_packs().map(|(id, pack)| (id, *pack)));
        }
        if let Some(former) = &self.former {
            durable.extend(former.packs());
        }
        let mut referenced: BTreeMap<BackupId, Vec<PackEntry>> = BTreeMap::new();
        for pack in &maps.packs {
            let Some(entry) = durable.get(pack) else {
                let PackId { backup: of, number } = *pack;
                return Err(CommitError::PackNotProven { id: self.id(), of, number });
            };
            referenced.entry(pack.backup).or_default().push(*entry);
        }
        Ok(referenced)
    }
}
