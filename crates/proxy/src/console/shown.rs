//! What there is to see of a proxy at one moment, and which table shows what of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use pgherd_core::types::Instant;

use super::command::Show;
use super::table::{Column, Table, Value, int4, text};
use super::{herd, pgbouncer, pgpool};
use crate::clock;
use crate::counts::{Events, Owner, Totals};
use crate::nodes::Known;
use crate::pool::{ClientId, Use};
use crate::pools::{Look, Paused};
use crate::roster::{Card, ServerCard};
use crate::routes::{Role, Route};
use crate::world::{Settings, World};

pub(super) static ONE: [Column; 1] = [int4("?column?")];

/// All of it.
pub(crate) struct Seen {
    pub(crate) now: Instant,
    pub(crate) at: SystemTime,
    pub(crate) started_at: SystemTime,
    pub(crate) pools: Vec<Look>,
    pub(crate) clients: Vec<Arc<Card>>,
    /// Clients that are coming in are among them.
    pub(crate) connected: u64,
    pub(crate) totals: BTreeMap<Owner, Totals>,
    /// What they were then.
    pub(crate) before: (Instant, BTreeMap<Owner, Totals>),
    pub(crate) events: Events,
    pub(crate) nodes: Known,
    /// Queries and transactions of each node.
    pub(crate) work: BTreeMap<pgherd_core::types::NodeName, (u64, u64)>,
    pub(crate) detached: BTreeSet<pgherd_core::types::NodeName>,
    pub(crate) primary: Route,
    pub(crate) paused: Paused,
    pub(crate) disabled: BTreeSet<String>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) listening: Vec<std::net::SocketAddr>,
}

impl World {
    pub(crate) fn see(&self) -> Seen {
        Seen {
            now: clock::now(),
            at: SystemTime::now(),
            started_at: self.started_at,
            pools: self.pools.look(),
            clients: self.roster.cards(),
            connected: self.clients.load(std::sync::atomic::Ordering::Relaxed),
            totals: self.ledger.totals(),
            before: self.ledger.before(self.started),
            events: self.ledger.events(),
            nodes: self.nodes.look(),
            work: self.ledger.nodes(),
            detached: self.fence.detached().clone(),
            primary: self.fence.route(&Role::Primary),
            paused: self.pools.paused().clone(),
            disabled: self.disabled().clone(),
            settings: self.settings.load_full(),
            listening: self.listening.get().cloned().unwrap_or_default(),
        }
    }
}

/// What a client is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    Active,
    Idle,
    Waiting { since: Instant },
}

/// A client with what the pools know of it.
pub(crate) struct Linked<'a> {
    pub(crate) card: &'a Card,
    pub(crate) doing: Doing,
    pub(crate) server: Option<&'a ServerCard>,
}

impl Seen {
    /// Clients, but those of the console.
    pub(crate) fn linked(&self) -> Vec<Linked<'_>> {
        let mut waiting: BTreeMap<ClientId, Instant> = BTreeMap::new();
        let mut lent: BTreeMap<ClientId, Option<&ServerCard>> = BTreeMap::new();
        for pool in &self.pools {
            waiting.extend(pool.waiting.iter().copied());
            for (doing, _, card) in &pool.servers {
                if let Use::Lent { to } = doing {
                    lent.insert(*to, card.as_deref());
                }
            }
        }
        let not_console = |card: &&Arc<Card>| !super::DATABASES.contains(&&*card.database);
        let link = |card: &'_ Arc<Card>| {
            let server = lent.get(&card.id).copied();
            let doing = match (waiting.get(&card.id), server) {
                (Some(since), _) => Doing::Waiting { since: *since },
                (None, Some(_)) => Doing::Active,
                (None, None) => Doing::Idle,
            };
            (doing, server.flatten())
        };
        let clients = self.clients.iter().filter(not_console);
        clients
            .map(|card| {
                let (doing, server) = link(card);
                Linked { card, doing, server }
            })
            .collect()
    }

    pub(super) fn since(&self, at: Instant) -> Duration {
        self.now.since(at)
    }

    /// A point of the boot clock as a time of day.
    pub(super) fn wall(&self, at: Instant) -> SystemTime {
        self.at.checked_sub(self.since(at)).unwrap_or(self.at)
    }
}

/// As PgBouncer writes it.
pub(super) fn zoned(at: SystemTime) -> Value {
    stamp(at, "%Y-%m-%d %H:%M:%S UTC")
}

/// As Pgpool-II writes it.
pub(super) fn plain(at: SystemTime) -> Value {
    stamp(at, "%Y-%m-%d %H:%M:%S")
}

fn stamp(at: SystemTime, format: &str) -> Value {
    Timestamp::try_from(at).map_or(Value::Null, |at| Value::Text(at.strftime(format).to_string()))
}

/// Its columns; `None`: it is told and no table.
pub(super) fn columns(show: Show) -> Option<&'static [Column]> {
    Some(match show {
        Show::Help => return None,
        Show::Version => &pgbouncer::VERSION,
        Show::Databases => &pgbouncer::DATABASES,
        Show::Pools => &pgbouncer::POOLS,
        Show::Clients | Show::Servers | Show::Sockets | Show::ActiveSockets => &pgbouncer::SOCKETS,
        Show::Stats => &pgbouncer::STATS,
        Show::StatsTotals => &pgbouncer::STATS_TOTALS,
        Show::StatsAverages => &pgbouncer::STATS_AVERAGES,
        Show::Totals => &pgbouncer::TOTALS,
        Show::Lists => &pgbouncer::LISTS,
        Show::Users => &pgbouncer::USERS,
        Show::Config => &pgbouncer::CONFIG,
        Show::State => &pgbouncer::STATE,
        Show::PoolNodes => &pgpool::NODES,
        Show::PoolVersion => &pgpool::VERSION,
        Show::PoolPools => &pgpool::POOLS,
        Show::PoolProcesses => &pgpool::PROCESSES,
        Show::PoolStatus => &pgpool::STATUS,
        Show::PoolBackendStats => &pgpool::BACKEND_STATS,
        Show::PoolHealthCheckStats => &pgpool::HEALTH_CHECK_STATS,
        Show::Pgherd => &herd::PGHERD,
        Show::Pins => &herd::PINS,
        Show::Events => &herd::EVENTS,
    })
}

pub(super) fn table(show: Show, seen: &Seen) -> Option<Table> {
    let rows = match show {
        Show::Help => return None,
        Show::Version => pgbouncer::version(),
        Show::Databases => pgbouncer::databases(seen),
        Show::Pools => pgbouncer::pools(seen),
        Show::Clients => pgbouncer::clients(seen),
        Show::Servers => pgbouncer::servers(seen),
        Show::Sockets => pgbouncer::sockets(seen, false),
        Show::ActiveSockets => pgbouncer::sockets(seen, true),
        Show::Stats => pgbouncer::stats(seen, true, true),
        Show::StatsTotals => pgbouncer::stats(seen, true, false),
        Show::StatsAverages => pgbouncer::stats(seen, false, true),
        Show::Totals => pgbouncer::totals(seen),
        Show::Lists => pgbouncer::lists(seen),
        Show::Users => pgbouncer::users(seen),
        Show::Config => pgbouncer::config(seen),
        Show::State => pgbouncer::state(seen),
        Show::PoolNodes => pgpool::nodes(seen),
        Show::PoolVersion => pgpool::version(),
        Show::PoolPools => pgpool::pools(seen),
        Show::PoolProcesses => pgpool::processes(seen),
        Show::PoolStatus => pgpool::status(seen),
        Show::PoolBackendStats => pgpool::backend_stats(seen),
        Show::PoolHealthCheckStats => pgpool::health_check_stats(seen),
        Show::Pgherd => herd::pgherd(seen),
        Show::Pins => herd::pins(seen),
        Show::Events => herd::events(seen),
    };
    Some(Table { columns: columns(show)?, rows })
}

/// The one column of a setting is called as it is.
pub(super) fn setting_column(name: &str) -> &'static [Column] {
    static COLUMNS: [[Column; 1]; 12] = [
        [text("client_encoding")],
        [text("datestyle")],
        [text("default_transaction_isolation")],
        [text("default_transaction_read_only")],
        [text("extra_float_digits")],
        [text("in_hot_standby")],
        [text("integer_datetimes")],
        [text("server_version")],
        [text("standard_conforming_strings")],
        [text("timezone")],
        [text("transaction_isolation")],
        [text("transaction_read_only")],
    ];
    COLUMNS.iter().find(|[column]| column.name == name).unwrap_or(&COLUMNS[0])
}
