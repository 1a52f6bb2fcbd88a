//! The world that one seed makes: nodes with their clocks, disks, servers and agents, a store, a network,
//! clients, and the queue of what happens next.
//!
//! Everything that is shared by all parts is here; what each part does stands in its own file as another
//! `impl World`. Nothing iterates over an unordered map, nothing reads a clock, and the only source of chance
//! is the world's own generator: the same seed gives the same run, event by event.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::Duration;

use pgherd_core::action::{Action, Duties};
use pgherd_core::ha::Memory;
use pgherd_core::observation::{Durable, Local, Peer, Report, SyncList};
use pgherd_core::record::{Proposal, Record};
use pgherd_core::spec::{ClusterSpec, Times};
use pgherd_core::types::{Instant, Member, NodeName, Term, Timeline};

use crate::breakage::Breakage;
use crate::checkers::Oracle;
use crate::coverage::Coverage;
use crate::postgres::{Postgres, Sender};
use crate::random::Random;
use crate::repository::{Call, Task, Told};
use crate::wal::{Point, Wal};

/// Microseconds of true time since the world began.
pub type Time = u64;
pub const MS: Time = 1_000;
pub const SECOND: Time = 1_000_000;

pub fn micros(span: Duration) -> Time {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

/// What can happen. A number beside the node says to which life of the thing it belongs; what is left of a
/// former life does nothing.
#[derive(Clone, Debug)]
pub enum Event {
    // The agent.
    Think { node: usize, token: u32 },
    Deed { node: usize, token: u32 },
    ReportTick { node: usize, life: u32 },
    ReportArrives { node: usize, from: usize, report: Rc<Report> },
    ConfirmTick { node: usize, life: u32 },
    Confirmed { node: usize, life: u32, asked: Instant, answer: Option<u64> },
    HeartbeatTick { node: usize, life: u32 },
    Drained { node: usize, token: u32 },
    FenceDue { node: usize, life: u32 },
    FenceSpeaks { to: usize, from: usize, term: Term },
    // The store.
    Arrives { node: usize, life: u32, proposal: u32 },
    Answered { node: usize, life: u32, proposal: u32, answer: crate::store::Answer },
    Watch { node: usize },
    // PostgreSQL.
    Started { node: usize, generation: u32 },
    Gone { node: usize, generation: u32 },
    Reads { node: usize, generation: u32 },
    Promoted { node: usize, generation: u32 },
    ListLoads { node: usize, generation: u32, by: crate::postgres::Process },
    Flushed { node: usize, generation: u32 },
    Connects { node: usize, generation: u32, attempt: u32 },
    Ships { link: usize },
    StandbyFlushes { link: usize },
    Replies { link: usize, at: u64 },
    // The repository.
    Objects { node: usize, task: Task, call: Call },
    ObjectsAnswer { node: usize, task: Task, told: Told },
    StreamBegins { node: usize, token: u32 },
    Pings { node: usize, token: u32 },
    SenderSeesEnd { link: usize },
    ReceiverSeesEnd { link: usize },
    // Clients and people.
    ClientTick,
    Acknowledged { node: usize, era: u32, point: Point, strict: bool },
    Fault { index: usize },
    FaultEnds { index: usize },
    Check,
}

pub struct Queued {
    at: Time,
    sequence: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Queued) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Queued) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Queued) -> std::cmp::Ordering {
        Reverse((self.at, self.sequence)).cmp(&Reverse((other.at, other.sequence)))
    }
}

/// One machine's `CLOCK_BOOTTIME`: a start of its own and a rate that is wrong by up to 1 %.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    pub start: Time,
    pub parts_per_million: i64,
}

impl Clock {
    pub fn local(&self, now: Time) -> Instant {
        let drift = i128::from(now) * i128::from(self.parts_per_million) / 1_000_000;
        let micros = i128::from(self.start) + i128::from(now) + drift;
        Instant::from_boot(Duration::from_micros(u64::try_from(micros).unwrap_or(0)))
    }

    /// True time until this clock has moved on by `span`.
    pub fn true_span(&self, span: Duration) -> Time {
        let micros = span.as_micros() * 1_000_000;
        u64::try_from(micros / (1_000_000 + i128::from(self.parts_per_million)) as u128).unwrap_or(u64::MAX)
            + 1
    }
}

/// A proposal on its way.
#[derive(Clone, Debug)]
pub struct InFlight {
    pub id: u32,
    pub proposal: Proposal,
    pub next: Rc<Record>,
    /// Compare-and-set: the revision that `next` was made from.
    pub expected: u64,
    pub give_up: Time,
    /// The list of deeds waits for it.
    pub from_deed: bool,
}

/// The agent's process: what is lost when it dies. [`Local::durable`] alone is on disk.
#[derive(Debug, Default)]
pub struct Agent {
    pub up: bool,
    pub life: u32,
    pub frozen_until: Time,
    /// Has run without a pause since then.
    pub steady_since: Time,
    pub memory: Memory,
    pub local: Local,
    /// The first look at PostgreSQL takes until then.
    pub looks_from: Time,
    /// The look at PostgreSQL that `local` shows.
    pub looked_at: Option<u64>,
    pub peers: BTreeMap<NodeName, Peer>,
    pub confirmed: Option<(Term, Instant)>,
    pub caught_up: bool,
    pub store_reachable: bool,
    pub proposals: Vec<InFlight>,
    pub deeds: VecDeque<Action>,
    pub deed_record: Option<Rc<Record>>,
    pub deed_token: u32,
    pub stage: u8,
    pub stage_until: Time,
    /// After a failure nothing but a stop is begun before then.
    pub rest_until: Time,
    /// Notes of the deed under way.
    pub noted: u64,
    pub think_token: u32,
    pub think_at: Time,
    pub proposed: u32,
    pub duties: Duties,
    /// Rises with every drain of the proxies.
    pub drain_token: u32,
    pub wants_rebuild: bool,
    pub reason: Option<&'static str>,
    pub tasks: crate::repository::Tasks,
    /// When the repository was asked last.
    pub pinged: Instant,
}

#[derive(Debug, Default)]
pub struct Fence {
    pub alive: bool,
    /// Its deadline counts from the last sign of the agent.
    pub armed: Option<(Term, Time)>,
    pub last_sign: Time,
}

#[derive(Debug)]
pub struct Node {
    pub name: NodeName,
    pub has_postgres: bool,
    pub clock: Clock,
    pub host_up: bool,
    pub frozen_until: Time,
    pub postgres: Postgres,
    pub agent: Agent,
    pub fence: Fence,
    /// The store's replica on this node: kept over a restart of the agent, and then as old as it is.
    pub view: Option<(Rc<Record>, u64)>,
    pub watching: bool,
    pub damage: Option<&'static str>,
    pub stopping: bool,
    pub slow: Slow,
    /// Until then (true time) somebody may use a table or read, by a proof that this node gave out.
    pub right_until: Time,
    /// The address that moves with the gate is on this host's interface until then (true time), at the latest.
    pub address_until: Time,
    /// When it last took WAL, or was a primary.
    pub streamed_at: Time,
    /// What was durable before the last seal, for a build that forgets to sync it.
    pub forgotten: Option<Durable>,
}

/// What is slower on this node than it should be.
#[derive(Debug, Default)]
pub struct Slow {
    pub promotion: bool,
    pub seal: bool,
    pub replay_paused: bool,
    pub wal_hangs: bool,
    pub checkpointer: bool,
    pub rewind_fails: bool,
    /// Of the proxies' clients.
    pub transactions: bool,
}

/// Who can reach whom, one direction at a time.
#[derive(Debug, Default)]
pub struct Network {
    nodes: usize,
    agents_cut: Vec<u8>,
    replication_cut: Vec<u8>,
    pub store_cut: Vec<u8>,
    /// One-way delay between any two nodes.
    pub delay: Time,
    pub loss_percent: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    Agents,
    Replication,
}

impl Network {
    pub fn new(nodes: usize) -> Network {
        Network {
            nodes,
            agents_cut: vec![0; nodes * nodes],
            replication_cut: vec![0; nodes * nodes],
            store_cut: vec![0; nodes],
            delay: 0,
            loss_percent: 0,
        }
    }

    pub fn cut(&mut self, layer: Layer, from: usize, to: usize, on: bool) {
        let index = from * self.nodes + to;
        let cuts = match layer {
            Layer::Agents => &mut self.agents_cut[index],
            Layer::Replication => &mut self.replication_cut[index],
        };
        *cuts = if on { *cuts + 1 } else { cuts.saturating_sub(1) };
    }

    pub fn passes(&self, layer: Layer, from: usize, to: usize) -> bool {
        let index = from * self.nodes + to;
        match layer {
            Layer::Agents => self.agents_cut[index] == 0,
            Layer::Replication => self.replication_cut[index] == 0,
        }
    }

    pub fn both_ways(&self, layer: Layer, one: usize, other: usize) -> bool {
        self.passes(layer, one, other) && self.passes(layer, other, one)
    }

    pub fn heal(&mut self) {
        *self = Network::new(self.nodes);
    }
}

pub struct World {
    pub now: Time,
    sequence: u64,
    queue: BinaryHeap<Queued>,
    pub events: u64,
    pub random: Random,
    pub breakage: Option<Breakage>,
    pub times: Times,
    pub spec: Rc<ClusterSpec>,
    pub spec_changed_at: Time,
    /// Nodes that are to join later, and have nothing yet.
    pub empty: BTreeSet<NodeName>,
    /// What operators go back to.
    pub first_spec: Rc<ClusterSpec>,
    pub nodes: Vec<Node>,
    pub wal: Wal,
    pub links: Vec<crate::replication::Link>,
    pub store: crate::store::Store,
    pub repository: crate::repository::Repository,
    pub network: Network,
    pub clients: crate::clients::Clients,
    pub faults: Vec<crate::faults::Fault>,
    pub ambush: Option<crate::faults::Ambush>,
    pub oracle: Oracle,
    pub coverage: Coverage,
    pub crashes: Vec<Time>,
    /// Set once the world is healthy again and has to converge.
    pub healed_at: Option<Time>,
    /// The story, for replays and scripts.
    pub trace: Option<String>,
    /// Tell also what is only under way.
    pub chatty: bool,
}

impl World {
    pub fn new(random: Random, times: Times, spec: ClusterSpec, witness: bool) -> World {
        let mut nodes: Vec<Node> = spec.nodes.iter().map(|node| Node::new(node.name.clone(), true)).collect();
        if witness {
            nodes.push(Node::new("w".parse().expect("a valid name"), false));
        }
        let count = nodes.len();
        World {
            now: 0,
            sequence: 0,
            queue: BinaryHeap::with_capacity(256),
            events: 0,
            random,
            breakage: None,
            times,
            first_spec: Rc::new(spec.clone()),
            spec: Rc::new(spec),
            spec_changed_at: 0,
            empty: BTreeSet::new(),
            nodes,
            wal: Wal::default(),
            links: Vec::new(),
            store: crate::store::Store::default(),
            repository: crate::repository::Repository::new(count),
            network: Network::new(count),
            clients: crate::clients::Clients::default(),
            faults: Vec::new(),
            ambush: None,
            oracle: Oracle::default(),
            coverage: Coverage::default(),
            crashes: Vec::new(),
            healed_at: None,
            trace: None,
            chatty: false,
        }
    }

    pub fn broken(&self, breakage: Breakage) -> bool {
        self.breakage == Some(breakage)
    }

    pub fn after(&mut self, span: Time, event: Event) {
        self.sequence += 1;
        self.queue.push(Queued { at: self.now + span, sequence: self.sequence, event });
    }

    /// Handles the next event; false when there is none before `until`.
    pub fn step(&mut self, until: Time) -> bool {
        if self.queue.peek().is_none_or(|next| next.at > until) {
            self.now = self.now.max(until);
            return false;
        }
        let Some(next) = self.queue.pop() else { return false };
        self.now = next.at;
        self.events += 1;
        self.handle(next.event);
        true
    }

    pub fn run(&mut self, until: Time) {
        while self.oracle.violation.is_none() && self.step(until) {}
    }

    fn handle(&mut self, event: Event) {
        if let Some((node, by_agent)) = whose(&event, &self.links) {
            let frozen = self.frozen_until(node, by_agent);
            if frozen > self.now {
                let late = self.random.between(1, 5 * MS);
                self.after(frozen - self.now + late, event);
                return;
            }
        }
        match event {
            Event::Think { node, token } => {
                if self.nodes[node].agent.think_token == token {
                    self.think(node);
                }
            }
            Event::Deed { node, token } => {
                if self.nodes[node].agent.deed_token == token {
                    self.deed(node);
                }
            }
            Event::ReportTick { node, life } => self.report_tick(node, life),
            Event::ReportArrives { node, from, report } => self.hear(node, from, &report),
            Event::ConfirmTick { node, life } => self.confirm_tick(node, life),
            Event::Confirmed { node, life, asked, answer } => self.confirmed(node, life, asked, answer),
            Event::HeartbeatTick { node, life } => self.heartbeat_tick(node, life),
            Event::Drained { node, token } => self.drained(node, token),
            Event::FenceDue { node, life } => self.fence_due(node, life),
            Event::FenceSpeaks { to, from, term } => self.fence_heard(to, from, term),
            Event::Arrives { node, life, proposal } => self.proposal_arrives(node, life, proposal),
            Event::Answered { node, life, proposal, answer } => {
                self.proposal_answered(node, life, proposal, answer);
            }
            Event::Watch { node } => self.watch(node),
            Event::Started { node, generation } => self.server_started(node, generation),
            Event::Reads { node, generation } => self.reads(node, generation),
            Event::Gone { node, generation } => self.server_gone(node, generation),
            Event::Promoted { node, generation } => self.server_promoted(node, generation),
            Event::ListLoads { node, generation, by } => self.list_loads(node, generation, by),
            Event::Flushed { node, generation } => self.flushed(node, generation),
            Event::Connects { node, generation, attempt } => self.connects(node, generation, attempt),
            Event::Ships { link } => self.ships(link),
            Event::StandbyFlushes { link } => self.standby_flushes(link),
            Event::Replies { link, at } => self.replies(link, at),
            Event::Objects { node, task, call } => self.objects(node, task, call),
            Event::ObjectsAnswer { node, task, told } => self.objects_answer(node, task, told),
            Event::StreamBegins { node, token } => self.stream_begins(node, token),
            Event::Pings { node, token } => self.ping(node, token),
            Event::SenderSeesEnd { link } => self.sender_sees_end(link),
            Event::ReceiverSeesEnd { link } => self.receiver_sees_end(link),
            Event::ClientTick => self.client_tick(),
            Event::Acknowledged { node, era, point, strict } => {
                self.acknowledged(node, era, point, strict);
            }
            Event::Fault { index } => self.fault_begins(index),
            Event::FaultEnds { index } => self.fault_ends(index),
            Event::Check => self.check_convergence(),
        }
    }

    fn frozen_until(&self, node: usize, by_agent: bool) -> Time {
        let node = &self.nodes[node];
        if by_agent { node.frozen_until.max(node.agent.frozen_until) } else { node.frozen_until }
    }

    pub fn agent_runs(&self, node: usize) -> bool {
        let node = &self.nodes[node];
        node.host_up && node.agent.up
    }

    /// A span that differs each time; its middle in a still world.
    pub fn span(&mut self, least: Time, most: Time) -> Time {
        self.random.between(least, most)
    }

    /// A span that is short, and once in `rarely` long.
    pub fn span_or(&mut self, usual: (Time, Time), rarely: u64, unusual: (Time, Time)) -> Time {
        let (least, most) = if self.random.once_in(rarely) { unusual } else { usual };
        self.random.between(least, most)
    }

    pub fn index(&self, name: &NodeName) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == *name)
    }

    pub fn is_in_spec(&self, node: usize) -> bool {
        self.spec.nodes.iter().any(|spec| spec.name == self.nodes[node].name)
    }

    /// The member whose copy this node holds, complete.
    pub fn member(&self, node: usize) -> Option<&Member> {
        let node = &self.nodes[node];
        let durable = &node.agent.local.durable;
        durable.member.as_ref().filter(|_| node.postgres.has_copy() && !durable.rebuilding)
    }

    pub fn tell(&mut self, node: Option<usize>, text: impl FnOnce(&World) -> String) {
        if self.trace.is_none() {
            return;
        }
        let line = text(self);
        let (seconds, millis) = (self.now / SECOND, self.now % SECOND / MS);
        let who = node.map_or("*", |node| self.nodes[node].name.as_str()).to_owned();
        if let Some(trace) = &mut self.trace {
            // Writing into a String cannot fail.
            writeln!(trace, "{seconds:>4}.{millis:03} {who}: {line}").expect("a String takes any text");
        }
    }
}

/// Whose event it is, and whether its agent (and not its PostgreSQL or the world) handles it.
fn whose(event: &Event, links: &[crate::replication::Link]) -> Option<(usize, bool)> {
    Some(match event {
        Event::Think { node, .. }
        | Event::Deed { node, .. }
        | Event::ReportTick { node, .. }
        | Event::ReportArrives { node, .. }
        | Event::ConfirmTick { node, .. }
        | Event::Confirmed { node, .. }
        | Event::HeartbeatTick { node, .. }
        | Event::Drained { node, .. }
        | Event::Answered { node, .. }
        | Event::ObjectsAnswer { node, .. }
        | Event::StreamBegins { node, .. }
        | Event::Pings { node, .. }
        | Event::Watch { node } => (*node, true),
        Event::FenceSpeaks { to, .. } => (*to, true),
        Event::FenceDue { node, .. }
        | Event::Started { node, .. }
        | Event::Reads { node, .. }
        | Event::Gone { node, .. }
        | Event::Promoted { node, .. }
        | Event::ListLoads { node, .. }
        | Event::Flushed { node, .. }
        | Event::Connects { node, .. } => (*node, false),
        Event::Ships { link } | Event::StandbyFlushes { link } | Event::ReceiverSeesEnd { link } => {
            // That of the repository is the owner's agent.
            (links[*link].standby, links[*link].repository)
        }
        Event::Replies { link, .. } | Event::SenderSeesEnd { link } => (links[*link].upstream, false),
        // On the wire, or nobody's.
        Event::Arrives { .. }
        | Event::Objects { .. }
        | Event::ClientTick
        | Event::Acknowledged { .. }
        | Event::Fault { .. }
        | Event::FaultEnds { .. }
        | Event::Check => return None,
    })
}

impl Node {
    fn new(name: NodeName, has_postgres: bool) -> Node {
        Node {
            name,
            has_postgres,
            clock: Clock { start: 0, parts_per_million: 0 },
            host_up: true,
            frozen_until: 0,
            postgres: Postgres::default(),
            agent: Agent::default(),
            fence: Fence::default(),
            view: None,
            watching: false,
            damage: None,
            stopping: false,
            slow: Slow::default(),
            right_until: 0,
            address_until: 0,
            streamed_at: 0,
            forgotten: None,
        }
    }
}

/// A list as PostgreSQL's processes hold it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct List {
    pub core: SyncList,
    pub names: Vec<(usize, u64, Timeline)>,
}

impl List {
    /// Whether commits wait at all. Needed of nobody is the reserved name, for which they wait for ever.
    pub fn waits(&self) -> bool {
        self.core.needed > 0
    }

    pub fn names(&self, sender: &Sender) -> bool {
        self.names.contains(&(sender.node, sender.incarnation, sender.timeline))
    }
}

impl World {
    pub fn list(&self, core: &SyncList) -> Rc<List> {
        let names = core.names.iter();
        let names = names.filter_map(|stream| {
            Some((self.slot_index(&stream.member.node)?, stream.member.incarnation.0, stream.timeline))
        });
        Rc::new(List { names: names.collect(), core: core.clone() })
    }

    pub fn reserved(&self) -> Rc<List> {
        Rc::new(List { core: SyncList { needed: 1, names: BTreeSet::new() }, names: Vec::new() })
    }
}

pub fn is_proposal(action: &Action) -> bool {
    matches!(action, Action::Propose(_))
}
