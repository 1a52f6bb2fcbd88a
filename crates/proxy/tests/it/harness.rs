//! A server, a proxy in front of it, and clients of it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant as Moment};

use pgherd_core::spec::TlsMode;
use pgherd_core::types::{Instant, NodeName, Term};
use pgherd_proxy::hba::Hba;
use pgherd_proxy::routes::{Standby, Table, Target};
use pgherd_proxy::tls::{Trust, to_servers};
use pgherd_proxy::{Access, AuthQuery, Config, PoolMode, Pooling, Proxy, ServerTls, Settings};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::server::{Server, as_user};

pub(crate) const SOON: Duration = Duration::from_secs(20);
/// No story is longer, on whatever machine.
const STORY: Duration = Duration::from_secs(120);
pub(crate) const PASSWORD: &str = "correct horse";

/// Defines a test that runs as an unprivileged user, with a server and a proxy in front of it.
macro_rules! story {
    ($(#[$meta:meta])* async fn $name:ident($scene:ident) $body:block) => {
        #[test]
        $(#[$meta])*
        fn $name() {
            crate::harness::run(concat!(module_path!(), "::", stringify!($name)), async |$scene| $body);
        }
    };
}
pub(crate) use story;

pub(crate) fn run(test: &str, story: impl AsyncFnOnce(&Scene)) {
    let (_, test) = test.split_once("::").expect("a module path has the crate's name");
    as_user(test, &[], || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let scene = Scene::new().await;
            tokio::time::timeout(STORY, story(&scene)).await.expect("a story that ends");
        });
    });
}

pub(crate) struct Scene {
    pub(crate) proxy: Proxy,
    /// Without anything in it servers are spoken to in clear.
    pub(crate) trusts: Arc<Trusts>,
    pub(crate) server: Server,
}

/// What every story begins with; some change it.
pub(crate) fn settings() -> Settings {
    let mut settings = Settings::new(Hba::parse(["host all all 127.0.0.1/32 scram-sha-256"]).unwrap());
    settings.limits.size = 3;
    settings.limits.retry = Duration::from_millis(20);
    // Whoever shares servers is in database `mall`, and whoever does so statement by statement is `carol`.
    settings.pooling = Pooling::by(PoolMode::Session);
    settings.pooling.databases.insert("mall".to_owned(), PoolMode::Transaction);
    settings.pooling.users.insert("carol".to_owned(), PoolMode::Statement);
    settings
}

/// Whom the proxy believes to be a server, and what it shows of itself.
#[derive(Default)]
pub(crate) struct Trusts(pub(crate) Mutex<Option<(Vec<CertificateDer<'static>>, Shown)>>);

pub(crate) type Shown = (Vec<CertificateDer<'static>>, Arc<PrivateKeyDer<'static>>);

impl ServerTls for Trusts {
    fn to_node(&self, node: &NodeName, mode: TlsMode) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
        let trusts = self.0.lock().unwrap();
        let (authorities, (chain, key)) = trusts.as_ref()?;
        let mut roots = RootCertStore::empty();
        authorities.iter().for_each(|authority| roots.add(authority.clone()).unwrap());
        let shown = (chain.clone(), key.clone_key());
        let config = match mode {
            // What a herd has in its place knows nodes by more than their names, and is tested where it is.
            TlsMode::VerifyFull => {
                let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
                let config = ClientConfig::builder_with_provider(provider);
                let config =
                    config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
                Arc::new(config.with_client_auth_cert(shown.0, shown.1).unwrap())
            }
            TlsMode::VerifyCa => to_servers(Trust::Authorities(Arc::new(roots)), Some(shown)).unwrap(),
            _ => to_servers(Trust::Anything, Some(shown)).unwrap(),
        };
        Some((config, ServerName::try_from(node.to_string()).unwrap()))
    }
}

/// Of every proxy in front of the server.
pub(crate) fn config(trusts: &Arc<Trusts>) -> Config {
    Config {
        listen: [Access::ReadWrite, Access::ReadOnly]
            .map(|access| (SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0), access))
            .to_vec(),
        workers: 2,
        server_tls: Arc::clone(trusts) as Arc<dyn ServerTls>,
        auth_query: AuthQuery {
            user: "pgherd_proxy".to_owned(),
            database: "postgres".to_owned(),
            secret_of: Some("monitor".to_owned()),
        },
    }
}

impl Scene {
    async fn new() -> Scene {
        let server = Server::start();
        let admin = connect(&format!("host=127.0.0.1 port={} user=postgres dbname=postgres", server.port))
            .await
            .unwrap();
        admin
            .batch_execute(&format!(
                "CREATE ROLE alice LOGIN REPLICATION PASSWORD '{PASSWORD}'; CREATE ROLE bob LOGIN PASSWORD 'else';\
                 CREATE ROLE late LOGIN PASSWORD '{PASSWORD}' VALID UNTIL '2001-01-01';\
                 CREATE ROLE nologin NOLOGIN PASSWORD '{PASSWORD}';\
                 CREATE ROLE carol LOGIN PASSWORD '{PASSWORD}'; GRANT carol TO alice;\
                 CREATE ROLE dave LOGIN PASSWORD '{PASSWORD}';\
                 CREATE ROLE monitor LOGIN PASSWORD 'nobody knows';\
                 CREATE ROLE pgherd_proxy LOGIN;\
                 GRANT SELECT (rolname, rolcanlogin, rolvaliduntil, rolpassword) ON pg_catalog.pg_authid TO pgherd_proxy"
            ))
            .await
            .unwrap();
        for database in ["shop", "mall"] {
            admin.batch_execute(&format!("CREATE DATABASE {database} OWNER alice")).await.unwrap();
        }
        server.admit(
            "host all,replication postgres,pgherd_proxy 127.0.0.1/32 trust\n\
             host all,replication all 127.0.0.1/32 scram-sha-256\n",
        );
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        let trusts = Arc::new(Trusts::default());
        let proxy = Proxy::start(config(&trusts), settings()).unwrap();
        let scene = Scene { proxy, trusts, server };
        scene.route(1, "a");
        scene
    }

    /// From now on that node is the primary, in that term; all of them are the one server.
    pub(crate) fn route(&self, term: u64, node: &str) {
        assert!(self.proxy.learn(self.table(term, Some(node))));
    }

    pub(crate) fn table(&self, term: u64, node: Option<&str>) -> Table {
        let target = |node: &str| Target {
            node: node.parse().unwrap(),
            address: Ipv4Addr::LOCALHOST.into(),
            port: self.server.port,
            socket_dir: None,
        };
        let long = Instant::from_boot(Duration::from_secs(u64::from(u32::MAX)));
        Table {
            term: Term(term),
            primary: node.map(target),
            gate_open: true,
            standbys: vec![Standby { target: target("s"), weight: 1 }],
            forks: Vec::new(),
            draining: None,
            valid_until: long,
        }
    }

    pub(crate) fn conninfo(&self, user: &str, more: &str) -> String {
        let port = self.proxy.addresses()[0].port();
        format!("host=127.0.0.1 port={port} user={user} dbname=shop password='{PASSWORD}' {more}")
    }

    /// Of the port that leads to standbys.
    pub(crate) fn reading(&self) -> String {
        let [write, read] = [0, 1].map(|door| self.proxy.addresses()[door].port().to_string());
        self.conninfo("alice", "").replace(&write, &read)
    }

    pub(crate) async fn alice(&self) -> Client {
        connect(&self.conninfo("alice", "")).await.unwrap()
    }

    pub(crate) async fn admin(&self) -> Client {
        connect(&format!("host=127.0.0.1 port={} user=postgres dbname=shop", self.server.port)).await.unwrap()
    }
}

pub(crate) async fn connect(conninfo: &str) -> Result<Client, tokio_postgres::Error> {
    Ok(connect_and_watch(conninfo).await?.0)
}

/// Also how the connection will end.
pub(crate) async fn connect_and_watch(conninfo: &str) -> Result<(Client, Ending), tokio_postgres::Error> {
    let connecting = tokio_postgres::connect(conninfo, NoTls);
    let (client, connection) = tokio::time::timeout(SOON, connecting).await.expect("in time")?;
    Ok((client, tokio::spawn(connection)))
}

pub(crate) type Ending = tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>;

/// What a client was told at the end, though it had not asked.
pub(crate) async fn last_word(ending: Ending) -> (String, String) {
    told(&tokio::time::timeout(SOON, ending).await.expect("in time").unwrap().unwrap_err())
}

/// SQLSTATE and message of what a client was told.
pub(crate) fn told(error: &tokio_postgres::Error) -> (String, String) {
    let told = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    (told.code().code().to_owned(), told.message().to_owned())
}

/// By a simple query, which leaves nothing to be said afterwards.
pub(crate) async fn one(client: &Client, query: &str) -> String {
    let messages = tokio::time::timeout(SOON, client.simple_query(query)).await.expect("in time").unwrap();
    let row = messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.expect("a row").get(0).unwrap_or_default().to_owned()
}

pub(crate) async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let began = Moment::now();
    while !check().await {
        assert!(began.elapsed() < SOON, "not in time: {what}");
        // sleep: between two looks.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
