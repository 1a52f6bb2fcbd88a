//! The first node makes the cluster; nobody else ever runs initdb.
//!
//! The claim is written to the store before initdb starts, so two first nodes cannot make two clusters. The
//! new cluster then goes the way of every other reign: an election of one, a promotion.

use crate::action::Action;
use crate::ha::{Decision, Goal};
use crate::observation::{Observation, Postgres};
use crate::reason::Reason;
use crate::record::{Cause, Proposal, Record};
use crate::types::Instant;

pub fn decide(now: Instant, seen: &Observation<'_>, record: &Record) -> Decision {
    let first = seen.spec.nodes.iter().find(|node| node.electable()).map(|node| &node.name);
    let founder = record.founder.as_ref();
    if founder.unwrap_or_else(|| first.unwrap_or(seen.me)) != seen.me {
        let reason = Reason::WaitingForFounder { founder: founder.cloned() };
        return Decision::new(Goal::Hold, reason, now);
    }
    let found = Decision::new(Goal::Primary, Reason::Founding {}, now);
    if founder.is_none() {
        return found.act(Action::Propose(Proposal::Found { node: seen.me.clone() }));
    }
    let Some(_) = record.system else {
        return match &seen.local.postgres {
            Postgres::Absent => found.act(Action::InitDb),
            Postgres::Stopped(copy) => match copy.system {
                Some(system) if !seen.local.durable.rebuilding => {
                    let needed = u32::try_from(seen.spec.durability.needed()).unwrap_or(u32::MAX);
                    found.act(Action::Propose(Proposal::Founded { node: seen.me.clone(), system, needed }))
                }
                // A half-made directory of our own: initdb again, which clears it.
                _ => found.act(Action::InitDb),
            },
            _ => Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now),
        };
    };
    let member = record.member(seen.me);
    if seen.local.durable.member != member {
        return found.acts(member.map(|member| Action::BecomeMember { member, rebuild: false }));
    }
    Decision::new(Goal::Primary, Reason::OpeningFirstElection {}, now).act(Action::Propose(Proposal::Open {
        term: record.term,
        cause: Cause::Bootstrap,
        by: seen.me.clone(),
        released: false,
        poisoned: false,
    }))
}
