//! One reader: files of a data directory or of a stream into packs, whole, or what differs from the parent.
//!
//! A group of 32 KiB is the same if its keyed hash is that of the parent's entry; then its pages stay in the parent's pack.
//! Some of what is the same is written anew all the same: what lies in the oldest packs, as much as was asked for, so that
//! a line of incremental backups does not keep a pack for ever for the sake of one page.
//!
//! Leaves out: which files, and their order. Hazard: a group that is taken for the parent's and is another one. The hash
//! is keyed with the repository, and compared at the same place of the same path only.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pgherd_backup::format::Repository;
use pgherd_backup::map::{Change, Entry, GROUP_BYTES, changes_of};
use pgherd_backup::name::BackupId;
use pgherd_backup::pack::{FileWriter, Kept, PAGE_BYTES, PackWriter, part_of};
use pgherd_postgres::base_backup::listing::Found;
use pgherd_postgres::base_backup::reading::{Checksums, Reader};

use super::take::TakeError;
use super::{Done, PIECE_BYTES, Stop, Throttle};

const GROUP_PAGES: u64 = (GROUP_BYTES / PAGE_BYTES) as u64;

/// What readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) repository: Repository,
    pub(super) data_dir: PathBuf,
    /// None where the cluster has none.
    pub(super) checksums: Option<Checksums>,
    pub(super) throttle: Throttle,
    pub(super) stop: Stop,
    pub(super) done: Done,
    /// The oldest backup that the parent refers to, and how much of it is still to be written anew.
    pub(super) oldest: Option<BackupId>,
    pub(super) refresh_bytes: AtomicU64,
    pub(super) refreshed_bytes: AtomicU64,
    pub(super) kept_bytes: AtomicU64,
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
}

impl Storing {
    pub(super) fn new(packs: PackWriter, shared: Arc<Shared>) -> Storing {
        Storing { packs, shared, piece: Vec::with_capacity(PIECE_BYTES) }
    }

    /// None if the file is gone.
    pub(super) async fn store(
        &mut self,
        found: Found,
        parent: Option<&Entry>,
    ) -> Result<Option<Stored>, TakeError> {
        let Some(mut reader) = Reader::open(&self.shared.data_dir, &found, self.shared.checksums)? else {
            return Ok(None);
        };
        self.store_content(&found.path, found.mode, &mut reader, parent).await.map(Some)
    }

    /// What comes from somewhere, to its end.
    pub(super) async fn store_content(
        &mut self,
        path: &[u8],
        mode: u32,
        content: &mut impl Content,
        parent: Option<&Entry>,
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
                Some(parent) => shared.compare(&mut file, &self.piece, at, parent).await?,
                None => file.write(&self.piece).await?,
            }
            at += self.piece.len() as u64;
            shared.done.bytes.fetch_add(self.piece.len() as u64, Ordering::Relaxed);
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

    pub(super) fn into_packs(self) -> PackWriter {
        self.packs
    }
}

impl Shared {
    /// Writes what differs from the parent's file at `at`, and refers to the rest.
    async fn compare(
        &self,
        file: &mut FileWriter<'_>,
        piece: &[u8],
        at: u64,
        parent: &Entry,
    ) -> Result<(), TakeError> {
        let changes = changes_of(&self.repository, piece);
        let first = (at / GROUP_BYTES as u64) as usize;
        let before: &[Change] = parent.changes.get(first..).unwrap_or_default();
        for span in spans(&changes, before) {
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
        Ok(())
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

/// Groups one behind the other that are all the same as before, or all different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) same: bool,
    pub(super) groups: std::ops::Range<usize>,
}

pub(super) fn spans(now: &[Change], before: &[Change]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for (at, change) in now.iter().enumerate() {
        let same = before.get(at) == Some(change);
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
    }
}
