//! Applies committed log entries to the keys, remembers answers, makes and installs snapshots.
//!
//! The state lives in memory; on the disk are the last snapshot and the log behind it. Left out: what decides
//! that an entry is committed (openraft), and limits, which are checked where a transaction enters.
//!
//! Hazard: two members that apply one log differently. Nothing here depends on time, on limits that versions
//! might disagree about, or on anything else but the log; [`REMEMBERED`] is part of the log's meaning.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::{Stream, StreamExt};
use openraft::entry::{EntryPayload, RaftEntry};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use tokio::sync::watch;

use super::disk::{self, Disk, Write};
use super::record::{self, RecordError};
use super::types::{Command, LogId, Outcome, RaftSnapshot, SnapshotMeta, StoredMembership, TypeConfig};
use crate::state::{Conflict, State};
use crate::store::{Revision, Snapshot};

/// Requests whose answers are kept, so that a retry is answered again instead of applied again. Retries come
/// within seconds, and a busy store sees a few dozen commits a second. Another number would make members of
/// different versions apply the same log differently.
const REMEMBERED: usize = 1024;

#[derive(Clone)]
pub(super) struct StateMachine {
    disk: Disk,
    inner: Arc<Mutex<Inner>>,
    view: Arc<watch::Sender<Snapshot>>,
    /// One past the index of the last entry applied.
    applied: Arc<watch::Sender<u64>>,
}

#[derive(Default)]
struct Inner {
    state: State,
    applied: Option<LogId>,
    membership: StoredMembership,
    /// Oldest first.
    answered: VecDeque<(Arc<str>, Outcome)>,
    snapshot: Option<(SnapshotMeta, Arc<Vec<u8>>)>,
    /// The last snapshot queued for the disk.
    saved: Option<LogId>,
}

impl StateMachine {
    /// Empty, with the snapshot from the disk ready to be installed.
    pub(super) fn load(disk: Disk, snapshot: Option<Vec<u8>>) -> Result<StateMachine, RecordError> {
        let snapshot =
            snapshot.map(|bytes| Ok::<_, RecordError>((meta(&bytes)?, Arc::new(bytes)))).transpose()?;
        let saved = snapshot.as_ref().and_then(|(meta, _): &(SnapshotMeta, _)| meta.last_log_id);
        Ok(StateMachine {
            disk,
            inner: Arc::new(Mutex::new(Inner { snapshot, saved, ..Inner::default() })),
            view: Arc::default(),
            applied: Arc::default(),
        })
    }

    pub(super) fn view(&self) -> watch::Receiver<Snapshot> {
        self.view.subscribe()
    }

    pub(super) fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // No code below panics while it holds the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the world what has been applied; the snapshot before the index, which promises it.
    fn publish(&self) {
        let (snapshot, applied) = {
            let inner = self.inner();
            (inner.state.snapshot(), inner.applied.map_or(0, |applied| applied.index + 1))
        };
        self.view.send_if_modified(|view| {
            let changed = view.revision() != snapshot.revision();
            *view = snapshot;
            changed
        });
        self.applied.send_replace(applied);
    }

    /// Keeps the newest snapshot. One that was being built while a newer one was installed must not replace
    /// it: the log between the two is gone.
    async fn save(&self, meta: SnapshotMeta, bytes: Arc<Vec<u8>>) -> io::Result<()> {
        let written = {
            let mut inner = self.inner();
            if inner.saved.is_some() && meta.last_log_id <= inner.saved {
                return Ok(());
            }
            inner.saved = meta.last_log_id;
            // Queued under the lock, so that the disk sees snapshots in the order of this comparison.
            self.disk.write(vec![Write::Put(disk::SNAPSHOT, bytes.to_vec())], true)
        };
        written.await?;
        let mut inner = self.inner();
        if inner.snapshot.as_ref().is_none_or(|(held, _)| held.last_log_id < meta.last_log_id) {
            inner.snapshot = Some((meta, bytes));
        }
        Ok(())
    }
}

impl Inner {
    fn apply(
        &mut self,
        log_id: LogId,
        payload: EntryPayload<Command, u64, super::members::Member>,
    ) -> Outcome {
        self.applied = Some(log_id);
        match payload {
            EntryPayload::Blank => Outcome::Nothing,
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(log_id), membership);
                Outcome::Nothing
            }
            EntryPayload::Normal(Command { request, transaction }) => {
                if let Some((_, outcome)) = self.answered.iter().rev().find(|(known, _)| *known == request) {
                    return outcome.clone();
                }
                let outcome = match self.state.apply(&transaction, Revision(log_id.index)) {
                    Ok(()) => Outcome::Committed(Revision(log_id.index)),
                    Err(Conflict(key)) => Outcome::Conflict(key),
                };
                if self.answered.len() == REMEMBERED {
                    self.answered.pop_front();
                }
                self.answered.push_back((request, outcome.clone()));
                outcome
            }
        }
    }
}

/// What openraft wants to know about a snapshot, out of the snapshot itself.
fn meta(bytes: &[u8]) -> Result<SnapshotMeta, RecordError> {
    let snapshot: record::Snapshot = record::decode("the snapshot", bytes)?;
    Ok(SnapshotMeta {
        last_log_id: snapshot.applied.map(LogId::from),
        last_membership: snapshot.membership.try_into()?,
    })
}

/// Takes a snapshot that came from another member, or `None` if its parts do not belong together.
pub(super) fn received(bytes: Vec<u8>) -> Result<RaftSnapshot, RecordError> {
    Ok(RaftSnapshot { meta: meta(&bytes)?, snapshot: Arc::new(bytes) })
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = Arc<Vec<u8>>;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let inner = self.inner();
        Ok((inner.applied, inner.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + Send,
    {
        let mut answers = Vec::new();
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let log_id = entry.log_id();
            let outcome = self.inner().apply(log_id, entry.payload);
            if let Some(responder) = responder {
                answers.push((responder, outcome));
            }
        }
        // Published before anyone is answered: who has an answer finds it in the view.
        self.publish();
        for (responder, outcome) in answers {
            responder.send(outcome);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        let inner = self.inner();
        SnapshotBuilder {
            machine: self.clone(),
            state: inner.state.clone(),
            applied: inner.applied,
            membership: inner.membership.clone(),
            answered: inner.answered.iter().cloned().collect(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, bytes: Arc<Vec<u8>>) -> io::Result<()> {
        let mut snapshot: record::Snapshot = record::decode("a snapshot", &bytes)?;
        let membership = snapshot.membership.clone().try_into()?;
        self.save(meta.clone(), bytes).await?;
        {
            let mut inner = self.inner();
            inner.state = snapshot.take_state();
            inner.applied = snapshot.applied.map(LogId::from);
            inner.membership = membership;
            let answered = snapshot.answered.into_iter();
            inner.answered = answered.map(|it| (Arc::from(it.request.as_str()), it.outcome())).collect();
        }
        self.publish();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<RaftSnapshot>> {
        let inner = self.inner();
        Ok(inner.snapshot.clone().map(|(meta, snapshot)| RaftSnapshot { meta, snapshot }))
    }
}

/// The state at one moment, to be written while the log goes on.
pub(super) struct SnapshotBuilder {
    machine: StateMachine,
    state: State,
    applied: Option<LogId>,
    membership: StoredMembership,
    answered: Vec<(Arc<str>, Outcome)>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = Arc<Vec<u8>>;

    async fn build_snapshot(&mut self) -> io::Result<RaftSnapshot> {
        let meta = SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() };
        let answered = std::mem::take(&mut self.answered);
        let answered = answered.iter().map(|(request, outcome)| record::Answered::new(request, outcome));
        let snapshot = record::Snapshot::new(self.applied, &self.membership, &self.state, answered.collect());
        // A full store takes tens of milliseconds to encode.
        let encoded = tokio::task::spawn_blocking(move || record::encode(&snapshot)).await;
        let bytes = Arc::new(encoded.map_err(io::Error::other)?);
        self.machine.save(meta.clone(), Arc::clone(&bytes)).await?;
        Ok(RaftSnapshot { meta, snapshot: bytes })
    }
}
