//! Pgpool-II's tables, with the columns of its version 4.7.
//!
//! Its nodes are the herd's, numbered in the order of their names. What the herd's agents know and a routing table does not say
//! (how far a standby lags, how it is replicated, how often it was probed) is NULL here, and in `pgherd status`.

use std::net::IpAddr;

use pgherd_core::types::NodeName;

use super::pgbouncer;
use super::shown::{Doing, Seen, plain};
use super::table::{Column, Value, text};
use crate::nodes::{Node, Role};
use crate::pool::Use;

pub(super) static VERSION: [Column; 1] = [text("pool_version")];
pub(super) static NODES: [Column; 14] = [
    text("node_id"),
    text("hostname"),
    text("port"),
    text("status"),
    text("pg_status"),
    text("lb_weight"),
    text("role"),
    text("pg_role"),
    text("select_cnt"),
    text("load_balance_node"),
    text("replication_delay"),
    text("replication_state"),
    text("replication_sync_state"),
    text("last_status_change"),
];
pub(super) static POOLS: [Column; 17] = [
    text("pool_pid"),
    text("start_time"),
    text("client_connection_count"),
    text("pool_id"),
    text("backend_id"),
    text("database"),
    text("username"),
    text("backend_connection_time"),
    text("client_connection_time"),
    text("client_disconnection_time"),
    text("client_idle_duration"),
    text("majorversion"),
    text("minorversion"),
    text("pool_counter"),
    text("pool_backendpid"),
    text("pool_connected"),
    text("status"),
];
pub(super) static PROCESSES: [Column; 8] = [
    text("pool_pid"),
    text("start_time"),
    text("client_connection_count"),
    text("database"),
    text("username"),
    text("backend_connection_time"),
    text("pool_counter"),
    text("status"),
];
pub(super) static STATUS: [Column; 3] = [text("item"), text("value"), text("description")];
pub(super) static BACKEND_STATS: [Column; 14] = [
    text("node_id"),
    text("hostname"),
    text("port"),
    text("status"),
    text("role"),
    text("select_cnt"),
    text("insert_cnt"),
    text("update_cnt"),
    text("delete_cnt"),
    text("ddl_cnt"),
    text("other_cnt"),
    text("panic_cnt"),
    text("fatal_cnt"),
    text("error_cnt"),
];
pub(super) static HEALTH_CHECK_STATS: [Column; 20] = [
    text("node_id"),
    text("hostname"),
    text("port"),
    text("status"),
    text("role"),
    text("last_status_change"),
    text("total_count"),
    text("success_count"),
    text("fail_count"),
    text("skip_count"),
    text("retry_count"),
    text("average_retry_count"),
    text("max_retry_count"),
    text("max_duration"),
    text("min_duration"),
    text("average_duration"),
    text("last_health_check"),
    text("last_successful_health_check"),
    text("last_skip_health_check"),
    text("last_failed_health_check"),
];

type Rows = Vec<Vec<Value>>;

pub(super) fn version() -> Rows {
    vec![vec![concat!("4.7 (pgherd ", env!("CARGO_PKG_VERSION"), ")").into()]]
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Standby => "standby",
        Role::Away => "unknown",
    }
}

struct Numbered<'a> {
    id: usize,
    name: &'a NodeName,
    node: &'a Node,
    /// An operator has detached it.
    is_detached: bool,
    /// The proxy has servers there.
    is_used: bool,
}

impl Numbered<'_> {
    /// Pgpool's opinion: what is sent there, and whether there are connections.
    fn status(&self) -> &'static str {
        match self.node.role {
            Role::Away => "down",
            _ if self.is_detached => "down",
            _ if self.is_used => "up",
            _ => "waiting",
        }
    }

    fn takes_reads(&self) -> bool {
        self.node.role == Role::Standby && !self.is_detached
    }
}

fn numbered(seen: &Seen) -> Vec<Numbered<'_>> {
    let is_used = |name: &NodeName| {
        let mut cards =
            seen.pools.iter().flat_map(|pool| &pool.servers).filter_map(|(_, _, card)| card.as_ref());
        cards.any(|card| card.place.node == *name)
    };
    let nodes = seen.nodes.nodes.iter().enumerate();
    nodes
        .map(|(id, (name, node))| Numbered {
            id,
            name,
            node,
            is_detached: seen.detached.contains(name),
            is_used: is_used(name),
        })
        .collect()
}

fn host(address: IpAddr) -> Value {
    address.to_string().into()
}

/// Which node is meant by a name, or by a number of these tables.
pub(super) fn find(seen: &Seen, text: &str) -> Option<(NodeName, Node)> {
    let number: Option<usize> = text.parse().ok();
    let mut nodes = seen.nodes.nodes.iter().enumerate();
    let found = nodes.find(|(id, (name, _))| name.as_str() == text || Some(*id) == number);
    found.map(|(_, (name, node))| (name.clone(), node.clone()))
}

/// `select_cnt` counts queries of any kind: the proxy does not read what it passes on.
pub(super) fn nodes(seen: &Seen) -> Rows {
    let nodes = numbered(seen);
    let readers = nodes.iter().filter(|node| node.takes_reads());
    let total: u64 = readers.map(|node| u64::from(node.node.weight)).sum();
    let row = |node: &Numbered<'_>| {
        // Where there is no standby the primary takes the reads.
        let (takes_reads, weight) = match total {
            0 => (node.node.role == Role::Primary, 1.0),
            total => (node.takes_reads(), f64::from(node.node.weight) / total as f64),
        };
        let weight = if takes_reads { weight } else { 0.0 };
        let (queries, _) = seen.work.get(node.name).copied().unwrap_or_default();
        vec![
            node.id.into(),
            host(node.node.address),
            node.node.port.into(),
            node.status().into(),
            if node.node.role == Role::Away { "unknown" } else { "up" }.into(),
            format!("{weight:.6}").into(),
            role(node.node.role).into(),
            role(node.node.role).into(),
            queries.into(),
            if takes_reads { "true" } else { "false" }.into(),
            if node.node.role == Role::Primary { "0".into() } else { Value::Null },
            Value::Null,
            Value::Null,
            plain(node.node.since),
        ]
    };
    nodes.iter().map(row).collect()
}

pub(super) fn backend_stats(seen: &Seen) -> Rows {
    let row = |node: Numbered<'_>| {
        let (queries, _) = seen.work.get(node.name).copied().unwrap_or_default();
        let mut row = vec![
            node.id.into(),
            host(node.node.address),
            node.node.port.into(),
            node.status().into(),
            role(node.node.role).into(),
        ];
        // What kind they are of is not known.
        row.resize(BACKEND_STATS.len(), Value::Null);
        row[10] = queries.into();
        row
    };
    numbered(seen).into_iter().map(row).collect()
}

pub(super) fn health_check_stats(seen: &Seen) -> Rows {
    let row = |node: Numbered<'_>| {
        let mut row = vec![
            node.id.into(),
            host(node.node.address),
            node.node.port.into(),
            node.status().into(),
            role(node.node.role).into(),
            plain(node.node.since),
        ];
        // The agents check, and no proxy does.
        row.resize(HEALTH_CHECK_STATS.len(), Value::Null);
        row
    };
    numbered(seen).into_iter().map(row).collect()
}

fn pid() -> Value {
    std::process::id().into()
}

/// One row for each server: all are of one process.
pub(super) fn pools(seen: &Seen) -> Rows {
    let nodes = numbered(seen);
    let mut rows = Vec::new();
    for (id, pool) in seen.pools.iter().enumerate() {
        for (doing, _, card) in &pool.servers {
            let Some(card) = card else { continue };
            let is_lent = matches!(doing, Use::Lent { .. });
            rows.push(vec![
                pid(),
                plain(seen.started_at),
                Value::Null,
                id.into(),
                nodes.iter().find(|node| *node.name == card.place.node).map(|node| node.id).into(),
                pool.name.database.clone().into(),
                pool.name.user.clone().into(),
                plain(card.opened_at),
                Value::Null,
                Value::Null,
                Value::Null,
                "3".into(),
                "0".into(),
                Value::Null,
                card.pid.into(),
                is_lent.into(),
                if is_lent { "Execute command" } else { "Idle" }.into(),
            ]);
        }
    }
    rows
}

/// One row for each client, where Pgpool-II has a process.
pub(super) fn processes(seen: &Seen) -> Rows {
    let row = |client: super::shown::Linked<'_>| {
        vec![
            pid(),
            plain(seen.started_at),
            Value::Null,
            (*client.card.database).into(),
            (*client.card.user).into(),
            plain(client.card.came_at),
            Value::Null,
            match client.doing {
                Doing::Idle => "Idle",
                Doing::Active => "Execute command",
                Doing::Waiting { .. } => "Wait for connection",
            }
            .into(),
        ]
    };
    seen.linked().into_iter().map(row).collect()
}

pub(super) fn status(seen: &Seen) -> Rows {
    let mut rows: Rows = Vec::new();
    for node in numbered(seen) {
        let mut backend = |key: &str, value: Value, description: &str| {
            rows.push(vec![format!("backend_{key}{}", node.id).into(), value, description.into()]);
        };
        backend("hostname", host(node.node.address), "address of this node");
        backend("port", node.node.port.into(), "port of this node");
        backend("application_name", node.name.as_str().into(), "name of this node");
    }
    for (key, value, _) in pgbouncer::settings(&seen.settings) {
        rows.push(vec![key.into(), value.into(), "as in SHOW CONFIG".into()]);
    }
    rows
}
