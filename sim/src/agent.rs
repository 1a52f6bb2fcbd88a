//! The agent's process: it looks, lets core decide, and starts what was decided, as the real one does.
//!
//! Modelled after the real main loop: proposals that stand before the first deed run at once and each at
//! most once at a time; deeds run one list at a time in order; while one runs, PostgreSQL is not looked at
//! and nothing else is begun on it, except a stop, which preempts. What the agent knows of PostgreSQL is
//! as old as its last look; what it knows of others is as old as their last report.

use std::rc::Rc;
use std::time::Duration;

use pgherd_core::action::{Action, Duties};
use pgherd_core::ha::{self, Decision, lease, repository, suspicion};
use pgherd_core::observation as seen;
use pgherd_core::observation::{Local, Observation, Report, StoreView};
use pgherd_core::reason::Reason;
use pgherd_core::record::{BackupEnd, BackupOutcome, Cause, DrillEnd, Proposal};
use pgherd_core::types::{Instant, Member, Term};

use crate::breakage::{self, Breakage};
use crate::checkers::{addresses, leases, silence};
use crate::postgres::{State, WaitFor};
use crate::wal::lsn;
use crate::world::{Agent, Event, Layer, MS, Node, SECOND, Time, World, is_proposal};

/// Crashes further back do not count towards the poison rule.
const CRASH_WINDOW: Time = 600 * SECOND;
/// Base backups that fall due in one run.
const BACKUPS: u64 = 3;
/// Drills that do.
const DRILLS: u64 = 2;
/// Reports to the other agents.
pub const REPORT_EVERY: (Time, Time) = (280 * MS, 340 * MS);

impl World {
    /// The agent's process starts, on a host that is up.
    pub fn start_agent(&mut self, node: usize) {
        if self.nodes[node].agent.up || !self.nodes[node].host_up {
            return;
        }
        let name = self.nodes[node].name.clone();
        let others: Vec<_> =
            self.nodes.iter().map(|other| other.name.clone()).filter(|o| *o != name).collect();
        let now = self.now;
        let first_look = self.span(MS, 20 * MS);
        let Node { agent, fence, damage, stopping, frozen_until, .. } = &mut self.nodes[node];
        let durable = std::mem::take(&mut agent.local.durable);
        let (life, deed_token, think_token) = (agent.life + 1, agent.deed_token + 1, agent.think_token + 1);
        let drain_token = agent.drain_token + 1;
        let tasks = agent.tasks.of_next_life();
        *agent = Agent {
            up: true,
            life,
            deed_token,
            think_token,
            drain_token,
            tasks,
            steady_since: now.max(*frozen_until),
            think_at: Time::MAX,
            looks_from: now + first_look,
            ..Agent::default()
        };
        agent.local = Local { durable, stopping: *stopping, ..Local::default() };
        agent.local.damage = damage.map(str::to_owned);
        agent.peers = others.into_iter().map(|other| (other, seen::Peer::default())).collect();
        fence.alive = true;
        fence.last_sign = now;
        self.tell(Some(node), |_| "the agent starts".to_owned());
        let (first, second) = (self.span(MS, 300 * MS), self.span(MS, 300 * MS));
        self.after(first, Event::ReportTick { node, life });
        self.after(second, Event::ConfirmTick { node, life });
        self.after(MS, Event::HeartbeatTick { node, life });
        self.replica_starts(node);
        self.watch_soon(node);
        self.think_within(node, 2 * MS);
    }

    /// The agent's process dies. Its PostgreSQL runs on, and so does the fence.
    pub fn kill_agent(&mut self, node: usize) {
        let Node { agent, forgotten, .. } = &mut self.nodes[node];
        if !agent.up {
            return;
        }
        agent.up = false;
        agent.frozen_until = 0;
        agent.life += 1;
        agent.deeds.clear();
        agent.deed_token += 1;
        agent.think_token += 1;
        agent.proposals.clear();
        if let Some(before) = forgotten.take() {
            agent.local.durable = before;
        }
        self.end_stream(node);
        self.tell(Some(node), |_| "the agent dies".to_owned());
        self.fence_watches(node);
    }

    pub fn think_within(&mut self, node: usize, within: Time) {
        let agent = &mut self.nodes[node].agent;
        let at = self.now + within;
        if !agent.up || agent.think_at <= at {
            return;
        }
        agent.think_at = at;
        agent.think_token += 1;
        let token = agent.think_token;
        self.after(within, Event::Think { node, token });
    }

    /// While something waits for what PostgreSQL shows, it is looked at often.
    pub fn think_in_a_hurry(&mut self, node: usize) {
        let Some((record, _)) = &self.nodes[node].view else { return };
        let settled = record.open_reign().is_some_and(|reign| reign.gate_opened);
        let pending = record.rules.as_ref().is_some_and(|rules| rules.next.is_some());
        if !settled || pending {
            self.think_within(node, 25 * MS);
        }
    }

    pub fn think(&mut self, node: usize) {
        if !self.agent_runs(node) {
            return;
        }
        self.look(node);
        self.look_at_repository(node);
        let now = self.nodes[node].clock.local(self.now);
        let crashes = self.crashes.iter().filter(|at| self.now - **at < CRASH_WINDOW).count();
        let spec = Rc::clone(&self.spec);
        let Node { name, agent, view, clock, .. } = &mut self.nodes[node];
        let record = view.as_ref().map(|(record, _)| &**record);
        let term = record.map(|record| record.term);
        let observation = Observation {
            me: name,
            times: &self.times,
            spec: &spec,
            store: StoreView {
                record,
                confirmed: agent.confirmed.filter(|(of, _)| Some(*of) == term).map(|(_, asked)| asked),
                caught_up: agent.caught_up,
                reachable: agent.store_reachable,
            },
            local: &agent.local,
            peers: &agent.peers,
            recent_crashes: u32::try_from(crashes).unwrap_or(u32::MAX),
        };
        let mut decision = ha::decide(&mut agent.memory, now, &observation);
        let reigns = record.and_then(|record| record.reign.as_ref());
        let table = agent.local.gate_open
            && matches!(agent.local.postgres, seen::Postgres::Primary(_))
            && reigns.is_some_and(|reign| reign.holder.node == *name && reign.gate_opened);
        let proof = record.filter(|_| table);
        let proof = proof.and_then(|record| lease::proven(&agent.memory, &observation, record, record.term));
        if let Some(breakage) = self.breakage {
            let opened = clock.local(self.store.opened_at);
            breakage::distort(breakage, &mut agent.memory, &observation, opened, &mut decision);
        }
        if let Some(proven) = proof {
            leases::right_given(self, node, proven, now);
        }
        addresses::decided(self, node, decision.address, now);
        self.act(node, decision, now);
    }

    /// A repository that is always there; base backups take no time but for their WAL, where that votes, and some are wanted.
    fn look_at_repository(&mut self, node: usize) {
        let admitted = self.admitted_before(node);
        let leads = self.repository_leads(node);
        let Node { name, agent, view, .. } = &mut self.nodes[node];
        let archive = view.as_ref().and_then(|(record, _)| record.archive.as_ref());
        agent.local.archive = archive.filter(|_| agent.duties.archive).map(|archive| seen::ArchiveView {
            repository: Some("repository".to_owned()),
            streams: true,
            backup_is_due: archive.begun < BACKUPS || !leads,
            after: archive.ended.as_ref().map_or(0, |end| end.number),
            drill_is_due: archive.drill.as_ref().is_none_or(|drill| drill.began_unix_seconds < DRILLS),
            drill_after: archive.drill.as_ref().map(|drill| drill.began_unix_seconds),
            admitted,
        });
        if agent.duties.drill {
            let last = archive.and_then(|archive| archive.drill.as_ref());
            let began_unix_seconds = last.map_or(1, |drill| drill.began_unix_seconds + 1);
            let (node, backup, failed) = (name.clone(), None, None);
            agent.local.drill_ended = Some(DrillEnd { node, began_unix_seconds, seconds: 0, backup, failed });
        }
        let told = agent.local.backup_ended.as_ref().map(|end| end.number);
        let backup = agent.duties.backup.filter(|number| told != Some(*number));
        let name = name.clone();
        if let Some(number) = backup.filter(|_| self.repository_backed_up(node)) {
            let outcome = BackupOutcome::Complete { id: number.to_string() };
            let end = BackupEnd { number, node: name, unix_seconds: None, outcome };
            self.nodes[node].agent.local.backup_ended = Some(end);
        }
    }

    fn act(&mut self, node: usize, decision: Decision, now: Instant) {
        let Decision { actions, duties, reason, wants_rebuild, wake, .. } = decision;
        let agent = &mut self.nodes[node].agent;
        agent.wants_rebuild = wants_rebuild;
        if agent.duties != duties {
            let before = std::mem::replace(&mut agent.duties, duties.clone());
            if before.drain != duties.drain {
                self.drain(node, duties.drain);
            }
            let agent = &mut self.nodes[node].agent;
            if duties.prove_term {
                // A reign begins with a proof.
                let life = agent.life;
                self.heartbeat(node, life);
            }
        }
        self.feed_fence(node, &duties);
        self.repository_duties(node, &duties);
        self.note_reason(node, &reason);
        let wake = self.nodes[node].clock.true_span(wake.since(now));
        let agent = &mut self.nodes[node].agent;
        agent.think_at = Time::MAX;
        let first_look = if agent.looks_from > self.now { agent.looks_from - self.now } else { Time::MAX };
        self.think_within(node, wake.max(MS).min(first_look));
        self.begin(node, actions);
    }

    fn note_reason(&mut self, node: usize, reason: &Reason) {
        let code = reason.code();
        let agent = &mut self.nodes[node].agent;
        if agent.reason != Some(code) {
            agent.reason = Some(code);
            self.coverage.reason(code);
            self.tell(Some(node), |_| format!("[{code}] {reason}"));
        }
    }

    fn begin(&mut self, node: usize, mut actions: Vec<Action>) {
        let first_deed = actions.iter().position(|action| !is_proposal(action)).unwrap_or(actions.len());
        let deeds = actions.split_off(first_deed);
        for action in &actions {
            if let Action::Propose(proposal) = action {
                self.judges(node, proposal);
                self.coverage.action(action);
                self.propose(node, proposal, false);
            }
        }
        if deeds.is_empty() {
            return;
        }
        let stops = deeds.iter().any(|action| matches!(action, Action::StopNow));
        let agent = &self.nodes[node].agent;
        if (agent.local.busy.is_some() || agent.rest_until > self.now) && !stops {
            return;
        }
        let Node { agent, view, .. } = &mut self.nodes[node];
        agent.proposals.retain(|flight| !flight.from_deed);
        agent.deeds = deeds.into();
        agent.deed_record = view.as_ref().map(|(record, _)| Rc::clone(record));
        agent.local.busy = agent.deeds.iter().find_map(Action::busy).or(Some(seen::Busy::Configure));
        agent.stage = 0;
        self.next_deed(node);
    }

    fn judges(&mut self, node: usize, proposal: &Proposal) {
        let Proposal::Open { cause, .. } = proposal else { return };
        let holder = self.nodes[node].view.as_ref().and_then(|(record, _)| record.holder());
        if let Some(holder) = holder.and_then(|holder| self.index(&holder.node)) {
            silence::claimed(self, node, holder, *cause);
        }
    }

    /// Looks at the local PostgreSQL, unless a deed is under way.
    fn look(&mut self, node: usize) {
        let now = self.now;
        let Node { agent, postgres, has_postgres, .. } = &mut self.nodes[node];
        if agent.local.busy.is_some() || agent.looks_from > now {
            return;
        }
        if agent.looked_at == Some(postgres.version) {
            return;
        }
        agent.looked_at = Some(postgres.version);
        if !*has_postgres {
            agent.local.postgres = seen::Postgres::Absent;
            return;
        }
        let state = postgres.state;
        let was_primary = matches!(agent.local.postgres, seen::Postgres::Primary(_));
        let is_primary = state == State::Primary;
        if was_primary && !is_primary {
            forget_deeds(&mut agent.local);
        }
        agent.local.gate_open = postgres.gate_open;
        if is_primary && !self.list_is_in_effect(node) {
            self.nodes[node].agent.local.list = None;
        }
        let shown = self.shown(node, state);
        let agent = &mut self.nodes[node].agent;
        // Replay is as far as the copy goes: what it lags behind decides nothing here.
        agent.local.replayed = match &shown {
            seen::Postgres::Standby(standby) => standby.copy.end,
            _ => None,
        };
        agent.local.postgres = shown;
        if is_primary
            && let Some((_, timeline)) = agent.local.durable.promoting
            && let seen::Postgres::Primary(primary) = &agent.local.postgres
            && primary.copy.timeline == timeline
        {
            // A promotion that a former life of this agent had asked for has come to its end: the signal file
            // is put back and synced, and only then is the promotion done.
            agent.local.durable.promoting = None;
        }
    }

    fn shown(&self, node: usize, state: State) -> seen::Postgres {
        let server = &self.nodes[node].postgres;
        match state {
            State::Absent => seen::Postgres::Absent,
            State::Stopped => seen::Postgres::Stopped(self.copy(node)),
            State::Remains | State::Killed | State::Stopping
                if self.broken(Breakage::ReleasedBeforeEveryBackendWasGone) =>
            {
                seen::Postgres::Stopped(self.copy(node))
            }
            State::Remains | State::Killed | State::Stopping => seen::Postgres::Remains,
            State::Starting => seen::Postgres::Starting,
            State::Standby | State::Promoting => seen::Postgres::Standby(seen::Standby {
                copy: self.copy(node),
                follows: server
                    .conninfo
                    .map(|conninfo| (self.nodes[conninfo.upstream].name.clone(), conninfo.term)),
                receiving: server.receiver.is_some(),
                diverged: server.diverged,
            }),
            State::Primary => seen::Postgres::Primary(self.primary(node)),
        }
    }

    pub fn copy(&self, node: usize) -> seen::Copy {
        let server = &self.nodes[node].postgres;
        seen::Copy {
            system: self.store.record.system.or(Some(crate::schedule::SYSTEM)),
            timeline: self.wal.number(self.wal.settle(server.end())),
            end: Some(lsn(server.written)),
            begins: self.wal.begins(self.wal.settle(server.end()).hand),
        }
    }

    fn primary(&self, node: usize) -> seen::Primary {
        let server = &self.nodes[node].postgres;
        let timeline = self.wal.hand(server.hand).number;
        let senders = server.senders.iter().map(|sender| seen::Sender {
            pid: sender.pid,
            member: (sender.timeline == timeline).then(|| Member {
                node: self.name_of(sender.node),
                incarnation: pgherd_core::types::Incarnation(sender.incarnation),
            }),
            genuine: sender.link.is_some(),
            streaming: sender.streaming,
            flush_lsn: sender.flush.map(lsn),
        });
        seen::Primary {
            copy: self.copy(node),
            flush_lsn: lsn(server.flushed),
            senders: senders.collect(),
            slots: server.slots.iter().map(|node| self.name_of(*node)).collect(),
        }
    }

    // Reports and probes.

    pub fn report_tick(&mut self, node: usize, life: u32) {
        if self.nodes[node].agent.life != life || !self.agent_runs(node) {
            return;
        }
        let next = self.span(REPORT_EVERY.0, REPORT_EVERY.1);
        self.after(next, Event::ReportTick { node, life });
        if self.nodes[node].agent.duties.keep_slots {
            self.nodes[node].postgres.slots = self.all_slots();
        }
        let holder = self.probe_holder(node);
        let report = Rc::new(self.report(node, holder));
        let delay = self.network.delay;
        for to in 0..self.nodes.len() {
            if to == node || !self.network.passes(Layer::Agents, node, to) {
                continue;
            }
            if self.network.loss_percent > 0 && self.random.below(100) < self.network.loss_percent {
                continue;
            }
            silence::spoke(self, node, to);
            if delay == 0 && self.nodes[to].frozen_until.max(self.nodes[to].agent.frozen_until) <= self.now {
                self.hear(to, node, &report);
            } else {
                self.after(delay, Event::ReportArrives { node: to, from: node, report: Rc::clone(&report) });
            }
        }
    }

    /// A trivial command on the holder's PostgreSQL, from here; returns the holder if it was probed.
    fn probe_holder(&mut self, node: usize) -> Option<usize> {
        if !self.nodes[node].agent.duties.probe_holder {
            return None;
        }
        let (record, _) = self.nodes[node].view.as_ref()?;
        let holder = self.index(&record.holder()?.node)?;
        let there = &self.nodes[holder];
        let alive = there.host_up
            && there.frozen_until <= self.now
            && there.postgres.answers()
            && self.network.both_ways(Layer::Replication, node, holder);
        let now = self.nodes[node].clock.local(self.now);
        let name = self.nodes[holder].name.clone();
        let peer = self.nodes[node].agent.peers.entry(name).or_default();
        if alive {
            peer.probe_failing_since = None;
        } else {
            peer.probe_failing_since.get_or_insert(now);
        }
        Some(holder)
    }

    fn report(&self, node: usize, holder: Option<usize>) -> Report {
        let now = self.nodes[node].clock.local(self.now);
        let Node { agent, view, .. } = &self.nodes[node];
        let failing = holder.and_then(|holder| {
            let name = &self.nodes[holder].name;
            let since = agent.peers.get(name)?.probe_failing_since?;
            Some((name.clone(), suspicion::lasting(&agent.memory, now, since)))
        });
        let record = view.as_ref().map(|(record, _)| &**record);
        Report {
            holder_probe_failing: failing,
            wants_rebuild: agent.wants_rebuild,
            reaches_repository: repository::was_reached(now, &agent.local),
            ..Report::of(&agent.local, record)
        }
    }

    pub fn hear(&mut self, node: usize, from: usize, report: &Report) {
        if !self.agent_runs(node) {
            return;
        }
        let now = self.nodes[node].clock.local(self.now);
        let name = self.nodes[from].name.clone();
        let round_trip = Duration::from_micros(2 * self.network.delay);
        let peer = self.nodes[node].agent.peers.entry(name).or_default();
        peer.heard = Some(now);
        peer.round_trip = round_trip;
        peer.report = Some(report.clone());
    }

    // Proxies.

    /// Those that follow this agent, if there are any, have transactions that end when they end, or not in time.
    fn drain(&mut self, node: usize, begins: bool) {
        let agent = &mut self.nodes[node].agent;
        agent.local.drained_for = None;
        agent.drain_token += 1;
        let token = agent.drain_token;
        if begins && !self.nodes[node].slow.transactions {
            let takes = self.span_or((MS, 60 * MS), 4, (60 * MS, 4 * SECOND));
            self.after(takes, Event::Drained { node, token });
        }
    }

    pub fn drained(&mut self, node: usize, token: u32) {
        let Node { agent, view, .. } = &mut self.nodes[node];
        if !agent.up || agent.drain_token != token {
            return;
        }
        agent.local.drained_for = view.as_ref().map(|(record, _)| record.term);
        self.think_within(node, MS);
    }

    // Proving the term by commits.

    pub fn heartbeat_tick(&mut self, node: usize, life: u32) {
        if self.nodes[node].agent.life != life || !self.agent_runs(node) {
            return;
        }
        self.heartbeat(node, life);
        let renew = self.nodes[node].clock.true_span(self.times.renew);
        self.after(renew, Event::HeartbeatTick { node, life });
    }

    pub fn heartbeat(&mut self, node: usize, life: u32) {
        let Node { agent, postgres, clock, view, .. } = &self.nodes[node];
        if agent.life != life || !agent.duties.prove_term || postgres.state != State::Primary {
            return;
        }
        let begun = clock.local(self.now);
        let term = view.as_ref().map_or(Term(0), |(record, _)| record.term);
        self.write(node, Some(WaitFor::Heartbeat { begun, term }));
    }

    /// Counts only if commits waited for standbys from its beginning to its end.
    pub fn heartbeat_returns(&mut self, node: usize, begun: Instant, term: Term, alone: bool) {
        let waited =
            !alone && self.nodes[node].postgres.waits_enforced && self.nodes[node].postgres.loaded.waits();
        if !waited || !self.agent_runs(node) {
            return;
        }
        let begun = if self.broken(Breakage::LeaseCountedFromReceipt) {
            self.nodes[node].clock.local(self.now)
        } else {
            begun
        };
        let local = &mut self.nodes[node].agent.local;
        local.heartbeat = local.heartbeat.max(Some((term, begun)));
    }

    // The fence.

    fn feed_fence(&mut self, node: usize, duties: &Duties) {
        let lossy = self.nodes[node].view.as_ref().is_some_and(|(record, _)| {
            record.rules.as_ref().is_some_and(|rules| rules.in_force().any(|rule| rule.needed == 0))
        });
        let within = if lossy {
            self.times.lease.saturating_sub(Duration::from_millis(500))
        } else {
            self.times.agent_grace
        };
        let within = self.nodes[node].clock.true_span(within);
        let now = self.now;
        let Node { fence, agent, .. } = &mut self.nodes[node];
        fence.last_sign = now;
        // Disarmed only once PostgreSQL has been seen to be no primary.
        let harmless = matches!(
            agent.local.postgres,
            seen::Postgres::Standby(_) | seen::Postgres::Stopped(_) | seen::Postgres::Absent
        );
        match duties.fence {
            Some(term) => fence.armed = Some((term, within)),
            None if harmless && agent.local.busy.is_none() => fence.armed = None,
            None => {}
        }
    }

    /// From now on nobody feeds the fence of this node.
    pub fn fence_watches(&mut self, node: usize) {
        let Node { fence, agent, .. } = &self.nodes[node];
        let Some((_, within)) = fence.armed.filter(|_| fence.alive) else { return };
        let life = agent.life;
        let late = (fence.last_sign + within).saturating_sub(self.now).max(MS);
        self.after(late, Event::FenceDue { node, life });
    }

    pub fn fence_due(&mut self, node: usize, life: u32) {
        let Node { fence, agent, postgres, host_up, .. } = &self.nodes[node];
        let Some((term, within)) = fence.armed.filter(|_| fence.alive && *host_up) else { return };
        let fed = agent.life != life && agent.up;
        if fed || fence.last_sign + within > self.now + MS {
            return;
        }
        if postgres.runs() {
            // What a postmaster leaves behind is killed too, and all of it seen gone before a word is sent.
            if postgres.state != State::Killed {
                self.tell(Some(node), |_| "the fence stops PostgreSQL".to_owned());
                self.coverage.fenced += 1;
                self.kill_server(node, 30 * MS);
            }
            self.after(40 * MS, Event::FenceDue { node, life });
            return;
        }
        let fence = &mut self.nodes[node].fence;
        fence.alive = false;
        fence.armed = None;
        for to in 0..self.nodes.len() {
            if to != node && self.network.passes(Layer::Agents, node, to) {
                let takes = self.span(MS, 5 * MS) + self.network.delay;
                self.after(takes, Event::FenceSpeaks { to, from: node, term });
            }
        }
    }

    /// "Stopped, term t": a release, brought to the store by whoever hears it.
    pub fn fence_heard(&mut self, to: usize, from: usize, term: Term) {
        if !self.agent_runs(to) {
            return;
        }
        let Some((record, _)) = self.nodes[to].view.clone() else { return };
        let Some(holder) = record.holder().filter(|holder| holder.node == self.nodes[from].name) else {
            return;
        };
        let proposal = match &record.election {
            None if record.term == term => Proposal::Open {
                term,
                cause: Cause::Fenced,
                by: self.nodes[to].name.clone(),
                released: true,
                poisoned: false,
            },
            Some(election) if election.term == term.next() => {
                Proposal::Gone { term: election.term, holder: holder.clone() }
            }
            _ => return,
        };
        self.coverage.action(&Action::Propose(proposal.clone()));
        self.propose(to, &proposal, false);
    }
}

/// PostgreSQL is another process, or none: what was done to the last one is void.
pub fn forget_deeds(local: &mut Local) {
    local.marker = None;
    local.checkpointed_for = None;
    local.drained_for = None;
    local.list = None;
    local.heartbeat = None;
}

/// What a running server is asked about its list, as the real driver asks: a new connection, and every WAL
/// sender's priority.
impl World {
    pub fn list_is_in_effect(&self, node: usize) -> bool {
        let server = &self.nodes[node].postgres;
        let careless = self.broken(Breakage::EmptyList) || self.broken(Breakage::MarkerJudgedByCommit);
        let Some(proven) = self.nodes[node].agent.local.list.as_ref().filter(|_| !careless) else {
            return true;
        };
        server.loaded.core == *proven
            && server.senders.iter().filter(|s| s.link.is_some()).all(|sender| sender.list.core == *proven)
    }
}
