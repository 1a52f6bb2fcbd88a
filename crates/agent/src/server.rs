//! The local PostgreSQL as the executor and the main loop use it: each deed as one call, and one look that
//! sees everything. It puts together what the specification, the secrets and the driver know; it decides
//! nothing.
//!
//! A witness has the same handle with nothing behind it.
//!
//! Hazard: a look that reports more than is true. What it cannot prove (that a list is in force, where WAL
//! ends) it reports as unknown.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgherd_core::observation::{Copy, Postgres, Primary, Sender, Standby, SyncList};
use pgherd_core::record::Record;
use pgherd_core::spec::{HerdSpec, NodeSpec, PostgresSource, RepositorySpec};
use pgherd_core::types::{Lsn, Member, NodeName, Term, Timeline};
use pgherd_dcs::Snapshot;
use pgherd_postgres::conf::{Settings, SyncNames, Upstream};
use pgherd_postgres::hba::{Gate, Rules};
use pgherd_postgres::observe::{Beat, Heart, Monitor, Probe, Target, View};
use pgherd_postgres::process::{Found, StopMode};
use pgherd_postgres::replication::Source;
use pgherd_postgres::sql::{Session, TlsIdentity};
use pgherd_postgres::wal::{Boundary, EndOfWal};
use pgherd_postgres::{
    Installation, Instance, InstanceSpec, Secret, TlsFiles, Verifier, clone, conf, control, disk, follow,
    hba, initdb, observe, process, promote, rewind, roles, seal, slots, sync_names, wal,
};
use tokio::sync::{Notify, mpsc, watch};

use crate::agreed::{self, Secrets};
use crate::backups::create::Remark;
use crate::backups::member::MemberError;
use crate::backups::take;
use crate::causes::on_one_line;
use crate::clock;
use crate::files::agent::AgentFile;
use crate::kept;
use crate::main_loop::{Event, Seen};
use crate::paths;
use crate::secrets;

mod look;
mod rebuilding;
mod remote;

pub(crate) use remote::Remote;

/// Statements of ours that take longer have failed.
const SQL_WITHIN: Duration = Duration::from_secs(2);
/// Writing configuration, and PostgreSQL's reading it.
const CONFIGURE_WITHIN: Duration = Duration::from_secs(5);
const INITDB_WITHIN: Duration = Duration::from_secs(120);
/// Until the postmaster holds its directory; recovery comes after.
const START_WITHIN: Duration = Duration::from_secs(30);
/// The disk's part of a seal. There is no seal without it.
const SEAL_WITHIN: Duration = Duration::from_secs(10);
const PROMOTE_WITHIN: Duration = Duration::from_secs(60);
const KILL_WITHIN: Duration = Duration::from_secs(10);
const CHECKPOINT_WITHIN: Duration = Duration::from_secs(300);
const CATCH_UP_WITHIN: Duration = Duration::from_secs(60);

/// How often a source is asked again whether it is ready, and how often a condition is looked at that comes soon.
const RETRY_EVERY: Duration = Duration::from_millis(300);
const LOOK_IN_A_HURRY: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("this node has no PostgreSQL")]
    None,
    #[error("PostgreSQL does not run")]
    NotRunning,
    #[error("there is no password for role {0}")]
    NoPassword(&'static str),
    #[error("{0} has no incarnation yet")]
    NotEnlisted(NodeName),
    #[error("PostgreSQL did not {doing}: {what}")]
    Sql { doing: &'static str, what: String },
    #[error("{doing} {}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    #[error("host {host} has no address")]
    NoAddress { host: String, source: Option<std::io::Error> },
    #[error("the heartbeat was cancelled inside PostgreSQL")]
    HeartbeatCancelled,
    #[error("WAL senders still count by another list")]
    SendersDisagree,
    #[error("WAL up to {wanted} has not come from {source_node} in time")]
    NotCaughtUp { source_node: NodeName, wanted: Lsn },
    #[error(transparent)]
    Installation(#[from] pgherd_postgres::installation::InstallationError),
    #[error(transparent)]
    Instance(#[from] pgherd_postgres::instance::InstanceError),
    #[error(transparent)]
    Postgres(#[from] pgherd_postgres::Error),
    #[error(transparent)]
    Conf(#[from] conf::ConfError),
    #[error(transparent)]
    Hba(#[from] hba::HbaError),
    #[error(transparent)]
    InitDb(#[from] initdb::InitdbError),
    #[error(transparent)]
    Start(#[from] process::StartError),
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error(transparent)]
    Gone(#[from] process::GoneError),
    #[error(transparent)]
    Seal(#[from] seal::SealError),
    #[error(transparent)]
    Promote(#[from] promote::PromoteError),
    #[error(transparent)]
    Follow(#[from] follow::FollowError),
    #[error(transparent)]
    Sync(#[from] sync_names::SyncError),
    #[error(transparent)]
    Slot(#[from] slots::SlotError),
    #[error(transparent)]
    Clone(#[from] clone::CloneError),
    #[error(transparent)]
    Making(#[from] pgherd_postgres::MakingError),
    #[error(transparent)]
    Rewind(#[from] rewind::RewindError),
    #[error(transparent)]
    Tls(#[from] pgherd_postgres::sql::TlsError),
}

type Result<T, E = ServerError> = std::result::Result<T, E>;

#[derive(Clone)]
pub(crate) struct Server {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    node: NodeName,
    cluster: NodeName,
    instance: Instance,
    tls: TlsIdentity,
    secrets: Secrets,
    /// Names the cluster's repository for commands; there is none where it has no repository.
    repository_file: PathBuf,
    /// By which it is known to a keeper.
    pki_dir: PathBuf,
    spec: watch::Receiver<Arc<HerdSpec>>,
    view: watch::Receiver<Snapshot>,
    running: Mutex<Option<process::Server>>,
    /// Woken when what runs has changed.
    changed: Notify,
    monitor: tokio::sync::Mutex<Monitor>,
    heart: tokio::sync::Mutex<Heart>,
    /// Configuration files are written by one at a time.
    files: tokio::sync::Mutex<()>,
    known: Mutex<Known>,
}

/// What only the one who did it can know, and what is worth remembering between looks.
#[derive(Default)]
struct Known {
    gate: Option<Gate>,
    follows: Option<(NodeName, Term)>,
    /// The physical slots, as the last look showed them.
    slots: BTreeSet<String>,
    /// The list that was proven in force for commits, on the server that runs.
    proven: Option<SyncList>,
    /// The end of WAL at the last seal.
    sealed: Option<SealedEnd>,
    /// What the files tell of a server that is stopped, or not open for queries yet, and the reading of it.
    at_rest: Option<Copy>,
    reading: Option<tokio::task::JoinHandle<std::result::Result<EndOfWal, pgherd_postgres::Error>>>,
    /// The end of WAL on a standby that receives nothing, and the replay position that it was read for.
    idle: Option<(Option<Lsn>, Copy)>,
    begins: BTreeMap<Timeline, Vec<(Timeline, Lsn)>>,
    /// Where replay stands, and the timeline that this server has streamed: together they are a place in WAL.
    replayed: Option<Lsn>,
    streamed: Option<Timeline>,
    last: Option<Postgres>,
}

/// The position that a vote claims.
#[derive(Clone, Debug)]
pub(crate) struct SealedEnd {
    pub(crate) timeline: Timeline,
    pub(crate) lsn: Lsn,
    pub(crate) begins: Vec<(Timeline, Lsn)>,
    /// False for a copy that could not even start.
    pub(crate) consistent: bool,
}

impl From<&EndOfWal> for SealedEnd {
    fn from(end: &EndOfWal) -> SealedEnd {
        let begins =
            end.history.timelines().filter_map(|timeline| Some((timeline, end.history.begin_of(timeline)?)));
        SealedEnd {
            timeline: end.timeline,
            lsn: end.lsn,
            begins: begins.filter(|(timeline, _)| *timeline <= end.timeline).collect(),
            consistent: end.consistent,
        }
    }
}

impl Server {
    pub(crate) fn none() -> Server {
        Server { inner: None }
    }

    /// Describes this node's PostgreSQL, without touching it.
    pub(crate) async fn open(
        file: &AgentFile,
        node: &NodeSpec,
        stored: &HerdSpec,
        secrets: Secrets,
        spec: watch::Receiver<Arc<HerdSpec>>,
        view: watch::Receiver<Snapshot>,
        cluster: NodeName,
    ) -> Result<Server> {
        let source = stored.cluster(&cluster).map(|cluster| cluster.postgres.source.clone());
        let installation = match source {
            Some(PostgresSource::Version(version)) => Installation::of_version(version).await?,
            Some(PostgresSource::BinDir(dir)) => Installation::at(&dir).await?,
            None => Installation::newest().await?,
        };
        let tls_files = tls_files(file);
        let instance = Instance::new(InstanceSpec {
            installation,
            node: node.name.clone(),
            data_dir: file.data_dir.clone(),
            wal_dir: file.wal_dir.clone(),
            private_dir: file.state_dir.join("postgres"),
            socket_dir: paths::socket_dir(&file.state_dir),
            log_dir: paths::log_dir(&file.state_dir),
            port: node.port,
            listen_addresses: listen_addresses(&node.host).await,
            tls: tls_files.clone(),
            os_user: pgherd_postgres::instance::os_user().await?,
        })?;
        make_private(&instance.private_dir)?;
        let local = Target::Local { instance: instance.clone(), role: roles::SUPERUSER.to_owned() };
        let inner = Inner {
            node: node.name.clone(),
            cluster,
            tls: TlsIdentity::load(&tls_files).await?,
            secrets,
            repository_file: file.state_dir.join(paths::REPOSITORY_FILE),
            pki_dir: paths::pki_dir(&file.state_dir),
            spec,
            view,
            running: Mutex::default(),
            changed: Notify::new(),
            monitor: tokio::sync::Mutex::new(Monitor::new(Target::Own(instance.clone()))),
            heart: tokio::sync::Mutex::new(Heart::new(local)),
            files: tokio::sync::Mutex::default(),
            known: Mutex::default(),
            instance,
        };
        Ok(Server { inner: Some(Arc::new(inner)) })
    }

    fn inner(&self) -> Result<&Arc<Inner>> {
        self.inner.as_ref().ok_or(ServerError::None)
    }

    pub(crate) fn instance(&self) -> Option<&Instance> {
        self.inner.as_ref().map(|inner| &inner.instance)
    }

    /// The postmaster that runs, for the fence.
    pub(crate) fn postmaster(&self) -> Option<i32> {
        let inner = self.inner.as_ref()?;
        inner.running().filter(|server| !server.is_dead()).map(|server| server.pid())
    }

    /// Looks at PostgreSQL over and over, at once when it dies, and tells the loop.
    pub(crate) async fn watch(self, mut pause: watch::Receiver<Duration>, events: mpsc::Sender<Event>) {
        let Ok(inner) = self.inner() else { return };
        let mut spec = inner.spec.clone();
        let mut configured = None;
        loop {
            let seen = self.look().await;
            let runs = matches!(seen.postgres, Postgres::Primary(_) | Postgres::Standby(_));
            if events.send(Event::Seen(Box::new(seen))).await.is_err() {
                return;
            }
            let wanted = Arc::clone(&spec.borrow_and_update());
            if runs && configured.as_ref() != Some(&wanted) {
                match inner.configure_running(configured.is_none()).await {
                    Ok(()) => configured = Some(wanted),
                    Err(error) => {
                        tracing::warn!(%error, "cannot bring PostgreSQL's configuration up to date");
                    }
                }
            }
            let wait = *pause.borrow_and_update();
            let running = inner.running().filter(|server| !server.is_dead());
            let death = async {
                match &running {
                    Some(server) => server.dead().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = death => {}
                () = inner.changed.notified() => {}
                changed = pause.changed() => if changed.is_err() { return },
                changed = spec.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    pub(crate) async fn init_db(&self) -> Result<()> {
        let inner = self.inner()?;
        clone::remove_leftovers(&inner.instance).await?;
        let settings = inner.settings(None)?;
        let superuser = Secret::new(inner.password(secrets::SUPERUSER)?);
        Ok(initdb::initdb(&inner.instance, &settings, &superuser, INITDB_WITHIN).await?)
    }

    /// Starts it as a standby that connects to nobody, admits nobody, and under whose list nothing is
    /// acknowledged, should it ever be promoted by mistake.
    pub(crate) async fn start_sealed(&self) -> Result<()> {
        let inner = self.inner()?;
        inner.forget();
        let files = inner.files.lock().await;
        seal::seal(&inner.instance, None, None, SEAL_WITHIN).await?;
        let instance = inner.instance.clone();
        let limits =
            blocking_read(move || control::ControlFile::read(&instance.control_file())).await?.limits;
        conf::write(&inner.instance, &inner.settings(Some(limits))?).await?;
        hba::write(&inner.instance, Gate::Closed, &inner.hba_rules()).await?;
        sync_names::set(&inner.instance, None, &SyncNames::Nobody).await?;
        drop(files);
        let server = process::Server::start(&inner.instance, START_WITHIN).await?;
        inner.set_running(Some(server));
        Ok(())
    }

    pub(crate) async fn stop_cleanly(&self, within: Duration) -> Result<()> {
        let frozen = self.postmaster().is_some_and(is_frozen);
        // A frozen postmaster hears no request; waiting for its answer would only lengthen the outage.
        self.stop(if frozen { StopMode::Kill } else { StopMode::Fast }, within).await
    }

    /// Whether a new session is let in, which a frozen or starved server does not do however well its standing
    /// sessions answer. Any answer counts, a refusal too.
    pub(crate) async fn lets_in(&self, within: Duration) -> bool {
        let Ok(inner) = self.inner() else { return true };
        let Some(server) = inner.running().filter(|server| !server.is_dead()) else { return true };
        if !matches!(server.status(), Ok(Some(process::Status::Ready))) {
            return true;
        }
        let asked = Monitor::new(Target::Own(inner.instance.clone())).probe_new(within).await;
        !matches!(asked, Err(pgherd_postgres::Error::Deadline { .. }))
    }

    /// Immediately, by force after a second, and returns when nothing of it is left.
    pub(crate) async fn stop_now(&self) -> Result<()> {
        self.stop(StopMode::Immediate, KILL_WITHIN).await
    }

    async fn stop(&self, mode: StopMode, within: Duration) -> Result<()> {
        let inner = self.inner()?;
        let running = match inner.running() {
            Some(server) => Some(server),
            None => match process::Server::find(&inner.instance).await? {
                Found::Running(server) => Some(server),
                _ => None,
            },
        };
        match running.filter(|server| !server.is_dead()) {
            Some(server) => drop(server.stop(mode, within).await?),
            None => drop(process::ensure_gone(&inner.instance, KILL_WITHIN).await?),
        }
        inner.set_running(None);
        inner.forget();
        Ok(())
    }

    /// Not one more byte of the old term, durably; remembers what this copy holds.
    pub(crate) async fn seal(&self) -> Result<()> {
        let inner = self.inner()?;
        let running = inner.running().filter(|server| !server.is_dead());
        let known = inner.replayed();
        let files = inner.files.lock().await;
        let sealed = seal::seal(&inner.instance, running.as_ref(), known, SEAL_WITHIN).await?;
        drop(files);
        for name in &sealed.removed {
            tracing::warn!(name, "ALTER SYSTEM had set what a seal must empty; it was removed");
        }
        tracing::info!(
            took_ms = sealed.took.as_millis(),
            alive = sealed.alive,
            timeline = %sealed.end.timeline,
            end = %sealed.end.lsn,
            "sealed"
        );
        if !sealed.alive {
            inner.set_running(None);
        }
        let mut known = inner.known();
        known.follows = None;
        known.sealed = Some(SealedEnd::from(&sealed.end));
        Ok(())
    }

    /// Not one more byte from the present upstream. `false`: no server is left, because it had to be killed for that.
    pub(crate) async fn stop_receiving(&self) -> Result<bool> {
        let inner = self.inner()?;
        let running = inner.running().filter(|server| !server.is_dead());
        let files = inner.files.lock().await;
        let alive = seal::stop_receiving(&inner.instance, running.as_ref(), SEAL_WITHIN).await?;
        drop(files);
        if !alive {
            inner.set_running(None);
        }
        inner.known().follows = None;
        Ok(alive)
    }

    /// The position for a vote: that of the seal, or read anew for a copy that was sealed in another life of
    /// this agent.
    pub(crate) async fn sealed_end(&self) -> Result<SealedEnd> {
        let inner = self.inner()?;
        if let Some(end) = inner.known().sealed.clone() {
            return Ok(end);
        }
        let (instance, known) = (inner.instance.clone(), inner.replayed());
        let end = blocking_read(move || wal::end_of_wal(&instance, known)).await?;
        let end = SealedEnd::from(&end);
        inner.known().sealed = Some(end.clone());
        Ok(end)
    }

    /// Streams from another sealed copy up to `until`, and seals again.
    pub(crate) async fn catch_up(
        &self,
        source: &NodeName,
        from: (&str, u16),
        member: Option<&Member>,
        until: Lsn,
    ) -> Result<()> {
        let inner = self.inner()?;
        let member = member.ok_or_else(|| ServerError::NotEnlisted(inner.node.clone()))?;
        let server = inner.live()?;
        // The other copy is sealed and may have no slot for this one; what is lacking is recent.
        let upstream = inner.upstream(source, from, member, None).await?;
        let password = Secret::new(inner.password(secrets::REPLICATION)?);
        let files = inner.files.lock().await;
        follow::follow(&inner.instance, Some(&server), &upstream, &password, None).await?;
        drop(files);
        let deadline = tokio::time::Instant::now() + CATCH_UP_WITHIN;
        let outcome = loop {
            let view = inner.monitor.lock().await.view(SQL_WITHIN).await;
            let got = view.ok().and_then(|view| view.receive_lsn.max(view.replay_lsn));
            if got.is_some_and(|got| got >= until) {
                break Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                break Err(ServerError::NotCaughtUp { source_node: source.clone(), wanted: until });
            }
            tokio::time::sleep(LOOK_IN_A_HURRY).await;
        };
        self.seal().await?;
        outcome
    }

    /// Leaves recovery on exactly `timeline`, with everything up to `from`, under a list that is proven in force before.
    pub(crate) async fn promote(
        &self,
        timeline: Timeline,
        from: Lsn,
        list: &SyncList,
    ) -> Result<promote::Promoted> {
        let inner = self.inner()?;
        let server = inner.live()?;
        server.ready(PROMOTE_WITHIN).await?;
        let at_least = self.sealed_end().await?.lsn.max(from);
        let order = promote::Order { timeline, at_least, names: names_of(list) };
        let files = inner.files.lock().await;
        inner.known().gate = Some(Gate::Closed);
        let promoted = promote::promote(&server, &order, PROMOTE_WITHIN).await.inspect_err(|_| {
            if server.is_dead() {
                inner.set_running(None);
            }
        })?;
        drop(files);
        tracing::info!(
            timeline = %promoted.timeline,
            fork = %promoted.fork,
            list_ms = promoted.took.list.as_millis(),
            promotion_ms = promoted.took.promotion.as_millis(),
            total_ms = promoted.took.total.as_millis(),
            "promoted"
        );
        let mut known = inner.known();
        known.proven = Some(list.clone());
        known.sealed = None;
        known.follows = None;
        drop(known);
        Ok(promoted)
    }

    /// The herd's own roles, and the databases and owners of the specification. Can be repeated.
    pub(crate) async fn create_roles(&self, spec: &HerdSpec, cluster: &NodeName) -> Result<()> {
        let inner = self.inner()?;
        let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
        let verifier = |role| Ok::<_, ServerError>(Verifier::of(&Secret::new(inner.password(role)?)));
        let own = roles::OwnRoles {
            replication: verifier(secrets::REPLICATION)?,
            rewind: verifier(secrets::REWIND)?,
            monitor: verifier(secrets::MONITOR)?,
        };
        roles::ensure_own(&session, &own, CONFIGURE_WITHIN).await?;
        for database in spec.cluster(cluster).into_iter().flat_map(|cluster| &cluster.databases) {
            let password = inner.secrets.password(database.owner.as_str());
            let app = roles::AppDatabase {
                database: database.name.to_string(),
                owner: database.owner.to_string(),
                password: password.map(|password| Verifier::of(&Secret::new(password))),
            };
            roles::ensure_app(&session, &app, INITDB_WITHIN).await?;
        }
        Ok(())
    }

    /// In a herd that was made before there were proxies, their role is missing. `None` while this server is no
    /// primary that is open for clients.
    pub(crate) async fn ensure_proxy_role(&self) -> Result<Option<bool>> {
        let inner = self.inner()?;
        let open = {
            let known = inner.known();
            known.gate == Some(Gate::Open) && matches!(known.last, Some(Postgres::Primary(_)))
        };
        if !open {
            return Ok(None);
        }
        let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
        let proxy = roles::ensure_proxy(&session, CONFIGURE_WITHIN).await?;
        let monitor = roles::ensure_switch_wal(&session, CONFIGURE_WITHIN).await?;
        Ok(Some(proxy || monitor))
    }

    /// The repository as it is reached from here.
    pub(crate) fn repository(&self, repository: &RepositorySpec) -> Result<RepositorySpec> {
        Ok(self.inner()?.repository(repository))
    }

    /// Where WAL is streamed from for the archive: this very server, since a standby goes on to be one through failovers and its WAL does not cost the
    /// primary; or the primary, where that waits for it.
    pub(crate) async fn archive_source(&self, node: &NodeName, from: (&str, u16)) -> Result<Source> {
        let inner = self.inner()?;
        let remote = inner.remote(node, from, secrets::REPLICATION).await?;
        Ok(Source::Remote(Box::new(remote)))
    }

    /// What a base backup of this server needs: a session here, and one on the primary, where that is another server.
    pub(crate) async fn backup_source(
        &self,
        primary: Option<(&NodeName, &str, u16)>,
        probed: bool,
    ) -> Result<take::Source> {
        let inner = self.inner()?;
        let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
        let mut probe = None;
        if probed {
            match Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await {
                Ok(session) => probe = Some(session),
                Err(error) => {
                    let remark = Remark::NotProbed { cause: on_one_line(&error) };
                    tracing::warn!("a base backup: {remark}");
                }
            }
        }
        let primary = match primary {
            Some((node, host, port)) => {
                let remote = inner.remote(node, (host, port), secrets::MONITOR).await?;
                Some(Session::remote(&remote, SQL_WITHIN).await?)
            }
            None => None,
        };
        Ok(take::Source { data_dir: inner.instance.data_dir.clone(), session, primary, probe })
    }

    /// The archive's slot, moved along to what is durable there; without `wanted` there is none.
    pub(crate) async fn keep_archive_slot(&self, wanted: bool, durable: Option<Lsn>) -> Result<()> {
        let inner = self.inner()?;
        let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
        if !wanted {
            slots::drop_archive(&session, SQL_WITHIN).await?;
        } else if slots::keep_archive(&session, durable, SQL_WITHIN).await? {
            tracing::warn!(
                "PostgreSQL has removed WAL that the archive had not got from here: more than max_slot_wal_keep_size"
            );
        }
        Ok(())
    }

    pub(crate) async fn follow(
        &self,
        upstream: &NodeName,
        from: (&str, u16),
        member: Option<&Member>,
        (term, timeline): (Term, Timeline),
    ) -> Result<()> {
        let inner = self.inner()?;
        let member = member.ok_or_else(|| ServerError::NotEnlisted(inner.node.clone()))?;
        let server = inner.live()?;
        let target = inner.upstream(upstream, from, member, Some(timeline)).await?;
        let password = Secret::new(inner.password(secrets::REPLICATION)?);
        let files = inner.files.lock().await;
        follow::follow(&inner.instance, Some(&server), &target, &password, None).await?;
        drop(files);
        let mut known = inner.known();
        known.follows = Some((upstream.clone(), term));
        known.sealed = None;
        Ok(())
    }

    /// Returns when every commit that begins from now on waits as `list` says, and every WAL sender counts
    /// by it.
    pub(crate) async fn set_sync_list(&self, list: &SyncList) -> Result<()> {
        let inner = self.inner()?;
        let server = inner.live()?;
        inner.known().proven = None;
        let names = names_of(list);
        let before = sync_names::written(&inner.instance).await?;
        // A name that nobody can have comes first where there was no list at all: whoever is counted then was
        // counted by a list that commits were already waiting under. And where the number changes: a WAL sender
        // that is in both lists shows the same priority under either, and would release commits by the former
        // number until it has read the new one. In between its priority is 0, so that 1 means the new list.
        if names.waits() && (!before.waits() || before.needed() != names.needed()) {
            inner.put_in_force(&server, &SyncNames::Nobody).await?;
        }
        inner.put_in_force(&server, &names).await?;
        inner.known().proven = Some(list.clone());
        Ok(())
    }

    pub(crate) async fn write_marker(&self) -> Result<Lsn> {
        let inner = self.inner()?;
        let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
        Ok(observe::marker(&session, "durability rule", SQL_WITHIN).await?)
    }

    /// Opens or closes the gate; closing ends the clients' sessions too.
    pub(crate) async fn set_gate(&self, open: bool) -> Result<()> {
        let inner = self.inner()?;
        let server = inner.live()?;
        let gate = if open { Gate::Open } else { Gate::Closed };
        let files = inner.files.lock().await;
        inner.known().gate = Some(gate);
        hba::set(&server, gate, &inner.hba_rules(), CONFIGURE_WITHIN).await?;
        drop(files);
        let primary = matches!(inner.known().last, Some(Postgres::Primary(_)));
        if open && primary {
            self.checkpoint_beside()?;
        }
        if !open {
            let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
            let query = format!(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
                 WHERE backend_type = 'client backend' AND pid <> pg_catalog.pg_backend_pid() \
                 AND usename <> ALL (ARRAY['{}'])",
                roles::OWN.join("', '")
            );
            let ended = session.batch_execute(&query).await;
            ended.map_err(|error| ServerError::Sql {
                doing: "end its clients' sessions",
                what: error.to_string(),
            })?;
        }
        Ok(())
    }

    /// Copies that have parted can be rewound only to a source with a checkpoint on its timeline, which PostgreSQL spreads over minutes
    /// unless it is asked. Nobody waits for it here.
    pub(crate) fn checkpoint_beside(&self) -> Result<()> {
        let instance = self.inner()?.instance.clone();
        tokio::spawn(async move {
            if let Ok(session) = Session::local(&instance, roles::SUPERUSER, SQL_WITHIN).await
                && let Err(error) = observe::checkpoint(&session, CHECKPOINT_WITHIN).await
            {
                tracing::info!(%error, "the checkpoint after the promotion has failed");
            }
        });
        Ok(())
    }

    pub(crate) async fn checkpoint(&self) -> Result<()> {
        let inner = self.inner()?;
        let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
        Ok(observe::checkpoint(&session, CHECKPOINT_WITHIN).await?)
    }

    pub(crate) async fn terminate(&self, pid: u32) -> Result<()> {
        let inner = self.inner()?;
        let pid = i32::try_from(pid).unwrap_or(0);
        inner.monitor.lock().await.terminate(pid, SQL_WITHIN).await?;
        Ok(())
    }

    /// Did the last look show the slot of each of `nodes`, and none of a former incarnation?
    pub(crate) fn has_slots(&self, nodes: &[&NodeName]) -> bool {
        let Some(inner) = &self.inner else { return true };
        let record = inner.record();
        let wanted: Option<BTreeSet<String>> =
            nodes.iter().map(|node| Some(conf::slot_name(&record.member(node)?))).collect();
        let ours = |slot: &&String| slot.parse::<Member>().is_ok_and(|member| nodes.contains(&&member.node));
        wanted.is_some_and(|wanted| wanted == inner.known().slots.iter().filter(ours).cloned().collect())
    }

    /// Gives each of `nodes` its slot, and drops those of their former incarnations, which nobody will use again.
    pub(crate) async fn create_slots(&self, nodes: &[&NodeName]) -> Result<()> {
        let inner = self.inner()?;
        let record = inner.record();
        let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
        for node in nodes {
            let member = record.member(node).ok_or_else(|| ServerError::NotEnlisted((*node).clone()))?;
            slots::ensure(&session, &member, SQL_WITHIN).await?;
        }
        let all: Vec<NodeName> = record.nodes.keys().cloned().collect();
        for slot in slots::list(&session, &all, SQL_WITHIN).await? {
            let former = slot.member.as_ref().is_some_and(|other| {
                nodes.contains(&&other.node) && record.member(&other.node).as_ref() != Some(other)
            });
            if former && slot.active_pid.is_none() {
                slots::drop(&session, &slot.name, &all, SQL_WITHIN).await?;
            }
        }
        Ok(())
    }

    /// On a standby: a slot for each of these members, moved along to what it has.
    pub(crate) async fn keep_slots(&self, kept: &[(Member, Option<Lsn>)]) -> Result<()> {
        let inner = self.inner()?;
        let nodes: Vec<NodeName> = inner.record().nodes.keys().cloned().collect();
        let session = Session::local(&inner.instance, roles::SUPERUSER, SQL_WITHIN).await?;
        Ok(slots::keep(&session, kept, &nodes, SQL_WITHIN).await?)
    }

    /// Commits a heartbeat and returns when it was acknowledged, with the moment at which it was begun.
    pub(crate) async fn heartbeat(&self, within: Duration) -> Result<pgherd_core::types::Instant> {
        let inner = self.inner()?;
        let mut heart = inner.heart.lock().await;
        let (before, began) = (clock::now(), tokio::time::Instant::now());
        match heart.beat(within).await? {
            // One that was begun by an earlier call and comes back late counts from its own beginning.
            Beat::Acknowledged { asked } => {
                let earlier = began.saturating_duration_since(asked);
                Ok(pgherd_core::types::Instant::from_boot(before.since_boot().saturating_sub(earlier)))
            }
            Beat::Cancelled => Err(ServerError::HeartbeatCancelled),
        }
    }

    /// The look that a promotion makes needless.
    pub(crate) async fn look_of(&self, promoted: &promote::Promoted, record: &Record) -> Seen {
        match &self.inner {
            Some(inner) => inner.look_of(promoted, record).await,
            None => self.look().await,
        }
    }

    pub(crate) async fn look(&self) -> Seen {
        match &self.inner {
            Some(inner) => inner.look().await,
            None => Seen {
                began: clock::now(),
                postgres: Postgres::Absent,
                list: None,
                replay_lag: None,
                replay_lsn: None,
                pending_restart: None,
                gate_open: false,
            },
        }
    }
}

impl Inner {
    fn repository(&self, repository: &RepositorySpec) -> RepositorySpec {
        kept::from_here(repository, &self.spec.borrow(), &self.node, &self.pki_dir)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> Option<process::Server> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_running(&self, server: Option<process::Server>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = server;
        self.changed.notify_one();
    }

    fn live(&self) -> Result<process::Server> {
        self.running().filter(|server| !server.is_dead()).ok_or(ServerError::NotRunning)
    }

    /// Another server than before: nothing that was known of the last one holds.
    fn forget(&self) {
        *self.known() = Known::default();
    }

    fn record(&self) -> Record {
        let snapshot = self.view.borrow().clone();
        agreed::record(&snapshot, &self.cluster).map_or_else(|_| Record::empty(), |(record, _)| record)
    }

    fn password(&self, role: &'static str) -> Result<String> {
        self.secrets.password(role).map(str::to_owned).ok_or(ServerError::NoPassword(role))
    }

    fn hba_rules(&self) -> Rules {
        let spec = self.spec.borrow();
        let Some(cluster) = spec.cluster(&self.cluster) else { return Rules::default() };
        let proxied = cluster.proxy.iter().flat_map(|proxy| &proxy.tls.certificate_users);
        Rules {
            lines: cluster.postgres.hba.clone(),
            maps: cluster.postgres.ident.clone(),
            through_proxies: proxied.cloned().collect(),
        }
    }

    fn settings(&self, at_least: Option<control::Limits>) -> Result<Settings> {
        let spec = self.spec.borrow();
        let cluster = spec.cluster(&self.cluster);
        let node = cluster.and_then(|cluster| cluster.node(&self.node));
        let parameters =
            cluster.zip(node).map(|(cluster, node)| cluster.parameters(node)).unwrap_or_default();
        let volume = self.instance.wal_dir.as_ref().unwrap_or(&self.instance.private_dir);
        Ok(Settings {
            parameters,
            apply_delay: node.and_then(|node| node.delay),
            max_slot_wal_keep_bytes: conf::slot_cap_bytes(disk::space(volume)?.total_bytes),
            at_least,
            data_checksums: true,
            every_address: cluster.is_some_and(|cluster| cluster.vip.is_some()),
        })
    }

    /// Returns when commits wait as `names` say and no WAL sender counts by another list.
    async fn put_in_force(&self, server: &process::Server, names: &SyncNames) -> Result<()> {
        sync_names::set(&self.instance, Some(server), names).await?;
        let session = sync_names::prove(server, names, CHECKPOINT_WITHIN).await?;
        let deadline = tokio::time::Instant::now() + CONFIGURE_WITHIN;
        while !sync_names::senders_disagree(&session, names, SQL_WITHIN).await?.is_empty() {
            if tokio::time::Instant::now() >= deadline {
                return Err(ServerError::SendersDisagree);
            }
            tokio::time::sleep(LOOK_IN_A_HURRY).await;
        }
        Ok(())
    }

    /// Brings a running server's files up to the specification; the gate stays as it is. With `reload` the server
    /// is told to read them even if they are right: what it has loaded, nobody knows.
    async fn configure_running(&self, reload: bool) -> Result<()> {
        let server = self.live()?;
        let instance = self.instance.clone();
        let (limits, primary) = blocking_read(move || {
            let control = control::ControlFile::read(&instance.control_file())?;
            Ok((control.limits, control.state.was_primary()))
        })
        .await?;
        let files = self.files.lock().await;
        let (conf_changed, raised) =
            conf::write(&self.instance, &self.settings((!primary).then_some(limits))?).await?;
        for raised in raised {
            tracing::warn!(
                name = raised.name,
                asked = raised.asked,
                kept = raised.kept,
                "a standby may not have less than its primary had"
            );
        }
        let hba_changed = hba::write(&self.instance, self.gate().await, &self.hba_rules()).await?;
        drop(files);
        if conf_changed || hba_changed || reload {
            server.reload()?;
        }
        Ok(())
    }

    async fn upstream(
        &self,
        node: &NodeName,
        from: (&str, u16),
        member: &Member,
        adopted: Option<Timeline>,
    ) -> Result<Upstream> {
        let (host, port) = from;
        let address = resolve(host).await?;
        Ok(Upstream { node: node.clone(), address, port, member: member.clone(), adopted })
    }

    async fn remote(
        &self,
        node: &NodeName,
        (host, port): (&str, u16),
        role: &'static str,
    ) -> Result<pgherd_postgres::sql::Remote> {
        Ok(pgherd_postgres::sql::Remote {
            host: node.to_string(),
            address: resolve(host).await?,
            port,
            role: role.to_owned(),
            password: Secret::new(self.password(role)?),
            tls: self.tls.clone(),
        })
    }
}

/// Stopped by a signal or a debugger, says the kernel.
fn is_frozen(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    matches!(state, Some("T" | "t"))
}

fn tls_files(file: &AgentFile) -> TlsFiles {
    let pki = crate::pki::Paths::of(&file.state_dir.join("pki"));
    TlsFiles { cert: pki.certificate, key: pki.key, ca: pki.authority }
}

/// The node's own address; with a name that resolves to something else (a NAT, a floating address), all.
async fn listen_addresses(host: &str) -> Vec<String> {
    match host.parse::<IpAddr>() {
        Ok(address) => vec![address.to_string()],
        Err(_) => vec!["*".to_owned()],
    }
}

async fn resolve(host: &str) -> Result<IpAddr> {
    if let Ok(address) = host.parse() {
        return Ok(address);
    }
    let none = |source| ServerError::NoAddress { host: host.to_owned(), source };
    let mut found = tokio::net::lookup_host((host, 0)).await.map_err(|error| none(Some(error)))?;
    found.next().map(|address| address.ip()).ok_or_else(|| none(None))
}

fn names_of(list: &SyncList) -> SyncNames {
    if list.needed == 0 {
        return SyncNames::Empty;
    }
    if list.names.is_empty() {
        return SyncNames::Nobody;
    }
    let needed = usize::try_from(list.needed).unwrap_or(usize::MAX);
    SyncNames::Any { needed, streams: list.names.iter().cloned().collect() }
}

fn make_private(dir: &PathBuf) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(dir);
    made.map_err(|source| ServerError::Io { doing: "create", path: dir.clone(), source })
}

/// Reads files on a thread that may block.
async fn blocking_read<T: Send + 'static>(
    read: impl FnOnce() -> std::result::Result<T, pgherd_postgres::Error> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(read).await {
        Ok(outcome) => Ok(outcome?),
        Err(lost) => std::panic::resume_unwind(lost.into_panic()),
    }
}
