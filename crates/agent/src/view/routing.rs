//! The routing table for the proxies, and what is left of its proof.

use std::time::Duration;

use pgherd_api::routing::{Fork, MAX_FORKS, Proof, RoutingStandby, RoutingTable, RoutingTarget};
use pgherd_api::status::Gate;
use pgherd_core::spec::hba::{Connection, HbaLine};
use pgherd_core::spec::{NodeSpec, OptionValue, ProxyOption};
use pgherd_core::types::{Instant, Lsn, Term};

use super::{Sight, milliseconds, status};

/// A table, and when its proof began.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Routes {
    /// As of the moment of the picture. Hosts stand as the herd file has them.
    pub(crate) table: RoutingTable,
    pub(crate) proven: Instant,
    lease: Duration,
}

impl Routes {
    /// The table with what is left of its proof now; `None` once that has run out.
    pub(crate) fn table_at(mut self, now: Instant) -> Option<RoutingTable> {
        let left = self.lease.checked_sub(now.since(self.proven)).filter(|left| !left.is_zero())?;
        self.table.valid_for_ms = milliseconds(left);
        Some(self.table)
    }
}

/// `None` while nothing proves that the term is open, or nobody holds one.
///
/// The store's word is worth as much here as on the holder: it says that the term was open when it was asked.
/// The holder's heartbeat proves the same, to the holder alone.
pub(crate) fn routes(sight: &Sight<'_>, herd_id: &str) -> Option<Routes> {
    let (picture, record, cluster) = (sight.picture, sight.record()?, sight.cluster()?);
    let holder = &sight.reign()?.holder.node;
    let of_store = picture.confirmed.map(|at| (at, Proof::Store));
    let of_voters = picture.heartbeat.filter(|_| holder == sight.me()).map(|at| (at, Proof::Heartbeat));
    let (proven, proof) = match (of_store, of_voters) {
        (Some(store), Some(voters)) => {
            if voters.0 > store.0 {
                voters
            } else {
                store
            }
        }
        (proof, None) | (None, proof) => proof?,
    };
    let lease = picture.spec.times.lease;
    let left = lease.checked_sub(picture.now.since(proven))?;
    let gate_open = sight.gate_open();
    let max_lag = match cluster.proxy_option(ProxyOption::MaxReplayLag) {
        OptionValue::Time { ms } => ms,
        _ => None,
    };
    let keeps_up = |node: &NodeSpec| {
        let lag = sight.seen(&node.name).says.and_then(|says| says.show.replay_lag_ms);
        !matches!((lag, max_lag), (Some(lag), Some(max)) if lag > max)
    };
    let serves =
        |node: &&NodeSpec| node.read_weight > 0 && sight.in_read_pool(node) && sight.streams(&node.name);
    let by_socket = lets_clients_in_by_socket(&cluster.postgres.hba);
    // A long report may be what holds its replay up, and ends where it is.
    let weighed = |node| RoutingStandby {
        weight: if keeps_up(node) { u32::from(node.read_weight) } else { 0 },
        ..standby(sight, node, by_socket)
    };
    let standbys = cluster.nodes.iter().filter(serves);
    let table = RoutingTable {
        herd_id: herd_id.to_owned(),
        cluster: cluster.name.to_string(),
        term: record.term.0,
        gate: if gate_open { Gate::Open } else { Gate::Closed },
        primary: cluster.node(holder).filter(|_| gate_open).map(|node| target(sight, node, by_socket)),
        standbys: standbys.map(weighed).collect(),
        proof,
        valid_for_ms: milliseconds(left),
        drain: picture.drain.filter(|_| holder == sight.me()),
        forks: record.forks(sight.reign()?.timeline).take(MAX_FORKS).map(fork).collect(),
    };
    Some(Routes { table, proven, lease })
}

fn fork((term, lsn): (Term, Lsn)) -> Fork {
    Fork { term: term.0, lsn: lsn.to_string() }
}

fn target(sight: &Sight<'_>, node: &NodeSpec, by_socket: bool) -> RoutingTarget {
    let says = sight.seen(&node.name).says;
    RoutingTarget {
        node: node.name.to_string(),
        address: node.host.clone(),
        port: node.port,
        socket_dir: says.and_then(|says| says.show.socket_dir.clone()).filter(|_| by_socket),
    }
}

/// Does PostgreSQL believe anybody's password there? Else each client of a proxy would be refused first.
fn lets_clients_in_by_socket(hba: &[String]) -> bool {
    hba.iter()
        .filter_map(|line| HbaLine::parse(line, None).ok())
        .any(|line| line.connection == Connection::Local && matches!(line.method, "scram-sha-256" | "md5"))
}

fn standby<'a>(sight: &Sight<'a>, node: &'a NodeSpec, by_socket: bool) -> RoutingStandby {
    let seen = sight.seen(&node.name);
    RoutingStandby {
        target: target(sight, node, by_socket),
        replay_lsn: seen.says.and_then(|says| says.show.replay_lsn).map(|lsn| lsn.to_string()),
        lag_bytes: status::lag_bytes(sight, seen),
        weight: u32::from(node.read_weight),
    }
}
