//! What all workers of a proxy share.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use aws_lc_rs::rand;
use pgherd_core::spec::TlsMode;
use pgherd_core::types::Instant;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::cancel::Cancels;
use crate::catalog::Catalog;
use crate::census::Census;
use crate::clock;
use crate::counts::Ledger;
use crate::fence::Fence;
use crate::hba::Hba;
use crate::login;
use crate::net::{ServerTls, Way};
use crate::nodes::Nodes;
use crate::pool::{ClientId, Limits, Worker};
use crate::pools::Pools;
use crate::positions::{Marks, Positions};
use crate::proxy::Ending;
use crate::reads::Texts;
use crate::roster::Roster;
use crate::settings::Shelf;
use crate::statements::Registry;
use crate::succession::Elders;
use crate::tls::ClientTls;
use crate::verifiers::Verifiers;
use crate::wish::{Promote, Unwilling, Wishes};

/// For how long a server is a client's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    Session,
    Transaction,
    Statement,
}

/// Which clients have their servers for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pooling {
    pub mode: PoolMode,
    /// Over that, by database,
    pub databases: BTreeMap<String, PoolMode>,
    /// and over both, by user.
    pub users: BTreeMap<String, PoolMode>,
}

impl Pooling {
    /// For all.
    pub fn by(mode: PoolMode) -> Pooling {
        Pooling { mode, databases: BTreeMap::new(), users: BTreeMap::new() }
    }

    pub fn of(&self, database: &str, user: &str) -> PoolMode {
        *self.users.get(user).or_else(|| self.databases.get(database)).unwrap_or(&self.mode)
    }
}

/// Where clients read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reads {
    /// Also those who may write read from standbys, what provably only reads.
    pub split: bool,
    /// Nobody reads from a standby that has not replayed what the same client wrote.
    pub your_writes: bool,
    /// For so long a read waits for such a standby, before it goes to the primary.
    pub wait: Duration,
}

/// After so long a client that is in is closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// It asks for nothing outside of a transaction,
    pub idle: Option<Duration>,
    /// or in one.
    pub idle_transaction: Option<Duration>,
    /// A transaction is open.
    pub transaction: Option<Duration>,
    /// It waits for an answer.
    pub query: Option<Duration>,
}

/// Who may speak to the console. Roles that can log in; nothing else is asked of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleAccess {
    pub admins: BTreeSet<String>,
    /// May look, and change nothing.
    pub readers: BTreeSet<String>,
}

/// What can be replaced while the proxy runs; clients that are in stay in.
#[derive(Clone)]
pub struct Settings {
    pub hba: Hba,
    /// Of connections in the names of clients.
    pub server_mode: TlsMode,
    pub client_tls: Option<ClientTls>,
    pub client_mode: TlsMode,
    /// Who may come in by a certificate alone: PostgreSQL lets the proxy in for them by its own.
    pub certificate_users: BTreeSet<String>,
    /// Where a line of hba has the method md5, passwords that are stored for it are taken.
    pub md5_passwords: bool,
    pub pooling: Pooling,
    pub reads: Reads,
    /// Of each pool.
    pub limits: Limits,
    /// In all, those that are coming in included;
    pub max_clients: usize,
    /// of one user,
    pub max_user_clients: Option<usize>,
    /// and of one database.
    pub max_database_clients: Option<usize>,
    pub timeouts: Timeouts,
    /// What becomes of a COMMIT that is lost with its server is found out ([`crate::commit`]).
    pub checks_commits: bool,
    /// From the first byte to the proof.
    pub login_timeout: Duration,
    pub console: ConsoleAccess,
}

impl Settings {
    pub fn new(hba: Hba) -> Settings {
        Settings {
            hba,
            server_mode: TlsMode::VerifyFull,
            client_tls: None,
            client_mode: TlsMode::Prefer,
            certificate_users: BTreeSet::new(),
            md5_passwords: false,
            pooling: Pooling::by(PoolMode::Transaction),
            reads: Reads { split: false, your_writes: true, wait: Duration::from_millis(50) },
            limits: Limits {
                size: 20,
                opening: 10,
                waiting: 10_000,
                query_wait: Duration::from_secs(120),
                hold: Duration::from_secs(60),
                server_idle: Duration::from_secs(600),
                server_lifetime: Duration::from_secs(3600),
                retry: Duration::from_millis(200),
            },
            max_clients: 10_000,
            max_user_clients: None,
            max_database_clients: None,
            timeouts: Timeouts::default(),
            checks_commits: false,
            login_timeout: Duration::from_secs(60),
            console: ConsoleAccess::default(),
        }
    }

    pub(crate) fn tls(&self) -> login::Tls {
        match (&self.client_tls, self.client_mode) {
            (None, TlsMode::Disable | TlsMode::Allow | TlsMode::Prefer) | (_, TlsMode::Disable) => {
                login::Tls::Unavailable
            }
            (_, TlsMode::Allow | TlsMode::Prefer) => login::Tls::Offered,
            (_, TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull) => login::Tls::Required,
        }
    }
}

pub(crate) struct World {
    pub(crate) settings: ArcSwap<Settings>,
    pub(crate) fence: Arc<Fence>,
    pub(crate) server_tls: Arc<dyn ServerTls>,
    pub(crate) verifiers: Verifiers,
    pub(crate) pools: Pools,
    pub(crate) cancels: Cancels,
    pub(crate) statements: Arc<Registry>,
    /// Settings of clients.
    pub(crate) shelf: Shelf,
    /// What servers say of themselves.
    pub(crate) reported: Shelf<Vec<(Vec<u8>, Vec<u8>)>>,
    pub(crate) positions: Positions,
    pub(crate) marks: Marks,
    pub(crate) catalog: Catalog,
    pub(crate) users: Arc<Census>,
    pub(crate) databases: Arc<Census>,
    /// Texts that seemed to read, and that a standby has refused,
    pub(crate) refused: Texts,
    /// or has answered.
    pub(crate) answered: Texts,
    pub(crate) roster: Arc<Roster>,
    pub(crate) ledger: Ledger,
    pub(crate) nodes: Nodes,
    /// Databases to which nobody is let in.
    pub(crate) disabled: Mutex<BTreeSet<String>>,
    /// Conversations with the console.
    pub(crate) consoles: AtomicUsize,
    pub(crate) reloads: Wishes<(), String>,
    pub(crate) promotions: Wishes<Promote, Unwilling>,
    /// Who may know the keys of cancels that this process has not given out.
    pub(crate) elders: OnceLock<Elders>,
    /// An operator wants the proxy to end.
    pub(crate) ending: watch::Sender<Option<Ending>>,
    /// Where clients come in.
    pub(crate) listening: OnceLock<Vec<SocketAddr>>,
    /// When the proxy was started.
    pub(crate) started: Instant,
    pub(crate) started_at: SystemTime,
    /// Where each worker's tasks are spawned.
    workers: Vec<Handle>,
    /// Clients, whether they are in or not.
    pub(crate) clients: AtomicU64,
    next_client: AtomicU64,
}

impl World {
    pub(crate) fn new(
        settings: Settings,
        server_tls: Arc<dyn ServerTls>,
        verifiers: Verifiers,
        workers: Vec<Handle>,
    ) -> World {
        World {
            fence: Arc::new(Fence::new(settings.limits.hold)),
            settings: ArcSwap::from_pointee(settings),
            server_tls,
            verifiers,
            pools: Pools::default(),
            cancels: Cancels::default(),
            statements: Arc::default(),
            shelf: Shelf::default(),
            reported: Shelf::default(),
            positions: Positions::default(),
            marks: Marks::new(clock::now()),
            catalog: Catalog::default(),
            users: Arc::default(),
            databases: Arc::default(),
            refused: Texts::default(),
            answered: Texts::default(),
            roster: Arc::default(),
            ledger: Ledger::default(),
            nodes: Nodes::default(),
            disabled: Mutex::default(),
            consoles: AtomicUsize::new(0),
            reloads: Wishes::default(),
            promotions: Wishes::default(),
            elders: OnceLock::new(),
            ending: watch::Sender::new(None),
            listening: OnceLock::new(),
            started: clock::now(),
            started_at: SystemTime::now(),
            workers,
            clients: AtomicU64::new(0),
            next_client: AtomicU64::new(1),
        }
    }

    /// To servers in the names of clients.
    pub(crate) fn way(&self) -> Way<'_> {
        Way { tls: &*self.server_tls, mode: self.settings.load().server_mode }
    }

    /// For the proxy's own questions.
    pub(crate) fn own_way(&self) -> Way<'_> {
        Way { tls: &*self.server_tls, mode: TlsMode::VerifyFull }
    }

    pub(crate) fn disabled(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.disabled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn spawn_at(&self, worker: Worker, task: impl Future<Output = ()> + Send + 'static) {
        self.workers[usize::from(worker.0) % self.workers.len()].spawn(task);
    }

    pub(crate) fn next_client(&self) -> ClientId {
        ClientId(self.next_client.fetch_add(1, Ordering::Relaxed))
    }
}

/// Bytes that nobody can guess.
pub(crate) fn random<const BYTES: usize>() -> Result<[u8; BYTES], NoRandomness> {
    let mut bytes = [0; BYTES];
    rand::fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(bytes)
}

#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the system has no random bytes")]
pub(crate) struct NoRandomness;

/// Printable and without a comma, as SCRAM wants it: 24 characters, as many as PostgreSQL sends.
pub(crate) fn nonce() -> Result<String, NoRandomness> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes = random::<24>()?;
    Ok(bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 64)])).collect())
}
