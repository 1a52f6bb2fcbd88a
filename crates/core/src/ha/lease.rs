//! The right of a primary to serve reads, which ends by itself.
//!
//! A proof is either the store's linearizable word that the term is open, or a heartbeat that enough voters
//! acknowledged: a sealed voter acknowledges nothing, so an acknowledged heartbeat means that no other
//! primary existed when it was begun. Both count from the moment of asking, on this machine's
//! `CLOCK_BOOTTIME`. Writes need none of this: they are safe by their acknowledgements.
//!
//! Hazard: counted from the answer instead of the question, an old primary answers reads after the gate of
//! the next one has opened.

use std::time::Duration;

use crate::action::Action;
use crate::ha::{Decision, Goal, Memory};
use crate::observation::{Observation, Postgres};
use crate::reason::Reason;
use crate::record::Record;
use crate::spec::Times;
use crate::spec::times::STOP_BEFORE_LEASE_END;
use crate::types::{Instant, Term};

/// How much longer than `lease` the next gate waits: clocks may differ in rate, and a stop that is decided at
/// the last moment takes a moment.
pub fn wait_out(times: &Times) -> Duration {
    times.lease + times.clock_margin() + Duration::from_millis(50)
}

/// The newest moment for which the term is proven; before it is, nobody may be told to read here.
pub fn proven(memory: &Memory, seen: &Observation<'_>, record: &Record, term: Term) -> Option<Instant> {
    let reign = record.reign.as_ref().filter(|_| record.term == term)?;
    let remembered = memory.proven.filter(|(timeline, _)| *timeline == reign.timeline).map(|(_, at)| at);
    // An incumbent that won again was never anything but the primary, so an older heartbeat counts too.
    let voters = seen.local.heartbeat.filter(|(of, _)| *of <= term).map(|(_, begun)| begun);
    remembered.max(voters)
}

/// Keeps the proofs of this node's own reign beyond the term that they were made in.
pub fn remember(memory: &mut Memory, seen: &Observation<'_>, record: &Record) {
    let Some(reign) = record.open_reign().filter(|reign| reign.holder.node == *seen.me) else { return };
    let before = memory.proven.filter(|(timeline, _)| *timeline == reign.timeline).map(|(_, at)| at);
    if let Some(newest) = before.max(seen.store.confirmed) {
        memory.proven = Some((reign.timeline, newest));
    }
}

/// When a running primary must begin to stop, unless it is proven anew. Without any proof, as after a restart of
/// the agent, that counts from when this reign was first seen.
pub fn stop_at(memory: &Memory, seen: &Observation<'_>, record: &Record) -> Option<Instant> {
    let first_seen = memory.reign_seen.map(|(_, at)| at);
    let since = proven(memory, seen, record, record.term).or(first_seen).or(memory.started)?;
    Some(since + seen.times.lease.saturating_sub(STOP_BEFORE_LEASE_END))
}

/// Stops a primary whose term nobody confirms, in time for it to be gone at the end of the lease.
pub fn ending(
    memory: &mut Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
) -> Option<Decision> {
    let Postgres::Primary(_) = seen.local.postgres else { return None };
    let holder = record.holder()?;
    if holder.node != *seen.me || now < stop_at(memory, seen, record)? {
        return None;
    }
    memory.lease_ended = Some(record.term);
    let reason = Reason::LeaseEnding { term: record.term };
    Some(Decision::new(Goal::Stopped, reason, now).act(Action::StopNow))
}

/// While the store has not been read, or shows less than what this node has taken part in, nothing is begun; but
/// a primary that nobody confirms is not read for ever.
pub fn hold(memory: &Memory, now: Instant, seen: &Observation<'_>, why: Reason) -> Decision {
    let mut hold = Decision::new(Goal::Hold, why, now);
    let Postgres::Primary(_) = seen.local.postgres else { return hold };
    hold.duties.prove_term = true;
    let heartbeat = seen.local.heartbeat.map(|(_, begun)| begun);
    let Some(since) = heartbeat.max(memory.started) else { return hold };
    let stop_at = since + seen.times.lease.saturating_sub(STOP_BEFORE_LEASE_END);
    if now < stop_at {
        return hold.again(now, stop_at.since(now));
    }
    let term = seen.local.durable.term;
    Decision::new(Goal::Stopped, Reason::LeaseEnding { term }, now).act(Action::StopNow)
}

/// Time left before nobody can read the former term any more; `None` when that is so already.
pub fn predecessor_left(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
) -> Option<Duration> {
    let reign = record.reign.as_ref()?;
    if reign.predecessor_gone {
        return None;
    }
    // Every seal came before its vote, and every vote before it was seen, so counting from there is never too
    // short. A node that saw nothing of the election counts from when it saw the result.
    let of_this_term = |seen: &(Term, Instant)| seen.0 == record.term;
    let sealed = memory.sealed_seen.filter(of_this_term);
    let since = sealed.or(memory.reign_seen.filter(of_this_term)).map(|(_, at)| at)?;
    wait_out(seen.times).checked_sub(now.since(since)).filter(|left| !left.is_zero())
}
