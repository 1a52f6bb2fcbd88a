//! What is kept ready for those who ask often or wait for news: the health paths, the metrics and the routing
//! tables, made anew at every change that matters, and otherwise several times a second.
//!
//! Hazard: an old picture that goes on being shown. When the main loop does not answer, the health paths say
//! so, and after a lease they let no client through.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use pgherd_api::routing::{RoutingTable, RoutingTarget};
use pgherd_core::types::Instant;
use tokio::time::timeout;

use super::AgentBackend;
use super::listeners::Listening;
use crate::clock;
use crate::gossip::Gossip;
use crate::view::{self, Routes};

/// How old the picture may be when nothing happens.
const EVERY: Duration = Duration::from_millis(200);
/// Between two pictures at least, whatever happens.
const NOT_BEFORE: Duration = Duration::from_millis(10);
/// A name is looked up again after this long.
const RESOLVED_FOR: Duration = Duration::from_secs(30);
const RESOLVE_WITHIN: Duration = Duration::from_secs(1);

impl AgentBackend {
    /// For ever.
    pub(crate) async fn keep_shown(self: Arc<Self>) {
        let (mut gossip, mut store) = (self.own_gossip.clone(), self.store.watch());
        let mut names = Names::default();
        let mut answered = clock::now();
        let mut lease = Duration::ZERO;
        loop {
            let seen = Told::of(&gossip.borrow_and_update());
            store.mark_unchanged();
            match self.picture().await {
                Ok(picture) => {
                    answered = clock::now();
                    lease = picture.spec.times.lease;
                    let health = self.raft.health().borrow().clone();
                    let sight = self.sight(&picture, &health);
                    self.health.store(Some(Arc::new(view::health(&sight))));
                    self.metrics.measured(view::measurements(&sight));
                    let mut routes = view::routes(&sight, &self.identity.herd_id);
                    if let Some(routes) = &mut routes {
                        names.resolve(&mut routes.table).await;
                    }
                    self.routes.send_if_modified(|before| {
                        let changed = *before != routes;
                        *before = routes;
                        changed
                    });
                }
                Err(_) => self.show_a_stuck_loop(clock::now().since(answered) >= lease),
            }
            tokio::time::sleep(NOT_BEFORE).await;
            let matters = async {
                // Each turn of the loop sends its gossip, also the turn that answered just now.
                while gossip.changed().await.is_ok() && Told::of(&gossip.borrow_and_update()) == seen {}
            };
            tokio::select! {
                () = matters => {}
                _ = store.changed() => {}
                () = tokio::time::sleep(EVERY) => {}
            }
        }
    }

    fn show_a_stuck_loop(&self, for_a_lease: bool) {
        let Some(last) = self.health.load_full() else { return };
        let mut shown = (*last).clone();
        shown.agent_is_alive = false;
        if for_a_lease {
            (shown.gate_open, shown.in_read_pool) = (false, false);
            self.routes.send_if_modified(|routes| routes.take().is_some());
        }
        self.health.store(Some(Arc::new(shown)));
    }

    /// A table whenever it changes or its proof is renewed; the newest, when the reader is slower. Who listens is
    /// listed until the stream is dropped.
    pub(super) fn stream_routes(&self, listening: Option<Listening>) -> BoxStream<'static, RoutingTable> {
        let mut routes = self.routes.subscribe();
        routes.mark_changed();
        stream::unfold((routes, listening), |(mut routes, listening)| async move {
            loop {
                routes.changed().await.ok()?;
                let newest: Option<Routes> = routes.borrow_and_update().clone();
                if let Some(table) = newest.and_then(|newest| newest.table_at(clock::now())) {
                    return Some((table, (routes, listening)));
                }
            }
        })
        .boxed()
    }
}

/// What of an agent's own word makes a new picture worth while at once.
#[derive(PartialEq, Eq)]
struct Told {
    term: pgherd_core::types::Term,
    running: crate::gossip::Is,
    gate_open: bool,
    state: Option<pgherd_api::status::State>,
    upstream: Option<pgherd_core::types::NodeName>,
    /// With some decisions the proxies have to do something.
    reason_code: String,
}

impl Told {
    fn of(gossip: &Gossip) -> Told {
        Told {
            term: gossip.term,
            running: gossip.running,
            gate_open: gossip.show.gate_open,
            state: gossip.show.state,
            upstream: gossip.show.upstream.clone(),
            reason_code: gossip.show.reason_code.clone(),
        }
    }
}

/// Addresses of hosts that the herd file names. A proxy looks up no name while it routes.
#[derive(Default)]
struct Names {
    known: HashMap<String, (IpAddr, Instant)>,
}

impl Names {
    /// Puts addresses in the place of names; who cannot be resolved is left out.
    async fn resolve(&mut self, table: &mut RoutingTable) {
        if let Some(primary) = &mut table.primary
            && !self.resolve_target(primary).await
        {
            table.primary = None;
        }
        let mut resolved = Vec::with_capacity(table.standbys.len());
        for mut standby in std::mem::take(&mut table.standbys) {
            if self.resolve_target(&mut standby.target).await {
                resolved.push(standby);
            }
        }
        table.standbys = resolved;
    }

    async fn resolve_target(&mut self, target: &mut RoutingTarget) -> bool {
        if target.address.parse::<IpAddr>().is_ok() {
            return true;
        }
        let now = clock::now();
        let known = self.known.get(&target.address).copied();
        if known.is_none_or(|(_, at)| now.since(at) >= RESOLVED_FOR) {
            let found =
                timeout(RESOLVE_WITHIN, tokio::net::lookup_host((target.address.as_str(), target.port)))
                    .await;
            match found.ok().and_then(Result::ok).and_then(|mut addresses| addresses.next()) {
                Some(address) => drop(self.known.insert(target.address.clone(), (address.ip(), now))),
                // The address that was right a while ago beats none; asked again after as long.
                None => drop(known.map(|(ip, _)| self.known.insert(target.address.clone(), (ip, now)))),
            }
        }
        match self.known.get(&target.address) {
            Some((ip, _)) => {
                target.address = ip.to_string();
                true
            }
            None => {
                tracing::debug!(
                    host = target.address,
                    "cannot be resolved, and is left out of the routing table"
                );
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pgherd_api::routing::{Proof, RoutingStandby};
    use pgherd_api::status::Gate;

    use super::*;

    fn target(address: &str) -> RoutingTarget {
        RoutingTarget { node: "a".to_owned(), address: address.to_owned(), port: 5432, socket_dir: None }
    }

    #[tokio::test]
    async fn names_become_addresses_and_who_has_none_is_left_out() {
        let standby = |address: &str| RoutingStandby {
            target: target(address),
            replay_lsn: None,
            lag_bytes: None,
            weight: 1,
        };
        let mut table = RoutingTable {
            herd_id: "4f1c".to_owned(),
            cluster: "main".to_owned(),
            term: 4,
            gate: Gate::Open,
            primary: Some(target("localhost")),
            standbys: vec![standby("10.0.0.2"), standby("no-such-host.invalid"), standby("fd00::1")],
            proof: Proof::Store,
            valid_for_ms: 100,
            drain: None,
            forks: Vec::new(),
        };
        Names::default().resolve(&mut table).await;
        let primary: IpAddr = table.primary.unwrap().address.parse().unwrap();
        assert!(primary.is_loopback());
        let standbys: Vec<&str> =
            table.standbys.iter().map(|standby| standby.target.address.as_str()).collect();
        assert_eq!(standbys, ["10.0.0.2", "fd00::1"]);
    }
}
