//! What can be had of a repository: from a base backup along a line of history, up to the first hole.
//!
//! What is between a backup and the last segments is known by names: an object was put once, as a whole, and has a hash. Records are looked for in the
//! last segments only, so that a vote is there in a second and not in an hour.
//!
//! Left out: which line counts (`core`: the caller says what a copy is worth). Hazard: an end behind a hole cannot be had, and one in front of what
//! was told loses commits. So pieces count up to the hole whatever lies behind it, and of several backups the one that leads furthest.

use std::collections::BTreeMap;

use futures_util::{StreamExt, TryStreamExt};
use pgherd_core::observation::Copy;
use pgherd_core::record::Position;
use pgherd_core::types::{Lsn, Timeline};

use super::VoterError;
use crate::document::ReadError;
use crate::format::Repository;
use crate::manifest::{self, Outcome};
use crate::name::{BackupId, Kind, Name, Place};
use crate::receive::Begin;
use crate::tombstone::{self, State};
use crate::wal::records::Records;
use crate::wal::{Archive, BackupRange, History, Inventory, Segment, Segments};

/// Manifests that are read at a time.
const AT_ONCE: usize = 16;

/// The base backups of one cluster.
#[derive(Clone, Debug)]
pub struct Backups {
    repository: Repository,
    place: Place,
    ranges: BTreeMap<BackupId, (BackupRange, u32)>,
}

/// How far a line of history can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reached {
    pub backup: BackupRange,
    /// Everything before it is there.
    pub at: Lsn,
    /// What there is of the segment that this is in.
    tail: Vec<u8>,
}

impl Backups {
    pub async fn read(repository: &Repository, place: Place) -> Result<Backups, VoterError> {
        let store = repository.store();
        let listed = store.list_all(&place.all(Kind::Backups)).await?;
        let ids = listed.iter().filter_map(|listed| listed.name.last().parse::<BackupId>().ok());
        let read = |id| {
            let repository = repository.clone();
            async move { manifest::outcome(&repository, place, id).await.map(|outcome| (id, outcome)) }
        };
        let outcomes: Vec<_> = futures_util::stream::iter(ids.map(read).collect::<Vec<_>>())
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        let range = |(id, outcome): (BackupId, Option<Outcome>)| match outcome? {
            Outcome::Committed(manifest) => {
                Some((id, (BackupRange::from(&*manifest), manifest.wal_segment_bytes)))
            }
            Outcome::Abandoned(_) => None,
        };
        let ranges = outcomes.into_iter().filter_map(range).collect();
        Ok(Backups { repository: repository.clone(), place, ranges })
    }

    /// The WAL, in segments as the newest backup has them; none without a backup.
    pub fn archive(&self) -> Result<Option<Archive>, VoterError> {
        let Some((_, bytes)) = self.ranges.values().next_back() else { return Ok(None) };
        Ok(Some(Archive::new(&self.repository, self.place.0, Segments::new(*bytes)?)))
    }

    /// What can be had on the line where `worth` is the highest, and from where on there is WAL for somebody who has a copy.
    pub async fn furthest(
        &self,
        worth: impl Fn(&Copy) -> Position,
    ) -> Result<Option<(Copy, Lsn)>, VoterError> {
        let Some(archive) = self.archive()? else { return Ok(None) };
        let inventory = archive.inventory().await?;
        // By names first: nothing is read of a line that cannot be the best one.
        let mut lines: Vec<(Position, &History)> = Vec::new();
        for history in inventory.histories() {
            let starts = self.on(history).map(|backup| backup.start);
            let ends = starts.map(|start| latest(&archive, &inventory, history, start));
            if let Some(end) = ends.max() {
                lines.push((worth(&copy(&archive, history, end)), history));
            }
        }
        lines.sort_by_key(|(most, history)| std::cmp::Reverse((*most, history.timeline())));
        let mut best: Option<(Position, Copy, &History, BackupRange)> = None;
        for (most, history) in lines {
            if best.as_ref().is_some_and(|(position, ..)| *position > most) {
                break;
            }
            let Some(reached) = self.reached(&archive, &inventory, history).await? else { continue };
            let Some(end) = last_record(&archive, history, &reached).await? else { continue };
            let found = copy(&archive, history, end);
            let position = worth(&found);
            if best.as_ref().is_none_or(|(best, ..)| *best < position) {
                best = Some((position, found, history, reached.backup));
            }
        }
        let Some((_, copy, history, backup)) = best else { return Ok(None) };
        Ok(Some((copy, had_from(&archive, &inventory, history, &backup).await?)))
    }

    /// How far a line can be had of those backups on it that were not deleted.
    pub async fn reached(
        &self,
        archive: &Archive,
        inventory: &Inventory,
        history: &History,
    ) -> Result<Option<Reached>, VoterError> {
        for backup in self.in_turn(history) {
            if self.is_swept(&backup).await? {
                continue;
            }
            let reached = reached(archive, inventory, history, &backup).await?;
            if reached.at >= backup.stop {
                return Ok(Some(reached));
            }
        }
        Ok(None)
    }

    /// The backup from which a line can be had up to a position, with the least WAL behind it.
    pub async fn leading_to(
        &self,
        archive: &Archive,
        inventory: &Inventory,
        history: &History,
        until: Lsn,
    ) -> Result<Option<BackupRange>, VoterError> {
        for backup in self.in_turn(history) {
            if backup.stop <= until
                && !self.is_swept(&backup).await?
                && reached(archive, inventory, history, &backup).await?.at >= until
            {
                return Ok(Some(backup));
            }
        }
        Ok(None)
    }

    /// The one that begins last leads furthest: whatever another one reaches, it does too. By positions, since clocks may go back.
    fn in_turn(&self, history: &History) -> Vec<BackupRange> {
        let mut on_line: Vec<BackupRange> = self.on(history).collect();
        on_line.sort_by_key(|backup| std::cmp::Reverse((backup.start, backup.id)));
        on_line
    }

    async fn is_swept(&self, backup: &BackupRange) -> Result<bool, VoterError> {
        Ok(tombstone::state(&self.repository, self.place, backup.id).await? == State::Swept)
    }

    /// Which base backups were begun or ended there, by names: as long as these are the same, no backup has come.
    pub async fn names(repository: &Repository, place: Place) -> Result<Vec<Name>, VoterError> {
        let listed = repository.store().list_all(&place.all(Kind::Backups)).await?;
        Ok(listed.into_iter().map(|listed| listed.name).collect())
    }

    fn on(&self, history: &History) -> impl Iterator<Item = BackupRange> {
        let on_line = |backup: &&BackupRange| history.passes(backup.timeline, backup.stop);
        self.ranges.values().map(|(backup, _)| backup).filter(on_line).copied()
    }
}

impl Reached {
    /// Where a stream on the line's last timeline goes on. None: an older one's end is missing yet, which no stream of this one brings.
    pub fn begin(&self, inventory: &Inventory, history: &History) -> Option<Begin> {
        let segments = inventory.segment_size();
        let segment = Segment { timeline: history.timeline(), number: segments.number(self.at) };
        let fork = history.forks().last().map_or(Lsn::ZERO, |fork| fork.until);
        // What a line has in front of its fork is in the timeline's own file of that segment, too.
        let is_own = segment.number >= segments.number(fork);
        let pieced = inventory.beginning_of(segment).unwrap_or(segments.start(segment));
        is_own.then_some(Begin { segment, durable: self.at, pieced, needs_history: false })
    }
}

/// How far a line of history can be had from the beginning of one backup on. Where that is before its end, it leads nowhere.
pub async fn reached(
    archive: &Archive,
    inventory: &Inventory,
    history: &History,
    backup: &BackupRange,
) -> Result<Reached, ReadError> {
    let segments = archive.segments();
    let mut number = segments.number(backup.start);
    loop {
        if inventory.whole_on(history, number).is_none() {
            let tail = archive.beginning_on(history, number).await?;
            if tail.len() < segments.bytes() as usize {
                let at = Lsn(segments.position(number).0 + tail.len() as u64);
                return Ok(Reached { backup: *backup, at, tail });
            }
        }
        number += 1;
    }
}

/// From where on a line can be had without a hole up to the beginning of one backup. WAL in front of it may be there for older backups.
async fn had_from(
    archive: &Archive,
    inventory: &Inventory,
    history: &History,
    backup: &BackupRange,
) -> Result<Lsn, ReadError> {
    let segments = archive.segments();
    let mut number = segments.number(backup.start);
    while let Some(before) = number.checked_sub(1) {
        let is_whole = inventory.whole_on(history, before).is_some()
            || archive.beginning_on(history, before).await?.len() == segments.bytes() as usize;
        if !is_whole {
            break;
        }
        number = before;
    }
    Ok(segments.position(number))
}

/// Where a line ends at the latest, by names. Those of partials are in no inventory; one goes on where the last segment or piece ends.
fn latest(archive: &Archive, inventory: &Inventory, history: &History, from: Lsn) -> Lsn {
    let segments = archive.segments();
    let last = inventory.last_on(history).unwrap_or(0).max(segments.number(from));
    segments.position(last + 2)
}

/// Behind the last record that is whole; none where there is none from the backup's beginning on.
async fn last_record(
    archive: &Archive,
    history: &History,
    reached: &Reached,
) -> Result<Option<Lsn>, VoterError> {
    let segments = archive.segments();
    let first = segments.number(reached.backup.start);
    let last = segments.number(reached.at);
    // A record may be longer than a segment; then it began before.
    let mut back = 1;
    loop {
        let from = last.saturating_sub(back).max(first);
        let mut records = Records::new(archive.system(), segments, from);
        let mut end = None;
        for number in from..last {
            let content = archive.beginning_on(history, number).await?;
            records.read(&content, |record| end = Some(record.end));
        }
        // PostgreSQL reads whole pages: of the last one the rest is zeros, as where it is restored.
        let mut tail = reached.tail.clone();
        tail.resize(segments.bytes() as usize, 0);
        records.read(&tail, |record| end = Some(record.end));
        if end.is_some() || from == first {
            return Ok(end.filter(|end| *end >= reached.backup.stop));
        }
        back *= 4;
    }
}

/// A copy that ends there on a line of history.
fn copy(archive: &Archive, history: &History, end: Lsn) -> Copy {
    let timeline: Timeline = history.timeline_at(Lsn(end.0.saturating_sub(1)));
    let begins = history.legs().map(|leg| (leg.timeline, leg.begin));
    Copy {
        system: Some(archive.system()),
        timeline,
        end: Some(end),
        begins: begins.take_while(|(leg, _)| *leg <= timeline).collect(),
    }
}
