//! The store's content as types: which keys there are, what their values mean, and how the cluster's record
//! is changed.
//!
//! Everything that an agent agrees on with others passes through here. A value that does not read, or is of
//! a later format, is an error that names its key; it is never taken for absent.
//!
//! Hazard: a change that skips the compare-and-set lets two nodes believe different things.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pgherd_core::record::{Proposal, Record, Refusal};
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::NodeName;
use pgherd_dcs::{CommitError, Entry, Keys, Revision, Snapshot, Store, StoreError, Transaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::history;

/// Name, random id and generation of the herd.
pub const HERD: &str = "herd";
/// What the operator wants, with its generation.
pub const SPEC: &str = "spec";
/// The authority's key and the passwords of PostgreSQL's roles. Never in an answer of the API.
pub const SECRETS: &str = "secrets";
const CLUSTER_PREFIX: &str = "cluster/";
const TOKEN_PREFIX: &str = "token/";

/// A conflict means that somebody else wrote; more in a row than members that could write mean a fault.
const MAX_ATTEMPTS: u32 = 20;

pub fn cluster_key(cluster: &NodeName) -> String {
    format!("{CLUSTER_PREFIX}{cluster}")
}

pub fn token_key(id: &str) -> String {
    format!("{TOKEN_PREFIX}{id}")
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Herd {
    pub format: u32,
    pub name: NodeName,
    pub id: String,
    /// Grows when a lost majority of the store was overridden.
    pub generation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredSpec {
    /// Grows with each `apply`.
    pub generation: u64,
    pub spec: HerdSpec,
}

/// By name, so that one more secret needs no new format.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secrets(pub BTreeMap<String, String>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Secrets").field(&self.0.len()).finish()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AgreedError {
    #[error("key \"{key}\" of the store does not read: {why}")]
    Malformed { key: String, why: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("key \"{key}\" was changed by others {MAX_ATTEMPTS} times in a row")]
    Contended { key: String },
}

/// Reads one value.
pub fn parse<T: DeserializeOwned>(key: &str, entry: &Entry) -> Result<T, AgreedError> {
    serde_json::from_slice(&entry.value)
        .map_err(|error| AgreedError::Malformed { key: key.to_owned(), why: error.to_string() })
}

/// The value of `key` in a snapshot, with its revision.
pub fn value<T: DeserializeOwned>(
    snapshot: &Snapshot,
    key: &str,
) -> Result<Option<(T, Revision)>, AgreedError> {
    let Some(entry) = snapshot.get(key) else { return Ok(None) };
    Ok(Some((parse(key, entry)?, entry.revision)))
}

/// The cluster's record; before anything was agreed it is the empty one.
pub fn record(snapshot: &Snapshot, cluster: &NodeName) -> Result<(Record, Option<Revision>), AgreedError> {
    let key = cluster_key(cluster);
    match value::<Record>(snapshot, &key)? {
        None => Ok((Record::empty(), None)),
        Some((record, _)) if record.version != Record::VERSION => Err(AgreedError::Malformed {
            why: format!("format {}, this program reads {}", record.version, Record::VERSION),
            key,
        }),
        Some((record, revision)) => Ok((record, Some(revision))),
    }
}

pub fn to_json<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>, AgreedError> {
    serde_json::to_vec(value)
        .map_err(|error| AgreedError::Malformed { key: key.to_owned(), why: error.to_string() })
}

/// A record as a commit left it. The local view learns of that later, when Raft tells its follower.
#[derive(Clone, Debug)]
pub struct Agreed {
    pub record: Record,
    pub revision: Revision,
}

/// Changes the cluster's record by compare-and-set, trying again while the proposal still fits.
///
/// The first attempt builds on the local view, which saves a round trip and costs nothing: an outdated view
/// fails the comparison. After an unknown outcome the record is read again, where the proposal, if it
/// happened, no longer fits.
pub async fn propose(
    store: &Store,
    cluster: &NodeName,
    proposal: &Proposal,
    within: Duration,
) -> Result<Agreed, AgreedError> {
    let key = cluster_key(cluster);
    let deadline = tokio::time::Instant::now() + within;
    let mut view = store.watch().borrow().clone();
    for _ in 0..MAX_ATTEMPTS {
        let (before, _) = record(&view, cluster)?;
        let mut after = before.apply(proposal)?;
        if let Some((code, line)) = history::line(&before, &after, proposal) {
            after.note(unix_seconds(), code, line);
        }
        let change = Transaction::new()
            .require_unchanged(key.clone(), view.get(&key))
            .put(key.clone(), to_json(&key, &after)?);
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        match store.commit(change, left).await {
            Ok(revision) => return Ok(Agreed { record: after, revision }),
            Err(CommitError::Conflict { .. } | CommitError::Unknown { .. }) => {
                let left = deadline.saturating_duration_since(tokio::time::Instant::now());
                view = store.read(&Keys::one(key.clone()), left).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(AgreedError::Contended { key })
}

/// Changes one JSON value by compare-and-set.
pub async fn update<T, E>(
    store: &Store,
    key: &str,
    within: Duration,
    mut change: impl FnMut(Option<T>) -> Result<T, E>,
) -> Result<T, E>
where
    T: Serialize + DeserializeOwned,
    E: From<AgreedError>,
{
    let deadline = tokio::time::Instant::now() + within;
    let left = || deadline.saturating_duration_since(tokio::time::Instant::now());
    for _ in 0..MAX_ATTEMPTS {
        let view = store.read(&Keys::one(key), left()).await.map_err(AgreedError::from)?;
        let next = change(value(&view, key)?.map(|(value, _)| value))?;
        let transaction =
            Transaction::new().require_unchanged(key, view.get(key)).put(key, to_json(key, &next)?);
        match store.commit(transaction, left()).await {
            Ok(_) => return Ok(next),
            Err(CommitError::Conflict { .. } | CommitError::Unknown { .. }) => {}
            Err(error) => return Err(AgreedError::from(error).into()),
        }
    }
    Err(AgreedError::Contended { key: key.to_owned() }.into())
}

/// For people who read `pgherd history`; no decision looks at it.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
