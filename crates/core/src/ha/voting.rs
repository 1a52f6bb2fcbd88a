//! What a node does while a term is being elected: seal, vote, and end the election once it can be.
//!
//! Sealing comes before the vote and is durable before the vote is sent; a vote of a copy that could still
//! receive would count WAL that is acknowledged a moment later on the losing side.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::action::{Action, VoteTemplate};
use crate::ha::election::{self, Tally, Waiting};
use crate::ha::{Decision, Goal, Memory, heard_lately, repository, restore};
use crate::observation::{Observation, Postgres};
use crate::reason::Reason;
use crate::record::{Election, Position, Proposal, Record, Standing, Vote};
use crate::spec::times::{HOLDER_VOTE_WAIT, VOTES_WAIT};
use crate::types::{Instant, Member, NodeName};

/// The winner ends the election itself; another does it only if the winner has not after this long, so that
/// not everybody writes the same decision.
pub const OTHERS_DECIDE_AFTER: Duration = Duration::from_millis(150);
/// For so long a stopped holder lets the others vote, which takes them some ten milliseconds.
pub const OTHERS_VOTE_FIRST: Duration = Duration::from_millis(100);
/// If the best candidate has not taken what it lacks by then, everyone who can tries to.
pub const OTHERS_CATCH_UP_AFTER: Duration = Duration::from_secs(4);

pub fn decide(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Decision {
    let Some(election) = &record.election else {
        return Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now);
    };
    let term = election.term;
    let local = seen.local;
    let is_mine = |member: &Member| record.stands_as(seen.me).as_ref() == Some(member);
    let member = local.durable.member.clone().filter(is_mine);
    let mine = election.votes.get(seen.me);
    let no_vote = || {
        // What this node said in the name of a copy that is gone, or an order that it lead, would keep the others
        // waiting for it.
        let awaited = mine.is_some() || election.forced.as_ref() == Some(seen.me);
        let unvote = Action::Propose(Proposal::Unvote { term, node: seen.me.clone() });
        if let (false, Some(heir)) = (awaited, inherit(memory, now, seen, record, election)) {
            return heir;
        }
        Decision::new(Goal::Sealed, Reason::NoVote { term }, now).acts(awaited.then_some(unvote))
    };
    let counts = !local.durable.rebuilding || restore::may_lead(seen, record, election);
    let Some(member) = member.filter(|_| counts) else {
        // A copy under construction neither votes nor is in anybody's way, but a stray primary is.
        return match local.postgres {
            Postgres::Primary(_) | Postgres::Remains => no_vote().act(Action::StopNow),
            _ => no_vote(),
        };
    };
    let stop = |reason| Decision::new(Goal::Sealed, reason, now).act(Action::StopNow);
    let is_stopped = matches!(local.postgres, Postgres::Stopped(_));

    match &local.postgres {
        Postgres::Unknown => Decision::new(Goal::Hold, Reason::LookingAtPostgres {}, now),
        Postgres::Absent => no_vote(),
        Postgres::Remains => stop(Reason::ClearingRemains {}),
        Postgres::Primary(primary) if may_go_on(seen, record, election, &member, primary.copy.timeline) => {
            let decision = Decision::new(Goal::Primary, Reason::VotedRunning { term }, now);
            if mine.is_some() {
                return decision;
            }
            let vote = running_vote(seen, record, &member, primary);
            decision.act(Action::Adopt { term }).act(Action::Propose(Proposal::Vote { term, vote }))
        }
        Postgres::Primary(_) => stop(Reason::StoppingToVote { term }),
        Postgres::Stopped(_) | Postgres::Standby(_) | Postgres::Starting => {
            if let (false, Some((term, _))) = (is_stopped, local.durable.promoting) {
                return stop(Reason::WithdrawingPromotion { term });
            }
            if is_stopped && others_vote_first(memory, now, seen, record, election, &member) {
                return Decision::new(Goal::Sealed, Reason::LettingOthersVote { term }, now)
                    .again(now, OTHERS_VOTE_FIRST);
            }
            if local.durable.sealed != Some(term) {
                return Decision::new(Goal::Sealed, Reason::Sealing { term }, now)
                    .act(Action::Seal { term })
                    .act(Action::Vote { term, template: template(seen, record, &member) });
            }
            if mine.is_none_or(|vote| vote.standing != Standing::Sealed || is_outdated(seen, record, vote)) {
                return Decision::new(Goal::Sealed, Reason::Voting { term }, now)
                    .act(Action::Vote { term, template: template(seen, record, &member) });
            }
            sealed_and_voted(memory, now, seen, record, election, &member)
        }
    }
}

/// A node without a copy makes one from the repository, where that holds the most and nobody can lead. It is given an incarnation for it first,
/// which is nobody's until it has won: whoever else can lead before then does.
fn inherit(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    election: &Election,
) -> Option<Decision> {
    let term = election.term;
    let vote = election::inheritance(record)
        .filter(|_| patience_is_over(memory, now, election) && repository::may_inherit(seen, record))?;
    let decision = Decision::new(Goal::Sealed, Reason::BecomingHeir { term }, now);
    // One that this agent found when it started may have been that of a copy of which nothing is left.
    let own = seen.local.durable.member.as_ref();
    let is_fresh = |member: &Member| {
        own == Some(member) || memory.enlisted_before.is_none_or(|had| member.incarnation > had)
    };
    let heir = record.stands_as(seen.me).filter(|member| election.is_heir(member) && is_fresh(member));
    let Some(heir) = heir else {
        let from = election.heirs.get(seen.me).copied().unwrap_or_default();
        let ask = Proposal::Inherit { term, node: seen.me.clone(), from };
        return Some(decision.act(Action::Propose(ask)));
    };
    let (timeline, until) = (vote.timeline, vote.position.lsn);
    let begun = own == Some(&heir) && seen.local.durable.rebuilding;
    let become_it = Action::BecomeMember { member: heir, rebuild: true };
    let reason = Reason::Inheriting { term, until: vote.position };
    let decision = Decision { reason, ..decision };
    Some(decision.acts((!begun).then_some(become_it)).act(Action::Inherit { term, timeline, until }))
}

/// May the stopped holder hold its vote back for a moment? Where the others are enough to elect one of them, its vote
/// changes nothing, and only slows theirs: on the way into the store, and on a machine that they share.
fn others_vote_first(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    election: &Election,
    member: &Member,
) -> bool {
    let fresh = memory
        .election_seen
        .is_some_and(|(term, at)| term == election.term && now.since(at) < OTHERS_VOTE_FIRST);
    let plain = election.released && !election.poisoned && election.forced.is_none();
    let promised = record.rules.as_ref().is_some_and(|rules| rules.in_force().all(|rule| rule.needed > 0));
    let others = seen.spec.nodes.iter().map(|node| &node.name).filter(|node| heard_lately(now, seen, node));
    let others = others.filter(|node| *node != seen.me).cloned();
    let repository = repository::answers(now, seen).then(NodeName::repository);
    let others: BTreeSet<NodeName> = others.chain(repository).collect();
    fresh && plain && promised && record.holder() == Some(member) && election::winnable(record, &others)
}

/// What decides who may lead is told when it changes after the vote: a bar that came or went, and a promotion by
/// hand, after which this copy is on a timeline of nobody's.
fn is_outdated(seen: &Observation<'_>, record: &Record, vote: &Vote) -> bool {
    let now = template(seen, record, &vote.member);
    let Some(copy) = seen.local.postgres.copy().filter(|copy| copy.end.is_some()) else { return false };
    let known = election::is_known(record, &seen.local.durable.adopted, copy);
    (now.electable && known, now.priority) != (vote.electable, vote.priority)
}

/// The holder of the closed term that is still a healthy primary says so and wins.
fn may_go_on(
    seen: &Observation<'_>,
    record: &Record,
    election: &Election,
    member: &Member,
    timeline: crate::types::Timeline,
) -> bool {
    let reigns = record
        .reign
        .as_ref()
        .is_some_and(|reign| reign.holder == *member && reign.promoted && reign.timeline == timeline);
    reigns && !election.released && election.forced.is_none() && seen.local.damage.is_none()
}

fn running_vote(
    seen: &Observation<'_>,
    record: &Record,
    member: &Member,
    primary: &crate::observation::Primary,
) -> Vote {
    let line = record.line(primary.copy.timeline).map_or(record.term, |line| line.term);
    template(seen, record, member).fill(
        Standing::Running,
        Position { term: line, lsn: primary.flush_lsn },
        primary.copy.timeline,
        primary.copy.begins.clone(),
        true,
    )
}

pub(super) fn template(seen: &Observation<'_>, record: &Record, member: &Member) -> VoteTemplate {
    let node = seen.spec.node(seen.me);
    let barred = record.nodes.get(seen.me).is_some_and(|entry| entry.barred.is_some());
    VoteTemplate {
        member: member.clone(),
        electable: node.is_some_and(|node| node.electable())
            && !barred
            && !seen.local.stopping
            && seen.local.damage.is_none(),
        priority: node.map_or(0, |node| u32::from(node.priority)),
    }
}

fn sealed_and_voted(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    election: &Election,
    member: &Member,
) -> Decision {
    let term = election.term;
    let decision =
        Decision::new(Goal::Sealed, Reason::Voting { term }, now).again(now, Duration::from_millis(50));
    let waits = |reason: Reason| Decision { reason, ..decision.clone() };
    match election::tally(record, patience_is_over(memory, now, election)) {
        Tally::CatchUp { candidate, until, .. } => {
            let long = memory.election_seen.is_some_and(|(_, at)| now.since(at) >= OTHERS_CATCH_UP_AFTER);
            let own_turn = candidate == *member || long;
            let answers = |node: &NodeName| match node.is_repository() {
                true => repository::was_reached(now, seen.local),
                false => heard_lately(now, seen, node),
            };
            match election::source_for(record, member, until, answers) {
                Some(source) if own_turn => {
                    if let Postgres::Stopped(_) = seen.local.postgres {
                        return waits(Reason::StartingSealed {}).act(Action::StartSealed);
                    }
                    waits(Reason::CatchingUpToLead { term, source: source.clone(), until })
                        .act(Action::CatchUp { term, source, until: until.lsn })
                        .act(Action::Vote { term, template: template(seen, record, member) })
                }
                _ => {
                    let decision = waits(Reason::WaitingForCatchUp { term, candidate: candidate.node });
                    let own = election.votes.get(seen.me).map(|vote| vote.position);
                    match seen.local.postgres {
                        // A source serves its WAL; for that it must run, still sealed.
                        Postgres::Stopped(_) if own == Some(until) => decision.act(Action::StartSealed),
                        _ => decision,
                    }
                }
            }
        }
        Tally::Wait(Waiting::Votes { missing }) => waits(Reason::WaitingForVotes { term, missing }),
        Tally::Wait(Waiting::Better { missing }) => waits(Reason::WaitingForBetterVotes { term, missing }),
        Tally::Wait(Waiting::Forced { named }) => waits(Reason::WaitingForForced { term, named }),
        Tally::Wait(Waiting::NobodyElectable) => match election::inheritance(record) {
            Some(_) => waits(Reason::WaitingForHeir { term }),
            None => waits(Reason::NobodyElectable { term }),
        },
        Tally::Wait(Waiting::NoElection) => decision,
        Tally::Incumbent(winner) => waits(Reason::Deciding { term, winner: winner.node }),
        Tally::Winner(winner) => match holder_may_still_vote(memory, now, record, election) {
            Some(holder) => waits(Reason::WaitingForHolderVote { term, holder: holder.node.clone() }),
            None => waits(Reason::Deciding { term, winner: winner.node }),
        },
    }
}

/// Ends an election that no vote has ended, if that can be done and it is this node's turn to.
pub fn end(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Option<Action> {
    let election = record.election.as_ref()?;
    let (_, first_seen) = memory.election_seen?;
    let patient = patience_is_over(memory, now, election);
    let winner = match election::tally(record, patient) {
        Tally::Incumbent(winner) => winner,
        Tally::Winner(winner) => {
            if holder_may_still_vote(memory, now, record, election).is_some() {
                return None;
            }
            winner
        }
        Tally::CatchUp { .. } | Tally::Wait(_) => return None,
    };
    let my_turn = winner.node == *seen.me || now.since(first_seen) >= VOTES_WAIT + OTHERS_DECIDE_AFTER;
    my_turn.then(|| {
        Action::Propose(Proposal::Decide { term: election.term, winner: winner.node.clone(), patient })
    })
}

fn patience_is_over(memory: &Memory, now: Instant, election: &Election) -> bool {
    memory.election_seen.is_some_and(|(term, at)| term == election.term && now.since(at) >= VOTES_WAIT)
}

/// The holder, while it is given its moment to say that it is alive.
fn holder_may_still_vote<'a>(
    memory: &Memory,
    now: Instant,
    record: &'a Record,
    election: &Election,
) -> Option<&'a Member> {
    let recent = memory
        .election_seen
        .is_some_and(|(term, at)| term == election.term && now.since(at) < HOLDER_VOTE_WAIT);
    record.holder().filter(|holder| recent && election.awaits(Some(holder)))
}
