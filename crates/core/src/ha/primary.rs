//! What the holder of the open term does: take the term up by a promotion, keep the durability rule and its
//! list in step, let clients in when that is safe, and give the term back the moment it cannot go on.

use std::time::Duration;

use crate::action::Action;
use crate::durability::{self, flushed_by, list_of};
use crate::ha::switchover::{self, Step};
use crate::ha::{Decision, Goal, Memory, election, lease, restore, voters_missing};
use crate::observation::{Busy, Copy, Observation, Postgres, Primary, Standby};
use crate::reason::Reason;
use crate::record::{Cause, Proposal, Record, Reign, Rules};
use crate::types::{Instant, Member, Term, Timeline};

/// This many failovers by a crash in ten minutes, and the next one stays where it is: a statement that
/// kills its server would otherwise walk through the herd.
pub const POISON_CRASHES: u32 = 3;

pub fn decide(memory: &mut Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Decision {
    let Some(reign) = &record.reign else {
        return Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now);
    };
    let (term, local) = (record.term, seen.local);
    let stop = |reason| Decision::new(Goal::Stopped, reason, now).act(Action::StopNow);

    if restore::has_won(local, reign) {
        let counts = Action::BecomeMember { member: reign.holder.clone(), rebuild: false };
        return Decision::new(Goal::Primary, Reason::StartingToPromote { term }, now).act(counts);
    }
    let same_copy = local.durable.member.as_ref() == Some(&reign.holder) && !local.durable.rebuilding;
    match &local.postgres {
        Postgres::Unknown => Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now),
        Postgres::Remains => stop(Reason::ClearingRemains {}),
        Postgres::Absent => give_back(now, seen, term, Cause::Damage, Reason::DataGone { term }),
        Postgres::Primary(_) | Postgres::Starting | Postgres::Standby(_) if !same_copy => {
            stop(Reason::DataGone { term })
        }
        Postgres::Stopped(_) if !same_copy => {
            give_back(now, seen, term, Cause::Damage, Reason::DataGone { term })
        }
        // A promotion by hand takes the same next number; what it wrote is nobody's term.
        Postgres::Primary(primary)
            if primary.copy.timeline == reign.timeline && adopted(seen, record, reign) =>
        {
            reigning(memory, now, seen, record, reign, primary)
        }
        Postgres::Primary(_) => stop(Reason::StrayPrimary { term }),
        // A reign that began and is not running has ended: what starts now starts as a standby.
        Postgres::Starting | Postgres::Standby(_) | Postgres::Stopped(_) if reign.promoted => {
            let cause = cause_of_the_end(memory, seen, record);
            let reason = match cause {
                Cause::LeaseLost => Reason::LeaseEnded { term },
                _ => Reason::GivingBack { term, cause },
            };
            give_back(now, seen, term, cause, reason)
        }
        Postgres::Starting | Postgres::Standby(_) if local.busy == Some(Busy::Promote) => {
            Decision::new(Goal::Primary, Reason::Promoting { term, timeline: reign.timeline }, now)
        }
        Postgres::Starting | Postgres::Standby(_) if local.durable.promoting.is_some() => {
            let term = local.durable.promoting.map_or(term, |(term, _)| term);
            stop(Reason::WithdrawingPromotion { term })
        }
        // It was promoted, by its agent or by a person, and died before that could be recorded. No promotion
        // gives the same number again, and what was written meanwhile is nobody's term.
        Postgres::Stopped(copy) | Postgres::Standby(Standby { copy, .. })
            if copy.timeline >= reign.timeline || !may_be_promoted(seen, record, reign, copy) =>
        {
            give_back(now, seen, term, Cause::Crash, Reason::GivingBack { term, cause: Cause::Crash })
        }
        Postgres::Stopped(_) => {
            Decision::new(Goal::Primary, Reason::StartingToPromote { term }, now).act(Action::StartSealed)
        }
        Postgres::Starting => Decision::new(Goal::Primary, Reason::StartingToPromote { term }, now),
        Postgres::Standby(_) if local.damage.is_some() => damaged(now, seen, term),
        Postgres::Standby(_) => promote(now, record, reign, term),
    }
}

/// Did this node itself go onto the reign's timeline for that reign?
fn adopted(seen: &Observation<'_>, record: &Record, reign: &Reign) -> bool {
    let line = record.line(reign.timeline).map(|line| line.term);
    line.is_some() && seen.local.durable.adopted.get(&reign.timeline).copied() == line
}

/// Does this copy still end on a timeline that the store knows, and that this node went onto for its term? One
/// that an operator forced from a timeline of nobody's is led from wherever it is.
fn may_be_promoted(seen: &Observation<'_>, record: &Record, reign: &Reign, copy: &Copy) -> bool {
    let forced_from_nowhere = record.line(reign.timeline).is_some_and(|line| line.parent.is_none());
    forced_from_nowhere || election::is_known(record, &seen.local.durable.adopted, copy)
}

fn cause_of_the_end(memory: &Memory, seen: &Observation<'_>, record: &Record) -> Cause {
    if memory.lease_ended == Some(record.term) {
        Cause::LeaseLost
    } else if record.switchover.as_ref().is_some_and(|order| order.term == record.term) {
        Cause::Switchover
    } else if seen.local.damage.is_some() {
        Cause::Damage
    } else {
        Cause::Crash
    }
}

/// Opens the election of the next term with the word that nothing of this one is left running.
fn give_back(now: Instant, seen: &Observation<'_>, term: Term, cause: Cause, reason: Reason) -> Decision {
    let poisoned = cause == Cause::Crash && seen.recent_crashes >= POISON_CRASHES;
    Decision::new(Goal::Sealed, reason, now).act(release(seen, term, cause, poisoned))
}

pub(super) fn release(seen: &Observation<'_>, term: Term, cause: Cause, poisoned: bool) -> Action {
    Action::Propose(Proposal::Open { term, cause, by: seen.me.clone(), released: true, poisoned })
}

fn promote(now: Instant, record: &Record, reign: &Reign, term: Term) -> Decision {
    let Some(rules) = &record.rules else {
        return Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now);
    };
    let timeline: Timeline = reign.timeline;
    Decision::new(Goal::Primary, Reason::Promoting { term, timeline }, now).act(Action::Promote {
        term,
        timeline,
        from: reign.elected_at,
        list: list_of(rules.target(), &reign.holder, timeline),
    })
}

fn damaged(now: Instant, seen: &Observation<'_>, term: Term) -> Decision {
    let what = seen.local.damage.clone().unwrap_or_default();
    // A clean stop is tried because it lets the standbys have everything; its deadline ends in a kill, and
    // giving the term back needs nothing of this node's disk.
    Decision::new(Goal::Stopped, Reason::Damaged { what: what.clone() }, now)
        .act(Action::Propose(Proposal::Bar { node: seen.me.clone(), why: Some(what) }))
        .act(Action::StopCleanly)
        .act(release(seen, term, Cause::Damage, false))
}

fn reigning(
    memory: &mut Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    primary: &Primary,
) -> Decision {
    let term = record.term;
    let mut decision = Decision::new(Goal::Primary, Reason::HoldsTerm { term }, now);

    if !reign.promoted {
        let begin = begin_of(primary, reign.timeline);
        decision.reason = Reason::RecordingPromotion { term };
        return decision.act(Action::Propose(Proposal::Promoted { term, begin, at: primary.flush_lsn }));
    }
    if seen.local.damage.is_some() {
        return damaged(now, seen, term);
    }
    // A connection that does not stream yet has not taken its slot either, and acknowledges nothing.
    let impostor = primary
        .senders
        .iter()
        .find(|sender| sender.streaming && !sender.genuine && claims_a_member(record, sender));
    if let Some(impostor) = impostor {
        decision.reason = Reason::CuttingImpostor { claimed: impostor.member.clone() };
        return decision.act(Action::CutSender { term, pid: impostor.pid });
    }
    for node in record.nodes.keys().filter(|node| *node != seen.me && !primary.slots.contains(*node)) {
        decision.actions.push(Action::CreateSlot { term, node: node.clone() });
    }
    if let Some((actions, reason)) = durability::step(memory, now, seen, record, reign, primary) {
        decision.reason = reason;
        decision.actions.extend(actions);
    }
    let step = switchover::decide(memory, now, seen, record, reign, primary);
    if let Some(Step::HandOver(decision)) = step {
        return decision;
    }
    let mut decision = gate(memory, now, seen, record, reign, primary, decision);
    match step {
        Some(Step::Drain { reason, left }) => {
            decision.duties.drain = true;
            Decision { reason, ..decision }.again(now, left)
        }
        Some(Step::Wait(reason)) => Decision { reason, ..decision }.again(now, Duration::from_millis(50)),
        Some(Step::HandOver(_)) | None => decision,
    }
}

fn claims_a_member(record: &Record, sender: &crate::observation::Sender) -> bool {
    sender.member.as_ref().is_some_and(|member| record.nodes.contains_key(&member.node))
}

/// Where `timeline` left its parent, as this server's own history tells.
fn begin_of(primary: &Primary, timeline: Timeline) -> crate::types::Lsn {
    let begin = primary.copy.begins.iter().find(|(number, _)| *number == timeline);
    begin.map_or(primary.flush_lsn, |(_, begin)| *begin)
}

/// Clients come in only when nothing that they could see can be lost, and nobody can read the former term.
fn gate(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    primary: &Primary,
    decision: Decision,
) -> Decision {
    let term = record.term;
    let Some(rules) = &record.rules else { return decision };
    let rule = rules.target();
    if seen.local.gate_open {
        let recorded = reign.gate_opened;
        let decision =
            if recorded { decision } else { decision.act(Action::Propose(Proposal::GateOpened { term })) };
        return commits(seen, rules, &reign.holder, primary, decision);
    }
    let (have, needed) = (flushed_by(rule, primary, reign.promoted_at), rule.needed);
    // Once open in this reign, the WAL it began with is on enough members for good.
    if voters_missing(rule, have) && !reign.gate_opened {
        let reason = Reason::GateWaitsForVoters { until: reign.promoted_at, have, needed };
        return Decision { reason, ..decision };
    }
    if let Some(left) = lease::predecessor_left(memory, now, seen, record) {
        let predecessor_ms_left = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        return Decision { reason: Reason::GateWaitsForLease { predecessor_ms_left }, ..decision }
            .again(now, left);
    }
    let lists: Vec<_> = rules.in_force().map(|rule| list_of(rule, &reign.holder, reign.timeline)).collect();
    if !seen.local.list.as_ref().is_some_and(|list| lists.contains(list)) {
        return Decision { reason: Reason::GateWaitsForList {}, ..decision };
    }
    let reason = Reason::OpeningGate { term };
    let mut decision = Decision { reason, ..decision };
    // Before everything else: nothing in the list may delay the first client.
    decision.actions.insert(0, Action::SetGate { term, open: true });
    decision
}

/// The steady state, in one true sentence.
fn commits(
    seen: &Observation<'_>,
    rules: &Rules,
    holder: &Member,
    primary: &Primary,
    decision: Decision,
) -> Decision {
    if !matches!(decision.reason, Reason::HoldsTerm { .. }) {
        return decision;
    }
    let needed = rules.target().needed;
    let streams = |member: &Member| {
        primary
            .senders
            .iter()
            .any(|sender| sender.genuine && sender.streaming && sender.member.as_ref() == Some(member))
    };
    let (live, lost): (Vec<_>, Vec<_>) =
        rules.target().voters(&holder.node).partition(|voter| streams(voter));
    let have = u32::try_from(live.len()).unwrap_or(u32::MAX);
    let reason = if have < needed && lost.iter().any(|voter| voter.node.is_repository()) {
        Reason::CommitsWaitForRepository { have, needed }
    } else if have < needed {
        Reason::CommitsWait { have, needed }
    } else if needed == 0 && seen.spec.durability.needed() > 0 {
        Reason::Degraded {}
    } else {
        return decision;
    };
    Decision { reason, ..decision }
}
