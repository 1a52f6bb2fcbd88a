//! WAL that another program has archived, read file by file.
//!
//! ```text
//! pgBackRest   archive/main/15-1/0000000100000000/000000010000000000000003-<SHA-1>.zst
//! Barman       main/wals/0000000100000000/000000010000000000000003, main/incoming/…, main/streaming/….partial
//! ```
//!
//! A segment is believed if its length, what its first page says of itself and, with pgBackRest, its SHA-1 are right.
//!
//! Left out: what either of the two has not archived yet. Hazard: PostgreSQL ends recovery, and promotes, where a segment is said to be absent. So
//! that is said only while the place is there: its `archive.info`, or its directory `wals`; a directory of a disk that is not mounted has neither.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use pgherd_core::types::{Lsn, SystemId, Timeline};

use super::checksum::{Check, sha1};
use super::compressed::{Compression, Recognised};
use super::{ForeignError, Source, barman, is_name, open, pgbackrest};
use crate::document::{Damage, ReadError};
use crate::store::{Doing, Failure, StoreError};
use crate::wal::{Fetched, History, Inventory, Segment, Segments, Wal};

/// PostgreSQL writes some hundred bytes for each timeline.
const MAX_HISTORY_BYTES: u64 = 1024 * 1024;
const HISTORY: &str = ".history";
/// Digits of timeline and log, which name the directories of segments.
const FOLDER_LETTERS: usize = 16;

/// The WAL of one cluster.
#[derive(Clone, Debug)]
pub struct Archive {
    keeper: Keeper,
    system: SystemId,
    segments: Segments,
    /// For people.
    place: PathBuf,
}

#[derive(Clone, Debug)]
enum Keeper {
    /// What says that it is there, and its directories, the newest first: a stanza may have been made anew.
    PgBackRest {
        proof: PathBuf,
        dirs: Vec<PathBuf>,
    },
    Barman {
        server: PathBuf,
    },
}

/// A file that a segment may be in.
struct Candidate {
    path: PathBuf,
    compression: Option<Compression>,
    check: Option<Check>,
}

impl Archive {
    /// Of one cluster among those that the stanza or server had. Blocks.
    pub fn open(source: &Source, system: SystemId, segments: Segments) -> Result<Archive, ForeignError> {
        match source {
            Source::PgBackRest { repository, stanza } => {
                let stanza = match stanza {
                    Some(stanza) if is_name(stanza) => stanza.clone(),
                    Some(stanza) => return Err(unknown(repository, stanza)),
                    None => pgbackrest::only(repository)?,
                };
                let place = repository.join("archive").join(&stanza);
                let of_system = |(_, cluster): &(String, pgbackrest::Cluster)| cluster.system == system;
                let archives = pgbackrest::archives(repository, &stanza)?;
                let dirs: Vec<PathBuf> =
                    archives.into_iter().filter(of_system).map(|(dir, _)| place.join(dir)).collect();
                if dirs.is_empty() {
                    return Err(ForeignError::Unknown { place, what: format!("cluster {system}") });
                }
                let keeper = Keeper::PgBackRest { proof: place.join("archive.info"), dirs };
                Ok(Archive { keeper, system, segments, place })
            }
            Source::Barman { home, server } => {
                let server = match server {
                    Some(server) if is_name(server) => server.clone(),
                    Some(server) => return Err(unknown(home, server)),
                    None => barman::only(home)?,
                };
                let place = home.join(server);
                let wals = place.join("wals");
                fs::read_dir(&wals).map_err(ForeignError::io("list", &wals))?;
                Ok(Archive { keeper: Keeper::Barman { server: place.clone() }, system, segments, place })
            }
        }
    }

    /// What is there, by names and the content of histories. Blocks.
    pub fn inventory(&self) -> Result<Inventory, ReadError> {
        let mut inventory = Inventory::new(self.segments);
        for dir in self.dirs() {
            for name in self.names(&dir)? {
                if let Some(timeline) = name.strip_suffix(HISTORY).and_then(timeline_of) {
                    inventory.add_history(self.read_history(timeline)?.0);
                }
                if name.len() != FOLDER_LETTERS || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    continue;
                }
                for file in self.names(&dir.join(&name))? {
                    if let Some(segment) = self.segment_of(&file).filter(|_| file.starts_with(&name)) {
                        inventory.add(segment);
                    }
                }
            }
        }
        Ok(inventory)
    }

    /// Directories with directories of segments in them.
    fn dirs(&self) -> Vec<PathBuf> {
        match &self.keeper {
            Keeper::PgBackRest { dirs, .. } => dirs.clone(),
            Keeper::Barman { server } => vec![server.join("wals")],
        }
    }

    /// The segment that a file in such a directory has all of.
    fn segment_of(&self, file: &str) -> Option<Segment> {
        match &self.keeper {
            Keeper::PgBackRest { .. } => {
                let (name, _) = file.split_once('-')?;
                self.segments.parse(name)
            }
            Keeper::Barman { .. } => self.segments.parse(file),
        }
    }

    /// Names in a directory; none where there is none.
    fn names(&self, dir: &Path) -> Result<Vec<String>, ReadError> {
        let failed = |error| self.failed(Doing::Listing, dir, error);
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            // Another name is none of WAL.
            names.extend(entry.map_err(failed)?.file_name().into_string().ok());
        }
        Ok(names)
    }

    fn read_segment(&self, segment: Segment) -> Result<Bytes, ReadError> {
        let name = self.segments.file_name(segment);
        let found = match &self.keeper {
            Keeper::PgBackRest { dirs, .. } => {
                let mut found = None;
                for dir in dirs {
                    let dir = dir.join(&name[..FOLDER_LETTERS]);
                    let mut there =
                        self.names(&dir)?.into_iter().filter(|file| self.segment_of(file) == Some(segment));
                    let Some(file) = there.next() else { continue };
                    let path = dir.join(&file);
                    if there.next().is_some() {
                        let what = format!("there are several of segment {name}");
                        return Err(self.damaged(&path, Damage::malformed(what)));
                    }
                    let summed = file
                        .get(name.len() + 1..)
                        .and_then(|rest| Some((sha1(rest.get(..40)?)?, rest.get(40..)?)));
                    let parts =
                        summed.and_then(|(sum, ending)| Some((sum, Compression::of_extension(ending)?)));
                    let (sum, compression) = parts.ok_or_else(|| {
                        self.damaged(&path, Damage::malformed("its name does not say what it should be"))
                    })?;
                    let (compression, check) = (Some(compression), Some(Check::Sha1(sum)));
                    found = Some(Candidate { path, compression, check });
                    break;
                }
                found
            }
            Keeper::Barman { server } => {
                // What was streamed or came by archive_command, and Barman has not put in its place yet.
                let places = [
                    server.join("wals").join(&name[..FOLDER_LETTERS]).join(&name),
                    server.join("incoming").join(&name),
                    server.join("streaming").join(&name),
                ];
                let found = places.into_iter().find(|path| fs::symlink_metadata(path).is_ok());
                found.map(|path| Candidate { path, compression: None, check: None })
            }
        };
        let Some(candidate) = found else { return Err(self.absent(&name)) };
        let content = self.content(&candidate, u64::from(self.segments.bytes()))?;
        let checked = self.segments.check(segment, self.system, &content, true);
        checked.map_err(|error| self.damaged(&candidate.path, Damage::malformed(error.to_string())))?;
        Ok(content.into())
    }

    /// Of the last segment what was streamed of it so far, if nothing is behind it.
    fn read_beginning(&self, segment: Segment, absent: ReadError) -> Result<Fetched, ReadError> {
        let Keeper::Barman { server } = &self.keeper else { return Err(absent) };
        let name = self.segments.file_name(segment);
        let path = server.join("streaming").join(format!("{name}.partial"));
        if fs::symlink_metadata(&path).is_err() {
            return Err(absent);
        }
        let inventory = self.inventory()?;
        if inventory.segments().any(|there| there.number > segment.number) {
            return Err(absent);
        }
        let candidate = Candidate { path, compression: None, check: None };
        let mut content = self.content(&candidate, u64::from(self.segments.bytes()))?;
        // Just made, and nothing of it was written.
        let Some(last) = content.iter().rposition(|byte| *byte != 0) else { return Err(absent) };
        content.resize(self.segments.bytes() as usize, 0);
        let checked = self.segments.check(segment, self.system, &content, true);
        checked.map_err(|error| self.damaged(&candidate.path, Damage::malformed(error.to_string())))?;
        let end = Lsn(self.segments.start(segment).0 + last as u64 + 1);
        Ok(Fetched::Beginning { content: content.into(), end })
    }

    fn read_history(&self, timeline: Timeline) -> Result<(History, Bytes), ReadError> {
        let name = format!("{:08X}{HISTORY}", timeline.0);
        let mut paths: Vec<PathBuf> = self.dirs().iter().map(|dir| dir.join(&name)).collect();
        if let Keeper::Barman { server } = &self.keeper {
            paths.extend(["incoming", "streaming"].map(|dir| server.join(dir).join(&name)));
        }
        let found = paths.into_iter().find(|path| fs::symlink_metadata(path).is_ok());
        let Some(path) = found else { return Err(self.absent(&name)) };
        let content = self
            .content(&Candidate { path: path.clone(), compression: None, check: None }, MAX_HISTORY_BYTES)?;
        let history = History::parse(timeline, &content)
            .map_err(|error| self.damaged(&path, Damage::malformed(error.to_string())))?;
        Ok((history, content.into()))
    }

    fn content(&self, candidate: &Candidate, most: u64) -> Result<Vec<u8>, ReadError> {
        let Candidate { path, compression, check } = candidate;
        let mut opened = open(path).map_err(|error| self.of_file(path, error))?;
        let mut begin = Vec::new();
        let failed = |error| self.failed(Doing::Reading, path, error);
        opened.by_ref().take(16).read_to_end(&mut begin).map_err(failed)?;
        let compression = match (compression, Compression::recognise(&begin)) {
            (Some(compression), _) => *compression,
            (None, Recognised::As(compression)) => compression,
            (None, Recognised::Other(what)) => {
                let what = format!("it is compressed or encrypted by {what}, which pgherd does not read");
                return Err(self.damaged(path, Damage::malformed(what)));
            }
        };
        let from = compression.decoder(Box::new(io::Cursor::new(begin).chain(opened)));
        let mut content = Vec::new();
        match from.take(most + 1).read_to_end(&mut content) {
            Ok(_) => {}
            Err(error) if super::is_of_content(&error) => {
                return Err(self.damaged(path, Damage::malformed(error.to_string())));
            }
            Err(error) => return Err(failed(error)),
        }
        if content.len() as u64 > most {
            let what = format!("its content is longer than {most} bytes");
            return Err(self.damaged(path, Damage::malformed(what)));
        }
        if let Some(check) = check {
            let mut checking = check.begin();
            checking.update(&content);
            if checking.finish() != *check {
                return Err(self.damaged(path, Damage::HashDiffers));
            }
        }
        Ok(content)
    }

    /// It is absent for certain only while the place itself is there.
    fn absent(&self, name: &str) -> ReadError {
        let there = match &self.keeper {
            Keeper::PgBackRest { proof, .. } => open(proof).map(|_| ()),
            Keeper::Barman { server } => {
                let wals = server.join("wals");
                fs::read_dir(&wals).map(|_| ()).map_err(ForeignError::io("list", &wals))
            }
        };
        let (failure, source): (_, Option<crate::store::Source>) = match there {
            Ok(()) => (Failure::Absent, None),
            Err(error) => (Failure::NoRepository, Some(Box::new(error))),
        };
        self.store_error(Doing::Reading, name, failure, source)
    }

    fn failed(&self, doing: Doing, path: &Path, error: io::Error) -> ReadError {
        let failure = match error.kind() {
            io::ErrorKind::PermissionDenied => Failure::Denied,
            // It was there a moment ago.
            _ => Failure::Failed,
        };
        self.store_error(doing, &self.shown(path), failure, Some(Box::new(error)))
    }

    fn of_file(&self, path: &Path, error: ForeignError) -> ReadError {
        match error {
            ForeignError::Io { source, .. } => self.failed(Doing::Reading, path, source),
            other => self.damaged(path, Damage::malformed(other.to_string())),
        }
    }

    fn store_error(
        &self,
        doing: Doing,
        object: &str,
        failure: Failure,
        source: Option<crate::store::Source>,
    ) -> ReadError {
        let place = self.place.display().to_string().into();
        ReadError::Store(StoreError { doing, object: object.to_owned(), place, failure, source })
    }

    fn damaged(&self, path: &Path, damage: Damage) -> ReadError {
        ReadError::Damaged { object: self.shown(path), place: self.place.display().to_string(), damage }
    }

    fn shown(&self, path: &Path) -> String {
        path.strip_prefix(&self.place).unwrap_or(path).display().to_string()
    }

    /// Reading and unpacking take a processor for a while, which is done where it holds up nobody.
    async fn aside<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Archive) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, ReadError> {
        let this = self.clone();
        match tokio::task::spawn_blocking(move || work(&this)).await {
            Ok(done) => done,
            Err(lost) => Err(self.store_error(Doing::Reading, what, Failure::Failed, Some(Box::new(lost)))),
        }
    }
}

impl Wal for Archive {
    fn system(&self) -> SystemId {
        self.system
    }

    fn segments(&self) -> Segments {
        self.segments
    }

    async fn segment(&self, segment: Segment) -> Result<Bytes, ReadError> {
        self.aside(&self.segments.file_name(segment), move |this| this.read_segment(segment)).await
    }

    async fn fetch(&self, segment: Segment) -> Result<Fetched, ReadError> {
        let fetch = move |this: &Archive| match this.read_segment(segment) {
            Err(absent) if absent.is_absent() => this.read_beginning(segment, absent),
            other => other.map(Fetched::Whole),
        };
        self.aside(&self.segments.file_name(segment), fetch).await
    }

    async fn history_file(&self, timeline: Timeline) -> Result<(History, Bytes), ReadError> {
        self.aside("a history", move |this| this.read_history(timeline)).await
    }
}

fn unknown(place: &Path, name: &str) -> ForeignError {
    ForeignError::Unknown { place: place.to_owned(), what: format!("\"{}\"", name.escape_debug()) }
}

/// Eight digits.
fn timeline_of(digits: &str) -> Option<Timeline> {
    let fits = digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| u32::from_str_radix(digits, 16).ok()).flatten().filter(|number| *number > 0).map(Timeline)
}
