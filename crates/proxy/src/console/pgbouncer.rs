//! PgBouncer's tables, with the columns and types of its version 1.25.
//!
//! What a proxy of a herd does not have (reserved servers, name servers, servers that are tested) is 0, as in a PgBouncer that
//! has none either; what it does not know is NULL.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use pgherd_pgwire::startup::Replication;

use super::shown::{Doing, Linked, Seen, zoned};
use super::table::{Column, Value, int4, numeric, text};
use crate::counts::{Owner, Totals};
use crate::hba::Hba;
use crate::pool::Use;
use crate::pools::Look;
use crate::roster::ServerCard;
use crate::routes::Route;
use crate::world::{PoolMode, Settings};

pub(super) static VERSION: [Column; 1] = [text("version")];
pub(super) static DATABASES: [Column; 17] = [
    text("name"),
    text("host"),
    int4("port"),
    text("database"),
    text("force_user"),
    int4("pool_size"),
    int4("min_pool_size"),
    int4("reserve_pool_size"),
    int4("server_lifetime"),
    text("pool_mode"),
    text("load_balance_hosts"),
    int4("max_connections"),
    int4("current_connections"),
    int4("max_client_connections"),
    int4("current_client_connections"),
    int4("paused"),
    int4("disabled"),
];
pub(super) static POOLS: [Column; 17] = [
    text("database"),
    text("user"),
    int4("cl_active"),
    int4("cl_waiting"),
    int4("cl_active_cancel_req"),
    int4("cl_waiting_cancel_req"),
    int4("sv_active"),
    int4("sv_active_cancel"),
    int4("sv_being_canceled"),
    int4("sv_idle"),
    int4("sv_used"),
    int4("sv_tested"),
    int4("sv_login"),
    int4("maxwait"),
    int4("maxwait_us"),
    text("pool_mode"),
    text("load_balance_hosts"),
];
pub(super) static SOCKETS: [Column; 21] = [
    text("type"),
    text("user"),
    text("database"),
    text("replication"),
    text("state"),
    text("addr"),
    int4("port"),
    text("local_addr"),
    int4("local_port"),
    text("connect_time"),
    text("request_time"),
    int4("wait"),
    int4("wait_us"),
    int4("close_needed"),
    text("ptr"),
    text("link"),
    int4("remote_pid"),
    text("tls"),
    text("application_name"),
    int4("prepared_statements"),
    int4("id"),
];
pub(super) static STATS: [Column; 23] = [
    text("database"),
    numeric("total_server_assignment_count"),
    numeric("total_xact_count"),
    numeric("total_query_count"),
    numeric("total_received"),
    numeric("total_sent"),
    numeric("total_xact_time"),
    numeric("total_query_time"),
    numeric("total_wait_time"),
    numeric("total_client_parse_count"),
    numeric("total_server_parse_count"),
    numeric("total_bind_count"),
    numeric("avg_server_assignment_count"),
    numeric("avg_xact_count"),
    numeric("avg_query_count"),
    numeric("avg_recv"),
    numeric("avg_sent"),
    numeric("avg_xact_time"),
    numeric("avg_query_time"),
    numeric("avg_wait_time"),
    numeric("avg_client_parse_count"),
    numeric("avg_server_parse_count"),
    numeric("avg_bind_count"),
];
pub(super) static STATS_TOTALS: [Column; 12] = [
    text("database"),
    numeric("server_assignment_count"),
    numeric("xact_count"),
    numeric("query_count"),
    numeric("bytes_received"),
    numeric("bytes_sent"),
    numeric("xact_time"),
    numeric("query_time"),
    numeric("wait_time"),
    numeric("client_parse_count"),
    numeric("server_parse_count"),
    numeric("bind_count"),
];
pub(super) static STATS_AVERAGES: [Column; 12] = [
    text("database"),
    numeric("server_assignment_count"),
    numeric("xact_count"),
    numeric("query_count"),
    numeric("bytes_received"),
    numeric("bytes_sent"),
    numeric("xact_time"),
    numeric("query_time"),
    numeric("wait_time"),
    numeric("avg_client_parse_count"),
    numeric("avg_server_parse_count"),
    numeric("avg_bind_count"),
];
pub(super) static TOTALS: [Column; 2] = [text("name"), numeric("value")];
pub(super) static LISTS: [Column; 2] = [text("list"), int4("items")];
pub(super) static USERS: [Column; 8] = [
    text("name"),
    text("pool_size"),
    text("reserve_pool_size"),
    text("pool_mode"),
    int4("max_user_connections"),
    int4("current_connections"),
    int4("max_user_client_connections"),
    int4("current_client_connections"),
];
pub(super) static CONFIG: [Column; 4] = [text("key"), text("value"), text("default"), text("changeable")];
pub(super) static STATE: [Column; 2] = [text("key"), text("value")];

type Rows = Vec<Vec<Value>>;

const ZERO: Value = Value::Number(0);

/// The first number in it is what programs take for PgBouncer's version, and so for what its tables have.
pub(super) fn version() -> Rows {
    vec![vec![concat!("PgBouncer 1.25.0 as spoken by pgherd ", env!("CARGO_PKG_VERSION")).into()]]
}

pub(super) fn mode(mode: PoolMode) -> &'static str {
    match mode {
        PoolMode::Session => "session",
        PoolMode::Transaction => "transaction",
        PoolMode::Statement => "statement",
    }
}

/// Those that were heard of: the proxy has no list of them.
fn database_names(seen: &Seen) -> BTreeSet<&str> {
    let pools = seen.pools.iter().map(|pool| pool.name.database.as_str());
    let counted = seen.totals.keys().map(|(database, _)| database.as_str());
    let named = seen.settings.pooling.databases.keys().map(String::as_str);
    let barred = seen.paused.databases.iter().chain(&seen.disabled).map(String::as_str);
    pools.chain(counted).chain(named).chain(barred).collect()
}

fn servers_of<'a>(pools: impl Iterator<Item = &'a Look>) -> usize {
    pools.map(|pool| pool.servers.len()).sum()
}

pub(super) fn databases(seen: &Seen) -> Rows {
    let clients = seen.linked();
    let target = match &seen.primary {
        Route::To(_, target) => Some(target),
        Route::Hold(_) => None,
    };
    let limits = &seen.settings.limits;
    let row = |name: &str| {
        vec![
            name.into(),
            target.map(|target| target.address.to_string()).into(),
            target.map(|target| target.port).into(),
            name.into(),
            Value::Null,
            limits.size.into(),
            ZERO,
            ZERO,
            limits.server_lifetime.as_secs().into(),
            seen.settings.pooling.databases.get(name).map(|pool| mode(*pool)).into(),
            Value::Null,
            ZERO,
            servers_of(seen.pools.iter().filter(|pool| pool.name.database == name)).into(),
            ZERO,
            clients.iter().filter(|client| &*client.card.database == name).count().into(),
            seen.paused.has(name).into(),
            seen.disabled.contains(name).into(),
        ]
    };
    database_names(seen).into_iter().map(row).collect()
}

#[derive(Default)]
struct PoolRow {
    clients: usize,
    waiting: usize,
    lent: u32,
    idle: u32,
    opening: u32,
    max_wait: Duration,
}

/// One row for each database and user, wherever their servers are.
pub(super) fn pools(seen: &Seen) -> Rows {
    let mut rows: BTreeMap<(&str, &str), PoolRow> = BTreeMap::new();
    for pool in &seen.pools {
        let row = rows.entry((&pool.name.database, &pool.name.user)).or_default();
        row.lent += pool.counts.lent;
        row.idle += pool.counts.idle;
        row.opening += pool.counts.opening;
        row.max_wait = row.max_wait.max(pool.counts.max_wait);
    }
    for client in seen.linked() {
        let Linked { card, doing, .. } = client;
        let row = rows.entry((&card.database, &card.user)).or_default();
        match doing {
            Doing::Waiting { .. } => row.waiting += 1,
            Doing::Active | Doing::Idle => row.clients += 1,
        }
    }
    let row = |((database, user), row): ((&str, &str), PoolRow)| {
        vec![
            database.into(),
            user.into(),
            row.clients.into(),
            row.waiting.into(),
            ZERO,
            ZERO,
            row.lent.into(),
            ZERO,
            ZERO,
            row.idle.into(),
            ZERO,
            ZERO,
            row.opening.into(),
            row.max_wait.as_secs().into(),
            row.max_wait.subsec_micros().into(),
            mode(seen.settings.pooling.of(database, user)).into(),
            Value::Null,
        ]
    };
    rows.into_iter().map(row).collect()
}

fn replication(replication: Replication) -> &'static str {
    match replication {
        Replication::Off => "none",
        Replication::Physical => "physical",
        Replication::Logical => "logical",
    }
}

fn ip_and_port(address: Option<SocketAddr>) -> [Value; 2] {
    match address {
        Some(address) => [address.ip().to_canonical().to_string().into(), address.port().into()],
        None => ["unix".into(), ZERO],
    }
}

fn tls(is_encrypted: bool) -> Value {
    if is_encrypted { "TLS" } else { "" }.into()
}

fn client_row(seen: &Seen, client: &Linked<'_>, state: &str) -> Vec<Value> {
    let Linked { card, doing, server } = client;
    let waited = match doing {
        Doing::Waiting { since } => seen.since(*since),
        Doing::Active | Doing::Idle => Duration::ZERO,
    };
    let [addr, port] = ip_and_port(Some(card.address));
    let [local_addr, local_port] = ip_and_port(Some(card.local));
    vec![
        "C".into(),
        (*card.user).into(),
        (*card.database).into(),
        replication(card.replication).into(),
        state.into(),
        addr,
        port,
        local_addr,
        local_port,
        zoned(card.came_at),
        zoned(card.last_asked().map_or(card.came_at, |at| seen.wall(at))),
        waited.as_secs().into(),
        waited.subsec_micros().into(),
        ZERO,
        format!("c{}", card.id.0).into(),
        server.map_or_else(String::new, |server| format!("s{}", server.number)).into(),
        ZERO,
        tls(card.is_encrypted),
        (*card.application_name).into(),
        card.statements.get().into(),
        card.id.0.into(),
    ]
}

fn client_state(client: &Linked<'_>) -> &'static str {
    match client.doing {
        Doing::Waiting { .. } => "waiting",
        Doing::Active => "active",
        // A walsender has a server that is of no pool.
        Doing::Idle if client.card.replication != Replication::Off => "active",
        Doing::Idle => "idle",
    }
}

pub(super) fn clients(seen: &Seen) -> Rows {
    seen.linked().iter().map(|client| client_row(seen, client, client_state(client))).collect()
}

fn server_state(doing: Use) -> Option<&'static str> {
    match doing {
        Use::Opening => Some("new"),
        Use::Idle => Some("idle"),
        Use::Lent { .. } => Some("active"),
        Use::Closing => None,
    }
}

fn server_row(
    seen: &Seen,
    pool: &Look,
    doing: Use,
    is_outdated: bool,
    card: Option<&ServerCard>,
    state: &str,
) -> Vec<Value> {
    let client = match doing {
        Use::Lent { to } => seen.clients.iter().find(|card| card.id == to),
        _ => None,
    };
    let [addr, port, local_addr, local_port] = match card {
        Some(card) => {
            let ([addr, port], [local_addr, local_port]) =
                (ip_and_port(card.address), ip_and_port(card.local));
            [addr, port, local_addr, local_port]
        }
        None => [Value::Null, Value::Null, Value::Null, Value::Null],
    };
    let asked = client.and_then(|client| client.last_asked()).map(|at| seen.wall(at));
    vec![
        "S".into(),
        pool.name.user.clone().into(),
        pool.name.database.clone().into(),
        "none".into(),
        state.into(),
        addr,
        port,
        local_addr,
        local_port,
        card.map_or(Value::Null, |card| zoned(card.opened_at)),
        asked.map_or(Value::Null, zoned),
        ZERO,
        ZERO,
        is_outdated.into(),
        card.map(|card| format!("s{}", card.number)).into(),
        client.map_or_else(String::new, |client| format!("c{}", client.id.0)).into(),
        card.map(|card| card.pid).into(),
        tls(card.is_some_and(|card| card.is_encrypted)),
        client.map_or("", |client| &client.application_name).into(),
        card.and_then(|card| card.statements.get()).into(),
        card.map(|card| card.number).into(),
    ]
}

pub(super) fn servers(seen: &Seen) -> Rows {
    let mut rows = Vec::new();
    for pool in &seen.pools {
        for (doing, is_outdated, card) in &pool.servers {
            if let Some(state) = server_state(*doing) {
                rows.push(server_row(seen, pool, *doing, *is_outdated, card.as_deref(), state));
            }
        }
    }
    rows
}

/// What both show, in PgBouncer's other words. `active`: those on which something is under way.
pub(super) fn sockets(seen: &Seen, active: bool) -> Rows {
    let mut rows = Vec::new();
    for client in seen.linked() {
        let state = match client.doing {
            Doing::Waiting { .. } => "cl_waiting",
            Doing::Active | Doing::Idle => "cl_active",
        };
        if !active || client.doing != Doing::Idle {
            rows.push(client_row(seen, &client, state));
        }
    }
    for pool in &seen.pools {
        for (doing, is_outdated, card) in &pool.servers {
            let state = match doing {
                Use::Opening => "sv_login",
                Use::Idle if active => continue,
                Use::Idle => "sv_idle",
                Use::Lent { .. } => "sv_active",
                Use::Closing => continue,
            };
            rows.push(server_row(seen, pool, *doing, *is_outdated, card.as_deref(), state));
        }
    }
    rows
}

/// In the order of the columns.
fn numbers(totals: &Totals) -> [u64; 11] {
    [
        totals.wait_time.count(),
        totals.transaction_time.count(),
        totals.queries,
        totals.received_bytes,
        totals.sent_bytes,
        totals.transaction_time.sum_us,
        totals.query_us,
        totals.wait_time.sum_us,
        totals.parses,
        totals.server_parses,
        totals.binds,
    ]
}

/// Each second; of times, each of what took them.
fn averages(totals: &Totals, before: &Totals, period: Duration) -> [u64; 11] {
    let (is, was) = (numbers(totals), numbers(before));
    let more: [u64; 11] = std::array::from_fn(|at| is[at].saturating_sub(was[at]));
    let us = period.as_micros().max(1);
    std::array::from_fn(|at| match at {
        5 => more[5] / more[1].max(1),
        6 => more[6] / more[2].max(1),
        7 => more[7] / more[0].max(1),
        _ => u64::try_from(u128::from(more[at]) * 1_000_000 / us).unwrap_or(u64::MAX),
    })
}

/// Of each database, what it is and what it was.
fn by_database(seen: &Seen) -> BTreeMap<&str, (Totals, Totals)> {
    let mut databases: BTreeMap<&str, (Totals, Totals)> = BTreeMap::new();
    let both =
        |owners: &BTreeMap<Owner, Totals>, owner: &Owner| owners.get(owner).cloned().unwrap_or_default();
    for (owner, totals) in &seen.totals {
        let (is, was) = databases.entry(&owner.0).or_default();
        is.add(totals);
        was.add(&both(&seen.before.1, owner));
    }
    databases
}

pub(super) fn stats(seen: &Seen, with_totals: bool, with_averages: bool) -> Rows {
    let period = seen.since(seen.before.0);
    let row = |(database, (is, was)): (&str, (Totals, Totals))| {
        let totals = numbers(&is).into_iter().filter(|_| with_totals);
        let averages = averages(&is, &was, period).into_iter().filter(|_| with_averages);
        let first = Value::from(database);
        std::iter::once(first).chain(totals.chain(averages).map(Value::Number)).collect()
    };
    by_database(seen).into_iter().map(row).collect()
}

pub(super) fn totals(seen: &Seen) -> Rows {
    const NAMES: [&str; 11] = [
        "server_assignment_count",
        "xact_count",
        "query_count",
        "client_bytes",
        "server_bytes",
        "xact_time",
        "query_time",
        "wait_time",
        "ps_client_parse_count",
        "ps_server_parse_count",
        "ps_bind_count",
    ];
    let (mut is, mut was) = (Totals::default(), Totals::default());
    for (one, other) in by_database(seen).values() {
        is.add(one);
        was.add(other);
    }
    let rows = |prefix: &'static str, numbers: [u64; 11]| {
        let row = move |(name, number): (&str, u64)| vec![format!("{prefix}_{name}").into(), number.into()];
        NAMES.into_iter().zip(numbers).map(row)
    };
    let averages = averages(&is, &was, seen.since(seen.before.0));
    rows("total", numbers(&is)).chain(rows("avg", averages)).collect()
}

pub(super) fn lists(seen: &Seen) -> Rows {
    let clients = seen.clients.len();
    let connected = usize::try_from(seen.connected).unwrap_or(usize::MAX);
    let pools: BTreeSet<_> = seen.pools.iter().map(|pool| (&pool.name.database, &pool.name.user)).collect();
    [
        ("databases", database_names(seen).len()),
        ("users", user_names(seen).len()),
        ("peers", 0),
        ("pools", pools.len()),
        ("peer_pools", 0),
        ("free_clients", 0),
        ("used_clients", clients),
        ("login_clients", connected.saturating_sub(clients)),
        ("free_servers", 0),
        ("used_servers", servers_of(seen.pools.iter())),
        ("dns_names", 0),
        ("dns_zones", 0),
        ("dns_queries", 0),
        ("dns_pending", 0),
    ]
    .map(|(list, items)| vec![list.into(), items.into()])
    .to_vec()
}

fn user_names(seen: &Seen) -> BTreeSet<&str> {
    let here = seen.clients.iter().map(|client| &*client.user);
    let counted = seen.totals.keys().map(|(_, user)| user.as_str());
    here.chain(counted).chain(seen.settings.pooling.users.keys().map(String::as_str)).collect()
}

pub(super) fn users(seen: &Seen) -> Rows {
    let row = |user: &str| {
        vec![
            user.into(),
            "".into(),
            "".into(),
            seen.settings.pooling.users.get(user).map(|pool| mode(*pool)).into(),
            ZERO,
            servers_of(seen.pools.iter().filter(|pool| pool.name.user == user)).into(),
            ZERO,
            seen.clients.iter().filter(|client| &*client.user == user).count().into(),
        ]
    };
    user_names(seen).into_iter().map(row).collect()
}

/// Under PgBouncer's names, as far as it has one for it.
pub(super) fn settings(settings: &Settings) -> Vec<(&'static str, String, bool)> {
    let names = |names: &BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>().join(", ");
    let seconds = |time: Duration| time.as_secs().to_string();
    let never = |time: Option<Duration>| seconds(time.unwrap_or_default());
    let most = |most: Option<usize>| most.unwrap_or_default().to_string();
    let (limits, reads, timeouts) = (&settings.limits, settings.reads, settings.timeouts);
    vec![
        ("admin_users", names(&settings.console.admins), true),
        ("client_idle_timeout", never(timeouts.idle), true),
        ("client_login_timeout", seconds(settings.login_timeout), true),
        ("client_tls_sslmode", settings.client_mode.to_string(), true),
        ("commit_check", settings.checks_commits.to_string(), true),
        ("default_pool_size", limits.size.to_string(), true),
        ("failover_hold", seconds(limits.hold), true),
        ("idle_transaction_timeout", never(timeouts.idle_transaction), true),
        ("max_client_conn", settings.max_clients.to_string(), true),
        ("max_db_client_connections", most(settings.max_database_clients), true),
        ("max_prepared_statements", crate::backend::MOST_STATEMENTS.to_string(), false),
        ("max_user_client_connections", most(settings.max_user_clients), true),
        ("md5_passwords", settings.md5_passwords.to_string(), true),
        ("pool_mode", mode(settings.pooling.mode).to_owned(), true),
        ("query_timeout", never(timeouts.query), true),
        ("query_wait_timeout", seconds(limits.query_wait), true),
        ("read_wait_ms", reads.wait.as_millis().to_string(), true),
        ("read_your_writes", reads.your_writes.to_string(), true),
        ("server_idle_timeout", seconds(limits.server_idle), true),
        ("server_lifetime", seconds(limits.server_lifetime), true),
        ("server_tls_sslmode", settings.server_mode.to_string(), true),
        ("split_reads", reads.split.to_string(), true),
        ("stats_period", crate::proxy::STATS_PERIOD.as_secs().to_string(), false),
        ("stats_users", names(&settings.console.readers), true),
        ("transaction_timeout", never(timeouts.transaction), true),
    ]
}

/// `changeable`: by the herd file, and not here.
pub(super) fn config(seen: &Seen) -> Rows {
    let defaults = settings(&Settings::new(Hba::default()));
    let mut rows: Rows = settings(&seen.settings)
        .into_iter()
        .zip(defaults)
        .map(|((key, value, changeable), (_, default, _))| {
            vec![key.into(), value.into(), default.into(), if changeable { "yes" } else { "no" }.into()]
        })
        .collect();
    for (key, address) in ["listen_read_write", "listen_read_only"].into_iter().zip(&seen.listening) {
        rows.push(vec![key.into(), address.to_string().into(), Value::Null, "no".into()]);
    }
    rows
}

pub(super) fn state(seen: &Seen) -> Rows {
    let yes = |so: bool| if so { "yes" } else { "no" };
    [("active", !seen.paused.all), ("paused", seen.paused.all), ("suspended", false)]
        .map(|(key, so)| vec![key.into(), yes(so).into()])
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_rates_and_times_are_of_what_took_them() {
        let mut totals = Totals { queries: 30, query_us: 3_000, received_bytes: 600, ..Totals::default() };
        totals.transaction_time.buckets[0] = 10;
        totals.transaction_time.sum_us = 5_000;
        totals.wait_time.buckets[0] = 4;
        totals.wait_time.sum_us = 8;
        let averages = averages(&totals, &Totals::default(), Duration::from_secs(2));
        assert_eq!(averages, [2, 5, 15, 300, 0, 500, 100, 2, 0, 0, 0]);
        assert_eq!(super::averages(&totals, &totals, Duration::from_secs(2)), [0; 11]);
        assert_eq!(super::averages(&totals, &totals, Duration::ZERO), [0; 11], "no time has passed");
    }
}
