//! A commit that a client saw acknowledged is in every later primary that lets clients in, and nothing is
//! acknowledged that the newest primary lacks.
//!
//! All acknowledged commits lie on one line of history: each new one extends it. Two that lie on different
//! branches cannot both survive, so the second one is the violation.

use crate::checkers::{one_acknowledger, overlap};
use crate::wal::Point;
use crate::world::World;

pub fn acknowledged(world: &mut World, node: usize, point: Point, strict: bool) {
    if !world.counts(point.hand) {
        return;
    }
    one_acknowledger::acknowledged(world, node, point);
    if strict {
        protect(world, node, point, "acknowledged");
        newest_has_it(world, node, point);
    }
}

/// From here on, everything up to `point` must survive.
pub fn protect(world: &mut World, node: usize, point: Point, how: &str) {
    let point = world.wal.settle(point);
    let Some(before) = world.oracle.protected else {
        world.oracle.protected = Some(point);
        overlap::check(world);
        return;
    };
    if world.wal.holds(before, point) {
        return;
    }
    if !world.wal.holds(point, before) {
        let detail = format!(
            "{} {how} {}, and lacks {}, which had been acknowledged or read",
            world.nodes[node].name,
            world.point_text(point),
            world.point_text(before)
        );
        world.violate("acknowledged commits survive", detail);
        return;
    }
    world.oracle.protected = Some(point);
    overlap::check(world);
}

fn newest_has_it(world: &mut World, node: usize, point: Point) {
    let own = world.wal.hand(point.hand).term;
    let lacking = (0..world.nodes.len()).find(|other| {
        let server = &world.nodes[*other].postgres;
        *other != node
            && world.lets_clients_in(*other)
            && world.wal.hand(server.hand).term > own
            && !world.wal.holds(server.end(), point)
    });
    if let Some(other) = lacking {
        let detail = format!(
            "{} acknowledged {}, which {} lacks, a primary of a later term",
            world.nodes[node].name,
            world.point_text(point),
            world.nodes[other].name
        );
        world.violate("nothing is acknowledged that the newest primary lacks", detail);
    }
}
