//! Talking to the other agents: a client for each, and the exchange of gossip.
//!
//! Each peer has a task of its own, so that one that hangs delays no other. Who the peers are follows the
//! specification; a changed address replaces the client.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use pgherd_api::client::{Client, ClientTls};
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::NodeName;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::clock;
use crate::gossip::Gossip;
use crate::main_loop::Event;

/// How often each agent tells each other one about itself. Well below `suspect`, so that a lost exchange is
/// followed by others before anybody is suspected.
pub(crate) const GOSSIP_EVERY: Duration = Duration::from_millis(300);
/// How often while the holder's PostgreSQL does not answer: the others wait for this node's word.
const GOSSIP_IN_A_HURRY: Duration = Duration::from_millis(100);
/// An exchange that takes longer has failed; the next one begins on a fresh connection.
const GOSSIP_WITHIN: Duration = Duration::from_millis(1200);

/// The clients, by node.
#[derive(Clone)]
pub(crate) struct Peers {
    me: NodeName,
    tls: Arc<ClientTls>,
    clients: Arc<RwLock<BTreeMap<NodeName, (String, Client)>>>,
}

impl Peers {
    pub(crate) fn new(me: NodeName, tls: Arc<ClientTls>) -> Peers {
        Peers { me, tls, clients: Arc::default() }
    }

    /// A client for the node at `address`, kept while the address stays.
    pub(crate) fn client(&self, node: &NodeName, address: &str) -> Client {
        let known = self.clients.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, client)) = known.get(node)
            && at == address
        {
            return client.clone();
        }
        drop(known);
        let client = Client::tls(address, Some(node.as_str()), Arc::clone(&self.tls));
        let mut clients = self.clients.write().unwrap_or_else(PoisonError::into_inner);
        clients.insert(node.clone(), (address.to_owned(), client.clone()));
        client
    }

    /// Gossips with everyone whom the specification names, for ever.
    pub(crate) async fn gossip(
        self,
        mut spec: watch::Receiver<Arc<HerdSpec>>,
        own: watch::Receiver<Gossip>,
        events: mpsc::Sender<Event>,
    ) {
        let mut tasks: BTreeMap<NodeName, (String, JoinHandle<()>)> = BTreeMap::new();
        loop {
            let wanted = addresses(&spec.borrow_and_update(), &self.me);
            tasks.retain(|node, (address, task)| {
                let keep = wanted.get(node) == Some(address);
                if !keep {
                    task.abort();
                }
                keep
            });
            for (node, address) in wanted {
                tasks.entry(node.clone()).or_insert_with(|| {
                    let client = self.client(&node, &address).within(GOSSIP_WITHIN);
                    let task = tokio::spawn(exchange(client, own.clone(), events.clone()));
                    (address, task)
                });
            }
            if spec.changed().await.is_err() {
                return;
            }
        }
    }
}

/// `host:port` of every other agent.
pub(crate) fn addresses(spec: &HerdSpec, me: &NodeName) -> BTreeMap<NodeName, String> {
    let others = spec.agents().filter(|(name, _, _)| *name != me);
    others.map(|(name, host, port)| (name.clone(), address(host, port))).collect()
}

/// An IPv6 address needs brackets before its port.
pub(crate) fn address(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

async fn exchange(client: Client, own: watch::Receiver<Gossip>, events: mpsc::Sender<Event>) {
    let mut reached = None;
    let mut pause = Duration::ZERO;
    loop {
        tokio::time::sleep(pause).await;
        pause = GOSSIP_EVERY;
        let hurry = own.borrow().holder_probe_failing.is_some();
        let Ok(body) = serde_json::to_vec(&*own.borrow()) else { continue };
        let asked = clock::now();
        // From beginning to beginning, unless an exchange takes longer.
        let every = if hurry { GOSSIP_IN_A_HURRY } else { GOSSIP_EVERY };
        let answer = client.peer_report(body.into()).await;
        pause = every.saturating_sub(clock::now().since(asked));
        if reached != Some(answer.is_ok()) {
            reached = Some(answer.is_ok());
            match &answer {
                Ok(_) => tracing::info!(peer = %client.endpoint(), "agent answers"),
                Err(error) => tracing::info!(peer = %client.endpoint(), %error, "agent does not answer"),
            }
        }
        let Ok(answer) = answer else { continue };
        let Ok(gossip) = serde_json::from_slice::<Gossip>(&answer) else { continue };
        let heard = Event::Heard { round_trip: Some(clock::now().since(asked)), gossip: Box::new(gossip) };
        if events.send(heard).await.is_err() {
            return;
        }
    }
}
