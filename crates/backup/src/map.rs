//! What a base backup consists of: for each file its path, size, mode, and where its pages are.
//!
//! Entries are written and read as a stream in order of paths, so that memory grows with the largest entry (a file of 1
//! GiB has one of some 270 kB), never with the number of files. The stream is cut into frames of map objects; no entry
//! lies in two objects. Paths are bytes, as file systems have them.
//!
//! Each entry has a hash of 64 bits for each 32 KiB of the file, by which the next backup finds what changed. They are keyed
//! with something that users of the database do not know, or somebody could make two contents that look the same.
//!
//! One entry can come late, in a map of its own: PostgreSQL's control file is read last and stands in the middle of the
//! paths, and all entries behind it would have to wait in memory.
//!
//! Left out: which files belong into a backup. Hazard: a file that is missing without a sign, or a path that leads out of
//! the data directory when it is restored. Paths are checked when they are written and when they are read, must grow
//! strictly over all maps of a backup, and the manifest has the number of entries.

use crate::container::{Kind as Layout, Table, Writer};
use crate::document::{Damage, ReadError, WriteError};
use crate::format::Repository;
use crate::frame::FrameReader;
use crate::hash::Hash;
use crate::name::{BackupId, Place};
use crate::pack::{PackId, Placed, Run, pages_of};

use serde::{Deserialize, Serialize};

mod coding;
pub mod sorting;

use coding::{decode, encode};

/// What one change hash covers.
pub const GROUP_BYTES: usize = 32 * 1024;
/// Linux has no longer ones.
pub const MAX_PATH_BYTES: usize = 4096;
/// Content of one frame of a map.
const FRAME_BYTES: usize = 256 * 1024;
/// A map object is closed at so many bytes.
const TARGET_BYTES: usize = 16 * 1024 * 1024;

/// The keyed hash of 32 KiB of a file, for finding changes only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change(pub [u8; 8]);

impl Change {
    /// Of 32 KiB of which only a part was read. It equals no other one, so that they are compared and fetched as changed.
    pub const UNKNOWN: Change = Change([0; 8]);

    /// Whether the two are surely of one content.
    pub fn is_same(self, other: Change) -> bool {
        self == other && self != Change::UNKNOWN
    }
}

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
    /// With what the link says.
    Symlink(Vec<u8>),
}

/// One path of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// From the data directory, without `.` and `..`.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permissions.
    pub mode: u32,
    pub size: u64,
    /// None where a part was kept from the parent without being read.
    pub hash: Option<Hash>,
    pub runs: Vec<Run>,
    pub changes: Vec<Change>,
}

impl Entry {
    pub fn directory(path: impl Into<Vec<u8>>, mode: u32) -> Entry {
        let (runs, changes) = (Vec::new(), Vec::new());
        Entry { path: path.into(), kind: Kind::Directory, mode, size: 0, hash: None, runs, changes }
    }

    pub fn symlink(path: impl Into<Vec<u8>>, target: impl Into<Vec<u8>>) -> Entry {
        Entry { kind: Kind::Symlink(target.into()), ..Entry::directory(path, 0o777) }
    }

    pub fn file(path: impl Into<Vec<u8>>, mode: u32, placed: Placed) -> Entry {
        let Placed { size, hash, runs, changes } = placed;
        Entry { path: path.into(), kind: Kind::File, mode, size, hash, runs, changes }
    }

    fn validate(&self) -> Result<(), Damage> {
        let wrong = |what: &str| {
            let path = String::from_utf8_lossy(&self.path);
            Err(Damage::malformed(format!("{what}, at \"{}\"", path.escape_debug())))
        };
        if !is_path(&self.path) {
            return wrong("a path that leads elsewhere");
        }
        if self.mode > 0o7777 {
            return wrong("permissions that there are not");
        }
        match &self.kind {
            Kind::File => {
                let pages: u64 = self.runs.iter().map(|run| u64::from(run.pages)).sum();
                if pages != pages_of(self.size) || self.runs.iter().any(|run| run.pages == 0) {
                    return wrong("runs that do not cover the file");
                }
                if self.changes.len() as u64 != self.size.div_ceil(GROUP_BYTES as u64) {
                    return wrong("another number of change hashes than the file has groups");
                }
            }
            Kind::Symlink(target) if target.is_empty() || target.len() > MAX_PATH_BYTES => {
                return wrong("a link to nowhere");
            }
            _ if self.size != 0
                || self.hash.is_some()
                || !self.runs.is_empty()
                || !self.changes.is_empty() =>
            {
                return wrong("content of what is no file");
            }
            _ => {}
        }
        Ok(())
    }
}

/// Relative, without parts that mean something to a file system.
fn is_path(path: &[u8]) -> bool {
    let part = |part: &[u8]| !part.is_empty() && part != b"." && part != b".." && !part.contains(&0);
    path.len() <= MAX_PATH_BYTES && path.split(|byte| *byte == b'/').all(part)
}

/// Makes the change hashes of one file.
pub(crate) struct Changes {
    key: [u8; 32],
    group: blake3::Hasher,
    in_group: usize,
    /// Whether a part of the group was not read.
    has_unread: bool,
    done: Vec<Change>,
}

impl Changes {
    pub(crate) fn new(key: [u8; 32]) -> Changes {
        let (group, done) = (blake3::Hasher::new_keyed(&key), Vec::new());
        Changes { key, group, in_group: 0, has_unread: false, done }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(GROUP_BYTES - self.in_group));
            self.group.update(now);
            self.in_group += now.len();
            bytes = later;
            if self.in_group == GROUP_BYTES {
                self.close();
            }
        }
    }

    /// Takes the hashes of `bytes` bytes that were not read. Says whether they begin at a group and are as many as that.
    pub(crate) fn keep(&mut self, changes: &[Change], bytes: u64) -> bool {
        let fits = self.in_group == 0 && changes.len() as u64 == bytes.div_ceil(GROUP_BYTES as u64);
        if fits {
            self.done.extend_from_slice(changes);
        }
        fits
    }

    /// Passes over bytes that were not read; the groups that they are in have no hash.
    pub(crate) fn skip(&mut self, mut bytes: u64) {
        while bytes > 0 {
            let now = bytes.min((GROUP_BYTES - self.in_group) as u64);
            self.has_unread = true;
            self.in_group += now as usize;
            bytes -= now;
            if self.in_group == GROUP_BYTES {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        let hash = self.group.finalize();
        let mut change = [0; 8];
        change.copy_from_slice(&hash.as_bytes()[..8]);
        self.done.push(if self.has_unread { Change::UNKNOWN } else { Change(change) });
        self.group = blake3::Hasher::new_keyed(&self.key);
        (self.in_group, self.has_unread) = (0, false);
    }

    pub(crate) fn finish(mut self) -> Vec<Change> {
        if self.in_group > 0 {
            self.close();
        }
        self.done
    }
}

/// The change hashes of some content, for comparing it with the parent's.
pub fn changes_of(repository: &Repository, content: &[u8]) -> Vec<Change> {
    let mut changes = Changes::new(repository.change_key());
    changes.update(content);
    changes.finish()
}

/// A map object, as a manifest names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapEntry {
    pub number: u32,
    pub bytes: u64,
    pub hash: Hash,
    /// Entries in it.
    pub entries: u64,
}

/// The proof that a backup's maps are durable, with the packs that they refer to.
#[derive(Debug)]
pub struct DurableMaps {
    pub(crate) backup: BackupId,
    pub(crate) maps: Vec<MapEntry>,
    pub(crate) packs: std::collections::BTreeSet<PackId>,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
}

/// Writes entries in order of their paths.
pub struct MapWriter {
    repository: Repository,
    place: Place,
    target: usize,
    open: Option<Writer>,
    /// Of the map that is being written.
    number: u32,
    buffer: Vec<u8>,
    entries: u64,
    before: Option<Vec<u8>>,
    durable: DurableMaps,
}

/// The place of an entry that comes later. A writer whose places are not all filled does not finish.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "maps with an empty place are none"]
pub struct Room {
    number: u32,
    path: Vec<u8>,
}

impl MapWriter {
    pub(crate) fn new(repository: Repository, place: Place, backup: BackupId) -> MapWriter {
        let durable = DurableMaps { backup, maps: Vec::new(), packs: Default::default(), files: 0, bytes: 0 };
        let (open, buffer, before) = (None, Vec::new(), None);
        let target = TARGET_BYTES;
        MapWriter { repository, place, target, open, number: 0, buffer, entries: 0, before, durable }
    }

    #[cfg(test)]
    pub(crate) fn with_target(mut self, bytes: usize) -> MapWriter {
        self.target = bytes;
        self
    }

    pub async fn push(&mut self, entry: &Entry) -> Result<(), WriteError> {
        self.follow(&entry.path)?;
        self.write(entry).await
    }

    /// Puts what there is, so that it is found should nobody come to the end.
    pub async fn settle(&mut self) -> Result<(), WriteError> {
        self.close().await
    }

    /// Leaves a place for the file at `path`, whose entry comes behind others.
    pub async fn leave_room(&mut self, path: &[u8]) -> Result<Room, WriteError> {
        self.follow(path)?;
        self.close().await?;
        let number = self.number;
        self.number += 1;
        Ok(Room { number, path: path.to_vec() })
    }

    pub async fn fill(&mut self, room: Room, entry: &Entry) -> Result<(), WriteError> {
        let name = self.place.map(self.durable.backup, room.number);
        if entry.path != room.path {
            return Err(WriteError::refused(&name, Damage::malformed("the place was left for another path")));
        }
        self.close().await?;
        let next = std::mem::replace(&mut self.number, room.number);
        self.write(entry).await?;
        self.close().await?;
        self.number = next;
        Ok(())
    }

    /// Puts the last map; all of them are durable then.
    pub async fn finish(mut self) -> Result<DurableMaps, WriteError> {
        self.close().await?;
        self.durable.maps.sort_unstable_by_key(|map| map.number);
        if self.durable.maps.len() != self.number as usize {
            let name = self.place.map(self.durable.backup, self.number);
            return Err(WriteError::refused(&name, Damage::malformed("a place was left and not filled")));
        }
        Ok(self.durable)
    }

    /// Paths grow.
    fn follow(&mut self, path: &[u8]) -> Result<(), WriteError> {
        if self.before.as_ref().is_some_and(|before| before.as_slice() >= path) {
            let name = self.place.map(self.durable.backup, self.number);
            return Err(WriteError::refused(&name, Damage::malformed("paths are not in order")));
        }
        self.before = Some(path.to_vec());
        Ok(())
    }

    async fn write(&mut self, entry: &Entry) -> Result<(), WriteError> {
        let name = self.place.map(self.durable.backup, self.number);
        let refuse = |damage| WriteError::refused(&name, damage);
        entry.validate().map_err(refuse)?;
        encode(entry, &mut self.buffer).map_err(refuse)?;
        self.entries += 1;
        if entry.kind == Kind::File {
            self.durable.files += 1;
            self.durable.bytes += entry.size;
        }
        self.durable.packs.extend(entry.runs.iter().map(|run| run.pack));
        if self.open.is_none() {
            let writer = Writer::new(Layout::Map, name.clone(), self.repository.protection());
            self.open = Some(writer.map_err(refuse)?);
        }
        let Some(open) = &mut self.open else { return Ok(()) };
        while self.buffer.len() >= FRAME_BYTES {
            open.push(&self.buffer[..FRAME_BYTES]).map_err(refuse)?;
            self.buffer.drain(..FRAME_BYTES);
        }
        if open.stored() + self.buffer.len() >= self.target { self.close().await } else { Ok(()) }
    }

    async fn close(&mut self) -> Result<(), WriteError> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        let name = open.name().clone();
        if !self.buffer.is_empty() {
            open.push(&self.buffer).map_err(|damage| WriteError::refused(&name, damage))?;
            self.buffer.clear();
        }
        let sealed = open.finish(&[]).map_err(|damage| WriteError::refused(&name, damage))?;
        let (bytes, hash) = (sealed.bytes.len() as u64, sealed.hash);
        self.repository.store().put(&name, sealed.bytes).await?;
        self.durable.maps.push(MapEntry { number: self.number, bytes, hash, entries: self.entries });
        self.number += 1;
        self.entries = 0;
        Ok(())
    }
}

/// Reads the entries of a backup in order of their paths.
pub struct MapReader {
    repository: Repository,
    place: Place,
    backup: BackupId,
    maps: std::vec::IntoIter<MapEntry>,
    /// Of a backup without a manifest, which would say what has to be there.
    is_unfinished: bool,
    open: Option<Reading>,
    before: Option<Vec<u8>>,
    frames: FrameReader,
}

struct Reading {
    map: MapEntry,
    table: Table,
    next_frame: u32,
    buffer: Vec<u8>,
    /// How much of the buffer is done with.
    read: usize,
    entries: u64,
}

impl MapReader {
    pub(crate) fn new(
        repository: Repository,
        place: Place,
        backup: BackupId,
        maps: Vec<MapEntry>,
    ) -> MapReader {
        let (open, before, frames) = (None, None, FrameReader::default());
        let maps = maps.into_iter();
        MapReader { repository, place, backup, maps, is_unfinished: false, open, before, frames }
    }

    /// Of a backup that was not completed: maps are believed as they are there. One that was never written is passed over, as that of a file that comes last.
    pub(crate) fn unfinished(
        repository: Repository,
        place: Place,
        backup: BackupId,
        numbers: &[u32],
    ) -> MapReader {
        let entry = |number: &u32| MapEntry { number: *number, bytes: 0, hash: Hash([0; 32]), entries: 0 };
        let maps = numbers.iter().map(entry).collect();
        MapReader { is_unfinished: true, ..MapReader::new(repository, place, backup, maps) }
    }

    /// The next entry; none behind the last.
    pub async fn next(&mut self) -> Result<Option<Entry>, ReadError> {
        loop {
            let mut open = match self.open.take() {
                Some(open) => open,
                None => match self.maps.next() {
                    Some(map) => self.begin(map).await?,
                    None => return Ok(None),
                },
            };
            let name = self.place.map(self.backup, open.map.number);
            let damaged = |damage| ReadError::damaged(self.repository.store(), &name, damage);
            if let Some((entry, bytes)) = decode(&open.buffer[open.read..]).map_err(damaged)? {
                open.read += bytes;
                open.entries += 1;
                entry.validate().map_err(damaged)?;
                if self.before.as_ref().is_some_and(|before| *before >= entry.path) {
                    return Err(damaged(Damage::malformed("paths are not in order")));
                }
                self.before = Some(entry.path.clone());
                self.open = Some(open);
                return Ok(Some(entry));
            }
            if open.next_frame as usize == open.table.frames().len() {
                let is_whole = self.is_unfinished || open.entries == open.map.entries;
                if open.read != open.buffer.len() || !is_whole {
                    return Err(damaged(Damage::malformed("it has not as many entries as it should")));
                }
                continue;
            }
            open.buffer.drain(..open.read);
            open.read = 0;
            let store = self.repository.store();
            open.buffer.extend(open.table.fetch(open.next_frame, &name, store, &mut self.frames).await?);
            open.next_frame += 1;
            self.open = Some(open);
        }
    }

    async fn begin(&self, map: MapEntry) -> Result<Reading, ReadError> {
        let name = self.place.map(self.backup, map.number);
        let (store, protection) = (self.repository.store(), self.repository.protection());
        let table = match self.is_unfinished {
            true => Table::read(Layout::Map, &name, protection, store).await?,
            false => Table::read_known(Layout::Map, &name, map.hash, protection, store).await?,
        };
        Ok(Reading { map, table, next_frame: 0, buffer: Vec::new(), read: 0, entries: 0 })
    }
}

/// Entries of which one is asked for after the other, in order of their paths.
pub struct Ahead {
    entries: MapReader,
    next: Option<Entry>,
    is_over: bool,
}

impl Ahead {
    pub fn of(entries: MapReader) -> Ahead {
        Ahead { entries, next: None, is_over: false }
    }

    /// The file at a path, which lies behind those that were asked for before.
    pub async fn file(&mut self, path: &[u8]) -> Result<Option<Entry>, ReadError> {
        while !self.is_over && self.next.as_ref().is_none_or(|next| next.path.as_slice() < path) {
            self.next = self.entries.next().await?;
            self.is_over = self.next.is_none();
        }
        let file = self.next.take_if(|next| next.path == path);
        Ok(file.filter(|file| file.kind == Kind::File))
    }
}

#[cfg(test)]
mod tests;
