//! What everyone but the holder does while a term is open: stream from the right node, or be rebuilt.

use std::time::Duration;

use crate::action::Action;
use crate::ha::{Decision, Goal, Memory, rejoin};
use crate::observation::{Observation, Postgres, Running, Standby};
use crate::reason::Reason;
use crate::record::{Record, Reign};
use crate::types::{Instant, NodeName};

pub fn decide(_memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Decision {
    let Some(reign) = &record.reign else {
        return Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now);
    };
    let (term, local) = (record.term, seen.local);
    let stop = |reason| Decision::new(Goal::Standby, reason, now).act(Action::StopNow);
    match &local.postgres {
        Postgres::Unknown => return Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now),
        Postgres::Remains => return stop(Reason::ClearingRemains {}),
        Postgres::Primary(_) => return stop(Reason::StrayPrimary { term }),
        Postgres::Standby(_) | Postgres::Starting if local.durable.promoting.is_some() => {
            return stop(Reason::WithdrawingPromotion { term });
        }
        _ => {}
    }
    if let Some(rebuild) = rejoin::decide(now, seen, record, reign) {
        return rebuild;
    }
    match &local.postgres {
        Postgres::Stopped(_) => {
            Decision::new(Goal::Standby, Reason::StartingSealed {}, now).act(Action::StartSealed)
        }
        Postgres::Standby(standby) => follow(now, seen, record, reign, standby),
        _ => Decision::new(Goal::Standby, Reason::LookingAtPostgres {}, now)
            .again(now, Duration::from_millis(50)),
    }
}

fn follow(
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    standby: &Standby,
) -> Decision {
    let term = record.term;
    if !reign.promoted {
        let reason = Reason::WaitingForPromotion { term, holder: reign.holder.node.clone() };
        return Decision::new(Goal::Standby, reason, now);
    }
    let upstream = upstream(now, seen, &reign.holder.node);
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
    let reason =
        if standby.receiving { Reason::Follows { upstream } } else { Reason::NotReceiving { upstream } };
    Decision::new(Goal::Standby, reason, now)
}

/// The node that the file says, while it is a live standby; else the holder.
fn upstream(now: Instant, seen: &Observation<'_>, holder: &NodeName) -> NodeName {
    let Some(node) = seen.spec.node(seen.me) else { return holder.clone() };
    let wanted = seen.spec.upstream(node, holder);
    let live = seen.peers.get(wanted).is_some_and(|peer| {
        let fresh = peer.heard.is_some_and(|heard| now.since(heard) < seen.times.suspect);
        fresh && peer.report.as_ref().is_some_and(|report| report.running == Running::Standby)
    });
    if live { wanted.clone() } else { holder.clone() }
}
