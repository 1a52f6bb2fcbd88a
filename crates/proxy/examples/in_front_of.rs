//! A proxy in front of one server that is always the primary: for measuring, and for drivers' own tests.
//!
//! `in_front_of LISTEN SERVER [WORKERS [POOL_SIZE [MODE]]]`, such as `127.0.0.1:26432 127.0.0.1:5432 1 20 session`. SERVER may
//! be `unix:/directory:5432` of a server with `cluster_name = only`; MODE is `session`, `transaction` or `statement`. The server must
//! let role `pgherd_proxy` into database `postgres` without a password.
//! SIGTERM ends it, and returns from `main`: whoever profiles it finds what is written then.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pgherd_core::types::{Instant, Term};
use pgherd_proxy::hba::Hba;
use pgherd_proxy::routes::{Table, Target};
use pgherd_proxy::{Access, AuthQuery, Config, InClear, PoolMode, Pooling, Proxy, Settings};
use tokio::signal::unix::{SignalKind, signal};

/// As in the program that is shipped.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, server, more @ ..] = &arguments[..] else {
        return Err("LISTEN SERVER [WORKERS [POOL_SIZE [MODE]]]".into());
    };
    let (address, port, socket_dir) = match server.strip_prefix("unix:") {
        Some(unix) => {
            let (dir, port) = unix.rsplit_once(':').ok_or("unix:DIRECTORY:PORT")?;
            (IpAddr::V4(Ipv4Addr::LOCALHOST), port.parse()?, Some(dir.into()))
        }
        None => {
            let server: SocketAddr = server.parse()?;
            (server.ip(), server.port(), None)
        }
    };
    let workers = more.first().map_or(Ok(1), |text| text.parse())?;
    let mut settings = Settings::new(Hba::parse(["host all all all scram-sha-256"])?);
    settings.limits.size = more.get(1).map_or(Ok(20), |text| text.parse())?;
    settings.pooling = Pooling::by(match more.get(2).map_or("session", String::as_str) {
        "session" => PoolMode::Session,
        "transaction" => PoolMode::Transaction,
        "statement" => PoolMode::Statement,
        other => return Err(format!("no such mode: {other}").into()),
    });
    settings.max_clients = 100_000;
    let auth_query =
        AuthQuery { user: "pgherd_proxy".to_owned(), database: "postgres".to_owned(), secret_of: None };
    let config = Config {
        listen: vec![(listen.parse()?, Access::ReadWrite)],
        workers,
        server_tls: Arc::new(InClear),
        auth_query,
    };
    let waiting = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut told_to_end = waiting.block_on(async { signal(SignalKind::terminate()) })?;
    let proxy = Proxy::start(config, settings)?;
    let target = Target { node: "only".parse()?, address, port, socket_dir };
    let valid_until = Instant::from_boot(Duration::from_secs(u64::from(u32::MAX)));
    proxy.learn(Table {
        term: Term(1),
        primary: Some(target),
        gate_open: true,
        standbys: Vec::new(),
        forks: Vec::new(),
        draining: None,
        valid_until,
    });
    waiting.block_on(told_to_end.recv());
    Ok(())
}
