//! The connections to one agent: made in the background, lent to one call at a time, kept for the next.
//!
//! A connection is made by a task of its own and not by the call that wants it, because a call's deadline
//! may be shorter than a handshake over a slow line: the call fails, the handshake goes on, and the next
//! call finds its result. Where several attempts hang (the agent is cut off), a new one starts every
//! [`ATTEMPT_INTERVAL`], so that the end of the cut is noticed at once and not when TCP sends its next SYN.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::HeaderValue;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{CertificateError, OtherError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;

use super::{CallError, ClientTls, Endpoint};

/// Connections to one agent at a time, streams included. More calls than that wait for their turn.
const MAX_CONNECTIONS: usize = 32;

/// Idle connections that are kept.
const MAX_IDLE: usize = 8;

/// A connection that was idle for longer is not used again: the server closes it after
/// [`crate::route::KEEP_ALIVE`], and a request that crosses that close is lost.
const MAX_IDLE_AGE: Duration = Duration::from_secs(7);

/// For TCP and TLS together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// While attempts hang, another one is started this often.
const ATTEMPT_INTERVAL: Duration = Duration::from_secs(1);

/// Attempts under way at a time.
const MAX_ATTEMPTS: usize = 8;

/// A call without a connection.
#[derive(Debug)]
struct Waiter {
    sender: oneshot::Sender<Result<Connection, CallError>>,
    until: Instant,
}

#[derive(Debug)]
pub(super) struct Pool {
    endpoint: Endpoint,
    tls: Option<Arc<ClientTls>>,
    host: HeaderValue,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The one used last is at the end and is used next.
    idle: Vec<Connection>,
    waiters: VecDeque<Waiter>,
    /// When each attempt under way was started.
    attempts: Vec<Instant>,
    lent: usize,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// Reads and writes the socket. Ends with this connection, whatever state it is in.
    driver: AbortHandle,
    tls_generation: u64,
    idle_since: Instant,
    used: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// A connection lent to one call. Unless [`Lease::keep`] is called it is closed when dropped: a call that
/// ended early has left half an exchange on it.
#[derive(Debug)]
pub(super) struct Lease {
    pool: Arc<Pool>,
    connection: Option<Connection>,
    keep: bool,
}

/// A request that got no answer.
pub(super) struct SendFailed {
    pub(super) error: hyper::Error,
    pub(super) never_sent: bool,
}

impl Pool {
    pub(super) fn new(endpoint: Endpoint, tls: Option<Arc<ClientTls>>) -> Arc<Pool> {
        let host = match &endpoint {
            Endpoint::Tls { address, .. } => address.as_str(),
            Endpoint::Unix { .. } => "localhost",
        };
        let host = HeaderValue::from_str(host).unwrap_or(HeaderValue::from_static("invalid"));
        Arc::new(Pool { endpoint, tls, host, state: Mutex::default() })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(super) fn host_header(&self) -> HeaderValue {
        self.host.clone()
    }

    /// An idle connection, or the next one that becomes free or is made, for a call that ends at `until`.
    pub(super) async fn checkout(self: &Arc<Pool>, until: Instant) -> Result<Lease, CallError> {
        let receiver = {
            let mut state = self.lock();
            if let Some(connection) = self.take_idle(&mut state) {
                state.lent += 1;
                return Ok(self.lend(connection));
            }
            let (sender, receiver) = oneshot::channel();
            state.waiters.push_back(Waiter { sender, until });
            self.start_attempts(&mut state);
            receiver
        };
        match receiver.await {
            Ok(Ok(connection)) => {
                self.lock().lent += 1;
                Ok(self.lend(connection))
            }
            Ok(Err(error)) => Err(error),
            Err(_) => unreachable!("a waiter is answered or dropped by its own call"),
        }
    }

    fn lend(self: &Arc<Pool>, connection: Connection) -> Lease {
        Lease { pool: Arc::clone(self), connection: Some(connection), keep: false }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_idle(&self, state: &mut State) -> Option<Connection> {
        let generation = self.tls_generation();
        while let Some(connection) = state.idle.pop() {
            let fresh = connection.idle_since.elapsed() < MAX_IDLE_AGE;
            if fresh && connection.tls_generation == generation && !connection.sender.is_closed() {
                return Some(connection);
            }
        }
        None
    }

    fn tls_generation(&self) -> u64 {
        self.tls.as_ref().map_or(0, |tls| tls.generation())
    }

    /// As many attempts as calls wait, not counting those that have hung for a while.
    fn start_attempts(self: &Arc<Pool>, state: &mut State) {
        state.waiters.retain(|waiter| !waiter.sender.is_closed());
        loop {
            let young = state.attempts.iter().filter(|start| start.elapsed() < ATTEMPT_INTERVAL).count();
            let open = state.lent + state.idle.len() + state.attempts.len();
            if young >= state.waiters.len() || state.attempts.len() >= MAX_ATTEMPTS || open >= MAX_CONNECTIONS
            {
                return;
            }
            let start = Instant::now();
            state.attempts.push(start);
            tokio::spawn(Arc::clone(self).attempt(start));
        }
    }

    async fn attempt(self: Arc<Pool>, start: Instant) {
        let outcome = match tokio::time::timeout(CONNECT_DEADLINE, self.connect()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(CallError::Unreachable {
                peer: self.endpoint.to_string(),
                cause: format!("no connection within {} s", CONNECT_DEADLINE.as_secs()),
            }),
        };
        let mut state = self.lock();
        if let Some(index) = state.attempts.iter().position(|other| *other == start) {
            state.attempts.swap_remove(index);
        }
        match outcome {
            // A call takes one round trip, and TCP and TLS have just taken two. A call with less time left would
            // fail and take the connection down with itself.
            Ok(connection) => Self::hand_on(&mut state, connection, start.elapsed() / 2),
            // A younger attempt may still succeed.
            Err(_) if !state.attempts.is_empty() => {}
            Err(error) => {
                for waiter in state.waiters.drain(..) {
                    drop(waiter.sender.send(Err(error.clone())));
                }
            }
        }
    }

    /// To the call that has waited longest and has `needed` time left, else to the idle ones.
    fn hand_on(state: &mut State, mut connection: Connection, needed: Duration) {
        let enough = Instant::now() + needed;
        let mut next = 0;
        while let Some(waiter) = state.waiters.get(next) {
            if waiter.until < enough {
                next += 1;
                continue;
            }
            let waiter = state.waiters.remove(next).expect("it was just looked at");
            match waiter.sender.send(Ok(connection)) {
                Ok(()) => return,
                Err(Ok(returned)) => connection = returned,
                Err(Err(_)) => unreachable!("what comes back is what was sent"),
            }
        }
        connection.idle_since = Instant::now();
        if state.idle.len() >= MAX_IDLE {
            state.idle.remove(0);
        }
        state.idle.push(connection);
    }

    async fn connect(&self) -> Result<Connection, CallError> {
        let generation = self.tls_generation();
        let unreachable = |error: io::Error| CallError::Unreachable {
            peer: self.endpoint.to_string(),
            cause: error.to_string(),
        };
        let (sender, driver) = match (&self.endpoint, &self.tls) {
            (Endpoint::Unix { path }, _) => {
                self.start_http(UnixStream::connect(path).await.map_err(unreachable)?).await?
            }
            (Endpoint::Tls { address, node }, Some(tls)) => {
                let stream = TcpStream::connect(address.as_str()).await.map_err(unreachable)?;
                stream.set_nodelay(true).map_err(unreachable)?;
                let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
                let name = node.as_deref().unwrap_or(host.trim_start_matches('[').trim_end_matches(']'));
                let name = ServerName::try_from(name.to_owned()).map_err(|error| CallError::NotTrusted {
                    peer: self.endpoint.to_string(),
                    cause: format!("\"{name}\" cannot be the name of a node or host: {error}"),
                })?;
                let connector = TlsConnector::from(tls.config(node.is_none()));
                let stream = connector.connect(name, stream).await;
                self.start_http(stream.map_err(|error| io_error(&self.endpoint, &error))?).await?
            }
            (Endpoint::Tls { .. }, None) => unreachable!("Client::tls is the only maker of a TLS endpoint"),
        };
        Ok(Connection { sender, driver, tls_generation: generation, idle_since: Instant::now(), used: false })
    }

    async fn start_http<S>(&self, stream: S) -> Result<(SendRequest<Full<Bytes>>, AbortHandle), CallError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake = http1::Builder::new().handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| call_error(&self.endpoint, &error))?;
        // Its errors come back through the request that meets them.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok((sender, driver.abort_handle()))
    }
}

impl Lease {
    pub(super) fn was_used_before(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.used)
    }

    pub(super) async fn send(
        &mut self,
        request: hyper::Request<Full<Bytes>>,
    ) -> Result<hyper::Response<Incoming>, SendFailed> {
        let connection = self.connection.as_mut().expect("a lease holds its connection until dropped");
        // The answer before this one has been read, but the driver may not have noticed yet.
        if let Err(error) = connection.sender.ready().await {
            return Err(SendFailed { never_sent: true, error });
        }
        connection.sender.try_send_request(request).await.map_err(|mut failed| SendFailed {
            never_sent: failed.take_message().is_some(),
            error: failed.into_error(),
        })
    }

    /// The exchange is complete: others may use the connection.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        connection.used = true;
        let mut state = self.pool.lock();
        state.lent -= 1;
        if self.keep
            && connection.tls_generation == self.pool.tls_generation()
            && !connection.sender.is_closed()
        {
            Pool::hand_on(&mut state, connection, Duration::ZERO);
        } else {
            drop(connection);
        }
        self.pool.start_attempts(&mut state);
    }
}

pub(super) fn call_error(endpoint: &Endpoint, error: &hyper::Error) -> CallError {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            return match io_error(endpoint, error) {
                CallError::Unreachable { peer, cause } => CallError::Broken { peer, cause },
                other => other,
            };
        }
        source = cause.source();
    }
    let peer = endpoint.to_string();
    match error.is_parse() {
        true => CallError::Protocol { peer, cause: error.to_string() },
        false => CallError::Broken { peer, cause: error.to_string() },
    }
}

/// A refused certificate travels inside an I/O error.
fn io_error(endpoint: &Endpoint, error: &io::Error) -> CallError {
    let peer = endpoint.to_string();
    let cause = error.to_string();
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        // This side's own verdict; rustls would show it as a Rust value.
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(verdict)))) => {
            CallError::NotTrusted { peer, cause: verdict.to_string() }
        }
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_)) => {
            CallError::NotTrusted { peer, cause }
        }
        Some(_) => CallError::Protocol { peer, cause },
        None => CallError::Unreachable { peer, cause },
    }
}
