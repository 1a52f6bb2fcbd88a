//! The nodes that were heard of, for whoever shows them.
//!
//! A routing table says who may be used now. Somebody who looks wants to see the others as well, and since when it is so;
//! that is remembered here, for as long as the proxy runs. Nothing is decided by it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use pgherd_core::types::{Instant, NodeName};

use crate::routes::{Table, Target};

#[derive(Debug, Default)]
pub(crate) struct Nodes {
    known: Mutex<Known>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// In the order of their names, which is that of their numbers in tables.
    pub(crate) nodes: BTreeMap<NodeName, Node>,
    /// The last table, and when it came.
    pub(crate) table: Option<(Table, Instant)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) role: Role,
    /// Its share of the reads, beside those of the others.
    pub(crate) weight: u32,
    /// Since when it has this role.
    pub(crate) since: SystemTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Primary,
    Standby,
    /// The last table does not name it.
    Away,
}

impl Nodes {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn learn(&self, table: Table, now: Instant) {
        let mut known = self.known();
        let named: Vec<(&Target, Role, u32)> = table
            .primary
            .iter()
            .map(|target| (target, Role::Primary, 0))
            .chain(table.standbys.iter().map(|standby| (&standby.target, Role::Standby, standby.weight)))
            .collect();
        for (name, node) in &mut known.nodes {
            if node.role != Role::Away && !named.iter().any(|(target, ..)| target.node == *name) {
                (node.role, node.since) = (Role::Away, SystemTime::now());
            }
        }
        for (target, role, weight) in named {
            let Target { node, address, port, .. } = target;
            let fresh = || Node { address: *address, port: *port, role, weight, since: SystemTime::now() };
            let known = known.nodes.entry(node.clone()).or_insert_with(fresh);
            (known.address, known.port, known.weight) = (*address, *port, weight);
            if known.role != role {
                (known.role, known.since) = (role, SystemTime::now());
            }
        }
        known.table = Some((table, now));
    }

    pub(crate) fn look(&self) -> Known {
        self.known().clone()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use pgherd_core::types::Term;

    use super::*;
    use crate::routes::Standby;

    #[test]
    fn a_node_that_is_not_named_any_more_is_remembered_as_away() {
        let target = |node: &str| Target {
            node: node.parse().unwrap(),
            address: Ipv4Addr::LOCALHOST.into(),
            port: 5432,
            socket_dir: None,
        };
        let now = Instant::from_boot(Duration::from_secs(1));
        let table = |primary: &str, standbys: &[&str]| Table {
            term: Term(1),
            primary: Some(target(primary)),
            gate_open: true,
            standbys: standbys.iter().map(|node| Standby { target: target(node), weight: 1 }).collect(),
            forks: Vec::new(),
            draining: None,
            valid_until: now,
        };
        let nodes = Nodes::default();
        let roles = || -> Vec<(String, Role)> {
            nodes.look().nodes.iter().map(|(name, node)| (name.to_string(), node.role)).collect()
        };
        let row = |name: &str, role| (name.to_owned(), role);
        nodes.learn(table("b", &["a", "c"]), now);
        let since = nodes.look().nodes.values().map(|node| node.since).max();
        assert_eq!(roles(), [row("a", Role::Standby), row("b", Role::Primary), row("c", Role::Standby)]);
        nodes.learn(table("a", &["c"]), now);
        assert_eq!(roles(), [row("a", Role::Primary), row("b", Role::Away), row("c", Role::Standby)]);
        let c = &nodes.look().nodes[&"c".parse().unwrap()];
        assert!(Some(c.since) <= since, "nothing has changed of it");
    }
}
