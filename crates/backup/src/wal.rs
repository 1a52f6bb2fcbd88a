//! The WAL archive: segments, what there is of segments that never became complete, and timeline histories.
//!
//! One object for each segment, put once. The same content again is fine, as two nodes may archive one segment; another
//! content under the same name is put into quarantine and reported, and the first one is left as it is. What a segment
//! says of itself in its first page (cluster, position, timeline, segment size) is compared before it is taken.
//!
//! A `.partial` is never taken for its segment, and two of one name are both kept. What there is of a segment that is still
//! being written are pieces ([`Piece`]).
//!
//! Left out: receiving WAL, and reading records; two segments that differ only behind the last record are different here.
//! Hazard: a segment that is taken for another, or that is said to be durable and is not; every backup behind it is lost.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use pgherd_core::types::{Lsn, SystemId, Timeline};
use serde::{Deserialize, Serialize};

use crate::breakage::{Broken, broken};
use crate::container::{Kind, Table, Writer};
use crate::document::{Damage, ReadError, WriteError};
use crate::format::Repository;
use crate::frame::{FrameReader, MAX_FRAME_BYTES};
use crate::hash::Hash;
use crate::name::{Kind as Names, Name, Place};
use crate::receive::Object;
use crate::store::{Failure, Listed, MAX_OBJECT_BYTES, MAX_PAGE, Put, Store, StoreError};

mod history;
mod holes;
pub mod offered;
mod piece;
pub mod records;
mod segment;
mod window;

pub use history::{Fork, History, HistoryError};
pub use holes::{Wanted, missing};
pub use piece::Piece;
#[cfg(test)]
pub(crate) use segment::header as segment_header;
pub use segment::{Segment, SegmentError, Segments};
pub(crate) use window::candidates;
pub use window::{ArchivedFile, BackupRange, Files, Gap, Inventory, Reach, Window, window};

/// The header of a segment's first page.
const MIN_CHECKED_BYTES: usize = 40;
/// PostgreSQL writes some hundred bytes for each timeline.
const MAX_HISTORY_BYTES: usize = 1024 * 1024;

/// What an object of the archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Holds {
    Segment,
    Partial,
    Piece,
    History,
}

/// What a WAL object says of itself in its footer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    holds: Holds,
    system_identifier: SystemId,
    timeline: Timeline,
    /// The first position in it and the first behind it; both zero for a history.
    start: Lsn,
    end: Lsn,
    segment_bytes: u32,
    bytes: u64,
    /// Of the plain content.
    hash: Hash,
}

#[derive(Debug, thiserror::Error)]
pub enum WalError {
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Two servers have written the same WAL, or something else archives into this place.
    #[error("{object} is in {place} already with another content; what came now is kept as \"{quarantine}\"")]
    Conflict { object: String, place: String, quarantine: Name },
    #[error("an object was not made: {why}")]
    Lost { why: String },
    #[error("WAL is missing from {from} on: {segment} is not in {place}")]
    Missing { segment: Segment, from: Lsn, place: String },
}

/// What an archive has of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    Whole(Bytes),
    /// Up to a position, and zeros behind it: recovery ends there.
    Beginning {
        content: Bytes,
        end: Lsn,
    },
}

/// Where the WAL of one cluster is read from: an [`Archive`] of ours, or one that another program keeps.
///
/// What is verified is verified here. [`ReadError::is_absent`] is certain: PostgreSQL ends recovery there.
pub trait Wal: Send + Sync {
    fn system(&self) -> SystemId;
    fn segments(&self) -> Segments;
    /// The content of a segment.
    fn segment(&self, segment: Segment) -> impl Future<Output = Result<Bytes, ReadError>> + Send;
    /// What there is of a segment: all of it, or of the last one a beginning.
    fn fetch(&self, segment: Segment) -> impl Future<Output = Result<Fetched, ReadError>> + Send;
    /// A timeline's history, and the bytes of its file.
    fn history_file(
        &self,
        timeline: Timeline,
    ) -> impl Future<Output = Result<(History, Bytes), ReadError>> + Send;
}

impl Wal for Archive {
    fn system(&self) -> SystemId {
        Archive::system(self)
    }

    fn segments(&self) -> Segments {
        Archive::segments(self)
    }

    async fn segment(&self, segment: Segment) -> Result<Bytes, ReadError> {
        Archive::segment(self, segment).await
    }

    async fn fetch(&self, segment: Segment) -> Result<Fetched, ReadError> {
        Archive::fetch(self, segment).await
    }

    async fn history_file(&self, timeline: Timeline) -> Result<(History, Bytes), ReadError> {
        Archive::history_file(self, timeline).await
    }
}

/// How archiving something came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Archived {
    Created,
    /// It was there, with the same content.
    Same,
}

/// The proof that every segment of a range, and the history of its timeline, is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProvenWal {
    pub(crate) system: SystemId,
    pub(crate) segments: Segments,
    pub(crate) history: History,
    pub(crate) start: Lsn,
    pub(crate) stop: Lsn,
}

/// An object of the archive that was not put yet.
struct Prepared {
    name: Name,
    /// PostgreSQL's name of what is in it.
    file: String,
    about: About,
    sealed: Bytes,
}

/// The WAL of one cluster in a repository.
#[derive(Clone, Debug)]
pub struct Archive {
    repository: Repository,
    place: Place,
    segments: Segments,
}

impl Archive {
    pub fn new(repository: &Repository, system: SystemId, segments: Segments) -> Archive {
        Archive { repository: repository.clone(), place: Place(system), segments }
    }

    pub fn system(&self) -> SystemId {
        self.place.0
    }

    pub fn segments(&self) -> Segments {
        self.segments
    }

    /// For somebody who has a thread of his own; see [`Store::on_own_thread`].
    #[must_use]
    pub fn on_own_thread(&self) -> Archive {
        Archive { repository: self.repository.on_own_thread(), ..self.clone() }
    }

    pub(crate) fn store(&self) -> &Store {
        self.repository.store()
    }

    /// What a receiver wants to be put. Compressing and encrypting a segment takes a processor for a tenth of a second, so that
    /// is done where it holds up nobody.
    pub async fn put(&self, object: &Object) -> Result<Archived, WalError> {
        let (this, moved) = (self.clone(), object.clone());
        let preparing = move || match &moved {
            Object::Segment { segment, content } => this.segment_of(*segment, content),
            Object::Partial { segment, content } => this.partial_of(*segment, content),
            Object::Piece { segment, from, content } => this.piece_of(*segment, *from, content),
            Object::History { timeline, content } => this.history_of(*timeline, content),
        };
        let prepared = match tokio::task::spawn_blocking(preparing).await {
            Ok(prepared) => prepared?,
            Err(lost) => return Err(WalError::Lost { why: lost.to_string() }),
        };
        self.archive(prepared, object.content()).await
    }

    /// A complete segment.
    pub async fn put_segment(&self, segment: Segment, content: &[u8]) -> Result<Archived, WalError> {
        self.archive(self.segment_of(segment, content)?, content).await
    }

    /// The beginning of a segment that will not be completed on its timeline. Padding behind it may be left out.
    pub async fn put_partial(&self, segment: Segment, content: &[u8]) -> Result<Archived, WalError> {
        self.archive(self.partial_of(segment, content)?, content).await
    }

    /// A timeline's history, as PostgreSQL writes it. It never changes and is never deleted.
    pub async fn put_history(&self, timeline: Timeline, content: &[u8]) -> Result<Archived, WalError> {
        self.archive(self.history_of(timeline, content)?, content).await
    }

    fn segment_of(&self, segment: Segment, content: &[u8]) -> Result<Prepared, WalError> {
        self.segments.check(segment, self.place.0, content, true)?;
        let file = self.segments.file_name(segment);
        let name = self.place.wal(segment.timeline, &file);
        self.prepare(name, file, self.about(Holds::Segment, segment, content), content)
    }

    fn partial_of(&self, segment: Segment, content: &[u8]) -> Result<Prepared, WalError> {
        self.segments.check(segment, self.place.0, content, false)?;
        let file = self.segments.file_name(segment);
        let about = self.about(Holds::Partial, segment, content);
        let name = self.place.partial(segment.timeline, &file, &about.hash);
        self.prepare(name, file, about, content)
    }

    fn piece_of(&self, segment: Segment, from: u32, content: &[u8]) -> Result<Prepared, WalError> {
        let (bytes, wanted) = (from as usize + content.len(), self.segments.bytes());
        if content.is_empty() || bytes > wanted as usize {
            return Err(SegmentError::Length { segment, bytes, wanted }.into());
        }
        if from == 0 && content.len() >= MIN_CHECKED_BYTES {
            self.segments.check(segment, self.place.0, content, false)?;
        }
        let piece = Piece { segment, from, to: bytes as u32 };
        let about = self.about_piece(piece, content);
        self.prepare(piece.name(self.place, self.segments), self.segments.file_name(segment), about, content)
    }

    fn about_piece(&self, piece: Piece, content: &[u8]) -> About {
        let at = |offset: u32| Lsn(self.segments.start(piece.segment).0 + u64::from(offset));
        let about = self.about(Holds::Piece, piece.segment, content);
        About { start: at(piece.from), end: at(piece.to), ..about }
    }

    fn history_of(&self, timeline: Timeline, content: &[u8]) -> Result<Prepared, WalError> {
        if content.len() > MAX_HISTORY_BYTES {
            return Err(HistoryError::TooLong { timeline, bytes: content.len() }.into());
        }
        History::parse(timeline, content)?;
        let about = About {
            holds: Holds::History,
            system_identifier: self.place.0,
            timeline,
            start: Lsn::ZERO,
            end: Lsn::ZERO,
            segment_bytes: self.segments.bytes(),
            bytes: content.len() as u64,
            hash: Hash::of(content),
        };
        self.prepare(self.place.history(timeline), format!("{:08X}.history", timeline.0), about, content)
    }

    /// The content of a segment, verified. [`ReadError::is_absent`] is certain.
    pub async fn segment(&self, segment: Segment) -> Result<Bytes, ReadError> {
        let name = self.place.wal(segment.timeline, &self.segments.file_name(segment));
        let (about, content) = self.read(&name).await?;
        let wanted = self.about_hashed(Holds::Segment, segment, content.len() as u64, about.hash);
        self.compare(&name, &about, &wanted)?;
        Ok(content.into())
    }

    /// That a segment is stored as it was, from the hashes of what is stored: nothing is decompressed.
    pub async fn stored(&self, segment: Segment) -> Result<(), ReadError> {
        let name = self.place.wal(segment.timeline, &self.segments.file_name(segment));
        let (_, table) = self.object(&name).await?;
        let about = self.parse(&name, &table)?;
        let bytes = self.segments.bytes().into();
        let wanted = self.about_hashed(Holds::Segment, segment, bytes, about.hash);
        self.compare(&name, &about, &wanted)
    }

    /// What there is of a segment: all of it, or what its pieces have, where nothing lies behind them. In front of anything else
    /// a segment that is not complete is a hole, and absent.
    pub async fn fetch(&self, segment: Segment) -> Result<Fetched, ReadError> {
        let absent = match self.segment(segment).await {
            Err(absent) if absent.is_absent() => absent,
            other => return other.map(Fetched::Whole),
        };
        let (pieces, is_last) = self.pieces_of(segment).await?;
        let way = piece::joined(&pieces);
        let Some(last) = way.last().filter(|_| is_last) else { return Err(absent) };
        let end = Lsn(self.segments.start(segment).0 + u64::from(last.to));
        let mut content = vec![0; self.segments.bytes() as usize];
        for piece in way {
            let part = self.content_of(piece).await?;
            content[piece.from as usize..piece.to as usize].copy_from_slice(&part);
        }
        Ok(Fetched::Beginning { content: content.into(), end })
    }

    /// What there is of a segment from its beginning on, whatever lies behind it: for somebody who goes up to the first hole and no
    /// further. Nothing, where nothing is there.
    pub async fn beginning(&self, segment: Segment) -> Result<Vec<u8>, ReadError> {
        // In this order: a piece that goes meanwhile has its segment by then.
        let pieces = self.all_pieces_of(segment).await?;
        match self.segment(segment).await {
            Ok(whole) => return Ok(whole.into()),
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error),
        }
        let mut content = Vec::new();
        for piece in piece::joined(&pieces) {
            let part = self.content_of(piece).await?;
            content.truncate(piece.from as usize);
            content.extend_from_slice(&part);
        }
        for ended in self.partials_of(segment).await? {
            if ended.len() > content.len() {
                content = ended;
            }
        }
        Ok(content)
    }

    /// The same on a line of history, where a newer timeline's file repeats what older ones have in front of a fork.
    pub async fn beginning_on(&self, history: &History, number: u64) -> Result<Vec<u8>, ReadError> {
        let (whole, start) = (self.segments.bytes() as usize, self.segments.position(number));
        let mut content = Vec::new();
        for file in candidates(history, self.segments, number) {
            let mut part = self.beginning(file.segment).await?;
            if let Some(until) = file.until {
                part.truncate((until.0 - start.0) as usize);
            }
            if part.len() > content.len() {
                content = part;
            }
            if content.len() == whole {
                break;
            }
        }
        Ok(content)
    }

    /// Deletes the pieces of a segment that is there itself; a collection would do it days later, and they are many where each commit made one.
    pub async fn clear_pieces(&self, segment: Segment) -> Result<(), ReadError> {
        let store = self.repository.store();
        store.head(&self.place.wal(segment.timeline, &self.segments.file_name(segment))).await?;
        for piece in self.all_pieces_of(segment).await? {
            store.delete(&piece.name(self.place, self.segments)).await?;
        }
        Ok(())
    }

    async fn content_of(&self, piece: Piece) -> Result<Vec<u8>, ReadError> {
        let name = piece.name(self.place, self.segments);
        let (about, part) = self.read(&name).await?;
        let bytes = u64::from(piece.to - piece.from);
        let wanted = About { hash: about.hash, bytes, ..self.about_piece(piece, &part) };
        self.compare(&name, &about, &wanted)?;
        Ok(part)
    }

    /// The ends of a timeline that are there of this segment: two that died in it may have left two.
    async fn partials_of(&self, segment: Segment) -> Result<Vec<Vec<u8>>, ReadError> {
        let (store, file) = (self.repository.store(), self.segments.file_name(segment));
        let mut contents = Vec::new();
        for listed in store.list_all(&self.place.all(Names::Partials)).await? {
            if listed.name.last().split('-').next() != Some(&file) {
                continue;
            }
            let (about, content) = self.read(&listed.name).await?;
            let wanted = self.about_hashed(Holds::Partial, segment, content.len() as u64, about.hash);
            self.compare(&listed.name, &about, &wanted)?;
            contents.push(content);
        }
        Ok(contents)
    }

    async fn all_pieces_of(&self, segment: Segment) -> Result<Vec<Piece>, ReadError> {
        let store = self.repository.store();
        let mut pieces = Vec::new();
        // No piece ends where it begins, so this name comes before all of them.
        let mut after = self.place.piece(segment.timeline, &self.segments.file_name(segment), 0, 0);
        loop {
            let page = store.list(&self.place.all(Names::Pieces), Some(&after), MAX_PAGE).await?;
            for listed in &page.objects {
                let piece = self.listed_piece(&listed.name)?;
                if piece.segment != segment {
                    return Ok(pieces);
                }
                pieces.push(piece);
            }
            match page.objects.last() {
                Some(last) if page.more => after = last.name.clone(),
                _ => return Ok(pieces),
            }
        }
    }

    /// The pieces of a segment, and whether nothing of its timeline or a later one lies behind it.
    async fn pieces_of(&self, segment: Segment) -> Result<(Vec<Piece>, bool), ReadError> {
        let store = self.repository.store();
        let file = self.segments.file_name(segment);
        let (mut pieces, mut is_last) = (Vec::new(), true);
        let mut after = self.place.wal(segment.timeline, &file);
        while is_last {
            let page = store.list(&self.place.all(Names::Wal), Some(&after), MAX_PAGE).await?;
            let is_behind = |listed: &Listed| {
                let there = self.segments.parse(listed.name.last());
                there.is_some_and(|there| there.number > segment.number)
            };
            is_last = !page.objects.iter().any(is_behind);
            match page.objects.last() {
                Some(last) if page.more => after = last.name.clone(),
                _ => break,
            }
        }
        // No piece ends where it begins, so this name comes before all of them.
        let mut after = self.place.piece(segment.timeline, &file, 0, 0);
        loop {
            let page = store.list(&self.place.all(Names::Pieces), Some(&after), MAX_PAGE).await?;
            for listed in &page.objects {
                let piece = self.listed_piece(&listed.name)?;
                if piece.segment == segment {
                    pieces.push(piece);
                }
                is_last &= piece.segment.number <= segment.number;
            }
            match page.objects.last() {
                Some(last) if page.more && is_last => after = last.name.clone(),
                _ => return Ok((pieces, is_last)),
            }
        }
    }

    fn listed_piece(&self, name: &Name) -> Result<Piece, ReadError> {
        Piece::parse(name, self.place, self.segments).ok_or_else(|| {
            let what = "it has no name of a piece of a segment of this size".to_owned();
            ReadError::damaged(self.repository.store(), name, Damage::Malformed { what })
        })
    }

    pub async fn history(&self, timeline: Timeline) -> Result<History, ReadError> {
        Ok(self.history_file(timeline).await?.0)
    }

    /// A timeline's history, and the bytes of its file.
    pub async fn history_file(&self, timeline: Timeline) -> Result<(History, Bytes), ReadError> {
        let name = self.place.history(timeline);
        let (about, content) = self.read(&name).await?;
        let damaged = |damage| ReadError::damaged(self.repository.store(), &name, damage);
        if about.holds != Holds::History
            || about.timeline != timeline
            || about.system_identifier != self.place.0
        {
            return Err(damaged(Damage::OtherObject { wanted: name.to_string() }));
        }
        let history = History::parse(timeline, &content)
            .map_err(|error| damaged(Damage::malformed(error.to_string())))?;
        Ok((history, content.into()))
    }

    /// Shows that all segments from `start` to `stop` on `timeline` are there, with its history. Header and footer of
    /// each object are read: an object is durable as a whole once it has a name.
    pub async fn prove(&self, timeline: Timeline, start: Lsn, stop: Lsn) -> Result<ProvenWal, WalError> {
        let history = match timeline {
            Timeline(1) => History::first(),
            timeline => self.history(timeline).await?,
        };
        let protection = self.repository.protection();
        for segment in self.segments.covering(timeline, start, stop) {
            let name = self.place.wal(timeline, &self.segments.file_name(segment));
            let table = match Table::read(Kind::Wal, &name, protection, self.repository.store()).await {
                Ok(table) => table,
                Err(error) if error.is_absent() => {
                    if broken(Broken::ManifestBeforeWal) {
                        continue;
                    }
                    let from = self.segments.start(segment).max(start);
                    let place = self.repository.store().place().to_owned();
                    return Err(WalError::Missing { segment, from, place });
                }
                Err(error) => return Err(error.into()),
            };
            let about = self.parse(&name, &table)?;
            let wanted = About {
                holds: Holds::Segment,
                system_identifier: self.place.0,
                timeline,
                start: self.segments.start(segment),
                end: self.segments.end(segment),
                segment_bytes: self.segments.bytes(),
                bytes: u64::from(self.segments.bytes()),
                hash: about.hash,
            };
            self.compare(&name, &about, &wanted)?;
        }
        Ok(ProvenWal { system: self.place.0, segments: self.segments, history, start, stop })
    }

    /// What is there, by names. Pieces are listed before segments: one that goes meanwhile has its segment in the later listing.
    pub async fn inventory(&self) -> Result<Inventory, ReadError> {
        let store = self.repository.store();
        let mut inventory = Inventory::new(self.segments);
        let mut pieces: BTreeMap<Segment, Vec<Piece>> = BTreeMap::new();
        for listed in store.list_all(&self.place.all(Names::Pieces)).await? {
            let piece = self.listed_piece(&listed.name)?;
            pieces.entry(piece.segment).or_default().push(piece);
        }
        let all = self.place.all(Names::Wal);
        let mut after: Option<Name> = None;
        loop {
            let page = store.list(&all, after.as_ref(), MAX_PAGE).await?;
            for listed in &page.objects {
                let file = listed.name.last();
                let segment = self.segments.parse(file).filter(|segment| {
                    self.place.wal(segment.timeline, &self.segments.file_name(*segment)) == listed.name
                });
                let segment = segment.ok_or_else(|| {
                    let what = "it has no name of a segment of this size".to_owned();
                    ReadError::damaged(store, &listed.name, Damage::Malformed { what })
                })?;
                inventory.add(segment);
            }
            after = page.objects.last().map(|last| last.name.clone()).or(after);
            if !page.more {
                break;
            }
        }
        // Of a segment that is there they are garbage.
        pieces.retain(|segment, _| !inventory.has(*segment));
        for pieces in pieces.values() {
            inventory.add_pieces(pieces);
        }
        for listed in store.list_all(&self.place.all(Names::Histories)).await? {
            let timeline = u32::from_str_radix(listed.name.last(), 16).ok().map(Timeline);
            let timeline = timeline.filter(|timeline| self.place.history(*timeline) == listed.name);
            let timeline = timeline.ok_or_else(|| {
                let what = "it has no name of a history".to_owned();
                ReadError::damaged(store, &listed.name, Damage::Malformed { what })
            })?;
            inventory.add_history(self.history(timeline).await?);
        }
        Ok(inventory)
    }

    /// The segments of which the end of a timeline is there.
    pub async fn ends(&self) -> Result<BTreeSet<Segment>, ReadError> {
        let listed = self.repository.store().list_all(&self.place.all(Names::Partials)).await?;
        let segment = |listed: &Listed| self.segments.parse(listed.name.last().split('-').next()?);
        Ok(listed.iter().filter_map(segment).collect())
    }

    fn about(&self, holds: Holds, segment: Segment, content: &[u8]) -> About {
        self.about_hashed(holds, segment, content.len() as u64, Hash::of(content))
    }

    fn about_hashed(&self, holds: Holds, segment: Segment, bytes: u64, hash: Hash) -> About {
        let start = self.segments.start(segment);
        About {
            holds,
            system_identifier: self.place.0,
            timeline: segment.timeline,
            start,
            end: Lsn(start.0 + bytes),
            segment_bytes: self.segments.bytes(),
            bytes,
            hash,
        }
    }

    fn prepare(&self, name: Name, file: String, about: About, content: &[u8]) -> Result<Prepared, WalError> {
        let sealed = self.seal(&name, &about, content)?;
        Ok(Prepared { name, file, about, sealed })
    }

    async fn archive(&self, prepared: Prepared, content: &[u8]) -> Result<Archived, WalError> {
        let Prepared { name, file, about, sealed } = prepared;
        match self.repository.store().put(&name, sealed).await {
            Ok(Put::Created) => return Ok(Archived::Created),
            Ok(Put::Same) => return Ok(Archived::Same),
            Err(error) if error.failure == Failure::Present => {}
            Err(error) => return Err(WriteError::from(error).into()),
        }
        // Compressed by another version or encrypted with another salt, the same content looks different. If the one that
        // is there cannot be read, that is the error: it may be the only copy, and is no reason to say that all is well.
        let (there, _) = self.read(&name).await?;
        if there == about || broken(Broken::WalOverwritten) {
            return Ok(Archived::Same);
        }
        let quarantine = self.place.quarantine(&file, &about.hash);
        let sealed = self.seal(&quarantine, &about, content)?;
        match self.repository.store().put(&quarantine, sealed).await {
            Ok(_) => {}
            // It came before; its name is made of its content.
            Err(error) if error.failure == Failure::Present => {}
            Err(error) => return Err(WriteError::from(error).into()),
        }
        let place = self.repository.store().place().to_owned();
        Err(WalError::Conflict { object: file, place, quarantine })
    }

    fn seal(&self, name: &Name, about: &About, content: &[u8]) -> Result<Bytes, WriteError> {
        let refuse = |damage| WriteError::refused(name, damage);
        let mut writer =
            Writer::new(Kind::Wal, name.clone(), self.repository.protection()).map_err(refuse)?;
        for piece in content.chunks(MAX_FRAME_BYTES) {
            writer.push(piece).map_err(refuse)?;
        }
        let about =
            serde_json::to_vec(about).map_err(|error| refuse(Damage::malformed(error.to_string())))?;
        Ok(writer.finish(&about).map_err(refuse)?.bytes)
    }

    /// A whole object, as it was stored.
    async fn object(&self, name: &Name) -> Result<(Bytes, Table), ReadError> {
        let (store, protection) = (self.repository.store(), self.repository.protection());
        let bytes = store.read(name, MAX_OBJECT_BYTES).await?;
        match Table::of_whole(Kind::Wal, name, protection, &bytes) {
            Ok(table) => Ok((bytes, table)),
            Err(damage) => Err(ReadError::damaged(store, name, damage)),
        }
    }

    async fn read(&self, name: &Name) -> Result<(About, Vec<u8>), ReadError> {
        let damaged = |damage| ReadError::damaged(self.repository.store(), name, damage);
        let (bytes, table) = self.object(name).await?;
        let about = self.parse(name, &table)?;
        let mut content = Vec::with_capacity(about.bytes as usize);
        let mut frames = FrameReader::default();
        for number in 0..table.frames().len() as u32 {
            content.extend(table.open_in(number, &bytes, &mut frames).map_err(damaged)?);
        }
        if content.len() as u64 != about.bytes || Hash::of(&content) != about.hash {
            return Err(damaged(Damage::HashDiffers));
        }
        Ok((about, content))
    }

    fn parse(&self, name: &Name, table: &Table) -> Result<About, ReadError> {
        let damaged = |damage| ReadError::damaged(self.repository.store(), name, damage);
        let about: About = serde_json::from_slice(&table.extra)
            .map_err(|error| damaged(Damage::malformed(error.to_string())))?;
        let content: u64 = table.frames().iter().map(|frame| u64::from(frame.plain)).sum();
        match content == about.bytes {
            true => Ok(about),
            false => Err(damaged(Damage::malformed("its frames are not as long as it says"))),
        }
    }

    fn compare(&self, name: &Name, about: &About, wanted: &About) -> Result<(), ReadError> {
        if about == wanted {
            return Ok(());
        }
        let damage = Damage::OtherObject { wanted: name.to_string() };
        Err(ReadError::damaged(self.repository.store(), name, damage))
    }
}

#[cfg(test)]
mod tests;
