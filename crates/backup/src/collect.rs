//! Deleting what nothing refers to any more, from manifests alone.
//!
//! # What is deleted
//!
//! Objects of a backup that is settled: it was given up, or its tombstone was carried out. Of these, packs that no kept
//! manifest names; and WAL that ends before the start of every kept backup and of every backup that is being taken.
//! Histories and what is in quarantine stay for ever.
//!
//! # Why it cannot race a writer
//!
//! A backup refers to its own packs, to those that its parent's manifest names, and to those of a backup that was given up for it to go on from, nothing else. A parent is deleted in this
//! order: tombstone; its grace; intents are listed, and none pins it; the verdict. A writer goes the other way: intent,
//! then it looks for the tombstone. Whatever the order of the four, either the writer sees the tombstone and refuses, or
//! the collection sees the intent and waits; a listing that is late by less than the grace changes nothing, as writers ask
//! by name. Packs are listed before intents and those before manifests, so that what is committed meanwhile is seen in one
//! of them. Whether a backup was given up is decided by the object that would be its manifest, not by a clock.
//!
//! That object also says who goes on from it, whose intent is there before. So a backup is either given up for somebody, and stays as long as he is under way; or it was given up here, and
//! he that wanted to go on finds that word and does not. He himself is asked for by name, first his intent, then how he has ended: listings may have been made before he began.
//!
//! # When nothing is deleted
//!
//! If a manifest cannot be read, since it might name anything; if a listing lacks what must be in it; if clocks disagree or
//! went back, since grace would mean nothing. A backup that is kept by hand stays, whatever tombstone it has. Where the repository is a member of
//! the durability rule the newest backup that leads to the present does too, with all WAL behind it: commits may be nowhere else. What voters leave
//! is not looked at, and stays for ever.
//!
//! Left out: which backups should go (`core`). Hazard: everything; what is deleted is gone.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use pgherd_core::types::Lsn;

use crate::breakage::{Broken, broken};
use crate::document::{self, Damage, ReadError, WriteError};
use crate::format::Repository;
use crate::intent::{Abandoned, Heartbeat, Intent};
use crate::keep::{self, KeepError};
use crate::manifest::{self, Manifest, Outcome};
use crate::name::{self, BackupId, Kind, Name, Place};
use crate::pack::PackId;
use crate::seal::SealError;
use crate::store::{Failure, Listed, MAX_PAGE, Put, StoreError};
use crate::tombstone::{self, Came, State, TombstoneError};
use crate::voter::{self, VoterError};
use crate::wal::{Archive, BackupRange, Segment, SegmentError, Segments, window};

/// How far the clock of a store may be from ours, and how late a listing usually is at most.
pub const TOLERANCE: Duration = Duration::from_secs(300);

/// How patient a collection is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From a tombstone until it is carried out. Longer than listings are ever late.
    pub grace: Duration,
    /// From the last sign of life of a backup until it is given up.
    pub lease: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { grace: Duration::from_secs(24 * 3600), lease: Duration::from_secs(24 * 3600) }
    }
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Backups whose deletion began or went on.
    pub swept: BTreeSet<BackupId>,
    /// Backups that nobody was taking any more.
    pub abandoned: BTreeSet<BackupId>,
    /// Backups that have a tombstone and stay, as its grace has not passed, somebody builds on them, or they are kept by hand.
    pub waiting: BTreeSet<BackupId>,
    pub packs: u64,
    pub maps: u64,
    pub wal: u64,
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    #[error("nothing was deleted: the clock of {place} shows {theirs}, and this host's {ours}")]
    ClocksDiffer { place: String, theirs: Timestamp, ours: Timestamp },
    #[error("nothing was deleted: \"{object}\" is of {at}, and the clock went back to {now}")]
    ClockWentBack { object: String, at: Timestamp, now: Timestamp },
    #[error(
        "nothing was deleted: \"{object}\" is there and was not listed, so more may be missing in the listing"
    )]
    NotListed { object: Name },
    #[error(
        "nothing was deleted: \"{object}\" is needed by backup {by} and is not there; see what `backup check` says"
    )]
    Lost { object: Name, by: BackupId },
    #[error("nothing was deleted: \"{object}\" is no name that belongs there")]
    Stray { object: Name },
    #[error("nothing was deleted: its backups have segments of different sizes")]
    SegmentSizes,
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tombstone(#[from] TombstoneError),
    #[error(transparent)]
    Keep(#[from] KeepError),
    #[error("nothing was deleted")]
    Seal(#[from] SealError),
    #[error("nothing was deleted: {0}")]
    Voter(#[from] VoterError),
}

/// One collection over one cluster. Two beside each other do no harm.
pub async fn collect(
    repository: &Repository,
    place: Place,
    patience: Patience,
    now: Timestamp,
) -> Result<Report, CollectError> {
    collect_beside(repository, place, patience, &BTreeSet::new(), now).await
}

/// The same, where of some backups only their own WAL is needed, from start to stop: they stand alone. Of all others, and of those that
/// the caller does not know, all WAL since is.
pub async fn collect_beside(
    repository: &Repository,
    place: Place,
    patience: Patience,
    alone: &BTreeSet<BackupId>,
    now: Timestamp,
) -> Result<Report, CollectError> {
    let mut collection =
        Collection { repository, place, patience, now, report: Report::default(), ids: BTreeSet::new() };
    collection.compare_clocks().await?;
    // In this order; see the head of the file.
    let packs = collection.list(Kind::Packs).await?;
    let maps = collection.list(Kind::Maps).await?;
    let heartbeats = collection.list(Kind::Heartbeats).await?;
    let keeps = collection.list(Kind::Keeps).await?;
    let mut intents = collection.intents().await?;
    collection.list(Kind::Tombstones).await?;
    let mut outcomes = collection.outcomes().await?;
    collection.follow(&mut intents, &mut outcomes).await?;

    let ids = std::mem::take(&mut collection.ids);
    let mut states = BTreeMap::new();
    for id in &ids {
        states.insert(*id, tombstone::state(repository, place, *id).await?);
    }
    let live = collection.live(&ids, &intents, &outcomes, &states, &heartbeats, (&packs, &maps)).await?;
    let mut kept: BTreeMap<BackupId, &Manifest> = BTreeMap::new();
    for (id, outcome) in &outcomes {
        if let (Outcome::Committed(manifest), false) = (outcome, states.get(id) == Some(&State::Swept)) {
            kept.insert(*id, manifest);
        }
    }
    // Before anything is decided that cannot be taken back.
    collection.compare_listings(&kept, &packs, &maps).await?;
    let counted = collection.counted(&kept).await?;
    for id in &ids {
        if counted == Some(*id) && matches!(states.get(id), Some(State::Buried(_))) {
            collection.report.waiting.insert(*id);
            continue;
        }
        // One that has not ended is given up some day; its tombstone waits until then.
        let ended = kept.contains_key(id) || states.get(id) == Some(&State::Swept);
        if ended && collection.is_swept(*id, &states, &live, &intents).await? {
            kept.remove(id);
        }
    }
    let needed: BTreeSet<PackId> =
        kept.values().flat_map(|manifest| manifest.all_packs().map(|(pack, _)| pack)).collect();

    let gone_on_from = |id: BackupId| {
        let last = last_attempt(id, &outcomes);
        last != id && live.contains(&last) && !broken(Broken::FormerIgnored)
    };
    let settled = |id: BackupId| !kept.contains_key(&id) && !live.contains(&id) && !gone_on_from(id);
    let pack_of = |listed: &Listed| {
        let number = listed.name.last().parse().unwrap_or(u32::MAX);
        owner(&listed.name).map(|backup| PackId { backup, number })
    };
    for listed in &packs {
        if pack_of(listed).is_some_and(|pack| settled(pack.backup) && !needed.contains(&pack)) {
            collection.report.packs += 1;
            collection.delete(listed).await?;
        }
    }
    for listed in &maps {
        if owner(&listed.name).is_some_and(settled) {
            collection.report.maps += 1;
            collection.delete(listed).await?;
        }
    }
    for listed in heartbeats.iter().chain(&keeps) {
        if owner(&listed.name).is_some_and(settled) {
            repository.store().delete(&listed.name).await?;
        }
    }
    for id in ids.iter().filter(|id| settled(**id)) {
        repository.store().delete(&place.intent(*id)).await?;
        // The word that it was given up stays: its writer may come back after any time.
        if matches!(outcomes.get(id), Some(Outcome::Committed(_))) {
            repository.store().delete(&place.backup(*id)).await?;
        }
    }
    let pinned = intents.iter().filter(|(id, _)| live.contains(id) && !broken(Broken::IntentsIgnored));
    let leads = |id: &BackupId| !alone.contains(id) || counted == Some(*id);
    let leading = kept.iter().filter(|(id, _)| leads(id)).map(|(_, manifest)| manifest.start);
    // Where all stand alone, the newest one leads on: it is what somebody restores from.
    let newest = kept.values().next_back().map(|manifest| manifest.start);
    let from = leading.chain(pinned.map(|(_, intent)| intent.wal_from)).min().or(newest);
    if let (Some(from), false) = (from, kept.is_empty()) {
        collection.collect_wal(&kept, from).await?;
    }
    Ok(collection.report)
}

struct Collection<'a> {
    repository: &'a Repository,
    place: Place,
    patience: Patience,
    now: Timestamp,
    report: Report,
    /// Every backup of which anything is there.
    ids: BTreeSet<BackupId>,
}

fn continued_by(outcome: &Outcome) -> Option<BackupId> {
    match outcome {
        Outcome::Abandoned(abandoned) => abandoned.continued_by,
        Outcome::Committed(_) => None,
    }
}

/// The one that went on from a backup, or from the one that did, and so on.
fn last_attempt(id: BackupId, outcomes: &BTreeMap<BackupId, Outcome>) -> BackupId {
    let mut last = id;
    // Each is newer than the one before.
    while let Some(by) = outcomes.get(&last).and_then(continued_by).filter(|by| *by > last) {
        last = by;
    }
    last
}

/// The backup that an object belongs to: the part before the number.
fn owner(name: &Name) -> Option<BackupId> {
    name.as_str().rsplit('/').nth(1)?.parse().ok()
}

impl Collection<'_> {
    async fn compare_clocks(&self) -> Result<(), CollectError> {
        let store = self.repository.store();
        let probe = name::probe(u64::from_le_bytes(crate::seal::random()?));
        store.put(&probe, Bytes::from_static(b"what time is it?")).await?;
        let theirs = store.head(&probe).await?.modified;
        store.delete(&probe).await?;
        let apart = theirs.duration_since(self.now).unsigned_abs();
        if apart > TOLERANCE {
            let place = store.place().to_owned();
            return Err(CollectError::ClocksDiffer { place, theirs, ours: self.now });
        }
        Ok(())
    }

    /// Nothing is from the future.
    fn compare(&self, object: &Name, at: Timestamp) -> Result<(), CollectError> {
        match at.duration_since(self.now) > signed(TOLERANCE) {
            true => Err(CollectError::ClockWentBack { object: object.to_string(), at, now: self.now }),
            false => Ok(()),
        }
    }

    /// Objects of a kind that belong to a backup each.
    async fn list(&mut self, kind: Kind) -> Result<Vec<Listed>, CollectError> {
        let listed = self.repository.store().list_all(&self.place.all(kind)).await?;
        for object in &listed {
            self.compare(&object.name, object.modified)?;
            let id =
                owner(&object.name).ok_or_else(|| CollectError::Stray { object: object.name.clone() })?;
            self.ids.insert(id);
        }
        Ok(listed)
    }

    async fn intents(&mut self) -> Result<BTreeMap<BackupId, Intent>, CollectError> {
        let (store, protection) = (self.repository.store(), self.repository.protection());
        let mut intents = BTreeMap::new();
        for listed in store.list_all(&self.place.all(Kind::Intents)).await? {
            let Some(intent) = document::find::<Intent>(store, &listed.name, protection).await? else {
                continue;
            };
            if self.place.intent(intent.id) != listed.name || intent.system_identifier != self.place.0 {
                let damage = Damage::OtherObject { wanted: listed.name.to_string() };
                return Err(ReadError::damaged(store, &listed.name, damage).into());
            }
            self.compare(&listed.name, intent.begun)?;
            self.ids.insert(intent.id);
            intents.insert(intent.id, intent);
        }
        Ok(intents)
    }

    /// How each backup ended that has. Those of which there is anything are asked for by name; one that is there and was
    /// not listed shows that the listing is not complete, unless it is so new that listings may be late.
    async fn outcomes(&mut self) -> Result<BTreeMap<BackupId, Outcome>, CollectError> {
        let mut outcomes = manifest::outcomes(self.repository, self.place).await?;
        self.ids.extend(outcomes.keys());
        for id in &self.ids {
            if outcomes.contains_key(id) || broken(Broken::ListingBelieved) {
                continue;
            }
            if let Some(outcome) = manifest::outcome(self.repository, self.place, *id).await? {
                self.refuse_if_old(&self.place.backup(*id)).await?;
                outcomes.insert(*id, outcome);
            }
        }
        Ok(outcomes)
    }

    /// Who goes on from a backup that was given up is looked at as well, by name: his intent came before that word, and may not have been listed.
    async fn follow(
        &mut self,
        intents: &mut BTreeMap<BackupId, Intent>,
        outcomes: &mut BTreeMap<BackupId, Outcome>,
    ) -> Result<(), CollectError> {
        let (store, protection) = (self.repository.store(), self.repository.protection());
        let mut open: Vec<BackupId> = outcomes.values().filter_map(continued_by).collect();
        while let Some(id) = open.pop() {
            if outcomes.contains_key(&id) || broken(Broken::FormerIgnored) {
                continue;
            }
            // In this order: what is committed meanwhile has an outcome, and what is not has an intent.
            if let Entry::Vacant(vacant) = intents.entry(id)
                && let Some(intent) =
                    document::find::<Intent>(store, &self.place.intent(id), protection).await?
            {
                vacant.insert(intent);
            }
            if let Some(outcome) = manifest::outcome(self.repository, self.place, id).await? {
                self.refuse_if_old(&self.place.backup(id)).await?;
                open.extend(continued_by(&outcome));
                outcomes.insert(id, outcome);
            }
            // Without either it is gone, with all that it needed.
            if intents.contains_key(&id) || outcomes.contains_key(&id) {
                self.ids.insert(id);
            }
        }
        Ok(())
    }

    async fn refuse_if_old(&self, object: &Name) -> Result<(), CollectError> {
        let modified = self.repository.store().head(object).await?.modified;
        match self.now.duration_since(modified) > signed(TOLERANCE) {
            true => Err(CollectError::NotListed { object: object.clone() }),
            false => Ok(()),
        }
    }

    /// Backups that are being taken: those without an end that show signs of life. The others are given up here.
    async fn live(
        &mut self,
        ids: &BTreeSet<BackupId>,
        intents: &BTreeMap<BackupId, Intent>,
        outcomes: &BTreeMap<BackupId, Outcome>,
        states: &BTreeMap<BackupId, State>,
        heartbeats: &[Listed],
        (packs, maps): (&[Listed], &[Listed]),
    ) -> Result<BTreeSet<BackupId>, CollectError> {
        let mut seen: BTreeMap<BackupId, Timestamp> = BTreeMap::new();
        for listed in heartbeats.iter().chain(packs).chain(maps) {
            let Some(id) = owner(&listed.name) else { continue };
            let last = seen.entry(id).or_insert(listed.modified);
            *last = (*last).max(listed.modified);
        }
        let mut live = BTreeSet::new();
        for id in ids {
            if outcomes.contains_key(id) || matches!(states.get(id), Some(State::Swept)) {
                continue;
            }
            let begun = intents.get(id).map(|intent| intent.begun);
            let beat = self.last_beat(*id, heartbeats).await?;
            let last = [seen.get(id).copied(), begun, beat].into_iter().flatten().max();
            let silent = last.is_none_or(|last| self.now.duration_since(last) > signed(self.patience.lease));
            if !silent || !self.abandon(*id).await? {
                live.insert(*id);
            }
        }
        Ok(live)
    }

    async fn last_beat(&self, id: BackupId, listed: &[Listed]) -> Result<Option<Timestamp>, CollectError> {
        let Some(last) = listed.iter().rfind(|beat| owner(&beat.name) == Some(id)) else { return Ok(None) };
        let (store, protection) = (self.repository.store(), self.repository.protection());
        let beat = document::find::<Heartbeat>(store, &last.name, protection).await?;
        Ok(beat.map(|beat| beat.at))
    }

    /// Gives a backup up, if its writer does not commit it at this moment.
    async fn abandon(&mut self, id: BackupId) -> Result<bool, CollectError> {
        let (store, protection) = (self.repository.store(), self.repository.protection());
        let why = "it showed no sign of life".to_owned();
        let abandoned = Abandoned { id, at: self.now, why, continued_by: None };
        match document::put(store, &self.place.backup(id), &abandoned, protection).await {
            Ok(Put::Created | Put::Same) => {
                self.report.abandoned.insert(id);
                Ok(true)
            }
            Err(WriteError::Store(error)) if error.failure == Failure::Present => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a backup is gone, which may be decided here.
    async fn is_swept(
        &mut self,
        id: BackupId,
        states: &BTreeMap<BackupId, State>,
        live: &BTreeSet<BackupId>,
        intents: &BTreeMap<BackupId, Intent>,
    ) -> Result<bool, CollectError> {
        let tombstone = match states.get(&id) {
            Some(State::Swept) => {
                self.report.swept.insert(id);
                return Ok(true);
            }
            Some(State::Buried(tombstone)) => tombstone,
            Some(State::Kept { .. }) | None => return Ok(false),
        };
        let name = self.place.tombstone(id, tombstone.number);
        self.compare(&name, tombstone.at)?;
        // Whichever of the two clocks shows less: a host whose clock is behind may have put it.
        let put = self.repository.store().head(&name).await?.modified.max(tombstone.at);
        let ripe = self.now.duration_since(put) >= signed(self.patience.grace) || broken(Broken::NoGrace);
        let is_kept = keep::of(self.repository, self.place, id)
            .await?
            .is_some_and(|kept| kept.holds(self.now).is_some());
        let pins = |other: &BackupId| intents.get(other).is_some_and(|intent| intent.parent == Some(id));
        let pinned = live.iter().any(pins) && !broken(Broken::IntentsIgnored);
        if !ripe || pinned || is_kept {
            self.report.waiting.insert(id);
            return Ok(false);
        }
        let came = tombstone::decide(self.repository, self.place, tombstone, Came::Swept, self.now).await?;
        if came == Came::Swept {
            self.report.swept.insert(id);
        }
        Ok(came == Came::Swept)
    }

    /// Where the repository is a member of the durability rule, the newest backup that leads to the present: it is what makes a vote of it.
    async fn counted(&self, kept: &BTreeMap<BackupId, &Manifest>) -> Result<Option<BackupId>, CollectError> {
        let Some(newest) = kept.values().next_back() else { return Ok(None) };
        if !voter::is_member(self.repository, self.place).await? {
            return Ok(None);
        }
        let segments = Segments::new(newest.wal_segment_bytes)?;
        let inventory = Archive::new(self.repository, self.place.0, segments).inventory().await?;
        let ranges: Vec<BackupRange> = kept.values().map(|manifest| BackupRange::from(*manifest)).collect();
        let window = window(&ranges, &inventory);
        let leads = window.reaches.iter().rev().find(|reach| reach.end.is_some() && reach.end == window.to);
        Ok(leads.map(|reach| reach.backup.id))
    }

    /// Everything that manifests name must be in the listings.
    async fn compare_listings(
        &self,
        kept: &BTreeMap<BackupId, &Manifest>,
        packs: &[Listed],
        maps: &[Listed],
    ) -> Result<(), CollectError> {
        if broken(Broken::ListingBelieved) {
            return Ok(());
        }
        let mut listed: BTreeSet<Name> = packs.iter().chain(maps).map(|listed| listed.name.clone()).collect();
        for (by, manifest) in kept {
            let packs = manifest.all_packs().map(|(pack, _)| self.place.pack(pack.backup, pack.number));
            let maps = manifest.maps.iter().map(|map| self.place.map(*by, map.number));
            for object in packs.chain(maps) {
                if listed.contains(&object) {
                    continue;
                }
                match self.refuse_if_old(&object).await {
                    Err(CollectError::Store(error)) if error.is_absent() => {
                        return Err(CollectError::Lost { object, by: *by });
                    }
                    other => other?,
                }
                listed.insert(object);
            }
        }
        Ok(())
    }

    /// WAL that ends before `from`, that no kept backup has between its start and stop, and that is older than the grace: what somebody
    /// begins now archives later.
    async fn collect_wal(
        &mut self,
        kept: &BTreeMap<BackupId, &Manifest>,
        from: Lsn,
    ) -> Result<(), CollectError> {
        let sizes: BTreeSet<u32> = kept.values().map(|manifest| manifest.wal_segment_bytes).collect();
        let (Some(size), true) = (sizes.first(), sizes.len() == 1) else {
            return Err(CollectError::SegmentSizes);
        };
        let segments = Segments::new(*size)?;
        let own: BTreeSet<Segment> = kept
            .values()
            .flat_map(|manifest| segments.covering(manifest.timeline, manifest.start, manifest.stop))
            .collect();
        let store = self.repository.store().clone();
        for kind in [Kind::Wal, Kind::Partials, Kind::Pieces] {
            let mut after: Option<Name> = None;
            let mut complete = None;
            loop {
                let page = store.list(&self.place.all(kind), after.as_ref(), MAX_PAGE).await?;
                for listed in &page.objects {
                    let file = listed.name.last().split('-').next().unwrap_or_default();
                    let segment = segments
                        .parse(file)
                        .ok_or_else(|| CollectError::Stray { object: listed.name.clone() })?;
                    let old = self.now.duration_since(listed.modified) >= signed(self.patience.grace);
                    let is_garbage =
                        kind == Kind::Pieces && self.is_complete(segments, segment, &mut complete).await?;
                    let is_behind = segments.end(segment) <= from && !own.contains(&segment);
                    if is_behind && old || is_garbage {
                        self.report.wal += 1;
                        self.delete(listed).await?;
                    }
                }
                after = page.objects.last().map(|last| last.name.clone()).or(after);
                if !page.more {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Whether a segment itself is there, so that its pieces are not needed. They are listed one behind the other, and it is
    /// asked for once.
    async fn is_complete(
        &self,
        segments: Segments,
        segment: Segment,
        known: &mut Option<(Segment, bool)>,
    ) -> Result<bool, CollectError> {
        if let Some((_, is_there)) = known.filter(|(asked, _)| *asked == segment) {
            return Ok(is_there);
        }
        let name = self.place.wal(segment.timeline, &segments.file_name(segment));
        let is_there = match self.repository.store().head(&name).await {
            Ok(_) => true,
            Err(error) if error.is_absent() => false,
            Err(error) => return Err(error.into()),
        };
        *known = Some((segment, is_there));
        Ok(is_there)
    }

    async fn delete(&mut self, listed: &Listed) -> Result<(), CollectError> {
        self.repository.store().delete(&listed.name).await?;
        self.report.bytes += listed.bytes;
        Ok(())
    }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests;
