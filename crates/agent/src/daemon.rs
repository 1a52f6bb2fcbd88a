//! The agent of one host: opens what was set up, starts every task, and runs until it is told to end.
//!
//! PostgreSQL is not ended with it: an agent that is restarted or upgraded finds it again and goes on.
//!
//! Order matters in one place: the API listens before the store is waited for, because a member that has
//! just joined gets the store's content through it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use pgherd_core::ha::Memory;
use pgherd_core::observation::Postgres;
use pgherd_core::spec::{HerdSpec, NodeSpec};
use pgherd_core::types::NodeName;
use pgherd_dcs::{RaftStore, Snapshot, Store};
use tokio::sync::{mpsc, watch};

use crate::agreed::{self, AgreedError, Secrets, StoredSpec};
use crate::backend::{AgentBackend, Renewal};
use crate::durable::{DurableError, DurableFile, write_synced};
use crate::execute::{Executor, Workshop};
use crate::files::agent::AgentFile;
use crate::guard::Guard;
use crate::identity::{Identity, IdentityError};
use crate::main_loop::{self, Assigned, Event, MainLoop, Wiring};
use crate::metrics::Metrics;
use crate::mind::{Deeds, Mind};
use crate::peers::Peers;
use crate::pki::{Credentials, CredentialsError, Paths, ServerTls};
use crate::server::{Remote, Server, ServerError};
use crate::setup::{self, Directories};
use crate::transport::OverApi;
use crate::vip::Keeper;
use crate::{archive, backups, duties, fence, kept, paths, slots, tending, wire};

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("{} is node {found}, and the agent file says {asked}", .state_dir.display())]
    OtherNode { state_dir: PathBuf, found: NodeName, asked: NodeName },
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Store(#[from] pgherd_dcs::OpenError),
    #[error(transparent)]
    Durable(#[from] DurableError),
    #[error(transparent)]
    Agreed(#[from] AgreedError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("the store has no secrets")]
    NoSecrets,
    #[error("{doing} {}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{}: made by somebody else", .path.display())]
    NotOurs { path: PathBuf },
    #[error("cannot listen: {0}")]
    Listen(String),
}

/// Runs the agent until `stop` resolves. `keeper` was started before any other thread.
pub async fn run(file: AgentFile, keeper: Keeper, stop: impl Future<Output = ()>) -> Result<(), DaemonError> {
    let state_dir = file.state_dir.clone();
    let identity = Identity::load(&state_dir)?;
    if identity.node != file.name {
        return Err(DaemonError::OtherNode { state_dir, found: identity.node, asked: file.name });
    }
    make_private(&paths::socket_dir(&state_dir))?;
    make_private(&paths::log_dir(&state_dir))?;
    let dirs = Directories { state_dir: state_dir.clone(), raft_dir: file.raft_dir.clone() };
    let credentials = Credentials::load(&dirs.pki())?;
    let clients = Arc::new(credentials.client_tls()?);
    let peers = Peers::new(identity.node.clone(), Arc::clone(&clients));

    let remembered = remembered_spec(&state_dir);
    let times_spec = remembered.clone().unwrap_or_else(|| no_spec(&identity));
    let Identity { herd_id, node, api_address, host, .. } = &identity;
    let config = setup::store_config(&dirs, herd_id, node, api_address, host, &times_spec);
    let transport = Arc::new(OverApi(peers.clone()));
    let raft = setup::open_store(config, &identity, transport).await?;
    let store = Store::from(raft.clone());

    let (sender, events) = mpsc::channel(main_loop::QUEUE);
    let (gossip, own_gossip) = watch::channel(crate::gossip::Gossip::silent(&identity.node));
    let tls = Arc::new(ServerTls::new(&credentials)?);
    let metrics = Arc::new(Metrics::new(identity.herd.as_str(), None, identity.node.as_str()));
    let authority = Paths::of(&dirs.pki()).authority;
    let authorities = fs::read_to_string(&authority).map_err(|source| DaemonError::Io {
        doing: "read",
        path: authority,
        source,
    })?;
    let backend = Arc::new(AgentBackend {
        raft: raft.clone(),
        store: store.clone(),
        events: sender.clone(),
        own_gossip: own_gossip.clone(),
        peers: peers.clone(),
        identity: identity.clone(),
        state_dir: state_dir.clone(),
        authorities: authorities.clone(),
        health: Default::default(),
        metrics: Arc::clone(&metrics),
        routes: watch::channel(None).0,
        certificate_expires: ArcSwap::from_pointee(credentials.expires()),
        changes: Default::default(),
        listeners: Default::default(),
        instance: Default::default(),
        spec: Default::default(),
    });
    let listening = wire::serve(&file, Arc::clone(&tls), Arc::clone(&backend), metrics)
        .await
        .map_err(DaemonError::Listen)?;
    let renewal = Renewal { pki_dir: dirs.pki(), server: tls, clients };
    let keeping = [
        tokio::spawn(Arc::clone(&backend).keep_shown()),
        tokio::spawn(Arc::clone(&backend).keep_certificate(renewal)),
    ];

    tokio::pin!(stop);
    let outcome = tokio::select! {
        () = &mut stop => Ok(()),
        outcome = work(Work {
            file, keeper, identity, credentials, authorities, backend, raft: raft.clone(), store, peers, sender, events,
            gossip, own_gossip,
        }) => outcome,
    };
    for task in keeping {
        task.abort();
    }
    drop(listening);
    raft.shutdown().await;
    outcome
}

struct Work {
    file: AgentFile,
    keeper: Keeper,
    identity: Identity,
    credentials: Credentials,
    authorities: String,
    backend: Arc<AgentBackend>,
    raft: RaftStore,
    store: Store,
    peers: Peers,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    gossip: watch::Sender<crate::gossip::Gossip>,
    own_gossip: watch::Receiver<crate::gossip::Gossip>,
}

async fn work(work: Work) -> Result<(), DaemonError> {
    let Work {
        file,
        keeper,
        identity,
        credentials,
        authorities,
        backend,
        raft,
        store,
        peers,
        sender,
        events,
        gossip,
        own_gossip,
    } = work;
    let mut view = store.watch();
    let (stored, secrets) = first_content(&mut view).await?;
    let me = identity.node.clone();
    remember_spec(&file.state_dir, &stored.spec);
    keep_passfile(&file.state_dir, &stored.spec, &secrets);
    keep_repository_file(&file.state_dir, &stored.spec, &own_cluster(&stored.spec, &me), &me);
    let cluster = own_cluster(&stored.spec, &me);
    let durable = DurableFile::open(&file.state_dir)?;

    let (spec_sender, spec) = watch::channel(Arc::new(stored.spec.clone()));
    backend.spec.get_or_init(|| spec.clone());
    let (duties_sender, duties) = watch::channel(Assigned::default());
    let (pause_sender, look_pause) = watch::channel(Duration::ZERO);
    let own_node = stored.spec.node(&me).map(|(_, node)| node.clone());
    let server = match &own_node {
        Some(node) => server_of(&file, node, &stored.spec, &secrets, &spec, view.clone(), &cluster).await?,
        None => Server::none(),
    };
    if let Some(instance) = server.instance() {
        backend.instance.get_or_init(|| instance.clone());
    }
    let remote = Remote::new(&file, &secrets).await?;

    let mind = Mind {
        me: me.clone(),
        cluster: cluster.clone(),
        spec: stored.spec.clone(),
        spec_generation: stored.generation,
        record: None,
        confirmed: None,
        caught_up: false,
        store_reachable: false,
        durable: durable.now().clone(),
        postgres: if own_node.is_some() { Postgres::Unknown } else { Postgres::Absent },
        list: None,
        deeds: Deeds::default(),
        busy: None,
        damage: None,
        stopping: false,
        heartbeat: None,
        drain: None,
        drained_for: None,
        peers: Default::default(),
        probe: None,
        replay_lag: None,
        replay_lsn: None,
        fence_armed: None,
        pending_restart: None,
        vip: Default::default(),
        socket_dir: server.instance().map(|instance| instance.socket_dir.display().to_string()),
        archive: None,
        repository: Default::default(),
        backing_up: None,
        backup_ended: None,
        drill_ended: None,
        memory: Memory::default(),
        decision: None,
        reason_since: None,
    };
    let workshop = Arc::new(Workshop {
        me: me.clone(),
        cluster: cluster.clone(),
        server: server.clone(),
        durable: tokio::sync::Mutex::new(durable),
        store: store.clone(),
        events: sender.clone(),
        keeper: keeper.clone(),
        pace: std::sync::Mutex::default(),
    });
    let keeper = own_node.is_some().then_some(keeper);
    let guard = match own_node {
        Some(_) => Some(guard_of(&file, &identity, credentials, authorities, &server)?),
        None => None,
    };
    let main_loop = MainLoop::new(Wiring {
        mind,
        executor: Executor::new(workshop),
        events,
        sender: sender.clone(),
        store: store.clone(),
        gossip,
        duties: duties_sender,
        look_pause: pause_sender,
        guard,
        keeper,
    });

    let (cluster_of_drills, node_of_drills) = (cluster.clone(), me.clone());
    let state_dir_of_drills = file.state_dir.clone();
    let (cluster_of_slots, cluster_of_archive, node_of_archive) =
        (cluster.clone(), cluster.clone(), me.clone());
    let sealing = archive::sealing::Sealing {
        cluster: cluster.clone(),
        node: me.clone(),
        pki_dir: paths::pki_dir(&file.state_dir),
        assigned: duties.clone(),
        spec: spec.clone(),
        events: sender.clone(),
    };
    let order: Vec<NodeName> = stored.spec.agents().map(|(name, _, _)| name.clone()).collect();
    let tasks = [
        tokio::spawn(main_loop.run()),
        tokio::spawn(follow_store(
            view,
            spec_sender,
            file.state_dir.clone(),
            cluster.clone(),
            me.clone(),
            sender.clone(),
        )),
        tokio::spawn(peers.clone().gossip(spec.clone(), own_gossip, sender.clone())),
        tokio::spawn(duties::confirm(
            store.clone(),
            cluster.clone(),
            duties.clone(),
            spec.clone(),
            sender.clone(),
        )),
        tokio::spawn(archive::sealing::ask(sealing.clone())),
        tokio::spawn(archive::sealing::seal(sealing)),
        tokio::spawn(tending::tend(raft, store, cluster, me, order)),
    ];
    let mut tasks = Vec::from(tasks);
    if server.instance().is_some() {
        tasks.push(tokio::spawn(server.clone().watch(look_pause, sender.clone())));
        tasks.push(tokio::spawn(duties::health(server.clone(), sender.clone())));
        tasks.push(tokio::spawn(stop_on_request(sender.clone())));
        let proxies = backend.listeners.clone();
        tasks.push(tokio::spawn(duties::drain(proxies, duties.clone(), sender.clone())));
        tasks.push(tokio::spawn(duties::proxy_role(server.clone(), duties.clone())));
        tasks.push(tokio::spawn(slots::keep(server.clone(), duties.clone(), sender.clone())));
        tasks.push(tokio::spawn(slots::keep_archive(
            server.clone(),
            spec.clone(),
            cluster_of_slots,
            sender.clone(),
        )));
        tasks.push(tokio::spawn(archive::owner::own(archive::owner::Owner {
            server: server.clone(),
            cluster: cluster_of_archive.clone(),
            node: node_of_archive.clone(),
            peers,
            assigned: duties.clone(),
            spec: spec.clone(),
            events: sender.clone(),
        })));
        tasks.push(tokio::spawn(backups::duty::back_up(backups::duty::Duty {
            server: server.clone(),
            cluster: cluster_of_archive,
            node: node_of_archive,
            assigned: duties.clone(),
            spec: spec.clone(),
            events: sender.clone(),
        })));
        tasks.push(tokio::spawn(backups::drilling::make_drills(backups::drilling::Drilling {
            server: server.clone(),
            cluster: cluster_of_drills,
            node: node_of_drills,
            state_dir: state_dir_of_drills,
            assigned: duties.clone(),
            spec: spec.clone(),
            events: sender.clone(),
        })));
        tasks.push(tokio::spawn(duties::heartbeat(server, duties.clone(), spec.clone(), sender.clone())));
        tasks.push(tokio::spawn(duties::probe(remote, duties, spec, sender)));
    }
    // None of them ends by itself; one that does, ended by a fault, takes the agent with it, and whoever
    // supervises starts a fresh one.
    let (first, _, others) = futures_util::future::select_all(tasks).await;
    for task in others {
        task.abort();
    }
    if let Err(error) = first {
        tracing::error!(%error, "a task of the agent has ended");
    }
    Ok(())
}

/// Waits for the specification and the secrets, which a member that has just joined has yet to be sent.
async fn first_content(view: &mut watch::Receiver<Snapshot>) -> Result<(StoredSpec, Secrets), DaemonError> {
    loop {
        let snapshot = view.borrow_and_update().clone();
        let spec = agreed::value::<StoredSpec>(&snapshot, agreed::SPEC)?;
        let secrets = agreed::value::<Secrets>(&snapshot, agreed::SECRETS)?;
        if let (Some((spec, _)), Some((secrets, _))) = (spec, secrets) {
            return Ok((spec, secrets));
        }
        if view.changed().await.is_err() {
            return Err(DaemonError::NoSecrets);
        }
    }
}

/// The cluster whose data this node keeps; for a witness the first one.
fn own_cluster(spec: &HerdSpec, me: &NodeName) -> NodeName {
    let of_node = spec.node(me).map(|(cluster, _)| cluster.name.clone());
    let first = || spec.clusters.first().map(|cluster| cluster.name.clone());
    of_node.or_else(first).unwrap_or_else(|| spec.name.clone())
}

fn guard_of(
    file: &AgentFile,
    identity: &Identity,
    credentials: Credentials,
    authorities: String,
    server: &Server,
) -> Result<Guard, DaemonError> {
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source| DaemonError::Io { doing: "start the fence of", path, source }
    };
    let handle = fence::Handle::start(file).map_err(error(&file.state_dir))?;
    let herd_id = identity.herd_id.clone();
    Ok(Guard::new(handle, server.clone(), credentials, authorities, herd_id, file.data_dir.clone()))
}

async fn server_of(
    file: &AgentFile,
    node: &NodeSpec,
    stored: &HerdSpec,
    secrets: &Secrets,
    spec: &watch::Receiver<Arc<HerdSpec>>,
    view: watch::Receiver<Snapshot>,
    cluster: &NodeName,
) -> Result<Server, DaemonError> {
    Ok(Server::open(file, node, stored, secrets.clone(), spec.clone(), view, cluster.clone()).await?)
}

/// A supervisor that takes the whole herd down asks with a signal; see [`crate::local::STOP_POSTGRES`].
async fn stop_on_request(events: mpsc::Sender<Event>) {
    let kind = tokio::signal::unix::SignalKind::user_defined1();
    let mut asked = match tokio::signal::unix::signal(kind) {
        Ok(asked) => asked,
        Err(error) => {
            tracing::warn!(%error, "cannot listen for the request to stop PostgreSQL");
            return std::future::pending().await;
        }
    };
    while asked.recv().await.is_some() {
        tracing::info!("was asked to stop PostgreSQL");
        if events.send(Event::Stop).await.is_err() {
            return;
        }
    }
}

/// Passes the store's news on, and keeps the specification at hand for the next start.
async fn follow_store(
    mut view: watch::Receiver<Snapshot>,
    spec: watch::Sender<Arc<HerdSpec>>,
    state_dir: PathBuf,
    cluster: NodeName,
    me: NodeName,
    events: mpsc::Sender<Event>,
) {
    loop {
        let snapshot = view.borrow_and_update().clone();
        if let Ok(Some((stored, _))) = agreed::value::<StoredSpec>(&snapshot, agreed::SPEC)
            && **spec.borrow() != stored.spec
        {
            remember_spec(&state_dir, &stored.spec);
            keep_repository_file(&state_dir, &stored.spec, &cluster, &me);
            spec.send_replace(Arc::new(stored.spec));
        }
        if events.send(Event::Store(snapshot)).await.is_err() || view.changed().await.is_err() {
            return;
        }
    }
}

/// The store's times are needed before the store can be read: they come from the last start.
fn remembered_spec(state_dir: &Path) -> Option<HerdSpec> {
    let text = fs::read(state_dir.join("spec.json")).ok()?;
    serde_json::from_slice(&text).ok()
}

fn remember_spec(state_dir: &Path, spec: &HerdSpec) {
    let path = state_dir.join("spec.json");
    let written =
        serde_json::to_vec(spec).map_err(io::Error::other).and_then(|text| write_synced(&path, &text, 0o600));
    if let Err(error) = written {
        tracing::warn!(%error, path = %path.display(), "cannot keep the specification for the next start");
    }
}

fn keep_passfile(state_dir: &Path, spec: &HerdSpec, secrets: &Secrets) {
    if let Err(error) = crate::local::passfile::keep(state_dir, spec, secrets) {
        tracing::warn!(%error, "cannot write the passfile for clients on this host");
    }
}

/// For commands on this host that read the repository themselves, also while no agent runs: `wal fetch` of a copy that was restored, `restore`. It names
/// files of secrets and has none.
fn keep_repository_file(state_dir: &Path, spec: &HerdSpec, cluster: &NodeName, me: &NodeName) {
    let path = state_dir.join(paths::REPOSITORY_FILE);
    let backup = spec.cluster(cluster).and_then(|cluster| cluster.backup.as_ref());
    let kept = match backup {
        Some(backup) => {
            let text = {
                let from_here = kept::from_here(&backup.repository, spec, me, &paths::pki_dir(state_dir));
                crate::files::repository::write(&from_here)
            };
            match fs::read_to_string(&path) {
                Ok(there) if there == text => Ok(()),
                _ => write_synced(&path, text.as_bytes(), 0o644),
            }
        }
        None => match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
    };
    if let Err(error) = kept {
        tracing::warn!(%error, path = %path.display(), "cannot keep the file of the repository");
    }
}

fn no_spec(identity: &Identity) -> HerdSpec {
    HerdSpec {
        format: Default::default(),
        name: identity.herd.clone(),
        times: Default::default(),
        clusters: Vec::new(),
        witnesses: Vec::new(),
    }
}

/// A directory for this user alone. One that exists must be ours already: in a shared place somebody else
/// could have made it to listen in.
fn make_private(dir: &Path) -> Result<(), DaemonError> {
    let error = |doing| move |source| DaemonError::Io { doing, path: dir.to_owned(), source };
    match fs::DirBuilder::new().mode(0o700).recursive(true).create(dir) {
        Ok(()) => {}
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(error("create")(source)),
    }
    let meta = fs::symlink_metadata(dir).map_err(error("look at"))?;
    if !meta.is_dir() || meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(DaemonError::NotOurs { path: dir.to_owned() });
    }
    Ok(())
}
