//! Who leads next: a pure function over the whole election in the store's record.
//!
//! The intuition: an acknowledged commit is on `needed` + 1 members of the rule. Once all but `needed` of
//! the members are sealed, nothing more can be acknowledged in the old term, and at least one sealed member
//! has every commit that was. WAL is prefix-closed, so the one with the highest position has them all.
//! The holder of the term, once it is stopped, does for all of them: nothing is acknowledged without it, and it has
//! everything that was. No clock takes part; `patient` only chooses between results that are all safe.
//!
//! Hazard: a winner chosen from too small a set, or by the wrong position, loses acknowledged commits.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::observation::Copy;
use crate::record::{Position, Record, Standing, Vote};
use crate::types::{Lsn, Member, NodeName, Term, Timeline};

/// What the votes so far amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tally {
    /// The holder is alive and well: a new term, and nothing moves.
    Incumbent(Member),
    Winner(Member),
    /// The copy that holds the most cannot lead. `candidate` first takes from `source` what it lacks.
    CatchUp {
        candidate: Member,
        source: Member,
        until: Position,
    },
    Wait(Waiting),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    NoElection,
    /// Too few are sealed; any of these would help.
    Votes {
        missing: BTreeSet<NodeName>,
    },
    /// Enough are sealed, yet a better choice may still vote.
    Better {
        missing: BTreeSet<NodeName>,
    },
    /// The node that an operator named has not voted.
    Forced {
        named: NodeName,
    },
    /// Nobody among the sealed may lead.
    NobodyElectable,
}

/// The result of the open election as the votes stand. `patient`: whoever has not voted by now is not
/// waited for, where its vote would only have been nicer to have.
pub fn tally(record: &Record, patient: bool) -> Tally {
    let (Some(election), Some(rules)) = (&record.election, &record.rules) else {
        return Tally::Wait(Waiting::NoElection);
    };
    let holder = record.holder();
    let counts = |vote: &&Vote| {
        record.member(&vote.member.node).as_ref() == Some(&vote.member) && rules.involve(&vote.member)
    };
    let sealed: Vec<&Vote> =
        election.votes.values().filter(|vote| vote.standing == Standing::Sealed).filter(counts).collect();
    let missing: BTreeSet<NodeName> = rules
        .in_force()
        .flat_map(|rule| &rule.members)
        .map(|member| member.node.clone())
        .filter(|node| !election.votes.contains_key(node))
        .collect();

    if let Some(named) = &election.forced {
        return match election.votes.get(named).filter(|vote| vote.standing == Standing::Sealed) {
            Some(vote) if patient || missing.is_empty() => Tally::Winner(vote.member.clone()),
            // Whoever answers is sealed first: an old primary among them would go on acknowledging.
            Some(_) => Tally::Wait(Waiting::Better { missing }),
            None => Tally::Wait(Waiting::Forced { named: named.clone() }),
        };
    }
    let running = election.votes.values().find(|vote| vote.standing == Standing::Running);
    if let Some(vote) = running.filter(|vote| holder == Some(&vote.member) && !election.released) {
        return Tally::Incumbent(vote.member.clone());
    }

    // Heirs count for nothing, and may lead with what they have.
    let heirs: Vec<&Vote> = election.votes.values().filter(|vote| election.is_heir(&vote.member)).collect();
    let is_enough = |votes: &[&Vote]| {
        // Whatever was acknowledged was first of all on the holder, and where that is sealed nothing more is.
        let of_holder = votes.iter().any(|vote| holder == Some(&vote.member));
        of_holder
            || rules.in_force().all(|rule| {
                let present = votes.iter().filter(|vote| rule.members.contains(&vote.member)).count();
                present >= rule.seals_needed(holder)
            })
    };
    if !is_enough(&sealed) {
        return Tally::Wait(Waiting::Votes { missing });
    }
    // A stopped holder is led back only where its copy is needed: it is slower, and what killed it may
    // kill it again. Unless it has been killed so often that the load itself must be the cause.
    let others: Vec<&Vote> = sealed.iter().copied().filter(|vote| holder != Some(&vote.member)).collect();
    let all_but_holder_voted = missing.iter().all(|node| holder.is_some_and(|holder| holder.node == *node));
    let lossy = rules.in_force().any(|rule| rule.needed == 0);
    let furthest = |votes: &[&Vote]| votes.iter().map(|vote| vote.position).max();
    // Where a rule lets commits go on without voters, the others may be enough and still lack some of them.
    let spares_holder = !lossy || furthest(&others) >= furthest(&sealed);
    let others_can_lead = others.iter().any(|vote| vote.electable);
    let without_holder = !election.poisoned && is_enough(&others) && others_can_lead && spares_holder;
    let settled = patient || missing.is_empty() || ((all_but_holder_voted || without_holder) && !lossy);
    if !settled {
        return Tally::Wait(Waiting::Better { missing });
    }
    if without_holder {
        let chosen = choose(record, &[others, heirs.clone()].concat());
        // Rather than let another one catch up first, the stopped holder leads again, if it can.
        let holder_can_lead = sealed.iter().any(|vote| holder == Some(&vote.member) && vote.electable);
        if !holder_can_lead || matches!(chosen, Tally::Winner(_)) {
            return chosen;
        }
    }
    choose(record, &[sealed, heirs].concat())
}

/// The vote of the repository, where enough are sealed, it holds the most of them, and nobody can lead: then a node that has nothing may be made
/// from it, and has everything that was ever acknowledged. Where a rule lets commits go on without voters that is
/// not so, and nothing is made without an operator's word.
pub fn inheritance(record: &Record) -> Option<&Vote> {
    let (election, rules) = (record.election.as_ref()?, record.rules.as_ref()?);
    let vote = record.repository().and_then(|member| {
        election.votes.get(&member.node).filter(|vote| vote.member == member && rules.involve(&member))
    })?;
    let promised = rules.in_force().all(|rule| rule.needed > 0);
    let counted = election.votes.values().filter(|vote| rules.involve(&vote.member));
    let furthest = counted.map(|vote| vote.position).max() == Some(vote.position);
    let nobody = matches!(tally(record, true), Tally::Wait(Waiting::NobodyElectable));
    (promised && furthest && nobody && election.forced.is_none()).then_some(vote)
}

/// Are so many members sealed that no heartbeat of the closed term can be acknowledged any more? Under a rule that
/// needs nobody none ever is.
pub fn enough_are_sealed(record: &Record) -> bool {
    let (Some(election), Some(rules)) = (&record.election, &record.rules) else { return false };
    let sealed = |member: &&Member| {
        let vote = election.votes.get(&member.node).filter(|vote| vote.member == **member);
        vote.is_some_and(|vote| vote.standing == Standing::Sealed)
    };
    let of_holder = record.holder().as_ref().is_some_and(sealed);
    of_holder
        || rules
            .in_force()
            .filter(|rule| rule.needed > 0)
            .all(|rule| rule.members.iter().filter(sealed).count() >= rule.seals_needed(record.holder()))
}

/// The most advanced of `votes` that may lead; where that one may not, the best one that can be made so.
fn choose(record: &Record, votes: &[&Vote]) -> Tally {
    let Some(highest) = votes.iter().map(|vote| vote.position).max() else {
        return Tally::Wait(Waiting::NobodyElectable);
    };
    let wanted = record.switchover.as_ref().and_then(|order| order.to.as_ref());
    let rank = |vote: &&&Vote| {
        let asked_for = wanted == Some(&vote.member.node);
        (vote.position, asked_for, vote.priority, Reverse(vote.member.node.clone()))
    };
    let Some(best) = votes.iter().filter(|vote| vote.electable).max_by_key(rank) else {
        return Tally::Wait(Waiting::NobodyElectable);
    };
    if best.position == highest {
        return Tally::Winner(best.member.clone());
    }
    // Taking the second best here loses what only the highest holds (ha-attack S4). A copy with a tail of its
    // own cannot take that over, however far it is.
    let sources = || votes.iter().filter(|vote| vote.position == highest);
    let candidates = votes.iter().filter(|vote| vote.electable);
    let candidates = candidates.filter(|vote| sources().any(|source| continues(source, vote)));
    let Some(candidate) = candidates.max_by_key(rank) else {
        return Tally::Wait(Waiting::NobodyElectable);
    };
    let source = sources().find(|source| continues(source, candidate)).unwrap_or(best);
    Tally::CatchUp { candidate: candidate.member.clone(), source: source.member.clone(), until: highest }
}

/// From whom `member` can take WAL up to `until` to lead: somebody who ends there and goes on where it ends
/// itself, and rather one that answers.
pub fn source_for(
    record: &Record,
    member: &Member,
    until: Position,
    answers: impl Fn(&NodeName) -> bool,
) -> Option<NodeName> {
    let votes = &record.election.as_ref()?.votes;
    let own = votes.get(&member.node).filter(|vote| vote.member == *member && vote.electable)?;
    let sources = votes.values().filter(|vote| vote.standing == Standing::Sealed && vote.position == until);
    let usable = sources.filter(|source| own.position < until && continues(source, own));
    usable.map(|source| &source.member.node).max_by_key(|node| (answers(node), Reverse(*node))).cloned()
}

/// Does the history of `source` contain everything that `copy` holds, and can the rest be had of it?
fn continues(source: &Vote, copy: &Vote) -> bool {
    // The repository has WAL from somewhere on; its vote says of each timeline from where.
    let is_had =
        |(timeline, begin): &(Timeline, Lsn)| *timeline == copy.timeline && *begin <= copy.position.lsn;
    if source.member.node.is_repository() && !source.begins.iter().any(is_had) {
        return false;
    }
    if source.timeline == copy.timeline {
        return source.position.lsn >= copy.position.lsn;
    }
    let contains = source.begins.iter().any(|(timeline, _)| *timeline == copy.timeline);
    let mut later = source.begins.iter().filter(|(timeline, _)| *timeline > copy.timeline);
    contains && later.all(|(_, begin)| *begin >= copy.position.lsn)
}

/// Could an election be won if these nodes, and only these, took part? Opening one that cannot be won
/// would end a term that may still be working (ha-attack L5).
pub fn winnable(record: &Record, answering: &BTreeSet<NodeName>) -> bool {
    let Some(rules) = &record.rules else { return false };
    rules.in_force().all(|rule| {
        let present = rule.members.iter().filter(|member| answering.contains(&member.node)).count();
        present >= rule.seals_needed(record.holder())
    })
}

/// Does `copy` end on a timeline that counts?
pub fn is_known(record: &Record, adopted: &BTreeMap<Timeline, Term>, copy: &Copy) -> bool {
    let end = copy.end.unwrap_or_default();
    position(record, adopted, copy.timeline, end, &copy.begins).1
}

/// What a copy that ends at `end` on `timeline` is worth, and whether its end is on a known timeline.
///
/// A timeline counts only if the store recorded a term for its number *and* this node went onto it under
/// that very term (`adopted`): a standby promoted by hand picks the same next number (ha-attack S3).
/// Otherwise the copy counts up to where it left the last timeline that is known.
pub fn position(
    record: &Record,
    adopted: &BTreeMap<Timeline, Term>,
    timeline: Timeline,
    end: Lsn,
    begins: &[(Timeline, Lsn)],
) -> (Position, bool) {
    let known = |timeline: Timeline| {
        let line = record.line(timeline)?;
        (timeline == Timeline(1) || adopted.get(&timeline) == Some(&line.term)).then_some(line.term)
    };
    if let Some(term) = known(timeline) {
        return (Position { term, lsn: end }, true);
    }
    let mut fork = end;
    let mut history: Vec<(Timeline, Lsn)> =
        begins.iter().copied().filter(|(number, _)| *number <= timeline).collect();
    history.sort();
    for (number, begin) in history.into_iter().rev() {
        if let Some(term) = known(number) {
            return (Position { term, lsn: fork }, false);
        }
        fork = fork.min(begin);
    }
    match known(Timeline(1)) {
        Some(term) => (Position { term, lsn: fork }, false),
        None => (Position::default(), false),
    }
}
