//! A gate opens only on a primary that has everything acknowledged, and only when nobody can use an older one.

use crate::checkers::{leases, reads};
use crate::world::World;

pub fn opened(world: &mut World, node: usize) {
    let server = &world.nodes[node].postgres;
    let (end, hand) = (server.end(), server.hand);
    if !world.counts(hand) {
        return;
    }
    if let Some(protected) = world.oracle.protected
        && !world.wal.holds(end, protected)
        // An old primary may open late, behind a newer one; nothing can be acknowledged there any more.
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
    leases::gate_opened(world, node);
}

/// Is there an open gate of a later term?
pub fn superseded(world: &World, node: usize) -> bool {
    let own = world.wal.hand(world.nodes[node].postgres.hand).term;
    (0..world.nodes.len()).any(|other| {
        other != node
            && world.nodes[other].postgres.gate_open
            && world.nodes[other].postgres.is_primary()
            && world.wal.hand(world.nodes[other].postgres.hand).term > own
    })
}
