//! Streaming between servers: connections that each end sees end in its own time, WAL and flush reports
//! under way, receivers that come back by themselves until they are really stopped.

use std::rc::Rc;

use crate::breakage::Breakage;
use crate::checkers::timelines;
use crate::postgres::{Sender, State};
use crate::wal::Point;
use crate::world::{Event, Layer, MS, SECOND, Time, World};

/// `wal_receiver_timeout` and `wal_sender_timeout`, roughly: a silent other end is given up after this long.
const TIMEOUT: Time = 3 * SECOND;
/// Between two attempts of a receiver.
const RETRY: (Time, Time) = (100 * MS, 400 * MS);
/// Lost packets are sent again after about this long.
const RETRANSMIT: Time = 200 * MS;
/// Where a WAL receiver begins to ask is the beginning of a segment.
const SEGMENT_RECORDS: u64 = 16;
/// Records in one message.
const BATCH: u64 = 8;

/// One connection from a standby to its upstream.
#[derive(Clone, Debug)]
pub struct Link {
    pub upstream: usize,
    pub standby: usize,
    upstream_generation: u32,
    standby_generation: u32,
    ship_pending: bool,
    stalled_since: Option<Time>,
    /// Given up by both ends, whatever happens to the wire.
    given_up: bool,
    /// The one that streams is the owner of the archive.
    pub repository: bool,
}

impl World {
    pub fn wire(&mut self) -> Time {
        let delay = self.network.delay;
        self.span(MS / 5, 2 * MS) + delay
    }

    pub fn connect_soon(&mut self, node: usize, within: Time) {
        let server = &mut self.nodes[node].postgres;
        if server.conninfo.is_none() || server.receiver.is_some() || server.state != State::Standby {
            return;
        }
        server.attempt += 1;
        let (generation, attempt) = (server.generation, server.attempt);
        self.after(within, Event::Connects { node, generation, attempt });
    }

    pub fn connects(&mut self, node: usize, generation: u32, attempt: u32) {
        let server = &self.nodes[node].postgres;
        if server.generation != generation || server.attempt != attempt || server.receiver.is_some() {
            return;
        }
        let Some(conninfo) = server.conninfo else { return };
        if server.state != State::Standby {
            return;
        }
        if !self.try_connect(node, conninfo) {
            let late = self.span(RETRY.0, RETRY.1);
            self.after(late, Event::Connects { node, generation, attempt });
        }
    }

    fn try_connect(&mut self, node: usize, conninfo: crate::postgres::Conninfo) -> bool {
        let up = conninfo.upstream;
        let reachable = self.nodes[up].host_up
            && self.nodes[up].frozen_until <= self.now
            && self.network.both_ways(Layer::Replication, node, up);
        let upstream = &self.nodes[up].postgres;
        if !reachable || !upstream.answers() || up == node {
            return false;
        }
        // One slot has one user: a half-open connection keeps its successor out until it is seen to be dead.
        if upstream.senders.iter().any(|sender| sender.link.is_some() && sender.node == node) {
            return false;
        }
        if !upstream.slots.contains(&node) {
            return false;
        }
        let timeline = if self.broken(Breakage::UnadoptedStandbyCounts) {
            self.wal.hand(upstream.hand).number
        } else {
            conninfo.timeline
        };
        let (theirs, mine) = (upstream.durable_end(), self.nodes[node].postgres.end());
        // A server in recovery looks at the beginning of the segment only: who asks may have more than it has.
        let segment = Point { at: mine.at - mine.at % SEGMENT_RECORDS, ..mine };
        let ahead = upstream.state == State::Standby
            && mine.at > theirs.at
            && self.wal.admits(theirs, segment).is_some()
            && self.wal.holds(mine, theirs);
        if self.wal.admits(theirs, mine).is_none() && !ahead {
            let parted = !self.wal.holds(mine, theirs) || self.nodes[up].postgres.state == State::Primary;
            let server = &mut self.nodes[node].postgres;
            server.diverged = parted;
            server.touch();
            return false;
        }
        if !self.wal.holds(theirs, mine) && !ahead {
            timelines::two_meanings(self, node, up);
            return false;
        }
        let incarnation = match &self.nodes[node].agent.local.durable.member {
            Some(member) => member.incarnation.0,
            None => return false,
        };
        let link = self.links.len();
        let (upstream_generation, standby_generation) =
            (self.nodes[up].postgres.generation, self.nodes[node].postgres.generation);
        self.links.push(Link {
            upstream: up,
            standby: node,
            upstream_generation,
            standby_generation,
            ship_pending: true,
            stalled_since: None,
            given_up: false,
            repository: false,
        });
        let upstream = &mut self.nodes[up].postgres;
        upstream.pids += 1;
        upstream.senders.push(Sender {
            link: Some(link),
            pid: upstream.pids,
            node,
            incarnation,
            timeline,
            streaming: false,
            flush: None,
            list: Rc::clone(&upstream.loaded),
        });
        upstream.touch();
        let server = &mut self.nodes[node].postgres;
        server.receiver = Some(link);
        server.diverged = false;
        server.touch();
        let takes = self.wire();
        self.after(takes, Event::Ships { link });
        true
    }

    /// The owner's connection to its source, over which WAL has yet to come.
    pub fn add_repository_link(&mut self, upstream: usize, owner: usize, upstream_generation: u32) -> usize {
        let link = self.links.len();
        self.links.push(Link {
            upstream,
            standby: owner,
            upstream_generation,
            standby_generation: 0,
            ship_pending: true,
            stalled_since: None,
            given_up: false,
            repository: true,
        });
        let takes = self.wire();
        self.after(takes, Event::Ships { link });
        link
    }

    pub fn ship_all(&mut self, node: usize) {
        for index in 0..self.nodes[node].postgres.senders.len() {
            if let Some(link) = self.nodes[node].postgres.senders[index].link {
                self.ship(link);
            }
        }
    }

    fn ship(&mut self, link: usize) {
        if !std::mem::replace(&mut self.links[link].ship_pending, true) {
            let takes = self.wire();
            self.after(takes, Event::Ships { link });
        }
    }

    fn sender_lives(&self, link: usize) -> bool {
        let at = &self.links[link];
        let server = &self.nodes[at.upstream].postgres;
        server.generation == at.upstream_generation
            && server.serves()
            && server.senders.iter().any(|sender| sender.link == Some(link))
    }

    fn receiver_lives(&self, link: usize) -> bool {
        let at = &self.links[link];
        if at.repository {
            return self.streams_over(at.standby, link);
        }
        let server = &self.nodes[at.standby].postgres;
        server.generation == at.standby_generation && server.receiver == Some(link)
    }

    /// True if the wire is cut in this direction; then the message comes later, or the connection ends.
    fn stalls(&mut self, link: usize, from: usize, to: usize, again: Event) -> bool {
        if self.network.passes(Layer::Replication, from, to) && self.nodes[to].host_up {
            self.links[link].stalled_since = None;
            return false;
        }
        let since = *self.links[link].stalled_since.get_or_insert(self.now);
        if self.now - since < TIMEOUT {
            self.after(RETRANSMIT, again);
        } else {
            self.links[link].given_up = true;
            let late = self.span(MS, SECOND);
            self.after(late, Event::SenderSeesEnd { link });
            let late = self.span(MS, SECOND);
            self.after(late, Event::ReceiverSeesEnd { link });
        }
        true
    }

    pub fn ships(&mut self, link: usize) {
        let Link { upstream, standby, .. } = self.links[link];
        if !self.receiver_lives(link) {
            return;
        }
        if !self.sender_lives(link) {
            let late = self.wire();
            self.after(late, Event::ReceiverSeesEnd { link });
            return;
        }
        if self.stalls(link, upstream, standby, Event::Ships { link }) {
            return;
        }
        self.links[link].ship_pending = false;
        if self.links[link].repository {
            self.repository_ships(link);
            return;
        }
        self.nodes[standby].streamed_at = self.now;
        let (source, limit) = (self.nodes[upstream].postgres.hand, self.nodes[upstream].postgres.flushed);
        let mine = self.nodes[standby].postgres.end();
        let promoted = self.nodes[upstream].postgres.state != State::Standby;
        if promoted && self.wal.admits(Point { hand: source, at: limit }, mine).is_none() {
            // It has more than what the new timeline was forked from, and does not go onto it.
            self.nodes[standby].postgres.diverged = true;
            self.end_receiver(standby);
            let late = self.span(RETRY.0, RETRY.1);
            self.connect_soon(standby, late);
            return;
        }
        let before = self.nodes[standby].postgres.written;
        let until = limit.min(before + BATCH);
        if until > before {
            let place = self.wal.place(source, until);
            let number = self.wal.number(place);
            let server = &mut self.nodes[standby].postgres;
            server.hand = place.hand;
            server.written = until;
            server.add_history(number);
        }
        if until < limit {
            self.ship(link);
        }
        if self.nodes[standby].slow.wal_hangs {
            return;
        }
        if self.random.once_in(6) {
            let takes = self.span(MS / 5, 3 * MS);
            self.after(takes, Event::StandbyFlushes { link });
        } else {
            self.standby_flushes(link);
        }
    }

    pub fn standby_flushes(&mut self, link: usize) {
        let standby = self.links[link].standby;
        if self.nodes[standby].slow.wal_hangs || !self.receiver_lives(link) {
            return;
        }
        let server = &mut self.nodes[standby].postgres;
        server.flushed = server.written;
        server.touch();
        let at = server.flushed;
        let takes = self.wire();
        self.after(takes, Event::Replies { link, at });
        self.ship_all(standby);
    }

    pub fn replies(&mut self, link: usize, at: u64) {
        let Link { upstream, standby, .. } = self.links[link];
        if !self.sender_lives(link) || self.stalls(link, standby, upstream, Event::Replies { link, at }) {
            return;
        }
        let server = &mut self.nodes[upstream].postgres;
        let flushed = server.flushed;
        let sender = server.senders.iter_mut().find(|sender| sender.link == Some(link));
        let Some(sender) = sender else { return };
        sender.flush = sender.flush.max(Some(at));
        sender.streaming |= at >= flushed;
        server.touch();
        if server.is_primary() {
            self.sender_releases(upstream, link);
            self.think_in_a_hurry(upstream);
        }
    }

    /// The receiver of this standby ends, for whatever reason; unless it is killed it flushes before that.
    pub fn end_receiver(&mut self, node: usize) {
        let hangs = self.nodes[node].slow.wal_hangs;
        let server = &mut self.nodes[node].postgres;
        server.attempt += 1;
        let Some(link) = server.receiver.take() else { return };
        if server.answers() && !hangs {
            server.flushed = server.written;
        }
        server.touch();
        let upstream = self.links[link].upstream;
        let told = self.nodes[node].host_up && self.network.passes(Layer::Replication, node, upstream);
        let late = if told { self.wire() } else { TIMEOUT };
        self.after(late, Event::SenderSeesEnd { link });
    }

    /// Every WAL sender of this server ends.
    pub fn end_senders(&mut self, node: usize) {
        let senders = std::mem::take(&mut self.nodes[node].postgres.senders);
        for link in senders.into_iter().filter_map(|sender| sender.link) {
            let standby = self.links[link].standby;
            let told = self.nodes[node].host_up && self.network.passes(Layer::Replication, node, standby);
            let late = if told { self.wire() } else { TIMEOUT };
            self.after(late, Event::ReceiverSeesEnd { link });
        }
        self.nodes[node].postgres.touch();
    }

    pub fn end_sender(&mut self, node: usize, pid: u32) {
        let server = &mut self.nodes[node].postgres;
        let Some(index) = server.senders.iter().position(|sender| sender.pid == pid) else { return };
        let sender = server.senders.remove(index);
        server.touch();
        if let Some(link) = sender.link {
            let late = self.wire();
            self.after(late, Event::ReceiverSeesEnd { link });
        }
    }

    pub fn sender_sees_end(&mut self, link: usize) {
        let up = self.links[link].upstream;
        let server = &mut self.nodes[up].postgres;
        let before = server.senders.len();
        server.senders.retain(|sender| sender.link != Some(link));
        if server.senders.len() != before {
            server.touch();
        }
        if self.receiver_lives(link) {
            let late = self.wire();
            self.after(late, Event::ReceiverSeesEnd { link });
        }
    }

    pub fn receiver_sees_end(&mut self, link: usize) {
        if !self.receiver_lives(link) || (self.sender_lives(link) && !self.links[link].given_up) {
            return;
        }
        if self.links[link].repository {
            self.repository_link_ends(link);
            return;
        }
        let node = self.links[link].standby;
        self.end_receiver(node);
        let late = self.span(RETRY.0, RETRY.1);
        self.connect_soon(node, late);
    }
}
