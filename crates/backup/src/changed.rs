//! Which pages of relations WAL has changed since a backup was taken, so that the next one reads no others.
//!
//! ```text
//! Collecting::begin   from the parent's start, along the line of history of the new backup
//!   .through(segment) segments that are complete, while the server still makes its checkpoint
//!   .up_to(start)     the rest, up to the new backup's start; it must have met a record there or behind it
//! Changed             asked for each file of a main fork
//! ```
//!
//! The parent's start counts and not its end: a page that was changed in between is in the parent as it was before or after that. What was changed
//! before the start was on disk when the parent was read, and what is changed behind the new backup's start is brought by its recovery. A page that
//! no record names has no other content than in the parent, but for hints: `pd_prune_xid`, dead index entries, and what is known of ended
//! transactions. PostgreSQL writes those without WAL where `wal_log_hints` and checksums are off, and does without them just as well; the parent's
//! page is an earlier one with fewer of them.
//!
//! Memory is bounded by [`MAX_BYTES`]: a file with many changed pages has a bit for each, and when there is no more room it counts as changed
//! wholly. Only main forks are remembered. For everything else, and where anything is in doubt ([`Uncovered`]), contents have to be compared.
//!
//! Leaves out: contents. Hazard: a page that was changed and is not named restores as it was in the parent, and nothing shows that; so a
//! backup that reads everything compares the two ways from time to time.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use pgherd_core::types::Lsn;

use crate::breakage::{Broken, broken};
use crate::document::ReadError;
use crate::name::{Kind, Place};
use crate::store::{Store, StoreError};
use crate::wal::records::{Ended, Records, RelationFile, Touched, Untold};
use crate::wal::{Archive, Fetched, History, Segment, Segments, candidates};

const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;
/// Memory that changed pages are remembered in: files of 6 TB with pages that were changed all over.
const MAX_BYTES: usize = 128 * 1024 * 1024;
/// What a file takes apart from its pages: its name, its place in the table, and some room for growing.
const FILE_BYTES: usize = 96;
/// Pages that are remembered as numbers; of more a file has a bit for each page.
const MAX_FEW: usize = 512;
/// Segments that are fetched and decompressed beside each other.
const AHEAD: usize = 3;

/// Changed pages that lie so near to each other are one range: what is between them costs less than two pieces more.
const NEAR: u32 = 1;

/// A file of a main fork: of which relation, and which of its files of a gigabyte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MainFile {
    pub relation: RelationFile,
    pub segment: u32,
}

impl MainFile {
    /// By its path from the data directory; none for other forks, and for what is no relation's.
    pub fn parse(path: &[u8]) -> Option<MainFile> {
        let number = |text: &str| match text.as_bytes() {
            [b'1'..=b'9', ..] | b"0" if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
            _ => None,
        };
        let (place, name) = std::str::from_utf8(path).ok()?.rsplit_once('/')?;
        let parts: Vec<&str> = place.split('/').collect();
        let (tablespace, database) = match parts.as_slice() {
            ["global"] => (GLOBAL_TABLESPACE, 0),
            ["base", database] => (DEFAULT_TABLESPACE, number(database)?),
            ["pg_tblspc", tablespace, version, database] if version.starts_with("PG_") => {
                (number(tablespace)?, number(database)?)
            }
            _ => return None,
        };
        let (name, segment) = match name.split_once('.') {
            Some((name, segment)) => (name, number(segment)?),
            None => (name, 0),
        };
        let relation = RelationFile { tablespace, database, number: number(name)? };
        Some(MainFile { relation, segment })
    }
}

/// Pages of one file.
#[derive(Debug)]
enum Pages {
    /// In order.
    Few(Vec<u32>),
    Bits(Box<[u64]>),
    All,
}

/// The pages of main forks that were changed.
#[derive(Debug)]
pub struct Changed {
    /// Of a relation, before its next file begins.
    file_pages: u32,
    files: HashMap<MainFile, Pages>,
    /// Relations of which everything from a block on counts.
    from: HashMap<RelationFile, u32>,
    databases: BTreeSet<u32>,
    tablespaces: BTreeSet<u32>,
    bytes: usize,
    limit: usize,
}

/// More files were changed than can be remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TooMany;

impl Changed {
    /// Of relations whose files have so many pages at most.
    pub fn new(file_pages: u32) -> Changed {
        Changed {
            file_pages: file_pages.max(1),
            files: HashMap::new(),
            from: HashMap::new(),
            databases: BTreeSet::new(),
            tablespaces: BTreeSet::new(),
            bytes: 0,
            limit: MAX_BYTES,
        }
    }

    #[cfg(test)]
    fn with_limit(mut self, bytes: usize) -> Changed {
        self.limit = bytes;
        self
    }

    fn note(&mut self, touched: Touched) -> Result<(), TooMany> {
        match touched {
            Touched::Page { file, block } => self.note_page(file, block)?,
            Touched::From { file, block } => {
                if !self.from.contains_key(&file) {
                    self.take(FILE_BYTES)?;
                }
                let from = self.from.entry(file).or_insert(block);
                *from = block.min(*from);
            }
            Touched::Database(database) => {
                self.databases.insert(database);
            }
            Touched::Tablespace(tablespace) => {
                self.tablespaces.insert(tablespace);
            }
        }
        Ok(())
    }

    fn note_page(&mut self, relation: RelationFile, block: u32) -> Result<(), TooMany> {
        let file = MainFile { relation, segment: block / self.file_pages };
        let page = block % self.file_pages;
        if broken(Broken::PageLeftOut { block }) {
            return Ok(());
        }
        if !self.files.contains_key(&file) {
            self.take(FILE_BYTES)?;
        }
        let (file_pages, room) = (self.file_pages, self.limit.saturating_sub(self.bytes));
        let pages = self.files.entry(file).or_insert_with(|| Pages::Few(Vec::new()));
        match pages {
            Pages::All => {}
            Pages::Bits(bits) => bits[page as usize / 64] |= 1 << (page % 64),
            Pages::Few(few) => {
                let Err(at) = few.binary_search(&page) else { return Ok(()) };
                if few.len() < MAX_FEW && room >= size_of::<u32>() {
                    few.insert(at, page);
                    self.bytes += size_of::<u32>();
                    return Ok(());
                }
                let words = file_pages.div_ceil(64) as usize;
                self.bytes -= few.len() * size_of::<u32>();
                if room < words * size_of::<u64>() {
                    *pages = Pages::All;
                    return Ok(());
                }
                let mut bits = vec![0_u64; words].into_boxed_slice();
                for page in few.iter().copied().chain([page]) {
                    bits[page as usize / 64] |= 1 << (page % 64);
                }
                self.bytes += words * size_of::<u64>();
                *pages = Pages::Bits(bits);
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: usize) -> Result<(), TooMany> {
        if self.bytes + bytes > self.limit {
            return Err(TooMany);
        }
        self.bytes += bytes;
        Ok(())
    }

    /// Whether this page of a file was changed.
    pub fn has(&self, file: &MainFile, page: u32) -> bool {
        let MainFile { relation, segment } = file;
        let block = segment.saturating_mul(self.file_pages).saturating_add(page);
        let pages = match self.files.get(file) {
            None => false,
            Some(Pages::All) => true,
            Some(Pages::Few(few)) => few.binary_search(&page).is_ok(),
            Some(Pages::Bits(bits)) => {
                bits.get(page as usize / 64).is_none_or(|word| word >> (page % 64) & 1 == 1)
            }
        };
        pages
            || self.databases.contains(&relation.database)
            || self.tablespaces.contains(&relation.tablespace)
            || self.from.get(relation).is_some_and(|from| block >= *from)
    }

    /// The pages of a file that have to be read, of its first `pages` ones: all that were changed, and few between them.
    pub fn ranges(&self, file: &MainFile, pages: u32) -> Vec<Range<u32>> {
        let MainFile { relation, segment } = file;
        let known = self.files.get(file);
        if matches!(known, Some(Pages::All))
            || self.databases.contains(&relation.database)
            || self.tablespaces.contains(&relation.tablespace)
        {
            return Some(0..pages).filter(|all| !all.is_empty()).into_iter().collect();
        }
        let mut ranges: Vec<Range<u32>> = Vec::new();
        let mut add = |more: Range<u32>| match ranges.last_mut() {
            _ if more.is_empty() => {}
            Some(last) if more.start - last.end <= NEAR => last.end = more.end,
            _ => ranges.push(more),
        };
        let before = segment.saturating_mul(self.file_pages);
        let from = self.from.get(relation).map_or(pages, |from| from.saturating_sub(before).min(pages));
        match known {
            Some(Pages::Few(few)) => {
                few.iter().take_while(|page| **page < from).for_each(|page| add(*page..page + 1));
            }
            Some(Pages::Bits(bits)) => {
                for (word, first) in bits.iter().zip((0..from).step_by(64)) {
                    let mut left = *word;
                    while left != 0 {
                        let page = first + left.trailing_zeros();
                        left &= left - 1;
                        if page < from {
                            add(page..page + 1);
                        }
                    }
                }
            }
            Some(Pages::All) | None => {}
        }
        add(from..pages);
        ranges
    }
}

/// Why it is not known what was changed; then contents are compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Uncovered {
    #[error("the parent's timeline {timeline} does not lead here from its end at {stop}")]
    NotOnTheLine { timeline: pgherd_core::types::Timeline, stop: Lsn },
    #[error("the parent ended at {stop}, behind the beginning of this backup at {start}")]
    Overlaps { stop: Lsn, start: Lsn },
    #[error("the parent is of a server whose {what} were others")]
    OtherServer { what: &'static str },
    #[error("pages have {bytes} bytes")]
    PageSize { bytes: u32 },
    #[error("there is more WAL since the parent than the parent has bytes")]
    MuchWal,
    #[error("WAL is missing: {file}")]
    Missing { file: String },
    #[error("WAL does not go on at {at}")]
    Ended { at: Lsn },
    #[error("at {at} WAL has {what}")]
    Record { at: Lsn, what: Untold },
    #[error("other WAL came under the name {file}, and is in quarantine")]
    Contradicted { file: String },
    #[error("more files were changed than are remembered")]
    TooMany,
    /// Nobody waits for it any more.
    #[error("the backup was given up")]
    Stopped,
    #[error("WAL cannot be read: {0}")]
    Read(#[from] ReadError),
    #[error("the repository cannot be read: {0}")]
    Store(#[from] StoreError),
    #[error("a reader of WAL ended early")]
    Reader(#[from] tokio::task::JoinError),
}

/// What a server itself has of a segment, which may not be complete, or be another one behind its end.
pub type Nearby = Arc<dyn Fn(Segment) -> Option<Vec<u8>> + Send + Sync>;

/// Whether nobody waits any more.
pub type Stopped = Arc<dyn Fn() -> bool + Send + Sync>;

/// Reads WAL for what it has changed. Takes processor and blocks: for a thread of its own.
pub struct Collecting {
    archive: Archive,
    store: Store,
    nearby: Nearby,
    stopped: Stopped,
    history: History,
    segments: Segments,
    first: u64,
    next: u64,
    reading: Reading,
    wal_bytes: u64,
}

struct Reading {
    records: Records,
    changed: Changed,
    page_bytes: usize,
    failed: Option<Uncovered>,
    /// Where a record was met on which, or behind which, nothing counts any more.
    to: Option<Lsn>,
    has_met: bool,
}

impl Collecting {
    /// From `from` on along `history`. The archive is one that may block.
    pub fn begin(
        archive: Archive,
        history: History,
        from: Lsn,
        file_pages: u32,
        nearby: Nearby,
        stopped: Stopped,
    ) -> Collecting {
        let segments = archive.segments();
        let first = segments.number(from);
        let reading = Reading {
            records: Records::new(archive.system(), segments, first),
            changed: Changed::new(file_pages),
            page_bytes: crate::pack::PAGE_BYTES,
            failed: None,
            to: None,
            has_met: false,
        };
        let store = archive.store().clone();
        Collecting {
            archive,
            store,
            nearby,
            stopped,
            history,
            segments,
            first,
            next: first,
            reading,
            wal_bytes: 0,
        }
    }

    /// Reads segments that lie before `position` as a whole.
    pub async fn through(&mut self, position: Lsn) -> Result<(), Uncovered> {
        let end = self.segments.number(position);
        let files: Vec<Segment> = (self.next..end).map(|number| self.file(number)).collect();
        let (archive, nearby) = (self.archive.clone(), Arc::clone(&self.nearby));
        let mut contents = futures_util::stream::iter(files)
            .map(|segment| {
                let (archive, nearby) = (archive.clone(), Arc::clone(&nearby));
                let runtime = tokio::runtime::Handle::current();
                let work = move || runtime.block_on(fetch(&archive, &nearby, segment));
                tokio::task::spawn_blocking(work)
            })
            .buffered(AHEAD);
        while let Some(content) = contents.next().await {
            if (self.stopped)() {
                return Err(Uncovered::Stopped);
            }
            self.reading.read(&content??)?;
            self.wal_bytes += u64::from(self.segments.bytes());
            self.next += 1;
        }
        Ok(())
    }

    /// Reads on until a record begins at `position` or behind it: what is before it is known then.
    pub async fn up_to(mut self, position: Lsn) -> Result<(Changed, u64), Uncovered> {
        self.through(position).await?;
        self.reading.to = Some(position);
        while !self.reading.has_met {
            // The server's own first: if the archive has WAL of another server with this one's numbers, the two do not follow each other.
            let file = self.file(self.next);
            let content = match (self.nearby)(file) {
                Some(content) => content.into(),
                None => fetch(&self.archive, &self.nearby, file).await?,
            };
            self.reading.read(&content)?;
            self.next += 1;
            self.wal_bytes += u64::from(self.segments.bytes());
        }
        self.contradicted().await?;
        Ok((self.reading.changed, self.wal_bytes))
    }

    /// Reads the segments that lie before `position` or have it as a whole, with all that is in them.
    pub async fn whole(mut self, position: Lsn) -> Result<Changed, Uncovered> {
        let last = self.segments.number(Lsn(position.0.saturating_sub(1)));
        self.through(self.segments.position(last + 1)).await?;
        Ok(self.reading.changed)
    }

    /// The file that has most of a segment: a newer timeline's begins with what the older ones wrote in the same segment.
    fn file(&self, number: u64) -> Segment {
        let file = candidates(&self.history, self.segments, number).first().map(|file| file.segment);
        file.unwrap_or(Segment { timeline: self.history.timeline(), number })
    }

    /// Whether two servers have written WAL of these numbers. Which of the two has written the pages is not known then.
    async fn contradicted(&self) -> Result<(), Uncovered> {
        let all = Place(self.archive.system()).all(Kind::Quarantine);
        for listed in self.store.list_all(&all).await? {
            let file = listed.name.last().split('-').next().unwrap_or_default();
            let is_between = |segment: Segment| (self.first..self.next).contains(&segment.number);
            if self.segments.parse(file).is_some_and(is_between) {
                return Err(Uncovered::Contradicted { file: file.to_owned() });
            }
        }
        Ok(())
    }
}

impl Reading {
    fn read(&mut self, content: &[u8]) -> Result<(), Uncovered> {
        let Reading { records, changed, page_bytes, failed, to, has_met } = self;
        let ended = records.read(content, |record| {
            *has_met |= to.is_some_and(|to| record.start >= to);
            if *has_met || failed.is_some() {
                return;
            }
            let mut too_many = false;
            let told = record.touched(*page_bytes, |touched| too_many |= changed.note(touched).is_err());
            if let Err(what) = told {
                *failed = Some(Uncovered::Record { at: record.start, what });
            } else if too_many {
                *failed = Some(Uncovered::TooMany);
            }
        });
        match (failed.take(), ended) {
            (Some(failed), _) => Err(failed),
            (None, Some(ended)) if !self.has_met => Err(Uncovered::Ended { at: Ended::at(ended) }),
            _ => Ok(()),
        }
    }
}

/// From the archive, else from the server itself, else what the archive has of a segment that is being written.
async fn fetch(archive: &Archive, nearby: &Nearby, segment: Segment) -> Result<Bytes, Uncovered> {
    match archive.segment(segment).await {
        Err(error) if error.is_absent() => {}
        other => return Ok(other?),
    }
    if let Some(content) = nearby(segment) {
        return Ok(content.into());
    }
    match archive.fetch(segment).await {
        Ok(Fetched::Whole(content) | Fetched::Beginning { content, .. }) => Ok(content),
        Err(error) if error.is_absent() => {
            Err(Uncovered::Missing { file: archive.segments().file_name(segment) })
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
