//! Nobody who speaks is called silent: an agent that calls the holder's silent was not spoken to by it for so long,
//! whatever it had time to listen to itself. Nor is who is about to speak: the line of the one that judges was cut,
//! others are heard again over it, and the holder has had no turn yet.

use std::time::Duration;

use pgherd_core::ha::suspicion::NAP;
use pgherd_core::record::Cause;

use crate::agent::REPORT_EVERY;
use crate::world::{Layer, MS, SECOND, Time, World, micros};

/// So many reports are remembered; they reach further back than any silence that is asked for.
const REMEMBERED: usize = 64;
/// No report is so late on a slow network, and no agent takes less for a silence.
const LONG: Time = 3 * SECOND;

/// A report of `from` is on its way to `to`, and will come there.
pub fn spoke(world: &mut World, from: usize, to: usize) {
    let reports = world.oracle.spoke.entry((from, to)).or_default();
    if reports.len() == REMEMBERED {
        reports.pop_front();
    }
    let before = reports.back().copied().unwrap_or_default();
    reports.push_back(world.now);
    if world.now - before > LONG {
        world.oracle.silences.insert((from, to), (before, world.now));
    }
}

/// `node` is about to close the term of `holder` for its silence.
pub fn claimed(world: &mut World, node: usize, holder: usize, cause: Cause) {
    let claimed: Duration = match cause {
        Cause::AgentSilent => world.times.agent_grace,
        Cause::Unreachable => world.times.suspect,
        _ => return,
    };
    about_to_speak(world, node, holder, cause);
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

fn about_to_speak(world: &mut World, node: usize, holder: usize, cause: Cause) {
    let there = &world.nodes[holder];
    let stands_still = there.frozen_until.max(there.agent.frozen_until) > world.now;
    let speaks =
        world.agent_runs(holder) && !stands_still && world.network.passes(Layer::Agents, holder, node);
    if !speaks || world.network.loss_percent > 0 {
        return;
    }
    let said =
        |from: usize| world.oracle.spoke.get(&(from, node)).and_then(|reports| reports.back().copied());
    let silent_from = said(holder).unwrap_or_default();
    let turn = REPORT_EVERY.1 + world.network.delay;
    let heard_again = (0..world.nodes.len()).filter(|other| *other != holder).find(|other| {
        let silence = world.oracle.silences.get(&(*other, node));
        silence
            .is_some_and(|(from, until)| world.now - until < turn && from.abs_diff(silent_from) < SECOND / 2)
    });
    let Some(other) = heard_again else { return };
    let name = |index: usize| world.nodes[index].name.clone();
    let detail = format!(
        "{} calls {} silent ({cause:?}) as soon as its own line is back, over which it hears {}",
        name(node),
        name(holder),
        name(other)
    );
    world.violate("nobody who is about to speak is called silent", detail);
}
