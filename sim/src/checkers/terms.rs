//! The term that a node has adopted never falls while its disk lives.

use pgherd_core::types::Term;

use crate::world::World;

pub fn adopted(world: &mut World, node: usize, before: Term) {
    let now = world.durable(node).term;
    if now < before {
        let detail = format!("{} went from term {before} back to {now}", world.nodes[node].name);
        world.violate("adopted terms only grow", detail);
    }
}
