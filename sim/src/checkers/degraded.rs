//! Commits go on without any standby only after the store has said so.

use crate::world::World;

pub fn acknowledged_alone(world: &mut World, node: usize) {
    let hand = world.nodes[node].postgres.hand;
    let line = world.wal.hand(hand).number;
    if !world.oracle.declared_lines.contains(&line) && world.counts(hand) {
        let detail = format!(
            "{} acknowledged on timeline {line} without a standby, and no rule allowed it",
            world.nodes[node].name
        );
        world.violate("degraded is declared", detail);
    }
}
