//! A proxy that runs: listeners, workers, and what keeps them in step with the routes.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{RwLock, oneshot, watch};

use crate::client::{self, Door};
use crate::clock;
use crate::counts::NoEntry;
use crate::net::{self, ServerTls};
use crate::observed::{self, Observation};
use crate::pool::{Counts, Worker};
use crate::pools::{Name, TICK};
use crate::routes::{Role, Route, Table};
use crate::succession::{Elders, Inherited};
use crate::timer;
use crate::verifiers::{AuthQuery, Verifiers};
use crate::wish::{Promotion, Reload};
use crate::world::{NoRandomness, Settings, World};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 4096;
/// After an accept that failed for want of descriptors or memory: those who leave must be noticed.
const BREATH: Duration = Duration::from_millis(50);
/// A drain takes as long as the last transaction, and clients wait for its end.
const LOOK_AT_DRAIN_EVERY: Duration = Duration::from_millis(2);

/// How often it is looked whether those are gone that somebody waits for.
const LOOK_AT_GUESTS_EVERY: Duration = Duration::from_millis(20);
/// For all clients to take the last sentence; each has somewhat less.
const FAREWELLS_WITHIN: Duration = Duration::from_secs(3);
/// A process that has a successor keeps a server so long that nobody uses: the pools of the successor need the room.
const RETIRED_SERVER_IDLE: Duration = Duration::from_secs(1);

/// What averages are over, as PgBouncer's `stats_period`.
pub(crate) const STATS_PERIOD: Duration = Duration::from_secs(60);

/// What a listener leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The primary.
    ReadWrite,
    /// A standby, or while there is none the primary, which then refuses writes as a standby does.
    ReadOnly,
}

/// What cannot be replaced while it runs.
pub struct Config {
    /// Port 0 for a free one.
    pub listen: Vec<(SocketAddr, Access)>,
    /// Threads, each with its own event loop.
    pub workers: u16,
    pub server_tls: Arc<dyn ServerTls>,
    pub auth_query: AuthQuery,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot start a worker")]
    Worker(#[source] io::Error),
    #[error("the system has no random bytes")]
    NoRandomness,
}

impl From<NoRandomness> for StartError {
    fn from(_: NoRandomness) -> StartError {
        StartError::NoRandomness
    }
}

/// What becomes of the clients of a proxy that is to end. In all cases nobody is let in any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// They are told so, and that is all.
    Now,
    /// Those whose servers are their own for a moment use them to the end: of their transaction, or of their session with
    /// session pooling; but no longer than that.
    AfterServers { within: Option<Duration> },
    /// They stay as long as they like.
    AfterClients,
}

/// Do clients come in?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doors {
    Open,
    /// They wait outside, and may be let in by somebody else.
    Shut,
    /// There are none.
    Gone,
}

/// What lets clients in listens to this.
#[derive(Clone)]
struct Porter {
    doors: watch::Receiver<Doors>,
    /// Held by whoever lets clients in; whoever has it alone knows that nobody does.
    gate: Arc<RwLock<()>>,
}

/// Ends when it is dropped, and its clients with it.
pub struct Proxy {
    world: Arc<World>,
    addresses: Vec<SocketAddr>,
    doors: watch::Sender<Doors>,
    gate: Arc<RwLock<()>>,
    /// For a successor.
    listeners: Mutex<Vec<Inherited>>,
    /// As the herd wants it to be, and whether that is changed since there is a successor.
    wanted: Mutex<(Settings, bool)>,
    stop: watch::Sender<bool>,
    workers: Vec<JoinHandle<()>>,
    /// What keeps all in step, and what tells it to end by being dropped.
    keeper: Option<(JoinHandle<()>, oneshot::Sender<()>)>,
}

impl Proxy {
    /// Listens, and lets clients wait until [`Proxy::learn`] has told where the primary is.
    pub fn start(config: Config, settings: Settings) -> Result<Proxy, StartError> {
        Proxy::begin(config, settings, Vec::new(), Doors::Open)
    }

    /// As [`Proxy::start`], where another process listens: with its listeners, as far as they are wanted. Nobody is let in
    /// before that one lets nobody in any more ([`crate::succession`]).
    pub fn succeed(
        config: Config,
        settings: Settings,
        inherited: Vec<Inherited>,
    ) -> Result<Proxy, StartError> {
        Proxy::begin(config, settings, inherited, Doors::Shut)
    }

    fn begin(
        config: Config,
        settings: Settings,
        mut inherited: Vec<Inherited>,
        doors: Doors,
    ) -> Result<Proxy, StartError> {
        let Config { listen, workers, server_tls, auth_query } = config;
        let mut runtimes = Vec::new();
        for _ in 0..workers.max(1) {
            let runtime = Builder::new_current_thread().enable_io().build();
            runtimes.push(runtime.map_err(StartError::Worker)?);
        }
        let keeping = Builder::new_current_thread().enable_time().build().map_err(StartError::Worker)?;
        let mut addresses = Vec::new();
        let mut listeners: Vec<Vec<(std::net::TcpListener, Access)>> =
            runtimes.iter().map(|_| Vec::new()).collect();
        let mut handed = Vec::new();
        for (wanted, access) in listen {
            let failed = |source| StartError::Listen { address: wanted, source };
            let mut own: Vec<std::net::TcpListener> = inherited
                .extract_if(.., |known| known.is_at(wanted, access))
                .map(|known| known.listener)
                .collect();
            if own.is_empty() {
                own = bind_all(wanted, listeners.len()).map_err(failed)?;
            }
            let address = own[0].local_addr().map_err(failed)?;
            // Each listener has a queue of its own, and whoever waits in it must be let in by somebody.
            for number in own.len()..listeners.len() {
                let again = own[number % own.len()].try_clone().map_err(failed)?;
                own.push(again);
            }
            let workers = listeners.len();
            for (number, listener) in own.into_iter().enumerate() {
                let again = listener.try_clone().map_err(failed)?;
                handed.push(Inherited { access, address, listener: again });
                listeners[number % workers].push((listener, access));
            }
            addresses.push(address);
        }
        drop(inherited);
        let doors = watch::Sender::new(doors);
        let gate = Arc::new(RwLock::new(()));
        let wanted = Mutex::new((settings.clone(), false));
        let handles = runtimes.iter().map(|runtime| runtime.handle().clone()).collect();
        let world = Arc::new(World::new(settings, server_tls, Verifiers::new(auth_query)?, handles));
        // Nobody has set it before.
        world.listening.get_or_init(|| addresses.clone());
        let stop = watch::Sender::new(false);
        let mut workers = Vec::new();
        for (number, (runtime, listeners)) in (0_u16..).zip(runtimes.into_iter().zip(listeners)) {
            let (world, stopped) = (Arc::clone(&world), stop.subscribe());
            let porter = Porter { doors: doors.subscribe(), gate: Arc::clone(&gate) };
            let keeper = keeping.handle().clone();
            let thread = std::thread::Builder::new()
                .name(format!("worker {number}"))
                .spawn(move || work(&runtime, &keeper, listeners, Worker(number), &world, &porter, stopped));
            workers.push(thread.map_err(StartError::Worker)?);
        }
        let (stop_keeping, stopped) = oneshot::channel();
        let here = Arc::clone(&world);
        let keeper = std::thread::Builder::new().name("keeper".to_owned());
        let keeper = keeper.spawn(move || {
            // A task of its own: timers go on whatever becomes of it.
            keeping.spawn(keep_in_step(here));
            // Its sender says nothing and is dropped.
            keeping.block_on(stopped).ok();
        });
        let keeper = Some((keeper.map_err(StartError::Worker)?, stop_keeping));
        let listeners = Mutex::new(handed);
        Ok(Proxy { world, addresses, doors, gate, listeners, wanted, stop, workers, keeper })
    }

    /// Of the listeners, in their order.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// `false`: the table is of a former term, and changes nothing.
    pub fn learn(&self, table: Table) -> bool {
        let seen = table.clone();
        let learnt = self.world.fence.learn(table);
        if learnt {
            self.world.nodes.learn(seen, clock::now());
            self.world.pools.rerouted(&self.world);
        }
        learnt
    }

    /// Until no client has anything under way on the primary, and none begins anything: while it is about to hand over
    /// ([`Table::draining`]), that is so from then on.
    pub async fn drained(&self) {
        while !self.world.pools.are_drained() {
            timer::sleep(LOOK_AT_DRAIN_EVERY).await;
        }
    }

    /// For those who come from now on; limits for all.
    pub fn replace(&self, settings: Settings) {
        let mut wanted = self.wanted();
        wanted.0 = settings;
        self.apply(&wanted);
    }

    fn wanted(&self) -> MutexGuard<'_, (Settings, bool)> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, (wanted, is_retired): &(Settings, bool)) {
        let mut settings = wanted.clone();
        if *is_retired {
            settings.limits.server_idle = settings.limits.server_idle.min(RETIRED_SERVER_IDLE);
        }
        let limits = settings.limits;
        self.world.settings.store(Arc::new(settings));
        self.world.fence.set_hold(limits.hold);
        self.world.pools.set_limits(limits, &self.world);
    }

    /// Somebody else lets clients in from now on. Servers that nobody has are closed, and the others soon after they are given
    /// back, so that the successor's pools find room at PostgreSQL.
    pub(crate) fn retire(&self) {
        let mut wanted = self.wanted();
        wanted.1 = true;
        self.apply(&wanted);
        self.world.pools.close_idle(&self.world);
        self.world.verifiers.rest();
    }

    /// The successor is gone.
    pub(crate) fn stay(&self) {
        let mut wanted = self.wanted();
        wanted.1 = false;
        self.apply(&wanted);
    }

    /// Lets clients in.
    pub(crate) fn open(&self) {
        self.doors.send_replace(Doors::Open);
    }

    /// When this is over, nobody is let in, until [`Proxy::open`]; those who come wait at the listeners.
    pub(crate) async fn shut(&self) {
        self.doors.send_replace(Doors::Shut);
        drop(self.gate.write().await);
    }

    /// Nobody is let in any more, and this process does not listen.
    pub(crate) async fn close(&self) {
        self.doors.send_replace(Doors::Gone);
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clear();
        drop(self.gate.write().await);
    }

    /// The same ones, which others may have as well.
    pub(crate) fn listeners(&self) -> io::Result<Vec<Inherited>> {
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let again = |known: &Inherited| -> io::Result<Inherited> {
            let Inherited { access, address, listener } = known;
            Ok(Inherited { access: *access, address: *address, listener: listener.try_clone()? })
        };
        listeners.iter().map(again).collect()
    }

    pub(crate) fn forward_cancels(&self, elders: Elders) {
        // Only the first one to begin says so.
        self.world.elders.get_or_init(|| elders);
    }

    /// `false`: this process has not given out that key.
    pub(crate) async fn cancel(&self, pid: u32, key: &[u8]) -> bool {
        self.world.cancels.cancel(pid, key, &*self.world.server_tls).await
    }

    /// Clients, whether they are in or not, but for those at the console.
    pub fn guests(&self) -> u64 {
        let consoles = self.world.consoles.load(Ordering::Relaxed) as u64;
        self.clients().saturating_sub(consoles)
    }

    pub(crate) async fn guests_gone(&self) {
        while self.guests() > 0 {
            timer::sleep(LOOK_AT_GUESTS_EVERY).await;
        }
    }

    /// Until an operator wants the proxy to end.
    pub async fn asked_to_end(&self) -> Ending {
        let mut asked = self.world.ending.subscribe();
        loop {
            let mut ending = None;
            self.world.ending.send_if_modified(|asked| {
                ending = asked.take();
                false
            });
            if let Some(ending) = ending {
                return ending;
            }
            // The sender lives as long as this.
            drop(asked.changed().await);
        }
    }

    /// Until it is known where the primary is.
    pub async fn routed(&self) {
        while !matches!(self.world.fence.route(&Role::Primary), Route::To(..)) {
            timer::sleep(LOOK_AT_GUESTS_EVERY).await;
        }
    }

    /// Lets nobody in any more, and ends all clients. Can be begun again with less patience while it lasts.
    pub async fn finish(&self, ending: Ending) {
        self.close().await;
        match ending {
            Ending::Now => {}
            Ending::AfterServers { within } => {
                self.world.pools.set_paused(&self.world, |paused| paused.all = true);
                let given_back = async {
                    while !self.world.pools.have_none(None) {
                        timer::sleep(LOOK_AT_GUESTS_EVERY).await;
                    }
                };
                match within {
                    Some(within) => drop(timer::timeout(within, given_back).await),
                    None => given_back.await,
                }
            }
            Ending::AfterClients => {
                self.retire();
                self.guests_gone().await;
            }
        }
        let farewells = async {
            while self.clients() > 0 {
                // Also those who have just come in.
                self.world.roster.cards().iter().for_each(|card| card.dismiss());
                timer::sleep(LOOK_AT_GUESTS_EVERY).await;
            }
        };
        if timer::timeout(FAREWELLS_WITHIN, farewells).await.is_err() {
            tracing::info!(clients = self.clients(), "not everybody has taken the farewell");
        }
    }

    /// For metrics.
    pub fn observe(&self) -> Observation {
        observed::observe(&self.world.see())
    }

    /// Until an operator wants the proxy to ask what the herd wants, and to look at its files.
    pub async fn reload_wanted(&self) -> Reload {
        self.world.reloads.next().await
    }

    /// Until an operator wants another node to be the primary.
    pub async fn promotion_wanted(&self) -> Promotion {
        self.world.promotions.next().await
    }

    /// Servers are replaced, each when its client gives it back: how they are reached is another way now.
    pub fn reconnect(&self) {
        self.world.pools.reconnect(None, &self.world);
    }

    pub fn pools(&self) -> Vec<(Name, Counts)> {
        self.world.pools.counts()
    }

    pub fn clients(&self) -> u64 {
        self.world.clients.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        let ended = |thread: JoinHandle<()>| {
            if thread.join().is_err() {
                tracing::error!("a worker has ended by a fault");
            }
        };
        self.workers.drain(..).for_each(ended);
        // Last, since whatever waits on a worker waits there.
        if let Some((thread, stop)) = self.keeper.take() {
            drop(stop);
            ended(thread);
        }
    }
}

impl Inherited {
    /// At this address, or at any port of it for whoever leads to the same.
    fn is_at(&self, wanted: SocketAddr, access: Access) -> bool {
        match wanted.port() {
            0 => self.access == access && self.address.ip() == wanted.ip(),
            _ => self.address == wanted,
        }
    }
}

/// A listener for each worker; all share the port that the first one was given.
fn bind_all(address: SocketAddr, workers: usize) -> io::Result<Vec<std::net::TcpListener>> {
    must_be_free(address)?;
    let first = bind(address)?;
    let address = first.local_addr()?;
    std::iter::once(Ok(first)).chain((1..workers).map(|_| bind(address))).collect()
}

/// Workers share a port, and by the same means another process of this user could share it unnoticed, and half of the
/// clients with it. So it must be free for somebody who does not share.
fn must_be_free(address: SocketAddr) -> io::Result<()> {
    Ok(rustix::net::bind(&socket(address)?, &address)?)
}

fn socket(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    Ok(socket)
}

/// Each worker has a queue of its own, and the kernel spreads the clients.
fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = socket(address)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn work(
    runtime: &Runtime,
    keeper: &Handle,
    listeners: Vec<(std::net::TcpListener, Access)>,
    worker: Worker,
    world: &Arc<World>,
    porter: &Porter,
    mut stopped: watch::Receiver<bool>,
) {
    timer::keep_at(keeper);
    runtime.block_on(async {
        for (listener, access) in listeners {
            match TcpListener::from_std(listener) {
                Ok(listener) => {
                    let door = Door { access, worker };
                    tokio::spawn(accept(listener, door, Arc::clone(world), porter.clone()));
                }
                Err(error) => tracing::error!(%error, "a worker cannot listen"),
            }
        }
        // Whoever could tell it otherwise is gone, too.
        let _stopped = stopped.wait_for(|stopped| *stopped).await;
    });
}

/// Until there is no door any more.
async fn accept(listener: TcpListener, door: Door, world: Arc<World>, mut porter: Porter) {
    loop {
        match porter.doors.wait_for(|doors| *doors != Doors::Shut).await.as_deref() {
            Ok(Doors::Open) => {}
            _ => return,
        }
        let _letting_in = porter.gate.read().await;
        accept_while_open(&listener, door, &world, &mut porter.doors).await;
    }
}

async fn accept_while_open(
    listener: &TcpListener,
    door: Door,
    world: &Arc<World>,
    doors: &mut watch::Receiver<Doors>,
) {
    while *doors.borrow_and_update() == Doors::Open {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // It is known when its sender is gone.
            changed = doors.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        match accepted {
            Ok((stream, from)) => welcome(stream, from, door, world),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                timer::sleep(BREATH).await;
            }
        }
    }
}

fn welcome(stream: TcpStream, from: SocketAddr, door: Door, world: &Arc<World>) {
    if let Err(error) = net::prepare(&stream) {
        tracing::debug!(%error, "a client was gone before it was there");
        return;
    }
    let here = Here::new(world);
    if here.number > world.settings.load().max_clients as u64 {
        world.ledger.no_entry(NoEntry::TooMany);
        tokio::spawn(async move {
            client::refuse(stream).await;
            drop(here);
        });
        return;
    }
    tokio::spawn(client::serve(stream, from, door, Arc::clone(world), here));
}

/// Counts a client for as long as it is there.
struct Here {
    world: Arc<World>,
    number: u64,
}

impl Here {
    fn new(world: &Arc<World>) -> Here {
        Here { world: Arc::clone(world), number: world.clients.fetch_add(1, Ordering::Relaxed) + 1 }
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        self.world.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Ends what has waited too long, and notices when a route has run out.
///
/// On a thread of its own, where all timers of the workers are, too: a worker without timers waits for its sockets without one, and
/// the kernel need not set one up and take it away each time.
async fn keep_in_step(world: Arc<World>) {
    let mut was_known = false;
    let mut period_ends = clock::now() + STATS_PERIOD;
    loop {
        timer::sleep(TICK).await;
        if clock::now() >= period_ends {
            period_ends = clock::now() + STATS_PERIOD;
            world.ledger.tidy();
            world.ledger.period(clock::now());
        }
        let known = matches!(world.fence.route(&Role::Primary), Route::To(..));
        let ran_out = world.fence.wake_at().is_some_and(|at| clock::now() >= at);
        if was_known != known || ran_out {
            // Sessions count by themselves how long they have waited.
            world.fence.look_again();
            world.pools.rerouted(&world);
        }
        was_known = known;
        world.pools.tick(&world);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::InClear;
    use crate::hba::Hba;

    fn start(address: SocketAddr) -> Result<Proxy, StartError> {
        let config = Config {
            listen: vec![(address, Access::ReadWrite)],
            workers: 2,
            server_tls: Arc::new(InClear),
            auth_query: AuthQuery {
                user: "pgherd_proxy".to_owned(),
                database: "postgres".to_owned(),
                secret_of: None,
            },
        };
        Proxy::start(config, Settings::new(Hba::default()))
    }

    #[test]
    fn two_proxies_never_share_a_port() {
        let first = start((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = first.addresses()[0];
        match start(address).map(|_| ()) {
            Err(StartError::Listen { address: at, source }) => {
                assert_eq!((at, source.kind()), (address, io::ErrorKind::AddrInUse));
            }
            other => panic!("{other:?}"),
        }
        drop(first);
        start(address).unwrap();
    }
}
