//! Whether a term should be closed because its holder does not answer.
//!
//! Two signals must agree before a silent agent costs its primary the term early: the agent's silence and
//! the voters' own probes of its PostgreSQL. Silence alone needs `agent_grace`. And no term is closed unless
//! the election could be won with those who answer: closing ends a reign that may still be working.
//!
//! Only what the judge lived through counts. One that was stopped itself, as by a hypervisor, heard nothing
//! meanwhile, and what it was told waits unread; the holder's fence counts the holder's silence alone. Nor does a
//! silence that came over others in the moment in which it came over the holder, and is over for them: the line that
//! was cut was the judge's own, and it is back. The holder gets the time again that anybody has to be heard.
//!
//! Hazard: a silence that was the judge's own lets another one lead while the old primary answers reads, where
//! its agent is held up for a moment and its fence has seconds left.

use std::time::Duration;

use crate::action::Action;
use crate::ha::{Memory, answering, election, repository};
use crate::observation::{Observation, Peer};
use crate::reason::Reason;
use crate::record::{Cause, Proposal, Record};
use crate::types::{Instant, NodeName};

/// A link is given this many of its slowest recent round trips on top of `suspect`: a lost segment costs
/// TCP about two, and its retransmission may be lost too.
pub const ROUND_TRIPS_OF_PATIENCE: u32 = 4;

/// The holder's fence acts at `agent_grace` too, and its word that nothing is left running saves its successor the
/// wait for a lease. This is what it takes to end PostgreSQL and to be heard.
pub const FENCE_SPEAKS_FIRST: Duration = Duration::from_millis(700);

/// A judge that made no decision for longer than this has slept. Less is allowed for: the next gate waits longer.
pub const NAP: Duration = Duration::from_secs(1);

/// Notes that a decision is made, whether that is the first one after a sleep, and who is heard again.
pub fn look(memory: &mut Memory, now: Instant, seen: &Observation<'_>) {
    let slept = memory.looked.is_some_and(|looked| now.since(looked) > NAP);
    memory.looked = Some(now);
    if slept {
        memory.awake_since = Some(now);
    }
    let holder = seen.store.record.and_then(Record::holder).map(|holder| &holder.node);
    // Who was never heard is silent from this agent's start on, and nobody from before it was awake.
    let awake = memory.awake_since.max(memory.started).unwrap_or(now);
    let silent_from = |heard: Option<Instant>| heard.map_or(awake, |heard| heard.max(awake));
    let holder_silent = holder.map(|holder| silent_from(seen.peers.get(holder).and_then(|peer| peer.heard)));
    for (node, peer) in seen.peers {
        let Some(heard) = peer.heard else { continue };
        let from = silent_from(memory.heard.insert(node.clone(), heard));
        let patience = patience(seen, Some(peer));
        // One that comes and goes while the holder is silent puts nothing off for a second time.
        let with_holder =
            holder_silent.is_some_and(|silent| from.since(silent).max(silent.since(from)) < patience);
        // The holder's silence is the longer one, since it lasts: half of what is suspicious is enough here.
        if heard.since(from) >= patience / 2 && with_holder {
            memory.line_back = memory.line_back.max(Some(heard));
        }
    }
}

/// For how long a peer may not be heard before that means anything.
fn patience(seen: &Observation<'_>, peer: Option<&Peer>) -> Duration {
    let round_trip = peer.map_or(Duration::ZERO, |peer| peer.round_trip);
    seen.times.suspect + round_trip * ROUND_TRIPS_OF_PATIENCE
}

/// For how long something that began `since` has been seen to last.
pub fn lasting(memory: &Memory, now: Instant, since: Instant) -> Duration {
    now.since(since.max(memory.awake_since.unwrap_or(since)))
}

/// Closes the term if its holder must be taken for lost.
pub fn open(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
) -> Option<(Action, Reason)> {
    let cause = cause(memory, now, seen, record)?;
    if !election::winnable(record, &answering(now, seen)) {
        return None;
    }
    let open =
        Proposal::Open { term: record.term, cause, by: seen.me.clone(), released: false, poisoned: false };
    Some((Action::Propose(open), Reason::Opening { cause }))
}

/// Is the repository all that the term is not closed for?
pub fn waits_for_repository(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
) -> Option<Reason> {
    let holder = record.holder()?.node.clone();
    let mut answering = answering(now, seen);
    let lacks = repository::counted(record).is_some() && !election::winnable(record, &answering);
    answering.insert(NodeName::repository());
    let waits = lacks && election::winnable(record, &answering) && cause(memory, now, seen, record).is_some();
    waits.then_some(Reason::RepositoryAwaited { holder })
}

/// Why the term should be closed, if anybody could win the election then.
fn cause(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Option<Cause> {
    if record.election.is_some() || !seen.store.reachable || seen.local.stopping {
        return None;
    }
    let holder = record.holder().filter(|holder| holder.node != *seen.me)?;
    let (silent, suspect) = silence(memory, now, seen, record, &holder.node)?;
    if silent >= seen.times.agent_grace + FENCE_SPEAKS_FIRST {
        Some(Cause::AgentSilent)
    } else if silent >= suspect && most_voters_cannot_reach(memory, now, seen, record, &holder.node, suspect)
    {
        Some(Cause::Unreachable)
    } else {
        None
    }
}

/// For how long the holder's agent has been silent, and after how long that counts.
fn silence(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    holder: &NodeName,
) -> Option<(Duration, Duration)> {
    let peer = seen.peers.get(holder);
    // An agent that this one has never heard counts as silent from this one's start, or the reign's.
    let heard = peer.and_then(|peer| peer.heard);
    let since = [heard, memory.line_back, memory.started, memory.reign_seen.map(|(_, at)| at)];
    let silent = lasting(memory, now, since.into_iter().flatten().max()?);
    let mut suspect = patience(seen, peer);
    if record.rules.as_ref().is_some_and(|rules| rules.target().needed == 0) {
        // Without acknowledgements that seals could stop, nothing but the end of its lease stops the holder.
        suspect = suspect.max(seen.times.lease);
    }
    Some((silent, suspect))
}

/// Has the holder been silent for so long that an election may be near?
pub fn is_suspicious(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> bool {
    let holder = record.holder().filter(|holder| holder.node != *seen.me);
    let silence = holder.and_then(|holder| silence(memory, now, seen, record, &holder.node));
    silence.is_some_and(|(silent, suspect)| silent >= suspect / 2)
}

/// When silence begins to count, so that nobody sleeps past that.
pub fn next_look(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Option<Duration> {
    let holder = record.holder().filter(|holder| holder.node != *seen.me && record.election.is_none())?;
    let (silent, suspect) = silence(memory, now, seen, record, &holder.node)?;
    suspect.checked_sub(silent).filter(|left| !left.is_zero())
}

fn most_voters_cannot_reach(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    holder: &NodeName,
    suspect: Duration,
) -> bool {
    let Some(rules) = &record.rules else { return false };
    // Nobody probes for the repository.
    let voters = rules.target().voters(holder).filter(|voter| !voter.node.is_repository());
    let voters: Vec<_> = voters.collect();
    let failing = voters.iter().filter(|voter| {
        if voter.node == *seen.me {
            let since = seen.peers.get(holder).and_then(|peer| peer.probe_failing_since);
            return since.is_some_and(|since| lasting(memory, now, since) >= suspect);
        }
        let Some(peer) = seen.peers.get(&voter.node) else { return false };
        let fresh = peer.heard.is_some_and(|heard| now.since(heard) < suspect);
        let probe = peer.report.as_ref().and_then(|report| report.holder_probe_failing.as_ref());
        fresh && probe.is_some_and(|(node, span)| node == holder && *span >= suspect)
    });
    failing.count() * 2 > voters.len()
}
