//! Real members with real disks in one process, and wires between them that a test can cut.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use pgherd_core::types::NodeName;
use pgherd_dcs::{Arrangement, Config, Health, RaftStore, Role, Store, Times, Transport, TransportError};
use tempfile::TempDir;
use tokio::time::Instant;

/// Long enough for two busy cores; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
pub(crate) const TIMES: Times =
    Times { heartbeat: Duration::from_millis(100), election: Duration::from_millis(1000) };

pub(crate) fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

/// Waits for `condition`, and fails the test with `what` after [`PATIENCE`].
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < PATIENCE, "not in {PATIENCE:?}: {what}");
        // sleep: between two looks.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Sender, receiver and body of an RPC.
type Sent = (NodeName, NodeName, Vec<u8>);

/// The network: who runs where, and which directions are cut.
#[derive(Default)]
pub(crate) struct Wires {
    members: Mutex<BTreeMap<NodeName, RaftStore>>,
    cut: Mutex<BTreeSet<(NodeName, NodeName)>>,
    delay: Mutex<Duration>,
    /// Answers of this RPC get lost, so many times.
    lose: Mutex<BTreeMap<&'static str, u32>>,
    /// The last of each kind that arrived.
    sent: Mutex<BTreeMap<&'static str, Sent>>,
    pub(crate) calls: AtomicU64,
}

impl Wires {
    fn is_cut(&self, from: &NodeName, to: &NodeName) -> bool {
        self.cut.lock().unwrap().contains(&(from.clone(), to.clone()))
    }

    pub(crate) fn set_delay(&self, delay: Duration) {
        *self.delay.lock().unwrap() = delay;
    }

    pub(crate) fn lose_answers(&self, rpc: &'static str, count: u32) {
        self.lose.lock().unwrap().insert(rpc, count);
    }

    pub(crate) fn last_sent(&self, rpc: &str) -> Option<Sent> {
        self.sent.lock().unwrap().get(rpc).cloned()
    }

    fn loses(&self, rpc: &'static str) -> bool {
        let mut lose = self.lose.lock().unwrap();
        let left = lose.entry(rpc).or_default();
        let loses = *left > 0;
        *left = left.saturating_sub(1);
        loses
    }
}

/// One member's end of the wires.
pub(crate) struct End {
    pub(crate) wires: Arc<Wires>,
    pub(crate) own: NodeName,
}

impl Transport for End {
    /// A cut wire swallows what is sent, like a dropped packet: the caller learns nothing until its time is
    /// up.
    fn call(
        &self,
        peer: &NodeName,
        address: &str,
        rpc: &'static str,
        body: Vec<u8>,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, TransportError>> {
        assert_eq!(address, format!("{peer}.test:8009"), "the address is the one given at the join");
        let (wires, own, peer) = (Arc::clone(&self.wires), self.own.clone(), peer.clone());
        wires.calls.fetch_add(1, Ordering::Relaxed);
        let swallowed = async move |wires: &Wires, from: &NodeName, to: &NodeName| {
            let cut = wires.is_cut(from, to);
            if cut {
                // sleep: a cut swallows a call for as long as the caller waits.
                tokio::time::sleep(timeout).await;
            }
            cut
        };
        async move {
            let delay = *wires.delay.lock().unwrap();
            if !delay.is_zero() {
                // sleep: the delay of the wire.
                tokio::time::sleep(delay / 2).await;
            }
            if swallowed(&wires, &own, &peer).await {
                return Err(TransportError::NoAnswer("the wire is cut".to_owned()));
            }
            let Some(there) = wires.members.lock().unwrap().get(&peer).cloned() else {
                return Err(TransportError::NotSent("connection refused".to_owned()));
            };
            wires.sent.lock().unwrap().insert(rpc, (own.clone(), peer.clone(), body.clone()));
            // The other side finishes what it began even if the caller gives up.
            let caller = own.clone();
            let answer = tokio::spawn(async move { there.handle(&caller, rpc, &body).await }).await.unwrap();
            if !delay.is_zero() {
                // sleep: the delay of the wire.
                tokio::time::sleep(delay / 2).await;
            }
            if swallowed(&wires, &peer, &own).await || wires.loses(rpc) {
                return Err(TransportError::NoAnswer("the answer was lost".to_owned()));
            }
            Ok(answer)
        }
        .boxed()
    }
}

pub(crate) struct Herd {
    pub(crate) wires: Arc<Wires>,
    dirs: BTreeMap<NodeName, TempDir>,
    stores: BTreeMap<NodeName, RaftStore>,
    pub(crate) times: Times,
}

impl Herd {
    /// `names` as members, all voters if that is an odd number.
    pub(crate) async fn new(names: &[&str]) -> Herd {
        Herd::with_times(names, TIMES).await
    }

    pub(crate) async fn with_times(names: &[&str], times: Times) -> Herd {
        let mut herd = Herd { wires: Arc::default(), dirs: BTreeMap::new(), stores: BTreeMap::new(), times };
        let (founder, joiners) = names.split_first().unwrap();
        let config = herd.config(founder);
        let store = RaftStore::create(config, herd.end(founder)).await.unwrap();
        herd.plug(founder, store);
        for joiner in joiners {
            herd.join(joiner, founder).await;
        }
        herd.settle(names).await;
        herd
    }

    pub(crate) fn config(&mut self, node: &str) -> Config {
        let dir = self.dirs.entry(name(node)).or_insert_with(|| TempDir::new().unwrap());
        Config {
            dir: dir.path().join("raft"),
            herd: "herd-1".to_owned(),
            name: name(node),
            address: format!("{node}.test:8009"),
            host: node.to_owned(),
            times: self.times,
        }
    }

    pub(crate) fn end(&self, node: &str) -> Arc<End> {
        Arc::new(End { wires: Arc::clone(&self.wires), own: name(node) })
    }

    pub(crate) fn plug(&mut self, node: &str, store: RaftStore) {
        self.wires.members.lock().unwrap().insert(name(node), store.clone());
        self.stores.insert(name(node), store);
    }

    /// Takes `node` in as a learner, asking `member`.
    pub(crate) async fn join(&mut self, node: &str, member: &str) {
        let config = self.config(node);
        let request = RaftStore::prepare(&config).await.unwrap();
        let joined = self.raft(member).add_member(request, TIMEOUT).await.unwrap();
        let store = RaftStore::join(config, joined, self.end(node)).await.unwrap();
        self.plug(node, store);
    }

    /// Arranges, as every agent does over and over, until the voters are those `order` leads to.
    pub(crate) async fn settle(&self, order: &[&str]) {
        let order: Vec<_> = order.iter().map(|node| name(node)).collect();
        eventually("the voters are arranged", async || {
            let mut settled = false;
            for store in self.stores.values() {
                settled |= store.arrange(&order, TIMEOUT).await == Arrangement::Settled;
            }
            settled && self.leader_or_none().is_some()
        })
        .await;
    }

    pub(crate) fn raft(&self, node: &str) -> &RaftStore {
        &self.stores[&name(node)]
    }

    pub(crate) fn store(&self, node: &str) -> Store {
        self.raft(node).clone().into()
    }

    pub(crate) fn stores(&self) -> Vec<Store> {
        self.stores.values().cloned().map(Store::from).collect()
    }

    pub(crate) fn health(&self, node: &str) -> Health {
        self.raft(node).health().borrow().clone()
    }

    fn leader_or_none(&self) -> Option<NodeName> {
        let leads = |store: &RaftStore| store.health().borrow().role == Role::Leader;
        let mut leaders = self.stores.iter().filter(|(_, store)| leads(store)).map(|(node, _)| node.clone());
        leaders.next().filter(|_| leaders.next().is_none())
    }

    /// The only member that leads.
    pub(crate) async fn leader(&self) -> String {
        eventually("there is one leader", async || self.leader_or_none().is_some()).await;
        self.leader_or_none().unwrap().to_string()
    }

    /// A leader among `nodes`, whatever those outside believe.
    pub(crate) async fn leader_among(&self, nodes: &[&str]) -> String {
        let find =
            || nodes.iter().find(|node| self.health(node).role == Role::Leader).map(|node| node.to_string());
        eventually("one of the others leads", async || find().is_some()).await;
        find().unwrap()
    }

    pub(crate) fn others<'a>(&self, nodes: &[&'a str], but: &str) -> Vec<&'a str> {
        nodes.iter().filter(|node| **node != but).copied().collect()
    }

    /// Cuts both directions between `node` and everybody else.
    pub(crate) fn isolate(&self, node: &str) {
        let names: Vec<_> = self.dirs.keys().cloned().collect();
        let mut cut = self.wires.cut.lock().unwrap();
        for other in names {
            cut.insert((name(node), other.clone()));
            cut.insert((other, name(node)));
        }
    }

    /// Cuts one direction of one wire.
    pub(crate) fn cut(&self, from: &str, to: &str) {
        self.wires.cut.lock().unwrap().insert((name(from), name(to)));
    }

    pub(crate) fn heal(&self) {
        self.wires.cut.lock().unwrap().clear();
    }

    pub(crate) async fn stop(&mut self, node: &str) {
        self.wires.members.lock().unwrap().remove(&name(node));
        if let Some(store) = self.stores.remove(&name(node)) {
            store.shutdown().await;
        }
    }

    pub(crate) async fn start(&mut self, node: &str) {
        let config = self.config(node);
        let store = RaftStore::open(config, self.end(node)).await.unwrap();
        self.plug(node, store);
    }

    /// The disk of a stopped member is lost with everything on it.
    pub(crate) fn wipe(&mut self, node: &str) {
        assert!(!self.stores.contains_key(&name(node)), "stop it first");
        self.dirs.remove(&name(node));
    }
}
