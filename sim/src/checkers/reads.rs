//! What a client read through a gate is never lost later, unless a rule with W = 0 said that it may be.

use crate::checkers::acknowledged;
use crate::wal::Point;
use crate::world::World;

/// A client reads everything that is visible on this primary.
pub fn read(world: &mut World, node: usize) {
    let server = &world.nodes[node].postgres;
    let point = Point { hand: server.hand, at: server.visible };
    let line = world.wal.hand(point.hand).number;
    // Whom a person lets lead shows what it has, as any standby does, whether or not the others have it.
    if world.wal.hand(point.hand).term.is_none() {
        return;
    }
    if world.oracle.lossy_lines.contains(&line) || !world.counts(point.hand) {
        return;
    }
    acknowledged::protect(world, node, point, "showed a client");
}
