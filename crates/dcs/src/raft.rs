//! The embedded store: one Raft group of the herd's agents, with openraft inside and nothing of it outside.
//!
//! This file makes and opens members and carries the operations of [`Store`](crate::Store) to the leader. The
//! rest: `disk` and `log` keep what was promised, `state_machine` applies it, `network` and `wire` talk to
//! the other members, `serve` answers them, `change` alters the membership, `keeper` watches over health and
//! heartbeats.
//!
//! Left out: connections and certificates (the agent's [`Transport`]), and what the keys mean.
//!
//! Hazards, and where each is met. A member without its memory must not vote: its number is bound to its disk
//! (`members`, `serve`). An operation whose answer was lost must not happen twice: every retry has the number
//! of the first attempt (`state_machine`). A leader that was replaced must not answer reads: it asks a
//! majority first, after it got the question ([`RaftStore::read`], [`RaftStore::confirm`]).

mod change;
mod disk;
mod keeper;
mod log;
mod members;
mod network;
mod record;
mod serve;
mod state_machine;
mod types;
mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, ForwardReason, ForwardToLeader, LinearizableReadError, RaftError};
use openraft::{LinearizerOption, ReadPolicy};
use pgherd_core::types::NodeName;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use self::disk::{Contents, Disk, DiskError};
use self::log::Log;
use self::members::Member;
use self::network::{CallError, Network, Own, Peers};
use self::record::{Admission, Commit, Identity};
use self::state_machine::StateMachine;
use self::types::{Command, Metrics, Outcome, Raft, TypeConfig};
use self::wire::{Lead, Led, Op, RefusalCode, Rpc};
use crate::store::{CommitError, Health, Keys, Revision, Snapshot, StoreError, Transaction};

pub use self::change::Arrangement;
pub use self::members::{Candidate, DiskId, MAX_VOTERS, choose_voters};
pub use self::network::{MAX_RPC_BYTES, Transport, TransportError};

/// The founder's number. A join gets the log index of its own entry, and index 1 is the founder's first entry
/// as leader.
const FOUNDER: u64 = 1;
/// Of a herd whose store was never made anew.
const FIRST_GENERATION: u64 = 1;
/// The log is compacted after this many entries.
const ENTRIES_PER_SNAPSHOT: u64 = 1000;
/// Entries kept behind a snapshot, for members that are a little late.
const ENTRIES_KEPT: u64 = 500;
/// A member that lacks more entries than this gets the snapshot. More than two snapshots apart.
const MAX_LAG_ENTRIES: u64 = 2 * ENTRIES_PER_SNAPSHOT + ENTRIES_KEPT;
const ENTRIES_PER_APPEND: u64 = 300;
/// Between attempts of an operation that found no leader.
const RETRY: Duration = Duration::from_millis(50);

/// What a member needs to know about itself.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its own directory, not on PGDATA's volume: a stalled data disk must not stall agreement.
    pub dir: PathBuf,
    /// The herd's random id. Members of different herds refuse each other.
    pub herd: String,
    pub name: NodeName,
    /// Given to the others' transport along with the name.
    pub address: String,
    /// Members of one host fail together; voters are spread over hosts.
    pub host: String,
    pub times: Times,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    pub heartbeat: Duration,
    /// A voter that has heard nothing from a leader stands for election after at most this time, and not
    /// before 85 % of it.
    pub election: Duration,
}

impl Default for Times {
    fn default() -> Times {
        Times { heartbeat: Duration::from_millis(200), election: Duration::from_secs(2) }
    }
}

/// Times as openraft counts them. A follower stands for election after the leader's lease and a random part
/// of another one, so that `lease` is half of [`Times::election`]. openraft has one number for the interval
/// between heartbeats and for how long the answer to one may take; so it gets the second, and `keeper` sends
/// the heartbeats: otherwise a round trip longer than a heartbeat would end every lease.
#[derive(Clone, Copy, Debug)]
struct Timing {
    heartbeat: Duration,
    lease: Duration,
    vote: Duration,
    answer: Duration,
}

impl Timing {
    fn new(times: Times) -> Result<Timing, OpenError> {
        let Times { heartbeat, election } = times;
        if heartbeat < Duration::from_millis(1) || election < heartbeat * 4 {
            return Err(OpenError::Times { heartbeat, election });
        }
        let lease = election / 2;
        Ok(Timing { heartbeat, lease, vote: lease.mul_f64(0.7), answer: lease.mul_f64(0.6) })
    }

    /// For calls that carry data, and for one attempt of an operation.
    fn data(&self) -> Duration {
        self.lease
    }

    /// Silence after which a member is not counted as there.
    fn silent(&self) -> Duration {
        self.lease * 2
    }
}

/// Why a member could not be made or opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("{dir}: holds a member of a store already")]
    Occupied { dir: PathBuf },
    #[error("{dir}: holds no member of a store: an empty directory joins, it never begins a store by itself")]
    NoMember { dir: PathBuf },
    #[error("{dir}: belongs to {found}, not to {wanted}")]
    Foreign { dir: PathBuf, found: String, wanted: String },
    #[error("{dir}: raft id {raft_id} was given to another disk and is never used again: ask for a new one")]
    OtherDisk { dir: PathBuf, raft_id: u64 },
    #[error("an election time of {election:?} is less than four heartbeats of {heartbeat:?}")]
    Times { heartbeat: Duration, election: Duration },
    #[error("{why}")]
    Disk { why: String },
    #[error("raft did not start: {why}")]
    Start { why: String },
}

impl From<DiskError> for OpenError {
    fn from(error: DiskError) -> OpenError {
        OpenError::Disk { why: error.to_string() }
    }
}

/// A directory's wish to become a member; goes to any member's [`RaftStore::add_member`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub herd: String,
    pub name: NodeName,
    pub address: String,
    pub host: String,
    pub disk: DiskId,
}

/// The answer to a [`JoinRequest`], good for the disk that asked and no other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    pub herd: String,
    pub generation: u64,
    pub raft_id: u64,
    pub disk: DiskId,
}

/// What a directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    /// A request to join was made from here, and not answered yet.
    Prepared,
    Member {
        herd: String,
        name: NodeName,
        raft_id: u64,
        generation: u64,
    },
}

/// A member of the embedded store. Clones share it; [`RaftStore::shutdown`] ends it.
#[derive(Clone)]
pub struct RaftStore {
    inner: Arc<Inner>,
}

struct Inner {
    raft: Raft,
    peers: Arc<Peers>,
    disk: Disk,
    view: watch::Receiver<Snapshot>,
    applied: watch::Receiver<u64>,
    health: watch::Receiver<Health>,
    timing: Timing,
    /// Unique among all processes, first part of every request number.
    origin: String,
    requests: AtomicU64,
    /// The snapshot that is being received.
    incoming: tokio::sync::Mutex<Option<serve::Incoming>>,
    /// Held while the membership is changed from here, one change at a time.
    changing: tokio::sync::Mutex<()>,
    keeper: AbortHandle,
    stopped: AtomicBool,
}

/// Why an operation did not reach an answer.
struct Failure {
    why: String,
    /// An attempt may have been carried out.
    doubt: bool,
    /// No later attempt can succeed.
    refused: bool,
}

enum Route {
    Here,
    Peer(u64, Member),
    Nobody,
}

impl RaftStore {
    /// What is in `config.dir`.
    pub async fn inspect(config: &Config) -> Result<Found, OpenError> {
        let dir = config.dir.clone();
        let identity = blocking(move || Ok(disk::identity(&dir)?)).await?;
        Ok(match identity {
            None => Found::Nothing,
            Some(Identity { membership: None, .. }) => Found::Prepared,
            Some(Identity { herd, name, membership: Some(admission), .. }) => {
                let Admission { raft_id, generation, .. } = admission;
                Found::Member { herd, name, raft_id, generation }
            }
        })
    }

    /// Begins a store, with this member as the only voter. Once in the life of a herd.
    pub async fn create(config: Config, transport: Arc<dyn Transport>) -> Result<RaftStore, OpenError> {
        let Config { dir, herd, name, .. } = config.clone();
        let identity = blocking(move || {
            if disk::identity(&dir)?.is_some_and(|identity| identity.membership.is_some()) {
                return Err(OpenError::Occupied { dir });
            }
            let admission = Admission { raft_id: FOUNDER, generation: FIRST_GENERATION, founder: true };
            let identity = Identity { herd, name, disk: new_disk()?, membership: Some(admission) };
            disk::write_identity(&dir, &identity)?;
            Ok(identity)
        });
        RaftStore::start(config, identity.await?, transport).await
    }

    /// Makes the directory of a new member. Asking again gives the same request until it is answered.
    pub async fn prepare(config: &Config) -> Result<JoinRequest, OpenError> {
        let Config { dir, herd, name, address, host, .. } = config.clone();
        let identity = blocking(move || {
            let identity = match disk::identity(&dir)? {
                Some(identity) if identity.membership.is_some() => return Err(OpenError::Occupied { dir }),
                Some(identity) if identity.herd == herd && identity.name == name => return Ok(identity),
                _ => Identity { herd, name, disk: new_disk()?, membership: None },
            };
            disk::write_identity(&dir, &identity)?;
            Ok(identity)
        });
        let Identity { herd, name, disk, .. } = identity.await?;
        Ok(JoinRequest { herd, name, address, host, disk })
    }

    /// Opens the prepared directory with the number it was given.
    pub async fn join(
        config: Config,
        joined: Joined,
        transport: Arc<dyn Transport>,
    ) -> Result<RaftStore, OpenError> {
        let Config { dir, .. } = config.clone();
        let identity = blocking(move || {
            let Some(mut identity) = disk::identity(&dir)? else {
                return Err(OpenError::OtherDisk { dir, raft_id: joined.raft_id });
            };
            if identity.disk != joined.disk {
                return Err(OpenError::OtherDisk { dir, raft_id: joined.raft_id });
            }
            let Joined { raft_id, generation, .. } = joined;
            let admission = Admission { raft_id, generation, founder: false };
            match identity.membership {
                Some(before) if before != admission => return Err(OpenError::Occupied { dir }),
                Some(_) => {}
                None => {
                    identity.membership = Some(admission);
                    disk::write_identity(&dir, &identity)?;
                }
            }
            Ok(identity)
        });
        RaftStore::start(config, identity.await?, transport).await
    }

    /// Opens a member that was made before. Never begins a store: that is `create`'s, once.
    pub async fn open(config: Config, transport: Arc<dyn Transport>) -> Result<RaftStore, OpenError> {
        let Config { dir, .. } = config.clone();
        let identity = blocking(move || disk::identity(&dir)?.ok_or(OpenError::NoMember { dir })).await?;
        RaftStore::start(config, identity, transport).await
    }

    async fn start(
        config: Config,
        identity: Identity,
        transport: Arc<dyn Transport>,
    ) -> Result<RaftStore, OpenError> {
        let (own, founder) = own(&config, identity)?;
        let timing = Timing::new(config.times)?;
        let dir = config.dir.clone();
        let (disk, contents) = blocking(move || Ok(Disk::open(&dir)?)).await?;
        let started =
            RaftStore::start_on(config, own, founder, timing, transport, disk.clone(), contents).await;
        if started.is_err() {
            disk.close().await;
        }
        started
    }

    async fn start_on(
        config: Config,
        own: Own,
        founder: bool,
        timing: Timing,
        transport: Arc<dyn Transport>,
        disk: Disk,
        contents: Contents,
    ) -> Result<RaftStore, OpenError> {
        let raft_config = raft_config(&own.herd, timing)?;
        let Config { dir, address, host, .. } = config;
        let unreadable =
            |error: record::RecordError| OpenError::Disk { why: format!("{}: {error}", dir.display()) };
        let log = Log::load(disk.clone(), &contents).map_err(unreadable)?;
        let begin = founder && log.is_empty() && contents.snapshot.is_none();
        let machine = StateMachine::load(disk.clone(), contents.snapshot).map_err(unreadable)?;
        let me = Member { name: own.name.clone(), address, host, disk: own.disk.clone() };
        let raft_id = own.id;
        let origin = DiskId::random().map_err(|error| OpenError::Start { why: error.to_string() })?;
        let peers = Arc::new(Peers::new(own, transport));

        let network = Network { peers: Arc::clone(&peers), data_timeout: timing.data() };
        let (view, applied) = (machine.view(), machine.applied());
        let start = |error: &dyn std::fmt::Display| OpenError::Start { why: error.to_string() };
        let raft = Raft::new(raft_id, Arc::new(raft_config), network, log.clone(), machine);
        let raft = raft.await.map_err(|error| start(&error))?;
        if begin {
            let members = BTreeMap::from([(raft_id, me)]);
            raft.initialize(members).await.map_err(|error| start(&error))?;
        }
        let (health, keeper) = keeper::start(raft.clone(), Arc::clone(&peers), disk.clone(), log, timing);
        let inner = Inner {
            raft,
            peers,
            disk,
            view,
            applied,
            health,
            timing,
            origin: origin.as_str().to_owned(),
            requests: AtomicU64::new(0),
            incoming: tokio::sync::Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            keeper,
            stopped: AtomicBool::default(),
        };
        Ok(RaftStore { inner: Arc::new(inner) })
    }

    /// This member's number in the Raft group.
    pub fn raft_id(&self) -> u64 {
        self.inner.peers.own.id
    }

    /// Of the herd, as this member knows it.
    pub fn generation(&self) -> u64 {
        self.inner.peers.own.generation
    }

    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        subscribe(&self.inner.view)
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        subscribe(&self.inner.health)
    }

    /// See [`Store::read`](crate::Store::read).
    pub async fn read(&self, keys: &Keys, timeout: Duration) -> Result<Snapshot, StoreError> {
        self.catch_up(Instant::now() + timeout).await?;
        Ok(self.inner.view.borrow().select(keys))
    }

    /// See [`Store::confirm`](crate::Store::confirm).
    pub async fn confirm(
        &self,
        key: &str,
        revision: Revision,
        timeout: Duration,
    ) -> Result<bool, StoreError> {
        self.catch_up(Instant::now() + timeout).await?;
        Ok(self.inner.view.borrow().get(key).is_some_and(|entry| entry.revision == revision))
    }

    /// See [`Store::commit`](crate::Store::commit).
    pub async fn commit(&self, transaction: Transaction, timeout: Duration) -> Result<Revision, CommitError> {
        let until = Instant::now() + timeout;
        self.inner.validate(&transaction).map_err(|why| CommitError::Refused { why })?;
        let number = self.inner.requests.fetch_add(1, Ordering::Relaxed);
        let request = format!("{}-{number}", self.inner.origin);
        let command = Command { request: Arc::from(request), transaction };
        match self.lead(&Op::Commit(Commit::from(&command)), until).await {
            Ok(Led::Committed { revision }) => Ok(Revision(revision)),
            Ok(Led::Conflict { key }) => Err(CommitError::Conflict { key }),
            Ok(Led::Refused { why }) => Err(CommitError::Refused { why }),
            Ok(other) => Err(CommitError::Unknown { why: format!("the leader answered {other:?}") }),
            Err(Failure { why, doubt: true, .. }) => Err(CommitError::Unknown { why }),
            Err(Failure { why, refused: true, .. }) => Err(CommitError::Refused { why }),
            Err(Failure { why, .. }) => Err(CommitError::Unavailable { why }),
        }
    }

    /// Waits until everything that was committed before this call has been applied here.
    async fn catch_up(&self, until: Instant) -> Result<(), StoreError> {
        let index = match self.lead(&Op::ReadIndex, until).await {
            Ok(Led::ReadIndex { index }) => index,
            other => return Err(unanswered(other)),
        };
        let mut applied = self.inner.applied.clone();
        let why = match timeout_at(until, applied.wait_for(|next| *next > index)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(_)) => "this member has stopped".to_owned(),
            Err(_) => format!("this member has not yet applied log entry {index}"),
        };
        Err(StoreError::Unavailable { why })
    }

    /// Has the leader do `op`, wherever it is. `op` must be one that can be done twice without harm.
    async fn lead(&self, op: &Op, until: Instant) -> Result<Led, Failure> {
        let inner = &self.inner;
        let mut failure = Failure { why: String::new(), doubt: false, refused: false };
        loop {
            if let Some(why) = inner.ended() {
                return Err(Failure { why, refused: !failure.doubt, ..failure });
            }
            match inner.attempt(op, until).await {
                Ok(Led::NotLeader { .. }) => failure.why = "the raft leader is changing".to_owned(),
                Ok(Led::Unavailable { why }) => failure.why = why,
                Ok(Led::Unknown { why }) => (failure.why, failure.doubt) = (why, true),
                // It says nothing about the attempt before.
                Ok(Led::Refused { why }) if failure.doubt => return Err(Failure { why, ..failure }),
                Ok(led) => return Ok(led),
                Err(refused) => return Err(refused),
            }
            let leader = inner.raft.metrics().borrow_watched().current_leader;
            let mut metrics = inner.raft.metrics();
            let news = metrics.wait_until(|metrics| metrics.current_leader != leader);
            // The result does not matter: news, or time for the next attempt.
            drop(timeout_at(until.min(Instant::now() + RETRY), news).await);
            if Instant::now() >= until {
                return Err(failure);
            }
        }
    }

    /// Stops this member and frees its directory. Its operations fail from here on.
    pub async fn shutdown(&self) {
        self.inner.stopped.store(true, Ordering::Relaxed);
        self.inner.keeper.abort();
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(%error, "raft did not stop cleanly");
        }
        self.inner.disk.close().await;
    }
}

impl Inner {
    fn validate(&self, transaction: &Transaction) -> Result<(), String> {
        transaction.validate(&self.view.borrow())
    }

    /// Why this member takes no part any more.
    fn ended(&self) -> Option<String> {
        let stopped = self.stopped.load(Ordering::Relaxed).then(|| "this member was stopped".to_owned());
        stopped.or_else(|| self.health.borrow().failed.clone())
    }

    fn metrics(&self) -> Metrics {
        self.raft.metrics().borrow_watched().clone()
    }

    fn route(&self) -> Route {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        match metrics.current_leader {
            Some(id) if id == self.peers.own.id && metrics.state.is_leader() => Route::Here,
            Some(id) if id != self.peers.own.id => {
                let member = metrics.membership_config.membership().get_node(&id);
                member.map_or(Route::Nobody, |member| Route::Peer(id, member.clone()))
            }
            _ => Route::Nobody,
        }
    }

    /// One attempt, here or at the leader. `Err` ends all attempts.
    async fn attempt(&self, op: &Op, until: Instant) -> Result<Led, Failure> {
        let (id, member) = match self.route() {
            Route::Here => return Ok(self.execute(op.clone(), until).await),
            Route::Nobody => return Ok(Led::Unavailable { why: "no raft leader is known".to_owned() }),
            Route::Peer(id, member) => (id, member),
        };
        // A leader that does not answer may be gone: do not spend all the time on it.
        let patient =
            matches!(op, Op::AddMember(_) | Op::RemoveMember { .. } | Op::TransferLeadership { .. });
        let left = until.saturating_duration_since(Instant::now());
        let within = if patient { left } else { left.min(self.timing.data()) };
        let lead = Lead { within_ms: within.as_millis() as u64, op: op.clone() };
        let mut metrics = self.raft.metrics();
        let answer = tokio::select! {
            answer = self.peers.call(id, &member, Rpc::Lead, &lead, within) => answer,
            _ = metrics.wait_until(|metrics| metrics.current_leader != Some(id)) => {
                return Ok(Led::Unknown { why: format!("raft leader {} was replaced", member.name) });
            }
        };
        let sentence = |why: &str| format!("raft leader {}: {why}", member.name);
        match answer {
            Ok(led) => Ok(led),
            Err(CallError::NotSent(why)) => Ok(Led::Unavailable { why: sentence(&why) }),
            Err(CallError::NoAnswer(why)) => Ok(Led::Unknown { why: sentence(&why) }),
            Err(CallError::Refused(refusal)) => match refusal.code {
                RefusalCode::Unable | RefusalCode::Malformed | RefusalCode::Other => {
                    Ok(Led::Unknown { why: sentence(&refusal.why) })
                }
                RefusalCode::Removed => {
                    Err(Failure { why: sentence(&refusal.why), doubt: false, refused: true })
                }
                _ => Ok(Led::Unavailable { why: sentence(&refusal.why) }),
            },
        }
    }

    /// Does `op` as the leader, if this member is the leader.
    async fn execute(&self, op: Op, until: Instant) -> Led {
        match op {
            Op::Commit(commit) => self.propose(commit.into(), until).await,
            Op::ReadIndex => self.read_index(until).await,
            Op::AddMember(request) => self.add(request, until).await,
            Op::RemoveMember { name } => self.remove(&name, until).await,
            Op::TransferLeadership { to } => self.transfer(&to, until).await,
            Op::Survey => self.survey(),
        }
    }

    async fn propose(&self, command: Command, until: Instant) -> Led {
        if let Err(why) = self.validate(&command.transaction) {
            return Led::Refused { why };
        }
        match timeout_at(until, self.raft.client_write(command)).await {
            Ok(Ok(response)) => match response.data {
                Outcome::Committed(Revision(revision)) => Led::Committed { revision },
                Outcome::Conflict(key) => Led::Conflict { key },
                Outcome::Nothing => Led::Unknown { why: "the log entry held no transaction".to_owned() },
            },
            Ok(Err(RaftError::APIError(error))) => self.not_written(error),
            // It may have reached others before this member failed.
            Ok(Err(RaftError::Fatal(error))) => {
                Led::Unknown { why: format!("the raft leader failed: {error}") }
            }
            Err(_) => Led::Unknown { why: "no majority has acknowledged it in time".to_owned() },
        }
    }

    async fn read_index(&self, until: Instant) -> Led {
        let wait = until.saturating_duration_since(Instant::now());
        let option = LinearizerOption::from(ReadPolicy::ReadIndex).with_wait_timeout(wait);
        match timeout_at(until, self.raft.get_read_linearizer(option)).await {
            Ok(Ok(linearizer)) => Led::ReadIndex { index: linearizer.read_log_id().index() },
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                self.not_leader(&forward)
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) | Err(_) => {
                Led::Unavailable { why: self.no_majority() }
            }
            Ok(Err(RaftError::Fatal(error))) => {
                Led::Unavailable { why: format!("raft member {} failed: {error}", self.peers.own.name) }
            }
        }
    }

    fn no_majority(&self) -> String {
        format!("raft leader {} does not reach a majority of the voters", self.peers.own.name)
    }

    fn not_leader(&self, forward: &ForwardToLeader<TypeConfig>) -> Led {
        match forward.reason {
            ForwardReason::LeaseExpired => Led::Unavailable { why: self.no_majority() },
            ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => {
                Led::NotLeader { leader: forward.leader_id }
            }
        }
    }

    fn not_written(&self, error: ClientWriteError<TypeConfig>) -> Led {
        match error {
            ClientWriteError::ForwardToLeader(forward) => self.not_leader(&forward),
            ClientWriteError::LogEntryDiscarded(_) => {
                Led::Unknown { why: "the raft leader was replaced while it was being written".to_owned() }
            }
            ClientWriteError::ChangeMembershipError(error) => Led::Unavailable { why: error.to_string() },
            ClientWriteError::PreconditionFailed(error) => Led::Unavailable { why: error.to_string() },
        }
    }
}

impl Drop for Inner {
    /// Without [`RaftStore::shutdown`], openraft's tasks would live on without anybody to talk to.
    fn drop(&mut self) {
        self.keeper.abort();
        let stopped = self.stopped.load(Ordering::Relaxed);
        if let (false, Ok(runtime)) = (stopped, tokio::runtime::Handle::try_current()) {
            let (raft, disk) = (self.raft.clone(), self.disk.clone());
            runtime.spawn(async move {
                drop(raft.shutdown().await);
                disk.close().await;
            });
        }
    }
}

/// A receiver that has seen the present and wakes on what comes after it.
fn subscribe<T>(template: &watch::Receiver<T>) -> watch::Receiver<T> {
    let mut receiver = template.clone();
    receiver.mark_unchanged();
    receiver
}

/// An answer that is none of those expected, or none at all.
fn unanswered(answer: Result<Led, Failure>) -> StoreError {
    match answer {
        Ok(Led::Refused { why }) | Err(Failure { why, refused: true, .. }) => StoreError::Refused { why },
        Ok(led) => StoreError::Unavailable { why: format!("the leader answered {led:?}") },
        Err(Failure { why, .. }) => StoreError::Unavailable { why },
    }
}

/// Who this member is, and whether it founded the store.
fn own(config: &Config, identity: Identity) -> Result<(Own, bool), OpenError> {
    let Config { dir, herd, name, .. } = config.clone();
    if (&identity.herd, &identity.name) != (&herd, &name) {
        let found = format!("node {} of herd {}", identity.name, identity.herd);
        return Err(OpenError::Foreign { dir, found, wanted: format!("node {name} of herd {herd}") });
    }
    let Some(Admission { raft_id, generation, founder }) = identity.membership else {
        return Err(OpenError::NoMember { dir });
    };
    Ok((Own { herd, generation, id: raft_id, name, disk: identity.disk }, founder))
}

fn raft_config(herd: &str, timing: Timing) -> Result<openraft::Config, OpenError> {
    let ms = |time: Duration| time.as_millis() as u64;
    let config = openraft::Config {
        cluster_name: herd.to_owned(),
        heartbeat_interval: ms(timing.answer),
        election_timeout_min: ms(timing.vote),
        election_timeout_max: ms(timing.lease),
        max_payload_entries: ENTRIES_PER_APPEND,
        replication_lag_threshold: MAX_LAG_ENTRIES,
        snapshot_policy: openraft::SnapshotPolicy::LogsSinceLast(ENTRIES_PER_SNAPSHOT),
        max_in_snapshot_log_to_keep: ENTRIES_KEPT,
        purge_batch_size: ENTRIES_KEPT / 5,
        // A member that was away must not end a healthy leader's term by coming back.
        enable_pre_vote: Some(true),
        // The commit point on the disk may be old; a leader restored from it could answer reads with old
        // state.
        enable_leader_restore: Some(false),
        ..openraft::Config::default()
    };
    config.validate().map_err(|error| OpenError::Start { why: error.to_string() })
}

fn new_disk() -> Result<DiskId, OpenError> {
    DiskId::random().map_err(|error| OpenError::Disk { why: format!("/dev/urandom: {error}") })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OpenError> + Send + 'static,
) -> Result<T, OpenError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(OpenError::Disk { why: error.to_string() }))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use futures_util::future::BoxFuture;
    use tempfile::TempDir;

    use super::*;
    use crate::store::{Keys, Role};

    struct Nowhere;

    impl Transport for Nowhere {
        fn call(
            &self,
            _: &NodeName,
            _: &str,
            _: &'static str,
            _: Vec<u8>,
            _: Duration,
        ) -> BoxFuture<'static, Result<Vec<u8>, TransportError>> {
            Box::pin(async { Err(TransportError::NotSent("nobody is there".to_owned())) })
        }
    }

    const TIMEOUT: Duration = Duration::from_secs(5);

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_failed_disk_ends_the_member_and_not_the_process() {
        let dir = TempDir::new().unwrap();
        let config = Config {
            dir: dir.path().join("raft"),
            herd: "h".to_owned(),
            name: "a".parse().unwrap(),
            address: String::new(),
            host: String::new(),
            times: Times::default(),
        };
        let first = RaftStore::create(config.clone(), Arc::new(Nowhere)).await.unwrap();
        let before = first.commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
        first.shutdown().await;

        let faults = disk::Faults::default();
        let opened = Disk::open_failing(&config.dir, &faults).unwrap();
        let (disk, contents) = opened;
        let founder = Own {
            herd: "h".to_owned(),
            generation: FIRST_GENERATION,
            id: FOUNDER,
            name: "a".parse().unwrap(),
            disk: record::tests::disk("1"),
        };
        let timing = Timing::new(config.times).unwrap();
        let store =
            RaftStore::start_on(config.clone(), founder, true, timing, Arc::new(Nowhere), disk, contents);
        let store = store.await.unwrap();
        assert!(store.confirm("k", before, TIMEOUT).await.unwrap());
        let mut health = store.health();

        faults.0.store(true, Ordering::SeqCst);
        let started = Instant::now();
        let commit = store.commit(Transaction::new().put("k", "2"), TIMEOUT).await;
        assert!(matches!(commit, Err(CommitError::Unknown { .. })), "it may be on the disk: {commit:?}");
        let failed = health.wait_for(|health| health.failed.is_some());
        let failed = tokio::time::timeout(TIMEOUT, failed).await.unwrap().unwrap().clone();
        assert_eq!(failed.role, Role::Stopped);
        assert!(failed.failed.as_ref().unwrap().contains("raft.redb"), "{failed:?}");
        let commit = store.commit(Transaction::new().put("k", "3"), TIMEOUT).await;
        assert!(matches!(commit, Err(CommitError::Refused { .. })), "nothing is tried any more: {commit:?}");
        assert!(store.read(&Keys::All, TIMEOUT).await.is_err());
        assert!(started.elapsed() < TIMEOUT, "known at once, not at the deadline");
        assert_eq!(store.watch().borrow().get("k").unwrap().value, b"1");
        store.shutdown().await;

        faults.0.store(false, Ordering::SeqCst);
        let store = RaftStore::open(config, Arc::new(Nowhere)).await.unwrap();
        let seen = store.read(&Keys::All, TIMEOUT).await.unwrap();
        assert!(seen.get("k").is_some(), "what was acknowledged before the fault is there");
        store.shutdown().await;
    }

    #[test]
    fn times_hold_together() {
        let timing = Timing::new(Times::default()).unwrap();
        assert!(timing.answer < timing.vote && timing.vote < timing.lease);
        let silence = timing.lease + timing.vote..timing.lease * 2;
        assert!(silence.start >= Duration::from_secs(1) && silence.end <= Duration::from_secs(2));
        assert!(raft_config("h", timing).is_ok());
        let least = Times { heartbeat: Duration::from_millis(25), election: Duration::from_millis(100) };
        assert!(raft_config("h", Timing::new(least).unwrap()).is_ok());
    }
}
