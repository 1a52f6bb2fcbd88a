//! An incarnation is one copy: made from scratch under a number that was used before, it would pass for the copy
//! that a rule or a vote once spoke of.

use crate::world::World;

/// This node has a complete copy that it did not have before.
pub fn made(world: &mut World, node: usize) {
    let Some(member) = world.member(node).cloned() else { return };
    if !world.oracle.copies.insert(member.clone()) {
        world.violate("an incarnation is one copy", format!("{member} is made a second time"));
    }
}
