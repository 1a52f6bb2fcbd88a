//! Clients: they commit unique things wherever a gate is open, and read.
//!
//! A commit that came back is acknowledged; one whose connection ended, or that came back with a warning,
//! is in doubt and nothing is claimed about it. Clients here know of no lease and of no proxy: they
//! use every open gate that they can reach, an old primary's too, which is harsher than what the proxy allows.

use crate::checkers::{acknowledged, degraded, reads};
use crate::postgres::{State, WaitFor};
use crate::wal::Point;
use crate::world::{Event, MS, Time, World};

#[derive(Clone, Debug, Default)]
pub struct Clients {
    /// Between two clients' acts; 0: nobody is there.
    pub every: Time,
    pub attempts: u64,
    pub acknowledged: u64,
    pub unknown: u64,
    pub refused: u64,
    pub reads: u64,
}

impl World {
    pub fn client_tick(&mut self) {
        if self.clients.every == 0 {
            return;
        }
        let next = self.span(self.clients.every / 4, self.clients.every * 2);
        self.after(next, Event::ClientTick);
        let open: Vec<usize> = (0..self.nodes.len()).filter(|node| self.lets_clients_in(*node)).collect();
        if open.is_empty() {
            self.clients.refused += 1;
            return;
        }
        let node = open[self.random.index(open.len())];
        if self.random.once_in(4) {
            self.clients.reads += 1;
            reads::read(self, node);
        } else {
            // Now and then a burst, which makes standbys lag.
            let commits = if self.random.once_in(40) { 24 } else { 1 };
            for _ in 0..commits {
                self.clients.attempts += 1;
                self.write(node, Some(WaitFor::Client));
            }
        }
    }

    pub fn lets_clients_in(&self, node: usize) -> bool {
        let there = &self.nodes[node];
        let server = &there.postgres;
        // What a dead postmaster leaves behind has sessions that go on.
        let accepts = server.state == State::Primary || server.is_primary();
        there.host_up && there.frozen_until <= self.now && accepts && server.gate_open
    }

    /// A client's commit is released on the server. `alone`: without waiting for any standby.
    pub fn commit_returns(&mut self, node: usize, at: u64, alone: bool) {
        let point = Point { hand: self.nodes[node].postgres.hand, at };
        if alone {
            degraded::acknowledged_alone(self, node);
        }
        let line = self.wal.hand(point.hand).number;
        let strict = !alone || !self.oracle.lossy_lines.contains(&line);
        let era = self.oracle.era;
        if self.random.once_in(25) {
            self.clients.unknown += 1;
        } else if self.random.once_in(6) {
            let takes = self.span(MS / 2, 30 * MS);
            self.after(takes, Event::Acknowledged { node, era, point, strict });
        } else {
            self.acknowledged(node, era, point, strict);
        }
    }

    /// The answer reaches the client, even if the server has died meanwhile. It promises nothing any more if a rule
    /// without voters was all there was since it was given.
    pub fn acknowledged(&mut self, node: usize, era: u32, point: Point, strict: bool) {
        self.clients.acknowledged += 1;
        acknowledged::acknowledged(self, node, point, strict && era == self.oracle.era);
    }
}
