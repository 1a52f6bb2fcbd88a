//! A proxy as a process of its own: its file, its certificate, and the agents whose routing tables it follows.
//!
//! It follows every agent that it knows of: whichever hears first of a new primary tells it, and one that is cut off is
//! not missed. What the herd wants of it (hba lines, which agents there are) it asks for again and again.
//!
//! Leaves out: clients, servers and which of them meet ([`pgherd_proxy`]). Hazard: a table that is used for longer than its
//! proof lasts; so its time counts from before it was asked for.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pgherd_api::change::PromoteRequest;
use pgherd_api::join::ProxyRenewRequest;
use pgherd_api::proxy::{OptionValue, Pool, ProxyQuery, ProxySettings, Tls};
use pgherd_api::routing::{Drained, Fork, RoutingQuery, RoutingStandby, RoutingTable, RoutingTarget};
use pgherd_api::status::Gate;
use pgherd_api::{CallError, Client};
use pgherd_core::spec::TlsMode;
use pgherd_core::types::{Instant, Lsn, Term};
use pgherd_postgres::roles;
use pgherd_proxy::hba::{Hba, HbaError};
use pgherd_proxy::ident::{IdentError, Maps};
use pgherd_proxy::routes::{Standby, Table, Target};
use pgherd_proxy::succession::{Heritage, Standing, SuccessionError, Turn};
use pgherd_proxy::{
    Access, AuthQuery, Config, ConsoleAccess, PoolMode, Pooling, Promote, Proxy, ServerTls, Settings,
    StartError, Unwilling,
};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::causes::on_one_line;
use crate::clock;
use crate::files::Findings;
use crate::files::agent::{HostPort, Listen};
use crate::files::proxy::{ProxyFile, agent_url};
use crate::http::{Stop, serve_metrics};
use crate::pki::{FileError, PROXY_VALIDITY, read_limited};
use crate::wire::bind;

mod certificates;
mod life;
mod metrics;

pub use certificates::CertificatesError;
use certificates::{Certificates, Changed, mode as mode_of_tls};
use life::{Life, METRICS, Turned};
pub use life::{Options, Order, Start};

/// In the proxy's directory.
pub const FILE: &str = "proxy.toml";
pub const PKI_DIR: &str = "pki";
/// Where its processes find each other.
pub const RUN_DIR: &str = "run";

const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// After an agent that could not be reached, or went.
const AGAIN_AFTER: Duration = Duration::from_millis(250);
/// How often the herd is asked what it wants.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// The process that runs goes on if there is no answer by then.
const SETTINGS_WITHIN: Duration = Duration::from_secs(30);
const ROUTE_WITHIN: Duration = Duration::from_secs(20);
const LOOK_AT_CERTIFICATE_EVERY: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    #[error(transparent)]
    Read(#[from] FileError),
    #[error("the proxy file has mistakes")]
    File(Findings),
    #[error(transparent)]
    Certificates(#[from] CertificatesError),
    #[error("the herd's hba lines cannot be used by a proxy")]
    Hba(#[from] HbaError),
    #[error("the herd's ident lines cannot be used by a proxy")]
    Ident(#[from] IdentError),
    #[error("cannot hear of signals")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Succession(#[from] SuccessionError),
    #[error("no agent has answered within {} s, and so the process that runs is not taken over", SETTINGS_WITHIN.as_secs())]
    NoAgent,
    #[error("no agent has named a primary within {} s, and so the process that runs is not taken over", ROUTE_WITHIN.as_secs())]
    NoPrimary,
}

impl ProxyError {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            ProxyError::Certificates(
                CertificatesError::Read(_) | CertificatesError::File { .. } | CertificatesError::Tls(_),
            ) => "client_tls_cert_file, client_tls_key_file and client_tls_ca_file stand in [proxy] of the herd file".to_owned(),
            ProxyError::Read(_) | ProxyError::Certificates(_) => {
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
            ProxyError::Succession(SuccessionError::RunsAlready { .. }) => {
                "to replace it without its clients noticing: pgherd proxy --take-over".to_owned()
            }
            ProxyError::Succession(SuccessionError::NoneRuns { .. }) => {
                "start it without --take-over; --take-over=if-running is right in both cases".to_owned()
            }
            ProxyError::Succession(
                SuccessionError::AnotherUser { .. }
                | SuccessionError::Place(pgherd_proxy::succession::PlaceError::AnotherUser { .. }),
            ) => "run it as the user that the proxy runs as".to_owned(),
            ProxyError::Succession(
                SuccessionError::Refused { .. } | SuccessionError::NotUnderstood { .. },
            ) => {
                "it goes on serving, and its log says more; to replace it nevertheless, stop it, which its clients notice, and start this one"
                    .to_owned()
            }
            ProxyError::NoAgent | ProxyError::NoPrimary => {
                "it goes on serving; pgherd status says how the herd is".to_owned()
            }
            ProxyError::Hba(_) | ProxyError::Ident(_) => "pgherd validate shows every mistake of the herd file".to_owned(),
            _ => return None,
        })
    }
}

/// Runs the proxy whose directory this is until it is asked to end, or until another process has taken over and the last
/// client has left.
pub async fn run(
    dir: &Path,
    options: &Options,
    orders: mpsc::UnboundedReceiver<Order>,
) -> Result<(), ProxyError> {
    let path = dir.join(FILE);
    let text = read_limited(&path)?;
    let file = ProxyFile::read(&path.display().to_string(), &text).map_err(ProxyError::File)?;
    let certificates = Certificates::load(dir.join(PKI_DIR), file.name.clone())?;
    let agents = file.agents.clone();
    let (run_dir, process) = (dir.join(RUN_DIR), process()?);
    let herd = Herd { file, run_dir, process, certificates, agents };
    herd.serve(options, orders).await
}

/// A name that no other process has.
fn process() -> Result<String, StartError> {
    let mut bytes = [0_u8; 8];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| StartError::NoRandomness)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The herd as this proxy knows it.
struct Herd {
    file: ProxyFile,
    certificates: Certificates,
    run_dir: PathBuf,
    /// Tells this process from others of the same proxy.
    process: String,
    agents: Vec<HostPort>,
}

/// What a process that has begun consists of.
struct Begun {
    life: Life,
    wanted: ProxySettings,
    query: RoutingQuery,
    followed: BTreeMap<HostPort, Task>,
    metrics: Option<Metrics>,
}

/// Where the numbers are served, and by whom, as long as it is this process's business.
struct Metrics {
    listener: std::net::TcpListener,
    serving: Option<Task>,
}

impl Herd {
    async fn serve(
        mut self,
        options: &Options,
        mut orders: mpsc::UnboundedReceiver<Order>,
    ) -> Result<(), ProxyError> {
        // From here on, or SIGHUP would end the process.
        let mut hangups = signal(SignalKind::hangup()).map_err(ProxyError::Signals)?;
        let begun = tokio::select! {
            begun = self.begin(options) => begun?,
            () = life::asked_to_end(&mut orders) => return Ok(()),
        };
        let Begun { mut life, mut wanted, mut query, mut followed, mut metrics } = begun;
        let mut followed_before = BTreeMap::new();
        let proxy = Arc::clone(&life.proxy);
        let mut ticks = interval(ASK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look_at_certificate = tokio::time::Instant::now();
        let mut trouble: Option<String> = None;
        let mut is_the_one = true;
        loop {
            self.follow_all(&mut followed, &query, &proxy);
            let reload = tokio::select! {
                _ = ticks.tick() => {
                    followed_before.clear();
                    None
                }
                reload = proxy.reload_wanted() => Some(reload),
                promotion = proxy.promotion_wanted() => {
                    let outcome = self.promote(&promotion.what).await;
                    promotion.done(outcome);
                    continue;
                }
                _ = hangups.recv() => {
                    tracing::info!("looks for what has changed, since it was sent SIGHUP");
                    trouble = None;
                    None
                }
                Some(order) = orders.recv() => {
                    life.follow(order).await;
                    continue;
                }
                how = proxy.asked_to_end() => {
                    life.end(how).await;
                    continue;
                }
                turned = life.turned() => match turned {
                    Turned::Ended => return Ok(()),
                    Turned::Standing(standing) => {
                        is_the_one = standing == Standing::Accepts;
                        if standing == Standing::Retired {
                            // Nobody reaches it any more where it listened. The former streams end when those that say so have had
                            // time to begin: a switchover waits for whoever follows.
                            query = RoutingQuery { listen: None, read_listen: None, ..query };
                            followed_before.append(&mut followed);
                            ticks.reset();
                        }
                        match (standing, &mut metrics) {
                            (Standing::Accepts, Some(metrics)) => {
                                metrics.serving = self.serve_metrics(&metrics.listener, &proxy);
                            }
                            (Standing::Aside, Some(metrics)) => metrics.serving = None,
                            _ => metrics = None,
                        }
                        continue;
                    }
                },
            };
            // One process of them does it: a key of one renewal does not fit the certificate of another.
            if is_the_one && tokio::time::Instant::now() >= look_at_certificate {
                look_at_certificate += LOOK_AT_CERTIFICATE_EVERY;
                self.renew().await;
            }
            let now = self.ask().await;
            let answered = now.is_some();
            let outcome = self.take_over(now, &mut wanted, &proxy);
            let found = outcome.err().map(|error| on_one_line(&error));
            if found != trouble
                && let Some(why) = &found
            {
                tracing::error!(why, "what has changed is not taken over; what was in force before still is");
            }
            if let Some(reload) = reload {
                let silent = (!answered).then(|| "no agent answers; only files were looked at".to_owned());
                reload.done(found.clone().or(silent).map_or(Ok(()), Err));
            }
            trouble = found;
        }
    }

    /// What the herd wants now, if that is known, and what the files say. An error leaves in force what is, but for the
    /// proxy's own certificate.
    fn take_over(
        &mut self,
        now: Option<ProxySettings>,
        wanted: &mut ProxySettings,
        proxy: &Proxy,
    ) -> Result<(), ProxyError> {
        let now = now.unwrap_or_else(|| wanted.clone());
        // Its settings are read before any file, so that a mistake in them changes nothing.
        let mut settings = settings(&now)?;
        let changed = self.certificates.look(&now.tls)?;
        let is_other = now != *wanted;
        if is_other || changed != Changed::default() {
            if is_other {
                tracing::info!(generation = now.generation, "the herd wants something else of its proxies");
            }
            let reaches_otherwise = now.tls.server_mode != wanted.tls.server_mode
                || now.tls.certificate_users != wanted.tls.certificate_users
                || changed.authorities;
            if now.tls.server_mode != wanted.tls.server_mode {
                warn_of(&now.tls);
            }
            settings.client_tls = self.certificates.shown().cloned();
            proxy.replace(settings);
            *wanted = now;
            if reaches_otherwise {
                proxy.reconnect();
            }
        }
        Ok(())
    }

    /// Does not accept in another one's place before it could serve as well.
    async fn begin(&mut self, options: &Options) -> Result<Begun, ProxyError> {
        let place = life::place(&self.run_dir, options.start)?;
        let wanted = match (&place, options.start) {
            (Some(place), Start::TakesOver) => {
                life::must_run(place, &self.run_dir).await?;
                timeout(SETTINGS_WITHIN, self.first_settings()).await.map_err(|_| ProxyError::NoAgent)?
            }
            _ => self.first_settings().await,
        };
        let turn = match place {
            Some(place) => Some(Turn::wait(place).await?),
            None => None,
        };
        let mut heritage = life::inherit(turn.as_ref(), options.start).await?;
        let proxy = Arc::new(self.start(&wanted, heritage.as_mut())?);
        let addresses = proxy.addresses();
        let query = RoutingQuery {
            cluster: Some(self.file.cluster.to_string()),
            proxy: Some(self.file.name.to_string()),
            process: Some(self.process.clone()),
            listen: Some(addresses[0].to_string()),
            read_listen: Some(addresses[1].to_string()),
        };
        let mut followed = BTreeMap::new();
        self.follow_all(&mut followed, &query, &proxy);
        if heritage.is_some() {
            timeout(ROUTE_WITHIN, proxy.routed()).await.map_err(|_| ProxyError::NoPrimary)?;
        }
        let mut metrics = match &wanted.metrics_listen {
            Some(listen) => metrics_listener(listen, heritage.as_mut()).await,
            None => None,
        };
        let others = match metrics.as_ref().map(std::net::TcpListener::try_clone) {
            Some(Ok(listener)) => vec![(METRICS.to_owned(), listener.into())],
            _ => Vec::new(),
        };
        let takes_over = heritage.is_some();
        let life = Life::begin(Arc::clone(&proxy), turn, heritage, others, options).await?;
        tracing::info!(read_write = %addresses[0], read_only = %addresses[1], takes_over, "listening");
        let metrics = metrics.take().map(|listener| {
            let serving = self.serve_metrics(&listener, &proxy);
            Metrics { listener, serving }
        });
        Ok(Begun { life, wanted, query, followed, metrics })
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

    /// Asks for a switchover. What an agent refuses the others would as well, and who may have taken it is not asked twice.
    async fn promote(&self, wanted: &Promote) -> Result<(), Unwilling> {
        let request = PromoteRequest {
            request_id: process().map_err(|error| Unwilling { why: error.to_string(), hint: None })?,
            cluster: Some(self.file.cluster.to_string()),
            to: wanted.to.clone(),
            role: wanted.role.clone(),
        };
        let mut last = None;
        for agent in &self.agents {
            let client = self.client(agent).within(ANSWER_WITHIN);
            let error = match client.promote(&request).await {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            // One that knows too little at the moment says so with 503.
            let may_go_on = match &error {
                CallError::Answered { http_status, .. } => *http_status >= 500,
                error => error.was_not_done(),
            };
            tracing::warn!(%agent, %error, "does not begin a switchover");
            last = Some(error.to_error());
            if !may_go_on {
                break;
            }
        }
        let error = last.unwrap_or_else(|| pgherd_api::Error::of(pgherd_api::Code::PeerUnreachable));
        Err(Unwilling { why: error.message, hint: error.hint })
    }

    fn client(&self, agent: &HostPort) -> Client {
        Client::tls(agent.to_string(), None, Arc::clone(&self.certificates.to_agents))
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
            let client = self.client(agent).within(ANSWER_WITHIN);
            match call(&client).await {
                Ok(answer) => return Some(answer),
                Err(error) => tracing::debug!(%agent, %error, "does not answer"),
            }
        }
        None
    }

    fn start(
        &mut self,
        wanted: &ProxySettings,
        heritage: Option<&mut Heritage>,
    ) -> Result<Proxy, ProxyError> {
        let mut settings = settings(wanted)?;
        self.certificates.look(&wanted.tls)?;
        settings.client_tls = self.certificates.shown().cloned();
        warn_of(&wanted.tls);
        let port = self.file.port.unwrap_or(wanted.port);
        let read_port = self.file.read_port.unwrap_or(wanted.read_port);
        let at = |port| SocketAddr::new(self.file.listen, port);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let config = Config {
            listen: vec![(at(port), Access::ReadWrite), (at(read_port), Access::ReadOnly)],
            workers: u16::try_from(cores).unwrap_or(u16::MAX),
            server_tls: Arc::clone(&self.certificates.to_nodes) as Arc<dyn ServerTls>,
            auth_query: AuthQuery {
                user: roles::PROXY.to_owned(),
                database: "postgres".to_owned(),
                // It has a password that nobody but the herd knows.
                secret_of: Some(roles::MONITOR.to_owned()),
            },
        };
        Ok(match heritage {
            Some(heritage) => Proxy::succeed(config, settings, std::mem::take(&mut heritage.listeners))?,
            None => Proxy::start(config, settings)?,
        })
    }

    /// Whoever cannot be measured serves clients nevertheless.
    fn serve_metrics(&self, listener: &std::net::TcpListener, proxy: &Arc<Proxy>) -> Option<Task> {
        let listener = listener.try_clone().and_then(TcpListener::from_std);
        let listener = listener
            .inspect_err(|error| tracing::error!(%error, "there are no metrics: nobody can listen there"))
            .ok()?;
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

    /// One task for each agent that there is.
    fn follow_all(&self, followed: &mut BTreeMap<HostPort, Task>, query: &RoutingQuery, proxy: &Arc<Proxy>) {
        followed.retain(|agent, _| self.agents.contains(agent));
        for agent in &self.agents {
            followed.entry(agent.clone()).or_insert_with(|| {
                Task(tokio::spawn(follow(self.client(agent), query.clone(), Arc::clone(proxy))))
            });
        }
    }

    /// Asks for another certificate when that is due. It is put in force like one that an operator has put there.
    async fn renew(&self) {
        if !self.certificates.renewal_is_due() {
            return;
        }
        let credentials = &self.certificates.credentials;
        let renewed = async {
            let csr = credentials.renewal_request().map_err(|error| error.to_string())?;
            let request = ProxyRenewRequest {
                csr,
                hosts: credentials.hosts(),
                valid_for_s: credentials.valid_for().min(PROXY_VALIDITY).as_secs(),
            };
            let answer = self.first_answer(async |client| client.proxy_renew(&request).await).await;
            let answer = answer.ok_or("no agent gives one")?;
            self.certificates.save(&answer.certificate).map_err(|error| error.to_string())
        };
        if let Err(error) = renewed.await {
            tracing::warn!(error, expires = %credentials.expires(), "the proxy's certificate is due, and cannot be renewed yet");
        }
    }
}

/// But for what clients are shown.
fn settings(wanted: &ProxySettings) -> Result<Settings, ProxyError> {
    let maps = Maps::parse(wanted.ident.iter().map(String::as_str))?;
    let mut settings = Settings::new(Hba::parse(wanted.hba.iter().map(String::as_str))?.mapped_by(maps));
    settings.server_mode = mode_of_tls("server_tls_mode", &wanted.tls.server_mode)?;
    settings.client_mode = mode_of_tls("client_tls_mode", &wanted.tls.client_mode)?;
    settings.certificate_users = wanted.tls.certificate_users.clone();
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

/// That of the process before this one, or another one.
async fn metrics_listener(listen: &str, heritage: Option<&mut Heritage>) -> Option<std::net::TcpListener> {
    let found: Result<std::net::TcpListener, String> = async {
        let listen = listen.parse::<Listen>().map_err(|error| error.to_string())?;
        let inherited = heritage.and_then(|heritage| heritage.take(METRICS)).map(std::net::TcpListener::from);
        if let Some(listener) = inherited
            && let Ok(at) = listener.local_addr()
            && at.port() == listen.port
            && listen.address.is_none_or(|address| address == at.ip())
        {
            return Ok(listener);
        }
        bind(listen).await?.into_std().map_err(|error| error.to_string())
    }
    .await;
    match found {
        Ok(listener) => {
            tracing::info!(listen, "serves metrics");
            Some(listener)
        }
        Err(error) => {
            tracing::error!(listen, error, "there are no metrics: metrics_listen of [proxy] cannot be had");
            None
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
                    let process = query.process.clone();
                    let drained = number.map(|drain| Drained { drain, process });
                    drain = drained.map(|drained| (drained.drain, answer(client, proxy, drained)));
                }
            }
            Err(why) => tracing::error!(agent = %client.endpoint(), why, "sent a table that cannot be used"),
        }
    }
}

/// Says to the agent that drains the primary when no client has anything under way there.
fn answer(client: &Arc<Client>, proxy: &Arc<Proxy>, drained: Drained) -> Task {
    let (client, proxy) = (Arc::clone(client), Arc::clone(proxy));
    Task(tokio::spawn(async move {
        proxy.drained().await;
        while let Err(error) = client.drained(&drained).await {
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
    let fork = |fork: &Fork| {
        let lsn = fork.lsn.parse().map_err(|_| format!("\"{}\" is no position in WAL", fork.lsn))?;
        Ok((Term(fork.term), lsn))
    };
    let forks: Result<Vec<(Term, Lsn)>, String> = table.forks.iter().map(fork).collect();
    Ok(Table {
        term: Term(table.term),
        primary: table.primary.as_ref().map(target).transpose()?,
        gate_open: table.gate == Gate::Open,
        standbys: standbys?,
        forks: forks?,
        draining: None,
        valid_until: asked + Duration::from_millis(table.valid_for_ms),
    })
}

fn target(found: &RoutingTarget) -> Result<Target, String> {
    let address = found.address.parse().map_err(|_| format!("\"{}\" is no address", found.address))?;
    Ok(Target {
        node: found.node.parse().map_err(|_| format!("\"{}\" is no name of a node", found.node))?,
        address,
        port: found.port,
        socket_dir: found.socket_dir.as_ref().filter(|_| is_here(address)).map(PathBuf::from),
    })
}

/// Is this an address of this host? The kernel says from where it would send there: from the address itself, if it is. That is also
/// right where addresses may be bound that are not here (`ip_nonlocal_bind`). Nothing is sent.
fn is_here(address: IpAddr) -> bool {
    let any = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let source = UdpSocket::bind(SocketAddr::new(any, 0)).and_then(|socket| {
        // Any port; 0 is none for a destination.
        socket.connect(SocketAddr::new(address, 9))?;
        socket.local_addr()
    });
    address.is_loopback() || source.is_ok_and(|source| source.ip() == address)
}

/// Once for each mode that holds.
fn warn_of(tls: &Tls) {
    let mode = &tls.server_mode;
    if mode != TlsMode::VerifyFull.as_str() {
        tracing::warn!(mode, "servers that clients are led to are believed without being verified in full");
    }
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
        ("max_replay_lag", Time { .. }) | ("unconfirmed_reads", Switch(_)) => {}
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
        ("md5_passwords", Switch(on)) => settings.md5_passwords = on,
        ("commit_check", Switch(on)) => settings.checks_commits = on,
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
            forks: vec![Fork { term: 6, lsn: "1/200".to_owned() }],
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
        assert_eq!(learnt.forks, [(Term(6), Lsn(0x1_0000_0200))]);
        assert!(!read(&RoutingTable { gate: Gate::Draining, ..table() }, asked).unwrap().gate_open);
    }

    #[test]
    fn a_socket_is_of_use_on_its_own_host_only() {
        for here in ["127.0.0.1", "127.0.0.7", "::1"] {
            assert!(is_here(here.parse().unwrap()), "{here}");
        }
        // Addresses for documentation (RFC 5737, RFC 3849), and none.
        for elsewhere in ["192.0.2.1", "2001:db8::1", "0.0.0.0", "::"] {
            assert!(!is_here(elsewhere.parse().unwrap()), "{elsewhere}");
        }
        let mut table = table();
        let primary = table.primary.as_mut().unwrap();
        primary.socket_dir = Some("/run/pgherd/a".to_owned());
        assert_eq!(target(primary).unwrap().socket_dir, None);
        primary.address = "127.0.0.1".to_owned();
        assert_eq!(target(primary).unwrap().socket_dir, Some("/run/pgherd/a".into()));
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
    fn lines_that_cannot_be_read_are_named_and_nothing_is_made_of_them() {
        let wanted = |hba: &str, ident: &str| ProxySettings {
            herd: "shop".to_owned(),
            cluster: "main".to_owned(),
            generation: 1,
            port: 9999,
            read_port: 9998,
            pool: Pool::Transaction,
            pool_size: 20,
            databases: BTreeMap::new(),
            users: BTreeMap::new(),
            options: BTreeMap::new(),
            console_admins: Default::default(),
            console_readers: Default::default(),
            metrics_listen: None,
            tls: Tls::default(),
            hba: vec![hba.to_owned()],
            ident: vec![ident.to_owned()],
            agents: Vec::new(),
        };
        let right = "hostssl all all all cert map=people";
        assert!(settings(&wanted(right, "people /^(.*)@example\\.com$ \\1")).is_ok());
        for (hba, ident, told) in [
            (right, "people anna", "ident line 1 (\"people anna\"): the line ends before the role"),
            (
                "hostssl all all all",
                "people anna anna",
                "hba line 1 (\"hostssl all all all\"): it lacks fields",
            ),
        ] {
            let error = settings(&wanted(hba, ident)).err().expect("it is no line");
            assert!(on_one_line(&error).contains(told), "{}", on_one_line(&error));
        }
    }

    #[test]
    fn a_table_that_names_hosts_is_not_used() {
        let mut named = table();
        named.primary.as_mut().unwrap().address = "db.example.com".to_owned();
        let asked = Instant::from_boot(Duration::ZERO);
        assert_eq!(read(&named, asked).unwrap_err(), "\"db.example.com\" is no address");
    }
}
