//! Answers the RPCs of other members.
//!
//! Every check of who speaks to whom is here, before a body is parsed. Left out: authentication of the
//! connection (the agent), which gives the caller's name. Hazard: taking part on behalf of a member that is
//! not what it was: a wiped disk, a removed member, a herd that was made anew.

use openraft::async_runtime::WatchReceiver;
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest, VoteRequest};
use pgherd_core::types::NodeName;
use serde::Serialize;
use tokio::time::Instant;

use super::state_machine;
use super::types::{TypeConfig, Vote};
use super::wire::{self, Envelope, Refusal, RefusalCode, Rpc};
use super::{Inner, RaftStore};

/// Largest snapshot taken in. Far above what a full store makes, so that nobody can fill the memory.
const MAX_SNAPSHOT_BYTES: u64 = 256 * 1024 * 1024;

/// A snapshot of which parts have come.
pub(super) struct Incoming {
    transfer: String,
    bytes: Vec<u8>,
}

impl RaftStore {
    /// Answers the call of another member: `caller` is the name in its certificate, `rpc` and `body` are what
    /// its transport was given. The bytes go back whatever they say; refusals are among them.
    pub async fn handle(&self, caller: &NodeName, rpc: &str, body: &[u8]) -> Vec<u8> {
        let inner = &*self.inner;
        let admitted = match (inner.admit(caller, rpc, body), Rpc::named(rpc)) {
            (Err(refusal), _) => Err(refusal),
            (Ok(()), None) => {
                Err(Refusal::new(RefusalCode::Malformed, format!("no RPC is called \"{rpc}\"")))
            }
            (Ok(()), Some(rpc)) => Ok(rpc),
        };
        match admitted {
            Err(refusal) => wire::answer::<()>(Err(refusal)),
            Ok(Rpc::Append) => answer(inner.on_append(body).await),
            Ok(Rpc::Vote) => answer(inner.on_vote(body).await),
            Ok(Rpc::PreVote) => answer(inner.on_pre_vote(body).await),
            Ok(Rpc::Snapshot) => answer(inner.on_snapshot(body).await),
            Ok(Rpc::Transfer) => answer(inner.on_transfer(body).await),
            Ok(Rpc::Lead) => answer(inner.on_lead(body).await),
        }
    }
}

fn answer<T: Serialize>(answer: Result<T, Refusal>) -> Vec<u8> {
    wire::answer(answer)
}

impl Inner {
    fn admit(&self, caller: &NodeName, rpc: &str, body: &[u8]) -> Result<(), Refusal> {
        let Envelope { herd, generation, from, to, .. } = wire::envelope(body)?;
        let own = &self.peers.own;
        let refuse = |code, why| Err(Refusal::new(code, why));
        if herd != own.herd {
            return refuse(RefusalCode::Herd, format!("node {} belongs to another herd", own.name));
        }
        if generation != own.generation {
            let why = format!(
                "node {} belongs to generation {} of the store, the caller to generation {generation}",
                own.name, own.generation
            );
            return refuse(RefusalCode::Generation, why);
        }
        if to.id != own.id || to.disk != own.disk {
            let why = format!("meant for raft id {} with another disk; this is raft id {}", to.id, own.id);
            return refuse(RefusalCode::Receiver, why);
        }
        if from.name != *caller {
            let why = format!("the certificate names {caller}, the RPC says it comes from {}", from.name);
            return refuse(RefusalCode::Sender, why);
        }
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.committed_membership_config;
        match membership.membership().get_node(&from.id) {
            Some(member) if member.disk != from.disk || member.name != from.name => {
                let why = format!("raft id {} was given to {} with another disk", from.id, member.name);
                return refuse(RefusalCode::Sender, why);
            }
            Some(_) => {}
            // A number is a log index, and its join is the next membership after it; so a membership that
            // lies behind the number and lacks it was made after its removal. An append may still come from a
            // leader that is removing itself, or reach a member that is late.
            None => {
                let removed = membership.log_id().is_some_and(|log_id| from.id < log_id.index);
                if removed && rpc != Rpc::Append.name() && rpc != Rpc::Snapshot.name() {
                    let why = format!("{} with raft id {} was removed from the store", from.name, from.id);
                    return refuse(RefusalCode::Removed, why);
                }
            }
        }
        self.peers.heard(from.id);
        Ok(())
    }

    async fn on_append(&self, body: &[u8]) -> Result<wire::Appended, Refusal> {
        let request = AppendEntriesRequest::<TypeConfig>::try_from(wire::asked::<wire::Append>(body)?)?;
        self.within(self.raft.append_entries(request)).await.map(wire::Appended::from)
    }

    async fn on_vote(&self, body: &[u8]) -> Result<wire::Voted, Refusal> {
        let request = VoteRequest::<TypeConfig>::from(wire::asked::<wire::AskVote>(body)?);
        self.within(self.raft.vote(request)).await.map(wire::Voted::from)
    }

    async fn on_pre_vote(&self, body: &[u8]) -> Result<wire::Voted, Refusal> {
        let request = VoteRequest::<TypeConfig>::from(wire::asked::<wire::AskVote>(body)?);
        self.within(self.raft.pre_vote(request)).await.map(wire::Voted::from)
    }

    async fn on_transfer(&self, body: &[u8]) -> Result<wire::Transferred, Refusal> {
        let request = TransferLeaderRequest::<TypeConfig>::from(wire::asked::<wire::Transfer>(body)?);
        self.within(self.raft.handle_transfer_leader(request)).await.map(wire::Transferred::from)
    }

    async fn on_snapshot(&self, body: &[u8]) -> Result<wire::SnapshotTaken, Refusal> {
        let part: wire::SnapshotPart = wire::asked(body)?;
        let malformed = |why: String| Refusal::new(RefusalCode::Malformed, why);
        if part.total > MAX_SNAPSHOT_BYTES {
            return Err(malformed(format!("a snapshot of {} bytes", part.total)));
        }
        let mut incoming = self.incoming.lock().await;
        if part.offset == 0 {
            *incoming = Some(Incoming { transfer: part.transfer.clone(), bytes: Vec::new() });
        }
        let known = incoming.as_mut().filter(|known| known.transfer == part.transfer);
        let Some(known) = known.filter(|known| known.bytes.len() as u64 == part.offset) else {
            return Err(malformed("a part of a snapshot out of order".to_owned()));
        };
        known.bytes.extend_from_slice(&part.bytes.0);
        if (known.bytes.len() as u64) < part.total {
            return Ok(wire::SnapshotTaken::Part);
        }
        let whole = incoming.take().map(|known| known.bytes).unwrap_or_default();
        drop(incoming);
        let parsed = tokio::task::spawn_blocking(move || state_machine::received(whole)).await;
        let snapshot = parsed.map_err(|error| Refusal::new(RefusalCode::Unable, error.to_string()))??;
        let vote: Vote = part.vote.into();
        // openraft takes the word of the leader's vote for what a snapshot holds, and panics where the two
        // contradict each other.
        let leader = snapshot.meta.last_log_id.map(|last| last.leader_id);
        if leader.is_some_and(|leader| leader > vote.leader_id) {
            return Err(malformed("a snapshot from a later term than its sender's".to_owned()));
        }
        let installed = self.raft.install_full_snapshot(vote, snapshot).await;
        let response = installed.map_err(|error| Refusal::new(RefusalCode::Unable, error.to_string()))?;
        Ok(wire::SnapshotTaken::Whole(response.vote.into()))
    }

    async fn on_lead(&self, body: &[u8]) -> Result<wire::Led, Refusal> {
        let wire::Lead { within_ms, op } = wire::asked(body)?;
        let until = Instant::now() + std::time::Duration::from_millis(within_ms);
        Ok(self.execute(op, until).await)
    }

    /// Waits for openraft, but not longer than the caller does: with a hung disk, calls would pile up.
    async fn within<T, E: std::fmt::Display>(
        &self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Refusal> {
        let unable =
            |why: String| Refusal::new(RefusalCode::Unable, format!("{}: {why}", self.peers.own.name));
        match tokio::time::timeout(self.timing.data(), call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(unable(error.to_string())),
            Err(_) => Err(unable("raft is busy, its disk may be slow".to_owned())),
        }
    }
}
