//! Listening: the API, the plain health paths and the local socket, for one backend.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::files::agent::{AgentFile, Listen};
use crate::http::{Api, Backend, Stop, bind_socket, serve_health, serve_socket, serve_tls};
use crate::metrics::Metrics;
use crate::paths;
use crate::pki::ServerTls;

/// Ends the listeners when it is dropped.
pub(crate) struct Listening {
    _stop: watch::Sender<bool>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self._stop.send_replace(true);
    }
}

/// Binds everything first, so that a port in use stops the agent before it has begun anything.
pub(crate) async fn serve<B: Backend>(
    file: &AgentFile,
    tls: Arc<ServerTls>,
    backend: Arc<B>,
    metrics: Arc<Metrics>,
) -> Result<Listening, String> {
    let api = bind(file.listen).await?;
    let health = bind(file.health_listen).await?;
    let socket = paths::api_socket(&file.state_dir);
    let local = bind_socket(&socket).map_err(|error| format!("{}: {error}", socket.display()))?;
    let (stop_sender, stop) = Stop::new();
    let routes = Api::new(Arc::clone(&backend));
    tokio::spawn(serve_tls(api, tls, routes.clone(), stop.clone()));
    tokio::spawn(serve_socket(local, routes, stop.clone()));
    tokio::spawn(serve_health(health, backend, metrics, stop));
    Ok(Listening { _stop: stop_sender })
}

/// On all addresses, IPv6 and IPv4 alike where the system has both.
pub(crate) async fn bind(listen: Listen) -> Result<TcpListener, String> {
    let any = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::from([0, 0, 0, 0])];
    let addresses = listen.address.map_or(any.to_vec(), |address| vec![address]);
    let mut last = String::new();
    for address in addresses {
        let at = SocketAddr::new(address, listen.port);
        match TcpListener::bind(at).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = format!("{at}: {error}"),
        }
    }
    Err(last)
}
