//! Calls from this member to the others: openraft's RPCs over the transport that the agent gave.
//!
//! Left out: connections, TLS, names to addresses (the agent). Hazards: a `pre_vote` that is granted without
//! asking (openraft's default) makes pre-vote void; an unreachable member must be an error here, never an
//! answer. And what this file says about a member ends up in `status`, so trouble is recorded once, where it
//! is seen.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{Backoff, RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use pgherd_core::types::NodeName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::members::{DiskId, Member};
use super::record::Bytes;
use super::types::{RaftSnapshot, TypeConfig, Vote};
use super::wire::{self, Envelope, Receiver, Refusal, RefusalCode, Rpc, Sender};

/// Largest RPC body: an append of [`super::log::MAX_APPEND_BYTES`] and one more entry, where every byte of
/// its values needs six in JSON. The agent's limit for a request must not be lower.
pub const MAX_RPC_BYTES: usize = 16 * 1024 * 1024;
const SNAPSHOT_PART_BYTES: usize = 512 * 1024;
/// Between attempts to replicate to a member that does not answer. Constant, because a member that comes back
/// should not wait for a backoff that grew while it was away.
const RETRY: Duration = Duration::from_millis(200);
const TROUBLE_FADES: Duration = Duration::from_secs(5);

/// Carries one RPC to another member.
pub trait Transport: Send + Sync + 'static {
    /// Sends `body` for `rpc` to the member `peer`, whose address when it joined was `address`, and returns
    /// the bytes that [`RaftStore::handle`](super::RaftStore::handle) returned there.
    ///
    /// The certificate must name `peer`. A call that is dropped or runs into `timeout` should not tear down a
    /// connection that is only slow: at a round trip of 300 ms, making it again takes longer than most calls
    /// may.
    fn call(
        &self,
        peer: &NodeName,
        address: &str,
        rpc: &'static str,
        body: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, TransportError>>;
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The other side has certainly not seen it: no connection was there.
    #[error("{0}")]
    NotSent(String),
    /// It may have been seen and acted on.
    #[error("{0}")]
    NoAnswer(String),
}

/// Who this member is in every envelope it sends.
#[derive(Clone, Debug)]
pub(super) struct Own {
    pub(super) herd: String,
    pub(super) generation: u64,
    pub(super) id: u64,
    pub(super) name: NodeName,
    pub(super) disk: DiskId,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Contact {
    pub(super) heard: Option<Instant>,
    /// How the last call failed, and when.
    failed: Option<(Instant, String)>,
}

impl Contact {
    /// Why it does not answer now. A member calls only whom it has something to tell; an old failure, or one
    /// from before the last sign of life, says nothing.
    pub(super) fn trouble(&self) -> Option<String> {
        let (at, why) = self.failed.as_ref()?;
        let stale = at.elapsed() > TROUBLE_FADES || self.heard.is_some_and(|heard| heard > *at);
        (!stale).then(|| why.clone())
    }
}

#[derive(Debug)]
pub(super) enum CallError {
    NotSent(String),
    NoAnswer(String),
    Refused(Refusal),
}

impl CallError {
    pub(super) fn why(&self) -> &str {
        match self {
            CallError::NotSent(why) | CallError::NoAnswer(why) => why,
            CallError::Refused(refusal) => &refusal.why,
        }
    }
}

/// The other members, as seen from here.
pub(super) struct Peers {
    pub(super) own: Own,
    transport: Arc<dyn Transport>,
    contacts: Mutex<BTreeMap<u64, Contact>>,
    /// Set when another member says that this one was removed.
    pub(super) removed: watch::Sender<Option<String>>,
}

impl Peers {
    pub(super) fn new(own: Own, transport: Arc<dyn Transport>) -> Peers {
        Peers { own, transport, contacts: Mutex::default(), removed: watch::Sender::new(None) }
    }

    pub(super) fn contact(&self, id: u64) -> Contact {
        self.contacts().get(&id).cloned().unwrap_or_default()
    }

    /// A member called, so it is there.
    pub(super) fn heard(&self, id: u64) {
        self.contacts().entry(id).or_default().heard = Some(Instant::now());
    }

    /// Forgets members that are not among `ids` any more.
    pub(super) fn retain(&self, ids: impl Fn(u64) -> bool) {
        self.contacts().retain(|id, _| ids(*id));
    }

    fn contacts(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Contact>> {
        // No code below panics while it holds the lock.
        self.contacts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        id: u64,
        member: &Member,
        rpc: Rpc,
        ask: &Q,
        timeout: Duration,
    ) -> Result<A, CallError> {
        let Own { herd, generation, id: own_id, name, disk } = self.own.clone();
        let envelope = Envelope {
            v: wire::VERSION,
            herd,
            generation,
            from: Sender { id: own_id, name, disk },
            to: Receiver { id, disk: member.disk.clone() },
        };
        let body = wire::ask(&envelope, ask);
        let call = self.transport.call(&member.name, &member.address, rpc.name(), body, timeout);
        let result = match tokio::time::timeout(timeout, call).await {
            Ok(Ok(body)) => wire::answered(&body).map_err(CallError::Refused),
            Ok(Err(TransportError::NotSent(why))) => Err(CallError::NotSent(why)),
            Ok(Err(TransportError::NoAnswer(why))) => Err(CallError::NoAnswer(why)),
            Err(_) => Err(CallError::NoAnswer(format!("no answer in {} ms", timeout.as_millis()))),
        };
        self.record(id, member, result.as_ref().err());
        result
    }

    /// Remembers how a call ended, and says so when it ended otherwise than the one before.
    fn record(&self, id: u64, member: &Member, error: Option<&CallError>) {
        if let Some(CallError::Refused(Refusal { code: RefusalCode::Removed, why })) = error {
            self.removed.send_if_modified(|removed| {
                removed.is_none() && {
                    *removed = Some(why.clone());
                    true
                }
            });
        }
        let mut contacts = self.contacts();
        let contact = contacts.entry(id).or_default();
        match error {
            None => {
                contact.heard = Some(Instant::now());
                if contact.failed.take().is_some() {
                    tracing::info!(member = %member.name, raft_id = id, "raft member answers again");
                }
            }
            Some(error) => {
                let why = error.why();
                if contact.failed.is_none() {
                    tracing::warn!(member = %member.name, raft_id = id, why, "raft member does not answer");
                }
                contact.failed = Some((Instant::now(), why.to_owned()));
            }
        }
    }
}

/// Makes clients; openraft asks it for one per member and purpose.
pub(super) struct Network {
    pub(super) peers: Arc<Peers>,
    /// For calls that carry data, which may take longer than a heartbeat.
    pub(super) data_timeout: Duration,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Client;

    async fn new_client(&mut self, id: u64, member: &Member) -> Client {
        Client { peers: Arc::clone(&self.peers), id, member: member.clone(), data_timeout: self.data_timeout }
    }
}

pub(super) struct Client {
    peers: Arc<Peers>,
    id: u64,
    member: Member,
    data_timeout: Duration,
}

/// A little less than openraft waits: it drops a call that takes longer, and then nothing would be recorded.
fn within(option: &RPCOption) -> Duration {
    option.hard_ttl().mul_f64(0.9)
}

impl Client {
    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        rpc: Rpc,
        ask: &Q,
        timeout: Duration,
    ) -> Result<A, RPCError<TypeConfig>> {
        let result = self.peers.call(self.id, &self.member, rpc, ask, timeout).await;
        result.map_err(|error| match error {
            CallError::NoAnswer(_) => RPCError::Timeout(Timeout {
                action: if rpc == Rpc::Append { RPCTypes::AppendEntries } else { RPCTypes::Vote },
                id: self.peers.own.id,
                target: self.id,
                timeout,
            }),
            error => RPCError::Unreachable(Unreachable::from_string(error.why())),
        })
    }
}

impl RaftNetworkV2<TypeConfig> for Client {
    type SnapshotData = Arc<Vec<u8>>;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let empty = request.entries.is_empty();
        let timeout = if empty { within(&option) } else { self.data_timeout };
        let appended: wire::Appended = self.call(Rpc::Append, &wire::Append::from(&request), timeout).await?;
        Ok(appended.into())
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let voted: wire::Voted =
            self.call(Rpc::Vote, &wire::AskVote::from(&request), within(&option)).await?;
        Ok(voted.into())
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let voted: wire::Voted =
            self.call(Rpc::PreVote, &wire::AskVote::from(&request), within(&option)).await?;
        Ok(voted.into())
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: RaftSnapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let unable = |why: String| StreamingError::Unreachable(Unreachable::from_string(why));
        let transfer = DiskId::random().map_err(|error| unable(error.to_string()))?;
        let bytes = &*snapshot.snapshot;
        let send = async {
            let total = bytes.len() as u64;
            let mut offset = 0;
            loop {
                let end = bytes.len().min(offset + SNAPSHOT_PART_BYTES);
                let part = wire::SnapshotPart {
                    vote: vote.into(),
                    transfer: transfer.as_str().to_owned(),
                    offset: offset as u64,
                    total,
                    bytes: Bytes(bytes[offset..end].to_vec()),
                };
                match self.call(Rpc::Snapshot, &part, self.data_timeout).await {
                    Ok(wire::SnapshotTaken::Whole(vote)) => return Ok(SnapshotResponse::new(vote.into())),
                    Ok(wire::SnapshotTaken::Part) if end < bytes.len() => offset = end,
                    Ok(wire::SnapshotTaken::Part) => {
                        let why = format!("{} did not notice the end of a snapshot", self.member.name);
                        return Err(unable(why));
                    }
                    Err(RPCError::Timeout(timeout)) => return Err(StreamingError::Timeout(timeout)),
                    Err(error) => return Err(StreamingError::Network(NetworkError::from_string(error))),
                }
            }
        };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = send => sent,
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let transfer = wire::Transfer::from(&request);
        let transferred: wire::Transferred = self.call(Rpc::Transfer, &transfer, within(&option)).await?;
        Ok(transferred.into())
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(RETRY)))
    }
}
