//! The executor: what each [`Action`] does to PostgreSQL and to the node's disk, step by step.
//!
//! Between any two steps the agent can die, PostgreSQL can crash and the host can lose power; what a step made
//! durable stays. The contract of each action stands in `pgherd_core::action`; this file keeps it and the real
//! executor must. What a seed proves is proven for executors that do.

use std::rc::Rc;

use pgherd_core::action::{Action, VoteTemplate};
use pgherd_core::ha::election;
use pgherd_core::observation::{Durable, SyncList};
use pgherd_core::record::{Moment, Proposal, Record, Standing};
use pgherd_core::types::{Lsn, Member, NodeName, Term, Timeline};

use crate::agent::forget_deeds;
use crate::breakage::{Breakage, RETURNED};
use crate::checkers::{addresses, destruction, gates, incarnations, terms};
use crate::postgres::{Conninfo, State};
use crate::story;
use crate::wal::{self, Point};
use crate::world::{Event, Layer, MS, SECOND, Time, World};

/// A clean stop that takes longer becomes an immediate one.
const STOP_WITHIN: Time = 3 * SECOND;
/// Proving a list in effect is given up after this long.
const LIST_WITHIN: Time = 4 * SECOND;
/// After a deed that failed.
const REST: Time = 100 * MS;
/// Between two looks of a deed that waits.
const POLL: Time = 15 * MS;

enum Step {
    /// The next stage, after a while.
    Next(Time),
    /// The same stage again, after a while.
    Again(Time),
    /// The stage after next is begun by an answer of the store.
    Proposed,
    Done,
    Failed(&'static str),
}

impl World {
    pub fn next_deed(&mut self, node: usize) {
        let agent = &mut self.nodes[node].agent;
        agent.stage = 0;
        agent.noted = 0;
        agent.deed_token += 1;
        let token = agent.deed_token;
        let Some(action) = agent.deeds.front().cloned() else {
            agent.local.busy = None;
            agent.deed_record = None;
            // What is seen next was looked at after the last deed.
            agent.looked_at = None;
            self.think_within(node, MS);
            return;
        };
        if let Some(busy) = action.busy() {
            self.nodes[node].agent.local.busy = Some(busy);
        }
        self.coverage.action(&action);
        self.tell(Some(node), |_| format!("begins to {}", story::action(&action)));
        let takes = self.span_or((MS, 6 * MS), 25, (10 * MS, 200 * MS));
        self.after(takes, Event::Deed { node, token });
    }

    pub fn deed(&mut self, node: usize) {
        if !self.agent_runs(node) {
            return;
        }
        let Some(action) = self.nodes[node].agent.deeds.front().cloned() else { return };
        let step = self.perform(node, &action);
        let agent = &mut self.nodes[node].agent;
        let token = agent.deed_token;
        match step {
            Step::Next(after) => {
                agent.stage += 1;
                self.after(after, Event::Deed { node, token });
            }
            Step::Again(after) => self.after(after, Event::Deed { node, token }),
            Step::Proposed => {}
            Step::Done => {
                agent.deeds.pop_front();
                self.next_deed(node);
            }
            Step::Failed(why) => {
                self.tell(Some(node), |_| format!("could not: {why}"));
                self.deeds_failed(node);
            }
        }
    }

    /// The rest of the list is dropped, and nothing but a stop is begun for a moment.
    fn deeds_failed(&mut self, node: usize) {
        let agent = &mut self.nodes[node].agent;
        agent.deeds.clear();
        agent.rest_until = self.now + REST;
        self.next_deed(node);
        self.think_within(node, REST + MS);
    }

    /// The proposal that the list of deeds waited for has ended.
    pub fn deed_proposed(&mut self, node: usize, done: bool) {
        let agent = &mut self.nodes[node].agent;
        if agent.deeds.is_empty() {
            return;
        }
        if done {
            agent.deeds.pop_front();
            self.next_deed(node);
        } else {
            self.deeds_failed(node);
        }
    }

    fn perform(&mut self, node: usize, action: &Action) -> Step {
        if let Some(term) = term_of(action)
            && self.durable(node).term > term
        {
            return Step::Failed("this node has adopted a later term");
        }
        match action {
            Action::Propose(proposal) => self.deed_proposes(node, proposal),
            Action::BecomeMember { member, rebuild } => self.become_member(node, member, *rebuild),
            Action::Adopt { term } => {
                self.remember(node, |durable| durable.term = *term);
                Step::Done
            }
            Action::InitDb => self.init_db(node),
            Action::StartSealed => self.start_sealed(node),
            Action::StopCleanly => self.stop_cleanly(node),
            Action::StopNow => self.stop_now(node),
            Action::Seal { term } => self.seal(node, *term),
            Action::Vote { term, template } => self.vote(node, *term, template),
            Action::CatchUp { term, source, until } => self.catch_up(node, *term, source, *until),
            Action::Promote { term, timeline, list, .. } => self.promote(node, *term, *timeline, list),
            Action::Follow { term, upstream, timeline } => self.follow(node, *term, upstream, *timeline),
            Action::SetSyncList { list, .. } => self.set_sync_list(node, list),
            Action::WriteMarker { list, .. } => self.write_marker(node, list),
            Action::SetGate { open, .. } => self.set_gate(node, *open),
            Action::Checkpoint { term } => self.checkpoint(node, *term),
            Action::CutSender { pid, .. } => {
                self.end_sender(node, *pid);
                Step::Done
            }
            Action::CreateSlot { node: member, .. } => self.create_slot(node, member),
            Action::Clone { source, .. } => self.copy_anew(node, source, false),
            Action::Rewind { source, .. } => self.copy_anew(node, source, true),
            Action::Restore { moment, .. } => self.restore(node, moment),
            Action::Inherit { timeline, until, .. } => self.inherit(node, *timeline, *until),
        }
    }

    pub fn durable(&self, node: usize) -> &Durable {
        &self.nodes[node].agent.local.durable
    }

    /// Changes what this node's disk remembers; when this returns it survives a loss of power.
    fn remember(&mut self, node: usize, change: impl FnOnce(&mut Durable)) {
        let before = self.durable(node).term;
        change(&mut self.nodes[node].agent.local.durable);
        terms::adopted(self, node, before);
    }

    fn stage(&self, node: usize) -> u8 {
        self.nodes[node].agent.stage
    }

    fn deed_proposes(&mut self, node: usize, proposal: &Proposal) -> Step {
        if self.propose(node, proposal, true) { Step::Proposed } else { Step::Failed("it no longer fits") }
    }

    fn become_member(&mut self, node: usize, member: &Member, rebuild: bool) -> Step {
        if rebuild {
            destruction::begins(self, node);
        }
        self.remember(node, |durable| {
            durable.member = Some(member.clone());
            durable.rebuilding = rebuild;
            durable.held = None;
            if rebuild {
                // Another copy: what the former one had seen says nothing about it.
                durable.adopted.clear();
                durable.promoting = None;
            }
        });
        if !rebuild {
            incarnations::made(self, node);
        }
        Step::Done
    }

    fn init_db(&mut self, node: usize) -> Step {
        match self.stage(node) {
            0 => {
                self.remember(node, |durable| durable.rebuilding = true);
                let takes = self.span(200 * MS, 600 * MS);
                Step::Next(takes)
            }
            _ => {
                let hand = self.wal.found(node);
                let reserved = self.reserved();
                let server = &mut self.nodes[node].postgres;
                server.state = State::Stopped;
                server.hand = hand;
                (server.written, server.flushed) = (1, 1);
                server.histories = 0;
                server.list_on_disk = reserved;
                server.conninfo = None;
                server.touch();
                self.remember(node, |durable| durable.rebuilding = false);
                Step::Done
            }
        }
    }

    fn start_sealed(&mut self, node: usize) -> Step {
        let reserved = self.reserved();
        match (self.nodes[node].postgres.state, self.stage(node)) {
            (State::Stopped, 0) => {
                // The signal file and the empty upstream are on disk before the first process runs.
                let server = &mut self.nodes[node].postgres;
                server.conninfo = None;
                // Under that nothing is acknowledged, should somebody promote it.
                server.list_on_disk = reserved;
                forget_deeds(&mut self.nodes[node].agent.local);
                self.remember(node, |durable| durable.promoting = None);
                self.start_server(node);
                Step::Next(POLL)
            }
            (State::Starting, _) => Step::Again(POLL),
            (State::Standby, 1) => Step::Done,
            _ => Step::Failed("PostgreSQL did not start"),
        }
    }

    /// A fast shutdown: sessions end, and the WAL senders deliver all there is, as long as somebody listens.
    fn stop_cleanly(&mut self, node: usize) -> Step {
        let until = self.now + STOP_WITHIN;
        match self.nodes[node].postgres.state {
            State::Absent | State::Stopped => {
                if self.stage(node) > 0 {
                    forget_deeds(&mut self.nodes[node].agent.local);
                }
                self.remember(node, |durable| durable.promoting = None);
                Step::Done
            }
            State::Primary => {
                self.nodes[node].agent.stage_until = until;
                let server = &mut self.nodes[node].postgres;
                // Their clients are told that the connection ended, not that the commit is done.
                server.waits.clear();
                server.gate_open = false;
                self.write(node, None);
                let server = &mut self.nodes[node].postgres;
                server.state = State::Stopping;
                server.was_primary = true;
                server.touch();
                Step::Next(POLL)
            }
            State::Stopping => {
                let server = &self.nodes[node].postgres;
                let late = self.now >= self.nodes[node].agent.stage_until;
                let delivered = server
                    .senders
                    .iter()
                    .filter(|sender| sender.link.is_some())
                    .all(|sender| sender.flush == Some(server.flushed));
                if late {
                    self.kill_server(node, MS);
                } else if delivered && server.flushed == server.written {
                    let takes = self.span(5 * MS, 40 * MS);
                    self.kill_server(node, takes);
                }
                Step::Again(POLL)
            }
            State::Killed => Step::Next(POLL),
            State::Standby => {
                let takes = self.span(10 * MS, 60 * MS);
                self.kill_server(node, takes);
                Step::Next(takes + MS)
            }
            State::Starting | State::Promoting | State::Remains => {
                self.kill_server(node, 20 * MS);
                Step::Next(21 * MS)
            }
        }
    }

    /// "Immediate", then SIGKILL after a second, to every process of this PostgreSQL; and all seen gone.
    fn stop_now(&mut self, node: usize) -> Step {
        match self.nodes[node].postgres.state {
            State::Absent | State::Stopped => {
                forget_deeds(&mut self.nodes[node].agent.local);
                self.remember(node, |durable| durable.promoting = None);
                Step::Done
            }
            State::Killed => Step::Again(POLL),
            _ => {
                let takes = self.span_or((5 * MS, 50 * MS), 10, (100 * MS, 900 * MS));
                self.kill_server(node, takes);
                Step::Again(takes.min(50 * MS))
            }
        }
    }

    fn seal(&mut self, node: usize, term: Term) -> Step {
        match (self.stage(node), self.nodes[node].postgres.state) {
            (0, State::Promoting) if self.broken(Breakage::LatePromotion) => Step::Next(MS),
            (0, State::Primary | State::Promoting | State::Remains | State::Stopping | State::Absent) => {
                Step::Failed("only a standby or a stopped copy can be sealed")
            }
            (0, _) => {
                if self.broken(Breakage::NoSeal) {
                    return Step::Next(MS);
                }
                // Empty upstream on disk, passfile gone, directory synced; then the receiver is told to end.
                let restarts = self.broken(Breakage::ReceiverRestartsAfterTheSeal);
                if !restarts {
                    self.nodes[node].postgres.conninfo = None;
                    self.nodes[node].postgres.touch();
                }
                let takes = if std::mem::take(&mut self.nodes[node].slow.seal) {
                    400 * MS
                } else {
                    self.span(10 * MS, 40 * MS)
                };
                self.nodes[node].agent.noted = u64::from(takes > 300 * MS);
                Step::Next(takes.min(300 * MS))
            }
            (1, _) if self.broken(Breakage::NoSeal) => Step::Next(MS),
            (1, State::Killed) => Step::Again(POLL),
            (1, state) => {
                if self.nodes[node].agent.noted == 1 && state != State::Stopped {
                    // It does not let go in time: killed, and sealed dead.
                    self.kill_server(node, 20 * MS);
                    return Step::Again(POLL);
                }
                self.end_receiver(node);
                if self.broken(Breakage::ReceiverRestartsAfterTheSeal) {
                    let late = self.span(100 * MS, 800 * MS);
                    self.connect_soon(node, late);
                }
                let takes = self.span_or((2 * MS, 10 * MS), 20, (10 * MS, 300 * MS));
                Step::Next(takes)
            }
            _ => {
                if self.broken(Breakage::SealNotDurable) {
                    let before = self.durable(node).clone();
                    self.nodes[node].forgotten.get_or_insert(before);
                }
                self.remember(node, |durable| {
                    durable.term = term;
                    durable.sealed = Some(term);
                });
                Step::Done
            }
        }
    }

    fn vote(&mut self, node: usize, term: Term, template: &VoteTemplate) -> Step {
        let server = &self.nodes[node].postgres;
        let receives = server.receiver.is_some()
            && !self.broken(Breakage::NoSeal)
            && !self.broken(Breakage::ReceiverRestartsAfterTheSeal);
        if self.durable(node).sealed != Some(term) || receives || server.is_primary() || !server.has_copy() {
            return Step::Failed("this copy is not sealed");
        }
        if self.stage(node) == 0 {
            // The files are synced before their end is told.
            let hangs = self.nodes[node].slow.wal_hangs;
            if hangs {
                return Step::Again(50 * MS);
            }
            let server = &mut self.nodes[node].postgres;
            server.flushed = server.written;
            server.touch();
            let takes = self.span_or((3 * MS, 25 * MS), 15, (50 * MS, 600 * MS));
            return Step::Next(takes);
        }
        let Some(record) = self.nodes[node].agent.deed_record.clone() else {
            return Step::Failed("the store was never read");
        };
        let end = self.wal.settle(self.nodes[node].postgres.durable_end());
        let (timeline, lsn) = (self.wal.number(end), wal::lsn(end.at));
        let begins = self.wal.begins(end.hand);
        let adopted = &self.durable(node).adopted;
        let (position, known) = match self.breakage {
            Some(breakage) => crate::breakage::position(breakage, &record, adopted, timeline, lsn, &begins),
            None => election::position(&record, adopted, timeline, lsn, &begins),
        };
        let vote = template.fill(Standing::Sealed, position, timeline, begins, known);
        let proposal = Proposal::Vote { term, vote };
        self.coverage.action(&Action::Propose(proposal.clone()));
        self.deed_proposes(node, &proposal)
    }

    fn catch_up(&mut self, node: usize, term: Term, source: &NodeName, until: Lsn) -> Step {
        if source.is_repository() {
            return self.fetch(node, until);
        }
        let Some(from) = self.index(source) else { return Step::Failed("nobody of that name") };
        let there = &self.nodes[from];
        let reachable = there.host_up
            && there.frozen_until <= self.now
            && there.postgres.state == State::Standby
            && there.agent.local.durable.sealed == Some(term)
            && self.network.both_ways(Layer::Replication, node, from);
        if !reachable || self.nodes[node].postgres.state != State::Standby {
            return Step::Failed("the source does not answer");
        }
        if self.stage(node) == 0 {
            let record = self.nodes[node].agent.deed_record.clone();
            let timeline = record.as_ref().and_then(|record| {
                let election = record.election.as_ref()?;
                Some(election.votes.get(source)?.timeline)
            });
            if let Some((record, timeline)) = record.as_ref().zip(timeline) {
                self.adopt_lines(node, record, timeline);
            }
            let takes = self.span(50 * MS, 400 * MS);
            return Step::Next(takes);
        }
        let (theirs, mine) = (self.nodes[from].postgres.durable_end(), self.nodes[node].postgres.end());
        if self.wal.admits(theirs, mine).is_none() {
            return Step::Failed("the source's history has left this copy's");
        }
        let at = wal::at(until).min(theirs.at);
        if at > mine.at {
            let place = self.wal.place(theirs.hand, at);
            let number = self.wal.number(place);
            let server = &mut self.nodes[node].postgres;
            server.hand = place.hand;
            (server.written, server.flushed) = (at, at);
            server.add_history(number);
            server.touch();
        }
        Step::Done
    }

    /// WAL out of the repository is put beside what the copy has, and synced. The server comes to it in its own time.
    fn fetch(&mut self, node: usize, until: Lsn) -> Step {
        if self.nodes[node].postgres.state != State::Standby {
            return Step::Failed("only a sealed standby takes WAL");
        }
        let record = self.nodes[node].agent.deed_record.clone();
        let vote = record.as_ref().and_then(|record| {
            let timeline = record.election.as_ref()?.votes.get(&NodeName::repository())?.timeline;
            Some((Rc::clone(record), timeline))
        });
        let Some((record, timeline)) = vote else { return Step::Failed("the repository has not voted") };
        if self.stage(node) == 0 {
            self.adopt_lines(node, &record, timeline);
            let takes = self.span_or((30 * MS, 300 * MS), 10, (500 * MS, 3 * SECOND));
            return Step::Next(takes);
        }
        if self.stage(node) == 2 {
            let unread = self.nodes[node].postgres.unread.is_some();
            let waits = unread && !self.broken(Breakage::PromotionDoesNotWaitForWhatWasFetched);
            return if waits { Step::Again(POLL) } else { Step::Done };
        }
        let mine = self.nodes[node].postgres.end();
        let Some(there) = self.fetched(node, timeline, Some(mine), wal::at(until)) else {
            return Step::Failed("the repository does not have all of it, or does not answer");
        };
        if there.at > mine.at {
            let number = self.wal.number(self.wal.settle(there));
            let generation = self.nodes[node].postgres.generation;
            let server = &mut self.nodes[node].postgres;
            server.unread.get_or_insert(mine);
            server.hand = there.hand;
            (server.written, server.flushed) = (there.at, there.at);
            server.add_history(number);
            server.touch();
            let takes = self.span_or((20 * MS, 300 * MS), 3, (SECOND, 5 * SECOND));
            self.after(takes, Event::Reads { node, generation });
        }
        Step::Next(POLL)
    }

    /// A node without a copy makes one out of the repository, up to there.
    fn inherit(&mut self, node: usize, timeline: Timeline, until: Lsn) -> Step {
        if self.stage(node) == 0 {
            if !matches!(self.nodes[node].postgres.state, State::Absent | State::Stopped) {
                return Step::Failed("there is a server");
            }
            if !self.durable(node).rebuilding {
                return Step::Failed("this copy is somebody's vote");
            }
            let server = &mut self.nodes[node].postgres;
            server.state = State::Absent;
            server.touch();
            let takes = self.span_or((200 * MS, 1500 * MS), 15, (2 * SECOND, 6 * SECOND));
            return Step::Next(takes);
        }
        let Some(record) = self.nodes[node].agent.deed_record.clone() else {
            return Step::Failed("the store was never read");
        };
        let Some(there) = self.fetched(node, timeline, None, wal::at(until)) else {
            return Step::Failed("the repository does not have all of it, or does not answer");
        };
        self.lay_copy(node, there.hand, there.at);
        self.adopt_lines(node, &record, timeline);
        self.remember(node, |durable| durable.rebuilding = false);
        incarnations::made(self, node);
        self.tell(Some(node), |world| format!("has a copy that ends at {}", world.end_text(node)));
        Step::Done
    }

    /// A directory that was filled from the repository up to there, in which no server has run.
    fn lay_copy(&mut self, node: usize, hand: wal::HandId, end: u64) {
        let reserved = self.reserved();
        let server = &mut self.nodes[node].postgres;
        server.state = State::Stopped;
        server.hand = hand;
        (server.written, server.flushed) = (end, end);
        server.histories = 0;
        server.list_on_disk = reserved;
        server.conninfo = None;
        server.slots.clear();
        server.touch();
    }

    /// Notes the timelines of a history before the first byte of any of them is taken; and makes sure that
    /// a promotion by hand takes a number that nobody has reserved.
    fn adopt_lines(&mut self, node: usize, record: &Rc<Record>, timeline: Timeline) {
        let chain = chain(record, timeline);
        for line in
            record.lines.iter().filter(|line| line.timeline > Timeline(1) && line.timeline <= timeline)
        {
            self.nodes[node].postgres.add_history(line.timeline);
        }
        self.remember(node, |durable| durable.adopted.extend(chain));
    }

    fn promote(&mut self, node: usize, term: Term, timeline: Timeline, list: &SyncList) -> Step {
        let state = self.nodes[node].postgres.state;
        match self.stage(node) {
            0 => {
                let own = self.wal.number(self.wal.settle(self.nodes[node].postgres.end()));
                if state != State::Standby || self.nodes[node].postgres.receiver.is_some() || own >= timeline
                {
                    return Step::Failed("only a sealed standby of an older timeline can be promoted");
                }
                if self.nodes[node].postgres.unread.is_some()
                    && !self.broken(Breakage::PromotionDoesNotWaitForWhatWasFetched)
                {
                    return Step::Again(POLL);
                }
                self.remember(node, |durable| {
                    durable.term = term;
                    durable.promoting = Some((term, timeline));
                    durable.adopted.insert(timeline, term);
                });
                let list = self.list(list);
                let left_open = self.broken(Breakage::GateLeftOpenByPromotion);
                let server = &mut self.nodes[node].postgres;
                server.list_on_disk = list;
                // Readers of a standby are shut out before it leads: it may hold WAL that nobody acknowledged.
                server.gate_open &= left_open;
                if !self.broken(Breakage::ReusedTimelineNumber) {
                    for number in 2..timeline.0 {
                        self.nodes[node].postgres.add_history(Timeline(number));
                    }
                }
                self.reload(node);
                self.nodes[node].agent.stage_until = self.now + LIST_WITHIN;
                Step::Next(POLL / 3)
            }
            1 => {
                let server = &self.nodes[node].postgres;
                let loaded = server.loaded.core == *list && server.waits_enforced == server.loaded.waits();
                if state != State::Standby || self.now > self.nodes[node].agent.stage_until {
                    return Step::Failed("the list was not proven in effect");
                }
                if !loaded {
                    return Step::Again(POLL / 3);
                }
                self.begin_promotion(node, true);
                self.nodes[node].agent.stage_until = self.now + 300 * MS;
                Step::Next(20 * MS)
            }
            _ => match state {
                State::Promoting
                    if self.broken(Breakage::LatePromotion)
                        && self.now > self.nodes[node].agent.stage_until =>
                {
                    self.remember(node, |durable| durable.promoting = None);
                    Step::Failed("PostgreSQL takes its time")
                }
                State::Promoting => Step::Again(POLL),
                State::Primary => {
                    let number = self.wal.hand(self.nodes[node].postgres.hand).number;
                    if number != timeline && !self.broken(Breakage::ReusedTimelineNumber) {
                        self.kill_server(node, 20 * MS);
                        return Step::Failed("PostgreSQL took another timeline");
                    }
                    self.nodes[node].postgres.slots = self.all_slots();
                    let local = &mut self.nodes[node].agent.local;
                    forget_deeds(local);
                    local.list = Some(list.clone());
                    Step::Done
                }
                _ => Step::Failed("PostgreSQL went away"),
            },
        }
    }

    fn follow(&mut self, node: usize, term: Term, upstream: &NodeName, timeline: Timeline) -> Step {
        let late =
            self.nodes[node].postgres.state == State::Promoting && self.broken(Breakage::LatePromotion);
        if self.nodes[node].postgres.state != State::Standby && !late {
            return Step::Failed("only a standby can follow");
        }
        if self.durable(node).promoting.is_some() && !self.broken(Breakage::LatePromotion) {
            return Step::Failed("a promotion is pending");
        }
        let Some(upstream) = self.index(upstream) else { return Step::Failed("nobody of that name") };
        if self.stage(node) == 0 {
            // The former receiver is gone before the timelines of this reign are noted: what it could still
            // bring, from an upstream that somebody promotes by hand, would pass for theirs.
            let server = &mut self.nodes[node].postgres;
            server.conninfo = None;
            server.touch();
            self.end_receiver(node);
            let takes = self.span(MS, 8 * MS);
            return Step::Next(takes);
        }
        let Some(record) = self.nodes[node].agent.deed_record.clone() else {
            return Step::Failed("the store was never read");
        };
        self.adopt_lines(node, &record, timeline);
        self.remember(node, |durable| {
            durable.term = term;
            durable.sealed = None;
        });
        let server = &mut self.nodes[node].postgres;
        server.conninfo = Some(Conninfo { upstream, term, timeline });
        server.diverged = false;
        server.touch();
        terms::took_part(self, node);
        let late = self.span(MS, 20 * MS);
        self.connect_soon(node, late);
        Step::Done
    }

    fn set_sync_list(&mut self, node: usize, list: &SyncList) -> Step {
        if self.nodes[node].postgres.state != State::Primary {
            return Step::Failed("only a primary has a list");
        }
        let timeout = Step::Failed("the list was not proven in effect");
        let careless = self.broken(Breakage::MarkerJudgedByCommit);
        match self.stage(node) {
            0 => {
                self.nodes[node].agent.stage_until = self.now + LIST_WITHIN;
                self.nodes[node].agent.local.list = None;
                let next = if self.broken(Breakage::EmptyList) && list.names.is_empty() {
                    self.list(&SyncList::default())
                } else {
                    self.list(list)
                };
                let server = &self.nodes[node].postgres;
                if next.waits() && !server.waits_enforced && !careless {
                    // From an empty list: first a name that nobody can have, until a commit is seen to wait
                    // for it. That proves the checkpointer's flag, which no answer of a COMMIT proves.
                    self.nodes[node].postgres.list_on_disk = self.reserved();
                    self.reload(node);
                    return Step::Next(POLL);
                }
                self.nodes[node].postgres.list_on_disk = next;
                self.reload(node);
                self.nodes[node].agent.stage = 1;
                Step::Next(POLL / 3)
            }
            1 if !self.nodes[node].postgres.waits_enforced => {
                if self.now > self.nodes[node].agent.stage_until { timeout } else { Step::Again(POLL) }
            }
            1 => {
                let next = self.list(list);
                self.nodes[node].postgres.list_on_disk = next;
                self.reload(node);
                Step::Next(POLL / 3)
            }
            _ => {
                let server = &self.nodes[node].postgres;
                let wanted = &server.list_on_disk;
                let sessions = server.loaded == *wanted;
                let senders =
                    server.senders.iter().filter(|s| s.link.is_some()).all(|sender| sender.list == *wanted);
                let enforced = server.waits_enforced == wanted.waits();
                if careless && sessions || sessions && senders && enforced {
                    self.nodes[node].agent.local.list = Some(list.clone());
                    Step::Done
                } else if self.now > self.nodes[node].agent.stage_until {
                    timeout
                } else {
                    Step::Again(POLL / 3)
                }
            }
        }
    }

    fn write_marker(&mut self, node: usize, list: &SyncList) -> Step {
        if self.nodes[node].postgres.state != State::Primary {
            return Step::Failed("only a primary writes");
        }
        if self.nodes[node].agent.local.list.as_ref() != Some(list) {
            return Step::Failed("another list is in effect");
        }
        if self.stage(node) == 0 {
            let at = self.write(node, None);
            self.nodes[node].agent.noted = at;
            return Step::Next(MS);
        }
        let at = self.nodes[node].agent.noted;
        let server = &self.nodes[node].postgres;
        if server.flushed < at {
            return Step::Again(POLL);
        }
        let returned = list.needed == 0 || !(server.loaded.waits() && server.waits_enforced);
        let end =
            if returned && self.broken(Breakage::MarkerJudgedByCommit) { RETURNED } else { wal::lsn(at) };
        self.nodes[node].agent.local.marker = Some((list.clone(), end));
        Step::Done
    }

    fn set_gate(&mut self, node: usize, open: bool) -> Step {
        let server = &mut self.nodes[node].postgres;
        if !matches!(server.state, State::Primary | State::Standby) {
            return Step::Failed("only an open server has a gate");
        }
        // What was noted for a promotion has served.
        if self.durable(node).promoting.is_some() {
            self.remember(node, |durable| {
                durable.promoting = None;
                durable.sealed = None;
            });
        }
        let server = &mut self.nodes[node].postgres;
        if open && !server.gate_open {
            server.gate_open = true;
            server.touch();
            if server.state == State::Primary {
                self.tell(Some(node), |_| "the gate opens".to_owned());
                gates::opened(self, node);
            }
        } else if !open && server.gate_open {
            addresses::gate_closes(self, node);
            let server = &mut self.nodes[node].postgres;
            server.gate_open = false;
            // Sessions end; what they waited for is in doubt.
            server.waits.retain(|wait| wait.what != crate::postgres::WaitFor::Client);
            server.touch();
            self.nodes[node].right_until = self.now;
            self.tell(Some(node), |_| "the gate closes".to_owned());
        }
        Step::Done
    }

    fn checkpoint(&mut self, node: usize, term: Term) -> Step {
        if self.nodes[node].postgres.state != State::Primary {
            return Step::Failed("only a primary is checkpointed");
        }
        if self.stage(node) == 0 {
            let takes = self.span_or((20 * MS, 200 * MS), 8, (500 * MS, 3 * SECOND));
            return Step::Next(takes);
        }
        self.nodes[node].agent.local.checkpointed_for = Some(term);
        Step::Done
    }

    fn create_slot(&mut self, node: usize, member: &NodeName) -> Step {
        let Some(member) = self.slot_index(member) else { return Step::Failed("nobody of that name") };
        let server = &mut self.nodes[node].postgres;
        if server.state != State::Primary {
            return Step::Failed("slots are made on the primary");
        }
        if !server.slots.contains(&member) {
            server.slots.push(member);
            server.touch();
        }
        Step::Done
    }

    /// Clone, or rewind: PostgreSQL is stopped, the directory rewritten from `source`, and the copy counts as
    /// nothing until the end.
    fn copy_anew(&mut self, node: usize, source: &NodeName, rewind: bool) -> Step {
        let Some(from) = self.index(source) else { return Step::Failed("nobody of that name") };
        match self.stage(node) {
            0 => {
                match self.nodes[node].postgres.state {
                    State::Absent | State::Stopped => {}
                    State::Killed => return Step::Again(POLL),
                    _ => {
                        self.kill_server(node, 30 * MS);
                        return Step::Again(31 * MS);
                    }
                }
                if !self.durable(node).rebuilding {
                    return Step::Failed("this copy is still somebody's vote");
                }
                if !rewind {
                    let server = &mut self.nodes[node].postgres;
                    server.state = State::Absent;
                    server.touch();
                }
                if !self.can_copy_from(node, from) {
                    return Step::Failed("the source does not answer");
                }
                self.nodes[node].agent.noted = u64::from(self.nodes[from].postgres.generation);
                let takes = if rewind {
                    self.span(80 * MS, 900 * MS)
                } else {
                    self.span_or((200 * MS, 1500 * MS), 15, (2 * SECOND, 6 * SECOND))
                };
                Step::Next(takes)
            }
            _ => {
                let failed = rewind && std::mem::take(&mut self.nodes[node].slow.rewind_fails);
                let same = u64::from(self.nodes[from].postgres.generation) == self.nodes[node].agent.noted;
                if failed {
                    // The directory is unusable; the next decision finds nothing and clones.
                    let server = &mut self.nodes[node].postgres;
                    server.state = State::Absent;
                    server.touch();
                    return Step::Failed("pg_rewind failed");
                }
                if !same || !self.can_copy_from(node, from) {
                    return Step::Failed("the source went away");
                }
                let Some(record) = self.nodes[node].agent.deed_record.clone() else {
                    return Step::Failed("the store was never read");
                };
                let Some(reign) = &record.reign else { return Step::Failed("nobody reigns") };
                let there = self.nodes[from].postgres.durable_end();
                if self.wal.number(there) != reign.timeline {
                    return Step::Failed("the source is on another timeline");
                }
                let reserved = self.reserved();
                let histories = self.nodes[from].postgres.histories;
                let server = &mut self.nodes[node].postgres;
                server.state = State::Stopped;
                server.hand = there.hand;
                (server.written, server.flushed) = (there.at, there.at);
                server.histories = histories;
                server.list_on_disk = reserved;
                server.conninfo = None;
                server.slots.clear();
                server.touch();
                self.adopt_lines(node, &record, reign.timeline);
                self.remember(node, |durable| durable.rebuilding = false);
                incarnations::made(self, node);
                self.tell(Some(node), |world| format!("has a fresh copy up to {}", world.end_text(node)));
                Step::Done
            }
        }
    }

    /// The copy is made anew out of the repository, which has everything that was agreed, and ends at the moment.
    fn restore(&mut self, node: usize, moment: &Moment) -> Step {
        if self.stage(node) == 0 {
            match self.nodes[node].postgres.state {
                State::Absent | State::Stopped => {}
                State::Killed => return Step::Again(POLL),
                _ => {
                    self.kill_server(node, 30 * MS);
                    return Step::Again(31 * MS);
                }
            }
            if !self.durable(node).rebuilding {
                return Step::Failed("this copy is still somebody's vote");
            }
            let server = &mut self.nodes[node].postgres;
            server.state = State::Absent;
            server.touch();
            let takes = self.span_or((200 * MS, 1500 * MS), 15, (2 * SECOND, 6 * SECOND));
            return Step::Next(takes);
        }
        let Some(record) = self.nodes[node].agent.deed_record.clone() else {
            return Step::Failed("the store was never read");
        };
        let Some(hand) = self.agreed_hand(&record, moment.timeline) else {
            return Step::Failed("the repository does not have that timeline");
        };
        let end = wal::at(moment.end);
        self.lay_copy(node, hand, end);
        self.adopt_lines(node, &record, moment.timeline);
        self.remember(node, |durable| durable.held = Some(moment.clone()));
        self.tell(Some(node), |world| format!("has a copy that ends at {}", world.end_text(node)));
        Step::Done
    }

    fn can_copy_from(&self, node: usize, from: usize) -> bool {
        let there = &self.nodes[from];
        there.host_up
            && there.frozen_until <= self.now
            && there.postgres.state == State::Primary
            && self.network.both_ways(Layer::Replication, node, from)
    }

    pub fn end_text(&self, node: usize) -> String {
        let end = self.wal.settle(self.nodes[node].postgres.end());
        format!("{} on timeline {}", wal::lsn(end.at), self.wal.number(end))
    }

    /// What every node holds.
    pub fn ends_text(&self) -> String {
        let nodes = (0..self.nodes.len()).filter(|node| self.nodes[*node].has_postgres);
        let ends = nodes.map(|node| format!("{} at {}", self.nodes[node].name, self.end_text(node)));
        ends.collect::<Vec<_>>().join(", ")
    }

    pub fn point_text(&self, point: Point) -> String {
        let point = self.wal.settle(point);
        format!("{} on timeline {}", wal::lsn(point.at), self.wal.number(point))
    }
}

/// Every timeline in the history of `timeline`, with the term it was reserved for.
pub fn chain(record: &Record, timeline: Timeline) -> Vec<(Timeline, Term)> {
    let mut chain = Vec::new();
    let mut at = Some(timeline);
    while let Some(line) = at.and_then(|number| record.line(number)) {
        chain.push((line.timeline, line.term));
        at = line.parent.filter(|parent| *parent < line.timeline);
    }
    chain
}

/// The term in whose name an action is done.
fn term_of(action: &Action) -> Option<Term> {
    match action {
        Action::Propose(_)
        | Action::BecomeMember { .. }
        | Action::InitDb
        | Action::StartSealed
        | Action::StopCleanly
        | Action::StopNow => None,
        Action::Adopt { term }
        | Action::Seal { term }
        | Action::Vote { term, .. }
        | Action::CatchUp { term, .. }
        | Action::Promote { term, .. }
        | Action::Follow { term, .. }
        | Action::SetSyncList { term, .. }
        | Action::WriteMarker { term, .. }
        | Action::SetGate { term, .. }
        | Action::Checkpoint { term }
        | Action::CutSender { term, .. }
        | Action::CreateSlot { term, .. }
        | Action::Clone { term, .. }
        | Action::Rewind { term, .. }
        | Action::Restore { term, .. }
        | Action::Inherit { term, .. } => Some(*term),
    }
}
