//! A planned change of primary: everything is made ready while clients still work, then the proxies let their
//! transactions end and hold what is new, and the old primary stops, which sends the standbys its last WAL, and the
//! election finds them equal.
//!
//! A drain is not a promise that anything waits for: who connects without a proxy is not asked, and a proxy that does not
//! answer is waited for no longer than [`DRAIN_WITHIN`].

use std::time::Duration;

use crate::action::Action;
use crate::ha::primary::release;
use crate::ha::{Decision, Goal, Memory};
use crate::observation::{Observation, Primary};
use crate::reason::Reason;
use crate::record::{Cause, Record, Reign};
use crate::types::{Instant, NodeName};

/// A candidate further behind than this would make clients wait for its catching up.
pub const MAX_LAG_BYTES: u64 = 16 * 1024 * 1024;

/// Transactions of proxies' clients that run for longer are ended.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(5);

/// What a switchover needs next.
#[derive(Clone, Debug)]
pub enum Step {
    /// Why it cannot begin; the reign goes on.
    Wait(Reason),
    /// The reign goes on, and the proxies begin nothing in it. For so long at most.
    Drain {
        reason: Reason,
        left: Duration,
    },
    HandOver(Decision),
}

/// `None`: no switchover is asked for.
pub fn decide(
    memory: &mut Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    primary: &Primary,
) -> Option<Step> {
    let order = record.switchover.as_ref().filter(|order| order.term == record.term)?;
    let to = || order.to.clone();
    let mut decision = Decision::new(Goal::Primary, Reason::SwitchingOver { to: to() }, now);
    if let Err(why) = ready(seen, record, reign, primary, order.to.as_ref()) {
        return Some(Step::Wait(Reason::SwitchoverWaits { to: to(), why }));
    }
    if seen.local.checkpointed_for != Some(record.term) {
        // While clients still work; else the shutdown checkpoint would write it all while they wait.
        return Some(Step::HandOver(decision.act(Action::Checkpoint { term: record.term })));
    }
    let since = *memory.draining_since.get_or_insert(now);
    let left = DRAIN_WITHIN.saturating_sub(now.since(since));
    if seen.local.drained_for != Some(record.term) && !left.is_zero() {
        return Some(Step::Drain { reason: Reason::Draining { to: to() }, left });
    }
    // Until the gate is closed.
    decision.duties.drain = true;
    Some(Step::HandOver(
        decision
            .act(Action::SetGate { term: record.term, open: false })
            .act(Action::StopCleanly)
            .act(release(seen, record.term, Cause::Switchover, false)),
    ))
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
