//! A copy that cannot simply follow: none, half made, of a former incarnation, or with a history of its own.
//!
//! Rewriting a copy destroys what it holds. So it happens only when no durability rule counts this copy any
//! more and the new primary, with enough others, holds everything that was acknowledged; and what is written
//! then is a new incarnation, which was never anybody's voter.
//!
//! Hazard: a copy rewritten too early may have been the second one of an acknowledged commit (ha-attack S10).

use crate::action::Action;
use crate::durability;
use crate::ha::election;
use crate::ha::standby::serves;
use crate::ha::{Decision, Goal, Memory, heard_lately};
use crate::observation::{Copy, Observation, Postgres, Report, Running};
use crate::reason::Reason;
use crate::record::{Position, Proposal, Record, Reign};
use crate::types::{Incarnation, Instant, NodeName};

/// The step towards a copy that can follow; `None` if this one can.
pub fn decide(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
) -> Option<Decision> {
    let local = seen.local;
    let enlisted = record.member(seen.me);
    let is_members_copy = local.durable.member.is_some() && local.durable.member == enlisted;
    let usable = match local.postgres.copy() {
        Some(copy) if is_members_copy && !local.durable.rebuilding => match fits(seen, record, reign, copy) {
            Fit::Follows => return None,
            // It shows when the new timeline has begun.
            Fit::Unknown => return None,
            Fit::Parted => false,
        },
        None if matches!(local.postgres, Postgres::Starting) && !local.durable.rebuilding => return None,
        _ => false,
    };
    debug_assert!(!usable);

    let mut decision = Decision::new(Goal::Standby, Reason::WaitsToLoseVote {}, now);
    decision.wants_rebuild = true;
    if record.rules.as_ref().is_some_and(|rules| rules.involve_node(seen.me)) {
        return Some(decision);
    }
    let holder = reign.holder.node.clone();
    // A copy that is worth nothing already can be written once there is something to write.
    let destroys =
        is_members_copy && !local.durable.rebuilding && !matches!(local.postgres, Postgres::Absent);
    if !reign.promoted {
        let reason = Reason::WaitingForPromotion { term: record.term, holder };
        return Some(Decision { reason, ..decision });
    }
    if !seen.store.caught_up {
        return Some(Decision { reason: Reason::RecordUnconfirmed {}, ..decision });
    }
    if destroys && !is_next(memory, now, seen, record, reign) {
        return Some(Decision { reason: Reason::WaitsForSafeCopies { holder }, ..decision });
    }
    if !answers(now, seen, &holder, destroys) {
        return Some(Decision { reason: Reason::WaitsForSource { source: holder }, ..decision });
    }
    // An incarnation that this directory already has, or had, is not the one that may be written. Where nothing says
    // what it had, that is whatever the node was enlisted with.
    let own = local.durable.member.as_ref().map(|member| member.incarnation);
    // What was held at an earlier moment is a copy too, and becomes another one.
    let under_way = own.filter(|_| local.durable.rebuilding && local.durable.held.is_none());
    let had = own.or(memory.enlisted_before);
    let fresh = enlisted.as_ref().filter(|member| {
        had.is_none_or(|had| member.incarnation > had) || under_way == Some(member.incarnation)
    });
    let Some(member) = fresh else {
        let from = enlisted.map_or(Incarnation(0), |member| member.incarnation);
        let enlist = Proposal::Enlist { node: seen.me.clone(), from };
        return Some(Decision { reason: Reason::Enlisting {}, ..decision }.act(Action::Propose(enlist)));
    };
    let same_system = local.postgres.copy().is_some_and(|copy| copy.system == record.system);
    let can_rewind = same_system && !local.durable.rebuilding;
    let archived = record.archive.as_ref().is_some_and(|archive| archive.repository.is_some());
    let source = holder.clone();
    let (reason, last) = if can_rewind {
        (Reason::Rewinding { source }, Action::Rewind { term: record.term, source: holder })
    } else {
        let reason = if archived { Reason::Restoring { source } } else { Reason::Cloning { source } };
        (reason, Action::Clone { term: record.term, source: holder })
    };
    let decision = Decision { reason, ..decision };
    let become_it = Action::BecomeMember { member: member.clone(), rebuild: true };
    Some(decision.acts((under_way != Some(member.incarnation)).then_some(become_it)).act(last))
}

/// Can a copy be made from this node? None is given up (`destroys`) before that one also says that it leads.
fn answers(now: Instant, seen: &Observation<'_>, holder: &NodeName, destroys: bool) -> bool {
    let Some(peer) = seen.peers.get(holder) else { return false };
    let leads = peer.report.as_ref().is_some_and(|report| report.running == Running::Primary);
    peer.probe_failing_since.is_none() && (!destroys || leads && heard_lately(now, seen, holder))
}

/// May this copy be destroyed now, given that no rule counts it?
///
/// Rules of several members were proven without this copy, so their members have all that was acknowledged. Under
/// one of the primary alone, what is left elsewhere may be the second copy of a commit: then one goes at a time,
/// the least worthy first, because it is a whole one again before the next goes. And nobody goes before it is known
/// of the others what they are: that takes them a moment, or they are gone.
pub(super) fn is_next(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
) -> bool {
    let holder = &reign.holder.node;
    let alone =
        record.rules.as_ref().is_some_and(|rules| rules.in_force().any(|rule| rule.members.len() == 1));
    if !alone || seen.spec.durability.needed() == 0 {
        return true;
    }
    let own = Report::of(seen.local, Some(record)).holds;
    let reign_seen = memory.reign_seen.filter(|(term, _)| *term == record.term).map(|(_, at)| at);
    let in_time = |since: Option<Instant>| {
        since
            .max(reign_seen)
            .or(memory.started)
            .is_some_and(|since| now.since(since) < durability::GONE_AFTER)
    };
    // One that is held at an earlier moment becomes no whole one.
    let restored = |node: &NodeName| record.is_restored(node);
    let candidates = seen.spec.nodes.iter().filter(|node| node.voter_candidate() && node.name != *holder);
    let candidates = candidates.filter(|node| !restored(&node.name));
    let (mut whole, mut waited_for) = (0, false);
    for node in candidates.filter(|node| node.name != *seen.me) {
        let peer = seen.peers.get(&node.name);
        let report = peer.and_then(|peer| peer.report.as_ref());
        let Some(report) = report.filter(|_| heard_lately(now, seen, &node.name)) else {
            waited_for |= in_time(peer.and_then(|peer| peer.heard));
            continue;
        };
        if report.wants_rebuild {
            // A damaged one may never be whole again.
            let less_worthy = (report.holds, &node.name) < (own, seen.me);
            waited_for |= less_worthy && (report.damage.is_none() || in_time(None));
        } else if !has_all(record, reign, report) {
            waited_for |= in_time(None);
        } else {
            let upstream = seen.spec.upstream(node, holder);
            whole += usize::from(upstream == holder || !serves(now, seen, reign, upstream));
        }
    }
    // Enough whole ones will be a rule of several members in a moment.
    whole < seen.spec.durability.needed() && !waited_for
}

/// Does this node say that it holds everything with which the reign began?
pub(crate) fn has_all(record: &Record, reign: &Reign, report: &Report) -> bool {
    let line = record.line(reign.timeline);
    let begun_with = line.map(|line| Position { term: line.term, lsn: reign.promoted_at });
    reign.promoted && report.holds.zip(begun_with).is_some_and(|(holds, begun_with)| holds >= begun_with)
}

/// Is everything that this copy holds certainly in the history of the reign?
pub(crate) fn is_contained(seen: &Observation<'_>, record: &Record, reign: &Reign, copy: &Copy) -> bool {
    matches!(fits(seen, record, reign, copy), Fit::Follows)
}

enum Fit {
    Follows,
    Unknown,
    Parted,
}

fn fits(seen: &Observation<'_>, record: &Record, reign: &Reign, copy: &Copy) -> Fit {
    if copy.system.is_some() && copy.system != record.system {
        return Fit::Parted;
    }
    let Some(end) = copy.end else { return Fit::Unknown };
    let adopted = &seen.local.durable.adopted;
    let (_, known) = election::position(record, adopted, copy.timeline, end, &copy.begins);
    if !known {
        return Fit::Parted;
    }
    let parted = matches!(&seen.local.postgres, Postgres::Standby(standby) if standby.diverged);
    match record.left(copy.timeline, reign.timeline) {
        Some(left) if end <= left && !parted => Fit::Follows,
        _ if reign.promoted => Fit::Parted,
        _ => Fit::Unknown,
    }
}
