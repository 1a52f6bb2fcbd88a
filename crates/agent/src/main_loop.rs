//! The agent's one loop: take an event, put it into the mind, think, and start what was decided.
//!
//! Every way in which the world can wake the agent is a variant of [`Event`]; the loop is the only place
//! where they are handled, and it never waits for anything but the next one. What takes time (PostgreSQL,
//! the store, the network) runs in tasks that report back by an event:
//!
//! - the [executor](crate::execute) does one list of actions on PostgreSQL at a time; a stop preempts it;
//! - proposals run beside it, each at most once at a time;
//! - the duties (proving the term, probing the holder, the fence) follow the newest decision.
//!
//! Hazard: a handler that blocks here delays a lease. Nothing in this file does I/O.

use std::time::Duration;

use pgherd_core::action::{Action, Address, Duties};
use pgherd_core::ha::archive::{self, Agreed};
use pgherd_core::observation::{ArchiveView, Busy, Durable, Postgres, SealedRepository, SyncList};
use pgherd_core::record::{Archive, BackupEnd, DrillEnd, Proposal, Record};
use pgherd_core::types::{Incarnation, Instant, NodeName, SystemId, Term};
use pgherd_dcs::{Revision, Snapshot};
use tokio::sync::{mpsc, oneshot, watch};

use crate::agreed;
use crate::clock;
use crate::execute::Executor;
use crate::gossip::{ArchiveShow, BackupShow, Gossip};
use crate::guard::Guard;
use crate::mind::{Deeds, Mind};
use crate::vip::{Keeper, Wish};

/// Events that may wait; a sender that finds the queue full waits, which slows down a flood of reports.
pub(crate) const QUEUE: usize = 256;
/// A proposal is given up after this long; the next decision makes it again if it is still right.
const PROPOSAL_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) enum Event {
    /// The local view of the store changed.
    Store(Snapshot),
    /// This agent changed the cluster's record, and need not wait for the view.
    Agreed(Box<agreed::Agreed>),
    /// The store was asked, from `asked` on, whether the record is still at `revision`.
    Confirmed {
        revision: Revision,
        asked: Instant,
        unchanged: Option<bool>,
    },
    /// A heartbeat that was begun then was acknowledged by enough voters.
    Heartbeat {
        term: Term,
        begun: Instant,
    },
    /// Another agent was heard; with a round trip if this one asked.
    Heard {
        round_trip: Option<Duration>,
        gossip: Box<Gossip>,
    },
    /// The probes of the holder's PostgreSQL.
    Probed {
        node: NodeName,
        failing_since: Option<Instant>,
    },
    /// The local PostgreSQL was looked at, after everything that had been done to it by then.
    Seen(Box<Seen>),
    /// The executor begins an action, or has ended its list.
    Working(Option<Busy>),
    Done(Box<Done>),
    ProposalEnded(Box<Proposal>),
    Damage(Option<String>),
    /// What the owner of the archive has seen; `None`: this node is not that any more.
    Archive(Option<Box<ArchiveSeen>>),
    /// The repository has answered what it was asked then, where it votes.
    RepositoryAnswered {
        asked: Instant,
    },
    /// What this agent has found in it behind a seal of its own, which it began to put then.
    RepositorySealed {
        asked: Instant,
        sealed: Box<SealedRepository>,
    },
    /// How far the base backup is that this node takes.
    BackingUp(Option<BackupShow>),
    BackedUp(Box<BackupEnd>),
    /// How the drill came out that this node has made.
    Drilled(Box<DrillEnd>),
    /// Every proxy that follows this agent has said so of this drain.
    Drained(u64),
    /// An operator wants PostgreSQL stopped, for good or until this agent starts again.
    Stop,
    /// Somebody asks for the whole picture.
    Ask(oneshot::Sender<Box<Picture>>),
}

/// One look at the archive, by its owner.
#[derive(Clone, Debug)]
pub(crate) struct ArchiveSeen {
    pub(crate) view: ArchiveView,
    pub(crate) show: ArchiveShow,
}

/// One look at the local PostgreSQL.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Looks are numbered; one that began before the last deed ended is of no use.
    pub(crate) began: Instant,
    pub(crate) postgres: Postgres,
    pub(crate) list: Option<SyncList>,
    pub(crate) replay_lag: Option<Duration>,
    pub(crate) replay_lsn: Option<pgherd_core::types::Lsn>,
    pub(crate) pending_restart: Option<bool>,
    /// The gate as the files have it, for an agent that adopts a running server.
    pub(crate) gate_open: bool,
}

/// What an ended list of actions leaves behind.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    pub(crate) durable: Durable,
    pub(crate) deeds: DeedsChange,
    pub(crate) seen: Option<Seen>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct DeedsChange {
    pub(crate) forget: bool,
    pub(crate) marker: Option<(SyncList, pgherd_core::types::Lsn)>,
    pub(crate) gate_open: Option<bool>,
    pub(crate) checkpointed_for: Option<Term>,
}

/// A copy of the mind's content for those who show it.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    pub(crate) now: Instant,
    /// When this agent first thought.
    pub(crate) started: Option<Instant>,
    pub(crate) own: Gossip,
    pub(crate) peers: Vec<(NodeName, Option<Duration>, Option<Gossip>)>,
    pub(crate) postgres: Postgres,
    pub(crate) deeds: Deeds,
    pub(crate) confirmed: Option<Instant>,
    /// When the newest heartbeat of the present term was begun that enough voters acknowledged.
    pub(crate) heartbeat: Option<Instant>,
    /// What the proxies are to answer once no transaction of theirs is left here.
    pub(crate) drain: Option<u64>,
    pub(crate) store_reachable: bool,
    pub(crate) spec_generation: u64,
    pub(crate) spec: pgherd_core::spec::HerdSpec,
    pub(crate) record: Option<Record>,
}

pub(crate) struct MainLoop {
    mind: Mind,
    executor: Executor,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    store: pgherd_dcs::Store,
    /// What this agent tells the others, always the newest.
    gossip: watch::Sender<Gossip>,
    duties: watch::Sender<Assigned>,
    look_pause: watch::Sender<Duration>,
    guard: Option<Guard>,
    /// A witness has no address to hold.
    keeper: Option<Keeper>,
    wished: Wish,
    proposing: Vec<Proposal>,
    last_deed_ended: Instant,
    adopted_gate: bool,
}

/// The duties with what they refer to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Assigned {
    pub(crate) duties: Duties,
    pub(crate) term: Term,
    pub(crate) revision: Option<Revision>,
    pub(crate) holder: Option<NodeName>,
    pub(crate) needed: u32,
    /// The number of the drain under way.
    pub(crate) drain: Option<u64>,
    pub(crate) system: Option<SystemId>,
    pub(crate) archive: Option<Archive>,
    /// The line of history that the herd is on.
    pub(crate) agreed: Option<Agreed>,
    pub(crate) incarnations: Incarnations,
}

/// Which incarnations of the repository were given out, and which one is a member now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Incarnations {
    pub(crate) last: Incarnation,
    pub(crate) repository: Option<Incarnation>,
}

impl Incarnations {
    fn of(record: &Record) -> Incarnations {
        let repository = record.repository().map(|member| member.incarnation);
        Incarnations { last: record.last_incarnation, repository }
    }

    /// Whether it was a member, and will never be one again. Numbers only grow: an older record knows of none that a newer one does not. 0 is nobody's.
    pub(crate) fn is_former(&self, incarnation: Incarnation) -> bool {
        incarnation > Incarnation(0) && incarnation <= self.last && self.repository != Some(incarnation)
    }
}

pub(crate) struct Wiring {
    pub(crate) mind: Mind,
    pub(crate) executor: Executor,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) sender: mpsc::Sender<Event>,
    pub(crate) store: pgherd_dcs::Store,
    pub(crate) gossip: watch::Sender<Gossip>,
    pub(crate) duties: watch::Sender<Assigned>,
    pub(crate) look_pause: watch::Sender<Duration>,
    /// A witness has nothing to guard.
    pub(crate) guard: Option<Guard>,
    pub(crate) keeper: Option<Keeper>,
}

impl MainLoop {
    pub(crate) fn new(wiring: Wiring) -> MainLoop {
        let Wiring { mind, executor, events, sender, store, gossip, duties, look_pause, guard, keeper } =
            wiring;
        MainLoop {
            mind,
            executor,
            events,
            sender,
            store,
            gossip,
            duties,
            look_pause,
            guard,
            keeper,
            wished: Wish::default(),
            proposing: Vec::new(),
            last_deed_ended: Instant::default(),
            adopted_gate: false,
        }
    }

    /// Runs until every sender of events is gone.
    pub(crate) async fn run(mut self) {
        let mut wake = clock::now();
        loop {
            let sleep = wake.since(clock::now());
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                () = tokio::time::sleep(sleep) => {}
            }
            // Whatever else has come in meanwhile is seen by the same thought.
            while let Ok(event) = self.events.try_recv() {
                self.handle(event);
            }
            wake = self.think_and_act();
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Store(snapshot) => self.read_store(&snapshot),
            Event::Agreed(agreed) => self.mind.read_record(agreed.record, Some(agreed.revision)),
            Event::Confirmed { revision, asked, unchanged } => {
                self.mind.store_reachable = unchanged.is_some();
                let known = self.mind.record.as_ref();
                let same = known.filter(|(_, known)| unchanged == Some(true) && *known == Some(revision));
                self.mind.caught_up |= same.is_some();
                // The term was open when it was asked about, whatever has become of it since.
                if let Some((record, _)) = same.filter(|(record, _)| record.election.is_none()) {
                    self.mind.confirmed = Some((record.term, asked));
                }
            }
            Event::Heartbeat { term, begun } => self.mind.heartbeat = Some((term, begun)),
            Event::Heard { round_trip, gossip } => {
                if gossip.cluster == self.mind.cluster && gossip.node != self.mind.me {
                    let peer = self.mind.peers.entry(gossip.node.clone()).or_default();
                    peer.hear(clock::now(), round_trip, *gossip);
                }
            }
            Event::Probed { node, failing_since } => self.mind.probe = Some((node, failing_since)),
            Event::Seen(seen) => self.see(*seen),
            Event::Working(busy) => self.mind.busy = busy,
            Event::Done(done) => self.done(*done),
            Event::ProposalEnded(proposal) => self.proposing.retain(|other| *other != *proposal),
            Event::Damage(damage) => self.mind.damage = damage,
            Event::Archive(seen) => self.mind.archive = seen.map(|seen| *seen),
            Event::RepositoryAnswered { asked } => self.mind.repository_answered(asked),
            Event::RepositorySealed { asked, sealed } => {
                self.mind.repository.sealed = Some(*sealed);
                self.mind.repository_answered(asked);
            }
            Event::BackingUp(show) => self.mind.backing_up = show,
            Event::BackedUp(end) => self.mind.backup_ended = Some(*end),
            Event::Drilled(end) => self.mind.drill_ended = Some(*end),
            Event::Drained(drain) => {
                if self.mind.drain == Some(drain) {
                    self.mind.drained_for = self.mind.record().map(|record| record.term);
                }
            }
            Event::Stop => self.mind.stopping = true,
            // Whoever asked may have given up waiting.
            Event::Ask(answer) => drop(answer.send(Box::new(self.picture()))),
        }
    }

    fn read_store(&mut self, snapshot: &Snapshot) {
        match agreed::record(snapshot, &self.mind.cluster) {
            Ok((record, revision)) => self.mind.read_record(record, revision),
            Err(error) => {
                tracing::error!(%error, "cannot read the cluster's record; nothing is decided on it");
            }
        }
        match agreed::value::<agreed::StoredSpec>(snapshot, agreed::SPEC) {
            Ok(Some((stored, _))) => {
                self.mind.spec = stored.spec;
                self.mind.spec_generation = stored.generation;
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(%error, "cannot read the specification; the one before stays in force");
            }
        }
    }

    fn see(&mut self, seen: Seen) {
        // A look that began before the last deed ended shows the world before it.
        if self.mind.busy.is_some() || seen.began < self.last_deed_ended {
            return;
        }
        if was_replaced(&self.mind.postgres, &seen.postgres) {
            self.mind.forget_deeds();
        }
        if !std::mem::replace(&mut self.adopted_gate, true) {
            self.mind.deeds.gate_open = seen.gate_open;
        }
        self.mind.postgres = seen.postgres;
        self.mind.list = seen.list;
        self.mind.replay_lag = seen.replay_lag;
        self.mind.replay_lsn = seen.replay_lsn;
        self.mind.pending_restart = seen.pending_restart;
    }

    fn done(&mut self, done: Done) {
        let change = done.deeds;
        if change.forget {
            self.mind.forget_deeds();
        }
        let deeds = &mut self.mind.deeds;
        deeds.marker = change.marker.or(deeds.marker.take());
        deeds.gate_open = change.gate_open.unwrap_or(deeds.gate_open);
        deeds.checkpointed_for = change.checkpointed_for.or(deeds.checkpointed_for);
        self.mind.durable = done.durable;
        self.mind.busy = None;
        self.last_deed_ended = clock::now();
        if let Some(mut seen) = done.seen {
            seen.began = self.last_deed_ended;
            self.see(seen);
        }
    }

    fn think_and_act(&mut self) -> Instant {
        let now = clock::now();
        let Some(decision) = self.mind.think(now) else {
            return now + pgherd_core::ha::TICK;
        };
        let (actions, duties, wake) = (decision.actions.clone(), decision.duties.clone(), decision.wake);
        let address = decision.address;
        // Before any deed that shuts clients out, which then waits until it is done.
        self.hold(address);
        self.start(actions);
        self.assign(duties.clone());
        let pause = self.mind.look_pause();
        self.look_pause.send_if_modified(|before| std::mem::replace(before, pause) != pause);
        self.gossip.send_replace(self.mind.gossip(clock::now()));
        if let Some(guard) = &mut self.guard {
            guard.turn(clock::now(), &self.mind, &duties);
            self.mind.fence_armed = Some(guard.is_armed());
        }
        wake
    }

    /// Starts what was decided. Actions keep their order: proposals that come before the first action on
    /// PostgreSQL, or stand alone, run at once; the others wait for it in the executor's list.
    fn start(&mut self, actions: Vec<Action>) {
        let first_deed = actions.iter().position(|action| !matches!(action, Action::Propose(_)));
        let mut proposals = actions;
        let deeds = first_deed.map_or_else(Vec::new, |index| proposals.split_off(index));
        // What only ends an election, or opens one, need not wait for deeds that merely stand before it.
        for action in proposals {
            if let Action::Propose(proposal) = action {
                self.propose(proposal);
            }
        }
        if deeds.is_empty() {
            return;
        }
        let stops = deeds.iter().any(|action| matches!(action, Action::StopNow));
        if self.mind.busy.is_some() && !stops {
            return;
        }
        let Some((record, _)) = self.mind.record.clone() else { return };
        self.mind.busy = Some(crate::execute::busy_with(&deeds));
        self.executor.begin(deeds, record, &self.mind.spec);
    }

    fn hold(&mut self, address: Address) {
        let Some(keeper) = &self.keeper else { return };
        let own = self.mind.spec.node(&self.mind.me);
        let vip = own.and_then(|(cluster, _)| cluster.vip.clone());
        let wish = Wish { vip, port: own.map_or(0, |(_, node)| node.port), address };
        if wish != self.wished {
            keeper.wish(wish.clone());
            self.wished = wish;
        }
        self.mind.vip = keeper.state();
    }

    fn propose(&mut self, proposal: Proposal) {
        if self.proposing.contains(&proposal) {
            return;
        }
        self.proposing.push(proposal.clone());
        let (store, sender, cluster) = (self.store.clone(), self.sender.clone(), self.mind.cluster.clone());
        tokio::spawn(async move {
            // The loop is gone only when the agent ends.
            match agreed::propose(&store, &cluster, &proposal, PROPOSAL_WITHIN).await {
                Ok(agreed) => drop(sender.send(Event::Agreed(Box::new(agreed))).await),
                Err(error) => tracing::debug!(%error, ?proposal, "a proposal did not go through"),
            }
            drop(sender.send(Event::ProposalEnded(Box::new(proposal))).await);
        });
    }

    fn assign(&mut self, duties: Duties) {
        if self.mind.drain.is_some() != duties.drain {
            self.mind.drain = duties.drain.then(drain_number);
            self.mind.drained_for = None;
        }
        let record = self.mind.record.as_ref();
        let assigned = Assigned {
            duties,
            term: record.map_or(Term(0), |(record, _)| record.term),
            revision: record.and_then(|(_, revision)| *revision),
            holder: record.and_then(|(record, _)| record.holder()).map(|holder| holder.node.clone()),
            needed: record
                .and_then(|(record, _)| record.rules.as_ref())
                .map_or(0, |rules| rules.target().needed),
            drain: self.mind.drain,
            system: record.and_then(|(record, _)| record.system),
            archive: record.and_then(|(record, _)| record.archive.clone()),
            agreed: record.and_then(|(record, _)| archive::agreed(record)),
            incarnations: record.map(|(record, _)| Incarnations::of(record)).unwrap_or_default(),
        };
        self.duties.send_if_modified(|before| {
            let changed = *before != assigned;
            *before = assigned;
            changed
        });
    }

    fn picture(&self) -> Picture {
        let now = clock::now();
        let peers = self.mind.peers.iter().map(|(name, peer)| {
            (name.clone(), peer.heard.map(|heard| now.since(heard)), peer.gossip.clone())
        });
        let present = self.mind.record().map(|record| record.term);
        Picture {
            now,
            started: self.mind.memory.started,
            own: self.mind.gossip(now),
            peers: peers.collect(),
            postgres: self.mind.postgres.clone(),
            deeds: self.mind.deeds.clone(),
            confirmed: self.mind.confirmed.filter(|(term, _)| Some(*term) == present).map(|(_, at)| at),
            heartbeat: self.mind.heartbeat.filter(|(term, _)| Some(*term) == present).map(|(_, at)| at),
            drain: self.mind.drain,
            store_reachable: self.mind.store_reachable,
            spec_generation: self.mind.spec_generation,
            spec: self.mind.spec.clone(),
            record: self.mind.record().cloned(),
        }
    }
}

/// Of this host's life: an answer to a drain of before a restart of this agent is none to a later one.
fn drain_number() -> u64 {
    u64::try_from(clock::now().since(Instant::default()).as_micros()).unwrap_or(u64::MAX)
}

/// Is what runs now another server than before, as far as our deeds are concerned?
fn was_replaced(before: &Postgres, after: &Postgres) -> bool {
    matches!(before, Postgres::Primary(_)) && !matches!(after, Postgres::Primary(_))
}
