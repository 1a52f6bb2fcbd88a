//! Contents of files in packs: frames of 8 KiB pages, written as a stream and read verified.
//!
//! A pack is closed at [`TARGET_BYTES`] and put at once. A frame holds a run of pages of one file, or several small files.
//! Where a file's pages are is a list of [`Run`]s from its first page to its last; those that did not change since the
//! parent are runs in the parent's packs.
//!
//! A writer holds one pack, one frame and one shared frame in memory, however large files are and however many. Several
//! writers can work beside each other: numbers of packs come from one counter.
//!
//! Left out: which files there are (`map`), and which pages changed. Hazard: pages that come back at another place, or of
//! another file. A run says pack, frame and position; the manifest has the hash of each pack, so what a run says is read
//! from the object that was meant or not at all.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::container::{Kind, Reserved, Table, Writer};
use crate::document::{Damage, ReadError, WriteError};
use crate::format::Repository;
use crate::frame::{FrameReader, MAX_FRAME_BYTES};
use crate::hash::{Hash, Hashing};
use crate::map::{Change, Changes, Entry};
use crate::name::{BackupId, Name, Place};
use crate::store::MAX_OBJECT_BYTES;

/// PostgreSQL's page. Files of another page size are read in the same steps, which then are halves or parts of a page.
pub const PAGE_BYTES: usize = 8192;
/// Pages of one frame in a full backup. Larger frames compress hardly better, and a restore of one page reads all of it.
pub const FULL_FRAME_PAGES: usize = MAX_FRAME_BYTES / PAGE_BYTES;
/// In an incremental backup, where what changed lies scattered.
pub const INCREMENTAL_FRAME_PAGES: usize = 32;
/// A pack is closed when it has so many bytes; one frame and the footer come on top, which stays below 64 MiB.
pub const TARGET_BYTES: usize = 48 * 1024 * 1024;
/// And when it has so many frames: millions of tiny files share frames, but runs of single pages do not.
const TARGET_FRAMES: usize = 32_768;
/// Files below this share frames.
const SMALL_BYTES: usize = 128 * 1024;
/// In an incremental backup parts of a file below half of this share frames of so many bytes: alone they would compress badly, and a restore
/// of one page reads all of its frame.
const SCATTERED_BYTES: usize = 128 * 1024;
/// Tables of packs that a reader keeps. One is some 50 kB; a restore reads packs in their order.
const KEPT_TABLES: usize = 64;
/// Frames that a reader keeps. Neighbouring small files share frames, and as many writers as took the backup have filled them in turn; the
/// pages of a large file can lie scattered over the frames of a month's backups.
const KEPT_FRAMES: usize = 128;
/// Bytes of them, together.
const KEPT_BYTES: usize = 24 * 1024 * 1024;

/// A pack of some backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId {
    pub backup: BackupId,
    pub number: u32,
}

/// Some pages of a file that lie in one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub pages: u32,
    pub pack: PackId,
    pub frame: u32,
    /// Where the pages begin in the content of the frame, in bytes.
    pub at: u32,
}

/// The part of `runs` for `pages` pages from `first` on, with the frames they are in.
pub fn part_of(runs: &[Run], first: u64, pages: u64) -> Vec<Run> {
    let end = first.saturating_add(pages);
    let mut part = Vec::new();
    let mut begin = 0;
    for run in runs {
        let next = begin + u64::from(run.pages);
        let (from, to) = (first.max(begin), end.min(next));
        if from < to {
            let skipped = ((from - begin) as u32).saturating_mul(PAGE_BYTES as u32);
            part.push(Run { pages: (to - from) as u32, at: run.at.saturating_add(skipped), ..*run });
        }
        begin = next;
    }
    part
}

/// A pack that is durable in the repository; only writing one makes this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackEntry {
    pub number: u32,
    pub bytes: u64,
    pub hash: Hash,
}

/// The proof that a backup's packs are durable, by which its manifest may name them.
#[derive(Debug)]
pub struct DurablePacks {
    pub(crate) backup: BackupId,
    pub(crate) packs: Vec<PackEntry>,
}

/// Writes contents of files into packs of one backup.
pub struct PackWriter {
    repository: Repository,
    place: Place,
    backup: BackupId,
    numbers: Arc<AtomicU32>,
    frame_bytes: usize,
    target: usize,
    open: Option<Open>,
    durable: Vec<PackEntry>,
}

struct Open {
    writer: Writer,
    id: PackId,
    /// Small files that have their places in a frame, and not been written yet.
    shared: Vec<u8>,
    slot: Option<Reserved>,
}

/// Where a file's content went, for its entry in the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    pub size: u64,
    /// Of the whole content; none where a part of it was kept unread.
    pub hash: Option<Hash>,
    pub runs: Vec<Run>,
    pub changes: Vec<Change>,
}

/// Pages that are the same as in the parent: what is known of them.
#[derive(Clone, Copy, Debug)]
pub enum Kept<'a> {
    /// They were read, and compared by these hashes.
    Read(&'a [u8], &'a [Change]),
    /// They were not read; these are the parent's hashes, of whole groups.
    Unread(&'a [Change]),
    /// They were not read, and what lies beside them in their group was changed.
    Unknown,
}

impl PackWriter {
    pub(crate) fn new(
        repository: Repository,
        place: Place,
        backup: BackupId,
        numbers: Arc<AtomicU32>,
        frame_pages: usize,
    ) -> PackWriter {
        PackWriter {
            repository,
            place,
            backup,
            numbers,
            frame_bytes: frame_pages.clamp(1, FULL_FRAME_PAGES) * PAGE_BYTES,
            target: TARGET_BYTES,
            open: None,
            durable: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(crate) fn with_target(mut self, bytes: usize) -> PackWriter {
        self.target = bytes;
        self
    }

    /// Begins a file. Files are written one after the other.
    pub fn file(&mut self) -> FileWriter<'_> {
        let changes = Changes::new(self.repository.change_key());
        FileWriter {
            packs: self,
            buffer: Vec::new(),
            size: 0,
            content: Hashing::default(),
            unread: false,
            has_kept: false,
            runs: Vec::new(),
            changes,
        }
    }

    /// Puts the last pack; all of them are durable then.
    pub async fn finish(mut self) -> Result<DurablePacks, WriteError> {
        self.close().await?;
        Ok(DurablePacks { backup: self.backup, packs: self.durable })
    }

    fn open(&mut self) -> Result<&mut Open, WriteError> {
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                let number = self.numbers.fetch_add(1, Ordering::Relaxed);
                let id = PackId { backup: self.backup, number };
                let name = self.place.pack(self.backup, number);
                let writer = Writer::new(Kind::Pack, name.clone(), self.repository.protection())
                    .map_err(|damage| WriteError::refused(&name, damage))?
                    .expecting(self.target + 2 * MAX_FRAME_BYTES);
                Open { writer, id, shared: Vec::new(), slot: None }
            }
        };
        Ok(self.open.insert(open))
    }

    /// A frame of its own.
    async fn push(&mut self, content: &[u8]) -> Result<Run, WriteError> {
        let open = self.open()?;
        let id = open.id;
        let frame =
            open.writer.push(content).map_err(|damage| WriteError::refused(open.writer.name(), damage))?;
        self.close_if_full().await?;
        Ok(Run { pages: pages_of(content.len() as u64) as u32, pack: id, frame, at: 0 })
    }

    /// A place in a frame with others, if that has no more than `most` bytes then.
    async fn share(&mut self, content: &[u8], most: usize) -> Result<Run, WriteError> {
        if self.open()?.shared.len() + content.len() > most {
            self.open()?.flush()?;
            self.close_if_full().await?;
        }
        let open = self.open()?;
        let slot = match open.slot.take() {
            Some(slot) => slot,
            None => open.writer.reserve(),
        };
        let frame = slot.number();
        open.slot = Some(slot);
        let at = open.shared.len() as u32;
        open.shared.extend_from_slice(content);
        Ok(Run { pages: pages_of(content.len() as u64) as u32, pack: open.id, frame, at })
    }

    async fn close_if_full(&mut self) -> Result<(), WriteError> {
        let full = self.open.as_ref().is_some_and(|open| {
            open.writer.stored() + open.shared.len() >= self.target || open.writer.frames() >= TARGET_FRAMES
        });
        if full { self.close().await } else { Ok(()) }
    }

    async fn close(&mut self) -> Result<(), WriteError> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        open.flush()?;
        let name = open.writer.name().clone();
        let sealed = open.writer.finish(&[]).map_err(|damage| WriteError::refused(&name, damage))?;
        let (bytes, hash) = (sealed.bytes.len() as u64, sealed.hash);
        self.repository.store().put(&name, sealed.bytes).await?;
        self.durable.push(PackEntry { number: open.id.number, bytes, hash });
        Ok(())
    }
}

impl Open {
    fn flush(&mut self) -> Result<(), WriteError> {
        let Some(slot) = self.slot.take() else { return Ok(()) };
        let filled = self.writer.fill(slot, &self.shared);
        self.shared.clear();
        filled.map_err(|damage| WriteError::refused(self.writer.name(), damage))
    }
}

/// One file on its way into packs.
pub struct FileWriter<'w> {
    packs: &'w mut PackWriter,
    /// Less than a frame.
    buffer: Vec<u8>,
    size: u64,
    content: Hashing,
    unread: bool,
    has_kept: bool,
    runs: Vec<Run>,
    changes: Changes,
}

impl FileWriter<'_> {
    /// The next bytes of the file.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<(), WriteError> {
        self.content.update(bytes);
        self.changes.update(bytes);
        self.size += bytes.len() as u64;
        while !bytes.is_empty() {
            let whole = self.packs.frame_bytes;
            if self.buffer.is_empty() && bytes.len() >= whole {
                // A frame as it comes, which need not be put together first.
                let (now, later) = bytes.split_at(whole);
                let run = self.packs.push(now).await?;
                self.runs.push(run);
                bytes = later;
                continue;
            }
            let room = whole - self.buffer.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == whole {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// The next pages are those of `runs`, of the parent. `bytes` is how many that are: whole pages, except at the end of
    /// the file.
    pub async fn keep(&mut self, runs: &[Run], bytes: u64, kept: Kept<'_>) -> Result<(), WriteError> {
        let pages: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
        let refuse = |this: &Self, what: &str| {
            let name = this.packs.place.pack(this.packs.backup, 0);
            Err(WriteError::refused(&name, Damage::malformed(what)))
        };
        if pages != pages_of(bytes) || !self.size.is_multiple_of(PAGE_BYTES as u64) {
            return refuse(self, "pages that are kept begin inside a page, or are not as many as their runs");
        }
        match kept {
            Kept::Read(content, changes)
                if content.len() as u64 == bytes && self.changes.keep(changes, bytes) =>
            {
                self.content.update(content);
            }
            Kept::Unread(changes) if self.changes.keep(changes, bytes) => self.unread = true,
            Kept::Unknown => {
                self.changes.skip(bytes);
                self.unread = true;
            }
            _ => return refuse(self, "what is known of pages that are kept does not fit their number"),
        }
        self.has_kept = true;
        self.set_down().await?;
        self.size += bytes;
        for run in runs {
            match self.runs.last_mut() {
                // What lies one behind the other in a frame is one run, however it was cut before.
                Some(last)
                    if (last.pack, last.frame) == (run.pack, run.frame)
                        && u64::from(last.at) + u64::from(last.pages) * PAGE_BYTES as u64
                            == u64::from(run.at) =>
                {
                    last.pages += run.pages;
                }
                _ => self.runs.push(*run),
            }
        }
        Ok(())
    }

    /// What was written up to here, before or behind pages that are kept.
    async fn set_down(&mut self) -> Result<(), WriteError> {
        if self.buffer.is_empty() || self.buffer.len() > SCATTERED_BYTES / 2 {
            return self.flush().await;
        }
        let run = self.packs.share(&self.buffer, SCATTERED_BYTES).await?;
        self.buffer.clear();
        self.runs.push(run);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), WriteError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let run = self.packs.push(&self.buffer).await?;
        self.buffer.clear();
        self.runs.push(run);
        Ok(())
    }

    pub async fn finish(mut self) -> Result<Placed, WriteError> {
        if self.runs.is_empty() && !self.buffer.is_empty() && self.buffer.len() < SMALL_BYTES {
            let run = self.packs.share(&self.buffer, MAX_FRAME_BYTES).await?;
            self.runs.push(run);
            self.buffer.clear();
        }
        match self.has_kept {
            true => self.set_down().await?,
            false => self.flush().await?,
        }
        let hash = (!self.unread).then(|| self.content.finish());
        Ok(Placed { size: self.size, hash, runs: self.runs, changes: self.changes.finish() })
    }
}

pub(crate) fn pages_of(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_BYTES as u64)
}

/// Reads contents of files of one backup, from the packs that its manifest names.
pub struct PackReader {
    repository: Repository,
    place: Place,
    packs: BTreeMap<PackId, Hash>,
    tables: BTreeMap<PackId, Arc<Table>>,
    /// The frames that were read last, the latest in front.
    frames: VecDeque<(PackId, u32, Bytes)>,
    reader: FrameReader,
}

impl PackReader {
    pub(crate) fn new(repository: Repository, place: Place, packs: BTreeMap<PackId, Hash>) -> PackReader {
        let (tables, frames, reader) = (BTreeMap::new(), VecDeque::new(), FrameReader::default());
        PackReader { repository, place, packs, tables, frames, reader }
    }

    /// The content of one run, verified. `bytes` is how many of it belong to the file: the last page may be a part.
    pub async fn read(&mut self, run: &Run, bytes: usize) -> Result<Bytes, ReadError> {
        let frame = self.frame(run.pack, run.frame).await?;
        let at = run.at as usize;
        if at.saturating_add(bytes) > frame.len() || pages_of(bytes as u64) != u64::from(run.pages) {
            let what = format!("{bytes} bytes at {at} are not in frame {}", run.frame);
            return Err(self.damaged(run.pack, Damage::malformed(what)));
        }
        Ok(frame.slice(at..at + bytes))
    }

    /// Reads a whole pack and compares what is stored with the hashes that it was stored with, without decompressing it. Says how many bytes.
    pub async fn stored(&self, pack: PackId) -> Result<u64, ReadError> {
        let (hash, name) = (self.hash_of(pack)?, self.name(pack));
        let store = self.repository.store();
        let bytes = store.read(&name, MAX_OBJECT_BYTES).await?;
        let damaged = |damage| ReadError::damaged(store, &name, damage);
        let table =
            Table::of_whole(Kind::Pack, &name, self.repository.protection(), &bytes).map_err(damaged)?;
        match table.hash == hash {
            true => Ok(bytes.len() as u64),
            false => Err(damaged(Damage::OtherObject { wanted: name.to_string() })),
        }
    }

    /// The content of a whole file, piece by piece, each verified. At the end the hash of the whole is compared too: a
    /// reader that wrote the pieces somewhere has to throw them away if this fails.
    pub async fn read_file<E: From<ReadError>>(
        &mut self,
        entry: &Entry,
        mut to: impl AsyncFnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut left = entry.size;
        let mut content = Hashing::default();
        for run in &entry.runs {
            let bytes = left.min(u64::from(run.pages) * PAGE_BYTES as u64);
            let piece = self.read(run, bytes as usize).await?;
            content.update(&piece);
            left -= bytes;
            to(&piece).await?;
        }
        match (entry.hash, entry.runs.first()) {
            (Some(hash), Some(run)) if hash != content.finish() => {
                Err(self.damaged(run.pack, Damage::HashDiffers).into())
            }
            _ => Ok(()),
        }
    }

    async fn frame(&mut self, pack: PackId, frame: u32) -> Result<Bytes, ReadError> {
        let kept = self.frames.iter().position(|(of, number, _)| (*of, *number) == (pack, frame));
        let content = match kept.and_then(|at| self.frames.remove(at)) {
            Some((_, _, content)) => content,
            None => {
                let table = self.table(pack).await?;
                let name = self.name(pack);
                table.fetch(frame, &name, self.repository.store(), &mut self.reader).await?.into()
            }
        };
        self.frames.truncate(KEPT_FRAMES - 1);
        let mut kept_bytes: usize = self.frames.iter().map(|(_, _, content)| content.len()).sum();
        while kept_bytes + content.len() > KEPT_BYTES {
            let Some((_, _, oldest)) = self.frames.pop_back() else { break };
            kept_bytes -= oldest.len();
        }
        self.frames.push_front((pack, frame, content.clone()));
        Ok(content)
    }

    async fn table(&mut self, pack: PackId) -> Result<Arc<Table>, ReadError> {
        if let Some(table) = self.tables.get(&pack) {
            return Ok(Arc::clone(table));
        }
        let hash = self.hash_of(pack)?;
        let name = self.name(pack);
        let (protection, store) = (self.repository.protection(), self.repository.store());
        let table = Table::read_known(Kind::Pack, &name, hash, protection, store).await?;
        if self.tables.len() >= KEPT_TABLES {
            self.tables.pop_first();
        }
        let table = Arc::new(table);
        self.tables.insert(pack, Arc::clone(&table));
        Ok(table)
    }

    fn hash_of(&self, pack: PackId) -> Result<Hash, ReadError> {
        let unknown = || self.damaged(pack, Damage::malformed("the backup's manifest does not name it"));
        self.packs.get(&pack).copied().ok_or_else(unknown)
    }

    fn name(&self, pack: PackId) -> Name {
        self.place.pack(pack.backup, pack.number)
    }

    fn damaged(&self, pack: PackId, damage: Damage) -> ReadError {
        ReadError::damaged(self.repository.store(), &self.name(pack), damage)
    }
}

#[cfg(test)]
mod tests;
