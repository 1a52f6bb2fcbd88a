//! The term that a node has adopted never falls while its disk lives, and while a promotion for an older one is
//! pending the node takes no part in a newer one: it would count there, and then lead the older one.

use pgherd_core::types::Term;

use crate::postgres::State;
use crate::world::World;

pub fn adopted(world: &mut World, node: usize, before: Term) {
    let now = world.durable(node).term;
    if now < before {
        let detail = format!("{} went from term {before} back to {now}", world.nodes[node].name);
        world.violate("adopted terms only grow", detail);
    }
}

/// This node has followed or voted.
pub fn took_part(world: &mut World, node: usize) {
    let server = &world.nodes[node].postgres;
    if server.state == State::Promoting && server.promoted_by_agent {
        let detail = format!(
            "{} takes part in term {} while a promotion for an older one is pending",
            world.nodes[node].name,
            world.durable(node).term
        );
        world.violate("a pending promotion is withdrawn first", detail);
    }
}
