//! A proxy that runs: listeners, workers, and what keeps them in step with the routes.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::client::{self, Door};
use crate::clock;
use crate::counts::NoEntry;
use crate::net::ServerTls;
use crate::observed::{self, Observation};
use crate::pool::{Counts, Worker};
use crate::pools::{Name, TICK};
use crate::routes::{Role, Route, Table};
use crate::verifiers::{AuthQuery, Verifiers};
use crate::world::{NoRandomness, Settings, World};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 4096;
/// After an accept that failed for want of descriptors or memory: those who leave must be noticed.
const BREATH: Duration = Duration::from_millis(50);
/// A drain takes as long as the last transaction, and clients wait for its end.
const LOOK_AT_DRAIN_EVERY: Duration = Duration::from_millis(2);

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

/// Ends when it is dropped, and its clients with it.
pub struct Proxy {
    world: Arc<World>,
    addresses: Vec<SocketAddr>,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// Listens, and lets clients wait until [`Proxy::learn`] has told where the primary is.
    pub fn start(config: Config, settings: Settings) -> Result<Proxy, StartError> {
        let Config { listen, workers, server_tls, auth_query } = config;
        let mut runtimes = Vec::new();
        for _ in 0..workers.max(1) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtimes.push(runtime.map_err(StartError::Worker)?);
        }
        let mut addresses = Vec::new();
        let mut listeners: Vec<Vec<(std::net::TcpListener, Access)>> =
            runtimes.iter().map(|_| Vec::new()).collect();
        for (address, access) in listen {
            let failed = |source| StartError::Listen { address, source };
            must_be_free(address).map_err(failed)?;
            let mut address = address;
            for listeners in &mut listeners {
                let listener = bind(address).map_err(failed)?;
                // The others share the port that the first one was given.
                address = listener.local_addr().map_err(failed)?;
                listeners.push((listener, access));
            }
            addresses.push(address);
        }
        let handles = runtimes.iter().map(|runtime| runtime.handle().clone()).collect();
        let world = Arc::new(World::new(settings, server_tls, Verifiers::new(auth_query)?, handles));
        // Nobody has set it before.
        world.listening.get_or_init(|| addresses.clone());
        let stop = watch::Sender::new(false);
        let mut threads = Vec::new();
        for (number, (runtime, listeners)) in (0_u16..).zip(runtimes.into_iter().zip(listeners)) {
            let (world, stopped) = (Arc::clone(&world), stop.subscribe());
            let thread = std::thread::Builder::new()
                .name(format!("worker {number}"))
                .spawn(move || work(&runtime, listeners, Worker(number), &world, stopped));
            threads.push(thread.map_err(StartError::Worker)?);
        }
        Ok(Proxy { world, addresses, stop, threads })
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
            tokio::time::sleep(LOOK_AT_DRAIN_EVERY).await;
        }
    }

    /// For those who come from now on; limits for all.
    pub fn replace(&self, settings: Settings) {
        let limits = settings.limits;
        self.world.settings.store(Arc::new(settings));
        self.world.fence.set_hold(limits.hold);
        self.world.pools.set_limits(limits, &self.world);
    }

    /// For metrics.
    pub fn observe(&self) -> Observation {
        observed::observe(&self.world.see())
    }

    /// Until an operator wants the proxy to ask what the herd wants.
    pub async fn reload_wanted(&self) {
        self.world.reload.notified().await;
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
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker has ended by a fault");
            }
        }
    }
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
    listeners: Vec<(std::net::TcpListener, Access)>,
    worker: Worker,
    world: &Arc<World>,
    mut stopped: watch::Receiver<bool>,
) {
    runtime.block_on(async {
        for (listener, access) in listeners {
            match TcpListener::from_std(listener) {
                Ok(listener) => {
                    tokio::spawn(accept(listener, Door { access, worker }, Arc::clone(world)));
                }
                Err(error) => tracing::error!(%error, "a worker cannot listen"),
            }
        }
        if worker == Worker(0) {
            tokio::spawn(keep_in_step(Arc::clone(world)));
        }
        // Whoever could tell it otherwise is gone, too.
        let _stopped = stopped.wait_for(|stopped| *stopped).await;
    });
}

/// For ever: there is nothing that a proxy could do better than listen.
async fn accept(listener: TcpListener, door: Door, world: Arc<World>) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => welcome(stream, from, door, &world),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

fn welcome(stream: TcpStream, from: SocketAddr, door: Door, world: &Arc<World>) {
    let set = || -> io::Result<()> {
        stream.set_nodelay(true)?;
        Ok(sockopt::set_socket_keepalive(&stream, true)?)
    };
    if let Err(error) = set() {
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
    let world = Arc::clone(world);
    tokio::spawn(async move {
        client::serve(stream, from, door, world).await;
        drop(here);
    });
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
async fn keep_in_step(world: Arc<World>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut was_known = false;
    let mut period_ends = clock::now() + STATS_PERIOD;
    loop {
        ticks.tick().await;
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
            auth_query: AuthQuery { user: "pgherd_proxy".to_owned(), database: "postgres".to_owned() },
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
