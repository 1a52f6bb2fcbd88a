//! Views of constructed moments: the herd of the herd file below, as node a's agent knows it.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_api::report::CheckState;
use pgherd_api::status::{Gate, Role, State, Sync};
use pgherd_core::observation::{Copy, Postgres, Primary, Standby};
use pgherd_core::record::{
    Archive, Backup, BackupEnd, BackupOutcome, Cause, DrillEnd, Election, Line, NodeRecord, Position, Record,
    Reign, Rule, Rules, Standing, Switchover, Vote,
};
use pgherd_core::spec::backup::Location;
use pgherd_core::spec::{BackupSpec, OptionValue, ProxyOption, ProxySpec, ProxyTls, RepositorySpec, TlsMode};
use pgherd_core::types::{Instant, Lsn, NodeName, SystemId, Term, Timeline};
use pgherd_dcs::{Health, Kind, MemberHealth};

use super::*;
use crate::gossip::{ArchiveShow, BackupShow, FilledShow, Show};
use crate::mind::Deeds;

const HERD: &str = r#"
name = "shop"

[postgres]
version = 15

[[witness]]
name = "w"
host = "10.0.0.9"

[[cluster]]
name = "main"
durability = "quorum"
needed = 1

  [[cluster.node]]
  name = "a"
  host = "10.0.0.1"
  [[cluster.node]]
  name = "b"
  host = "10.0.0.2"
  [[cluster.node]]
  name = "c"
  host = "10.0.0.3"
  follow = "b"
  [[cluster.node]]
  name = "d"
  host = "10.0.0.4"
  delay = "5min"
"#;

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn at(ms: u64) -> Instant {
    Instant::from_boot(Duration::from_millis(ms))
}

fn now() -> Timestamp {
    "2026-11-20T20:54:54Z".parse().unwrap()
}

fn rule(needed: u32, members: &[&str]) -> Rule {
    Rule { needed, members: members.iter().map(|member| member.parse().unwrap()).collect() }
}

/// A moment, to be changed before it is looked at.
struct Moment {
    picture: Picture,
    store: Health,
    expires: Option<Timestamp>,
}

impl Moment {
    /// All is well: a leads term 4, b is its voter, c follows b, d is delayed, w is there.
    fn of_peace() -> Moment {
        let spec = crate::files::herd::read("herd.toml", HERD).unwrap().spec;
        let record = Record {
            founder: Some(name("a")),
            system: Some(SystemId(7_710_000_000_000_000_001)),
            term: Term(4),
            reign: Some(Reign {
                holder: "a_1".parse().unwrap(),
                timeline: Timeline(3),
                promoted: true,
                elected_at: Lsn::ZERO,
                promoted_at: Lsn(0x400_0000),
                gate_opened: true,
                predecessor_gone: true,
            }),
            rules: Some(Rules {
                current: rule(1, &["a_1", "b_2"]),
                next: None,
                superseded: Vec::new(),
                change: 3,
            }),
            nodes: ["a_1", "b_2", "c_3", "d_4"]
                .map(|member| member.parse::<Member>().unwrap())
                .map(|member| (member.node, NodeRecord { incarnation: member.incarnation, barred: None }))
                .into(),
            ..Record::empty()
        };
        let store_member = |(id, name): (u64, &str)| MemberHealth {
            raft_id: id,
            name: name.parse().unwrap(),
            address: String::new(),
            host: String::new(),
            voter: true,
            last_contact: None,
            trouble: None,
        };
        let mut moment = Moment {
            picture: Picture {
                started: None,
                now: at(100_000),
                own: gossip("a", Is::Primary, 0x500_0060, "holds-term", "holds term 4"),
                peers: Vec::new(),
                postgres: Postgres::Primary(Primary {
                    copy: Copy::default(),
                    flush_lsn: Lsn(0x500_0060),
                    senders: Vec::new(),
                    slots: Default::default(),
                }),
                deeds: Deeds { gate_open: true, ..Deeds::default() },
                confirmed: Some(at(99_800)),
                heartbeat: Some(at(99_900)),
                drain: None,
                store_reachable: true,
                spec_generation: 7,
                spec,
                record: Some(record),
            },
            store: Health {
                kind: Kind::Raft,
                leader: Some(name("b")),
                role: pgherd_dcs::Role::Follower,
                raft_term: 2,
                members: [(1, "a"), (2, "b"), (3, "w")].map(store_member).into(),
                failed: None,
            },
            expires: Some("2031-11-19T20:54:54Z".parse().unwrap()),
        };
        moment.picture.own.show.state = Some(State::Running);
        moment.picture.own.show.gate_open = true;
        moment.picture.own.show.fence_armed = Some(true);
        for (node, upstream) in [("b", "a"), ("c", "b"), ("d", "a")] {
            let mut says =
                gossip(node, Is::Standby, 0x500_0060, "follows", &format!("streams from {upstream}"));
            says.show.state = Some(State::Streaming);
            says.show.upstream = Some(name(upstream));
            says.show.replay_lsn = Some(Lsn(0x500_0000));
            says.show.replay_lag_ms = Some(if node == "d" { 300_400 } else { 12 });
            moment.picture.peers.push((name(node), Some(Duration::from_millis(120)), Some(says)));
        }
        let mut witness =
            gossip("w", Is::Nothing, 0, "witnessing", "votes in the store and has no PostgreSQL");
        (witness.flush_lsn, witness.timeline) = (None, None);
        moment.picture.peers.push((name("w"), Some(Duration::from_millis(200)), Some(witness)));
        moment
    }

    fn sight(&self) -> Sight<'_> {
        Sight { picture: &self.picture, store: &self.store, certificate_expires: self.expires, now: now() }
    }

    fn record(&mut self) -> &mut Record {
        self.picture.record.as_mut().unwrap()
    }

    fn peer(&mut self, node: &str) -> &mut (NodeName, Option<Duration>, Option<Gossip>) {
        self.picture.peers.iter_mut().find(|(name, _, _)| name.as_str() == node).unwrap()
    }

    fn says(&mut self, node: &str) -> &mut Gossip {
        self.peer(node).2.as_mut().unwrap()
    }

    fn silence(&mut self, node: &str, s: u64) {
        self.peer(node).1 = Some(Duration::from_secs(s));
    }

    /// As b's agent sees it. What a said becomes what b has heard.
    fn seen_by_b(mut self) -> Moment {
        let b = self.picture.peers.remove(0);
        let a = std::mem::replace(&mut self.picture.own, b.2.unwrap());
        self.picture.peers.insert(0, (name("a"), Some(Duration::from_millis(150)), Some(a)));
        self.picture.postgres = Postgres::Standby(Standby {
            copy: Copy::default(),
            follows: Some((name("a"), Term(4))),
            receiving: true,
            diverged: false,
        });
        self.picture.deeds = Deeds::default();
        self.picture.heartbeat = None;
        self
    }

    fn checks(&self) -> BTreeMap<String, (CheckState, String)> {
        let report = check(&self.sight());
        report
            .checks
            .into_iter()
            .map(|item| {
                let about = item.node.map_or_else(String::new, |node| format!(" {node}"));
                (format!("{}{about}", item.check), (item.state, item.message))
            })
            .collect()
    }

    /// The checks that are not OK.
    fn alarms(&self) -> Vec<(String, CheckState)> {
        let checks = self.checks().into_iter().filter(|(_, (state, _))| *state != CheckState::Ok);
        checks.map(|(check, (state, _))| (check, state)).collect()
    }
}

fn gossip(node: &str, running: Is, flush: u64, code: &str, reason: &str) -> Gossip {
    Gossip {
        version: 1,
        node: name(node),
        cluster: name("main"),
        term: Term(4),
        running,
        timeline: Some(Timeline(3)),
        flush_lsn: Some(Lsn(flush)),
        holds: Some(Position { term: Term(4), lsn: Lsn(flush) }),
        holder_probe_failing: None,
        wants_rebuild: false,
        damage: None,
        reaches_repository: false,
        show: Show {
            reason_code: code.to_owned(),
            reason: reason.to_owned(),
            for_ms: 60_000,
            state: Some(State::Running),
            pending_restart: Some(false),
            spec_generation: 7,
            version: "0.1.0".to_owned(),
            ..Show::default()
        },
    }
}

fn alarm(check: &str, state: CheckState) -> (String, CheckState) {
    (check.to_owned(), state)
}

#[test]
fn a_herd_in_peace() {
    let moment = Moment::of_peace();
    let status = status(&moment.sight());
    assert_eq!((status.herd.as_str(), status.generation), ("shop", 7));
    assert_eq!(status.store.leader.as_deref(), Some("b"));
    assert!(status.store.members.iter().all(|member| member.reachable == Some(true)));
    let cluster = &status.clusters[0];
    assert_eq!(cluster.system_identifier.as_deref(), Some("7710000000000000001"));
    assert_eq!((cluster.term, cluster.primary.as_deref(), cluster.gate), (Some(4), Some("a"), Gate::Open));
    assert_eq!((cluster.durability.needed, cluster.durability.degraded), (1, false));
    assert_eq!(cluster.durability.voters, ["b"]);
    let row = |index: usize| {
        let member = &cluster.members[index];
        (member.role, member.state, member.sync, member.lag_bytes, member.replay_lag_ms)
    };
    assert_eq!(row(0), (Role::Primary, State::Running, Some(Sync::Primary), Some(0), Some(0)));
    assert_eq!(row(1), (Role::Standby, State::Streaming, Some(Sync::Quorum), Some(0), Some(12)));
    assert_eq!(row(2), (Role::Standby, State::Streaming, Some(Sync::Async), Some(0), Some(12)));
    assert_eq!(row(3), (Role::Delayed, State::Streaming, Some(Sync::Async), Some(0), Some(300_400)));
    assert_eq!(row(4), (Role::Witness, State::Running, None, None, None));
    let a = &cluster.members[0];
    assert_eq!(
        (a.lsn.as_deref(), a.timeline, a.reason.as_str()),
        (Some("0/5000060"), Some(3), "holds term 4")
    );
    assert_eq!(cluster.members[2].upstream.as_deref(), Some("b"));
    assert_eq!(moment.alarms(), []);
    let explained = explain(&moment.sight());
    assert!(explained.nodes.iter().all(|node| node.waiting_for.is_empty() && node.hint.is_none()));
    assert_eq!(explained.nodes[4].cluster, None);
}

#[test]
fn what_was_said_before_the_silence_is_not_said_again() {
    let mut moment = Moment::of_peace();
    moment.silence("b", 12);
    moment.peer("d").1 = None;
    let status = status(&moment.sight());
    let b = &status.clusters[0].members[1];
    assert_eq!((b.state, b.reason.as_str()), (State::Unreachable, "has not been heard for 12 s"));
    assert_eq!((b.lsn.as_ref(), b.lag_bytes, b.timeline, b.replay_lag_ms), (None, None, None, None));
    assert_eq!((b.sync, b.upstream.as_ref(), b.pending_restart), (None, None, None));
    let d = &status.clusters[0].members[3];
    assert_eq!(d.reason, "has not been heard since this agent started");
    assert_eq!(status.store.members[1].reachable, Some(false));
    // It still counts: an acknowledged commit may be there.
    assert_eq!(status.clusters[0].durability.voters, ["b"]);
    let explained = explain(&moment.sight());
    assert_eq!(explained.nodes[1].reason_code, "not-heard");
    assert_eq!((explained.nodes[1].age_ms, explained.nodes[1].for_ms), (Some(12_000), None));
    assert!(explained.nodes[1].hint.as_ref().unwrap().contains("host of b"));
    let alarms = moment.alarms();
    for expected in [
        alarm("agent b", CheckState::Warning),
        alarm("agent d", CheckState::Warning),
        alarm("commits", CheckState::Critical),
        alarm("voters", CheckState::Warning),
        alarm("store", CheckState::Warning),
    ] {
        assert!(alarms.contains(&expected), "{expected:?} is not among {alarms:?}");
    }
}

#[test]
fn a_standby_that_is_far_behind_is_catching_up() {
    let mut moment = Moment::of_peace();
    moment.says("b").flush_lsn = Some(Lsn(0x300_0000));
    let status = status(&moment.sight());
    let b = &status.clusters[0].members[1];
    assert_eq!((b.state, b.lag_bytes), (State::CatchingUp, Some(0x200_0060)));
    let (state, message) = &moment.checks()["lag b"];
    assert_eq!((*state, message.as_str()), (CheckState::Warning, "32 MiB behind the primary"));
}

/// The primary and its only voter are lost together: nobody is promoted, and it is said why, what is at risk,
/// and how to override it.
#[test]
fn the_primary_and_its_only_voter_lost_together() {
    let mut moment = Moment::of_peace().seen_by_b();
    // Seen by c, which is left with d and w.
    let c = moment.picture.peers.iter().position(|(name, _, _)| name.as_str() == "c").unwrap();
    let (_, _, c) = moment.picture.peers.remove(c);
    let b = std::mem::replace(&mut moment.picture.own, c.unwrap());
    moment.picture.peers.push((name("b"), Some(Duration::from_secs(20)), Some(b)));
    moment.silence("a", 21);
    assert_eq!(moment.sight().missing_votes(), [&name("a"), &name("b")]);
    let explained = explain(&moment.sight());
    let of = |node: &str| explained.nodes.iter().find(|found| found.node == node).unwrap();
    let override_it = "pgherd failover --to c --accept-data-loss";
    assert!(of("c").hint.as_ref().unwrap().ends_with(override_it), "{:?}", of("c").hint);
    assert_eq!(
        of("c").waiting_for,
        [
            "the vote of a, which has not been heard for 21 s: an acknowledged commit may be only there",
            "the vote of b, which has not been heard for 20 s: an acknowledged commit may be only there",
        ]
    );
    assert!(of("a").reason.starts_with("holds term 4 and has not been heard for 21 s"));
    assert!(of("w").waiting_for.is_empty() && of("w").hint.is_none());
    let checks = moment.checks();
    assert_eq!(checks["primary a"].0, CheckState::Critical);
    assert_eq!(checks["store"].0, CheckState::Critical, "one of three voters is left: {:?}", checks["store"]);
}

#[test]
fn an_election_that_waits_says_for_whom() {
    let mut moment = Moment::of_peace().seen_by_b();
    moment.silence("a", 15);
    let vote = |member: &str, lsn| Vote {
        member: member.parse().unwrap(),
        standing: Standing::Sealed,
        position: Position { term: Term(4), lsn: Lsn(lsn) },
        timeline: Timeline(3),
        begins: Vec::new(),
        electable: true,
        priority: 100,
    };
    let record = moment.record();
    // Both must be known to be sealed: what b lacks may be on c.
    record.rules.as_mut().unwrap().current = rule(1, &["a_1", "b_2", "c_3"]);
    record.election = Some(Election {
        term: Term(5),
        cause: Cause::AgentSilent,
        opened_by: name("b"),
        released: false,
        forced: None,
        poisoned: false,
        votes: [(name("b"), vote("b_2", 0x500_0060))].into(),
        heirs: BTreeMap::new(),
    });
    moment.says("c").show.reason = "stops receiving, to vote in the election of term 5".to_owned();
    let status = status(&moment.sight());
    let cluster = &status.clusters[0];
    assert_eq!((cluster.term, cluster.primary.as_ref(), cluster.gate), (Some(4), None, Gate::Closed));
    assert_eq!(cluster.members[0].role, Role::Standby, "nobody holds the term");
    let explained = explain(&moment.sight());
    assert_eq!(
        explained.nodes[1].waiting_for,
        [
            "the vote of a, which has not been heard for 15 s: an acknowledged commit may be only there",
            "the vote of c, which stops receiving, to vote in the election of term 5",
        ]
    );
    // b has voted and holds the most, so b it would be.
    assert!(explained.nodes[1].hint.as_ref().unwrap().ends_with("--to b --accept-data-loss"));
    let (state, message) = &moment.checks()["primary"];
    assert_eq!(*state, CheckState::Critical);
    assert_eq!(
        message,
        "nobody leads: term 5 is being elected (the primary's agent is silent), and waits for the votes of a and c"
    );
    let gate = &moment.checks()["gate"];
    assert_eq!((gate.0, gate.1.as_str()), (CheckState::Critical, "no client is let in"));

    // What somebody wrote on c by promoting it by hand is on a timeline of nobody's, and worth nothing.
    moment.record().election.as_mut().unwrap().votes.clear();
    let c = moment.says("c");
    (c.timeline, c.flush_lsn) = (Some(Timeline(9)), Some(Lsn(0x900_0000)));
    c.holds = Some(Position { term: Term(4), lsn: Lsn(0x400_0000) });
    let hint = explain(&moment.sight()).nodes[1].hint.clone().unwrap();
    assert!(hint.ends_with("--to b --accept-data-loss"), "{hint}");
}

#[test]
fn degraded_and_waiting_commits_are_told_apart() {
    let mut moment = Moment::of_peace();
    moment.silence("b", 60);
    assert_eq!(moment.checks()["commits"].1, "commits wait: 0 of 1 needed voters stream");
    moment.record().rules.as_mut().unwrap().current = rule(0, &["a_1"]);
    let degraded = status(&moment.sight());
    assert_eq!((degraded.clusters[0].durability.needed, degraded.clusters[0].durability.degraded), (0, true));
    assert!(degraded.clusters[0].durability.voters.is_empty());
    let (state, message) = &moment.checks()["commits"];
    assert_eq!(*state, CheckState::Warning);
    assert_eq!(message, "degraded: each commit is flushed by 0 standbys instead of 1");
    assert_eq!(measurements(&moment.sight()).degraded, Some(true));
}

#[test]
fn a_barred_node_and_a_pending_restart() {
    let mut moment = Moment::of_peace();
    moment.record().nodes.get_mut(&name("b")).unwrap().barred = Some("a checksum failed".to_owned());
    moment.says("c").show.pending_restart = Some(true);
    let status = status(&moment.sight());
    assert_eq!(status.clusters[0].members[1].state, State::Barred);
    assert_eq!(status.clusters[0].members[2].pending_restart, Some(true));
    let checks = moment.checks();
    assert_eq!(checks["health b"], (CheckState::Critical, "barred: a checksum failed".to_owned()));
    assert_eq!(checks["restart c"].0, CheckState::Warning);
    assert!(explain(&moment.sight()).nodes[1].hint.as_ref().unwrap().ends_with("pgherd reinit b"));
}

#[test]
fn a_repository_that_votes_is_named_with_the_standbys_and_missed_like_one() {
    let mut moment = Moment::of_peace();
    let location = Location::Directory("/backups".into());
    let mut wanted = BackupSpec::new(RepositorySpec { location, secret: None });
    wanted.voter = true;
    moment.picture.spec.clusters[0].backup = Some(wanted);
    let record = moment.record();
    record.archive = Some(Archive {
        place: "file:///backups".to_owned(),
        repository: Some("one".to_owned()),
        owner: name("b"),
        term: Term(4),
        begun: 0,
        asked: false,
        backup: None,
        drill: None,
        ended: None,
    });
    let entry = NodeRecord { incarnation: pgherd_core::types::Incarnation(7), barred: None };
    record.nodes.insert(NodeName::repository(), entry);
    record.rules.as_mut().unwrap().current = rule(1, &["a_1", "b_2", "pgherd_repository_7"]);
    let shows = |votes| Some(ArchiveShow { votes, ..ArchiveShow::default() });
    moment.says("b").show.archive = shows(true);
    assert_eq!(status(&moment.sight()).clusters[0].durability.voters, ["b", "pgherd_repository"]);
    let checks = moment.checks();
    assert_eq!(checks["commits"], (CheckState::Ok, "each commit is flushed by 1 of 2 voters".to_owned()));
    let all = "all that may vote do, and stream: b and the repository";
    assert_eq!(checks["voters"], (CheckState::Ok, all.to_owned()));

    moment.says("b").show.archive = shows(false);
    let missed = "the repository should count for commits, and does not";
    assert_eq!(moment.checks()["voters"], (CheckState::Warning, missed.to_owned()));
    moment.record().rules.as_mut().unwrap().current = rule(1, &["a_1", "pgherd_repository_7"]);
    let wait = "commits wait: 0 of 1 needed voters stream";
    assert_eq!(moment.checks()["commits"], (CheckState::Critical, wait.to_owned()));

    // b was no voter, so what was acknowledged is there or nowhere.
    let mut moment = moment.seen_by_b();
    moment.silence("a", 15);
    moment.record().election = Some(Election {
        term: Term(5),
        cause: Cause::AgentSilent,
        opened_by: name("b"),
        released: false,
        forced: None,
        poisoned: false,
        votes: BTreeMap::new(),
        heirs: BTreeMap::new(),
    });
    let explained = explain(&moment.sight());
    let lost = "the vote of the repository, which does not answer: an acknowledged commit may be only there";
    assert!(explained.nodes[1].waiting_for.iter().any(|waits| waits == lost), "{explained:?}");
    moment.picture.own.reaches_repository = true;
    let explained = explain(&moment.sight());
    let sealed = "the vote of the repository, which answers, and is being sealed and looked at";
    assert!(explained.nodes[1].waiting_for.iter().any(|waits| waits == sealed), "{explained:?}");

    // Before there is one it is missed as long as it does not answer.
    moment.record().election = None;
    assert_eq!(explain(&moment.sight()).nodes[1].waiting_for, [] as [&str; 0]);
    moment.picture.own.reaches_repository = false;
    assert!(explain(&moment.sight()).nodes[1].waiting_for.iter().any(|waits| waits == lost));
}

#[test]
fn what_would_help_where_the_repository_is_waited_for() {
    for (code, helps) in [
        ("commits-wait-for-repository", "degrade_after"),
        ("repository-awaited", "pgherd backup list"),
        ("waiting-for-heir", "without data"),
    ] {
        let mut moment = Moment::of_peace();
        moment.says("b").show.reason_code = code.to_owned();
        let hint = explain(&moment.sight()).nodes[1].hint.clone();
        assert!(hint.as_ref().is_some_and(|hint| hint.contains(helps)), "{code}: {hint:?}");
    }
}

#[test]
fn what_can_be_restored_and_why_wal_does_not_arrive() {
    let mut moment = Moment::of_peace();
    let backup = |moment: &Moment| status(&moment.sight()).clusters[0].backup.clone();
    assert_eq!(backup(&moment), None);
    assert!(!moment.checks().contains_key("archive"), "the file names no repository");

    let location = Location::Directory("/backups".into());
    let mut wanted = BackupSpec::new(RepositorySpec { location, secret: None });
    wanted.maximum_age = Some(Duration::from_secs(3600));
    moment.picture.spec.clusters[0].backup = Some(wanted);
    let shown = backup(&moment).unwrap();
    assert_eq!((shown.repository.as_str(), shown.owner, shown.backups), ("file:///backups", None, None));
    assert_eq!(shown.trouble.as_deref(), Some("nobody streams WAL into the repository yet"));
    assert_eq!(moment.checks()["archive"].0, CheckState::Warning);

    let archive = Archive {
        place: "file:///backups".to_owned(),
        repository: None,
        owner: name("b"),
        term: Term(4),
        begun: 2,
        asked: false,
        backup: Some(Backup { number: 2, node: name("c") }),
        drill: None,
        ended: None,
    };
    moment.picture.record.as_mut().unwrap().archive = Some(archive.clone());
    assert_eq!(backup(&moment).unwrap().trouble.unwrap(), "b does not stream WAL into it at the moment");
    let began = now().as_second() - 600;
    moment.says("b").show.archive = Some(ArchiveShow {
        behind_ms: Some(1400),
        window_from: Some(began + 60),
        newest: Some("20261120T204454".to_owned()),
        newest_began: Some(began),
        backups: 1,
        ..ArchiveShow::default()
    });
    moment.says("c").show.backup =
        Some(BackupShow { number: 2, done_bytes: 7, total_bytes: 0, held_to: Some(9) });
    let shown = backup(&moment).unwrap();
    let window = shown.recovery_window.unwrap();
    assert_eq!((window.from.as_str(), window.to.as_str()), ("2026-11-20T20:45:54Z", "2026-11-20T20:54:52Z"));
    assert_eq!((shown.trouble, shown.wal_lag_seconds, shown.backups), (None, Some(1.4), Some(1)));
    let running = shown.running.unwrap();
    assert_eq!((running.node.as_str(), running.done_bytes, running.total_bytes), ("c", Some(7), None));
    assert_eq!(running.held_back_to, Some(9), "so slowly, for its clients");
    assert_eq!(moment.checks()["archive b"].0, CheckState::Ok);
    assert_eq!(
        moment.checks()["backup"],
        (CheckState::Ok, "the newest base backup is 10 min old".to_owned())
    );

    // It is old, the next attempt has failed, WAL has a hole, and its owner cannot write.
    let says = moment.says("b").show.archive.as_mut().unwrap();
    says.newest_began = Some(now().as_second() - 7200);
    says.gaps = vec!["timeline 3, 0/3000000 to 0/4000000".to_owned()];
    (says.trouble, says.behind_ms) = (Some("no space left on device".to_owned()), Some(60_000));
    assert_eq!(moment.checks()["archive b"].0, CheckState::Critical);
    assert_eq!(
        moment.checks()["archive-gaps"],
        (
            CheckState::Warning,
            "WAL is missing in the repository: timeline 3, 0/3000000 to 0/4000000".to_owned()
        )
    );
    let says = moment.says("b").show.archive.as_mut().unwrap();
    says.asked = Some("a: it has none".to_owned());
    says.filled = Some(FilledShow { unix_seconds: 0, files: 3, from: vec!["c".to_owned()] });
    assert!(moment.checks()["archive-gaps"].1.ends_with("; nobody has it: a: it has none"));
    let shown = backup(&moment).unwrap();
    let filled = shown.filled.unwrap();
    assert_eq!(
        (shown.asked.as_deref(), filled.at.as_str()),
        (Some("a: it has none"), "1970-01-01T00:00:00Z")
    );
    assert_eq!((filled.files, filled.from.as_slice()), (3, &["c".to_owned()][..]));
    assert!(
        moment.checks()["backup"].1.contains("more than maximum_age (1h)"),
        "{:?}",
        moment.checks()["backup"]
    );
    let outcome = BackupOutcome::Failed { why: "no space".to_owned() };
    let ended = Some(BackupEnd { number: 2, node: name("c"), unix_seconds: Some(0), outcome });
    moment.picture.record.as_mut().unwrap().archive = Some(Archive { backup: None, ended, ..archive });
    let ended = backup(&moment).unwrap().ended.unwrap();
    assert_eq!(
        (ended.number, ended.at.as_deref(), ended.failed.as_deref()),
        (2, Some("1970-01-01T00:00:00Z"), Some("no space"))
    );
    moment.says("b").show.archive.as_mut().unwrap().newest_began = None;
    assert_eq!(moment.checks()["backup"].0, CheckState::Critical);

    // Nobody has ever tried whether it can be restored; then it could be, and then not.
    moment.picture.spec.clusters[0].backup.as_mut().unwrap().drill = Some("0 4 * * 7".to_owned());
    assert!(!moment.checks().keys().any(|check| check.starts_with("drill")));
    let began_unix_seconds = u64::try_from(now().as_second() - 7200).unwrap();
    let drill = DrillEnd { node: name("b"), began_unix_seconds, seconds: 60, backup: None, failed: None };
    let recorded = |moment: &mut Moment, drill: &DrillEnd| {
        moment.picture.record.as_mut().unwrap().archive.as_mut().unwrap().drill = Some(drill.clone());
    };
    recorded(&mut moment, &drill);
    assert_eq!(moment.checks()["drill b"].0, CheckState::Ok);
    let failed = DrillEnd { failed: Some("indexes: by_key is damaged".to_owned()), ..drill };
    recorded(&mut moment, &failed);
    let (state, message) = moment.checks()["drill b"].clone();
    assert!(
        state == CheckState::Critical && message.ends_with("failed: indexes: by_key is damaged"),
        "{message}"
    );
    let shown = backup(&moment).unwrap().drill.unwrap();
    assert_eq!((shown.at.as_str(), shown.failed), ("2026-11-20T18:54:54Z", failed.failed));

    // What it said once is not the present when it has fallen silent.
    moment.silence("b", 12);
    let shown = backup(&moment).unwrap();
    assert_eq!((shown.recovery_window, shown.wal_lag_seconds), (None, None));
    assert!(shown.trouble.unwrap().starts_with("b, which streams WAL into it, has not been heard"));
}

#[test]
fn where_the_address_that_moves_is_and_what_is_in_its_way() {
    let mut moment = Moment::of_peace();
    assert_eq!(status(&moment.sight()).clusters[0].vip, None);
    assert!(!moment.checks().keys().any(|check| check.starts_with("vip")), "the file has none");

    let (address, interface) = ("192.168.122.10/24".parse().unwrap(), "eth0".to_owned());
    moment.picture.spec.clusters[0].vip = Some(pgherd_core::spec::VipSpec { address, interface });
    let nowhere = "clients are let in on a, and 192.168.122.10 is nowhere";
    assert_eq!(moment.checks()["vip a"], (CheckState::Critical, nowhere.to_owned()));
    assert_eq!(measurements(&moment.sight()).vip_held, Some(false));

    moment.picture.own.show.vip.held = Some("192.168.122.10/24".to_owned());
    let vip = |moment: &Moment| status(&moment.sight()).clusters[0].vip.clone().unwrap();
    assert_eq!((vip(&moment).holder.as_deref(), vip(&moment).trouble), (Some("a"), Vec::new()));
    assert_eq!(moment.checks()["vip a"], (CheckState::Ok, "192.168.122.10/24 on eth0".to_owned()));
    assert_eq!(measurements(&moment.sight()).vip_held, Some(true));

    let why = "there is no interface eth0 on this host";
    moment.says("b").show.vip.trouble = Some(why.to_owned());
    assert_eq!(vip(&moment).trouble, [format!("b: {why}")]);
    assert_eq!(moment.checks()["vip-here b"], (CheckState::Warning, why.to_owned()));
    let hint = explain(&moment.sight()).nodes[1].hint.clone().unwrap();
    assert_eq!(hint, format!("the address that moves with the gate: {why}"));

    moment.picture.own.show.vip.claimed_by = Some("02:00:00:00:00:07".to_owned());
    let (state, message) = moment.checks()["vip-here a"].clone();
    assert_eq!(state, CheckState::Critical);
    assert_eq!(message, "the station 02:00:00:00:00:07 says that it has the address as well");

    moment.says("b").show.vip.held = Some("192.168.122.10/24".to_owned());
    let twice = "192.168.122.10 is said to be on a and b";
    assert_eq!(moment.checks()["vip"], (CheckState::Critical, twice.to_owned()));
}

#[test]
fn what_goes_wrong_around_the_data() {
    let mut moment = Moment::of_peace();
    moment.picture.own.show.fence_armed = Some(false);
    moment.says("b").show.version = "0.2.0".to_owned();
    moment.says("c").show.spec_generation = 6;
    moment.says("c").timeline = Some(Timeline(2));
    moment.says("b").show.replay_lag_ms = Some(90_000);
    moment.says("d").show.replay_lag_ms = Some(900_500);
    moment.expires = Some("2026-11-30T20:54:54Z".parse().unwrap());
    moment.store.failed = Some("no space left".to_owned());
    let checks = moment.checks();
    for (check, state, message) in [
        ("fence a", CheckState::Warning, "not armed: were this agent to freeze, its PostgreSQL would go on"),
        ("version", CheckState::Warning, "a runs 0.1.0; b runs 0.2.0"),
        ("specification", CheckState::Warning, "c does not follow generation 7 yet"),
        ("timeline c", CheckState::Warning, "on timeline 2, and the primary is on 3"),
        ("replay b", CheckState::Warning, "replay is 90 s behind"),
        ("replay d", CheckState::Critical, "replay is 15 min behind, 5 min of which is its delay"),
        ("certificate a", CheckState::Warning, "ends in 10 days"),
        ("store", CheckState::Critical, "this node's member of the store has failed: no space left"),
    ] {
        assert_eq!(checks[check], (state, message.to_owned()), "{check}");
    }
    moment.expires = Some("2026-11-20T00:00:00Z".parse().unwrap());
    assert_eq!(moment.checks()["certificate a"].1, "ended at 2026-11-20T00:00:00Z");
}

#[test]
fn nothing_is_known_before_the_store_was_read() {
    let mut moment = Moment::of_peace();
    moment.picture.record = None;
    moment.picture.peers.clear();
    let status = status(&moment.sight());
    let cluster = &status.clusters[0];
    assert_eq!((cluster.term, cluster.primary.as_ref(), cluster.gate), (None, None, Gate::Closed));
    assert_eq!(cluster.system_identifier, None);
    assert!(cluster.members.iter().all(|member| member.lag_bytes.is_none() && member.sync.is_none()));
    let checks = moment.checks();
    assert_eq!((checks["primary"].0, checks["commits"].0), (CheckState::Unknown, CheckState::Unknown));
    let measured = measurements(&moment.sight());
    assert_eq!((measured.term, measured.gate_open, measured.voters, measured.lag), (None, None, None, None));
    assert_eq!(routes(&moment.sight(), "4f1c"), None);
}

#[test]
fn who_is_too_far_behind_or_is_not_wanted_for_reads_serves_none() {
    let mut moment = Moment::of_peace();
    let of = |moment: &Moment| {
        let table = routes(&moment.sight(), "4f1c").unwrap().table;
        table.standbys.into_iter().map(|is| (is.target.node, is.weight)).collect::<Vec<_>>()
    };
    let both = [("b".to_owned(), 1), ("c".to_owned(), 1)];
    assert_eq!(of(&moment), both);
    moment.says("b").show.replay_lag_ms = Some(30_001);
    assert_eq!(of(&moment), [("b".to_owned(), 0), ("c".to_owned(), 1)], "what it has begun goes on");
    let option = |value| [(ProxyOption::MaxReplayLag, value)].into();
    let never = option(OptionValue::of_time(None));
    moment.picture.spec.clusters[0].proxy = Some(ProxySpec { options: never, ..ProxySpec::default() });
    assert_eq!(of(&moment), both);
    let more = option(OptionValue::of_time(Some(Duration::from_secs(31))));
    moment.picture.spec.clusters[0].proxy = Some(ProxySpec { options: more, ..ProxySpec::default() });
    assert_eq!(of(&moment), both);
    let weigh = |moment: &mut Moment, node: &str, weight| {
        let nodes = &mut moment.picture.spec.clusters[0].nodes;
        nodes.iter_mut().find(|known| known.name.as_str() == node).unwrap().read_weight = weight;
    };
    weigh(&mut moment, "b", 7);
    weigh(&mut moment, "c", 0);
    assert_eq!(of(&moment), [("b".to_owned(), 7)]);
}

#[test]
fn where_two_are_needed_standbys_serve_those_who_ask_for_what_is_not_confirmed() {
    let mut moment = Moment::of_peace();
    let of = |moment: &Moment| routes(&moment.sight(), "4f1c").unwrap().table.standbys.len();
    assert_eq!(of(&moment), 2);
    moment.record().rules.as_mut().unwrap().current.needed = 2;
    assert_eq!(of(&moment), 0, "one alone proves nothing");
    for (wanted, standbys) in [(true, 2), (false, 0)] {
        let options = [(ProxyOption::UnconfirmedReads, OptionValue::Switch(wanted))].into();
        moment.picture.spec.clusters[0].proxy = Some(ProxySpec { options, ..ProxySpec::default() });
        assert_eq!(of(&moment), standbys);
    }
}

#[test]
fn proxies_hear_of_sockets_where_postgresql_believes_passwords_there() {
    let mut moment = Moment::of_peace();
    moment.picture.own.show.socket_dir = Some("/herd/a/run".to_owned());
    moment.says("b").show.socket_dir = Some("/herd/b/run".to_owned());
    for (lines, told) in [
        (&["host all all all scram-sha-256"][..], false),
        (&["local all all peer", "host all all all scram-sha-256"], false),
        (&["host all all all scram-sha-256", "local all all scram-sha-256"], true),
    ] {
        moment.picture.spec.clusters[0].postgres.hba = lines.iter().map(|&line| line.to_owned()).collect();
        let table = routes(&moment.sight(), "4f1c").unwrap().table;
        let dirs = [table.primary.unwrap().socket_dir, table.standbys[0].target.socket_dir.clone()];
        let expected = ["/herd/a/run", "/herd/b/run"].map(|dir| told.then(|| dir.to_owned()));
        assert_eq!(dirs, expected, "{lines:?}");
        assert_eq!(table.standbys[1].target.socket_dir, None, "c has not said where its is");
    }
}

#[test]
fn proxies_that_do_not_verify_servers_in_full_are_a_warning() {
    let mut moment = Moment::of_peace();
    assert!(!moment.checks().contains_key("proxy-tls"), "the herd file says nothing of proxies");
    for mode in TlsMode::ALL {
        let tls = ProxyTls { server_mode: mode, ..ProxyTls::default() };
        moment.picture.spec.clusters[0].proxy = Some(ProxySpec { tls, ..ProxySpec::default() });
        if mode == TlsMode::VerifyFull {
            assert_eq!(moment.alarms(), []);
            assert_eq!(moment.checks()["proxy-tls"].0, CheckState::Ok);
            continue;
        }
        assert_eq!(moment.alarms(), [alarm("proxy-tls", CheckState::Warning)]);
        let (_, message) = &moment.checks()["proxy-tls"];
        assert!(message.starts_with(&format!("with {mode} ")), "{message}");
    }
}

#[test]
fn a_route_lasts_as_long_as_its_proof() {
    let mut moment = Moment::of_peace();
    let of = |moment: &Moment| routes(&moment.sight(), "4f1c").map(|routes| routes.table);
    let line = |timeline, term, parent: Option<u32>, begin| Line {
        timeline: Timeline(timeline),
        term: Term(term),
        parent: parent.map(Timeline),
        begin: Some(Lsn(begin)),
    };
    moment.record().lines = vec![line(2, 3, None, 0), line(3, 4, Some(2), 0x400_0000)];
    let table = of(&moment).unwrap();
    assert_eq!((table.term, table.gate, table.valid_for_ms), (4, Gate::Open, 2_900));
    assert_eq!(table.proof, pgherd_api::routing::Proof::Heartbeat);
    assert_eq!(table.primary.unwrap().address, "10.0.0.1");
    // c is fed by a voter, d shows the past.
    let standbys: Vec<&str> = table.standbys.iter().map(|standby| standby.target.node.as_str()).collect();
    assert_eq!(standbys, ["b", "c"]);
    assert_eq!(table.standbys[0].replay_lsn.as_deref(), Some("0/5000000"));
    let forks: Vec<(u64, &str)> = table.forks.iter().map(|fork| (fork.term, fork.lsn.as_str())).collect();
    assert_eq!(forks, [(3, "0/4000000")]);
    moment.picture.heartbeat = None;
    assert_eq!(of(&moment).unwrap().valid_for_ms, 2_800);
    moment.picture.own.show.gate_open = false;
    let closed = of(&moment).unwrap();
    assert_eq!((closed.gate, closed.primary), (Gate::Closed, None));
    moment.picture.confirmed = Some(at(96_999));
    assert_eq!(of(&moment), None, "the proof is older than a lease");
    moment.picture.confirmed = Some(at(99_999));
    moment.record().election = Some(Election {
        term: Term(5),
        cause: Cause::Crash,
        opened_by: name("a"),
        released: true,
        forced: None,
        poisoned: false,
        votes: BTreeMap::new(),
        heirs: BTreeMap::new(),
    });
    assert_eq!(of(&moment), None, "the term is closed");
}

#[test]
fn another_agent_routes_by_the_stores_word() {
    let moment = Moment::of_peace().seen_by_b();
    let table = routes(&moment.sight(), "4f1c").unwrap().table;
    assert_eq!((table.proof, table.valid_for_ms), (pgherd_api::routing::Proof::Store, 2_800));
    assert_eq!(table.primary.unwrap().node, "a");
    // The record says that the gate is open; the report from before that is still the newest.
    let mut moment = moment;
    moment.says("a").show.gate_open = false;
    assert_eq!(routes(&moment.sight(), "4f1c").unwrap().table.gate, Gate::Open);
    moment.says("a").running = Is::Nothing;
    assert_eq!(routes(&moment.sight(), "4f1c").unwrap().table.gate, Gate::Closed);
}

#[test]
fn reads_are_safe_only_where_a_failover_takes_nothing_back() {
    let mut moment = Moment::of_peace();
    let pool = |moment: &Moment| {
        let sight = moment.sight();
        let nodes = sight.cluster().unwrap().nodes.iter();
        nodes.filter(|node| sight.in_read_pool(node)).map(|node| node.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(pool(&moment), ["b", "c"]);
    moment.says("c").show.upstream = Some(name("a"));
    assert_eq!(pool(&moment), ["b"], "what c has from a itself may be on nobody else");
    moment.says("c").show.upstream = Some(name("c"));
    assert_eq!(pool(&moment), ["b"], "and a circle is no voter");
    moment.record().nodes.get_mut(&name("b")).unwrap().barred = Some("x".to_owned());
    assert_eq!(pool(&moment), [""; 0]);
    let mut two = Moment::of_peace();
    two.record().rules.as_mut().unwrap().current = rule(2, &["a_1", "b_2", "c_3"]);
    assert_eq!(pool(&two), [""; 0], "each has what may be on it alone");
    two.record().rules.as_mut().unwrap().current = rule(0, &["a_1", "b_2"]);
    assert_eq!(pool(&two), ["b", "c"], "nothing is promised");
}

#[test]
fn the_health_of_a_primary_and_of_a_standby() {
    let mut moment = Moment::of_peace();
    let primary = health(&moment.sight());
    assert_eq!((primary.role, primary.gate_open, primary.is_voter), (Role::Primary, true, false));
    assert_eq!((primary.primary_lsn, primary.received_lsn), (Some(0x500_0060), None));
    moment.picture.deeds.gate_open = false;
    assert!(!health(&moment.sight()).gate_open, "its own PostgreSQL lets nobody in");

    let moment = Moment::of_peace().seen_by_b();
    let standby = health(&moment.sight());
    assert_eq!((standby.role, standby.gate_open, standby.is_voter), (Role::Standby, false, true));
    assert!(standby.every_voter_needed && standby.in_read_pool);
    assert_eq!(standby.replication_state.as_deref(), Some("streaming"));
    assert_eq!((standby.received_lsn, standby.replayed_lsn), (Some(0x500_0060), Some(0x500_0000)));
    assert_eq!(standby.store_last_seen_s, Some(now().as_second()));
    let measured = measurements(&moment.sight());
    assert_eq!((measured.primary, measured.lag, measured.streaming), (Some(false), Some(0), Some(true)));
    assert_eq!((measured.peers, measured.peers_reachable), (Some(4), Some(4)));
    assert_eq!(measured.lease_remaining, None, "it holds none");
}

#[test]
fn a_switchover_that_was_asked_for_changes_no_word_before_it_happens() {
    let mut moment = Moment::of_peace();
    moment.record().switchover = Some(Switchover { term: Term(4), to: Some(name("b")) });
    let status = status(&moment.sight());
    assert_eq!((status.clusters[0].primary.as_deref(), status.clusters[0].gate), (Some("a"), Gate::Open));
}

#[test]
fn spans_and_sizes_read_well() {
    for (ms, text) in
        [(80, "80 ms"), (12_900, "12 s"), (119_000, "119 s"), (180_000, "3 min"), (9_000_000, "2 h")]
    {
        assert_eq!(span(Duration::from_millis(ms)), text);
    }
    for (number, text) in
        [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (16 << 20, "16 MiB"), (3 << 40, "3.0 TiB")]
    {
        assert_eq!(bytes(number), text);
    }
}
