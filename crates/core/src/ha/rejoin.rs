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
use crate::ha::{Decision, Goal, Memory, copy_of, heard_lately};
use crate::observation::{Copy, Observation, Postgres};
use crate::reason::Reason;
use crate::record::{Proposal, Record, Reign};
use crate::types::{Incarnation, Instant, Term, Timeline};

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
    let usable = match copy_of(&local.postgres) {
        Some(copy) if is_members_copy && !local.durable.rebuilding => match fits(seen, record, reign, copy) {
            Fit::Follows => return None,
            // Whether it fits shows only when the new timeline has begun.
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
    if !reign.promoted || (destroys && !is_next(memory, now, seen, record, reign)) {
        return Some(Decision { reason: Reason::WaitsForSafeCopies { holder }, ..decision });
    }
    if !memory.confirmed {
        return Some(Decision { reason: Reason::RecordUnconfirmed {}, ..decision });
    }
    // An incarnation that this directory already has, or had, is not the one that may be written.
    let own = local.durable.member.as_ref().map(|member| member.incarnation);
    let fresh = enlisted.as_ref().filter(|member| {
        own.is_none_or(|own| member.incarnation > own)
            || (local.durable.rebuilding && own == Some(member.incarnation))
    });
    let Some(member) = fresh else {
        let from = enlisted.map_or(Incarnation(0), |member| member.incarnation);
        let enlist = Proposal::Enlist { node: seen.me.clone(), from };
        return Some(Decision { reason: Reason::Enlisting {}, ..decision }.act(Action::Propose(enlist)));
    };
    let same_system = copy_of(&local.postgres).is_some_and(|copy| copy.system == record.system);
    let can_rewind = same_system && !local.durable.rebuilding;
    let (reason, last) = if can_rewind {
        (Reason::Rewinding { source: holder.clone() }, Action::Rewind { term: record.term, source: holder })
    } else {
        (Reason::Cloning { source: holder.clone() }, Action::Clone { term: record.term, source: holder })
    };
    let decision = Decision { reason, ..decision };
    Some(decision.act(Action::BecomeMember { member: member.clone(), rebuild: true }).act(last))
}

/// May this copy be destroyed now, given that no rule counts it?
///
/// A rule of several members was proven without this copy, so its members have all that was acknowledged. Under
/// a rule of the primary alone, what is left elsewhere may be the second copy of a commit: then one goes at a
/// time, and the least worthy first, because it is a whole one again before the next goes.
fn is_next(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record, reign: &Reign) -> bool {
    let holder = &reign.holder.node;
    let alone = record.rules.as_ref().is_some_and(|rules| rules.current.members.len() == 1);
    if !alone || seen.spec.durability.needed() == 0 {
        return true;
    }
    // A timeline that nobody reserved, or for a term that the node has taken no part in, is a person's promotion,
    // and worth nothing.
    let of_a_term = |timeline: Timeline, took_part: Term| {
        record.line(timeline).is_some_and(|line| line.term <= took_part)
    };
    let own = copy_of(&seen.local.postgres)
        .filter(|copy| election::is_known(record, &seen.local.durable.adopted, copy))
        .map(|copy| (copy.timeline, copy.end));
    let candidates = seen.spec.nodes.iter().filter(|node| node.voter_candidate() && node.name != *holder);
    // Whoever has not said yet whether it can follow this reign may be one of either.
    let seen_for = |since: Option<Instant>| now.since(since.or(memory.started).unwrap_or(now));
    let reign_seen = memory.reign_seen.filter(|(term, _)| *term == record.term).map(|(_, at)| at);
    let (mut whole, mut waited_for) = (0, false);
    for node in candidates.filter(|node| node.name != *seen.me) {
        let peer = seen.peers.get(&node.name);
        let heard = peer.and_then(|peer| peer.heard);
        let report = peer.and_then(|peer| peer.report.as_ref());
        let Some(report) = report.filter(|_| heard_lately(now, seen, &node.name)) else {
            waited_for |= seen_for(heard.max(memory.started)) < durability::GONE_AFTER;
            continue;
        };
        if report.wants_rebuild {
            let theirs = report.timeline.filter(|timeline| of_a_term(*timeline, report.term));
            let theirs = theirs.map(|timeline| (timeline, report.flush_lsn));
            waited_for |= (theirs, &node.name) < (own, seen.me) && report.damage.is_none();
        } else if report.term < record.term {
            waited_for |= seen_for(reign_seen) < durability::GONE_AFTER;
        } else {
            let upstream = seen.spec.upstream(node, holder);
            whole += usize::from(upstream == holder || !serves(now, seen, reign, upstream));
        }
    }
    // Enough whole ones will be a rule of several members in a moment.
    whole < seen.spec.durability.needed() && !waited_for
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
    if !reign.promoted {
        return Fit::Unknown;
    }
    let parted = matches!(&seen.local.postgres, Postgres::Standby(standby) if standby.diverged);
    match record.left(copy.timeline, reign.timeline) {
        Some(left) if end <= left && !parted => Fit::Follows,
        _ => Fit::Parted,
    }
}
