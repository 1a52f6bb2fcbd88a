//! What a base backup that nobody completes has left, for another one that goes on from it.
//!
//! The other one is a new backup with an intent, a start and WAL of its own. It reads what it backs up, and only refers to pages of the former one where
//! their hashes are the same at the same place, as it does with its parent's. So it does not matter whether these pages were copied torn, or under which start: a page is
//! taken for what it holds.
//!
//! That the former one is not completed is decided before anything of it is used, by the object that would be its manifest. It says who goes on from it, and so pins
//! what the former one has stored, as long as that one is being taken; then its manifest does. Whoever meets another word there has lost the race, and begins from nothing. The former writer, if
//! it still lives, cannot commit any more, and packs that it puts from then on nobody knows.
//!
//! One that went on itself has left what its own former one had as well, so they are followed to the first.
//!
//! Nothing that was left is a reason to fail: what cannot be read is stored again.
//!
//! Left out: comparing, and when somebody is taken for dead (`Wanted::silence`). Hazard: a page that is taken for
//! another one's, as with a parent; and a pack that is collected under a backup that refers to it, for which `collect` has the order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use pgherd_core::types::{NodeName, Term};

use crate::container::{self, Table};
use crate::document::{self, ReadError, WriteError};
use crate::format::Repository;
use crate::intent::{Abandoned, Heartbeat, Intent};
use crate::manifest::{self, Manifest, Outcome};
use crate::map::{Ahead, Change, Entry, GROUP_BYTES, MapReader};
use crate::name::{BackupId, Kind, Place};
use crate::pack::{PAGE_BYTES, PackEntry, PackId};
use crate::store::{Failure, Listed, StoreError};
use crate::tombstone::{self, TombstoneError};

/// Footers that are read beside each other.
const READING: usize = 16;
/// Attempts one behind the other that are followed. What an earlier one has left is stored again.
const MAX_ATTEMPTS: usize = 64;

/// What is there of a backup that another one goes on from.
#[derive(Debug)]
pub struct Former {
    place: Place,
    id: BackupId,
    /// Itself, the one that it went on from, and so on, with the numbers of their maps.
    attempts: Vec<(BackupId, Vec<u32>)>,
    /// Of all of them.
    packs: BTreeMap<PackId, PackEntry>,
    /// What they referred to beside these.
    of_parent: BTreeSet<PackId>,
}

#[derive(Debug, thiserror::Error)]
pub enum FormerError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tombstone(#[from] TombstoneError),
}

/// Which backup is to be gone on from.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub node: NodeName,
    /// Outside of a herd there are none. What a herd's agent takes and what somebody takes by hand are not the same's.
    pub term: Term,
    pub parent: Option<BackupId>,
    /// Whoever has shown no sign of life for so long does not live.
    pub silence: Duration,
}

/// The newest one that nobody completes any more.
pub async fn find(
    repository: &Repository,
    place: Place,
    wanted: &Wanted,
    now: Timestamp,
) -> Result<Option<BackupId>, FormerError> {
    let mut listed = repository.store().list_all(&place.all(Kind::Intents)).await?;
    while let Some(newest) = listed.pop() {
        match is_wanted(repository, place, &newest, wanted, now).await {
            Ok(Some(id)) => return Ok(Some(id)),
            Ok(None) => {}
            Err(FormerError::Read(error @ ReadError::Damaged { .. })) => {
                tracing::warn!(intent = %newest.name, %error, "it is not gone on from a backup that cannot be read");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

async fn is_wanted(
    repository: &Repository,
    place: Place,
    listed: &Listed,
    wanted: &Wanted,
    now: Timestamp,
) -> Result<Option<BackupId>, FormerError> {
    let (store, protection) = (repository.store(), repository.protection());
    let Some(intent) = document::find::<Intent>(store, &listed.name, protection).await? else {
        return Ok(None);
    };
    let is_alike = intent.node == wanted.node
        && intent.parent == wanted.parent
        && (intent.term == Term(0)) == (wanted.term == Term(0));
    if !is_alike || intent.id >= BackupId::at(now) {
        return Ok(None);
    }
    let ended = manifest::outcome(repository, place, intent.id).await?.is_some();
    if ended || tombstone::state(repository, place, intent.id).await?.is_deleted() {
        return Ok(None);
    }
    // Who wanted to go on himself and died before he said so has stored nothing; what he wanted is still to be had.
    if let Some(former) = intent.continues
        && manifest::outcome(repository, place, former).await?.is_none()
    {
        return Ok(None);
    }
    // Whoever knows that nobody lives does not ask two clocks.
    if wanted.silence.is_zero() {
        return Ok(Some(intent.id));
    }
    let last = last_sign(repository, place, &intent).await?;
    let silence = SignedDuration::try_from(wanted.silence).unwrap_or(SignedDuration::MAX);
    Ok((now.duration_since(last) >= silence).then_some(intent.id))
}

/// When its writer said last that it lives: by its own clock or by that of the store, whichever is later.
async fn last_sign(repository: &Repository, place: Place, intent: &Intent) -> Result<Timestamp, FormerError> {
    let (store, protection) = (repository.store(), repository.protection());
    let beats = store.list_all(&of(place, Kind::Heartbeats, intent.id)).await?;
    let Some(last) = beats.last() else { return Ok(intent.begun) };
    let beat = document::find::<Heartbeat>(store, &last.name, protection).await?;
    Ok(beat.map_or(intent.begun, |beat| beat.at).max(last.modified))
}

/// Everything of a kind that one backup has.
fn of(place: Place, kind: Kind, id: BackupId) -> String {
    format!("{}{id}/", place.all(kind))
}

impl Former {
    /// Decides that `id` is never completed, and that `by`, whose intent is durable and whose parent is pinned, goes on from it. None if it has ended otherwise.
    pub(crate) async fn take_over(
        repository: &Repository,
        id: BackupId,
        (by, parent): (&Intent, Option<&Manifest>),
    ) -> Result<Option<Former>, FormerError> {
        let place = Place(by.system_identifier);
        let why = format!("backup {} goes on from it", by.id);
        let abandoned = Abandoned { id, at: by.begun, why, continued_by: Some(by.id) };
        let (store, protection) = (repository.store(), repository.protection());
        match document::put(store, &place.backup(id), &abandoned, protection).await {
            Ok(_) => {}
            Err(WriteError::Store(error)) if error.failure == Failure::Present => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // From here on nothing that the former one has stored is collected.
        let (mut packs, mut attempts) = (BTreeMap::new(), Vec::new());
        for former in chain(repository, place, id).await? {
            packs.extend(stored(repository, place, former).await?);
            let maps = store.list_all(&of(place, Kind::Maps, former)).await?;
            attempts.push((former, maps.iter().filter_map(|map| map.name.last().parse().ok()).collect()));
        }
        let of_parent = parent.iter().flat_map(|parent| parent.all_packs()).map(|(pack, _)| pack).collect();
        Ok(Some(Former { place, id, attempts, packs, of_parent }))
    }

    /// The last one.
    pub fn id(&self) -> BackupId {
        self.id
    }

    /// Packs that are there, and may be referred to.
    pub(crate) fn packs(&self) -> impl Iterator<Item = (PackId, PackEntry)> {
        self.packs.iter().map(|(id, pack)| (*id, *pack))
    }

    /// What can be compared with.
    pub fn left(self: &Arc<Former>, repository: &Repository) -> Left {
        let read = |(id, maps): &(BackupId, Vec<u32>)| {
            Ahead::of(MapReader::unfinished(repository.clone(), self.place, *id, maps))
        };
        Left { attempts: self.attempts.iter().map(read).collect(), former: Arc::clone(self) }
    }

    /// What lies in packs that are not there equals nothing.
    fn usable(&self, mut entry: Entry) -> Entry {
        let mut at = 0;
        for run in &entry.runs {
            let end = at + u64::from(run.pages) * PAGE_BYTES as u64;
            if !self.packs.contains_key(&run.pack) && !self.of_parent.contains(&run.pack) {
                let groups = at / GROUP_BYTES as u64..end.div_ceil(GROUP_BYTES as u64);
                let behind = (groups.end as usize).min(entry.changes.len());
                let first = (groups.start as usize).min(behind);
                entry.changes[first..behind].fill(Change::UNKNOWN);
            }
            at = end;
        }
        entry
    }
}

/// Files as earlier attempts have stored them, as far as each of them came.
pub struct Left {
    former: Arc<Former>,
    /// The last one first: it may not have come as far as those before it.
    attempts: Vec<Ahead>,
}

impl Left {
    /// The file at a path, which lies behind those that were asked for before.
    pub async fn file(&mut self, path: &[u8]) -> Option<Entry> {
        let mut at = 0;
        while let Some(attempt) = self.attempts.get_mut(at) {
            match attempt.file(path).await {
                Ok(Some(file)) => return Some(self.former.usable(file)),
                Ok(None) => at += 1,
                Err(error) => {
                    let former = self.former.id;
                    tracing::warn!(%former, %error, "a part of what an attempt has left cannot be read, and is stored again");
                    self.attempts.remove(at);
                }
            }
        }
        None
    }
}

/// The backup, the one that it went on from, and so on.
async fn chain(repository: &Repository, place: Place, id: BackupId) -> Result<Vec<BackupId>, FormerError> {
    let mut chain = vec![id];
    let mut last = id;
    while chain.len() < MAX_ATTEMPTS {
        match before(repository, place, last).await {
            Ok(Some(former)) => last = former,
            Ok(None) => break,
            Err(error @ ReadError::Damaged { .. }) => {
                tracing::warn!(backup = %last, %error, "what it went on from cannot be found");
                break;
            }
            Err(error) => return Err(error.into()),
        }
        chain.push(last);
    }
    Ok(chain)
}

/// The one that a backup went on from.
async fn before(repository: &Repository, place: Place, id: BackupId) -> Result<Option<BackupId>, ReadError> {
    let (store, protection) = (repository.store(), repository.protection());
    let intent = document::find::<Intent>(store, &place.intent(id), protection).await?;
    let Some(former) = intent.and_then(|intent| intent.continues) else { return Ok(None) };
    // It wanted to, and somebody else may have been faster.
    Ok(match manifest::outcome(repository, place, former).await? {
        Some(Outcome::Abandoned(word)) if word.continued_by == Some(id) => Some(former),
        _ => None,
    })
}

/// The packs that a backup has put, as far as they can be relied upon.
async fn stored(
    repository: &Repository,
    place: Place,
    id: BackupId,
) -> Result<Vec<(PackId, PackEntry)>, FormerError> {
    let listed = repository.store().list_all(&of(place, Kind::Packs, id)).await?;
    if let Err(error) = settle(repository, &listed).await {
        tracing::warn!(backup = %id, %error, "its packs may not be durable, and are not used");
        return Ok(Vec::new());
    }
    let (store, protection) = (repository.store(), repository.protection());
    let read = |listed: Listed| async move {
        let Ok(number) = listed.name.last().parse() else { return Ok::<_, FormerError>(None) };
        match Table::read(container::Kind::Pack, &listed.name, protection, store).await {
            Ok(table) => {
                let pack = PackEntry { number, bytes: listed.bytes, hash: table.hash };
                Ok(Some((PackId { backup: id, number }, pack)))
            }
            Err(error) => {
                tracing::warn!(pack = %listed.name, %error, "a pack of an earlier attempt is not used");
                Ok(None)
            }
        }
    };
    let packs: Vec<_> = stream::iter(listed).map(read).buffer_unordered(READING).try_collect().await?;
    Ok(packs.into_iter().flatten().collect())
}

/// A name that is seen can still be lost with the power, if its writer was killed before it flushed the directory. To be refused because something is
/// there is to be told that it is durable, with all that was there before it. It is read then, so it is the smallest.
async fn settle(repository: &Repository, listed: &[Listed]) -> Result<(), StoreError> {
    let Some(smallest) = listed.iter().min_by_key(|listed| listed.bytes) else { return Ok(()) };
    match repository.store().put(&smallest.name, Bytes::new()).await {
        Err(error) if error.failure != Failure::Present => Err(error),
        // Were it gone meanwhile, what is there now is no pack.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
