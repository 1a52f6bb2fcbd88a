//! A model of one PostgreSQL server, down to what the safety rules depend on.
//!
//! In it: written and flushed ends of WAL; timelines chosen by the `.history` files that are there; the
//! list of synchronous standbys as the file has it, as sessions and every WAL sender have loaded it, and the
//! checkpointer's flag without which no commit waits (ha-attack S8); commits that wait, are released, are
//! cancelled; processes that outlive their postmaster; promotions that take their time and cannot be
//! withdrawn; slots. Left out: pages, replay as such (a standby has replayed what it has flushed), archives.
//!
//! What an agent may do to a server is in [`crate::deeds`]; here is what the server does by itself.

use std::collections::VecDeque;
use std::rc::Rc;

use pgherd_core::types::{Instant, Term, Timeline};

use crate::breakage::Breakage;
use crate::faults::Kind;
use crate::wal::Point;
use crate::world::{Event, List, MS, SECOND, Time, World};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Absent,
    Stopped,
    Starting,
    Standby,
    /// A standby that was told to promote itself, and will.
    Promoting,
    Primary,
    /// A clean shutdown: no new work, but the WAL senders deliver to the end.
    Stopping,
    /// The postmaster is dead and some of its children are not: they commit, read and send as before.
    Remains,
    /// Everything has been sent SIGQUIT or SIGKILL and does no more work, but is not gone yet.
    Killed,
}

/// Which of a server's processes takes a new configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    Sessions,
    Checkpointer,
    Sender(usize),
}

#[derive(Clone, Copy, Debug)]
pub struct Conninfo {
    pub upstream: usize,
    pub term: Term,
    /// Adopted for this reign, and part of the name that the standby connects under.
    pub timeline: Timeline,
}

#[derive(Clone, Debug)]
pub struct Sender {
    /// `None`: a stray program that uses a member's name.
    pub link: Option<usize>,
    pub pid: u32,
    pub node: usize,
    pub incarnation: u64,
    /// The timeline in the name that it connected under.
    pub timeline: Timeline,
    pub streaming: bool,
    pub flush: Option<u64>,
    pub list: Rc<List>,
}

/// Why waits end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Release {
    ByStandbys,
    WaitedForNobody,
    ListEmptied,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitFor {
    Client,
    Heartbeat { begun: Instant, term: Term },
}

#[derive(Clone, Copy, Debug)]
pub struct Wait {
    pub at: u64,
    pub what: WaitFor,
    /// It saw no list when it began to wait, so only the local flush counts.
    pub alone: bool,
}

#[derive(Debug, Default)]
pub struct Postgres {
    pub state: State,
    /// Counts the lives of the server's processes.
    pub generation: u32,
    /// Counts changes that a look would show.
    pub version: u64,
    pub hand: usize,
    pub written: u64,
    pub flushed: u64,
    /// Up to where the running server has read, where WAL was put beside it that goes further.
    pub unread: Option<Point>,
    /// Numbers for which a `.history` file is in `pg_wal`, as bits.
    pub histories: u128,
    pub list_on_disk: Rc<List>,
    pub conninfo: Option<Conninfo>,
    pub gate_open: bool,
    pub receiver: Option<usize>,
    pub diverged: bool,
    pub attempt: u32,
    pub senders: Vec<Sender>,
    pub slots: Vec<usize>,
    pub waits: VecDeque<Wait>,
    pub loaded: Rc<List>,
    /// The checkpointer's flag: commits wait at all.
    pub waits_enforced: bool,
    /// Commits up to here can be read on this primary.
    pub visible: u64,
    /// When it left recovery.
    pub leads_since: Time,
    /// In [`State::Remains`] and [`State::Stopping`]: of a primary.
    pub was_primary: bool,
    /// The promotion under way was asked for by an agent, and not by a person.
    pub promoted_by_agent: bool,
    pub pids: u32,
}

impl Postgres {
    pub fn has_copy(&self) -> bool {
        self.state != State::Absent
    }

    pub fn end(&self) -> Point {
        Point { hand: self.hand, at: self.written }
    }

    pub fn durable_end(&self) -> Point {
        Point { hand: self.hand, at: self.flushed }
    }

    pub fn runs(&self) -> bool {
        !matches!(self.state, State::Absent | State::Stopped)
    }

    /// Are there processes that commit and read as a primary?
    pub fn is_primary(&self) -> bool {
        match self.state {
            State::Primary => true,
            State::Remains => self.was_primary,
            _ => false,
        }
    }

    /// Would a trivial command be answered?
    pub fn answers(&self) -> bool {
        matches!(self.state, State::Standby | State::Promoting | State::Primary)
    }

    /// Can a standby be streaming from it?
    pub fn serves(&self) -> bool {
        self.answers() || matches!(self.state, State::Stopping | State::Remains)
    }

    pub fn touch(&mut self) {
        self.version += 1;
    }

    pub fn add_history(&mut self, number: Timeline) {
        self.histories |= 1 << number.0.min(127);
    }

    /// The number that PostgreSQL takes at a promotion: the first one above its own without a file.
    pub fn next_number(&self, own: Timeline) -> Timeline {
        let mut number = own.0 + 1;
        while self.histories & (1 << number.min(127)) != 0 && number < 127 {
            number += 1;
        }
        Timeline(number)
    }
}

impl World {
    /// Starts the processes; recovery first, always as a standby.
    pub fn start_server(&mut self, node: usize) {
        let takes = self.span_or((20 * MS, 200 * MS), 20, (SECOND, 4 * SECOND));
        let server = &mut self.nodes[node].postgres;
        server.state = State::Starting;
        // It reads all that is there.
        server.unread = None;
        server.generation += 1;
        server.loaded = Rc::clone(&server.list_on_disk);
        server.waits_enforced = server.loaded.waits();
        server.gate_open = false;
        server.diverged = false;
        server.touch();
        let generation = server.generation;
        self.after(takes, Event::Started { node, generation });
    }

    /// It has come to WAL that was put beside it.
    pub fn reads(&mut self, node: usize, generation: u32) {
        let server = &mut self.nodes[node].postgres;
        if server.generation != generation || server.state != State::Standby {
            return;
        }
        server.unread = None;
        server.touch();
    }

    pub fn server_started(&mut self, node: usize, generation: u32) {
        let server = &mut self.nodes[node].postgres;
        if server.generation != generation || server.state != State::Starting {
            return;
        }
        server.state = State::Standby;
        server.touch();
        self.connect_soon(node, MS);
        self.notice(node);
    }

    /// Its agent sees a process end or a state change soon, by a pidfd or its next look.
    pub fn notice(&mut self, node: usize) {
        let late = self.span_or((MS, 20 * MS), 10, (50 * MS, 250 * MS));
        self.think_within(node, late);
    }

    /// The postmaster dies. Its children mostly notice soon; some do not (ha-attack S12).
    pub fn postmaster_killed(&mut self, node: usize) {
        let server = &mut self.nodes[node].postgres;
        if !server.answers() && server.state != State::Starting {
            return;
        }
        server.was_primary = server.state == State::Primary;
        let promoting = server.state == State::Promoting;
        server.state = State::Remains;
        server.touch();
        if promoting || !server.was_primary {
            self.end_receiver(node);
        }
        // A script shows the worst.
        let stay = self.random.is_still() || self.random.once_in(3);
        let generation = self.nodes[node].postgres.generation;
        if !stay {
            let takes = self.span(MS, 100 * MS);
            self.after(takes, Event::Gone { node, generation });
        }
        self.notice(node);
    }

    /// SIGQUIT or SIGKILL to every process: from here on none of them does anything but vanish.
    pub fn kill_server(&mut self, node: usize, takes: Time) {
        if !self.nodes[node].postgres.runs() {
            return;
        }
        self.cease(node);
        let server = &mut self.nodes[node].postgres;
        server.state = State::Killed;
        let generation = server.generation;
        self.after(takes, Event::Gone { node, generation });
    }

    /// All work of this server's processes ends here, whoever is told of it.
    fn cease(&mut self, node: usize) {
        self.end_receiver(node);
        self.end_senders(node);
        let server = &mut self.nodes[node].postgres;
        server.waits.clear();
        server.generation += 1;
        server.touch();
    }

    pub fn server_gone(&mut self, node: usize, generation: u32) {
        let server = &mut self.nodes[node].postgres;
        if server.generation != generation || !server.runs() {
            return;
        }
        self.cease(node);
        let server = &mut self.nodes[node].postgres;
        server.state = State::Stopped;
        self.notice(node);
    }

    /// The machine loses power: what was not flushed is gone.
    pub fn power_lost(&mut self, node: usize) {
        if self.nodes[node].postgres.runs() {
            self.cease(node);
            self.nodes[node].postgres.state = State::Stopped;
        }
        if !self.nodes[node].postgres.has_copy() {
            return;
        }
        let flushed = self.nodes[node].postgres.durable_end();
        let settled = self.wal.settle(flushed);
        let server = &mut self.nodes[node].postgres;
        server.written = flushed.at;
        server.hand = settled.hand;
    }

    /// Told to promote: nothing takes that back but killing it.
    pub fn begin_promotion(&mut self, node: usize, by_agent: bool) {
        self.end_receiver(node);
        self.nodes[node].postgres.promoted_by_agent = by_agent;
        let slow = std::mem::take(&mut self.nodes[node].slow.promotion);
        let takes = if slow {
            if !self.random.is_still() {
                // While it hangs the node is cut off, and comes back before it has ended.
                let (from, until) = (self.span(50 * MS, SECOND), self.span(2 * SECOND, 6 * SECOND));
                self.plan_fault(from, until, Kind::Isolate, node);
            }
            self.span(SECOND, 30 * SECOND)
        } else {
            self.span_or((80 * MS, 150 * MS), 10, (200 * MS, 3 * SECOND))
        };
        let server = &mut self.nodes[node].postgres;
        server.state = State::Promoting;
        let generation = server.generation;
        self.after(takes, Event::Promoted { node, generation });
    }

    pub fn server_promoted(&mut self, node: usize, generation: u32) {
        let own = self.wal.number(self.nodes[node].postgres.end());
        let paused = self.nodes[node].slow.replay_paused;
        let server = &mut self.nodes[node].postgres;
        if server.generation != generation || server.state != State::Promoting {
            return;
        }
        if paused {
            // It waits for whoever holds up replay.
            self.after(200 * MS, Event::Promoted { node, generation });
            return;
        }
        if let Some(read) = server.unread.take() {
            // It leaves recovery where it is.
            server.hand = read.hand;
            (server.written, server.flushed) = (read.at, read.at);
        }
        let number = server.next_number(own);
        let from = server.end();
        // The node that won this number is the only one that has adopted it before anything was written on it,
        // so a person who promotes just that node onto it does what the agent was about to do.
        let term = self.nodes[node].agent.local.durable.adopted.get(&number).copied();
        let hand = self.wal.promote(from, number, term, node);
        let server = &mut self.nodes[node].postgres;
        server.hand = hand;
        // The record that ends recovery.
        server.written += 1;
        server.flushed = server.written;
        server.visible = server.written;
        server.leads_since = self.now;
        server.state = State::Primary;
        server.add_history(number);
        server.touch();
        self.tell(Some(node), |_| format!("PostgreSQL is a primary on timeline {number}"));
        self.ship_all(node);
        self.notice(node);
    }

    /// Writes one record on a primary, and what waits for it.
    pub fn write(&mut self, node: usize, what: Option<WaitFor>) -> u64 {
        let hangs = self.nodes[node].slow.wal_hangs;
        let server = &mut self.nodes[node].postgres;
        server.written += 1;
        let at = server.written;
        if let Some(what) = what {
            let alone = !server.loaded.waits() || !server.waits_enforced;
            server.waits.push_back(Wait { at, what, alone });
        }
        let generation = server.generation;
        if !hangs {
            if self.random.once_in(8) {
                let takes = self.span(MS / 5, 4 * MS);
                self.after(takes, Event::Flushed { node, generation });
            } else {
                self.flushed(node, generation);
            }
        }
        at
    }

    pub fn flushed(&mut self, node: usize, generation: u32) {
        let server = &mut self.nodes[node].postgres;
        if server.generation != generation || !server.runs() || self.nodes[node].slow.wal_hangs {
            return;
        }
        let server = &mut self.nodes[node].postgres;
        server.flushed = server.written;
        server.touch();
        let up_to = server.flushed;
        if server.waits.iter().any(|wait| wait.alone) {
            self.release(node, up_to, Release::WaitedForNobody);
        }
        self.ship_all(node);
    }

    /// Ends waits up to `up_to`.
    fn release(&mut self, node: usize, up_to: u64, why: Release) {
        let server = &mut self.nodes[node].postgres;
        let up_to = up_to.min(server.flushed);
        let mut index = 0;
        while index < self.nodes[node].postgres.waits.len() {
            let wait = self.nodes[node].postgres.waits[index];
            if wait.at > up_to {
                break;
            }
            if why == Release::WaitedForNobody && !wait.alone {
                index += 1;
                continue;
            }
            self.nodes[node].postgres.waits.remove(index);
            let server = &mut self.nodes[node].postgres;
            server.visible = server.visible.max(wait.at);
            let alone = wait.alone || why != Release::ByStandbys;
            match wait.what {
                WaitFor::Client => self.commit_returns(node, wait.at, alone),
                WaitFor::Heartbeat { begun, term } => self.heartbeat_returns(node, begun, term, alone),
            }
        }
    }

    /// What a WAL sender does after each answer of its standby, and after it loaded a list: by its *own* list
    /// it decides whether it counts, and by everybody's positions what may be released.
    pub fn sender_releases(&mut self, node: usize, link: usize) {
        let server = &self.nodes[node].postgres;
        let Some(sender) = server.senders.iter().find(|sender| sender.link == Some(link)) else { return };
        if !sender.streaming || !sender.list.names(sender) {
            return;
        }
        let needed = sender.list.core.needed as usize;
        let mut flushed: Vec<u64> = server
            .senders
            .iter()
            .filter(|other| other.streaming && other.list.names(other))
            .filter_map(|other| other.flush)
            .collect();
        flushed.sort_unstable_by(|one, other| other.cmp(one));
        if needed == 0 || flushed.len() < needed {
            return;
        }
        let up_to = flushed[needed - 1];
        if server.waits.front().is_some_and(|wait| wait.at <= up_to) {
            self.release(node, up_to, Release::ByStandbys);
        }
    }

    /// SIGHUP: each process takes the file's list in its own time.
    pub fn reload(&mut self, node: usize) {
        let generation = self.nodes[node].postgres.generation;
        let sessions = self.span(MS, 5 * MS);
        self.after(sessions, Event::ListLoads { node, generation, by: Process::Sessions });
        let checkpointer = if self.nodes[node].slow.checkpointer {
            self.span(200 * MS, 3 * SECOND)
        } else {
            self.span_or((MS, 8 * MS), 6, (20 * MS, 300 * MS))
        };
        self.after(checkpointer, Event::ListLoads { node, generation, by: Process::Checkpointer });
        for index in 0..self.nodes[node].postgres.senders.len() {
            let Some(link) = self.nodes[node].postgres.senders[index].link else { continue };
            let takes = self.span_or((MS, 8 * MS), 6, (20 * MS, 300 * MS));
            self.after(takes, Event::ListLoads { node, generation, by: Process::Sender(link) });
        }
    }

    pub fn list_loads(&mut self, node: usize, generation: u32, by: Process) {
        let server = &mut self.nodes[node].postgres;
        if server.generation != generation || !server.runs() {
            return;
        }
        server.touch();
        let list = Rc::clone(&server.list_on_disk);
        match by {
            Process::Sessions => server.loaded = list,
            Process::Checkpointer => {
                server.waits_enforced = list.waits();
                if !server.waits_enforced {
                    // Whoever waits is let go, as if replicated.
                    let up_to = server.written;
                    self.release(node, up_to, Release::ListEmptied);
                }
            }
            Process::Sender(link) => {
                let sender = server.senders.iter_mut().find(|sender| sender.link == Some(link));
                if let Some(sender) = sender {
                    sender.list = list;
                    self.sender_releases(node, link);
                }
            }
        }
    }

    /// A statement timeout, a cancel: the commit returns with a warning and is visible, wherever it is.
    pub fn cancel_waits(&mut self, node: usize) {
        let server = &mut self.nodes[node].postgres;
        if !server.is_primary() {
            return;
        }
        let cancelled: Vec<Wait> = server.waits.drain(..).collect();
        for wait in cancelled {
            if wait.what == WaitFor::Client && self.broken(Breakage::AcknowledgedInSpiteOfTheWarning) {
                self.commit_returns(node, wait.at, false);
            } else {
                self.clients.unknown += 1;
            }
        }
    }
}
