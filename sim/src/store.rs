//! The store as agents see it: one record under compare-and-set, and each node's own replica of it, which
//! lags, and which an agent that starts again finds as old as it left it.
//!
//! Assumed of the real one: a write happens once, at one moment, if nobody wrote since the revision that it
//! was made from; a confirmation is linearizable. Not assumed: that an answer arrives, that a replica is
//! fresh, that the store answers at all.

use std::collections::VecDeque;
use std::rc::Rc;

use pgherd_core::record::{Cause, Proposal, Record, Refusal};
use pgherd_core::types::Instant;

use crate::breakage::{self, Breakage};
use crate::checkers;
use crate::story;
use crate::world::{Event, InFlight, MS, SECOND, Time, World, micros};

/// A proposal is given up after this long, and made again by a later decision if it is still right.
const GIVE_UP: Time = 2 * SECOND;
/// Changes by which a replica that starts again may be behind what it had shown before.
const PAST: usize = 12;
/// One attempt is given up after this long.
const ATTEMPT: Time = 600 * MS;

#[derive(Debug)]
pub struct Store {
    pub record: Rc<Record>,
    pub revision: u64,
    pub up: bool,
    pub slow: Time,
    pub writes: u64,
    pub opened_at: Time,
    /// What replicas that are behind may still show.
    past: VecDeque<(Rc<Record>, u64)>,
}

impl Default for Store {
    fn default() -> Store {
        Store {
            record: Rc::new(Record::empty()),
            revision: 0,
            up: true,
            slow: 0,
            writes: 0,
            opened_at: 0,
            past: VecDeque::new(),
        }
    }
}

/// What a proposer learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Conflict,
    /// Nothing came back; it may have happened.
    Nothing,
}

impl World {
    pub fn store_answers(&self, node: usize) -> bool {
        self.store.up && self.network.store_cut[node] == 0
    }

    fn store_trip(&mut self) -> Time {
        let slow = self.store.slow;
        self.span_or((MS / 2, 6 * MS), 25, (10 * MS, 150 * MS)) + slow
    }

    /// Begins to change the record; false if the proposal does not fit what this node knows.
    pub fn propose(&mut self, node: usize, proposal: &Proposal, from_deed: bool) -> bool {
        let agent = &self.nodes[node].agent;
        if agent.proposals.iter().any(|flight| flight.proposal == *proposal) {
            return false;
        }
        let Some((view, revision)) = self.nodes[node].view.clone() else { return false };
        let Ok(next) = self.apply(&view, proposal) else { return false };
        if self.chatty {
            self.tell(Some(node), |_| format!("proposes: {}", story::proposal(proposal)));
        }
        let agent = &mut self.nodes[node].agent;
        agent.proposed += 1;
        let (id, life) = (agent.proposed, agent.life);
        agent.proposals.push(InFlight {
            id,
            proposal: proposal.clone(),
            next: Rc::new(next),
            expected: revision,
            give_up: self.now + GIVE_UP,
            from_deed,
        });
        let takes = self.store_trip();
        self.after(takes, Event::Arrives { node, life, proposal: id });
        true
    }

    fn apply(&self, record: &Record, proposal: &Proposal) -> Result<Record, Refusal> {
        let next = record.apply(proposal)?;
        Ok(match self.breakage {
            Some(breakage) => breakage::rewrite(breakage, record, proposal, next),
            None => next,
        })
    }

    pub fn proposal_arrives(&mut self, node: usize, life: u32, id: u32) {
        let agent = &self.nodes[node].agent;
        if agent.life != life {
            return;
        }
        let flight = agent.proposals.iter().find(|flight| flight.id == id);
        let Some(InFlight { expected, next, proposal, .. }) = flight.cloned() else { return };
        let answer_lost = self.random.once_in(60);
        let mut answer = Answer::Nothing;
        if self.store_answers(node) && !self.random.once_in(80) {
            answer = if expected == self.store.revision { Answer::Done } else { Answer::Conflict };
            if answer == Answer::Done {
                self.commit(node, next, &proposal);
            }
        }
        let takes = match answer {
            Answer::Nothing => ATTEMPT,
            _ if answer_lost => ATTEMPT,
            Answer::Done | Answer::Conflict => self.store_trip(),
        };
        let answer = if answer_lost { Answer::Nothing } else { answer };
        self.after(takes, Event::Answered { node, life, proposal: id, answer });
    }

    pub fn proposal_answered(&mut self, node: usize, life: u32, id: u32, answer: Answer) {
        let agent = &mut self.nodes[node].agent;
        if agent.life != life || !agent.up {
            return;
        }
        let Some(index) = agent.proposals.iter().position(|flight| flight.id == id) else { return };
        let flight = agent.proposals[index].clone();
        if answer == Answer::Done {
            let news = (flight.next, flight.expected + 1);
            let view = &mut self.nodes[node].view;
            if view.as_ref().is_none_or(|(_, known)| *known < news.1) {
                *view = Some(news);
            }
            self.end_proposal(node, index, true);
            return;
        }
        // After a lost answer as after a conflict the record is read again: a proposal that happened no
        // longer fits.
        let again = self.now < flight.give_up && self.store_answers(node);
        let record = Rc::clone(&self.store.record);
        if again {
            // What was read is news.
            self.nodes[node].view = Some((Rc::clone(&record), self.store.revision));
        }
        let next = if again { self.apply(&record, &flight.proposal).ok() } else { None };
        match next {
            None if self.now < flight.give_up && !self.store_answers(node) => {
                self.after(ATTEMPT, Event::Answered { node, life, proposal: id, answer: Answer::Nothing });
            }
            None => self.end_proposal(node, index, false),
            Some(next) => {
                let expected = self.store.revision;
                let flight = &mut self.nodes[node].agent.proposals[index];
                flight.next = Rc::new(next);
                flight.expected = expected;
                let takes = self.store_trip();
                self.after(takes, Event::Arrives { node, life, proposal: id });
            }
        }
    }

    fn end_proposal(&mut self, node: usize, index: usize, done: bool) {
        let flight = self.nodes[node].agent.proposals.remove(index);
        if flight.from_deed {
            self.deed_proposed(node, done);
        }
        self.think_within(node, MS);
    }

    /// The record changes, for everyone at once; who learns of it when is another matter.
    pub fn commit(&mut self, by: usize, next: Rc<Record>, proposal: &Proposal) {
        let before = std::mem::replace(&mut self.store.record, Rc::clone(&next));
        self.store.past.push_back((Rc::clone(&before), self.store.revision));
        if self.store.past.len() > PAST {
            self.store.past.pop_front();
        }
        self.store.revision += 1;
        self.store.writes += 1;
        if before.election.is_none() && next.election.is_some() {
            self.store.opened_at = self.now;
        }
        if let Proposal::Open { cause: Cause::Crash, .. } = proposal {
            self.crashes.push(self.now);
        }
        let decided = before.election.is_some() && next.election.is_none();
        if decided {
            self.coverage.elections += 1;
            if before.holder() != next.holder() && before.holder().is_some() {
                self.coverage.failovers += 1;
            }
        }
        self.tell(None, |_| {
            let by_vote = decided && matches!(proposal, Proposal::Vote { .. });
            let winner = next.holder().filter(|_| by_vote);
            let winner = winner.map_or_else(String::new, |winner| format!(", and {} leads", winner.node));
            format!("record: {}{winner}", story::proposal(proposal))
        });
        checkers::record_changed(self, by, &before, &next, proposal);
        self.spring_ambush(proposal, decided);
        for node in 0..self.nodes.len() {
            self.watch_soon(node);
        }
    }

    /// An agent starts: its replica may show less than it did, or nothing yet.
    pub fn replica_starts(&mut self, node: usize) {
        let Some((_, known)) = self.nodes[node].view else { return };
        if self.random.once_in(8) {
            self.nodes[node].view = None;
        } else if self.random.once_in(3) {
            let older: Vec<_> = self.store.past.iter().filter(|(_, revision)| *revision < known).collect();
            if !older.is_empty() {
                let chosen = older[self.random.index(older.len())].clone();
                self.nodes[node].view = Some(chosen);
            }
        }
    }

    pub fn replica_forgets(&mut self, node: usize, changes: usize) -> Result<(), String> {
        let past = &self.store.past;
        let index = past.len().checked_sub(changes).ok_or("the store has not changed so often")?;
        self.nodes[node].view = Some(past[index].clone());
        Ok(())
    }

    pub fn watch_soon(&mut self, node: usize) {
        if !std::mem::replace(&mut self.nodes[node].watching, true) {
            let takes = self.span_or((MS / 2, 8 * MS), 25, (50 * MS, 2 * SECOND)) + self.store.slow;
            self.after(takes, Event::Watch { node });
        }
    }

    /// This node's replica catches up.
    pub fn watch(&mut self, node: usize) {
        if !self.store_answers(node) || !self.agent_runs(node) {
            if self.agent_runs(node) {
                self.after(200 * MS, Event::Watch { node });
            } else {
                self.nodes[node].watching = false;
            }
            return;
        }
        self.nodes[node].watching = false;
        let newest = (Rc::clone(&self.store.record), self.store.revision);
        if self.nodes[node].view.as_ref().is_none_or(|(_, known)| *known < newest.1) {
            self.nodes[node].view = Some(newest);
            self.think_within(node, MS / 2);
        }
    }

    /// Every `renew` an agent asks whether the record is as it believes.
    pub fn confirm_tick(&mut self, node: usize, life: u32) {
        let agent = &self.nodes[node].agent;
        if agent.life != life || !agent.up {
            return;
        }
        let asked = self.nodes[node].clock.local(self.now);
        let (answer, takes) = if self.store_answers(node) && !self.random.once_in(100) {
            (Some(self.store.revision), self.store_trip() + self.store_trip())
        } else {
            (None, micros(self.times.renew))
        };
        self.after(takes, Event::Confirmed { node, life, asked, answer });
    }

    pub fn confirmed(&mut self, node: usize, life: u32, asked: Instant, answer: Option<u64>) {
        let now = self.nodes[node].clock.local(self.now);
        let agent = &self.nodes[node].agent;
        if agent.life != life || !agent.up {
            return;
        }
        let asked = if self.broken(Breakage::LeaseCountedFromReceipt) { now } else { asked };
        let next = self.nodes[node].clock.true_span(self.times.renew.saturating_sub(now.since(asked)));
        self.after(next.max(MS), Event::ConfirmTick { node, life });
        let Node { agent, view, .. } = &mut self.nodes[node];
        agent.store_reachable = answer.is_some();
        let same = view.as_ref().filter(|(_, known)| answer == Some(*known));
        agent.caught_up |= same.is_some();
        if let Some((record, _)) = same {
            if record.election.is_none() {
                agent.confirmed = Some((record.term, asked));
            }
        } else if answer.is_some() {
            self.watch_soon(node);
        }
    }
}

use crate::world::Node;
