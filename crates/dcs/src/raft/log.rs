//! The Raft log: a copy in memory that answers every read, and the disk behind it.
//!
//! Compaction keeps the log to about a thousand entries (`raft.rs` has the limits), so the copy is small, and
//! a slow disk never delays a read. Left out: what entries mean.
//!
//! Hazard: a hole, or an entry acknowledged before it is on the disk. Writes reach the disk in the order of
//! the calls; `append` reports through its callback, everything else returns when it is done.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};

use super::disk::{self, Contents, Disk, Write};
use super::record::{self, RecordError};
use super::types::{LogEntry, LogId, TypeConfig, Vote};

/// Encoded entries in one append to a member, beyond the first.
pub(super) const MAX_APPEND_BYTES: usize = 1024 * 1024;

#[derive(Clone)]
pub(super) struct Log {
    disk: Disk,
    copy: Arc<Mutex<Copy>>,
}

#[derive(Default)]
struct Copy {
    /// With the size of the encoded entry.
    entries: BTreeMap<u64, (LogEntry, usize)>,
    bytes: usize,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
}

impl Log {
    /// The log as it was on the disk.
    pub(super) fn load(disk: Disk, contents: &Contents) -> Result<Log, RecordError> {
        fn parse<T: serde::de::DeserializeOwned>(
            what: &'static str,
            bytes: &Option<Vec<u8>>,
        ) -> Result<Option<T>, RecordError> {
            bytes.as_deref().map(|bytes| record::decode(what, bytes)).transpose()
        }
        let purged = parse::<record::LogId>("the purge point", &contents.purged)?.map(LogId::from);
        let mut copy = Copy {
            purged,
            vote: parse::<record::Vote>("the vote", &contents.vote)?.map(Vote::from),
            committed: parse::<record::LogId>("the commit point", &contents.committed)?.map(LogId::from),
            ..Copy::default()
        };
        let mut next = contents.log.first().map(|(index, _)| *index);
        if let (Some(purged), Some(first)) = (purged, next)
            && first > purged.index + 1
        {
            let why = format!("entries {} to {} are missing", purged.index + 1, first - 1);
            return Err(RecordError::Damaged { what: "the raft log", why });
        }
        for (index, bytes) in &contents.log {
            let entry: LogEntry = record::decode::<record::LogEntry>("a log entry", bytes)?.into_raft()?;
            if Some(*index) != next || entry.index() != *index {
                let why = format!("entry {index} does not follow the one before it");
                return Err(RecordError::Damaged { what: "the raft log", why });
            }
            next = Some(index + 1);
            copy.insert(entry, bytes.len());
        }
        Ok(Log { disk, copy: Arc::new(Mutex::new(copy)) })
    }

    /// Encoded size of all entries.
    pub(super) fn bytes(&self) -> usize {
        self.copy().bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        let copy = self.copy();
        copy.entries.is_empty() && copy.purged.is_none() && copy.vote.is_none()
    }

    fn copy(&self) -> MutexGuard<'_, Copy> {
        // No code below panics while it holds the lock.
        self.copy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Copy {
    fn insert(&mut self, entry: LogEntry, bytes: usize) {
        self.bytes += bytes;
        if let Some((_, replaced)) = self.entries.insert(entry.index(), (entry, bytes)) {
            self.bytes -= replaced;
        }
    }

    fn count(&mut self) {
        self.bytes = self.entries.values().map(|(_, bytes)| bytes).sum();
    }
}

impl RaftLogReader<TypeConfig> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<LogEntry>> {
        let (start, end) = (range.start_bound().cloned(), range.end_bound().cloned());
        let empty = match (start, end) {
            (Bound::Included(start), Bound::Excluded(end)) => start >= end,
            (Bound::Included(start), Bound::Included(end)) => start > end,
            _ => false,
        };
        // `BTreeMap::range` panics on a range that is turned around.
        if empty {
            return Ok(Vec::new());
        }
        Ok(self.copy().entries.range((start, end)).map(|(_, (entry, _))| entry.clone()).collect())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<LogEntry>> {
        let copy = self.copy();
        let mut total = 0;
        let within = copy.entries.range(start..end.max(start)).take_while(|(index, (_, bytes))| {
            total += bytes;
            **index == start || total <= MAX_APPEND_BYTES
        });
        Ok(within.map(|(_, (entry, _))| entry.clone()).collect())
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.copy().vote)
    }
}

impl RaftLogStorage<TypeConfig> for Log {
    type LogReader = Log;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let copy = self.copy();
        let last = copy.entries.values().next_back().map(|(entry, _)| entry.log_id());
        Ok(LogState { last_purged_log_id: copy.purged, last_log_id: last.or(copy.purged) })
    }

    async fn get_log_reader(&mut self) -> Log {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let bytes = record::encode(&record::Vote::from(*vote));
        self.disk.write(vec![Write::Put(disk::VOTE, bytes)], true).await?;
        self.copy().vote = Some(*vote);
        Ok(())
    }

    /// Not durable by itself: the next entry takes it along, and a commit point that is too low only means
    /// that a restarted member learns from the leader how far it may apply.
    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        let Some(log_id) = committed else { return Ok(()) };
        self.copy().committed = committed;
        let bytes = record::encode(&record::LogId::from(log_id));
        self.disk.submit(vec![Write::Put(disk::COMMITTED, bytes)], false, |_| {});
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.copy().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = LogEntry> + Send,
        I::IntoIter: Send,
    {
        let mut rows = Vec::new();
        {
            let mut copy = self.copy();
            for entry in entries {
                let bytes = record::encode(&record::LogEntry::from(&entry));
                rows.push((entry.index(), bytes.clone()));
                copy.insert(entry, bytes.len());
            }
        }
        self.disk.submit(vec![Write::Append(rows)], true, |result| callback.io_completed(result));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let from = last.map_or(0, |last| last.index + 1);
        {
            let mut copy = self.copy();
            copy.entries.split_off(&from);
            copy.count();
        }
        self.disk.write(vec![Write::CutFrom(from)], true).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        {
            let mut copy = self.copy();
            copy.entries = copy.entries.split_off(&(upto.index + 1));
            copy.count();
            copy.purged = Some(upto);
        }
        let purged = record::encode(&record::LogId::from(upto));
        self.disk.write(vec![Write::PurgeTo(upto.index), Write::Put(disk::PURGED, purged)], false).await
    }
}

#[cfg(test)]
mod tests {
    use openraft::testing::log::{StoreBuilder, Suite};
    use openraft::type_config::TypeConfigExt;
    use tempfile::TempDir;

    use super::*;
    use crate::raft::record::tests::entries;
    use crate::raft::state_machine::StateMachine;
    use crate::raft::types::TypeConfig;

    struct Builder;

    fn load(dir: &TempDir) -> (Log, StateMachine) {
        let (disk, contents) = open(dir);
        let log = Log::load(disk.clone(), &contents).unwrap();
        (log, StateMachine::load(disk, contents.snapshot).unwrap())
    }

    fn open(dir: &TempDir) -> (Disk, Contents) {
        let (name, disk) = ("a".parse().unwrap(), record::tests::disk("1"));
        let identity = record::Identity { herd: "h".to_owned(), name, disk, membership: None };
        if disk::identity(dir.path()).unwrap().is_none() {
            disk::write_identity(dir.path(), &identity).unwrap();
        }
        Disk::open(dir.path()).unwrap()
    }

    impl StoreBuilder<TypeConfig, Log, StateMachine, TempDir> for Builder {
        async fn build(&self) -> Result<(TempDir, Log, StateMachine), openraft::StorageError<TypeConfig>> {
            let dir = TempDir::new().unwrap();
            let (log, machine) = load(&dir);
            Ok((dir, log, machine))
        }
    }

    #[tokio::test]
    async fn openrafts_own_storage_suite() {
        Suite::test_all(Builder).await.unwrap();
    }

    #[tokio::test]
    async fn everything_is_there_after_a_restart() {
        let dir = TempDir::new().unwrap();
        let (mut log, _) = load(&dir);
        let written = entries();
        let (sender, flushed) = TypeConfig::oneshot();
        log.append(written.clone(), IOFlushed::signal(sender)).await.unwrap();
        flushed.await.unwrap().unwrap();
        let vote = Vote::from(record::Vote { term: 5, node: 9, committed: false });
        log.save_vote(&vote).await.unwrap();
        log.save_committed(Some(written[1].log_id())).await.unwrap();
        log.truncate_after(Some(written[1].log_id())).await.unwrap();
        log.purge(written[0].log_id()).await.unwrap();
        log.disk.close().await;

        let (mut log, _) = load(&dir);
        assert_eq!(log.read_vote().await.unwrap(), Some(vote));
        assert_eq!(log.read_committed().await.unwrap(), Some(written[1].log_id()));
        let state = log.get_log_state().await.unwrap();
        assert_eq!(state.last_purged_log_id, Some(written[0].log_id()));
        assert_eq!(log.try_get_log_entries(..).await.unwrap(), written[1..2]);
        let error = log.disk.write(vec![], true);
        log.disk.close().await;
        error.await.unwrap();
        assert!(log.save_vote(&vote).await.is_err(), "nothing is written after the end");
    }

    #[tokio::test]
    async fn a_log_with_a_hole_is_not_opened() {
        let dir = TempDir::new().unwrap();
        let (disk, _) = open(&dir);
        let rows = entries()
            .into_iter()
            .map(|entry| (entry.index(), record::encode(&record::LogEntry::from(&entry))));
        let mut rows: Vec<_> = rows.collect();
        rows.remove(1);
        disk.write(vec![Write::Append(rows)], true).await.unwrap();
        disk.close().await;
        let (disk, contents) = open(&dir);
        let error = Log::load(disk.clone(), &contents).err().unwrap();
        assert!(error.to_string().contains("entry 22 does not follow"), "{error}");
        disk.close().await;
    }

    #[tokio::test]
    async fn appends_to_a_member_are_bounded_and_never_empty() {
        let dir = TempDir::new().unwrap();
        let (mut log, _) = load(&dir);
        let large = |index: u64| {
            let transaction = crate::Transaction::new().put("k", vec![b'x'; 200_000]);
            let command = crate::raft::types::Command { request: Arc::from(index.to_string()), transaction };
            let log_id = record::LogId { term: 1, leader: 1, index };
            LogEntry::new(log_id.into(), openraft::EntryPayload::Normal(command))
        };
        log.append((0..20).map(large), IOFlushed::noop()).await.unwrap();
        let some = log.limited_get_log_entries(3, 20).await.unwrap();
        assert_eq!((some[0].index(), some.len()), (3, 5), "five of 200 kB stay below a megabyte");
        assert!(log.bytes() > 20 * 200_000);
    }
}
