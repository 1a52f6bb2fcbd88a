//! The one function where roles branch.
//!
//! [`decide`] looks at the store's record first: an open election concerns everyone alike; else a node
//! holds the term or it does not. Each role has a module of its own below; what several need is here.
//!
//! Hazard: everything. What this function gets wrong, the herd does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::action::{Action, Address, Duties};
use crate::observation::{Busy, Observation, Postgres};
use crate::reason::Reason;
use crate::record::{Cause, Proposal, Record, Rule};
use crate::types::{Incarnation, Instant, Lsn, Member, NodeName, Term, Timeline};

pub mod address;
pub mod archive;
pub mod bootstrap;
pub mod election;
pub mod lease;
pub mod primary;
pub mod rejoin;
pub mod repository;
pub mod restore;
pub mod standby;
pub mod suspicion;
pub mod switchover;
pub mod voting;

/// How often a decision is made anew when nothing happens.
pub const TICK: Duration = Duration::from_millis(250);

/// What a node remembers between two decisions: only when it first saw something. Losing it makes a node
/// wait longer, never act sooner.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    pub started: Option<Instant>,
    /// When the last decision was made.
    pub looked: Option<Instant>,
    /// When the first decision after the last sleep was made.
    pub awake_since: Option<Instant>,
    /// When each of the others had been heard last, as the last decision saw it.
    pub heard: BTreeMap<NodeName, Instant>,
    /// Somebody who had fallen silent together with the holder of the term was heard again then.
    pub line_back: Option<Instant>,
    /// The election of this term was first seen then.
    pub election_seen: Option<(Term, Instant)>,
    /// Enough votes for the election of this term were first seen then: since that moment nothing of the term
    /// before can be acknowledged, and so nothing of it can be proven.
    pub sealed_seen: Option<(Term, Instant)>,
    /// The reign of this term was first seen then.
    pub reign_seen: Option<(Term, Instant)>,
    /// Voters that do not stream, since when.
    pub missing_since: BTreeMap<Member, Instant>,
    pub rule_pending: Option<PendingRule>,
    /// Fewer voters than needed, since when.
    pub short_since: Option<Instant>,
    /// The proxies have been draining this primary since then.
    pub draining_since: Option<Instant>,
    /// A running PostgreSQL was told to stop because its lease ended in this term.
    pub lease_ended: Option<Term>,
    /// The newest proof that this node held the open term, and the timeline it reigned on. It outlives the
    /// term where the incumbent wins again: nobody else reigned in between.
    pub proven: Option<(Timeline, Instant)>,
    /// The owner of the archive is not fit for it, since when.
    pub owner_unfit_since: Option<(NodeName, Instant)>,
    /// Who takes the base backup of this number is not heard, since when.
    pub backup_silent_since: Option<(u64, Instant)>,
    /// The incarnation that this node was enlisted with when the replica had first caught up. An earlier life of
    /// this agent may have used it for a copy of which nothing is left here.
    pub enlisted_before: Option<Incarnation>,
}

/// A change of the durability rule as the primary first saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRule {
    pub change: u64,
    pub since: Instant,
    /// The flush position then; a marker from before proves nothing about this change.
    pub from: Lsn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Nothing is known yet; whatever runs goes on running.
    Hold,
    Primary,
    Standby,
    /// Receives nothing, while a term is elected.
    Sealed,
    Stopped,
    Witness,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub goal: Goal,
    pub actions: Vec<Action>,
    pub duties: Duties,
    /// What becomes of the address that moves with the gate.
    pub address: Address,
    pub reason: Reason,
    /// This copy must be rewritten; the agent tells the others, so that its vote is taken away.
    pub wants_rebuild: bool,
    pub wake: Instant,
}

impl Decision {
    pub fn new(goal: Goal, reason: Reason, now: Instant) -> Decision {
        Decision {
            goal,
            actions: Vec::new(),
            duties: Duties::default(),
            address: Address::default(),
            reason,
            wants_rebuild: false,
            wake: now + TICK,
        }
    }

    pub fn act(mut self, action: Action) -> Decision {
        self.actions.push(action);
        self
    }

    pub fn acts(mut self, actions: impl IntoIterator<Item = Action>) -> Decision {
        self.actions.extend(actions);
        self
    }

    /// Looks again no later than `after` from `now`.
    pub fn again(mut self, now: Instant, after: Duration) -> Decision {
        self.wake = self.wake.min(now + after);
        self
    }
}

/// What this node should do now.
pub fn decide(memory: &mut Memory, now: Instant, seen: &Observation<'_>) -> Decision {
    memory.started.get_or_insert(now);
    suspicion::look(memory, now, seen);
    let Some(record) = seen.store.record else {
        return lease::hold(memory, now, seen, Reason::StoreNeverRead {});
    };
    remember(memory, now, record);
    lease::remember(memory, seen, record);
    if seen.store.caught_up {
        let enlisted = record.stands_as(seen.me).map_or(Incarnation(0), |member| member.incarnation);
        memory.enlisted_before.get_or_insert(enlisted);
    }
    let has_postgres = seen.spec.node(seen.me).is_some();

    let newest = record.election.as_ref().map_or(record.term, |election| election.term);
    let mut decision = if let Some(ending) = lease::ending(memory, now, seen, record) {
        // That of a node which the specification no longer names, too: it may be busy, or slow to stop cleanly.
        ending
    } else if !has_postgres {
        without_postgres(memory, now, seen, record)
    } else if seen.local.durable.term > newest {
        // This node's view of the store lags behind what it has itself promised.
        lease::hold(memory, now, seen, Reason::RecordBehind { term: seen.local.durable.term })
    } else if must_catch_up(seen, record) {
        return holding(
            lease::hold(memory, now, seen, Reason::RecordUnconfirmed {}),
            memory,
            now,
            seen,
            record,
        );
    } else if seen.local.stopping {
        stopped(memory, now, seen, record, Reason::OperatorStopped {})
    } else if record.election.is_some() {
        voting::decide(memory, now, seen, record)
    } else if record.system.is_none() || record.reign.is_none() {
        bootstrap::decide(now, seen, record)
    } else if record.holder().is_some_and(|holder| holder.node == *seen.me) {
        primary::decide(memory, now, seen, record)
    } else {
        standby::decide(memory, now, seen, record)
    };

    if !decision.duties.drain {
        // Its clients go on; another drain begins anew.
        memory.draining_since = None;
    }

    // Everyone watches the holder and may end an election, whatever else it is doing.
    if let Some(left) = suspicion::next_look(memory, now, seen, record) {
        decision = decision.again(now, left);
    }
    if let Some((action, reason)) = suspicion::open(memory, now, seen, record) {
        decision.actions.insert(0, action);
        decision.reason = reason;
    } else if let Some(reason) = suspicion::waits_for_repository(memory, now, seen, record) {
        decision.reason = reason;
    }
    if let Some(action) = voting::end(memory, now, seen, record) {
        decision.actions.push(action);
    }
    if let Some(vote) = repository::vote(seen, record) {
        decision.actions.insert(0, Action::Propose(vote));
    }
    for proposal in archive::decide(memory, now, seen, record) {
        decision.actions.insert(0, Action::Propose(proposal));
    }
    let health = health(seen, record).filter(|bar| !decision.actions.contains(bar));
    decision.actions.extend(health);
    decision.address = address::decide(memory, now, seen, record, &decision.actions);
    if let Some(busy) = seen.local.busy {
        while_busy(&mut decision, busy);
    }
    holding(decision, memory, now, seen, record)
}

/// Before the replica has caught up it may show an election that is long over, or a term that has ended. A primary
/// would be stopped for that, a standby sealed, and a term given back that somebody else holds.
fn must_catch_up(seen: &Observation<'_>, record: &Record) -> bool {
    let holds = record.holder().is_some_and(|holder| holder.node == *seen.me);
    let leads = matches!(seen.local.postgres, Postgres::Primary(_));
    !seen.store.caught_up && (holds || leads || record.election.is_some())
}

/// What goes on beside any decision: the holder proves its term, everyone else probes the holder.
fn holding(
    mut decision: Decision,
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
) -> Decision {
    let holds = record.holder().is_some_and(|holder| holder.node == *seen.me);
    if holds && matches!(seen.local.postgres, Postgres::Primary(_)) {
        decision.duties.prove_term = true;
        decision.duties.fence = Some(record.term.max(seen.local.durable.term));
        if let Some(stop_at) = lease::stop_at(memory, seen, record) {
            decision = decision.again(now, stop_at.since(now));
        }
    }
    decision.duties.probe_holder = record.holder().is_some() && !holds;
    // A server that ends waits for whoever streams from it to have everything, and a repository may be slow: only one that counts is waited for.
    let stops = decision.actions.iter().any(|action| action.busy() == Some(Busy::Stop));
    decision.duties.voter = repository::stream(seen, record);
    decision.duties.archive = decision.duties.voter.is_some()
        || archive::is_owned(seen, record) && !stops && seen.local.busy != Some(Busy::Stop);
    decision.duties.ask_repository = repository::is_asked(memory, now, seen, record);
    decision.duties.seal_repository = repository::seal(seen, record);
    decision.duties.backup = archive::backup_here(seen, record);
    decision.duties.drill = archive::drill_here(seen, record);
    decision.duties.keep_slots =
        !holds && !record.is_restored(seen.me) && matches!(seen.local.postgres, Postgres::Standby(_));
    decision
}

/// One thing at a time on one PostgreSQL. What needs no PostgreSQL goes on, and a stop waits for nothing.
fn while_busy(decision: &mut Decision, busy: Busy) {
    let stops = decision.actions.iter().any(|action| matches!(action, Action::StopNow));
    if stops && busy != Busy::Stop {
        return;
    }
    decision.actions.retain(|action| matches!(action, Action::Propose(_)));
    // A proposal that was to follow an action on PostgreSQL must not overtake it.
    decision.actions.retain(|action| match action {
        Action::Propose(proposal) => !proposal.tells_of_postgres(),
        _ => false,
    });
    decision.reason = Reason::Occupied { with: busy };
}

fn remember(memory: &mut Memory, now: Instant, record: &Record) {
    let election = record.election.as_ref().map(|election| election.term);
    if memory.election_seen.map(|(term, _)| term) != election {
        memory.election_seen = election.map(|term| (term, now));
    }
    if let Some(term) = election
        && memory.sealed_seen.map(|(of, _)| of) != Some(term)
        && election::enough_are_sealed(record)
    {
        memory.sealed_seen = Some((term, now));
    }
    if memory.reign_seen.map(|(term, _)| term) != Some(record.term) {
        memory.reign_seen = Some((record.term, now));
    }
}

/// Damage is told to everyone before it matters, and taken back when it is over.
fn health(seen: &Observation<'_>, record: &Record) -> Option<Action> {
    let entry = record.nodes.get(seen.me)?;
    let why = match (&seen.local.damage, &entry.barred) {
        (Some(_), Some(_)) | (None, None) => return None,
        (damage, _) => damage.clone(),
    };
    Some(Action::Propose(Proposal::Bar { node: seen.me.clone(), why }))
}

/// A witness, or a node that the specification no longer names.
fn without_postgres(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Decision {
    match seen.local.postgres {
        Postgres::Absent | Postgres::Unknown => Decision::new(Goal::Witness, Reason::Witnessing {}, now),
        _ => stopped(memory, now, seen, record, Reason::NotInSpecification {}),
    }
}

/// PostgreSQL is to be down here. The holder gives its term back, so that another can lead; and a copy that
/// is down for good reasons still votes, because it may hold what nobody else who answers does.
fn stopped(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reason: Reason,
) -> Decision {
    let decision = Decision::new(Goal::Stopped, reason.clone(), now);
    let holds = record.election.is_none() && record.holder() == seen.local.durable.member.as_ref();
    match seen.local.postgres {
        Postgres::Primary(_) => {
            let decision = decision
                .act(Action::SetGate { term: seen.local.durable.term, open: false })
                .act(Action::StopCleanly);
            if holds {
                decision.act(primary::release(seen, record.term, Cause::Stop, false))
            } else {
                decision
            }
        }
        Postgres::Starting | Postgres::Standby(_) => decision.act(Action::StopCleanly),
        Postgres::Remains => decision.act(Action::StopNow),
        Postgres::Stopped(_) if holds => {
            decision.act(primary::release(seen, record.term, Cause::Stop, false))
        }
        Postgres::Stopped(_) if record.election.is_some() => {
            let mut vote =
                Decision { reason, goal: Goal::Stopped, ..voting::decide(memory, now, seen, record) };
            vote.actions.retain(|action| matches!(action, Action::Seal { .. } | Action::Vote { .. }));
            vote
        }
        Postgres::Unknown | Postgres::Absent | Postgres::Stopped(_) => decision,
    }
}

/// Members that could vote now, as far as this agent can tell, itself among them.
fn answering(now: Instant, seen: &Observation<'_>) -> BTreeSet<NodeName> {
    let heard = seen.peers.keys().filter(|node| heard_lately(now, seen, node));
    let repository = repository::answers(now, seen).then(NodeName::repository);
    heard.cloned().chain([seen.me.clone()]).chain(repository).collect()
}

pub(crate) fn heard_lately(now: Instant, seen: &Observation<'_>, node: &NodeName) -> bool {
    let peer = seen.peers.get(node);
    let heard = peer.and_then(|peer| Some((peer.heard?, peer.round_trip)));
    heard.is_some_and(|(heard, round_trip)| now.since(heard) < seen.times.suspect + round_trip)
}

fn voters_missing(rule: &Rule, have: u32) -> bool {
    have < rule.needed
}

/// What the tests of the modules below share.
#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::observation::{Local, Peer, StoreView};
    use crate::spec::{ClusterSpec, Durability, NodeSpec, PostgresSource, PostgresSpec, Times};

    pub(crate) fn spec(names: &[&str]) -> ClusterSpec {
        ClusterSpec {
            name: "main".parse().unwrap(),
            durability: Durability::Quorum { needed: 1, degrade_after: None },
            postgres: PostgresSpec {
                source: PostgresSource::Version(15),
                parameters: BTreeMap::new(),
                hba: Vec::new(),
                ident: Vec::new(),
            },
            nodes: names.iter().map(|name| NodeSpec::new(name.parse().unwrap(), "10.0.0.1")).collect(),
            databases: Vec::new(),
            proxy: None,
            vip: None,
            backup: None,
        }
    }

    pub(crate) fn observation<'a>(
        me: &'a NodeName,
        spec: &'a ClusterSpec,
        times: &'a Times,
        record: &'a Record,
        local: &'a Local,
        peers: &'a BTreeMap<NodeName, Peer>,
    ) -> Observation<'a> {
        let store = StoreView { record: Some(record), confirmed: None, caught_up: true, reachable: true };
        Observation { me, times, spec, store, local, peers, recent_crashes: 0 }
    }
}
