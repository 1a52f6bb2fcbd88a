//! No copy is rewritten that somebody may still need: no rule counts it, and enough others hold everything.
//!
//! "Enough" is `needed` + 1, or everyone else where there are not so many; nodes that are lost (no copy, silent
//! for long, a disk that hangs or is damaged, stopped by an operator) are losses that the promise has already paid
//! for.

use crate::world::{SECOND, World};

/// A node that has not streamed for this long counts as lost: a little less than core's own patience.
const LOST_AFTER: u64 = 9 * SECOND;

/// Who counts follows from the specification, and a change of that takes a moment to reach everybody.
const SETTLED_AFTER: u64 = 3 * SECOND;

fn counts(world: &World, node: usize) -> bool {
    world.first_spec.node(&world.nodes[node].name).is_some_and(|node| node.voter_candidate())
}

pub fn begins(world: &mut World, node: usize) {
    let Some(member) = world.member(node).cloned() else { return };
    let record = std::rc::Rc::clone(&world.store.record);
    let Some(rules) = &record.rules else { return };
    if rules.involve(&member) {
        let detail = format!("{} rewrites its copy, which {} still counts", member.node, rules.current);
        world.violate("no needed copy is destroyed", detail);
        return;
    }
    let Some(protected) = world.oracle.protected else { return };
    // Nor can anybody know of a disk that was lost a moment ago.
    let unsettled = Some(world.spec_changed_at).max(world.oracle.beyond_promise_at);
    if unsettled.is_some_and(|at| world.now.saturating_sub(at) < SETTLED_AFTER) {
        return;
    }
    let holds = |node: usize| world.wal.holds(world.nodes[node].postgres.durable_end(), protected);
    // A copy that a person promoted was lost when that was done: what it holds counts up to there only, and
    // the others cannot know how far that is.
    let end = world.wal.settle(world.nodes[node].postgres.end());
    let stray = world.wal.number(end).0 > 1 && world.wal.hand(end.hand).term.is_none();
    if !holds(node) || stray {
        return;
    }
    let data: Vec<usize> =
        (0..world.nodes.len()).filter(|other| *other != node && counts(world, *other)).collect();
    // The repository is a copy like any other, where it counts.
    let votes = record.repository().is_some_and(|member| rules.current.members.contains(&member));
    let in_repository = votes && world.repository.holds(&world.wal, protected);
    let present = data.iter().filter(|other| world.is_in_spec(**other)).count() + usize::from(in_repository);
    let holders = usize::from(in_repository)
        + data.iter().filter(|other| world.member(**other).is_some() && holds(**other)).count();
    let lost = data
        .iter()
        .filter(|other| {
            let there = &world.nodes[**other];
            let silent = world.now.saturating_sub(there.streamed_at) > LOST_AFTER;
            let away = silent || there.slow.wal_hangs || there.damage.is_some() || there.stopping;
            world.member(**other).is_none() || (away && !holds(**other))
        })
        .count();
    // More copies are promised once a rule that asks for them is proven, fewer as soon as one is proposed.
    let promised = rules.current.needed.min(rules.target().needed);
    let needed = (promised as usize + 1).min(present).saturating_sub(lost).max(1);
    if holders < needed {
        let detail = format!(
            "{} rewrites its copy while {holders} others hold {}, and {needed} must; {}",
            member.node,
            world.point_text(protected),
            world.ends_text()
        );
        world.violate("no needed copy is destroyed", detail);
    }
}
