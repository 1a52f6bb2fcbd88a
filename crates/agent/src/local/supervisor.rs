//! From nothing to a healthy herd, and keeping it so: one keeper per node that starts its agent and starts it
//! again, one watcher that tells how the herd is doing.
//!
//! A keeper knows only its node. What it does first follows from what lies in the node's directory: a member
//! is started, the first of a herd without members makes the herd, any other asks a member for a token. So an
//! interruption at any point is gone on from by starting again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgherd_api::spec::PlanRequest;
use pgherd_api::status::Cluster;
use pgherd_api::{Client, Status};
use pgherd_core::spec::backup::Location;
use pgherd_core::spec::{ClusterSpec, HerdSpec};
use pgherd_core::types::NodeName;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use super::account::Account;
use super::agents::{AgentProcess, Agents};
use super::board::Board;
use super::event::{Event, changes, missing};
use super::home::{Home, Lock};
use super::ports::{Claim, Ports};
use super::process::{self, Running};
use super::proxy::{self, ProxyKeeper};
use super::stop::{self, Target};
use super::{LocalError, control, herd, program};
use crate::backoff::Backoff;
use crate::files;
use crate::files::agent::AgentFile;

/// How often the herd is looked at, before it is healthy for the first time and after.
const LOOK_OFTEN: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_secs(1);
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// While no member can make a token.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// A herd that is not healthy by then is told what it waits for; it goes on.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a herd that is healthy otherwise waits for its proxy, and for what can be restored, until it says so.
const COMPLETE_WITHIN: Duration = Duration::from_secs(5);
const TURN_LOGS_OVER_EVERY: Duration = Duration::from_secs(60);
/// For the agents that `down` has to start before it can stop what they left.
const SOCKET_WITHIN: Duration = Duration::from_secs(20);

#[derive(Clone, Debug)]
pub struct Options {
    pub dir: PathBuf,
    /// The herd file to begin with, or to compare with what the herd follows.
    pub herd_file: Option<PathBuf>,
    /// The running program, of which the agents run a copy.
    pub program: PathBuf,
}

/// The one supervisor of a directory.
#[derive(Debug)]
pub struct Supervisor {
    home: Home,
    options: Options,
    board: Board,
    _lock: Lock,
}

/// Everything that is known once the directory is in order.
struct Settled {
    agents: Agents,
    /// In the order of the herd file; the first one makes the herd.
    nodes: Vec<NodeName>,
    _claim: Claim,
}

/// The agents that run, for those who want to signal them.
type Registry = Arc<Mutex<BTreeMap<NodeName, Arc<Running>>>>;

impl Supervisor {
    pub fn new(lock: Lock, options: Options) -> Supervisor {
        let home = Home::at(&options.dir);
        Supervisor { home, options, board: Board::default(), _lock: lock }
    }

    /// Where to watch, and to ask for the stop.
    pub fn board(&self) -> Board {
        self.board.clone()
    }

    /// Whether a herd could begin here at all: what a person must mend first, told before anything goes into
    /// the background.
    pub async fn check(options: &Options) -> Result<(), LocalError> {
        let home = Home::at(&options.dir);
        if let Some(account) = Account::to_change_to()? {
            account.must_reach(home.dir())?;
        }
        let spec = match (&options.herd_file, home.herd_file()) {
            (Some(file), _) => herd::read(file)?,
            (None, file) if file.is_file() => herd::read(&file)?,
            (None, _) => herd::default_spec(home.backups_dir()).await?,
        };
        herd::must_have_postgres(&spec).await
    }

    /// Brings the herd up and keeps it up until it is asked to stop; then stops it in order.
    pub async fn run(self) -> Result<(), LocalError> {
        let prepared = Account::to_change_to().and_then(|account| {
            self.home.make(account.as_ref())?;
            Ok((account, control::listen(&self.home)?))
        });
        let (account, listener) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return self.ended(Err(error)),
        };
        let server = control::Server::start(listener, self.board.clone());
        let outcome = self.keep_up(account).await;
        let outcome = self.ended(outcome);
        server.finish().await;
        outcome
    }

    /// The stop alone, for a herd whose supervisor is gone: of the proxy first, as ever. Agents that are gone while
    /// their PostgreSQL still runs are started for it: only they know how to stop it.
    pub async fn stop(self) -> Result<(), LocalError> {
        let outcome = self.stop_what_runs().await;
        self.ended(outcome)
    }

    fn ended(&self, outcome: Result<(), LocalError>) -> Result<(), LocalError> {
        self.board.tell(match &outcome {
            Ok(()) => Event::Stopped,
            Err(error) => Event::Failed { message: error.to_string(), hint: error.hint() },
        });
        outcome
    }

    async fn keep_up(&self, account: Option<Account>) -> Result<(), LocalError> {
        let Settled { agents, nodes, _claim } = self.settle(account).await?;
        program::remove_unused(&self.home, &agents.program);

        let registry = Registry::default();
        let mut tasks = JoinSet::new();
        for node in &nodes {
            let keeper = Keeper {
                node: node.clone(),
                nodes: nodes.clone(),
                agents: agents.clone(),
                board: self.board.clone(),
                registry: Arc::clone(&registry),
            };
            tasks.spawn(keeper.keep());
        }
        let healthy = Arc::new(Notify::new());
        let (board, told) = (self.board.clone(), Arc::clone(&healthy));
        tasks.spawn(watch(agents.clone(), board.clone(), self.options.herd_file.clone(), told));
        // Not among the tasks: whatever becomes of the proxy, the herd goes on.
        let keeper = ProxyKeeper { agents: agents.clone(), board, healthy };
        let proxy = tokio::spawn(keeper.keep());
        tokio::select! {
            () = self.board.asked_to_stop() => {}
            // They go on for ever, unless one of them meets a fault of ours.
            Some(Err(error)) = tasks.join_next() => {
                tracing::error!(%error, "a task of the supervisor has ended");
            }
        }
        self.board.tell(Event::Stopping);
        tasks.shutdown().await;
        proxy.abort();
        let _ended = proxy.await;
        proxy::stop(&agents, &|event| self.board.tell(event)).await;
        let targets = targets(&agents, &registry)?;
        let stopped = stop::in_order(&targets, &self.home.bin_dir(), &|event| self.board.tell(event)).await;
        for node in &nodes {
            forget(&self.home.pid_file(node));
        }
        stopped
    }

    async fn stop_what_runs(&self) -> Result<(), LocalError> {
        let account = Account::to_change_to()?;
        self.home.make(account.as_ref())?;
        let Some(ports) = Ports::load(&self.home)? else { return Ok(()) };
        let program = program::place(&self.home, &self.options.program)?;
        let agents = Agents { home: self.home.clone(), program, account, ports };
        proxy::stop(&agents, &|event| self.board.tell(event)).await;
        let registry = Registry::default();
        let nodes: Vec<NodeName> = agents.ports.nodes.keys().cloned().collect();
        for node in &nodes {
            let process = match agents.adopt(node)? {
                Some(process) => Some(process),
                None if process::postgres_stands_in(&data_dir(&agents, node)?)
                    && agents.is_member(node)? =>
                {
                    self.board.tell(Event::step(node, "starts its agent, to stop PostgreSQL in order"));
                    Some(agents.start(node, None).await?)
                }
                None => None,
            };
            if let Some(process) = process {
                enter(&registry, node, &process);
            }
        }
        self.wait_for_sockets(&agents, &registry).await;
        let targets = targets(&agents, &registry)?;
        stop::in_order(&targets, &self.home.bin_dir(), &|event| self.board.tell(event)).await?;
        for node in &nodes {
            forget(&self.home.pid_file(node));
        }
        Ok(())
    }

    /// An agent that has just begun takes no signals of ours before it listens.
    async fn wait_for_sockets(&self, agents: &Agents, registry: &Registry) {
        let running: Vec<NodeName> = lock(registry).keys().cloned().collect();
        let waiting = async {
            for node in &running {
                while Client::unix(agents.socket(node)).within(ANSWER_WITHIN).status().await.is_err() {
                    sleep(ASK_AGAIN).await;
                }
            }
        };
        if tokio::time::timeout(SOCKET_WITHIN, waiting).await.is_err() {
            self.board.tell(Event::Trouble { node: None, text: "not every agent answers".to_owned() });
        }
    }

    /// Puts the directory in order: herd file, ports, the program, a place for each node.
    async fn settle(&self, account: Option<Account>) -> Result<Settled, LocalError> {
        if let Some(account) = &account {
            account.must_reach(self.home.dir())?;
        }
        let (spec, ports, claim) = match Ports::load(&self.home)? {
            Some(ports) => self.known_herd(ports)?,
            None => self.new_herd().await?,
        };
        herd::must_have_postgres(&spec).await?;
        let program = program::place(&self.home, &self.options.program)?;
        let nodes: Vec<NodeName> = spec.agents().map(|(name, _, _)| name.clone()).collect();
        let agents = Agents { home: self.home.clone(), program, account, ports };
        for node in &nodes {
            agents.make_place(node)?;
        }
        let here = Location::Directory(agents.home.backups_dir());
        let is_here = |cluster: &ClusterSpec| {
            cluster.backup.as_ref().is_some_and(|backup| backup.repository.location == here)
        };
        if spec.clusters.iter().any(is_here) {
            agents.home.make_backups(agents.account.as_ref())?;
        }
        Ok(Settled { agents, nodes, _claim: claim })
    }

    fn known_herd(&self, ports: Ports) -> Result<(HerdSpec, Ports, Claim), LocalError> {
        let mut spec = herd::mapped(herd::read(&self.home.herd_file())?, &ports);
        // Whoever is in the file and has no ports was added since, and is not of this herd yet.
        for cluster in &mut spec.clusters {
            cluster.nodes.retain(|node| ports.nodes.contains_key(&node.name));
        }
        spec.witnesses.retain(|witness| ports.nodes.contains_key(&witness.name));
        let taken = || {
            let first = ports.nodes.iter().min_by_key(|(_, ports)| ports.postgres);
            first.map(|(node, ports)| LocalError::PortTaken { node: node.clone(), port: ports.postgres })
        };
        match ports.claim() {
            Some(claim) => Ok((spec, ports, claim)),
            None => Err(taken().unwrap_or(LocalError::NoPorts { wanted: 0, first: 0 })),
        }
    }

    async fn new_herd(&self) -> Result<(HerdSpec, Ports, Claim), LocalError> {
        let own = self.home.herd_file();
        let given = self.options.herd_file.clone().or_else(|| own.is_file().then(|| own.clone()));
        let spec = match &given {
            Some(file) => herd::read(file)?,
            None => herd::default_spec(self.home.backups_dir()).await?,
        };
        let nodes: Vec<NodeName> = spec.agents().map(|(name, _, _)| name.clone()).collect();
        let (ports, claim) = Ports::choose(&nodes)?;
        if herd::names_other_hosts(&spec) {
            self.board.tell(Event::herd("every host of the herd file is this machine here: 127.0.0.1"));
        }
        if herd::names_vip(&spec) {
            let word = "[cluster.vip] is left out: on one machine there is nowhere for the address to move";
            self.board.tell(Event::herd(word));
        }
        let spec = herd::mapped(spec, &ports);
        self.write_herd_file(&own, &spec)?;
        // Last: it marks the directory as a herd whose other files are there.
        ports.save(&self.home)?;
        let first = ports.nodes.values().map(|ports| ports.postgres).min().unwrap_or_default();
        self.board.tell(Event::herd(format!("ports from {first} on; {}", own.display())));
        Ok((spec, ports, claim))
    }

    fn write_herd_file(&self, path: &Path, spec: &HerdSpec) -> Result<(), LocalError> {
        crate::pki::write_public(path, &files::herd::write(spec)).map_err(|error| LocalError::Step {
            what: "writing the herd file".to_owned(),
            output: error.to_string(),
        })
    }
}

/// Keeps one node's agent running.
struct Keeper {
    node: NodeName,
    nodes: Vec<NodeName>,
    agents: Agents,
    board: Board,
    registry: Registry,
}

impl Keeper {
    async fn keep(self) {
        let mut backoff = Backoff::default();
        loop {
            let begun = Instant::now();
            let how = match self.launch().await {
                Ok(process) => {
                    enter(&self.registry, &self.node, &process);
                    let how = process.ended().await;
                    lock(&self.registry).remove(&self.node);
                    how
                }
                Err(error) => error.to_string(),
            };
            let pause = backoff.after(begun.elapsed());
            let text = format!("agent: {how}; starting it again in {} s", pause.as_secs());
            tracing::warn!(node = %self.node, "{text}");
            self.board.tell(Event::trouble(&self.node, text));
            sleep(pause).await;
        }
    }

    /// Starts the agent, or finds it running.
    async fn launch(&self) -> Result<AgentProcess, LocalError> {
        if let Some(process) = self.agents.adopt(&self.node)? {
            self.board.tell(Event::step(&self.node, "its agent runs already, and is taken over"));
            return Ok(process);
        }
        if self.agents.is_member(&self.node)? {
            self.board.tell(Event::step(&self.node, "starts its agent"));
            return self.agents.start(&self.node, None).await;
        }
        if self.makes_the_herd()? {
            self.board.tell(Event::step(&self.node, "makes the herd: its store, authority and secrets"));
            self.agents.init(&self.node).await?;
            self.board.tell(Event::step(&self.node, "starts its agent"));
            return self.agents.start(&self.node, None).await;
        }
        let token = self.token().await;
        self.board.tell(Event::step(&self.node, "joins the herd"));
        self.agents.start(&self.node, Some(&token)).await
    }

    /// Only where nobody is a member: a second founder would make a second herd.
    fn makes_the_herd(&self) -> Result<bool, LocalError> {
        for node in &self.nodes {
            if self.agents.is_member(node)? {
                return Ok(false);
            }
        }
        Ok(self.nodes.first() == Some(&self.node))
    }

    async fn token(&self) -> String {
        loop {
            if let Some(token) = self.agents.token(&self.node).await {
                return token;
            }
            sleep(ASK_AGAIN).await;
        }
    }
}

/// Tells how the herd is doing, as its agents see it.
async fn watch(agents: Agents, board: Board, herd_file: Option<PathBuf>, first_healthy: Arc<Notify>) {
    let begun = Instant::now();
    let clients: Vec<Client> = agents.clients().iter().map(|client| client.within(ANSWER_WITHIN)).collect();
    let mut ticks = interval(LOOK_OFTEN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut healthy, mut patience) = (None::<Box<Status>>, false, Some(begun + PATIENCE));
    let (mut turn_over, mut complete_until) = (begun + TURN_LOGS_OVER_EVERY, None);
    loop {
        ticks.tick().await;
        if Instant::now() >= turn_over {
            agents.turn_logs_over();
            turn_over = Instant::now() + TURN_LOGS_OVER_EVERY;
        }
        let Some(status) = ask(&clients).await else { continue };
        for event in changes(last.as_deref(), &status) {
            board.tell(event);
        }
        let missing = missing(&status);
        let is_complete = !status.proxy.is_empty() && status.clusters.iter().all(can_be_restored);
        if last.as_ref() != Some(&status) {
            board.tell(Event::Status { status: status.clone() });
            last = Some(status);
        }
        if !healthy && missing.is_empty() {
            // The proxy's address is what a person is told, and that nothing can be restored yet would be read as a failure; but the herd is
            // healthy without either.
            let complete_until = *complete_until.get_or_insert_with(|| {
                first_healthy.notify_one();
                Instant::now() + COMPLETE_WITHIN
            });
            if !is_complete && Instant::now() < complete_until {
                continue;
            }
            let lacking = match agents.keep_client_files() {
                Ok(true) => None,
                Ok(false) => Some("no agent has kept the passwords of the databases' owners".to_owned()),
                Err(error) => Some(error.to_string()),
            };
            if let Some(why) = lacking {
                board.tell(Event::Trouble { node: None, text: format!("clients lack a password: {why}") });
            }
            if let Some(text) = differing_file(agents.home.dir(), herd_file.as_deref()).await {
                board.tell(Event::Trouble { node: None, text });
            }
            let after_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            board.tell(Event::Healthy { after_ms });
            healthy = true;
            patience = None;
            ticks = interval(LOOK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        if let Some(until) = patience
            && Instant::now() >= until
        {
            patience = None;
            let text = format!("not healthy after {} s: {}", PATIENCE.as_secs(), missing.join("; "));
            board.tell(Event::Trouble { node: None, text });
        }
        if healthy && !missing.is_empty() {
            // What is about to change is looked at more closely.
            sleep_until(Instant::now() + LOOK_OFTEN).await;
            ticks.reset_immediately();
        }
    }
}

/// Or is not to be: it has no repository.
fn can_be_restored(cluster: &Cluster) -> bool {
    cluster.backup.as_ref().is_none_or(|backup| backup.trouble.is_none() && backup.recovery_window.is_some())
}

/// The first answer; an agent that is frozen or gone is passed over.
async fn ask(clients: &[Client]) -> Option<Box<Status>> {
    for client in clients {
        if let Ok(status) = client.status().await {
            return Some(Box::new(status));
        }
    }
    None
}

/// The store rules. What a file says that the herd does not follow is told in a sentence, and not followed.
/// `None` also where nobody can be asked.
pub async fn differing_file(dir: &Path, given: Option<&Path>) -> Option<String> {
    let home = Home::at(dir);
    let ports = Ports::load(&home).ok()??;
    let own = home.herd_file();
    let file = given.unwrap_or(&own);
    let shown = file.display();
    let spec = match herd::read(file) {
        Ok(spec) => spec,
        Err(error) => return Some(format!("{shown} is not followed: {error}; pgherd validate tells more")),
    };
    let text = files::herd::write(&herd::mapped(spec, &ports));
    let request = PlanRequest { text, file: Some(shown.to_string()) };
    for node in ports.nodes.keys() {
        let client = Client::unix(crate::paths::api_socket(&home.node_dir(node))).within(ANSWER_WITHIN);
        match client.plan(&request).await {
            Ok(plan) if plan.changes.is_empty() => return None,
            Ok(plan) => {
                return Some(format!(
                    "{shown} differs from what the herd follows, in {} of its values; the herd goes on as it \
                     was. pgherd plan --herd {shown} shows them, pgherd apply --herd {shown} makes them so",
                    plan.changes.len(),
                ));
            }
            Err(error) => tracing::debug!(%error, "cannot compare the herd file"),
        }
    }
    None
}

fn enter(registry: &Registry, node: &NodeName, process: &AgentProcess) {
    lock(registry).insert(node.clone(), Arc::clone(&process.running));
}

fn lock(registry: &Registry) -> std::sync::MutexGuard<'_, BTreeMap<NodeName, Arc<Running>>> {
    registry.lock().unwrap_or_else(PoisonError::into_inner)
}

fn targets(agents: &Agents, registry: &Registry) -> Result<Vec<Target>, LocalError> {
    let mut targets = Vec::new();
    for node in agents.ports.nodes.keys() {
        // One that was started in the very moment of the stop is not in the registry yet.
        let agent = lock(registry).get(node).cloned();
        let agent = match agent {
            Some(agent) => Some(agent),
            None => agents.adopt(node)?.map(|process| process.running),
        };
        let client = Client::unix(agents.socket(node));
        targets.push(Target { node: node.clone(), client, data_dir: data_dir(agents, node)?, agent });
    }
    Ok(targets)
}

/// As the node's agent file has it.
fn data_dir(agents: &Agents, node: &NodeName) -> Result<PathBuf, LocalError> {
    let path = agents.home.agent_file(node);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(agents.home.node_dir(node).join("data"));
        }
        Err(error) => return Err(LocalError::io("read", path)(error)),
    };
    let file = AgentFile::read(&path.display().to_string(), &text).map_err(LocalError::HerdFile)?;
    Ok(file.data_dir)
}

pub(super) fn forget(pid_file: &Path) {
    if let Err(error) = std::fs::remove_file(pid_file)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %pid_file.display(), "cannot remove the note of a process");
    }
}
