//! A client of `/v1/`: HTTP/1.1 over mutual TLS to one agent, or over a Unix socket.
//!
//! Agents use it for Raft and for their reports several times a second, the command line for everything
//! else. Responsible for: proving that the agent at the other end is the one that was dialled, keeping
//! connections, and ending every call at its deadline. Leaves out: what to do about a failure.
//!
//! A [`Client`] talks to one agent. Whoever talks to several has several, and so a dead agent can only
//! ever delay the calls made to itself.
//!
//! Hazard: a call that hangs would hold up an election; a call that is repeated though it may have been
//! done would do it twice. So nothing waits past its deadline, and only what is marked repeatable, or
//! was provably never sent, is sent again.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{StatusCode, Uri};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Code, Error, ExitClass};
use crate::route::{self, Method, Route};
use crate::{change, join, logs, objects, peer, proxy, report, routing, spec, status, wal};

mod connection;
mod lines;
mod tls;

pub use lines::Lines;
pub use tls::{CaPin, ClientTls, TlsError};

use connection::{Lease, Pool};

/// How long a call may take unless [`Client::within`] says otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// Largest answer that is read into memory: a history of years fits many times.
pub const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Where an agent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `address` is `host:port` or `ip:port`. The agent's certificate must be that of `node`; with `None`
    /// any node of the herd will do, which is what an operator with a list of URLs wants.
    Tls {
        address: String,
        node: Option<String>,
    },
    Unix {
        path: PathBuf,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tls { address, node: Some(node) } => write!(f, "{node} ({address})"),
            Endpoint::Tls { address, node: None } => f.write_str(address),
            Endpoint::Unix { path } => write!(f, "{}", path.display()),
        }
    }
}

/// How far a call had come when its time was up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Connecting,
    Waiting,
    Reading,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Connecting => "while connecting",
            Phase::Waiting => "while waiting for the answer",
            Phase::Reading => "while reading the answer",
        })
    }
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    #[error("no connection to {peer}")]
    Unreachable { peer: String, cause: String },
    #[error("{peer} and this side do not accept each other's certificates")]
    NotTrusted { peer: String, cause: String },
    #[error("no answer from {peer} within {deadline_ms} ms, {phase}")]
    DeadlinePassed { peer: String, deadline_ms: u64, phase: Phase },
    #[error("the connection to {peer} broke")]
    Broken { peer: String, cause: String },
    #[error("what came from {peer} is not an answer of a pgherd agent")]
    Protocol { peer: String, cause: String },
    /// The agent answered, and the answer is an error.
    #[error("{}", .error.message)]
    Answered { peer: String, http_status: u16, error: Error },
}

impl CallError {
    /// The same for users: message, cause, hint and code.
    pub fn to_error(&self) -> Error {
        let with_cause = |code, cause: &String| Error::new(code, self.to_string()).because(cause);
        match self {
            CallError::Unreachable { cause, .. } | CallError::Broken { cause, .. } => {
                with_cause(Code::PeerUnreachable, cause)
            }
            CallError::NotTrusted { cause, .. } => with_cause(Code::PeerNotTrusted, cause),
            CallError::DeadlinePassed { .. } => Error::new(Code::DeadlinePassed, self.to_string()),
            CallError::Protocol { cause, .. } => with_cause(Code::PeerProtocol, cause),
            CallError::Answered { error, .. } => error.clone(),
        }
    }

    pub fn exit_class(&self) -> ExitClass {
        match self {
            CallError::Answered { http_status, error, .. } => error.exit_class(*http_status),
            CallError::DeadlinePassed { .. } => ExitClass::TimedOut,
            _ => ExitClass::Failed,
        }
    }

    /// Whether the request certainly had no effect: it never left, or was refused.
    pub fn was_not_done(&self) -> bool {
        match self {
            CallError::Unreachable { .. } | CallError::NotTrusted { .. } => true,
            CallError::DeadlinePassed { phase, .. } => *phase == Phase::Connecting,
            CallError::Answered { http_status, .. } => *http_status < 500,
            CallError::Broken { .. } | CallError::Protocol { .. } => false,
        }
    }
}

/// One request. The body is JSON, whoever made it, or begins with it.
#[derive(Clone, Debug)]
pub struct Request {
    method: Method,
    target: String,
    body: Bytes,
    repeatable: bool,
    /// A longer answer is none.
    answer_bytes: usize,
}

impl Request {
    pub fn get(target: impl Into<String>) -> Request {
        Request { repeatable: true, ..Request::new(Method::Get, target.into(), Bytes::new()) }
    }

    pub fn post(target: impl Into<String>, body: Bytes) -> Request {
        Request::new(Method::Post, target.into(), body)
    }

    fn new(method: Method, target: String, body: Bytes) -> Request {
        Request { method, target, body, repeatable: false, answer_bytes: MAX_ANSWER_BYTES }
    }

    /// Doing it twice is as good as once: it may be sent again on another connection if the one it was
    /// sent on turns out to be dead.
    pub fn repeatable(mut self) -> Request {
        self.repeatable = true;
        self
    }
}

/// Cheap to clone; clones share their connections.
#[derive(Clone, Debug)]
pub struct Client {
    pool: Arc<Pool>,
    deadline: Duration,
}

impl Client {
    pub fn tls(address: impl Into<String>, node: Option<&str>, tls: Arc<ClientTls>) -> Client {
        let endpoint = Endpoint::Tls { address: address.into(), node: node.map(str::to_owned) };
        Client { pool: Pool::new(endpoint, Some(tls)), deadline: DEFAULT_DEADLINE }
    }

    pub fn unix(path: impl Into<PathBuf>) -> Client {
        Client { pool: Pool::new(Endpoint::Unix { path: path.into() }, None), deadline: DEFAULT_DEADLINE }
    }

    /// The same client, with another deadline for each whole call: connecting, asking and reading.
    pub fn within(&self, deadline: Duration) -> Client {
        Client { pool: Arc::clone(&self.pool), deadline }
    }

    pub fn endpoint(&self) -> &Endpoint {
        self.pool.endpoint()
    }

    /// Sends a request and reads the whole answer. Anything but a success is [`CallError::Answered`].
    pub async fn send(&self, request: Request) -> Result<Bytes, CallError> {
        let mut phase = Phase::Connecting;
        let call = async {
            let (lease, response) = self.exchange(&request, &mut phase).await?;
            phase = Phase::Reading;
            self.read_answer(lease, response, request.answer_bytes).await
        };
        let outcome = tokio::time::timeout(self.deadline, call).await;
        outcome.unwrap_or_else(|_| Err(self.deadline_passed(phase)))
    }

    /// Sends a request whose answer is a stream of JSON lines. The deadline is for the answer's beginning;
    /// after that, silence for longer than [`lines::MAX_SILENCE`] ends it.
    pub async fn stream<T: DeserializeOwned>(&self, request: Request) -> Result<Lines<T>, CallError> {
        let mut phase = Phase::Connecting;
        let call = async {
            let (lease, response) = self.exchange(&request, &mut phase).await?;
            if response.status() == StatusCode::OK {
                return Ok(Lines::new(lease, response.into_body(), self.endpoint().to_string()));
            }
            phase = Phase::Reading;
            match self.read_answer(lease, response, MAX_ANSWER_BYTES).await {
                Ok(_) => Err(self.protocol("a success that is not a stream")),
                Err(error) => Err(error),
            }
        };
        let outcome = tokio::time::timeout(self.deadline, call).await;
        outcome.unwrap_or_else(|_| Err(self.deadline_passed(phase)))
    }

    /// `GET`, and the answer's type.
    pub async fn get<T: DeserializeOwned>(&self, target: impl Into<String>) -> Result<T, CallError> {
        self.decode(&self.send(Request::get(target)).await?)
    }

    /// `POST`, not repeatable.
    pub async fn post<T: DeserializeOwned>(
        &self,
        route: Route,
        body: &impl Serialize,
    ) -> Result<T, CallError> {
        let body = serde_json::to_vec(body).expect("wire types have text keys and no failing serializer");
        self.decode(&self.send(Request::post(route.path, body.into())).await?)
    }

    fn decode<T: DeserializeOwned>(&self, answer: &[u8]) -> Result<T, CallError> {
        serde_json::from_slice(answer).map_err(|error| self.protocol(error))
    }

    /// Until the head of the answer is there.
    async fn exchange(
        &self,
        request: &Request,
        phase: &mut Phase,
    ) -> Result<(Lease, hyper::Response<hyper::body::Incoming>), CallError> {
        /// For deadlines that no clock can hold.
        const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);
        let until = Instant::now() + self.deadline.min(FOR_EVER);
        loop {
            *phase = Phase::Connecting;
            let mut lease = self.pool.checkout(until).await?;
            *phase = Phase::Waiting;
            let reused = lease.was_used_before();
            match lease.send(self.encode(request)).await {
                Ok(response) => return Ok((lease, response)),
                // A kept connection may have been closed by the other side at this very moment. A fresh one
                // that fails is news.
                Err(failed) if reused && (failed.never_sent || request.repeatable) => continue,
                Err(failed) => return Err(connection::call_error(self.endpoint(), &failed.error)),
            }
        }
    }

    fn encode(&self, request: &Request) -> hyper::Request<Full<Bytes>> {
        let mut encoded = hyper::Request::new(Full::new(request.body.clone()));
        *encoded.method_mut() = match request.method {
            Method::Get => hyper::Method::GET,
            Method::Post => hyper::Method::POST,
        };
        // A target that is no URI would be a node name or id that nobody validated: ask for nothing, and let
        // the server say that it does not know this address.
        *encoded.uri_mut() =
            request.target.parse().unwrap_or_else(|_| Uri::from_static("/v1/target-is-not-a-uri"));
        let headers = encoded.headers_mut();
        headers.insert(HOST, self.pool.host_header());
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("pgherd/", env!("CARGO_PKG_VERSION"))));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        if request.method == Method::Post {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        encoded
    }

    async fn read_answer(
        &self,
        mut lease: Lease,
        response: hyper::Response<hyper::body::Incoming>,
        limit: usize,
    ) -> Result<Bytes, CallError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), limit);
        let bytes = match body.collect().await {
            Ok(collected) => collected.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => {
                return Err(self.protocol(format!("the answer is longer than {limit} bytes")));
            }
            Err(error) => {
                return Err(CallError::Broken {
                    peer: self.endpoint().to_string(),
                    cause: error.to_string(),
                });
            }
        };
        lease.keep();
        if status.is_success() {
            return Ok(bytes);
        }
        match serde_json::from_slice::<Error>(&bytes) {
            Ok(error) => Err(CallError::Answered {
                peer: self.endpoint().to_string(),
                http_status: status.as_u16(),
                error,
            }),
            Err(_) => Err(self.protocol(format!("HTTP status {status} without an error of pgherd"))),
        }
    }

    fn protocol(&self, cause: impl fmt::Display) -> CallError {
        CallError::Protocol { peer: self.endpoint().to_string(), cause: cause.to_string() }
    }

    fn deadline_passed(&self, phase: Phase) -> CallError {
        let deadline_ms = u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX);
        CallError::DeadlinePassed { peer: self.endpoint().to_string(), deadline_ms, phase }
    }
}

/// The routes, by name.
impl Client {
    pub async fn status(&self) -> Result<status::Status, CallError> {
        self.get(route::STATUS.path).await
    }

    pub async fn history(&self, query: &report::HistoryQuery) -> Result<report::History, CallError> {
        let limit = query.limit.map(|limit| limit.to_string());
        self.get(with_query(
            route::HISTORY.path,
            &[("cluster", query.cluster.as_deref()), ("limit", limit.as_deref())],
        ))
        .await
    }

    pub async fn explain(&self) -> Result<report::Explain, CallError> {
        self.get(route::EXPLAIN.path).await
    }

    pub async fn check(&self) -> Result<report::CheckReport, CallError> {
        self.get(route::CHECK.path).await
    }

    pub async fn spec(&self) -> Result<spec::Spec, CallError> {
        self.get(route::SPEC.path).await
    }

    pub async fn plan(&self, request: &spec::PlanRequest) -> Result<spec::Plan, CallError> {
        self.post(route::PLAN, request).await
    }

    pub async fn apply(&self, request: &spec::ApplyRequest) -> Result<spec::Applied, CallError> {
        self.post(route::APPLY, request).await
    }

    pub async fn switchover(&self, request: &change::SwitchoverRequest) -> Result<change::Change, CallError> {
        self.post(route::SWITCHOVER, request).await
    }

    pub async fn switchover_cancel(
        &self,
        request: &change::SwitchoverCancelRequest,
    ) -> Result<change::Change, CallError> {
        self.post(route::SWITCHOVER_CANCEL, request).await
    }

    pub async fn failover(&self, request: &change::FailoverRequest) -> Result<change::Change, CallError> {
        self.post(route::FAILOVER, request).await
    }

    pub async fn restore(
        &self,
        request: &change::RestoreRequest,
    ) -> Result<change::RestoreAnswer, CallError> {
        self.post(route::RESTORE, request).await
    }

    pub async fn backup(&self, request: &change::BackupRequest) -> Result<change::BackupAsked, CallError> {
        self.post(route::BACKUP, request).await
    }

    pub async fn change(&self, request_id: &str) -> Result<change::Change, CallError> {
        self.get(route::CHANGE.with(&escape(request_id))).await
    }

    pub async fn logs(&self, query: &logs::LogsQuery) -> Result<Lines<logs::LogLine>, CallError> {
        let tail = query.tail.map(|tail| tail.to_string());
        let pairs = [
            ("node", query.node.as_deref()),
            ("follow", query.follow.then_some("true")),
            ("tail", tail.as_deref()),
        ];
        self.stream(Request::get(with_query(route::LOGS.path, &pairs))).await
    }

    pub async fn routing(
        &self,
        query: &routing::RoutingQuery,
    ) -> Result<Lines<routing::RoutingTable>, CallError> {
        let pairs = [
            ("cluster", query.cluster.as_deref()),
            ("proxy", query.proxy.as_deref()),
            ("process", query.process.as_deref()),
            ("listen", query.listen.as_deref()),
            ("read_listen", query.read_listen.as_deref()),
        ];
        self.stream(Request::get(with_query(route::ROUTING.path, &pairs))).await
    }

    pub async fn token_create(&self, request: &join::TokenRequest) -> Result<join::Token, CallError> {
        self.post(route::TOKEN_CREATE, request).await
    }

    pub async fn join(&self, request: &join::JoinRequest) -> Result<join::JoinAnswer, CallError> {
        self.post(route::JOIN, request).await
    }

    pub async fn renew(&self, request: &join::RenewRequest) -> Result<join::RenewAnswer, CallError> {
        self.post(route::RENEW, request).await
    }

    pub async fn operator_add(
        &self,
        request: &join::OperatorRequest,
    ) -> Result<join::OperatorAnswer, CallError> {
        self.post(route::OPERATOR_ADD, request).await
    }

    pub async fn proxy(&self, query: &proxy::ProxyQuery) -> Result<proxy::ProxySettings, CallError> {
        self.get(with_query(route::PROXY.path, &[("cluster", query.cluster.as_deref())])).await
    }

    pub async fn proxy_add(&self, request: &join::ProxyRequest) -> Result<join::ProxyAnswer, CallError> {
        self.post(route::PROXY_ADD, request).await
    }

    pub async fn proxy_renew(
        &self,
        request: &join::ProxyRenewRequest,
    ) -> Result<join::ProxyAnswer, CallError> {
        self.post(route::PROXY_RENEW, request).await
    }

    pub async fn drained(&self, request: &routing::Drained) -> Result<(), CallError> {
        self.post(route::DRAINED, request).await
    }

    pub async fn promote(&self, request: &change::PromoteRequest) -> Result<change::Change, CallError> {
        self.post(route::PROMOTE, request).await
    }

    /// Raft's own requests may be repeated: that is what Raft is made for.
    pub async fn raft(&self, rpc: &str, body: Bytes) -> Result<Bytes, CallError> {
        self.send(Request::post(route::RAFT.with(&escape(rpc)), body).repeatable()).await
    }

    pub async fn peer_report(&self, body: Bytes) -> Result<Bytes, CallError> {
        self.send(Request::post(route::PEER_REPORT.path, body).repeatable()).await
    }

    /// Objects of the repository that the agent keeps. May be repeated: each is written once.
    pub async fn objects(
        &self,
        ask: &objects::Ask,
        bytes: &[u8],
    ) -> Result<(objects::Told, Bytes), CallError> {
        let mut request = Request::post(route::OBJECTS.path, objects::join(ask, bytes)).repeatable();
        request.answer_bytes = objects::MAX_OBJECTS_BYTES;
        objects::split(&self.send(request).await?).map_err(|error| self.protocol(error))
    }

    /// WAL that the agent's server still keeps.
    pub async fn wal(&self, ask: &wal::WalAsk) -> Result<(wal::WalTold, Bytes), CallError> {
        let body = serde_json::to_vec(ask).expect("a struct of texts and numbers");
        let mut request = Request::post(route::WAL.path, body.into()).repeatable();
        request.answer_bytes = wal::MAX_WAL_BYTES;
        objects::split(&self.send(request).await?).map_err(|error| self.protocol(error))
    }

    /// May be repeated: a term is given up once, however often that is said.
    pub async fn fenced(&self, message: &peer::Fenced) -> Result<(), CallError> {
        let body = serde_json::to_vec(message).expect("a struct of texts and numbers");
        let answer = self.send(Request::post(route::FENCED.path, body.into()).repeatable()).await?;
        self.decode(&answer)
    }
}

fn with_query(path: &str, pairs: &[(&str, Option<&str>)]) -> String {
    let mut target = path.to_owned();
    let mut separator = '?';
    for (name, value) in pairs {
        if let Some(value) = value {
            target.push(separator);
            target.push_str(name);
            target.push('=');
            target.push_str(&escape(value));
            separator = '&';
        }
    }
    target
}

/// Percent-encodes everything but unreserved characters.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_cannot_break_out_of_its_value() {
        let target = with_query("/v1/logs", &[("node", Some("a&follow=true ü")), ("tail", None)]);
        assert_eq!(target, "/v1/logs?node=a%26follow%3Dtrue%20%C3%BC");
        assert!(target.parse::<Uri>().is_ok());
    }
}
