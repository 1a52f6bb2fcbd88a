//! What goes wrong, when, and for how long: drawn from the seed, in bursts, because the second fault that
//! comes during the answer to the first one is the one that breaks clusters.

use std::rc::Rc;

use pgherd_core::action::Action;
use pgherd_core::ha::{restore, suspicion};
use pgherd_core::record::{Moment, Proposal, Record, Switchover};
use pgherd_core::spec::Durability;
use pgherd_core::types::Timeline;

use crate::postgres::{Sender, State};
use crate::wal;
use crate::world::{Event, Layer, MS, SECOND, Time, World, micros};

#[derive(Clone, Debug)]
pub struct Fault {
    pub at: Time,
    pub lasts: Time,
    pub kind: Kind,
    pub node: usize,
    pub other: usize,
    /// Undone already, or nothing to undo.
    pub over: bool,
    /// It strikes this node, whoever holds the term.
    aimed: bool,
    /// How often it will strike again.
    repeats: u8,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident = ($name:literal, $weight:literal),)+) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind {
            $($(#[$doc])* $variant,)+
        }

        impl Kind {
            pub const ALL: &'static [Kind] = &[$(Kind::$variant,)+];

            pub fn name(self) -> &'static str {
                match self {
                    $(Kind::$variant => $name,)+
                }
            }

            fn weight(self) -> u64 {
                match self {
                    $(Kind::$variant => $weight,)+
                }
            }
        }
    };
}

kinds! {
    KillPostmaster = ("kill-postmaster", 10),
    /// With `restart_after_crash` off, a killed backend ends the whole server.
    KillBackend = ("kill-backend", 6),
    LoseHost = ("lose-host", 10),
    KillAgent = ("kill-agent", 8),
    FreezeAgent = ("freeze-agent", 7),
    FreezeNode = ("freeze-node", 7),
    KillFence = ("kill-fence", 3),
    Isolate = ("isolate", 8),
    CutAgents = ("cut-agents", 6),
    CutReplication = ("cut-replication", 6),
    CutOneWay = ("cut-one-way", 5),
    CutPair = ("cut-pair", 5),
    /// The network of the agents and the store is cut, that of PostgreSQL is not.
    CutManagement = ("cut-management", 5),
    CutStore = ("cut-store", 7),
    LoseStore = ("lose-store", 4),
    SlowStore = ("slow-store", 4),
    SlowNetwork = ("slow-network", 4),
    LosePower = ("lose-power", 3),
    WipeDisk = ("wipe-disk", 4),
    WipeNeeded = ("wipe-needed", 1),
    Damage = ("damage", 5),
    Switchover = ("switchover", 6),
    Force = ("force", 1),
    /// An operator has the cluster go back, and thinks better of it in half of all cases.
    TakeBack = ("take-back", 2),
    ChangeNeeded = ("change-needed", 6),
    RemoveNode = ("remove-node", 2),
    PromoteByHand = ("promote-by-hand", 6),
    SlowPromotion = ("slow-promotion", 5),
    SlowSeal = ("slow-seal", 5),
    PauseReplay = ("pause-replay", 4),
    CancelWaits = ("cancel-waits", 5),
    HangWal = ("hang-wal", 5),
    SlowCheckpointer = ("slow-checkpointer", 6),
    Impostor = ("impostor", 3),
    StopNode = ("stop-node", 3),
    FailRewind = ("fail-rewind", 3),
    LongTransactions = ("long-transactions", 2),
    /// Kills the server four times, and it is back in between: poison.
    CrashLoop = ("crash-loop", 2),
    // Those of a repository that votes are drawn besides the others.
    CutRepository = ("cut-repository", 0),
    LoseRepository = ("lose-repository", 0),
    SlowRepository = ("slow-repository", 0),
    /// The owner's slot is lost, so that its next stream begins behind a hole.
    SkipWal = ("skip-wal", 0),
    KillOwner = ("kill-owner", 0),
    FreezeOwner = ("freeze-owner", 0),
    /// The holder's agent is silent for so long that its term is closed, while its server, its standbys and the owner go on.
    SilentHolder = ("silent-holder", 0),
    /// Standbys receive nothing for a moment, and the repository does; then the holder is lost, disk and all.
    OnlyRepository = ("only-repository", 0),
}

/// What can go wrong with a repository that votes.
const OF_REPOSITORY: [(Kind, u64); 8] = [
    (Kind::CutRepository, 5),
    (Kind::LoseRepository, 3),
    (Kind::SlowRepository, 3),
    (Kind::SkipWal, 4),
    (Kind::KillOwner, 4),
    (Kind::FreezeOwner, 4),
    (Kind::OnlyRepository, 5),
    (Kind::SilentHolder, 2),
];

impl Kind {
    pub fn named(name: &str) -> Option<Kind> {
        Kind::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}

impl Fault {
    pub fn new(at: Time, lasts: Time, kind: Kind, node: usize, other: usize) -> Fault {
        Fault { at, lasts, kind, node, other, over: false, aimed: false, repeats: 3 }
    }
}

/// Is this change of the record the step? Also told whether it ended an election.
type Step = fn(&Proposal, bool) -> bool;

/// Faults that wait for a step of the protocol, and strike in the middle of it.
#[derive(Clone, Copy, Debug)]
pub struct Ambush {
    step: Step,
    /// How many such steps it lets pass.
    lets_pass: u64,
}

/// The steps that are worth an ambush, each with its weight. A rule change is the one that most can go wrong in.
const STEPS: [(Step, u64); 7] = [
    (|change, _| matches!(change, Proposal::Open { .. }), 1),
    (|change, decided| matches!(change, Proposal::Vote { .. }) && !decided, 1),
    (|_, decided| decided, 2),
    (|change, _| matches!(change, Proposal::Promoted { .. }), 1),
    (|change, _| matches!(change, Proposal::ProposeRule { .. }), 5),
    (|change, _| matches!(change, Proposal::FinishRule { .. }), 1),
    (|change, _| matches!(change, Proposal::Enlist { .. }), 1),
];

impl World {
    /// Draws the faults of this schedule, between `from` and `until`; returns when to heal the world.
    pub fn plan_faults(&mut self, from: Time, until: Time) -> Time {
        let mut heal_at = until;
        if self.random.once_in(7) {
            // Before anything else, and with time for the election that it leads to and for the lease after that.
            let at = self.span(from / 2, from);
            heal_at = until.max(at + self.silence_until_closed() + 6 * SECOND);
            let lasts = self.lasting(Kind::CutManagement);
            let index = self.random.index(self.nodes.len());
            self.faults.push(Fault::new(at, lasts, Kind::CutManagement, index, index));
        }
        if self.random.once_in(2) {
            let mut draw = self.random.below(STEPS.iter().map(|(_, weight)| weight).sum());
            let step = STEPS.iter().find(|(_, weight)| {
                let found = draw < *weight;
                draw = draw.saturating_sub(*weight);
                found
            });
            let lets_pass = self.random.below(3);
            self.ambush = step.map(|(step, _)| Ambush { step: *step, lets_pass });
        }
        if self.repository.used {
            self.plan_for_repository(from, until);
        }
        if self.repository.used && self.random.once_in(3) {
            // The first one of every herd leads.
            let at = self.span(from / 2, from);
            heal_at = heal_at.max(at + self.silence_until_closed() + 6 * SECOND);
            let lasts = self.lasting(Kind::SilentHolder);
            let mut fault = Fault::new(at, lasts, Kind::SilentHolder, 0, 0);
            fault.aimed = true;
            self.faults.push(fault);
            if self.random.once_in(2) {
                let late = at + self.silence_until_closed() - SECOND;
                self.faults.push(Fault::new(late, 3 * SECOND, Kind::SlowRepository, 0, 0));
            }
        }
        let bursts = self.span(2, 4);
        for burst in 0..bursts {
            let start = self.span(from, until - SECOND);
            let least = if burst == 0 { 2 } else { 1 };
            let count = self.span(least, 3);
            let focus = self.random.index(self.nodes.len());
            let mut at = start;
            for _ in 0..count {
                self.plan_one(at.min(until - MS), focus);
                at += self.span_or((10 * MS, 1500 * MS), 3, (MS, 60 * MS));
            }
        }
        for index in 0..self.faults.len() {
            let at = self.faults[index].at;
            self.after(at.saturating_sub(self.now), Event::Fault { index });
        }
        heal_at
    }

    fn plan_for_repository(&mut self, from: Time, until: Time) {
        for _ in 0..self.span(1, 4) {
            let mut draw = self.random.below(OF_REPOSITORY.iter().map(|(_, weight)| weight).sum());
            let found = OF_REPOSITORY.iter().find(|(_, weight)| {
                let found = draw < *weight;
                draw = draw.saturating_sub(*weight);
                found
            });
            let Some((kind, _)) = found else { return };
            let at = self.span(from, until - SECOND);
            let lasts = self.lasting(*kind);
            let node = self.random.index(self.nodes.len());
            self.faults.push(Fault::new(at, lasts, *kind, node, node));
        }
    }

    /// One more fault, at exactly this node.
    pub fn plan_fault(&mut self, within: Time, lasts: Time, kind: Kind, node: usize) {
        let index = self.faults.len();
        let mut fault = Fault::new(self.now + within, lasts, kind, node, node);
        fault.aimed = true;
        self.faults.push(fault);
        self.after(within, Event::Fault { index });
    }

    /// The record has changed: is this the step that somebody waits for?
    pub fn spring_ambush(&mut self, change: &Proposal, decided: bool) {
        let Some(ambush) = self.ambush.as_mut().filter(|ambush| (ambush.step)(change, decided)) else {
            return;
        };
        if ambush.lets_pass > 0 {
            ambush.lets_pass -= 1;
            return;
        }
        self.ambush = None;
        if self.healed_at.is_some() {
            return;
        }
        for _ in 0..self.span(1, 3) {
            let focus = self.random.index(self.nodes.len());
            let within = self.span(0, 120 * MS);
            self.plan_one(self.now + within, focus);
            self.after(within, Event::Fault { index: self.faults.len() - 1 });
        }
    }

    fn plan_one(&mut self, at: Time, focus: usize) {
        let total: u64 = Kind::ALL.iter().map(|kind| kind.weight()).sum();
        let mut draw = self.random.below(total);
        let mut kind = Kind::KillPostmaster;
        for candidate in Kind::ALL {
            if draw < candidate.weight() {
                kind = *candidate;
                break;
            }
            draw -= candidate.weight();
        }
        let lasts = self.lasting(kind);
        let node = if self.random.once_in(3) { focus } else { self.random.index(self.nodes.len()) };
        let other = self.random.index(self.nodes.len());
        self.faults.push(Fault::new(at, lasts, kind, node, other));
    }

    /// For how long a holder whose PostgreSQL answers may be silent before its term is closed.
    fn silence_until_closed(&self) -> Time {
        micros(self.times.agent_grace + suspicion::FENCE_SPEAKS_FIRST)
    }

    fn lasting(&mut self, kind: Kind) -> Time {
        match kind {
            // Shorter than `agent_grace` it would change nothing.
            Kind::CutManagement | Kind::SilentHolder => {
                self.silence_until_closed() + self.span(SECOND, 8 * SECOND)
            }
            // Long enough for another one to lead when it thaws.
            Kind::FreezeNode => self.span(SECOND, 12 * SECOND),
            _ => self.span_or((200 * MS, 4 * SECOND), 3, (4 * SECOND, 16 * SECOND)),
        }
    }

    /// Half of the time the target is whoever holds the term when the fault strikes.
    fn aim(&mut self, index: usize) -> usize {
        let planned = self.faults[index].node;
        if self.faults[index].aimed {
            return planned;
        }
        let holder = self.store.record.holder().and_then(|holder| self.index(&holder.node));
        let node = match holder {
            Some(holder) if self.random.once_in(2) => holder,
            _ => planned,
        };
        self.faults[index].node = node;
        node
    }

    pub fn fault_begins(&mut self, index: usize) {
        if self.healed_at.is_some() {
            return;
        }
        let node = self.aim(index);
        let Fault { kind, other, lasts, .. } = self.faults[index].clone();
        self.coverage.faults += 1;
        self.tell(Some(node), |_| format!("FAULT {} for {} ms", kind.name(), lasts / MS));
        self.inject(index, kind, node, other);
        self.after(lasts, Event::FaultEnds { index });
    }

    pub fn inject(&mut self, index: usize, kind: Kind, node: usize, other: usize) {
        match kind {
            Kind::KillPostmaster => self.postmaster_killed(node),
            Kind::KillBackend => {
                if self.nodes[node].postgres.answers() {
                    self.kill_server(node, 15 * MS);
                }
            }
            Kind::CrashLoop => {
                let holder = self.store.record.holder().and_then(|holder| self.index(&holder.node));
                if let Some(holder) = holder.filter(|holder| self.nodes[*holder].postgres.answers()) {
                    self.kill_server(holder, 15 * MS);
                }
            }
            Kind::LoseHost => self.lose_host(node),
            Kind::KillAgent => self.kill_agent(node),
            Kind::FreezeAgent => self.freeze_agent(node, self.faults[index].lasts),
            Kind::FreezeNode => self.freeze_node(node, self.faults[index].lasts),
            Kind::KillFence => self.nodes[node].fence.alive = false,
            Kind::Isolate => self.isolate(node, true),
            Kind::CutAgents => self.cut_all(node, Layer::Agents, true),
            Kind::CutReplication => self.cut_all(node, Layer::Replication, true),
            Kind::CutOneWay => {
                self.network.cut(Layer::Replication, node, other, true);
                self.network.cut(Layer::Agents, node, other, true);
            }
            Kind::CutPair => self.cut_pair(node, other, true),
            Kind::CutManagement => {
                self.cut_management(node, true);
                self.late_voter(node);
            }
            Kind::CutStore => self.network.store_cut[node] += 1,
            Kind::LoseStore => self.store.up = false,
            Kind::SlowStore => self.store.slow = self.span(50 * MS, 700 * MS),
            Kind::SlowNetwork => {
                self.network.delay = self.span(10 * MS, 150 * MS);
                self.network.loss_percent = self.span(0, 12);
            }
            Kind::LosePower => {
                for node in 0..self.nodes.len() {
                    self.lose_host(node);
                }
            }
            Kind::WipeDisk => self.wipe(node, false),
            Kind::WipeNeeded => self.wipe(node, true),
            Kind::Damage => {
                self.nodes[node].damage = Some("a page of the WAL cannot be read");
                self.nodes[node].agent.local.damage = self.nodes[node].damage.map(str::to_owned);
                self.think_within(node, 5 * MS);
            }
            Kind::Switchover => self.order_switchover(node, other),
            Kind::Force => self.force(node, other),
            Kind::TakeBack => {
                let behind = self.random.below(30);
                self.take_back(node, other, behind);
            }
            Kind::ChangeNeeded => self.change_needed(),
            Kind::RemoveNode => self.remove_node(other),
            Kind::PromoteByHand => {
                if self.nodes[node].postgres.state == State::Standby {
                    self.begin_promotion(node, false);
                }
            }
            Kind::SlowPromotion => self.nodes[node].slow.promotion = true,
            Kind::SlowSeal => self.nodes[node].slow.seal = true,
            Kind::PauseReplay => self.nodes[node].slow.replay_paused = true,
            Kind::CancelWaits => self.cancel_waits(node),
            Kind::HangWal => self.nodes[node].slow.wal_hangs = true,
            Kind::SlowCheckpointer => self.nodes[node].slow.checkpointer = true,
            Kind::Impostor => self.impostor(node, other),
            Kind::StopNode => self.operator_stop(node, true),
            Kind::FailRewind => self.nodes[node].slow.rewind_fails = true,
            Kind::LongTransactions => self.nodes[node].slow.transactions = true,
            Kind::CutRepository => self.repository.cut[node] += 1,
            Kind::LoseRepository => self.repository.up = false,
            Kind::SlowRepository => self.repository.slow = self.span(50 * MS, 700 * MS),
            Kind::SkipWal => {
                self.repository.skips = true;
                if let Some(owner) = self.owner() {
                    self.stream_breaks(owner);
                }
            }
            Kind::KillOwner => {
                if let Some(owner) = self.owner() {
                    self.faults[index].other = owner;
                    self.kill_agent(owner);
                }
            }
            Kind::FreezeOwner => {
                if let Some(owner) = self.owner() {
                    self.freeze_agent(owner, self.faults[index].lasts);
                }
            }
            Kind::OnlyRepository => self.only_repository(),
            Kind::SilentHolder => self.cut_management(node, true),
        }
    }

    pub fn fault_ends(&mut self, index: usize) {
        if std::mem::replace(&mut self.faults[index].over, true) || self.healed_at.is_some() {
            return;
        }
        let Fault { kind, node, other, .. } = self.faults[index].clone();
        self.tell(Some(node), |_| format!("the fault {} ends", kind.name()));
        self.repair(index, kind, node, other);
    }

    pub fn repair(&mut self, index: usize, kind: Kind, node: usize, other: usize) {
        match kind {
            Kind::LoseHost | Kind::WipeDisk | Kind::WipeNeeded => self.return_host(node),
            Kind::KillAgent | Kind::KillFence => self.start_agent_anew(node),
            Kind::Isolate => self.isolate(node, false),
            Kind::CutAgents => self.cut_all(node, Layer::Agents, false),
            Kind::CutReplication => self.cut_all(node, Layer::Replication, false),
            Kind::CutOneWay => {
                self.network.cut(Layer::Replication, node, other, false);
                self.network.cut(Layer::Agents, node, other, false);
            }
            Kind::CutPair => self.cut_pair(node, other, false),
            Kind::CutManagement | Kind::SilentHolder => self.cut_management(node, false),
            Kind::CutStore => {
                let cuts = &mut self.network.store_cut[node];
                *cuts = cuts.saturating_sub(1);
            }
            Kind::LoseStore => self.store.up = true,
            Kind::SlowStore => self.store.slow = 0,
            Kind::SlowNetwork => (self.network.delay, self.network.loss_percent) = (0, 0),
            Kind::LosePower => {
                for node in 0..self.nodes.len() {
                    self.return_host(node);
                }
            }
            Kind::Damage => self.cure(node),
            Kind::TakeBack => self.end_taking_back(node),
            Kind::ChangeNeeded | Kind::RemoveNode => {
                let first = Rc::clone(&self.first_spec);
                self.new_spec(first);
            }
            Kind::PauseReplay => self.nodes[node].slow.replay_paused = false,
            Kind::HangWal => self.unhang(node),
            Kind::SlowCheckpointer => self.nodes[node].slow.checkpointer = false,
            Kind::LongTransactions => self.nodes[node].slow.transactions = false,
            Kind::StopNode => self.operator_stop(node, false),
            Kind::CrashLoop => {
                if self.faults[index].repeats > 0 {
                    self.faults[index].repeats -= 1;
                    self.faults[index].over = false;
                    self.inject(index, kind, node, other);
                    let later = self.span(500 * MS, 2 * SECOND);
                    self.after(later, Event::FaultEnds { index });
                }
            }
            Kind::CutRepository => {
                let cuts = &mut self.repository.cut[node];
                *cuts = cuts.saturating_sub(1);
            }
            Kind::LoseRepository => self.repository.up = true,
            Kind::SlowRepository => self.repository.slow = 0,
            Kind::SkipWal => self.repository.skips = false,
            Kind::KillOwner => self.start_agent_anew(other),
            Kind::FreezeOwner
            | Kind::OnlyRepository
            | Kind::KillPostmaster
            | Kind::KillBackend
            | Kind::FreezeAgent
            | Kind::FreezeNode
            | Kind::Switchover
            | Kind::Force
            | Kind::PromoteByHand
            | Kind::SlowPromotion
            | Kind::SlowSeal
            | Kind::CancelWaits
            | Kind::Impostor
            | Kind::FailRewind => {}
        }
    }

    /// Ends every fault at once. What is broken stays broken, but nothing else breaks.
    pub fn heal(&mut self) {
        // Whoever is frozen thaws when it was to; the rest is well from now on.
        let thawed = self.nodes.iter().map(|node| node.frozen_until.max(node.agent.frozen_until)).max();
        self.healed_at = thawed.max(Some(self.now));
        self.tell(None, |_| "all faults end".to_owned());
        for fault in &mut self.faults {
            fault.over = true;
        }
        if !Rc::ptr_eq(&self.spec, &self.first_spec) {
            let first = Rc::clone(&self.first_spec);
            self.new_spec(first);
        }
        self.network.heal();
        (self.store.up, self.store.slow) = (true, 0);
        (self.repository.up, self.repository.slow, self.repository.skips) = (true, 0, false);
        self.repository.cut.fill(0);
        for node in 0..self.nodes.len() {
            let there = &mut self.nodes[node];
            there.slow = crate::world::Slow::default();
            there.stopping = false;
            there.agent.local.stopping = false;
            self.cure(node);
            self.unhang(node);
            self.return_host(node);
            self.start_agent_anew(node);
            self.watch_soon(node);
            self.think_within(node, MS);
        }
        self.oracle.final_commit = Some(self.clients.acknowledged);
        self.after(500 * MS, Event::Check);
    }

    // What the faults do.

    /// Whose agent streams into the repository, by the record.
    fn owner(&self) -> Option<usize> {
        self.store.record.archive.as_ref().and_then(|archive| self.index(&archive.owner))
    }

    fn only_repository(&mut self) {
        let holder = self.store.record.holder().and_then(|holder| self.index(&holder.node));
        let (Some(holder), Some(owner)) = (holder, self.owner()) else { return };
        for other in (0..self.nodes.len()).filter(|other| *other != holder && *other != owner) {
            self.plan_fault(0, 3 * SECOND, Kind::CutReplication, other);
        }
        if owner != holder {
            self.plan_fault(0, 10 * MS, Kind::KillBackend, owner);
        }
        let within = self.span(100 * MS, 1500 * MS);
        let lasts = self.lasting(Kind::WipeDisk);
        self.plan_fault(within, lasts, Kind::WipeDisk, holder);
    }

    pub fn lose_host(&mut self, node: usize) {
        if !self.nodes[node].host_up {
            return;
        }
        self.kill_agent(node);
        self.nodes[node].host_up = false;
        self.nodes[node].fence = crate::world::Fence::default();
        self.nodes[node].frozen_until = 0;
        self.nodes[node].address_until = 0;
        self.power_lost(node);
    }

    pub fn return_host(&mut self, node: usize) {
        if self.nodes[node].host_up {
            return;
        }
        self.nodes[node].host_up = true;
        self.start_agent(node);
    }

    /// The supervisor starts a dead agent again, and that one starts a dead fence.
    pub fn start_agent_anew(&mut self, node: usize) {
        if self.nodes[node].host_up {
            self.nodes[node].fence.alive = true;
            self.nodes[node].fence.last_sign = self.now;
            self.start_agent(node);
        }
    }

    pub fn freeze_agent(&mut self, node: usize, span: Time) {
        let now = self.now;
        let agent = &mut self.nodes[node].agent;
        if agent.up {
            agent.frozen_until = agent.frozen_until.max(now + span);
            agent.steady_since = agent.steady_since.max(agent.frozen_until);
            self.fence_watches(node);
        }
    }

    pub fn freeze_node(&mut self, node: usize, span: Time) {
        // At the worst moment: a proof is under way, and its answer comes after the thaw.
        let life = self.nodes[node].agent.life;
        self.heartbeat(node, life);
        let now = self.now;
        let there = &mut self.nodes[node];
        there.frozen_until = there.frozen_until.max(now + span);
        there.agent.steady_since = there.agent.steady_since.max(there.frozen_until);
        self.fence_watches(node);
    }

    pub fn isolate(&mut self, node: usize, on: bool) {
        self.cut_management(node, on);
        self.cut_all(node, Layer::Replication, on);
    }

    pub fn cut_management(&mut self, node: usize, on: bool) {
        self.cut_all(node, Layer::Agents, on);
        let cuts = &mut self.network.store_cut[node];
        *cuts = if on { *cuts + 1 } else { cuts.saturating_sub(1) };
    }

    /// When this node's silence has lasted long enough for an election, one of its voters hears of that late, and
    /// goes on acknowledging what it streams until it seals.
    fn late_voter(&mut self, silent: usize) {
        let record = Rc::clone(&self.store.record);
        let Some(rules) = &record.rules else { return };
        let voters: Vec<usize> = rules
            .target()
            .voters(&self.nodes[silent].name)
            .filter_map(|voter| self.index(&voter.node))
            .collect();
        if voters.is_empty() {
            return;
        }
        let late = voters[self.random.index(voters.len())];
        // A report that was just on its way makes the silence begin a little later.
        let grace = self.silence_until_closed();
        let (from, lasts) = (self.span(grace - 900 * MS, grace - 450 * MS), self.span(SECOND, 5 * SECOND));
        self.plan_fault(from, lasts, Kind::CutStore, late);
    }

    pub fn cut_all(&mut self, node: usize, layer: Layer, on: bool) {
        for other in (0..self.nodes.len()).filter(|other| *other != node) {
            self.network.cut(layer, node, other, on);
            self.network.cut(layer, other, node, on);
        }
    }

    pub fn cut_pair(&mut self, one: usize, other: usize, on: bool) {
        for layer in [Layer::Agents, Layer::Replication] {
            self.network.cut(layer, one, other, on);
            self.network.cut(layer, other, one, on);
        }
    }

    /// The host comes back with an empty disk. Within the promise at most `needed` copies are lost at a
    /// time; beyond it the operator has to choose what to lose, but one copy always stays.
    fn wipe(&mut self, node: usize, beyond_promise: bool) {
        if !self.nodes[node].has_postgres {
            return;
        }
        let needed = self.spec.durability.needed();
        let data: Vec<usize> = (0..self.nodes.len()).filter(|node| self.nodes[*node].has_postgres).collect();
        let intact = data.iter().filter(|other| **other != node && self.member(**other).is_some()).count();
        let lost = data.len() - 1 - intact + 1;
        // The repository is a copy, too, where every rule in force counts it.
        let left = self.repository_member().is_some_and(|member| {
            let rules = self.store.record.rules.as_ref();
            rules.is_some_and(|rules| rules.in_force().all(|rule| rule.members.contains(&member)))
        });
        let within_promise = lost <= needed && (intact >= 1 || left);
        let allowed = if beyond_promise { intact >= 1 } else { within_promise };
        let holder_alone = self.store.record.rules.as_ref().is_some_and(|rules| {
            rules.in_force().any(|rule| {
                rule.members.len() <= needed && rule.members.iter().any(|m| m.node == self.nodes[node].name)
            })
        });
        if !allowed || (holder_alone && !beyond_promise) {
            return;
        }
        if beyond_promise {
            self.oracle.beyond_promise_at = Some(self.now);
        }
        self.lose_host(node);
        let there = &mut self.nodes[node];
        let life = there.postgres.generation + 1;
        let version = there.postgres.version + 1;
        let attempt = there.postgres.attempt + 1;
        there.postgres =
            crate::postgres::Postgres { generation: life, version, attempt, ..Default::default() };
        there.agent.local.durable = pgherd_core::observation::Durable::default();
        there.view = None;
    }

    pub fn cure(&mut self, node: usize) {
        self.nodes[node].damage = None;
        self.nodes[node].agent.local.damage = None;
        self.think_within(node, 5 * MS);
    }

    pub fn unhang(&mut self, node: usize) {
        self.nodes[node].slow.wal_hangs = false;
        let server = &mut self.nodes[node].postgres;
        let generation = server.generation;
        if server.state == State::Primary {
            self.flushed(node, generation);
        } else if let Some(link) = server.receiver {
            self.standby_flushes(link);
        } else if server.answers() {
            // The last receiver has been waiting to end.
            server.flushed = server.written;
            server.touch();
        }
    }

    pub fn operator_stop(&mut self, node: usize, on: bool) {
        self.nodes[node].stopping = on;
        self.nodes[node].agent.local.stopping = on;
        self.think_within(node, MS);
    }

    /// An operator talks to any agent; the order is the holder's to carry out.
    fn order_switchover(&mut self, by: usize, to: usize) {
        let to = self.random.once_in(2).then(|| self.nodes[to].name.clone());
        let Some((view, _)) = self.nodes[by].view.clone() else { return };
        let order = Some(Switchover { term: view.term, to });
        self.person_proposes(by, Proposal::Switchover { order });
    }

    pub fn person_proposes(&mut self, by: usize, proposal: Proposal) {
        if self.agent_runs(by) {
            self.coverage.action(&Action::Propose(proposal.clone()));
            self.propose(by, &proposal, false);
        }
    }

    fn force(&mut self, by: usize, to: usize) {
        let Some((view, _)) = self.nodes[by].view.clone() else { return };
        let to = self.nodes[to].name.clone();
        let by_name = self.nodes[by].name.clone();
        // What the command checks before it asks for consent.
        let electable = self.spec.node(&to).is_some_and(|node| node.electable());
        let has_copy = self.index(&to).is_some_and(|node| self.member(node).is_some());
        if electable && has_copy {
            self.person_proposes(by, Proposal::Force { term: view.term, to, by: by_name });
        }
    }

    /// An operator has the copy of `to` taken back by `behind` records.
    pub fn take_back(&mut self, by: usize, to: usize, behind: u64) {
        let Some((view, _)) = self.nodes[by].view.clone() else { return };
        let Some(reign) = view.open_reign() else { return };
        let node = self.nodes[to].name.clone();
        if restore::is_fit(&self.spec, &view, &node).is_err() {
            return;
        }
        let Some(holder) = self.index(&reign.holder.node) else { return };
        let end = self.nodes[holder].postgres.durable_end();
        let point = self.wal.place(end.hand, end.at.saturating_sub(behind).max(1));
        // Only what was agreed is in the repository.
        let timeline = self.wal.number(point);
        if view.line(timeline).is_none() || self.agreed_hand(&view, timeline) != Some(point.hand) {
            return;
        }
        let moment = Moment { backup: "one".to_owned(), timeline, end: wal::lsn(point.at), along: timeline };
        self.person_proposes(by, Proposal::Restore { order: Some((node, moment)) });
    }

    fn end_taking_back(&mut self, by: usize) {
        let Some((view, _)) = self.nodes[by].view.clone() else { return };
        let Some(restore) = &view.restore else { return };
        if restore.held.is_some() && self.random.once_in(2) {
            let by_name = self.nodes[by].name.clone();
            self.person_proposes(by, Proposal::LeadRestored { term: view.term, by: by_name });
        } else {
            self.person_proposes(by, Proposal::Restore { order: None });
        }
    }

    /// The records of `timeline` as the cluster knows it.
    pub fn agreed_hand(&self, record: &Record, timeline: Timeline) -> Option<wal::HandId> {
        let line = record.line(timeline)?;
        self.wal.hand_of(timeline, (timeline > Timeline(1)).then_some(line.term))
    }

    fn change_needed(&mut self) {
        let candidates = self.spec.nodes.iter().filter(|node| node.voter_candidate()).count();
        let mut spec = (*self.spec).clone();
        let degrade_after = spec.durability.degrade_after();
        let needed = self.random.index(candidates.min(3));
        spec.durability = match needed {
            0 => Durability::Async,
            needed => Durability::Quorum { needed, degrade_after },
        };
        if let Some(backup) = &mut spec.backup {
            // Where commits wait for nobody there is nothing to vote about.
            backup.voter &= needed > 0;
        }
        self.new_spec(Rc::new(spec));
    }

    fn remove_node(&mut self, node: usize) {
        let name = self.nodes[node].name.clone();
        let mut spec = (*self.spec).clone();
        spec.nodes.retain(|node| node.name != name && node.follow.as_ref() != Some(&name));
        let electable = spec.nodes.iter().filter(|node| node.electable()).count();
        if electable > spec.durability.needed().max(1) {
            self.new_spec(Rc::new(spec));
        }
    }

    fn new_spec(&mut self, spec: Rc<pgherd_core::spec::ClusterSpec>) {
        self.spec = spec;
        self.spec_changed_at = self.now;
        for node in 0..self.nodes.len() {
            self.think_within(node, 20 * MS);
        }
    }

    /// A stray program connects under a member's name. It answers nothing; the real one's slot keeps it
    /// from being sent WAL under that name, and it must be cut all the same.
    fn impostor(&mut self, node: usize, claims: usize) {
        let incarnation = self.durable(claims).member.as_ref().map_or(0, |member| member.incarnation.0);
        let server = &mut self.nodes[node].postgres;
        if server.state != State::Primary || node == claims {
            return;
        }
        let timeline = self.wal.hand(server.hand).number;
        server.pids += 1;
        server.senders.push(Sender {
            link: None,
            pid: server.pids,
            node: claims,
            incarnation,
            timeline,
            streaming: true,
            flush: None,
            list: Rc::clone(&server.loaded),
        });
        server.touch();
        self.think_within(node, 50 * MS);
    }
}
