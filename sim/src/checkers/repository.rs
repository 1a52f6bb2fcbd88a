//! What the repository is said to have can be had of it: what its owner tells as flushed, and what its vote says.

use pgherd_core::record::Vote;
use pgherd_core::types::Timeline;

use crate::wal::{self, HandId, Point};
use crate::world::World;

/// A piece of this hand is there from now on, under the number of its timeline. If that number is the cluster's, it has to be its own.
pub fn put(world: &mut World, hand: HandId) {
    let wrote = world.wal.hand(hand);
    let (number, term) = (wrote.number, wrote.term);
    let reserved = world.store.record.line(number).map(|line| line.term);
    if number > Timeline(1) && reserved.is_some() && term != reserved {
        let detail = format!("WAL of timeline {number} is in the repository that nobody's term has written");
        world.violate("a timeline number means one thing", detail);
    }
}

/// Its owner tells that everything up to here is flushed.
pub fn told(world: &mut World, point: Point) {
    if !world.repository.holds(&world.wal, point) {
        let detail = format!("it is told as flushed up to {}, and has a hole", world.point_text(point));
        world.violate("the repository has what its owner tells", detail);
    }
}

/// It votes.
pub fn voted(world: &mut World, vote: &Vote) {
    let line = world.store.record.line(vote.timeline);
    let Some(hand) = line.and_then(|line| world.agreed_hand(&world.store.record, line.timeline)) else {
        return;
    };
    let point = Point { hand, at: wal::at(vote.position.lsn) };
    if !world.repository.holds(&world.wal, point) {
        let detail = format!("it votes with {}, and has a hole before", vote.position);
        world.violate("the repository has what its vote says", detail);
    }
}
