//! Who sees to the cluster's repository, and from whom a base backup is taken.
//!
//! The holder of the term chooses the owner: a standby, on another host than the primary's where there is one, so that the loss of
//! one host takes either the primary or the way of its WAL into the repository and not both; the primary only where there is nobody else. The owner
//! streams WAL, says when a base backup is due, and whose server is copied for it, again a standby by preference.
//!
//! WAL that the repository lacks the owner asks the members for, and only what is on the line of history of the reign: what a former primary wrote behind
//! its successor's fork nobody has agreed on.
//!
//! Two owners for a moment do no harm: objects are written once, with the same content. So an owner is replaced without asking it.
//!
//! Hazard: none of this may hold up an election or a rule. It proposes, and waits for nothing.

use std::time::Duration;

use crate::ha::repository::{self, Leaving};
use crate::ha::{Memory, heard_lately};
use crate::observation::{Observation, Postgres, Running};
use crate::record::{Archive, BackupEnd, BackupOutcome, DrillEnd, Proposal, Record};
use crate::spec::{ClusterSpec, NodeSpec};
use crate::types::{Instant, Lsn, NodeName, Timeline};

/// An owner that is silent, or has no server, for longer is replaced: with the silence that makes it suspect this is below five seconds.
pub const OWNER_PATIENCE: Duration = Duration::from_secs(3);
/// Where the repository counts for commits, they may wait for another owner.
pub const VOTERS_OWNER_PATIENCE: Duration = Duration::from_millis(500);
/// A base backup whose agent is silent for longer has failed. One that was only restarted takes it up again before.
pub const BACKUP_PATIENCE: Duration = Duration::from_secs(60);
/// After a failure, before the next one begins by itself.
pub const BACKUP_RETRY_S: i64 = 300;

/// The line of history that the herd has agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    pub timeline: Timeline,
    /// Timelines that it was on before and where it left them, the latest first, as far back as the record knows.
    pub forks: Vec<(Timeline, Lsn)>,
}

/// As the record has it; `None` while an election is open, or its winner has not been promoted: then nobody can tell where the line goes.
pub fn agreed(record: &Record) -> Option<Agreed> {
    let timeline = record.open_reign().filter(|reign| reign.promoted)?.timeline;
    let mut forks = Vec::new();
    let mut line = record.line(timeline);
    // Numbers fall strictly on the way up, so the walk ends even over a broken record.
    while let Some((parent, begin)) =
        line.and_then(|line| Some((line.parent.filter(|parent| *parent < line.timeline)?, line.begin?)))
    {
        forks.push((parent, begin));
        line = record.line(parent);
    }
    Some(Agreed { timeline, forks })
}

impl Agreed {
    /// Whether this is the history that was agreed on, given as the timelines that it left and where.
    pub fn is(&self, timeline: Timeline, left: &[(Timeline, Lsn)]) -> bool {
        timeline == self.timeline && self.forks.iter().all(|fork| left.contains(fork))
    }
}

/// Who is asked for WAL that the repository lacks, in this order: the owner's own server, which costs nobody anything; standbys; at last the primary.
pub fn askees<'a>(
    cluster: &'a ClusterSpec,
    me: &NodeName,
    primary: Option<&NodeName>,
) -> impl Iterator<Item = &'a NodeName> {
    let rank = |node: &NodeName| (node != me, Some(node) == primary);
    let mut nodes: Vec<&NodeName> = cluster.nodes.iter().map(|node| &node.name).collect();
    nodes.sort_by_key(|node| rank(node));
    nodes.into_iter()
}

/// Which base backup counts as the newest that leads to the present, by when they began. One before a hole does for as long as members have yet
/// to be asked for what is missing: what is found makes another backup needless.
pub fn newest(leads: Option<i64>, before_hole: Option<i64>, was_asked: bool) -> Option<i64> {
    leads.or(before_hole.filter(|_| !was_asked))
}

/// What this node has to propose, as holder of the term and as owner.
pub fn decide(memory: &mut Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Vec<Proposal> {
    if record.election.is_some() || !seen.store.caught_up {
        return Vec::new();
    }
    let holds = record.open_reign().is_some_and(|reign| reign.promoted && reign.holder.node == *seen.me);
    let mut proposals = Vec::new();
    if holds && matches!(seen.local.postgres, Postgres::Primary(_)) {
        proposals.extend(ownership(memory, now, seen, record));
    }
    if let Some(archive) = &record.archive {
        if let Some(end) = seen.local.backup_ended.as_ref().filter(|end| is_under_way(archive, end)) {
            proposals.push(Proposal::EndBackup { end: end.clone() });
        }
        if let Some(end) = seen.local.drill_ended.as_ref().filter(|end| is_news(archive, end)) {
            proposals.push(Proposal::EndDrill { end: end.clone() });
        }
        if archive.owner == *seen.me {
            proposals.extend(repository::admit(seen, record));
            proposals.extend(as_owner(memory, now, seen, archive));
        }
    }
    proposals
}

/// Is this node the owner of the repository that the specification names? Where that is counted for commits, the owner goes on while its own server
/// does not run: it streams from the holder.
pub fn is_owned(seen: &Observation<'_>, record: &Record) -> bool {
    let archive = record.archive.as_ref().filter(|archive| archive.owner == *seen.me);
    archive.is_some_and(|archive| place(seen).as_ref() == Some(&archive.place))
        && !record.is_restored(seen.me)
        && (repository::counted(record).is_some()
            || matches!(seen.local.postgres, Postgres::Standby(_) | Postgres::Primary(_)))
}

/// The number of the base backup that this node is to take.
pub fn backup_here(seen: &Observation<'_>, record: &Record) -> Option<u64> {
    let archive = record.archive.as_ref().filter(|archive| place(seen).as_ref() == Some(&archive.place))?;
    let backup = archive.backup.as_ref().filter(|backup| backup.node == *seen.me)?;
    let is_up = matches!(seen.local.postgres, Postgres::Standby(_) | Postgres::Primary(_))
        && !record.is_restored(seen.me);
    let has_ended = seen.local.backup_ended.as_ref().is_some_and(|end| end.number == backup.number);
    (is_up && !has_ended).then_some(backup.number)
}

/// Whether this node is to restore a backup, to see whether it can be. The owner does it, so that there is one at a time, and only beside a standby:
/// a primary's host has its work. While this server is copied it waits: one of the two at a time has the disk.
pub fn drill_here(seen: &Observation<'_>, record: &Record) -> bool {
    let Some(archive) = record.archive.as_ref().filter(|_| is_owned(seen, record)) else { return false };
    let Some(view) = &seen.local.archive else { return false };
    let is_copied = archive.backup.as_ref().is_some_and(|backup| backup.node == *seen.me);
    let untold = seen.local.drill_ended.as_ref().is_some_and(|end| is_news(archive, end));
    let after = archive.drill.as_ref().map(|drill| drill.began_unix_seconds);
    let is_standby = matches!(seen.local.postgres, Postgres::Standby(_));
    is_standby && view.drill_is_due && view.drill_after == after && !untold && !is_copied
}

/// Whether a drill begins by itself, in seconds since 1970 as in [`is_due`]: at the first moment of its schedule behind the last one, and, where there was none,
/// behind the newest backup.
pub fn is_drill_due(newest_began: Option<i64>, scheduled: Option<i64>, last_began: Option<i64>) -> bool {
    let since = last_began.or(newest_began);
    newest_began.is_some() && since.zip(scheduled).is_some_and(|(since, scheduled)| scheduled > since)
}

/// Whether the record lacks the end of this drill. That of another node which has begun later is the newer one.
fn is_news(archive: &Archive, end: &DrillEnd) -> bool {
    archive.drill.as_ref().is_none_or(|known| {
        known != end && (known.node == end.node || known.began_unix_seconds <= end.began_unix_seconds)
    })
}

/// Whether a base backup begins by itself. All times are in seconds since 1970: `newest_began` of the newest backup that leads to the
/// present, `scheduled` the last moment that the schedule names, `failed` when the last attempt failed, if none has succeeded since.
pub fn is_due(now: i64, newest_began: Option<i64>, scheduled: Option<i64>, failed: Option<i64>) -> bool {
    // Also if the clock was set back since: nobody waits for longer than that.
    let rests = failed.is_some_and(|failed| (0..BACKUP_RETRY_S).contains(&now.saturating_sub(failed)));
    let is_wanted = newest_began.is_none_or(|began| scheduled.is_some_and(|scheduled| scheduled > began));
    is_wanted && !rests
}

fn place(seen: &Observation<'_>) -> Option<String> {
    seen.spec.backup.as_ref().map(|backup| backup.repository.location.to_string())
}

fn is_under_way(archive: &Archive, end: &BackupEnd) -> bool {
    archive.backup.as_ref().is_some_and(|backup| backup.number == end.number && backup.node == end.node)
}

fn ownership(memory: &mut Memory, now: Instant, seen: &Observation<'_>, record: &Record) -> Option<Proposal> {
    let term = record.term;
    match repository::leaves(seen, record) {
        // WAL goes on to where it counts.
        Leaving::Counts => return None,
        Leaving::Goes => return Some(Proposal::DismissRepository { term }),
        Leaving::Gone | Leaving::Stays => {}
    }
    let Some(place) = place(seen) else {
        return record.archive.is_some().then_some(Proposal::OwnArchive { term, archive: None });
    };
    let best = best(now, seen)?;
    let own =
        |node: &NodeSpec| Proposal::OwnArchive { term, archive: Some((place.clone(), node.name.clone())) };
    let Some(archive) = record.archive.as_ref().filter(|archive| archive.place == place) else {
        return Some(own(best));
    };
    let owner = seen.spec.node(&archive.owner);
    let fit = owner.filter(|owner| is_fit(now, seen, owner));
    let Some(owner) = fit else {
        let since = match &memory.owner_unfit_since {
            Some((node, since)) if *node == archive.owner => *since,
            _ => now,
        };
        memory.owner_unfit_since = Some((archive.owner.clone(), since));
        let counts = repository::counted(record).is_some();
        let patience = if counts { VOTERS_OWNER_PATIENCE } else { OWNER_PATIENCE };
        return (now.since(since) >= patience).then(|| own(best));
    };
    memory.owner_unfit_since = None;
    // Only for another host or another role: among equals it stays.
    (closeness(seen, best) < closeness(seen, owner)).then(|| own(best))
}

fn as_owner(
    memory: &mut Memory,
    now: Instant,
    seen: &Observation<'_>,
    archive: &Archive,
) -> Option<Proposal> {
    let view = seen.local.archive.as_ref()?;
    let owner = || seen.me.clone();
    if let (None, Some(repository)) = (&archive.repository, &view.repository) {
        return Some(Proposal::UseRepository { owner: owner(), repository: repository.clone() });
    }
    if let Some(backup) = &archive.backup {
        let failed = |why: String| {
            let (number, node) = (backup.number, backup.node.clone());
            let outcome = BackupOutcome::Failed { why };
            Proposal::EndBackup { end: BackupEnd { number, node, unix_seconds: None, outcome } }
        };
        if seen.store.record.is_some_and(|record| record.is_restored(&backup.node)) {
            return Some(failed(format!("the copy of {} is taken back to an earlier moment", backup.node)));
        }
        if backup.node == *seen.me || heard_lately(now, seen, &backup.node) {
            memory.backup_silent_since = None;
            return None;
        }
        let since = match memory.backup_silent_since {
            Some((number, since)) if number == backup.number => since,
            _ => now,
        };
        memory.backup_silent_since = Some((backup.number, since));
        let why = format!("the agent of {} has not been heard for a minute", backup.node);
        return (now.since(since) >= BACKUP_PATIENCE).then(|| failed(why));
    }
    // Without WAL it would be worth nothing; but who asks for one is told why there is none.
    let ended = archive.ended.as_ref().map_or(0, |end| end.number);
    let begins = archive.asked || (view.backup_is_due && view.streams && view.after == ended);
    let node = best(now, seen).filter(|_| begins)?.name.clone();
    Some(Proposal::BeginBackup { owner: owner(), node })
}

/// Runs PostgreSQL, and says so. One that is taken back to an earlier moment has nothing of the present.
fn is_fit(now: Instant, seen: &Observation<'_>, node: &NodeSpec) -> bool {
    if seen.store.record.is_some_and(|record| record.is_restored(&node.name)) {
        return false;
    }
    if node.name == *seen.me {
        return matches!(seen.local.postgres, Postgres::Standby(_) | Postgres::Primary(_));
    }
    let report = seen.peers.get(&node.name).and_then(|peer| peer.report.as_ref());
    let runs = report.is_some_and(|report| matches!(report.running, Running::Standby | Running::Primary));
    runs && heard_lately(now, seen, &node.name)
}

/// How much is lost, or disturbed, together with the primary: the less the better.
fn closeness(seen: &Observation<'_>, node: &NodeSpec) -> (bool, bool) {
    let primary = seen.store.record.and_then(Record::holder).map(|holder| &holder.node);
    let host = primary.and_then(|primary| seen.spec.node(primary)).map(|primary| &primary.host);
    (host == Some(&node.host), primary == Some(&node.name))
}

/// The node that is furthest from the primary; among equals one that is not late on purpose, then the first of the file.
fn best<'a>(now: Instant, seen: &Observation<'a>) -> Option<&'a NodeSpec> {
    let fit = seen.spec.nodes.iter().filter(|node| is_fit(now, seen, node));
    fit.min_by_key(|node| (closeness(seen, node), node.delay.is_some()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ha::tests::{observation, spec};
    use crate::observation::{ArchiveView, Local, Peer, Primary, Report, Standby};
    use crate::record::{Reign, Rule, Rules};
    use crate::spec::backup::Location;
    use crate::spec::{BackupSpec, ClusterSpec, RepositorySpec, Times};
    use crate::types::{Incarnation, Lsn, Member, NodeName, Term, Timeline};

    const SECOND: Duration = Duration::from_secs(1);

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    /// Three nodes of which `a` leads, and what one of them sees.
    struct Scene {
        spec: ClusterSpec,
        record: Record,
        peers: BTreeMap<NodeName, Peer>,
        memory: Memory,
        now: Instant,
    }

    impl Scene {
        /// On these hosts.
        fn on(hosts: [&str; 3]) -> Scene {
            let mut spec = spec(&["a", "b", "c"]);
            for (node, host) in spec.nodes.iter_mut().zip(hosts) {
                host.clone_into(&mut node.host);
            }
            let location = Location::Directory("/backups".into());
            spec.backup = Some(BackupSpec::new(RepositorySpec { location, secret: None }));
            let holder = Member { node: name("a"), incarnation: Incarnation(1) };
            let mut record = Record::empty();
            record.term = Term(1);
            let rule = Rule { members: [holder.clone()].into(), needed: 0 };
            record.rules = Some(Rules { current: rule, next: None, superseded: Vec::new(), change: 0 });
            record.reign = Some(Reign {
                holder,
                timeline: Timeline(3),
                promoted: true,
                elected_at: Lsn(1),
                promoted_at: Lsn(1),
                gate_opened: true,
                predecessor_gone: true,
            });
            let (peers, memory) = (BTreeMap::new(), Memory::default());
            let now = Instant::from_boot(100 * SECOND);
            let mut scene = Scene { spec, record, peers, memory, now };
            for node in ["a", "b", "c"] {
                scene.hear(node, if node == "a" { Running::Primary } else { Running::Standby });
            }
            scene
        }

        fn hear(&mut self, node: &str, running: Running) {
            let report = Some(Report { running, ..Report::default() });
            let peer = Peer { heard: Some(self.now), report, ..Peer::default() };
            self.peers.insert(name(node), peer);
        }

        /// Time passes, and these go on to be heard.
        fn pass(&mut self, span: Duration, heard: &[&str]) {
            self.now = self.now + span;
            for node in heard {
                self.peers.get_mut(&name(node)).unwrap().heard = Some(self.now);
            }
        }

        /// What `me` proposes; what it proposes is agreed.
        fn decide(&mut self, me: &str, view: Option<ArchiveView>) -> Vec<Proposal> {
            self.decide_after(me, view, None).0
        }

        /// The same when a drill has ended there; and whether one is to go on there.
        fn decide_after(
            &mut self,
            me: &str,
            view: Option<ArchiveView>,
            drill_ended: Option<DrillEnd>,
        ) -> (Vec<Proposal>, bool) {
            let (me, times) = (name(me), Times::default());
            let postgres = match me.as_str() {
                "a" => Postgres::Primary(Primary::default()),
                _ => Postgres::Standby(Standby::default()),
            };
            let local = Local { postgres, archive: view, drill_ended, ..Local::default() };
            let mut peers = self.peers.clone();
            peers.remove(&me);
            let seen = observation(&me, &self.spec, &times, &self.record, &local, &peers);
            let drills = drill_here(&seen, &self.record);
            let proposals = decide(&mut self.memory, self.now, &seen, &self.record);
            for proposal in &proposals {
                self.record = self.record.apply(proposal).unwrap();
            }
            (proposals, drills)
        }

        fn owner(&self) -> Option<&str> {
            self.record.archive.as_ref().map(|archive| archive.owner.as_str())
        }
    }

    fn due(after: u64) -> Option<ArchiveView> {
        let repository = Some("one".to_owned());
        Some(ArchiveView { repository, streams: true, backup_is_due: true, after, ..ArchiveView::default() })
    }

    fn drill(node: &str, began_unix_seconds: u64) -> DrillEnd {
        DrillEnd { node: name(node), began_unix_seconds, seconds: 60, backup: None, failed: None }
    }

    #[test]
    fn the_line_of_history_is_that_of_a_promoted_reign_and_is_left_where_it_was_recorded() {
        let mut scene = Scene::on(["x", "y", "z"]);
        let line = |timeline, parent: Option<u32>, begin: Option<u64>| crate::record::Line {
            timeline: Timeline(timeline),
            term: Term(u64::from(timeline)),
            parent: parent.map(Timeline),
            begin: begin.map(Lsn),
        };
        scene.record.lines =
            vec![line(1, None, None), line(2, Some(1), Some(100)), line(3, Some(1), Some(70))];
        let known = agreed(&scene.record).unwrap();
        assert_eq!((known.timeline, known.forks.as_slice()), (Timeline(3), &[(Timeline(1), Lsn(70))][..]));
        assert!(known.is(Timeline(3), &[(Timeline(1), Lsn(70))]));
        for (timeline, left) in [(3, (1, 71)), (3, (2, 70)), (2, (1, 70))] {
            let (ancestor, until) = left;
            assert!(
                !known.is(Timeline(timeline), &[(Timeline(ancestor), Lsn(until))]),
                "{timeline} {left:?}"
            );
        }
        // Further back than the record nobody knows better.
        scene.record.lines.remove(0);
        assert!(agreed(&scene.record).unwrap().is(Timeline(3), &[(Timeline(1), Lsn(70))]));
        scene.record.lines = vec![line(3, Some(3), Some(70))];
        assert_eq!(agreed(&scene.record).unwrap().forks, [], "a line that is its own parent ends");

        scene.record.reign.as_mut().unwrap().promoted = false;
        assert_eq!(agreed(&scene.record), None);
        scene.record.reign = None;
        assert_eq!(agreed(&scene.record), None);
    }

    #[test]
    fn the_primary_is_asked_last_and_ones_own_server_first() {
        let scene = Scene::on(["x", "y", "z"]);
        let order = |me: &str, primary: Option<&str>| -> String {
            let primary = primary.map(name);
            askees(&scene.spec, &name(me), primary.as_ref()).map(NodeName::as_str).collect()
        };
        assert_eq!(order("b", Some("a")), "bca");
        assert_eq!(order("a", Some("a")), "abc");
        assert_eq!(order("c", None), "cab");
    }

    #[test]
    fn a_hole_makes_a_backup_due_only_when_the_members_were_asked() {
        assert_eq!(newest(Some(7), None, true), Some(7));
        assert_eq!(newest(None, Some(5), false), Some(5));
        assert_eq!(newest(None, Some(5), true), None, "nobody has it");
        assert_eq!(newest(None, None, false), None, "the first one waits for nobody");
    }

    #[test]
    fn a_drill_is_made_once_by_the_owner_and_never_beside_the_primary() {
        let mut scene = Scene::on(["x", "y", "z"]);
        scene.decide("a", None);
        let view = |drill_after| {
            Some(ArchiveView { backup_is_due: false, drill_is_due: true, drill_after, ..due(0).unwrap() })
        };
        scene.decide("b", view(None));
        assert!(!scene.decide_after("c", view(None), None).1, "it is not the owner");
        assert!(scene.decide_after("b", view(None), None).1);
        let (told, drills) = scene.decide_after("b", view(None), Some(drill("b", 7)));
        assert!(!drills, "it has ended");
        assert_eq!(told, [Proposal::EndDrill { end: drill("b", 7) }]);
        let (told, drills) = scene.decide_after("b", view(None), Some(drill("b", 7)));
        assert_eq!((told.len(), drills), (0, false), "what is due was seen before it ended");
        assert!(scene.decide_after("b", view(Some(7)), Some(drill("b", 7))).1, "this is due after it");

        // Another owner has made one since.
        scene.record.archive.as_mut().unwrap().owner = name("c");
        assert_eq!(scene.decide_after("c", view(Some(7)), Some(drill("c", 9))).0.len(), 1);
        assert_eq!(
            scene.decide_after("b", None, Some(drill("b", 7))).0,
            [],
            "and the former one is not told again"
        );
        assert!(scene.record.apply(&Proposal::EndDrill { end: drill("b", 7) }).is_err());

        scene.record.archive.as_mut().unwrap().backup =
            Some(crate::record::Backup { number: 1, node: name("c") });
        assert!(!scene.decide_after("c", view(Some(9)), None).1, "its server is copied");
        scene.record.archive.as_mut().unwrap().backup = None;
        scene.record.archive.as_mut().unwrap().owner = name("a");
        assert!(!scene.decide_after("a", view(Some(9)), None).1, "it is the primary");
    }

    #[test]
    fn a_drill_is_due_at_the_first_moment_of_its_schedule_behind_the_last_one() {
        assert!(!is_drill_due(None, Some(5), None), "there is nothing to restore");
        assert!(!is_drill_due(Some(5), Some(5), None));
        assert!(is_drill_due(Some(5), Some(6), None));
        assert!(!is_drill_due(Some(5), Some(6), Some(6)));
        assert!(is_drill_due(Some(5), Some(7), Some(6)));
        assert!(!is_drill_due(Some(5), None, None), "there is no schedule");
    }

    #[test]
    fn the_owner_is_furthest_from_the_primary() {
        for (hosts, wanted) in [(["x", "x", "y"], "c"), (["x", "y", "z"], "b"), (["x", "x", "x"], "b")] {
            let mut scene = Scene::on(hosts);
            assert_eq!(scene.decide("b", None), [], "only the holder of the term chooses");
            scene.decide("a", None);
            assert_eq!(scene.owner(), Some(wanted), "{hosts:?}");
            assert_eq!(scene.decide("a", None), [], "and once is enough");
        }
    }

    #[test]
    fn the_primary_owns_it_only_while_nobody_else_can() {
        let mut scene = Scene::on(["x", "y", "z"]);
        scene.hear("b", Running::Nothing);
        scene.hear("c", Running::Unknown);
        scene.decide("a", None);
        assert_eq!(scene.owner(), Some("a"));
        scene.hear("c", Running::Standby);
        scene.decide("a", None);
        assert_eq!(scene.owner(), Some("c"));
        scene.hear("b", Running::Standby);
        assert_eq!(scene.decide("a", None), [], "among equals it stays");
    }

    #[test]
    fn a_silent_owner_is_replaced_within_five_seconds_and_not_for_a_hiccup() {
        let mut scene = Scene::on(["x", "y", "z"]);
        scene.decide("a", None);
        scene.pass(2 * SECOND, &["a", "c"]);
        assert_eq!(scene.decide("a", None), []);
        scene.pass(SECOND, &["a", "b", "c"]);
        assert_eq!(scene.decide("a", None), [], "it was a hiccup, and nothing is remembered of it");
        for _ in 0..4 {
            assert_eq!(scene.owner(), Some("b"));
            scene.pass(SECOND, &["a", "c"]);
            scene.decide("a", None);
        }
        scene.pass(SECOND, &["a", "c"]);
        scene.decide("a", None);
        assert_eq!(scene.owner(), Some("c"));
    }

    #[test]
    fn a_backup_is_begun_once_and_only_on_what_was_seen_after_the_last_one() {
        let mut scene = Scene::on(["x", "y", "z"]);
        scene.decide("a", None);
        assert!(matches!(scene.decide("b", due(0)).as_slice(), [Proposal::UseRepository { .. }]));
        let still = ArchiveView { streams: false, ..due(0).unwrap() };
        assert_eq!(scene.decide("b", Some(still)), [], "without WAL it would be worth nothing");
        let begun = scene.decide("b", due(0));
        assert_eq!(begun, [Proposal::BeginBackup { owner: name("b"), node: name("b") }]);
        assert_eq!(scene.decide("b", due(0)), []);
        let outcome = BackupOutcome::Complete { id: "20261122T020000".to_owned() };
        let end = BackupEnd { number: 1, node: name("b"), unix_seconds: Some(1), outcome };
        scene.record = scene.record.apply(&Proposal::EndBackup { end: end.clone() }).unwrap();
        assert!(scene.record.apply(&Proposal::EndBackup { end }).is_err(), "it ends once");
        assert_eq!(scene.decide("b", due(0)), [], "that was seen before it ended");
        assert_eq!(scene.decide("b", due(1)).len(), 1);
    }

    #[test]
    fn one_whose_agent_is_gone_for_a_minute_has_failed() {
        let mut scene = Scene::on(["x", "y", "y"]);
        scene.decide("a", None);
        scene.decide("b", due(0));
        scene.hear("b", Running::Standby);
        scene.decide("b", due(0));
        // Somebody else owns the archive now.
        scene.record.archive.as_mut().unwrap().owner = name("c");
        for _ in 0..62 {
            scene.pass(SECOND, &["a", "c"]);
            let ends = scene.decide("c", due(0));
            if let [Proposal::EndBackup { end }] = ends.as_slice() {
                assert!(
                    matches!(&end.outcome, BackupOutcome::Failed { why } if why.contains("b has not been heard"))
                );
                assert!(scene.now.since(Instant::from_boot(100 * SECOND)) > BACKUP_PATIENCE);
                return;
            }
        }
        panic!("nobody has ended it");
    }

    #[test]
    fn what_is_asked_for_begins_and_another_repository_is_refused() {
        let mut scene = Scene::on(["x", "y", "z"]);
        assert!(scene.record.apply(&Proposal::AskForBackup).is_err(), "there is no repository yet");
        scene.decide("a", None);
        scene.decide("b", due(0));
        let other = Proposal::UseRepository { owner: name("b"), repository: "two".to_owned() };
        assert!(matches!(scene.record.apply(&other), Err(crate::record::Refusal::Unsafe(_))));
        scene.record = scene.record.apply(&Proposal::AskForBackup).unwrap();
        let view = ArchiveView { backup_is_due: false, streams: false, ..due(0).unwrap() };
        assert_eq!(scene.decide("b", Some(view)).len(), 1);
        assert!(!scene.record.archive.as_ref().unwrap().asked);
    }

    #[test]
    fn without_a_repository_in_the_file_nobody_owns_one() {
        let mut scene = Scene::on(["x", "y", "z"]);
        scene.decide("a", None);
        let elsewhere = Location::Directory("/elsewhere".into());
        scene.spec.backup = Some(BackupSpec::new(RepositorySpec { location: elsewhere, secret: None }));
        scene.decide("a", None);
        assert_eq!(scene.record.archive.as_ref().unwrap().place, "file:///elsewhere");
        scene.spec.backup = None;
        scene.decide("a", None);
        assert_eq!(scene.record.archive, None);
    }

    #[test]
    fn a_schedule_is_due_from_its_moment_until_a_backup_has_begun_since() {
        let day = 24 * 3600;
        assert!(is_due(10 * day, None, None, None), "the first one waits for no schedule");
        assert!(!is_due(10 * day, None, None, Some(10 * day - 10)), "but rests after a failure");
        assert!(is_due(10 * day, None, None, Some(10 * day - BACKUP_RETRY_S)));
        assert!(is_due(10 * day, None, None, Some(11 * day)), "also if the clock was set back since");
        assert!(!is_due(10 * day, Some(9 * day), Some(9 * day), None));
        assert!(is_due(10 * day, Some(9 * day), Some(9 * day + 1), None));
        assert!(!is_due(10 * day, Some(9 * day), None, None));
    }
}
