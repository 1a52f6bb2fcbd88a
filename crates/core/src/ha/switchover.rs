//! A planned change of primary: everything is made ready while clients still work, then the old primary
//! stops, which sends the standbys its last WAL, and the election finds them equal.

use crate::action::Action;
use crate::ha::primary::release;
use crate::ha::{Decision, Goal};
use crate::observation::{Observation, Primary};
use crate::reason::Reason;
use crate::record::{Cause, Record, Reign};
use crate::types::{Instant, NodeName};

/// A candidate further behind than this would make clients wait for its catching up.
pub const MAX_LAG_BYTES: u64 = 16 * 1024 * 1024;

/// The next step of the hand-over, or why it must wait; the reign goes on meanwhile. `None`: not asked for.
pub fn decide(
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    primary: &Primary,
) -> Option<Result<Decision, Reason>> {
    let order = record.switchover.as_ref().filter(|order| order.term == record.term)?;
    let decision = Decision::new(Goal::Primary, Reason::SwitchingOver { to: order.to.clone() }, now);
    if let Err(why) = ready(seen, record, reign, primary, order.to.as_ref()) {
        return Some(Err(Reason::SwitchoverWaits { to: order.to.clone(), why }));
    }
    if seen.local.checkpointed_for != Some(record.term) {
        // While clients still work; else the shutdown checkpoint would write it all while they wait.
        return Some(Ok(decision.act(Action::Checkpoint { term: record.term })));
    }
    Some(Ok(decision
        .act(Action::SetGate { term: record.term, open: false })
        .act(Action::StopCleanly)
        .act(release(seen, record.term, Cause::Switchover, false))))
}

fn ready(
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    primary: &Primary,
    to: Option<&NodeName>,
) -> Result<(), &'static str> {
    let rules = record.rules.as_ref().ok_or("there is no durability rule yet")?;
    if rules.next.is_some() {
        return Err("the durability rule is being changed");
    }
    if !reign.gate_opened {
        return Err("the gate of this term has not opened yet");
    }
    let suits = |node: &NodeName| {
        let electable = seen.spec.node(node).is_some_and(|node| node.electable());
        let barred = record.nodes.get(node).is_some_and(|node| node.barred.is_some());
        electable && !barred && rules.current.contains_node(node)
    };
    let near = |node: &NodeName| {
        primary.senders.iter().any(|sender| {
            sender.genuine
                && sender.streaming
                && sender.member.as_ref().is_some_and(|member| member.node == *node)
                && sender.flush_lsn.is_some_and(|flush| primary.flush_lsn.bytes_since(flush) <= MAX_LAG_BYTES)
        })
    };
    match to {
        Some(node) if *node == reign.holder.node => Err("it is the primary already"),
        Some(node) if !suits(node) => Err("it is not a voter that may lead"),
        Some(node) if !near(node) => Err("it does not stream, or is too far behind"),
        None if !rules
            .current
            .voters(&reign.holder.node)
            .any(|voter| suits(&voter.node) && near(&voter.node)) =>
        {
            Err("no voter that may lead streams closely enough")
        }
        _ => Ok(()),
    }
}
