//! All that the agent knows, in one place, and what of it a decision sees.
//!
//! Only the main loop changes it, by one [`Event`](crate::main_loop::Event) at a time; there are no locks and no
//! other way in. What is remembered of our own deeds ([`Deeds`]) is forgotten as soon as PostgreSQL is another
//! process.

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_core::ha::{Decision, Memory, decide, repository, suspicion};
use pgherd_core::observation::{
    Busy, Durable, Local, Observation, Peer, Postgres, Report, RepositoryView, Running, StoreView, SyncList,
};
use pgherd_core::record::{BackupEnd, DrillEnd, Record};
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::{Instant, Lsn, NodeName, Term};
use pgherd_dcs::Revision;

use crate::gossip::{BackupShow, FailingProbe, Gossip, Is, Show, VipShow};
use crate::main_loop::ArchiveSeen;

/// A crash counts towards "three in ten minutes".
const CRASH_WINDOW_S: u64 = 600;
/// How often PostgreSQL is looked at: when nothing is expected of it, when others have the next step, when it has,
/// and when clients wait for what it shows.
const LOOK_EVERY: Duration = Duration::from_millis(300);
const LOOK_MEANWHILE: Duration = Duration::from_millis(50);
const LOOK_IN_A_HURRY: Duration = Duration::from_millis(10);
const LOOK_FOR_CLIENTS: Duration = Duration::from_millis(3);
/// Round trips looked back on for the slowest one.
const ROUND_TRIPS_KEPT: usize = 16;

/// What only this agent can know because it did it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Deeds {
    pub(crate) marker: Option<(SyncList, Lsn)>,
    pub(crate) gate_open: bool,
    pub(crate) checkpointed_for: Option<Term>,
}

#[derive(Debug)]
pub(crate) struct Mind {
    pub(crate) me: NodeName,
    pub(crate) cluster: NodeName,
    pub(crate) spec: HerdSpec,
    pub(crate) spec_generation: u64,
    pub(crate) record: Option<(Record, Option<Revision>)>,
    pub(crate) confirmed: Option<(Term, Instant)>,
    /// A record of this agent's life was the store's newest word.
    pub(crate) caught_up: bool,
    pub(crate) store_reachable: bool,
    pub(crate) durable: Durable,
    pub(crate) postgres: Postgres,
    pub(crate) list: Option<SyncList>,
    pub(crate) deeds: Deeds,
    pub(crate) busy: Option<Busy>,
    pub(crate) damage: Option<String>,
    pub(crate) stopping: bool,
    pub(crate) heartbeat: Option<(Term, Instant)>,
    /// The number of the drain under way, which no other one has had in this life.
    pub(crate) drain: Option<u64>,
    pub(crate) drained_for: Option<Term>,
    pub(crate) peers: BTreeMap<NodeName, PeerMind>,
    /// The holder that is probed, and since when its probes fail.
    pub(crate) probe: Option<(NodeName, Option<Instant>)>,
    pub(crate) replay_lag: Option<Duration>,
    pub(crate) replay_lsn: Option<Lsn>,
    /// Whether the fence is armed; `None` without one.
    pub(crate) fence_armed: Option<bool>,
    pub(crate) pending_restart: Option<bool>,
    /// Of PostgreSQL's Unix socket.
    pub(crate) socket_dir: Option<String>,
    /// What has become of the address that moves with the gate, on this host.
    pub(crate) vip: crate::vip::State,
    /// What the archive was when this node, as its owner, looked last.
    pub(crate) archive: Option<ArchiveSeen>,
    /// What is known of it here where it votes.
    pub(crate) repository: RepositoryView,
    pub(crate) backing_up: Option<BackupShow>,
    pub(crate) backup_ended: Option<BackupEnd>,
    pub(crate) drill_ended: Option<DrillEnd>,
    pub(crate) memory: Memory,
    pub(crate) decision: Option<Decision>,
    pub(crate) reason_since: Option<Instant>,
}

#[derive(Debug, Default)]
pub(crate) struct PeerMind {
    pub(crate) heard: Option<Instant>,
    pub(crate) round_trips: std::collections::VecDeque<Duration>,
    pub(crate) gossip: Option<Gossip>,
}

impl PeerMind {
    pub(crate) fn hear(&mut self, at: Instant, round_trip: Option<Duration>, gossip: Gossip) {
        self.heard = Some(at);
        self.gossip = Some(gossip);
        if let Some(span) = round_trip {
            self.round_trips.push_back(span);
            if self.round_trips.len() > ROUND_TRIPS_KEPT {
                self.round_trips.pop_front();
            }
        }
    }
}

impl Mind {
    pub(crate) fn record(&self) -> Option<&Record> {
        self.record.as_ref().map(|(record, _)| record)
    }

    /// An answer may come behind that to a later question.
    pub(crate) fn repository_answered(&mut self, asked: Instant) {
        self.repository.answered = self.repository.answered.max(Some(asked));
    }

    /// Takes a record up, unless a newer one is known: what this agent itself agreed on comes before the view has it.
    pub(crate) fn read_record(&mut self, record: Record, revision: Option<Revision>) {
        if self.record.as_ref().is_none_or(|(_, known)| *known <= revision) {
            self.record = Some((record, revision));
        }
    }

    /// Thinks once. The result is kept, and what changed in its reason is told.
    pub(crate) fn think(&mut self, now: Instant) -> Option<&Decision> {
        let spec = self.spec.cluster(&self.cluster)?;
        let holder = self.record.as_ref().and_then(|(record, _)| record.holder().cloned());
        let peers: BTreeMap<NodeName, Peer> = self
            .peers
            .iter()
            .map(|(name, peer)| {
                let probed = self.probe.as_ref().filter(|(node, _)| node == name);
                let known = Peer {
                    heard: peer.heard,
                    round_trip: peer.round_trips.iter().max().copied().unwrap_or_default(),
                    probe_failing_since: probed.and_then(|(_, since)| *since),
                    report: peer.gossip.as_ref().map(Gossip::to_report),
                };
                (name.clone(), known)
            })
            .collect();
        let term = self.record.as_ref().map(|(record, _)| record.term);
        let local = self.local();
        let observation = Observation {
            me: &self.me,
            times: &self.spec.times,
            spec,
            store: StoreView {
                record: self.record.as_ref().map(|(record, _)| record),
                confirmed: self.confirmed.filter(|(of, _)| Some(*of) == term).map(|(_, at)| at),
                caught_up: self.caught_up,
                reachable: self.store_reachable,
            },
            local: &local,
            peers: &peers,
            recent_crashes: self.record.as_ref().map_or(0, |(record, _)| recent_crashes(record)),
        };
        let decision = decide(&mut self.memory, now, &observation);
        let before = self.decision.as_ref().map(|decision| decision.reason.code());
        if before != Some(decision.reason.code()) {
            self.reason_since = Some(now);
            tracing::info!(
                node = %self.me,
                code = decision.reason.code(),
                holder = holder.map(|holder| holder.to_string()),
                "{}", decision.reason
            );
        }
        self.decision = Some(decision);
        self.decision.as_ref()
    }

    fn local(&self) -> Local {
        Local {
            durable: self.durable.clone(),
            postgres: self.postgres.clone(),
            busy: self.busy,
            replayed: self.replay_lsn,
            damage: self.damage.clone(),
            stopping: self.stopping,
            heartbeat: self.heartbeat,
            list: self.list.clone(),
            marker: self.deeds.marker.clone(),
            gate_open: self.deeds.gate_open,
            checkpointed_for: self.deeds.checkpointed_for,
            drained_for: self.drained_for,
            archive: self.archive.as_ref().map(|seen| seen.view.clone()),
            backup_ended: self.backup_ended.clone(),
            drill_ended: self.drill_ended.clone(),
            repository: self.repository.clone(),
        }
    }

    /// What the others are told.
    pub(crate) fn gossip(&self, now: Instant) -> Gossip {
        let report = self.report(now);
        let decision = self.decision.as_ref();
        Gossip {
            version: crate::gossip::VERSION,
            node: self.me.clone(),
            cluster: self.cluster.clone(),
            term: report.term,
            running: match report.running {
                Running::Unknown => Is::Unknown,
                Running::Nothing => Is::Nothing,
                Running::Standby => Is::Standby,
                Running::Primary => Is::Primary,
            },
            timeline: self.postgres.copy().map(|copy| copy.timeline),
            flush_lsn: self.postgres.end(),
            holds: report.holds,
            holder_probe_failing: report.holder_probe_failing.map(|(node, span)| FailingProbe {
                node,
                for_ms: u64::try_from(span.as_millis()).unwrap_or(u64::MAX),
            }),
            wants_rebuild: report.wants_rebuild,
            damage: report.damage,
            reaches_repository: report.reaches_repository,
            show: Show {
                reason_code: decision.map(|decision| decision.reason.code().to_owned()).unwrap_or_default(),
                reason: decision.map(|decision| decision.reason.to_string()).unwrap_or_default(),
                for_ms: self
                    .reason_since
                    .map_or(0, |since| u64::try_from(now.since(since).as_millis()).unwrap_or(u64::MAX)),
                state: Some(self.state()),
                upstream: match &self.postgres {
                    Postgres::Standby(standby) => standby.follows.as_ref().map(|(node, _)| node.clone()),
                    _ => None,
                },
                replay_lag_ms: self.replay_lag.map(|lag| u64::try_from(lag.as_millis()).unwrap_or(u64::MAX)),
                pending_restart: self.pending_restart,
                gate_open: self.deeds.gate_open,
                replay_lsn: self.replay_lsn,
                fence_armed: self.fence_armed,
                vip: VipShow {
                    held: self.vip.held.as_ref().map(|vip| vip.address.to_string()),
                    trouble: self.vip.trouble.clone(),
                    claimed_by: self.vip.claimed_by.clone(),
                },
                socket_dir: self.socket_dir.clone(),
                archive: self.archive.as_ref().map(|seen| seen.show.clone()),
                backup: self.backing_up.clone(),
                spec_generation: self.spec_generation,
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        }
    }

    fn report(&self, now: Instant) -> Report {
        let failing = self.probe.as_ref().and_then(|(node, since)| {
            since.map(|since| (node.clone(), suspicion::lasting(&self.memory, now, since)))
        });
        let local = self.local();
        Report {
            holder_probe_failing: failing,
            reaches_repository: repository::was_reached(now, &local),
            wants_rebuild: self.decision.as_ref().is_some_and(|decision| decision.wants_rebuild),
            ..Report::of(&local, self.record())
        }
    }

    /// The word of the status contract for what this node is doing.
    pub(crate) fn state(&self) -> pgherd_api::status::State {
        use pgherd_api::status::State;
        if self.damage.is_some() {
            return State::Barred;
        }
        match self.busy {
            Some(Busy::InitDb) => return State::Initializing,
            Some(Busy::Clone | Busy::Restore) => return State::Cloning,
            Some(Busy::Rewind) => return State::Rewinding,
            Some(Busy::Promote) => return State::Promoting,
            Some(Busy::Start) => return State::Starting,
            _ => {}
        }
        match &self.postgres {
            Postgres::Unknown | Postgres::Starting => State::Starting,
            Postgres::Absent => State::Initializing,
            Postgres::Stopped(_) | Postgres::Remains => State::Stopped,
            Postgres::Primary(_) => State::Running,
            Postgres::Standby(standby) if standby.receiving => State::Streaming,
            Postgres::Standby(_) => State::CatchingUp,
        }
    }

    /// PostgreSQL is another process, or none: what we did to the last one is void.
    pub(crate) fn forget_deeds(&mut self) {
        self.deeds = Deeds::default();
        self.heartbeat = None;
    }

    /// How soon the local PostgreSQL is looked at again: by what waits for what it shows. Its death is noticed
    /// without a look.
    pub(crate) fn look_pause(&self) -> Duration {
        let Some(record) = self.record() else { return LOOK_EVERY };
        let settled = record.open_reign().is_some_and(|reign| reign.gate_opened);
        let rule_pending = record.rules.as_ref().is_some_and(|rules| rules.next.is_some());
        match &self.postgres {
            Postgres::Primary(_) if !self.deeds.gate_open => LOOK_FOR_CLIENTS,
            Postgres::Primary(_) if rule_pending || record.switchover.is_some() => LOOK_IN_A_HURRY,
            Postgres::Standby(standby) if standby.follows.is_some() && !standby.receiving => LOOK_IN_A_HURRY,
            Postgres::Starting => LOOK_IN_A_HURRY,
            _ if settled => LOOK_EVERY,
            // Others have the next step, and may be on the same machine.
            _ => LOOK_MEANWHILE,
        }
    }
}

fn recent_crashes(record: &Record) -> u32 {
    let now = crate::agreed::unix_seconds();
    let recent = record.events.iter().filter(|event| {
        now.saturating_sub(event.unix_seconds) < CRASH_WINDOW_S && event.code == crate::history::CRASH
    });
    u32::try_from(recent.count()).unwrap_or(u32::MAX)
}
