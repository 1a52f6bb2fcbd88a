//! What everyone but the holder does while a term is open: stream from the right node, or be rebuilt.

use std::time::Duration;

use crate::action::Action;
use crate::ha::{Decision, Goal, Memory, heard_lately, rejoin, restore};
use crate::observation::{Observation, Postgres, Running, Standby};
use crate::reason::Reason;
use crate::record::{Record, Reign};
use crate::types::{Instant, Member, NodeName};

/// A promotion takes well under a second; what takes longer is not waited for.
const START_LATER_FOR: Duration = Duration::from_secs(1);

pub fn decide(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Decision {
    let Some(reign) = &record.reign else {
        return Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now);
    };
    let (term, local) = (record.term, seen.local);
    let stop = |reason| Decision::new(Goal::Standby, reason, now).act(Action::StopNow);
    match &local.postgres {
        Postgres::Unknown => return Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now),
        Postgres::Remains => return stop(Reason::ClearingRemains {}),
        Postgres::Primary(_) => return stop(Reason::StrayPrimary { term }),
        Postgres::Standby(_) | Postgres::Starting => {
            if let Some((term, _)) = local.durable.promoting {
                return stop(Reason::WithdrawingPromotion { term });
            }
        }
        Postgres::Absent | Postgres::Stopped(_) => {}
    }
    if let Some(restore) = restore::decide(memory, now, seen, record, reign) {
        return restore;
    }
    if let Some(rebuild) = rejoin::decide(memory, now, seen, record, reign) {
        return rebuild;
    }
    match &local.postgres {
        Postgres::Stopped(_) if may_start_later(memory, now, seen, record, reign) => {
            let holder = reign.holder.node.clone();
            Decision::new(Goal::Standby, Reason::StartingLater { holder }, now)
                .again(now, Duration::from_millis(100))
        }
        Postgres::Stopped(_) => {
            Decision::new(Goal::Standby, Reason::StartingSealed {}, now).act(Action::StartSealed)
        }
        Postgres::Standby(standby) => follow(now, seen, record, reign, standby),
        _ => Decision::new(Goal::Standby, Reason::LookingAtPostgres {}, now)
            .again(now, Duration::from_millis(50)),
    }
}

/// A server that was stopped by the failover itself need not start while its successor is being promoted, as long
/// as enough others run that can confirm what that one has: on a machine that they share it would slow all of them.
fn may_start_later(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
) -> bool {
    let begun = memory.reign_seen.filter(|(term, _)| *term == record.term);
    let fresh = begun.is_some_and(|(_, at)| now.since(at) < START_LATER_FOR);
    let Some(rules) = record.rules.as_ref().filter(|_| fresh && !reign.gate_opened) else { return false };
    let confirms = |member: &&Member| {
        let report = seen.peers.get(&member.node).and_then(|peer| peer.report.as_ref());
        member.node != *seen.me
            && heard_lately(now, seen, &member.node)
            && report.is_some_and(|report| report.running == Running::Standby)
    };
    let rule = rules.target();
    rule.voters(&reign.holder.node).filter(confirms).count() >= rule.needed as usize
}

fn follow(
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    standby: &Standby,
) -> Decision {
    let term = record.term;
    let upstream = upstream(now, seen, record, reign);
    let waits = || {
        let reason = Reason::WaitingForPromotion { term, holder: reign.holder.node.clone() };
        Decision::new(Goal::Standby, reason, now)
    };
    let early = upstream == reign.holder.node && may_follow_early(now, seen, record, reign, standby);
    if !reign.promoted && !early {
        return waits();
    }
    let sealed_for_later = seen.local.durable.sealed.is_some();
    let pointed = standby.follows.as_ref() == Some(&(upstream.clone(), term)) && !sealed_for_later;
    if !pointed {
        let reason = Reason::PointingAt { upstream: upstream.clone() };
        return Decision::new(Goal::Standby, reason, now).act(Action::Follow {
            term,
            upstream,
            timeline: reign.timeline,
        });
    }
    if !reign.promoted {
        return waits();
    }
    if !standby.receiving {
        return Decision::new(Goal::Standby, Reason::NotReceiving { upstream }, now);
    }
    let follows = Decision::new(Goal::Standby, Reason::Follows { upstream }, now);
    if seen.local.gate_open {
        return follows;
    }
    // For reads. It stays open through outages of the upstream; a start and a promotion begin with it closed.
    follows.act(Action::SetGate { term, open: true })
}

/// May this standby connect to the winner while that is still being promoted, so that it is there when WAL of the new
/// timeline is?
///
/// It must not bring WAL that the winner may lack: what a WAL receiver reports as flushed would then count for commits
/// that it has never seen. So this copy was sealed for this very election, which means that it has not grown since,
/// and ends where the winner's certainly went on. What it receives from the winner meanwhile is the winner's own.
fn may_follow_early(
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    standby: &Standby,
) -> bool {
    let holder = &reign.holder.node;
    let report = seen.peers.get(holder).and_then(|peer| peer.report.as_ref());
    let already = standby.follows.as_ref() == Some(&(holder.clone(), record.term));
    let sealed = seen.local.durable.sealed == Some(record.term) && !standby.receiving;
    // One that does not run yet would refuse, and the next attempt is some time away.
    let runs =
        heard_lately(now, seen, holder) && report.is_some_and(|report| report.running == Running::Standby);
    already || (sealed && runs && rejoin::is_contained(seen, record, reign, &standby.copy))
}

/// The node that the file says, while that one serves; else the holder. A node that commits are counting on
/// stays with the holder until the rule goes on without it.
fn upstream(now: Instant, seen: &Observation<'_>, record: &Record, reign: &Reign) -> NodeName {
    let holder = &reign.holder.node;
    let counted = record.rules.as_ref().is_some_and(|rules| rules.involve_node(seen.me));
    let wanted = seen.spec.node(seen.me).map_or(holder, |node| seen.spec.upstream(node, holder));
    if !counted && serves(now, seen, reign, wanted) { wanted.clone() } else { holder.clone() }
}

/// Is `node` a live standby that has what this reign writes, so that another one can stream from it?
pub(crate) fn serves(now: Instant, seen: &Observation<'_>, reign: &Reign, node: &NodeName) -> bool {
    let report = seen.peers.get(node).and_then(|peer| peer.report.as_ref());
    let written_in = seen.store.record.and_then(|record| record.line(reign.timeline)).map(|line| line.term);
    heard_lately(now, seen, node)
        && report.is_some_and(|report| {
            report.running == Running::Standby
                && report.holds.map(|position| position.term) == written_in
                && !report.wants_rebuild
        })
}
