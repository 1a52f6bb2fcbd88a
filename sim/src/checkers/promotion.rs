//! A winner was chosen from enough members that were really sealed, and has everything acknowledged.

use pgherd_core::record::{Election, Record, Standing, Vote};

use crate::postgres::State;
use crate::wal::{self, Point};
use crate::world::World;

pub fn decided(world: &mut World, before: &Record, election: &Election, after: &Record) {
    let Some(reign) = &after.reign else { return };
    let same_reign = before.reign.as_ref().is_some_and(|old| old.timeline == reign.timeline);
    if same_reign {
        return;
    }
    let Some(winner) = world.index(&reign.holder.node) else { return };
    let end = world.nodes[winner].postgres.durable_end();
    let lossy = before
        .rules
        .as_ref()
        .is_some_and(|rules| rules.in_force().all(|rule| rule.needed == 0 && rule.members.len() > 1));
    if election.forced.is_some() || lossy {
        if election.forced.is_some() {
            world.oracle.forced = Some(after.term);
            world.coverage.forced += 1;
        }
        // What its vote does not count is given up, too, even if it is there: who was taken along onto a timeline
        // that it had not adopted cannot say so.
        let says = election.votes.get(&reign.holder.node).map(|vote| wal::at(vote.position.lsn));
        accept_loss(world, world.wal.place(end.hand, says.map_or(end.at, |says| end.at.min(says))));
        return;
    }
    enough_are_sealed(world, before, election);
    // A winner whose disk is gone leads nowhere: it gives the term back, and those who hold the rest elect.
    if let Some(protected) = world.oracle.protected
        && world.member(winner) == Some(&reign.holder)
        && !world.wal.holds(end, protected)
    {
        let detail = format!(
            "{} wins term {} at {}, and lacks {}",
            world.nodes[winner].name,
            after.term,
            world.point_text(end),
            world.point_text(protected)
        );
        world.violate("the winner has everything acknowledged", detail);
    }
}

/// Loss that was declared beforehand: it is counted, and what is left is the promise.
fn accept_loss(world: &mut World, winner: Point) {
    let Some(protected) = world.oracle.protected else { return };
    let kept = world.wal.common(winner, protected);
    world.oracle.accepted_loss += protected.at.saturating_sub(kept.at);
    world.oracle.protected = Some(kept);
}

fn enough_are_sealed(world: &mut World, before: &Record, election: &Election) {
    let Some(rules) = &before.rules else { return };
    let is_sealed = |vote: &&Vote| {
        if vote.member.node.is_repository() {
            return world.repository.is_sealed(vote.member.incarnation, election.term);
        }
        let Some(node) = world.index(&vote.member.node) else { return false };
        let there = &world.nodes[node];
        let still_the_copy = world.member(node) == Some(&vote.member);
        let server = &there.postgres;
        // What a person promotes afterwards receives nothing of the old term either.
        let reigns = server.is_primary() && world.wal.hand(server.hand).term.is_some();
        let lets_go = server.receiver.is_none()
            && !reigns
            && !(server.state == State::Promoting && server.promoted_by_agent);
        !still_the_copy || (lets_go && there.agent.local.durable.sealed >= Some(election.term))
    };
    let sealed: Vec<&Vote> =
        election.votes.values().filter(|vote| vote.standing == Standing::Sealed).filter(is_sealed).collect();
    if sealed.iter().any(|vote| before.holder() == Some(&vote.member)) {
        // Without the holder nothing is acknowledged.
        return;
    }
    for rule in rules.in_force() {
        let sealed = sealed.iter().filter(|vote| rule.members.contains(&vote.member)).count();
        let needed = rule.seals_needed(before.holder());
        if sealed < needed {
            let detail =
                format!("term {} is decided with {sealed} of {needed} seals of {rule}", election.term);
            world.violate("a winner needs a sealed set", detail);
            return;
        }
    }
}
