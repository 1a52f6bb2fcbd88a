//! A gate opens only on a primary that has everything acknowledged, and only when nobody can use an older one.

use crate::checkers::{addresses, leases, reads};
use crate::world::World;

pub fn opened(world: &mut World, node: usize) {
    let server = &world.nodes[node].postgres;
    let (end, hand) = (server.end(), server.hand);
    if !world.counts(hand) {
        return;
    }
    if let Some(protected) = world.oracle.protected
        && !world.wal.holds(end, protected)
        // An old primary may open late, behind a newer one, if its agent was frozen just then; nothing can be
        // acknowledged there any more, and nobody is told to read there.
        && !superseded(world, node)
    {
        let detail = format!(
            "{} lets clients in at {}, and lacks {}",
            world.nodes[node].name,
            world.point_text(end),
            world.point_text(protected)
        );
        world.violate("acknowledged commits survive", detail);
        return;
    }
    // What the first client can see is a promise from now on.
    if !superseded(world, node) {
        reads::read(world, node);
    }
    world.oracle.gate_of = world.oracle.gate_of.max(world.wal.hand(hand).term);
    leases::gate_opened(world, node);
    addresses::gate_opened(world, node);
}

/// Was the gate of a later term opened?
pub fn superseded(world: &World, node: usize) -> bool {
    world.oracle.gate_of > world.wal.hand(world.nodes[node].postgres.hand).term
}
