//! Nobody who speaks is called silent: an agent that calls the holder's silent was not spoken to by it for so long,
//! whatever it had time to listen to itself.

use std::time::Duration;

use pgherd_core::ha::suspicion::NAP;
use pgherd_core::record::Cause;

use crate::world::{MS, Time, World, micros};

/// So many reports are remembered; they reach further back than any silence that is asked for.
const REMEMBERED: usize = 64;

/// A report of `from` is on its way to `to`, and will come there.
pub fn spoke(world: &mut World, from: usize, to: usize) {
    let reports = world.oracle.spoke.entry((from, to)).or_default();
    if reports.len() == REMEMBERED {
        reports.pop_front();
    }
    reports.push_back(world.now);
}

/// `node` is about to close the term of `holder` for its silence.
pub fn claimed(world: &mut World, node: usize, holder: usize, cause: Cause) {
    let claimed: Duration = match cause {
        Cause::AgentSilent => world.times.agent_grace,
        Cause::Unreachable => world.times.suspect,
        _ => return,
    };
    // What was said a moment ago may be on its way, or unread after a nap.
    let unheard: Time = world.network.delay + micros(NAP) + 10 * MS;
    let from = world.now.saturating_sub(world.nodes[node].clock.true_span(claimed)) + MS;
    let until = world.now.saturating_sub(unheard);
    let reports = world.oracle.spoke.get(&(holder, node));
    let Some(said) = reports.into_iter().flatten().find(|at| (from..until).contains(*at)) else { return };
    let (name, silent) = (world.nodes[node].name.clone(), world.nodes[holder].name.clone());
    let detail = format!(
        "{name} calls {silent} silent ({cause:?}), which spoke to it {} ms ago",
        (world.now - said) / MS
    );
    world.violate("nobody who speaks is called silent", detail);
}
