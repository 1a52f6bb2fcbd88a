//! The cluster goes back to an earlier moment: one copy is taken there, held, and leads when an operator says so.
//!
//! The intuition: a copy that ends at the moment is to the cluster what a copy is that an operator forces to lead, only that it is made
//! for that on purpose. So it is made, by a node that no rule counts any more, while the others go on; then one election makes it the primary,
//! and everybody else, who is ahead on a line that was left, comes back as after any forced failover.
//!
//! From the moment at which its making begins this copy is one that is being rebuilt, which is worth nothing: it neither
//! votes nor follows nor counts. It stays one while it is held, and only its own election makes it a copy.
//!
//! Left out: which moment, which is an operator's, and where it is in WAL, which only the repository tells.
//!
//! Hazard: a held copy that an ordinary election chooses has the whole cluster go back with nobody having said so; and one that
//! follows again has undone the restore without a word.

use crate::action::Action;
use crate::ha::{Decision, Goal, Memory, rejoin};
use crate::observation::{Copy, Local, Observation, Postgres};
use crate::reason::Reason;
use crate::record::{Election, Moment, Proposal, Record, Reign};
use crate::spec::ClusterSpec;
use crate::types::{Incarnation, Instant, Lsn, NodeName, Timeline};

/// A record that would be the first behind the moment may begin behind the header of its page; what is before it ends before that.
const PAGE_HEADER_BYTES: u64 = 40;

/// Why the copy of a node cannot be taken back now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It has no PostgreSQL, or is no member yet.
    NoCopy,
    /// It goes on serving until the restored copy leads.
    Primary,
    /// Delayed, or of priority 0, or barred.
    NotElectable,
    /// Commits would wait for standbys that are not left.
    TooFewLeft { left: usize, needed: usize },
}

/// Can `node` do without its copy, and be promoted afterwards?
pub fn is_fit(spec: &ClusterSpec, record: &Record, node: &NodeName) -> Result<(), Unfit> {
    let named = spec.node(node).ok_or(Unfit::NoCopy)?;
    let entry = record.nodes.get(node).ok_or(Unfit::NoCopy)?;
    let holder = record.holder().map(|holder| &holder.node);
    if holder == Some(node) {
        return Err(Unfit::Primary);
    }
    if !named.electable() || entry.barred.is_some() {
        return Err(Unfit::NotElectable);
    }
    let needed = spec.durability.needed();
    let goes_on = |other: &NodeName| {
        other != node
            && holder != Some(other)
            && record.nodes.get(other).is_some_and(|other| other.barred.is_none())
    };
    let candidates = spec.nodes.iter().filter(|other| other.voter_candidate());
    let left = candidates.filter(|other| goes_on(&other.name)).count();
    if left < needed && spec.durability.degrade_after().is_none() {
        return Err(Unfit::TooFewLeft { left, needed });
    }
    Ok(())
}

/// The step towards a copy that is held; `None` where this node's is not taken back, or still counts.
pub fn decide(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    reign: &Reign,
) -> Option<Decision> {
    let order = record.restore.as_ref().filter(|order| order.node == *seen.me)?;
    if record.rules.as_ref().is_some_and(|rules| rules.involve_node(seen.me)) {
        // Until its vote is taken away it is a standby like any other.
        return None;
    }
    let local = seen.local;
    let (moment, enlisted) = (&order.moment, record.member(seen.me));
    let mut decision = Decision::new(Goal::Sealed, Reason::TakingBack { moment: moment.clone() }, now);
    // Nobody streams from it, and nobody is given its vote.
    decision.wants_rebuild = true;
    let is_members_copy = local.durable.member.is_some() && local.durable.member == enlisted;
    if is_members_copy && is_there(local, moment) {
        return Some(hold(decision, local, order.held == enlisted, moment));
    }

    let holder = reign.holder.node.clone();
    if !seen.store.caught_up {
        return Some(Decision { reason: Reason::RecordUnconfirmed {}, ..decision });
    }
    if !reign.promoted {
        let reason = Reason::WaitingForPromotion { term: record.term, holder };
        return Some(Decision { reason, ..decision });
    }
    let destroys =
        is_members_copy && !local.durable.rebuilding && !matches!(local.postgres, Postgres::Absent);
    if destroys && !rejoin::is_next(memory, now, seen, record, reign) {
        return Some(Decision { reason: Reason::WaitsForSafeCopies { holder }, ..decision });
    }
    // As for any copy that is made anew. One that was held already becomes another one, so that nobody has what it is not lead.
    let own = local.durable.member.as_ref().map(|member| member.incarnation);
    let was_held = order.held.is_some() || local.durable.held.is_some();
    let under_way = own.filter(|_| local.durable.rebuilding && !was_held);
    let had = own.or(memory.enlisted_before);
    let fresh = enlisted.as_ref().filter(|member| {
        had.is_none_or(|had| member.incarnation > had) || under_way == Some(member.incarnation)
    });
    let Some(member) = fresh else {
        let from = enlisted.map_or(Incarnation(0), |member| member.incarnation);
        let enlist = Proposal::Enlist { node: seen.me.clone(), from };
        return Some(Decision { reason: Reason::Enlisting {}, ..decision }.act(Action::Propose(enlist)));
    };
    let become_it = Action::BecomeMember { member: member.clone(), rebuild: true };
    let anew = under_way != Some(member.incarnation);
    let restore = Action::Restore { term: record.term, moment: moment.clone() };
    Some(decision.acts(anew.then_some(become_it)).act(restore))
}

/// Was this very copy made, and did it not grow since?
fn is_there(local: &Local, moment: &Moment) -> bool {
    let grown = local.postgres.copy().is_some_and(|copy| copy.end.is_some_and(|end| end > moment.end));
    local.durable.rebuilding
        && local.durable.held.as_ref() == Some(moment)
        && !matches!(local.postgres, Postgres::Absent)
        && !grown
}

fn hold(decision: Decision, local: &Local, told: bool, moment: &Moment) -> Decision {
    match &local.postgres {
        Postgres::Stopped(_) => {
            Decision { reason: Reason::StartingSealed {}, ..decision }.act(Action::StartSealed)
        }
        Postgres::Standby(standby) if is_replayed(local, &standby.copy, moment) => {
            let decision = Decision { reason: Reason::Held { moment: moment.clone() }, ..decision };
            let member = local.durable.member.clone().filter(|_| !told);
            decision.acts(member.map(|member| Action::Propose(Proposal::Held { member })))
        }
        _ => decision,
    }
}

/// Does it end at the moment, and has it replayed everything up to there?
fn is_replayed(local: &Local, copy: &Copy, moment: &Moment) -> bool {
    let Some((end, replayed)) = copy.end.zip(local.replayed) else { return false };
    is_end(copy.timeline, end, moment) && replayed >= end
}

/// Is this the end of a copy that ends at the moment?
pub fn is_end(timeline: Timeline, end: Lsn, moment: &Moment) -> bool {
    timeline == moment.timeline && moment.end >= end && moment.end.bytes_since(end) <= PAGE_HEADER_BYTES
}

/// May this copy, which counts for nothing else, be sealed and voted with? In the election that an operator called for it; and in a
/// later one if it has won that and did not get to lead.
pub fn may_lead(seen: &Observation<'_>, record: &Record, election: &Election) -> bool {
    let durable = &seen.local.durable;
    let Some(held) = &durable.held else { return false };
    let called = record
        .restore
        .as_ref()
        .is_some_and(|order| order.node == *seen.me && order.moment == *held && order.held == durable.member);
    (called && election.forced.as_ref() == Some(seen.me)) || record.holder() == durable.member.as_ref()
}

/// Has it been elected, and is not yet a copy that counts?
pub fn has_won(local: &Local, reign: &Reign) -> bool {
    let durable = &local.durable;
    durable.held.is_some() && durable.member.as_ref() == Some(&reign.holder) && !reign.promoted
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::ha::tests::{observation, spec};
    use crate::observation::{Durable, Peer, Standby};
    use crate::record::{NodeRecord, Restore, Rule, Rules};
    use crate::spec::{Durability, Times};
    use crate::types::{Member, Term};

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    fn moment() -> Moment {
        let (timeline, along) = (Timeline(3), Timeline(5));
        Moment { backup: "20261120T205454".to_owned(), timeline, end: Lsn(0x500_0000), along }
    }

    /// `a` leads, and the copy of `c` is taken back; nobody counts it.
    fn record(names: &[&str]) -> Record {
        let mut record = Record::empty();
        for (at, node) in names.iter().enumerate() {
            let incarnation = Incarnation(at as u64 + 1);
            record.nodes.insert(name(node), NodeRecord { incarnation, barred: None });
        }
        record.term = Term(4);
        let holder = record.member(&name("a")).unwrap();
        let rule = Rule { members: [holder.clone()].into(), needed: 0 };
        record.rules = Some(Rules { current: rule, next: None, superseded: Vec::new(), change: 0 });
        record.reign = Some(Reign {
            holder,
            timeline: Timeline(5),
            promoted: true,
            elected_at: Lsn(1),
            promoted_at: Lsn(1),
            gate_opened: true,
            predecessor_gone: true,
        });
        record.restore = Some(Restore { node: name("c"), moment: moment(), held: None, trouble: None });
        record
    }

    #[test]
    fn only_who_can_be_done_without_is_taken_back() {
        let mut spec = spec(&["a", "b", "c"]);
        let three = record(&["a", "b", "c"]);
        assert_eq!(is_fit(&spec, &three, &name("c")), Ok(()));
        assert_eq!(is_fit(&spec, &three, &name("a")), Err(Unfit::Primary));
        assert_eq!(is_fit(&spec, &three, &name("d")), Err(Unfit::NoCopy));
        spec.durability = Durability::Quorum { needed: 2, degrade_after: None };
        let too_few = Err(Unfit::TooFewLeft { left: 1, needed: 2 });
        assert_eq!(is_fit(&spec, &three, &name("c")), too_few);
        let degrade_after = Some(Duration::from_secs(5));
        spec.durability = Durability::Quorum { needed: 2, degrade_after };
        assert_eq!(is_fit(&spec, &three, &name("c")), Ok(()), "commits go on after a while");
        spec.durability = Durability::Async;
        assert_eq!(is_fit(&spec, &three, &name("c")), Ok(()));
        spec.nodes[2].priority = 0;
        assert_eq!(is_fit(&spec, &three, &name("c")), Err(Unfit::NotElectable));

        let mut barred = three;
        barred.nodes.get_mut(&name("b")).unwrap().barred = Some("a checksum failed".to_owned());
        spec.durability = Durability::Quorum { needed: 1, degrade_after: None };
        spec.nodes[2].priority = 100;
        let too_few = Err(Unfit::TooFewLeft { left: 0, needed: 1 });
        assert_eq!(is_fit(&spec, &barred, &name("c")), too_few);
    }

    /// What `c` does with a copy that ends there, on this timeline.
    fn decided(record: &Record, held: Option<Moment>, end: u64, timeline: u32, replayed: u64) -> Decision {
        let (me, times, spec) = (name("c"), Times::default(), spec(&["a", "b", "c"]));
        let member = Some(Member { node: me.clone(), incarnation: Incarnation(3) });
        let copy = Copy { end: Some(Lsn(end)), timeline: Timeline(timeline), ..Copy::default() };
        let postgres = Postgres::Standby(Standby { copy, ..Standby::default() });
        let durable = Durable { member, rebuilding: true, held, ..Durable::default() };
        let local = Local { durable, postgres, replayed: Some(Lsn(replayed)), ..Local::default() };
        let peers: BTreeMap<NodeName, Peer> = BTreeMap::new();
        let seen = observation(&me, &spec, &times, record, &local, &peers);
        let now = Instant::from_boot(Duration::from_secs(100));
        decide(&Memory::default(), now, &seen, record, record.reign.as_ref().unwrap()).unwrap()
    }

    #[test]
    fn a_copy_is_held_where_it_was_to_end_and_nowhere_else() {
        let mut record = record(&["a", "b", "c"]);
        let end = moment().end.0;
        let there = decided(&record, Some(moment()), end, 3, end);
        let member = record.member(&name("c")).unwrap();
        let held = Action::Propose(Proposal::Held { member: member.clone() });
        assert_eq!((there.actions, there.wants_rebuild), (vec![held], true));
        // The next record would begin behind the header of its page.
        assert_eq!(decided(&record, Some(moment()), end - 24, 3, end - 24).actions.len(), 1);
        for (what, copy) in [
            ("not replayed", decided(&record, Some(moment()), end, 3, end - 8)),
            ("another timeline", decided(&record, Some(moment()), end, 5, end)),
            ("too short", decided(&record, Some(moment()), end - 48, 3, end)),
        ] {
            assert_eq!(copy.actions, [], "{what}");
        }
        let restores = |decision: Decision| matches!(&decision.actions[..], [Action::Restore { .. }]);
        assert!(restores(decided(&record, None, end, 3, end)));
        let enlist = [Action::Propose(Proposal::Enlist { node: name("c"), from: Incarnation(3) })];
        let grown = decided(&record, Some(moment()), end + 8, 3, end + 8);
        assert_eq!(grown.actions, enlist, "what was held becomes another copy");
        let other = Moment { end: Lsn(end - 8), ..moment() };
        assert_eq!(decided(&record, Some(other), end - 8, 3, end).actions, enlist, "for another moment");

        record.restore.as_mut().unwrap().held = Some(member);
        assert_eq!(decided(&record, Some(moment()), end, 3, end).actions, [], "it is known");
        assert_eq!(decided(&record, None, end, 3, end).actions, enlist, "it was lost since");
    }
}
