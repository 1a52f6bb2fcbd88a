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
use crate::spec::times::STOP_BEFORE_LEASE_END;
use crate::types::{Instant, Term};

/// How much longer than `lease` the next gate waits: two clocks may differ in rate by 1 %, and a stop that
/// is decided at the last moment takes a moment.
pub fn wait_out(lease: Duration) -> Duration {
    lease + lease / 100 + Duration::from_millis(50)
}

/// The newest moment for which the term is proven.
pub fn proven(memory: &Memory, seen: &Observation<'_>, record: &Record, term: Term) -> Option<Instant> {
    let open = record.term == term && record.election.is_none();
    let store = seen.store.confirmed.filter(|_| open);
    let voters = seen.local.heartbeat.filter(|(of, _)| *of == term).map(|(_, begun)| begun);
    // A reign that was just decided has not had the time for a proof; the decision itself is one.
    let decided = memory.reign_seen.filter(|(of, _)| *of == term).map(|(_, at)| at);
    store.max(voters).max(decided)
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
    if holder.node != *seen.me {
        return None;
    }
    let proven = proven(memory, seen, record, record.term)?;
    let stop_at = proven + seen.times.lease.saturating_sub(STOP_BEFORE_LEASE_END);
    if now < stop_at {
        return None;
    }
    memory.lease_ended = Some(record.term);
    let reason = Reason::LeaseEnding { term: record.term };
    Some(Decision::new(Goal::Stopped, reason, now).act(Action::StopNow))
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
    // The deciding votes were cast before the decision was seen, so counting from there is never too short.
    let since = memory.reign_seen.filter(|(term, _)| *term == record.term).map(|(_, at)| at)?;
    wait_out(seen.times.lease).checked_sub(now.since(since)).filter(|left| !left.is_zero())
}
