//! Rights to read never overlap in true time: while a right that an older primary gave out still lasts and
//! that primary can still be read, no later gate is open. And a primary whose agent is well is gone by then.

use pgherd_core::types::Instant;

use crate::world::{MS, SECOND, World, micros};

const INVARIANT: &str = "rights to read do not overlap";

/// `node` hands out tables (and lets itself be read) on a proof of `proven`, until the end of its lease.
pub fn right_given(world: &mut World, node: usize, proven: Instant, now: Instant) {
    let ends = proven + world.times.lease;
    let left = world.nodes[node].clock.true_span(ends.since(now));
    if ends.since(now).is_zero() {
        return;
    }
    let until = world.now + left;
    world.nodes[node].right_until = world.nodes[node].right_until.max(until);
    let hand = world.nodes[node].postgres.hand;
    if !world.lets_clients_in(node) || !world.counts(hand) {
        return;
    }
    let own = world.wal.hand(hand).term;
    let newer = (0..world.nodes.len()).find(|other| {
        *other != node
            && world.lets_clients_in(*other)
            && world.wal.hand(world.nodes[*other].postgres.hand).term > own
    });
    if let Some(newer) = newer {
        let detail = format!(
            "{} gives out a right to read while the gate of {}, of a later term, is open",
            world.nodes[node].name, world.nodes[newer].name
        );
        world.violate(INVARIANT, detail);
    }
}

pub fn gate_opened(world: &mut World, node: usize) {
    let own = world.wal.hand(world.nodes[node].postgres.hand).term;
    for other in 0..world.nodes.len() {
        let server = &world.nodes[other].postgres;
        let older = other != node
            && server.is_primary()
            && server.gate_open
            && world.nodes[other].host_up
            && world.wal.hand(server.hand).term < own
            && world.counts(server.hand);
        if !older {
            continue;
        }
        let (name, old) = (world.nodes[node].name.clone(), world.nodes[other].name.clone());
        let left = world.nodes[other].right_until.saturating_sub(world.now);
        if left > 0 {
            let detail =
                format!("{name} opens its gate {} ms before the rights that {old} gave out end", left / MS);
            world.violate(INVARIANT, detail);
        } else if steady(world, other) {
            let detail = format!("{name} opens its gate while {old}, whose agent is well, still serves");
            world.violate("a primary without a proof is stopped in time", detail);
        }
    }
}

/// Has this node's agent run without a pause, beside a server that leads, for so long that it must have stopped it?
fn steady(world: &World, node: usize) -> bool {
    let there = &world.nodes[node];
    let lease = micros(world.times.lease);
    let long = lease + lease / 20 + SECOND;
    there.agent.up
        && there.agent.frozen_until <= world.now
        && there.frozen_until <= world.now
        && world.now.saturating_sub(there.agent.steady_since.max(there.postgres.leads_since)) > long
}
