//! Whoever could win an election now, there is a holder of everything acknowledged among those who elect, and it
//! could say so: the rules overlap at each step.

use pgherd_core::ha::election;
use pgherd_core::invariants;
use pgherd_core::record::{Position, Record};
use pgherd_core::types::Member;

use crate::wal;
use crate::world::World;

pub fn check(world: &mut World) {
    let Some(protected) = world.oracle.protected else { return };
    let record = std::rc::Rc::clone(&world.store.record);
    let Some(rules) = &record.rules else { return };
    let forced = record.election.as_ref().is_some_and(|election| election.forced.is_some());
    if forced || rules.in_force().all(|rule| rule.needed == 0 && rule.members.len() > 1) {
        return;
    }
    let able = |member: &Member| {
        if member.node.is_repository() {
            return record.repository().as_ref() == Some(member);
        }
        world.index(&member.node).is_some_and(|node| world.member(node) == Some(member))
    };
    let holds = |member: &Member| {
        if member.node.is_repository() {
            return world.repository.holds(&world.wal, protected)
                && repository_could_say(world, &record, member);
        }
        world.index(&member.node).is_some_and(|node| {
            world.wal.holds(world.nodes[node].postgres.durable_end(), protected)
                && could_say(world, &record, node)
        })
    };
    if !invariants::every_election_meets(rules, record.holder(), able, holds) {
        let next = rules.next.as_ref().map(|next| format!(" and {next}")).unwrap_or_default();
        let detail = format!(
            "an election under {}{next} could be won without {}; {}",
            rules.current,
            world.point_text(protected),
            world.ends_text()
        );
        world.violate("every election meets a holder of what was acknowledged", detail);
    }
}

/// Would the repository's vote count it?
fn repository_could_say(world: &World, record: &Record, member: &Member) -> bool {
    let Some(protected) = world.oracle.protected else { return true };
    let protected = world.wal.settle(protected);
    let adopted = world.repository.adopted(member.incarnation);
    let line = record.line(world.wal.number(protected));
    // Most of the time it is on this timeline, and nothing has to be looked for.
    let plainly = line.is_some_and(|line| adopted.get(&line.timeline) == Some(&line.term));
    let term = world.wal.hand(protected.hand).term.unwrap_or_default();
    let least = Position { term, lsn: wal::lsn(protected.at) };
    plainly || world.repository.position(&world.wal, record, &adopted) >= least
}

/// Would the vote of this copy count what was acknowledged? It does not if the copy came onto the timeline in a
/// way that its node has not noted.
fn could_say(world: &World, record: &Record, node: usize) -> bool {
    let Some(protected) = world.oracle.protected else { return true };
    let end = world.wal.settle(world.nodes[node].postgres.durable_end());
    let (timeline, begins) = (world.wal.number(end), world.wal.begins(end.hand));
    let adopted = &world.durable(node).adopted;
    let (position, _) = election::position(record, adopted, timeline, wal::lsn(end.at), &begins);
    let term = world.wal.hand(protected.hand).term.unwrap_or_default();
    position >= Position { term, lsn: wal::lsn(protected.at) }
}
