//! The proxies that follow the routing table of this agent: where they listen, as they say when they begin, and which
//! of them have let their clients' transactions end, when that is asked of them.
//!
//! A proxy may be two processes for a while, one of which has taken over from the other; what one of them says is not true of
//! the other. Each agent knows those that follow it, and a proxy follows all of them. Leaves out: whether anybody answers
//! there. Hazard: a proxy that is gone and still listed, for which a switchover would wait; so an entry lives no longer
//! than its stream.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgherd_api::routing::{Drained, RoutingQuery};
use pgherd_api::status::{ProxyListener, ProxyTarget};
use pgherd_api::{Code, Error};
use pgherd_core::types::NodeName;
use tokio::sync::watch;

use super::{AgentBackend, cluster_of};
use crate::http::backend::Answer;

/// The proxy of each stream under way, of which there is a limited number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listeners(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    streams: Mutex<Streams>,
    /// A stream has ended, or a proxy has said that it is drained.
    fewer: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Streams {
    next: u64,
    open: BTreeMap<u64, Follower>,
    /// The newest drain that each has said to be done.
    drained: BTreeMap<Process, u64>,
}

/// A proxy by the name in its certificate, and which of its processes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    proxy: NodeName,
    process: Option<String>,
}

#[derive(Debug)]
struct Follower {
    process: Process,
    listeners: Vec<ProxyListener>,
}

/// Listed until this is dropped.
#[derive(Debug)]
pub(super) struct Listening {
    listeners: Listeners,
    stream: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.listeners.end(self.stream);
    }
}

impl Listeners {
    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.0.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, process: Process, listeners: Vec<ProxyListener>) -> Listening {
        let mut streams = self.lock();
        let stream = streams.next;
        streams.next += 1;
        // What it says now is true instead of what it said before.
        for former in streams.open.values_mut().filter(|other| other.process == process) {
            former.listeners.clear();
        }
        streams.open.insert(stream, Follower { process, listeners });
        Listening { listeners: self.clone(), stream }
    }

    fn end(&self, stream: u64) {
        let mut streams = self.lock();
        if let Some(Follower { process, .. }) = streams.open.remove(&stream)
            && streams.open.values().all(|other| other.process != process)
        {
            streams.drained.remove(&process);
        }
        drop(streams);
        self.0.fewer.send_replace(());
    }

    /// Says a proxy that follows; of another one it is not remembered.
    pub(super) fn drained(&self, proxy: &NodeName, said: Drained) {
        let process = Process { proxy: proxy.clone(), process: said.process };
        let mut streams = self.lock();
        if streams.open.values().any(|follower| follower.process == process) {
            streams.drained.insert(process, said.drain);
        }
        drop(streams);
        self.0.fewer.send_replace(());
    }

    /// Waits until each proxy that follows has said so of this drain. There may be none.
    pub(crate) async fn all_drained(&self, drain: u64) {
        let mut fewer = self.0.fewer.subscribe();
        loop {
            let is_done = {
                let streams = self.lock();
                let drained = |process| streams.drained.get(process) == Some(&drain);
                streams.open.values().all(|follower| drained(&follower.process))
            };
            // The sender lives as long as this.
            if is_done || fewer.changed().await.is_err() {
                return;
            }
        }
    }

    /// Each once: two processes of a proxy have the same ones.
    pub(super) fn shown(&self) -> Vec<ProxyListener> {
        let mut shown: Vec<ProxyListener> = Vec::new();
        for listener in self.lock().open.values().flat_map(|follower| &follower.listeners) {
            if !shown.contains(listener) {
                shown.push(listener.clone());
            }
        }
        shown
    }
}

impl AgentBackend {
    /// Enters what a proxy says of itself; `None` for whoever only reads the table.
    pub(super) fn listening(&self, query: &RoutingQuery) -> Answer<Option<Listening>> {
        if query.proxy.is_none() && query.cluster.is_none() {
            return Ok(None);
        }
        let (spec, _) = self.stored_spec()?;
        let cluster = cluster_of(&spec, query.cluster.as_deref())?;
        let says = [(&query.listen, ProxyTarget::ReadWrite), (&query.read_listen, ProxyTarget::ReadOnly)];
        let mut listeners = Vec::new();
        for (address, target) in says {
            let Some(address) = address else { continue };
            let listen: SocketAddr = address.parse().map_err(|error| {
                Error::of(Code::RequestMalformed)
                    .because(format!("\"{address}\" is not address:port: {error}"))
            })?;
            let cluster = cluster.name.to_string();
            listeners.push(ProxyListener { cluster, listen: listen.to_string(), target });
        }
        let Some(proxy) = &query.proxy else { return Ok(None) };
        let proxy = proxy.parse().map_err(|error| {
            Error::of(Code::RequestMalformed).because(format!("\"{proxy}\" is no name of a proxy: {error}"))
        })?;
        let process = Process { proxy, process: query.process.clone() };
        Ok(Some(self.listeners.add(process, listeners)))
    }
}
