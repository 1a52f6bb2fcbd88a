//! That a backup is kept by hand, whatever a retention policy says of it: until a day, or until it is released.
//!
//! Nothing is overwritten, so each change of mind is an object with a number; the highest one counts. Two who change it at the same moment
//! get two numbers, and the later one holds.
//!
//! Left out: what a policy makes of it (`core`). Hazard: a backup that somebody relies on and that goes. So a collection carries out no
//! tombstone of a backup that is kept.

use jiff::Timestamp;
use pgherd_core::retention::Keep;
use serde::{Deserialize, Serialize};

use crate::document::{self, Document, ReadError, WriteError};
use crate::format::Repository;
use crate::name::{BackupId, Place};
use crate::store::{Failure, Put};
use crate::tombstone::{self, TombstoneError};

/// Changes of one backup at most; each costs a request for all who look.
const MAX_CHANGES: u32 = 1000;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    pub id: BackupId,
    pub number: u32,
    /// None: it is released.
    pub keep: Option<Keep>,
    /// Not kept any more from then on.
    pub until: Option<Timestamp>,
    pub at: Timestamp,
}

impl Document for Kept {
    const KIND: &'static str = "keep";

    fn validate(&self) -> Result<(), String> {
        match (self.keep, self.until) {
            (None, Some(_)) => Err("it is released until a time".to_owned()),
            _ => Ok(()),
        }
    }
}

impl Kept {
    /// How it is kept at this moment.
    pub fn holds(&self, now: Timestamp) -> Option<Keep> {
        self.keep.filter(|_| self.until.is_none_or(|until| now < until))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    #[error("backup {id} is deleted, and cannot be kept")]
    Deleted { id: BackupId },
    #[error("backup {id} was kept and released {MAX_CHANGES} times")]
    TooOften { id: BackupId },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Tombstone(#[from] TombstoneError),
}

/// What was said of a backup last. Asked by name, not by a listing, which may be late.
pub async fn of(repository: &Repository, place: Place, id: BackupId) -> Result<Option<Kept>, KeepError> {
    let (store, protection) = (repository.store(), repository.protection());
    let mut last = None;
    for number in 1..=MAX_CHANGES {
        match document::find::<Kept>(store, &place.keep(id, number), protection).await? {
            Some(kept) => last = Some(kept),
            None => return Ok(last),
        }
    }
    Ok(last)
}

/// Keeps a backup, or releases it. Written first and then looked for a tombstone: who deletes goes the other way, so that one of the two
/// sees the other.
pub async fn put(
    repository: &Repository,
    place: Place,
    id: BackupId,
    (keep, until): (Option<Keep>, Option<Timestamp>),
    now: Timestamp,
) -> Result<Kept, KeepError> {
    loop {
        let number = of(repository, place, id).await?.map_or(1, |last| last.number + 1);
        if number > MAX_CHANGES {
            return Err(KeepError::TooOften { id });
        }
        let kept = Kept { id, number, keep, until, at: now };
        match document::put(repository.store(), &place.keep(id, number), &kept, repository.protection()).await
        {
            Ok(Put::Created | Put::Same) => {}
            // Somebody else changed it at the same moment.
            Err(WriteError::Store(error)) if error.failure == Failure::Present => continue,
            Err(error) => return Err(error.into()),
        }
        if keep.is_some() && tombstone::state(repository, place, id).await?.is_deleted() {
            return Err(KeepError::Deleted { id });
        }
        return Ok(kept);
    }
}
