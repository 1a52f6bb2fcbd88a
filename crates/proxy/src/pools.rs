//! The pools at work: does what [`Pool`] orders, with real connections.
//!
//! Idle connections lie beside their pool, under one lock, so that whoever is lent one has it at once, on whatever worker.
//! What takes time (opening, closing) is done by tasks without the lock.
//!
//! Hazard: a connection that is lent twice, or lost while it is on its way to a client who has just left.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use pgherd_core::types::{Instant, NodeName};
use pgherd_pgwire::login::Purpose;
use pgherd_pgwire::startup::Replication;
use tokio::sync::oneshot;

use crate::backend::Backend;
use crate::clock;
use crate::counts::Counts;
use crate::fence::Admission;
use crate::login::Keys;
use crate::pool::{self, Answer, ClientId, Limits, Order, Place, Pool, Refusal, ServerId, Use, Worker};
use crate::roster::{ServerCard, Statements};
use crate::routes::{Role, Route};
use crate::server::NotIn;
use crate::world::World;

/// A server that was in use so short a time ago is lent as it is. The kernel is asked whether others are still there: a call
/// for each transaction, which a busy pool need not make.
const QUIET_FOR: Duration = Duration::from_millis(1);

/// Whose servers are in it: clients of another name never get them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    pub database: String,
    pub user: String,
    pub role: Role,
}

#[derive(Default)]
pub(crate) struct Pools {
    by_name: Mutex<HashMap<Name, Arc<OnePool>>>,
    paused: Mutex<Paused>,
}

/// What an operator has paused; also for pools that there will be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Paused {
    pub(crate) all: bool,
    pub(crate) databases: BTreeSet<String>,
}

impl Paused {
    pub(crate) fn has(&self, database: &str) -> bool {
        self.all || self.databases.contains(database)
    }
}

/// What there is in a pool, at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Look {
    pub(crate) name: Name,
    pub(crate) counts: pool::Counts,
    pub(crate) servers: Vec<(Use, bool, Option<Arc<ServerCard>>)>,
    pub(crate) waiting: Vec<(ClientId, Instant)>,
}

pub(crate) struct OnePool {
    name: Name,
    state: Mutex<State>,
    counts: Arc<Counts>,
}

impl std::fmt::Debug for OnePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnePool").field("name", &self.name).finish_non_exhaustive()
    }
}

struct State {
    pool: Pool,
    idle: Idle,
    /// Of all that are open, whoever has them.
    cards: HashMap<ServerId, Arc<ServerCard>>,
    waiting: HashMap<ClientId, oneshot::Sender<Granted>>,
    /// Lent, and their clients begin nothing while the primary is drained.
    resting: HashSet<ServerId>,
    /// Of whoever came in last: they open servers for all.
    keys: Option<Keys>,
    /// What the server said when it let nobody in.
    rejection: Option<NotIn>,
    /// Where the primary had no line for these clients, and since when: if it says so once more, that is how it is.
    shut_out: Option<(Place, Instant)>,
}

type Granted = Result<Lent, NotLent>;

/// Why there is no server for a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotLent {
    Refused(Refusal),
    /// Told by the server.
    Rejected(NotIn),
}

/// A server that is somebody's.
pub(crate) struct Lent {
    pub(crate) server: ServerId,
    pub(crate) backend: Box<Backend>,
}

/// Servers that nobody has, in the order in which they were laid down: the pool lends the newest, which is found at once, and
/// nothing is allocated for one that comes and goes with each transaction.
#[derive(Default)]
struct Idle(Vec<(ServerId, Box<Backend>)>);

impl Idle {
    fn insert(&mut self, server: ServerId, backend: Box<Backend>) {
        self.0.push((server, backend));
    }

    fn remove(&mut self, server: ServerId) -> Option<Box<Backend>> {
        let at = self.0.iter().rposition(|(known, _)| *known == server)?;
        Some(self.0.remove(at).1)
    }

    /// Those that have said something, or are gone.
    fn dead(&self) -> Vec<ServerId> {
        let dead = self.0.iter().filter(|(_, backend)| !backend.stream.is_quiet());
        dead.map(|(server, _)| *server).collect()
    }
}

impl State {
    /// A server of which its client has no more need. What is to become of it the pool orders.
    fn take_back(&mut self, mut lent: Lent, reusable: bool) {
        let now = clock::now();
        if let Some(card) = &lent.backend.card {
            card.statements.set(lent.backend.known.len());
        }
        lent.backend.rests_since = now;
        self.idle.insert(lent.server, lent.backend);
        self.pool.release(lent.server, reusable, now);
    }

    /// Has this place shut its clients out before somebody began to ask it?
    fn was_shut_out(&self, place: &Option<Place>, began: Instant) -> bool {
        self.shut_out.as_ref().is_some_and(|(at, since)| place.as_ref() == Some(at) && *since <= began)
    }

    /// A server is no more.
    fn closed(&mut self, server: ServerId) {
        if let Some(card) = self.cards.remove(&server) {
            card.counts.closed();
        }
        self.pool.closed(server, clock::now());
    }
}

impl Pools {
    fn all(&self) -> MutexGuard<'_, HashMap<Name, Arc<OnePool>>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `keys`: those that the client has just proven to have.
    pub(crate) fn of(&self, name: Name, keys: Option<Keys>, world: &World) -> Arc<OnePool> {
        let mut all = self.all();
        let pool = all.entry(name).or_insert_with_key(|name| {
            let limits = world.settings.load().limits;
            let mut pool = Pool::new(limits, clock::now());
            if let Route::To(place, _) = world.fence.route(&name.role) {
                pool.route(place, clock::now());
            }
            if self.paused().has(&name.database) {
                pool.pause(clock::now());
            }
            let state = State {
                pool,
                idle: Idle::default(),
                cards: HashMap::new(),
                waiting: HashMap::new(),
                resting: HashSet::new(),
                keys: None,
                rejection: None,
                shut_out: None,
            };
            let counts = world.ledger.of(&name.database, &name.user);
            Arc::new(OnePool { name: name.clone(), state: Mutex::new(state), counts })
        });
        let pool = Arc::clone(pool);
        drop(all);
        pool.state().keys = keys;
        pool
    }

    /// The route is another one, or nobody knows it any more.
    pub(crate) fn rerouted(&self, world: &Arc<World>) {
        for pool in self.every() {
            let mut state = pool.state();
            match world.fence.route(&pool.name.role) {
                Route::To(place, _) => state.pool.route(place, clock::now()),
                Route::Hold(_) => {
                    state.shut_out = None;
                    state.pool.hold(clock::now());
                }
            }
            pool.act(state, world);
        }
    }

    /// Nothing is under way at the primary, and nothing will be while its route is held.
    pub(crate) fn are_drained(&self) -> bool {
        let busy = |state: &State| state.pool.lent().any(|server| !state.resting.contains(&server));
        self.every().iter().filter(|pool| pool.name.role == Role::Primary).all(|pool| !busy(&pool.state()))
    }

    pub(crate) fn set_limits(&self, limits: Limits, world: &Arc<World>) {
        for pool in self.every() {
            let mut state = pool.state();
            state.pool.set_limits(limits, clock::now());
            pool.act(state, world);
        }
    }

    /// Closes what nobody has.
    pub(crate) fn close_idle(&self, world: &Arc<World>) {
        let limits = world.settings.load().limits;
        self.set_limits(Limits { server_idle: Duration::ZERO, ..limits }, world);
        self.set_limits(limits, world);
    }

    /// Some times a second: what has waited or idled for too long.
    pub(crate) fn tick(&self, world: &Arc<World>) {
        for pool in self.every() {
            let mut state = pool.state();
            let dead = state.idle.dead();
            for server in dead {
                state.idle.remove(server);
                state.closed(server);
            }
            state.pool.tick(clock::now());
            pool.act(state, world);
        }
        // Nobody is in it, and nothing is remembered but limits.
        self.all().retain(|_, pool| {
            let state = pool.state();
            Arc::strong_count(pool) > 1 || !state.pool.is_drained() || !state.waiting.is_empty()
        });
    }

    pub(crate) fn counts(&self) -> Vec<(Name, pool::Counts)> {
        let now = clock::now();
        self.every().iter().map(|pool| (pool.name.clone(), pool.state().pool.counts(now))).collect()
    }

    pub(crate) fn look(&self) -> Vec<Look> {
        let now = clock::now();
        let look = |pool: &Arc<OnePool>| {
            let state = pool.state();
            let servers = state.pool.servers(now);
            let servers =
                servers.map(|(id, doing, outdated)| (doing, outdated, state.cards.get(&id).cloned()));
            Look {
                name: pool.name.clone(),
                counts: state.pool.counts(now),
                servers: servers.collect(),
                waiting: state.pool.waiting().collect(),
            }
        };
        self.every().iter().map(look).collect()
    }

    pub(crate) fn paused(&self) -> MutexGuard<'_, Paused> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is paused, and brings all pools to it.
    pub(crate) fn set_paused<T>(&self, world: &Arc<World>, change: impl FnOnce(&mut Paused) -> T) -> T {
        let changed = change(&mut self.paused());
        // A pool that is made meanwhile looks for itself, and is brought to the same.
        for pool in self.every() {
            let mut state = pool.state();
            match (self.paused().has(&pool.name.database), state.pool.is_paused()) {
                (true, false) => state.pool.pause(clock::now()),
                (false, true) => state.pool.resume(clock::now()),
                _ => continue,
            }
            pool.act(state, world);
        }
        changed
    }

    /// Of this database, or of all.
    fn of_database(&self, database: Option<&str>) -> impl Iterator<Item = Arc<OnePool>> {
        let meant = move |pool: &Arc<OnePool>| database.is_none_or(|name| pool.name.database == name);
        self.every().into_iter().filter(meant)
    }

    pub(crate) fn reconnect(&self, database: Option<&str>, world: &Arc<World>) {
        for pool in self.of_database(database) {
            let mut state = pool.state();
            state.pool.reconnect(clock::now());
            pool.act(state, world);
        }
    }

    /// Of the servers at one node.
    pub(crate) fn reconnect_at(&self, node: &NodeName, world: &Arc<World>) {
        let role = Role::Standby(node.clone());
        for pool in self.every().into_iter().filter(|pool| pool.name.role == role) {
            let mut state = pool.state();
            state.pool.reconnect(clock::now());
            pool.act(state, world);
        }
    }

    /// None of them has a server.
    pub(crate) fn have_none(&self, database: Option<&str>) -> bool {
        self.of_database(database).all(|pool| pool.state().pool.is_drained())
    }

    /// None of them has a server that is to be closed.
    pub(crate) fn are_fresh(&self, database: Option<&str>) -> bool {
        let now = clock::now();
        self.of_database(database).all(|pool| !pool.state().pool.has_outdated(now))
    }

    fn every(&self) -> Vec<Arc<OnePool>> {
        self.all().values().cloned().collect()
    }
}

impl OnePool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_of_the_primary(&self) -> bool {
        self.name.role == Role::Primary
    }

    /// Waits for a server. Whoever stops waiting leaves the queue.
    pub(crate) async fn lend(
        self: &Arc<Self>,
        client: ClientId,
        worker: Worker,
        world: &Arc<World>,
    ) -> Result<Lent, NotLent> {
        let since = clock::now();
        let receiver = {
            let mut state = self.state();
            loop {
                match state.pool.request(client, worker, since) {
                    Answer::Lent { server, .. } => {
                        let Some(backend) = state.idle.remove(server) else { continue };
                        let was_just_used = since.since(backend.rests_since) < QUIET_FOR;
                        if was_just_used || backend.stream.is_quiet() {
                            self.act(state, world);
                            self.counts.waited(Duration::ZERO);
                            return Ok(Lent { server, backend });
                        }
                        state.closed(server);
                    }
                    Answer::Refused(why) => {
                        self.act(state, world);
                        return Err(NotLent::Refused(why));
                    }
                    Answer::Waits => break,
                }
            }
            let (sender, receiver) = oneshot::channel();
            state.waiting.insert(client, sender);
            if state.pool.is_held() {
                self.counts.held();
            }
            self.act(state, world);
            receiver
        };
        let mut waiter = Waiter { pool: self, client, receiver, world };
        let answered = (&mut waiter.receiver).await;
        if let Ok(Ok(_)) = answered {
            self.counts.waited(clock::now().since(since));
        }
        match answered {
            Ok(granted) => granted,
            // Never: whoever drops the sender has answered.
            Err(_) => Err(NotLent::Refused(Refusal::QueryWait)),
        }
    }

    /// A client has come in with one of its servers.
    pub(crate) fn count_login(&self) {
        self.counts.login();
    }

    /// The right to use a server that is lent.
    pub(crate) fn admission(
        self: &Arc<Self>,
        server: ServerId,
        backend: &Backend,
        world: &World,
    ) -> Admission {
        let seat = Seat { pool: Arc::clone(self), server, rests: false };
        let (fence, role) = (Arc::clone(&world.fence), self.name.role.clone());
        let bell = backend.bell.clone().unwrap_or_else(|| world.fence.bell());
        let admission = Admission::new(fence, role, backend.place.clone(), bell, Some(seat));
        admission.counting(backend.card.clone()).admitted_before(backend.admitted)
    }

    /// `reusable`: it is as clean as a fresh one.
    pub(crate) fn give_back(self: &Arc<Self>, lent: Lent, reusable: bool, world: &Arc<World>) {
        let mut state = self.state();
        state.take_back(lent, reusable);
        self.act(state, world);
    }

    /// A server that was lent is no more.
    pub(crate) fn gone(self: &Arc<Self>, server: ServerId, world: &Arc<World>) {
        let mut state = self.state();
        state.closed(server);
        self.act(state, world);
    }

    /// The postmaster that opened it is gone, or shuts down: all of them end, though those that are idle may not have said so yet.
    pub(crate) fn replace_idle(self: &Arc<Self>, place: &Place, world: &Arc<World>) {
        let mut state = self.state();
        if state.pool.place() == Some(place) {
            state.pool.reconnect(clock::now());
            self.act(state, world);
        }
    }

    /// Does what the pool has ordered.
    fn act(self: &Arc<Self>, mut state: MutexGuard<'_, State>, world: &Arc<World>) {
        while let Some(order) = state.pool.poll() {
            match order {
                Order::Lend { client, server, .. } => {
                    let Some(backend) = state.idle.remove(server) else { continue };
                    let lent = Ok(Lent { server, backend });
                    let refused = match state.waiting.remove(&client) {
                        Some(sender) => sender.send(lent).err(),
                        None => Some(lent),
                    };
                    // It left in this moment.
                    if let Some(Ok(lent)) = refused {
                        state.take_back(lent, true);
                    }
                }
                Order::Refuse { client, why } => {
                    let said = match (why, &state.rejection) {
                        (Refusal::Rejected, Some(rejection)) => NotLent::Rejected(rejection.clone()),
                        (why, _) => NotLent::Refused(why),
                    };
                    if let Some(sender) = state.waiting.remove(&client) {
                        // If it has just left, nobody has to hear it.
                        drop(sender.send(Err(said)));
                    }
                }
                Order::Open { server, worker, .. } => {
                    let (pool, here, keys) = (Arc::clone(self), Arc::clone(world), state.keys.clone());
                    world.spawn_at(worker, async move { pool.open(server, keys, &here).await });
                }
                Order::Close { server, worker, why } => {
                    let Some(backend) = state.idle.remove(server) else { continue };
                    tracing::debug!(?why, pid = backend.welcome.pid, "closes a server");
                    let (pool, here) = (Arc::clone(self), Arc::clone(world));
                    world.spawn_at(worker, async move {
                        backend.close().await;
                        pool.gone(server, &here);
                    });
                }
            }
        }
    }

    fn card(&self, backend: &Backend, world: &World) -> Arc<ServerCard> {
        self.counts.opened();
        let addresses = backend.stream.addresses();
        let statements = Statements::default();
        statements.set(0);
        Arc::new(ServerCard {
            number: world.roster.next_server.fetch_add(1, Ordering::Relaxed) + 1,
            place: backend.place.clone(),
            address: addresses.map(|(_, peer)| peer),
            local: addresses.map(|(local, _)| local),
            is_encrypted: backend.stream.is_encrypted(),
            pid: backend.welcome.pid,
            opened_at: SystemTime::now(),
            statements,
            counts: Arc::clone(&self.counts),
            node_counts: world.ledger.of_node(&backend.place.node),
        })
    }

    async fn open(self: Arc<Self>, server: ServerId, keys: Option<Keys>, world: &Arc<World>) {
        let Name { database, user, role } = self.name.clone();
        let is_certified = world.settings.load().certificate_users.contains(&user);
        let (replication, parameters) = (Replication::Off, Vec::new());
        let purpose = Purpose { user, database, replication, parameters, is_certified };
        // The route may have changed since it was ordered; then the pool closes what is opened for the former one.
        let began = clock::now();
        let (place, opened) = match world.fence.route(&role) {
            Route::To(place, target) => {
                let way = world.way();
                let opened = match &role {
                    Role::Primary => Backend::open_to_write(place.clone(), target, way, purpose, keys).await,
                    Role::Standby(_) => Backend::open(place.clone(), target, way, &purpose, keys).await,
                };
                (Some(place), opened)
            }
            Route::Hold(why) => (None, Err(NotIn::Unreachable(format!("there is no route: {why:?}")))),
        };
        // No agent says so any more, and it may have been promoted: then whoever reads could write.
        let opened = opened.and_then(|backend| match &role {
            Role::Standby(_) if !world.fence.is_proven() && !backend.is_standby() => {
                Err(NotIn::Unreachable("it is no standby any more".to_owned()))
            }
            _ => Ok(backend),
        });
        let mut state = self.state();
        let now = clock::now();
        match opened {
            Ok(mut backend) => {
                (state.rejection, state.shut_out) = (None, None);
                let card = self.card(&backend, world);
                backend.card = Some(Arc::clone(&card));
                backend.bell = Some(world.fence.bell());
                state.cards.insert(server, card);
                state.idle.insert(server, Box::new(backend));
                state.pool.opened(server, now);
            }
            // An agent may have closed it a moment ago, and the table that says so be on its way.
            Err(error)
                if error.is_shut_out() && role == Role::Primary && !state.was_shut_out(&place, began) =>
            {
                tracing::info!(%error, database = self.name.database, user = self.name.user, "is asked once more");
                state.shut_out = place.map(|place| (place, now));
                state.pool.failed(server, now);
            }
            Err(error) if error.passes() => {
                tracing::info!(%error, database = self.name.database, user = self.name.user, "cannot open a server yet");
                state.pool.failed(server, now);
            }
            Err(error) => {
                tracing::info!(%error, database = self.name.database, user = self.name.user, "the server lets nobody in");
                world.verifiers.forget(&self.name.user);
                state.rejection = Some(error);
                state.pool.rejected(server, now);
            }
        }
        self.act(state, world);
    }
}

/// Says of one server that is lent whether its client rests.
#[derive(Debug)]
pub(crate) struct Seat {
    pool: Arc<OnePool>,
    server: ServerId,
    rests: bool,
}

impl Seat {
    /// `true`: that is new.
    pub(crate) fn rest(&mut self, rests: bool) -> bool {
        if self.rests == rests {
            return false;
        }
        self.rests = rests;
        let mut state = self.pool.state();
        match rests {
            true => state.resting.insert(self.server),
            false => state.resting.remove(&self.server),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.rest(false);
    }
}

/// A client in the queue.
struct Waiter<'a> {
    pool: &'a Arc<OnePool>,
    client: ClientId,
    receiver: oneshot::Receiver<Granted>,
    world: &'a Arc<World>,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.receiver.close();
        let late = self.receiver.try_recv();
        let mut state = self.pool.state();
        state.waiting.remove(&self.client);
        match late {
            // It was lent one in the moment in which it left.
            Ok(Ok(lent)) => state.take_back(lent, true),
            _ => {
                state.pool.leave(self.client);
            }
        }
        self.pool.act(state, self.world);
    }
}

/// How often [`Pools::tick`] is to be called.
pub(crate) const TICK: Duration = Duration::from_millis(100);
