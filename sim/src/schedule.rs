//! One schedule: a cluster drawn from the seed, faults, healing, and what came of it.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use pgherd_core::durability;
use pgherd_core::ha::election::{self, Tally, Waiting};
use pgherd_core::record::{Cause, Position, Proposal, Record, Rule, Standing, Vote};
use pgherd_core::spec::backup::Location;
use pgherd_core::spec::{
    BackupSpec, ClusterSpec, Durability, NodeSpec, PostgresSource, PostgresSpec, RepositorySpec, Times,
};
use pgherd_core::types::{Incarnation, Lsn, Member, NodeName, SystemId, Term, Timeline};

use crate::breakage::Breakage;
use crate::checkers::Violation;
use crate::coverage::Coverage;
use crate::postgres::{Conninfo, State};
use crate::random::Random;
use crate::wal::{self, Point};
use crate::world::{Clock, Event, MS, SECOND, Time, World};

pub const SYSTEM: SystemId = SystemId(7_710_000_000_000_000_001);
/// What the record reserves for the cluster's first reign.
const FIRST_TIMELINE: Timeline = Timeline(3);
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
/// An operator who sees that the copies left cannot elect decides after this long.
const PERSON_AFTER: Time = 20 * SECOND;

/// What one seed gave.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub seed: u64,
    pub violation: Option<Violation>,
    pub events: u64,
    pub commits: u64,
    pub virtual_time: Time,
    pub heal_time: Time,
    pub coverage: Coverage,
    pub accepted_loss: u64,
    /// Every copy was lost, which is more than anybody promised.
    pub nothing_left: bool,
    pub trace: Option<String>,
}

/// Runs one seed to its end.
pub fn run(seed: u64, breakage: Option<Breakage>, verbose: bool) -> Outcome {
    let mut world = draw(seed);
    world.breakage = breakage;
    if verbose {
        world.trace = Some(String::new());
        world.chatty = true;
        let (needed, nodes) = (world.spec.durability.needed(), world.nodes.len());
        world.tell(None, |world| {
            format!("{nodes} nodes, needed {needed}, {:?}, {:?}", world.spec.durability, world.times)
        });
    }
    let faults_until = world.span(9 * SECOND, 14 * SECOND);
    world.after(MS, Event::ClientTick);
    let heal_at = world.plan_faults(SECOND, faults_until);
    world.run(heal_at);
    if world.oracle.violation.is_none() {
        world.heal();
        let person_at = world.now + PERSON_AFTER;
        while world.oracle.violation.is_none() && world.oracle.converged_at.is_none() {
            let until = if world.now < person_at { person_at } else { world.now + 5 * SECOND };
            while world.oracle.violation.is_none() && world.oracle.converged_at.is_none() && world.step(until)
            {
            }
            if world.oracle.converged_at.is_none() && world.now >= person_at {
                world.person_decides();
            }
        }
    }
    let heal_time = world.healed_at.map_or(0, |healed| world.now.saturating_sub(healed));
    Outcome {
        seed,
        violation: world.oracle.violation.take(),
        events: world.events,
        commits: world.clients.attempts,
        virtual_time: world.now,
        heal_time,
        coverage: std::mem::take(&mut world.coverage),
        accepted_loss: world.oracle.accepted_loss,
        nothing_left: world.oracle.nothing_left,
        trace: world.trace.take(),
    }
}

/// The cluster that this seed means.
pub fn draw(seed: u64) -> World {
    let mut random = Random::new(seed);
    let data_nodes = [2, 3, 3, 3, 3, 3, 4, 4, 5][random.index(9)];
    let witness = data_nodes == 2 || random.once_in(8);
    let mut nodes: Vec<NodeSpec> = NAMES[..data_nodes].iter().map(|name| spec_of(name)).collect();
    if data_nodes >= 4 {
        match random.below(4) {
            0 => nodes[3].delay = Some(Duration::from_secs(300)),
            1 => nodes[3].follow = Some(nodes[1].name.clone()),
            2 => nodes[3].priority = 0,
            _ => {}
        }
    } else if data_nodes == 3 && random.once_in(10) {
        nodes[2].priority = 0;
    }
    for node in &mut nodes {
        if node.priority > 0 {
            node.priority = [50, 100, 100, 100, 200][random.index(5)];
        }
    }
    let degrade_after = random.once_in(4).then(|| Duration::from_secs(random.between(1, 6)));
    let candidates = nodes.iter().filter(|node| node.voter_candidate()).count();
    let needed = if data_nodes >= 4 && candidates >= 4 && random.once_in(2) { 2 } else { 1 };
    let durability = match random.below(14) {
        0 => Durability::Async,
        _ => Durability::Quorum { needed, degrade_after },
    };
    let mut times = Times::default();
    if random.once_in(2) {
        times.lease = Duration::from_millis(2000);
        times.renew = Duration::from_millis(400);
        times.suspect = Duration::from_millis(1000);
        times.agent_grace = Duration::from_millis(4000);
    }
    let from_nothing = random.once_in(10);
    let client_every = random.between(40 * MS, 160 * MS);
    let mut spec = cluster_spec(nodes, durability);
    // By what was drawn for something else, so that the same seed goes on to mean the same cluster.
    spec.backup = client_every.is_multiple_of(2).then(repository);
    let voter = client_every.is_multiple_of(4) && spec.durability.needed() > 0;
    let alone = voter && client_every.is_multiple_of(20);
    if voter {
        with_voter(&mut spec, alone, client_every.is_multiple_of(12));
    }
    let mut world = World::new(random, times, spec, witness || alone);
    world.repository.used = voter;
    world.clients.every = client_every;
    for node in 0..world.nodes.len() {
        world.nodes[node].clock = Clock {
            start: world.random.between(SECOND, 1000 * SECOND),
            parts_per_million: i64::try_from(world.random.below(20_001)).unwrap_or(0) - 10_000,
        };
    }
    if from_nothing {
        for node in 0..world.nodes.len() {
            let late = world.span(MS, 500 * MS);
            let _ = late;
            world.start_agent(node);
        }
    } else {
        establish(&mut world);
    }
    world
}

/// The repository votes: beside one data node, instead of a standby, or besides those that were needed.
fn with_voter(spec: &mut ClusterSpec, alone: bool, besides: bool) {
    if alone {
        spec.nodes.truncate(1);
        spec.nodes[0].priority = spec.nodes[0].priority.max(1);
    }
    if let Durability::Quorum { needed, .. } = &mut spec.durability {
        let candidates = spec.nodes.iter().filter(|node| node.voter_candidate()).count();
        *needed = (*needed + usize::from(besides)).min(candidates);
    }
    if let Some(backup) = &mut spec.backup {
        backup.voter = true;
    }
}

pub fn spec_of(name: &str) -> NodeSpec {
    NodeSpec::new(name.parse().expect("a valid name"), "10.0.0.1")
}

pub fn cluster_spec(nodes: Vec<NodeSpec>, durability: Durability) -> ClusterSpec {
    ClusterSpec {
        name: "main".parse().expect("a valid name"),
        durability,
        postgres: PostgresSpec {
            source: PostgresSource::Version(15),
            parameters: std::collections::BTreeMap::new(),
            hba: Vec::new(),
            ident: Vec::new(),
        },
        nodes,
        databases: Vec::new(),
        proxy: None,
        vip: None,
        backup: None,
    }
}

pub fn repository() -> BackupSpec {
    BackupSpec::new(RepositorySpec { location: Location::Directory("/backups".into()), secret: None })
}

/// A cluster that has been well for a while: the first node leads term 1 on timeline 2, all others stream.
pub fn establish(world: &mut World) {
    let needed = u32::try_from(world.spec.durability.needed()).unwrap_or(u32::MAX);
    let nodes = world.spec.nodes.iter().filter(|node| !world.empty.contains(&node.name));
    let names: Vec<NodeName> = nodes.map(|node| node.name.clone()).collect();
    let first = names[0].clone();
    let record = established_record(world, &names, needed);

    let hand_one = world.wal.found(0);
    let hand = world.wal.promote(Point { hand: hand_one, at: 1 }, FIRST_TIMELINE, Some(Term(1)), 0);
    let rules = record.rules.clone();
    let list =
        rules.map(|rules| durability::list_of(&rules.current, &member_of(&record, &first), FIRST_TIMELINE));
    let list = world.list(&list.unwrap_or_default());
    if let Some(member) = record.repository() {
        world.repository.add_backup(Point { hand, at: 2 });
        world.repository.adopt(member.incarnation, FIRST_TIMELINE, Term(1));
    }
    for (node, name) in names.iter().enumerate() {
        let reserved = world.reserved();
        let all = world.all_slots();
        let there = &mut world.nodes[node];
        let durable = &mut there.agent.local.durable;
        durable.member = Some(member_of(&record, name));
        durable.term = Term(1);
        durable.adopted.insert(Timeline(1), Term(0));
        durable.adopted.insert(FIRST_TIMELINE, Term(1));
        let server = &mut there.postgres;
        server.generation = 1;
        server.hand = hand;
        (server.written, server.flushed, server.visible) = (2, 2, 2);
        server.add_history(FIRST_TIMELINE);
        if node == 0 {
            server.state = State::Primary;
            server.list_on_disk = Rc::clone(&list);
            server.loaded = Rc::clone(&list);
            server.waits_enforced = list.waits();
            server.gate_open = true;
            server.slots = all;
        } else {
            server.state = State::Standby;
            server.list_on_disk = Rc::clone(&reserved);
            server.loaded = reserved;
            server.waits_enforced = true;
            server.conninfo = Some(Conninfo { upstream: 0, term: Term(1), timeline: FIRST_TIMELINE });
        }
    }
    world.oracle.copies = names.iter().filter_map(|name| record.member(name)).collect();
    world.store.record = Rc::new(record);
    world.store.revision = 1;
    for node in 0..world.nodes.len() {
        if world.empty.contains(&world.nodes[node].name) {
            world.nodes[node].host_up = false;
            continue;
        }
        world.nodes[node].view = Some((Rc::clone(&world.store.record), 1));
        world.start_agent(node);
        world.connect_soon(node, MS);
    }
    if world.store.record.rules.as_ref().is_some_and(|rules| rules.current.needed == 0) {
        world.oracle.declared_lines.insert(FIRST_TIMELINE);
        world.oracle.lossy_lines.insert(FIRST_TIMELINE);
    }
}

fn member_of(record: &Record, name: &NodeName) -> Member {
    record.member(name).unwrap_or(Member { node: name.clone(), incarnation: Incarnation(0) })
}

/// Made by the same changes that a real cluster goes through.
fn established_record(world: &World, names: &[NodeName], needed: u32) -> Record {
    let first = names[0].clone();
    let mut record = Record::empty();
    let change = |record: &mut Record, proposal: Proposal| {
        *record = record.apply(&proposal).expect("a founding goes through");
    };
    change(&mut record, Proposal::Found { node: first.clone() });
    change(&mut record, Proposal::Founded { node: first.clone(), system: SYSTEM, needed });
    let open = Proposal::Open {
        term: Term(0),
        cause: Cause::Bootstrap,
        by: first.clone(),
        released: false,
        poisoned: false,
    };
    change(&mut record, open);
    let vote = Vote {
        member: member_of(&record, &first),
        standing: Standing::Sealed,
        position: Position { term: Term(0), lsn: wal::lsn(1) },
        timeline: Timeline(1),
        begins: vec![(Timeline(1), Lsn::ZERO)],
        electable: true,
        priority: 100,
    };
    change(&mut record, Proposal::Vote { term: Term(1), vote });
    change(&mut record, Proposal::Promoted { term: Term(1), begin: wal::lsn(1), at: wal::lsn(2) });
    change(&mut record, Proposal::GateOpened { term: Term(1) });
    for name in &names[1..] {
        change(&mut record, Proposal::Enlist { node: name.clone(), from: Incarnation(0) });
    }
    if world.repository.used {
        let place = world.spec.backup.as_ref().expect("its place is known").repository.location.to_string();
        let owner = names.last().unwrap_or(&first).clone();
        change(&mut record, Proposal::OwnArchive { term: Term(1), archive: Some((place, owner.clone())) });
        let repository = "repository".to_owned();
        change(&mut record, Proposal::UseRepository { owner: owner.clone(), repository });
        change(&mut record, Proposal::AdmitRepository { owner, above: Incarnation(0) });
    }
    let counts = |node: &&NodeSpec| {
        node.name == first || (node.voter_candidate() && *world.spec.upstream(node, &first) == first)
    };
    let nodes = world.spec.nodes.iter().filter(|node| names.contains(&node.name));
    let members: BTreeSet<Member> =
        nodes.filter(counts).map(|node| member_of(&record, &node.name)).chain(record.repository()).collect();
    let rules = record.rules.as_mut().expect("a founded cluster has a rule");
    rules.current = Rule { members, needed };
    record
}

impl World {
    /// Is there a node without data that can be made from the repository?
    fn somebody_inherits(&self, record: &Record) -> bool {
        let mut nodes = self.spec.nodes.iter().filter(|node| node.electable());
        election::inheritance(record).is_some()
            && nodes.any(|node| self.index(&node.name).is_some_and(|node| self.member(node).is_none()))
    }

    /// A person looks at a cluster that cannot go on by itself. Only where copies that a rule needs are gone
    /// for good may that be so; then the best of what is left is forced.
    pub fn person_decides(&mut self) {
        let record = Rc::clone(&self.store.record);
        let answers = (0..self.nodes.len()).find(|node| self.agent_runs(*node));
        if let (Some(by), true) = (answers, record.restore.is_some()) {
            self.tell(None, |_| "a person lets go who was to be taken back".to_owned());
            self.person_proposes(by, Proposal::Restore { order: None });
            return;
        }
        let gate = record.open_reign().is_some_and(|reign| reign.gate_opened);
        let Some(rules) = &record.rules else { return };
        if gate && record.election.is_none() {
            return;
        }
        let able = |member: &Member| {
            if member.node.is_repository() {
                return record.repository().as_ref() == Some(member);
            }
            let copy = self.index(&member.node).and_then(|node| self.member(node));
            copy == Some(member) && record.member(&member.node).as_ref() == Some(member)
        };
        let winnable = rules.in_force().all(|rule| {
            rule.members.iter().filter(|member| able(member)).count() >= rule.seals_needed(record.holder())
        });
        let nobody = matches!(election::tally(&record, true), Tally::Wait(Waiting::NobodyElectable))
            && !self.somebody_inherits(&record);
        let forced = record.election.as_ref().and_then(|election| election.forced.as_ref());
        let lost = forced.and_then(|node| self.index(node)).is_some_and(|node| self.member(node).is_none());
        if winnable && !nobody && !lost {
            return;
        }
        let best = (0..self.nodes.len())
            .filter(|node| self.is_in_spec(*node) && self.member(*node).is_some_and(able))
            // Where nobody else is left, a node that was never to lead does.
            .max_by_key(|node| {
                let electable = self.spec.node(&self.nodes[*node].name).is_some_and(NodeSpec::electable);
                (electable, self.nodes[*node].postgres.flushed)
            });
        let left = record
            .repository()
            .is_some_and(|member| rules.in_force().all(|rule| rule.members.contains(&member)));
        if best.is_none() && left {
            // The repository has everything, and nobody makes anything of it: that is for the cluster to mend.
            return;
        }
        let Some(best) = best else {
            self.oracle.nothing_left = true;
            self.oracle.converged_at = Some(self.now);
            return;
        };
        self.tell(None, |_| "a person forces a failover".to_owned());
        let name = self.nodes[best].name.clone();
        self.person_proposes(best, Proposal::Force { term: record.term, to: name.clone(), by: name });
    }
}
