//! Never do two nodes acknowledge commits in one term.

use crate::wal::Point;
use crate::world::World;

pub fn acknowledged(world: &mut World, node: usize, point: Point) {
    let term = world.wal.hand(point.hand).term.unwrap_or_default();
    let first = *world.oracle.acknowledgers.entry(term).or_insert(node);
    if first != node {
        let detail = format!(
            "{} and {} both acknowledged in term {term}",
            world.nodes[first].name, world.nodes[node].name
        );
        world.violate("one acknowledger per term", detail);
    }
}
