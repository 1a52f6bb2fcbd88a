//! The routes of `/v1/`. A handler is one call of the [`Backend`]; its first parameter says who may make it.

use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Request, State};
use axum::handler::Handler;
use axum::http::Response;
use axum::middleware;
use axum::routing::{MethodRouter, get, post};
use pgherd_api::change::{
    BackupAsked, BackupRequest, Change, FailoverRequest, PromoteRequest, RestoreAnswer, RestoreRequest,
    SwitchoverCancelRequest, SwitchoverRequest,
};
use pgherd_api::join::{
    JoinAnswer, JoinRequest, OperatorAnswer, OperatorRequest, ProxyAnswer, ProxyRenewRequest, ProxyRequest,
    RenewAnswer, RenewRequest, Token, TokenRequest,
};
use pgherd_api::logs::LogsQuery;
use pgherd_api::peer::Fenced;
use pgherd_api::proxy::{ProxyQuery, ProxySettings};
use pgherd_api::report::{CheckReport, Explain, History, HistoryQuery};
use pgherd_api::route::{self, Method, Route};
use pgherd_api::routing::{Drained, RoutingQuery};
use pgherd_api::spec::{Applied, ApplyRequest, Plan, PlanRequest, Spec};
use pgherd_api::wal::WalAsk;
use pgherd_api::{Code, Error, Status};
use pgherd_core::types::NodeName;
use tokio::sync::Semaphore;

use super::answer::{Json, RawJson, Refusal};
use super::backend::{Answer, Backend};
use super::body::{JsonBody, ObjectBody, PeerBody, QueryOf, RaftBody, StrangerBody};
use super::caller::{ByAnyone, ByFollower, ByMember, ByNode, ByOperator, ByProxy};
use super::origin::refuse_other_origins;
use super::sparingly::Sparingly;
use super::stream::{self, MAX_STREAMS};

/// What the listeners serve; cheap to clone.
#[derive(Clone, Debug)]
pub struct Api {
    pub(super) router: Router,
}

/// Packs of 64 MiB, most often: these are held in memory at a time, and other requests for objects wait.
const MAX_OBJECTS: usize = 16;

/// A segment each, of up to 1 GiB, of a server that has something else to do.
const MAX_WAL: usize = 2;

struct Shared<B> {
    backend: Arc<B>,
    streams: Arc<Semaphore>,
    objects: Arc<Semaphore>,
    wal: Arc<Semaphore>,
    refusals: Sparingly,
}

impl<B> Clone for Shared<B> {
    fn clone(&self) -> Shared<B> {
        Shared {
            backend: Arc::clone(&self.backend),
            streams: Arc::clone(&self.streams),
            objects: Arc::clone(&self.objects),
            wal: Arc::clone(&self.wal),
            refusals: self.refusals.clone(),
        }
    }
}

type Ctx<B> = State<Shared<B>>;

impl Api {
    pub fn new<B: Backend>(backend: Arc<B>) -> Api {
        let shared = Shared {
            backend,
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
            objects: Arc::new(Semaphore::new(MAX_OBJECTS)),
            wal: Arc::new(Semaphore::new(MAX_WAL)),
            refusals: Sparingly::default(),
        };
        let router = Router::new();
        let router = add(router, route::STATUS, status::<B>);
        let router = add(router, route::HISTORY, history::<B>);
        let router = add(router, route::EXPLAIN, explain::<B>);
        let router = add(router, route::CHECK, check::<B>);
        let router = add(router, route::SPEC, spec::<B>);
        let router = add(router, route::LOGS, logs::<B>);
        let router = add(router, route::ROUTING, routing::<B>);
        let router = add(router, route::PROXY, proxy::<B>);
        let router = add(router, route::CHANGE, change::<B>);
        let router = add(router, route::PLAN, plan::<B>);
        let router = add(router, route::APPLY, apply::<B>);
        let router = add(router, route::SWITCHOVER, switchover::<B>);
        let router = add(router, route::BACKUP, backup::<B>);
        let router = add(router, route::SWITCHOVER_CANCEL, switchover_cancel::<B>);
        let router = add(router, route::FAILOVER, failover::<B>);
        let router = add(router, route::RESTORE, restore::<B>);
        let router = add(router, route::TOKEN_CREATE, token_create::<B>);
        let router = add(router, route::OPERATOR_ADD, operator_add::<B>);
        let router = add(router, route::PROXY_ADD, proxy_add::<B>);
        let router = add(router, route::DRAINED, drained::<B>);
        let router = add(router, route::PROMOTE, promote::<B>);
        let router = add(router, route::PROXY_RENEW, proxy_renew::<B>);
        let router = add(router, route::RENEW, renew::<B>);
        let router = add(router, route::RAFT, raft::<B>);
        let router = add(router, route::PEER_REPORT, peer_report::<B>);
        let router = add(router, route::OBJECTS, objects::<B>);
        let router = add(router, route::WAL, wal::<B>);
        let router = add(router, route::JOIN, join::<B>);
        let router = add(router, route::FENCED, fenced::<B>);
        let router = router
            .fallback(unknown_route)
            .method_not_allowed_fallback(unknown_method)
            .layer(middleware::from_fn(refuse_other_origins))
            .with_state(shared);
        Api { router }
    }
}

fn add<S, T, H>(router: Router<S>, route: Route, handler: H) -> Router<S>
where
    H: Handler<T, S>,
    T: 'static,
    S: Clone + Send + Sync + 'static,
{
    let method: MethodRouter<S> = match route.method {
        Method::Get => get(handler),
        Method::Post => post(handler),
    };
    router.route(route.path, method)
}

/// What a stranger asks for is not even said not to exist.
async fn unknown_route(request: Request) -> Refusal {
    let (mut parts, _) = request.into_parts();
    match ByMember::from_request_parts(&mut parts, &()).await {
        Err(refusal) => refusal,
        Ok(ByMember) => {
            Refusal(Error::new(Code::RouteUnknown, format!("the agent has nothing at {}", parts.uri.path())))
        }
    }
}

async fn unknown_method(request: Request) -> Refusal {
    let (mut parts, _) = request.into_parts();
    match ByMember::from_request_parts(&mut parts, &()).await {
        Err(refusal) => refusal,
        Ok(ByMember) => {
            let message = format!("{} does not take the method {}", parts.uri.path(), parts.method);
            Refusal(Error::new(Code::MethodNotAllowed, message))
        }
    }
}

type Reply<T> = Result<Json<T>, Refusal>;

fn reply<T>(answer: Answer<T>) -> Reply<T> {
    answer.map(Json).map_err(Refusal)
}

/// What an operator asks for is on record, whatever comes of it.
fn audited<T>(operator: &impl fmt::Display, what: &str, answer: Answer<T>) -> Reply<T> {
    match &answer {
        Ok(_) => tracing::info!(%operator, "{what}: accepted"),
        Err(error) => tracing::info!(%operator, code = error.code, "{what}: {}", error.message),
    }
    reply(answer)
}

async fn status<B: Backend>(_: ByMember, State(shared): Ctx<B>) -> Reply<Status> {
    reply(shared.backend.status().await)
}

async fn history<B: Backend>(
    _: ByMember,
    State(shared): Ctx<B>,
    QueryOf(query): QueryOf<HistoryQuery>,
) -> Reply<History> {
    reply(shared.backend.history(query).await)
}

async fn explain<B: Backend>(_: ByMember, State(shared): Ctx<B>) -> Reply<Explain> {
    reply(shared.backend.explain().await)
}

async fn check<B: Backend>(_: ByMember, State(shared): Ctx<B>) -> Reply<CheckReport> {
    reply(shared.backend.check().await)
}

async fn spec<B: Backend>(_: ByMember, State(shared): Ctx<B>) -> Reply<Spec> {
    reply(shared.backend.spec().await)
}

async fn logs<B: Backend>(
    _: ByMember,
    State(shared): Ctx<B>,
    QueryOf(query): QueryOf<LogsQuery>,
) -> Result<Response<Body>, Refusal> {
    stream::lines(shared.backend.logs(query).await?, &shared.streams)
}

async fn routing<B: Backend>(
    ByFollower { proxy }: ByFollower,
    State(shared): Ctx<B>,
    QueryOf(query): QueryOf<RoutingQuery>,
) -> Result<Response<Body>, Refusal> {
    if let Some(named) = &query.proxy
        && proxy.as_ref().map(NodeName::as_str) != Some(named)
    {
        let message = format!("{} is not the proxy that asks", excerpt(named));
        return Err(Error::new(Code::CredentialsInsufficient, message).into());
    }
    stream::lines(shared.backend.routing(query).await?, &shared.streams)
}

async fn proxy<B: Backend>(
    _: ByFollower,
    State(shared): Ctx<B>,
    QueryOf(query): QueryOf<ProxyQuery>,
) -> Reply<ProxySettings> {
    reply(shared.backend.proxy(query).await)
}

async fn change<B: Backend>(
    _: ByMember,
    State(shared): Ctx<B>,
    Path(request_id): Path<String>,
) -> Reply<Change> {
    reply(shared.backend.change(request_id).await)
}

async fn plan<B: Backend>(
    _: ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<PlanRequest>,
) -> Reply<Plan> {
    reply(shared.backend.plan(request).await)
}

async fn apply<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<ApplyRequest>,
) -> Reply<Applied> {
    let what = format!("apply over generation {}", request.generation);
    audited(&operator, &what, shared.backend.apply(&operator, request).await)
}

async fn switchover<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<SwitchoverRequest>,
) -> Reply<Change> {
    let what = format!("switchover {} to {:?}", request.request_id, request.to);
    audited(&operator, &what, shared.backend.switchover(&operator, request).await)
}

async fn backup<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<BackupRequest>,
) -> Reply<BackupAsked> {
    audited(&operator, "base backup", shared.backend.backup(&operator, request).await)
}

async fn switchover_cancel<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<SwitchoverCancelRequest>,
) -> Reply<Change> {
    audited(&operator, "cancel of a switchover", shared.backend.switchover_cancel(&operator, request).await)
}

async fn failover<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<FailoverRequest>,
) -> Reply<Change> {
    let loss = if request.accept_data_loss { ", accepting data loss" } else { "" };
    let what = format!("failover {} to {:?}{loss}", request.request_id, request.to);
    audited(&operator, &what, shared.backend.failover(&operator, request).await)
}

async fn restore<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<RestoreRequest>,
) -> Reply<RestoreAnswer> {
    let what = format!("restore of the cluster {}: {:?}", request.request_id, request.step);
    audited(&operator, &what, shared.backend.restore(&operator, request).await)
}

async fn token_create<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<TokenRequest>,
) -> Reply<Token> {
    let what = format!("join token for {:?}, valid for {} s", request.node, request.valid_for_s);
    audited(&operator, &what, shared.backend.token_create(&operator, request).await)
}

async fn operator_add<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<OperatorRequest>,
) -> Reply<OperatorAnswer> {
    let what = format!("operator {:?}, valid for {} s", request.name, request.valid_for_s);
    audited(&operator, &what, shared.backend.operator_add(&operator, request).await)
}

async fn proxy_add<B: Backend>(
    ByOperator(operator): ByOperator,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<ProxyRequest>,
) -> Reply<ProxyAnswer> {
    let what = format!("proxy {:?}, valid for {} s", request.name, request.valid_for_s);
    audited(&operator, &what, shared.backend.proxy_add(&operator, request).await)
}

async fn drained<B: Backend>(
    ByProxy(proxy): ByProxy,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<Drained>,
) -> Reply<()> {
    reply(shared.backend.drained(&proxy, request).await)
}

async fn promote<B: Backend>(
    ByProxy(proxy): ByProxy,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<PromoteRequest>,
) -> Reply<Change> {
    let what = format!("switchover {} to {}, by role {:?}", request.request_id, request.to, request.role);
    audited(&format!("proxy {proxy}"), &what, shared.backend.promote(&proxy, request).await)
}

async fn proxy_renew<B: Backend>(
    ByProxy(proxy): ByProxy,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<ProxyRenewRequest>,
) -> Reply<ProxyAnswer> {
    reply(shared.backend.proxy_renew(&proxy, request).await)
}

async fn join<B: Backend>(
    ByAnyone { address }: ByAnyone,
    State(shared): Ctx<B>,
    StrangerBody(request): StrangerBody<JoinRequest>,
) -> Reply<JoinAnswer> {
    let node = excerpt(&request.node);
    let answer = shared.backend.join(request).await;
    match &answer {
        Ok(answer) => tracing::info!(node, raft_id = answer.raft_id, %address, "a node joins the herd"),
        Err(error) => shared
            .refusals
            .warn(format_args!("a join of {node:?} from {address} was refused: {}", error.message)),
    }
    reply(answer)
}

async fn renew<B: Backend>(
    ByNode(node): ByNode,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<RenewRequest>,
) -> Reply<RenewAnswer> {
    reply(shared.backend.renew(&node, request).await)
}

async fn objects<B: Backend>(
    _: ByMember,
    State(shared): Ctx<B>,
    request: Request,
) -> Result<RawJson, Refusal> {
    // Before the body is read. Nobody closes it.
    let _turn = shared.objects.acquire().await;
    let ObjectBody(body) = ObjectBody::from_request(request, &()).await?;
    Ok(RawJson(shared.backend.objects(body).await?))
}

async fn wal<B: Backend>(
    ByNode(node): ByNode,
    State(shared): Ctx<B>,
    JsonBody(request): JsonBody<WalAsk>,
) -> Result<RawJson, Refusal> {
    // Nobody closes it.
    let _turn = shared.wal.acquire().await;
    Ok(RawJson(shared.backend.wal(&node, request).await?))
}

async fn raft<B: Backend>(
    ByNode(node): ByNode,
    State(shared): Ctx<B>,
    Path(rpc): Path<String>,
    RaftBody(body): RaftBody,
) -> Result<RawJson, Refusal> {
    Ok(RawJson(shared.backend.raft_rpc(&node, &rpc, body).await?))
}

async fn peer_report<B: Backend>(
    ByNode(node): ByNode,
    State(shared): Ctx<B>,
    PeerBody(body): PeerBody,
) -> Result<RawJson, Refusal> {
    Ok(RawJson(shared.backend.peer_report(&node, body).await?))
}

async fn fenced<B: Backend>(
    ByAnyone { address }: ByAnyone,
    State(shared): Ctx<B>,
    StrangerBody(message): StrangerBody<Fenced>,
) -> Reply<()> {
    let (member, term) = (excerpt(&message.member), message.term);
    let answer = shared.backend.fenced(message).await;
    match &answer {
        Ok(()) => tracing::info!(member, term, %address, "a fenced node gave up its term"),
        Err(error) => {
            shared.refusals.warn(format_args!(
                "a release of term {term} by {member:?} from {address} was refused: {}",
                error.message
            ));
        }
    }
    reply(answer)
}

/// What a stranger sent, for a log: no more of it than a name can have.
fn excerpt(text: &str) -> String {
    text.chars().take(NodeName::MAX_BYTES).collect()
}
