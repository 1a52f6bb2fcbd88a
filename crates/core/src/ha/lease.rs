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
/// a primary that nobody confirms is not read for ever, and what a dead one left behind is not read at all.
pub fn hold(memory: &Memory, now: Instant, seen: &Observation<'_>, why: Reason) -> Decision {
    let mut hold = Decision::new(Goal::Hold, why, now);
    if seen.local.postgres == Postgres::Remains {
        return Decision { reason: Reason::ClearingRemains {}, ..hold }.act(Action::StopNow);
    }
    let Postgres::Primary(_) = seen.local.postgres else { return hold };
    hold.duties.prove_term = true;
    hold.duties.fence = Some(seen.local.durable.term);
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
///
/// It counts from the moment at which this node saw enough seals, and the newest proof that the former holder can
/// have was begun before that. The store's word that its term is open was asked for before the election was
/// opened, and so before every vote. A heartbeat that was begun when enough were sealed needs more voters than were
/// left unsealed, whichever rule in force its list expressed; a sealed one acknowledges nothing, and an unsealed
/// holder is not in its own list. Where a rule has no voters a heartbeat proves nothing at all.
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
    // A node that saw nothing of the election counts from when it saw the result, which is later.
    let of_this_term = |seen: &(Term, Instant)| seen.0 == record.term;
    let sealed = memory.sealed_seen.filter(of_this_term);
    let since = sealed.or(memory.reign_seen.filter(of_this_term)).map(|(_, at)| at)?;
    wait_out(seen.times).checked_sub(now.since(since)).filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ha::{self, election, tests};
    use crate::observation::{Busy, Local, Primary};
    use crate::record::{Cause, Election, Position, Reign, Rule, Rules, Standing, Vote};
    use crate::types::{Incarnation, Lsn, Member, Timeline};

    fn member(index: usize) -> Member {
        let node = ["a", "b", "c", "d", "e"][index].parse().unwrap();
        Member { node, incarnation: Incarnation(index as u64 + 1) }
    }

    fn chosen(bits: usize) -> impl Iterator<Item = Member> {
        (0..5).filter(move |index| bits & 1 << index != 0).map(member)
    }

    /// An election after the reign of `holder`, in which the nodes of `sealed` have voted.
    fn record(holder: usize, rules: &[Rule], sealed: usize) -> Record {
        let vote = |member: Member| Vote {
            member,
            standing: Standing::Sealed,
            position: Position::default(),
            timeline: Timeline(2),
            begins: Vec::new(),
            electable: true,
            priority: 100,
        };
        Record {
            reign: Some(Reign {
                holder: member(holder),
                timeline: Timeline(2),
                promoted: true,
                elected_at: Lsn::ZERO,
                promoted_at: Lsn::ZERO,
                gate_opened: true,
                predecessor_gone: false,
            }),
            election: Some(Election {
                term: Term(1),
                cause: Cause::AgentSilent,
                opened_by: member(1).node,
                released: false,
                forced: None,
                poisoned: false,
                votes: chosen(sealed).map(|member| (member.node.clone(), vote(member))).collect(),
                heirs: BTreeMap::new(),
            }),
            rules: Some(Rules {
                current: rules[0].clone(),
                next: rules.get(1).cloned(),
                superseded: Vec::new(),
                change: 0,
            }),
            ..Record::empty()
        }
    }

    #[test]
    fn once_enough_are_sealed_no_heartbeat_of_the_holder_can_be_acknowledged() {
        let rules = || {
            let sets = (1..32).flat_map(|members| (0..4).map(move |needed| (members, needed)));
            sets.map(|(members, needed)| Rule { members: chosen(members).collect(), needed })
                .filter(|rule| rule.members.len() == 1 || rule.members.len() > rule.needed as usize)
        };
        let mut enough = 0;
        for (holder, rule) in [0, 4].into_iter().flat_map(|holder| rules().map(move |rule| (holder, rule))) {
            // Another rule in force must be satisfied as well, so one that is alone is the hardest case.
            for sealed in 0..32 {
                let record = record(holder, std::slice::from_ref(&rule), sealed);
                if !election::enough_are_sealed(&record) {
                    continue;
                }
                enough += 1;
                let holder_stopped = sealed & 1 << holder != 0 || rule.needed == 0;
                let primary = member(holder).node;
                let voters = rule.voters(&primary);
                let unsealed = voters.filter(|voter| !chosen(sealed).any(|sealed| sealed == **voter)).count();
                assert!(
                    holder_stopped || unsealed < rule.needed as usize,
                    "{} of {rule} could still prove the term of {}",
                    unsealed,
                    member(holder)
                );
            }
        }
        assert!(enough > 1000, "only {enough} sealed sets were looked at");
    }

    #[test]
    fn every_rule_in_force_needs_its_seals_before_the_wait_begins() {
        let rule = |members, needed| Rule { members: chosen(members).collect(), needed };
        // From b to (b, c) beside a: with c alone sealed, b can still acknowledge under the list of before.
        let rules = [rule(0b011, 1), rule(0b111, 1)];
        assert!(!election::enough_are_sealed(&record(0, &rules, 0b100)));
        assert!(election::enough_are_sealed(&record(0, &rules, 0b110)));
        // The holder's own seal does for all, and where commits need nobody no heartbeat proves anything.
        assert!(election::enough_are_sealed(&record(0, &rules, 0b001)));
        assert!(election::enough_are_sealed(&record(0, &[rule(0b111, 0)], 0)));
        assert!(!election::enough_are_sealed(&record(0, &[rule(0b111, 0), rule(0b111, 1)], 0)));
    }

    #[test]
    fn the_wait_counts_from_the_seals_and_else_from_the_result() {
        let (me, spec, times) = (member(1).node, tests::spec(&["a", "b", "c"]), Times::default());
        let (local, peers) = (Local::default(), BTreeMap::new());
        let rules = [Rule { members: chosen(0b111).collect(), needed: 1 }];
        let mut record = record(0, &rules, 0b110);
        (record.term, record.election) = (Term(1), None);
        let seen = tests::observation(&me, &spec, &times, &record, &local, &peers);
        let at = |seconds| Instant::from_boot(Duration::from_secs(seconds));
        let mut memory = Memory { reign_seen: Some((Term(1), at(12))), ..Memory::default() };
        let left = |memory: &Memory, now| predecessor_left(memory, at(now), &seen, &record);

        assert_eq!(left(&memory, 12), Some(wait_out(&times)), "the election was not seen");
        memory.sealed_seen = Some((Term(1), at(10)));
        assert_eq!(left(&memory, 12), Some(wait_out(&times) - Duration::from_secs(2)));
        assert_eq!(left(&memory, 14), None);
        memory.sealed_seen = Some((Term(7), at(2)));
        assert_eq!(left(&memory, 12), Some(wait_out(&times)), "those were seals of another election");
    }

    #[test]
    fn a_primary_that_is_no_longer_named_is_stopped_at_the_end_of_its_lease_whatever_it_is_doing() {
        let (me, spec, times) = (member(0).node, tests::spec(&["b", "c"]), Times::default());
        let record = record(0, &[Rule { members: (0..3).map(member).collect(), needed: 1 }], 0);
        let begun = Instant::from_boot(Duration::from_secs(100));
        let local = Local {
            postgres: Postgres::Primary(Primary::default()),
            busy: Some(Busy::Configure),
            heartbeat: Some((record.term, begun)),
            ..Local::default()
        };
        let peers = BTreeMap::new();
        let mut memory = Memory::default();
        let mut stops_after = |since: Duration| {
            let seen = tests::observation(&me, &spec, &times, &record, &local, &peers);
            let decision = ha::decide(&mut memory, begun + since, &seen);
            decision.actions.contains(&Action::StopNow)
        };
        let last = times.lease - STOP_BEFORE_LEASE_END;
        assert!(!stops_after(last - Duration::from_millis(1)));
        assert!(stops_after(last), "it is busy, and cannot begin to stop cleanly");
    }
}
