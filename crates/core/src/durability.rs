//! Which durability rule a primary should be under, and the ordered steps from one rule to the next.
//!
//! The intuition: commits are acknowledged by one set of nodes and elections are won by another, and both
//! must always share a node that has the commit. So a rule is changed like a Raft membership, jointly: while
//! a change is under way an election must satisfy both rules, and the old one is dropped only after a marker
//! written under the new list has been flushed by enough of the new voters. WAL is prefix-closed: whoever
//! flushed the marker has every commit that was acknowledged before.
//!
//! A rule whose only member is the primary needs no marker: an election under it needs the primary's own
//! copy, which has everything. It is therefore reachable from any state, which is what `degrade_after` and
//! rebuilding a needed copy rely on.
//!
//! Hazard: a rule dropped too early lets an election be won without the newest commit.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::action::Action;
use crate::ha::{Memory, PendingRule, heard_lately, rejoin, repository, standby};
use crate::observation::{Observation, Primary, Running, Sender, SyncList};
use crate::reason::Reason;
use crate::record::{Proposal, Record, Reign, Rule};
use crate::types::{Instant, Lsn, Member, Stream, Term, Timeline};

/// A voter that has not streamed for this long is taken out of the rule, if enough others are left.
pub const DROP_VOTER_AFTER: Duration = Duration::from_secs(2);
/// After this long the primary goes on without counting on a lost voter's copy, where its own is enough.
pub const GONE_AFTER: Duration = Duration::from_secs(10);
/// A change that its new voters have not confirmed after this long is undone, if the old rule could hold.
pub const UNDO_RULE_AFTER: Duration = Duration::from_secs(3);
/// A standby this close behind the primary is offered a vote.
pub const NEW_VOTER_LAG_BYTES: u64 = 16 * 1024 * 1024;

/// The list that expresses `rule` on `primary`, which reigns on `timeline`. Where commits need a standby and the rule has none, it is
/// `needed` of nobody, which the driver writes as the reserved name: an empty list would release every
/// waiting commit as if it had been replicated.
pub fn list_of(rule: &Rule, primary: &Member, timeline: Timeline) -> SyncList {
    if rule.needed == 0 {
        return SyncList::default();
    }
    let streams = rule.voters(&primary.node).map(|member| Stream { member: member.clone(), timeline });
    SyncList { needed: rule.needed, names: streams.collect() }
}

/// How many voters of `rule` have flushed everything up to `lsn`.
pub fn flushed_by(rule: &Rule, primary: &Primary, lsn: Lsn) -> u32 {
    let holders: BTreeSet<&Member> = primary
        .senders
        .iter()
        .filter(|sender| sender.genuine && sender.flush_lsn.is_some_and(|flush| flush >= lsn))
        .filter_map(|sender| sender.member.as_ref())
        .filter(|member| rule.members.contains(*member))
        .collect();
    u32::try_from(holders.len()).unwrap_or(u32::MAX)
}

fn has_flushed(primary: &Primary, member: &Member, lsn: Lsn) -> bool {
    primary.senders.iter().any(|sender| {
        sender.genuine
            && sender.member.as_ref() == Some(member)
            && sender.flush_lsn.is_some_and(|flush| flush >= lsn)
    })
}

/// One step towards the right rule and list; `None` when both are as they should be.
pub fn step(
    memory: &mut Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    primary: &Primary,
) -> Option<(Vec<Action>, Reason)> {
    let (term, holder) = (record.term, &reign.holder);
    let rules = record.rules.as_ref()?;
    let voters = Voters::look(memory, now, seen, record, holder, primary);

    let Some(target) = &rules.next else {
        memory.rule_pending = None;
        let desired = desired(now, seen, record, reign, &rules.current, primary, &voters);
        if desired != rules.current {
            return Some(propose(term, rules.current.towards(&desired, &holder.node)));
        }
        let list = list_of(&rules.current, holder, reign.timeline);
        let set = Action::SetSyncList { term, list: list.clone() };
        return (seen.local.list.as_ref() != Some(&list)).then(|| (vec![set], Reason::SettingList {}));
    };

    let pending = match memory.rule_pending {
        Some(pending) if pending.change == rules.change => pending,
        _ => PendingRule { change: rules.change, since: now, from: primary.flush_lsn },
    };
    memory.rule_pending = Some(pending);
    let desired = desired(now, seen, record, reign, &rules.current, primary, &voters);
    if is_alone(&desired) && desired != *target && desired != rules.current {
        return Some(propose(term, desired));
    }
    let list = list_of(target, holder, reign.timeline);
    if seen.local.list.as_ref() != Some(&list) {
        let reason = Reason::ChangingRule { to: target.to_string() };
        return Some((vec![Action::SetSyncList { term, list }], reason));
    }
    if is_alone(target) {
        return Some(finish(term, target, rules.change));
    }
    let marker = seen.local.marker.as_ref().filter(|(under, end)| *under == list && *end > pending.from);
    let Some((_, end)) = marker else {
        let reason = Reason::ProvingRule { have: 0, needed: target.needed };
        return Some((vec![Action::WriteMarker { term, list }], reason));
    };
    let have = flushed_by(target, primary, *end);
    if have >= target.needed {
        return Some(finish(term, target, rules.change));
    }
    let patient = now.since(pending.since) < UNDO_RULE_AFTER;
    if !patient && !voters.could_prove(target) {
        let instead = target.towards(&desired, &holder.node);
        if instead != *target && instead != rules.current && voters.could_prove(&instead) {
            return Some(propose(term, instead));
        }
        if rules.current.members.contains(holder) && voters.could_prove(&rules.current) {
            return Some((vec![Action::Propose(Proposal::UndoRule { term })], Reason::UndoingRule {}));
        }
    }
    Some((Vec::new(), Reason::ProvingRule { have, needed: target.needed }))
}

fn is_alone(rule: &Rule) -> bool {
    rule.members.len() == 1
}

fn propose(term: Term, rule: Rule) -> (Vec<Action>, Reason) {
    let reason = Reason::ChangingRule { to: rule.to_string() };
    (vec![Action::Propose(Proposal::ProposeRule { term, rule })], reason)
}

fn finish(term: Term, rule: &Rule, change: u64) -> (Vec<Action>, Reason) {
    let reason = Reason::ChangingRule { to: rule.to_string() };
    (vec![Action::Propose(Proposal::FinishRule { term, rule: rule.clone(), change })], reason)
}

/// The present voters and would-be voters, as the primary sees them.
struct Voters {
    /// Members of the rules in force, and nodes that may become one.
    known: BTreeSet<Member>,
    /// Streaming, genuine, present incarnation, may vote.
    streaming: BTreeSet<Member>,
    /// Of those, close enough behind to be given a vote.
    caught_up: BTreeSet<Member>,
    /// Not streaming for [`DROP_VOTER_AFTER`].
    lost: BTreeSet<Member>,
    /// Not streaming for [`GONE_AFTER`], and its agent is silent.
    gone: BTreeSet<Member>,
    /// Their copy is worthless and will be rewritten once it has no vote.
    to_rebuild: BTreeSet<Member>,
    /// Fewer than needed for `degrade_after`.
    short_for_too_long: bool,
}

impl Voters {
    fn look(
        memory: &mut Memory,
        now: Instant,
        seen: &Observation<'_>,
        record: &Record,
        holder: &Member,
        primary: &Primary,
    ) -> Voters {
        let may_vote = |member: &Member| {
            record.member(&member.node).as_ref() == Some(member)
                // Whose copy is taken back for the cluster goes as if it were lost: where enough others are left.
                && !record.is_restored(&member.node)
                && repository::is_candidate(seen.spec, record, &member.node)
        };
        let live = |sender: &&Sender| sender.genuine && sender.streaming;
        let (mut streaming, mut caught_up) = (BTreeSet::new(), BTreeSet::new());
        for sender in primary.senders.iter().filter(live) {
            let Some(member) = sender.member.as_ref().filter(|member| may_vote(member)) else { continue };
            streaming.insert(member.clone());
            let near = sender
                .flush_lsn
                .is_some_and(|flush| primary.flush_lsn.bytes_since(flush) <= NEW_VOTER_LAG_BYTES);
            let barred = record.nodes.get(&member.node).is_some_and(|node| node.barred.is_some());
            if near && !barred {
                caught_up.insert(member.clone());
            }
        }

        // Everyone who counts, and everyone who may come to.
        let counted = record.rules.iter().flat_map(|rules| rules.in_force()).flat_map(|rule| &rule.members);
        let nodes = seen.spec.nodes.iter().filter_map(|node| record.member(&node.name));
        let candidates = nodes.chain(record.repository()).filter(may_vote);
        let known: BTreeSet<Member> = counted.cloned().chain(candidates).collect();
        memory.missing_since.retain(|member, _| known.contains(member) && !streaming.contains(member));
        for member in known.iter().filter(|member| *member != holder && !streaming.contains(*member)) {
            memory.missing_since.entry(member.clone()).or_insert(now);
        }
        let missing_for = |span: Duration| -> BTreeSet<Member> {
            let long = memory.missing_since.iter().filter(|(_, since)| now.since(**since) >= span);
            long.map(|(member, _)| member.clone()).collect()
        };
        let (lost, mut gone) = (missing_for(DROP_VOTER_AFTER), missing_for(GONE_AFTER));
        // Whose agent answers is on its way back, even if a long copy has to come first.
        gone.retain(|member| !heard_lately(now, seen, &member.node));
        let to_rebuild = known
            .iter()
            .filter(|member| *member != holder)
            .filter(|member| {
                let report = seen.peers.get(&member.node).and_then(|peer| peer.report.as_ref());
                let asks =
                    report.is_some_and(|report| report.wants_rebuild && report.running != Running::Primary);
                asks || record.member(&member.node).as_ref() != Some(member)
            })
            .cloned()
            .collect();

        let needed = seen.spec.durability.needed();
        if streaming.len() >= needed {
            memory.short_since = None;
        } else {
            memory.short_since.get_or_insert(now);
        }
        let short_for_too_long = match (seen.spec.durability.degrade_after(), memory.short_since) {
            (Some(limit), Some(since)) => now.since(since) >= limit,
            _ => false,
        };
        Voters { known, streaming, caught_up, lost, gone, to_rebuild, short_for_too_long }
    }

    /// Do enough of its voters stream for `rule` to be proven in time?
    fn could_prove(&self, rule: &Rule) -> bool {
        let streaming = rule.members.iter().filter(|member| self.streaming.contains(*member)).count();
        is_alone(rule) || streaming >= rule.needed as usize
    }
}

/// The rule that fits the voters as they are.
fn desired(
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
    current: &Rule,
    primary: &Primary,
    voters: &Voters,
) -> Rule {
    let holder = &reign.holder;
    let wanted = seen.spec.durability.needed();
    let alone = |needed: usize| Rule {
        members: BTreeSet::from([holder.clone()]),
        needed: u32::try_from(needed).unwrap_or(u32::MAX),
    };
    if voters.short_for_too_long && wanted > 0 {
        return alone(0);
    }
    let in_spec = |member: &Member| {
        repository::is_candidate(seen.spec, record, &member.node)
            && record.member(&member.node).as_ref() == Some(member)
    };
    // By the file it streams from another standby, which is there for it.
    let belongs_elsewhere = |member: &Member| {
        let node = seen.spec.node(&member.node);
        let upstream = node.map_or(&holder.node, |node| seen.spec.upstream(node, &holder.node));
        *upstream != holder.node && standby::serves(now, seen, reign, upstream)
    };
    let mut members: BTreeSet<Member> = current
        .members
        .iter()
        .filter(|member| *member == holder || (in_spec(member) && !voters.to_rebuild.contains(*member)))
        .cloned()
        .collect();
    members.insert(holder.clone());
    members.extend(voters.caught_up.iter().cloned());

    // Taking out a lost voter, or a barred one, is worth it only while enough live ones are left; else
    // its copy may be the one that the next election needs.
    let dispensable = |member: &Member| {
        let barred = record.nodes.get(&member.node).is_some_and(|node| node.barred.is_some());
        voters.lost.contains(member) || barred || belongs_elsewhere(member)
    };
    let kept: BTreeSet<Member> =
        members.iter().filter(|member| *member == holder || !dispensable(member)).cloned().collect();
    // The host of a standby that is lost shows as streaming for some seconds, and with it the repository's owner is lost at once: that one
    // has another owner in a moment.
    let drops_repository = members.iter().any(|member| member.node.is_repository() && !kept.contains(member));
    let is_live = |member: &&Member| {
        let heard = !drops_repository || heard_lately(now, seen, &member.node);
        voters.streaming.contains(*member) && heard
    };
    let live_kept = kept.iter().filter(is_live).count();
    if live_kept >= wanted.max(1) {
        members = kept;
    } else if wanted == 0 {
        members.retain(|member| !record.is_restored(&member.node));
    }

    let live = members.iter().filter(|member| voters.streaming.contains(*member)).count();
    let needed = if live >= wanted { wanted } else { current.needed as usize };
    if needed == 0 && wanted > 0 {
        // Degraded, and not enough voters are back.
        return alone(0);
    }
    // One copy waits to be rebuilt, and without it too few can count: it must first lose its vote, and until
    // it is back nothing can be acknowledged. Whoever else can still confirm what it holds does so before.
    let counted = |member: &Member| record.rules.as_ref().is_some_and(|rules| rules.involve(member));
    let can_count = |member: &&Member| {
        *member != holder
            && in_spec(member)
            && !voters.gone.contains(*member)
            && (counted(member) || !belongs_elsewhere(member))
            && !(voters.to_rebuild.contains(*member) && counted(member))
    };
    let too_few = live < wanted && voters.known.iter().filter(can_count).count() < wanted;
    if too_few && wanted > 0 && !voters.to_rebuild.is_empty() {
        let others = members.iter().filter(|member| *member != holder);
        let confirmed = |member: &Member| {
            let report = seen.peers.get(&member.node).and_then(|peer| peer.report.as_ref());
            let by_report = report.is_some_and(|report| rejoin::has_all(record, reign, report));
            by_report || has_flushed(primary, member, reign.promoted_at)
        };
        let settled = others.into_iter().all(|member| voters.gone.contains(member) || confirmed(member));
        return if settled { alone(needed) } else { current.clone() };
    }
    if members.len() <= needed {
        // Too few to be a rule, and more may come: nobody loses its vote meanwhile.
        if current.members.contains(holder) { current.clone() } else { alone(needed) }
    } else {
        Rule { needed: u32::try_from(needed).unwrap_or(u32::MAX), members }
    }
}
