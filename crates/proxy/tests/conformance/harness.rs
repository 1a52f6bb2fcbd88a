//! A server that is reached directly or through a proxy, and programs that work with it.
//!
//! How the proxy pools is a [`PoolMode`]: everything else here and in the scripts is the same for all of them. What
//! cannot be the same in a mode is left out of the comparison by name, with the reason, in [`left_out`].
//!
//! Hazard: a comparison of two runs that both failed early shows nothing; each test says what a run must have done.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant as Moment};

use pgherd_core::types::{Instant, Term};
use pgherd_proxy::hba::Hba;
use pgherd_proxy::routes::{Table, Target};
use pgherd_proxy::{Access, AuthQuery, Config, InClear, PoolMode, Pooling, Proxy, Settings};
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

use crate::server::{Server, as_user, is_root, programs};

pub(crate) const USER: &str = "postgres";
pub(crate) const PASSWORD: &str = "correct horse";
/// Where the test that is run again as another user finds what was fetched.
const FETCHED: &str = "PGHERD_TEST_CONFORMANCE_DIR";
/// More than any script, and PostgreSQL's suite, has connections at one time; fewer than the server takes.
const POOL_SIZE: u32 = 40;

/// What cannot be the same in a mode: a test of PostgreSQL's suite, or a step of a driver's script.
struct LeftOut {
    script: &'static str,
    /// Empty for a test of the suite, all of which is one.
    step: &'static str,
    why: &'static str,
}

const STATEMENTS: &str = "the view shows the proxy's names of statements, and those of other clients";
const SEQUENCES: &str =
    "what nextval said is known to the server that said it, and is not asked of another one";

const BY_TRANSACTION: &[LeftOut] = &[
    LeftOut { script: "constraints", step: "", why: SEQUENCES },
    LeftOut { script: "sequence", step: "", why: SEQUENCES },
    LeftOut {
        script: "triggers",
        step: "",
        why: "the library refint keeps, in the process of a server, a plan with the values of its first use",
    },
    LeftOut {
        script: "stats",
        step: "",
        why: "a server sends its statistics when it has been idle, whoever's they are, and not before its client looks",
    },
    LeftOut { script: "python/psycopg_3.py", step: "is prepared", why: STATEMENTS },
    LeftOut { script: "python/psycopg_3.py", step: "kept", why: STATEMENTS },
    LeftOut { script: "python/asyncpg_all.py", step: "named", why: STATEMENTS },
    LeftOut { script: "python/asyncpg_all.py", step: "kept", why: STATEMENTS },
    LeftOut { script: "python/pg8000_native.py", step: "it is there", why: STATEMENTS },
    LeftOut { script: "python/pg8000_native.py", step: "it is not", why: STATEMENTS },
    LeftOut { script: "node/node_postgres.mjs", step: "prepared", why: STATEMENTS },
    LeftOut { script: "node/postgres_js.mjs", step: "there", why: STATEMENTS },
    LeftOut { script: "node/postgres_js.mjs", step: "none is there", why: STATEMENTS },
    LeftOut { script: "tokio-postgres", step: "there", why: STATEMENTS },
    LeftOut { script: "tokio-postgres", step: "closed", why: STATEMENTS },
    LeftOut { script: "sqlx", step: "kept", why: STATEMENTS },
    LeftOut { script: "sqlx", step: "closed", why: STATEMENTS },
    LeftOut {
        script: "sqlx",
        step: "described",
        why: "it executes by SQL what it has prepared by the protocol, whose names are the proxy's",
    },
];

/// Why it is left out, if it is.
pub(crate) fn left_out(script: &str, step: &str, mode: PoolMode) -> Option<&'static str> {
    let list = match mode {
        PoolMode::Session => &[],
        PoolMode::Transaction | PoolMode::Statement => BY_TRANSACTION,
    };
    list.iter().find(|out| out.script == script && out.step == step).map(|out| out.why)
}

/// Defines a test that runs as an unprivileged user, maybe with a part of what was fetched.
macro_rules! story {
    (fn $name:ident() $body:block) => {
        #[test]
        fn $name() {
            crate::harness::run_alone(concat!(module_path!(), "::", stringify!($name)), || $body);
        }
    };
    (fn $name:ident($fetched:ident: $part:literal) $body:block) => {
        #[test]
        fn $name() {
            crate::harness::run(concat!(module_path!(), "::", stringify!($name)), $part, |$fetched| $body);
        }
    };
}
pub(crate) use story;

pub(crate) fn run_alone(test: &str, story: impl FnOnce()) {
    let (_, test) = test.split_once("::").expect("a module path has the crate's name");
    as_user(test, &[], story);
}

pub(crate) fn run(test: &str, part: &str, story: impl FnOnce(&Path)) {
    let (_, test) = test.split_once("::").expect("a module path has the crate's name");
    let fetched = match std::env::var_os(FETCHED) {
        Some(dir) => PathBuf::from(dir),
        // Beside the directory for the tests' own files.
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("conformance"),
    };
    let part = fetched.join(part);
    let missing = "is missing: run .ci/conformance, which fetches it";
    assert!(part.join("made-of").exists(), "{} {missing}", part.display());
    // The build directory may be closed to others.
    let copy = is_root().then(|| open_copy(&part));
    let environment: Vec<_> = copy.iter().map(|dir| (FETCHED, dir.path())).collect();
    as_user(test, &environment, || story(&part));
}

fn open_copy(part: &Path) -> TempDir {
    let dir = TempDir::new().unwrap();
    let copied = Command::new("cp").arg("-R").arg(part).arg(dir.path()).status().unwrap();
    let opened = Command::new("chmod").args(["-R", "a+rX"]).arg(dir.path()).status().unwrap();
    assert!(copied.success() && opened.success(), "{} cannot be copied", part.display());
    dir
}

/// Of a proxy that pools so.
pub(crate) fn settings(mode: PoolMode) -> Settings {
    let mut settings = Settings::new(Hba::parse(["host all all 127.0.0.1/32 scram-sha-256"]).unwrap());
    settings.limits.size = POOL_SIZE;
    settings.pooling = Pooling::by(mode);
    settings
}

/// A server, and the way to it.
pub(crate) struct Stand {
    proxy: Option<Proxy>,
    server: Server,
}

impl Stand {
    /// Without a mode there is no proxy. Nothing else differs between the two: not even the port of the server.
    pub(crate) fn new(mode: Option<PoolMode>) -> Stand {
        Stand::with(mode.map(settings))
    }

    pub(crate) fn with(settings: Option<Settings>) -> Stand {
        let server = Server::start();
        let by_hand = Stand { proxy: None, server };
        by_hand.psql(&format!(
            "ALTER ROLE {USER} PASSWORD '{PASSWORD}';\
             CREATE ROLE pgherd_proxy LOGIN;\
             GRANT SELECT (rolname, rolcanlogin, rolvaliduntil, rolpassword) ON pg_catalog.pg_authid TO pgherd_proxy"
        ));
        by_hand.server.admit(
            "host all pgherd_proxy 127.0.0.1/32 trust\n\
             host all all 127.0.0.1/32 scram-sha-256\n",
        );
        by_hand.psql("SELECT pg_reload_conf()");
        let Stand { server, .. } = by_hand;
        let proxy = settings.map(|settings| {
            let config = Config {
                listen: vec![(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0), Access::ReadWrite)],
                workers: 2,
                server_tls: Arc::new(InClear),
                auth_query: AuthQuery {
                    user: "pgherd_proxy".to_owned(),
                    database: "postgres".to_owned(),
                    secret_of: None,
                },
            };
            let proxy = Proxy::start(config, settings).unwrap();
            let target = Target {
                node: "only".parse().unwrap(),
                address: Ipv4Addr::LOCALHOST.into(),
                port: server.port,
                socket_dir: None,
            };
            assert!(proxy.learn(Table {
                term: Term(1),
                primary: Some(target),
                gate_open: true,
                standbys: Vec::new(),
                forks: Vec::new(),
                draining: None,
                valid_until: Instant::from_boot(Duration::from_secs(u64::from(u32::MAX))),
            }));
            proxy
        });
        Stand { proxy, server }
    }

    /// Of the proxy, if there is one.
    pub(crate) fn port(&self) -> u16 {
        self.proxy.as_ref().map_or(self.server.port, |proxy| proxy.addresses()[0].port())
    }

    /// As URLs have it.
    pub(crate) fn authority(&self) -> String {
        let password = PASSWORD.replace(' ', "%20");
        format!("{USER}:{password}@127.0.0.1:{}/postgres", self.port())
    }

    /// Did anybody come through the proxy to this database? Nobody comes through a proxy that is not there.
    pub(crate) fn was_used_for(&self, database: &str) -> bool {
        let pools = self.proxy.as_ref().map(Proxy::pools).unwrap_or_default();
        pools.iter().any(|(name, _)| name.database == database)
    }

    /// A program that finds the server, or the proxy, in its environment, as libpq and most drivers look for it.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("PG")) {
                command.env_remove(name);
            }
        }
        command
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", self.port().to_string())
            .env("PGUSER", USER)
            .env("PGPASSWORD", PASSWORD)
            .env("HOME", "/nonexistent")
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC");
        command
    }

    /// What a statement says, directly at the server.
    pub(crate) fn psql(&self, statement: &str) -> String {
        let mut psql = self.command(programs().join("psql"));
        psql.env("PGPORT", self.server.port.to_string()).args([
            "-XAtq",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            "postgres",
        ]);
        let output = psql.args(["-c", statement]).output().unwrap();
        assert!(output.status.success(), "{statement}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

/// What a program printed, on both ways, and how it ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A program that does not end in time is killed, with everything that it started.
pub(crate) fn finish(command: &mut Command, within: Duration) -> Ended {
    let dir = TempDir::new().unwrap();
    let file = |name: &str| File::create(dir.path().join(name)).unwrap();
    command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr")).process_group(0);
    let read = |name: &str| String::from_utf8_lossy(&fs::read(dir.path().join(name)).unwrap()).into_owned();
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let began = Moment::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Ended { status, stdout: read("stdout"), stderr: read("stderr") };
        }
        if began.elapsed() > within {
            kill_process_group(Pid::from_child(&child), Signal::KILL).unwrap();
            child.wait().unwrap();
            panic!("{command:?} did not end within {within:?}:\n{}\n{}", read("stdout"), read("stderr"));
        }
        // sleep: between two looks.
        std::thread::sleep(Duration::from_millis(20));
    }
}
