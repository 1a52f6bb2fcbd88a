//! Deleting a backup in steps that can be taken back until the last one.
//!
//! A tombstone says that a backup is to go. Until it is carried out it can be taken back. Which of the two happens is
//! decided by one object that exists once, the verdict, so that nobody takes back what is being deleted at that moment.
//! Tombstones are numbered: a backup whose tombstone was taken back can get the next one.
//!
//! Left out: what goes with a backup (`collect`). Hazard: a backup that is shown while its packs are already gone; from the
//! verdict on it is deleted, whether anything of it is still there or not.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::document::{self, Document, ReadError, WriteError};
use crate::format::Repository;
use crate::name::{BackupId, Place};
use crate::store::{Failure, Put};

/// A backup is deleted and undeleted so often at most; each costs two requests for all who look.
const MAX_TOMBSTONES: u32 = 1000;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tombstone {
    pub id: BackupId,
    pub number: u32,
    pub at: Timestamp,
    /// Which rule or person wants it to go.
    pub why: String,
}

impl Document for Tombstone {
    const KIND: &'static str = "tombstone";

    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

/// What came of a tombstone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Came {
    /// It was taken back.
    Undone,
    /// Deletion has begun, and nothing of the backup counts any more.
    Swept,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    pub id: BackupId,
    pub number: u32,
    pub came: Came,
    pub at: Timestamp,
}

impl Document for Verdict {
    const KIND: &'static str = "verdict";

    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TombstoneError {
    #[error("backup {id} is gone for good: its deletion has begun")]
    Swept { id: BackupId },
    #[error("backup {id} is not being deleted")]
    NotDeleted { id: BackupId },
    #[error("backup {id} was deleted and undeleted {MAX_TOMBSTONES} times")]
    TooOften { id: BackupId },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Where a backup stands between being there and being gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// With the number that the next tombstone has.
    Kept { next: u32 },
    /// To go when its grace has passed.
    Buried(Tombstone),
    /// Deletion has begun.
    Swept,
}

impl State {
    pub fn is_deleted(&self) -> bool {
        !matches!(self, State::Kept { .. })
    }
}

/// Asked by name, not by a listing, which may be late.
pub async fn state(repository: &Repository, place: Place, id: BackupId) -> Result<State, TombstoneError> {
    let (store, protection) = (repository.store(), repository.protection());
    for number in 1..=MAX_TOMBSTONES {
        let name = place.tombstone(id, number);
        let Some(tombstone) = document::find::<Tombstone>(store, &name, protection).await? else {
            return Ok(State::Kept { next: number });
        };
        match document::find::<Verdict>(store, &place.verdict(id, number), protection).await? {
            None => return Ok(State::Buried(tombstone)),
            Some(Verdict { came: Came::Swept, .. }) => return Ok(State::Swept),
            Some(Verdict { came: Came::Undone, .. }) => {}
        }
    }
    Err(TombstoneError::TooOften { id })
}

/// Puts a tombstone. One that is there already is as good.
pub async fn bury(
    repository: &Repository,
    place: Place,
    id: BackupId,
    why: &str,
    now: Timestamp,
) -> Result<(), TombstoneError> {
    let State::Kept { next } = state(repository, place, id).await? else { return Ok(()) };
    let tombstone = Tombstone { id, number: next, at: now, why: why.to_owned() };
    let name = place.tombstone(id, next);
    match document::put(repository.store(), &name, &tombstone, repository.protection()).await {
        Ok(Put::Created | Put::Same) => Ok(()),
        // Somebody else wanted it to go at the same moment.
        Err(WriteError::Store(error)) if error.failure == Failure::Present => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Takes a tombstone back.
pub async fn undelete(
    repository: &Repository,
    place: Place,
    id: BackupId,
    now: Timestamp,
) -> Result<(), TombstoneError> {
    match state(repository, place, id).await? {
        State::Kept { .. } => Err(TombstoneError::NotDeleted { id }),
        State::Swept => Err(TombstoneError::Swept { id }),
        State::Buried(tombstone) => match decide(repository, place, &tombstone, Came::Undone, now).await? {
            Came::Undone => Ok(()),
            Came::Swept => Err(TombstoneError::Swept { id }),
        },
    }
}

/// Decides what comes of a tombstone; says what was decided, which may be what somebody else wanted.
pub(crate) async fn decide(
    repository: &Repository,
    place: Place,
    tombstone: &Tombstone,
    came: Came,
    now: Timestamp,
) -> Result<Came, TombstoneError> {
    let (store, protection) = (repository.store(), repository.protection());
    let verdict = Verdict { id: tombstone.id, number: tombstone.number, came, at: now };
    let name = place.verdict(tombstone.id, tombstone.number);
    match document::put(store, &name, &verdict, protection).await {
        Ok(Put::Created | Put::Same) => Ok(came),
        Err(WriteError::Store(error)) if error.failure == Failure::Present => {
            Ok(document::read::<Verdict>(store, &name, protection).await?.came)
        }
        Err(error) => Err(error.into()),
    }
}
