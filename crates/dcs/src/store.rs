//! What every store offers, whatever is behind it: values, transactions, errors, health.
//!
//! Left out: how agreement is reached (`raft`, `memory`), and what keys and values mean (the callers).
//! Every operation here maps on one etcd request (a range, a txn, a linearizable range of one key, a watch),
//! so that an etcd store can stand beside the other two without a change to any caller.
//!
//! Hazard: a store that reports a commit which did not happen, or denies one which did, breaks elections.
//! That is why an outcome that nobody knows is a variant of its own, [`CommitError::Unknown`].

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgherd_core::types::NodeName;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::memory::MemoryStore;
use crate::raft::RaftStore;

/// Longest key. Keys are paths such as `clusters/main/election`.
pub const MAX_KEY_BYTES: usize = 256;
/// Largest value. The largest one is the herd's specification, a few kilobytes.
pub const MAX_VALUE_BYTES: usize = 256 * 1024;
/// Checks, puts and deletes of one transaction together; etcd's own default limit.
pub const MAX_OPERATIONS: usize = 128;
/// Keys and values of one transaction together; below etcd's limit for a request.
pub const MAX_TRANSACTION_BYTES: usize = 1024 * 1024;
/// Keys in the store. This and the next are checked where a transaction enters, not where it is applied, so
/// that limits may differ between versions; transactions in flight together may overshoot them by their own
/// size.
pub const MAX_KEYS: usize = 10_000;
/// Keys and values in the store together; every member holds them in memory.
pub const MAX_STORE_BYTES: usize = 32 * 1024 * 1024;

/// Time given to an operation by a caller who has no better number: two Raft elections.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// The store-wide number of a commit. Grows with each commit, without promise to be dense.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A value and the revision of the commit that wrote it last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub value: Vec<u8>,
    pub revision: Revision,
}

/// Keys and their entries at one moment. Cloning is cheap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    revision: Revision,
    /// Of the keys and values of the whole store.
    store_bytes: usize,
    entries: Arc<BTreeMap<Arc<str>, Arc<Entry>>>,
}

impl Snapshot {
    pub(crate) fn new(
        revision: Revision,
        store_bytes: usize,
        entries: Arc<BTreeMap<Arc<str>, Arc<Entry>>>,
    ) -> Snapshot {
        Snapshot { revision, store_bytes, entries }
    }

    /// Of the last commit in the whole store, whichever keys it touched.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key).map(|entry| &**entry)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(key, entry)| (&**key, &**entry))
    }

    /// The entries whose keys start with `prefix`, in the order of their keys.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Entry)> {
        self.entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(key, entry)| (&**key, &**entry))
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn select(&self, keys: &Keys) -> Snapshot {
        let take = |key: &Arc<str>, entry: &Arc<Entry>| (Arc::clone(key), Arc::clone(entry));
        let entries = match keys {
            Keys::All => Arc::clone(&self.entries),
            Keys::Prefix(prefix) => Arc::new(
                self.entries
                    .range::<str, _>((Bound::Included(prefix.as_str()), Bound::Unbounded))
                    .take_while(|(key, _)| key.starts_with(prefix.as_str()))
                    .map(|(key, entry)| take(key, entry))
                    .collect(),
            ),
            Keys::These(keys) => Arc::new(
                keys.iter()
                    .filter_map(|key| self.entries.get_key_value(key.as_str()))
                    .map(|(key, entry)| take(key, entry))
                    .collect(),
            ),
        };
        Snapshot { revision: self.revision, store_bytes: self.store_bytes, entries }
    }
}

/// Which keys a read returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    All,
    Prefix(String),
    These(Vec<String>),
}

impl Keys {
    pub fn one(key: impl Into<String>) -> Keys {
        Keys::These(vec![key.into()])
    }

    pub fn prefix(prefix: impl Into<String>) -> Keys {
        Keys::Prefix(prefix.into())
    }
}

/// What must hold of a key for a transaction to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub key: String,
    /// The revision the key must have; `None`: the key must be absent.
    pub revision: Option<Revision>,
}

/// All checks hold, then all puts and deletes happen, at one revision; or nothing does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    pub checks: Vec<Check>,
    pub puts: Vec<(String, Vec<u8>)>,
    pub deletes: Vec<String>,
}

impl Transaction {
    pub fn new() -> Transaction {
        Transaction::default()
    }

    /// The key must still be as it was at `revision`.
    #[must_use]
    pub fn require(mut self, key: impl Into<String>, revision: Revision) -> Transaction {
        self.checks.push(Check { key: key.into(), revision: Some(revision) });
        self
    }

    #[must_use]
    pub fn require_absent(mut self, key: impl Into<String>) -> Transaction {
        self.checks.push(Check { key: key.into(), revision: None });
        self
    }

    /// The key must be as in `seen`, present at its revision or absent.
    #[must_use]
    pub fn require_unchanged(mut self, key: impl Into<String>, seen: Option<&Entry>) -> Transaction {
        self.checks.push(Check { key: key.into(), revision: seen.map(|entry| entry.revision) });
        self
    }

    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Transaction {
        self.puts.push((key.into(), value.into()));
        self
    }

    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Transaction {
        self.deletes.push(key.into());
        self
    }

    /// Refuses what breaks a limit, given the whole store as it is now, and a key written twice, which etcd
    /// refuses too.
    pub(crate) fn validate(&self, now: &Snapshot) -> Result<(), String> {
        let operations = self.checks.len() + self.puts.len() + self.deletes.len();
        if operations > MAX_OPERATIONS {
            return Err(format!("{operations} operations in one transaction, the limit is {MAX_OPERATIONS}"));
        }
        let checked = self.checks.iter().map(|check| &check.key);
        let written = self.puts.iter().map(|(key, _)| key).chain(&self.deletes);
        for key in checked.chain(written.clone()) {
            if key.is_empty() || key.len() > MAX_KEY_BYTES {
                return Err(format!("a key of {} bytes, the limits are 1 and {MAX_KEY_BYTES}", key.len()));
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = written.clone().find(|key| !seen.insert(key.as_str())) {
            return Err(format!("key \"{twice}\" is written twice in one transaction"));
        }
        if let Some((key, value)) = self.puts.iter().find(|(_, value)| value.len() > MAX_VALUE_BYTES) {
            let bytes = value.len();
            return Err(format!("key \"{key}\": a value of {bytes} bytes, the limit is {MAX_VALUE_BYTES}"));
        }
        let bytes = written.map(String::len).sum::<usize>()
            + self.puts.iter().map(|(_, value)| value.len()).sum::<usize>();
        if bytes > MAX_TRANSACTION_BYTES {
            return Err(format!("a transaction of {bytes} bytes, the limit is {MAX_TRANSACTION_BYTES}"));
        }
        let adds = self.puts.iter().any(|(key, _)| now.get(key).is_none());
        if adds && now.len() >= MAX_KEYS {
            return Err(format!("the store holds {} keys, the limit is {MAX_KEYS}", now.len()));
        }
        if !self.puts.is_empty() && now.store_bytes + bytes > MAX_STORE_BYTES {
            return Err(format!("the store holds {} bytes, the limit is {MAX_STORE_BYTES}", now.store_bytes));
        }
        Ok(())
    }
}

/// Why a read or a confirmation has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No majority, no leader, no connection, a failed disk: the sentence says which.
    #[error("store unavailable: {why}")]
    Unavailable { why: String },
    /// Asking again cannot help.
    #[error("store refused: {why}")]
    Refused { why: String },
}

/// Why a commit did not return a revision.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// It did not happen: a check on this key failed.
    #[error("key \"{key}\" is not as expected")]
    Conflict { key: String },
    /// It did not happen, and never will as it stands: a limit, a malformed transaction.
    #[error("store refused a commit: {why}")]
    Refused { why: String },
    /// It did not happen.
    #[error("store unavailable: {why}")]
    Unavailable { why: String },
    /// It may have happened, or may still happen. Read before deciding anything.
    #[error("the outcome of a commit is unknown: {why}")]
    Unknown { why: String },
}

/// The kind of store, as `status` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Raft,
    Memory,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Raft => "raft",
            Kind::Memory => "memory",
        })
    }
}

/// What this handle's own member is in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Leader,
    Follower,
    Candidate,
    Learner,
    /// Stopped, failed or removed: see [`Health::failed`].
    Stopped,
}

/// One member of the store as this handle knows it.
#[derive(Clone, Debug)]
pub struct MemberHealth {
    pub raft_id: u64,
    pub name: NodeName,
    pub address: String,
    pub host: String,
    pub voter: bool,
    /// When this member last answered or called, as this handle saw it; `None`: not since the start. A
    /// follower hears only from the leader, so ask the leader ([`RaftStore::survey`]) about the others.
    pub last_contact: Option<Instant>,
    /// Why it does not answer this handle's member, if that is so now.
    pub trouble: Option<String>,
}

impl MemberHealth {
    pub fn learner(&self) -> bool {
        !self.voter
    }
}

impl PartialEq for MemberHealth {
    /// The time of the last contact changes five times a second and is no news.
    fn eq(&self, other: &MemberHealth) -> bool {
        let facts = |member: &MemberHealth| {
            (member.raft_id, member.name.clone(), member.address.clone(), member.host.clone(), member.voter)
        };
        facts(self) == facts(other) && self.trouble.is_some() == other.trouble.is_some()
    }
}

/// The store as this handle sees it. A watch on it wakes when a fact changes, not at every contact.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    pub kind: Kind,
    /// The Raft leader, as far as this member knows; may be stale on a member that is cut off.
    pub leader: Option<NodeName>,
    pub role: Role,
    /// Raft's term. Not the term of any PostgreSQL primary.
    pub raft_term: u64,
    pub members: Vec<MemberHealth>,
    /// This member takes no part any more, and why: its disk failed, it was removed, it was stopped.
    pub failed: Option<String>,
}

/// A handle to the store. Clones share everything.
#[derive(Clone)]
pub struct Store {
    behind: Behind,
}

#[derive(Clone)]
enum Behind {
    Raft(RaftStore),
    Memory(MemoryStore),
}

impl From<RaftStore> for Store {
    fn from(raft: RaftStore) -> Store {
        Store { behind: Behind::Raft(raft) }
    }
}

impl From<MemoryStore> for Store {
    fn from(memory: MemoryStore) -> Store {
        Store { behind: Behind::Memory(memory) }
    }
}

impl Store {
    /// Linearizable: sees every commit that returned before this call began. One read is one moment.
    pub async fn read(&self, keys: &Keys, timeout: Duration) -> Result<Snapshot, StoreError> {
        match &self.behind {
            Behind::Raft(raft) => raft.read(keys, timeout).await,
            Behind::Memory(memory) => memory.read(keys, timeout).await,
        }
    }

    /// Compare-and-set over several keys. Retries inside `timeout` while no leader is known; a lost answer is
    /// asked for again under the same request number, so [`CommitError::Unknown`] means that time ran out.
    pub async fn commit(&self, transaction: Transaction, timeout: Duration) -> Result<Revision, CommitError> {
        match &self.behind {
            Behind::Raft(raft) => raft.commit(transaction, timeout).await,
            Behind::Memory(memory) => memory.commit(transaction, timeout).await,
        }
    }

    /// Whether `key` is still at `revision`, linearizably and without writing: one round to a majority.
    /// A lease that rests on the answer is counted from before the call.
    pub async fn confirm(
        &self,
        key: &str,
        revision: Revision,
        timeout: Duration,
    ) -> Result<bool, StoreError> {
        match &self.behind {
            Behind::Raft(raft) => raft.confirm(key, revision, timeout).await,
            Behind::Memory(memory) => memory.confirm(key, revision, timeout).await,
        }
    }

    /// All keys as far as they have arrived here: possibly stale, never going back while the process lives.
    /// Wakes on every change; states in between may be skipped, the last one never is.
    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        match &self.behind {
            Behind::Raft(raft) => raft.watch(),
            Behind::Memory(memory) => memory.watch(),
        }
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        match &self.behind {
            Behind::Raft(raft) => raft.health(),
            Behind::Memory(memory) => memory.health(),
        }
    }

    /// Members, leadership, RPCs: what only the embedded store has.
    pub fn raft(&self) -> Option<&RaftStore> {
        match &self.behind {
            Behind::Raft(raft) => Some(raft),
            Behind::Memory(_) => None,
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.behind {
            Behind::Raft(_) => Kind::Raft,
            Behind::Memory(_) => Kind::Memory,
        };
        write!(f, "Store({kind})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_enforced_with_a_sentence() {
        let fine = Transaction::new().require_absent("a").put("a", "1").delete("b");
        let empty = Snapshot::default();
        assert_eq!(fine.validate(&empty), Ok(()));
        let cases = [
            (Transaction::new().put("", ""), "a key of 0 bytes"),
            (Transaction::new().delete("k".repeat(MAX_KEY_BYTES + 1)), "a key of 257 bytes"),
            (Transaction::new().put("k", vec![0; MAX_VALUE_BYTES + 1]), "a value of 262145 bytes"),
            (Transaction::new().put("k", "1").delete("k"), "\"k\" is written twice"),
            (
                (0..=MAX_OPERATIONS).fold(Transaction::new(), |t, i| t.require_absent(i.to_string())),
                "129 operations",
            ),
            (
                (0..5).fold(Transaction::new(), |t, i| t.put(i.to_string(), vec![0; MAX_VALUE_BYTES])),
                "a transaction of 1310725 bytes",
            ),
        ];
        for (transaction, sentence) in cases {
            let refusal = transaction.validate(&empty).unwrap_err();
            assert!(refusal.contains(sentence), "{refusal}");
        }
    }

    #[test]
    fn a_full_store_takes_changes_but_no_more_keys() {
        let entry = Arc::new(Entry { value: vec![], revision: Revision(1) });
        let key = |i: usize| Arc::from(i.to_string());
        let entries: BTreeMap<Arc<str>, _> = (0..MAX_KEYS).map(|i| (key(i), Arc::clone(&entry))).collect();
        let full = Snapshot::new(Revision(1), MAX_STORE_BYTES - 10, Arc::new(entries));
        let refusal = Transaction::new().put("new", "").validate(&full).unwrap_err();
        assert!(refusal.contains("the limit is 10000"), "{refusal}");
        assert_eq!(Transaction::new().put("1", "more").delete("2").validate(&full), Ok(()));
        let refusal = Transaction::new().put("1", "x".repeat(10)).validate(&full).unwrap_err();
        assert!(refusal.contains("the limit is 33554432"), "{refusal}");
    }

    #[test]
    fn a_selection_keeps_the_revision_and_only_the_keys_asked_for() {
        let entry = |revision| Arc::new(Entry { value: vec![], revision: Revision(revision) });
        let entries = [("a/1", 1), ("a/2", 2), ("b", 3)].map(|(key, at)| (Arc::from(key), entry(at)));
        let all = Snapshot::new(Revision(3), 0, Arc::new(entries.into_iter().collect()));
        let names = |snapshot: &Snapshot| snapshot.iter().map(|(key, _)| key.to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&all.select(&Keys::prefix("a/"))), ["a/1", "a/2"]);
        assert_eq!(names(&all.select(&Keys::These(vec!["b".into(), "none".into()]))), ["b"]);
        assert_eq!(all.select(&Keys::one("b")).revision(), Revision(3));
        assert_eq!(all.with_prefix("a/").count(), 2);
    }
}
