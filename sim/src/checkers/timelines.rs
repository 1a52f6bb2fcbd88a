//! A timeline number never means two things among copies that count.

use pgherd_core::record::Vote;
use pgherd_core::types::Timeline;

use crate::checkers::terms;
use crate::world::World;

const INVARIANT: &str = "a timeline number means one thing";

/// PostgreSQL let a standby stream from an upstream because their numbers agree, and they are not the same
/// history: the copy would hold what nobody wrote.
pub fn two_meanings(world: &mut World, standby: usize, upstream: usize) {
    let detail = format!(
        "{} at {} streams from {} at {}: the numbers agree, the histories do not",
        world.nodes[standby].name,
        world.end_text(standby),
        world.nodes[upstream].name,
        world.end_text(upstream)
    );
    world.violate(INVARIANT, detail);
}

/// A vote counts WAL under a term that did not write it.
pub fn voted(world: &mut World, vote: &Vote) {
    let Some(node) = world.index(&vote.member.node) else { return };
    terms::took_part(world, node);
    let end = world.wal.settle(world.nodes[node].postgres.end());
    let wrote = world.wal.hand(end.hand);
    let counted = world.store.record.line(wrote.number).is_some_and(|line| line.term == vote.position.term);
    if wrote.number > Timeline(1) && counted && wrote.term != Some(vote.position.term) {
        let detail = format!(
            "{} votes with {}, which was not written in that term",
            world.nodes[node].name, vote.position
        );
        world.violate(INVARIANT, detail);
    }
}
