//! A proxy as a process of its own: its file, its certificate, and the agents whose routing tables it follows.
//!
//! It follows every agent that it knows of: whichever hears first of a new primary tells it, and one that is cut off is
//! not missed. What the herd wants of it (hba lines, which agents there are) it asks for again and again.
//!
//! Leaves out: clients, servers and which of them meet ([`pgherd_proxy`]). Hazard: a table that is used for longer than its
//! proof lasts; so its time counts from before it was asked for.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use jiff::Timestamp;
use pgherd_api::client::ClientTls;
use pgherd_api::identity::Identity;
use pgherd_api::join::ProxyRenewRequest;
use pgherd_api::proxy::{OptionValue, Pool, ProxyQuery, ProxySettings};
use pgherd_api::routing::{Drained, RoutingQuery, RoutingStandby, RoutingTable, RoutingTarget};
use pgherd_api::status::Gate;
use pgherd_api::{CallError, Client};
use pgherd_core::types::{Instant, NodeName, Term};
use pgherd_postgres::roles;
use pgherd_proxy::hba::{Hba, HbaError};
use pgherd_proxy::routes::{Standby, Table, Target};
use pgherd_proxy::{
    ALPN, Access, AuthQuery, Config, ConsoleAccess, PoolMode, Pooling, Proxy, ServerTls, Settings, StartError,
};
use rustls::ClientConfig;
use rustls::crypto::aws_lc_rs as provider;
use rustls::pki_types::ServerName;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::clock;
use crate::files::Findings;
use crate::files::agent::{HostPort, Listen};
use crate::files::proxy::{ProxyFile, agent_url};
use crate::http::{Stop, serve_metrics};
use crate::pki::{Credentials, CredentialsError, FileError, PROXY_VALIDITY, read_limited};
use crate::wire::bind;

mod metrics;

/// In the proxy's directory.
pub const FILE: &str = "proxy.toml";
pub const PKI_DIR: &str = "pki";

const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// After an agent that could not be reached, or went.
const AGAIN_AFTER: Duration = Duration::from_millis(250);
/// How often the herd is asked what it wants.
const ASK_EVERY: Duration = Duration::from_secs(5);
const LOOK_AT_CERTIFICATE_EVERY: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    #[error(transparent)]
    Read(#[from] FileError),
    #[error("the proxy file has mistakes")]
    File(Findings),
    #[error("the proxy's certificate cannot be used")]
    Credentials(#[from] CredentialsError),
    #[error("the certificate in {} is that of {found}, and {wanted} is the proxy's name", .dir.display())]
    AnotherName { dir: PathBuf, found: Identity, wanted: NodeName },
    #[error("the herd's hba lines cannot be used by a proxy")]
    Hba(#[from] HbaError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the proxy's certificate cannot be shown to clients: {0}")]
    Tls(#[from] rustls::Error),
}

impl ProxyError {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            ProxyError::Read(_) | ProxyError::Credentials(_) | ProxyError::AnotherName { .. } => {
                "an operator makes the directory of a proxy with: pgherd proxy add NAME".to_owned()
            }
            ProxyError::Start(StartError::Listen { address, source })
                if source.kind() == io::ErrorKind::AddrInUse =>
            {
                format!(
                    "see who has it with: ss -ltnp 'sport = :{}'; other ports stand in {FILE} or in [proxy] of the herd file",
                    address.port()
                )
            }
            ProxyError::Hba(_) => "pgherd validate shows every mistake of the herd file".to_owned(),
            _ => return None,
        })
    }
}

/// Runs the proxy whose directory this is until `stop`.
pub async fn run(dir: &Path, stop: impl Future<Output = ()>) -> Result<(), ProxyError> {
    let path = dir.join(FILE);
    let text = read_limited(&path)?;
    let file = ProxyFile::read(&path.display().to_string(), &text).map_err(ProxyError::File)?;
    let pki_dir = dir.join(PKI_DIR);
    let credentials = Credentials::load(&pki_dir)?;
    if *credentials.identity() != Identity::Proxy(file.name.to_string()) {
        let (found, wanted) = (credentials.identity().clone(), file.name);
        return Err(ProxyError::AnotherName { dir: pki_dir, found, wanted });
    }
    let tls = Arc::new(credentials.client_tls()?);
    let agents = file.agents.clone();
    let herd = Herd { file, pki_dir, credentials, tls, agents };
    tokio::select! {
        ended = herd.serve() => ended,
        () = stop => Ok(()),
    }
}

/// The herd as this proxy knows it.
struct Herd {
    file: ProxyFile,
    pki_dir: PathBuf,
    credentials: Credentials,
    tls: Arc<ClientTls>,
    agents: Vec<HostPort>,
}

impl Herd {
    /// For ever, unless it cannot begin.
    async fn serve(mut self) -> Result<(), ProxyError> {
        let mut wanted = self.first_settings().await;
        let proxy = Arc::new(self.start(&wanted)?);
        let _metrics = match &wanted.metrics_listen {
            Some(listen) => self.serve_metrics(listen, &proxy).await,
            None => None,
        };
        let addresses = proxy.addresses();
        tracing::info!(read_write = %addresses[0], read_only = %addresses[1], "listening");
        let query = RoutingQuery {
            cluster: Some(self.file.cluster.to_string()),
            proxy: Some(self.file.name.to_string()),
            listen: Some(addresses[0].to_string()),
            read_listen: Some(addresses[1].to_string()),
        };
        let mut followed = BTreeMap::new();
        let mut ticks = interval(ASK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look_at_certificate = tokio::time::Instant::now();
        loop {
            self.follow_all(&mut followed, &query, &proxy);
            tokio::select! {
                _ = ticks.tick() => {}
                () = proxy.reload_wanted() => {}
            }
            if tokio::time::Instant::now() >= look_at_certificate {
                look_at_certificate += LOOK_AT_CERTIFICATE_EVERY;
                if self.renew().await {
                    proxy.replace(self.settings(&wanted)?);
                }
            }
            match self.ask().await {
                Some(now) if now != wanted => match self.settings(&now) {
                    Ok(settings) => {
                        tracing::info!(
                            generation = now.generation,
                            "the herd wants something else of its proxies"
                        );
                        proxy.replace(settings);
                        wanted = now;
                    }
                    Err(error) => tracing::error!(%error, "what the herd wants now is not taken over"),
                },
                _ => {}
            }
        }
    }

    /// Waits for an agent that answers.
    async fn first_settings(&mut self) -> ProxySettings {
        let mut told = false;
        loop {
            if let Some(settings) = self.ask().await {
                return settings;
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("no agent answers yet");
            }
            sleep(AGAIN_AFTER).await;
        }
    }

    /// Asks one agent after the other, and learns which there are.
    async fn ask(&mut self) -> Option<ProxySettings> {
        let query = ProxyQuery { cluster: Some(self.file.cluster.to_string()) };
        let settings = self.first_answer(async |client| client.proxy(&query).await).await?;
        let agents: Vec<HostPort> = settings.agents.iter().filter_map(|url| agent_url(url)).collect();
        if !agents.is_empty() {
            self.agents = agents;
        }
        Some(settings)
    }

    async fn first_answer<T>(&self, call: impl AsyncFn(&Client) -> Result<T, CallError>) -> Option<T> {
        for agent in &self.agents {
            let client = Client::tls(agent.to_string(), None, Arc::clone(&self.tls)).within(ANSWER_WITHIN);
            match call(&client).await {
                Ok(answer) => return Some(answer),
                Err(error) => tracing::debug!(%agent, %error, "does not answer"),
            }
        }
        None
    }

    fn start(&self, wanted: &ProxySettings) -> Result<Proxy, ProxyError> {
        let port = self.file.port.unwrap_or(wanted.port);
        let read_port = self.file.read_port.unwrap_or(wanted.read_port);
        let at = |port| SocketAddr::new(self.file.listen, port);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let config = Config {
            listen: vec![(at(port), Access::ReadWrite), (at(read_port), Access::ReadOnly)],
            workers: u16::try_from(cores).unwrap_or(u16::MAX),
            server_tls: Arc::new(ToNodes(Arc::clone(&self.tls))),
            auth_query: AuthQuery { user: roles::PROXY.to_owned(), database: "postgres".to_owned() },
        };
        Ok(Proxy::start(config, self.settings(wanted)?)?)
    }

    /// Whoever cannot be measured serves clients nevertheless.
    async fn serve_metrics(&self, listen: &str, proxy: &Arc<Proxy>) -> Option<Task> {
        let bound = match listen.parse::<Listen>() {
            Ok(listen) => bind(listen).await,
            Err(error) => Err(error.to_string()),
        };
        let listener = match bound {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(
                    listen,
                    error,
                    "there are no metrics: metrics_listen of [proxy] cannot be had"
                );
                return None;
            }
        };
        tracing::info!(listen, "serves metrics");
        let proxy = Arc::downgrade(proxy);
        let names =
            (self.file.herd.clone().unwrap_or_default(), self.file.cluster.clone(), self.file.name.clone());
        let text = move || {
            let (herd, cluster, name) = &names;
            // Whoever asks while it ends gets nothing.
            let proxy = proxy.upgrade();
            proxy.map_or_else(String::new, |proxy| {
                metrics::text(&proxy, herd, cluster.as_str(), name.as_str())
            })
        };
        let (stop, stopped) = Stop::new();
        Some(Task(tokio::spawn(async move {
            serve_metrics(listener, text, stopped).await;
            drop(stop);
        })))
    }

    fn settings(&self, wanted: &ProxySettings) -> Result<Settings, ProxyError> {
        let mut settings = Settings::new(Hba::parse(wanted.hba.iter().map(String::as_str))?);
        settings.client_tls = Some(client_tls(&self.credentials)?);
        let by_name = |pools: &BTreeMap<String, Pool>| {
            pools.iter().map(|(name, pool)| (name.clone(), mode(*pool))).collect()
        };
        settings.pooling = Pooling {
            mode: mode(wanted.pool),
            databases: by_name(&wanted.databases),
            users: by_name(&wanted.users),
        };
        settings.limits.size = wanted.pool_size;
        for (name, value) in &wanted.options {
            if !set(&mut settings, name, *value) {
                tracing::warn!(
                    name,
                    ?value,
                    "this version of the proxy does not know the option, and goes on without it"
                );
            }
        }
        settings.console =
            ConsoleAccess { admins: wanted.console_admins.clone(), readers: wanted.console_readers.clone() };
        Ok(settings)
    }

    /// One task for each agent that there is.
    fn follow_all(&self, followed: &mut BTreeMap<HostPort, Task>, query: &RoutingQuery, proxy: &Arc<Proxy>) {
        followed.retain(|agent, _| self.agents.contains(agent));
        for agent in &self.agents {
            followed.entry(agent.clone()).or_insert_with(|| {
                let client = Client::tls(agent.to_string(), None, Arc::clone(&self.tls));
                Task(tokio::spawn(follow(client, query.clone(), Arc::clone(proxy))))
            });
        }
    }

    /// `true` if there is another certificate now.
    async fn renew(&mut self) -> bool {
        if !self.credentials.renewal_is_due(Timestamp::now()) {
            return false;
        }
        let renewed = async {
            let csr = self.credentials.renewal_request().map_err(|error| error.to_string())?;
            let request = ProxyRenewRequest {
                csr,
                hosts: self.credentials.hosts(),
                valid_for_s: self.credentials.valid_for().min(PROXY_VALIDITY).as_secs(),
            };
            let answer = self.first_answer(async |client| client.proxy_renew(&request).await).await;
            let answer = answer.ok_or("no agent gives one")?;
            let renewed = self.credentials.renew(&self.pki_dir, &answer.certificate);
            let renewed = renewed.map_err(|error| error.to_string())?;
            renewed.replace_in(&self.tls).map_err(|error| error.to_string())?;
            Ok::<Credentials, String>(renewed)
        };
        match renewed.await {
            Ok(renewed) => {
                tracing::info!(expires = %renewed.expires(), "the proxy's certificate was renewed");
                self.credentials = renewed;
                true
            }
            Err(error) => {
                tracing::warn!(error, expires = %self.credentials.expires(), "the proxy's certificate is due, and cannot be renewed yet");
                false
            }
        }
    }
}

/// Ends when it is dropped.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells the proxy what one agent knows, for ever.
async fn follow(client: Client, query: RoutingQuery, proxy: Arc<Proxy>) {
    let client = Arc::new(client);
    loop {
        if let Err(error) = follow_once(&client, &query, &proxy).await {
            tracing::debug!(agent = %client.endpoint(), %error, "is not followed at the moment");
        }
        sleep(AGAIN_AFTER).await;
    }
}

async fn follow_once(
    client: &Arc<Client>,
    query: &RoutingQuery,
    proxy: &Arc<Proxy>,
) -> Result<(), CallError> {
    let mut lines = client.routing(query).await?;
    let mut drain: Option<(u64, Task)> = None;
    loop {
        let asked = clock::now();
        let Some(table) = lines.next().await? else { return Ok(()) };
        match read(&table, asked) {
            Ok(known) => {
                // Who has said so once knows when that is over; who has never said so may not know.
                let draining = table.drain.map(|_| true).or(drain.as_ref().map(|_| false));
                proxy.learn(Table { draining, ..known });
                let number = table.drain;
                if drain.as_ref().map(|(number, _)| *number) != number {
                    drain = number.map(|number| (number, answer(client, proxy, number)));
                }
            }
            Err(why) => tracing::error!(agent = %client.endpoint(), why, "sent a table that cannot be used"),
        }
    }
}

/// Says to the agent that drains the primary when no client has anything under way there.
fn answer(client: &Arc<Client>, proxy: &Arc<Proxy>, drain: u64) -> Task {
    let (client, proxy) = (Arc::clone(client), Arc::clone(proxy));
    Task(tokio::spawn(async move {
        proxy.drained().await;
        while let Err(error) = client.drained(&Drained { drain }).await {
            tracing::info!(agent = %client.endpoint(), %error, "cannot be told that nothing is under way there");
            sleep(AGAIN_AFTER).await;
        }
    }))
}

/// `asked`: before it was read.
fn read(table: &RoutingTable, asked: Instant) -> Result<Table, String> {
    let standby =
        |standby: &RoutingStandby| Ok(Standby { target: target(&standby.target)?, weight: standby.weight });
    let standbys: Result<Vec<Standby>, String> = table.standbys.iter().map(standby).collect();
    Ok(Table {
        term: Term(table.term),
        primary: table.primary.as_ref().map(target).transpose()?,
        gate_open: table.gate == Gate::Open,
        standbys: standbys?,
        draining: None,
        valid_until: asked + Duration::from_millis(table.valid_for_ms),
    })
}

fn target(found: &RoutingTarget) -> Result<Target, String> {
    Ok(Target {
        node: found.node.parse().map_err(|_| format!("\"{}\" is no name of a node", found.node))?,
        address: found.address.parse().map_err(|_| format!("\"{}\" is no address", found.address))?,
        port: found.port,
        // Whether it is on the same host is not known for certain, and TCP is right everywhere.
        socket_dir: None,
    })
}

/// Servers are believed as agents are: by the herd's authority and the name of their node.
struct ToNodes(Arc<ClientTls>);

impl ServerTls for ToNodes {
    fn to_node(&self, node: &NodeName) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
        let name = ServerName::try_from(node.to_string()).expect("a node's name is a DNS label");
        Some((self.0.to_nodes(), name))
    }
}

fn client_tls(credentials: &Credentials) -> Result<pgherd_proxy::ClientTls, ProxyError> {
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(credentials.chain(), credentials.private_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // The herd's authority signs with SHA-256, and so that is the hash of channel binding (RFC 5929, section 4.1).
    let hash = digest::digest(&digest::SHA256, credentials.certificate());
    Ok(pgherd_proxy::ClientTls { config: Arc::new(config), certificate_hash: Some(hash.as_ref().to_vec()) })
}

/// `false`: it is not known, or takes another kind of value.
fn set(settings: &mut Settings, name: &str, value: OptionValue) -> bool {
    use OptionValue::{Switch, Time, Whole};
    let number = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let limit = |most: u64| (most > 0).then(|| number(most));
    let (reads, limits, timeouts) = (&mut settings.reads, &mut settings.limits, &mut settings.timeouts);
    match (name, value) {
        ("split_reads", Switch(on)) => reads.split = on,
        ("read_your_writes", Switch(on)) => reads.your_writes = on,
        ("read_wait", Time { ms: Some(ms) }) => reads.wait = Duration::from_millis(ms),
        // Agents leave such standbys out of their tables.
        ("max_replay_lag", Time { .. }) => {}
        ("max_clients", Whole(most)) => settings.max_clients = number(most),
        ("max_user_clients", Whole(most)) => settings.max_user_clients = limit(most),
        ("max_database_clients", Whole(most)) => settings.max_database_clients = limit(most),
        ("query_wait", Time { ms: Some(ms) }) => limits.query_wait = Duration::from_millis(ms),
        ("hold", Time { ms: Some(ms) }) => limits.hold = Duration::from_millis(ms),
        ("login_timeout", Time { ms: Some(ms) }) => settings.login_timeout = Duration::from_millis(ms),
        ("client_idle_timeout", Time { ms }) => timeouts.idle = ms.map(Duration::from_millis),
        ("idle_transaction_timeout", Time { ms }) => {
            timeouts.idle_transaction = ms.map(Duration::from_millis);
        }
        ("transaction_timeout", Time { ms }) => timeouts.transaction = ms.map(Duration::from_millis),
        ("query_timeout", Time { ms }) => timeouts.query = ms.map(Duration::from_millis),
        ("server_idle_timeout", Time { ms: Some(ms) }) => limits.server_idle = Duration::from_millis(ms),
        ("server_lifetime", Time { ms: Some(ms) }) => limits.server_lifetime = Duration::from_millis(ms),
        _ => return false,
    }
    true
}

fn mode(pool: Pool) -> PoolMode {
    match pool {
        Pool::Session => PoolMode::Session,
        Pool::Transaction => PoolMode::Transaction,
        Pool::Statement => PoolMode::Statement,
    }
}

#[cfg(test)]
mod tests {
    use pgherd_api::routing::Proof;
    use pgherd_core::spec::{self, ProxyOption};

    use super::*;

    fn table() -> RoutingTable {
        let target = |node: &str, address: &str| RoutingTarget {
            node: node.to_owned(),
            address: address.to_owned(),
            port: 5432,
            socket_dir: None,
        };
        RoutingTable {
            herd_id: "x".to_owned(),
            cluster: "main".to_owned(),
            term: 7,
            gate: Gate::Open,
            primary: Some(target("a", "192.0.2.1")),
            standbys: vec![RoutingStandby {
                target: target("b", "2001:db8::2"),
                replay_lsn: None,
                lag_bytes: None,
                weight: 1,
            }],
            proof: Proof::Store,
            valid_for_ms: 2_500,
            drain: None,
        }
    }

    #[test]
    fn a_table_lasts_from_before_it_was_read() {
        let asked = Instant::from_boot(Duration::from_secs(100));
        let learnt = read(&table(), asked).unwrap();
        assert_eq!(learnt.valid_until, asked + Duration::from_millis(2_500));
        assert_eq!((learnt.term, learnt.gate_open), (Term(7), true));
        assert_eq!(learnt.primary.unwrap().address.to_string(), "192.0.2.1");
        assert_eq!(learnt.standbys[0].target.node.as_str(), "b");
        assert!(!read(&RoutingTable { gate: Gate::Draining, ..table() }, asked).unwrap().gate_open);
    }

    #[test]
    fn every_option_of_the_herd_file_is_known_here_and_has_the_same_default() {
        let mut settings = Settings::new(Hba::default());
        let untouched =
            format!("{:?}", (settings.reads, settings.limits, settings.timeouts, settings.max_clients));
        for option in ProxyOption::ALL {
            let value = match option.default() {
                spec::OptionValue::Switch(on) => OptionValue::Switch(on),
                spec::OptionValue::Whole(number) => OptionValue::Whole(number),
                spec::OptionValue::Time { ms } => OptionValue::Time { ms },
            };
            assert!(set(&mut settings, option.name(), value), "{}", option.name());
        }
        let set_to =
            format!("{:?}", (settings.reads, settings.limits, settings.timeouts, settings.max_clients));
        assert_eq!(set_to, untouched);
        assert_eq!((settings.max_user_clients, settings.max_database_clients), (None, None));
        assert!(!set(&mut settings, "later", OptionValue::Switch(true)));
        assert!(!set(&mut settings, "hold", OptionValue::Time { ms: None }), "never is no time to hold");
    }

    #[test]
    fn a_table_that_names_hosts_is_not_used() {
        let mut named = table();
        named.primary.as_mut().unwrap().address = "db.example.com".to_owned();
        let asked = Instant::from_boot(Duration::ZERO);
        assert_eq!(read(&named, asked).unwrap_err(), "\"db.example.com\" is no address");
    }
}
