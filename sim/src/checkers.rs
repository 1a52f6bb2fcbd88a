//! What must hold after every step, one statement per file.
//!
//! A checker looks at the truth (the world's own books of who wrote what), never at what an agent believes.
//! The first violation ends the run.

use pgherd_core::invariants;
use pgherd_core::record::{Proposal, Record, Standing};
use pgherd_core::types::{Member, Term, Timeline};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::wal::Point;
use crate::world::{Time, World};

pub mod acknowledged;
pub mod addresses;
pub mod convergence;
pub mod degraded;
pub mod destruction;
pub mod gates;
pub mod incarnations;
pub mod leases;
pub mod one_acknowledger;
pub mod overlap;
pub mod promotion;
pub mod reads;
pub mod repository;
pub mod silence;
pub mod terms;
pub mod timelines;

#[derive(Clone, Debug)]
pub struct Violation {
    pub at: Time,
    pub invariant: &'static str,
    pub detail: String,
}

/// The books.
#[derive(Debug, Default)]
pub struct Oracle {
    pub violation: Option<Violation>,
    /// Everything up to here was acknowledged to, or read by, a client; it must never be lost.
    pub protected: Option<Point>,
    /// How often that was given up because nothing was promised any more.
    pub era: u32,
    /// Every copy that was ever made.
    pub copies: BTreeSet<Member>,
    /// When reports of one node were sent that came, or will come, to another.
    pub spoke: BTreeMap<(usize, usize), VecDeque<Time>>,
    /// From when until when the last long silence between two of them was.
    pub silences: BTreeMap<(usize, usize), (Time, Time)>,
    /// Who acknowledged on the timeline of which term.
    pub acknowledgers: BTreeMap<Term, usize>,
    /// Timelines in whose reign some rule had W = 0, and those where it counted others than the primary.
    pub declared_lines: BTreeSet<Timeline>,
    pub lossy_lines: BTreeSet<Timeline>,
    /// The newest term whose gate was opened.
    pub gate_of: Option<Term>,
    /// An operator accepted loss when this term was decided; what older reigns still do is theirs.
    pub forced: Option<Term>,
    /// A copy was lost that the promise does not cover.
    pub beyond_promise_at: Option<Time>,
    /// What operators and W = 0 have cost, in records.
    pub accepted_loss: u64,
    /// Since when the world has been as it should be.
    pub well_since: Option<Time>,
    pub converged_at: Option<Time>,
    pub final_commit: Option<u64>,
    /// No copy is left that could lead.
    pub nothing_left: bool,
}

impl World {
    pub fn violate(&mut self, invariant: &'static str, detail: String) {
        self.tell(None, |_| format!("VIOLATION of {invariant}: {detail}"));
        self.oracle.violation.get_or_insert(Violation { at: self.now, invariant, detail });
    }

    /// Is what this hand acknowledges still anybody's promise?
    pub fn counts(&self, hand: usize) -> bool {
        let term = self.wal.hand(hand).term.unwrap_or_default();
        self.oracle.forced.is_none_or(|forced| term >= forced)
    }
}

/// The record changed, by `proposal`.
pub fn record_changed(world: &mut World, by: usize, before: &Record, after: &Record, proposal: &Proposal) {
    // Broken builds break the form of the record too; they are to be caught by what comes of it.
    let form = invariants::record(after).and_then(|()| invariants::step(before, after));
    if let (Err(broken), None) = (form, world.breakage) {
        let name = world.nodes[by].name.clone();
        world.violate(
            "the record",
            format!("{broken}, after {name} proposed: {}", crate::story::proposal(proposal)),
        );
    }
    if let (Some(reign), Some(rules)) = (&after.reign, &after.rules) {
        if rules.in_force().any(|rule| rule.needed == 0) {
            world.oracle.declared_lines.insert(reign.timeline);
        }
        if rules.in_force().any(|rule| rule.needed == 0 && rule.members.len() > 1) {
            world.oracle.lossy_lines.insert(reign.timeline);
        }
    }
    if let Some(rules) = &after.rules
        && rules.in_force().all(|rule| rule.needed == 0 && rule.members.len() > 1)
    {
        // From here on nothing is promised, until commits wait again.
        world.oracle.protected = None;
        world.oracle.era += 1;
    }
    if let Proposal::Vote { vote, .. } = proposal
        && vote.standing == Standing::Sealed
    {
        if vote.member.node.is_repository() {
            repository::voted(world, vote);
        } else {
            timelines::voted(world, vote);
        }
    }
    if let Some(election) = before.election_ended_by(proposal, after) {
        promotion::decided(world, before, &election, after);
    }
    overlap::check(world);
}
