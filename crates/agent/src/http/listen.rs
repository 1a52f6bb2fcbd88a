//! Accepting connections, and the limits that every one of them is under.
//!
//! A stranger, on the API's port, is whoever has not shown a certificate (yet). Strangers are few in number,
//! and few from one address, so that no flood of half-open connections keeps the nodes of the herd from
//! each other; a node that has shown its certificate is counted elsewhere.
//!
//! Hazard: an accept loop that ends. Running out of descriptors is survived by waiting: the agent's work for
//! PostgreSQL goes on over the connections that it has.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use pgherd_api::route::KEEP_ALIVE;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tower::Service;

use super::backend::Backend;
use super::caller::{Address, Caller};
use super::health;
use super::sparingly::Sparingly;
use super::v1::Api;
use crate::metrics::Metrics;
use crate::pki::{OperatorName, ServerTls, authenticated};

/// From the TCP connection to the end of the TLS handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// Without a certificate, from all addresses together and from one.
const MAX_STRANGERS: usize = 512;
const MAX_STRANGERS_PER_ADDRESS: usize = 32;

/// With a certificate.
const MAX_MEMBERS: usize = 1024;

/// On the health port, and on the socket.
const MAX_HEALTH: usize = 256;
const MAX_SOCKET: usize = 128;
/// Of a proxy's metrics: a few that ask every few seconds, and a slow one.
const MAX_METRICS: usize = 16;
/// A connection for them lasts no longer, whoever reads however slowly.
const METRICS_WITHIN: Duration = Duration::from_secs(60);

/// A peer that acknowledges nothing for so long, or keeps its window shut, is cut off by the kernel.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// Request heads: hyper's least is 8 KiB.
const MAX_HEAD_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

/// After an accept that failed for want of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// For requests under way when the listener is told to stop.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);

/// Tells listeners to stop; dropping the sender does, too.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    pub fn new() -> (watch::Sender<bool>, Stop) {
        let (sender, receiver) = watch::channel(false);
        (sender, Stop(receiver))
    }

    async fn requested(&mut self) {
        // An error means that the sender is gone, and with it whoever wanted this served.
        drop(self.0.wait_for(|stop| *stop).await);
    }
}

/// The API, for nodes, operators and those who want to join. Returns when told to stop.
pub async fn serve_tls(listener: TcpListener, tls: Arc<ServerTls>, api: Api, mut stop: Stop) {
    let strangers = Strangers::default();
    let members = Arc::new(Semaphore::new(MAX_MEMBERS));
    let (refusals, failures) = (Sparingly::default(), Sparingly::default());
    let mut connections = JoinSet::new();
    while let Some((stream, peer)) = next(&mut connections, &mut stop, &failures, || listener.accept()).await
    {
        let Some(pass) = strangers.enter(peer.ip()) else {
            refusals.warn(format_args!("{peer} has no certificate and there are too many such connections"));
            continue;
        };
        let connection = TlsConnection {
            peer,
            tls: TlsAcceptor::from(tls.config()),
            router: api.router.clone(),
            members: Arc::clone(&members),
            refusals: refusals.clone(),
            stop: stop.clone(),
        };
        connections.spawn(connection.serve(stream, pass));
    }
    drain(connections).await;
}

struct TlsConnection {
    peer: SocketAddr,
    tls: TlsAcceptor,
    router: Router,
    members: Arc<Semaphore>,
    refusals: Sparingly,
    stop: Stop,
}

impl TlsConnection {
    async fn serve(self, stream: TcpStream, pass: Pass) {
        prepare(&stream);
        let stream = match tokio::time::timeout(HANDSHAKE_DEADLINE, self.tls.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let refused = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
                match refused {
                    Some(rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_)) => {
                        self.refusals.warn(format_args!("{} was refused: {error}", self.peer));
                    }
                    _ => tracing::debug!(peer = %self.peer, "a TLS handshake ended early: {error}"),
                }
                return;
            }
            Err(_) => {
                tracing::debug!(peer = %self.peer, "no TLS handshake in time");
                return;
            }
        };
        let caller = match authenticated(stream.get_ref().1) {
            Ok(identity) => Caller::of_identity(identity),
            Err(error) => {
                self.refusals.warn(format_args!("{} was refused: {error}", self.peer));
                return;
            }
        };
        let caller = match caller {
            Ok(caller) => caller,
            Err(error) => {
                self.refusals.warn(format_args!("{} was refused: {error}", self.peer));
                return;
            }
        };
        if caller == Caller::Anonymous {
            http(stream, self.router, caller, Address::Remote(self.peer), self.stop).await;
            drop(pass);
            return;
        }
        drop(pass);
        let Ok(_place) = self.members.try_acquire() else {
            self.refusals.warn(format_args!("{} was refused: {MAX_MEMBERS} connections are open", self.peer));
            return;
        };
        http(stream, self.router, caller, Address::Remote(self.peer), self.stop).await;
    }
}

/// The same API for whoever may use the socket, as the operator `local`.
pub async fn serve_socket(listener: UnixListener, api: Api, mut stop: Stop) {
    let (refusals, failures) = (Sparingly::default(), Sparingly::default());
    let mut connections = JoinSet::new();
    while let Some((stream, _)) = next(&mut connections, &mut stop, &failures, || listener.accept()).await {
        if connections.len() >= MAX_SOCKET {
            refusals.warn(format_args!("a connection to the socket was refused: {MAX_SOCKET} are open"));
            continue;
        }
        // The mode of the socket says the same. This holds where the mode was changed, and in the moment
        // between its creation and its mode.
        let own = rustix::process::geteuid().as_raw();
        match stream.peer_cred().map(|credentials| credentials.uid()) {
            Ok(uid) if uid == own || uid == 0 => {}
            Ok(uid) => {
                refusals.warn(format_args!("a connection to the socket was refused: user id {uid}"));
                continue;
            }
            Err(error) => {
                refusals.warn(format_args!("a connection to the socket was refused: {error}"));
                continue;
            }
        }
        let caller = Caller::Operator(OperatorName::local());
        connections.spawn(http(stream, api.router.clone(), caller, Address::Socket, stop.clone()));
    }
    drain(connections).await;
}

/// A socket of mode 0600 at `path`. One that a dead agent left is replaced, one that answers is not.
pub fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent answers there")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(error) => return Err(error),
        },
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is there and not a socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The health paths and `/metrics`, for anybody.
pub async fn serve_health<B: Backend>(
    listener: TcpListener,
    backend: Arc<B>,
    metrics: Arc<Metrics>,
    mut stop: Stop,
) {
    let router = health::router(backend, metrics);
    let (refusals, failures) = (Sparingly::default(), Sparingly::default());
    let mut connections = JoinSet::new();
    while let Some((stream, peer)) = next(&mut connections, &mut stop, &failures, || listener.accept()).await
    {
        if connections.len() >= MAX_HEALTH {
            refusals.warn(format_args!("{peer} got no answer on the health port: {MAX_HEALTH} connections"));
            continue;
        }
        prepare(&stream);
        connections.spawn(http(
            stream,
            router.clone(),
            Caller::Anonymous,
            Address::Remote(peer),
            stop.clone(),
        ));
    }
    drain(connections).await;
}

/// A text over plain HTTP at `/metrics`, and nothing else. Made anew for whoever asks, and held until he has read it; so there
/// are few at a time.
pub async fn serve_metrics(
    listener: TcpListener,
    text: impl Fn() -> String + Clone + Send + Sync + 'static,
    mut stop: Stop,
) {
    let router = health::metrics_router(text);
    let (refusals, failures) = (Sparingly::default(), Sparingly::default());
    let mut connections = JoinSet::new();
    while let Some((stream, peer)) = next(&mut connections, &mut stop, &failures, || listener.accept()).await
    {
        if connections.len() >= MAX_METRICS {
            refusals.warn(format_args!("{peer} got no metrics: {MAX_METRICS} connections"));
            continue;
        }
        prepare(&stream);
        let (caller, address) = (Caller::Anonymous, Address::Remote(peer));
        let (router, stop) = (router.clone(), stop.clone());
        connections.spawn(async move {
            let serving = http(stream, router, caller, address, stop);
            drop(tokio::time::timeout(METRICS_WITHIN, serving).await);
        });
    }
    drain(connections).await;
}

/// The next connection; None when told to stop.
async fn next<T, F>(
    connections: &mut JoinSet<()>,
    stop: &mut Stop,
    failures: &Sparingly,
    mut accept: impl FnMut() -> F,
) -> Option<T>
where
    F: Future<Output = io::Result<T>>,
{
    loop {
        tokio::select! {
            () = stop.requested() => return None,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!("a connection's task died: {error}");
                }
            }
            accepted = accept() => match accepted {
                Ok(connection) => return Some(connection),
                Err(error) if is_about_one_connection(&error) => {}
                Err(error) => {
                    failures.warn(format_args!("no connection can be accepted: {error}"));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// Linux hands errors of the connection that was to be accepted to whoever accepts it.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionReset, HostUnreachable, Interrupted, NetworkDown, NetworkUnreachable,
    };
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
    )
}

async fn drain(mut connections: JoinSet<()>) {
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_DEADLINE, all_ended).await.is_err() {
        tracing::debug!("connections were cut off while stopping");
    }
}

/// What cannot be set is no reason to refuse a connection.
fn prepare(stream: &TcpStream) {
    let timeout_ms = u32::try_from(TCP_USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    let set = sockopt::set_tcp_nodelay(stream.as_fd(), true)
        .and_then(|()| sockopt::set_tcp_user_timeout(stream.as_fd(), timeout_ms))
        .and_then(|()| sockopt::set_socket_keepalive(stream.as_fd(), true));
    if let Err(error) = set {
        tracing::debug!("a connection's options could not be set: {error}");
    }
}

async fn http<S>(stream: S, router: Router, caller: Caller, address: Address, mut stop: Stop)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        request.extensions_mut().insert(address);
        router.clone().call(request)
    });
    let connection = http1::Builder::new()
        // Without a timer the timeout below is silently off.
        .timer(TokioTimer::new())
        .header_read_timeout(KEEP_ALIVE)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.requested() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended: {error}");
    }
}

/// Who is connected without a certificate.
#[derive(Clone, Default)]
struct Strangers(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One such connection; it counts until dropped.
struct Pass {
    strangers: Strangers,
    address: IpAddr,
}

impl Strangers {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, address: IpAddr) -> Option<Pass> {
        let mut counts = self.lock();
        let total: usize = counts.values().sum();
        let count = counts.entry(address).or_default();
        if total >= MAX_STRANGERS || *count >= MAX_STRANGERS_PER_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Pass { strangers: self.clone(), address })
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut counts = self.strangers.lock();
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_all_places() {
        let strangers = Strangers::default();
        let address = |last| IpAddr::from([10, 0, 0, last]);
        let mut passes: Vec<_> =
            (0..MAX_STRANGERS_PER_ADDRESS).map(|_| strangers.enter(address(1))).collect();
        assert!(passes.iter().all(Option::is_some));
        assert!(strangers.enter(address(1)).is_none());
        assert!(strangers.enter(address(2)).is_some(), "others are not kept out");
        passes.pop();
        assert!(strangers.enter(address(1)).is_some(), "a place that became free");
        drop(passes);
        assert!(strangers.lock().is_empty(), "nothing is remembered of those who left");
    }

    #[test]
    fn many_addresses_cannot_take_more_than_there_is() {
        let strangers = Strangers::default();
        let passes: Vec<_> = (0..=MAX_STRANGERS)
            .map(|i| strangers.enter(IpAddr::from([10, 0, (i / 256) as u8, (i % 256) as u8])))
            .collect();
        assert_eq!(passes.iter().flatten().count(), MAX_STRANGERS);
    }
}
