//! After everything has been healed, the cluster comes back by itself: one primary with an open gate, every
//! node of the specification streaming from where it should, the full rule in force, and commits acknowledged.

use std::collections::BTreeSet;

use pgherd_core::types::{Member, NodeName};

use crate::postgres::State;
use crate::world::{Event, MS, SECOND, World};

/// From the end of the last fault until all is well.
pub const BOUND: u64 = 90 * SECOND;
/// A run with fewer commits says little.
const COMMITS_AT_LEAST: u64 = 50;
/// It must stay well for this long.
const STEADY: u64 = SECOND;
const EVERY: u64 = 200 * MS;

impl World {
    pub fn check_convergence(&mut self) {
        let Some(healed_at) = self.healed_at else { return };
        if let Some(lack) = lacks(self) {
            self.oracle.well_since = None;
            if self.now > healed_at + BOUND {
                let detail = format!("{} s after the last fault: {lack}", BOUND / SECOND);
                self.violate("the cluster heals by itself", detail);
                return;
            }
        } else {
            let since = *self.oracle.well_since.get_or_insert(self.now);
            if self.now - since >= STEADY {
                self.oracle.converged_at = Some(since);
                return;
            }
        }
        self.after(EVERY, Event::Check);
    }
}

/// A standby sees to the repository, where there is one.
fn archive_lacks(world: &World, holder: usize) -> Option<String> {
    world.spec.backup.as_ref()?;
    let Some(archive) = &world.store.record.archive else {
        return Some("nobody owns the archive".to_owned());
    };
    let others = (0..world.nodes.len()).any(|node| node != holder && world.is_in_spec(node));
    if others && archive.owner == world.nodes[holder].name {
        return Some(format!("{} owns the archive beside being the primary", archive.owner));
    }
    archive.backup.as_ref().map(|backup| format!("base backup {} has no end", backup.number))
}

/// What is not yet as it should be.
pub fn lacks(world: &World) -> Option<String> {
    let record = &world.store.record;
    let Some(reign) = record.open_reign() else { return Some("no term is open".to_owned()) };
    let holder = world.index(&reign.holder.node)?;
    let primary = &world.nodes[holder].postgres;
    if !reign.gate_opened || primary.state != State::Primary || !primary.gate_open {
        return Some(format!("the gate of {} is closed", reign.holder));
    }
    let Some(rules) = &record.rules else { return Some("there is no rule".to_owned()) };
    if rules.next.is_some() {
        return Some("a change of the rule is pending".to_owned());
    }
    let votes = world.spec.backup.as_ref().is_some_and(|backup| backup.voter);
    if votes && record.repository().is_none() {
        return Some("the repository is no member".to_owned());
    }
    let expected = expected_members(world, &reign.holder.node);
    let needed = u32::try_from(world.spec.durability.needed()).unwrap_or(u32::MAX);
    if rules.current.members != expected || rules.current.needed != needed {
        return Some(format!("the rule is {}", rules.current));
    }
    if let Some(protected) = world.oracle.protected
        && !world.wal.holds(primary.end(), protected)
    {
        return Some(format!("{} lacks {}", reign.holder, world.point_text(protected)));
    }
    for node in (0..world.nodes.len()).filter(|node| *node != holder && world.is_in_spec(*node)) {
        let server = &world.nodes[node].postgres;
        let name = &world.nodes[node].name;
        if server.state != State::Standby || server.receiver.is_none() {
            return Some(format!("{name} does not stream"));
        }
        if world.member(node) != record.member(name).as_ref() {
            return Some(format!("{name} is another copy than the one that counts"));
        }
        let behind = world.oracle.protected.is_some_and(|point| !world.wal.holds(server.end(), point));
        if behind {
            return Some(format!("{name} lacks what was acknowledged"));
        }
    }
    if let Some(lack) = archive_lacks(world, holder) {
        return Some(lack);
    }
    if world.clients.attempts < COMMITS_AT_LEAST {
        return Some("clients have hardly been there".to_owned());
    }
    match world.oracle.final_commit {
        Some(before) if world.clients.acknowledged <= before => Some("nothing is acknowledged".to_owned()),
        _ => None,
    }
}

/// The holder, and everyone who may count and streams from it directly.
fn expected_members(world: &World, holder: &NodeName) -> BTreeSet<Member> {
    let spec = &world.spec;
    let counts = |node: &&pgherd_core::spec::NodeSpec| {
        node.name == *holder || (node.voter_candidate() && spec.upstream(node, holder) == holder)
    };
    let names = spec.nodes.iter().filter(counts).filter_map(|node| world.store.record.member(&node.name));
    let votes = spec.backup.as_ref().is_some_and(|backup| backup.voter);
    names.chain(world.store.record.repository().filter(|_| votes)).collect()
}
