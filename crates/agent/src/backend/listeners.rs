//! Where proxies listen, as they say when they begin to follow the routing table of this agent.
//!
//! Each agent knows those that follow it, and a proxy follows all of them. Leaves out: whether anybody answers
//! there. Hazard: a proxy that is gone and still listed; so an entry lives no longer than its stream.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgherd_api::routing::RoutingQuery;
use pgherd_api::status::{ProxyListener, ProxyTarget};
use pgherd_api::{Code, Error};

use super::{AgentBackend, cluster_of};
use crate::http::backend::Answer;

/// The listeners of each stream under way, of which there is a limited number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listeners(Arc<Mutex<Streams>>);

#[derive(Debug, Default)]
struct Streams {
    next: u64,
    open: BTreeMap<u64, Vec<ProxyListener>>,
}

/// Listed until this is dropped.
#[derive(Debug)]
pub(super) struct Listening {
    listeners: Listeners,
    stream: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.listeners.lock().open.remove(&self.stream);
    }
}

impl Listeners {
    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, listeners: Vec<ProxyListener>) -> Listening {
        let mut streams = self.lock();
        let stream = streams.next;
        streams.next += 1;
        streams.open.insert(stream, listeners);
        Listening { listeners: self.clone(), stream }
    }

    /// Each once: a proxy that has come again may have its former stream still.
    pub(super) fn shown(&self) -> Vec<ProxyListener> {
        let mut shown: Vec<ProxyListener> = Vec::new();
        for listener in self.lock().open.values().flatten() {
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
        Ok(query.proxy.is_some().then(|| self.listeners.add(listeners)))
    }
}
