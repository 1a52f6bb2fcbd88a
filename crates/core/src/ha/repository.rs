//! The repository as a voter: what is in it counts like a standby's copy, and never leads.
//!
//! It has no agent of its own. The owner of the archive streams for it, from the holder, and tells the holder that WAL is flushed when that is in
//! the repository and nobody has sealed it since. Every agent that reaches it may seal it and vote for it: first the seal is put, then what is
//! there is listed. The owner puts WAL first and looks for a seal then; so one of the two sees the other, and what was told is in the vote.
//!
//! Two who seal for one election may find different ends. Both have everything that was told, so either may be counted, and the first one is.
//!
//! Hazard: a vote with less than what was told loses acknowledged commits; one with more has a candidate wait for WAL that is not there.

use std::time::Duration;

use crate::action::{SealOrder, StreamOrder, VoteTemplate};
use crate::ha::archive::is_owned;
use crate::ha::{Memory, election, heard_lately, suspicion};
use crate::observation::{Local, Observation, Postgres};
use crate::record::{Proposal, Record, Standing, Vote};
use crate::spec::ClusterSpec;
use crate::types::{Instant, Lsn, Member, NodeName, Timeline};

/// How often it is asked whether it answers, while that matters.
pub const ASK_EVERY: Duration = Duration::from_millis(250);
/// An answer to what was asked longer ago says nothing of now.
pub const ANSWER_COUNTS_FOR: Duration = Duration::from_secs(2);

/// Is the one that the file names the one that the record means?
fn is_there(spec: &ClusterSpec, record: &Record) -> bool {
    let named = spec.backup.as_ref().map(|backup| backup.repository.location.to_string());
    let known = record.archive.as_ref().filter(|archive| archive.repository.is_some());
    known.is_some_and(|known| named.as_ref() == Some(&known.place))
}

/// May it count for commits, by the file?
pub fn may_count(spec: &ClusterSpec, record: &Record) -> bool {
    spec.backup.as_ref().is_some_and(|backup| backup.voter) && is_there(spec, record)
}

/// May this member count for commits, by the file? A node, or the repository.
pub fn is_candidate(spec: &ClusterSpec, record: &Record, node: &NodeName) -> bool {
    if node.is_repository() {
        return may_count(spec, record);
    }
    spec.node(node).is_some_and(|node| node.voter_candidate())
}

/// The repository, where a rule in force counts it.
pub fn counted(record: &Record) -> Option<Member> {
    let member = record.repository()?;
    record.rules.as_ref().is_some_and(|rules| rules.involve(&member)).then_some(member)
}

/// Has it answered this agent lately? What the agent tells the others.
pub fn was_reached(now: Instant, local: &Local) -> bool {
    local.repository.answered.is_some_and(|asked| now.since(asked) < ANSWER_COUNTS_FOR)
}

/// Does it answer anybody who could seal it?
pub fn answers(now: Instant, seen: &Observation<'_>) -> bool {
    let reaches = |node: &NodeName| {
        let report = seen.peers.get(node).and_then(|peer| peer.report.as_ref());
        report.is_some_and(|report| report.reaches_repository) && heard_lately(now, seen, node)
    };
    was_reached(now, seen.local) || seen.peers.keys().any(reaches)
}

/// What its owner streams, and in whose name it tells that WAL is flushed. It goes on through an election: what ends that is the seal.
pub fn stream(seen: &Observation<'_>, record: &Record) -> Option<StreamOrder> {
    let reign = record.reign.as_ref().filter(|reign| reign.promoted && seen.store.caught_up)?;
    // One that is to be no member any more counts until the rule goes on without it.
    let counts = may_count(seen.spec, record) || counted(record).is_some();
    let member = record.repository().filter(|_| counts && is_owned(seen, record))?;
    Some(StreamOrder {
        member,
        term: record.term,
        source: reign.holder.node.clone(),
        timeline: reign.timeline,
        line: record.line(reign.timeline)?.term,
    })
}

/// Whether it is asked if it answers: while its vote may soon be needed.
pub fn is_asked(memory: &Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> bool {
    counted(record).is_some()
        && (record.election.is_some() || suspicion::is_suspicious(memory, now, seen, record))
}

/// The election that it is to be sealed for, while that lacks its vote.
pub fn seal(seen: &Observation<'_>, record: &Record) -> Option<SealOrder> {
    let election = record.election.as_ref()?;
    let member = counted(record).filter(|member| !election.votes.contains_key(&member.node))?;
    let may_seal = is_there(seen.spec, record) && seen.store.caught_up;
    may_seal.then_some(SealOrder { member, term: election.term })
}

/// Its vote, once this agent has sealed it and seen what is there.
pub fn vote(seen: &Observation<'_>, record: &Record) -> Option<Proposal> {
    let order = seal(seen, record)?;
    let found = seen.local.repository.sealed.as_ref().filter(|found| found.order == order)?;
    let (copy, end) = (&found.copy, found.copy.end?);
    let (position, known) = election::position(record, &found.adopted, copy.timeline, end, &copy.begins);
    let template = VoteTemplate { member: order.member, electable: false, priority: 0 };
    let begins = had(&copy.begins, found.from);
    let vote: Vote = template.fill(Standing::Sealed, position, copy.timeline, begins, known);
    Some(Proposal::Vote { term: order.term, vote })
}

/// What can be had of a line of history from a position on: of each timeline, where that begins.
fn had(begins: &[(Timeline, Lsn)], from: Lsn) -> Vec<(Timeline, Lsn)> {
    let ends = begins.iter().skip(1).map(|(_, next)| Some(*next)).chain([None]);
    let legs = begins.iter().zip(ends).filter(|(_, end)| end.is_none_or(|end| end >= from));
    legs.map(|((timeline, begin), _)| (*timeline, (*begin).max(from))).collect()
}

/// Its owner has it admitted, once it is known which one it is.
pub fn admit(seen: &Observation<'_>, record: &Record) -> Option<Proposal> {
    let wanted = may_count(seen.spec, record) && record.repository().is_none();
    let view = seen.local.archive.as_ref().filter(|_| wanted)?;
    let above = view.admitted?;
    Some(Proposal::AdmitRepository { owner: seen.me.clone(), above })
}

/// It is dismissed once no rule counts it any more. Until then it stays where it is, whatever the file says by now.
pub fn leaves(seen: &Observation<'_>, record: &Record) -> Leaving {
    let Some(member) = record.repository() else { return Leaving::Gone };
    if may_count(seen.spec, record) {
        return Leaving::Stays;
    }
    if record.rules.as_ref().is_some_and(|rules| rules.involve_node(&member.node)) {
        return Leaving::Counts;
    }
    Leaving::Goes
}

/// Where the repository is on its way out of the herd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    Gone,
    Stays,
    /// Unwanted, and a rule in force counts it yet.
    Counts,
    /// Nothing holds it.
    Goes,
}

/// May this node make itself a copy from the repository, to lead? It has none, and nothing speaks against its leading.
pub fn may_inherit(seen: &Observation<'_>, record: &Record) -> bool {
    let node = seen.spec.node(seen.me).filter(|node| node.electable());
    let barred = record.nodes.get(seen.me).is_some_and(|entry| entry.barred.is_some());
    let local = seen.local;
    let nothing = match &local.postgres {
        Postgres::Absent => true,
        // One that runs is replaying what it was made of, or did when this agent ended.
        Postgres::Stopped(_) | Postgres::Starting | Postgres::Standby(_) => {
            local.durable.rebuilding && local.durable.held.is_none()
        }
        _ => false,
    };
    node.is_some()
        && nothing
        && !barred
        && !local.stopping
        && local.damage.is_none()
        && !record.is_restored(seen.me)
        && seen.store.caught_up
        && is_there(seen.spec, record)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::ha::election::{Tally, Waiting, inheritance, tally};
    use crate::ha::tests::{observation, spec};
    use crate::observation::{Copy, Peer, Report, SealedRepository};
    use crate::record::{Cause, Position, Refusal, Reign, Rule, Rules};
    use crate::spec::backup::Location;
    use crate::spec::{BackupSpec, RepositorySpec, Times};
    use crate::types::{Incarnation, Term};

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    fn member(text: &str) -> Member {
        text.parse().unwrap()
    }

    fn voting(names: &[&str]) -> ClusterSpec {
        let mut spec = spec(names);
        let location = Location::Directory("/backups".into());
        let mut backup = BackupSpec::new(RepositorySpec { location, secret: None });
        backup.voter = true;
        spec.backup = Some(backup);
        spec
    }

    fn changed(record: &Record, proposal: Proposal) -> Record {
        let next = record.apply(&proposal).unwrap_or_else(|refusal| panic!("{proposal:?}: {refusal}"));
        crate::invariants::record(&next).unwrap();
        crate::invariants::step(record, &next).unwrap();
        next
    }

    /// `a` reigns in term 4 on timeline 5, and commits wait for one of `voters` or the repository, which has the number after theirs.
    fn reigning(voters: &[&str]) -> Record {
        let mut record = Record::empty();
        record = changed(&record, Proposal::Found { node: name("a") });
        let system = crate::types::SystemId(1);
        record = changed(&record, Proposal::Founded { node: name("a"), system, needed: 1 });
        record.term = Term(4);
        let line = |timeline, term, parent| crate::record::Line {
            timeline: Timeline(timeline),
            term: Term(term),
            parent,
            begin: Some(Lsn(0x100)),
        };
        record.lines.push(line(5, 4, Some(Timeline(1))));
        record.reign = Some(Reign {
            holder: member("a_1"),
            timeline: Timeline(5),
            promoted: true,
            elected_at: Lsn(0x100),
            promoted_at: Lsn(0x100),
            gate_opened: true,
            predecessor_gone: true,
        });
        for voter in voters {
            record = changed(&record, Proposal::Enlist { node: name(voter), from: Incarnation(0) });
        }
        let archive = Some(("file:///backups".to_owned(), name("a")));
        record = changed(&record, Proposal::OwnArchive { term: Term(4), archive });
        let repository = "one".to_owned();
        record = changed(&record, Proposal::UseRepository { owner: name("a"), repository });
        let above = Incarnation(6);
        record = changed(&record, Proposal::AdmitRepository { owner: name("a"), above });
        let voters = voters.iter().filter_map(|voter| record.member(&name(voter)));
        let members: BTreeSet<Member> = voters.chain([member("a_1")]).chain(record.repository()).collect();
        let current = Rule { members, needed: 1 };
        record.rules = Some(Rules { current, next: None, superseded: Vec::new(), change: 0 });
        record
    }

    fn elected(record: &Record) -> Record {
        let (cause, by) = (Cause::AgentSilent, name("w"));
        let open = Proposal::Open { term: record.term, cause, by, released: false, poisoned: false };
        changed(record, open)
    }

    fn voted(voter: &str, lsn: u64, electable: bool) -> Proposal {
        let vote = Vote {
            member: member(voter),
            standing: Standing::Sealed,
            position: Position { term: Term(4), lsn: Lsn(lsn) },
            timeline: Timeline(5),
            begins: vec![(Timeline(1), Lsn::ZERO), (Timeline(5), Lsn(0x100))],
            electable,
            priority: 100,
        };
        Proposal::Vote { term: Term(5), vote }
    }

    const OF_REPOSITORY: &str = "pgherd_repository_7";

    #[test]
    fn its_incarnation_is_above_all_that_have_left_something_there() {
        let record = reigning(&[]);
        assert_eq!(record.repository(), Some(member(OF_REPOSITORY)));
        let again = Proposal::AdmitRepository { owner: name("a"), above: Incarnation(0) };
        assert_eq!(record.apply(&again), Err(Refusal::Stale));
        let next = changed(&record, Proposal::Enlist { node: name("b"), from: Incarnation(0) });
        assert_eq!(next.member(&name("b")), Some(member("b_8")));
    }

    #[test]
    fn while_a_rule_counts_it_neither_it_nor_its_place_goes() {
        let mut record = reigning(&["b"]);
        let term = record.term;
        let elsewhere = |archive: Option<&str>| Proposal::OwnArchive {
            term,
            archive: archive.map(|place| (place.to_owned(), name("b"))),
        };
        let dismiss = Proposal::DismissRepository { term };
        for proposal in [&dismiss, &elsewhere(None), &elsewhere(Some("/others"))] {
            assert!(matches!(record.apply(proposal), Err(Refusal::Unsafe(_))), "{proposal:?}");
        }
        changed(&record, elsewhere(Some("file:///backups")));
        record.rules.as_mut().unwrap().current.members.remove(&member(OF_REPOSITORY));
        for proposal in [dismiss, elsewhere(None), elsewhere(Some("/others"))] {
            assert_eq!(changed(&record, proposal).repository(), None);
        }
    }

    #[test]
    fn it_never_leads_whoever_says_so() {
        let record = reigning(&["b"]);
        let force = Proposal::Force { term: Term(4), to: NodeName::repository(), by: name("b") };
        assert!(matches!(record.apply(&force), Err(Refusal::Unsafe(_))));
        let elected = elected(&record);
        assert!(matches!(elected.apply(&voted(OF_REPOSITORY, 0x500, true)), Err(Refusal::Unsafe(_))));
    }

    #[test]
    fn what_only_it_has_is_taken_from_it_first() {
        let record = changed(&elected(&reigning(&["b"])), voted("b_2", 0x300, true));
        let missing = BTreeSet::from([name("a"), NodeName::repository()]);
        assert_eq!(
            tally(&record, true),
            Tally::Wait(Waiting::Votes { missing }),
            "one of them may have more"
        );
        let record = changed(&record, voted(OF_REPOSITORY, 0x500, false));
        let until = Position { term: Term(4), lsn: Lsn(0x500) };
        let (candidate, source) = (member("b_2"), member(OF_REPOSITORY));
        assert_eq!(tally(&record, true), Tally::CatchUp { candidate, source, until });
        assert_eq!(inheritance(&record), None, "somebody can lead");
        let record = changed(&record, voted("b_2", 0x500, true));
        assert_eq!(tally(&record, true), Tally::Winner(member("b_2")));
    }

    #[test]
    fn who_ends_before_the_oldest_wal_there_cannot_take_the_rest_and_an_empty_node_can() {
        let line = [(Timeline(1), Lsn::ZERO), (Timeline(3), Lsn(0x100)), (Timeline(5), Lsn(0x300))];
        assert_eq!(had(&line, Lsn::ZERO), line);
        assert_eq!(had(&line, Lsn(0x100)), [(Timeline(1), Lsn(0x100)), line[1], line[2]]);
        assert_eq!(had(&line, Lsn(0x200)), [(Timeline(3), Lsn(0x200)), line[2]]);
        assert_eq!(had(&line, Lsn(0x400)), [(Timeline(5), Lsn(0x400))]);

        let behind = changed(&elected(&reigning(&["b"])), voted("b_2", 0x300, true));
        let from = |from: u64| {
            let mut proposal = voted(OF_REPOSITORY, 0x500, false);
            if let Proposal::Vote { vote, .. } = &mut proposal {
                vote.begins = had(&vote.begins, Lsn(from));
            }
            changed(&behind, proposal)
        };
        assert!(matches!(tally(&from(0x300), true), Tally::CatchUp { .. }));
        let record = from(0x301);
        assert_eq!(tally(&record, true), Tally::Wait(Waiting::NobodyElectable));
        assert!(inheritance(&record).is_some(), "a has lost its copy, and may make one of it");
        let replaced = Proposal::Inherit { term: Term(5), node: name("b"), from: Incarnation(0) };
        assert!(matches!(record.apply(&replaced), Err(Refusal::Unsafe(_))), "b has a copy");
    }

    #[test]
    fn a_node_without_a_copy_leads_with_what_the_repository_has_and_the_rules_go_on_counting() {
        let record = elected(&reigning(&[]));
        let after =
            |node: &str, from| Proposal::Inherit { term: Term(5), node: name(node), from: Incarnation(from) };
        let inherit = |node: &str| after(node, 0);
        assert_eq!(record.apply(&inherit("b")), Err(Refusal::Stale), "the repository has not voted");
        let record = changed(&record, voted(OF_REPOSITORY, 0x500, false));
        assert_eq!(tally(&record, true), Tally::Wait(Waiting::NobodyElectable));
        // The node whose copy was lost, and another one, at once.
        let record = changed(&changed(&record, inherit("a")), inherit("b"));
        assert_eq!(record.member(&name("a")), Some(member("a_1")), "until it has won");
        assert_eq!(record.stands_as(&name("a")), Some(member("a_8")));
        assert_eq!(record.member(&name("b")), None);
        assert_eq!(record.apply(&inherit("b")), Err(Refusal::Stale), "asked for once, and answered");
        let again = changed(&record, after("b", 9));
        assert_eq!(again.stands_as(&name("b")), Some(member("b_10")), "what it had made was lost");
        let stored = serde_json::to_value(&record).unwrap();
        assert_eq!(stored["election"]["heirs"], serde_json::json!({ "a": 8, "b": 9 }));
        assert_eq!(serde_json::from_value::<Record>(stored).unwrap(), record);

        let short = changed(&record, voted("b_9", 0x400, true));
        assert!(matches!(tally(&short, true), Tally::CatchUp { .. }), "it has less than that");
        let back = changed(&record, voted("a_1", 0x600, true));
        assert_eq!(
            back.holder(),
            Some(&member("a_1")),
            "the former holder has come back, and all have voted"
        );
        assert_eq!(back.member(&name("b")), None);

        let after = changed(&record, voted("a_8", 0x500, true));
        let decide = Proposal::Decide { term: Term(5), winner: name("a"), patient: true };
        let led = if after.election.is_some() { changed(&after, decide) } else { after };
        assert_eq!((led.holder(), led.member(&name("a"))), (Some(&member("a_8")), Some(member("a_8"))));
        let members = BTreeSet::from([member("a_8"), member(OF_REPOSITORY)]);
        assert_eq!(led.rules.unwrap().current.members, members);
    }

    #[test]
    fn where_nothing_is_promised_nobody_inherits_unasked() {
        let mut record = elected(&reigning(&[]));
        record.rules.as_mut().unwrap().current.needed = 0;
        let record = changed(&record, voted(OF_REPOSITORY, 0x500, false));
        assert_eq!(inheritance(&record), None);
        let mut forced = elected(&reigning(&[]));
        forced.election.as_mut().unwrap().forced = Some(name("b"));
        let forced = changed(&forced, voted(OF_REPOSITORY, 0x500, false));
        assert_eq!(inheritance(&forced), None, "an operator has named somebody");
    }

    /// What an agent called `me` sees of this record.
    fn with<T>(
        me: &str,
        record: &Record,
        local: &Local,
        peers: &BTreeMap<NodeName, Peer>,
        look: impl FnOnce(&Observation<'_>) -> T,
    ) -> T {
        let (me, times, spec) = (name(me), Times::default(), voting(&["a", "b"]));
        look(&observation(&me, &spec, &times, record, local, peers))
    }

    #[test]
    fn its_position_counts_what_its_owners_have_adopted_and_is_told_once() {
        let record = elected(&reigning(&["b"]));
        let order = SealOrder { member: member(OF_REPOSITORY), term: Term(5) };
        let found = |adopted: &[(u32, u64)]| SealedRepository {
            order: order.clone(),
            copy: Copy {
                system: None,
                timeline: Timeline(5),
                end: Some(Lsn(0x500)),
                begins: vec![(Timeline(1), Lsn::ZERO), (Timeline(5), Lsn(0x100))],
            },
            from: Lsn::ZERO,
            adopted: adopted.iter().map(|(timeline, term)| (Timeline(*timeline), Term(*term))).collect(),
        };
        let told = |record: &Record, sealed: Option<SealedRepository>| {
            let repository = crate::observation::RepositoryView { sealed, ..Default::default() };
            let local = Local { repository, ..Local::default() };
            with("w", record, &local, &BTreeMap::new(), |seen| (seal(seen, record), vote(seen, record)))
        };
        assert_eq!(told(&record, None), (Some(order.clone()), None));
        let position = |proposal: Option<Proposal>| match proposal {
            Some(Proposal::Vote { vote, .. }) => (vote.position, vote.electable),
            other => panic!("{other:?}"),
        };
        let full = Position { term: Term(4), lsn: Lsn(0x500) };
        assert_eq!(position(told(&record, Some(found(&[(5, 4)]))).1), (full, false));
        let up_to_the_fork = Position { term: Term(0), lsn: Lsn(0x100) };
        assert_eq!(position(told(&record, Some(found(&[(5, 3)]))).1), (up_to_the_fork, false));
        let older =
            SealedRepository { order: SealOrder { term: Term(4), ..order.clone() }, ..found(&[(5, 4)]) };
        assert_eq!(told(&record, Some(older)).1, None, "sealed for another election");
        let after = changed(&record, voted(OF_REPOSITORY, 0x500, false));
        assert_eq!(told(&after, Some(found(&[(5, 4)]))), (None, None));
    }

    #[test]
    fn it_answers_where_anybody_who_is_heard_has_its_answer() {
        let record = reigning(&["b"]);
        let now = Instant::from_boot(Duration::from_secs(100));
        let reaches = |own: Option<u64>, heard: u64, reaches_repository: bool| {
            let at = |millis| Instant::from_boot(Duration::from_millis(millis));
            let report = Some(Report { reaches_repository, ..Report::default() });
            let peer = Peer { heard: Some(at(heard)), report, ..Peer::default() };
            let peers = BTreeMap::from([(name("b"), peer)]);
            let mut local = Local::default();
            local.repository.answered = own.map(at);
            with("w", &record, &local, &peers, |seen| answers(now, seen))
        };
        assert!(reaches(Some(98_500), 0, false) && !reaches(Some(97_000), 0, false));
        assert!(reaches(None, 99_500, true) && !reaches(None, 99_500, false));
        assert!(!reaches(None, 90_000, true), "that was long ago");
    }

    #[test]
    fn its_owner_streams_from_the_holder_and_goes_on_while_a_term_is_elected() {
        let record = reigning(&["b"]);
        let local = Local { postgres: Postgres::Absent, ..Local::default() };
        let order = |me: &str, record: &Record| {
            with(me, record, &local, &BTreeMap::new(), |seen| stream(seen, record))
        };
        let expected = StreamOrder {
            member: member(OF_REPOSITORY),
            term: Term(4),
            source: name("a"),
            timeline: Timeline(5),
            line: Term(4),
        };
        assert_eq!(order("a", &record), Some(expected.clone()));
        assert_eq!(order("b", &record), None, "it is not the owner");
        assert_eq!(order("a", &elected(&record)), Some(expected), "what ends it is the seal");
    }
}
