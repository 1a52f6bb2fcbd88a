//! What the handlers need from the rest of the agent.
//!
//! Every method is one request. Its future is dropped when the client goes away or its time is up, at any
//! `await`: what must be finished once begun belongs into a task of its own. Deciding who may call is done
//! before; the callers' names are given for the record, not for checking.

use std::future::Future;
use std::sync::Arc;

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
use pgherd_api::{Error, Status};
use pgherd_core::types::NodeName;

use super::health::HealthView;
use crate::pki::OperatorName;

pub type Answer<T> = Result<T, Error>;

/// Implemented by the agent, and by the tests.
pub trait Backend: Send + Sync + 'static {
    fn status(&self) -> impl Future<Output = Answer<Status>> + Send;
    fn history(&self, query: HistoryQuery) -> impl Future<Output = Answer<History>> + Send;
    fn explain(&self) -> impl Future<Output = Answer<Explain>> + Send;
    fn check(&self) -> impl Future<Output = Answer<CheckReport>> + Send;

    fn spec(&self) -> impl Future<Output = Answer<Spec>> + Send;
    fn plan(&self, request: PlanRequest) -> impl Future<Output = Answer<Plan>> + Send;
    fn apply(
        &self,
        operator: &OperatorName,
        request: ApplyRequest,
    ) -> impl Future<Output = Answer<Applied>> + Send;

    /// Begins it, or finds the one with this request id; [`Backend::change`] tells how it goes on.
    fn switchover(
        &self,
        operator: &OperatorName,
        request: SwitchoverRequest,
    ) -> impl Future<Output = Answer<Change>> + Send;
    /// The same, for a role in the console of this proxy.
    fn promote(
        &self,
        proxy: &NodeName,
        request: PromoteRequest,
    ) -> impl Future<Output = Answer<Change>> + Send;
    fn switchover_cancel(
        &self,
        operator: &OperatorName,
        request: SwitchoverCancelRequest,
    ) -> impl Future<Output = Answer<Change>> + Send;
    fn failover(
        &self,
        operator: &OperatorName,
        request: FailoverRequest,
    ) -> impl Future<Output = Answer<Change>> + Send;
    /// One step of a restore of the whole cluster.
    fn restore(
        &self,
        operator: &OperatorName,
        request: RestoreRequest,
    ) -> impl Future<Output = Answer<RestoreAnswer>> + Send;
    /// Asks for a base backup; the one that waits already is as good.
    fn backup(
        &self,
        operator: &OperatorName,
        request: BackupRequest,
    ) -> impl Future<Output = Answer<BackupAsked>> + Send;
    fn change(&self, request_id: String) -> impl Future<Output = Answer<Change>> + Send;

    fn logs(&self, query: LogsQuery) -> impl Future<Output = Answer<BoxStream<'static, LogLine>>> + Send;
    /// A table whenever it changes and whenever its proof is renewed. `valid_for_ms` is what is left when the
    /// stream yields it; a table that waits to be sent is replaced by the next, so that none is sent late.
    ///
    /// A proxy that the query names is the one that asks.
    fn routing(
        &self,
        query: RoutingQuery,
    ) -> impl Future<Output = Answer<BoxStream<'static, RoutingTable>>> + Send;

    /// `proxy` follows the routing table here, and was asked for this by it.
    fn drained(&self, proxy: &NodeName, request: Drained) -> impl Future<Output = Answer<()>> + Send;

    fn proxy(&self, query: ProxyQuery) -> impl Future<Output = Answer<ProxySettings>> + Send;

    fn token_create(
        &self,
        operator: &OperatorName,
        request: TokenRequest,
    ) -> impl Future<Output = Answer<Token>> + Send;
    fn join(&self, request: JoinRequest) -> impl Future<Output = Answer<JoinAnswer>> + Send;
    /// `node` has proved by its present certificate that it is this node.
    fn renew(
        &self,
        node: &NodeName,
        request: RenewRequest,
    ) -> impl Future<Output = Answer<RenewAnswer>> + Send;
    fn operator_add(
        &self,
        operator: &OperatorName,
        request: OperatorRequest,
    ) -> impl Future<Output = Answer<OperatorAnswer>> + Send;

    fn proxy_add(
        &self,
        operator: &OperatorName,
        request: ProxyRequest,
    ) -> impl Future<Output = Answer<ProxyAnswer>> + Send;
    /// `proxy` has proved by its present certificate that it is this proxy.
    fn proxy_renew(
        &self,
        proxy: &NodeName,
        request: ProxyRenewRequest,
    ) -> impl Future<Output = Answer<ProxyAnswer>> + Send;

    /// The body is a line of JSON and an object: [`pgherd_api::objects`].
    fn objects(&self, body: Bytes) -> impl Future<Output = Answer<Bytes>> + Send;
    /// The answer is a line of JSON and the bytes: [`pgherd_api::wal`].
    fn wal(&self, from: &NodeName, ask: WalAsk) -> impl Future<Output = Answer<Bytes>> + Send;
    /// `rpc` is the last segment of the path, not checked; the body is the store's own format.
    fn raft_rpc(&self, from: &NodeName, rpc: &str, body: Bytes)
    -> impl Future<Output = Answer<Bytes>> + Send;
    fn peer_report(&self, from: &NodeName, body: Bytes) -> impl Future<Output = Answer<Bytes>> + Send;
    /// Its signature is not checked yet: [`crate::pki::verify_fenced`].
    fn fenced(&self, message: Fenced) -> impl Future<Output = Answer<()>> + Send;

    /// From memory: it is asked several times a second by every load balancer.
    fn health(&self) -> Arc<HealthView>;
}
