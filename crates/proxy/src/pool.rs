//! Who gets a server connection: one pool for each database and user, shared by all workers.
//!
//! A pool lends its servers (connections to PostgreSQL) to clients, one client at a time. It has one limit, however many
//! workers there are: a server belongs to the worker that opened it, and a client that is lent one of another worker
//! moves there. Among idle servers the newest comes first, so that few backends stay warm and the others age; among
//! waiting clients the oldest comes first, always.
//!
//! Servers are stamped with the [`Place`] that the route named when they were opened. When the route changes, those of
//! another place are closed, at once or when their client gives them back, and are never lent again: that is the fence
//! against a former primary. While there is no route, or the pool is paused, clients wait, for a bounded time and in
//! bounded number.
//!
//! Everything is told by `request`, `release` and so on, with the time; what is to be done comes out of [`Pool::poll`].
//! Callers drain that after each call, and call [`Pool::tick`] some times a second: no wait is more exact than that.
//!
//! Leaves out: sockets; what must be cleaned before a server may be given back; which route is right. Hazard: a server
//! that is lent to two clients mixes their answers.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use pgherd_core::types::{Instant, NodeName, Term};

/// A client, for as long as it is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u64);

/// A server of this pool; never used again for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerId(pub u64);

/// The event loop that owns a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Worker(pub u16);

/// Where servers are opened: a node, in the term in which it may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub node: NodeName,
    pub term: Term,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Servers of the present place, those that are being opened or closed included. At least 1.
    pub size: u32,
    /// Servers that may be opened at the same time: after a failover everybody comes at once. At least 1.
    pub opening: u32,
    /// Clients that may wait.
    pub waiting: u32,
    /// A client that has waited for so long is refused.
    pub query_wait: Duration,
    /// The same for a wait without a route.
    pub hold: Duration,
    /// An idle server is closed after this long,
    pub server_idle: Duration,
    /// and any server at this age, once nobody uses it.
    pub server_lifetime: Duration,
    /// After a failed attempt to open one the next is made no sooner.
    pub retry: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is this client's until it is released. The client goes on at that worker.
    Lent {
        server: ServerId,
        worker: Worker,
    },
    /// An order to lend or to refuse follows.
    Waits,
    Refused(Refusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    TooManyWaiting,
    /// No server was free in time.
    QueryWait,
    /// There was no server to use for so long.
    NoRoute,
    /// An operator has paused it, and has not resumed in time.
    Paused,
    /// The server does not let this user in, or has no such database.
    Rejected,
}

/// What somebody has to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// To the client's worker: it goes on at `worker`, with that server.
    Lend { client: ClientId, server: ServerId, worker: Worker },
    /// To the client's worker.
    Refuse { client: ClientId, why: Refusal },
    /// To `worker`, which answers with [`Pool::opened`] or [`Pool::failed`].
    Open { server: ServerId, worker: Worker, place: Place },
    /// To the server's worker, which answers with [`Pool::closed`].
    Close { server: ServerId, worker: Worker, why: Closing },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    /// The route leads elsewhere now, or it is of a former term.
    Rerouted,
    /// An operator wanted fresh ones.
    Reconnect,
    Paused,
    /// Its client left it in a state that nobody can know.
    Dirty,
    Idle,
    Lifetime,
    /// The limit is lower than it was.
    OverLimit,
}

/// For `SHOW POOLS` and the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub lent: u32,
    pub idle: u32,
    pub opening: u32,
    pub closing: u32,
    pub waiting: u32,
    /// How long the oldest waiting client has waited.
    pub max_wait: Duration,
}

/// What a server is doing, for whoever shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    Opening,
    Idle,
    Lent { to: ClientId },
    Closing,
}

#[derive(Debug)]
struct Server {
    worker: Worker,
    state: State,
    opened_at: Instant,
    /// Which [`Pool::place`] it was opened for, and since which request for fresh ones.
    place: u64,
    epoch: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Opening,
    Idle { since: Instant },
    Lent(ClientId),
    Closing,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    client: ClientId,
    worker: Worker,
    since: Instant,
}

#[derive(Debug)]
pub struct Pool {
    limits: Limits,
    place: Option<Place>,
    /// Counts the changes of the place.
    place_number: u64,
    /// Counts the requests for fresh servers.
    epoch: u64,
    paused: bool,
    /// Since when nothing may be lent, for either reason.
    halted_since: Option<Instant>,
    /// Since when there is no route.
    held_since: Option<Instant>,
    servers: BTreeMap<ServerId, Server>,
    next_server: u64,
    /// Idle servers of each worker, the newest last.
    idle: BTreeMap<Worker, Vec<ServerId>>,
    /// In the order in which they came.
    waiting: BTreeMap<u64, Waiter>,
    tickets: BTreeMap<ClientId, u64>,
    next_ticket: u64,
    /// Servers of the present place, whatever their state, and those of them that are being opened.
    live: u32,
    opening: u32,
    open_again_at: Option<Instant>,
    orders: VecDeque<Order>,
}

impl Pool {
    /// Without a route: everybody waits.
    pub fn new(limits: Limits, now: Instant) -> Pool {
        Pool {
            limits,
            place: None,
            place_number: 0,
            epoch: 0,
            paused: false,
            halted_since: Some(now),
            held_since: Some(now),
            servers: BTreeMap::new(),
            next_server: 0,
            idle: BTreeMap::new(),
            waiting: BTreeMap::new(),
            tickets: BTreeMap::new(),
            next_ticket: 0,
            live: 0,
            opening: 0,
            open_again_at: None,
            orders: VecDeque::new(),
        }
    }

    /// The next thing to do, in the order in which it was decided.
    pub fn poll(&mut self) -> Option<Order> {
        self.orders.pop_front()
    }

    /// A client needs a server. It must have none, and not wait for one.
    pub fn request(&mut self, client: ClientId, worker: Worker, now: Instant) -> Answer {
        debug_assert!(!self.tickets.contains_key(&client), "{client:?} waits already");
        if self.halted_since.is_none()
            && let Some(server) = self.take_idle(worker)
        {
            return Answer::Lent { server, worker: self.lend(server, client) };
        }
        if self.waiting.len() >= self.limits.waiting as usize {
            return Answer::Refused(Refusal::TooManyWaiting);
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting.insert(ticket, Waiter { client, worker, since: now });
        self.tickets.insert(client, ticket);
        self.open_more(now);
        Answer::Waits
    }

    /// A client that waits has gone. `false`: it did not wait (any more), and may have a server to release.
    pub fn leave(&mut self, client: ClientId) -> bool {
        self.tickets.remove(&client).and_then(|ticket| self.waiting.remove(&ticket)).is_some()
    }

    /// A client gives its server back. `reusable`: it is idle, in no transaction, and as clean as a fresh one.
    pub fn release(&mut self, server: ServerId, reusable: bool, now: Instant) {
        let Some(known) = self.servers.get(&server) else { return };
        if !matches!(known.state, State::Lent(_)) {
            debug_assert!(false, "{server:?} was not lent");
            return;
        }
        match self.unfit(known, now) {
            _ if !reusable => self.close(server, Closing::Dirty),
            Some(why) => self.close(server, why),
            None => self.give(server, now),
        }
    }

    /// A server that was to be opened takes statements.
    pub fn opened(&mut self, server: ServerId, now: Instant) {
        let Some(known) = self.servers.get_mut(&server).filter(|known| known.state == State::Opening) else {
            return;
        };
        known.opened_at = now;
        self.opening -= u32::from(known.place == self.place_number);
        let known = &self.servers[&server];
        match self.unfit(known, now) {
            Some(why) => self.close(server, why),
            None => self.give(server, now),
        }
        self.open_more(now);
    }

    /// A server that was to be opened could not be.
    pub fn failed(&mut self, server: ServerId, now: Instant) {
        let Some(known) = self.servers.get(&server).filter(|known| known.state == State::Opening) else {
            return;
        };
        if known.place == self.place_number {
            self.open_again_at = Some(now + self.limits.retry);
        }
        self.forget(server);
        self.open_more(now);
    }

    /// A server that was to be opened said no, and would say it again: whoever waits longest is refused for it. What one of a
    /// former place says is nobody's concern.
    pub fn rejected(&mut self, server: ServerId, now: Instant) {
        let Some(known) = self.servers.get(&server).filter(|known| known.state == State::Opening) else {
            return;
        };
        let is_here = known.place == self.place_number;
        self.forget(server);
        if is_here && let Some((_, Waiter { client, .. })) = self.waiting.pop_first() {
            self.tickets.remove(&client);
            self.orders.push_back(Order::Refuse { client, why: Refusal::Rejected });
        }
        self.open_more(now);
    }

    /// A server is gone: closed as ordered, or by itself in whatever state it was.
    pub fn closed(&mut self, server: ServerId, now: Instant) {
        if let Some(known) = self.servers.get(&server) {
            if let (State::Idle { .. }, Some(idle)) = (known.state, self.idle.get_mut(&known.worker)) {
                idle.retain(|other| *other != server);
            }
            self.forget(server);
            self.open_more(now);
        }
    }

    /// Where servers are to be opened from now on. Those of another place are closed, each when it is given back.
    pub fn route(&mut self, place: Place, now: Instant) {
        if self.place.as_ref() != Some(&place) {
            self.place = Some(place);
            self.place_number += 1;
            // Those of another place do not take room at this one, however long they take to close.
            (self.live, self.opening, self.open_again_at) = (0, 0, None);
            self.close_unfit_idle(now);
        }
        self.held_since = None;
        self.go_on(now);
    }

    /// Nobody may be written to until the next route is given: nothing is lent. What is idle is kept, for a route that
    /// comes back as it was; what becomes of the lent ones is for their sessions.
    pub fn hold(&mut self, now: Instant) {
        self.halted_since.get_or_insert(now);
        self.held_since.get_or_insert(now);
    }

    /// Lends nothing and closes everything, each server when it is given back. Done when [`Pool::is_drained`].
    pub fn pause(&mut self, now: Instant) {
        self.paused = true;
        self.halted_since.get_or_insert(now);
        self.close_unfit_idle(now);
    }

    pub fn resume(&mut self, now: Instant) {
        self.paused = false;
        self.go_on(now);
    }

    /// Closes every server of now, each when it is given back, while fresh ones are lent already.
    pub fn reconnect(&mut self, now: Instant) {
        self.epoch += 1;
        self.close_unfit_idle(now);
        self.open_more(now);
    }

    /// Where servers are opened now.
    pub fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// There is no route.
    pub fn is_held(&self) -> bool {
        self.held_since.is_some()
    }

    /// Some of its servers are to be closed as soon as nobody uses them, or are being closed.
    pub fn has_outdated(&self, now: Instant) -> bool {
        self.servers.values().any(|server| self.is_outdated(server, now))
    }

    fn is_outdated(&self, server: &Server, now: Instant) -> bool {
        server.state == State::Closing
            || matches!(
                self.unfit(server, now),
                Some(Closing::Rerouted | Closing::Reconnect | Closing::Paused)
            )
    }

    /// All of them, whether they are to be closed when nobody uses them, and what they do.
    pub fn servers(&self, now: Instant) -> impl Iterator<Item = (ServerId, Use, bool)> {
        self.servers.iter().map(move |(id, server)| {
            let doing = match server.state {
                State::Opening => Use::Opening,
                State::Idle { .. } => Use::Idle,
                State::Lent(to) => Use::Lent { to },
                State::Closing => Use::Closing,
            };
            (*id, doing, self.is_outdated(server, now))
        })
    }

    /// Clients that wait, and since when; the first one first.
    pub fn waiting(&self) -> impl Iterator<Item = (ClientId, Instant)> {
        self.waiting.values().map(|waiter| (waiter.client, waiter.since))
    }

    pub fn set_limits(&mut self, limits: Limits, now: Instant) {
        self.limits = limits;
        self.close_unfit_idle(now);
        self.tick(now);
    }

    /// Of the present place.
    pub fn lent(&self) -> impl Iterator<Item = ServerId> {
        let lent = |known: &Server| known.place == self.place_number && matches!(known.state, State::Lent(_));
        self.servers.iter().filter(move |(_, known)| lent(known)).map(|(server, _)| *server)
    }

    /// No server is left, in whatever state.
    pub fn is_drained(&self) -> bool {
        self.servers.is_empty()
    }

    /// Refuses who has waited for too long, and closes what is too old.
    pub fn tick(&mut self, now: Instant) {
        while let Some((&ticket, &Waiter { client, since, .. })) = self.waiting.first_key_value() {
            let held = self.held_since.map(|held| now.since(held.max(since)));
            let why = if held.is_some_and(|held| held >= self.limits.hold) {
                Refusal::NoRoute
            } else if now.since(since) >= self.limits.query_wait {
                if self.paused { Refusal::Paused } else { Refusal::QueryWait }
            } else {
                break;
            };
            self.waiting.remove(&ticket);
            self.tickets.remove(&client);
            self.orders.push_back(Order::Refuse { client, why });
        }
        self.close_unfit_idle(now);
        self.open_more(now);
    }

    pub fn counts(&self, now: Instant) -> Counts {
        let mut counts = Counts {
            waiting: u32::try_from(self.waiting.len()).unwrap_or(u32::MAX),
            max_wait: self
                .waiting
                .first_key_value()
                .map_or(Duration::ZERO, |(_, first)| now.since(first.since)),
            ..Counts::default()
        };
        for server in self.servers.values() {
            *match server.state {
                State::Opening => &mut counts.opening,
                State::Idle { .. } => &mut counts.idle,
                State::Lent(_) => &mut counts.lent,
                State::Closing => &mut counts.closing,
            } += 1;
        }
        counts
    }

    /// Lends again, unless something else still forbids it.
    fn go_on(&mut self, now: Instant) {
        if self.paused || self.is_held() {
            return;
        }
        self.halted_since = None;
        // Whoever waited is served with what is idle, before any newcomer.
        while let Some(worker) = self.waiting.first_key_value().map(|(_, waiter)| waiter.worker) {
            let Some(server) = self.take_idle(worker) else { break };
            self.give(server, now);
        }
        self.open_more(now);
    }

    /// Why this server must not be lent any more.
    fn unfit(&self, server: &Server, now: Instant) -> Option<Closing> {
        if server.place != self.place_number {
            Some(Closing::Rerouted)
        } else if self.paused {
            Some(Closing::Paused)
        } else if server.epoch != self.epoch {
            Some(Closing::Reconnect)
        } else if self.live > self.limits.size && self.open_or_opening() > self.limits.size {
            Some(Closing::OverLimit)
        } else if now.since(server.opened_at) >= self.limits.server_lifetime {
            Some(Closing::Lifetime)
        } else {
            None
        }
    }

    /// Servers of the present place that are not about to be gone.
    fn open_or_opening(&self) -> u32 {
        let here = |server: &&Server| server.place == self.place_number && server.state != State::Closing;
        u32::try_from(self.servers.values().filter(here).count()).unwrap_or(u32::MAX)
    }

    fn close_unfit_idle(&mut self, now: Instant) {
        // Most often there is nothing to do, and then this only looks.
        loop {
            let found = self.servers.iter().find_map(|(id, server)| {
                let State::Idle { since } = server.state else { return None };
                let idle = now.since(since) >= self.limits.server_idle;
                let why = self.unfit(server, now).or(idle.then_some(Closing::Idle))?;
                Some((*id, server.worker, why))
            });
            let Some((server, worker, why)) = found else { return };
            if let Some(idle) = self.idle.get_mut(&worker) {
                idle.retain(|other| *other != server);
            }
            self.close(server, why);
        }
    }

    /// The newest idle server that may be lent, of this worker if it has one, else of the one that has most.
    fn take_idle(&mut self, worker: Worker) -> Option<ServerId> {
        let own = self.idle.get(&worker).is_some_and(|idle| !idle.is_empty());
        let from = if own {
            worker
        } else {
            let fullest = self.idle.iter().max_by_key(|(_, idle)| idle.len());
            *fullest.filter(|(_, idle)| !idle.is_empty())?.0
        };
        self.idle.get_mut(&from)?.pop()
    }

    fn lend(&mut self, server: ServerId, client: ClientId) -> Worker {
        let known = self.servers.get_mut(&server).expect("what is idle or released is known");
        known.state = State::Lent(client);
        known.worker
    }

    /// To the oldest waiting client, or else to the idle ones. The server is fit.
    fn give(&mut self, server: ServerId, now: Instant) {
        if self.halted_since.is_none()
            && let Some((_, waiter)) = self.waiting.pop_first()
        {
            self.tickets.remove(&waiter.client);
            let worker = self.lend(server, waiter.client);
            self.orders.push_back(Order::Lend { client: waiter.client, server, worker });
            return;
        }
        if let Some(known) = self.servers.get_mut(&server) {
            known.state = State::Idle { since: now };
            self.idle.entry(known.worker).or_default().push(server);
        }
    }

    fn close(&mut self, server: ServerId, why: Closing) {
        if let Some(known) = self.servers.get_mut(&server) {
            known.state = State::Closing;
            self.orders.push_back(Order::Close { server, worker: known.worker, why });
        }
    }

    fn forget(&mut self, server: ServerId) {
        let Some(known) = self.servers.remove(&server) else { return };
        let here = u32::from(known.place == self.place_number);
        self.live -= here;
        self.opening -= here * u32::from(known.state == State::Opening);
    }

    /// Opens as many servers as clients wait for, as far as the limits let it.
    fn open_more(&mut self, now: Instant) {
        let Some(place) = self.place.clone().filter(|_| self.halted_since.is_none()) else { return };
        if self.open_again_at.is_some_and(|at| now < at) {
            return;
        }
        self.open_again_at = None;
        let (mut opening_here, workers) = self.opening_here_and_waiting_workers();
        for worker in workers {
            if self.live >= self.limits.size || self.opening >= self.limits.opening {
                return;
            }
            // Each that is being opened already is for one of those who came first.
            if opening_here > 0 {
                opening_here -= 1;
                continue;
            }
            let server = ServerId(self.next_server);
            self.next_server += 1;
            let (place_number, epoch) = (self.place_number, self.epoch);
            let opening =
                Server { worker, state: State::Opening, opened_at: now, place: place_number, epoch };
            self.servers.insert(server, opening);
            self.live += 1;
            self.opening += 1;
            self.orders.push_back(Order::Open { server, worker, place: place.clone() });
        }
    }

    /// How many servers that are being opened will be fit, and the workers of those who wait, in order; no more than
    /// could ever be opened.
    fn opening_here_and_waiting_workers(&self) -> (u32, Vec<Worker>) {
        if self.waiting.is_empty() {
            return (0, Vec::new());
        }
        let fit = |server: &&Server| {
            server.state == State::Opening && server.place == self.place_number && server.epoch == self.epoch
        };
        let opening = self.servers.values().filter(fit).count();
        let most = self.limits.opening as usize + opening;
        let workers = self.waiting.values().take(most).map(|waiter| waiter.worker).collect();
        (u32::try_from(opening).unwrap_or(u32::MAX), workers)
    }
}

#[cfg(test)]
mod tests;
