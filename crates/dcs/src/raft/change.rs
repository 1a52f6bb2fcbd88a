//! Changes of the membership, and of the leader.
//!
//! All of it is done by the leader, one change at a time, and can be asked for twice. Left out: who should
//! vote (`members::choose_voters`). Hazard: a change that the present voters cannot carry through blocks
//! every later one, and one that the voters to be cannot carry stops the store; so both majorities must be
//! there before a change of voters begins.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant as StdInstant};

use openraft::async_runtime::WatchReceiver;
use openraft::errors::RaftError;
use openraft::{ChangeMembers, Precondition};
use pgherd_core::types::NodeName;
use tokio::time::{Instant, timeout_at};

use super::members::{Candidate, Member, choose_voters};
use super::types::{LogId, Metrics, TypeConfig};
use super::wire::{Led, Op, Surveyed};
use super::{Inner, JoinRequest, Joined, RaftStore, unanswered};
use crate::store::{MemberHealth, StoreError};

/// A learner that lacks no more than this may vote; the rest comes with the next append.
const READY_LAG_ENTRIES: u64 = 100;
/// A voter that has been silent for longer gives its vote to somebody who is there.
const VOTER_GRACE: Duration = Duration::from_secs(60);

/// What [`RaftStore::arrange`] found or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// Another member leads; its agent arranges.
    NotLeader,
    Settled,
    Changed {
        voters: Vec<NodeName>,
    },
    Waiting {
        why: String,
    },
}

impl RaftStore {
    /// Takes a directory in as a learner; [`RaftStore::arrange`] makes it a voter. Asked at any member. A
    /// member of the same name with another disk is removed, if it is silent: that disk is gone.
    pub async fn add_member(&self, request: JoinRequest, timeout: Duration) -> Result<Joined, StoreError> {
        match self.lead(&Op::AddMember(request), Instant::now() + timeout).await {
            Ok(Led::Joined(joined)) => Ok(joined),
            other => Err(unanswered(other)),
        }
    }

    /// Removes a member for good. Asked at any member. Without effect if there is none of that name.
    pub async fn remove_member(&self, name: &NodeName, timeout: Duration) -> Result<(), StoreError> {
        let op = Op::RemoveMember { name: name.clone() };
        match self.lead(&op, Instant::now() + timeout).await {
            Ok(Led::Done) => Ok(()),
            other => Err(unanswered(other)),
        }
    }

    /// Hands the leadership to `to`, a voter that is there. Asked at any member; returns when `to` leads.
    pub async fn transfer_leadership(&self, to: &NodeName, timeout: Duration) -> Result<(), StoreError> {
        let op = Op::TransferLeadership { to: to.clone() };
        match self.lead(&op, Instant::now() + timeout).await {
            Ok(Led::Done) => Ok(()),
            other => Err(unanswered(other)),
        }
    }

    /// The members as the leader sees them: only it hears from all. Asked at any member.
    pub async fn survey(&self, timeout: Duration) -> Result<Vec<MemberHealth>, StoreError> {
        let surveyed = match self.lead(&Op::Survey, Instant::now() + timeout).await {
            Ok(Led::Survey(surveyed)) => surveyed,
            other => return Err(unanswered(other)),
        };
        let now = StdInstant::now();
        let member = |it: Surveyed| MemberHealth {
            raft_id: it.id,
            name: it.name,
            address: it.address,
            host: it.host,
            voter: it.voter,
            last_contact: it.silent_ms.and_then(|ms| now.checked_sub(Duration::from_millis(ms))),
            trouble: it.trouble,
        };
        Ok(surveyed.into_iter().map(member).collect())
    }

    /// Makes those vote who should, given the members' names in the order of the herd file. To be called over
    /// and over on every node: it acts only on the leader, and finishes what an earlier leader left half
    /// done.
    pub async fn arrange(&self, order: &[NodeName], timeout: Duration) -> Arrangement {
        self.inner.arrange(order, Instant::now() + timeout).await
    }
}

impl Inner {
    pub(super) async fn add(&self, request: JoinRequest, until: Instant) -> Led {
        let JoinRequest { herd, name, address, host, disk } = request;
        let own = &self.peers.own;
        if herd != own.herd {
            return Led::Refused { why: format!("node {} belongs to another herd", own.name) };
        }
        let Ok(_changing) = timeout_at(until, self.changing.lock()).await else {
            return Led::Unavailable { why: "another change of the members is under way".to_owned() };
        };
        let joined = |raft_id| {
            let (herd, generation) = (own.herd.clone(), own.generation);
            Led::Joined(Joined { herd, generation, raft_id, disk: disk.clone() })
        };
        let metrics = self.metrics();
        if !metrics.state.is_leader() {
            return Led::NotLeader { leader: metrics.current_leader };
        }
        let members: BTreeMap<u64, Member> = members(&metrics);
        if let Some((id, _)) = members.iter().find(|(_, member)| member.disk == disk) {
            return joined(*id);
        }
        if let Some((id, _)) = members.iter().find(|(_, member)| member.name == name) {
            if self.there(*id, self.timing.silent()) {
                let why = format!("a member called {name} is alive on another disk");
                return Led::Refused { why };
            }
            match self.remove_locked(&name, until).await {
                Led::Done => {}
                other => return other,
            }
        }
        // The number is the index of an entry that this join alone makes, so nobody had it or will have it.
        let number = match timeout_at(until, self.raft.write_blank()).await {
            Ok(Ok(response)) => response.log_id,
            Ok(Err(RaftError::APIError(error))) => return self.not_written(error),
            Ok(Err(RaftError::Fatal(error))) => return Led::Unavailable { why: error.to_string() },
            Err(_) => return Led::Unavailable { why: self.no_majority() },
        };
        // Only as the same leader: `serve` takes a membership that lies behind a number and lacks it for
        // proof of a removal, so no other membership may come in between.
        let leader = Precondition::CommittedLeaderId { committed_leader_id: number.leader_id };
        let member = Member { name, address, host, disk: disk.clone() };
        let learner = ChangeMembers::AddNodes(BTreeMap::from([(number.index, member)]));
        match self.change(learner, true, leader, until).await {
            Ok(()) => joined(number.index),
            Err(led) => led,
        }
    }

    pub(super) async fn remove(&self, name: &NodeName, until: Instant) -> Led {
        let Ok(_changing) = timeout_at(until, self.changing.lock()).await else {
            return Led::Unavailable { why: "another change of the members is under way".to_owned() };
        };
        self.remove_locked(name, until).await
    }

    /// With `changing` held. Repeats until the member is gone, because a change can be left half done.
    async fn remove_locked(&self, name: &NodeName, until: Instant) -> Led {
        loop {
            let metrics = self.metrics();
            if !metrics.state.is_leader() {
                return Led::NotLeader { leader: metrics.current_leader };
            }
            let members = members(&metrics);
            let Some((id, _)) = members.iter().find(|(_, member)| member.name == *name) else {
                return Led::Done;
            };
            let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
            let change = if voters.contains(id) {
                if voters.len() == 1 {
                    let why = format!("{name} is the only voter of the store, nobody else could go on");
                    return Led::Refused { why };
                }
                let rest: BTreeSet<u64> = voters.iter().copied().filter(|voter| voter != id).collect();
                if let Err(why) = self.majority_there(&rest, &members) {
                    return Led::Unavailable { why };
                }
                ChangeMembers::RemoveVoters(BTreeSet::from([*id]))
            } else {
                ChangeMembers::RemoveNodes(BTreeSet::from([*id]))
            };
            match self.change(change, false, unchanged(&metrics), until).await {
                Ok(()) => {}
                Err(led) => return led,
            }
        }
    }

    async fn change(
        &self,
        change: ChangeMembers<u64, Member>,
        retain: bool,
        only_if: Precondition<TypeConfig>,
        until: Instant,
    ) -> Result<(), Led> {
        match timeout_at(until, self.raft.change_membership_if(change, retain, [only_if])).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(error))) => Err(self.not_written(error)),
            Ok(Err(RaftError::Fatal(error))) => Err(Led::Unknown { why: error.to_string() }),
            Err(_) => Err(Led::Unknown { why: self.no_majority() }),
        }
    }

    pub(super) async fn transfer(&self, to: &NodeName, until: Instant) -> Led {
        let mut watching = self.raft.metrics();
        let id = {
            let metrics = watching.borrow_watched();
            if !metrics.state.is_leader() {
                return Led::NotLeader { leader: metrics.current_leader };
            }
            if *to == self.peers.own.name {
                return Led::Done;
            }
            let membership = metrics.membership_config.membership();
            let voters: BTreeSet<u64> = membership.voter_ids().collect();
            let id = membership.nodes().find(|(id, member)| member.name == *to && voters.contains(id));
            match id {
                Some((id, _)) => *id,
                None => return Led::Refused { why: format!("{to} does not vote in the store") },
            }
        };
        // From here on the leader takes no more writes. Were the other one gone or late, nobody would, until
        // the next election.
        if !self.there(id, self.timing.answer) {
            return Led::Unavailable { why: format!("{to} is silent") };
        }
        let level = watching.wait_until(|metrics| !metrics.state.is_leader() || lag(metrics, id) == Some(0));
        if timeout_at(until, level).await.is_err() {
            return Led::Unavailable { why: format!("{to} has not caught up") };
        }
        if self.raft.trigger().transfer_leader(id).await.is_err() {
            return Led::Unavailable { why: "raft is stopping".to_owned() };
        }
        match timeout_at(until, watching.wait_until(|metrics| metrics.current_leader == Some(id))).await {
            Ok(_) => Led::Done,
            Err(_) => Led::Unknown { why: format!("{to} has not taken over") },
        }
    }

    pub(super) fn survey(&self) -> Led {
        let metrics = self.metrics();
        if !metrics.state.is_leader() {
            return Led::NotLeader { leader: metrics.current_leader };
        }
        let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
        let surveyed = members(&metrics).into_iter().map(|(id, member)| {
            let contact = self.peers.contact(id);
            let silent = if id == self.peers.own.id {
                Some(Duration::ZERO)
            } else {
                contact.heard.map(|heard| heard.elapsed())
            };
            Surveyed {
                id,
                name: member.name,
                address: member.address,
                host: member.host,
                voter: voters.contains(&id),
                silent_ms: silent.map(|silent| silent.as_millis() as u64),
                trouble: contact.trouble(),
            }
        });
        Led::Survey(surveyed.collect())
    }

    async fn arrange(&self, order: &[NodeName], until: Instant) -> Arrangement {
        let waiting = |why: String| Arrangement::Waiting { why };
        let Ok(_changing) = self.changing.try_lock() else {
            return waiting("another change of the members is under way".to_owned());
        };
        let metrics = self.metrics();
        if !metrics.state.is_leader() {
            return Arrangement::NotLeader;
        }
        let members = members(&metrics);
        let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
        let joint = metrics.membership_config.get_joint_config().len() > 1;
        if !voters.contains(&self.peers.own.id) && !joint {
            // It lost its vote to the last change and leads on, without counting for any majority.
            return self.hand_over(&members, &voters, until).await;
        }

        let position = |name: &NodeName| order.iter().position(|ordered| ordered == name);
        // A member that the order does not name keeps the vote it has, and gets none.
        let mut known: Vec<(u64, &Member)> = members
            .iter()
            .filter(|(id, member)| voters.contains(id) || position(&member.name).is_some())
            .map(|(id, member)| (*id, member))
            .collect();
        known.sort_by_key(|(id, member)| (position(&member.name).unwrap_or(usize::MAX), *id));
        let candidate = |(id, member): &(u64, &Member)| Candidate {
            name: member.name.clone(),
            host: member.host.clone(),
            alive: self.there(*id, VOTER_GRACE),
        };
        let able = |id: u64| {
            let ready = self.there(id, self.timing.silent())
                && lag(&metrics, id).is_some_and(|lag| lag <= READY_LAG_ENTRIES);
            voters.contains(&id) || ready
        };
        let chosen =
            choose_voters(&known.iter().filter(|(id, _)| able(*id)).map(candidate).collect::<Vec<_>>());
        let target: BTreeSet<u64> =
            known.iter().filter(|(_, member)| chosen.contains(&member.name)).map(|(id, _)| *id).collect();
        if target == voters && !joint {
            // A learner that has not been heard of yet is on its way, not dead.
            let coming = |it: &(u64, &Member)| Candidate {
                alive: candidate(it).alive || !able(it.0),
                ..candidate(it)
            };
            let wanted = choose_voters(&known.iter().map(coming).collect::<Vec<_>>());
            let missing: Vec<_> = wanted.difference(&chosen).map(NodeName::as_str).collect();
            if missing.is_empty() {
                return Arrangement::Settled;
            }
            return waiting(format!("not caught up yet: {}", missing.join(", ")));
        }
        if let Err(why) = self.majority_there(&target, &members) {
            return waiting(why);
        }
        match self.change(ChangeMembers::ReplaceAllVoters(target), true, unchanged(&metrics), until).await {
            Ok(()) => Arrangement::Changed { voters: chosen.into_iter().collect() },
            Err(Led::NotLeader { .. }) => Arrangement::NotLeader,
            Err(Led::Unavailable { why } | Led::Unknown { why } | Led::Refused { why }) => waiting(why),
            Err(other) => waiting(format!("the change ended with {other:?}")),
        }
    }

    async fn hand_over(
        &self,
        members: &BTreeMap<u64, Member>,
        voters: &BTreeSet<u64>,
        until: Instant,
    ) -> Arrangement {
        let there = voters.iter().filter(|id| self.there(**id, self.timing.answer));
        let Some(heir) = there.filter_map(|id| members.get(id)).next() else {
            return Arrangement::Waiting {
                why: "no voter answers that could take over the leadership".to_owned(),
            };
        };
        match self.transfer(&heir.name, until).await {
            Led::Unavailable { why } | Led::Unknown { why } | Led::Refused { why } => {
                Arrangement::Waiting { why }
            }
            _ => Arrangement::NotLeader,
        }
    }

    /// Without a majority of the voters to be, a change would begin and never end.
    fn majority_there(&self, voters: &BTreeSet<u64>, members: &BTreeMap<u64, Member>) -> Result<(), String> {
        let silent: Vec<_> = voters.iter().filter(|id| !self.there(**id, self.timing.silent())).collect();
        if silent.len() * 2 < voters.len() {
            return Ok(());
        }
        let names = silent.iter().filter_map(|id| members.get(id)).map(|member| member.name.as_str());
        Err(format!("too many of the voters to be are silent: {}", names.collect::<Vec<_>>().join(", ")))
    }

    /// Whether this member has heard from that one within `span`.
    fn there(&self, id: u64, span: Duration) -> bool {
        id == self.peers.own.id || self.peers.contact(id).heard.is_some_and(|heard| heard.elapsed() < span)
    }
}

fn members(metrics: &Metrics) -> BTreeMap<u64, Member> {
    metrics.membership_config.nodes().map(|(id, member)| (*id, member.clone())).collect()
}

/// The membership is still the one that a decision was made from.
fn unchanged(metrics: &Metrics) -> Precondition<TypeConfig> {
    Precondition::LastMembershipLogId { last_membership_log_id: *metrics.membership_config.log_id() }
}

/// Entries that a member lacks, as the leader knows it; `None` if it has acknowledged none yet.
fn lag(metrics: &Metrics, id: u64) -> Option<u64> {
    if metrics.id == id {
        return Some(0);
    }
    let replication: Option<&BTreeMap<u64, Option<LogId>>> = metrics.replication.as_ref();
    let matched = replication?.get(&id).copied().flatten()?;
    Some(metrics.last_log_index?.saturating_sub(matched.index))
}
