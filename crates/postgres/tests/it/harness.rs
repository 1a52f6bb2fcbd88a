//! Real servers in temporary directories, on free ports, with certificates of their own, and gone at the end.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pgherd_core::types::{Incarnation, Lsn, Member, NodeName, Stream, Timeline};
use pgherd_postgres::clone::{CloneOrder, Progress, clone};
use pgherd_postgres::conf::{Settings, SyncNames, Upstream};
use pgherd_postgres::promote::{Order, promote};
use pgherd_postgres::roles::{self, OwnRoles};
use pgherd_postgres::secret::{Secret, Verifier};
use pgherd_postgres::sql::{Remote, Session, TlsIdentity};
use pgherd_postgres::{
    Installation, Instance, InstanceSpec, Server, TlsFiles, follow, initdb, process, slots, sync_names,
};
use tokio::sync::watch;

pub(crate) const SOON: Duration = Duration::from_secs(30);
const USER: &str = "postgres";

/// Defines a test that runs as an unprivileged user.
macro_rules! story {
    ($(#[$meta:meta])* async fn $name:ident() $body:block) => {
        #[test]
        $(#[$meta])*
        fn $name() {
            crate::harness::as_user(concat!(module_path!(), "::", stringify!($name)), || async $body);
        }
    };
}
pub(crate) use story;

/// Runs a story; as root, runs the same test again as `postgres` and fails if that does.
pub(crate) fn as_user<F: Future<Output = ()>>(test: &str, story: impl FnOnce() -> F) {
    if rustix::process::getuid().is_root() {
        let (_, test) = test.split_once("::").expect("a module path has the crate's name");
        let again = Command::new(readable_copy())
            .args(["--exact", test, "--nocapture", "--include-ignored"])
            .current_dir("/tmp")
            .env("HOME", "/tmp")
            .uid(id("-u"))
            .gid(id("-g"))
            .status()
            .expect("the test runs again as an unprivileged user");
        assert!(again.success(), "as {USER}: {again}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(story());
}

/// The build directory may be closed to others, so the program is copied to where they can read it. Once: tests that run
/// as threads of one program would get into each other's way.
fn readable_copy() -> PathBuf {
    static COPY: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    COPY.get_or_init(make_readable_copy).clone()
}

fn make_readable_copy() -> PathBuf {
    use std::os::unix::fs::MetadataExt;
    let original = std::env::current_exe().unwrap();
    let state = std::fs::metadata(&original).unwrap();
    let name = format!("pgherd-postgres-it-{}-{}-{}", state.ino(), state.mtime(), state.mtime_nsec());
    let copy = std::env::temp_dir().join(name);
    if !copy.exists() {
        let making = copy.with_extension(std::process::id().to_string());
        std::fs::copy(&original, &making).unwrap();
        std::fs::set_permissions(&making, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(&making, &copy).unwrap();
        for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
            let old = entry.file_name().to_str().is_some_and(|name| name.starts_with("pgherd-postgres-it-"));
            let age = entry.metadata().and_then(|data| data.modified()).ok().and_then(|at| at.elapsed().ok());
            if old && entry.path() != copy && age.is_some_and(|age| age > Duration::from_secs(3600)) {
                std::fs::remove_file(entry.path()).ok();
            }
        }
    }
    copy
}

fn id(flag: &str) -> u32 {
    let output = Command::new("id").args([flag, USER]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().expect("the tests need a user postgres")
}

pub(crate) async fn installation() -> Installation {
    let found = match std::env::var_os("PGHERD_TEST_BIN_DIR") {
        Some(dir) => Installation::at(Path::new(&dir)).await,
        None => Installation::newest().await,
    };
    found.expect("the tests need a PostgreSQL server: install Debian's postgresql package")
}

pub(crate) type Authority = rcgen::CertifiedIssuer<'static, rcgen::KeyPair>;

pub(crate) fn authority() -> Authority {
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "test herd CA");
    rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap()
}

/// The files, certificates and secrets of some nodes on this machine.
pub(crate) struct Herd {
    dir: tempfile::TempDir,
    pub(crate) ca: Authority,
    pub(crate) installation: Installation,
    pub(crate) secrets: Secrets,
    nodes: std::sync::Mutex<Vec<Instance>>,
}

pub(crate) struct Node {
    pub(crate) member: Member,
    pub(crate) server: Server,
}

impl Node {
    pub(crate) fn instance(&self) -> &Instance {
        self.server.instance()
    }

    pub(crate) async fn session(&self) -> Session {
        superuser(self.instance()).await
    }
}

pub(crate) struct Secrets {
    pub(crate) superuser: Secret,
    pub(crate) replication: Secret,
    pub(crate) rewind: Secret,
    pub(crate) monitor: Secret,
}

impl Herd {
    pub(crate) async fn new() -> Herd {
        let ca = authority();
        let dir = tempfile::Builder::new().prefix("pgh").tempdir().unwrap();
        std::fs::write(dir.path().join("ca.crt"), ca.pem()).unwrap();
        let secrets = Secrets {
            superuser: Secret::random().unwrap(),
            replication: Secret::random().unwrap(),
            rewind: Secret::random().unwrap(),
            monitor: Secret::random().unwrap(),
        };
        Herd { dir, ca, installation: installation().await, secrets, nodes: Default::default() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Describes a node, with its certificate, on a free port.
    pub(crate) async fn node(&self, name: &str) -> Instance {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(dir.join("private")).unwrap();
        std::fs::set_permissions(dir.join("private"), PermissionsExt::from_mode(0o700)).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let cert = params.signed_by(&key, &*self.ca).unwrap();
        let tls = TlsFiles {
            cert: dir.join("node.crt"),
            key: dir.join("node.key"),
            ca: self.dir.path().join("ca.crt"),
        };
        std::fs::write(&tls.cert, cert.pem()).unwrap();
        std::fs::write(&tls.key, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&tls.key, PermissionsExt::from_mode(0o600)).unwrap();
        let instance = Instance::new(InstanceSpec {
            installation: self.installation.clone(),
            node: name.parse().unwrap(),
            data_dir: dir.join("data"),
            wal_dir: None,
            private_dir: dir.join("private"),
            socket_dir: dir.clone(),
            log_dir: dir.join("log"),
            port: free_port(),
            listen_addresses: vec!["127.0.0.1".into()],
            tls,
            os_user: pgherd_postgres::instance::os_user().await.unwrap(),
        })
        .unwrap();
        self.nodes.lock().unwrap().push(instance.clone());
        instance
    }

    pub(crate) fn own_roles(&self) -> OwnRoles {
        OwnRoles {
            replication: Verifier::of(&self.secrets.replication),
            rewind: Verifier::of(&self.secrets.rewind),
            monitor: Verifier::of(&self.secrets.monitor),
        }
    }

    /// A node with a fresh cluster, running as a standby of nobody.
    pub(crate) async fn initialized(&self, name: &str) -> Server {
        let instance = self.node(name).await;
        initdb::initdb(&instance, &settings(), &self.secrets.superuser, SOON).await.unwrap();
        start(&instance).await
    }

    /// A primary on timeline 2 and standbys that stream from it, the first of them synchronous.
    pub(crate) async fn cluster(&self, primary: &str, standbys: &[&str]) -> Vec<Node> {
        let server = self.initialized(primary).await;
        let order = Order { timeline: Timeline(2), at_least: Lsn(0), names: SyncNames::Empty };
        promote(&server, &order, SOON).await.unwrap();
        let session = superuser(server.instance()).await;
        roles::ensure_own(&session, &self.own_roles(), SOON).await.unwrap();
        let mut nodes = vec![Node { member: member(primary, 1), server }];
        for name in standbys {
            let standby = self.standby(name, nodes[0].server.instance()).await;
            nodes.push(standby);
        }
        if let Some(first) = nodes.get(1) {
            self.wait_for(&nodes[0], 1, &[&first.member]).await;
        }
        nodes
    }

    /// A new standby that streams from `source`.
    pub(crate) async fn standby(&self, name: &str, source: &Instance) -> Node {
        let instance = self.node(name).await;
        let member = member(name, 1);
        slots::ensure(&superuser(source).await, &member, SOON).await.unwrap();
        let order = self.clone_order(source, Some(&member)).await;
        clone(&instance, &settings(), &order, watch::Sender::new(Progress::default())).await.unwrap();
        self.follow(&instance, None, source, &member).await;
        let server = start(&instance).await;
        let upstream = upstream(source, &member);
        follow::streaming(&superuser(&instance).await, &upstream, SOON).await.unwrap();
        Node { member, server }
    }

    pub(crate) async fn clone_order(&self, source: &Instance, slot: Option<&Member>) -> CloneOrder {
        CloneOrder {
            source: self.remote(source, roles::MONITOR, &self.secrets.monitor).await,
            replication_password: self.secrets.replication.clone(),
            slot: slot.cloned(),
            max_rate_kb: None,
            tablespaces: Vec::new(),
            stall: SOON,
        }
    }

    pub(crate) async fn follow(
        &self,
        node: &Instance,
        server: Option<&Server>,
        of: &Instance,
        member: &Member,
    ) {
        let password = &self.secrets.replication;
        follow::follow(node, server, &upstream(of, member), password, None).await.unwrap();
    }

    /// Sets the list on a primary and waits until it holds.
    pub(crate) async fn wait_for(&self, primary: &Node, needed: usize, members: &[&Member]) {
        let names = SyncNames::Any { needed, streams: members.iter().map(|member| stream(member)).collect() };
        sync_names::set(primary.server.instance(), Some(&primary.server), &names).await.unwrap();
        sync_names::prove(&primary.server, &names, SOON).await.unwrap();
        let session = superuser(primary.server.instance()).await;
        let listed: Vec<String> = members.iter().map(|member| stream(member).to_string()).collect();
        let query = "SELECT coalesce(bool_and(sync_priority > 0), true) FROM pg_stat_replication \
                     WHERE application_name = ANY ($1)";
        until("every WAL sender counts by the list", async || {
            let disagree = sync_names::senders_disagree(&session, &names, SOON).await.unwrap();
            let counts: bool = session.query_one(query, &[&listed]).await.unwrap().get(0);
            (disagree.is_empty() && counts).then_some(())
        })
        .await;
    }

    /// Somebody without a password, by a certificate of the herd, or of another CA with the same name.
    pub(crate) async fn certified(
        &self,
        instance: &Instance,
        role: &str,
        common_name: &str,
        ca: &Authority,
    ) -> Remote {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, common_name);
        let cert = params.signed_by(&key, &**ca).unwrap();
        let dir = tempfile::Builder::new().prefix("client").tempdir_in(self.path()).unwrap();
        let tls = TlsFiles {
            cert: dir.path().join("client.crt"),
            key: dir.path().join("client.key"),
            ca: self.path().join("ca.crt"),
        };
        std::fs::write(&tls.cert, cert.pem()).unwrap();
        std::fs::write(&tls.key, key.serialize_pem()).unwrap();
        Remote {
            host: instance.node.to_string(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: instance.port,
            role: role.to_owned(),
            password: Secret::new("none"),
            tls: TlsIdentity::load(&tls).await.unwrap(),
        }
    }

    pub(crate) async fn remote(&self, instance: &Instance, role: &str, password: &Secret) -> Remote {
        Remote {
            host: instance.node.to_string(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: instance.port,
            role: role.to_owned(),
            password: password.clone(),
            tls: TlsIdentity::load(&instance.tls).await.unwrap(),
        }
    }
}

impl Drop for Herd {
    fn drop(&mut self) {
        let nodes = std::mem::take(&mut *self.nodes.lock().unwrap());
        if std::thread::panicking() {
            for node in &nodes {
                show_logs(node);
            }
        }
        let clean = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                for node in nodes {
                    if let Err(error) = process::ensure_gone(&node, SOON).await {
                        eprintln!("{}: {error}", node.node);
                    }
                }
            });
        });
        clean.join().ok();
    }
}

pub(crate) fn show_logs(node: &Instance) {
    for file in std::fs::read_dir(&node.log_dir).into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(file.path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("--- {} {}", node.node, file.path().display());
        for line in &lines[lines.len().saturating_sub(25)..] {
            eprintln!("{line}");
        }
    }
}

pub(crate) fn settings() -> Settings {
    Settings {
        parameters: [("shared_buffers", "16MB"), ("max_wal_size", "256MB")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        max_slot_wal_keep_bytes: 1 << 30,
        data_checksums: true,
        ..Settings::default()
    }
}

/// Starts a node and waits until it answers.
pub(crate) async fn start(instance: &Instance) -> Server {
    let server = Server::start(instance, SOON).await.unwrap();
    server.ready(SOON).await.unwrap();
    server
}

pub(crate) async fn superuser(instance: &Instance) -> Session {
    let session = Session::local(instance, roles::SUPERUSER, SOON).await.unwrap();
    session.batch_execute("SET search_path = public").await.unwrap();
    session
}

/// One value of one row, as text.
pub(crate) async fn ask(session: &Session, query: &str) -> String {
    let messages = session.simple_query(query).await.unwrap();
    for message in messages {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
            return row.get(0).unwrap_or("").to_owned();
        }
    }
    String::new()
}

/// Waits until `check` returns something.
pub(crate) async fn until<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(began.elapsed() < SOON, "not within {SOON:?}: {what}");
        // sleep: between two looks.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn member(name: &str, incarnation: u64) -> Member {
    Member { node: name.parse::<NodeName>().unwrap(), incarnation: Incarnation(incarnation) }
}

/// To the driver the timeline in a name is part of the name, and the same one will do for all.
const ADOPTED: Timeline = Timeline(2);

pub(crate) fn stream(member: &Member) -> Stream {
    Stream { member: member.clone(), timeline: ADOPTED }
}

pub(crate) fn upstream(of: &Instance, member: &Member) -> Upstream {
    Upstream {
        node: of.node.clone(),
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
        port: of.port,
        member: member.clone(),
        adopted: Some(ADOPTED),
    }
}

fn free_port() -> u16 {
    // Below the kernel's range for outgoing connections a port that is free now stays free until it is used.
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 22_000 + (std::process::id() % 900) as u16 * 10;
    loop {
        let port = start + NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
