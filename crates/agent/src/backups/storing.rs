//! One reader: files of a data directory or of a stream into packs, whole, or what differs from the parent.
//!
//! A group of 32 KiB is the same if its keyed hash is that of the parent's entry; then its pages stay in the parent's pack.
//! Some of what is the same is written anew all the same: what lies in the oldest packs, as much as was asked for, so that
//! a line of incremental backups does not keep a pack for ever for the sake of one page.
//!
//! Of a relation's main fork only the pages that WAL names are read, where it is known what WAL names; the others stay where they are in the
//! parent's packs. Then a group of which a part was read has no hash. Where everything is read all the same to hold the two ways against each
//! other, pages that differ without a word in WAL are told.
//!
//! Leaves out: which files, and their order. Hazard: a group that is taken for the parent's and is another one. The hash
//! is keyed with the repository, and compared at the same place of the same path only.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pgherd_backup::changed::{Changed, MainFile};
use pgherd_backup::document::ReadError;
use pgherd_backup::format::Repository;
use pgherd_backup::manifest::Manifest;
use pgherd_backup::map::{Change, Entry, GROUP_BYTES, changes_of};
use pgherd_backup::name::BackupId;
use pgherd_backup::pack::{FileWriter, Kept, PAGE_BYTES, PackReader, PackWriter, part_of};
use pgherd_core::types::Lsn;
use pgherd_postgres::base_backup::listing::Found;
use pgherd_postgres::base_backup::reading::{Checksums, Reader, page_lsn};

use super::take::TakeError;
use super::{Done, PIECE_BYTES, Progress, Stop, Throttle};

const GROUP_PAGES: u64 = (GROUP_BYTES / PAGE_BYTES) as u64;
const PAGE: u64 = PAGE_BYTES as u64;
/// Parts of a file that are announced to the kernel before they are read, so that a disk has something to choose from.
const ANNOUNCED: usize = 32;
/// Pages that are remembered as changed without a word in WAL. Some of them are enough to say that something is wrong.
const MAX_UNEXPLAINED: usize = 10_000;

/// What WAL says of changes since the parent.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) changed: Changed,
    /// Where this backup begins; what is changed behind it is not in `changed`.
    pub(super) start: Lsn,
    /// Everything is read, and this is held against it.
    pub(super) only_check: bool,
    /// The backup that it is compared with.
    pub(super) parent: Manifest,
    pub(super) unexplained: Mutex<Vec<Unexplained>>,
}

/// A page that differs from the parent's, and is not named by WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unexplained {
    pub(super) path: Vec<u8>,
    pub(super) file: MainFile,
    pub(super) page: u32,
}

/// What readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) repository: Repository,
    pub(super) data_dir: PathBuf,
    /// None where the cluster has none.
    pub(super) checksums: Option<Checksums>,
    pub(super) throttle: Arc<Throttle>,
    pub(super) stop: Stop,
    pub(super) done: Done,
    /// The oldest backup that the parent refers to, and how much of it is still to be written anew.
    pub(super) oldest: Option<BackupId>,
    pub(super) refresh_bytes: AtomicU64,
    pub(super) refreshed_bytes: AtomicU64,
    pub(super) kept_bytes: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    /// None where it is not known, or was not asked.
    pub(super) known: Option<Known>,
}

/// A file that was stored.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) entry: Entry,
    /// Pages that stay damaged.
    pub(super) damaged: Vec<u32>,
}

/// Where the content of a file comes from.
pub(super) trait Content {
    /// Replaces `piece` by the next bytes, as many as fit into its capacity or are left; none at the end.
    async fn read(&mut self, piece: &mut Vec<u8>) -> Result<(), TakeError>;

    /// The numbers of pages that look damaged and stay so, as far as it was read.
    fn damaged(&self) -> Vec<u32>;
}

impl Content for Reader {
    async fn read(&mut self, piece: &mut Vec<u8>) -> Result<(), TakeError> {
        Ok(Reader::read(self, piece)?)
    }

    fn damaged(&self) -> Vec<u32> {
        Reader::damaged(self).to_vec()
    }
}

pub(super) struct Storing {
    packs: PackWriter,
    shared: Arc<Shared>,
    piece: Vec<u8>,
    /// Contents of the parent, where they are looked at.
    contents: Option<PackReader>,
}

impl Storing {
    pub(super) fn new(packs: PackWriter, shared: Arc<Shared>) -> Storing {
        let checked = shared.known.as_ref().filter(|known| known.only_check);
        let contents = checked.map(|known| known.parent.contents(&shared.repository.on_own_thread()));
        Storing { packs, shared, piece: Vec::with_capacity(PIECE_BYTES), contents }
    }

    /// None if the file is gone.
    pub(super) async fn store(
        &mut self,
        found: Found,
        parent: Option<&Entry>,
    ) -> Result<Option<Stored>, TakeError> {
        let shared = Arc::clone(&self.shared);
        let told = shared.told(&found, parent);
        if let Some(told) = &told
            && !told.known.only_check
            && !told.is_one_page(&found)
        {
            return self.store_changed(&shared, found, told).await;
        }
        let Some(mut reader) = Reader::open(&shared.data_dir, &found, shared.checksums)? else {
            return Ok(None);
        };
        self.store_checked(&found.path, found.mode, &mut reader, parent, told.as_ref()).await.map(Some)
    }

    /// What comes from somewhere, to its end.
    pub(super) async fn store_content(
        &mut self,
        path: &[u8],
        mode: u32,
        content: &mut impl Content,
        parent: Option<&Entry>,
    ) -> Result<Stored, TakeError> {
        self.store_checked(path, mode, content, parent, None).await
    }

    /// What differs from the parent is held against what WAL says, if it says something.
    async fn store_checked(
        &mut self,
        path: &[u8],
        mode: u32,
        content: &mut impl Content,
        parent: Option<&Entry>,
        told: Option<&Told<'_>>,
    ) -> Result<Stored, TakeError> {
        let shared = Arc::clone(&self.shared);
        let mut file = self.packs.file();
        let mut at = 0;
        loop {
            content.read(&mut self.piece).await?;
            if self.piece.is_empty() {
                break;
            }
            if shared.stop.is_wanted() {
                return Err(TakeError::Stopped);
            }
            shared.throttle.pass(self.piece.len()).await;
            match parent {
                Some(parent) => {
                    let spans = shared.compare(&mut file, &self.piece, at, parent).await?;
                    if let (Some(told), Some(contents)) = (told, &mut self.contents) {
                        for span in spans.iter().filter(|span| !span.same) {
                            told.check(contents, path, &self.piece, at, span).await?;
                        }
                    }
                }
                None => file.write(&self.piece).await?,
            }
            at += self.piece.len() as u64;
            shared.done.bytes.fetch_add(self.piece.len() as u64, Ordering::Relaxed);
            shared.read_bytes.fetch_add(self.piece.len() as u64, Ordering::Relaxed);
        }
        let placed = file.finish().await?;
        shared.done.files.fetch_add(1, Ordering::Relaxed);
        Ok(Stored { entry: Entry::file(path, mode, placed), damaged: content.damaged() })
    }

    /// A small file whose content is known.
    pub(super) async fn store_bytes(
        &mut self,
        path: &[u8],
        mode: u32,
        bytes: &[u8],
    ) -> Result<Entry, TakeError> {
        let mut file = self.packs.file();
        file.write(bytes).await?;
        Ok(Entry::file(path, mode, file.finish().await?))
    }

    /// Reads the pages that WAL names, those that the parent has not, and what is to be written anew; the rest is the parent's.
    async fn store_changed(
        &mut self,
        shared: &Shared,
        found: Found,
        told: &Told<'_>,
    ) -> Result<Option<Stored>, TakeError> {
        let parent = told.parent;
        let (pages, before) = (found.size / PAGE, parent.size / PAGE);
        let common = pages.min(before);
        let wanted = told.known.changed.ranges(&told.file, u32::try_from(common).unwrap_or(u32::MAX));
        let mut wanted: Vec<Range<u64>> =
            wanted.into_iter().map(|range| range.start.into()..range.end.into()).collect();
        wanted.push(common..pages);
        shared.refreshed(parent, common, &mut wanted);
        let wanted = united(wanted);
        if wanted.is_empty() && pages == before {
            shared.kept_bytes.fetch_add(found.size, Ordering::Relaxed);
            shared.done.bytes.fetch_add(found.size, Ordering::Relaxed);
            shared.done.files.fetch_add(1, Ordering::Relaxed);
            let entry = Entry { path: found.path, mode: found.mode, ..parent.clone() };
            return Ok(Some(Stored { entry, damaged: Vec::new() }));
        }
        let Some(mut reader) = Reader::open(&shared.data_dir, &found, shared.checksums)? else {
            return Ok(None);
        };
        let read: u64 = wanted.iter().map(|range| range.end - range.start).sum();
        if read < pages / 2 {
            reader.is_scattered();
            announce(&reader, &wanted[..wanted.len().min(ANNOUNCED)]);
        }
        let mut writer = self.packs.file();
        let mut at = 0;
        'file: for (number, range) in wanted.iter().enumerate() {
            shared.keep(&mut writer, parent, at..range.start, (pages, before)).await?;
            if let Some(next) = wanted.get(number + ANNOUNCED).filter(|_| read < pages / 2) {
                announce(&reader, std::slice::from_ref(next));
            }
            at = range.start;
            reader.seek(at * PAGE);
            while at < range.end {
                let bytes = (range.end - at) * PAGE;
                reader.read_part(&mut self.piece, bytes)?;
                if shared.stop.is_wanted() {
                    return Err(TakeError::Stopped);
                }
                let got = self.piece.len() as u64;
                shared.throttle.pass(self.piece.len()).await;
                writer.write(&self.piece).await?;
                shared.done.bytes.fetch_add(got, Ordering::Relaxed);
                shared.read_bytes.fetch_add(got, Ordering::Relaxed);
                at += got / PAGE;
                if got < bytes.min(PIECE_BYTES as u64) {
                    // It was cut off here since it was listed, and WAL says so.
                    break 'file;
                }
            }
        }
        if wanted.last().is_none_or(|last| at == last.end) {
            shared.keep(&mut writer, parent, at..pages, (pages, before)).await?;
        }
        let placed = writer.finish().await?;
        shared.done.files.fetch_add(1, Ordering::Relaxed);
        let damaged = reader.damaged().to_vec();
        Ok(Some(Stored { entry: Entry::file(found.path, found.mode, placed), damaged }))
    }

    pub(super) fn into_packs(self) -> PackWriter {
        self.packs
    }
}

impl Shared {
    pub(super) fn progress(&self) -> Progress {
        let (held_to, held_back) = (self.throttle.held_to(), self.throttle.held_back());
        Progress { held_to, held_back, ..self.done.progress() }
    }

    /// None for what is no main fork, is new, or has parts of pages.
    fn told<'a>(&'a self, found: &Found, parent: Option<&'a Entry>) -> Option<Told<'a>> {
        let (known, parent) = self.known.as_ref().zip(parent)?;
        let file = MainFile::parse(&found.path)?;
        let whole = found.size.is_multiple_of(PAGE) && parent.size.is_multiple_of(PAGE);
        whole.then_some(Told { known, file, parent })
    }

    /// Writes what differs from the parent's file at `at`, and refers to the rest.
    async fn compare(
        &self,
        file: &mut FileWriter<'_>,
        piece: &[u8],
        at: u64,
        parent: &Entry,
    ) -> Result<Vec<Span>, TakeError> {
        let changes = changes_of(&self.repository, piece);
        let first = (at / GROUP_BYTES as u64) as usize;
        let before: &[Change] = parent.changes.get(first..).unwrap_or_default();
        let spans = spans(&changes, before);
        for span in spans.iter().cloned() {
            let from = span.groups.start * GROUP_BYTES;
            let content = &piece[from..piece.len().min(span.groups.end * GROUP_BYTES)];
            if !span.same {
                file.write(content).await?;
                continue;
            }
            let page = (first + span.groups.start) as u64 * GROUP_PAGES;
            let runs = part_of(&parent.runs, page, content.len().div_ceil(PAGE_BYTES) as u64);
            if runs.iter().any(|run| Some(run.pack.backup) == self.oldest) && self.refresh(content.len()) {
                file.write(content).await?;
                continue;
            }
            let kept = Kept::Read(content, &changes[span.groups]);
            file.keep(&runs, content.len() as u64, kept).await?;
            self.kept_bytes.fetch_add(content.len() as u64, Ordering::Relaxed);
        }
        Ok(spans)
    }

    /// Refers to pages of the parent that were not read. `pages` is how many the file has, and how many it had.
    async fn keep(
        &self,
        file: &mut FileWriter<'_>,
        parent: &Entry,
        kept: Range<u64>,
        pages: (u64, u64),
    ) -> Result<(), TakeError> {
        for (part, groups) in parts(kept, pages) {
            let bytes = (part.end - part.start) * PAGE;
            let runs = part_of(&parent.runs, part.start, part.end - part.start);
            let known =
                groups.and_then(|groups| parent.changes.get(groups.start as usize..groups.end as usize));
            file.keep(&runs, bytes, known.map_or(Kept::Unknown, Kept::Unread)).await?;
            self.kept_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.done.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Adds what lies in the oldest packs, as long as some of it is to be written anew.
    fn refreshed(&self, parent: &Entry, pages: u64, wanted: &mut Vec<Range<u64>>) {
        let mut begin = 0;
        for run in &parent.runs {
            let end = (begin + u64::from(run.pages)).min(pages);
            if begin < end
                && Some(run.pack.backup) == self.oldest
                && self.refresh(((end - begin) * PAGE) as usize)
            {
                wanted.push(begin..end);
            }
            begin += u64::from(run.pages);
        }
    }

    /// Whether so much may be written anew.
    fn refresh(&self, bytes: usize) -> bool {
        let bytes = bytes as u64;
        let take = |left: u64| (left > 0).then(|| left.saturating_sub(bytes));
        let taken = self.refresh_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        if taken {
            self.refreshed_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        taken
    }
}

/// What WAL says of one file that the parent has, too.
struct Told<'a> {
    known: &'a Known,
    file: MainFile,
    parent: &'a Entry,
}

impl Told<'_> {
    /// A sequence has one page, and is changed between its records. A small table costs no more by comparison.
    fn is_one_page(&self, found: &Found) -> bool {
        found.size.max(self.parent.size) <= PAGE
    }

    /// Looks at pages of groups that differ from the parent's: has WAL named each of those that do, or was it changed behind the start, or are the
    /// two of one position? Then only what PostgreSQL writes without WAL is different.
    async fn check(
        &self,
        contents: &mut PackReader,
        path: &[u8],
        piece: &[u8],
        at: u64,
        span: &Span,
    ) -> Result<(), ReadError> {
        let Told { known, file, parent } = self;
        let before = parent.size / PAGE;
        let from = span.groups.start * GROUP_BYTES;
        let to = piece.len().min(span.groups.end * GROUP_BYTES);
        for (number, content) in (0..).zip(piece[from..to].chunks_exact(PAGE_BYTES)) {
            let page = (at + from as u64) / PAGE + number;
            let narrow = u32::try_from(page).unwrap_or(u32::MAX);
            if page >= before || known.changed.has(file, narrow) || page_lsn(content) > known.start {
                continue;
            }
            let Some(run) = part_of(&parent.runs, page, 1).into_iter().next() else { continue };
            let was = contents.read(&run, PAGE_BYTES).await?;
            if *was == *content || page_lsn(&was) == page_lsn(content) {
                continue;
            }
            let mut unexplained = known.unexplained.lock().unwrap_or_else(PoisonError::into_inner);
            if unexplained.len() < MAX_UNEXPLAINED {
                unexplained.push(Unexplained { path: path.to_vec(), file: *file, page: narrow });
            }
        }
        Ok(())
    }
}

fn announce(reader: &Reader, parts: &[Range<u64>]) {
    for part in parts {
        reader.announce(part.start * PAGE, (part.end - part.start) * PAGE);
    }
}

/// Ranges in order, none of which begins where another one is or ends.
fn united(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut united: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match united.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => united.push(range),
        }
    }
    united
}

/// Pages that are kept, cut where groups begin of which the parent's hashes are right: those that are kept as a whole and were as long
/// in the parent. The others have no groups.
fn parts(kept: Range<u64>, (pages, before): (u64, u64)) -> Vec<(Range<u64>, Option<Range<u64>>)> {
    let first = kept.start.div_ceil(GROUP_PAGES);
    // The last group of a file may be short; it is the same if it was as short before.
    let last = match kept.end == pages && pages == before {
        true => kept.end.div_ceil(GROUP_PAGES),
        false => kept.end / GROUP_PAGES,
    };
    let whole = first * GROUP_PAGES..(last * GROUP_PAGES).min(kept.end);
    if first >= last {
        return if kept.is_empty() { Vec::new() } else { vec![(kept, None)] };
    }
    let all =
        [(kept.start..whole.start, None), (whole.clone(), Some(first..last)), (whole.end..kept.end, None)];
    all.into_iter().filter(|(part, _)| !part.is_empty()).collect()
}

/// Groups one behind the other that are all the same as before, or all different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) same: bool,
    pub(super) groups: Range<usize>,
}

pub(super) fn spans(now: &[Change], before: &[Change]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for (at, change) in now.iter().enumerate() {
        let same = before.get(at).is_some_and(|before| before.is_same(*change));
        match spans.last_mut() {
            Some(last) if last.same == same => last.groups.end = at + 1,
            _ => spans.push(Span { same, groups: at..at + 1 }),
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_compared_at_their_places() {
        let hashes = |numbers: &[u8]| numbers.iter().map(|number| Change([*number; 8])).collect::<Vec<_>>();
        let cut = |now: &[u8], before: &[u8]| {
            let spans = spans(&hashes(now), &hashes(before));
            spans.into_iter().map(|span| (span.same, span.groups.start, span.groups.end)).collect::<Vec<_>>()
        };
        assert_eq!(cut(&[1, 2, 3], &[1, 2, 3]), [(true, 0, 3)]);
        assert_eq!(
            cut(&[1, 9, 8, 4, 5], &[1, 2, 3, 4]),
            [(true, 0, 1), (false, 1, 3), (true, 3, 4), (false, 4, 5)]
        );
        assert_eq!(cut(&[2, 1], &[1, 2]), [(false, 0, 2)]);
        assert_eq!(cut(&[], &[1]), []);
        assert_eq!(cut(&[0, 0], &[0, 1]), [(false, 0, 2)], "of what is not known nothing is the same");
    }

    #[test]
    fn what_is_kept_has_hashes_where_it_is_kept_by_groups() {
        let cut = |kept: Range<u64>, pages| {
            let parts = parts(kept, pages);
            parts
                .into_iter()
                .map(|(part, groups)| (part.start, part.end, groups.map(|groups| (groups.start, groups.end))))
                .collect::<Vec<_>>()
        };
        assert_eq!(cut(0..8, (20, 20)), [(0, 8, Some((0, 2)))]);
        assert_eq!(cut(1..11, (20, 20)), [(1, 4, None), (4, 8, Some((1, 2))), (8, 11, None)]);
        assert_eq!(cut(1..4, (20, 20)), [(1, 4, None)]);
        assert_eq!(cut(5..7, (20, 20)), [(5, 7, None)]);
        assert_eq!(cut(4..10, (10, 10)), [(4, 10, Some((1, 3)))], "the last group is as short as it was");
        assert_eq!(cut(4..10, (10, 12)), [(4, 8, Some((1, 2))), (8, 10, None)], "it was longer");
        assert_eq!(cut(4..10, (12, 10)), [(4, 8, Some((1, 2))), (8, 10, None)], "it has become longer");
        assert_eq!(cut(3..3, (20, 20)), []);
        assert_eq!(cut(0..2, (2, 2)), [(0, 2, Some((0, 1)))]);
    }

    #[test]
    fn ranges_that_meet_are_one() {
        let one = |ranges: &[Range<u64>]| united(ranges.to_vec());
        assert_eq!(one(&[5..6, 0..2, 2..3, 9..9]), [0..3, 5..6]);
        assert_eq!(one(&[0..9, 3..4, 8..10]), vec![0..10]);
    }
}
