//! What the API asks of this agent, answered from the main loop's picture, from the store, or by another
//! agent.
//!
//! Nothing is decided here: a wish of an operator becomes a proposal to the store, and what came of it is
//! read off the record. So any agent can answer any request, and a request that is asked twice finds what the
//! first one did.
//!
//! Hazard: a secret in an answer. Only a joining node gets any, and only over a connection that it pinned to
//! the herd's authority.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use futures_util::stream::BoxStream;
use pgherd_api::change::{
    BackupAsked, BackupRequest, Change, FailoverRequest, PromoteRequest, RestoreAnswer, RestoreRequest,
    SwitchoverCancelRequest, SwitchoverRequest,
};
use pgherd_api::join::{
    JoinAnswer, JoinRequest, OperatorAnswer, OperatorRequest, ProxyAnswer, ProxyRenewRequest, ProxyRequest,
    RenewAnswer, RenewRequest, Token, TokenRequest,
};
use pgherd_api::logs::{LogLine, LogsQuery};
use pgherd_api::peer::Fenced;
use pgherd_api::proxy::{ProxyQuery, ProxySettings};
use pgherd_api::report::{CheckReport, Explain, History, HistoryQuery};
use pgherd_api::routing::{Drained, RoutingQuery, RoutingTable};
use pgherd_api::spec::{Applied, ApplyRequest, Plan, PlanRequest, Spec};
use pgherd_api::wal::WalAsk;
use pgherd_api::{Code, Error, Status};
use pgherd_core::spec::{ClusterSpec, HerdSpec};
use pgherd_core::types::{Instant, NodeName};
use pgherd_dcs::{RaftStore, Store};
use tokio::sync::{mpsc, oneshot, watch};

use crate::agreed::{self, AgreedError};
use crate::archive::shelf;
use crate::gossip::Gossip;
use crate::http::backend::{Answer, Backend};
use crate::http::health::HealthView;
use crate::identity::Identity;
use crate::kept;
use crate::main_loop::{Event, Picture};
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::pki::OperatorName;
use crate::view;

pub(crate) use listeners::Listeners;
pub(crate) use renewal::Renewal;

mod changes;
mod joining;
mod listeners;
mod logs;
mod renewal;
mod restoring;
mod shown;
mod specification;
#[cfg(test)]
pub(crate) mod tests;

/// An agent that has begun so recently and has not read the store yet leaves the answer to the others.
const KNOWS_NOTHING_FOR: Duration = Duration::from_secs(5);
/// A question to the store or the loop that takes longer has failed.
const WITHIN: Duration = Duration::from_secs(5);
/// The loop answers at its next turn; one that does not is stuck.
const PICTURE_WITHIN: Duration = Duration::from_secs(2);

pub(crate) struct AgentBackend {
    pub(crate) raft: RaftStore,
    pub(crate) store: Store,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) own_gossip: watch::Receiver<Gossip>,
    pub(crate) peers: Peers,
    pub(crate) identity: Identity,
    pub(crate) state_dir: PathBuf,
    /// PEM, of the herd's authority.
    pub(crate) authorities: String,
    pub(crate) health: ArcSwapOption<HealthView>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) routes: watch::Sender<Option<view::Routes>>,
    /// When this node's own certificate ends.
    pub(crate) certificate_expires: ArcSwap<jiff::Timestamp>,
    pub(crate) changes: Mutex<BTreeMap<String, Change>>,
    /// Of the proxies that follow the routing table here.
    pub(crate) listeners: Listeners,
    /// Known once the specification has been read; a witness has none.
    pub(crate) instance: std::sync::OnceLock<pgherd_postgres::Instance>,
    /// Known once it has been read.
    pub(crate) spec: std::sync::OnceLock<watch::Receiver<Arc<HerdSpec>>>,
}

impl AgentBackend {
    pub(crate) async fn picture(&self) -> Answer<Box<Picture>> {
        let (ask, answer) = oneshot::channel();
        let asked = async {
            self.events.send(Event::Ask(ask)).await.ok()?;
            answer.await.ok()
        };
        match tokio::time::timeout(PICTURE_WITHIN, asked).await {
            Ok(Some(picture)) => Ok(picture),
            _ => Err(Error::of(Code::NotReady)),
        }
    }

    fn sight<'a>(&self, picture: &'a Picture, store: &'a pgherd_dcs::Health) -> view::Sight<'a> {
        let certificate_expires = Some(**self.certificate_expires.load());
        view::Sight { picture, store, certificate_expires, now: jiff::Timestamp::now() }
    }

    pub(crate) fn cluster(&self, picture: &Picture, named: Option<&str>) -> Answer<NodeName> {
        cluster_of(&picture.spec, named).map(|cluster| cluster.name.clone())
    }

    pub(crate) fn changes(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Change>> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The cluster that is meant: the only one, or the one that is named.
fn cluster_of<'a>(spec: &'a HerdSpec, named: Option<&str>) -> Answer<&'a ClusterSpec> {
    match (named, spec.clusters.as_slice()) {
        (None, [only]) => Ok(only),
        (None, _) => Err(Error::of(Code::ClusterAmbiguous)),
        (Some(name), clusters) => {
            let found = clusters.iter().find(|cluster| cluster.name.as_str() == name);
            found.ok_or_else(|| Error::new(Code::ClusterUnknown, format!("the herd has no cluster {name}")))
        }
    }
}

/// May this agent still learn what the cluster's record says? One that has not had its first thought is younger than
/// any other.
fn is_young(started: Option<Instant>, now: Instant) -> bool {
    started.is_none_or(|started| now.since(started) < KNOWS_NOTHING_FOR)
}

/// An error of the store, for whoever asked.
pub(crate) fn refused(error: &AgreedError) -> Error {
    match error {
        AgreedError::Store(_) | AgreedError::Commit(_) | AgreedError::Contended { .. } => {
            Error::of(Code::StoreUnavailable).because(error)
        }
        AgreedError::Refused(_) => Error::of(Code::ChangeInProgress).because(error),
        AgreedError::Malformed { .. } => Error::of(Code::Internal).because(error),
    }
}

impl Backend for AgentBackend {
    async fn status(&self) -> Answer<Status> {
        let picture = self.picture().await?;
        if picture.record.is_none() && is_young(picture.started, picture.now) {
            // Another agent is asked meanwhile, which knows more.
            return Err(Error::of(Code::NotReady));
        }
        let status = view::status(&self.sight(&picture, &self.raft.health().borrow()));
        Ok(Status { proxy: self.listeners.shown(), ..status })
    }

    async fn history(&self, query: HistoryQuery) -> Answer<History> {
        let picture = self.picture().await?;
        let cluster = self.cluster(&picture, query.cluster.as_deref())?;
        let record = picture.record.as_ref().ok_or_else(|| Error::of(Code::NotReady))?;
        Ok(view::history(&cluster, record, &query))
    }

    async fn explain(&self) -> Answer<Explain> {
        let picture = self.picture().await?;
        Ok(view::explain(&self.sight(&picture, &self.raft.health().borrow())))
    }

    async fn check(&self) -> Answer<CheckReport> {
        let picture = self.picture().await?;
        Ok(view::check(&self.sight(&picture, &self.raft.health().borrow())))
    }

    async fn spec(&self) -> Answer<Spec> {
        self.read_spec().await
    }

    async fn plan(&self, request: PlanRequest) -> Answer<Plan> {
        self.make_plan(request).await
    }

    async fn apply(&self, operator: &OperatorName, request: ApplyRequest) -> Answer<Applied> {
        self.apply_spec(operator, request).await
    }

    async fn switchover(&self, operator: &OperatorName, request: SwitchoverRequest) -> Answer<Change> {
        self.begin_switchover(operator, request).await
    }

    async fn promote(&self, proxy: &NodeName, request: PromoteRequest) -> Answer<Change> {
        self.promote_from_console(proxy, request).await
    }

    async fn backup(&self, operator: &OperatorName, request: BackupRequest) -> Answer<BackupAsked> {
        self.ask_for_backup(operator, request).await
    }

    async fn switchover_cancel(
        &self,
        operator: &OperatorName,
        request: SwitchoverCancelRequest,
    ) -> Answer<Change> {
        self.cancel_switchover(operator, request).await
    }

    async fn failover(&self, operator: &OperatorName, request: FailoverRequest) -> Answer<Change> {
        self.force_failover(operator, request).await
    }

    async fn restore(&self, operator: &OperatorName, request: RestoreRequest) -> Answer<RestoreAnswer> {
        self.restore_cluster(operator, request).await
    }

    async fn change(&self, request_id: String) -> Answer<Change> {
        self.how_goes(&request_id).await
    }

    async fn logs(&self, query: LogsQuery) -> Answer<BoxStream<'static, LogLine>> {
        self.read_logs(query).await
    }

    async fn routing(&self, query: RoutingQuery) -> Answer<BoxStream<'static, RoutingTable>> {
        let listening = self.listening(&query)?;
        Ok(self.stream_routes(listening))
    }

    async fn drained(&self, proxy: &NodeName, request: Drained) -> Answer<()> {
        self.listeners.drained(proxy, request);
        Ok(())
    }

    async fn proxy(&self, query: ProxyQuery) -> Answer<ProxySettings> {
        self.proxy_settings(&query)
    }

    async fn token_create(&self, operator: &OperatorName, request: TokenRequest) -> Answer<Token> {
        self.create_token(operator, request).await
    }

    async fn join(&self, request: JoinRequest) -> Answer<JoinAnswer> {
        self.admit(request).await
    }

    async fn renew(&self, node: &NodeName, request: RenewRequest) -> Answer<RenewAnswer> {
        self.renew_certificate(node, request).await
    }

    async fn operator_add(
        &self,
        operator: &OperatorName,
        request: OperatorRequest,
    ) -> Answer<OperatorAnswer> {
        self.add_operator(operator, request).await
    }

    async fn proxy_add(&self, operator: &OperatorName, request: ProxyRequest) -> Answer<ProxyAnswer> {
        self.add_proxy(operator, request).await
    }

    async fn proxy_renew(&self, proxy: &NodeName, request: ProxyRenewRequest) -> Answer<ProxyAnswer> {
        self.renew_proxy(proxy, request).await
    }

    async fn objects(&self, body: Bytes) -> Answer<Bytes> {
        let spec = self.spec.get().ok_or_else(|| Error::of(Code::NotReady))?.borrow().clone();
        let me = &self.identity.node;
        kept::serve::answer(&body, |path| kept::directories(&spec, me).any(|known| known == path)).await
    }

    async fn wal(&self, from: &NodeName, ask: WalAsk) -> Answer<Bytes> {
        shelf::answer(self.instance.get().map(|instance| instance.data_dir.clone()), from, ask).await
    }

    async fn raft_rpc(&self, from: &NodeName, rpc: &str, body: Bytes) -> Answer<Bytes> {
        Ok(self.raft.handle(from, rpc, &body).await.into())
    }

    async fn peer_report(&self, from: &NodeName, body: Bytes) -> Answer<Bytes> {
        let gossip: Gossip = serde_json::from_slice(&body)
            .map_err(|error| Error::of(Code::RequestMalformed).because(error))?;
        // The certificate says who speaks; a report in another's name would be believed about that one.
        if gossip.node != *from {
            return Err(Error::of(Code::CredentialsInsufficient));
        }
        let heard = Event::Heard { round_trip: None, gossip: Box::new(gossip) };
        if self.events.try_send(heard).is_err() {
            tracing::debug!(%from, "a report was dropped: the loop has more than it can take");
        }
        let own = serde_json::to_vec(&*self.own_gossip.borrow());
        own.map(Bytes::from).map_err(|error| Error::of(Code::Internal).because(error))
    }

    async fn fenced(&self, message: Fenced) -> Answer<()> {
        self.take_fenced(message).await
    }

    fn health(&self) -> Arc<HealthView> {
        self.health.load_full().unwrap_or_else(|| Arc::new(view::unknown_health(&self.identity)))
    }
}

/// The snapshot that this agent has now; it may be a moment behind.
pub(crate) fn local_view(store: &Store) -> pgherd_dcs::Snapshot {
    store.watch().borrow().clone()
}

/// The herd's authority and passwords.
pub(crate) fn secrets(store: &Store) -> Answer<agreed::Secrets> {
    match agreed::value::<agreed::Secrets>(&local_view(store), agreed::SECRETS) {
        Ok(Some((secrets, _))) => Ok(secrets),
        Ok(None) => Err(Error::of(Code::NotReady)),
        Err(error) => Err(refused(&error)),
    }
}
