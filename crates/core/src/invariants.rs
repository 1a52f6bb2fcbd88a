//! The safety statements about the record and the rules, as functions.
//!
//! Nothing in the product calls them to decide. Tests and the simulator do, after every step, with the truth
//! that no agent has. They are written for being read: each says what must hold, not how it is kept.

use std::fmt;

use crate::record::{Record, Rules};
use crate::types::Member;

/// A statement that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken(pub &'static str);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Broken {}

fn must(holds: bool, statement: &'static str) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(Broken(statement)) }
}

/// What holds of every record that is ever stored.
pub fn record(record: &Record) -> Result<(), Broken> {
    let ascending = record.lines.windows(2).all(|pair| pair[0].timeline < pair[1].timeline);
    must(ascending, "timeline numbers ascend, and none is there twice")?;
    let terms = record.lines.windows(2).all(|pair| pair[0].term < pair[1].term);
    must(terms, "each timeline was reserved for a later term than the one before it")?;
    let rooted = record.lines.iter().all(|line| match line.parent {
        None => true,
        Some(parent) => parent < line.timeline && record.line(parent).is_some(),
    });
    must(rooted, "the timeline that another one left is known, and earlier")?;

    if let Some(member) = record.repository() {
        let admitted = record.archive.as_ref().is_some_and(|archive| archive.repository.is_some());
        must(admitted, "it is known which repository is a member")?;
        must(member.incarnation <= record.last_incarnation, "its incarnation was given by the record")?;
    }
    if let Some(reign) = &record.reign {
        must(!reign.holder.node.is_repository(), "the repository never leads")?;
        let line = record.line(reign.timeline);
        must(line.is_some_and(|line| line.term <= record.term), "a reign is on a reserved timeline")?;
        must(
            record.member(&reign.holder.node).as_ref() == Some(&reign.holder),
            "the holder of the term is a present incarnation",
        )?;
        must(reign.promoted || !reign.gate_opened, "a gate opens after the promotion is recorded")?;
        if record.election.is_none()
            && let Some(rules) = &record.rules
        {
            must(rules.target().members.contains(&reign.holder), "the primary is a member of its rule")?;
        }
    }
    let held = record.restore.as_ref().and_then(|restore| restore.held.as_ref());
    if let Some((held, rules)) = held.zip(record.rules.as_ref()) {
        must(!rules.involve(held), "a copy that is held at an earlier moment counts for no commit")?;
    }
    if let Some(election) = &record.election {
        must(election.term == record.term.next(), "an election is for the next term")?;
        let present = |member: &Member| record.member(&member.node).as_ref() == Some(member);
        let votes = || election.votes.values().map(|vote| &vote.member);
        let all = votes().all(|member| present(member) || election.is_heir(member));
        must(all, "only present incarnations vote, and heirs")?;
        let not_led =
            election.votes.values().all(|vote| !vote.member.node.is_repository() || !vote.electable);
        must(not_led, "the repository never leads")?;
    }
    for rule in record.rules.iter().flat_map(Rules::in_force) {
        let present = rule.members.iter().all(|member| record.member(&member.node).as_ref() == Some(member));
        must(present, "a rule counts only present incarnations")?;
        must(!rule.members.is_empty(), "a rule has a member")?;
        must(
            rule.members.len() == 1 || rule.members.len() > rule.needed as usize,
            "a rule of several members can be satisfied",
        )?;
    }
    Ok(())
}

/// What holds of every change of a record.
pub fn step(before: &Record, after: &Record) -> Result<(), Broken> {
    must(before.term <= after.term, "terms only grow")?;
    must(after.term <= before.term.next(), "no term is skipped")?;
    must(before.last_incarnation <= after.last_incarnation, "no incarnation is used twice")?;
    must(before.system.is_none() || before.system == after.system, "a cluster stays the same cluster")?;
    let kept = before.lines.iter().all(|line| {
        after.line(line.timeline).is_some_and(|now| {
            now.term == line.term
                && now.parent == line.parent
                && (line.begin.is_none() || line.begin == now.begin)
        })
    });
    must(kept, "a reserved timeline stays what it was reserved for")?;
    let (Some(old), Some(new)) = (&before.rules, &after.rules) else { return Ok(()) };
    let shared = old.in_force().any(|rule| new.in_force().any(|other| rule == other));
    let alone = new.in_force().any(|rule| rule.members.len() == 1);
    let forced = before.election.as_ref().is_some_and(|election| election.forced.is_some());
    let heir = after.holder().zip(before.election.as_ref());
    let inherited = heir.is_some_and(|(holder, election)| election.is_heir(holder));
    must(shared || alone || forced || inherited, "one rule of before stays in force at each change")
}

/// Could every election that can be won under `rules` only be won with somebody who holds what is asked
/// about? `able`: this member's copy exists and can vote. The heart of the whole argument: it must be true at
/// every moment for whatever was acknowledged.
pub fn every_election_meets(
    rules: &Rules,
    holder: Option<&Member>,
    able: impl Fn(&Member) -> bool,
    holds: impl Fn(&Member) -> bool,
) -> bool {
    // The holder's vote does for all of them.
    let by_holder = holder.is_some_and(|holder| able(holder) && !holds(holder));
    !by_holder
        && rules.in_force().any(|rule| {
            let without = rule.members.iter().filter(|member| able(member) && !holds(member)).count();
            without < rule.seals_needed(holder)
        })
}
